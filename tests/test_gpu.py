"""What a GPU computes is what the CPU computes. Run by `make test-gpu`, on a machine that has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_train_step import assert_trees_close, batches, run_steps

from jaxvlm.config import MeshConfig
from jaxvlm.data.assets import toy
from jaxvlm.models.vlm import init_params
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.metrics import read_metrics
from jaxvlm.weights import build as module
from jaxvlm.weights.plan import Leaf

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("trainable", [(".*",), ("connector/.*", "llm/.*lora_.*")])
def test_train_steps_equal_those_on_the_cpu(tmp_path, trainable):
    """Two steps on a packed batch, float32 products in full precision."""
    lora = 4 if "lora" in trainable[-1] else 0
    world = tiny.run_config(
        toy.write_dataset(tmp_path / "data"), toy.write_tokenizer(tmp_path / "tok"), model=tiny.model_config(lora=lora)
    )
    batch = next(batches(world, True, 4))
    results = {}
    with jax.default_matmul_precision("highest"):
        for kind in ("cpu", "gpu"):
            mesh = make_mesh(MeshConfig(), jax.devices(kind)[:1])
            results[kind] = run_steps(world, batch, mesh=mesh, trainable=trainable)
    (expected, at_cpu), (params, at_gpu) = results["cpu"], results["gpu"]
    np.testing.assert_allclose(at_gpu["loss"], at_cpu["loss"], rtol=1e-5)
    assert_trees_close(params, expected, 1e-4)


def test_initial_parameters_are_the_same():
    config = tiny.model_config()
    trees = []
    for kind in ("cpu", "gpu"):
        with jax.default_device(jax.devices(kind)[0]):
            trees.append(init_params(config, jax.random.key(0)))
    assert_trees_close(*trees, 1e-5)


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_stacks_arrive_whole(monkeypatch, layers):
    """However many of the seven layers go at a time."""
    values = np.random.default_rng(0).normal(size=(7, 300, 500)).astype(np.float16)
    monkeypatch.setattr(module, "STAGED", layers * values[0].nbytes)
    leaf = Leaf("llm/x", values.shape, values.__getitem__, stacked=True, dtype=values.dtype)
    array = module.build([leaf], None)["llm"]["x"]
    assert array.devices() == {jax.devices("gpu")[0]}
    np.testing.assert_array_equal(np.asarray(array), values)


def test_the_quickstarts_toy_trains_and_answers(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxvlm.main",
        "--config",
        "configs/quickstart.py:tiny",
        "--workdir",
        str(tmp_path),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert (tmp_path / "report.html").is_file()
