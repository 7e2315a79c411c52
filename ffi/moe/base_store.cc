#include "moe/base_store.h"

#include <algorithm>

namespace ktjax {

size_t BaseStore::bytes() const {
  size_t total = 0;
  for (const AlignedBuffer& buffer : memory_) total += buffer.size();
  return total;
}

void PackStrips(const Kernels& kernels, const SourceMatrix& matrix, int64_t stride,
                int64_t offset, int outputs, int depth, int strips, bf16* dst,
                ptrdiff_t dst_stride) {
  outputs = std::max(outputs, 0);
  if (matrix.type == SourceMatrix::Type::kFloat32) {
    const Rows<float> rows{static_cast<const float*>(matrix.values) + offset, stride};
    kernels.pack_outputs_f32(rows, outputs, depth, strips, dst, dst_stride);
  } else {
    const Rows<bf16> rows{static_cast<const bf16*>(matrix.values) + offset, stride};
    kernels.pack_outputs_bf16(rows, outputs, depth, strips, dst, dst_stride);
  }
}

PlainMatrix PlainRows(const Encoding& encoding, const SourceMatrix& source, int64_t row,
                      int64_t scale_row, int rows, int depth, const RowsName& name,
                      EncodedMatrix& encoded) {
  const auto& [matrix, expert, first_row] = name;
  switch (source.type) {
    case SourceMatrix::Type::kFloat32:
      encoded.Encode(encoding, static_cast<const float*>(source.values) + row * depth,
                     rows, depth, matrix, expert, first_row);
      return encoded.plain();
    case SourceMatrix::Type::kBf16:
      encoded.Encode(encoding, static_cast<const bf16*>(source.values) + row * depth,
                     rows, depth, matrix, expert, first_row);
      return encoded.plain();
    case SourceMatrix::Type::kPlain:
      break;
  }
  const int64_t scales = scale_row * encoding.scale_columns(depth);
  const PlainMatrix plain{
      static_cast<const uint8_t*>(source.values) + row * encoding.code_columns(depth),
      static_cast<const uint8_t*>(source.scales) +
          scales * ScaleBytes(encoding.spec().scale),
      source.zeros ? source.zeros + scales : nullptr, rows, depth};
  CheckPlain(encoding, plain, matrix, expert, first_row);
  return plain;
}

}  // namespace ktjax
