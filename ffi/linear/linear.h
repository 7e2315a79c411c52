// A frozen projection with LoRA, forward and backward:
//
//     y = x Wᵀ + s (x Aᵀ) Bᵀ
//     grad_x = gy W + s (gy B) A     dA = s (gy B)ᵀ x     dB = s gyᵀ (x Aᵀ)
//
// Operands, sums and their precision are those of the passes in moe/ (docs/design.md).
#ifndef KTJAX_FFI_LINEAR_LINEAR_H_
#define KTJAX_FFI_LINEAR_LINEAR_H_

#include <cstdint>

#include "linear/store.h"
#include "moe/arrays.h"

namespace ktjax {

struct LinearLoRA {
  int rank = 0;  // 0: none
  float scaling = 1;
  ConstArray a;  // [rank, inputs]
  ConstArray b;  // [outputs, rank]
};

// y [rows, outputs] from x [rows, inputs], in one dtype.
void LinearForward(const LinearStore& store, int64_t rows, ConstArray x,
                   const LinearLoRA& lora, MutableArray y);

// Null results are not computed, nor what only they need.
struct LinearGradients {
  MutableArray x;  // [rows, inputs]
  MutableArray a;  // both or none
  MutableArray b;
};

// From grad_y [rows, outputs]. x is read for gradients of LoRA only.
void LinearBackward(const LinearStore& store, int64_t rows, ConstArray x,
                    const LinearLoRA& lora, ConstArray grad_y,
                    const LinearGradients& gradients);

}  // namespace ktjax

#endif  // KTJAX_FFI_LINEAR_LINEAR_H_
