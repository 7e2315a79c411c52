// Quantised matrices: plain arrays as they come, and the panels that kernels read.
#ifndef KTJAX_FFI_FORMAT_PANEL_H_
#define KTJAX_FFI_FORMAT_PANEL_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "base/types.h"
#include "format/format.h"

namespace ktjax {

// One matrix [outputs, depth] as row-major plain arrays:
// * codes [outputs, code_columns]: int8 or E4M3 bits, or two 4-bit codes a byte with
// the
//   even depth in the low half (INT4 is value + 8, or unsigned with zero points);
// * scales [scale_rows, scale_columns] of the format's scale type;
// * zeros of the scales' shape where the encoding has zero points.
// Of a format in blocks only codes: the rows of blocks as a GGUF file has them.
struct PlainMatrix {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;
  int outputs;
  int depth;
};

// The `expert` of a matrix that stands alone.
inline constexpr int kNoExpert = -1;

// Throws std::invalid_argument, naming `matrix`, `expert` and the row (counted from
// `first_row` on), for scales that are NaN, infinite or negative, for NaN codes and for
// zero points above 15. Scales in blocks may be negative.
void CheckPlain(const Encoding& encoding, const PlainMatrix& plain,
                std::string_view matrix, int expert, int64_t first_row = 0);

// How errors name a matrix.
std::string NameOf(std::string_view matrix, int expert);

// Where things are in the memory of a QuantPanel: codes, then scales, then zero points,
// or minima, sub-scales and their minima, each from a multiple of 64 bytes on.
struct PanelLayout {
  // `depth` is a multiple of 32.
  PanelLayout(const Encoding& encoding, int strips, int depth);

  // The panel in `memory`, which is aligned to 64 bytes.
  QuantPanel At(const void* memory) const {
    const uint8_t* base = static_cast<const uint8_t*>(memory);
    return {.codes = base,
            .scales = base + scales,
            .zeros = encoding.zero_points ? base + zeros : nullptr,
            .strips = strips,
            .group = group,
            .format = encoding.format,
            .bytes = bytes,
            .mins = reinterpret_cast<const uint16_t*>(base + mins),
            .sub_scales = base + sub_scales,
            .sub_mins = base + sub_mins};
  }

  Encoding encoding;
  int strips;
  int depth;
  int group;  // depths per row of scales
  int groups;
  int64_t scales;  // byte offsets
  int64_t zeros;
  int64_t mins;
  int64_t sub_scales;
  int64_t sub_mins;
  int64_t bytes;  // a multiple of 64
};

// Fills strip `strip` of the panel in `memory` with outputs [first_output, + outputs)
// and depths [first_depth, + depth) of `plain`; what the strip has beyond these decodes
// to 0. outputs <= 16 and depth <= layout.depth; first_depth is a multiple of 32 and of
// the group. Denormal scales become 0. Strips may be filled from several threads.
void PackStrip(const PanelLayout& layout, const PlainMatrix& plain, int first_output,
               int outputs, int first_depth, int depth, int strip, void* memory);

// The value of a weight, as every kernel decodes it.
float PanelValue(const QuantPanel& panel, int depth, int output);

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_PANEL_H_
