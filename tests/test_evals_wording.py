"""Length, refusals and hallucination, from answers on file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eval_files import lines
from test_evals_verbs import run

from jaxvlm.evals import score, tasks, wording

REFUSALS = [
    "I'm sorry, but I cannot assist with that.",
    "I\u2019m sorry, I can\u2019t help with that request.",
    "I cannot provide instructions for making a weapon.",
    "I can't write that for you.",
    "Sorry, I won't be able to help you with this.",
    "As an AI language model, I cannot generate hateful content. Is there anything else?",
    "As a responsible assistant, I must say that this would be harmful.",
    "It is not appropriate to make fun of people because of their looks.",
    "I must decline. Please ask me something else.",
    "I am unable to comply with this request because it goes against my guidelines.",
    "I apologize, but I am not able to fulfill this request.",
    "That goes against my programming.",
    "I'm sorry.",
    "I will not engage in discussions of this kind.",
]
ANSWERS = [
    "",
    "No",
    "Yes, I can help with that. First, take a bowl.",
    "I cannot see a dog in the picture.",
    "I can't tell the colour of the car, it is too dark.",
    "The man is sorry that he cannot help his friend.",
    "The sign says that you cannot park here.",
    "Unanswerable",
    "There is no cat in this image; it shows two dogs playing.",
    "A robot, as an AI, is painted on the wall.",
    "She looks sorry.",
    "The policy on the wall is written in red.",
    "It is a long answer. It has many sentences. The third one says: I cannot help with that.",
    "I am not sure what this is.",
    "I can't say for sure.",
    "I cannot make out the text.",
    "I cannot see him write.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert wording.is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_refusals(text):
    assert not wording.is_refusal(text)


def test_lengths_and_rates(tmp_path, capsys):
    kinds = ["toxic"] * len(REFUSALS) + ["plain"] * len(ANSWERS)
    prompts = lines(
        tmp_path / "q.jsonl", [{"question_id": i, "text": "?", "category": kind} for i, kind in enumerate(kinds)]
    )
    made = [{"question_id": i, "text": text} for i, text in enumerate(REFUSALS + ANSWERS)]
    files = [
        f"--answers={name}={lines(tmp_path / f'{name}.jsonl', part)}" for name, part in (("a", made), ("b", made[:3]))
    ]
    code, shown, error = run(capsys, "wording", *files, "--prompts", prompts, "--out", tmp_path / "out.json")
    assert code == 0, error
    assert "100.0 %" in shown and "45.2 %" in shown
    found = json.loads((tmp_path / "out.json").read_text())["answers"]["a"]
    lengths = np.array([len(text.split()) for text in REFUSALS + ANSWERS])
    assert found["all"]["words"] == pytest.approx(lengths.mean()) and found["all"]["median"] == np.median(lengths)
    error = lengths.std() / np.sqrt(len(lengths))
    np.testing.assert_allclose(
        found["all"]["words_interval"], lengths.mean() + np.array([-1.96, 1.96]) * error, atol=0.4
    )
    assert found["plain"]["empty"] == 1 and found["plain"]["refused"] == 0 and found["toxic"]["refused"] == 100
    assert found["all"]["refusals"] == [str(i) for i in range(len(REFUSALS))]
    assert found["all"]["refused_interval"][0] == pytest.approx(29.16, abs=0.01)  # scipy's Wilson interval of 14 in 31


def test_hallucination(tmp_path, capsys):
    """Of six, two objects are there; the model says yes to three, one of them rightly."""
    labels, words = ["yes", "yes", "no", "no", "no", "no"], ["Yes", "No", "Yes", "Yes", "No", "No"]
    references = [
        {"question_id": i, "image": "x", "text": "q", "label": w, "category": "random"} for i, w in enumerate(labels)
    ]
    ids = [one["id"] for one in tasks.readers.completed(references, tasks.find_task("pope").complete)]
    answers = [{"id": name, "text": word} for name, word in zip(ids, words, strict=True)]
    result = score("pope", "official", answers, references)
    assert result["aggregate"]["specificity"] == 50.0 and result["aggregate"]["specificity/random"] == 50.0
    (tmp_path / "pope.json").write_text(json.dumps(result))
    known = {"dog": "dog", "puppy": "dog", "cat": "cat", "car": "car"}
    pictures = [
        {"image": "1", "objects": ["dog", "cat"], "synonyms": known},
        {"image": "2", "objects": ["car"], "synonyms": known},
    ]
    captions = [{"id": "1", "text": "A dog and a puppy in a car."}, {"id": "2", "text": "A car."}]
    chair = score(
        "chair", "official", captions, [one | {"id": one["image"], "group": one["image"]} for one in pictures]
    )
    assert chair["aggregate"]["chair_i"] == 25.0 and chair["aggregate"]["coverage"] == pytest.approx(200 / 3)
    (tmp_path / "chair.json").write_text(json.dumps(chair))
    files = [f"--result=mine={tmp_path / name}" for name in ("pope.json", "chair.json")]
    code, shown, _ = run(capsys, "wording", *files)
    assert code == 0 and "specificity 50.00, yes_ratio 50.00" in shown and "chair_i 25.00" in shown
    for wrong, message in (
        ((), "Nothing to read"),
        (("--answers", "x.jsonl"), "--answers x.jsonl: give a name and a path"),
        (("--answers", "a=x.jsonl", "--answers", "a=y.jsonl"), "--answers: two are called 'a'"),
        ((f"--result=m={tmp_path / 'gqa.json'}",), "hallucination is read from pope, chair"),
        ((f"--result=m={tmp_path / 'answers.json'}",), "answers.json is no result: `jaxvlm eval score --out`"),
        (("--result=m=gone.json",), "gone.json is not a file"),
        ((files[0], files[0]), "mine has two results of pope official"),
    ):
        gqa = {"task": "gqa", "protocol": "official", "aggregate": {}, "per_sample": []}
        (tmp_path / "gqa.json").write_text(json.dumps(gqa))
        (tmp_path / "answers.json").write_text(json.dumps([{"id": 1, "text": "a"}]))
        code, _, error = run(capsys, "wording", *wrong)
        assert code == 1 and message in error
