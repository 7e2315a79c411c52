// Registers of 8-bit codes and their dot products with rows: VNNI where the file is
// compiled for it, else products of 16-bit integers, in AVX-512 or AVX2. (VPMADDUBSW
// would take 8-bit operands, but its sums saturate at 2^15.)
//
// The products are in assembly: with its own intrinsics gcc 12 keeps sums in memory, at
// half the speed.
//
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_INT8_VECTOR_H_
#define KTJAX_FFI_GEMM_INT8_VECTOR_H_

#include <immintrin.h>

#include <cstring>

#include "base/types.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

#ifdef __AVX512F__

struct IntVector {
  static constexpr int kLanes = 16;
  static constexpr int kSumRegisters = 24;
  // As many strips at a time as a panel has.
  static constexpr int kTileStrips = kPanelStrips;
  using Int = __m512i;
  using Float = __m512;

  static Int Load(const uint8_t* src) { return _mm512_loadu_si512(src); }
  static Int Broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static Int And(Int a, Int b) { return _mm512_and_si512(a, b); }
  template <int kCount>
  static Int ShiftRight16(Int a) {
    return _mm512_srli_epi16(a, kCount);
  }
  template <int kCount>
  static Int ShiftLeft16(Int a) {
    return _mm512_slli_epi16(a, kCount);
  }
  static Int Sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  // The bits of a where the mask has ones, else those of b.
  static Int Select(Int mask, Int a, Int b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
  }
  // table[index] for every byte, which is below 16.
  static Int LookUp(const uint8_t (&table)[16], Int index) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), index);
  }
  static Int MulPairs(Int a, Int b) { return _mm512_madd_epi16(a, b); }
  static Int WidenBytes(const uint8_t* src) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }

  static Float LoadFloat(const float* src) { return _mm512_loadu_ps(src); }
  static Float LoadFloat(const bf16* src) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void Store(Float value, float* dst) { _mm512_storeu_ps(dst, value); }
  static void Store(Int bits, uint8_t* dst) { _mm512_storeu_si512(dst, bits); }
  static Float Zero() { return _mm512_setzero_ps(); }
  static Float BroadcastFloat(float value) { return _mm512_set1_ps(value); }
  static Float ToFloat(Int value) { return _mm512_cvtepi32_ps(value); }
  static Float LoadHalves(const uint16_t* src) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
  }
  static Float Mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float Mul(Float a, float b) { return Mul(a, BroadcastFloat(b)); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

#else

struct IntVector {
  static constexpr int kLanes = 8;
  static constexpr int kSumRegisters = 12;
  static constexpr int kTileStrips = 1;
  using Int = __m256i;
  using Float = __m256;

  static Int Load(const uint8_t* src) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  }
  static Int Broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static Int And(Int a, Int b) { return _mm256_and_si256(a, b); }
  template <int kCount>
  static Int ShiftRight16(Int a) {
    return _mm256_srli_epi16(a, kCount);
  }
  template <int kCount>
  static Int ShiftLeft16(Int a) {
    return _mm256_slli_epi16(a, kCount);
  }
  static Int Sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  // The bits of a where the mask has ones, else those of b.
  static Int Select(Int mask, Int a, Int b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }
  // table[index] for every byte, which is below 16.
  static Int LookUp(const uint8_t (&table)[16], Int index) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), index);
  }
  static Int MulPairs(Int a, Int b) { return _mm256_madd_epi16(a, b); }
  static Int WidenBytes(const uint8_t* src) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
  }

  static Float LoadFloat(const float* src) { return _mm256_loadu_ps(src); }
  static Float LoadFloat(const bf16* src) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void Store(Float value, float* dst) { _mm256_storeu_ps(dst, value); }
  static void Store(Int bits, uint8_t* dst) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), bits);
  }
  static Float Zero() { return _mm256_setzero_ps(); }
  static Float BroadcastFloat(float value) { return _mm256_set1_ps(value); }
  static Float ToFloat(Int value) { return _mm256_cvtepi32_ps(value); }
  // Whatever the thread flushes, denormal halves are read as they are.
  static Float LoadHalves(const uint16_t* src) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }
  static Float Mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float Mul(Float a, float b) { return Mul(a, BroadcastFloat(b)); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

#endif

// No step after this one begins before it: without it gcc 12 converts many sums at once
// and has no registers left for the others.
inline void Pin(IntVector::Int& value) { asm volatile("" : "+v"(value) : : "memory"); }

// The rows of a tile as the products want them: bytes, `stride` apart.
struct RowOperands {
  const char* at;
  ptrdiff_t stride;
};

#ifdef __AVX512VNNI__

struct Int8Dot {
  using Int = IntVector::Int;

  // The codes of a lane are multiplied in parts: four bytes at a time.
  template <int kBits>
  static constexpr int kParts = 8 / kBits;
  // The bytes between the first part's operand in a row and another part's.
  static constexpr ptrdiff_t Offset(int part) { return 4 * part; }
  static constexpr int kBufferBytes = 0;  // per row

  static RowOperands Rows(const int8_t* values, ptrdiff_t stride, int, int, char*) {
    return {reinterpret_cast<const char*>(values), stride};
  }

  template <int kBits, int kPart>
  static Int Codes(const uint8_t* src) {
    if constexpr (kBits == 8) return IntVector::Load(src);
    const Int lanes = IntVector::Load(src);
    const Int mask = IntVector::Broadcast(0x0f0f0f0f);
    return IntVector::And(kPart ? IntVector::ShiftRight16<4>(lanes) : lanes, mask);
  }

  // A quad, four bytes of codes a lane, is multiplied as it is.
  static constexpr int kQuadParts = 1;
  static constexpr ptrdiff_t QuadOffset(int quad, int) { return 4 * quad; }
  template <int kPart>
  static Int QuadPart(Int quad) {
    return quad;
  }

  static Int Add(Int sum, Int codes, Int values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(values));
    return sum;
  }
};

#else

struct Int8Dot {
  using Int = IntVector::Int;

  // Two bytes at a time, the even or the odd ones, widened to 16 bits.
  template <int kBits>
  static constexpr int kParts = 16 / kBits;
  static constexpr ptrdiff_t kOddOffset = kInt8Group;
  static constexpr ptrdiff_t Offset(int part) {
    return part % 2 * kOddOffset + 4 * (part / 2);
  }
  static constexpr int kBufferBytes = 2 * kInt8Group;

  // The even bytes of a group's lanes, widened, then the odd ones.
  static RowOperands Rows(const int8_t* values, ptrdiff_t stride, int rows, int depth,
                          char* buffer) {
    for (int r = 0; r < rows; ++r) {
      const int8_t* src = values + r * stride;
      char* dst = buffer + r * kBufferBytes;
      for (int d = 0; d < depth; d += 32) {
        const __m256i lanes =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + d));
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(lanes, 8), 8);
        const __m256i odd = _mm256_srai_epi16(lanes, 8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + d), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + d + kOddOffset), odd);
      }
    }
    return {buffer, kBufferBytes};
  }

  template <int kBits, int kPart>
  static Int Codes(const uint8_t* src) {
    constexpr int kShift = kPart % 2 * 8 + kPart / 2 * 4;
    const Int lanes = IntVector::ShiftRight16<kShift>(IntVector::Load(src));
    if constexpr (kShift + kBits == 16) return lanes;
    return IntVector::And(lanes,
                          IntVector::Broadcast(kBits == 8 ? 0x00ff00ff : 0x000f000f));
  }

  // A quad is multiplied in halves: its even bytes, then its odd ones.
  static constexpr int kQuadParts = 2;
  static constexpr ptrdiff_t QuadOffset(int quad, int part) {
    return part * kOddOffset + 4 * quad;
  }
  template <int kPart>
  static Int QuadPart(Int quad) {
    if constexpr (kPart == 1) return IntVector::ShiftRight16<8>(quad);
    return IntVector::And(quad, IntVector::Broadcast(0x00ff00ff));
  }

  static Int Add(Int sum, Int codes, Int values) {
    Int products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+v"(sum), "=&v"(products)
        : "v"(codes), "v"(values));
    return sum;
  }
};

#endif

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_INT8_VECTOR_H_
