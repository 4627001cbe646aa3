"""What jaxvlm.data may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import source_helpers

import jaxvlm.data

ROOM = Path(jaxvlm.data.__file__).parent
FILES = sorted([*ROOM.glob("*.py"), *ROOM.glob("tools/*.py")])
LEAVES = ("jaxvlm.config", "jaxvlm.html", "jaxvlm.progress", "jaxvlm.templates")
ALLOWED = {"numpy", "PIL", "tokenizers", "grain", "absl", "jinja2", *sys.stdlib_module_names}
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


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return source_helpers.write_every_kind(tmp_path_factory.mktemp("kinds"), count=8)


@pytest.mark.parametrize("kind", source_helpers.KINDS)
def test_reading_a_source_pulls_in_no_framework(kinds, kind):
    code = f"""
import sys
from jaxvlm.config import SourceConfig
from jaxvlm.data.conversation import record_images
from jaxvlm.data.image import load_image
from jaxvlm.data.sources import open_source
source = open_source({kinds[kind]!r})
print(len([load_image(source.image(name)) for record in source for name in record_images(record)]))
print(*{{"jax", "torch", "tensorflow", "transformers", "grain"}} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "8\n\n"
