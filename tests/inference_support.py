"""Small inference wrappers and their inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from checkpoint_formats import matrices
from wrapper_support import arguments

import ktjax
from ktjax import backend
from ktjax.experts import KTMoEWrapper
from ktjax.experts_inference import InferenceMoEWrapper

EXPERTS, PER_TOKEN, HIDDEN, INNER = 6, 3, 128, 256


def make(method="BF16", *, weights=True, **changes):
    """An inference wrapper, by default with weights."""
    sizes = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "mode": "inference",
    }
    wrapper = KTMoEWrapper(**arguments(**{**sizes, "method": method, **changes}))
    assert isinstance(wrapper, InferenceMoEWrapper)
    if weights:
        wrapper.load_weights_from_arrays(*base())
    return wrapper


def base():
    """gate, up and down in float32."""
    return matrices(EXPERTS, HIDDEN, INNER)


def tokens(count=9, seed=3, dtype=ml_dtypes.bfloat16):
    """x, ids (with a skipped slot) and w as NumPy arrays."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, HIDDEN)).astype(ml_dtypes.bfloat16).astype(dtype)
    ids = rng.random((count, EXPERTS)).argsort(-1)[:, :PER_TOKEN].astype(np.int32)
    ids[-1, -1] = -1
    w = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
    return x, ids, w


def values(wrapper):
    """The float32 values of the store."""
    return wrapper._loaded().store.dequantize()


# One function, so that tests share what is compiled.
_reference = jax.jit(ktjax.reference.moe)


def reference(x, ids, w, weights):
    """The float32 oracle."""
    x = jnp.asarray(x, jnp.float32)
    arrays = map(jnp.asarray, (ids, w, *weights))
    return np.asarray(_reference(x, *arrays))


def float32_sum(wrapper, x, ids, w):
    """The store's sum before it is rounded to the dtype of x."""
    out = np.empty(x.shape, np.float32)
    forward = backend.submit_forward_registered(
        wrapper._loaded().store, x, ids, w, out=out, compute=wrapper.compute
    )
    return forward.result()
