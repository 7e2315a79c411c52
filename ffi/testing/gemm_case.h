// A product with its operands in guarded memory and its value in float64.
#ifndef KTJAX_FFI_TESTING_GEMM_CASE_H_
#define KTJAX_FFI_TESTING_GEMM_CASE_H_

#include <cmath>
#include <memory>
#include <vector>

#include "base/bf16.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

struct TermShape {
  int depth;
  int first_strip = 0;
  int strip_step = 1;
};

class GemmCase {
 public:
  GemmCase(int rows, int strips, const std::vector<TermShape>& shapes, uint64_t seed)
      : rows_(rows), strips_(strips), start_(static_cast<size_t>(rows) * kPanel) {
    Random random(seed);
    for (const TermShape& shape : shapes) AddOperands(shape, random);
    for (float& value : start_) value = random.Value();
  }

  int rows() const { return rows_; }
  int strips() const { return strips_; }
  // What c holds before an accumulating product; rows are kPanel apart.
  const std::vector<float>& start() const { return start_; }
  bf16* a(int term) const { return a_[term]->data(); }
  size_t a_size(int term) const { return a_[term]->size(); }
  bf16* b(int term) const { return b_[term]->data(); }
  size_t b_size(int term) const { return b_[term]->size(); }

  // The terms for the last `rows` rows, so that the last row of every a ends at a
  // guard.
  std::vector<Term> Terms(int rows) const {
    std::vector<Term> terms = terms_;
    for (Term& term : terms) term.a += (rows_ - rows) * term.a_stride;
    return terms;
  }

  // The c of the last `rows` rows, in one call. Checks that nothing else was written.
  std::vector<float> Run(const Kernels& kernels, int rows, bool accumulate,
                         Prefetch* prefetch = nullptr) const {
    const size_t skipped = static_cast<size_t>(rows_ - rows) * kPanel;
    Guarded<float> c(static_cast<size_t>(rows - 1) * kPanel + kStrip * strips_);
    const auto inside = [&](size_t i) {
      return i % kPanel < static_cast<size_t>(kStrip * strips_);
    };
    for (size_t i = 0; i < c.size(); ++i) {
      if (accumulate && inside(i)) c[i] = start_[skipped + i];
    }
    const std::vector<Term> terms = Terms(rows);
    kernels.gemm(terms.data(), static_cast<int>(terms.size()), rows, strips_, c.data(),
                 accumulate, prefetch);
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

  // Compares c of every `row_step`-th row with float64. The bound is that of a float32
  // sum in any order: one rounding of 2^-24 per addition, of sums no larger than the
  // sum of the magnitudes (and one more per product, for hardware that rounds it).
  void CheckValues(const Kernels& kernels, const std::vector<float>& c, bool accumulate,
                   int row_step) const {
    for (int r = 0; r < rows_; r += row_step) {
      for (int n = 0; n < kStrip * strips_; ++n) {
        double sum = 0, magnitude = 0;
        int depth = 2;
        if (accumulate) sum = magnitude = start_[r * kPanel + n];
        magnitude = std::fabs(magnitude);
        for (const Term& term : terms_) AddProducts(term, r, n, sum, magnitude, depth);
        const float got = c[static_cast<size_t>(r) * kPanel + n];
        KTJAX_CHECK(
            std::fabs(got - sum) <= depth * 0x1p-23 * magnitude,
            "%s: row %d of %d, output %d of %d strips, depth %d: %.9g, not %.9g",
            kernels.name, r, rows_, n, strips_, terms_[0].depth, got, sum);
      }
    }
  }

 private:
  void AddOperands(const TermShape& shape, Random& random) {
    const int padded = static_cast<int>(RoundUp(shape.depth, kDepth));
    const int width = Width(shape.first_strip, shape.strip_step);
    const ptrdiff_t stride = padded + 6;  // the gap between rows stays NaN
    a_.push_back(std::make_unique<Guarded<bf16>>((rows_ - 1) * stride + padded));
    b_.push_back(std::make_unique<Guarded<bf16>>(padded * kStrip * width));
    Guarded<bf16>&a = *a_.back(), &b = *b_.back();
    for (int r = 0; r < rows_; ++r) {
      for (int d = 0; d < padded; ++d) {
        a[r * stride + d] = d < shape.depth ? RoundToBf16(random.Value()) : 0;
      }
    }
    for (int d = 0; d < padded; ++d) {
      for (int n = 0; n < kStrip * width; ++n) {
        b[d / 2 * 2 * kStrip * width + 2 * n + d % 2] =
            d < shape.depth ? RoundToBf16(random.Value()) : 0;
      }
    }
    terms_.push_back(
        {a.data(), stride, b.data(), shape.depth, shape.first_strip, shape.strip_step});
  }

  int Width(int first_strip, int strip_step) const {
    return static_cast<int>(CeilDiv(strips_ - first_strip, strip_step));
  }

  void AddProducts(const Term& term, int r, int n, double& sum, double& magnitude,
                   int& depth) const {
    const int strip = n / kStrip - term.first_strip;
    if (strip < 0 || strip % term.strip_step) return;
    const int width = Width(term.first_strip, term.strip_step);
    const int column = strip / term.strip_step * kStrip + n % kStrip;
    for (int d = 0; d < term.depth; ++d) {
      const double product =
          double{FromBf16(term.a[r * term.a_stride + d])} *
          FromBf16(term.b[d / 2 * 2 * kStrip * width + 2 * column + d % 2]);
      sum += product;
      magnitude += std::fabs(product);
    }
    depth += term.depth;
  }

  int rows_;
  int strips_;
  std::vector<float> start_;
  std::vector<std::unique_ptr<Guarded<bf16>>> a_, b_;
  std::vector<Term> terms_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_GEMM_CASE_H_
