"""The house plan, kept: which room may import which, what is imported nowhere, and how long a file may be."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxvlm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# Room -> the other rooms it may import. The leaves may be imported by every room and import none.
ROOMS = {
    "kernels": set(),
    "parallel": set(),
    "models": {"kernels", "parallel"},
    "data": set(),
    "weights": {"models", "parallel"},
    "train": {"data", "kernels", "models", "parallel", "weights"},  # kernels: the loss
    "infer": {
        "data",
        "kernels",
        "models",
        "parallel",
        "weights",
    },  # kernels: the intervals a cached step attends to
    "evals": {"infer", "data"},
    "datagen": {"data"},
    "serve": {"infer"},
}
LEAVES = {"config", "html", "progress", "templates"}
# Files at the top of the package: the command line and the main job see everything, the leaves see nothing.
TOP = {
    "main": set(ROOMS),
    "data_verbs": {"data"},
    "eval_verbs": {"data", "evals", "infer"},
    "study_verbs": {"data", "evals", "infer"},
    "job": set(ROOMS),
    "doctor": set(),
    "__init__": {"infer"},
}
TOP["planner"] = {"parallel", "train"}
TOP |= {leaf: set() for leaf in ("config_files", *LEAVES)}

NOWHERE = {"torch", "tensorflow", "clu"}  # torch is an oracle in tests and a peer in benchmarks
NOT_IN_DATA = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers"}  # the data room is numpy only


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names imported anywhere in a module, in functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the top, `from jaxvlm...`"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_violations(path: Path, tree: ast.AST) -> list[str]:
    mine = room_of(path)
    allowed = (ROOMS.get(mine) if path.parent != PACKAGE else TOP.get(mine)) or set()
    known = set(ROOMS) | set(TOP)
    found = []
    for name, line in imports(tree):
        parts = name.split(".")
        if parts[0] != "jaxvlm" or len(parts) < 2 or parts[1] not in known:
            continue  # another package, or a name of jaxvlm/__init__.py
        other = parts[1]
        if other not in allowed | LEAVES | {mine} and path.parent != PACKAGE:
            found.append(f"{path.relative_to(ROOT)}:{line}: {mine}/ may not import jaxvlm.{other}")
        elif path.parent == PACKAGE and other in ROOMS and other not in allowed:
            found.append(f"{path.relative_to(ROOT)}:{line}: {mine}.py may not import jaxvlm.{other}")
    return sorted(set(found))


def foreign_violations(path: Path, tree: ast.AST) -> list[str]:
    forbidden = NOWHERE | (NOT_IN_DATA if room_of(path) == "data" else set())
    bad = []
    for name, line in imports(tree):
        if name.split(".")[0] in forbidden or name == "flax.nnx" or name.startswith("flax.nnx."):
            bad.append(f"{path.relative_to(ROOT)}:{line}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "nnx":
            bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: uses nnx")
    return bad


def mesh_contexts(path: Path, tree: ast.AST) -> list[str]:
    """`with mesh:` makes logical sharding constraints silent no-ops; `with jax.set_mesh(mesh):` does not."""
    bad = []
    for node in ast.walk(tree):
        for item in getattr(node, "items", ()) if isinstance(node, ast.With | ast.AsyncWith) else ():
            value = item.context_expr
            called = isinstance(value, ast.Call)
            value = value.func if called else value
            name = getattr(value, "attr", None) or getattr(value, "id", "")
            if name in ("Mesh", "make_mesh") if called else "mesh" in name.lower():
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: `with {ast.unparse(item.context_expr)}:`")
    return bad


@pytest.mark.parametrize("check", [room_violations, foreign_violations, mesh_contexts])
def test_rules(check):
    problems = [problem for path in FILES for problem in check(path, parse(path))]
    assert not problems, "\n".join(problems)


def test_every_folder_is_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders <= set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} <= set(TOP)


def test_rooms_have_no_cycles():
    order: list[str] = []
    while len(order) < len(ROOMS):
        ready = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert ready, f"a cycle among {set(ROOMS) - set(order)}"
        order += ready


def test_configs_build_plain_values():
    """A config is read before jax starts: only ml_collections, the standard library and jaxvlm.config."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        for name, line in imports(parse(path)):
            fine = name.split(".")[0] in {"ml_collections", *sys.stdlib_module_names} or name.startswith(
                "jaxvlm.config"
            )
            assert fine or name == "jaxvlm", f"{path.name}:{line} imports {name}"


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}; split them"


@pytest.mark.parametrize(
    ("check", "file", "code"),
    [
        (room_violations, "kernels/attention.py", "from jaxvlm.models import vit"),
        (room_violations, "models/vlm.py", "def f():\n    import jaxvlm.train.step"),
        (room_violations, "data/image.py", "from jaxvlm import models"),
        (room_violations, "config.py", "from jaxvlm.data import image"),
        (foreign_violations, "data/loader.py", "def f():\n    import jax.numpy as jnp"),
        (foreign_violations, "data/tokenizer.py", "from transformers import AutoTokenizer"),
        (foreign_violations, "train/loop.py", "import torch"),
        (foreign_violations, "models/vit.py", "from flax import nnx"),
        (foreign_violations, "models/vit.py", "import flax\nflax.nnx.Module"),
        (mesh_contexts, "train/loop.py", "with mesh:\n    pass"),
        (mesh_contexts, "train/loop.py", "with self.mesh, x:\n    pass"),
        (mesh_contexts, "train/loop.py", "with Mesh(devices, ('a',)):\n    pass"),
    ],
)
def test_the_checks_see(check, file, code):
    assert check(PACKAGE / file, ast.parse(code))


@pytest.mark.parametrize(
    ("check", "file", "code"),
    [
        (
            room_violations,
            "infer/engine.py",
            "from jaxvlm.config import ModelConfig\nfrom jaxvlm.infer import sampler",
        ),
        (
            room_violations,
            "job.py",
            "import jaxvlm\nfrom jaxvlm.train.loop import train_stage\njaxvlm.__version__",
        ),
        (foreign_violations, "data/assets.py", "def f():\n    import gguf, grain"),
        (mesh_contexts, "train/loop.py", "with jax.set_mesh(mesh), jax.set_mesh(make_mesh(c)):\n    pass"),
    ],
)
def test_the_checks_pass(check, file, code):
    assert not check(PACKAGE / file, ast.parse(code))
