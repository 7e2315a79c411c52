"""What the eager methods of a wrapper remember between calls.

None of it may be an attribute of the module: a module's attributes become the key of
jit's caches, which would keep gigabytes of weights alive, and a counter there would
make every step compile anew. So it lives here, beside the module.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import weakref
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax import backend
from ktjax.experts_buffer import KExpertsSFTBuffer
from ktjax.lora import LoRA
from ktjax.ops.api import moe
from ktjax.store import ExpertStore

Array = Any


class StoreHandle(nnx.Variable):
    """The `uint32[2]` handle of a store: neither Param nor LoRAParam.

    It is state, so it may be split, stacked over layers and scanned; optimizers and
    gradients, which ask for parameters, pass it by.
    """


@dataclasses.dataclass(frozen=True)
class StoreForm:
    """What turns a handle into a store again: static, hashable, owns nothing."""

    treedef: Any

    def store(self, handle: Array) -> Any:
        """A view of the store behind `handle`, which may be a tracer."""
        return jax.tree.unflatten(self.treedef, [handle])


class LoadedExperts:
    """The owner of one expert store, and the adapter registered for it.

    Every wrapper that has the store's handle holds this object; the weights go with the
    last of them, or with `close`.

    Attributes:
      store: the store.
      handle: its `uint32[2]` handle, and `key` the same as integers.
      form: how to make a view of the store from a handle.
      closed: whether `close` was called.
    """

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        (self.handle,), treedef = jax.tree.flatten(store)
        self.key = _key(self.handle)
        self.form = StoreForm(treedef)
        self.closed = False
        self._registered: tuple[jax.Array, ...] = ()
        self._lock = threading.Lock()
        _LOADED[self.key] = self

    def close(self) -> None:
        """Free the weights; every copy of the wrapper is closed with them."""
        self.closed = True
        self._registered = ()
        self.store.close()

    def register(self, lora: LoRA, scaling: float) -> None:
        """Hand the adapter's arrays to the backend in place of the earlier ones."""
        with self._lock:
            backend.register_lora(self.store, lora, scaling)
            self._registered = lora.arrays()

    def register_if_changed(self, lora: LoRA, scaling: float) -> None:
        """`register`, unless these very arrays are the registered ones."""
        arrays = lora.arrays()
        if len(self._registered) != len(arrays) or any(
            old is not new for old, new in zip(self._registered, arrays, strict=True)
        ):
            self.register(lora, scaling)


# Weak, so that it keeps no weights alive: the wrappers' EagerState objects own them.
_LOADED: weakref.WeakValueDictionary[tuple[int, int], LoadedExperts] = (
    weakref.WeakValueDictionary()
)


def find_loaded(handle: Array) -> LoadedExperts | None:
    """The weights behind a concrete handle, or None where they are gone."""
    return _LOADED.get(_key(handle))


def _key(handle: Array) -> tuple[int, int]:
    epoch, index = np.asarray(handle).tolist()
    return epoch, index


@dataclasses.dataclass
class SavedForward:
    """One forward that awaits its backward; the values in it belong to nobody else."""

    shape: tuple[int, ...]
    dtype: Any
    pullback: Any


@dataclasses.dataclass
class EagerState:
    """The eager side of one wrapper object.

    Attributes:
      loaded: the weights, owned together with the wrapper's copies.
      saved: forwards that await their backward, the newest last.
      grad_weights: the routing weights' gradient of the last backward.
      submitted: inference forwards that await their sync, the oldest first.
    """

    loaded: LoadedExperts | None = None
    saved: list[SavedForward] = dataclasses.field(default_factory=list)
    grad_weights: jax.Array | None = None
    submitted: collections.deque[Any] = dataclasses.field(
        default_factory=collections.deque
    )

    def find(self, handle: Array) -> LoadedExperts:
        """The weights behind a concrete handle, and become one of their owners.

        Raises:
          RuntimeError: they are closed, or their last owner is gone.
        """
        key = _key(handle)
        if self.loaded is None or self.loaded.key != key:
            self.loaded = find_loaded(handle)
        if self.loaded is None:
            raise RuntimeError(
                "The expert weights behind this wrapper are gone: it came from a split "
                "or a saved state, and the wrapper that loaded them no longer exists. "
                "Keep that one, or call load_weights() here."
            )
        if self.loaded.closed:
            raise RuntimeError(
                "This wrapper is closed. Call load_weights() to load its weights again."
            )
        return self.loaded


_STATES: weakref.WeakKeyDictionary[nnx.Module, EagerState] = weakref.WeakKeyDictionary()
_states_lock = threading.Lock()


def eager_state(module: nnx.Module) -> EagerState:
    """The eager state of this very object; a merged or cloned one has its own."""
    with _states_lock:
        return _STATES.setdefault(module, EagerState())


Compute = Literal["bf16", "int8"] | None


@functools.partial(jax.jit, static_argnames=("scaling", "compute"))
def forward_saving(
    store: ExpertStore,
    lora: LoRA,
    x: Array,
    ids: Array,
    w: Array,
    *,
    scaling: float,
    compute: Compute,
) -> tuple[jax.Array, Any]:
    """The output, and its pullback to (x, w, lora): a pytree of the residuals."""

    def forward(x: Array, w: Array, lora: LoRA) -> jax.Array:
        return moe(x, ids, w, store, lora, scaling=scaling, compute=compute)

    return jax.vjp(forward, x, w, lora)


@jax.jit
def pull_back(pullback: Any, grad_output: Array) -> tuple[jax.Array, jax.Array, LoRA]:
    """The gradients of x, w and lora."""
    return pullback(grad_output)


@functools.partial(jax.jit, static_argnames="compute")
def forward_base(
    store: ExpertStore, x: Array, ids: Array, w: Array, *, compute: Compute
) -> jax.Array:
    """The output of the base weights alone."""
    return moe(x, ids, w, store, compute=compute)


def forward_registered(
    loaded: LoadedExperts,
    buffer: KExpertsSFTBuffer,
    x: np.ndarray[Any, Any],
    ids: np.ndarray[Any, Any],
    w: np.ndarray[Any, Any],
    *,
    compute: Compute,
) -> jax.Array:
    """The forward with the registered adapter, in staging memory; keeps nothing."""
    tokens = x.size // x.shape[-1]
    with buffer.lock:
        rows, slots = buffer.input_cpu[:tokens], buffer.expert_ids_cpu[:tokens]
        shares = buffer.weights_cpu[:tokens]
        rows[...] = x.reshape(rows.shape)
        slots[...] = ids.reshape(slots.shape)
        shares[...] = w.reshape(shares.shape)
        y = backend.forward_registered(
            loaded.store, rows, slots, shares, compute=compute
        )
    return jnp.asarray(y).reshape(x.shape)
