"""The container files: one base image, versions that the tests ran on, and nothing of the image replaced. Nothing is built here."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
APPTAINER = (ROOT / "docker/apptainer.def").read_text()
CHECK = runpy.run_path(str(ROOT / "docker/check.py"))
"""By path: `docker` may be a package of the environment."""

OF_THE_IMAGE = {"torch", "numpy", "pyyaml", "tensorboard", "matplotlib", "transformer-engine"}
"""Requirements that NVIDIA's image brings. docker/check.py asks for them while an image is built."""


def names(file: str) -> set[str]:
    """The packages that a requirements file names."""
    lines = (ROOT / file).read_text().splitlines()
    return {re.split(r"[^\w.-]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def versions(file: str) -> dict[str, str]:
    """Package and exact version of each line of a requirements file."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))


def test_both_files_begin_with_the_same_image_and_install_the_same() -> None:
    [image] = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    assert f"\nFrom: {image}\n" in APPTAINER
    command = "PIP_CONSTRAINT='' python3 -m pip install --no-cache-dir --no-deps -r /opt/megatron_salt/docker/requirements.txt"
    check = (
        "python3 /opt/megatron_salt/docker/check.py /opt/megatron_salt/requirements.txt /opt/megatron_salt/requirements-gpu.txt"
    )
    for text in (DOCKERFILE, APPTAINER):
        assert command in text and check in text


@pytest.mark.parametrize("text", [DOCKERFILE, APPTAINER], ids=["Dockerfile", "apptainer.def"])
def test_files_that_are_copied_exist_and_are_the_ones_used(text: str) -> None:
    used = set(re.findall(r"/opt/megatron_salt/([\w./-]+\.(?:txt|py))", text))
    copied = {word for line in copy_lines(text) for word in line.split() if re.fullmatch(r"(docker/)?[\w-]+\.(txt|py)", word)}
    assert used == copied and all((ROOT / file).exists() for file in used)


def copy_lines(text: str) -> list[str]:
    """The lines that copy files into an image: COPY of a Dockerfile, the section %files of Apptainer's definition."""
    if "%files" in text:
        return text.split("%files\n")[1].split("\n\n")[0].splitlines()
    return [line for line in text.splitlines() if line.startswith("COPY ")]


def test_the_versions_are_those_that_the_tests_ran_on_with_the_images_python() -> None:
    tested = versions("constraints-py312.txt")
    installed = versions("docker/requirements.txt")
    assert installed and {name: tested.get(name) for name in installed} == installed


def test_every_requirement_comes_from_the_image_or_is_installed() -> None:
    required = names("requirements.txt") | names("requirements-gpu.txt")
    installed = set(versions("docker/requirements.txt"))
    assert required - installed == OF_THE_IMAGE and not installed & OF_THE_IMAGE


def test_this_environment_meets_the_requirements(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`check` asks of an image what holds here, where pip has resolved the same file."""
    assert CHECK["main"]([str(ROOT / "requirements.txt")]) == 0
    wrong = tmp_path / "requirements.txt"
    wrong.write_text("pytest<1\nnumpy  # there\n# comment\nno-such-package-of-anybody>=2\n")
    assert CHECK["main"]([str(wrong)]) == 1
    [version, absent] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"pytest is \S+, not <1", version) and absent == "no-such-package-of-anybody is not installed"


@pytest.mark.parametrize("version, problems", [("2.12.0a0+5aff.nv26.05", 0), ("2.10.0a0+b4e4", 1), ("2.13.0+cpu", 0)])
def test_previews_of_torch_count_by_their_number(monkeypatch: pytest.MonkeyPatch, version: str, problems: int) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert len(CHECK["unmet"]("torch>=2.10")) == problems


def test_the_dockerfile_is_clean() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    if linter is None:
        pytest.skip("hadolint is not installed (make setup-dev)")
    ended = subprocess.run([linter, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
