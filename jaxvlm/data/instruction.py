"""The instruction of each image, for a Q-Former that reads it beside the image (InstructBLIP; Dai et al. 2023, §2.3).

An image's instruction is the text of the human turn that its `<image>` stands in: of a question about an image what
InstructBLIP's own code (LAVIS) and its processor in transformers give to both tokenizers, the answer never. What is said
later does not change it, so a conversation's visual tokens stay as they are. It has a tokenizer of its own (a BERT's, with
[CLS] and [SEP]); a long one loses its start or its end, as that tokenizer's `truncation_side` says: InstructBLIP's loses
its start, in LAVIS from 128 tokens on, in transformers only where the caller asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from jaxvlm.config import ModelConfig, PromptConfig
from jaxvlm.data import DataError
from jaxvlm.data.conversation import image_instructions
from jaxvlm.data.tokenizer import special_settings


class InstructionTokenizer:
    """A folder with a `tokenizer.json`, or with BERT's `vocab.txt`, that cuts a text to `length` tokens."""

    def __init__(self, folder: str | Path, length: int):
        folder, self.length = Path(folder), length
        settings = special_settings(folder) if folder.is_dir() else {}
        self._tokenizer = _read(folder, settings.get("do_lower_case", True))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length, direction=settings.get("truncation_side", "right"))
        self.fingerprint_text = self._tokenizer.to_str()  # all that decides the ids, the length among it
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, conversations: Sequence[dict]) -> list[np.ndarray]:
        """The instruction of each image of a conversation, int32 [n], its special tokens included."""
        return [np.asarray(self._tokenizer.encode(text).ids, np.int32) for text in image_instructions(conversations)]


def _read(folder: Path, lowercase: bool) -> tokenizers.Tokenizer:
    file, vocab = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        if vocab.is_file():
            bert = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
            return tokenizers.Tokenizer.from_str(bert.to_str())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"prompt.qformer_tokenizer: {folder} cannot be read: {error}") from error
    raise DataError(
        f"prompt.qformer_tokenizer = {str(folder)!r} is no folder with a tokenizer.json or a vocab.txt. Take the folder "
        "'qformer_tokenizer' from the model's page."
    )


def instruction_tokenizer(model: ModelConfig, prompt: PromptConfig) -> InstructionTokenizer | None:
    """What a model's connector reads instructions with; None if it reads none. Raises `DataError` if they do not fit."""
    reader = model.connector.qformer
    if not model.connector.reads_text:
        return None
    if not prompt.qformer_tokenizer:
        raise DataError(
            "The connector reads the instruction beside the image (connector.qformer.text_vocab_size = "
            f"{reader.text_vocab_size}), so prompt.qformer_tokenizer must name the folder of its tokenizer."
        )
    if not 2 < prompt.qformer_length <= reader.text_positions:
        raise DataError(
            f"prompt.qformer_length = {prompt.qformer_length} must be more than [CLS] and [SEP] and no more than "
            f"connector.qformer.text_positions = {reader.text_positions}."
        )
    tokenizer = InstructionTokenizer(prompt.qformer_tokenizer, prompt.qformer_length)
    if tokenizer.vocab_size > reader.text_vocab_size:
        raise DataError(
            f"{prompt.qformer_tokenizer} has {tokenizer.vocab_size} tokens, but the Q-Former knows "
            f"{reader.text_vocab_size} (connector.qformer.text_vocab_size): it belongs to another model."
        )
    return tokenizer


def instruction_fields(
    instructions: Sequence[np.ndarray], tiles: Sequence[int], slots: int, length: int
) -> dict[str, np.ndarray]:
    """A row's 'qformer_tokens' int32 [T, L] and 'qformer_mask' bool [T, L]: an image's instruction at each of its tiles.

    `tiles` are the tiles of each image; T is `slots`, L `length`.
    """
    tokens, mask = np.zeros((slots, length), np.int32), np.zeros((slots, length), bool)
    tile = 0
    for ids, count in zip(instructions, tiles, strict=True):
        place = (slice(tile, tile + count), slice(len(ids)))
        tokens[place], mask[place] = ids, True
        tile += count
    return {"qformer_tokens": tokens, "qformer_mask": mask}
