"""What the README says exists: commands, files, flags, links; and every file of the repository has its place in the tree."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from megatron_salt.cli import CommandLine, known_flags, parse_flags
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.train.checks import check

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
PROGRAMS = [ROOT / "megatron_salt/tools" / tool.name for tool in TOOLS]
NOT_OURS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--no-deps", "--standalone"}
"""torchrun's and pip's flags."""


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of(text: str) -> list[str]:
    """Commands: indented lines, with the lines that a backslash continues, and what stands in backquotes."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"^    (.+)$", joined, re.MULTILINE) + re.findall(r"`([^`\n]+)`", joined)


def flags_of(config_class: type) -> set[str]:
    return set(known_flags(config_class))


def tool_config(path: Path) -> type:
    module = importlib.import_module(f"megatron_salt.tools.{path.stem}")
    [config] = [
        member
        for name, member in vars(module).items()
        if name.endswith("Config") and dataclasses.is_dataclass(member) and member.__module__.startswith("megatron_salt.tools.")
    ]
    return config


def tree_paths() -> set[str]:
    """Every file and directory that the annotated tree names."""
    block = re.search(r"```\n(megatron_salt/\n.*?)```", ARCHITECTURE, re.DOTALL)
    assert block
    found, parents = set(), [""] * 8
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"(?:[\w.]+(?:\.\w+|/) ?)+", line.strip())
        assert names, line
        for name in names[0].split():
            found.add("".join(parents[:depth]) + name)
            parents[depth] = name if name.endswith("/") else parents[depth]
    return found


def test_the_tree_names_what_is_there() -> None:
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert missing == []


def test_every_module_and_tool_is_in_the_tree() -> None:
    files = {
        path.relative_to(ROOT).as_posix() for folder in ("megatron_salt", "tools") for path in (ROOT / folder).rglob("*.py")
    }
    assert {file for file in files if not file.endswith("__init__.py")} - tree_paths() == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings


def test_make_targets_exist() -> None:
    named = set(re.findall(r"make ([a-z-]+)", "\n".join(code_of(README))))
    assert {"quickstart", "test"} <= named
    assert named - make_targets() == set()


def test_continuous_integration_runs_the_readmes_commands() -> None:
    run = (ROOT / ".ci/run").read_text()
    for command in ("make test", "make quickstart SHORT=1", "make test-short PYTHON=", "make test-te"):
        assert command in run
        assert command in README


def test_flags_exist() -> None:
    known = flags_of(CommandLine).union(*map(flags_of, map(tool_config, TOOLS)))
    named = {flag for code in code_of(README) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert len(named) > 30
    assert named - known - NOT_OURS == set()


@pytest.mark.parametrize(
    "text",
    [README, (ROOT / "examples/quickstart.sh").read_text(), *(path.read_text() for path in PROGRAMS)],
    ids=["README", "quickstart.sh", *(path.name for path in PROGRAMS)],
)
def test_commands_of_the_tools_parse(text: str) -> None:
    commands = re.findall(r"tools/(\w+)\.py( +--(?:[^`\n\\]|\\+\n)*)", text)
    assert commands
    for tool, rest in commands:
        words = shlex.split(re.sub(r"\\+\n", " ", rest).replace('"${asked[@]}"', "--below-unigram 0.5 --below salt:plain"))
        parse_flags(tool_config(ROOT / "tools" / f"{tool}.py"), [word for word in words if not word.startswith("[")])


def test_the_cluster_command_is_a_run() -> None:
    [command] = [code for code in code_of(README) if "--nnodes" in code]
    _, _, flags = command.partition("--config run.yaml")
    run = parse_flags(CommandLine, [*shlex.split(flags), "--train-iters", "10"])
    layout, plan = check(run, world_size=32)
    assert (layout.tensor, layout.pipeline, layout.data) == (4, 2, 4)
    assert plan.total_steps == 10


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_complete_runs(path: Path) -> None:
    run = from_yaml(path.read_text(), str(path))
    check(run, world_size=run.parallel.replica_ranks)
    assert run.data.data_path
    assert run.checkpoint.save


def test_the_quickstart_trains_on_what_it_makes() -> None:
    """Its YAML and its script agree on where things lie, and the teacher on what the student is."""
    script = (ROOT / "examples/quickstart.sh").read_text()
    directory = re.search(r"^RUN=(\S+)$", script, re.MULTILINE)
    kd_steps = re.search(r"^kd_steps=(\d+)$", script, re.MULTILINE)
    assert directory and kd_steps
    runs = {
        name: from_yaml((ROOT / f"examples/{name}.yaml").read_text(), name) for name in ("quickstart", "quickstart_teacher")
    }
    for run, save in zip(runs.values(), ("plain", "teacher"), strict=True):
        assert run.data.data_path == (f"{directory[1]}/data/train_text_document",)
        assert run.data.valid_data_path == (f"{directory[1]}/data/held_out_text_document",)
        assert run.checkpoint.save == f"{directory[1]}/{save}"
        _, plan = check(run, world_size=2)
        assert plan.num_microbatches >= run.parallel.pipeline_model_parallel_size
    student, teacher = runs.values()
    assert student.parallel.replica_ranks == 2
    assert teacher.training == dataclasses.replace(
        student.training, micro_batch_size=teacher.training.micro_batch_size
    )  # the same samples
    assert student.training.train_iters is not None
    assert int(kd_steps[1]) < student.training.train_iters / 2
