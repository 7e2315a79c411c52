// Products of few rows with a panel of INT4 codes, without decoding it first.
//
// The depths of one output share a scale, and so do its sixteen possible values: in a
// vector of one output, or of a pair of them, a weight is one VPERMW away from its
// code. In the layout of panels (format/format.h) a vector has sixteen outputs, so
// codes change places first, which costs a fraction of what their values would:
//   over depths   32 depths of an output; the rows of x are operands as they lie.
//   over outputs  16 depths of a pair of outputs: what TransposeHalf makes of values.
// Values are those of `decode` to the bit.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_NIBBLES_AVX512_H_
#define KTJAX_FFI_GEMM_NIBBLES_AVX512_H_

#include "gemm/decode_avx512.h"
#include "gemm/pack_avx512.h"

namespace ktjax {
namespace {

// The values of the codes of one output in every half, or of two outputs.
struct ValueTable {
  alignas(64) bf16 value[2][16];
};

// The scales and zero points of a strip for one group of depths.
template <typename L>
class ValueTables {
 public:
  ValueTables(const QuantPanel& panel, int group, int strip)
      : panel_(panel), first_((int64_t{group} * panel.strips + strip) * kStrip) {
    typename Avx512Decoder<L>::Row row;
    ordinary_ = Avx512Decoder<L>::LoadRow(panel, first_, row);
    _mm512_store_ps(scale_, row.scale);
    if constexpr (L::kZeros) _mm512_store_ps(zero_, row.zero);
  }

  // The table of outputs `even` and `odd` of the strip.
  __m512i Pair(int even, int odd) const {
    if (!ordinary_) [[unlikely]]
      return RarePair(even, odd);
    return RoundTwo(Values(even), Values(odd));
  }

 private:
  __m512 Values(int output) const {
    const __m512 codes =
        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 zero =
        _mm512_set1_ps(L::kZeros ? zero_[output] : ImpliedZero(Code::kInt4));
    return _mm512_mul_ps(_mm512_sub_ps(codes, zero), _mm512_set1_ps(scale_[output]));
  }

  [[gnu::noinline]] __m512i RarePair(int even, int odd) const {
    ValueTable table;
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first_ + (half ? odd : even);
      const int zero = panel_.zeros ? panel_.zeros[at] : ImpliedZero(Code::kInt4);
      for (int code = 0; code < 16; ++code) {
        table.value[half][code] = ValueBits(CodeValue<Code::kInt4>(code, zero),
                                            ScaleValue<L::kScale>(panel_.scales, at));
      }
    }
    return _mm512_load_si512(&table);
  }

  const QuantPanel& panel_;
  const int64_t first_;
  bool ordinary_;
  alignas(64) float scale_[16];
  alignas(64) float zero_[16];
};

// The bytes of codes that become the words of a vector, and how far the words are
// shifted down; what stays above a code is cut off later.
struct SpreadIndex {
  alignas(64) uint8_t byte[4][64];
  alignas(64) uint16_t shift[32];
};

// From the same four outputs of four lines (32 depths), output i: word w of a 128-bit
// lane is depth w of its line.
constexpr SpreadIndex kOverDepths = [] {
  SpreadIndex index{};
  for (int lane = 0; lane < 4; ++lane) {
    for (int w = 0; w < 8; ++w) {
      for (int i = 0; i < 4; ++i) {
        index.byte[i][16 * lane + 2 * w] = static_cast<uint8_t>(4 * i + w % 4);
        index.byte[i][16 * lane + 2 * w + 1] = 0x80;  // zero
      }
      index.shift[8 * lane + w] = w < 4 ? 0 : 4;
    }
  }
  return index;
}();

// From the same four outputs of two lines, each twice: word w of 128-bit lane l is
// depth 4 (l % 2) + w / 2 of its line and output 2 i + w % 2.
constexpr SpreadIndex kOverOutputs = [] {
  SpreadIndex index{};
  for (int lane = 0; lane < 4; ++lane) {
    for (int w = 0; w < 8; ++w) {
      for (int i = 0; i < 2; ++i) {
        index.byte[i][16 * lane + 2 * w] =
            static_cast<uint8_t>(4 * (2 * i + w % 2) + w / 2);
        index.byte[i][16 * lane + 2 * w + 1] = 0x80;
      }
      index.shift[8 * lane + w] = lane % 2 ? 4 : 0;
    }
  }
  return index;
}();

[[gnu::always_inline]] inline __m512i SpreadCodes(const SpreadIndex& index, int i,
                                                  __m512i lines) {
  const __m512i words = _mm512_shuffle_epi8(lines, _mm512_load_si512(index.byte[i]));
  return _mm512_srlv_epi16(words, _mm512_load_si512(index.shift));
}

// c[r][4 q + i] = the products of rows with outputs 4 kQuad + i of a strip.
template <typename L, int kRows, int kQuad>
void DotQuad(const bf16* a, ptrdiff_t a_stride, const QuantPanel& panel, int strip,
             int depth, float* c, Prefetch* prefetch) {
  constexpr int kLanes = kQuad * 0x55;  // lane kQuad of either operand, twice
  const ptrdiff_t stride = 64 * panel.strips;
  const uint8_t* codes = panel.codes + 64 * strip;
  __m512 sum[4][kRows];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[i][r] = _mm512_setzero_ps();
  }
  for (int begin = 0, group = 0; begin < depth; begin += panel.group, ++group) {
    const int left = depth - begin;
    const ValueTables<L> tables(panel, group, strip);
    __m512i table[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) table[i] = tables.Pair(4 * kQuad + i, 4 * kQuad + i);
    for (int blocks = (left < panel.group ? left : panel.group) / kDepth; blocks > 0;) {
      PrefetchRun run = NextRun(prefetch, blocks, 1);
      blocks -= run.steps;
      for (; run.steps > 0; --run.steps) {
        run.Fetch<false>(run.lines_per_step);
        const __m512i first = _mm512_shuffle_i32x4(
            _mm512_loadu_si512(codes), _mm512_loadu_si512(codes + stride), kLanes);
        const __m512i second =
            _mm512_shuffle_i32x4(_mm512_loadu_si512(codes + 2 * stride),
                                 _mm512_loadu_si512(codes + 3 * stride), kLanes);
        const __m512i lines = _mm512_shuffle_i32x4(first, second, 0x88);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          // The bit above a code does not matter: both halves of a table are alike.
          const __m512bh values = (__m512bh)_mm512_permutexvar_epi16(
              SpreadCodes(kOverDepths, i, lines), table[i]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sum[i][r] = _mm512_dpbf16_ps(
                sum[i][r], (__m512bh)_mm512_loadu_si512(a + r * a_stride), values);
          }
        }
        codes += 4 * stride;
        a += kDepth;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      c[r * kPanel + kStrip * strip + 4 * kQuad + i] = _mm512_reduce_add_ps(sum[i][r]);
    }
  }
}

template <typename L, int kRows>
void DotRows(const bf16* a, ptrdiff_t a_stride, const QuantPanel& panel, int depth,
             float* c, Prefetch* prefetch) {
  for (int s = 0; s < panel.strips; ++s) {
    DotQuad<L, kRows, 0>(a, a_stride, panel, s, depth, c, prefetch);
    DotQuad<L, kRows, 1>(a, a_stride, panel, s, depth, c, prefetch);
    DotQuad<L, kRows, 2>(a, a_stride, panel, s, depth, c, prefetch);
    DotQuad<L, kRows, 3>(a, a_stride, panel, s, depth, c, prefetch);
  }
}

// Four outputs at a time have registers for four rows.
template <typename L>
void DotNibbles(const bf16* a, ptrdiff_t a_stride, int rows, const QuantPanel& panel,
                int depth, float* c, Prefetch* prefetch) {
  using Dot =
      void (*)(const bf16*, ptrdiff_t, const QuantPanel&, int, float*, Prefetch*);
  static constexpr Dot kDot[] = {DotRows<L, 1>, DotRows<L, 2>, DotRows<L, 3>,
                                 DotRows<L, 4>};
  for (int row = 0; row < rows;) {
    const int tiles = (rows - row + 3) / 4;
    const int count = (rows - row + tiles - 1) / tiles;
    kDot[count - 1](a + row * a_stride, a_stride, panel, depth, c + row * kPanel,
                    prefetch);
    row += count;
  }
}

template <typename L, int kRows>
void ContractCodeRows(const StripRows& a, const QuantPanel& panel, int first_pair,
                      int pairs, float* c, ptrdiff_t c_stride, Prefetch* prefetch) {
  constexpr int kPairs = 8;  // one vector of depths
  const int strips = panel.strips;
  const uint8_t* codes = panel.codes + first_pair / 4 * int64_t{64} * strips;
  const __m512i code_bits = _mm512_set1_epi16(15);
  const __m512i odd = _mm512_set1_epi32(16 << 16);  // the table's second half
  constexpr int kAndOr = 0xea;
  ValueTable tables[kPanelStrips][kPairs];
  int group_end = 2 * first_pair;
  for (int pair = 0; pair < pairs;) {
    PrefetchRun run = NextRun(prefetch, (pairs - pair) / kPairs, kPairs, strips);
    for (int step = 0; step < run.steps; ++step, pair += kPairs) {
      if (const int depth = 2 * (first_pair + pair); depth >= group_end) {
        const int group = depth / panel.group;
        group_end = (group + 1) * panel.group;
        for (int s = 0; s < strips; ++s) {
          const ValueTables<L> values(panel, group, s);
          for (int p = 0; p < kPairs; ++p) {
            _mm512_store_si512(&tables[s][p], values.Pair(2 * p, 2 * p + 1));
          }
        }
      }
      const int lines = run.lines_per_step / strips;
      __m512 sum[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r] = _mm512_loadu_ps(c + r * c_stride + 2 * pair);
      }
      for (int s = 0; s < strips; ++s) {
        run.Fetch<false>(lines);
        const __m512i first = _mm512_loadu_si512(codes + 64 * s);
        const __m512i second = _mm512_loadu_si512(codes + 64 * (strips + s));
        const __m512i quads[] = {_mm512_shuffle_i32x4(first, second, 0x00),
                                 _mm512_shuffle_i32x4(first, second, 0x55),
                                 _mm512_shuffle_i32x4(first, second, 0xaa),
                                 _mm512_shuffle_i32x4(first, second, 0xff)};
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p) {
          const __m512i index = _mm512_ternarylogic_epi32(
              SpreadCodes(kOverOutputs, p % 2, quads[p / 2]), code_bits, odd, kAndOr);
          const __m512bh values = (__m512bh)_mm512_permutexvar_epi16(
              index, _mm512_load_si512(&tables[s][p]));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512i value = SpreadPair(a.strip[s] + r * a.stride + 2 * p);
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)value, values);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * c_stride + 2 * pair, sum[r]);
      }
      codes += 128 * strips;
    }
  }
}

template <typename L>
void ContractCodes(const StripRows& a, int rows, const QuantPanel& panel,
                   int first_pair, int pairs, float* c, ptrdiff_t c_stride,
                   Prefetch* prefetch) {
  using Contract = void (*)(const StripRows&, const QuantPanel&, int, int, float*,
                            ptrdiff_t, Prefetch*);
  static constexpr Contract kContract[] = {
      ContractCodeRows<L, 1>, ContractCodeRows<L, 2>, ContractCodeRows<L, 3>,
      ContractCodeRows<L, 4>, ContractCodeRows<L, 5>, ContractCodeRows<L, 6>,
      ContractCodeRows<L, 7>, ContractCodeRows<L, 8>};
  static_assert(sizeof kContract / sizeof kContract[0] == kMaxContractRows);
  kContract[rows - 1](a, panel, first_pair, pairs, c, c_stride, prefetch);
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_NIBBLES_AVX512_H_
