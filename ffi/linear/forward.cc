#include <algorithm>

#include "linear/pass.h"

namespace ktjax {
namespace {

class LinearForwardPass : LinearPass {
 public:
  LinearForwardPass(const LinearStore& store, int64_t rows, ConstArray x,
                    const LinearLoRA& lora, MutableArray y)
      : LinearPass(store, rows, store.inputs(), x.is_float32, lora, kPhases),
        x_(x),
        y_(y) {
    for (const LinearStore::Slice& slice : store.slices()) {
      tasks_.push_back(MakeTasks(slice.count()));
    }
    if (rank()) low_rank_ = MakeLowRank(0, false);
  }

  void Compute() {
    Run([this](Worker& worker, const Scratch& scratch) {
      Stopwatch watch(worker.index() == 0);
      if (rank()) {
        counters().ForEach(CounterOf(kLowRankOfX, 0), low_rank_blocks_.size(),
                           [&](int64_t i) {
                             LowRank(x_, store_.inputs(), Factor::kA,
                                     low_rank_blocks_[i], low_rank_, scratch);
                           });
        if (!Wait(worker, scratch)) return;
        watch.Lap("linear: x A");
      }
      const int s = worker.subpool();
      counters().ForEach(CounterOf(kProduct, s), tasks_[s].size(),
                         [&](int64_t i) { Product(s, tasks_[s][i], scratch); });
      watch.Lap("linear: forward");
    });
  }

 private:
  enum Phase { kLowRankOfX, kProduct, kPhases };

  // y[rows, panels] = x Wᵀ + (s x Aᵀ) Bᵀ.
  void Product(int s, const BlockTask& task, const Scratch& scratch) const {
    const RowBlock& block = task.rows;
    const int offset = store_.slices()[s].first;
    const SplitRows rows =
        RowsOf(x_, store_.inputs(), block, 0, store_.inputs(), scratch);
    for (int panel = offset + task.first_panel; panel < offset + task.last_panel;
         ++panel) {
      const int strips = store_.Strips(panel), width = store_.Width(panel);
      BaseProduct product{rows,  nullptr, store_.Panel(s, panel),
                          {},    {},      store_.inputs_padded(),
                          rows_, {}};
      if (rank()) {
        const WorkTimer timer(scratch.times, &WorkTimes::adapters);
        MatrixB().PackOutputs(kernels_, 0, int64_t{panel} * kPanel, width, 0, rank(),
                              strips, scratch.lora_panel[0], 2 * kStrip * strips);
        product.lora.Add(SpreadRows(low_rank_, block.begin), scratch.lora_panel[0],
                         SpreadDepth());
      }
      if (panel + 1 < offset + task.last_panel) {
        product.next = store_.Panel(s, panel + 1);
        if (rank()) {
          product.also.Add(MatrixB().WholeRows(0, int64_t{panel + 1} * kPanel,
                                               store_.Width(panel + 1)));
        }
      }
      const int64_t stride = store_.outputs(), column = int64_t{panel} * kPanel;
      const auto place = [&](int row) { return (block.begin + row) * stride + column; };
      const auto touch = [&](int row) {
        Fetch(static_cast<char*>(y_.data) + place(row) * ValueBytes(),
              width * ValueBytes());
      };
      MultiplyBase(product, block.count, scratch, touch, [&](int first, int count) {
        if (y_.is_float32) {
          epilogues_.store_rows_f32(scratch.tile, count, width,
                                    static_cast<float*>(y_.data) + place(first),
                                    stride);
        } else {
          epilogues_.store_rows_bf16(scratch.tile, count, width,
                                     static_cast<bf16*>(y_.data) + place(first),
                                     stride);
        }
      });
    }
  }

  int ValueBytes() const { return y_.is_float32 ? sizeof(float) : sizeof(bf16); }

  const ConstArray x_;
  const MutableArray y_;
  std::vector<std::vector<BlockTask>> tasks_;  // per slice
  LowRankValues low_rank_;
};

}  // namespace

void LinearForward(const LinearStore& store, int64_t rows, ConstArray x,
                   const LinearLoRA& lora, MutableArray y) {
  LinearForwardPass(store, rows, x, lora, y).Compute();
}

}  // namespace ktjax
