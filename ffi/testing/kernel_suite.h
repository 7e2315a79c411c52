// The tests that the kernels of every instruction set pass.
#ifndef KTJAX_FFI_TESTING_KERNEL_SUITE_H_
#define KTJAX_FFI_TESTING_KERNEL_SUITE_H_

#include <vector>

#include "gemm/kernel.h"
#include "testing/adapter_suite.h"
#include "testing/check.h"
#include "testing/dropout_suite.h"
#include "testing/gemm_case.h"
#include "testing/pack_suite.h"

namespace ktjax {

// How much to try: all of it, or what a machine emulator gets done in seconds.
enum class SuiteSize { kFull, kSmall };

class KernelSuite {
 public:
  KernelSuite(const Kernels& kernels, SuiteSize size)
      : kernels_(kernels), small_(size == SuiteSize::kSmall) {}

  void Run() {
    kernels_.enter();
    TestOneTerm();
    TestManyTerms();
    TestPrefetch();
    kernels_.leave();
    PackSuite(kernels_, small_).Run();
    DropoutSuite(kernels_).Run();
    if (kernels_.adapters_f32) {
      AdapterSuite<float>(kernels_, *kernels_.adapters_f32, small_).Run();
      AdapterSuite<bf16>(kernels_, *kernels_.adapters_bf16, small_).Run();
    }
  }

 private:
  // Row counts worth a call: all, or those around the kernels' steps.
  std::vector<int> RowCounts() const {
    std::vector<int> counts;
    for (int rows = 1; rows <= kernels_.max_rows; ++rows) {
      const int past = rows % kStrip;
      if (!small_ || rows == 7 || past <= 1 || past == kStrip - 1)
        counts.push_back(rows);
    }
    return counts;
  }

  // Checks one call with all rows against float64 (an emulated machine: some rows,
  // which differ in their place in a tile), and calls with fewer rows against that: the
  // same rows must have the same bits.
  void TestCase(const GemmCase& gemm_case, bool accumulate) {
    const int all = gemm_case.rows();
    const std::vector<float> expected = gemm_case.Run(kernels_, all, accumulate);
    gemm_case.CheckValues(kernels_, expected, accumulate, small_ ? 7 : 1);
    for (const int rows : RowCounts()) {
      const std::vector<float> c = gemm_case.Run(kernels_, rows, accumulate);
      CheckSameRows(c, expected, rows, gemm_case, "with fewer rows");
    }
  }

  // The rows of c are the last ones of `expected`.
  void CheckSameRows(const std::vector<float>& c, const std::vector<float>& expected,
                     int rows, const GemmCase& gemm_case, const char* what) {
    const size_t skipped = expected.size() - c.size();
    for (int r = 0; r < rows; ++r) {
      const size_t row = static_cast<size_t>(r) * kPanel;
      const size_t bytes = sizeof(float) * kStrip * gemm_case.strips();
      KTJAX_CHECK(std::memcmp(&c[row], &expected[skipped + row], bytes) == 0,
                  "%s: row %d of %d, %d strips: other bits %s", kernels_.name, r, rows,
                  gemm_case.strips(), what);
    }
  }

  void TestOneTerm() {
    const std::vector<int> depths =
        small_ ? std::vector<int>{2, 34, 288}
               : std::vector<int>{2, 16, 30, 32, 34, 64, 96, 768};
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      for (const int depth : depths) {
        const GemmCase gemm_case(kernels_.max_rows, strips, {{depth}}, depth + strips);
        TestCase(gemm_case, false);
        if (!small_) TestCase(gemm_case, true);
      }
    }
  }

  void TestManyTerms() {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      // LoRA's terms of gate and up; the same after, before and around a long term;
      // terms that end within and at the end of a kernel's block of depths.
      std::vector<std::vector<TermShape>> cases = {
          {{64}, {16, 0, 2}},
          {{8, 0, 2}, {34}},
          {{256}, {2}, {96}},
          {{288}, {16}, {34}, {16}},
      };
      if (strips > 1) {
        cases.push_back({{64}, {16, 0, 2}, {30, 1, 2}});
        cases.push_back({{64, 1, 2}, {64, 0, 2}});
        cases.push_back({{768}, {16, 0, 2}, {16, 1, 2}});
      }
      for (const std::vector<TermShape>& shapes : cases) {
        if (small_ && shapes[0].depth > 500) continue;
        const GemmCase gemm_case(kernels_.max_rows, strips, shapes, strips);
        if (!small_) TestCase(gemm_case, false);
        TestCase(gemm_case, true);
      }
    }
  }

  // Prefetching changes no result, and gets through all chunks.
  void TestPrefetch() {
    constexpr int kChunks = 3, kChunkBytes = 2048, kStride = 3000;
    static const char memory[kChunks * kStride] = {};
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      const GemmCase gemm_case(kernels_.max_rows, strips, {{320}, {16, 0, 2}}, strips);
      for (const int rows : {1, kernels_.max_rows / 2 + 1, kernels_.max_rows}) {
        const std::vector<float> expected = gemm_case.Run(kernels_, rows, false);
        for (int lines = 1; lines <= 4; ++lines) {
          Prefetch prefetch{memory,      kStride,
                            kChunkBytes, kChunks * kChunkBytes,
                            0,           lines * Prefetch::kPerPair};
          const ByteSpan more[] = {{memory, 192}, {memory, 0}, {memory, 64}};
          prefetch.more = more;
          prefetch.more_count = 3;
          // The 160 pairs of a call are worth at least one line each.
          for (int call = 0; call < 2; ++call) {
            const std::vector<float> c =
                gemm_case.Run(kernels_, rows, false, &prefetch);
            CheckSameRows(c, expected, rows, gemm_case, "with prefetching");
          }
          KTJAX_CHECK(
              (prefetch.position >= prefetch.total_bytes && prefetch.more_count == 0) ||
                  !prefetches_,
              "%s: rows %d strips %d lines %d: stopped at byte %lld", kernels_.name,
              rows, strips, lines, static_cast<long long>(prefetch.position));
        }
      }
    }
  }

  const Kernels& kernels_;
  const bool small_;
  // The portable kernels leave prefetching to the CPU.
  const bool prefetches_ = std::strcmp(kernels_.name, "portable") != 0;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_KERNEL_SUITE_H_
