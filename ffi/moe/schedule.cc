#include "moe/schedule.h"

namespace ktjax {
namespace {

constexpr int64_t kMinGroupRows = 1024;

// Of rows that a thread packs at a time. They pass L2 once per panel (one byte a
// cycle), so the bound is for scratch and for balance rather than for cache.
constexpr int64_t kBlockBytes = 2ll << 20;
constexpr int kMinBlockRows = 32;

// Streaming a panel from memory costs about as much as computing this many rows with
// it.
constexpr int64_t kPanelCostInRows = 16;
// Output tasks are all alike, and each of them reads every row of the group: the fewer
// the better. Of few tokens that is nothing.
constexpr int kOutputTasksPerThread = 2;
constexpr int kSmallOutputTasksPerThread = 4;
constexpr int kMinTokensPerTask = 64;

}  // namespace

int BlockRows(int width) {
  return static_cast<int>(
      std::clamp<int64_t>(kBlockBytes / (sizeof(bf16) * RoundUp(width, kDepth)),
                          kMinBlockRows, kMaxBlockRows));
}

void AppendBlocks(int expert, int first, int rows, int block_rows,
                  std::vector<RowBlock>& blocks) {
  int done = 0;
  for (int64_t left = CeilDiv(rows, block_rows); left > 0; --left) {
    const int count = static_cast<int>(CeilDiv(rows - done, left));
    blocks.push_back({expert, first + done, count});
    done += count;
  }
}

std::vector<Group> MakeGroups(const Routing& routing, const Geometry& geometry,
                              int64_t group_bytes) {
  const int64_t row_bytes = sizeof(bf16) * geometry.intermediate_padded();
  const int64_t limit = std::max(kMinGroupRows, group_bytes / row_bytes);
  const int block_rows = BlockRows(geometry.hidden);
  // As few groups as the budget allows, of equal shares of the rows: a small one that
  // is left over would have all the barriers and little to do between them. An expert
  // belongs to the share that the middle of its rows is in.
  const int64_t rows_of_all = std::max<int64_t>(routing.rows(), 1);
  const int64_t shares = CeilDiv(rows_of_all, limit);
  int64_t last_share = -1;
  std::vector<Group> groups;
  for (int e = 0; e < geometry.experts; ++e) {
    const int rows = routing.rows_of(e);
    const int64_t middle = 2 * int64_t{routing.offsets[e]} + rows;  // in half rows
    const int64_t share = std::min(middle * shares / (2 * rows_of_all), shares - 1);
    if (share != last_share) {
      groups.push_back({e, e, routing.offsets[e], routing.offsets[e], {}, {}});
      last_share = share;
    }
    Group& group = groups.back();
    group.last_expert = e + 1;
    group.last_row += rows;
    if (rows > 0) group.active.push_back(e);
    AppendBlocks(e, routing.offsets[e], rows, block_rows, group.blocks);
  }
  return groups;
}

std::vector<BlockTask> MakeBlockTasks(std::span<const RowBlock> blocks, int panels,
                                      int threads, int tasks_per_thread) {
  int64_t total = 0;
  for (const RowBlock& block : blocks) {
    total += (block.count + kPanelCostInRows) * panels;
  }
  const int64_t share = std::max<int64_t>(1, total / (threads * tasks_per_thread));
  std::vector<BlockTask> tasks;
  for (const RowBlock& block : blocks) {
    const int64_t cost = (block.count + kPanelCostInRows) * panels;
    const int parts =
        static_cast<int>(std::clamp<int64_t>(CeilDiv(cost, share), 1, panels));
    for (int part = 0; part < parts; ++part) {
      tasks.push_back({block, panels * part / parts, panels * (part + 1) / parts});
    }
  }
  return tasks;
}

bool AreWhole(std::span<const BlockTask> tasks, int panels) {
  return std::ranges::all_of(tasks, [panels](const BlockTask& task) {
    return task.last_panel - task.first_panel == panels;
  });
}

std::vector<OutputTask> MakeOutputTasks(int64_t tokens, int panels, int threads) {
  const int wanted = threads * (tokens < kMinTokensPerTask ? kSmallOutputTasksPerThread
                                                           : kOutputTasksPerThread);
  const int columns = std::min(panels, wanted);
  const int64_t slices = std::clamp<int64_t>(
      wanted / columns, 1, std::max<int64_t>(1, tokens / kMinTokensPerTask));
  // The wider ones come first, so that threads end together.
  std::vector<OutputTask> tasks;
  const int least = panels / columns, wider = panels % columns;
  for (int c = 0, panel = 0; c < columns; ++c) {
    const int first = panel;
    panel += least + (c < wider);
    for (int64_t s = 0; s < slices; ++s) {
      tasks.push_back({first, panel, static_cast<int>(tokens * s / slices),
                       static_cast<int>(tokens * (s + 1) / slices)});
    }
  }
  return tasks;
}

RowBlock RowsOfTokens(const Routing& routing, int expert, int first, int last) {
  const auto begin = routing.tokens.begin() + routing.offsets[expert];
  const auto end = routing.tokens.begin() + routing.offsets[expert + 1];
  const auto from = std::lower_bound(begin, end, first);
  const auto to = std::lower_bound(from, end, last);
  return {expert, static_cast<int>(from - routing.tokens.begin()),
          static_cast<int>(to - from)};
}

}  // namespace ktjax
