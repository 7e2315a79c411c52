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

namespace ktjax {
namespace {

typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));

constexpr float kLeastNormal = 0x1p-126f;

inline int CodeBits(const FormatSpec& format) {
  return format.code == Code::kInt8 ? 8 : 4;
}

// The code of value 0 in a panel without zero points.
inline int CodeOfZero(const FormatSpec& format) {
  return format.code == Code::kInt8 ? 128 : 8;
}

// Depths of group g of rows, rounded up to what the operands hold.
inline int GroupDepth(int depth, int group, int g) {
  const int left = depth - g * group;
  return left < group ? static_cast<int>(RoundUp(left, kDepth)) : group;
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

// `count` values as float32, then zeros.
inline void LoadValues(const SplitRows& src, int row, int begin, int count,
                       F32x16& values) {
  const bf16* high = src.high + row * src.stride + begin;
  bf16 lanes[kStrip] = {};
  if (count < kStrip) {
    std::memcpy(lanes, high, sizeof(bf16) * (count < 0 ? 0 : count));
    high = lanes;
  }
  Load(high, values);
  if (!src.low) return;
  const bf16* low = src.high + row * src.stride + begin + src.low;
  bf16 low_lanes[kStrip] = {};
  if (count < kStrip) {
    std::memcpy(low_lanes, low, sizeof(bf16) * (count < 0 ? 0 : count));
    low = low_lanes;
  }
  F32x16 rest;
  Load(low, rest);
  values += rest;
}

// One group of one row: its codes, their sum and their scale.
inline float QuantizeGroup(const SplitRows& src, int row, int begin, int count,
                           int8_t* codes, int32_t* code_sum) {
  const int vectors = static_cast<int>(RoundUp(count, kDepth)) / kStrip;
  F32x16 values[kInt8Group / kStrip];
  // Magnitudes compare as integers, and there NaN is above infinity.
  I32x16 most = {};
  for (int v = 0; v < vectors; ++v) {
    LoadValues(src, row, begin + v * kStrip, count - v * kStrip, values[v]);
    I32x16 bits;
    std::memcpy(&bits, &values[v], sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t magnitude = 0;
  for (int i = 0; i < kStrip; ++i)
    magnitude = most[i] > magnitude ? most[i] : magnitude;
  *code_sum = 0;
  float scale;
  std::memcpy(&scale, &magnitude, sizeof scale);
  scale /= 127;
  const bool finite = magnitude < 0x7f800000;
  if (!finite || scale < kLeastNormal) {
    std::memset(codes, 0, static_cast<size_t>(vectors) * kStrip);
    return finite ? 0 : std::numeric_limits<float>::quiet_NaN();
  }
  // |v / scale| <= 127 (1 + 2^-22), so no code is beyond 127. Adding 1.5 * 2^23 rounds
  // to an integer, which is then in the low bits.
  constexpr float kMagic = 12582912.0f;
  constexpr int32_t kMagicBits = 0x4b400000;
  I32x16 sum = {};
  for (int v = 0; v < vectors; ++v) {
    const F32x16 shifted = values[v] / scale + kMagic;
    I32x16 code;
    std::memcpy(&code, &shifted, sizeof code);
    code -= kMagicBits;
    sum += code;
    const I8x16 narrow = __builtin_convertvector(code, I8x16);
    std::memcpy(codes + v * kStrip, &narrow, sizeof narrow);
  }
  for (int i = 0; i < kStrip; ++i) *code_sum += sum[i];
  return scale;
}

inline void QuantizeRows(SplitRows src, int rows, int depth, const Int8Rows& dst) {
  for (int r = 0; r < rows; ++r) {
    const ptrdiff_t place = r * dst.group_stride;
    for (int begin = 0, g = 0; begin < depth; begin += dst.group, ++g) {
      const int count = depth - begin < dst.group ? depth - begin : dst.group;
      dst.scales[place + g] =
          QuantizeGroup(src, r, begin, count, dst.values + r * dst.stride + begin,
                        &dst.sums[place + g]);
    }
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_ROWS_H_
