"""Low-rank adapters as parameters: they live beside the kernels they adapt (see `layers.Projection`)."""

from dataclasses import replace

import jax.numpy as jnp

from jaxvlm.config import LLMConfig, LoRAConfig, ModelConfig, VisionConfig


def without_lora(model: ModelConfig) -> ModelConfig:
    """The configuration of the same model when its adapters are merged."""
    vision, none = model.vision, LoRAConfig()
    vision = replace(vision, lora=none, towers=tuple(replace(tower, lora=none) for tower in vision.towers))
    return replace(model, vision=vision, llm=replace(model.llm, lora=none))


def merge_all(params: dict, model: ModelConfig) -> dict:
    """Adds the adapters of the decoder and of every tower to their kernels, for `without_lora(model)`."""
    vision = params["vision"]
    if model.vision.kind == "fused":
        vision = {
            name: merge_lora(tree, model.vision.towers[int(name.split("_")[-1])]) for name, tree in vision.items()
        }
    else:
        vision = merge_lora(vision, model.vision)
    return params | {"vision": vision, "llm": merge_lora(params["llm"], model.llm)}


def merge_lora(params: dict, config: LLMConfig | VisionConfig) -> dict:
    """Adds every adapter to its kernel: the same model without `lora_a` and `lora_b` leaves.

    `params` is any subtree of the part that `config` describes. kernel += lora_a · lora_b * alpha / rank, summed in float32 and
    kept in the kernel's dtype. The merged parameters belong to a config whose `lora.rank` is 0.
    """
    if not isinstance(params, dict):
        return params
    merged = {name: merge_lora(value, config) for name, value in params.items() if not name.startswith("lora_")}
    if "lora_a" in params:
        kernel, scale = params["kernel"], config.lora.alpha / config.lora.rank
        low, up = (params[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))  # [L, *in, r], [L, r, *out]
        layers, rank = low.shape[0], low.shape[-1]
        update = low.reshape(layers, -1, rank) @ up.reshape(layers, rank, -1) * scale
        merged["kernel"] = (kernel + update.reshape(kernel.shape)).astype(kernel.dtype)
    return merged
