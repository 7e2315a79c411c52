#include "moe/eager.h"

#include "pool/cpu_infer.h"

namespace ktjax {
namespace {

CpuInfer& Queue() {
  // Never destroyed: its thread must not be joined while the process exits.
  static CpuInfer* queue = new CpuInfer;
  return *queue;
}

}  // namespace

void SubmitForward(std::shared_ptr<ExpertStore> store, LayerInputs inputs,
                   MutableArray y, std::shared_ptr<void> keep) {
  std::shared_ptr<const RegisteredLoRA> lora = store->registered_lora();
  if (lora) inputs.lora = lora->operands;
  Queue().Submit([store = std::move(store), lora = std::move(lora), inputs, y,
                  keep = std::move(keep)] { Forward(*store, inputs, y, {}); });
}

void SyncForward() { Queue().Sync(); }

}  // namespace ktjax
