"""Which modules of a model can have adapters, under the names of the checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx

from ktjax.config import LoRAConfig, fits
from ktjax.io.adapters import Place
from ktjax.io.adapters.names import kind_of
from ktjax.models.decoder import Decoder
from ktjax.nn import AdaptedLinear, FrozenLinear, GatedMLP

# Where a family's modules have other names than the usual ones, which most share.
_RENAMED: dict[str, dict[str, str]] = {
    "qwen2_moe": {
        ".mlp.shared_experts.": ".mlp.shared_expert.",
        ".mlp.shared_experts_gate.": ".mlp.shared_expert_gate.",
    },
    "mixtral": {".mlp.gate.": ".block_sparse_moe.gate."},
}


class FrozenTargetError(ValueError):
    """A module that was asked to be trained and would not be."""


def family_name(name: str, model_type: str) -> str:
    """What the family calls the module or tensor with the usual `name`."""
    for usual, own in _RENAMED.get(model_type, {}).items():
        name = name.replace(usual, own)
    return name


def experts_name(layer_idx: int) -> str:
    """The name of a layer's routed experts, for the patterns of a `LoRAConfig`."""
    return f"model.layers.{layer_idx}.mlp.experts"


def projection_name(path: str) -> str:
    """The usual name of the projection at `path` of a `Decoder`, dots between parts."""
    if path == "head":
        return "lm_head"
    return "model." + path.replace(".attention.", ".self_attn.")


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer outside the routed experts and the routers.

    Attributes:
      usual: its name in the checkpoints of most families.
      name: its name in those of the model's family.
      owner: the module that it is a part of.
      part: the attribute of `owner`.
    """

    usual: str
    name: str
    owner: nnx.Module
    part: str

    @property
    def module(self) -> Any:
        """An `nnx.Linear`, a `FrozenLinear` or an `AdaptedLinear`."""
        return getattr(self.owner, self.part)


def projections(model: Decoder) -> Iterator[Projection]:
    """The projections of attention, dense layers, shared experts, and the head."""
    for path, owner, part in _owned(model):
        usual = projection_name(path)
        yield Projection(
            usual, family_name(usual, model.config.model_type), owner, part
        )


def _owned(model: Decoder) -> Iterator[tuple[str, nnx.Module, str]]:
    """The path of each projection, and which attribute of which module it is."""
    if model.head is not None:
        yield "head", model, "head"
    for index, layer in enumerate(model.layers):
        at, mlp = f"layers.{index}", layer.mlp
        owners: dict[str, Any] = {f"{at}.attention": layer.attention}
        if isinstance(mlp, GatedMLP):
            owners[f"{at}.mlp"] = mlp
        elif mlp.shared_experts is not None:
            owners[f"{at}.mlp.shared_experts"] = mlp.shared_experts
        for path, owner in owners.items():
            for part, module in list(vars(owner).items()):
                if isinstance(module, nnx.Linear | FrozenLinear | AdaptedLinear):
                    yield f"{path}.{part}", owner, part


def adapted(model: Decoder) -> dict[Place, Any]:
    """The modules with adapters: experts by layer, then projections by name."""
    modules: dict[Place, Any] = {i: layer.experts for i, layer in model.moe_layers()}
    modules |= {p.name: p.module for p in projections(model)}
    return {
        place: module
        for place, module in modules.items()
        if getattr(module, "lora_rank", None) is not None
    }


def check_targets(model: Decoder, lora: LoRAConfig, frozen: Iterable[str]) -> None:
    """See that every target and every pattern of `lora` is about something.

    Args:
      model: may be shapes alone.
      lora: whose patterns count.
      frozen: names of modules that cannot have adapters.

    Raises:
      FrozenTargetError: a target fits no module, or one that would stay frozen; names
        both, and what can be trained.
      ValueError: a rank or alpha pattern fits no module that is trained.
    """
    names = [experts_name(index) for index, _ in model.moe_layers()]
    names += [projection.name for projection in projections(model)]
    kinds = list(dict.fromkeys(map(kind_of, names)))
    can = f"adapters can be trained in {', '.join(kinds)}"
    stuck = [name for name in frozen if name not in names]
    for target in lora.targets:
        fitting = [name for name in stuck if fits(target, name)]
        if fitting:
            more = f" and {len(fitting) - 2} more" if len(fitting) > 2 else ""
            raise FrozenTargetError(
                f"targets: '{target}' fits {', '.join(fitting[:2])}{more}, which would "
                f"stay frozen; {can}"
            )
        if not any(fits(target, name) for name in names):
            near = difflib.get_close_matches(target, kinds, n=1)
            said = f"did you mean {near[0]}? " if near else ""
            raise FrozenTargetError(
                f"targets: '{target}' fits no module of this model; {said}{can}"
            )
    lora.check_patterns(filter(lora.adapts, names))


def adapt_projections(model: Decoder, lora: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Give the projections that `lora` targets adapters, in their order.

    Args:
      model: with weights or as shapes alone.
      lora: what applies to which.
      rngs: source of the initial values, and of dropout's stream.
    """
    for projection in projections(model):
        if not lora.adapts(projection.name):
            continue
        module, own = projection.module, lora.of_module(projection.name)
        # The module scales by alpha / rank, rsLoRA by something else.
        rank, alpha = own.rank, own.scaling * own.rank
        if isinstance(module, FrozenLinear):
            shape = module.store.out_features, module.store.in_features
            module.init_lora(*shape, rank, alpha, dropout=own.dropout, rngs=rngs)
            continue
        wrapped = AdaptedLinear(
            module, lora_rank=rank, lora_alpha=alpha, dropout=own.dropout, rngs=rngs
        )
        setattr(projection.owner, projection.part, wrapped)
