"""Rotary positions: plain, stretched by a factor, and YaRN."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ktjax.models.fields import ConfigError, Fields

Array = Any


@dataclasses.dataclass(frozen=True)
class YarnRamp:
    """Which wavelengths YaRN stretches (arXiv:2309.00071).

    Attributes:
      original_length: longest sequence before the stretching.
      beta_fast: wavelengths that turn more often over that length are left alone.
      beta_slow: those that turn less often are stretched by the whole factor.
      truncate: whether the ramp between the two starts and ends at whole indices.
    """

    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretched(self, dim: int, theta: float) -> np.ndarray:
        """How much of the factor each of the `dim / 2` wavelengths takes, 0 to 1."""

        def index(turns: float) -> float:
            length = self.original_length / (2 * math.pi * turns)
            return dim * math.log(length) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # A ramp of no width would divide by zero.
        high = high + 0.001 if low == high else high
        return np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn the first dimensions of each query and key head.

    Attributes:
      dim: how many dimensions turn, even.
      theta: base of the wavelengths.
      interleaved: whether pairs are (2i, 2i + 1) rather than (i, i + dim / 2).
      factor: what the wavelengths are stretched by.
      yarn: which of them, or None for all.
      magnitude: what cosine and sine are multiplied with.
    """

    dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    factor: float = 1.0
    yarn: YarnRamp | None = None
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(
                f"the rotated part of a head must be even, got {self.dim}"
            )

    def tables(self, index: Array) -> tuple[Array, Array]:
        """Cosine and sine for positions `[batch, sequence]`.

        Returns:
          Two float32 arrays `[batch, sequence, 1, dim / 2]`.
        """
        frequency = self.theta ** (-np.arange(0, self.dim, 2) / self.dim)
        share = 1.0 if self.yarn is None else self.yarn.stretched(self.dim, self.theta)
        frequency = frequency * (1 - share) + frequency / self.factor * share
        angle = index[..., None, None].astype(jnp.float32) * np.float32(frequency)
        return self.magnitude * jnp.cos(angle), self.magnitude * jnp.sin(angle)

    def rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        """Turn x `[batch, sequence, heads, width]`, width >= dim, by the tables.

        Interleaved pairs come out apart, as (i, i + dim / 2): products of queries and
        keys do not feel an order that both share.
        """
        turned, rest = x[..., : self.dim].astype(jnp.float32), x[..., self.dim :]
        if self.interleaved:
            left, right = turned[..., 0::2], turned[..., 1::2]
        else:
            left, right = jnp.split(turned, 2, axis=-1)
        parts = [left * cos - right * sin, right * cos + left * sin]
        turned = jnp.concatenate(parts, axis=-1).astype(x.dtype)
        return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    interleaved: bool = False,
    default_theta: float = 10_000.0,
    default_share: float | None = None,
) -> RopeConfig:
    """The rotary positions that a config.json describes.

    The parameters are in `rope_parameters` (transformers 5), or in `rope_scaling` with
    `rope_theta` at the top.

    Args:
      fields: the config.json.
      head_dim: width of the heads that turn.
      interleaved: see `RopeConfig`.
      default_theta: the family's base.
      default_share: how much of a head turns when `partial_rotary_factor` is missing;
        None: the family knows no such thing.

    Raises:
      ConfigError: a scaling other than "default", "linear" and "yarn", or bad values.
    """
    name, rope = _parameters(fields)
    theta = rope.number("rope_theta", fields.number("rope_theta", default_theta))
    share = rope.number(
        "partial_rotary_factor",
        fields.number("partial_rotary_factor", default_share or 1.0),
    )
    if default_share is None and share != 1:
        raise ConfigError(f"partial_rotary_factor = {share} is not supported")
    plain = RopeConfig(int(head_dim * share), theta, interleaved)
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind == "default":
        return plain
    if kind == "linear":
        return dataclasses.replace(plain, factor=rope.number("factor"))
    if kind != "yarn":
        raise ConfigError(f"{name} of type {kind!r} is not supported")
    longest = fields.size("max_position_embeddings")
    length = fields.size(
        "original_max_position_embeddings",
        default=rope.size("original_max_position_embeddings", default=longest),
    )
    factor = rope.number("factor", longest / length)
    ramp = YarnRamp(
        length,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        rope.flag("truncate", True),
    )
    over, under = (_weight(rope, key) for key in ("mscale", "mscale_all_dim"))
    magnitude = _mscale(factor, 1.0)
    if over and under:
        magnitude = _mscale(factor, over) / _mscale(factor, under)
    magnitude = rope.number("attention_factor", magnitude)
    return dataclasses.replace(plain, factor=factor, yarn=ramp, magnitude=magnitude)


def read_mscale(fields: Fields, factor: float) -> float:
    """What DeepSeek multiplies queries and keys with when their rope is stretched."""
    return _mscale(factor, _weight(_parameters(fields)[1], "mscale_all_dim"))


def _parameters(fields: Fields) -> tuple[str, Fields]:
    given = [
        name for name in ("rope_parameters", "rope_scaling") if fields.object(name).raw
    ]
    if len(given) == 2 and fields.raw[given[0]] != fields.raw[given[1]]:
        raise ConfigError("rope_parameters and rope_scaling contradict each other")
    name = given[0] if given else "rope_parameters"
    return name, fields.object(name)


def _weight(rope: Fields, name: str) -> float:
    """A weight of `_mscale`, 0 when it is missing."""
    return rope.number(name) if rope.raw.get(name) else 0.0


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
