#include "moe/backend.h"

#include "gemm/isa.h"

namespace ktjax {

const Kernels& KernelsOf(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return kPortableKernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx512Vnni:
      return kAvx512VnniKernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kAmx:
      return kAmxBf16Kernels;
    case Isa::kAmxEmulated:
      return kAmxEmulatedKernels;
  }
  return kPortableKernels;
}

Backend::Backend(const WorkerPoolConfig& config, Isa isa)
    : pool(config), isa(isa), kernels(KernelsOf(isa)) {}

}  // namespace ktjax
