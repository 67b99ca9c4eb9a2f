"""A configuration as YAML text, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt import yaml_core
from megatron_salt.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from megatron_salt.config.yaml_text import from_yaml, to_yaml
from megatron_salt.errors import UserError

AWKWARD = (
    "",
    "~",
    "null",
    "yes",
    "on",
    "1",
    "1e5",
    "1e-3",
    ".5",
    "010",
    "0x1f",
    "1_000",
    "10:20",
    "2024-01-01",
    "<<",
    "=",
    "nan",
    ".inf",
    " x ",
    "#x",
    "a: b",
    "- a",
    "é",
    "line\nline",
    "true",
    "'",
    '"',
    "x" * 300,
)


@pytest.mark.parametrize("word", AWKWARD)
def test_any_string_survives_yaml(word):
    run = RunConfig(data=DataConfig(data_path=(word, "tail")), checkpoint=CheckpointConfig(save=word))
    assert from_yaml(to_yaml(run), "memory") == run


@pytest.mark.parametrize("number", [0.0, 1e-8, 3e-4, 0.1, 1 / 3, 1e22, 123456789.123])
def test_any_number_survives_yaml(number):
    assert yaml_core.load(yaml_core.dump({"x": number})) == {"x": number}


def test_a_saved_run_is_read_strictly():
    run = replace(RunConfig(), model=ModelConfig(num_layers=7, swiglu=True))
    text = to_yaml(run)
    assert from_yaml(text, "run.yaml") == run
    newer = text + "sparkle: {magic: 3}\n"
    with pytest.raises(UserError, match="run.yaml: unknown section sparkle"):
        from_yaml(newer, "run.yaml")
    with pytest.raises(UserError, match="^run.yaml: --num-layers must be at least 1, got 0$"):
        from_yaml("model: {num_layers: 0}", "run.yaml")
