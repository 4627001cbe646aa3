"""Linear connectors, pixel shuffle, the Q-Formers and the resampler: against torch, tables both ways, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from connector_helpers import check_axes, check_round_trip, imported, project, project_and_idle, relative_error
from hf_copy import randomise
from parity_log import record_parity
from torch import nn

from jaxvlm.config import ConfigError, ConnectorConfig, LLMConfig, ModelConfig, QFormerConfig, ResamplerConfig
from jaxvlm.config import VisionConfig as Vision
from jaxvlm.train.flops import _qformer_text, connector_params_per_token
from jaxvlm.weights.families.connectors import mlp_name

MODEL = ModelConfig(
    vision=Vision(image_size=16, patch_size=4, width=12, depth=2, num_heads=2, mlp_dim=16),
    llm=LLMConfig(vocab_size=32, width=16, depth=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24),
    dtype="float32",
    remat="none",
)
FEATURES = np.random.default_rng(0).normal(size=(2, 2, 16, 12)).astype(np.float32)  # [B, T, N, Dv]
TOLERANCE = 2e-5  # of the largest magnitude, in float32


def flat(features=FEATURES):
    """[B * T, N, Dv] for torch."""
    return torch.from_numpy(features).flatten(0, 1)


def check(found, config, expected, name):
    """Compares visual tokens with torch's [B * T, P, D]."""
    assert found.shape == (2, 2 * config.tile_tokens, 16)
    error = relative_error(np.asarray(found).reshape(4, config.tile_tokens, 16), expected)
    record_parity(name, "connector", error)
    assert error <= TOLERANCE


# --------------------------------------------------------------------------------------------------------- linear ones

FUSED = [nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 16)]
THREE = [nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)]
LINEAR = {
    "linear": ([nn.Linear(12, 16)], "mm_projector."),
    "mlp3x_gelu": (THREE, "model.mm_projector."),
    "fused_mlp": (FUSED, "projector.projector."),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers(kind, tmp_path):
    layers, prefix = LINEAR[kind]
    module = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    state = {prefix + name: value for name, value in randomise(module).items()}
    newline = np.ones(16, np.float32)
    config = replace(MODEL, connector=ConnectorConfig(kind, row_end=True))
    params = imported(config, state | {"model.image_newline": newline}, tmp_path)
    np.testing.assert_array_equal(params["newline"], newline)
    found, idle = project_and_idle(config, params, FEATURES)
    with torch.no_grad():
        check(found, config, module(flat()), kind)
    check_round_trip(config, params, {mlp_name(name): value for name, value in state.items()} | {"newline": newline})
    assert idle == {"newline"}  # placed by the splice, not by the connector
    products = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    assert connector_params_per_token(config) == products


def test_pixel_shuffle(tmp_path):
    """Idefics 3's and SmolVLM's connector, and nanoVLM's name for its layer."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    vision, text = (
        {"hidden_size": 12, "num_attention_heads": 2},
        {"hidden_size": 16, "num_attention_heads": 2, "model_type": "llama"},
    )
    module = Idefics3Connector(
        transformers.Idefics3Config(vision_config=vision, text_config=text, scale_factor=2, pad_token_id=0)
    )
    state = randomise(module)
    (name,) = state
    config = replace(MODEL, connector=ConnectorConfig("pixel_shuffle", bias=False, shuffle=2))
    params = imported(config, {f"model.connector.{name}": state[name]}, tmp_path)
    found, idle = project_and_idle(config, params, FEATURES)
    assert not idle
    with torch.no_grad():
        check(found, config, module(flat()), "pixel_shuffle")
    check_round_trip(config, params, {mlp_name("MP.proj.weight"): state[name]})
    assert connector_params_per_token(config) == 4 * 12 * 16
    with pytest.raises(ConfigError, match="connector.shuffle = 3 must divide"):
        project(replace(config, connector=replace(config.connector, shuffle=3)), params, FEATURES)


# ----------------------------------------------------------------------------------------------------------- Q-Formers

QFORMER = QFormerConfig(num_queries=3, width=8, depth=4, num_heads=2, mlp_dim=20, cross_every=2)
HF_QFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "encoder_hidden_size": 12,
    "attn_implementation": "eager",
}


def with_projection(module):
    """(all parameters of a Q-Former with its queries and the language projection, those two)."""
    query, projection = nn.Parameter(torch.zeros(1, 3, 8)), nn.Linear(8, 16)
    whole = nn.ParameterDict({"query_tokens": query}).eval()
    whole.qformer, whole.language_projection = module.eval(), projection
    return randomise(whole), query, projection


def test_blip2_qformer(tmp_path):
    module = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**HF_QFORMER))
    state, query, projection = with_projection(module)
    config = replace(MODEL, connector=ConnectorConfig("qformer", qformer=QFORMER))
    params = imported(config, state, tmp_path)
    with torch.no_grad():
        out = module(query_embeds=query.expand(4, -1, -1), encoder_hidden_states=flat()).last_hidden_state
        check(project(config, params, FEATURES), config, projection(out), "BLIP-2 Q-Former")
    check_round_trip(config, params, state)
    self_attention, mlp, cross = 4 * 8 * 8 + 2 * 3 * 8, 2 * 8 * 20, 2 * 8 * 8 + 16 * (2 * 12 * 8 / 3 + 2 * 8)
    assert connector_params_per_token(config) == 4 * (self_attention + mlp) + 2 * cross + 8 * 16
    mask = np.arange(4) < np.array(
        [[[4], [0]]]
    )  # a tile with four tokens of text beside its three queries, one without
    of_text = 4 * (4 * 8 * 8 + mlp) + 2 * (7 * 7 - 3 * 3) * 8
    assert _qformer_text(config, mask) == 4 * of_text
    with pytest.raises(ConfigError, match="reads no text"):
        project(config, params, FEATURES, np.ones((2, 2, 4), np.int32))
    with pytest.raises(ConfigError, match="cross_every = 3 must divide"):
        check_axes(
            replace(config, connector=ConnectorConfig("qformer", qformer=replace(QFORMER, cross_every=3))), FEATURES
        )


def test_instructblip_qformer_with_and_without_text(tmp_path):
    module = transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**HF_QFORMER))
    state, query, projection = with_projection(module)
    text = replace(QFORMER, text_vocab_size=30, text_positions=9)
    config = replace(MODEL, connector=ConnectorConfig("qformer", qformer=text))
    params = imported(config, state, tmp_path)
    check_round_trip(config, params, state)
    tokens = np.random.default_rng(1).integers(1, 30, (2, 2, 5)).astype(np.int32)
    mask = np.arange(5) < np.array([[5, 2], [0, 4]])[..., None]  # [B, T, L]
    seen = {"encoder_hidden_states": flat(), "query_embeds": query.expand(4, -1, -1)}
    attended = torch.cat([torch.ones(4, 3), torch.from_numpy(mask).flatten(0, 1)], dim=1)
    found, idle = project_and_idle(config, params, FEATURES, tokens, mask)
    with torch.no_grad():
        ids = torch.from_numpy(tokens).flatten(0, 1).long()
        out = module(input_ids=ids, attention_mask=attended, **seen).last_hidden_state[:, :3]
        check(found, config, projection(out), "InstructBLIP Q-Former")
        out = module(input_ids=None, **seen).last_hidden_state
        check(project(config, params, FEATURES), config, projection(out), "InstructBLIP Q-Former without text")
    # A bias on keys shifts all scores of a query alike; the text's own part of the last layer comes too late.
    assert all("/k/bias" in path or path.startswith("layers/layer_1/text_mlp") for path in idle), idle
    assert "layers/layer_0/text_mlp/up/kernel" not in idle and "word_embed" not in idle


# ----------------------------------------------------------------------------------------------------------- resampler


class QwenResampler(nn.Module):
    """What is known of Qwen-VL's `visual` behind its transformer, with torch's own attention and resizing."""

    def __init__(self, queries, width, heads, features):
        super().__init__()
        self.attn_pool = nn.Module()
        self.attn_pool.query = nn.Parameter(torch.zeros(queries, width))
        self.attn_pool.kv_proj = nn.Linear(features, width, bias=False)
        self.attn_pool.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.attn_pool.ln_q, self.attn_pool.ln_kv = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.ln_post, self.proj = nn.LayerNorm(width, 1e-6), nn.Parameter(torch.zeros(width, width))
        side, quarter = int(queries**0.5), width // 4
        table = torch.zeros(side, side, width, dtype=torch.float64)
        for row in range(side):
            for column in range(side):
                for half, place in enumerate((column, row)):
                    for i in range(quarter):
                        angle = torch.tensor(place / 10000 ** (i / quarter), dtype=torch.float64)
                        table[row, column, half * 2 * quarter + i] = angle.sin()
                        table[row, column, half * 2 * quarter + quarter + i] = angle.cos()
        self.table = table.float()

    def forward(self, x):
        pool, side = self.attn_pool, int(x.shape[1] ** 0.5)
        x = pool.ln_kv(pool.kv_proj(x))
        size = (side, side)
        keys = nn.functional.interpolate(self.table.permute(2, 0, 1)[None], size, mode="bicubic", align_corners=False)
        keys = keys[0].permute(1, 2, 0).reshape(side * side, -1)
        q = pool.ln_q(pool.query) + self.table.flatten(0, 1)
        out, _ = pool.attn(q.expand(len(x), -1, -1), x + keys, x)
        return self.ln_post(out) @ self.proj


def test_resampler(tmp_path):
    module = QwenResampler(9, 16, 4, 12)
    state = randomise(module)
    config = replace(MODEL, connector=ConnectorConfig("resampler", resampler=ResamplerConfig(9, 4)))
    others = (
        "visual.attn_pool.pos_embed",
        "visual.ln_pre.weight",
        "visual.transformer.resblocks.0.ln_1.bias",
        "wte.weight",
    )
    names = [f"transformer.{name}" for name in others] + ["lm_head.weight"]
    whole = {f"transformer.visual.{name}": value for name, value in state.items()}
    params = imported(config, whole | dict.fromkeys(names, np.zeros(4, np.float32)), tmp_path)
    found, idle = project_and_idle(config, params, FEATURES)
    with torch.no_grad():
        check(found, config, module(flat()), "Qwen-VL resampler")
    check_round_trip(config, params, state)
    assert idle <= {"attn/k/bias"}
    assert connector_params_per_token(config) == 16 / 9 * (12 * 16 + 2 * 16 * 16) + 2 * 16 * 16 + 2 * 16 * 16
    with pytest.raises(ConfigError, match="resampler.num_queries = 8 is none"):
        project(replace(config, connector=ConnectorConfig("resampler", resampler=ResamplerConfig(8))), params, FEATURES)


# ------------------------------------------------------------------------------------------------------------ all kinds


def test_every_axis_is_known_and_no_kernel_uses_a_mesh_axis_twice():
    text = replace(QFORMER, text_vocab_size=5)
    for connector in (
        *(ConnectorConfig(kind) for kind in ("linear", "mlp2x_gelu", "mlp3x_gelu", "fused_mlp", "pixel_shuffle")),
        ConnectorConfig("qformer", qformer=text),
        ConnectorConfig("resampler", resampler=ResamplerConfig(9, 4), row_end=True),
    ):
        config = replace(MODEL, connector=connector)
        tokens = (np.ones((2, 2, 3), np.int32),) if connector.kind == "qformer" else ()
        found = check_axes(config, FEATURES, *tokens)
        assert ("newline" in found) == connector.row_end
    many = check_axes(replace(MODEL, connector=ConnectorConfig("mlp12x_gelu", bias=False)), FEATURES)
    assert many.keys() == {f"linear_{i}/kernel" for i in range(1, 13)}
