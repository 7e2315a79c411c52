"""Training wrappers: a layer of routed experts with LoRA, as Flax NNX modules."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from flax import nnx

from ktjax import experts_arrays, experts_state
from ktjax.experts_buffer import KExpertsSFTBuffer
from ktjax.experts_sft_base import LORA_NAMES, BaseSFTMoEWrapper
from ktjax.experts_weights import LoadsExperts
from ktjax.lora import LoRA
from ktjax.ops.api import moe
from ktjax.quant.formats import BLOCK_FORMATS, Encoding, check_method_compute
from ktjax.store import ExpertStore

__all__ = ["AMXSFTMoEWrapper", "BaseSFTMoEWrapper", "KExpertsSFTBuffer"]

Array = Any


class AMXSFTMoEWrapper(LoadsExperts, BaseSFTMoEWrapper):
    """LoRA training of one layer of experts whose base weights stay in host memory.

    There are two ways to compute. `wrapper(x, ids, w)` is pure and differentiable, for
    jit, grad and optax. `forward_sft` and `backward` are eager and keep a stack of up
    to `max_cache_depth` forwards. Both see the present values of the six
    `nnx.LoRAParam`s: the eager path compares them with the registered arrays and, where
    they differ, registers the present ones first, so that no stale pointer is ever
    read; `update_lora_weights()` does it at a moment of the caller's choosing.

    Attributes:
      METHODS: the store formats of each method, the one that float weights are
        quantised to first. Weights that are stored in another of them stay as they are.
      method: the storage format of the base weights, one of `METHODS`.
      compute: "bf16", "int8" or None, as in `ktjax.moe`; of every way to compute.

    Args:
      method: the storage format of the base weights.
      group_size: method "AMXINT4_KGroup_SFT" only: 32, 64 or 128 depths to a scale;
        None = what the weights have, or else 128.
      zero_point: method "AMXINT4_KGroup_SFT" only: quantise with zero points.
      compute: "bf16", "int8" or None, as in `ktjax.moe`.
      others: see `BaseSFTMoEWrapper`.

    Raises:
      ValueError: an unknown method, an option that it does not have, or a setting
        outside its limits.
      RuntimeError: the worker pool already runs with another configuration.
    """

    METHODS: ClassVar[dict[str, tuple[str, ...]]] = {
        "AMXBF16_SFT": ("bf16",),
        "AMXINT8_SFT": ("int8",),
        "AMXINT4_SFT": ("int4",),
        "AMXINT4_KGroup_SFT": ("int4_kgroup",),
        "AMXFP8_SFT": ("fp8_block", "fp8_channel"),
        "RAWINT4_SFT": ("rawint4",),
        "AMXMXFP4_SFT": ("mxfp4",),
        "AMXMXFP8_SFT": ("mxfp8",),
        # What a GGUF file has, as it has it.
        "GGUF_SFT": ("bf16", *BLOCK_FORMATS),
    }

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int,
        cpuinfer_threads: int,
        threadpool_count: int,
        weight_path: str,
        chunked_prefill_size: int,
        method: str = "AMXBF16_SFT",
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        *,
        group_size: int | None = None,
        zero_point: bool = False,
        compute: Literal["bf16", "int8"] | None = None,
    ) -> None:
        if method not in self.METHODS:
            raise ValueError(
                f"Unsupported method: {method}. "
                f"Supported methods: {sorted(self.METHODS)}"
            )
        format = self.METHODS[method][0]
        Encoding.of(format, group_size, zero_point, where=method)
        check_method_compute(compute, self.METHODS[method], where=method)
        super().__init__(
            layer_idx,
            num_experts,
            num_experts_per_tok,
            hidden_size,
            moe_intermediate_size,
            num_gpu_experts,
            cpuinfer_threads,
            threadpool_count,
            weight_path,
            chunked_prefill_size,
            lora_rank,
            lora_alpha,
            max_cache_depth,
        )
        self.method = method
        self.group_size = group_size
        self.zero_point = zero_point
        self.compute = self._chosen_compute = compute

    @property
    def _formats(self) -> tuple[str, ...]:
        return self.METHODS[self.method]

    def _adopt(self, store: ExpertStore) -> experts_state.LoadedExperts:
        loaded = super()._adopt(store)
        # The adapters stay when weights are loaded again.
        self._sync_lora_weights_to_cpp(loaded)
        return loaded

    def init_lora_weights(
        self,
        gate_lora_a: Array | None = None,
        gate_lora_b: Array | None = None,
        up_lora_a: Array | None = None,
        up_lora_b: Array | None = None,
        down_lora_a: Array | None = None,
        down_lora_b: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Set the six adapters, from arrays or at random, and register them.

        Arrays are copied. They stay bfloat16 if all six are, and become float32
        otherwise. With `rngs`, A is Kaiming-uniform (a = √5, as torch and PEFT draw it)
        and B is zero, in float32.

        Args:
          gate_lora_a: `[experts, rank, hidden]`.
          gate_lora_b: `[experts, intermediate, rank]`.
          up_lora_a: `[experts, rank, hidden]`.
          up_lora_b: `[experts, intermediate, rank]`.
          down_lora_a: `[experts, rank, intermediate]`.
          down_lora_b: `[experts, hidden, rank]`.
          rngs: source of A's values, in place of the arrays.

        Raises:
          ValueError: neither or both of arrays and rngs; or an array, which is named,
            of a wrong shape or of a dtype that holds no real numbers.
        """
        given = (
            gate_lora_a,
            gate_lora_b,
            up_lora_a,
            up_lora_b,
            down_lora_a,
            down_lora_b,
        )
        missing = [name for name, a in zip(LORA_NAMES, given, strict=True) if a is None]
        if len(missing) != (0 if rngs is None else len(given)):
            raise ValueError(
                "init_lora_weights: expected all six arrays or rngs=nnx.Rngs(...), "
                f"got {len(given) - len(missing)} arrays (missing: {missing}) and rngs "
                f"{'not ' if rngs is None else ''}given"
            )
        sizes = LoRA.shapes(
            self.num_experts,
            self.hidden_size,
            self.moe_intermediate_size,
            self.lora_rank,
        )
        shapes = dict(zip(LORA_NAMES, sizes.values(), strict=True))
        if rngs is None:
            named = dict(zip(LORA_NAMES, given, strict=True))
            values = experts_arrays.check_lora(named, shapes)
        else:
            values = {
                name: LoRA.draw(name, shape, rngs.params)
                for name, shape in shapes.items()
            }
        for name, value in values.items():
            if self._lora_initialized and getattr(self, name) is not None:
                # The parameter object stays: an optimizer may already refer to it.
                getattr(self, name).set_value(value)
            else:
                setattr(self, name, nnx.LoRAParam(value))
        if self._weights_loaded:
            self._sync_lora_weights_to_cpp(self._loaded())

    def update_lora_weights(self) -> None:
        """The sync step: register the present adapters' host pointers with the backend.

        Raises:
          RuntimeError: adapters not initialised, weights not loaded, or wrapper closed.
        """
        if not self._lora_initialized:
            raise RuntimeError(
                "LoRA weights not initialized. Call init_lora_weights() first."
            )
        self._sync_lora_weights_to_cpp(self._loaded())

    def _sync_lora_weights_to_cpp(self, loaded: experts_state.LoadedExperts) -> None:
        if (lora := self.lora) is not None:
            loaded.register(lora, self.lora_scaling)

    def forward_sft(
        self,
        hidden_states: Array,
        expert_ids: Array,
        weights: Array,
        save_for_backward: bool = True,
    ) -> jax.Array:
        """The routed experts' sum; eager.

        Without adapters (and with save_for_backward=False) it is the base model's.

        Args:
          hidden_states: `[..., hidden]`, float32 or bfloat16; a NumPy or JAX array or a
            tensor of another library, as are the others.
          expert_ids: `[..., k]` integers within -1..experts - 1; -1 skips a slot.
          weights: `[..., k]` floats, the routing weights.
          save_for_backward: keep what `backward` needs, on top of the stack.

        Returns:
          `[..., hidden]` in the dtype of hidden_states.

        Raises:
          RuntimeError: weights not loaded, adapters not initialised, the stack is full,
            the wrapper is closed, or an argument is traced.
          ValueError: an argument's shape, dtype or value.
        """
        loaded = self._loaded()
        lora = self.lora
        if save_for_backward and lora is None:
            raise RuntimeError(
                "LoRA weights not initialized. "
                "Call init_lora_weights() first, or set save_for_backward=False."
            )
        saved = experts_state.eager_state(self).saved
        if save_for_backward and len(saved) >= self.max_cache_depth:
            raise RuntimeError(
                f"Forward cache full (depth={len(saved)}, max={self.max_cache_depth}). "
                "Call backward() to free cache slots."
            )
        x = experts_arrays.check_activations(
            hidden_states, self.hidden_size, "forward_sft", "hidden_states"
        )
        slots = (*x.shape[:-1], self.num_experts_per_tok)
        ids = experts_arrays.check_ids(
            expert_ids, slots, self.num_experts, "forward_sft"
        )
        w = experts_arrays.check_routing(weights, slots, "forward_sft")
        if lora is None:
            return experts_state.forward_base(
                loaded.store, x, ids, w, compute=self.compute
            )
        loaded.register_if_changed(lora, self.lora_scaling)
        if not save_for_backward:
            return experts_state.forward_registered(
                loaded, self._buffer(x), x, ids, w, compute=self.compute
            )
        y, pullback = experts_state.forward_saving(
            loaded.store,
            lora,
            *map(experts_arrays.owned, (x, ids, w)),
            scaling=self.lora_scaling,
            compute=self.compute,
        )
        saved.append(experts_state.SavedForward(y.shape, y.dtype, pullback))
        return y

    def _buffer(self, x: Array) -> KExpertsSFTBuffer:
        return KExpertsSFTBuffer.get_buffer(
            qlen=x.size // self.hidden_size,
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            lora_rank=self.lora_rank,
            dtype=x.dtype,
        )

    def backward(self, grad_output: Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The gradients of the newest saved forward, which leaves the stack; eager.

        The routing weights' gradient is in `grad_weights` afterwards.

        Args:
          grad_output: gradient of that forward's output, in its shape and dtype.

        Returns:
          The gradient of hidden_states, and the six adapters' gradients by name,
          "grad_gate_lora_a" and so on, each in its parameter's dtype.

        Raises:
          RuntimeError: no forward awaits its backward, or the wrapper is closed.
          ValueError: grad_output has another shape or dtype; the forward stays.
        """
        self._loaded()
        state = experts_state.eager_state(self)
        if not state.saved:
            raise RuntimeError(
                "No forward cache available. "
                "Call forward_sft() with save_for_backward=True first."
            )
        newest = state.saved[-1]
        grad = experts_arrays.check_gradient(grad_output, newest.shape, newest.dtype)
        grad_input, grad_weights, grad_lora = experts_state.pull_back(
            newest.pullback, experts_arrays.owned(grad)
        )
        state.saved.pop()
        state.grad_weights = grad_weights
        named = zip(LORA_NAMES, grad_lora.arrays(), strict=True)
        return grad_input, {f"grad_{name}": value for name, value in named}

    @property
    def grad_weights(self) -> jax.Array:
        """The routing weights' gradient of the last `backward`, float32 `[..., k]`.

        Raises:
          RuntimeError: there was no backward yet.
        """
        grad_weights = experts_state.eager_state(self).grad_weights
        if grad_weights is None:
            raise RuntimeError(
                "No routing-weight gradient available. Call backward() first."
            )
        return grad_weights

    def __call__(
        self,
        x: Array,
        ids: Array,
        w: Array,
        *,
        activation_policy: Literal["save", "recompute"] = "save",
    ) -> jax.Array:
        """The routed experts' sum; pure and differentiable, for jit, grad and optax.

        Args:
          x: `[..., hidden]`, float32 or bfloat16.
          ids: `[..., k]` int32; -1 skips a slot.
          w: `[..., k]` float32 routing weights.
          activation_policy: "save" or "recompute", as in `ktjax.moe`.

        Returns:
          `[..., hidden]` in the dtype of x; the base model's without adapters.

        Raises:
          RuntimeError: weights not loaded; or, outside of jit, wrapper closed.
        """
        return moe(
            x,
            ids,
            w,
            self._store(),
            self.lora,
            scaling=self.lora_scaling,
            activation_policy=activation_policy,
            compute=self.compute,
        )

    def close(self) -> None:
        """Free the expert weights and drop the saved forwards; copies are closed too.

        The adapters stay readable. Closing twice is allowed.
        """
        experts_state.eager_state(self).saved.clear()
        super().close()
