// An integer product with its operands in guarded memory and its value, exact or in
// float64.
#ifndef KTJAX_FFI_TESTING_INT8_CASE_H_
#define KTJAX_FFI_TESTING_INT8_CASE_H_

#include <cmath>
#include <vector>

#include "base/bf16.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

struct Int8Shape {
  int bits;  // of a code
  bool zero_points;
  ScaleType scale;
  int depth;
  int group;   // of the rows' sums
  bool whole;  // the panel has one scale for all depths, else one per group
};

enum class Fill {
  kExact,     // scales of 1 and 2: c is a whole number, and float32 shows it
  kExtremes,  // the same, and all codes at the ends of their ranges
  kAny,       // any scales
};

class Int8Case {
 public:
  Int8Case(int rows, int strips, const Int8Shape& shape, Fill fill, uint64_t seed)
      : rows_(rows),
        strips_(strips),
        shape_(shape),
        fill_(fill),
        padded_(static_cast<int>(RoundUp(shape.depth, kDepth))),
        groups_(static_cast<int>(CeilDiv(shape.depth, shape.group))),
        row_groups_(static_cast<int>(CeilDiv(shape.depth, kInt8Group))),
        panel_groups_(shape.whole ? 1 : groups_),
        stride_(padded_ + 7),  // rows start anywhere; the gaps stay -1
        values_((rows - 1) * stride_ + padded_),
        row_scales_(static_cast<size_t>(rows) * row_groups_),
        sums_(static_cast<size_t>(rows) * groups_),
        codes_(static_cast<size_t>(padded_) * shape.bits / 8 * outputs()),
        scales_(static_cast<size_t>(panel_groups_) * outputs()),
        scales_bf16_(static_cast<size_t>(panel_groups_) * outputs()),
        zeros_(static_cast<size_t>(panel_groups_) * outputs()) {
    Random random(seed);
    FillRows(random);
    FillPanel(random);
  }

  int rows() const { return rows_; }
  int strips() const { return strips_; }
  // Of the depths from g * kInt8Group on.
  float& row_scale(int r, int g) const { return row_scales_[r * row_groups_ + g]; }

  // c of the last `rows` rows, so that the last row of every operand ends at a guard.
  // Checks that nothing else was written.
  std::vector<float> Run(const Kernels& kernels, int rows,
                         Prefetch* prefetch = nullptr) const {
    const int skipped = rows_ - rows;
    Guarded<float> c(static_cast<size_t>(rows - 1) * kPanel + outputs());
    const auto inside = [&](size_t i) {
      return i % kPanel < static_cast<size_t>(outputs());
    };
    const FormatSpec format = {
        Format::kInt8, "a test's", shape_.bits == 8 ? Code::kInt8 : Code::kInt4,
        shape_.scale,  0,          1};
    const Int8Rows a = {values_.data() + skipped * stride_,
                        stride_,
                        row_scales_.data() + skipped * row_groups_,
                        row_groups_,
                        sums_.data() + skipped * groups_,
                        groups_,
                        shape_.group};
    const void* scales = scales_.data();
    if (shape_.scale == ScaleType::kBf16) scales = scales_bf16_.data();
    const QuantPanel b = {codes_.data(), scales,
                          shape_.zero_points ? zeros_.data() : nullptr, strips_,
                          shape_.whole ? shape_.depth : shape_.group};
    kernels.gemm_int8(format, a, b, shape_.depth, rows, c.data(), prefetch);
    bool kept = true;
    for (size_t i = 0; i < c.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &c[i], sizeof bits);
      if (!inside(i) && bits != 0xffffffffu) kept = false;
    }
    KTJAX_CHECK(kept, "%s: rows %d strips %d: wrote beyond its strips", kernels.name,
                rows, strips_);
    return {c.data(), c.data() + c.size()};
  }

  // Compares c of every `row_step`-th row with its value: exactly, or with four
  // roundings of 2^-24 for a group's term and one for each sum.
  void CheckValues(const Kernels& kernels, const std::vector<float>& c,
                   int row_step) const {
    for (int r = 0; r < rows_; r += row_step) {
      for (int n = 0; n < outputs(); ++n) {
        double sum = 0, magnitude = 0;
        for (int g = 0; g < groups_; ++g) {
          const ptrdiff_t place =
              static_cast<ptrdiff_t>(shape_.whole ? 0 : g) * outputs() + n;
          const double term = static_cast<double>(GroupSum(r, g, n, place)) *
                              row_scale(r, g * shape_.group / kInt8Group) *
                              Scale(place);
          sum += term;
          magnitude += std::fabs(term);
        }
        double bound = 0;
        if (fill_ == Fill::kAny) {
          bound = (groups_ + 4) * 0x1p-24 * magnitude;
        } else {
          KTJAX_CHECK(magnitude <= 0x1p24, "the test's sum is not exact in float32");
        }
        const float got = c[static_cast<size_t>(r) * kPanel + n];
        KTJAX_CHECK(std::fabs(got - sum) <= bound,
                    "%s: row %d of %d, output %d of %d strips, %d bits, depth %d in "
                    "groups of %d: %.9g, not %.9g",
                    kernels.name, r, rows_, n, strips_, shape_.bits, shape_.depth,
                    shape_.group, got, sum);
      }
    }
  }

 private:
  int outputs() const { return kStrip * strips_; }

  float AnyScale(Random& random) const {
    if (fill_ == Fill::kAny) return std::fabs(random.Value()) + 0.01f;
    return fill_ == Fill::kExact && random.Below(2) ? 2.0f : 1.0f;
  }

  void FillRows(Random& random) {
    for (int r = 0; r < rows_; ++r) {
      for (int g = 0; g < row_groups_; ++g) row_scale(r, g) = AnyScale(random);
      for (int g = 0; g < groups_; ++g) sums_[r * groups_ + g] = 0;
      for (int d = 0; d < padded_; ++d) {
        int value = random.Below(255) - 127;
        if (fill_ == Fill::kExtremes) value = r % 2 ? 127 : -127;
        if (d >= shape_.depth) value = 0;
        values_[r * stride_ + d] = static_cast<int8_t>(value);
        if (d < shape_.depth) sums_[r * groups_ + d / shape_.group] += value;
      }
    }
  }

  void FillPanel(Random& random) {
    const int most = (1 << shape_.bits) - 1;
    for (size_t i = 0; i < codes_.size(); ++i) codes_[i] = 0;
    for (int d = 0; d < padded_; ++d) {
      for (int n = 0; n < outputs(); ++n) {
        int code = random.Below(most + 1);
        if (fill_ == Fill::kExtremes) code = n % 3 ? most : 0;
        codes_[CodePlace(d, n)] |= static_cast<uint8_t>(code << CodeShift(d));
      }
    }
    for (size_t i = 0; i < scales_.size(); ++i) {
      scales_[i] = AnyScale(random);
      scales_bf16_[i] = RoundToBf16(scales_[i]);
      zeros_[i] = static_cast<uint8_t>(random.Below(16));
    }
  }

  // Where the code of depth d and output n is.
  size_t CodePlace(int d, int n) const {
    return static_cast<size_t>(d * shape_.bits / 32) * 4 * outputs() + 4 * n + d % 4;
  }
  int CodeShift(int d) const { return shape_.bits == 4 ? d / 4 % 2 * 4 : 0; }

  double Scale(ptrdiff_t place) const {
    return shape_.scale == ScaleType::kBf16 ? FromBf16(scales_bf16_[place])
                                            : scales_[place];
  }

  // The sum in brackets of the contract.
  int64_t GroupSum(int r, int g, int n, ptrdiff_t place) const {
    const int zero = shape_.zero_points ? zeros_[place] : 1 << (shape_.bits - 1);
    const int begin = g * shape_.group;
    int64_t sum = 0;
    for (int d = begin; d < shape_.depth && d < begin + shape_.group; ++d) {
      const int code =
          codes_[CodePlace(d, n)] >> CodeShift(d) & ((1 << shape_.bits) - 1);
      sum += values_[r * stride_ + d] * (code - zero);
    }
    return sum;
  }

  int rows_;
  int strips_;
  Int8Shape shape_;
  Fill fill_;
  int padded_;
  int groups_;
  int row_groups_;
  int panel_groups_;
  ptrdiff_t stride_;
  Guarded<int8_t> values_;
  Guarded<float> row_scales_;
  Guarded<int32_t> sums_;
  Guarded<uint8_t> codes_;
  Guarded<float> scales_;
  Guarded<bf16> scales_bf16_;
  Guarded<uint8_t> zeros_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_INT8_CASE_H_
