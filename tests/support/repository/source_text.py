"""What source text imports, sets and holds, read without importing it. For `tests/test_import_rules.py`."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]


@functools.cache
def sources(*folders: str) -> dict[str, str]:
    """Module name -> source text of every Python file below the folders."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, (file.read_text() for file in files), strict=True))


def imports(source: str) -> list[str]:
    """All imports of a module, in the order of lines. `from a import b` counts as a.b."""
    return _imports(ast.parse(source))


def _imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not used here"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [name for _, name in sorted(found)]


def within(name: str, module: str) -> bool:
    """Whether `name` is the module or something inside it."""
    return name == module or name.startswith(module + ".")


def distributed(source: str) -> list[str]:
    """Uses of torch.distributed."""
    attributes = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [name for name in imports(source) + attributes if within(name, "torch.distributed")]


def patches(source: str) -> list[str]:
    """Attributes of torch and megatron that are set or deleted, and entries of sys.modules that are."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                if (module or alias.name).split(".")[0] in ("torch", "megatron", "apex", "transformer_engine"):
                    foreign.add(alias.asname or alias.name.split(".")[0])
    written = [(_root(target), ast.unparse(target)) for target in _written(tree)]
    return [target for root, target in written if root in foreign or "sys.modules" in target]


def _written(tree: ast.AST) -> Iterator[ast.expr]:
    """Attributes and entries that a module sets or deletes, by a statement or by a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
                yield node.args[0]
            elif isinstance(node.func, ast.Attribute) and node.func.attr in ("setdefault", "update", "pop"):
                yield node.func.value


def _root(expression: ast.expr) -> str:
    """The name that `a.b[c].d` starts from."""
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


def at_run_time(source: str) -> ast.Module:
    """A module without what stands under `if TYPE_CHECKING:`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def import_graph(modules: dict[str, str]) -> dict[str, set[str]]:
    """Each module's imports among `modules` at run time, those inside functions included."""

    def module_of(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        name: {target for target in map(module_of, _imports(at_run_time(source))) if target not in (None, name)}
        for name, source in modules.items()
    }


def circular(modules: dict[str, str]) -> list[str]:
    """Modules whose imports lead back to themselves."""
    graph = import_graph(modules)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    return sorted(name for name in graph if name in reachable(name))


def crowded(files: Iterable[str], limit: int = 15) -> dict[str, int]:
    """Folders with more than `limit` modules, and how many they have; `__init__.py` does not count."""
    folders = Counter(str(Path(file).parent) for file in files if file.endswith(".py") and Path(file).name != "__init__.py")
    return {folder: count for folder, count in folders.items() if count > limit}
