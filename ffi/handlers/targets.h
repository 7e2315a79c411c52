// The FFI targets of this library, by the names they are registered under.
#ifndef KTJAX_FFI_HANDLERS_TARGETS_H_
#define KTJAX_FFI_HANDLERS_TARGETS_H_

#include <vector>

namespace ktjax {

struct Target {
  const char* name;
  void* handler;
};

std::vector<Target> MoeTargets();
std::vector<Target> LinearTargets();

}  // namespace ktjax

#endif  // KTJAX_FFI_HANDLERS_TARGETS_H_
