// What the two passes of a projection share: rows in kernel form, low-rank values.
#ifndef KTJAX_FFI_LINEAR_PASS_H_
#define KTJAX_FFI_LINEAR_PASS_H_

#include <memory>
#include <vector>

#include "linear/linear.h"
#include "moe/products.h"

namespace ktjax {

class LinearPass : protected Products {
 protected:
  // `width` is that of the rows which are multiplied with W or its transpose.
  LinearPass(const LinearStore& store, int64_t rows, int width, bool exact,
             const LinearLoRA& lora, int phases);

  // Outputs over which the backward contracts at a time: their rows and panels stay in
  // L3, and what is fetched ahead (512 KiB) in L2.
  static constexpr int kChunkPanels = 64;
  static constexpr int kChunk = kChunkPanels * kPanel;
  // Depths that a low-rank product takes at a time: what is packed stays in L2.
  static constexpr int kLowRankDepth = 2048;
  static_assert(kLowRankDepth <= kChunk);

  int rank() const { return lora_.rank; }
  int slice_count() const { return static_cast<int>(store_.slices().size()); }
  int InputPanels() const { return static_cast<int>(CeilDiv(store_.inputs(), kPanel)); }
  int InputWidth(int panel) const {
    return std::min(kPanel, store_.inputs() - panel * kPanel);
  }
  int InputStrips(int panel) const {
    return std::min(kPanelStrips,
                    store_.inputs_padded() / kStrip - panel * kPanelStrips);
  }

  Scratch MakeScratch(Arena& arena) const;
  template <typename Job>
  void Run(Job job) {
    RunOnPool([this](Arena& arena) { return MakeScratch(arena); }, job);
  }

  // All rows times `panels` panels, in tasks for the threads of a sub-pool.
  std::vector<BlockTask> MakeTasks(int panels) const;

  // Whether rows of so many values lie otherwise than a product needs them.
  bool Packs(int width) const { return exact() || width % kDepth; }
  // Columns [first, first + depth) of a block of an array [rows, width] as rows of a
  // product: where they are, or packed to scratch.rows, zero up to a multiple of
  // kDepth.
  SplitRows RowsOf(ConstArray array, int width, const RowBlock& block, int first,
                   int depth, const Scratch& scratch) const;

  // A low-rank factor: A, whose rows run along the contraction, or B, whose columns do.
  LoRAMatrix MatrixA() const { return {lora_.a, rank(), store_.inputs()}; }
  LoRAMatrix MatrixB() const { return {lora_.b, store_.outputs(), rank()}; }
  enum class Factor { kA, kB };
  // Low-rank values in two parts (see moe/pass.h), a row per row of the array, and
  // (null: not needed) the same with rows and columns exchanged.
  struct LowRankValues {
    bf16* rows = nullptr;
    bf16* transposed = nullptr;
  };
  LowRankValues MakeLowRank(int index, bool transposed) const;
  // values[r][i] = s <array[r], vector i of the factor> for the rows of a block.
  void LowRank(ConstArray array, int width, Factor factor, const RowBlock& block,
               const LowRankValues& values, const Scratch& scratch) const;
  SplitRows LowRankRows(const LowRankValues& values, int row) const {
    return {values.rows + int64_t{2} * row * low_rank_width_, 2 * low_rank_width_,
            low_rank_width_};
  }
  // As an operand of products that spread low-rank values over outputs; see moe/pass.h.
  SplitRows SpreadRows(const LowRankValues& values, int row) const {
    SplitRows rows = LowRankRows(values, row);
    if (rank() >= kHighPartsRank && !exact()) rows.low = 0;
    return rows;
  }
  SplitRows TransposedRows(const LowRankValues& values) const {
    return {values.transposed, TransposedStride(), rank() * TransposedStride()};
  }
  int SpreadDepth() const { return static_cast<int>(RoundUp(rank(), 2)); }
  bool LoRAInTwoParts() const { return exact() && rank() && lora_.a.is_float32; }

  Counters& counters() { return *counters_; }
  int CounterOf(int phase, int s) const { return phase * slice_count() + s; }

  const LinearStore& store_;
  const int rows_;
  const LinearLoRA lora_;
  std::vector<RowBlock> low_rank_blocks_;

 private:
  // Every task packs its rows: few tasks a thread, of few rows and of many panels.
  static constexpr int kPackingTasksPerThread = 2;

  ptrdiff_t TransposedStride() const { return RoundUp(std::max(rows_, 1), kDepth); }

  const int low_rank_width_;  // RoundUp(rank, kDepth)
  int tasks_per_thread_ = kTasksPerThread;
  std::vector<RowBlock> blocks_;
  std::unique_ptr<Counters> counters_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_LINEAR_PASS_H_
