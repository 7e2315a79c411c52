// Quantising weights: from float32 or bfloat16 rows to plain arrays.
#ifndef KTJAX_FFI_FORMAT_ENCODE_H_
#define KTJAX_FFI_FORMAT_ENCODE_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/types.h"
#include "format/format.h"
#include "format/panel.h"

namespace ktjax {

// A quantised matrix and its memory, which is kept from one Encode to the next.
class EncodedMatrix {
 public:
  // Quantises row-major `weights` [outputs, depth]. Numbers below 2^-126 in magnitude
  // count as 0 at every step, whatever the thread flushes, and the codecs of
  // ktjax/quant give the same bits. Throws std::invalid_argument, naming `matrix`,
  // `expert` and the row (counted from `first_row` on), for weights that are NaN or
  // infinite or too large for a finite scale.
  void Encode(const Encoding& encoding, const float* weights, int outputs, int depth,
              std::string_view matrix, int expert, int64_t first_row = 0);
  void Encode(const Encoding& encoding, const bf16* weights, int outputs, int depth,
              std::string_view matrix, int expert, int64_t first_row = 0);

  // Valid until the next Encode.
  PlainMatrix plain() const {
    return {codes_.data(), scales_.data(), zeros_.empty() ? nullptr : zeros_.data(),
            outputs_, depth_};
  }

 private:
  void Resize(const Encoding& encoding, int outputs, int depth,
              std::string_view matrix);
  template <typename T>
  void EncodeRows(const Encoding& encoding, const T* weights, std::string_view matrix,
                  int expert, int64_t first_row);

  int outputs_ = 0;
  int depth_ = 0;
  std::vector<uint8_t> codes_;
  std::vector<uint8_t> scales_;
  std::vector<uint8_t> zeros_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_FORMAT_ENCODE_H_
