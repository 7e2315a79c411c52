"""Trainings of more than the experts: runs, resuming, commands, preferences."""

import dataclasses
import io
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ktjax import assets
from ktjax.commands import GenerateConfig
from ktjax.commands.generate import open_model
from ktjax.config import LoRAConfig
from ktjax.io import AdapterError, read_adapter
from ktjax.io.safetensors import SafetensorsFile
from ktjax.models import extract_adapter, from_pretrained
from ktjax.models.targets import adapted
from ktjax.nn import FrozenLinear
from ktjax.train import TrainConfig, TrainingError, read_run, run_training
from ktjax.train.trainable import parts_of

TARGETS = "experts, q_proj,layers\\.0\\.self_attn\\.o_proj,lm_head"
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
NAMES += ["model.layers.0.self_attn.o_proj", "lm_head"]
OPTIONS = {
    "targets": TARGETS,
    "dense": "int8",
    "lora_rank": 4,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.experts": 6},
    "rslora": True,
    **{"steps": 3, "warmup_steps": 0, "batch_size": 2, "answers": 0},
    **{"eval_every": 0, "eval_split": 0.5},
    **{"checkpoint_every": 1, "keep_checkpoints": 9},
}


def train(path, **changes):
    """What the run says."""
    console = Console(file=io.StringIO(), width=120)
    run_training(TrainConfig(output_dir=path, **{**OPTIONS, **changes}), console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def said_and_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    return train(path), path


@pytest.fixture(scope="module")
def run(said_and_run):
    return said_and_run[1]


def bits(path, step):
    """Every tensor of a checkpoint, by file and name."""
    found = {}
    for name in ("lora", "optimizer", "random"):
        at = path / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors"
        file = SafetensorsFile(at)
        found |= {(name, key): file[key].tobytes() for key in file.entries}
    return found


def test_a_run_says_what_it_trains(said_and_run):
    said, path = said_and_run
    # 6 at the experts of one layer, 4 and 2.
    assert "LoRA of rank 6, 4, 2 on the experts, lm_head, o_proj, q_proj" in said
    for kind in ("adapters of q_proj (attention), 3 layers", "adapters of the experts"):
        assert kind in said
    adapter = read_run(path)
    assert adapter.projections.keys() == set(NAMES)
    assert adapter.layers.keys() == {0, 1, 2}
    assert adapter.strength(1).rank == 6
    assert adapter.strength(1).scaling == pytest.approx(32 / 6**0.5)
    assert adapter.strength(NAMES[0]).scaling == pytest.approx(32 / 2**0.5)
    for name, lora in adapter.projections.items():
        assert np.abs(lora.b).max() > 1e-4, name  # it started at zero
    # The demo exports what it trained.
    assert list(read_adapter(path / "adapter").differences(adapter)) == []


def test_resuming_is_bit_exact(run, tmp_path):
    path = tmp_path / "cut"
    shutil.copytree(run, path)
    shutil.rmtree(path / "checkpoints" / "step-00000003")
    with pytest.raises(TrainingError, match=r"made with targets = .*, now .*,v_proj"):
        train(path, resume=True, targets=f"{TARGETS},v_proj")
    with pytest.raises(TrainingError, match="made with dense = int8, now it is None"):
        train(path, resume=True, dense=None)
    train(path, resume=True)
    assert bits(path, 3) == bits(run, 3)
    assert bits(path, 2) != bits(run, 3)
    names = {name for file, name in bits(run, 3) if file == "lora"}
    assert "layers.0.attention.q_proj.lora_a.value" in names
    assert len(names) == 3 * 6 + 2 * len(NAMES)


def test_answers_come_from_the_run_and_from_its_export(run):
    want = read_run(run)
    for options, dense in (
        ({"run": run}, "int8"),
        ({"run": run, "dense": "bf16"}, "bf16"),
        ({"adapter": run / "adapter"}, None),
    ):
        with open_model(GenerateConfig(prompt="x", **options)) as (model, _):
            found = extract_adapter(model, want.base_model)
            assert list(found.differences(want)) == []
            stored = adapted(model)[NAMES[0]]
            assert isinstance(stored, FrozenLinear) == (dense is not None)
            assert dense in (None, stored.store.format if dense else None)


def test_preferences_against_an_adapter_that_the_training_starts_from(run, tmp_path):
    """The reference has the start's adapters, all of them: so the loss is ln 2."""
    rows = [{"prompt": "copy: a", "chosen": "a", "rejected": "b"}] * 4
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"init_adapter": run, "objective": "dpo", "train_data": data}
    with pytest.raises(AdapterError, match=r"q_proj \(3\).*options say targets = exp"):
        train(tmp_path / "x", **options, targets="experts", rank_pattern={})
    with pytest.raises(AdapterError, match=r"rank 2 and .*q_proj, the options say 4"):
        train(tmp_path / "x", **options, rank_pattern={r"layers\.1\.mlp\.experts": 6})
    train(tmp_path / "dpo", **options, steps=1)
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").open().readline())
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["grad_norm"] > 0
    (difference, *_) = read_run(tmp_path / "dpo").differences(read_run(run))
    assert difference


def test_the_report_counts_every_adapter():
    lora = LoRAConfig(4, targets=("q_proj", "v_proj", "lm_head"))
    model = from_pretrained(
        assets.demo_model(), experts="reference", dtype="float32", lora=lora
    )
    parts = [dataclasses.astuple(part)[:3] for part in parts_of(model) if part.trained]
    size = {name: m.lora_a.size + m.lora_b.size for name, m in adapted(model).items()}
    q, v = (3 * size[f"model.layers.0.self_attn.{n}_proj"] for n in "qv")
    assert {name: count for name, _, count in parts} == {
        "adapters of q_proj (attention)": q,
        "adapters of v_proj (attention)": v,
        "adapters of head (output head)": size["lm_head"],
    }
    everything = jax.tree.leaves(nnx.state(model))
    assert sum(part.parameters for part in parts_of(model)) == sum(
        leaf.size for leaf in everything
    )
