"""Adapters into a loaded model, and out of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax.io.adapters import Adapter, AdapterError, Strength, ranges, said
from ktjax.lora import LinearLoRA, LoRA
from ktjax.models.decoder import Decoder
from ktjax.models.targets import adapted, projections


def apply_adapter(model: Decoder, adapter: Adapter) -> None:
    """Set the adapters of the model, in their own dtype.

    Args:
      model: loaded with `lora=adapter.lora_config()`.
      adapter: an adapter of just the modules that the model has adapters in.

    Raises:
      AdapterError: the modules, a shape or the scaling are not the model's.
    """
    _check_places(model, adapter)
    modules = adapted(model)
    for place, lora in adapter.items():
        module, strength = modules[place], adapter.strength(place)
        if not math.isclose(module.scaling, strength.scaling) or (
            module.lora_rank != strength.rank
        ):
            raise AdapterError(
                f"the model was loaded for adapters of scaling {module.scaling:g} and "
                f"rank {module.lora_rank}, this one has {strength.scaling:g} and "
                f"{strength.rank} in {said(place)}; load it with the adapter's "
                "lora_config()"
            )
        for name, variable, array in _named(module, lora):
            if variable.shape != array.shape:
                raise AdapterError(
                    f"{name} of {said(place)} is {list(array.shape)}, the model needs "
                    f"{list(variable.shape)}; is it an adapter of another model?"
                )
    # All checked: no error leaves a model with half an adapter.
    for place, lora in adapter.items():
        for _, variable, array in _named(modules[place], lora):
            # A copy: a donated buffer must never alias memory that NumPy owns.
            variable.set_value(jnp.array(array, dtype=variable.dtype))


def extract_adapter(model: Decoder, base_model: str | None = None) -> Adapter:
    """The model's present adapters, as NumPy arrays.

    Args:
      model: loaded with a LoRA configuration.
      base_model: where the base model is, for those who load the adapter later.

    Raises:
      AdapterError: the model has no adapters, or one is not finite.
    """
    modules = adapted(model)
    if not modules:
        raise AdapterError(
            "the model has no adapters; load it with a LoRA configuration"
        )
    layers: dict[int, LoRA] = {}
    named: dict[str, LinearLoRA] = {}
    for place, module in modules.items():
        arrays = map(np.asarray, module.lora.arrays())
        if isinstance(place, int):
            layers[place] = LoRA(*arrays)
        else:
            named[place] = LinearLoRA(*arrays)
    strengths = {place: strength_of(module) for place, module in modules.items()}
    return Adapter.of(strengths, layers, base_model, named)


def strength_of(module: Any) -> Strength:
    """Rank and alpha of a module's adapters."""
    return Strength(module.lora_rank, module.scaling * module.lora_rank)


def _check_places(model: Decoder, adapter: Adapter) -> None:
    """The adapter is for just the modules that have adapters."""
    there = [index for index, _ in model.moe_layers()]
    if adapter.layers.keys() - there:
        raise AdapterError(
            f"the adapter is for layers {ranges(adapter.layers)}, the model has "
            f"experts in {ranges(there)}"
        )
    unknown = adapter.projections.keys() - {p.name for p in projections(model)}
    if unknown:
        raise AdapterError(
            f"the adapter is for {_some(unknown)}, which the model does not have"
        )
    ours, theirs = adapted(model).keys(), dict(adapter.items()).keys()
    for who, more in (("the adapter", ours - theirs), ("the model", theirs - ours)):
        if more:
            raise AdapterError(
                f"{who} has no adapters in {_some(map(said, more))}; load the model "
                "with the adapter's lora_config()"
            )


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def _named(module: Any, lora: Any) -> list[tuple[str, nnx.Variable, Any]]:
    """Name, variable and array of each part of a module's adapters."""
    prefix = "lora_" if isinstance(lora, LinearLoRA) else ""
    pairs = zip(lora.NAMES, lora.arrays(), strict=True)
    return [(name, getattr(module, prefix + name), array) for name, array in pairs]
