// Decoding of formats in blocks in plain C++; the compiler vectorises what it can.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_BLOCKS_GENERIC_H_
#define KTJAX_FFI_GEMM_DECODE_BLOCKS_GENERIC_H_

#include <cstring>

#include "format/blocks.h"
#include "gemm/decode_loop.h"

namespace ktjax {
namespace {

template <Format kFormat>
struct GenericBlockDecoder {
  static void DecodeStrip(const QuantPanel& panel, int block, int strip, bf16* dst) {
    constexpr BlockSpec kSpec = *FindBlocks(kFormat);
    const int lanes = kStrip * panel.strips, first = kStrip * strip;
    uint32_t words[kSpec.bits][kStrip];
    const uint8_t* codes =
        panel.codes + (int64_t{block} * kSpec.bits * lanes + first) * 4;
    for (int i = 0; i < kSpec.bits; ++i) {
      std::memcpy(words[i], codes + int64_t{i} * lanes * 4, sizeof words[i]);
    }
    constexpr int kQuads = kDepth / 4, kSubs = kSpec.sub == 16 ? 2 : 1;
    for (int sub = 0; sub < kSubs; ++sub) {
      SubScale scales[kStrip];
      for (int n = 0; n < kStrip; ++n) {
        scales[n] =
            SubScaleOf<kFormat>(panel, block * kDepth + 16 * sub, first + n, lanes);
      }
      for (int q = sub * kQuads / kSubs; q < (sub + 1) * kQuads / kSubs; ++q) {
        uint32_t pairs[2][kStrip];
        for (int n = 0; n < kStrip; ++n) {
          const uint32_t quad =
              QuadOfCodes<kSpec.bits>(q, [&](int i) { return words[i][n]; });
          pairs[0][n] = Pair(scales[n], quad);
          pairs[1][n] = Pair(scales[n], quad >> 16);
        }
        for (const auto& pair : pairs) {
          std::memcpy(dst, pair, sizeof pair);
          dst += 2 * lanes * panel.apart;
        }
      }
    }
  }

 private:
  // The bfloat16 of the codes in the two lower bytes.
  [[gnu::always_inline]] static uint32_t Pair(SubScale scale, uint32_t codes) {
    const uint32_t low = Round(BlockValue<kFormat>(scale, codes & 255));
    const uint32_t high = Round(BlockValue<kFormat>(scale, codes >> 8 & 255));
    return low >> 16 | (high & 0xffff0000u);
  }
  // To nearest even in the upper half. For finite numbers.
  [[gnu::always_inline]] static uint32_t Round(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    return bits + 0x7fff + (bits >> 16 & 1);
  }
};

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_BLOCKS_GENERIC_H_
