// The product by fused multiply-adds in float32, for both vector widths.
//
// A bfloat16 is the upper half of a float32, so panels are decoded in registers: one
// shift or one mask per vector, shared by all rows of the tile. Rows are decoded once
// per kBlock depths to L1, where broadcasts cost a load and no arithmetic.
//
// Each value of c sees its depths in ascending order, even before odd, whatever tile
// its row falls into.
#ifndef KTJAX_FFI_GEMM_FMA_GEMM_H_
#define KTJAX_FFI_GEMM_FMA_GEMM_H_

#include "gemm/kernel.h"
#include "gemm/prefetch.h"
#include "gemm/vector.h"

namespace ktjax {
namespace {

using Float = Vector::Float;

constexpr int kVectorsPerStrip = kStrip / Vector::kLanes;

// Registers for sums: the others hold one decoded vector per column, a broadcast and
// the mask of the odd halves.
constexpr int kSumRegisters = Vector::kRegisters * 3 / 4;

// Rows that are decoded together: two vectors wide, they fill the sum registers.
constexpr int kTileRows = kSumRegisters / 2;

// Depths per block: the decoded rows (12 KiB with AVX-512, 6 with AVX2) leave room in
// L1 for the panel and c, and loading and storing c costs 1/128 of the products.
constexpr int kBlock = 256;

// The columns of a tile of kRows rows, in strips: as many as the sum registers hold.
template <int kRows>
constexpr int TileStrips() {
  for (int strips = kPanelStrips; strips > 1; --strips) {
    if (kRows * strips * kVectorsPerStrip <= kSumRegisters) return strips;
  }
  return 1;
}

// sum[r] += a[r] . b over the pairs of `run`; a is decoded, with rows kBlock apart, and
// b points to the first of kStrips strips of a panel whose pairs are b_stride apart.
template <int kRows, int kStrips>
[[gnu::always_inline]] inline void AddPairs(
    const float* a, const bf16* b, ptrdiff_t b_stride, const PrefetchRun& run,
    Float (&sum)[kRows][kStrips * kVectorsPerStrip]) {
  constexpr int kVectors = kStrips * kVectorsPerStrip;
  const char* line = run.line;
  for (int pair = 0; pair < run.steps; ++pair, a += 2, b += b_stride) {
    for (int i = 0; i < run.lines_per_step; ++i, line += kCacheLine) {
      _mm_prefetch(line, _MM_HINT_T1);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Float columns[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const bf16* pairs_of_v = b + 2 * Vector::kLanes * v;
        columns[v] = half ? Vector::Odd(pairs_of_v) : Vector::Even(pairs_of_v);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Float value = Vector::Broadcast(a + r * kBlock + half);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Vector::MulAdd(value, columns[v], sum[r][v]);
        }
      }
    }
  }
}

// One block of one term on kStrips of its strips. `load` is false where c starts from
// 0.
template <int kRows, int kStrips>
void Tile(const float* a, const bf16* b, ptrdiff_t b_stride, int pairs, float* c,
          int strip_step, bool load, Prefetch* prefetch) {
  Float sum[kRows][kStrips * kVectorsPerStrip];
  const auto at = [&](int r, int v) {
    return c + r * kPanel + v / kVectorsPerStrip * strip_step * kStrip +
           v % kVectorsPerStrip * Vector::kLanes;
  };
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kStrips * kVectorsPerStrip; ++v) {
      sum[r][v] = load ? Vector::Load(at(r, v)) : Vector::Zero();
    }
  }
  while (pairs > 0) {
    const PrefetchRun run = NextRun(prefetch, pairs, 1);
    AddPairs<kRows, kStrips>(a, b, b_stride, run, sum);
    a += 2 * run.steps;
    b += run.steps * b_stride;
    pairs -= run.steps;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kStrips * kVectorsPerStrip; ++v) {
      Vector::Store(sum[r][v], at(r, v));
    }
  }
}

// All strips of one block of a term: as many at a time as registers allow.
template <int kRows>
void Strips(const float* a, const bf16* b, int width, int pairs, float* c,
            int strip_step, bool load, Prefetch* prefetch) {
  constexpr int kStrips = TileStrips<kRows>();
  const ptrdiff_t b_stride = 2 * kStrip * width;
  for (int strip = 0; strip < width;) {
    const int left = width - strip;
    const bf16* b_strip = b + 2 * kStrip * strip;
    float* c_strip = c + kStrip * strip_step * strip;
    if (left >= kStrips) {
      Tile<kRows, kStrips>(a, b_strip, b_stride, pairs, c_strip, strip_step, load,
                           prefetch);
      strip += kStrips;
    } else {
      Tile<kRows, 1>(a, b_strip, b_stride, pairs, c_strip, strip_step, load, prefetch);
      ++strip;
    }
    prefetch = nullptr;  // the first sweep of a block fetches: the blocks are the clock
  }
}

// All terms for kRows rows.
template <int kRows>
void RunRows(const Term* terms, int n_terms, int row, int strips, float* c,
             bool accumulate, Prefetch* prefetch) {
  alignas(64) float a[kRows * kBlock];
  c += row * kPanel;
  bool load = accumulate;
  if (!load && TermWidth(terms[0], strips) != strips) {
    // The first term does not reach all of c.
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kStrip * strips; n += Vector::kLanes) {
        Vector::Store(Vector::Zero(), c + r * kPanel + n);
      }
    }
    load = true;
  }
  for (const Term* term = terms; term < terms + n_terms; ++term) {
    const int width = TermWidth(*term, strips);
    if (width == 0) continue;
    for (int begin = 0; begin < term->depth; begin += kBlock) {
      const int left = term->depth - begin;
      const int depth = left < kBlock ? left : kBlock;
      for (int r = 0; r < kRows; ++r) {
        const bf16* src = term->a + (row + r) * term->a_stride + begin;
        for (int d = 0; d < depth; d += Vector::kLanes) {
          Vector::Store(Vector::Decode(src + d), a + r * kBlock + d);
        }
      }
      Strips<kRows>(a, term->b + static_cast<ptrdiff_t>(begin) * kStrip * width, width,
                    depth / 2, c + kStrip * term->first_strip, term->strip_step, load,
                    prefetch);
      load = true;
    }
  }
}

inline void FmaGemm(const Term* terms, int n_terms, int rows, int strips, float* c,
                    bool accumulate, Prefetch* prefetch) {
  using Rows = void (*)(const Term*, int, int, int, float*, bool, Prefetch*);
  static constexpr Rows kRows[] = {
      RunRows<1>, RunRows<2>, RunRows<3>, RunRows<4>,  RunRows<5>,  RunRows<6>,
#ifdef __AVX512F__
      RunRows<7>, RunRows<8>, RunRows<9>, RunRows<10>, RunRows<11>, RunRows<12>,
#endif
  };
  static_assert(sizeof kRows / sizeof kRows[0] == kTileRows);
  // Equal tiles: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  int row = 0;
  for (int tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int count = (rows - row + tiles - 1) / tiles;
    kRows[count - 1](terms, n_terms, row, strips, c, accumulate, prefetch);
    row += count;
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_FMA_GEMM_H_
