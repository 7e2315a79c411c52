// How the work of a layer is cut into tasks. Results never depend on the cut.
#ifndef KTJAX_FFI_MOE_SCHEDULE_H_
#define KTJAX_FFI_MOE_SCHEDULE_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "moe/routing.h"
#include "moe/store.h"
#include "pool/task_counter.h"

namespace ktjax {

// Rows [begin, begin + count) of one expert: what a thread packs at a time.
struct RowBlock {
  int expert;
  int begin;
  int count;
};

// A row block times the panels [first_panel, last_panel).
struct BlockTask {
  RowBlock rows;
  int first_panel;
  int last_panel;
};

// All rows of a group whose tokens are in [first_token, last_token), times panels. One
// task owns these outputs and adds the experts in order: no atomics, no reduction, and
// the same sum for any number of threads.
struct OutputTask {
  int first_panel;
  int last_panel;
  int first_token;
  int last_token;
};

// Consecutive experts whose intermediate values fit the cache and the memory budget,
// to an expert.
struct Group {
  int first_expert;
  int last_expert;
  int first_row;
  int last_row;
  std::vector<RowBlock> blocks;
  std::vector<int> active;  // the experts that have rows
  int rows() const { return last_row - first_row; }
};

// Bytes of one intermediate array (h, dg or du) of a group. 8 MiB stay in a server's L3
// and have rows enough to fill threads. A pass that computes gate and up again holds
// five such arrays to save memory, so it takes less of each.
inline constexpr int64_t kGroupBytes = 8ll << 20;
inline constexpr int64_t kSmallGroupBytes = 2ll << 20;
// A forward that keeps nothing is either a small one or one that saves memory.
inline constexpr int64_t kForwardGroupBytes = 4ll << 20;

// Rows that are multiplied with a panel at a time, at most.
inline constexpr int kMaxBlockRows = 512;
// Rows of `width` values that a thread packs at a time.
int BlockRows(int width);

// Appends `rows` rows of an expert from row `first` on, in equal blocks of at most
// `block_rows`.
void AppendBlocks(int expert, int first, int rows, int block_rows,
                  std::vector<RowBlock>& blocks);

std::vector<Group> MakeGroups(const Routing& routing, const Geometry& geometry,
                              int64_t group_bytes);

inline constexpr int kTasksPerThread = 6;

// `panels` panels for every block, cut along panels until there is work for `threads`.
std::vector<BlockTask> MakeBlockTasks(std::span<const RowBlock> blocks, int panels,
                                      int threads,
                                      int tasks_per_thread = kTasksPerThread);

// Whether every task has all `panels` panels of its rows.
bool AreWhole(std::span<const BlockTask> tasks, int panels);

std::vector<OutputTask> MakeOutputTasks(int64_t tokens, int panels, int threads);

// The rows of `expert` whose tokens are in [first, last).
RowBlock RowsOfTokens(const Routing& routing, int expert, int first, int last);

// What is left for a worker of a phase's tasks.
template <typename Task>
class TaskQueue {
 public:
  TaskQueue(TaskCounter& counter, std::span<const Task> tasks)
      : counter_(counter), tasks_(tasks) {}

  // This worker's next task, from now on; null when there is none. For its first
  // operands to be fetched near the end of the task before, or of the phase before: too
  // early a call takes work from those who have none.
  const Task* Peek() {
    if (!next_) {
      const size_t i = counter_.Claim();
      next_ = i < tasks_.size() ? &tasks_[i] : nullptr;
    }
    return *next_;
  }
  const Task* Take() {
    const Task* task = Peek();
    next_.reset();
    return task;
  }

 private:
  TaskCounter& counter_;
  std::span<const Task> tasks_;
  std::optional<const Task*> next_;
};

// Every phase of a job takes its tasks from a counter of its own.
class Counters {
 public:
  explicit Counters(int count) : counters_(new TaskCounter[count]) {}
  // Calls f(i) for the tasks that no other worker has taken.
  template <typename F>
  void ForEach(int counter, int64_t tasks, F f) {
    for (int64_t i; (i = counters_[counter].Claim()) < tasks;) f(i);
  }
  template <typename Task>
  TaskQueue<Task> Queue(int counter, const std::vector<Task>& tasks) {
    return {counters_[counter], tasks};
  }

 private:
  std::unique_ptr<TaskCounter[]> counters_;
};

// Calls f(first_row, rows) for equal tiles of at most max_rows, in steps of row_step.
template <typename F>
void ForTiles(const Kernels& kernels, int rows, F f) {
  const int steps = static_cast<int>(CeilDiv(rows, kernels.row_step));
  int tiles = static_cast<int>(CeilDiv(rows, kernels.max_rows));
  int step = 0;
  for (; tiles > 0; --tiles) {
    const int count = static_cast<int>(CeilDiv(steps - step, tiles));
    const int first = step * kernels.row_step;
    f(first, std::min(count * kernels.row_step, rows - first));
    step += count;
  }
}

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_SCHEDULE_H_
