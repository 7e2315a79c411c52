"""Frozen, validated configuration; the one place that reads environment variables."""

from __future__ import annotations

import dataclasses
import os

MAX_LORA_RANK = 256


def check_positive(name: str, value: int) -> None:
    """Hold an integer setting against its limits.

    Raises:
      ValueError: `value` is no integer, or below 1; names `name` and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How many threads compute, and in how many tensor-parallel slices.

    Attributes:
      threads_per_subpool: worker threads of each sub-pool, at least 1.
      subpool_count: slices of the intermediate dimension, one per NUMA node; more
        slices than nodes also work.
    """

    threads_per_subpool: int
    subpool_count: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(
                    f"PoolConfig.{field.name} must be positive, got {value}"
                )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sizes of one layer of routed experts; every one positive.

    Attributes:
      num_experts: experts of the layer.
      num_experts_per_tok: experts that each token is sent to, at most `num_experts`.
      hidden_size: width of the layer's input and output.
      moe_intermediate_size: width of an expert's gate and up projections.

    Raises:
      ValueError: a size that is not a positive integer, or more experts per token than
        there are; the message has the value.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int

    def __post_init__(self) -> None:
        for name in (
            "num_experts",
            "hidden_size",
            "moe_intermediate_size",
            "num_experts_per_tok",
        ):
            check_positive(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) cannot exceed "
                f"num_experts ({self.num_experts})"
            )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Rank and strength of the adapters (arXiv:2106.09685).

    Attributes:
      rank: rank of every adapter, 1 to 256.
      alpha: the adapters' output is scaled by alpha / rank; positive and finite.

    Raises:
      ValueError: a rank or alpha outside its limits; the message has the value.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        check_positive("lora_rank", self.rank)
        if self.rank > MAX_LORA_RANK:
            raise ValueError(
                f"lora_rank must be at most {MAX_LORA_RANK}, got {self.rank}"
            )
        # Written so that NaN fails too.
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora_alpha must be positive, got {self.alpha}")

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank of the adapters' output."""
        return float(self.alpha) / self.rank


def isa_override() -> str | None:
    """The instruction set that `KTJAX_ISA` asks for, or None."""
    return os.environ.get("KTJAX_ISA") or None


def keep_freed_memory() -> bool:
    """Whether freed arrays stay with the process for reuse; `KTJAX_KEEP_MEMORY=0` not.

    glibc gives large arrays back to the system at once, and a training step then spends
    a tenth of its time on page faults.
    """
    return os.environ.get("KTJAX_KEEP_MEMORY", "1") not in ("", "0")


def profile_enabled() -> bool:
    """Whether `KTJAX_PROFILE=1` asks for per-phase timings of the kernels."""
    return os.environ.get("KTJAX_PROFILE", "") not in ("", "0")
