// What the C++ tests share: checks that count, reproducible values, guarded memory.
#ifndef KTJAX_FFI_TESTING_CHECK_H_
#define KTJAX_FFI_TESTING_CHECK_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/types.h"

namespace ktjax {

struct CheckCounts {
  int64_t passed = 0;
  int64_t failed = 0;
};
inline CheckCounts check_counts;

// Counts `condition`; when it is false prints it with the printf-style arguments.
#define KTJAX_CHECK(condition, ...)                                       \
  do {                                                                    \
    if (condition) {                                                      \
      ++::ktjax::check_counts.passed;                                     \
    } else if (++::ktjax::check_counts.failed <= 50) {                    \
      std::printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
    }                                                                     \
  } while (false)

// Prints the counts; what main returns.
inline int ReportChecks() {
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(check_counts.passed),
              static_cast<long long>(check_counts.failed));
  return check_counts.failed == 0 && check_counts.passed > 0 ? 0 : 1;
}

// The same values on every machine (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int Below(int limit) {
    return static_cast<int>(Bits() % static_cast<uint64_t>(limit));
  }
  // In [-1, 1), with 24 bits.
  float Value() {
    return static_cast<float>(static_cast<int64_t>(Bits() >> 39) - (1 << 24)) *
           0x1p-24f;
  }

 private:
  uint64_t state_;
};

// An array whose end meets a page that cannot be touched: reading or writing beyond it
// is a crash, not luck. Starts filled with 0xff, a NaN in every dtype.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (count * sizeof(T) + page - 1) / page * page + page;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
    char* guard = static_cast<char*>(memory_) + bytes_ - page;
    if (memory_ == MAP_FAILED || mprotect(guard, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(guard - count * sizeof(T));
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  ~Guarded() { munmap(memory_, bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t count_;
  size_t bytes_;
  void* memory_;
  T* data_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_TESTING_CHECK_H_
