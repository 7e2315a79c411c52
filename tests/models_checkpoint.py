"""Small random Qwen3-MoE checkpoints written by transformers, for the model tests."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rope_theta": 50_000.0,
    "eos_token_id": 1,
    "router_aux_loss_coef": 0.01,
}


def make_model(dtype="float32", seed=0, **changes):
    """A model whose weights are exact in bfloat16, larger than the usual start.

    Norm weights are random too, so that a swapped or forgotten one shows.
    """
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **changes})
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    return model.to(getattr(torch, dtype)).eval()


def save(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    return path


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()
