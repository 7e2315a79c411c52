// What the two passes share: operands in kernel form, a worker's scratch, the phases
// from x to h.
#ifndef KTJAX_FFI_MOE_PASS_H_
#define KTJAX_FFI_MOE_PASS_H_

#include <chrono>
#include <memory>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "moe/output_sum.h"
#include "moe/profile.h"
#include "moe/routing.h"
#include "moe/schedule.h"
#include "moe/scratch.h"
#include "moe/store.h"
#include "moe/terms.h"

namespace ktjax {

// One LoRA array of the layer, [experts, rows, columns].
struct LoRAMatrix {
  ConstArray array;
  int64_t rows;
  int64_t columns;

  // Packs rows [row, row + outputs) x columns [column, column + depth) of an expert's
  // matrix as strips of a panel; see Kernels::pack_outputs_*. Its low part as well
  // where dst has one.
  void PackOutputs(const Kernels& kernels, int expert, int64_t row, int outputs,
                   int64_t column, int depth, int strips, SplitPanel dst,
                   ptrdiff_t dst_stride) const;
  // The same with rows as depths and columns as outputs; see Kernels::pack_depths_*.
  void PackDepths(const Kernels& kernels, int expert, int64_t row, int depth,
                  int64_t column, int outputs, int strips, SplitPanel dst,
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
  // float32 activations are carried in two parts, so that their results are exact to
  // float32; bfloat16 ones in one.
  bool exact() const { return inputs_.x.is_float32; }
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
  int DownPanels() const {
    return static_cast<int>(CeilDiv(geometry_.hidden_padded(), kPanel));
  }

  Scratch MakeScratch(Arena& arena) const;
  // Runs job(worker, scratch) on the pool, with the kernels' thread state set up.
  template <typename Job>
  void Run(Job job);

  // Copies the rows of a [tokens, hidden] array that `block` names to scratch.rows,
  // zero up to hidden_padded.
  void GatherRows(ConstArray array, const RowBlock& block,
                  const Scratch& scratch) const;

  // Prefetching is spread over so many passes through a panel. A kernel with larger
  // tiles makes fewer, and then fetches what is left at its own rate.
  static constexpr int kFetchRows = 6;
  // The product of rows with base weights, and what is added to it.
  struct BaseProduct {
    SplitRows rows;
    const Int8Rows* codes;  // the rows, quantised; null: base weights are decoded
    BasePanel panel;
    int depth;
    int strips;
    int expert;
    Terms lora;
  };
  // Like Multiply below.
  template <typename Touch, typename Epilogue>
  void MultiplyBase(const BaseProduct& product, int rows, const Scratch& scratch,
                    Prefetch prefetch, Touch touch, Epilogue epilogue) const;
  // scratch.tile = the product, where an expert has few rows and kernels multiply with
  // its codes as they are. By all rows of the expert: how they are cut must not change
  // a bit.
  bool DotCodes(const BaseProduct& product, int rows, const Scratch& scratch,
                Prefetch prefetch) const {
    if (!kernels_.dot_codes || exact()) return false;
    if (routing_.rows_of(product.expert) > kMaxContractRows) return false;
    prefetch.Spread(product.depth / 2);
    return kernels_.dot_codes(store_.encoding().format, product.rows.high,
                              product.rows.stride, rows, product.panel.codes,
                              product.depth, scratch.tile,
                              prefetch.base ? &prefetch : nullptr);
  }
  static const char* Start(const BasePanel& panel) {
    return panel.values ? reinterpret_cast<const char*>(panel.values)
                        : reinterpret_cast<const char*>(panel.codes.codes);
  }
  // Fetches a panel of base weights.
  Prefetch FetchPanel(const BasePanel& panel, int strips, int depth) const {
    Prefetch prefetch;
    prefetch.base = Start(panel);
    prefetch.chunk_bytes = prefetch.total_bytes =
        RoundUp(store_.PanelBytes(strips, depth), 2048);
    return prefetch;
  }
  // Fetches depth pairs [first, first + pairs) of `panels` panels, `stride` bytes
  // apart.
  Prefetch FetchPairs(const BasePanel& panel, int strips, int first, int pairs,
                      int panels, int64_t stride) const {
    Prefetch prefetch;
    prefetch.base = Start(panel) + store_.PairBytes(strips, first);
    prefetch.stride = stride;
    prefetch.chunk_bytes = RoundUp(store_.PairBytes(strips, pairs), 2048);
    prefetch.total_bytes = panels * prefetch.chunk_bytes;
    return prefetch;
  }
  // Fetches rows of h as well: other threads have written them.
  void FetchHidden(int s, const Group& group, const RowBlock& rows,
                   Prefetch& prefetch) const {
    const SplitRows hidden = HiddenRows(hidden_, s, group, rows.begin);
    prefetch.more = reinterpret_cast<const char*>(hidden.high);
    prefetch.more_bytes =
        static_cast<int64_t>(rows.count * hidden.stride) * sizeof(bf16);
  }

  // Depth pairs [first, first + pairs) of a panel, pairs <= kChunkPairs: where they
  // are, or decoded in scratch.chunk.
  const bf16* Pairs(const BasePanel& panel, int strips, int first, int pairs,
                    const Scratch& scratch, Prefetch* prefetch) const {
    if (panel.values)
      return panel.values + static_cast<int64_t>(first) * 2 * kStrip * strips;
    Decode(panel, first, pairs, scratch.chunk, prefetch, scratch);
    return scratch.chunk;
  }

  void Decode(const BasePanel& panel, int first, int pairs, bf16* dst,
              Prefetch* prefetch, const Scratch& scratch) const {
    const WorkTimer timer(scratch.times, &WorkTimes::decode);
    kernels_.decode(store_.encoding().format, panel.codes, first, pairs, dst, prefetch);
  }

  // tile += terms.
  void AddTerms(const Terms& terms, int rows, int strips,
                const Scratch& scratch) const {
    if (terms.count() == 0) return;
    kernels_.gemm(terms.data(), terms.count(), rows, strips, scratch.tile, true,
                  nullptr);
  }

  // tile = rows x panel for all rows, in tiles. touch(row) fetches what the epilogue
  // will need of a row, while the product hides the way from memory; epilogue(first,
  // count) consumes a tile.
  template <typename Touch, typename Epilogue>
  void Multiply(const Terms& terms, int rows, int strips, const Scratch& scratch,
                Prefetch prefetch, Touch touch, Epilogue epilogue) const;

  // destination[r], part of the factor, i = scaling * <rows[r], factor's vector i>.
  // With several shards these are parts of the contraction: they wait in partial_ until
  // SumPartials has added them in order.
  void LowRank(Contraction contraction, int s, const Group& group,
               const RowBlock& block, SplitRows rows, int depth,
               std::span<const LowRankFactor> factors, bf16* destination, bool partial,
               const Scratch& scratch) const;
  void SumPartials(const Group& group, const RowBlock& block, int factors,
                   int first_factor, bf16* destination) const;
  // The phase that does so for all blocks, when there is more than one shard.
  bool SumPartialsPhase(Worker& worker, const Scratch& scratch, const Group& group,
                        int counter, int factors, int first_factor, bf16* destination);

  // Counts up the phases of the group: x Aᵀ; gate, up and h; h Adᵀ and h's codes.
  // Returns false when another worker has failed.
  bool ComputeHidden(Worker& worker, const Scratch& scratch, int group, int counter,
                     const Activations& out, Stopwatch& watch);
  enum HiddenPhase { kLowRankOfX, kGateUp, kHiddenOperands, kSumHidden, kHiddenPhases };
  // Of the rows of x in scratch.rows: s x Agᵀ and s x Auᵀ; gate, up and h.
  void LowRankOfInput(const Group& group, const RowBlock& block, const Activations& out,
                      const Scratch& scratch) const;
  void GateUp(int s, const Group& group, const BlockTask& task, const Activations& out,
              const Scratch& scratch) const;
  // Base weights have one part: kernels do not write to them.
  static SplitPanel OnePart(const bf16* panel) {
    return {const_cast<bf16*>(panel), nullptr};
  }
  // Rows of h, quantised.
  Int8Rows HiddenCodes(int s, const Group& group, int row) const {
    return From(hidden_codes_[s], row - group.first_row);
  }
  static Int8Rows From(const Int8Rows& rows, int64_t first) {
    return {rows.values + first * rows.stride,
            rows.stride,
            rows.scales + first * rows.group_stride,
            rows.sums + first * rows.group_stride,
            rows.group_stride,
            rows.group};
  }
  // Whether base weights are multiplied as integers in the forward.
  bool int8() const { return inputs_.int8; }
  // Depths that share a scale in quantised rows.
  int Int8Group() const {
    const int group = store_.encoding().group;
    return group ? std::min(group, kInt8Group) : kInt8Group;
  }

  // Rounds sum_ to the result, once all workers have added to it.
  void FinishSum(const Scratch& scratch);

  // Fetches `bytes` bytes to L2, to be read or (kWrite) overwritten.
  template <bool kWrite>
  static void Fetch(const void* data, int64_t bytes) {
    const char* line = static_cast<const char*>(data);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, kWrite, 2);
  }
  // The place of `row` of the layer in a shard's sums, to be added to.
  void FetchSum(int s, int row, int panel, int strips) const {
    const auto [data, stride] = sum_.At(s, panel);
    Fetch<true>(data + routing_.tokens[row] * stride, sizeof(float) * kStrip * strips);
  }
  // One row of gate and up in `values`.
  template <bool kWrite>
  void FetchKept(const Activations& values, const Group& group, int row, int column,
                 int columns) const {
    if (!values.gate) return;
    const int32_t* index = KeptIndex(values, row);
    for (bf16* array : {values.gate, values.up}) {
      const SplitRows rows = KeptRows(values, array, group, row, column);
      const bf16* high = rows.high + (index ? *index : 0) * rows.stride;
      Fetch<kWrite>(high, sizeof(bf16) * columns);
      if (rows.low) Fetch<kWrite>(high + rows.low, sizeof(bf16) * columns);
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
  // The same as an operand of products that spread low-rank values over outputs. From
  // rank 32 on the rounding errors of so many values average out there, and the high
  // parts will do.
  SplitRows SpreadRows(bf16* low_rank, const Group& group, int row, int factor) const {
    SplitRows rows = LowRankRows(low_rank, group, row, factor);
    if (rank() >= 32 && !exact()) rows.low = 0;
    return rows;
  }
  void FetchSpread(bf16* low_rank, const Group& group, int row, int factor) const {
    const SplitRows rows = SpreadRows(low_rank, group, row, factor);
    Fetch<false>(rows.high, sizeof(bf16) * rank());
    if (rows.low) Fetch<false>(rows.high + rows.low, sizeof(bf16) * rank());
  }
  int LowRankDepth() const { return static_cast<int>(RoundUp(rank(), 2)); }
  // Where LoRA's factors need two parts.
  bool LoRAInTwoParts() const {
    return exact() && rank() && inputs_.lora.arrays[0].is_float32;
  }

  // Worker::Barrier, timed.
  static bool Wait(Worker& worker, const Scratch& scratch) {
    const WorkTimer timer(scratch.times, &WorkTimes::wait);
    return worker.Barrier();
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
  std::vector<bf16*> hidden_;           // per shard [group rows][HiddenStride]
  std::vector<Int8Rows> hidden_codes_;  // per shard, where the forward needs them
  std::vector<float*> partial_;         // per shard [group rows][2 * 16 * rank_strips]
  OutputSum sum_;                       // of y or grad_x
  int counter_count_ = 0;
  std::unique_ptr<Counters> counters_;
};

template <typename Job>
void Pass::Run(Job job) {
  Arena counting(nullptr);
  MakeScratch(counting);
  backend_.pool.Run([&](Worker& worker) {
    Arena arena(worker.Scratch(counting.used()));
    Scratch scratch = MakeScratch(arena);
    struct ThreadState {
      const Kernels& kernels;
      explicit ThreadState(const Kernels& k) : kernels(k) { kernels.enter(); }
      ~ThreadState() { kernels.leave(); }
    } state(kernels_);
    if (worker.index() || !Profile::Get().enabled()) return job(worker, scratch);
    WorkTimes times;
    scratch.times = &times;
    const uint64_t start = __rdtsc();
    const auto clock = std::chrono::steady_clock::now();
    job(worker, scratch);
    const std::chrono::duration<double> seconds =
        std::chrono::steady_clock::now() - clock;
    times.Report(__rdtsc() - start, seconds.count());
  });
}

template <typename Touch, typename Epilogue>
void Pass::Multiply(const Terms& terms, int rows, int strips, const Scratch& scratch,
                    Prefetch prefetch, Touch touch, Epilogue epilogue) const {
  prefetch.Spread(terms.data()[0].depth / 2 * CeilDiv(rows, kFetchRows));
  ForTiles(kernels_, rows, [&](int first, int count) {
    for (int row = first; row < first + count; ++row) touch(row);
    const Terms tile_terms = terms.From(first);
    const int64_t pairs = terms.data()[0].depth / 2;
    const bool fetch = prefetch.Due((rows - first - count) * pairs / kFetchRows);
    kernels_.gemm(tile_terms.data(), tile_terms.count(), count, strips, scratch.tile,
                  false, fetch ? &prefetch : nullptr);
    {
      const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
      epilogue(first, count);
    }
  });
}

template <typename Touch, typename Epilogue>
void Pass::MultiplyBase(const BaseProduct& product, int rows, const Scratch& scratch,
                        Prefetch prefetch, Touch touch, Epilogue epilogue) const {
  const auto& [operand, codes, panel, depth, strips, expert, lora] = product;
  if (codes) {
    prefetch.Spread(depth / 2 * CeilDiv(rows, kFetchRows));
    ForTiles(kernels_, rows, [&](int first, int count) {
      for (int row = first; row < first + count; ++row) touch(row);
      kernels_.gemm_int8(store_.encoding().spec(), From(*codes, first), panel.codes,
                         depth, count, scratch.tile, false,
                         prefetch.base ? &prefetch : nullptr);
      AddTerms(lora.From(first), count, strips, scratch);
      {
        const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
        epilogue(first, count);
      }
    });
    return;
  }
  if (!panel.values && DotCodes(product, rows, scratch, prefetch)) {
    for (int row = 0; row < rows; ++row) touch(row);
    AddTerms(lora, rows, strips, scratch);
    const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
    epilogue(0, rows);
    return;
  }
  if (!panel.values && rows <= kernels_.max_rows && !exact()) {
    // One tile of rows: what was decoded is used at once, from L1. (Rows in two parts
    // are summed one after the other over all depths, as they are in other tiles.)
    prefetch.Spread(depth);
    for (int row = 0; row < rows; ++row) touch(row);
    for (int pair = 0; pair < depth / 2; pair += kChunkPairs) {
      const int pairs = std::min(kChunkPairs, depth / 2 - pair);
      const bf16* values = Pairs(panel, strips, pair, pairs, scratch,
                                 prefetch.base ? &prefetch : nullptr);
      const Term term{operand.high + 2 * pair, operand.stride, values, 2 * pairs};
      kernels_.gemm(&term, 1, rows, strips, scratch.tile, pair > 0,
                    prefetch.base ? &prefetch : nullptr);
    }
    AddTerms(lora, rows, strips, scratch);
    {
      const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
      epilogue(0, rows);
    }
    return;
  }
  const bf16* values = panel.values;
  if (!values) {
    Decode(panel, 0, depth / 2, scratch.panel.high, nullptr, scratch);
    values = scratch.panel.high;
  }
  Terms terms;
  terms.Add(operand, OnePart(values), depth);
  terms.Add(lora);
  Multiply(terms, rows, strips, scratch, prefetch, touch, epilogue);
}

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PASS_H_
