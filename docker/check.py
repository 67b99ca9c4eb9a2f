"""Whether the packages of this Python meet requirements files: one line for each that does not, and status 1.

    python3 docker/check.py requirements.txt requirements-gpu.txt

For container images, in which packages come from the image and from pip --no-deps, so that no resolver has looked at the whole.
A preview release counts as its number says: NVIDIA's torch 2.12.0a0 is later than 2.10 and earlier than 2.12.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def unmet(text: str) -> list[str]:
    """What the requirements in `text` ask for and this Python does not have; `#` begins a comment."""
    problems = []
    for line in text.splitlines():
        words = line.partition("#")[0].strip()
        if not words:
            continue
        requirement = Requirement(words)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    return problems


def main(paths: list[str]) -> int:
    """Check the files at `paths`; the exit status."""
    problems = [problem for path in paths for problem in unmet(Path(path).read_text())]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
