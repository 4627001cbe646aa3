"""Model FLOPs of a step, by part, and the peak of the device they run on: the two halves of MFU."""

from __future__ import annotations

import itertools
import math
import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxvlm.config import LLMConfig, ModelConfig, VisionConfig
from jaxvlm.models.connectors.mlp import widths
from jaxvlm.models.connectors.sva import window_sides
from jaxvlm.models.convnext import STEM, feature_stages
from jaxvlm.models.vit import num_layers

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
    """Multiply-adds of one token through the decoder layers, adapters included, attention scores and head apart."""
    heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    sides = {"q": (llm.width, heads), "k": (llm.width, kv_heads), "v": (llm.width, kv_heads), "o": (heads, llm.width)}
    sides |= {"up": (llm.width, llm.mlp_dim), "down": (llm.mlp_dim, llm.width)}
    sides |= {"gate": (llm.width, llm.mlp_dim)} if llm.gated else {}
    adapters = llm.lora.rank * sum(sum(sides[name]) for name in sides if name in llm.lora.targets)
    return llm.depth * (sum(math.prod(pair) for pair in sides.values()) + adapters)


def vision_flops(vision: VisionConfig) -> float:
    """Forward FLOPs of one tile; several scales are that many more tiles of `image_size`."""
    if vision.kind == "fused":
        return sum(vision_flops(tower) for tower in vision.towers)
    if vision.kind == "efficientnet_lite":
        one = 2 * 0.384e9 * (vision.image_size / 224) ** 2  # multiply-adds at 224 px, scaled by area
    else:
        one = {"vit": _vit_flops, "convnext": _convnext_flops}[vision.kind](vision)
    return one * sum(scale**2 for scale in vision.scales)


def _vit_flops(c: VisionConfig) -> float:
    cells, depth = (c.image_size // c.patch_size) ** 2, num_layers(c)
    tokens = cells + c.class_token + c.num_registers
    layer = 4 * c.width**2 + (2 + (c.mlp == "swiglu")) * c.width * c.mlp_dim
    patch = 3 * c.patch_size**2 * c.width
    return 2 * (cells * patch + tokens * depth * layer) + 4 * depth * tokens**2 * c.width


def _convnext_flops(c: VisionConfig) -> float:
    """The convolutions that change the grid, and of each block the depthwise 7 x 7 and an MLP four times as wide."""
    total, narrow, taps = 0, 3, STEM**2
    for number in range(max(feature_stages(c)) + 1):
        cells, wide = (c.image_size // (STEM * 2**number)) ** 2, c.stage_widths[number]
        block = 7**2 * wide + 2 * wide * 4 * wide
        total += cells * (taps * narrow * wide + c.stage_depths[number] * block)
        narrow, taps = wide, 2**2
    return 2 * total


def connector_params_per_token(model: ModelConfig) -> float:
    """Multiply-adds of one visual token through the connector, attention scores included, learned constants apart."""
    kinds = {"qformer": _qformer_params, "resampler": _resampler_params, "sva": _sva_params}
    if model.connector.kind in kinds:
        return kinds[model.connector.kind](model)
    return sum(a * b for a, b in itertools.pairwise(widths(model)))


def _qformer_params(model: ModelConfig) -> float:
    """Of one query, without text; the keys and values of the image are shared by all of a tile's queries."""
    c, tokens, into = model.connector.qformer, model.vision.num_tokens, model.vision.feature_width
    layer = 4 * c.width**2 + 2 * c.num_queries * c.width + 2 * c.width * c.mlp_dim
    cross = 2 * c.width**2 + 2 * tokens * into * c.width / c.num_queries + 2 * tokens * c.width
    return c.depth * layer + c.depth // c.cross_every * cross + c.width * model.llm.width


def _qformer_text(model: ModelConfig, mask: np.ndarray) -> float:
    """Multiply-adds of the instructions whose tokens are those of `mask` [B, T, L], in a Q-Former that reads them."""
    c, text = model.connector.qformer, mask.sum(-1, dtype=np.float64)  # [B, T]
    attended = (text * (2 * c.num_queries + text)).sum()  # beside what the queries attend to among themselves
    return c.depth * (text.sum() * (4 * c.width**2 + 2 * c.width * c.mlp_dim) + 2 * attended * c.width)


def _resampler_params(model: ModelConfig) -> float:
    """The queries themselves are the same for every tile, and so projected once a step."""
    tokens, into, width = model.vision.num_tokens, model.vision.feature_width, model.llm.width
    keys = (into * width if into != width else 0) + 2 * width**2  # of each cell
    return tokens / model.connector.resampler.num_queries * keys + 2 * tokens * width + 2 * width**2


def _sva_params(model: ModelConfig) -> float:
    c, width = model.connector.sva, model.llm.width
    cells = [side**2 for side in window_sides(model)]
    towers = sum(
        n * (tower.feature_width + c.width) * c.width for n, tower in zip(cells, model.vision.parts, strict=True)
    )

    def layer(queries: int) -> int:
        """An aggregator whose queries have so many channels: context, in, q, o, up; k and v; scores; down."""
        return (2 * queries + 5 * c.width) * c.width + 2 * sum(cells) * (c.width + 1) * c.width

    out = c.groups * c.width * width + width**2
    return towers + c.groups * c.depth * layer(c.width) + len(c.llm_layers) * layer(width) + out


def batch_flops(model: ModelConfig, batch: dict, trainable_share: dict[str, float]) -> dict[str, float]:
    """Useful FLOPs of a training step on this batch (host arrays), padding not counted.

    A part costs 2 FLOPs per multiply-add forward, as much again for the gradient of its input if anything before it
    trains, and as much again for the trained share of its weights. Recomputation (remat) is not useful and not counted.
    trainable_share: {'vision', 'connector', 'llm', 'head'} -> fraction of that part's weights that train.
    """
    real = batch["segment_ids"] > 0
    tokens = float(real.sum())
    attended = _attended(model.llm, (batch["positions"] + 1)[real])
    visual = float((batch["visual_index"] >= 0).sum())
    supervised = float((batch["loss_weights"] > 0).sum())
    tiles = float(batch["tile_mask"].sum()) if "pixels" in batch else 0.0
    connector = visual * connector_params_per_token(model)
    if "qformer_mask" in batch:
        connector += float(_qformer_text(model, batch["qformer_mask"]))

    share = trainable_share
    into_vision = share["vision"] > 0
    into_llm = into_vision or share["connector"] > 0
    into_layers = into_llm or share["llm"] > 0
    llm = model.llm
    return {
        "vision": tiles * vision_flops(model.vision) * (1 + into_vision + share["vision"]),
        "connector": 2 * connector * (1 + into_vision + share["connector"]),
        "llm": 2 * tokens * llm_params_per_token(llm) * (1 + into_layers + share["llm"]),
        "attention": 4 * attended * llm.num_heads * llm.head_dim * (1 + 2 * into_layers),
        "head": 2 * supervised * llm.width * llm.vocab_size * (1 + into_layers + share["head"]),
    }


def _attended(llm: LLMConfig, seen: np.ndarray) -> float:
    """Keys that tokens attend to, over all layers, where each may look back at `seen` in its own conversation.

    Causal attention is so counted as the half it is, and a layer with a sliding window as that window.
    """
    window = llm.sliding_window or np.inf
    full = len(llm.full_layers) if llm.sliding_window else llm.depth
    return float(full * seen.sum() + (llm.depth - full) * np.minimum(seen, window).sum())


def trainable_shares(trainable: dict, frozen: dict) -> dict[str, float]:
    """The fraction of each part's weights that train, from the flat paths of the two trees."""

    def share(prefix: str) -> float:
        moves = sum(np.prod(leaf.shape) for path, leaf in trainable.items() if path.startswith(prefix))
        stays = sum(np.prod(leaf.shape) for path, leaf in frozen.items() if path.startswith(prefix))
        return float(moves / (moves + stays)) if moves + stays else 0.0

    head = "llm/head" if any(path.startswith("llm/head") for path in {**trainable, **frozen}) else "llm/embed"
    parts = {"vision": "vision/", "connector": "connector/", "llm": "llm/layers/", "head": head}
    return {name: share(prefix) for name, prefix in parts.items()}
