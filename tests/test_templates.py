"""Every template over tokenizers like those of every family: what is supervised, and what inference is prompted with."""

import re

import numpy as np
import pytest
from data_helpers import KINDS, record, tokenizer_kind, turns
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, encode, prompt, render, stop_ids
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.templates import TEMPLATES

SPECIALS = tuple(sorted({s for t in TEMPLATES.values() for s in t.specials} - {"{eos}", "<s>", "</s>"}))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {kind: Tokenizer(tokenizer_kind(kind, tmp_path_factory.mktemp(kind), SPECIALS)) for kind in KINDS}


def written(tokenizer, ids):
    """Tokens as text, the space in front kept, which decoders of SentencePiece take off."""
    tokens = [tokenizer._tokenizer.id_to_token(int(i)) for i in ids]
    if "<0x00>" not in tokenizer._tokenizer.get_vocab():
        return tokenizer.decode(ids, skip_special=False)
    parts = [bytes([int(t[3:5], 16)]) if re.fullmatch("<0x..>", t) else t.replace("▁", " ").encode() for t in tokens]
    return b"".join(parts).decode()


def runs(encoded):
    """The supervised tokens, in the runs in which they follow each other."""
    at = np.flatnonzero(encoded.weights)
    return [encoded.tokens[part] for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(part)]


SAYINGS = [
    "It is a cat",
    " two",
    "  ",
    "\n",
    "\n\n",
    "x",
    ".",
    ":",
    "1 2",
    "日本",
    "🎉",
    "naïve",
    "\t",
    "\xa0",
    "é",
    "''s",
]
SAYINGS += [
    "USER:",
    "ASSISTANT:",
    "[/INST]",
    "]",
    ">",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>\n",
    "<end_of_turn>",
    "Out:",
    "{}",
]
said = st.lists(st.sampled_from(SAYINGS), max_size=5).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    layout=st.sampled_from(["llava", "prismatic", "images_first"]),
    texts=st.lists(said, min_size=2, max_size=6),
    images=st.integers(0, 2),
    system=st.sampled_from(["", "Be brief.", " <s> "]),
)
@example("chatml", "llava", ["q", "\n\n"], 0, "")
@example("plain", "llava", ["q", " \n"], 1, "")
def test_answers_are_supervised_and_prompts_are_prefixes(tokenizers, kind, name, layout, texts, images, system):
    tokenizer, template = tokenizers[kind], TEMPLATES[name]
    texts = texts[: 2 if template.style == "plain" else len(texts) // 2 * 2]
    # Where nothing is written around turns, empty ones cannot be told apart.
    assume(template.style != "bare" or template.user or all(map(str.strip, texts)))
    for i in range(images):
        texts[-2 if i else 0] += "<image>"
    first = [{"from": "system", "value": system}] if system and template.system_format else []
    talk = first + turns(*texts)
    encoded = encode({"id": 1, "image": ["x"] * images, "conversations": talk}, tokenizer, name, layout)
    assert (encoded.tokens == IMAGE_TOKEN).sum() == images

    stripped = layout != "llava" or "assistant" in template.strip
    answers = [text.strip() if stripped else text for text in texts[1::2]]
    end = template.end.replace("{eos}", "</s>")
    wanted = [f"{template.lead}{answer}{end}" for answer in answers]
    if template.style == "plain" and kind in ("llama-legacy", "llama", "phi-3") and wanted != ["</s>"]:
        wanted[0] = f" {wanted[0]}"  # which SentencePiece puts in front of every text
    if kind == "llama-legacy" and template.ask.endswith(template.specials):
        wanted = [f" {one}" if one != end else one for one in wanted]  # and this one behind every special token
    assert [written(tokenizer, run) for run in runs(encoded)] == wanted

    starts = np.flatnonzero(np.diff(encoded.weights, prepend=0) > 0)
    for i in range(1, len(texts), 2):
        tokens = prompt(talk[: len(first) + i], tokenizer, name, layout)
        if layout != "llava" and "<image>" in "".join(texts[i:]):
            continue  # the images of later turns stand in front of everything
        np.testing.assert_array_equal(tokens, encoded.tokens[: len(tokens)])
        assert len(tokens) == starts[i // 2]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain", "plain_eos", "blip2"}))
def test_the_end_of_turn_stops_an_answer(tokenizers, name):
    for tokenizer in tokenizers.values():
        encoded = encode(record("<image>\nWhat?", "a cat", image="x"), tokenizer, name)
        assert encoded.tokens[encoded.weights > 0][-1] == stop_ids(tokenizer, name)[0]


def test_the_newer_templates_to_the_letter():
    two = turns("<image>\nq", " a ", "r", "b")
    asked, answered = "<|im_start|>user\n", "<|im_start|>assistant\n"
    talk = f"{asked}<image>\nq<|im_end|>\n{answered}a<|im_end|>\n{asked}r<|im_end|>\n{answered}b<|im_end|>\n"
    system = "<|im_start|>system\n{}<|im_end|>\n"
    assert render(two, "qwen").text == system.format("You are a helpful assistant.") + talk
    alibaba = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert render(two, "qwen_2_5").text == system.format(alibaba) + talk
    direct = ("<|im_start|>system\nAnswer the questions.<|im_end|>\n" + talk).replace("<|im_end|>\n", "<|im_end|>")
    assert render(two, "chatml_direct").text == direct
    cambrian = render(two, "cambrian_chatml").text
    assert cambrian.startswith(
        "<|im_start|>system\nYou are Cambrian, a highly intelligent multimodal AI trained by NYU"
    )
    assert cambrian.endswith("open-ended questions.<|im_end|>" + direct.partition("<|im_end|>")[2])
    phi = "<|user|>\n<image>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\nb<|end|>\n"
    assert render(two, "phi_3").text == phi
    brief = [{"role": "system", "content": "Be brief."}, *two]
    assert render(brief, "phi_3").text == f"<|system|>\nBe brief.<|end|>\n{phi}"
    user, model = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    gemma = f"<image>\nq{model}a<end_of_turn>\n{user}r{model}b<end_of_turn>\n"
    assert render(two, "gemma").text == f"<bos>{user}{gemma}"
    assert render(brief, "gemma").text == f"<bos>{user}Be brief.\n\n{gemma}"


def test_a_token_across_the_start_of_an_answer_is_refused(tmp_path):
    """A tokenizer that splits nothing may join the newline of the prompt with the answer, which inference never shows."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, trainers

    marks = ["<|im_start|>", "<|im_end|>"]
    raw = Raw(models.BPE())
    raw.decoder = decoders.Fuse()
    raw.train_from_iterator(["user\nIt", "assistant\nIt"] * 9, trainers.BpeTrainer(special_tokens=marks, vocab_size=60))
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert prompt([{"role": "user", "content": "It"}], tokenizer, "chatml")[-1] == tokenizer.encode("assistant\n")[-1]
    with pytest.raises(DataError, match=r"record 'r1': .*one token of the end of the prompt and .*'assistant\\nIt'"):
        encode(record("It", "It"), tokenizer, "chatml")
    encode(record("It", "tI"), tokenizer, "chatml")
