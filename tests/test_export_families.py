"""Every tower and decoder that LLaVA's classes in transformers compute: exported, loaded there, and imported again."""

import dataclasses
import json

import hf_copy
import numpy as np
import pytest
from model_helpers import assert_same, inputs, logits, relative_error
from parity_log import record_parity
from safetensors.numpy import load_file
from weights_helpers import tokenizer_folder

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, RopeScalingConfig, VisionConfig
from jaxvlm.data.tiles import image_plan, tiling
from jaxvlm.infer import decoding
from jaxvlm.infer.engine import load
from jaxvlm.main import main
from jaxvlm.weights import export, load_any
from jaxvlm.weights.families import known
from jaxvlm.weights.families.hf_towers import describe_tower
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
LONGROPE = {
    "original_max_positions": 16,
    "short_factor": (1.0, 1.5),
    "long_factor": (2.0, 7.0),
    "attention_factor": 1.3,
}
PHI3 = {"rope_scaling": RopeScalingConfig("longrope", **LONGROPE), "rope_fraction": 0.5, "sliding_window": 9}
GEMMA2 = {key: GEMMA[key] for key in ("norm", "post_norms", "activation", "embed_scale", "attn_scale")}
GEMMA2 |= {"attn_softcap": 5.0, "sliding_window": 6, "full_layers": (1,)}
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
    "phi3, dinov2 swiglu": (dataclasses.replace(DINO, mlp="swiglu", mlp_dim=64), decoder(**PHI3)),
    "gemma2, clip gelu": (dataclasses.replace(CLIP, activation="gelu_erf"), decoder(**GEMMA2)),
}
CONNECTORS = {"phi3, dinov2 swiglu": ConnectorConfig(bias=False, activation="gelu_tanh")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def loaded(folder, name="LlavaForConditionalGeneration"):
    """transformers' model of a folder that has exactly its keys."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def check(error, name):
    assert error <= 2e-5
    record_parity(name, "export", error)


def a_request(text: str, images: int, seed: int) -> dict:
    pictures = np.random.default_rng(seed).integers(0, 256, (images, SIDE, SIDE, 3)).astype(np.uint8)
    return {"messages": [{"role": "user", "content": text}], "images": list(pictures)}


# Prompts of several lengths, with one image, two and none.
REQUESTS = (
    a_request("<image>\nw3 w4", 1, 0),
    a_request("<image> w5 w6 <image> w7 w8 w9 w10 w11", 2, 1),
    a_request("w12", 0, 2),
)
ANSWER = 12  # tokens: longer than any window above, and more than 16 positions from the prompt's start


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_is_exported(tokenizer, tmp_path, monkeypatch, name):
    """It loads without a missing key, and so do we; then the same logits, and the same greedy answers token for token."""
    vision, llm = CASES[name]
    model = ModelConfig(vision, CONNECTORS.get(name, ConnectorConfig()), llm, dtype="float32", remat="none")
    params = hf_copy.random_params(model)
    out = export(params, model, PromptConfig(tokenizer, transform="letterbox"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    expected = {"llama3": "llama", "smollm": "llama", "gemma3": "gemma3_text"}
    assert config["text_config"]["model_type"] == expected.get(name.split(",")[0], name.split(",")[0])
    ours, hf = load(out), loaded(out)
    assert ours.config == model
    assert_same(ours.params, params)

    def kept(*args):  # the logits of each prompt's last token, from which the answer starts
        logits, cache = prefill(*args)
        first.append(np.asarray(logits))
        return logits, cache

    prefill, first = decoding.prefill, []
    monkeypatch.setattr(decoding, "prefill", kept)
    prompts, errors = [ours._prompt(request, i) for i, request in enumerate(REQUESTS)], []
    answers = ours._answer(prompts, len(prompts), ANSWER, 0.0, 1.0, 0)
    for one, values, answer in zip(prompts, first[0], answers, strict=True):
        pixels = np.stack(one.images) if one.images else np.zeros((0, SIDE, SIDE, 3), np.uint8)
        fed = inputs(one.tokens, one.visual_index, pixels, vision, IMAGE)
        fed = fed if one.images else {key: value for key, value in fed.items() if key != "pixel_values"}
        ends = {"eos_token_id": list(ours.end_ids), "pad_token_id": 0}
        with torch.no_grad():
            errors.append(relative_error(values, hf(**fed).logits[0, -1]))
            written = hf.generate(**fed, do_sample=False, max_new_tokens=ANSWER, **ends)[0, len(one.tokens) :]
        assert answer == written.tolist()
    check(max(errors), name)


@pytest.mark.parametrize("vision", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_llava_next(tokenizer, tmp_path, vision):
    """Tiles, row ends and pinpoints, through the command line; transformers sees the same tokens and computes the same."""
    model = ModelConfig(vision, ConnectorConfig(row_end=True), LLAMA, dtype="float32", remat="none")
    params = hf_copy.random_params(model)
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
    pixels = np.round((pixels * np.array(vision.std) + np.array(vision.mean)) * 255).clip(0, 255).astype(np.uint8)
    hf = loaded(tmp_path / "out", "LlavaNextForConditionalGeneration")
    with torch.no_grad():
        want = hf(**inputs(ids, index, pixels, vision, IMAGE), image_sizes=batch["image_sizes"]).logits[0]
    check(relative_error(logits(model, params, ids.astype(np.int32), index, pixels), want), "llava-next-hf")


def own_table(kind: str, llm: LLMConfig, vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of LLaVA's own class but its tower's, with its shape, as its code builds them (recipes §3.1)."""
    width, inner = llm.width, vision.width
    heads, kv = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    table = {"model.embed_tokens.weight": (llm.vocab_size, width), "model.norm.weight": (width,)}
    table |= {"lm_head.weight": (llm.vocab_size, width)}
    for i in range(llm.depth):
        attention = {"q": (heads, width), "k": (kv, width), "v": (kv, width), "o": (width, heads)}
        mlp = {"gate": (llm.mlp_dim, width), "up": (llm.mlp_dim, width), "down": (width, llm.mlp_dim)}
        table |= {f"model.layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        table |= {f"model.layers.{i}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        table |= {f"model.layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    if kind == "v1":
        return table | {"model.mm_projector.weight": (width, inner), "model.mm_projector.bias": (width,)}
    for n, size in ((0, inner), (2, width)):  # 1 is the activation
        table |= {f"model.mm_projector.{n}.weight": (width, size), f"model.mm_projector.{n}.bias": (width,)}
    return table | ({"model.image_newline": (width,)} if kind == "v1.6" else {})


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize("kind", ["v1", "v1.5", "v1.6"])
def test_llava_in_its_own_form(tokenizer, tmp_path, monkeypatch, kind, on_the_hub):
    """LLaVA's code loads a tower by its name or from its folder, and then what the model's own tensors have of it."""
    rows = ConnectorConfig(row_end=True)
    connector = {"v1": ConnectorConfig("linear"), "v1.5": ConnectorConfig(), "v1.6": rows}[kind]
    model = ModelConfig(vision=CLIP, connector=connector, llm=LLAMA)
    params = hf_copy.random_params(model)
    transform = {"v1": "crop", "v1.5": "letterbox", "v1.6": "anyres"}[kind]
    prompt = PromptConfig(tokenizer, transform=transform, grids=((1, 2), (3, 1)) if kind == "v1.6" else ())
    if on_the_hub:
        monkeypatch.setitem(known.TOWERS, "openai/clip-tiny", describe_tower(CLIP)[1])
    out = export(params, model, prompt, tmp_path / "out", "llava-original")
    tensors, wanted = load_file(out / "model.safetensors"), own_table(kind, LLAMA, CLIP)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**describe_tower(CLIP)[1]))
    state = {f"vision_model.{name}": tuple(value.shape) for name, value in tower.state_dict().items()}
    if on_the_hub:
        wanted |= {f"model.vision_tower.vision_tower.{name}": shape for name, shape in state.items()}
    else:
        assert {n: v.shape for n, v in load_file(out / "vision_tower" / "model.safetensors").items()} == state
        transformers.CLIPVisionModel.from_pretrained(out / "vision_tower")
        transformers.CLIPImageProcessor.from_pretrained(out / "vision_tower")
    assert {name: value.shape for name, value in tensors.items()} == wanted
    config = json.loads((out / "config.json").read_text())
    assert config["mm_vision_tower"] == ("openai/clip-tiny" if on_the_hub else "vision_tower")
    assert config["unfreeze_mm_vision_tower"] is on_the_hub
    assert config["mm_projector_type"] == connector.kind and config["architectures"] == ["LlavaLlamaForCausalLM"]
    aspect = {"v1": "square", "v1.5": "pad", "v1.6": "anyres"}[kind]
    assert (config["image_aspect_ratio"], config["mm_hidden_size"]) == (aspect, 24)
    assert kind != "v1.6" or config["image_grid_pinpoints"] == [[56, 28], [28, 84]]  # (width, height)
    found, again, back = load_any(out)
    assert found == model and (again.transform, again.grids) == (transform, prompt.grids)
    assert_same(back, params)


def test_a_tower_of_another_normalisation_is_not_the_hubs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(known.TOWERS, "openai/clip-tiny", describe_tower(CLIP)[1])
    model = ModelConfig(vision=dataclasses.replace(CLIP, mean=(0.5,) * 3), llm=LLAMA)
    prompt = PromptConfig(tokenizer, transform="crop")
    out = export(hf_copy.random_params(model), model, prompt, tmp_path / "out", "llava-original")
    assert json.loads((out / "config.json").read_text())["mm_vision_tower"] == "vision_tower"
    assert load_any(out)[0].vision.mean == (0.5,) * 3
