"""Every family of decoders against transformers: a tiny random model saved, imported, run, generated from, exported."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_copy import randomise
from parity_log import record_parity
from weights_helpers import write_gguf

from jaxvlm.config import LLMConfig, ModelConfig, RopeScalingConfig
from jaxvlm.infer import decoding
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.weights import WeightsError, config_from, import_part, readers
from jaxvlm.weights.families import BY_MODEL_TYPE, describe_decoder
from jaxvlm.weights.tensors_out import part_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, LENGTH, ANSWER = 53, 30, 15, 9
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
THREE_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 2.5, 6.0]}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# name: (class of transformers, settings); a window is shorter than the rows, so it is part of what is compared.
FAMILIES = {
    "llama": (
        "Llama",
        SHAPE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama3": ("Llama", SHAPE | {"rope_parameters": LLAMA3, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SHAPE | THREE_HEADS | {"head_dim": 6, "sliding_window": 4}),
    "qwen2": (
        "Qwen2",
        SHAPE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True}
        | {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5}},
    ),
    "qwen3": ("Qwen3", SHAPE | THREE_HEADS | {"head_dim": 4, "tie_word_embeddings": True}),
    "gemma": ("Gemma", SHAPE | {"head_dim": 10}),
    "gemma2": (
        "Gemma2",
        SHAPE | {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        SHAPE | {"head_dim": 4, "sliding_window": 5, "query_pre_attn_scalar": 9, "rope_parameters": GEMMA3_ROPES}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi2": ("Phi", SHAPE | {"hidden_size": 40, "num_key_value_heads": 5}),
    "phi3": (
        "Phi3",
        SHAPE | {"hidden_size": 40, "rope_parameters": LONGROPE, "original_max_position_embeddings": 13}
        | {"sliding_window": 6},
    ),
    "opt": ("OPT", SHAPE | {"ffn_dim": 37, "word_embed_proj_dim": WIDTH}),
}  # fmt: skip
# Those that no LLaVA class holds as they are here; the others answer in test_export_families.py.
GREEDY = ("phi2", "phi3", "gemma2")
LENGTHS = (LENGTH, 4, 1)  # of the rows; with their answers on both sides of longrope's 13, and longer than the windows


@partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params, tokens, segment_ids):
    """logits [B, S, V] of right-padded text rows."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    batch["visual_index"] = jnp.full_like(tokens, -1)
    model = VLM(config)
    return model.apply({"params": params}, model.apply({"params": params}, batch), method="logits")


def made(name: str, settings: dict | None = None):
    cls = FAMILIES[name][0]
    config = getattr(transformers, cls + ("TextConfig" if cls == "Gemma3" else "Config"))(
        **(settings or FAMILIES[name][1])
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    randomise(model)
    if name == "opt":
        model.model.decoder.embed_positions.weight.data[:2] = 0  # of padding: no parameter of ours has them
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    from safetensors.numpy import load_file

    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    part, llm = config_from(tmp_path)
    assert part == "llm"
    config = ModelConfig(llm=llm, dtype="float32", remat="none")
    params = {"llm": import_part(tmp_path, "llm", llm)}
    assert jax.tree.map(jnp.shape, params["llm"]) == jax.tree.map(jnp.shape, abstract_params(config)["llm"])

    tokens = np.random.default_rng(0).integers(1, VOCAB, (len(LENGTHS), LENGTH)).astype(np.int32)
    segment_ids = (np.arange(LENGTH) < np.array(LENGTHS)[:, None]).astype(np.int32)
    found, errors = np.asarray(forward(config, params, tokens, segment_ids)), []
    for row, ours, length in zip(tokens, found, LENGTHS, strict=True):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(row[None, :length]).long()).logits[0].numpy()
        errors.append(np.abs(ours[:length] - expected).max() / np.abs(expected).max())
    record_parity(name, "llm", max(errors))
    assert max(errors) <= 2e-5

    family = BY_MODEL_TYPE[theirs.config.model_type]
    exported = {tensor.name: tensor for tensor in part_tensors(flatten_dict(params["llm"], sep="/"), family, llm)}
    saved = {family.canonical(key): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    assert exported.keys() == saved.keys()
    for key, tensor in exported.items():
        assert tensor.shape == saved[key].shape
        np.testing.assert_array_equal(tensor.make(), saved[key], err_msg=key)

    again, given = describe_decoder(llm)
    assert again is family and given["model_type"] == theirs.config.model_type
    described = type(theirs)(type(theirs.config)(**given | {"pad_token_id": 0}, attn_implementation="eager")).eval()
    described.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        logits = described(torch.from_numpy(tokens[:1]).long()).logits[0].numpy()
    np.testing.assert_allclose(logits, found[0], rtol=0, atol=2e-5 * np.abs(logits).max())

    if name in GREEDY:
        theirs.generation_config.eos_token_id = None
        expected = [generate(theirs, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
        np.testing.assert_array_equal(cached_answers(config, params, tokens), expected)


def generate(model, prompt: np.ndarray) -> np.ndarray:
    """transformers' greedy answer, int [ANSWER]."""
    prompt = torch.from_numpy(prompt[None]).long()
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=ANSWER, do_sample=False)[0, prompt.shape[1] :].numpy()


def cached_answers(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Ours for all rows at once, left-padded, through the cache: int [B, ANSWER]."""
    lengths = np.array(LENGTHS, np.int32)
    padded = np.stack([np.pad(row[:n], (LENGTH - n, 0)) for row, n in zip(tokens, lengths, strict=True)])
    logits, cache = decoding.prefill(config, LENGTH + ANSWER, params, padded, None, None, None, lengths)
    keys = jax.random.split(jax.random.key(0), len(LENGTHS))
    limits = np.full(len(LENGTHS), ANSWER, np.int32)
    sampling = decoding.Sampling(keys, np.float32(0), np.float32(1), np.array([-1], np.int32), limits)
    return np.asarray(decoding.decode(config, ANSWER, True, params, cache, logits, lengths, sampling)[0])


def test_of_a_joined_tensor_only_the_slice_is_read(tmp_path, monkeypatch):
    made("phi3").save_pretrained(tmp_path)
    source = readers.open_source(tmp_path)
    read, real = {}, type(source).read

    def counted(self, name, index=()):
        value = real(self, name, index)
        read[name] = read.get(name, 0) + value.size
        return value

    monkeypatch.setattr(type(source), "read", counted)
    import_part(tmp_path, "llm")
    for name, size in read.items():
        assert size == np.prod(source.shape(name)), name  # its parts, and nothing twice


def test_a_decoder_that_transformers_has_not_is_refused():
    with pytest.raises(WeightsError, match=r"the nearest, gemma2, lacks llm.norm = rms\."):
        values = {
            "norm": "rms",
            "post_norms": True,
            "activation": "gelu_tanh",
            "embed_scale": 64.0,
            "attn_scale": 0.0625,
        }
        describe_decoder(LLMConfig(**values))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "phi3"])
def test_gguf_equals_the_folder(name, tmp_path):
    """The same model as llama.cpp's converter writes it: its package's own names, Gemma's scales with 1 added."""
    gguf = pytest.importorskip("gguf")
    settings = FAMILIES[name][1] | {"rope_parameters": None, "use_sliding_window": False}
    theirs = made(name, settings | ({"partial_rotary_factor": 0.75} if name == "phi3" else {}))
    theirs.save_pretrained(tmp_path)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, SHAPE["num_hidden_layers"])
    tensors = {}
    for key, value in theirs.state_dict().items():
        if key != "lm_head.weight" or not theirs.config.tie_word_embeddings:
            value = value.numpy() + (name == "gemma2" and "norm" in key)
            stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
            tensors[stored] = (value.astype(np.float32), gguf.GGMLQuantizationType.F32)
    c = theirs.config
    head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    meta = {"context_length": 64, "embedding_length": c.hidden_size, "block_count": 3, "feed_forward_length": 37}
    meta |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads}
    meta |= {"rope.dimension_count": 6 if name == "phi3" else head_dim, "attention.key_length": head_dim}
    meta |= {"attention.sliding_window": c.sliding_window} if c.sliding_window else {}
    floats = {"attention.layer_norm_rms_epsilon": c.rms_norm_eps}
    if name == "gemma2":
        floats |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    pairs = [("add_uint32", f"{name}.{key}", value) for key, value in meta.items()]
    pairs += [("add_float32", f"{name}.{key}", value) for key, value in floats.items()]
    write_gguf(tmp_path / "model.gguf", tensors, pairs, name)

    (_, found), (_, wanted) = config_from(tmp_path / "model.gguf"), config_from(tmp_path)
    scaled = {"norm": "rms", "attn_scale": 10**-0.5} if name == "gemma2" else {}  # the scalar 7 is ours alone
    assert found == dataclasses.replace(wanted, **scaled)
    ours, expected = import_part(tmp_path / "model.gguf", "llm"), import_part(tmp_path, "llm")
    expected = jax.tree_util.tree_map_with_path(
        lambda path, x: x + (name == "gemma2" and path[-1].key == "scale"), expected
    )
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    if name == "qwen3":
        return  # the same table as qwen2
    # The tensors as transformers reads them; of the settings it takes some for granted that the file has.
    config = theirs.config
    config.query_pre_attn_scalar = 10  # and the file lacks this one
    options = {"gguf_file": "model.gguf", "config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    tokens = np.arange(1, 13, dtype=np.int32)[None]
    logits = forward(ModelConfig(llm=found, dtype="float32", remat="none"), {"llm": ours}, tokens, np.ones_like(tokens))
    with torch.no_grad():
        wanted = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    error = np.abs(logits - wanted).max() / np.abs(wanted).max()
    record_parity({"qwen2": "gguf_qwen", "gemma2": "gguf_gemma", "phi3": "gguf_phi3"}[name], "llm", error)
    assert error <= 2e-5


# ------------------------------------------------------------------------------------------------- config.json as found

PHI3_LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
FOUND = {
    "Llama-3.1-8B": (
        {
            "model_type": "llama",
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {"rope_theta": 500000.0, "rope_scaling": RopeScalingConfig("llama3", 8.0), "num_kv_heads": 8},
    ),
    "Qwen2.5 with a window never used": (
        {"model_type": "qwen2", "num_hidden_layers": 28, "max_window_layers": 28, "sliding_window": 131072},
        {"qkv_bias": True, "sliding_window": None, "full_layers": ()},
    ),
    "Qwen2.5 as its card says to stretch it": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        {
            "rope_scaling": RopeScalingConfig(
                "yarn", 4.0, original_max_positions=32768, attention_factor=0.1 * math.log(4) + 1
            )
        },
    ),
    "Gemma 2B": (
        {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_key_value_heads": 1}
        | {"hidden_act": "gelu", "num_attention_heads": 8, "intermediate_size": 16384},
        {"norm": "rms_plus_one", "post_norms": False, "activation": "gelu_tanh", "embed_scale": 2048**0.5}
        | {"tie_embeddings": True, "head_dim": 256, "attn_scale": None, "sliding_window": None},
    ),
    "Phi-3-mini-128k of the first weeks": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262144,
            "rope_scaling": {"type": "su"} | PHI3_LONG,
        },
        {
            "sliding_window": 262144,
            "rope_scaling": RopeScalingConfig(
                "longrope",
                original_max_positions=4096,
                short_factor=(1.0,) * 48,
                long_factor=(2.0,) * 48,
                attention_factor=(1 + 5 / 12) ** 0.5,  # log 32 / log 4096
            ),
        },
    ),
    "Phi-2": (
        {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "partial_rotary_factor": 0.4},
        {"head_dim": 80, "rope_fraction": 0.4, "parallel": True, "head_bias": True, "activation": "gelu_tanh"},
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 8,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"sliding_window": 512, "full_layers": (5,), "rope_theta": 1e6, "rope_local_theta": 1e4, "embed_scale": 48.0},
    ),
    "Gemma 3 4B's rotary scaling": (
        {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_scaling": RopeScalingConfig("linear", 8.0), "rope_local_theta": 1e4},
    ),
    "OPT-2.7B": (
        {"model_type": "opt", "hidden_size": 2560, "num_attention_heads": 32, "ffn_dim": 10240},
        {"norm": "layer", "learned_positions": True, "gated": False, "activation": "relu", "tie_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_configs_as_the_hub_has_them(name, tmp_path):
    given, wanted = FOUND[name]
    (tmp_path / "config.json").write_text(json.dumps(given))
    found = config_from(tmp_path)[1]
    assert isinstance(found, LLMConfig)
    for field, value in wanted.items():
        assert getattr(found, field) == (pytest.approx(value) if isinstance(value, float) else value), field


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "llama3", "factor": 2.0}},
            "'llama3' lacks 'low_freq_factor'",
        ),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4, "mscale": 2}}, "'yarn' with mscale"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn"}}, "'yarn' lacks 'factor'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", **LONGROPE}}, "3 short and 3 long factors for 72"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"]}, "layer_types 'chunked'"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "1 layer_types for 32",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm = True"),
        ({"model_type": "phi", "tie_word_embeddings": True}, "tie_word_embeddings with a bias"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, "embeddings narrower than the layers"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before = False"),
    ],
)
def test_what_is_not_supported_is_named(given, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(WeightsError, match=message):
        config_from(tmp_path)
