"""What the eager wrapper methods are given -> checked host arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ktjax.quant.formats import Quantized

Array = Any

ACTIVATION_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def as_numpy(value: Array, operation: str, operand: str) -> np.ndarray[Any, Any]:
    """`value` as a NumPy array, without a copy where its memory can be shared.

    Takes NumPy and JAX arrays, sequences of numbers, and tensors of other libraries
    that have `detach` and `__dlpack__` (which are first moved to the CPU).

    Raises:
      RuntimeError: `value` is a tracer.
    """
    if isinstance(value, jax.core.Tracer):
        raise RuntimeError(
            f"{operation}: {operand} is traced, but {operation} is eager; inside jit, "
            "grad and scan call the wrapper itself: wrapper(x, ids, w)"
        )
    if hasattr(value, "detach") and hasattr(value, "__dlpack__"):
        value = value.detach().cpu().contiguous()
        # NumPy's DLPack import knows no bfloat16, and JAX's no 64-bit integers.
        if str(value.dtype).endswith("bfloat16"):
            return np.asarray(jnp.from_dlpack(value))
        return np.from_dlpack(value)
    return np.asarray(value)


def as_weights(
    value: Array | Quantized, operation: str, operand: str
) -> np.ndarray[Any, Any] | Quantized:
    """Base weights as NumPy arrays; see `as_numpy`."""
    if not isinstance(value, Quantized):
        return as_numpy(value, operation, operand)
    return Quantized(
        *(
            None if part is None else as_numpy(part, operation, f"{operand}: {name}")
            for name, part in value._asdict().items()
        )
    )


def count_experts(weights: np.ndarray[Any, Any] | Quantized) -> int:
    """The least number of experts among the arrays."""
    return min((array.shape or (0,))[0] for array in jax.tree.leaves(weights))


def check_activations(
    value: Array, hidden: int, operation: str, operand: str
) -> np.ndarray[Any, Any]:
    """`value` as `[..., hidden]`, float32 or bfloat16.

    Raises:
      ValueError: another dtype or last dimension.
    """
    array = as_numpy(value, operation, operand)
    if array.dtype not in ACTIVATION_DTYPES:
        raise ValueError(
            f"{operation}: {operand} must be float32 or bfloat16, got {array.dtype}; "
            "cast it first"
        )
    if array.ndim == 0 or array.shape[-1] != hidden:
        raise ValueError(
            f"{operation}: {operand} must have shape (..., {hidden}), got {array.shape}"
        )
    return array


def check_ids(
    value: Array, shape: tuple[int, ...], num_experts: int, operation: str
) -> np.ndarray[Any, Any]:
    """Expert ids as int32 of `shape`, each within -1..num_experts - 1.

    Raises:
      ValueError: no integers, another shape, or an id outside its range.
    """
    array = as_numpy(value, operation, "expert_ids")
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{operation}: expert_ids must be integers, got {array.dtype}; cast first"
        )
    _check_shape(array, shape, operation, "expert_ids")
    bad = (array < -1) | (array >= num_experts)
    if bad.any():
        where = tuple(int(index) for index in np.argwhere(bad)[0])
        raise ValueError(
            f"{operation}: expert_ids must be within -1..{num_experts - 1} "
            f"(-1 skips a slot), got {int(array[where])} at {where}"
        )
    return array.astype(np.int32, copy=False)


def check_routing(
    value: Array, shape: tuple[int, ...], operation: str
) -> np.ndarray[Any, Any]:
    """Routing weights as float32 of `shape`.

    Raises:
      ValueError: no floats, or another shape.
    """
    array = as_numpy(value, operation, "weights")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{operation}: weights must be floats, got {array.dtype}; cast it first"
        )
    _check_shape(array, shape, operation, "weights")
    return array.astype(np.float32, copy=False)


def check_gradient(
    value: Array, shape: tuple[int, ...], dtype: Any
) -> np.ndarray[Any, Any]:
    """The gradient of an output of `shape` and `dtype`.

    Raises:
      ValueError: another shape or dtype.
    """
    array = as_numpy(value, "backward", "grad_output")
    _check_shape(array, shape, "backward", "grad_output")
    if array.dtype != dtype:
        raise ValueError(
            f"backward: grad_output must be {dtype}, as the output was, got "
            f"{array.dtype}; cast it first"
        )
    return array


def check_lora(
    values: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.Array]:
    """The LoRA arrays, copied, in one dtype: bfloat16 if all are, else float32.

    Raises:
      ValueError: a wrong shape or a dtype that holds no real numbers; names the array.
    """
    arrays = {}
    for name, value in values.items():
        array = as_numpy(value, "init_lora_weights", name)
        if array.shape != shapes[name]:
            raise ValueError(
                f"{name} shape mismatch: expected {shapes[name]}, got {array.shape}"
            )
        if (
            not jnp.issubdtype(array.dtype, jnp.floating)
            and array.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"init_lora_weights: {name} must hold real numbers, got {array.dtype}"
            )
        arrays[name] = array
    bfloat16 = all(array.dtype == ml_dtypes.bfloat16 for array in arrays.values())
    dtype = ml_dtypes.bfloat16 if bfloat16 else np.float32
    return {name: owned(array.astype(dtype)) for name, array in arrays.items()}


def check_map(value: Array, num_experts: int, logical_experts: int) -> list[int]:
    """`physical_to_logical_map` as `num_experts` indices below `logical_experts`.

    Raises:
      ValueError: another length, no integers, or an index outside its range.
    """
    array = as_numpy(value, "load_weights", "physical_to_logical_map")
    if array.shape != (num_experts,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"load_weights: physical_to_logical_map must be {num_experts} integers, "
            f"got {array.dtype} of shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= logical_experts:
        raise ValueError(
            "load_weights: physical_to_logical_map must be within "
            f"0..{logical_experts - 1}, got {array.min()}..{array.max()}"
        )
    return [int(expert) for expert in array]


def owned(array: np.ndarray[Any, Any]) -> jax.Array:
    """A JAX array with memory of its own.

    JAX may alias NumPy memory; whoever owns that could then change what a later
    backward reads.
    """
    return jnp.array(array, copy=True)


def _check_shape(
    array: np.ndarray[Any, Any], shape: tuple[int, ...], operation: str, operand: str
) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{operation}: {operand} must have shape {shape}, got {array.shape}"
        )
