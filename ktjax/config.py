"""Frozen, validated configuration; the one place that reads environment variables."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

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

    Patterns are regular expressions for the end of a module's name, as in PEFT; the
    first that fits counts. The experts of layer 3 are `layers.3.mlp.experts`, so
    `{r"layers\\.[0-3]\\..*": 8}` is about the first four layers.

    Attributes:
      rank: rank of every adapter, 1 to 256.
      alpha: the adapters' output is scaled by alpha / rank; positive and finite.
      rslora: scale by alpha / √rank instead, so that the adapters' output does not
        shrink as the rank grows (arXiv:2312.03732).
      rank_pattern: pattern -> rank of the modules that it fits.
      alpha_pattern: pattern -> alpha of the modules that it fits.
      dropout: the share of the adapters' input values that a training step drops; at
        least 0 and below 1.

    Raises:
      ValueError: a rank, an alpha, a rate or a pattern that cannot be used; the message
        has it.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_rank("lora_rank", self.rank)
        _check_alpha("lora_alpha", self.alpha)
        for key, rank in self.rank_pattern.items():
            _module_pattern("rank_pattern", key)
            _check_rank(f"rank_pattern['{key}']", rank)
        for key, alpha in self.alpha_pattern.items():
            _module_pattern("alpha_pattern", key)
            _check_alpha(f"alpha_pattern['{key}']", alpha)
        if not 0 <= self.dropout < 1:  # NaN fails too
            raise ValueError(
                f"lora_dropout must be at least 0 and below 1, got {self.dropout}"
            )

    @property
    def scaling(self) -> float:
        """The factor s of the adapters' output where no pattern fits."""
        return float(self.alpha) / (self.rank**0.5 if self.rslora else self.rank)

    def of_module(self, name: str) -> LoRAConfig:
        """What applies to the module with the full name `name`, without patterns."""
        return LoRAConfig(
            _first_fit(self.rank_pattern, name, self.rank),
            _first_fit(self.alpha_pattern, name, self.alpha),
            self.rslora,
            dropout=self.dropout,
        )

    def check_patterns(self, names: Iterable[str]) -> None:
        """See that every pattern fits one of the modules `names`.

        Raises:
          ValueError: names the pattern that would be about nothing.
        """
        names = list(names)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                pattern = _module_pattern(option, key)
                if not any(map(pattern.fullmatch, names)):
                    raise ValueError(
                        f"{option}: '{key}' fits no module with adapters; they are "
                        f"{', '.join(names) or 'none'}"
                    )


def fits(pattern: str, name: str) -> bool:
    """Whether the end of the module's name `name` fits `pattern`, as PEFT matches."""
    return _module_pattern("pattern", pattern).fullmatch(name) is not None


def _module_pattern(option: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})")
    except re.error as error:
        raise ValueError(
            f"{option}: '{key}' is no regular expression: {error}"
        ) from None


def _first_fit(patterns: Mapping[str, T], name: str, default: T) -> T:
    return next((value for key, value in patterns.items() if fits(key, name)), default)


def _check_rank(name: str, rank: int) -> None:
    check_positive(name, rank)
    if rank > MAX_LORA_RANK:
        raise ValueError(f"{name} must be at most {MAX_LORA_RANK}, got {rank}")


def _check_alpha(name: str, alpha: float) -> None:
    # Written so that NaN fails too.
    if not 0 < alpha < float("inf"):
        raise ValueError(f"{name} must be positive, got {alpha}")


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
