"""Whole runs of the benchmarks on tiny layers, and what ends them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from benchmark_cases import TINY

import ktjax
from benchmarks import (
    cases,
    formats,
    linear,
    measure,
    run,
    shapes,
    studies,
)
from benchmarks.cases import Case
from benchmarks.shapes import SHAPES, Shape


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(measure, "PEAK_SAMPLES", 1)
    monkeypatch.setattr(measure, "PEAK_SECONDS", 0.01)
    path = tmp_path / "results.json"
    run.main(
        "--shapes tiny --tokens 40 --passes forward,train --peers xla --rounds 1 "
        "--studies table,skew,lora,formats,threads,memory --formats int4,mxfp4 "
        f"--profile --json {path}".split()
    )
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["schema"] == 1
    assert found["machine"]["pool_threads"] >= 1
    titles = [group["title"] for group in found["groups"]]
    assert len(titles) == 5
    for title in titles:
        assert title in printed

    table = found["groups"][0]
    assert [(row["pass_name"], row["contender"]) for row in table["rows"]] == [
        *[("forward", contender) for contender in ("ktjax", *XLA)],
        *[
            ("train", contender)
            for contender in ("ktjax save", "ktjax recompute", *XLA)
        ],
    ]
    for group in found["groups"]:
        assert group["failures"] == {}
        assert all(group["peaks"][name] > 0 for name in measure.PEAKS)
        for row in group["rows"]:
            work = shapes.flops(TINY, 40, row["pass_name"])
            assert row["gflops"] == pytest.approx(work / row["median_ms"] / 1e6)
            assert 0 < row["min_ms"] <= row["median_ms"]
            label = cases.pass_label(row["pass_name"], row["compute"])
            mine = f"{label}: {row['contender']}" == row["baseline"]
            assert not mine or row["ratio"] == 1

    (storage,) = (g for g in found["groups"] if g["title"].endswith("formats"))
    names = ("bf16", "int4", "mxfp4")
    assert [(r["pass_name"], r["compute"], r["format"]) for r in storage["rows"]] == [
        *[("forward", "bf16", name) for name in names],
        ("forward", "int8", "int4"),
        *[("train", "bf16", name) for name in names],
    ]
    for row in storage["rows"]:
        assert row["baseline"] == f"{row['pass_name']}: bf16"
        traffic = 8 * formats.expert_bytes(TINY, row["format"])
        assert row["weight_gbs"] == pytest.approx(
            traffic * (2 if row["pass_name"] == "train" else 1) / row["median_ms"] / 1e6
        )
    assert "forward int8" in printed

    results = 2 * 40 * 64 * 2 + 40 * 2 * 4 + TINY.lora_bytes(16)
    by_name = {row["contender"]: row for row in found["memory"]}
    assert list(by_name) == ["ktjax save", "ktjax recompute", *XLA]
    for name in ("ktjax save", "ktjax recompute"):
        assert by_name[name]["result_bytes"] == results
        assert by_name[name]["scratch_bytes"] > 0
        assert by_name[name]["first_bytes"] <= by_name[name]["peak_bytes"]

    profiled = [profile["pass_name"] for profile in found["profiles"]]
    assert profiled == ["forward", "train", "train"]  # save and recompute
    for profile in found["profiles"]:
        # Kinds of work are parts of phases, waiting for another thread among them.
        phases = [
            milliseconds
            for name, milliseconds in profile["phase_ms"].items()
            if not name.startswith("in phases: ")
        ]
        assert 0 < sum(phases) <= profile["wall_ms"]


XLA = ("xla padded f32", "xla scan f32")


def test_every_inference_method_is_timed():
    chosen = studies.inference_methods()
    names = [name.split()[0] for names in chosen for name in names.split(", ")]
    assert set(names) == ktjax.KTMoEWrapper.INFERENCE_METHODS
    assert len(set(chosen.values())) == len(chosen)  # nothing is timed twice
    assert chosen["AMXINT4, MOE_INT4"] == ("int4", "int8")
    assert chosen["GPTQ_INT4"] == ("int4_kgroup/128", "int8")
    assert chosen["LLAMAFILE q4_k+q6_k"] == ("q4_k+q6_k", "int8")
    for text, _ in chosen.values():
        assert formats.expert_bytes(SHAPES["S1"], text) > 0
        formats.check_sizes(SHAPES["S1"], text)


def test_methods(tmp_path, monkeypatch, capsys):
    # Half of the K-quants' block: those methods are left out.
    small = Shape("small", "no model", experts=4, k=2, hidden=256, intermediate=128)
    monkeypatch.setitem(SHAPES, "small", small)
    monkeypatch.setattr(measure, "PEAK_SAMPLES", 1)
    monkeypatch.setattr(measure, "PEAK_SECONDS", 0.01)
    path = tmp_path / "results.json"
    run.main(
        "--shapes small --tokens 1,8 --peers  --rounds 1 --studies methods "
        f"--json {path}".split(" ")
    )
    printed = capsys.readouterr().out
    assert "LLAMAFILE q4_k+q6_k left out: shape small: intermediate" in printed
    decode, prefill = json.loads(path.read_text())["groups"]
    assert decode["title"] == "small, 1 token, cold experts, inference methods"
    chosen = {
        name: method
        for name, method in studies.inference_methods().items()
        if f"{name} left out" not in printed
    }
    assert "LLAMAFILE q8_0" in chosen
    names = [row["contender"] for row in decode["rows"]]
    assert names == [row for name in chosen for row in (name, f"{name}, eager")]
    assert [row["contender"] for row in prefill["rows"]] == list(chosen)
    for group in (decode, prefill):
        peaks = group["peaks"]
        for row in group["rows"]:
            text, compute = chosen[row["contender"].removesuffix(", eager")]
            assert (row["format"], row["compute"]) == (text, compute)
            share = row["int8_peak_share"]
            assert (share is None) == (compute == "bf16")
            if share is not None:
                assert share * peaks["int8_gops"] == pytest.approx(row["gflops"])
            case = Case(small, row["tokens"], "forward", "ktjax", "save")
            experts = case.distinct_experts
            gbs = experts * formats.expert_bytes(small, text) / row["median_ms"] / 1e6
            assert row["weight_gbs"] == pytest.approx(gbs)
            bandwidth = row["read_bandwidth_share"] * peaks["dram_read_gbs"]
            assert bandwidth == pytest.approx(gbs)
    assert "% INT8 peak" in printed


def test_formats_need_a_pass_that_they_are_timed_in(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--studies", "formats", "--passes", "lora"])
    assert "expected some of forward,train in --passes" in capsys.readouterr().err


def test_groups_that_do_not_divide_a_layer_end_the_run(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    command = "--shapes tiny --studies formats --formats int4_kgroup/64 --peers"
    with pytest.raises(SystemExit, match=r"shape tiny: intermediate: .* got 32"):
        run.main([*command.split(), ""])


def test_an_unknown_shape_is_an_error(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--shapes", "S3"])
    assert "expected some of S1,S2" in capsys.readouterr().err


def test_too_big_a_layer_ends_the_run_with_advice(monkeypatch):
    monkeypatch.setattr(shapes, "available_memory", lambda: 8 * 10**9)
    with pytest.raises(SystemExit, match=r"error: shape dsv3 .*--experts"):
        run.main(["--shapes", "dsv3", "--peers", ""])


def test_projections(use_pool, capsys, tmp_path):
    use_pool()
    path = tmp_path / "rows.json"
    arguments = ["--sizes", "64x96", "--tokens", "3", "--rounds", "2"]
    rows = linear.main([*arguments, "--formats", "int4", "--json", str(path)])
    assert json.loads(path.read_text()) == [dataclasses.asdict(row) for row in rows]
    assert len(rows) == 2 * 5
    assert {row.contender for row in rows} >= {"ktjax bf16", "ktjax int4"}
    assert all(row.calls == 2 and row.median_ms > 0 for row in rows)
    assert all(row.ratio == 1 for row in rows if row.contender == "ktjax bf16")
    assert "time over that of ktjax bf16" in capsys.readouterr().out
    # 3 x 64 x 96 multiply-adds, twice in a train step.
    assert linear.Projection(64, 96).flops(3, "forward") == 36_864
    assert linear.Projection(64, 96).flops(3, "train") == 73_728
