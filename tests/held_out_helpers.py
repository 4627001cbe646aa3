"""The loss on held-out records, one at a time, by the engine that answers."""

from __future__ import annotations

import json

import numpy as np

from jaxvlm.data import conversation
from jaxvlm.data.mixture import choose
from jaxvlm.infer.engine import Engine
from jaxvlm.weights.saved import load_model

ROLES = {"human": "user", "gpt": "assistant"}


def loss_by_hand(workdir, source):
    """(mean over the supervised tokens, their number) of a run's model on what `source` holds out, without rows or a mesh."""
    params, config, prompt, _ = load_model(workdir)
    engine = Engine(config, prompt, params)
    with open(source.path) as file:
        records = json.load(file)
    total = count = 0
    for number in np.flatnonzero(choose(records, source, 0, held_out=True)):
        one = records[number]
        *turns, last = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in one["conversations"]]
        images = [f"{source.images}/{one['image']}"] if one.get("image") else []
        ((_, (loss, _)),) = next(
            engine.answer_losses([{"messages": turns, "images": images, "answer": last["content"]}])
        )
        supervised = int((conversation.encode(one, engine.tokenizer, prompt.template, prompt.layout).weights > 0).sum())
        total, count = total + loss * supervised, count + supervised
    return total / count, count
