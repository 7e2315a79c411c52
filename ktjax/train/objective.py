"""What training makes small: the loss of a batch, from the losses of its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ktjax.train.batching import Batch
from ktjax.train.config import TrainConfig
from ktjax.train.loss import weigh

Losses = jax.Array
Extras = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that is a mean over a batch, in parts that micro-batches can add up.

    Attributes:
      count: batch -> over how many the mean is, a float32 scalar.
      total: (losses, reference, batch) -> the sum of losses, and sums of other numbers
        for the log by name, float32 scalars. `losses` are those of the tokens,
        `[rows, length]` float32; `reference` the same under the reference policy, or
        None.
      needs_reference: whether it compares with a reference policy.
    """

    count: Callable[[Batch], jax.Array]
    total: Callable[[Losses, Losses | None, Batch], tuple[jax.Array, Extras]]
    needs_reference: bool


def _sft_total(
    losses: Losses, reference: Losses | None, batch: Batch
) -> tuple[jax.Array, Extras]:
    del reference
    return jnp.sum(weigh(losses, batch.weights)), {}


# Cross-entropy, the mean over the learnt tokens.
SFT = Objective(lambda batch: jnp.sum(batch.weights), _sft_total, False)


def dpo(beta: float) -> Objective:
    """Direct preference optimisation (arXiv:2305.18290), the mean over the pairs.

    -log σ(β ((log p(chosen) - log p(rejected)) - (the same under the reference))),
    where p is the probability of an answer's learnt tokens. A pair is two neighbouring
    segments of a row, the chosen answer's with an odd number.

    For the log: `reward_margin`, the argument of σ, and `reward_accuracy`, the share of
    pairs in which it is positive.
    """

    def total(
        losses: Losses, reference: Losses | None, batch: Batch
    ) -> tuple[jax.Array, Extras]:
        assert reference is not None
        # log p is minus the losses' sum: rejected minus chosen.
        gains = _by_pair(weigh(reference - losses, batch.weights), batch)
        margin = beta * (gains[..., 0] - gains[..., 1])
        real = _pairs(batch)
        return (
            jnp.sum(jnp.where(real, -jax.nn.log_sigmoid(margin), 0.0)),
            {
                "reward_margin": jnp.sum(jnp.where(real, margin, 0.0)),
                "reward_accuracy": jnp.sum(real & (margin > 0), dtype=jnp.float32),
            },
        )

    return Objective(lambda b: jnp.sum(_pairs(b), dtype=jnp.float32), total, True)


def objective_of(config: TrainConfig) -> Objective:
    """The objective that `config` asks for."""
    return dpo(config.dpo_beta) if config.objective == "dpo" else SFT


def _by_pair(values: jax.Array, batch: Batch) -> jax.Array:
    """Values `[rows, length]` added up by segment: `[rows, pairs, 2]`."""
    rows, length = values.shape
    # Each half of a pair has a token at least.
    pairs = length // 2

    def add(values: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, segments, num_segments=2 * pairs + 1)

    sums = jax.vmap(add)(values, jnp.asarray(batch.segment_ids))
    return sums[:, 1:].reshape(rows, pairs, 2)


def _pairs(batch: Batch) -> jax.Array:
    """Which pairs of a row are there: `[rows, pairs]` bool."""
    return jnp.all(_by_pair(jnp.asarray(batch.weights), batch) > 0, axis=-1)
