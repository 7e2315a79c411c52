"""The training wrapper's eager methods: accuracy, order, checks."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from wrapper_support import (
    EXPERTS,
    GRAD_NAMES,
    HIDDEN,
    assert_close,
    base_arrays,
    inputs,
    lora_arrays,
    make_wrapper,
    output_gradient,
    reference,
    reference_gradients,
    refuses,
)

import ktjax
from ktjax import backend, experts_buffer, experts_state


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_forward_matches_the_reference(save, dtype):
    wrapper = make_wrapper()
    x, ids, w = inputs(dtype=dtype)
    y = wrapper.forward_sft(x, ids, w, save_for_backward=save)
    assert isinstance(y, jax.Array)
    assert y.dtype == dtype
    expected = reference(x.astype(np.float32), ids, w, wrapper.lora, 2.0)
    # A bfloat16 output is rounded once more: 2^-9 relative.
    assert_close(y, expected, 0.006 + (dtype != np.float32) * 2**-9)
    assert wrapper._cache_depth == save


def test_forward_without_adapters_is_the_base_model():
    wrapper = make_wrapper(lora=False)
    x, ids, w = inputs()
    y = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert_close(y, reference(x, ids, w, None, 1.0))
    np.testing.assert_array_equal(y, wrapper(x, ids, w))


def test_forward_with_leading_dimensions_and_zero_tokens():
    wrapper = make_wrapper()
    x, ids, w = inputs(tokens=6)
    flat = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    cube = wrapper.forward_sft(
        x.reshape(2, 3, HIDDEN), ids.reshape(2, 3, -1), w.reshape(2, 3, -1)
    )
    assert_close(cube.reshape(flat.shape), flat, 1e-6)
    grad_input, _ = wrapper.backward(np.ones_like(cube))
    assert grad_input.shape == (2, 3, HIDDEN)
    for save in (False, True):
        assert wrapper.forward_sft(x[:0], ids[:0], w[:0], save).shape == (0, HIDDEN)
    grad_input, grads = wrapper.backward(np.zeros((0, HIDDEN), np.float32))
    assert grad_input.shape == (0, HIDDEN)
    assert all(not np.asarray(grad).any() for grad in grads.values())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_backward_matches_the_reference_gradient(dtype):
    wrapper = make_wrapper()
    x, ids, w = inputs(dtype=dtype)
    y = wrapper.forward_sft(x, ids, w)
    grad = output_gradient(y.shape, dtype)
    grad_input, grads = wrapper.backward(grad)
    dx, dw, dlora = reference_gradients(
        x.astype(np.float32), ids, w, wrapper.lora, 2.0, grad
    )
    assert grad_input.dtype == dtype
    assert_close(grad_input, dx, 0.006 + (dtype != np.float32) * 2**-9)
    assert list(grads) == GRAD_NAMES
    for name, expected in zip(GRAD_NAMES, dlora.arrays(), strict=True):
        assert grads[name].dtype == jnp.float32
        assert_close(grads[name], expected)
    assert_close(wrapper.grad_weights, dw)
    # The slot with id -1 took no part.
    assert wrapper.grad_weights[-1, -1] == 0
    assert wrapper._cache_depth == 0


def test_gradients_come_in_the_adapters_dtype():
    wrapper = make_wrapper(lora=False)
    wrapper.init_lora_weights(*lora_arrays(dtype=ml_dtypes.bfloat16))
    y = wrapper.forward_sft(*inputs())
    _, grads = wrapper.backward(np.ones_like(y))
    assert {str(grad.dtype) for grad in grads.values()} == {"bfloat16"}


def test_wrapper_equals_direct_calls():
    """The eager methods, the pure path, `ktjax.moe` and the backend: one result."""
    wrapper = make_wrapper()
    x, ids, w = inputs()
    grad = output_gradient(x.shape)
    with ktjax.ExpertStore.from_arrays(*base_arrays()) as store:
        lora = wrapper.lora

        def direct(x, w, lora):
            return ktjax.moe(x, ids, w, store, lora, scaling=2.0)

        y, pullback = jax.vjp(direct, jnp.asarray(x), jnp.asarray(w), lora)
        dx, dw, dlora = pullback(jnp.asarray(grad))
        backend.register_lora(store, lora, 2.0)
        from_backend = backend.forward_registered(store, x, ids, w)

    assert_close(wrapper.forward_sft(x, ids, w), y, 1e-6)
    grad_input, grads = wrapper.backward(grad)
    assert_close(grad_input, dx, 1e-6)
    assert_close(wrapper.grad_weights, dw, 1e-6)
    for name, expected in zip(GRAD_NAMES, dlora.arrays(), strict=True):
        assert_close(grads[name], expected, 1e-6)
    assert_close(wrapper(x, ids, w), y, 1e-6)
    assert_close(from_backend, y, 1e-6)
    unsaved = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert_close(unsaved, from_backend, 1e-6)


def test_backward_is_last_in_first_out():
    wrapper = make_wrapper(max_cache_depth=3)
    cases = [inputs(tokens=n, seed=n) for n in (7, 4, 7)]
    for depth, case in enumerate(cases, start=1):
        wrapper.forward_sft(*case)
        # A forward that saves nothing leaves the saved ones alone.
        wrapper.forward_sft(*inputs(seed=50), save_for_backward=False)
        assert wrapper._cache_depth == depth
    for x, ids, w in reversed(cases):
        grad = output_gradient(x.shape)
        dx, dw, _ = reference_gradients(x, ids, w, wrapper.lora, 2.0, grad)
        grad_input, _ = wrapper.backward(grad)
        assert_close(grad_input, dx)
        assert_close(wrapper.grad_weights, dw)
    assert wrapper._cache_depth == 0


def test_saved_forward_keeps_its_values():
    """Neither the caller's arrays nor the adapters may change what backward sees."""
    wrapper = make_wrapper()
    before = wrapper.lora
    x, ids, w = inputs()
    given = [experts_buffer.aligned_empty(a.shape, a.dtype) for a in (x, ids, w)]
    for target, source in zip(given, (x, ids, w), strict=True):
        target[...] = source
    wrapper.forward_sft(*given)
    for target in given:
        target[...] = 0
    wrapper.init_lora_weights(*lora_arrays(seed=77))
    grad = output_gradient(x.shape)
    dx, _, dlora = reference_gradients(x, ids, w, before, 2.0, grad)
    grad_input, grads = wrapper.backward(grad)
    assert_close(grad_input, dx)
    assert_close(grads["grad_down_lora_a"], dlora.down_a)


def test_full_and_empty_stack():
    wrapper = make_wrapper(max_cache_depth=2)
    x, ids, w = inputs()
    with refuses(
        RuntimeError,
        "No forward cache available. "
        "Call forward_sft() with save_for_backward=True first.",
    ):
        wrapper.backward(x)
    wrapper.forward_sft(x, ids, w)
    wrapper.forward_sft(x, ids, w)
    with refuses(
        RuntimeError,
        "Forward cache full (depth=2, max=2). Call backward() to free cache slots.",
    ):
        wrapper.forward_sft(x, ids, w)
    wrapper.forward_sft(x, ids, w, save_for_backward=False)
    wrapper.backward(x)
    wrapper.forward_sft(x, ids, w)


def test_eager_calls_compile_once():
    functions: list[Any] = [experts_state.forward_saving, experts_state.pull_back]
    wrapper = make_wrapper()
    x, ids, w = inputs(tokens=11)
    wrapper.forward_sft(x, ids, w)
    wrapper.backward(x)
    compiled = [function._cache_size() for function in functions]
    for seed in range(3):
        wrapper.init_lora_weights(*lora_arrays(seed))
        wrapper.forward_sft(x, ids, w)
        wrapper.backward(x)
    assert [function._cache_size() for function in functions] == compiled


def test_weights_not_loaded():
    wrapper = make_wrapper(weights=False)
    message = "Weights not loaded. Call load_weights() first."
    for call in (
        lambda: wrapper.forward_sft(*inputs()),
        lambda: wrapper.backward(inputs()[0]),
        lambda: wrapper.update_lora_weights(),
        lambda: wrapper(*inputs()),
    ):
        with refuses(RuntimeError, message):
            call()


def test_adapters_not_initialised():
    wrapper = make_wrapper(lora=False)
    with refuses(
        RuntimeError,
        "LoRA weights not initialized. Call init_lora_weights() first, "
        "or set save_for_backward=False.",
    ):
        wrapper.forward_sft(*inputs())
    with refuses(
        RuntimeError, "LoRA weights not initialized. Call init_lora_weights() first."
    ):
        wrapper.update_lora_weights()


def changed(index, value):
    arguments = list(inputs())
    arguments[index] = value
    return arguments


X, IDS, W = inputs()
IDS_TOO_BIG = IDS.copy()
IDS_TOO_BIG[3, 1] = EXPERTS
IDS_TOO_SMALL = IDS.copy()
IDS_TOO_SMALL[2, 0] = -2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            changed(0, X.astype(np.float64)),
            "hidden_states must be float32 or bfloat16, got float64; cast it first",
        ),
        (
            changed(0, X[:, :-1]),
            "hidden_states must have shape (..., 24), got (7, 23)",
        ),
        (changed(0, np.float32(1)), "hidden_states must have shape (..., 24), got ()"),
        (changed(1, W), "expert_ids must be integers, got float32; cast first"),
        (changed(1, IDS[:, :1]), "expert_ids must have shape (7, 2), got (7, 1)"),
        (
            changed(1, IDS_TOO_BIG),
            "expert_ids must be within -1..4 (-1 skips a slot), got 5 at (3, 1)",
        ),
        (
            changed(1, IDS_TOO_SMALL),
            "expert_ids must be within -1..4 (-1 skips a slot), got -2 at (2, 0)",
        ),
        (changed(2, IDS), "weights must be floats, got int32; cast it first"),
        (changed(2, W[:-1]), "weights must have shape (7, 2), got (6, 2)"),
    ],
)
def test_forward_checks_its_arguments(arguments, message):
    wrapper = make_wrapper()
    for save in (True, False):
        with refuses(ValueError, f"forward_sft: {message}"):
            wrapper.forward_sft(*arguments, save_for_backward=save)
    assert wrapper._cache_depth == 0


def test_backward_checks_the_gradient_and_keeps_the_forward():
    wrapper = make_wrapper()
    wrapper.forward_sft(X, IDS, W)
    with refuses(
        ValueError, "backward: grad_output must have shape (7, 24), got (6, 24)"
    ):
        wrapper.backward(X[:-1])
    with refuses(
        ValueError,
        "backward: grad_output must be float32, as the output was, got bfloat16; "
        "cast it first",
    ):
        wrapper.backward(X.astype(ml_dtypes.bfloat16))
    with refuses(
        RuntimeError, "No routing-weight gradient available. Call backward() first."
    ):
        _ = wrapper.grad_weights
    grad_input, _ = wrapper.backward(X)
    assert grad_input.shape == X.shape


def test_eager_methods_refuse_tracers():
    wrapper = make_wrapper()
    with pytest.raises(RuntimeError, match=r"hidden_states is traced.*wrapper\(x, ids"):
        jax.jit(lambda x: wrapper.forward_sft(x, IDS, W))(X)
    with pytest.raises(RuntimeError, match=r"the wrapper is traced.*wrapper\(x, ids"):
        nnx.jit(lambda module: module.forward_sft(X, IDS, W))(wrapper)
