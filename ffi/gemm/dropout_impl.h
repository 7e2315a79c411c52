// What dropout keeps, 16 columns at a time, and the steps that apply it.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DROPOUT_IMPL_H_
#define KTJAX_FFI_GEMM_DROPOUT_IMPL_H_

#include <cstring>

#include "base/types.h"
#include "gemm/kernel.h"
#include "gemm/vector_types.h"

namespace ktjax {
namespace {

constexpr uint32_t kGolden = 0x9e3779b9u;  // 2^32 over the golden ratio
constexpr uint32_t kMixFirst = 0x21f0aaadu;
constexpr uint32_t kMixSecond = 0x735a2d97u;

// A bijection of 32 bits in which every bit depends on every other.
inline uint32_t Mix(uint32_t z) {
  z = (z ^ (z >> 16)) * kMixFirst;
  z = (z ^ (z >> 15)) * kMixSecond;
  return z ^ (z >> 15);
}

// What all columns of a row share. A column then takes one Mix, with a second key in
// its middle: two rows whose counters overlap differ all the same.
class DropoutRow {
 public:
  DropoutRow(const DropoutMask& mask, int row) : threshold_(mask.dropout.threshold) {
    const uint32_t counter =
        2 * static_cast<uint32_t>(mask.slots[row]) + static_cast<uint32_t>(mask.of);
    middle_ = Mix(Mix(counter + kGolden) ^ mask.dropout.seed[1]);
    start_ = Mix(middle_ ^ mask.dropout.seed[0]) +
             static_cast<uint32_t>(mask.column) * kGolden;
  }
  // All ones where columns [n, n + 16) of the mask are kept, else 0.
  void Keep(int n, U32x16& keep) const {
    constexpr U32x16 kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    U32x16 z = start_ + (static_cast<uint32_t>(n) + kLanes) * kGolden;
    z = (z ^ (z >> 16)) * kMixFirst;
    z = (z ^ (z >> 15) ^ middle_) * kMixSecond;
    keep = (U32x16)((z ^ (z >> 15)) >= threshold_);
  }

 private:
  uint32_t threshold_;
  uint32_t middle_;
  uint32_t start_;
};

inline void CopyKept(const DropoutMask& mask, SplitRows src, int rows, int columns,
                     SplitRows dst) {
  for (int r = 0; r < rows; ++r) {
    const DropoutRow row(mask, r);
    const bf16* in = src.high + r * src.stride;
    bf16* out = dst.high + r * dst.stride;
    for (int n = 0; n < columns; n += kStrip) {
      U32x16 keep;
      row.Keep(n, keep);
      const U16x16 narrow = __builtin_convertvector(keep, U16x16);
      U16x16 value;
      std::memcpy(&value, in + n, sizeof(value));
      value &= narrow;
      std::memcpy(out + n, &value, sizeof(value));
      if (!src.low) continue;
      std::memcpy(&value, in + src.low + n, sizeof(value));
      value &= narrow;
      std::memcpy(out + dst.low + n, &value, sizeof(value));
    }
  }
}

// A 32-bit lane of a panel has two depths of an output: two rows of the mask.
inline void DropFromPanel(const DropoutMask& mask, int rows, int strips, bf16* high,
                          bf16* low) {
  const int columns = kStrip * strips;
  for (int r = 0; r < rows; r += 2) {
    // Behind an odd number of rows the panel is zero.
    const DropoutRow even(mask, r), odd(mask, r + 1 < rows ? r + 1 : r);
    for (int n = 0; n < columns; n += kStrip) {
      U32x16 keep, second, value;
      even.Keep(n, keep);
      odd.Keep(n, second);
      keep = (keep & 0xffffu) | (second & 0xffff0000u);
      const int64_t at = static_cast<int64_t>(r) * columns + 2 * n;
      std::memcpy(&value, high + at, sizeof(value));
      value &= keep;
      std::memcpy(high + at, &value, sizeof(value));
      if (!low) continue;
      std::memcpy(&value, low + at, sizeof(value));
      value &= keep;
      std::memcpy(low + at, &value, sizeof(value));
    }
  }
}

inline void AddKept(const DropoutMask& mask, const float* src, int rows, int strips,
                    float* c) {
  for (int r = 0; r < rows; ++r) {
    const DropoutRow row(mask, r);
    for (int n = r * kPanel; n < r * kPanel + kStrip * strips; n += kStrip) {
      U32x16 keep, bits;
      row.Keep(n - r * kPanel, keep);
      std::memcpy(&bits, src + n, sizeof(bits));
      bits &= keep;
      F32x16 sum, kept;
      std::memcpy(&kept, &bits, sizeof(kept));
      std::memcpy(&sum, c + n, sizeof(sum));
      sum += kept;
      std::memcpy(c + n, &sum, sizeof(sum));
    }
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DROPOUT_IMPL_H_
