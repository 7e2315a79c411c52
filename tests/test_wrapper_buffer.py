"""KExpertsSFTBuffer: alignment, sharing, growth."""

import threading

import ml_dtypes
import numpy as np
import pytest

from ktjax.experts_buffer import ALIGNMENT, aligned_empty
from ktjax.experts_sft import KExpertsSFTBuffer

GEOMETRY = {
    "hidden_size": 24,
    "moe_intermediate_size": 20,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "lora_rank": 3,
}
TOKEN_ARRAYS = {
    "input_cpu": 24,
    "output_cpu": 24,
    "grad_output_cpu": 24,
    "grad_input_cpu": 24,
    "expert_ids_cpu": 2,
    "weights_cpu": 2,
}


@pytest.fixture(autouse=True)
def _empty_cache():
    KExpertsSFTBuffer.clear_cache()
    yield
    KExpertsSFTBuffer.clear_cache()


def test_every_array_is_aligned_and_shaped():
    buffer = KExpertsSFTBuffer.get_buffer(qlen=9, **GEOMETRY)
    assert buffer.capacity == 16
    for name, width in TOKEN_ARRAYS.items():
        array = getattr(buffer, name)
        assert array.shape == (16, width), name
        assert array.ctypes.data % ALIGNMENT == 0, name
    assert buffer.input_cpu.dtype == ml_dtypes.bfloat16
    assert buffer.expert_ids_cpu.dtype == np.int32
    assert buffer.weights_cpu.dtype == np.float32


@pytest.mark.parametrize("shape", [(1,), (3, 5), (129, 2), ()])
def test_aligned_empty(shape):
    for _ in range(8):
        array = aligned_empty(shape, np.float32)
        assert array.shape == shape
        assert array.ctypes.data % ALIGNMENT == 0
        array[...] = 1.0


def test_lora_grads_have_the_six_names_and_shapes():
    grads = KExpertsSFTBuffer.get_buffer(qlen=1, **GEOMETRY).get_lora_grads()
    assert {name: array.shape for name, array in grads.items()} == {
        "grad_gate_lora_a": (5, 3, 24),
        "grad_gate_lora_b": (5, 20, 3),
        "grad_up_lora_a": (5, 3, 24),
        "grad_up_lora_b": (5, 20, 3),
        "grad_down_lora_a": (5, 3, 20),
        "grad_down_lora_b": (5, 24, 3),
    }
    for array in grads.values():
        assert array.dtype == np.float32
        assert array.ctypes.data % ALIGNMENT == 0


def test_lora_grads_are_the_buffers_themselves():
    buffer = KExpertsSFTBuffer.get_buffer(qlen=1, **GEOMETRY)
    buffer.get_lora_grads()["grad_up_lora_a"][...] = 7.0
    assert (buffer.get_lora_grads()["grad_up_lora_a"] == 7.0).all()


def test_same_geometry_is_one_buffer_and_dtype_another():
    first = KExpertsSFTBuffer.get_buffer(qlen=4, **GEOMETRY)
    assert KExpertsSFTBuffer.get_buffer(qlen=3, **GEOMETRY) is first
    other = KExpertsSFTBuffer.get_buffer(qlen=4, **GEOMETRY, dtype=np.float32)
    assert other is not first
    assert other.input_cpu.dtype == np.float32


def test_a_hundred_lengths_do_not_grow_it():
    longest = 1000
    lengths = np.random.default_rng(0).permutation(np.arange(1, longest + 1))[:100]
    for qlen in lengths:
        buffer = KExpertsSFTBuffer.get_buffer(qlen=int(qlen), **GEOMETRY)
        assert qlen <= buffer.capacity <= 1024
    assert len(KExpertsSFTBuffer.capture_buffers) == 1
    assert buffer.nbytes <= KExpertsSFTBuffer(1024, **GEOMETRY).nbytes


def test_growth_is_in_place_and_earlier_views_stay_valid():
    buffer = KExpertsSFTBuffer.get_buffer(qlen=2, **GEOMETRY, dtype=np.float32)
    view = buffer.input_cpu[:2]
    view[...] = 3.0
    assert KExpertsSFTBuffer.get_buffer(qlen=50, **GEOMETRY, dtype=np.float32) is buffer
    assert buffer.capacity == 64
    buffer.input_cpu[...] = 0.0
    assert (view == 3.0).all()


def test_cache_is_bounded_and_drops_the_least_recently_used():
    def get(hidden):
        return KExpertsSFTBuffer.get_buffer(1, **{**GEOMETRY, "hidden_size": hidden})

    limit = KExpertsSFTBuffer.MAX_BUFFERS
    buffers = [get(hidden) for hidden in range(1, limit + 1)]
    assert get(1) is buffers[0]
    get(limit + 1)
    assert len(KExpertsSFTBuffer.capture_buffers) == limit
    assert get(1) is buffers[0]
    assert get(2) is not buffers[1]


def test_clear_cache():
    first = KExpertsSFTBuffer.get_buffer(qlen=4, **GEOMETRY)
    KExpertsSFTBuffer.clear_cache()
    assert not KExpertsSFTBuffer.capture_buffers
    assert KExpertsSFTBuffer.get_buffer(qlen=4, **GEOMETRY) is not first


def test_zero_tokens_and_negative():
    assert KExpertsSFTBuffer.get_buffer(qlen=0, **GEOMETRY).input_cpu[:0].size == 0
    with pytest.raises(ValueError, match="qlen must be at least 0, got -1"):
        KExpertsSFTBuffer.get_buffer(qlen=-1, **GEOMETRY)


def test_get_buffer_from_many_threads():
    start = threading.Barrier(8)
    seen, errors = set(), []

    def work(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        try:
            for qlen in map(int, rng.integers(1, 300, size=60)):
                buffer = KExpertsSFTBuffer.get_buffer(
                    qlen=qlen, **GEOMETRY, dtype=np.float32
                )
                seen.add(id(buffer))
                with buffer.lock:
                    rows = buffer.input_cpu[:qlen]
                    assert rows.shape == (qlen, 24)
                    rows[...] = seed
                    np.add(rows, 1, out=buffer.output_cpu[:qlen])
                    assert (buffer.output_cpu[:qlen] == seed + 1).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(seen) == 1
