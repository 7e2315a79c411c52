#include "format/pack_blocks.h"

#include <cstring>

#include "format/blocks.h"

namespace ktjax {
namespace {

constexpr int kMaxDepths = 256, kMaxSubs = kMaxDepths / 16;

// A block with every number in a place of its own, as panels have them.
struct Block {
  uint8_t codes[kMaxDepths];
  uint16_t scale, min;  // halves
  uint8_t sub_scales[kMaxSubs];
  uint8_t sub_mins[kMaxSubs];
};

uint16_t HalfAt(const uint8_t* src) {
  uint16_t half;
  std::memcpy(&half, src, sizeof half);
  return half;
}

// `count` bytes give the codes of the low nibbles, then those of the high ones.
void ReadNibbles(const uint8_t* src, int count, uint8_t* codes) {
  for (int i = 0; i < count; ++i) {
    codes[i] = src[i] & 15;
    codes[count + i] = src[i] >> 4;
  }
}

// Codes 0 .. 31 get the bits of a word on top, from bit 4 on.
void AddFifthBits(const uint8_t* src, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (src[i / 8] >> i % 8 & 1) << 4;
}

// 256 codes from 64 bytes: 32 bytes have those of 128 depths, in four layers of 2 bits.
void ReadCrumbs(const uint8_t* src, int shift, uint8_t* codes) {
  for (int i = 0; i < 256; ++i) {
    const int crumb = src[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
    codes[i] |= crumb << shift;
  }
}

// 256 bits from 32 bytes, in eight layers.
void AddLayeredBits(const uint8_t* src, int shift, uint8_t* codes) {
  for (int i = 0; i < 256; ++i) codes[i] |= (src[i % 32] >> i / 32 & 1) << shift;
}

// Eight sub-scales and minima of 6 bits in 12 bytes.
void ReadScaleMins(const uint8_t* src, Block& block) {
  for (int i = 0; i < 4; ++i) {
    block.sub_scales[i] = src[i] & 63;
    block.sub_mins[i] = src[i + 4] & 63;
    block.sub_scales[i + 4] = (src[i + 8] & 15) | src[i] >> 6 << 4;
    block.sub_mins[i + 4] = src[i + 8] >> 4 | src[i + 4] >> 6 << 4;
  }
}

void ReadBlock(const BlockSpec& spec, const uint8_t* src, Block& block) {
  std::memset(block.codes, 0, sizeof block.codes);
  block.scale = HalfAt(src + spec.scale_at);
  block.min = spec.mins ? HalfAt(src + spec.min_at) : 0;
  switch (spec.format) {
    case Format::kQ4_0:
    case Format::kIq4Nl:
      ReadNibbles(src + 2, 16, block.codes);
      break;
    case Format::kQ4_1:
      ReadNibbles(src + 4, 16, block.codes);
      block.min ^= 0x8000;  // it is added
      break;
    case Format::kQ5_0:
      ReadNibbles(src + 6, 16, block.codes);
      AddFifthBits(src + 2, block.codes);
      break;
    case Format::kQ5_1:
      ReadNibbles(src + 8, 16, block.codes);
      AddFifthBits(src + 4, block.codes);
      block.min ^= 0x8000;
      break;
    case Format::kQ8_0:
      for (int i = 0; i < 32; ++i) block.codes[i] = src[2 + i] ^ 0x80;
      break;
    case Format::kQ2K:
      std::memcpy(block.sub_scales, src, 16);
      ReadCrumbs(src + 16, 0, block.codes);
      break;
    case Format::kQ3K:
      ReadCrumbs(src + 32, 0, block.codes);
      AddLayeredBits(src, 2, block.codes);
      for (int i = 0; i < 16; ++i) {
        const int low = src[96 + i % 8] >> i / 8 * 4 & 15;
        block.sub_scales[i] = low | (src[104 + i % 4] >> i / 4 * 2 & 3) << 4;
      }
      break;
    case Format::kQ4K:
    case Format::kQ5K: {
      ReadScaleMins(src + 4, block);
      const uint8_t* nibbles = src + (spec.format == Format::kQ4K ? 16 : 48);
      for (int i = 0; i < 4; ++i)
        ReadNibbles(nibbles + 32 * i, 32, block.codes + 64 * i);
      if (spec.format == Format::kQ5K) AddLayeredBits(src + 16, 4, block.codes);
      break;
    }
    case Format::kQ6K:
      for (int i = 0; i < 2; ++i) ReadNibbles(src + 64 * i, 64, block.codes + 128 * i);
      ReadCrumbs(src + 128, 4, block.codes);
      for (int i = 0; i < 16; ++i) block.sub_scales[i] = src[192 + i] ^ 0x80;
      break;
    case Format::kIq4Xs:
      for (int i = 0; i < 8; ++i) {
        ReadNibbles(src + 8 + 16 * i, 16, block.codes + 32 * i);
        const int low = src[4 + i / 2] >> i % 2 * 4 & 15;
        block.sub_scales[i] = low | (HalfAt(src + 2) >> 2 * i & 3) << 4;
      }
      break;
    default:
      break;
  }
}

// The words of 32 codes (see QuantPanel).
void PackWords(int bits, const uint8_t* codes, uint32_t* words) {
  std::memset(words, 0, sizeof(uint32_t) * bits);
  const int low = bits == 8 ? 8 : bits < 4 ? 2 : 4, per_word = 8 / low;
  for (int d = 0; d < kDepth; ++d) {
    const int quad = d / 4, byte = 8 * (d % 4);
    const uint32_t code = codes[d], high = code >> low;
    words[quad / per_word] |= (code & ((1u << low) - 1))
                              << (byte + low * (quad % per_word));
    if (bits == low + 1) {
      words[low] |= high << (byte + quad);
    } else if (bits == low + 2) {
      words[low + quad / 4] |= high << (byte + 2 * (quad % 4));
    }
  }
}

bool IsFinite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

}  // namespace

BlockPlace FindBadBlock(const BlockSpec& spec, const PlainMatrix& plain) {
  const int blocks = plain.depth / spec.depths;
  const uint8_t* src = plain.codes;
  for (int row = 0; row < plain.outputs; ++row) {
    for (int b = 0; b < blocks; ++b, src += spec.bytes) {
      if (!IsFinite(HalfAt(src + spec.scale_at)) ||
          (spec.mins && !IsFinite(HalfAt(src + spec.min_at)))) {
        return {row, b};
      }
    }
  }
  return {-1, -1};
}

void PackBlocks(const PanelLayout& layout, const PlainMatrix& plain, int first_output,
                int outputs, int first_depth, int depth, int strip, void* memory) {
  const Encoding& encoding = layout.encoding;
  const BlockSpec& spec = *encoding.spec().blocks;
  const int64_t row_bytes = encoding.code_columns(plain.depth);
  const int64_t first_byte = encoding.code_columns(first_depth);
  const int64_t lanes = int64_t{kStrip} * layout.strips;
  uint8_t* panel = static_cast<uint8_t*>(memory);
  const auto store = [&](auto value, int64_t offset, int64_t at) {
    std::memcpy(panel + offset + at * sizeof value, &value, sizeof value);
  };
  // Scales of 0 make it 0.
  Block padding = {};
  std::memset(padding.codes, spec.zero, sizeof padding.codes);

  const int subs = spec.sub ? spec.depths / spec.sub : 0;
  for (int n = 0; n < kStrip; ++n) {
    const int64_t lane = kStrip * strip + n;
    const uint8_t* src = plain.codes + (first_output + n) * row_bytes + first_byte;
    for (int b = 0; b < layout.groups; ++b) {
      Block block = padding;
      if (n < outputs && b * spec.depths < depth) {
        ReadBlock(spec, src + b * spec.bytes, block);
      }
      for (int d = 0; d < spec.depths; d += kDepth) {
        uint32_t words[8];
        PackWords(spec.bits, block.codes + d, words);
        const int64_t first = int64_t{b * spec.depths + d} / kDepth * spec.bits;
        for (int i = 0; i < spec.bits; ++i) {
          store(words[i], 0, (first + i) * lanes + lane);
        }
      }
      store(block.scale, layout.scales, b * lanes + lane);
      if (spec.mins) store(block.min, layout.mins, b * lanes + lane);
      for (int i = 0; i < subs; ++i) {
        const int64_t at = (int64_t{b} * subs + i) * lanes + lane;
        store(block.sub_scales[i], layout.sub_scales, at);
        if (spec.sub_mins == SubMins::kBytes) {
          store(block.sub_mins[i], layout.sub_mins, at);
        }
      }
    }
  }
}

float PanelBlockValue(const QuantPanel& panel, int depth, int output) {
  const int lanes = kStrip * panel.strips;
  float value = 0;
  WithBlockFormat(panel.format, [&]<Format kFormat>() {
    constexpr int kBits = FindBlocks(kFormat)->bits;
    const uint8_t* words =
        panel.codes + (int64_t{depth / kDepth} * kBits * lanes + output) * 4;
    const uint32_t quad = QuadOfCodes<kBits>(depth % kDepth / 4, [&](int i) {
      uint32_t word;
      std::memcpy(&word, words + int64_t{i} * lanes * 4, sizeof word);
      return word;
    });
    value = BlockValue<kFormat>(SubScaleOf<kFormat>(panel, depth, output, lanes),
                                quad >> 8 * (depth % 4) & 255);
  });
  return value;
}

}  // namespace ktjax
