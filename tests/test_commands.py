"""export, merge and inspect from the command line, on the demo model."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import make_adapter, make_lora

from ktjax import assets, cli
from ktjax.config import LoRAConfig
from ktjax.io import (
    Adapter,
    AdapterError,
    Checkpoint,
    read_adapter,
    save_file,
    write_adapter,
)
from ktjax.lora import LoRA
from ktjax.models import apply_adapter, extract_adapter, from_pretrained
from ktjax.train import checkpoint
from ktjax.train.adapters import read_run, read_run_or_adapter

# The demo model's geometry.
SIZES = {"experts": 8, "hidden": 128, "width": 64, "rank": 4}
DEMO = str(assets.demo_model())


def demo_adapter(seed=0, scale=0.1):
    layers = {}
    for index in range(3):
        lora = make_lora(seed + index, **SIZES)
        layers[index] = LoRA(*(np.float32(scale) * array for array in lora.arrays()))
    return Adapter(4, 6.0, layers, DEMO)


def write_run(path, adapter, step=7, model=DEMO):
    """A training's output directory, as far as the adapter goes."""
    tree = {
        f"layers.{index}.mlp.experts.{name}.value": array
        for index, lora in adapter.layers.items()
        for name, array in zip(lora.NAMES, lora.arrays(), strict=True)
    }
    config = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    meta = {"model": model, "config": config}
    checkpoint.save_checkpoint(path / "checkpoints", step, {"lora": tree}, meta, 9)
    return path


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def load(**kwargs):
    return from_pretrained(DEMO, experts="reference", dtype="float32", **kwargs)


def logits(model):
    return np.asarray(model(jnp.arange(24).reshape(2, 12)))


def test_export_of_a_run_and_of_an_adapter(tmp_path, capsys):
    adapter = demo_adapter()
    source = write_run(tmp_path / "run", demo_adapter(5), step=3)
    write_run(source, adapter)
    code, out, _ = run(capsys, "export", source, tmp_path / "a")
    assert (code, "read again: the same bits" in out) == (0, True)
    assert list(read_adapter(tmp_path / "a").differences(adapter)) == []
    arguments = ("export", tmp_path / "a", tmp_path / "b", "--layout", "peft-fused")
    code, out, _ = run(capsys, *arguments)
    assert (code, "(peft-fused)" in out) == (0, True)
    assert list(read_adapter(tmp_path / "b").differences(adapter)) == []
    code, _, err = run(capsys, *arguments)
    assert (code, "exists already" in err) == (2, True)


def test_export_needs_the_base_model(tmp_path, capsys):
    source = write_run(tmp_path / "run", demo_adapter(), model="/moved/away")
    code, _, err = run(capsys, "export", source, tmp_path / "a")
    assert (code, "'/moved/away' has no readable config.json" in err) == (2, True)
    assert run(capsys, "export", source, tmp_path / "a", "--model", DEMO)[0] == 0
    assert read_adapter(tmp_path / "a").base_model == DEMO


def test_merged_model_computes_what_the_adapter_does(tmp_path, capsys):
    """In float32, where merging rounds no more than the adapter's own products do."""
    adapter, model = demo_adapter(), tmp_path / "model"
    shutil.copytree(DEMO, model)
    tensors = Checkpoint(DEMO)
    wide = {name: tensors[name].astype(np.float32) for name in tensors}
    save_file(model / "model.safetensors", wide)
    write_adapter(tmp_path / "a", adapter, "qwen3_moe")
    code, out, _ = run(capsys, "merge", model, tmp_path / "a", tmp_path / "m")
    assert (code, "experts of layers 0-2" in out) == (0, True)
    tuned = load(lora=LoRAConfig(4, 6.0))
    base = logits(tuned)
    apply_adapter(tuned, adapter)
    want = logits(tuned)
    got = logits(from_pretrained(tmp_path / "m", experts="reference", dtype="float32"))
    assert np.linalg.norm(want - base) > 0.1 * np.linalg.norm(base)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_inspect(tmp_path, capsys):
    source = write_run(tmp_path / "run", demo_adapter())
    run(capsys, "export", source, tmp_path / "a")
    for path, words in (
        (source, ("step-00000007", "rank 4", "alpha 6", "float32", DEMO)),
        (
            tmp_path / "a",
            ("layout peft", "rank 4", "scaling 1.5", "in layers 0-2", "targets", DEMO),
        ),
        (DEMO, ("family qwen3_moe", "layers 3", "experts 8", "bfloat16", "in 1 files")),
        (f"{DEMO}/model.safetensors", ("experts in layers 0-2", "routed experts 1.1 ")),
    ):
        code, out, _ = run(capsys, "inspect", path)
        assert code == 0
        for word in words:
            assert word in out.replace(" ", "") or word in out, (word, out)


def test_inspect_of_a_quantised_checkpoint(tmp_path, capsys):
    expert = "model.layers.1.mlp.experts.0.up_proj"
    tensors = {
        f"{expert}.weight_packed": np.zeros((4, 4), np.int32),
        f"{expert}.weight_scale": np.zeros((4, 1), np.float16),
        "model.norm.weight": np.ones(4, np.float32),
    }
    save_file(tmp_path / "model.safetensors", tensors)
    config = {
        "model_type": "deepseek_v3",
        "n_routed_experts": 1,
        "quantization_config": {"quant_method": "compressed-tensors"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0
    for words in (
        "quantised compressed-tensors",
        "experts in layers 1",
        "routed experts 72 B, int32, float16",
        "the rest 16 B, float32",
    ):
        assert words in out


def test_inspect_reads_no_data(tmp_path, capsys):
    """NaN is an error for those who use an adapter, not for those who look at it."""
    write_adapter(tmp_path / "a", make_adapter(), "qwen3_moe")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    weights.write_bytes(content)
    assert run(capsys, "inspect", tmp_path / "a")[0] == 0
    with pytest.raises(AdapterError, match="has a NaN"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "/no/where"], "/no/where: no such file or directory"),
        (["export", "/no/where", "x"], "/no/where: no such directory"),
        (["merge", "/no/where", "/no/where", "x"], "/no/where: no such directory"),
        (["generate", "--adapter", "/no/where", "hi"], "/no/where: no such directory"),
        (
            ["generate", "--adapter", "a", "--run", "b", "hi"],
            "run or adapter, not both",
        ),
    ],
)
def test_errors_are_one_line(capsys, arguments, words):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_runs_are_checked(tmp_path):
    adapter = demo_adapter()
    path = write_run(tmp_path / "run", adapter)
    assert list(read_run(path).differences(adapter)) == []
    assert list(read_run_or_adapter(path).differences(adapter)) == []
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        read_run(tmp_path)
    file = path / "checkpoints" / "step-00000007" / "lora.safetensors"
    save_file(file, {"layers.0.attention.q_proj.value": np.ones(3, np.float32)})
    with pytest.raises(AdapterError, match=r"q_proj\.value is no adapter of routed"):
        read_run(path)
    save_file(file, {"layers.0.mlp.experts.gate_a.value": np.ones(3, np.float32)})
    with pytest.raises(AdapterError, match="gate_b of layer 0 is missing"):
        read_run(path)
    meta = file.with_name("meta.json")
    meta.write_text(json.dumps({"step": 7}))
    write_run(path, adapter, step=8)
    (path / "checkpoints" / "step-00000008" / "meta.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="has no 'config'"):
        read_run(path)


def test_runs_know_their_familys_names(tmp_path):
    """What checkpoints call modules becomes what the model's files call them."""
    tree = {
        f"{path}.lora_{side}.value": np.ones(shape, np.float32)
        for path in ("layers.1.mlp.shared_experts.up_proj", "layers.0.attention.q_proj")
        for side, shape in (("a", (3, 5)), ("b", (4, 3)))
    }
    config = {"lora_rank": 2, "lora_alpha": 6.0, "targets": "q_proj,.*up_proj"}
    config["rank_pattern"] = {r"shared_expert\.up_proj|q_proj": 3}
    meta = {"model": DEMO, "config": config, "model_type": "qwen2_moe"}
    checkpoint.save_checkpoint(tmp_path / "checkpoints", 1, {"lora": tree}, meta, 9)
    adapter = read_run(tmp_path)
    assert adapter.projections.keys() == {
        "model.layers.1.mlp.shared_expert.up_proj",
        "model.layers.0.self_attn.q_proj",
    }
    assert (adapter.rank, adapter.alpha, adapter.strengths) == (3, 6.0, {})


def test_adapters_into_and_out_of_a_model():
    adapter = demo_adapter()
    model = load(lora=LoRAConfig(4, 6.0))
    apply_adapter(model, adapter)
    assert list(extract_adapter(model, DEMO).differences(adapter)) == []
    fewer = {index: adapter.layers[index] for index in (0, 1)}
    with pytest.raises(
        AdapterError, match="the adapter has no adapters in layer 2; load the model"
    ):
        apply_adapter(model, dataclasses.replace(adapter, layers=fewer))
    more = {**adapter.layers, 7: adapter.layers[0]}
    with pytest.raises(AdapterError, match="layers 0-2, 7, the model has experts in 0"):
        apply_adapter(model, dataclasses.replace(adapter, layers=more))
    with pytest.raises(AdapterError, match=r"this one has 2 and 4 in layer 0; load"):
        apply_adapter(model, dataclasses.replace(adapter, alpha=8.0))
    wider = {**adapter.layers, 2: make_lora(**{**SIZES, "width": 96})}
    with pytest.raises(AdapterError, match=r"gate_b of layer 2 is \[8, 96, 4\], the m"):
        apply_adapter(model, dataclasses.replace(adapter, layers=wider))
    # Nothing of what was refused is left.
    assert list(extract_adapter(model).differences(adapter)) == []
    with pytest.raises(AdapterError, match="load it with a LoRA configuration"):
        extract_adapter(load())
