"""`ktjax bench`: a layer measured from the command line."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ktjax import assets, cli
from ktjax.commands import bench

DEMO = str(assets.demo_model())


def run(capsys, *arguments):
    code = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_small_layer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = run(
        capsys,
        *("--model", DEMO, "--experts", "int4", "--lora-rank", "4"),
        *("--tokens", "1, 8", "--seconds", "0.02"),
    )
    assert (code, err) == (0, "")
    for words in (
        "8 experts, 2 per token, hidden 128, width 64; int4, rank 4",
        "kernels",
        "peaks in the same minutes",
    ):
        assert words in out
    rows = re.findall(r"│ (\d+) +│ (forward|LoRA|train) +│ ([\d.]+)", out)
    passes = ("forward", "LoRA", "train")
    assert [row[:2] for row in rows] == [(n, p) for n in "18" for p in passes]
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "8,x"], "tokens must be positive numbers.*'8,x'"),
        (["--tokens", "0"], "tokens must be positive numbers.*'0'"),
        (["--num-experts", "4"], "num_experts must be 8, .*, to 128, got 4"),
        (["--experts", "int5"], "int5"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_errors(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (cli.EXIT_ERROR, "")
    assert re.search(message, err)


def test_a_layer_that_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda: 10**8)
    code, _, err = run(capsys)
    assert code == cli.EXIT_ERROR
    assert "128 experts takes 2.6 GB" in err
    assert "--num-experts, at most 4" in err


def test_routes_come_to_every_expert():
    layer = bench._Layer(8, 2, 16, 16)
    routes = [bench._routes(layer, 1, call) for call in range(4)]
    assert sorted(np.concatenate(routes).ravel()) == list(range(8))
    assert np.array_equal(np.bincount(bench._routes(layer, 12, 0).ravel()), [3] * 8)
    assert layer.touched(1) == 2
    assert layer.touched(12) == 8
