// From the blocks of a GGUF file to panels.
#ifndef KTJAX_FFI_FORMAT_PACK_BLOCKS_H_
#define KTJAX_FFI_FORMAT_PACK_BLOCKS_H_

#include "format/format.h"
#include "format/panel.h"

namespace ktjax {

// The first block with a scale or a minimum that is NaN or infinite, by row and number
// in the row; row is -1 when there is none.
struct BlockPlace {
  int row;
  int block;
};
BlockPlace FindBadBlock(const BlockSpec& spec, const PlainMatrix& plain);

// PackStrip for formats in blocks.
void PackBlocks(const PanelLayout& layout, const PlainMatrix& plain, int first_output,
                int outputs, int first_depth, int depth, int strip, void* memory);

// The float32 value of a weight, before it is rounded to bfloat16.
float PanelBlockValue(const QuantPanel& panel, int depth, int output);

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_PACK_BLOCKS_H_
