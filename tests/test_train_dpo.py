"""Preferences: their data, their loss against NumPy, and a training on them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from train_standin import (
    LetterTokenizer,
    Silent,
    StandIn,
    StopAt,
    make_config,
    make_examples,
)

from ktjax.train.batching import Batch, Batcher
from ktjax.train.config import TrainConfig
from ktjax.train.data import (
    Chat,
    DataError,
    Example,
    fingerprint,
    read_chats,
    tokenize,
)
from ktjax.train.loop import fit
from ktjax.train.objective import dpo
from ktjax.train.optimizer import make_optimizer
from ktjax.train.step import (
    init_state,
    make_train_step,
    split_model,
)

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "a"}
BAD = {"role": "assistant", "content": "b"}
DPO = {"objective": "dpo", "train_data": "d", "eval_data": "e"}


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_preferences(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "q", "chosen": "a", "rejected": "b", "group": "g"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    )
    first, *others = read_chats(path, preferences=True)
    assert first.messages == (USER, GOOD)
    assert first.rejected == (USER, BAD)
    assert first.group == "g"
    for other in others:
        assert (other.messages, other.rejected) == (first.messages, first.rejected)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            'a preference needs "rejected" (objective dpo)',
        ),
        ({"messages": [USER, GOOD]}, 'needs "chosen" (objective dpo)'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "two strings or two lists"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, USER, BAD]},
            "must differ in the last message only",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "a message before the assistant's"),
    ],
)
def test_bad_preferences_name_file_and_line(tmp_path, row, words):
    path = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        read_chats(path, preferences=True)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert words in str(caught.value)


def test_preferences_are_no_chats(tmp_path):
    path = write(tmp_path, {"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    with pytest.raises(DataError, match="got keys: chosen, rejected"):
        read_chats(path)


def test_a_pair_must_fit_a_row_together():
    pair = Chat((USER, GOOD), "here", rejected=(USER, BAD))
    (example,) = tokenize([pair], LetterTokenizer(), 12)
    assert [part.ids.tolist() for part in example.parts] == [
        [28, 16, 31, 29, 0, 31],
        [28, 16, 31, 29, 1, 31],
    ]
    with pytest.raises(DataError, match=r"here: the two chats of the prefer.* have 12"):
        tokenize([pair], LetterTokenizer(), 11)
    chosen_only = dataclasses.replace(example, rejected=None)
    assert fingerprint([example]) != fingerprint([chosen_only])


def make_pairs(count, seed=0):
    chosen = make_examples(count, seed, longest=7)
    rejected = make_examples(count, seed + 1000, longest=7)
    return [
        dataclasses.replace(one, rejected=two)
        for one, two in zip(chosen, rejected, strict=True)
    ]


def expected(losses, reference, examples_of_rows, weights, segments, beta):
    """The loss, margins and pairs of a batch, one pair at a time, in float64."""
    total, margins = 0.0, []
    for row, count in enumerate(examples_of_rows):
        for pair in range(count):
            logp = []
            for segment in (2 * pair + 1, 2 * pair + 2):
                at = (segments[row] == segment) & (weights[row] != 0)
                logp.append(
                    (np.float64(reference[row, at]) - np.float64(losses[row, at])).sum()
                )
            margin = beta * (logp[0] - logp[1])
            total += np.log1p(np.exp(-margin))
            margins.append(margin)
    return total, margins


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_the_loss_is_that_of_the_paper(batching):
    pairs = make_pairs(11)
    batcher = Batcher(batching, 4, 32, 8)
    rng = np.random.default_rng(0)
    seen = 0
    for plan in batcher.plan(pairs, range(len(pairs))):
        batch = batcher.build(pairs, plan)
        losses, reference = rng.normal(2, 1, (2, *batch.weights.shape)).astype("f4")
        losses[batch.weights == 0] = np.inf  # nothing of them may count
        counts = [len(row) for row in plan.rows]
        want, margins = expected(
            losses, reference, counts, batch.weights, batch.segment_ids, 0.3
        )
        objective = dpo(0.3)
        total, extras = objective.total(
            jnp.asarray(losses), jnp.asarray(reference), batch
        )
        assert objective.count(batch) == sum(counts)
        assert total == pytest.approx(want, rel=1e-5)
        assert extras["reward_margin"] == pytest.approx(
            sum(margins), rel=1e-4, abs=1e-5
        )
        assert extras["reward_accuracy"] == sum(margin > 0 for margin in margins)
        seen += sum(counts)
    assert seen == len(pairs)


def start(accumulation=1, rows=8, **changes):
    model = StandIn(dropout=0.0)
    config = make_config(**DPO, batch_size=rows, accumulation=accumulation, **changes)
    split = split_model(model, keep_reference=True)
    state = init_state(split, make_optimizer(config))
    return split, state, make_train_step(split.graph, config)


def one_batch(rows=8):
    return next(Batcher("pack", rows, 16, 8).once(make_pairs(40)))


def test_it_begins_at_ln_two_and_trains_the_adapters_alone():
    split, state, step = start()
    before = jax.tree.map(np.asarray, split.frozen)
    state, metrics = step(state, split.frozen, one_batch())
    # Policy and reference are one: the margin is 0.
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert metrics["grad_norm"] > 0
    for _ in range(5):
        state, metrics = step(state, split.frozen, one_batch())
    assert metrics["loss"] < np.log(2)
    assert metrics["reward_margin"] > 0
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves(split.frozen), strict=True
    ):
        np.testing.assert_array_equal(old, new)


def test_the_reference_shares_the_base_weights():
    model = StandIn()
    split = split_model(model, keep_reference=True)
    kept = nnx.state(model, nnx.LoRAParam)
    for mine, theirs in zip(
        jax.tree.leaves(split.frozen.reference), jax.tree.leaves(kept), strict=True
    ):
        assert mine is theirs
    base = {id(leaf) for leaf in jax.tree.leaves(split.frozen.base)}
    assert base <= {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}


def test_accumulation_equals_one_big_batch():
    results = []
    for accumulation, rows in ((1, 8), (4, 2)):
        split, state, step = start(accumulation, rows)
        _, metrics = step(state, split.frozen, one_batch())
        results.append(metrics)
    for name, value in results[0].items():
        # Sums of a few dozen float32 terms in another order.
        np.testing.assert_allclose(
            results[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_a_training_prefers_the_chosen(tmp_path):
    pairs = make_pairs(24)
    for pair in pairs:
        assert pair.rejected is not None
        pair.ids[pair.learn] = 7
        pair.rejected.ids[pair.rejected.learn] = 9
    config = make_config(
        **DPO, steps=30, learning_rate=5e-2, eval_every=30, dpo_beta=1.0
    )
    observer = Silent()
    fit(StandIn(dropout=0.0), pairs, pairs, config, tmp_path, observer)
    (line,) = (
        row
        for row in map(json.loads, (tmp_path / "metrics.jsonl").open())
        if "eval_loss" in row
    )
    assert line["eval_loss"] < 0.5 * np.log(2)
    assert line["eval_reward_accuracy"] > 0.85
    assert line["eval_reward_margin"] > 1
    # Resuming compares with the same reference: the start, not the checkpoint.
    cut = dataclasses.replace(config, checkpoint_every=5)
    first = fit(StandIn(dropout=0.0), pairs, [], cut, tmp_path / "cut", StopAt(10))
    assert first.interrupted
    rest = dataclasses.replace(cut, resume=True, output_dir=tmp_path / "cut")
    second = fit(StandIn(dropout=0.0), pairs, [], rest, tmp_path / "cut", Silent())
    whole = [line["loss"] for line in observer.steps]
    assert first.losses + second.losses == whole


def test_the_demo_has_no_preferences():
    with pytest.raises(ValueError, match="objective = dpo needs train_data"):
        TrainConfig(objective="dpo")


def test_batches_of_pairs_have_two_neighbouring_segments():
    batch = one_batch(rows=4)
    assert isinstance(batch, Batch)
    for row in range(4):
        segments = batch.segment_ids[row]
        assert segments.max() % 2 == 0
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            assert at.any()
            assert batch.positions[row, at].tolist() == list(range(at.sum()))
    assert Example(np.zeros(2, np.int32), np.ones(2, bool)).rejected is None
