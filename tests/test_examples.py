"""The cluster examples without a cluster: sizes, layouts, containers, and the flags that each script gives to the trainer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_salt.cli import DryRun, known_flags, parse, parse_command
from megatron_salt.config import ParallelConfig, RunConfig
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.model.flops import num_parameters
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.train.plan import check
from megatron_salt.train.start import choose_precisions
from tests.convert.real_model import LENGTH, WINDOWS
from tests.support.repository.pages import tool_configs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
VOCABULARY = 256_000
SIZES = {"1p5b": 1.5e9, "2p8b": 2.8e9, "8p6b": 8.6e9}
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
TRAINERS = [path for path in SCRIPTS if re.search("_(1p5b|2p8b|8p6b)$", path.stem)]


def model_run(name: str) -> RunConfig:
    path = EXAMPLES / f"model_{name}.yaml"
    return from_yaml(path.read_text(), str(path))


def run_of(script: Path, tmp_path: Path, *flags: str, **environment: str) -> tuple[RunConfig, int]:
    """The run that a script starts, and the number of ranks in its header. Outside Slurm it starts `PYTHON ... --dry-run RANKS`."""
    echo = executable(tmp_path / "echo", 'printf "%s\\n" "$@"')
    own = {"PATH": "/usr/bin:/bin", "PYTHON": str(echo), "GPU": ""}
    ended = subprocess.run(
        ["bash", str(script), *flags], cwd=ROOT, env=own | environment, capture_output=True, text=True, check=True
    )
    module, program, *words, dry_run, ranks = ended.stdout.splitlines()
    assert (module, program, dry_run) == ("-m", "megatron_salt.pretrain", "--dry-run")
    return parse(words), int(ranks)


@pytest.mark.parametrize("given, gpu", [({}, "h100-80"), ({"FP8": "0"}, "a100-80"), ({"GPU": "h200-141"}, "h200-141")])
def test_the_check_ends_with_the_planner(given: dict[str, str], gpu: str, tmp_path: Path) -> None:
    echo = executable(tmp_path / "echo", 'printf "%s\\n" "$@"')
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(echo)} | given
    ended = subprocess.run(
        ["bash", str(EXAMPLES / "salt_2p8b.sh")], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    _, program, *words = ended.stdout.splitlines()
    assert program == "megatron_salt.pretrain" and words[-4:] == ["--dry-run", "64", "--gpu", gpu]
    run, dry_run = parse_command(words)
    assert run.salt.kd_steps == 36000 and dry_run == DryRun(64, gpu)


@pytest.mark.parametrize("script, guide", [("salt_2p8b", ("--guide", "hidden")), ("salt_8p6b", ("--guide=hidden",))])
def test_a_salt_script_trains_by_let_alone(script: str, guide: tuple[str, ...], tmp_path: Path) -> None:
    salt = run_of(EXAMPLES / f"{script}.sh", tmp_path, *guide, "--let-steps", "20000")[0].salt
    assert (salt.guide, salt.let_steps, salt.kd_steps, salt.teacher_fp8_format) == ("hidden", 20000, None, None)
    both = run_of(EXAMPLES / f"{script}.sh", tmp_path, "--guide", "both", "--let-steps", "20000")[0].salt
    assert (both.let_steps, both.kd_steps, both.teacher_fp8_format) == (20000, 36000, "hybrid")


def test_a_trial_on_cpus_is_not_planned_for_a_gpu(tmp_path: Path) -> None:
    echo = executable(tmp_path / "echo", 'printf "%s\\n" "$@"')
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(echo), "FP8": "0", "DEVICE": "cpu"}
    ended = subprocess.run(
        ["bash", str(EXAMPLES / "salt_2p8b.sh")], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.endswith("--dry-run\n64\n")


@pytest.mark.parametrize("name, size", SIZES.items())
def test_models_have_the_size_in_their_name(name: str, size: float) -> None:
    run = model_run(name)
    parameters = num_parameters(run.model, run.model.padded_vocabulary_size(VOCABULARY), run.training.seq_length)
    print(f"model_{name}.yaml: {parameters / 1e9:.3f}B parameters with a vocabulary of {VOCABULARY}")
    assert abs(parameters / size - 1) < 0.02
    assert f"{parameters / 1e9:.2f}B parameters" in (EXAMPLES / f"model_{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize("script", TRAINERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("fp8", ["1", "0"])
def test_scripts_are_runs_of_the_papers_length_that_fit_their_nodes(script: Path, fp8: str, tmp_path: Path) -> None:
    run, ranks = run_of(script, tmp_path, FP8=fp8)
    layout, plan = check(run, ranks)
    assert 8 % layout.tensor == 0 and ranks % 8 == 0
    assert (plan.total_steps, plan.global_batch_size, run.training.seq_length) == (208_000, 2048, 1280)
    taught = script.stem.startswith(("salt", "rkd"))
    assert run.salt.kd_steps == ({"rkd_2p8b": 208_000}.get(script.stem, 36_000) if taught else None)
    assert (run.salt.stage1_selection is not None) == script.stem.startswith("salt_ds")
    assert run.checkpoint.save == run.checkpoint.load == f"runs/{script.stem}"


@pytest.mark.parametrize("script", TRAINERS, ids=lambda path: path.stem)
def test_no_rank_of_a_script_falls_back_to_the_cpu(script: Path, tmp_path: Path) -> None:
    assert run_of(script, tmp_path)[0].parallel.device == "cuda"
    assert run_of(script, tmp_path, DEVICE="auto")[0].parallel.device == "auto"
    assert run_of(script, tmp_path, "--device", "cpu")[0].parallel.device == "cpu"


TEACHERS = {"salt_8p6b": "2p8b"}


@pytest.mark.parametrize("script", TRAINERS, ids=lambda path: path.stem)
def test_h100_and_a100_can_multiply_as_the_scripts_say(script: Path, tmp_path: Path) -> None:
    teacher = model_run(TEACHERS.get(script.stem, "1p5b")).model
    for capability, fp8 in (((9, 0), "1"), ((8, 0), "0")):
        run, ranks = run_of(script, tmp_path, FP8=fp8)
        _, plan = check(run, ranks)
        taught_by = teacher if run.salt.teacher_load else None
        precisions = choose_precisions(run, plan, taught_by, Hardware(capability, cuda=(12, 8), transformer_engine=(2, 9)))
        assert (precisions.student.fp8_format, precisions.teacher.fp8_format if taught_by else None) == (
            ("hybrid", "hybrid" if taught_by else None) if fp8 == "1" else (None, None))  # fmt: skip


def test_environment_and_trailing_flags_win(tmp_path: Path) -> None:
    run, _ = run_of(EXAMPLES / "salt_2p8b.sh", tmp_path, "--train-iters", "7", "--kd-weight", "0.5", "--no-bf16", FP8="0",
                    DATA="0.7 a 0.3 b", TEACHER="t", KD_STEPS="5", RUN_DIR="here", WRAP="env ANY=thing")  # fmt: skip
    assert run.data.data_path == ("0.7", "a", "0.3", "b") and run.salt.teacher_load == "t" and run.salt.kd_steps == 5
    assert run.training.train_iters == 7 and run.salt.kd_weight == 0.5 and not run.training.bf16
    assert run.checkpoint.save == run.checkpoint.load == "here"


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


APPTAINER = """
printf '%s\\n' "apptainer $*" >&2
while [ "$1" != image.sif ]; do shift; done
exec "${@:2}"
"""
"""A program of that name which says how it was called, and runs the command outside of any container."""


def test_a_sif_image_runs_the_command_in_apptainer_and_wrap_inside_it(tmp_path: Path) -> None:
    executable(tmp_path / "apptainer", APPTAINER)
    echo = executable(tmp_path / "echo", 'printf "%s\\n" "$@"')
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "PYTHON": str(echo),
        "CONTAINER": "image.sif",
        "WRAP": "env ANY=thing",
        "GPU": "",
    }
    ended = subprocess.run(
        ["bash", "examples/salt_2p8b.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    called = f"apptainer exec --nv --bind {ROOT} --pwd {ROOT} image.sif env ANY=thing {echo} -m megatron_salt.pretrain "
    assert ended.stderr.startswith(called), ended.stderr
    assert ended.stdout.splitlines()[:2] == ["-m", "megatron_salt.pretrain"] and ended.stdout.splitlines()[-2] == "--dry-run"


@pytest.mark.parametrize(
    "container, step",
    [
        (dict(CONTAINER="image.sqsh", CONTAINER_MOUNTS="/shared:/shared"),
         f"--container-image=image.sqsh --container-mounts=/shared:/shared --container-workdir={ROOT} python3 -m x"),
        (dict(CONTAINER="image.sif", CONTAINER_MOUNTS="/shared:/shared"),
         f"apptainer exec --nv --bind /shared:/shared --pwd {ROOT} image.sif python3 -m x"),
        (dict(WRAP="numactl --all", PYTHON="python"), "numactl --all python -m x"),
    ],
    ids=["pyxis", "apptainer", "wrap"],
)  # fmt: skip
def test_a_step_runs_inside_the_container(tmp_path: Path, container: dict[str, str], step: str) -> None:
    """With a program `srun` that says how it was called; the interpreter is that of the image, not of .venv."""
    executable(tmp_path / "srun", 'echo "srun $*"')
    script = 'source examples/launch.sh; leaving="" logs=.; command=("$PYTHON" -m x); preflight'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NTASKS": "4"} | container
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(
        f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {step} --dry-run 4 --outcome-file ./outcome-"
    )


@pytest.mark.parametrize(
    "container, inside",
    [
        ({}, "python3"),
        (dict(CONTAINER="image.sqsh"), f"srun --container-image=image.sqsh --container-mounts={ROOT} --container-workdir={ROOT} python3"),
        (dict(CONTAINER="image.sif"), f"apptainer exec --nv --bind {ROOT} --pwd {ROOT} image.sif python3"),
    ],
    ids=["none", "pyxis", "apptainer"],
)  # fmt: skip
def test_the_pipelines_own_tools_run_inside_the_container(tmp_path: Path, container: dict[str, str], inside: str) -> None:
    text, tokenizer = tmp_path / "a.jsonl", tmp_path / "tokenizer.model"
    text.touch(), tokenizer.touch()
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": "python3",
        "DRY_RUN": "1",
        "INPUT": str(text),
        "TOKENIZER": str(tokenizer),
    } | container
    ended = subprocess.run(
        ["bash", "examples/pipeline.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    for tool in ("merge_datasets.py", "select_data.py"):
        assert f"--wrap {inside} tools/{tool} " in ended.stdout, ended.stdout


def test_save_is_refused_because_the_launcher_must_know_it() -> None:
    ended = subprocess.run(
        ["bash", "examples/salt_2p8b.sh", "--save", "there"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "give RUN_DIR=DIRECTORY instead of --save" in ended.stdout


@pytest.mark.parametrize("student, teacher", [("2p8b", "1p5b"), ("8p6b", "2p8b")])
def test_teachers_fit_beside_their_students(student: str, teacher: str) -> None:
    taught, teaching = model_run(student), model_run(teacher)
    check_shapes(teaching.model, ParallelConfig(), taught.training.seq_length)  # whole on each GPU
    assert teaching.training.seq_length == taught.training.seq_length
    assert teaching.model.hidden_size < taught.model.hidden_size


TEXTS = [path for path in (*SCRIPTS, EXAMPLES / "README.md") if "tools/" in path.read_text()]


@pytest.mark.parametrize("script", TEXTS, ids=lambda path: path.name)
def test_flags_of_tools_exist(script: Path) -> None:
    joined = script.read_text().replace("\\\n", " ").replace("\n#", "\n")
    for tool, rest in re.findall(r"tools/(\w+)\.py([^\n]*)", joined):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) - {"--dependency", "--wrap"}
        assert flags <= {name for config in tool_configs(tool) for name in known_flags(config)}, (script.name, tool)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    command = ["bash", "-n"] if checker is None else [checker, "--external-sources", "--source-path", str(ROOT)]
    ended = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_later_start_of_a_job_goes_on_from_what_the_first_one_saved(tmp_path: Path) -> None:
    """A run that begins from another's checkpoint begins there once."""
    script = """
        source examples/launch.sh; logs=$RUN_DIR listens=1 later=()
        flags=(--load other --finetune --lr 1 --load=more --no-load-optim)
        say_later() { if goes_on; then later_flags python "${flags[@]}"; echo "${later[*]}"; else echo first; fi; }
        RESTARTS=0 attempt=1; say_later
        RESTARTS=1 attempt=1; say_later  # nothing was saved
        echo 4 >"$RUN_DIR/latest_checkpointed_iteration.txt"; say_later
        SLURM_JOB_ID=8; RESTARTS=0; say_later  # submitted again: as the command says
    """
    environment = os.environ | dict(RUN_DIR=str(tmp_path), SLURM_JOB_ID="7", PYTHON="python")
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["first", "first", f"python --lr 1 --load {tmp_path}", "first"], ended


def task(tmp_path: Path, command: str, listens: int = 0) -> tuple[int, str, str]:
    """Run one task of a step. Returns its exit status, the word that it leaves for launch.sh, and the node's log."""
    outcome, node = tmp_path / "outcome", tmp_path / "nodes"
    node.mkdir(exist_ok=True)
    outcome.unlink(missing_ok=True)
    variables = dict(LISTENS=str(listens), OUTCOME=str(outcome), NODE_LOGS=str(node), SLURMD_NODENAME="n1", SLURM_PROCID="0",
                     SLURM_LOCALID="0", SLURM_NTASKS="1")  # fmt: skip
    ended = subprocess.run(["bash", "examples/task.sh", "bash", "-c", command], cwd=ROOT, env=os.environ | variables, timeout=60,
                           start_new_session=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return ended.returncode, outcome.read_text().partition(" ")[0] if outcome.exists() else "", (node / "n1.log").read_text()


@pytest.mark.parametrize(
    "status, word", [(0, "done"), (2, "refused"), (3, "unsaved"), (4, "nonfinite"), (5, "machine"), (1, ""), (137, "")]
)
def test_a_tools_status_is_its_word_for_the_launcher(tmp_path: Path, status: int, word: str) -> None:
    assert task(tmp_path, f"exit {status}")[:2] == (status, word)
    assert task(tmp_path, f"exit {status}", listens=1)[:2] == (status, "")  # the trainer says it by itself


def test_a_host_that_cannot_be_used_is_added_to_those_that_the_job_excludes(tmp_path: Path) -> None:
    """With a program `scontrol` that says how it was called. A tool's word names no host, but a node's log does."""
    executable(
        tmp_path / "scontrol",
        f'''echo "$*" >>{tmp_path}/asked
        [ "$1" != show ] || echo "JobId=7 JobState=RUNNING Reason=None ReqNodeList=(null) ExcNodeList=$LIST NodeList=n1"''',
    )
    (tmp_path / "n2.log").write_text("rank 1 at n2 failed: host n2 cannot be used: CUDA device 0 of 1 cannot be initialised\\n")
    script = 'source examples/launch.sh; listens=1; leaving=""; leave_host "$HOST" why; requeue'
    for host, before, after in (("n3", "(null)", "n3"), ("n3", "n1", "n1,n3"), ("-", "(null)", "n2")):
        (tmp_path / "asked").unlink(missing_ok=True)
        environment = os.environ | dict(
            PATH=f"{tmp_path}:/usr/bin:/bin",
            HOST=host,
            LIST=before,
            NODE_LOGS=str(tmp_path),
            RUN_DIR=str(tmp_path),
            SLURM_JOB_ID="7",
        )
        ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        unfit = after.split(",")[-1]
        assert f"the job goes on without host {unfit}: why" in ended.stdout, ended
        assert f"left because of host {unfit} at" in ended.stdout, ended
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked[-3:] == ["requeue 7", "show job --oneliner 7", f"update JobId=7 ExcNodeList={after}"], asked


def test_steps_of_one_task_know_how_many_ranks_a_node_has(tmp_path: Path) -> None:
    """The check before the start is one task on one node, and tells the host memory of a save of all ranks of a node."""
    script = "source examples/launch.sh; launch() { env | grep LOCAL_WORLD_SIZE; }; train --train-iters 3"
    environment = dict(
        PATH="/usr/bin:/bin", RUN_DIR=str(tmp_path), SLURM_JOB_ID="7", SLURM_NTASKS="16", SLURM_JOB_NUM_NODES="2"
    )
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "LOCAL_WORLD_SIZE=8\n"


def test_a_signal_to_all_of_a_task_leaves_the_word_to_the_tool(tmp_path: Path) -> None:
    """Slurm signals every process of a step. The log has the tool's last words; a tool that does not listen only ends."""
    leaves = "trap 'echo leaving; exit 3' USR1; kill -USR1 0; sleep 1"
    assert task(tmp_path, leaves) == (3, "unsaved", "leaving\n")
    assert task(tmp_path, "kill -USR1 0; sleep 5")[:2] == (128 + signal.SIGUSR1, "")


def test_the_foreign_teachers_comparison_reads_what_the_run_evaluates() -> None:
    run = from_yaml((EXAMPLES / "foreign_teacher.yaml").read_text(), "foreign_teacher.yaml")
    training = run.training
    assert (training.seq_length, training.eval_iters * (training.global_batch_size or 0)) == (LENGTH, WINDOWS)
    assert run.salt.kd_steps is not None and run.salt.kd_steps < (training.train_iters or 0)  # both stages
    [directory] = re.findall(r"^RUN=(\S+)$", (EXAMPLES / "foreign_teacher.sh").read_text(), re.M)
    assert run.salt.teacher_load == f"{directory}/teacher" and run.checkpoint.save == f"{directory}/student"
    assert run.data.data_path == (f"{directory}/data/train_text_document",)
    assert run.data.valid_data_path == (f"{directory}/data/held_out_text_document",)
