"""Configurations of the commands about files; fields as in `TrainConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from ktjax.quant.formats import FORMATS, Encoding
from ktjax.train.options import Option, check_fields


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
        str, Option(f"storage format of the experts: {', '.join(FORMATS)}")
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
        Encoding.of(self.experts, self.group_size, self.zero_point, where="convert")


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    path: Annotated[
        Path,
        Option("a model, a safetensors file, an adapter, or a training's output"),
    ]

    def __post_init__(self) -> None:
        check_fields(self)
