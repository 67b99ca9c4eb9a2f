"""Safetensors files: ours are those that the library writes, byte for byte, in whatever order and slices the rows come. To read them needs
the library; where it is missing, one line says how to get it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_salt.convert.hugging_face.safetensors_folder import SafetensorsFolder
from megatron_salt.convert.hugging_face.safetensors_writer import safetensors_file
from megatron_salt.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_what_save_file_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    names = {
        "model.layers.10.b": (5, 3),
        "model.layers.9.w": (1,),
        "z": (4, 2, 3),
        'é\u2028\x7f"\\/': (2, 2),
        "a": (0, 7),
        "b": (7,),
    }
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in names.items()}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:11], place))  # a write may be short
    with safetensors_file(tmp_path / "ours", names, dtype) as write_rows:
        for name in reversed(names):
            for first in reversed(range(0, len(tensors[name]), 2)):
                write_rows(name, first, tensors[name][first : first + 2])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview, place: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*weights'"),
        safetensors_file(tmp_path / "weights", {}, torch.float32),
    ):
        pass


def test_a_missing_library_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"needs safetensors, which is not installed: pip install 'megatron-salt\[hf\]'"):
        SafetensorsFolder(tmp_path)
