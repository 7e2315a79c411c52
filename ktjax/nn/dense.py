"""Dense layers whose products are float32 on the CPU, whatever the dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = Any


def upcast_on_cpu(function: Callable[..., Array], *operands: Array) -> Array:
    """`function(*operands)`, in float32 where XLA:CPU would compute in bfloat16.

    XLA:CPU's bfloat16 dots take 2 to 7 times as long as its float32 dots and copy the
    operands to float32 anyway; elsewhere bfloat16 is the fast type. The platform is the
    one that the program is lowered for, not the process's default.

    Args:
      function: maps arrays to one array of their dtype.
      *operands: arrays of one dtype.

    Returns:
      The result in the operands' dtype.
    """
    dtype = operands[0].dtype
    if dtype == jnp.float32:
        return function(*operands)

    def in_float32(*values: Array) -> Array:
        return function(*(v.astype(jnp.float32) for v in values)).astype(dtype)

    return jax.lax.platform_dependent(*operands, cpu=in_float32, default=function)


def dot_general(
    x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, **_: Any
) -> Array:
    """`jax.lax.dot_general` for `flax.nnx.Linear`, float32 inside on the CPU."""

    def product(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision)

    return upcast_on_cpu(product, x, kernel)


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A `flax.nnx.Linear` in `dtype`; `param_dtype` is that of its parameters."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype or dtype,
        dot_general=dot_general,
        rngs=rngs,
    )


class GatedMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, a dense layer or a shared expert."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        self.gate_proj = linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.up_proj = linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.down_proj = linear(intermediate_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[..., hidden]` to `[..., hidden]`."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))
