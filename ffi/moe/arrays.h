// Arrays that somebody else owns, by address.
#ifndef KTJAX_FFI_MOE_ARRAYS_H_
#define KTJAX_FFI_MOE_ARRAYS_H_

namespace ktjax {

// A row-major array of float32 or bfloat16.
struct ConstArray {
  const void* data = nullptr;
  bool is_float32 = true;
  explicit operator bool() const { return data != nullptr; }
};

// One to fill.
struct MutableArray {
  void* data = nullptr;
  bool is_float32 = true;
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace ktjax

#endif  // KTJAX_FFI_MOE_ARRAYS_H_
