// Bit patterns and the few constants that every layer shares.
#ifndef KTJAX_FFI_BASE_TYPES_H_
#define KTJAX_FFI_BASE_TYPES_H_

#include <cstddef>
#include <cstdint>

namespace ktjax {

// A bfloat16 value as its bits: arithmetic happens in the kernels, in float32.
using bf16 = uint16_t;

// Outputs are grouped in strips of 16 (one 512-bit register of float32, one AMX tile
// row) and strips in panels of up to four: the width of one micro-kernel call.
inline constexpr int kStrip = 16;
inline constexpr int kPanelStrips = 4;
inline constexpr int kPanel = kStrip * kPanelStrips;

// Contraction depths are padded with zeros to a multiple of 32: one AMX tile row holds
// 32 bfloat16 values.
inline constexpr int kDepth = 32;

// The highest rank of adapters.
inline constexpr int kMaxRank = 256;

// Inlined even in debug builds: code of a file with ISA flags must not be shared.
[[gnu::always_inline]] constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
[[gnu::always_inline]] constexpr int64_t CeilDiv(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace ktjax

#endif  // KTJAX_FFI_BASE_TYPES_H_
