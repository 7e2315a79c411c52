"""The factory, the configuration objects, the pool singleton and what modes refuse."""

import dataclasses
import inspect
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
from wrapper_support import TRAINING_REFUSED, arguments, make_wrapper, refuses

from ktjax import backend
from ktjax.config import LoRAConfig, MoEConfig
from ktjax.experts import KTMoEWrapper
from ktjax.experts_base import BaseMoEWrapper, _MoEBase
from ktjax.experts_inference import InferenceMoEWrapper
from ktjax.experts_sft import AMXSFTMoEWrapper, BaseSFTMoEWrapper


def test_signature_is_the_published_one():
    parameters = list(inspect.signature(KTMoEWrapper.__new__).parameters.values())[1:]
    assert [p.name for p in parameters] == [
        "layer_idx",
        "num_experts",
        "num_experts_per_tok",
        "hidden_size",
        "moe_intermediate_size",
        "num_gpu_experts",
        "cpuinfer_threads",
        "threadpool_count",
        "weight_path",
        "chunked_prefill_size",
        "cpu_save",
        "max_deferred_experts_per_token",
        "method",
        "mode",
        "lora_rank",
        "lora_alpha",
        "max_cache_depth",
        "group_size",
        "zero_point",
        "compute",
        "gpu_experts_mask",
    ]
    defaults = [p.default for p in parameters[10:]]
    assert defaults == [
        *(False, None, "AMXINT4", "inference", 16, 32.0, 1),
        *(None, False, None, None),
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[-4:])


def test_method_sets():
    assert sorted(KTMoEWrapper.INFERENCE_METHODS) == [
        "AMXINT4",
        "AMXINT8",
        "BF16",
        "FP8",
        "FP8_PERCHANNEL",
        "GPTQ_INT4",
        "LLAMAFILE",
        "MOE_INT4",
        "MOE_INT8",
        "MXFP4",
        "MXFP8",
        "RAWINT4",
    ]
    assert sorted(KTMoEWrapper.SFT_METHODS) == [
        "AMXBF16_SFT",
        "AMXFP8_SFT",
        "AMXINT4_KGroup_SFT",
        "AMXINT4_SFT",
        "AMXINT8_SFT",
        "AMXMXFP4_SFT",
        "AMXMXFP8_SFT",
        "GGUF_SFT",
        "RAWINT4_SFT",
    ]


def test_mode_is_checked_before_method():
    with refuses(ValueError, "Unknown mode: 'train'. Must be 'inference' or 'sft'."):
        KTMoEWrapper(**arguments(mode="train", method="nonsense"))


def test_method_must_belong_to_the_mode():
    with refuses(
        ValueError,
        "Method 'AMXBF16_SFT' is not supported in inference mode. Supported methods: "
        "['AMXINT4', 'AMXINT8', 'BF16', 'FP8', 'FP8_PERCHANNEL', "
        "'GPTQ_INT4', 'LLAMAFILE', 'MOE_INT4', 'MOE_INT8', 'MXFP4', "
        "'MXFP8', 'RAWINT4']",
    ):
        KTMoEWrapper(**arguments(mode="inference"))
    with refuses(
        ValueError,
        "Method 'AMXINT4' is not supported in SFT mode. Supported methods: "
        "['AMXBF16_SFT', 'AMXFP8_SFT', 'AMXINT4_KGroup_SFT', 'AMXINT4_SFT', "
        "'AMXINT8_SFT', 'AMXMXFP4_SFT', 'AMXMXFP8_SFT', 'GGUF_SFT', 'RAWINT4_SFT']",
    ):
        KTMoEWrapper(**arguments(method="AMXINT4"))


def test_method_is_checked_before_sizes():
    with pytest.raises(ValueError, match="not supported in SFT mode"):
        KTMoEWrapper(**arguments(method="nonsense", num_experts=0))


def test_bf16_sft_is_built():
    wrapper = KTMoEWrapper(**arguments())
    assert type(wrapper) is AMXSFTMoEWrapper
    assert isinstance(wrapper, BaseSFTMoEWrapper)
    assert wrapper.method == "AMXBF16_SFT"
    assert wrapper.lora_scaling == 2.0
    assert wrapper.max_cache_depth == 1
    assert wrapper.cpu_infer is backend.get_pool()


@pytest.mark.parametrize("method", sorted(KTMoEWrapper.INFERENCE_METHODS))
def test_inference_is_built(method):
    settings = arguments(
        mode="inference",
        method=method,
        cpu_save=method != "LLAMAFILE",
        max_deferred_experts_per_token=1,
    )
    wrapper = KTMoEWrapper(**settings)
    assert type(wrapper) is InferenceMoEWrapper
    assert isinstance(wrapper, BaseMoEWrapper)
    for name in ("layer_idx", "num_experts", "weight_path", "method", "cpu_save"):
        assert getattr(wrapper, name) == settings[name]
    assert wrapper.max_deferred_experts_per_token == 1
    assert wrapper.cpu_infer is backend.get_pool()


def test_the_default_is_inference_in_int4():
    settings = arguments()
    for name in ("mode", "method", "lora_rank", "lora_alpha"):
        del settings[name]
    wrapper = KTMoEWrapper(**settings)
    assert type(wrapper) is InferenceMoEWrapper
    assert wrapper.method == "AMXINT4"


def test_gguf_has_nothing_to_save():
    with refuses(
        ValueError,
        "cpu_save must be False for method 'LLAMAFILE': a GGUF file loads without a "
        "conversion, so there is nothing to save",
    ):
        KTMoEWrapper(**arguments(mode="inference", method="LLAMAFILE", cpu_save=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, "AMXINT4: group_size: expected None"),
        ({"zero_point": True}, "AMXINT4: zero_point: format 'int4' has none"),
        ({"compute": "fp16"}, "AMXINT4: compute: expected one of"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size must be positive, got 0"),
        ({"lora_rank": 0}, None),
    ],
)
def test_inference_settings_are_checked(change, message):
    settings = arguments(mode="inference", method="AMXINT4", **change)
    if message is None:  # a setting of training
        KTMoEWrapper(**settings)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        KTMoEWrapper(**settings)


def test_wrapper_class_refuses_unknown_method():
    sizes = {k: v for k, v in arguments().items() if k not in ("mode", "method")}
    with refuses(
        ValueError,
        "Unsupported method: FP8. Supported methods: "
        "['AMXBF16_SFT', 'AMXFP8_SFT', 'AMXINT4_KGroup_SFT', 'AMXINT4_SFT', "
        "'AMXINT8_SFT', 'AMXMXFP4_SFT', 'AMXMXFP8_SFT', 'GGUF_SFT', 'RAWINT4_SFT']",
    ):
        AMXSFTMoEWrapper(**sizes, method="FP8")


BAD_SIZES = [
    *[
        ({name: value}, f"{name} must be positive, got {value}")
        for name in (
            "num_experts",
            "hidden_size",
            "moe_intermediate_size",
            "num_experts_per_tok",
        )
        for value in (0, -3)
    ],
    ({"num_experts": 2.5}, "num_experts must be an integer, got 2.5"),
    ({"hidden_size": True}, "hidden_size must be an integer, got True"),
    (
        {"num_experts_per_tok": 6},
        "num_experts_per_tok (6) cannot exceed num_experts (5)",
    ),
]
BAD_SETTINGS = [
    ({"lora_rank": 0}, "lora_rank must be positive, got 0"),
    ({"lora_rank": 257}, "lora_rank must be at most 256, got 257"),
    ({"lora_alpha": 0.0}, "lora_alpha must be positive, got 0.0"),
    ({"lora_alpha": -1.0}, "lora_alpha must be positive, got -1.0"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be positive, got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be positive, got inf"),
    ({"max_cache_depth": 0}, "max_cache_depth must be positive, got 0"),
    ({"chunked_prefill_size": 0}, "chunked_prefill_size must be positive, got 0"),
    ({"cpuinfer_threads": 0}, "cpuinfer_threads must be positive, got 0"),
    ({"threadpool_count": 0}, "threadpool_count must be positive, got 0"),
    (
        {"num_gpu_experts": 1},
        "num_gpu_experts must be 0 in SFT mode, "
        "which computes every expert on the CPU, got 1",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_SIZES + BAD_SETTINGS)
def test_settings_are_checked(change, message):
    with refuses(ValueError, message):
        KTMoEWrapper(**arguments(**change))


def test_rank_256_is_allowed():
    wrapper = make_wrapper(weights=False, lora=False, lora_rank=256, lora_alpha=64)
    assert wrapper.lora_scaling == 0.25


@pytest.mark.parametrize(("change", "message"), BAD_SIZES)
def test_moe_config(change, message):
    good = {
        "num_experts": 5,
        "num_experts_per_tok": 5,
        "hidden_size": 1,
        "moe_intermediate_size": 1,
    }
    config = MoEConfig(**good)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 6  # type: ignore[misc]
    with refuses(ValueError, message):
        MoEConfig(**{**good, **change})


def test_lora_config():
    assert LoRAConfig() == LoRAConfig(rank=16, alpha=32.0)
    assert LoRAConfig(rank=8, alpha=4).scaling == 0.5
    with refuses(ValueError, "lora_rank must be at most 256, got 300"):
        LoRAConfig(rank=300)
    with refuses(ValueError, "lora_alpha must be positive, got 0"):
        LoRAConfig(alpha=0)


def test_pool_is_one_for_all_threads():
    config = backend.get_pool().config
    pools = []

    def ask():
        pools.append(
            _MoEBase._get_cpu_infer(config.threads_per_subpool, config.subpool_count)
        )

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pools) == 8
    assert len({id(pool) for pool in pools}) == 1


def test_another_pool_configuration_is_an_error():
    running = backend.get_pool()
    more = running.config.threads_per_subpool + 1
    with pytest.raises(RuntimeError, match=r"ktjax\.backend\.release_pool\(\)"):
        KTMoEWrapper(**arguments(cpuinfer_threads=more))
    assert backend.get_pool() is running


def test_released_pool_may_have_another_configuration():
    """In a process of its own: other tests' stores keep this one's pool."""
    program = """
from wrapper_support import arguments, base_arrays, inputs, lora_arrays
from ktjax import backend
from ktjax.config import PoolConfig
from ktjax.experts import KTMoEWrapper

backend.get_pool(PoolConfig(1, 1))
results = []
for threads, subpools in ((1, 1), (1, 2)):
    sizes = arguments(cpuinfer_threads=threads, threadpool_count=subpools)
    wrapper = KTMoEWrapper(**sizes)
    assert wrapper.cpu_infer.config == PoolConfig(threads, subpools)
    wrapper.load_weights_from_arrays(*base_arrays())
    wrapper.init_lora_weights(*lora_arrays())
    results.append(wrapper.forward_sft(*inputs(), save_for_backward=False))
    try:
        backend.release_pool()
    except RuntimeError as error:
        assert "stores still use" in str(error), error
    else:
        raise AssertionError("the pool went away under an open wrapper")
    wrapper.close()
    backend.release_pool()
    backend.get_pool(PoolConfig(1, 2))
assert abs(results[0] - results[1]).max() < 0.006 * abs(results[0]).max()
print("done")
"""
    tests = pathlib.Path(__file__).parent
    paths = [str(tests), str(tests.parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == "done\n", run.stderr


def test_invalid_sizes_do_not_touch_the_pool(monkeypatch):
    def started(config=None):
        raise AssertionError("the pool was asked for")

    sizes = arguments(num_experts=0)
    monkeypatch.setattr(backend, "get_pool", started)
    with refuses(ValueError, "num_experts must be positive, got 0"):
        KTMoEWrapper(**sizes)


class InferenceWrapper(BaseMoEWrapper):
    def load_weights(self, physical_to_logical_map=None):
        return None

    def load_weights_from_tensors(
        self, gate_proj, up_proj, down_proj, physical_to_logical_map=None
    ):
        return None

    def forward(self, hidden_states, expert_ids, weights):
        return hidden_states

    def submit_forward(self, hidden_states, expert_ids, weights):
        return None

    def sync_forward(self):
        return None


def inference_arguments(**changes):
    training = ("mode", "method", "lora_rank", "lora_alpha")
    every = arguments(**changes)
    return {name: value for name, value in every.items() if name not in training}


@pytest.mark.parametrize(("method", "message"), TRAINING_REFUSED.items())
def test_inference_refuses_training(method, message):
    wrapper = InferenceWrapper(**inference_arguments())
    with refuses(RuntimeError, message):
        getattr(wrapper, method)(1, anything=2)


def test_inference_base_is_abstract_and_checks_sizes():
    with pytest.raises(TypeError, match="abstract"):
        BaseMoEWrapper(**inference_arguments())  # type: ignore[abstract]
    with refuses(ValueError, "hidden_size must be positive, got 0"):
        InferenceWrapper(**inference_arguments(hidden_size=0))
    with refuses(ValueError, "num_gpu_experts must be within 0..5, got 6"):
        InferenceWrapper(**inference_arguments(num_gpu_experts=6))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "forward",
            "forward() is not available in SFT mode. Use forward_sft() instead.",
        ),
        (
            "submit_forward",
            "submit_forward() is not available in SFT mode. "
            "SFT mode uses synchronous forward_sft().",
        ),
        (
            "sync_forward",
            "sync_forward() is not available in SFT mode. "
            "SFT mode uses synchronous forward_sft().",
        ),
        (
            "select_deferred_experts",
            "select_deferred_experts() is not available in SFT mode. "
            "Use forward_sft(), which defers no expert.",
        ),
    ],
)
def test_training_refuses_inference(method, message):
    wrapper = make_wrapper(weights=False, lora=False)
    with refuses(RuntimeError, message):
        getattr(wrapper, method)(1, anything=2)
