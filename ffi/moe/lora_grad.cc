#include "moe/lora_grad.h"

#include <emmintrin.h>

#include <algorithm>

#include "base/bf16.h"

namespace ktjax {
namespace {

constexpr int kBlock = 8;

// dst[i][r] = src[r][i] for i < columns and r < kBlock, zero from `rows` on; `src` is
// readable up to kBlock columns. In SSE2, which every x86-64 has.
void TransposeBlock(const bf16* src, ptrdiff_t src_stride, int rows, int columns,
                    bf16* dst, ptrdiff_t dst_stride) {
  static_assert(kBlock == 8);
  __m128i a[8], b[8];
  for (int r = 0; r < 8; ++r) {
    a[r] = r < rows
               ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + r * src_stride))
               : _mm_setzero_si128();
  }
  for (int i = 0; i < 4; ++i) {  // rows r and r + 4, word by word
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < columns; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i * dst_stride), b[i]);
  }
}

}  // namespace

int64_t LoRAGradPass::LoRAGradTasks(const Group& group) const {
  return static_cast<int64_t>(group.last_expert - group.first_expert) * Sources();
}

// A task is one source of one expert; experts without rows get gradients of zero.
void LoRAGradPass::LoRAGrad(const Group& group, int64_t task,
                            const Scratch& scratch) const {
  const int expert = group.first_expert + static_cast<int>(task / Sources());
  const int source = static_cast<int>(task % Sources());
  if (source < kTokenSources) {
    TokenGrad(group, expert, source, scratch);
  } else {
    ShardGrad(group, expert, source - kTokenSources, scratch);
  }
}

// The matrix of one expert, from (row, column) on, in a gradient array of `rows` x
// `columns` per expert.
MutableArray LoRAGradPass::GradOf(LoRAArray which, int expert, int64_t rows,
                                  int64_t columns, int64_t row, int64_t column) const {
  MutableArray grad = gradients_.lora[which];
  const int64_t offset = (expert * rows + row) * columns + column;
  grad.data = static_cast<char*>(grad.data) + offset * (grad.is_float32 ? 4 : 2);
  return grad;
}

void LoRAGradPass::TokenGrad(const Group& group, int expert, int source,
                             const Scratch& scratch) const {
  const int row = routing_.offsets[expert], hidden = geometry_.hidden;
  const int panels = store_.DownPanels(), half = source % 2;
  const int begin = panels * half / 2 * kPanel;
  const int end = std::min(panels * (half + 1) / 2 * kPanel, hidden);
  const bool of_x = source < 2;
  auto pack = [&](int from, int depth, int column, int outputs, int strips) {
    PackGathered(of_x ? inputs_.x : grad_y_, row + from, depth, begin + column, outputs,
                 strips, scratch);
    if (of_x)
      Drop(DropoutOf::kInput, row + from, depth, begin + column, strips, scratch);
  };
  auto multiply = [&](std::span<const GradFactor> factors) {
    if (!InPlace(expert)) {
      return MultiplyExpert(pack, row, routing_.rows_of(expert), end - begin, factors,
                            scratch);
    }
    const ConstArray array = of_x ? inputs_.x : grad_y_;
    StreamInPlace({static_cast<const bf16*>(array.data) + begin, hidden,
                   routing_.tokens.data() + row},
                  expert, end - begin, factors, scratch);
  };
  if (of_x) {
    const bf16* low_rank_grad = LowRankRow(low_rank_grad_, group, row);
    const GradFactor factors[] = {
        {low_rank_grad, false, false, GradOf(kGateA, expert, rank(), hidden, 0, begin),
         hidden},
        {low_rank_grad + 2 * low_rank_width_, false, false,
         GradOf(kUpA, expert, rank(), hidden, 0, begin), hidden}};
    multiply(factors);
  } else {
    const GradFactor factor{LowRankRow(low_rank_, group, row) + 4 * low_rank_width_,
                            true, true,
                            GradOf(kDownB, expert, hidden, rank(), begin, 0), rank()};
    multiply({&factor, 1});
  }
}

void LoRAGradPass::ShardGrad(const Group& group, int expert, int source,
                             const Scratch& scratch) const {
  const int s = source / kShardSources, kind = source % kShardSources;
  const bool of_h = kind == 2;
  const int row = routing_.offsets[expert], begin = shard(s).begin;
  const int intermediate = geometry_.intermediate;
  const std::vector<bf16*>* arrays[] = {&d_gate_, &d_up_, &hidden_};
  const LoRAArray grads[] = {kGateB, kUpB, kDownA};
  const GradFactor factor =
      of_h ? GradFactor{LowRankRow(low_rank_grad_, group, row) + 4 * low_rank_width_,
                        true, false,
                        GradOf(kDownA, expert, rank(), intermediate, 0, begin),
                        intermediate}
           : GradFactor{LowRankRow(low_rank_, group, row) + 2 * kind * low_rank_width_,
                        false, true,
                        GradOf(grads[kind], expert, intermediate, rank(), begin, 0),
                        rank()};
  const SplitRows rows = HiddenRows(*arrays[kind], s, group, row);
  auto pack = [&](int from, int depth, int column, int outputs, int strips) {
    const bf16* base = rows.high + from * rows.stride + column;
    const ptrdiff_t stride = 2 * kStrip * strips;
    kernels_.pack_depths_bf16({base, rows.stride}, depth, outputs, strips,
                              scratch.panel.high, stride);
    if (exact()) {
      kernels_.pack_depths_bf16({base + rows.low, rows.stride}, depth, outputs, strips,
                                scratch.panel.low, stride);
    }
    if (of_h) {
      Drop(DropoutOf::kHidden, row + from, depth, shard(s).begin + column, strips,
           scratch);
    }
  };
  if (InPlace(expert)) {
    return StreamInPlace({rows.high, rows.stride}, expert, Slice(s), {&factor, 1},
                         scratch);
  }
  MultiplyExpert(pack, row, routing_.rows_of(expert), Slice(s), {&factor, 1}, scratch);
}

// Packs columns of a [tokens, hidden] array with the tokens of rows from `row` on as
// depths.
void LoRAGradPass::PackGathered(ConstArray array, int row, int depth, int column,
                                int outputs, int strips, const Scratch& scratch) const {
  const int32_t* tokens = &routing_.tokens[row];
  const ptrdiff_t stride = geometry_.hidden, panel_stride = 2 * kStrip * strips;
  if (array.is_float32) {
    const Rows<float> src{static_cast<const float*>(array.data) + column, stride,
                          tokens};
    kernels_.pack_depths_f32(src, depth, outputs, strips, scratch.panel.high,
                             panel_stride);
    kernels_.pack_depths_low(src, depth, outputs, strips, scratch.panel.low,
                             panel_stride);
  } else {
    const Rows<bf16> src{static_cast<const bf16*>(array.data) + column, stride, tokens};
    kernels_.pack_depths_bf16(src, depth, outputs, strips, scratch.panel.high,
                              panel_stride);
  }
}

// Takes what dropout drops out of scratch.panel, whose depths are `depth` rows of x or
// h from `row` on and whose outputs are its columns from `column` on.
void LoRAGradPass::Drop(DropoutOf of, int row, int depth, int column, int strips,
                        const Scratch& scratch) const {
  if (!dropout()) return;
  const WorkTimer timer(scratch.times, &WorkTimes::dropout);
  epilogues_.drop_from_panel(MaskOf(of, row, column), depth, strips, scratch.panel.high,
                             exact() ? scratch.panel.low : nullptr);
}

// As Products::MultiplyOverRows, over the `count` rows of an expert from `row` on.
template <typename Pack>
void LoRAGradPass::MultiplyExpert(Pack pack, int row, int count, int columns,
                                  std::span<const GradFactor> factors,
                                  const Scratch& scratch) const {
  const ptrdiff_t stride = RoundUp(std::max(count, 1), kDepth);
  RowFactor row_factors[2];
  for (size_t f = 0; f < factors.size(); ++f) {
    bf16* low_rank = scratch.transposed + 2 * f * rank() * stride;
    TransposeLowRank(factors[f], row, count, low_rank, stride);
    row_factors[f] = {{low_rank, stride, rank() * stride},
                      factors[f].transposed,
                      factors[f].grad,
                      factors[f].stride};
  }
  MultiplyOverRows(pack, count, columns, rank(), {row_factors, factors.size()},
                   scratch);
}

// The same for few rows, without packing them.
void LoRAGradPass::StreamInPlace(Rows<bf16> source, int expert, int columns,
                                 std::span<const GradFactor> factors,
                                 const Scratch& scratch) const {
  const int row = routing_.offsets[expert], count = routing_.rows_of(expert);
  constexpr ptrdiff_t kStride = kMaxContractRows;
  const SplitRows low_rank{scratch.transposed, kStride, rank() * kStride};
  for (const GradFactor& factor : factors) {
    TransposeLowRank(factor, row, count, low_rank.high, kStride);
    const auto stream = [&]<typename T>(const AdapterKernels<T>& adapters) {
      (factor.transposed ? adapters.outer_columns : adapters.outer_rows)(
          low_rank, rank(), source, count, columns, static_cast<T*>(factor.grad.data),
          factor.stride);
    };
    if (factor.grad.is_float32) {
      stream(*kernels_.adapters_f32);
    } else {
      stream(*kernels_.adapters_bf16);
    }
  }
  _mm_sfence();  // after which other threads may read what was streamed
}

// dst[i][r] = weight[r] low_rank[r][i], the high parts of all i and then the low
// ones, zero up to `stride` rows.
void LoRAGradPass::TransposeLowRank(const GradFactor& factor, int row, int count,
                                    bf16* dst, ptrdiff_t stride) const {
  const int width = static_cast<int>(RoundUp(rank(), kBlock));
  alignas(64) float values[kBlock * kMaxRank];
  alignas(64) bf16 parts[2][kBlock * kMaxRank];
  for (int first = 0; first < stride; first += kBlock) {
    const int rows = std::clamp(count - first, 0, kBlock);
    const bf16* src = factor.low_rank + int64_t{first} * low_rank_stride_;
    if (factor.weighted) {
      for (int r = 0; r < rows; ++r) {
        const bf16* high = src + r * low_rank_stride_;
        const bf16* low = high + low_rank_width_;
        const float weight = routing_.weights[row + first + r];
        for (int i = 0; i < width; ++i) {
          values[r * width + i] = weight * (FromBf16(high[i]) + FromBf16(low[i]));
        }
      }
      kernels_.to_bf16(values, parts[0], rows * width);
      kernels_.to_bf16_low(values, parts[1], rows * width);
    }
    for (int part = 0; part < 2; ++part) {
      const bf16* from = factor.weighted ? parts[part] : src + part * low_rank_width_;
      const ptrdiff_t from_stride = factor.weighted ? width : low_rank_stride_;
      for (int i = 0; i < rank(); i += kBlock) {
        TransposeBlock(from + i, from_stride, rows, std::min(kBlock, rank() - i),
                       dst + (part * rank() + i) * stride + first, stride);
      }
    }
  }
}

}  // namespace ktjax
