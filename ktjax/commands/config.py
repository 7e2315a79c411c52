"""Configurations of the commands; fields as in `TrainConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from ktjax.models.loading import EXPERTS
from ktjax.quant.formats import ENCODED_FORMATS, Encoding
from ktjax.train.config import DType, TrainConfig
from ktjax.train.options import Option, check_fields

# Fields of several commands.
_Experts = Annotated[
    str, Option(f"storage format of the experts: {', '.join(ENCODED_FORMATS)}")
]
_GroupSize = Annotated[
    int | None, Option("int4_kgroup: depths that share a scale, 32, 64 or 128")
]
_ZeroPoint = Annotated[bool, Option("int4_kgroup: quantise with zero points")]


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Which adapter to write, where, and how."""

    source: Annotated[
        Path, Option("output directory of a training, or an adapter in any format")
    ]
    out: Annotated[Path, Option("directory to make")]
    layout: Annotated[
        Literal["auto", "peft", "peft-fused"],
        Option(
            "peft: tensors per expert; peft-fused: PEFT's target_parameters; "
            "auto: the one that PEFT loads into this family of models"
        ),
    ] = "auto"
    model: Annotated[
        Path | None,
        Option("Hugging Face directory of the base model (default: as trained on)"),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Which adapter to merge into which model."""

    model: Annotated[Path, Option("Hugging Face directory of the base model")]
    adapter: Annotated[
        Path, Option("an adapter in any format, or output directory of a training")
    ]
    out: Annotated[Path, Option("directory to make")]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Which model's experts to convert, into what."""

    model: Annotated[
        Path, Option("Hugging Face directory of the model, or a safetensors file")
    ]
    out: Annotated[Path, Option("directory to make")]
    experts: Annotated[
        str, Option(f"storage format of the experts: {', '.join(ENCODED_FORMATS)}")
    ] = "int8"
    group_size: Annotated[
        int | None,
        Option("int4_kgroup: 32, 64 or 128 depths to a scale (default: as stored)"),
    ] = None
    zero_point: Annotated[bool, Option("int4_kgroup: quantise with zero points")] = (
        False
    )

    def __post_init__(self) -> None:
        check_fields(self)
        Encoding.of(
            self.experts, self.group_size, self.zero_point, where="convert"
        ).check_encoded(where="convert")


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    path: Annotated[
        Path,
        Option(
            "a model, a safetensors or GGUF file, an adapter, or a training's output"
        ),
    ]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """Which model answers, and how it chooses its words."""

    model: Annotated[
        Path | None,
        Option(
            "Hugging Face directory or GGUF file "
            "(default: the adapter's, or else the demo's)"
        ),
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
            "(default: the run's, or else bf16, and of GGUF its own blocks)"
        ),
    ] = None
    group_size: _GroupSize = None
    zero_point: _ZeroPoint = False
    compute: Annotated[
        Literal["bf16", "int8"],
        Option("int8: quantise activations too, for integer codes"),
    ] = "bf16"
    dense: Annotated[
        str | None,
        Option(
            "where projections outside the experts are computed: in stores of one of "
            f"{', '.join(ENCODED_FORMATS)}, or by xla (default: the run's, or else "
            "what is fastest without changing a value)"
        ),
    ] = None
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
                f"{type(self).__name__}.group_size and zero_point need experts, the "
                "format that has them"
            )
        if self.run is not None and self.adapter is not None:
            raise ValueError(f"{type(self).__name__}: give run or adapter, not both")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(AnswerConfig):
    """One prompt to answer."""

    prompt: Annotated[str, Option("the user's message")]


@dataclasses.dataclass(frozen=True)
class ChatConfig(AnswerConfig):
    """A conversation on the terminal."""

    compare: Annotated[
        bool, Option("answer twice: without the adapter, then with it")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.run is None and self.adapter is None:
            raise ValueError("ChatConfig.compare needs run or adapter")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The training to plan; options as in `TrainConfig`."""

    model: Annotated[Path, Option("directory of a model; only config.json is read")]
    experts: _Experts = "bf16"
    group_size: _GroupSize = None
    zero_point: _ZeroPoint = False
    dense: Annotated[
        str | None,
        Option(
            "storage format of attention, dense layers, shared experts and the head, "
            "or xla for plain arrays (default: bf16, where that changes no value)"
        ),
    ] = None
    lora_rank: Annotated[int, Option("rank of the adapters", least=1, most=256)] = 16
    targets: Annotated[
        str, Option("modules that get adapters, as comma-separated patterns")
    ] = "experts"
    batch_size: Annotated[int, Option("rows of a micro-batch", least=1)] = 1
    sequence_length: Annotated[int, Option("tokens of a row", least=2)] = 2048
    dtype: Annotated[DType, Option("dtype of everything outside the experts")] = (
        "float32"
    )
    activation_policy: Annotated[
        Literal["save", "recompute"], Option("of the experts' activations")
    ] = "save"
    remat: Annotated[bool, Option("compute layers again in the backward pass")] = False
    moment_dtype: Annotated[DType, Option("dtype of AdamW's first moment")] = "float32"
    memory: Annotated[
        float | None,
        Option("GiB to plan with (default: what is available now)", above=0),
    ] = None
    measure: Annotated[
        bool, Option("measure a layer of random weights, for the time of a step")
    ] = True
    search: Annotated[
        bool, Option("find the largest rank, batch and length that fit")
    ] = True

    def __post_init__(self) -> None:
        check_fields(self)
        Encoding.of(
            self.experts, self.group_size, self.zero_point, where="plan"
        ).check_encoded(where="plan")

    def training(self) -> TrainConfig:
        """The training that is planned."""
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared = {name: value for name, value in given.items() if name in names}
        # Its data are never read.
        return TrainConfig(train_data=self.model, **shared)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """The layer to measure, and how."""

    model: Annotated[
        Path | None,
        Option(
            "directory of a model, whose sizes are read from config.json "
            "(default: a layer of Qwen3-30B-A3B)"
        ),
    ] = None
    experts: _Experts = "bf16"
    group_size: _GroupSize = None
    zero_point: _ZeroPoint = False
    lora_rank: Annotated[int, Option("rank of the adapters", least=1, most=256)] = 16
    tokens: Annotated[
        str, Option("numbers of tokens, comma-separated; 1 is decoding")
    ] = "1,32,512,2048"
    num_experts: Annotated[
        int | None, Option("measure a layer of so many experts only", least=1)
    ] = None
    seconds: Annotated[
        float, Option("to spend on each line of the table", above=0, most=600)
    ] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        self.encoding.check_encoded(where="bench")
        _ = self.token_counts

    @property
    def encoding(self) -> Encoding:
        """How the experts are stored."""
        return Encoding.of(
            self.experts, self.group_size, self.zero_point, where="bench"
        )

    @property
    def token_counts(self) -> tuple[int, ...]:
        """`tokens` as numbers.

        Raises:
          ValueError: they are not.
        """
        parts = self.tokens.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(
                "BenchConfig.tokens must be positive numbers, comma-separated, got "
                f"{self.tokens!r}"
            )
        return tuple(map(int, parts))
