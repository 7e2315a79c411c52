// LoRA of few rows with AVX-512 BF16: matrices of adapters are read once, in the order
// in which they lie in memory, rounded to bfloat16 in registers and multiplied at once.
// Panels would be written and read again for the sake of a row or two.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_ADAPTERS_AVX512_H_
#define KTJAX_FFI_GEMM_ADAPTERS_AVX512_H_

#include <immintrin.h>

#include "gemm/decode_avx512.h"
#include "gemm/kernel.h"
#include "gemm/pack_avx512.h"
#include "gemm/round_avx512.h"

namespace ktjax {
namespace {

// What is fetched ahead of a stream: at 30 GB/s it hides 70 ns.
constexpr int kAheadBytes = 2048;

[[gnu::always_inline]] inline __m512 AddProducts(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// The words of two rows' 16 values in turns: pairs of an operand of VDPBF16PS.
class Interleave {
 public:
  [[gnu::always_inline]] __m512i operator()(__m512i two) const {
    return _mm512_permutexvar_epi16(index_, two);
  }

 private:
  const __m512i index_ = Load(kInterleaved);
};

// Calls run.operator()<rows>() for 1 to kMaxContractRows rows.
template <typename Run>
[[gnu::always_inline]] inline void WithRows(int rows, Run run) {
  static_assert(kMaxContractRows == 8);
  switch (rows) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
    case 7:
      return run.template operator()<7>();
    default:
      return run.template operator()<8>();
  }
}

template <int kRows, typename T>
void DotMatrix(const bf16* a, ptrdiff_t a_stride, Rows<T> m, int outputs, int depth,
               float* c) {
  for (int n = 0; n < outputs; n += kStrip) {
    const int left = outputs - n;
    __m512 sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_setzero_ps();
    const T* rows[kStrip];
    for (int i = 0; i < kStrip; ++i) {
      // Instead of those behind the last one, whose sums nobody reads: any.
      rows[i] = m.base + (i < left ? n + i : n) * m.stride;
    }
    for (int d = 0; d < depth; d += kDepth) {
      __m512i values[kStrip];
#pragma GCC unroll 16
      for (int i = 0; i < kStrip; ++i) {
        const T* row = rows[i] + d;
        // So many streams are not foreseen. Behind the end the next ones begin.
        const char* line = reinterpret_cast<const char*>(row) + kAheadBytes / 2;
#pragma GCC unroll 2
        for (size_t byte = 0; byte < kDepth * sizeof(T); byte += 64) {
          _mm_prefetch(line + byte, _MM_HINT_T1);
        }
        values[i] = LoadRow32<Part::kHigh>(row, depth - d);
      }
      Transpose16x16(values);
#pragma GCC unroll 16
      for (int pair = 0; pair < kDepth / 2; ++pair) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r] = AddProducts(sum[r], SpreadPair(a + r * a_stride + d + 2 * pair),
                               values[pair]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_mask_storeu_ps(c + r * kPanel + n, Lanes16(left), sum[r]);
    }
  }
}

template <int kRows, int kStrips, typename T>
void ContractColumns(SplitRows a, Rows<T> m, int depth, int outputs, float* c,
                     bool accumulate) {
  const Interleave interleave;
  __mmask16 lanes[kStrips];
  __m512 sum[kRows][kStrips];
#pragma GCC unroll 4
  for (int s = 0; s < kStrips; ++s) {
    lanes[s] = Lanes16(outputs - s * kStrip);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r][s] = accumulate ? _mm512_loadu_ps(c + r * kPanel + s * kStrip)
                             : _mm512_setzero_ps();
    }
  }
  // Rows of B are short, those of A far apart.
  constexpr int kLeastAhead = 8;
  const int row_bytes = static_cast<int>(m.stride * sizeof(T));
  const int ahead =
      row_bytes * kLeastAhead < kAheadBytes ? kAheadBytes / row_bytes : kLeastAhead;
  for (int d = 0; d < depth; d += 2) {
    const T* even = m.base + d * m.stride;
    const T* odd = d + 1 < depth ? even + m.stride : even;
    const __mmask16 kept = d + 1 < depth ? 0xffff : 0;
    if (d + ahead + 1 < depth) {
      for (int i = 0; i < 2; ++i) {
        const char* line =
            reinterpret_cast<const char*>(m.base + (d + ahead + i) * m.stride);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
          _mm_prefetch(line + s * kStrip * sizeof(T), _MM_HINT_T0);
        }
      }
    }
    __m512i values[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      const int n = s * kStrip;
      values[s] = interleave(
          LoadTwo<Part::kHigh>(even + n, lanes[s], odd + n, lanes[s] & kept));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const bf16* at = a.high + r * a.stride + d;
      const __m512i high = SpreadPair(at);
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        sum[r][s] = AddProducts(sum[r][s], high, values[s]);
      }
      if (!a.low) continue;
      const __m512i low = SpreadPair(at + a.low);
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        sum[r][s] = AddProducts(sum[r][s], low, values[s]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      _mm512_storeu_ps(c + r * kPanel + s * kStrip, sum[r][s]);
    }
  }
}

// sum[r] += the 16 values from `a` on times those pairs.
template <int kRows>
[[gnu::always_inline]] inline void AddEightPairs(const bf16* a, ptrdiff_t a_stride,
                                                 const __m512i (&values)[8],
                                                 __m512 (&sum)[kRows]) {
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r] =
          AddProducts(sum[r], SpreadPair(a + r * a_stride + 2 * pair), values[pair]);
    }
  }
}

template <int kRows, typename T>
void AddDotRows(SplitRows a, Rows<T> m, int outputs, int depth, float* c,
                int strip_step) {
  // All high parts come first, as they do in gemm's terms.
  const bool at_once = a.low && depth <= kStrip;
  const int passes = a.low && !at_once ? 2 : 1;
  for (int n = 0; n < outputs; n += kStrip, c += strip_step * kStrip) {
    __m512 sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_loadu_ps(c + r * kPanel);
    for (int pass = 0; pass < passes; ++pass) {
      for (int d = 0; d < depth; d += kStrip) {
        __m512i values[8];
        LoadSixteenRows<Part::kHigh>(m, n, outputs, d, depth, values);
        TransposePairs(values);
        const bf16* at = a.high + d;
        AddEightPairs<kRows>(at + pass * a.low, a.stride, values, sum);
        if (at_once) AddEightPairs<kRows>(at + a.low, a.stride, values, sum);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(c + r * kPanel, sum[r]);
  }
}

// Gradients: what a block of columns takes is 8 KiB at most and stays in L1.
constexpr int kGradColumns = 512;

// Past the caches where a store is a whole line of one.
[[gnu::always_inline]] inline void StreamLanes(__m512 value, __mmask16 lanes,
                                               float* dst) {
  if (lanes == 0xffff && reinterpret_cast<uintptr_t>(dst) % 64 == 0) {
    _mm512_stream_ps(dst, value);
  } else {
    _mm512_mask_storeu_ps(dst, lanes, value);
  }
}
[[gnu::always_inline]] inline void StreamLanes(__m512 value, __mmask16 lanes,
                                               bf16* dst) {
  _mm256_mask_storeu_epi16(dst, lanes, (__m256i)_mm512_cvtneps_pbh(value));
}

// pairs[p][2 n + i] = source.row(2 p + i)[n], zero behind the last row.
template <int kPairs>
[[gnu::always_inline]] inline void InterleaveRows(
    Rows<bf16> source, int rows, int first, int columns,
    bf16 (&pairs)[kPairs][2 * kGradColumns]) {
  const Interleave interleave;
  for (int p = 0; p < kPairs; ++p) {
    const int left = rows - 2 * p;
    const bf16* even = left > 0 ? source.row(2 * p) + first : source.base;
    const bf16* odd = left > 1 ? source.row(2 * p + 1) + first : even;
    const __mmask16 evens = left > 0 ? 0xffff : 0, odds = left > 1 ? 0xffff : 0;
    for (int n = 0; n < columns; n += kStrip) {
      const __mmask16 lanes = Lanes16(columns - n);
      _mm512_store_si512(pairs[p] + 2 * n,
                         interleave(LoadTwo<Part::kHigh>(even + n, lanes & evens,
                                                         odd + n, lanes & odds)));
    }
  }
}

// Calls run.operator()<pairs of rows>() for 0 to kMaxContractRows rows.
template <typename Run>
[[gnu::always_inline]] inline void WithRowPairs(int rows, Run run) {
  static_assert(kMaxContractRows == 8);
  if (rows <= 2) return run.template operator()<1>();
  if (rows <= 4) return run.template operator()<2>();
  if (rows <= 6) return run.template operator()<3>();
  run.template operator()<4>();
}

template <int kPairs, typename T>
void OuterRows(SplitRows low_rank, int rank, Rows<bf16> source, int rows, int columns,
               T* dst, ptrdiff_t dst_stride) {
  alignas(64) bf16 pairs[kPairs][2 * kGradColumns];
  for (int first = 0; first < columns; first += kGradColumns) {
    const int count = columns - first < kGradColumns ? columns - first : kGradColumns;
    InterleaveRows<kPairs>(source, rows, first, count, pairs);
    for (int i = 0; i < rank; ++i) {
      __m512i high[kPairs], low[kPairs];
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        const bf16* at = low_rank.high + i * low_rank.stride + 2 * p;
        high[p] = SpreadPair(at);
        low[p] = SpreadPair(at + low_rank.low);
      }
      T* out = dst + i * dst_stride + first;
      for (int n = 0; n < count; n += kStrip) {
        __m512 sum = _mm512_setzero_ps();
        __m512i values[kPairs];
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
          values[p] = _mm512_load_si512(pairs[p] + 2 * n);
          sum = AddProducts(sum, high[p], values[p]);
        }
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) sum = AddProducts(sum, low[p], values[p]);
        StreamLanes(sum, Lanes16(count - n), out + n);
      }
    }
  }
}

template <int kPairs, typename T>
void OuterColumns(SplitRows low_rank, int rank, Rows<bf16> source, int rows,
                  int columns, T* dst, ptrdiff_t dst_stride) {
  alignas(64) bf16 pairs[kPairs][2 * kGradColumns];
  for (int i = 0; i < rank; i += kStrip) {
    const int ranks = rank - i < kStrip ? rank - i : kStrip;
    __m512i high[kPairs], low[kPairs];
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      alignas(64) bf16 lanes[2][2 * kStrip] = {};
      for (int lane = 0; lane < ranks; ++lane) {
        const bf16* at = low_rank.high + (i + lane) * low_rank.stride + 2 * p;
        __builtin_memcpy(lanes[0] + 2 * lane, at, 2 * sizeof(bf16));
        __builtin_memcpy(lanes[1] + 2 * lane, at + low_rank.low, 2 * sizeof(bf16));
      }
      high[p] = _mm512_load_si512(lanes[0]);
      low[p] = _mm512_load_si512(lanes[1]);
    }
    const __mmask16 mask = Lanes16(ranks);
    for (int first = 0; first < columns; first += kGradColumns) {
      const int count = columns - first < kGradColumns ? columns - first : kGradColumns;
      InterleaveRows<kPairs>(source, rows, first, count, pairs);
      T* out = dst + first * dst_stride + i;
      for (int n = 0; n < count; ++n) {
        __m512 sum = _mm512_setzero_ps();
        __m512i values[kPairs];
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
          values[p] = SpreadPair(pairs[p] + 2 * n);
          sum = AddProducts(sum, high[p], values[p]);
        }
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) sum = AddProducts(sum, low[p], values[p]);
        StreamLanes(sum, mask, out + n * dst_stride);
      }
    }
  }
}

// Entries of struct AdapterKernels.

template <typename T>
void Avx512Dot(const bf16* a, ptrdiff_t a_stride, int rows, Rows<T> m, int outputs,
               int depth, float* c) {
  WithRows(rows,
           [&]<int kRows>() { DotMatrix<kRows>(a, a_stride, m, outputs, depth, c); });
}

template <typename T>
void Avx512Contract(SplitRows a, int rows, Rows<T> m, int depth, int outputs, float* c,
                    bool accumulate) {
  WithRows(rows, [&]<int kRows>() {
    constexpr int kMost = kRows > 4 ? 2 : 4;  // strips that the registers hold
    for (int n = 0; n < outputs; n += kMost * kStrip) {
      const Rows<T> columns{m.base + n, m.stride};
      const int left = outputs - n;
      const auto run = [&]<int kStrips>() {
        ContractColumns<kRows, kStrips>(a, columns, depth, left, c + n, accumulate);
      };
      if (left <= kStrip) {
        run.template operator()<1>();
      } else if (kMost == 2 || left <= 2 * kStrip) {
        run.template operator()<2>();
      } else if (left <= 3 * kStrip) {
        run.template operator()<kMost - 1>();
      } else {
        run.template operator()<kMost>();
      }
    }
  });
}

template <typename T>
void Avx512AddDot(SplitRows a, int rows, Rows<T> m, int outputs, int depth, float* c,
                  int strip_step) {
  WithRows(rows, [&]<int kRows>() {
    AddDotRows<kRows>(a, m, outputs, depth, c, strip_step);
  });
}

template <typename T>
void Avx512OuterRows(SplitRows low_rank, int rank, Rows<bf16> source, int rows,
                     int columns, T* dst, ptrdiff_t dst_stride) {
  WithRowPairs(rows, [&]<int kPairs>() {
    OuterRows<kPairs>(low_rank, rank, source, rows, columns, dst, dst_stride);
  });
}

template <typename T>
void Avx512OuterColumns(SplitRows low_rank, int rank, Rows<bf16> source, int rows,
                        int columns, T* dst, ptrdiff_t dst_stride) {
  WithRowPairs(rows, [&]<int kPairs>() {
    OuterColumns<kPairs>(low_rank, rank, source, rows, columns, dst, dst_stride);
  });
}

template <typename T>
constexpr AdapterKernels<T> kAvx512Adapters = {
    .dot = Avx512Dot<T>,
    .add_dot = Avx512AddDot<T>,
    .contract = Avx512Contract<T>,
    .outer_rows = Avx512OuterRows<T>,
    .outer_columns = Avx512OuterColumns<T>,
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_ADAPTERS_AVX512_H_
