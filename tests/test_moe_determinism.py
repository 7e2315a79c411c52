"""The same inputs give the same bits: run after run, for any number of threads."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import ISAS
from moe_cases import Case, make_inputs, run_kernels

import ktjax

CASE = Case(
    tokens=150, experts=6, k=3, rank=16, hidden=160, intermediate=224, routing="random"
)
DROPOUT = dataclasses.replace(CASE, dropout=0.3)
FEW_ROWS = dataclasses.replace(CASE, tokens=12, experts=16)


def bits(case=CASE):
    with ktjax.ExpertStore.from_arrays(*make_inputs(case).base) as store:
        return [np.asarray(a).copy() for a in jax.tree.leaves(run_kernels(case, store))]


@pytest.mark.parametrize("case", [CASE, DROPOUT, FEW_ROWS], ids=str)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
def test_any_number_of_threads(use_pool, isa, case):
    results = []
    for threads in (1, 2, 3, 5):
        use_pool(isa, threads)
        results.append(bits(case))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", [CASE, DROPOUT, FEW_ROWS], ids=str)
def test_any_number_of_threads_per_slice(use_pool, case):
    results = []
    for threads in (1, 2):
        use_pool(threads=threads, subpools=2)
        results.append(bits(case))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_run_after_run(use_pool):
    use_pool(threads=3)
    first = bits()
    for _ in range(5):
        for a, b in zip(first, bits(), strict=True):
            np.testing.assert_array_equal(a, b)


# Alone a token takes the adapters' products of few rows, in its batch those of many.
# Ranks below, at and between multiples of a vector.
@pytest.mark.parametrize("rank", [16, 5, 24, 40])
def test_a_token_does_not_depend_on_its_batch(use_pool, rank):
    use_pool()
    inputs = make_inputs(dataclasses.replace(CASE, rank=rank))
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        whole = ktjax.moe(inputs.x, inputs.ids, inputs.w, store, inputs.lora)
        for size in (1, 7, 40):
            part = ktjax.moe(
                inputs.x[:size], inputs.ids[:size], inputs.w[:size], store, inputs.lora
            )
            np.testing.assert_array_equal(np.asarray(part), np.asarray(whole[:size]))


def test_a_slice_of_tokens_without_rows_of_the_next_expert(use_pool):
    """Tokens are cut into slices; the second has none of expert 1."""
    use_pool()
    inputs = make_inputs(Case(tokens=128, experts=2, k=1, hidden=64, intermediate=64))
    ids = np.zeros_like(inputs.ids)
    ids[0] = 1
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        whole = ktjax.moe(inputs.x, ids, inputs.w, store)
        alone = ktjax.moe(inputs.x[64:], ids[64:], inputs.w[64:], store)
    np.testing.assert_array_equal(whole[64:], alone)
