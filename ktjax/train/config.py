"""The configuration of a training run: one frozen dataclass, validated when built."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from ktjax import assets


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field means, and its limits; the annotation of each field carries one.

    Attributes:
      help: one line for people.
      least: smallest value allowed.
      most: largest value allowed.
      above: every value must be greater.
      choices: the values allowed.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; every default is the embedded demo's.

    The annotation of each field says what it means and what it may be; from there the
    command line takes its options and the constructor its checks, which raise
    ValueError with the field's name, what was expected, and the value.
    """

    model: Annotated[Path, Option("Hugging Face directory of the base model")] = (
        dataclasses.field(default_factory=assets.demo_model)
    )
    train_data: Annotated[
        Path,
        Option("JSONL chats to learn: messages, or alpaca's instruction/input/output"),
    ] = dataclasses.field(default_factory=lambda: assets.demo_data("train"))
    eval_data: Annotated[Path | None, Option("JSONL chats to evaluate on")] = (
        dataclasses.field(default_factory=lambda: assets.demo_data("eval"))
    )
    output_dir: Annotated[
        Path | None,
        Option(
            "receives metrics.jsonl and checkpoints/ (default: the first free runs/N)"
        ),
    ] = None
    resume: Annotated[
        bool, Option("continue from the newest checkpoint in the output directory")
    ] = False
    experts: Annotated[str, Option("storage format of the expert weights")] = "bf16"
    dtype: Annotated[
        str,
        Option(
            "dtype of everything outside the experts; on a CPU float32 is the fast one",
            choices=("float32", "bfloat16"),
        ),
    ] = "float32"
    lora_rank: Annotated[
        int, Option("rank of the experts' adapters", least=1, most=256)
    ] = 16
    lora_alpha: Annotated[
        float, Option("the adapters are scaled by lora_alpha / lora_rank", above=0)
    ] = 32.0
    steps: Annotated[int, Option("optimizer steps in all", least=1)] = 240
    batch_size: Annotated[int, Option("rows of a micro-batch", least=1)] = 10
    accumulation: Annotated[
        int,
        Option(
            "micro-batches per step; the gradient is that of one big batch",
            least=1,
        ),
    ] = 1
    sequence_length: Annotated[
        int, Option("longest row in tokens; a longer chat is an error", least=2)
    ] = 128
    batching: Annotated[
        str,
        Option(
            "pack: several chats, unseen by each other, share one row; "
            "pad: one chat a row, rows of like length together",
            choices=("pack", "pad"),
        ),
    ] = "pack"
    bucket: Annotated[
        int,
        Option(
            "pad: lengths are rounded up to multiples of this, each compiled",
            least=1,
        ),
    ] = 64
    learning_rate: Annotated[
        float, Option("peak of the schedule: a linear warm-up, then a cosine", above=0)
    ] = 5e-3
    warmup_steps: Annotated[int, Option("steps of the warm-up", least=0)] = 20
    final_rate: Annotated[
        float,
        Option("share of the learning rate that the cosine ends at", least=0, most=1),
    ] = 0.05
    weight_decay: Annotated[
        float, Option("AdamW's decoupled weight decay", least=0)
    ] = 0.0
    clip_norm: Annotated[
        float, Option("largest global norm of the gradient", above=0)
    ] = 1.0
    router_aux_weight: Annotated[
        float, Option("weight of the router's load-balancing loss", least=0)
    ] = 0.0
    eval_every: Annotated[
        int,
        Option("steps between evaluations of the loss; 0 = only at the end", least=0),
    ] = 80
    eval_batch: Annotated[
        int, Option("rows of a batch when evaluating and generating", least=1)
    ] = 64
    answers: Annotated[
        int,
        Option(
            "chats to answer and compare exactly, before and after; 0 = none",
            least=0,
        ),
    ] = 256
    answer_tokens: Annotated[
        int, Option("most tokens of a generated answer", least=1)
    ] = 24
    checkpoint_every: Annotated[
        int, Option("steps between checkpoints; 0 = only at the end", least=0)
    ] = 80
    keep_checkpoints: Annotated[
        int, Option("how many of the newest checkpoints stay", least=1)
    ] = 2
    seed: Annotated[
        int,
        Option(
            "decides the adapters' start, the order of the data, and dropout", least=0
        ),
    ] = 0

    def __post_init__(self) -> None:
        for name, hint in _fields():
            value = _convert(name, hint.__origin__, getattr(self, name))
            object.__setattr__(self, name, value)
            _check_limits(name, value, hint.__metadata__[0])
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


def _fields() -> list[tuple[str, Any]]:
    """(name, `Annotated` hint) of every field, in order."""
    return list(typing.get_type_hints(TrainConfig, include_extras=True).items())


def options() -> list[tuple[str, type, Option, Any]]:
    """(name, type, option, default) of every field, for building a command line."""
    defaults = TrainConfig()
    return [
        (name, _base(hint.__origin__), hint.__metadata__[0], getattr(defaults, name))
        for name, hint in _fields()
    ]


def _base(kind: Any) -> type:
    """`T` of `T | None`, or the type itself."""
    return typing.get_args(kind)[0] if typing.get_args(kind) else kind


def _convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as the field's type; paths may come as strings, floats as integers."""
    base = _base(kind)
    if value is None and base is not kind:
        return None
    if base is Path and isinstance(value, str | Path):
        return Path(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if base is float and number and math.isfinite(value):
        return float(value)
    if base is float or type(value) is not base:
        raise ValueError(
            f"TrainConfig.{name} must be of type {base.__name__}, got {value!r}"
        )
    return value


def _check_limits(name: str, value: Any, option: Option) -> None:
    """Hold `value` against the limits of its field."""
    tests: list[tuple[str, Any, Callable[[Any], bool]]] = [
        ("at least", option.least, lambda limit: value >= limit),
        ("at most", option.most, lambda limit: value <= limit),
        ("above", option.above, lambda limit: value > limit),
        ("one of", option.choices, lambda limit: value in limit),
    ]
    for words, limit, passes in tests:
        if limit is not None and not passes(limit):
            shown = ", ".join(limit) if isinstance(limit, tuple) else limit
            raise ValueError(
                f"TrainConfig.{name} must be {words} {shown}, got {value!r}"
            )
