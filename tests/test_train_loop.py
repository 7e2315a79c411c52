"""Steps, resuming, accumulation, Ctrl-C and the NaN guard, on a stand-in model."""

import gc
import itertools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from train_standin import (
    RANK,
    WIDTH,
    Silent,
    StandIn,
    StopAt,
    make_config,
    make_examples,
)

from ktjax.nn import token_losses
from ktjax.train import loop
from ktjax.train.batching import Batcher
from ktjax.train.checkpoint import list_checkpoints, load_tree
from ktjax.train.config import TrainConfig
from ktjax.train.loop import TrainingError, fit
from ktjax.train.loss import weigh
from ktjax.train.optimizer import make_optimizer, make_schedule
from ktjax.train.step import (
    init_state,
    make_train_step,
    split_model,
)

EXAMPLES = make_examples(40)


def train(tmp_path, name, observer=None, model=None, evaluation=(), **changes):
    model = model or StandIn()
    config = make_config(**changes)
    observer = observer or Silent()
    result = fit(model, EXAMPLES, evaluation, config, tmp_path / name, observer)
    return model, result, observer


def assert_same(left, right):
    left, right = plain(left), plain(right)
    for old, new in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(old, new)


def plain(tree):
    """Keys as numbers."""
    return jax.tree.map(
        lambda a: (
            jax.random.key_data(a)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
            else a
        ),
        tree,
    )


def state_of(model):
    """Adapters, random state, and the rest."""
    return nnx.state(model, nnx.LoRAParam, nnx.RngState, ...)


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_interrupted_and_resumed_run_is_bit_exact(tmp_path, batching):
    handler = signal.getsignal(signal.SIGINT)
    whole, result, _ = train(tmp_path, "whole", batching=batching)
    assert (result.step, result.interrupted, len(result.losses)) == (6, False, 6)

    _, first, observer = train(tmp_path, "cut", StopAt(3), batching=batching)
    assert (first.step, first.interrupted) == (3, True)
    assert observer.saved == [tmp_path / "cut/checkpoints/step-00000003"]
    resumed, second, _ = train(
        tmp_path, "cut", batching=batching, resume=True, output_dir=tmp_path / "cut"
    )
    assert second.step == 6
    assert first.losses + second.losses == result.losses
    assert_same(state_of(whole), state_of(resumed))
    assert signal.getsignal(signal.SIGINT) is handler


def test_only_lora_and_random_state_change(tmp_path):
    before = state_of(StandIn())
    model, _, observer = train(tmp_path, "run", evaluation=EXAMPLES[:5], eval_every=2)
    after = state_of(model)
    assert_same(before[2], after[2])
    changed = [
        not np.array_equal(old, new)
        for old, new in zip(
            jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True
        )
    ]
    assert changed == [True, True]
    assert [step for step, _ in observer.evaluations] == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    keys = {"step", "loss", "router_aux", "grad_norm", "learning_rate", "tokens"}
    keys |= {"router_load_max", "router_entropy", "seconds"}
    assert lines[0].keys() == keys
    # Shares 3/4, 1/4, 0, 0 of the load: see the stand-in.
    assert lines[0]["router_load_max"] == pytest.approx(3.0)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert lines[0]["router_entropy"] == pytest.approx(entropy)
    assert lines[2].keys() == {"step", "eval_loss", "router_drift"}


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    train(tmp_path, "run", StopAt(4))
    path = tmp_path / "run/metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    train(tmp_path, "run", resume=True, output_dir=tmp_path / "run")
    steps = [json.loads(line)["step"] for line in path.open()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_training_learns(tmp_path):
    examples = make_examples(40)
    for example in examples:
        example.ids[example.learn] = 7
    config = make_config(steps=40, learning_rate=5e-2)
    result = fit(StandIn(dropout=0.0), examples, [], config, tmp_path, Silent())
    assert np.mean(result.losses[-5:]) < 0.85 * np.mean(result.losses[:5])


def one_step(accumulation, rows):
    model = StandIn(dropout=0.0)
    config = make_config(
        batch_size=rows, accumulation=accumulation, router_aux_weight=0.1
    )
    split = split_model(model)
    state = init_state(split, make_optimizer(config))
    batcher = Batcher.from_config(config, rows * accumulation)
    batch = next(batcher.once(EXAMPLES))
    # Micro-batches with unequal numbers of learnt tokens, one without any.
    batch.weights[: rows * accumulation // 4] = 0
    step = make_train_step(split.graph, config)
    state, metrics = step(state, split.frozen, batch)
    return state, metrics


def test_accumulation_equals_one_big_batch():
    big, big_metrics = one_step(1, 8)
    split, split_metrics = one_step(4, 2)
    for name, value in big_metrics.items():
        # Sums of a few hundred float32 terms in another order.
        np.testing.assert_allclose(split_metrics[name], value, rtol=2e-6, err_msg=name)
    # Adam divides by |gradient|, so a rounding error is relative to the rate.
    for old, new in zip(
        jax.tree.leaves(big.lora), jax.tree.leaves(split.lora), strict=True
    ):
        np.testing.assert_allclose(old, new, rtol=0, atol=1e-2 * 1e-3)


def test_state_is_donated_and_the_model_is_not():
    model = StandIn()
    config = make_config()
    split = split_model(model)
    state = init_state(split, make_optimizer(config))
    batch = next(Batcher.from_config(config, 4).once(EXAMPLES))
    after, _ = make_train_step(split.graph, config)(state, split.frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.lora))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    assert int(after.step) == 1


def test_one_trace_for_many_steps():
    traces = []

    class Counting(StandIn):
        def token_losses(self, *args, **kwargs):
            traces.append(1)
            return super().token_losses(*args, **kwargs)

    model = Counting()
    config = make_config()
    split = split_model(model)
    state = init_state(split, make_optimizer(config))
    step = make_train_step(split.graph, config)
    for batch in Batcher.from_config(config, 4).once(EXAMPLES):
        state, _ = step(state, split.frozen, batch)
    assert int(state.step) > 1
    assert len(traces) == 1


def poison(monkeypatch, change):
    """Let `change(state, frozen, batch)` spoil what the third step sees."""
    compiler = loop._compiler

    def poisoned(step):
        compiled = compiler(step)

        def poison_third(state, frozen, batch):
            program = compiled(state, frozen, batch)
            if int(state.step) != 2:
                return program
            return lambda state, frozen, batch: program(*change(state, frozen, batch))

        return poison_third

    monkeypatch.setattr(loop, "_compiler", poisoned)


def test_nan_guard_names_the_step_and_the_loss(tmp_path, monkeypatch):
    poison(monkeypatch, spoil)
    model = StandIn()
    with pytest.raises(TrainingError, match=r"step 3: loss is nan.*step-00000002"):
        train(tmp_path, "run", model=model, checkpoint_every=1)
    (first, _), (second, newest) = list_checkpoints(tmp_path / "run/checkpoints")
    assert (first, second) == (1, 2)
    assert_has_adapters_of(newest, model)


def spoil(state, frozen, batch):
    batch.weights[:] = np.nan
    batch.weights[0] = np.inf
    return state, frozen, batch


def assert_has_adapters_of(path, model):
    """The adapters and the random state of a checkpoint, in arrays that are alive."""
    for name, kind in {"lora": nnx.LoRAParam, "random": nnx.RngState}.items():
        now = nnx.state(model, kind)
        assert_same(now, load_tree(path, name, now))


class Overflowing(StandIn):
    """The loss is finite; the gradient of b is not, that of a is."""

    def token_losses(self, *args, **kwargs):
        losses, routings = super().token_losses(*args, **kwargs)
        return losses + _spike(self.b[...]), routings


@jax.custom_vjp
def _spike(b):
    return jnp.zeros(())


_spike.defvjp(lambda b: (_spike(b), b), lambda b, g: (jnp.full_like(b, jnp.inf),))


def test_nan_guard_names_the_tensor(tmp_path):
    with pytest.raises(TrainingError, match=r"step 1: the gradient of b is not finite"):
        train(tmp_path, "run", model=Overflowing())


def test_early_stop_uses_the_best_checkpoint(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0])

    class Scripted(loop.Evaluator):
        def __call__(self, state):
            return {"eval_loss": next(losses)}

    monkeypatch.setattr(loop, "Evaluator", Scripted)
    settings = {"eval_every": 2, "patience": 2, "steps": 20, "eval_split": 0.5}
    settings |= {"checkpoint_every": 1, "keep_checkpoints": 1}
    model, result, observer = train(
        tmp_path, "run", evaluation=EXAMPLES[:5], **settings
    )
    # The best was after step 4; neither 6 nor 8 was better, equal is not.
    assert (result.step, result.stopped_early, result.interrupted) == (8, True, False)
    assert [step for step, _ in observer.evaluations] == [2, 4, 6, 8]
    root = tmp_path / "run/checkpoints"
    assert [step for step, _ in list_checkpoints(root)] == [4, 8]
    assert result.checkpoint == root / "step-00000004"
    lora = nnx.state(model, nnx.LoRAParam)
    assert_same(lora, load_tree(result.checkpoint, "lora", lora))
    assert loop.chosen_checkpoint(root) == result.checkpoint
    # It stays stopped.
    _, again, _ = train(
        tmp_path,
        "run",
        evaluation=EXAMPLES[:5],
        resume=True,
        output_dir=tmp_path / "run",
        **settings,
    )
    assert (again.step, again.stopped_early, again.losses) == (8, True, [])


def test_patience_is_counted_across_a_resume(tmp_path):
    settings = {"eval_every": 1, "patience": 3, "steps": 12, "eval_split": 0.5}
    settings |= {"learning_rate": 1.0, "warmup_steps": 0}
    _, whole, one = train(tmp_path, "whole", evaluation=EXAMPLES[:5], **settings)
    _, first, two = train(
        tmp_path, "cut", StopAt(3), evaluation=EXAMPLES[:5], **settings
    )
    assert first.interrupted
    settings |= {"resume": True, "output_dir": tmp_path / "cut"}
    _, second, three = train(tmp_path, "cut", evaluation=EXAMPLES[:5], **settings)
    assert two.evaluations + three.evaluations == one.evaluations
    assert (second.step, second.stopped_early) == (whole.step, whole.stopped_early)
    assert second.checkpoint.name == whole.checkpoint.name
    assert whole.stopped_early
    with pytest.raises(TrainingError, match="made with evaluation_data = "):
        train(tmp_path, "cut", evaluation=EXAMPLES[:6], **settings)


def test_refuses_what_cannot_be_continued(tmp_path):
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(tmp_path, "run", resume=True, output_dir=tmp_path)
    train(tmp_path, "run", StopAt(2))
    with pytest.raises(TrainingError, match="holds checkpoints of an earlier run"):
        train(tmp_path, "run")
    with pytest.raises(TrainingError, match=r"made with seed = 0, now it is 1"):
        train(tmp_path, "run", resume=True, output_dir=tmp_path, seed=1)
    other = make_examples(40, seed=1)
    config = make_config(resume=True, output_dir=tmp_path)
    with pytest.raises(TrainingError, match="made with data = "):
        fit(StandIn(), other, [], config, tmp_path / "run", Silent())
    with pytest.raises(ValueError, match=r"no nnx\.LoRAParam"):
        split_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_there_is_one_copy_of_the_adapters_beside_the_moments(tmp_path):
    class Counting(Silent):
        def on_step(self, metrics):
            super().on_step(metrics)
            gc.collect()
            alive = [a for a in jax.live_arrays() if a.shape == (WIDTH, RANK)]
            counts.append(len(alive) - before)

    counts = []
    gc.collect()
    model = StandIn()
    before = len([a for a in jax.live_arrays() if a.shape == (WIDTH, RANK)]) - 1
    train(tmp_path, "run", Counting(), model)
    assert counts == [3] * 6


def test_second_interrupt_leaves_at_once(tmp_path):
    class Impatient(StopAt):
        def on_checkpoint(self, path):
            os.kill(os.getpid(), signal.SIGINT)

    model = StandIn()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "run", Impatient(1), model)
    ((_, newest),) = list_checkpoints(tmp_path / "run/checkpoints")
    assert_has_adapters_of(newest, model)


def test_second_interrupt_during_a_step_loses_nothing(tmp_path, monkeypatch):
    """Then the state is donated, and the next one not there yet."""

    def interrupt(state, frozen, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return state, frozen, batch

    whole, _, _ = train(tmp_path, "whole", StopAt(3))
    poison(monkeypatch, interrupt)
    model = StandIn()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "run", model=model)
    assert_same(state_of(model)[0], state_of(whole)[0])


class Careless(Silent):
    """An observer with a bug, at step 2."""

    def on_step(self, metrics):
        if metrics["step"] == 2:
            raise LookupError


def test_error_outside_the_step_leaves_the_last_adapters(tmp_path):
    model = StandIn()
    with pytest.raises(LookupError):
        train(tmp_path, "run", Careless(), model)
    whole, _, _ = train(tmp_path, "whole", StopAt(2))
    assert_same(state_of(model), state_of(whole))


class Failing(StandIn):
    """Its third step fails while it is computed."""

    def token_losses(self, *args, **kwargs):
        def check(losses):
            calls.append(1)
            if len(calls) == 3:
                raise LookupError("gone")
            return losses

        calls = self.calls
        losses, routings = super().token_losses(*args, **kwargs)
        shape = jax.ShapeDtypeStruct(losses.shape, losses.dtype)
        seen = jax.pure_callback(check, shape, jax.lax.stop_gradient(losses))
        return losses + 0 * seen, routings


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_step_that_fails_leaves_the_newest_checkpoint(tmp_path, checkpoint_every):
    model = Failing()
    model.calls = nnx.static([])
    with pytest.raises(jax.errors.JaxRuntimeError, match="gone") as caught:
        train(tmp_path, "run", model=model, checkpoint_every=checkpoint_every)
    saved = list_checkpoints(tmp_path / "run/checkpoints")
    (note,) = caught.value.__notes__
    if saved:
        assert [step for step, _ in saved] == [1, 2]
        assert str(saved[-1][1]) in note
        assert_has_adapters_of(saved[-1][1], model)
    else:
        assert "load the model again" in note


def test_schedule():
    config = make_config(steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    rates = [float(make_schedule(config)(step)) for step in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == max(rates) == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_loss_is_float32_and_ignores_masked_positions():
    logits = jnp.array([[[2.0, 0.0], [jnp.inf, 0.0]]], jnp.bfloat16)
    targets, weights = jnp.array([[0, 1]]), jnp.array([[1.0, 0.0]])

    def loss(logits):
        losses = token_losses(lambda rows: rows, logits, targets, 2)
        return jnp.sum(weigh(losses, weights))

    value, grad = jax.value_and_grad(loss)(logits.astype(jnp.float32))
    assert value == pytest.approx(np.log1p(np.exp(-2.0)))
    assert value.dtype == jnp.float32
    assert loss(logits).dtype == jnp.float32
    assert float(grad[0, 0, 0]) == pytest.approx(-1 / (1 + np.exp(2.0)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 1.5, "of type int"),
        ("steps", True, "of type int"),
        ("lora_rank", 257, "at most 256"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "of type float"),
        ("learning_rate", "x", "of type float"),
        ("final_rate", 1.5, "at most 1"),
        ("dtype", "float16", "one of float32, bfloat16"),
        ("batching", "sort", "one of pack, pad"),
        ("warmup_steps", 240, r"below steps \(240\)"),
        ("resume", True, "needs output_dir"),
        ("model", "m", "needs train_data"),
    ],
)
def test_config_errors_name_field_and_value(field, value, words):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} .*{words}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_split": 0.1, "eval_data": "e"}, "eval_split cannot be given with"),
        ({"patience": 1, "eval_every": 0}, "patience needs eval_every"),
        ({"patience": 1, "train_data": "d"}, "patience needs eval_data or eval_split"),
    ],
)
def test_config_options_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_config_accepts_strings_for_paths_and_integers_for_floats():
    config = TrainConfig(model="m", train_data="d", learning_rate=1)
    assert config.model_path == pathlib.Path("m")
    assert config.eval_path is None
    assert isinstance(config.learning_rate, float)
