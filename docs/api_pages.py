"""The Python API's pages, made from the docstrings at build time: an MkDocs hook and a Griffe extension.

There is one page for each folder of the package. It lists every module of its folder, so a new module needs no change here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_salt"


def folder_pages() -> dict[str, str]:
    """Markdown of each page by its path below docs/."""
    pages = {}
    for folder in sorted({path.parent for path in (ROOT / PACKAGE).rglob("*.py")}):
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        if modules:
            pages[f"api/{name}.md"] = f"# {name}\n\n" + "\n".join(f"::: {name}.{module}\n" for module in modules)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the navigation's entry `api/` by the pages."""
    entries = ["api/index.md", *folder_pages()]
    config.nav = [{title: entries if page == "api/" else page} for item in config.nav or [] for title, page in item.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and a first page with links to them."""
    pages = folder_pages()
    links = [f"- [{Path(path).stem}]({Path(path).name})" for path in pages]
    index = "\n".join(
        ["# Python API", "", "Every module, class and function, from the docstrings. One page a folder.", "", *links]
    )
    for path, text in {"api/index.md": index, **pages}.items():
        files.append(File.generated(config, path, content=text))
    return files


def as_markdown(prose: str) -> str:
    """Prose with the characters escaped that Markdown would take for markup; not in backquotes and not in indented code."""
    if prose.startswith("    "):
        return prose
    parts = re.split(r"(`[^`]*`)", prose)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", part.replace("<", "&lt;")) for part in parts
    )


class ProseDocstrings(griffe.Extension):
    """Our docstrings are prose: brackets and stars in them are shapes and products."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n".join(map(as_markdown, obj.docstring.value.split("\n")))
