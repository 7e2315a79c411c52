"""The worker pool of this process, and what the native library says of the machine."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from ktjax import _native
from ktjax.config import (
    PoolConfig,
    isa_override,
    keep_freed_memory,
    profile_enabled,
)
from ktjax.quant.formats import check_compute

if TYPE_CHECKING:
    from ktjax.lora import LoRA
    from ktjax.store import ExpertStore

Array = Any

for _name, _target in _native.targets().items():
    jax.ffi.register_ffi_target(_name, _target, platform="cpu")


@dataclasses.dataclass(frozen=True)
class Pool:
    """The process-wide worker pool.

    Attributes:
      config: threads and sub-pools.
      isa: the instruction set its kernels use.
    """

    config: PoolConfig
    isa: str


_lock = threading.Lock()
_pool: Pool | None = None


def default_pool_config() -> PoolConfig:
    """A sub-pool for every NUMA node, with a thread for every physical core."""
    facts = _native.describe()
    nodes = int(facts["numa_nodes"])
    return PoolConfig(max(1, int(facts["physical_cores"]) // nodes), nodes)


def get_pool(config: PoolConfig | None = None) -> Pool:
    """Returns the process-wide pool, starting its threads on the first call.

    Args:
      config: threads and sub-pools, or None for the running pool, whatever it is, or
        for `default_pool_config()` when there is none yet.

    Raises:
      RuntimeError: a pool with another configuration is running.
      ValueError: the threads cannot be had, or `KTJAX_ISA` asks for kernels that this
        CPU lacks.
    """
    global _pool
    with _lock:
        if _pool is None:
            wanted = config or default_pool_config()
            isa = isa_override() or ""
            _native.create_pool(wanted.threads_per_subpool, wanted.subpool_count, isa)
            _native.profile_enable(profile_enabled())
            if keep_freed_memory():
                _native.keep_freed_memory()
            _pool = Pool(wanted, _native.choose_isa(isa))
        elif config is not None and config != _pool.config:
            raise RuntimeError(
                f"the worker pool runs with {_pool.config} and cannot also run with "
                f"{config}: one process has one pool. Use the same configuration "
                "everywhere, or close all expert stores and call "
                "ktjax.backend.release_pool() first"
            )
        return _pool


def release_pool() -> None:
    """Stops the pool's threads; the next `get_pool` may use another configuration.

    Raises:
      RuntimeError: expert stores are still open.
    """
    global _pool
    with _lock:
        if _pool is not None:
            _native.release_pool()
            _pool = None


def trim_memory() -> None:
    """Return freed memory to the system, which the process keeps otherwise.

    For between phases that need memory of different kinds, as loading, compiling and
    training do: what one leaves is in pieces that the next cannot use.
    """
    ctypes.CDLL(None).malloc_trim(0)


def describe() -> dict[str, Any]:
    """Facts about this machine, without starting the pool.

    Returns:
      A dict with `cpu` (brand), `isa` and `isa_reason` (the kernels that would be used
      and why), `isas_supported`, `numa_nodes`, `physical_cores`, `threads` (CPUs this
      process may use) and `memory_bytes`.
    """
    isa = isa_override() or ""
    facts = dict(_native.describe())
    facts["isa"] = _native.choose_isa(isa)
    facts["isa_reason"] = _native.explain_isa(isa)
    facts["threads"] = len(os.sched_getaffinity(0))
    facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts


def take_profile() -> dict[str, tuple[float, int]]:
    """Seconds and calls per phase of the kernels since the last call.

    Empty unless `KTJAX_PROFILE=1` was set when the pool started.
    """
    return dict(_native.profile_take())


def native_bits(array: np.ndarray) -> np.ndarray:
    """A C-contiguous view (or copy) that the native library can take.

    bfloat16 crosses as its uint16 bits and float8 as its uint8 bits: the buffer
    protocol has no names for them.
    """
    array = np.ascontiguousarray(array)
    if array.dtype == jax.numpy.bfloat16:
        return array.view(np.uint16)
    if array.dtype == jax.numpy.float8_e4m3fn:
        return array.view(np.uint8)
    return array


def register_lora(store: ExpertStore, lora: LoRA, scaling: float) -> None:
    """Registers an adapter on a store for the calls that do not pass one.

    The library reads the arrays where they are (bfloat16 and float32 arrays on the CPU
    are not copied) and keeps them alive until another registration replaces them. Calls
    in flight finish on the adapter they began with.

    Args:
      store: the base weights.
      lora: six arrays of the layer's shapes, float32 or bfloat16.
      scaling: s = lora_alpha / lora_rank.

    Raises:
      ValueError: a wrong shape or rank.
      TypeError: a wrong dtype.
      RuntimeError: the store is closed.
    """
    lora.validate(store.num_experts, store.hidden_size, store.intermediate_size)
    arrays = [np.asarray(array) for array in lora.arrays()]
    _native.register_lora(
        *store.words(), [native_bits(array) for array in arrays], scaling, arrays
    )


class PendingForward:
    """A forward on its way; nobody else writes to its result."""

    def __init__(self, call: _native.PendingCall, y: np.ndarray) -> None:
        self._call = call
        self._y = y

    def done(self) -> bool:
        """Whether it has run, or failed."""
        return self._call.done()

    def result(self) -> np.ndarray:
        """Waits for this forward alone; may be asked again.

        Raises:
          RuntimeError, ValueError or IndexError: its error.
        """
        self._call.wait()
        return self._y


def submit_forward_registered(
    store: ExpertStore,
    x: Array,
    ids: Array,
    w: Array,
    *,
    out: np.ndarray | None = None,
    compute: Literal["bf16", "int8"] | None = None,
) -> PendingForward:
    """Queues a forward with the registered adapter (none: the base weights alone).

    Calls run one after another on the pool; the caller goes on meanwhile.

    Args:
      store: the base weights.
      x: `[tokens, hidden]`, float32 or bfloat16. Must not change before it has run.
      ids: `[tokens, k]` int32; -1 skips a slot.
      w: `[tokens, k]` float32.
      out: the array to fill, C-contiguous `[tokens, hidden]`, float32 or bfloat16; None
        = a new one like x.
      compute: as in `ktjax.moe`.

    Returns:
      What to wait for; its `result()` is the array.

    Raises:
      ValueError: wrong shapes, or a policy that the store's format does not have.
      TypeError: wrong dtypes.
      RuntimeError: the store is closed.
    """
    x, ids, w = (np.ascontiguousarray(array) for array in (x, ids, w))
    if x.ndim != 2 or x.shape[1] != store.hidden_size:
        raise ValueError(
            f"forward: x: expected [tokens, {store.hidden_size}], got {x.shape}"
        )
    y = np.empty_like(x) if out is None else out
    for name, array in (("x", x), ("out", y)):
        if array.dtype not in (np.float32, jax.numpy.bfloat16):
            raise TypeError(
                f"forward: {name}: expected float32 or bfloat16, got {array.dtype}"
            )
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype != np.int32:
        raise ValueError(
            f"forward: ids: expected int32 [{x.shape[0]}, k], got {ids.dtype} "
            f"{ids.shape}"
        )
    if w.shape != ids.shape or w.dtype != np.float32:
        raise ValueError(
            f"forward: w: expected float32 {ids.shape}, got {w.dtype} {w.shape}"
        )
    if y.shape != x.shape or not y.flags.c_contiguous:
        raise ValueError(
            f"forward: out: expected C-contiguous {x.shape}, got {y.shape} with "
            f"strides {y.strides}"
        )
    int8 = check_compute(compute, store.formats, where="forward")
    call = _native.submit_forward(
        *store.words(), native_bits(x), ids, w, native_bits(y), (x, ids, w, y), int8
    )
    return PendingForward(call, y)


def forward_registered(
    store: ExpertStore,
    x: Array,
    ids: Array,
    w: Array,
    *,
    compute: Literal["bf16", "int8"] | None = None,
) -> np.ndarray:
    """The result of `submit_forward_registered`, whose arguments and errors it has."""
    return submit_forward_registered(store, x, ids, w, compute=compute).result()
