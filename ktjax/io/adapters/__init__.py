"""LoRA adapters of routed experts, from and to the formats of PEFT and others."""

from ktjax.io.adapters.adapter import Adapter, AdapterError, Strength, ranges
from ktjax.io.adapters.files import (
    AdapterInfo,
    inspect_adapter,
    is_adapter,
    read_adapter,
    write_adapter,
)

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterInfo",
    "Strength",
    "inspect_adapter",
    "is_adapter",
    "ranges",
    "read_adapter",
    "write_adapter",
]
