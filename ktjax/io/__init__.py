"""Readers and writers of checkpoints."""

from ktjax.io.experts import ExpertWeights, load_experts, read_experts
from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint, save_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExpertWeights",
    "load_experts",
    "read_experts",
    "save_file",
]
