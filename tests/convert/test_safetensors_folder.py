"""The library of weights is optional: where it is missing, one line says how to get it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_salt.convert.hugging_face.safetensors_folder import SafetensorsFolder
from megatron_salt.errors import UserError


def test_a_missing_library_is_named_with_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"needs safetensors, which is not installed: pip install 'megatron-salt\[hf\]'"):
        SafetensorsFolder(tmp_path)
