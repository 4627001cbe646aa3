"""Model FLOPs of a step, by part, and the peak of the device they run on: the two halves of MFU."""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxvlm.config import LLMConfig, ModelConfig, VisionConfig

# Dense peak of the matrix units in FLOP/s (vendors' data sheets), by the start of jax's `device_kind`.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@cache
def peak_flops() -> tuple[float, str]:
    """FLOP/s of one local device and where the figure comes from; a CPU is measured with a float32 matmul."""
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if device.device_kind.startswith(kind):
            return peak, f"data sheet, {kind}, bfloat16"
    n, times = 1536, []
    alone = jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,), devices=[device])
    with jax.set_mesh(alone):  # whatever mesh the caller is in
        x, matmul = jnp.ones((n, n), jnp.float32), jax.jit(jnp.matmul)
        matmul(x, x).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            matmul(x, x).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times), f"measured, {n}x{n} float32 matmul"


def llm_params_per_token(llm: LLMConfig) -> int:
    """Multiply-adds of one token through the decoder layers, attention scores and head apart."""
    attention = llm.width * llm.head_dim * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    return llm.depth * (attention + 3 * llm.width * llm.mlp_dim)


def vision_flops(vision: VisionConfig) -> float:
    """Forward FLOPs of one tile."""
    if vision.kind == "efficientnet_lite":
        return 2 * 0.384e9 * (vision.image_size / 224) ** 2  # multiply-adds at 224 px, scaled by area
    tokens = (vision.image_size // vision.patch_size) ** 2 + vision.class_token + vision.num_registers
    depth = max(vision.depth + 1 + layer if layer < 0 else layer for layer in vision.feature_layers)
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    patch = 3 * vision.patch_size**2 * vision.width
    return 2 * tokens * (patch + depth * layer) + 4 * depth * tokens**2 * vision.width


def connector_params_per_token(model: ModelConfig) -> int:
    """Multiply-adds of one visual token through the connector."""
    hidden = model.vision.feature_width * model.llm.width
    layers = 1 if model.connector.kind == "linear" else int(model.connector.kind[3:].split("x")[0])
    return hidden + (layers - 1) * model.llm.width**2


def batch_flops(model: ModelConfig, batch: dict, trainable_share: dict[str, float]) -> dict[str, float]:
    """Useful FLOPs of a training step on this batch (host arrays), padding not counted.

    A part costs 2 FLOPs per multiply-add forward, as much again for the gradient of its input if anything before it
    trains, and as much again for the trained share of its weights. Recomputation (remat) is not useful and not counted.
    trainable_share: {'vision', 'connector', 'llm', 'head'} -> fraction of that part's weights that train.
    """
    real = batch["segment_ids"] > 0
    tokens = float(real.sum())
    attended = float((batch["positions"] + 1)[real].sum())  # causal within each packed conversation
    visual = float((batch["visual_index"] >= 0).sum())
    supervised = float((batch["loss_weights"] > 0).sum())
    tiles = float(batch["tile_mask"].sum()) if "pixels" in batch else 0.0

    share = trainable_share
    into_vision = share["vision"] > 0
    into_llm = into_vision or share["connector"] > 0
    into_layers = into_llm or share["llm"] > 0
    llm = model.llm
    return {
        "vision": tiles * vision_flops(model.vision) * (1 + into_vision + share["vision"]),
        "connector": 2 * visual * connector_params_per_token(model) * (1 + into_vision + share["connector"]),
        "llm": 2 * tokens * llm_params_per_token(llm) * (1 + into_layers + share["llm"]),
        "attention": 4 * attended * llm.depth * llm.num_heads * llm.head_dim * (1 + 2 * into_layers),
        "head": 2 * supervised * llm.width * llm.vocab_size * (1 + into_layers + share["head"]),
    }


def trainable_shares(trainable: dict, frozen: dict) -> dict[str, float]:
    """The fraction of each part's weights that train, from the flat paths of the two trees."""

    def share(prefix: str) -> float:
        moves = sum(np.prod(leaf.shape) for path, leaf in trainable.items() if path.startswith(prefix))
        stays = sum(np.prod(leaf.shape) for path, leaf in frozen.items() if path.startswith(prefix))
        return float(moves / (moves + stays)) if moves + stays else 0.0

    head = "llm/head" if any(path.startswith("llm/head") for path in {**trainable, **frozen}) else "llm/embed"
    parts = {"vision": "vision/", "connector": "connector/", "llm": "llm/layers/", "head": head}
    return {name: share(prefix) for name, prefix in parts.items()}
