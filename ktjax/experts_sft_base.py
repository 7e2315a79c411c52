"""Base of the training wrappers: configuration, adapters, and what is refused."""

from __future__ import annotations

import abc
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax import experts_state
from ktjax.config import LoRAConfig, check_positive
from ktjax.experts_base import _MoEBase
from ktjax.experts_state import StoreHandle
from ktjax.lora import LoRA

Array = Any

# In the order of LoRA.NAMES.
LORA_NAMES = tuple(f"{name[:-2]}_lora_{name[-1]}" for name in LoRA.NAMES)


class BaseSFTMoEWrapper(_MoEBase, nnx.Module):
    """Base of the training wrappers: configuration, adapters, and what is refused.

    Attributes:
      gate_lora_a: `nnx.LoRAParam` `[experts, rank, hidden]`, as is `up_lora_a`; all six
        are None before `init_lora_weights`.
      gate_lora_b: `nnx.LoRAParam` `[experts, intermediate, rank]`, as is `up_lora_b`.
      down_lora_a: `nnx.LoRAParam` `[experts, rank, intermediate]`.
      down_lora_b: `nnx.LoRAParam` `[experts, hidden, rank]`.
      lora_scaling: lora_alpha / lora_rank.

    Args:
      layer_idx: index of the layer in the model.
      num_experts: experts of the layer.
      num_experts_per_tok: experts that each token is sent to.
      hidden_size: width of the layer's input and output.
      moe_intermediate_size: width of an expert's gate and up projections.
      num_gpu_experts: must be 0, training computes every expert on the CPU.
      cpuinfer_threads: threads of each sub-pool of the worker pool.
      threadpool_count: sub-pools of the worker pool, one per NUMA node.
      weight_path: the checkpoint, a safetensors file or a directory of them.
      chunked_prefill_size: kept for the call sites that inference shares; a training
        forward takes any number of tokens.
      lora_rank: rank of the adapters, 1 to 256.
      lora_alpha: the adapters are scaled by lora_alpha / lora_rank.
      max_cache_depth: how many forwards may await their backward.

    Raises:
      ValueError: a setting outside its limits.
      RuntimeError: the worker pool already runs with another configuration.
    """

    gate_lora_a: nnx.LoRAParam | None
    gate_lora_b: nnx.LoRAParam | None
    up_lora_a: nnx.LoRAParam | None
    up_lora_b: nnx.LoRAParam | None
    down_lora_a: nnx.LoRAParam | None
    down_lora_b: nnx.LoRAParam | None

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int,
        cpuinfer_threads: int,
        threadpool_count: int,
        weight_path: str,
        chunked_prefill_size: int,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
    ) -> None:
        self._validate_base_config(
            num_experts, hidden_size, moe_intermediate_size, num_experts_per_tok
        )
        lora = self._validate_sft_config(lora_rank, lora_alpha, max_cache_depth)
        check_positive("chunked_prefill_size", chunked_prefill_size)
        if num_gpu_experts != 0:
            raise ValueError(
                "num_gpu_experts must be 0 in SFT mode, which computes every expert on "
                f"the CPU, got {num_gpu_experts}"
            )
        self._get_cpu_infer(cpuinfer_threads, threadpool_count)
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_gpu_experts = num_gpu_experts
        self.cpuinfer_threads = cpuinfer_threads
        self.threadpool_count = threadpool_count
        self.weight_path = str(weight_path)
        self.chunked_prefill_size = chunked_prefill_size
        self.lora_rank = lora.rank
        self.lora_alpha = float(lora.alpha)
        self.lora_scaling = lora.scaling
        self.max_cache_depth = max_cache_depth
        self.store_handle = StoreHandle(jnp.zeros(2, jnp.uint32))
        self._store_form: experts_state.StoreForm | None = None
        for name in LORA_NAMES:
            # None now, a parameter later: either way data, never part of jit's key.
            setattr(self, name, nnx.data(None))

    @staticmethod
    def _validate_sft_config(
        lora_rank: int, lora_alpha: float, max_cache_depth: int
    ) -> LoRAConfig:
        """The adapters' settings as one checked object.

        Raises:
          ValueError: see `LoRAConfig`; or a cache depth that is not a positive integer.
        """
        lora = LoRAConfig(lora_rank, lora_alpha)
        check_positive("max_cache_depth", max_cache_depth)
        return lora

    @property
    def lora(self) -> LoRA | None:
        """The adapters' present values, or None before `init_lora_weights`."""
        if not self._lora_initialized:
            return None
        return LoRA(*(getattr(self, name).get_value() for name in LORA_NAMES))

    @property
    def _weights_loaded(self) -> bool:
        return self._store_form is not None

    @property
    def _lora_initialized(self) -> bool:
        return getattr(self, LORA_NAMES[0]) is not None

    @property
    def _cache_depth(self) -> int:
        return len(experts_state.eager_state(self).saved)

    @abc.abstractmethod
    def load_weights(self, physical_to_logical_map: Array | None = None) -> None:
        """Load the base weights; slot p of the layer holds expert map[p]."""

    @abc.abstractmethod
    def init_lora_weights(self, *arrays: Array, **named: Any) -> None:
        """Set the six adapters and register them with the backend."""

    @abc.abstractmethod
    def forward_sft(
        self,
        hidden_states: Array,
        expert_ids: Array,
        weights: Array,
        save_for_backward: bool = True,
    ) -> jax.Array:
        """The routed experts' sum; eager."""

    @abc.abstractmethod
    def backward(self, grad_output: Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The gradients of the newest forward that awaits its backward; eager."""

    @abc.abstractmethod
    def update_lora_weights(self) -> None:
        """Register the present adapters with the backend."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: use `forward_sft`."""
        raise RuntimeError(
            "forward() is not available in SFT mode. Use forward_sft() instead."
        )

    def submit_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: use `forward_sft`."""
        raise RuntimeError(
            "submit_forward() is not available in SFT mode. "
            "SFT mode uses synchronous forward_sft()."
        )

    def sync_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: use `forward_sft`."""
        raise RuntimeError(
            "sync_forward() is not available in SFT mode. "
            "SFT mode uses synchronous forward_sft()."
        )

    def select_deferred_experts(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: every expert of a training step is computed at once."""
        raise RuntimeError(
            "select_deferred_experts() is not available in SFT mode. "
            "Use forward_sft(), which defers no expert."
        )

    def __getstate__(self) -> NoReturn:
        # Only pickle comes here; copies and clones go by split and merge.
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its expert weights live in this "
            "process's memory. Save nnx.state(wrapper, nnx.LoRAParam), build a new "
            "wrapper where it is needed, and load both."
        )
