#include <cstring>

#include "moe/layer.h"
#include "moe/pass.h"

namespace ktjax {
namespace {

class ForwardPass : Pass {
 public:
  ForwardPass(const ExpertStore& store, const LayerInputs& inputs, MutableArray y,
              const Residuals& residuals)
      : Pass(store, inputs, kPhases, residuals.gate ? kGroupBytes : kForwardGroupBytes),
        residuals_(residuals) {
    sum_ = {y, inputs.tokens, geometry_.hidden, shard_count(), backend_.workspace};
    for (int s = 0; int8() && s < shard_count(); ++s) {
      Workspace& workspace = backend_.workspace;
      const size_t rows = max_group_rows_;
      // Rows of a multiple of 4096 bytes would share their L1 sets.
      const ptrdiff_t stride = shard(s).width + 64;
      const ptrdiff_t scales = CeilDiv(shard(s).width, kInt8Group);
      const ptrdiff_t sums = CeilDiv(shard(s).width, SumGroup());
      hidden_codes_.push_back(
          {workspace.Get<int8_t>(Workspace::kHiddenCodes, s, rows * stride), stride,
           workspace.Get<float>(Workspace::kHiddenScales, s, rows * scales), scales,
           workspace.Get<int32_t>(Workspace::kHiddenSums, s, rows * sums), sums,
           SumGroup()});
    }
    if (rank()) {
      low_rank_ = backend_.workspace.Get<bf16>(
          Workspace::kLowRank, 0,
          static_cast<size_t>(max_group_rows_) * low_rank_stride_);
    }
  }

  void Compute() {
    ClearSkippedSlots();
    Run([this](Worker& worker, const Scratch& scratch) {
      Stopwatch watch(worker.index() == 0);
      for (size_t g = 0; g < groups_.size(); ++g) {
        const int counter = static_cast<int>(g) * kPhases;
        const Activations values{residuals_.gate, residuals_.up, true, low_rank_};
        TaskQueue down = counters().Queue(CounterOf(counter + kDown, worker.subpool()),
                                          output_tasks_);
        const auto fetch_ahead = [&] {
          if (const OutputTask* task = down.Peek()) {
            const StoredPanel panel = Start(worker.subpool(), groups_[g], *task);
            if (panel)
              Fetch(panel.start(), std::min<int64_t>(panel.Bytes(), kBurstBytes));
          }
        };
        if (!ComputeHidden(worker, scratch, g, counter, values, watch, fetch_ahead)) {
          return;
        }
        if (residuals_.low_rank) {
          counters().ForEach(
              CounterOf(counter + kKeepLowRank, 0), groups_[g].blocks.size(),
              [&](int64_t i) { KeepLowRank(groups_[g], groups_[g].blocks[i]); });
        }
        while (const OutputTask* task = down.Take()) {
          Down(worker.subpool(), g, *task, scratch, down);
        }
        // The next group overwrites h.
        if (!Wait(worker, scratch)) return;
        watch.Lap("down");
      }
      FinishSum(scratch);
    });
  }

 private:
  enum Phase { kKeepLowRank = kHiddenPhases, kDown, kPhases };

  // Nothing computes the rows of skipped slots: zeros, so that results are values
  // whatever the memory held.
  void ClearSkippedSlots() const {
    const int64_t slots = inputs_.tokens * inputs_.k;
    if (routing_.rows() == slots) return;
    auto clear = [](bf16* array, int64_t slot, int64_t stride) {
      if (array) std::memset(array + slot * stride, 0, sizeof(bf16) * stride);
    };
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (inputs_.ids[slot] >= 0) continue;
      clear(residuals_.gate, slot, KeptStride());
      clear(residuals_.up, slot, KeptStride());
      clear(residuals_.low_rank, slot, low_rank_stride_);
    }
  }

  void KeepLowRank(const Group& group, const RowBlock& block) const {
    for (int row = block.begin; row < block.begin + block.count; ++row) {
      std::memcpy(residuals_.low_rank +
                      static_cast<int64_t>(routing_.slots[row]) * low_rank_stride_,
                  LowRankRow(low_rank_, group, row), sizeof(bf16) * low_rank_stride_);
    }
  }

  // The first panel that a task multiplies with; none when none of its tokens have
  // experts in the group.
  StoredPanel Start(int s, const Group& group, const OutputTask& task) const {
    for (const int expert : group.active) {
      if (RowsOfTokens(routing_, expert, task.first_token, task.last_token).count) {
        return store_.Down(s, expert, task.first_panel);
      }
    }
    return {};
  }

  // Adds to the list what is packed for the product with a panel of Down.
  void AddDownB(int s, int expert, int panel, FetchList& list) const {
    if (s == 0) AddRowsOfB(kDownB, expert, panel * kPanel, DownOutputs(panel), list);
  }
  int DownOutputs(int panel) const {
    return std::min(kPanel, geometry_.hidden - panel * kPanel);
  }

  // y[tokens, panels] += w (h Wdᵀ + (s h Adᵀ) Bdᵀ) over the experts of a group.
  void Down(int s, int group_index, const OutputTask& task, const Scratch& scratch,
            TaskQueue<OutputTask>& queue) {
    const Group& group = groups_[group_index];
    if (group_index == 0) sum_.Clear(s, task);
    const bool lora = rank() && s == 0;  // s h Adᵀ is already the sum over the shards
    for (size_t e = 0; e < group.active.size(); ++e) {
      const int expert = group.active[e];
      const RowBlock rows =
          RowsOfTokens(routing_, expert, task.first_token, task.last_token);
      if (rows.count == 0) continue;
      for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
        const int strips = store_.DownStrips(panel);
        const Int8Rows codes = int8() ? HiddenCodes(s, group, rows.begin) : Int8Rows{};
        BaseProduct product{HiddenRows(hidden_, s, group, rows.begin),
                            int8() ? &codes : nullptr,
                            store_.Down(s, expert, panel),
                            {},
                            {},
                            shard(s).width,
                            routing_.rows_of(expert),
                            {}};
        const int outputs = DownOutputs(panel);
        const bool in_place = lora && InPlace(expert);
        if (in_place) {
          Matrix(kDownB).FetchRows(expert, panel * kPanel, outputs, 0, rank());
        } else if (lora) {
          const WorkTimer timer(scratch.times, &WorkTimes::adapters);
          Matrix(kDownB).PackOutputs(kernels_, expert, panel * kPanel, outputs, 0,
                                     rank(), strips, scratch.lora_panel[0],
                                     2 * kStrip * strips);
          product.lora.Add(SpreadRows(low_rank_, group, rows.begin, 2),
                           scratch.lora_panel[0], LowRankDepth());
        }
        if (panel + 1 < task.last_panel) {
          product.next = store_.Down(s, expert, panel + 1);
          AddDownB(s, expert, panel + 1, product.also);
        } else if (e + 1 < group.active.size()) {
          const int next = group.active[e + 1];
          product.next = store_.Down(s, next, task.first_panel);
          AddDownB(s, next, task.first_panel, product.also);
          if (!int8()) {
            const RowBlock next_rows =
                RowsOfTokens(routing_, next, task.first_token, task.last_token);
            product.also.Add(HiddenBytes(s, group, next_rows));
          }
        } else if (const OutputTask* next = queue.Peek()) {
          product.next = Start(s, group, *next);
        }
        const auto touch = [&](int row) {
          FetchSum(s, rows.begin + row, panel, strips);
          if (lora) FetchSpread(low_rank_, group, rows.begin + row, 2);
        };
        MultiplyBase(product, rows.count, scratch, touch, [&](int first, int count) {
          const int row = rows.begin + first;
          if (in_place) {
            AddSpreadB(kDownB, expert, panel * kPanel, outputs,
                       SpreadRows(low_rank_, group, row, 2), count, scratch.tile, 1);
          }
          const auto [sums, stride] = sum_.At(s, panel);
          epilogues_.scatter_add(scratch.tile, count, strips, &routing_.tokens[row],
                                 &routing_.weights[row], sums, stride);
        });
      }
    }
  }

  const Residuals residuals_;
  bf16* low_rank_ = nullptr;
};

}  // namespace

void Forward(const ExpertStore& store, const LayerInputs& inputs, MutableArray y,
             const Residuals& residuals) {
  Stopwatch watch(true);
  ForwardPass pass(store, inputs, y, residuals);
  watch.Lap("routing");
  pass.Compute();
}

}  // namespace ktjax
