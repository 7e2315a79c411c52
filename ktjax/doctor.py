"""What ktjax sees of this machine, and what it makes of it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from rich.table import Table

from ktjax import backend

PACKAGES = ("ktjax", "jax", "jaxlib", "flax", "optax", "numpy")
GIB = 1 << 30


def report() -> Table:
    """A table of the CPU, the instruction set and why, NUMA, memory, and versions."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (*_machine(backend.describe()), *_versions()):
        table.add_row(name, value)
    return table


def _machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("CPU", facts["cpu"]),
        ("instruction set", facts["isa"]),
        ("because", facts["isa_reason"]),
        ("supported", ", ".join(facts["isas_supported"])),
        ("NUMA nodes", str(facts["numa_nodes"])),
        ("threads", str(facts["threads"])),
        ("memory", f"{facts['memory_bytes'] / GIB:.1f} GiB"),
    ]


def _versions() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows
