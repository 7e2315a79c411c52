"""Grouped-query attention with QK-norm, rotary positions and a key-value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.models.config import ModelConfig
from ktjax.nn.dense import linear, upcast_on_cpu

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; slot p of a row is its position p.

    Because slots are positions, rows of different lengths need no alignment: a prompt's
    padding lands in slots after its last token, where each is overwritten before any
    query reaches it.

    Attributes:
      keys: per layer, `[batch, length, key_value_heads, head_dim]`.
      values: likewise.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @staticmethod
    def empty(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
        """A cache of zeros for `batch` rows of up to `length` tokens."""
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return KVCache(
            tuple(jnp.zeros(shape, dtype) for _ in layers),
            tuple(jnp.zeros(shape, dtype) for _ in layers),
        )


@dataclasses.dataclass(frozen=True)
class Positions:
    """What every layer of one forward shares.

    Attributes:
      index: `[batch, sequence]` int32, each token's position.
      cos: `[batch, sequence, 1, head_dim / 2]` float32.
      sin: likewise.
      mask: `[batch, 1, sequence, slots]` bool, which slots a token sees; None = causal.
    """

    index: Array
    cos: Array
    sin: Array
    mask: Array | None


def rotary(index: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary embedding, `[batch, sequence, 1, head_dim / 2]`."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = index[..., None, None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs (i, i + head_dim / 2) of x `[batch, sequence, heads, head_dim]`."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention of Qwen3: RMSNorm on each query and key head before RoPE."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        hidden, width = config.hidden_size, config.head_dim

        def project(inputs: int, outputs: int) -> nnx.Linear:
            bias = config.attention_bias
            return linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(
                width,
                epsilon=config.rms_norm_eps,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )

        self.q_proj = project(hidden, config.num_attention_heads * width)
        self.k_proj = project(hidden, config.num_key_value_heads * width)
        self.v_proj = project(hidden, config.num_key_value_heads * width)
        self.o_proj = project(config.num_attention_heads * width, hidden)
        self.q_norm = norm()
        self.k_norm = norm()

    def __call__(
        self,
        x: Array,
        positions: Positions,
        cache: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Attend.

        Args:
          x: `[batch, sequence, hidden]`.
          positions: where the tokens are and what they see.
          cache: this layer's keys and values, or None to attend among x alone.

        Returns:
          `[batch, sequence, hidden]`, and the cache with x's keys and values in it.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).reshape(split))
        k = self.k_norm(self.k_proj(x).reshape(split))
        v = self.v_proj(x).reshape(split)
        q = rotate(q, positions.cos, positions.sin)
        k = rotate(k, positions.cos, positions.sin)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            # Rows that are done go on past the end; what they write there is dropped.
            k = cache[0].at[rows, positions.index].set(k, mode="drop")
            v = cache[1].at[rows, positions.index].set(v, mode="drop")
            cache = (k, v)
        mask = positions.mask

        def attend(q: Array, k: Array, v: Array) -> Array:
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=mask is None
            )

        out = upcast_on_cpu(attend, q, k, v)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache
