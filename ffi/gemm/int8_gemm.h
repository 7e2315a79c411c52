// The integer product in vector registers, for AVX2, AVX-512 and VNNI.
//
// A tile of rows and strips goes through the depths of a group with its sums in
// registers, starting from -zero * (sum of the row's codes), and is then scaled and
// added to c in L1. With VNNI, 6 x 4 sums and a group of 128 are 768 products, and then
// 24 conversions, multiplications, fused multiply-adds and stores: 13 parts in 100.
//
// Smaller groups of weights are too short for that: on Zen 5 a store of 64 bytes takes
// the place of two products. Their float32 sums are in registers as well, in smaller
// tiles, until a group of the rows ends.
//
// c[r][n] sees its groups in ascending order with the same roundings, whatever tile its
// row falls into.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_GEMM_H_
#define KTJAX_FFI_GEMM_INT8_GEMM_H_

#include <cstring>
#include <utility>

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
template <int kRows, int kStrips>
using FloatSums = IntVector::Float[kRows][kStrips * kIntVectorsPerStrip];

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

// sum += a . codes over a row of 32-bit lanes; a moves on.
template <int kBits, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddLane(RowOperands& a, const uint8_t* codes,
                                           Int8Sums<kRows, kStrips>& sum) {
  constexpr int kParts = Int8Dot::kParts<kBits>;
  AddPart<kBits, 0, kRows, kStrips>(a, codes, sum);
  if constexpr (kParts > 1) AddPart<kBits, 1, kRows, kStrips>(a, codes, sum);
  if constexpr (kParts > 2) AddPart<kBits, 2, kRows, kStrips>(a, codes, sum);
  if constexpr (kParts > 3) AddPart<kBits, 3, kRows, kStrips>(a, codes, sum);
  a.at += 32 / kBits;
}

// The same over the rows of a run.
template <bool kNear, int kBits, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddRun(RowOperands& a, const uint8_t*& codes,
                                          ptrdiff_t codes_stride, PrefetchRun run,
                                          Int8Sums<kRows, kStrips>& sum) {
  for (int step = 0; step < run.steps; ++step) {
    run.Fetch<kNear>(kNear ? kStrips : run.lines_per_step);
    AddLane<kBits, kRows, kStrips>(a, codes, sum);
    codes += codes_stride;
  }
}

// The same over `steps` rows.
template <int kBits, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddLanes(RowOperands a, const uint8_t* codes,
                                            ptrdiff_t codes_stride, int steps,
                                            Int8Sums<kRows, kStrips>& sum,
                                            Prefetch* prefetch) {
  while (steps > 0) {
    const PrefetchRun run = NextRun(prefetch, steps, 16 / kBits, 1, kStrips);
    if (run.near_bytes) {
      AddRun<true, kBits, kRows, kStrips>(a, codes, codes_stride, run, sum);
    } else {
      AddRun<false, kBits, kRows, kStrips>(a, codes, codes_stride, run, sum);
    }
    steps -= run.steps;
  }
}

// sum[r][n] = -zero[n] * row_sums[r], for the zeros from `place` on.
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
        IntVector::Broadcast(-row_sums[r * p.a.sum_stride] & 0xffff);
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

// c = 0 in kRows rows.
template <int kRows>
inline void ClearRows(float* c, int strips) {
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kStrip * strips; n += IntVector::kLanes) {
      IntVector::Store(IntVector::Zero(), c + r * kPanel + n);
    }
  }
}

// Fetches the scales of a group, and its zero points, from `place` on.
template <int kStrips>
[[gnu::always_inline]] inline void FetchGroupScales(const Int8Product& p,
                                                    ptrdiff_t place) {
  constexpr int kScales = kStrips * kStrip;
  const auto fetch = [](const void* from, int bytes) {
    PrefetchRun{static_cast<const char*>(from), 0, 0}.Fetch<true>(
        CeilDiv(bytes, kCacheLine));
  };
  if (p.format.scale == ScaleType::kBf16) {
    fetch(static_cast<const bf16*>(p.b.scales) + place, kScales * sizeof(bf16));
  } else {
    fetch(static_cast<const float*>(p.b.scales) + place, kScales * sizeof(float));
  }
  if (p.b.zeros) fetch(p.b.zeros + place, kScales);
}

// kRows rows through all groups of kInt8Group, kStrips strips at a time.
template <int kBits, int kRows, int kStrips>
void Int8Tile(const Int8Product& p, int row, int depth, Prefetch* prefetch) {
  const Int8Rows& a = p.a;
  const QuantPanel& b = p.b;
  alignas(64) char buffer[kRows * Int8Dot::kBufferBytes + 1];
  const ptrdiff_t lanes = 4 * kStrip * b.strips;
  alignas(64) float scale_buffer[kStrips * kStrip];
  float* c = p.c + row * kPanel;
  ClearRows<kRows>(c, b.strips);
  for (int g = 0, begin = 0; begin < depth; ++g, begin += kInt8Group) {
    const int count = GroupDepth(depth, begin);
    const RowOperands operands = Int8Dot::Rows(a.values + row * a.stride + begin,
                                               a.stride, kRows, count, buffer);
    const uint8_t* codes = b.codes + begin * kBits / 32 * lanes;
    if (prefetch && prefetch->near_bytes && b.group < depth) {
      const int ahead = prefetch->near_bytes * 8 / (kBits * kStrips * kStrip);
      FetchGroupScales<kStrips>(p, ScalePlace(b, begin + ahead));
    }
    for (int strip = 0; strip < b.strips; strip += kStrips) {
      const ptrdiff_t place = ScalePlace(b, begin) + strip * kStrip;
      const float* scales = GroupScales<kStrips>(p, place, scale_buffer);
      Int8Sums<kRows, kStrips> sum;
      StartSums<kRows, kStrips>(p, place, a.sums + row * a.sum_stride + g, sum);
      // The first sweep of a group fetches: the groups are the clock.
      AddLanes<kBits, kRows, kStrips>(operands, codes + 4 * kStrip * strip, lanes,
                                      count * kBits / 32, sum,
                                      strip ? nullptr : prefetch);
      ScaleSums<kRows, kStrips>(scales, a.scales + row * a.scale_stride + g,
                                a.scale_stride, sum, c + strip * kStrip);
    }
  }
}

// How the weights' groups within a group of rows are.
template <int kGroupDepths, bool kZeroPoints>
struct SmallGroups {
  static constexpr int kDepths = kGroupDepths;
  static constexpr bool kZeros = kZeroPoints;
  static constexpr int kBits = 4;
  static constexpr int kSteps = kDepths * kBits / 32;  // rows of 32-bit lanes
  static constexpr int kCount = kInt8Group / kDepths;
};

// What the sums of kRows rows start from, in the groups of kInt8Group depths from
// `begin` on: -zero * (sum of the row's codes), or with zero points minus that sum, as
// the lower of two 16-bit integers.
template <typename G, int kRows>
struct GroupStarts {
  int32_t value[kRows][G::kCount];

  [[gnu::always_inline]] GroupStarts(const Int8Product& p, int row, int begin,
                                     int groups) {
    const int zero = CodeOfZero(p.format);
    for (int r = 0; r < kRows; ++r) {
      const int32_t* sums = p.a.sums + (row + r) * p.a.sum_stride + begin / G::kDepths;
      for (int g = 0; g < groups; ++g) {
        value[r][g] = G::kZeros ? -sums[g] & 0xffff : -zero * sums[g];
      }
    }
  }

  // The same as StartSums.
  template <int kStrips>
  [[gnu::always_inline]] void Start(int g, const uint8_t* zeros,
                                    Int8Sums<kRows, kStrips>& sum) const {
    constexpr int kVectors = kStrips * kIntVectorsPerStrip;
    IntVector::Int zero[kVectors];
    if constexpr (G::kZeros) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        zero[v] = IntVector::WidenBytes(zeros + IntVector::kLanes * v);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const IntVector::Int start = IntVector::Broadcast(value[r][g]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = G::kZeros ? IntVector::MulPairs(zero[v], start) : start;
      }
    }
  }
};

// total += sum * scales, for the scales from `place` on.
template <int kRows, int kStrips>
[[gnu::always_inline]] inline void AddToTotals(const Int8Product& p, ptrdiff_t place,
                                               const Int8Sums<kRows, kStrips>& sum,
                                               FloatSums<kRows, kStrips>& total) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  IntVector::Float scale[kVectors];
  const bool bf16_scales = p.format.scale == ScaleType::kBf16;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const ptrdiff_t at = place + IntVector::kLanes * v;
    scale[v] = bf16_scales
                   ? IntVector::LoadFloat(static_cast<const bf16*>(p.b.scales) + at)
                   : IntVector::LoadFloat(static_cast<const float*>(p.b.scales) + at);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] =
          IntVector::MulAdd(IntVector::ToFloat(sum[r][v]), scale[v], total[r][v]);
    }
  }
}

template <int kRows, int kStrips>
[[gnu::always_inline]] inline void ClearTotals(FloatSums<kRows, kStrips>& total) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kStrips * kIntVectorsPerStrip; ++v) {
      total[r][v] = IntVector::Zero();
    }
  }
}

// c += total * row scale; strips of c are c_step apart.
template <int kRows, int kStrips>
[[gnu::always_inline]] inline void StoreTotals(const FloatSums<kRows, kStrips>& total,
                                               const float* row_scales,
                                               ptrdiff_t row_stride, ptrdiff_t c_step,
                                               float* c) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const IntVector::Float row_scale =
        IntVector::BroadcastFloat(row_scales[r * row_stride]);
#pragma GCC unroll 4
    for (int v = 0; v < kStrips * kIntVectorsPerStrip; ++v) {
      float* dst = c + r * kPanel + IntVector::kLanes * v / kStrip * c_step +
                   IntVector::kLanes * v % kStrip;
      IntVector::Store(
          IntVector::MulAdd(total[r][v], row_scale, IntVector::LoadFloat(dst)), dst);
    }
  }
}

// Int8Tile for weights in smaller groups, of which depth is a multiple.
template <typename G, int kRows, int kStrips>
void SmallGroupTile(const Int8Product& p, int row, int depth, Prefetch* prefetch) {
  constexpr int kScales = kStrips * kStrip;
  constexpr int kLines = G::kSteps * kStrips;  // of a group's codes
  const Int8Rows& a = p.a;
  const QuantPanel& b = p.b;
  alignas(64) char buffer[kRows * Int8Dot::kBufferBytes + 1];
  const ptrdiff_t lanes = 4 * kStrip * b.strips;
  float* c = p.c + row * kPanel;
  ClearRows<kRows>(c, b.strips);
  PrefetchRun run{.steps = 0};
  for (int begin = 0; begin < depth; begin += kInt8Group) {
    const int count = GroupDepth(depth, begin);
    const int groups = count / G::kDepths;
    const RowOperands operands = Int8Dot::Rows(a.values + row * a.stride + begin,
                                               a.stride, kRows, count, buffer);
    const GroupStarts<G, kRows> starts(p, row, begin, groups);
    const float* row_scales = a.scales + row * a.scale_stride + begin / kInt8Group;
    for (int strip = 0; strip < b.strips; strip += kStrips) {
      const uint8_t* codes =
          b.codes + begin * G::kBits / 32 * lanes + 4 * kStrip * strip;
      ptrdiff_t place = ScalePlace(b, begin) + strip * kStrip;
      FloatSums<kRows, kStrips> total;
      ClearTotals<kRows, kStrips>(total);
      RowOperands at = operands;
      int g = 0;
      do {
        int lines = 0;  // of a step; the first sweep fetches
        if (strip == 0) {
          if (run.steps == 0) {
            run = NextRun(prefetch, (depth - begin) / G::kDepths - g, G::kDepths / 2,
                          G::kSteps, b.strips == kStrips ? kLines : 0);
          }
          --run.steps;
          if (run.near_bytes) {
            FetchGroupScales<kStrips>(
                p, place + run.near_bytes / (kLines * kCacheLine) * kScales);
          }
          lines = run.lines_per_step / G::kSteps;
        }
        Int8Sums<kRows, kStrips> sum;
        starts.template Start<kStrips>(g, G::kZeros ? b.zeros + place : nullptr, sum);
        // Unrolled: gcc 12 copies and spills the sums of a loop.
#pragma GCC unroll 8
        for (int step = 0; step < G::kSteps; ++step) {
          run.near_bytes ? run.Fetch<true>(kStrips) : run.Fetch<false>(lines);
          AddLane<G::kBits, kRows, kStrips>(at, codes, sum);
          codes += lanes;
        }
        AddToTotals<kRows, kStrips>(p, place, sum, total);
        place += kStrip * b.strips;
      } while (++g < groups);
      StoreTotals<kRows, kStrips>(total, row_scales, a.scale_stride, kStrip,
                                  c + kStrip * strip);
    }
  }
}

using Int8TileFn = void (*)(const Int8Product&, int, int, Prefetch*);
template <size_t kMost>
struct Int8TileTable {
  Int8TileFn tile[kMost];
};

// All rows in equal tiles of up to `most`: 16 rows are 6 + 5 + 5, not 6 + 6 + 4. Calls
// tile(first row, rows).
template <typename F>
[[gnu::always_inline]] inline void ForEqualTiles(int rows, int most, F tile) {
  int row = 0;
  for (int left = (rows + most - 1) / most; left > 0; --left) {
    const int count = (rows - row + left - 1) / left;
    tile(row, count);
    row += count;
  }
}

// tiles[i] takes i + 1 rows.
template <int kMost>
void RunInt8Tiles(const Int8TileFn (&tiles)[kMost], const Int8Product& p, int depth,
                  int rows, Prefetch* prefetch) {
  ForEqualTiles(rows, kMost,
                [&](int row, int count) { tiles[count - 1](p, row, depth, prefetch); });
}

template <int kBits, int kStrips>
void Int8Tiles(const Int8Product& p, int depth, int rows, Prefetch* prefetch) {
  static constexpr auto kTiles = []<size_t... kRow>(std::index_sequence<kRow...>) {
    return Int8TileTable<sizeof...(kRow)>{{Int8Tile<kBits, kRow + 1, kStrips>...}};
  }(std::make_index_sequence<kInt8TileRows<kStrips>>());
  RunInt8Tiles(kTiles.tile, p, depth, rows, prefetch);
}

template <int kBits>
void Int8Strips(const Int8Product& p, int depth, int rows, Prefetch* prefetch) {
  if constexpr (IntVector::kTileStrips > 1) {
    switch (p.b.strips) {
      case 1:
        break;
      case 2:
        return Int8Tiles<kBits, 2>(p, depth, rows, prefetch);
      case 3:
        return Int8Tiles<kBits, 3>(p, depth, rows, prefetch);
      default:
        return Int8Tiles<kBits, 4>(p, depth, rows, prefetch);
    }
  }
  Int8Tiles<kBits, 1>(p, depth, rows, prefetch);
}

// As many strips at a time as there are registers for sums and totals.
template <typename G>
void SmallGroupTiles(const Int8Product& p, int depth, int rows, Prefetch* prefetch) {
  static constexpr Int8TileFn kSingle[] = {
      SmallGroupTile<G, 1, 1>, SmallGroupTile<G, 2, 1>, SmallGroupTile<G, 3, 1>,
      SmallGroupTile<G, 4, 1>, SmallGroupTile<G, 5, 1>, SmallGroupTile<G, 6, 1>};
  if constexpr (IntVector::kTileStrips > 1) {
    static constexpr Int8TileFn kPairs[] = {
        SmallGroupTile<G, 1, 2>, SmallGroupTile<G, 2, 2>, SmallGroupTile<G, 3, 2>,
        SmallGroupTile<G, 4, 2>, SmallGroupTile<G, 5, 2>, SmallGroupTile<G, 6, 2>};
    static constexpr Int8TileFn kPanels[] = {
        SmallGroupTile<G, 1, 4>, SmallGroupTile<G, 2, 4>, SmallGroupTile<G, 3, 4>,
        SmallGroupTile<G, 4, 2>, SmallGroupTile<G, 5, 2>, SmallGroupTile<G, 6, 2>};
    if (p.b.strips == 4) return RunInt8Tiles(kPanels, p, depth, rows, prefetch);
    if (p.b.strips == 2) return RunInt8Tiles(kPairs, p, depth, rows, prefetch);
  }
  RunInt8Tiles(kSingle, p, depth, rows, prefetch);
}

inline void Int8Gemm(const FormatSpec& format, const Int8Rows& a, const QuantPanel& b,
                     int depth, int rows, float* c, Prefetch* prefetch) {
  const Int8Product p = {format, a, b, c};
  const auto small_groups = [&]<int kDepths>() {
    return b.zeros ? SmallGroupTiles<SmallGroups<kDepths, true>>
                   : SmallGroupTiles<SmallGroups<kDepths, false>>;
  };
  if (CodeBits(format) == 8) {
    Int8Strips<8>(p, depth, rows, prefetch);
  } else if (a.group == 32) {
    small_groups.template operator()<32>()(p, depth, rows, prefetch);
  } else if (a.group == 64) {
    small_groups.template operator()<64>()(p, depth, rows, prefetch);
  } else {
    Int8Strips<4>(p, depth, rows, prefetch);
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_GEMM_H_
