// Rounding to bfloat16 with AVX-512 BF16.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_ROUND_AVX512_H_
#define KTJAX_FFI_GEMM_ROUND_AVX512_H_

#ifdef __AVX512BF16__

#include <immintrin.h>

namespace ktjax {
namespace {

// The bfloat16 of `first`, then those of `second`, to nearest even; denormals count as
// zero.
inline __m512i RoundTwo(__m512 first, __m512 second) {
#ifdef KTJAX_NO_CVTNE2PS  // for emulators that get VCVTNE2PS2BF16 wrong (Bochs 3.0)
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(first)),
                            (__m256i)_mm512_cvtneps_pbh(second), 1);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#endif
}

}  // namespace
}  // namespace ktjax

#endif  // __AVX512BF16__

#endif  // KTJAX_FFI_GEMM_ROUND_AVX512_H_
