#include "moe/routing.h"

#include <stdexcept>
#include <string>

namespace ktjax {

Routing Route(const int32_t* ids, const float* weights, int64_t tokens, int k,
              int experts) {
  Routing routing;
  routing.offsets.assign(experts + 1, 0);
  const int64_t slots = tokens * k;
  for (int64_t i = 0; i < slots; ++i) {
    if (ids[i] < -1 || ids[i] >= experts) {
      throw std::out_of_range("expert id " + std::to_string(ids[i]) + " of token " +
                              std::to_string(i / k) + ", slot " +
                              std::to_string(i % k) + " is outside [-1, " +
                              std::to_string(experts) + ")");
    }
    if (ids[i] >= 0) ++routing.offsets[ids[i] + 1];
  }
  for (int e = 0; e < experts; ++e) routing.offsets[e + 1] += routing.offsets[e];

  const int64_t rows = routing.offsets[experts];
  routing.slots.resize(rows);
  routing.tokens.resize(rows);
  routing.weights.resize(rows);
  std::vector<int32_t> next(routing.offsets.begin(), routing.offsets.end() - 1);
  for (int64_t i = 0; i < slots; ++i) {
    if (ids[i] < 0) continue;
    const int32_t row = next[ids[i]]++;
    routing.slots[row] = static_cast<int32_t>(i);
    routing.tokens[row] = static_cast<int32_t>(i / k);
    routing.weights[row] = weights[i];
  }
  return routing;
}

}  // namespace ktjax
