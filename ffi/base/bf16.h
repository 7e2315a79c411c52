// bfloat16 <-> float32 for single values, in files without ISA flags.
#ifndef KTJAX_FFI_BASE_BF16_H_
#define KTJAX_FFI_BASE_BF16_H_

#include <bit>

#include "base/types.h"

namespace ktjax {

inline float FromBf16(bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

// Round to nearest even; NaN stays NaN (quiet) instead of rounding up to infinity.
inline bf16 RoundToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// value = high + low, to about 16 significant bits; low is 0 where high is infinite.
inline void SplitBf16(float value, bf16& high, bf16& low) {
  high = RoundToBf16(value);
  low = (high & 0x7fff) == 0x7f80 ? bf16{0} : RoundToBf16(value - FromBf16(high));
}

}  // namespace ktjax

#endif  // KTJAX_FFI_BASE_BF16_H_
