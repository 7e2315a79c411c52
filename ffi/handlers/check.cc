#include "handlers/check.h"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace ktjax {

std::string ToString(std::span<const int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(dims[i]);
  }
  return text + "]";
}

const char* Name(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return "float32";
    case ffi::BF16:
      return "bfloat16";
    case ffi::S32:
      return "int32";
    case ffi::U32:
      return "uint32";
    default:
      return "another dtype";
  }
}

void Checker::Shape(const char* operand, const ffi::AnyBuffer& buffer,
                    std::vector<int64_t> expected) const {
  const auto dims = buffer.dimensions();
  if (!std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) {
    Fail(operand, "shape " + ToString(expected), ToString({dims.begin(), dims.size()}));
  }
}

void Checker::Type(const char* operand, const ffi::AnyBuffer& buffer,
                   ffi::DataType expected) const {
  if (buffer.element_type() != expected) {
    Fail(operand, Name(expected), Name(buffer.element_type()));
  }
}

bool Checker::Floating(const char* operand, const ffi::AnyBuffer& buffer) const {
  const ffi::DataType type = buffer.element_type();
  if (type != ffi::F32 && type != ffi::BF16) {
    Fail(operand, "float32 or bfloat16", Name(type));
  }
  return type == ffi::F32;
}

int64_t Checker::Rows(const char* operand, const ffi::AnyBuffer& buffer) const {
  const auto dims = buffer.dimensions();
  if (dims.size() != 2) {
    Fail(operand, "rank 2", ToString({dims.begin(), dims.size()}));
  }
  return dims[0];
}

void Checker::Fail(const char* operand, const std::string& expected,
                   const std::string& got) const {
  throw std::invalid_argument(std::string(operand) + ": expected " + expected +
                              ", got " + got);
}

Handle HandleOf(const Checker& check, const ffi::AnyBuffer& handle) {
  check.Type("handle", handle, ffi::U32);
  check.Shape("handle", handle, {2});
  const auto* words = static_cast<const uint32_t*>(handle.untyped_data());
  return {words[0], words[1]};
}

ffi::AnyBuffer Operand(const Checker& check, const ffi::RemainingArgs& args, size_t i,
                       const char* name) {
  auto operand = args.get<ffi::AnyBuffer>(i);
  if (!operand.has_value()) check.Fail(name, "an array", "nothing");
  return *operand;
}

ffi::AnyBuffer Result(const Checker& check, const ffi::RemainingRets& rets, size_t i,
                      const char* name) {
  auto result = rets.get<ffi::AnyBuffer>(i);
  if (!result.has_value()) check.Fail(name, "a result", "none");
  return **result;
}

ffi::Error Guard(const Checker& check, const std::function<void()>& body) {
  const std::string prefix = std::string(check.operation()) + ": ";
  try {
    body();
    return ffi::Error::Success();
  } catch (const DeadHandleError& e) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, prefix + e.what());
  } catch (const std::out_of_range& e) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, prefix + e.what());
  } catch (const std::invalid_argument& e) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, prefix + e.what());
  } catch (const std::bad_alloc& e) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, prefix + e.what());
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kInternal, prefix + e.what());
  }
}

}  // namespace ktjax
