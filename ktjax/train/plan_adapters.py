"""Which adapters a plan's small models have in every layer, so that they stand for all.

A plan compiles and times models of a few layers, all alike and with experts, while
`targets` and `rank_pattern` may give each layer of the real one something else.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import Any

from flax import nnx

from ktjax.models import ModelConfig
from ktjax.models.targets import experts_name, family_name, projection_name
from ktjax.train.config import TrainConfig
from ktjax.train.plan_program import abstract

# Every decoder has it. Where only dense layers have adapters, it makes layers with
# experts pass gradients on, as they then do.
_STAND_IN = "model.layers.0.self_attn.o_proj"


@dataclasses.dataclass(frozen=True)
class LayerAdapters:
    """The adapters of a model, seen layer by layer.

    Attributes:
      config: the options, with targets and ranks that give every layer what the layer
        with experts has whose adapters are largest; exact where all are alike.
      depth: layers that a backward pass goes through: the lowest with adapters and
        all above it.
      with_experts: layers whose routed experts have adapters.
      largest: bytes of the adapters of the layer with most.
      total: bytes of all adapters, the output head's included.
    """

    config: TrainConfig
    depth: int
    with_experts: int
    largest: int
    total: int


def layer_adapters(model: ModelConfig, config: TrainConfig) -> LayerAdapters:
    """The adapters that `config` gives a model.

    Raises:
      ValueError: no module has adapters, or sizes do not fit the format.
    """
    layers: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    total, head = 0, False
    flat: Any = nnx.to_flat_state(abstract(model, config)[1].lora)
    for path, leaf in flat:
        size = leaf.size * leaf.dtype.itemsize
        total += size
        module = projection_name(".".join(map(str, path[:-1])))
        if path[0] == "layers":
            layers[path[1]][family_name(module, model.model_type)] += size
        else:
            head = True
    sizes = {layer: sum(modules.values()) for layer, modules in layers.items()}
    like = max(
        filter(model.is_moe_layer, layers), key=lambda i: (sizes[i], -i), default=None
    )
    ranks = {
        _in_every_layer(name): config.lora.of_module(name).rank
        for name in (layers[like] if like is not None else ())
    }
    if layers and not ranks:
        ranks[_in_every_layer(_STAND_IN)] = 1
    if head:
        ranks["lm_head"] = config.lora.of_module("lm_head").rank
    uniform = dataclasses.replace(config, targets=",".join(ranks), rank_pattern=ranks)
    return LayerAdapters(
        config=uniform,
        depth=model.num_hidden_layers - min(layers) if layers else 0,
        with_experts=sum(experts_name(layer) in layers[layer] for layer in layers),
        largest=max(sizes.values(), default=0),
        total=total,
    )


def _in_every_layer(name: str) -> str:
    """A pattern for the module `name`, whatever its layer."""
    return r"model\.layers\.\d+\." + re.escape(name.split(".", 3)[3])
