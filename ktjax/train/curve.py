"""The curve of a training's losses: a picture, and a line of text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ktjax.train.metrics import read_metrics

_BARS = "▁▂▃▄▅▆▇█"


def draw_curve(metrics: Path, picture: Path) -> bool:
    """Draw the losses in a metrics.jsonl, of every step and of the evaluations.

    Args:
      metrics: the file to read.
      picture: the PNG to write; appears whole, or stays as it was.

    Returns:
      Whether it was drawn: False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"linewidth": 1.0}),
        ("eval_loss", "evaluation", {"marker": "o", "linewidth": 1.5}),
    ):
        points = read_metrics(metrics, name)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, picture)
    return True


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """At most `width` characters whose heights are the means of runs of `values`.

    The lowest is the smallest mean, the highest the largest; values that are not finite
    are left out.
    """
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if not finite.size:
        return ""
    parts = np.array_split(finite, min(width, finite.size))
    heights = np.asarray([part.mean() for part in parts])
    low, high = heights.min(), heights.max()
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round(float(h - low) * scale)] for h in heights)
