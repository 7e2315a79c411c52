"""Layers of experts to compute, and what the reference says of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from named_case import NamedCase

import ktjax

# Products of bfloat16 operands summed in float32. Every value on the way to a result is
# rounded a handful of times (inputs of a product, kept gate and up, LoRA factors), each
# by 2^-9 at most and 2^-9.3 on average, and the errors are independent:
# sqrt(10) * 2^-9.3 = 0.005. float32 operands are split in two bfloat16, which leaves
# 2^-8 of every such error.
TOLERANCES = {"bfloat16": 0.006, "float32": 0.006 * 2**-8}
MIN_COSINE = 0.9999


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One layer and one batch of tokens."""

    tokens: int
    experts: int = 4
    k: int = 2
    hidden: int = 64
    intermediate: int = 64
    rank: int | None = 8
    routing: str = "random"  # random | one (all on expert 1) | ragged
    dtype: str = "bfloat16"
    lora_dtype: str = "float32"
    scaling: float = 2.0
    dropout: float = 0.0


# Of dropout, in all cases.
SEED = np.array([3, 5], np.uint32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case; gate, up, down are bfloat16."""

    x: jax.Array
    ids: jax.Array
    w: jax.Array
    base: tuple[jax.Array, jax.Array, jax.Array]
    lora: ktjax.LoRA | None
    grad_y: jax.Array

    def first(self, tokens: int) -> Inputs:
        """The same with fewer tokens."""
        few = {n: getattr(self, n)[:tokens] for n in ("x", "ids", "w", "grad_y")}
        return dataclasses.replace(self, **few)


# Tokens per expert around every row step of the kernels: empty, one, tiles and their
# neighbours.
RAGGED = (0, 1, 15, 16, 17, 31, 32, 33, 2, 3, 5, 47)


def _ids(case: Case, rng: np.random.Generator) -> np.ndarray:
    shape = (case.tokens, case.k)
    if case.routing == "one":
        ids = np.full(shape, -1)
        ids[:, 0] = 1
        return ids
    if case.routing == "ragged":
        counts = [RAGGED[e % len(RAGGED)] for e in range(case.experts)]
        ids = np.repeat(np.arange(case.experts), counts)
        ids = np.concatenate([ids, np.full(case.tokens * case.k - len(ids), -1)])
        return rng.permutation(ids).reshape(shape)
    ids = rng.random((case.tokens, case.experts)).argsort(-1)[:, : case.k]
    return np.where(rng.random(shape) < 0.1, -1, ids)


@functools.cache
def make_inputs(case: Case) -> Inputs:
    """Random inputs, the same for the same case."""
    rng = np.random.default_rng(case.tokens + 1000 * case.hidden)

    def normal(shape, std=1.0):
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    e, h, i = case.experts, case.hidden, case.intermediate
    base = tuple(
        jnp.asarray(normal(shape, shape[-1] ** -0.5), jnp.bfloat16)
        for shape in ((e, i, h), (e, i, h), (e, h, i))
    )
    lora = None
    if case.rank is not None:
        lora = ktjax.LoRA(
            *(
                jnp.asarray(
                    normal(shape, shape[-1] ** -0.5 if name.endswith("a") else 0.05),
                    case.lora_dtype,
                )
                for name, shape in ktjax.LoRA.shapes(e, h, i, case.rank).items()
            )
        )
    ids = _ids(case, rng).astype(np.int32)
    w = rng.random(ids.shape, np.float32) + np.float32(0.2)
    x, grad_y = (
        jnp.asarray(normal((case.tokens, h)), jnp.bfloat16).astype(case.dtype)
        for _ in range(2)
    )
    return Inputs(x, jnp.asarray(ids), jnp.asarray(w), base, lora, grad_y)


@functools.cache
def reference_results(case: Case) -> dict[str, np.ndarray]:
    """y and the gradients of the float32 reference on the same bfloat16 values."""
    return reference_on(case, make_inputs(case).base)


def reference_on(case: Case, base) -> dict[str, np.ndarray]:
    """y and the gradients of the float32 reference on other weights, `base`."""
    inputs = make_inputs(case)
    arrays = (inputs.x, inputs.w, inputs.lora, tuple(base), inputs.ids, inputs.grad_y)
    return named_results(*_run_reference(*arrays, case.scaling, case.dropout))


# The jitted functions below are the module's, so that tests share what is compiled.
@functools.partial(jax.jit, static_argnums=(6, 7))
def _run_reference(x, w, lora, base, ids, grad_y, scaling, dropout):
    x, w, lora, base, grad_y = jax.tree.map(
        lambda a: a.astype(jnp.float32), (x, w, lora, base, grad_y)
    )

    def layer(x, w, lora):
        return ktjax.reference.moe(
            *(x, ids, w, *base, lora),
            scaling=scaling,
            dropout=dropout,
            dropout_seed=SEED,
        )

    y, pullback = jax.vjp(layer, x, w, lora)
    return y, pullback(grad_y)


def named_results(y, grads) -> dict[str, np.ndarray]:
    """Flattens `(y, (grad x, grad w, grad LoRA))`."""
    grad_x, grad_w, grad_lora = grads
    named = {"y": y, "x": grad_x, "w": grad_w}
    if grad_lora is not None:
        named |= dict(zip(ktjax.LoRA.NAMES, grad_lora.arrays(), strict=True))
    return {name: np.asarray(value, np.float64) for name, value in named.items()}


def run_kernels(
    case: Case,
    store,
    policy: str = "save",
    compute: str | None = None,
    seed: np.ndarray = SEED,
):
    """y and the gradients of `ktjax.moe`, raw."""
    inputs = make_inputs(case)
    return _run_kernels(
        store,
        *(inputs.x, inputs.w, inputs.lora, inputs.ids, inputs.grad_y, seed),
        dropout=case.dropout,
        scaling=case.scaling,
        activation_policy=policy,
        compute=compute,
    )


@functools.partial(
    jax.jit, static_argnames=("scaling", "activation_policy", "compute", "dropout")
)
def _run_kernels(store, x, w, lora, ids, grad_y, seed, **options):
    def layer(x, w, lora):
        return ktjax.moe(x, ids, w, store, lora, dropout_seed=seed, **options)

    y, pullback = jax.vjp(layer, x, w, lora)
    return y, pullback(grad_y)


def assert_close(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str = "bfloat16"
) -> None:
    """Relative L2 and cosine of every result of a layer on `dtype` activations."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name]
        assert have.shape == want.shape, name
        norm = np.linalg.norm(want)
        if norm == 0:
            assert not have.any(), name
            continue
        error = np.linalg.norm(have - want) / norm
        cosine = np.vdot(have, want) / (norm * np.linalg.norm(have))
        # A handful of sums may all have cancelled, and keep the errors of their terms.
        tolerance = TOLERANCES[dtype] * (4 if np.count_nonzero(want) < 8 else 1)
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e}"
        assert cosine >= MIN_COSINE, f"{name}: cosine {cosine:.6f}"
