// The gradients, from the very panels that the forward used.
#include <algorithm>
#include <numeric>
#include <utility>

#include "linear/pass.h"
#include "moe/output_sum.h"

namespace ktjax {
namespace {

class LinearBackwardPass : LinearPass {
 public:
  LinearBackwardPass(const LinearStore& store, int64_t rows, ConstArray x,
                     const LinearLoRA& lora, ConstArray grad_y,
                     const LinearGradients& gradients)
      : LinearPass(store, rows, store.outputs(), grad_y.is_float32, lora, kPhases),
        x_(x),
        grad_y_(grad_y),
        gradients_(gradients) {
    for (const LinearStore::Slice& slice : store.slices()) {
      chunks_.push_back(static_cast<int>(CeilDiv(slice.count(), kChunkPanels)));
    }
    direct_ = chunks_.size() == 1 && chunks_[0] == 1;
    if (gradients.x) {
      tasks_ = MakeTasks(InputPanels());
      row_numbers_.resize(rows_);
      std::iota(row_numbers_.begin(), row_numbers_.end(), 0);
      if (!direct_) {
        sum_ = {gradients.x, rows, store.inputs(), slice_count(), backend_.workspace};
      }
    }
    if (!rank()) return;
    low_rank_grad_ = MakeLowRank(0, lora_grads());
    if (lora_grads()) low_rank_ = MakeLowRank(1, true);
  }

  void Compute() {
    Run([this](Worker& worker, const Scratch& scratch) {
      Stopwatch watch(worker.index() == 0);
      if (rank()) {
        LowRankPhase(kLowRankOfGrad, grad_y_, store_.outputs(), Factor::kB,
                     low_rank_grad_, scratch);
        if (lora_grads()) {
          LowRankPhase(kLowRankOfX, x_, store_.inputs(), Factor::kA, low_rank_,
                       scratch);
        }
        if (!Wait(worker, scratch)) return;
        watch.Lap("linear: gy B, x A");
      }
      const int s = worker.subpool();
      if (gradients_.x) {
        counters().ForEach(CounterOf(kInputGrad, s), tasks_.size(),
                           [&](int64_t i) { InputGrad(s, tasks_[i], scratch); });
        watch.Lap("linear: grad x");
      }
      if (lora_grads()) {
        counters().ForEach(CounterOf(kLoRAGrad, 0), GradTasks(store_.inputs()),
                           [&](int64_t i) { GradA(i, scratch); });
        counters().ForEach(CounterOf(kLoRAGradB, 0), GradTasks(store_.outputs()),
                           [&](int64_t i) { GradB(i, scratch); });
        watch.Lap("linear: grad LoRA");
      }
      if (!gradients_.x || direct_ || sum_.IsResult()) return;
      if (!Wait(worker, scratch)) return;
      FinishSum(scratch);
      watch.Lap("linear: round grad x");
    });
  }

 private:
  enum Phase {
    kLowRankOfGrad,
    kLowRankOfX,
    kInputGrad,
    kLoRAGrad,
    kLoRAGradB,
    kFinish,
    kPhases
  };
  // Columns of a LoRA gradient that are one task.
  static constexpr int kGradColumns = 4 * kPanel;

  bool lora_grads() const { return static_cast<bool>(gradients_.a); }

  void LowRankPhase(Phase phase, ConstArray array, int width, Factor factor,
                    const LowRankValues& values, const Scratch& scratch) {
    counters().ForEach(CounterOf(phase, 0), low_rank_blocks_.size(), [&](int64_t i) {
      LowRank(array, width, factor, low_rank_blocks_[i], values, scratch);
    });
  }

  // grad_x[rows, panels of inputs] = gy W + (s gy B) A, over the slice's outputs. The
  // task owns these values and adds the chunks of outputs in order.
  void InputGrad(int s, const BlockTask& task, const Scratch& scratch) const {
    const RowBlock& block = task.rows;
    if (!direct_) {
      sum_.Clear(s, {task.first_panel, task.last_panel, block.begin,
                     block.begin + block.count});
    }
    for (int chunk = 0; chunk < chunks_[s]; ++chunk) {
      const int first = ChunkBegin(s, chunk), last = ChunkBegin(s, chunk + 1);
      const int outputs = std::min(last * kPanel, store_.outputs()) - first * kPanel;
      const SplitRows rows =
          RowsOf(grad_y_, store_.outputs(), block, first * kPanel, outputs, scratch);
      for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
        const int strips = InputStrips(panel);
        Terms lora;
        if (rank() && s == 0 && chunk == 0) {
          const WorkTimer timer(scratch.times, &WorkTimes::adapters);
          MatrixA().PackDepths(kernels_, 0, 0, rank(), panel * kPanel,
                               InputWidth(panel), strips, scratch.lora_panel[0],
                               2 * kStrip * strips);
          lora.Add(SpreadRows(low_rank_grad_, block.begin), scratch.lora_panel[0],
                   SpreadDepth());
        }
        Prefetch prefetch;
        if (panel + 1 < task.last_panel) {
          prefetch = FetchInputs(s, first, last, panel + 1);
        } else if (chunk + 1 < chunks_[s]) {
          prefetch = FetchInputs(s, last, ChunkBegin(s, chunk + 2), task.first_panel);
        }
        const auto transposed = [&](int from, int count) {
          const int depth = Transpose(s, first + from, count, panel, scratch);
          SplitRows part = rows;
          part.high += from * kPanel;
          Terms terms;
          terms.Add(part, OnePart(scratch.panel.high), depth);
          return terms;
        };
        const auto touch = [&](int row) { FetchPlace(s, block.begin + row, panel); };
        const auto epilogue = [&](const float* tile, int from, int count) {
          StoreInputGrad(s, tile, block.begin + from, count, panel);
        };
        MultiplyTransposed(last - first, transposed, lora, block.count, strips, scratch,
                           prefetch, touch, epilogue);
      }
    }
  }

  // The first panel of a chunk of a slice's outputs.
  int ChunkBegin(int s, int chunk) const {
    const LinearStore::Slice& slice = store_.slices()[s];
    return slice.first + slice.count() * chunk / chunks_[s];
  }
  // Fetches a panel of inputs of the panels [first, last) of W.
  Prefetch FetchInputs(int s, int first, int last, int panel) const {
    return FetchPairs(store_.Panel(s, first), panel * kPanel / 2, kPanel / 2,
                      last - first, store_.Stride());
  }

  // Where a row's values of a panel of inputs go: to grad_x, or to a slice's sum.
  void FetchPlace(int s, int row, int panel) const {
    if (direct_) {
      const int64_t bytes = gradients_.x.is_float32 ? sizeof(float) : sizeof(bf16);
      const int64_t at = int64_t{row} * store_.inputs() + panel * kPanel;
      Fetch(static_cast<char*>(gradients_.x.data) + at * bytes,
            InputWidth(panel) * bytes);
      return;
    }
    const auto [sums, stride] = sum_.At(s, panel);
    Fetch(sums + row * stride, sizeof(float) * kStrip * InputStrips(panel));
  }
  void StoreInputGrad(int s, const float* tile, int row, int count, int panel) const {
    if (!direct_) {
      const auto [sums, stride] = sum_.At(s, panel);
      return epilogues_.scatter_add(tile, count, InputStrips(panel), &row_numbers_[row],
                                    nullptr, sums, stride);
    }
    const int64_t stride = store_.inputs(), at = row * stride + panel * kPanel;
    if (gradients_.x.is_float32) {
      epilogues_.store_rows_f32(tile, count, InputWidth(panel),
                                static_cast<float*>(gradients_.x.data) + at, stride);
    } else {
      epilogues_.store_rows_bf16(tile, count, InputWidth(panel),
                                 static_cast<bf16*>(gradients_.x.data) + at, stride);
    }
  }

  // scratch.panel = the depths of `panel` of the inputs as outputs, the outputs of
  // `count` panels of W as depths, whose number is returned.
  int Transpose(int s, int first, int count, int panel, const Scratch& scratch) const {
    const int strips = InputStrips(panel);
    const ptrdiff_t stride = 2 * kStrip * strips;
    int depth = 0;
    for (int source = first; source < first + count; ++source) {
      const int width = store_.Strips(source);
      const bf16* src = Pairs(store_.Panel(s, source), width, panel * kPanel / 2,
                              strips * kStrip / 2, scratch, nullptr);
      for (int strip = 0; strip < width; ++strip, depth += kStrip) {
        kernels_.transpose(src + 2 * kStrip * strip, 2 * kStrip * width, strips / 2,
                           scratch.panel.high + depth / 2 * stride, stride);
      }
    }
    return depth;
  }

  static int64_t GradTasks(int columns) { return CeilDiv(columns, kGradColumns); }

  // dA = (s gy B)ᵀ x, some columns.
  void GradA(int64_t task, const Scratch& scratch) const {
    const int64_t begin = task * kGradColumns;
    OverRows(x_, store_.inputs(), begin,
             {TransposedRows(low_rank_grad_), false, At(gradients_.a, begin),
              store_.inputs()},
             scratch);
  }
  // dBᵀ = (s x Aᵀ)ᵀ gy, some columns.
  void GradB(int64_t task, const Scratch& scratch) const {
    const int64_t begin = task * kGradColumns;
    OverRows(
        grad_y_, store_.outputs(), begin,
        {TransposedRows(low_rank_), true, At(gradients_.b, begin * rank()), rank()},
        scratch);
  }
  static MutableArray At(MutableArray array, int64_t element) {
    array.data = static_cast<char*>(array.data) + element * (array.is_float32 ? 4 : 2);
    return array;
  }

  // The gradient of `factor` over all rows of an array [rows, width] and the columns
  // of a task from `begin` on.
  void OverRows(ConstArray array, int width, int64_t begin, const RowFactor& factor,
                const Scratch& scratch) const {
    const auto pack = [&](int from, int depth, int column, int outputs, int strips) {
      const int64_t at = int64_t{from} * width + begin + column;
      const ptrdiff_t stride = 2 * kStrip * strips;
      if (array.is_float32) {
        const Rows<float> src{static_cast<const float*>(array.data) + at, width};
        kernels_.pack_depths_f32(src, depth, outputs, strips, scratch.panel.high,
                                 stride);
        kernels_.pack_depths_low(src, depth, outputs, strips, scratch.panel.low,
                                 stride);
      } else {
        const Rows<bf16> src{static_cast<const bf16*>(array.data) + at, width};
        kernels_.pack_depths_bf16(src, depth, outputs, strips, scratch.panel.high,
                                  stride);
      }
    };
    const int columns =
        static_cast<int>(std::min<int64_t>(kGradColumns, width - begin));
    MultiplyOverRows(pack, rows_, columns, rank(), {&factor, 1}, scratch);
  }

  // Rounds the sums to grad_x.
  void FinishSum(const Scratch& scratch) {
    const int64_t slices = std::min<int64_t>(rows_, 4ll * backend_.pool.thread_count());
    counters().ForEach(CounterOf(kFinish, 0), slices, [&](int64_t i) {
      sum_.Finish(kernels_, rows_ * i / slices, rows_ * (i + 1) / slices, scratch.sums);
    });
  }

  const ConstArray x_;
  const ConstArray grad_y_;
  const LinearGradients gradients_;
  std::vector<int> chunks_;  // of a slice's panels, per slice
  bool direct_ = false;      // grad_x is one product: there is no sum to keep
  std::vector<BlockTask> tasks_;
  std::vector<int32_t> row_numbers_;
  OutputSum sum_;
  LowRankValues low_rank_;       // s x Aᵀ
  LowRankValues low_rank_grad_;  // s gy B
};

}  // namespace

void LinearBackward(const LinearStore& store, int64_t rows, ConstArray x,
                    const LinearLoRA& lora, ConstArray grad_y,
                    const LinearGradients& gradients) {
  LinearBackwardPass(store, rows, x, lora, grad_y, gradients).Compute();
}

}  // namespace ktjax
