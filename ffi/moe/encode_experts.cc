#include "moe/encode_experts.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "format/encode.h"

namespace ktjax {

void EncodeExperts(Backend& backend, const Encoding& encoding,
                   const SourceMatrix& source, const MatrixShape& shape,
                   std::string_view name, const PlainArrays& out) {
  if (source.type == SourceMatrix::Type::kPlain) {
    throw std::logic_error("EncodeExperts: the source is encoded already");
  }
  const auto [experts, outputs, depth] = shape;
  const int64_t values = int64_t{outputs} * depth;
  const int64_t codes = outputs * encoding.code_columns(depth);
  const int64_t scales = encoding.scale_rows(outputs) * encoding.scale_columns(depth);
  const int64_t scale_bytes = scales * ScaleBytes(encoding.spec().scale);
  std::atomic<int> next{0};
  backend.pool.Run([&](Worker&) {
    EncodedMatrix encoded;
    for (int e; (e = next.fetch_add(1)) < experts;) {
      if (source.type == SourceMatrix::Type::kFloat32) {
        encoded.Encode(encoding, static_cast<const float*>(source.values) + e * values,
                       outputs, depth, name, e);
      } else {
        encoded.Encode(encoding, static_cast<const bf16*>(source.values) + e * values,
                       outputs, depth, name, e);
      }
      const PlainMatrix plain = encoded.plain();
      std::memcpy(out.codes + e * codes, plain.codes, codes);
      std::memcpy(out.scales + e * scale_bytes, plain.scales, scale_bytes);
      if (plain.zeros) std::memcpy(out.zeros + e * scales, plain.zeros, scales);
    }
  });
}

}  // namespace ktjax
