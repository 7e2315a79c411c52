"""What every contender offers to the process that times it."""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case that is compiled and has its inputs in place.

    Attributes:
      calls: one function a batch; each makes one blocking call.
      named: turns a call's result into arrays: `y`, and for "train" also the gradients
        `x`, `w` and those of the LoRA arrays by name.
      result_bytes: the memory that a call's result takes.
    """

    calls: list[Callable[[], Any]]
    named: Callable[[Any], dict[str, np.ndarray]]
    result_bytes: Callable[[Any], int]


class Contender(abc.ABC):
    """One library: weights of one shape at a time, and any number of cases on them."""

    @abc.abstractmethod
    def load(self, shape: Shape) -> None:
        """Replaces the weights."""

    @abc.abstractmethod
    def prepare(self, case: Case) -> Prepared:
        """Compiles, without running."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees the weights."""


def create(family: str, threads: int | None = None) -> Contender:
    """The contender of a family; imports its library.

    Args:
      family: "ktjax", "xla" or "torch".
      threads: that compute; None for all CPUs. XLA takes all whatever is asked.
    """
    if family == "ktjax":
        return importlib.import_module("benchmarks.ktjax_contender").Ktjax(threads)
    if family == "xla":
        return importlib.import_module("benchmarks.xla_contender").Xla()
    if family == "torch":
        return importlib.import_module("benchmarks.torch_contender").Torch(threads)
    raise ValueError(f"family: expected ktjax, xla or torch, got {family!r}")
