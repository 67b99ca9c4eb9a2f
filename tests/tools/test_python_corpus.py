"""python_corpus: the same text each time, modules held out by name, nothing quoted across the split."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.tools.python_corpus import CorpusConfig, is_held_out, modules, write_corpus


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines()]


def test_the_library_is_split_by_name_and_comes_out_the_same(tmp_path: Path) -> None:
    for run in ("first", "second"):
        write_corpus(CorpusConfig(str(tmp_path / run)))
    for split in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "first" / split).read_bytes() == (tmp_path / "second" / split).read_bytes()
    train, held_out = names(tmp_path / "first" / "train.jsonl"), names(tmp_path / "first" / "held_out.jsonl")
    assert set(train).isdisjoint(held_out)
    assert 0.01 < len(held_out) / len(train) < 0.1
    assert {"argparse.py", "help/assert"} <= {*train, *held_out}
    assert not any(name.startswith(("help/", "test/", "site-packages/", "encodings/")) for name in held_out)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["held_out.jsonl", "train.jsonl"]


def test_modules_are_text_in_the_encoding_that_they_declare(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "test" / "left_out.py").write_text("1")
    (tmp_path / "pkg" / "latin.py").write_bytes("# coding: latin-1\n# caf\u00e9\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"# \xff\n")
    (tmp_path / "empty.py").write_text("\n")
    assert list(modules(tmp_path)) == [("pkg/latin.py", "# coding: latin-1\n# caf\u00e9\n")]


def test_about_the_asked_share_is_held_out() -> None:
    held_out = sum(is_held_out(f"module_{i}.py", 0.25) for i in range(4000))
    assert 900 < held_out < 1100


def test_a_python_without_sources_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    with pytest.raises(UserError, match="came without its library's source"):
        write_corpus(CorpusConfig(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_holds_out_nothing_or_all_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="--held-out-share"):
        CorpusConfig("x", share)


def test_a_directory_that_cannot_be_written_is_refused_by_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir .* cannot be written"):
        write_corpus(CorpusConfig(str(tmp_path / "file")))
