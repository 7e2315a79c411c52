"""The embedded demo: its checkpoint, its data, and a few steps of the real thing."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ktjax import assets, cli
from ktjax.config import LoRAConfig
from ktjax.io.adapters import AdapterError
from ktjax.models import Tokenizer, from_pretrained
from ktjax.train import (
    Batcher,
    TrainConfig,
    demo,
    make_eval_step,
    read_chats,
    read_config_file,
    run_training,
    split_model,
    tokenize,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_demo_data
import make_demo_model

# Enough steps to see the adapters learn, few enough to be quick.
QUICK = {"steps": 4, "warmup_steps": 1, "eval_every": 0, "answers": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(assets.demo_model())


@pytest.fixture(scope="module")
def model():
    return from_pretrained(
        assets.demo_model(),
        experts="reference",
        dtype="float32",
        lora=LoRAConfig(4, 8.0),
    )


@pytest.fixture(scope="module")
def examples(tokenizer):
    chats = read_chats(assets.demo_data("eval"))[:24]
    return tokenize(chats, tokenizer, 128)


def read_params(shape):
    """The shipped checkpoint as the parameters of scripts/make_demo_model.py."""
    model = from_pretrained(assets.demo_model(), experts="reference", dtype="float32")
    layers = []
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        names = {name: getattr(attention, f"{name}_proj").kernel for name in "qkvo"}
        layers.append(
            {
                "norm1": layer.input_norm.scale[...],
                "norm2": layer.post_attention_norm.scale[...],
                "q_norm": attention.q_norm.scale[...],
                "k_norm": attention.k_norm.scale[...],
                "router": mlp.router.gate.kernel[...].T,
                **{name: kernel[...].T for name, kernel in names.items()},
                **{n: getattr(mlp.experts, n)[...] for n in ("gate", "up", "down")},
            }
        )
    return {
        "embed": model.embed.embedding[...],
        "head": model.head.kernel[...].T,
        "norm": model.norm.scale[...],
        "layers": layers,
    }


def logits_of(model, ids):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)


def test_script_and_models_compute_the_same_logits(model, examples):
    shape = make_demo_model.SIZES
    params = jax.tree.map(jnp.float32, read_params(shape))
    ids = np.zeros((4, 24), np.int32)
    for row, example in enumerate(examples[:4]):
        length = min(24, len(example))
        ids[row, :length] = example.ids[:length]
    logits, _ = make_demo_model.forward(shape, params, ids)
    np.testing.assert_allclose(logits_of(model, ids), logits, rtol=0, atol=1e-4)


def test_checkpoint_is_what_the_script_writes(tmp_path):
    shape, chars = make_demo_model.SIZES, make_demo_model.make_tokenizer()
    params = make_demo_model.init_params(shape, jax.random.key(0))
    make_demo_model.save_model(shape, params, chars, tmp_path)
    shipped = {path.name: path for path in assets.demo_model().iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == shipped.keys()
    for name, path in shipped.items():
        if name.endswith(".json"):
            assert path.read_text() == (tmp_path / name).read_text()
    assert sum(path.stat().st_size for path in shipped.values()) < 8_000_000


def test_data_is_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", "--out", str(tmp_path)])
    make_demo_data.main()
    for split in ("train", "eval"):
        path = assets.demo_data(split)
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_chats_learn_only_the_answer(tokenizer):
    chat = read_chats(assets.demo_data("eval"))[0]
    (example,) = tokenize([chat], tokenizer, 128)
    learnt = tokenizer.decode(example.ids[example.learn], skip_special_tokens=False)
    assert learnt == chat.answer + "<|end|>"


def total_loss(model, batches):
    split = split_model(model)
    step = make_eval_step(split.graph)
    parts = [step(split.lora, split.random, split.frozen, batch) for batch in batches]
    return sum(float(p.loss) for p in parts), sum(float(p.parts) for p in parts)


def test_packed_chats_do_not_see_each_other(model, examples):
    packed = total_loss(model, Batcher("pack", 4, 96, 1).once(examples))
    padded = total_loss(model, Batcher("pad", 8, 96, 48).once(examples))
    assert packed[1] == padded[1] == sum(e.learn.sum() for e in examples)
    # Float32 sums of some 200 losses, in another order and from other matrix shapes.
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)


def test_other_logits_end_the_demo(tmp_path, monkeypatch, model):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(demo, "read_run", lambda out: None)
    monkeypatch.setattr(demo, "write_adapter", lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "merge_checkpoint", lambda *args: None)
    ours = demo._logits(model, np.arange(24)[None])
    said = []

    def finish(off, incomparable=""):
        monkeypatch.setattr(demo, "_logits_of_torch", lambda *args: ours * (1 + off))
        demo.finish_demo(
            model, Path("base"), tmp_path, said.append, incomparable=incomparable
        )

    finish(1e-4)
    assert "PEFT with the adapter, 1e-04" in said[-1]
    message = r"adapter: the logits of PEFT .* differ .* by (5|nan).* at most 1e-03"
    for off in (0.05, float("nan")):
        with pytest.raises(AdapterError, match=message):
            finish(off)
    finish(0.05, "the base is quantised")
    assert said[-1].endswith("transformers: the base is quantised")

    def fail(*args):
        raise ImportError("too old")

    monkeypatch.setattr(demo, "_logits_of_torch", fail)
    demo.finish_demo(model, Path("base"), tmp_path, said.append)
    assert said[-1] == "not compared with PEFT with the adapter: ImportError: too old"


def test_demo_trains_resumes_and_generates(tmp_path, capsys, model):
    console = Console(file=io.StringIO(), width=100)
    out = tmp_path / "run"
    result = run_training(TrainConfig(output_dir=out, **QUICK), console)
    assert result.fit.step == 4
    assert result.fit.losses[-1] < 0.9 * result.fit.losses[0]
    assert len(result.before) == len(result.after) == 8
    cipher = [a.right for a in result.before if a.chat.group == "cipher"]
    others = [a.right for a in result.before if a.chat.group != "cipher"]
    assert not any(cipher)
    assert all(others)
    text = console.file.getvalue()
    for words in ("exact match on the evaluation set", "cipher", "some answers"):
        assert words in text
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert "eval_loss" in lines[-1]
    # The tuned experts change what later routers see.
    assert 0 < lines[-1]["router_drift"] < 1
    assert 1 <= lines[0]["router_load_max"] <= 8 / 2
    assert 0 < lines[0]["router_entropy"] <= 1
    settings = read_config_file(out / "config.yaml", TrainConfig)
    assert TrainConfig(**settings) == TrainConfig(output_dir=out, **QUICK)
    words = ("trained", "adapters of the experts, 3 layers", "frozen", "loss  ")
    assert all(word in text for word in words)
    peers = all(map(importlib.util.find_spec, ("torch", "transformers", "peft")))
    assert ("logits differ by, of the largest: PEFT" in text) == peers
    assert ("not compared with PEFT and transformers" in text) != peers
    merged = from_pretrained(out / "merged", experts="reference", dtype="float32")
    ids = jnp.arange(12).reshape(2, 6)
    assert np.abs(logits_of(merged, ids) - logits_of(model, ids)).max() > 0

    assert cli.main(["generate", "--run", str(out), "copy: fox"]) == 0
    trained = capsys.readouterr().out.strip()
    assert trained
    assert cli.main(["generate", "reverse: fox"]) == 0
    assert capsys.readouterr().out == "xof\n"


def test_generate_uses_the_adapters_of_the_run(tmp_path, capsys):
    """Adapters far from zero must change what the model says."""
    settings = {**QUICK, "learning_rate": 0.05, "answers": 0}
    run_training(
        TrainConfig(output_dir=tmp_path, **settings), Console(file=io.StringIO())
    )
    base = cli.main(["generate", "copy: foxglove"]), capsys.readouterr().out
    answers = []
    # The run exported its adapter, in PEFT's format.
    for flags in (["--run", str(tmp_path)], ["--adapter", str(tmp_path / "adapter")]):
        assert cli.main(["generate", *flags, "copy: foxglove"]) == 0
        answers.append(capsys.readouterr().out)
    assert base == (0, "foxglove\n")
    assert answers[0] == answers[1] != base[1]


def test_zero_adapters_are_the_base_model(model):
    leaves = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert len(leaves) == 18
    base = from_pretrained(assets.demo_model(), experts="reference", dtype="float32")
    ids = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(base, ids))
