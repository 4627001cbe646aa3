"""Official files in, submissions out."""

from __future__ import annotations

import json
import pickle

import eval_helpers
import pytest
from eval_files import ALIKE, WRITERS, dump, lines, mme_folder, official_files, only, questions, refer_folder

from jaxvlm.evals import score, submissions, tasks
from jaxvlm.evals.answers import match, read_answers
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed
from jaxvlm.evals.sheets import read_xlsx, write_xlsx


@pytest.mark.parametrize("task", sorted({*WRITERS, *ALIKE}))
def test_official_files_give_what_plain_records_give(task, tmp_path):
    read, plain = tasks.read_references(task, official_files(task, tmp_path)), questions(task)
    assert sorted(q["id"] for q in read) == sorted(q["id"] for q in plain)
    answers = [eval_helpers.right_answer(task, p, how.takes, q) for p, how in [_first(task)] for q in plain]
    protocol = _first(task)[0]
    first, second = (score(task, protocol, answers, references) for references in (read, plain))
    assert first["value"] == second["value"] and first["aggregate"] == pytest.approx(second["aggregate"])
    assert first["prompt"] and {s["id"]: s["group"] for s in first["per_sample"]} == {
        q["id"]: q["group"] for q in plain
    }


def _first(task):
    return next(iter(tasks.TASKS[task].protocols.items()))


def test_no_official_form_is_untried():
    assert {*WRITERS, *ALIKE, "chartqa", "llava-bench-coco"} == set(tasks.TASKS)  # those two: below


def test_other_layouts(tmp_path):
    found = eval_helpers.questions("mme", 8)
    nested = tasks.read_references("mme", mme_folder(tmp_path / "nested", found, nested=True))
    assert [q["id"] for q in nested] == sorted(q["id"] for q in questions("mme", 8))
    (tmp_path / "chart").mkdir()
    for kind in ("human", "augmented"):
        dump(tmp_path / "chart" / f"test_{kind}.json", [{"imgname": "1.png", "query": "how much?", "label": "3"}])
    charts = tasks.read_references("chartqa", tmp_path / "chart")
    assert [(q["id"], q["type"], q["answer"]) for q in charts] == [
        ("test_augmented/0", "augmented", "3"),
        ("test_human/0", "human", "3"),
    ]
    page = {
        "imageName": "1.png",
        "questions": {"what?": {"questionId": "1-0", "answerTexts": list("wxyz"), "correctAnswer": 2}},
    }
    (tmp_path / "pages").mkdir()
    dump(tmp_path / "pages" / "1.png.json", page)
    (diagram,) = tasks.read_references("ai2d", tmp_path / "pages")
    assert (diagram["answer"], diagram["choices"], diagram["question"], diagram["group"]) == (
        2,
        list("wxyz"),
        "what?",
        "1.png",
    )
    names = {"question_id": 0, "image": "1.jpg", "text": "what?", "category": "conv"}
    coco = tmp_path / "coco"
    coco.mkdir()
    lines(coco / "qa90_questions.jsonl", [names])
    lines(coco / "qa90_gpt4_answer.jsonl", [{"question_id": 0, "text": "A dog."}])
    boxed = {
        "image": "1.jpg",
        "captions": ["a dog", "one dog"],
        "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}],
    }
    lines(coco / "caps_boxes_coco2014_val_80.jsonl", [boxed])
    (asked,) = tasks.read_references("llava-bench-coco", coco)
    assert asked["context"] == "a dog\none dog\n\ndog: [0, 0, 1, 1]" and asked["rule"] == "conv"
    ocr = {"data": [{"image_id": "im0", "ocr_tokens": ["STOP", "4"]}]}
    folder = tmp_path / "text"
    folder.mkdir()
    bare = [{k: v for k, v in q.items() if k != "ocr_tokens"} for q in eval_helpers.questions("textvqa", 2)]
    path = dump(folder / "TextVQA_0.5.1_val.json", {"data": bare})
    dump(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", ocr)
    prompt = tasks.find("textvqa-ocr", "llava15")[1].prompt
    short = "Answer the question using a single word or phrase."
    assert [prompt(q) for q in tasks.read_references("textvqa-ocr", path)] == [
        f"what?\nReference OCR token: STOP, 4\n{short}",
        f"what?\nReference OCR token:\n{short}",
    ]


def test_splits_in_one_folder(tmp_path):
    folder = official_files("refcoco", tmp_path / "refcoco")
    assert (
        len(tasks.read_references("refcoco", folder)) == 24
        and len(tasks.read_references("refcoco", folder, "testA")) == 1
    )
    folder = official_files("scienceqa", tmp_path / "sqa")
    assert len(tasks.read_references("scienceqa", folder, "val")) == 1
    for task, name in (("refcoco", "refcoco"), ("scienceqa", "sqa")):
        with pytest.raises(EvalError, match="no questions of the split 'testB'"):
            tasks.read_references(task, tmp_path / name, "testB")


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_files_that_are_not_what_they_should_be(tmp_path):
    cases = [
        ("gqa", tmp_path / "no.json", "no.json is not a file; `jaxvlm eval tasks NAME`"),
        ("gqa", dump(tmp_path / "list.json", [1]), "is not what gqa reads, testdev_balanced_questions.json"),
        ("vqav2", tmp_path, "holds 0 files \\*uestions.json"),
        ("pope", tmp_path, "holds no coco_pope"),
        ("ocrbench", dump(tmp_path / "none.json", []), "none.json holds no questions"),
        ("vizwiz", dump(tmp_path / "vizwiz.json", [{"question": "?"}]), "Reference 0 is not in the official form"),
    ]
    (tmp_path / "torn.jsonl").write_text('{"image": "1"}\n{"image"')
    cases.append(("vsr", tmp_path / "torn.jsonl", "torn.jsonl:2 is not a line of JSON"))
    folder = refer_folder(tmp_path, [{}])
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Harmful()]))
    cases.append(("refcoco", folder, "asks for builtins.print; a file of referring expressions needs no such thing"))
    for task, path, message in cases:
        with pytest.raises(EvalError, match=message):
            tasks.read_references(task, path)


# ------------------------------------------------------------------------------------------------------------ answers


def test_llavas_own_numbering(tmp_path):
    """MME and TextVQA: a question_id is an image's, and the prompt tells which question; MM-Vet and VizWiz: a part of the id."""
    cases = {
        "mme": lambda q: {
            "question_id": f"{q['category']}/{q['image'].replace('.jpg', '.png')}",
            "prompt": q["question"].replace("Please answer yes or no.", "")
            + "\nAnswer the question using a single word or phrase.",
        },
        "textvqa-ocr": lambda q: {
            "question_id": q["image_id"],
            "prompt": f"{q['question']}\nReference OCR token: STOP\nAnswer the question using a single word or phrase.",
        },
        "mm-vet": lambda q: {"question_id": int(q["id"][3:])},
        "vizwiz": lambda q: {"question_id": q["image"][:-4]},
        "ocrbench": lambda q: {"id": int(q["id"].split("/")[1]), "dataset_name": q["dataset_name"]},  # its own file's
    }
    for task, answer in cases.items():
        found = questions(task)
        path = lines(tmp_path / "answers.jsonl", [{**answer(q), "text": q["id"]} for q in found])
        assert {name: a["text"] for name, a in match(read_answers(path), found).items()} == {
            q["id"]: q["id"] for q in found
        }


def test_an_id_goes_before_another_questions_other_name():
    found = completed([{"id": "v1_1", "x": 1}, {"id": "1", "x": 2}], dict)
    made = match([{"question_id": "1", "question": "?", "text": "a"}, {"question_id": "v1_1", "text": "b"}], found)
    assert {name: answer["text"] for name, answer in made.items()} == {"1": "a", "v1_1": "b"}


def test_llavas_pope_answers_need_its_questions(tmp_path):
    """The official files each number from 1; LLaVA numbers all three in one go."""
    found = completed(
        [{**q, "question_id": q["question_id"] // 3} for q in eval_helpers.questions("pope", 24)],
        tasks.TASKS["pope"].complete,
    )
    numbered = list(enumerate(found[::-1]))
    suffix = "\nAnswer the question using a single word or phrase."
    asked = [{"question_id": i, "text": q["text"] + suffix, **only(q, "image", "category")} for i, q in numbered]
    asked = lines(tmp_path / "llava_pope_test.jsonl", asked)
    path = lines(
        tmp_path / "a.jsonl", [{"question_id": i, "text": q["label"], "prompt": "Is it?"} for i, q in numbered]
    )
    assert score("pope", "llava15", read_answers(path, asked), found)["value"] == 100
    with pytest.raises(EvalError, match="could be several questions'.*--questions"):
        match(read_answers(path), found)
    lines(path, [{"question_id": 99, "text": "no"}])
    with pytest.raises(EvalError, match="answers the question 99, which"):
        read_answers(path, asked)


WORDS = ["Yes.", "No", "two dogs", "The red, one", "", 'tab\there "quoted"', "数 <b>&\x01"]


@pytest.mark.parametrize("task", sorted(submissions.WRITERS))
def test_a_submission_scores_as_the_answers_do(task, tmp_path):
    """What is exported under LLaVA's protocol is rewritten already, so the official scorer gives it LLaVA's score."""
    found = questions(task)
    made = [{"id": q["id"], "text": WORDS[i % len(WORDS)]} for i, q in enumerate(found)]
    protocol = next(p for p in ("llava15", "official") if p in tasks.TASKS[task].protocols)
    out = tmp_path / {"mmbench": "a.xlsx", "mmbench-cn": "a.xlsx", "seed-bench": "a.jsonl"}.get(task, "a.json")
    assert submissions.export(task, protocol, made, found, out) == len(found)
    again = match(read_answers(out), found)
    assert list(again) == [q["id"] for q in found] or task in ("mme", "pope")
    how = tasks.find(task, protocol)[1]
    if how.takes == "text":
        after = tasks.find(task, "official" if how.rewrite else protocol)[1].scorer
        expected = score(task, protocol, made, found)["per_sample"]
        assert [after(again[q["id"]], q).values for q in found] == [sample["scores"] for sample in expected]
    else:
        assert [again[q["id"]]["text"] for q in found] == [a["text"] for a in made]


def test_submissions_in_the_official_fields(tmp_path):
    def exported(task, protocol, text, name="out.json"):
        found = questions(task, 1)
        submissions.export(task, protocol, [{"id": found[0]["id"], "text": text}], found, tmp_path / name)
        return tmp_path / name

    assert json.loads(exported("vqav2", "llava15", "Yes.").read_text()) == [{"question_id": 0, "answer": "yes"}]
    assert json.loads(exported("vqav2", "official", "Yes.").read_text()) == [{"question_id": 0, "answer": "Yes."}]
    assert json.loads(exported("gqa", "llava15", "Red.").read_text()) == [{"questionId": "0", "prediction": "red"}]
    assert json.loads(exported("vizwiz", "llava15", "Two").read_text()) == [
        {"image": "VizWiz_val_00000000.jpg", "answer": "2"}
    ]
    assert json.loads(exported("mm-vet", "llava15", "x").read_text()) == {"v1_0": "x"}
    assert json.loads(exported("seed-bench", "llava15", "B").read_text()) == {"question_id": "0", "prediction": "B"}
    pope = exported("pope", "llava15", "No", "pope") / "adversarial.jsonl"
    assert json.loads(pope.read_text())["answer"] == "No"
    with pytest.raises(EvalError, match="mmvp has no submission file; these have: vqav2"):
        submissions.export("mmvp", "cambrian", [], [], tmp_path / "x")


def test_mmes_results_are_lines_of_its_own_files(tmp_path):
    found = questions("mme", 2)
    made = [{"id": q["id"], "text": "Yes\n\tindeed"} for q in found]
    submissions.export("mme", "official", made, found, tmp_path / "mme")
    assert (tmp_path / "mme" / "existence.txt").read_text().split("\n") == [
        "0000.jpg\tIs it 0? Please answer yes or no.\tYes\tYes  indeed",
        "0000.jpg\tIs it 1? Please answer yes or no.\tNo\tYes  indeed",
        "",
    ]


def test_sheets(tmp_path):
    columns = [f"c{i}" for i in range(30)]  # beyond Z
    rows = [{name: f" {name} <&> 数\n" for name in columns}, {"c0": 3, "c29": "x"}, {}]
    write_xlsx(tmp_path / "a.xlsx", columns, rows)
    empty = dict.fromkeys(columns, "")
    assert read_xlsx(tmp_path / "a.xlsx") == [rows[0], {**empty, "c0": "3", "c29": "x"}, empty]
    (tmp_path / "b.xlsx").write_text("no workbook")
    with pytest.raises(EvalError, match="b.xlsx is not a workbook"):
        read_xlsx(tmp_path / "b.xlsx")
