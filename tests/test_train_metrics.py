"""Metrics: the JSONL file, TensorBoard, the curve of the losses."""

import builtins
import math

import pytest

from ktjax.train.curve import draw_curve, sparkline
from ktjax.train.metrics import (
    MetricsError,
    MetricsLog,
    TensorBoardLog,
    read_metrics,
)

LINES = [
    {"step": 1, "loss": 3.0, "router_entropy": 0.5},
    {"step": 2, "loss": 2.0, "router_entropy": 0.25},
    {"step": 2, "eval_loss": 2.5},
]


def write(path):
    log = MetricsLog(path, 0)
    for line in LINES:
        log.write(line)


def without(monkeypatch, package):
    """As if `package` were not installed."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_metrics_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(path, "loss") == [(1, 3.0), (2, 2.0)]
    assert read_metrics(path, "eval_loss") == [(2, 2.5)]


def test_metrics_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MetricsError, match=r"cannot write .*metrics\.jsonl"):
        MetricsLog(tmp_path / "metrics.jsonl", 0)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    log = TensorBoardLog(tmp_path, 0)
    for line in LINES:
        log.write(line)
    log.close()
    assert read_events(tmp_path) == {
        ("train/loss", 1): 3.0,
        ("train/loss", 2): 2.0,
        ("router/entropy", 1): 0.5,
        ("router/entropy", 2): 0.25,
        ("eval/loss", 2): 2.5,
    }


def read_events(directory):
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in directory.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, the event, its CRC
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            at += 12 + length + 4
    return found


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    without(monkeypatch, "tensorboardX")
    with pytest.raises(MetricsError, match=r"pip install 'ktjax\[tensorboard\]'"):
        TensorBoardLog(tmp_path, 0)


def test_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "metrics.jsonl")
    assert draw_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss.png",
        "metrics.jsonl",
    ]


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    without(monkeypatch, "matplotlib")
    write(tmp_path / "metrics.jsonl")
    assert not draw_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([2.0]) == "▁"
    assert sparkline([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([0, 2, 7, 7, math.nan], width=2) == "▁█"
    assert len(sparkline(range(1000))) == 40
