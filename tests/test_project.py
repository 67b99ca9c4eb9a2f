"""The files around the code: package data, changelog, workflow, hook, templates and `.ci/run` agree with the code."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_salt

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_is_the_newest_of_the_changelog_and_the_citation() -> None:
    [newest, *_] = re.findall(r"^## (\d\S+)", CHANGELOG, re.MULTILINE)  # above it may stand what is not released
    citation = read_yaml("CITATION.cff")
    assert newest == citation["version"] == megatron_salt.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def formats_of_the_code() -> set[tuple[str, int]]:
    """(module, number) of every format number that a module of the package defines."""
    formats = set()
    for path in (ROOT / "megatron_salt").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for number in re.findall(r"^(?:[A-Z_]*FORMAT|_WITHOUT_TIES|VERSION) = (\d+)", path.read_text(), re.MULTILINE):
            formats.add((module, int(number)))
    return formats


def test_the_changelog_names_every_format_number_of_the_code() -> None:
    newest = "".join(re.split(r"^## (?=\d)", CHANGELOG, flags=re.MULTILINE)[:2])  # with what is not released yet
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| ([\d, ]*) *\| `([\w.]+)` \|$", newest, re.MULTILINE)
    named = {(module, int(number)) for written, read, module in rows for number in (written, *re.findall(r"\d+", read))}
    assert formats_of_the_code() == named


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "megatron_salt/py.typed").exists()
    assert project["tool"]["setuptools"]["package-data"]["megatron_salt"] == ["py.typed"]
    assert project["project"]["urls"] and project["project"]["authors"] and project["project"]["keywords"]


def test_every_console_script_is_a_function_without_arguments() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_links_are_followed_by_the_one_function_that_a_loop_does_not_stop() -> None:
    lines = {f"{path}:{line}" for path in (ROOT / "megatron_salt").rglob("*.py") for line in path.read_text().splitlines()}
    assert [line for line in lines if ".resolve(" in line] == []
    assert [line.split(":")[0].rsplit("/")[-1] for line in lines if "os.path.realpath(" in line] == ["files.py"]


def test_the_workflow_runs_what_anybody_can_run() -> None:
    """It checks the repository out, installs both Pythons, and calls `.ci/run`."""
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    [versions] = [step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")]
    assert set(versions.split()) == {"3.11", "3.12"}


def test_the_hook_is_make_lint_and_fetches_nothing() -> None:
    [repository] = read_yaml(".pre-commit-config.yaml")["repos"]
    [hook] = repository["hooks"]
    assert repository["repo"] == "local" and hook["language"] == "system"
    assert hook["entry"] == "make --no-print-directory lint"


def test_lint_checks_rules_format_and_types() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"python -m {command}\n" in recipe[1]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_the_site_asks_of_them(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def continuous_integration(tmp_path: Path, fails: str = "nothing", **environment: str) -> str:
    """What `.ci/run` prints when `make` only says what it was called with, by a user who is not root and has a Python 3.12.

    fails: the target that fails; then `.ci/run` must fail.

    make.log in `tmp_path` has every call, those whose output is not shown too."""
    copy = tmp_path / "home/repository/.ci/run"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text((ROOT / ".ci/run").read_text())
    programs = tmp_path / "bin"
    executable(programs / "make", f'echo "make $* [${{PIP_FIND_LINKS:-}}]" | tee -a {tmp_path}/make.log; [ $1 != {fails} ]')
    executable(programs / "id", "echo 1000")
    executable(programs / "python3.12", "exit 0")
    ended = subprocess.run(
        ["bash", str(copy)], env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode == 0) == ("== all passed (" in ended.stdout) == (fails == "nothing"), ended
    return ended.stdout


@pytest.mark.parametrize("given", [True, False], ids=["PIP_FIND_LINKS", "sibling"])
def test_ci_takes_a_built_extension_where_there_is_one(tmp_path: Path, given: bool) -> None:
    wheels = tmp_path / "home/shared/wheels"
    wheels.mkdir(parents=True)
    (wheels / "transformer_engine_torch-2.20.2-cp312-cp312-linux_x86_64.whl").touch()
    environment = {"PIP_FIND_LINKS": "https://wheels.example"} if given else {}
    sources = f"https://wheels.example {wheels}" if given else str(wheels)
    said = continuous_integration(tmp_path, **environment)
    assert f"make test-te PYTHON=python3.12, with built extensions from: {sources} (" in said
    assert f"make test-te PYTHON=python3.12 [{sources}]" in said
    made = [line.partition(" [")[0] for line in (tmp_path / "make.log").read_text().splitlines()]
    ahead = ["make .venv-docs/.installed", "make setup-dev PYTHON=python3.12", "make .venv-te/.installed PYTHON=python3.12"]
    assert [line for line in made if line in ahead] == ahead and made.index(ahead[-1]) < made.index("make docs")


def test_ci_compiles_where_there_is_no_built_extension(tmp_path: Path) -> None:
    said = continuous_integration(tmp_path)
    assert "from: nowhere, so it is compiled" in said and "make test-te PYTHON=python3.12 []" in said
    assert "make .venv-te" not in (tmp_path / "make.log").read_text()
    assert "left out: make test-slurm, which needs root" in said


@pytest.mark.parametrize("target", ["test", "docs", "quickstart", "test-short"])
def test_ci_fails_where_a_step_does_and_shows_what_it_said(tmp_path: Path, target: str) -> None:
    """Two of them run beside others."""
    said = continuous_integration(tmp_path, fails=target).splitlines()
    assert said[-1].startswith(f"make {target} ") and any(line.startswith(f"== make {target}") for line in said)


def test_contributing_names_paths_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:megatron_salt|tests|examples)/[\w./]*)", text)) | set(re.findall(r"\]\(([\w./]+)\)", text))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_files_that_the_makefile_names_exist() -> None:
    """`addprefix` joins the names of tests/model/; a moved test must not fall out of `make test-isa`."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text())
    joined = [prefix + name for prefix, rest in re.findall(r"addprefix ([\w/]+),([\w. ]+)\)", text) for name in rest.split()]
    named = re.findall(r"(?<![\w./$])(?:tests|benchmarks|examples|docs)/[\w./]+\w\.\w+", text)
    assert len(joined) > 5 and len(named) > 5
    assert [path for path in (*joined, *named) if not (ROOT / path).exists()] == []


def test_clean_removes_what_git_ignores_but_runs_and_downloads() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    recipe = re.search(r"^clean:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    variables = dict(re.findall(r"^(\w+_VENV) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = {variables.get(word.strip("$()"), word) for word in recipe[1].split()}
    environments = {word for word in words if word.startswith(".venv")}
    assert {".venv", ".venv-3.*", *variables.values()} == environments and ".venv*" in ignored
    kept = {"runs", "*.log", ".tokenizers", ".whl", "*.py[cod]", ".venv*"}
    assert ignored - kept <= words


def test_a_new_console_script_reaches_an_old_environment() -> None:
    """`make setup` installs again after pyproject.toml changed: an editable install gets its scripts only then."""
    rule = re.search(r"^\$\(VENV\)/\.installed:(.*)\|", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule and {"requirements.txt", "pyproject.toml"} <= set(rule[1].split())
