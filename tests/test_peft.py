"""LoRA folders of PEFT and of LLaVA: as leaves of their own, merged, written again; the names are PEFT's, by hand.

An adapter is W + B A alpha / r (Hu et al. 2021), and its file's names are the base's modules behind `base_model.model.`.
PEFT itself is asked in test_peft_package.py.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from weights_helpers import TEXT, VISION, saver, tokenizer_folder

from jaxvlm.config import ConnectorConfig, LLMConfig, LoRAConfig, ModelConfig, PromptConfig
from jaxvlm.main import main
from jaxvlm.models.lora import merge_lora
from jaxvlm.models.vlm import abstract_params
from jaxvlm.weights import ImportReport, WeightsError, export, import_model, load_any
from jaxvlm.weights.adapters import lora_config, lora_family, read_adapters
from jaxvlm.weights.exporter import keep_adapters
from jaxvlm.weights.families import FAMILIES
from jaxvlm.weights.plan import Piece, plan
from jaxvlm.weights.saved import save_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

RANK, ALPHA, LAYERS = 3, 6.0, 2
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32)}
SHAPES |= {"mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
# Where the decoder's layers stand: llava-hf since 4.52, before, and LLaVA's own class.
ERAS = {
    "4.52": "base_model.model.model.language_model.layers.{}.",
    "before": "base_model.model.language_model.model.layers.{}.",
    "own": "base_model.model.model.layers.{}.",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory)


@pytest.fixture
def base(saved, tmp_path):
    """A llava-hf folder with a tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in saved("llava")[0].iterdir():
        (folder / file.name).symlink_to(file)
    return tokenizer_folder(folder)


def adapters(era="4.52", shapes=SHAPES):
    """{PEFT's name: value}."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        for module, (out, inner) in shapes.items():
            name = ERAS[era].format(layer) + module
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(RANK, inner)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(out, RANK)).astype(np.float32)
    return tensors


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    values |= {"base_model_name_or_path": "someone/llava", "bias": "none", "use_dora": False, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged_by_hand(tensors, plain, scale=ALPHA / RANK):
    """The base's tensors (transformers 5.23's names) with the adapters in them."""
    result = dict(plain)
    for layer in range(LAYERS):
        for module in SHAPES:
            low, up = (tensors[f"{ERAS['4.52'].format(layer)}{module}.lora_{half}.weight"] for half in "AB")
            name = f"language_model.model.layers.{layer}.{module}.weight"
            result[name] = plain[name] + scale * up @ low
    return result


def assert_near(a, b):
    a, b = (flatten_dict(tree, sep="/") for tree in (a, b))
    assert sorted(a) == sorted(b)
    for path in a:
        np.testing.assert_allclose(np.asarray(a[path]), np.asarray(b[path]), rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("era", ["4.52", "before"])
@pytest.mark.parametrize("rslora", [False, True])
def test_leaves_and_merge_are_the_same_model(saved, base, tmp_path, era, rslora):
    named = dict(zip(adapters(era), adapters().values(), strict=True))
    folder = write(tmp_path / "lora", named, use_rslora=rslora)
    report = ImportReport()
    config, params = import_model(folder, base=str(base), report=report)
    factor = RANK**0.5 if rslora else 1.0
    assert config.llm.lora == LoRAConfig(RANK, ALPHA * factor, ("q", "v", "o", "up", "down"))
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert set(named) <= {name for name, *_ in report.mapped}

    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    save_file(merged_by_hand(adapters(), saved("llava")[1], ALPHA / RANK * factor), by_hand / "model.safetensors")
    (by_hand / "config.json").write_text((base / "config.json").read_text())
    want = import_model(by_hand)[1]
    merged, got = import_model(folder, base=str(base), merge=True)
    assert merged.llm.lora.rank == 0
    assert_near(got, want)
    assert_near(merge_lora(params, config.llm), want)


def test_command_line(saved, base, tmp_path, capsys):
    folder = write(tmp_path / "lora", adapters())
    assert main(["import", str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "someone/llava" in error and "--base PATH" in error
    assert main(["import", str(folder), str(tmp_path / "out"), "--base", str(base)]) == 0
    config, prompt, params = load_any(tmp_path / "out")
    assert config.llm.lora.rank == RANK and prompt.transform == "crop"
    assert main(["import", str(folder), str(tmp_path / "merged"), "--base", str(base), "--merge"]) == 0
    assert_near(load_any(tmp_path / "merged")[2], merge_lora(params, config.llm))
    assert main(["import", str(folder), str(tmp_path / "x"), "--base", str(saved("llama")[0])]) == 1
    assert "a language model alone" in capsys.readouterr().err


def test_llava_lora_folder(saved, base, tmp_path):
    """Adapters on a language model, the projector beside them, and a config.json that says it is LLaVA."""
    tensors = saved("llava")[1]
    llm, tower, folder = (tmp_path / name for name in ("llm", "tower", "lora"))
    llm.mkdir()
    tower.mkdir()
    text = {n.removeprefix("language_model."): v for n, v in tensors.items() if n.startswith("language_model.")}
    save_file(text, llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps(TEXT | {"model_type": "llama"}))
    tokenizer_folder(llm)
    vision = {n.removeprefix("vision_tower."): v for n, v in tensors.items() if n.startswith("vision_tower.")}
    save_file(vision, tower / "model.safetensors")
    (tower / "config.json").write_text(json.dumps(VISION | {"model_type": "clip_vision_model"}))
    write(folder, dict(zip(adapters("own"), adapters().values(), strict=True)), base_model_name_or_path=str(llm))
    rng = np.random.default_rng(1)
    projector = {
        f"mm_projector.{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in ((0, (32, 24)), (2, (32, 32)))
    }
    projector |= {f"mm_projector.{n}.bias": rng.normal(size=32).astype(np.float32) for n in (0, 2)}
    state = {f"base_model.model.model.{name}": torch.tensor(value) for name, value in projector.items()}
    torch.save(state, folder / "non_lora_trainables.bin")
    own = {"model_type": "llava", "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(TEXT | own | {"image_aspect_ratio": "pad"}))

    config, prompt, params = load_any(folder)  # the base is a folder that is there
    assert config.llm.lora.rank == RANK and prompt.transform == "letterbox" and prompt.tokenizer == str(llm)
    np.testing.assert_array_equal(params["connector"]["linear_1"]["kernel"], projector["mm_projector.0.weight"].T)
    reference = import_model(write(tmp_path / "plain", adapters()), base=str(base))[1]
    assert_near(params["llm"], reference["llm"])
    assert_near(import_model(folder, merge=True)[1]["llm"], merge_lora(reference, config.llm)["llm"])


def test_what_can_only_be_merged(base, tmp_path):
    name = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    more = {
        f"{name}.lora_A.weight": np.ones((RANK, 24), np.float32),
        f"{name}.lora_B.weight": np.ones((24, RANK), np.float32),
    }
    folder = write(tmp_path / "lora", adapters() | more)
    with pytest.raises(WeightsError, match=r"vision_model.encoder.layers.0.*can only be merged.*--merge"):
        import_model(folder, base=str(base))
    plain, params = import_model(base)[1], import_model(folder, base=str(base), merge=True)[1]
    change = (
        np.asarray(params["vision"]["layers"]["attn"]["q"]["kernel"]) - plain["vision"]["layers"]["attn"]["q"]["kernel"]
    )
    np.testing.assert_allclose(change[0], RANK * ALPHA / RANK, rtol=1e-5)
    assert not change[1].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True .DoRA."),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 5}, "no half of an adapter of rank 5"),
        ({"r": None}, "adapter_config.json: r is None, and has to be a whole number"),
        ({"lora_alpha": "6"}, "adapter_config.json: lora_alpha is '6', and has to be a number"),
    ],
)
def test_other_adapters_are_refused_by_name(base, tmp_path, settings, message):
    folder = write(tmp_path / "lora", adapters(), **settings)
    with pytest.raises(WeightsError, match=message):
        import_model(folder, base=str(base))


def test_strange_and_missing_tensors(base, tmp_path):
    tensors = adapters()
    lost = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    folder = write(tmp_path / "lora", {name: value for name, value in tensors.items() if name != lost})
    with pytest.raises(WeightsError, match="no pairs of LoRA matrices: .*layers.1.mlp.up_proj.lora_A"):
        import_model(folder, base=str(base))
    pair = [name for name in tensors if "layers.1.mlp.up_proj" in name]
    write(folder, {name: value for name, value in tensors.items() if name not in pair})
    with pytest.raises(WeightsError, match="Missing from the file, 2:(.|\n)*up_proj.lora_A.weight(.|\n)*--merge"):
        import_model(folder, base=str(base))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="none of adapter_model.safetensors"):
        import_model(folder, base=str(base))


def test_export_and_back(base, tmp_path):
    """What is written has PEFT's names and settings, and on the exported base gives the same model."""
    config, _, params = load_any(write(tmp_path / "lora", adapters()), base=str(base))
    prompt = PromptConfig(tokenizer=str(base))
    plain = export(params, config, prompt, tmp_path / "plain", merge=False)
    out = export(params, config, prompt, tmp_path / "out", "peft", base="acme/plain")
    tensors = load_file(out / "adapter_model.safetensors")
    projector = {
        f"base_model.model.model.multi_modal_projector.linear_{n}.{k}" for n in "12" for k in ("weight", "bias")
    }
    assert set(tensors) == set(adapters()) | projector
    for name, value in adapters().items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (RANK, ALPHA, "acme/plain")
    for name in adapters():  # PEFT matches whole module names
        assert re.fullmatch(settings["target_modules"], name.split(".lora_")[0].removeprefix("base_model.model."))
    assert not re.fullmatch(settings["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    again, back = import_model(out, base=str(plain))
    assert again == config
    assert_near(back, params)
    np.testing.assert_array_equal(
        load_file(plain / "model.safetensors")["language_model.model.layers.0.mlp.up_proj.weight"],
        np.asarray(import_model(base)[1]["llm"]["layers"]["mlp"]["up"]["kernel"][0]).T,
    )


def test_the_adapters_of_a_run(base, tmp_path):
    """A run merges them into its model and keeps them beside it; a model that has no PEFT form keeps none."""
    config, _, params = load_any(write(tmp_path / "lora", adapters()), base=str(base))
    run = tmp_path / "run"
    for _ in range(2):  # a run that is taken up again writes them again
        keep_adapters(params, config, run / "adapters")
    plain = dataclasses.replace(config.llm, lora=LoRAConfig())
    merged = dataclasses.replace(config, llm=plain)
    save_model(run / "model", merge_lora(params, config.llm), merged, PromptConfig(tokenizer=str(base)), {})
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "peft", "--base", str(base)]) == 0
    again, back = import_model(tmp_path / "out")  # the base is a folder that is there
    assert again == config
    assert_near(back, params)
    linear = dataclasses.replace(config, connector=ConnectorConfig("linear"))
    for model in (merged, linear):
        keep_adapters(params, model, run / "none")
    assert not (run / "none").exists()


def test_joined_projections_share_their_first_matrix(tmp_path):
    """Phi-3 adapts q, k and v as one matrix: each gets A and its own rows of B."""
    family = FAMILIES["phi3"]
    llm = LLMConfig(vocab_size=64, width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
    shapes = {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32)}
    folder = write(tmp_path / "lora", adapters("own", shapes))
    found = read_adapters(folder)
    keys = {module.removeprefix("model."): pair for module, pair in found.modules.items()}
    llm = dataclasses.replace(llm, lora=lora_config(found, family, llm, set(keys)))
    assert llm.lora.targets == ("q", "k", "v", "gate", "up")
    names = {
        f"{key}.lora_{half}.weight": name for key, pair in keys.items() for half, name in zip("AB", pair, strict=True)
    }
    (leaves,) = plan([Piece("llm", lora_family(family, llm), llm, found.source, names)])
    values = {leaf.path: leaf.read(tuple(slice(0, n) for n in leaf.shape)) for leaf in leaves}
    low, up = (found.source.read(name) for name in keys["layers.1.self_attn.qkv_proj"])
    for path, rows, heads in (("q", slice(0, 32), 4), ("k", slice(32, 48), 2), ("v", slice(48, 64), 2)):
        np.testing.assert_array_equal(values[f"layers/attn/{path}/lora_a"][1], low.T)
        want = up[rows].T.reshape(RANK, heads, 8)
        np.testing.assert_array_equal(values[f"layers/attn/{path}/lora_b"][1], want)
    model = ModelConfig(llm=llm)
    wanted = {p: leaf.shape for p, leaf in flatten_dict(abstract_params(model)["llm"], sep="/").items() if "lora_" in p}
    assert {path: value.shape for path, value in values.items()} == wanted
    phi3 = dataclasses.replace(model, llm=dataclasses.replace(llm, rope_fraction=0.5))  # nothing but a Phi-3
    keep_adapters({}, phi3, tmp_path / "kept")  # at the end of a run, which they must not cost its model
    assert not (tmp_path / "kept").exists()
    with pytest.raises(WeightsError, match="qkv_proj and gate_up_proj as one matrix.*Use --format llava-hf"):
        export({}, phi3, PromptConfig(), tmp_path / "out", "peft")
