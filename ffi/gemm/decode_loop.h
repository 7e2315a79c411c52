// The loop of every decoder, over blocks of 32 depths; an instruction set adds how the
// scales of a strip are read and how one strip of a block is decoded.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_DECODE_LOOP_H_
#define KTJAX_FFI_GEMM_DECODE_LOOP_H_

#include <xmmintrin.h>

#include "base/types.h"
#include "format/blocks.h"
#include "format/format.h"
#include "format/scalar.h"
#include "gemm/kernel.h"
#include "gemm/prefetch.h"

namespace ktjax {
namespace {

// A combination of codes and scales, as types for the decoders.
template <Code kCode_, ScaleType kScale_, bool kZeros_ = false>
struct Layout {
  static constexpr Code kCode = kCode_;
  static constexpr ScaleType kScale = kScale_;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kCodeBits = CodeBits(kCode);
  // The codes of a strip of 16 and 32 depths, in lines of 64 bytes.
  static constexpr int kLines = kDepth * kStrip * kCodeBits / 8 / 64;
};

// One strip of a block by the scalar rule, for scales out of the ordinary.
template <typename L>
[[gnu::noinline]] void DecodeRareStrip(const QuantPanel& panel, int depth, int strip,
                                       bf16* dst) {
  const ptrdiff_t stride = 2 * kStrip * panel.strips;
  for (int d = 0; d < kDepth; ++d) {
    for (int n = 0; n < kStrip; ++n) {
      dst[d / 2 * stride + 2 * (kStrip * strip + n) + d % 2] =
          WeightBits<L::kCode, L::kScale>(panel, depth + d, kStrip * strip + n);
    }
  }
}

// `Decoder<L>` has a type Row, what a group's scales and zero points of one strip
// become; bool LoadRow(panel, first scale, row), false when a scale is out of the
// ordinary; and DecodeStrip(row, codes, bytes between its lines, dst, elements between
// pairs).
template <typename L, template <typename> typename Decoder>
void DecodePanel(const QuantPanel& panel, int first_pair, int pairs, bf16* dst,
                 Prefetch* prefetch) {
  using Row = typename Decoder<L>::Row;
  const int strips = panel.strips;
  const ptrdiff_t code_stride = 64 * strips, stride = 2 * kStrip * strips;
  const int first = 2 * first_pair / kDepth, last = first + 2 * pairs / kDepth;
  const int group_blocks = panel.group / kDepth;
  const uint8_t* codes = panel.codes + first * L::kLines * code_stride;
  Row rows[kPanelStrips];
  bool ordinary[kPanelStrips];
  int row_end = first;  // the block at which the next row of scales begins
  for (int block = first; block < last;) {
    const PrefetchRun run = NextRun(prefetch, last - block, kDepth / 2);
    const char* line = run.line;
    for (const int end = block + run.steps; block < end; ++block) {
      if (block >= row_end) {
        const int row = block / group_blocks;
        for (int s = 0; s < strips; ++s) {
          ordinary[s] =
              Decoder<L>::LoadRow(panel, (int64_t{row} * strips + s) * kStrip, rows[s]);
        }
        row_end = (row + 1) * group_blocks;
      }
      for (int i = 0; i < run.lines_per_step; ++i, line += kCacheLine) {
        _mm_prefetch(line, _MM_HINT_T1);
      }
      for (int s = 0; s < strips; ++s) {
        if (ordinary[s]) [[likely]] {
          Decoder<L>::DecodeStrip(rows[s], codes + 64 * s, code_stride,
                                  dst + 2 * kStrip * s, stride);
        } else {
          DecodeRareStrip<L>(panel, block * kDepth, s, dst);
        }
      }
      codes += L::kLines * code_stride;
      dst += kDepth / 2 * stride;
    }
  }
}

// The formats in blocks. `Decoder<kFormat>::DecodeStrip(panel, block, strip, dst)`
// decodes one strip of a block of 32 depths, with panel.apart as many strips in dst.
template <Format kFormat, template <Format> typename Decoder>
void DecodeBlocks(const QuantPanel& panel, int first_pair, int pairs, bf16* dst,
                  Prefetch* prefetch) {
  const ptrdiff_t size = kDepth * kStrip * panel.strips * panel.apart;
  const int first = 2 * first_pair / kDepth, last = first + 2 * pairs / kDepth;
  for (int block = first; block < last;) {
    const PrefetchRun run = NextRun(prefetch, last - block, kDepth / 2);
    const char* line = run.line;
    for (const int end = block + run.steps; block < end; ++block, dst += size) {
      for (int i = 0; i < run.lines_per_step; ++i, line += kCacheLine) {
        _mm_prefetch(line, _MM_HINT_T1);
      }
      for (int s = 0; s < panel.strips; ++s) {
        Decoder<kFormat>::DecodeStrip(panel, block, s,
                                      dst + 2 * kStrip * s * panel.apart);
      }
    }
  }
}

// The entry of struct Kernels.
template <template <typename> typename Decoder, template <Format> typename BlockDecoder>
void Decode(const QuantPanel& panel, int first_pair, int pairs, bf16* dst,
            Prefetch* prefetch) {
  using enum ScaleType;
  switch (panel.format) {
    case Format::kBf16:
      return;  // not quantised: there is no QuantPanel of it
    case Format::kInt8:
      return DecodePanel<Layout<Code::kInt8, kFloat32>, Decoder>(panel, first_pair,
                                                                 pairs, dst, prefetch);
    case Format::kInt4:
    case Format::kInt4KGroup:
      if (panel.zeros) {
        return DecodePanel<Layout<Code::kInt4, kFloat32, true>, Decoder>(
            panel, first_pair, pairs, dst, prefetch);
      }
      return DecodePanel<Layout<Code::kInt4, kFloat32>, Decoder>(panel, first_pair,
                                                                 pairs, dst, prefetch);
    case Format::kFp8Block:
    case Format::kFp8Channel:
      return DecodePanel<Layout<Code::kE4M3, kFloat32>, Decoder>(panel, first_pair,
                                                                 pairs, dst, prefetch);
    case Format::kRawInt4:
      return DecodePanel<Layout<Code::kInt4, ScaleType::kBf16>, Decoder>(
          panel, first_pair, pairs, dst, prefetch);
    case Format::kMxFp4:
      return DecodePanel<Layout<Code::kE2M1, kE8M0>, Decoder>(panel, first_pair, pairs,
                                                              dst, prefetch);
    case Format::kMxFp8:
      return DecodePanel<Layout<Code::kE4M3, kE8M0>, Decoder>(panel, first_pair, pairs,
                                                              dst, prefetch);
    default:
      WithBlockFormat(panel.format, [&]<Format kFormat>() {
        DecodeBlocks<kFormat, BlockDecoder>(panel, first_pair, pairs, dst, prefetch);
      });
  }
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_DECODE_LOOP_H_
