#include "moe/store.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "base/bf16.h"

namespace ktjax {
namespace {

// Packs rows `first ..` of one expert's matrix [outputs, depth] as strips of a panel.
void PackStrips(const Kernels& kernels, const void* matrix, bool is_float32,
                int64_t stride, int64_t offset, int outputs, int depth, int strips,
                bf16* dst, ptrdiff_t dst_stride) {
  outputs = std::max(outputs, 0);
  if (is_float32) {
    const Rows<float> rows{static_cast<const float*>(matrix) + offset, stride};
    kernels.pack_outputs_f32(rows, outputs, depth, strips, dst, dst_stride);
  } else {
    const Rows<bf16> rows{static_cast<const bf16*>(matrix) + offset, stride};
    kernels.pack_outputs_bf16(rows, outputs, depth, strips, dst, dst_stride);
  }
}

}  // namespace

ExpertStore::ExpertStore(std::shared_ptr<Backend> backend, const Geometry& geometry)
    : backend_(std::move(backend)), geometry_(geometry) {
  const int count = backend_->pool.config().subpool_count;
  const int units = geometry_.intermediate_padded() / kDepth;
  if (units < count) {
    throw std::invalid_argument(
        "an intermediate size of " + std::to_string(geometry_.intermediate) +
        " cannot be split over " + std::to_string(count) +
        " sub-pools in slices of 32; use at most " + std::to_string(units));
  }
  for (int s = 0; s < count; ++s) {
    const int begin = units * s / count, end = units * (s + 1) / count;
    shards_.push_back({begin * kDepth, (end - begin) * kDepth});
    memory_.emplace_back(sizeof(bf16) * geometry_.experts * BlockSize(s),
                         backend_->pool.NumaNodeOf(s));
  }
}

size_t ExpertStore::bytes() const {
  size_t total = 0;
  for (const AlignedBuffer& buffer : memory_) total += buffer.size();
  return total;
}

void ExpertStore::PackExpert(const SourceWeights& source, int shard, int expert) {
  const Kernels& kernels = backend_->kernels;
  const auto [begin, width] = shards_[shard];
  const int64_t hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int depth = std::min<int>(width, geometry_.intermediate - begin);
  auto at = [](const bf16* p) { return const_cast<bf16*>(p); };

  for (int column = 0; column < width; column += kStrip) {
    bf16* panel = at(GateUpPanel(shard, expert, column / (2 * kStrip)));
    bf16* pair = panel + column % (2 * kStrip) / kStrip * (4 * kStrip);
    const int64_t row = expert * intermediate + begin + column;
    const int outputs = std::min(kStrip, depth - column);
    PackStrips(kernels, source.gate, source.is_float32, hidden, row * hidden, outputs,
               geometry_.hidden, 1, pair, 2 * kPanel);
    PackStrips(kernels, source.up, source.is_float32, hidden, row * hidden, outputs,
               geometry_.hidden, 1, pair + 2 * kStrip, 2 * kPanel);
  }
  for (int panel = 0; panel * kPanel < geometry_.hidden_padded(); ++panel) {
    const int strips = DownStrips(panel);
    const int64_t row = expert * hidden + panel * kPanel;
    PackStrips(kernels, source.down, source.is_float32, intermediate,
               row * intermediate + begin,
               std::min(strips * kStrip, geometry_.hidden - panel * kPanel), depth,
               strips, at(DownPanel(shard, expert, panel)), 2 * kStrip * strips);
  }
}

void ExpertStore::Pack(const SourceWeights& source) {
  std::vector<std::atomic<int>> next(shards_.size());
  backend_->pool.Run([&](Worker& worker) {
    const int shard = worker.subpool();
    for (int e; (e = next[shard].fetch_add(1)) < geometry_.experts;) {
      PackExpert(source, shard, e);
    }
  });
}

void ExpertStore::Dequantize(float* gate, float* up, float* down) const {
  const int hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  for (size_t s = 0; s < shards_.size(); ++s) {
    const auto [begin, width] = shards_[s];
    const int end = std::min(begin + width, intermediate);
    for (int e = 0; e < geometry_.experts; ++e) {
      for (int i = begin; i < end; ++i) {
        const int column = i - begin, strip = column / kStrip;
        const bf16* panel = GateUpPanel(s, e, strip / 2);
        const int n = strip % 2 * 2 * kStrip + column % kStrip;
        const int64_t row = (static_cast<int64_t>(e) * intermediate + i) * hidden;
        for (int d = 0; d < hidden; ++d) {
          const bf16* pair = panel + static_cast<int64_t>(d / 2) * 2 * kPanel + d % 2;
          gate[row + d] = FromBf16(pair[2 * n]);
          up[row + d] = FromBf16(pair[2 * (n + kStrip)]);
        }
      }
      for (int h = 0; h < hidden; ++h) {
        const int panel = h / kPanel;
        const int64_t stride = 2ll * kStrip * DownStrips(panel);
        const bf16* base = DownPanel(s, e, panel) + 2 * (h % kPanel);
        const int64_t row = (static_cast<int64_t>(e) * hidden + h) * intermediate;
        for (int i = begin; i < end; ++i) {
          const int d = i - begin;
          down[row + i] = FromBf16(base[d / 2 * stride + d % 2]);
        }
      }
    }
  }
}

}  // namespace ktjax
