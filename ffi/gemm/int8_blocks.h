// The integer product with weights in the blocks of GGUF files, in vector registers,
// for AVX2, AVX-512 and VNNI.
//
// Depths that share a scale are few, 32 or 16, so sums are kept as those of the other
// small groups (int8_gemm.h): the integers of one sub-block, and float32 totals until a
// group of the rows ends.
//
// What a format is made of comes in two halves: its codes, as operands of the dot
// product, and its scales. These are put together once for all rows of a call,
// kInt8Group depths at a time. Few rows take codes as they lie in the panel. For more,
// those that are more than a mask away are unpacked to bytes first.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_BLOCKS_H_
#define KTJAX_FFI_GEMM_INT8_BLOCKS_H_

#include <cstring>
#include <span>

#include "format/blocks.h"
#include "gemm/int8_block_vector.h"
#include "gemm/int8_gemm.h"
#include "gemm/int8_rows.h"
#include "gemm/int8_vector.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

// Fetches to L1 what LoadBlockScales will read. With the codes in a stream of their own
// it comes in up to four more, which are too many for the CPU to follow. In assembly:
// see Fetch in moe/products.h.
template <Format kFormat>
void FetchBlockScales(const QuantPanel& b, int begin, int count) {
  constexpr BlockSpec kSpec = *FindBlocks(kFormat);
  const auto fetch = [&](const void* array, int bytes, int depths) {
    // Whole groups of `depths` that begin in these depths.
    const int64_t row = int64_t{bytes} * kStrip * b.strips;
    const char* at = static_cast<const char*>(array);
    const char* end = at + CeilDiv(begin + count, depths) * row;
    for (at += CeilDiv(begin, depths) * row; at < end; at += kCacheLine) {
      asm volatile("prefetcht0 %0" : : "m"(*at));
    }
  };
  fetch(b.scales, sizeof(uint16_t), kSpec.depths);
  if constexpr (kSpec.mins) fetch(b.mins, sizeof(uint16_t), kSpec.depths);
  if constexpr (kSpec.sub > 0) fetch(b.sub_scales, 1, kSpec.sub);
  if constexpr (kSpec.sub_mins == SubMins::kBytes) fetch(b.sub_mins, 1, kSpec.sub);
}

// The lines to fetch during the blocks of a call, in the order in which tiles come to
// them.
class BlockFetch {
 public:
  // In so many equal shares during a block.
  static constexpr int kShares = 4;

  // `read` lines are read during a block.
  BlockFetch(Prefetch* prefetch, int blocks, int read)
      : prefetch_(prefetch), blocks_(blocks), read_(read) {}

  // Begins a block.
  void Next() {
    if (run_.steps == 0) run_ = NextRun(prefetch_, blocks_, kDepth / 2, kShares, read_);
    --run_.steps;
    --blocks_;
    share_ = 0;
  }
  [[gnu::always_inline]] void Share() {
    const int before = run_.lines_per_step * share_ / kShares;
    const int lines = run_.lines_per_step * ++share_ / kShares - before;
    run_.near_bytes ? run_.Fetch<true>(lines) : run_.Fetch<false>(lines);
  }

 private:
  Prefetch* prefetch_;
  int blocks_;
  const int read_;
  int share_ = 0;
  PrefetchRun run_{.steps = 0};
};

// Up to kInt8Group depths of a product.
struct BlockGroup {
  const Int8Rows& a;
  const QuantPanel& b;
  float* c;
  int zero;  // subtracted from codes
  int begin;
  int blocks;            // of kDepth
  const uint8_t* words;  // of the first strip, in the panel or unpacked
  ptrdiff_t stride;      // bytes between words of an output
  ptrdiff_t block_bytes;
  const BlockScales& scales;
  BlockFetch& fetch;
};

// What the sub-blocks of a group need of the sums of codes of kRows rows.
template <typename B, int kRows>
struct SubBlockSums {
  // -zero * sum, or where there are minima -sum in float32.
  int32_t value[kRows][kInt8Group / B::kDepths];

  SubBlockSums(const BlockGroup& g, int row) {
    for (int r = 0; r < kRows; ++r) {
      if (g.blocks * kDepth == kInt8Group) {
        LoadGroup(g, row + r, value[r]);
        continue;
      }
      for (int i = 0; i < g.blocks * B::kSubs; ++i) {
        const int32_t sum =
            SubBlockSum(g.a, row + r, g.begin + i * B::kDepths, B::kDepths);
        value[r][i] = B::kMins ? __builtin_bit_cast(int32_t, static_cast<float>(-sum))
                               : -g.zero * sum;
      }
    }
  }

 private:
  // The same, all at once.
  [[gnu::always_inline]] static void LoadGroup(const BlockGroup& g, int row,
                                               int32_t* out) {
    static_assert(kInt8Group / kBlockSumDepths == 8);
    const int32_t* src = g.a.sums + row * g.a.sum_stride + g.begin / kBlockSumDepths;
    __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    if constexpr (B::kSubs == 1) {
      sums = _mm256_hadd_epi32(sums, sums);  // 0 1 0 1 2 3 2 3
      sums = _mm256_permute4x64_epi64(sums, 0x08);
    }
    if constexpr (B::kMins) {
      sums = _mm256_sub_epi32(_mm256_setzero_si256(), sums);
      sums = _mm256_castps_si256(_mm256_cvtepi32_ps(sums));
    } else {
      sums = _mm256_mullo_epi32(sums, _mm256_set1_epi32(-g.zero));
    }
    if constexpr (B::kSubs == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(sums));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sums);
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
        sum[r][v] = Int8Dot::Add(sum[r][v], Int8Dot::QuadPart<kPart>(quad[v]), value);
      }
    }
  };
  add.template operator()<0>();
  if constexpr (Int8Dot::kQuadParts > 1) add.template operator()<1>();
}

// total += the products of sub-block kSub of the block that begins at a.at and `words`;
// it is number `sub` of the group.
template <typename B, int kSub, bool kFetch, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddSubBlock(const BlockGroup& g, RowOperands a,
                                               const uint8_t* words, int strip, int sub,
                                               const SubBlockSums<B, kRows>& sums,
                                               FloatSums<kRows, kStrips>& total) {
  constexpr int kVectors = kStrips * kIntVectorsPerStrip;
  constexpr int kQuads = B::kDepths / 4, kFirst = kSub * kQuads;
  Int8Sums<kRows, kStrips> sum;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const IntVector::Int start =
        IntVector::Broadcast(B::kMins ? 0 : sums.value[r][sub]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = start;
  }
  const auto add_pair = [&]<int kQuad>() __attribute__((always_inline)) {
    if constexpr (kFetch) g.fetch.Share();
    AddQuad<B, kQuad, kRows, kStrips>(a, words, g.stride, sum);
    AddQuad<B, kQuad + 1, kRows, kStrips>(a, words, g.stride, sum);
  };
  add_pair.template operator()<kFirst>();
  add_pair.template operator()<kFirst + 2>();
  if constexpr (kQuads > 4) {
    add_pair.template operator()<4>();
    add_pair.template operator()<6>();
  }
  const ptrdiff_t at = ptrdiff_t{kStrip} * (sub * g.b.strips + strip);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const IntVector::Float minus = IntVector::BroadcastFloat(
        B::kMins ? __builtin_bit_cast(float, sums.value[r][sub]) : 0);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const ptrdiff_t n = at + IntVector::kLanes * v;
      const IntVector::Float scale = IntVector::LoadFloat(g.scales.scale + n);
      total[r][v] =
          IntVector::MulAdd(IntVector::ToFloat(sum[r][v]), scale, total[r][v]);
      if constexpr (B::kMins) {
        total[r][v] = IntVector::MulAdd(minus, IntVector::LoadFloat(g.scales.min + n),
                                        total[r][v]);
      }
    }
  }
}

// The totals of kStrips strips from number `strip` on.
template <typename B, bool kFetch, int kRows, int kStrips>
[[gnu::always_inline]] inline void AddBlocks(const BlockGroup& g, RowOperands a,
                                             int strip,
                                             const SubBlockSums<B, kRows>& sums,
                                             FloatSums<kRows, kStrips>& total) {
  const uint8_t* words = g.words + 4 * kStrip * strip;
  for (int block = 0; block < g.blocks; ++block) {
    if constexpr (kFetch) g.fetch.Next();
    AddSubBlock<B, 0, kFetch, kRows, kStrips>(g, a, words, strip, B::kSubs * block,
                                              sums, total);
    if constexpr (B::kSubs > 1) {
      AddSubBlock<B, 1, kFetch, kRows, kStrips>(g, a, words, strip,
                                                B::kSubs * block + 1, sums, total);
    }
    a.at += kDepth;
    words += g.block_bytes;
  }
}

// kRows rows through a group, kStrips strips at a time.
template <typename B, int kRows, int kStrips>
void BlockTile(const BlockGroup& g, int row) {
  const Int8Rows& a = g.a;
  alignas(64) char buffer[kRows * Int8Dot::kBufferBytes + 1];
  const RowOperands operands = Int8Dot::Rows(
      a.values + row * a.stride + g.begin, a.stride, kRows, g.blocks * kDepth, buffer);
  const SubBlockSums<B, kRows> sums(g, row);
  const float* row_scales = a.scales + row * a.scale_stride + g.begin / kInt8Group;
  const ptrdiff_t c_step = kStrip * g.b.apart;  // between strips
  float* c = g.c + row * kPanel;
  for (int strip = 0; strip < g.b.strips; strip += kStrips, c += kStrips * c_step) {
    FloatSums<kRows, kStrips> total;
    ClearTotals<kRows, kStrips>(total);
    // The first sweep fetches.
    if (strip == 0) {
      AddBlocks<B, true, kRows, kStrips>(g, operands, strip, sums, total);
    } else {
      AddBlocks<B, false, kRows, kStrips>(g, operands, strip, sums, total);
    }
    StoreTotals<kRows, kStrips>(total, row_scales, a.scale_stride, c_step, c);
  }
}

using BlockTileFn = void (*)(const BlockGroup&, int);

// As many rows as there are registers for sums and totals, of one strip or more.
template <typename B>
constexpr BlockTileFn kStripTiles[] = {BlockTile<B, 1, 1>, BlockTile<B, 2, 1>,
                                       BlockTile<B, 3, 1>};
template <typename B>
constexpr BlockTileFn kPairTiles[] = {BlockTile<B, 1, 2>, BlockTile<B, 2, 2>,
                                      BlockTile<B, 3, 2>, BlockTile<B, 4, 2>,
                                      BlockTile<B, 5, 2>, BlockTile<B, 6, 2>};
template <typename B>
constexpr BlockTileFn kPanelTiles[] = {BlockTile<B, 1, 4>, BlockTile<B, 2, 4>,
                                       BlockTile<B, 3, 4>};

// So many rows take codes as they lie in a panel: a tile of all its strips.
constexpr int kPackedRows = 3;

template <typename B>
std::span<const BlockTileFn> BlockTiles(int strips, bool packed) {
  if constexpr (IntVector::kTileStrips > 1) {
    if (packed && strips == 4) return kPanelTiles<B>;
    if constexpr (B::kCheap) {
      if (!packed && strips % 2 == 0) return kPairTiles<B>;
    }
  }
  return kStripTiles<B>;
}

// gemm_int8 with weights in blocks.
template <Format kFormat>
void BlocksGemm(const Int8Rows& a, const QuantPanel& b, int depth, int rows, float* c,
                Prefetch* prefetch) {
  using B = typename BlockCodesOf<kFormat>::Type;
  using Bytes = typename BlockCodesOf<kFormat>::Bytes;
  const bool packed = rows <= kPackedRows, unpack = !packed && !B::kCheap;
  const std::span<const BlockTileFn> tiles =
      unpack ? BlockTiles<Bytes>(b.strips, false) : BlockTiles<B>(b.strips, packed);
  const int most = static_cast<int>(tiles.size());
  const ptrdiff_t stride = ptrdiff_t{4} * kStrip * b.strips;
  alignas(64) uint8_t bytes[kInt8Group * kPanel];
  BlockScales scales;
  for (int r = 0; r < rows; ++r) {
    for (int strip = 0; strip < b.strips; ++strip) {
      ClearRows<1>(c + r * kPanel + kStrip * b.apart * strip, 1);
    }
  }
  const int sweeps = static_cast<int>(CeilDiv(rows, most));
  BlockFetch fetch(prefetch, sweeps * (depth / kDepth),
                   static_cast<int>(CeilDiv(B::kBits * b.strips, sweeps)));
  for (int begin = 0; begin < depth; begin += kInt8Group) {
    const int count = depth - begin < kInt8Group ? depth - begin : kInt8Group;
    FetchScales(prefetch, begin, begin + count, depth);
    if (prefetch && prefetch->near_bytes) {
      const int ahead = begin + 2 * kInt8Group, left = depth - ahead;
      if (left > 0) {
        FetchBlockScales<kFormat>(b, ahead, left < kInt8Group ? left : kInt8Group);
      }
    }
    LoadBlockScales<kFormat>(b, begin, count, scales);
    const uint8_t* words = b.codes + begin / kDepth * B::kBits * stride;
    if (unpack) UnpackBlocks<kFormat>(b, begin, count, bytes);
    const BlockGroup group = {.a = a,
                              .b = b,
                              .c = c,
                              .zero = CodeOfZero(*FindBlocks(kFormat)),
                              .begin = begin,
                              .blocks = count / kDepth,
                              .words = unpack ? bytes : words,
                              .stride = stride,
                              .block_bytes = (unpack ? 8 : B::kBits) * stride,
                              .scales = scales,
                              .fetch = fetch};
    ForEqualTiles(rows, most,
                  [&](int row, int count) { tiles[count - 1](group, row); });
  }
}

// gemm_int8 of all formats.
inline void VectorInt8Gemm(const FormatSpec& format, const Int8Rows& a,
                           const QuantPanel& b, int depth, int rows, float* c,
                           Prefetch* prefetch) {
  const auto multiply = [&]<Format kFormat>() {
    BlocksGemm<kFormat>(a, b, depth, rows, c, prefetch);
  };
  if (!WithBlockFormat(format.format, multiply)) {
    Int8Gemm(format, a, b, depth, rows, c, prefetch);
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_BLOCKS_H_
