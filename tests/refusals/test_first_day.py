"""The most likely mistakes of a new user: one line names the first cause and the way out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.tools import preprocess_data, score_data, select_data
from megatron_salt.train import start as start_module
from tests.support.program import refused, train, write_tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new user's directory: some data, a finished run, and a run that has saved nothing yet."""
    home = tmp_path_factory.mktemp("home")
    for name, windows in (("words", 22), ("few", 3), ("torn", 22)):
        write_tokens(home / name, windows=windows)
    (home / "torn.idx").unlink()
    train(data_path=home / "words", train_iters=2, save=home / "plain")
    (home / "young" / "iter_0000002.partial").mkdir(parents=True)
    (home / "empty").mkdir()
    (home / "file").write_text("x")
    (home / "typo.yaml").write_text("model:\n  num_layer: 2\n")
    return home


FLAGS: list[tuple[dict[str, Any], str, str]] = [
    # data
    (dict(data_path="HOME/wrods"), "--data-path HOME/wrods: HOME/wrods.idx does not exist", "HOME holds the datasets few, words"),
    (dict(data_path="HOME/empty/words"), "HOME/empty/words.idx does not exist", "tools/preprocess_data.py makes a dataset"),
    (dict(data_path="HOME/torn"), "HOME/torn.idx does not exist", "HOME holds the datasets few, words"),
    (dict(data_path="HOME/nowhere", tokenizer_type=None), "HOME/nowhere.idx does not exist", "HOME holds the datasets"),
    (dict(data_path="HOME/few", seq_length=4096), "49 tokens are fewer than one sample of --seq-length 4096", "--seq-length shorter"),
    (dict(eval_iters=1), "--eval-iters 1 needs held-out data", "give --valid-data-path or --valid-share"),
    # tokenizers
    (dict(tokenizer_type=None), "--tokenizer-type is not given", "give the --tokenizer-type and --tokenizer-model that made the data"),
    (dict(tokenizer_type="GPT2BPE"), "--tokenizer-type GPT2BPE is not one of ByteLevelTokenizer", "did you mean GPT2BPETokenizer?"),
    (dict(tokenizer_type="SentencePieceTokenizer"), "needs --tokenizer-model", "tools/train_tokenizer.py makes one"),
    (dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="HOME/nowhere.json"),
     "--tokenizer-model HOME/nowhere.json cannot be read: No such file", "tokenizer.json, or the directory that holds it"),
    # the teacher
    (dict(teacher_load="HOME/taecher", kd_steps=2), "HOME/taecher holds no checkpoint (there is no such directory)", "teacher_1p5b.sh"),
    (dict(teacher_load="HOME/empty", kd_steps=2), "HOME/empty holds no checkpoint;", "an iter_* directory or several|one iter_* directory"),
    (dict(teacher_load="HOME/young", kd_steps=2), "HOME/young holds no checkpoint (its first save is not finished)", "teacher_1p5b.sh"),
    (dict(kd_steps=2), "--kd-steps 2 needs a teacher", "give --teacher-load"),
    (dict(teacher_load="HOME/plain"), "--teacher-load HOME/plain needs --kd-steps", "the length of stage 1"),
    # where it goes on, where it saves
    (dict(load="HOME/plian"), "--load HOME/plian holds no checkpoint", "leave --load out to start afresh"),
    (dict(load="HOME/plain", num_layers=3), "--num-layers is 2 there and 3 here", "iter_0000002/run.yaml has the flags"),
    (dict(save="HOME/plain"), "--save HOME/plain holds checkpoints of another run", "--load HOME/plain goes on from them"),
    (dict(save="HOME/file"), "--save HOME/file cannot be written", "Not a directory"),
    # machines and sizes
    (dict(tensor_model_parallel_size=2), "1 ranks cannot hold whole replicas of --tensor-model-parallel-size 2", "start a multiple of 2"),
    (dict(global_batch_size=7), "--global-batch-size 7 is not divisible by --micro-batch-size 2", "data-parallel replicas"),
    (dict(num_attention_heads=5), "--hidden-size 32 is not divisible by --num-attention-heads 5", "change one, or give --kv-channels"),
    # flags themselves
    (dict(fp16=True), "unknown flag --fp16", "did you mean --bf16?"),
    (dict(config="HOME/typo.yaml"), "HOME/typo.yaml: unknown key model.num_layer", "did you mean num_layers?"),
    (dict(train_iters="many"), "--train-iters many is no INT", ""),
    (dict(train_iters=None), "give the run a length", "--train-iters or --train-samples"),
]  # fmt: skip


@pytest.mark.parametrize("flags, cause, way_out", FLAGS, ids=[cause[:60] for _, cause, _ in FLAGS])
def test_the_trainer_names_the_first_cause_and_the_way_out(home: Path, flags: dict[str, Any], cause: str, way_out: str) -> None:
    named = {name: value.replace("HOME", str(home)) if isinstance(value, str) else value for name, value in flags.items()}
    message = refused(**dict(data_path=home / "words", train_iters=3, dry_run=1) | named)
    assert cause.replace("HOME", str(home)) in message, message
    assert any(words.replace("HOME", str(home)) in message for words in way_out.split("|")), message


def test_too_little_room_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, (1 << 40) - (1 << 30), 1 << 30))
    with pytest.raises(ValueError, match=r"--save .* has 1.0 GiB free, and one checkpoint takes about 3.0 GiB"):
        start_module.check_room(start_module.CheckpointConfig(save=str(tmp_path / "run")), 3.0)


TOOLS: list[tuple[Any, str, str, str]] = [
    (
        preprocess_data,
        "--input nowhere*.jsonl --output-prefix o --tokenizer-type ByteLevelTokenizer",
        "--input nowhere*.jsonl",
        "no such",
    ),
    (preprocess_data, "--input HOME/file --output-prefix out", "--tokenizer-type is missing", "SentencePieceTokenizer"),
    (
        score_data,
        "--teacher-load nowhere --data-path HOME/words --output out",
        "--teacher-load nowhere holds no checkpoint",
        "no such dir",
    ),
    (select_data, "--scores nowhere --output out --fraction 0.5", "nowhere", "score_data.py"),
]


@pytest.mark.parametrize("tool, words, cause, way_out", TOOLS, ids=[f"{tool.__name__}: {cause}" for tool, _, cause, _ in TOOLS])
def test_a_tool_does_so_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tool: Any, words: str, cause: str, way_out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [word.replace("HOME", str(home)) for word in words.split()]
    if tool is score_data:  # in a process as a user starts it
        program = [sys.executable, ROOT / "tools/score_data.py", *argv]
        ended = subprocess.run(program, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
        status, err = ended.returncode, ended.stderr
    else:
        status, err = tool.main(argv), capsys.readouterr().err
    assert status == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
    assert cause.replace("HOME", str(home)) in err and way_out in err, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, words", [
    ("salt_2p8b.sh", ["data/pile_text_document.idx does not exist", "examples/preprocess.sh"]),
    ("teacher_1p5b.sh", ["data/pile_text_document.idx does not exist", "examples/preprocess.sh"]),
    ("preprocess.sh", ["start this with sbatch: sbatch examples/preprocess.sh"]),
    ("score.sh", ["start this with sbatch: sbatch examples/score.sh"]),
])  # fmt: skip
def test_a_job_script_in_a_fresh_clone_says_what_to_make_first(tmp_path: Path, script: str, words: list[str]) -> None:
    for name in ("examples", "megatron_salt", "tools"):
        os.symlink(ROOT / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.run(["bash", f"examples/{script}"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                             env=environment | {"PYTHON": sys.executable, "REPO": str(tmp_path)})  # fmt: skip
    output = process.stdout + process.stderr
    assert process.returncode == 2 and all(word in output for word in words) and "Traceback" not in output, output
    assert not list(tmp_path.glob("runs*"))
