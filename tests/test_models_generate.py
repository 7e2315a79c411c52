"""Generation: greedy against transformers, the cache, sampling, shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_checkpoint import SIZES, make_model, save, torch

from ktjax.models import KVCache, from_pretrained, generate, generate_batch
from ktjax.models.generate import programs
from ktjax.models.sampling import Sampler, select

NEW = 12


@pytest.fixture(scope="module")
def theirs():
    return make_model(seed=11)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    path = save(theirs, tmp_path_factory.mktemp("model"))
    return from_pretrained(path, dtype=jnp.float32, experts="reference")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(2, SIZES["vocab_size"], n).tolist() for n in (5, 1, 17)]


def reference_tokens(model, prompt, eos):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
    tokens = out[0, len(prompt) :].tolist()
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_greedy_equals_transformers_token_for_token(theirs, ours, prompts):
    want = [reference_tokens(theirs, prompt, eos=-2) for prompt in prompts]
    assert [len(tokens) for tokens in want] == [NEW] * 3
    assert generate_batch(ours, prompts, NEW, eos_ids=()) == want
    assert list(generate(ours, prompts[0], NEW, eos_ids=())) == want[0]


def test_generation_ends_before_an_end_token(theirs, ours, prompts):
    free = generate_batch(ours, prompts, NEW, eos_ids=())
    eos = free[0][4]
    want = [reference_tokens(theirs, prompt, eos) for prompt in prompts]
    assert len(want[0]) < NEW
    assert generate_batch(ours, prompts, NEW, eos_ids=[eos]) == want
    assert list(generate(ours, prompts[0], NEW, eos_ids=[eos])) == want[0]
    assert generate_batch(ours, prompts, 0) == [[], [], []]
    assert generate_batch(ours, [], NEW) == []


def test_cache_equals_no_cache(ours):
    rng = np.random.default_rng(4)
    ids = jnp.asarray(rng.integers(2, SIZES["vocab_size"], (2, 10)))

    @nnx.jit
    def in_two_parts(model, ids):
        cache = KVCache.empty(model.config, 2, 16, jnp.float32)
        index = jnp.broadcast_to(jnp.arange(10), (2, 10))
        first = model.forward(ids[:, :6], positions=index[:, :6], cache=cache)
        second = model.forward(ids[:, 6:], positions=index[:, 6:], cache=first.cache)
        return model.logits(jnp.concatenate([first.hidden, second.hidden], axis=1))

    want = nnx.jit(lambda model, ids: model(ids))(ours, ids)
    got = in_two_parts(ours, ids)
    # Same operations in float32, in sums of another shape.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a cache needs positions"):
        ours.forward(ids, cache=KVCache.empty(ours.config, 2, 16, jnp.float32))


def programs_of(model):
    graph, state = nnx.split(model)
    return programs(graph, jax.tree.structure(state))


def test_few_programs_serve_many_shapes(ours):
    rng = np.random.default_rng(5)
    compiled = programs_of(ours)
    for program in compiled:
        program.clear_cache()
    for count, length in ((3, 4), (4, 9), (3, 20)):
        batch = [rng.integers(2, 99, length).tolist() for _ in range(count)]
        generate_batch(ours, batch, 3, eos_ids=())
    assert [program._cache_size() for program in compiled] == [1, 1]


def test_updated_weights_are_used_without_a_new_program(ours, prompts):
    before = generate_batch(ours, prompts, NEW, eos_ids=())
    compiled = programs_of(ours)
    sizes = [program._cache_size() for program in compiled]
    graph, state = nnx.split(ours)
    changed = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    changed.embed.embedding.set_value(jnp.roll(changed.embed.embedding[...], 1, 0))
    assert generate_batch(changed, prompts, NEW, eos_ids=()) != before
    assert programs_of(changed) is compiled
    assert [program._cache_size() for program in compiled] == sizes


def test_sampling_is_reproducible_and_follows_the_probabilities():
    probability = jnp.array([0.5, 0.3, 0.15, 0.05])
    count = 4000
    logits = jnp.broadcast_to(jnp.log(probability), (count, 4))

    def shares(**kwargs):
        tokens = select(logits, jax.random.key(0), Sampler(**kwargs))
        again = select(logits, jax.random.key(0), Sampler(**kwargs))
        np.testing.assert_array_equal(tokens, again)
        return np.bincount(np.asarray(tokens), minlength=4) / count

    # Four standard deviations of a share at most: 4 · sqrt(1/4 / count).
    tolerance = {"atol": 2 / np.sqrt(count)}
    np.testing.assert_allclose(shares(temperature=1.0), probability, **tolerance)
    halved = np.asarray(probability) ** 2 / np.sum(np.asarray(probability) ** 2)
    np.testing.assert_allclose(shares(temperature=0.5), halved, **tolerance)
    two = np.array([0.5, 0.3, 0, 0]) / 0.8
    for limit in ({"top_k": 2}, {"top_p": 0.7}):
        got = shares(temperature=1.0, **limit)
        np.testing.assert_allclose(got, two, **tolerance)
        assert not got[2:].any()
    assert shares(temperature=1.0, top_p=0.1)[0] == 1
    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=50, top_p=1.0), probability, **tolerance
    )
    greedy = select(logits, None, Sampler())
    assert not np.any(np.asarray(greedy))


def test_sampled_generation_depends_on_the_key_alone(ours, prompts):
    def sample(seed):
        return generate_batch(
            ours,
            prompts,
            NEW,
            temperature=1.0,
            top_k=20,
            key=jax.random.key(seed),
            eos_ids=(),
        )

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_errors(ours):
    for kwargs, message in (
        ({"prompt_ids": []}, "prompt 0 has no tokens"),
        ({"prompt_ids": [101]}, r"outside 0\.\.100"),
        ({"max_new_tokens": -1}, "must not be negative, got -1"),
        ({"max_new_tokens": 256}, "257 tokens with the prompt, the model takes 256"),
        ({"temperature": -1.0}, "temperature must be zero or positive"),
        ({"temperature": 1.0}, "needs a PRNG key"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ):
        arguments = {"prompt_ids": [3], "max_new_tokens": 2, **kwargs}
        with pytest.raises(ValueError, match=message):
            generate(ours, **arguments)
