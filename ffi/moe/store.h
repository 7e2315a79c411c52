// The base weights of one layer of experts: packed once, ONE copy for both passes.
#ifndef KTJAX_FFI_MOE_STORE_H_
#define KTJAX_FFI_MOE_STORE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/aligned.h"
#include "base/types.h"
#include "moe/backend.h"

namespace ktjax {

// A row-major array of float32 or bfloat16, by address.
struct ConstArray {
  const void* data = nullptr;
  bool is_float32 = true;
  explicit operator bool() const { return data != nullptr; }
};

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

// Source arrays, row-major: gate, up [experts, intermediate, hidden], down [experts,
// hidden, intermediate], float32 or bfloat16 bits.
struct SourceWeights {
  const void* gate;
  const void* up;
  const void* down;
  bool is_float32;
};

// Layout, for every shard and expert one block of panels (gemm/kernel.h):
// * gate/up: panel j holds the strips gate[32 j .. +16], up[same], gate[32 j + 16 ..
// +16],
//   up[same] over the depth hidden_padded: SwiGLU finds its two operands in one tile.
// * down: panel p holds outputs 64 p .. 64 p + 63 of hidden_padded over the depth
// `width`.
class ExpertStore {
 public:
  // Throws std::invalid_argument when the geometry cannot be split over the sub-pools.
  ExpertStore(std::shared_ptr<Backend> backend, const Geometry& geometry);

  // Packs all experts on the pool's threads, which so place the pages on their nodes.
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

  const Geometry& geometry() const { return geometry_; }
  const std::shared_ptr<Backend>& backend() const { return backend_; }
  const std::vector<Shard>& shards() const { return shards_; }
  size_t bytes() const;

  const bf16* GateUpPanel(int shard, int expert, int panel) const {
    return Block(shard, expert) + panel * GateUpStride();
  }
  // Elements between two panels of an expert.
  int64_t GateUpStride() const { return PanelStride(geometry_.hidden_padded()); }
  const bf16* DownPanel(int shard, int expert, int panel) const {
    return Block(shard, expert) + GateUpSize(shard) + panel * DownStride(shard);
  }
  int64_t DownStride(int shard) const { return PanelStride(shards_[shard].width); }
  int DownStrips(int panel) const {
    const int left = geometry_.hidden_padded() / kStrip - panel * kPanelStrips;
    return left < kPanelStrips ? left : kPanelStrips;
  }

 private:
  // Large panels are 4 KiB apart. The backward reads the same rows of every panel of an
  // expert: 256 KiB apart (a hidden size of 2048), they would share a few sets of L1
  // and L2 and evict one another.
  static int64_t PanelStride(int64_t depth) {
    return kPanel * depth + (depth >= 512 ? kPanel * kDepth : 0);
  }
  int64_t GateUpSize(int shard) const {
    return shards_[shard].width / kDepth * GateUpStride();
  }
  int64_t BlockSize(int shard) const {
    return GateUpSize(shard) +
           CeilDiv(geometry_.hidden_padded(), kPanel) * DownStride(shard);
  }
  const bf16* Block(int shard, int expert) const {
    return static_cast<const bf16*>(memory_[shard].data()) + expert * BlockSize(shard);
  }
  void PackExpert(const SourceWeights& source, int shard, int expert);

  std::shared_ptr<Backend> backend_;
  Geometry geometry_;
  std::vector<Shard> shards_;
  std::vector<AlignedBuffer> memory_;  // one per shard, on its node
  mutable std::mutex lora_mutex_;
  std::shared_ptr<const RegisteredLoRA> lora_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_STORE_H_
