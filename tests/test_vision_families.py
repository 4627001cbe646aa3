"""Every family of towers, imported from what transformers saves, or from timm's names, against transformers."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import assert_same
from parity_log import record_parity
from vision_helpers import SIZES, encode, error, images, normalised, states, tiny

from jaxvlm.models.vit import feature_states
from jaxvlm.weights import ImportReport, WeightsError, config_from, import_part
from jaxvlm.weights.families import open_clip, timm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402

MLP, DINO = {"intermediate_size": 28}, {"mlp_ratio": 2}
# family: (class, its settings, the name of its final norm, whether its positions are resampled without being asked)
FAMILIES = {
    "clip": ("CLIPVision", MLP, "post_layernorm", False),
    "clip-gelu": ("CLIPVision", MLP | {"hidden_act": "gelu"}, "post_layernorm", False),  # OpenCLIP's in HF form
    "siglip": ("SiglipVision", MLP, "post_layernorm", False),
    "dinov2": ("Dinov2", DINO, "layernorm", True),
    "dinov2-swiglu": ("Dinov2", DINO | {"use_swiglu_ffn": True}, "layernorm", True),
    "dinov2-registers": ("Dinov2WithRegisters", DINO | {"num_register_tokens": 3}, "layernorm", True),
    "vit": ("ViT", MLP, "layernorm", False),
    "eva-clip": ("Blip2Vision", MLP, "post_layernorm", False),
}


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_transformers(family, tmp_path):
    """Several layers, at the checkpoint's size; then the final norm, on a grid that positions are resampled to."""
    kind, settings, final_norm, resamples = FAMILIES[family]
    theirs = tiny(kind, **SIZES, **settings)
    part, config = config_from(save(theirs, tmp_path))
    assert part == "vision"
    prefix = config.class_token + config.num_registers

    def tokens(x, c):
        return torch.cat([x[:, :1], x[:, prefix:]], 1) if c.feature_tokens == "cls_patch" else x[:, prefix:]

    chosen = "cls_patch" if config.class_token else "patch"
    several = replace(config, feature_layers=(-1, 1, -2), feature_norm=False, feature_tokens=chosen)
    pixels = images(28)
    hidden = states(theirs, normalised(pixels, config))
    expected = torch.cat([tokens(hidden[layer], several) for layer in several.feature_layers], -1)
    errors = [error(encode(several, import_part(tmp_path, "vision", several), pixels), expected)]

    # A smaller grid where antialiasing is done, which shows only there.
    size = 21 if family == "dinov2-registers" else 42
    final = replace(config, image_size=size, feature_layers=(-1,), feature_norm=True, feature_tokens="patch")
    pixels = images(size, 1)
    hidden = states(theirs, normalised(pixels, config), **({} if resamples else {"interpolate_pos_encoding": True}))
    with torch.no_grad():
        expected = tokens(theirs.get_submodule(final_norm)(hidden[-1]), final)
    errors.append(error(encode(final, import_part(tmp_path, "vision", final), pixels), expected))
    record_parity(re.sub("-(gelu|swiglu)$", "", family), "vision", max(errors))
    assert max(errors) <= 2e-5, errors


def test_what_a_config_says(tmp_path):
    def configured(**values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return config_from(tmp_path)[1]

    # The giant's MLP: 2/3 of 4 * width, up to a multiple of 8.
    giant = configured(model_type="dinov2", hidden_size=1536, use_swiglu_ffn=True, num_attention_heads=24)
    assert (giant.mlp, giant.mlp_dim, giant.layer_scale) == ("swiglu", 4096, True)
    eva = configured(model_type="instructblip_vision_model")
    assert (eva.width, eva.depth, eva.num_tokens, eva.feature_norm) == (1408, 39, 257, True)
    assert feature_states(eva) == (39,)
    big = configured(model_type="clip", vision_config={"hidden_size": 1664, "patch_size": 14, "hidden_act": "gelu"})
    assert (big.width, big.activation, big.pre_norm) == (1664, "gelu_erf", True)
    siglip2 = configured(model_type="siglip", vision_config={"model_type": "siglip_vision_model", "image_size": 384})
    assert (siglip2.grid, siglip2.class_token) == (24, False)
    with pytest.raises(WeightsError, match="NaFlex"):
        configured(model_type="siglip2", vision_config={"model_type": "siglip2_vision_model"})
    with pytest.raises(WeightsError, match="qkv_bias = False"):
        configured(model_type="vit", qkv_bias=False)


# ------------------------------------------------------------------------------------------------------------ convnext

CONVNEXT = {"hidden_sizes": [8, 12, 10, 6], "depths": [1, 2, 1, 2], "image_size": 64}


def resized(grid, size):
    return torch.nn.functional.interpolate(grid, (size, size), mode="bilinear", align_corners=False)


def flat(grid):
    return grid.flatten(2).transpose(1, 2)  # [B, C, n, n] -> [B, n * n, C]


def test_convnext_equals_transformers(tmp_path):
    theirs = tiny("ConvNext", **CONVNEXT)
    part, config = config_from(save(theirs, tmp_path))
    assert (part, config.kind, config.grid, config.feature_width) == ("vision", "convnext", 2, 6)
    pixels = images(72)  # no whole number of the last stages' cells
    hidden = states(theirs, normalised(pixels, config))[1:]
    # Cambrian's tower: every stage on one grid that is none of theirs. Then the last stage but one alone.
    every = replace(config, image_size=72, feature_layers=(0, 1, 2, 3), resized_grid=5)
    one = replace(config, image_size=72, patch_size=16, feature_layers=(-2,))
    expected = [flat(torch.cat([resized(grid, 5) for grid in hidden], 1)), flat(hidden[2])]
    report = ImportReport()
    found = [encode(c, import_part(tmp_path, "vision", c, report=report), pixels) for c in (every, one)]
    worst = max(map(error, found, expected))
    record_parity("convnext", "vision", worst)
    assert worst <= 2e-5
    assert "stages after the selected features" in {why for _, why in report.unused}

    tensors = load_file(tmp_path / "model.safetensors")
    extra = "encoder.stages.0.layers.1.dwconv.bias"  # a block more than the config has
    save_file(tensors | {extra: tensors["encoder.stages.0.layers.0.dwconv.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"In the file but unknown, 1:\n  {re.escape(extra)}"):
        import_part(tmp_path, "vision", every)


# ---------------------------------------------------------------------------------------------------------------- timm

TIMM_NAMES = (
    (r"embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"embeddings\.(class_embedding|cls_token)$", "cls_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"(post_layernorm|^layernorm)\.", "norm."),
    (r"encoder\.layers?\.", "blocks."),
    (r"layer_norm(\d)\.", r"norm\1."),
    (r"(attention\.attention|self_attn)\.(q|k|v)(uery|ey|alue|_proj)\.", r"attn.\2."),
    (r"(attention\.output\.dense|self_attn\.out_proj)\.", "attn.proj."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.fc1."),
    (r"mlp\.weights_out\.", "mlp.fc2."),
)


def timm_tensors(folder):
    """A saved tower of transformers under timm's names, and as timm keeps it: q, k and v joined, tokens [1, 1, D]."""
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for pattern, change in TIMM_NAMES:
            name = re.sub(pattern, change, name)
        tensors[name] = value
    for name in [name for name in tensors if ".attn.q." in name]:
        three = [tensors.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        tensors[name.replace(".q.", ".qkv.")] = np.concatenate(three)
    tensors.pop("embeddings.mask_token", None)
    for name in ("cls_token", "pos_embed"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    if "reg_token" in tensors:  # the class token's position is part of it, and not in the table
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].copy()
    return tensors


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("vit_giant_patch7_reg4_dinov2", "Dinov2WithRegisters", DINO | {"use_swiglu_ffn": True}),
        ("vit_small_patch7_clip_quickgelu_28", "CLIPVision", {"intermediate_size": 48}),
        ("vit_small_patch7_siglip_28", "SiglipVision", {"intermediate_size": 48, "hidden_act": "gelu"}),
    ],
)
def test_timm_vits_equal_transformers(name, kind, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(timm._SIZES, "small", (24, 3, 3, 48))
    monkeypatch.setattr(timm, "_GIANT_DINOV2", (24, 3, 3, 32))
    theirs = tiny(kind, **SIZES, **settings)
    tensors = timm_tensors(save(theirs, tmp_path))
    processing = {"input_size": [3, 28, 28], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    open_clip = "siglip" in name
    if open_clip:  # as OpenCLIP keeps a tower of timm's
        tower = {"timm_model_name": name, "image_size": 28}
        given = {"model_cfg": {"vision_cfg": tower}, "preprocess_cfg": processing}
        tensors = {f"visual.trunk.{key}": value for key, value in tensors.items() if "head." not in key}
        tensors |= {"text.token_embedding.weight": np.ones((2, 2)), "logit_scale": np.ones(1)}
    else:
        given = {"architecture": name, "num_features": 24, "pretrained_cfg": processing}
    (tmp_path / "config.json").unlink()
    (tmp_path / ("open_clip_config.json" if open_clip else "config.json")).write_text(json.dumps(given))
    save_file(tensors, tmp_path / "model.safetensors")

    part, config = config_from(tmp_path)
    assert (part, config.mean, config.image_size, config.norm_eps) == (
        "vision",
        (0.4, 0.5, 0.6),
        28,
        theirs.config.layer_norm_eps,
    )
    pixels = images(28)
    hidden = states(theirs, normalised(pixels, config))[-2]
    worst = error(
        encode(config, import_part(tmp_path, "vision"), pixels), hidden[:, config.class_token + config.num_registers :]
    )
    record_parity("timm_vit", "vision", worst)
    assert worst <= 2e-5

    smaller = import_part(tmp_path, "vision", replace(config, image_size=21))["pos_embed"]
    table = torch.from_numpy(tensors["visual.trunk.pos_embed" if open_clip else "pos_embed"])
    in_table = int(config.class_token and not config.num_registers)
    grid = table[:, in_table:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", antialias=True, align_corners=False)
    assert error(smaller[config.class_token :], flat(grid)[0]) <= 2e-6
    first = table[0, :1].numpy() if in_table else np.zeros((int(config.class_token), 24))
    np.testing.assert_array_equal(smaller[: config.class_token], first)


OPEN_CLIP_NAMES = (
    (r"embeddings\.patch_embedding\.", "conv1."),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm\.", "ln_pre."),
    (r"post_layernorm\.", "ln_post."),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"layer_norm(\d)\.", r"ln_\1."),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1\.", "mlp.c_fc."),
    (r"mlp\.fc2\.", "mlp.c_proj."),
)


def open_clip_tensors(folder):
    """A saved CLIP tower of transformers under OpenCLIP's names, q, k and v joined, with a text tower beside it."""
    tensors, source = {}, load_file(folder / "model.safetensors")
    for name, value in source.items():
        for pattern, change in OPEN_CLIP_NAMES:
            name = re.sub(pattern, change, name.removeprefix("vision_model."))
        tensors[f"visual.{name}"] = value
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        three = [tensors.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tensors[name.replace("self_attn.q_proj.", "attn.in_proj_")] = np.concatenate(three)
    text = {"transformer.resblocks.0.ln_1.weight": np.ones(4), "token_embedding.weight": np.ones((3, 4))}
    return tensors | text | {"visual.proj": np.ones((24, 5)), "logit_scale": np.ones(1), "text_projection": np.ones(4)}


@pytest.mark.parametrize("quick", [False, True])
def test_open_clips_own_vits_equal_transformers(tmp_path, quick):
    """As CLIP bigG lies on the hub: in both forms, beside each other; and a training checkpoint alone."""
    mlp = {"intermediate_size": 59, "hidden_act": "quick_gelu" if quick else "gelu"}  # 24 * 2.4616
    theirs = tiny("CLIPVision", **SIZES, **mlp)
    tensors = open_clip_tensors(save(theirs, tmp_path / "hf"))
    vision = {"image_size": 28, "layers": 3, "width": 24, "head_width": 8, "mlp_ratio": 2.4616, "patch_size": 7}
    model = {"embed_dim": 5, "vision_cfg": vision, "text_cfg": {"width": 4, "layers": 1}} | (
        {"quick_gelu": True} if quick else {}
    )
    given = {"model_cfg": model, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(given))
    save_file(tensors, folder / "open_clip_model.safetensors")
    part, config = config_from(folder)
    assert (part, config.mean, config.num_heads, config.mlp_dim) == ("vision", (0.4, 0.5, 0.6), 3, 59)
    report = ImportReport()
    params, pixels = import_part(folder, "vision", report=report), images(28)
    worst = error(encode(config, params, pixels), states(theirs, normalised(pixels, config))[-2][:, 1:])
    record_parity("open_clip", "vision", worst)
    assert worst <= 2e-5
    assert {name for name, *_ in report.mapped} | {name for name, _ in report.unused} == set(tensors)

    state = {"state_dict": {f"module.{name}": torch.tensor(value) for name, value in tensors.items()}}
    torch.save(state | {"epoch": 3}, folder / "epoch_3.pt")
    (folder / "open_clip_model.safetensors").unlink()
    assert_same(import_part(folder, "vision"), params)

    for file in (tmp_path / "hf").iterdir():
        file.rename(folder / file.name)
    save_file(tensors, folder / "open_clip_model.safetensors")
    hf = config_from(folder)[1]
    assert replace(hf, mean=config.mean, std=config.std) == config
    assert_same(import_part(folder, "vision"), params)

    for change, what in (({"ls_init_value": 0.1}, "ls_init_value"), ({"layers": [3, 4, 6, 3]}, "a ResNet")):
        (folder / "config.json").unlink(missing_ok=True)
        changed = given | {"model_cfg": model | {"vision_cfg": vision | change}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(WeightsError, match=f"open_clip_config.json: .*{what}"):
            config_from(folder)


def test_clip_bigg_by_its_open_clip_config(tmp_path):
    vision = {"image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 1280, "vision_cfg": vision}})
    )
    config = config_from(tmp_path)[1]
    assert (config.num_heads, config.mlp_dim, config.depth, config.grid) == (16, 8192, 48, 16)
    assert config == replace(timm.timm_config("vit_gigantic_patch14_clip_224"), activation="gelu_erf")


def test_lavis_eva_equals_transformers(tmp_path, monkeypatch):
    """BLIP-2's tower as its authors keep it: no bias of the keys, one layer more than is run, the norm elsewhere."""
    monkeypatch.setattr(open_clip, "_HEAD_WIDTH", 8)
    theirs = tiny("Blip2Vision", **SIZES, **MLP)
    with torch.no_grad():
        for layer in theirs.encoder.layers:
            layer.self_attn.qkv.bias[24:48] = 0
    names = {r"embeddings\.patch_embedding": "patch_embed.proj", r"embeddings\.class_embedding": "cls_token"}
    names |= {r"embeddings\.position_embedding": "pos_embed", r"encoder\.layers": "blocks", r"layer_norm": "norm"}
    names |= {r"self_attn\.qkv": "attn.qkv", r"self_attn\.projection": "attn.proj"}
    tensors = {"norm.weight": np.ones(24, np.float32), "head.bias": np.ones(3, np.float32)}
    for name, value in load_file(save(theirs, tmp_path) / "model.safetensors").items():
        for pattern, change in names.items():
            name = re.sub(pattern, change, name)
        if name.endswith("attn.qkv.bias"):
            for part, rows in (("q", value[:24]), ("v", value[48:])):
                tensors[name.replace("qkv.bias", f"{part}_bias")] = rows
        elif not name.startswith("post_"):
            tensors[name] = value
    torch.save({name: torch.tensor(value).half() for name, value in tensors.items()}, tmp_path / "eva_vit_g.pth")
    for value in theirs.state_dict().values():
        value.copy_(value.half())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()

    part, config = config_from(tmp_path)
    assert (part, config.depth, config.num_heads, config.image_size) == ("vision", 3, 3, 28)
    pixels = images(28)
    expected = states(theirs, normalised(pixels, config))[-2]
    report = ImportReport()
    config = replace(config, feature_tokens="cls_patch")
    worst = error(encode(config, import_part(tmp_path, "vision", config, report=report), pixels), expected)
    record_parity("eva_clip_lavis", "vision", worst)
    assert worst <= 2e-5
    assert {name for name, *_ in report.mapped} | {name for name, _ in report.unused} == set(tensors)


def test_timm_convnext_equals_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(timm._CONVNEXTS, "convnext_tiny", (CONVNEXT["depths"], CONVNEXT["hidden_sizes"], 1e-6))
    theirs = tiny("ConvNext", **CONVNEXT)
    table = {"embeddings.patch_embeddings": "stem.0", "embeddings.layernorm": "stem.1", "encoder.stages": "stages"}
    table |= {"downsampling_layer": "downsample", "layers": "blocks", "dwconv": "conv_dw", "pwconv": "mlp.fc"}
    table |= {"layer_scale_parameter": "gamma", "layernorm": "norm"}
    tensors = {"head.norm.weight": np.ones(6)}
    for name, value in load_file(save(theirs, tmp_path) / "model.safetensors").items():
        for old, new in table.items():
            name = name.replace(old, new)
        if not name.startswith("norm."):
            tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_tiny", "pretrained_cfg": cfg}))
    config, pixels = config_from(tmp_path)[1], images(64)
    expected = flat(states(theirs, normalised(pixels, config))[-1])
    worst = error(encode(config, import_part(tmp_path, "vision"), pixels), expected)
    record_parity("timm_convnext", "vision", worst)
    assert worst <= 2e-5


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_large_patch14_clip_336.openai", {"image_size": 336, "width": 1024, "activation": "gelu_erf"}),
        ("vit_large_patch14_clip_quickgelu_336.openai", {"pre_norm": True, "activation": "quick_gelu"}),
        ("vit_so400m_patch14_siglip_384", {"mlp_dim": 4304, "class_token": False, "activation": "gelu_erf"}),
        ("vit_so400m_patch16_siglip_512", {"patch_size": 16, "activation": "gelu_tanh"}),
        ("vit_large_patch14_reg4_dinov2.lvd142m", {"image_size": 518, "num_registers": 4, "layer_scale": True}),
        ("vit_giant_patch14_dinov2.lvd142m", {"width": 1536, "mlp_dim": 4096, "mlp": "swiglu"}),
        ("vit_large_patch16_224.augreg_in21k_ft_in1k", {"patch_bias": True, "norm_eps": 1e-6, "mean": (0.5,) * 3}),
        ("convnext_xxlarge.clip_laion2b_soup", {"stage_depths": (3, 4, 30, 3), "norm_eps": 1e-5, "image_size": 256}),
    ],
)
def test_timm_names(name, says):
    config = timm.timm_config(name)
    assert {key: getattr(config, key) for key in says} == says


def test_an_unknown_timm_name_is_refused():
    with pytest.raises(WeightsError, match=r"timm's 'vit_base_patch16_rope_224' is not supported"):
        timm.timm_config("vit_base_patch16_rope_224")
