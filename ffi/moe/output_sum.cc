#include "moe/output_sum.h"

#include <algorithm>
#include <cstring>

namespace ktjax {

OutputSum::OutputSum(MutableArray result, int64_t tokens, int hidden, int shards,
                     Workspace& workspace)
    : result_(result), hidden_(hidden), width_(RoundUp(hidden, kDepth)) {
  if (result.is_float32 && hidden_ == width_) {
    in_result_ = result_stride_ = width_;
  } else if (!result.is_float32 && hidden_ == width_ && hidden_ % (2 * kPanel) == 0) {
    in_result_ = result_stride_ = hidden_ / 2;
  }
  for (int s = 0; s < shards; ++s) {
    const int64_t columns = width_ - (s == 0 ? in_result_ : 0);
    sums_.push_back(columns ? workspace.Get<float>(Workspace::kSum, s, tokens * columns)
                            : nullptr);
  }
}

void OutputSum::Clear(int shard, const OutputTask& task) const {
  for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
    const auto [data, stride] = At(shard, panel);
    const int64_t columns = std::min<int64_t>(kPanel, width_ - panel * kPanel);
    for (int64_t t = task.first_token; t < task.last_token; ++t) {
      std::memset(data + t * stride, 0, sizeof(float) * columns);
    }
  }
}

void OutputSum::Finish(const Kernels& kernels, int64_t first, int64_t last,
                       float* row) const {
  for (int64_t t = first; t < last; ++t) {
    // Through a copy: the result's row may hold part of the sum.
    if (in_result_) {
      std::memcpy(row, static_cast<float*>(result_.data) + t * result_stride_,
                  sizeof(float) * in_result_);
    }
    const int64_t rest = width_ - in_result_;
    if (rest) std::memcpy(row + in_result_, sums_[0] + t * rest, sizeof(float) * rest);
    for (size_t s = 1; s < sums_.size(); ++s) {
      const float* part = sums_[s] + t * width_;
      for (int64_t n = 0; n < width_; ++n) row[n] += part[n];
    }
    if (result_.is_float32) {
      std::memcpy(static_cast<float*>(result_.data) + t * hidden_, row,
                  sizeof(float) * hidden_);
    } else {
      kernels.to_bf16(row, static_cast<bf16*>(result_.data) + t * hidden_, hidden_);
    }
  }
}

}  // namespace ktjax
