"""Timing that holds on a machine with other things to do."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import cases, formats, shapes
from benchmarks.cases import Case
from benchmarks.worker import Worker, WorkerError

PEAK_SECONDS = 0.1
# Peaks are taken this many times over the rounds of a group, first and last included.
PEAK_SAMPLES = 6
# Lets the spinning threads of the last library park.
SETTLE_SECONDS = 0.02

PEAKS = ("bf16_gflops", "int8_gops", "f32_gflops", "dram_read_gbs")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A case, the process that runs it, its name, and whom it is compared with.

    Attributes:
      label: the name in the table, unique among the entries of a pass.
      baseline: the `key` of the entry that this one's time is divided by.
    """

    label: str
    worker: Worker
    case: Case
    baseline: str

    @property
    def key(self) -> str:
        """Unique in a group."""
        return key(cases.pass_label(self.case.pass_name, self.case.compute), self.label)


def key(pass_label: str, label: str) -> str:
    """How baselines are named."""
    return f"{pass_label}: {label}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table, and of the JSON file.

    Attributes:
      median_ms: of all timed calls; the other figures derive from it.
      bf16_peak_share: operations a second over the BF16 peak of the same minutes.
      int8_peak_share: over the INT8 peak, for products of integers; else None.
      weight_gbs: 1e9 bytes a second of base weights in their format (once per sweep:
        the train step has two).
      read_bandwidth_share: over the read bandwidth of the same minutes.
      ratio: time over the time of `baseline` in the same round, median over rounds.
    """

    shape: str
    tokens: int
    pass_name: str
    contender: str
    rank: int
    routing: str
    format: str
    compute: str
    calls: int
    median_ms: float
    min_ms: float
    tokens_per_s: float
    gflops: float
    bf16_peak_share: float
    int8_peak_share: float | None
    weight_gbs: float
    read_bandwidth_share: float
    baseline: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Entries that were timed in turns, with the peaks of those minutes.

    Attributes:
      title: what the table is called.
      rows: one an entry, in order.
      peaks: medians by name, see `PEAKS`.
      failures: errors of peers that could not run, by `Entry.key`.
    """

    title: str
    rows: list[Row]
    peaks: dict[str, float]
    failures: dict[str, str]


def default_rounds(tokens: int) -> int:
    """More turns for shorter calls."""
    return 5 if tokens >= 2048 else 7 if tokens >= 256 else 9


def calls_per_turn(tokens: int) -> tuple[int, int]:
    """Consecutive calls of a turn, and how many of the first are not counted.

    A single token is decoding, where call follows call: the first ones of a turn wake
    the threads, which a decode loop does once.
    """
    if tokens == 1:
        return 10, 2
    return (3, 0) if tokens <= 64 else (1, 0)


def interleave(
    title: str,
    entries: list[Entry],
    *,
    peak_worker: Worker,
    rounds: int | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> Group:
    """Times entries in turns, a turn each and round.

    Args:
      title: of the group.
      entries: at least one.
      peak_worker: a ktjax worker, which measures the machine between rounds.
      rounds: None for `default_rounds`.
      report: is told what goes on.

    Raises:
      WorkerError: an entry of the peak worker's family failed. Failures of peers are
        part of the result.
    """
    failures: dict[str, str] = {}
    alive = []
    for entry in entries:
        report(f"{title}: compiling {entry.key}")
        try:
            entry.worker.prepare(entry.case)
            entry.worker.run(entry.case, 1)
            alive.append(entry)
        except WorkerError as error:
            if entry.worker.family == peak_worker.family:
                raise
            failures[entry.key] = str(error)
    alive = [entry for entry in alive if entry.worker.alive]
    if rounds is None:
        rounds = default_rounds(max(entry.case.tokens for entry in entries))
    seconds: dict[Entry, list[list[float]]] = {entry: [] for entry in alive}
    peaks: list[dict[str, Any]] = [peak_worker.ask("peaks", seconds=PEAK_SECONDS)]
    for turn in range(rounds):
        report(f"{title}: round {turn + 1} of {rounds}")
        # Rotated, so that nobody always follows the same neighbour.
        shift = turn % len(alive)
        for entry in alive[shift:] + alive[:shift]:
            calls, skipped = calls_per_turn(entry.case.tokens)
            time.sleep(SETTLE_SECONDS)
            seconds[entry].append(entry.worker.run(entry.case, calls)[skipped:])
        if len(peaks) < 1 + (turn + 1) * (PEAK_SAMPLES - 1) // rounds:
            time.sleep(SETTLE_SECONDS)
            peaks.append(peak_worker.ask("peaks", seconds=PEAK_SECONDS))
    for worker in {entry.worker for entry in alive}:
        worker.ask("forget")
    medians = {name: statistics.median(peak[name] for peak in peaks) for name in PEAKS}
    by_key = {entry.key: times for entry, times in seconds.items()}
    rows = [
        summarise(entry, times, by_key[entry.baseline], medians)
        for entry, times in seconds.items()
    ]
    return Group(title, rows, medians, failures)


def traffic(case: Case) -> float:
    """Bytes of base weights, in their format, that a call must read, on average."""
    expert_bytes = formats.expert_bytes(case.shape, case.format)
    return shapes.weight_traffic(expert_bytes, case.distinct_experts, case.pass_name)


def summarise(
    entry: Entry,
    seconds: list[list[float]],
    baseline_seconds: list[list[float]],
    peaks: dict[str, float],
) -> Row:
    """The figures of one entry from the times of its calls, a list a round."""
    case = entry.case
    times = [time for turn in seconds for time in turn]
    median = statistics.median(times)
    gflops = case.flops / median / 1e9
    gbs = traffic(case) / median / 1e9
    return Row(
        shape=case.shape.name,
        tokens=case.tokens,
        pass_name=case.pass_name,
        contender=entry.label,
        rank=case.rank if case.adapted else 0,
        routing=case.routing,
        format=case.format,
        compute=case.compute,
        calls=len(times),
        median_ms=1e3 * median,
        min_ms=1e3 * min(times),
        tokens_per_s=case.tokens / median,
        gflops=gflops,
        bf16_peak_share=gflops / peaks["bf16_gflops"],
        int8_peak_share=gflops / peaks["int8_gops"] if case.compute == "int8" else None,
        weight_gbs=gbs,
        read_bandwidth_share=gbs / peaks["dram_read_gbs"],
        baseline=entry.baseline,
        ratio=statistics.median(
            statistics.median(mine) / statistics.median(theirs)
            for mine, theirs in zip(seconds, baseline_seconds, strict=True)
        ),
    )
