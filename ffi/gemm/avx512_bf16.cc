// Kernels for AVX-512 with VDPBF16PS (Zen 4 and later, Cooper Lake, Sapphire Rapids).
//
// The inner tile is 6 rows x 4 strips: 24 accumulators hide the latency of 6 cycles at
// up to 2 products a cycle, and one depth pair costs 4 panel loads and 6 broadcasts for
// 24 products. The panel streams from L2 (11 bytes a cycle), the rows stay in L1.
#include <immintrin.h>

#include "gemm/adapters_avx512.h"
#include "gemm/contract_avx512.h"
#include "gemm/decode_avx512.h"
#include "gemm/decode_blocks_avx512.h"
#include "gemm/epilogue_impl.h"
#include "gemm/few_rows_avx512.h"
#include "gemm/int8_blocks.h"
#include "gemm/int8_rows.h"
#include "gemm/isa.h"
#include "gemm/kernel.h"
#include "gemm/pack_avx512.h"
#include "gemm/pack_generic.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

constexpr int kMaxRows = 24;
constexpr int kTileRegisters = 24;
constexpr int kNearRows = 4;

// Depth pairs [begin, + run.steps) of a term.
template <int kRows, int kStrips, int kFirst, int kStep, bool kNear = false>
[[gnu::always_inline]] inline void AddPairs(const Term& term, int row, int begin,
                                            __m512 (&sum)[kRows][kStrips],
                                            PrefetchRun run) {
  constexpr int kWidth = (kStrips - kFirst + kStep - 1) / kStep;
  const bf16* a = term.a + row * term.a_stride;
  const bf16* b = term.b + static_cast<ptrdiff_t>(begin) * 2 * kStrip * kWidth;
  const ptrdiff_t stride = term.a_stride;
  for (int pair = begin; pair < begin + run.steps; ++pair) {
    __m512bh panel[kWidth];
#pragma GCC unroll 4
    for (int s = 0; s < kWidth; ++s) {
      panel[s] = (__m512bh)_mm512_loadu_si512(b + 2 * kStrip * s);
    }
    b += 2 * kStrip * kWidth;
    run.Fetch<kNear>(kNear ? kWidth : run.lines_per_step);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const __m512bh value = (__m512bh)SpreadPair(a + r * stride + 2 * pair);
#pragma GCC unroll 4
      for (int s = 0; s < kWidth; ++s) {
        __m512& target = sum[r][kFirst + s * kStep];
        target = _mm512_dpbf16_ps(target, value, panel[s]);
      }
    }
  }
}

template <int kRows, int kStrips>
void Tile(const Term* terms, int n_terms, int row, float* c, bool accumulate,
          Prefetch* prefetch) {
  __m512 sum[kRows][kStrips];
  c += row * kPanel;
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      sum[r][s] = accumulate ? _mm512_loadu_ps(c + r * kPanel + s * kStrip)
                             : _mm512_setzero_ps();
    }
  }
  for (const Term* term = terms; term < terms + n_terms; ++term) {
    const int pairs = term->depth / 2;
    if (kStrips > 1 && term->strip_step == 2) {
      if (term->first_strip == 0) {
        AddPairs<kRows, kStrips, 0, 2>(*term, row, 0, sum, {.steps = pairs});
      } else {
        AddPairs<kRows, kStrips, kStrips == 1 ? 0 : 1, 2>(*term, row, 0, sum,
                                                          {.steps = pairs});
      }
      continue;
    }
    for (int pair = 0; pair < pairs;) {
      const PrefetchRun run = NextRun(prefetch, pairs - pair, 1, 1, kStrips);
      if (run.near_bytes) {
        AddPairs<kRows, kStrips, 0, 1, true>(*term, row, pair, sum, run);
      } else {
        AddPairs<kRows, kStrips, 0, 1>(*term, row, pair, sum, run);
      }
      pair += run.steps;
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      _mm512_storeu_ps(c + r * kPanel + s * kStrip, sum[r][s]);
    }
  }
}

using TileFn = void (*)(const Term*, int, int, float*, bool, Prefetch*);

// Rows of one tile: as many as the registers hold, so that narrow panels keep the
// multipliers as busy as wide ones.
template <int kStrips>
constexpr int kTileRows = kTileRegisters / kStrips < 12 ? kTileRegisters / kStrips : 12;

template <int kStrips>
void RunTiles(const Term* terms, int n_terms, int rows, float* c, bool accumulate,
              Prefetch* prefetch) {
  static constexpr TileFn kTiles[] = {
      Tile<1, kStrips>,
      Tile<2, kStrips>,
      Tile<3, kStrips>,
      Tile<4, kStrips>,
      Tile<5, kStrips>,
      Tile<6, kStrips>,
      Tile < kTileRows<kStrips> < 7 ? 1 : 7,
      kStrips >,
      Tile < kTileRows<kStrips> < 8 ? 1 : 8,
      kStrips >,
      Tile < kTileRows<kStrips> < 9 ? 1 : 9,
      kStrips >,
      Tile < kTileRows<kStrips> < 10 ? 1 : 10,
      kStrips >,
      Tile < kTileRows<kStrips> < 11 ? 1 : 11,
      kStrips >
      , Tile < kTileRows<kStrips> < 12 ? 1 : 12, kStrips >,
  };
  // Equal tiles: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  int row = 0;
  for (int tiles = (rows + kTileRows<kStrips> - 1) / kTileRows<kStrips>; tiles > 0;
       --tiles) {
    const int count = (rows - row + tiles - 1) / tiles;
    kTiles[count - 1](terms, n_terms, row, c, accumulate, prefetch);
    row += count;
  }
}

void Gemm(const Term* terms, int n_terms, int rows, int strips, float* c,
          bool accumulate, Prefetch* prefetch) {
  switch (strips) {
    case 1:
      return RunTiles<1>(terms, n_terms, rows, c, accumulate, prefetch);
    case 2:
      return RunTiles<2>(terms, n_terms, rows, c, accumulate, prefetch);
    case 3:
      return RunTiles<3>(terms, n_terms, rows, c, accumulate, prefetch);
    default:
      return RunTiles<4>(terms, n_terms, rows, c, accumulate, prefetch);
  }
}

}  // namespace

const Kernels kAvx512Bf16Kernels = {
    .name = "avx512_bf16",
    .max_rows = kMaxRows,
    .row_step = 1,
    .near_rows = kNearRows,
    .gemm = Gemm,
    .transpose = Avx512Transpose,
    .contract_outputs = Avx512ContractOutputs,
    .pack_outputs_f32 = Avx512PackOutputs<float>,
    .pack_outputs_bf16 = Avx512PackOutputs<bf16>,
    .pack_depths_f32 = Avx512PackDepths<float>,
    .pack_depths_bf16 = Avx512PackDepths<bf16>,
    .pack_outputs_low = Avx512PackOutputs<float, Part::kLow>,
    .pack_depths_low = Avx512PackDepths<float, Part::kLow>,
    .to_bf16 = Avx512ToBf16<Part::kHigh>,
    .to_bf16_low = Avx512ToBf16<Part::kLow>,
    .enter = NoTileState,
    .leave = NoTileState,
    .epilogues = &kEpilogues,
    .gemm_int8 = VectorInt8Gemm,
    .quantize_rows = QuantizeRows,
    .decode = Decode<Avx512Decoder, Avx512BlockDecoder>,
    .dot_codes = Avx512DotCodes,
    .contract_codes = Avx512ContractCodes,
    .adapters_f32 = &kAvx512Adapters<float>,
    .adapters_bf16 = &kAvx512Adapters<bf16>,
};

}  // namespace ktjax
