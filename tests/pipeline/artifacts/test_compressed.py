"""compressed: which compression a file has, and zstd with long windows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hardbatch.pipeline.artifacts.compressed import open_decompressed, without_suffix
from hardbatch.pipeline.errors import InputError

CONTENT = random.Random(0).randbytes(5_000) * 40


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".ZSTD", ".bz2", ".xz"])
def test_the_suffix_of_a_compression_is_removed(suffix: str) -> None:
    assert without_suffix(f"a.b.jsonl{suffix}") == "a.b.jsonl"


def frame(window_log: int, size: int | None = None) -> bytes:
    """The header of a frame of zstd: with a window, or of a single segment of `size` bytes."""
    magic = b"\x28\xb5\x2f\xfd"
    header = bytes([0x00, (window_log - 10) << 3]) if size is None else bytes([0xE0]) + size.to_bytes(8, "little")
    return magic + header + bytes(20)


@pytest.mark.parametrize("header", [frame(31), frame(28), frame(0, 2**30)])
def test_a_long_window_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    (tmp_path / "a.zst").write_bytes(header)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a\.zst: is compressed with zstd --long=\d\d, .*pip install zstandard"):
        open_decompressed(tmp_path / "a.zst")


def test_long_windows_are_read_and_a_cut_is_noticed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_checksum=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(CONTENT) + compressor.flush()
    path = tmp_path / "a.zst"
    for times in (1, 2):  # frames may follow each other
        path.write_bytes(content * times)
        with open_decompressed(path) as stream:
            assert stream.read() == CONTENT * times
    for cut in (content[:-1], content[: len(content) // 2], content + content[:9]):
        path.write_bytes(cut)
        with pytest.raises(EOFError), open_decompressed(path) as stream:
            stream.read()
    path.write_bytes(content[:100] + bytes(100) + content[200:])
    with pytest.raises(OSError), open_decompressed(path) as stream:
        stream.read()
