"""examples/laptop: its text in sets that share nothing, and its studies, models and pages, which must agree."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from examples.laptop import corpus
from megatron_salt.cli import known_flags, run_tool
from megatron_salt.config import RunConfig
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.model.flops import forward_flops_per_token, num_parameters
from megatron_salt.study.definition.arms import build, training_flops
from megatron_salt.study.definition.plan_jobs import StudyPlan, TeacherFacts, plan_jobs
from megatron_salt.study.definition.study import Study
from megatron_salt.study.definition.study_file import read_study
from megatron_salt.train.plan import check
from tests.support.repository.pages import tool_configs

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "examples/laptop"
PIECES = sorted(path.stem for path in LAPTOP.glob("[0-9]_*.yaml"))
CHOOSE = ("1_learning_rate", "2_choices", "2_scores", "6_beyond_choices")
VOCABULARY = 4096
SETS = ("train", "validation", "test", "prose", "python")


# ---- text ---------------------------------------------------------------------------------------------------------------


def document(number: int, kind: str = "documentation", shared: int | None = None) -> str:
    """Three paragraphs of its own, and one of a few that many documents have."""
    own = [f"{kind} {number}, paragraph {part}: " + f"word{number * 7 + part} " * 20 for part in range(3)]
    shared = number % 5 if shared is None else shared
    return "\n\n".join([own[0], "A heading", f"The shared paragraph {shared} of {kind}, which is long enough.", *own[1:]])


def paragraphs(texts: list[str]) -> list[str]:
    every = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    return [part for part in every if len(part) >= corpus.PARAGRAPH]


DOCUMENTS = [document(number) for number in range(300)]
CONFIG = corpus.CorpusConfig(output_dir="unused")


def make(documents: list[str], config: corpus.CorpusConfig = CONFIG) -> dict[str, list[str]]:
    return corpus.sets(documents, [document(1, "prose")], [document(2, "python"), DOCUMENTS[0]], config)


def test_sets_share_no_paragraph_and_lose_none() -> None:
    made = make(DOCUMENTS)
    every = paragraphs([text for texts in made.values() for text in texts])
    assert len(every) == len(set(every))
    assert set(every) == set(paragraphs([*DOCUMENTS, document(1, "prose"), document(2, "python")]))
    sizes = {name: len(made[name]) for name in SETS}
    assert sizes["train"] > 240 and 3 <= sizes["test"] <= 30 and 3 <= sizes["validation"] <= 30, sizes
    assert sizes["prose"] == 1


def test_a_document_keeps_its_set_whatever_else_there_is() -> None:
    def first_paragraphs(made: dict[str, list[str]]) -> dict[str, str]:
        return {text.split("\n\n")[0]: name for name, texts in made.items() for text in texts}

    few, many = first_paragraphs(make(DOCUMENTS[1:100])), first_paragraphs(make(DOCUMENTS[:0:-1]))
    assert len(few) >= 99 and {first: many[first] for first in few} == few
    assert make(DOCUMENTS) == make(DOCUMENTS[::-1])


def test_the_size_is_bounded_and_documents_are_cut() -> None:
    small = corpus.CorpusConfig(output_dir="unused", documentation_mb=0.05)
    size = sum(len(text) for name in ("train", "validation", "test") for text in make(DOCUMENTS, small)[name])
    assert 40_000 < size <= 50_000
    assert corpus.chosen(["x" * 100_000], 1.0) == ["x" * corpus.LONGEST]


def test_what_packages_hold_becomes_text() -> None:
    module = (
        b'"""A module."""\n\nclass C:\n    """A class\n\n    of two paragraphs."""\n\n    def f(self):\n        return "none"\n'
    )
    assert list(corpus.docstrings("pkg/m.py", module)) == ["A module.\n\nA class\n\nof two paragraphs."]
    assert list(corpus.docstrings("pkg/tests/m.py", module)) == []
    assert list(corpus.docstrings("pkg/m.py", b"print 'Python 2'")) == []
    service = {"documentation": "<p>A &amp; B</p>", "shapes": {"S": {"documentation": "<p>Shape</p>"}}}
    packed = gzip.compress(json.dumps(service).encode())
    assert list(corpus.descriptions("botocore/data/s/2020/service-2.json.gz", packed)) == ["A & B\n\nShape"]
    assert list(corpus.descriptions("botocore/data/s/2020/paginators-1.json", b"{}")) == []
    pages = list(corpus.books("Brotli/tests/testdata/alice29.txt", b"a" * 20_000))
    assert [len(page) for page in pages] == [8_000, 8_000, 4_000] and not list(corpus.books("Brotli/x.txt", b"a"))
    assert list(corpus.source("twisted/a.py", b"x = 1")) == ["x = 1"] and not list(corpus.source("t/test/a.py", b""))


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write(tmp_path: Path, documents: list[str], *words: str) -> int:
    given = [
        *("--documentation", lines(tmp_path / "docs.jsonl", documents)),
        *("--prose", lines(tmp_path / "prose.jsonl", [document(1, "prose")])),
        *("--python", lines(tmp_path / "python.jsonl", [document(2, "python")])),
    ]
    return run_tool(corpus.CorpusConfig, corpus.write_corpus, ["--output-dir", str(tmp_path / "out"), *given, *words])


def test_files_of_ones_own_become_five_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, DOCUMENTS) == 0
    written = {name: (tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in SETS}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{name}.jsonl" for name in SETS)
    assert write(tmp_path, DOCUMENTS) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert write(tmp_path, DOCUMENTS[::-1], "--overwrite") == 0
    assert {name: (tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in SETS} == written


def test_too_little_text_and_bad_lines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, DOCUMENTS[:1]) == 2
    assert re.search(r"error: --output-dir \S+: the set \w+ would be empty; give more text", capsys.readouterr().err)
    assert not list((tmp_path / "out").glob("*.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    assert write(tmp_path, DOCUMENTS, "--documentation", str(tmp_path / "bad.jsonl")) == 2
    assert "is not a string but int" in capsys.readouterr().err


def test_a_download_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for brotli==1.1.0\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(ValueError, match="pip cannot download brotli==1.1.0: ERROR: No matching distribution"):
        list(corpus.packages(corpus.PROSE, tmp_path, wheels=False))


# ---- models and studies --------------------------------------------------------------------------------------------------


def run_of(name: str) -> RunConfig:
    return from_yaml((LAPTOP / f"{name}.yaml").read_text(), name)


def flops(run: RunConfig) -> float:
    return forward_flops_per_token(run.model, run.training.seq_length, run.model.padded_vocabulary_size(VOCABULARY))


def test_comments_tell_the_sizes_that_the_models_have() -> None:
    student = run_of("student")
    parameters = num_parameters(student.model, VOCABULARY, student.training.seq_length)
    assert f"{parameters / 1e6:.2f}M parameters" in (LAPTOP / "student.yaml").read_text()
    for times in (2, 4, 5, 10):
        name = f"teacher_{times}x"
        teacher, told = run_of(name), (LAPTOP / f"{name}.yaml").read_text()
        ratio = flops(student) / flops(teacher)
        assert abs(ratio / times - 1) < 0.02 and f"{ratio:.2f} times fewer FLOPs" in told
        assert f"{num_parameters(teacher.model, VOCABULARY, 128) / 1e6:.2f}M parameters" in told
        assert teacher.optimizer == student.optimizer and teacher.training.train_iters == student.training.train_iters
        assert teacher.training.seed not in (1, 2, 3, 4, 5)
        check(teacher, world_size=1)


@pytest.fixture(scope="module")
def studies() -> dict[str, tuple[Study, StudyPlan]]:
    """As a start would plan them, from the repository's root."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in PIECES:
            study = read_study(LAPTOP / f"{name}.yaml")
            teachers = {name: build(teacher.sections or {}) for name, teacher in study.teachers.items()}
            costs = {name: training_flops(run, 1, VOCABULARY) for name, run in teachers.items()}
            found[name] = study, plan_jobs(study, TeacherFacts(vocabulary_size=VOCABULARY, training_flops=costs))
    return found


def test_the_test_set_chooses_nothing(studies: dict[str, tuple[Study, StudyPlan]]) -> None:
    script = (LAPTOP / "prepare.sh").read_text()
    made = re.search(r"^for name in ([\w ]+); do", script, re.M)
    assert made and set(made[1].split()) == set(SETS)
    for name, (study, plan) in studies.items():
        for job, config in plan.configs.items():
            sets = set(config.data.valid_data_path)
            assert config.data.data_path == ("runs/laptop/data/train_text_document",)
            held_out = {word for word in sets if "/" in word}
            words = {re.sub(r".*/(\w+)_text_document", r"\1", word) for word in held_out}
            expected = {"validation"} if name in CHOOSE or job.startswith("teacher") else {"test", "prose", "python"}
            assert words == expected, (name, job)
        assert (study.primary is None) == (name in (*CHOOSE, "5_teacher_sizes", "6_beyond_salt"))


def test_every_run_is_compared_at_each_twentieth_of_its_steps(studies: dict[str, tuple[Study, StudyPlan]]) -> None:
    for _, plan in studies.values():
        for run in plan.runs:
            if run.kind != "longer":
                assert run.config.training.eval_interval * 20 == run.config.training.train_iters, run.label


def test_the_pieces_ask_what_they_should(studies: dict[str, tuple[Study, StudyPlan]]) -> None:
    rates = {run.config.optimizer.lr for run in studies["1_learning_rate"][1].runs}
    assert len(rates) >= 4 and {0.001, 0.002} < rates
    choices = [run.config.salt for run in studies["2_choices"][1].runs if run.kind == "salt"]
    assert {salt.kd_teacher_temperature for salt in choices} == {0.25, 1.0}
    assert {salt.kd_steps for salt in choices} == {40, 68, 120, 200}
    main = studies["3_main"][1]
    kinds = {"baseline", "salt", "salt_ds", "rkd", "ds_only", "random", "longer", "grow"}
    assert {run.kind for run in main.runs} == kinds
    assert {run.seed for run in main.runs if run.arm == "salt_70"} == {1, 2, 3}
    assert {run.config.training.train_iters for run in main.runs if run.arm.endswith("_70")} == {280}
    beyond = studies["6_beyond_salt"][1].runs
    assert {run.kind for run in beyond} == {"baseline", "salt", "let", "salt_let", "gated"} and len(beyond) == 3 * (1 + 2 * 4)
    tokens = {run.config.training.train_iters for run in studies["4_more_tokens"][1].runs}
    assert tokens == {800, 1600}


def test_the_page_tells_the_work_of_each_piece(studies: dict[str, tuple[Study, StudyPlan]]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \|", (LAPTOP / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == PIECES
    default = re.search(r'PIECES="\$\{PIECES:-([\w ]+)\}"', (LAPTOP / "run.sh").read_text())
    assert default and default[1].split() == PIECES
    for name, runs, steps in rows:
        plan = studies[name][1]
        assert (len(plan.runs), sum(job.steps or 0 for job in plan.jobs)) == (int(runs), int(steps.replace(",", ""))), name


# ---- scripts ------------------------------------------------------------------------------------------------------------

FAKE = """#!/usr/bin/env bash
echo "$@" >> called
case "$1 $2" in
    "tools/study.py "*)
        run=runs/laptop/$(basename "$2" .yaml)
        mkdir -p "$run/report" "$run/runs/baseline/seed_1" "$run/runs/failed/seed_1"
        touch "$run/report/report.md" "$run/runs/baseline/seed_1/latest_checkpointed_iteration.txt"
        echo log > "$run/runs/baseline/seed_1/train.jsonl"
        exit "${STATUS:-0}" ;;
    "tools/preprocess_data.py "*) mkdir -p runs/laptop/data; touch runs/laptop/data/python_text_document.idx ;;
    "tools/evaluate.py "*) touch runs/laptop/3_main/report/whole_sets.json ;;
esac
"""


@pytest.mark.parametrize("status, stops", [(0, False), (1, False), (143, True)])
def test_the_script_does_piece_after_piece_and_keeps_the_reports(tmp_path: Path, status: int, stops: bool) -> None:
    shutil.copytree(LAPTOP, tmp_path / "examples/laptop", ignore=shutil.ignore_patterns("results"))
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "PIECES": "1_learning_rate 3_main", "STATUS": str(status)}
    script = tmp_path / "examples/laptop/run.sh"
    ended = subprocess.run(["bash", script, "--seeds", "1"], env=environment, capture_output=True, text=True)
    assert ended.returncode == (status if stops else 0), ended.stderr
    called = (tmp_path / "called").read_text().splitlines()
    programs = [line.split()[0] for line in called]
    prepared = ["examples/laptop/corpus.py", "tools/train_tokenizer.py", *["tools/preprocess_data.py"] * 5]
    assert programs == prepared + (["tools/study.py"] if stops else ["tools/study.py", "tools/study.py", "tools/evaluate.py"])
    assert called[7] == "tools/study.py examples/laptop/1_learning_rate.yaml --local 2 --seeds 1"
    results = tmp_path / "examples/laptop/results"
    kept = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    both = {f"{piece}/{name}" for piece in ("1_learning_rate", "3_main") for name in ("report.md", "logs.tar.gz")}
    assert kept == (set() if stops else both | {"3_main/whole_sets.json"})
    if not stops:
        assert called[-1].startswith("tools/evaluate.py --load runs/laptop/3_main/runs/baseline/seed_1 --output ")
        with tarfile.open(results / "3_main/logs.tar.gz") as logs:
            assert logs.getnames() == ["./runs/baseline/seed_1/train.jsonl"]


def test_the_scripts_commands_have_flags_that_exist() -> None:
    for script in ("prepare.sh", "run.sh"):
        text = (LAPTOP / script).read_text().replace("\\\n", " ")
        commands = re.findall(r"tools/(\w+)\.py([^\n]*)", re.sub(r"^#.*", "", text, flags=re.M))
        assert commands
        for tool, rest in commands:
            known = {name for config in tool_configs(tool) for name in known_flags(config)}
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) <= known, (script, tool)
