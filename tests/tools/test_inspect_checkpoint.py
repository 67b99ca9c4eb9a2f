from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.checkpoint import shelf
from tests.ranks import run_ranks
from tests.checkpoint.runs import TINY, Run, flip, job
from tools.inspect_checkpoint import InspectConfig, main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(1, job, Run(save=str(directory)), 1, 2, (1, 2), True)
    return directory


def test_the_report_says_what_was_saved(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(InspectConfig(load=str(saved), tensors=True, print_config=True, verify=True)) == 0
    report = capsys.readouterr().out
    assert "step         2, 32 samples" in report and "fully_reshardable, 2 updates" in report and "seed: 1234" in report
    h, ffn = TINY.hidden_size, TINY.ffn_width
    layer = 2 * h + h * (h + 2 * h // 2) + h * h + 3 * h * ffn
    assert f"parameters   {256 * h + 2 * layer + h:,} in 8 tensors, float32" in report
    assert "embedding.word_embeddings.weight" in report and "files are as written" in report


def test_damage_is_reported_with_exit_code_1(saved: Path, capsys: pytest.CaptureFixture) -> None:
    directory = shelf.directory_of(saved, 1)
    flip(directory / "__0_0.distcp", 50)
    assert main(InspectConfig(load=str(directory))) == 0
    assert main(InspectConfig(load=str(directory), verify=True)) == 1
    assert str(directory / "__0_0.distcp") in capsys.readouterr().out


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        main(InspectConfig(load=str(tmp_path)))
