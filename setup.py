"""Packaging of jaxvlm: dependencies, extras and the `jaxvlm` command.

Every bound has its reason beside it. Tool settings (ruff, pytest) are in pyproject.toml.
The configs lie in `configs/` at the top of the repository, outside the installed package: a run names its
config by path, and a config is a file that its user copies and edits. So work from a clone.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "jaxvlm" / "__init__.py").read_text(), re.M).group(1)

# Upper bounds are there for the libraries that rename things between series.
# pip chooses jax 0.10.2 with flax 0.12.8 on Python 3.11, jax 0.12.0.1 with flax 0.12.12 on 3.12 and 3.13.
BASE = [
    "jax>=0.10.2,<0.13",  # 0.10.2 is the newest for Python 3.11, the code keeps to its API; 0.13 is untried
    "flax>=0.12.8,<0.13",  # only flax.linen, which holds across these; 0.12.8 is the newest for Python 3.11
    "optax>=0.2.8,<0.3",  # its states are in checkpoints, so a new series needs a look before it is let in
    "orbax-checkpoint>=0.12,<0.13",  # its v1 API, which still renames functions from one series to the next
    "etils[epath]>=1.11",  # paths that may be in a bucket; orbax brings it too
    "grain>=0.2.18,<0.3",  # shuffling, threads and worker processes of the loader, with a state that resumes
    "ml_collections>=1.1",  # config files and their command-line overrides
    "absl-py>=2.1",  # the flags under ml_collections' overrides
    "tokenizers>=0.22",  # text to tokens with character offsets, from a tokenizer.json
    "jinja2>=3.1.6",  # chat templates that come with tokenizers; older ones have known ways out of its sandbox
    # The other end of import and export: processors and configs in Hugging Face's form, and tokenizers
    # without a tokenizer.json (SentencePiece models). Version 5: 4 has other file names and parameter names.
    "transformers>=5,<6",
    "gguf>=0.17",  # dequantises GGUF weights, the quickstart's language model among them
    "numpy>=2.1",  # the first with wheels for Python 3.13
    "pillow>=11",  # the decoder and resizer that the image transforms are pixel-exact with
    "packaging>=24",  # `jaxvlm doctor` compares what is installed with these bounds
]

EXTRAS = {
    # Accelerators. jax's own extras pin the matching plugin, so the bound is jax's, above.
    "cuda12": ["jax[cuda12]>=0.10.2,<0.13"],  # NVIDIA driver 525 or newer
    "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],  # NVIDIA driver 580 or newer, GPUs from Turing (7.5) on
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],  # on a TPU VM
    # Data sources beside LLaVA JSON.
    "data": [
        "array_record>=0.8",  # the shards of `jaxvlm data convert` and of TFDS; random access to records on disk
        "datasets>=4.0",  # folders saved by Hugging Face datasets
        "tensorflow-datasets>=4.9.10",  # only to write a TFDS data set; this one does so without tensorflow
    ],
    "gcs": ["gcsfs>=2026.1", "google-cloud-storage>=3.0"],  # --workdir gs://...: files by the one, orbax by the other
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],  # the OpenAI-compatible server
    "lmms": [
        # Its benchmarks, asked of jaxvlm's models through the entry point below. It brings 150 packages, torch among
        # them, which jaxvlm itself never imports. Another 0.x may look for models in another way.
        "lmms-eval>=0.7.3,<0.8",
        "filelock<4",  # lmms-eval 0.7.3 patches a module that filelock 4 does not have, and does not say so
    ],
    "log": ["tensorboardX>=2.6", "wandb>=0.20"],  # writers beside metrics.jsonl, without tensorflow
    "emoji": ["resvg-py>=0.5"],  # draws the SVG images of the emoji preset
    # Compilers for `jaxvlm plan` and `make test-plan`: they run on any machine, no accelerator needed.
    "plan-tpu": ["libtpu==0.0.52"],  # tested with jax 0.10.2, 0.11.2 and 0.12.0.1; jax[tpu] pins older ones
    "plan-gpu": ["jax-cuda13-plugin>=0.10.2,<0.13"],  # without its CUDA libraries (3.4 GB), which planning never loads
    "notebook": [
        "ipykernel>=6.29",  # runs a notebook's cells
        "jupytext>=1.16,<2",  # makes the .ipynb from the .py; 2 may write another form
        "matplotlib>=3.9",  # the notebook's plots
        "nbclient>=0.10",  # executes notebooks in tests; no papermill
    ],
}
EXTRAS["test"] = [
    *EXTRAS["notebook"],
    *EXTRAS["data"],
    *EXTRAS["gcs"],
    *EXTRAS["serve"],
    "pytest>=8.3",
    "pytest-xdist>=3.6",  # two workers for two cores
    "hypothesis>=6.100",
    "safetensors>=0.5",  # the other reader and writer of weight files
    # The oracle of the numeric tests. Pinned: tolerances are measured against one version, and an unpinned
    # torch brings its newest CUDA build, several GB.
    "torch==2.13.0",
    "peft==0.19.1",  # loads the adapters that we write, and writes those that we read
]
EXTRAS["dev"] = [
    *EXTRAS["test"],
    "ruff==0.17.6",  # the version of .pre-commit-config.yaml: another one formats differently
    "pre-commit>=4",
]

setup(
    name="jaxvlm",
    version=VERSION,
    description="Train, evaluate and serve vision-language models (LLaVA, Prismatic, Cambrian) in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["jaxvlm", "jaxvlm.*"]),
    python_requires=">=3.11",  # jax 0.11 and newer need 3.12, so 3.11 stays on 0.10.2
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["jaxvlm = jaxvlm.main:entry_point"],
        "lmms_eval.models": ["jaxvlm = jaxvlm.evals.lmms:manifest"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
