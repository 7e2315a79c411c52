"""Readers and writers of checkpoints."""

from ktjax.io.experts import load_experts
from ktjax.io.safetensors import Checkpoint, CheckpointError, save_file

__all__ = ["Checkpoint", "CheckpointError", "load_experts", "save_file"]
