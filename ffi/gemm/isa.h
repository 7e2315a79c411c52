// The kernels of every instruction set, one constant per file.
#ifndef KTJAX_FFI_GEMM_ISA_H_
#define KTJAX_FFI_GEMM_ISA_H_

#include "gemm/kernel.h"

namespace ktjax {

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxBf16Kernels;
extern const Kernels kAmxEmulatedKernels;

}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_ISA_H_
