// Formats whose matrices come in the blocks of GGUF files: how their codes lie in a
// panel and become numbers. blocks.cc has how a file has them.
//
// The value of a weight is bf16(v), with all arithmetic in float32 and
//
//     v = (code - zero) * (d * (sub_scale - sub_zero)) - min * sub_min
//
// where d and min are halves and a factor that a format lacks is 1. Everything but the
// subtraction of the minimum and the final rounding is exact: d has 11 significant
// bits, sub-scales up to 7 and codes up to 7. So it does not matter whether a kernel
// fuses them, and no product is denormal: a half is 0 or at least 2^-24.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_FORMAT_BLOCKS_H_
#define KTJAX_FFI_FORMAT_BLOCKS_H_

#include "base/types.h"
#include "format/format.h"

namespace ktjax {
namespace {

constexpr BlockSpec kBlockSpecs[] = {
    {.format = Format::kQ4_0, .depths = 32, .bytes = 18, .bits = 4, .zero = 8},
    {.format = Format::kQ4_1,
     .depths = 32,
     .bytes = 20,
     .bits = 4,
     .mins = true,
     .min_at = 2},
    {.format = Format::kQ5_0, .depths = 32, .bytes = 22, .bits = 5, .zero = 16},
    {.format = Format::kQ5_1,
     .depths = 32,
     .bytes = 24,
     .bits = 5,
     .mins = true,
     .min_at = 2},
    {.format = Format::kQ8_0, .depths = 32, .bytes = 34, .bits = 8, .zero = 128},
    {.format = Format::kQ2K,
     .depths = 256,
     .bytes = 84,
     .bits = 2,
     .sub = 16,
     .mins = true,
     .sub_mins = SubMins::kPacked,
     .scale_at = 80,
     .min_at = 82},
    {.format = Format::kQ3K,
     .depths = 256,
     .bytes = 110,
     .bits = 3,
     .zero = 4,
     .sub = 16,
     .sub_zero = 32,
     .scale_at = 108},
    {.format = Format::kQ4K,
     .depths = 256,
     .bytes = 144,
     .bits = 4,
     .sub = 32,
     .mins = true,
     .sub_mins = SubMins::kBytes,
     .min_at = 2},
    {.format = Format::kQ5K,
     .depths = 256,
     .bytes = 176,
     .bits = 5,
     .sub = 32,
     .mins = true,
     .sub_mins = SubMins::kBytes,
     .min_at = 2},
    {.format = Format::kQ6K,
     .depths = 256,
     .bytes = 210,
     .bits = 6,
     .zero = 32,
     .sub = 16,
     .sub_zero = 128,
     .scale_at = 208},
    {.format = Format::kIq4Nl, .depths = 32, .bytes = 18, .bits = 4, .table = true},
    {.format = Format::kIq4Xs,
     .depths = 256,
     .bytes = 136,
     .bits = 4,
     .table = true,
     .sub = 32,
     .sub_zero = 32},
};

// Depths that share a scale and a minimum, if any: 16 or 32.
constexpr int SubDepths(const BlockSpec& spec) { return spec.sub ? spec.sub : 32; }

// The row of a format, null for those that are not in blocks.
constexpr const BlockSpec* FindBlocks(Format format) {
  for (const BlockSpec& spec : kBlockSpecs) {
    if (spec.format == format) return &spec;
  }
  return nullptr;
}

// What the codes of IQ4_NL and IQ4_XS stand for.
constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

// The same as unsigned bytes, for products of integers: the value plus kIq4Zero.
constexpr int kIq4Zero = 128;
constexpr uint8_t kIq4Codes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                   129, 141, 153, 166, 181, 197, 217, 241};

// What is subtracted from codes, or from those of kIq4Codes.
constexpr int CodeOfZero(const BlockSpec& spec) {
  return spec.table ? kIq4Zero : spec.zero;
}

// The codes of depths 4 quad .. + 3 of 32, a byte each, from the words of one output
// (see QuantPanel): word(i) gives number i.
template <int kBits, typename Word>
[[gnu::always_inline]] inline uint32_t QuadOfCodes(int quad, Word word) {
  constexpr uint32_t kOnes = 0x01010101u;
  if constexpr (kBits == 8) return word(quad);
  constexpr int kLow = kBits < 4 ? 2 : 4, kPerWord = 8 / kLow;
  const uint32_t low = word(quad / kPerWord) >> kLow * (quad % kPerWord);
  const uint32_t codes = low & kOnes * ((1 << kLow) - 1);
  if constexpr (kBits == kLow + 1) {
    return codes | (word(kLow) >> quad & kOnes) << kLow;
  } else if constexpr (kBits == kLow + 2 && kLow == 4) {
    return codes | (word(4 + quad / 4) >> 2 * (quad % 4) & 3 * kOnes) << 4;
  } else {
    return codes;
  }
}

constexpr float HalfToFloat(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  const float magnitude =
      exponent == 0
          ? static_cast<float>(mantissa) * 0x1p-24f
          : __builtin_bit_cast(float, (exponent + 112) << 23 | mantissa << 13);
  return half & 0x8000 ? -magnitude : magnitude;
}

// What the weights of one output and one sub-block have in common.
struct SubScale {
  float scale;
  float min;
};

// `lane` is the output and `lanes` the outputs of a panel; depth is any of the
// sub-block's.
template <Format kFormat>
[[gnu::always_inline]] inline SubScale SubScaleOf(const QuantPanel& panel, int depth,
                                                  int lane, int lanes) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  const int64_t block = int64_t{depth / kSpec.depths} * lanes + lane;
  SubScale sub = {HalfToFloat(static_cast<const uint16_t*>(panel.scales)[block]), 0};
  if constexpr (kSpec.mins) sub.min = HalfToFloat(panel.mins[block]);
  if constexpr (kSpec.sub > 0) {
    const int64_t at = int64_t{depth / kSpec.sub} * lanes + lane;
    int code = panel.sub_scales[at];
    if constexpr (kSpec.sub_mins == SubMins::kPacked) {
      sub.min *= static_cast<float>(code >> 4);
      code &= 15;
    }
    if constexpr (kSpec.sub_mins == SubMins::kBytes) {
      sub.min *= static_cast<float>(panel.sub_mins[at]);
    }
    sub.scale *= static_cast<float>(code - kSpec.sub_zero);
  }
  return sub;
}

// The value of a code before it is rounded to bfloat16.
template <Format kFormat>
[[gnu::always_inline]] inline float BlockValue(SubScale sub, uint32_t code) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  const float number = kSpec.table
                           ? kIq4Values[code & 15]
                           : static_cast<float>(static_cast<int>(code) - kSpec.zero);
  const float product = number * sub.scale;
  return kSpec.mins ? product - sub.min : product;
}

// Calls `f.template operator()<kFormat>()` with the panel's format; false when that is
// not in blocks.
template <typename F>
[[gnu::always_inline]] inline bool WithBlockFormat(Format format, F f) {
  using enum Format;
  switch (format) {
    case kQ4_0:
      return f.template operator()<kQ4_0>(), true;
    case kQ4_1:
      return f.template operator()<kQ4_1>(), true;
    case kQ5_0:
      return f.template operator()<kQ5_0>(), true;
    case kQ5_1:
      return f.template operator()<kQ5_1>(), true;
    case kQ8_0:
      return f.template operator()<kQ8_0>(), true;
    case kQ2K:
      return f.template operator()<kQ2K>(), true;
    case kQ3K:
      return f.template operator()<kQ3K>(), true;
    case kQ4K:
      return f.template operator()<kQ4K>(), true;
    case kQ5K:
      return f.template operator()<kQ5K>(), true;
    case kQ6K:
      return f.template operator()<kQ6K>(), true;
    case kIq4Nl:
      return f.template operator()<kIq4Nl>(), true;
    case kIq4Xs:
      return f.template operator()<kIq4Xs>(), true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_BLOCKS_H_
