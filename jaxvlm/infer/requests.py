"""A request in the usual chat form, checked and made plain: messages of text with `<image>` marks, and their images."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from jaxvlm.data.image import load_image
from jaxvlm.infer.answers import IMAGE_MARK, RequestError

IMAGE_KEYS = ("image", "path", "url")  # where a content part may carry its image itself


def plain(request: Mapping[str, Any], name: str) -> tuple[list[dict], list]:
    """(messages, images) of `{"messages": [...], "images": [...]}`.

    A message's `content` is a string in which every `<image>` of a user stands for one image, or a list of parts:
    `{"type": "text", "text": ...}` and `{"type": "image"}`, which takes the next of the request's `images` unless it
    brings its own as `{"type": "image", "image": ...}` or, in OpenAI's form, `{"type": "image_url", "image_url": {"url":
    "data:image/png;base64,..."}}`. An image is a path, the bytes of a file, a PIL image or a uint8 array. Raises
    `RequestError` naming the request (`name`) and what to change, `DataError` for an `image_url` that is no picture.
    """
    if not isinstance(request, Mapping) or not isinstance(request.get("messages"), Sequence):
        raise RequestError(f'{name} must be {{"messages": [...], "images": [...]}}, not {str(request)[:80]!r}.')
    waiting, images, messages = list(request.get("images") or []), [], []
    marks = 0
    for message in request["messages"]:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RequestError(f"{name}: a message needs a role and a content, not {str(message)[:80]!r}.")
        content, role = message["content"], message["role"]
        if not isinstance(content, str | list | tuple):
            raise RequestError(f"{name}: a message's content is a text or a list of parts, not {str(content)[:80]!r}.")
        parts = [content] if isinstance(content, str) else [_part(part, name) for part in content]
        for part in parts:
            if not isinstance(part, str):  # an image that the part brings along
                images.append(part.image)
                marks += 1
            elif role == "user":
                count = part.count(IMAGE_MARK)
                marks += count
                images += [waiting.pop(0) for _ in range(min(count, len(waiting)))]
        texts = [part if isinstance(part, str) else IMAGE_MARK for part in parts]
        messages.append({"role": role, "content": content if isinstance(content, str) else _joined(texts)})
    if marks != len(images) or waiting:
        raise RequestError(
            f"{name} has {marks} {IMAGE_MARK} in its messages but {len(images) + len(waiting)} image(s). "
            f"Every {IMAGE_MARK} of a user's message stands for one image, in order."
        )
    for item in images:
        if isinstance(item, (str, os.PathLike)) and not Path(item).is_file():
            raise RequestError(f"{name}: the image {item} does not exist.")
    return messages, images


class _Own:
    """An image given inside a content part."""

    def __init__(self, image: Any):
        self.image = image


def _part(part: Any, name: str) -> str | _Own:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        own = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
        return IMAGE_MARK if own is None else _Own(own)
    if kind == "image_url":
        inside = part.get("image_url")
        return _Own(_pictured(inside.get("url") if isinstance(inside, Mapping) else inside, name))
    raise RequestError(
        f'{name}: a content part is {{"type": "text", "text": ...}}, {{"type": "image"}} or {{"type": "image_url", '
        f'"image_url": {{"url": "data:..."}}}}, not {str(part)[:80]!r}.'
    )


def _pictured(url: Any, name: str) -> Image.Image:
    """The picture inside a data: URL in base64; no other address is looked up."""
    head, comma, body = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise RequestError(
            f"{name}: an image_url must be the picture itself, as in data:image/png;base64,iVBORw0..., not "
            f"{str(url)[:60]!r}. Other addresses are not fetched."
        )
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError as error:
        raise RequestError(f"{name}: the base64 of an image_url cannot be read: {error}.") from None
    return load_image(data, f"{name}: the picture of an image_url")


def _joined(texts: Sequence[str]) -> str:
    """Parts as one text; an image stands on a line of its own, as in LLaVA's training data."""
    joined = ""
    for before, text in zip(("", *texts), texts, strict=False):
        joined += ("\n" if joined and IMAGE_MARK in (before, text) else "") + text
    return joined
