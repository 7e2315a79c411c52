"""Base weights of a wrapper: from a checkpoint or arrays to a store behind a handle."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax import experts_arrays, experts_state
from ktjax.experts_base import _MoEBase
from ktjax.experts_load import check_sizes, encoding_of, make_store
from ktjax.io.experts import ExpertWeights, read_experts
from ktjax.io.gguf import GGUFCheckpoint, is_gguf
from ktjax.io.gguf_experts import read_gguf_experts
from ktjax.io.safetensors import Checkpoint
from ktjax.quant.formats import BLOCK_FORMATS, Quantized, check_compute
from ktjax.store import ExpertStore

Array = Any

# Gives the experts of a layer in the order asked for; None = all, each in its place.
Source = Callable[[list[int] | None], ExpertWeights]


class LoadsExperts(_MoEBase, nnx.Module):
    """What wrappers of both modes do with their base weights.

    A mixin: the class that it is mixed into sets the attributes below.

    Attributes:
      layer_idx, num_experts, hidden_size, moe_intermediate_size, weight_path: as given.
      method: the wrapper's method, which begins errors.
      group_size, zero_point: options of the storage format.
      _chosen_compute: the user's `compute`, or None.
      store_handle: the `uint32[2]` handle, an nnx.Variable.
    """

    layer_idx: int
    num_experts: int
    hidden_size: int
    moe_intermediate_size: int
    weight_path: str
    method: str
    group_size: int | None
    zero_point: bool
    _chosen_compute: Literal["bf16", "int8"] | None
    store_handle: experts_state.StoreHandle
    _store_form: experts_state.StoreForm | None

    @property
    @abc.abstractmethod
    def _formats(self) -> tuple[str, ...]:
        """Store formats of the method, the one that float weights get first."""

    def load_weights(self, physical_to_logical_map: Array | None = None) -> None:
        """Load layer `layer_idx` of the checkpoint at `weight_path`.

        A checkpoint in a format of the method is taken as it is; float weights are
        quantised. One that is quantised in another format is quantised again, from its
        exact values and with a warning. Loading again replaces the weights. The
        checkpoint may be in GGUF; methods that keep GGUF's blocks want no other.

        Args:
          physical_to_logical_map: `[num_experts]` integers: slot p holds expert map[p];
            None = every expert in its own place.

        Raises:
          FileNotFoundError: there is no checkpoint at `weight_path`.
          KeyError: it has no experts for this layer.
          ValueError: a bad map, tensors that do not have the wrapper's sizes, what
            `ExpertStore.from_arrays` refuses, no GGUF where the method wants it, or
            weights in a format that does not have the wrapper's `compute`.
        """
        order = None
        if physical_to_logical_map is not None:
            order = experts_arrays.check_map(
                physical_to_logical_map, self.num_experts, self.num_experts
            )
        self._load(self._source(), order)

    def load_weights_from_arrays(
        self,
        gate: Array | Quantized,
        up: Array | Quantized,
        down: Array | Quantized,
        physical_to_logical_map: Array | None = None,
    ) -> None:
        """Load the base weights from arrays, float32 or bfloat16, which are quantised.

        Or all three are `ktjax.Quantized` in a format of the method; where it has
        several, shape and dtype of the scales say which.

        Args:
          gate: `[experts, intermediate, hidden]`.
          up: `[experts, intermediate, hidden]`.
          down: `[experts, hidden, intermediate]`.
          physical_to_logical_map: `[num_experts]` integers: slot p holds expert map[p];
            None = every expert in its own place.

        Raises:
          ValueError: a bad map, or arrays that do not have the wrapper's sizes.
        """
        matrices = (gate, up, down)
        given = [
            experts_arrays.as_weights(value, "load_weights_from_arrays", name)
            for name, value in zip(("gate", "up", "down"), matrices, strict=True)
        ]
        encoding = encoding_of(
            given[0],
            self._formats,
            self.group_size,
            self.zero_point,
            depth=self.hidden_size,
            where=self.method,
        )
        weights = ExpertWeights(encoding, *given)
        order = None
        if physical_to_logical_map is None:
            self._check_sizes(weights, self.num_experts)
        else:
            order = experts_arrays.check_map(
                physical_to_logical_map,
                self.num_experts,
                min(experts_arrays.count_experts(matrix) for matrix in given),
            )
        self._load(
            self._keep(lambda order: weights if order is None else weights.take(order)),
            order,
        )

    def _source(self) -> Source:
        """The experts of the layer in the checkpoint."""
        return self._read(self._open())

    @property
    def _keeps_blocks(self) -> bool:
        """Whether the method is one of GGUF's."""
        return not set(BLOCK_FORMATS).isdisjoint(self._formats)

    def _open(self) -> Checkpoint | GGUFCheckpoint:
        """The checkpoint at `weight_path`."""
        if is_gguf(self.weight_path):
            return GGUFCheckpoint(self.weight_path)
        checkpoint = Checkpoint(self.weight_path)
        if self._keeps_blocks:
            raise ValueError(
                f"load_weights: method {self.method!r} reads GGUF: expected a .gguf "
                f"file or a directory of them as weight_path, got {self.weight_path!r}"
            )
        return checkpoint

    def _read(
        self, checkpoint: Checkpoint | GGUFCheckpoint, experts: int | None = None
    ) -> Source:
        """The experts of the layer in this checkpoint, which has so many."""
        if isinstance(checkpoint, GGUFCheckpoint):
            return lambda order: read_gguf_experts(
                checkpoint,
                self.layer_idx,
                experts or self.num_experts,
                physical_to_logical_map=order,
            )
        return lambda order: read_experts(
            checkpoint,
            self.layer_idx,
            experts or self.num_experts,
            physical_to_logical_map=order,
        )

    def _keep(self, source: Source) -> Source:
        """A place for subclasses to keep arrays that were given."""
        return source

    def _load(self, source: Source, order: list[int] | None) -> None:
        """Make the experts `order` of the source the wrapper's weights."""
        self._adopt(self._pack(source(order), self.num_experts))

    def _pack(self, weights: ExpertWeights, experts: int) -> ExpertStore:
        self._check_sizes(weights, experts)
        where = f"load_weights: layer {self.layer_idx}"
        store = make_store(
            weights,
            self._formats,
            self.group_size,
            self.zero_point,
            pool=self.cpu_infer,
            where=where,
        )
        try:
            check_compute(self._chosen_compute, store.formats, where=where)
        except ValueError:
            store.close()
            raise
        return store

    def _check_sizes(self, weights: ExpertWeights, experts: int) -> None:
        check_sizes(
            weights,
            experts,
            self.hidden_size,
            self.moe_intermediate_size,
            where=f"layer {self.layer_idx}",
        )

    def _adopt(self, store: ExpertStore) -> experts_state.LoadedExperts:
        loaded = experts_state.LoadedExperts(store)
        experts_state.eager_state(self).loaded = loaded
        self._store_form = loaded.form
        # A copy: a step that donates the module must not take the store's own handle.
        self.store_handle.set_value(jnp.array(loaded.handle))
        return loaded

    def _loaded(self) -> experts_state.LoadedExperts:
        """The weights, for an eager call."""
        if self._store_form is None:
            raise RuntimeError("Weights not loaded. Call load_weights() first.")
        handle = self.store_handle.get_value()
        if isinstance(handle, jax.core.Tracer):
            raise RuntimeError(
                "This method is eager, but the wrapper is traced; inside jit, grad and "
                "scan call the wrapper itself: wrapper(x, ids, w)"
            )
        return experts_state.eager_state(self).find(handle)

    def _store(self) -> ExpertStore:
        """A view of the store, for a pure call.

        Raises:
          RuntimeError: weights not loaded; or, outside of jit, wrapper closed.
        """
        if self._store_form is None:
            raise RuntimeError("Weights not loaded. Call load_weights() first.")
        handle = self.store_handle.get_value()
        if not isinstance(handle, jax.core.Tracer):
            experts_state.eager_state(self).find(handle)
        return self._store_form.store(handle)

    def close(self) -> None:
        """Free the expert weights; copies of the wrapper are closed too.

        Forwards in flight end. Closing twice is allowed.
        """
        loaded = experts_state.find_loaded(self.store_handle.get_value())
        if loaded is not None and not loaded.closed:
            loaded.close()
