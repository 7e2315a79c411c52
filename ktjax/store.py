"""The base weights of one layer of experts, in host memory, behind a handle."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ktjax import _native, backend

Array = Any

FORMATS = ("bf16",)


class Geometry(NamedTuple):
    """The static facts of a store: what shapes and residuals depend on."""

    format: str
    num_experts: int
    hidden_size: int
    intermediate_size: int


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Keeps a native store registered; closing twice is harmless."""

    epoch: int
    index: int
    finalizer: Any

    @classmethod
    def of(cls, store: ExpertStore, epoch: int, index: int) -> _Owner:
        return cls(
            epoch, index, weakref.finalize(store, _native.close_store, epoch, index)
        )


@jax.tree_util.register_pytree_node_class
class ExpertStore:
    """Frozen weights of a layer's routed experts, packed once for both passes.

    A store is a pytree with one leaf, its `handle`, so it can be an argument of jitted
    functions and its handles can be stacked for `lax.scan` over layers. Copies made by
    JAX are views: the store that `from_arrays` returned owns the memory and frees it
    when it is closed or collected. Using a closed store is an error, never a crash.

    Attributes:
      handle: `uint32[2]`, the name of the native store in this process.
      format: the storage format, "bf16".
      num_experts: experts of the layer.
      hidden_size: width of the residual stream.
      intermediate_size: width of an expert.
    """

    handle: Array

    def __init__(self, handle: Array, geometry: Geometry, owner: _Owner | None = None):
        self.handle = handle
        self._geometry = geometry
        self._owner = owner

    @classmethod
    def from_arrays(
        cls,
        gate: Array,
        up: Array,
        down: Array,
        *,
        format: str = "bf16",
        pool: backend.Pool | None = None,
    ) -> ExpertStore:
        """Packs the weights of all experts.

        The arrays may be NumPy (also memory-mapped) or JAX arrays, float32 or bfloat16;
        float32 is rounded to nearest even. They are not needed afterwards.

        Args:
          gate: `[experts, intermediate, hidden]`.
          up: `[experts, intermediate, hidden]`.
          down: `[experts, hidden, intermediate]`.
          format: storage format; "bf16".
          pool: the pool to use; None starts the default one if none is running.

        Raises:
          ValueError: unknown format, wrong shapes, or not the running pool.
          TypeError: wrong dtypes.
          MemoryError: the weights do not fit.
        """
        if format not in FORMATS:
            raise ValueError(
                f"ExpertStore: format: expected one of {sorted(FORMATS)}, got "
                f"{format!r}"
            )
        running = backend.get_pool()
        if pool is not None and pool is not running:
            raise ValueError(
                f"ExpertStore: pool: expected the running pool {running}, got {pool}; "
                "get it from ktjax.backend.get_pool()"
            )
        arrays = [np.asarray(array) for array in (gate, up, down)]
        geometry = _check(arrays, format)
        epoch, index = _native.create_store(*map(backend.native_bits, arrays))
        with jax.ensure_compile_time_eval():
            handle = jnp.array([epoch, index], jnp.uint32)
        store = cls(handle, geometry)
        store._owner = _Owner.of(store, epoch, index)
        return store

    @property
    def geometry(self) -> Geometry:
        """Format and sizes; hashable."""
        return self._geometry

    @property
    def format(self) -> str:
        """The storage format."""
        return self._geometry.format

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self._geometry.num_experts

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._geometry.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Width of an expert."""
        return self._geometry.intermediate_size

    @property
    def closed(self) -> bool:
        """Whether this owner was closed; views do not know and say False."""
        return self._owner is not None and not self._owner.finalizer.alive

    @property
    def nbytes(self) -> int:
        """Host memory of the packed weights, padding included."""
        return _native.store_bytes(*self.words())

    def dequantize(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact values that the kernels use: gate, up and down in float32."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        words = self.words()
        arrays = (
            np.empty((e, i, h), np.float32),
            np.empty((e, i, h), np.float32),
            np.empty((e, h, i), np.float32),
        )
        _native.store_dequantize(*words, *arrays)
        return arrays

    def close(self) -> None:
        """Frees the weights once the calls in flight have ended. Idempotent.

        Raises:
          RuntimeError: this is a view; close the store that `from_arrays` returned.
        """
        if self._owner is None:
            raise RuntimeError(
                "ExpertStore.close: this is a view made by JAX; close the store that "
                "ExpertStore.from_arrays returned"
            )
        self._owner.finalizer()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "view" if self._owner is None else "open"
        return f"ExpertStore({', '.join(map(str, self._geometry))}, {state})"

    def tree_flatten(self) -> tuple[tuple[Array], Geometry]:
        """One leaf, the handle; the geometry is static."""
        return (self.handle,), self._geometry

    @classmethod
    def tree_unflatten(cls, geometry: Geometry, leaves: tuple[Array]) -> ExpertStore:
        """A view: it does not own the memory."""
        return cls(leaves[0], geometry)

    def words(self) -> tuple[int, int]:
        """The handle as two integers; concrete stores only."""
        if self._owner is not None:
            return self._owner.epoch, self._owner.index
        epoch, index = np.asarray(self.handle)
        return int(epoch), int(index)


def _check(arrays: list[np.ndarray], format: str) -> Geometry:
    gate, up, down = arrays
    for name, array in zip(("gate", "up", "down"), arrays, strict=True):
        if array.ndim != 3:
            raise ValueError(
                f"ExpertStore: {name}: expected 3 dimensions, got shape {array.shape}"
            )
        if array.dtype not in (np.float32, jnp.bfloat16):
            raise TypeError(
                f"ExpertStore: {name}: expected float32 or bfloat16, got {array.dtype}"
            )
        if array.dtype != gate.dtype:
            raise TypeError(
                f"ExpertStore: {name}: expected {gate.dtype} like gate, got "
                f"{array.dtype}"
            )
    experts, intermediate, hidden = gate.shape
    if min(gate.shape) == 0:
        raise ValueError(f"ExpertStore: gate: expected sizes > 0, got {gate.shape}")
    for name, array, expected in (
        ("up", up, (experts, intermediate, hidden)),
        ("down", down, (experts, hidden, intermediate)),
    ):
        if array.shape != expected:
            raise ValueError(
                f"ExpertStore: {name}: expected {expected} to match gate "
                f"{gate.shape}, got {array.shape}"
            )
    return Geometry(format, experts, hidden, intermediate)
