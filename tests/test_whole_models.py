"""Whole models in every form but llava-hf's newest: each tensor of each form has its place, and the model computes the same.

LLaVA's own forms are written by hand from recipes §3.1 and compared with the llava-hf form of the same weights, and
with an oracle in torch.
"""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from greedy_helpers import check_logits_and_greedy
from parity_log import record_parity
from weights_helpers import TEXT, VISION, saver, tokenizer_folder

from jaxvlm.infer.engine import load
from jaxvlm.main import main
from jaxvlm.models.vlm import abstract_params
from jaxvlm.weights import ImportReport, WeightsError, config_from, import_model, load_any, prompt_from

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory)


def leaves(tree):
    return {path: np.asarray(value) for path, value in flatten_dict(tree, sep="/").items()}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert sorted(a) == sorted(b)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def assert_complete(config, params, report, names):
    """Every tensor of the files is mapped or unused, and the parameters are the model's."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert {name for name, *_ in report.mapped} | {name for name, _ in report.unused} == set(names)
    assert {parameter for _, parameter, _ in report.mapped} == set(leaves(params))
    assert not report.missing and not report.unmapped


def renamed(name, era):
    """A llava-hf tensor's name in another year (recipes §3.2), from transformers 5.23's name on disk."""
    if era == "hub":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    tower = "model.vision_tower." if era == "5.6" else "model.vision_tower.vision_model."
    name = name.replace("language_model.model.", "model.language_model.").replace("vision_tower.", tower)
    return name if name.startswith("model.") else f"model.{name}"


@pytest.mark.parametrize("era", ["hub", "4.52", "5.6"])
def test_llava_next_under_every_naming(saved, tmp_path, era):
    from safetensors.numpy import save_file

    folder, tensors = saved("llava_next")
    save_file({renamed(name, era): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    report = ImportReport()
    config, params = import_model(tmp_path, report=report)
    assert_complete(config, params, report, [renamed(name, era) for name in tensors])
    assert_same(params, import_model(folder)[1])
    np.testing.assert_array_equal(params["connector"]["newline"], tensors["image_newline"])
    assert prompt_from(tmp_path).grids == ((1, 2), (2, 1), (3, 1))  # (height, width) here


# ------------------------------------------------------------------------------------------------------ LLaVA's own form

# llava-hf's names (as transformers 5.23 writes them) to LLaVA's own.
OWN = (
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("image_newline", "model.image_newline"),
)


def own_name(name):
    return next(new + name.removeprefix(old) for old, new in OWN if name.startswith(old))


def write_own(folder, tensors, tower, torch_file=False, **more):
    """A folder of LLaVA's: the language model's config.json with `mm_*` entries, and tensors by their own names."""
    folder.mkdir()
    values = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": str(tower)}
    values |= {"mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2, "mm_use_im_start_end": False}
    values |= {"mm_vision_select_feature": "patch", "rope_theta": 10000.0, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(TEXT | values | more))
    if torch_file:
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, folder / "pytorch_model.bin")
    else:
        from safetensors.numpy import save_file

        save_file(tensors, folder / "model.safetensors")
    return tokenizer_folder(folder)


@pytest.fixture(scope="module")
def tower(saved, tmp_path_factory):
    """A CLIP folder with the tower of the llava-hf model."""
    from safetensors.numpy import save_file

    folder, tensors = tmp_path_factory.mktemp("tower"), saved("llava")[1]
    save_file(
        {n.removeprefix("vision_tower."): t for n, t in tensors.items() if "vision" in n}, folder / "model.safetensors"
    )
    config = transformers.CLIPVisionConfig(**VISION).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_tower(tensors):
    return {own_name(name): value for name, value in tensors.items() if not name.startswith("vision_tower.")}


def test_llava_1_5_names_its_tower(saved, tower, tmp_path):
    """The tower may be a folder that the config names, or given; when neither, one sentence says what to do."""
    folder, tensors = saved("llava")
    own = without_tower(tensors)
    path = write_own(tmp_path / "own", own, tower, mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
    report = ImportReport()
    config, params = import_model(path, report=report)
    theirs, reference = import_model(folder)
    assert config.vision == theirs.vision and config.connector == theirs.connector
    assert config.llm.width == theirs.llm.width and config.llm.max_positions == 128
    assert_same(params, reference)
    names = [*own, *(n.removeprefix("vision_tower.") for n in tensors if n.startswith("vision_tower."))]
    assert_complete(config, params, report, names)
    prompt = prompt_from(path)
    assert (prompt.template, prompt.transform, prompt.layout) == ("vicuna_v1", "letterbox", "llava")

    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    assert config_from(path)[1].vision.width == 1024  # known by its name
    with pytest.raises(WeightsError, match="names it: 'openai/clip-vit-large-patch14-336'.*--vision FOLDER"):
        import_model(path)
    assert_same(import_model(path, vision=str(tower))[1], reference)
    (path / "config.json").write_text(json.dumps(values | {"mm_vision_tower": "acme/tower"}))
    with pytest.raises(WeightsError, match="neither a folder nor one that jaxvlm knows"):
        config_from(path)
    assert_same(load_any(path, vision=str(tower))[2], reference)


def test_llava_1_6_holds_its_tower(saved, tower, tmp_path):
    folder, tensors = saved("llava_next")
    own = {own_name(name): value for name, value in tensors.items()}
    settings = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "model_type": "llava_mistral",
    }
    settings |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28], [84, 28]]}
    path = write_own(tmp_path / "own", own, tower, **settings, rms_norm_eps=1e-6, sliding_window=None)
    report = ImportReport()
    config, params = import_model(path, report=report)
    theirs, reference = import_model(folder)
    assert config.connector == theirs.connector and config.connector.row_end
    assert_same(params, reference)
    assert_complete(config, params, report, own)
    prompt = prompt_from(path)
    assert (prompt.template, prompt.transform) == ("mistral_instruct", "anyres")
    assert prompt.grids == ((2, 1), (1, 2), (1, 3))  # LLaVA counts (width, height)
    report = ImportReport()
    assert_same(import_model(path, vision=str(tower), report=report)[1]["llm"], reference["llm"])
    assert any("is used instead" in why for _, why in report.unused)


def test_llava_1_computes_what_its_code_does(saved, tower, tmp_path):
    """One linear layer, an old torch file; logits and greedy answers against CLIP, Linear and Llama put together in torch."""
    tensors = saved("llava")[1]
    own = {n: v for n, v in without_tower(tensors).items() if ".mm_projector." not in n}
    rng = np.random.default_rng(0)
    own["model.mm_projector.weight"] = rng.normal(size=(32, 24), scale=0.2).astype(np.float32)
    own["model.mm_projector.bias"] = rng.normal(size=32).astype(np.float32)
    for name in own:
        if "layers" in name or "lm_head" in name:
            own[name] = own[name] / 4  # as drawn, one word wins every time
    path = write_own(tmp_path / "own", own, tower, torch_file=True)
    engine = load(path)
    assert engine.config.connector.kind == "linear" and engine.prompt.transform == "crop"
    pictures = [rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(3)]
    said = ("<image>\nw3 w4", pictures[:1]), ("w5 <image> or <image> w6?", pictures[1:])
    requests = [{"messages": [{"role": "user", "content": text}], "images": images} for text, images in said]

    clip = transformers.CLIPVisionModel.from_pretrained(tower, local_files_only=True)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    state = {n: torch.tensor(v) for n, v in own.items() if "mm_projector" not in n}
    llama.load_state_dict(state)
    vision = engine.config.vision

    @torch.no_grad()
    def oracle(tokens, visual_index, images):
        pixels = (np.stack(images) / 255 - np.array(vision.mean)) / np.array(vision.std)
        hidden = clip(torch.tensor(pixels.transpose(0, 3, 1, 2)).float(), output_hidden_states=True).hidden_states
        weight, bias = (torch.tensor(own[f"model.mm_projector.{n}"]) for n in ("weight", "bias"))
        x = llama.get_input_embeddings()(torch.tensor(tokens).long())
        x[torch.tensor(visual_index >= 0)] = torch.nn.functional.linear(hidden[-2][:, 1:], weight, bias).flatten(0, 1)
        return llama(inputs_embeds=x[None]).logits[0]

    error = check_logits_and_greedy(engine, requests, oracle)
    assert error <= 2e-5
    record_parity("llava-original", "logits", error)


def test_llavas_first_stage(saved, tower, tmp_path):
    """A folder with `mm_projector.bin` alone: the language model is the one that is given."""
    tensors = saved("llava")[1]
    projector = {n: torch.tensor(v) for n, v in without_tower(tensors).items() if "mm_projector" in n}
    path = write_own(tmp_path / "own", {}, tower, mm_projector_type="mlp2x_gelu", _name_or_path="lmsys/vicuna-7b-v1.5")
    (path / "model.safetensors").unlink()
    torch.save(projector, path / "mm_projector.bin")
    with pytest.raises(WeightsError, match="its language model but names it: 'lmsys/vicuna-7b-v1.5'.*--llm FOLDER"):
        import_model(path)
    whole = import_model(saved("llava")[0])[1]
    given = write_own(tmp_path / "llm", without_tower(tensors), tower, mm_projector_type="mlp2x_gelu")
    assert_same(import_model(path, llm=str(given))[1], whole)


def test_parts_make_a_new_model(saved, tower, tmp_path, capsys):
    """A tower and a language model with LLaVA's stage-1 projector, and without any."""
    tensors = saved("llava")[1]
    llm = tmp_path / "llm"
    llm.mkdir()
    from safetensors.numpy import save_file

    text = {n.removeprefix("language_model."): v for n, v in tensors.items() if n.startswith("language_model.")}
    save_file(text, llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps(TEXT | {"model_type": "llama"}))
    tokenizer_folder(llm)
    projector = {n: torch.tensor(v) for n, v in without_tower(tensors).items() if "mm_projector" in n}
    torch.save({f"base_model.model.{n}": v for n, v in projector.items()}, tmp_path / "mm_projector.bin")

    parts = ["--vision", str(tower), "--llm", str(llm)]
    assert main(["import", *parts, "--connector", str(tmp_path / "mm_projector.bin"), str(tmp_path / "a")]) == 0
    assert "initialised" not in capsys.readouterr().out
    config, prompt, params = load_any(tmp_path / "a")
    assert_same(params, import_model(saved("llava")[0])[1])
    assert main(["import", *parts, str(tmp_path / "b"), "--seed", "3", "--template", "prism"]) == 0
    assert "initialised: connector/* (mlp2x_gelu, from the seed)" in capsys.readouterr().out
    config, prompt, made = load_any(tmp_path / "b")
    assert prompt.template == "prism" and config.connector.kind == "mlp2x_gelu"
    assert_same(made["llm"], params["llm"])
    assert np.abs(made["connector"]["linear_1"]["kernel"]).max() > 0
    fused = ["--vision", f"{tower},{tower}", "--llm", str(llm)]
    assert main(["import", *fused, str(tmp_path / "c")]) == 0
    assert "fused_mlp, from the seed" in capsys.readouterr().out
    config, _, params = load_any(tmp_path / "c")
    assert config.vision.feature_width == 48
    assert_same(params["vision"]["towers_1"], made["vision"])
    assert main(["import", *parts, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Left at initialisation, 1:\n  connector/*" in shown
