"""The pages of the repository as text: commands, sentences, flags, the annotated tree. For `tests/test_docs.py`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import tomllib
from pathlib import Path

from megatron_salt.cli import known_flags

ROOT = Path(__file__).parents[3]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
BODIES = {
    tool.stem: next(re.finditer(r"^from (megatron_salt[\w.]+) import main$", tool.read_text(), re.MULTILINE))[1]
    for tool in TOOLS
}
"""The module with the code of each tool: what tools/NAME.py runs."""
PROGRAMS = [ROOT / f"{module.replace('.', '/')}.py" for module in BODIES.values()]
SCRIPTS = {
    name: {module: tool for tool, module in BODIES.items()}.get(target.partition(":")[0], "pretrain")
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
}
"""Console scripts: name to that of the tool, such as salt-score to score_data."""


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of(text: str) -> list[str]:
    """Commands: lines of fenced blocks and indented lines, with the lines that a backslash continues, and what stands in backquotes."""
    joined = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", joined, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```", "", joined, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"^    (.+)$", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose)


def sentences(text: str) -> list[str]:
    """Sentences and points of lists; not code, tables, headings, and the targets of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("#", "|")))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`\n]*`", "code", text)
    paragraphs = re.split(r"\n\s*\n|\n\s*- ", text)
    parts = [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))]
    return [part for part in parts if words(part) > 1]


def words(sentence: str) -> int:
    return len(re.findall(r"[\w'.-]*\w[\w'.-]*", sentence))


def anchors(text: str) -> set[str]:
    """Headings as GitHub and MkDocs both name them."""
    headings = [line.lstrip("# ").strip().lower() for line in text.splitlines() if line.startswith("#")]
    kept = [re.sub(r"[^\w -]", "", heading) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept} & {re.sub(r"[\s-]+", "-", heading) for heading in kept}


def flags_of(config_class: type) -> set[str]:
    return set(known_flags(config_class))


def tool_configs(name: str) -> list[type]:
    """The flags of a tool; of each command, where it has several."""
    module = importlib.import_module(BODIES[name])
    return [
        member
        for name, member in vars(module).items()
        if name.endswith("Config")
        and dataclasses.is_dataclass(member)
        and not member.__module__.startswith("megatron_salt.config")
    ]


def tree_paths() -> set[str]:
    """Every file and directory that the annotated tree names."""
    block = re.search(r"```\n(megatron_salt/\n.*?)```", PAGES["docs/architecture.md"], re.DOTALL)
    assert block
    paths, parents = set(), [""] * 8
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"(?:[\w.]+(?:\.\w+|/) ?)+", line.strip())
        assert names, line
        for name in names[0].split():
            paths.add("".join(parents[:depth]) + name)
            parents[depth] = name if name.endswith("/") else parents[depth]
    return paths


def string_templates() -> list[str]:
    """Every string of the package's code; an f-string has a NUL for each value."""
    templates = []
    for path in (ROOT / "megatron_salt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                templates.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                templates.append(node.value)
    return templates
