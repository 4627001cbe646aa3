"""The counts that MFU rests on, against torch's own counter of what transformers (or the papers' arithmetic) computes.

Models of the real sizes on torch's meta device, which has shapes and no memory.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvlm.config import ConnectorConfig, LLMConfig, LoRAConfig, ModelConfig, SVAConfig, VisionConfig
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.train.flops import batch_flops, connector_params_per_token, llm_params_per_token, vision_flops
from jaxvlm.weights.families.known import LANGUAGE_MODELS, TOWERS
from jaxvlm.weights.families.llama import LLAMA
from jaxvlm.weights.families.timm import timm_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402


def counted(run) -> dict[str, int]:
    """The FLOPs of matrix products and convolutions in `run()`, by operation, and their sum as 'all'."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return found | {"all": sum(found.values())}


def on_meta(kind, **config):
    """A model of transformers whose attention is written out, so that its products are counted."""
    config = getattr(transformers, f"{kind}Config")(**config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(config).eval()


def pixels(size, count=1):
    return torch.empty((count, 3, size, size), device="meta")


VITS = {
    "openai/clip-vit-large-patch14-336": ("CLIPVision", "vit_large_patch14_clip_336"),
    "google/siglip-so400m-patch14-384": ("SiglipVision", "vit_so400m_patch14_siglip_384"),
    "facebook/dinov2-giant": ("Dinov2", "vit_giant_patch14_dinov2"),
}


@pytest.mark.parametrize("name", VITS)
def test_vits(name):
    kind, timm = VITS[name]
    tower = replace(timm_config(timm), feature_layers=(-2,))
    settings = TOWERS[name] | {"num_hidden_layers": tower.depth - 1}  # the features need no more
    settings |= {"vision_use_head": False} if "siglip" in name else {}
    size = tower.image_size
    assert vision_flops(tower) == counted(lambda: on_meta(kind, **settings)(pixels(size)))["all"]


def test_s2():
    """LLaVA's three scales: the image as 1, 2 x 2 and 3 x 3 tiles."""
    tower = replace(timm_config("vit_large_patch14_clip_336"), scales=(1, 2, 3))
    settings = TOWERS["openai/clip-vit-large-patch14-336"] | {"num_hidden_layers": 23}
    tiles = torch.cat([pixels(336 * scale).reshape(-1, 3, 336, 336) for scale in (1, 2, 3)])
    assert vision_flops(tower) == counted(lambda: on_meta("CLIPVision", **settings)(tiles))["all"]


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_xxlarge.clip", 256), ("convnext_xxlarge.clip", 1024), ("convnext_tiny", 224)]
)
def test_convnexts(name, size):
    """All stages, as Cambrian takes them (at 1024 pixels)."""
    tower = replace(timm_config(name), image_size=size, feature_layers=(0, 1, 2, 3), feature_norm=False)
    model = on_meta("ConvNext", depths=tower.stage_depths, hidden_sizes=tower.stage_widths)
    assert vision_flops(tower) == counted(lambda: model(pixels(size)))["all"]
    first = replace(tower, feature_layers=(1,))
    model = on_meta("ConvNext", depths=tower.stage_depths[:2], hidden_sizes=tower.stage_widths[:2], num_stages=2)
    assert vision_flops(first) == counted(lambda: model(pixels(size)))["all"]


def test_an_efficientnet():
    """Of this one there is no model in torch here: XLA's own count, which has the cheap operations in it too."""
    tower = VisionConfig(kind="efficientnet_lite", image_size=224, patch_size=32, width=1280, feature_layers=(-1,))
    model = ModelConfig(vision=tower, llm=LLMConfig(vocab_size=8, width=8, depth=1, num_heads=1, num_kv_heads=1))
    params = abstract_params(replace(model, dtype="float32"))

    def encode(params, pixels):
        return VLM(replace(model, dtype="float32")).apply({"params": params}, pixels, method="encode")

    lowered = jax.jit(encode).lower(params, jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.uint8))
    assert vision_flops(tower) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


class Attention(nn.Module):
    """An aggregator of Cambrian: queries [P, 1, width], the context [P, 1, W], cells [P, m * m, W] of each tower."""

    def __init__(self, width, w, towers, heads=16):
        super().__init__()
        self.context, self.into = nn.Linear(w, w), nn.Linear(width + w, w)
        self.q, self.o = nn.Linear(w, w), nn.Linear(w, w)
        self.k, self.v = (nn.ModuleList([nn.Linear(w, w) for _ in range(towers)]) for _ in "kv")
        self.up, self.down, self.heads = nn.Linear(w, w), nn.Linear(w, width), heads

    def forward(self, queries, context, cells):
        x = self.into(torch.cat([queries, self.context(context)], -1))
        k, v = (torch.cat([m(c) for m, c in zip(ms, cells, strict=True)], 1) for ms in (self.k, self.v))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), k, v))  # [P, H, M, h]
        return self.down(self.up(self.o((q @ k.mT @ v).transpose(1, 2).flatten(2))))


def test_cambrians_aggregator():
    """The 8B model's: four towers, three layers, and ten more inside the decoder (recipes §1.1 A7, §3.4)."""
    grids, widths, w, width, queries = (24, 24, 24, 96), (1152, 1024, 1536, 5760), 1024, 4096, 576
    towers = tuple(
        VisionConfig(image_size=14 * g, width=n, feature_layers=(-1,)) for g, n in zip(grids, widths, strict=True)
    )
    sva = SVAConfig(width=w, depth=3, grid=24, llm_layers=tuple(range(0, 30, 3)))
    model = ModelConfig(
        VisionConfig(kind="fused", towers=towers), ConnectorConfig("sva", sva=sva), LLMConfig(width=width)
    )
    with torch.device("meta"):
        first = [nn.Sequential(nn.Linear(n, w), nn.GELU(), nn.Linear(w, w)) for n in widths]
        layers = [Attention(w, w, 4) for _ in range(3)]
        last = nn.Sequential(nn.Linear(w, width), nn.GELU(), nn.Linear(width, width))
        inside = [Attention(width, w, 4) for _ in range(10)]

        def run():
            seen = [m(torch.empty(g * g, n)) for m, g, n in zip(first, grids, widths, strict=True)]
            cells = [x.reshape(queries, -1, w) for x in seen]
            x = context = torch.empty(queries, 1, w)
            for layer in layers:
                x = layer(x, context, cells)
            x = last(x)
            for layer in inside:
                x = layer(x, context, cells)

        assert 2 * queries * connector_params_per_token(model) == counted(run)["all"]


def test_a_decoder():
    """The layers' and the head's products of one sequence; the attention of a causal one is half of what torch computes."""
    given = LANGUAGE_MODELS["meta-llama/Llama-2-7b-hf"]
    length, config = 64, LLAMA.configure(given, None)
    settings = {key: value for key, value in given.items() if key != "model_type"}
    model = on_meta("Llama", **settings)
    with torch.device("meta"):
        head, ids = nn.Linear(config.width, config.vocab_size, bias=False), torch.zeros((1, length), dtype=torch.long)
        found = counted(lambda: head(model(ids).last_hidden_state))
    ones = np.ones((1, length))
    batch = {"segment_ids": ones, "positions": np.arange(length)[None], "visual_index": -ones, "loss_weights": ones}
    shares = dict.fromkeys(("vision", "connector", "llm", "head"), 0.0)
    parts = batch_flops(ModelConfig(llm=config), batch, shares)
    assert parts["llm"] + parts["head"] == found["aten.mm"]
    pairs = length * (length + 1) / 2
    assert parts["attention"] == pytest.approx((found["all"] - found["aten.mm"]) * pairs / length**2, rel=1e-3)


def test_sliding_windows_and_adapters():
    """A window of 3 over 5 tokens: 1 + 2 + 3 + 3 + 3 keys in a windowed layer, 15 in a full one. Adapters are parameters."""
    llm = LLMConfig(vocab_size=8, width=8, depth=3, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16)
    windowed = replace(llm, sliding_window=3, full_layers=(1,))
    ones = np.ones((1, 5))
    batch = {"segment_ids": ones, "positions": np.arange(5)[None], "visual_index": -ones, "loss_weights": ones}
    shares = dict.fromkeys(("vision", "connector", "llm", "head"), 0.0)

    def attention(config):
        return batch_flops(ModelConfig(llm=config), batch, shares)["attention"]

    assert attention(windowed) / attention(llm) == (2 * 12 + 15) / 45
    adapted = replace(llm, lora=LoRAConfig(rank=2))
    tower = VisionConfig(image_size=28, width=8, depth=2, num_heads=1, mlp_dim=8)
    layers = abstract_params(ModelConfig(vision=tower, llm=adapted))["llm"]["layers"]
    kernels = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layers) if path[-1].key not in ("scale", "bias")
    ]
    assert llm_params_per_token(adapted) == sum(leaf.size for leaf in kernels)


def test_frozen_parts_cost_what_they_do():
    """Forward always; the input's gradient where something before trains; the weights' gradient for the share that trains."""
    tokens = np.ones((1, 6))
    batch = {"segment_ids": tokens, "positions": np.arange(6)[None], "visual_index": np.arange(6)[None] - 3}
    batch |= {"loss_weights": tokens, "pixels": None, "tile_mask": np.ones((1, 1))}
    model = ModelConfig(vision=VisionConfig(image_size=28, width=8, depth=2, num_heads=1, mlp_dim=8))

    def factors(**moves):
        none = dict.fromkeys(("vision", "connector", "llm", "head"), 0.0)
        forward, parts = batch_flops(model, batch, none), batch_flops(model, batch, none | moves)
        return {name: parts[name] / forward[name] for name in parts}

    assert factors(connector=1.0) == dict(vision=1, connector=2, llm=2, attention=3, head=2)
    assert factors(connector=1.0, llm=1.0, head=1.0) == dict(vision=1, connector=2, llm=3, attention=3, head=3)
    assert factors(vision=1.0, connector=1.0, llm=1.0, head=1.0) == dict(
        vision=3, connector=3, llm=3, attention=3, head=3
    )
    assert factors(llm=0.1) == dict(vision=1, connector=1, llm=2.1, attention=3, head=2)  # adapters alone
