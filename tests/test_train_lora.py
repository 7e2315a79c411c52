"""Options of the adapters: rsLoRA, ranks by layer, what is trained and must be."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ktjax import assets
from ktjax.config import LoRAConfig
from ktjax.io.adapters import Strength
from ktjax.models import apply_adapter, extract_adapter, from_pretrained
from ktjax.train import TrainConfig, read_run, run_training
from ktjax.train.trainable import (
    FrozenTargetError,
    check_targets,
    parts_of,
    parts_table,
)

EXPERTS, HIDDEN, WIDTH, LAYERS = 8, 128, 64, 3
PATTERN = {r"layers\.0\..*": 2, r"layers\.[01]\.mlp\.experts": 8}


def load(lora, **kwargs):
    return from_pretrained(
        assets.demo_model(), experts="reference", dtype="float32", lora=lora, **kwargs
    )


@pytest.fixture(scope="module")
def model():
    return load(LoRAConfig(4, 8.0))


def test_patterns_and_scalings():
    config = LoRAConfig(4, 8.0, rank_pattern=PATTERN, alpha_pattern={"experts": 2.0})
    names = [f"layers.{index}.mlp.experts" for index in range(3)]
    # The first that fits counts; a pattern may fit the end of a name.
    assert [config.of_module(name).rank for name in names] == [2, 8, 4]
    assert [config.of_module(name).scaling for name in names] == [1.0, 0.25, 0.5]
    assert config.of_module("lm_head").scaling == config.scaling == 2.0
    assert dataclasses.replace(config, rslora=True).of_module(names[1]).scaling == (
        pytest.approx(2.0 / 8**0.5)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"x": 0}}, r"rank_pattern\['x'\] must be positive, got 0"),
        ({"rank_pattern": {"x": 257}}, r"rank_pattern\['x'\] must be at most 256"),
        ({"alpha_pattern": {"x": -1.0}}, r"alpha_pattern\['x'\] must be positive"),
        ({"dropout": 1.0}, r"lora_dropout must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_what_a_configuration_cannot_say(changes, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**changes)
    renamed = {"lora_dropout" if k == "dropout" else k: v for k, v in changes.items()}
    if "alpha_pattern" not in renamed:
        with pytest.raises(ValueError, match=rf"TrainConfig: {words}"):
            TrainConfig(**renamed)


def test_layers_have_the_ranks_of_the_pattern():
    model = load(LoRAConfig(4, 8.0, rslora=True, rank_pattern=PATTERN))
    experts = [layer.experts for _, layer in model.moe_layers()]
    for layer, rank in zip(experts, (2, 8, 4), strict=True):
        assert layer.gate_a.shape == (EXPERTS, rank, HIDDEN)
        assert layer.down_b.shape == (EXPERTS, HIDDEN, rank)
        assert layer.scaling == pytest.approx(8.0 / rank**0.5)
    adapter = extract_adapter(model)
    assert [adapter.strength(i).rank for i in range(3)] == [2, 8, 4]
    other = load(adapter.lora_config())
    apply_adapter(other, adapter)
    assert list(extract_adapter(other).differences(adapter)) == []
    with pytest.raises(
        ValueError, match=r"'layers\\\.9' fits no module.*layers\.0\.mlp"
    ):
        load(LoRAConfig(rank_pattern={r"layers\.9": 4}))


def test_a_training_with_ranks_by_layer_is_exported_and_continued(tmp_path):
    options = {"lora_rank": 4, "rank_pattern": PATTERN, "rslora": True}
    options |= {"steps": 2, "warmup_steps": 0, "eval_every": 0, "answers": 0}
    console = Console(file=io.StringIO(), width=100)
    run_training(TrainConfig(output_dir=tmp_path / "a", **options), console)
    adapter = read_run(tmp_path / "a")
    ranks = [adapter.strength(index).rank for index in range(LAYERS)]
    assert ranks == [2, 8, 4]
    assert adapter.strength(1).scaling == pytest.approx(32 / 8**0.5)
    assert "LoRA of rank 8, 4, 2 on the experts" in console.file.getvalue()
    # Another training starts where this one ended; PEFT's format keeps the strengths.
    start = {"init_adapter": tmp_path / "a" / "adapter", "learning_rate": 1e-12}
    config = TrainConfig(output_dir=tmp_path / "b", **options, **start)
    run_training(config, console)
    one = {i: lora.gate_b for i, lora in adapter.layers.items()}
    two = {i: lora.gate_b for i, lora in read_run(tmp_path / "b").layers.items()}
    for index in one:
        assert np.abs(one[index]).max() > 1e-3
        np.testing.assert_allclose(two[index], one[index], rtol=0, atol=1e-9)
    wrong = {**options, **start, "rank_pattern": {}, "rslora": False}
    config = TrainConfig(output_dir=tmp_path / "c", **wrong)
    with pytest.raises(ValueError, match=r"rank 2 and scaling .* in layer 0.*say 4"):
        run_training(config, console)


def test_the_report_counts_every_parameter(model):
    parts = {part.name: part for part in parts_of(model)}
    adapters = parts["adapters of the experts"]
    assert adapters.trained
    assert adapters.layers == LAYERS
    assert adapters.parameters == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    )
    assert parts["routed experts"].parameters == LAYERS * 3 * EXPERTS * HIDDEN * WIDTH
    assert parts["routers"].parameters == LAYERS * EXPERTS * HIDDEN
    assert [part.name for part in parts.values() if part.trained] == [adapters.name]
    everything = jax.tree.leaves(nnx.state(model))
    assert sum(part.parameters for part in parts.values()) == sum(
        leaf.size for leaf in everything
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(parts_table(parts_of(model)))
    first = console.file.getvalue().splitlines()[0].split()
    assert first[:2] == ["trained", f"{adapters.parameters:,}"]


def test_the_report_counts_experts_in_stores():
    model = from_pretrained(assets.demo_model(), experts="int4", lora=LoRAConfig(4))
    try:
        (part,) = (p for p in parts_of(model) if p.name == "routed experts (int4)")
        assert part.parameters == LAYERS * 3 * EXPERTS * HIDDEN * WIDTH
        stores = [layer.experts.store for _, layer in model.moe_layers()]
        assert part.size == sum(store.nbytes for store in stores)
    finally:
        model.close()


def test_targets_that_would_stay_frozen(model):
    check_targets(model, "experts")
    check_targets(model, r"layers\.0\.mlp\.experts, layers\.2\.mlp\.experts")
    with pytest.raises(
        FrozenTargetError, match=r"'q_proj' fits layers\.0\.attention\."
    ):
        check_targets(model, "experts,q_proj")
    with pytest.raises(FrozenTargetError, match="'expert' fits no module of this mode"):
        check_targets(model, "expert")
    base = load(None)
    with pytest.raises(FrozenTargetError, match="trained in none only"):
        check_targets(base, "experts")


def test_strength_of_rslora_is_that_of_lora():
    assert Strength(4, 8.0 * 4**0.5).scaling == LoRAConfig(4, 8.0, True).scaling
