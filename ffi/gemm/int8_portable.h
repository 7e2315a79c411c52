// The integer product for any CPU.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_PORTABLE_H_
#define KTJAX_FFI_GEMM_INT8_PORTABLE_H_

#include <cstring>

#include "gemm/int8_block_generic.h"
#include "gemm/int8_rows.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

// sum += a . codes for `depth` depths of one strip, whose lanes are `stride` bytes
// apart. In float32, where these integers are exact too, because SSE2 has no product of
// 32-bit integers.
template <int kBits>
void AddCodes(const int8_t* a, const uint8_t* codes, ptrdiff_t stride, int depth,
              F32x16& sum) {
  for (int d = 0; d < depth; codes += stride) {
    U32x16 lanes;
    std::memcpy(&lanes, codes, sizeof lanes);
    for (int half = 0; half < 8 / kBits; ++half) {
      for (int byte = 0; byte < 4; ++byte, ++d) {
        const U32x16 code = lanes >> (8 * byte + 4 * half) & ((1u << kBits) - 1);
        sum += static_cast<float>(a[d]) *
               __builtin_convertvector(__builtin_convertvector(code, I32x16), F32x16);
      }
    }
  }
}

// The product with weights in blocks.
template <Format kFormat>
void PortableBlocks(const Int8Rows& a, const QuantPanel& b, int depth, int rows,
                    float* c) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  constexpr int kSub = SubDepths(kSpec);
  constexpr float kZero = CodeOfZero(kSpec);
  const int lanes = kStrip * b.strips;
  alignas(64) uint8_t bytes[kInt8Group * kPanel];
  BlockScales scales;
  for (int begin = 0; begin < depth; begin += kInt8Group) {
    const int count = GroupDepth(depth, begin);
    UnpackBlocks<kFormat>(b, begin, count, bytes);
    LoadBlockScales<kFormat>(b, begin, count, scales);
    for (int r = 0; r < rows; ++r) {
      const int8_t* values = a.values + r * a.stride + begin;
      for (int first = 0; first < lanes; first += kStrip) {
        F32x16 total = {}, result = {};
        for (int d = 0; d < count; d += kSub) {
          F32x16 sum = {}, scale, min;
          AddCodes<8>(values + d, bytes + d * lanes + 4 * first, 4 * lanes, kSub, sum);
          const float row_sum = static_cast<float>(SubBlockSum(a, r, begin + d, kSub));
          Load(scales.scale + d / kSub * lanes + first, scale);
          total += (sum - row_sum * kZero) * scale;
          if constexpr (kSpec.mins) {
            Load(scales.min + d / kSub * lanes + first, min);
            total -= row_sum * min;
          }
        }
        float* dst = c + r * kPanel + first * b.apart;
        if (begin > 0) Load(dst, result);
        result += total * a.scales[r * a.scale_stride + begin / kInt8Group];
        Store(result, dst);
      }
    }
  }
}

inline void PortableInt8Gemm(const FormatSpec& format, const Int8Rows& a,
                             const QuantPanel& b, int depth, int rows, float* c,
                             Prefetch*) {
  if (format.blocks) {
    WithBlockFormat(format.format, [&]<Format kFormat>() {
      PortableBlocks<kFormat>(a, b, depth, rows, c);
    });
    return;
  }
  const int bits = CodeBits(format);
  const ptrdiff_t lanes = 4 * kStrip * b.strips;
  for (int r = 0; r < rows; ++r) {
    const float* row_scales = a.scales + r * a.scale_stride;
    const int32_t* row_sums = a.sums + r * a.sum_stride;
    for (int strip = 0; strip < b.strips; ++strip) {
      F32x16 total = {}, group_total = {};
      for (int begin = 0; begin < depth; begin += a.group) {
        const int8_t* values = a.values + r * a.stride + begin;
        const uint8_t* codes = b.codes + begin * bits / 32 * lanes + strip * 4 * kStrip;
        const int count = GroupDepth(depth, begin, a.group);
        F32x16 sum = {};
        if (bits == 8) {
          AddCodes<8>(values, codes, lanes, count, sum);
        } else {
          AddCodes<4>(values, codes, lanes, count, sum);
        }
        const ptrdiff_t place = ScalePlace(b, begin) + strip * kStrip;
        const float row_sum = static_cast<float>(row_sums[begin / a.group]);
        F32x16 scales, zeros;
        LoadScales(format, b, place, scales);
        LoadZeros(format, b, place, zeros);
        group_total += (sum - row_sum * zeros) * scales;
        if (EndsRowGroup(depth, begin + a.group)) {
          total += group_total * row_scales[begin / kInt8Group];
          group_total = F32x16{};
        }
      }
      Store(total, c + r * kPanel + strip * kStrip);
    }
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_PORTABLE_H_
