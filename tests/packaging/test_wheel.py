"""The installed package: a wheel is enough to work without the checkout.

The wheel is built from a copy of the sources and installed alone into a fresh environment. A .pth file lends that environment the
dependencies of this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.support.program import argv

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *(f"requirements{extra}.txt" for extra in ("", "-gpu", "-hf", "-eval")))

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an environment with the wheel and the dependencies of this environment."""
    home = tmp_path_factory.mktemp("wheel")
    source, built, environment = home / "source", home / "built", home / "environment"
    shutil.copytree(ROOT / "megatron_salt", source / "megatron_salt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-build-isolation", "--no-deps", "--no-index", "-w", str(built)], check=True
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [wheel] = built.glob("*.whl")
    subprocess.run([*pip, "--python", str(environment), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return environment


def run(environment: Path, directory: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, run in `directory` without PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / "bin" / program), *words]
    return subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True, timeout=300)


def test_the_environment_has_the_wheels_package_and_its_types(environment: Path, tmp_path: Path) -> None:
    ended = run(environment, tmp_path, "python", "-c", "import megatron_salt, torch; print(megatron_salt.__file__)")
    package = Path(ended.stdout.strip()).parent
    assert environment in package.parents and (package / "py.typed").exists(), ended


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_shows_its_help(environment: Path, tmp_path: Path, script: str) -> None:
    ended = run(environment, tmp_path, script, "--help")
    assert ended.returncode == 0 and f"{script} [-h]" in ended.stdout and "--help" in ended.stdout, ended


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_exits_as_its_tool_does(environment: Path, tmp_path: Path, script: str) -> None:
    ended = run(environment, tmp_path, script, "--no-such-flag")
    assert ended.returncode == 2 and ended.stderr.startswith("error: unknown flag --no-such-flag"), ended


def test_text_becomes_a_trained_model_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a house in which a stranger finds his room"}\n' * 100)
    steps = (
        ("salt-tokenizer", "--input", "text.jsonl", "--output", "words.model", "--vocab-size", "300"),
        ("salt-preprocess", "--input", "text.jsonl", "--output-prefix", "words", "--append-eod",
         "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "words.model"),
        ("salt-pretrain", *argv(tokenizer_type=None, data_path="words_text_document", train_iters=2, save="run")),
        ("salt-inspect", "--load", "run", "--verify"),
        ("salt-generate", "--load", "run", "--prompt", "a", "--max-new-tokens", "3"),
        ("salt-report", "--run", "a=run/train.jsonl"),
    )  # fmt: skip
    for script, *words in steps:
        ended = run(environment, tmp_path, script, *words)
        assert ended.returncode == 0, (script, ended)
    assert "a  " in ended.stdout and (tmp_path / "words_text_document.manifest.json").exists()
