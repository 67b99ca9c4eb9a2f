"""A start and a --dry-run refuse the same mistakes in flags with the same line, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_salt import pretrain
from megatron_salt.config import CheckpointConfig, DataConfig, RunConfig, SaltConfig, TokenizerConfig, TrainingConfig
from megatron_salt.train import dry_run
from megatron_salt.train import run as run_module
from tests.support.program import argv, the_error

WSD = dict(lr_decay_style="WSD")
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(lr_warmup_iters=1000), "comes to 8000 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=0, lr_warmup_samples=48), "comes to 48 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=0, lr_warmup_fraction=1.0), "comes to 48 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=3, lr_decay_iters=3), "comes to 24 samples, and the decay ends at 24"),
    (dict(WSD, lr_wsd_decay_iters=1000), "--lr-wsd-decay-iters comes to 8000 samples, and the whole decay has 48"),
    (dict(WSD, lr_wsd_decay_samples=49), "--lr-wsd-decay-iters comes to 49 samples, and the whole decay has 48"),
    (dict(WSD), "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (dict(start_weight_decay=0.1), "--start-weight-decay 0.1"),
    (dict(skip_samples="a:b"), "--skip-samples takes A:B with whole numbers 0 <= A < B, such as 51200:56320, got a:b"),
    (dict(skip_samples="30:20"), "--skip-samples takes A:B"),
    (dict(skip_samples="0:" + "9" * 5000), "--skip-samples takes A:B"),
    (dict(skip_samples="0:" + "9" * 19), "--skip-samples 0:9999999999999999999 jumps over more samples than can be counted"),
    (dict(skip_samples=["5:12", "5:9"]), "--skip-samples 5:9 and 5:12 start at the same sample"),
    (dict(seed="9" * 20), "--seed must be at most 4611686018427387904 in size, got 99999999999999999999"),
    (dict(adam_beta1=1), "--adam-beta1 must be at least 0 and below 1, got 1"),
    (dict(init_method_std=1e300), "--init-method-std must lie in [0.0, 1.0], got 1e+300"),
    (dict(hidden_dropout=1), "--hidden-dropout must be at least 0 and below 1, got 1"),
    (dict(train_iters=2**60), "are more samples than can be counted"),
    (dict(train_iters=None), "give the run a length: --train-iters or --train-samples"),
    (dict(train_iters=None, train_samples=9), "--train-samples 9 is not a multiple of --global-batch-size 8"),
    (dict(global_batch_size=9), "--global-batch-size 9 is not divisible by --micro-batch-size 2 x 1"),
    (dict(save="SAVE", save_at=7), "--save-at 7 lies beyond the run's last step, 6"),
    (dict(tensor_model_parallel_size=2), "--tensor-model-parallel-size 2"),
    (dict(save=None, keep_last=2), "--keep-last 2 needs --save"),
    (dict(save=None, async_save=True), "--async-save needs --save"),
    (dict(save=None, on_save_error="continue"), "--on-save-error continue needs --save"),
    (dict(save=None, dist_ckpt_optim_fully_reshardable=True), "--dist-ckpt-optim-fully-reshardable needs --save"),
    (dict(save=None, profile=True), "--profile has nowhere to write its trace; give --tensorboard-dir or --save"),
    (dict(profile=True, profile_ranks=[0, 5]), "--profile-ranks 5: the run has ranks 0 to 0"),
    (dict(save="SAVE", profile=True, profile_step_start=7), "--profile-step-start 7 lies beyond the run's last step, 6"),
    (dict(teacher_load="nowhere", kd_steps=3, teacher_micro_batch_size=3), "--teacher-micro-batch-size 3 is not a multiple"),
    (dict(teacher_load="nowhere", kd_steps=3, kd_stop="crossover"), "--kd-stop crossover compares held-out accuracies"),
    (dict(teacher_load="nowhere", kd_steps=3, teacher_tensor_model_parallel_size=2), "--teacher-tensor-model-parallel-size"),
]


@pytest.mark.parametrize("flags, reason", REFUSED, ids=[reason[:60] for _, reason in REFUSED])
def test_a_start_and_a_dry_run_refuse_alike_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], reason: str
) -> None:
    """Neither reads data: what follows the checks is replaced by an error."""
    monkeypatch.chdir(tmp_path)
    words = argv(**dict(data_path="words", train_iters=6, save="SAVE") | flags)
    said = []
    for more in ([], ["--dry-run", "1"]):
        with (
            mock.patch.object(run_module, "run_session", side_effect=AssertionError("it started")),
            mock.patch.object(dry_run, "dry_run", side_effect=AssertionError("it went on")),
        ):
            assert pretrain.main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        said.append(the_error(err))
    assert said[0] == said[1] and reason in said[0], said
    assert list(tmp_path.iterdir()) == []


def test_flags_that_belong_together_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this test, the tests above could pass for the wrong reason."""
    monkeypatch.chdir(tmp_path)
    flags = dict(WSD, lr_wsd_decay_iters=6, skip_samples=["0:8", "9:12"], keep_last=2, async_save=True, save_at=6) | dict(
        profile=True, profile_step_start=6
    )
    with mock.patch.object(run_module, "run_session") as started, mock.patch.object(dry_run, "dry_run") as rehearsed:
        for more in ([], ["--dry-run", "1"]):
            assert pretrain.main([*argv(data_path="words", train_iters=6, save="SAVE", **flags), *more]) == 0
    assert started.call_count == rehearsed.call_count == 1


def test_ranks_compare_what_their_flags_say_and_not_where_files_lie() -> None:
    def flags(where: str, *data: str, **salt: Any) -> dict[str, object]:
        return run_module.compared_flags(RunConfig(
            data=DataConfig(data_path=tuple(f"{where}/{name}" for name in data)), tokenizer=TokenizerConfig(tokenizer_model=where),
            salt=SaltConfig(teacher_load=where, kd_steps=3, **salt), training=TrainingConfig(outcome_file=where),
            checkpoint=CheckpointConfig(save=where),
        ))  # fmt: skip

    own = flags("/here", "web", "code")
    assert own == flags("/there", "web", "code")
    for other in (flags("/here", "web"), flags("/here", "web", "code", kd_weight=0.5)):
        assert [what for what, value in own.items() if other[what] != value] in (
            ["the number of words in --data-path"], ["--kd-weight"]
        )  # fmt: skip
