// The AMX kernels with the real instructions, as one static program for a machine (or
// the emulator of one) with AMX: the kernel suites, the counts of tile instructions,
// and bit for bit what the emulated tiles give. Compile it and gemm/amx_*.cc with
// KTJAX_COUNT_TILES. Exits 0 when all is well.
#include <cmath>
#include <cstdio>
#include <string>

#include "base/cpu.h"
#include "gemm/isa.h"
#include "testing/format_suite.h"
#include "testing/gemm_case.h"
#include "testing/int8_suite.h"
#include "testing/kernel_suite.h"
#include "testing/tile_count_suite.h"

namespace ktjax {
namespace {

// Any bits but those of infinities and NaNs: of these, which NaN comes out is nobody's
// promise. Every fourth value is denormal. The others are near 2^-67, so that products
// and sums are on both sides of the least normal number: there a product rounded on its
// own, or a denormal kept or flushed at the wrong place, shows.
bf16 AnyBits(Random& random) {
  const int exponent = random.Below(4) ? 52 + random.Below(16) : 0;
  const int sign_and_mantissa = static_cast<int>(random.Bits() & 0x807f);
  return static_cast<bf16>(sign_and_mantissa | exponent << 7);
}

// Differences below 2^-125 do not count: Bochs 3.0 takes sums of the least normal
// exponent for denormals, and makes them zero.
bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(float)) == 0) continue;
    if (!(std::fabs(a[i]) < 0x1p-125f && std::fabs(b[i]) < 0x1p-125f)) return false;
  }
  return true;
}

// Real and emulated tiles agree, on ordinary values and on any finite bits.
void TestEmulation() {
  int64_t values = 0;
  for (const bool any_bits : {false, true}) {
    for (const int rows : {1, 16, 19, 41}) {
      std::vector<TermShape> shapes = {{64}, {16, 0, 2}, {32, 1, 2}};
      if (any_bits) shapes = {{32}};
      const GemmCase gemm_case(rows, kPanelStrips, shapes, rows);
      if (any_bits) {
        Random random(rows);
        for (size_t i = 0; i < gemm_case.a_size(0); ++i) {
          gemm_case.a(0)[i] = AnyBits(random);
        }
        for (size_t i = 0; i < gemm_case.b_size(0); ++i) {
          gemm_case.b(0)[i] = AnyBits(random);
        }
      }
      const auto run = [&](const Kernels& kernels) {
        kernels.enter();
        std::vector<float> c = gemm_case.Run(kernels, rows, false);
        kernels.leave();
        return c;
      };
      const std::vector<float> real = run(kAmxBf16Kernels);
      KTJAX_CHECK(SameBits(real, run(kAmxEmulatedKernels)),
                  "%d rows%s: the emulated tiles differ", rows,
                  any_bits ? " of any bits" : "");
      values += rows * kPanel;
    }
  }
  for (const int bits : {8, 4}) {
    const Int8Shape shape = {bits, bits == 4, ScaleType::kFloat32, 160, 96, false};
    // Whole numbers: the rounding of other sums may differ.
    const Int8Case int8_case(41, kPanelStrips, shape, Fill::kExact, bits);
    const auto run = [&](const Kernels& kernels) {
      kernels.enter();
      std::vector<float> c = int8_case.Run(kernels, int8_case.rows());
      kernels.leave();
      return c;
    };
    KTJAX_CHECK(SameBits(run(kAmxBf16Kernels), run(kAmxEmulatedKernels)),
                "%d-bit codes: the emulated tiles differ", bits);
    values += int8_case.rows() * kPanel;
  }
  std::printf("%lld values: real and emulated tiles compared\n",
              static_cast<long long>(values));
}

int Main() {
  // Asks for the permission to use tiles.
  for (const std::string& feature : MissingFeatures(Isa::kAmx)) {
    KTJAX_CHECK(false, "this machine lacks %s", feature.c_str());
  }
  if (check_counts.failed) return ReportChecks();
  KernelSuite(kAmxBf16Kernels, SuiteSize::kSmall).Run();
  Int8Suite(kAmxBf16Kernels, SuiteSize::kSmall).Run();
  FormatSuite(kAmxBf16Kernels, true).Run();
  TestTileCounts(kAmxBf16Kernels, amx_bf16_counts, {1, 16, 31, 48, 64}, 768);
  TestEmulation();
  return ReportChecks();
}

}  // namespace
}  // namespace ktjax

int main() { return ktjax::Main(); }
