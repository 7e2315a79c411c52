#include "pool/cpu_infer.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace ktjax {
namespace {

thread_local bool is_queue_thread = false;

// Fork copies only the thread that calls it.
void CheckOwner(int owner, const char* operation) {
  if (getpid() == owner) return;
  throw std::runtime_error(
      std::string(operation) +
      ": this process was forked after the queue was made and does not have its "
      "thread; make the queue in the child, or start processes with the 'spawn' or "
      "'forkserver' method");
}

}  // namespace

PendingCall::PendingCall(std::shared_future<void> future)
    : future_(std::move(future)), owner_(getpid()) {}

bool PendingCall::Done() const {
  return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

void PendingCall::Wait() const {
  if (!Done()) {
    CheckOwner(owner_, "PendingCall::Wait");
    if (is_queue_thread) {
      throw std::logic_error(
          "PendingCall::Wait: called by a submitted call, which would wait for itself");
    }
  }
  future_.get();
}

struct CpuInfer::State {
  struct Entry {
    std::function<void()> call;
    std::promise<void> promise;
  };

  const pid_t owner = getpid();
  std::mutex mutex;
  std::condition_variable submitted_or_stopping;
  std::deque<Entry> queue;
  bool stopping = false;
  std::thread thread;

  void ThreadMain() {
    pthread_setname_np(pthread_self(), "ktjax/queue");
    is_queue_thread = true;
    std::unique_lock lock(mutex);
    for (;;) {
      submitted_or_stopping.wait(lock, [this] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      Entry entry = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      std::exception_ptr error;
      try {
        entry.call();
      } catch (...) {
        error = std::current_exception();
      }
      entry.call = nullptr;  // destroys what the call holds before its waiters go on
      if (error) {
        entry.promise.set_exception(std::move(error));
      } else {
        entry.promise.set_value();
      }
      lock.lock();
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

PendingCall CpuInfer::Submit(std::function<void()> call) {
  CheckOwner(state_->owner, "CpuInfer::Submit");
  State::Entry entry{std::move(call), {}};
  const PendingCall pending(entry.promise.get_future().share());
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(entry));
  }
  state_->submitted_or_stopping.notify_one();
  return pending;
}

}  // namespace ktjax
