// From expert ids per token to rows per expert.
#ifndef KTJAX_FFI_MOE_ROUTING_H_
#define KTJAX_FFI_MOE_ROUTING_H_

#include <cstdint>
#include <vector>

namespace ktjax {

// The used slots sorted by expert, and within an expert by token: row r computes slot
// slots[r] for token tokens[r]. The order depends on the ids alone.
struct Routing {
  std::vector<int32_t> offsets;  // expert e owns rows offsets[e] .. offsets[e + 1]
  std::vector<int32_t> slots;    // token * k + j
  std::vector<int32_t> tokens;
  std::vector<float> weights;

  int64_t rows() const { return static_cast<int64_t>(slots.size()); }
  int rows_of(int expert) const { return offsets[expert + 1] - offsets[expert]; }
};

// ids and weights are [tokens, k]; -1 skips a slot. Throws std::out_of_range naming the
// first id outside [-1, experts).
Routing Route(const int32_t* ids, const float* weights, int64_t tokens, int k,
              int experts);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_ROUTING_H_
