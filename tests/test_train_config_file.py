"""YAML configurations: reading, errors with file and line, and what is written."""

import re
from pathlib import Path

import pytest

from ktjax.train.config import TrainConfig
from ktjax.train.config_file import (
    ConfigFileError,
    read_config_file,
    write_config_file,
)


def read(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_config_file(path, TrainConfig)


def test_values_have_the_types_of_the_fields(tmp_path):
    text = """# a comment
model: some/dir
train-data: data.jsonl
learning_rate: 1e-4     # YAML takes this one for a string
weight_decay: 0
zero_point: true
experts: int4_kgroup
group_size: 32
eval_data: null
steps: null             # as if it were not there
"""
    assert read(tmp_path, text) == {
        "model": Path("some/dir"),
        "train_data": Path("data.jsonl"),
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "zero_point": True,
        "experts": "int4_kgroup",
        "group_size": 32,
    }
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("steps: 3\n\nstep: 4\n", 3, "unknown option 'step'; did you mean steps?"),
        ("zzz: 4\n", 1, "unknown option 'zzz'; known are model, train_data, "),
        ("3: 4\n", 1, "unknown option 3"),
        ("steps: 3\nsteps: 4\n", 2, "'steps' is there twice"),
        ("steps: many\n", 1, "steps must be of type int, got 'many'"),
        ("seed: 1\nlora_rank: 300\n", 2, "lora_rank must be at most 256, got 300"),
        ("batching: sort\n", 1, "batching must be one of pack, pad, got 'sort'"),
        ("steps: {a: 1}\n", 1, "steps must be of type int, got {'a': 1}"),
        ("- steps\n", 1, "expected lines of the form 'option: value'"),
        ("steps: [1\nseed: 0\n", 2, "not YAML: "),
        ("steps: !!python/object:os.system x\n", 1, "not YAML: "),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, line, words):
    with pytest.raises(ConfigFileError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}:{line}: ")
    assert words in str(caught.value)


def test_unreadable_file(tmp_path):
    with pytest.raises(ConfigFileError, match=re.escape(f"{tmp_path}:1: cannot read")):
        read_config_file(tmp_path, TrainConfig)


def test_what_is_written_reads_as_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    config = TrainConfig(
        model="m", train_data="d", output_dir="o", resume=True, learning_rate=1e-5
    )
    write_config_file(path, config)
    assert "resume" not in path.read_text()
    assert TrainConfig(**read_config_file(path, TrainConfig), resume=True) == config
