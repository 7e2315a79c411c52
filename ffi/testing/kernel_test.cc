// Runs the kernel suite on every instruction set that this CPU has, the portable
// kernels and the emulated tiles. Prints "N passed, M failed"; exits 1 when M > 0.
#include <cstdio>

#include "base/cpu.h"
#include "gemm/isa.h"
#include "testing/kernel_suite.h"

namespace ktjax {
namespace {

const Kernels* KernelsOf(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return &kPortableKernels;
    case Isa::kAvx2:
      return &kAvx2Kernels;
    case Isa::kAvx512:
      return &kAvx512Kernels;
    case Isa::kAvx512Vnni:
      return nullptr;  // integer kernels only
    case Isa::kAvx512Bf16:
      return &kAvx512Bf16Kernels;
    case Isa::kAmx:
      return &kAmxBf16Kernels;
    case Isa::kAmxEmulated:
      return &kAmxEmulatedKernels;
  }
  return nullptr;
}

int Main() {
  for (const Isa isa : SupportedIsas()) {
    const Kernels* kernels = KernelsOf(isa);
    if (!kernels) continue;
    const CheckCounts before = check_counts;
    KernelSuite(*kernels, SuiteSize::kFull).Run();
    std::printf("%-14s %lld checks, %lld failed\n", kernels->name,
                static_cast<long long>(check_counts.passed - before.passed),
                static_cast<long long>(check_counts.failed - before.failed));
  }
  return ReportChecks();
}

}  // namespace
}  // namespace ktjax

int main() { return ktjax::Main(); }
