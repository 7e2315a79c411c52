// XLA FFI handlers of the projection: decode, check, call, return.
#include <memory>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "handlers/check.h"
#include "handlers/targets.h"
#include "linear/linear.h"
#include "xla/ffi/api/ffi.h"

namespace ktjax {
namespace {

constexpr const char *kNameA = "lora.a", *kNameB = "lora.b";

struct LinearCall {
  std::shared_ptr<LinearStore> store;
  int64_t rows = 0;
  LinearLoRA lora;
};

// What both passes share; `rows` is x or the gradient of y.
LinearCall DecodeLinear(const Checker& check, const char* name,
                        const ffi::AnyBuffer& rows, const ffi::AnyBuffer& handle,
                        const ffi::RemainingArgs& rest, bool has_lora, float scaling) {
  LinearCall call;
  call.store = StoreRegistry::Get().Find<LinearStore>(HandleOf(check, handle));
  call.rows = check.Rows(name, rows);
  if (!has_lora) return call;
  const ffi::AnyBuffer a = Operand(check, rest, 0, kNameA);
  const ffi::AnyBuffer b = Operand(check, rest, 1, kNameB);
  call.lora = {static_cast<int>(check.Rows(kNameA, a)),
               scaling,
               {a.untyped_data(), check.Floating(kNameA, a)},
               {b.untyped_data(), check.Floating(kNameB, b)}};
  const int rank = call.lora.rank;
  if (rank < 1 || rank > kMaxRank) {
    check.Fail("lora", "a rank of 1 to " + std::to_string(kMaxRank),
               std::to_string(rank));
  }
  check.Shape(kNameA, a, {rank, call.store->inputs()});
  check.Shape(kNameB, b, {call.store->outputs(), rank});
  check.Type(kNameB, b, a.element_type());
  return call;
}

ConstArray Array(const Checker& check, const char* name, const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), check.Floating(name, buffer)};
}

ffi::Error LinearForwardHandler(ffi::AnyBuffer x, ffi::AnyBuffer handle,
                                ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                                float scaling, bool has_lora) {
  const Checker check("ktjax.linear");
  return Guard(check, [&] {
    const LinearCall call =
        DecodeLinear(check, "x", x, handle, rest, has_lora, scaling);
    check.Shape("x", x, {call.rows, call.store->inputs()});
    check.Type("y", *y, x.element_type());
    check.Shape("y", *y, {call.rows, call.store->outputs()});
    AdviseHugePages(y->untyped_data(), y->size_bytes());
    LinearForward(*call.store, call.rows, Array(check, "x", x), call.lora,
                  {y->untyped_data(), y->element_type() == ffi::F32});
  });
}

ffi::Error LinearBackwardHandler(ffi::AnyBuffer grad_y, ffi::AnyBuffer handle,
                                 ffi::RemainingArgs rest, ffi::RemainingRets rets,
                                 float scaling, bool has_lora, bool need_x,
                                 bool need_lora) {
  const Checker check("ktjax.linear gradient");
  return Guard(check, [&] {
    constexpr const char* kGradY = "gradient of y";
    const LinearCall call =
        DecodeLinear(check, kGradY, grad_y, handle, rest, has_lora, scaling);
    const LinearStore& store = *call.store;
    check.Shape(kGradY, grad_y, {call.rows, store.outputs()});

    size_t next = 0;
    auto result = [&](const char* name, std::vector<int64_t> shape) -> MutableArray {
      const ffi::AnyBuffer buffer = Result(check, rets, next++, name);
      check.Shape(name, buffer, std::move(shape));
      AdviseHugePages(buffer.untyped_data(), buffer.size_bytes());
      return {buffer.untyped_data(), check.Floating(name, buffer)};
    };
    LinearGradients gradients;
    if (need_x) gradients.x = result("gradient of x", {call.rows, store.inputs()});
    ConstArray x;
    if (need_lora) {
      if (!has_lora) check.Fail("lora", "adapters to differentiate", "none");
      const ffi::AnyBuffer kept = Operand(check, rest, 2, "x");
      check.Type("x", kept, grad_y.element_type());
      check.Shape("x", kept, {call.rows, store.inputs()});
      x = Array(check, "x", kept);
      gradients.a = result(kNameA, {call.lora.rank, store.inputs()});
      gradients.b = result(kNameB, {store.outputs(), call.lora.rank});
    }
    LinearBackward(store, call.rows, x, call.lora, Array(check, kGradY, grad_y),
                   gradients);
  });
}

XLA_FFI_DEFINE_HANDLER(kLinearForward, LinearForwardHandler,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()  // x [rows, inputs]
                           .Arg<ffi::AnyBuffer>()  // handle [2]
                           .RemainingArgs()        // LoRA's a and b
                           .Ret<ffi::AnyBuffer>()  // y [rows, outputs]
                           .Attr<float>("scaling")
                           .Attr<bool>("has_lora"));

XLA_FFI_DEFINE_HANDLER(kLinearBackward, LinearBackwardHandler,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()  // gradient of y
                           .Arg<ffi::AnyBuffer>()  // handle [2]
                           .RemainingArgs()        // LoRA's a and b; x
                           .RemainingRets()        // the gradients asked for
                           .Attr<float>("scaling")
                           .Attr<bool>("has_lora")
                           .Attr<bool>("need_x")
                           .Attr<bool>("need_lora"));

}  // namespace

std::vector<Target> LinearTargets() {
  return {{"ktjax_linear_forward", reinterpret_cast<void*>(kLinearForward)},
          {"ktjax_linear_backward", reinterpret_cast<void*>(kLinearBackward)}};
}

}  // namespace ktjax
