// A worker's memory during a pass.
#ifndef KTJAX_FFI_MOE_SCRATCH_H_
#define KTJAX_FFI_MOE_SCRATCH_H_

#include <cstddef>

#include "moe/profile.h"
#include "moe/terms.h"

namespace ktjax {

// Hands out parts of a block of memory, each from a cache line on. Without a block
// (null) it counts the bytes that they would take.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* Take(size_t count) {
    if (count == 0) return nullptr;
    char* part = memory_ ? memory_ + used_ : nullptr;
    used_ += RoundUp(count * sizeof(T), 64);
    return reinterpret_cast<T*>(part);
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// Rows that a product over tokens (a LoRA gradient) contracts at a time: its panel is
// 128 KiB then and stays in L2.
inline constexpr int kMaxGradDepth = 1024;

// Rows that share what was transposed: 64 KiB of sums.
inline constexpr int kTransposedRows = 256;

// Depth pairs that are decoded at a time where they are used at once: 16 KiB stay in
// L1.
inline constexpr int kChunkPairs = 64;

// A worker's scratch memory during a job.
struct Scratch {
  SplitRows rows;              // packed input rows of a block
  Int8Rows codes;              // the same, quantised
  SplitRows kept;              // with dropout: rows for the adapters
  bf16* chunk;                 // kChunkPairs decoded depth pairs of a panel
  SplitPanel panel;            // one transposed or packed panel
  SplitPanel lora_panel[2];    // panels of a LoRA term
  bf16* transposed;            // low-rank values with rows and columns exchanged
  float* tile;                 // product tiles, kTransposedRows or more rows
  float* lora_tile;            // with dropout: one of LoRA's alone
  float* sums;                 // of products over a panel's outputs; a row of sum_
  WorkTimes* times = nullptr;  // of the worker that is profiled
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_SCRATCH_H_
