// The product over the outputs of a panel, for few rows: the panel is transposed in
// registers, block by block, and multiplied at once. Nothing is written but c, so a
// block costs 48 shuffles beside its loads, and panels stream from memory.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_CONTRACT_AVX512_H_
#define KTJAX_FFI_GEMM_CONTRACT_AVX512_H_

#include <immintrin.h>

#include "gemm/kernel.h"
#include "gemm/pack_avx512.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

// sums += 16 depths (8 pairs of a strip, from `in` on) times the 16 outputs of the
// strip.
template <int kRows>
[[gnu::always_inline]] inline void AddOutputs(const bf16* in, ptrdiff_t in_stride,
                                              const bf16* a, ptrdiff_t a_stride,
                                              __m512i low, __m512i high,
                                              __m512 (&sum)[kRows]) {
  __m512i t[8];  // of output pairs 0..7, lane d: depth d
  TransposeHalf(in, in_stride, low, high, t);
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = SpreadPair(a + r * a_stride + 2 * pair);
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)value, (__m512bh)t[pair]);
    }
  }
}

template <int kRows>
void ContractRows(const StripRows& a, const bf16* panel, int strips, int pairs,
                  float* c, ptrdiff_t c_stride, Prefetch* prefetch) {
  const __m512i low = _mm512_loadu_si512(kTransposeIndex.word[0]);
  const __m512i high = _mm512_loadu_si512(kTransposeIndex.word[1]);
  const ptrdiff_t stride = 2 * kStrip * strips;
  constexpr int kPairs = 8;  // one vector of depths
  for (int pair = 0; pair < pairs;) {
    PrefetchRun run = NextRun(prefetch, (pairs - pair) / kPairs, kPairs, strips);
    for (int step = 0; step < run.steps; ++step, pair += kPairs) {
      const int lines = run.lines_per_step / strips;
      __m512 sum[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r] = _mm512_loadu_ps(c + r * c_stride + 2 * pair);
      }
      const bf16* in = panel + pair * stride;
      for (int s = 0; s < strips; ++s) {
        run.Fetch<false>(lines);
        AddOutputs<kRows>(in + 2 * kStrip * s, stride, a.strip[s], a.stride, low, high,
                          sum);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * c_stride + 2 * pair, sum[r]);
      }
    }
  }
}

inline void Avx512ContractOutputs(const StripRows& a, int rows, const bf16* panel,
                                  int strips, int pairs, float* c, ptrdiff_t c_stride,
                                  Prefetch* prefetch) {
  using Contract =
      void (*)(const StripRows&, const bf16*, int, int, float*, ptrdiff_t, Prefetch*);
  static constexpr Contract kContract[] = {
      ContractRows<1>, ContractRows<2>, ContractRows<3>, ContractRows<4>,
      ContractRows<5>, ContractRows<6>, ContractRows<7>, ContractRows<8>};
  static_assert(sizeof kContract / sizeof kContract[0] == kMaxContractRows);
  kContract[rows - 1](a, panel, strips, pairs, c, c_stride, prefetch);
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_CONTRACT_AVX512_H_
