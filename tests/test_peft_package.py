"""The PEFT package itself against ours: what it saves we read to its own logits, what we write it loads to ours."""

import dataclasses
import re

import hf_copy
import numpy as np
import pytest
from model_helpers import inputs, logits, prompt, relative_error
from parity_log import record_parity
from safetensors.numpy import load_file
from test_export_families import CASES as FAMILIES
from weights_helpers import make, tokenizer_folder

from jaxvlm.config import ConnectorConfig, LoRAConfig, ModelConfig, PromptConfig
from jaxvlm.models.lora import merge_lora
from jaxvlm.weights import WeightsError, export, import_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

IMAGE, CELLS = 63, 16  # the base's image token, and the visual tokens of an image
DECODER = r".*language_model\..*\.({})_proj"
ALL = DECODER.format("q|k|v|o|gate|up|down")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A llava-hf folder with a tokenizer."""
    folder, model = tmp_path_factory.mktemp("base"), make("llava")
    hf_copy.randomise(model)
    model.save_pretrained(folder)
    return tokenizer_folder(folder)


def load(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def trained(base, folder, config, **more):
    """A PEFT model whose trainable parameters are drawn anew, saved by PEFT."""
    model = peft.get_peft_model(load(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **more)
    return model


# name: (PEFT's settings, those of our own adapters; None where they can only be merged)
CASES = {
    "the decoder's": ({"target_modules": ALL}, LoRAConfig(4, 6.0)),
    "two, rank-stabilised": (
        {"target_modules": DECODER.format("q|up"), "use_rslora": True, "modules_to_save": ["multi_modal_projector"]},
        LoRAConfig(4, 12.0, ("q", "up")),
    ),
    "vocabulary": (
        {
            "target_modules": DECODER.format("o"),
            "modules_to_save": ["lm_head", "language_model.embed_tokens", "linear_1"],
        },
        LoRAConfig(4, 6.0, ("o",)),
    ),
    "biases": ({"target_modules": DECODER.format("down"), "bias": "all"}, LoRAConfig(4, 6.0, ("down",))),
    "biases of adapted layers": ({"target_modules": ["q_proj", "linear_2"], "bias": "all"}, None),
    "every linear layer": ({"target_modules": "all-linear"}, None),
    "the tower's by the same names": ({"target_modules": ["k_proj", "v_proj"]}, None),
    "some layers": ({"target_modules": ["gate_proj"], "layers_to_transform": [1]}, None),
    "the head": ({"target_modules": ["lm_head"]}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_computes_the_same(base, tmp_path, name):
    settings, lora = CASES[name]
    model = trained(base, tmp_path / "lora", peft.LoraConfig(r=4, lora_alpha=6, **settings))
    merged, params = import_model(tmp_path / "lora", base=str(base), merge=True)
    merged = dataclasses.replace(merged, dtype="float32", remat="none")
    tokens, index, pixels = prompt(CELLS)
    with torch.no_grad():
        want = model(**inputs(tokens, index, pixels, merged.vision, IMAGE)).logits[0].numpy()
        plain = load(base)(**inputs(tokens, index, pixels, merged.vision, IMAGE)).logits[0].numpy()
    assert relative_error(plain, want) > 0.1
    assert relative_error(logits(merged, params, tokens, index, pixels), want) <= 2e-5
    if lora is None:
        with pytest.raises(WeightsError, match="--merge"):
            import_model(tmp_path / "lora", base=str(base))
        return
    config, params = import_model(tmp_path / "lora", base=str(base))
    assert config.llm.lora == lora
    assert relative_error(logits(merged, merge_lora(params, config.llm), tokens, index, pixels), want) <= 2e-5
    if lora.targets == LoRAConfig().targets:
        config = dataclasses.replace(config, dtype="float32", remat="none")
        assert relative_error(logits(config, params, tokens, index, pixels), want) <= 2e-5


def refused(**settings):
    return peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": DECODER.format("gate|up")} | settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (refused(use_dora=True), "use_dora = True .DoRA."),
        (refused(rank_pattern={"gate_proj": 3}), "rank_pattern = .'gate_proj': 3."),
        (refused(alpha_pattern={"up_proj": 3}), "alpha_pattern = .'up_proj': 3."),
        (refused(lora_bias=True), "lora_bias = True"),
        (refused(bias="lora_only"), "bias = 'lora_only'"),
        (refused(trainable_token_indices=[3, 4]), r"trainable_token_indices = \[3, 4\]"),
        (refused(target_modules=["embed_tokens"]), "no pairs of LoRA matrices.*embed_tokens.lora_embedding_A"),
        (refused(target_modules=["patch_embedding"]), "patch_embedding.lora_A.weight' is .4, 3, 7, 7."),
        (refused(init_lora_weights="pissa"), "init_lora_weights = 'pissa' changes the base's weights"),
        (refused(init_lora_weights="olora"), "init_lora_weights = 'olora' changes the base's weights"),
        (peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]), "peft_type 'IA3'"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(base, tmp_path, config, message):
    trained(base, tmp_path / "lora", config)
    for merge in (False, True):
        with pytest.raises(WeightsError, match=re.compile(message)):
            import_model(tmp_path / "lora", base=str(base), merge=merge)


def test_embeddings_saved_beside_the_adapters(base, tmp_path):
    """As after adding tokens. Where the head is the embedding, PEFT's result has two, which no tied config describes."""
    model = trained(base, tmp_path / "lora", refused(), save_embedding_layers=True)
    params = import_model(tmp_path / "lora", base=str(base))[1]
    head = model.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(params["llm"]["head"]["kernel"], head.T)

    vision, llm = FAMILIES["smollm, siglip"]
    tied = ModelConfig(vision, ConnectorConfig(), llm)
    folder = export(hf_copy.random_params(tied), tied, PromptConfig(tokenizer=str(base)), tmp_path / "tied")
    for settings in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}):
        trained(folder, tmp_path / "more", refused(**settings))
        with pytest.raises(WeightsError, match="embed_tokens.*the base's head is its embedding|lm_head.*its embedding"):
            import_model(tmp_path / "more", base=str(folder), merge=True)


@pytest.mark.parametrize("name", ["gemma3, siglip", "opt, clip"])
def test_peft_loads_what_we_write(tmp_path, name):
    vision, llm = FAMILIES[name]
    llm = dataclasses.replace(llm, lora=LoRAConfig(3, 6.0))
    model = ModelConfig(vision, ConnectorConfig(), llm, dtype="float32", remat="none")
    params, said = hf_copy.random_params(model), PromptConfig(tokenizer=str(tokenizer_folder(tmp_path / "tok")))
    plain = export(params, model, said, tmp_path / "plain", merge=False)
    out = export(params, model, said, tmp_path / "lora", "peft", base="acme/plain")

    theirs = peft.PeftModel.from_pretrained(load(plain), out).eval()
    loaded = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(theirs).items()}
    written = load_file(out / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()  # nothing missing, nothing left over
    for key, value in written.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)
    tokens, index, pixels = prompt(vision.num_tokens)
    with torch.no_grad():
        want = theirs(**inputs(tokens, index, pixels, vision, 3)).logits[0].numpy()
    error = relative_error(logits(model, params, tokens, index, pixels), want)
    assert error <= 2e-5
    record_parity(f"{name}, PEFT adapters", "export", error)
