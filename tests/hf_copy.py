"""Weights of tiny Hugging Face models as jaxvlm parameters, written out by hand, and random parameters by numpy.

The rule tables of `jaxvlm.weights` do this for users; tests of the models must not depend on them.
"""

import jax
import numpy as np

from jaxvlm.config import LLMConfig, ModelConfig, VisionConfig
from jaxvlm.models.vit import num_layers
from jaxvlm.models.vlm import abstract_params


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters of moderate size without a single zero, not even in biases and `lora_b`; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if "scale" in path[-1].key else 0.0
        return (offset + rng.normal(scale=0.1, size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def randomise(module, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws every parameter of a torch module anew (fresh biases and class tokens are zero); gives its state dict."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.1
            is_norm = "norm" in name.lower() or "ln_" in name
            mean = 1.0 if parameter.ndim == 1 and is_norm and name.endswith("weight") else 0.0
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return {name: value.numpy() for name, value in module.state_dict().items()}


def vit(state: dict[str, np.ndarray], c: VisionConfig) -> dict:
    """CLIPVisionModel, SiglipVisionModel or Dinov2(WithRegisters)Model -> the 'vision' subtree."""
    dino = "embeddings.cls_token" in state
    layer = "encoder.layer.{}." if dino else "encoder.layers.{}."
    head_dim = c.width // c.num_heads

    def stacked(name, change=lambda x: x):
        return np.stack([change(state[layer.format(i) + name]) for i in range(num_layers(c))])

    def norm(name, read=stacked):
        return {"scale": read(name + ".weight"), "bias": read(name + ".bias")}

    def linear(name):
        return {"kernel": stacked(name + ".weight", np.transpose), "bias": stacked(name + ".bias")}

    def heads(name):
        kernel = stacked(name + ".weight", lambda x: x.T.reshape(c.width, c.num_heads, head_dim))
        return {"kernel": kernel, "bias": stacked(name + ".bias", lambda x: x.reshape(c.num_heads, head_dim))}

    attn = "attention." if dino else "self_attn."
    out = linear(attn + ("o_proj" if dino else "out_proj"))
    out["kernel"] = out["kernel"].reshape(-1, c.num_heads, head_dim, c.width)
    layers = {
        "norm1": norm("norm1" if dino else "layer_norm1"),
        "norm2": norm("norm2" if dino else "layer_norm2"),
        "attn": {"o": out} | {name: heads(f"{attn}{name}_proj") for name in "qkv"},
        "mlp": {"up": linear("mlp.fc1"), "down": linear("mlp.fc2")},
    }
    if c.layer_scale:
        layers |= {f"scale{i}": stacked(f"layer_scale{i}.lambda1") for i in (1, 2)}
    patch = "embeddings.patch_embeddings.projection." if dino else "embeddings.patch_embedding."
    tree = {"layers": layers, "patch_embed": {"kernel": state[patch + "weight"].transpose(2, 3, 1, 0)}}
    tree["pos_embed"] = state["embeddings.position_embeddings" if dino else "embeddings.position_embedding.weight"]
    tree["pos_embed"] = tree["pos_embed"].reshape(-1, c.width)
    if c.patch_bias:
        tree["patch_embed"]["bias"] = state[patch + "bias"]
    if c.class_token:
        tree["class_token"] = state["embeddings.cls_token" if dino else "embeddings.class_embedding"].reshape(-1)
    if c.num_registers:
        tree["register_tokens"] = state["embeddings.register_tokens"][0]
    if c.pre_norm:
        tree["pre_norm"] = norm("pre_layrnorm", state.__getitem__)
    if c.feature_norm:
        tree["post_norm"] = norm("layernorm" if dino else "post_layernorm", state.__getitem__)
    return tree


def llm(state: dict[str, np.ndarray], c: LLMConfig) -> dict:
    """LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM -> the 'llm' subtree."""

    def stacked(name, change=lambda x: x):
        return np.stack([change(state[f"model.layers.{i}.{name}"]) for i in range(c.depth)])

    def heads(name, count):
        kernel = stacked(f"self_attn.{name}_proj.weight", lambda x: x.T.reshape(c.width, count, c.head_dim))
        if not c.qkv_bias:
            return {"kernel": kernel}
        return {
            "kernel": kernel,
            "bias": stacked(f"self_attn.{name}_proj.bias", lambda x: x.reshape(count, c.head_dim)),
        }

    o = stacked("self_attn.o_proj.weight", lambda x: x.T.reshape(c.num_heads, c.head_dim, c.width))
    attn = {"o": {"kernel": o}, "q": heads("q", c.num_heads)}
    attn |= {name: heads(name, c.num_kv_heads) for name in "kv"}
    tree = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
        "layers": {
            "attn": attn,
            "attn_norm": {"scale": stacked("input_layernorm.weight")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
            "mlp": {n: {"kernel": stacked(f"mlp.{n}_proj.weight", np.transpose)} for n in ("gate", "up", "down")},
        },
    }
    return tree if c.tie_embeddings else tree | {"head": {"kernel": state["lm_head.weight"].T}}
