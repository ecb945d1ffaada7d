"""The layer rule, read off the source: who may import whom, and where one may ask for CUDA.

Knows only syntax trees and paths; nothing of flexbatch is imported.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# First the lowest layer. A module is its own name or lies below a name that is listed.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words", ("errors", "options", "requests", "sampling", "shapes", "units")),
    ("decisions", ("jobs", "policy", "scheduler")),
    ("math", ("compression", "kernels")),
    ("memory", ("memory",)),
    ("models", ("checkpoint", "lora", "models", "text")),
    ("runtime", ("runtime",)),
    ("finetune", ("finetune",)),
    ("surface", ("__init__", "__main__", "api", "cli", "evaluation")),
)
WORDS, DECISIONS = 0, 1
NO_TENSORS = {"numpy", "peft", "safetensors", "tokenizers", "torch", "transformers", "triton"}
ROOT_FOLDERS = {"compression", "policy"}


def layer_of(module: str) -> int | None:
    """Return the layer's number of ``flexbatch.a.b``, or None for a module that nobody gave a layer."""
    name = module.partition(".")[2].partition(".")[0] or "__init__"
    for number, (_, members) in enumerate(LAYERS):
        if name in members or (number == WORDS and name.startswith(("config_", "shapes_"))):
            return number
    return None


def module_of(path: str) -> str:
    """``flexbatch/models/opt.py`` -> ``flexbatch.models.opt``; a package's ``__init__.py`` -> the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str, str | None]]:
    """Yield (line, module, name taken from it or None) of every import; nested, typing-only, literal ones too."""
    package = module_of(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function, argument = ast.unparse(node.func), node.args[0].value
            if function.rpartition(".")[2] in {"import_module", "__import__"} and isinstance(argument, str):
                yield node.lineno, argument, None


def asks_for_cuda(tree: ast.AST) -> Iterator[int]:
    """Yield the line of every condition (if, while, match, comprehension, ``a if b else c``) that mentions CUDA."""
    for node in ast.walk(tree):
        tests: list[ast.AST] = []
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = list(node.ifs)
        elif isinstance(node, ast.Match):
            tests = [part for case in node.cases for part in (case.pattern, case.guard) if part is not None]
        for test in tests:
            if any("cuda" in word.lower() for part in ast.walk(test) for word in _words(part)):
                yield getattr(test, "lineno", 0)


def _words(node: ast.AST) -> list[str]:
    match node:
        case ast.Constant(value=str(word)) | ast.Name(id=word) | ast.Attribute(attr=word):
            return [word]
    return []


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one cycle, the first repeated at the end, or nothing."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return one line for each breach of the rule in ``sources``: text by path, as seen from the repository's root."""
    modules = {module_of(path) for path in sources if path.startswith("flexbatch/")}
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    cuda: list[str] = []
    for path, text in sorted(sources.items()):
        tree = ast.parse(text, path)
        taken = list(imports(tree, path))
        tops = [(line, module.partition(".")[0]) for line, module, _ in taken]
        found += [f"{path}:{line}: import flexbatch.{top}, not {top}" for line, top in tops if top in ROOT_FOLDERS]
        if not path.startswith("flexbatch/"):
            continue
        cuda += [f"{path}:{line}" for line in asks_for_cuda(tree)]
        here = layer_of(module_of(path))
        if here is None:
            found.append(f"{path}: belongs to no layer")
            continue
        found += [
            f"{path}:{line}: {LAYERS[here][0]} may not import {top}"
            for line, top in tops
            if (here == WORDS and top != "flexbatch" and top not in sys.stdlib_module_names)
            or (here == DECISIONS and top in NO_TENSORS)
        ]
        targets = graph.setdefault(module_of(path), set())
        for line, module, name in taken:
            if module.partition(".")[0] != "flexbatch":
                continue
            target = f"{module}.{name}" if name is not None and f"{module}.{name}" in modules else module
            targets.add(target)
            there = layer_of(target)
            if there is None:
                found.append(f"{path}:{line}: {target} belongs to no layer")
            elif there > here:
                found.append(f"{path}:{line}: {LAYERS[here][0]} may not import {target} ({LAYERS[there][0]})")
    if loop := cycle(graph):
        found.append("import cycle: " + " -> ".join(loop))
    if len({place.partition(":")[0] for place in cuda}) > 1:
        found.append("more than one file asks for CUDA: " + ", ".join(cuda))
    return found


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files below ``folder``, links to folders followed."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def test_this_repository_keeps_the_rule() -> None:
    parts = ("flexbatch", "tests", "benchmarks", "scripts", "examples")
    files = [path for part in parts for path in python_files(ROOT / part)]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert any(path.startswith("flexbatch/policy/") for path in sources)
    assert violations(sources) == []


@pytest.mark.parametrize("name", sorted(ROOT_FOLDERS))
def test_a_root_folder_is_the_package_of_its_name(name: str) -> None:
    link = ROOT / "flexbatch" / name
    assert link.is_symlink(), f"{link} is no link: this clone was made without symlink support"
    assert link.readlink() == Path("..", name)


def test_compression_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "compression" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        pytest.param({"flexbatch/odd.py": ""}, "belongs to no layer", id="unmapped"),
        pytest.param({"flexbatch/odd/__init__.py": ""}, "belongs to no layer", id="unmapped package"),
        pytest.param({"flexbatch/cli/a.py": "import flexbatch.odd.b"}, "odd.b belongs to no layer", id="to unmapped"),
        pytest.param({"flexbatch/units.py": "import numpy"}, "words may not import numpy", id="words: stdlib"),
        pytest.param({"flexbatch/shapes_opt.py": "import psutil"}, "may not import psutil", id="words: shapes_*"),
        pytest.param({"flexbatch/policy/a.py": "import numpy.linalg"}, "may not import numpy", id="decisions: numpy"),
        pytest.param({"flexbatch/jobs/a.py": "def f():\n from torch import nn"}, "a.py:2: ", id="decisions: nested"),
        pytest.param(
            {"flexbatch/kernels/a.py": "if TYPE_CHECKING:\n from flexbatch.memory.b import B"},
            "math may not import flexbatch.memory.b (memory)",
            id="upwards, for types",
        ),
        pytest.param({"flexbatch/text/a.py": "from ..runtime import b"}, "import flexbatch.runtime", id="relative"),
        pytest.param({"flexbatch/models/a.py": "from flexbatch import LLM"}, "flexbatch (surface)", id="to the root"),
        pytest.param(
            {"flexbatch/jobs/a.py": "from flexbatch import api", "flexbatch/api.py": ""},
            "flexbatch.api (surface)",
            id="module from the root",
        ),
        pytest.param(
            {"flexbatch/models/a.py": "importlib.import_module('flexbatch.cli.main')"}, "cli.main", id="by literal name"
        ),
        pytest.param(
            {
                "flexbatch/models/a.py": "from flexbatch.models.b import b",
                "flexbatch/models/b.py": "def f():\n from flexbatch.models import c",
                "flexbatch/models/c.py": "import flexbatch.models.a",
            },
            "cycle: flexbatch.models.a -> flexbatch.models.b -> flexbatch.models.c -> flexbatch.models.a",
            id="cycle",
        ),
        pytest.param({"tests/a.py": "import policy"}, "import flexbatch.policy", id="root policy"),
        pytest.param({"flexbatch/cli/a.py": "from compression.b import c"}, "not compression", id="root compression"),
        pytest.param(
            {"flexbatch/api.py": "if d == 'cuda:0': pass", "flexbatch/memory/a.py": "x = 1 if y.is_cuda else 2"},
            "more than one file asks for CUDA: flexbatch/api.py:1, flexbatch/memory/a.py:1",
            id="cuda twice",
        ),
        pytest.param(
            {
                "flexbatch/api.py": "match d:\n case 'cuda': pass",
                "flexbatch/memory/a.py": "x = [y for y in z if torch.cuda.is_available()]",
            },
            "more than one file",
            id="cuda in match and comprehension",
        ),
    ],
)
def test_a_breach_is_found(sources: dict[str, str], expected: str) -> None:
    found = violations(sources)
    assert len(found) == 1, found
    assert expected in found[0]


def test_what_the_rule_allows_passes() -> None:
    sources = {
        "flexbatch/__init__.py": "from flexbatch.api import LLM",
        "flexbatch/api.py": "import torch\nfrom flexbatch import errors\nfrom flexbatch.runtime.engine import Engine",
        "flexbatch/errors.py": "import enum",
        "flexbatch/policy/plan.py": "import scipy\nfrom flexbatch.units import Shares",
        "flexbatch/runtime/engine.py": "if device == 'cuda': pass\nname = 'cuda'",
        "flexbatch/runtime/__init__.py": "from flexbatch.runtime.engine import Engine",
        "tests/a.py": "from flexbatch.policy.plan import Plan\nif torch.cuda.is_available(): pass",
    }
    assert violations(sources) == []
