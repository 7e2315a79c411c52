#include "linear/store.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/bf16.h"

namespace ktjax {
namespace {

// Panels that are packed at a time, and that slices are made of: 128 outputs, which
// share scales where blocks of outputs do.
constexpr int kUnit = 2;

}  // namespace

LinearStore::LinearStore(std::shared_ptr<Backend> backend, int outputs, int inputs,
                         const Encoding& encoding)
    : BaseStore(std::move(backend), encoding),
      outputs_(outputs),
      inputs_(inputs),
      layout_(encoding, kPanelStrips, inputs_padded()),
      last_layout_(encoding, Strips(static_cast<int>(CeilDiv(outputs, kPanel)) - 1),
                   inputs_padded()),
      stride_(layout_.Stride()) {
  CheckDepth(encoding, inputs, "linear");
  const int count = backend_->pool.config().subpool_count;
  const int panels = static_cast<int>(CeilDiv(outputs, kPanel));
  const int units = static_cast<int>(CeilDiv(panels, kUnit));
  // Rounded up: the first slice always has a panel.
  const auto begin = [&](int s) {
    return std::min(static_cast<int>(CeilDiv(units * s, count)) * kUnit, panels);
  };
  for (int s = 0; s < count; ++s) {
    const Slice slice{begin(s), begin(s + 1)};
    slices_.push_back(slice);
    memory_.emplace_back(slice.count() * Stride(), backend_->pool.NumaNodeOf(s));
  }
}

void LinearStore::Pack(const SourceMatrix& source) {
  std::vector<std::atomic<int>> next(slices_.size());
  backend_->pool.Run([&](Worker& worker) {
    const int s = worker.subpool();
    const auto [begin, end] = slices_[s];
    EncodedMatrix encoded;
    for (int first; (first = begin + kUnit * next[s].fetch_add(1)) < end;) {
      PackPanels(source, s, first, std::min(first + kUnit, end), encoded);
    }
  });
}

// The panels [first, last), which are one unit.
void LinearStore::PackPanels(const SourceMatrix& source, int s, int first, int last,
                             EncodedMatrix& encoded) {
  const int64_t row = int64_t{first} * kPanel;
  if (!quantised()) {
    for (int panel = first; panel < last; ++panel) {
      const int strips = Strips(panel);
      const BasePanel base = Panel(s, panel);
      PackStrips(backend_->kernels, source, inputs_, int64_t{panel} * kPanel * inputs_,
                 Width(panel), inputs_, strips, const_cast<bf16*>(base.values),
                 2 * kStrip * strips);
    }
    return;
  }
  const int rows =
      static_cast<int>(std::min<int64_t>((last - first) * kPanel, outputs_ - row));
  const PlainMatrix plain =
      PlainRows(encoding_, source, row, row / encoding_.spec().block_outputs, rows,
                inputs_, {"linear", kNoExpert, row}, encoded);
  for (int panel = first; panel < last; ++panel) {
    const PanelLayout layout(encoding_, Strips(panel), inputs_padded());
    const BasePanel base = Panel(s, panel);
    for (int strip = 0; strip < Strips(panel); ++strip) {
      const int output = (panel - first) * kPanel + strip * kStrip;
      PackStrip(layout, plain, output, std::clamp(rows - output, 0, kStrip), 0, inputs_,
                strip, const_cast<uint8_t*>(base.codes.codes));
    }
  }
}

void LinearStore::Dequantize(float* values) const {
  std::vector<std::atomic<int>> next(slices_.size());
  backend_->pool.Run([&](Worker& worker) {
    const int s = worker.subpool();
    std::vector<bf16> decoded(quantised() ? size_t{kPanel} * inputs_padded() : 0);
    for (int i; (i = next[s].fetch_add(1)) < slices_[s].count();) {
      const int panel = slices_[s].first + i;
      const BasePanel base = Panel(s, panel);
      if (!base.values) {
        backend_->kernels.decode(base.codes, 0, inputs_padded() / 2, decoded.data(),
                                 nullptr);
      }
      const bf16* pairs = base.values ? base.values : decoded.data();
      const int64_t stride = 2ll * kStrip * Strips(panel);
      for (int n = 0; n < Width(panel); ++n) {
        float* row = values + (int64_t{panel} * kPanel + n) * inputs_;
        for (int d = 0; d < inputs_; ++d) {
          row[d] = FromBf16(pairs[d / 2 * stride + 2 * n + d % 2]);
        }
      }
    }
  });
}

}  // namespace ktjax
