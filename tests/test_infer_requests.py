"""Requests in the usual chat form."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from jaxvlm.config import UserError
from jaxvlm.infer.requests import plain

PICTURE = np.zeros((4, 4, 3), np.uint8)


def user(content):
    return {"role": "user", "content": content}


def test_parts_become_marks_and_images_in_order():
    own = np.ones((4, 4, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "And"}, {"type": "image", "image": own}]
    messages, images = plain({"messages": [user(content), user("Or <image>?")], "images": [PICTURE, own + 1]}, "r")
    assert messages == [user("<image>\nAnd\n<image>"), user("Or <image>?")]
    assert images[0] is PICTURE and images[1] is own and images[2].max() == 2


def test_strings_pass_unchanged():
    messages, images = plain(
        {"messages": [user("a <image> b"), {"role": "assistant", "content": "<image>"}], "images": [PICTURE]}, "r"
    )
    assert messages[0]["content"] == "a <image> b" and len(images) == 1


def test_text_parts_are_not_separated():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"messages": [user(parts)]}, "r") == ([user("ab")], [])


def test_openais_form_of_a_picture():
    with io.BytesIO() as file:
        Image.fromarray(PICTURE + 7).save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    for part in ({"url": url, "detail": "low"}, url):
        content = [{"type": "text", "text": "Hm"}, {"type": "image_url", "image_url": part}]
        messages, images = plain({"messages": [user(content)]}, "r")
        assert messages == [user("Hm\n<image>")] and np.array_equal(np.asarray(images[0]), PICTURE + 7)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"messages": [user("hello")], "images": [PICTURE]}, "0 <image> in its messages but 1 image"),
        ({"messages": [user([{"type": "image"}])]}, "1 <image> in its messages but 0 image"),
        ({"messages": [user("<image>")], "images": ["nowhere.png"]}, "nowhere.png does not exist"),
        ({"messages": [user([{"type": "video"}])]}, "content part"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "https://x.org/y.png"}}])]}, "are not fetched"),
        (
            {"messages": [user([{"type": "image_url", "image_url": "data:image/png;base64,?"}])]},
            "base64 of an image_url",
        ),
        ({"messages": [user([{"type": "image_url", "image_url": "data:image/png;base64,AA=="}])]}, "read as an image"),
        ({"messages": [user(None)]}, "content is a text or a list of parts"),
        ({"messages": ["hello"]}, "needs a role and a content"),
        ("hello", "must be"),
    ],
)
def test_bad_requests_name_the_fix(request_, words):
    with pytest.raises(UserError, match=words):
        plain(request_, "Request 7")
