// Codes and scales of blocks as operands of the integer product: 16 outputs at a time,
// in vectors of the compiler, for kernels that have no registers of their own for them.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_BLOCKS_GENERIC_H_
#define KTJAX_FFI_GEMM_INT8_BLOCKS_GENERIC_H_

#include <cstring>

#include "format/blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/kernel.h"
#include "gemm/pack_generic.h"

namespace ktjax {
namespace {

// The codes of block `block`, 32 depths, of a strip as unsigned bytes, in the layout of
// 8-bit codes: quad q's lanes at dst + q * stride.
template <Format kFormat>
[[gnu::always_inline]] inline void UnpackBlock(const QuantPanel& b, int block,
                                               int strip, uint8_t* dst,
                                               ptrdiff_t stride) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  const ptrdiff_t word_bytes = 4 * kStrip * b.strips;
  const uint8_t* words =
      b.codes + int64_t{block} * kSpec.bits * word_bytes + 4 * kStrip * strip;
  for (int q = 0; q < kDepth / 4; ++q, dst += stride) {
    const U32x16 quad = QuadOfCodes<kSpec.bits>(q, [&](int i) {
      U32x16 word;
      std::memcpy(&word, words + i * word_bytes, sizeof word);
      return word;
    });
    if constexpr (kSpec.table) {
      uint8_t codes[sizeof quad];
      std::memcpy(codes, &quad, sizeof quad);
      for (size_t i = 0; i < sizeof codes; ++i) dst[i] = kIq4Codes[codes[i]];
    } else {
      std::memcpy(dst, &quad, sizeof quad);
    }
  }
}

// What the sub-block with `depth` in it has in common, of a strip.
template <Format kFormat>
[[gnu::always_inline]] inline void LoadSubBlock(const QuantPanel& b, int depth,
                                                int strip, F32x16& scale, F32x16& min) {
  for (int n = 0; n < kStrip; ++n) {
    const SubScale sub =
        SubScaleOf<kFormat>(b, depth, kStrip * strip + n, kStrip * b.strips);
    scale[n] = sub.scale;
    min[n] = sub.min;
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_BLOCKS_GENERIC_H_
