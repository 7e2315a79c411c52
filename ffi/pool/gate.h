// A number that threads wait on: they spin for a bounded time, then sleep in the
// kernel.
#ifndef KTJAX_FFI_POOL_GATE_H_
#define KTJAX_FFI_POOL_GATE_H_

#include <atomic>
#include <chrono>
#include <cstdint>

namespace ktjax::internal {

// How to wait before sleeping.
struct Patience {
  std::chrono::nanoseconds spin{0};
  // Lets whoever else wants this CPU have it at once, and not when the spin is over.
  bool yield = false;
};

// Aligned so that two gates never share a line, nor the pair of lines that Intel's
// adjacent-line prefetcher moves together.
class alignas(128) Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void Add(uint32_t amount) {
    value_.fetch_add(amount);
    WakeSleepers();
  }
  void SetBits(uint32_t bits) {
    value_.fetch_or(bits);
    WakeSleepers();
  }
  // For when nobody waits.
  void ClearBits(uint32_t bits) { value_.fetch_and(~bits); }

  // Returns the value as soon as it is not `old`.
  uint32_t WaitWhile(uint32_t old, Patience patience);

 private:
  void WakeSleepers();

  std::atomic<uint32_t> value_{0};
  // Spares the waking side the system call when nobody sleeps. Both sides write one of
  // the two numbers and then read the other, sequentially consistently, so at least one
  // of them sees the other's write and no wake-up is lost.
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace ktjax::internal

#endif  // KTJAX_FFI_POOL_GATE_H_
