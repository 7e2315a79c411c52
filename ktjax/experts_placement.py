"""Which experts of a layer an accelerator computes, and which the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktjax.experts_arrays import as_numpy

Array = Any


def generate_gpu_experts_masks(
    activation_freq: Array, num_gpu_experts: int
) -> np.ndarray[Any, Any]:
    """The most used experts of a whole model, as a mask for every layer.

    Of equal frequencies the earlier layer, then the earlier expert, is taken.

    Args:
      activation_freq: `[layers, experts]` real numbers, how often each is used.
      num_gpu_experts: how many to choose over all layers, 0 to layers * experts.

    Returns:
      `[layers, experts]` bool; True = on the accelerator. A row is the
      `gpu_experts_mask` of that layer's wrapper.

    Raises:
      ValueError: another number of dimensions, NaN, or a count outside its range.
    """
    operation = "generate_gpu_experts_masks"
    freq = as_numpy(activation_freq, operation, "activation_freq")
    if freq.ndim != 2:
        raise ValueError(
            f"{operation}: activation_freq must be [layers, experts], got shape "
            f"{freq.shape}"
        )
    freq = freq.astype(np.float64)
    if np.isnan(freq).any():
        raise ValueError(f"{operation}: activation_freq must be numbers, got NaN")
    if not _is_int(num_gpu_experts) or not 0 <= num_gpu_experts <= freq.size:
        raise ValueError(
            f"{operation}: num_gpu_experts must be within 0..{freq.size}, the experts "
            f"of all layers, got {num_gpu_experts!r}"
        )
    masks = np.zeros(freq.size, bool)
    masks[np.argsort(-freq, axis=None, kind="stable")[:num_gpu_experts]] = True
    return masks.reshape(freq.shape)


def gpu_slots(
    num_experts: int, num_gpu_experts: int, gpu_experts_mask: Array | None
) -> tuple[int, ...]:
    """The slots of a layer that the accelerator computes, ascending.

    Args:
      num_experts: slots of the layer.
      num_gpu_experts: how many; without a mask the first ones.
      gpu_experts_mask: `[num_experts]` bool, or None. With one, `num_gpu_experts` is 0
        or the number of its True values.

    Raises:
      ValueError: a count outside its range, or a mask of another shape, dtype or count.
    """
    if not _is_int(num_gpu_experts) or not 0 <= num_gpu_experts <= num_experts:
        raise ValueError(
            f"num_gpu_experts must be within 0..{num_experts}, got {num_gpu_experts}"
        )
    if gpu_experts_mask is None:
        return tuple(range(num_gpu_experts))
    mask = as_numpy(gpu_experts_mask, "KTMoEWrapper", "gpu_experts_mask")
    if mask.shape != (num_experts,) or mask.dtype != bool:
        raise ValueError(
            f"gpu_experts_mask must be {num_experts} booleans, got {mask.dtype} of "
            f"shape {mask.shape}"
        )
    if num_gpu_experts not in (0, count := int(mask.sum())):
        raise ValueError(
            f"num_gpu_experts must be 0 or {count}, the experts that gpu_experts_mask "
            f"chooses, got {num_gpu_experts}"
        )
    return tuple(int(slot) for slot in np.flatnonzero(mask))


def places(num_experts: int, chosen: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Slot -> its place among `chosen`, or -1; int32, with a last entry for slot -1."""
    table = np.full(num_experts + 1, -1, np.int32)
    table[list(chosen)] = np.arange(len(chosen))
    return table


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
