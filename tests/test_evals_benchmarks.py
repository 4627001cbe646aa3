"""`score` over whole benchmarks: models that are always right, that guess, that always say the same, and that write nonsense."""

from __future__ import annotations

import math
import random

import eval_helpers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxvlm.evals import aggregates, score, tasks
from jaxvlm.evals.aggregates import Row
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed

PAIRS = [(task, protocol) for task, about in tasks.TASKS.items() for protocol in about.protocols]
READ_WORDS = [pair for pair in PAIRS if tasks.find(*pair)[1].takes == "text"]
BEST = {"perception": 2000.0, "points": 72.0, "chair_i": 0.0}  # of 72 questions; else 100


def questions(task, count=72, seed=0):
    return completed(eval_helpers.questions(task, count, seed), tasks.find_task(task).complete)


@pytest.mark.parametrize(("task", "protocol"), PAIRS)
def test_a_model_that_is_always_right_has_the_best_score(task, protocol):
    about, how = tasks.find(task, protocol)
    found = questions(task)
    made = [eval_helpers.right_answer(task, protocol, how.takes, q) for q in found]
    result = score(task, protocol, reversed(made), found, split="val", model="m1")
    best = BEST.get(how.headline, 100.0)
    assert result["value"] == result["aggregate"][how.headline] == pytest.approx(best)
    assert result["invalid"] == 0 and [sample["id"] for sample in result["per_sample"]] == [q["id"] for q in found]
    told = {name: result[name] for name in ("task", "protocol", "split", "n", "headline", "model")}
    names = {"task": task, "protocol": protocol, "split": "val", "n": 72, "headline": how.headline, "model": "m1"}
    assert told == names and len(result["prompt"]) == 16
    assert result["judge"] == ({"model": "gpt-0", "prompt": "p1"} if how.takes == "judgement" else None)
    assert bool(how.candidates) == (how.takes == "probabilities")


# --------------------------------------------------------------------------------------------------------------- prompts

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
ONLY = "\nPlease answer directly with only the letter of the correct option and nothing else."
ABCD = "\nA. option a\nB. option b\nC. option c\nD. option d"


@pytest.mark.parametrize(
    ("task", "protocol", "prompt"),
    [
        ("vqav2", "official", "what?"),
        ("vqav2", "llava15", "what?" + SHORT),
        ("gqa", "prismatic", "what?" + SHORT),
        ("vizwiz", "llava15", "what?" + UNSURE + SHORT),
        ("vizwiz", "cambrian", "what?" + UNSURE + SHORT),
        ("textvqa", "prismatic", "what?" + SHORT),
        ("textvqa-ocr", "llava15", "what?\nReference OCR token: STOP" + SHORT),
        ("textvqa-ocr", "cambrian", "what?\nReference OCR tokens: STOP" + SHORT),
        ("pope", "llava15", "Is it?" + SHORT),
        ("mme", "official", "Is it 0? Please answer yes or no."),
        ("mme", "llava15", "Is it 0?" + SHORT),
        ("mme", "cambrian", "Is it 0? Please answer yes or no." + SHORT),
        ("scienceqa", "llava15", "Context: N/A\nQuestion: what?\nOptions: (A) red (B) blue" + LETTER),
        ("scienceqa", "cambrian", "what?\nA. red\nB. blue" + ONLY),
        ("mmbench", "llava15", "what 0?\nA. option 0\nB. option 1" + LETTER),
        ("mmbench", "cambrian", "what 0? Options:\nA. option 0\nB. option 1" + LETTER),
        ("mmbench-cn", "llava15", "what 0?\nA. option 0\nB. option 1\n请直接回答选项字母。"),
        ("seed-bench", "llava15", "what?" + ABCD + LETTER),
        ("seed-bench", "cambrian", "what? Options:" + ABCD + LETTER),
        ("mm-vet", "llava15", "what?"),
        (
            "refcoco",
            "prismatic",
            'Please provide the bounding box coordinate of the region this sentence describes: "man"',
        ),
        (
            "vsr",
            "prismatic",
            'Based on the image, is this statement "True" or "False"? The cat is on the mat.\n'
            'Respond with "True" or "False" directly.',
        ),
        ("ai2d", "prismatic", "what?\nA. w\nB. x\nC. y\nD. z" + LETTER),
        ("mmvp", "cambrian", "is it? Options:\nA. Open\nB. Closed" + LETTER),
        ("cv-bench", "cambrian", "Which? (A) left (B) right" + LETTER),
        ("realworldqa", "cambrian", "which?"),
        ("chartqa", "cambrian", "how much?\nAnswer the question using a single number or phrase."),
        ("docvqa", "cambrian", "what?\nGive the short answer directly."),
        ("mmmu", "cambrian", "what ? Options:\nA. w\nB. x\nC. y\nD. z" + LETTER),
        ("mathvista", "cambrian", "Hint: ...\nQuestion: what?" + SHORT),
        ("mmstar", "cambrian", "what? Options: A: w, B: x" + ONLY),
        ("questions", "vqa", "what?" + SHORT),
        ("questions", "open", "what?"),
    ],
)
def test_prompts(task, protocol, prompt):
    assert tasks.find(task, protocol)[1].prompt(questions(task, 1)[0]) == prompt


def test_mmmus_options_with_apostrophes():
    """They are Python; Cambrian's prompt takes them for less."""
    q = {
        "id": "test_Art_1",
        "question": "?",
        "question_type": "multiple-choice",
        "options": """['red', "it's"]""",
        "answer": "B",
    }
    (found,) = completed([q], tasks.TASKS["mmmu"].complete)
    assert found["choices"] == ["red", "it's"] and found["subject"] == "Art"
    assert tasks.find("mmmu", "cambrian")[1].prompt(found) == "? Options:\nA. red" + LETTER


def test_prompts_with_hints():
    hinted = {**questions("mmbench", 1)[0], "hint": "It is red."}
    assert tasks.find("mmbench", "llava15")[1].prompt(hinted).startswith("It is red.\nwhat 0?\nA.")
    hinted = {**questions("scienceqa", 1)[0], "hint": "It is red."}
    assert tasks.find("scienceqa", "llava15")[1].prompt(hinted).startswith("Context: It is red.\nQuestion: what?")
    assert tasks.find("scienceqa", "cambrian")[1].prompt(hinted).startswith("It is red. what?\nA. red")
    reasoned = questions("mathvista", 2)[1]
    end = "\nFirst show your reasoning process and then give the final answer."
    assert tasks.find("mathvista", "cambrian")[1].prompt(reasoned) == "Hint: ...\nQuestion: what?" + end
    bare = completed(
        [{"index": "7", "question": "q", "A": "x", "B": "nan", "C": "y", "hint": "nan", "answer": "A"}],
        tasks.TASKS["mmbench"].complete,
    )
    assert tasks.find("mmbench", "official")[1].prompt(bare[0]) == "q\nA. x" + LETTER  # options end at the first nan


# ---------------------------------------------------------------------------------------------------- guessing, and not

YES_NO = ["Yes", "No"]


def guesses(task, protocol, draw, count, seed=0):
    """The result of a model that says `draw(question)`."""
    found = questions(task, count, seed)
    return score(task, protocol, [{"id": q["id"], "text": draw(q)} for q in found], found)["aggregate"]


def letter(rng):
    return lambda q: rng.choice(eval_helpers.LETTERS[: len(q["choices"])])


def test_guessing_yes_or_no():
    rng = random.Random(0)
    found = guesses("pope", "llava15", lambda q: rng.choice(YES_NO), 6000)
    assert found["accuracy"] == pytest.approx(50, abs=2) and found["yes_ratio"] == pytest.approx(50, abs=2)
    found = guesses("mme", "llava15", lambda q: rng.choice(YES_NO), 5600)
    assert found["perception"] == pytest.approx(750, abs=60) and found["cognition"] == pytest.approx(300, abs=40)


def test_always_the_same_answer():
    found = guesses("pope", "llava15", lambda q: "Yes", 600)
    assert (found["accuracy"], found["yes_ratio"], found["undefined"]) == (50, 100, 0)
    assert found["f1"] == pytest.approx(200 / 3) and found["recall/random"] == 100
    found = guesses("pope", "llava15", lambda q: "No", 600)  # the official code divides by zero
    assert (found["accuracy"], found["f1"], found["precision/random"], found["undefined"]) == (50, 0, 0, 3)
    assert guesses("pope", "cambrian", lambda q: "yes", 600)["accuracy"] == 50
    found = guesses("mme", "llava15", lambda q: "Yes", 560)
    assert (found["perception"], found["cognition"], found["total"]) == (500, 200, 700)
    assert guesses("mme", "llava15", lambda q: "", 56)["total"] == 0
    assert guesses("mmvp", "cambrian", lambda q: "A", 300) == {"pair_accuracy": 0, "accuracy": 50}
    assert guesses("mmbench", "official", lambda q: "A", 900)["circular"] == 0


def test_guessing_letters():
    rng = random.Random(0)
    assert guesses("mmvp", "cambrian", letter(rng), 8000)["pair_accuracy"] == pytest.approx(25, abs=2)
    circles = 9000  # of 2, 3 and 4 options in turn
    chance = 100 * (2**-2 + 3**-3 + 4**-4) / 3
    assert guesses("mmbench", "official", letter(rng), circles)["circular"] == pytest.approx(chance, abs=1.5)
    assert guesses("scienceqa", "llava15", letter(rng), 6000)["accuracy"] == pytest.approx(
        100 * (1 / 2 + 1 / 3 + 1 / 4) / 3, abs=2
    )
    for task, protocol in (("seed-bench", "llava15"), ("mmstar", "official"), ("ai2d", "cambrian")):
        assert guesses(task, protocol, letter(rng), 4000)["accuracy"] == pytest.approx(25, abs=2)
    assert guesses("cv-bench", "cambrian", letter(rng), 6000)["accuracy"] == pytest.approx(50, abs=2)


def test_guessing_by_probabilities():
    rng = random.Random(0)
    for task, count, chance in (("tallyqa", 16, 100 / 16), ("vsr", 2, 50), ("pope", 2, 50), ("ai2d", 4, 25)):
        found = questions(task, 4000)
        made = [{"id": q["id"], "probabilities": [rng.random() for _ in range(count)]} for q in found]
        result = score(task, "prismatic", made, found)["aggregate"]
        assert result["accuracy"] == pytest.approx(chance, abs=2.5)
        assert result.get("roc_auc", 50) == pytest.approx(50, abs=3) and result.get("pr_auc", 50) == pytest.approx(
            50, abs=4
        )
    true = sum(q["label"] for q in questions("vsr", 4000)) / 40
    assert guesses("vsr", "jaxvlm", lambda q: "True", 4000) == pytest.approx({"accuracy": true, "always_true": true})


def test_mmmu_draws_what_it_cannot_read_as_the_official_code_does():
    found = questions("mmmu", 400)
    result = score("mmmu", "official", [{"id": q["id"], "text": ""} for q in found], found)
    assert result["aggregate"]["guessed"] == result["invalid"] == 300
    stream = random.Random(42)
    right = sum(stream.choice(list("ABCD")) == q["answer"] for q in found if q["question_type"] == "multiple-choice")
    assert result["value"] == 100 * right / 400 and 60 < right < 90


# ------------------------------------------------------------------------------------------------------------ nonsense

PIECES = st.sampled_from(
    "A B (C) b. yes No not. 1,000 3. -5% 1e999 inf nan Infinity answer is: The answer is A. [0.1, 0.2, 0.3, 0.4] [[ ((( ' ` \" "
    "\x00 \ud800 ß İ ﬁ 數 🙂 don't so = \u2028 1_0 ٣ ² ,,, ... none somebody'd".split(" ")
)
WORDS = st.one_of(
    st.text(max_size=40), st.lists(PIECES, max_size=6).map(" ".join), st.lists(PIECES, max_size=4).map("".join)
)


@given(WORDS)
@example("")
@example("[" * 3000)
@example("-" * 3000 + "1")
@example("9" * 5000)
@example("[" + "9" * 5000 + ", 0, 1, 1]")
@settings(max_examples=120, deadline=None)
def test_no_words_stop_a_scorer(words):
    for task, protocol in READ_WORDS:
        found = questions(task, 4)
        result = score(task, protocol, [{"id": q["id"], "text": words} for q in found], found)
        assert all(math.isfinite(v) and v >= 0 for s in result["per_sample"] for v in s["scores"].values()), (
            task,
            protocol,
        )
        assert math.isfinite(result["value"]) and 0 <= result["invalid"] <= 4


@given(st.lists(st.floats(), max_size=17))
@settings(max_examples=60, deadline=None)
def test_no_numbers_stop_a_scorer(shares):
    for task, protocol in PAIRS:
        if (takes := tasks.find(task, protocol)[1].takes) in ("probabilities", "losses"):
            found = questions(task, 4)
            result = score(task, protocol, [{"id": q["id"], takes: shares} for q in found], found)
            assert 0 <= result["value"] <= 100


# -------------------------------------------------------------------------------------------------- numbers of one task


def rows(*made, **reference):
    """Rows of (group, parsed, accuracy, more reference fields)."""
    return [
        Row(str(i), group, parsed, {"accuracy": right}, True, reference | more)
        for i, (group, parsed, right, more) in enumerate(made)
    ]


def test_popes_numbers():
    made = (
        [("a", "yes", 1, "yes")] * 3
        + [("a", "yes", 0, "no")]
        + [("a", "no", 0, "yes")] * 2
        + [("a", "no", 1, "no")] * 4
    )
    found = aggregates.binary_scores(rows(*((g, p, r, {"label": label}) for g, p, r, label in made)))
    assert found == pytest.approx(
        {"accuracy": 70, "precision": 75, "recall": 60, "f1": 200 / 3, "yes_ratio": 40} | {"specificity": 80}
    )


def test_mme_adds_accuracy_and_pairs():
    made = [("a", "", 1, {}), ("a", "", 1, {}), ("b", "", 1, {}), ("b", "", 0, {})]
    found = aggregates.mme(rows(*made, category="OCR"))
    assert found["score/OCR"] == 75 + 50 and found["perception"] == 125 and found["cognition"] == 0


def test_gqas_distribution_by_hand():
    """Gold: red 3, blue 1; given: red 1, green 3: ((1-3)²/3 + (0-1)²/1) / 100."""
    gold, said = ["red", "red", "red", "blue"], ["red", "green", "green", "green"]
    more = [
        {"answer": g, "groups": {"global": "color"}, "types": {"structural": "query", "semantic": "attr"}} for g in gold
    ]
    made = [(str(i), s, float(s == g), m) for i, (s, g, m) in enumerate(zip(said, gold, more, strict=True))]
    unbalanced = ("9", "x", 1.0, {**more[0], "isBalanced": False})
    found = aggregates.gqa(rows(*made, unbalanced))
    assert found["distribution"] == pytest.approx((4 / 3 + 1) / 100) and found["accuracy"] == found["open"] == 25


def test_cvbench_weighs_its_sources():
    made = (
        [("a", "", 1, {"source": "ADE20K"})] * 3
        + [("a", "", 0, {"source": "COCO"})]
        + [("a", "", 1, {"source": "Omni3D"})]
    )
    found = aggregates.cvbench(rows(*made, task="t"))
    assert (found["2D"], found["3D"], found["accuracy"]) == (50, 100, 75)


def test_vizwiz_counts_who_says_unanswerable():
    said, answerable = [1.0, 1.0, 0.0, 0.0], [0, 1, 0, 1]
    made = [
        Row(str(i), "g", "", {"accuracy": 1.0, "unanswerable": s}, True, {"answerable": a})
        for i, (s, a) in enumerate(zip(said, answerable, strict=True))
    ]
    found = aggregates.vizwiz(made)
    assert found["unanswerable_f1"] == 50 and found["unanswerable_ap"] == 50


def test_llava_bench_is_a_ratio_of_rounded_means_with_failures_in():
    ratings = [(8.0, 7.0), (9.0, 6.0), (-1.0, -1.0)]
    made = [
        Row(str(i), "g", p, {"reference": p[0], "model": p[1]}, True, {"category": "conv"})
        for i, p in enumerate(ratings)
    ]
    found = aggregates.llava_bench(made)  # means 5.333 and 4.0
    assert found == {"relative": 75.0, "reference": 53.3, "model": 40.0} | {
        "relative/conv": 75.0,
        "reference/conv": 53.3,
        "model/conv": 40.0,
    }


def test_mmvet_by_capability():
    made = [
        Row("1", "1", "", {"score": 1.0}, True, {"capability": ["ocr", "math"]}),
        Row("2", "2", "", {"score": 0.5}, True, {"capability": ["ocr"]}),
    ]
    assert aggregates.mmvet(made) == {
        "total": 75,
        "capability=math": 100,
        "capability=ocr": 75,
        "integration=math+ocr": 100,
        "integration=ocr": 50,
    }


def test_areas_by_hand():
    shares, truth = [0.9, 0.8, 0.8, 0.1], [True, False, True, False]
    assert aggregates.roc_auc(shares, truth) == (1 + 1 + 0.5 + 1) / 4
    assert aggregates.average_precision(shares, truth) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert aggregates.roc_auc(shares, [True] * 4) == 0 and aggregates.average_precision(shares, [False] * 4) == 0


def test_chair_counts_mentions_and_captions():
    found = questions("chair", 2)
    words = ["A dog and a cat, a kitten.", "Nothing here."]
    made = [{"id": q["id"], "text": w} for q, w in zip(found, words, strict=True)]
    numbers = score("chair", "official", made, found)["aggregate"]
    assert numbers == pytest.approx(
        {"chair_s": 50, "chair_i": 200 / 3, "mentions_per_caption": 1.5, "undefined": 0} | {"coverage": 50}
    )
    assert score("chair", "official", [{**a, "text": ""} for a in made], found)["aggregate"]["undefined"] == 1


# ------------------------------------------------------------------------------------------------- what a result is made of


def test_plain_official_records_are_enough():
    """As a notebook has them: the fields of the official files, nothing of ours."""
    answers = [{"answer": word, "answer_id": i} for i, word in enumerate(["yes"] * 9 + ["no"])]
    result = score(
        "vqav2",
        "official",
        [{"question_id": 5, "answer": "Yes."}],
        [{"question_id": 5, "image_id": 7, "answers": answers}],
    )
    assert result["per_sample"] == [
        {"id": "5", "group": "7", "parsed": "yes", "valid": True, "scores": {"accuracy": 1.0}}
    ]
    assert result["aggregate"] == {"accuracy": 100.0} and result["invalid"] == 0 and result["prompt"] is None
    labels = [{"question_id": i, "image": "a.jpg", "text": "?", "label": "no"} for i in (1, 2)]
    result = score("pope", "official", [{"question_id": i, "answer": "No"} for i in (1, 2)], labels)
    assert result["aggregate"]["accuracy"] == 100 and result["split"] == "unnamed, 2 questions"


def test_protocols_differ_where_the_papers_do():
    unanimous = [{"question_id": 1, "image_id": 1, "question": "?", "answers": eval_helpers._people("yes")}]
    values = {
        p: score("vqav2", p, [{"question_id": 1, "text": "Yes."}], unanimous)["value"]
        for p in tasks.TASKS["vqav2"].protocols
    }
    assert values == {"official": 0, "llava15": 100, "prismatic": 100}
    shirt = [{"questionId": "1", "imageId": "1", "question": "?", "answer": "t-shirt"}]
    values = {
        p: score("gqa", p, [{"questionId": "1", "prediction": "T-shirt."}], shirt)["value"]
        for p in tasks.TASKS["gqa"].protocols
    }
    assert values == {"official": 0, "llava15": 100, "prismatic": 0, "cambrian": 100}


def test_a_result_tells_which_prompts_were_answered():
    found = questions("gqa", 3)
    short = "what?\nAnswer the question using a single word or phrase."
    prompts = [f"<image>\n{short}", short, "what?"]
    metadata = {"model": "abc123"}
    made = [
        {"id": q["id"], "text": "red", "prompt": p, "metadata": metadata} for q, p in zip(found, prompts, strict=True)
    ]
    result = score("gqa", "llava15", made, found)
    assert result["prompts_as_asked"] == "2 of 3" and result["model"] == "abc123"
    assert result["prompt"] != score("gqa", "official", made, found)["prompt"]
    assert (
        score("gqa", "llava15", [{**a, "model_id": "llava-7b", "metadata": {}} for a in made], found)["model"]
        == "llava-7b"
    )


def test_splits_are_told_by_their_size():
    assert tasks.split_of(tasks.TASKS["vqav2"], 214_354) == "val"
    assert sum(tasks.TASKS[name].splits["val"] for name in ("refcoco", "refcoco+", "refcocog")) == 26_488
    for about in tasks.TASKS.values():
        assert len(set(about.splits.values())) == len(about.splits)


@pytest.mark.parametrize(
    ("task", "protocol", "message"),
    [
        ("vqa2", "official", "no task 'vqa2'. Did you mean 'vqav2'\\? Valid: vqav2, gqa"),
        ("zzz", "official", "no task 'zzz'. Valid: vqav2"),
        (
            "pope",
            "llava",
            "no protocol 'llava' for pope. Did you mean 'llava15'\\? Valid: official, llava15, prismatic, cambrian",
        ),
        ("mmvp", "official", "Valid: cambrian"),
    ],
)
def test_unknown_names_get_the_nearest_and_the_list(task, protocol, message):
    with pytest.raises(EvalError, match=message):
        score(task, protocol, [], [])


def test_what_does_not_fit_is_refused():
    found = questions("gqa", 3)
    made = [{"id": q["id"], "text": "red"} for q in found]
    cases = [
        (made[:2], found, "1 of 3 questions have no answer, 2 among them"),
        ([], found, "3 of 3 questions have no answer"),
        ([*made, made[0]], found, "two answers to the question 0"),
        (
            [*made, {"id": "77", "text": "red"}],
            found,
            "No question has the answer's id '77'; questions are called '0', '1', '2'",
        ),
        ([{"id": "0", "txt": "red"}, *made[1:]], found, "answer to 0 of gqa has no 'text'"),
        ([{"id": "0", "text": None}, *made[1:]], found, "is None, not a text"),
        (made, [*found, found[0]], "Two references have the id 0"),
        (made, [{k: v for k, v in q.items() if k != "answer"} for q in found], "no field 'answer'"),
        (made, [{"question": "what?"}] * 3, "Reference 0 is not in the official form"),
    ]
    for answers, references, message in cases:
        with pytest.raises(EvalError, match=message):
            score("gqa", "llava15", answers, references)
    with pytest.raises(EvalError, match="has no 'probabilities', which this protocol scores"):
        score("vsr", "prismatic", [{"id": "0", "text": "True"}], questions("vsr", 1))
    assert score("gqa", "llava15", made[:2], found, subset=True)["n"] == 2
