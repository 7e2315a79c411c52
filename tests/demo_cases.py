"""The demo model with adapters that are not at their start, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax import assets
from ktjax.config import LoRAConfig
from ktjax.models import Decoder, from_pretrained

LORA = LoRAConfig(4, 8.0)


def load(lora: LoRAConfig = LORA, **kwargs) -> Decoder:
    """The same adapters for every `lora` of the same rank."""
    model = from_pretrained(assets.demo_model(), dtype=jnp.float32, lora=lora, **kwargs)
    # B away from zero, or A would have no gradient.
    state = nnx.state(model, nnx.LoRAParam)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    nnx.update(
        model,
        jax.tree.map(lambda a: 0.05 * jax.random.normal(next(keys), a.shape), state),
    )
    return model


def gradient(model: Decoder, ids: jax.Array):
    """A loss of the logits, and its gradient by the adapters."""
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def run(lora, rest):
        def loss(lora):
            logits = nnx.merge(graph, lora, rest, copy=True)(ids)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.value_and_grad(loss)(lora)

    # Read before anybody closes the stores.
    return jax.tree.map(np.asarray, run(lora, rest))
