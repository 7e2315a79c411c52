// What the two passes share: operands in kernel form, a worker's scratch, the phases
// from x to h.
#ifndef KTJAX_FFI_MOE_PASS_H_
#define KTJAX_FFI_MOE_PASS_H_

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "moe/output_sum.h"
#include "moe/products.h"
#include "moe/profile.h"
#include "moe/routing.h"
#include "moe/schedule.h"
#include "moe/scratch.h"
#include "moe/store.h"
#include "moe/terms.h"

namespace ktjax {

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

// Where the phases from x to h leave what is needed later. Null gate and up are not
// kept; their rows are slots, or the rows of the group. low_rank has the group's rows.
struct Activations {
  bf16* gate = nullptr;
  bf16* up = nullptr;
  bool by_slot = false;
  bf16* low_rank = nullptr;
};

class Pass : protected Products {
 protected:
  Pass(const ExpertStore& store, const LayerInputs& inputs, int phases_per_group,
       int64_t group_bytes);

  int shard_count() const { return static_cast<int>(store_.shards().size()); }
  const Shard& shard(int s) const { return store_.shards()[s]; }
  // The columns of a shard that are not padding.
  int Slice(int s) const {
    return std::min(shard(s).width, geometry_.intermediate - shard(s).begin);
  }
  int rank() const { return inputs_.lora.rank; }
  LoRAMatrix Matrix(LoRAArray which) const;
  // Rows of [group rows, width] arrays of a shard, from `row` of the layer on. The
  // stride is 32 more than the width: rows a multiple of 4096 bytes apart share their
  // L1 sets.
  ptrdiff_t HiddenStride(int s) const {
    return (shard(s).width + kDepth) * (exact() ? 2 : 1);
  }
  SplitRows HiddenRows(const std::vector<bf16*>& arrays, int s, const Group& group,
                       int row, int column = 0) const {
    return {arrays[s] + static_cast<int64_t>(row - group.first_row) * HiddenStride(s) +
                column,
            HiddenStride(s), exact() ? shard(s).width + kDepth : 0};
  }

  Scratch MakeScratch(Arena& arena) const;
  // Runs job(worker, scratch) on the pool.
  template <typename Job>
  void Run(Job job) {
    RunOnPool([this](Arena& arena) { return MakeScratch(arena); }, job);
  }
  // Copies the rows of a [tokens, hidden] array that `block` names to scratch.rows,
  // zero up to hidden_padded.
  void GatherRows(ConstArray array, const RowBlock& block,
                  const Scratch& scratch) const;

  // Whether two blocks have the same rows of x: parts of one expert's, or of a single
  // token's experts.
  bool SameTokens(const RowBlock& a, const RowBlock& b) const {
    const int32_t* tokens = routing_.tokens.data();
    return a.count == b.count &&
           std::equal(tokens + a.begin, tokens + a.begin + a.count, tokens + b.begin);
  }

  bool dropout() const { return inputs_.dropout.threshold != 0; }
  // What is kept of rows of the layer, from `row` and `column` of x or h on.
  DropoutMask MaskOf(DropoutOf of, int row, int column) const {
    return {inputs_.dropout, of, &routing_.slots[row], column};
  }
  // The rows of a block as an input of adapters: themselves, or what dropout keeps of
  // them, in scratch.kept.
  SplitRows AdapterRows(DropoutOf of, const RowBlock& block, SplitRows rows, int column,
                        int columns, const Scratch& scratch) const;

  // Rows of h, which other threads have written.
  ByteSpan HiddenBytes(int s, const Group& group, const RowBlock& rows) const {
    const SplitRows hidden = HiddenRows(hidden_, s, group, rows.begin);
    return {reinterpret_cast<const char*>(hidden.high),
            static_cast<int64_t>(sizeof(bf16)) * rows.count * hidden.stride};
  }

  // Whether an expert's adapters are multiplied as they lie in memory, which is faster
  // for few rows. By all of its rows: how they are cut must not change a bit.
  bool InPlace(int expert) const {
    return kernels_.adapters_f32 && !exact() && !dropout() &&
           routing_.rows_of(expert) <= kMaxContractRows;
  }
  // tile += low-rank values times B, [outputs, rank] from output `row` of the expert
  // on. Every strip_step-th strip of the tile.
  void AddSpreadB(LoRAArray b, int expert, int64_t row, int outputs, SplitRows low_rank,
                  int rows, float* tile, int strip_step) const {
    Matrix(b).InPlace(kernels_, expert, row, 0, [&](const auto& adapters, auto m) {
      adapters.add_dot(low_rank, rows, m, outputs, rank(), tile, strip_step);
    });
  }
  // tile += low-rank values times A, [rank, outputs] from output `column` on.
  void AddSpreadA(LoRAArray a, int expert, int64_t column, int outputs,
                  SplitRows low_rank, int rows, float* tile) const {
    Matrix(a).InPlace(kernels_, expert, 0, column, [&](const auto& adapters, auto m) {
      adapters.contract(low_rank, rows, m, rank(), outputs, tile, true);
    });
  }

  // Whether an expert's adapters are packed into panels before they are multiplied.
  bool Packs(int expert) const { return rank() && !InPlace(expert); }
  // What packing will read, to be fetched during the products before it: `count` rows
  // of B; the `part`th of so many parts of A.
  void AddRowsOfB(LoRAArray b, int expert, int64_t row, int count,
                  FetchList& list) const {
    if (Packs(expert)) list.Add(Matrix(b).WholeRows(expert, row, count));
  }
  void AddPartOfA(LoRAArray a, int expert, int part, int parts, FetchList& list) const {
    if (!Packs(expert)) return;
    const int first = rank() * part / parts;
    list.Add(Matrix(a).WholeRows(expert, first, rank() * (part + 1) / parts - first));
  }
  // Fetches the `part`th of so many parts of those columns of A.
  void FetchPartOfA(LoRAArray a, int expert, int64_t column, int outputs, int part,
                    int parts) const {
    const int first = rank() * part / parts;
    Matrix(a).FetchRows(expert, first, rank() * (part + 1) / parts - first, column,
                        outputs);
  }

  // destination[r], part of the factor, i = scaling * <rows[r], factor's vector i>.
  // With several shards these are parts of the contraction: they wait in partial_ until
  // SumPartials has added them in order.
  void LowRank(Contraction contraction, int s, const Group& group,
               const RowBlock& block, SplitRows rows, int depth,
               std::span<const LowRankFactor> factors, bf16* destination, bool partial,
               const Scratch& scratch) const;
  // The product of LowRank, for strips [first, first + width) of the factors' vectors.
  void MultiplyInPlace(Contraction contraction, const RowBlock& block, SplitRows rows,
                       int depth, std::span<const LowRankFactor> factors, int first,
                       int width, float* tile) const;
  void SumPartials(const Group& group, const RowBlock& block, int factors,
                   int first_factor, bf16* destination) const;
  // The phase that does so for all blocks, when there is more than one shard.
  bool SumPartialsPhase(Worker& worker, const Scratch& scratch, const Group& group,
                        int counter, int factors, int first_factor, bf16* destination);

  // Counts up the phases of the group: x Aᵀ; gate, up and h; h Adᵀ and h's codes. The
  // first and the last are part of the second where its tasks allow it.
  // Calls fetch_ahead() when this worker's part of gate and up is done, to fetch what
  // it will need after that. Returns false when another worker has failed.
  bool ComputeHidden(Worker& worker, const Scratch& scratch, int group, int counter,
                     const Activations& out, Stopwatch& watch,
                     const std::function<void()>& fetch_ahead);
  enum HiddenPhase { kLowRankOfX, kGateUp, kHiddenOperands, kSumHidden, kHiddenPhases };
  // Of the rows of x in scratch.rows: s x Agᵀ and s x Auᵀ; gate, up and h.
  void LowRankOfInput(const Group& group, const RowBlock& block, const Activations& out,
                      const Scratch& scratch) const;
  // Fetches A of Down for a `whole` task, which has all panels of its rows, and A of
  // gate and up for the task that a worker takes `soon` (null: none).
  void GateUp(int s, const Group& group, const BlockTask& task, bool whole,
              const BlockTask* soon, const Activations& out, const Scratch& scratch,
              TaskQueue<BlockTask>& queue) const;
  // Adds to the list what is packed for the product with a panel of gate and up.
  void AddGateUpB(int s, int expert, int panel, FetchList& list) const;
  // Of rows of h: s h Adᵀ, and codes where Down needs them.
  void HiddenOperands(int s, const Group& group, const RowBlock& block,
                      const Activations& out, const Scratch& scratch) const;
  // Rows of h, quantised.
  Int8Rows HiddenCodes(int s, const Group& group, int row) const {
    return From(hidden_codes_[s], row - group.first_row);
  }
  // Whether base weights are multiplied as integers in the forward.
  bool int8() const { return inputs_.int8; }
  // Depths whose codes have a sum in quantised rows: those that share a zero point.
  int SumGroup() const {
    if (store_.encoding().spec().blocks) return kBlockSumDepths;
    const int group = store_.encoding().group;
    return group ? std::min(group, kInt8Group) : kInt8Group;
  }

  // Rounds sum_ to the result, once all workers have added to it.
  void FinishSum(const Scratch& scratch);

  // The place of `row` of the layer in a shard's sums, to be added to.
  void FetchSum(int s, int row, int panel, int strips) const {
    const auto [data, stride] = sum_.At(s, panel);
    Fetch(data + routing_.tokens[row] * stride, sizeof(float) * kStrip * strips);
  }
  // `columns` of a row of h, dg or du, to be written.
  void FetchHiddenRow(const std::vector<bf16*>& arrays, int s, const Group& group,
                      int row, int column, int columns) const {
    const SplitRows rows = HiddenRows(arrays, s, group, row, column);
    FetchToWrite(rows.high, sizeof(bf16) * columns);
    if (rows.low) FetchToWrite(rows.high + rows.low, sizeof(bf16) * columns);
  }
  // One row of gate and up in `values`.
  void FetchKept(const Activations& values, const Group& group, int row, int column,
                 int columns) const {
    if (!values.gate) return;
    const int32_t* index = KeptIndex(values, row);
    for (bf16* array : {values.gate, values.up}) {
      const SplitRows rows = KeptRows(values, array, group, row, column);
      const bf16* high = rows.high + (index ? *index : 0) * rows.stride;
      Fetch(high, sizeof(bf16) * columns);
      if (rows.low) Fetch(high + rows.low, sizeof(bf16) * columns);
    }
  }

  // What names `row` of a group in gate and up of `values`.
  const int32_t* KeptIndex(const Activations& values, int row) const {
    return values.by_slot ? &routing_.slots[row] : nullptr;
  }
  ptrdiff_t KeptStride() const {
    return geometry_.intermediate_padded() * (exact() ? 2 : 1);
  }
  SplitRows KeptRows(const Activations& values, bf16* array, const Group& group,
                     int row, int column) const {
    if (!array) return {};
    if (!values.by_slot) {
      array += static_cast<int64_t>(row - group.first_row) * KeptStride();
    }
    return {array + column, KeptStride(),
            exact() ? geometry_.intermediate_padded() : 0};
  }
  bf16* LowRankRow(bf16* low_rank, const Group& group, int row) const {
    return low_rank + static_cast<int64_t>(row - group.first_row) * low_rank_stride_;
  }

  // The values of `factor` (0 gate, 1 up, 2 down), from `row` of the layer on.
  SplitRows LowRankRows(bf16* low_rank, const Group& group, int row, int factor) const {
    return {LowRankRow(low_rank, group, row) + 2 * factor * low_rank_width_,
            low_rank_stride_, low_rank_width_};
  }
  // The same as an operand of products that spread low-rank values over outputs.
  SplitRows SpreadRows(bf16* low_rank, const Group& group, int row, int factor) const {
    SplitRows rows = LowRankRows(low_rank, group, row, factor);
    if (rank() >= kHighPartsRank && !exact()) rows.low = 0;
    return rows;
  }
  void FetchSpread(bf16* low_rank, const Group& group, int row, int factor) const {
    const SplitRows rows = SpreadRows(low_rank, group, row, factor);
    Fetch(rows.high, sizeof(bf16) * rank());
    if (rows.low) Fetch(rows.high + rows.low, sizeof(bf16) * rank());
  }
  int LowRankDepth() const { return static_cast<int>(RoundUp(rank(), 2)); }
  // Where LoRA's factors need two parts.
  bool LoRAInTwoParts() const {
    return exact() && rank() && inputs_.lora.arrays[0].is_float32;
  }

  Counters& counters() { return *counters_; }
  int CounterOf(int counter, int s) const { return counter * shard_count() + s; }

  const ExpertStore& store_;
  const Geometry& geometry_;
  const LayerInputs& inputs_;
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
  std::vector<bf16*> hidden_;           // per shard [group rows][HiddenStride]
  std::vector<Int8Rows> hidden_codes_;  // per shard, where the forward needs them
  std::vector<float*> partial_;         // per shard [group rows][2 * 16 * rank_strips]
  OutputSum sum_;                       // of y or grad_x
  int counter_count_ = 0;
  std::unique_ptr<Counters> counters_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PASS_H_
