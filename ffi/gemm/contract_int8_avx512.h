// Products of few rows over the outputs of INT8 codes.
//
// Values are rounded to bfloat16 as 16 outputs of one depth and then of the next, two
// halves of a register: the order in which they come, and one in which neighbours are
// outputs, to be summed. So nothing is transposed. A register's sum has 8 parts of
// either depth; 16 of them, a block of 32 depths, are added up at a time.
// Values are those of `decode` to the bit.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_CONTRACT_INT8_AVX512_H_
#define KTJAX_FFI_GEMM_CONTRACT_INT8_AVX512_H_

#include "gemm/contract_avx512.h"
#include "gemm/decode_avx512.h"

namespace ktjax {
namespace {

using Int8Layout = Layout<Code::kInt8, ScaleType::kFloat32>;

constexpr int kBlockPairs = kDepth / 2;

// The sums of both halves of 16 registers, `stride` floats apart, in order.
[[gnu::always_inline]] inline void SumHalves(const float* parts, ptrdiff_t stride,
                                             __m512 (&sum)[2]) {
  // Lane 4 b + j of a sum over quads is depth 4 j + b.
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512 quads[4];  // four depths each, a 128-bit lane of four parts per depth
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 x = _mm512_load_ps(parts + (8 * half + 2 * j) * stride);
      const __m512 y = _mm512_load_ps(parts + (8 * half + 2 * j + 1) * stride);
      quads[j] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88),
                               _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    __m512 pairs[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      pairs[j] = _mm512_add_ps(_mm512_unpacklo_ps(quads[2 * j], quads[2 * j + 1]),
                               _mm512_unpackhi_ps(quads[2 * j], quads[2 * j + 1]));
    }
    const __m512d low = _mm512_castps_pd(pairs[0]), high = _mm512_castps_pd(pairs[1]);
    const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    sum[half] = _mm512_permutexvar_ps(order, lanes);
  }
}

template <int kRows, int kStrips>
void ContractInt8Rows(const StripRows& a, const QuantPanel& panel, int first_pair,
                      int pairs, float* c, ptrdiff_t c_stride, Prefetch* prefetch) {
  using Decoder = Avx512Decoder<Int8Layout>;
  constexpr int kLines = Int8Layout::kLines, kLinePairs = kBlockPairs / kLines;
  alignas(64) bf16 twice[kStrips][kRows][2 * kStrip];
  for (int s = 0; s < kStrips; ++s) {
    for (int r = 0; r < kRows; ++r) {
      const bf16* src = a.strip[s] + r * a.stride;
      __builtin_memcpy(twice[s][r], src, sizeof(bf16) * kStrip);
      __builtin_memcpy(twice[s][r] + kStrip, src, sizeof(bf16) * kStrip);
    }
  }
  alignas(64) float parts[kBlockPairs][kRows][kStrip];
  const int first = first_pair / kBlockPairs, last = first + pairs / kBlockPairs;
  const int group_blocks = panel.group / kDepth;
  const uint8_t* codes = panel.codes + first * kLines * int64_t{64} * kStrips;
  typename Decoder::Row row[kStrips];
  bool ordinary = false;
  int row_end = first;
  for (int block = first; block < last;) {
    PrefetchRun run = NextRun(prefetch, last - block, kBlockPairs);
    for (const int end = block + run.steps; block < end; ++block) {
      if (block >= row_end) {
        const int64_t group = block / group_blocks;
        ordinary = true;
        for (int s = 0; s < kStrips; ++s) {
          ordinary &= Decoder::LoadRow(panel, (group * kStrips + s) * kStrip, row[s]);
        }
        row_end = static_cast<int>(group + 1) * group_blocks;
      }
      run.Fetch<false>(run.lines_per_step);
      float* out = c + kDepth * (block - first);
      if (!ordinary) [[unlikely]] {
        alignas(64) bf16 values[kDepth * kStrip * kStrips];
        for (int s = 0; s < kStrips; ++s) {
          DecodeRareStrip<Int8Layout>(panel, block * kDepth, s, values);
        }
        ContractRows<kRows>(a, values, kStrips, kBlockPairs, out, c_stride, nullptr);
        codes += kLines * 64 * kStrips;
        continue;
      }
      for (int line = 0; line < kLines; ++line, codes += 64 * kStrips) {
        __m512 sum[kLinePairs][kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[0][r] = sum[1][r] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
          __m512i values[kLinePairs];
          Decoder::Halves(row[s], _mm512_loadu_si512(codes + 64 * s), values);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512bh x = (__m512bh)_mm512_load_si512(twice[s][r]);
            sum[0][r] = _mm512_dpbf16_ps(sum[0][r], x, (__m512bh)values[0]);
            sum[1][r] = _mm512_dpbf16_ps(sum[1][r], x, (__m512bh)values[1]);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          _mm512_store_ps(parts[kLinePairs * line][r], sum[0][r]);
          _mm512_store_ps(parts[kLinePairs * line + 1][r], sum[1][r]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        __m512 sum[2];
        SumHalves(parts[0][r], kRows * kStrip, sum);
        float* dst = out + r * c_stride;
        _mm512_storeu_ps(dst, _mm512_add_ps(_mm512_loadu_ps(dst), sum[0]));
        _mm512_storeu_ps(dst + kStrip,
                         _mm512_add_ps(_mm512_loadu_ps(dst + kStrip), sum[1]));
      }
    }
  }
}

template <int kStrips>
void ContractInt8Strips(const StripRows& a, int rows, const QuantPanel& panel,
                        int first_pair, int pairs, float* c, ptrdiff_t c_stride,
                        Prefetch* prefetch) {
  using Contract = void (*)(const StripRows&, const QuantPanel&, int, int, float*,
                            ptrdiff_t, Prefetch*);
  static constexpr Contract kContract[] = {
      ContractInt8Rows<1, kStrips>, ContractInt8Rows<2, kStrips>,
      ContractInt8Rows<3, kStrips>, ContractInt8Rows<4, kStrips>,
      ContractInt8Rows<5, kStrips>, ContractInt8Rows<6, kStrips>,
      ContractInt8Rows<7, kStrips>, ContractInt8Rows<8, kStrips>};
  static_assert(sizeof kContract / sizeof kContract[0] == kMaxContractRows);
  kContract[rows - 1](a, panel, first_pair, pairs, c, c_stride, prefetch);
}

inline void ContractInt8(const StripRows& a, int rows, const QuantPanel& panel,
                         int first_pair, int pairs, float* c, ptrdiff_t c_stride,
                         Prefetch* prefetch) {
  switch (panel.strips) {
    case 1:
      return ContractInt8Strips<1>(a, rows, panel, first_pair, pairs, c, c_stride,
                                   prefetch);
    case 2:
      return ContractInt8Strips<2>(a, rows, panel, first_pair, pairs, c, c_stride,
                                   prefetch);
    case 3:
      return ContractInt8Strips<3>(a, rows, panel, first_pair, pairs, c, c_stride,
                                   prefetch);
    default:
      return ContractInt8Strips<4>(a, rows, panel, first_pair, pairs, c, c_stride,
                                   prefetch);
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_CONTRACT_INT8_AVX512_H_
