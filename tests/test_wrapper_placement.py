"""Experts on an accelerator: who computes what, and that the sum is the whole."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from inference_support import (
    EXPERTS,
    HIDDEN,
    PER_TOKEN,
    base,
    make,
    reference,
    tokens,
    values,
)
from moe_cases import Case, make_inputs
from wrapper_support import assert_close, refuses

import ktjax
from ktjax import experts_inference
from ktjax.experts_base import BaseMoEWrapper
from ktjax.ops import grouped

MASKS = {
    "none": [],
    "first": [0],
    "some": [1, 4, 5],
    "all": list(range(EXPERTS)),
}


def mask(slots):
    return np.isin(np.arange(EXPERTS), slots)


@pytest.fixture(autouse=True)
def _nothing_waits():
    yield
    BaseMoEWrapper.clear_buffer_cache()


def test_masks_take_the_most_used_of_the_model():
    freq = [[0.1, 0.5, 0.3, 0.8], [0.2, 0.4, 0.9, 0.1]]
    masks = ktjax.generate_gpu_experts_masks(jnp.array(freq), 3)
    assert masks.dtype == bool
    assert masks.tolist() == [[False, True, False, True], [False, False, True, False]]
    assert ktjax.generate_gpu_experts_masks(freq, 8).all()
    assert not ktjax.generate_gpu_experts_masks(freq, 0).any()
    # Of equal ones the earlier.
    masks = ktjax.generate_gpu_experts_masks(np.ones((2, 3), np.int64), 4)
    assert masks.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("freq", "count", "message"),
    [
        (np.ones(3), 1, "activation_freq must be [layers, experts], got shape (3,)"),
        ([[1.0, np.nan]], 1, "activation_freq must be numbers, got NaN"),
        (
            np.ones((2, 3)),
            7,
            "num_gpu_experts must be within 0..6, the experts of all layers, got 7",
        ),
        (
            np.ones((2, 3)),
            -1,
            "num_gpu_experts must be within 0..6, the experts of all layers, got -1",
        ),
    ],
)
def test_masks_are_checked(freq, count, message):
    with refuses(ValueError, f"generate_gpu_experts_masks: {message}"):
        ktjax.generate_gpu_experts_masks(freq, count)


def test_who_computes():
    assert make(weights=False, num_gpu_experts=2).gpu_experts == (0, 1)
    chosen = make(weights=False, gpu_experts_mask=mask([3, 5]))
    assert (chosen.gpu_experts, chosen.num_gpu_experts) == ((3, 5), 2)
    same = make(weights=False, gpu_experts_mask=mask([3, 5]), num_gpu_experts=2)
    assert same.gpu_experts == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpu_experts": 7}, "num_gpu_experts must be within 0..6, got 7"),
        ({"num_gpu_experts": -1}, "num_gpu_experts must be within 0..6, got -1"),
        (
            {"gpu_experts_mask": mask([1])[:4]},
            "gpu_experts_mask must be 6 booleans, got bool of shape (4,)",
        ),
        (
            {"gpu_experts_mask": np.ones(6, np.int32)},
            "gpu_experts_mask must be 6 booleans, got int32 of shape (6,)",
        ),
        (
            {"gpu_experts_mask": mask([1, 2]), "num_gpu_experts": 3},
            "num_gpu_experts must be 0 or 2, the experts that gpu_experts_mask "
            "chooses, got 3",
        ),
        (
            {"mode": "sft", "method": "AMXBF16_SFT", "gpu_experts_mask": mask([])},
            "gpu_experts_mask must be None in SFT mode, which computes every expert on "
            "the CPU",
        ),
    ],
)
def test_placement_is_checked(change, message):
    with refuses(ValueError, message):
        make(weights=False, **change)


@pytest.mark.parametrize("method", ["BF16", "AMXINT8", "FP8"])
@pytest.mark.parametrize("name", MASKS)
def test_the_sum_is_the_whole(name, method):
    slots = MASKS[name]
    whole = make(method)
    wrapper = make(method, gpu_experts_mask=mask(slots))
    assert wrapper._loaded().store.num_experts == max(EXPERTS - len(slots), 1)
    weights = values(whole)
    limit = 0.03 if wrapper.compute == "int8" else 0.006
    pure = nnx.jit(lambda wrapper, *args: wrapper(*args))
    for count in (1, 33):
        x, ids, w = tokens(count)
        want = reference(x, ids, w, weights)
        y = wrapper.forward(x, ids, w)
        assert y.dtype == x.dtype
        assert_close(y, want, limit)
        # One rounding more: 2^-9.
        assert_close(pure(wrapper, x, ids, w), want, limit + 2**-9)
    if slots:
        for part, name in zip(weights, ("gate", "up", "down"), strict=True):
            there = getattr(wrapper, f"gpu_{name}").get_value()
            assert there.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(there, np.float32), part[slots])
    else:
        np.testing.assert_array_equal(y, whole.forward(x, ids, w))


def test_pieces_float32_and_leading_dimensions():
    wrapper = make(num_gpu_experts=2, chunked_prefill_size=4)
    x, ids, w = tokens(12, dtype=np.float32)
    y = wrapper.forward(*(a.reshape(3, 4, -1) for a in (x, ids, w)))
    want = reference(x, ids, w, values(make()))
    assert_close(np.asarray(y).reshape(x.shape), want, 0.006 * 2**-8)
    np.testing.assert_array_equal(
        y.reshape(x.shape), make(num_gpu_experts=2).forward(x, ids, w)
    )
    assert wrapper.forward(x[:0], ids[:0], w[:0]).shape == (0, HIDDEN)


def test_the_map_comes_before_the_placement():
    order = [5, 0, 0, 1, 3, 2]
    wrapper = make(weights=False, gpu_experts_mask=mask([0, 2]))
    wrapper.load_weights_from_arrays(*base(), order)
    whole = make(weights=False)
    whole.load_weights_from_arrays(*base(), order)
    args = tokens(33)
    want = reference(*args, values(whole))
    assert_close(wrapper.forward(*args), want)


def test_deferral_leaves_the_accelerator_s_experts_in_their_layer():
    deferring = {"gpu_experts_mask": mask([0, 2]), "max_deferred_experts_per_token": 2}
    first, second = make(layer_idx=0, **deferring), make(layer_idx=1)
    x, ids, w = tokens(2, dtype=np.float32)
    weights = values(second)
    _, later = first.select_deferred_experts(ids, w, PER_TOKEN - 2)
    later = np.where(np.isin(later, [0, 2]), -1, later)
    assert (later >= 0).any()
    late = reference(x, later, w, weights)
    whole = reference(x, ids, w, weights)
    limit = 0.006 * 2**-8 * 4
    assert_close(first.forward(x, ids, w), whole - late, limit)
    assert_close(second.forward(x, ids, w), whole + late, limit)


def test_ids_out_of_range_are_refused_in_jit():
    wrapper = make(num_gpu_experts=2)
    x, ids, w = map(jnp.asarray, tokens())
    for bad in (EXPERTS, -2):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="expert id"):
            jax.block_until_ready(wrapper(x, ids.at[1, 1].set(bad), w))


def test_the_accelerator_s_weights_are_operands():
    """Neither constants of a compiled program nor parameters."""
    wrapper = make(num_gpu_experts=2)
    graphdef, state = nnx.split(wrapper)

    def forward(state, *args):
        return nnx.merge(graphdef, state)(*args)

    closed = jax.make_jaxpr(forward)(state, *tokens())
    assert all(np.size(constant) < 100 for constant in closed.consts)
    assert not jax.tree.leaves(nnx.state(wrapper, nnx.Param))
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(wrapper))}
    assert experts_inference.AcceleratorExperts in kinds


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("routing", ["random", "one", "ragged"])
def test_both_ways_to_group_equal_the_reference(routing, dtype):
    """On the CPU one by one; what accelerators run is run here by name."""
    tokens = 120 if routing == "ragged" else 19
    case = Case(
        tokens=tokens, rank=None, routing=routing, dtype=dtype, hidden=48, experts=6
    )
    inputs = make_inputs(case)
    args = (inputs.x, inputs.ids, inputs.w, *inputs.base)
    want = reference(inputs.x, inputs.ids, inputs.w, inputs.base)
    got = grouped.moe(*args)
    assert got.dtype == jnp.float32
    assert_close(got, want, 1e-6)
    # bfloat16 rounds h once.
    limit = 1e-6 if dtype == "float32" else 2**-8
    assert_close(jax.jit(grouped.sorted_groups)(*args), want, limit)


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(0, 4, 2), (1, 6, 2), (3, 1, 1), (2, 9, 3), (5, 2, 2), (64, 3, 2)],
)
def test_few_slots_or_experts_in_groups(tokens, experts, k):
    case = Case(tokens=tokens, rank=None, dtype="float32", experts=experts, k=k)
    inputs = make_inputs(case)
    args = (inputs.x, inputs.ids, inputs.w, *inputs.base)
    got = jax.jit(grouped.sorted_groups)(*args)
    assert got.shape == inputs.x.shape
    if tokens:
        assert_close(got, reference(*args[:3], inputs.base), 1e-6)
        # A token may name an expert twice.
        twice = jnp.zeros_like(inputs.ids)
        want = reference(inputs.x, twice, inputs.w, inputs.base)
        again = jax.jit(grouped.sorted_groups)(inputs.x, twice, *args[2:])
        assert_close(again, want, 1e-6)


def test_nobody_is_chosen():
    x, ids, w = tokens(5, dtype=ml_dtypes.bfloat16)
    none = np.full_like(ids, -1)
    matrices = [jnp.asarray(m[:2], jnp.bfloat16) for m in base()]
    for moe in (grouped.moe, jax.jit(grouped.sorted_groups)):
        assert not np.asarray(moe(*map(jnp.asarray, (x, none, w)), *matrices)).any()
