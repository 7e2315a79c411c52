"""Frozen, validated configuration. Environment variables are read here and nowhere else."""

from __future__ import annotations

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How many threads compute, and in how many tensor-parallel slices.

    Attributes:
      threads_per_subpool: worker threads of each sub-pool, at least 1.
      subpool_count: slices of the intermediate dimension, one per NUMA node; more slices
        than nodes also work.
    """

    threads_per_subpool: int
    subpool_count: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"PoolConfig.{field.name} must be positive, got {value}")

    @classmethod
    def default(cls) -> PoolConfig:
        """One sub-pool with a thread for every CPU this process may run on."""
        return cls(threads_per_subpool=len(os.sched_getaffinity(0)))


def isa_override() -> str | None:
    """The instruction set that `KTJAX_ISA` asks for, or None."""
    return os.environ.get("KTJAX_ISA") or None


def profile_enabled() -> bool:
    """Whether `KTJAX_PROFILE=1` asks for per-phase timings of the kernels."""
    return os.environ.get("KTJAX_PROFILE", "") not in ("", "0")
