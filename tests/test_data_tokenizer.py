import json

import numpy as np
import pytest
from data_helpers import chatml_tokenizer, llama_tokenizer

from jaxvlm.data import DataError
from jaxvlm.data.tokenizer import Tokenizer, tokenizer_from_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Tokenizer(llama_tokenizer(tmp_path_factory.mktemp("llama")))


def test_special_ids_and_bos_rule(tmp_path, llama):
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.unk_id) == (1, 2, None, 0)
    assert llama.adds_bos  # the post-processor says so
    assert not Tokenizer(llama_tokenizer(tmp_path / "a", adds_bos=False)).adds_bos  # the config says no, and wins
    chatml = Tokenizer(chatml_tokenizer(tmp_path / "b"))
    assert chatml.bos == "<|im_start|>" and not chatml.adds_bos
    assert (chatml.pad_id, chatml.eos_id) == (2, 2) and chatml.id("<|im_end|>") == 2
    assert llama.vocab_size == 1 + max(llama._tokenizer.get_vocab().values())


def test_special_tokens_map_is_the_second_place_to_look(tmp_path):
    folder = llama_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).eos_id is None
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    assert Tokenizer(folder).eos_id == 2 and Tokenizer(folder).adds_bos


@pytest.mark.parametrize("text", ["What is this?", "naïve 日本 🎉 12\n\n x", "  two spaces", "a</s>b", ""])
def test_encode_matches_the_library_and_decodes_back(llama, text):
    ids, offsets = llama.encode(text, offsets=True)
    assert ids == llama._tokenizer.encode(text, add_special_tokens=False).ids == llama.encode(text)
    assert offsets.shape == (len(ids), 2) and (offsets[:, 1] <= len(text)).all()
    said = text.replace("</s>", "</s> ")  # a legacy Llama tokenizer starts every piece with a space
    assert llama.decode(ids, skip_special=False) == said
    assert llama.decode([-200, *ids]) == said.replace("</s>", "")


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
def test_literal_encoding_keeps_the_named_specials_only(tmp_path, scheme):
    tokenizer = Tokenizer(llama_tokenizer(tmp_path, scheme))
    text = "USER: what</s>USER: is </s> this"
    both, first, plain = tokenizer.encode_batch([(text, [(10, 14), (23, 27)]), (text, [(10, 14)]), (text, None)])
    assert both[0] == plain[0] == tokenizer.encode(text)
    np.testing.assert_array_equal(both[1], plain[1])
    ids, offsets = first
    assert ids.count(2) == 1 and offsets[ids.index(2)].tolist() == [10, 14]
    assert tokenizer.decode(ids, skip_special=False).replace(" USER", "USER") == text.replace(" USER", "USER")
    assert np.all(np.diff(offsets[:, 0]) >= 0) and offsets[-1, 1] == len(text)


def test_errors_name_the_fix(tmp_path, llama):
    with pytest.raises(DataError, match="prompt.tokenizer"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no tokenizer.json \(it has tokenizer.model\).*save_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match="no token '<nope>'"):
        llama.id("<nope>")


def test_tokenizer_from_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    original = Tokenizer(chatml_tokenizer(tmp_path))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = original._tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)

    def write(pre):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in original.special_tokens else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "m.gguf"

    rebuilt = tokenizer_from_gguf(write("smollm"))
    text = "<|im_start|>user\nWhat's 2024, naïve 日本 🎉?<|im_end|>\n"
    assert rebuilt.encode(text).ids == original.encode(text)
    assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(DataError, match="split by 'qwen2'"):
        tokenizer_from_gguf(write("qwen2"))
