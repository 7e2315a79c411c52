// The process-wide worker pool, the kernels that run on it and the memory they share.
#ifndef KTJAX_FFI_MOE_BACKEND_H_
#define KTJAX_FFI_MOE_BACKEND_H_

#include <map>
#include <memory>
#include <mutex>

#include "base/aligned.h"
#include "base/cpu.h"
#include "gemm/kernel.h"
#include "pool/worker_pool.h"

namespace ktjax {

// Buffers of the running operation, kept from call to call: no allocation and no page
// fault in steady state. Slots grow and never shrink before the pool is released.
class Workspace {
 public:
  enum Slot {
    kHidden,  // h, the input of the down projection
    kHiddenCodes,
    kHiddenScales,
    kHiddenSums,
    kGateGrad,
    kUpGrad,
    kGateValue,  // gate and up where the caller keeps no residuals
    kUpValue,
    kLowRank,  // x Aᵀ of the three projections
    kLowRankGrad,
    kTransposedLowRank,  // low-rank values of a projection, a row per rank
    kPartial,            // low-rank sums of one sub-pool
    kDots,               // <dh, h> of every row and column block
    kSum,                // y or grad_x in float32
    kSlotCount,
  };

  // At least `bytes` bytes; what the slot held before is lost when it has to grow.
  template <typename T>
  T* Get(Slot slot, int index, size_t count) {
    AlignedBuffer& buffer = buffers_[{slot, index}];
    const size_t bytes = count * sizeof(T);
    if (buffer.size() < bytes) {
      buffer = AlignedBuffer();  // frees before it allocates
      buffer = AlignedBuffer(bytes);
    }
    return static_cast<T*>(buffer.data());
  }

  size_t bytes() const {
    size_t total = 0;
    for (const auto& [key, buffer] : buffers_) total += buffer.size();
    return total;
  }

 private:
  std::map<std::pair<int, int>, AlignedBuffer> buffers_;
};

struct Backend {
  Backend(const WorkerPoolConfig& config, Isa isa);

  WorkerPool pool;
  const Isa isa;
  const Kernels& kernels;
  // Held for a whole operation: the workspace belongs to it.
  std::mutex mutex;
  Workspace workspace;
};

// The kernels of an instruction set that this CPU can run.
const Kernels& KernelsOf(Isa isa);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_BACKEND_H_
