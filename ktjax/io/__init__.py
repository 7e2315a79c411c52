"""Readers and writers of checkpoints."""

from ktjax.io.experts import load_experts
from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint, save_file

__all__ = ["Checkpoint", "CheckpointError", "load_experts", "save_file"]
