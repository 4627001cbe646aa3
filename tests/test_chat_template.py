"""The tokenizer's own chat template, against transformers' rendering of it and against our named templates."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from data_helpers import CHATML, LLAMA_3, byte_tokenizer, llama_tokenizer, record, tokenizer_kind, turns
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxvlm
from jaxvlm.config import EvalConfig
from jaxvlm.data import DataError
from jaxvlm.data.assets import toy
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded, check_template, encode, prompt, render, stop_ids
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.job import run
from jaxvlm.templates import TEMPLATES, own_template
from jaxvlm.weights.chat_templates import chat_template
from jaxvlm.weights.hf_config import template_of

SPECIALS = tuple(sorted({s for t in TEMPLATES.values() for s in t.specials} - {"{eos}", "<s>", "</s>"}))
NAMED = sorted(set(TEMPLATES) - {"plain", "plain_eos", "blip2", "instructblip"})  # BLIP's are no chat templates

# Short templates with what the known ones do: a default system prompt and `trim`; roles checked and a prompt that needs
# no asking for; a generation block; an end of text that only whole conversations have.
TRIMMED = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today is {{ strftime_now('%d %b %Y') }}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHECKED = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = (
    "{% for m in messages %}\n    {% if m.role == 'assistant' %}\n<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDED = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "").removesuffix("{% endif %}")
ENDED += "{% else %}{{ eos_token }}{% endif %}"
PARTS = (  # of an image processor: messages are lists of parts
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    chatml = byte_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML, "<|im_start|>", "<|im_end|>")
    third = byte_tokenizer(tmp_path_factory.mktemp("llama-3"), LLAMA_3, LLAMA_3[0], LLAMA_3[-1])
    llama = llama_tokenizer(tmp_path_factory.mktemp("llama"), "first")
    return {TRIMMED: third, CHECKED: llama, BLOCKS: chatml, ENDED: chatml, PARTS: llama}


TALKS = [
    [("user", "What is this?"), ("assistant", "a cat"), ("user", " and that? "), ("assistant", " naïve 日本 \n")],
    [("user", "one\n"), ("assistant", "")],
]


@pytest.mark.parametrize("template", [TRIMMED, CHECKED, BLOCKS, ENDED])
@pytest.mark.parametrize("talk", TALKS)
def test_ids_and_masks_are_transformers(folders, template, talk):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(folders[template], template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer.path, bos_token=tokenizer.bos, eos_token=tokenizer.eos, chat_template=template
    )
    messages = [{"role": role, "content": text} for role, text in talk]
    day = "26 Jul 2024" if template == TRIMMED else ""
    fixed = template.replace("{{ strftime_now('%d %b %Y') }}", day)
    found = theirs.apply_chat_template(
        messages, chat_template=fixed, return_dict=True, return_assistant_tokens_mask=template == BLOCKS
    )
    talk = turns(*(text for _, text in talk))
    encoded = encode({"id": 1, "conversations": talk}, tokenizer, "tokenizer")
    assert encoded.tokens.tolist() == found["input_ids"]
    if template == BLOCKS:
        assert encoded.weights.tolist() == found["assistant_masks"]
    asked = theirs.apply_chat_template(messages[:-1], chat_template=fixed, add_generation_prompt=True)["input_ids"]
    tokens = prompt(messages[:-1], tokenizer, "tokenizer")
    assert tokens.tolist() == asked == encoded.tokens[: len(asked)].tolist()
    assert stop_ids(tokenizer, "tokenizer")[0] == tokenizer.id(tokenizer.eos)


@pytest.mark.parametrize(
    "template, said",
    [
        (TRIMMED, ["a cat<|eot_id|>", "b<|eot_id|>"]),
        (CHECKED, [" a cat</s>", " b </s>"]),
        (BLOCKS, ["a cat<|im_end|>", "b <|im_end|>"]),
        (ENDED, ["a cat<|im_end|>", "b <|im_end|>"]),
        (PARTS, [" a cat</s>", " b </s>"]),
    ],
)
def test_answers_and_their_ends_are_supervised(folders, template, said):
    tokenizer = with_template(folders[template], template)
    talk = turns("look <image>", "a cat", "say </s> <|im_end|>", "b ")
    rendered = render(talk, "tokenizer", tokenizer=tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.spans] == said
    encoded = encode({"id": 1, "image": "x", "conversations": talk}, tokenizer, "tokenizer")
    assert (encoded.tokens == IMAGE_TOKEN).sum() == 1
    assert (encoded.tokens[encoded.weights > 0] == tokenizer.eos_id).sum() == 2  # what users wrote is no special token
    tokens = prompt([{"role": "user", "content": "look <image>"}], tokenizer, "tokenizer")
    assert tokens.tolist() == encoded.tokens[: len(tokens)].tolist() and encoded.weights[len(tokens)] == 1


def test_images_and_bos_of_a_processors_template(folders):
    """Its image parts, in the turn where they stand; and BOS as processors add it, where the template does not."""
    tokenizer = with_template(folders[PARTS], PARTS)
    rendered = render(turns("a <image> b", "c"), "tokenizer", tokenizer=tokenizer)
    assert rendered.text == "USER: <image>\na  b ASSISTANT: c</s>"
    several = render(turns("<image> a <image>", "c"), "tokenizer", tokenizer=tokenizer)
    assert several.text == "USER: <image>\n<image>\na ASSISTANT: c</s>" and len(several.image_marks) == 2
    front = render(turns("a <image> b", "c"), "tokenizer", tokenizer=tokenizer, layout="prismatic")
    assert front.text == "<image>USER: a  b ASSISTANT: c</s>" and front.spans == [(28, 34)]
    assert prompt([{"role": "user", "content": "a"}], tokenizer, "tokenizer")[0] == tokenizer.bos_id
    text = with_template(folders[CHECKED], CHECKED.replace("{{ bos_token }}", ""))
    assert prompt([{"role": "user", "content": "a"}], text, "tokenizer")[0] != text.bos_id  # as transformers does
    front = render(
        turns("a<image>", "c"), "tokenizer", tokenizer=with_template(folders[CHECKED], CHECKED), layout="prismatic"
    )
    assert front.text == "<s><image>[INST] a [/INST] c</s>"


words = st.lists(st.sampled_from(["a cat", " ", "\n", ".", "日", "</s>", "<|im_end|>", "USER:"]), max_size=4).map(
    "".join
)


@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=8)
@given(
    rounds=st.lists(st.tuples(words, words), min_size=1, max_size=3),
    image=st.booleans(),
    system=st.sampled_from(["", "Be brief."]),
    layout=st.sampled_from(["llava", "prismatic"]),
)
def test_a_named_template_written_as_jinja_is_the_named_template(tmp_path_factory, name, rounds, image, system, layout):
    """What we export, read back as a tokenizer's own: the same ids, the same labels, and recognised by an import."""
    folder = tmp_path_factory.getbasetemp() / f"jinja-{name}"
    if not folder.exists():
        tokenizer_kind("qwen", folder, SPECIALS)
        (folder / "chat_template.jinja").write_text(chat_template(name))
        assert template_of(folder) == name
    tokenizer = Tokenizer(folder)
    texts = [text for both in rounds for text in both]
    texts[0] += "<image>" if image else ""
    first = [{"from": "system", "value": system}] if system and TEMPLATES[name].system_format else []
    sample = record(*texts, image="x" if image else None)
    sample["conversations"] = first + sample["conversations"]
    ours, own = (encode(sample, tokenizer, template, layout) for template in (name, "tokenizer"))
    if layout == "prismatic" and TEMPLATES[name].start not in ("", tokenizer.bos):
        ours, own = (Encoded(*(array[encoded.tokens >= 0] for array in encoded)) for encoded in (ours, own))
    np.testing.assert_array_equal(ours.tokens, own.tokens)
    np.testing.assert_array_equal(ours.weights, own.weights)


def refused(folder, template, match, talk=None):
    tokenizer = with_template(folder, template)
    with pytest.raises(DataError, match=match):
        check_template(tokenizer, "tokenizer")
        encode({"id": "r7", "conversations": talk}, tokenizer, "tokenizer")


def test_templates_that_cannot_be_trained_with_are_refused(folders):
    folder = folders[BLOCKS]
    thinking = ENDED.replace("assistant\n{{", "assistant\n{% if loop.last %}<think></think>{% endif %}{{")
    refused(folder, thinking, "chat template of .*tokenizer.json writes an answer differently once more has been said")
    other = ENDED.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n", "{% if add_generation_prompt %}<|bot|>"
    )
    refused(folder, other, "as a prompt is not how the whole conversation begins")
    refused(folder, ENDED.replace("<|im_end|>", "").replace("eos_token", "''"), "no special token after an answer")
    refused(folder, BLOCKS.replace("m.content", "m.content | upper"), "leaves out or changes what a message says")
    refused(folder, "{% for %}", "is not Jinja: line 1")
    refused(folder, "{{ messages[0].nothing.at_all }}", "refuses it: .*no attribute")
    refused(folder, "{{ ''.__class__.__mro__ }}", "refuses it: .*unsafe")
    blank = ENDED.replace("m.content }}", "m.content if 'x' not in m.content else 'y' }}")
    refused(folder, blank, "record 'r7': .*leaves out or changes", turns("x", "a"))
    refused(folder, ENDED, "record 'r7' contains a noncharacter", turns("\ufdd0", "a"))
    llama = folders[CHECKED]
    talk = [{"from": "system", "value": "s"}, *turns("q", "a")]
    refused(llama, CHECKED, "record 'r7': the chat template of .* refuses it: roles must alternate", talk)


def test_where_a_template_is_found(tmp_path, folders):
    folder = llama_tokenizer(tmp_path / "t")
    with pytest.raises(
        DataError, match="no chat_template.jinja beside it and no 'chat_template' in its tokenizer_config"
    ):
        check_template(Tokenizer(folder), "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHECKED}]
    for value in (CHECKED, several):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        assert own_template(folder) == CHECKED
    plain = Tokenizer(folder)
    check_template(plain, "tokenizer")
    newer = with_template(folder, CHECKED + " ")  # its own file comes first
    assert newer.chat_template == CHECKED + " " and newer.fingerprint_text != plain.fingerprint_text
    with pytest.raises(DataError, match=r"needs the special token '<\|im_start\|>'.*prism_mistral.*, tokenizer\."):
        check_template(newer, "chatml")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match="chat_template.json is not a JSON object"):
        Tokenizer(folder)


def test_an_import_takes_a_folders_own_template_where_none_is_like_it(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert template_of(tmp_path) == "tokenizer"
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>user<|im_sep|>")
    assert template_of(tmp_path) == "tokenizer"
    (tmp_path / "chat_template.jinja").unlink()
    assert template_of(tmp_path) is None


def test_a_run_with_the_tokenizers_own_template(tmp_path):
    """Trained, saved and loaded: the model is prompted with exactly what stood before its answers in training."""
    data, tokenizer = toy.write_dataset(tmp_path / "data"), toy.write_tokenizer(tmp_path / "tok")
    (tokenizer / "chat_template.jinja").write_text(CHECKED)
    config = tiny.run_config(data, tokenizer)
    stage = dataclasses.replace(config.stages[1], steps=2)
    own = dataclasses.replace(config.prompt, template="tokenizer")
    run(dataclasses.replace(config, stages=(stage,), prompt=own, eval=EvalConfig()), tmp_path / "run")

    example = json.loads((data / "instruct.json").read_text())[0]
    ask, answer = example["conversations"][:2]
    trained = Tokenizer(tokenizer)
    encoded = encode({**example, "conversations": [ask, answer]}, trained, "tokenizer")
    first = int(np.flatnonzero(encoded.weights)[0])
    (tokenizer / "chat_template.jinja").write_text("")  # the saved model has its own
    engine = jaxvlm.load(tmp_path / "run")
    assert engine.prompt.template == "tokenizer" and engine.end_ids == (trained.eos_id,)
    asked = [{"role": "user", "content": ask["value"]}]
    np.testing.assert_array_equal(prompt(asked, engine.tokenizer, "tokenizer"), encoded.tokens[:first])
    image = str(data / "images" / example["image"])
    assert isinstance(engine.generate([{"messages": asked, "images": [image]}], max_new_tokens=2)[0], str)
