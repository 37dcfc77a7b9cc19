"""Imports point one way, the package imports with the core dependencies alone, and files stay short.

The order, lowest first; a module may import what is lower, and its own package:
errors <- core, kernels <- ops <- graph <- cost <- prune <- lower <- backends <- data, report
<- train, analysis <- search <- result, summary <- api <- pareto, doctor, compare <- recipes <- cli <- __main__.
The report layer draws plain data that it is given, so it lies low: results carry a report.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prunekern"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

# Modules on one layer do not know each other.
LAYERS = (
    ("errors",),
    ("core", "kernels"),
    ("ops",),
    ("graph",),
    ("cost",),
    ("prune",),
    ("lower",),
    ("backends",),
    ("data", "report"),
    ("train", "analysis"),
    ("search",),
    ("result", "summary"),
    ("api",),
    ("pareto", "doctor", "compare"),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names}
LAYER["_C"] = LAYER["kernels"]  # the compiled half of kernels.py

FORBIDDEN_AT_IMPORT = (
    *("rich", "typer", "matplotlib", "plotly", "jinja2", "fvcore", "triton"),
    *("pytest", "hypothesis", "onnx", "onnxruntime", "openvino", "optuna"),
)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, importer: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importer.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from prunekern import cost` names a module, not the package's face.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def violations(source: str, importer: str, is_package: bool = False) -> list[str]:
    found = []
    own = importer.split(".")[1]
    for line, name in imported_modules(ast.parse(source), importer, is_package):
        parts = name.split(".")
        if parts[0] != "prunekern":
            continue
        top = parts[1] if len(parts) > 1 else ""
        if top not in LAYER:
            found.append(
                f"{importer}:{line}: imports prunekern's public face ({name}); name the module itself"
            )
        elif top != own and LAYER[top] >= LAYER[own]:
            found.append(f"{importer}:{line}: {own} may not import {name}: {top} is not below it")
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    name = module_name(file)
    if name == "prunekern":
        return  # the public face gathers from everywhere
    assert name.split(".")[1] in LAYER, f"{name} has no layer: give it one in {Path(__file__).name}"
    assert violations(file.read_text(encoding="utf-8"), name, file.name == "__init__.py") == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, (
        f"{file.name} has {lines} lines, more than {MAX_LINES}: redesign, do not just split it"
    )


@pytest.mark.parametrize(
    ("importer", "source", "count"),
    [
        ("prunekern.ops.norm", "from prunekern.core import rule", 0),
        ("prunekern.ops.norm", "from . import registry", 0),
        ("prunekern.ops.norm", "from ..graph import labels", 1),
        ("prunekern.ops.norm", "def f():\n    from prunekern.prune.plan import Plan", 1),
        ("prunekern.cost", "import prunekern.graph.trace", 0),
        ("prunekern.graph.trace", "from prunekern import cost", 1),
        ("prunekern.train.loop", "import prunekern.search", 1),
        ("prunekern.lower.fold", "from prunekern import compress", 1),
        ("prunekern.lower.fold", "import prunekern", 1),
        ("prunekern.api", "from prunekern.result import Result\nimport torch, json", 0),
        ("prunekern.result", "from prunekern.api import compress", 1),
    ],
)
def test_the_rule_itself(importer: str, source: str, count: int) -> None:
    assert len(violations(source, importer)) == count


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert violations("from . import norm", "prunekern.ops", is_package=True) == []
    assert len(violations("from .. import graph", "prunekern.ops", is_package=True)) == 1


def test_package_imports_with_core_dependencies_alone() -> None:
    """Where only torch, numpy, scipy and safetensors are, it imports, and it prints nothing."""
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN_AT_IMPORT!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
import torch
for name in [n for n in sys.modules if n.split(".")[0] in {FORBIDDEN_AT_IMPORT!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
import prunekern
for name in getattr(prunekern, "__all__", ()):
    getattr(prunekern, name)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
