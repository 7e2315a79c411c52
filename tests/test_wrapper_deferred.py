"""Deferred experts: how slots are divided, and what layers hand on."""

import jax
import ml_dtypes
import numpy as np
import pytest
from inference_support import (
    EXPERTS,
    HIDDEN,
    PER_TOKEN,
    base,
    float32_sum,
    make,
    reference,
    tokens,
    values,
)
from wrapper_support import assert_close, refuses

import ktjax
from ktjax import experts_pending


@pytest.fixture(autouse=True)
def _nothing_waits():
    yield
    ktjax.BaseMoEWrapper.clear_buffer_cache()


def test_division_of_slots():
    wrapper = make(weights=False)
    ids = np.array([[0, 1, 2], [3, 1, 4], [5, -1, 2]])
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.4, 0.5], [0.2, 0.9, 0.2]], np.float32)
    # Protected: 0 and 1; 4 and 1; 5 and 2 (a skipped slot is none). So 2 is of now for
    # the first token as well, and only 3 is later.
    now, later = wrapper.select_deferred_experts(ids, scores, 2)
    assert now.tolist() == [[0, 1, 2], [-1, 1, 4], [5, -1, 2]]
    assert later.tolist() == [[-1, -1, -1], [3, -1, -1], [-1, -1, -1]]
    assert now.dtype == later.dtype == np.int32
    # One each: 0; 4; 5, the earlier of equal scores.
    now, later = wrapper.select_deferred_experts(ids, scores, 1)
    assert now.tolist() == [[0, -1, -1], [-1, -1, 4], [5, -1, -1]]
    assert later.tolist() == [[-1, 1, 2], [3, 1, -1], [-1, -1, 2]]
    now, later = wrapper.select_deferred_experts(ids, scores, 0)
    assert (now.tolist(), later.tolist()) == ([[-1] * 3] * 3, ids.tolist())
    now, later = wrapper.select_deferred_experts(ids, scores, 3)
    assert (now.tolist(), later.tolist()) == (ids.tolist(), [[-1] * 3] * 3)


@pytest.mark.parametrize("protected_k", range(PER_TOKEN + 1))
def test_every_slot_is_in_one_part(protected_k):
    wrapper = make(weights=False)
    _, ids, w = tokens(40)
    divide = jax.jit(wrapper.select_deferred_experts, static_argnums=2)
    now, later = map(np.asarray, divide(ids, w, protected_k))
    np.testing.assert_array_equal(np.where(now >= 0, now, later), ids)
    assert not ((now >= 0) & (later >= 0)).any()
    assert ((now >= 0).sum(-1)[:-1] >= protected_k).all()
    cube = wrapper.select_deferred_experts(
        ids.reshape(4, 10, -1), w.reshape(4, 10, -1), protected_k
    )
    np.testing.assert_array_equal(cube[0].reshape(40, -1), now)


def test_division_is_checked():
    wrapper = make(weights=False)
    _, ids, w = tokens(4)
    with refuses(
        ValueError,
        "select_deferred_experts: expert_scores must have the shape of expert_ids "
        "(4, 3), got (3, 3)",
    ):
        wrapper.select_deferred_experts(ids, w[:3], 1)
    for k in (-1, 4):
        with refuses(
            ValueError,
            f"select_deferred_experts: protected_k must be within 0..3, got {k}",
        ):
            wrapper.select_deferred_experts(ids, w, k)
    for deferred in (-1, 4):
        with refuses(
            ValueError,
            f"max_deferred_experts_per_token must be within 0..3, got {deferred}",
        ):
            make(weights=False, max_deferred_experts_per_token=deferred)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("chunk", [512, 1])
@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_the_shift(method, chunk, dtype):
    """y_l = what is of now + what the layer before deferred; the last defers none."""
    options = {"method": method, "chunked_prefill_size": chunk}
    deferred = [2, 1, 0]
    # Layers need not be neighbours: dense ones may lie between.
    layers = [
        make(layer_idx=i, max_deferred_experts_per_token=d, **options)
        for i, d in zip((1, 2, 5), deferred, strict=True)
    ]
    # Few tokens: with many, every expert is protected for some token.
    cases = [tokens(2, seed, dtype) for seed in range(3)]
    handed = np.zeros((2, HIDDEN), np.float32)
    for layer, d, (x, ids, w) in zip(layers, deferred, cases, strict=True):
        now, later = layer.select_deferred_experts(ids, w, PER_TOKEN - d)
        assert np.asarray(later >= 0).any() == (d > 0)
        want = float32_sum(layer, x, np.asarray(now), w) + handed
        handed = float32_sum(layer, x, np.asarray(later), w)
        if d == 2:
            layer.submit_forward(x, ids, w)
            y = layer.sync_forward()
        else:
            y = layer.forward(x, ids, w)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, want.astype(dtype))
    assert not handed.any()


def test_nothing_is_lost_over_the_layers():
    """With one input for both layers the two outputs sum to the undeferred ones."""
    layers = [
        make(layer_idx=i, max_deferred_experts_per_token=d)
        for i, d in enumerate((2, 0))
    ]
    x, ids, w = tokens(2, dtype=np.float32)
    total = sum(np.asarray(layer.forward(x, ids, w)) for layer in layers)
    whole = reference(x, ids, w, values(layers[0]))
    assert_close(total, 2 * whole, 0.006 * 2**-8 * 2)


@pytest.mark.parametrize("deferred", [None, 0])
def test_no_deferral_has_the_bits_of_the_plain_forward(deferred):
    args = tokens()
    want = make().forward(*args)
    got = make(max_deferred_experts_per_token=deferred).forward(*args)
    np.testing.assert_array_equal(got, want)


def test_sync_does_not_wait_for_what_is_deferred(monkeypatch):
    waited = []

    class Forward:
        def __init__(self, number, out):
            self.number = number
            out[...] = 0

        def result(self):
            waited.append(self.number)

    count = 0

    def submit(store, x, ids, w, *, out, compute):
        nonlocal count
        count += 1
        return Forward(count, out)

    monkeypatch.setattr(experts_pending.backend, "submit_forward_registered", submit)
    first = make(layer_idx=0, max_deferred_experts_per_token=1)
    second = make(layer_idx=1)
    first.forward(*tokens())
    assert (count, waited) == (2, [1])
    second.submit_forward(*tokens())
    assert waited == [1], "nor does the next layer's submit"
    second.sync_forward()
    assert sorted(waited) == [1, 2, 3]


def not_added(layer, before, tokens_before, tokens_here):
    return (
        f"layer {layer}: the deferred experts of layer {before}, of {tokens_before} "
        f"tokens, were not added by a later layer; here {tokens_here} tokens came. Set "
        "max_deferred_experts_per_token=0 on the last layer, finish one forward of a "
        "model before the next, and after one that was broken off call "
        "BaseMoEWrapper.clear_buffer_cache()"
    )


def test_a_sum_that_nobody_adds_is_an_error():
    first = make(layer_idx=3, max_deferred_experts_per_token=1)
    second = make(layer_idx=4)
    first.forward(*tokens(9))
    for call in (first.forward, first.submit_forward):
        with refuses(RuntimeError, not_added(3, 3, 9, 9)):
            call(*tokens(9))
    with refuses(RuntimeError, not_added(4, 3, 9, 8)):
        second.forward(*tokens(8))
    # Closing drops it as well.
    first.close()
    second.forward(*tokens(8))
    first.load_weights_from_arrays(*base())
    first.forward(*tokens(9))
    # The message's remedy.
    ktjax.BaseMoEWrapper.clear_buffer_cache()
    x, ids, w = tokens(8)
    np.testing.assert_array_equal(
        second.forward(x, ids, w), float32_sum(second, x, ids, w).astype(x.dtype)
    )


def test_models_do_not_mix():
    """By weight_path; a refused call takes nothing."""
    deferring = {"max_deferred_experts_per_token": PER_TOKEN}
    ours = make(layer_idx=0, weight_path="ours", **deferring)
    theirs = make(layer_idx=1, weight_path="theirs")
    next_layer = make(layer_idx=1, weight_path="ours")
    args = tokens()
    want = np.asarray(theirs.forward(*args))
    ours.forward(*args)
    np.testing.assert_array_equal(theirs.forward(*args), want)
    with pytest.raises(ValueError, match="expert_ids must be within"):
        next_layer.forward(args[0], args[1] + EXPERTS, args[2])
    y = np.asarray(next_layer.forward(*args), np.float32)
    assert_close(y, 2 * want.astype(np.float32), 2**-7)
