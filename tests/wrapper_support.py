"""Small wrappers and their inputs, for the tests of the wrapper classes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from closeness import relative
from flax import nnx

import ktjax
from ktjax import backend
from ktjax.experts import KTMoEWrapper
from ktjax.experts_sft import AMXSFTMoEWrapper
from ktjax.experts_sft_base import LORA_NAMES

EXPERTS, PER_TOKEN, HIDDEN, INNER, RANK, TOKENS = 5, 2, 24, 40, 3, 7
GRAD_NAMES = [f"grad_{name}" for name in LORA_NAMES]
LORA_SHAPES = dict(
    zip(
        LORA_NAMES,
        ktjax.LoRA.shapes(EXPERTS, HIDDEN, INNER, RANK).values(),
        strict=True,
    )
)

# What an inference wrapper says to calls of training.
TRAINING_REFUSED = {
    "forward_sft": "forward_sft() is not available in inference mode. Use forward() "
    "instead, or create wrapper with mode='sft'.",
    **{
        name: f"{name}() is not available in inference mode. Create wrapper with "
        "mode='sft' to use SFT features."
        for name in ("backward", "init_lora_weights", "update_lora_weights")
    },
}


def arguments(**changes):
    """Keyword arguments of the factory; the pool is the running one."""
    pool = backend.get_pool().config
    return {
        "layer_idx": 0,
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_gpu_experts": 0,
        "cpuinfer_threads": pool.threads_per_subpool,
        "threadpool_count": pool.subpool_count,
        "weight_path": "unused",
        "chunked_prefill_size": 512,
        "method": "AMXBF16_SFT",
        "mode": "sft",
        "lora_rank": RANK,
        "lora_alpha": 6.0,
        **changes,
    }


def _bfloat16_values(array):
    # The kernels' operands are bfloat16; with such inputs the distance to the reference
    # is that of the intermediate roundings only.
    return array.astype(ml_dtypes.bfloat16)


def base_arrays(seed=0):
    """gate, up and down as bfloat16 NumPy arrays, near unit gain."""
    rng = np.random.default_rng(seed)
    shapes = (
        (EXPERTS, INNER, HIDDEN),
        (EXPERTS, INNER, HIDDEN),
        (EXPERTS, HIDDEN, INNER),
    )
    return [
        (rng.normal(size=s) / np.sqrt(s[-1])).astype(ml_dtypes.bfloat16) for s in shapes
    ]


def lora_arrays(seed=1, dtype=np.float32, gain=0.4):
    """The six adapters, all of them non-zero, in the wrapper's order."""
    rng = np.random.default_rng(seed)
    return [
        _bfloat16_values(gain * rng.normal(size=s) / np.sqrt(s[-1])).astype(dtype)
        for s in LORA_SHAPES.values()
    ]


def inputs(tokens=TOKENS, seed=2, dtype=np.float32):
    """x, ids (with a skipped slot) and w as NumPy arrays."""
    rng = np.random.default_rng(seed)
    x = _bfloat16_values(rng.normal(size=(tokens, HIDDEN))).astype(dtype)
    ids = np.stack([rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(tokens)])
    ids = ids.astype(np.int32)
    ids[-1, -1] = -1
    w = rng.uniform(0.2, 1.0, size=ids.shape).astype(np.float32)
    return x, ids, w


def make_wrapper(*, weights=True, lora=True, **changes):
    """A training wrapper with weights and adapters."""
    wrapper = KTMoEWrapper(**arguments(**changes))
    assert isinstance(wrapper, AMXSFTMoEWrapper)
    if weights:
        wrapper.load_weights_from_arrays(*base_arrays())
    if lora:
        wrapper.init_lora_weights(*lora_arrays())
    return wrapper


def reference(x, ids, w, lora, scaling, base=None):
    """The oracle on the same weights, in float32."""
    gate, up, down = (jnp.asarray(a, jnp.float32) for a in base or base_arrays())
    return ktjax.reference.moe(x, ids, w, gate, up, down, lora, scaling=scaling)


@functools.partial(jax.jit, static_argnames="scaling")
def reference_gradients(x, ids, w, lora, scaling, grad):
    """The oracle's gradients of x, w and lora, for the output's gradient `grad`."""

    def pairing(x, w, lora):
        y = reference(x, ids, w, lora, scaling).astype(jnp.float32)
        return jnp.sum(y * grad.astype(jnp.float32))

    return jax.grad(pairing, argnums=(0, 1, 2))(x, w, lora)


def output_gradient(shape, dtype=np.float32, seed=9):
    """A random gradient of an output."""
    grad = np.random.default_rng(seed).normal(size=shape)
    return _bfloat16_values(grad).astype(dtype)


def refuses(error, message):
    """Expect `error` with exactly `message`."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def assert_close(actual, expected, bound=0.006):
    """Relative L2 distance at most `bound`; the default is that of BF16 kernels."""
    distance = relative(actual, expected)
    assert distance <= bound, distance


def record_registrations(monkeypatch):
    """A list that receives every (lora, scaling) that reaches the backend."""
    seen = []
    register = backend.register_lora

    def spy(store, lora, scaling):
        seen.append((lora, scaling))
        return register(store, lora, scaling)

    monkeypatch.setattr(backend, "register_lora", spy)
    return seen


def check_training(wrapper, x, ids, w, base):
    """Forward and backward on the base weights against the reference on `base`."""
    wrapper.init_lora_weights(rngs=nnx.Rngs(0))
    for name in ("gate", "up", "down"):
        b = getattr(wrapper, f"{name}_lora_b")
        b.set_value(0.05 * jax.random.normal(jax.random.key(1), b.shape))
    x, ids, w = map(jnp.asarray, (x, ids, w))
    y = wrapper.forward_sft(x, ids, w)

    @jax.jit
    def expected(x, w, lora, grad_y, *base):
        def function(x, w, lora):
            scaling = wrapper.lora_scaling
            return ktjax.reference.moe(x, ids, w, *base, lora, scaling=scaling)

        y, pullback = jax.vjp(function, x.astype(jnp.float32), w, lora)
        return y, *pullback(grad_y.astype(jnp.float32))

    grad_y = jax.random.normal(jax.random.key(2), y.shape, jnp.bfloat16)
    want, grad_x, grad_w, grad_lora = expected(x, w, wrapper.lora, grad_y, *base)
    assert_close(y, want)
    got_x, got_lora = wrapper.backward(grad_y)
    assert_close(got_x, grad_x)
    assert_close(wrapper.grad_weights, grad_w)
    for got, value in zip(got_lora.values(), grad_lora.arrays(), strict=True):
        assert_close(got, value)
