// y or grad_x while the experts are being added: float32 sums of [tokens, hidden].
#ifndef KTJAX_FFI_MOE_OUTPUT_SUM_H_
#define KTJAX_FFI_MOE_OUTPUT_SUM_H_

#include <cstdint>
#include <vector>

#include "moe/arrays.h"
#include "moe/backend.h"
#include "moe/schedule.h"

namespace ktjax {

// One sum per shard, in the order of which they are added at the end. The first shard's
// lies in the result itself where its dtype and shape allow: a float32 result holds all
// of it, a bfloat16 result half the columns of each of its rows.
class OutputSum {
 public:
  OutputSum() = default;
  OutputSum(MutableArray result, int64_t tokens, int hidden, int shards,
            Workspace& workspace);

  // The columns from 64 * panel on, of the first token.
  struct Columns {
    float* data;
    ptrdiff_t stride;  // between tokens
  };
  Columns At(int shard, int panel) const {
    const int64_t column = static_cast<int64_t>(panel) * kPanel;
    if (shard == 0 && column < in_result_) {
      return {static_cast<float*>(result_.data) + column, result_stride_};
    }
    const int64_t skipped = shard == 0 ? in_result_ : 0;
    return {sums_[shard] + column - skipped, width_ - skipped};
  }

  void Clear(int shard, const OutputTask& task) const;

  // Whether the sum is the result already.
  bool IsResult() const { return in_result_ == width_ && sums_.size() == 1; }
  // Rounds the sums of the tokens [first, last) to the result. `row` has room for a
  // token.
  void Finish(const Kernels& kernels, int64_t first, int64_t last, float* row) const;

 private:
  MutableArray result_;
  int64_t hidden_ = 0;
  int64_t width_ = 0;            // hidden, rounded up to kDepth
  int64_t in_result_ = 0;        // columns of the first shard that lie in the result
  ptrdiff_t result_stride_ = 0;  // floats between its rows
  std::vector<float*> sums_;     // per shard; null where all lies in the result
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_OUTPUT_SUM_H_
