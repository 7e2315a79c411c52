// The integer product with weights in the blocks of GGUF files, in vector registers,
// for AVX2, AVX-512 and VNNI.
//
// Depths that share a scale are few, 32 or 16, so sums are kept as those of the other
// small groups (int8_gemm.h): the integers of one sub-block, and float32 totals until a
// group of the rows ends. What a format is made of comes in two halves: its codes, as
// operands of the dot product, and its scales, put together for kInt8Group depths at a
// time, once for all rows of a tile.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_BLOCKS_H_
#define KTJAX_FFI_GEMM_INT8_BLOCKS_H_

#include <algorithm>
#include <cstring>
#include <utility>

#include "format/blocks.h"
#include "gemm/int8_gemm.h"
#include "gemm/int8_rows.h"
#include "gemm/int8_vector.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

// How the codes of a format lie in a block: all that the product depends on, so formats
// that agree in it share their code.
template <int kCodeBits, bool kTableCodes, int kSubDepths, bool kMinima>
struct BlockCodes {
  static constexpr int kBits = kCodeBits;
  static constexpr int kDepths = kSubDepths;  // of a sub-block
  static constexpr int kSubs = kDepth / kDepths;
  static constexpr bool kMins = kMinima;

  // The codes of quad kQuad (see QuantPanel) of IntVector::kLanes outputs as unsigned
  // bytes. Words are `stride` bytes apart.
  template <int kQuad>
  [[gnu::always_inline]] static IntVector::Int Quad(const uint8_t* words,
                                                    ptrdiff_t stride) {
    if constexpr (kBits == 8) {
      return IntVector::Load(words + kQuad * stride);
    } else {
      constexpr int kLow = kBits < 4 ? 2 : 4, kPerWord = 8 / kLow, kHigh = kBits - kLow;
      constexpr int kShift = kLow * (kQuad % kPerWord);
      // Bits that come from the neighbouring byte are masked.
      IntVector::Int codes = Shift<-kShift>(
          IntVector::Load(words + kQuad / kPerWord * stride));
      if constexpr (kHigh > 0) {
        constexpr int kAt = kHigh == 1 ? kQuad : 2 * (kQuad % 4);
        const IntVector::Int high =
            IntVector::Load(words + (kLow + kHigh * kQuad / 8) * stride);
        codes = IntVector::Select(Bytes((1 << kLow) - 1), codes,
                                  Shift<kLow - kAt>(high));
      }
      codes = IntVector::And(codes, Bytes((1 << kBits) - 1));
      return kTableCodes ? IntVector::LookUp(kIq4Codes, codes) : codes;
    }
  }

 private:
  static IntVector::Int Bytes(int value) {
    return IntVector::Broadcast(0x01010101 * value);
  }
  // To the left, or to the right where kCount is below 0.
  template <int kCount>
  static IntVector::Int Shift(IntVector::Int bits) {
    if constexpr (kCount > 0) return IntVector::ShiftLeft16<kCount>(bits);
    if constexpr (kCount < 0) return IntVector::ShiftRight16<-kCount>(bits);
    return bits;
  }
};

template <Format kFormat>
struct BlockCodesOf {
  static constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  using Type = BlockCodes<kSpec.bits, kSpec.table, SubDepths(kSpec), kSpec.mins>;
};

// The scales of kInt8Group depths, [sub-blocks][16 * strips of the tile].
struct BlockScales {
  static constexpr int kSize = kInt8Group / 16 * kPanel;
  alignas(64) float scale[kSize];
  alignas(64) float min[kSize];  // where the format has minima
};

// Fills the scales of `count` depths from `begin` on, for `strips` strips from number
// `strip` on.
template <Format kFormat>
void LoadBlockScales(const QuantPanel& b, int begin, int count, int strip, int strips,
                     BlockScales& out) {
  using Float = IntVector::Float;
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  constexpr int kSubDepths = SubDepths(kSpec);
  const ptrdiff_t lanes = kStrip * b.strips;
  const int width = kStrip * strips;
  for (int n = 0; n < width; n += IntVector::kLanes) {
    const ptrdiff_t first = kStrip * strip + n;
    Float of_block[2];  // scale and minimum
    for (int i = 0; i < count / kSubDepths; ++i) {
      const int d = begin + i * kSubDepths;
      if (i == 0 || d % kSpec.depths == 0) {
        const ptrdiff_t at = d / kSpec.depths * lanes + first;
        of_block[0] =
            IntVector::LoadHalves(static_cast<const uint16_t*>(b.scales) + at);
        if constexpr (kSpec.mins) of_block[1] = IntVector::LoadHalves(b.mins + at);
      }
      Float scale = of_block[0], min = kSpec.mins ? of_block[1] : IntVector::Zero();
      if constexpr (kSpec.sub > 0) {
        const ptrdiff_t sub = d / kSubDepths * lanes + first;
        IntVector::Int code = IntVector::WidenBytes(b.sub_scales + sub);
        if constexpr (kSpec.sub_mins == SubMins::kPacked) {
          min = IntVector::Mul(min, IntVector::ToFloat(IntVector::ShiftRight16<4>(code)));
          code = IntVector::And(code, IntVector::Broadcast(15));
        }
        if constexpr (kSpec.sub_mins == SubMins::kBytes) {
          min = IntVector::Mul(min, IntVector::ToFloat(
                                        IntVector::WidenBytes(b.sub_mins + sub)));
        }
        code = IntVector::Sub(code, IntVector::Broadcast(kSpec.sub_zero));
        scale = IntVector::Mul(scale, IntVector::ToFloat(code));
      }
      IntVector::Store(scale, out.scale + i * width + n);
      if constexpr (kSpec.mins) IntVector::Store(min, out.min + i * width + n);
    }
  }
}

struct BlockProduct {
  const Int8Rows& a;
  const QuantPanel& b;
  float* c;
  int zero;  // subtracted from codes
  void (*load_scales)(const QuantPanel& b, int begin, int count, int strip, int strips,
                      BlockScales& out);
};

// What the sub-blocks of kInt8Group depths of kRows rows need of the sums of codes.
template <typename B, int kRows>
struct SubBlockSums {
  static constexpr int kCount = kInt8Group / B::kDepths;
  int32_t start[kRows][kCount];  // -zero * sum
  float minus[kRows][kCount];    // -sum

  SubBlockSums(const BlockProduct& p, int row, int begin, int count) {
    for (int r = 0; r < kRows; ++r) {
      const int32_t* sums =
          p.a.sums + (row + r) * p.a.sum_stride + begin / kBlockSumDepths;
      for (int i = 0; i < count / B::kDepths; ++i) {
        const int32_t sum = B::kDepths == 16 ? sums[i] : sums[2 * i] + sums[2 * i + 1];
        if constexpr (B::kMins) {
          minus[r][i] = static_cast<float>(-sum);
        } else {
          start[r][i] = -p.zero * sum;
        }
      }
    }
  }
};

// sum += a . codes over one quad.
template <typename B, int kQuad, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddQuad(RowOperands a, const uint8_t* words,
                                           ptrdiff_t stride,
                                           Int8Sums<kRows, kStrips>& sum) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  IntVector::Int quad[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    quad[v] = B::template Quad<kQuad>(words + 4 * IntVector::kLanes * v, stride);
  }
  const auto add = [&]<int kPart>() __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int32_t bits;
      std::memcpy(&bits, a.at + r * a.stride + Int8Dot::QuadOffset(kQuad, kPart),
                  sizeof bits);
      const IntVector::Int value = IntVector::Broadcast(bits);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] =
            Int8Dot::Add(sum[r][v], Int8Dot::QuadPart<kPart>(quad[v]), value);
      }
    }
  };
  add.template operator()<0>();
  if constexpr (Int8Dot::kQuadParts > 1) add.template operator()<1>();
}

// Fetches a step's lines in so many shares.
constexpr int kBlockShares = 4;

// total += the products of block `block` of kInt8Group depths, whose words begin at
// `words`.
template <typename B, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddBlock(RowOperands a, const uint8_t* words,
                                            ptrdiff_t stride, int block,
                                            const SubBlockSums<B, kRows>& sums,
                                            const BlockScales& scales, PrefetchRun& run,
                                            int lines,
                                            FloatSums<kRows, kStrips>& total) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  constexpr int kQuads = B::kDepths / 4;
  const auto add_sub = [&]<int kSub>() __attribute__((always_inline)) {
    const int sub = B::kSubs * block + kSub;
    Int8Sums<kRows, kStrips> sum;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const IntVector::Int start =
          IntVector::Broadcast(B::kMins ? 0 : sums.start[r][sub]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = start;
    }
    const auto add_pair = [&]<int kQuad>() __attribute__((always_inline)) {
      if (lines) run.near ? run.Fetch<true>(lines) : run.Fetch<false>(lines);
      AddQuad<B, kQuad, kRows, kStrips>(a, words, stride, sum);
      AddQuad<B, kQuad + 1, kRows, kStrips>(a, words, stride, sum);
    };
    add_pair.template operator()<kSub * kQuads>();
    add_pair.template operator()<kSub * kQuads + 2>();
    if constexpr (kQuads > 4) {
      add_pair.template operator()<4>();
      add_pair.template operator()<6>();
    }
    const float* scale = scales.scale + sub * kStrips * kStrip;
    const float* min = scales.min + sub * kStrips * kStrip;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const IntVector::Float minus =
          IntVector::BroadcastFloat(B::kMins ? sums.minus[r][sub] : 0);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int n = IntVector::kLanes * v;
        total[r][v] = IntVector::MulAdd(IntVector::ToFloat(sum[r][v]),
                                        IntVector::LoadFloat(scale + n), total[r][v]);
        if constexpr (B::kMins) {
          total[r][v] =
              IntVector::MulAdd(minus, IntVector::LoadFloat(min + n), total[r][v]);
        }
      }
    }
  };
  add_sub.template operator()<0>();
  if constexpr (B::kSubs > 1) add_sub.template operator()<1>();
}

// kRows rows through all depths, kStrips strips at a time.
template <typename B, int kRows, int kStrips>
void BlockTile(const BlockProduct& p, int row, int depth, Prefetch* prefetch) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  const Int8Rows& a = p.a;
  const QuantPanel& b = p.b;
  alignas(64) char buffer[kRows * Int8Dot::kBufferBytes + 1];
  BlockScales scales;
  const ptrdiff_t lanes = 4 * kStrip * b.strips;
  const ptrdiff_t block_bytes = B::kBits * lanes;
  PrefetchRun run{.steps = 0};
  for (int begin = 0; begin < depth; begin += kInt8Group) {
    const int blocks = std::min(depth - begin, kInt8Group) / kDepth;
    RowOperands operands =
        Int8Dot::Rows(a.values + row * a.stride + begin, a.stride, kRows,
                      blocks * kDepth, buffer);
    const SubBlockSums<B, kRows> sums(p, row, begin, blocks * kDepth);
    const float* row_scales = a.scales + row * a.scale_stride + begin / kInt8Group;
    if (row == 0) FetchScales(prefetch, begin, begin + blocks * kDepth, depth);
    for (int strip = 0; strip < b.strips; strip += kStrips) {
      p.load_scales(b, begin, blocks * kDepth, strip, kStrips, scales);
      const uint8_t* words =
          b.codes + begin / kDepth * block_bytes + 4 * kStrip * strip;
      FloatSums<kRows, kStrips> total;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) total[r][v] = IntVector::Zero();
      }
      RowOperands at = operands;
      for (int block = 0; block < blocks; ++block) {
        int lines = 0;  // of a share; the first sweep fetches
        if (strip == 0) {
          if (run.steps == 0) {
            run = NextRun(prefetch, (depth - begin) / kDepth - block, kDepth / 2,
                          kBlockShares);
          }
          --run.steps;
          lines = run.lines_per_step / kBlockShares;
        }
        AddBlock<B, kRows, kStrips>(at, words, lanes, block, sums, scales, run, lines,
                                    total);
        at.at += kDepth;
        words += block_bytes;
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const IntVector::Float row_scale =
            IntVector::BroadcastFloat(row_scales[r * a.scale_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int in_strip = IntVector::kLanes * v % kStrip;
          const int place = strip + IntVector::kLanes * v / kStrip;
          float* dst = p.c + (row + r) * kPanel + kStrip * b.apart * place + in_strip;
          const IntVector::Float before =
              begin ? IntVector::LoadFloat(dst) : IntVector::Zero();
          IntVector::Store(IntVector::MulAdd(total[r][v], row_scale, before), dst);
        }
      }
    }
  }
}

// As many rows and strips at a time as there are registers for sums and totals.
template <typename B>
void BlockTiles(const BlockProduct& p, int depth, int rows, Prefetch* prefetch) {
  using Tile = Int8TileFn<BlockProduct>;
  if constexpr (IntVector::kTileStrips > 1) {
    static constexpr Tile kPairs[] = {BlockTile<B, 1, 2>, BlockTile<B, 2, 2>,
                                      BlockTile<B, 3, 2>, BlockTile<B, 4, 2>,
                                      BlockTile<B, 5, 2>, BlockTile<B, 6, 2>};
    static constexpr Tile kPanels[] = {BlockTile<B, 1, 4>, BlockTile<B, 2, 4>,
                                       BlockTile<B, 3, 4>, BlockTile<B, 4, 2>,
                                       BlockTile<B, 5, 2>, BlockTile<B, 6, 2>};
    if (p.b.strips == 4) return RunInt8Tiles(kPanels, p, depth, rows, prefetch);
    if (p.b.strips == 2) return RunInt8Tiles(kPairs, p, depth, rows, prefetch);
  }
  static constexpr Tile kSingle[] = {BlockTile<B, 1, 1>, BlockTile<B, 2, 1>,
                                     BlockTile<B, 3, 1>};
  RunInt8Tiles(kSingle, p, depth, rows, prefetch);
}

// gemm_int8 with weights in blocks.
inline void BlocksGemm(const Int8Rows& a, const QuantPanel& b, int depth, int rows,
                       float* c, Prefetch* prefetch) {
  WithBlockFormat(b.format, [&]<Format kFormat>() {
    BlockTiles<typename BlockCodesOf<kFormat>::Type>(
        {a, b, c, CodeOfZero(*FindBlocks(kFormat)), LoadBlockScales<kFormat>}, depth,
        rows, prefetch);
  });
}

// gemm_int8 of all formats.
inline void VectorInt8Gemm(const FormatSpec& format, const Int8Rows& a,
                           const QuantPanel& b, int depth, int rows, float* c,
                           Prefetch* prefetch) {
  if (format.blocks) return BlocksGemm(a, b, depth, rows, c, prefetch);
  Int8Gemm(format, a, b, depth, rows, c, prefetch);
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_BLOCKS_H_
