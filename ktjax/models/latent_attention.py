"""DeepSeek's multi-head latent attention (arXiv:2405.04434)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ktjax.models.attention import LayerCache, Positions, attend, rms_norm
from ktjax.nn.adapted import AdaptedLinear
from ktjax.nn.dense import linear, upcast_on_cpu

Array = Any

# Of the norms of the latents, whatever config.json says of the others.
_LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention.

    Attributes:
      num_heads: heads.
      q_rank: width of the queries' latent, or None: queries from the token directly.
      kv_rank: width of the latent that keys and values are made from.
      nope_dim: width of the part of a query or key head that does not turn.
      rope_dim: width of the part that turns; in keys all heads share it.
      value_dim: width of a value head.
      bias: whether the projections from and to the hidden size have biases (but not
        that of the queries without a latent).
      scale: what the products of queries and keys are multiplied with.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool
    scale: float

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Heads and width of what is kept of a token: its latent and turned key."""
        return ((1, self.kv_rank + self.rope_dim),)


class LatentAttention(nnx.Module):
    """Causal latent attention; parts are named as in Hugging Face's checkpoints.

    Keys and values of all heads are products of a narrow latent c with a matrix, W_k
    and W_v. Two ways to the same result, each where it takes less work:

    * Without a cache they are computed: attention then is as with ordinary heads.
    * With a cache only c and the turned part of the key are kept, and the matrices move
      to the other side: q·(W_k c) = (W_kᵀ q)·c, and Σ p W_v c = W_v (Σ p c). So all
      heads attend to one key, whose first part is the value as well, and nothing is
      computed again for the tokens of the past. A token takes kv_rank + rope_dim values
      of cache in a layer: 576 in DeepSeek-V3, where the heads' keys and values are
      40960.
    """

    def __init__(
        self, hidden_size: int, config: MLAConfig, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.config = config

        def project(inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
            return linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)

        queries = config.num_heads * (config.nope_dim + config.rope_dim)
        if config.q_rank is None:
            self.q_proj = project(hidden_size, queries)
        else:
            self.q_a_proj = project(hidden_size, config.q_rank, config.bias)
            self.q_a_layernorm = rms_norm(config.q_rank, _LATENT_EPS, dtype, rngs)
            self.q_b_proj = project(config.q_rank, queries)
        self.kv_a_proj_with_mqa = project(
            hidden_size, config.kv_rank + config.rope_dim, config.bias
        )
        self.kv_a_layernorm = rms_norm(config.kv_rank, _LATENT_EPS, dtype, rngs)
        self.kv_b_proj = project(
            config.kv_rank, config.num_heads * (config.nope_dim + config.value_dim)
        )
        self.o_proj = project(
            config.num_heads * config.value_dim, hidden_size, config.bias
        )

    def __call__(
        self, x: Array, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        """As `GroupedQueryAttention.__call__`; the cache is one array of latents."""
        config = self.config
        q = self._queries(x).reshape(*x.shape[:2], config.num_heads, -1)
        q, q_turned = jnp.split(q, [config.nope_dim], axis=-1)
        q_turned = positions.rotate(q_turned)
        compressed = self.kv_a_proj_with_mqa(x)
        latent, k_turned = jnp.split(compressed, [config.kv_rank], axis=-1)
        latent = self.kv_a_layernorm(latent)
        k_turned = positions.rotate(k_turned[:, :, None])
        if cache is None:
            out = self._attend_heads(q, q_turned, latent, k_turned, positions.mask)
        else:
            kept = jnp.concatenate([latent[:, :, None], k_turned], axis=-1)
            cache = (positions.write(cache[0], kept),)
            out = self._attend_latents(q, q_turned, cache[0], positions.mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _queries(self, x: Array) -> Array:
        if self.config.q_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _attend_heads(
        self, q: Array, q_turned: Array, latent: Array, k_turned: Array, mask: Any
    ) -> Array:
        config = self.config
        both = self.kv_b_proj(latent).reshape(*q.shape[:3], -1)
        k, v = jnp.split(both, [config.nope_dim], axis=-1)
        k_turned = jnp.broadcast_to(k_turned, q_turned.shape)
        q = jnp.concatenate([q, q_turned], axis=-1)
        k = jnp.concatenate([k, k_turned], axis=-1)
        return attend(q, k, v, mask, config.scale)

    def _attend_latents(
        self, q: Array, q_turned: Array, kept: Array, mask: Any
    ) -> Array:
        config = self.config
        kernel = self.kv_b_proj.kernel[...]
        kernel = kernel.reshape(config.kv_rank, config.num_heads, -1)
        to_key, to_value = jnp.split(kernel, [config.nope_dim], axis=-1)

        def to_latent(q: Array, to_key: Array) -> Array:
            return jnp.einsum("bshd,lhd->bshl", q, to_key)

        def from_latent(out: Array, to_value: Array) -> Array:
            return jnp.einsum("bshl,lhd->bshd", out, to_value)

        latent = upcast_on_cpu(to_latent, q, to_key)
        adapters = self._adapters()
        if adapters is not None:
            # (W + s B A)ᵀ q = Wᵀ q + s Aᵀ (Bᵀ q), and likewise for the values.
            a, b_key, b_value = adapters
            latent = _plus(
                latent, jnp.einsum("bshd,hdr->bshr", q.astype(jnp.float32), b_key) @ a
            )
        q = jnp.concatenate([latent, q_turned], axis=-1)
        out = attend(q, kept, kept[..., : config.kv_rank], mask, config.scale)
        values = upcast_on_cpu(from_latent, out, to_value)
        if adapters is not None:
            inner = out.astype(jnp.float32) @ a.T
            values = _plus(values, jnp.einsum("bshr,hdr->bshd", inner, b_value))
        return values

    def _adapters(self) -> tuple[Array, Array, Array] | None:
        """Those of kv_b_proj in float32: s A `[rank, latent]`, B of keys and values.

        B is `[heads, width, rank]`. None: there are none.
        """
        module: Any = self.kv_b_proj
        if not isinstance(module, AdaptedLinear):
            return None
        lora: Any = module.lora
        b = lora.b.astype(jnp.float32)
        b = b.reshape(self.config.num_heads, -1, lora.rank)
        b_key, b_value = jnp.split(b, [self.config.nope_dim], axis=1)
        return module.scaling * lora.a.astype(jnp.float32), b_key, b_value


def _plus(x: Array, more: Array) -> Array:
    """A sum with float32, rounded once to the dtype of x."""
    return (x + more).astype(x.dtype)
