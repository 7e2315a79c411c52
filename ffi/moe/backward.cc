// The gradients, from the very panels that the forward used.
//
// With c = gy Wd + s (gy Bd) Ad, the gradient of h before the routing weight:
//
//     grad_w = <c, h>       (equal to <gy, d>, without d)
//     dh = w c,  dg = dh u silu'(g),  du = dh silu(g)
//     grad_x = dg Wg + du Wu + s (dg Bg) Ag + s (du Bu) Au
//
// gy enters the product unweighted: as bfloat16 it is exact there, w gy would not be.
#include <algorithm>
#include <cstring>
#include <utility>

#include "base/bf16.h"
#include "moe/layer.h"
#include "moe/lora_grad.h"

namespace ktjax {
namespace {

class BackwardPass : LoRAGradPass {
 public:
  BackwardPass(const ExpertStore& store, const LayerInputs& inputs, ConstArray grad_y,
               const Residuals& residuals, const Gradients& gradients)
      : LoRAGradPass(store, inputs, kPhases,
                     residuals.gate ? kGroupBytes : kSmallGroupBytes, grad_y,
                     gradients),
        residuals_(residuals),
        recompute_(residuals.gate == nullptr),
        lora_grads_(static_cast<bool>(gradients.lora[kGateA])) {
    Workspace& workspace = backend_.workspace;
    const int threads = backend_.pool.config().max_threads_per_subpool;
    const size_t rows = max_group_rows_;
    for (int s = 0; s < shard_count(); ++s) {
      d_gate_.push_back(
          workspace.Get<bf16>(Workspace::kGateGrad, s, rows * HiddenStride(s)));
      d_up_.push_back(
          workspace.Get<bf16>(Workspace::kUpGrad, s, rows * HiddenStride(s)));
      first_block_.push_back(blocks_);
      blocks_ += Blocks(s);
      for (const Group& group : groups_) {
        hidden_grad_tasks_.push_back(MakeBlockTasks(group.blocks, Blocks(s), threads));
      }
    }
    if (gradients.x) {
      sum_ = {gradients.x, inputs.tokens, geometry_.hidden, shard_count(), workspace};
    }
    dots_ = workspace.Get<float>(Workspace::kDots, 0, rows * blocks_);
    if (rank()) {
      low_rank_ = workspace.Get<bf16>(Workspace::kLowRank, 0, rows * low_rank_stride_);
      low_rank_grad_ =
          workspace.Get<bf16>(Workspace::kLowRankGrad, 0, rows * low_rank_stride_);
    }
    if (recompute_) {
      const size_t count = rows * KeptStride();
      recomputed_.gate = workspace.Get<bf16>(Workspace::kGateValue, 0, count);
      recomputed_.up = workspace.Get<bf16>(Workspace::kUpValue, 0, count);
    }
  }

  void Compute() {
    if (gradients_.weights) {
      std::fill_n(gradients_.weights, inputs_.tokens * inputs_.k, 0.0f);
    }
    Run([this](Worker& worker, const Scratch& scratch) {
      Stopwatch watch(worker.index() == 0);
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (!ComputeGroup(worker, scratch, g, watch)) return;
      }
      if (gradients_.x) FinishSum(scratch);
    });
  }

 private:
  enum Phase {
    kLoadLowRank = kHiddenPhases,
    kLowRankOfGrad,
    kHiddenGrad,
    kLowRankOfHiddenGrad,
    kSumLowRank,
    kInputGrad,
    kLoRAGrad,
    kWeightGrad,
    kPhases,
  };

  // Column blocks of a shard's hidden gradient: 64 of the intermediate dimension.
  int Blocks(int s) const { return static_cast<int>(CeilDiv(shard(s).width, kPanel)); }

  void LoadLowRank(const Group& group, const RowBlock& block) const {
    for (int row = block.begin; row < block.begin + block.count; ++row) {
      std::memcpy(LowRankRow(low_rank_, group, row),
                  residuals_.low_rank +
                      static_cast<int64_t>(routing_.slots[row]) * low_rank_stride_,
                  sizeof(bf16) * low_rank_stride_);
    }
  }

  bool ComputeGroup(Worker& worker, const Scratch& scratch, int g, Stopwatch& watch) {
    const Group& group = groups_[g];
    const int counter = g * kPhases, s = worker.subpool();
    const Residuals& kept = recompute_ ? recomputed_ : residuals_;
    const Activations values{kept.gate, kept.up, !recompute_, low_rank_};
    if (recompute_) {
      if (!ComputeHidden(worker, scratch, g, counter, values, watch, [] {}))
        return false;
    } else if (lora_grads_) {  // used after the barriers below
      counters().ForEach(CounterOf(counter + kLoadLowRank, 0), group.blocks.size(),
                         [&](int64_t i) { LoadLowRank(group, group.blocks[i]); });
    }
    const auto& tasks = hidden_grad_tasks_[s * groups_.size() + g];
    // As x Aᵀ in ComputeHidden.
    const bool in_tasks = shard_count() == 1 && AreWhole(tasks, Blocks(s));
    if (rank() && !in_tasks) {
      counters().ForEach(CounterOf(counter + kLowRankOfGrad, 0), group.blocks.size(),
                         [&](int64_t i) {
                           GatherRows(grad_y_, group.blocks[i], scratch);
                           LowRankOfOutputGrad(group, group.blocks[i], scratch);
                         });
      if (!Wait(worker, scratch)) return false;
      watch.Lap("gy B");
    }
    TaskQueue queue = counters().Queue(CounterOf(counter + kHiddenGrad, s), tasks);
    while (const BlockTask* task = queue.Take()) {
      GatherRows(grad_y_, task->rows, scratch);
      if (rank() && in_tasks) LowRankOfOutputGrad(group, task->rows, scratch);
      HiddenGrad(s, group, *task, values, scratch, queue);
    }
    if (!Wait(worker, scratch)) return false;
    watch.Lap("grad h, SwiGLU");

    if (gradients_.weights) {
      counters().ForEach(CounterOf(counter + kWeightGrad, 0), group.blocks.size(),
                         [&](int64_t i) { WeightGrad(group, group.blocks[i]); });
    }
    const bool low_rank = rank() && (gradients_.x || lora_grads_);
    if (low_rank) {
      if (!LowRankOfHiddenGrad(worker, scratch, group, counter)) return false;
      if (!Wait(worker, scratch)) return false;
      watch.Lap("gh B");
    }
    if (gradients_.x) {
      counters().ForEach(CounterOf(counter + kInputGrad, s), output_tasks_.size(),
                         [&](int64_t i) {
                           if (g == 0) sum_.Clear(s, output_tasks_[i]);
                           InputGrad(s, group, output_tasks_[i], scratch);
                         });
      watch.Lap("grad x");
    }
    if (lora_grads_) {
      counters().ForEach(CounterOf(counter + kLoRAGrad, 0), LoRAGradTasks(group),
                         [&](int64_t i) { LoRAGrad(group, i, scratch); });
      watch.Lap("grad LoRA");
    }
    // The next group overwrites the values of this one.
    return Wait(worker, scratch);
  }

  // s gy Bd of the rows of gy in scratch.rows.
  void LowRankOfOutputGrad(const Group& group, const RowBlock& block,
                           const Scratch& scratch) const {
    const LowRankFactor factor{Matrix(kDownB), 0, 0, 2};
    LowRank(Contraction::kDownColumns, 0, group, block, scratch.rows, geometry_.hidden,
            {&factor, 1}, low_rank_grad_, false, scratch);
  }

  // dots, dg, du and h of a block, whose rows of gy are in scratch.rows, 64 columns at
  // a time.
  void HiddenGrad(int s, const Group& group, const BlockTask& task,
                  const Activations& values, const Scratch& scratch,
                  TaskQueue<BlockTask>& queue) {
    const RowBlock& block = task.rows;
    const int begin = task.first_panel * kPanel;
    const int end = std::min(task.last_panel * kPanel, shard(s).width);
    const bool contract = Contracts(block.count);
    const bool in_place = rank() && InPlace(block.expert);
    if (contract) {
      const auto ahead = [&](int p) {
        if (in_place) {
          FetchPartOfA(kDownA, block.expert, shard(s).begin + begin,
                       std::min(end, Slice(s)) - begin, p, store_.DownPanels());
        }
      };
      ContractDown(s, block, begin, end, scratch, queue, ahead);
    }
    for (int column = begin; column < end; column += kPanel) {
      const int strips = std::min(kPanel, end - column) / kStrip;
      Terms lora, dropped;  // where dropout is, LoRA's terms are added apart
      const int outputs = std::min(strips * kStrip, Slice(s) - column);
      if (rank() && !in_place) {
        const WorkTimer timer(scratch.times, &WorkTimes::adapters);
        Matrix(kDownA).PackDepths(kernels_, block.expert, 0, rank(),
                                  shard(s).begin + column, outputs, strips,
                                  scratch.lora_panel[0], 2 * kStrip * strips);
        (dropout() ? dropped : lora)
            .Add(SpreadRows(low_rank_grad_, group, block.begin, 2),
                 scratch.lora_panel[0], LowRankDepth());
      }
      const auto touch = [&](int row) {
        FetchKept(values, group, block.begin + row, shard(s).begin + column,
                  strips * kStrip);
        for (const auto* array : {&d_gate_, &d_up_, &hidden_}) {
          if (array == &hidden_ && !lora_grads_) continue;
          FetchHiddenRow(*array, s, group, block.begin + row, column, strips * kStrip);
        }
        if (rank()) FetchSpread(low_rank_grad_, group, block.begin + row, 2);
      };
      const auto epilogue = [&](float* tile, int first, int count) {
        const int row = block.begin + first, kept = shard(s).begin + column;
        AddKept(dropped, first, MaskOf(DropoutOf::kHidden, row, kept), count, strips,
                tile, scratch);
        if (in_place) {
          AddSpreadA(kDownA, block.expert, kept, outputs,
                     SpreadRows(low_rank_grad_, group, row, 2), count, tile);
        }
        epilogues_.swiglu_grad(
            tile, count, strips, &routing_.weights[row], KeptIndex(values, row),
            KeptRows(values, values.gate, group, row, kept),
            KeptRows(values, values.up, group, row, kept),
            HiddenRows(d_gate_, s, group, row, column),
            HiddenRows(d_up_, s, group, row, column),
            lora_grads_ ? HiddenRows(hidden_, s, group, row, column) : SplitRows{},
            dots_ + static_cast<int64_t>(row - group.first_row) * blocks_ +
                first_block_[s] + column / kPanel,
            blocks_);
      };
      if (contract) {
        AddToSums(lora, block.count, strips, column - begin, end - begin, scratch,
                  touch, epilogue);
        continue;
      }
      Prefetch prefetch;
      const auto fetch = [&](int expert, int first) {
        prefetch = FetchPairs(store_.Down(s, expert, 0), first / 2, kPanel / 2,
                              geometry_.hidden_padded() / kPanel, store_.DownStride(s));
      };
      if (column + 2 * kPanel <= end) {
        fetch(block.expert, column + kPanel);
      } else if (column + kPanel >= end) {
        const BlockTask* next = queue.Peek();
        if (next && !Contracts(next->rows.count)) {
          fetch(next->rows.expert, next->first_panel * kPanel);
        }
      }
      const auto transposed = [&](int first, int count) {
        return TransposeDown(s, block.expert, column, strips, first, count, scratch);
      };
      MultiplyTransposed(store_.DownPanels(), transposed, lora, block.count, strips,
                         scratch, prefetch, touch, epilogue);
    }
  }

  // Products over outputs, for experts of few rows: panels stream from memory in the
  // order in which they lie there, and are transposed in registers.
  bool Contracts(int expert_rows) const {
    return kernels_.contract_outputs && expert_rows <= kMaxContractRows;
  }
  static ptrdiff_t SumsStride(int columns) { return columns + kStrip; }

  // scratch.sums = 0, then += `rows` of a (its low parts as well) times depth pairs
  // [first_pair, first_pair + pairs) of `panels` panels; panel(p) names them,
  // operand(p, part) what they are multiplied with. next() is what to fetch during the
  // last one, ahead(p) fetches what is needed after all of them.
  template <typename Panel, typename Operand, typename Next, typename Ahead>
  void Contract(int panels, int rows, int first_pair, int pairs, Panel panel,
                Operand operand, Next next, Ahead ahead, const Scratch& scratch) const {
    const ptrdiff_t stride = SumsStride(2 * pairs);
    std::fill_n(scratch.sums, rows * stride, 0.0f);
    for (int p = 0; p < panels; ++p) {
      const StoredPanel stored = panel(p);
      const BasePanel base = stored;
      const int strips = stored.strips();
      Prefetch prefetch =
          p + 1 < panels ? FetchPairs(panel(p + 1), first_pair, pairs) : next();
      ahead(p);
      if (!base.values && ContractCodes(base, operand, p, rows, first_pair, pairs,
                                        stride, prefetch, scratch)) {
        continue;
      }
      const int chunk = base.values ? pairs : kChunkPairs;
      prefetch.Spread(base.values ? pairs : 2 * pairs);
      for (int pair = 0; pair < pairs; pair += chunk) {
        const int count = std::min(chunk, pairs - pair);
        const bf16* values =
            Pairs(base, strips, first_pair + pair, count, scratch, &prefetch);
        kernels_.contract_outputs(operand(p, Part::kHigh), rows, values, strips, count,
                                  scratch.sums + 2 * pair, stride, &prefetch);
        if (exact()) {
          kernels_.contract_outputs(operand(p, Part::kLow), rows, values, strips, count,
                                    scratch.sums + 2 * pair, stride, nullptr);
        }
      }
    }
  }

  // The same for one panel of codes, where kernels multiply with those as they are.
  template <typename Operand>
  bool ContractCodes(const BasePanel& base, Operand operand, int p, int rows,
                     int first_pair, int pairs, ptrdiff_t stride, Prefetch prefetch,
                     const Scratch& scratch) const {
    if (!kernels_.contract_codes) return false;
    prefetch.Spread(pairs);
    if (!kernels_.contract_codes(operand(p, Part::kHigh), rows, base.codes, first_pair,
                                 pairs, scratch.sums, stride, &prefetch)) {
      return false;
    }
    if (exact()) {
      kernels_.contract_codes(operand(p, Part::kLow), rows, base.codes, first_pair,
                              pairs, scratch.sums, stride, nullptr);
    }
    return true;
  }

  // The columns [begin, end) of gy Wd.
  template <typename Ahead>
  void ContractDown(int s, const RowBlock& block, int begin, int end,
                    const Scratch& scratch, TaskQueue<BlockTask>& queue,
                    Ahead ahead) const {
    const auto panel = [&](int p) { return store_.Down(s, block.expert, p); };
    const auto operand = [&](int p, Part part) {
      StripRows rows{{}, scratch.rows.stride};
      for (int i = 0; i < kPanelStrips; ++i) {
        rows.strip[i] = scratch.rows.high +
                        (part == Part::kLow ? scratch.rows.low : 0) + p * kPanel +
                        i * kStrip;
      }
      return rows;
    };
    const auto next = [&]() -> Prefetch {
      const BlockTask* task = queue.Peek();
      if (!task) return {};
      const int columns = std::min(task->last_panel * kPanel, shard(s).width) -
                          task->first_panel * kPanel;
      const int expert = task->rows.expert, first = task->first_panel * kPanel;
      return FetchPairs(store_.Down(s, expert, 0), first / 2, columns / 2);
    };
    Contract(store_.DownPanels(), block.count, begin / 2, (end - begin) / 2, panel,
             operand, next, ahead, scratch);
  }

  // The columns [begin, end) of dg Wg + du Wu. `next_expert` comes after.
  template <typename Ahead>
  void ContractGateUp(int s, const Group& group, const RowBlock& rows, int begin,
                      int end, int next_expert, Ahead ahead,
                      const Scratch& scratch) const {
    const auto panel = [&](int p) { return store_.GateUp(s, rows.expert, p); };
    const auto operand = [&](int p, Part part) {
      const SplitRows gate = HiddenRows(d_gate_, s, group, rows.begin, p * kDepth);
      const SplitRows up = HiddenRows(d_up_, s, group, rows.begin, p * kDepth);
      const ptrdiff_t low = part == Part::kLow ? gate.low : 0;
      return StripRows{{gate.high + low, up.high + low, gate.high + low + kStrip,
                        up.high + low + kStrip},
                       gate.stride};
    };
    const auto next = [&]() -> Prefetch {
      if (next_expert < 0) return {};
      return FetchPairs(store_.GateUp(s, next_expert, 0), begin / 2, (end - begin) / 2);
    };
    Contract(shard(s).width / kDepth, rows.count, begin / 2, (end - begin) / 2, panel,
             operand, next, ahead, scratch);
  }

  // Like Multiply, on top of the columns [column, column + 16 strips) of scratch.sums.
  template <typename Touch, typename Epilogue>
  void AddToSums(const Terms& terms, int rows, int strips, int column, int columns,
                 const Scratch& scratch, Touch touch, Epilogue epilogue) const {
    for (int row = 0; row < rows; ++row) {
      touch(row);
      std::copy_n(scratch.sums + row * SumsStride(columns) + column, strips * kStrip,
                  scratch.tile + row * kPanel);
    }
    AddTerms(terms, rows, strips, scratch);
    const WorkTimer timer(scratch.times, &WorkTimes::epilogue);
    epilogue(scratch.tile, 0, rows);
  }

  // tile += what dropout lets through of LoRA's terms from row `first` of theirs on.
  void AddKept(const Terms& lora, int first, const DropoutMask& mask, int rows,
               int strips, float* tile, const Scratch& scratch) const {
    if (lora.count() == 0) return;
    const Terms terms = lora.From(first);
    kernels_.gemm(terms.data(), terms.count(), rows, strips, scratch.lora_tile, false,
                  nullptr);
    epilogues_.add_kept(mask, scratch.lora_tile, rows, strips, tile);
  }

  // The depths [column, column + 16 strips) of `count` down panels as outputs.
  Terms TransposeDown(int s, int expert, int column, int strips, int first, int count,
                      const Scratch& scratch) const {
    const ptrdiff_t stride = 2 * kStrip * strips;
    int depth = 0;
    for (int panel = first; panel < first + count; ++panel) {
      const int width = store_.DownStrips(panel);
      const bf16* src = Pairs(store_.Down(s, expert, panel), width, column / 2,
                              strips * kStrip / 2, scratch, nullptr);
      for (int strip = 0; strip < width; ++strip, depth += kStrip) {
        kernels_.transpose(src + 2 * kStrip * strip, 2 * kStrip * width, strips / 2,
                           scratch.panel.high + depth / 2 * stride, stride);
      }
    }
    Terms terms;
    SplitRows rows = scratch.rows;
    rows.high += first * kPanel;
    terms.Add(rows, OnePart(scratch.panel.high), depth);
    return terms;
  }

  void WeightGrad(const Group& group, const RowBlock& block) {
    for (int row = block.begin; row < block.begin + block.count; ++row) {
      const float* dots = dots_ + static_cast<int64_t>(row - group.first_row) * blocks_;
      float sum = 0;
      for (int i = 0; i < blocks_; ++i) sum += dots[i];
      gradients_.weights[routing_.slots[row]] = sum;
    }
  }

  // s dg Bg and s du Bu.
  bool LowRankOfHiddenGrad(Worker& worker, const Scratch& scratch, const Group& group,
                           int counter) {
    const int s = worker.subpool();
    const bool partial = shard_count() > 1;
    counters().ForEach(
        CounterOf(counter + kLowRankOfHiddenGrad, s), group.blocks.size(),
        [&](int64_t i) {
          const RowBlock& block = group.blocks[i];
          const LoRAArray bs[] = {kGateB, kUpB};
          const std::vector<bf16*>* arrays[] = {&d_gate_, &d_up_};
          for (int which = 0; which < 2; ++which) {
            const LowRankFactor factor{Matrix(bs[which]), shard(s).begin, 0, which};
            LowRank(Contraction::kDownColumns, s, group, block,
                    HiddenRows(*arrays[which], s, group, block.begin), Slice(s),
                    {&factor, 1}, low_rank_grad_, partial, scratch);
          }
        });
    return SumPartialsPhase(worker, scratch, group, counter + kSumLowRank, 2, 0,
                            low_rank_grad_);
  }

  // grad_x[tokens, panels] += dg Wg + du Wu + (s dg Bg) Ag + (s du Bu) Au.
  void InputGrad(int s, const Group& group, const OutputTask& task,
                 const Scratch& scratch) {
    const int width = shard(s).width;
    const bool lora = rank() && s == 0;
    const LoRAArray as[] = {kGateA, kUpA};
    for (size_t e = 0; e < group.active.size(); ++e) {
      const int expert = group.active[e];
      const RowBlock rows =
          RowsOfTokens(routing_, expert, task.first_token, task.last_token);
      if (rows.count == 0) continue;
      const int next_expert = e + 1 < group.active.size() ? group.active[e + 1] : -1;
      const int begin = task.first_panel * kPanel;
      const int end = std::min(task.last_panel * kPanel, geometry_.hidden_padded());
      // By all rows of the expert: how they are cut must not change a bit.
      const bool contract = Contracts(routing_.rows_of(expert));
      const bool in_place = lora && InPlace(expert);
      if (contract) {
        const auto ahead = [&](int p) {
          for (int which = 0; in_place && which < 2; ++which) {
            FetchPartOfA(as[which], expert, begin,
                         std::min(end, geometry_.hidden) - begin, p, width / kDepth);
          }
        };
        ContractGateUp(s, group, rows, begin, end, next_expert, ahead, scratch);
      }
      for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
        const int strips = store_.DownStrips(panel);
        Terms terms, dropped;
        const int outputs =
            std::min(strips * kStrip, geometry_.hidden - panel * kPanel);
        if (lora && !in_place) {
          const WorkTimer timer(scratch.times, &WorkTimes::adapters);
          for (int which = 0; which < 2; ++which) {
            Matrix(as[which]).PackDepths(kernels_, expert, 0, rank(), panel * kPanel,
                                         outputs, strips, scratch.lora_panel[which],
                                         2 * kStrip * strips);
            (dropout() ? dropped : terms)
                .Add(SpreadRows(low_rank_grad_, group, rows.begin, which),
                     scratch.lora_panel[which], LowRankDepth());
          }
        }
        const auto touch = [&](int row) {
          FetchSum(s, rows.begin + row, panel, strips);
          if (!lora) return;
          FetchSpread(low_rank_grad_, group, rows.begin + row, 0);
          FetchSpread(low_rank_grad_, group, rows.begin + row, 1);
        };
        const auto epilogue = [&](float* tile, int from, int count) {
          AddKept(dropped, from,
                  MaskOf(DropoutOf::kInput, rows.begin + from, panel * kPanel), count,
                  strips, tile, scratch);
          for (int which = 0; in_place && which < 2; ++which) {
            AddSpreadA(as[which], expert, panel * kPanel, outputs,
                       SpreadRows(low_rank_grad_, group, rows.begin + from, which),
                       count, tile);
          }
          const auto [sums, stride] = sum_.At(s, panel);
          epilogues_.scatter_add(tile, count, strips,
                                 &routing_.tokens[rows.begin + from], nullptr, sums,
                                 stride);
        };
        if (contract) {
          AddToSums(terms, rows.count, strips, panel * kPanel - begin, end - begin,
                    scratch, touch, epilogue);
          continue;
        }
        Prefetch prefetch;
        const bool more_panels = panel + 1 < task.last_panel;
        if (more_panels || next_expert >= 0) {
          const int next = more_panels ? panel + 1 : task.first_panel;
          prefetch = FetchPairs(store_.GateUp(s, more_panels ? expert : next_expert, 0),
                                next * kPanel / 2, kPanel / 2, width / kDepth,
                                store_.GateUpStride());
        }
        const auto transposed = [&](int first, int count) {
          return TransposeGateUp(s, group, rows, panel, strips, first, count, scratch);
        };
        MultiplyTransposed(width / kDepth, transposed, terms, rows.count, strips,
                           scratch, prefetch, touch, epilogue);
      }
    }
  }

  // The depths [64 panel, 64 panel + 16 strips) of an expert's gate/up panels as
  // outputs: of all their outputs, which become depths, `count` parts of 64 from the
  // `first` on. All of gate's come before all of up's, so that a product reads dg's and
  // du's rows in long runs, whose lines the processor fetches ahead. Codes are decoded
  // once: a part then has both of a panel.
  Terms TransposeGateUp(int s, const Group& group, const RowBlock& rows, int panel,
                        int strips, int first, int count,
                        const Scratch& scratch) const {
    const ptrdiff_t stride = 2 * kStrip * strips;
    const auto source = [&](int i) {
      return Pairs(store_.GateUp(s, rows.expert, i), kPanelStrips, panel * kPanel / 2,
                   strips * kStrip / 2, scratch, nullptr);
    };
    const auto transpose = [&](const bf16* src, int which, bf16* dst) {
      for (int half = 0; half < 2; ++half) {
        kernels_.transpose(src + 2 * kStrip * (2 * half + which), 2 * kPanel,
                           strips / 2, dst + half * kStrip / 2 * stride, stride);
      }
    };
    const std::vector<bf16*>* arrays[] = {&d_gate_, &d_up_};
    bf16* dst = scratch.panel.high;
    Terms terms;
    const auto add = [&](int which, int begin, int panels) {
      terms.Add(HiddenRows(*arrays[which], s, group, rows.begin, begin * kDepth),
                OnePart(dst), panels * kDepth);
      dst += panels * kDepth / 2 * stride;
    };
    if (store_.quantised()) {
      const ptrdiff_t up = count * kDepth / 2 * stride;
      for (int i = 0; i < count; ++i) {
        const bf16* src = source(first + i);
        bf16* const gate = dst + i * kDepth / 2 * stride;
        transpose(src, 0, gate);
        transpose(src, 1, gate + up);
      }
      add(0, first, count);
      add(1, first, count);
      return terms;
    }
    const int panels = shard(s).width / kDepth, last = 2 * (first + count);
    for (int half = 2 * first, run; half < last; half += run) {
      const int which = half / panels, begin = half % panels;
      run = std::min(panels - begin, last - half);
      for (int i = 0; i < run; ++i) {
        transpose(source(begin + i), which, dst + i * kDepth / 2 * stride);
      }
      add(which, begin, run);
    }
    return terms;
  }

  const Residuals residuals_;
  const bool recompute_;
  const bool lora_grads_;
  Residuals recomputed_;                                   // of one group
  std::vector<std::vector<BlockTask>> hidden_grad_tasks_;  // [shard * groups + group]
  float* dots_ = nullptr;                                  // [group rows][blocks_]
  int blocks_ = 0;                // column blocks of all shards
  std::vector<int> first_block_;  // per shard
};

}  // namespace

void Backward(const ExpertStore& store, const LayerInputs& inputs, ConstArray grad_y,
              const Residuals& residuals, const Gradients& gradients) {
  Stopwatch watch(true);
  BackwardPass pass(store, inputs, grad_y, residuals, gradients);
  watch.Lap("routing");
  pass.Compute();
}

}  // namespace ktjax
