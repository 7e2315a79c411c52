#include "pool/gate.h"

#include <emmintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace ktjax::internal {
namespace {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t),
              "the kernel must see the plain number");

void FutexWait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

uint32_t Gate::WaitWhile(uint32_t old, Patience patience) {
  uint32_t now = value();
  if (now != old) return now;
  if (patience.spin.count() > 0) {
    const auto deadline = std::chrono::steady_clock::now() + patience.spin;
    do {
      // A pause takes 40 (Zen) to 140 (Skylake and later) cycles, the clock about 50.
      for (int i = 0; i < 8; ++i) {
        _mm_pause();
        now = value();
        if (now != old) return now;
      }
      if (patience.yield) sched_yield();
    } while (std::chrono::steady_clock::now() < deadline);
  }
  sleepers_.fetch_add(1);
  while ((now = value_.load()) == old) FutexWait(&value_, old);
  sleepers_.fetch_sub(1);
  return now;
}

void Gate::WakeSleepers() {
  if (sleepers_.load() != 0) FutexWakeAll(&value_);
}

}  // namespace ktjax::internal
