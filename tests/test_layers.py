"""The architecture: which module may import which, and the test that holds it.

A row names what a module may import; what those may import is allowed too, so the table is read as layers, lowest first.
A new module needs a row. A row whose module is gone must go with it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import REPOSITORY

EVERYTHING = frozenset({"*"})

LAYERS: dict[str, frozenset[str] | set[str]] = {
    # what everything stands on
    "errors": set(),
    "source": set(),
    "rng": set(),
    "quality": set(),
    "jpeg_header": set(),
    "image": {"errors", "jpeg_header", "source"},
    # bytes: numpy only, so that a bundle can be looked at anywhere
    "specs": set(),
    "bundle": {"errors", "jpeg_header", "specs"},
    "index_check": {"bundle"},
    "metadata": set(),
    "index": {"index_check", "metadata"},
    "writer": {"index", "source"},
    "codecs": {"bundle"},
    "dictionary": {"codecs", "metadata"},  # what bundles of the family `tile` have in common
    "analysis": {"dictionary"},
    "stream": {"dictionary"},
    "shared": {"analysis", "writer"},
    "reader": {"dictionary", "index"},
    # where pixels and boxes go
    "geometry": {"errors", "rng"},
    "boxes": {"geometry"},
    "crops": {"geometry"},
    "mosaic": {"geometry"},
    "color": {"errors", "rng"},
    # image -> bundle -> image
    "kernels": {"codecs"},
    "fit": {"codecs"},
    "presets": {"fit"},
    "view": {"geometry", "reader"},
    "tiles": {"stream", "view"},
    "surfaces": {"codecs", "tiles"},
    "decode": {"surfaces"},
    "picture": {"quality"},
    "lanes": {"decode", "fit"},
    "residuals": {"lanes", "picture", "presets", "view"},
    "measured": {"decode", "picture"},  # a picture is judged by the decoder itself
    "encode_siren": {"measured", "residuals"},
    "targets": {"picture", "presets"},
    "encode_jpeg": {"measured", "targets"},
    "latents": {"dictionary"},
    "encode_tile": {"analysis", "encode_jpeg", "latents", "residuals"},
    "encode": {"encode_siren", "encode_tile"},
    # the way into a training loop
    "plan": {"index", "rng"},
    "pipeline": {"boxes", "color", "decode", "plan"},
    "dataset": {"pipeline", "shared", "source"},
    "loader": {"dataset"},
    # jobs
    "annotations": {"errors", "source"},
    "units": {"annotations", "encode", "image", "targets", "writer"},
    # dictionaries from pictures
    "priors": {"dictionary"},
    "train_state": {"metadata", "writer"},
    "training": {"analysis", "latents", "train_state"},
    "assemble": {"latents", "priors", "stream", "training"},
    "train_dictionary": {"assemble", "image"},
    "fit_dictionary": {"train_dictionary", "units"},
    "convert": {"fit_dictionary", "shared"},
    "pictures": {"dataset"},
    "sheet": set(),
    "info": {"pictures", "sheet"},
    "compare": {"convert", "dataset"},
    "verify": {"dataset", "writer"},
    "reindex": {"dataset", "writer"},
    "export": {"pictures", "writer"},
    "bench": {"dataset"},
    "scenes": {"errors"},
    "console": set(),
    # what users import from the package itself
    "__init__": {"convert", "loader"},
    # the ends: nothing stands on them
    "converters": {"__init__", "errors", "source"},
    "integrations": {"__init__", "boxes", "color", "crops", "decode", "mosaic"},
    "cli": EVERYTHING,
    "demo": EVERYTHING,
    "reports": EVERYTHING,
}
ENDS = {"cli", "demo", "reports", "converters", "integrations"}

# The core's own dependencies: name of the import, name of the distribution.
DEPENDENCIES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "typer": "typer", "rich": "rich", "yaml": "pyyaml"}
# Packages that only one place imports.
OWNED = {
    "yaml": r"converters/yolo\w*\.py",
    "triton": r"rinr_loader/kernels/\w+\.py",
    "ultralytics": r"integrations/ultralytics\w*\.py",
    "torchvision": r"integrations/torchvision\w*\.py|rinr_loader/codecs/jpeg\.py",  # the codec does without it where it is not there
    "nvidia": r"integrations/dali\w*\.py",
    "webdataset": r"integrations/webdataset\w*\.py",
    "lightning": r"integrations/lightning\w*\.py",
}
TORCHLESS = {"errors", "source", "specs", "jpeg_header", "bundle", "index_check", "index", "metadata"}
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save"}

FOLDERS = {"rinr_loader": "rinr_loader", "converters": "rinr_loader.converters", "integrations": "rinr_loader.integrations"}


@dataclass(frozen=True)
class Module:
    """One file: its path in the repository, its installed name, and its row in the table."""

    path: str
    name: str
    row: str


@cache
def _modules() -> tuple[Module, ...]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found.append(Module(path=path.relative_to(REPOSITORY).as_posix(), name=name, row=_row(name)))
    return tuple(found)


def _row(name: str) -> str:
    """Give the row of a dotted name: `rinr_loader.codecs.siren` belongs to `codecs`, `rinr_loader` to `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _nodes(module: Module) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((REPOSITORY / module.path).read_text(encoding="utf-8"), filename=module.path))


def _imports(module: Module) -> Iterator[tuple[str, str]]:
    """Yield `file:line` and dotted name of every import, wherever it stands: `from a import b` is `a.b`."""
    for node in _nodes(module):
        if isinstance(node, ast.Import):
            yield from ((f"{module.path}:{node.lineno}", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            yield from ((f"{module.path}:{node.lineno}", f"{package}.{alias.name}") for alias in node.names)


def _internal(module: Module) -> Iterator[tuple[str, str, str]]:
    """Yield `file:line`, dotted name and row of every import from this package."""
    rows = {found.row for found in _modules()} | set(LAYERS)
    for place, dotted in _imports(module):
        if dotted.split(".")[0] == "rinr_loader":
            direct = dotted.count(".") == 1 and _row(dotted) not in rows  # from rinr_loader import DataLoader
            yield place, dotted, "__init__" if direct else _row(dotted)


@cache
def _allowed(row: str) -> frozenset[str]:
    """Give every row that a row may import: itself, its own entries and theirs."""
    if LAYERS[row] == EVERYTHING:
        return frozenset(LAYERS)
    return frozenset({row}).union(*(_allowed(lower) for lower in LAYERS[row]))


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    rows = {module.row for module in _modules()}
    assert not rows - set(LAYERS), f"modules without a row in LAYERS, add one: {sorted(rows - set(LAYERS))}"
    assert not set(LAYERS) - rows, f"rows of LAYERS without a module, write it or drop the row: {sorted(set(LAYERS) - rows)}"


def test_rows_stand_on_rows_above_them() -> None:
    above: set[str] = set()
    for row, entries in LAYERS.items():
        assert entries == EVERYTHING or entries <= above - ENDS, f"{row} stands on what is not above it, or on an end"
        above.add(row)


def test_imports_follow_the_table() -> None:
    wrong = [
        f"{place}: {module.row} may not import {dotted}"
        for module in _modules()
        for place, dotted, row in _internal(module)
        if module.row in LAYERS and row not in _allowed(module.row)
    ]
    assert not wrong, "\n".join(wrong)


def test_converters_and_integrations_use_public_names_only() -> None:
    wrong = []
    for module in _modules():
        if module.row not in ("converters", "integrations"):
            continue
        foreign = [(place, dotted) for place, dotted, row in _internal(module) if row != module.row]
        wrong += [f"{place}: {dotted}" for place, dotted in foreign if any(part.startswith("_") for part in dotted.split("."))]
        names = {dotted.split(".")[-1] for _, dotted in foreign}
        wrong += [
            f"{module.path}:{node.lineno}: {ast.unparse(node)}"
            for node in _nodes(module)
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and ast.unparse(node.value).split(".")[-1] in names
        ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute() -> None:
    wrong = [f"{place}: {dotted}" for module in _modules() for place, dotted in _imports(module) if dotted.startswith(".")]
    assert not wrong, "\n".join(wrong)


def test_other_packages_are_imported_where_they_belong() -> None:
    wrong = []
    for module in _modules():
        for place, dotted in _imports(module):
            package = dotted.split(".")[0]
            if package in OWNED:
                right = re.fullmatch(OWNED[package], module.path) is not None
            else:
                right = package in sys.stdlib_module_names or package in DEPENDENCIES or package == "rinr_loader"
            if not right:
                wrong.append(f"{place}: {dotted}")
    assert not wrong, "\n".join(wrong)


def test_bundles_can_be_read_without_torch() -> None:
    wrong = [
        f"{place}: {dotted}"
        for module in _modules()
        if module.row in TORCHLESS
        for place, dotted in _imports(module)
        if dotted.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)
    assert all(_allowed(row) <= TORCHLESS for row in TORCHLESS)


def test_nothing_unpickles_or_evaluates() -> None:
    wrong = []
    for module in _modules():
        wrong += [f"{place}: {dotted}" for place, dotted in _imports(module) if dotted.split(".")[0] in UNSAFE_MODULES]
        wrong += [
            f"{module.path}:{node.lineno}: {ast.unparse(node)}"
            for node in _nodes(module)
            if (isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS)
            or (isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False")
        ]
    assert not wrong, "\n".join(wrong)


def _list_of(name: str) -> set[str]:
    """Read one list of strings from pyproject.toml; tomllib is not in Python 3.10."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{name} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert block, f"pyproject.toml has no list {name}"
    return set(re.findall(r'"([\w.-]+)', block[1]))


def test_the_dependencies_are_those_that_are_declared() -> None:
    assert {name.lower() for name in _list_of("dependencies")} == set(DEPENDENCIES.values())


def test_every_folder_with_code_is_an_installed_package() -> None:
    folders = {Path(module.path).parent for module in _modules()}
    named = {".".join((FOLDERS[folder.parts[0]], *folder.parts[1:])) for folder in folders}
    assert named == _list_of("packages")
    bare = sorted(str(folder) for folder in folders if not (REPOSITORY / folder / "__init__.py").is_file())
    assert not bare, f"without an __init__.py: {bare}"
