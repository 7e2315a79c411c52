// XLA FFI handlers of the experts: decode, check, call, return. No mathematics here.
#include <string>
#include <utility>
#include <vector>

#include "handlers/check.h"
#include "handlers/targets.h"
#include "moe/layer.h"
#include "moe/registry.h"
#include "xla/ffi/api/ffi.h"

namespace ktjax {
namespace {

constexpr const char* kLoRANames[] = {"lora.gate_a", "lora.gate_b", "lora.up_a",
                                      "lora.up_b",   "lora.down_a", "lora.down_b"};

std::vector<int64_t> LoRAShape(const Geometry& g, int which, int64_t rank) {
  const int64_t experts = g.experts, hidden = g.hidden, middle = g.intermediate;
  switch (which) {
    case kGateA:
    case kUpA:
      return {experts, rank, hidden};
    case kGateB:
    case kUpB:
      return {experts, middle, rank};
    case kDownA:
      return {experts, rank, middle};
    default:
      return {experts, hidden, rank};
  }
}

// The operands that both passes share, checked, with the store kept alive.
struct Call {
  std::shared_ptr<ExpertStore> store;
  LayerInputs inputs;
  int operands = 0;  // of the variable ones; kept values come after them
  int64_t slots() const { return inputs.tokens * inputs.k; }
};

Call DecodeCall(const Checker& check, const ffi::AnyBuffer& x,
                const ffi::AnyBuffer& ids, const ffi::AnyBuffer& weights,
                const ffi::AnyBuffer& handle, const ffi::RemainingArgs& rest,
                bool has_lora, float scaling, uint32_t dropout, bool int8) {
  Call call;
  call.store = StoreRegistry::Get().Find<ExpertStore>(HandleOf(check, handle));
  const Geometry& geometry = call.store->geometry();
  LayerInputs& inputs = call.inputs;
  inputs.int8 = int8;

  inputs.x = {x.untyped_data(), check.Floating("x", x)};
  inputs.tokens = check.Rows("x", x);
  check.Shape("x", x, {inputs.tokens, geometry.hidden});
  check.Type("ids", ids, ffi::S32);
  check.Rows("ids", ids);
  inputs.k = static_cast<int>(ids.dimensions()[1]);
  check.Shape("ids", ids, {inputs.tokens, inputs.k});
  check.Type("w", weights, ffi::F32);
  check.Shape("w", weights, {inputs.tokens, inputs.k});
  inputs.ids = static_cast<const int32_t*>(ids.untyped_data());
  inputs.weights = static_cast<const float*>(weights.untyped_data());

  if (has_lora) {
    LoRAOperands& lora = inputs.lora;
    lora.scaling = scaling;
    for (int i = 0; i < kLoRAArrays; ++i) {
      const ffi::AnyBuffer buffer = Operand(check, rest, i, kLoRANames[i]);
      if (i == 0 && buffer.dimensions().size() == 3) {
        lora.rank = static_cast<int>(buffer.dimensions()[1]);
      }
      lora.arrays[i] = {buffer.untyped_data(), check.Floating(kLoRANames[i], buffer)};
      if (lora.arrays[i].is_float32 != lora.arrays[0].is_float32) {
        check.Fail(kLoRANames[i], "the dtype of lora.gate_a",
                   Name(buffer.element_type()));
      }
      check.Shape(kLoRANames[i], buffer, LoRAShape(geometry, i, lora.rank));
    }
    if (lora.rank < 1 || lora.rank > kMaxRank) {
      check.Fail("lora", "a rank of 1 to " + std::to_string(kMaxRank),
                 std::to_string(lora.rank));
    }
    call.operands = kLoRAArrays;
  }
  if (dropout) {
    if (!has_lora) check.Fail("dropout", "adapters, whose input it drops", "none");
    const ffi::AnyBuffer buffer = Operand(check, rest, call.operands++, "dropout_seed");
    check.Type("dropout_seed", buffer, ffi::U32);
    check.Shape("dropout_seed", buffer, {2});
    const auto* seed = static_cast<const uint32_t*>(buffer.untyped_data());
    inputs.dropout = {dropout, {seed[0], seed[1]}};
  }
  return call;
}

std::vector<int64_t> MiddleShape(const Call& call) {
  const int64_t parts = call.inputs.x.is_float32 ? 2 : 1;
  return {call.slots(), parts * call.store->geometry().intermediate_padded()};
}
std::vector<int64_t> LowRankShape(const Call& call) {
  return {call.slots(), 6 * RoundUp(call.inputs.lora.rank, kDepth)};
}

ffi::Error ForwardHandler(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                          ffi::AnyBuffer handle, ffi::RemainingArgs rest,
                          ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets kept,
                          float scaling, bool has_lora, uint32_t dropout, bool int8,
                          bool keep) {
  const Checker check("ktjax.moe");
  return Guard(check, [&] {
    const Call call = DecodeCall(check, x, ids, weights, handle, rest, has_lora,
                                 scaling, dropout, int8);
    check.Type("y", *y, x.element_type());
    check.Shape("y", *y, {call.inputs.tokens, call.store->geometry().hidden});
    Residuals residuals;
    auto residual = [&](size_t i, const char* name, std::vector<int64_t> shape) {
      const ffi::AnyBuffer buffer = Result(check, kept, i, name);
      check.Type(name, buffer, ffi::BF16);
      check.Shape(name, buffer, std::move(shape));
      AdviseHugePages(buffer.untyped_data(), buffer.size_bytes());
      return static_cast<bf16*>(buffer.untyped_data());
    };
    if (keep) {
      residuals.gate = residual(0, "kept gate", MiddleShape(call));
      residuals.up = residual(1, "kept up", MiddleShape(call));
      if (has_lora)
        residuals.low_rank = residual(2, "kept low rank", LowRankShape(call));
    }
    Forward(*call.store, call.inputs,
            {y->untyped_data(), y->element_type() == ffi::F32}, residuals);
  });
}

ffi::Error BackwardHandler(ffi::AnyBuffer x, ffi::AnyBuffer ids, ffi::AnyBuffer weights,
                           ffi::AnyBuffer handle, ffi::AnyBuffer grad_y,
                           ffi::RemainingArgs rest, ffi::RemainingRets rets,
                           float scaling, bool has_lora, uint32_t dropout, bool int8,
                           bool kept, bool need_x, bool need_w, bool need_lora) {
  const Checker check("ktjax.moe gradient");
  return Guard(check, [&] {
    const Call call = DecodeCall(check, x, ids, weights, handle, rest, has_lora,
                                 scaling, dropout, int8);
    const Geometry& geometry = call.store->geometry();
    const int64_t tokens = call.inputs.tokens;
    check.Type("gradient of y", grad_y, x.element_type());
    check.Shape("gradient of y", grad_y, {tokens, geometry.hidden});

    Residuals residuals;
    auto residual = [&](size_t i, const char* name, std::vector<int64_t> shape) {
      const ffi::AnyBuffer buffer = Operand(check, rest, call.operands + i, name);
      check.Type(name, buffer, ffi::BF16);
      check.Shape(name, buffer, std::move(shape));
      return static_cast<bf16*>(buffer.untyped_data());
    };
    if (kept) {
      residuals.gate = residual(0, "kept gate", MiddleShape(call));
      residuals.up = residual(1, "kept up", MiddleShape(call));
      if (has_lora)
        residuals.low_rank = residual(2, "kept low rank", LowRankShape(call));
    }

    Gradients gradients;
    size_t next = 0;
    if (need_x) {
      const ffi::AnyBuffer buffer = Result(check, rets, next++, "gradient of x");
      check.Type("gradient of x", buffer, x.element_type());
      check.Shape("gradient of x", buffer, {tokens, geometry.hidden});
      gradients.x = {buffer.untyped_data(), buffer.element_type() == ffi::F32};
    }
    if (need_w) {
      const ffi::AnyBuffer buffer = Result(check, rets, next++, "gradient of w");
      check.Type("gradient of w", buffer, ffi::F32);
      check.Shape("gradient of w", buffer, {tokens, call.inputs.k});
      gradients.weights = static_cast<float*>(buffer.untyped_data());
    }
    if (need_lora) {
      if (!has_lora) check.Fail("lora", "adapters to differentiate", "none");
      for (int i = 0; i < kLoRAArrays; ++i) {
        const ffi::AnyBuffer buffer = Result(check, rets, next++, kLoRANames[i]);
        check.Shape(kLoRANames[i], buffer,
                    LoRAShape(geometry, i, call.inputs.lora.rank));
        AdviseHugePages(buffer.untyped_data(), buffer.size_bytes());
        gradients.lora[i] = {buffer.untyped_data(),
                             check.Floating(kLoRANames[i], buffer)};
      }
    }
    Backward(*call.store, call.inputs,
             {grad_y.untyped_data(), grad_y.element_type() == ffi::F32}, residuals,
             gradients);
  });
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardHandler,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()  // x [tokens, hidden]
                           .Arg<ffi::AnyBuffer>()  // ids [tokens, k]
                           .Arg<ffi::AnyBuffer>()  // w [tokens, k]
                           .Arg<ffi::AnyBuffer>()  // handle [2]
                           .RemainingArgs()        // six LoRA arrays, dropout's seed
                           .Ret<ffi::AnyBuffer>()  // y
                           .RemainingRets()        // kept gate, up, low rank
                           .Attr<float>("scaling")
                           .Attr<bool>("has_lora")
                           .Attr<uint32_t>("dropout")
                           .Attr<bool>("int8")
                           .Attr<bool>("keep"));

XLA_FFI_DEFINE_HANDLER(kBackward, BackwardHandler,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // ids
                           .Arg<ffi::AnyBuffer>()  // w
                           .Arg<ffi::AnyBuffer>()  // handle
                           .Arg<ffi::AnyBuffer>()  // gradient of y
                           .RemainingArgs()        // the same; kept values
                           .RemainingRets()        // the gradients asked for
                           .Attr<float>("scaling")
                           .Attr<bool>("has_lora")
                           .Attr<uint32_t>("dropout")
                           .Attr<bool>("int8")
                           .Attr<bool>("kept")
                           .Attr<bool>("need_x")
                           .Attr<bool>("need_w")
                           .Attr<bool>("need_lora"));

}  // namespace

std::vector<Target> MoeTargets() {
  return {{"ktjax_moe_forward", reinterpret_cast<void*>(kForward)},
          {"ktjax_moe_backward", reinterpret_cast<void*>(kBackward)}};
}

}  // namespace ktjax
