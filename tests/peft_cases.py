"""transformers' models with adapters of PEFT, in float32."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from models_checkpoint import torch

# Before 0.19.1, PEFT loads neither layout into transformers 5's models.
writes_for_peft = pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:3])) < (0, 19, 1),
    reason=f"peft {peft.__version__} has other layouts",
)


def load_torch(path):
    """The model of a checkpoint, for evaluation."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def load_peft(path, adapter, **options):
    """The model with the adapter, and without PEFT finding anything missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(load_torch(path), adapter, **options)
    return model.eval()


def train_a_little(model, std=0.2):
    """Give every adapter values as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std, generator=generator)
    return model.eval()
