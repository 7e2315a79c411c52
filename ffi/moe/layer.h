// The forward and the backward pass of a layer of routed experts with LoRA.
// The mathematics and the names are those of docs/design.md.
#ifndef KTJAX_FFI_MOE_LAYER_H_
#define KTJAX_FFI_MOE_LAYER_H_

#include <cstdint>

#include "base/types.h"
#include "gemm/dropout.h"
#include "moe/arrays.h"
#include "moe/store.h"

namespace ktjax {

struct LayerInputs {
  int64_t tokens = 0;
  int k = 0;
  ConstArray x;  // [tokens, hidden]
  const int32_t* ids = nullptr;
  const float* weights = nullptr;
  LoRAOperands lora;
  // Of the adapters' inputs; lora.scaling has the factor 1 / (1 - p).
  Dropout dropout;
  // Multiply base weights as integers in the forward, with rows quantised to 8 bits.
  // std::invalid_argument where the format has no integer codes.
  bool int8 = false;
};

// What the forward keeps for the backward, a row per slot (token * k + j): gate and up
// before SwiGLU, [tokens * k, RoundUp(intermediate, 32)], and the scaled low-rank
// products s x Agᵀ, s x Auᵀ, s h Adᵀ, each as a high and a low part: [tokens * k, 6 *
// RoundUp(rank, 32)]. Skipped slots hold zeros. Null: not kept.
struct Residuals {
  bf16* gate = nullptr;
  bf16* up = nullptr;
  bf16* low_rank = nullptr;
};

void Forward(const ExpertStore& store, const LayerInputs& inputs, MutableArray y,
             const Residuals& residuals);

// Null results are not computed, nor what only they need.
struct Gradients {
  MutableArray x;                  // [tokens, hidden]
  float* weights = nullptr;        // [tokens, k]
  MutableArray lora[kLoRAArrays];  // all six or none
};

// Without residuals (gate null) the forward's values are computed again, bit by bit.
void Backward(const ExpertStore& store, const LayerInputs& inputs, ConstArray grad_y,
              const Residuals& residuals, const Gradients& gradients);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_LAYER_H_
