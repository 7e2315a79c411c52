// Runs the suite of the integer kernels on every instruction set that this CPU has, the
// portable kernels and the emulated tiles. Prints "N passed, M failed"; exits 1 when M
// > 0.
#include <cstdio>

#include "base/cpu.h"
#include "moe/backend.h"
#include "testing/int8_suite.h"

namespace ktjax {
namespace {

int Main() {
  for (const Isa isa : SupportedIsas()) {
    const Kernels& kernels = KernelsOf(isa);
    const CheckCounts before = check_counts;
    Int8Suite(kernels, SuiteSize::kFull).Run();
    std::printf("%-14s %lld checks, %lld failed\n", kernels.name,
                static_cast<long long>(check_counts.passed - before.passed),
                static_cast<long long>(check_counts.failed - before.failed));
  }
  return ReportChecks();
}

}  // namespace
}  // namespace ktjax

int main() { return ktjax::Main(); }
