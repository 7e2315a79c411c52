#include "pool/worker_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "pool/gate.h"

namespace ktjax {
namespace {

constexpr int kMaxThreads = 256;

// Waking a sleeping thread takes 10 to 50 us, so short waits spin. Between jobs the
// CPUs belong to XLA and to callers: hence the yield. Inside a job they are ours, and
// phases take 100 us or so.
constexpr internal::Patience kIdle{std::chrono::microseconds(50), true};
constexpr internal::Patience kAtBarrier{std::chrono::microseconds(50), false};

// Denormals are zero, as in XLA's own threads: otherwise one denormal costs 100 cycles.
// Rounding to nearest and no traps, whatever the caller of a job has set.
constexpr unsigned kFlushToZero = 0x8000;
constexpr unsigned kDenormalsAreZero = 0x0040;
constexpr unsigned kNearestAndNoTraps = 0x1f80;

thread_local bool t_is_worker = false;

// The CPUs that a thread may run on, as the kernel takes them.
class CpuSet {
 public:
  explicit CpuSet(const std::vector<int>& cpus)
      : CpuSet(*std::max_element(cpus.begin(), cpus.end()) + 1) {
    for (int cpu : cpus) CPU_SET_S(cpu, bytes_, set_.get());
  }
  // Those of this thread; nothing where the kernel does not say.
  static std::optional<CpuSet> OfThisThread() {
    CpuSet set(kMostCpus);
    if (sched_getaffinity(0, set.bytes_, set.set_.get()) != 0) return std::nullopt;
    return set;
  }

  // Returns an error number, or 0.
  int ApplyToThisThread() const {
    return pthread_setaffinity_np(pthread_self(), bytes_, set_.get());
  }

 private:
  static constexpr int kMostCpus = 8192;  // what Linux can be built for

  explicit CpuSet(int capacity)
      : set_(CPU_ALLOC(capacity), [](cpu_set_t* s) { CPU_FREE(s); }),
        bytes_(CPU_ALLOC_SIZE(capacity)) {
    CPU_ZERO_S(bytes_, set_.get());
  }

  std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set_;
  size_t bytes_;
};

void CheckConfig(const WorkerPoolConfig& config) {
  const auto check = [](const char* name, int value) {
    if (value >= 1 && value <= kMaxThreads) return;
    throw std::invalid_argument("WorkerPool: " + std::string(name) + " must be 1.." +
                                std::to_string(kMaxThreads) + ", got " +
                                std::to_string(value));
  };
  check("subpool_count", config.subpool_count);
  check("max_threads_per_subpool", config.max_threads_per_subpool);
  check("subpool_count * max_threads_per_subpool",
        config.subpool_count * config.max_threads_per_subpool);
}

}  // namespace

namespace internal {

// Everything that the threads share. On the heap and reachable only through
// WorkerPool::state_, so that a forked child can abandon it whole.
class PoolState {
 public:
  PoolState(const WorkerPoolConfig& config, const Topology& topology)
      : config_(config),
        topology_(topology),
        owner_(getpid()),
        errors_(config.subpool_count * config.max_threads_per_subpool),
        subpools_(config.subpool_count) {
    const int count = static_cast<int>(errors_.size());
    // Spinning for somebody who waits for this very CPU only delays both.
    if (count > topology.cpu_count()) at_barrier_ = idle_ = {};
    for (int i = 0; i < count; ++i) {
      workers_.emplace_back(new Worker(this, i, config));
    }
    AssignCpus();
  }

  ~PoolState() {
    stopping_ = true;
    start_.Add(1);
    for (std::thread& thread : threads_) thread.join();
  }

  void StartThreads() {
    for (size_t i = 1; i < workers_.size(); ++i) {
      threads_.emplace_back([this, w = workers_[i].get()] { ThreadMain(*w); });
    }
    Run([this](Worker& worker) {
      const int error = places_[worker.index()].ApplyToThisThread();
      if (error == 0) return;
      throw std::system_error(error, std::generic_category(),
                              std::string("WorkerPool: cannot pin worker ")
                                  .append(std::to_string(worker.index())));
    });
  }

  void Run(const std::function<void(Worker&)>& job) {
    if (t_is_worker) {
      throw std::logic_error(
          "WorkerPool::Run: called by a worker, which would wait for itself; run the "
          "inner work inside the job");
    }
    // Before the mutex: another thread may have held it at the fork, for ever.
    if (!IsOwner()) {
      throw std::runtime_error(
          "WorkerPool::Run: this process was forked after the pool was made and has "
          "none of its threads; make the pool in the child, or start processes with "
          "the "
          "'spawn' or 'forkserver' method");
    }
    const std::lock_guard lock(run_mutex_);
    job_ = &job;
    remaining_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    const uint32_t jobs_done = done_.value();
    start_.Add(1);
    {
      const CallerAsWorker caller(places_[0]);
      RunJob(*workers_[0]);
      if (!threads_.empty()) done_.WaitWhile(jobs_done, at_barrier_);
    }
    if (failed_.load(std::memory_order_relaxed)) RethrowAndReset();
  }

  bool Barrier(const Worker& worker) {
    Subpool& mine = subpools_[worker.subpool()];
    const uint32_t round = mine.release.value();
    if (round & kFailed) return false;
    if (mine.arrived.fetch_add(1) + 1 == worker.subpool_size()) {
      mine.arrived.store(0, std::memory_order_relaxed);
      if (subpools_arrived_.fetch_add(1) + 1 == config_.subpool_count) {
        subpools_arrived_.store(0, std::memory_order_relaxed);
        for (Subpool& subpool : subpools_) subpool.release.Add(kNextRound);
      }
    }
    return (mine.release.WaitWhile(round, at_barrier_) & kFailed) == 0;
  }

  bool IsOwner() const { return getpid() == owner_; }
  const WorkerPoolConfig& config() const { return config_; }
  int NumaNodeOf(int subpool) const { return NodeOf(subpool).id; }

 private:
  // The lowest bit of a release gate says that a worker has failed; the others count
  // the barriers passed.
  static constexpr uint32_t kFailed = 1;
  static constexpr uint32_t kNextRound = 2;

  // The caller of a job as worker 0, for the scope's duration. Were it to sleep, and a
  // thread of its own to be woken and to wake it, that would add 15 to 25 us to a job;
  // and both would want the same CPU.
  class CallerAsWorker {
   public:
    // Where the caller cannot be moved to the worker's CPUs it stays where it is.
    explicit CallerAsWorker(const CpuSet& place)
        : cpus_(CpuSet::OfThisThread()), control_(_mm_getcsr()) {
      if (cpus_) place.ApplyToThisThread();
      BecomeWorker();
    }
    ~CallerAsWorker() {
      t_is_worker = false;
      _mm_setcsr(control_);
      if (cpus_) cpus_->ApplyToThisThread();
    }
    CallerAsWorker(const CallerAsWorker&) = delete;
    CallerAsWorker& operator=(const CallerAsWorker&) = delete;

   private:
    const std::optional<CpuSet> cpus_;
    const unsigned control_;
  };

  // Arrivals are counted by sub-pool first, so that between nodes moves one line per
  // sub-pool, and not one per worker.
  struct alignas(128) Subpool {
    std::atomic<int> arrived{0};
    Gate release;
  };

  const NumaNode& NodeOf(int subpool) const {
    return topology_.nodes[subpool % topology_.nodes.size()];
  }

  void AssignCpus() {
    std::vector<int> wanted(topology_.nodes.size(), 0);
    for (int s = 0; s < config_.subpool_count; ++s) {
      wanted[s % wanted.size()] += config_.max_threads_per_subpool;
    }
    std::vector<int> taken(topology_.nodes.size(), 0);
    for (auto& worker : workers_) {
      const size_t at = worker->subpool() % topology_.nodes.size();
      const std::vector<int>& cpus = topology_.nodes[at].cpus;
      if (wanted[at] > static_cast<int>(cpus.size())) {
        places_.emplace_back(cpus);
      } else {
        worker->pinned_cpu_ = cpus[taken[at]++];
        places_.emplace_back(std::vector<int>{worker->pinned_cpu_});
      }
    }
  }

  static void BecomeWorker() {
    t_is_worker = true;
    _mm_setcsr(kNearestAndNoTraps | kFlushToZero | kDenormalsAreZero);
  }

  void RunJob(Worker& worker) {
    try {
      (*job_)(worker);
    } catch (...) {
      errors_[worker.index()] = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
      for (Subpool& subpool : subpools_) subpool.release.SetBits(kFailed);
    }
  }

  void ThreadMain(Worker& worker) {
    BecomeWorker();
    const std::string name = "ktjax/" + std::to_string(worker.index());
    pthread_setname_np(pthread_self(), name.c_str());
    uint32_t jobs_seen = 0;
    for (;;) {
      jobs_seen = start_.WaitWhile(jobs_seen, idle_);
      if (stopping_) return;
      RunJob(worker);
      if (remaining_.fetch_sub(1) == 1) done_.Add(1);
    }
  }

  // All workers have returned: nobody else reads or writes what is reset here.
  void RethrowAndReset() {
    failed_.store(false, std::memory_order_relaxed);
    subpools_arrived_.store(0, std::memory_order_relaxed);
    for (Subpool& subpool : subpools_) {
      subpool.arrived.store(0, std::memory_order_relaxed);
      subpool.release.ClearBits(kFailed);
    }
    std::exception_ptr first;
    for (std::exception_ptr& error : errors_) {
      if (error && !first) first = error;
      error = nullptr;
    }
    std::rethrow_exception(first);
  }

  const WorkerPoolConfig config_;
  const Topology topology_;
  const pid_t owner_;
  Patience at_barrier_ = kAtBarrier;
  Patience idle_ = kIdle;

  std::mutex run_mutex_;
  const std::function<void(Worker&)>* job_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> failed_{false};
  std::vector<std::exception_ptr> errors_;  // by worker; written by that worker only
  Gate start_;
  Gate done_;
  alignas(128) std::atomic<int> remaining_{0};
  alignas(128) std::atomic<int> subpools_arrived_{0};
  std::vector<Subpool> subpools_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<CpuSet> places_;        // by worker: the CPUs it may run on
  std::vector<std::thread> threads_;  // of all workers but 0, which the caller is
};

}  // namespace internal

bool Worker::Barrier() { return pool_->Barrier(*this); }

void* Worker::Scratch(size_t bytes) {
  if (bytes > scratch_.size()) {
    scratch_ = AlignedBuffer();  // first, so that two never live at once
    // A quarter more, so that slowly growing requests do not each allocate.
    AlignedBuffer grown(bytes + std::min(bytes / 4, SIZE_MAX - bytes));
    // Touching a page places it on this thread's node, and unlike mbind is allowed in
    // every container. It also keeps page faults out of the job's hot loops.
    constexpr size_t kPage = 4096;
    auto* memory = static_cast<volatile char*>(grown.data());
    for (size_t i = 0; i < grown.size(); i += kPage) memory[i] = 0;
    scratch_ = std::move(grown);
  }
  return scratch_.data();
}

WorkerPool::WorkerPool(const WorkerPoolConfig& config)
    : WorkerPool(config, ThisTopology()) {}

WorkerPool::WorkerPool(const WorkerPoolConfig& config, const Topology& topology) {
  CheckConfig(config);
  ThisCpu();  // asks for the AMX state
  state_ = std::make_unique<internal::PoolState>(config, topology);
  state_->StartThreads();
}

WorkerPool::~WorkerPool() {
  // In a forked child the threads are gone: joining them, or freeing what they were
  // using, is undefined.
  if (!state_->IsOwner()) (void)state_.release();
}

const WorkerPoolConfig& WorkerPool::config() const { return state_->config(); }

int WorkerPool::thread_count() const {
  return config().subpool_count * config().max_threads_per_subpool;
}

int WorkerPool::NumaNodeOf(int subpool) const {
  if (subpool < 0 || subpool >= config().subpool_count) {
    throw std::invalid_argument("WorkerPool::NumaNodeOf: subpool must be 0.." +
                                std::to_string(config().subpool_count - 1) + ", got " +
                                std::to_string(subpool));
  }
  return state_->NumaNodeOf(subpool);
}

void WorkerPool::Run(const std::function<void(Worker&)>& job) { state_->Run(job); }

}  // namespace ktjax
