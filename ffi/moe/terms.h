// Operands in one or two parts, and the terms of a product.
#ifndef KTJAX_FFI_MOE_TERMS_H_
#define KTJAX_FFI_MOE_TERMS_H_

#include <cstddef>

#include "gemm/kernel.h"

namespace ktjax {

// Low-rank values of this rank and above are spread over outputs by their high parts
// alone, unless all else is exact to float32: the rounding errors of so many average
// out.
inline constexpr int kHighPartsRank = 16;

// A panel in one part, or in two (low is not null).
struct SplitPanel {
  bf16* high;
  bf16* low;
  SplitPanel operator+(ptrdiff_t offset) const {
    return {high + offset, low ? low + offset : nullptr};
  }
};

// The terms of one product. Operands in two parts multiply as (a + a')(b + b') without
// a' b', which is below float32's precision.
class Terms {
 public:
  // Most products have one term or two: only these are written and copied.
  Terms() {}
  Terms(const Terms& others) : count_(0) { Add(others); }
  Terms& operator=(const Terms&) = delete;

  void Add(SplitRows a, SplitPanel b, int depth, int first_strip = 0,
           int strip_step = 1) {
    AddOne(a.high, a.stride, b.high, depth, first_strip, strip_step);
    if (a.low) {
      AddOne(a.high + a.low, a.stride, b.high, depth, first_strip, strip_step);
    }
    if (b.low) AddOne(a.high, a.stride, b.low, depth, first_strip, strip_step);
  }
  void Add(const Terms& others) {
    for (int i = 0; i < others.count_; ++i) list_[count_++] = others.list_[i];
  }
  // From row `first` of every operand a.
  Terms From(int first) const {
    Terms terms = *this;
    for (int i = 0; i < count_; ++i) terms.list_[i].a += first * list_[i].a_stride;
    return terms;
  }
  const Term* data() const { return list_; }
  int count() const { return count_; }

 private:
  void AddOne(const bf16* a, ptrdiff_t stride, const bf16* b, int depth,
              int first_strip, int strip_step) {
    list_[count_++] = {a, stride, b, depth, first_strip, strip_step};
  }
  // grad x: two base operands of two parts and two LoRA ones of three terms.
  Term list_[10];
  int count_ = 0;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_TERMS_H_
