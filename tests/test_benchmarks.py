"""The benchmarks' arithmetic: cases, sizes, traffic, and what rows say."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from benchmark_cases import TINY

from benchmarks import (
    cases,
    formats,
    measure,
    run,
    shapes,
)
from benchmarks.cases import Case
from benchmarks.shapes import SHAPES
from benchmarks.worker import Worker, WorkerError


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
