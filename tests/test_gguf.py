"""Reading GGUF files: what is right is read, and what is wrong is one clear error."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from gguf_cases import NUMBERS, Tensor, tensor, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.blocks import random_blocks
from ktjax.io import CheckpointError, GGUFCheckpoint
from ktjax.io.gguf import GGUFFile, is_gguf
from ktjax.io.gguf_header import TYPES


def numbers(dtype, shape=(2, 3, 4)):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def some_tensors():
    return {
        "norm": tensor(numbers(np.float32, (5,))),
        "experts": tensor(random_blocks("q4_k", (2, 3, 256)), "q4_k"),
        "bias": tensor(numbers(ml_dtypes.bfloat16, (3, 7))),
    }


METADATA = {"general.name": "tiny", "tokens": ["a", "ü", ""], "layers": 3}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_reads_what_was_written(tmp_path, version, alignment):
    tensors = some_tensors()
    path = tmp_path / "a.gguf"
    write_gguf(path, tensors, METADATA, version=version, alignment=alignment)
    file = GGUFCheckpoint(path)
    assert list(file) == list(tensors)
    assert METADATA.items() <= file.metadata.items()
    for name, (_, shape, data) in tensors.items():
        assert file.descriptor(name).shape == shape
        assert file[name].tobytes() == data
    assert file["bias"].dtype == ml_dtypes.bfloat16
    assert file["experts"].shape == (2, 3, 144)
    # Views of the file, not copies.
    for name in tensors:
        assert not file[name].flags.writeable
        assert not file[name].flags.owndata


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_their_dtype(tmp_path, name):
    want = numbers(NUMBERS[name][1])
    file = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", {"t": tensor(want)}))
    np.testing.assert_array_equal(file["t"], want)
    assert file["t"].dtype == want.dtype


def test_types_are_those_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    for type, (block, size) in gguf.GGML_QUANT_SIZES.items():
        # Q8_1 is of activations; the package counts its halves as float32.
        if type.name != "Q8_1" and int(type) in TYPES:
            assert TYPES[int(type)] == (type.name, block, size)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_uint64("big", 2**63)
    writer.add_bool("yes", True)
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_array("words", ["x", "yz"])
    blocks = random_blocks("q6_k", (2, 5, 512))
    writer.add_tensor("a", numbers(np.float16))
    writer.add_tensor("b", blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFCheckpoint(tmp_path / "a.gguf")
    assert file.metadata["big"] == 2**63
    assert file.metadata["yes"] is True
    assert file.metadata["numbers"].tolist() == [1.5, -2.0]
    assert file.metadata["words"] == ["x", "yz"]
    assert file.descriptor("b").shape == (2, 5, 512)
    np.testing.assert_array_equal(file["a"], numbers(np.float16))
    np.testing.assert_array_equal(file["b"], blocks)


def parts_of(tmp_path, count=3):
    return [tmp_path / f"m-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def test_parts_of_a_model_are_one(tmp_path):
    parts = parts_of(tmp_path)
    for number, path in enumerate(parts):
        write_gguf(path, {f"t{number}": tensor(numbers(np.float32))})
    for path in (tmp_path, parts[0], parts[2]):
        assert list(GGUFCheckpoint(path)) == ["t0", "t1", "t2"]
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of .* 3 parts .* m-00002-of"):
        GGUFCheckpoint(parts[0])


def test_files_of_two_models_are_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, {"t": tensor(numbers(np.float32))})
    with pytest.raises(CheckpointError, match=r"of one model, got \['a.gguf', 'b"):
        GGUFCheckpoint(tmp_path)
    for path in parts_of(tmp_path, 2):
        write_gguf(path, {"t": tensor(numbers(np.float32))})
    with pytest.raises(CheckpointError, match="tensor 't' is in both m-00001"):
        GGUFCheckpoint(parts_of(tmp_path, 2)[0])


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.gguf: no such file"):
        GGUFCheckpoint(tmp_path / "no.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no \.gguf file"):
        GGUFCheckpoint(tmp_path)
    assert not is_gguf(tmp_path)
    path = write_gguf(tmp_path / "a.gguf", {"t": tensor(numbers(np.float32))})
    assert is_gguf(tmp_path)
    assert is_gguf(path)
    with pytest.raises(KeyError, match="no tensor 'u' among 1"):
        GGUFCheckpoint(path)["u"]
    (tmp_path / "model.safetensors").touch()
    assert not is_gguf(tmp_path)


F32 = bytes(4 * 24)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t": Tensor(99, (4,), F32)}, "unknown type number 99"),
        ({"t": Tensor(4, (4,), F32)}, "unknown type number 4"),
        ({"t": Tensor(0, (), F32)}, "1 to 4 dimensions, got 0"),
        ({"t": Tensor(0, (1,) * 5, F32)}, "1 to 4 dimensions, got 5"),
        ({"t": Tensor(0, (0, 4), F32)}, r"shape \[0, 4\]"),
        ({"t": Tensor(0, (2**60,), F32)}, "truncated or its header is wrong"),
        ({"t": Tensor(0, (2**40, 2**40), F32)}, r"no tensor can have the shape"),
        ({"t": Tensor(12, (3, 255), F32)}, "a multiple of 256 weights"),
        ({"t": Tensor(0, (25,), F32), "u": Tensor(0, (24,), F32)}, "overlap"),
        ({"t": Tensor(0, (25,), F32)}, "takes 100 bytes at offset 0, .* 96 bytes"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, tensors, message):
    path = write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def header(tensors=0, pairs=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def key(text=b"k"):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: the magic takes 4 bytes"),
        (b"GGUF\3\0", "truncated: the version"),
        (header(magic=b"GGML"), "not a GGUF file"),
        (header(version=1), "expected GGUF version 2 or 3, little-endian, got 1"),
        (header(version=3 << 24), "a big-endian file"),
        (header(tensors=2**60), f"{2**60} tensors cannot be in the 8 bytes"),
        (header(pairs=2**60), f"{2**60} metadata pairs cannot be in the 0 bytes"),
        (header(pairs=1) + struct.pack("<Q", 2**60) + b"123456", f"{2**60} bytes of a"),
        (header(pairs=1) + key(b"\xff") + bytes(12), "is not UTF-8"),
        (header(pairs=1) + key() + struct.pack("<I", 77), "an unknown type, 77"),
        (header(pairs=1) + key() + struct.pack("<II", 9, 9), "an array of type 9"),
        (
            header(pairs=1) + key() + struct.pack("<IIQ", 9, 4, 2**60),
            f"{2**60} values of metadata 'k' cannot",
        ),
        (
            header(pairs=1) + key() + struct.pack("<IIQ", 9, 8, 2**60),
            f"{2**60} strings of metadata 'k' cannot",
        ),
        (header(pairs=2) + 2 * (key() + b"\0\0\0\0\7"), "'k' appears twice"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


@pytest.mark.parametrize("alignment", [0, 24, 2**21, "32"])
def test_wrong_alignments_are_refused(tmp_path, alignment):
    metadata = {"general.alignment": alignment}
    path = write_gguf(tmp_path / "a.gguf", some_tensors(), metadata)
    with pytest.raises(CheckpointError, match=r"general\.alignment: expected a power"):
        GGUFFile(path)


def test_offsets_are_multiples_of_the_alignment(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", some_tensors(), {"general.alignment": 128})
    with pytest.raises(
        CheckpointError, match="no multiple of the file's alignment 128"
    ):
        GGUFFile(path)


def test_every_truncation_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", some_tensors(), METADATA)
    whole = path.read_bytes()
    # The last bytes are padding.
    needed = GGUFFile(path).tensors["bias"].stop
    for size in {*range(0, needed, 7), needed - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|cannot be in the"):
            GGUFFile(path)
    path.write_bytes(whole[:needed])
    GGUFFile(path)


# What a damaged or hostile file has where numbers should be.
ODD_NUMBERS = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 400), st.integers(0, 255)),
        st.tuples(st.just("number"), st.integers(0, 400), ODD_NUMBERS),
        st.tuples(st.just("cut"), st.integers(0, 2000), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(damage=DAMAGE)
def test_damaged_files_give_one_clear_error(tmp_path_factory, damage):
    """Bytes and numbers of the header set to anything, and files cut off."""
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    content = bytearray(write_gguf(path, some_tensors(), METADATA).read_bytes())
    for kind, at, value in damage:
        if kind == "byte":
            content[at % len(content)] = value
        elif kind == "number":
            content[at : at + 8] = struct.pack("<Q", value)
        else:
            del content[at:]
        if not content:
            break
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except CheckpointError:
        return
    for name in file.tensors:
        file[name].tobytes()
