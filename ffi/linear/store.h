// The weights of one frozen projection: packed once, ONE copy for both passes.
#ifndef KTJAX_FFI_LINEAR_STORE_H_
#define KTJAX_FFI_LINEAR_STORE_H_

#include <memory>
#include <string_view>
#include <vector>

#include "base/types.h"
#include "moe/base_store.h"

namespace ktjax {

// A matrix W [outputs, inputs] as panels of 64 outputs (gemm/kernel.h) over the depth
// inputs_padded. Sub-pools have slices of the outputs: in the forward each computes
// columns of y that are its own; in the backward each has a sum of grad x.
class LinearStore final : public BaseStore {
 public:
  static constexpr std::string_view kKind = "LinearStore";

  // Throws std::invalid_argument for groups that do not divide the inputs.
  LinearStore(std::shared_ptr<Backend> backend, int outputs, int inputs,
              const Encoding& encoding);

  // Packs W on the pool's threads, which so place the pages on their nodes. Values are
  // quantised to the store's format first. Throws std::invalid_argument for weights or
  // scales that have no value in it.
  void Pack(const SourceMatrix& source);

  // The values that the kernels use, as float32 [outputs, inputs].
  void Dequantize(float* values) const;

  std::string_view kind() const override { return kKind; }
  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  int inputs_padded() const { return static_cast<int>(RoundUp(inputs_, kDepth)); }

  // The panels [first, last) of a sub-pool; there may be none, but of the first.
  struct Slice {
    int first;
    int last;
    int count() const { return last - first; }
  };
  const std::vector<Slice>& slices() const { return slices_; }

  // `panel` counts over all slices, and is one of slice s.
  StoredPanel Panel(int s, int panel) const {
    return {Strips(panel) == kPanelStrips ? &layout_ : &last_layout_,
            static_cast<const uint8_t*>(memory_[s].data()) +
                (panel - slices_[s].first) * stride_};
  }
  // Bytes between two panels.
  int64_t Stride() const { return stride_; }
  int Strips(int panel) const {
    const int padded = static_cast<int>(RoundUp(outputs_, kDepth));
    const int left = padded / kStrip - panel * kPanelStrips;
    return left < kPanelStrips ? left : kPanelStrips;
  }
  // The outputs of a panel that are not padding.
  int Width(int panel) const {
    const int left = outputs_ - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }

 private:
  void PackPanels(const SourceMatrix& source, int s, int first, int last,
                  EncodedMatrix& encoded);

  const int outputs_;
  const int inputs_;
  const BasePanelLayout layout_;
  const BasePanelLayout last_layout_;  // of the last panel, with fewer strips
  const int64_t stride_;
  std::vector<Slice> slices_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_LINEAR_STORE_H_
