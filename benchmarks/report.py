"""Tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import pass_label
from benchmarks.measure import Group
from benchmarks.studies import MEMORY_CALLS, MemoryRow, Profile

SCHEMA = 1


@dataclasses.dataclass
class Report:
    """Everything a run has found.

    Attributes:
      machine: CPU, kernels in use, threads, memory, versions.
      command: the arguments of the run.
    """

    machine: dict[str, Any]
    command: list[str]
    groups: list[Group] = dataclasses.field(default_factory=list)
    memory: list[MemoryRow] = dataclasses.field(default_factory=list)
    profiles: list[Profile] = dataclasses.field(default_factory=list)

    def write(self, path: pathlib.Path) -> None:
        """Writes the report as JSON, whole or not at all."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        partial = path.with_suffix(path.suffix + ".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """One line on the machine."""
    console.print(
        f"{machine['cpu']}, {machine['pool_threads']} threads, {machine['isa']} "
        f"kernels, {machine['memory_bytes'] / 1e9:.0f} GB; ktjax {machine['ktjax']}, "
        f"jax {machine['jax']}"
    )


def print_group(console: Console, group: Group) -> None:
    """Milliseconds, what they mean, and the peaks they are held against."""
    peaks = group.peaks
    table = Table(
        title=group.title,
        caption=(
            f"peak here and now: BF16 {peaks['bf16_gflops']:.0f} GF/s, INT8 "
            f"{peaks['int8_gops']:.0f} GOP/s, F32 {peaks['f32_gflops']:.0f} GF/s, "
            f"memory {peaks['dram_read_gbs']:.1f} GB/s; "
            f"time ratio: over that of {_baselines(group)}"
        ),
        title_justify="left",
        caption_justify="left",
    )
    integers = any(row.int8_peak_share is not None for row in group.rows)
    table.add_column("pass")
    table.add_column("contender")
    for name in (
        "median ms",
        "min ms",
        "tokens/s",
        "GF/s",
        "% BF16 peak",
        *(["% INT8 peak"] if integers else []),
        "weights GB/s",
        "% read BW",
        "time ratio",
    ):
        table.add_column(name, justify="right")
    previous = None
    for row in group.rows:
        label = pass_label(row.pass_name, row.compute)
        if previous not in (None, label):
            table.add_section()
        previous = label
        table.add_row(
            label,
            row.contender,
            f"{row.median_ms:.2f}",
            f"{row.min_ms:.2f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.gflops:.1f}",
            f"{100 * row.bf16_peak_share:.1f}",
            *([_percent(row.int8_peak_share)] if integers else []),
            f"{row.weight_gbs:.1f}",
            f"{100 * row.read_bandwidth_share:.1f}",
            f"{row.ratio:.2f}",
        )
    console.print(table)
    for name, error in group.failures.items():
        console.print(f"[bold]{name} did not run:[/] {error}", highlight=False)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _baselines(group: Group) -> str:
    # "train: ktjax save" is in the rows of its own pass: the name alone says it there.
    passes = {pass_label(row.pass_name, row.compute) for row in group.rows}
    names = dict.fromkeys(row.baseline for row in group.rows)
    if len(names) == len(passes):
        names = dict.fromkeys(name.partition(": ")[2] for name in names)
    return ", ".join(names)


def print_memory(console: Console, rows: list[MemoryRow]) -> None:
    """Memory of train steps above weights, adapters and inputs."""
    table = Table(title="Memory of a train step", title_justify="left")
    table.add_column("layer")
    table.add_column("contender")
    for name in (
        "first call MB",
        "of it results MB",
        "the rest MB",
        "kept scratch MB",
        f"peak of {MEMORY_CALLS} calls MB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        scratch = row.scratch_bytes
        table.add_row(
            f"{row.shape}, {row.tokens} tokens",
            row.contender,
            f"{row.first_bytes / 1e6:.1f}",
            f"{row.result_bytes / 1e6:.1f}",
            f"{(row.first_bytes - row.result_bytes) / 1e6:.1f}",
            "" if scratch is None else f"{scratch / 1e6:.1f}",
            f"{row.peak_bytes / 1e6:.1f}",
        )
    console.print(table)


def print_profile(console: Console, profile: Profile) -> None:
    """Milliseconds a call by phase, and by kind of work within the phases."""
    work = {k: v for k, v in profile.phase_ms.items() if k.startswith("in phases: ")}
    phases = {k: v for k, v in profile.phase_ms.items() if k not in work}
    table = Table(
        title=(
            f"{profile.shape}, {profile.tokens} tokens, {profile.pass_name}, "
            f"{profile.contender}"
        ),
        title_justify="left",
    )
    table.add_column("phase")
    table.add_column("ms a call", justify="right")
    table.add_column("% of the call", justify="right")

    def add(name: str, milliseconds: float) -> None:
        share = 100 * milliseconds / profile.wall_ms
        table.add_row(name, f"{milliseconds:.3f}", f"{share:.1f}")

    for part in (phases, work):
        for name, value in sorted(part.items(), key=lambda item: -item[1]):
            add(name, value)
        table.add_section()
    add("outside the phases", profile.wall_ms - sum(phases.values()))
    add("the call", profile.wall_ms)
    console.print(table)
