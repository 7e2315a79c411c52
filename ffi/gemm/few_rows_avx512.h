// Products of few rows with a panel of codes, in any format: what is decoded is
// multiplied in registers and never stored.
//
// A strip's 16 outputs have sums of even and of odd depth pairs for every row. A
// product of bfloat16 waits for the one before it, so where decoding is quick the fewer
// the rows, the more strips at a time: their sums are others, and no result changes.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_FEW_ROWS_AVX512_H_
#define KTJAX_FFI_GEMM_FEW_ROWS_AVX512_H_

#include "gemm/contract_int8_avx512.h"
#include "gemm/decode_avx512.h"
#include "gemm/decode_blocks_avx512.h"
#include "gemm/nibbles_avx512.h"
#include "gemm/pack_avx512.h"

namespace ktjax {
namespace {

// Rows of x times the pairs of a block, as they come.
template <int kRows>
struct PairDot {
  const bf16* a;
  ptrdiff_t a_stride;
  __m512 (&sum)[kRows][2];

  [[gnu::always_inline]] void operator()(int pair, __m512i values) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = SpreadPair(a + r * a_stride + 2 * pair);
      sum[r][pair % 2] =
          _mm512_dpbf16_ps(sum[r][pair % 2], (__m512bh)value, (__m512bh)values);
    }
  }
};

// Calls add(block) for all blocks of 32 depths, fetching meanwhile: `some` strips have
// their part, of all `strips`, of what a pair stands for in a schedule.
template <typename Add>
[[gnu::always_inline]] inline void ForBlocks(int depth, int some, int strips,
                                             Prefetch* prefetch, Add add) {
  const int last = depth / kDepth;
  for (int block = 0; block < last;) {
    PrefetchRun run = NextRun(prefetch, last - block, kDepth / 2 * some / strips);
    for (const int end = block + run.steps; block < end; ++block) {
      run.Fetch<false>(run.lines_per_step);
      add(block);
    }
  }
}

// Of a strip, for every row.
template <int kRows>
using PairSums = __m512[kRows][2];

// Calls add_strips(first strip, sums) for kStrips strips at a time, then for the rest.
template <int kRows, int kStrips, typename AddStrips>
[[gnu::always_inline]] inline void DotStrips(const QuantPanel& panel, float* c,
                                             AddStrips add_strips, int strip = 0) {
  for (; strip + kStrips <= panel.strips; strip += kStrips) {
    PairSums<kRows> sum[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[s][r][0] = sum[s][r][1] = _mm512_setzero_ps();
    }
    add_strips(strip, sum);
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * kPanel + kStrip * (strip + s) * panel.apart,
                         _mm512_add_ps(sum[s][r][0], sum[s][r][1]));
      }
    }
  }
  if constexpr (kStrips > 1) {
    DotStrips<kRows, kStrips / 2>(panel, c, add_strips, strip);
  }
}

// One strip of a block whose scales are out of the ordinary.
template <typename L, int kRows>
[[gnu::noinline]] void AddRareStrip(const QuantPanel& panel, int block, int strip,
                                    const bf16* a, ptrdiff_t a_stride,
                                    __m512 (&sum)[kRows][2]) {
  alignas(64) bf16 values[kDepth * kPanel];
  DecodeRareStrip<L>(panel, block * kDepth, strip, values);
  const PairDot<kRows> dot{a, a_stride, sum};
  const ptrdiff_t stride = 2 * kStrip * panel.strips;
  for (int pair = 0; pair < kDepth / 2; ++pair) {
    dot(pair, _mm512_loadu_si512(values + pair * stride + 2 * kStrip * strip));
  }
}

template <typename L>
struct DotPanel {
  template <int kRows>
  static void Run(const bf16* a, ptrdiff_t a_stride, const QuantPanel& panel, int depth,
                  float* c, Prefetch* prefetch) {
    using Decoder = Avx512Decoder<L>;
    // As many strips at a time as registers have room for. Decoding 8 bits, or blocks,
    // takes longer than the products of a strip wait for one another.
    constexpr int kMost = L::kCodeBits == 8 ? 1 : kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
    const ptrdiff_t code_stride = 64 * panel.strips;
    const int group_blocks = panel.group / kDepth;
    DotStrips<kRows, kMost>(
        panel, c, [&]<int kStrips>(int strip, PairSums<kRows>(&sum)[kStrips]) {
          const uint8_t* codes = panel.codes + 64 * strip;
          typename Decoder::Row row[kStrips];
          bool ordinary[kStrips] = {};
          int row_end = 0;
          ForBlocks(depth, kStrips, panel.strips, prefetch, [&](int block) {
            if (block == row_end) {
              const int64_t group = block / group_blocks;
#pragma GCC unroll 4
              for (int s = 0; s < kStrips; ++s) {
                ordinary[s] = Decoder::LoadRow(
                    panel, (group * panel.strips + strip + s) * kStrip, row[s]);
              }
              row_end += group_blocks;
            }
            const bf16* at = a + block * kDepth;
#pragma GCC unroll 4
            for (int s = 0; s < kStrips; ++s) {
              if (ordinary[s]) [[likely]] {
                Decoder::Pairs(row[s], codes + 64 * s, code_stride,
                               PairDot<kRows>{at, a_stride, sum[s]});
              } else {
                AddRareStrip<L, kRows>(panel, block, strip + s, at, a_stride, sum[s]);
              }
            }
            codes += L::kLines * code_stride;
          });
        });
  }
};

template <Format kFormat>
struct DotBlocks {
  template <int kRows>
  static void Run(const bf16* a, ptrdiff_t a_stride, const QuantPanel& panel, int depth,
                  float* c, Prefetch* prefetch) {
    DotStrips<kRows, 1>(
        panel, c, [&]<int kStrips>(int strip, PairSums<kRows>(&sum)[kStrips]) {
          ForBlocks(depth, kStrips, panel.strips, prefetch, [&](int block) {
#pragma GCC unroll 4
            for (int s = 0; s < kStrips; ++s) {
              Avx512BlockDecoder<kFormat>::Pairs(
                  panel, block, strip + s,
                  PairDot<kRows>{a + block * kDepth, a_stride, sum[s]});
            }
          });
        });
  }
};

template <typename Dot>
void DotAnyRows(const bf16* a, ptrdiff_t a_stride, int rows, const QuantPanel& panel,
                int depth, float* c, Prefetch* prefetch) {
  using Run =
      void (*)(const bf16*, ptrdiff_t, const QuantPanel&, int, float*, Prefetch*);
  static constexpr Run kRun[] = {Dot::template Run<1>, Dot::template Run<2>,
                                 Dot::template Run<3>, Dot::template Run<4>,
                                 Dot::template Run<5>, Dot::template Run<6>,
                                 Dot::template Run<7>, Dot::template Run<8>};
  static_assert(sizeof kRun / sizeof kRun[0] == kMaxContractRows);
  kRun[rows - 1](a, a_stride, panel, depth, c, prefetch);
}

// Entries of struct Kernels.

inline bool Avx512DotCodes(const bf16* a, ptrdiff_t a_stride, int rows,
                           const QuantPanel& panel, int depth, float* c,
                           Prefetch* prefetch) {
  const auto dot = [&]<typename Dot>() {
    DotAnyRows<Dot>(a, a_stride, rows, panel, depth, c, prefetch);
    return true;
  };
  using enum ScaleType;
  switch (panel.format) {
    case Format::kBf16:
      return false;
    case Format::kInt8:
      return dot.template operator()<DotPanel<Layout<Code::kInt8, kFloat32>>>();
    case Format::kInt4:
    case Format::kInt4KGroup: {
      using Zeros = Layout<Code::kInt4, kFloat32, true>;
      using Symmetric = Layout<Code::kInt4, kFloat32>;
      // Smaller groups have more tables than a block of codes is worth.
      constexpr int kLeastGroup = 64;
      if (panel.group >= kLeastGroup) {
        (panel.zeros ? DotNibbles<Zeros> : DotNibbles<Symmetric>)(a, a_stride, rows,
                                                                  panel, depth, c,
                                                                  prefetch);
        return true;
      }
      return panel.zeros ? dot.template operator()<DotPanel<Zeros>>()
                         : dot.template operator()<DotPanel<Symmetric>>();
    }
    case Format::kFp8Block:
    case Format::kFp8Channel:
      return dot.template operator()<DotPanel<Layout<Code::kE4M3, kFloat32>>>();
    case Format::kRawInt4:
      return dot.template operator()<DotPanel<Layout<Code::kInt4, ScaleType::kBf16>>>();
    case Format::kMxFp4:
      return dot.template operator()<DotPanel<Layout<Code::kE2M1, kE8M0>>>();
    case Format::kMxFp8:
      return dot.template operator()<DotPanel<Layout<Code::kE4M3, kE8M0>>>();
    default:
      return WithBlockFormat(panel.format, [&]<Format kFormat>() {
        dot.template operator()<DotBlocks<kFormat>>();
      });
  }
}

inline bool Avx512ContractCodes(const StripRows& a, int rows, const QuantPanel& panel,
                                int first_pair, int pairs, float* c, ptrdiff_t c_stride,
                                Prefetch* prefetch) {
  const auto contract = [&](auto layout) {
    ContractCodes<decltype(layout)>(a, rows, panel, first_pair, pairs, c, c_stride,
                                    prefetch);
    return true;
  };
  switch (panel.format) {
    case Format::kInt8:
      ContractInt8(a, rows, panel, first_pair, pairs, c, c_stride, prefetch);
      return true;
    case Format::kInt4:
    case Format::kInt4KGroup:
      return panel.zeros ? contract(Layout<Code::kInt4, ScaleType::kFloat32, true>{})
                         : contract(Layout<Code::kInt4, ScaleType::kFloat32>{});
    case Format::kRawInt4:
      return contract(Layout<Code::kInt4, ScaleType::kBf16>{});
    default:
      return false;
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_FEW_ROWS_AVX512_H_
