// The tests of packing, transposing and rounding that every instruction set passes. All
// compare bits: these routines have one right result.
#ifndef KTJAX_FFI_TESTING_PACK_SUITE_H_
#define KTJAX_FFI_TESTING_PACK_SUITE_H_

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "base/bf16.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

class PackSuite {
 public:
  PackSuite(const Kernels& kernels, bool small) : kernels_(kernels), small_(small) {}

  void Run() {
    TestTranspose();
    if (kernels_.contract_outputs) TestContractOutputs();
    TestPackOutputs(kernels_.pack_outputs_f32, Part::kHigh);
    TestPackOutputs(kernels_.pack_outputs_low, Part::kLow);
    TestPackOutputs(kernels_.pack_outputs_bf16, Part::kHigh);
    TestPackDepths(kernels_.pack_depths_f32, Part::kHigh);
    TestPackDepths(kernels_.pack_depths_low, Part::kLow);
    TestPackDepths(kernels_.pack_depths_bf16, Part::kHigh);
    TestToBf16(kernels_.to_bf16, Part::kHigh);
    TestToBf16(kernels_.to_bf16_low, Part::kLow);
  }

 private:
  template <typename T>
  static T Make(Random& random) {
    if constexpr (std::is_same_v<T, float>) {
      return random.Value();
    } else {
      return RoundToBf16(random.Value());
    }
  }
  static bf16 PartOf(float value, Part part) {
    const bf16 high = RoundToBf16(value);
    return part == Part::kHigh ? high : RoundToBf16(value - FromBf16(high));
  }
  static bf16 PartOf(bf16 value, Part) { return value; }

  std::vector<int> Depths() const {
    return small_ ? std::vector<int>{1, 16, 47}
                  : std::vector<int>{1, 2, 15, 16, 31, 32, 33, 47, 64, 100};
  }
  std::vector<int> Outputs(int strips) const {
    std::vector<int> outputs = {0, 1, 15, kStrip * strips - 1, kStrip * strips};
    std::erase_if(outputs, [&](int n) { return n > kStrip * strips; });
    return outputs;
  }

  void CheckPanel(const char* what, const Guarded<bf16>& got,
                  const std::vector<bf16>& expected) {
    const size_t bytes = sizeof(bf16) * expected.size();
    const bool same = !bytes || !std::memcmp(got.data(), expected.data(), bytes);
    KTJAX_CHECK(same, "%s: %s", kernels_.name, what);
  }

  // Source rows of `length` values, the last of which ends at a guard, in natural order
  // or by an index that reverses them.
  template <typename T>
  struct Source {
    Source(int rows, int length, bool indexed, Random& random)
        : stride(length + 3),
          values(rows && length ? static_cast<size_t>(rows - 1) * stride + length : 0),
          index(std::max(rows, 1)) {
      for (size_t i = 0; i < values.size(); ++i) values[i] = Make<T>(random);
      for (int i = 0; i < rows; ++i) index[i] = rows - 1 - i;
      this->rows = {values.data(), stride, indexed ? index.data() : nullptr};
    }
    ptrdiff_t stride;
    Guarded<T> values;
    std::vector<int32_t> index;
    Rows<T> rows;
  };

  // `at(n, d)` gives a value; strips [1, 1 + strips) of a panel that is two wider. The
  // other strips must stay as they are.
  template <typename At, typename Pack>
  void TestPack(int outputs, int depth, int strips, At at, Pack pack,
                const char* what) {
    const int padded = static_cast<int>(RoundUp(depth, kDepth));
    const ptrdiff_t stride = 2 * kStrip * (strips + 2);
    Guarded<bf16> panel(padded / 2 * stride);
    std::vector<bf16> expected(panel.size(), 0xffff);
    for (int d = 0; d < padded; ++d) {
      for (int n = 0; n < kStrip * strips; ++n) {
        expected[d / 2 * stride + 2 * kStrip + 2 * n + d % 2] =
            n < outputs && d < depth ? at(n, d) : 0;
      }
    }
    pack(panel.data() + 2 * kStrip, stride);
    CheckPanel(what, panel, expected);
  }

  template <typename Test>
  void ForShapes(Test test) {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      for (const int outputs : Outputs(strips)) {
        for (const int depth : Depths()) {
          test(outputs, depth, strips, false);
          test(outputs, depth, strips, true);
        }
      }
    }
  }

  template <typename T>
  using PackFn = void (*)(Rows<T>, int, int, int, bf16*, ptrdiff_t);

  template <typename T>
  void TestPackOutputs(PackFn<T> pack, Part part) {
    Random random(1);
    ForShapes([&](int outputs, int depth, int strips, bool indexed) {
      const Source<T> source(outputs, depth, indexed, random);
      TestPack(
          outputs, depth, strips,
          [&](int n, int d) { return PartOf(source.rows.row(n)[d], part); },
          [&](bf16* dst, ptrdiff_t stride) {
            pack(source.rows, outputs, depth, strips, dst, stride);
          },
          part == Part::kHigh ? "pack_outputs" : "pack_outputs_low");
    });
  }

  template <typename T>
  void TestPackDepths(PackFn<T> pack, Part part) {
    Random random(2);
    ForShapes([&](int outputs, int depth, int strips, bool indexed) {
      const Source<T> source(depth, outputs, indexed, random);
      TestPack(
          outputs, depth, strips,
          [&](int n, int d) { return PartOf(source.rows.row(d)[n], part); },
          [&](bf16* dst, ptrdiff_t stride) {
            pack(source.rows, depth, outputs, strips, dst, stride);
          },
          part == Part::kHigh ? "pack_depths" : "pack_depths_low");
    });
  }

  void TestTranspose() {
    Random random(3);
    for (int blocks = 1; blocks <= 4; ++blocks) {
      for (int strips = 1; strips <= kPanelStrips; ++strips) {
        const ptrdiff_t src_stride = 2 * kStrip * strips;
        const ptrdiff_t dst_stride = 64 * blocks + 32;
        const int pairs = kStrip * blocks;
        Guarded<bf16> src((pairs - 1) * src_stride + 2 * kStrip);
        Guarded<bf16> dst((kStrip / 2 - 1) * dst_stride + 64 * blocks);
        for (size_t i = 0; i < src.size(); ++i) src[i] = Make<bf16>(random);
        std::vector<bf16> expected(dst.size(), 0xffff);
        for (int depth = 0; depth < 2 * pairs; ++depth) {
          for (int n = 0; n < kStrip; ++n) {
            expected[n / 2 * dst_stride + 2 * depth + n % 2] =
                src[depth / 2 * src_stride + 2 * n + depth % 2];
          }
        }
        kernels_.transpose(src.data(), src_stride, blocks, dst.data(), dst_stride);
        CheckPanel("transpose", dst, expected);
      }
    }
  }

  // Against float64, with the bound of a float32 sum in any order (one rounding of
  // 2^-24 an addition); the row's neighbours do not matter.
  void TestContractOutputs() {
    Random random(5);
    constexpr int kPairs = 48, kGap = 3;
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      for (int rows = 1; rows <= kMaxContractRows; ++rows) {
        const ptrdiff_t a_stride = kPanel + 2, c_stride = 2 * kPairs + kGap;
        Guarded<bf16> panel(2 * kStrip * strips * kPairs);
        Guarded<bf16> a((rows - 1) * a_stride + kStrip * strips);
        Guarded<float> c((rows - 1) * c_stride + 2 * kPairs);
        for (size_t i = 0; i < panel.size(); ++i) panel[i] = Make<bf16>(random);
        for (size_t i = 0; i < a.size(); ++i) a[i] = Make<bf16>(random);
        for (size_t i = 0; i < c.size(); ++i) c[i] = random.Value();
        const std::vector<float> start(c.data(), c.data() + c.size());
        StripRows operand{{}, a_stride};
        for (int s = 0; s < strips; ++s) operand.strip[s] = a.data() + kStrip * s;
        kernels_.contract_outputs(operand, rows, panel.data(), strips, kPairs, c.data(),
                                  c_stride, nullptr);
        const std::vector<float> all(c.data(), c.data() + c.size());
        for (int r = 0; r < rows; ++r) {
          for (int d = 0; d < 2 * kPairs; ++d) {
            double sum = start[r * c_stride + d], magnitude = std::fabs(sum);
            for (int n = 0; n < kStrip * strips; ++n) {
              const double product =
                  double{FromBf16(a[r * a_stride + n])} *
                  FromBf16(panel[d / 2 * 2 * kStrip * strips + 2 * n + d % 2]);
              sum += product;
              magnitude += std::fabs(product);
            }
            KTJAX_CHECK(std::fabs(all[r * c_stride + d] - sum) <=
                            (kStrip * strips + 1) * 0x1p-23 * magnitude,
                        "%s: contract_outputs: row %d of %d, depth %d, %d strips: %g, "
                        "not %g",
                        kernels_.name, r, rows, d, strips, all[r * c_stride + d], sum);
          }
          // A row alone has the same bits.
          std::copy(start.begin(), start.end(), c.data());
          for (int s = 0; s < strips; ++s) {
            operand.strip[s] = a.data() + r * a_stride + kStrip * s;
          }
          kernels_.contract_outputs(operand, 1, panel.data(), strips, kPairs,
                                    c.data() + r * c_stride, c_stride, nullptr);
          KTJAX_CHECK(std::memcmp(c.data() + r * c_stride, &all[r * c_stride],
                                  sizeof(float) * 2 * kPairs) == 0,
                      "%s: contract_outputs: row %d of %d: other bits alone",
                      kernels_.name, r, rows);
        }
      }
    }
  }

  // Every exponent, sign and upper mantissa, with lower halves on both sides of a tie:
  // infinities, NaNs, denormals and overflow to infinity are among them (high parts
  // only: what is no finite bfloat16 has no low part).
  void TestToBf16(void (*to_bf16)(const float*, bf16*, int64_t), Part part) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint32_t step = small_ ? 61 : 1;
      std::vector<float> values;
      std::vector<bf16> expected;
      for (uint32_t high = 0; high < 0x10000u; high += step) {
        float value;
        const uint32_t bits = high << 16 | low;
        std::memcpy(&value, &bits, sizeof value);
        if (part == Part::kLow && !std::isfinite(FromBf16(RoundToBf16(value))))
          continue;
        values.push_back(value);
        expected.push_back(PartOf(value, part));
      }
      Guarded<bf16> got(values.size());
      to_bf16(values.data(), got.data(), static_cast<int64_t>(values.size()));
      CheckPanel("to_bf16", got, expected);
    }
    Random random(4);
    for (int count = 0; count <= 40; ++count) {
      Guarded<float> src(count);
      Guarded<bf16> dst(count);
      std::vector<bf16> expected;
      for (int i = 0; i < count; ++i) {
        src[i] = random.Value();
        expected.push_back(PartOf(src[i], part));
      }
      to_bf16(src.data(), dst.data(), count);
      CheckPanel("to_bf16 of few", dst, expected);
    }
  }

  const Kernels& kernels_;
  const bool small_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_PACK_SUITE_H_
