// The integer product with AMX tiles, over any implementation of the tile instructions.
//
// 16 rows multiply up to four strips at a time: five tile loads for four products. The
// int32 tiles of a group go through a buffer in L1, where they are scaled and added to
// totals, and these to c where a group of the rows ends; the products of the next group
// run meanwhile. 4-bit codes, and those in blocks, are unpacked to bytes kInt8Group
// depths at a time (8 KiB), for all rows of the call. Rows that are no multiple of 16
// take a pass of their own with smaller tiles, so that no tile holds rows that are not
// there.
//
// Tile numbers: c is 0..3 (strips); a is 4 and b 5 for 64 depths, a is 6 and b 7 for
// the 32 depths that a group may end with, or the 16 that a sub-block may have.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_AMX_H_
#define KTJAX_FFI_GEMM_INT8_AMX_H_

#include <cstring>

#include "base/types.h"
#include "gemm/amx_impl.h"
#include "gemm/int8_rows.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"
#include "tile/tile_config.h"
#if defined(__AVX512F__)
#include "gemm/int8_block_vector.h"
#else
#include "gemm/int8_block_generic.h"
#endif

namespace ktjax {
namespace {

constexpr ptrdiff_t kLaneBytes = 4;
constexpr int kTileDepth = 64;  // a tile's row of 8-bit codes

// A format in blocks.
struct AmxBlocks {
  int sub_depths;
  float zero;
  bool mins;
  void (*unpack)(const QuantPanel& b, int begin, int count, uint8_t* bytes);
  void (*load_scales)(const QuantPanel& b, int begin, int count, BlockScales& out);
};

template <Format kFormat>
constexpr AmxBlocks kAmxBlocks = {
    SubDepths(*FindBlocks(kFormat)), CodeOfZero(*FindBlocks(kFormat)),
    FindBlocks(kFormat)->mins, UnpackBlocks<kFormat>, LoadBlockScales<kFormat>};

// Null where the format is not in blocks.
inline const AmxBlocks* FindAmxBlocks(Format format) {
  const AmxBlocks* found = nullptr;
  WithBlockFormat(format, [&]<Format kFormat>() { found = &kAmxBlocks<kFormat>; });
  return found;
}

// What every step of a product needs.
struct AmxInt8Product {
  const FormatSpec& format;
  const Int8Rows& a;
  const QuantPanel& b;
  int depth;
  float* c;
  Prefetch* prefetch;
  const AmxBlocks* blocks;  // null where b is not in blocks
  int group;                // depths whose products are summed as integers
};

// 4-bit codes of `depth` depths as bytes, in the layout of 8-bit codes.
inline void UnpackNibbles(const uint8_t* codes, int depth, int strips, uint8_t* dst) {
  for (int i = 0; i < depth / 8; ++i) {
    for (int strip = 0; strip < strips; ++strip, codes += sizeof(U32x16)) {
      U32x16 lanes;
      std::memcpy(&lanes, codes, sizeof lanes);
      const U32x16 low = lanes & 0x0f0f0f0fu;
      const U32x16 high = lanes >> 4 & 0x0f0f0f0fu;
      uint8_t* at = dst + (2 * i * strips + strip) * sizeof lanes;
      std::memcpy(at, &low, sizeof low);
      std::memcpy(at + strips * sizeof lanes, &high, sizeof high);
    }
  }
}

// total += x * y, in one rounding where the instruction set has it.
inline void AddProduct(F32x16& total, const F32x16& x, const F32x16& y) {
#if defined(__AVX512F__)
  total = (F32x16)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)total);
#else
  total += x * y;
#endif
}

// Issues what the schedule has for `pairs` depth pairs.
inline void PrefetchPairs(Prefetch* prefetch, int pairs) {
  while (pairs > 0) {
    const PrefetchRun run = NextRun(prefetch, pairs, 1);
    for (int i = 0; i < run.steps * run.lines_per_step; ++i) {
      _mm_prefetch(run.line + kCacheLine * i, _MM_HINT_T1);
    }
    pairs -= run.steps;
  }
}

// What the outputs of kStrips strips have in common in one group.
template <int kStrips>
struct GroupScales {
  F32x16 scale[kStrips];
  F32x16 zero[kStrips];
  F32x16 min[kStrips];  // of blocks that have minima

  // The group begins at `begin`; `scales` are those of its kInt8Group depths.
  GroupScales(const AmxInt8Product& p, int begin, const BlockScales& scales) {
    for (int strip = 0; strip < kStrips; ++strip) {
      if (p.blocks) {
        const int at = (begin % kInt8Group / p.group * kStrips + strip) * kStrip;
        Load(scales.scale + at, scale[strip]);
        zero[strip] = F32x16{} + p.blocks->zero;
        min[strip] = F32x16{};
        if (p.blocks->mins) Load(scales.min + at, min[strip]);
      } else {
        const ptrdiff_t place = ScalePlace(p.b, begin) + strip * kStrip;
        LoadScales(p.format, p.b, place, scale[strip]);
        LoadZeros(p.format, p.b, place, zero[strip]);
        min[strip] = F32x16{};
      }
    }
  }
};

// total[r] (+)= (sums[r] - zero * a.sums[r]) * scales - a.sums[r] * mins for the rows
// [row, row + rows) of c and the group of `count` depths from `begin` on; then, where a
// group of the rows ends, c (+)= total * row scale. Fetches, row by row, what the
// group's depths stand for.
template <int kStrips>
void ScaleTiles(const AmxInt8Product& p, int begin, int count, int row, int rows,
                const BlockScales& scales, const int32_t* sums, float* totals) {
  const GroupScales<kStrips> group(p, begin, scales);
  const bool mins = p.blocks && p.blocks->mins;
  const bool first = begin % kInt8Group == 0;
  const bool last = EndsRowGroup(p.depth, begin + count);
  const int pairs = count / 2;
  for (int r = 0; r < rows; ++r) {
    const int due = pairs * (r + 1) / rows - pairs * r / rows;
    if (p.prefetch && due) PrefetchPairs(p.prefetch, due);
    const int32_t row_sum =
        p.blocks ? SubBlockSum(p.a, row + r, begin, count)
                 : p.a.sums[(row + r) * p.a.sum_stride + begin / p.a.group];
    const F32x16 minus = F32x16{} - static_cast<float>(row_sum);
    const F32x16 row_scale =
        F32x16{} + p.a.scales[(row + r) * p.a.scale_stride + begin / kInt8Group];
    float* c = p.c + (row + r) * kPanel;
#pragma GCC unroll 4
    for (int strip = 0; strip < kStrips; ++strip) {
      I32x16 tile_row;
      std::memcpy(&tile_row, sums + r * kPanel + strip * kStrip, sizeof tile_row);
      // Whole numbers below 2^24: exact.
      F32x16 sum = __builtin_convertvector(tile_row, F32x16);
      AddProduct(sum, minus, group.zero[strip]);
      F32x16 total = {};
      if (!first) Load(totals + r * kPanel + strip * kStrip, total);
      AddProduct(total, sum, group.scale[strip]);
      if (mins) AddProduct(total, minus, group.min[strip]);
      if (!last) {
        Store(total, totals + r * kPanel + strip * kStrip);
        continue;
      }
      F32x16 result = {};
      float* dst = c + strip * kStrip * p.b.apart;
      if (begin >= kInt8Group) Load(dst, result);
      AddProduct(result, total, row_scale);
      Store(result, dst);
    }
  }
}

template <typename Tiles>
class AmxInt8Gemm {
 public:
  static void Gemm(const FormatSpec& format, const Int8Rows& a, const QuantPanel& b,
                   int depth, int rows, float* c, Prefetch* prefetch) {
    const AmxBlocks* blocks = FindAmxBlocks(format.format);
    const AmxInt8Product product = {
        format, a,        b,      depth,
        c,      prefetch, blocks, blocks ? blocks->sub_depths : a.group};
    switch (b.strips) {
      case 1:
        return Rows<1>(product, rows);
      case 2:
        return Rows<2>(product, rows);
      case 3:
        return Rows<3>(product, rows);
      default:
        return Rows<4>(product, rows);
    }
  }

 private:
  // Bytes between rows of 32-bit lanes.
  template <int kStrips>
  static constexpr ptrdiff_t kLanes = kLaneBytes * kStrip * kStrips;

  // `tail` depths are what tiles 6 and 7 hold.
  static void Configure(int rows, int tail) {
    // Told apart from the configurations of the bfloat16 product by its sign.
    const int wanted = tail == kDepth ? -rows : -rows - kTileMaxRows;
    if (configured_rows == wanted) return;
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
      config.row_bytes[tile] = kTileRowBytes;
      config.rows[tile] = static_cast<uint8_t>(rows);
    }
    config.rows[5] = kTileDepth / kLaneBytes;
    config.row_bytes[6] = static_cast<uint16_t>(tail);
    config.rows[7] = static_cast<uint8_t>(tail / kLaneBytes);
    Tiles::Configure(config);
    configured_rows = wanted;
  }

  template <int kStrips>
  static void Rows(const AmxInt8Product& p, int rows) {
    const int whole = rows / kTileMaxRows * kTileMaxRows;
    if (whole) AllGroups<kStrips>(p, 0, whole, kTileMaxRows);
    if (rows > whole) AllGroups<kStrips>(p, whole, rows, rows - whole);
  }

  // The rows [row, end), `tile_rows` at a time, through all groups.
  template <int kStrips>
  static void AllGroups(const AmxInt8Product& p, int row, int end, int tile_rows) {
    Configure(tile_rows, p.group < kDepth ? p.group : kDepth);
    const int bits = p.blocks ? p.format.bits() : CodeBits(p.format);
    BlockScales scales;
    alignas(64) uint8_t bytes[kInt8Group * kStrip * kStrips];
    alignas(64) int32_t sums[kTileMaxRows * kPanel];
    alignas(64) float totals[kTileMaxRows * kPanel];
    for (int block = 0; block < p.depth; block += kInt8Group) {
      const int depth = GroupDepth(p.depth, block);
      const uint8_t* codes = p.b.codes + block * bits / 32 * kLanes<kStrips>;
      if (p.blocks) {
        p.blocks->unpack(p.b, block, depth, bytes);
        p.blocks->load_scales(p.b, block, depth, scales);
        codes = bytes;
      } else if (bits == 4) {
        UnpackNibbles(codes, depth, kStrips, bytes);
        codes = bytes;
      }
      for (int first = row; first < end; first += tile_rows) {
        for (int at = 0; at < depth; at += p.group) {
          const int count = GroupDepth(depth, at, p.group);
          Multiply<kStrips>(p.a.values + first * p.a.stride + block + at, p.a.stride,
                            codes + at / kLaneBytes * kLanes<kStrips>, count, sums);
          ScaleTiles<kStrips>(p, block + at, count, first, tile_rows, scales, sums,
                              totals);
        }
      }
    }
  }

  // The sums of one group.
  template <int kStrips>
  [[gnu::noinline]] static void Multiply(const int8_t* a, ptrdiff_t a_stride,
                                         const uint8_t* codes, int depth,
                                         int32_t* sums) {
    constexpr ptrdiff_t lanes = kLanes<kStrips>;
    Tiles::template Zero<0>();
    if constexpr (kStrips > 1) Tiles::template Zero<1>();
    if constexpr (kStrips > 2) Tiles::template Zero<2>();
    if constexpr (kStrips > 3) Tiles::template Zero<3>();
    const int8_t* end = a + depth / kTileDepth * kTileDepth;
    for (; a != end; a += kTileDepth, codes += kTileDepth / kLaneBytes * lanes) {
      Step<kStrips, 4, 5>(a, a_stride, codes, lanes);
    }
    if (depth % kTileDepth) Step<kStrips, 6, 7>(a, a_stride, codes, lanes);
    constexpr ptrdiff_t kStride = sizeof(int32_t) * kPanel;
    Tiles::template Store<0>(sums, kStride);
    if constexpr (kStrips > 1) Tiles::template Store<1>(sums + kStrip, kStride);
    if constexpr (kStrips > 2) Tiles::template Store<2>(sums + 2 * kStrip, kStride);
    if constexpr (kStrips > 3) Tiles::template Store<3>(sums + 3 * kStrip, kStride);
  }

  // One tile of a and its product with every strip.
  template <int kStrips, int kA, int kB>
  [[gnu::always_inline]] static void Step(const int8_t* a, ptrdiff_t a_stride,
                                          const uint8_t* codes, ptrdiff_t lanes) {
    Tiles::template Load<kA>(a, a_stride);
    Product<0, kA, kB>(codes, lanes);
    if constexpr (kStrips > 1) Product<1, kA, kB>(codes, lanes);
    if constexpr (kStrips > 2) Product<2, kA, kB>(codes, lanes);
    if constexpr (kStrips > 3) Product<3, kA, kB>(codes, lanes);
  }

  template <int kTile, int kA, int kB>
  [[gnu::always_inline]] static void Product(const uint8_t* codes, ptrdiff_t lanes) {
    Tiles::template Load<kB, kTileRowBytes * kTile>(codes, lanes);
    Tiles::template DotInt8<kTile, kA, kB>();
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_AMX_H_
