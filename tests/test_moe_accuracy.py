"""Every kernel against the reference: values, gradients, both activation policies."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import ISAS
from moe_cases import (
    Case,
    assert_close,
    make_inputs,
    named_results,
    reference_results,
    run_kernels,
)

import ktjax

CASES = [
    Case(tokens=1, experts=8, k=8, rank=1),
    Case(tokens=1, k=1, rank=None),
    Case(tokens=7, k=2, rank=None),
    Case(tokens=33, k=2, rank=4, intermediate=96),
    Case(tokens=33, k=2, rank=16, hidden=100, intermediate=72),  # no multiple of 32
    Case(tokens=5, k=3, rank=5, hidden=41, intermediate=23),  # odd everything
    Case(tokens=40, experts=8, k=8, rank=16, hidden=128),
    Case(tokens=64, k=2, rank=64, hidden=192, intermediate=160),
    Case(tokens=60, k=1, rank=8, routing="one"),
    Case(tokens=110, experts=12, k=2, rank=16, routing="ragged"),
    Case(tokens=20, rank=8, dtype="float32"),
    Case(tokens=33, rank=5, hidden=41, intermediate=23, dtype="float32"),
    Case(tokens=33, rank=64, hidden=96, intermediate=160, dtype="float32"),
    Case(tokens=20, rank=8, dtype="float32", lora_dtype="bfloat16"),
    Case(tokens=20, rank=8, lora_dtype="bfloat16"),
    Case(tokens=1, experts=8, k=8, rank=1, dropout=0.5),
    Case(tokens=33, k=2, rank=5, hidden=41, intermediate=23, dropout=0.1),
    Case(tokens=64, k=2, rank=64, hidden=192, intermediate=160, dropout=0.3),
    Case(tokens=110, experts=12, intermediate=96, routing="ragged", dropout=0.3),
    Case(tokens=33, rank=5, hidden=96, intermediate=160, dtype="float32", dropout=0.3),
]
# At most eight rows an expert, some of none: adapters are multiplied as they lie in
# memory.
FEW_ROWS_CASES = [
    Case(tokens=9, experts=12, k=3, rank=3, hidden=100, intermediate=72),
    Case(tokens=8, experts=8, k=4, rank=24, hidden=576, intermediate=160),
    Case(
        tokens=12,
        experts=16,
        rank=17,
        hidden=41,
        intermediate=70,
        lora_dtype="bfloat16",
    ),
    Case(tokens=8, experts=10, k=3, rank=70, intermediate=96),
]
# Cases that need many rows: on the fast paths only.
LARGE_CASES = [
    Case(tokens=1300, k=1, rank=8, routing="one", hidden=96),  # several row blocks
    Case(tokens=70, k=2, rank=256, hidden=128, intermediate=128),
    Case(tokens=1500, experts=16, k=4, rank=16, hidden=64, intermediate=2560),  # groups
    Case(tokens=1500, experts=4, rank=16, hidden=64, intermediate=2560, dropout=0.1),
]


def check(case: Case, policy: str) -> None:
    with ktjax.ExpertStore.from_arrays(*make_inputs(case).base) as store:
        got = named_results(*run_kernels(case, store, policy))
    # The gradients of bfloat16 adapters are rounded to bfloat16.
    exact = case.dtype == case.lora_dtype == "float32"
    dtype = "float32" if exact else "bfloat16"
    assert_close(got, reference_results(case), dtype)


@pytest.mark.parametrize("case", [*CASES, *FEW_ROWS_CASES], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_reference(use_pool, isa, case):
    use_pool(isa)
    check(case, "save")


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_matches_reference_with_many_rows(use_pool, case):
    use_pool()
    check(case, "save")


@pytest.mark.parametrize("subpools", [2, 3])
@pytest.mark.parametrize(
    "case",
    [CASES[4], CASES[7], CASES[12], *CASES[-3:], LARGE_CASES[2], *FEW_ROWS_CASES[:3]],
    ids=str,
)
def test_matches_reference_in_slices(use_pool, case, subpools):
    use_pool(threads=1, subpools=subpools)
    check(case, "save")
    check(case, "recompute")


@pytest.mark.parametrize("case", [*CASES, *FEW_ROWS_CASES, *LARGE_CASES[2:]], ids=str)
def test_recomputed_activations_give_the_same_bits(use_pool, case):
    use_pool()
    with ktjax.ExpertStore.from_arrays(*make_inputs(case).base) as store:
        saved = run_kernels(case, store, "save")
        recomputed = run_kernels(case, store, "recompute")
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_isa_is_the_one_asked_for(use_pool):
    for isa in ISAS:
        assert use_pool(isa).isa == isa


def test_gradients_come_in_the_dtypes_of_their_arrays(use_pool):
    use_pool()
    case = Case(tokens=20, rank=8, lora_dtype="bfloat16")
    with ktjax.ExpertStore.from_arrays(*make_inputs(case).base) as store:
        y, (grad_x, grad_w, grad_lora) = run_kernels(case, store)
    assert (y.dtype, grad_x.dtype, grad_w.dtype) == ("bfloat16", "bfloat16", "float32")
    assert {a.dtype for a in grad_lora.arrays()} == {np.dtype("bfloat16")}


def test_skipped_slots_have_no_gradient(use_pool):
    use_pool()
    case = Case(tokens=33, k=3, rank=4)
    inputs = make_inputs(case)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        _, (_, grad_w, _) = run_kernels(case, store)
    skipped = np.asarray(inputs.ids) < 0
    assert skipped.any()
    assert not np.asarray(grad_w)[skipped].any()
