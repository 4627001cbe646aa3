"""Whole BLIP-2 and InstructBLIP models: config.json, every tensor, and the logits against transformers."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from connector_helpers import relative_error
from parity_log import record_parity

from jaxvlm.config import QFormerConfig
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.weights import config_from, import_model, import_part, prompt_from
from jaxvlm.weights.plan import ImportReport
from jaxvlm.weights.readers import WeightsError

IMAGE_TOKEN, QUERIES = 49, 3
SHARED = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 8, "patch_size": 4},
    "qformer_config": {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"vocab_size": 30, "max_position_embeddings": 9},
    "num_query_tokens": QUERIES,
    "image_token_index": IMAGE_TOKEN,
}
LANGUAGE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT = LANGUAGE | {"model_type": "opt", "ffn_dim": 24, "max_position_embeddings": 20, "word_embed_proj_dim": 16}
LLAMA = LANGUAGE | {"model_type": "llama", "intermediate_size": 24, "rms_norm_eps": 1e-5}


@partial(jax.jit, static_argnums=0)
def logits(config, params, batch):
    return VLM(config).apply({"params": params}, batch, method=lambda model, batch: model.logits(model(batch)))


def saved(module, folder):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():  # classes start some at 0: nothing may hide behind that
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.3, generator=generator)
    module.eval().save_pretrained(folder)


def case(text):
    """(what transformers takes, what ours takes) of two images, each with its queries and five tokens of text."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 1, 8, 8, 3)).astype(np.uint8)
    tokens = np.concatenate([np.full((2, QUERIES), IMAGE_TOKEN), rng.integers(3, IMAGE_TOKEN, (2, 5))], axis=1)
    index = np.where(np.arange(QUERIES + 5) < QUERIES, np.arange(QUERIES + 5), -1)
    both = (2, QUERIES + 5)
    ours = {
        "tokens": tokens.astype(np.int32),
        "visual_index": np.broadcast_to(index, both).astype(np.int32),
        "positions": np.broadcast_to(np.arange(QUERIES + 5), both).astype(np.int32),
        "segment_ids": np.ones(both, np.int32),
        "pixels": pixels,
    }
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    values = ((pixels[:, 0] / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    theirs = {"pixel_values": torch.from_numpy(values), "input_ids": torch.from_numpy(tokens)}
    if text:
        instruction = rng.integers(1, 30, (2, 4))
        mask = np.arange(4) < np.array([[4], [2]])
        ours |= {"qformer_tokens": instruction[:, None].astype(np.int32), "qformer_mask": mask[:, None]}
        theirs |= {
            "qformer_input_ids": torch.from_numpy(instruction),
            "qformer_attention_mask": torch.from_numpy(mask).long(),
        }
    return theirs, ours


def check(module, folder, text, name):
    saved(module, folder)
    report = ImportReport()
    config, params = import_model(folder, report=report)
    assert not report.unused and not report.missing
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    theirs, ours = case(text)
    with torch.no_grad():
        expected = module(**theirs).logits
    error = relative_error(logits(replace(config, dtype="float32"), params, ours), expected)
    record_parity(name, "logits", error)
    assert error <= 2e-5
    alone = import_part(folder, "connector")
    jax.tree.map(np.testing.assert_array_equal, alone, params["connector"])
    return config


def test_blip2_with_opt(tmp_path):
    module = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(text_config=OPT, **SHARED))
    config = check(module, tmp_path, False, "BLIP-2 (OPT)")
    assert config.connector.qformer == QFormerConfig(QUERIES, 8, 2, 2, 20, 2, text_positions=9)
    assert config.vision.feature_tokens == "cls_patch" and config.vision.feature_norm
    assert config.vision.feature_layers == (-1,) and config.llm.learned_positions and config.tile_tokens == QUERIES
    assert prompt_from(tmp_path).transform == "naive"


def test_instructblip_with_llama(tmp_path):
    config = transformers.InstructBlipConfig(text_config=LLAMA, **SHARED)
    module = transformers.InstructBlipForConditionalGeneration(config)
    config = check(module, tmp_path, True, "InstructBLIP (Llama)")
    assert config.connector.qformer.text_vocab_size == 30 and not config.llm.tie_embeddings


def test_defaults_are_the_published_sizes_and_encoder_decoders_are_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "blip-2", "vision_config": {}, "text_config": OPT}))
    config = config_from(tmp_path)[1]
    assert config.connector.qformer == QFormerConfig()
    assert (config.vision.width, config.vision.depth, config.vision.num_tokens) == (1408, 39, 257)
    file.write_text(json.dumps({"model_type": "instructblip", "text_config": {"model_type": "t5"}}))
    with pytest.raises(WeightsError, match="'t5', an encoder-decoder"):
        config_from(tmp_path)
    file.write_text(json.dumps({"model_type": "blip-2", "qformer_config": {"use_qformer_text_input": True}}))
    with pytest.raises(WeightsError, match="use_qformer_text_input = True is not supported"):
        config_from(tmp_path)
