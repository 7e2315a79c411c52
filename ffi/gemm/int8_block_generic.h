// Codes and scales of GGUF's blocks as operands of the integer product, for any CPU.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_BLOCK_GENERIC_H_
#define KTJAX_FFI_GEMM_INT8_BLOCK_GENERIC_H_

#include <cstring>

#include "format/blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

// The codes of `count` depths from `begin` on as bytes, in the layout of 8-bit codes.
template <Format kFormat>
void UnpackBlocks(const QuantPanel& b, int begin, int count, uint8_t* bytes) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  const ptrdiff_t stride = ptrdiff_t{4} * kStrip * b.strips;
  const uint8_t* words = b.codes + begin / kDepth * kSpec.bits * stride;
  for (int d = 0; d < count; d += kDepth, words += kSpec.bits * stride) {
    for (int q = 0; q < kDepth / 4; ++q, bytes += stride) {
      for (ptrdiff_t n = 0; n < stride; n += 4) {
        const uint32_t quad = QuadOfCodes<kSpec.bits>(q, [&](int i) {
          uint32_t word;
          std::memcpy(&word, words + i * stride + n, sizeof word);
          return word;
        });
        std::memcpy(bytes + n, &quad, sizeof quad);
        if constexpr (kSpec.table) {
          for (int i = 0; i < 4; ++i) bytes[n + i] = kIq4Codes[bytes[n + i]];
        }
      }
    }
  }
}

// Fills the scales of `count` depths from `begin` on.
template <Format kFormat>
void LoadBlockScales(const QuantPanel& b, int begin, int count, BlockScales& out) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  constexpr int kSubDepths = SubDepths(kSpec);
  const int lanes = kStrip * b.strips;
  for (int i = 0; i < count / kSubDepths; ++i) {
    for (int n = 0; n < lanes; ++n) {
      const SubScale sub = SubScaleOf<kFormat>(b, begin + i * kSubDepths, n, lanes);
      out.scale[i * lanes + n] = sub.scale;
      if constexpr (kSpec.mins) out.min[i * lanes + n] = sub.min;
    }
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_BLOCK_GENERIC_H_
