"""What is timed: one pass by one contender, with its inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks import shapes
from benchmarks.shapes import Shape

SCALING = 2.0
ROUTINGS = ("uniform", "zipf")
# Tokens of a decode step that follow each other, each with other experts.
DECODE_STEPS = 16

LORA_NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")


@dataclasses.dataclass(frozen=True)
class Case:
    """One pass over one batch by one contender.

    Attributes:
      shape: the layer.
      tokens: rows of x. With 1, every call takes the next of several tokens that go to
        different experts, so that the weights come from memory and not from a cache.
      pass_name: "forward" (base weights), "lora" (forward with adapters) or "train" (y
        and all gradients: x, routing weights, six LoRA arrays).
      family: "ktjax", "xla" or "torch".
      variant: the formulation, one of `variants`; of ktjax's forward also "eager", the
        wrapper's way.
      rank: of the adapters; not used by "forward".
      routing: "uniform", or "zipf": expert i is chosen with weight 1 / (i + 1).
      format: of the base weights, as `benchmarks.formats` reads it; peers: "bf16".
      compute: "bf16" or "int8", of ktjax's products; peers: "bf16".
    """

    shape: Shape
    tokens: int
    pass_name: str
    family: str
    variant: str
    rank: int = 16
    routing: str = "uniform"
    format: str = "bf16"
    compute: str = "bf16"

    def __post_init__(self) -> None:
        for field in ("format", "compute"):
            value = getattr(self, field)
            if self.family != "ktjax" and value != "bf16":
                raise ValueError(
                    f"{self.family}: {field}: expected 'bf16', got {value!r}; only "
                    "ktjax has others"
                )

    @property
    def adapted(self) -> bool:
        """Whether the pass has adapters."""
        return self.pass_name != "forward"

    @property
    def label(self) -> str:
        """The contender's name in tables."""
        if self.family == "ktjax" and self.pass_name != "train":
            return "ktjax"
        return f"{self.family} {self.variant}"

    @property
    def flops(self) -> int:
        """Base GEMM operations of a call."""
        return shapes.flops(self.shape, self.tokens, self.pass_name)

    @property
    def distinct_experts(self) -> float:
        """Experts whose weights a call must read, on average."""
        return float(np.mean([len(np.unique(batch.ids)) for batch in batches(self)]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; see `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """The inverse of `to_json`."""
        return cls(**{**fields, "shape": Shape(**fields["shape"])})


def pass_label(pass_name: str, compute: str) -> str:
    """The name of a pass in tables: "forward", or "forward int8"."""
    return pass_name if compute == "bf16" else f"{pass_name} {compute}"


def variants(family: str, pass_name: str, tokens: int) -> tuple[str, ...]:
    """The formulations worth timing, without those kept for explicit requests."""
    if family == "ktjax":
        return ("save", "recompute") if pass_name == "train" else ("save",)
    if family == "xla":
        return ("gather f32",) if tokens == 1 else ("padded f32", "scan f32")
    if family == "torch":
        return ("loop", "sorted", "grouped")
    raise ValueError(f"family: expected ktjax, xla or torch, got {family!r}")


class Batch(NamedTuple):
    """Inputs of a call, in NumPy."""

    x: np.ndarray  # [tokens, hidden] bfloat16
    ids: np.ndarray  # [tokens, k] int32, distinct in a row
    w: np.ndarray  # [tokens, k] float32, rows add up to 1
    grad_y: np.ndarray  # [tokens, hidden] bfloat16


def batches(case: Case) -> list[Batch]:
    """The batches that a contender cycles through; the same for every contender."""
    return list(_batches(case.shape, case.tokens, case.routing))


@functools.lru_cache(maxsize=8)
def _batches(shape: Shape, tokens: int, routing: str) -> tuple[Batch, ...]:
    rng = np.random.default_rng([tokens, shape.experts, ROUTINGS.index(routing)])
    steps = DECODE_STEPS if tokens == 1 else 1
    ids = _route(shape, steps * tokens, routing, rng)
    if tokens == 1 and routing == "uniform":
        # Dealt like cards: an expert comes again only after all others.
        deals = -(-steps * shape.k // (shape.experts // shape.k * shape.k))
        hands = [
            rng.permutation(shape.experts)[: shape.experts // shape.k * shape.k]
            for _ in range(deals)
        ]
        ids = np.concatenate(hands).reshape(-1, shape.k)[:steps].astype(np.int32)

    def make(ids: np.ndarray) -> Batch:
        w = rng.random(ids.shape, np.float32) + np.float32(0.2)
        x, grad_y = (
            rng.standard_normal((tokens, shape.hidden), np.float32).astype(
                ml_dtypes.bfloat16
            )
            for _ in range(2)
        )
        return Batch(x, ids, w / w.sum(-1, keepdims=True), grad_y)

    return tuple(make(part) for part in np.split(ids, steps))


def _route(
    shape: Shape, tokens: int, routing: str, rng: np.random.Generator
) -> np.ndarray:
    """k distinct experts a token, drawn without replacement (Gumbel top-k)."""
    logits = np.zeros(shape.experts)
    if routing == "zipf":
        # Which experts are popular is random, as the order of work follows their index.
        logits = rng.permutation(-np.log(np.arange(1, shape.experts + 1)))
    keys = logits + rng.gumbel(size=(tokens, shape.experts))
    chosen = np.argsort(-keys, axis=-1)[:, : shape.k].astype(np.int32)
    return np.ascontiguousarray(chosen)


# Prime, so that rows of no width repeat in step.
_NOISE = 4_194_301


def weights(shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """gate `[E, I, H]`, up `[E, I, H]` and down `[E, H, I]` in bfloat16, one at a time.

    Every expert is a window of the same noise at an offset of its own: distinct values
    at the cost of a copy.
    """
    rng = np.random.default_rng(7)
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    for name, sizes in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i))):
        noise = rng.standard_normal(_NOISE, np.float32) * np.float32(sizes[1] ** -0.5)
        once = noise.astype(ml_dtypes.bfloat16)
        twice = np.concatenate([once, once])  # so that no window wraps
        window = min(_NOISE, sizes[0] * sizes[1])
        array = np.empty((e, *sizes), ml_dtypes.bfloat16)
        for expert in range(e):
            offset = expert * 1_000_003 % _NOISE
            array[expert] = np.resize(twice[offset : offset + window], sizes)
        yield name, array


def lora(shape: Shape, rank: int) -> dict[str, np.ndarray]:
    """float32 adapters: A `[E, rank, in]`, B `[E, out, rank]`, neither of them zero."""
    rng = np.random.default_rng(rank)
    widths = {"gate": (shape.hidden, shape.intermediate)}
    widths["up"] = widths["gate"]
    widths["down"] = (shape.intermediate, shape.hidden)
    arrays = {}
    for name, (inputs, outputs) in widths.items():
        a = rng.standard_normal((shape.experts, rank, inputs), np.float32)
        arrays[f"{name}_a"] = a * np.float32(inputs**-0.5)
        b = rng.standard_normal((shape.experts, outputs, rank), np.float32)
        arrays[f"{name}_b"] = b * np.float32(0.05)
    return arrays
