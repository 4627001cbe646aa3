"""Prismatic and Cambrian: checkpoints that name their towers, against oracles in torch put together from recipes §3.

The architectures behind the names are shrunk; names, layouts and settings are the formats' own.
"""

import json

import hf_copy
import numpy as np
import pytest
import test_connectors_sva as sva
import torch
import transformers
from flax.traverse_util import flatten_dict
from greedy_helpers import check_logits_and_greedy
from parity_log import record_parity
from PIL import Image
from test_vision_families import timm_tensors
from vision_helpers import normalised
from weights_helpers import TEXT, tokenizer_folder

from jaxvlm.infer.engine import load
from jaxvlm.main import main
from jaxvlm.weights import ImportReport, WeightsError, config_from, import_model, load_any, prompt_from
from jaxvlm.weights.chat_templates import chat_template
from jaxvlm.weights.families import cambrian, known, prismatic, timm
from jaxvlm.weights.hf_config import template_of

SIDE, PATCH = 28, 7
PICTURES = [
    np.random.default_rng(i).integers(0, 256, (h, w, 3)).astype(np.uint8) for i, h, w in ((0, 20, 41), (1, 50, 13))
]


def request(text, *pictures):
    return {"messages": [{"role": "user", "content": text}], "images": [PICTURES[i] for i in pictures]}


def tower(kind, folder, seed, **settings):
    """A tiny tower of transformers, saved."""
    settings |= {"num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    hf_copy.randomise(model, seed)
    model.save_pretrained(folder)
    return model


def language(**changes):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | {"rms_norm_eps": 1e-5} | changes)).eval()
    state = hf_copy.randomise(model, 7)
    for name, value in state.items():
        if "layers." in name and value.ndim > 1:
            value *= 2  # or one word wins every time
    return model, state


def assert_same(a, b):
    a, b = (flatten_dict(tree, sep="/") for tree in (a, b))
    assert sorted(a) == sorted(b)
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


# ------------------------------------------------------------------------------------------------------------ Prismatic


@pytest.fixture
def small(monkeypatch):
    """The released names, standing for tiny architectures."""
    monkeypatch.setitem(timm._SIZES, "small", (24, 3, 3, 48))
    dino, siglip = "vit_small_patch7_reg4_dinov2", "vit_small_patch7_siglip_28"
    monkeypatch.setitem(prismatic.TOWERS, "dinosiglip-vit-so-384px", (SIDE, (dino, siglip)))
    monkeypatch.setitem(prismatic.TOWERS, "siglip-vit-so400m", (SIDE, (siglip,)))
    tiny = TEXT | {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 60}
    monkeypatch.setitem(known.LANGUAGE_MODELS, "meta-llama/Llama-2-7b-hf", tiny)
    monkeypatch.setitem(prismatic.LLMS, "llama2-7b-pure", ("meta-llama/Llama-2-7b-hf", 64, "prism"))


def run_folder(folder, parts, stage, vision="dinosiglip-vit-so-384px", arch="no-align+fused-gelu-mlp"):
    (folder / "checkpoints").mkdir(parents=True)
    model = {"model_id": "prism", "vision_backbone_id": vision, "llm_backbone_id": "llama2-7b-pure"}
    model |= {"arch_specifier": arch, "image_resize_strategy": "resize-naive", "llm_max_length": 2048}
    (folder / "config.json").write_text(json.dumps({"model": model, "dataset": {}, "stage": stage, "seed": 7}))
    state = {part: {name: torch.tensor(value) for name, value in tensors.items()} for part, tensors in parts.items()}
    torch.save({"model": state, "optimizer": {"lr": torch.ones(1)}}, folder / "checkpoints" / "latest-checkpoint.pt")
    tokenizer_folder(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folder


def projector(*widths):
    rng, state = np.random.default_rng(2), {}
    for n, (inner, out) in enumerate(zip(widths, widths[1:], strict=False)):
        state[f"projector.{2 * n}.weight"] = rng.normal(size=(out, inner), scale=0.2).astype(np.float32)
        state[f"projector.{2 * n}.bias"] = rng.normal(size=out, scale=0.2).astype(np.float32)
    return state


@pytest.fixture
def parts(small, tmp_path):
    """(the parts of a fully trained checkpoint, the towers' folders, the oracle's modules)."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3}
    dino = tower("Dinov2WithRegisters", tmp_path / "dino", 1, mlp_ratio=2, num_register_tokens=4, **sizes)
    siglip = tower("SiglipVision", tmp_path / "siglip", 2, intermediate_size=48, hidden_act="gelu", **sizes)
    llama, state = language()
    vision = {f"dino_featurizer.{n}": v for n, v in timm_tensors(tmp_path / "dino").items()}
    vision |= {f"siglip_featurizer.{n}": v for n, v in timm_tensors(tmp_path / "siglip").items() if "head." not in n}
    full = {
        "vision_backbone": vision | {"siglip_featurizer.attn_pool.latent": np.ones((1, 1, 24), np.float32)},
        "llm_backbone": {f"llm.{name}": value for name, value in state.items()},
        "projector": projector(48, 192, 32, 32),
    }
    return full, f"{tmp_path / 'dino'},{tmp_path / 'siglip'}", (dino, siglip, llama)


def test_prismatic_computes_what_its_code_does(parts, tmp_path):
    """DINOv2 then SigLIP with the exact GELU, second-to-last layers, the fused MLP, patches right after BOS."""
    full, _, (dino, siglip, llama) = parts
    path = run_folder(tmp_path / "run", full, "full-finetune")
    report = ImportReport()
    config, prompt, params = load_any(path, report=report)
    names = {f"{part}.{name}" for part, tensors in full.items() for name in tensors}
    assert {name for name, *_ in report.mapped} | {name for name, _ in report.unused} == names
    assert {parameter for _, parameter, _ in report.mapped} == set(flatten_dict(params, sep="/"))
    assert config.connector.kind == "fused_mlp" and [t.activation for t in config.vision.towers] == ["gelu_erf"] * 2
    assert (prompt.template, prompt.transform, prompt.layout) == ("prism", "naive", "prismatic")
    assert (prompt.length, prompt.truncation) == (2048 + 16, "before_splice")
    assert_same(import_model(path / "checkpoints" / "latest-checkpoint.pt")[1], params)

    linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
    w = {name: torch.tensor(value) for name, value in full["projector"].items()}

    @torch.no_grad()
    def oracle(tokens, visual_index, images):
        assert tokens[0] == 1 and (visual_index[1:17] == np.arange(16)).all() and (visual_index[17:] == -1).all()
        pixels = np.asarray(Image.fromarray(images[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        views = (normalised(pixels[None], tower) for tower in config.vision.towers)
        hidden = [m(v, output_hidden_states=True).hidden_states[-2] for m, v in zip((dino, siglip), views, strict=True)]
        x = torch.cat([hidden[0][:, 5:], hidden[1]], dim=-1)[0]
        for n in (0, 2, 4):
            x = linear(gelu(x) if n else x, w[f"projector.{n}.weight"], w[f"projector.{n}.bias"])
        text = llama.get_input_embeddings()(torch.tensor(tokens).long())
        return llama(inputs_embeds=torch.cat([text[:1], x, text[17:]])[None]).logits[0]

    requests = [request("<image>\nw3 w4", 0), request("w5 w6 w7 <image>", 1)]
    error = check_logits_and_greedy(load(path), requests, oracle)
    assert error <= 2e-5
    record_parity("prismatic", "logits", error)


def test_prismatic_without_its_towers(parts, tmp_path, capsys):
    """A frozen tower is only named: it comes from folders in Hugging Face's form. Fine-tuned ones are not lost."""
    full, folders, _ = parts
    want = import_model(run_folder(tmp_path / "full", full, "full-finetune"))[1]
    frozen = {part: tensors for part, tensors in full.items() if part != "vision_backbone"}
    path = run_folder(tmp_path / "run", frozen, "finetune")
    assert main(["import", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "names it: 'dinosiglip-vit-so-384px'" in error and "--vision" in error
    assert main(["import", str(path), str(tmp_path / "out"), "--vision", folders]) == 0
    got = load_any(tmp_path / "out")[2]
    for part in ("connector", "llm"):
        assert_same(got[part], want[part])
    for i in (0, 1):  # timm's class token has its position in it; the rest is the same
        ours, theirs = (flatten_dict(tree["vision"][f"towers_{i}"], sep="/") for tree in (got, want))
        for key in set(ours) - {"class_token", "pos_embed"}:
            np.testing.assert_array_equal(np.asarray(ours[key]), np.asarray(theirs[key]), err_msg=key)
    with pytest.raises(WeightsError, match="gives 1 towers, and the model has 2"):
        import_model(path, vision=folders.split(",")[0])


def test_prismatics_first_stage(parts, tmp_path):
    """It holds the projector alone; the language model is given, with its own vocabulary."""
    full, folders, (_, _, llama) = parts
    llama.resize_token_embeddings(60)
    llama.save_pretrained(tmp_path / "llm")
    stage = {"projector": projector(24, 32, 32)}
    path = run_folder(tmp_path / "run", stage, "align", "siglip-vit-so400m", "gelu-mlp")
    with pytest.raises(WeightsError, match="does not hold its language model but names it: 'llama2-7b-pure'"):
        import_model(path, vision=folders.split(",")[1])
    config, params = import_model(path, vision=folders.split(",")[1], llm=str(tmp_path / "llm"))
    assert config.llm.vocab_size == 60 and config.connector.kind == "mlp2x_gelu" and config.vision.kind == "vit"
    np.testing.assert_array_equal(params["connector"]["linear_1"]["kernel"], stage["projector"]["projector.0.weight"].T)


def test_prismatics_quirks_are_data(tmp_path):
    def found(**values):
        model = {
            "vision_backbone_id": "clip-vit-l-336px",
            "llm_backbone_id": "llama2-7b-chat",
            "arch_specifier": "linear",
        }
        given = {"model": model | {"image_resize_strategy": "letterbox"} | values, "stage": "finetune"}
        (tmp_path / "config.json").write_text(json.dumps(given))
        return config_from(tmp_path)[1], prompt_from(tmp_path)

    config, prompt = found()
    assert config.vision.activation == "quick_gelu" and config.llm.vocab_size == 32064
    assert (prompt.template, prompt.transform, prompt.length) == ("prism_llama_2", "letterbox", 2048 + 576)
    beside_dino = found(vision_backbone_id="dinoclip-vit-l-336px")[0].vision
    assert [t.activation for t in beside_dino.towers] == ["gelu_erf", "gelu_erf"]  # CLIP's own is quick_gelu
    assert beside_dino.feature_width == 2048 and beside_dino.towers[0].num_registers == 4
    siglip = found(vision_backbone_id="siglip-vit-so400m-384px")[0].vision
    assert (siglip.activation, siglip.num_tokens) == ("gelu_erf", 729)
    assert found(llm_backbone_id="phi-2-3b")[0].llm.parallel
    with pytest.raises(WeightsError, match="vision_backbone_id 'sam' is not known. Known: clip-vit-b"):
        found(vision_backbone_id="sam")
    with pytest.raises(WeightsError, match="arch_specifier 'conv'"):
        found(arch_specifier="conv")


# ------------------------------------------------------------------------------------------------------------- Cambrian

NAMES = ["openai/clip-vit-large-patch14-336", "facebook/dinov2-giant-res42-interp64"]
CAMBRIAN = {
    "model_type": "cambrian_llama",
    "mm_projector_type": "sva",
    "mm_vision_tower_aux_list": NAMES,
    "mm_vision_tower_aux_token_len_list": [16, 64],
    "mm_vision_select_layer": -2,
    "image_token_len": 16,
    "query_num_list": [16],
    "num_query_group": 1,
    "vision_hidden_size": sva.W,
    "connector_depth": 2,
    "connector_only": False,
    "num_of_vision_sampler_layers": 2,
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 2,
    "image_aspect_ratio": "pad",
    "rope_theta": 10000.0,
}


@pytest.fixture
def cambrian_folder(monkeypatch, tmp_path):
    """(the folder, the towers' folders, the oracle's modules)."""
    monkeypatch.setattr(cambrian, "_HEADS", sva.HEADS)
    shape = {"num_attention_heads": 2}
    clip = tower("CLIPVision", tmp_path / "clip", 1, hidden_size=6, intermediate_size=8, **shape)
    dino = tower("Dinov2", tmp_path / "dino", 2, hidden_size=10, mlp_ratio=2, **shape)
    for name, module in (("openai/clip-vit-large-patch14-336", clip), ("facebook/dinov2-giant", dino)):
        monkeypatch.setitem(known.TOWERS, name, module.config.to_dict())
    text = TEXT | {"hidden_size": sva.D, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}
    llama, state = language(**text)
    module = sva.Cambrian(in_llm=2)
    own = {f"model.{name}": value for name, value in hf_copy.randomise(module, 3).items()} | state
    folder = tmp_path / "cambrian"
    folder.mkdir()
    torch.save({name: torch.tensor(value) for name, value in own.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(text | CAMBRIAN))
    tokenizer_folder(folder)
    return folder, f"{tmp_path / 'clip'},{tmp_path / 'dino'}", (clip, dino, llama, module, set(own))


def shown(picture, side):
    """The rows and columns (top, bottom, left, right) of a grid that Cambrian does not take for padding."""
    height, width = picture.shape[:2]
    bars = [0, 0]
    bars[width < height] = (side - int(min(width, height) * (side / max(width, height)))) // 2
    return bars[0], side - bars[0], bars[1], side - bars[1]


def padded(picture, size, mean):
    """The picture in the middle of a square of the mean colour, then resized."""
    height, width = picture.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def test_cambrian_computes_what_its_code_does(cambrian_folder, tmp_path):
    """CLIP's second-to-last layer, DINOv2's normed last one resized, the aggregator, row ends, and it in the decoder; bars
    that the aggregator does not see and the decoder does not get.
    """
    folder, towers, (clip, dino, llama, module, names) = cambrian_folder
    config = config_from(folder)[1]
    assert [t.feature_layers for t in config.vision.towers] == [(-2,), (-1,)]
    assert [t.resized_grid for t in config.vision.towers] == [0, 8] and config.vision.towers[1].feature_norm
    assert config.connector.sva.llm_layers == (0, 2) and config.connector.row_end
    with pytest.raises(WeightsError, match="names it: 'openai/clip-vit-large-patch14-336,facebook/dinov2-giant-res42"):
        import_model(folder)
    report = ImportReport()
    config, prompt, params = load_any(folder, vision=towers, report=report)
    assert names <= {name for name, *_ in report.mapped}
    assert {parameter for _, parameter, _ in report.mapped} == set(flatten_dict(params, sep="/"))
    assert (prompt.transform, prompt.layout) == ("letterbox_unpad", "llava")

    def look(picture):
        """What stands in the sequence for a picture: of each token its value, context and cells; of a row end its value."""
        views = [normalised(padded(picture, t.image_size, t.mean)[None], t) for t in config.vision.towers]
        grid = dino(views[1]).last_hidden_state[:, 1:].reshape(1, 6, 6, 10).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (8, 8), mode="bilinear", align_corners=False)
        first = clip(views[0], output_hidden_states=True).hidden_states[-2][0, 1:]
        tile = [first, grid.permute(0, 2, 3, 1).reshape(64, 10)]
        how = [shown(picture, 4), shown(picture, 8)], 4
        tokens, (context, under) = module(tile, *how), module.look(tile, *how)
        found, (top, bottom, left, right) = [], how[0][0]
        for row in range(top, bottom):
            found += [(tokens[n], context, under[n]) for n in range(4 * row + left, 4 * row + right)]
            found.append((module.image_newline, None, None))
        return found

    with torch.no_grad():
        looked = {picture.shape: look(picture) for picture in PICTURES}

    @torch.no_grad()
    def oracle(ids, visual_index, images):
        tokens = [token for picture in images for token in looked[picture.shape]]
        places = np.flatnonzero(visual_index != -1).tolist()
        x = llama.get_input_embeddings()(torch.tensor(ids).long())
        x[places] = torch.stack([value for value, *_ in tokens])

        def after(number):
            layer = module.vision_sampler_layers[number].layers[0]

            def run(_, __, hidden):
                hidden = hidden.clone()
                for at, (_, context, cells) in zip(places, tokens, strict=True):
                    if context is not None:
                        hidden[0, at] = layer(hidden[0, at], context, *cells)
                return hidden

            return run

        hooks = [llama.model.layers[at].register_forward_hook(after(n)) for n, at in enumerate((0, 2))]
        out = llama(inputs_embeds=x[None]).logits[0]
        for hook in hooks:
            hook.remove()
        return out

    assert main(["import", str(folder), str(tmp_path / "out"), "--vision", towers, "--template", "vicuna_v1"]) == 0
    engine = load(tmp_path / "out")
    requests = [request("<image>\nw3 w4", 0), request("w9 <image> w5 w6 <image> w7", 1, 0)]
    assert [len(plan.index) for plan in engine._prompt(requests[1], 0).plans] == [4 * 3, 2 * 5]
    error = check_logits_and_greedy(engine, requests, oracle)
    assert error <= 2e-5
    record_parity("cambrian", "logits", error)


def test_cambrians_own_towers(tmp_path):
    """The released 8B model: four towers by name, and where their features come from."""
    names = ["siglip/CLIP-ViT-SO400M-14-384", "openai/clip-vit-large-patch14-336", "facebook/dinov2-giant-res378"]
    given = CAMBRIAN | {"mm_vision_tower_aux_list": [*names, "clip-convnext-XXL-multi-stage"]}
    given |= {"mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216], "image_token_len": 576}
    given |= {"query_num_list": [576], "vision_hidden_size": 1024, "connector_depth": 3, "vocab_size": 128256}
    given |= {"num_of_vision_sampler_layers": 10, "stride_of_vision_sampler_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(TEXT | given))
    config = config_from(tmp_path)[1]
    assert [t.num_tokens for t in config.vision.towers] == [576, 576, 576, 9216]
    assert [t.feature_width for t in config.vision.towers] == [1152, 1024, 1536, 5760]
    assert [t.image_size for t in config.vision.towers] == [384, 336, 378, 1024]
    assert [t.feature_norm for t in config.vision.towers] == [True, False, True, False]
    assert config.vision.towers[0].activation == "gelu_erf" and config.tile_tokens == 576
    assert config.vision.towers[0].fill == config.vision.towers[3].mean != config.vision.towers[0].mean
    assert prompt_from(tmp_path).template == "cambrian_llama_3"
    (tmp_path / "config.json").write_text(json.dumps(TEXT | given | {"vocab_size": 64000}))
    assert prompt_from(tmp_path).template == "cambrian_chatml"
    for name in ("cambrian_chatml", "cambrian_llama_3", "chatml"):
        (tmp_path / "chat_template.jinja").write_text(chat_template(name))
        assert template_of(tmp_path) == name
    (tmp_path / "config.json").write_text(json.dumps(TEXT | given | {"mm_vision_tower_aux_list": ["sam"] * 4}))
    with pytest.raises(WeightsError, match="the vision tower 'sam' is not supported"):
        config_from(tmp_path)
