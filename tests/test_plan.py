"""ktjax plan against what then happens."""

import contextlib
import dataclasses
import io
import json

import jax
import pytest
from rich.console import Console
from train_standin import make_config

from ktjax import assets, cli
from ktjax.commands import PlanConfig, run_plan
from ktjax.models import ModelConfig, from_pretrained
from ktjax.train import plan, split_model
from ktjax.train.step import init_state, make_optimizer

DEMO = assets.demo_model()


def geometry(**changes):
    return dataclasses.replace(ModelConfig.from_pretrained(DEMO), **changes)


def config(**changes):
    return make_config(batch_size=2, sequence_length=64, lora_rank=4, **changes)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("experts", "targets"), [("bf16", "experts"), ("int4", "experts,q_proj,lm_head")]
)
def test_parts_are_what_a_loaded_model_has(experts, targets, monkeypatch):
    monkeypatch.setattr(plan, "step_bytes", lambda *_: 7)
    monkeypatch.setattr(plan, "resident_memory", lambda: 100)
    pattern = {r"layers\.1\..*": 8}
    options = config(
        experts=experts,
        targets=targets,
        rank_pattern=pattern,
        moment_dtype="bfloat16",
    )
    memory = plan.plan_memory(geometry(), options)
    model = from_pretrained(DEMO, experts=experts, dtype="float32", lora=options.lora)
    try:
        split = split_model(model)
        state = init_state(split, make_optimizer(options))
        stores = [layer.experts.store for _, layer in model.moe_layers()]
        assert memory.stores == sum(store.nbytes for store in stores)
        assert memory.dense == size(split.frozen)
        assert memory.adapters == size(state.lora)
        assert memory.optimizer == size(state.optimizer)
    finally:
        model.close()
    assert memory.step == 7
    assert memory.process == 100
    assert memory.total == sum(dataclasses.astuple(memory))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        # The logits are most of it in a shallow model, the gradients in a deep one.
        ({"vocab_size": 20_000}, {"lora_rank": 64}),
        ({}, {"remat": True, "sequence_length": 256}),
    ],
)
def test_a_step_of_many_layers_follows_from_few(shape, options):
    """XLA's figure for six layers against the lines through two and three."""
    deep = geometry(num_hidden_layers=6, **shape)
    options = dataclasses.replace(config(), **options)
    planned = plan.step_bytes(deep, options)
    actual = plan.compiled_bytes(deep, options)
    # Of a step alone, which is a small part of a large model's memory.
    assert planned == pytest.approx(actual, rel=0.15)


def test_the_largest_that_fits_fits_just(monkeypatch):
    """With a step that needs what a known formula says, as a compiled one would."""

    def step_bytes(model, options):
        tokens = options.batch_size * options.sequence_length
        kept = 900 * -(-options.lora_rank // 32) * 32
        return 5_000_000 + tokens * (7000 + kept + 40 * options.sequence_length)

    monkeypatch.setattr(plan, "step_bytes", step_bytes)
    monkeypatch.setattr(plan, "resident_memory", lambda: 1 << 20)
    model = geometry()

    def total(**changes):
        options = dataclasses.replace(config(), **changes)
        return plan.plan_memory(model, options).total

    memory = plan.plan_memory(model, config())
    for available in (memory.total, 2 * memory.total, 5 * memory.total):
        largest = plan.find_largest(model, config(), memory, available)
        for name, value, step in (
            ("batch_size", largest.batch_size, 1),
            ("sequence_length", largest.sequence_length, 16),
            ("lora_rank", largest.rank, 1 if largest.rank < 32 else 32),
        ):
            assert total(**{name: value}) <= available, name
            assert total(**{name: value + step}) > available, name
    small = plan.find_largest(model, config(), memory, memory.stores)
    assert (small.rank, small.batch_size, small.sequence_length) == (0, 0, 0)
    huge = plan.find_largest(model, config(), memory, 1 << 50)
    assert huge.rank == 256


def test_time_is_measured_on_a_layer():
    model = geometry(num_hidden_layers=5)
    for _ in range(5):
        with contextlib.suppress(RuntimeError):  # when others keep the machine busy
            timing, workspace = plan.measure_time(model, config(), 1 << 33)
            break
    assert timing.measured_experts == model.num_experts
    assert timing.step == pytest.approx(timing.rest + 5 * timing.layer)
    assert timing.step > 0
    assert workspace > 0


def test_a_busy_machine_gives_an_error_rather_than_nonsense(monkeypatch):
    times = iter([0.2, 0.1, 0.3, 0.1, 0.15, 0.4])
    monkeypatch.setattr(plan, "_time_steps", lambda *_: next(times))
    with pytest.raises(RuntimeError, match="too busy to measure"):
        plan.measure_time(geometry(), config(), 1 << 33)
    timing, _ = plan.measure_time(geometry(num_hidden_layers=10), config(), 1 << 33)
    assert timing.layer == pytest.approx(0.05)
    assert timing.rest == pytest.approx(0.35)
    assert timing.step == pytest.approx(0.85)


def test_a_layer_that_is_too_large_is_measured_in_part():
    model = geometry()
    need = 4 * 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts
    half, rows, share = plan._measurable(model, config(), int(need / 0.4 * 0.6))
    assert (half.num_experts, rows, share) == (model.num_experts // 2, 1, 0.5)
    with pytest.raises(ValueError, match=r"too much of the 0\.0 GiB"):
        plan._measurable(model, config(), 1000)


def test_command(capsys, monkeypatch):
    largest = plan.Largest(64, 9, 208)
    monkeypatch.setattr(plan, "find_largest", lambda *_: largest)
    monkeypatch.setattr(plan, "step_bytes", lambda *_: 1 << 20)
    timing = plan.Timing(0.5, 0.1, 0.2, 8)
    monkeypatch.setattr(plan, "measure_time", lambda *_: (timing, 1 << 20))
    screen = io.StringIO()
    run_plan(
        PlanConfig(DEMO, batch_size=2, sequence_length=64, memory=8.0),
        Console(file=screen, width=120),
    )
    text = screen.getvalue()
    for words in (
        "3 layers, 8 experts, 2 per token; bf16, rank 16, 2 x 64 tokens",
        "experts, frozen",
        "in all",
        "fits into 8.0 GiB",
        "largest rank 64, or batch size 9, or sequence length 208",
        "0.50 s, 256 tokens/s: 0.100 s a layer, 0.200 s the rest",
    ):
        assert words in text


def test_only_config_json_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "step_bytes", lambda *_: 1 << 20)
    raw = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    quick = ["--no-search", "--no-measure", "--memory", "0.001"]
    assert cli.main(["plan", str(tmp_path), *quick]) == 0
    out = capsys.readouterr().out
    assert "does not fit into 0.0 GiB" in out
    assert "largest" not in out
    assert "tokens/s" not in out
    assert cli.main(["plan", str(tmp_path), "--experts", "auto", *quick]) == 2
    assert "expected one of ['bf16'" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path), "--targets", "gate", *quick]) == 2
    assert "'gate' fits model.layers.0.mlp.gate" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "none"), *quick]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
