#include "format/encode.h"

#include <emmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "base/bf16.h"
#include "format/scalar.h"

namespace ktjax {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr int kLanes = 16;  // partial sums of errors; rows are padded to these

// Flushes denormal operands and results while it lives, as worker threads do anyway: so
// every number below 2^-126 is zero, scales, quotients and errors too, in any thread.
// Part of every x86-64.
class FlushedArithmetic {
 public:
  FlushedArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushes); }
  ~FlushedArithmetic() { _mm_setcsr(saved_); }
  FlushedArithmetic(const FlushedArithmetic&) = delete;
  FlushedArithmetic& operator=(const FlushedArithmetic&) = delete;

 private:
  static constexpr unsigned kFlushes = 0x8040;  // FTZ, DAZ
  const unsigned saved_;
};

// Round to nearest even, for |x| < 2^22.
constexpr float kRounder = 0x1.8p23f;
float RoundToInt(float x) { return x + kRounder - kRounder; }
int RoundToCode(float x, float low, float high) {
  return static_cast<int>(std::min(std::max(RoundToInt(x), low), high));
}

uint32_t Bits(float weight) { return BitsOf(weight); }
uint32_t Bits(bf16 weight) { return static_cast<uint32_t>(weight) << 16; }

// Reads `count` weights as float32, small ones as 0 of their sign. Returns the bits of
// the largest magnitude: of an infinity or more when there is one or a NaN.
template <typename T>
uint32_t LoadRow(const T* src, int count, float* dst) {
  uint32_t largest = 0;
  for (int d = 0; d < count; ++d) {
    const uint32_t bits = Bits(src[d]), magnitude = bits & kMagnitude;
    const uint32_t kept = magnitude < 0x00800000u ? bits & ~kMagnitude : bits;
    largest = std::max(largest, magnitude);
    std::memcpy(dst + d, &kept, sizeof kept);
  }
  return largest;
}

float LargestMagnitude(const float* row, int count) {
  uint32_t largest = 0;
  for (int d = 0; d < count; ++d)
    largest = std::max(largest, BitsOf(row[d]) & kMagnitude);
  return FloatOf(largest);
}

// How many scales are tried at a time: each has a lane of a register in the end.
constexpr int kTries = 4;

// The sums of the squared errors of `count` weights at each of four scales, with codes
// within +-7. A sum is 16 partial sums, of every 16th weight, added in order. `count`
// is a multiple of 16.
void SquaredErrors(const float* row, int count, const float (&scales)[kTries],
                   float (&sums)[kTries]) {
  const __m128 rounder = _mm_set1_ps(kRounder);
  const __m128 low = _mm_set1_ps(-7), high = _mm_set1_ps(7);
  __m128 total = _mm_setzero_ps();
  for (int lane = 0; lane < kLanes; lane += 4) {
    __m128 partial[kTries] = {};
    for (int d = lane; d < count; d += kLanes) {
      const __m128 w = _mm_loadu_ps(row + d);
#pragma GCC unroll 4
      for (int i = 0; i < kTries; ++i) {
        const __m128 s = _mm_set1_ps(scales[i]);
        __m128 q = _mm_sub_ps(_mm_add_ps(_mm_div_ps(w, s), rounder), rounder);
        q = _mm_min_ps(_mm_max_ps(q, low), high);
        const __m128 error = _mm_sub_ps(w, _mm_mul_ps(q, s));
        partial[i] = _mm_add_ps(partial[i], _mm_mul_ps(error, error));
      }
    }
    _MM_TRANSPOSE4_PS(partial[0], partial[1], partial[2], partial[3]);
    for (const __m128& four : partial) total = _mm_add_ps(total, four);
  }
  _mm_storeu_ps(sums, total);
}

// The scale with the least squared error of 20 from amax / 7 down: smaller ones clip
// the largest weights and resolve the others better. 0 when there is nothing to scale.
float SearchScale(const float* row, int count) {
  constexpr int kCandidates = 20, kSteps = 32;
  static_assert(kCandidates % kTries == 0);
  const float widest = LargestMagnitude(row, count) / 7;
  float best = widest, least = std::numeric_limits<float>::infinity();
  if (best == 0) return 0;
  for (int first = 0; first < kCandidates; first += kTries) {
    float scales[kTries], errors[kTries];
    for (int i = 0; i < kTries; ++i) {
      scales[i] = widest * (static_cast<float>(kSteps - first - i) / kSteps);
    }
    SquaredErrors(row, count, scales, errors);
    for (int i = 0; i < kTries; ++i) {
      if (!(errors[i] < least)) continue;
      least = errors[i];
      best = scales[i];
    }
  }
  return best;
}

// E4M3 bits of x, to nearest even, at most 448 in magnitude.
uint8_t ToE4M3(float x) {
  const uint32_t sign = BitsOf(x) >> 24 & 0x80;
  const float magnitude = std::min(std::fabs(x), 448.0f);
  if (magnitude < 0x1p-6f) {  // in steps of 2^-9; 8 of them are the first normal code
    return static_cast<uint8_t>(sign |
                                static_cast<int>(RoundToInt(magnitude * 0x1p9f)));
  }
  const uint32_t bits = BitsOf(magnitude);
  const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
  return static_cast<uint8_t>(sign | (rounded - (120 << 3)));
}

// E2M1 bits of x, to the nearest, ties to an even code, at most 6 in magnitude.
int ToE2M1(float x) {
  const float magnitude = std::fabs(x);
  const int code = (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) +
                   (magnitude >= 1.75f) + (magnitude > 2.5f) + (magnitude >= 3.5f) +
                   (magnitude > 5.0f);
  return code | static_cast<int>(BitsOf(x) >> 28 & 8);
}

// What one group of a row becomes: its scale, and a code per weight.
struct Group {
  float scale = 0;
  int zero = 0;
};

Group EncodeInt8(const float* row, int count, int* codes) {
  const float scale = LargestMagnitude(row, count) / 127;
  for (int d = 0; d < count; ++d) {
    codes[d] = scale == 0 ? 0 : RoundToCode(row[d] / scale, -127, 127);
  }
  return {scale};
}

// Symmetric codes -low .. 7, stored with 8 added.
Group EncodeInt4(const float* row, int count, float scale, float low, int* codes) {
  for (int d = 0; d < count; ++d) {
    codes[d] = 8 + (scale == 0 ? 0 : RoundToCode(row[d] / scale, low, 7));
  }
  return {scale};
}

Group EncodeZeroPoint(const float* row, int count, int* codes) {
  float low = 0, high = 0;
  for (int d = 0; d < count; ++d) {
    low = std::min(low, row[d]);
    high = std::max(high, row[d]);
  }
  const float scale = (high - low) / 15;
  if (scale == 0 || !std::isfinite(scale)) {
    std::fill(codes, codes + count, 0);
    return {scale};
  }
  const int zero = RoundToCode(-low / scale, 0, 15);
  for (int d = 0; d < count; ++d) {
    codes[d] = std::clamp(RoundToCode(row[d] / scale, -15, 15) + zero, 0, 15);
  }
  return {scale, zero};
}

Group EncodeE4M3(const float* row, int count, float scale, int* codes) {
  for (int d = 0; d < count; ++d) codes[d] = scale == 0 ? 0 : ToE4M3(row[d] / scale);
  return {scale};
}

// With a power of two as scale, which brings the largest weight to the binade of the
// largest code, 2^kLargest; what is beyond that code saturates.
template <int kLargest, typename ToCode>
Group EncodeMx(const float* row, int count, ToCode to_code, int* codes) {
  const uint32_t largest = BitsOf(LargestMagnitude(row, count));
  if (largest == 0) {
    std::fill(codes, codes + count, 0);
    return {1.0f};
  }
  const int exponent = std::max(static_cast<int>(largest >> 23) - kLargest, 1);
  const float scale = FloatOf(static_cast<uint32_t>(exponent) << 23);
  for (int d = 0; d < count; ++d) codes[d] = to_code(row[d] / scale);
  return {scale};
}

void StoreScale(ScaleType type, float scale, uint8_t* scales, int64_t i) {
  const uint32_t bits = BitsOf(scale);
  if (type == ScaleType::kFloat32) {
    std::memcpy(scales + sizeof(float) * i, &scale, sizeof scale);
  } else if (type == ScaleType::kBf16) {
    const bf16 upper = static_cast<bf16>(bits >> 16);
    std::memcpy(scales + sizeof(bf16) * i, &upper, sizeof upper);
  } else {
    scales[i] = static_cast<uint8_t>(bits >> 23);
  }
}

// Codes to bytes: 8 bits as they are, 4 bits two a byte. Only symmetric codes come in
// odd numbers.
void StoreCodes(Code code, const int* codes, int count, int first, uint8_t* row) {
  if (code == Code::kInt8 || code == Code::kE4M3) {
    for (int d = 0; d < count; ++d) row[first + d] = static_cast<uint8_t>(codes[d]);
    return;
  }
  constexpr int kPadding = 8;  // of value 0
  for (int d = 0; d < count; d += 2) {
    const int high = d + 1 < count ? codes[d + 1] : kPadding;
    row[(first + d) / 2] = static_cast<uint8_t>(codes[d] | high << 4);
  }
}

}  // namespace

template <typename T>
void EncodedMatrix::EncodeRows(const Encoding& encoding, const T* weights,
                               std::string_view matrix, int expert, int64_t first_row) {
  const FormatSpec& spec = encoding.spec();
  const int64_t columns = encoding.scale_columns(depth_);
  const int64_t code_columns = encoding.code_columns(depth_);
  const int group = encoding.group ? encoding.group : depth_;
  std::vector<float> row(RoundUp(depth_, kLanes));
  std::vector<int> codes(group);
  std::vector<float> block_scales(columns);

  const auto refuse = [&](int output, const char* what) {
    throw std::invalid_argument(NameOf(matrix, expert) + ": " + what + " in row " +
                                std::to_string(first_row + output) +
                                "; they cannot be quantised to " + spec.name);
  };
  const auto load = [&](int output) {
    const T* src = weights + static_cast<int64_t>(output) * depth_;
    if (LoadRow(src, depth_, row.data()) >= 0x7f800000u) refuse(output, "NaN or Inf");
  };
  const auto count_of = [&](int64_t column) {
    return static_cast<int>(std::min<int64_t>(group, depth_ - column * group));
  };

  for (int output = 0; output < outputs_; ++output) {
    if (spec.code == Code::kE4M3 && spec.scale == ScaleType::kFloat32 &&
        output % spec.block_outputs == 0) {
      // The scales of a block of rows come before the codes of the first.
      std::fill(block_scales.begin(), block_scales.end(), 0.0f);
      const int end = std::min(output + spec.block_outputs, outputs_);
      for (int i = output; i < end; ++i) {
        load(i);
        for (int64_t c = 0; c < columns; ++c) {
          block_scales[c] = std::max(
              block_scales[c], LargestMagnitude(row.data() + c * group, count_of(c)));
        }
      }
      for (float& scale : block_scales) scale /= 448;
    }
    load(output);
    for (int64_t c = 0; c < columns; ++c) {
      const float* src = row.data() + c * group;
      const int count = count_of(c);
      Group result;
      switch (encoding.format) {
        case Format::kBf16:
          break;
        case Format::kInt8:
          result = EncodeInt8(src, count, codes.data());
          break;
        case Format::kInt4:
        case Format::kInt4KGroup:
          if (encoding.zero_points) {
            result = EncodeZeroPoint(src, count, codes.data());
          } else {
            const int padded = static_cast<int>(RoundUp(count, kLanes));
            result = EncodeInt4(src, count, SearchScale(src, padded), -7, codes.data());
          }
          break;
        case Format::kFp8Block:
        case Format::kFp8Channel:
          result = EncodeE4M3(src, count, block_scales[c], codes.data());
          break;
        case Format::kRawInt4: {
          const float exact = LargestMagnitude(src, count) / 7;
          const float scale = FromBf16(RoundToBf16(exact));
          result = EncodeInt4(src, count, scale, -8, codes.data());
          break;
        }
        case Format::kMxFp4:
          result = EncodeMx<2>(src, count, ToE2M1, codes.data());
          break;
        case Format::kMxFp8:
          result = EncodeMx<8>(src, count, ToE4M3, codes.data());
          break;
        default:  // refused above
          break;
      }
      if (!std::isfinite(result.scale)) refuse(output, "a range beyond float32");
      const int64_t at = output / spec.block_outputs * columns + c;
      StoreScale(spec.scale, result.scale, scales_.data(), at);
      if (encoding.zero_points) zeros_[at] = static_cast<uint8_t>(result.zero);
      StoreCodes(spec.code, codes.data(), count, static_cast<int>(c * group),
                 codes_.data() + output * code_columns);
    }
  }
}

void EncodedMatrix::Encode(const Encoding& encoding, const float* weights, int outputs,
                           int depth, std::string_view matrix, int expert,
                           int64_t first_row) {
  Resize(encoding, outputs, depth, matrix);
  const FlushedArithmetic flushed;
  EncodeRows(encoding, weights, matrix, expert, first_row);
}

void EncodedMatrix::Encode(const Encoding& encoding, const bf16* weights, int outputs,
                           int depth, std::string_view matrix, int expert,
                           int64_t first_row) {
  Resize(encoding, outputs, depth, matrix);
  const FlushedArithmetic flushed;
  EncodeRows(encoding, weights, matrix, expert, first_row);
}

void EncodedMatrix::Resize(const Encoding& encoding, int outputs, int depth,
                           std::string_view matrix) {
  if (encoding.format == Format::kBf16) {
    throw std::logic_error("EncodedMatrix: bf16 weights are packed as they are");
  }
  if (encoding.spec().blocks) {
    throw std::invalid_argument(std::string(matrix) +
                                " weights: " + encoding.spec().name +
                                " is a format of GGUF files, which have it encoded "
                                "already; weights cannot be quantised to it");
  }
  CheckDepth(encoding, depth, matrix);
  outputs_ = outputs;
  depth_ = depth;
  codes_.resize(outputs * encoding.code_columns(depth));
  const int64_t scales = encoding.scale_rows(outputs) * encoding.scale_columns(depth);
  scales_.resize(scales * ScaleBytes(encoding.spec().scale));
  zeros_.resize(encoding.zero_points ? scales : 0);
}

}  // namespace ktjax
