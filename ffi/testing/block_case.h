// An integer product with a panel in the blocks of GGUF files, with its operands in
// guarded memory and its value in float64.
#ifndef KTJAX_FFI_TESTING_BLOCK_CASE_H_
#define KTJAX_FFI_TESTING_BLOCK_CASE_H_

#include <cmath>
#include <vector>

#include "format/blocks.h"
#include "format/panel.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

// Any codes and any finite scales, denormal ones among them.
class BlockCase {
 public:
  // The panel's `panel_strips` strips feed every `apart`-th strip of c.
  BlockCase(int rows, int panel_strips, int apart, const FormatSpec& format, int depth,
            uint64_t seed)
      : rows_(rows),
        panel_strips_(panel_strips),
        apart_(apart),
        format_(format),
        depth_(depth),
        stride_(depth + 7),
        sums_stride_(depth / kBlockSumDepths),
        row_groups_(static_cast<int>(CeilDiv(depth, kInt8Group))),
        values_((rows - 1) * stride_ + depth),
        row_scales_(static_cast<size_t>(rows) * row_groups_),
        sums_(static_cast<size_t>(rows) * sums_stride_),
        layout_(MakeEncoding(format.name, 0, false), panel_strips, depth),
        memory_(layout_.bytes) {
    Random random(seed);
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] = 0;
    for (size_t i = 0; i < row_scales_.size(); ++i) row_scales_[i] = random.Value();
    for (int r = 0; r < rows; ++r) {
      // A row of the largest codes: no sum may saturate.
      const bool extremes = r % 3 == 2;
      for (int d = 0; d < depth; ++d) {
        const int value = extremes ? (r % 2 ? 127 : -127) : random.Below(255) - 127;
        values_[r * stride_ + d] = static_cast<int8_t>(value);
        sums_[r * sums_stride_ + d / kBlockSumDepths] += value;
      }
    }
    for (int64_t i = 0; i < layout_.bytes; ++i) {
      // The same for weights.
      memory_[i] = seed % 2 ? 0xff : static_cast<uint8_t>(random.Bits());
    }
    const auto fill_halves = [&](const void* halves) {
      uint16_t* half = const_cast<uint16_t*>(static_cast<const uint16_t*>(halves));
      for (int i = 0; i < layout_.groups * kStrip * panel_strips; ++i) {
        const int sign = random.Below(2) << 15;
        half[i] = static_cast<uint16_t>(sign | random.Below(16 << 10));
      }
    };
    const QuantPanel panel = layout_.At(memory_.data());
    fill_halves(panel.scales);
    if (format.blocks->mins) fill_halves(panel.mins);
  }

  int rows() const { return rows_; }
  // Of c.
  int strips() const { return (panel_strips_ - 1) * apart_ + 1; }

  int64_t code_bytes() const {
    return int64_t{depth_} * format_.bits() / 8 * kStrip * panel_strips_;
  }

  // c of the last `rows` rows. Checks that nothing but the panel's strips was written.
  std::vector<float> Run(const Kernels& kernels, int rows,
                         Prefetch* prefetch = nullptr) const {
    const int skipped = rows_ - rows;
    Guarded<float> c(static_cast<size_t>(rows - 1) * kPanel + kStrip * strips());
    const Int8Rows a = {values_.data() + skipped * stride_,
                        stride_,
                        row_scales_.data() + skipped * row_groups_,
                        row_groups_,
                        sums_.data() + skipped * sums_stride_,
                        sums_stride_,
                        kBlockSumDepths};
    QuantPanel panel = layout_.At(memory_.data());
    panel.apart = apart_;
    kernels.gemm_int8(format_, a, panel, depth_, rows, c.data(), prefetch);
    bool kept = true;
    for (size_t i = 0; i < c.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &c[i], sizeof bits);
      const int strip = static_cast<int>(i % kPanel / kStrip);
      const bool inside = strip < strips() && strip % apart_ == 0;
      if (!inside && bits != 0xffffffffu) kept = false;
    }
    KTJAX_CHECK(kept, "%s: %s: rows %d strips %d: wrote beyond its strips",
                kernels.name, format_.name, rows, panel_strips_);
    return {c.data(), c.data() + c.size()};
  }

  // Compares c of every `row_step`-th row with its value. A sub-block's term has up to
  // three roundings of 2^-24 and every sum one.
  void CheckValues(const Kernels& kernels, const std::vector<float>& c,
                   int row_step) const {
    const double bound = (2.0 * sums_stride_ + row_groups_ + 4) * 0x1p-24;
    WithBlockFormat(format_.format, [&]<Format kFormat>() {
      for (int n = 0; n < kStrip * panel_strips_; ++n) {
        const std::vector<Weight> weights = Weights<kFormat>(n);
        for (int r = 0; r < rows_; r += row_step) {
          double sum = 0, magnitude = 0;
          for (int d = 0; d < depth_; ++d) {
            const double x = double{row_scales_[r * row_groups_ + d / kInt8Group]} *
                             values_[r * stride_ + d];
            sum += x * (weights[d].product - weights[d].min);
            magnitude += std::fabs(x * weights[d].offset_product) +
                         std::fabs(x * weights[d].min);
          }
          const int place = n / kStrip * apart_ * kStrip + n % kStrip;
          const float got = c[static_cast<size_t>(r) * kPanel + place];
          KTJAX_CHECK(std::fabs(got - sum) <= bound * magnitude,
                      "%s: %s: row %d of %d, output %d of %d strips, depth %d: %.9g, "
                      "not %.9g",
                      kernels.name, format_.name, r, rows_, n, panel_strips_, depth_,
                      got, sum);
        }
      }
    });
  }

 private:
  // A weight is product - min. Kernels may sum codes before they subtract that of zero.
  struct Weight {
    double product;
    double offset_product;
    double min;
  };

  template <Format kFormat>
  std::vector<Weight> Weights(int n) const {
    constexpr BlockSpec kSpec = *FindBlocks(kFormat);
    const QuantPanel panel = layout_.At(memory_.data());
    const int lanes = kStrip * panel_strips_;
    std::vector<Weight> weights;
    for (int d = 0; d < depth_; ++d) {
      const uint8_t* words =
          panel.codes + (int64_t{d / kDepth} * kSpec.bits * lanes + n) * 4;
      const uint32_t quad = QuadOfCodes<kSpec.bits>(d % kDepth / 4, [&](int i) {
        uint32_t word;
        std::memcpy(&word, words + int64_t{i} * lanes * 4, sizeof word);
        return word;
      });
      const int code = quad >> 8 * (d % 4) & 255;
      const SubScale sub = SubScaleOf<kFormat>(panel, d, n, lanes);
      const double number = kSpec.table ? kIq4Values[code & 15] : code - kSpec.zero;
      weights.push_back({number * sub.scale, (number + 128) * sub.scale, sub.min});
    }
    return weights;
  }

  int rows_;
  int panel_strips_;
  int apart_;
  const FormatSpec& format_;
  int depth_;
  ptrdiff_t stride_;
  ptrdiff_t sums_stride_;
  int row_groups_;
  Guarded<int8_t> values_;
  Guarded<float> row_scales_;
  Guarded<int32_t> sums_;
  PanelLayout layout_;
  Guarded<uint8_t> memory_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_BLOCK_CASE_H_
