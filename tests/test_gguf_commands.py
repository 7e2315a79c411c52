"""The commands on the demo model as a GGUF file."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf_models import write_gguf_model
from test_chat import talk

from ktjax import assets, cli
from ktjax.io import read_adapter
from ktjax.models import Tokenizer

DEMO = assets.demo_model()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Experts in Q8_0; tokenizer.json beside it, the chat template within."""
    folder = tmp_path_factory.mktemp("model")
    vocab = json.loads((DEMO / "tokenizer.json").read_text())
    tokens = vocab["model"]["vocab"] | {
        token["content"]: token["id"] for token in vocab["added_tokens"]
    }
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())

    def change(tensors, metadata):
        metadata |= {
            "general.name": "demo",
            "tokenizer.chat_template": settings["chat_template"],
            "tokenizer.ggml.tokens": sorted(tokens, key=tokens.__getitem__),
            "tokenizer.ggml.eos_token_id": tokens[settings["eos_token"]],
        }

    write_gguf_model(DEMO, folder / "demo.gguf", experts="Q8_0", change=change)
    shutil.copyfile(DEMO / "tokenizer.json", folder / "tokenizer.json")
    return folder / "demo.gguf"


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def test_what_it_answers(model, capsys):
    for path in (model, model.parent):
        answer = run(capsys, "generate", "--model", path, "reverse: fox")
        assert answer[:2] == (0, "xof")
    assert talk("copy: fox", model=model) == ["fox\n"]


def test_training_and_its_adapter(model, tmp_path, capsys):
    data = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"say {word}", "completion": "no"} for word in ("yes", "fox")]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "run"
    options = ["--steps", 30, "--warmup-steps", 3, "--lora-rank", 4, "--batch-size", 2]
    options += ["--sequence-length", 32, "--learning-rate", 0.05]
    options += ["--targets", "experts,q_proj,lm_head"]
    where = ["--model", model, "--train-data", data, "--output-dir", out]
    code, text, err = run(capsys, "train", *where, *options)
    assert (code, "rank 4 on the experts" in text) == (0, True), err
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    assert losses[-1] < 0.5 * losses[0]
    # The run knows its base, and that its experts stay in their blocks.
    code, answer, err = run(capsys, "generate", "--run", out, "say yes")
    assert (code, answer) == (0, "no"), err
    assert run(capsys, "export", out, tmp_path / "a")[0] == 0
    assert read_adapter(tmp_path / "a").base_model == str(model)
    answer = run(capsys, "generate", "--adapter", tmp_path / "a", "say yes")
    assert answer[:2] == (0, "no")
    for command in (("merge", model, tmp_path / "a"), ("convert", model)):
        code, _, err = run(capsys, *command, tmp_path / "out")
        assert (code, "safetensors" in err) == (2, True), err


def test_inspect(model, capsys):
    code, out, _ = run(capsys, "inspect", model)
    assert code == 0
    for words in (
        *("name demo", "family qwen3moe", "layers 3", "experts 8", "per token 2"),
        *("experts in layers 0-2", "in 1 files", "KiB, Q8_0", "KiB, F32"),
    ):
        assert words in out, (words, out)


def test_the_tokenizer_has_to_be_beside_it(model, tmp_path):
    ours, theirs = Tokenizer(model), Tokenizer(DEMO)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_id, theirs.vocab_size)
    shutil.copyfile(model, tmp_path / "demo.gguf")
    with pytest.raises(FileNotFoundError, match=r"inside of a GGUF .* put tokenizer.j"):
        Tokenizer(tmp_path / "demo.gguf")
    # What tokenizer_config.json says goes first.
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "tokenizer.json")
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    chat = [{"role": "user", "content": "hello"}]
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == "hello"
    assert tokenizer.eos_id == theirs.eos_id
    np.testing.assert_array_equal(
        ours.apply_chat_template(chat), theirs.apply_chat_template(chat)
    )
