"""What inference and training wrappers share, and the base of the inference ones."""

from __future__ import annotations

import abc
import threading
from typing import Any, ClassVar, NoReturn

from flax import nnx

from ktjax import backend
from ktjax.config import MoEConfig, PoolConfig, check_positive

Array = Any


class _MoEBase:
    """The process-wide worker pool and the checks of the sizes."""

    _cpu_infer_lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _get_cpu_infer(
        cls, cpuinfer_threads: int, threadpool_count: int
    ) -> backend.Pool:
        """The worker pool of the process, started by the first who asks.

        The pool is not remembered here: `ktjax.backend` owns it, so that releasing it
        there leaves no second reference to a stopped pool.

        Args:
          cpuinfer_threads: threads of each sub-pool.
          threadpool_count: sub-pools; each computes a slice of the intermediate
            dimension.

        Raises:
          ValueError: a count that is not a positive integer.
          RuntimeError: the pool already runs with another configuration; the message
            names `ktjax.backend.release_pool()`.
        """
        check_positive("cpuinfer_threads", cpuinfer_threads)
        check_positive("threadpool_count", threadpool_count)
        with cls._cpu_infer_lock:
            return backend.get_pool(PoolConfig(cpuinfer_threads, threadpool_count))

    @classmethod
    def _validate_base_config(
        cls,
        num_experts: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts_per_tok: int,
    ) -> MoEConfig:
        """The layer's sizes as one checked object.

        Raises:
          ValueError: see `MoEConfig`.
        """
        return MoEConfig(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
        )


class BaseMoEWrapper(_MoEBase, nnx.Module):
    """Base of the inference wrappers; refuses what only training has.

    Args:
      layer_idx: index of the layer in the model.
      num_experts: experts of the layer.
      num_experts_per_tok: experts that each token is sent to.
      hidden_size: width of the layer's input and output.
      moe_intermediate_size: width of an expert's gate and up projections.
      num_gpu_experts: experts that an accelerator computes, 0 to `num_experts`.
      cpuinfer_threads: threads of each sub-pool of the worker pool.
      threadpool_count: sub-pools of the worker pool, one per NUMA node.
      weight_path: the checkpoint, a safetensors file or a directory of them.
      chunked_prefill_size: the most tokens of one forward.
      cpu_save: also save the converted weights for the next start.
      max_deferred_experts_per_token: experts of a token whose sum may come one layer
        late; None = none.

    Raises:
      ValueError: a size outside its limits.
      RuntimeError: the worker pool already runs with another configuration.
    """

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
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
    ) -> None:
        self._validate_base_config(
            num_experts, hidden_size, moe_intermediate_size, num_experts_per_tok
        )
        if not 0 <= num_gpu_experts <= num_experts:
            raise ValueError(
                f"num_gpu_experts must be within 0..{num_experts}, "
                f"got {num_gpu_experts}"
            )
        check_positive("chunked_prefill_size", chunked_prefill_size)
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
        self.cpu_save = cpu_save
        self.max_deferred_experts_per_token = max_deferred_experts_per_token

    @abc.abstractmethod
    def load_weights(self, physical_to_logical_map: Array | None = None) -> None:
        """Load the base weights; slot p of the layer holds expert map[p]."""

    @abc.abstractmethod
    def forward(self, hidden_states: Array, expert_ids: Array, weights: Array) -> Array:
        """The routed experts' sum, `[tokens, hidden]`."""

    @abc.abstractmethod
    def submit_forward(
        self, hidden_states: Array, expert_ids: Array, weights: Array
    ) -> None:
        """Start a forward and return at once."""

    @abc.abstractmethod
    def sync_forward(self) -> Array:
        """Wait for the forward that `submit_forward` started; its sum."""

    @abc.abstractmethod
    def select_deferred_experts(self, expert_ids: Array, weights: Array) -> Any:
        """Divide each token's slots in those of now and those of one layer later."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: training needs a wrapper with mode='sft'."""
        raise RuntimeError(
            "forward_sft() is not available in inference mode. "
            "Use forward() instead, or create wrapper with mode='sft'."
        )

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: training needs a wrapper with mode='sft'."""
        raise _sft_only("backward")

    def init_lora_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: training needs a wrapper with mode='sft'."""
        raise _sft_only("init_lora_weights")

    def update_lora_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: training needs a wrapper with mode='sft'."""
        raise _sft_only("update_lora_weights")


def _sft_only(method: str) -> RuntimeError:
    return RuntimeError(
        f"{method}() is not available in inference mode. "
        "Create wrapper with mode='sft' to use SFT features."
    )
