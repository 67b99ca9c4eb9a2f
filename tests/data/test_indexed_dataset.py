"""Opening a .bin/.idx pair: damaged files are refused by name and numbers."""

from __future__ import annotations

import os

import pytest

from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.errors import UserError
from tests.support.datasets import WriteDataset

DOCUMENTS = [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0], [10]]  # 13 tokens


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(path: str, change: int) -> None:
    os.truncate(path, os.path.getsize(path) + change)


# DOCUMENTS: header 34 bytes, 4 lengths at 34, 4 pointers at 50, 5 boundaries at 82; .idx 122 bytes, .bin 26 bytes.
DAMAGE = {
    "no .bin": (lambda p: os.remove(p + ".bin"), "web.bin does not exist"),
    "no .idx": (lambda p: os.remove(p + ".idx"), "web.idx does not exist"),
    ".bin truncated": (lambda p: cut(p + ".bin", -2), "web.bin is truncated: it has 24 bytes, .* 13 uint16 tokens, 26 bytes"),
    ".bin empty": (lambda p: os.truncate(p + ".bin", 0), "web.bin is truncated: it has 0 bytes"),
    ".bin too long": (lambda p: cut(p + ".bin", 3), "web.bin is longer than its index says: it has 29 bytes"),
    "bad magic": (lambda p: overwrite(p + ".idx", 0, b"MMIDIDY"), "web.idx is not a Megatron index"),
    "bad version": (lambda p: overwrite(p + ".idx", 9, b"\x02"), "web.idx has version 2"),
    "float tokens": (lambda p: overwrite(p + ".idx", 17, b"\x07"), r"web.idx has dtype code 7 \(float32\)"),
    "unknown dtype": (lambda p: overwrite(p + ".idx", 17, b"\x63"), r"web.idx has dtype code 99 \(unknown\)"),
    "header truncated": (lambda p: os.truncate(p + ".idx", 20), "web.idx is truncated: 20 bytes, its header alone takes 34"),
    ".idx truncated": (lambda p: cut(p + ".idx", -8), "web.idx is truncated: it has 114 bytes, .* take 122"),
    ".idx too long": (lambda p: cut(p + ".idx", 8), "web.idx is longer than its header says: it has 130 bytes"),
    "absurd count": (lambda p: overwrite(p + ".idx", 18, b"\xff" * 8), "web.idx is truncated"),
    "odd pointer": (lambda p: overwrite(p + ".idx", 74, b"\x03"), "web.idx is damaged"),
    "negative length": (lambda p: overwrite(p + ".idx", 46, b"\xff" * 4), "web.idx is damaged"),
    "first pointer": (lambda p: overwrite(p + ".idx", 50, b"\x02"), "web.idx is damaged"),
    "wrong last length": (
        lambda p: overwrite(p + ".idx", 46, b"\x05"),
        "web.bin is truncated: it has 26 bytes, .* 17 uint16 tokens",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_sound_dataset_are_refused_by_name(write_dataset: WriteDataset, damage: str) -> None:
    prefix = write_dataset("web", DOCUMENTS)
    harm, message = DAMAGE[damage]
    harm(prefix)
    with pytest.raises(UserError, match=f"^--data-path .*{message}"):
        TokenFile.open(prefix)


@pytest.mark.parametrize("documents, message", [([], "0 sequences"), ([[], []], "2 sequences without a token")])
def test_an_empty_dataset_is_refused(write_dataset: WriteDataset, documents: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=f"^--valid-data-path .*empty.*{message}"):
        TokenFile.open(write_dataset("web", documents), "--valid-data-path")
