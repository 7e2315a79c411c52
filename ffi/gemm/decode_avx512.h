// Decoding with AVX-512 F, BW, DQ, VL, and BF16 where the file is compiled for it.
//
// On Zen 4 shuffles, shifts, multiplies and conversions to bfloat16 crowd three of the
// four vector pipes, so codes become float32 with as few of them as can be:
// * INT8 and INT4: or-ed below the exponent of 2^23, a code is a number, times a power
//   of two that depends on its place: logic, on any pipe, and a subtraction, on the
//   fourth. The even depths of INT4 take one VPERMPS instead, which looks at the low
//   four bits of an index only.
// * E2M1, whose scales are powers of two: bfloat16 from a table, and the scale
//   subtracted from its exponent.
// * E4M3: shifted right by one, a code is the upper byte of the float16 of its value
//   times 2^-8, denormals included: VCVTPH2PS reads them whatever the thread flushes.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_AVX512_H_
#define KTJAX_FFI_GEMM_DECODE_AVX512_H_

#include <immintrin.h>

#include "gemm/decode_loop.h"
#include "gemm/round_avx512.h"

namespace ktjax {
namespace {

struct WordTable {
  alignas(64) uint16_t word[32];
};

template <typename MakeWord>
constexpr WordTable MakeWords(MakeWord make) {
  WordTable table{};
  for (int i = 0; i < 32; ++i) table.word[i] = static_cast<uint16_t>(make(i));
  return table;
}

inline __m512i Load(const WordTable& table) { return _mm512_load_si512(table.word); }

// The words of two halves in turns.
constexpr WordTable kInterleaved =
    MakeWords([](int i) { return i / 2 + 16 * (i % 2); });

#ifdef __AVX512BF16__

// Lane n: the bfloat16 of even[n] and, above it, of odd[n]. For finite numbers.
inline __m512i PairLanes(__m512 even, __m512 odd) {
  return _mm512_permutexvar_epi16(Load(kInterleaved), RoundTwo(even, odd));
}

// The bfloat16 of `low`, then those of `high`.
inline __m512i JoinHalves(__m512 low, __m512 high) { return RoundTwo(low, high); }

#else

// Rounded to nearest even in the upper halves of the lanes.
inline __m512i RoundUpper(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd =
      _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

inline __m512i PairLanes(__m512 even, __m512 odd) {
  constexpr __mmask32 kOddWords = 0xaaaaaaaau;
  return _mm512_mask_blend_epi16(kOddWords, _mm512_srli_epi32(RoundUpper(even), 16),
                                 RoundUpper(odd));
}

inline __m512i JoinHalves(__m512 low, __m512 high) {
  static constexpr WordTable kUpperWords = MakeWords([](int i) { return 2 * i + 1; });
  return _mm512_permutex2var_epi16(RoundUpper(low), Load(kUpperWords),
                                   RoundUpper(high));
}

#endif

// E2M1 codes (i mod 16) in bfloat16, times 2^kE2M1Bias: more than any ordinary scale,
// so that a scale is something to subtract, and 0 stays 0 when that saturates.
constexpr int kE2M1Bias = 100;
constexpr WordTable kE2M1Words = MakeWords([](int i) {
  const int twice = kTwiceE2M1[i & 7];
  if (twice == 0) return 0;
  int exponent = 0;
  while (twice >> exponent > 1) ++exponent;
  const int mantissa = (twice << 7 >> exponent) - 128;
  return (i & 8) << 12 | (126 + kE2M1Bias + exponent) << 7 | mantissa;
});

template <typename L>
struct Avx512Decoder {
  struct Row {
    __m512 scale;
    __m512 zero;       // kZeros
    __m512i subtract;  // kE2M1: from the words of kE2M1Words
  };

  static bool LoadRow(const QuantPanel& panel, int64_t first, Row& row) {
    __m512i bits;  // of the scales in float32
    if constexpr (L::kScale == ScaleType::kFloat32) {
      bits = _mm512_loadu_si512(static_cast<const float*>(panel.scales) + first);
    } else if constexpr (L::kScale == ScaleType::kBf16) {
      const bf16* src = static_cast<const bf16*>(panel.scales) + first;
      bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                   reinterpret_cast<const __m256i*>(src))),
                               16);
    } else {
      bits = _mm512_slli_epi32(
          LoadBytes(static_cast<const uint8_t*>(panel.scales) + first), 23);
    }
    const __mmask16 some = _mm512_test_epi32_mask(bits, bits);
    const __mmask16 rare = _mm512_mask_cmpge_epu32_mask(
        some, _mm512_sub_epi32(bits, _mm512_set1_epi32(kLeastOrdinary)),
        _mm512_set1_epi32(kOrdinaryRange));
    if constexpr (L::kCode == Code::kE2M1) {
      // 2^kE2M1Bias / scale in both words; for a scale of 0, more than any word.
      const __m512i left = _mm512_sub_epi32(_mm512_set1_epi32((127 + kE2M1Bias) << 7),
                                            _mm512_srli_epi32(bits, 16));
      row.subtract = _mm512_mask_or_epi32(_mm512_set1_epi32(-1), some, left,
                                          _mm512_slli_epi32(left, 16));
    } else if constexpr (L::kCode == Code::kE4M3) {
      row.scale = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p8f));
    } else {
      row.scale = _mm512_castsi512_ps(bits);
    }
    if constexpr (L::kZeros) {
      row.zero = _mm512_cvtepi32_ps(LoadBytes(panel.zeros + first));
    }
    return rare == 0;
  }

  [[gnu::always_inline]] static void DecodeStrip(const Row& row, const uint8_t* codes,
                                                 ptrdiff_t code_stride, bf16* dst,
                                                 ptrdiff_t stride) {
    Pairs(row, codes, code_stride, [=](int pair, __m512i values) {
      _mm512_storeu_si512(dst + pair * stride, values);
    });
  }

  // Calls put(pair, values) for the 16 depth pairs of a strip of a block.
  template <typename Put>
  [[gnu::always_inline]] static void Pairs(const Row& row, const uint8_t* codes,
                                           ptrdiff_t code_stride, Put put) {
    constexpr int kPairs = kDepth / 2 / L::kLines;  // of a line
#pragma GCC unroll 8
    for (int i = 0; i < L::kLines; ++i, codes += code_stride) {
      const int pair = kPairs * i;
      if constexpr (L::kCode == Code::kE4M3) {
        const __m256i* src = reinterpret_cast<const __m256i*>(codes);
        const __m256i low = _mm256_loadu_si256(src), high = _mm256_loadu_si256(src + 1);
        put(pair, E4M3Pair(row, _mm256_slli_epi16(low, 8), _mm256_slli_epi16(high, 8)));
        put(pair + 1, E4M3Pair(row, low, high));
        continue;
      }
      const __m512i lane = _mm512_loadu_si512(codes);
      if constexpr (L::kCode == Code::kInt8) {
        put(pair, IntPair<0>(row, lane));
        put(pair + 1, IntPair<0>(row, _mm512_srli_epi32(lane, 16)));
      } else if constexpr (L::kCode == Code::kInt4) {
        const __m512i upper = _mm512_srli_epi32(lane, 16);
        put(pair, IntPair<0>(row, lane));
        put(pair + 1, IntPair<0>(row, upper));
        put(pair + 2, IntPair<4>(row, lane));
        put(pair + 3, IntPair<4>(row, upper));
      } else if constexpr (L::kCode == Code::kE2M1) {
        const __m512i low = SpreadBytes<0>(lane), high = SpreadBytes<2>(lane);
        put(pair, E2M1Pair(row, low));
        put(pair + 1, E2M1Pair(row, high));
        put(pair + 2, E2M1Pair(row, _mm512_srli_epi16(low, 4)));
        put(pair + 3, E2M1Pair(row, _mm512_srli_epi16(high, 4)));
      }
    }
  }

  // The values of a line of INT8 codes, rounded: those of 16 outputs at one depth, then
  // at the next.
  [[gnu::always_inline]] static void Halves(const Row& row, __m512i lane,
                                            __m512i (&values)[2]) {
    const __m512i upper = _mm512_srli_epi32(lane, 16);
    values[0] = JoinHalves(Product<0>(row, lane), Product<8>(row, lane));
    values[1] = JoinHalves(Product<0>(row, upper), Product<8>(row, upper));
  }

 private:
  static __m512i LoadBytes(const uint8_t* src) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }

  // A pair whose codes begin at bits kBit and kBit + 8 of the lanes.
  template <int kBit>
  static __m512i IntPair(const Row& row, __m512i lane) {
    if constexpr (L::kCode == Code::kInt4 && !L::kZeros) {
      const __m512 values =
          _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      const __m512i index = kBit ? _mm512_srli_epi32(lane, kBit) : lane;
      const __m512 even = _mm512_permutexvar_ps(index, values);
      return PairLanes(_mm512_mul_ps(even, row.scale), Product<kBit + 8>(row, lane));
    } else {
      return PairLanes(Product<kBit>(row, lane), Product<kBit + 8>(row, lane));
    }
  }

  // (code - zero) * scale for the code at bit kBit. Both factors are exact, as
  // (2^23 + 2^kBit code) - (2^23 + 2^kBit zero) and 2^-kBit scale. So is the subtrahend
  // times the scale where this is a bfloat16: (2^(20 - kBit) + 1) * 8 has 21 - kBit
  // significant bits, the scale has 8, and from kBit = 5 on float32 has room for both.
  template <int kBit>
  static __m512 Product(const Row& row, __m512i lane) {
    constexpr int kMask = ((1 << L::kCodeBits) - 1) << kBit;
    constexpr int kBase = 0x4b000000;  // 2^23
    constexpr int kAndOr = 0xea;
    const __m512 number = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        lane, _mm512_set1_epi32(kMask), _mm512_set1_epi32(kBase), kAndOr));
    __m512 zero;
    if constexpr (L::kZeros) {
      zero =
          _mm512_fmadd_ps(row.zero, _mm512_set1_ps(1 << kBit), _mm512_set1_ps(0x1p23f));
    } else {
      zero = _mm512_set1_ps(0x1p23f + (ImpliedZero(L::kCode) << kBit));
    }
    const __m512 scale = _mm512_mul_ps(row.scale, _mm512_set1_ps(1.0f / (1 << kBit)));
    if constexpr (L::kScale == ScaleType::kBf16 && kBit >= 5) {
      return _mm512_fmsub_ps(number, scale, _mm512_mul_ps(zero, scale));
    }
    return _mm512_mul_ps(_mm512_sub_ps(number, zero), scale);
  }

  // Codes in the low four bits of the words, anything above.
  static __m512i E2M1Pair(const Row& row, __m512i codes) {
    return _mm512_subs_epu16(_mm512_permutexvar_epi16(codes, Load(kE2M1Words)),
                             row.subtract);
  }

  // Bytes kByte and kByte + 1 of a lane as the low bytes of its words.
  template <int kByte>
  static __m512i SpreadBytes(__m512i lane) {
    constexpr int kZero = 0x8000,
                  kFirst = kZero | kByte | (kByte + 1) << 16 | kZero << 16;
    return _mm512_shuffle_epi8(
        lane, _mm512_broadcast_i32x4(_mm_setr_epi32(
                  kFirst, kFirst + 0x040004, kFirst + 0x080008, kFirst + 0x0c000c)));
  }

  // Codes in the upper bytes of the words, anything below; the first eight outputs, and
  // the others.
  static __m512i E4M3Pair(const Row& row, __m256i low, __m256i high) {
    const __m512i twice =
        _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 low_scale = _mm512_permutexvar_ps(twice, row.scale);
    const __m512 high_scale =
        _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), row.scale);
    return JoinHalves(_mm512_mul_ps(E4M3Floats(low), low_scale),
                      _mm512_mul_ps(E4M3Floats(high), high_scale));
  }

  // Their values times 2^-8.
  static __m512 E4M3Floats(__m256i codes) {
    const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(codes, 1), mask));
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_AVX512_H_
