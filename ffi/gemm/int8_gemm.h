// The integer product in vector registers, for AVX2, AVX-512 and VNNI.
//
// A tile of rows and strips goes through the depths of a group with its sums in
// registers, starting from -zero * (sum of the row's codes), and is then scaled and
// added to c in L1. With VNNI, 6 x 4 sums and a group of 128 are 768 products, and then
// 24 conversions, multiplications and fused multiply-adds: 9 parts in 100.
//
// c[r][n] sees its groups in ascending order with one rounding each, whatever tile its
// row falls into.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_GEMM_H_
#define KTJAX_FFI_GEMM_INT8_GEMM_H_

#include <cstring>

#include "gemm/int8_rows.h"
#include "gemm/int8_vector.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

constexpr int kIntVectorsPerStrip = kStrip / IntVector::kLanes;

// The rows that fill the sum registers, at most 12.
template <int kStrips>
constexpr int kInt8TileRows =
    IntVector::kSumRegisters / (kStrips * kIntVectorsPerStrip) < 12
        ? IntVector::kSumRegisters / (kStrips * kIntVectorsPerStrip)
        : 12;

template <int kRows, int kStrips>
using Int8Sums = IntVector::Int[kRows][kStrips * kIntVectorsPerStrip];

// The arguments of gemm_int8 that all steps need.
struct Int8Product {
  const FormatSpec& format;
  const Int8Rows& a;
  const QuantPanel& b;
  float* c;
};

template <int kBits, int kPart, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddPart(RowOperands a, const uint8_t* codes,
                                           Int8Sums<kRows, kStrips>& sum) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  IntVector::Int panel[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    panel[v] = Int8Dot::Codes<kBits, kPart>(codes + 4 * IntVector::kLanes * v);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    int32_t bits;
    std::memcpy(&bits, a.at + r * a.stride + Int8Dot::Offset(kPart), sizeof bits);
    const IntVector::Int value = IntVector::Broadcast(bits);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Int8Dot::Add(sum[r][v], panel[v], value);
    }
  }
}

// sum += a . codes over the `steps` rows of 32-bit lanes of a run.
template <bool kNear, int kBits, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddRun(RowOperands& a, const uint8_t*& codes,
                                          ptrdiff_t codes_stride, PrefetchRun run,
                                          Int8Sums<kRows, kStrips>& sum) {
  constexpr int kParts = Int8Dot::kParts<kBits>;
  for (int step = 0; step < run.steps; ++step) {
    run.FetchStep<kNear>();
    AddPart<kBits, 0, kRows, kStrips>(a, codes, sum);
    if constexpr (kParts > 1) AddPart<kBits, 1, kRows, kStrips>(a, codes, sum);
    if constexpr (kParts > 2) AddPart<kBits, 2, kRows, kStrips>(a, codes, sum);
    if constexpr (kParts > 3) AddPart<kBits, 3, kRows, kStrips>(a, codes, sum);
    a.at += 32 / kBits;
    codes += codes_stride;
  }
}

// The same over `steps` of them.
template <int kBits, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddLanes(RowOperands a, const uint8_t* codes,
                                            ptrdiff_t codes_stride, int steps,
                                            Int8Sums<kRows, kStrips>& sum,
                                            Prefetch* prefetch) {
  while (steps > 0) {
    const PrefetchRun run = NextRun(prefetch, steps, 16 / kBits);
    if (run.near) {
      AddRun<true, kBits, kRows, kStrips>(a, codes, codes_stride, run, sum);
    } else {
      AddRun<false, kBits, kRows, kStrips>(a, codes, codes_stride, run, sum);
    }
    steps -= run.steps;
  }
}

// sum[r][n] = -zero[n] * a.sums[r], for the scales and zeros from `place` on.
template <int kRows, int kStrips>
[[gnu::always_inline]] inline void StartSums(const Int8Product& p, ptrdiff_t place,
                                             const int32_t* row_sums,
                                             Int8Sums<kRows, kStrips>& sum) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  // A product of pairs of 16-bit integers whose odd ones are 0: a row's sum is within
  // 127 * 128.
  IntVector::Int zeros[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    zeros[v] = p.b.zeros
                   ? IntVector::WidenBytes(p.b.zeros + place + IntVector::kLanes * v)
                   : IntVector::Broadcast(CodeOfZero(p.format));
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const IntVector::Int minus =
        IntVector::Broadcast(-row_sums[r * p.a.group_stride] & 0xffff);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = IntVector::MulPairs(zeros[v], minus);
    }
  }
}

// The scales of kStrips strips from `place` on, in float32: in `buffer` if need be.
template <int kStrips>
[[gnu::always_inline]] inline const float* GroupScales(const Int8Product& p,
                                                       ptrdiff_t place, float* buffer) {
  if (p.format.scale != ScaleType::kBf16) {
    return static_cast<const float*>(p.b.scales) + place;
  }
  for (int n = 0; n < kStrips * kStrip; n += IntVector::kLanes) {
    const bf16* src = static_cast<const bf16*>(p.b.scales) + place + n;
    IntVector::Store(IntVector::LoadFloat(src), buffer + n);
  }
  return buffer;
}

// c += sum * (scales * row scale).
template <int kRows, int kStrips>
[[gnu::always_inline]] inline void ScaleSums(const float* scales,
                                             const float* row_scales,
                                             ptrdiff_t row_stride,
                                             const Int8Sums<kRows, kStrips>& sum,
                                             float* c) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const float row_scale = row_scales[r * row_stride];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* dst = c + r * kPanel + IntVector::kLanes * v;
      IntVector::Int value = sum[r][v];
      Pin(value);
      const IntVector::Float scale = IntVector::Mul(
          IntVector::LoadFloat(scales + IntVector::kLanes * v), row_scale);
      IntVector::Store(IntVector::MulAdd(IntVector::ToFloat(value), scale,
                                         IntVector::LoadFloat(dst)),
                       dst);
    }
  }
}

// kRows rows through all groups, kStrips strips at a time.
template <int kBits, int kRows, int kStrips>
void Int8Tile(const Int8Product& p, int row, int depth, bool accumulate,
              Prefetch* prefetch) {
  const Int8Rows& a = p.a;
  const QuantPanel& b = p.b;
  alignas(64) char buffer[kRows * Int8Dot::kBufferBytes + 1];
  const ptrdiff_t lanes = 4 * kStrip * b.strips;
  alignas(64) float scale_buffer[kStrips * kStrip];
  float* c = p.c + row * kPanel;
  if (!accumulate) {
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kStrip * b.strips; n += IntVector::kLanes) {
        IntVector::Store(IntVector::Zero(), c + r * kPanel + n);
      }
    }
  }
  for (int g = 0, begin = 0; begin < depth; ++g, begin += a.group) {
    const int count = GroupDepth(depth, a.group, g);
    const RowOperands operands = Int8Dot::Rows(a.values + row * a.stride + begin,
                                               a.stride, kRows, count, buffer);
    const uint8_t* codes = b.codes + begin * kBits / 32 * lanes;
    const ptrdiff_t row_place = row * a.group_stride + g;
    for (int strip = 0; strip < b.strips; strip += kStrips) {
      const ptrdiff_t place = ScalePlace(b, begin) + strip * kStrip;
      const float* scales = GroupScales<kStrips>(p, place, scale_buffer);
      Int8Sums<kRows, kStrips> sum;
      StartSums<kRows, kStrips>(p, place, a.sums + row_place, sum);
      // The first sweep of a group fetches: the groups are the clock.
      AddLanes<kBits, kRows, kStrips>(operands, codes + 4 * kStrip * strip, lanes,
                                      count * kBits / 32, sum,
                                      strip ? nullptr : prefetch);
      ScaleSums<kRows, kStrips>(scales, a.scales + row_place, a.group_stride, sum,
                                c + strip * kStrip);
    }
  }
}

// Tiles that the registers do not hold are not compiled.
template <int kRows, int kStrips>
constexpr int kHeld = kRows <= kInt8TileRows<kStrips> ? kRows : 1;

template <int kBits, int kStrips>
void Int8Tiles(const Int8Product& p, int depth, int rows, bool accumulate,
               Prefetch* prefetch) {
  using TileFn = void (*)(const Int8Product&, int, int, bool, Prefetch*);
  static constexpr TileFn kTiles[] = {
      Int8Tile<kBits, 1, kStrips>,
      Int8Tile<kBits, 2, kStrips>,
      Int8Tile<kBits, 3, kStrips>,
      Int8Tile<kBits, 4, kStrips>,
      Int8Tile<kBits, 5, kStrips>,
      Int8Tile<kBits, 6, kStrips>,
      Int8Tile<kBits, kHeld<7, kStrips>, kStrips>,
      Int8Tile<kBits, kHeld<8, kStrips>, kStrips>,
      Int8Tile<kBits, kHeld<9, kStrips>, kStrips>,
      Int8Tile<kBits, kHeld<10, kStrips>, kStrips>,
      Int8Tile<kBits, kHeld<11, kStrips>, kStrips>,
      Int8Tile<kBits, kHeld<12, kStrips>, kStrips>,
  };
  constexpr int kMost = kInt8TileRows<kStrips>;
  // Equal tiles: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  int row = 0;
  for (int tiles = (rows + kMost - 1) / kMost; tiles > 0; --tiles) {
    const int count = (rows - row + tiles - 1) / tiles;
    kTiles[count - 1](p, row, depth, accumulate, prefetch);
    row += count;
  }
}

template <int kBits>
void Int8Strips(const Int8Product& p, int depth, int rows, bool accumulate,
                Prefetch* prefetch) {
  if constexpr (IntVector::kTileStrips > 1) {
    switch (p.b.strips) {
      case 1:
        break;
      case 2:
        return Int8Tiles<kBits, 2>(p, depth, rows, accumulate, prefetch);
      case 3:
        return Int8Tiles<kBits, 3>(p, depth, rows, accumulate, prefetch);
      default:
        return Int8Tiles<kBits, 4>(p, depth, rows, accumulate, prefetch);
    }
  }
  Int8Tiles<kBits, 1>(p, depth, rows, accumulate, prefetch);
}

inline void Int8Gemm(const FormatSpec& format, const Int8Rows& a, const QuantPanel& b,
                     int depth, int rows, float* c, bool accumulate,
                     Prefetch* prefetch) {
  const Int8Product product = {format, a, b, c};
  if (CodeBits(format) == 8) {
    Int8Strips<8>(product, depth, rows, accumulate, prefetch);
  } else {
    Int8Strips<4>(product, depth, rows, accumulate, prefetch);
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_GEMM_H_
