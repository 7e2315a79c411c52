// Dropout of the adapters' inputs: which values are kept is a function of where they
// are and of a seed. So nothing is stored, and every pass, thread, slice of the work
// and instruction set sees the same. ktjax/ops/dropout.py is that function in JAX.
#ifndef KTJAX_FFI_GEMM_DROPOUT_H_
#define KTJAX_FFI_GEMM_DROPOUT_H_

#include <cstdint>

namespace ktjax {

// Drops a value with a probability of threshold / 2^32. What is kept is not scaled
// here: 1 / (1 - p) is part of LoRA's scaling, and kept values stay what they are.
struct Dropout {
  uint32_t threshold = 0;  // 0: nothing is dropped
  uint32_t seed[2] = {0, 0};
};

// x, the input of gate's and up's adapters, which share what is dropped; h, of down's.
enum class DropoutOf : uint32_t { kInput, kHidden };

// Which values of some rows are kept: row r is that of slot slots[r] (token * k + j),
// from `column` of x or h on.
struct DropoutMask {
  Dropout dropout;
  DropoutOf of;
  const int32_t* slots;
  int column;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DROPOUT_H_
