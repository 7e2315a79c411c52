"""Generation: a jitted prefill, then a jitted step per token, in few shapes.

Prompt lengths, cache lengths and batch sizes are rounded up to powers of two, so a few
compiled programs serve all prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax.models.attention import KVCache
from ktjax.models.decoder import Decoder
from ktjax.models.sampling import Sampler, select
from ktjax.models.tokenizer import Tokenizer

Array = Any

# Shortest prompt and cache: below it a power of two saves nothing and compiles more.
_LEAST_LENGTH = 32


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Iterator[int]:
    """Continue one prompt, yielding each token as it comes.

    Args:
      model: the language model.
      prompt_ids: the prompt's tokens, at least one.
      max_new_tokens: most tokens to yield.
      temperature: 0 = always the most probable token; else see `Sampler`.
      top_k: sample among the k most probable tokens.
      top_p: sample among the fewest tokens whose probabilities reach p.
      key: PRNG key; needed with a temperature.
      eos_ids: tokens that end the generation, and are not yielded; None = the model's.

    Raises:
      ValueError: a bad argument, at the call rather than at the first token.
    """
    tokens = _token_rows(
        model,
        [prompt_ids],
        max_new_tokens,
        Sampler(temperature, top_k, top_p),
        key,
        eos_ids,
    )
    return (row[0] for row in tokens)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue many prompts of any lengths together; arguments as for `generate`.

    Returns:
      The new tokens of each prompt, without the token that ended them.
    """
    if not prompts:
        return []
    answers: list[list[int]] = [[] for _ in prompts]
    sampler = Sampler(temperature, top_k, top_p)
    for row in _token_rows(model, prompts, max_new_tokens, sampler, key, eos_ids):
        for answer, token in zip(answers, row, strict=True):
            if token >= 0:
                answer.append(token)
    return answers


def end_ids(model: Decoder, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer, by the model's and by the tokenizer's account."""
    ends = set(model.config.eos_token_ids)
    return sorted(ends if tokenizer.eos_id is None else ends | {tokenizer.eos_id})


def _token_rows(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    key: Array | None,
    eos_ids: Sequence[int] | None,
) -> Iterator[list[int]]:
    """Check the arguments now, then yield a token per prompt, -1 where it has ended."""
    vocab = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"generate: prompt {number} has no tokens")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(
                f"generate: prompt {number} has tokens outside 0..{vocab - 1}"
            )
    if max_new_tokens < 0:
        raise ValueError(
            f"generate: max_new_tokens must not be negative, got {max_new_tokens}"
        )
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"generate: {longest} tokens with the prompt, the model takes "
            f"{model.config.max_position_embeddings}; shorten the prompt or lower "
            "max_new_tokens"
        )
    if sampler.temperature > 0 and key is None:
        raise ValueError(
            "generate: temperature > 0 needs a PRNG key; pass key=jax.random.key(0)"
        )
    end = model.config.eos_token_ids if eos_ids is None else tuple(eos_ids)
    return _run(model, prompts, max_new_tokens, sampler, key, end)


def _run(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    key: Array | None,
    eos_ids: Sequence[int],
) -> Iterator[list[int]]:
    if max_new_tokens == 0:
        return
    count, longest = len(prompts), max(map(len, prompts))
    batch, width = _power_of_two(count), _power_of_two(longest, _LEAST_LENGTH)
    slots = max(width, _power_of_two(longest + max_new_tokens, _LEAST_LENGTH))
    ids = np.zeros((batch, width), np.int32)
    lengths = np.ones(batch, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    alive = np.arange(batch) < count
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    prefill, decode = programs(graph, structure)
    logits, cache = prefill(leaves, ids, lengths, alive, slots)
    for step in range(max_new_tokens):
        step_key = None if key is None else jax.random.fold_in(key, step)
        tokens = select(logits, step_key, sampler)
        chosen = np.asarray(tokens)
        alive = alive & ~np.isin(chosen, eos_ids)
        if not alive.any():
            return
        yield np.where(alive, chosen, -1)[:count].tolist()
        if step + 1 < max_new_tokens:
            logits, cache = decode(leaves, cache, tokens, lengths + step, alive)


class Programs(NamedTuple):
    """The two compiled functions of a model; `leaves` are those of its state.

    Attributes:
      prefill: `(leaves, ids, lengths, alive, slots) -> (logits, cache)`: runs prompts
        `ids [batch, width]`; logits `[batch, vocab]` float32 after each one's last
        token.
      decode: `(leaves, cache, tokens, index, alive) -> (logits, cache)`: one more token
        for every row, at position `index`; the cache is updated in place.
    """

    prefill: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def programs(graph: Any, structure: Any) -> Programs:
    """The functions of all models of one structure.

    Bound here and not passed at each step: hashing a graph takes Python 0.2 ms a layer,
    which at 48 layers is longer than many a step.

    Args:
      graph: the `nnx.GraphDef`.
      structure: the tree structure of the state.
    """

    def rebuild(leaves: list[Array]) -> Decoder:
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        model.eval()  # a copy; nothing is dropped from what it generates
        return model

    @functools.partial(jax.jit, static_argnums=4)
    def prefill(
        leaves: list[Array], ids: Array, lengths: Array, alive: Array, slots: int
    ) -> tuple[Array, KVCache]:
        model = rebuild(leaves)
        batch, width = ids.shape
        positions = jnp.broadcast_to(jnp.arange(width), ids.shape)
        real = (positions < lengths[:, None]) & alive[:, None]
        cache = KVCache.empty(model.config, batch, slots, model.dtype)
        output = model.forward(
            ids, positions=positions, segment_ids=real.astype(jnp.int32), cache=cache
        )
        last = output.hidden[jnp.arange(batch), lengths - 1]
        assert output.cache is not None
        return model.logits(last).astype(jnp.float32), output.cache

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(
        leaves: list[Array], cache: KVCache, tokens: Array, index: Array, alive: Array
    ) -> tuple[Array, KVCache]:
        model = rebuild(leaves)
        output = model.forward(
            tokens[:, None],
            positions=index[:, None],
            segment_ids=alive[:, None].astype(jnp.int32),
            cache=cache,
        )
        assert output.cache is not None
        return model.logits(output.hidden[:, 0]).astype(jnp.float32), output.cache

    return Programs(prefill, decode)


def _power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return 1 << (max(value, least) - 1).bit_length()
