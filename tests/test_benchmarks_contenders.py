"""What the benchmarks time computes the same, whoever computes it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import TINY
from moe_cases import TOLERANCES

import ktjax
from benchmarks import (
    cases,
    contenders,
    formats,
    shapes,
)
from benchmarks.cases import Case

RANK = 8  # grouped_mm wants rows of 16 bytes
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


@functools.cache
def reference(tokens: int, pass_name: str, format: str) -> dict[str, np.ndarray]:
    """y, and for "train" all gradients, in float32, of the last batch."""
    batch = cases.batches(Case(TINY, tokens, pass_name, "ktjax", "save"))[-1]
    name, group_size, zero_point = formats.encoding(format)
    options = {"group_size": group_size or None, "zero_point": zero_point}
    base = []
    for array in formats.weights(TINY, format).values():
        blocks = isinstance(array, ktjax.Quantized)
        stored = array if blocks else ktjax.quant.encode(array, name, **options)
        base.append(ktjax.quant.decode(stored, name))
    lora = None
    if pass_name != "forward":
        lora = ktjax.LoRA(**cases.lora(TINY, RANK))
    x, grad_y = (jnp.asarray(a, jnp.float32) for a in (batch.x, batch.grad_y))

    @jax.jit
    def run(x, w, lora, grad_y):
        y, pullback = jax.vjp(
            lambda x, w, lora: ktjax.reference.moe(
                x, batch.ids, w, *base, lora, scaling=cases.SCALING
            ),
            x,
            w,
            lora,
        )
        return y, pullback(grad_y)

    y, (grad_x, grad_w, grad_lora) = run(x, batch.w, lora, grad_y)
    if pass_name != "train":
        return {"y": y}
    named = zip(ktjax.LoRA.NAMES, grad_lora.arrays(), strict=True)
    return {"y": y, "x": grad_x, "w": grad_w, **dict(named)}


# XLA: float32 sums of up to 64 terms in another order, times the condition of a sum.
# torch: every product, sum and slot is rounded to bfloat16 by 2^-9, and a few dozen
# independent roundings come together: sqrt(64) * 2^-9.
# int8: x and h are rounded in steps of amax / 127. For 64 normal numbers, or 32
# products of two, amax is within 6 times their root mean square: 6 / 127 / sqrt(12) =
# 0.014 an operand. gate, up and down have one each, with independent errors.
INT8_LIMIT = 3**0.5 * 0.014
LIMITS = {"ktjax": TOLERANCES["bfloat16"], "xla": 1e-4, "torch": 2**-6}


@pytest.mark.parametrize(
    "family", ["ktjax", "xla", pytest.param("torch", marks=needs_torch)]
)
def test_contenders_compute_the_same(use_pool, family):
    use_pool()
    contender = contenders.create(family)
    try:
        contender.load(TINY)
        for tokens, pass_name in ((1, "train"), *((9, name) for name in shapes.PASSES)):
            variants = cases.variants(family, pass_name, tokens)
            if family == "xla" and pass_name == "train":
                variants = (*variants, "ragged f32")
            for variant in variants:
                case = Case(TINY, tokens, pass_name, family, variant, RANK)
                check_results(case, contender.prepare(case))
    finally:
        contender.close()


STORED = ["int8", "int4_kgroup/32/z", "mxfp4"]


def test_ktjax_computes_the_same_in_each_format(use_pool):
    use_pool()
    contender = contenders.create("ktjax")
    try:
        contender.load(TINY)
        contender.hold([*STORED, "q8_0"])
        for format in STORED:
            case = Case(TINY, 9, "train", "ktjax", "save", RANK, format=format)
            check_results(case, contender.prepare(case))
        for format in (*STORED, "q8_0"):
            computes = ["bf16"]
            if formats.encoding(format).spec.int8_compute:
                computes.append("int8")
            for compute in computes:
                for variant in ("save", "eager"):
                    case = Case(TINY, 9, "forward", "ktjax", variant, format=format)
                    case = dataclasses.replace(case, compute=compute)
                    check_results(case, contender.prepare(case))
        contender.hold(["mxfp4"])
        case = Case(TINY, 9, "forward", "ktjax", "save", format="int8")
        with pytest.raises(RuntimeError, match="format 'int8', got bf16, mxfp4"):
            contender.prepare(case)
    finally:
        contender.close()


def check_results(case: Case, prepared: contenders.Prepared) -> None:
    assert len(prepared.calls) == len(cases.batches(case))
    got = prepared.named(prepared.calls[-1]())
    want = reference(case.tokens, case.pass_name, case.format)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].shape == expected.shape, (case, name)
        error = np.linalg.norm(got[name] - expected) / np.linalg.norm(expected)
        # Two numbers may both have cancelled, and keep the errors of their terms.
        limit = INT8_LIMIT if case.compute == "int8" else LIMITS[case.family]
        limit *= 4 if expected.size < 8 else 1
        assert error <= limit, f"{case.label} {case.pass_name} {name}: {error:.2e}"
