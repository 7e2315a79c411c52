"""KTMoEWrapper: one constructor for every wrapper."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ktjax import experts_inference
from ktjax.experts_base import BaseMoEWrapper
from ktjax.experts_inference import InferenceMoEWrapper
from ktjax.experts_sft import AMXSFTMoEWrapper, BaseSFTMoEWrapper

Array = Any


class KTMoEWrapper:
    """Makes the wrapper of one layer of routed experts: method name -> class.

        wrapper = KTMoEWrapper(..., method="AMXINT4")
        wrapper = KTMoEWrapper(..., method="AMXBF16_SFT", mode="sft", lora_rank=16)

    Attributes:
      INFERENCE_METHODS: methods of mode "inference".
      SFT_METHODS: methods of mode "sft".
    """

    INFERENCE_METHODS: ClassVar[frozenset[str]] = frozenset(experts_inference.METHODS)
    SFT_METHODS: ClassVar[frozenset[str]] = frozenset(AMXSFTMoEWrapper.METHODS)

    set_capture_batch_sizes = staticmethod(BaseMoEWrapper.set_capture_batch_sizes)
    get_capture_batch_sizes = staticmethod(BaseMoEWrapper.get_capture_batch_sizes)
    clear_buffer_cache = staticmethod(BaseMoEWrapper.clear_buffer_cache)

    def __new__(  # type: ignore[misc]
        cls,
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
        method: str = "AMXINT4",
        mode: str = "inference",
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        *,
        group_size: int | None = None,
        zero_point: bool = False,
        compute: Literal["bf16", "int8"] | None = None,
        gpu_experts_mask: Array | None = None,
    ) -> BaseMoEWrapper | BaseSFTMoEWrapper:
        """Make a wrapper.

        Args:
          layer_idx: index of the layer in the model.
          num_experts: experts of the layer.
          num_experts_per_tok: experts that each token is sent to.
          hidden_size: width of the layer's input and output.
          moe_intermediate_size: width of an expert's gate and up projections.
          num_gpu_experts: experts that an accelerator computes, the first ones; 0 in
            mode "sft".
          cpuinfer_threads: threads of each sub-pool of the worker pool.
          threadpool_count: sub-pools of the worker pool, one per NUMA node.
          weight_path: the checkpoint, a safetensors file or a directory of them; or
            likewise of GGUF, which methods "LLAMAFILE" and "GGUF_SFT" need.
          chunked_prefill_size: mode "inference" only: the most tokens that are computed
            at once; more are computed in pieces, with the same result.
          cpu_save: mode "inference" only: also save the converted weights.
          max_deferred_experts_per_token: mode "inference" only: experts of a token
            whose sum comes one layer late; None = 0.
          method: storage format and kernels; one of the mode's set.
          mode: "inference" or "sft".
          lora_rank: mode "sft" only: rank of the adapters, 1 to 256.
          lora_alpha: mode "sft" only: the adapters are scaled by
            lora_alpha / lora_rank.
          max_cache_depth: mode "sft" only: how many forwards may await their
            backward.
          group_size: methods "AMXINT4_KGroup_SFT" and "GPTQ_INT4" only: 32, 64 or 128
            depths to a scale; None = what the checkpoint has, or else 128.
          zero_point: the same methods only: quantise with zero points.
          compute: "bf16", "int8" or None, as in `ktjax.moe`; None in mode "inference" =
            as the method says.
          gpu_experts_mask: mode "inference" only: which experts an accelerator
            computes, `[num_experts]` bool, a row of `generate_gpu_experts_masks`.

        Returns:
          A `BaseMoEWrapper` in mode "inference", a `BaseSFTMoEWrapper` in mode "sft".

        Raises:
          ValueError: an unknown mode, a method outside the mode's set, or a setting
            outside its limits.
          RuntimeError: the worker pool already runs with another configuration.
        """
        if mode not in ("inference", "sft"):
            raise ValueError(f"Unknown mode: '{mode}'. Must be 'inference' or 'sft'.")
        supported = cls.INFERENCE_METHODS if mode == "inference" else cls.SFT_METHODS
        if method not in supported:
            name = "inference" if mode == "inference" else "SFT"
            raise ValueError(
                f"Method '{method}' is not supported in {name} mode. "
                f"Supported methods: {sorted(supported)}"
            )
        shared: dict[str, Any] = dict(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            num_gpu_experts=num_gpu_experts,
            cpuinfer_threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            weight_path=weight_path,
            chunked_prefill_size=chunked_prefill_size,
            method=method,
            group_size=group_size,
            zero_point=zero_point,
            compute=compute,
        )
        if mode == "inference":
            return InferenceMoEWrapper(
                **shared,
                cpu_save=cpu_save,
                max_deferred_experts_per_token=max_deferred_experts_per_token,
                gpu_experts_mask=gpu_experts_mask,
            )
        if gpu_experts_mask is not None:
            raise ValueError(
                "gpu_experts_mask must be None in SFT mode, which computes every "
                "expert on the CPU"
            )
        return AMXSFTMoEWrapper(
            **shared,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            max_cache_depth=max_cache_depth,
        )
