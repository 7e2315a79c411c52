#include "moe/registry.h"

#include <algorithm>
#include <random>

namespace ktjax {

StoreRegistry::StoreRegistry() : next_epoch_(std::random_device{}() | 1) {}

StoreRegistry& StoreRegistry::Get() {
  // Never destroyed: executables may run until the very end of the process.
  static StoreRegistry* registry = new StoreRegistry;
  return *registry;
}

Handle StoreRegistry::Add(std::shared_ptr<BaseStore> store) {
  std::lock_guard lock(mutex_);
  auto free = std::find_if(entries_.begin(), entries_.end(),
                           [](const Entry& entry) { return entry.store == nullptr; });
  if (free == entries_.end()) free = entries_.emplace(entries_.end());
  *free = {next_epoch_++, std::move(store)};
  return {free->epoch, static_cast<uint32_t>(free - entries_.begin())};
}

std::shared_ptr<BaseStore> StoreRegistry::Find(Handle handle) const {
  std::lock_guard lock(mutex_);
  if (handle.index < entries_.size()) {
    const Entry& entry = entries_[handle.index];
    if (entry.epoch == handle.epoch && entry.store) return entry.store;
  }
  throw DeadHandleError(
      "the store with handle (" + std::to_string(handle.epoch) + ", " +
      std::to_string(handle.index) +
      ") is closed or belongs to another process; create it again and "
      "pass the new store");
}

void StoreRegistry::Remove(Handle handle) {
  std::shared_ptr<BaseStore> last;  // destroyed after the lock is released
  std::lock_guard lock(mutex_);
  if (handle.index >= entries_.size()) return;
  Entry& entry = entries_[handle.index];
  if (entry.epoch == handle.epoch) last = std::move(entry.store);
}

int64_t StoreRegistry::size() const {
  std::lock_guard lock(mutex_);
  return std::count_if(entries_.begin(), entries_.end(),
                       [](const Entry& entry) { return entry.store != nullptr; });
}

}  // namespace ktjax
