"""What jaxvlm.data may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxvlm.data

ROOM = Path(jaxvlm.data.__file__).parent
FILES = sorted([*ROOM.glob("*.py"), *ROOM.glob("tools/*.py")])
LEAVES = ("jaxvlm.config", "jaxvlm.html", "jaxvlm.progress")
ALLOWED = {"numpy", "PIL", "tokenizers", "grain", "absl", *sys.stdlib_module_names}
IN_ONE_FILE = {
    "gguf": "tokenizer.py",
    "array_record": "array_records.py",
    "datasets": "saved_datasets.py",
    "tensorflow_datasets": "tfds_builder.py",
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_data_imports_no_framework(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            room = name.split(".")[0]
            ours = name in LEAVES or name.startswith("jaxvlm.data")
            assert ours or room in ALLOWED or IN_ONE_FILE.get(room) == file.name, f"{file}: {name}"


def test_inference_side_pulls_in_no_framework():
    modules = ", ".join(f"jaxvlm.data.{name}" for name in ("conversation", "image", "layout", "loader"))
    heavy = {"jax", "torch", "tensorflow", "transformers", "grain"}
    code = f"import sys, {modules}; print(*{heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
