"""Low-rank adapters as parameters: they live beside the kernels they adapt (see `layers.Projection`)."""

import jax.numpy as jnp

from jaxvlm.config import LLMConfig


def merge_lora(params: dict, config: LLMConfig) -> dict:
    """Adds every adapter to its kernel: the same model without `lora_a` and `lora_b` leaves.

    `params` is any subtree of a model's parameters. kernel += lora_a · lora_b * alpha / rank, summed in float32 and
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
