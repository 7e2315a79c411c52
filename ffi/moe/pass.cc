#include "moe/pass.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/bf16.h"

namespace ktjax {

Pass::Pass(const ExpertStore& store, const LayerInputs& inputs, int phases_per_group,
           int64_t group_bytes)
    : Products(store, inputs.x.is_float32),
      store_(store),
      geometry_(store.geometry()),
      inputs_(inputs),
      routing_(Route(inputs.ids, inputs.weights, inputs.tokens, inputs.k,
                     geometry_.experts)),
      groups_(MakeGroups(routing_, geometry_, group_bytes)) {
  if (inputs.int8) store.CheckIntegers();
  const int threads = backend_.pool.config().max_threads_per_subpool;
  for (const Group& group : groups_) {
    max_group_rows_ = std::max(max_group_rows_, group.rows());
    for (const RowBlock& block : group.blocks) {
      max_block_rows_ = std::max(max_block_rows_, block.count);
      max_expert_rows_ = std::max(max_expert_rows_, routing_.rows_of(block.expert));
    }
    for (const Shard& shard : store.shards()) {
      gate_up_tasks_.push_back(
          MakeBlockTasks(group.blocks, shard.width / kDepth, threads));
    }
  }
  output_tasks_ = MakeOutputTasks(inputs.tokens, store_.DownPanels(), threads);
  low_rank_width_ = static_cast<int>(RoundUp(rank(), kDepth));
  low_rank_stride_ = 6 * low_rank_width_;
  rank_strips_ = static_cast<int>(CeilDiv(rank(), kStrip));
  Workspace& workspace = backend_.workspace;
  for (int s = 0; s < shard_count(); ++s) {
    hidden_.push_back(
        workspace.Get<bf16>(Workspace::kHidden, s, max_group_rows_ * HiddenStride(s)));
    partial_.push_back(
        shard_count() == 1
            ? nullptr
            : workspace.Get<float>(Workspace::kPartial, s,
                                   2ull * kStrip * rank_strips_ * max_group_rows_));
  }
  // The last counter is for the phase after all groups.
  counter_count_ =
      static_cast<int>(groups_.size()) * phases_per_group * shard_count() + 1;
  counters_ = std::make_unique<Counters>(counter_count_);
}

Scratch Pass::MakeScratch(Arena& arena) const {
  const size_t parts = exact() ? 2 : 1;
  const size_t width = std::max(
      {geometry_.hidden_padded(), 2 * geometry_.intermediate_padded(), kMaxGradDepth});
  const ptrdiff_t stride = geometry_.hidden_padded() + kDepth;
  const size_t rank_padded = RoundUp(std::max(rank(), 1), kDepth);
  const size_t rank_rows = 2 * RoundUp(std::max(rank(), 1), kernels_.max_rows);
  const size_t expert_rows = RoundUp(std::max(max_expert_rows_, 1), kDepth);
  const size_t block_rows = std::max(max_block_rows_, 1);
  const ptrdiff_t scales = CeilDiv(geometry_.hidden_padded(), kInt8Group);
  const ptrdiff_t sums = CeilDiv(geometry_.hidden_padded(), SumGroup());
  const size_t quantised_rows = int8() ? block_rows : 0;
  Scratch scratch;
  scratch.rows = {arena.Take<bf16>(parts * stride * block_rows),
                  static_cast<ptrdiff_t>(parts) * stride, exact() ? stride : 0};
  scratch.codes = {arena.Take<int8_t>(stride * quantised_rows),
                   stride,
                   arena.Take<float>(scales * quantised_rows),
                   scales,
                   arena.Take<int32_t>(sums * quantised_rows),
                   sums,
                   SumGroup()};
  const size_t kept_rows = dropout() ? block_rows : 0;
  const ptrdiff_t kept_stride =
      std::max(geometry_.hidden_padded(), geometry_.intermediate_padded()) + kDepth;
  scratch.kept = {arena.Take<bf16>(parts * kept_stride * kept_rows),
                  static_cast<ptrdiff_t>(parts) * kept_stride,
                  exact() ? kept_stride : 0};
  scratch.chunk = arena.Take<bf16>(store_.quantised() ? kPanel * 2 * kChunkPairs : 0);
  scratch.panel = {arena.Take<bf16>(kPanel * width),
                   arena.Take<bf16>(exact() ? kPanel * width : 0)};
  for (SplitPanel& panel : scratch.lora_panel) {
    panel = {arena.Take<bf16>(kPanel * rank_padded),
             arena.Take<bf16>(LoRAInTwoParts() ? kPanel * rank_padded : 0)};
  }
  scratch.transposed = arena.Take<bf16>(rank() ? 2 * rank_rows * expert_rows : 0);
  scratch.tile =
      arena.Take<float>(kPanel * std::max<size_t>(rank_rows, kTransposedRows));
  scratch.lora_tile = arena.Take<float>(dropout() ? kPanel * kernels_.max_rows : 0);
  scratch.sums = arena.Take<float>((kernels_.contract_outputs ? kMaxContractRows : 1) *
                                   (width + kStrip));
  return scratch;
}

LoRAMatrix Pass::Matrix(LoRAArray which) const {
  const int64_t hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int64_t in = which == kDownA ? intermediate : hidden;
  const int64_t out = which == kDownB ? hidden : intermediate;
  const bool is_a = which == kGateA || which == kUpA || which == kDownA;
  return {inputs_.lora.arrays[which], is_a ? rank() : out, is_a ? in : rank()};
}

void Pass::GatherRows(ConstArray array, const RowBlock& block,
                      const Scratch& scratch) const {
  const WorkTimer timer(scratch.times, &WorkTimes::gather);
  const int hidden = geometry_.hidden, padded = geometry_.hidden_padded();
  const auto [high, stride, low] = scratch.rows;
  for (int i = 0; i < block.count; ++i) {
    const int64_t offset =
        static_cast<int64_t>(routing_.tokens[block.begin + i]) * hidden;
    bf16* row = high + i * stride;
    if (array.is_float32) {
      const float* src = static_cast<const float*>(array.data) + offset;
      kernels_.to_bf16(src, row, hidden);
      kernels_.to_bf16_low(src, row + low, hidden);
      std::memset(row + low + hidden, 0, sizeof(bf16) * (padded - hidden));
    } else {
      std::memcpy(row, static_cast<const bf16*>(array.data) + offset,
                  sizeof(bf16) * hidden);
    }
    std::memset(row + hidden, 0, sizeof(bf16) * (padded - hidden));
  }
}

SplitRows Pass::AdapterRows(DropoutOf of, const RowBlock& block, SplitRows rows,
                            int column, int columns, const Scratch& scratch) const {
  if (!dropout()) return rows;
  const WorkTimer timer(scratch.times, &WorkTimes::dropout);
  epilogues_.copy_kept(MaskOf(of, block.begin, column), rows, block.count, columns,
                       scratch.kept);
  return scratch.kept;
}

void Pass::LowRank(Contraction contraction, int s, const Group& group,
                   const RowBlock& block, SplitRows rows, int depth,
                   std::span<const LowRankFactor> factors, bf16* destination,
                   bool partial, const Scratch& scratch) const {
  // Strips of all factors side by side: two factors of rank 16 share one panel.
  const int strips = rank_strips_ * static_cast<int>(factors.size());
  const SplitPanel panel{scratch.panel.high,
                         LoRAInTwoParts() ? scratch.panel.low : nullptr};
  for (int first = 0; first < strips; first += kPanelStrips) {
    const int width = std::min(kPanelStrips, strips - first);
    const auto store = [&](int from, int count) {
      const int row = block.begin + from;
      for (int i = 0; i < width; ++i) {
        const int strip = first + i, vector = strip % rank_strips_ * kStrip;
        const LowRankFactor& factor = factors[strip / rank_strips_];
        const float* tile = scratch.tile + kStrip * i;
        if (partial) {
          // Gate and down have the first half of a row, up the second.
          const ptrdiff_t stride = 2 * kStrip * rank_strips_;
          epilogues_.store_rows_f32(tile, count, kStrip,
                                    partial_[s] + (row - group.first_row) * stride +
                                        (factor.index == 1) * kStrip * rank_strips_ +
                                        vector,
                                    stride);
          continue;
        }
        const bool last = vector + kStrip >= rank();
        SplitRows dst = LowRankRows(destination, group, row, factor.index);
        dst.high += vector;
        epilogues_.store_split(tile, count, std::min(kStrip, rank() - vector),
                               last ? low_rank_width_ - vector : kStrip,
                               inputs_.lora.scaling, dst);
      }
    };
    if (InPlace(block.expert)) {
      MultiplyInPlace(contraction, block, rows, depth, factors, first, width,
                      scratch.tile);
      store(0, block.count);
      continue;
    }
    for (int i = 0; i < width; ++i) {
      const WorkTimer timer(scratch.times, &WorkTimes::adapters);
      const LowRankFactor& factor = factors[(first + i) / rank_strips_];
      const int vector = (first + i) % rank_strips_ * kStrip;
      const int count = std::min(kStrip, rank() - vector);
      const SplitPanel dst = panel + 2 * kStrip * i;
      if (contraction == Contraction::kAlongRows) {
        factor.matrix.PackOutputs(kernels_, block.expert, factor.row + vector, count,
                                  factor.column, depth, 1, dst, 2 * kStrip * width);
      } else {
        factor.matrix.PackDepths(kernels_, block.expert, factor.row, depth,
                                 factor.column + vector, count, 1, dst,
                                 2 * kStrip * width);
      }
    }
    Terms terms;
    terms.Add(rows, panel, static_cast<int>(RoundUp(depth, 2)));
    Multiply(terms, block.count, width, scratch, {}, [](int) {}, store);
  }
}

void Pass::MultiplyInPlace(Contraction contraction, const RowBlock& block,
                           SplitRows rows, int depth,
                           std::span<const LowRankFactor> factors, int first, int width,
                           float* tile) const {
  for (int i = 0, strips; i < width; i += strips, tile += strips * kStrip) {
    const LowRankFactor& factor = factors[(first + i) / rank_strips_];
    const int strip = (first + i) % rank_strips_;
    strips = std::min(width - i, rank_strips_ - strip);
    const int vector = strip * kStrip;
    const int count = std::min(strips * kStrip, rank() - vector);
    if (contraction == Contraction::kAlongRows) {
      factor.matrix.InPlace(kernels_, block.expert, factor.row + vector, factor.column,
                            [&](const auto& adapters, auto m) {
                              adapters.dot(rows.high, rows.stride, block.count, m,
                                           count, depth, tile);
                            });
    } else {
      factor.matrix.InPlace(kernels_, block.expert, factor.row, factor.column + vector,
                            [&](const auto& adapters, auto m) {
                              adapters.contract(rows, block.count, m, depth, count,
                                                tile, false);
                            });
    }
  }
}

void Pass::SumPartials(const Group& group, const RowBlock& block, int factors,
                       int first_factor, bf16* destination) const {
  const int width = kStrip * rank_strips_;
  std::vector<float> sum(width);
  const int64_t first = block.begin - group.first_row;
  for (int64_t row = first; row < first + block.count; ++row) {
    bf16* high =
        destination + row * low_rank_stride_ + 2 * first_factor * low_rank_width_;
    for (int f = 0; f < factors; ++f, high += 2 * low_rank_width_) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const float* part : partial_) {
        part += (row * 2 + f) * width;
        for (int i = 0; i < rank(); ++i) sum[i] += part[i];
      }
      for (int i = 0; i < low_rank_width_; ++i) {
        const float value = i < rank() ? sum[i] * inputs_.lora.scaling : 0.0f;
        SplitBf16(value, high[i], high[low_rank_width_ + i]);
      }
    }
  }
}

bool Pass::SumPartialsPhase(Worker& worker, const Scratch& scratch, const Group& group,
                            int counter, int factors, int first_factor,
                            bf16* destination) {
  if (shard_count() == 1) return true;
  if (!Wait(worker, scratch)) return false;
  counters().ForEach(CounterOf(counter, 0), group.blocks.size(), [&](int64_t i) {
    SumPartials(group, group.blocks[i], factors, first_factor, destination);
  });
  return true;
}

bool Pass::ComputeHidden(Worker& worker, const Scratch& scratch, int group_index,
                         int counter, const Activations& out, Stopwatch& watch,
                         const std::function<void()>& fetch_ahead) {
  const Group& group = groups_[group_index];
  const int s = worker.subpool();

  const std::vector<BlockTask>& tasks = gate_up_tasks_[group_index * shard_count() + s];
  // Where a task has all panels of its rows, x Aᵀ and h Adᵀ need no phases of their
  // own, which would read these rows once more and wait for other workers.
  const bool whole = shard_count() == 1 && AreWhole(tasks, shard(s).width / kDepth);
  if (rank() && !whole) {
    counters().ForEach(CounterOf(counter + kLowRankOfX, 0), group.blocks.size(),
                       [&](int64_t i) {
                         GatherRows(inputs_.x, group.blocks[i], scratch);
                         LowRankOfInput(group, group.blocks[i], out, scratch);
                       });
    if (!Wait(worker, scratch)) return false;
    watch.Lap("x A");
  }
  TaskQueue queue = counters().Queue(CounterOf(counter + kGateUp, s), tasks);
  RowBlock gathered{};
  while (const BlockTask* task = queue.Take()) {
    if (!SameTokens(task->rows, gathered)) {
      gathered = task->rows;
      GatherRows(inputs_.x, gathered, scratch);
      if (int8()) {
        kernels_.quantize_rows(scratch.rows, gathered.count, geometry_.hidden_padded(),
                               scratch.codes);
      }
    }
    if (rank() && whole) LowRankOfInput(group, task->rows, out, scratch);
    // Workers take about equal tasks in turns. Whoever gets this one finds its A in the
    // cache that they share.
    const ptrdiff_t turn = backend_.pool.config().max_threads_per_subpool;
    const BlockTask* soon =
        tasks.data() + tasks.size() - task > turn ? task + turn : nullptr;
    GateUp(s, group, *task, whole, whole ? soon : nullptr, out, scratch, queue);
    if (whole) HiddenOperands(s, group, task->rows, out, scratch);
  }
  fetch_ahead();
  if (!Wait(worker, scratch)) return false;
  watch.Lap("gate, up, SwiGLU");

  const bool codes = !hidden_codes_.empty();
  if (whole || (!rank() && !codes)) return true;
  counters().ForEach(
      CounterOf(counter + kHiddenOperands, s), group.blocks.size(),
      [&](int64_t i) { HiddenOperands(s, group, group.blocks[i], out, scratch); });
  if (rank() && !SumPartialsPhase(worker, scratch, group, counter + kSumHidden, 1, 2,
                                  out.low_rank)) {
    return false;
  }
  if (!Wait(worker, scratch)) return false;
  watch.Lap(codes ? "h A, h in 8 bits" : "h A");
  return true;
}

void Pass::LowRankOfInput(const Group& group, const RowBlock& block,
                          const Activations& out, const Scratch& scratch) const {
  const LowRankFactor factors[] = {{Matrix(kGateA), 0, 0, 0}, {Matrix(kUpA), 0, 0, 1}};
  LowRank(Contraction::kAlongRows, 0, group, block,
          AdapterRows(DropoutOf::kInput, block, scratch.rows, 0,
                      geometry_.hidden_padded(), scratch),
          geometry_.hidden, factors, out.low_rank, false, scratch);
}

void Pass::HiddenOperands(int s, const Group& group, const RowBlock& block,
                          const Activations& out, const Scratch& scratch) const {
  const SplitRows rows = HiddenRows(hidden_, s, group, block.begin);
  if (!hidden_codes_.empty()) {
    kernels_.quantize_rows(rows, block.count, shard(s).width,
                           HiddenCodes(s, group, block.begin));
  }
  if (!rank()) return;
  const LowRankFactor factor{Matrix(kDownA), 0, shard(s).begin, 2};
  LowRank(Contraction::kAlongRows, s, group, block,
          AdapterRows(DropoutOf::kHidden, block, rows, shard(s).begin, shard(s).width,
                      scratch),
          Slice(s), {&factor, 1}, out.low_rank, shard_count() > 1, scratch);
}

void Pass::AddGateUpB(int s, int expert, int panel, FetchList& list) const {
  const int column = panel * kDepth;
  const int outputs = std::min(kDepth, Slice(s) - column);
  for (const LoRAArray b : {kGateB, kUpB}) {
    AddRowsOfB(b, expert, shard(s).begin + column, outputs, list);
  }
}

void Pass::GateUp(int s, const Group& group, const BlockTask& task, bool whole,
                  const BlockTask* soon, const Activations& out, const Scratch& scratch,
                  TaskQueue<BlockTask>& queue) const {
  const RowBlock& block = task.rows;
  const int expert = block.expert;
  for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
    const int column = panel * kDepth;
    BaseProduct product{scratch.rows,
                        int8() ? &scratch.codes : nullptr,
                        store_.GateUp(s, expert, panel),
                        {},
                        {},
                        geometry_.hidden_padded(),
                        routing_.rows_of(expert),
                        {}};
    const LoRAArray bs[] = {kGateB, kUpB};
    const int64_t lora_row = shard(s).begin + column;
    const int lora_outputs = std::min(kDepth, Slice(s) - column);
    const bool in_place = rank() && InPlace(expert);
    if (in_place) {
      for (const LoRAArray b : bs) {
        Matrix(b).FetchRows(expert, lora_row, lora_outputs, 0, rank());
      }
    } else if (rank()) {
      for (int which = 0; which < 2; ++which) {
        const SplitPanel& lora_panel = scratch.lora_panel[which];
        const WorkTimer timer(scratch.times, &WorkTimes::adapters);
        Matrix(bs[which]).PackOutputs(kernels_, expert, lora_row, lora_outputs, 0,
                                      rank(), 2, lora_panel, 4 * kStrip);
        product.lora.Add(SpreadRows(out.low_rank, group, block.begin, which),
                         lora_panel, LowRankDepth(), which, 2);
      }
    }
    if (panel + 1 < task.last_panel) {
      product.next = store_.GateUp(s, expert, panel + 1);
      AddGateUpB(s, expert, panel + 1, product.also);
    } else if (const BlockTask* next = queue.Peek()) {
      product.next = store_.GateUp(s, next->rows.expert, next->first_panel);
      AddGateUpB(s, next->rows.expert, next->first_panel, product.also);
    }
    // Spread over all panels: a whole A with one of them would come too late.
    const int part = panel - task.first_panel,
              parts = task.last_panel - task.first_panel;
    if (whole) AddPartOfA(kDownA, expert, part, parts, product.also);
    if (soon) {
      AddPartOfA(kGateA, soon->rows.expert, part, parts, product.also);
      AddPartOfA(kUpA, soon->rows.expert, part, parts, product.also);
    }
    const auto touch = [&](int row) {
      FetchKept(out, group, block.begin + row, shard(s).begin + column, kDepth);
      FetchHiddenRow(hidden_, s, group, block.begin + row, column, kDepth);
      if (!rank()) return;
      FetchSpread(out.low_rank, group, block.begin + row, 0);
      FetchSpread(out.low_rank, group, block.begin + row, 1);
    };
    MultiplyBase(product, block.count, scratch, touch, [&](int first, int count) {
      const int row = block.begin + first, kept = shard(s).begin + column;
      for (int which = 0; in_place && which < 2; ++which) {
        AddSpreadB(bs[which], expert, lora_row, lora_outputs,
                   SpreadRows(out.low_rank, group, row, which), count,
                   scratch.tile + which * kStrip, 2);
      }
      epilogues_.swiglu(scratch.tile, count, kPanelStrips,
                        HiddenRows(hidden_, s, group, row, column), KeptIndex(out, row),
                        KeptRows(out, out.gate, group, row, kept),
                        KeptRows(out, out.up, group, row, kept));
    });
  }
}

void Pass::FinishSum(const Scratch& scratch) {
  if (sum_.IsResult()) return;
  const int64_t slices =
      std::min<int64_t>(inputs_.tokens, 4ll * backend_.pool.thread_count());
  counters().ForEach(counter_count_ - 1, slices, [&](int64_t i) {
    sum_.Finish(kernels_, inputs_.tokens * i / slices,
                inputs_.tokens * (i + 1) / slices, scratch.sums);
  });
}

}  // namespace ktjax
