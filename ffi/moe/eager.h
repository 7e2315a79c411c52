// The eager path: forward calls with the registered adapter, queued in order.
#ifndef KTJAX_FFI_MOE_EAGER_H_
#define KTJAX_FFI_MOE_EAGER_H_

#include <memory>

#include "moe/layer.h"
#include "moe/store.h"
#include "pool/cpu_infer.h"

namespace ktjax {

// Queues y = layer(x) with the LoRA arrays registered on the store at the time of the
// call. `keep` owns the memory of the operands and of y until the call has run.
PendingCall SubmitForward(std::shared_ptr<ExpertStore> store, LayerInputs inputs,
                          MutableArray y, std::shared_ptr<void> keep);

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_EAGER_H_
