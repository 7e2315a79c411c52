"""ktjax plan against what then happens."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from rich.console import Console
from train_standin import make_config

from ktjax import assets, cli
from ktjax.commands import PlanConfig, run_plan
from ktjax.models import ModelConfig, from_pretrained
from ktjax.models.targets import experts_name
from ktjax.nn import FrozenLinear
from ktjax.store_linear import LinearGeometry
from ktjax.train import plan, plan_program, plan_time, split_model
from ktjax.train.optimizer import make_optimizer
from ktjax.train.plan_adapters import layer_adapters
from ktjax.train.step import init_state

DEMO = assets.demo_model()
ROOT = Path(__file__).parents[1]


def geometry(**changes):
    return dataclasses.replace(ModelConfig.from_pretrained(DEMO), **changes)


def config(**changes):
    return make_config(batch_size=2, sequence_length=64, lora_rank=4, **changes)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def linear_stores(model):
    modules = (module for _, module in nnx.iter_graph(model))
    return [part.store for part in modules if isinstance(part, FrozenLinear)]


@pytest.mark.parametrize(
    ("experts", "dense", "targets"),
    [
        ("bf16", None, "experts"),
        ("int4", "int8", "experts,q_proj,lm_head"),
        ("int8", "xla", "experts,.*self_attn.*_proj"),
        ("int8", None, r"layers\.[12]\.mlp\.experts,layers.0.self_attn.v_proj"),
    ],
)
def test_parts_are_what_a_loaded_model_has(experts, dense, targets, monkeypatch):
    monkeypatch.setattr(plan, "fit_step", lambda *_: step_model())
    monkeypatch.setattr(plan, "resident_memory", lambda: 100)
    pattern = {r"layers\.1\..*": 8}
    options = config(
        experts=experts,
        dense=dense,
        targets=targets,
        rank_pattern=pattern,
        moment_dtype="bfloat16",
    )
    memory = plan.plan_memory(geometry(), options).memory()
    model = from_pretrained(
        DEMO, experts=experts, dense=dense, dtype="float32", lora=options.lora
    )
    try:
        split = split_model(model)
        state = init_state(split, make_optimizer(options))
        stores = [layer.experts.store for _, layer in model.moe_layers()]
        assert memory.stores == sum(store.nbytes for store in stores)
        linear = sum(store.nbytes for store in linear_stores(model))
        assert (linear > 0) == (dense == "int8")  # the demo's matrices are small
        assert memory.dense == size(split.frozen) + linear
        assert memory.adapters == size(state.lora)
        assert memory.optimizer == size(state.optimizer)
    finally:
        model.close()
    assert memory.total == sum(dataclasses.astuple(memory))


def test_bytes_of_a_large_projection_follow_from_small_ones():
    for format in ("bf16", "int8", "int4"):
        kind = LinearGeometry(format, 1000, 256)
        with contextlib.closing(plan_program.random_linear(kind)) as store:
            assert plan_program._linear_bytes(kind) == pytest.approx(
                store.nbytes,
                rel=0.03,  # outputs are padded to whole panels
            )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        # The logits are most of it in a shallow model, what is kept in a deep one.
        ({"vocab_size": 20_000}, {"lora_rank": 64}),
        # Gradients are most of it.
        ({"num_experts": 64}, {"remat": True, "lora_rank": 32, "dense": "int8"}),
    ],
)
def test_a_step_of_another_size_follows_from_small_ones(shape, options):
    """XLA's figure for six layers, as planned and larger, against the formula."""
    deep = geometry(num_hidden_layers=6, **shape)
    options = dataclasses.replace(config(), **options)
    formula = plan.fit_step(deep, options)

    def planned(options):
        return formula.bytes(
            plan.Size(options.lora_rank, options.batch_size, options.sequence_length)
        )

    actual = plan_program.compiled_bytes(deep, options)
    assert planned(options) == pytest.approx(actual, rel=0.1)
    larger = dataclasses.replace(options, batch_size=4, sequence_length=128)
    actual = plan_program.compiled_bytes(deep, larger)
    assert planned(larger) == pytest.approx(actual, rel=0.15)


def test_layers_below_the_lowest_with_adapters_keep_nothing():
    """XLA's figure: six layers of which three are trained are like three."""
    three = plan_program.compiled_bytes(geometry(num_hidden_layers=3), config())
    upper = config(targets=r"layers\.[345]\.mlp\.experts")
    six = plan_program.compiled_bytes(geometry(num_hidden_layers=6), upper)
    assert six == pytest.approx(three, rel=0.01)


def step_model(**changes):
    fields = {
        "layers": 4,
        "kept": (1000.0, 2.0),
        "low_rank": 96.0,
        "low_rank_layers": 4,
        "temporary": (5000.0, 40.0, 0.5),
        "logit": 900.0,
        "vocabulary": 128,
        "layer_gradients": 30_000.0,
        "gradients": 120_000.0,
    }
    return plan.StepModel(**{**fields, **changes})


def test_small_models_have_the_adapters_of_the_layer_with_most():
    model = geometry(
        num_hidden_layers=5, dense_layers=(0,), intermediate_size=96, model_type="x"
    )
    targets = r"layers\.[23]\.mlp\.experts,layers\.[1-3]\..*v_proj,layers.0.mlp.up_proj"
    options = config(targets=targets, rank_pattern={r"layers\.3\..*experts": 8})
    found = layer_adapters(model, options)
    assert (found.depth, found.with_experts) == (5, 2)
    hidden, width, experts = 128, model.moe_intermediate_size, model.num_experts
    at_experts = 4 * experts * 3 * (hidden + width)
    values = model.attention.num_key_value_heads * model.attention.head_dim
    at_values = 4 * 4 * (hidden + values)
    assert found.largest == 8 * at_experts + at_values
    dense = 4 * 4 * (hidden + 96)
    assert found.total == 12 * at_experts + 3 * at_values + dense
    lora = found.config.lora
    for layer in range(3):
        assert lora.of_module(experts_name(layer)).rank == 8
        assert lora.adapts(f"model.layers.{layer}.self_attn.v_proj")
        assert not lora.adapts(f"model.layers.{layer}.self_attn.q_proj")
    assert not lora.adapts("lm_head")


@pytest.mark.parametrize(
    ("targets", "depth", "of_experts"),
    [
        ("lm_head", 0, False),
        ("layers.0.mlp.gate_proj", 3, False),  # a dense layer's
        (r"layers\.2\.mlp\.experts", 1, True),
    ],
)
def test_whatever_can_be_trained_can_be_planned(targets, depth, of_experts):
    """The small programs have something to train, though layer 0 has nothing."""
    model = geometry(dense_layers=(0,), intermediate_size=96)
    seen = []

    def compiled(small, options):
        abstract = plan_program.abstract(small, options)  # or nothing is trained
        seen.append(options.lora.adapts(experts_name(0)))
        return plan_program.tree_bytes(abstract[1].lora)

    formula = plan.fit_step(model, config(targets=targets), compiled)
    assert formula.layers == depth
    assert formula.low_rank_layers == int(of_experts)
    assert set(seen) == {of_experts}
    lora = plan_program.abstract(model, config(targets=targets))[1].lora
    assert formula.gradients == pytest.approx(plan_program.tree_bytes(lora) / 4)


def test_the_largest_that_fits_fits_just():
    planned = plan.MemoryPlan(
        plan.Size(4, 2, 64), 5_000_000, 10**6, 1 << 20, 3e5, 6e5, step_model()
    )
    total = planned.memory().total
    for available in (total, 2 * total, 5 * total):
        largest = planned.largest(available)
        for name, value, step in (
            ("batch", largest.batch_size, 1),
            ("length", largest.sequence_length, 16),
            ("rank", largest.rank, 1),
        ):
            size = planned.size._replace(**{name: value})
            assert planned.memory(size).total <= available, name
            if name != "rank" or value < 256:
                size = planned.size._replace(**{name: value + step})
                assert planned.memory(size).total > available, name
    small = planned.largest(planned.stores)
    assert (small.rank, small.batch_size, small.sequence_length) == (0, 0, 0)
    assert planned.largest(1 << 50).rank == 256


def test_a_training_takes_what_was_planned(tmp_path):
    """Time and memory of a small model in processes of their own, machine willing."""
    command = [sys.executable, "-m", "benchmarks.big_model", str(DEMO), "--steps", "5"]
    options = ["--experts", "int4", "--batch-size", "4", "--sequence-length", "128"]
    run = [*command, *options, "--json", str(tmp_path / "found.json")]
    subprocess.run(run, check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    planned, measured = found["planned"], found["measured"]
    for part in ("stores", "dense", "adapters", "gradients"):
        assert planned["parts"][part] == measured["parts"][part], part
    # Two counters of optax, beside the moments.
    assert planned["parts"]["optimizer"] - measured["parts"]["optimizer"] < 64
    assert planned["total"] == pytest.approx(measured["total"], rel=0.1)
    # Neighbours may keep one of the two processes busy: no bound worth the name.
    assert planned["step_seconds"] > 0


def test_time_is_measured_on_a_layer(monkeypatch):
    monkeypatch.setattr(plan_time, "SECONDS", 0.5)
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
    times = iter([[0.2, 0.1, 0.3], [0.1, 0.2, 0.4]])
    monkeypatch.setattr(plan_time, "_prepare", lambda *_: None)
    monkeypatch.setattr(plan_time, "_fastest", lambda _: next(times))
    with pytest.raises(RuntimeError, match="too busy to measure"):
        plan.measure_time(geometry(), config(), 1 << 33)
    timing, _ = plan.measure_time(geometry(num_hidden_layers=10), config(), 1 << 33)
    assert timing.layer == pytest.approx(0.05)
    assert timing.rest == pytest.approx(0.35)
    assert timing.step == pytest.approx(0.85)


def test_a_layer_that_is_too_large_is_measured_in_part():
    model = geometry()
    need = 4 * 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts
    half, rows, share = plan_time.measurable(model, config(), int(need / 0.4 * 0.6))
    assert (half.num_experts, rows, share) == (model.num_experts // 2, 1, 0.5)
    with pytest.raises(ValueError, match=r"too much of the 0\.0 GiB"):
        plan_time.measurable(model, config(), 1000)
    with pytest.raises(ValueError, match="a multiple of 4, not 2, or leave"):
        plan_time.measurable(model, config(), int(need / 0.4 * 0.3))


def test_what_cannot_be_measured_is_said_last(monkeypatch):
    def fail(*_):
        raise RuntimeError("too busy")

    monkeypatch.setattr(plan, "fit_step", lambda *_: step_model())
    monkeypatch.setattr(plan, "measure_time", fail)
    screen = io.StringIO()
    with pytest.raises(RuntimeError, match="too busy"):
        run_plan(PlanConfig(DEMO, memory=8.0), Console(file=screen, width=120))
    assert "largest rank" in screen.getvalue()


def test_command(capsys, monkeypatch):
    largest = plan.Largest(64, 9, 208)
    monkeypatch.setattr(plan.MemoryPlan, "largest", lambda *_: largest)
    monkeypatch.setattr(plan, "fit_step", lambda *_: step_model())
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
    monkeypatch.setattr(plan, "fit_step", lambda *_: step_model())
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
