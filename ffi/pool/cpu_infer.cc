#include "pool/cpu_infer.h"

#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace ktjax {

struct CpuInfer::State {
  const pid_t owner = getpid();
  std::mutex mutex;
  std::condition_variable submitted_or_stopping;
  std::condition_variable finished_one;
  std::deque<std::function<void()>> queue;
  int64_t submitted = 0;
  int64_t finished = 0;
  bool stopping = false;
  std::exception_ptr first_error;
  std::thread thread;

  // Fork copies only the thread that calls it.
  void CheckOwner(const char* operation) const {
    if (getpid() == owner) return;
    throw std::runtime_error(
        std::string(operation) +
        ": this process was forked after the queue was made and does not have its "
        "thread; make the queue in the child, or start processes with the 'spawn' or "
        "'forkserver' method");
  }

  void ThreadMain() {
    pthread_setname_np(pthread_self(), "ktjax/queue");
    std::unique_lock lock(mutex);
    for (;;) {
      submitted_or_stopping.wait(lock, [this] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      std::function<void()> call = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      std::exception_ptr error;
      try {
        call();
      } catch (...) {
        error = std::current_exception();
      }
      call = nullptr;  // destroys what the call holds before Sync returns
      lock.lock();
      if (error && !first_error) first_error = std::move(error);
      ++finished;
      finished_one.notify_all();
    }
  }
};

CpuInfer::CpuInfer() : state_(std::make_unique<State>()) {
  state_->thread = std::thread([state = state_.get()] { state->ThreadMain(); });
}

CpuInfer::~CpuInfer() {
  if (getpid() != state_->owner) {
    // The thread is gone; joining it or destroying what it waits on would hang.
    (void)state_.release();
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->submitted_or_stopping.notify_one();
  state_->thread.join();
}

void CpuInfer::Submit(std::function<void()> call) {
  state_->CheckOwner("CpuInfer::Submit");
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(call));
    ++state_->submitted;
  }
  state_->submitted_or_stopping.notify_one();
}

void CpuInfer::Sync() {
  state_->CheckOwner("CpuInfer::Sync");
  if (std::this_thread::get_id() == state_->thread.get_id()) {
    throw std::logic_error(
        "CpuInfer::Sync: called by a submitted call, which would wait for itself");
  }
  std::unique_lock lock(state_->mutex);
  const int64_t target = state_->submitted;
  state_->finished_one.wait(lock, [&] { return state_->finished >= target; });
  if (!state_->first_error) return;
  const std::exception_ptr error = std::exchange(state_->first_error, nullptr);
  lock.unlock();
  std::rethrow_exception(error);
}

}  // namespace ktjax
