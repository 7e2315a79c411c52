"""A decoder-only language model with Mixture-of-Experts layers, of flax.nnx parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.models.attention import (
    GQAConfig,
    GroupedQueryAttention,
    KVCache,
    LayerCache,
    Positions,
    rms_norm,
)
from ktjax.models.config import ModelConfig
from ktjax.models.latent_attention import LatentAttention, MLAConfig
from ktjax.models.remat import recomputed
from ktjax.nn import FrozenLinear, GatedMLP, MoELayer, Routing
from ktjax.nn.adapted import LinearAdapters
from ktjax.nn.dense import linear, matmul
from ktjax.nn.layer import Experts
from ktjax.nn.vocabulary import token_losses

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """The result of `Decoder.forward`.

    Attributes:
      hidden: `[batch, sequence, hidden]`, normalised: what `Decoder.logits` takes.
      routings: one `Routing` per layer with experts, in order.
      cache: the updated cache, or None.
    """

    hidden: Array
    routings: tuple[Routing, ...]
    cache: KVCache | None


class DecoderLayer(nnx.Module):
    """Attention, then experts or a dense MLP, each after an RMSNorm and with a skip."""

    def __init__(
        self,
        config: ModelConfig,
        experts: Experts | None,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = rms_norm(hidden, eps, dtype, rngs)
        self.attention = _make_attention(
            hidden, config.attention, dtype=dtype, rngs=rngs
        )
        self.post_attention_norm = rms_norm(hidden, eps, dtype, rngs)
        self.mlp = (
            GatedMLP(hidden, config.intermediate_size, dtype=dtype, rngs=rngs)
            if experts is None
            else MoELayer(
                experts,
                hidden_size=hidden,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                rule=config.routing,
                shared_intermediate_size=config.shared_intermediate_size,
                gate_shared=config.gate_shared,
                dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        x: Array,
        positions: Positions,
        token_mask: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, Routing | None, LayerCache | None]:
        """x `[batch, sequence, hidden]` -> the same, the routing, the layer's cache."""
        attended, cache = self.attention(self.input_norm(x), positions, cache)
        x = x + attended
        normed = self.post_attention_norm(x)
        if isinstance(self.mlp, MoELayer):
            out, routing = self.mlp(normed, token_mask)
            return x + out, routing, cache
        return x + self.mlp(normed), None, cache


def _make_attention(
    hidden_size: int, config: GQAConfig | MLAConfig, *, dtype: Any, rngs: nnx.Rngs
) -> GroupedQueryAttention | LatentAttention:
    if isinstance(config, MLAConfig):
        return LatentAttention(hidden_size, config, dtype=dtype, rngs=rngs)
    return GroupedQueryAttention(hidden_size, config, dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """A causal language model of one of the families in `ktjax.models.families`.

    Attributes:
      config: its geometry.
      dtype: dtype of everything outside the experts.
      remat: whether the backward pass computes each layer again from its input, which
        is all that is kept of it (`jax.checkpoint`). Without a cache only.
      embed, layers, norm, head: its parts; head is None with tied embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_experts: Callable[[int], Experts],
        *,
        dtype: Any = jnp.bfloat16,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the model with random dense weights.

        Args:
          config: the geometry.
          make_experts: layer index -> the routed experts of that layer.
          dtype: dtype of everything outside the experts.
          remat: see above.
          rngs: source of the initial values.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.layers = nnx.List(
            DecoderLayer(
                config,
                make_experts(index) if config.is_moe_layer(index) else None,
                dtype=dtype,
                rngs=rngs,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = rms_norm(config.hidden_size, config.rms_norm_eps, dtype, rngs)
        self.head = (
            nnx.data(None)
            if config.tie_word_embeddings
            else linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def forward(
        self,
        input_ids: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
          input_ids: `[batch, sequence]` int32.
          positions: `[batch, sequence]` int32; by default counted from 0 in each row,
            or in each segment. Needed with a cache.
          segment_ids: `[batch, sequence]` int32. Tokens see earlier tokens of their own
            segment only. Segment 0 is padding: its tokens skip the experts and count in
            no routing average. With a cache only "0 or not" matters: a row is one
            sequence.
          cache: what is kept of earlier tokens; a token sees the slots up to its
            position.

        Raises:
          ValueError: input_ids are not `[batch, sequence]`, or a cache without
            positions.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                "Decoder: input_ids must be [batch, sequence], got shape "
                f"{list(input_ids.shape)}"
            )
        where = self._positions(input_ids, positions, segment_ids, cache)
        token_mask = None if segment_ids is None else segment_ids != 0
        x = self.embed(input_ids)
        routings: list[Routing] = []
        layers: list[LayerCache] = []
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            run = recomputed(layer) if self.remat and cache is None else layer
            x, routing, layer_cache = run(x, where, token_mask, layer_cache)
            if routing is not None:
                routings.append(routing)
            if layer_cache is not None:
                layers.append(layer_cache)
        updated = None if cache is None else KVCache(tuple(layers))
        return DecoderOutput(self.norm(x), tuple(routings), updated)

    def logits(self, hidden: Array) -> Array:
        """Hidden `[..., hidden]` -> logits `[..., vocab]` in the model's dtype."""
        if self.head is not None:
            return self.head(hidden)
        return matmul(hidden, self.embed.embedding[...], True)

    @overload
    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        return_routings: bool,
    ) -> Any: ...

    @overload
    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array: ...

    def __call__(
        self,
        input_ids: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        return_routings: bool = False,
    ) -> Any:
        """Logits `[batch, sequence, vocab]`; see `forward` for the arguments.

        With `return_routings`, the pair of the logits and `DecoderOutput.routings`.
        """
        output = self.forward(input_ids, positions=positions, segment_ids=segment_ids)
        logits = self.logits(output.hidden)
        return (logits, output.routings) if return_routings else logits

    def token_losses(
        self,
        input_ids: Array,
        targets: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, tuple[Routing, ...]]:
        """What every token costs, and what the routers did.

        The logits of a large vocabulary are computed in chunks of tokens; see
        `ktjax.nn.token_losses`.

        Args:
          input_ids: `[batch, sequence]` int32.
          targets: `[batch, sequence]` int32, the tokens to predict.
          positions: as in `forward`.
          segment_ids: as in `forward`.

        Returns:
          -log p(target) `[batch, sequence]` in float32, and `DecoderOutput.routings`.
        """
        output = self.forward(input_ids, positions=positions, segment_ids=segment_ids)
        vocab, hidden, head = self.config.vocab_size, output.hidden, self.head
        seed = head.draw_seed() if isinstance(head, LinearAdapters) else None
        if seed is None:
            return token_losses(self.logits, hidden, targets, vocab), output.routings

        def project(rows: Array, numbers: Array) -> Array:
            return head.project(rows, seed, numbers)

        # Dropout by the token's number: the same in every chunk, and computed again.
        numbers = jnp.arange(targets.size, dtype=jnp.int32).reshape(targets.shape)
        losses = token_losses(project, (hidden, numbers), targets, vocab)
        return losses, output.routings

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """The layers that have experts, with their indices."""
        layers = enumerate(self.layers)
        return [(i, lay.mlp) for i, lay in layers if isinstance(lay.mlp, MoELayer)]

    def close(self) -> None:
        """Free the stores; the model cannot be called any more."""
        for _, layer in self.moe_layers():
            close = getattr(layer.experts, "close", None)
            if close is not None:
                close()
        for _, part in nnx.iter_graph(self):
            if isinstance(part, FrozenLinear):
                part.close()

    def _positions(
        self,
        input_ids: Array,
        index: Array | None,
        segment_ids: Array | None,
        cache: KVCache | None,
    ) -> Positions:
        """Positions, rotary tables and the attention mask, once for all layers."""
        if cache is not None:
            if index is None:
                raise ValueError("Decoder: a cache needs positions [batch, sequence]")
            slots = jnp.arange(cache.length)
            mask = (slots <= index[..., None])[:, None]
        elif segment_ids is None:
            mask = None
        else:
            causal = jnp.tri(input_ids.shape[1], dtype=bool)
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            mask = (same & causal)[:, None]
        if index is None:
            index = _count_positions(input_ids, segment_ids)
        rope = self.config.rope
        return Positions(index, rope, rope.tables(index), mask)


def _count_positions(input_ids: Array, segment_ids: Array | None) -> Array:
    """0, 1, 2, ... in each row, starting again where the segment changes."""
    index = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    if segment_ids is None:
        return index
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
    return index - start
