"""The evaluation loss, how far routing has drifted, and when to stop early."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax.train.batching import Batch, Batcher
from ktjax.train.config import TrainConfig
from ktjax.train.data import Example
from ktjax.train.objective import objective_of
from ktjax.train.step import EvalSums, Frozen, TrainState, make_eval_step


class Evaluator:
    """The mean loss of the evaluation examples under a state's adapters."""

    def __init__(
        self,
        model: nnx.Module,
        frozen: Frozen,
        examples: Sequence[Example],
        config: TrainConfig,
    ):
        self._frozen = frozen
        self._examples = examples
        self._batcher = Batcher.from_config(config, config.eval_batch)
        model.eval()
        self._step = make_eval_step(nnx.graphdef(model), objective_of(config))
        model.train()
        self._base_load: np.ndarray | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Evaluate.

        Returns:
          `eval_loss`, the mean over all learnt tokens or what else the objective says,
          and its extras, each as `eval_...`. With experts also
          `router_drift`: by how much the load of the experts differs from the base
          model's on the first batch, as half the sum of absolute differences of the
          shares, averaged over the layers: 0 = as in the base model, 1 = not one token
          goes where it went.
        """
        totals: dict[str, float] = defaultdict(float)
        count = 0.0
        drift: dict[str, float] = {}
        for batch in self._batcher.once(self._examples):
            sums = self._run(state.lora, state.random, batch)
            count += float(sums.parts)
            for name, value in {"loss": sums.loss, **sums.extras}.items():
                totals[name] += float(value)
            if sums.load is not None and not drift:
                drift = {"router_drift": self._drift(state, batch, sums.load)}
        means = {f"eval_{name}": total / count for name, total in totals.items()}
        return {**means, **drift}

    def _run(self, lora: nnx.State, random: nnx.State, batch: Batch) -> EvalSums:
        return self._step(lora, random, self._frozen, batch)

    def _drift(self, state: TrainState, batch: Batch, load: jax.Array) -> float:
        if self._base_load is None:
            # Adapters of zeros are the base model, without a second copy of it.
            zeros = jax.tree.map(jnp.zeros_like, state.lora)
            self._base_load = np.asarray(self._run(zeros, state.random, batch).load)
        difference = np.abs(np.asarray(load) - self._base_load)
        return float(difference.sum(axis=-1).mean() / 2)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far; immutable, and part of every checkpoint.

    Attributes:
      loss: its loss; infinite before the first.
      step: after which step it was.
      since: evaluations since then.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0

    def after(self, loss: float, step: int) -> Best:
        """The best once an evaluation has given `loss` after `step`."""
        if loss < self.loss:
            return Best(loss, step)
        return dataclasses.replace(self, since=self.since + 1)

    def to_json(self) -> dict[str, Any] | None:
        """For a checkpoint's meta; None before the first evaluation."""
        return dataclasses.asdict(self) if self.step else None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> Best:
        """What `to_json` gave."""
        return cls(**raw) if raw else cls()
