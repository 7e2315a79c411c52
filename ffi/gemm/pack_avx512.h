// Packing with AVX-512 registers: 16 x 16 blocks of 32-bit lanes.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_PACK_AVX512_H_
#define KTJAX_FFI_GEMM_PACK_AVX512_H_

#include <immintrin.h>

#include "base/types.h"
#include "gemm/kernel.h"
#include "gemm/round_avx512.h"

namespace ktjax {
namespace {

// Two neighbouring bfloat16 in all lanes.
[[gnu::always_inline]] inline __m512i SpreadPair(const bf16* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// The bfloat16 bits (round to nearest even, quiet NaN) of 16 float32, in 32-bit lanes.
inline __m512i RoundToBf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd =
      _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16),
                              _mm512_set1_epi32(0x40));
}

// The bits of one part of 16 float32.
template <Part kPart>
inline __m512i PartBits(__m512 value) {
  const __m512i high = RoundToBf16(value);
  if constexpr (kPart == Part::kHigh) return high;
  const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(
      _mm512_and_si512(high, _mm512_set1_epi32(0x7fff)), _mm512_set1_epi32(0x7f80));
  return RoundToBf16(_mm512_maskz_sub_ps(finite, value, rounded));
}

inline __mmask16 Lanes16(int count) {
  return count >= 16 ? 0xffff
                     : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}
inline __mmask32 Lanes32(int count) {
  return count >= 32 ? 0xffffffffu : (1u << (count < 0 ? 0 : count)) - 1;
}

// One part of the 16 values of `first`, then of those of `second`.
template <Part kPart>
[[gnu::always_inline]] inline __m512i RoundTwo(__m512 first, __m512 second) {
#ifdef __AVX512BF16__
  // Five times faster; it takes denormals for zero, as the products do.
  if constexpr (kPart == Part::kHigh) return RoundTwo(first, second);
#endif
  const __m512i low = PartBits<kPart>(first);
  const __m512i high = PartBits<kPart>(second);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)),
                            _mm512_cvtepi32_epi16(high), 1);
}

// 32 consecutive values of a row as bfloat16, the first `count` of them, else zero.
template <Part kPart>
inline __m512i LoadRow32(const bf16* src, int count) {
  return _mm512_maskz_loadu_epi16(Lanes32(count), src);
}
template <Part kPart>
inline __m512i LoadRow32(const float* src, int count) {
  const __m512 first =
      count >= 16 ? _mm512_loadu_ps(src) : _mm512_maskz_loadu_ps(Lanes16(count), src);
  // Without a mask of zeros: a load of nothing waits for the line from memory too.
  const __m512 second = count >= 32 ? _mm512_loadu_ps(src + 16)
                        : count > 16
                            ? _mm512_maskz_loadu_ps(Lanes16(count - 16), src + 16)
                            : _mm512_setzero_ps();
  return RoundTwo<kPart>(first, second);
}

// The masked 16 values of `first` as bfloat16, then those of `second`.
template <Part kPart>
[[gnu::always_inline]] inline __m512i LoadTwo(const float* first, __mmask16 first_lanes,
                                              const float* second,
                                              __mmask16 second_lanes) {
  return RoundTwo<kPart>(_mm512_maskz_loadu_ps(first_lanes, first),
                         _mm512_maskz_loadu_ps(second_lanes, second));
}
template <Part kPart>
[[gnu::always_inline]] inline __m512i LoadTwo(const bf16* first, __mmask16 first_lanes,
                                              const bf16* second,
                                              __mmask16 second_lanes) {
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first_lanes, first)),
      _mm256_maskz_loadu_epi16(second_lanes, second), 1);
}

// r[i] lane j  <->  r[j] lane i, for 32-bit lanes.
inline void Transpose16x16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + c] now holds column 4 l + c of rows 4 i .. 4 i + 3 in its 128-bit lane l.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// 16 values of 16 rows, two rows a register: v[i] holds row i % 4 + 8 (i / 4) and the
// row four further, each as 8 pairs. Afterwards v[p] lane n is pair p of row n.
[[gnu::always_inline]] inline void TransposePairs(__m512i (&v)[8]) {
  __m512i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    // Pairs c and 4 + c of four rows, then of the four after them.
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i first = v[c], second = v[4 + c];
    v[c] = _mm512_shuffle_i32x4(first, second, 0x88);
    v[4 + c] = _mm512_shuffle_i32x4(first, second, 0xdd);
  }
}

// 16 values of rows n .. n + 15 of m, from column d on, as TransposePairs takes them:
// zero for rows from `outputs` and columns from `depth` on.
template <Part kPart, typename T>
[[gnu::always_inline]] inline void LoadSixteenRows(const Rows<T>& m, int n, int outputs,
                                                   int d, int depth, __m512i (&v)[8]) {
  const __mmask16 lanes = Lanes16(depth - d);
  if (n + kStrip <= outputs) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int first = n + i % 4 + i / 4 * 8;
      v[i] = LoadTwo<kPart>(m.row(first) + d, lanes, m.row(first + 4) + d, lanes);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int first = n + i % 4 + i / 4 * 8, second = first + 4;
    const bool has_first = first < outputs, has_second = second < outputs;
    v[i] = LoadTwo<kPart>(
        has_first ? m.row(first) + d : m.base, has_first ? lanes : __mmask16{0},
        has_second ? m.row(second) + d : m.base, has_second ? lanes : __mmask16{0});
  }
}

template <typename T, Part kPart = Part::kHigh>
void Avx512PackOutputs(Rows<T> src, int outputs, int depth, int strips, bf16* dst,
                       ptrdiff_t dst_stride) {
  // Sixteen rows are too many streams to be foreseen.
  constexpr int kAhead = 1024 / sizeof(T);
  const int padded = static_cast<int>(RoundUp(depth, kDepth));
  for (int first = 0; first < strips * kStrip; first += kStrip) {
    bf16* out = dst + 2 * first;
    for (int d = 0; d < padded; d += kStrip) {
      if (d + kAhead < depth && d % (64 / sizeof(T)) == 0) {
        for (int i = first; i < outputs && i < first + kStrip; ++i) {
          _mm_prefetch(reinterpret_cast<const char*>(src.row(i) + d + kAhead),
                       _MM_HINT_T1);
        }
      }
      __m512i pairs[8];
      LoadSixteenRows<kPart>(src, first, outputs, d, depth, pairs);
      TransposePairs(pairs);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, out += dst_stride) _mm512_storeu_si512(out, pairs[i]);
    }
  }
}

template <typename T, Part kPart = Part::kHigh>
void Avx512PackDepths(Rows<T> src, int depth, int outputs, int strips, bf16* dst,
                      ptrdiff_t dst_stride) {
  // Two strips at a time: the 32 values of an even and an odd row, word by word.
  alignas(64) static constexpr auto kInterleave = [] {
    struct {
      uint16_t word[2][32];
    } index{};
    for (int half = 0; half < 2; ++half) {
      for (int w = 0; w < 32; ++w) {
        index.word[half][w] = static_cast<uint16_t>(16 * half + w / 2 + 32 * (w % 2));
      }
    }
    return index;
  }();
  // Rows chosen by an index are not foreseeable. And whoever packs a panel of columns
  // packs the next ones of the same rows soon.
  constexpr int kAhead = 8;
  const __m512i low = _mm512_loadu_si512(kInterleave.word[0]);
  const __m512i high = _mm512_loadu_si512(kInterleave.word[1]);
  const __m512i zero = _mm512_setzero_si512();
  const int padded = static_cast<int>(RoundUp(depth, kDepth));
  const int width = strips * kStrip;
  for (int d = 0; d < padded; d += 2) {
    for (int ahead = d + kAhead; ahead < d + kAhead + 2 && ahead < depth; ++ahead) {
      const char* line = reinterpret_cast<const char*>(src.row(ahead));
      const int bytes = outputs * static_cast<int>(sizeof(T));
      for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch(line + i, _MM_HINT_T0);
        _mm_prefetch(line + bytes + i, _MM_HINT_T1);
      }
    }
    const T* even = d < depth ? src.row(d) : nullptr;
    const T* odd = d + 1 < depth ? src.row(d + 1) : nullptr;
    bf16* out = dst + d / 2 * dst_stride;
    for (int n = 0; n < width; n += 2 * kStrip) {
      const int count = outputs - n;
      const __m512i a = even && count > 0 ? LoadRow32<kPart>(even + n, count) : zero;
      const __m512i b = odd && count > 0 ? LoadRow32<kPart>(odd + n, count) : zero;
      _mm512_storeu_si512(out + 2 * n, _mm512_permutex2var_epi16(a, low, b));
      if (n + kStrip < width) {
        _mm512_storeu_si512(out + 2 * n + 2 * kStrip,
                            _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}

// Three exchanges of a register bit with a lane bit move three output bits out and
// three depth bits in: 48 shuffles for 512 values. With input register = depth pair p
// (bits p3..p0), 32-bit lane = output n (bits n3..n0) and half = depth parity:
//   unpack         p0 <-> n1     128-bit lane = n3 n2, in it  n0 p0
//   shuffle lanes  p1 <-> n2     128-bit lane = p1 n3
//   permute words  p2 <-> n3     and sorts the register to lane = p2 p1 p0 parity, half
//   n0
// Word w of a result: lane k = w / 2 (k3 = p2, k2 = p1, k1 = p0, k0 = parity), half
// n0 = w % 2. It comes from operand p2, 128-bit lane 2 p1 + n3, 32-bit lane 2 n0 + p0,
// half parity.
struct TransposeIndex {
  alignas(64) uint16_t word[2][32];  // by n3
};
constexpr TransposeIndex kTransposeIndex = [] {
  TransposeIndex index{};
  for (int n3 = 0; n3 < 2; ++n3) {
    for (int w = 0; w < 32; ++w) {
      const int k = w / 2, n0 = w % 2;
      const int p2 = k >> 3 & 1, p1 = k >> 2 & 1, p0 = k >> 1 & 1, parity = k & 1;
      index.word[n3][w] = static_cast<uint16_t>(32 * p2 + 8 * (2 * p1 + n3) +
                                                2 * (2 * n0 + p0) + parity);
    }
  }
  return index;
}();

// The half p3 of a block: 8 depth pairs of 16 outputs, from `in` on, become 8 output
// pairs (n3 n2 n1) of 16 depths. `low` and `high` are the two words of kTransposeIndex.
[[gnu::always_inline]] inline void TransposeHalf(const bf16* in, ptrdiff_t in_stride,
                                                 __m512i low, __m512i high,
                                                 __m512i (&out)[8]) {
  __m512i a[8], b[8];  // a: index (p2 p1 n1), b: index (p2 n2 n1)
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const __m512i even = _mm512_loadu_si512(in + 2 * p * in_stride);
    const __m512i odd = _mm512_loadu_si512(in + (2 * p + 1) * in_stride);
    a[2 * p] = _mm512_unpacklo_epi32(even, odd);
    a[2 * p + 1] = _mm512_unpackhi_epi32(even, odd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int p2 = i >> 1, n1 = i & 1;
    const __m512i x = a[4 * p2 + n1], y = a[4 * p2 + 2 + n1];
    b[4 * p2 + n1] = _mm512_shuffle_i32x4(x, y, 0x88);
    b[4 * p2 + 2 + n1] = _mm512_shuffle_i32x4(x, y, 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // i = n2 n1
    out[i] = _mm512_permutex2var_epi16(b[i], low, b[4 + i]);
    out[4 + i] = _mm512_permutex2var_epi16(b[i], high, b[4 + i]);
  }
}

inline void Avx512Transpose(const bf16* src, ptrdiff_t src_stride, int blocks,
                            bf16* dst, ptrdiff_t dst_stride) {
  const __m512i low = _mm512_loadu_si512(kTransposeIndex.word[0]);
  const __m512i high = _mm512_loadu_si512(kTransposeIndex.word[1]);
  for (int block = 0; block < blocks; ++block) {
#pragma GCC unroll 2
    for (int p3 = 0; p3 < 2; ++p3) {
      __m512i out[8];
      TransposeHalf(src + (block * 16 + p3 * 8) * src_stride, src_stride, low, high,
                    out);
#pragma GCC unroll 8
      for (int pair = 0; pair < 8; ++pair) {
        _mm512_storeu_si512(dst + 64 * block + 32 * p3 + pair * dst_stride, out[pair]);
      }
    }
  }
}

template <Part kPart>
void Avx512ToBf16(const float* src, bf16* dst, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    const __m512i bits = PartBits<kPart>(_mm512_maskz_loadu_ps(Lanes16(left), src + i));
    _mm256_mask_storeu_epi16(dst + i, Lanes16(left), _mm512_cvtepi32_epi16(bits));
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_PACK_AVX512_H_
