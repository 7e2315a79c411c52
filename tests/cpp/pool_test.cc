// Tests of ffi/base and ffi/pool. Prints "N passed, M failed"; exits 1 when M > 0.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <new>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/aligned.h"
#include "base/cpu.h"
#include "pool/cpu_infer.h"
#include "pool/peak.h"
#include "pool/task_counter.h"
#include "pool/topology.h"
#include "pool/worker_pool.h"

namespace ktjax {
namespace {

std::atomic<int> passed{0};
std::atomic<int> failed{0};

void Check(bool ok, const char* what, int line) {
  if (ok) {
    ++passed;
  } else {
    ++failed;
    std::printf("line %d: failed: %s\n", line, what);
  }
}
#define CHECK(condition) Check((condition), #condition, __LINE__)

// The message of the Error that `call` throws; empty when it throws none.
template <typename Error, typename Call>
std::string MessageOf(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  } catch (...) {
    return "";
  }
  return "";
}

bool Has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// ---- base/cpu ----

CpuFeatures SapphireRapids() {
  CpuFeatures cpu;
  cpu.brand = "test CPU";
  cpu.avx2 = cpu.fma = cpu.f16c = cpu.os_avx = true;
  cpu.avx512f = cpu.avx512bw = cpu.avx512dq = cpu.avx512vl = cpu.os_avx512 = true;
  cpu.avx512_vnni = cpu.avx512_bf16 = true;
  cpu.amx_tile = cpu.amx_bf16 = cpu.amx_int8 = cpu.os_amx = cpu.amx_permitted = true;
  return cpu;
}

void TestIsa() {
  const CpuFeatures full = SapphireRapids();
  CHECK(ChooseIsa(nullptr, full) == Isa::kAmx);
  CHECK(ChooseIsa("", full) == Isa::kAmx);
  CHECK(SupportedIsas(full).size() == 7);
  for (Isa isa : SupportedIsas(full)) {
    CHECK(ChooseIsa(IsaName(isa).c_str(), full) == isa);
  }

  CpuFeatures unpermitted = full;
  unpermitted.amx_permitted = false;
  CHECK(ChooseIsa(nullptr, unpermitted) == Isa::kAvx512Bf16);
  CHECK(Has(ExplainIsa(Isa::kAvx512Bf16, unpermitted), "amx lacks amx_permission"));
  const std::string refused =
      MessageOf<std::invalid_argument>([&] { ChooseIsa("amx", unpermitted); });
  CHECK(Has(refused, "lacks amx_permission"));
  CHECK(Has(refused, "supports portable, avx2, avx512, avx512_vnni, avx512_bf16"));
  CHECK(Has(refused, "test CPU"));

  CpuFeatures cascade_lake = unpermitted;
  cascade_lake.avx512_bf16 = false;
  CHECK(ChooseIsa(nullptr, cascade_lake) == Isa::kAvx512Vnni);
  CpuFeatures no_zmm = full;  // as under an operating system that saves AVX only
  no_zmm.os_avx512 = false;
  CHECK(ChooseIsa(nullptr, no_zmm) == Isa::kAvx2);
  const CpuFeatures none;
  CHECK(ChooseIsa(nullptr, none) == Isa::kPortable);
  CHECK(ChooseIsa("amx_emulated", none) == Isa::kAmxEmulated);
  CHECK(ExplainIsa(Isa::kPortable, none).rfind("portable: needs no CPU feature", 0) ==
        0);

  const std::string unknown =
      MessageOf<std::invalid_argument>([] { ChooseIsa("sse9"); });
  CHECK(Has(unknown, "unknown instruction set 'sse9'"));
  CHECK(Has(unknown, "supports portable"));
  CHECK(!ThisCpu().brand.empty());
  CHECK(MissingFeatures(ChooseIsa(nullptr)).empty());
  std::printf("%s\n%s\n", ThisCpu().brand.c_str(),
              ExplainIsa(ChooseIsa(nullptr)).c_str());
}

// ---- base/aligned ----

void TestAligned() {
  for (size_t bytes :
       {size_t{1}, size_t{100}, kHugePage - 1, kHugePage, kHugePage + 1}) {
    for (int node : {AlignedBuffer::kAnyNode, 0}) {
      AlignedBuffer buffer(bytes, node);
      const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
      CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % alignment == 0);
      CHECK(buffer.size() == bytes);
      std::memset(buffer.data(), 1, bytes);
      void* const data = buffer.data();
      AlignedBuffer moved(std::move(buffer));
      CHECK(moved.data() == data && buffer.data() == nullptr && buffer.size() == 0);
      buffer = std::move(moved);
      CHECK(buffer.data() == data && buffer.size() == bytes);
    }
  }
  CHECK(AlignedBuffer(0).data() == nullptr);
  const size_t absurd = size_t{1} << 60;
  const std::string message =
      MessageOf<std::bad_alloc>([&] { AlignedBuffer buffer(absurd); });
  CHECK(Has(message, std::to_string(absurd).c_str()));
  CHECK(!MessageOf<AllocationError>([] { AlignedBuffer buffer(SIZE_MAX); }).empty());

  AlignedBuffer buffer(3 * kHugePage);
  char* const data = static_cast<char*>(buffer.data());
  CHECK(AdviseHugePages(data, kHugePage - 1) == 0);
  CHECK(AdviseHugePages(data + 1, 2 * kHugePage - 2) == 0);
  const size_t advised = AdviseHugePages(data + 64, 3 * kHugePage - 128);
  CHECK(advised == kHugePage || advised == 0);  // 0: a kernel without huge pages
}

// ---- pool/topology ----

class FakeSysfs {
 public:
  FakeSysfs() {
    std::string path = std::filesystem::temp_directory_path() / "ktjax-sysfs-XXXXXX";
    if (mkdtemp(path.data()) == nullptr) std::abort();
    root_ = path;
  }
  ~FakeSysfs() { std::filesystem::remove_all(root_); }
  std::string root() const { return root_; }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ / "devices/system" / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }
  void Siblings(const std::vector<int>& cpus, const std::string& list) {
    for (int cpu : cpus) {
      Write("cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list", list);
    }
  }

 private:
  std::filesystem::path root_;
};

// Two nodes of two cores with two threads each: 0,4 1,5 | 2,6 3,7; node 2 has no CPU.
void FillTwoNodes(FakeSysfs& sysfs) {
  sysfs.Write("cpu/online", "0-7");
  sysfs.Write("node/node0/cpulist", "0-1,4-5");
  sysfs.Write("node/node1/cpulist", "2-3,6-7");
  sysfs.Write("node/node2/cpulist", "");
  sysfs.Write("node/power/cpulist", "0");  // not a node
  for (int core = 0; core < 4; ++core) {
    sysfs.Siblings({core, core + 4},
                   std::to_string(core) + "," + std::to_string(core + 4));
  }
}

std::vector<int> Range(int count) {
  std::vector<int> cpus(count);
  std::iota(cpus.begin(), cpus.end(), 0);
  return cpus;
}

void TestTopology() {
  CHECK(ParseCpuList("0-2,8,10-11") == std::vector<int>({0, 1, 2, 8, 10, 11}));
  CHECK(ParseCpuList("").empty());
  for (const char* bad : {"a", "1-", "1;2", "-1"}) {
    CHECK(Has(MessageOf<std::invalid_argument>([&] { ParseCpuList(bad); }), bad));
  }

  FakeSysfs two_nodes;
  FillTwoNodes(two_nodes);
  Topology all = ReadTopology(two_nodes.root(), Range(8));
  CHECK(all.nodes.size() == 2 && all.cpu_count() == 8 && all.physical_cores() == 4);
  CHECK(all.nodes[0].id == 0 && all.nodes[0].cpus == std::vector<int>({0, 1, 4, 5}));
  CHECK(all.nodes[1].id == 1 && all.nodes[1].cpus == std::vector<int>({2, 3, 6, 7}));
  CHECK(all.nodes[0].physical_cores == 2);

  // Core 2 may be used through its second thread only, and node 0 not at all.
  Topology some = ReadTopology(two_nodes.root(), {3, 6, 7});
  CHECK(some.nodes.size() == 1 && some.nodes[0].id == 1);
  CHECK(some.nodes[0].cpus == std::vector<int>({3, 6, 7}));
  CHECK(some.nodes[0].physical_cores == 2);

  two_nodes.Write("cpu/online", "0-2,4-6");  // 3 and 7 are off
  Topology online = ReadTopology(two_nodes.root(), Range(8));
  CHECK(online.nodes[1].cpus == std::vector<int>({2, 6}));
  CHECK(online.cpu_count() == 6 && online.physical_cores() == 3);
  CHECK(!MessageOf<std::invalid_argument>([&] {
           ReadTopology(two_nodes.root(), {3, 7});
         }).empty());

  Topology bare = ReadTopology("/nonexistent", {5, 2});
  CHECK(bare.nodes.size() == 1 && bare.nodes[0].id == 0);
  CHECK(bare.nodes[0].cpus == std::vector<int>({2, 5}) && bare.physical_cores() == 2);

  CHECK(ThisTopology().cpu_count() == static_cast<int>(AllowedCpus().size()));
}

// ---- pool/worker_pool ----

void TestBarrier(int subpools, int threads, int rounds) {
  WorkerPool pool({.subpool_count = subpools, .max_threads_per_subpool = threads});
  const int count = subpools * threads;
  CHECK(pool.thread_count() == count);
  // Between two barriers every worker sees what all wrote before the first of them.
  std::vector<int> written(count, -1);
  std::vector<int> errors(count, 0);
  pool.Run([&](Worker& worker) {
    for (int round = 0; round < rounds; ++round) {
      written[worker.index()] = round;
      if (!worker.Barrier()) ++errors[worker.index()];
      for (int value : written) errors[worker.index()] += value != round;
      if (!worker.Barrier()) ++errors[worker.index()];
    }
  });
  CHECK(std::accumulate(errors.begin(), errors.end(), 0) == 0);
  CHECK(written == std::vector<int>(count, rounds - 1));
}

void TestIndices() {
  WorkerPool pool({.subpool_count = 3, .max_threads_per_subpool = 2});
  CHECK(pool.config().subpool_count == 3 && pool.NumaNodeOf(2) >= 0);
  CHECK(!MessageOf<std::invalid_argument>([&] { pool.NumaNodeOf(3); }).empty());
  std::vector<std::string> seen(6);
  pool.Run([&](Worker& w) {
    seen[w.index()] =
        std::to_string(w.subpool()) + "." + std::to_string(w.index_in_subpool()) +
        " of " + std::to_string(w.subpool_count()) + "." +
        std::to_string(w.subpool_size()) + " of " + std::to_string(w.count());
  });
  for (int i = 0; i < 6; ++i) {
    CHECK(seen[i] ==
          std::to_string(i / 2) + "." + std::to_string(i % 2) + " of 3.2 of 6");
  }
}

void TestPlacement() {
  const std::vector<int> allowed = AllowedCpus();
  const int cpus = static_cast<int>(allowed.size());
  const auto places = [&](int subpools, int threads) {
    WorkerPool pool({.subpool_count = subpools, .max_threads_per_subpool = threads});
    std::vector<int> pinned(pool.thread_count());
    std::vector<int> permitted(pool.thread_count());
    pool.Run([&](Worker& worker) {
      const std::vector<int> mine = AllowedCpus();
      permitted[worker.index()] = static_cast<int>(mine.size());
      pinned[worker.index()] = worker.pinned_cpu();
      if (mine.size() == 1) CHECK(mine[0] == worker.pinned_cpu());
      if (worker.pinned_cpu() >= 0) CHECK(sched_getcpu() == worker.pinned_cpu());
    });
    return std::pair(pinned, permitted);
  };
  const Topology topology = ThisTopology();
  const int on_first = static_cast<int>(topology.nodes[0].cpus.size());
  const auto [pinned, permitted] = places(1, on_first);
  CHECK(std::set<int>(pinned.begin(), pinned.end()).size() == pinned.size());
  CHECK(permitted == std::vector<int>(on_first, 1));
  const auto [free, node_wide] = places(1, on_first + 1);
  CHECK(free == std::vector<int>(on_first + 1, -1));
  CHECK(node_wide == std::vector<int>(on_first + 1, on_first));
  CHECK(AllowedCpus().size() == static_cast<size_t>(cpus));  // the caller stays free

  // Two nodes, pretended: sub-pools go round them, each on its node's CPU.
  if (cpus >= 2) {
    Topology fake;
    for (int i : {0, 1}) {
      NumaNode node;
      node.id = i;
      node.cpus = {allowed[i]};
      node.physical_cores = 1;
      fake.nodes.push_back(node);
    }
    WorkerPool pool({.subpool_count = 2, .max_threads_per_subpool = 1}, fake);
    CHECK(pool.NumaNodeOf(0) == 0 && pool.NumaNodeOf(1) == 1);
    std::vector<int> at(2);
    pool.Run([&](Worker& worker) { at[worker.index()] = sched_getcpu(); });
    CHECK(at == std::vector<int>({allowed[0], allowed[1]}));
    WorkerPool three({.subpool_count = 3, .max_threads_per_subpool = 1}, fake);
    CHECK(three.NumaNodeOf(2) == 0);
  }
}

void TestExceptions() {
  WorkerPool pool({.subpool_count = 2, .max_threads_per_subpool = 2});
  for (int thrower = 0; thrower < 4; ++thrower) {
    std::atomic<int> told{0};
    const std::string message = MessageOf<std::runtime_error>([&] {
      pool.Run([&](Worker& worker) {
        for (int round = 0; round < 5; ++round) {
          if (!worker.Barrier()) {
            ++told;
            // Once failed, always failed.
            CHECK(!worker.Barrier());
            return;
          }
          if (round == 3 && worker.index() == thrower) {
            throw std::runtime_error("worker " + std::to_string(thrower));
          }
        }
      });
    });
    CHECK(message == "worker " + std::to_string(thrower));
    CHECK(told == 3);
    // The pool works again, barriers included.
    std::atomic<int> passed_barrier{0};
    pool.Run([&](Worker& worker) { passed_barrier += worker.Barrier(); });
    CHECK(passed_barrier == 4);
  }
  // All throw: the first by index wins, and what is thrown may be anything.
  CHECK(MessageOf<std::runtime_error>([&] {
          pool.Run([](Worker& worker) {
            throw std::runtime_error(std::to_string(worker.index()));
          });
        }) == "0");
  bool caught = false;
  try {
    pool.Run([](Worker& worker) {
      if (worker.index() == 1) throw 7;
    });
  } catch (int value) {
    caught = value == 7;
  }
  CHECK(caught);
}

void TestMisuse() {
  for (const WorkerPoolConfig& bad :
       {WorkerPoolConfig{0, 1}, WorkerPoolConfig{1, 0}, WorkerPoolConfig{-1, -1},
        WorkerPoolConfig{1, 257}, WorkerPoolConfig{129, 2}}) {
    CHECK(Has(MessageOf<std::invalid_argument>([&] { WorkerPool pool(bad); }),
              "must be 1..256, got"));
  }
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  CHECK(Has(MessageOf<std::logic_error>(
                [&] { pool.Run([&](Worker&) { pool.Run([](Worker&) {}); }); }),
            "called by a worker"));
  for (size_t absurd : {size_t{1} << 60, SIZE_MAX}) {
    CHECK(Has(MessageOf<std::bad_alloc>(
                  [&] { pool.Run([=](Worker& worker) { worker.Scratch(absurd); }); }),
              "cannot allocate"));
  }
}

void TestScratch() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 3});
  std::vector<void*> first(3), second(3), grown(3);
  pool.Run([&](Worker& worker) {
    first[worker.index()] = worker.Scratch(1 << 20);
    std::memset(first[worker.index()], worker.index(), 1 << 20);
  });
  pool.Run([&](Worker& worker) {
    second[worker.index()] = worker.Scratch(1 << 19);
    CHECK(static_cast<char*>(second[worker.index()])[1234] == worker.index());
    grown[worker.index()] = worker.Scratch(3 << 20);
    std::memset(grown[worker.index()], 1, 3 << 20);
    CHECK(worker.Scratch(3 << 20) == grown[worker.index()]);
  });
  CHECK(first == second);
  CHECK(std::set<void*>(first.begin(), first.end()).size() == 3);
  for (void* data : grown) CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0);
}

void TestManyCallers() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  std::atomic<int> running{0};
  std::atomic<int> overlaps{0};
  std::atomic<int> runs{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] {
      for (int n = 0; n < 200; ++n) {
        // Jobs of two callers never overlap: `running` counts the workers of one job.
        const std::string message = MessageOf<std::runtime_error>([&] {
          pool.Run([&](Worker& worker) {
            if (running.fetch_add(1) >= worker.count()) ++overlaps;
            const bool ok = worker.Barrier();
            running.fetch_sub(1);
            if (ok && worker.Barrier() && i != 0) ++runs;
            if (i == 0) throw std::runtime_error("caller 0");
          });
        });
        // An error reaches its own caller and nobody else.
        if ((message == "caller 0") != (i == 0)) ++overlaps;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(overlaps == 0);
  CHECK(runs == 3 * 200 * 2);
}

void TestParking() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  std::atomic<int> runs{0};
  for (int i = 0; i < 20; ++i) {
    pool.Run([&](Worker&) { ++runs; });
    // Around the time that workers go to sleep, before and after it.
    std::this_thread::sleep_for(std::chrono::microseconds(i * 10));
  }
  CHECK(runs == 40);
  // A worker that waits long for another at a barrier sleeps and wakes again.
  std::atomic<int> through{0};
  pool.Run([&](Worker& worker) {
    if (worker.index() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    through += worker.Barrier();
  });
  CHECK(through == 2);
  // An idle pool uses no CPU time.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK(double(std::clock() - before) / CLOCKS_PER_SEC < 0.02);
}

void TestDenormals() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  std::vector<unsigned> control(2);
  // Worker 0 is this thread: it computes as the other does, and is then as before.
  const unsigned before = _mm_getcsr();
  constexpr unsigned kUpward = 0x4000;
  _mm_setcsr(before | kUpward);
  pool.Run([&](Worker& worker) { control[worker.index()] = _mm_getcsr() & ~0x3fu; });
  CHECK((_mm_getcsr() & ~0x3fu) == ((before | kUpward) & ~0x3fu));
  _mm_setcsr(before);
  CHECK(control == std::vector<unsigned>(2, 0x9fc0));
}

void TestTaskCounter() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 3});
  constexpr int kTasks = 1000;
  TaskCounter counter;
  std::vector<std::atomic<int>> done(kTasks);
  for (int repeat = 0; repeat < 3; ++repeat) {
    counter.Reset();
    pool.Run([&](Worker&) {
      for (int64_t t = counter.Claim(); t < kTasks; t = counter.Claim()) ++done[t];
    });
  }
  int wrong = 0;
  for (const auto& times : done) wrong += times != 3;
  CHECK(wrong == 0);
}

// ---- pool/cpu_infer ----

void TestCpuInfer() {
  CpuInfer queue;
  std::vector<int> order;
  for (int i = 0; i < 99; ++i) queue.Submit([&order, i] { order.push_back(i); });
  queue.Submit([&order] { order.push_back(99); }).Wait();
  CHECK(order == Range(100));

  // Waiting for one call does not wait for a later one.
  std::promise<void> gate;
  const PendingCall early = queue.Submit([] {});
  const PendingCall late = queue.Submit([&] { gate.get_future().wait(); });
  early.Wait();
  CHECK(early.Done() && !late.Done());
  gate.set_value();
  late.Wait();
  CHECK(late.Done());

  // An error belongs to its call, for everybody who waits for it.
  const PendingCall first = queue.Submit([] { throw std::runtime_error("first"); });
  const PendingCall second = queue.Submit([] { throw std::runtime_error("second"); });
  bool later = false;
  queue.Submit([&] { later = true; }).Wait();
  CHECK(later);
  for (int i = 0; i < 2; ++i) {
    CHECK(MessageOf<std::runtime_error>([&] { second.Wait(); }) == "second");
    CHECK(MessageOf<std::runtime_error>([&] { first.Wait(); }) == "first");
  }

  std::promise<PendingCall> self;
  const PendingCall waits = queue.Submit([&] { self.get_future().get().Wait(); });
  self.set_value(waits);
  CHECK(Has(MessageOf<std::logic_error>([&] { waits.Wait(); }), "wait for itself"));

  // What a call holds is gone before its waiters go on.
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> observer = held;
  queue.Submit([held = std::move(held)] {}).Wait();
  CHECK(observer.expired());

  std::atomic<int> drained{0};
  {
    CpuInfer draining;
    for (int i = 0; i < 50; ++i) draining.Submit([&] { ++drained; });
  }
  CHECK(drained == 50);

  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  std::atomic<int> workers{0};
  queue.Submit([&] { pool.Run([&](Worker&) { ++workers; }); }).Wait();
  CHECK(workers == 2);
}

// ---- pool/peak ----

void TestPeaks() {
  WorkerPool pool({.subpool_count = 1, .max_threads_per_subpool = 2});
  for (double bad : {0.0, -1.0, std::nan("")}) {
    CHECK(Has(MessageOf<std::invalid_argument>([&] { MeasurePeaks(pool, bad); }),
              "seconds must be positive"));
  }
  // What this CPU has, then ever less of it, so that every loop that it can run is run.
  const CpuFeatures full = ThisCpu();
  CpuFeatures no_dots = full;
  no_dots.avx512_bf16 = no_dots.avx512_vnni = false;
  CpuFeatures no_zmm = no_dots;
  no_zmm.avx512f = false;
  std::set<std::string> instructions;
  for (const CpuFeatures& cpu : {full, no_dots, no_zmm, CpuFeatures()}) {
    const Peaks peaks = MeasurePeaks(pool, 0.01, cpu);
    // From a slow emulator to ten thousand tile units: catches a wrong unit or count.
    for (double figure : {peaks.bf16_gflops, peaks.int8_gops, peaks.f32_gflops}) {
      CHECK(figure > 0.1 && figure < 1e7);
    }
    CHECK(peaks.dram_read_gbs > 0.1 && peaks.dram_read_gbs < 1e5);
    instructions.insert(peaks.f32_instruction);
  }
  const bool zmm = MissingFeatures(Isa::kAvx512, full).empty();
  const bool ymm = MissingFeatures(Isa::kAvx2, full).empty();
  CHECK(instructions.count("mulps + addps xmm") == 1);
  CHECK(instructions.count("vfmadd231ps ymm") == ymm);
  CHECK(instructions.count("vfmadd231ps zmm") == zmm);
}

// ---- fork ----

void TestFork() {
  auto pool = std::make_unique<WorkerPool>(
      WorkerPoolConfig{.subpool_count = 1, .max_threads_per_subpool = 2});
  auto queue = std::make_unique<CpuInfer>();
  // Once it has run something, its thread is past its start and allocates no more: the
  // allocators of sanitizers do not survive a fork in the middle of an allocation.
  const PendingCall done = queue->Submit([] {});
  done.Wait();
  std::promise<void> gate;
  const PendingCall waiting = queue->Submit([&] { gate.get_future().wait(); });
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);  // a hang ends here
    const bool run = Has(
        MessageOf<std::runtime_error>([&] { pool->Run([](Worker&) {}); }), "forked");
    const bool submit =
        Has(MessageOf<std::runtime_error>([&] { queue->Submit([] {}); }), "forked");
    const bool wait =
        Has(MessageOf<std::runtime_error>([&] { waiting.Wait(); }), "forked");
    done.Wait();
    pool.reset();
    queue.reset();
    // The child can have a pool of its own.
    std::atomic<int> ran{0};
    WorkerPool own({.subpool_count = 1, .max_threads_per_subpool = 2});
    own.Run([&](Worker&) { ++ran; });
    _exit(run && submit && wait && ran == 2 ? 0 : 1);
  }
  gate.set_value();
  waiting.Wait();
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  std::atomic<int> ran{0};
  pool->Run([&](Worker&) { ++ran; });
  CHECK(ran == 2);
}

}  // namespace
}  // namespace ktjax

int main() {
  using namespace ktjax;
  TestFork();  // first, as forking is simplest with few threads about
  TestIsa();
  TestAligned();
  TestTopology();
  TestIndices();
  TestPlacement();
  for (int threads : {1, 2, 3, 8}) TestBarrier(1, threads, threads <= 2 ? 10000 : 2000);
  TestBarrier(2, 1, 2000);
  TestBarrier(2, 2, 500);
  TestBarrier(3, 2, 500);
  TestExceptions();
  TestMisuse();
  TestScratch();
  TestManyCallers();
  TestParking();
  TestDenormals();
  TestTaskCounter();
  TestCpuInfer();
  TestPeaks();
  std::printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed == 0 ? 0 : 1;
}
