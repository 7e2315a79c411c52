"""Adapters into a loaded model, and out of it."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ktjax.io.adapters import Adapter, AdapterError, Strength, ranges
from ktjax.lora import LoRA
from ktjax.models.decoder import Decoder


def apply_adapter(model: Decoder, adapter: Adapter) -> None:
    """Set the adapters of the model's experts, in their own dtype.

    Args:
      model: loaded with `lora=adapter.lora_config()`.
      adapter: an adapter of every layer that has experts.

    Raises:
      AdapterError: the layers, a shape or the scaling are not the model's.
    """
    layers: dict[int, Any] = {i: layer.experts for i, layer in model.moe_layers()}
    if layers.keys() != adapter.layers.keys():
        raise AdapterError(
            f"the adapter is for layers {ranges(adapter.layers)}, the model has "
            f"experts in {ranges(layers)}"
        )
    for index, experts in layers.items():
        strength = adapter.strength(index)
        if experts.lora_rank is None or not math.isclose(
            experts.scaling, strength.scaling
        ):
            raise AdapterError(
                f"the model was loaded for adapters of scaling {experts.scaling:g} and "
                f"rank {experts.lora_rank}, this one has {strength.scaling:g} and "
                f"{strength.rank} in layer {index}; load it with the adapter's "
                "lora_config()"
            )
        for name, array in _named(adapter.layers[index]):
            variable = getattr(experts, name)
            if variable.shape != array.shape:
                raise AdapterError(
                    f"{name} of layer {index} is {list(array.shape)}, the model needs "
                    f"{list(variable.shape)}; is it an adapter of another model?"
                )
    # All checked: no error leaves a model with half an adapter.
    for index, experts in layers.items():
        for name, array in _named(adapter.layers[index]):
            variable = getattr(experts, name)
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
    layers: dict[int, LoRA] = {}
    strengths: dict[int, Strength] = {}
    for index, layer in model.moe_layers():
        experts: Any = layer.experts
        if experts.lora is None:
            raise AdapterError(
                "the model has no adapters; load it with a LoRA configuration"
            )
        layers[index] = LoRA(*map(np.asarray, experts.lora.arrays()))
        rank = experts.lora_rank
        strengths[index] = Strength(rank, experts.scaling * rank)
    return Adapter.of(strengths, layers, base_model)


def _named(lora: LoRA) -> list[tuple[str, Any]]:
    return list(zip(lora.NAMES, lora.arrays(), strict=True))
