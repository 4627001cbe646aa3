"""Every scorer against values worked out by hand from what the official code is described to do."""

from __future__ import annotations

import math

import pytest

from jaxvlm.evals.scorers import choice, normalise, text, vqa, yesno


def value(scorer, words, **reference):
    """The accuracy that a scorer gives to `words`."""
    return scorer({"text": words}, reference).values["accuracy"]


# ----------------------------------------------------------------------------------------------------------- rewriting


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes.", "yes"),
        ("The red car", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldn'tve", "couldn't've"),
        ("Im", "im"),  # the official key is upper case and never met
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("v2.0.", "v2.0"),
        ("u.s.a.", "usa"),
        ("1,000", "1000"),
        ("a,b", "b"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("(red)", "red"),
        ("red/blue", "red blue"),
        ("1,000/2,000", "10002000"),
        ("10:30 50% $5", "10:30 50% $5"),
        ("." * 33 + "x", ".x"),
        ("two\tdogs\n", "2 dogs"),
        ("Café 数", "café 数"),
        ("the", ""),
        ("", ""),
    ],
)
def test_the_vqa_rewriting(given, expected):
    assert normalise.vqa(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a,b", "ab"),
        ("1,000/2,000", "1000 2000"),
        ("what's", "what 's"),
        ("whats", "what's"),
        ("She's", "she 's"),
        ("red?", "red"),
        ("The 3 dogs.", "3 dogs"),
        ("three", "3"),
        ("", ""),
    ],
)
def test_the_evalai_rewriting(given, expected):
    assert normalise.evalai(given) == expected


def test_vizwiz_puts_back_ticks_in_most_contractions():
    given = ["dont", "don't", "cant", "wheres", "hadn'tve", "Two"]
    assert list(map(normalise.vizwiz, given)) == ["don`t", "don't", "can't", "where's", "hadn`t`ve", "2"]


# ------------------------------------------------------------------------------------------------------- the VQA family


def people(*counted):
    """("yes", 9), ("no", 1) -> ten people's answers in the official form."""
    words = [word for word, count in counted for _ in range(count)]
    return [{"answer": word, "answer_id": i + 1, "answer_confidence": "yes"} for i, word in enumerate(words)]


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_leaves_each_person_out_in_turn(matches, expected):
    assert vqa.soft_accuracy("a", ["a"] * matches + ["b"] * (10 - matches)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "answers", "official", "prismatic"),
    [
        ("Yes", people(("yes", 10)), 0, 1),  # nothing is rewritten when all agree
        ("yes", people(("yes", 10)), 1, 1),
        ("Yes.", people(("yes", 9), ("no", 1)), 1, 1),
        ("yes, it is", people(("yes", 9), ("no", 1)), 0, 0),
        ("2", people(("two", 3), ("3", 7)), 0.9, 0),  # Prismatic leaves number words of people
        ("two", people(("two", 3), ("3", 7)), 0.9, 0),
        ("red", people(("red.", 10)), 0, 1),
        ("red", people(("The red", 2), ("blue", 8)), 0.6, 0),
        ("dont", people(("don't", 1), ("no", 9)), 0.3, 0.3),
        ("", people(("", 10)), 1, 1),
        ("\nyes\t", people(("yes", 10)), 1, 1),
    ],
)
def test_vqav2(words, answers, official, prismatic):
    assert value(vqa.vqav2, words, answers=answers) == pytest.approx(official)
    assert value(vqa.vqav2_prismatic, words, answers=answers) == pytest.approx(prismatic)
    bare = [person["answer"] for person in answers]  # without answer_id the official code loses equal answers; ours not
    assert value(vqa.vqav2, words, answers=bare) == pytest.approx(official)


def test_textvqa_rewrites_both_sides_and_needs_ten_people():
    assert value(vqa.textvqa, "Coca Cola.", answers=["coca cola", "COCA, COLA?"] * 5) == 1
    assert value(vqa.textvqa, "two", answers=["2"] * 10) == 1
    short = vqa.textvqa({"text": "a"}, {"answers": ["a"] * 9})
    assert short.values["accuracy"] == 0 and not short.valid and "official code stops" in short.note


def test_vizwiz_leaves_peoples_answers_as_they_are():
    assert value(vqa.vizwiz_accuracy, "Red", answers=people(("Red", 10))) == 0
    assert value(vqa.vizwiz_accuracy, "Red.", answers=people(("red", 10))) == 1
    said = [
        vqa.vizwiz_accuracy({"text": t}, {"answers": ["a"]}).values["unanswerable"] for t in ("Unanswerable.", "no")
    ]
    assert said == [1, 0]


def test_gqa_and_its_rewritings():
    assert [value(vqa.gqa, t, answer="red") for t in ("red", "Red", "red.")] == [1, 0, 0]
    assert [vqa.gqa_rewrite_llava(t) for t in ("Red..", "red. ", "t-shirt")] == ["red", "red. ", "t-shirt"]
    assert [vqa.gqa_rewrite_prismatic(t) for t in ("Red..", "t-shirt", "it's")] == ["red", "tshirt", "its"]
    assert [value(vqa.gqa_cambrian, t, answer="Red") for t in ("red.", "RED", "red!")] == [1, 1, 0]


# -------------------------------------------------------------------------------------------------------------- yes/no


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("No", "no"),
        ("no.", "no"),
        ("No, it is", "no"),
        ("It is not. Yes", "no"),
        ("Yes, there is no doubt", "no"),
        ("yes, it is", "yes"),
        ("Yes. no", "yes"),
        ("NO", "yes"),
        ("nope", "yes"),
        ("none", "yes"),
        ("No\n", "yes"),
        ("no,yes", "yes"),
        ("I cannot see it", "yes"),
        ("", "yes"),
        ("否", "yes"),
    ],
)
def test_pope_reads_all_but_no_as_yes(words, answer):
    assert yesno.pope_answer(words) == answer
    assert value(yesno.pope, words, label=answer) == 1


@pytest.mark.parametrize(
    ("words", "right"), [("Yes", 1), ("yes, it is", 1), ("YES:", 1), ("yes!", 0), ("there is", 0), ("no", 0), ("", 0)]
)
def test_pope_in_cambrian_is_the_first_word(words, right):
    scored = yesno.pope_cambrian({"text": words}, {"label": "yes"})
    assert scored.values["accuracy"] == right and bool(scored.note) == (not words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("snow", "no"),
        ("eyes", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("no yes", "no"),
        ("The answer is yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_four_characters(words, answer):
    assert yesno.mme_answer(words) == answer
    scored = yesno.mme({"text": words}, {"answer": "Yes"})
    assert scored.values["accuracy"] == (answer == "yes") and scored.valid == (answer != "other")


def test_mme_in_cambrian_is_the_whole_text():
    assert [value(yesno.mme_cambrian, t, answer="Yes") for t in ("yes.", "YES", "Yes, it is", "")] == [1, 1, 0, 0]


def test_vsr_by_text():
    given = ("True", "true.", "TRUE", "False", "It is true", "")
    assert [value(yesno.vsr_text, t, label=1) for t in given] == [1, 1, 1, 0, 0, 0]
    assert [value(yesno.vsr_text, t, label="0") for t in given] == [0, 0, 0, 1, 0, 0]


# ----------------------------------------------------------------------------------------------------- by probabilities


def test_the_likeliest_first_token():
    def right(scorer, shares, **reference):
        return scorer({"probabilities": shares}, reference)

    assert right(yesno.pope_prismatic, [0.4, 0.6], label="no") == ("no", {"accuracy": 1.0, "positive": 0.4}, True, "")
    assert right(yesno.vsr_prismatic, [0.5, 0.5], label=1).values["accuracy"] == 1  # a tie goes to the first
    assert right(choice.counting_prismatic, [0] * 12 + [1] + [0] * 3, answer="12").values["accuracy"] == 1
    assert right(choice.diagrams_prismatic, [-3, -math.inf, -1, -2], choices="abcd", answer=2).values["accuracy"] == 1
    for broken in ([0.1, 0.9, 0.0], [math.nan, 1.0], []):
        scored = right(yesno.pope_prismatic, broken, label="no")
        assert scored.values["accuracy"] == 0 and not scored.valid and "2 probabilities" in scored.note
    losses = choice.likelihood({"losses": [2.5, 0.1, math.inf, 3]}, {"choices": "wxyz", "answer": "B"})
    assert losses.parsed == "B" and losses.values["accuracy"] == 1


# ------------------------------------------------------------------------------------------------------------ by letter

ANIMALS = {"choices": ["cat", "dog", "blue"], "answer": "B"}


@pytest.mark.parametrize(
    ("words", "right"), [("B", 1), ("b", 0), ("B.", 0), (" B", 0), ("BB", 0), ("AB", 0), ("D", 0), ("", 0)]
)
def test_seed_in_llava_is_the_letter_exactly(words, right):
    scored = choice.exact_letter({"text": words}, ANIMALS)
    assert scored.values["accuracy"] == right and scored.valid == (words == "B")


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("B", 1),
        ("B. dog", 1),
        ("The answer is B.", 1),
        ("So, The answer is B, I think", 1),
        ("B.", 0),
        ("B ", 0),
        ("b", 0),
        ("(B)", 0),
        ("B.dog", 0),
        ("The answer is B", 0),
        ("The answer is B. The answer is B.", 0),
        ("A. The answer is B.", 0),
        ("D", 0),
        ("", 0),
    ],
)
def test_scienceqa(words, right):
    scored = choice.scienceqa({"text": words}, {**ANIMALS, "answer": 1})
    assert scored.values["accuracy"] == right and scored.valid == (right == 1 or words.startswith("A. "))


CAMBRIAN = [
    ("B", 1),
    ("b.", 1),
    ("(B)", 1),
    ("(B) dog", 1),
    ("B: dog", 1),
    ("banana", 1),
    ("The answer is B.", 1),
    ("The answer is: B", 0),
    ("Answer: (B)", 1),
    ("dog", 0),
    ("", 0),
    ("数", 0),
]


@pytest.mark.parametrize(("words", "right"), CAMBRIAN)
def test_letters_in_cambrian(words, right):
    assert value(choice.cambrian, words, **ANIMALS) == right
    assert value(choice.diagrams_cambrian, words, **{**ANIMALS, "answer": 1}) == right
    for source in ("ADE20K", "COCO", "Omni3D"):
        assert value(choice.cvbench, words, **{**ANIMALS, "answer": "(B)"}, source=source) == right


def test_what_is_special_in_cambrians_letters():
    assert value(choice.diagrams_cambrian, "1", **{**ANIMALS, "answer": 1}) == 1  # the index
    counts = {"choices": ["2", "3"], "answer": "(B)"}
    assert value(choice.cvbench, "3", **counts, source="Omni3D") == 1  # an option of one character
    assert value(choice.cvbench, "3", **counts, source="COCO") == 0


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("a", 1),
        ("(A)", 1),
        ("A.", 1),
        ("Open", 1),
        ("open.", 1),
        ("The answer is (a)", 1),
        ("(a) Open", 0),
        ("b", 0),
        ("", 0),
    ],
)
def test_mmvp(words, right):
    assert value(choice.mmvp, words, choices=["Open", "Closed"], answer="(a)") == right


@pytest.mark.parametrize(
    ("words", "right"), [("b", 1), ("B.", 1), ("b. cat", 1), ("Dog!", 1), ("(b)", 0), ("the dog", 0), ("", 0)]
)
def test_scienceqa_in_cambrian(words, right):
    assert value(choice.scienceqa_cambrian, words, **{**ANIMALS, "answer": 1}) == right


@pytest.mark.parametrize(
    ("words", "official", "cambrian"),
    [
        ("B", 1, 1),
        ("b.", 1, 1),
        ("(B)", 1, 0),
        ("Option B", 1, 0),
        ("The answer is B", 1, 0),
        ("bear", 1, 0),
        ("B: dog", 1, 1),
        ("The answer is: B", 0, 0),
        ("", 0, 0),
    ],
)
def test_mmstar(words, official, cambrian):
    reference = {"choices": list("ABCD"), "answer": "B"}
    assert value(choice.mmstar, words, **reference) == official
    scored = choice.mmstar_cambrian({"text": words}, reference)
    assert scored.values["accuracy"] == cambrian and bool(scored.note) == (not words)


@pytest.mark.parametrize(
    ("words", "answer", "right"),
    [
        ("Yes", "yes", 1),
        ("3.", "3", 1),
        ("The answer is 3 cats", "3", 1),
        ("yes,", "yes", 0),
        ("three", "3", 0),
        ("", "3", 0),
    ],
)
def test_realworldqa(words, answer, right):
    scored = choice.realworldqa({"text": words}, {"answer": answer})
    assert scored.values["accuracy"] == right and bool(scored.note) == (not words)


@pytest.mark.parametrize(
    ("words", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The answer is B.", "B"),
        ("A rabbit", "A"),
        ("catalog", "A"),
        ("dog", "B"),
        ("cat or dog", None),
        ("A or B", None),
        ("B because its ears are long and it barks a lot", None),
        ("The correct answer is **B**, as everyone who has seen one knows", "B"),
        ("I can't process this file.", "Z"),
        ("", None),
    ],
)
def test_mmbench_by_rules(words, letter):
    scored = choice.mmbench({"text": words}, ANIMALS)
    assert scored.parsed == letter
    assert scored.values["accuracy"] == (letter == "B") and scored.valid == (letter in ("A", "B"))


@pytest.mark.parametrize(
    ("words", "letter"),
    [
        ("(A) or (B)", "B"),
        ("A then B", "B"),
        ("A.", "A"),
        ("I think that it is the dog", "B"),
        ("dog", None),
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(words, letter):
    reference = {**ANIMALS, "question_type": "multiple-choice"}
    scored = text.mmmu({"text": words}, reference)
    assert (scored.parsed, scored.valid) == (letter, letter is not None)
    assert scored.values["accuracy"] == (letter == "B")
