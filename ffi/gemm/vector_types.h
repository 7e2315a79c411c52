// Vectors of 16 lanes with the compiler's extension: one AVX-512 register of 32-bit
// lanes, two AVX ones, four SSE ones.
#ifndef KTJAX_FFI_GEMM_VECTOR_TYPES_H_
#define KTJAX_FFI_GEMM_VECTOR_TYPES_H_

#include <cstdint>

namespace ktjax {
namespace {

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_VECTOR_TYPES_H_
