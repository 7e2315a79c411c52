#include "linear/pass.h"

#include <algorithm>
#include <cstring>

namespace ktjax {
namespace {

// Rows whose low-rank values are computed at a time: the tile is 32 KiB then.
constexpr int kLowRankRows = 128;
constexpr int kLeastRows = 32;

}  // namespace

LinearPass::LinearPass(const LinearStore& store, int64_t rows, int width, bool exact,
                       const LinearLoRA& lora, int phases)
    : Products(store, exact),
      store_(store),
      rows_(static_cast<int>(rows)),
      lora_(lora),
      low_rank_width_(static_cast<int>(RoundUp(lora.rank, kDepth))),
      counters_(std::make_unique<Counters>(phases * slice_count())) {
  const auto share = [&](int threads, int least, int most) {
    const int64_t rows_of_task =
        RoundUp(CeilDiv(rows, kPackingTasksPerThread * threads), kDepth);
    return static_cast<int>(std::clamp<int64_t>(rows_of_task, least, most));
  };
  AppendBlocks(0, 0, rows_,
               share(backend_.pool.thread_count(), kLeastRows, kLowRankRows),
               low_rank_blocks_);
  int block_rows = kMaxBlockRows;
  if (Packs(width)) {
    tasks_per_thread_ = kPackingTasksPerThread;
    block_rows = share(backend_.pool.config().max_threads_per_subpool, kLeastRows,
                       BlockRows(std::min(width, kChunk)));
  }
  AppendBlocks(0, 0, rows_, block_rows, blocks_);
}

std::vector<BlockTask> LinearPass::MakeTasks(int panels) const {
  if (panels == 0) return {};
  return MakeBlockTasks(blocks_, panels, backend_.pool.config().max_threads_per_subpool,
                        tasks_per_thread_);
}

Scratch LinearPass::MakeScratch(Arena& arena) const {
  const size_t parts = exact() ? 2 : 1;
  // Rows are packed whole in the forward, a chunk at a time elsewhere.
  const ptrdiff_t stride = std::max(store_.inputs_padded(), kChunk) + kDepth;
  const size_t panel_depth = std::max(
      {store_.inputs_padded(), kLowRankDepth, kMaxGradDepth, kSourcePanels * kPanel});
  size_t block_rows = 1;
  for (const auto* blocks : {&blocks_, &low_rank_blocks_}) {
    for (const RowBlock& block : *blocks) {
      block_rows = std::max<size_t>(block_rows, block.count);
    }
  }
  const size_t rank_padded = RoundUp(std::max(rank(), 1), kDepth);
  const int64_t tile_rows =
      std::max<int64_t>(RoundUp(std::max(rank(), 1), kernels_.max_rows),
                        std::max(kTransposedRows, kLowRankRows));
  Scratch scratch{};
  scratch.rows = {arena.Take<bf16>(parts * stride * block_rows),
                  static_cast<ptrdiff_t>(parts) * stride, exact() ? stride : 0};
  scratch.chunk = arena.Take<bf16>(store_.quantised() ? kPanel * 2 * kChunkPairs : 0);
  scratch.panel = {arena.Take<bf16>(kPanel * panel_depth),
                   arena.Take<bf16>(exact() ? kPanel * panel_depth : 0)};
  scratch.lora_panel[0] = {
      arena.Take<bf16>(kPanel * rank_padded),
      arena.Take<bf16>(LoRAInTwoParts() ? kPanel * rank_padded : 0)};
  scratch.tile = arena.Take<float>(kPanel * tile_rows);
  scratch.sums = arena.Take<float>(store_.inputs_padded());
  return scratch;
}

SplitRows LinearPass::RowsOf(ConstArray array, int width, const RowBlock& block,
                             int first, int depth, const Scratch& scratch) const {
  const int64_t offset = int64_t{block.begin} * width + first;
  if (!Packs(width)) {
    // Kernels do not write to their operands.
    return {const_cast<bf16*>(static_cast<const bf16*>(array.data)) + offset, width, 0};
  }
  const WorkTimer timer(scratch.times, &WorkTimes::gather);
  const SplitRows rows = scratch.rows;
  const size_t padding = sizeof(bf16) * (RoundUp(depth, kDepth) - depth);
  for (int r = 0; r < block.count; ++r) {
    bf16* row = rows.high + r * rows.stride;
    const int64_t at = offset + int64_t{r} * width;
    if (array.is_float32) {
      const float* src = static_cast<const float*>(array.data) + at;
      kernels_.to_bf16(src, row, depth);
      kernels_.to_bf16_low(src, row + rows.low, depth);
      std::memset(row + rows.low + depth, 0, padding);
    } else {
      std::memcpy(row, static_cast<const bf16*>(array.data) + at, sizeof(bf16) * depth);
    }
    std::memset(row + depth, 0, padding);
  }
  return rows;
}

LinearPass::LowRankValues LinearPass::MakeLowRank(int index, bool transposed) const {
  Workspace& workspace = backend_.workspace;
  const size_t rows = std::max(rows_, 1);
  LowRankValues values;
  values.rows =
      workspace.Get<bf16>(Workspace::kLowRank, index, 2 * rows * low_rank_width_);
  if (transposed) {
    values.transposed = workspace.Get<bf16>(Workspace::kTransposedLowRank, index,
                                            2 * rank() * TransposedStride());
  }
  return values;
}

void LinearPass::LowRank(ConstArray array, int width, Factor factor,
                         const RowBlock& block, const LowRankValues& values,
                         const Scratch& scratch) const {
  const SplitPanel panel{scratch.panel.high,
                         LoRAInTwoParts() ? scratch.panel.low : nullptr};
  const SplitRows out = LowRankRows(values, block.begin);
  for (int vector = 0; vector < rank(); vector += kPanel) {
    const int vectors = std::min(kPanel, rank() - vector);
    const int strips = static_cast<int>(CeilDiv(vectors, kStrip));
    const ptrdiff_t stride = 2 * kStrip * strips;
    for (int from = 0; from < width; from += kLowRankDepth) {
      const int depth = std::min(kLowRankDepth, width - from);
      const SplitRows rows = RowsOf(array, width, block, from, depth, scratch);
      {
        const WorkTimer timer(scratch.times, &WorkTimes::adapters);
        if (factor == Factor::kA) {
          MatrixA().PackOutputs(kernels_, 0, vector, vectors, from, depth, strips,
                                panel, stride);
        } else {
          MatrixB().PackDepths(kernels_, 0, from, depth, vector, vectors, strips, panel,
                               stride);
        }
      }
      Terms terms;
      terms.Add(rows, panel, static_cast<int>(RoundUp(depth, 2)));
      ForTiles(kernels_, block.count, [&](int first, int count) {
        const Terms tile_terms = terms.From(first);
        kernels_.gemm(tile_terms.data(), tile_terms.count(), count, strips,
                      scratch.tile + first * kPanel, from > 0, nullptr);
      });
    }
    const bool last = vector + kPanel >= rank();
    SplitRows dst = out;
    dst.high += vector;
    epilogues_.store_split(scratch.tile, block.count, vectors,
                           last ? low_rank_width_ - vector : kPanel, lora_.scaling,
                           dst);
  }
  if (!values.transposed) return;
  const SplitRows columns = TransposedRows(values);
  const bool last = block.begin + block.count == rows_;
  for (int part = 0; part < 2; ++part) {
    for (int i = 0; i < rank(); ++i) {
      const bf16* src = out.high + part * out.low + i;
      bf16* dst = columns.high + part * columns.low + i * columns.stride + block.begin;
      for (int r = 0; r < block.count; ++r) dst[r] = src[r * out.stride];
      if (last) {
        std::fill(dst + block.count, dst + columns.stride - block.begin, bf16{0});
      }
    }
  }
}

}  // namespace ktjax
