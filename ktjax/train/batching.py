"""Examples -> batches of few shapes, in a shuffled order that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ktjax.train.config import TrainConfig
from ktjax.train.data import Example

# Rows that packing keeps open: more waste less space, but each example tries them all.
OPEN_ROWS = 32


class Batch(NamedTuple):
    """Rows of chats, ready for the model; every array is `[rows, length]`.

    `input_ids` and `targets` (the token that follows, within the chat) are int32;
    `weights` float32 is 1 where the target is to be learnt, else 0; `positions` int32
    counts from 0 in every chat; `segment_ids` int32 numbers the chats of a row from 1,
    and 0 is padding. The two chats of a preference are neighbours, the chosen one
    first.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


class Position(NamedTuple):
    """The next batch of a stream: `batch` of `epoch`, both counted from 0."""

    epoch: int
    batch: int


START = Position(0, 0)


class _Plan(NamedTuple):
    """One batch: for each row the indices of its examples; and the rows' length."""

    rows: list[list[int]]
    length: int


@dataclasses.dataclass(frozen=True)
class Batcher:
    """How examples become batches.

    Attributes:
      batching: "pack" or "pad", as in `TrainConfig`.
      rows: rows of every batch; missing rows are padding.
      sequence_length: length of packed rows, and the longest padded one.
      bucket: padded lengths are multiples of this.
    """

    batching: str
    rows: int
    sequence_length: int
    bucket: int

    @classmethod
    def from_config(cls, config: TrainConfig, rows: int) -> Batcher:
        """The batcher that `config` asks for, with `rows` rows."""
        return cls(config.batching, rows, config.sequence_length, config.bucket)

    def plan(self, examples: Sequence[Example], order: Sequence[int]) -> list[_Plan]:
        """Batches of `examples` taken in `order`; each example occurs exactly once."""
        if self.batching == "pack":
            rows = self._pack(examples, order)
            return self._split(rows, self.sequence_length)
        buckets: dict[int, list[list[int]]] = {}
        for index in order:
            length = -(-_inputs(examples[index]) // self.bucket) * self.bucket
            length = min(length, self.sequence_length)
            buckets.setdefault(length, []).append([index])
        return [
            plan
            for length in sorted(buckets)
            for plan in self._split(buckets[length], length)
        ]

    def build(self, examples: Sequence[Example], plan: _Plan) -> Batch:
        """The arrays of one planned batch."""
        shape = (self.rows, plan.length)
        batch = Batch(*(np.zeros(shape, np.int32) for _ in Batch._fields))
        batch = batch._replace(weights=np.zeros(shape, np.float32))
        for row, indices in enumerate(plan.rows):
            start = 0
            parts = (part for index in indices for part in examples[index].parts)
            for segment, part in enumerate(parts, start=1):
                length = len(part) - 1
                at = np.s_[row, start : start + length]
                batch.input_ids[at] = part.ids[:-1]
                batch.targets[at] = part.ids[1:]
                batch.weights[at] = part.learn[1:]
                batch.positions[at] = np.arange(length)
                batch.segment_ids[at] = segment
                start += length
        return batch

    def once(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Every example once, in order."""
        for plan in self.plan(examples, range(len(examples))):
            yield self.build(examples, plan)

    def _split(self, rows: list[list[int]], length: int) -> list[_Plan]:
        starts = range(0, len(rows), self.rows)
        return [_Plan(rows[start : start + self.rows], length) for start in starts]

    def _pack(
        self, examples: Sequence[Example], order: Sequence[int]
    ) -> list[list[int]]:
        """First fit among the newest `OPEN_ROWS` rows."""
        rows: list[list[int]] = []
        free: list[int] = []
        for index in order:
            need = _inputs(examples[index])
            first = max(0, len(rows) - OPEN_ROWS)
            for row in range(first, len(rows)):
                if free[row] >= need:
                    rows[row].append(index)
                    free[row] -= need
                    break
            else:
                rows.append([index])
                free.append(self.sequence_length - need)
        return rows


class BatchStream:
    """Endless shuffled batches; `position` says where it is and where to resume.

    The order is a function of the seed and the epoch alone, so a stream built at a
    saved position yields exactly what the original would have yielded.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batcher: Batcher,
        seed: int,
        position: Position = START,
    ):
        self.position = position
        self._examples = examples
        self._batcher = batcher
        self._seed = seed
        self._plans = self._shuffle(position.epoch)

    def _shuffle(self, epoch: int) -> list[_Plan]:
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        order = generator.permutation(len(self._examples)).tolist()
        plans = self._batcher.plan(self._examples, order)
        # Padded batches come sorted by length; mix them.
        return [plans[index] for index in generator.permutation(len(plans))]

    def next(self) -> Batch:
        """The batch at `position`, which then moves on."""
        epoch, batch = self.position
        if batch >= len(self._plans):
            epoch, batch = epoch + 1, 0
            self._plans = self._shuffle(epoch)
        self.position = Position(epoch, batch + 1)
        return self._batcher.build(self._examples, self._plans[batch])


def _inputs(example: Example) -> int:
    """Tokens that an example feeds to the model: a last token is only a target."""
    return sum(len(part) - 1 for part in example.parts)
