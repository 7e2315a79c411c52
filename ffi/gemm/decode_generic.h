// Decoding in plain C++; the compiler vectorises what it can.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_GENERIC_H_
#define KTJAX_FFI_GEMM_DECODE_GENERIC_H_

#include <cstring>

#include "gemm/decode_loop.h"

namespace ktjax {
namespace {

// The values of all codes that are not integers.
struct CodeTable {
  float e4m3[256];
  float e2m1[16];
};
constexpr CodeTable kCodeTable = [] {
  CodeTable table{};
  for (int code = 0; code < 256; ++code) table.e4m3[code] = E4M3Value(code);
  for (int code = 0; code < 16; ++code) table.e2m1[code] = E2M1Value(code);
  return table;
}();

template <typename L>
struct GenericDecoder {
  struct Row {
    float scale[kStrip];
    int32_t zero[kStrip];
  };

  static bool LoadRow(const QuantPanel& panel, int64_t first, Row& row) {
    bool ordinary = true;
    for (int n = 0; n < kStrip; ++n) {
      row.scale[n] = ScaleValue<L::kScale>(panel.scales, first + n);
      ordinary &= IsOrdinary(row.scale[n]);
      row.zero[n] = L::kZeros ? panel.zeros[first + n] : ImpliedZero(L::kCode);
    }
    return ordinary;
  }

  static void DecodeStrip(const Row& row, const uint8_t* codes, ptrdiff_t code_stride,
                          bf16* dst, ptrdiff_t stride) {
    constexpr int kMask = (1 << L::kCodeBits) - 1;
    for (int i = 0; i < L::kLines; ++i, codes += code_stride) {
      uint32_t lanes[kStrip];
      std::memcpy(lanes, codes, sizeof lanes);
      for (int pair = 0; pair < 16 / L::kCodeBits; ++pair, dst += stride) {
        // Bits of the codes of depths 2 pair and 2 pair + 1.
        const int even =
            L::kCode == Code::kE4M3 ? 8 * pair : 16 * (pair % 2) + 4 * (pair / 2);
        const int odd = even + (L::kCode == Code::kE4M3 ? 16 : 8);
        uint32_t pairs[kStrip];
        for (int n = 0; n < kStrip; ++n) {
          const uint32_t low = Round(row, n, lanes[n] >> even & kMask);
          const uint32_t high = Round(row, n, lanes[n] >> odd & kMask);
          pairs[n] = low >> 16 | (high & 0xffff0000u);
        }
        std::memcpy(dst, pairs, sizeof pairs);
      }
    }
  }

 private:
  // The value, rounded to nearest even in the upper half.
  static uint32_t Round(const Row& row, int n, uint32_t code) {
    float value;
    if constexpr (L::kCode == Code::kE4M3) {
      value = kCodeTable.e4m3[code];
    } else if constexpr (L::kCode == Code::kE2M1) {
      value = kCodeTable.e2m1[code];
    } else {
      value = static_cast<float>(static_cast<int>(code) - row.zero[n]);
    }
    value *= row.scale[n];
    if constexpr (L::kCode == Code::kE2M1) value += 0.0f;  // -0 becomes 0
    const uint32_t bits = BitsOf(value);
    return bits + 0x7fff + (bits >> 16 & 1);
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_GENERIC_H_
