"""ktjax: LoRA fine-tuning of Mixture-of-Experts models, experts in host memory."""

from ktjax import backend, config
from ktjax.lora import LoRA
from ktjax.ops import reference
from ktjax.ops.api import moe
from ktjax.store import ExpertStore

__all__ = ["ExpertStore", "LoRA", "backend", "config", "moe", "reference"]
