"""Modules around a store of frozen weights: the handle is state, the memory is not."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.experts_state import StoreForm, StoreHandle
from ktjax.store_base import FrozenStore

# Who keeps a store's memory alive. Not an attribute of the module: attributes become
# part of jit's cache keys, which would hold gigabytes of weights after the last module.
_STORES: weakref.WeakKeyDictionary[nnx.Module, FrozenStore] = (
    weakref.WeakKeyDictionary()
)


class Stored(nnx.Module):
    """A module that keeps its store alive; `close` frees it.

    Copies that nnx makes of the module (`merge`, `clone`) have the handle only: keep
    the module that was built as long as they are in use.

    Attributes:
      handle: the store's handle, a `StoreHandle`.
    """

    def _hold(self, store: FrozenStore) -> None:
        """Become the owner of `store`."""
        _STORES[self] = store
        (handle,), structure = jax.tree.flatten(store)
        self._form = StoreForm(structure)
        # A copy: a step that donates the module must not take the store's own handle.
        self.handle = StoreHandle(jnp.array(handle))

    @property
    def store(self) -> Any:
        """The store behind the handle, which may be a tracer: a view, no owner."""
        return self._form.store(self.handle[...])

    def close(self) -> None:
        """Free the store; every later call is an error.

        Raises:
          RuntimeError: this is a copy; close the module that was built.
        """
        _STORES.get(self, self.store).close()
