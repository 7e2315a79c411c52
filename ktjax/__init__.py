"""ktjax: LoRA fine-tuning of Mixture-of-Experts models, experts in host memory."""

from ktjax import backend, config, io, models, nn, quant, train
from ktjax.config import LoRAConfig, MoEConfig, PoolConfig
from ktjax.experts import KTMoEWrapper
from ktjax.experts_base import BaseMoEWrapper
from ktjax.experts_buffer import KExpertsCPUBuffer
from ktjax.experts_inference import InferenceMoEWrapper
from ktjax.experts_placement import generate_gpu_experts_masks
from ktjax.experts_sft import (
    AMXSFTMoEWrapper,
    BaseSFTMoEWrapper,
    KExpertsSFTBuffer,
)
from ktjax.lora import LinearLoRA, LoRA
from ktjax.ops import reference
from ktjax.ops.api import moe
from ktjax.ops.linear import linear
from ktjax.quant import Quantized
from ktjax.store import ExpertStore
from ktjax.store_linear import LinearStore

__version__ = "0.1.0"

__all__ = [
    "AMXSFTMoEWrapper",
    "BaseMoEWrapper",
    "BaseSFTMoEWrapper",
    "ExpertStore",
    "InferenceMoEWrapper",
    "KExpertsCPUBuffer",
    "KExpertsSFTBuffer",
    "KTMoEWrapper",
    "LinearLoRA",
    "LinearStore",
    "LoRA",
    "LoRAConfig",
    "MoEConfig",
    "PoolConfig",
    "Quantized",
    "backend",
    "config",
    "generate_gpu_experts_masks",
    "io",
    "linear",
    "models",
    "moe",
    "nn",
    "quant",
    "reference",
    "train",
]
