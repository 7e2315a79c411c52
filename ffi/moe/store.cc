#include "moe/store.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/bf16.h"

namespace ktjax {
namespace {

// The matrix [outputs, depth] of one expert in plain arrays.
PlainMatrix Plain(const Encoding& encoding, const SourceMatrix& source, int expert,
                  int outputs, int depth, const char* name, EncodedMatrix& encoded) {
  return PlainRows(encoding, source, int64_t{expert} * outputs,
                   expert * encoding.scale_rows(outputs), outputs, depth,
                   {name, expert, 0}, encoded);
}

BasePanelLayout GateUpLayout(const Encoding& gate, const Encoding& up, int depth) {
  return gate == up ? BasePanelLayout(gate, kPanelStrips, depth)
                    : BasePanelLayout(gate, up, kPanelStrips, depth);
}

// Whether codes are multiplied as integers with rows that are quantised for
// kInt8Group depths at a time.
bool HasIntegers(const Encoding& encoding) {
  const Code code = encoding.spec().code;
  return code == Code::kInt8 || code == Code::kInt4 || code == Code::kBlocks;
}

// To be packed.
uint8_t* Memory(const QuantPanel& panel) { return const_cast<uint8_t*>(panel.codes); }

}  // namespace

ExpertStore::ExpertStore(std::shared_ptr<Backend> backend, const Geometry& geometry,
                         const Encoding& encoding, const Encoding& up_encoding,
                         const Encoding& down_encoding)
    : BaseStore(std::move(backend), encoding),
      geometry_(geometry),
      up_encoding_(up_encoding),
      down_encoding_(down_encoding),
      gate_up_layout_(GateUpLayout(encoding, up_encoding, geometry.hidden_padded())),
      gate_up_stride_(gate_up_layout_.Stride()) {
  if (encoding != up_encoding &&
      (!encoding.spec().blocks || !up_encoding.spec().blocks)) {
    throw std::invalid_argument(
        std::string("gate in ") + encoding.spec().name + " and up in " +
        up_encoding.spec().name +
        " have no panel in common; different formats must be in GGUF's blocks");
  }
  CheckDepth(encoding, geometry.hidden, "gate");
  CheckDepth(up_encoding, geometry.hidden, "up");
  CheckDepth(down_encoding, geometry.intermediate, "down");
  const int count = backend_->pool.config().subpool_count;
  const int padded = geometry_.intermediate_padded();
  // Rows of h are quantised in groups, which should be the same for any number of
  // sub-pools.
  int unit = std::max(kDepth, down_encoding.group);
  if (HasIntegers(encoding) && CeilDiv(padded, kInt8Group) >= count) {
    unit = std::max(unit, kInt8Group);
  }
  const int units = static_cast<int>(CeilDiv(padded, unit));
  if (units < count) {
    throw std::invalid_argument(
        "an intermediate size of " + std::to_string(geometry_.intermediate) +
        " cannot be split over " + std::to_string(count) + " sub-pools in slices of " +
        std::to_string(unit) + "; use at most " + std::to_string(units));
  }
  for (int s = 0; s < count; ++s) {
    const int begin = units * s / count * unit;
    const int end = std::min(units * (s + 1) / count * unit, padded);
    shards_.push_back({begin, end - begin});
    const int width = end - begin, panels = DownPanels();
    const BasePanelLayout down(down_encoding, kPanelStrips, width);
    const int64_t gate_up_bytes = width / kDepth * gate_up_stride_;
    layouts_.push_back({down,
                        {down_encoding, DownStrips(panels - 1), width},
                        down.Stride(),
                        gate_up_bytes,
                        gate_up_bytes + panels * down.Stride()});
    memory_.emplace_back(geometry_.experts * layouts_.back().expert_bytes,
                         backend_->pool.NumaNodeOf(s));
  }
}

void ExpertStore::CheckIntegers() const {
  for (const Encoding* encoding : {&encoding_, &up_encoding_, &down_encoding_}) {
    if (HasIntegers(*encoding)) continue;
    throw std::invalid_argument(
        std::string("compute 'int8' needs weights with integer codes, and ") +
        encoding->spec().name + " has none; use compute 'bf16'");
  }
  // Rows of activations have the sums of one or of the other.
  const bool blocks = encoding_.spec().blocks;
  if (blocks != !!up_encoding_.spec().blocks ||
      blocks != !!down_encoding_.spec().blocks) {
    throw std::invalid_argument(
        "compute 'int8' needs gate, up and down all in formats of GGUF, or none; use "
        "compute 'bf16'");
  }
}

void ExpertStore::PackGateUpValues(const SourceWeights& source, int shard, int expert) {
  const Kernels& kernels = backend_->kernels;
  const auto [begin, width] = shards_[shard];
  const int64_t hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int depth = std::min<int>(width, geometry_.intermediate - begin);

  for (int column = 0; column < width; column += kStrip) {
    const BasePanel panel = GateUp(shard, expert, column / kDepth);
    bf16* pair =
        const_cast<bf16*>(panel.values) + column % (2 * kStrip) / kStrip * (4 * kStrip);
    const int64_t row = expert * intermediate + begin + column;
    const int outputs = std::min(kStrip, depth - column);
    PackStrips(kernels, source.gate, hidden, row * hidden, outputs, geometry_.hidden, 1,
               pair, 2 * kPanel);
    PackStrips(kernels, source.up, hidden, row * hidden, outputs, geometry_.hidden, 1,
               pair + 2 * kStrip, 2 * kPanel);
  }
}

void ExpertStore::PackDownValues(const SourceWeights& source, int shard, int expert) {
  const Kernels& kernels = backend_->kernels;
  const auto [begin, width] = shards_[shard];
  const int64_t hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int depth = std::min<int>(width, geometry_.intermediate - begin);
  for (int panel = 0; panel * kPanel < geometry_.hidden_padded(); ++panel) {
    const BasePanel down = Down(shard, expert, panel);
    const int strips = DownStrips(panel);
    const int64_t row = expert * hidden + panel * kPanel;
    PackStrips(kernels, source.down, intermediate, row * intermediate + begin,
               std::min(strips * kStrip, geometry_.hidden - panel * kPanel), depth,
               strips, const_cast<bf16*>(down.values), 2 * kStrip * strips);
  }
}

void ExpertStore::PackGateUpCodes(const SourceWeights& source, int shard, int expert,
                                  EncodedMatrix& encoded) {
  const auto [begin, width] = shards_[shard];
  const int hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int depth = std::min(width, intermediate - begin);

  // gate's strips are the even ones of a panel, up's the odd ones.
  const bool mixed = encoding_ != up_encoding_;
  const auto pack = [&](const Encoding& encoding, const SourceMatrix& matrix,
                        const char* name, int which) {
    const PanelLayout layout(encoding, mixed ? kPanelStrips / 2 : kPanelStrips,
                             geometry_.hidden_padded());
    const PlainMatrix plain =
        Plain(encoding, matrix, expert, intermediate, hidden, name, encoded);
    for (int column = 0; column < width; column += kStrip) {
      const BasePanel panel = GateUp(shard, expert, column / kDepth);
      const int strip = column % kDepth / kStrip;
      PackStrip(layout, plain, begin + column, std::clamp(depth - column, 0, kStrip), 0,
                hidden, mixed ? strip : 2 * strip + which,
                Memory(mixed && which ? *panel.odd : panel.codes));
    }
  };
  pack(encoding_, source.gate, "gate", 0);
  pack(up_encoding_, source.up, "up", 1);
}

void ExpertStore::PackDownCodes(const SourceWeights& source, int shard, int expert,
                                EncodedMatrix& encoded) {
  const auto [begin, width] = shards_[shard];
  const int hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  const int depth = std::min(width, intermediate - begin);
  const PlainMatrix plain =
      Plain(down_encoding_, source.down, expert, hidden, intermediate, "down", encoded);
  for (int panel = 0; panel * kPanel < geometry_.hidden_padded(); ++panel) {
    const PanelLayout layout(down_encoding_, DownStrips(panel), width);
    const BasePanel down = Down(shard, expert, panel);
    for (int strip = 0; strip < DownStrips(panel); ++strip) {
      const int output = panel * kPanel + strip * kStrip;
      PackStrip(layout, plain, output, std::clamp(hidden - output, 0, kStrip), begin,
                depth, strip, Memory(down.codes));
    }
  }
}

void ExpertStore::Pack(const SourceWeights& source) {
  std::vector<std::atomic<int>> next(shards_.size());
  backend_->pool.Run([&](Worker& worker) {
    const int shard = worker.subpool();
    EncodedMatrix encoded;
    for (int e; (e = next[shard].fetch_add(1)) < geometry_.experts;) {
      if (IsQuantised(encoding_)) {
        PackGateUpCodes(source, shard, e, encoded);
      } else {
        PackGateUpValues(source, shard, e);
      }
      if (IsQuantised(down_encoding_)) {
        PackDownCodes(source, shard, e, encoded);
      } else {
        PackDownValues(source, shard, e);
      }
    }
  });
}

void ExpertStore::Dequantize(float* gate, float* up, float* down) const {
  const int hidden = geometry_.hidden, intermediate = geometry_.intermediate;
  std::vector<std::atomic<int>> next(shards_.size());
  backend_->pool.Run([&](Worker& worker) {
    const int s = worker.subpool();
    const auto [begin, width] = shards_[s];
    const int end = std::min(begin + width, intermediate);
    std::vector<bf16> decoded(
        kPanel * static_cast<size_t>(std::max(geometry_.hidden_padded(), width)));
    auto values = [&](const BasePanel& panel, int depth) {
      if (panel.values) return panel.values;
      panel.Decode(backend_->kernels, 0, depth / 2, decoded.data(), nullptr);
      return static_cast<const bf16*>(decoded.data());
    };
    for (int e; (e = next[s].fetch_add(1)) < geometry_.experts;) {
      for (int i = begin; i < end;) {
        const int panel = (i - begin) / kDepth;
        const bf16* base = values(GateUp(s, e, panel), geometry_.hidden_padded());
        for (; i < end && (i - begin) / kDepth == panel; ++i) {
          const int column = i - begin;
          const int n = column % kDepth / kStrip * 2 * kStrip + column % kStrip;
          const int64_t row = (static_cast<int64_t>(e) * intermediate + i) * hidden;
          for (int d = 0; d < hidden; ++d) {
            const bf16* pair = base + static_cast<int64_t>(d / 2) * 2 * kPanel + d % 2;
            gate[row + d] = FromBf16(pair[2 * n]);
            up[row + d] = FromBf16(pair[2 * (n + kStrip)]);
          }
        }
      }
      for (int h = 0; h < hidden;) {
        const int panel = h / kPanel;
        const int64_t stride = 2ll * kStrip * DownStrips(panel);
        const bf16* base = values(Down(s, e, panel), width);
        for (; h < hidden && h / kPanel == panel; ++h) {
          const int64_t row = (static_cast<int64_t>(e) * hidden + h) * intermediate;
          for (int i = begin; i < end; ++i) {
            const int d = i - begin;
            down[row + i] = FromBf16(base[d / 2 * stride + 2 * (h % kPanel) + d % 2]);
          }
        }
      }
    }
  });
}

}  // namespace ktjax
