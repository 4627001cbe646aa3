"""Every scorer against values worked out by hand from what the official code is described to do."""

from __future__ import annotations

import math

import pytest

from jaxvlm.evals.scorers import boxes, captions, choice, judged, normalise, text, vqa, yesno


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
    assert value(choice.cambrian_period_only, words, **ANIMALS) == right
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


# ---------------------------------------------------------------------------------------------------------- short texts


@pytest.mark.parametrize(
    ("words", "answer", "right"),
    [
        ("So the result is 3.5.", "3.5", 1),
        ("It costs 3,500 in all", "3500", 1),
        ("x = 7", "7", 1),
        ("The answer is a red car", "red car", 1),
        ("2.001", "2", 1),  # numbers to two decimals
        ("23", "3", 0),
        ("nothing", "3", 0),
        ("", "3", 0),
        ("inf", "3", 0),
        ("nan", "nan", 0),
    ],
)
def test_mmmu_open_questions(words, answer, right):
    assert value(text.mmmu, words, question_type="open", answer=answer) == right


def test_mmmu_in_cambrian():
    closed = {**ANIMALS, "question_type": "multiple-choice"}
    assert [value(text.mmmu_cambrian, t, **closed) for t in ("(B)", "banana", "The answer is: B")] == [1, 1, 0]
    opened = {"question_type": "open", "answer": "100"}
    given = ("100", "The answer is 100.", "105", "105.5", "95", "nan")  # 5 % of the answer given: 105 * 0.05 = 5.25
    assert [value(text.mmmu_cambrian, t, **opened) for t in given] == [1, 1, 1, 0, 0, 0]


def extraction(words, kind, answer, **more):
    reference = {"question_type": "free_form", "answer_type": kind, "answer": answer, "choices": None} | more
    scored = text.mathvista({"text": words}, reference)
    return scored.parsed, scored.values["accuracy"], scored.valid


@pytest.mark.parametrize(
    ("words", "kind", "parsed", "right"),
    [
        ("3", "integer", "3", 1),
        ("3.7", "integer", "3", 1),
        ('The answer is "3".', "integer", "3", 1),
        ("three", "integer", None, 0),
        ("inf", "integer", None, 0),
        ("-inf", "integer", None, 0),
        ("nan", "integer", None, 0),
        ("1e400", "integer", None, 0),
        ("", "integer", None, 0),
        ("3.04", "float", "3.0", 0),
        ("inf", "float", "inf", 0),
        ("nan", "float", "nan", 0),
        ("3", "list", "3", 1),
    ],
)
def test_mathvista_numbers(words, kind, parsed, right):
    assert extraction(words, kind, "3", precision=1.0) == (parsed, right, parsed is not None)


def test_mathvista_choices_take_the_nearest():
    more = {"question_type": "multi_choice", "choices": ["cat", "dog", "blue"]}
    assert extraction("(b) whatever", "text", "dog", **more) == ("dog", 1, True)
    assert extraction("B", "text", "dog", **more) == ("dog", 1, True)
    assert extraction("dgo", "text", "dog", **more) == ("dog", 1, False)
    assert extraction("", "text", "dog", **more) == ("cat", 0, False)
    judged_ = {"text": "long reasoning", "extraction": "C"}
    assert text.mathvista(judged_, {**more, "answer_type": "text", "answer": "blue"}).values["accuracy"] == 1


def test_mathvista_in_cambrian():
    closed = {"question_type": "multi_choice", "choices": ["cat", "dog"], "answer": "dog"}
    assert [value(text.mathvista_cambrian, t, **closed) for t in ("B", "b", "dog", "B.")] == [1, 1, 0, 0]
    opened = {"question_type": "free_form", "answer": "3"}
    # Its tolerance is relative to the answer given, so inf is near every number.
    assert [value(text.mathvista_cambrian, t, **opened) for t in ("3", "3.1", "3.2", "inf", "nan")] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("words", "answer", "official", "cambrian"),
    [
        ("105", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("95", "100", 1, 1),
        ("50%", "0.5", 1, 0),
        ("0", "0", 1, 1),
        ("0.0", "0", 0, 1),
        ("-3", "-3.1", 1, 1),
        ("Yes", "yes", 1, 1),
        ("1,000", "1000", 0, 0),
        ("inf", "3", 0, 0),
        ("nan", "3", 0, 0),
        ("%", "3", 0, 0),
        ("", "3", 0, 0),
    ],
)
def test_chartqa(words, answer, official, cambrian):
    assert value(text.chartqa, words, answer=answer) == official
    assert value(text.chartqa_cambrian, words, answer=answer) == cambrian


@pytest.mark.parametrize(
    ("words", "answers", "expected"),
    [
        ("Hello", ["hello"], 1),
        ("  two   words ", ["two words"], 1),
        ("helo", ["hello", "x"], 0.8),
        ("ab", ["abcd"], 0.5),
        ("a", ["abc"], 0),  # 1/3 is below one half
        ("", ["abc"], 0),
        ("", [""], 1),
        ("數字", ["数字"], 0.5),
    ],
)
def test_anls(words, answers, expected):
    assert text.anls({"text": words}, {"answers": answers}).values["anls"] == pytest.approx(expected)


def test_stvqas_anls_stops_at_two_empty_strings():
    assert text.stvqa_anls({"text": "helo"}, {"answers": ["hello"]}).values["anls"] == pytest.approx(0.8)
    empty = text.stvqa_anls({"text": " "}, {"answers": [""]})
    assert empty.values["anls"] == 0 and not empty.valid and "divides by zero" in empty.note


def test_ocrbench_looks_for_the_answer_anywhere():
    assert value(text.ocrbench, "It says HELLO\nworld.", answers=["hello world"]) == 1
    assert value(text.ocrbench, "hell", answers="hello") == 0
    formula = {"type": text.FORMULAS, "answers": [r"\frac { a } { b }"]}
    assert [value(text.ocrbench, t, **formula) for t in (r"\frac{a}{b}", r"\FRAC{a}{b}")] == [1, 0]
    assert value(text.ocrbench, "", answers=[""]) == 1


def test_tallyqa_by_text():
    assert [value(text.tallyqa_text, t, answer=2) for t in ("2", "two.", "2 dogs", "2.0", "")] == [1, 1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("words", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4]),
        ("[0,0,1,1]", [0, 0, 1, 1]),
        ("[False, False, True, True]", [0, 0, 1, 1]),
        ("The box is [0.1, 0.2, 0.3, 0.4]", None),
        ("[0.1, 0.2, 0.3, 0.4].", None),
        ("(0.1, 0.2, 0.3, 0.4)", None),
        ("[0.3, 0.2, 0.1, 0.4]", None),
        ("[1, 1, 1, 1]", None),
        ("[0.1, 0.2, 1.3, 0.4]", None),
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("[0.1, 0.2, 'a', 0.4]", None),
        ("[0.1, 0.2, nan, 0.4]", None),
        ("[0.1, 0.2, 0.3, 1j]", None),
        ("[" * 9999, None),
        ("\0", None),
        ("", None),
    ],
)
def test_boxes_in_text(words, box):
    assert boxes.parse_box(words) == box


def test_overlap():
    assert boxes.iou([0, 0, 0.5, 1], [0.25, 0, 0.75, 1]) == pytest.approx(1 / 3)
    assert boxes.iou([0, 0, 1, 1], [0, 0, 1, 1]) == 1
    assert boxes.iou([0, 0, 0.4, 1], [0.5, 0, 1, 1]) == 0
    assert boxes.iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0


def test_rounding_the_truth_decides_at_one_half():
    reference = {"bbox": [0, 0, 495.1, 1000], "width": 1000, "height": 1000}
    assert value(boxes.refcoco, "[0, 0, 1, 1]", **reference) == 0
    assert value(boxes.refcoco_prismatic, "[0, 0, 1, 1]", **reference) == 1


@pytest.mark.parametrize(
    ("width", "height", "padded"), [(200, 100, [0, 0.25, 1, 0.75]), (100, 200, [0.25, 0, 0.75, 1])]
)
def test_boxes_in_the_padded_frame(width, height, padded):
    whole = {"bbox": [0, 0, width, height], "width": width, "height": height}
    scored = boxes.refcoco_padded({"text": str(padded)}, whole)
    assert scored.values == {"accuracy": 1, "iou": 1}
    assert boxes.refcoco({"text": str(padded)}, whole).values["iou"] == pytest.approx(0.5)


def test_ocid_ref_asks_for_a_quarter():
    reference = {"bbox": [0, 0, 640, 120]}  # a quarter of the image
    assert value(boxes.ocid_ref, "[0, 0, 1, 1]", **reference) == 1
    assert value(boxes.ocid_ref, "[0.1, 0, 1, 0.99]", **reference) == 0


# ------------------------------------------------------------------------------------------------------ captions, judges

SYNONYMS = captions.read_synonyms(
    [
        "person, man, woman, child\n",
        "dog, puppy\n",
        "dining table, table\n",
        "hot dog\n",
        "bird\n",
        "toilet\n",
        "chair, seat\n",
    ]
)


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and a woman.", ["person", "person"]),
        ("Puppies eat a hot dog at the TABLE", ["dog", "hot dog", "dining table"]),
        ("a baby bird on a seat", ["bird", "chair"]),
        ("the toilet seat is up, a seat beside", ["toilet"]),
        ("children's dogs", ["dog"]),
        ("", []),
        ("猫", []),
    ],
)
def test_objects_that_a_caption_names(caption, objects):
    assert captions.objects_named(caption, SYNONYMS) == objects


def test_chair_counts_what_the_image_lacks():
    scored = captions.chair(
        {"text": "A man walks two dogs by a table"}, {"synonyms": SYNONYMS, "objects": ["person", "dog"]}
    )
    assert scored.values == {"mentions": 3, "hallucinated": 1, "clean": 0}
    assert scored.parsed["hallucinated"] == ["dining table"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0.5", 0.5),
        ("1", 1),
        ("0.8 because", 0.8),
        ("0.5.", None),
        ("1.5", None),
        ("-0.1", None),
        ("nan", None),
        ("", None),
    ],
)
def test_mmvets_rating(content, expected):
    assert judged.rating(content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("8 7", (8, 7)),
        ("8,7", (8, 7)),
        ("8 7.5\nBecause", (8, 7.5)),
        ("8, 7", (-1, -1)),
        ("8 7 ", (-1, -1)),
        ("8", (-1, -1)),
        ("eight 7", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_llava_benchs_pair(content, expected):
    assert judged.pair(content) == expected
