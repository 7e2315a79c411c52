// Packing in plain C++, for the instruction sets that have no better way.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_PACK_GENERIC_H_
#define KTJAX_FFI_GEMM_PACK_GENERIC_H_

#include <cstring>

#include "base/types.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

// Round to nearest even; NaN stays NaN (quiet) instead of rounding up to infinity.
inline bf16 ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline bf16 ToBf16(bf16 value) { return value; }

inline float ToFloat(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <Part kPart, typename T>
bf16 ToPart(T value) {
  if constexpr (kPart == Part::kLow) {
    const bf16 high = ToBf16(value);
    if ((high & 0x7fff) == 0x7f80) return 0;
    return ToBf16(value - ToFloat(high));
  } else {
    return ToBf16(value);
  }
}

template <typename T, Part kPart = Part::kHigh>
void GenericPackOutputs(Rows<T> src, int outputs, int depth, int strips, bf16* dst,
                        ptrdiff_t dst_stride) {
  const int padded = static_cast<int>(RoundUp(depth, kDepth));
  for (int d = 0; d < padded; d += 2) {
    std::memset(dst + d / 2 * dst_stride, 0, sizeof(bf16) * 2 * kStrip * strips);
  }
  for (int n = 0; n < outputs; ++n) {
    const T* row = src.row(n);
    for (int d = 0; d < depth; ++d) {
      dst[d / 2 * dst_stride + 2 * n + d % 2] = ToPart<kPart>(row[d]);
    }
  }
}

template <typename T, Part kPart = Part::kHigh>
void GenericPackDepths(Rows<T> src, int depth, int outputs, int strips, bf16* dst,
                       ptrdiff_t dst_stride) {
  const int padded = static_cast<int>(RoundUp(depth, kDepth));
  for (int d = 0; d < padded; d += 2) {
    bf16* out = dst + d / 2 * dst_stride;
    std::memset(out, 0, sizeof(bf16) * 2 * kStrip * strips);
    for (int half = 0; half < 2 && d + half < depth; ++half) {
      const T* row = src.row(d + half);
      for (int n = 0; n < outputs; ++n) out[2 * n + half] = ToPart<kPart>(row[n]);
    }
  }
}

inline void GenericTranspose(const bf16* src, ptrdiff_t src_stride, int blocks,
                             bf16* dst, ptrdiff_t dst_stride) {
  for (int block = 0; block < blocks; ++block) {
    for (int pair = 0; pair < kDepth / 2; ++pair) {
      const bf16* in = src + (block * (kDepth / 2) + pair) * src_stride;
      for (int n = 0; n < kStrip; ++n) {
        bf16* out = dst + n / 2 * dst_stride + 2 * (block * kDepth + 2 * pair) + n % 2;
        out[0] = in[2 * n];
        out[2] = in[2 * n + 1];
      }
    }
  }
}

template <Part kPart>
void GenericToBf16(const float* src, bf16* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = ToPart<kPart>(src[i]);
}

inline void NoTileState() {}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_PACK_GENERIC_H_
