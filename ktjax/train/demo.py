"""The end of the demo: what was learnt as files that others load, and shown to be so.

torch, transformers and PEFT are imported here where they are installed, to compare
with; nothing else of the package knows them.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax.io.adapters import AdapterError, write_adapter
from ktjax.io.merge import merge_checkpoint
from ktjax.models import Decoder
from ktjax.train.adapters import read_run

Array = np.ndarray[Any, Any]

_PEERS = ("torch", "transformers", "peft")
# Of the largest logit. With the adapter: float32 sums in other orders, of values in two
# bfloat16 parts. Merged weights are rounded to the checkpoint's bfloat16, 2^-9 each.
_ADAPTER_TOLERANCE = 1e-3
_MERGED_TOLERANCE = 2e-2


def finish_demo(
    model: Decoder,
    base: Path,
    output_dir: Path,
    say: Callable[[str], None],
    *,
    incomparable: str = "",
) -> None:
    """Export the adapter, merge it, and have PEFT and transformers load both.

    Writes `adapter/` and `merged/` in `output_dir`, in place of earlier ones.

    Args:
      model: the trained one.
      base: the directory that it was loaded from.
      output_dir: of the training.
      say: shows a line.
      incomparable: why `model` does not compute what PEFT and transformers do, in
        float32 with the values of `base`; empty if it does.

    Raises:
      AdapterError: their logits are others than those of `model`.
    """
    exported, merged = output_dir / "adapter", output_dir / "merged"
    adapter = read_run(output_dir)
    write_adapter(exported, adapter, model.config.model_type, replace=True)
    say(f"the adapter in PEFT's format: {exported}")
    shutil.rmtree(merged, ignore_errors=True)
    merge_checkpoint(base, adapter, merged)
    say(f"merged into the model, for transformers: {merged}")
    missing = [name for name in _PEERS if importlib.util.find_spec(name) is None]
    if missing or incomparable:
        reason = incomparable or f"no {', '.join(missing)} here"
        say(f"not compared with PEFT and transformers: {reason}")
        return
    ids = np.arange(24)[None] % model.config.vocab_size
    ours = _logits(model, ids)
    differences = []
    for who, path, adapter_path, tolerance in (
        ("PEFT with the adapter", base, exported, _ADAPTER_TOLERANCE),
        ("transformers with the merged model", merged, None, _MERGED_TOLERANCE),
    ):
        try:
            theirs = _logits_of_torch(path, adapter_path, ids)
        except Exception as error:  # of versions that are not known to work, say
            say(f"not compared with {who}: {type(error).__name__}: {error}")
            return
        difference = float(np.abs(theirs - ours).max() / np.abs(ours).max())
        if not difference <= tolerance:
            raise AdapterError(
                f"{adapter_path or path}: the logits of {who} differ from ktjax's by "
                f"{difference:.1e} of the largest, expected at most {tolerance:.0e}"
            )
        differences.append(f"{who}, {difference:.0e}")
    say(f"logits differ by, of the largest: {'; '.join(differences)}")


def _logits(model: Decoder, ids: Array) -> Array:
    model.eval()
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    logits = np.asarray(run(state, jnp.asarray(ids, jnp.int32)), np.float32)
    model.train()
    return logits


def _logits_of_torch(path: Path, adapter: Path | None, ids: Array) -> Array:
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # patterns of both fused layouts, of which one is
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        )
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        logits: Array = model.eval()(torch.from_numpy(ids)).logits.numpy()
    return logits
