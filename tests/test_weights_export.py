"""Exports: what transformers loads, what comes back, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from weights_helpers import saver, tokenizer_folder

from jaxvlm.config import ConnectorConfig, LoRAConfig, ModelConfig, PromptConfig, UserError, VisionConfig
from jaxvlm.templates import TEMPLATES
from jaxvlm.weights import WeightsError, export, import_model, prompt_from
from jaxvlm.weights.chat_templates import chat_template

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return saver(tmp_path_factory)


def load_hf(folder):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def leaves(tree):
    return {path: np.asarray(value) for path, value in flatten_dict(tree, sep="/").items()}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert sorted(a) == sorted(b)
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("kind", ["llava", "llava_siglip"])
def test_round_trip_and_transformers(saved, tmp_path, kind):
    folder, tensors = saved(kind)
    config, params = import_model(folder)
    prompt = PromptConfig(tokenizer=str(tokenizer_folder(tmp_path / "tok")), transform="letterbox")
    out = export(params, config, prompt, tmp_path / "out" / "model", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 3 and (out / "model.safetensors.index.json").is_file()

    again, back = import_model(out)
    assert again == dataclasses.replace(config, vision=dataclasses.replace(config.vision))
    assert_same(back, params)
    assert prompt_from(out).transform == "letterbox"

    theirs, original = load_hf(out), load_hf(folder)
    dropped = ("vision_tower.encoder.layers.2.", "post_layernorm")  # computed and discarded at feature layer -2
    same = {n for n, v in theirs.state_dict().items() if torch.equal(v, original.state_dict().get(n, v + 1))}
    differ = set(theirs.state_dict()) - same
    assert all(any(part in name for part in dropped) for name in differ)
    ids = torch.tensor([[1, 5] + [63] * 16 + [7, 8]])
    for model in (theirs, original):
        model.config.image_token_id = 63
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        a, b = (model(input_ids=ids, pixel_values=pixels).logits for model in (theirs, original))
    assert torch.equal(a, b)


def test_files_of_the_folder(saved, tmp_path):
    config, params = import_model(saved("llava")[0])
    source = tokenizer_folder(tmp_path / "tok")
    out = export(params, config, PromptConfig(tokenizer=str(source)), tmp_path / "model", dtype="bfloat16")
    names = {file.name for file in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    processor = transformers.LlavaProcessor.from_pretrained(out)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    batch = processor(text=[text], images=[image], return_tensors="pt")
    model = load_hf(out)
    assert model.dtype == torch.bfloat16 and model.config.image_token_id == 3
    assert int((batch["input_ids"] == 3).sum()) == config.vision.num_tokens
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    with torch.no_grad():
        model(**batch.to(torch.bfloat16))


def test_a_tokenizers_own_template_goes_along(saved, tmp_path):
    """With the ids that its model ended answers with, which only its generation_config.json tells."""
    config, params = import_model(saved("llava")[0])
    source = tokenizer_folder(tmp_path / "tok")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    own = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content | trim + eos_token }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": own}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    prompt = PromptConfig(tokenizer=str(source), template="tokenizer")
    out = export(params, config, prompt, tmp_path / "model")
    texts = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "It"}]
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for messages in (texts, [texts[0] | {"content": parts}, texts[1]]):
        said = tokenizer.apply_chat_template(messages, tokenize=False)
        assert said == "<s>user: <image>\nWhat is it?</s>assistant: It</s>"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]
    assert prompt_from(out).template == "tokenizer"


@pytest.mark.parametrize(("size", "rows"), [(60, 64), (64, 128)])
def test_a_tokenizer_without_image_gets_it(saved, tmp_path, size, rows):
    config, params = import_model(saved("llava")[0])
    source = tokenizer_folder(tmp_path / "tok", image=False, size=size)
    out = export(params, config, PromptConfig(tokenizer=str(source)), tmp_path / "model")
    model = load_hf(out)
    assert model.config.image_token_id == size and model.get_input_embeddings().weight.shape[0] == rows
    head = model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(head[:64], np.asarray(params["llm"]["head"]["kernel"]).T)
    if rows > 64:
        np.testing.assert_allclose(head[100], head[:64].mean(0), rtol=1e-5, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<image>") == size and tokenizer("w1 <image>").input_ids[-1] == size


def test_adapters_are_merged(saved, tmp_path):
    config, params = import_model(saved("llava")[0])
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, lora=LoRAConfig(2, 4.0, ("q",))))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 32, 2)).astype(np.float32), rng.normal(size=(2, 2, 4, 8)).astype(np.float32)
    adapted = jax.tree.map(lambda leaf: leaf, params)
    adapted["llm"]["layers"]["attn"]["q"] |= {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
    prompt = PromptConfig(tokenizer=str(tokenizer_folder(tmp_path / "tok")))
    out = export(adapted, config, prompt, tmp_path / "model")
    kernel = import_model(out)[1]["llm"]["layers"]["attn"]["q"]["kernel"]
    wanted = np.asarray(params["llm"]["layers"]["attn"]["q"]["kernel"]) + 2 * np.einsum("ldr,lrhk->ldhk", a, b)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-5, atol=1e-5)


def test_what_no_class_computes_is_refused_with_reasons(tmp_path):
    vision = VisionConfig(kind="efficientnet_lite", width=1280, pool=2)
    model = ModelConfig(vision=vision, connector=ConnectorConfig("linear", input_norm=True))
    with pytest.raises(WeightsError) as error:
        export({}, model, PromptConfig(), tmp_path / "model")
    for reason in ("CLIP, SigLIP or DINOv2 tower", "pooled", "'linear'", "input_norm", "keep jaxvlm's own form"):
        assert reason in str(error.value)
    registers = dataclasses.replace(VisionConfig(), num_registers=4)
    softcap = dataclasses.replace(ModelConfig().llm, logit_softcap=30.0)
    fused = VisionConfig(kind="fused", towers=(VisionConfig(), VisionConfig()))
    for changes, reason in (
        ({"vision": registers}, "vision.num_registers = 4"),
        ({"vision": fused}, "of kind 'fused'"),
        ({"llm": softcap}, "soft cap"),
        ({"connector": ConnectorConfig("sva")}, "'sva'"),
        ({"connector": ConnectorConfig("resampler")}, "'resampler'"),
    ):
        with pytest.raises(WeightsError, match=f"{reason}.*keep jaxvlm's own form"):
            export({}, dataclasses.replace(ModelConfig(), **changes), PromptConfig(), tmp_path / "model")
    # What another form can hold is said to go there.
    tiled, rows = PromptConfig(transform="anyres"), ConnectorConfig(row_end=True)
    with pytest.raises(WeightsError, match="Use --format llava-next-hf"):
        export({}, ModelConfig(connector=rows), tiled, tmp_path / "model")
    with pytest.raises(WeightsError, match="Use --format llava-original"):
        export({}, ModelConfig(connector=ConnectorConfig("linear")), PromptConfig(), tmp_path / "model")
    with pytest.raises(WeightsError, match="has no adapters"):
        export({}, ModelConfig(), PromptConfig(), tmp_path / "model", "peft")
    with pytest.raises(WeightsError, match="no export format 'gguf'"):
        export({}, ModelConfig(), PromptConfig(), tmp_path / "model", "gguf")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_by_a_failed_export(saved, tmp_path):
    config, params = import_model(saved("llava")[0])
    with pytest.raises(WeightsError, match="not a folder with a tokenizer.json"):
        export(params, config, PromptConfig(tokenizer=str(tmp_path / "none")), tmp_path / "model")
    prompt = PromptConfig(tokenizer=str(tokenizer_folder(tmp_path / "tok")))
    del params["llm"]["final_norm"]
    with pytest.raises(WeightsError, match="lack llm/final_norm/scale"):
        export(params, config, prompt, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"tok"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        export(params, config, prompt, tmp_path / "full")


MESSAGES = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And its colour?"},
]


@pytest.mark.parametrize("layout", ["llava", "prismatic"])
@pytest.mark.parametrize("name", sorted(name for name, one in TEMPLATES.items() if one.style != "plain"))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_template_renders_our_prompt(name, system, layout):
    """The Jinja text equals what `data.conversation` renders up to where the answer starts."""
    import jinja2

    from jaxvlm.data.conversation import render

    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in MESSAGES]
    messages = list(MESSAGES)
    if system and TEMPLATES[name].system_format is None:
        pytest.skip("the template has no place for a system prompt")
    if system:
        turns.insert(0, {"from": "system", "value": system})
        messages.insert(0, {"role": "system", "content": system})
    ours = render(turns, name, layout=layout).text
    theirs = jinja2.Environment().from_string(chat_template(name, layout)).render(messages=messages, eos_token="</s>")
    assert theirs == ours
