// A queue of calls that run in order behind the caller's back: the eager path.
#ifndef KTJAX_FFI_POOL_CPU_INFER_H_
#define KTJAX_FFI_POOL_CPU_INFER_H_

#include <functional>
#include <future>
#include <memory>

namespace ktjax {

// A call that was submitted. Copies stand for the same call, and outlive its queue.
class PendingCall {
 public:
  // Waits until the call has run, then rethrows what it threw: errors belong to the
  // call that made them, and every waiter gets them. Throws std::logic_error when a
  // submitted call waits for one that has not run (it would wait for itself), and
  // std::runtime_error in a forked child, where it never will.
  void Wait() const;
  bool Done() const;

 private:
  friend class CpuInfer;
  explicit PendingCall(std::shared_future<void> future);

  std::shared_future<void> future_;
  int owner_;  // the process that has the queue's thread
};

// Submit from any thread; calls run one at a time, in the order of submission, on one
// thread of the queue's own (they use the WorkerPool for their work).
class CpuInfer {
 public:
  CpuInfer();
  // Runs what is still queued.
  ~CpuInfer();

  CpuInfer(const CpuInfer&) = delete;
  CpuInfer& operator=(const CpuInfer&) = delete;

  // Returns at once. `call` may throw: see PendingCall. What it holds is destroyed
  // before its waiters go on. Throws std::runtime_error in a forked child, which does
  // not have the queue's thread.
  PendingCall Submit(std::function<void()> call);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_CPU_INFER_H_
