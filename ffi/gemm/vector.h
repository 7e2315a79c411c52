// A register of float32 and how to read bfloat16 pairs into it: AVX-512 where the file
// is compiled for it, else AVX2. Everything is static: a file compiled with ISA flags
// must not share code with others.
#ifndef KTJAX_FFI_GEMM_VECTOR_H_
#define KTJAX_FFI_GEMM_VECTOR_H_

#include <immintrin.h>

#include "base/types.h"

namespace ktjax {
namespace {

#ifdef __AVX512F__

struct Vector {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  using Float = __m512;

  static Float Zero() { return _mm512_setzero_ps(); }
  static Float Load(const float* src) { return _mm512_loadu_ps(src); }
  static void Store(Float value, float* dst) { _mm512_storeu_ps(dst, value); }
  static Float Broadcast(const float* src) { return _mm512_set1_ps(*src); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  // The even and the odd depth of kLanes outputs' pairs.
  static Float Even(const bf16* pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
  }
  static Float Odd(const bf16* pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(
        _mm512_loadu_si512(pairs), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // kLanes consecutive values.
  static Float Decode(const bf16* src) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

#else

struct Vector {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  using Float = __m256;

  static Float Zero() { return _mm256_setzero_ps(); }
  static Float Load(const float* src) { return _mm256_loadu_ps(src); }
  static void Store(Float value, float* dst) { _mm256_storeu_ps(dst, value); }
  static Float Broadcast(const float* src) { return _mm256_broadcast_ss(src); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  // The even and the odd depth of kLanes outputs' pairs.
  static Float Even(const bf16* pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(Bits(pairs), 16));
  }
  static Float Odd(const bf16* pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(
        Bits(pairs), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // kLanes consecutive values.
  static Float Decode(const bf16* src) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

 private:
  static __m256i Bits(const bf16* pairs) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  }
};

#endif

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_VECTOR_H_
