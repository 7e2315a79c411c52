// The product with AMX tiles, over any implementation of the tile instructions.
//
// Rows go in groups of 32, which multiply two strips at a time: 2 x 2 tiles of c, four
// loads for four products. What is left is a group of its own: 17 to 31 rows in the
// same way, with fewer rows in the second tile; up to 16 rows as 1 x 4 tiles, five
// loads for four products. So no tile holds rows that are not there: none is read or
// written, and no time goes into them.
//
// Tile numbers: c is 0..3 (2 x 2: 2 * row tile + strip; 1 x 4: strip), a is 4 and 5, b
// is 6 and 7.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_AMX_IMPL_H_
#define KTJAX_FFI_GEMM_AMX_IMPL_H_

#include <xmmintrin.h>

#include "base/types.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"
#include "tile/tile_config.h"

namespace ktjax {
namespace {

// c takes 16 KiB of L1, where an epilogue finds it.
constexpr int kAmxMaxRows = 64;
constexpr int kAmxRowStep = 2 * kTileMaxRows;

// What is read is fetched to L1 so many steps ahead: a tile load waits for its 16
// lines, and the next one waits for it.
constexpr int kStepsAhead = 2;

constexpr int kPairsPerStep = kDepth / 2;
constexpr int kPrefetchLines = Prefetch::kMaxPerPair;
constexpr ptrdiff_t kRowBytes = sizeof(float) * kPanel;

// The rows that the tiles are configured for, first row tile * 32 + second; 0: none.
thread_local int configured_rows = 0;

inline int StepsOf(const Term& term) {
  return static_cast<int>(CeilDiv(term.depth, kDepth));
}

template <typename Tiles>
class AmxGemm {
 public:
  static void Enter() { Configure(kTileMaxRows, kTileMaxRows); }
  static void Leave() {
    configured_rows = 0;
    Tiles::Release();
  }

  static void Gemm(const Term* terms, int n_terms, int rows, int strips, float* c,
                   bool accumulate, Prefetch* prefetch) {
    const int whole = rows / kAmxRowStep * kAmxRowStep;
    const int rest = rows - whole;
    const Terms all{terms, n_terms};
    if (whole) {
      Configure(kTileMaxRows, kTileMaxRows);
      for (int row = 0; row < whole; row += kAmxRowStep) {
        Group<2>(all, row, strips, c, accumulate, prefetch);
      }
    }
    if (rest > kTileMaxRows) {
      Configure(kTileMaxRows, rest - kTileMaxRows);
      Group<2>(all, whole, strips, c, accumulate, prefetch);
    } else if (rest) {
      Configure(rest, rest);
      Group<1>(all, whole, strips, c, accumulate, prefetch);
    }
  }

 private:
  struct Terms {
    const Term* first;
    int count;
  };

  static void Configure(int first_rows, int second_rows) {
    const int key = 32 * first_rows + second_rows;
    if (configured_rows == key) return;
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
      config.row_bytes[tile] = kTileRowBytes;
      const bool second = tile == 2 || tile == 3 || tile == 5;
      const int rows = second ? second_rows : first_rows;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kPairsPerStep);
    }
    Tiles::Configure(config);
    configured_rows = key;
  }

  // One group of rows through all terms, two or four strips at a time.
  template <int kRowTiles>
  static void Group(Terms terms, int row, int strips, float* c, bool accumulate,
                    Prefetch* prefetch) {
    constexpr int kWidth = kRowTiles == 2 ? 2 : 4;
    c += row * kPanel;
    for (int first = 0; first < strips; first += kWidth) {
      const int width = strips - first < kWidth ? strips - first : kWidth;
      float* part = c + first * kStrip;
      Open<kRowTiles, 0>(part, width, accumulate);
      Open<kRowTiles, 1>(part, width, accumulate);
      Open<kRowTiles, 2>(part, width, accumulate);
      Open<kRowTiles, 3>(part, width, accumulate);
      for (int i = 0; i < terms.count; ++i) {
        AddTerm<kRowTiles>(terms.first[i], row, first, width, strips, prefetch);
      }
      Close<kRowTiles, 0>(part, width);
      Close<kRowTiles, 1>(part, width);
      Close<kRowTiles, 2>(part, width);
      Close<kRowTiles, 3>(part, width);
    }
  }

  // Where tile kTile of c lies, and whether the strips at hand reach it.
  template <int kRowTiles, int kTile>
  static constexpr int kStripOf = kRowTiles == 2 ? kTile % 2 : kTile;
  template <int kRowTiles, int kTile>
  static float* Place(float* c) {
    constexpr int kRow = kRowTiles == 2 ? kTile / 2 * kTileMaxRows : 0;
    return c + kRow * kPanel + kStripOf<kRowTiles, kTile> * kStrip;
  }

  template <int kRowTiles, int kTile>
  static void Open(float* c, int width, bool accumulate) {
    if (kStripOf<kRowTiles, kTile> >= width) return;
    if (accumulate) {
      Tiles::template Load<kTile>(Place<kRowTiles, kTile>(c), kRowBytes);
    } else {
      Tiles::template Zero<kTile>();
    }
  }
  template <int kRowTiles, int kTile>
  static void Close(float* c, int width) {
    if (kStripOf<kRowTiles, kTile> >= width) return;
    Tiles::template Store<kTile>(Place<kRowTiles, kTile>(c), kRowBytes);
  }

  struct Operands {
    const char* a;
    ptrdiff_t a_stride;  // bytes
    const char* b;
    ptrdiff_t b_stride;  // bytes
  };

  // One term, for those of the strips [first, first + width) of c that it feeds.
  template <int kRowTiles>
  static void AddTerm(const Term& term, int row, int first, int width, int strips,
                      Prefetch* prefetch) {
    int mask = 0, fed_before = 0;
    for (int strip = term.first_strip; strip < first + width;
         strip += term.strip_step) {
      if (strip < first) {
        ++fed_before;
      } else {
        mask |= 1 << (strip - first);
      }
    }
    const ptrdiff_t pair = 2 * kStrip * TermWidth(term, strips);
    const bf16* a = term.a + row * term.a_stride;
    const bf16* b = term.b + 2 * kStrip * fed_before;
    const Operands operands = {reinterpret_cast<const char*>(a),
                               static_cast<ptrdiff_t>(sizeof(bf16)) * term.a_stride,
                               reinterpret_cast<const char*>(b),
                               static_cast<ptrdiff_t>(sizeof(bf16)) * pair};
    using Add = void (*)(Operands, int, Prefetch*);
    if constexpr (kRowTiles == 2) {
      static constexpr Add kAdd[] = {Skip, AddMask<2, 1>, AddMask<2, 2>, AddMask<2, 3>};
      kAdd[mask](operands, StepsOf(term), prefetch);
    } else {
      static constexpr Add kAdd[] = {
          Skip,           AddMask<1, 1>,  AddMask<1, 2>,  AddMask<1, 3>,
          AddMask<1, 4>,  AddMask<1, 5>,  AddMask<1, 6>,  AddMask<1, 7>,
          AddMask<1, 8>,  AddMask<1, 9>,  AddMask<1, 10>, AddMask<1, 11>,
          AddMask<1, 12>, AddMask<1, 13>, AddMask<1, 14>, AddMask<1, 15>,
      };
      kAdd[mask](operands, StepsOf(term), prefetch);
    }
  }

  static void Skip(Operands, int, Prefetch*) {}

  template <int kRowTiles, int kMask>
  static void AddMask(Operands operands, int count, Prefetch* prefetch) {
    // Terms that skip strips are short (LoRA): prefetching is left to the others.
    constexpr bool kDense = (kMask & (kMask + 1)) == 0;
    while (count > 0) {
      const PrefetchRun run =
          kDense ? NextRun(prefetch, count, kPairsPerStep, kPairsPerStep)
                 : PrefetchRun{.steps = count};
      ByLines<kRowTiles, kMask>(operands, run);
      operands.a += static_cast<ptrdiff_t>(kTileRowBytes) * run.steps;
      operands.b += kPairsPerStep * operands.b_stride * run.steps;
      count -= run.steps;
    }
  }

  template <int kRowTiles, int kMask>
  static void ByLines(Operands operands, PrefetchRun run) {
    switch (run.lines_per_step / kPairsPerStep) {
      case 0:
        return AddSteps<kRowTiles, kMask, 0>(operands, run);
      case 1:
        return AddSteps<kRowTiles, kMask, 1>(operands, run);
      case 2:
        return AddSteps<kRowTiles, kMask, 2>(operands, run);
      case 3:
        return AddSteps<kRowTiles, kMask, 3>(operands, run);
      default:
        return AddSteps<kRowTiles, kMask, kPrefetchLines>(operands, run);
    }
  }

  // The lines of a tile to come. They may pass the end of a term: a prefetch cannot
  // fault.
  [[gnu::always_inline]] static void FetchTile(const char* tile, ptrdiff_t stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileMaxRows; ++i) {
      _mm_prefetch(tile + i * stride, _MM_HINT_T0);
    }
  }

  // The inner loop: kLines prefetches per depth pair, spread over the products.
  template <int kRowTiles, int kMask, int kLines>
  [[gnu::noinline]] static void AddSteps(Operands operands, PrefetchRun run) {
    const char* a = operands.a;
    const char* second_a = a + kTileMaxRows * operands.a_stride;
    const char* b = operands.b;
    const ptrdiff_t b_step = kPairsPerStep * operands.b_stride;
    for (const char* end = a + static_cast<ptrdiff_t>(kTileRowBytes) * run.steps;
         a != end; a += kTileRowBytes) {
      Tiles::template Load<4>(a, operands.a_stride);
      if constexpr (kRowTiles == 2)
        Tiles::template Load<5>(second_a, operands.a_stride);
      FetchTile(a + kStepsAhead * kTileRowBytes, operands.a_stride);
      if constexpr (kRowTiles == 2)
        FetchTile(second_a + kStepsAhead * kTileRowBytes, operands.a_stride);
      AddStrip<kRowTiles, kMask, 0, kLines>(b, operands, run.line);
      AddStrip<kRowTiles, kMask, 1, kLines>(b, operands, run.line);
      if constexpr (kRowTiles == 1) {
        AddStrip<kRowTiles, kMask, 2, kLines>(b, operands, run.line);
        AddStrip<kRowTiles, kMask, 3, kLines>(b, operands, run.line);
      }
      second_a += kTileRowBytes;
      b += b_step;
      run.line += kCacheLine * kPairsPerStep * kLines;
    }
  }

  template <int kRowTiles, int kMask, int kStripOfC, int kLines>
  [[gnu::always_inline]] static void AddStrip(const char* b, const Operands& operands,
                                              const char* line) {
    if constexpr (kMask >> kStripOfC & 1) {
      constexpr int kFed = __builtin_popcount(kMask);
      constexpr int kIndex = __builtin_popcount(kMask & ((1 << kStripOfC) - 1));
      constexpr int kB = 6 + kIndex % 2;
      const ptrdiff_t b_stride = operands.b_stride;
      Tiles::template Load<kB, kTileRowBytes * kIndex>(b, b_stride);
      Tiles::template Dot<kStripOfC, 4, kB>();
      if constexpr (kRowTiles == 2) Tiles::template Dot<2 + kStripOfC, 5, kB>();
      FetchTile(b + kStepsAhead * kPairsPerStep * b_stride + kTileRowBytes * kIndex,
                b_stride);
      constexpr int kLinesPerStep = kPairsPerStep * kLines;
#pragma GCC unroll 64
      for (int i = kLinesPerStep * kIndex / kFed;
           i < kLinesPerStep * (kIndex + 1) / kFed; ++i) {
        _mm_prefetch(line + kCacheLine * i, _MM_HINT_T1);
      }
    }
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_AMX_IMPL_H_
