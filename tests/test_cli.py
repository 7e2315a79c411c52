"""The command line: help, one-line errors, exit codes, doctor."""

import os
import subprocess
import sys

import pytest

from ktjax import backend, cli
from ktjax.commands import (
    ChatConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
)
from ktjax.train.config import TrainConfig
from ktjax.train.options import fields_of

FACTS = {
    "cpu": "Some CPU",
    "isa": "avx2",
    "isa_reason": "KTJAX_ISA asks for it",
    "isas_supported": ["portable", "avx2"],
    "numa_nodes": 1,
    "threads": 4,
    "memory_bytes": 8 << 30,
}


def run(capsys, *arguments):
    code = cli.main(arguments)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--steps", "0"], "TrainConfig.steps must be at least 1, got 0"),
        (["train", "--model", "x"], "TrainConfig.model needs train_data"),
        (["train", "--train-data", "/no/file"], "/no/file:1: cannot read the dataset"),
        (["train", "--model", "/no", "--train-data", "/no"], "/no/tokenizer.json"),
        (["generate", "--run", "/no/run", "hi"], "/no/run holds no checkpoint"),
        (["generate", "--top-p", "2", "hi"], "top_p must be at most 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("ktjax: error: ")
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_bad_data_line_is_named(capsys, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"messages": 1}\n')
    code, _, err = run(capsys, "train", "--train-data", str(path))
    assert (code, f"{path}:2: " in err) == (2, True)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="at least 1"):
        cli.main(["train", "--debug", "--steps", "0"])


def test_key_errors_read_like_other_errors(capsys, monkeypatch):
    def fail(*_):
        raise KeyError("tensor 'x' is\nmissing")

    monkeypatch.setattr(cli, "run_training", fail)
    assert run(capsys, "train")[2] == "ktjax: error: tensor 'x' is missing\n"


@pytest.mark.parametrize("arguments", [["fly"], ["train", "--wings"], [], ["generate"]])
def test_unknown_arguments_exit_with_two(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: ktjax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--lora-rnak", "8"],
            "unknown argument --lora-rnak; did you mean --lora-rank?",
        ),
        (["--lora_rank=8"], "unknown argument --lora_rank; did you mean --lora-rank?"),
        (["--step", "8"], "unknown argument --step; did you mean --steps?"),
        (["--qqq"], "unknown argument --qqq; known are --debug, --model, "),
    ],
)
def test_unknown_options_get_a_suggestion(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", TrainConfig),
        ("generate", GenerateConfig),
        ("chat", ChatConfig),
        ("plan", PlanConfig),
        ("export", ExportConfig),
        ("merge", MergeConfig),
        ("inspect", InspectConfig),
    ],
)
def test_help_explains_every_field(capsys, command, config):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields_of(config):
        assert field.option.help.split(";")[0].split(" (")[0] in text.replace("- ", "-")


def test_arguments_become_the_configuration(capsys, monkeypatch):
    seen = []

    def remember(config, console):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_training", remember)
    monkeypatch.setattr(cli, "run_generation", remember)
    code, _, err = run(capsys, "train")
    assert (code, err) == (130, "ktjax: interrupted\n")
    run(capsys, "train", "--resume", "--output-dir", "o", "--learning-rate", "1e-4")
    run(capsys, "generate", "--temperature", "0.5", "cipher: fox")
    assert seen == [
        TrainConfig(),
        TrainConfig(resume=True, output_dir="o", learning_rate=1e-4),
        GenerateConfig("cipher: fox", temperature=0.5),
    ]


def test_options_from_a_file_and_from_the_command_line(capsys, monkeypatch, tmp_path):
    seen = []

    def remember(config, console):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_training", remember)
    file = tmp_path / "config.yaml"
    file.write_text("steps: 30\nlora-rank: 8\nresume: true\noutput_dir: o\n")
    run(capsys, "train", str(file), "--steps", "40", "--no-resume")
    assert seen == [TrainConfig(steps=40, lora_rank=8, output_dir="o")]
    file.write_text("steps: 30\nlora_rnak: 8\n")
    code, _, err = run(capsys, "train", str(file))
    assert (code, len(seen)) == (2, 1)
    assert f"{file}:2: unknown option 'lora_rnak'; did you mean lora_rank?" in err


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(backend, "describe", lambda: FACTS)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for words in (
        "Some CPU",
        "KTJAX_ISA asks for it",
        "portable, avx2",
        "8.0 GiB",
        "jaxlib",
    ):
        assert words in out


def test_doctor_of_this_machine(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert backend.describe()["isa"] in out


def test_import_touches_no_device():
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    subprocess.run(
        [sys.executable, "-c", "import ktjax.cli"],
        check=True,
        timeout=60,
        env=environment,
    )
