// The storage formats of base weights: one row each, see format.cc.
//
// A format says how a code becomes a number and which codes share a scale. The value of
// a weight, in the forward and in the backward alike, is
//
//     bf16((code - zero) * scale)
//
// computed in float32 and rounded once, to nearest even: an operand of the same
// products as a bfloat16 weight. Numbers below 2^-126 in magnitude count as zero
// everywhere.
#ifndef KTJAX_FFI_FORMAT_FORMAT_H_
#define KTJAX_FFI_FORMAT_FORMAT_H_

#include <cstdint>
#include <string_view>

namespace ktjax {

enum class Format {
  kBf16,
  kInt8,
  kInt4,
  kInt4KGroup,
  kFp8Block,
  kFp8Channel,
  kRawInt4,
  kMxFp4,
};
inline constexpr int kFormats = 8;

// What the bits of a code mean. 8-bit codes: kInt8 (stored as value + 128), kE4M3.
// 4-bit codes: kInt4 (value + 8, or unsigned with a zero point), kE2M1.
enum class Code { kBf16, kInt8, kE4M3, kInt4, kE2M1 };

enum class ScaleType { kNone, kFloat32, kBf16, kE8M0 };

[[gnu::always_inline]] constexpr int CodeBits(Code code) {
  if (code == Code::kBf16) return 16;
  return code == Code::kInt8 || code == Code::kE4M3 ? 8 : 4;
}
[[gnu::always_inline]] constexpr int ScaleBytes(ScaleType type) {
  if (type == ScaleType::kNone) return 0;
  return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kBf16 ? 2 : 1;
}

struct FormatSpec {
  Format format;
  const char* name;  // as Python and the command line have it
  Code code;
  ScaleType scale;
  int group;          // depths that share a scale; 0: all, kUserGroup: the user chooses
  int block_outputs;  // outputs that share a scale in the source arrays
};
inline constexpr int kUserGroup = -1;

const FormatSpec& SpecOf(Format format);

// A format with what the user chose.
struct Encoding {
  Format format = Format::kBf16;
  int group = 0;  // depths that share a scale, a multiple of 32; 0: all
  bool zero_points = false;

  const FormatSpec& spec() const { return SpecOf(format); }
  bool operator==(const Encoding&) const = default;

  // The shape of the plain arrays of a matrix [outputs, depth]: bytes in a row of
  // codes, scales in a row, and rows of scales.
  int64_t code_columns(int64_t depth) const;
  int64_t scale_columns(int64_t depth) const;
  int64_t scale_rows(int64_t outputs) const;
};

// The encoding that a user names. `group_size` is 0 where the format fixes it. Throws
// std::invalid_argument for what does not exist.
Encoding MakeEncoding(std::string_view name, int group_size, bool zero_points);

// Throws std::invalid_argument when the groups do not divide the depth of `matrix`.
void CheckDepth(const Encoding& encoding, int depth, std::string_view matrix);

// One panel (gemm/kernel.h) of codes.
struct QuantPanel {
  // 8 bits: [depth / 4][16 strips][4], byte j of a 32-bit lane is depth 4 i + j; E4M3,
  // which is no operand, has the depths in the order 0 2 1 3, so that its upper and its
  // lower bytes are pairs.
  // 4 bits: [depth / 8][16 strips][4], byte j has depth 8 i + j in its low half and
  // depth 8 i + 4 + j in its high half.
  // So a lane, or its halves shifted into bytes, is the operand of an 8-bit dot
  // product. Padding holds codes of value 0, and scales of 0.
  const uint8_t* codes;
  const void* scales;    // [groups][16 strips] in the format's scale type
  const uint8_t* zeros;  // [groups][16 strips], or null: 128 (kInt8), 8 (kInt4), 0
  int strips;
  int group;  // depths per row of scales; the panel's whole depth where all share one
};

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_FORMAT_H_
