"""Dense layers: products of any dtype with float32 accumulation, fast on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, kernel: Array, transposed: bool = False) -> Array:
    """`x @ kernel`, or `x @ kernel.T`, accumulated in float32 and rounded once.

    Says float32 accumulation to XLA, forward and backward. On a CPU with AVX-512 BF16
    that is the difference between fast bfloat16 kernels and a path that first copies
    the weights to float32: 48 against 104 ms for [512, 2048] @ [2048, 4096] on 2 cores,
    3 against 19 ms for 2 rows. JAX's own derivative would multiply a float32 cotangent
    by bfloat16 weights and miss those kernels, hence the custom rule; the cotangent of
    a bfloat16 result holds bfloat16 values anyway.

    Args:
      x: `[..., in]`, float32 or bfloat16.
      kernel: `[in, out]` in the dtype of x; `[out, in]` if `transposed`.
      transposed: which of the two.

    Returns:
      `[..., out]` in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1:
        # XLA:CPU has no such kernel for a single row: 17 ms instead of 3 for two.
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    out = _product(rows, kernel, 1, 1 if transposed else 0)[:count]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contract `a_axis` of a matrix with `b_axis` of another, in the dtype of a."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    out = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return out.astype(a.dtype)


def _matmul_forward(
    x: Array, kernel: Array, transposed: bool
) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel, transposed), (x, kernel)


def _matmul_backward(
    transposed: bool, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    grad_rows = grad.reshape(-1, grad.shape[-1])
    # dx = dy Wᵀ; dW = xᵀ dy, or its transpose.
    sides = (grad_rows, rows) if transposed else (rows, grad_rows)
    return matmul(grad, kernel, not transposed), _product(*sides, 0, 0)


matmul.defvjp(_matmul_forward, _matmul_backward)


def dot_general(
    x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, **_: Any
) -> Array:
    """`matmul` in the form in which `flax.nnx.Linear` calls its dot_general."""
    del (
        dimension_numbers,
        precision,
    )  # always the last axis by the first, full precision
    return matmul(x, kernel)


def upcast_on_cpu(function: Callable[..., Array], *operands: Array) -> Array:
    """`function(*operands)`, in float32 where XLA:CPU would compute in bfloat16.

    For products that `matmul` does not cover: in general XLA:CPU's bfloat16 dots take 2
    to 7 times as long as its float32 dots; elsewhere bfloat16 is the fast type. The
    platform is the one that the program is lowered for, not the process's default.

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
