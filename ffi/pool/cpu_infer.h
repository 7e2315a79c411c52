// A queue of calls that run in order behind the caller's back: the eager path.
#ifndef KTJAX_FFI_POOL_CPU_INFER_H_
#define KTJAX_FFI_POOL_CPU_INFER_H_

#include <functional>
#include <memory>

namespace ktjax {

// Submit from any thread; calls run one at a time, in the order of submission, on one
// thread of the queue's own (they use the WorkerPool for their work).
class CpuInfer {
 public:
  CpuInfer();
  // Runs what is still queued; errors that nobody asked for with Sync are lost.
  ~CpuInfer();

  CpuInfer(const CpuInfer&) = delete;
  CpuInfer& operator=(const CpuInfer&) = delete;

  // Returns at once. `call` may throw: see Sync. Throws std::runtime_error in a forked
  // child, which does not have the queue's thread.
  void Submit(std::function<void()> call);

  // Waits until all calls submitted so far have run, then rethrows the first error
  // since the last Sync, if any, and forgets it. Throws std::logic_error when a
  // submitted call calls it, which would wait for itself, and std::runtime_error in a
  // forked child.
  void Sync();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_CPU_INFER_H_
