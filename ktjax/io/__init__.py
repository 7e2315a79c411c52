"""Readers and writers of checkpoints and adapters."""

from ktjax.io.adapters import Adapter, AdapterError, read_adapter, write_adapter
from ktjax.io.experts import ExpertWeights, load_experts, read_experts
from ktjax.io.gguf import GGUFCheckpoint
from ktjax.io.gguf_experts import read_gguf_experts
from ktjax.io.header import CheckpointError
from ktjax.io.merge import merge_checkpoint
from ktjax.io.safetensors import Checkpoint, save_file

__all__ = [
    "Adapter",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "ExpertWeights",
    "GGUFCheckpoint",
    "load_experts",
    "merge_checkpoint",
    "read_adapter",
    "read_experts",
    "read_gguf_experts",
    "save_file",
    "write_adapter",
]
