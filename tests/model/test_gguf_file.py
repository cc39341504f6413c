"""The GGUF container: header values, block decoding, and damaged files."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from cabochon.errors import UserError
from cabochon.model.gguf_file import LazyTensor, read_header

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Every metadata type and one [300, 64] tensor per block format; F32 last."""
    path = tmp_path / "all.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_int8("a.i8", -3)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 🙂")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["x", "", "yé"])
    writer.add_array("a.one", [7])
    rng = np.random.default_rng(0)
    for name in reversed(KINDS):
        kind = GGMLQuantizationType[name]
        data = quantize(rng.standard_normal((300, 64)).astype(np.float32), kind)
        writer.add_tensor(f"t.{name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_what_was_written(file: Path) -> None:
    got = read_header(file).metadata
    assert got["general.architecture"] == "llama"
    assert {k: got[k] for k in got if k.startswith("a.")} == {
        "a.u64": 1 << 40,
        "a.i8": -3,
        "a.f32": 0.5,
        "a.bool": True,
        "a.text": "naïve 🙂",
        "a.numbers": [1, 2, 3],
        "a.texts": ["x", "", "yé"],
        "a.one": [7],
    }


def test_tensors_equal_the_gguf_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of every block format, read in many small pieces, equal to GGUFReader + dequantize of the whole."""
    monkeypatch.setattr("cabochon.model.gguf_file._CHUNK", 64 * 7)
    header = read_header(file)
    for tensor in GGUFReader(file).tensors:
        want = dequantize(tensor.data, tensor.tensor_type)
        info = header.tensors[tensor.name]
        lazy = LazyTensor(path=file, name=tensor.name, info=info)
        assert (lazy.shape, info.offset, info.n_bytes) == ((300, 64), tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(lazy(), want)
        np.testing.assert_array_equal(lazy(ml_dtypes.bfloat16), want.astype(ml_dtypes.bfloat16))


def test_rotary_rows_are_put_back_in_halves(file: Path) -> None:
    """300 rows as 5 heads of 60: llama.cpp's row 2j + s of a head is half-split row s * 30 + j."""
    header = read_header(file)
    stored = LazyTensor(path=file, name="t.F32", info=header.tensors["t.F32"])()
    got = LazyTensor(path=file, name="t.F32", info=header.tensors["t.F32"], rotary_heads=5)()
    for head in range(5):
        for j in range(30):
            for s in range(2):
                np.testing.assert_array_equal(got[head * 60 + s * 30 + j], stored[head * 60 + 2 * j + s])


def test_any_cut_is_one_line_naming_the_file_and_the_place(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    end = max(t.offset + t.n_bytes for t in read_header(file).tensors.values())
    start = min(t.offset for t in read_header(file).tensors.values())
    for size in [0, 3, 4, 7, 23, *range(24, start, 29), *range(start, end, 4999), end - 1]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            read_header(cut)
        line = str(caught.value)
        assert line.startswith(f"{cut}: ")
        assert "\n" not in line
        assert "truncated GGUF" in line or size < 24
    assert f"tensor t.F32 ends at byte {end:,} but the file has {end - 1:,}; fetch it again" in line
    where = whole.index(b"a.numbers") + 9 + 4 + 4 + 8 + 5  # inside the second of its three numbers
    cut.write_bytes(whole[:where])
    with pytest.raises(UserError, match=r"the file ends inside metadata key a.numbers"):
        read_header(cut)


def test_damaged_headers_never_escape_as_another_error(file: Path, tmp_path: Path) -> None:
    """300 random bytes changed one at a time: read, or refused with a UserError."""
    whole = bytearray(file.read_bytes())
    end = min(t.offset for t in read_header(file).tensors.values())
    rng = np.random.default_rng(1)
    bad = tmp_path / "bad.gguf"
    refused = 0
    for at in rng.integers(0, end, 300):
        changed = whole.copy()
        changed[at] ^= int(rng.integers(1, 256))
        bad.write_bytes(changed)
        try:
            read_header(bad)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 100


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(UserError, match=r"x.gguf: cannot be read: No such file"):
        read_header(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="not a GGUF file"):
        read_header(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(UserError, match=r"GGUF version 50331648, expected 2 or 3"):
        read_header(path)
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"split.count=3: one part of several; join them"):
        read_header(path)
