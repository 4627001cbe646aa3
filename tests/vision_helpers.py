"""What the tests of vision towers share: tiny models of transformers on disk, and our encoder."""

from functools import partial

import jax
import numpy as np
from hf_copy import randomise

from jaxvlm.config import LLMConfig, ModelConfig, VisionConfig
from jaxvlm.models.vlm import VLM

LLM = LLMConfig(vocab_size=8, width=8, depth=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 28, "patch_size": 7}


@partial(jax.jit, static_argnums=0)
def encode(config: VisionConfig, params, *pixels):
    """uint8 [B, s, s, 3] of every view -> [B, N, D], as one row of B tiles."""
    model = ModelConfig(vision=config, llm=LLM, dtype="float32", remat="none")
    return VLM(model).apply({"params": {"vision": params}}, *(view[None] for view in pixels), method="encode")[0]


def images(size, seed=0, count=2):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def normalised(pixels, config: VisionConfig):
    """uint8 [B, s, s, 3] as the float32 torch tensor [B, 3, s, s] that transformers wants."""
    import torch

    return torch.from_numpy(((pixels / 255 - config.mean) / config.std).astype(np.float32).transpose(0, 3, 1, 2))


def error(found, expected) -> float:
    """The largest absolute error over the largest magnitude."""
    assert found.shape == tuple(expected.shape), (found.shape, tuple(expected.shape))
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def tiny(kind: str, **settings):
    """A tiny tower of transformers with every parameter drawn anew, in float32 and evaluation mode."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{kind}Model")(config).eval()
    randomise(model)
    return model


def states(model, pixels, **options):
    """The hidden states of a tower: [B, N, D] of the embeddings and of each layer."""
    import torch

    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **options).hidden_states
