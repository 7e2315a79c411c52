// The FFI targets of this library, by the names they are registered under.
#ifndef KTJAX_FFI_HANDLERS_MOE_HANDLERS_H_
#define KTJAX_FFI_HANDLERS_MOE_HANDLERS_H_

#include <vector>

namespace ktjax {

struct Target {
  const char* name;
  void* handler;
};

std::vector<Target> MoeTargets();

}  // namespace ktjax

#endif  // KTJAX_FFI_HANDLERS_MOE_HANDLERS_H_
