"""The demo checkpoint and dataset that ship with the package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def demo_model() -> Path:
    """The Hugging Face directory of the demo model (scripts/make_demo_model.py)."""
    return _HERE / "demo_model"


def demo_data(split: str) -> Path:
    """The JSONL file of `split`, "train" or "eval" (scripts/make_demo_data.py).

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'demo_data: split must be "train" or "eval", got {split!r}')
    return _HERE / "demo_data" / f"{split}.jsonl"
