// The tests of packing and decoding quantised panels that every instruction set passes.
// They compare bits with an oracle of their own.
#ifndef KTJAX_FFI_TESTING_FORMAT_SUITE_H_
#define KTJAX_FFI_TESTING_FORMAT_SUITE_H_

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "base/bf16.h"
#include "format/format.h"
#include "format/panel.h"
#include "gemm/kernel.h"
#include "testing/check.h"

namespace ktjax {

inline std::vector<Encoding> AllEncodings() {
  std::vector<Encoding> all;
  for (const char* name :
       {"int8", "int4", "fp8_block", "fp8_channel", "rawint4", "mxfp4", "mxfp8"}) {
    all.push_back(MakeEncoding(name, 0, false));
  }
  for (const int group : {32, 64, 128}) {
    for (const bool zero_points : {false, true}) {
      all.push_back(MakeEncoding("int4_kgroup", group, zero_points));
    }
  }
  return all;
}

// Flushing of denormals, as in worker threads, on or off.
class FlushMode {
 public:
  explicit FlushMode(bool flush) : saved_(_mm_getcsr()) {
    _mm_setcsr(flush ? saved_ | 0x8040 : saved_ & ~0x8040u);
  }
  ~FlushMode() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
};

// The number of a code, by definition.
inline double OracleCode(Code code, int bits, int zero) {
  switch (code) {
    case Code::kE4M3: {
      const int exponent = bits >> 3 & 15, mantissa = bits & 7;
      const double magnitude =
          exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
      return bits & 0x80 ? -magnitude : magnitude;
    }
    case Code::kE2M1: {
      const double magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      return bits & 8 ? -magnitudes[bits & 7] : magnitudes[bits & 7];
    }
    default:
      return bits - zero;
  }
}

// The value of a weight: one product in float32, rounded to bfloat16. Not when
// denormals are flushed.
inline float OracleValue(double code, float scale) {
  if (scale < 0x1p-126f) scale = 0;
  const float product = static_cast<float>(code) * scale;
  return std::fabs(product) < 0x1p-126f ? 0.0f : FromBf16(RoundToBf16(product));
}

// Plain arrays with any codes and any scales, each array up against a guard.
class RandomPlain {
 public:
  RandomPlain(const Encoding& encoding, int outputs, int depth, bool rare_scales,
              Random& random)
      : encoding_(encoding),
        columns_(encoding.scale_columns(depth)),
        outputs_(outputs),
        depth_(depth),
        codes_(outputs * encoding.code_columns(depth)),
        scales_(encoding.scale_rows(outputs) * columns_ *
                ScaleBytes(encoding.spec().scale)),
        zeros_(encoding.scale_rows(outputs) * columns_) {
    for (size_t i = 0; i < codes_.size(); ++i) {
      codes_[i] = static_cast<uint8_t>(random.Bits());
      if (code() == Code::kE4M3 && (codes_[i] & 0x7f) == 0x7f) codes_[i] ^= 1;
    }
    for (size_t i = 0; i < zeros_.size(); ++i) {
      SetScale(i, rare_scales && random.Below(8) == 0 ? RareScale(random)
                                                      : 0x1p-6f * random.Value());
      zeros_[i] = static_cast<uint8_t>(random.Below(16));
    }
  }

  PlainMatrix plain() const {
    return {codes_.data(), scales_.data(),
            encoding_.zero_points ? zeros_.data() : nullptr, outputs_, depth_};
  }

  float Value(int output, int depth) const {
    const int group = encoding_.group ? encoding_.group : depth_;
    const int64_t at =
        output / encoding_.spec().block_outputs * columns_ + depth / group;
    const int64_t row = output * encoding_.code_columns(depth_);
    int bits, zero = 0;
    if (code() == Code::kInt8) {
      bits = static_cast<int8_t>(codes_[row + depth]);
    } else if (code() == Code::kE4M3) {
      bits = codes_[row + depth];
    } else {
      bits = codes_[row + depth / 2] >> depth % 2 * 4 & 15;
      zero = encoding_.zero_points ? zeros_[at] : 8;
    }
    return OracleValue(OracleCode(code(), bits, zero), Scale(at));
  }

 private:
  Code code() const { return encoding_.spec().code; }
  ScaleType type() const { return encoding_.spec().scale; }
  // Scales at which products become denormal, infinite, or 0; 2^-125 (1 - 2^-24) times
  // a half is the tie below 2^-126.
  static float RareScale(Random& random) {
    const float scales[] = {
        0,         0x1p-149f, 0x1.8p-127f, 0x1p-126f, 0x1.fffffep-126f, 0x1p-118f,
        0x1p-101f, 0x1p-100f, 0x1p99f,     0x1p100f,  0x1p121f,         0x1.8p125f};
    return scales[random.Below(static_cast<int>(std::size(scales)))];
  }

  void SetScale(size_t i, float scale) {
    scale = std::fabs(scale);
    if (type() == ScaleType::kFloat32) {
      std::memcpy(scales_.data() + 4 * i, &scale, 4);
    } else if (type() == ScaleType::kBf16) {
      const bf16 bits = RoundToBf16(scale);
      std::memcpy(scales_.data() + 2 * i, &bits, 2);
    } else {
      scales_[i] = static_cast<uint8_t>(RoundToBf16(scale) >> 7);
    }
  }

  float Scale(int64_t i) const {
    if (type() == ScaleType::kFloat32) {
      float scale;
      std::memcpy(&scale, scales_.data() + 4 * i, 4);
      return scale;
    }
    if (type() == ScaleType::kBf16) {
      bf16 bits;
      std::memcpy(&bits, scales_.data() + 2 * i, 2);
      return FromBf16(bits);
    }
    return std::ldexp(1.0f, scales_[i] - 127);
  }

  const Encoding encoding_;
  const int64_t columns_;
  const int outputs_, depth_;
  Guarded<uint8_t> codes_, scales_, zeros_;
};

class FormatSuite {
 public:
  FormatSuite(const Kernels& kernels, bool small) : kernels_(kernels), small_(small) {}

  void Run() {
    for (const Encoding& encoding : AllEncodings()) {
      for (int strips = 1; strips <= kPanelStrips; ++strips) {
        if (small_ && strips == 3) continue;
        for (const bool rare : {false, true}) TestPanels(encoding, strips, rare);
      }
      TestPrefetch(encoding);
    }
    for (int i = 0; i < kFormats; ++i) {
      const FormatSpec& spec = SpecOf(static_cast<Format>(i));
      if (spec.blocks) TestBlocks(MakeEncoding(spec.name, 0, false));
    }
  }

 private:
  struct Place {
    int first_output, outputs, first_depth, depth;
  };

  // Parts of a matrix, with edges within strips and blocks, in panels that may be
  // deeper.
  void TestPanels(const Encoding& encoding, int strips, bool rare) {
    const bool any_depth = encoding.group == 0 || encoding.spec().block_outputs > 1;
    const int outputs = 150, depth = any_depth ? 309 : 384;
    Random random(strips);
    const RandomPlain source(encoding, outputs, depth, rare, random);
    const int width = kStrip * strips;
    std::vector<Place> places = {
        {0, width, 0, depth},
        {outputs - width + 3, width - 3, 128, depth - 128},
        {120, std::min(width, 19), 256, 32},
        {5, 0, 0, depth},
    };
    if (small_) places.resize(2);
    for (const Place& place : places) TestPanel(encoding, source, place, strips);
  }

  void TestPanel(const Encoding& encoding, const RandomPlain& source,
                 const Place& place, int strips) {
    const int depth = static_cast<int>(RoundUp(place.depth, kDepth));
    const PanelLayout layout(encoding, strips, depth);
    KTJAX_CHECK(layout.bytes % 64 == 0, "%s: %lld bytes", encoding.spec().name,
                static_cast<long long>(layout.bytes));
    Guarded<uint8_t> memory(layout.bytes);
    for (int s = 0; s < strips; ++s) {
      PackStrip(layout, source.plain(), place.first_output + s * kStrip,
                std::min(place.outputs - s * kStrip, kStrip), place.first_depth,
                place.depth, s, memory.data());
    }
    const QuantPanel panel = layout.At(memory.data());

    const int width = kStrip * strips;
    std::vector<bf16> expected(static_cast<size_t>(depth) * width);
    int wrong = 0;
    for (int d = 0; d < depth; ++d) {
      for (int n = 0; n < width; ++n) {
        const bool inside = n < place.outputs && d < place.depth;
        const float value =
            inside ? source.Value(place.first_output + n, place.first_depth + d) : 0.0f;
        expected[d / 2 * 2 * width + 2 * n + d % 2] = RoundToBf16(value);
        wrong += PanelValue(panel, d, n) != value;
      }
    }
    KTJAX_CHECK(wrong == 0, "%s: %d other values in the panel", encoding.spec().name,
                wrong);

    const int blocks = depth / kDepth;
    for (int first = 0; first < blocks; first += small_ ? 3 : 1) {
      for (const int count : {1, 2, blocks - first}) {
        if (first + count > blocks) continue;
        for (const bool flush : {false, true}) {
          TestRange(encoding, panel, first, count, flush, expected);
        }
        if (kernels_.contract_codes) TestContract(encoding, panel, first, count);
      }
    }
    if (kernels_.dot_codes) TestDot(encoding, panel, depth, expected);
  }

  // Blocks [first, + count) of 32 depths: the sums of decoded values, and the same bits
  // for a row alone.
  void TestContract(const Encoding& encoding, const QuantPanel& panel, int first,
                    int count) {
    const int pairs = count * kDepth / 2, width = kStrip * panel.strips;
    const ptrdiff_t a_stride = width + 8, c_stride = 2 * pairs + 4;
    std::vector<bf16> values(static_cast<size_t>(2 * pairs) * width);
    kernels_.decode(panel, first * kDepth / 2, pairs, values.data(), nullptr);
    for (int rows = 1; rows <= kMaxContractRows; rows += small_ ? 3 : 1) {
      Random random(rows);
      Guarded<bf16> a((rows - 1) * a_stride + width);
      Guarded<float> got((rows - 1) * c_stride + 2 * pairs), alone(got.size());
      for (size_t i = 0; i < a.size(); ++i) a[i] = RoundToBf16(random.Value());
      for (size_t i = 0; i < got.size(); ++i) got[i] = alone[i] = random.Value();
      const std::vector<float> before(got.data(), got.data() + got.size());
      const auto operand = [&](int row) {
        StripRows rows_of{{}, a_stride};
        for (int s = 0; s < panel.strips; ++s) {
          rows_of.strip[s] = a.data() + row * a_stride + kStrip * s;
        }
        return rows_of;
      };
      Prefetch prefetch = ShortChunks();
      const bool taken =
          kernels_.contract_codes(operand(0), rows, panel, first * kDepth / 2, pairs,
                                  got.data(), c_stride, &prefetch);
      const Code code = encoding.spec().code;
      KTJAX_CHECK(taken == (code == Code::kInt8 || code == Code::kInt4),
                  "%s: contract_codes: %s", encoding.spec().name,
                  taken ? "taken" : "not taken");
      if (!taken) return;
      int wrong = 0, other = 0;
      for (int r = 0; r < rows; ++r) {
        float* row = alone.data() + r * c_stride;
        kernels_.contract_codes(operand(r), 1, panel, first * kDepth / 2, pairs, row,
                                c_stride, nullptr);
        for (int d = 0; d < 2 * pairs; ++d) {
          double sum = before[r * c_stride + d], magnitude = std::fabs(sum);
          for (int n = 0; n < width; ++n) {
            const double product = double{FromBf16(a[r * a_stride + n])} *
                                   FromBf16(values[d / 2 * 2 * width + 2 * n + d % 2]);
            sum += product;
            magnitude += std::fabs(product);
          }
          const float value = got[r * c_stride + d];
          other += std::memcmp(&value, &row[d], sizeof value) != 0;
          wrong +=
              magnitude < 0x1p127 && !(std::fabs(value - sum) <=
                                       (width + 1) * (0x1p-24 * magnitude + 0x1p-126));
        }
      }
      KTJAX_CHECK(wrong == 0 && other == 0,
                  "%s: %s, group %d: contract_codes: %d rows, %d strips, blocks %d + "
                  "%d: %d wrong, %d other bits alone",
                  kernels_.name, encoding.spec().name, encoding.group, rows,
                  panel.strips, first, count, wrong, other);
    }
  }

  void TestDot(const Encoding& encoding, const QuantPanel& panel, int depth,
               const std::vector<bf16>& values) {
    constexpr int kRows = kMaxContractRows;
    const int width = kStrip * panel.strips;
    const ptrdiff_t stride = depth + 8;
    Random random(2);
    Guarded<bf16> a((kRows - 1) * stride + depth);
    for (size_t i = 0; i < a.size(); ++i) a[i] = RoundToBf16(random.Value());
    std::vector<float> alone(kRows * kPanel), got(kRows * kPanel);
    for (int r = 0; r < kRows; ++r) {
      KTJAX_CHECK(kernels_.dot_codes(a.data() + r * stride, stride, 1, panel, depth,
                                     &alone[r * kPanel], nullptr),
                  "%s: dot_codes: not taken", encoding.spec().name);
    }
    for (int rows = 1; rows <= kRows; rows += small_ ? 3 : 1) {
      Prefetch prefetch = ShortChunks();
      kernels_.dot_codes(a.data(), stride, rows, panel, depth, got.data(), &prefetch);
      int wrong = 0, other = 0;
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < width; ++n) {
          double sum = 0, magnitude = 0;
          for (int d = 0; d < depth; ++d) {
            const double product = double{FromBf16(a[r * stride + d])} *
                                   FromBf16(values[d / 2 * 2 * width + 2 * n + d % 2]);
            sum += product;
            magnitude += std::fabs(product);
          }
          const float value = got[r * kPanel + n];
          other += std::memcmp(&value, &alone[r * kPanel + n], sizeof value) != 0;
          // What may overflow is left out; denormal products may be lost.
          wrong +=
              magnitude < 0x1p127 && !(std::fabs(value - sum) <=
                                       (depth + 1) * (0x1p-24 * magnitude + 0x1p-126));
        }
      }
      KTJAX_CHECK(
          wrong == 0 && other == 0,
          "%s: %s, group %d: dot_codes: %d rows, %d strips, %d depths: %d wrong, "
          "%d with other bits alone",
          kernels_.name, encoding.spec().name, encoding.group, rows, panel.strips,
          depth, wrong, other);
    }
  }

  // Decodes blocks [first, + count) of 32 depths.
  void TestRange(const Encoding& encoding, const QuantPanel& panel, int first,
                 int count, bool flush, const std::vector<bf16>& expected) {
    const size_t block = static_cast<size_t>(kDepth) * kStrip * panel.strips;
    Guarded<bf16> got(count * block);
    {
      const FlushMode mode(flush);
      kernels_.decode(panel, first * kDepth / 2, count * kDepth / 2, got.data(),
                      nullptr);
    }
    size_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const bf16 want = expected[first * block + i];
      wrong += (want & 0x7fff) == 0 ? (got[i] & 0x7fff) != 0 : got[i] != want;
    }
    KTJAX_CHECK(wrong == 0,
                "%s: %s, group %d%s: %d strips, blocks %d + %d%s: %zu wrong",
                kernels_.name, encoding.spec().name, encoding.group,
                encoding.zero_points ? ", zero points" : "", panel.strips, first, count,
                flush ? ", flushing" : "", wrong);
  }

  // The blocks of GGUF, against the value of each weight in the panel, which the tests
  // in Python hold against the gguf package.
  void TestBlocks(const Encoding& encoding) {
    const BlockSpec& spec = *encoding.spec().blocks;
    const int outputs = 40, depth = 512, strips = small_ ? 2 : 4;
    Random random(7);
    Guarded<uint8_t> source(outputs * encoding.code_columns(depth));
    for (size_t i = 0; i < source.size(); ++i) {
      source[i] = static_cast<uint8_t>(random.Bits());
    }
    // Finite halves: below the largest exponent.
    for (size_t i = 0; i < source.size(); i += spec.bytes) {
      source[i + spec.scale_at + 1] &= 0xbf;
      if (spec.mins) source[i + spec.min_at + 1] &= 0xbf;
    }
    const PlainMatrix plain{source.data(), nullptr, nullptr, outputs, depth};
    CheckPlain(encoding, plain, "gate", 0);
    const PanelLayout layout(encoding, strips, depth);
    Guarded<uint8_t> memory(layout.bytes);
    for (int s = 0; s < strips; ++s) {
      PackStrip(layout, plain, s * kStrip, std::clamp(outputs - s * kStrip, 0, kStrip),
                0, depth, s, memory.data());
    }
    const QuantPanel panel = layout.At(memory.data());
    const int width = kStrip * strips;
    std::vector<bf16> expected(static_cast<size_t>(depth) * width);
    int padding = 0;
    for (int d = 0; d < depth; ++d) {
      for (int n = 0; n < width; ++n) {
        const float value = PanelValue(panel, d, n);
        expected[d / 2 * 2 * width + 2 * n + d % 2] = RoundToBf16(value);
        padding += n >= outputs && value != 0;
      }
    }
    KTJAX_CHECK(padding == 0, "%s: %d values in the padding", encoding.spec().name,
                padding);
    const int blocks = depth / kDepth;
    for (int first = 0; first < blocks; first += small_ ? 5 : 1) {
      for (const bool flush : {false, true}) {
        TestRange(encoding, panel, first, blocks - first, flush, expected);
      }
    }
    TestApart(encoding, panel, depth);
    if (kernels_.dot_codes) {
      TestDot(encoding, panel, depth, expected);
      TestDotApart(encoding, panel, depth);
    }
  }

  // Strips that are decoded to every other strip, from a block in the middle on; what
  // is between them stays.
  void TestApart(const Encoding& encoding, QuantPanel panel, int depth) {
    const int first = depth / 2, width = kStrip * panel.strips;
    Guarded<bf16> want(static_cast<size_t>(depth - first) * width);
    kernels_.decode(panel, first / 2, (depth - first) / 2, want.data(), nullptr);
    constexpr bf16 kKept = 0x1234;
    std::vector<bf16> got(2 * want.size(), kKept);
    panel.apart = 2;
    kernels_.decode(panel, first / 2, (depth - first) / 2, got.data(), nullptr);
    int wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t strip = i / (2 * kStrip), at = strip / 2 * 2 * kStrip;
      wrong += got[i] != (strip % 2 ? kKept : want[at + i % (2 * kStrip)]);
    }
    KTJAX_CHECK(wrong == 0, "%s: %s: %d wrong of strips apart", kernels_.name,
                encoding.spec().name, wrong);
  }

  // Products with strips apart; what is between them in c stays.
  void TestDotApart(const Encoding& encoding, QuantPanel panel, int depth) {
    if (panel.strips > kPanelStrips / 2) {
      const PanelLayout layout(encoding, kPanelStrips / 2, depth);
      Guarded<uint8_t> memory(layout.bytes);
      std::fill_n(memory.data(), layout.bytes, uint8_t{0x2b});
      return TestDotApart(encoding, layout.At(memory.data()), depth);
    }
    Random random(3);
    Guarded<bf16> a(depth);
    for (size_t i = 0; i < a.size(); ++i) a[i] = RoundToBf16(random.Value());
    constexpr float kKept = 7;
    std::vector<float> want(kPanel, kKept), got(kPanel, kKept);
    kernels_.dot_codes(a.data(), depth, 1, panel, depth, want.data(), nullptr);
    panel.apart = 2;
    kernels_.dot_codes(a.data(), depth, 1, panel, depth, got.data(), nullptr);
    int wrong = 0;
    for (int n = 0; n < 2 * kStrip * panel.strips; ++n) {
      const int strip = n / kStrip;
      const float expected = strip % 2 ? kKept : want[strip / 2 * kStrip + n % kStrip];
      wrong += std::memcmp(&got[n], &expected, sizeof expected) != 0;
    }
    KTJAX_CHECK(wrong == 0, "%s: %s: dot_codes: %d wrong of strips apart",
                kernels_.name, encoding.spec().name, wrong);
  }

  // A schedule that ends many times within a product, at a rate that is no whole number
  // of lines, and goes on elsewhere.
  static Prefetch ShortChunks() {
    static const char memory[1 << 14] = {};
    Prefetch prefetch{memory, 1000, 320, 4 * 320, 0, 25};
    static const ByteSpan more = {memory, 420};
    prefetch.more = &more;
    prefetch.more_count = 1;
    return prefetch;
  }

  // Prefetching changes nothing and gets through its chunks.
  void TestPrefetch(const Encoding& encoding) {
    constexpr int kChunks = 2, kChunkBytes = 2048, kStride = 3000;
    static const char memory[kChunks * kStride] = {};
    const int depth = 256;
    Random random(1);
    const RandomPlain source(encoding, kStrip, depth, false, random);
    const PanelLayout layout(encoding, 1, depth);
    Guarded<uint8_t> bytes(layout.bytes);
    PackStrip(layout, source.plain(), 0, kStrip, 0, depth, 0, bytes.data());
    const QuantPanel panel = layout.At(bytes.data());
    Guarded<bf16> plain(depth * kStrip), got(depth * kStrip);
    kernels_.decode(panel, 0, depth / 2, plain.data(), nullptr);
    Prefetch prefetch{memory, kStride,           kChunkBytes, kChunks * kChunkBytes,
                      0,      Prefetch::kPerPair};
    kernels_.decode(panel, 0, depth / 2, got.data(), &prefetch);
    KTJAX_CHECK(!std::memcmp(plain.data(), got.data(), sizeof(bf16) * got.size()),
                "%s: %s: other bits with prefetching", kernels_.name,
                encoding.spec().name);
    KTJAX_CHECK(prefetch.position == prefetch.total_bytes, "%s: stopped at byte %lld",
                kernels_.name, static_cast<long long>(prefetch.position));
  }

  const Kernels& kernels_;
  const bool small_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_FORMAT_SUITE_H_
