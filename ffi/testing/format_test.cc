// Tests of the storage formats: names, encoding, what is refused; and the suite of
// decoders on every instruction set that this CPU has.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "format/encode.h"
#include "moe/backend.h"
#include "testing/format_suite.h"

namespace ktjax {
namespace {

// Checks that `call` throws std::invalid_argument with `part` in its message.
template <typename Call>
void ExpectRefusal(const char* part, Call call) {
  std::string message = "no exception";
  try {
    call();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  KTJAX_CHECK(message.find(part) != std::string::npos, "'%s' is not in: %s", part,
              message.c_str());
}

void TestNames() {
  for (int i = 0; i < kFormats; ++i) {
    const FormatSpec& spec = SpecOf(static_cast<Format>(i));
    KTJAX_CHECK(static_cast<int>(spec.format) == i, "row %d is %s", i, spec.name);
    const int group = spec.group == kUserGroup ? 64 : 0;
    const Encoding encoding = MakeEncoding(spec.name, group, false);
    KTJAX_CHECK(encoding.format == spec.format, "%s is not found", spec.name);
  }
  ExpectRefusal("int4_kgroup, fp8_block", [] { MakeEncoding("int3", 0, false); });
  ExpectRefusal("not of 48", [] { MakeEncoding("int4_kgroup", 48, false); });
  ExpectRefusal("no choice", [] { MakeEncoding("rawint4", 64, false); });
  ExpectRefusal("no zero points", [] { MakeEncoding("int4", 0, true); });
  ExpectRefusal("multiple of the group size 128, not 192", [] {
    CheckDepth(MakeEncoding("int4_kgroup", 128, false), 192, "down");
  });
}

std::vector<float> Weights(int count, uint64_t seed) {
  Random random(seed);
  std::vector<float> weights(count);
  for (float& w : weights) {
    // The sum of four is closer to what weights are like than one.
    w = random.Value() + random.Value() + random.Value() + random.Value();
    if (random.Below(50) == 0) w = 0;
  }
  return weights;
}

float ScaleOf(const Encoding& encoding, const PlainMatrix& plain, int output,
              int depth) {
  const FormatSpec& spec = encoding.spec();
  const int group = encoding.group ? encoding.group : plain.depth;
  const int64_t at =
      output / spec.block_outputs * encoding.scale_columns(plain.depth) + depth / group;
  if (spec.scale == ScaleType::kFloat32)
    return static_cast<const float*>(plain.scales)[at];
  if (spec.scale == ScaleType::kBf16)
    return FromBf16(static_cast<const bf16*>(plain.scales)[at]);
  return std::ldexp(1.0f, static_cast<const uint8_t*>(plain.scales)[at] - 127);
}

int CodeOf(const Encoding& encoding, const PlainMatrix& plain, int output, int depth) {
  const uint8_t* row = plain.codes + output * encoding.code_columns(plain.depth);
  switch (encoding.spec().code) {
    case Code::kInt8:
      return static_cast<int8_t>(row[depth]);
    case Code::kE4M3:
      return row[depth];
    default:
      return row[depth / 2] >> depth % 2 * 4 & 15;
  }
}

// Each code is the one nearest to weight / scale; of two, the even one.
void TestNearest(const Encoding& encoding, const std::vector<float>& weights,
                 int outputs, int depth) {
  EncodedMatrix encoded;
  encoded.Encode(encoding, weights.data(), outputs, depth, "gate", 0);
  const PlainMatrix plain = encoded.plain();
  const Code code = encoding.spec().code;
  // Candidates as (bits, number), by their definition.
  std::vector<std::pair<int, double>> candidates;
  for (int bits = -128; bits < 256; ++bits) {
    if (code == Code::kInt8 && std::abs(bits) <= 127)
      candidates.push_back({bits, bits});
    if (code == Code::kE4M3 && bits >= 0 && (bits & 0x7f) != 0x7f) {
      candidates.push_back({bits, OracleCode(code, bits, 0)});
    }
    if (code == Code::kE2M1 && bits >= 0 && bits < 16) {
      candidates.push_back({bits, OracleCode(code, bits, 0)});
    }
    if (code == Code::kInt4 && bits >= (encoding.format == Format::kRawInt4 ? 0 : 1) &&
        bits < 16) {
      candidates.push_back({bits, bits - 8});
    }
  }
  int wrong = 0;
  for (int o = 0; o < outputs; ++o) {
    for (int d = 0; d < depth; ++d) {
      const float scale = ScaleOf(encoding, plain, o, d);
      const float x = scale == 0 ? 0 : weights[o * depth + d] / scale;
      double best = 0, least = std::numeric_limits<double>::infinity();
      for (const auto& [bits, number] : candidates) {
        const double error = std::fabs(number - x);
        if (error < least || (error == least && bits % 2 == 0)) {
          least = error;
          best = number;
        }
      }
      const int bits = CodeOf(encoding, plain, o, d);
      const double number = code == Code::kInt8   ? bits
                            : code == Code::kInt4 ? bits - 8
                                                  : OracleCode(code, bits, 0);
      wrong += number != best;
    }
  }
  KTJAX_CHECK(wrong == 0, "%s: %d codes are not the nearest", encoding.spec().name,
              wrong);
}

// Where the scale is a power of two, every half of a step is a tie.
std::vector<float> Ties(int count, float largest) {
  std::vector<float> weights(count);
  for (int i = 0; i < count; ++i) {
    weights[i] = static_cast<float>(i % 61 - 30) * 0.125f * (i % 2 ? largest / 8 : 1);
    if (std::fabs(weights[i]) > largest) weights[i] = largest;
  }
  weights[0] = largest;
  return weights;
}

void TestEncodings() {
  const int outputs = 130, depth = 384;
  for (const Encoding& encoding : AllEncodings()) {
    const char* name = encoding.spec().name;
    const std::vector<float> weights = Weights(outputs * depth, 1);
    if (!encoding.zero_points) TestNearest(encoding, weights, outputs, depth);
    const Code code = encoding.spec().code;
    if (code == Code::kE2M1 || code == Code::kE4M3 || code == Code::kInt8) {
      const float largest = code == Code::kE2M1   ? 6.0f
                            : code == Code::kE4M3 ? 448.0f
                                                  : 127.0f;
      for (int rows : {1, 2}) {
        TestNearest(encoding, Ties(rows * 128, largest), rows, 128);
      }
    }

    // Half a step of the codes at the largest weight, plus what bfloat16 rounds: within
    // a factor of the range that is generous for all, but not for a wrong code.
    EncodedMatrix encoded, again;
    encoded.Encode(encoding, weights.data(), outputs, depth, "gate", 0);
    CheckPlain(encoding, encoded.plain(), "gate", 0);
    std::vector<uint8_t> memory(PanelLayout(encoding, 1, depth).bytes + 64);
    const PanelLayout layout(encoding, 1, depth);
    PackStrip(layout, encoded.plain(), 0, kStrip, 0, depth, 0, memory.data());
    const QuantPanel panel = layout.At(memory.data());
    double error = 0, norm = 0;
    std::vector<float> values(kStrip * depth);
    for (int o = 0; o < kStrip; ++o) {
      for (int d = 0; d < depth; ++d) {
        const float w = weights[o * depth + d];
        values[o * depth + d] = PanelValue(panel, d, o);
        error += std::pow(values[o * depth + d] - w, 2);
        norm += w * w;
      }
    }
    // Uniform errors of a step s are s / sqrt(12). The largest of a group is about 3
    // deviations: steps are 3 / 7 for 4 bits, 3 / 127 for 8; E4M3's are 1/8 to 1/16 of
    // a value, E2M1's 1/2 to 1/4.
    const double bound = code == Code::kInt8   ? 3.3 / 127 / std::sqrt(12)
                         : code == Code::kE4M3 ? 1.0 / 8 / std::sqrt(12)
                         : code == Code::kInt4 ? 3.3 / 7 / std::sqrt(12)
                                               : 0.5 / std::sqrt(12);
    const double relative = std::sqrt(error / norm);
    KTJAX_CHECK(relative < bound, "%s: error %.4f, bound %.4f", name, relative, bound);

    if (encoding.spec().scale == ScaleType::kE8M0) {  // values encode to themselves
      again.Encode(encoding, values.data(), kStrip, depth, "gate", 0);
      for (int o = 0; o < kStrip; ++o) {
        for (int d = 0; d < depth; ++d) {
          const float value = ScaleOf(encoding, again.plain(), o, d) *
                              static_cast<float>(OracleCode(
                                  code, CodeOf(encoding, again.plain(), o, d), 0));
          KTJAX_CHECK(value == values[o * depth + d], "%s: %g became %g", name,
                      values[o * depth + d], value);
        }
      }
    }
  }
}

// The rule of int4's scales, word for word, where all loops are scalar.
float SearchedScale(const float* row, int count) {
  float amax = 0;
  for (int d = 0; d < count; ++d) amax = std::max(amax, std::fabs(row[d]));
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (int i = 0; i < 20; ++i) {
    const float s = (amax / 7) * (static_cast<float>(32 - i) / 32);
    float lanes[16] = {}, sum = 0;
    for (int d = 0; d < count; ++d) {
      const float q = std::min(std::max(std::nearbyint(row[d] / s), -7.0f), 7.0f);
      const float scaled = q * s;
      const float error = row[d] - scaled;
      const float squared = error * error;
      lanes[d % 16] += squared;
    }
    for (const float lane : lanes) sum += lane;
    if (sum < least) {
      least = sum;
      best = s;
    }
  }
  return best;
}

void TestSearch() {
  for (const int depth : {1, 5, 16, 77, 128}) {
    const std::vector<float> weights = Weights(16 * depth, depth);
    for (const Encoding& encoding :
         {MakeEncoding("int4", 0, false), MakeEncoding("int4_kgroup", 64, false)}) {
      const int group = encoding.group ? encoding.group : depth;
      if (depth % group) continue;
      EncodedMatrix encoded;
      encoded.Encode(encoding, weights.data(), 16, depth, "up", 0);
      for (int o = 0; o < 16; ++o) {
        for (int d = 0; d < depth; d += group) {
          const float want = SearchedScale(&weights[o * depth + d], group);
          const float got = ScaleOf(encoding, encoded.plain(), o, d);
          KTJAX_CHECK(got == want, "%s, depth %d: scale %.9g, not %.9g",
                      encoding.spec().name, depth, got, want);
        }
      }
    }
  }
}

bool SamePlain(const Encoding& encoding, const PlainMatrix& a, const PlainMatrix& b) {
  const int64_t scales =
      encoding.scale_rows(a.outputs) * encoding.scale_columns(a.depth);
  const int size = ScaleBytes(encoding.spec().scale);
  return !std::memcmp(a.codes, b.codes, a.outputs * encoding.code_columns(a.depth)) &&
         !std::memcmp(a.scales, b.scales, scales * size) &&
         (!a.zeros || !std::memcmp(a.zeros, b.zeros, scales));
}

// Flushing denormals changes nothing, from the smallest weights to the largest; nor
// does bfloat16 as the dtype.
void TestFlushing() {
  const int outputs = 9, depth = 128;
  for (const Encoding& encoding : AllEncodings()) {
    for (const int exponent : {-149, -130, -126, -124, -119, -100, -63, 0, 120}) {
      std::vector<float> weights = Weights(outputs * depth, 3);
      std::vector<bf16> narrow(weights.size());
      for (size_t i = 0; i < weights.size(); ++i) {
        narrow[i] = RoundToBf16(std::ldexp(weights[i], exponent));
        weights[i] = FromBf16(narrow[i]);
      }
      EncodedMatrix kept, flushed;
      {
        const FlushMode mode(false);
        kept.Encode(encoding, weights.data(), outputs, depth, "gate", 0);
      }
      {
        const FlushMode mode(true);
        flushed.Encode(encoding, narrow.data(), outputs, depth, "gate", 0);
      }
      KTJAX_CHECK(SamePlain(encoding, kept.plain(), flushed.plain()),
                  "%s: other bits at 2^%d", encoding.spec().name, exponent);
      if (exponent < -130 && encoding.spec().scale == ScaleType::kFloat32) {
        KTJAX_CHECK(ScaleOf(encoding, kept.plain(), 0, 0) == 0, "%s: denormal scale",
                    encoding.spec().name);
      }
    }
  }
}

// What has no influence on values, but is part of the bits: zeros keep their sign, and
// the half of a byte past an odd depth is a code of value 0.
void TestZeros() {
  EncodedMatrix encoded;
  std::vector<float> weights(128, -0.0f);
  weights[0] = 1;
  weights[2] = -0x1p-127f;
  weights[4] = 0;
  encoded.Encode(MakeEncoding("fp8_channel", 0, false), weights.data(), 1, 128, "up",
                 0);
  const uint8_t* codes = encoded.plain().codes;
  KTJAX_CHECK(codes[1] == 0x80 && codes[2] == 0x80 && codes[4] == 0, "%x %x %x",
              codes[1], codes[2], codes[4]);
  encoded.Encode(MakeEncoding("mxfp4", 0, false), weights.data(), 1, 128, "up", 0);
  codes = encoded.plain().codes;
  KTJAX_CHECK(codes[0] == 0x86 && codes[1] == 0x88 && codes[2] == 0x80, "%x %x %x",
              codes[0], codes[1], codes[2]);
  encoded.Encode(MakeEncoding("int4", 0, false), weights.data(), 1, 5, "up", 0);
  KTJAX_CHECK(encoded.plain().codes[2] == 0x88, "%x", encoded.plain().codes[2]);
}

void TestRefusals() {
  const int outputs = 3, depth = 128;
  for (const Encoding& encoding : AllEncodings()) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                            -std::numeric_limits<float>::infinity()}) {
      std::vector<float> weights = Weights(outputs * depth, 5);
      weights[2 * depth + 100] = bad;
      EncodedMatrix encoded;
      ExpectRefusal("down weights of expert 7: NaN or Inf in row 2", [&] {
        encoded.Encode(encoding, weights.data(), outputs, depth, "down", 7);
      });
    }
    // Given arrays.
    Random random(1);
    const RandomPlain source(encoding, outputs, depth, false, random);
    CheckPlain(encoding, source.plain(), "gate", 1);
    const FormatSpec& spec = encoding.spec();
    if (spec.scale == ScaleType::kFloat32) {
      for (const float bad : {-1.0f, std::numeric_limits<float>::infinity(), NAN}) {
        std::vector<float> scales(outputs * 4, 1.0f);
        PlainMatrix plain = source.plain();
        plain.scales = scales.data();
        scales[encoding.scale_rows(outputs) * encoding.scale_columns(depth) - 1] = bad;
        ExpectRefusal("gate weights of expert 1",
                      [&] { CheckPlain(encoding, plain, "gate", 1); });
      }
    }
    if (encoding.zero_points) {
      std::vector<uint8_t> zeros(outputs * 4, 15);
      PlainMatrix plain = source.plain();
      plain.zeros = zeros.data();
      zeros[encoding.scale_columns(depth)] = 16;
      ExpectRefusal("zero point number 0 of row 1",
                    [&] { CheckPlain(encoding, plain, "gate", 1); });
    }
    if (spec.code == Code::kE4M3) {
      std::vector<uint8_t> codes(outputs * depth, 0x7e);
      PlainMatrix plain = source.plain();
      plain.codes = codes.data();
      codes[depth + 3] = 0xff;
      ExpectRefusal("NaN among the codes of row 1",
                    [&] { CheckPlain(encoding, plain, "gate", 1); });
    }
    if (spec.scale == ScaleType::kE8M0) {
      std::vector<uint8_t> scales(outputs * 4, 127);
      PlainMatrix plain = source.plain();
      plain.scales = scales.data();
      scales[5] = 0xff;
      ExpectRefusal("NaN as scale number 1 of row 1",
                    [&] { CheckPlain(encoding, plain, "gate", 1); });
    }
  }
}

int Main() {
  TestNames();
  TestEncodings();
  TestSearch();
  TestFlushing();
  TestZeros();
  TestRefusals();
  for (const Isa isa : SupportedIsas()) {
    const Kernels& kernels = KernelsOf(isa);
    const CheckCounts before = check_counts;
    FormatSuite(kernels, false).Run();
    std::printf("%-14s %lld checks, %lld failed\n", kernels.name,
                static_cast<long long>(check_counts.passed - before.passed),
                static_cast<long long>(check_counts.failed - before.failed));
  }
  return ReportChecks();
}

}  // namespace
}  // namespace ktjax

int main() { return ktjax::Main(); }
