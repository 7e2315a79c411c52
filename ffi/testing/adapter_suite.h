// The tests of products with adapters as they lie in memory. Against float64, with the
// bound of a float32 sum in any order: one rounding of 2^-24 an addition, twice, as
// units may round as they multiply.
#ifndef KTJAX_FFI_TESTING_ADAPTER_SUITE_H_
#define KTJAX_FFI_TESTING_ADAPTER_SUITE_H_

#include <cmath>
#include <type_traits>
#include <vector>

#include "base/bf16.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

template <typename T>
class AdapterSuite {
 public:
  AdapterSuite(const Kernels& kernels, const AdapterKernels<T>& adapters, bool small)
      : name_(kernels.name), packed_(kernels), kernels_(adapters), small_(small) {}

  void Run() {
    for (const int rows : small_ ? std::vector<int>{1, 6, 8}
                                 : std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8}) {
      for (const int rank : small_ ? std::vector<int>{3, 33}
                                   : std::vector<int>{1, 3, 8, 16, 17, 33, 64}) {
        for (const int width : small_ ? std::vector<int>{67}
                                      : std::vector<int>{1, 15, 32, 67, 130, 544}) {
          TestDot(rows, rank, width);
          TestContract(rows, width, rank, false, false);
        }
        for (const int outputs : {1, 16, 30, 47, 64}) {
          TestContract(rows, rank, outputs, true, true);
          TestAddDot(rows, outputs, rank, 1);
          if (outputs <= 32) TestAddDot(rows, outputs, rank, 2);
        }
        for (const bool transposed : {false, true}) {
          TestOuter(rows, rank, 1, transposed);
          TestOuter(rows, rank, small_ ? 47 : 530, transposed);
        }
      }
    }
    TestOuter(0, 5, 40, false);
    TestOuter(0, 5, 40, true);
  }

 private:
  static float ValueOf(float value) { return FromBf16(RoundToBf16(value)); }
  static float ValueOf(bf16 value) { return FromBf16(value); }
  static void Make(Random& random, float& value) { value = random.Value(); }
  static void Make(Random& random, bf16& value) { value = RoundToBf16(random.Value()); }

  // Rows of values; what lies between them must not matter, nor what follows the last.
  struct Matrix {
    Matrix(int rows, int columns, Random& random)
        : stride(columns + 5), values((rows - 1) * stride + columns) {
      for (size_t i = 0; i < values.size(); ++i) Make(random, values[i]);
    }
    Rows<T> rows() const { return {values.data(), stride}; }
    float At(int row, int column) const {
      return ValueOf(values[row * stride + column]);
    }
    ptrdiff_t stride;
    Guarded<T> values;
  };

  // Rows in two parts, zero from `depth` up to `padded`.
  struct Operand {
    Operand(int rows, int depth, int padded, Random& random)
        : values(static_cast<size_t>(rows) * 2 * padded),
          split{values.data(), 2 * padded, padded} {
      for (size_t i = 0; i < values.size(); ++i) values[i] = 0;
      for (int r = 0; r < rows; ++r) {
        for (int d = 0; d < depth; ++d) {
          bf16* high = &split.high[r * split.stride + d];
          SplitBf16(random.Value(), *high, high[split.low]);
        }
      }
    }
    double At(int r, int d, bool two_parts) const {
      const bf16* high = &split.high[r * split.stride + d];
      return double{FromBf16(*high)} + (two_parts ? FromBf16(high[split.low]) : 0);
    }
    Guarded<bf16> values;
    SplitRows split;
  };

  // `terms` products, added up by add(double product).
  template <typename ForProducts>
  void CheckSum(const char* what, double got, double start, int terms,
                ForProducts for_products) {
    double sum = start, magnitude = std::fabs(start);
    for_products([&](double product) {
      sum += product;
      magnitude += std::fabs(product);
    });
    KTJAX_CHECK(std::fabs(got - sum) <= (2 * terms + 2) * 0x1p-23 * magnitude,
                "%s: %s: %g, not %g", name_, what, got, sum);
  }

  // The same product by way of a panel: dot and add_dot must have its bits.
  std::vector<float> Packed(const SplitRows& a, int rows, const Matrix& m, int outputs,
                            int depth, std::vector<float> c, bool accumulate) const {
    const int strips = static_cast<int>(CeilDiv(outputs, kStrip));
    const ptrdiff_t stride = 2 * kStrip * strips;
    std::vector<bf16> panel(RoundUp(depth, kDepth) / 2 * stride);
    if constexpr (std::is_same_v<T, float>) {
      packed_.pack_outputs_f32(m.rows(), outputs, depth, strips, panel.data(), stride);
    } else {
      packed_.pack_outputs_bf16(m.rows(), outputs, depth, strips, panel.data(), stride);
    }
    c.resize(rows * kPanel);
    const int even = static_cast<int>(RoundUp(depth, 2));
    const Term terms[] = {{a.high, a.stride, panel.data(), even},
                          {a.high + a.low, a.stride, panel.data(), even}};
    packed_.gemm(terms, a.low ? 2 : 1, rows, strips, c.data(), accumulate, nullptr);
    return c;
  }

  void TestDot(int rows, int outputs, int depth) {
    Random random(outputs + depth);
    const Matrix m(outputs, depth, random);
    const Operand a(rows, depth, RoundUp(depth, kDepth), random);
    Guarded<float> c((rows - 1) * kPanel + outputs);
    kernels_.dot(a.split.high, a.split.stride, rows, m.rows(), outputs, depth,
                 c.data());
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < outputs; ++n) {
        CheckSum("dot", c[r * kPanel + n], 0, depth, [&](auto add) {
          for (int d = 0; d < depth; ++d) add(a.At(r, d, false) * m.At(n, d));
        });
      }
    }
    SplitRows operand = a.split;
    operand.low = 0;
    const std::vector<float> packed =
        Packed(operand, rows, m, outputs, depth, {}, false);
    for (int r = 0; r < rows; ++r) {
      KTJAX_CHECK(
          !std::memcmp(&packed[r * kPanel], &c[r * kPanel], sizeof(float) * outputs),
          "%s: dot: row %d of %d: other bits than of a panel", name_, r, rows);
    }
  }

  void TestContract(int rows, int depth, int outputs, bool two_parts, bool accumulate) {
    Random random(outputs + depth);
    const Matrix m(depth, outputs, random);
    const Operand a(rows, depth, RoundUp(depth, 2), random);
    SplitRows operand = a.split;
    if (!two_parts) operand.low = 0;
    Guarded<float> c((rows - 1) * kPanel + RoundUp(outputs, kStrip));
    for (size_t i = 0; i < c.size(); ++i) c[i] = random.Value();
    const std::vector<float> start(c.data(), c.data() + c.size());
    kernels_.contract(operand, rows, m.rows(), depth, outputs, c.data(), accumulate);
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < outputs; ++n) {
        CheckSum("contract", c[r * kPanel + n], accumulate ? start[r * kPanel + n] : 0,
                 2 * depth, [&](auto add) {
                   for (int d = 0; d < depth; ++d)
                     add(a.At(r, d, two_parts) * m.At(d, n));
                 });
      }
    }
  }

  void TestAddDot(int rows, int outputs, int depth, int step) {
    Random random(outputs + depth);
    const Matrix m(outputs, depth, random);
    const Operand a(rows, depth, RoundUp(depth, kDepth), random);
    const int strips = static_cast<int>(CeilDiv(outputs, kStrip));
    Guarded<float> c((rows - 1) * kPanel + ((strips - 1) * step + 1) * kStrip);
    for (size_t i = 0; i < c.size(); ++i) c[i] = random.Value();
    const std::vector<float> start(c.data(), c.data() + c.size());
    kernels_.add_dot(a.split, rows, m.rows(), outputs, depth, c.data(), step);
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < strips * step * kStrip; ++n) {
        const int strip = n / kStrip, at = r * kPanel + n;
        if (static_cast<size_t>(at) >= c.size()) continue;
        const int output = strip / step * kStrip + n % kStrip;
        const bool fed = strip % step == 0 && output < outputs;
        CheckSum("add_dot", c[at], start[at], 2 * depth, [&](auto add) {
          for (int d = 0; fed && d < depth; ++d)
            add(a.At(r, d, true) * m.At(output, d));
        });
      }
    }
    if (step > 1) return;
    const std::vector<float> packed =
        Packed(a.split, rows, m, outputs, depth, start, true);
    for (int r = 0; r < rows; ++r) {
      KTJAX_CHECK(
          !std::memcmp(&packed[r * kPanel], &c[r * kPanel], sizeof(float) * outputs),
          "%s: add_dot: row %d of %d: other bits than of a panel", name_, r, rows);
    }
  }

  void TestOuter(int rows, int rank, int columns, bool transposed) {
    Random random(rank + columns);
    const Operand low_rank(rank, rows, kMaxContractRows, random);
    Guarded<bf16> source(rows ? (rows - 1) * columns + columns : 0);
    for (size_t i = 0; i < source.size(); ++i) {
      source[i] = RoundToBf16(random.Value());
    }
    std::vector<int32_t> index(rows);
    for (int r = 0; r < rows; ++r) index[r] = rows - 1 - r;
    const int gap = 3;
    const ptrdiff_t stride = (transposed ? rank : columns) + gap;
    Guarded<T> grad(((transposed ? columns : rank) - 1) * stride + stride - gap);
    (transposed ? kernels_.outer_columns : kernels_.outer_rows)(
        low_rank.split, rank, {source.data(), columns, index.data()}, rows, columns,
        grad.data(), stride);
    for (size_t at = 0; at < grad.size(); ++at) {
      const int row = static_cast<int>(at / stride), column = at % stride;
      const int i = transposed ? column : row, n = transposed ? row : column;
      if (column >= stride - gap) {
        T untouched;
        std::memset(&untouched, 0xff, sizeof untouched);
        KTJAX_CHECK(!std::memcmp(&grad[at], &untouched, sizeof untouched),
                    "%s: outer: wrote between rows", name_);
        continue;
      }
      double sum = 0, magnitude = 0;
      for (int r = 0; r < rows; ++r) {
        const double product =
            low_rank.At(i, r, true) * FromBf16(source[index[r] * columns + n]);
        sum += product;
        magnitude += std::fabs(product);
      }
      // A gradient in bfloat16 is rounded once more, by 2^-8 of its binade at most.
      const double rounding =
          std::is_same_v<T, bf16> ? 0x1p-8 * std::fabs(sum) + 0x1p-120 : 0;
      const double got = std::is_same_v<T, bf16> ? ValueOf(grad[at]) : grad[at];
      KTJAX_CHECK(
          std::fabs(got - sum) <= (4 * rows + 2) * 0x1p-23 * magnitude + rounding,
          "%s: outer: %d rows, rank %d of %d, column %d: %g, not %g", name_, rows, i,
          rank, n, got, sum);
    }
  }

  const char* name_;
  const Kernels& packed_;
  const AdapterKernels<T>& kernels_;
  const bool small_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_ADAPTER_SUITE_H_
