"""Grouped-query attention with rotary positions, and the cache of all attentions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.models.fields import ConfigError
from ktjax.models.rope import RopeConfig
from ktjax.nn.dense import linear, upcast_on_cpu

if TYPE_CHECKING:
    from ktjax.models.config import ModelConfig

Array = Any
LayerCache = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of the tokens seen so far; slot p of a row is position p.

    Because slots are positions, rows of different lengths need no alignment: a prompt's
    padding lands in slots after its last token, where each is overwritten before any
    query reaches it.

    Attributes:
      layers: per layer, arrays `[batch, length, heads, width]`: keys and values, or one
        array of latents, as the attention's `cache_shapes` says.
    """

    layers: tuple[LayerCache, ...]

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.layers[0][0].shape[1]

    @staticmethod
    def empty(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
        """A cache of zeros for `batch` rows of up to `length` tokens."""
        shapes = config.attention.cache_shapes
        return KVCache(
            tuple(
                tuple(jnp.zeros((batch, length, *shape), dtype) for shape in shapes)
                for _ in range(config.num_hidden_layers)
            )
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """What every layer of one forward shares.

    Attributes:
      index: `[batch, sequence]` int32, each token's position.
      rope: how positions turn heads.
      tables: its cosine and sine.
      mask: `[batch, 1, sequence, slots]` bool, which slots a token sees; None = causal.
    """

    index: Array
    rope: RopeConfig = dataclasses.field(metadata={"static": True})
    tables: tuple[Array, Array]
    mask: Array | None

    def rotate(self, x: Array) -> Array:
        """Turn the heads of x `[batch, sequence, heads, width]`."""
        return self.rope.rotate(x, *self.tables)

    def write(self, cache: Array, values: Array) -> Array:
        """Put `[batch, sequence, ...]` into the slots of a cache."""
        rows = jnp.arange(values.shape[0])[:, None]
        # Rows that are done go on past the end; what they write there is dropped.
        return cache.at[rows, self.index].set(values, mode="drop")


def attend(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """Softmax attention in float32.

    Args:
      q: `[batch, sequence, heads, width]`.
      k: `[batch, slots, key_heads, width]`; key_heads divides heads.
      v: `[batch, slots, key_heads, value_width]`, at most as wide as the keys.
      mask: `[batch, 1, sequence, slots]` bool; None = causal.
      scale: what the products of queries and keys are multiplied with.

    Returns:
      `[batch, sequence, heads, value_width]`.
    """
    width = v.shape[-1]
    if width < k.shape[-1]:
        # JAX's attention takes keys and values of one width.
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))

    def product(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, scale=scale
        )

    return upcast_on_cpu(product, q, k, v)[..., :width]


def rms_norm(width: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMSNorm over `width` values, all in one dtype."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention.

    Attributes:
      num_heads: query heads.
      num_key_value_heads: key and value heads; divides the query heads.
      head_dim: width of a head.
      qkv_bias: whether queries, keys and values have biases.
      output_bias: whether the output has one.
      qk_norm: an RMSNorm of queries and keys before they turn: of each "head", of the
        whole "projection", or None.
      norm_eps: added to its mean square.
      clip: bound on the absolute value of queries, keys and values, or None.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    norm_eps: float = 1e-6
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads = {self.num_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Heads and width of what is kept of a token: keys and values."""
        shape = (self.num_key_value_heads, self.head_dim)
        return shape, shape


class GroupedQueryAttention(nnx.Module):
    """Causal attention; parts are named as in Hugging Face's checkpoints."""

    def __init__(
        self, hidden_size: int, config: GQAConfig, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        queries = config.num_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim

        def project(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm(projection: int) -> Any:
            if config.qk_norm is None:
                return nnx.data(None)
            width = config.head_dim if config.qk_norm == "head" else projection
            return rms_norm(width, config.norm_eps, dtype, rngs)

        self.q_proj = project(hidden_size, queries, config.qkv_bias)
        self.k_proj = project(hidden_size, keys, config.qkv_bias)
        self.v_proj = project(hidden_size, keys, config.qkv_bias)
        self.o_proj = project(queries, hidden_size, config.output_bias)
        self.q_norm = norm(queries)
        self.k_norm = norm(keys)

    def __call__(
        self, x: Array, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        """Attend.

        Args:
          x: `[batch, sequence, hidden]`.
          positions: where the tokens are and what they see.
          cache: this layer's keys and values, or None to attend among x alone.

        Returns:
          `[batch, sequence, hidden]`, and the cache with x's keys and values in it.
        """
        q = positions.rotate(self._heads(self.q_proj(x), self.q_norm))
        k = positions.rotate(self._heads(self.k_proj(x), self.k_norm))
        v = self._heads(self.v_proj(x), None)
        if cache is not None:
            k, v = positions.write(cache[0], k), positions.write(cache[1], v)
            cache = (k, v)
        out = attend(q, k, v, positions.mask, self.config.head_dim**-0.5)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Array, norm: nnx.RMSNorm | None) -> Array:
        """A projection, normed, clipped and split into `[..., heads, head_dim]`."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        if norm is not None:
            per_head = self.config.qk_norm == "head"
            x = norm(x.reshape(split) if per_head else x)
        if self.config.clip is not None:
            x = jnp.clip(x, -self.config.clip, self.config.clip)
        return x.reshape(split)
