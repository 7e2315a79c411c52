// The tests that the integer kernels of every instruction set pass.
#ifndef KTJAX_FFI_TESTING_INT8_SUITE_H_
#define KTJAX_FFI_TESTING_INT8_SUITE_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/bf16.h"
#include "gemm/kernel.h"
#include "testing/block_case.h"
#include "testing/check.h"
#include "testing/int8_case.h"
#include "testing/kernel_suite.h"

namespace ktjax {

class Int8Suite {
 public:
  Int8Suite(const Kernels& kernels, SuiteSize size)
      : kernels_(kernels), small_(size == SuiteSize::kSmall) {}

  void Run() {
    kernels_.enter();
    TestExact();
    TestSplits();
    TestPrefetch();
    TestNear();
    TestNan();
    TestBlocks();
    kernels_.leave();
    TestQuantize();
  }

 private:
  // Every kind of code with every kind of group; depths that end within a group.
  std::vector<Int8Shape> Shapes() const {
    constexpr ScaleType kF32 = ScaleType::kFloat32, kBf16 = ScaleType::kBf16;
    std::vector<Int8Shape> shapes = {
        {8, false, kF32, 388, 128, true}, {4, false, kF32, 260, 128, true},
        {4, true, kF32, 256, 128, false}, {4, true, kF32, 64, 32, false},
        {4, false, kBf16, 96, 32, false},
    };
    if (small_) return shapes;
    const std::vector<Int8Shape> more = {
        {8, false, kF32, 1, 128, true},    {8, false, kF32, 160, 128, true},
        {8, false, kF32, 256, 128, true},  {4, false, kF32, 7, 128, true},
        {4, false, kF32, 256, 64, false},  {4, true, kF32, 320, 64, false},
        {4, false, kF32, 256, 128, false}, {4, true, kBf16, 288, 32, false},
        {4, false, kBf16, 416, 32, false}, {4, true, kF32, 384, 128, false},
    };
    shapes.insert(shapes.end(), more.begin(), more.end());
    return shapes;
  }

  // Whole numbers: every sum must be exact.
  void TestExact() {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      for (const Int8Shape& shape : Shapes()) {
        for (const Fill fill : {Fill::kExact, Fill::kExtremes}) {
          if (small_ && fill == Fill::kExtremes && strips < kPanelStrips) continue;
          const Int8Case int8_case(kernels_.max_rows, strips, shape, fill, strips);
          int8_case.CheckValues(kernels_, int8_case.Run(kernels_, int8_case.rows()),
                                small_ ? 7 : 1);
        }
      }
    }
  }

  // Any scales, so that another order of sums has other bits: calls with fewer rows
  // give the bits of the call with all.
  void TestSplits() {
    for (int strips = 1; strips <= kPanelStrips; ++strips) {
      for (const Int8Shape& shape : Shapes()) {
        if (small_ && strips != 3) continue;
        const Int8Case int8_case(kernels_.max_rows, strips, shape, Fill::kAny, strips);
        const int all = int8_case.rows();
        const std::vector<float> expected = int8_case.Run(kernels_, all);
        int8_case.CheckValues(kernels_, expected, small_ ? 13 : 1);
        for (int rows = 1; rows <= all; ++rows) {
          const int past = rows % kStrip;
          if (small_ && past != 0 && past != 1 && past != 7) continue;
          CheckSameRows(int8_case.Run(kernels_, rows), expected, rows, int8_case,
                        "with fewer rows");
        }
      }
    }
  }

  // The rows of c are the last ones of `expected`.
  template <typename Case>
  void CheckSameRows(const std::vector<float>& c, const std::vector<float>& expected,
                     int rows, const Case& int8_case, const char* what) {
    const size_t skipped = expected.size() - c.size();
    for (int r = 0; r < rows; ++r) {
      const size_t row = static_cast<size_t>(r) * kPanel;
      const size_t bytes = sizeof(float) * kStrip * int8_case.strips();
      KTJAX_CHECK(std::memcmp(&c[row], &expected[skipped + row], bytes) == 0,
                  "%s: row %d of %d, %d strips: other bits %s", kernels_.name, r, rows,
                  int8_case.strips(), what);
    }
  }

  // Prefetching changes no result, and gets through all chunks.
  void TestPrefetch() {
    constexpr int kChunks = 3, kChunkBytes = 2048, kStride = 3000;
    static const char memory[kChunks * kStride] = {};
    for (const Int8Shape& shape :
         {Int8Shape{8, false, ScaleType::kFloat32, 320, 128, true},
          Int8Shape{4, false, ScaleType::kFloat32, 320, 128, true},
          Int8Shape{4, false, ScaleType::kBf16, 320, 32, false}}) {
      const int bits = shape.bits;
      const Int8Case int8_case(kernels_.max_rows, 3, shape, Fill::kAny, bits);
      for (const int rows : {1, kernels_.max_rows / 2 + 1, kernels_.max_rows}) {
        const std::vector<float> expected = int8_case.Run(kernels_, rows);
        for (int lines = 1; lines <= 4; ++lines) {
          Prefetch prefetch{memory,      kStride,
                            kChunkBytes, kChunks * kChunkBytes,
                            0,           lines * Prefetch::kPerPair};
          // The 160 pairs of a call are worth at least one line each.
          for (int call = 0; call < 2; ++call) {
            CheckSameRows(int8_case.Run(kernels_, rows, &prefetch), expected, rows,
                          int8_case, "with prefetching");
          }
          KTJAX_CHECK(prefetch.position >= prefetch.total_bytes || !prefetches_,
                      "%s: %d bits, rows %d lines %d: stopped at byte %lld",
                      kernels_.name, bits, rows, lines,
                      static_cast<long long>(prefetch.position));
        }
      }
    }
  }

  // What is near is fetched as it is read, and changes no result either.
  void TestNear() {
    constexpr int kDepths = 320;
    static const char memory[kDepths * kPanel] = {};
    for (const Int8Shape& shape :
         {Int8Shape{8, false, ScaleType::kFloat32, kDepths, 128, true},
          Int8Shape{4, true, ScaleType::kFloat32, kDepths, 128, false},
          Int8Shape{4, true, ScaleType::kFloat32, kDepths, 64, false},
          Int8Shape{4, false, ScaleType::kBf16, kDepths, 32, false}}) {
      for (int strips = 1; strips <= kPanelStrips; ++strips) {
        const Int8Case int8_case(kernels_.max_rows, strips, shape, Fill::kAny, strips);
        for (int rows = 1; rows <= kernels_.near_rows; ++rows) {
          const int64_t bytes = int64_t{kDepths} * shape.bits / 8 * kStrip * strips;
          Prefetch prefetch{memory, 0, bytes, bytes};
          prefetch.near_bytes = 2048;
          CheckSameRows(int8_case.Run(kernels_, rows, &prefetch),
                        int8_case.Run(kernels_, rows), rows, int8_case, "near");
          KTJAX_CHECK(prefetch.position == bytes,
                      "%s: %d bits, rows %d strips %d: read %lld bytes, fetched %lld",
                      kernels_.name, shape.bits, rows, strips,
                      static_cast<long long>(bytes),
                      static_cast<long long>(prefetch.position));
        }
      }
    }
  }

  // A scale that is NaN makes its row NaN, and no other.
  void TestNan() {
    const Int8Shape shape = {8, false, ScaleType::kFloat32, 160, 128, true};
    const Int8Case int8_case(5, 2, shape, Fill::kExact, 1);
    int8_case.row_scale(3, 1) = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> c = int8_case.Run(kernels_, 5);
    for (int r = 0; r < 5; ++r) {
      for (int n = 0; n < 2 * kStrip; ++n) {
        KTJAX_CHECK(std::isnan(c[r * kPanel + n]) == (r == 3), "%s: row %d output %d",
                    kernels_.name, r, n);
      }
    }
  }

  // Every format in blocks: values, the same bits for any split of the rows, and a
  // prefetch that gets through and changes nothing.
  void TestBlocks() {
    for (int i = 0; i < kFormats; ++i) {
      const FormatSpec& format = SpecOf(static_cast<Format>(i));
      if (!format.blocks) continue;
      // Depths that end within a group of the rows, where blocks allow.
      const int depth = format.blocks->depths == kDepth ? 5 * kDepth : 256;
      for (int strips = 1; strips <= kPanelStrips; ++strips) {
        if (small_ && strips != 3) continue;
        const BlockCase side_by_side(kernels_.max_rows, strips, 1, format, depth, 2);
        TestBlocks(side_by_side);
      }
      for (const int strips : {2, 1}) {
        if (small_ && strips == 1) continue;
        TestBlocks(BlockCase(5, strips, 2, format, 2 * depth, strips));
      }
    }
  }

  void TestBlocks(const BlockCase& block_case) {
    const int all = block_case.rows();
    const std::vector<float> expected = block_case.Run(kernels_, all);
    block_case.CheckValues(kernels_, expected, small_ ? 13 : 1);
    for (int rows = 1; rows < all; rows += small_ ? 22 : 1) {
      CheckSameRows(block_case.Run(kernels_, rows), expected, rows, block_case,
                    "with fewer rows");
    }
    static const char memory[5000] = {};
    // What is near is fetched as it is read.
    const int64_t bytes = block_case.code_bytes();
    for (int rows = 1; rows <= kernels_.near_rows && rows <= all; ++rows) {
      Prefetch prefetch{memory, 0, bytes, bytes};  // a prefetch cannot fault
      prefetch.near_bytes = 2048;
      prefetch.scales = memory;
      prefetch.scales_bytes = 1000;
      CheckSameRows(block_case.Run(kernels_, rows, &prefetch), expected, rows,
                    block_case, "near");
      KTJAX_CHECK(prefetch.position == bytes, "%s: rows %d: fetched %lld of %lld bytes",
                  kernels_.name, rows, static_cast<long long>(prefetch.position),
                  static_cast<long long>(bytes));
    }
    for (const int lines : {1, 3}) {
      Prefetch prefetch{memory, 0, 5000, 5000, 0, lines * Prefetch::kPerPair};
      // Of 80 pairs or more.
      CheckSameRows(block_case.Run(kernels_, all, &prefetch), expected, all, block_case,
                    "with prefetching");
      KTJAX_CHECK(prefetch.position >= prefetch.total_bytes || !prefetches_,
                  "%s: stopped at byte %lld", kernels_.name,
                  static_cast<long long>(prefetch.position));
    }
  }

  void TestQuantize() {
    for (const int group : {kBlockSumDepths, 32, 64, 128}) {
      for (const int depth : {1, 30, 32, 200, 257}) {
        for (const bool low : {false, true}) TestQuantize(7, depth, group, low);
      }
    }
  }

  // The value that starts a group, by row: what makes scales that are not ordinary.
  static float Special(int row) {
    switch (row) {
      case 1:
        return std::numeric_limits<float>::quiet_NaN();
      case 2:
        return -std::numeric_limits<float>::infinity();
      case 3:
        return 127.0f;  // a scale of 1, and ties among the values
      default:
        return 0.0f;
    }
  }
  static float RowFactor(int row) {
    switch (row) {
      case 3:
        return 8.0f;
      case 4:
        return 0.0f;
      case 5:
        return 0x1p-120f;  // scales below 2^-126
      case 6:
        return 0x1p100f;
      default:
        return 1.0f;
    }
  }

  void TestQuantize(int rows, int depth, int group, bool low) {
    const int padded = static_cast<int>(RoundUp(depth, kDepth));
    const int groups = static_cast<int>(CeilDiv(depth, kInt8Group));
    const int sum_groups = static_cast<int>(CeilDiv(depth, group));
    const ptrdiff_t stride = padded + 3;
    const size_t size = (rows - 1) * stride + depth;  // nothing to read after a row
    const ptrdiff_t low_offset = low ? rows * stride : 0;
    Guarded<bf16> src(low_offset + size);
    Random random(depth + group);
    for (int r = 0; r < rows; ++r) {
      for (int d = 0; d < depth; ++d) {
        float value = random.Value() * RowFactor(r);
        if (r == 3) value = std::nearbyint(value * 4) + 0.5f;
        if (d % kInt8Group == 0 && Special(r) != 0) value = Special(r);
        const bf16 high = RoundToBf16(value);
        src[r * stride + d] = high;
        const float rest = value - FromBf16(high);
        if (low) {
          src[low_offset + r * stride + d] = std::isinf(value) ? 0 : RoundToBf16(rest);
        }
      }
    }
    Guarded<int8_t> values((rows - 1) * stride + padded);
    Guarded<float> scales(static_cast<size_t>(rows) * groups);
    Guarded<int32_t> sums(static_cast<size_t>(rows) * sum_groups);
    kernels_.quantize_rows(
        {src.data(), stride, low_offset}, rows, depth,
        {values.data(), stride, scales.data(), groups, sums.data(), sum_groups, group});
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < groups; ++g) {
        const int begin = g * kInt8Group, end = std::min(depth, begin + kInt8Group);
        std::vector<float> group_values;
        for (int d = begin; d < end; ++d) {
          float value = FromBf16(src[r * stride + d]);
          if (low) value += FromBf16(src[low_offset + r * stride + d]);
          group_values.push_back(value);
        }
        CheckGroup(group_values, &values[r * stride + begin], scales[r * groups + g],
                   r);
      }
      for (int g = 0; g < sum_groups; ++g) {
        int32_t expected = 0;
        for (int d = g * group; d < std::min(depth, (g + 1) * group); ++d) {
          expected += values[r * stride + d];
        }
        const int32_t sum = sums[r * sum_groups + g];
        KTJAX_CHECK(sum == expected, "%s: row %d, group %d: sum %d, not %d",
                    kernels_.name, r, g, sum, expected);
      }
      for (int d = depth; d < padded; ++d) {
        KTJAX_CHECK(values[r * stride + d] == 0, "%s: row %d: padding at %d",
                    kernels_.name, r, d);
      }
      for (int d = padded; d < stride && r + 1 < rows; ++d) {
        KTJAX_CHECK(values[r * stride + d] == -1, "%s: row %d: wrote at %d",
                    kernels_.name, r, d);
      }
    }
  }

  void CheckGroup(const std::vector<float>& values, const int8_t* codes, float scale,
                  int row) {
    float most = 0;
    bool finite = true;
    for (const float value : values) {
      most = std::max(most, std::fabs(value));
      finite = finite && std::isfinite(value);
    }
    float expected = most / 127;
    if (expected < 0x1p-126f) expected = 0;
    KTJAX_CHECK(finite ? scale == expected : std::isnan(scale),
                "%s: row %d: scale %.9g, not %.9g", kernels_.name, row, scale,
                expected);
    for (size_t i = 0; i < values.size(); ++i) {
      int code = 0;
      if (finite && expected > 0) {
        code = std::clamp(static_cast<int>(std::nearbyint(values[i] / expected)), -127,
                          127);
      }
      KTJAX_CHECK(codes[i] == code, "%s: row %d, place %d of a group: %d, not %d",
                  kernels_.name, row, static_cast<int>(i), codes[i], code);
    }
  }

  const Kernels& kernels_;
  const bool small_;
  // The portable kernels leave prefetching to the CPU.
  const bool prefetches_ = std::strcmp(kernels_.name, "portable") != 0;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_INT8_SUITE_H_
