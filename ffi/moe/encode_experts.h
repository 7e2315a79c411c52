// Quantising the matrices of all experts to plain arrays, on the pool's threads.
#ifndef KTJAX_FFI_MOE_ENCODE_EXPERTS_H_
#define KTJAX_FFI_MOE_ENCODE_EXPERTS_H_

#include <cstdint>
#include <string_view>

#include "format/format.h"
#include "moe/backend.h"
#include "moe/store.h"

namespace ktjax {

struct MatrixShape {
  int experts;
  int outputs;
  int depth;
};

// The plain arrays (format/panel.h) of all experts, one after the other.
struct PlainArrays {
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* zeros;  // null where the encoding has none
};

// Fills `out` with what ExpertStore::Pack would make of the values in `source`. Throws
// std::invalid_argument as EncodedMatrix::Encode does.
void EncodeExperts(Backend& backend, const Encoding& encoding,
                   const SourceMatrix& source, const MatrixShape& shape,
                   std::string_view name, const PlainArrays& out);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_ENCODE_EXPERTS_H_
