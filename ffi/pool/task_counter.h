// Hands out the tasks of one phase to whichever worker is free.
#ifndef KTJAX_FFI_POOL_TASK_COUNTER_H_
#define KTJAX_FFI_POOL_TASK_COUNTER_H_

#include <atomic>
#include <cstdint>

namespace ktjax {

// Which worker gets which task depends on timing, so a task must write only what is its
// own: then results stay bit-identical. Alone on its cache lines.
class alignas(128) TaskCounter {
 public:
  // The first of `count` tasks that are now the caller's; stop when it is past the end.
  int64_t Claim(int64_t count = 1) {
    return next_.fetch_add(count, std::memory_order_relaxed);
  }
  // By one thread, with a Barrier between it and the Claims before and after.
  void Reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_TASK_COUNTER_H_
