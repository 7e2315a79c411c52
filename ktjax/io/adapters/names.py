"""What the modules with adapters are called, and in which layout PEFT takes them.

Two ways to store the experts of a layer occur in checkpoints: a matrix per expert and
projection, or one tensor per projection with all experts (gate and up in one).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Layout = Literal["peft", "peft-fused"]
Part = Literal["gate", "up", "down"]

PARTS: tuple[Part, ...] = ("gate", "up", "down")

# PEFT puts this before the name of a module of a causal language model.
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of models names its experts.

    Attributes:
      folder: where the experts are, within a layer.
      projections: what gate, up and down are called.
      layout: the layout of adapters that PEFT loads for certain. PEFT (0.19.1 to 0.21.2
        were tried) ignores the per-expert tensors of Qwen2-MoE without a word.
    """

    folder: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    layout: Layout = "peft"


FAMILIES = {
    "qwen3_moe": Family(),
    "qwen2_moe": Family(layout="peft-fused"),
    "mixtral": Family("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "olmoe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "glm4_moe": Family(),
}

# transformers 5 has every family's experts as two parameters of one module.
FUSED_FOLDER = "mlp.experts"
FUSED_PARAMETERS = ("gate_up_proj", "down_proj")

_PART_OF: dict[str, Part] = {
    name: part
    for family in FAMILIES.values()
    for name, part in zip(family.projections, PARTS, strict=True)
}
_EXPERT = re.compile(
    r"model\.layers\.(\d{1,9})\.(?:mlp|block_sparse_moe)\.experts\.(\d{1,9})"
    rf"\.({'|'.join(_PART_OF)})"
)
_FUSED = re.compile(
    rf"model\.layers\.(\d{{1,9}})\.mlp\.experts\.({'|'.join(FUSED_PARAMETERS)})"
)
# Everything else that can have adapters.
_PROJECTION = re.compile(
    r"lm_head|model\.layers\.\d{1,9}\."
    r"(self_attn\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_b_proj"
    r"|kv_a_proj_with_mqa)"
    r"|mlp\.(shared_experts?\.)?(gate_proj|up_proj|down_proj))"
)
# Converted experts (ktjax.io.converted): all of one projection.
_STACKED = re.compile(
    r"model\.layers\.(\d{1,9})\.mlp\.experts\.(gate_proj|up_proj|down_proj)\.values"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What an expert's tensor is.

    Attributes:
      layer: the layer's index.
      expert: the expert's index, or None for a tensor of all experts.
      parts: the projections that it holds, along its outputs.
    """

    layer: int
    expert: int | None
    parts: tuple[Part, ...]


def target_of(name: str) -> Target | None:
    """Which experts' weights the tensor `name` of a checkpoint holds, if any."""
    stem = name.removesuffix(".weight")
    if (match := _EXPERT.fullmatch(stem)) and stem != name:
        return Target(int(match[1]), int(match[2]), (_PART_OF[match[3]],))
    if match := _FUSED.fullmatch(name):
        gate_up = match[2] == FUSED_PARAMETERS[0]
        return Target(int(match[1]), None, PARTS[:2] if gate_up else PARTS[2:])
    if match := _STACKED.fullmatch(name):
        return Target(int(match[1]), None, (_PART_OF[match[2]],))
    return None


def stored_target_of(name: str) -> Target | None:
    """`target_of`, for every tensor of a quantised matrix: its codes, its scales.

    They have the name of the matrix and one word more.
    """
    stem = name.rpartition(".")[0]
    return target_of(name) or target_of(f"{stem}.weight") or target_of(f"{stem}.values")


def is_projection(name: str) -> bool:
    """Whether the module `name` of a checkpoint is a projection outside the experts."""
    return _PROJECTION.fullmatch(name) is not None


def kind_of(name: str) -> str:
    """The shortest name that says which kind of module `name` is, in any layer."""
    return re.sub(r"^model\.layers\.\d+\.(self_attn|mlp)\.", "", name)


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
      ValueError: it is not known; names those that are.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"adapters of models of type {model_type!r} are not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
