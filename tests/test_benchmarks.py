"""The benchmarks: their arithmetic, their contenders, and a whole tiny run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import TOLERANCES

import ktjax
from benchmarks import (
    cases,
    contenders,
    formats,
    linear,
    measure,
    run,
    shapes,
    studies,
)
from benchmarks.cases import Case
from benchmarks.shapes import SHAPES, Shape
from benchmarks.worker import Worker, WorkerError

TINY = Shape("tiny", "no model", experts=8, k=2, hidden=64, intermediate=32)
RANK = 8  # grouped_mm wants rows of 16 bytes

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def test_flops_of_a_known_layer():
    # 512 tokens x 8 slots x 3 matrices x 2048 x 768 multiply-adds.
    assert shapes.flops(SHAPES["S1"], 512, "forward") == 38_654_705_664
    assert shapes.flops(SHAPES["S1"], 512, "lora") == 38_654_705_664
    assert shapes.flops(SHAPES["S1"], 512, "train") == 77_309_411_328


def test_bytes_of_a_known_layer():
    s1 = SHAPES["S1"]
    assert s1.weight_bytes == 1_207_959_552  # 128 x 3 x 2048 x 768 x 2
    assert formats.expert_bytes(s1, "bf16") == 9_437_184
    assert shapes.weight_traffic(9_437_184, 8, "forward") == 75_497_472
    assert shapes.weight_traffic(9_437_184, 8, "train") == 150_994_944
    # (3 x 2048 + 3 x 768) x 16 x 128 x 4
    assert s1.lora_bytes(16) == 69_206_016


# An expert of S1 is 4_718_592 weights, in 2 x 768 rows of 2048 and 2048 rows of 768.
@pytest.mark.parametrize(
    ("name", "codes", "scales"),
    [
        ("int8", 4_718_592, 4 * (2 * 768 + 2048)),
        ("int4", 2_359_296, 4 * (2 * 768 + 2048)),
        ("int4_kgroup/128", 2_359_296, 4 * 36_864),
        ("int4_kgroup/32", 2_359_296, 4 * 147_456),
        ("int4_kgroup/32/z", 2_359_296, (4 + 1) * 147_456),
        ("fp8_block", 4_718_592, 4 * 3 * 6 * 16),
        ("rawint4", 2_359_296, 2 * 147_456),
        ("mxfp4", 2_359_296, 147_456),
        ("mxfp8", 4_718_592, 147_456),
        ("q8_0", 4_718_592, 2 * 147_456),
        # 144 and 210 bytes for 256 weights.
        ("q4_k", 4_718_592 // 256 * 144, 0),
        ("q4_k+q6_k", 12_288 * 144, 6_144 * 210),
    ],
)
def test_bytes_of_a_format_are_codes_scales_and_zeros(name, codes, scales):
    assert formats.expert_bytes(SHAPES["S1"], name) == codes + scales


def test_a_format_is_read_with_its_group_size_and_zero_points():
    assert formats.encoding("int4_kgroup/32/z") == ("int4_kgroup", 32, True)
    assert formats.encoding("int4_kgroup/64") == ("int4_kgroup", 64, False)
    assert formats.canonical("int4_kgroup") == "int4_kgroup/128"
    for name in ("int8", "mxfp4", "int4_kgroup/32/z", "q8_0", "q4_k+q6_k"):
        assert formats.canonical(name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "got 'int5'"),
        ("int4/32", "expected None for format 'int4', got 32"),
        ("int4_kgroup/48", "expected one of .*, got 48"),
        ("int4_kgroup/z", "expected NAME, .* got 'int4_kgroup/z'"),
        ("q4_k+int8", "only formats of GGUF mix"),
        ("bf16+q4_k", "only formats of GGUF mix"),
        ("q4_k/32", "expected one of .*, got 32"),
    ],
)
def test_a_format_that_is_not_there_is_an_error(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        formats.encoding(text)
    with pytest.raises(SystemExit):
        run.parse(["--formats", f"int8,{text}"])
    assert re.search(message, capsys.readouterr().err)


def test_sizes_of_the_table_are_those_of_the_models():
    # Routed expert weights a layer, in millions: 128 x 4.72, 64 x 8.65, ...
    millions = {name: round(s.weight_bytes / 2e6) for name, s in SHAPES.items()}
    assert millions == {"S1": 604, "S2": 554, "olmoe": 403, "mixtral": 1409} | {
        "dsv3": 11274
    }


def test_an_unknown_pass_is_an_error():
    with pytest.raises(ValueError, match=r"pass: expected .*'train'.*, got 'lora64'"):
        shapes.flops(TINY, 1, "lora64")


def test_a_layer_that_does_not_fit_is_refused_with_what_would():
    big, families, available = SHAPES["dsv3"], ["ktjax", "xla"], 40 * 10**9
    with pytest.raises(MemoryError, match=r"dsv3 .*needs about .*--experts (\d+)") as e:
        shapes.check_memory(big, families, 16, available)
    experts = int(str(e.value).split("--experts ")[1].split()[0])
    shapes.check_memory(big.capped(experts), families, 16, available)
    with pytest.raises(MemoryError):
        shapes.check_memory(big.capped(experts + 1), families, 16, available)


def test_stores_of_further_formats_count_as_memory():
    s1, available = SHAPES["S1"], 7 * 10**9
    shapes.check_memory(s1, ["ktjax"], 16, available)
    stored = 2 * formats.expert_bytes(s1, "int8")
    message = r"GB for ktjax in all formats, .*--experts (\d+) .*fewer --formats"
    with pytest.raises(MemoryError, match=message):
        shapes.check_memory(s1, ["ktjax"], 16, available, stored)


def test_a_capped_layer_says_so():
    assert TINY.capped(None) is TINY
    assert TINY.capped(8) is TINY
    capped = TINY.capped(4)
    assert (capped.name, capped.experts, capped.k) == ("tiny/E4", 4, 2)
    with pytest.raises(ValueError, match="needs 2 experts, got 1"):
        TINY.capped(1)


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_tokens_go_to_distinct_experts(routing):
    case = Case(TINY, 50, "forward", "ktjax", "save", routing=routing)
    (batch,) = cases.batches(case)
    assert batch.ids.shape == (50, 2)
    assert batch.ids.min() >= 0
    assert batch.ids.max() < TINY.experts
    assert (batch.ids[:, 0] != batch.ids[:, 1]).all()
    np.testing.assert_allclose(batch.w.sum(-1), 1, rtol=1e-6)


def test_zipf_routing_has_favourites():
    def busiest(routing):
        case = Case(TINY, 400, "forward", "ktjax", "save", routing=routing)
        return np.bincount(cases.batches(case)[0].ids.ravel()).max() / 800

    assert busiest("uniform") < 0.18  # an eighth each, and chance
    assert busiest("zipf") > 0.25  # the first of 1/i has over a third of the draws


def test_decode_steps_use_other_experts():
    batches = cases.batches(Case(TINY, 1, "forward", "ktjax", "save"))
    assert len(batches) == cases.DECODE_STEPS
    first_round = np.concatenate([batch.ids.ravel() for batch in batches[:4]])
    assert sorted(first_round) == list(range(8))


def test_a_case_survives_json():
    case = Case(TINY, 3, "train", "xla", "padded f32", rank=4, routing="zipf")
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    case = Case(TINY, 3, "train", "ktjax", "save", format="int4", compute="int8")
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_peers_have_no_other_formats():
    with pytest.raises(ValueError, match="xla: format: expected 'bf16', got 'int8'"):
        Case(TINY, 3, "forward", "xla", "scan f32", format="int8")
    with pytest.raises(ValueError, match="torch: compute: expected 'bf16'"):
        Case(TINY, 3, "forward", "torch", "loop", compute="int8")


def test_traffic_counts_distinct_experts():
    case = Case(TINY, 50, "train", "ktjax", "save")
    # 100 draws of 8: all of them.
    assert measure.traffic(case) == 2 * TINY.weight_bytes
    decode = Case(TINY, 1, "forward", "ktjax", "save")
    assert measure.traffic(decode) == TINY.weight_bytes / 4
    decode = dataclasses.replace(decode, format="int4")
    assert measure.traffic(decode) == 2 * formats.expert_bytes(TINY, "int4")


@functools.cache
def reference(tokens: int, pass_name: str, format: str) -> dict[str, np.ndarray]:
    """y, and for "train" all gradients, in float32, of the last batch."""
    batch = cases.batches(Case(TINY, tokens, pass_name, "ktjax", "save"))[-1]
    name, group_size, zero_point = formats.encoding(format)
    options = {"group_size": group_size or None, "zero_point": zero_point}
    base = []
    for array in formats.weights(TINY, format).values():
        blocks = isinstance(array, ktjax.Quantized)
        stored = array if blocks else ktjax.quant.encode(array, name, **options)
        base.append(ktjax.quant.decode(stored, name))
    lora = None
    if pass_name != "forward":
        lora = ktjax.LoRA(**cases.lora(TINY, RANK))
    x, grad_y = (jnp.asarray(a, jnp.float32) for a in (batch.x, batch.grad_y))

    @jax.jit
    def run(x, w, lora, grad_y):
        y, pullback = jax.vjp(
            lambda x, w, lora: ktjax.reference.moe(
                x, batch.ids, w, *base, lora, scaling=cases.SCALING
            ),
            x,
            w,
            lora,
        )
        return y, pullback(grad_y)

    y, (grad_x, grad_w, grad_lora) = run(x, batch.w, lora, grad_y)
    if pass_name != "train":
        return {"y": y}
    named = zip(ktjax.LoRA.NAMES, grad_lora.arrays(), strict=True)
    return {"y": y, "x": grad_x, "w": grad_w, **dict(named)}


# XLA: float32 sums of up to 64 terms in another order, times the condition of a sum.
# torch: every product, sum and slot is rounded to bfloat16 by 2^-9, and a few dozen
# independent roundings come together: sqrt(64) * 2^-9.
# int8: x and h are rounded in steps of amax / 127. For 64 normal numbers, or 32
# products of two, amax is within 6 times their root mean square: 6 / 127 / sqrt(12) =
# 0.014 an operand. gate, up and down have one each, with independent errors.
INT8_LIMIT = 3**0.5 * 0.014
LIMITS = {"ktjax": TOLERANCES["bfloat16"], "xla": 1e-4, "torch": 2**-6}


@pytest.mark.parametrize(
    "family", ["ktjax", "xla", pytest.param("torch", marks=needs_torch)]
)
def test_contenders_compute_the_same(use_pool, family):
    use_pool()
    contender = contenders.create(family)
    try:
        contender.load(TINY)
        for tokens, pass_name in ((1, "train"), *((9, name) for name in shapes.PASSES)):
            variants = cases.variants(family, pass_name, tokens)
            if family == "xla" and pass_name == "train":
                variants = (*variants, "ragged f32")
            for variant in variants:
                case = Case(TINY, tokens, pass_name, family, variant, RANK)
                check_results(case, contender.prepare(case))
    finally:
        contender.close()


STORED = ["int8", "int4_kgroup/32/z", "mxfp4"]


def test_ktjax_computes_the_same_in_each_format(use_pool):
    use_pool()
    contender = contenders.create("ktjax")
    try:
        contender.load(TINY)
        contender.hold([*STORED, "q8_0"])
        for format in STORED:
            case = Case(TINY, 9, "train", "ktjax", "save", RANK, format=format)
            check_results(case, contender.prepare(case))
        for format in (*STORED, "q8_0"):
            computes = ["bf16"]
            if formats.encoding(format).spec.int8_compute:
                computes.append("int8")
            for compute in computes:
                for variant in ("save", "eager"):
                    case = Case(TINY, 9, "forward", "ktjax", variant, format=format)
                    case = dataclasses.replace(case, compute=compute)
                    check_results(case, contender.prepare(case))
        contender.hold(["mxfp4"])
        case = Case(TINY, 9, "forward", "ktjax", "save", format="int8")
        with pytest.raises(RuntimeError, match="format 'int8', got bf16, mxfp4"):
            contender.prepare(case)
    finally:
        contender.close()


def check_results(case: Case, prepared: contenders.Prepared) -> None:
    assert len(prepared.calls) == len(cases.batches(case))
    got = prepared.named(prepared.calls[-1]())
    want = reference(case.tokens, case.pass_name, case.format)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].shape == expected.shape, (case, name)
        error = np.linalg.norm(got[name] - expected) / np.linalg.norm(expected)
        # Two numbers may both have cancelled, and keep the errors of their terms.
        limit = INT8_LIMIT if case.compute == "int8" else LIMITS[case.family]
        limit *= 4 if expected.size < 8 else 1
        assert error <= limit, f"{case.label} {case.pass_name} {name}: {error:.2e}"


class FakeWorker:
    """Takes a fixed time, or fails."""

    alive = True

    def __init__(self, family, milliseconds, error=None):
        self.family, self.milliseconds, self.error = family, milliseconds, error
        self.turns = []

    def prepare(self, case):
        if self.error:
            raise WorkerError(self.error)

    def run(self, case, calls):
        self.turns.append(calls)
        return [self.milliseconds / 1e3] * calls

    def ask(self, operation, **arguments):
        if operation == "peaks":
            return dict.fromkeys(measure.PEAKS, 100.0)
        assert operation == "forget"
        return None


def test_rows_are_what_their_times_say():
    ktjax_worker, peer = FakeWorker("ktjax", 2.0), FakeWorker("xla", 5.0)
    entries = [
        measure.Entry(
            worker.family,
            worker,
            Case(SHAPES["S1"], 1, "forward", worker.family, "save"),
            "forward: ktjax",
        )
        for worker in (ktjax_worker, peer)
    ]
    group = measure.interleave("t", entries, peak_worker=ktjax_worker, rounds=3)
    mine, theirs = group.rows
    assert (mine.ratio, theirs.ratio) == (1.0, 2.5)
    assert mine.calls == 3 * 8  # ten a turn, the first two not counted
    assert mine.tokens_per_s == pytest.approx(500)
    assert mine.gflops == pytest.approx(75_497_472 / 2e-3 / 1e9)
    assert mine.bf16_peak_share == pytest.approx(mine.gflops / 100)
    assert mine.weight_gbs == pytest.approx(75_497_472 / 2e-3 / 1e9)
    assert peer.turns == [1, 10, 10, 10]  # one to warm up


def test_a_peer_that_fails_is_reported_and_ktjax_is_an_error():
    good, bad = FakeWorker("ktjax", 1.0), FakeWorker("torch", 1.0, "no grouped_mm")
    case = Case(TINY, 64, "forward", "ktjax", "save")
    entries = [
        measure.Entry("ktjax", good, case, "forward: ktjax"),
        measure.Entry("torch", bad, case, "forward: ktjax"),
    ]
    group = measure.interleave("t", entries, peak_worker=good, rounds=1)
    assert [row.contender for row in group.rows] == ["ktjax"]
    assert group.failures == {"forward: torch": "no grouped_mm"}
    good.error = "closed"
    with pytest.raises(WorkerError, match="closed"):
        measure.interleave("t", entries, peak_worker=good, rounds=1)


def test_errors_of_another_process_come_back():
    with Worker("xla") as worker:
        case = Case(TINY, 3, "forward", "xla", "scan f32")
        with pytest.raises(WorkerError, match="call load"):
            worker.prepare(case)
        worker.load(TINY)
        worker.prepare(case)  # still there
        assert len(worker.run(case, 2)) == 2
    assert not worker.alive


def test_a_process_that_ends_says_why():
    with pytest.raises(WorkerError, match=r"ended with code 1(.|\n)*expected ktjax"):
        Worker("numpy")


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
    assert chosen["LLAMAFILE q4_k+q6_k"] == ("q4_k+q6_k", "bf16")
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
