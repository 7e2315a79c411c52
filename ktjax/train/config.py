"""The configurations of training and generation, validated when built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from ktjax import assets
from ktjax.models.loading import EXPERTS
from ktjax.train.options import Option, check_fields

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; every default is the embedded demo's.

    The annotation of each field says what it means and what it may be; from there the
    command line takes its options and the constructor its checks, which raise
    ValueError with the field's name, what was expected, and the value.
    """

    model: Annotated[
        Path | None, Option("Hugging Face directory of the base model (default: demo)")
    ] = None
    train_data: Annotated[
        Path | None,
        Option(
            "JSONL chats to learn: messages, or alpaca's instruction/input/output "
            "(default: demo)"
        ),
    ] = None
    eval_data: Annotated[
        Path | None,
        Option("JSONL chats to evaluate on (default: the demo's with the demo's data)"),
    ] = None
    output_dir: Annotated[
        Path | None,
        Option(
            "receives metrics.jsonl and checkpoints/ (default: the first free runs/N)"
        ),
    ] = None
    resume: Annotated[
        bool, Option("continue from the newest checkpoint in the output directory")
    ] = False
    experts: Annotated[
        str,
        Option(
            "storage format of the frozen expert weights: "
            f"{', '.join(EXPERTS)}; auto = that of the checkpoint"
        ),
    ] = "bf16"
    group_size: Annotated[
        int | None, Option("int4_kgroup: depths that share a scale, 32, 64 or 128")
    ] = None
    zero_point: Annotated[bool, Option("int4_kgroup: quantise with zero points")] = (
        False
    )
    dtype: Annotated[
        DType,
        Option(
            "dtype of everything outside the experts; on a CPU float32 is the fast one"
        ),
    ] = "float32"
    activation_policy: Annotated[
        Literal["save", "recompute"],
        Option("save the experts' activations, or recompute them in the backward pass"),
    ] = "save"
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
        Literal["pack", "pad"],
        Option(
            "pack: several chats, unseen by each other, share one row; "
            "pad: one chat a row, rows of like length together"
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
        check_fields(self)
        if self.model is not None and self.train_data is None:
            raise ValueError("TrainConfig.model needs train_data, what it shall learn")
        if self.resume and self.output_dir is None:
            raise ValueError("TrainConfig.resume needs output_dir, the run to continue")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"TrainConfig.warmup_steps must be below steps ({self.steps}), "
                f"got {self.warmup_steps}"
            )

    @property
    def model_path(self) -> Path:
        """The directory of the base model: the given one, or the demo's."""
        return self.model or assets.demo_model()

    @property
    def train_path(self) -> Path:
        """The file of chats to learn: the given one, or the demo's."""
        return self.train_data or assets.demo_data("train")

    @property
    def eval_path(self) -> Path | None:
        """The file to evaluate on: the given one, the demo's for the demo, or none."""
        if self.eval_data is None and self.train_data is None:
            return assets.demo_data("eval")
        return self.eval_data

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the updates; a resumed run must have the same."""
        names = (
            "experts group_size zero_point dtype lora_rank lora_alpha steps "
            "batch_size accumulation "
            "sequence_length batching bucket learning_rate warmup_steps final_rate "
            "weight_decay clip_norm router_aux_weight seed"
        )
        return {name: getattr(self, name) for name in names.split()}


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to generate, and with which model; fields as in `TrainConfig`."""

    prompt: Annotated[str, Option("the user's message")]
    model: Annotated[
        Path | None,
        Option("Hugging Face directory (default: the adapter's, or else the demo's)"),
    ] = None
    run: Annotated[
        Path | None,
        Option("output directory of a training, to use its newest adapters"),
    ] = None
    adapter: Annotated[
        Path | None, Option("directory of an adapter, in any format that is known")
    ] = None
    system: Annotated[str | None, Option("the system message")] = None
    experts: Annotated[
        str | None,
        Option(
            f"storage format of the expert weights: {', '.join(EXPERTS)} "
            "(default: the run's, or else bf16)"
        ),
    ] = None
    group_size: Annotated[
        int | None, Option("int4_kgroup: depths that share a scale, 32, 64 or 128")
    ] = None
    zero_point: Annotated[bool, Option("int4_kgroup: quantise with zero points")] = (
        False
    )
    compute: Annotated[
        Literal["bf16", "int8"],
        Option("int8: quantise activations too, for integer codes"),
    ] = "bf16"
    dtype: Annotated[DType, Option("dtype of everything outside the experts")] = (
        "float32"
    )
    max_new_tokens: Annotated[int, Option("most tokens to generate", least=1)] = 64
    temperature: Annotated[
        float, Option("of the sampling; 0 = always the most probable token", least=0)
    ] = 0.0
    top_k: Annotated[
        int | None, Option("sample among the k most probable tokens", least=1)
    ] = None
    top_p: Annotated[
        float | None,
        Option("sample among tokens whose probabilities reach p", above=0, most=1),
    ] = None
    seed: Annotated[int, Option("decides the sampling", least=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.experts is None and (self.group_size is not None or self.zero_point):
            raise ValueError(
                "GenerateConfig.group_size and zero_point need experts, the format "
                "that has them"
            )
        if self.run is not None and self.adapter is not None:
            raise ValueError("GenerateConfig: give run or adapter, not both")
