"""What the pages say exists: commands, files, flags, links, messages; every file of the repository has its place in the tree; and
the README stays short enough to skim."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import statistics
from pathlib import Path

import pytest

from megatron_salt.cli import CommandLine, parse_command, parse_flags
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.study.command import StudyConfig
from megatron_salt.tools.convert_checkpoint import ExportConfig, ImportConfig
from megatron_salt.tools.prepare_task import PrepareTaskConfig
from megatron_salt.train.plan import check
from tests.support.repository.pages import (
    EXAMPLES,
    PAGES,
    PROGRAMS,
    README,
    ROOT,
    SCRIPTS,
    TOOLS,
    anchors,
    code_of,
    flags_of,
    make_targets,
    sentences,
    string_templates,
    tool_configs,
    tree_paths,
    words,
)

NOT_OURS = {
    *(
        "--full",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--standalone",
        "--no-python",
    ),  # torchrun
    *(
        "--use-checkpoint-args",
        "--no-bias-gelu-fusion",
        "--use-rope-scaling",
        "--dist-ckpt-strictness",
    ),  # Megatron-LM
    *("--no-deps", "--no-build-isolation", "--only-binary", "--dest", "--wheel-dir"),  # pip
    "--keep",  # tests/gpu/trim_fatbin.py
    *("--account", "--partition", "--qos", "--nodes", "--time", "--signal", "--ntasks-per-node", "--gpus-per-node"),  # sbatch
    *("--nv", "--bind"),  # apptainer
    *("--check", "--interleave"),  # ruff, numactl
    *("--model", "--model_args", "--tasks", "--batch_size", "--include_path"),  # lm_eval
    "--local-dir",  # hf
}
each_page = pytest.mark.parametrize("page", PAGES)


def test_the_tree_names_what_is_there() -> None:
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert missing == []


def test_every_module_and_tool_is_in_the_tree() -> None:
    files = {
        path.relative_to(ROOT).as_posix() for folder in ("megatron_salt", "tools") for path in (ROOT / folder).rglob("*.py")
    }
    assert {file for file in files if not file.endswith("__init__.py")} - tree_paths() == set()


def test_the_readme_can_be_skimmed() -> None:
    lengths = [words(sentence) for sentence in sentences(README)]
    assert len(README.splitlines()) <= 150
    assert len(lengths) > 40
    assert statistics.median(lengths) <= 15
    assert statistics.mean(lengths) <= 18
    assert max(map(len, README.splitlines())) <= 140


@pytest.mark.parametrize("page", [page for page in PAGES if "/" in page or page == "README.md"])
def test_sentences_are_short(page: str) -> None:
    lengths = {sentence: words(sentence) for sentence in sentences(PAGES[page])}
    assert statistics.mean(lengths.values()) <= 18
    assert [sentence for sentence, length in lengths.items() if length > 35] == []


def test_the_status_stands_on_the_first_screen() -> None:
    assert "Nothing has run on a GPU yet" in "\n".join(README.splitlines()[:20])


def test_the_readme_names_every_folder_of_the_package() -> None:
    folders = {f"- `{path.parent.name}/`" for path in (ROOT / "megatron_salt").glob("*/__init__.py")}
    named = set(re.findall(r"^- `\w+/`", README, re.MULTILINE))
    assert named == folders


def test_every_page_is_linked_and_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
        if page.name != "index.md":
            assert f"](docs/{page.name}" in README
            assert f"]({page.name})" in PAGES["docs/index.md"]


@each_page
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


@each_page
def test_files_exist(page: str) -> None:
    """Paths in backquotes that begin with a folder of the repository, and modules as paths in the package."""
    code = "\n".join(re.findall(r"`([^`\n]+)`", PAGES[page]))
    for path in re.findall(r"(?<![\w./-])((?:examples|tools|benchmarks|docs|docker|tests|megatron_salt)/[\w./-]*\w/?)", code):
        assert (ROOT / path).exists() or path == "tools/X.py", path
    for path in re.findall(r"^(\w+/\w+\.py)$", code, re.MULTILINE):
        assert (ROOT / path).exists() or (ROOT / "megatron_salt" / path).exists(), path


@each_page
def test_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"make ([a-z-]+)", "\n".join(code_of(PAGES[page]))))
    assert named - make_targets() == set()


def test_continuous_integration_runs_the_readmes_commands() -> None:
    run = (ROOT / ".ci/run").read_text()
    for command in ("make test", "make docs", "make quickstart SHORT=1", "make test-short PYTHON=", "make test-te"):
        assert command in run
        assert command in README


def test_the_readme_has_code_to_check() -> None:
    """Else the tests of flags, targets and commands below pass on empty lists."""
    code = code_of(README)
    assert len(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(code)))) >= 15
    assert {"quickstart", "test"} <= set(re.findall(r"make ([a-z-]+)", "\n".join(code)))
    assert any("pretrain --config" in line for line in code) and any("salt-preprocess" in line for line in code)


@each_page
def test_flags_exist(page: str) -> None:
    ours = flags_of(CommandLine).union(NOT_OURS, *(flags_of(config) for tool in TOOLS for config in tool_configs(tool.stem)))
    for code in code_of(PAGES[page]):
        benchmark = re.search(r"benchmarks/\w+\.py", code)
        known = set(re.findall(r'"(--[\w-]+)"', (ROOT / benchmark[0]).read_text())) if benchmark else ours
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w*-])", code)) <= known, code


@pytest.mark.parametrize("name", [*PAGES, "examples/quickstart.sh", *(str(path.relative_to(ROOT)) for path in PROGRAMS)])
def test_commands_of_the_tools_parse(name: str) -> None:
    text = re.sub(r"\\+\n", " ", (ROOT / name).read_text())
    commands = re.findall(r"(?:tools/(\w+)\.py|(salt-[a-z-]+))((?: +[A-Z]+\.yaml)? +--[^`\n|&]*)", text)
    for tool, script, rest in commands:
        tool = tool or SCRIPTS[script]
        if tool != "pretrain":
            words = shlex.split(rest.replace('"${asked[@]}"', "--below-unigram 0.5 --below salt:plain"), comments=True)
            words = [word for word in words if not word.startswith("[")]
            [config] = tool_configs(tool)
            parse_flags(config, words)
    conversions = re.findall(r"tools/convert_checkpoint\.py (import|export)( [^`\n|&]*)", text)
    for command, rest in conversions:
        parse_flags({"import": ImportConfig, "export": ExportConfig}[command], shlex.split(rest))
    tasks = re.findall(r"tools/prepare_task\.py( [a-z_]+ --[^`\n|&]*)", text)
    for words in tasks:
        parse_flags(PrepareTaskConfig, shlex.split(words))
    studies = re.findall(r"tools/study\.py( [\w./]+\.yaml[^`\n|&]*)", text)
    for words in studies:
        parse_flags(StudyConfig, shlex.split(words, comments=True))
    assert commands or conversions or tasks or studies or name in PAGES


def test_every_console_script_is_told() -> None:
    rows = re.findall(
        r"^\| `(salt-[a-z-]+)` \| `(?:tools/(\w+)\.py|python -m megatron_salt\.pretrain)`", PAGES["docs/training.md"], re.M
    )
    assert {script: module or "pretrain" for script, module in rows} == SCRIPTS


@pytest.mark.parametrize("page", [page for page in PAGES if re.search(r"pretrain --config", PAGES[page])])
def test_commands_of_the_trainer_are_runs(page: str) -> None:
    """The README's and SALT's YAML files are copies of the models in examples/; ranks as torchrun or --dry-run is told."""
    models = {"teacher.yaml": "model_1p5b.yaml", "student.yaml": "model_2p8b.yaml", "run.yaml": "model_8p6b.yaml"}
    for command in [code for code in code_of(PAGES[page]) if re.search(r"pretrain --config", code)]:
        launcher, _, flags = command.partition("--config")
        words = shlex.split(flags, comments=True)
        words[0] = str(ROOT / "examples" / models.get(words[0], Path(words[0]).name))
        run, dry_run = parse_command(["--config", *words])
        sizes = [int(size) for size in re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", launcher)]
        check(run, world_size=math.prod(sizes) if dry_run is None else dry_run.ranks)


def test_the_command_of_four_nodes_makes_four_replicas() -> None:
    [command] = [code for code in code_of(PAGES["docs/cluster.md"]) if "--nnodes" in code]
    _, _, flags = command.partition("--config run.yaml")
    run = parse_flags(CommandLine, [*shlex.split(flags), "--train-iters", "10"])
    layout, plan = check(run, world_size=32)
    assert (layout.tensor, layout.pipeline, layout.data) == (4, 2, 4)
    assert plan.total_steps == 10


def test_messages_of_troubleshooting_are_the_codes() -> None:
    """`...` stands for what a message fills in."""
    messages = re.findall(r"```text\n(.*)\n```", PAGES["docs/troubleshooting.md"])
    assert len(messages) >= 20
    templates = string_templates()
    for message in messages:
        fixed = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(r".*".join(fixed), re.DOTALL)
        assert any(pattern.search(template) for template in templates), message


def test_the_readmes_figures_are_those_of_the_measurements() -> None:
    figures = re.findall(r"^\|.* (\d\.\d{3}) \|", README, re.MULTILINE)
    assert len(figures) == 3
    for figure in figures:
        assert f"| {figure} |" in PAGES["docs/performance.md"]


def test_measured_figures_have_a_command_and_a_date() -> None:
    sections = re.split(r"^## ", PAGES["docs/performance.md"], flags=re.MULTILINE)[1:]
    for section in sections[:-1]:
        assert re.search(r"`(python benchmarks/\w+\.py|make quickstart)", section), section
        assert re.search(r"\b2026-\d\d-\d\d\b", section), section


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


def test_the_quickstart_claims_a_direction_and_no_more() -> None:
    """The long form holds SALT to plain + 0.05 and every run to less than the unigram entropy; text and output say that it is one seed."""
    script = (ROOT / "examples/quickstart.sh").read_text()
    runs = ["--run", "plain=p.jsonl", "salt=s.jsonl", "--unigram-of", "tokens"]
    long, short = [
        parse_flags(tool_configs("report")[0], [*runs, *shlex.split(asked)])
        for asked in re.findall(r"^ *asked=\((.+)\)$", script, re.MULTILINE)
    ]
    assert (long.below, long.below_margin) == (("salt:plain",), 0.05) and not short.below
    assert long.below_unigram < short.below_unigram < 1
    assert "(one seed: a direction, no evidence)" in script
    assert "One seed is a direction and no evidence" in README
