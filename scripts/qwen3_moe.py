"""The sizes of a Qwen3-MoE and its config.json, for the scripts that write one."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model whose layers all have experts.

    Attributes:
      layers: decoder layers.
      experts: routed experts of a layer.
      experts_per_token: experts that a token is sent to.
      hidden: width of the layers' input and output.
      intermediate: width of an expert.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: width of a head.
      vocab: tokens of the vocabulary.
    """

    layers: int
    experts: int
    experts_per_token: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def config(
        self,
        *,
        positions: int,
        theta: float,
        eps: float,
        eos: int | None,
        pad: int | None,
    ) -> dict[str, Any]:
        """The Hugging Face config.json.

        Args:
          positions: `max_position_embeddings`.
          theta: `rope_theta`.
          eps: `rms_norm_eps`.
          eos: the token that ends an answer.
          pad: the token of padding.
        """
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            # Of dense layers, of which there are none.
            "intermediate_size": 2 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": positions,
            "rms_norm_eps": eps,
            "rope_theta": theta,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "bos_token_id": None,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
        }
