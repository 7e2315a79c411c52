// What handlers do before and after the work: check operands, turn exceptions into
// errors.
#ifndef KTJAX_FFI_HANDLERS_CHECK_H_
#define KTJAX_FFI_HANDLERS_CHECK_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "moe/registry.h"
#include "xla/ffi/api/ffi.h"

namespace ktjax {

namespace ffi = xla::ffi;

std::string ToString(std::span<const int64_t> dims);
const char* Name(ffi::DataType type);

// Checks an operand against what it must be. Throws std::invalid_argument.
class Checker {
 public:
  explicit Checker(const char* operation) : operation_(operation) {}

  void Shape(const char* operand, const ffi::AnyBuffer& buffer,
             std::vector<int64_t> expected) const;
  void Type(const char* operand, const ffi::AnyBuffer& buffer,
            ffi::DataType expected) const;
  // float32 or bfloat16; returns whether it is float32.
  bool Floating(const char* operand, const ffi::AnyBuffer& buffer) const;
  // A matrix; returns its rows.
  int64_t Rows(const char* operand, const ffi::AnyBuffer& buffer) const;
  [[noreturn]] void Fail(const char* operand, const std::string& expected,
                         const std::string& got) const;
  const char* operation() const { return operation_; }

 private:
  const char* operation_;
};

Handle HandleOf(const Checker& check, const ffi::AnyBuffer& handle);

// The operand or result number i of those that a call need not have.
ffi::AnyBuffer Operand(const Checker& check, const ffi::RemainingArgs& args, size_t i,
                       const char* name);
ffi::AnyBuffer Result(const Checker& check, const ffi::RemainingRets& rets, size_t i,
                      const char* name);

// Runs `body` and turns what it throws into an FFI error: none may pass into XLA.
ffi::Error Guard(const Checker& check, const std::function<void()>& body);

}  // namespace ktjax

#endif  // KTJAX_FFI_HANDLERS_CHECK_H_
