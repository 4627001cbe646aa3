"""Tokenizers and records for the data tests, made on the spot: no hub, no files."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
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


def llama_tokenizer(folder: Path, scheme: str = "legacy", adds_bos: bool | None = None) -> Path:
    """A folder with a Llama-like tokenizer: BPE, byte fallback, `▁`, `<s>` in front by the post-processor."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"])
    )
    model = json.loads(trained.to_str())["model"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != "<unk>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=[tuple(merge) for merge in model["merges"]],
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None}
    config |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    return _save(tokenizer, config, folder)


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chatml_tokenizer(folder: Path) -> Path:
    """A folder with a SmolLM2-like tokenizer."""
    return byte_tokenizer(folder, CHATML, "<|im_start|>", "<|im_end|>")


def byte_tokenizer(folder: Path, specials: tuple[str, ...], bos: str, eos: str) -> Path:
    """A folder with a tokenizer of byte-level BPE, digits apart, no BOS of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
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


def _save(tokenizer: Tokenizer, config: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(*texts: str, id: object = "r1", image: object = None) -> dict:
    return {"id": id, "conversations": turns(*texts)} | ({"image": image} if image else {})
