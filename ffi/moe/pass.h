// What the two passes share: operands in kernel form, a worker's scratch, the phases
// from x to h.
#ifndef KTJAX_FFI_MOE_PASS_H_
#define KTJAX_FFI_MOE_PASS_H_

#include <memory>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "moe/profile.h"
#include "moe/routing.h"
#include "moe/schedule.h"
#include "moe/store.h"

namespace ktjax {

// One LoRA array of the layer, [experts, rows, columns].
struct LoRAMatrix {
  ConstArray array;
  int64_t rows;
  int64_t columns;

  // Packs rows [row, row + outputs) x columns [column, column + depth) of an expert's
  // matrix as strips of a panel; see Kernels::pack_outputs_*.
  void PackOutputs(const Kernels& kernels, int expert, int64_t row, int outputs,
                   int64_t column, int depth, int strips, bf16* dst,
                   ptrdiff_t dst_stride) const;
  // The same with rows as depths and columns as outputs; see Kernels::pack_depths_*.
  void PackDepths(const Kernels& kernels, int expert, int64_t row, int depth,
                  int64_t column, int outputs, int strips, bf16* dst,
                  ptrdiff_t dst_stride) const;
};

// Low-rank values (x Aᵀ and the like) are few and everything of LoRA passes through
// them: as one bfloat16, a value of rank 1 would carry its whole rounding error of up
// to 0.4% into a gradient. So they are kept as two, high + low, with a term for each;
// that costs rank more depths in a product.
//
// A row of low-rank values: for each of gate, up and down, `low_rank_width` high parts
// and as many low ones.

// One factor of a low-rank product, as a slice of its matrix from (row, column) on, and
// which of gate, up and down (0, 1, 2) it is.
struct LowRankFactor {
  LoRAMatrix matrix;
  int64_t row;
  int64_t column;
  int index;
};

// Whether a factor's contraction runs along its rows' elements (A: [rank, in]) or down
// its columns (B: [out, rank], contracted over out by the backward).
enum class Contraction { kAlongRows, kDownColumns };

// Rows that a product over tokens (a LoRA gradient) contracts at a time: its panel is
// 128 KiB then and stays in L2.
inline constexpr int kMaxGradDepth = 1024;

// A worker's scratch memory during a job.
struct Scratch {
  bf16* rows;           // packed input rows of a block
  ptrdiff_t stride;     // elements between them
  bf16* panel;          // one transposed or packed panel
  bf16* lora_panel[2];  // panels of a LoRA term
  bf16* transposed;     // low-rank values with rows and columns exchanged
  float* tile;          // product tiles
};

// Where the phases from x to h leave what is needed later. Null gate and up are not
// kept; their rows are slots, or the rows of the group. low_rank has the group's rows.
struct Activations {
  bf16* gate = nullptr;
  bf16* up = nullptr;
  bool by_slot = false;
  bf16* low_rank = nullptr;
};

class Pass {
 protected:
  Pass(const ExpertStore& store, const LayerInputs& inputs, int phases_per_group);

  int shard_count() const { return static_cast<int>(store_.shards().size()); }
  const Shard& shard(int s) const { return store_.shards()[s]; }
  // The columns of a shard that are not padding.
  int Slice(int s) const {
    return std::min(shard(s).width, geometry_.intermediate - shard(s).begin);
  }
  int rank() const { return inputs_.lora.rank; }
  LoRAMatrix Matrix(LoRAArray which) const;
  ptrdiff_t HiddenStride(int s) const {
    // 32 more than the width: rows a multiple of 4096 bytes apart share their L1 sets.
    return shard(s).width + kDepth;
  }
  int DownPanels() const {
    return static_cast<int>(CeilDiv(geometry_.hidden_padded(), kPanel));
  }

  // Runs job(worker, scratch) on the pool, with the kernels' thread state set up.
  template <typename Job>
  void Run(Job job);

  // Copies the rows of a [tokens, hidden] array that `block` names to scratch.rows, as
  // bfloat16, zero up to hidden_padded.
  void GatherRows(ConstArray array, const RowBlock& block,
                  const Scratch& scratch) const;

  // tile = rows x panel for all rows, in tiles; epilogue(first, count) consumes each.
  template <typename Epilogue>
  void Multiply(std::span<const Term> terms, int rows, int strips,
                const Scratch& scratch, Prefetch prefetch, Epilogue epilogue) const;

  // destination[r], part of the factor, i = scaling * <rows[r], factor's vector i>.
  // With several shards these are parts of the contraction: they wait in partial_ until
  // SumPartials has added them in order.
  void LowRank(Contraction contraction, int s, const Group& group,
               const RowBlock& block, const bf16* rows, ptrdiff_t stride, int depth,
               std::span<const LowRankFactor> factors, bf16* destination, bool partial,
               const Scratch& scratch) const;
  void SumPartials(const Group& group, const RowBlock& block, int factors,
                   int first_factor, bf16* destination) const;
  // The phase that does so for all blocks, when there is more than one shard.
  bool SumPartialsPhase(Worker& worker, const Group& group, int counter, int factors,
                        int first_factor, bf16* destination);

  // Counts up the phases of the group: x Aᵀ, then gate, up and h, then h Adᵀ. Returns
  // false when another worker has failed.
  bool ComputeHidden(Worker& worker, const Scratch& scratch, int group, int counter,
                     const Activations& out, Stopwatch& watch);
  static constexpr int kHiddenPhases = 4;

  // Float32 sums of [tokens, hidden_padded] for one shard: the result itself where its
  // dtype and shape allow.
  float* Sum(MutableArray result, int s);
  void ClearSum(float* sum, const OutputTask& task) const;
  void Finish(MutableArray result, const OutputTask& task);

  // The index and the offset that name `row` of a group in gate and up of `values`.
  const int32_t* KeptIndex(const Activations& values, int row) const {
    return values.by_slot ? &routing_.slots[row] : nullptr;
  }
  int64_t KeptOffset(const Activations& values, const Group& group, int row) const {
    return values.by_slot ? 0
                          : static_cast<int64_t>(row - group.first_row) *
                                geometry_.intermediate_padded();
  }
  bf16* LowRankRow(bf16* low_rank, const Group& group, int row) const {
    return low_rank + static_cast<int64_t>(row - group.first_row) * low_rank_stride_;
  }

  // Appends the terms of low-rank values `factor` (0 gate, 1 up, 2 down) times a panel.
  void AddLowRankTerms(const bf16* row, int factor, const bf16* panel, int first_strip,
                       int strip_step, std::span<Term, 6> terms, int& n_terms) const {
    for (int part = 0; part < 2; ++part) {
      terms[n_terms++] = {
          row + (2 * factor + part) * low_rank_width_, low_rank_stride_, panel,
          static_cast<int>(RoundUp(rank(), 2)),        first_strip,      strip_step};
    }
  }

  Counters& counters() { return *counters_; }
  int CounterOf(int counter, int s) const { return counter * shard_count() + s; }

  const ExpertStore& store_;
  const Geometry& geometry_;
  const LayerInputs& inputs_;
  Backend& backend_;
  const Kernels& kernels_;
  const Epilogues& epilogues_;
  const std::unique_lock<std::mutex> lock_;  // the workspace is this pass's
  const Routing routing_;
  const std::vector<Group> groups_;
  std::vector<std::vector<BlockTask>> gate_up_tasks_;  // [group * shards + shard]
  std::vector<OutputTask> output_tasks_;
  int max_group_rows_ = 0;
  int max_block_rows_ = 0;
  int max_expert_rows_ = 0;
  int low_rank_width_ = 0;   // RoundUp(rank, kDepth)
  int low_rank_stride_ = 0;  // 3 factors x 2 parts
  int rank_strips_ = 0;
  std::vector<bf16*> hidden_;    // per shard [group rows][HiddenStride]
  std::vector<float*> partial_;  // per shard [group rows][2 * 16 * rank_strips]
  std::vector<float*> sums_;     // per shard, see Sum
  std::unique_ptr<Counters> counters_;
};

template <typename Job>
void Pass::Run(Job job) {
  const size_t width =
      std::max(geometry_.hidden_padded(), 2 * geometry_.intermediate_padded());
  const size_t stride = geometry_.hidden_padded() + kDepth;
  const size_t expert_rows = RoundUp(std::max(max_expert_rows_, 1), kDepth);
  const size_t rank_rows = 2 * RoundUp(std::max(rank(), 1), kernels_.max_rows);
  const size_t sizes[] = {
      sizeof(bf16) * stride * std::max(max_block_rows_, 1),
      sizeof(bf16) * kPanel * std::max<size_t>(width, kMaxGradDepth),
      sizeof(bf16) * kPanel * RoundUp(std::max(rank(), 1), kDepth),
      sizeof(bf16) * kPanel * RoundUp(std::max(rank(), 1), kDepth),
      sizeof(bf16) * (rank() ? 2 * rank_rows * expert_rows : 0),
      sizeof(float) * kPanel * std::max<size_t>(rank_rows, kernels_.max_rows),
  };
  size_t total = 0;
  for (size_t size : sizes) total += RoundUp(size, 64);
  backend_.pool.Run([&](Worker& worker) {
    char* memory = static_cast<char*>(worker.Scratch(total));
    char* part[6];
    for (int i = 0; i < 6; ++i) {
      part[i] = memory;
      memory += RoundUp(sizes[i], 64);
    }
    auto values = [&](int i) { return reinterpret_cast<bf16*>(part[i]); };
    const Scratch scratch{values(0), static_cast<ptrdiff_t>(stride),
                          values(1), {values(2), values(3)},
                          values(4), reinterpret_cast<float*>(part[5])};
    struct ThreadState {
      const Kernels& kernels;
      explicit ThreadState(const Kernels& k) : kernels(k) { kernels.enter(); }
      ~ThreadState() { kernels.leave(); }
    } state(kernels_);
    job(worker, scratch);
  });
}

template <typename Epilogue>
void Pass::Multiply(std::span<const Term> terms, int rows, int strips,
                    const Scratch& scratch, Prefetch prefetch,
                    Epilogue epilogue) const {
  if (prefetch.base) {
    // Spread over the whole product: the fewer rows there are to hide it behind, the
    // more lines per pair.
    const int64_t pairs = terms[0].depth / 2 * CeilDiv(rows, 6);
    prefetch.lines_per_pair = static_cast<int>(
        std::clamp<int64_t>(CeilDiv(prefetch.total_bytes, 64 * pairs), 1, 4));
  }
  ForTiles(kernels_, rows, [&](int first, int count) {
    Term tile_terms[6];
    for (size_t i = 0; i < terms.size(); ++i) {
      tile_terms[i] = terms[i];
      tile_terms[i].a += first * terms[i].a_stride;
    }
    kernels_.gemm(tile_terms, static_cast<int>(terms.size()), count, strips,
                  scratch.tile, false, prefetch.base ? &prefetch : nullptr);
    epilogue(first, count);
  });
}

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PASS_H_
