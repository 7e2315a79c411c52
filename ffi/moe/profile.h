// Seconds per phase, for KTJAX_PROFILE=1: what worker 0 sees, waiting included.
#ifndef KTJAX_FFI_MOE_PROFILE_H_
#define KTJAX_FFI_MOE_PROFILE_H_

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

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_PROFILE_H_
