"""Missing, damaged or unsuitable datasets: exit status 2, one line with flag, file and numbers, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.program import refused_at_once, write_tokens


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def no_index(prefix: Path) -> list[str]:
    prefix.with_suffix(".idx").unlink()
    return [f"{prefix}.idx does not exist"]


def no_tokens(prefix: Path) -> list[str]:
    prefix.with_suffix(".bin").unlink()
    return [f"{prefix}.bin does not exist"]


def truncated_tokens(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".bin"), lambda content: content[:600])
    return [f"{prefix}.bin is truncated", "it has 600 bytes", "353 uint16 tokens", "706 bytes"]


def truncated_index(prefix: Path) -> list[str]:
    size = prefix.with_suffix(".idx").stat().st_size
    damage(prefix.with_suffix(".idx"), lambda content: content[:-3])
    return [f"{prefix}.idx is truncated", f"it has {size - 3} bytes", f"take {size}"]


def truncated_header(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".idx"), lambda content: content[:20])
    return [f"{prefix}.idx is truncated", "20 bytes"]


def tokens_of_another_dataset(prefix: Path) -> list[str]:
    write_tokens(prefix.with_name("other"), windows=30)
    prefix.with_name("other.bin").rename(prefix.with_suffix(".bin"))
    return [f"{prefix}.bin is longer than its index says", "962 bytes", "706 bytes"]


def not_an_index(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".idx"), lambda content: b"PK" + content[2:])
    return [f"{prefix}.idx is not a Megatron index"]


def empty(prefix: Path) -> list[str]:
    prefix.with_suffix(".bin").write_bytes(b"")
    damage(
        prefix.with_suffix(".idx"),
        lambda content: content[:18] + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8),
    )
    return ["the dataset is empty", f"{prefix}.idx lists 0 sequences"]


def shorter_than_a_window(prefix: Path) -> list[str]:
    write_tokens(prefix, np.arange(97, 113))
    return [str(prefix), "16 tokens", "--seq-length 16", "17"]


def ids_beyond_the_vocabulary(prefix: Path) -> list[str]:
    tokens = np.arange(353) % 26 + 97
    tokens[-5] = 300
    write_tokens(prefix, tokens)
    return [str(prefix), "token id 300 at window 21, token 12 of it", "the vocabulary of 257"]


@pytest.mark.parametrize(
    "spoil",
    [no_index, no_tokens, truncated_tokens, truncated_index, truncated_header, tokens_of_another_dataset, not_an_index, empty,
     shorter_than_a_window, ids_beyond_the_vocabulary],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
def test_data_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, flag: str, spoil: Callable[[Path], list[str]]
) -> None:
    prefix = write_tokens(tmp_path / "spoilt")
    words = spoil(Path(prefix))
    paths = dict(data_path=prefix) if flag == "--data-path" else dict(data_path=data, valid_data_path=prefix)
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, **paths)
    assert flag in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "paths, words",
    [
        (["nowhere"], ["nowhere.idx does not exist"]),
        (["0.5"], ["--data-path"]),
        (["0.5", "{data}", "0.5"], ["--data-path"]),
        (["-1", "{data}"], ["--data-path", "-1"]),
    ],
)
def test_a_data_path_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, paths: list[str], words: list[str]
) -> None:
    paths = [path.format(data=data) for path in paths]
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, data_path=paths)
    assert all(word in message for word in words), message


def test_too_little_data_to_hold_a_share_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "one", windows=1)
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, data_path=prefix, valid_share=0.1)
    assert "--valid-share 0.1" in message and prefix in message and "1 window" in message
