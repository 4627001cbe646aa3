"""Answering requests: tokens and images in, text out; batched, streamed, or as logits.

A request is `{"messages": [...], "images": [...], "id"?: ...}` in the usual chat form; see `requests.plain`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxvlm.config import ModelConfig, PromptConfig, to_dict
from jaxvlm.data import conversation, image
from jaxvlm.data.instruction import instruction_fields, instruction_tokenizer
from jaxvlm.data.layout import splice
from jaxvlm.data.tiles import ImagePlan, image_plans, image_tiles, tiling
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.infer import decoding, shapes
from jaxvlm.infer.answers import RequestError
from jaxvlm.infer.detokenizer import Detokenizer, cut_at
from jaxvlm.infer.requests import plain
from jaxvlm.infer.sampler import row_keys
from jaxvlm.models.vlm import abstract_params, logical_axes
from jaxvlm.parallel.rules import INFERENCE, logical_rules, param_shardings, put_batch

BATCH_SIZE = 16
VISUAL_CACHE_BYTES = 512 * 2**20  # on the host; a chat and ten questions about one image encode it once
TILES_PER_PASS = 32


class Logits(NamedTuple):
    """What `Engine.logits` returns."""

    values: np.ndarray  # float32 [B, S, V]
    mask: np.ndarray  # bool [B, S], the positions that are not padding


class Prompt(NamedTuple):
    """A request as the decoder takes it; n tokens, the visual ones included."""

    tokens: np.ndarray  # int32 [n]
    visual_index: np.ndarray  # int32 [n], -1 for text, -2 for a row end
    blend: tuple[np.ndarray, np.ndarray] | None  # as in `VLM.embed`, int32 and float32 [n, 4]
    images: list
    plans: list[ImagePlan]  # of the images
    instructions: list[np.ndarray]  # of the images, int32 [n], where the connector reads them; otherwise empty
    row: int  # seeds the row's random numbers, whatever batch it lands in
    answer: tuple[
        np.ndarray, np.ndarray
    ]  # next token int32 [n] and its weight float32 [n], which is 0 but in an answer


class Engine:
    """A model that answers. What `jaxvlm.load` returns.

    Attributes: `config` (ModelConfig), `prompt` (PromptConfig), `params`, `tokenizer`, `mesh`. Do not replace `params`
    of an engine in use: its image cache belongs to them. `exact` (False): batches always have `batch_size` rows and a prompt
    its own padding and places for tiles, so that an answer is computed by the same program whatever is asked beside it.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompt: PromptConfig,
        params: dict,
        tokenizer_path: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = dataclasses.replace(config, remat="none")  # nothing is differentiated here
        self.prompt = prompt
        self.params = params
        self.mesh = mesh
        self.tiling = tiling(config, prompt)
        self.tokenizer = Tokenizer(tokenizer_path or prompt.tokenizer)
        conversation.check_template(self.tokenizer, prompt.template)
        self.instructions = instruction_tokenizer(config, prompt)
        self.end_ids = conversation.stop_ids(self.tokenizer, prompt.template)
        self._visual: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._fingerprint: str | None = None
        self.exact = False

    # ------------------------------------------------------------------------------------------------------ answering

    def generate(
        self,
        requests: Sequence[dict],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Answers in the order of `requests`, without white space around them.

        Args:
            temperature: 0 takes the most likely token; above it, tokens are drawn and `top_p` and `seed` count.
            stop: texts that end an answer and are not part of it, besides the template's own end of turn.
            batch_size: rows computed at once (16).
            on_progress: called with (answered, all) after every batch.

        Raises `RequestError` before anything is computed: image count, missing image file, prompt too long.
        """
        answers = [""] * len(requests)
        done = 0
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        for batch in self.generate_batches(requests, stop=stop, batch_size=batch_size, **sampling):
            for index, text in batch:
                answers[index] = text
            done += len(batch)
            if on_progress:
                on_progress(done, len(requests))
        return answers

    def generate_batches(
        self, requests: Sequence[dict], *, stop: str | Sequence[str] | None = None, **sampling: Any
    ) -> Iterator[list[tuple[int, str]]]:
        """As `generate`, batch by batch as they finish, longest prompts first: lists of (request index, answer)."""
        stops = _stops(stop)
        for batch in self.token_batches(requests, **sampling):
            yield [(index, cut_at(self.decode(tokens), stops).strip()) for index, tokens in batch]

    def token_batches(
        self,
        requests: Sequence[dict],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """As `generate_batches`, with the answers' tokens, that which ended one included."""
        for indices, prompts, rows in self._batches(requests, batch_size):
            tokens = self._answer(prompts, rows, max_new_tokens, temperature, top_p, seed)
            yield list(zip(indices, tokens, strict=True))

    def first_logits(self, requests: Sequence[dict], batch_size: int | None = None) -> Iterator[list]:
        """As `generate_batches`, with float32 logits [V] of the answer's first token in place of the answer."""
        for indices, prompts, rows in self._batches(requests, batch_size):
            with self._on_mesh():
                inputs, lengths, _ = self._inputs(prompts, rows, 1, 0.0, 1.0, 0)
                logits, _ = decoding.prefill(
                    self.config, shapes.slots(inputs[0].shape[1]), self.params, *inputs, lengths
                )
            yield list(zip(indices, np.asarray(logits), strict=False))

    def answer_losses(self, requests: Sequence[dict], batch_size: int | None = None) -> Iterator[list]:
        """As `generate_batches`, of requests that have an `answer`, with (its tokens' mean cross-entropy, its end's with them;
        whether greedy decoding would write it) in place of the text.
        """
        for indices, prompts, rows in self._batches(requests, batch_size):
            with self._on_mesh():
                inputs = self._padded(prompts, rows, left=False)
                lengths, (targets, weights) = np.zeros(rows, np.int32), np.zeros((2, *inputs[0].shape), np.float32)
                for row, prompt in enumerate(prompts):
                    lengths[row] = length = len(prompt.tokens)
                    targets[row, :length], weights[row, :length] = prompt.answer
                answers = (lengths, targets.astype(np.int32), weights)
                found = decoding.answer_losses(self.config, self.params, *inputs, *answers)
            yield list(zip(indices, zip(*(np.asarray(one).tolist() for one in found), strict=True), strict=False))

    def _batches(self, requests: Sequence[dict], size: int | None) -> Iterator[tuple[list[int], list[Prompt], int]]:
        """(indices, prompts, rows computed at once), longest prompts first.

        Every prompt is made twice, for its length and for its batch: kept, those of VQAv2 would take a gigabyte.
        """
        made = (self._prompt(request, index) for index, request in enumerate(requests))
        sizes = [(len(prompt.tokens), sum(plan.tiles for plan in prompt.plans)) for prompt in made]
        if self.exact:
            sizes = [(shapes.bucket(width), shapes.tile_slots(tiles)) for width, tiles in sizes]
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        rows, start = self._rows(len(order), size or BATCH_SIZE), 0
        while start < len(order):
            indices = order[start : start + rows]
            if self.exact:
                indices = [index for index in indices if sizes[index] == sizes[indices[0]]]
            start += len(indices)
            yield indices, [self._prompt(requests[i], i) for i in indices], rows

    def stream(
        self,
        messages: Sequence[dict],
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
    ) -> Generator[str, None, tuple[int, bool]]:
        """The answer in pieces as it is written; joined they are what `generate` returns.

        A piece holds whole characters only: the tokens of an unfinished one are held back. The iterator returns (as the
        value of `yield from`) how many tokens were written, and whether the answer ended before its limit of them.
        """
        prompt = self._prompt({"messages": messages, "images": images}, 0)
        return self._stream(prompt, max_new_tokens, temperature, top_p, seed, _stops(stop))

    def _stream(
        self, prompt, max_new_tokens, temperature, top_p, seed, stops
    ) -> Generator[str, None, tuple[int, bool]]:
        writer = Detokenizer(self.decode, stops)
        greedy = temperature <= 0
        with self._on_mesh():
            rows = self._rows(1, 1)
            inputs, lengths, sampling = self._inputs([prompt], rows, max_new_tokens, temperature, top_p, seed)
            width = np.int32(inputs[0].shape[1])
            slots = shapes.slots(int(width) + shapes.capacity(max_new_tokens))
            logits, cache = decoding.prefill(self.config, slots, self.params, *inputs, lengths)
            token = decoding.first_token(greedy, logits, sampling)
        limit = int(sampling.limits[0])
        for at in range(limit):
            chosen = int(np.asarray(token)[0])
            if chosen in self.end_ids:
                break
            if piece := writer.add(chosen):
                yield piece
            if writer.stopped or at + 1 == limit:
                break
            with self._on_mesh():
                token, cache = decoding.next_token(
                    self.config, greedy, self.params, cache, token, lengths, width, np.int32(at), sampling
                )
        if rest := writer.finish():
            yield rest
        return at + 1, writer.stopped or chosen in self.end_ids

    def logits(self, requests: Sequence[dict]) -> Logits:
        """Logits of whole prompts, in one batch: `values[i, j]` scores the token after the j-th of request i.

        Positions count the visual tokens, which stand where the template puts the image; prompts are padded on the right.
        """
        prompts = [self._prompt(request, index) for index, request in enumerate(requests)]
        rows = self._rows(len(prompts), len(prompts))
        lengths = np.zeros(rows, np.int32)
        lengths[: len(prompts)] = [len(prompt.tokens) for prompt in prompts]
        with self._on_mesh():
            inputs = self._padded(prompts, rows, left=False)
            values = decoding.all_logits(self.config, self.params, *inputs, lengths)
        mask = np.arange(lengths.max()) < lengths[: len(prompts), None]
        return Logits(np.asarray(values)[: len(prompts), : mask.shape[1]], mask)

    def export(self, path: str | os.PathLike, format: str = "llava-hf", **options: Any) -> Path:
        """Writes the model as a folder that other projects load; see `weights.export` for formats and options."""
        from jaxvlm.weights import export

        return export(self.params, self.config, self.prompt, path, format, **options)

    @property
    def fingerprint(self) -> str:
        """A digest of the config, the tokenizers and every bit of the parameters: answers of two models cannot be mistaken."""
        if self._fingerprint is None:
            leaves = jax.tree_util.tree_leaves_with_path(self.params)
            sums = zip(leaves, jax.device_get(decoding.bit_sums([leaf for _, leaf in leaves])), strict=True)
            sums = [(jax.tree_util.keystr(path), leaf.shape, *map(int, pair)) for (path, leaf), pair in sums]
            tokens = [one.fingerprint_text for one in (self.tokenizer, self.instructions) if one]
            text = json.dumps([to_dict(self.config), self.prompt.template, tokens, sums], sort_keys=True)
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprint

    # ---------------------------------------------------------------------------------------------------- from request

    def _prompt(self, request: dict, index: int) -> Prompt:
        name = f"Request {request.get('id', index) if isinstance(request, dict) else index}"
        messages, images = plain(request, name)
        style = (self.tokenizer, self.prompt.template, self.prompt.layout)
        if "answer" in request:
            said = [*messages, {"role": "assistant", "content": request["answer"]}]
            encoded = conversation.encode({"id": name, "conversations": said, "image": ["?"] * len(images)}, *style)
        else:
            tokens = conversation.prompt(messages, *style)
            encoded = conversation.Encoded(tokens, np.zeros(len(tokens), np.float32))
        tokens = encoded.tokens
        if tokens.max() >= self.config.llm.vocab_size:
            raise RequestError(
                f"{name}: the tokenizer {self.tokenizer.path} gives the token {tokens.max()}, but the model knows "
                f"{self.config.llm.vocab_size} tokens. It belongs to another model; see prompt.tokenizer."
            )
        limit = self.config.llm.max_positions
        plans = self._plans(images)
        visual = sum(len(plan.index) for plan in plans)
        length = len(tokens) + visual - len(images)
        if length >= limit:
            parts = f", {visual} of them of images" if images else ""
            raise RequestError(
                f"{name} is {length} tokens long{parts}; the model has {limit} positions, and the answer needs some. "
                "Shorten the conversation (in a chat: /clear)."
            )
        tile_tokens, bos_id = self.tiling.tile_tokens, self.tokenizer.bos_id
        spliced = splice(encoded, plans, self.prompt.layout, tile_tokens=tile_tokens, bos_id=bos_id)
        row = zlib.crc32(str(request.get("id", index)).encode())
        blend = None if spliced.shares is None else (spliced.corners, spliced.shares)
        asked = self.instructions.encode(messages) if self.instructions else []
        answer = (spliced.targets, spliced.weights) if "answer" in request else None
        return Prompt(spliced.tokens, spliced.visual_index, blend, images, plans, asked, row, answer)

    def _plans(self, images: Sequence[Any]) -> list[ImagePlan]:
        """The tiles and visual tokens of a request's images; their sizes are looked up only if they matter."""
        sizes = [image.image_size(item) if self.tiling.sized else (0, 0) for item in images]
        return image_plans(self.tiling, sizes)

    def prompt_length(self, request: dict) -> int:
        """Tokens of a request's prompt, those of its images included. Raises `RequestError` as `generate` would."""
        return len(self._prompt(request, 0).tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, white space around it included."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids])

    # ------------------------------------------------------------------------------------------------------- to device

    def _answer(self, prompts, rows, max_new_tokens, temperature, top_p, seed) -> list[list[int]]:
        """Token ids of each prompt's answer."""
        with self._on_mesh():
            inputs, lengths, sampling = self._inputs(prompts, rows, max_new_tokens, temperature, top_p, seed)
            room, greedy = shapes.capacity(max_new_tokens), temperature <= 0
            slots = shapes.slots(inputs[0].shape[1] + room)
            logits, cache = decoding.prefill(self.config, slots, self.params, *inputs, lengths)
            out, _ = decoding.decode(self.config, room, greedy, self.params, cache, logits, lengths, sampling)
        return [[int(token) for token in row if token >= 0] for row in np.asarray(out)[: len(prompts)]]

    def _inputs(self, prompts: Sequence[Prompt], rows: int, max_new_tokens, temperature, top_p, seed):
        """Left-pads prompts into a batch of `rows` (the last of which may be empty): (inputs of prefill, sampling)."""
        lengths, limits, row_ids = (
            np.ones(rows, np.int32),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.uint32),
        )
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt.tokens)
            limits[row] = min(max_new_tokens, self.config.llm.max_positions - lengths[row])
            row_ids[row] = prompt.row
        ends = np.asarray(self.end_ids or (-1,), np.int32)
        sampling = decoding.Sampling(
            row_keys(seed, row_ids), np.float32(max(temperature, 1e-6)), np.float32(top_p), ends, limits
        )
        return self._padded(prompts, rows), lengths, sampling

    def _padded(self, prompts: Sequence[Prompt], rows: int, left: bool = True) -> tuple:
        """Prompts as a batch of `rows`, padded to a common length: tokens, visual_index, visual tokens and blend.

        Without any image all but the tokens are None.
        """
        width = shapes.bucket(max(len(prompt.tokens) for prompt in prompts))
        tokens, index = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        corners, shares = np.zeros((2, rows, width, 4) if self.tiling.blends else (2, 0))
        corners, shares = corners.astype(np.int32), shares.astype(np.float32)
        for row, prompt in enumerate(prompts):
            length = len(prompt.tokens)
            place = (row, slice(width - length, width) if left else slice(length))
            tokens[place], index[place] = prompt.tokens, prompt.visual_index
            if prompt.blend:
                corners[place], shares[place] = prompt.blend
        visual = self._visual_rows(prompts, rows)
        if visual is None:
            return self._put(tokens), None, None, None
        blend = (self._put(corners), self._put(shares)) if self.tiling.blends else None
        return self._put(tokens), self._put(index), self._put(visual), blend

    def _visual_rows(self, prompts: Sequence[Prompt], rows: int) -> np.ndarray | None:
        """Visual tokens of a batch, [rows, T * P, D]; None if no prompt has an image."""
        most = max(sum(plan.tiles for plan in prompt.plans) for prompt in prompts)
        if not most:
            return None
        slots = shapes.tile_slots(most)
        found = self._encode_images(
            [pair for prompt in prompts for pair in zip(prompt.images, prompt.plans, strict=True)]
        )
        visual = np.zeros((rows, slots, *found[0].shape[1:]), found[0].dtype)
        pieces = iter(found)
        for row, prompt in enumerate(prompts):
            tile = 0
            for plan in prompt.plans:
                visual[row, tile : tile + plan.tiles] = next(pieces)
                tile += plan.tiles
        if self.instructions:
            visual = self._read(visual, prompts)
        return visual.reshape(rows, -1, visual.shape[-1])

    def _read(self, features: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """Visual tokens [rows, T * P, D] of features [rows, T, N, Dv], each tile's under its request's instruction."""
        rows, slots = features.shape[:2]
        tokens, mask = np.zeros((2, rows, slots, self.instructions.length), np.int32)
        for row, prompt in enumerate(prompts):
            tiles = [plan.tiles for plan in prompt.plans]
            tokens[row], mask[row] = instruction_fields(prompt.instructions, tiles, *tokens.shape[1:]).values()
        return np.asarray(
            decoding.read_images(self.config, self.params, *(self._put(array) for array in (features, tokens, mask)))
        )

    def _encode_images(self, images: Sequence[tuple[Any, ImagePlan]]) -> list[np.ndarray]:
        """`decoding.encode_images` of each image's tiles, [t, P, D]; every distinct picture goes through the tower once."""

        def read(pair: tuple[Any, ImagePlan]) -> tuple[bytes, list[np.ndarray]]:
            item, plan = pair
            views = image_tiles(image.load_image(item), self.tiling, plan, str(item))
            views += [plan.regions] if self.tiling.cells else []
            return hashlib.sha256(b"".join(view.tobytes() for view in views)).digest(), views

        names = [(str(i) if isinstance(i, (str, os.PathLike)) else id(i), plan.grid) for i, plan in images]
        distinct = dict(zip(names, images, strict=True))
        with ThreadPoolExecutor(4) as pool:
            loaded = dict(zip(distinct, pool.map(read, distinct.values()), strict=True))
        keys = [loaded[name][0] for name in names]
        found = {key: self._visual[key] for key in keys if key in self._visual}
        missing = {key: views for key, views in loaded.values() if key not in found}
        found |= self._encode_tiles(missing)
        for key in dict.fromkeys(keys):
            self._visual[key] = found[key]
            self._visual.move_to_end(key)
        size = sum(item.nbytes for item in self._visual.values())
        while len(self._visual) > 1 and size > VISUAL_CACHE_BYTES:
            size -= self._visual.popitem(last=False)[1].nbytes
        return [found[key] for key in keys]

    def _encode_tiles(self, images: dict[bytes, list[np.ndarray]]) -> dict[bytes, np.ndarray]:
        """As `_encode_images`, of images given as views [t, s, s, 3], and their regions [t, towers, 4] after them if an
        aggregator reads these; tiles of many images share a pass.
        """
        if not images:
            return {}
        views = [np.concatenate(view) for view in zip(*images.values(), strict=True)]
        done = []
        for start in range(0, len(views[0]), TILES_PER_PASS):
            part = [view[start : start + TILES_PER_PASS] for view in views]
            count = len(part[0])
            extra = self._rows(count, TILES_PER_PASS) - count
            padded = [self._put(np.pad(view, [(0, extra), *[(0, 0)] * (view.ndim - 1)])) for view in part]
            regions = padded.pop() if self.tiling.cells else None
            done.append(np.asarray(decoding.encode_images(self.config, self.params, padded, regions))[:count])
        ends = np.cumsum([len(views[0]) for views in images.values()])
        return dict(zip(images, np.split(np.concatenate(done), ends[:-1]), strict=True))

    def _rows(self, count: int, most: int) -> int:
        """Rows computed at once for `count` of them: `most`, or for fewer the next power of two.

        On a mesh it is rounded up to a multiple of the data-parallel size; surplus rows are computed and dropped.
        """
        rows = most if count >= most or self.exact else min(most, 1 << max(count - 1, 0).bit_length())
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1
        return -(-rows // shards) * shards

    def _put(self, array: np.ndarray) -> np.ndarray | jax.Array:
        return put_batch({"": array}, self.mesh)[""] if self.mesh else array

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        if self.mesh is None:
            yield
            return
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(logical_rules(INFERENCE)):
            yield


def load(path: str | os.PathLike, dtype: str | None = "float32", mesh: Mesh | None = None) -> Engine:
    """An engine from a run's work directory, a saved jaxvlm model, or a whole model in any format that jaxvlm reads.

    Args:
        dtype: what the parameters are kept and computed in. None takes a run as it was trained and saved, and any other
            checkpoint in float32 on a CPU and bfloat16 elsewhere.
        mesh: the devices to spread over; None is one device.

    Raises `CheckpointError` or `WeightsError` saying what is wrong with `path`.
    """
    # Imported here: what only answers requests from parameters at hand needs neither of them.
    from jaxvlm.weights import load_any
    from jaxvlm.weights.configs import is_run

    def on_mesh(config: ModelConfig) -> dict:
        return param_shardings(logical_axes(config), abstract_params(config), mesh)

    path = Path(path).expanduser()
    if dtype is None and not is_run(path):
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    kept = None if dtype is None else jnp.dtype(dtype)
    config, prompt, params = load_any(path, dtype=kept, shardings=on_mesh if mesh else None)
    config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
    return Engine(config, prompt, params, mesh=mesh)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
