"""Small inference wrappers and their inputs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from checkpoint_formats import matrices
from wrapper_support import arguments

import ktjax
from ktjax import _native, backend
from ktjax.experts import KTMoEWrapper
from ktjax.experts_inference import InferenceMoEWrapper


class Sizes(NamedTuple):
    """Those of a layer of routed experts."""

    experts: int
    per_token: int
    hidden: int
    inner: int

    def arguments(self):
        """As the factory's arguments."""
        return {
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.inner,
        }

    def load(self, path, method, order=None, **changes):
        """A wrapper with a checkpoint's weights, in the mode that the method says."""
        mode = "sft" if method.endswith("_SFT") else "inference"
        given = {"method": method, "mode": mode, "weight_path": str(path), **changes}
        wrapper = KTMoEWrapper(**arguments(**{**self.arguments(), **given}))
        wrapper.load_weights(order)
        return wrapper

    def tokens(self, count=9, seed=3, dtype=ml_dtypes.bfloat16):
        """x (exact in bfloat16), ids (with a skipped slot) and w as NumPy arrays."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((count, self.hidden)).astype(ml_dtypes.bfloat16)
        order = rng.random((count, self.experts)).argsort(-1)
        ids = order[:, : self.per_token].astype(np.int32)
        ids[-1, -1] = -1
        w = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
        return x.astype(dtype), ids, w


LAYER = Sizes(6, 3, 128, 256)
EXPERTS, PER_TOKEN, HIDDEN, INNER = LAYER
tokens = LAYER.tokens


def make(method="BF16", *, weights=True, **changes):
    """An inference wrapper, by default with weights."""
    given = {**LAYER.arguments(), "mode": "inference", "method": method, **changes}
    wrapper = KTMoEWrapper(**arguments(**given))
    assert isinstance(wrapper, InferenceMoEWrapper)
    if weights:
        wrapper.load_weights_from_arrays(*base())
    return wrapper


def base():
    """gate, up and down in float32."""
    return matrices(EXPERTS, HIDDEN, INNER)


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


def forbid_quantising(monkeypatch):
    """Let every weight that is quantised be an error."""

    def fail(*args):
        raise AssertionError("weights were quantised")

    monkeypatch.setattr(_native, "encode", fail)
