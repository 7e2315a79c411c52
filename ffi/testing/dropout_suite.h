// The tests of dropout that every instruction set passes: all compare bits, with the
// mask computed a value at a time.
#ifndef KTJAX_FFI_TESTING_DROPOUT_SUITE_H_
#define KTJAX_FFI_TESTING_DROPOUT_SUITE_H_

#include <cmath>
#include <vector>

#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

class DropoutSuite {
 public:
  explicit DropoutSuite(const Kernels& kernels) : kernels_(kernels) {}

  void Run() {
    for (const DropoutOf of : {DropoutOf::kInput, DropoutOf::kHidden}) {
      for (const int rows : {1, 2, 7}) {
        const DropoutMask mask{{0x40000000u, {3, 5}}, of, kSlots, 96};
        for (const bool split : {false, true}) {
          TestCopy(mask, rows, split);
          TestPanel(mask, rows, split);
        }
        TestAdd(mask, rows);
      }
    }
  }

 private:
  static constexpr int32_t kSlots[] = {9, 2, 0, 77, 1 << 30, 3, 5};

  static uint32_t Mix(uint32_t z, uint32_t key) {
    z = (z ^ (z >> 16)) * 0x21f0aaadu;
    z = (z ^ (z >> 15) ^ key) * 0x735a2d97u;
    return z ^ (z >> 15);
  }
  static bool Keeps(const DropoutMask& mask, int row, int column) {
    const auto& [threshold, seed] = mask.dropout;
    const uint32_t golden = 0x9e3779b9u;
    const uint32_t counter =
        2 * static_cast<uint32_t>(mask.slots[row]) + static_cast<uint32_t>(mask.of);
    const uint32_t middle = Mix(Mix(counter + golden, 0) ^ seed[1], 0);
    const uint32_t at = static_cast<uint32_t>(mask.column + column) * golden;
    return Mix(Mix(middle ^ seed[0], 0) + at, middle) >= threshold;
  }
  void CheckMask(const char* what, const DropoutMask& mask, int row, int column,
                 bool right) {
    KTJAX_CHECK(right, "%s: %s: row %d, column %d of %d", kernels_.name, what, row,
                column, static_cast<int>(mask.of));
  }

  void TestCopy(const DropoutMask& mask, int rows, bool split) {
    constexpr int kColumns = 80, kFrom = 85, kTo = 90;
    const int parts = split ? 2 : 1;
    Guarded<bf16> src(rows * parts * kFrom), dst(rows * parts * kTo);
    for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<bf16>(i + 1);
    kernels_.epilogues->copy_kept(mask, {src.data(), parts * kFrom, split ? kFrom : 0},
                                  rows, kColumns,
                                  {dst.data(), parts * kTo, split ? kTo : 0});
    for (int r = 0; r < rows * parts; ++r) {
      for (int n = 0; n < kTo; ++n) {
        const int row = r / parts;
        bf16 want = 0xffff;  // untouched
        if (n < kColumns) want = Keeps(mask, row, n) ? src[r * kFrom + n] : 0;
        CheckMask("copy", mask, row, n, dst[r * kTo + n] == want);
      }
    }
  }

  void TestPanel(const DropoutMask& mask, int rows, bool split) {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      const int columns = kStrip * strips, depth = rows + rows % 2;
      Guarded<bf16> high(depth * columns), low(depth * columns);
      for (int i = 0; i < depth * columns; ++i) high[i] = low[i] = i + 1;
      kernels_.epilogues->drop_from_panel(mask, rows, strips, high.data(),
                                          split ? low.data() : nullptr);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < columns; ++n) {
          const int at = r / 2 * 2 * columns + 2 * n + r % 2;
          const bf16 value = Keeps(mask, r, n) ? at + 1 : 0;
          CheckMask("panel", mask, r, n,
                    high[at] == value && low[at] == (split ? value : at + 1));
        }
      }
    }
  }

  void TestAdd(const DropoutMask& mask, int rows) {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      std::vector<float> src(rows * kPanel), c(rows * kPanel, 0.5f);
      for (size_t i = 0; i < src.size(); ++i) {
        // What is dropped may be anything.
        const int row = static_cast<int>(i / kPanel), n = static_cast<int>(i % kPanel);
        src[i] = Keeps(mask, row, n) ? static_cast<float>(i) : NAN;
      }
      kernels_.epilogues->add_kept(mask, src.data(), rows, strips, c.data());
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < kPanel; ++n) {
          const bool added = n < kStrip * strips && Keeps(mask, r, n);
          const float want = 0.5f + (added ? static_cast<float>(r * kPanel + n) : 0.0f);
          CheckMask("add", mask, r, n, c[r * kPanel + n] == want);
        }
      }
    }
  }

  const Kernels& kernels_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_DROPOUT_SUITE_H_
