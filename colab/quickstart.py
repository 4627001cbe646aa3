# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxvlm quickstart
#
# This notebook trains a small vision-language model from real parts (a SmolLM2-135M language model and an
# EfficientNet image encoder) on a visual question answering data set, shows what it learnt, and asks it about
# an image. It is the same job as `make quickstart`; nothing needs an account or a token.
#
# It was made from `colab/quickstart.py` with `make notebook`; edit that file, not the `.ipynb`.

# %% [markdown]
# ## 1. Install
#
# In Colab, put the address of your clone of jaxvlm in `REPOSITORY`, or upload its folder to `/content`.
# Elsewhere this cell installs nothing: start the notebook inside the clone, with an environment that has
# jaxvlm and its notebook tools (`make setup EXTRAS=notebook`).

# %%
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # @param {type:"string"}
IN_COLAB = "google.colab" in sys.modules

if IN_COLAB:
    if not Path("/content/jaxvlm").is_dir():
        if not REPOSITORY:
            raise SystemExit("Set REPOSITORY above to the address of a clone of jaxvlm, and run this cell again.")
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "/content/jaxvlm"], check=True)
    os.chdir("/content/jaxvlm")
    has_tpu = bool(os.environ.get("COLAB_TPU_ADDR") or os.environ.get("TPU_NAME")) or Path("/dev/accel0").exists()
    extra = "[tpu]" if has_tpu else "[cuda12]" if Path("/dev/nvidia0").exists() else ""
    print(f"Installing jaxvlm{extra} (2 to 4 minutes) ...")
    # Colab's own jax is older than jaxvlm needs, so this replaces it.
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f".{extra}"], check=True)
    for name in ("numpy", "jax", "PIL"):
        loaded = getattr(sys.modules.get(name), "__version__", None)
        installed = importlib.metadata.version({"PIL": "pillow"}.get(name, name))
        if loaded and loaded != installed:
            print(f"{name} {loaded} is in use but {installed} is installed: Runtime > Restart session, run all.")
else:
    root = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / "configs").is_dir()), None)
    if root is None:
        raise SystemExit("Start the notebook inside a clone of jaxvlm: its configs/ folder is not here.")
    os.chdir(root)

if str(Path.cwd()) not in sys.path:
    sys.path.insert(0, str(Path.cwd()))

# %% [markdown]
# ## 2. What this machine has

# %%
import jax

import jaxvlm

devices = jax.devices()
print(f"jaxvlm {jaxvlm.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}")
print(f"Training will run on {len(devices)} x {devices[0].device_kind}.")
if jax.default_backend() == "cpu":
    print("That is the CPU: the default run takes about 12 minutes on two idle cores.")
    print("In Colab, Runtime > Change runtime type gives a GPU or TPU; then run the install cell again.")

# %% [markdown]
# ## 3. Train and evaluate
#
# Run the next cell again after an interruption and it goes on where it stopped.

# %% tags=["parameters"]
config = "configs/quickstart.py"  # @param {type:"string"}
workdir = "runs/quickstart"  # @param {type:"string"}

# %%
from jaxvlm.main import run

report = run(config, workdir)

# %% [markdown]
# ## 4. What it learnt
#
# The loss of every stage:

# %%
import matplotlib.pyplot as plt

from jaxvlm.train.metrics import read_metrics

lines = read_metrics(Path(workdir) / "metrics.jsonl")
stages = list(dict.fromkeys(line["stage"] for line in lines))
figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.2), squeeze=False, layout="constrained")
for axis, stage in zip(axes[0], stages, strict=True):
    points = [(line["step"], line["loss"]) for line in lines if line["stage"] == stage]
    axis.plot(*zip(*points, strict=True))
    axis.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()

# %% [markdown]
# Accuracy on questions it never saw: with the image, without it, and of always giving the commonest answer:

# %%
for category, score in report["eval"].items():
    blind = "" if score.get("blind") is None else f"without the image {score['blind']:.1%}, "
    others = f"{blind}commonest answer {score['majority']:.1%}"
    print(f"{category:8} {score['sighted']:.1%}   ({others}; {score['n']} questions)")

# %% [markdown]
# Some of those questions, drawn by the run's seed and not picked by hand:

# %%
from PIL import Image

samples = report["samples"]
columns = 3
rows = -(-len(samples) // columns)
figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.6 * rows), squeeze=False, layout="constrained")
for axis in axes.flat:
    axis.axis("off")
for axis, sample in zip(axes.flat, samples, strict=False):
    axis.imshow(Image.open(sample["image"]).convert("RGB"))
    mark = "right" if sample["right"] else f"wrong, it is {sample['answer']}"
    axis.set_title(f"{sample['question']}\n{sample['prediction']} ({mark})", fontsize=9, wrap=True)
plt.show()

# %% [markdown]
# ## 5. Ask it something
#
# An image can be a path, a PIL image or an array; `<image>` says where in the message it stands.

# %%
vlm = jaxvlm.load(workdir)

picture = samples[0]["image"]
message = {
    "role": "user",
    "content": "<image>\nWhat color is the shape?\nAnswer the question using a single word or phrase.",
}
[answer] = vlm.generate([{"messages": [message], "images": [picture]}], max_new_tokens=16)
print(answer)
Image.open(picture).convert("RGB").resize((192, 192))
