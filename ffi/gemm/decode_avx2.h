// Decoding with AVX2 and F16C, eight outputs at a time. The ideas are those of
// decode_avx512.h.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_AVX2_H_
#define KTJAX_FFI_GEMM_DECODE_AVX2_H_

#include <immintrin.h>

#include "gemm/decode_loop.h"

namespace ktjax {
namespace {

template <typename L>
struct Avx2Decoder {
  static constexpr int kHalves = 2;  // of a strip

  struct Row {
    __m256 scale[kHalves];
    __m256 zero[kHalves];  // kZeros
  };

  static bool LoadRow(const QuantPanel& panel, int64_t first, Row& row) {
    bool ordinary = true;
    alignas(32) float scales[kStrip], zeros[kStrip];
    for (int n = 0; n < kStrip; ++n) {
      scales[n] = ScaleValue<L::kScale>(panel.scales, first + n);
      ordinary &= IsOrdinary(scales[n]);
      if (L::kCode == Code::kE4M3) scales[n] *= 0x1p8f;
      zeros[n] = L::kZeros ? panel.zeros[first + n] : 0;
    }
    for (int h = 0; h < kHalves; ++h) {
      row.scale[h] = _mm256_load_ps(scales + 8 * h);
      row.zero[h] = _mm256_load_ps(zeros + 8 * h);
    }
    return ordinary;
  }

  [[gnu::always_inline]] static void DecodeStrip(const Row& row, const uint8_t* codes,
                                                 ptrdiff_t code_stride, bf16* dst,
                                                 ptrdiff_t stride) {
    for (int i = 0; i < L::kLines; ++i, codes += code_stride) {
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        const __m256i lane =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + h);
        bf16* out = dst + kStrip * h;
        if constexpr (L::kCode == Code::kE4M3) {
          Store(out, E4M3Pair(row.scale[h], _mm256_slli_epi16(lane, 8)));
          Store(out + stride, E4M3Pair(row.scale[h], lane));
        } else {
          const __m256i upper = _mm256_srli_epi32(lane, 16);
          Store(out, Pair<0>(row, h, lane));
          Store(out + stride, Pair<0>(row, h, upper));
          if constexpr (L::kCodeBits == 4) {
            Store(out + 2 * stride, Pair<4>(row, h, lane));
            Store(out + 3 * stride, Pair<4>(row, h, upper));
          }
        }
      }
      dst += 16 / L::kCodeBits * stride;
    }
  }

 private:
  static void Store(bf16* dst, __m256i pairs) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), pairs);
  }

  // Rounded to nearest even in the upper halves of the lanes. For finite numbers. E2M1
  // times a power of two needs no rounding.
  static __m256i RoundUpper(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    if constexpr (L::kCode == Code::kE2M1) return bits;
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  // A pair whose codes begin at bits kBit and kBit + 8 of the lanes.
  template <int kBit>
  static __m256i Pair(const Row& row, int half, __m256i lane) {
    const __m256 even = Product<kBit>(row, half, lane);
    const __m256 odd = Product<kBit + 8>(row, half, lane);
    return _mm256_blend_epi16(_mm256_srli_epi32(RoundUpper(even), 16), RoundUpper(odd),
                              0xaa);
  }

  // (code - zero) * scale for the code at bit kBit.
  template <int kBit>
  static __m256 Product(const Row& row, int half, __m256i lane) {
    if constexpr (L::kCode == Code::kE2M1) {
      const __m256 values = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
      const __m256i code = _mm256_srli_epi32(lane, kBit);
      const __m256 sign = _mm256_castsi256_ps(
          _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(INT32_MIN)));
      // VPERMPS looks at the low three bits.
      const __m256 value = _mm256_xor_ps(_mm256_permutevar8x32_ps(values, code), sign);
      // -0 + 0 is 0.
      return _mm256_add_ps(_mm256_mul_ps(value, row.scale[half]), _mm256_setzero_ps());
    } else {
      constexpr int kMask = ((1 << L::kCodeBits) - 1) << kBit;
      constexpr int kBase = 0x4b000000;  // 2^23
      const __m256 number = _mm256_castsi256_ps(_mm256_or_si256(
          _mm256_and_si256(lane, _mm256_set1_epi32(kMask)), _mm256_set1_epi32(kBase)));
      __m256 zero;
      if constexpr (L::kZeros) {
        zero = _mm256_fmadd_ps(row.zero[half], _mm256_set1_ps(1 << kBit),
                               _mm256_set1_ps(0x1p23f));
      } else {
        zero = _mm256_set1_ps(0x1p23f + (ImpliedZero(L::kCode) << kBit));
      }
      const __m256 scale =
          _mm256_mul_ps(row.scale[half], _mm256_set1_ps(1.0f / (1 << kBit)));
      return _mm256_mul_ps(_mm256_sub_ps(number, zero), scale);
    }
  }

  // Codes in the upper bytes of the words, anything below.
  static __m256i E4M3Pair(__m256 scale, __m256i codes) {
    const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(codes, 1), mask);
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const __m256 low_scale = _mm256_permutevar8x32_ps(scale, twice);
    const __m256 high_scale =
        _mm256_permutevar8x32_ps(scale, _mm256_add_epi32(twice, _mm256_set1_epi32(4)));
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    const __m256i a = _mm256_srli_epi32(RoundUpper(_mm256_mul_ps(low, low_scale)), 16);
    const __m256i b =
        _mm256_srli_epi32(RoundUpper(_mm256_mul_ps(high, high_scale)), 16);
    // VPACKUSDW works in 128-bit lanes: their quarters come out as a0 b0 a1 b1.
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_AVX2_H_
