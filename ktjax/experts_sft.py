"""Training wrappers: a layer of routed experts with LoRA, as Flax NNX modules."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax import experts_arrays, experts_state
from ktjax.experts_buffer import KExpertsSFTBuffer
from ktjax.experts_sft_base import LORA_NAMES, BaseSFTMoEWrapper
from ktjax.io.experts import load_experts
from ktjax.io.safetensors import Checkpoint
from ktjax.lora import LoRA
from ktjax.ops.api import moe
from ktjax.store import ExpertStore

__all__ = ["AMXSFTMoEWrapper", "BaseSFTMoEWrapper", "KExpertsSFTBuffer"]

Array = Any


class AMXSFTMoEWrapper(BaseSFTMoEWrapper):
    """LoRA training of one layer of experts whose base weights stay in host memory.

    There are two ways to compute. `wrapper(x, ids, w)` is pure and differentiable, for
    jit, grad and optax. `forward_sft` and `backward` are eager and keep a stack of up
    to `max_cache_depth` forwards. Both see the present values of the six
    `nnx.LoRAParam`s: the eager path compares them with the registered arrays and, where
    they differ, registers the present ones first, so that no stale pointer is ever
    read; `update_lora_weights()` does it at a moment of the caller's choosing.

    Attributes:
      method: the storage format of the base weights, one of `SUPPORTED_METHODS`.

    Args:
      method: the storage format of the base weights.
      others: see `BaseSFTMoEWrapper`.

    Raises:
      ValueError: an unknown method, or a setting outside its limits.
      NotImplementedError: a method that is not built yet.
      RuntimeError: the worker pool already runs with another configuration.
    """

    SUPPORTED_METHODS: ClassVar[frozenset[str]] = frozenset(
        {"AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT", "AMXINT4_KGroup_SFT"}
    )
    # The store format of each method that works today.
    FORMATS: ClassVar[dict[str, str]] = {"AMXBF16_SFT": "bf16"}

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
    ) -> None:
        if method not in self.SUPPORTED_METHODS:
            raise ValueError(
                f"Unsupported method: {method}. "
                f"Supported methods: {sorted(self.SUPPORTED_METHODS)}"
            )
        if method not in self.FORMATS:
            raise NotImplementedError(
                f"Method '{method}' is not built yet; what works today in SFT mode: "
                f"{sorted(self.FORMATS)}"
            )
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

    def load_weights(self, physical_to_logical_map: Array | None = None) -> None:
        """Load layer `layer_idx` of the checkpoint at `weight_path`.

        Loading again replaces the weights; the adapters stay.

        Args:
          physical_to_logical_map: `[num_experts]` integers: slot p holds expert map[p];
            None = every expert in its own place.

        Raises:
          FileNotFoundError: there is no checkpoint at `weight_path`.
          KeyError: it has no experts for this layer.
          ValueError: a bad map, or tensors that do not have the wrapper's sizes.
        """
        order = None
        if physical_to_logical_map is not None:
            order = experts_arrays.check_map(
                physical_to_logical_map, self.num_experts, self.num_experts
            )
        self._adopt(
            *load_experts(
                Checkpoint(self.weight_path),
                self.layer_idx,
                self.num_experts,
                physical_to_logical_map=order,
            )
        )

    def load_weights_from_arrays(
        self,
        gate: Array,
        up: Array,
        down: Array,
        physical_to_logical_map: Array | None = None,
    ) -> None:
        """Load the base weights from arrays, float32 or bfloat16.

        Args:
          gate: `[experts, intermediate, hidden]`.
          up: `[experts, intermediate, hidden]`.
          down: `[experts, hidden, intermediate]`.
          physical_to_logical_map: `[num_experts]` integers: slot p holds expert map[p];
            None = every expert in its own place.

        Raises:
          ValueError: a bad map, or arrays that do not have the wrapper's sizes.
        """
        operation = "load_weights_from_arrays"
        arrays = [
            experts_arrays.as_numpy(value, operation, name)
            for name, value in (("gate", gate), ("up", up), ("down", down))
        ]
        if physical_to_logical_map is not None:
            logical = min((array.shape or (0,))[0] for array in arrays)
            order = experts_arrays.check_map(
                physical_to_logical_map, self.num_experts, logical
            )
            arrays = [array[order] for array in arrays]
        self._adopt(*arrays)

    def _adopt(self, gate: Array, up: Array, down: Array) -> None:
        experts, hidden = self.num_experts, self.hidden_size
        inner = self.moe_intermediate_size
        for name, array, shape in (
            ("gate", gate, (experts, inner, hidden)),
            ("up", up, (experts, inner, hidden)),
            ("down", down, (experts, hidden, inner)),
        ):
            if array.shape != shape:
                raise ValueError(
                    f"load_weights: {name} of layer {self.layer_idx} must have shape "
                    f"{shape}, got {array.shape}"
                )
        store = ExpertStore.from_arrays(
            gate, up, down, format=self.FORMATS[self.method], pool=self.cpu_infer
        )
        loaded = experts_state.LoadedExperts(store)
        experts_state.eager_state(self).loaded = loaded
        self._store_form = loaded.form
        # A copy: a step that donates the module must not take the store's own handle.
        self.store_handle.set_value(jnp.array(loaded.handle))
        self._sync_lora_weights_to_cpp(loaded)

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

    def _loaded(self) -> experts_state.LoadedExperts:
        """The weights, for an eager call."""
        if not self._weights_loaded:
            raise RuntimeError("Weights not loaded. Call load_weights() first.")
        handle = self.store_handle.get_value()
        if isinstance(handle, jax.core.Tracer):
            raise RuntimeError(
                "This method is eager, but the wrapper is traced; inside jit, grad and "
                "scan call the wrapper itself: wrapper(x, ids, w)"
            )
        return experts_state.eager_state(self).find(handle)

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
            return experts_state.forward_base(loaded.store, x, ids, w)
        loaded.register_if_changed(lora, self.lora_scaling)
        if not save_for_backward:
            return experts_state.forward_registered(loaded, self._buffer(x), x, ids, w)
        y, pullback = experts_state.forward_saving(
            loaded.store,
            lora,
            *map(experts_arrays.owned, (x, ids, w)),
            scaling=self.lora_scaling,
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
        if self._store_form is None:
            raise RuntimeError("Weights not loaded. Call load_weights() first.")
        handle = self.store_handle.get_value()
        if not isinstance(handle, jax.core.Tracer):
            experts_state.eager_state(self).find(handle)
        return moe(
            x,
            ids,
            w,
            self._store_form.store(handle),
            self.lora,
            scaling=self.lora_scaling,
            activation_policy=activation_policy,
        )

    def close(self) -> None:
        """Free the expert weights and drop the saved forwards; copies are closed too.

        The adapters stay readable. Closing twice is allowed.
        """
        state = experts_state.eager_state(self)
        state.saved.clear()
        loaded = experts_state.find_loaded(self.store_handle.get_value())
        if loaded is not None and not loaded.closed:
            loaded.close()
