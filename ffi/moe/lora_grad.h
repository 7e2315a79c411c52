// The phase of the backward pass that computes the six LoRA gradients.
#ifndef KTJAX_FFI_MOE_LORA_GRAD_H_
#define KTJAX_FFI_MOE_LORA_GRAD_H_

#include <cstdint>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "moe/pass.h"

namespace ktjax {

// One LoRA gradient as a product over the rows of an expert:
// grad[i][n] = Σ_r weight[r] low_rank[r][i] source[r][n], stored as is (A) or
// transposed (B).
struct GradFactor {
  const bf16* low_rank;  // of the expert's first row
  bool weighted;
  bool transposed;
  MutableArray grad;  // the expert's matrix
  int64_t stride;     // its row length
};

class LoRAGradPass : protected Pass {
 protected:
  LoRAGradPass(const ExpertStore& store, const LayerInputs& inputs,
               int phases_per_group, int64_t group_bytes, ConstArray grad_y,
               const Gradients& gradients)
      : Pass(store, inputs, phases_per_group, group_bytes),
        grad_y_(grad_y),
        gradients_(gradients) {}

  // The phase of a group as that many tasks, for any worker. Reads the values below and
  // hidden_.
  int64_t LoRAGradTasks(const Group& group) const;
  void LoRAGrad(const Group& group, int64_t task, const Scratch& scratch) const;

  const ConstArray grad_y_;
  const Gradients gradients_;
  std::vector<bf16*> d_gate_, d_up_;  // per shard [group rows][HiddenStride]
  bf16* low_rank_ = nullptr;          // [group rows][low_rank_stride_]
  bf16* low_rank_grad_ = nullptr;     // [group rows][low_rank_stride_]

 private:
  // x (dAg, dAu) and gy (dBd), each in two halves of its columns, ...
  static constexpr int kTokenSources = 4;
  // ... and dg (dBg), du (dBu), h (dAd) of every shard.
  static constexpr int kShardSources = 3;
  int Sources() const { return kTokenSources + kShardSources * shard_count(); }

  MutableArray GradOf(LoRAArray which, int expert, int64_t rows, int64_t columns,
                      int64_t row, int64_t column) const;
  void TokenGrad(const Group& group, int expert, int source,
                 const Scratch& scratch) const;
  void ShardGrad(const Group& group, int expert, int source,
                 const Scratch& scratch) const;
  void PackGathered(ConstArray array, int row, int depth, int column, int outputs,
                    int strips, const Scratch& scratch) const;
  void Drop(DropoutOf of, int row, int depth, int column, int strips,
            const Scratch& scratch) const;
  template <typename Pack>
  void MultiplyExpert(Pack pack, int row, int count, int columns,
                      std::span<const GradFactor> factors,
                      const Scratch& scratch) const;
  void StreamInPlace(Rows<bf16> source, int expert, int columns,
                     std::span<const GradFactor> factors, const Scratch& scratch) const;
  void TransposeLowRank(const GradFactor& factor, int row, int count, bf16* dst,
                        ptrdiff_t stride) const;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_LORA_GRAD_H_
