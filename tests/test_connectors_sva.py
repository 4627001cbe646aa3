"""Cambrian's Spatial Vision Aggregator, as a connector and inside the decoder, against torch."""

from dataclasses import replace
from functools import partial

import hf_copy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from connector_helpers import check_axes, check_round_trip, project, project_and_idle, relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from parity_log import record_parity
from safetensors.numpy import save_file
from torch import nn

from jaxvlm.config import ConfigError, ConnectorConfig, LLMConfig, ModelConfig, SVAConfig, VisionConfig
from jaxvlm.models.vlm import VLM, init_cache
from jaxvlm.train.flops import connector_params_per_token
from jaxvlm.weights.families.connectors import connector_family
from jaxvlm.weights.plan import Piece, plan
from jaxvlm.weights.readers import open_source

W, D, HEADS, GRID = 8, 16, 2, 2
TOWERS = (
    VisionConfig(image_size=8, patch_size=4, width=6, depth=1, num_heads=2, mlp_dim=8, feature_layers=(-1,)),
    VisionConfig(image_size=8, patch_size=2, width=10, depth=1, num_heads=2, mlp_dim=8, feature_layers=(-1,)),
)
SVA = SVAConfig(width=W, num_heads=HEADS, depth=2, groups=1, grid=GRID)
MODEL = ModelConfig(
    vision=VisionConfig(kind="fused", towers=TOWERS),
    connector=ConnectorConfig("sva", sva=SVA, row_end=True),
    llm=LLMConfig(vocab_size=32, width=D, depth=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24),
    dtype="float32",
    remat="none",
)
FEATURES = tuple(
    np.random.default_rng(i).normal(size=(2, 2, n, w)).astype(np.float32) for i, n, w in ((0, 4, 6), (1, 16, 10))
)
# Of each tile and tower, what is shown: everything, a band, a corner (windows without any of it), an empty slot.
REGIONS = np.int32(
    [[[0, 2, 0, 2], [0, 4, 0, 4]], [[0, 2, 0, 2], [1, 3, 0, 4]], [[1, 2, 0, 1], [0, 1, 1, 4]], [[0] * 4] * 2]
).reshape(2, 2, 2, 4)
TOLERANCE = 2e-5


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj_0", "v_proj_0", "k_proj_1", "v_proj_1"):
            setattr(self, name, nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W, bias=False)))
        self.o_proj = nn.Linear(W, W, bias=False)


class SamplerLayer(nn.Module):
    """Its weights as Cambrian names them; one query at a time, from what the paper says."""

    def __init__(self, width):
        super().__init__()
        self.proj_context, self.proj_in = nn.Linear(W, W, bias=False), nn.Linear(width + W, W, bias=False)
        self.cross_attn, self.norm = CrossAttention(), nn.LayerNorm(W)
        self.proj_out = nn.Module()
        self.proj_out.linear_1, self.proj_out.linear_2 = nn.Linear(W, W, bias=False), nn.Linear(W, width, bias=False)
        self.pos_embed_1 = nn.Parameter(torch.zeros(4, W))  # of the tower with 2 x 2 cells under a query

    def forward(self, query, context, cells, seen):
        """query [width], context [W], cells [(1, W), (4, W)], which of the five it sees -> [width]."""
        a = self.cross_attn
        x = self.proj_in(torch.cat([query, self.proj_context(context)]))
        cells = [cells[0], cells[1] + self.pos_embed_1]
        keys = torch.cat([a.k_proj_0(cells[0]), a.k_proj_1(cells[1])])[seen]  # [5, W] at most
        values = torch.cat([a.v_proj_0(cells[0]), a.v_proj_1(cells[1])])[seen]
        size, heads = W // HEADS, []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weights = (keys[:, part] @ a.q_proj(x)[part] / size**0.5).softmax(0)
            heads.append(weights @ values[:, part])
        x = self.norm(x + a.o_proj(torch.cat(heads)))
        return query + self.proj_out.linear_2(nn.functional.gelu(self.proj_out.linear_1(x)))


def sampler(width, depth):
    module = nn.Module()
    module.layers = nn.ModuleList([SamplerLayer(width) for _ in range(depth)])
    return module


class Cambrian(nn.Module):
    def __init__(self, in_llm=0):
        super().__init__()
        self.mm_projector = nn.Sequential(nn.Linear(W, D), nn.GELU(), nn.Linear(D, D))
        for i, tower in enumerate(TOWERS):
            layers = nn.Linear(tower.width, W), nn.GELU(), nn.Linear(W, W), nn.LayerNorm(W)
            setattr(self, f"mm_projector_aux_{i}", nn.Sequential(*layers))
        self.vision_sampler_0 = sampler(W, SVA.depth)
        if in_llm:
            self.vision_sampler_layers = nn.ModuleList([sampler(D, 1) for _ in range(in_llm)])
        self.vision_query, self.image_newline = nn.Parameter(torch.zeros(1, W)), nn.Parameter(torch.zeros(D))

    def look(self, tile, shown=((0, 2, 0, 2), (0, 4, 0, 4)), grid=GRID):
        """[N_i, Dv_i] of each tower -> the context [W], and for each query what lies under it in each tower, with what of
        it is visible: the rows and columns (top, bottom, left, right) that are `shown`, or if that is none, everything.
        """
        features = [getattr(self, f"mm_projector_aux_{i}")(x) for i, x in enumerate(tile)]
        found = []
        for row in range(grid):
            for column in range(grid):
                cells, seen = [], []
                for x, side, (top, bottom, left, right) in zip(features, (1, 2), shown, strict=True):
                    places = [(side * row + i, side * column + j) for i in range(side) for j in range(side)]
                    cells.append(x[[y * side * grid + x for y, x in places]])
                    inside = [top <= y < bottom and left <= x < right for y, x in places]
                    seen += inside if any(inside) else [True] * side**2
                found.append((cells, torch.tensor(seen)))
        return features[0].mean(0), found

    def forward(self, tile, *how):
        """The visual tokens [grid * grid, D] of one tile."""
        context, under = self.look(tile, *how)
        tokens = []
        for cells in under:
            query = self.vision_query[0]
            for layer in self.vision_sampler_0.layers:
                query = layer(query, context, *cells)
            tokens.append(self.mm_projector(query))
        return torch.stack(tokens)


def imported(config, state, folder):
    """The connector's parameters by the table, under the names that whole Cambrian models have."""
    save_file({f"model.{name}": value for name, value in state.items()}, folder / "state.safetensors")
    source, family = open_source(folder / "state.safetensors"), connector_family(config)
    names = {family.canonical(name): name for name in source.names()}
    (leaves,) = plan([Piece("connector", family, config, source, names)])
    return unflatten_dict({x.path: x.read(tuple(slice(0, n) for n in x.shape)) for x in leaves}, sep="/")


def tiles():
    """The features of the four tiles, for torch."""
    return [[torch.from_numpy(x[row, tile]) for x in FEATURES] for row in range(2) for tile in range(2)]


def test_connector(tmp_path):
    module = Cambrian()
    state = hf_copy.randomise(module)
    params = imported(MODEL, state, tmp_path)
    with torch.no_grad():
        expected = torch.stack([module(tile) for tile in tiles()])
        masked = torch.stack([module(*pair) for pair in zip(tiles(), REGIONS.reshape(4, 2, 4), strict=True)])
    found, idle = project_and_idle(replace(MODEL, remat="full"), params, FEATURES)
    assert found.shape == (2, 2 * MODEL.tile_tokens, D)
    error = relative_error(found.reshape(4, 4, D), expected)
    record_parity("Cambrian SVA", "connector", error)
    found = project(MODEL, params, FEATURES, None, None, REGIONS)
    hidden_error = relative_error(found.reshape(4, 4, D), masked)
    record_parity("Cambrian SVA, bars hidden", "connector", hidden_error)
    assert max(error, hidden_error) <= TOLERANCE
    changed = np.abs(masked - expected).amax(dim=(1, 2)).numpy() > 1e-2
    assert changed.tolist() == [False, True, True, False]  # a slot without an image sees everything
    check_round_trip(MODEL, params, state)
    assert idle == {"newline"}  # placed by the splice

    layer = W * (W + 2 * W + W + W + W + W) + 2 * 5 * (W * W + W)
    towers = (6 * W + W * W) + 4 * (10 * W + W * W)
    assert connector_params_per_token(MODEL) == towers + 2 * layer + W * D + D * D
    with pytest.raises(ConfigError, match="feature_tokens = 'patch'"):
        project(MODEL, params, (FEATURES[0][:, :, :3], FEATURES[1]))
    with pytest.raises(ConfigError, match="sva.grid = 3 must divide the grid of every tower, and one has 2 x 2"):
        project(replace(MODEL, connector=ConnectorConfig("sva", sva=replace(SVA, grid=3))), params, FEATURES)


@partial(jax.jit, static_argnums=0)
def hidden_and_gradients(config, params, batch):
    def loss(connector):
        hidden = VLM(config).apply({"params": params | {"connector": connector}}, batch)
        return (hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), hidden

    gradients, hidden = jax.grad(loss, has_aux=True)(params["connector"])
    return hidden, gradients


@partial(jax.jit, static_argnums=0)
def prefill(config, params, batch):
    def run(model):
        features = batch["features"], batch["features_1"]
        visual, length = model.project(features, tile_regions=batch["tile_regions"]), batch["tokens"].shape[1]
        ends = np.broadcast_to(np.arange(1, length + 1), batch["tokens"].shape)
        cache = init_cache(config.llm, 2, length, np.float32)
        given = batch["tokens"], batch["visual_index"], visual, batch["positions"], 0 * ends, ends
        return model.decode(*given, cache)[0]

    return VLM(config).apply({"params": params}, method=run)


def test_aggregators_inside_the_decoder_change_the_visual_tokens_alone(tmp_path):
    """A Llama of transformers with hooks on its layers; image tokens in any order, row ends, and a tile not placed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, rms_norm_eps=1e-5, **sizes)
    ).eval()
    module = Cambrian(in_llm=2)
    state = hf_copy.randomise(module)
    config = replace(MODEL, connector=replace(MODEL.connector, sva=replace(SVA, llm_layers=(0, 2))), remat="full")
    params = {"llm": hf_copy.llm(hf_copy.randomise(llama), config.llm), "connector": imported(config, state, tmp_path)}
    check_round_trip(config, params["connector"], state)

    rng = np.random.default_rng(0)
    visual_index = np.full((2, 9), -1, np.int32)
    visual_index[0, 1:7] = [4, 5, -2, 6, 7, -2]  # the second tile, with its row ends
    visual_index[1, 2:8] = [3, 1, 4, 7, 0, -2]
    batch = {
        "tokens": rng.integers(0, 32, (2, 9)).astype(np.int32),
        "visual_index": visual_index,
        "positions": np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)),
        "segment_ids": np.ones((2, 9), np.int32),
        "features": FEATURES[0],
        "features_1": FEATURES[1],
        "tile_regions": REGIONS,
    }
    shown = REGIONS.reshape(4, 2, 4)

    def after(number, _, __, x):
        x = x.clone()
        layer = module.vision_sampler_layers[number].layers[0]
        for row, place in zip(*np.nonzero(visual_index >= 0), strict=True):
            tile, query = divmod(int(visual_index[row, place]), 4)
            context, under = module.look(tiles()[2 * row + tile], shown[2 * row + tile])
            x[row, place] = layer(x[row, place], context, *under[query])
        return x

    for number, layer in enumerate((0, 2)):
        llama.model.layers[layer].register_forward_hook(partial(after, number))
    with torch.no_grad():
        x = llama.model.embed_tokens(torch.from_numpy(batch["tokens"]).long())
        for row, place in zip(*np.nonzero(visual_index != -1), strict=True):
            tile, query = divmod(int(visual_index[row, place]), 4)
            row_end = visual_index[row, place] == -2
            seen = tiles()[2 * row + tile], shown[2 * row + tile]
            x[row, place] = module.image_newline if row_end else module(*seen)[query]
        expected = llama.model(inputs_embeds=x).last_hidden_state
    hidden, gradients = hidden_and_gradients(config, params, batch)
    error = relative_error(hidden, expected)
    record_parity("Cambrian SVA in the LLM", "hidden", error)
    assert error <= TOLERANCE
    assert relative_error(prefill(config, params, batch), expected) <= TOLERANCE
    idle = {path for path, value in flatten_dict(gradients, sep="/").items() if not np.abs(value).max() > 1e-6}
    assert not idle
    params["connector"]["llm_layers"]["down"]["kernel"] *= 0
    assert relative_error(prefill(config, params, batch), expected) > 0.01


def test_parameters_have_axes_and_the_layers_inside_the_decoder_must_exist():
    inside = replace(MODEL.connector, sva=replace(SVA, groups=2, llm_layers=(1,)))
    found = check_axes(replace(MODEL, connector=inside), FEATURES)
    names = ("layers", "vision_embed", "vision_heads", "head_dim")
    assert found["llm_layers/attn/k_1/kernel"] == (names, (1, W, HEADS, W // HEADS))
    assert found["llm_layers/down/kernel"][1] == (1, W, D) and found["group_1/down/kernel"][1] == (2, W, W)
    assert found["linear_1/kernel"][1] == (2 * W, D)
    for layers in ((3,), (-1,), (1, 1)):
        wrong = replace(MODEL.connector, sva=replace(SVA, llm_layers=layers))
        with pytest.raises(ConfigError, match="must be different numbers of decoder layers, from 0 to 2"):
            check_axes(replace(MODEL, connector=wrong), FEATURES)
