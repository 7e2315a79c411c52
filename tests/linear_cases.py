"""Projections to compute, and what the reference says of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from named_case import NamedCase

import ktjax

# x, gy and W are exact operands, sums are float32. bfloat16 rounds by 2^-9.3 in the
# root mean square, independently: A, B, the low-rank values that are spread over
# outputs, and the result, so 2 * 2^-9.3 is to be expected where LoRA is most of the
# result, and a quarter more allows for chance. float32 is carried in two parts, which
# leaves 2^-8 of each of these errors.
_EXPECTED = 4**0.5 * 2**-9.3
TOLERANCES = {"bfloat16": 1.25 * _EXPECTED, "float32": 1.25 * _EXPECTED * 2**-8}


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One projection and one batch of rows."""

    rows: int
    inputs: int = 64
    outputs: int = 96
    rank: int | None = 8
    dtype: str = "bfloat16"
    lora_dtype: str = "float32"
    scaling: float = 2.0

    @property
    def result_dtype(self) -> str:
        """The dtype of the least exact result."""
        exact = self.dtype == "float32" and (
            self.rank is None or self.lora_dtype == "float32"
        )
        return "float32" if exact else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case; the weight is bfloat16."""

    x: jax.Array
    weight: jax.Array
    lora: ktjax.LinearLoRA | None
    grad_y: jax.Array


@functools.cache
def make_inputs(case: Case) -> Inputs:
    """Random inputs, the same for the same case."""
    rng = np.random.default_rng(case.rows + 1000 * case.inputs)

    def normal(shape, std=1.0):
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    scale = case.inputs**-0.5
    weight = jnp.asarray(normal((case.outputs, case.inputs), scale), jnp.bfloat16)
    lora = None
    if case.rank is not None:
        shapes = ktjax.LinearLoRA.shapes(case.outputs, case.inputs, case.rank)
        lora = ktjax.LinearLoRA(
            jnp.asarray(normal(shapes["a"], scale), case.lora_dtype),
            jnp.asarray(normal(shapes["b"], 0.2), case.lora_dtype),
        )
    x, grad_y = (
        jnp.asarray(normal((case.rows, width)), jnp.bfloat16).astype(case.dtype)
        for width in (case.inputs, case.outputs)
    )
    return Inputs(x, weight, lora, grad_y)


def results(y, grads) -> dict[str, np.ndarray]:
    """Flattens `(y, (grad x, grad LoRA))`."""
    grad_x, grad_lora = grads
    named = {"y": y, "x": grad_x}
    if grad_lora is not None:
        named |= {"a": grad_lora.a, "b": grad_lora.b}
    return {name: np.asarray(value, np.float64) for name, value in named.items()}


def reference_on(case: Case, weight) -> dict[str, np.ndarray]:
    """y and the gradients of the float32 reference on the values `weight`."""
    inputs = make_inputs(case)
    arrays = (inputs.x, inputs.lora, inputs.grad_y)
    return results(*_run_reference(weight, *arrays, scaling=case.scaling))


# The jitted functions below are the module's, so that tests share what is compiled.
@functools.partial(jax.jit, static_argnames="scaling")
def _run_reference(weight, x, lora, grad_y, *, scaling):
    x, lora, grad_y = jax.tree.map(lambda a: a.astype(jnp.float32), (x, lora, grad_y))

    def project(x, lora):
        return ktjax.reference.linear(x, weight, lora, scaling=scaling)

    y, pullback = jax.vjp(project, x, lora)
    return y, pullback(grad_y)


def run(case: Case, store: ktjax.LinearStore):
    """y and the gradients of `ktjax.linear`, raw."""
    inputs = make_inputs(case)
    return _run(store, inputs.x, inputs.lora, inputs.grad_y, scaling=case.scaling)


@functools.partial(jax.jit, static_argnames="scaling")
def _run(store, x, lora, grad_y, *, scaling):
    def project(x, lora):
        return ktjax.linear(x, store, lora, scaling=scaling)

    y, pullback = jax.vjp(project, x, lora)
    return y, pullback(grad_y)


def assert_close(case: Case, got: dict, want: dict) -> None:
    """Relative L2 of every result."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        have = got[name]
        assert have.shape == expected.shape, name
        norm = np.linalg.norm(expected)
        if norm == 0:
            assert not have.any(), name
            continue
        error = np.linalg.norm(have - expected) / norm
        # A handful of sums may all have cancelled, and keep the errors of their terms.
        few = 4 if np.count_nonzero(expected) < 8 else 1
        assert error <= TOLERANCES[case.result_dtype] * few, f"{name}: {error:.2e}"
