"""Training with dropout: the same masks in recomputations and after a resume."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo_cases import gradient
from flax import nnx
from train_standin import Silent, StopAt, make_config

import ktjax
from ktjax import assets
from ktjax.config import LoRAConfig
from ktjax.io.adapters import write_adapter
from ktjax.models import (
    Decoder,
    ModelConfig,
    Tokenizer,
    extract_adapter,
    from_pretrained,
    generate_batch,
    random_streams,
)
from ktjax.nn import RoutedExperts
from ktjax.train import (
    Batcher,
    init_state,
    make_optimizer,
    make_train_step,
    read_chats,
    read_run,
    split_model,
    tokenize,
)
from ktjax.train.evaluate import Evaluator
from ktjax.train.loop import fit

RATE = 0.2


@pytest.fixture(scope="module")
def examples():
    chats = read_chats(assets.demo_data("train"))[:24]
    return tokenize(chats, Tokenizer(assets.demo_model()), 128)


@pytest.fixture(scope="module")
def make():
    """`make(rate, layers=1, remat=False, policy="save")`: random small decoders."""
    demo = ModelConfig.from_pretrained(assets.demo_model())
    shape = (demo.num_experts, demo.moe_intermediate_size, demo.hidden_size)
    normal = np.random.default_rng(0).standard_normal
    up, gate = (normal(shape, np.float32) / 16 for _ in range(2))
    store = ktjax.ExpertStore.from_arrays(gate, up, np.swapaxes(up, 1, 2))

    def build(rate, layers=1, *, remat=False, policy="save"):
        rngs = random_streams(0)

        def experts(_):
            made = RoutedExperts(
                store,
                lora_rank=4,
                lora_alpha=8.0,
                dropout=rate,
                activation_policy=policy,
                rngs=rngs,
            )
            # B away from zero, or nothing would depend on what A sees.
            for name in ("gate_b", "up_b", "down_b"):
                param = getattr(made, name)
                noise = jax.random.normal(rngs.params(), param.shape)
                param.set_value(0.05 * noise)
            return made

        config = dataclasses.replace(demo, num_hidden_layers=layers)
        return Decoder(config, experts, dtype=jnp.float32, remat=remat, rngs=rngs)

    with store:
        yield build


def counts(state):
    return {int(count) for count in jax.tree.leaves(nnx.state(state, nnx.RngCount))}


def assert_same(left, right):
    for old, new in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = map(jax.random.key_data, (old, new))
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_recomputed_layers_drop_the_same(make, policy):
    ids = jnp.arange(24).reshape(1, 24)
    models = [make(RATE, 2, remat=remat, policy=policy) for remat in (False, True)]
    (loss, grad), (again, regrad) = (gradient(model, ids) for model in models)
    for model in models:
        assert counts(model) == {0}  # a function of the state does not change it
        model(ids)
        assert counts(model) == {1}
    models[0].eval()
    plain, _ = gradient(models[0], ids)
    assert abs(loss - plain) > 1e-4 * abs(plain)
    # As in test_train_memory.py. Another mask anywhere would be another loss.
    assert loss == pytest.approx(float(again), rel=1e-6)
    for one, two in zip(jax.tree.leaves(grad), jax.tree.leaves(regrad), strict=True):
        assert np.linalg.norm(one - two) < 2.0**-14 * np.linalg.norm(one)


def test_evaluation_and_generation_drop_nothing(make, examples):
    config = make_config(sequence_length=128)
    losses, answers, logits = [], [], []
    for rate in (0.0, RATE):
        model = make(rate)
        split = split_model(model)
        state = init_state(split, make_optimizer(config))
        losses.append(Evaluator(model, split.frozen, examples[:4], config)(state))
        answers.append(generate_batch(model, [[3, 4, 5]], 4))
        logits.append(model(jnp.arange(8)[None]))
    assert losses[0] == losses[1]
    assert answers[0] == answers[1]
    assert np.any(logits[0] != logits[1])  # on again after both


def test_every_layer_and_micro_batch_has_a_mask_of_its_own(make, examples):
    split = split_model(make(RATE, layers=3))
    keys = [
        tuple(jax.random.key_data(key).tolist())
        for key in jax.tree.leaves(nnx.state(split.random, nnx.RngKey))
    ]
    assert len(set(keys)) == len(keys) == 3
    split = split_model(make(RATE))
    config = make_config(sequence_length=128, batch_size=1)
    batch = next(Batcher.from_config(config, 1).once(examples))
    twice = jax.tree.map(lambda a: np.concatenate([a, a]), batch)
    losses = []
    for accumulation, rows in ((1, batch), (2, twice)):
        config = dataclasses.replace(config, accumulation=accumulation)
        state = init_state(split, make_optimizer(config))
        step = make_train_step(split.graph, config)
        state, metrics = step(state, split.frozen, rows)
        assert counts(state.random) == {accumulation}
        losses.append(float(metrics["loss"]))
    first, mean = losses
    second = 2 * mean - first
    assert abs(second - first) > 1e-4 * first


def test_a_resumed_training_goes_on_with_the_same_masks(make, tmp_path, examples):
    def train(name, observer, **changes):
        model = make(RATE, remat=True)
        config = make_config(
            steps=4,
            warmup_steps=1,
            batch_size=1,
            accumulation=2,
            sequence_length=128,
            lora_dropout=RATE,
            lora_rank=4,
            remat=True,
            **changes,
        )
        result = fit(model, examples, [], config, tmp_path / name, observer)
        return result, nnx.state(model, nnx.LoRAParam), nnx.state(model, nnx.RngState)

    whole, want, want_random = train("whole", Silent())
    first, _, _ = train("cut", StopAt(2))
    second, got, random = train(
        "cut", Silent(), resume=True, output_dir=tmp_path / "cut"
    )
    assert first.losses + second.losses == whole.losses
    assert_same(got, want)
    assert_same(random, want_random)
    assert counts(random) == {8}  # steps x micro-batches
    assert read_run(tmp_path / "cut").lora_config().dropout == 0


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_the_reference_policy_drops_nothing(make, rate, examples):
    """So a policy that begins as the reference differs from it by what it drops."""
    config = make_config(objective="dpo", train_data="pairs.jsonl", sequence_length=128)
    split = split_model(make(rate), keep_reference=True)
    state = init_state(split, make_optimizer(config))
    # Neighbouring segments are pairs, whatever they say.
    batch = next(Batcher.from_config(config, 2).once(examples[:4]))
    _, metrics = make_train_step(split.graph, config)(state, split.frozen, batch)
    assert (abs(float(metrics["reward_margin"])) > 1e-5) == (rate > 0)


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_an_export_has_none(make, tmp_path, layout):
    """PEFT refuses experts with it, in either layout."""
    adapter = extract_adapter(make(RATE))
    assert adapter.lora_config().dropout == 0
    write_adapter(tmp_path / "a", adapter, "qwen3_moe", layout=layout)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0


@pytest.mark.parametrize("rngs", [None, random_streams(3)], ids=["default", "own"])
def test_adapters_start_the_same_at_every_rate(rngs):
    """A comparison of rates is one of rates alone."""
    starts = [
        from_pretrained(
            assets.demo_model(),
            experts="reference",
            lora=LoRAConfig(4, dropout=rate),
            rngs=copy.deepcopy(rngs),
        )
        for rate in (0.0, RATE)
    ]
    assert [s.layers[0].mlp.experts.dropout.rate for s in starts] == [0.0, RATE]
    assert_same(*(nnx.state(start, nnx.LoRAParam) for start in starts))
