// Decoding of formats in blocks with AVX-512 F, BW, DQ, VL. The ideas are those of
// decode_avx512.h: a code or-ed below the exponent of 2^23 is a number, times a power
// of two that depends on its place.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_BLOCKS_AVX512_H_
#define KTJAX_FFI_GEMM_DECODE_BLOCKS_AVX512_H_

#include <immintrin.h>

#include "format/blocks.h"
#include "gemm/decode_avx512.h"
#include "gemm/decode_loop.h"

namespace ktjax {
namespace {

template <Format kFormat>
struct Avx512BlockDecoder {
  [[gnu::always_inline]] static void DecodeStrip(const QuantPanel& panel, int block,
                                                 int strip, bf16* dst) {
    const ptrdiff_t stride = 2 * kStrip * panel.strips * panel.apart;
    Pairs(panel, block, strip, [=](int pair, __m512i values) {
      _mm512_storeu_si512(dst + pair * stride, values);
    });
  }

  // Calls put(pair, values) for the 16 depth pairs of a strip of a block.
  template <typename Put>
  [[gnu::always_inline]] static void Pairs(const QuantPanel& panel, int block,
                                           int strip, Put put) {
    const int64_t lanes = kStrip * panel.strips;
    Sub subs[kSubs];
    LoadSubs(panel, block, lanes, kStrip * strip, subs);
    const uint8_t* codes = panel.codes + (block * kBits * lanes + kStrip * strip) * 4;
    __m512i words[kBits];
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i)
      words[i] = _mm512_loadu_si512(codes + i * lanes * 4);
    DecodeQuads<0>(words, subs[0], put);
    DecodeQuads<4>(words, subs[kSubs - 1], put);
  }

 private:
  static constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  static constexpr int kBits = kSpec.bits;
  static constexpr int kSubs = kSpec.sub == 16 ? 2 : 1;
  // Bits of a code in its first word, and codes there in a byte.
  static constexpr int kLow = kBits == 8 ? 8 : kBits < 4 ? 2 : 4;
  static constexpr int kPerWord = 8 / kLow;

  struct Sub {
    __m512 scale;
    __m512 min;  // where the format has minima
  };

  [[gnu::always_inline]] static __m512 Halves(const void* src, int64_t at) {
    // Whatever the thread flushes, denormal halves are read as they are.
    return _mm512_cvtph_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(src) + at)));
  }
  [[gnu::always_inline]] static __m512i Bytes(const uint8_t* src) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }

  [[gnu::always_inline]] static void LoadSubs(const QuantPanel& panel, int block,
                                              int64_t lanes, int first, Sub* subs) {
    const int64_t at = block / (kSpec.depths / kDepth) * lanes + first;
    const __m512 scale = Halves(panel.scales, at);
    const __m512 min = kSpec.mins ? Halves(panel.mins, at) : _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < kSubs; ++i) {
      subs[i] = {scale, min};
      if constexpr (kSpec.sub > 0) {
        const int64_t sub_at = (block * kSubs + i) * lanes + first;
        __m512i code = Bytes(panel.sub_scales + sub_at);
        if constexpr (kSpec.sub_mins == SubMins::kPacked) {
          subs[i].min =
              _mm512_mul_ps(min, _mm512_cvtepi32_ps(_mm512_srli_epi32(code, 4)));
          code = _mm512_and_si512(code, _mm512_set1_epi32(15));
        }
        if constexpr (kSpec.sub_mins == SubMins::kBytes) {
          subs[i].min =
              _mm512_mul_ps(min, _mm512_cvtepi32_ps(Bytes(panel.sub_mins + sub_at)));
        }
        code = _mm512_sub_epi32(code, _mm512_set1_epi32(kSpec.sub_zero));
        subs[i].scale = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(code));
      }
    }
  }

  // Four quads from number kFirst on.
  template <int kFirst, typename Put>
  [[gnu::always_inline]] static void DecodeQuads(const __m512i* words, const Sub& sub,
                                                 Put& put) {
    DecodeQuad<kFirst>(words, sub, put);
    DecodeQuad<kFirst + 1>(words, sub, put);
    DecodeQuad<kFirst + 2>(words, sub, put);
    DecodeQuad<kFirst + 3>(words, sub, put);
  }

  template <int kQuad, typename Put>
  [[gnu::always_inline]] static void DecodeQuad(const __m512i* words, const Sub& sub,
                                                Put& put) {
    const __m512i low = words[kQuad / kPerWord];
    constexpr int kShift = kLow * (kQuad % kPerWord);
    if constexpr (kBits == kLow) {
      PutQuad<kQuad, kShift>(low, sub, put);
    } else {
      // The highest bits, moved on top of the others; what is above is masked later.
      constexpr int kHigh = kBits - kLow;
      const __m512i high = words[kLow + kHigh * kQuad / 8];
      constexpr int kAt = kHigh == 1 ? kQuad : kHigh * (kQuad % 4);
      constexpr int kSelect = 0xca;
      const __m512i mask = _mm512_set1_epi32(0x01010101 * ((1 << kLow) - 1));
      const __m512i codes = _mm512_ternarylogic_epi32(
          mask, _mm512_srli_epi32(low, kShift),
          kAt < kLow ? _mm512_slli_epi32(high, kAt < kLow ? kLow - kAt : 0)
                     : _mm512_srli_epi32(high, kAt < kLow ? 0 : kAt - kLow),
          kSelect);
      PutQuad<kQuad, 0>(codes, sub, put);
    }
  }

  // A quad whose codes begin at bit kBit of the bytes.
  template <int kQuad, int kBit, typename Put>
  [[gnu::always_inline]] static void PutQuad(__m512i quad, const Sub& sub, Put& put) {
    const __m512i upper = _mm512_srli_epi32(quad, 16);
    put(2 * kQuad, PairLanes(Value<kBit>(quad, sub), Value<kBit + 8>(quad, sub)));
    put(2 * kQuad + 1, PairLanes(Value<kBit>(upper, sub), Value<kBit + 8>(upper, sub)));
  }

  // What the code at bit kBit of the lanes stands for.
  template <int kBit>
  [[gnu::always_inline]] static __m512 Value(__m512i lane, const Sub& sub) {
    if constexpr (kSpec.table) {
      const __m512i index = kBit ? _mm512_srli_epi32(lane, kBit) : lane;
      // VPERMPS looks at the low four bits.
      return Scaled(_mm512_permutexvar_ps(index, _mm512_loadu_ps(kIq4Values)),
                    sub.scale, sub.min);
    } else if constexpr (kBits == 4 && kBit == 0) {
      // Nothing to shift: a quarter of the work for a pipe that has little else to do.
      const __m512 codes =
          _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512 numbers = _mm512_sub_ps(codes, _mm512_set1_ps(kSpec.zero));
      return Scaled(_mm512_permutexvar_ps(lane, numbers), sub.scale, sub.min);
    } else {
      constexpr int kMask = ((1 << kBits) - 1) << kBit;
      constexpr int kBase = 0x4b000000;  // 2^23
      constexpr int kAndOr = 0xea;
      const __m512 number = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          lane, _mm512_set1_epi32(kMask), _mm512_set1_epi32(kBase), kAndOr));
      const __m512 zero = _mm512_set1_ps(0x1p23f + (kSpec.zero << kBit));
      const __m512 scale = _mm512_mul_ps(sub.scale, _mm512_set1_ps(1.0f / (1 << kBit)));
      return Scaled(_mm512_sub_ps(number, zero), scale, sub.min);
    }
  }

  // The product is exact, so it may be fused.
  [[gnu::always_inline]] static __m512 Scaled(__m512 number, __m512 scale, __m512 min) {
    return kSpec.mins ? _mm512_fmsub_ps(number, scale, min)
                      : _mm512_mul_ps(number, scale);
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_BLOCKS_AVX512_H_
