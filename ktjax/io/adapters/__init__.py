"""LoRA adapters, from and to the formats of PEFT and others."""

from ktjax.io.adapters.adapter import (
    Adapter,
    AdapterError,
    Place,
    Strength,
    ranges,
    said,
)
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
    "Place",
    "Strength",
    "inspect_adapter",
    "is_adapter",
    "ranges",
    "read_adapter",
    "said",
    "write_adapter",
]
