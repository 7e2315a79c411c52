"""What of a model is trained and what is frozen, before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx
from rich.table import Table

from ktjax.config import fits
from ktjax.models import Decoder
from ktjax.nn import FrozenLinear, RoutedExperts, StoreHandle
from ktjax.train.report import bytes_text

_ADAPTERS = "adapters of the experts"
_EXPERTS = "routed experts"

# Which part a parameter belongs to: the first of these that occurs in its path.
_PARTS = {
    "experts": _EXPERTS,
    "attention": "attention",
    "router": "routers",
    "shared_experts": "shared experts",
    "shared_gate": "shared experts",
    "mlp": "dense layers",
    "embed": "embeddings",
    "head": "output head",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters of one kind.

    Attributes:
      name: what they are.
      trained: whether training changes them.
      parameters: how many numbers they are.
      size: their bytes in memory.
      layers: in how many layers they are; 0 = outside the layers.
    """

    name: str
    trained: bool
    parameters: int
    size: int
    layers: int


class FrozenTargetError(ValueError):
    """A module that was asked to be trained and would not be."""


def parts_of(model: Decoder) -> list[Part]:
    """The parts of `model`, the trained ones first, then by size."""
    totals: dict[tuple[str, bool], list[int]] = {}
    layers: dict[tuple[str, bool], set[int]] = {}
    for path, name, trained, parameters, size in _parameters(model):
        total = totals.setdefault((name, trained), [0, 0])
        total[0] += parameters
        total[1] += size
        at = layers.setdefault((name, trained), set())
        if path[0] == "layers":
            at.add(int(path[1]))
    parts = [
        Part(name, trained, parameters, size, len(layers[name, trained]))
        for (name, trained), (parameters, size) in totals.items()
        if parameters
    ]
    return sorted(parts, key=lambda part: (not part.trained, -part.size))


def check_targets(model: Decoder, targets: str) -> None:
    """See that everything which was asked to be trained has adapters.

    Args:
      model: with its adapters.
      targets: comma-separated regular expressions for the end of a module's name, like
        `layers.3.mlp.experts`.

    Raises:
      FrozenTargetError: a target fits no module, or one without adapters; names both.
      ValueError: a target is no regular expression.
    """
    modules = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module) and path
    }
    adapted = [name for name, module in modules.items() if _has_adapters(module)]
    # Experts are the module, the layers around it only contain it.
    here = [name for name in adapted if name.endswith(".experts")]
    for target in (part.strip() for part in targets.split(",")):
        found = [name for name in modules if fits(target, name)]
        frozen = [name for name in found if name not in adapted]
        if not found:
            raise FrozenTargetError(
                f"targets: '{target}' fits no module of this model; adapters are "
                f"trained in {_some(here)}"
            )
        if frozen:
            raise FrozenTargetError(
                f"targets: '{target}' fits {_some(frozen)}, which would stay frozen; "
                f"adapters are trained in {_some(here)} only"
            )


def parts_table(parts: list[Part]) -> Table:
    """A line for every part."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)
    said = None
    for part in parts:
        state = "trained" if part.trained else "frozen"
        where = f"{part.name}, {part.layers} layers" if part.layers else part.name
        table.add_row(
            "" if state == said else state,
            f"{part.parameters:,}",
            bytes_text(part.size),
            where,
            style="green" if part.trained else "",
        )
        said = state
    return table


def _parameters(
    model: Decoder,
) -> Iterator[tuple[tuple[Any, ...], str, bool, int, int]]:
    """(path, part, trained, parameters, bytes) of everything that holds numbers."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, RoutedExperts):
            store = node.store
            shape = (store.num_experts, store.hidden_size, store.intermediate_size)
            count = 3 * shape[0] * shape[1] * shape[2]
            yield path, f"{_EXPERTS} ({store.format})", False, count, store.nbytes
        elif isinstance(node, FrozenLinear):
            store = node.store
            count = store.out_features * store.in_features
            yield path, _part(path), False, count, store.nbytes
        elif isinstance(node, nnx.Variable) and not isinstance(
            node, StoreHandle | nnx.RngState
        ):
            trained = isinstance(node, nnx.LoRAParam)
            name = _ADAPTERS if trained else _part(path)
            yield path, name, trained, node.size, node.size * node.dtype.itemsize


def _part(path: tuple[Any, ...]) -> str:
    return next((name for key, name in _PARTS.items() if key in path), "norms")


def _has_adapters(module: nnx.Module) -> bool:
    return any(isinstance(node, nnx.LoRAParam) for _, node in nnx.iter_graph(module))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown or "none"
