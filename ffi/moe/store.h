// The base weights of one layer of experts: packed once, ONE copy for both passes.
#ifndef KTJAX_FFI_MOE_STORE_H_
#define KTJAX_FFI_MOE_STORE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "base/types.h"
#include "moe/arrays.h"
#include "moe/base_store.h"

namespace ktjax {

// The order of the six LoRA arrays wherever they come as a list.
enum LoRAArray { kGateA, kGateB, kUpA, kUpB, kDownA, kDownB, kLoRAArrays };

struct LoRAOperands {
  int rank = 0;  // 0: no LoRA
  float scaling = 1;
  ConstArray arrays[kLoRAArrays];
};

// An adapter for the calls that do not pass one: the arrays' addresses and their owner.
struct RegisteredLoRA {
  RegisteredLoRA(const LoRAOperands& operands, std::shared_ptr<void> owner)
      : operands(operands), owner(std::move(owner)) {}
  const LoRAOperands operands;
  const std::shared_ptr<void> owner;
};

// A sub-pool's slice of the intermediate dimension. `width` is a multiple of 32, so
// that it is a whole number of gate/up panels and of AMX tiles; `begin + width` may
// pass the end of the dimension, where the weights are zero.
struct Shard {
  int begin;
  int width;
};

struct Geometry {
  int experts;
  int hidden;
  int intermediate;

  int hidden_padded() const { return static_cast<int>(RoundUp(hidden, kDepth)); }
  int intermediate_padded() const {
    return static_cast<int>(RoundUp(intermediate, kDepth));
  }
};

// gate, up [experts, intermediate, hidden], down [experts, hidden, intermediate].
struct SourceWeights {
  SourceMatrix gate;
  SourceMatrix up;
  SourceMatrix down;
};

// Layout, for every shard and expert one block of panels (gemm/kernel.h):
// * gate/up: panel j holds the strips gate[32 j .. +16], up[same], gate[32 j + 16 ..
// +16],
//   up[same] over the depth hidden_padded: SwiGLU finds its two operands in one tile.
// * down: panel p holds outputs 64 p .. 64 p + 63 of hidden_padded over the depth
// `width`.
// In a quantised format a panel is a QuantPanel; a shard begins at a multiple of the
// group. down may be in another format than gate and up, and up than gate where both
// are in blocks: its strips of a panel then follow gate's.
class ExpertStore final : public BaseStore {
 public:
  static constexpr std::string_view kKind = "ExpertStore";

  // Throws std::invalid_argument when the geometry cannot be split over the sub-pools.
  ExpertStore(std::shared_ptr<Backend> backend, const Geometry& geometry,
              const Encoding& encoding, const Encoding& up_encoding,
              const Encoding& down_encoding);

  // Throws std::invalid_argument unless all matrices have codes that are multiplied as
  // integers.
  void CheckIntegers() const;

  // Packs all experts on the pool's threads, which so place the pages on their nodes.
  // Values are quantised to the store's format first. Throws std::invalid_argument for
  // weights or scales that have no value in it.
  void Pack(const SourceWeights& source);

  // The values that the kernels use, as float32, in the layout of SourceWeights.
  void Dequantize(float* gate, float* up, float* down) const;

  // Replaces the registered adapter. Calls in flight finish on the one they began with.
  void RegisterLoRA(std::shared_ptr<const RegisteredLoRA> lora) {
    std::lock_guard lock(lora_mutex_);
    lora_.swap(lora);
  }
  std::shared_ptr<const RegisteredLoRA> registered_lora() const {
    std::lock_guard lock(lora_mutex_);
    return lora_;
  }

  std::string_view kind() const override { return kKind; }
  const Geometry& geometry() const { return geometry_; }
  // Whether any matrix has panels of codes.
  bool quantised() const {
    return IsQuantised(encoding_) || IsQuantised(down_encoding_);
  }
  const std::vector<Shard>& shards() const { return shards_; }

  StoredPanel GateUp(int shard, int expert, int panel) const {
    return {&gate_up_layout_, Block(shard, expert) + panel * gate_up_stride_};
  }
  StoredPanel Down(int shard, int expert, int panel) const {
    const Layout& layout = layouts_[shard];
    return {DownStrips(panel) == kPanelStrips ? &layout.down : &layout.last_down,
            Block(shard, expert) + layout.gate_up_bytes + panel * layout.down_stride};
  }
  // Bytes between two panels of an expert.
  int64_t GateUpStride() const { return gate_up_stride_; }
  int64_t DownStride(int shard) const { return layouts_[shard].down_stride; }
  int DownPanels() const {
    return static_cast<int>(CeilDiv(geometry_.hidden_padded(), kPanel));
  }
  int DownStrips(int panel) const {
    const int left = geometry_.hidden_padded() / kStrip - panel * kPanelStrips;
    return left < kPanelStrips ? left : kPanelStrips;
  }

 private:
  const uint8_t* Block(int shard, int expert) const {
    return static_cast<const uint8_t*>(memory_[shard].data()) +
           expert * layouts_[shard].expert_bytes;
  }
  void PackGateUpValues(const SourceWeights& source, int shard, int expert);
  void PackDownValues(const SourceWeights& source, int shard, int expert);
  void PackGateUpCodes(const SourceWeights& source, int shard, int expert,
                       EncodedMatrix& encoded);
  void PackDownCodes(const SourceWeights& source, int shard, int expert,
                     EncodedMatrix& encoded);

  // Of a shard.
  struct Layout {
    BasePanelLayout down;
    BasePanelLayout last_down;  // which may have fewer strips
    int64_t down_stride;
    int64_t gate_up_bytes;  // of an expert
    int64_t expert_bytes;
  };

  Geometry geometry_;
  Encoding up_encoding_;  // BaseStore's is that of gate
  Encoding down_encoding_;
  BasePanelLayout gate_up_layout_;
  int64_t gate_up_stride_;
  std::vector<Shard> shards_;
  std::vector<Layout> layouts_;  // by shard
  mutable std::mutex lora_mutex_;
  std::shared_ptr<const RegisteredLoRA> lora_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_STORE_H_
