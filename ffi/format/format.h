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
//
// The formats of GGUF files come in blocks, whose values format/blocks.h has.
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
  kMxFp8,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Nl,
  kIq4Xs,
};
inline constexpr int kFormats = 21;

// What the bits of a code mean. 8-bit codes: kInt8 (stored as value + 128), kE4M3.
// 4-bit codes: kInt4 (value + 8, or unsigned with a zero point), kE2M1. kBlocks: what
// the format's BlockSpec says.
enum class Code { kBf16, kInt8, kE4M3, kInt4, kE2M1, kBlocks };

enum class ScaleType { kNone, kFloat32, kBf16, kE8M0 };

// Not for kBlocks.
[[gnu::always_inline]] constexpr int CodeBits(Code code) {
  if (code == Code::kBf16) return 16;
  return code == Code::kInt8 || code == Code::kE4M3 ? 8 : 4;
}
[[gnu::always_inline]] constexpr int ScaleBytes(ScaleType type) {
  if (type == ScaleType::kNone) return 0;
  return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kBf16 ? 2 : 1;
}

// How the smaller parts of a block, if any, have minima.
enum class SubMins {
  kNone,
  kBytes,
  kPacked,  // in the upper halves of the sub-scales' bytes
};

// A format that comes in the blocks of GGUF files; format/blocks.h has the rows.
struct BlockSpec {
  Format format;
  int depths;          // of a block: they share one or two halves
  int bytes;           // of a block in a file
  int bits;            // of a code
  int zero = 0;        // subtracted from codes
  bool table = false;  // codes are numbers of kIq4Values
  int sub = 0;         // depths that share a sub-scale, 16 or 32; 0: there is none
  int sub_zero = 0;    // subtracted from sub-scales, which are kept as bytes
  bool mins = false;   // whether a minimum is subtracted
  SubMins sub_mins = SubMins::kNone;
  int scale_at = 0;  // where the halves are in a file's block
  int min_at = 0;
};

struct FormatSpec {
  Format format;
  const char* name;  // as Python and the command line have it
  Code code;
  ScaleType scale;
  int group;          // depths that share a scale; 0: all, kUserGroup: the user chooses
  int block_outputs;  // outputs that share a scale in the source arrays
  const BlockSpec* blocks = nullptr;  // kBlocks: their layout

  // Of a code in a panel.
  int bits() const { return blocks ? blocks->bits : CodeBits(code); }
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
  // codes, scales in a row, and rows of scales. Formats in blocks have no scales apart.
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
  // Blocks: [depth / 32][bits][16 strips] words of 32 bits, so bits words hold 32 codes
  // of an output. Quad q is depths 4 q .. + 3, and byte j of a word has its depth j:
  //   8 bits  word q
  //   4 bits  word q / 2, bits 4 (q % 2) of the byte: as above
  //   2 bits  word q / 4, bits 2 (q % 4)
  //   3, 5    the lowest 2 or 4 bits likewise, the highest in the next word, bit q
  //   6 bits  the lowest 4 bits likewise, the others in word 4 + q / 4, bits 2 (q % 4)
  const uint8_t* codes;
  // [groups][16 strips] in the format's scale type; blocks: halves.
  const void* scales;
  const uint8_t* zeros;  // [groups][16 strips], or null: 128 (kInt8), 8 (kInt4), 0
  int strips;
  int group;  // depths per row of scales; the panel's whole depth where all share one
  Format format = Format::kBf16;
  int64_t bytes = 0;  // from codes on: everything
  // Blocks, where the format has them: [groups][16 strips] halves, and bytes [depth /
  // sub][16 strips].
  const uint16_t* mins = nullptr;
  const uint8_t* sub_scales = nullptr;
  const uint8_t* sub_mins = nullptr;
  // Blocks: strip s is decoded to strip `apart` s of a panel of `apart` strips as many.
  // 2 where gate and up have panels of their own and are decoded side by side.
  int apart = 1;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_FORMAT_H_
