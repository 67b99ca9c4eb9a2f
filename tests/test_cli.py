"""Reading flags and --config: precedence, round trips, refusals, exit statuses. Pure; some tests start a Python process."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_salt import cli
from megatron_salt.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_salt.errors import UserError


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        cli.parse(argv)
    assert "\n" not in str(refused.value) and "│" not in str(refused.value)
    return str(refused.value)


def test_nothing_given_is_the_default_run():
    assert cli.parse([]) == RunConfig()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(yaml_file):
    path = yaml_file("training: {seq_length: 64, seed: 5}")
    run = cli.parse(["--config", path, "--seed", "6"])
    assert (run.training.seq_length, run.training.seed, run.training.micro_batch_size) == (64, 6, 1)
    assert cli.parse(["--seed", "6", f"--config={path}"]) == run


def test_flags_are_flat_and_reach_every_section():
    run = cli.parse(
        shlex.split(
            "--num-layers 3 --tensor-model-parallel-size=2 --train_iters 7 --lr 1e-2 --data-path 0.7 a 0.3 b --bf16 --save out "
            "--profile-ranks 0 3 --tokenizer-type ByteLevelTokenizer --log-interval 5 --recompute-granularity selective "
            "--no-swiglu --skip-samples 10:20 30:40"
        )
    )
    assert run.model == ModelConfig(num_layers=3)
    assert run.parallel.tensor_model_parallel_size == 2 and run.parallel.recompute_granularity == "selective"
    assert run.training == TrainingConfig(train_iters=7, bf16=True, profile_ranks=(0, 3), skip_samples=("10:20", "30:40"))
    assert run.data == DataConfig(data_path=("0.7", "a", "0.3", "b"))
    assert (run.optimizer.lr, run.tokenizer.tokenizer_type) == (0.01, "ByteLevelTokenizer")
    assert (run.checkpoint.save, run.logging.log_interval) == ("out", 5)


def test_a_boolean_of_the_file_can_be_taken_back(yaml_file):
    path = yaml_file("training: {bf16: true}")
    assert cli.parse(["--config", path]).training.bf16
    assert not cli.parse(["--config", path, "--no-bf16"]).training.bf16


def test_checks_see_the_merged_run_and_not_its_halves(yaml_file):
    path = yaml_file("checkpoint: {finetune: true}\nmodel: {hidden_size: 100}")  # each refused by itself
    run = cli.parse(["--config", path, "--load", "there", "--num-attention-heads", "10"])
    assert (run.checkpoint, run.model.hidden_size) == (CheckpointConfig(finetune=True, load="there"), 100)
    assert refusal(["--config", path, "--num-attention-heads", "10"]) == "--finetune needs --load"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--num-layer", "3"], "unknown flag --num-layer (did you mean --num-layers?)"),
        (["--tensor_model_parallel_sise=2"], "(did you mean --tensor-model-parallel-size?)"),
        (["--no-num-layers"], "unknown flag --no-num-layers"),
        (["--seq-length", "many"], "--seq-length: invalid literal"),
        (["--seq-length"], "--seq-length needs a value"),
        (["--save", "--bf16"], "--save needs a value"),
        (["--bf16", "true"], "Unrecognized options: true"),
        (["--normalization", "BatchNorm"], "--normalization BatchNorm is not one of LayerNorm, RMSNorm"),
        (["--hidden-dropout", "3"], "--hidden-dropout must be at least 0 and below 1, got 3.0"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(argv, named):
    assert named in refusal(argv)


@pytest.mark.parametrize(
    "text, named",
    [
        ("trainig: {}", "unknown section trainig (did you mean training?)"),
        ("seq_length: 5", "unknown section seq_length (it belongs under training:)"),
        ("training: {seq_lenght: 5}", "unknown key training.seq_lenght (did you mean seq_length?)"),
        ("model: {seq_length: 5}", "unknown key model.seq_length (it belongs under training:)"),
        ("training: {seq_length: '5'}", "training.seq_length: expected an integer, got '5'"),
        ("training: {seq_length: 5.0}", "training.seq_length: expected an integer, got 5.0"),
        ("training: {seq_length: true}", "training.seq_length: expected an integer, got true"),
        ("training: {seq_length: null}", "training.seq_length: expected an integer, got null"),
        ("training: {bf16: 1}", "training.bf16: expected true or false, got 1"),
        ("training: {bf16: yes}", "training.bf16: expected true or false, got 'yes'"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
        ("checkpoint: {save: 5}", "checkpoint.save: expected a string, got 5; put it in quotes"),
        ("data: {data_path: web}", "data.data_path: expected a list such as [a, b], got 'web'"),
        ("data: {data_path: [[a]]}", "data.data_path[0]: expected a string, got a list"),
        ("training: {profile_ranks: [0, one]}", "training.profile_ranks[1]: expected an integer, got 'one'"),
        ("model: {normalization: RMSnorm}", "expected one of LayerNorm, RMSNorm, got 'RMSnorm' (did you mean RMSNorm?)"),
        (
            "parallel: {recompute_granularity: None}",
            "parallel.recompute_granularity: expected one of full, selective, got 'None'",
        ),
        ("model: [1]", "model: expected a mapping of settings, got a list"),
        ("[1]", "expected sections"),
        ("model: {num_layers: 1", "not valid YAML"),
        ("model: {}\nmodel: {}", "key model is given twice"),
        ("model: {num_layers: 1, num_layers: 2}", "key num_layers is given twice"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(yaml_file, text, named):
    path = yaml_file(text)
    message = refusal(["--config", path])
    assert message.startswith(path + ": ") and named in message


def test_the_file_may_be_empty_or_have_empty_sections(yaml_file):
    assert cli.parse(["--config", yaml_file("")]) == cli.parse(["--config", yaml_file("model:\n")]) == RunConfig()


def test_yaml_values_mean_what_they_look_like(yaml_file):
    run = cli.parse(
        [
            "--config",
            yaml_file("""
        model: {norm_epsilon: 1e-6, rotary_base: 1000000, position_embedding_type: none, ffn_hidden_size: null}
        training: {skip_samples: [10:20, 1:2], seed: 010}
        data: {data_path: [0.7, web, 3, code]}
    """),
        ]
    )
    assert run.model == ModelConfig(norm_epsilon=1e-6, rotary_base=1e6, position_embedding_type="none")
    assert run.training == TrainingConfig(skip_samples=("10:20", "1:2"), seed=10)
    assert run.data.data_path == ("0.7", "web", "3", "code")


def test_print_config_is_a_config_file_for_the_same_run(yaml_file, capsys):
    argv = shlex.split("--num-layers 2 --data-path 0.5 a 0.5 b --lr 1e-5 --save 1e5 --tensorboard-dir yes")
    with pytest.raises(SystemExit) as leaving:
        cli.parse([*argv, "--print-config"])
    assert leaving.value.code == 0
    assert cli.parse(["--config", yaml_file(capsys.readouterr().out)]) == cli.parse(argv)


@dataclass(frozen=True)
class ToolConfig:
    """Shout."""

    input: str
    """What to shout."""

    times: int = 1
    """How often."""

    def __post_init__(self) -> None:
        if self.times < 1:
            raise UserError(f"--times must be at least 1, got {self.times}")


def interrupted(config: ToolConfig) -> None:
    raise KeyboardInterrupt


def mistaken(config: ToolConfig) -> None:
    raise UserError(f"cannot shout {config.input}")


def test_a_tool_gets_its_flags_and_gives_its_status():
    seen: list[ToolConfig] = []
    assert cli.run_tool(ToolConfig, seen.append, ["--input", "hey", "--times", "2"]) == 0
    assert seen == [ToolConfig("hey", 2)]
    assert cli.run_tool(ToolConfig, lambda config: 3, ["--input", "hey"]) == 3
    assert cli.run_tool(ToolConfig, interrupted, ["--input", "hey"]) == 130


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--input", "hey", "--times", "0"], "error: --times must be at least 1, got 0"),
        (["--inpt", "hey"], "error: unknown flag --inpt (did you mean --input?); --help lists all flags"),
        (["--input", "hey"], "error: cannot shout hey"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(capsys, argv, line):
    assert cli.run_tool(ToolConfig, mistaken, argv) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_a_missing_flag_is_named(capsys):
    assert cli.run_tool(ToolConfig, mistaken, []) == 2
    assert capsys.readouterr().err == "error: --input is required; --help says what to give\n"


def test_leaf_names_and_their_negations_are_unique():
    """One flat namespace: no two leaves share a name, and no --no-x of a boolean is another leaf."""
    flags = cli.known_flags(cli.CommandLine)
    assert len(flags) > 100 and len(set(flags)) == len(flags)


def test_every_flag_is_in_the_help_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.parse(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    words = printed.replace(",", " ").split()
    assert [name for name in cli.known_flags(cli.CommandLine) if name not in words] == []
    assert "Key/value heads" in printed and "(default: 3e-4)" in printed.replace("0.0003", "3e-4")


def test_reading_a_run_needs_no_torch_and_little_time():
    code = (
        "import sys, time, megatron_salt.cli as cli; cli.parse(['--num-layers', '2']); "
        "print(time.process_time(), *sorted({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    )
    spent, *heavy = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert heavy == [] and float(spent) < 2  # seconds of CPU, interpreter included


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_tool_that_may_not_read_a_file_names_it_in_one_line(capsys, number):
    def main(config: RunConfig) -> None:
        raise OSError(number, os.strerror(number), "there/x.npy")

    assert cli.run_tool(RunConfig, main, []) == 2
    assert capsys.readouterr().err == f"error: there/x.npy cannot be read or written: {os.strerror(number)}\n"


@pytest.mark.parametrize("words", ["print('x' * 100000)", "print('x')", "print('x'); raise SystemExit(0)"])
def test_a_reader_that_goes_away_is_no_fault(words):
    code = f"from megatron_salt.cli import exit_status\ndef act():\n    {words}\nraise SystemExit(exit_status(act))"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        ended = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (141, "")
