"""A directory of safetensors: the index says which file a tensor is read from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_salt.convert.hugging_face.safetensors_folder import INDEX, SafetensorsFolder


def test_a_tensor_that_two_files_hold_is_read_from_the_one_in_the_index(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        save_file({"x": torch.full((2,), value), name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = {"a": "a.safetensors", "x": "b.safetensors", "c": "c.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    folder = SafetensorsFolder(tmp_path)
    assert folder.read("x").tolist() == [2.0, 2.0]
    assert set(folder.names()) == {"a", "b", "c", "x"}  # b is in no index, and left over
