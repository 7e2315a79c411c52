#include "format/panel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/bf16.h"
#include "format/blocks.h"
#include "format/pack_blocks.h"
#include "format/scalar.h"

namespace ktjax {
namespace {

constexpr int64_t kAlignment = 64;
constexpr uint32_t kLeastNormal = 1u << 23;

float ScaleAt(ScaleType type, const void* scales, int64_t i) {
  switch (type) {
    case ScaleType::kNone:
      return 1;
    case ScaleType::kFloat32:
      return ScaleValue<ScaleType::kFloat32>(scales, i);
    case ScaleType::kBf16:
      return ScaleValue<ScaleType::kBf16>(scales, i);
    case ScaleType::kE8M0:
      return ScaleValue<ScaleType::kE8M0>(scales, i);
  }
  return 0;
}

[[noreturn]] void Refuse(const Encoding& encoding, std::string_view matrix, int expert,
                         int64_t row, const std::string& what) {
  throw std::invalid_argument(NameOf(matrix, expert) + " in " + encoding.spec().name +
                              ": " + what + " of row " + std::to_string(row));
}

// Two vectors of four 4-bit codes to one of pairs: nibbles 0 1 2 3 4 5 6 7 of a lane
// become 0 4 1 5 2 6 3 7.
uint32_t InterleaveNibbles(uint32_t lane) {
  const auto spread = [](uint32_t x) {
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
  };
  return spread(lane & 0xffff) | spread(lane >> 16) << 4;
}

// A lane of a panel from the same bytes of a plain row.
uint32_t PanelLane(Code code, uint32_t lane) {
  switch (code) {
    case Code::kInt8:
      return lane ^ 0x80808080u;
    case Code::kE4M3:
      static_assert(kE4M3Byte[1] == 2 && kE4M3Byte[2] == 1);
      return (lane & 0xff0000ffu) | (lane & 0xff00u) << 8 | (lane >> 8 & 0xff00u);
    default:
      return InterleaveNibbles(lane);
  }
}

// A lane of plain codes of value 0.
uint32_t ZeroLane(const Encoding& encoding) {
  const bool offset = encoding.spec().code == Code::kInt4 && !encoding.zero_points;
  return offset ? 0x88888888u : 0;
}

// The four bytes at `src`, of which the first `bits` bits are codes; the others have
// the codes of `padding`.
uint32_t LoadLane(const uint8_t* src, int64_t bits, uint32_t padding) {
  uint32_t lane = 0;
  if (bits >= 32) {
    std::memcpy(&lane, src, sizeof lane);
    return lane;
  }
  if (bits <= 0) return padding;
  std::memcpy(&lane, src, (bits + 7) / 8);
  const uint32_t mask = (1u << bits) - 1;
  return (lane & mask) | (padding & ~mask);
}

// Copies scale number `from`, 0 when there is none or it is denormal, to number `to`.
void CopyScale(ScaleType type, const void* src, int64_t from, void* dst, int64_t to) {
  const bool zero = from < 0 || BitsOf(ScaleAt(type, src, from)) < kLeastNormal ||
                    std::signbit(ScaleAt(type, src, from));
  const int64_t bytes = ScaleBytes(type);
  char* out = static_cast<char*>(dst) + to * bytes;
  if (zero) {
    std::memset(out, 0, bytes);
  } else {
    std::memcpy(out, static_cast<const char*>(src) + from * bytes, bytes);
  }
}

}  // namespace

std::string NameOf(std::string_view matrix, int expert) {
  const std::string name = std::string(matrix) + " weights";
  return expert == kNoExpert ? name : name + " of expert " + std::to_string(expert);
}

void CheckPlain(const Encoding& encoding, const PlainMatrix& plain,
                std::string_view matrix, int expert, int64_t first_row) {
  const FormatSpec& spec = encoding.spec();
  if (spec.blocks) {
    const auto [row, block] = FindBadBlock(*spec.blocks, plain);
    if (row < 0) return;
    Refuse(encoding, matrix, expert, row,
           std::string("NaN or Inf as a scale of block ") + std::to_string(block));
  }
  const int64_t columns = encoding.scale_columns(plain.depth);
  for (int64_t i = 0; i < encoding.scale_rows(plain.outputs) * columns; ++i) {
    const float scale = ScaleAt(spec.scale, plain.scales, i);
    std::string what;
    if (spec.scale == ScaleType::kE8M0) {
      if (std::isfinite(scale)) continue;
      what = "NaN as scale number ";
    } else if (!std::isfinite(scale) || scale < 0) {
      what = std::to_string(scale) +
             ", which is not finite and 0 or more, as scale "
             "number ";
    } else if (encoding.zero_points && plain.zeros[i] > 15) {
      what = std::to_string(plain.zeros[i]) +
             ", which is not in 0 to 15, as zero point "
             "number ";
    } else {
      continue;
    }
    Refuse(encoding, matrix, expert, first_row + i / columns * spec.block_outputs,
           what + std::to_string(i % columns));
  }
  if (spec.code != Code::kE4M3) return;
  for (int row = 0; row < plain.outputs; ++row) {
    const uint8_t* codes = plain.codes + static_cast<int64_t>(row) * plain.depth;
    int nans = 0;
    for (int d = 0; d < plain.depth; ++d) nans |= (codes[d] & 0x7f) == 0x7f;
    if (nans) Refuse(encoding, matrix, expert, first_row + row, "NaN among the codes");
  }
}

PanelLayout::PanelLayout(const Encoding& encoding, int strips, int depth)
    : encoding(encoding), strips(strips), depth(depth) {
  group = encoding.group == 0 ? depth : encoding.group;
  groups = static_cast<int>(CeilDiv(depth, group));
  const FormatSpec& spec = encoding.spec();
  const int64_t lanes = int64_t{kStrip} * strips;
  int64_t end = 0;
  const auto take = [&](int64_t size) {
    const int64_t begin = end;
    end += RoundUp(size, kAlignment);
    return begin;
  };
  take(depth * lanes * spec.bits() / 8);
  const int scale_bytes = spec.blocks ? sizeof(uint16_t) : ScaleBytes(spec.scale);
  scales = take(groups * lanes * scale_bytes);
  zeros = take(encoding.zero_points ? groups * lanes : 0);
  const BlockSpec blocks = spec.blocks ? *spec.blocks : BlockSpec{};
  const int64_t subs = blocks.sub ? depth / blocks.sub * lanes : 0;
  mins = take(blocks.mins ? groups * lanes * sizeof(uint16_t) : 0);
  sub_scales = take(subs);
  sub_mins = take(blocks.sub_mins == SubMins::kBytes ? subs : 0);
  bytes = end;
}

void PackStrip(const PanelLayout& layout, const PlainMatrix& plain, int first_output,
               int outputs, int first_depth, int depth, int strip, void* memory) {
  const Encoding& encoding = layout.encoding;
  const FormatSpec& spec = encoding.spec();
  if (encoding.group && first_depth % encoding.group != 0) {
    throw std::logic_error("PackStrip: depth " + std::to_string(first_depth) +
                           " is within a group of " + std::to_string(encoding.group));
  }
  outputs = std::max(outputs, 0);
  depth = std::max(depth, 0);
  if (spec.blocks) {
    PackBlocks(layout, plain, first_output, outputs, first_depth, depth, strip, memory);
    return;
  }
  const int bits = CodeBits(spec.code), lane_depths = 32 / bits;
  const int64_t row_bytes = encoding.code_columns(plain.depth);
  const int64_t lanes = int64_t{kStrip} * layout.strips;
  const uint32_t padding = ZeroLane(encoding);

  const uint8_t* codes =
      plain.codes + first_output * row_bytes + int64_t{first_depth} * bits / 8;
  uint8_t* panel = static_cast<uint8_t*>(memory);
  for (int d = 0; d < layout.depth; d += lane_depths) {
    uint32_t line[kStrip];
    for (int n = 0; n < kStrip; ++n) {
      const int64_t left = n < outputs ? int64_t{depth - d} * bits : 0;
      const uint8_t* src = codes + n * row_bytes + int64_t{d} * bits / 8;
      line[n] = PanelLane(spec.code, LoadLane(src, left, padding));
    }
    std::memcpy(panel + (d / lane_depths * lanes + kStrip * strip) * 4, line,
                sizeof line);
  }

  const int64_t columns = encoding.scale_columns(plain.depth);
  const int64_t first_column = encoding.group ? first_depth / encoding.group : 0;
  for (int g = 0; g < layout.groups; ++g) {
    for (int n = 0; n < kStrip; ++n) {
      const int64_t to = g * lanes + kStrip * strip + n;
      const bool inside = n < outputs && g * layout.group < depth;
      const int64_t from =
          inside ? (first_output + n) / spec.block_outputs * columns + first_column + g
                 : -1;
      CopyScale(spec.scale, plain.scales, from, panel + layout.scales, to);
      if (encoding.zero_points) {
        panel[layout.zeros + to] = inside ? plain.zeros[from] : 0;
      }
    }
  }
}

float PanelValue(const QuantPanel& panel, int depth, int output) {
  bf16 bits = 0;
  switch (panel.format) {
    case Format::kBf16:
      throw std::logic_error("PanelValue: bf16 weights have no QuantPanel");
    case Format::kInt8:
      bits = WeightBits<Code::kInt8, ScaleType::kFloat32>(panel, depth, output);
      break;
    case Format::kInt4:
    case Format::kInt4KGroup:
      bits = WeightBits<Code::kInt4, ScaleType::kFloat32>(panel, depth, output);
      break;
    case Format::kFp8Block:
    case Format::kFp8Channel:
      bits = WeightBits<Code::kE4M3, ScaleType::kFloat32>(panel, depth, output);
      break;
    case Format::kRawInt4:
      bits = WeightBits<Code::kInt4, ScaleType::kBf16>(panel, depth, output);
      break;
    case Format::kMxFp4:
      bits = WeightBits<Code::kE2M1, ScaleType::kE8M0>(panel, depth, output);
      break;
    case Format::kMxFp8:
      bits = WeightBits<Code::kE4M3, ScaleType::kE8M0>(panel, depth, output);
      break;
    default:
      bits = RoundToBf16(PanelBlockValue(panel, depth, output));
      break;
  }
  return FromBf16(bits);
}

}  // namespace ktjax
