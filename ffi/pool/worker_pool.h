// The threads that compute. One sub-pool per NUMA node; a job runs on every worker.
#ifndef KTJAX_FFI_POOL_WORKER_POOL_H_
#define KTJAX_FFI_POOL_WORKER_POOL_H_

#include <cstddef>
#include <functional>
#include <memory>

#include "base/aligned.h"
#include "pool/topology.h"

namespace ktjax {

struct WorkerPoolConfig {
  int subpool_count = 1;  // tensor-parallel slices, one per NUMA node
  int max_threads_per_subpool = 1;
  bool operator==(const WorkerPoolConfig&) const = default;
};

namespace internal {
class PoolState;
}

// What a job sees of the worker that runs it. Valid during the job only.
class alignas(128) Worker {
 public:
  int index() const { return index_; }  // 0 .. count() - 1 over the whole pool
  int count() const { return subpool_count_ * subpool_size_; }
  int subpool() const { return index_ / subpool_size_; }  // 0 .. subpool_count() - 1
  int subpool_count() const { return subpool_count_; }
  int index_in_subpool() const { return index_ % subpool_size_; }
  int subpool_size() const { return subpool_size_; }

  // The CPU this worker is pinned to, or -1 when its node has fewer CPUs than workers
  // and it may run on any of them. A caller that cannot be moved to the CPU of worker 0
  // stays where it is.
  int pinned_cpu() const { return pinned_cpu_; }

  // Waits for every worker of the pool. Returns false when some worker has failed: the
  // job must then return at once. Every worker must call it equally often.
  [[nodiscard]] bool Barrier();

  // This worker's scratch memory, at least `bytes` long, 64-byte aligned, kept from job
  // to job (no allocation in steady state), on its own NUMA node. Contents are
  // undefined; a larger request invalidates what was returned before. Throws
  // AllocationError.
  void* Scratch(size_t bytes);

  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

 private:
  friend class internal::PoolState;
  Worker(internal::PoolState* pool, int index, const WorkerPoolConfig& config)
      : pool_(pool),
        index_(index),
        subpool_count_(config.subpool_count),
        subpool_size_(config.max_threads_per_subpool) {}

  internal::PoolState* pool_;
  int index_;
  int subpool_count_;
  int subpool_size_;
  int pinned_cpu_ = -1;
  AlignedBuffer scratch_;
};

// Sub-pool s computes on node s modulo the number of nodes. Workers are pinned to CPUs
// of their own, physical cores first, while their node has enough of them, else to the
// node.
class WorkerPool {
 public:
  // Throws std::invalid_argument for a configuration that cannot be had (1 to 256
  // threads in all), std::system_error when threads cannot be started or pinned.
  explicit WorkerPool(const WorkerPoolConfig& config);
  WorkerPool(const WorkerPoolConfig& config, const Topology& topology);
  // No job may be running. After a fork, the child's copy is abandoned, not joined.
  ~WorkerPool();

  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  const WorkerPoolConfig& config() const;
  int thread_count() const;
  int NumaNodeOf(int subpool) const;

  // Runs `job` once on every worker and returns when all have returned. The calling
  // thread is worker 0 meanwhile: on that worker's CPU, with denormals as zeros; after
  // that it is as before. Jobs of several callers run one after another. An exception
  // that leaves `job` on any worker is rethrown here (the first one, by worker index);
  // none ever leaves a thread of the pool. Throws std::logic_error when called by a
  // worker and std::runtime_error in a child process, which has no threads: fork copies
  // only the one that calls it.
  void Run(const std::function<void(Worker&)>& job);

 private:
  std::unique_ptr<internal::PoolState> state_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_WORKER_POOL_H_
