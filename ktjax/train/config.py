"""The configuration of a training, validated when built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from ktjax import assets
from ktjax.config import LoRAConfig
from ktjax.models.loading import EXPERTS
from ktjax.train.options import Option, check_fields

DType = Literal["float32", "bfloat16"]

# Options that do not decide the updates of a training. What the paths name does, and is
# compared by its content.
_FREE = frozenset(
    {
        *("model", "train_data", "eval_data", "output_dir", "init_adapter", "resume"),
        *("targets", "activation_policy", "tensorboard"),
        *("patience", "eval_every", "eval_batch", "answers", "answer_tokens"),
        *("checkpoint_every", "keep_checkpoints"),
    }
)


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
            "JSONL chats to learn: messages, prompt/completion, or alpaca's "
            "instruction/input/output; for dpo prompt/chosen/rejected (default: demo)"
        ),
    ] = None
    eval_data: Annotated[
        Path | None,
        Option("JSONL chats to evaluate on (default: the demo's with the demo's data)"),
    ] = None
    eval_split: Annotated[
        float,
        Option(
            "share of the training chats that is set aside to evaluate on; "
            "needs that there is no eval_data",
            least=0,
            most=0.9,
        ),
    ] = 0.0
    output_dir: Annotated[
        Path | None,
        Option(
            "receives config.yaml, metrics.jsonl and checkpoints/ "
            "(default: the first free runs/N)"
        ),
    ] = None
    resume: Annotated[
        bool, Option("continue from the newest checkpoint in the output directory")
    ] = False
    init_adapter: Annotated[
        Path | None,
        Option(
            "adapter to start from, in any format, or a training's output; "
            "lora_rank and lora_alpha must be its own (default: zero)"
        ),
    ] = None
    objective: Annotated[
        Literal["sft", "dpo"],
        Option(
            "sft: the cross-entropy of the answers; dpo: chosen over rejected ones, "
            "against the policy that the training starts from"
        ),
    ] = "sft"
    dpo_beta: Annotated[
        float,
        Option("dpo: how much a change of log-probabilities weighs", above=0),
    ] = 0.1
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
    dense: Annotated[
        str | None,
        Option(
            "storage format of attention, dense layers, shared experts and the head, "
            "or xla for plain arrays (default: bf16, where that changes no value)"
        ),
    ] = None
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
    remat: Annotated[
        bool,
        Option(
            "keep a layer's input only and compute the layer again in the backward "
            "pass: less memory, more time"
        ),
    ] = False
    lora_rank: Annotated[
        int, Option("rank of the experts' adapters", least=1, most=256)
    ] = 16
    lora_alpha: Annotated[
        float, Option("the adapters are scaled by lora_alpha / lora_rank", above=0)
    ] = 32.0
    rslora: Annotated[
        bool, Option("scale the adapters by lora_alpha / sqrt(lora_rank) instead")
    ] = False
    rank_pattern: Annotated[
        dict[str, int],
        Option(
            "ranks of layers, as {pattern: rank}; a regular expression for the end of "
            "a name like layers.3.mlp.experts; the first that fits counts"
        ),
    ] = dataclasses.field(default_factory=dict)
    lora_dropout: Annotated[
        float,
        Option(
            "share of the adapters' input values that a training step drops; below 1",
            least=0,
        ),
    ] = 0.0
    targets: Annotated[
        str,
        Option(
            "modules that must be trained, as comma-separated patterns like those of "
            "rank_pattern; an error if one would stay frozen"
        ),
    ] = "experts"
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
    moment_dtype: Annotated[
        DType,
        Option(
            "dtype of AdamW's first moment; the second stays float32, whose steps "
            "of a thousandth bfloat16 would lose"
        ),
    ] = "float32"
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
    patience: Annotated[
        int,
        Option(
            "stop after so many evaluations in a row without a better loss, and use "
            "the best checkpoint; 0 = never",
            least=0,
        ),
    ] = 0
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
    tensorboard: Annotated[
        bool, Option("write metrics for TensorBoard too, to tensorboard/")
    ] = False
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
        if self.objective == "dpo" and self.train_data is None:
            raise ValueError(
                "TrainConfig.objective = dpo needs train_data, preferences to learn"
            )
        if self.resume and self.output_dir is None:
            raise ValueError("TrainConfig.resume needs output_dir, the run to continue")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"TrainConfig.warmup_steps must be below steps ({self.steps}), "
                f"got {self.warmup_steps}"
            )
        try:
            _ = self.lora
        except ValueError as error:
            raise ValueError(f"TrainConfig: {error}") from None
        if self.eval_split and self.eval_data is not None:
            raise ValueError(
                "TrainConfig.eval_split cannot be given with eval_data: evaluate on "
                "the one or the other"
            )
        if self.patience and not self.eval_every:
            raise ValueError(
                "TrainConfig.patience needs eval_every, the steps between evaluations"
            )
        if self.patience and not self.eval_split and self.eval_path is None:
            raise ValueError(
                "TrainConfig.patience needs eval_data or eval_split, to evaluate on"
            )

    @property
    def lora(self) -> LoRAConfig:
        """Rank and strength of the adapters."""
        return LoRAConfig(
            self.lora_rank,
            self.lora_alpha,
            self.rslora,
            self.rank_pattern,
            dropout=self.lora_dropout,
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
        if self.eval_split:
            return None
        if self.eval_data is None and self.train_data is None:
            return assets.demo_data("eval")
        return self.eval_data

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the updates; a resumed run must have the same."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _FREE
        }
