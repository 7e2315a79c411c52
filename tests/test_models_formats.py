"""Models with quantised experts: quantised on load, or stored so; the command line."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_formats import tensors_of
from closeness import relative
from flax import nnx
from quant_cases import ENCODINGS, encode, encoding_id, options
from rich.console import Console

from ktjax import assets
from ktjax.commands import GenerateConfig, generate, run_generation
from ktjax.io import Checkpoint, load_experts, save_file
from ktjax.models import ConfigError, ModelConfig, from_pretrained
from ktjax.quant import Encoding, decode
from ktjax.train import TrainConfig, run

# The demo's experts are 64 wide.
FITTING = [e for e in ENCODINGS if not (e.spec.group_sizes and e.group_size > 64)]
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 60, (2, 12)))


def load(path, **kwargs):
    return from_pretrained(path, dtype=jnp.float32, **kwargs)


def logits(model):
    return np.asarray(nnx.jit(lambda m, ids: m(ids))(model, IDS))


def stores(model):
    return [layer.experts.store for _, layer in model.moe_layers()]


@pytest.mark.parametrize("encoding", FITTING, ids=encoding_id)
def test_experts_are_quantised_on_load(encoding, capsys):
    kwargs = options(encoding)
    model = load(assets.demo_model(), experts=kwargs.pop("format"), **kwargs)
    checkpoint = Checkpoint(assets.demo_model())
    for (index, _), store in zip(model.moe_layers(), stores(model), strict=True):
        assert store.geometry[0] == encoding.format
        assert store.geometry[4:6] == encoding[1:]
        base = load_experts(checkpoint, index, model.config.num_experts)
        for got, w in zip(store.dequantize(), base, strict=True):
            want = decode(encode(w, encoding), encoding.format)
            np.testing.assert_array_equal(got, want)
    assert np.isfinite(logits(model)).all()
    # A progress bar is for terminals.
    assert capsys.readouterr().err == ""
    model.close()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The demo model in FP8 of 128 x 128 blocks, attention included, as Qwen3's are."""
    path = tmp_path_factory.mktemp("fp8")
    shutil.copytree(assets.demo_model(), path, dirs_exist_ok=True)
    encoding = Encoding.of("fp8_block")
    tensors = {}
    checkpoint = Checkpoint(assets.demo_model())
    for name in checkpoint:
        tensor = checkpoint[name]
        at = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            tensors |= tensors_of(at, encode(tensor, encoding), encoding, 0)
        else:
            tensors[name] = tensor
    save_file(path / "model.safetensors", tensors)
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (path / "config.json").write_text(json.dumps(raw))
    return path


def test_a_quantised_model(quantised, recwarn):
    want = logits(load(quantised, experts="reference"))
    for experts, format in (
        ("auto", "fp8_block"),
        ("fp8_block", "fp8_block"),
        ("bf16", "bf16"),
    ):
        model = load(quantised, experts=experts)
        assert {store.format for store in stores(model)} == {format}
        assert relative(logits(model), want) <= 1e-4
        model.close()
    assert not [w for w in recwarn if "quantised again" in str(w.message)]
    base = logits(load(assets.demo_model(), experts="auto"))
    assert 1e-4 < relative(want, base) < 0.2


def test_a_model_that_is_quantised_again(quantised):
    with pytest.warns(UserWarning, match="stored as fp8_block .* again as int8"):
        model = load(quantised, experts="int8")
    model.close()


def test_compute_policy_of_a_model():
    model = load(assets.demo_model(), experts="int8", compute="int8")
    assert {layer.experts.compute for _, layer in model.moe_layers()} == {"int8"}
    model.close()


def test_bad_arguments():
    path = assets.demo_model()
    with pytest.raises(ValueError, match=r"group_size: expected None for .*'int8'"):
        load(path, experts="int8", group_size=32)
    with pytest.raises(ValueError, match=r"intermediate size: .* 128 .* got 64"):
        load(path, experts="int4_kgroup")
    with pytest.raises(ValueError, match="need a format, got experts='auto'"):
        load(path, experts="auto", group_size=32)
    for experts in ("bf16", "reference"):
        with pytest.raises(ValueError, match=f"compute: 'int8' .* got '{experts}'"):
            load(path, experts=experts, compute="int8")
    with pytest.raises(ValueError, match="layer 0: compute: 'int8' needs"):
        load(path, experts="auto", compute="int8")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "supported values of quant_method: fp8, compressed"),
        ("int4", "quantization_config = 'int4' is not supported"),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            r"weight_block_size must be \[128, 128\], or .*, got \[64, 64\]",
        ),
    ],
)
def test_unread_quantisations(quantization, message):
    raw = json.loads((assets.demo_model() / "config.json").read_text())
    ModelConfig.from_dict({**raw, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**raw, "quantization_config": quantization})


class Loaded(Exception):
    pass


@pytest.fixture
def loads(monkeypatch):
    """Instead of loading a model, note what was asked for and stop."""
    asked = {}

    def fake(path, **kwargs):
        asked.update(kwargs)
        raise Loaded

    for module in (run, generate):
        monkeypatch.setattr(module, "from_pretrained", fake)
    return asked


def test_training_asks_for_the_format(loads, tmp_path):
    config = TrainConfig(
        experts="int4_kgroup", group_size=64, zero_point=True, output_dir=tmp_path
    )
    assert config.trajectory()["group_size"] == 64
    with pytest.raises(Loaded):
        run.run_training(config, Console(quiet=True))
    assert loads["experts"] == "int4_kgroup"
    assert loads["group_size"] == 64
    assert loads["zero_point"] is True


def test_generation_takes_the_run_s_format(loads, monkeypatch, tmp_path):
    trained = {"experts": "int4_kgroup", "group_size": 64, "zero_point": True}
    meta = {
        "model": str(assets.demo_model()),
        "config": {"lora_rank": 4, "lora_alpha": 8.0, **trained},
    }
    monkeypatch.setattr(generate, "run_checkpoint", lambda _: tmp_path)
    monkeypatch.setattr(generate, "_adapter", lambda _: None)
    monkeypatch.setattr(generate.checkpoint, "read_meta", lambda _: meta)
    console = Console(quiet=True)

    def asked(**options):
        with pytest.raises(Loaded):
            run_generation(GenerateConfig("hello", **options), console)
        return {name: loads[name] for name in (*trained, "compute")}

    assert asked(run=tmp_path) == {**trained, "compute": "bf16"}
    given = {"experts": "int4", "group_size": None, "zero_point": False}
    assert asked(run=tmp_path, experts="int4", compute="int8") == {
        **given,
        "compute": "int8",
    }
    assert asked()["experts"] is None  # what from_pretrained takes
    with pytest.raises(ValueError, match="group_size and zero_point need experts"):
        GenerateConfig("hello", group_size=32)
