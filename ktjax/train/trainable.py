"""What of a model is trained and what is frozen, before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx
from rich.table import Table

from ktjax.models import Decoder
from ktjax.nn import FrozenLinear, RoutedExperts, StoreHandle
from ktjax.train.report import bytes_text

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
            name = _adapters(path) if trained else _part(path)
            yield path, name, trained, node.size, node.size * node.dtype.itemsize


def _adapters(path: tuple[Any, ...]) -> str:
    if "experts" in path:
        return "adapters of the experts"
    # The parameter is a part of the projection.
    return f"adapters of {path[-2]} ({_part(path)})"


def _part(path: tuple[Any, ...]) -> str:
    return next((name for key, name in _PARTS.items() if key in path), "norms")
