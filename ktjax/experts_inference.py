"""Inference wrapper: a layer of frozen experts, eager and asynchronous, or pure."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from ktjax import experts_arrays, experts_state
from ktjax.experts_base import BaseMoEWrapper
from ktjax.experts_load import encode_experts
from ktjax.experts_pending import DeferredSums, PendingSum
from ktjax.experts_placement import places
from ktjax.experts_state import StoreHandle
from ktjax.experts_weights import LoadsExperts, Source
from ktjax.io import converted
from ktjax.io.safetensors import Checkpoint
from ktjax.ops import grouped
from ktjax.ops.api import moe
from ktjax.quant.formats import (
    BLOCK_FORMATS,
    INT8_FORMATS,
    Encoding,
    check_method_compute,
)
from ktjax.store import ExpertStore

Array = Any
Compute = Literal["bf16", "int8"]


class Method(NamedTuple):
    """What a method's name stands for.

    Attributes:
      formats: store formats that weights may be in, the one that float weights get
        first. Weights that are stored in another of them stay as they are.
      compute: how products are computed unless the user says otherwise; "bf16" for
        layers in a format that has no "int8".
    """

    formats: tuple[str, ...]
    compute: Compute


# The kernels are those of the instruction set in use, whatever a name says.
METHODS: dict[str, Method] = {
    "AMXINT4": Method(("int4",), "int8"),
    "AMXINT8": Method(("int8",), "int8"),
    "MOE_INT4": Method(("int4",), "int8"),
    "MOE_INT8": Method(("int8",), "int8"),
    "RAWINT4": Method(("rawint4", "int4_kgroup"), "int8"),
    "GPTQ_INT4": Method(("int4_kgroup", "int4"), "int8"),
    "FP8": Method(("fp8_block", "fp8_channel"), "bf16"),
    "FP8_PERCHANNEL": Method(("fp8_channel",), "bf16"),
    "MXFP4": Method(("mxfp4",), "bf16"),
    "MXFP8": Method(("mxfp8",), "bf16"),
    "BF16": Method(("bf16",), "bf16"),
    # What a GGUF file has, as it has it.
    "LLAMAFILE": Method(("bf16", *BLOCK_FORMATS), "int8"),
}


class AcceleratorExperts(nnx.Variable):
    """Weights of the experts that an accelerator computes: frozen, never trained."""


@dataclasses.dataclass
class _Forward:
    """An eager forward on its way: sums to add, and what the caller gets."""

    shape: tuple[int, ...]
    dtype: Any
    sums: list[PendingSum]
    accelerated: jax.Array | None

    def result(self) -> jax.Array:
        parts = [pending.result() for pending in self.sums]
        if self.accelerated is not None:
            return _rounded_sum([*parts, self.accelerated], self.dtype, self.shape)
        total = functools.reduce(np.add, parts)
        return jnp.asarray(total.astype(self.dtype, copy=False).reshape(self.shape))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded_sum(parts: list[Array], dtype: Any, shape: tuple[int, ...]) -> jax.Array:
    """Float32 arrays, added in their order, where the accelerator's part is."""
    return functools.reduce(jnp.add, parts).astype(dtype).reshape(shape)


class InferenceMoEWrapper(LoadsExperts, BaseMoEWrapper):
    """Inference of one layer of experts whose weights stay in host memory.

    `forward`, and `submit_forward` with `sync_forward`, are eager. `wrapper(x, ids, w)`
    is the same sum as a pure function, for jit.

    Eager forwards run one after another on the worker pool, behind the caller's back.
    Inputs are copied, and every result is an array of its own: nothing that somebody
    holds is ever written to again, however many forwards of however many layers are in
    flight.

    **Deferred experts.** With D = `max_deferred_experts_per_token` > 0, layer l of the
    eager path gives

        y_l = Σ over the slots of now of w d(x_l) + Σ over the later slots of layer l'

    where l' is the layer of the model before it and `select_deferred_experts(ids, w, k
    - D)` divides the slots: what a layer defers is added, unchanged, by the next layer
    of the same `weight_path` that computes, and only then must it be ready. Both sums
    are float32 and rounded once. The last layer must defer nothing. With D = 0, and
    nothing deferred before, y_l has the bits of the plain forward.

    **Placement.** The experts in `gpu_experts` leave the store. They are bfloat16
    arrays with the same values on JAX's default device, where XLA computes them; the
    eager path adds the sums in float32 and rounds once.

    Attributes:
      method: a key of `METHODS`.
      compute: "bf16" or "int8", as in `ktjax.moe`; with loaded weights, what they are
        computed with.
      gpu_gate: `AcceleratorExperts` `[gpu experts, intermediate, hidden]` bfloat16, or
        None without such experts, as are `gpu_up` and `gpu_down`, which is `[gpu
        experts, hidden, intermediate]`.

    Args:
      method: storage format and default of `compute`.
      group_size: method "GPTQ_INT4" only: 32, 64 or 128 depths to a scale; None = what
        the weights have, or else 128.
      zero_point: method "GPTQ_INT4" only: quantise with zero points.
      compute: how products are computed; None = as the method says.
      others: see `BaseMoEWrapper`.

    Raises:
      ValueError: an unknown method, an option that it does not have, or a setting
        outside its limits.
      RuntimeError: the worker pool already runs with another configuration.
    """

    gpu_gate: AcceleratorExperts | None
    gpu_up: AcceleratorExperts | None
    gpu_down: AcceleratorExperts | None

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
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        *,
        group_size: int | None = None,
        zero_point: bool = False,
        compute: Compute | None = None,
        gpu_experts_mask: Array | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                f"Unsupported method: {method}. Supported methods: {sorted(METHODS)}"
            )
        formats, usual = METHODS[method]
        Encoding.of(formats[0], group_size, zero_point, where=method)
        check_method_compute(compute, formats, where=method)
        if cpu_save and method == "LLAMAFILE":
            raise ValueError(
                "cpu_save must be False for method 'LLAMAFILE': a GGUF file loads "
                "without a conversion, so there is nothing to save"
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
            cpu_save,
            max_deferred_experts_per_token,
            gpu_experts_mask=gpu_experts_mask,
        )
        self.method = method
        self.group_size = group_size
        self.zero_point = zero_point
        self._chosen_compute = compute
        self.compute: Compute = compute or usual
        self.store_handle = StoreHandle(jnp.zeros(2, jnp.uint32))
        self._store_form: experts_state.StoreForm | None = None
        on_gpu = set(self.gpu_experts)
        self._cpu_experts = tuple(p for p in range(num_experts) if p not in on_gpu)
        for name in ("gpu_gate", "gpu_up", "gpu_down"):
            setattr(self, name, nnx.data(None))

    @property
    def _formats(self) -> tuple[str, ...]:
        return METHODS[self.method].formats

    def load_weights_from_tensors(
        self,
        gate_proj: Array,
        up_proj: Array,
        down_proj: Array,
        physical_to_logical_map: Array | None = None,
    ) -> None:
        """`load_weights_from_arrays` under kt-kernel's name.

        With `cpu_save` the converted weights are written to disk as well, from where
        `load_weights` takes them where there is no checkpoint.
        """
        self.load_weights_from_arrays(
            gate_proj, up_proj, down_proj, physical_to_logical_map
        )

    @property
    def saved_weights(self) -> Path:
        """The file that `cpu_save` writes and `load_weights` looks for.

        In a directory `ktjax-FORMAT` in `weight_path`, or beside it where that is a
        file. The layout is that of `ktjax.io.converted`.
        """
        path, folder = Path(self.weight_path), f"ktjax-{self._formats[0]}"
        if path.is_file():
            folder = f"{path.name}.{folder}"
            path = path.parent
        return path / folder / converted.layer_file(self.layer_idx)

    def _source(self) -> Source:
        """Saved experts where they are those of the checkpoint, else the checkpoint."""
        if self._keeps_blocks:
            return super()._source()
        saved = self.saved_weights
        try:
            checkpoint = self._open()
        except FileNotFoundError:
            if not saved.is_file():
                raise
            return self._read(Checkpoint(saved))
        source = self._read(checkpoint)
        if isinstance(checkpoint, Checkpoint) and converted.has_converted(
            checkpoint, self.layer_idx
        ):
            return source
        if not (self.cpu_save or saved.is_file()):
            return source
        made_from = converted.fingerprint(checkpoint)
        if saved.is_file():
            file = Checkpoint(saved)
            if converted.source_of(file, self.layer_idx) == made_from:
                return self._read(file)
        return self._save(source, made_from) if self.cpu_save else source

    def _keep(self, source: Source) -> Source:
        return self._save(source, "") if self.cpu_save else source

    def _save(self, source: Source, made_from: str) -> Source:
        """Write all experts of the source in the method's format; they, as saved."""
        weights = encode_experts(
            source(None),
            self._formats,
            self.group_size,
            self.zero_point,
            where=f"load_weights: layer {self.layer_idx}",
        )
        saved = self.saved_weights
        saved.parent.mkdir(parents=True, exist_ok=True)
        converted.write_layer(
            saved, self.layer_idx, weights.encoding, weights.arrays(), made_from
        )
        return self._read(Checkpoint(saved), weights.shape[0])

    def _load(self, source: Source, order: list[int] | None) -> None:
        if not self.gpu_experts:
            super()._load(source, order)
            return
        slots = list(range(self.num_experts)) if order is None else order
        # A store has an expert; where the accelerator has them all, one is unused here.
        here = [slots[p] for p in self._cpu_experts or (0,)]
        store = self._pack(source(here), len(here))
        matrices: list[list[Array]] = [[], [], []]
        for slot in self.gpu_experts:
            # As the kernels would have it; one at a time, since these are float32.
            with self._pack(source([slots[slot]]), 1) as one:
                for matrix, (values,) in zip(matrices, one.dequantize(), strict=True):
                    matrix.append(values.astype(ml_dtypes.bfloat16))
        self._adopt(store)
        for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
            value = jnp.asarray(np.stack(matrix))
            setattr(self, f"gpu_{name}", AcceleratorExperts(value))

    def _adopt(self, store: ExpertStore) -> experts_state.LoadedExperts:
        usual = METHODS[self.method].compute
        if self._chosen_compute is None:
            self.compute = usual if set(store.formats) <= set(INT8_FORMATS) else "bf16"
        return super()._adopt(store)

    def forward(
        self, hidden_states: Array, expert_ids: Array, weights: Array
    ) -> jax.Array:
        """The routed experts' sum; eager.

        Args:
          hidden_states: `[..., hidden]`, float32 or bfloat16; a NumPy or JAX array or a
            tensor of another library, as are the others.
          expert_ids: `[..., k]` integers within -1..experts - 1; -1 skips a slot.
          weights: `[..., k]` floats, the routing weights.

        Returns:
          `[..., hidden]` in the dtype of hidden_states. More than
          `chunked_prefill_size` tokens are computed in pieces, with the same result:
          the same bits, or, with `compute="bf16"` on quantised weights, the same to
          the rounding of sums in float32.

        Raises:
          RuntimeError: weights not loaded, the wrapper is closed, an argument is
            traced, or deferred experts of another forward wait.
          ValueError: an argument's shape, dtype or value.
        """
        return self._start(hidden_states, expert_ids, weights, "forward").result()

    def submit_forward(
        self, hidden_states: Array, expert_ids: Array, weights: Array
    ) -> None:
        """Start a forward and return; see `forward` for arguments and errors.

        With more than two pieces of `chunked_prefill_size` tokens it returns when the
        last two are queued. Several forwards may be in flight.
        """
        forward = self._start(hidden_states, expert_ids, weights, "submit_forward")
        experts_state.eager_state(self).submitted.append(forward)

    def sync_forward(self) -> jax.Array:
        """Wait for the oldest forward of this wrapper that was submitted; its sum.

        It waits for that forward alone, not for what it deferred, nor for others.

        Raises:
          RuntimeError: nothing was submitted; or the forward's own error.
        """
        submitted = experts_state.eager_state(self).submitted
        if not submitted:
            raise RuntimeError("No forward in flight. Call submit_forward() first.")
        return submitted.popleft().result()

    def _start(
        self, hidden_states: Array, expert_ids: Array, weights: Array, operation: str
    ) -> _Forward:
        store = self._loaded().store
        x = experts_arrays.check_activations(
            hidden_states, self.hidden_size, operation, "hidden_states"
        )
        k = self.num_experts_per_tok
        slots = (*x.shape[:-1], k)
        ids = experts_arrays.check_ids(expert_ids, slots, self.num_experts, operation)
        w = experts_arrays.check_routing(weights, slots, operation)
        rows = x.reshape(-1, self.hidden_size)
        ids, w = ids.reshape(-1, k), w.reshape(-1, k)

        handed = DeferredSums.take(self.weight_path, self.layer_idx, rows.shape)
        now, later = ids, None
        if self.max_deferred_experts_per_token:
            protected = k - self.max_deferred_experts_per_token
            divided = self.select_deferred_experts(ids, w, protected)
            now, later = map(np.asarray, divided)
        if self.gpu_experts:
            table = places(self.num_experts, self._cpu_experts)
            now = table[now]
            later = None if later is None else table[later]
        alone = handed is None and later is None and not self.gpu_experts

        def submit(chosen: Array) -> PendingSum:
            return PendingSum(
                *(store, rows, chosen, w),
                chunk=self.chunked_prefill_size,
                dtype=rows.dtype if alone else np.float32,
                compute=self.compute,
            )

        # First the accelerator, which needs a thread of the host for a moment only: the
        # pool takes all of them.
        accelerated = None
        if self.gpu_experts:
            table = places(self.num_experts, self.gpu_experts)
            accelerated = grouped.moe(
                *map(jnp.asarray, (rows, table[ids], w)), *self._gpu_weights()
            )
        sums = [submit(now)] + ([] if handed is None else [handed])
        if later is not None:
            DeferredSums.put(self.weight_path, self.layer_idx, submit(later))
        return _Forward(x.shape, x.dtype, sums, accelerated)

    def _gpu_weights(self) -> tuple[Array, Array, Array]:
        assert self.gpu_gate is not None
        assert self.gpu_up is not None
        assert self.gpu_down is not None
        return (
            self.gpu_gate.get_value(),
            self.gpu_up.get_value(),
            self.gpu_down.get_value(),
        )

    def __call__(self, x: Array, ids: Array, w: Array) -> jax.Array:
        """The routed experts' sum; pure, for jit.

        Nothing is deferred or cut in pieces here; `select_deferred_experts` is pure
        too. XLA overlaps the call with what does not depend on it.

        Args:
          x: `[..., hidden]`, float32 or bfloat16.
          ids: `[..., k]` int32; -1 skips a slot.
          w: `[..., k]` float32 routing weights.

        Returns:
          `[..., hidden]` in the dtype of x.

        Raises:
          RuntimeError: weights not loaded; or, outside of jit, wrapper closed.
        """
        store = self._store()
        if not self.gpu_experts:
            return moe(x, ids, w, store, compute=self.compute)
        ids = jnp.asarray(ids)
        cpu_ids = self._places(ids, self._cpu_experts)
        gpu_ids = self._places(ids, self.gpu_experts)
        here = moe(x, cpu_ids, w, store, compute=self.compute)
        there = grouped.moe(x, gpu_ids, w, *self._gpu_weights())
        return (here.astype(jnp.float32) + there).astype(here.dtype)

    def _places(self, ids: Array, chosen: tuple[int, ...]) -> Array:
        """`ids` as places among `chosen`; out of range they stay, to be refused."""
        inside = (ids >= -1) & (ids < self.num_experts)
        table = jnp.asarray(places(self.num_experts, chosen))
        return jnp.where(inside, table[jnp.where(inside, ids, -1)], ids)

    def close(self) -> None:
        """Free the expert weights, and drop what the layer deferred; copies close too.

        Forwards in flight end, and `sync_forward` still gives them. Closing twice is
        allowed.
        """
        DeferredSums.drop(self.weight_path, self.layer_idx)
        super().close()

    def __getstate__(self) -> NoReturn:
        # Only pickle comes here; copies and clones go by split and merge.
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its expert weights live in this "
            "process's memory. Build a new wrapper where it is needed and load its "
            "weights there; cpu_save=True makes that quick."
        )
