"""Tokenizers and records for the data tests, made on the spot: no hub, no files."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is this? ASSISTANT: It is a cat, and the cat is on a mat.",
    "What colour is the triangle? teal blue red 1 2 3 yes no In: Out: [INST] [/INST]",
    "user\nassistant\nsystem\nAnswer the question using a single word or phrase.",
] * 4


# Vicuna's vocabulary has `USER` as one token and `▁USER` as two, which LLaVA's rule for labels counts on.
USER_MERGES = [("E", "R"), ("▁", "U"), ("▁U", "S"), ("U", "S"), ("US", "ER")]


def llama_tokenizer(
    folder: Path,
    scheme: str = "legacy",
    adds_bos: bool | None = None,
    specials: tuple[str, ...] = (),
    rstrip: bool = False,
) -> Path:
    """A folder with a Llama-like tokenizer: BPE, byte fallback, `▁`, `<s>` in front by the post-processor.

    `specials` are further ones; `rstrip`: they swallow the white space behind them, as Phi-3's do.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = [line.replace("USER", "U S E R") for text in CORPUS for line in text.split("\n")]
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"])
    )
    model = json.loads(trained.to_str())["model"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != "<unk>"]
    merges = USER_MERGES + [pair for merge in model["merges"] if (pair := tuple(merge)) not in USER_MERGES]
    vocab = list(dict.fromkeys(vocab + ["".join(merge) for merge in USER_MERGES]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    more = [AddedToken(t, normalized=False, special=True, rstrip=rstrip) for t in specials]
    tokenizer.add_special_tokens(more)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None}
    config |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    return _save(tokenizer, config, folder)


def gemma_tokenizer(folder: Path, specials: tuple[str, ...]) -> Path:
    """A folder with a Gemma-like tokenizer: spaces are `▁`, none is put in front, newlines merge among themselves."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = [f"▁{word}" for text in CORPUS for word in text.split()]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *bytes_, "\n\n", "\n"]
    )
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []  # the bytes and newlines are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", *specials)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return _save(tokenizer, config, folder)


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chatml_tokenizer(folder: Path) -> Path:
    """A folder with a SmolLM2-like tokenizer."""
    return byte_tokenizer(folder, CHATML, "<|im_start|>", "<|im_end|>")


# How Llama 3 and Qwen 2 split a text: words with the one character before them, numbers, signs with the newlines behind
# them, white space.
NEWER_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_tokenizer(folder: Path, specials: tuple[str, ...], bos: str, eos: str, split: str = "") -> Path:
    """A folder with a tokenizer of byte-level BPE, split as GPT-2 does with digits apart, or by `split`; no BOS of its own."""
    tokenizer = Tokenizer(models.BPE())
    if split:
        pieces = pre_tokenizers.Split(Regex(split), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        pieces = pre_tokenizers.Digits(individual_digits=True)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, last])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return _save(tokenizer, {"bos_token": bos, "eos_token": eos, "pad_token": eos}, folder)


KINDS = ("llama-legacy", "llama", "phi-3", "gemma", "gpt-2", "qwen")


def tokenizer_kind(kind: str, folder: Path, specials: tuple[str, ...]) -> Path:
    """A folder with a tokenizer like those of a family, which has these special tokens beside `<s>` and `</s>`."""
    if kind == "gemma":
        return gemma_tokenizer(folder, specials)
    if kind in ("gpt-2", "qwen"):
        split = NEWER_SPLIT if kind == "qwen" else ""
        return byte_tokenizer(folder, ("<s>", "</s>", *specials), "<s>", "</s>", split)
    scheme = "legacy" if kind == "llama-legacy" else "first"
    return llama_tokenizer(folder, scheme, specials=specials, rstrip=kind == "phi-3")


def _save(tokenizer: Tokenizer, config: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(*texts: str, id: object = "r1", image: object = None) -> dict:
    return {"id": id, "conversations": turns(*texts)} | ({"image": image} if image else {})
