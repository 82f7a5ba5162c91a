"""The rules of docs/architecture.md: imports go one way; folders, files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A package may import from those after it; packages in one set never import each other.
ORDER = [{"cli"}, {"report", "finetuning"}, {"evaluation"}, {"training"}, {"tasks"}, {"models", "data"}]
ORDER += [{"batch", "lfs", "files", "ranges", "arguments"}, {"ops"}, {"reference", "kernels", "_C"}]
PLACE = {package: place for place, packages in enumerate(ORDER) for package in packages}
FREE = {"_version", "env", ""}  # env may import everything; "" is the package itself, which imports nothing
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 14, 400, 60


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module or name, whether it is imported at run time) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from ((f"{node.module}.{alias.name}", id(node) not in for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ".", True
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in for_types) for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def package_of(dotted: str) -> str | None:
    """ "models" for "softmask.models.config", None for other packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "softmask" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules("softmask"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "softmask").parts[0].removesuffix(".py").replace("__init__", "")
    if own in FREE:
        return
    for name, runs in imported(path):
        package = package_of(name)
        if package is None or package == own or package in FREE or package in ("backend", "BackendError") or not runs:
            continue
        assert package in PLACE, f"{name}: not in docs/architecture.md"
        assert PLACE[package] > PLACE[own], f"{path.name} of {own} imports {name}"


@pytest.mark.parametrize("path", [p for p in modules("softmask/models") if p.name == "config.py"], ids=str)
def test_configurations_import_no_layers(path: Path) -> None:
    assert not [name for name, _ in imported(path) if "layers" in name or name.startswith("torch")]


@pytest.mark.parametrize("folder", ["softmask", "train", "benchmarks", "tests"])
def test_imports_are_absolute_and_name_a_module(folder: str) -> None:
    """Editors, type checkers and grep find every module under its name."""
    for path in modules(folder):
        for name, _ in imported(path):
            first = name.split(".")[0]
            assert name != ".", f"{path}: a relative import"
            if first not in ("softmask", "benchmarks", "tests"):
                continue
            places = [ROOT.joinpath(*name.split(".")[:count]) for count in range(1, len(name.split(".")) + 1)]
            deepest = [place for place in places if place.is_dir() or place.with_suffix(".py").is_file()][-1]
            assert deepest.relative_to(ROOT).parts[1:] or first == "softmask", f"{path}: {name} does not exist"


def test_folders_files_and_functions_are_small() -> None:
    for folder in ("softmask", "tests"):
        folders = {path.parent for path in modules(folder)}
        counts = {one: len([p for p in one.glob("*.py") if p.name != "__init__.py"]) for one in folders}
        assert {one: count for one, count in counts.items() if count > MAX_FILES} == {}
    sources = [path for folder in ("softmask", "kernels", "train", "benchmarks", "tests") for path in modules(folder)]
    sources += [path for kind in ("*.cpp", "*.h", "*.cu") for path in (ROOT / "csrc").rglob(kind)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources if path.suffix == ".py"}
    functions = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    long = [
        f"{path.name}:{node.name}"
        for path, node in functions
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []
