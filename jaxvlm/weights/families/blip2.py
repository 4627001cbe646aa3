"""BLIP-2 and InstructBLIP with a decoder-only language model, as transformers keeps them (recipes §1.1 A9)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxvlm.config import ConnectorConfig, ModelConfig, QFormerConfig
from jaxvlm.weights.families import part_family
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.hf_config import activation, refuse
from jaxvlm.weights.readers import WeightsError

_QFORMER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}
_TOWERS = {"blip-2": "blip_2_vision_model", "instructblip": "instructblip_vision_model"}
_PREFIXES = {
    "vision": r"vision_model\.",
    "connector": r"(?=qformer\.|query_tokens|language_projection\.)",
    "llm": r"language_model\.",
}


def split_name(name: str) -> tuple[str, str] | None:
    for place, prefix in _PREFIXES.items():
        if found := re.match(prefix, name):
            return place, name[found.end() :]
    return None


def _part(given: dict, name: str) -> dict:
    return {key: value for key, value in (given.get(name) or {}).items() if value is not None}


def _language(given: dict) -> dict:
    return {"model_type": "opt"} | _part(given, "text_config")


def families(given: dict, folder: Path) -> dict[str, Family]:
    kind = _language(given)["model_type"]
    if kind in ("t5", "bart"):
        raise WeightsError(
            f"{folder}: the language model is of model_type '{kind}', an encoder-decoder, which is not supported. Take "
            "a checkpoint with OPT (blip2-opt-2.7b, ...) or Vicuna (instructblip-vicuna-7b, ...)."
        )
    return {
        "vision": part_family("vision", _TOWERS[given["model_type"]], folder),
        "llm": part_family("llm", kind, folder),
    }


def configure(given: dict, folder: Path) -> ModelConfig:
    """The tower's last layer, normed and with its class token; 32 queries; the language model."""
    tables, c = families(given, folder), _QFORMER | _part(given, "qformer_config")
    refuse(folder, c, use_qformer_text_input=True)  # of BLIP-2's retrieval models, which have no language model
    reads_text = given["model_type"] == "instructblip"
    vision = {"model_type": _TOWERS[given["model_type"]]} | _part(given, "vision_config")
    return ModelConfig(
        vision=tables["vision"].configure(vision, folder),
        connector=ConnectorConfig(
            "qformer",
            activation=activation(c["hidden_act"], folder),
            qformer=QFormerConfig(
                num_queries=given.get("num_query_tokens", 32),
                width=c["hidden_size"],
                depth=c["num_hidden_layers"],
                num_heads=c["num_attention_heads"],
                mlp_dim=c["intermediate_size"],
                cross_every=c["cross_attention_frequency"],
                norm_eps=c["layer_norm_eps"],
                text_vocab_size=c["vocab_size"] if reads_text else 0,
                text_positions=c["max_position_embeddings"],
            ),
        ),
        llm=tables["llm"].configure(_language(given), folder),
    )


def prompt(given: dict, folder: Path) -> dict[str, Any]:
    """Images are squeezed into a square and stand in front of BOS, and nothing stands around a question."""
    values = {"transform": "naive", "template": "blip2", "layout": "images_first"}
    if given["model_type"] == "instructblip":
        positions = (_QFORMER | _part(given, "qformer_config"))["max_position_embeddings"]
        values |= {"template": "instructblip", "qformer_tokenizer": str(folder / "qformer_tokenizer")}
        values |= {"qformer_length": min(128, positions)}
    return values


BLIP2 = Format(
    name="blip-2",
    recognise=lambda given: given.get("model_type") in _TOWERS,
    configure=configure,
    families=families,
    split_name=split_name,
    prompt=prompt,
)
