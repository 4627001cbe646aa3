"""Scorers of short texts, boxes, captions and judges' words against values worked out by hand; see test_evals_scorers.py."""

from __future__ import annotations

import pytest

from jaxvlm.evals.scorers import boxes, captions, judged, text

ANIMALS = {"choices": ["cat", "dog", "blue"], "answer": "B"}


def value(scorer, words, **reference):
    """The accuracy that a scorer gives to `words`."""
    return scorer({"text": words}, reference).values["accuracy"]


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
    assert scored.values == {"mentions": 3, "hallucinated": 1, "clean": 0, "objects": 2, "covered": 2}
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
