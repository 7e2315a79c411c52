#include "moe/eager.h"

#include <utility>

namespace ktjax {
namespace {

CpuInfer& Queue() {
  // Never destroyed: its thread must not be joined while the process exits.
  static CpuInfer* queue = new CpuInfer;
  return *queue;
}

}  // namespace

PendingCall SubmitForward(std::shared_ptr<ExpertStore> store, LayerInputs inputs,
                          MutableArray y, std::shared_ptr<void> keep) {
  std::shared_ptr<const RegisteredLoRA> lora = store->registered_lora();
  if (lora) inputs.lora = lora->operands;
  return Queue().Submit([store = std::move(store), lora = std::move(lora), inputs, y,
                         keep = std::move(keep)] { Forward(*store, inputs, y, {}); });
}

}  // namespace ktjax
