#include "moe/products.h"

#include <algorithm>

namespace ktjax {
void LoRAMatrix::PackOutputs(const Kernels& kernels, int expert, int64_t row,
                             int outputs, int64_t column, int depth, int strips,
                             SplitPanel dst, ptrdiff_t dst_stride) const {
  const int64_t offset = (expert * rows + row) * columns + column;
  outputs = std::max(outputs, 0);
  if (array.is_float32) {
    const Rows<float> src{static_cast<const float*>(array.data) + offset, columns};
    kernels.pack_outputs_f32(src, outputs, depth, strips, dst.high, dst_stride);
    if (dst.low) {
      kernels.pack_outputs_low(src, outputs, depth, strips, dst.low, dst_stride);
    }
  } else {
    const Rows<bf16> src{static_cast<const bf16*>(array.data) + offset, columns};
    kernels.pack_outputs_bf16(src, outputs, depth, strips, dst.high, dst_stride);
  }
}

void LoRAMatrix::PackDepths(const Kernels& kernels, int expert, int64_t row, int depth,
                            int64_t column, int outputs, int strips, SplitPanel dst,
                            ptrdiff_t dst_stride) const {
  const int64_t offset = (expert * rows + row) * columns + column;
  outputs = std::max(outputs, 0);
  if (array.is_float32) {
    const Rows<float> src{static_cast<const float*>(array.data) + offset, columns};
    kernels.pack_depths_f32(src, depth, outputs, strips, dst.high, dst_stride);
    if (dst.low) {
      kernels.pack_depths_low(src, depth, outputs, strips, dst.low, dst_stride);
    }
  } else {
    const Rows<bf16> src{static_cast<const bf16*>(array.data) + offset, columns};
    kernels.pack_depths_bf16(src, depth, outputs, strips, dst.high, dst_stride);
  }
}

void Products::StoreGrad(const RowFactor& factor, int rank, const float* tile,
                         int column, int outputs) const {
  const int64_t offset = factor.transposed ? column * factor.stride : column;
  if (factor.grad.is_float32) {
    (factor.transposed ? epilogues_.stream_columns_f32 : epilogues_.stream_rows_f32)(
        tile, rank, outputs, static_cast<float*>(factor.grad.data) + offset,
        factor.stride);
  } else {
    (factor.transposed ? epilogues_.stream_columns_bf16 : epilogues_.stream_rows_bf16)(
        tile, rank, outputs, static_cast<bf16*>(factor.grad.data) + offset,
        factor.stride);
  }
}

}  // namespace ktjax
