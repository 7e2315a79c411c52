// The value of one weight, from its code and scale: the rule that every decoder
// follows, here in plain C++. Decoders also take what is rare from here.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_FORMAT_SCALAR_H_
#define KTJAX_FFI_FORMAT_SCALAR_H_

#include "base/types.h"
#include "format/format.h"

namespace ktjax {
namespace {

constexpr uint32_t BitsOf(float value) { return __builtin_bit_cast(uint32_t, value); }
constexpr float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Twice the value of an E2M1 code, without its sign.
constexpr int8_t kTwiceE2M1[8] = {0, 1, 2, 3, 4, 6, 8, 12};

constexpr float E2M1Value(int code) {
  const float magnitude = 0.5f * static_cast<float>(kTwiceE2M1[code & 7]);
  return code > 8 ? -magnitude : magnitude;
}

// 4 exponent bits with bias 7, 3 mantissa bits. 0x7f and 0xff are NaN, and refused
// where codes come in.
constexpr float E4M3Value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude =
      exponent == 0
          ? static_cast<float>(mantissa) * 0x1p-9f
          : FloatOf(static_cast<uint32_t>(exponent + 120) << 23 | mantissa << 20);
  return code & 0x80 ? -magnitude : magnitude;
}

// The number that a code stands for; `zero` is what QuantPanel::zeros has or implies.
template <Code kCode>
float CodeValue(int code, int zero) {
  if constexpr (kCode == Code::kE4M3) return E4M3Value(code);
  if constexpr (kCode == Code::kE2M1) return E2M1Value(code);
  return static_cast<float>(code - zero);
}

// What is subtracted from a code where the panel has no zero points.
constexpr int ImpliedZero(Code code) {
  return code == Code::kInt8 ? 128 : code == Code::kInt4 ? 8 : 0;
}

// The float32 of scale number i.
template <ScaleType kScale>
float ScaleValue(const void* scales, int64_t i) {
  if constexpr (kScale == ScaleType::kFloat32) {
    return static_cast<const float*>(scales)[i];
  } else if constexpr (kScale == ScaleType::kBf16) {
    return FloatOf(static_cast<uint32_t>(static_cast<const bf16*>(scales)[i]) << 16);
  } else {
    return FloatOf(static_cast<uint32_t>(static_cast<const uint8_t*>(scales)[i]) << 23);
  }
}

// Scales that no product of a code makes denormal or infinite, even times 2^-8 or 2^8:
// 0 and [2^-100, 2^100). With those, plain float32 arithmetic is the rule.
constexpr uint32_t kLeastOrdinary = 27u << 23, kOrdinaryRange = 200u << 23;
inline bool IsOrdinary(float scale) {
  const uint32_t bits = BitsOf(scale);
  return bits == 0 || bits - kLeastOrdinary < kOrdinaryRange;
}

// bf16(code * scale) for any scale >= 0. The product is rounded to float32 as IEEE has
// it, then what is below 2^-126 is zero, of the code's sign; whether the thread flushes
// denormals makes no difference.
inline bf16 ValueBits(float code, float scale) {
  if (BitsOf(scale) >> 23 == 0) scale = 0;
  const double product = double{code} * double{scale};  // exact
  const double magnitude = product < 0 ? -product : product;
  uint32_t bits;
  if (magnitude >= 0x1p-126) {
    bits = BitsOf(static_cast<float>(product));
  } else {
    // From here on it rounds up to 2^-126.
    bits = BitsOf(code) & 0x80000000u;
    if (magnitude >= 0x1p-126 - 0x1p-150) bits |= 1u << 23;
  }
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The byte of a lane that has the code of depth 4 i + j.
constexpr int kE4M3Byte[4] = {0, 2, 1, 3};

// The code of an output and a depth.
template <Code kCode>
int CodeAt(const QuantPanel& panel, int depth, int output) {
  const int64_t lanes = kStrip * panel.strips;
  if constexpr (kCode == Code::kInt8) {
    return panel.codes[(depth / 4 * lanes + output) * 4 + depth % 4];
  } else if constexpr (kCode == Code::kE4M3) {
    return panel.codes[(depth / 4 * lanes + output) * 4 + kE4M3Byte[depth % 4]];
  } else {
    const int byte = panel.codes[(depth / 8 * lanes + output) * 4 + depth % 4];
    return byte >> depth % 8 / 4 * 4 & 15;
  }
}

// The bfloat16 bits of one weight. A zero has the sign of its code, but E2M1's is
// always positive.
template <Code kCode, ScaleType kScale>
bf16 WeightBits(const QuantPanel& panel, int depth, int output) {
  const int64_t at = int64_t{depth / panel.group} * kStrip * panel.strips + output;
  const int zero = panel.zeros ? panel.zeros[at] : ImpliedZero(kCode);
  const bf16 bits =
      ValueBits(CodeValue<kCode>(CodeAt<kCode>(panel, depth, output), zero),
                ScaleValue<kScale>(panel.scales, at));
  return kCode == Code::kE2M1 && (bits & 0x7fff) == 0 ? 0 : bits;
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_SCALAR_H_
