// The schedule of a Prefetch, for all kernels.
// Everything is static: a file compiled with ISA flags must not share code with others.
#ifndef KTJAX_FFI_GEMM_PREFETCH_H_
#define KTJAX_FFI_GEMM_PREFETCH_H_

#include "base/types.h"
#include "gemm/kernel.h"

namespace ktjax {
namespace {

constexpr int kCacheLine = 64;

// What to fetch during `steps` steps of a product: the lines from `line` on,
// `lines_per_step` a step. No lines when there is nothing (left) to fetch.
struct PrefetchRun {
  const char* line = nullptr;
  int lines_per_step = 0;
  int steps;
  int near_bytes = 0;  // see Prefetch

  // The next `lines` of them. A template, for loops that have no time to test how.
  template <bool kNear>
  [[gnu::always_inline]] void Fetch(int lines) {
    for (int i = 0; i < lines; ++i, line += kCacheLine) {
      __builtin_prefetch(line, 0, kNear ? 3 : 2);
    }
  }
};

// The run for at most `steps` steps of `pairs` depth pairs each. It ends where a chunk
// ends, so callers ask again until their steps are done. Lines per step are a multiple
// of `shares`, for kernels that fetch in so many equal shares; `read` of what is near,
// for those that heed that and read so many lines a step.
inline PrefetchRun NextRun(Prefetch* prefetch, int steps, int pairs, int shares = 1,
                           int read = 0) {
  if (!prefetch) return {.steps = steps};
  while (prefetch->position >= prefetch->total_bytes) {
    if (prefetch->more_count == 0) return {.steps = steps};
    prefetch->base = prefetch->more->first;
    prefetch->stride = 0;
    prefetch->chunk_bytes = prefetch->total_bytes = prefetch->more->size;
    prefetch->position = 0;
    ++prefetch->more;
    --prefetch->more_count;
  }
  const int near_bytes = read ? prefetch->near_bytes : 0;
  const int lines =
      near_bytes ? read
                 : static_cast<int>(shares * CeilDiv(pairs * prefetch->rate,
                                                     Prefetch::kPerPair * shares));
  const int64_t chunk = prefetch->position / prefetch->chunk_bytes;
  const int64_t offset = prefetch->position % prefetch->chunk_bytes;
  const int64_t left = prefetch->chunk_bytes - offset;
  const int64_t step_bytes = int64_t{kCacheLine} * lines;
  // The last step of a chunk may name a few lines after it: a prefetch cannot fault.
  const int64_t left_steps = CeilDiv(left, step_bytes);
  if (left_steps < steps) steps = static_cast<int>(left_steps);
  const int64_t bytes = steps * step_bytes;
  prefetch->position += bytes < left ? bytes : left;
  return {prefetch->base + chunk * prefetch->stride + offset, lines, steps, near_bytes};
}

// Fetches the part of prefetch.scales that depths [begin, end) of `depth` stand for. In
// assembly: see Fetch in moe/products.h.
inline void FetchScales(const Prefetch* prefetch, int begin, int end, int depth) {
  if (!prefetch) return;
  const auto line_of = [&](int d) {
    return CeilDiv(prefetch->scales_bytes * d, int64_t{kCacheLine} * depth);
  };
  for (int64_t line = line_of(begin); line < line_of(end); ++line) {
    asm volatile("prefetcht1 %0" : : "m"(prefetch->scales[line * kCacheLine]));
  }
}

// The strips of c that a term feeds are its panel's strips 0 .. TermWidth - 1.
inline int TermWidth(const Term& term, int strips) {
  const int fed = strips - term.first_strip + term.strip_step - 1;
  return fed < 0 ? 0 : fed / term.strip_step;
}

}  // namespace
}  // namespace ktjax

#endif  // KTJAX_FFI_GEMM_PREFETCH_H_
