"""The layer that the benchmarks' tests time."""

from __future__ import annotations

from benchmarks.shapes import Shape

TINY = Shape("tiny", "no model", experts=8, k=2, hidden=64, intermediate=32)
