"""Every tower and decoder that LLaVA's classes in transformers compute: exported, loaded there, and imported again."""

import dataclasses
import json

import hf_copy
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parity_log import record_parity
from weights_helpers import tokenizer_folder

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, RopeScalingConfig, VisionConfig
from jaxvlm.data.tiles import image_plan, tiling
from jaxvlm.main import main
from jaxvlm.models.vlm import VLM
from jaxvlm.weights import export, import_model, load_any
from jaxvlm.weights.saved import save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIDE, CELLS, IMAGE = 28, 4, 3  # pixels of a tile, patches on its side, the tokenizer's <image>

CLIP = VisionConfig(image_size=SIDE, patch_size=7, width=24, depth=3, num_heads=4, mlp_dim=40)
SIGLIP = dataclasses.replace(CLIP, class_token=False, patch_bias=True, pre_norm=False, activation="gelu_tanh")
SIGLIP = dataclasses.replace(SIGLIP, norm_eps=1e-6, mean=(0.5,) * 3, std=(0.5,) * 3)
DINO = dataclasses.replace(CLIP, patch_bias=True, pre_norm=False, layer_scale=True, activation="gelu_erf", mlp_dim=96)
DINO = dataclasses.replace(DINO, norm_eps=1e-6, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

LLAMA = LLMConfig(vocab_size=64, width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
LLAMA = dataclasses.replace(LLAMA, norm_eps=1e-6, max_positions=256)


def decoder(**changes):
    return dataclasses.replace(LLAMA, **changes)


GEMMA = {"norm": "rms_plus_one", "post_norms": True, "activation": "gelu_tanh", "tie_embeddings": True}
GEMMA |= {"embed_scale": 32**0.5, "attn_scale": 0.25, "qk_norm": True, "rope_local_theta": 5000.0}
GEMMA |= {"sliding_window": 6, "full_layers": (1,)}
SCALING = RopeScalingConfig("llama3", 4.0, 1.0, 2.0, 16)
OPT = {"norm": "layer", "norm_eps": 1e-5, "activation": "relu", "gated": False, "learned_positions": True}
OPT |= {"num_kv_heads": 4, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
CASES = {
    "llama3, clip": (CLIP, decoder(rope_scaling=SCALING, num_kv_heads=1)),
    "smollm, siglip": (SIGLIP, decoder(tie_embeddings=True)),
    "mistral, dinov2": (DINO, decoder(sliding_window=8)),
    "qwen2, clip cls": (dataclasses.replace(CLIP, feature_tokens="cls_patch"), decoder(qkv_bias=True)),
    "qwen3, clip layers": (
        dataclasses.replace(CLIP, feature_layers=(-2, -1)),
        decoder(qk_norm=True, head_dim=16, tie_embeddings=True),
    ),
    "gemma3, siglip": (SIGLIP, decoder(**GEMMA)),
    "opt, clip": (CLIP, decoder(**OPT)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def ours(model, params, tokens, index, pixels):
    """float32 logits [S, V] of one row."""
    length = len(tokens)
    batch = {"tokens": tokens[None], "visual_index": index[None], "pixels": pixels[None]}
    batch |= {"positions": np.arange(length)[None], "segment_ids": np.ones((1, length), np.int32)}
    run = jax.jit(lambda p, b: VLM(model).apply({"params": p}, b, method=lambda m, b: m.logits(m(b))))
    return np.asarray(run(params, batch))[0]


def theirs(folder, tokens, index, pixels, vision, **more):
    model, info = getattr(transformers, more.pop("name", "LlavaForConditionalGeneration")).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    normalised = (pixels / 255 - np.array(vision.mean)) / np.array(vision.std)
    values = torch.tensor(normalised.transpose(0, 3, 1, 2)).float()
    ids = torch.tensor(np.where(index == -1, tokens, IMAGE)[None]).long()
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=values, **more).logits[0]


def assert_same(a, b):
    a, b = (flatten_dict(tree, sep="/") for tree in (a, b))
    assert sorted(a) == sorted(b)
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def check(error, name):
    assert error <= 2e-5
    record_parity(name, "export", error)


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_is_exported(tokenizer, tmp_path, name):
    vision, llm = CASES[name]
    model = ModelConfig(vision=vision, connector=ConnectorConfig(), llm=llm, dtype="float32", remat="none")
    params = hf_copy.random_params(model)
    out = export(params, model, PromptConfig(tokenizer, transform="letterbox"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    expected = {"llama3": "llama", "smollm": "llama", "gemma3": "gemma3_text"}
    assert config["text_config"]["model_type"] == expected.get(name.split(",")[0], name.split(",")[0])
    again, back = import_model(out)
    assert dataclasses.replace(again, dtype="float32", remat="none") == model
    assert_same(back, params)

    count, rng = vision.num_tokens, np.random.default_rng(0)
    tokens = np.array([1, 5, *[0] * count, 7, 8, 9, 10], np.int32)
    index = np.where(
        (np.arange(len(tokens)) >= 2) & (np.arange(len(tokens)) < 2 + count), np.arange(len(tokens)) - 2, -1
    )
    pixels = rng.integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
    want = theirs(out, tokens, index, pixels, vision).numpy()
    got = ours(model, params, tokens, index.astype(np.int32), pixels)
    check(np.abs(got - want).max() / np.abs(want).max(), name)


def next_model():
    model = ModelConfig(vision=CLIP, connector=ConnectorConfig(row_end=True), llm=LLAMA, dtype="float32", remat="none")
    return model, hf_copy.random_params(model)


def test_llava_next(tokenizer, tmp_path):
    """Tiles, row ends and pinpoints, through the command line; transformers sees the same tokens and computes the same."""
    model, params = next_model()
    prompt = PromptConfig(tokenizer, "vicuna_v1", "anyres", grids=((1, 2), (2, 1), (2, 2)))
    save_model(tmp_path / "run" / "model", params, model, prompt, {})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "llava-next-hf"]) == 0
    config, again, back = load_any(tmp_path / "out")
    assert dataclasses.replace(config, dtype="float32", remat="none") == model
    assert (again.transform, again.grids, again.template) == ("anyres", prompt.grids, "vicuna_v1")
    assert_same(back, params)

    processor = transformers.LlavaNextProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.default_rng(1).integers(0, 256, (50, 28, 3)).astype(np.uint8)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    batch = processor(text=text, images=[picture], return_tensors="pt")
    plan = image_plan(tiling(model, prompt), 28, 50)
    ids = batch["input_ids"][0].numpy()
    assert (ids == IMAGE).sum() == len(plan.index)  # transformers counts the same visual tokens
    index = np.full(len(ids), -1, np.int32)
    index[ids == IMAGE] = plan.index
    pixels = batch["pixel_values"][0].numpy().transpose(0, 2, 3, 1)
    pixels = np.round((pixels * np.array(CLIP.std) + np.array(CLIP.mean)) * 255).clip(0, 255).astype(np.uint8)
    name = "LlavaNextForConditionalGeneration"
    want = theirs(tmp_path / "out", ids, index, pixels, CLIP, name=name, image_sizes=batch["image_sizes"]).numpy()
    got = ours(model, params, ids.astype(np.int32), index, pixels)
    check(np.abs(got - want).max() / np.abs(want).max(), "llava-next-hf")


OWN_KEYS = ("model.mm_projector.0.weight", "model.mm_projector.2.bias", "model.embed_tokens.weight", "lm_head.weight")
OWN_KEYS += ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.norm.weight")
TOWER_KEYS = ("pre_layrnorm.bias", "encoder.layers.2.mlp.fc1.weight", "embeddings.class_embedding")


@pytest.mark.parametrize("kind", ["v1", "v1.5", "v1.6"])
def test_llava_in_its_own_form(tokenizer, tmp_path, kind):
    from safetensors.numpy import load_file

    connector = {"v1": ConnectorConfig("linear"), "v1.5": ConnectorConfig(), "v1.6": ConnectorConfig(row_end=True)}[
        kind
    ]
    model = ModelConfig(vision=CLIP, connector=connector, llm=LLAMA)
    params = hf_copy.random_params(model)
    transform = {"v1": "crop", "v1.5": "letterbox", "v1.6": "anyres"}[kind]
    prompt = PromptConfig(tokenizer, transform=transform, grids=((1, 2), (3, 1)) if kind == "v1.6" else ())
    out = export(params, model, prompt, tmp_path / "out", "llava-original")
    names = set(load_file(out / "model.safetensors"))
    wanted = set(OWN_KEYS) | {f"model.vision_tower.vision_tower.vision_model.{key}" for key in TOWER_KEYS}
    if kind == "v1":
        wanted = {key for key in wanted if "mm_projector" not in key} | {"model.mm_projector.weight"}
    wanted |= {"model.image_newline"} if kind == "v1.6" else set()
    assert wanted <= names and all(name.startswith(("model.", "lm_head.")) for name in names)
    config = json.loads((out / "config.json").read_text())
    assert config["mm_projector_type"] == connector.kind and config["architectures"] == ["LlavaLlamaForCausalLM"]
    aspect = {"v1": "square", "v1.5": "pad", "v1.6": "anyres"}[kind]
    assert (config["image_aspect_ratio"], config["mm_hidden_size"]) == (aspect, 24)
    assert kind != "v1.6" or config["image_grid_pinpoints"] == [[56, 28], [28, 84]]  # (width, height)
    found, again, back = load_any(out)
    assert found == model and (again.transform, again.grids) == (transform, prompt.grids)
    assert_same(back, params)
