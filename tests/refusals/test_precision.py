"""Precisions that the machine does not support, through the whole program on a pretended GPU: refused before ranks join."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_salt import pretrain
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.train import run as run_module
from tests.support.program import argv
from tests.support.ranks import run_ranks

HOPPER = Hardware((9, 0), (13, 0), (2, 20, 2))
BLACKWELL, AMPERE = replace(HOPPER, capability=(10, 0)), replace(HOPPER, capability=(8, 0))
FP8: dict[str, Any] = dict(bf16=True, fp8_format="hybrid")


class Joined(Exception):
    """The program was not refused: it went on to join the other ranks."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> str:
    """A teacher whose MLP is 72 wide, not a multiple of 16."""
    save = tmp_path_factory.mktemp("teacher")
    words = argv(data_path=data, save=save, train_iters=1, lr_warmup_iters=0, ffn_hidden_size=72, num_layers=1)
    [status] = run_ranks(1, train, words)
    assert status == 0
    return str(save)


def train(words: list[str]) -> int:
    import contextlib
    from unittest import mock

    with mock.patch.object(run_module, "distributed", return_value=contextlib.nullcontext()):
        return pretrain.main(words)


@pytest.fixture
def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str):
    """The error message of the program on a given machine; Joined if it is not refused."""

    def of(hardware: Hardware, **flags: Any) -> str:
        def join(*_: object) -> None:
            raise Joined

        monkeypatch.setattr(run_module, "find_hardware", lambda _: hardware)
        monkeypatch.setattr(run_module, "distributed", join)
        assert pretrain.main(argv(data_path=data, save=tmp_path / "save", train_iters=4, **flags)) == 2
        assert not (tmp_path / "save").exists()
        return capsys.readouterr().err

    return of


@pytest.mark.parametrize(
    "hardware, flags, words",
    [
        (AMPERE, FP8, ["--fp8-recipe tensorwise needs a GPU of compute capability 8.9", "it has 8.0"]),
        (HOPPER, FP8 | dict(fp8_recipe="mxfp8"), ["--fp8-recipe mxfp8 needs a GPU of compute capability 10.0", "it has 9.0"]),
        (
            replace(HOPPER, transformer_engine=(2, 2)),
            FP8 | dict(fp8_recipe="blockwise"),
            ["needs Transformer Engine 2.3 or later"],
        ),
        (HOPPER, FP8 | dict(fp8_recipe="blockwise"), ["multiples of 128", "--hidden-size 32 = 32", "tokens of a microbatch"]),
        (BLACKWELL, FP8 | dict(ffn_hidden_size=80), ["--fp8-recipe mxfp8", "multiples of 32", "--ffn-hidden-size 80 = 80"]),
        (HOPPER, FP8 | dict(seq_length=15), ["multiples of 16", "--seq-length 15 x 2 samples = 30"]),
        (HOPPER, FP8 | dict(bf16=False), ["--fp8-format hybrid needs --bf16"]),
        (HOPPER, FP8 | dict(transformer_impl="torch"), ["--transformer-impl is torch"]),
        (HOPPER, FP8 | dict(fp8_param_gather=True), ["--fp8-param-gather needs --use-distributed-optimizer"]),
        (HOPPER, FP8 | dict(first_last_layers_bf16=True), ["leave none of --num-layers 2"]),
        (HOPPER, dict(bf16=True, fp4_format="e2m1"), ["--fp4-recipe nvfp4 needs a GPU of compute capability 10.0"]),
        (replace(HOPPER, capability=None), {}, ["sees no NVIDIA GPU", "in an environment without it"]),
        (replace(HOPPER, transformer_engine=None), dict(transformer_impl="transformer_engine"), ["is not installed"]),
    ],
)
def test_it_is_refused_before_ranks_join(message, hardware, flags, words):
    error = message(hardware, **flags)
    assert all(word in error for word in words), error


def test_so_is_a_teachers(message, teacher):
    taught = dict(bf16=True, teacher_load=teacher, kd_steps=2, teacher_fp8_format="e4m3")
    assert "the teacher's --ffn-hidden-size 72 = 72" in message(HOPPER, **taught)
    assert "--teacher-fp8-recipe mxfp8 needs a GPU of compute capability 10.0" in message(
        HOPPER, **taught, teacher_fp8_recipe="mxfp8"
    )


@pytest.mark.parametrize("flags", [FP8, FP8 | dict(fp8_recipe="delayed", fp8_amax_history_len=4), dict(bf16=True), {}])
def test_what_can_be_goes_on_to_join(message, flags):
    with pytest.raises(Joined):
        message(HOPPER, **flags)


def test_queues_to_the_device_are_asked_for(message, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 8" in message(HOPPER, tensor_model_parallel_size=2)
