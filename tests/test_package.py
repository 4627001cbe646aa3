"""The package as its users get it: light to import, versions and dependencies declared, commands that run."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxvlm

ROOT = Path(__file__).resolve().parents[1]
IMPORT_NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "jaxlib": "jax",
    "resvg_py": "resvg-py",
    "tensorflow_datasets": "tensorflow-datasets",
    "lmms_eval": "lmms-eval",
}


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py passes to setuptools, without running it."""
    setuptools = pytest.importorskip("setuptools")
    captured = {}
    original, setuptools.setup = setuptools.setup, lambda **arguments: captured.update(arguments)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return captured


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = "{'jax', 'flax', 'numpy', 'torch', 'transformers', 'grain', 'absl', 'PIL'}"
    out = python(f"import sys, jaxvlm; print(jaxvlm.__version__, sorted({heavy} & set(sys.modules)))")
    assert out.split() == [jaxvlm.__version__, "[]"]


def test_load_is_there_and_other_names_are_not():
    from jaxvlm.infer import engine

    assert jaxvlm.load is engine.load
    assert "load" in dir(jaxvlm)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxvlm.lode


def test_versions_agree(setup_arguments):
    assert setup_arguments["version"] == jaxvlm.__version__
    assert f"\nversion: {jaxvlm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{jaxvlm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_versions_are_within_the_bounds(setup_arguments):
    from importlib.metadata import version

    for line in setup_arguments["install_requires"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), line


def test_every_dependency_has_a_reason():
    """A comment beside or above every requirement of setup.py, and a line in the changelog."""
    lines = (ROOT / "setup.py").read_text().splitlines()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    base = False
    for number, line in enumerate(lines):
        base = line.startswith("BASE") or base and line != "]"
        if match := re.match(r'    "([A-Za-z_-]+)[><=]', line):
            above = lines[number - 1].strip().startswith("#")
            assert "#" in line or above or match[1] in ("pytest", "hypothesis", "pre-commit"), line
            assert not base or match[1] in changelog, f"{match[1]} is not in CHANGELOG.md"


def test_what_is_imported_is_declared(setup_arguments):
    """Every third-party import is a base dependency, or an extra's and inside a function."""
    base = {Requirement(line).name.lower() for line in setup_arguments["install_requires"]}
    extras = {Requirement(r).name.lower() for group in setup_arguments["extras_require"].values() for r in group}
    for path in sorted((ROOT / "jaxvlm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - {"jaxvlm", "pip"} - sys.stdlib_module_names:
                package = IMPORT_NAMES.get(name, name).lower()
                fine = package in base or node not in tree.body and package in extras
                assert fine or name == "ml_dtypes", f"{path}:{node.lineno}: {name} is not declared in setup.py"


def test_packages_are_all_found(setup_arguments):
    folders = {path.parent for path in (ROOT / "jaxvlm").rglob("*.py")}
    assert set(setup_arguments["packages"]) == {".".join(f.relative_to(ROOT).parts) for f in folders}


def test_command_is_installed(setup_arguments):
    from jaxvlm import main
    from jaxvlm.evals import lmms

    [command] = setup_arguments["entry_points"]["console_scripts"]
    assert command == "jaxvlm = jaxvlm.main:entry_point"
    assert setup_arguments["entry_points"]["lmms_eval.models"] == ["jaxvlm = jaxvlm.evals.lmms:manifest"]
    assert callable(main.entry_point) and callable(lmms.manifest)


@pytest.mark.parametrize("target", ["setup", "quickstart", "test", "lint", "bench", "notebook", "clean"])
def test_make_help_lists(target):
    out = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^  make {target} ", out, re.M)


@pytest.mark.parametrize("broken", ["python-that-is-not-there", "python2.7-stub"])
def test_make_says_what_is_wrong_with_python(tmp_path, broken):
    if broken.endswith("stub"):
        stub = tmp_path / broken
        stub.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18 && exit 0\nexit 1\n')
        stub.chmod(0o755)
        broken = str(stub)
    command = ["make", "setup", f"PYTHON={broken}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "jaxvlm needs Python 3.11 or newer" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_ci_script_runs_the_documented_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test " in script.read_text()


class TestLocalLauncher:
    COMMAND = [sys.executable, str(ROOT / "launch" / "local.py")]

    def launch(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*self.COMMAND, *arguments], capture_output=True, text=True, timeout=120)

    def test_dry_run(self):
        done = self.launch("--processes", "2", "--devices", "3", "--port", "777", "--dry-run", "--", "python", "a b")
        first, second = done.stdout.splitlines()
        assert "JAX_NUM_CPU_DEVICES=3" in first and "JAXVLM_PROCESS_ID=0" in first
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:777" in second and "JAXVLM_PROCESS_ID=1" in second
        assert second.endswith("python 'a b'")

    def test_exit_codes(self):
        code = "import os, sys; sys.exit(3 * int(os.environ['JAXVLM_PROCESS_ID']))"
        assert self.launch("--", sys.executable, "-c", code).returncode == 3
        code = "import os; os.kill(os.getpid(), 9)"
        assert self.launch("--", sys.executable, "-c", code).returncode == 75
        assert self.launch("--processes", "0", "--", "true").returncode == 2
        assert self.launch("--processes", "2").returncode == 2

    def test_processes_find_each_other(self):
        code = (
            "import os, jax\n"
            "jax.distributed.initialize(os.environ['JAX_COORDINATOR_ADDRESS'],"
            " int(os.environ['JAXVLM_NUM_PROCESSES']), int(os.environ['JAXVLM_PROCESS_ID']))\n"
            "print('sees', jax.process_count(), jax.local_device_count(), jax.device_count())"
        )
        done = self.launch("--processes", "2", "--devices", "2", "--", sys.executable, "-c", code)
        assert done.returncode == 0, done.stdout
        assert {"[0] sees 2 2 4", "[1] sees 2 2 4"} <= set(done.stdout.splitlines())
