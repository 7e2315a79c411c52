"""The configuration of a training run: one frozen dataclass, validated when built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktjax import assets


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its documentation and its limits.

    Limits: `least` and `most` (inclusive), `above` (exclusive), `choices`.
    """
    metadata = {"help": help, "limits": limits}
    if isinstance(default, Callable):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; every default is the embedded demo's.

    Each field's meaning and limits stand in its metadata, from which the command line
    takes its options and the constructor its checks (ValueError naming the field).
    """

    model: Path = _option(
        assets.demo_model, "Hugging Face directory of the base model"
    )
    train_data: Path = _option(
        lambda: assets.demo_data("train"),
        "JSONL chats to learn: messages, or alpaca's instruction/input/output",
    )
    eval_data: Path | None = _option(
        lambda: assets.demo_data("eval"), "JSONL chats to evaluate on"
    )
    output_dir: Path | None = _option(
        None, "receives metrics.jsonl and checkpoints/ (default: the first free runs/N)"
    )
    resume: bool = _option(
        False, "continue from the newest checkpoint in the output directory"
    )
    experts: str = _option("bf16", "storage format of the expert weights")
    dtype: str = _option(
        "float32",
        "dtype of everything outside the experts; on a CPU float32 is the fast one",
        choices=("float32", "bfloat16"),
    )
    lora_rank: int = _option(16, "rank of the experts' adapters", least=1, most=256)
    lora_alpha: float = _option(
        32.0, "the adapters are scaled by lora_alpha / lora_rank", above=0
    )
    steps: int = _option(240, "optimizer steps in all", least=1)
    batch_size: int = _option(10, "rows of a micro-batch", least=1)
    accumulation: int = _option(
        1,
        "micro-batches per step; the gradient is that of one batch of all their rows",
        least=1,
    )
    sequence_length: int = _option(
        128, "longest row in tokens; a longer chat is an error", least=2
    )
    batching: str = _option(
        "pack",
        "pack: several chats fill a row of sequence_length tokens, unseen by each other; "
        "pad: one chat a row, rows of like length together",
        choices=("pack", "pad"),
    )
    bucket: int = _option(
        64,
        "pad: lengths are rounded up to a multiple of this; each length compiles once",
        least=1,
    )
    learning_rate: float = _option(
        5e-3, "peak of the schedule: a linear warm-up, then a cosine", above=0
    )
    warmup_steps: int = _option(20, "steps of the warm-up", least=0)
    final_rate: float = _option(
        0.05, "share of the learning rate that the cosine ends at", least=0, most=1
    )
    weight_decay: float = _option(0.0, "AdamW's decoupled weight decay", least=0)
    clip_norm: float = _option(1.0, "largest global norm of the gradient", above=0)
    router_aux_weight: float = _option(
        0.0, "weight of the router's load-balancing loss", least=0
    )
    eval_every: int = _option(
        80, "steps between evaluations of the loss; 0 = only at the end", least=0
    )
    eval_batch: int = _option(
        64, "rows of a batch when evaluating and generating", least=1
    )
    answers: int = _option(
        256,
        "evaluation chats to answer and compare exactly, before and after; 0 = none",
        least=0,
    )
    answer_tokens: int = _option(24, "most tokens of a generated answer", least=1)
    checkpoint_every: int = _option(
        80, "steps between checkpoints; 0 = only at the end", least=0
    )
    keep_checkpoints: int = _option(2, "how many of the newest checkpoints stay", least=1)
    seed: int = _option(
        0, "decides the adapters' start, the order of the data, and dropout", least=0
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _convert(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            _check_limits(field.name, value, field.metadata["limits"])
        if self.resume and self.output_dir is None:
            raise ValueError("TrainConfig.resume needs output_dir, the run to continue")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"TrainConfig.warmup_steps must be below steps ({self.steps}), "
                f"got {self.warmup_steps}"
            )

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the updates; a resumed run must have the same."""
        names = (
            "experts dtype lora_rank lora_alpha steps batch_size accumulation "
            "sequence_length batching bucket learning_rate warmup_steps final_rate "
            "weight_decay clip_norm router_aux_weight seed"
        )
        return {name: getattr(self, name) for name in names.split()}


def _convert(name: str, kind: str, value: Any) -> Any:
    """`value` as the field's type; paths may come as strings, floats as integers."""
    if kind.startswith("Path"):
        return None if value is None and "None" in kind else Path(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and number and math.isfinite(value):
        return float(value)
    if type(value).__name__ != kind or kind == "float":
        raise ValueError(f"TrainConfig.{name} must be of type {kind}, got {value!r}")
    return value


def _check_limits(name: str, value: Any, limits: dict[str, Any]) -> None:
    """Hold `value` against the limits of its field."""
    tests: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "least": ("at least", lambda limit: value >= limit),
        "most": ("at most", lambda limit: value <= limit),
        "above": ("above", lambda limit: value > limit),
        "choices": ("one of", lambda limit: value in limit),
    }
    for kind, limit in limits.items():
        words, passes = tests[kind]
        if not passes(limit):
            shown = ", ".join(limit) if kind == "choices" else limit
            raise ValueError(
                f"TrainConfig.{name} must be {words} {shown}, got {value!r}"
            )
