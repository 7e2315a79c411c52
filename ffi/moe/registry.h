// Handles that outlive nothing: (epoch, index) names a store, or nothing any more.
#ifndef KTJAX_FFI_MOE_REGISTRY_H_
#define KTJAX_FFI_MOE_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moe/base_store.h"

namespace ktjax {

struct Handle {
  uint32_t epoch;
  uint32_t index;
};

// A handle whose store was closed, or that never came from this process.
class DeadHandleError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class StoreRegistry {
 public:
  static StoreRegistry& Get();

  Handle Add(std::shared_ptr<BaseStore> store);
  // Throws DeadHandleError. The result keeps the store alive while it is in use.
  std::shared_ptr<BaseStore> Find(Handle handle) const;
  // The same for a store of one class. Throws std::invalid_argument for another one.
  template <typename Store>
  std::shared_ptr<Store> Find(Handle handle) const {
    const std::shared_ptr<BaseStore> store = Find(handle);
    if (auto found = std::dynamic_pointer_cast<Store>(store)) return found;
    throw std::invalid_argument("store: expected a handle of " +
                                std::string(Store::kKind) + ", got one of " +
                                std::string(store->kind()));
  }
  // Calls in flight finish on the store; later ones get DeadHandleError.
  void Remove(Handle handle);
  int64_t size() const;

 private:
  StoreRegistry();

  mutable std::mutex mutex_;
  // Starts at a number of this process: a handle from another one (a saved array, a
  // cached executable's constant) is dead here rather than somebody else's store.
  uint32_t next_epoch_;
  struct Entry {
    uint32_t epoch = 0;
    std::shared_ptr<BaseStore> store;
  };
  std::vector<Entry> entries_;
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_REGISTRY_H_
