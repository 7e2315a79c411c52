"""What inference and training wrappers share, and the base of the inference ones."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax import backend
from ktjax.config import MoEConfig, PoolConfig, check_positive
from ktjax.experts_buffer import KExpertsCPUBuffer
from ktjax.experts_pending import DeferredSums
from ktjax.experts_placement import gpu_slots

Array = Any


class _MoEBase:
    """The process-wide worker pool and the checks of the sizes."""

    _cpu_infer_lock: ClassVar[threading.Lock] = threading.Lock()
    cpuinfer_threads: int
    threadpool_count: int

    @property
    def cpu_infer(self) -> backend.Pool:
        """The process-wide worker pool."""
        return self._get_cpu_infer(self.cpuinfer_threads, self.threadpool_count)

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
    """Base of the inference wrappers: settings, deferral, and what is refused.

    Attributes:
      gpu_experts: the slots that the accelerator computes, ascending.

    Args:
      layer_idx: index of the layer in the model.
      num_experts: experts of the layer.
      num_experts_per_tok: experts that each token is sent to.
      hidden_size: width of the layer's input and output.
      moe_intermediate_size: width of an expert's gate and up projections.
      num_gpu_experts: experts that an accelerator computes, 0 to `num_experts`: the
        first ones, unless `gpu_experts_mask` says which.
      cpuinfer_threads: threads of each sub-pool of the worker pool.
      threadpool_count: sub-pools of the worker pool, one per NUMA node.
      weight_path: the checkpoint, a safetensors file or a directory of them.
      chunked_prefill_size: the most tokens that are computed at once; more are computed
        in pieces, with the same result.
      cpu_save: also save the converted weights for the next start.
      max_deferred_experts_per_token: experts of a token whose sum comes one layer late,
        0 to `num_experts_per_tok`; None = 0.
      gpu_experts_mask: `[num_experts]` bool, a row of `generate_gpu_experts_masks`.

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
        *,
        gpu_experts_mask: Array | None = None,
    ) -> None:
        self._validate_base_config(
            num_experts, hidden_size, moe_intermediate_size, num_experts_per_tok
        )
        gpu_experts = gpu_slots(num_experts, num_gpu_experts, gpu_experts_mask)
        check_positive("chunked_prefill_size", chunked_prefill_size)
        deferred = max_deferred_experts_per_token or 0
        if not 0 <= deferred <= num_experts_per_tok:
            raise ValueError(
                "max_deferred_experts_per_token must be within "
                f"0..{num_experts_per_tok}, got {deferred}"
            )
        self._get_cpu_infer(cpuinfer_threads, threadpool_count)
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_gpu_experts = len(gpu_experts)
        self.gpu_experts = gpu_experts
        self.cpuinfer_threads = cpuinfer_threads
        self.threadpool_count = threadpool_count
        self.weight_path = str(weight_path)
        self.chunked_prefill_size = chunked_prefill_size
        self.cpu_save = cpu_save
        self.max_deferred_experts_per_token = deferred

    @abc.abstractmethod
    def load_weights(self, physical_to_logical_map: Array | None = None) -> None:
        """Load the base weights; slot p of the layer holds expert map[p]."""

    @abc.abstractmethod
    def load_weights_from_tensors(
        self,
        gate_proj: Array,
        up_proj: Array,
        down_proj: Array,
        physical_to_logical_map: Array | None = None,
    ) -> None:
        """Load the base weights from arrays; slot p holds expert map[p]."""

    @abc.abstractmethod
    def forward(
        self, hidden_states: Array, expert_ids: Array, weights: Array
    ) -> jax.Array:
        """The routed experts' sum, `[tokens, hidden]`."""

    @abc.abstractmethod
    def submit_forward(
        self, hidden_states: Array, expert_ids: Array, weights: Array
    ) -> None:
        """Start a forward and return at once."""

    @abc.abstractmethod
    def sync_forward(self) -> jax.Array:
        """Wait for the forward that `submit_forward` started; its sum."""

    def select_deferred_experts(
        self, expert_ids: Array, expert_scores: Array, protected_k: int
    ) -> tuple[jax.Array, jax.Array]:
        """Divide the slots in those of now and those of one layer later.

        Of each token the `protected_k` experts with the highest scores are of now (of
        equal scores the earlier slot), and with them every slot of an expert that is
        protected for some other token: its weights are read now in any case. Pure, so
        it works in jit too.

        Args:
          expert_ids: `[..., k]` integers; -1 skips a slot.
          expert_scores: `[..., k]` numbers, usually the routing weights.
          protected_k: how many, 0 to k.

        Returns:
          Two arrays like expert_ids, int32: (now, later). Each slot is in one of them,
          and -1 in the other.

        Raises:
          ValueError: shapes that differ, or protected_k outside its range.
        """
        ids, scores = jnp.asarray(expert_ids), jnp.asarray(expert_scores)
        if ids.shape != scores.shape or ids.ndim == 0:
            raise ValueError(
                "select_deferred_experts: expert_scores must have the shape of "
                f"expert_ids {ids.shape}, got {scores.shape}"
            )
        if not 0 <= protected_k <= ids.shape[-1]:
            raise ValueError(
                f"select_deferred_experts: protected_k must be within 0.."
                f"{ids.shape[-1]}, got {protected_k}"
            )
        return _divide(ids, scores, self.num_experts, protected_k)

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Keep the staging buffers of forwards of these numbers of tokens for reuse.

        Raises:
          ValueError: a size that is not a positive integer.
        """
        for size in capture_bs:
            check_positive("set_capture_batch_sizes: capture_bs", size)
        KExpertsCPUBuffer.capture(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """What `set_capture_batch_sizes` was given; empty before."""
        return list(KExpertsCPUBuffer.capture_bs)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the staging buffers, and forget deferred sums that no layer added.

        Forwards in flight keep what they use.
        """
        KExpertsCPUBuffer.clear_cache()
        DeferredSums.clear()

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


@functools.partial(jax.jit, static_argnums=(2, 3))
def _divide(
    ids: Array, scores: Array, num_experts: int, protected_k: int
) -> tuple[jax.Array, jax.Array]:
    """See `BaseMoEWrapper.select_deferred_experts`."""
    ids = ids.astype(jnp.int32)
    scores = jnp.where(ids < 0, -jnp.inf, scores.astype(jnp.float32))
    _, best = jax.lax.top_k(scores, protected_k)
    # One place more, for slots that are skipped.
    places = jnp.where(ids < 0, num_experts, ids)
    protected = jnp.zeros(num_experts + 1, bool)
    protected = protected.at[jnp.take_along_axis(places, best, -1)].set(True)
    now = protected[places]
    return jnp.where(now, ids, -1), jnp.where(now, -1, ids)
