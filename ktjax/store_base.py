"""What the stores of frozen weights share: a handle, and who owns the memory."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ktjax import _native, backend

Array = Any


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Keeps a native store registered; closing twice is harmless."""

    epoch: int
    index: int
    finalizer: Any


class FrozenStore:
    """Weights in host memory behind a handle: a pytree whose only leaf is that handle.

    So a store can be an argument of jitted functions and its handles can be stacked for
    `lax.scan` over layers. Copies made by JAX are views: the store that was built owns
    the memory and frees it when it is closed or collected. Using a closed store is an
    error, never a crash.

    Attributes:
      handle: `uint32[2]`, the name of the native store in this process.
    """

    handle: Array

    def __init__(self, handle: Array, geometry: Any, owner: _Owner | None = None):
        self.handle = handle
        self._geometry = geometry
        self._owner = owner

    @classmethod
    def _own(cls, words: tuple[int, int], geometry: Any) -> Self:
        """The owner of the native store with the handle `words`."""
        with jax.ensure_compile_time_eval():
            handle = jnp.array(words, jnp.uint32)
        store = cls(handle, geometry)
        finalizer = weakref.finalize(store, _native.close_store, *words)
        store._owner = _Owner(*words, finalizer)
        return store

    @property
    def format(self) -> str:
        """The storage format."""
        return self._geometry.format

    @property
    def group_size(self) -> int:
        """Depths that share a scale; 0 = a whole row does, or there is none."""
        return self._geometry.group_size

    @property
    def zero_point(self) -> bool:
        """Whether the groups have zero points."""
        return self._geometry.zero_point

    @property
    def closed(self) -> bool:
        """Whether this owner was closed; views do not know and say False."""
        return self._owner is not None and not self._owner.finalizer.alive

    @property
    def nbytes(self) -> int:
        """Host memory of the packed weights: codes, scales and zeros, with padding."""
        return _native.store_bytes(*self.words())

    def close(self) -> None:
        """Frees the weights once the calls in flight have ended. Idempotent.

        Raises:
          RuntimeError: this is a view; close the store that was built.
        """
        if self._owner is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.close: this is a view made by JAX; close the store that "
                f"{name} built from arrays"
            )
        self._owner.finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "view" if self._owner is None else "open"
        name = type(self).__name__
        return f"{name}({', '.join(map(str, self._geometry))}, {state})"

    def tree_flatten(self) -> tuple[tuple[Array], Any]:
        """One leaf, the handle; the geometry is static."""
        return (self.handle,), self._geometry

    @classmethod
    def tree_unflatten(cls, geometry: Any, leaves: tuple[Array]) -> Self:
        """A view: it does not own the memory."""
        return cls(leaves[0], geometry)

    def words(self) -> tuple[int, int]:
        """The handle as two integers; concrete stores only."""
        if self._owner is not None:
            return self._owner.epoch, self._owner.index
        epoch, index = np.asarray(self.handle)
        return int(epoch), int(index)


def check_pool(pool: backend.Pool | None, *, where: str) -> None:
    """Starts the default pool if none is running.

    Raises:
      ValueError: `pool` is not the running one; `where` begins the message.
    """
    running = backend.get_pool()
    if pool is not None and pool is not running:
        raise ValueError(
            f"{where}: pool: expected the running pool {running}, got {pool}; "
            "get it from ktjax.backend.get_pool()"
        )


def check_handle(handle: Array, kind: type[FrozenStore], *, where: str) -> None:
    """Whether `handle` can be that of a store.

    Raises:
      ValueError: it cannot; `where` begins the message.
    """
    if handle.shape != (2,) or handle.dtype != jnp.uint32:
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{where}: store: expected {article} {kind.__name__} or its handle, "
            f"uint32[2], got {handle.dtype}{list(handle.shape)}"
        )
