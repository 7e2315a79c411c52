// What the integer products of all instruction sets share: the 8-bit codes of rows, and
// the scale and zero point of a panel's group.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_ROWS_H_
#define KTJAX_FFI_GEMM_INT8_ROWS_H_

#include <cstring>
#include <limits>

#include "base/types.h"
#include "gemm/epilogue_impl.h"
#include "gemm/kernel.h"
#include "gemm/pack_generic.h"

namespace ktjax {
namespace {

typedef uint8_t U8x16 __attribute__((vector_size(16)));

constexpr float kLeastNormal = 0x1p-126f;

inline int CodeBits(const FormatSpec& format) {
  return format.code == Code::kInt8 ? 8 : 4;
}

// The code of value 0 in a panel without zero points.
inline int CodeOfZero(const FormatSpec& format) {
  return format.code == Code::kInt8 ? 128 : 8;
}

// Depths of a group that begins at `begin`, rounded up to what the operands hold.
inline int GroupDepth(int depth, int begin, int group = kInt8Group) {
  const int left = depth - begin;
  return left < group ? static_cast<int>(RoundUp(left, kDepth)) : group;
}

// Whether depths that share a scale in the rows end at `end`.
inline bool EndsRowGroup(int depth, int end) {
  return end % kInt8Group == 0 || end >= depth;
}

// The scales of kInt8Group depths, [sub-blocks][16 * strips].
struct BlockScales {
  static constexpr int kSize = kInt8Group / 16 * kPanel;
  alignas(64) float scale[kSize];
  alignas(64) float min[kSize];  // where the format has minima
};

// The sum of the codes of a row's sub-block of `depths` depths from `begin` on.
inline int32_t SubBlockSum(const Int8Rows& a, int row, int begin, int depths) {
  const int32_t* sums = a.sums + row * a.sum_stride + begin / kBlockSumDepths;
  return depths == kBlockSumDepths ? sums[0] : sums[0] + sums[1];
}

// The first output's place among the panel's scales (and zeros) for depths from `begin`
// on.
inline ptrdiff_t ScalePlace(const QuantPanel& b, int begin) {
  return static_cast<ptrdiff_t>(begin / b.group) * kStrip * b.strips;
}

// The scales of a strip.
inline void LoadScales(const FormatSpec& format, const QuantPanel& b, ptrdiff_t place,
                       F32x16& scales) {
  if (format.scale == ScaleType::kBf16) {
    Load(static_cast<const bf16*>(b.scales) + place, scales);
  } else {
    Load(static_cast<const float*>(b.scales) + place, scales);
  }
}

// The codes of value 0 of a strip.
inline void LoadZeros(const FormatSpec& format, const QuantPanel& b, ptrdiff_t place,
                      F32x16& zeros) {
  zeros = F32x16{} + static_cast<float>(CodeOfZero(format));
  if (!b.zeros) return;
  U8x16 codes;
  std::memcpy(&codes, b.zeros + place, sizeof codes);
  zeros = __builtin_convertvector(__builtin_convertvector(codes, I32x16), F32x16);
}

// One group of `count` values: its codes, padded to kDepth, and its scale. Loops that
// the compiler vectorises.
inline float QuantizeGroup(const bf16* high, const bf16* low, int count,
                           int8_t* codes) {
  const int padded = static_cast<int>(RoundUp(count, kDepth));
  float values[kInt8Group];
  for (int i = 0; i < count; ++i) values[i] = ToFloat(high[i]);
  if (low) {
    for (int i = 0; i < count; ++i) values[i] += ToFloat(low[i]);
  }
  for (int i = count; i < padded; ++i) values[i] = 0;
  // Magnitudes compare as integers, and there NaN is above infinity.
  int32_t magnitude = 0;
  for (int i = 0; i < padded; ++i) {
    const int32_t bits = __builtin_bit_cast(int32_t, values[i]) & 0x7fffffff;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  const float scale = __builtin_bit_cast(float, magnitude) / 127;
  const bool finite = magnitude < 0x7f800000;
  if (!finite || scale < kLeastNormal) {
    std::memset(codes, 0, static_cast<size_t>(padded));
    return finite ? 0 : std::numeric_limits<float>::quiet_NaN();
  }
  // |v / scale| <= 127 (1 + 2^-22), so no code is beyond 127. Adding 1.5 * 2^23 rounds
  // to an integer, which is then in the low bits.
  constexpr float kMagic = 12582912.0f;
  constexpr int32_t kMagicBits = 0x4b400000;
  for (int i = 0; i < padded; ++i) {
    const float shifted = values[i] / scale + kMagic;
    codes[i] = static_cast<int8_t>(__builtin_bit_cast(int32_t, shifted) - kMagicBits);
  }
  return scale;
}

// dst.sums of a row of codes.
inline void SumCodes(const int8_t* codes, int depth, int group, int32_t* sums) {
  for (int begin = 0; begin < depth; begin += group) {
    const int count = depth - begin < group ? depth - begin : group;
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) sum += codes[begin + i];
    *sums++ = sum;
  }
}

inline void QuantizeRows(SplitRows src, int rows, int depth, const Int8Rows& dst) {
  for (int r = 0; r < rows; ++r) {
    const bf16* high = src.high + r * src.stride;
    const bf16* low = src.low ? high + src.low : nullptr;
    int8_t* codes = dst.values + r * dst.stride;
    float* scale = dst.scales + r * dst.scale_stride;
    for (int begin = 0; begin < depth; begin += kInt8Group) {
      const int count = depth - begin < kInt8Group ? depth - begin : kInt8Group;
      *scale++ = QuantizeGroup(high + begin, low ? low + begin : nullptr, count,
                               codes + begin);
    }
    SumCodes(codes, depth, dst.group, dst.sums + r * dst.sum_stride);
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_ROWS_H_
