"""A GGUF file with damaged bytes ends in one line, at once, or is imported. Nothing is left behind, and its claims cost no memory."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.gguf import bounded_reader, import_file
from megatron_salt.convert.import_weights import choose_dtype, pieces_of
from megatron_salt.errors import UserError
from tests.convert.gguf.gguf_files import CONFIGS, LAYERS, ROWS, random_tensors, write_gguf

MUTATIONS = 120


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file with quantised tensors."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write_gguf(path, CONFIGS["llama"], random_tensors(CONFIGS["llama"]), {"ffn_up.weight": "Q8_0"})
    return path.read_bytes()


Ending = Callable[[bytes], str]


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ending:
    """How the import of such bytes ends: the message of its refusal, or "" where every tensor could be read."""

    def read_all(weights, foreign, out, wanted, tokenizer, where, witness) -> None:  # type: ignore[no-untyped-def]
        for piece in pieces_of(weights, foreign, choose_dtype(weights.dtypes(), wanted, where), where):
            assert tuple(piece.load().shape) == piece.shape

    monkeypatch.setattr(import_file, "write_imported", read_all)
    path = tmp_path / "x.gguf"

    def end(bytes_: bytes) -> str:
        path.write_bytes(bytes_)
        began, message = time.process_time(), ""
        try:
            import_file.import_gguf(path, tmp_path / "out", None, TokenizerConfig(), verify=False)
        except UserError as error:
            message = str(error)
        assert time.process_time() - began < 10 and list(tmp_path.iterdir()) == [path]
        assert not message or (message.isprintable() and str(path) in message and len(message) < 1000), message
        return message

    return end


@pytest.mark.filterwarnings("error")
def test_any_damaged_byte_of_the_header_ends_in_one_line(content: bytes, ending: Ending, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    end = gguf.GGUFReader(tmp_path / "x.gguf").data_offset
    tokens, after = content.index(b"tokenizer.ggml.tokens"), content.index(b"tokenizer.ggml.eos_token_id")
    places = [*range(tokens + 60), *range(tokens + 60, after, 97), *range(after, end)]  # a list of tokens is alike throughout
    drawn = random.Random(0)
    assert ending(content) == ""
    ended = []
    for _ in range(MUTATIONS):
        at, size = drawn.choice(places), drawn.randrange(1, 9)
        new = drawn.choice(
            [bytes([content[at] ^ 1 << drawn.randrange(8)]), b"\xff" * size, bytes(size), drawn.randbytes(4), b""]
        )
        ended.append(ending(content[:at] + new + content[at + (len(new) or size) :]))
    assert any(ended) and not all(ended)


def entry(key: str, kind: int, value: bytes) -> bytes:
    """An entry of metadata."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def with_entry(content: bytes, added: bytes) -> bytes:
    """The file with one entry more in front of the others."""
    version, tensors, entries = struct.unpack_from("<IQQ", content, 4)
    return content[:4] + struct.pack("<IQQ", version, tensors, entries + 1) + added + content[24:]


def replaced(content: bytes, name: str, skip: int, new: bytes) -> bytes:
    """The file with other bytes `skip` bytes after the end of a name. The name is a key of the metadata or a tensor's."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + skip
    return content[:at] + new + content[at + len(new) :]


HUGE = 2**62
CLAIMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "tensors": (lambda c: c[:8] + struct.pack("<Q", HUGE) + c[16:], f"claims {HUGE} tensors"),
    "entries": (lambda c: c[:16] + struct.pack("<Q", HUGE) + c[24:], f"claims {HUGE} entries of metadata"),
    "a string": (lambda c: with_entry(c, entry("x", 8, struct.pack("<Q", HUGE))), "cut off"),
    "an array": (lambda c: with_entry(c, entry("x", 9, struct.pack("<IQ", 0, HUGE))), f"claims {HUGE} values in an array"),
    "arrays in arrays": (lambda c: with_entry(c, entry("x", 9, struct.pack("<IQ", 9, 1) * 5000)), "an array of values of type 9"),
    "an unknown type": (lambda c: with_entry(c, entry("x", 9, struct.pack("<IQ", 77, 1))), "an array of values of type 77"),
    "a key": (lambda c: with_entry(c, entry("x\n\x1b[2J", 4, bytes(4))), "a key that cannot be printed: 'x\\n\\x1b[2J'"),
    "a name": (lambda c: c.replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn\nnorm.weight"), "a tensor that cannot be printed"),
    "axes": (lambda c: replaced(c, "blk.0.ffn_up.weight", 0, struct.pack("<I", 2**30)), "cut off"),
    "no axes": (lambda c: replaced(c, "blk.0.ffn_up.weight", 4, struct.pack("<Q", 0)), "blk.0.ffn_up.weight has the shape [96, 0]"),
    "an overflow": (
        lambda c: replaced(c, "blk.0.ffn_up.weight", 4, struct.pack("<QQ", 2**32, 2**32)), "blk.0.ffn_up.weight ends at byte"
    ),
    "blocks": (lambda c: replaced(c, "blk.0.ffn_up.weight", 4, struct.pack("<Q", 63)), "has rows of 63 numbers"),
    "an offset": (lambda c: replaced(c, "blk.0.ffn_up.weight", 24, struct.pack("<Q", HUGE)), "blk.0.ffn_up.weight ends at byte"),
    "an offset that wraps": (
        lambda c: replaced(c, "blk.0.ffn_up.weight", 24, struct.pack("<Q", 2**64 - 64)), "blk.0.ffn_up.weight ends at byte"
    ),
    "an overlap": (lambda c: replaced(c, "blk.0.ffn_up.weight", 24, bytes(8)), "they overlap"),
    "layers": (
        lambda c: replaced(c, "llama.block_count", 4, struct.pack("<I", 2**32 - 1)),
        f"llama.block_count is {2**32 - 1}: the file has {LAYERS * 9 + 4} tensors",
    ),
    "no layers": (lambda c: replaced(c, "llama.block_count", 4, bytes(4)), "llama.block_count is 0"),
    "an alignment": (lambda c: with_entry(c, entry("general.alignment", 4, struct.pack("<I", 2**31))), "cut off"),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_a_scale_that_is_infinite_is_refused(content: bytes, ending: Ending, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    [tensor] = [each for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors if each.name == "blk.0.ffn_up.weight"]
    at = tensor.data_offset
    assert "not finite" in ending(content[:at] + struct.pack("<e", float("inf")) + bytes(4) + content[at + 6 :])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CLAIMS)
def test_a_claim_that_the_file_cannot_hold_is_refused(content: bytes, ending: Ending, case: str) -> None:
    damage, message = CLAIMS[case]
    assert message in ending(damage(content))


def test_the_metadata_of_a_large_file_has_a_limit_too(content: bytes, ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of bytes may be as long as the file, and the library makes an object for each."""
    monkeypatch.setattr(bounded_reader, "_MOST_VALUES", 3 * ROWS)
    added = entry("x", 9, struct.pack("<IQ", 0, 3 * ROWS) + bytes(3 * ROWS))
    assert f"at most {3 * ROWS} can be there" in ending(with_entry(content, added))
