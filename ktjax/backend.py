"""The worker pool of this process, and what the native library says of the machine."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

import jax
import numpy as np

from ktjax import _native
from ktjax.config import PoolConfig, isa_override, profile_enabled

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


def get_pool(config: PoolConfig | None = None) -> Pool:
    """Returns the process-wide pool, starting its threads on the first call.

    Args:
      config: threads and sub-pools, or None for the running pool, whatever it is, or
        for a thread on every CPU when there is none yet.

    Raises:
      RuntimeError: a pool with another configuration is running.
      ValueError: the threads cannot be had, or `KTJAX_ISA` asks for kernels that this
        CPU lacks.
    """
    global _pool
    with _lock:
        if _pool is None:
            wanted = config or PoolConfig.default()
            isa = isa_override() or ""
            _native.create_pool(wanted.threads_per_subpool, wanted.subpool_count, isa)
            _native.profile_enable(profile_enabled())
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


def describe() -> dict[str, Any]:
    """Facts about this machine, without starting the pool.

    Returns:
      A dict with `cpu` (brand), `isa` and `isa_reason` (the kernels that would be used
      and why), `isas_supported`, `numa_nodes`, `threads` (CPUs this process may use) and
      `memory_bytes`.
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

    bfloat16 crosses as its uint16 bits: the buffer protocol has no name for it.
    """
    array = np.ascontiguousarray(array)
    if array.dtype == jax.numpy.bfloat16:
        return array.view(np.uint16)
    return array
