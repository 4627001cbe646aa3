"""What importing, saving, loading and exporting a model hold in memory beside the model, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest
from weights_helpers import tokenizer_folder

MIB = 2**20
SLICE = 16 * MIB  # the embedding, the largest tensor of the checkpoint
STACK = 20 * MIB  # one projection of all layers, the largest parameter
SPARE = 16 * MIB  # blocks on their way, and noise; the model has 174 MiB
MEASURED = r"""
import gc, json, sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.models.vlm import abstract_params
from jaxvlm.weights import export, import_model
from jaxvlm.weights.convert import convert
from jaxvlm.weights.saved import load_model

out, prompt = Path(sys.argv[1]), PromptConfig(tokenizer=sys.argv[2], template="vicuna_v1")
noise = (np.random.default_rng(0).standard_normal(2**23) * 0.02).astype(ml_dtypes.bfloat16)

def model(depth):
    vision = VisionConfig(image_size=28, patch_size=14, width=32, depth=2, num_heads=4, mlp_dim=64, feature_layers=(-1,))
    llm = LLMConfig(vocab_size=8192, width=1024, depth=depth, num_heads=16, num_kv_heads=16, head_dim=64, mlp_dim=1024)
    return ModelConfig(vision=vision, connector=ConnectorConfig(), llm=llm)

def highest():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

def peak(work):
    "How far the memory rose, in bytes, and what the work gave."
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is the present from here on
    start = highest()
    result = work()
    return highest() - start, result

for config in (model(1), model(10)):  # the first time libraries are loaded and programs compiled
    folder = out / str(config.llm.depth)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(np.resize(noise, leaf.shape)), abstract_params(config))
    size, found = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), {}
    found["export"], _ = peak(lambda: export(params, config, prompt, folder / "hf"))
    del params
    for name, given, dtype in (("import", 1, None), ("import as float32", 2, "float32")):
        rise, params = peak(lambda: import_model(folder / "hf", dtype=dtype))
        found[name] = rise - given * size
        del params
    rise, _ = peak(lambda: convert(str(folder / "hf"), str(folder / "run")))
    found["import and save"] = rise - size
    rise, params = peak(lambda: load_model(folder / "run"))
    found["load"] = rise - size
    del params
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="The highest memory is Linux's to tell.")
def test_no_second_copy_of_a_model_is_held(tmp_path):
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tokenizer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    above = json.loads(done.stdout.splitlines()[-1])
    bounds = dict.fromkeys(above, SLICE + SPARE) | {"load": 3 * STACK + SPARE}  # orbax reads several at a time
    assert {name: value for name, value in above.items() if value > bounds[name]} == {}
