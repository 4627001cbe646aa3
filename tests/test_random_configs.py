"""Configurations drawn at random, of every family: odd widths, grouped heads, tied heads, windows, rotary scaling.

A compiled program an example, so the models get few; the families' own tests pin each setting once.
"""

import dataclasses

import numpy as np
import pytest
from hf_copy import randomise
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_decoder_families import forward
from vision_helpers import encode, error, images, normalised, states, tiny

from jaxvlm.config import ModelConfig, RopeScalingConfig
from jaxvlm.models.rotary import rotary_angles
from jaxvlm.weights import config_from, import_part
from jaxvlm.weights.families.decoder import rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# A smaller failing example would take minutes to find; the first one is printed whole.
FEW = settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
LENGTH = 9


def scalings(dim: int):
    """`rope_parameters` of each kind, for `dim` dimensions that turn."""
    number = lambda low, high: st.floats(low, high).map(lambda value: round(value, 3))  # noqa: E731
    theta = {"rope_theta": st.sampled_from([50.0, 1e4, 1e6])}
    common = theta | {"original_max_position_embeddings": st.integers(4, 64)}
    factors = st.lists(number(1, 8), min_size=dim // 2, max_size=dim // 2)
    return st.one_of(
        st.fixed_dictionaries({"rope_type": st.just("default"), **theta}),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": number(1, 9), **theta}),
        st.fixed_dictionaries(
            {"rope_type": st.just("llama3"), "factor": number(1, 9), **common}
            | {"low_freq_factor": number(0.5, 1.5), "high_freq_factor": number(2, 6)}
        ),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": number(1, 9), **common},
            optional={"beta_fast": number(4, 40), "beta_slow": number(0.2, 3), "attention_factor": number(0.5, 2)},
        ),
        st.fixed_dictionaries(
            {"rope_type": st.just("longrope"), "short_factor": factors, "long_factor": factors, **common},
            optional={"factor": number(1, 9), "attention_factor": number(0.5, 2)},
        ),
    )


@settings(max_examples=80)
@given(st.data())
def test_rotary_angles(data):
    """Every kind of scaling, read from a config.json's entry, against transformers' angles of the same positions."""
    dim = data.draw(st.sampled_from([4, 6, 16]))
    given_ = data.draw(scalings(dim))
    theirs = transformers.LlamaConfig(
        hidden_size=dim, num_attention_heads=1, max_position_embeddings=128, rope_parameters=dict(given_)
    )
    positions = np.array([[0, 1, 3, data.draw(st.integers(4, 100))]], np.int32)
    with torch.no_grad():
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        expected = module(torch.zeros(1, 1, dim), torch.from_numpy(positions).long())
    kinds = ("default", "linear", "llama3", "yarn", "longrope")
    values = rope({"max_position_embeddings": 128}, "folder", dim=dim, given=given_, kinds=kinds)
    scaling = values.get("rope_scaling", RopeScalingConfig())
    stretched = positions.max(1) >= scaling.original_max_positions  # as the decoder decides it
    for found, wanted in zip(
        rotary_angles(positions, dim, values["rope_theta"], scaling, stretched), expected, strict=True
    ):
        np.testing.assert_allclose(found[0, :, 0], wanted[0, :, : dim // 2], rtol=0, atol=4e-5)


@st.composite
def decoders(draw):
    """(class of transformers, its settings)."""
    kind = draw(
        st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi", "Phi3", "OPT"])
    )
    groups, size, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    free = kind not in ("Phi", "Phi3", "OPT", "Qwen2")  # those divide the width
    width = groups * size * (draw(st.integers(1, 9)) if free else head_dim)
    depth, flag = draw(st.integers(1, 3)), st.booleans()
    values = {
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": width,
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": depth,
        "num_attention_heads": groups * size,
        "num_key_value_heads": groups,
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(flag) and kind != "Phi",
        "pad_token_id": 0,
    }
    if kind == "OPT":
        more = {"word_embed_proj_dim": width, "ffn_dim": values["intermediate_size"], "enable_bias": draw(flag)}
        return kind, values | more
    if free:
        values["head_dim"] = head_dim
    window = draw(st.one_of(st.none(), st.integers(1, 7)))
    if kind in ("Mistral", "Phi3"):
        values["sliding_window"] = window
    if kind in ("Qwen2", "Qwen3") and window:
        values |= {
            "use_sliding_window": True,
            "sliding_window": window,
            "max_window_layers": draw(st.integers(0, depth)),
        }
    if kind in ("Gemma2", "Gemma3Text"):
        kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=depth, max_size=depth)
        values |= {
            "sliding_window": window or 3,
            "layer_types": draw(kinds),
            "query_pre_attn_scalar": draw(st.integers(1, 30)),
        }
    if kind == "Gemma2":
        cap = st.one_of(st.none(), st.floats(1, 9))
        values |= {"attn_logit_softcapping": draw(cap), "final_logit_softcapping": draw(cap)}
    if kind in ("Llama", "Qwen3"):
        values["attention_bias"] = draw(flag)
    if kind == "Llama":
        values["mlp_bias"] = draw(flag)
    share = draw(st.sampled_from([0.5, 1.0])) if kind in ("Phi", "Phi3") and head_dim % 4 == 0 else 1.0
    allowed = ("default", "longrope") if kind == "Phi3" else ("default", "linear", "llama3", "yarn")
    scaled = draw(scalings(int(head_dim * share)).filter(lambda scaling: scaling["rope_type"] in allowed))
    if kind == "Gemma3Text":
        local = {"rope_type": "default", "rope_theta": 100.0}
        return kind, values | {"rope_parameters": {"full_attention": scaled, "sliding_attention": local}}
    if kind in ("Phi", "Phi3"):
        scaled["partial_rotary_factor"] = share
    if kind == "Phi3" and scaled["rope_type"] == "longrope":
        values["original_max_position_embeddings"] = scaled.pop("original_max_position_embeddings")
    return kind, values | {"rope_parameters": scaled}


@FEW
@given(case=decoders(), seed=st.integers(0, 99))
def test_decoders(tmp_path_factory, case, seed):
    kind, values = case
    config = getattr(transformers, f"{kind}Config")(**values)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    randomise(theirs, seed)
    folder = tmp_path_factory.mktemp(kind)
    theirs.save_pretrained(folder)
    llm = config_from(folder)[1]
    model = ModelConfig(llm=llm, dtype="float32", remat="none")
    tokens = np.random.default_rng(seed).integers(1, values["vocab_size"], (1, LENGTH)).astype(np.int32)
    found = forward(model, {"llm": import_part(folder, "llm", llm)}, tokens, np.ones_like(tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits
    assert error(found, expected) <= 2e-5


@st.composite
def towers(draw):
    """(class of transformers, its settings, its final norm)."""
    kind, norm = draw(
        st.sampled_from(
            [
                ("CLIPVision", "post_layernorm"),
                ("SiglipVision", "post_layernorm"),
                ("Dinov2", "layernorm"),
                ("Dinov2WithRegisters", "layernorm"),
                ("ViT", "layernorm"),
                ("Blip2Vision", "post_layernorm"),
            ]
        )
    )
    heads, patch = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    left_over = draw(st.integers(0, patch - 1)) if "Dinov2" not in kind else 0  # those would resample
    values = {
        "hidden_size": heads * draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * draw(st.integers(1, 4)) + left_over,
        "hidden_act": draw(st.sampled_from(["gelu", "quick_gelu", "gelu_pytorch_tanh"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-12])),
    }
    if "Dinov2" not in kind:
        return kind, values | {"intermediate_size": draw(st.integers(2, 40))}, norm
    values |= {"mlp_ratio": draw(st.integers(1, 4)), "use_swiglu_ffn": draw(st.booleans())}
    return kind, values | ({"num_register_tokens": draw(st.integers(1, 5))} if "Reg" in kind else {}), norm


@FEW
@given(case=towers(), data=st.data())
def test_towers(tmp_path_factory, case, data):
    kind, values, final_norm = case
    theirs = tiny(kind, **values)
    folder = tmp_path_factory.mktemp(kind)
    theirs.save_pretrained(folder)
    config = config_from(folder)[1]
    depth = values["num_hidden_layers"]
    layers = data.draw(
        st.lists(st.integers(1, depth).flatmap(lambda n: st.sampled_from([n, -n])), min_size=1, max_size=3)
    )
    normed = data.draw(st.booleans())
    config = dataclasses.replace(config, feature_layers=tuple(layers), feature_norm=normed, feature_tokens="patch")
    pixels = images(values["image_size"])
    hidden = states(theirs, normalised(pixels, config))
    with torch.no_grad():
        chosen = [hidden[layer if layer > 0 else depth + 1 + layer] for layer in layers]
        chosen = [theirs.get_submodule(final_norm)(each) for each in chosen] if normed else chosen
    expected = torch.cat([each[:, config.class_token + config.num_registers :] for each in chosen], -1)
    assert error(encode(config, import_part(folder, "vision", config), pixels), expected) <= 2e-5
