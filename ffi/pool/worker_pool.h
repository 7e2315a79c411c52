// The threads that compute. One sub-pool per NUMA node; a job runs on every worker.
#ifndef KTJAX_FFI_POOL_WORKER_POOL_H_
#define KTJAX_FFI_POOL_WORKER_POOL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace ktjax {

struct WorkerPoolConfig {
  int subpool_count = 1;           // tensor-parallel slices, one per NUMA node
  int max_threads_per_subpool = 1;
  bool operator==(const WorkerPoolConfig&) const = default;
};

class WorkerPool;

// What a job sees of the worker that runs it. Valid during the job only.
class Worker {
 public:
  int index() const;            // 0 .. count() - 1 over the whole pool
  int count() const;
  int subpool() const;          // 0 .. subpool_count - 1
  int subpool_count() const;
  int index_in_subpool() const;
  int subpool_size() const;

  // Waits for every worker of the pool. Returns false when some worker has failed: the
  // job must then return at once.
  [[nodiscard]] bool Barrier();

  // This worker's scratch memory, at least `bytes` long, 64-byte aligned, kept from job
  // to job (no allocation in steady state), on its own NUMA node. Contents are undefined;
  // a larger request invalidates what was returned before.
  void* Scratch(size_t bytes);
};

class WorkerPool {
 public:
  // Throws std::invalid_argument for a configuration that cannot be had.
  explicit WorkerPool(const WorkerPoolConfig& config);
  ~WorkerPool();

  const WorkerPoolConfig& config() const;
  int thread_count() const;
  int NumaNodeOf(int subpool) const;

  // Runs `job` once on every worker and returns when all have returned. Jobs of several
  // callers run one after another. An exception that leaves `job` on any worker is
  // rethrown here (the first one, by worker index); none ever leaves a worker thread.
  void Run(const std::function<void(Worker&)>& job);
};

}  // namespace ktjax

#endif  // KTJAX_FFI_POOL_WORKER_POOL_H_
