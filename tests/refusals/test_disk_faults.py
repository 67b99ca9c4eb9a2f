"""A disk that fails under a data file: one line that names the host and the file, and the status of a host that cannot be used."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_salt import cli, pretrain
from megatron_salt.config import DataConfig, RunConfig
from megatron_salt.data import manifest
from megatron_salt.data.batch import Batches, ReadAhead
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import HOST_FAULTS, MachineError, UserError, this_host
from megatron_salt.selection import score_reader
from megatron_salt.tokenizer import tokenizer
from tests.support.program import SEQ_LENGTH, VOCABULARY, argv, write_tokens


class BadDisk(io.FileIO):
    """An open file whose reads fail."""

    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def readinto(self, buffer: object) -> int:
        return len(self.read())


def bad_disk(path: str | Path, *_: object, **__: object) -> BadDisk:
    return BadDisk(path)


def no_reading(number: int) -> Callable[..., int]:
    def preadv(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return preadv


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV])
def test_tokens_that_cannot_be_read_in_the_thread_blame_the_host_and_name_the_file(
    data: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    train, _ = open_training_data(DataConfig(data_path=(data,)), SEQ_LENGTH, 1234, VOCABULARY, 0)
    batches = Batches(train, global_batch_size=4, micro_batch_size=2, replica=0, num_replicas=1)
    with ReadAhead() as reader:
        reader.fetch(batches, 0, None)
        monkeypatch.setattr(os, "preadv", no_reading(number))
        with pytest.raises(MachineError) as caught:
            reader.fetch(batches, 4, None)
    assert caught.value.host == this_host() and caught.value.status == 5
    assert str(caught.value).endswith(f"--data-path {data}: cannot read {data}.bin: {os.strerror(number)}")


def test_tokens_that_may_not_be_read_are_no_fault_of_the_host(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TokenFile.open(data)
    monkeypatch.setattr(os, "preadv", no_reading(errno.EPERM))
    with pytest.raises(UserError, match=r"words.bin: Operation not permitted$") as caught:
        file.read(np.array([0]), 4)
    assert not isinstance(caught.value, MachineError)


@pytest.mark.parametrize(
    "module, read, name",
    [
        (manifest, lambda path: manifest.sampled_fingerprint(str(path)), "words.idx"),
        (manifest, lambda path: manifest.sampled_hash(path.with_suffix(".bin")), "words.bin"),
        (manifest, lambda path: manifest.fingerprint(str(path), verify=True), "words.bin"),
        (score_reader, lambda path: score_reader._read_into(np.zeros(1), path.with_suffix(".bin"), 0), "words.bin"),
    ],
)
def test_every_reader_of_data_names_the_file(
    data: str, monkeypatch: pytest.MonkeyPatch, module: object, read: Callable[[Path], object], name: str
) -> None:
    monkeypatch.setattr(module, "open", bad_disk, raising=False)
    with pytest.raises(MachineError, match=f"{name} cannot be read: Input/output error$"):
        read(Path(data))


def test_a_tokenizer_on_a_bad_disk_blames_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "read_small", lambda path: bad_disk(os.devnull).read())
    with pytest.raises(MachineError, match="--tokenizer-model .*t.model cannot be read: Input/output error"):
        tokenizer._read("--tokenizer-model", str(tmp_path / "t.model"), "SentencePieceTokenizer")


def test_a_start_on_a_bad_disk_is_one_line_the_word_machine_and_status_5(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manifest, "open", bad_disk, raising=False)
    outcome = tmp_path / "outcome"
    assert pretrain.main([*argv(data_path=data, train_iters=3, outcome_file=outcome), "--dry-run", "1"]) == 5
    line = f"host {this_host()} cannot be used: {data}.idx cannot be read: Input/output error"
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {line}"
    assert outcome.read_text() == f"machine {this_host()} job -.0 {line}\n"


@pytest.mark.parametrize("number", sorted(HOST_FAULTS))
def test_a_tool_on_a_bad_disk_has_the_same_status(capsys: pytest.CaptureFixture[str], number: int) -> None:
    def main(config: RunConfig) -> None:
        raise OSError(number, os.strerror(number), "there/x.npy")

    assert cli.run_tool(RunConfig, main, []) == 5
    told = f"host {this_host()} cannot be used: there/x.npy cannot be read or written: {os.strerror(number)}"
    assert capsys.readouterr().err == f"error: {told}\n"


CUT_SHORT = """
import os, sys
import numpy as np
from megatron_salt.cli import exit_status
from megatron_salt.data.subsets import Selected
np.save("ids.npy", np.arange(100_000))
chosen = Selected(np.load("ids.npy", mmap_mode="r"))
os.truncate("ids.npy", 4096)
sys.exit(exit_status(lambda: print(chosen.ids(np.array([90_000])))))
"""


def test_a_selection_that_is_cut_short_under_a_run_ends_it_with_the_place_in_the_code(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CUT_SHORT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in ended.stderr and "data/subsets.py" in ended.stderr
