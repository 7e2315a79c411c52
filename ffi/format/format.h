// The storage formats of base weights: one row each, see format.cc.
//
// A format says how a code becomes a number and which codes share a scale. The value of
// a weight, in the forward and in the backward alike, is
//
//     bf16((code - zero) * scale)
//
// computed in float32 and rounded once, to nearest even: an operand of the same products
// as a bfloat16 weight. Numbers below 2^-126 in magnitude count as zero everywhere.
#ifndef KTJAX_FFI_FORMAT_FORMAT_H_
#define KTJAX_FFI_FORMAT_FORMAT_H_

#include <cstdint>

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

// What the bits of a code mean. 8-bit codes: kInt8 (stored as value + 128), kE4M3. 4-bit
// codes: kInt4 (value + 8, or unsigned with a zero point), kE2M1.
enum class Code { kBf16, kInt8, kE4M3, kInt4, kE2M1 };

enum class ScaleType { kNone, kFloat32, kBf16, kE8M0 };

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
};

// One panel (gemm/kernel.h) of codes.
struct QuantPanel {
  // 8 bits: [depth / 4][16 strips][4], byte j of a 32-bit lane is depth 4 i + j.
  // 4 bits: [depth / 8][16 strips][4], byte j has depth 8 i + j in its low half and
  // depth 8 i + 4 + j in its high half.
  // So a lane, or its halves shifted into bytes, is the operand of an 8-bit dot product.
  // Padding holds codes of value 0.
  const uint8_t* codes;
  const void* scales;    // [groups][16 strips] in the format's scale type
  const uint8_t* zeros;  // [groups][16 strips], or null: 128 (kInt8), 8 (kInt4), 0
  int strips;
  int group;  // depths per row of scales; the panel's whole depth where all share one
};

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_FORMAT_H_
