// Seconds per phase, and per kind of work within the phases, for KTJAX_PROFILE=1: what
// worker 0 sees.
#ifndef KTJAX_FFI_MOE_PROFILE_H_
#define KTJAX_FFI_MOE_PROFILE_H_

#include <x86intrin.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace ktjax {

class Profile {
 public:
  struct Entry {
    double seconds = 0;
    int64_t count = 0;
  };

  static Profile& Get() {
    static Profile profile;
    return profile;
  }
  void Enable(bool on) { enabled_ = on; }
  bool enabled() const { return enabled_; }
  void Add(const char* phase, double seconds) {
    std::lock_guard lock(mutex_);
    Entry& entry = entries_[phase];
    entry.seconds += seconds;
    ++entry.count;
  }
  // The entries so far, which are then forgotten.
  std::map<std::string, Entry> Take() {
    std::lock_guard lock(mutex_);
    return std::exchange(entries_, {});
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
  bool enabled_ = false;
};

// Laps between the phases of one job; does nothing when profiling is off.
class Stopwatch {
 public:
  explicit Stopwatch(bool active)
      : active_(active && Profile::Get().enabled()), last_(Now()) {}
  void Lap(const char* phase) {
    if (!active_) return;
    const auto now = Now();
    Profile::Get().Add(phase, std::chrono::duration<double>(now - last_).count());
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point Now() const { return active_ ? Clock::now() : Clock::time_point(); }
  bool active_;
  Clock::time_point last_;
};

// What a worker spends on kinds of work that every phase has, in clock ticks. The rest
// of a phase is products.
struct WorkTimes {
  uint64_t gather = 0;    // rows of x and gy
  uint64_t decode = 0;    // quantised panels
  uint64_t adapters = 0;  // A and B into panels
  uint64_t epilogue = 0;  // activation, scatter, stores
  uint64_t dropout = 0;   // of the adapters' inputs; of gradients: an epilogue
  uint64_t wait = 0;      // for the other workers

  // Adds them to the profile; `ticks` took `seconds`.
  void Report(uint64_t ticks, double seconds) const {
    const std::pair<const char*, uint64_t> parts[] = {
        {"in phases: gather rows", gather},
        {"in phases: decode weights", decode},
        {"in phases: pack adapters", adapters},
        {"in phases: activation, scatter", epilogue},
        {"in phases: dropout", dropout},
        {"in phases: wait for workers", wait}};
    for (const auto& [name, part] : parts) {
      if (part) Profile::Get().Add(name, seconds * part / ticks);
    }
  }
};

// Adds the ticks of its lifetime to a member of `times`, when there is one.
class WorkTimer {
 public:
  WorkTimer(WorkTimes* times, uint64_t WorkTimes::* work)
      : target_(times ? &(times->*work) : nullptr), start_(target_ ? __rdtsc() : 0) {}
  ~WorkTimer() {
    if (target_) *target_ += __rdtsc() - start_;
  }
  WorkTimer(const WorkTimer&) = delete;
  WorkTimer& operator=(const WorkTimer&) = delete;

 private:
  uint64_t* target_;
  uint64_t start_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PROFILE_H_
