"""A tokenizer.json as token ids with character offsets, and the rebuilding of one from a GGUF file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxvlm.data import DataError
from jaxvlm.templates import own_template


class Tokenizer:
    """A folder with a `tokenizer.json`, or that file itself.

    Special tokens are read from `tokenizer_config.json`, then `special_tokens_map.json`.

    `chat_template` is its own template in Jinja, if there is one beside it.

    `adds_bos` is the rule for the beginning-of-sequence token: `add_bos_token` of `tokenizer_config.json`
    decides if it is there; otherwise the post-processor of tokenizer.json does (Llama's puts `<s>` in front;
    SmolLM2's and Qwen's put nothing, because ChatML writes its own `<|im_start|>`).

    Raises `DataError` if there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        file = Path(path)
        if file.suffix != ".json":
            file = file / "tokenizer.json"
        self.path = str(file)
        self._text = _read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._literal: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None

        added = self._tokenizer.get_added_tokens_decoder()
        specials = sorted((token for token in added.values() if token.special), key=lambda one: -len(one.content))
        self.special_tokens = frozenset(token.content for token in specials)
        # With the white space that they swallow.
        swallow = [(r"\s*" * token.lstrip, re.escape(token.content), r"\s*" * token.rstrip) for token in specials]
        self.special_pattern = re.compile("|".join(map("".join, swallow)) or r"(?!)")

        # SentencePiece puts a space in front of every text; Metaspace does not where there is one already.
        by_metaspace = re.search(r'"prepend_scheme":"(first|always)"', self._tokenizer.to_str())
        self._spaces = (" ", "▁") if by_metaspace else ()
        settings = special_settings(file.parent)
        self.chat_template = own_template(file.parent)
        self.bos, self.bos_id = self._special(settings, "bos_token")
        self.eos, self.eos_id = self._special(settings, "eos_token")
        self.pad, self.pad_id = self._special(settings, "pad_token")
        self.unk, self.unk_id = self._special(settings, "unk_token")
        adds_bos = settings.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        self.adds_bos = bool(adds_bos) and self.bos_id is not None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint_text(self) -> str:
        """All that decides the ids of a conversation."""
        return f"{self._text}|{self.bos_id}|{self.eos_id}|{self.adds_bos}|{self.chat_template or ''}"

    def id(self, token: str) -> int:
        """The id of one token, by its exact string. Raises `DataError` if there is none."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise DataError(f"{self.path} has no token {token!r}.")
        return number

    def encode(self, text: str, offsets: bool = False) -> list[int] | tuple[list[int], np.ndarray]:
        """Token ids of `text`, without BOS or EOS; with `offsets` also the characters of each, int [n, 2]."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return (encoding.ids, _offsets(encoding.offsets)) if offsets else encoding.ids

    def encode_batch(
        self, texts: Sequence[tuple[str, Sequence[tuple[int, int]] | None]]
    ) -> list[tuple[list[int], np.ndarray]]:
        """(ids, offsets) of many (text, specials), on all cores.

        `specials` are the character spans where special tokens stand; whatever looks like one elsewhere is
        plain text. None: every special token in the text becomes its id.
        """
        spaced = [text.startswith(self._spaces) for text, _ in texts]
        texts = [
            ("▁" + text, specials and [(start + 1, end + 1) for start, end in specials]) if more else (text, specials)
            for more, (text, specials) in zip(spaced, texts, strict=True)
        ]
        encoded = zip(spaced, self._encode_batch(texts), strict=True)
        return [(ids, np.maximum(offsets - 1, 0) if more else offsets) for more, (ids, offsets) in encoded]

    def _encode_batch(self, texts: Sequence[tuple[str, Sequence[tuple[int, int]] | None]]) -> list:
        plain = [text for text, specials in texts if specials is None]
        if len(plain) == 1:  # no threads for one text, so that a process may still fork
            encodings = iter([self._tokenizer.encode(plain[0], add_special_tokens=False)])
        else:
            encodings = iter(self._tokenizer.encode_batch(plain, add_special_tokens=False))
        results = []
        for text, specials in texts:
            if specials is None:
                encoding = next(encodings)
                results.append((encoding.ids, _offsets(encoding.offsets)))
            else:
                results.append(self._encode_literal(text, specials))
        return results

    def _encode_literal(self, text: str, specials: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        ids, spans = [], []
        for tokenizer, start, end in self._parts(text, specials):
            encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids
            spans += [(a + start, b + start) for a, b in encoding.offsets]
        return ids, _offsets(spans)

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of token ids (negative ids, as `IMAGE_TOKEN`, are left out)."""
        return self._tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=skip_special)

    def _parts(self, text: str, specials: Sequence[tuple[int, int]]):
        """Splits `text` into (tokenizer, start, end): special tokens apart, the rest read literally."""
        if self._literal is None:
            first = tokenizers.Tokenizer.from_str(self._text)
            # Added tokens cut a text in pieces, and Metaspace's "first" scheme means the first piece of all.
            later = tokenizers.Tokenizer.from_str(
                first.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
            )
            for tokenizer in (first, later):
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.encode_special_tokens = True
            self._literal = (first, later)
        done = 0
        for start, end in [*specials, (len(text), len(text))]:
            if done < start:
                yield self._literal[done > 0], done, start
            if start < end:
                yield self._tokenizer, start, end
            done = end

    def _special(self, settings: dict, name: str) -> tuple[str | None, int | None]:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return (token, self._tokenizer.token_to_id(token)) if token else (None, None)


def stripped(match: re.Match) -> tuple[int, int]:
    """The span of a match of `special_pattern` without the white space that the token swallows."""
    return match.start() + len(match[0]) - len(match[0].lstrip()), match.start() + len(match[0].rstrip())


def _offsets(spans: list[tuple[int, int]]) -> np.ndarray:
    return np.asarray(spans, np.int64).reshape(-1, 2)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not file.parent.is_dir():
        raise DataError(f"There is no tokenizer folder {file.parent}: `prompt.tokenizer` must name one.")
    found = f" (it has {', '.join(sorted(p.name for p in file.parent.iterdir())[:8]) or 'nothing'})"
    raise DataError(
        f"{file.parent} has no tokenizer.json{found}. Take it from the model's page, or make it from an older"
        " tokenizer.model once, where transformers is installed:"
        " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def special_settings(folder: Path) -> dict:
    """What a tokenizer's folder says beside its tokenizer.json: special tokens and options."""
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one wins
        file = folder / name
        if file.is_file():
            try:
                settings |= {key: value for key, value in json.loads(_read(file)).items() if value is not None}
            except (json.JSONDecodeError, AttributeError) as error:
                raise DataError(f"{file} is not a JSON object: {error}") from error
    return settings


# How `tokenizer.ggml.pre` splits text before BPE; "smollm" checked against transformers (assets §1).
_GGUF_SPLITS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def tokenizer_from_gguf(gguf_path: str | os.PathLike) -> tokenizers.Tokenizer:
    """Rebuilds the tokenizer stored in a GGUF file, for byte-level BPE vocabularies (assets §1).

    Raises `DataError` for a vocabulary of another kind.
    """
    from gguf import GGUFReader  # an optional package, needed once per asset

    fields = GGUFReader(str(gguf_path)).fields

    def value(key: str, default=None):
        return fields[key].contents() if key in fields else default

    kind, split = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in _GGUF_SPLITS:
        raise DataError(
            f"{gguf_path} holds a {kind!r} vocabulary split by {split!r}; only byte-level BPE split by"
            f" {', '.join(map(repr, _GGUF_SPLITS))} is rebuilt."
            " Take tokenizer.json from the model's page instead."
        )
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _GGUF_SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == control]
    )
    return tokenizer
