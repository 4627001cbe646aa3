"""Ids and labels of the Vicuna and Llama-2 templates against LLaVA's published rules, written anew (recipes §1.2 P1, P4-P7).

LLaVA tokenises with SentencePiece itself; so does the oracle here, over the same vocabulary: BPE on a text whose spaces
are `▁`, with one more `▁` in front of the text (and, where the tokenizer is a `legacy` one, behind each special token).
"""

import json
import re

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record, turns
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import models

from jaxvlm.data.conversation import IMAGE_TOKEN, encode, render
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.templates import TEMPLATES

IGNORED = -100
UNK, BOS, EOS = 0, 1, 2  # LLaVA pads with UNK
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class SentencePiece:
    """The slow tokenizer of a Llama folder: ids of a text, BOS in front."""

    def __init__(self, folder, legacy):
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        self.bpe = Raw(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        self.legacy = legacy

    def __call__(self, text):
        ids = [BOS]
        for i, piece in enumerate(re.split("(<unk>|<s>|</s>)", text)):
            if i % 2:
                ids.append({"<unk>": UNK, "<s>": BOS, "</s>": EOS}[piece])
            elif piece:
                piece = f" {piece}" if i == 0 or self.legacy else piece
                ids += self.bpe.encode(piece.replace(" ", "▁")).ids
        return ids


def with_images(tokenizer, text):
    """The chunks between images tokenised apart, one BOS, -200 between."""
    first, *rest = [tokenizer(chunk) for chunk in text.split("<image>")]
    return first + [i for chunk in rest for i in (IMAGE_TOKEN, *chunk[1:])]


def labels(tokenizer, text, sep, vicuna):
    """LLaVA's masks: lengths of the rounds and of what is in front of the answers, tokenised anew; None where they do not
    add up, and LLaVA ignores the sample.
    """
    count = (lambda part: len(with_images(tokenizer, part))) if "<image>" in text else lambda part: len(tokenizer(part))
    ids = np.asarray(with_images(tokenizer, text))
    found, done = ids.copy(), 1
    found[:1] = IGNORED
    for number, part in enumerate(text.split("</s>")):
        pieces = part.split(sep)
        if not part or len(pieces) != 2:
            break
        fewer = int(vicuna and number > 0 and not tokenizer.legacy)  # `USER` is one token less than `▁USER`
        found[done : done + count(pieces[0] + sep) - 2 - fewer] = IGNORED
        done += count(part) - fewer
    found[done:] = IGNORED
    return found if done == (ids != UNK).sum() else None


def moved(text):
    """LLaVA puts a turn's image in front."""
    return ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text


def vicuna(texts):
    said = [f"USER: {moved(text)} " if i % 2 == 0 else f"ASSISTANT: {text}</s>" for i, text in enumerate(texts)]
    return f"{SYSTEM} {''.join(said)}"


def llama_2(texts):
    system = f"<<SYS>>\n{TEMPLATES['llava_llama_2'].system}\n<</SYS>>\n\n"
    said = [
        f"<s>[INST] {'' if i else system}{moved(text)} [/INST]" if i % 2 == 0 else f" {text} </s>"
        for i, text in enumerate(texts)
    ]
    return "".join(said).removeprefix("<s>")


def sample(texts):
    images = sum("<image>" in text for text in texts)
    return record(*texts, image=[f"{i}.png" for i in range(images)])


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def pair(request, tmp_path_factory):
    """Our tokenizer and LLaVA's, of one vocabulary."""
    folder = llama_tokenizer(tmp_path_factory.mktemp("llama"), "legacy" if request.param else "first")
    return Tokenizer(folder), SentencePiece(folder, request.param)


WORDS = [
    "It is a cat",
    "USER",
    "USER:",
    "ASSISTANT",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "12",
    "naïve",
    "日本",
    "🎉",
    "<s",
    "x",
]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
asked = st.one_of(words, st.tuples(words, words).map("<image>".join), st.sampled_from(["<image>", "<image>\nq"]))


@settings(max_examples=100)
@given(rounds=st.lists(st.tuples(asked, words), min_size=1, max_size=4))
@example(rounds=[("<image>\nWhat is this?", "It is a cat.")])
@example(rounds=[("What colour?\n<image>", "teal"), ("And now?", "red, 12 blue")])
@example(rounds=[("  keep  spaces ", " two  spaces in front"), ("x  ", "y  ")])
@example(rounds=[("a<image>b", "\nnewline first\n\nand last\n"), ("<image>", "ok"), ("c", "USER: no")])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2"])
def test_ids_and_labels_are_llavas(pair, template, rounds):
    ours, theirs = pair
    texts = [text for both in rounds for text in both]
    text, sep = (vicuna(texts), " ASSISTANT: ") if template == "vicuna_v1" else (llama_2(texts), "[/INST] ")
    wanted = labels(theirs, text, sep, template == "vicuna_v1")
    encoded = encode(sample(texts), ours, template)
    assert encoded.tokens.tolist() == with_images(theirs, text)
    assert encoded.tokens.dtype == np.int32 and encoded.weights.dtype == np.float32
    assert wanted is not None, "no sample of these is one that LLaVA ignores"
    np.testing.assert_array_equal(encoded.weights > 0, wanted != IGNORED)


@given(caption=words)
@example(caption="日本\nx")
def test_stage_1_is_llavas(pair, caption):
    """The question is dropped; all that follows the image is learned."""
    ours, theirs = pair
    encoded = encode(record("Describe it.\n<image>", caption, image="a.png"), ours, "plain")
    assert encoded.tokens.tolist() == with_images(theirs, f"<image>{caption}\n")
    np.testing.assert_array_equal(encoded.weights, [0, 0] + [1] * (len(encoded.tokens) - 2))


@pytest.mark.parametrize(
    "texts",
    [
        ("q", "I say </s> twice"),
        ("what does ASSISTANT: mean?", "a role"),
        ("is <unk> a token?", "yes"),
        ("q", "a", "", "b"),  # LLaVA's text of an empty turn lacks what follows it
    ],
)
def test_what_llava_ignores_keeps_its_labels(pair, texts):
    """`tokenization mismatch`: of these samples LLaVA learns nothing. Here the answers are learned, as ever."""
    ours, theirs = pair
    text = vicuna(texts) if "" not in texts else vicuna(texts).replace("USER:  ", "USER:")
    assert labels(theirs, text, " ASSISTANT: ", True) is None
    encoded = encode(record(*texts), ours, "vicuna_v1")
    said = ours.decode(encoded.tokens[encoded.weights > 0], skip_special=False)
    assert said.replace("</s> ", "</s>") == "".join(f"{answer}</s> " for answer in texts[1::2]).replace("</s> ", "</s>")


def test_llavas_rule_needs_vicunas_vocabulary(tmp_path):
    """With `USER` in as many tokens as `▁USER`, LLaVA's correction for newer tokenizers is wrong, and it ignores the sample."""
    folder = llama_tokenizer(tmp_path, "first")
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"].remove(["US", "ER"])
    file.write_text(json.dumps(state))
    texts = ("q", "a", "r", "b")
    assert labels(SentencePiece(folder, False), vicuna(texts), " ASSISTANT: ", True) is None
    assert encode(record(*texts), Tokenizer(folder), "vicuna_v1").weights.sum() == 4  # two answers, each with its end


def test_the_texts_are_llavas():
    texts = ("a<image>", "b", " c ", "d")
    assert render(turns(*texts), "vicuna_v1").text == vicuna(texts)
    assert render(turns(*texts), "llava_llama_2").text == llama_2(texts)
