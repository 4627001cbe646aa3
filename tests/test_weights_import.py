"""Imports of tiny random checkpoints that transformers saves: every leaf, every naming, every complaint."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parity_log import record_parity
from test_decoder_families import forward
from weights_helpers import TEXT, saver, write_gguf

from jaxvlm.config import LoRAConfig, ModelConfig, VisionConfig
from jaxvlm.models.vlm import abstract_params
from jaxvlm.weights import ImportReport, WeightsError, config_from, import_model, import_part, prompt_from

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return saver(tmp_path_factory)


def expected_vit(w, prefix, names, heads, layers):
    """Our tree, written out by hand from torch's conventions."""
    q, k, v, o, norm1, norm2, up, down = names
    width = w[f"{prefix}0.{q}.weight"].shape[0]

    def stack(name, f=lambda x: x):
        return np.stack([f(w[f"{prefix}{i}.{name}"]) for i in range(layers)])

    out = {}
    for ours, theirs in (("q", q), ("k", k), ("v", v)):
        out[f"layers/attn/{ours}/kernel"] = stack(f"{theirs}.weight", lambda x: x.T.reshape(width, heads, -1))
        out[f"layers/attn/{ours}/bias"] = stack(f"{theirs}.bias", lambda x: x.reshape(heads, -1))
    out["layers/attn/o/kernel"] = stack(f"{o}.weight", lambda x: x.T.reshape(heads, -1, width))
    out["layers/attn/o/bias"] = stack(f"{o}.bias")
    for ours, theirs in (("up", up), ("down", down)):
        out[f"layers/mlp/{ours}/kernel"] = stack(f"{theirs}.weight", np.transpose)
        out[f"layers/mlp/{ours}/bias"] = stack(f"{theirs}.bias")
    for ours, theirs in (("norm1", norm1), ("norm2", norm2)):
        out[f"layers/{ours}/scale"] = stack(f"{theirs}.weight")
        out[f"layers/{ours}/bias"] = stack(f"{theirs}.bias")
    return out


CLIP_NAMES = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + [
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
]
DINO_NAMES = [f"attention.attention.{n}" for n in ("query", "key", "value")]
DINO_NAMES += ["attention.output.dense", "norm1", "norm2", "mlp.fc1", "mlp.fc2"]


def expected(kind, w):
    if kind in ("clip", "clip_both", "siglip"):
        w = {name.removeprefix("vision_model."): value for name, value in w.items()}
        out = expected_vit(w, "encoder.layers.", CLIP_NAMES, 4, 2)
        out["patch_embed/kernel"] = w["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
        out["pos_embed"] = w["embeddings.position_embedding.weight"]
        if kind == "siglip":
            return out | {"patch_embed/bias": w["embeddings.patch_embedding.bias"]}
        out |= {"pre_norm/scale": w["pre_layrnorm.weight"], "pre_norm/bias": w["pre_layrnorm.bias"]}
        return out | {"class_token": w["embeddings.class_embedding"]}
    if kind.startswith("dinov2"):
        out = expected_vit(w, "encoder.layer.", DINO_NAMES, 4, 2)
        for n in ("1", "2"):
            name = f"layer_scale{n}.lambda1"
            out[f"layers/scale{n}"] = np.stack([w[f"encoder.layer.{i}.{name}"] for i in range(2)])
        out["patch_embed/kernel"] = w["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
        out["patch_embed/bias"] = w["embeddings.patch_embeddings.projection.bias"]
        out |= {"pos_embed": w["embeddings.position_embeddings"][0], "class_token": w["embeddings.cls_token"][0, 0]}
        if kind == "dinov2_registers":
            out["register_tokens"] = w["embeddings.register_tokens"][0]
        return out

    def stack(name, f=lambda x: x):
        return np.stack([f(w[f"model.layers.{i}.{name}.weight"]) for i in range(2)])

    out = {"embed/embedding": w["model.embed_tokens.weight"], "final_norm/scale": w["model.norm.weight"]}
    for n, heads in (("q", 4), ("k", 2), ("v", 2)):
        out[f"layers/attn/{n}/kernel"] = stack(f"self_attn.{n}_proj", lambda x, h=heads: x.T.reshape(32, h, -1))
        if kind == "qwen2":
            biases = [w[f"model.layers.{i}.self_attn.{n}_proj.bias"].reshape(heads, -1) for i in range(2)]
            out[f"layers/attn/{n}/bias"] = np.stack(biases)
    out["layers/attn/o/kernel"] = stack("self_attn.o_proj", lambda x: x.T.reshape(4, -1, 32))
    for n in ("gate", "up", "down"):
        out[f"layers/mlp/{n}/kernel"] = stack(f"mlp.{n}_proj", np.transpose)
    out["layers/attn_norm/scale"] = stack("input_layernorm")
    out["layers/mlp_norm/scale"] = stack("post_attention_layernorm")
    return out if kind == "qwen2" else out | {"head/kernel": w["lm_head.weight"].T}


def assert_trees_equal(got, wanted):
    got, wanted = flatten_dict(got, sep="/"), wanted if "/" in next(iter(wanted)) else flatten_dict(wanted, sep="/")
    assert sorted(got) == sorted(wanted)
    for path, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)


def as_model(part, config):
    model = config if part == "model" else dataclasses.replace(ModelConfig(), **{part: config})
    return abstract_params(model)[part] if part != "model" else abstract_params(model)


KINDS = ["clip", "clip_both", "siglip", "dinov2", "dinov2_registers", "llama", "llama_head_dim", "mistral", "qwen2"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_equals_torch(saved, kind):
    folder, weights = saved(kind)
    part, config = config_from(folder)
    report = ImportReport()
    params = import_part(folder, part, config, report=report)
    assert_trees_equal(params, expected(kind, weights))
    shapes = jax.tree.map(lambda leaf: leaf.shape, as_model(part, config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert {name for name, *_ in report.mapped} | {name for name, _ in report.unused} == set(weights)
    assert f"{len(report.mapped)} tensors" in str(report)


def test_feature_norm_and_last_layer(saved):
    folder, weights = saved("siglip")
    config = dataclasses.replace(config_from(folder)[1], feature_layers=(-1,), feature_norm=True)
    params = import_part(folder, "vision", config)
    assert params["layers"]["norm1"]["scale"].shape == (3, 24)
    np.testing.assert_array_equal(params["post_norm"]["bias"], weights["post_layernorm.bias"])


def test_dtype_by_path(saved):
    params = import_part(saved("llama")[0], "llm", dtype=lambda path: jnp.float32 if "norm" in path else jnp.bfloat16)
    assert params["final_norm"]["scale"].dtype == jnp.float32
    assert params["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------------- LLaVA


def eras(name):
    """One tensor's names over the years (recipes §3.2), from the name of transformers 5.23 on disk."""
    tower = name.replace("vision_tower.", "vision_tower.vision_model.")
    head = name == "language_model.lm_head.weight"
    inner = name.replace("language_model.model.", "language_model.")
    return {
        "saved by 5.23": name,
        "hub": tower,
        "4.52": "lm_head.weight" if head else "model." + inner.replace("vision_tower.", "vision_tower.vision_model."),
        "5.6 in memory": "lm_head.weight" if head else f"model.{inner}",
    }


@pytest.mark.parametrize("kind", ["llava", "llava_siglip"])
@pytest.mark.parametrize("era", ["saved by 5.23", "hub", "4.52", "5.6 in memory"])
def test_llava_under_every_naming(saved, tmp_path, kind, era):
    from safetensors.numpy import load_file, save_file

    folder, _ = saved(kind)
    tensors = load_file(folder / "model.safetensors")
    save_file({eras(name)[era]: value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    report = ImportReport()
    config, params = import_model(tmp_path, report=report)
    assert len(report.mapped) + len(report.unused) == len(tensors)
    tower = {n.removeprefix("vision_tower."): v for n, v in tensors.items() if n.startswith("vision_tower.")}
    assert_trees_equal(params["vision"], expected("siglip" if kind == "llava_siglip" else "clip", tower))
    text = {n.removeprefix("language_model."): v for n, v in tensors.items() if n.startswith("language_model.")}
    llm = expected("qwen2" if kind == "llava_siglip" else "llama", text)
    assert_trees_equal(params["llm"], llm | {"head/kernel": text["lm_head.weight"].T})
    np.testing.assert_array_equal(
        params["connector"]["linear_1"]["kernel"], tensors["multi_modal_projector.linear_1.weight"].T
    )
    wanted = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted


def test_llava_by_parts(saved, tmp_path):
    folder, _ = saved("llava")
    config, params = import_model(folder)
    for part in ("vision", "connector", "llm"):
        assert_trees_equal(import_part(folder, part, config), params[part])
    linear = params["connector"]
    state = {f"model.mm_projector.{n}.weight": torch.tensor(np.asarray(linear[m]["kernel"]).T.copy()) for n, m in NAMES}
    state |= {f"model.mm_projector.{n}.bias": torch.tensor(np.asarray(linear[m]["bias"])) for n, m in NAMES}
    torch.save(state, tmp_path / "mm_projector.bin")
    assert_trees_equal(import_part(tmp_path / "mm_projector.bin", "connector", config), linear)


NAMES = (("0", "linear_1"), ("2", "linear_2"))


def test_defaults_left_out_of_config_json(tmp_path):
    config = {
        "model_type": "llava",
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
        },
        "rope_scaling": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    part, model = config_from(tmp_path)
    assert part == "model" and model.vision == VisionConfig()  # CLIP ViT-L/14 at 336
    assert (model.llm.width, model.llm.mlp_dim, model.llm.vocab_size, model.llm.num_kv_heads) == (
        4096,
        11008,
        32064,
        32,
    )
    theirs = transformers.LlavaConfig.from_pretrained(tmp_path)
    assert theirs.vision_config.num_hidden_layers == 24 and theirs.text_config.head_dim == model.llm.head_dim


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"])
def test_our_defaults_are_transformers_defaults_vision(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / "full")
    assert config_from(tmp_path) == config_from(tmp_path / "full")


DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt"]


@pytest.mark.parametrize("kind", DECODERS)
def test_our_defaults_are_transformers_defaults_text(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / "full")
    assert config_from(tmp_path) == config_from(tmp_path / "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "RoPE scaling of type 'dynamic'"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, "neither a folder nor one that jaxvlm knows"),
        (
            {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}, "text_config": TEXT},
            "drops the first token",
        ),
    ],
)
def test_configs_that_cannot_be_served(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | change))
    with pytest.raises(WeightsError, match=message):
        config_from(tmp_path)


def test_prompt_of_a_llava_hf_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    for values, transform in (
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}, "crop"),
        ({"do_pad": True}, "letterbox"),
        ({"image_processor_type": "SiglipImageProcessor"}, "naive"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        assert prompt_from(tmp_path).transform == transform


# ------------------------------------------------------------------------------------------------------- strictness


def test_every_missing_and_unknown_name_is_listed(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, _ = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_projj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.image_newline"] = tensors.pop("model.norm.weight")
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"][:40]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError) as error:
        import_part(tmp_path, "llm")
    text = str(error.value)
    assert "Missing from the file, 2:" in text and "In the file but unknown, 3:" in text
    assert (
        "layers.1.mlp.up_proj.weight, for llm/layers/mlp/up/kernel (nearest: model.layers.1.mlp.up_projj.weight)"
        in text
    )
    assert "model.layers.1.mlp.up_projj.weight (nearest: layers.1.mlp.up_proj.weight)" in text
    assert "model.layers.0.mlp.gate_proj.weight is [40, 32], llm/layers/mlp/gate/kernel needs [48, 32]" in text


def test_config_of_another_model(saved):
    folder, _ = saved("llama")
    config = dataclasses.replace(config_from(folder)[1], rope_theta=1e5, tie_embeddings=True)
    with pytest.raises(WeightsError, match=r"llm.rope_theta is 100000.0, the checkpoint's is 10000.0"):
        import_part(folder, "llm", config)
    with pytest.raises(WeightsError, match="holds a 'llm' part, not 'vision'"):
        import_part(folder, "vision")
    with pytest.raises(WeightsError, match="holds a language model alone .* not a whole model"):
        import_model(folder)


def test_adapters_are_reported_as_initialised(saved):
    folder, _ = saved("llama")
    report = ImportReport()
    config = dataclasses.replace(config_from(folder)[1], lora=LoRAConfig(rank=2, targets=("q", "v")))
    import_part(folder, "llm", config, report=report)
    assert report.initialised and "llm/layers/*/{q, v}/lora_*" in str(report)


# --------------------------------------------------------------------------------------------------- GGUF and .pth


def test_gguf_llama(saved, tmp_path):
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    heads, kv_heads, width, mlp, depth, vocab, head = 4, 2, 32, 64, 2, 96, 8
    hf = {}
    for i in range(depth):
        hf |= {f"blk.{i}.attn_q": (heads * head, width), f"blk.{i}.attn_k": (kv_heads * head, width)}
        hf |= {f"blk.{i}.attn_v": (kv_heads * head, width), f"blk.{i}.attn_output": (width, heads * head)}
        hf |= {f"blk.{i}.ffn_gate": (mlp, width), f"blk.{i}.ffn_up": (mlp, width), f"blk.{i}.ffn_down": (width, mlp)}
    hf = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hf.items()}

    def permute(w, n):  # what llama.cpp's converter does to the rows of q and k
        return w.reshape(n, 2, head // 2, width).swapaxes(1, 2).reshape(w.shape)

    stored = {
        name: permute(w, heads) if "attn_q" in name else permute(w, kv_heads) if "attn_k" in name else w
        for name, w in hf.items()
    }
    tensors = {f"{name}.weight": (w, kinds.Q4_1) for name, w in stored.items()}
    tensors["token_embd.weight"] = (rng.normal(size=(vocab, width)).astype(np.float32), kinds.Q8_0)
    ones = [f"blk.{i}.{n}_norm" for i in range(depth) for n in ("attn", "ffn")] + ["output_norm"]
    tensors |= {f"{name}.weight": (rng.normal(size=width).astype(np.float32), kinds.F32) for name in ones}
    meta = {"context_length": 128, "embedding_length": width, "block_count": depth, "feed_forward_length": mlp}
    meta |= {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "rope.dimension_count": head}
    pairs = [("add_uint32", f"llama.{key}", value) for key, value in meta.items()]
    pairs += [
        ("add_float32", "llama.attention.layer_norm_rms_epsilon", 1e-5),
        ("add_float32", "llama.rope.freq_base", 1e5),
    ]
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, pairs)

    part, config = config_from(path)
    assert (part, config.tie_embeddings, config.rope_theta, config.norm_eps) == ("llm", True, 1e5, 1e-5)
    params = import_part(tmp_path, "llm", config)
    dequantised = lambda w, kind: gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)  # noqa: E731
    for i in range(depth):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["layers"])
        unpermuted = dequantised(stored[f"blk.{i}.attn_q"], kinds.Q4_1)
        unpermuted = unpermuted.reshape(heads, head // 2, 2, width).swapaxes(1, 2).reshape(-1, width)
        np.testing.assert_array_equal(layer["attn"]["q"]["kernel"], unpermuted.T.reshape(width, heads, head))
        np.testing.assert_allclose(
            layer["attn"]["k"]["kernel"], hf[f"blk.{i}.attn_k"].T.reshape(width, kv_heads, head), atol=0.3
        )
        down = dequantised(hf[f"blk.{i}.ffn_down"], kinds.Q4_1).T
        np.testing.assert_array_equal(layer["mlp"]["down"]["kernel"], down)
    embedding = dequantised(tensors["token_embd.weight"][0], kinds.Q8_0)
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)
    shapes = jax.tree.map(lambda leaf: leaf.shape, as_model("llm", config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes

    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = np.arange(1, 13, dtype=np.int32)[None]
    model = ModelConfig(llm=config, dtype="float32", remat="none")
    logits = forward(model, {"llm": params}, tokens, np.ones_like(tokens))
    with torch.no_grad():
        wanted = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    error = np.abs(logits - wanted).max() / np.abs(wanted).max()
    record_parity("gguf_llama", "llm", error)
    assert error <= 2e-5


def efficientnet_state():
    """A state dict with the names and shapes of EfficientNet-Lite0's file (assets §2), random values."""
    from jaxvlm.models.convnet import HEAD_WIDTH, STAGES, STEM_WIDTH

    state = {}

    def add(conv, norm, shape):
        state[f"{conv}.weight"] = torch.randn(*shape)
        for name in ("weight", "bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(shape[0])
        state[f"{norm}.running_var"] = torch.rand(shape[0]) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", (STEM_WIDTH, 3, 3, 3))
    width, i = STEM_WIDTH, 0
    for blocks, kernel, _, expand, out in STAGES:
        for _ in range(blocks):
            inner = width * expand
            if expand > 1:
                add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", (inner, width, 1, 1))
            add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", (inner, 1, kernel, kernel))
            add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", (out, inner, 1, 1))
            width, i = out, i + 1
    add("_conv_head", "_bn1", (HEAD_WIDTH, width, 1, 1))
    return state | {"_fc.weight": torch.randn(10, HEAD_WIDTH), "_fc.bias": torch.randn(10)}


def test_efficientnet_with_batch_norm_folded(tmp_path):
    state = efficientnet_state()
    path = tmp_path / "efficientnet.pth"
    torch.save(state, path)
    part, config = config_from(path)
    assert part == "vision" and config.kind == "efficientnet_lite" and config.width == 1280
    params = import_part(path, "vision", dataclasses.replace(config, image_size=128, depth=24))
    shapes = jax.tree.map(lambda leaf: leaf.shape, as_model("vision", config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    x = torch.randn(1, state["_blocks.3._expand_conv.weight"].shape[1], 4, 4)
    wanted = torch.nn.functional.conv2d(x, state["_blocks.3._expand_conv.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    wanted = torch.nn.functional.batch_norm(wanted, *(state[f"_blocks.3._bn0.{n}"] for n in names), eps=1e-3)
    folded = params["blocks_3"]["expand"]
    got = jnp.einsum("bchw,cd->bhwd", x.numpy(), folded["kernel"][0, 0]) + folded["bias"]
    np.testing.assert_allclose(got, wanted.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- sharded

SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxvlm.weights import import_model, import_part
from jaxvlm.weights.safetensors_file import SafetensorsFile
folder = sys.argv[1]
config, whole = import_model(folder)
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def place(path, leaf):  # the largest axes that divide, as different from the file's layout as possible
    names = [k.key for k in path]
    spec = [None] * leaf.ndim
    for axis, name in zip(sorted(range(leaf.ndim), key=lambda a: -leaf.shape[a]), ("tensor", "fsdp")):
        spec[axis] = name if leaf.shape[axis] % 2 == 0 else None
    return NamedSharding(mesh, P(*spec))
shardings = jax.tree_util.tree_map_with_path(place, whole)
reads = []
real = SafetensorsFile.read
def counted(self, name, index=()):
    value = real(self, name, index)
    reads.append((name, value.size / np.prod(self.shape(name))))
    return value
SafetensorsFile.read = counted
_, sharded = import_model(folder, shardings=shardings)
assert any(share < 0.6 for name, share in reads if name.endswith("gate_proj.weight")), reads
for (path, a), b, s in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(sharded), jax.tree.leaves(shardings)):
    assert b.sharding == s, path
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
llm = import_part(folder, "llm", config, shardings=shardings["llm"], dtype="bfloat16")
assert llm["head"]["kernel"].dtype == "bfloat16" and len(llm["head"]["kernel"].addressable_shards) == 4
print("equal")
"""


def test_sharded_import_equals_the_whole_one(saved):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(saved("llava")[0])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
