"""Sums of experts on their way: pieces of a forward, and what layers hand on."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any, Literal

import numpy as np

from ktjax import backend
from ktjax.experts_buffer import KExpertsCPUBuffer, aligned_empty
from ktjax.store import ExpertStore

Array = np.ndarray[Any, Any]


class PendingSum:
    """A sum of experts that the native queue computes, piece by piece.

    The result is an array of its own, which nothing writes to once it is complete.
    """

    def __init__(
        self,
        store: ExpertStore,
        x: Array,
        ids: Array,
        w: Array,
        *,
        chunk: int,
        dtype: Any,
        compute: Literal["bf16", "int8"] | None,
    ) -> None:
        """Queue the pieces. The inputs are copied and may change afterwards.

        With more pieces than `KExpertsCPUBuffer.buffer_depth` this waits for the first
        ones, so that what is copied, and the kernels' scratch, is bounded by pieces.

        Args:
          store: the base weights.
          x: `[tokens, hidden]`, float32 or bfloat16.
          ids: `[tokens, k]` int32.
          w: `[tokens, k]` float32.
          chunk: the most tokens of a piece.
          dtype: of the result, float32 or bfloat16.
          compute: as in `ktjax.moe`.
        """
        self._pieces: collections.deque[
            tuple[backend.PendingForward, KExpertsCPUBuffer]
        ] = collections.deque()
        self._error: Exception | None = None
        self._sum = aligned_empty(x.shape, dtype)
        for start in range(0, len(x), chunk):
            if len(self._pieces) == KExpertsCPUBuffer.buffer_depth:
                self._collect()
            rows = slice(start, start + chunk)
            out = self._sum[rows]
            buffer = KExpertsCPUBuffer.take(len(out), x.shape[1], ids.shape[1], x.dtype)
            buffer.input_cpu[...] = x[rows]
            buffer.expert_ids_cpu[...] = ids[rows]
            buffer.weights_cpu[...] = w[rows]
            call = backend.submit_forward_registered(
                store,
                buffer.input_cpu,
                buffer.expert_ids_cpu,
                buffer.weights_cpu,
                out=out,
                compute=compute,
            )
            self._pieces.append((call, buffer))

    @property
    def shape(self) -> tuple[int, ...]:
        """`[tokens, hidden]`."""
        return self._sum.shape

    def result(self) -> Array:
        """Wait for all pieces; the sum.

        Raises:
          RuntimeError, ValueError or IndexError: the first error among them.
        """
        while self._pieces:
            self._collect()
        if self._error is not None:
            raise self._error
        return self._sum

    def _collect(self) -> None:
        call, buffer = self._pieces.popleft()
        try:
            call.result()
        except Exception as error:
            # The other pieces still run in their buffers.
            self._error = self._error or error
        buffer.give_back()


@dataclasses.dataclass(frozen=True)
class _Deferred:
    layer_idx: int
    sum: PendingSum


class DeferredSums:
    """The sums that one layer of a model hands to the next, one for every model.

    A model is known by its `weight_path`. A sum is taken exactly once; one that nobody
    took is an error, since a part of the experts would silently be missing.
    """

    _lock = threading.Lock()
    _waiting: dict[str, _Deferred] = {}  # noqa: RUF012

    @classmethod
    def take(
        cls, model: str, layer_idx: int, shape: tuple[int, ...]
    ) -> PendingSum | None:
        """What an earlier layer of `model` left for this one, or None.

        Raises:
          RuntimeError: what waits is from this or a later layer, or of another shape.
        """
        with cls._lock:
            waiting = cls._waiting.get(model)
            if waiting is None:
                return None
            if waiting.layer_idx >= layer_idx or waiting.sum.shape != shape:
                raise RuntimeError(
                    f"layer {layer_idx}: the deferred experts of layer "
                    f"{waiting.layer_idx}, of {waiting.sum.shape[0]} tokens, were not "
                    f"added by a later layer; here {shape[0]} tokens came. Set "
                    "max_deferred_experts_per_token=0 on the last layer, finish one "
                    "forward of a model before the next, and after one that was broken "
                    "off call BaseMoEWrapper.clear_buffer_cache()"
                )
            return cls._waiting.pop(model).sum

    @classmethod
    def put(cls, model: str, layer_idx: int, pending: PendingSum) -> None:
        """Leave a sum for the next layer of `model`."""
        with cls._lock:
            cls._waiting[model] = _Deferred(layer_idx, pending)

    @classmethod
    def drop(cls, model: str, layer_idx: int) -> None:
        """Forget what this layer left, if it waits."""
        with cls._lock:
            waiting = cls._waiting.get(model)
            if waiting is not None and waiting.layer_idx == layer_idx:
                del cls._waiting[model]

    @classmethod
    def clear(cls) -> None:
        """Forget all that waits."""
        with cls._lock:
            cls._waiting.clear()
