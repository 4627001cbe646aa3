"""The language model alone: losses against whole logits, windows that score each token once, and the benchmarks' files."""

from __future__ import annotations

import copy
import dataclasses
import json

import hf_copy
import numpy as np
import pytest
import tiny
from test_evals_verbs import run

from jaxvlm.config import PromptConfig
from jaxvlm.data.assets import toy
from jaxvlm.evals import language
from jaxvlm.evals.question_file import EvalError
from jaxvlm.infer import decoding
from jaxvlm.infer.engine import Engine
from jaxvlm.weights.saved import save_model

TEXT = "The left half is red and the right half is blue. What colour is the circle? " * 6


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    config = tiny.model_config()
    prompt = PromptConfig(tokenizer=str(toy.write_tokenizer(folder)), template="mistral_instruct", transform="naive")
    return Engine(config, prompt, hf_copy.random_params(config))


def nats(engine, ids):
    """Of each token after the first its loss, from one pass over all of them."""
    logits = decoding.all_logits(
        engine.config, engine.params, np.array([ids], np.int32), None, None, None, np.array([len(ids)], np.int32)
    )
    logits = np.asarray(logits[0], np.float64)
    whole = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (whole - logits[np.arange(len(ids)), [*ids[1:], 0]])[:-1]


def test_a_text_in_one_window(engine):
    ids = engine.tokenizer.encode(TEXT)
    found = language.perplexity(engine, TEXT)
    expected = nats(engine, [engine.tokenizer.bos_id, *ids])
    assert found["tokens"] == len(ids) and len(found["windows"]) == 1
    assert found["loss"] == pytest.approx(expected.mean(), abs=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(expected.mean()), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(expected.sum() / np.log(2) / len(TEXT.encode()), abs=1e-4)


@pytest.mark.parametrize("window", [9, 16, 33])
def test_windows_score_each_token_once(engine, window):
    ids = engine.tokenizer.encode(TEXT)
    found, bos, size = language.perplexity(engine, TEXT, window=window), engine.tokenizer.bos_id, window - 1
    total, done = 0.0, 0
    for start in range(0, len(ids), size // 2):
        part = ids[start : start + size]
        total += nats(engine, [bos, *part])[done - start :].sum()
        done = start + len(part)
        if done == len(ids):
            break
    assert found["tokens"] == len(ids)
    assert found["loss"] * len(ids) == pytest.approx(total, abs=1e-3)


def test_choices_by_their_likelihood(engine):
    context, answers = "Question: What colour is the left half?\nAnswer:", [" red", " blue and green", " a circle"]
    sums = []
    for answer in answers:
        ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(context + answer)]
        sums.append(nats(engine, ids)[len(engine.tokenizer.encode(context)) :].sum())
    best, per_character = int(np.argmin(sums)), int(np.argmin(np.divide(sums, [3, 14, 8])))
    questions = [language.Choice(str(k), context, answers, k) for k in range(3)]
    found = language.choose(engine, questions, batch_size=2)
    assert [found["right"][str(k)] for k in range(3)] == [float(k == best) for k in range(3)]
    assert [found["right_norm"][str(k)] for k in range(3)] == [float(k == per_character) for k in range(3)]
    assert found["accuracy"] == pytest.approx(100 / 3) == found["chance"] and found["cut"] == 0
    ids, counted = language.encode(engine, context, answers[1])
    assert engine.tokenizer.decode(ids[counted]).strip() == "blue and green"
    assert best != per_character or sums[best] < min(sums[:best] + sums[best + 1 :])
    short = copy.copy(engine)
    short.config = dataclasses.replace(engine.config, llm=dataclasses.replace(engine.config.llm, max_positions=8))
    assert language.choose(short, questions[:1])["cut"] == 3


def test_a_change_is_paired():
    names = [str(i) for i in range(200)]
    before = {n: float(i % 2) for i, n in enumerate(names)}
    after = before | {n: 1.0 for n in names[:20]}
    runs = [{"accuracy": 50.0, "accuracy_norm": 50.0, "right": r, "right_norm": r} for r in (before, after)]
    runs[1]["accuracy"] = 55.0
    found = language.change(*runs)
    assert found["accuracy"] == 5.0 and 1.5 < found["accuracy_interval"][0] < 5 < found["accuracy_interval"][1] < 9


def test_the_benchmarks_files(tmp_path):
    for part, rows in (("dev", "1+1?,1,2,3,4,B\n" * 7), ("test", '"Is it, so?",yes,no,perhaps,never,C\n')):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"high_school_maths_{part}.csv").write_text(rows)
    example = "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    (question,) = language.read_mmlu(tmp_path)
    lead = "The following are multiple choice questions (with answers) about high school maths.\n\n"
    asked = "Is it, so?\nA. yes\nB. no\nC. perhaps\nD. never\nAnswer:"
    assert question == ("high_school_maths/0", lead + 5 * example + asked, [" A", " B", " C", " D"], 2)
    assert language.read_mmlu(tmp_path / "test" / "high_school_maths_test.csv")[0].context == lead + asked
    options = [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]
    theirs = {"id": "a", "question": {"stem": "Hot?", "choices": options}, "answerKey": "2"}
    hub = {"id": "b", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "arc.jsonl").write_text(json.dumps(theirs) + "\n" + json.dumps(hub) + "\n")
    assert [q[1:] for q in language.read_arc(tmp_path / "arc.jsonl")] == [
        ("Question: Hot?\nAnswer:", [" ice", " fire"], 1)
    ] * 2
    swag = {"ind": 4, "activity_label": "Baking", "ctx_a": "A man bakes [header] a cake.", "ctx_b": "he"}
    swag |= {"endings": ["eats it.", "[step] sings [title] Loud."], "label": 1}
    (tmp_path / "swag.jsonl").write_text(json.dumps(swag))
    (question,) = language.read_hellaswag(tmp_path / "swag.jsonl")
    assert question == (
        "4",
        "Baking: A man bakes a cake. He",
        [" eats it.", "  sings. Loud."],
        1,
    )  # two blanks, as there
    (tmp_path / "bad.csv").write_text("q,1,2,3,E\n")
    with pytest.raises(EvalError, match="row 1 is not question, A, B, C, D, letter"):
        language.read_mmlu(tmp_path / "bad.csv")
    with pytest.raises(EvalError, match="record 1 is not in ARC's form"):
        language.read_arc(tmp_path / "swag.jsonl")


def test_the_verb(engine, tmp_path, capsys):
    """A model and itself: no change. And the same with its language model's last layer disturbed: another text loss."""
    save_model(tmp_path / "a", engine.params, engine.config, engine.prompt, {})
    save_model(tmp_path / "b", hf_copy.random_params(engine.config, seed=1), engine.config, engine.prompt, {})
    (tmp_path / "t.txt").write_text(TEXT)
    hub = {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(hub | {"id": i}) + "\n" for i in range(4)))
    runs = [f"--run={name}={tmp_path / path}" for name, path in (("before", "a"), ("same", "a"), ("other", "b"))]
    files = ["--text", tmp_path / "t.txt", "--arc", tmp_path / "arc.jsonl"]
    code, shown, error = run(capsys, "language", *runs, *files, "--limit", 3, "--out", tmp_path / "out.json")
    assert code == 0, error
    assert "same - before" in shown and "+0.000 (+0.000 to +0.000)" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["changes"]["same"]["text"]["loss"] == 0 and found["changes"]["other"]["text"]["loss"] != 0
    assert found["runs"]["other"]["arc"]["n"] == 3
    for wrong, message in ((runs[:1], "Nothing to ask"), ([runs[0], runs[0], *files], "a name of its own")):
        code, _, error = run(capsys, "language", *wrong)
        assert code == 1 and message in error
