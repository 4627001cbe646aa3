"""Official files in, submissions out, and the verbs over them."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import eval_helpers
import pytest
from PIL import Image

from jaxvlm.evals import score, submissions, tasks
from jaxvlm.evals.answers import match, read_answers
from jaxvlm.evals.asking import draw, write_questions
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed
from jaxvlm.evals.sheets import read_xlsx, write_xlsx
from jaxvlm.main import main


def questions(task, count=24):
    return completed(eval_helpers.questions(task, count), tasks.find_task(task).complete)


def dump(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only(q, *names):
    return {name: q[name] for name in names}


# ------------------------------------------------------------------------------------------------------ official files


def vqav2_folder(folder, found):
    dump(
        folder / "v2_OpenEnded_val_questions.json",
        {"questions": [only(q, "question_id", "image_id", "question") for q in found]},
    )
    kept = [{k: v for k, v in q.items() if k != "question"} for q in found]
    dump(folder / "v2_mscoco_val_annotations.json", {"annotations": kept[::-1]})
    return folder


def pope_folder(folder, found):
    for category in ("adversarial", "popular", "random"):
        part = [q for q in found if q["category"] == category]
        lines(folder / f"coco_pope_{category}.json", [only(q, "question_id", "image", "text", "label") for q in part])
    return folder


def mme_folder(folder, found, nested=False):
    for q in found:
        if nested:
            path = folder / q["category"] / "questions_answers_YN" / f"{q['image'][:-4]}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            line = [q["question"], q["answer"]]
        else:
            path, line = folder / f"{q['category']}.txt", [q["image"], q["question"], q["answer"]]
        with path.open("a") as file:
            file.write("\t".join(line) + "\n")
    return folder


def scienceqa_folder(folder, found):
    dump(folder / "problems.json", {q["pid"]: q for q in found})
    dump(folder / "pid_splits.json", {"test": [q["pid"] for q in found], "val": [found[0]["pid"]]})
    return folder


def tsv(path, found):
    names = list(dict.fromkeys(name for q in found for name in q))
    rows = ["\t".join(names), *("\t".join(str(q.get(name, "nan")) for name in names) for q in found)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def mmvp_csv(path, found):
    rows = [f'{q["Index"]},{q["Question"]},"{q["Options"]}",{q["Correct Answer"]}' for q in found]
    path.write_text("\n".join(["lndex,Question,Options,Correct Answer", *rows]), encoding="utf-8-sig")
    return path


def refer_folder(folder, found):
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": "val", "sentences": [{"sent_id": i, "sent": "man"}]}
        for i in range(len(found))
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps([*refs, {**refs[0], "split": "testA"}]))
    boxes = [{"id": i, "bbox": [64, 48, 256, 336]} for i in range(len(found))]  # x, y, width, height
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(len(found))]
    dump(folder / "instances.json", {"annotations": boxes, "images": images})
    return folder


def bench_folder(folder, found):
    lines(folder / "questions.jsonl", [only(q, "question_id", "image", "text", "category") for q in found])
    lines(folder / "context.jsonl", [{"image": q["image"], "caption": q["context"]} for q in found])
    lines(
        folder / "answers_gpt4.jsonl", [{"question_id": q["question_id"], "text": q["reference_answer"]} for q in found]
    )
    return folder


def chair_folder(folder, found):
    (folder / "synonyms.txt").write_text("dog\ncat, kitten\n")
    dump(folder / "images.json", {q["image"]: q["objects"] for q in found})
    return folder


WRITERS = {
    "vqav2": vqav2_folder,
    "gqa": lambda f, found: dump(
        f / "q.json", {q["questionId"]: {k: v for k, v in q.items() if k != "questionId"} for q in found}
    ),
    "vizwiz": lambda f, found: dump(f / "val.json", found),
    "textvqa": lambda f, found: dump(f / "TextVQA_0.5.1_val.json", {"data": found}),
    "pope": pope_folder,
    "mme": mme_folder,
    "scienceqa": scienceqa_folder,
    "mmbench": lambda f, found: tsv(f / "mmbench_dev.tsv", found),
    "seed-bench": lambda f, found: dump(f / "SEED-Bench.json", {"questions": found, "question_type": {"x": 1}}),
    "mm-vet": lambda f, found: dump(
        f / "mm-vet.json", {q["id"]: {k: v for k, v in q.items() if k != "id"} for q in found}
    ),
    "llava-bench-wild": bench_folder,
    "refcoco": refer_folder,
    "ocid-ref": lambda f, found: dump(
        f / "val.json", {q["id"]: {k: v for k, v in q.items() if k != "id"} for q in found}
    ),
    "vsr": lambda f, found: lines(f / "test.jsonl", found),
    "tallyqa": lambda f, found: dump(f / "test.json", found),
    "ai2d": lambda f, found: lines(f / "ai2d.jsonl", found),
    "mmvp": lambda f, found: mmvp_csv(f / "Questions.csv", found),
    "cv-bench": lambda f, found: lines(f / "cvbench.jsonl", found),
    "realworldqa": lambda f, found: lines(f / "real.jsonl", found),
    "docvqa": lambda f, found: dump(f / "val_v1.0.json", {"data": found}),
    "st-vqa": lambda f, found: dump(f / "train_task_3.json", {"data": found}),
    "mmmu": lambda f, found: lines(f / "mmmu.jsonl", found),
    "mathvista": lambda f, found: dump(f / "testmini.json", {q["pid"]: q for q in found}),
    "mmstar": lambda f, found: lines(f / "mmstar.jsonl", found),
    "ocrbench": lambda f, found: dump(f / "OCRBench.json", found),
    "chair": chair_folder,
}
ALIKE = {
    "textvqa-ocr": "textvqa",
    "mmbench-cn": "mmbench",
    "infovqa": "docvqa",
    "refcoco+": "refcoco",
    "refcocog": "refcoco",
}


def official_files(task, folder, count=24):
    folder.mkdir(exist_ok=True)
    return WRITERS[ALIKE.get(task, task)](folder, eval_helpers.questions(task, count))


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


# -------------------------------------------------------------------------------------------------------------- verbs


def run(capsys, *argv):
    """Exit code, stdout and stderr of `jaxvlm eval ...`."""
    try:
        code = main(["eval", *map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_scoring_files(tmp_path, capsys):
    references = official_files("gqa", tmp_path / "gqa")
    found = questions("gqa")
    words = [q["answer"].upper() + "." if i else "grey" for i, q in enumerate(found)]
    made = [
        {"question_id": q["questionId"], "prompt": "what?", "text": w, "model_id": "llava-7b"}
        for q, w in zip(found, words, strict=True)
    ]
    answers = lines(tmp_path / "merge.jsonl", made)
    options = ("--task", "gqa", "--answers", answers, "--references", references)
    out = tmp_path / "result.json"
    code, shown, _ = run(capsys, "score", *options, "--protocol", "llava15", "--out", out)
    assert code == 0 and "gqa, llava15: accuracy 95.83" in shown and "llava-7b" in shown and "0 of 24" in shown
    result = json.loads(out.read_text())
    assert result["value"] == pytest.approx(100 * 23 / 24) and len(result["per_sample"]) == 24
    submission = tmp_path / "gqa.json"
    assert run(capsys, "export", *options, "--protocol", "llava15", "--out", submission)[:2] == (
        0,
        f"{submission}: 24 answers.\n",
    )
    again = run(capsys, "score", *options[:2], "--answers", submission, *options[4:], "--protocol", "official")
    assert again[0] == 0 and "accuracy 95.83" in again[1]


def test_the_verbs_explain_themselves(tmp_path, capsys):
    assert run(capsys)[1].startswith("jaxvlm eval: evaluate a run, and score answers")
    code, shown, _ = run(capsys, "tasks")
    assert code == 0 and all(f"  {name} " in shown for name in tasks.TASKS)
    assert "2,910" in run(capsys, "tasks", "pope")[1]
    for verb in ("score", "export", "tasks"):
        assert run(capsys, verb, "--help")[0] == 0
    cases = [
        (("tasks", "pop"), "Did you mean 'pope'?"),
        (("scor",), "did you mean score?"),
        (("score", *"--task gqa --protocol llava --answers a --references r".split()), "Did you mean 'llava15'?"),
        (("score", *"--task gqa --protocol llava15 --answers a --references r".split()), "r is not a file"),
    ]
    for argv, message in cases:
        code, _, error = run(capsys, *argv)
        assert code == 1 and message in error


def test_the_documentation_lists_what_there_is(capsys):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert run(capsys, "tasks", "--markdown")[1] in page  # anew: jaxvlm eval tasks --markdown


# ------------------------------------------------------------------------------------------------------ what is asked


def pictures(folder, names, size=(8, 6)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 0, 0)).save(folder / name)
    return folder


def asked(task, protocol, found, out, **options):
    assert write_questions(task, protocol, found, out, **options) == len(found)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_questions_as_the_protocol_asks_them(tmp_path):
    found = questions("vqav2", 7)  # of three images
    images = pictures(tmp_path / "images", [f"COCO_val2014_{i:012}.jpg" for i in range(3)])
    made = asked("vqav2", "llava15", found, tmp_path / "q.jsonl", images=images)
    suffix = "\nAnswer the question using a single word or phrase."
    assert made[3] == {"question_id": "3", "text": "what?" + suffix, "image": "COCO_val2014_000000000001.jpg"}
    blind = asked("vqav2", "llava15", found, tmp_path / "q.jsonl", blind="noimage")
    assert all("image" not in q for q in blind) and [q["text"] for q in blind] == [q["text"] for q in made]
    other = asked("vqav2", "llava15", found, tmp_path / "q.jsonl", images=images, blind="shuffle", seed=3)
    assert all(a["image"] != b["image"] for a, b in zip(made, other, strict=True))
    (gray,) = {q["image"] for q in asked("vqav2", "llava15", found, tmp_path / "q.jsonl", images=images, blind="gray")}
    assert Image.open(gray).size == (8, 6) and Image.open(gray).getpixel((3, 3)) == (127, 127, 127)
    answers = [{"question_id": q["question_id"], "prompt": q["text"], "text": "x"} for q in made]
    assert score("vqav2", "llava15", answers, found)["prompts_as_asked"] == "7 of 7"
    with pytest.raises(EvalError, match="holds no picture of question 0: none of 0, 0.jpg"):
        asked("vqav2", "llava15", found, tmp_path / "q.jsonl", images=tmp_path)
    with pytest.raises(EvalError, match="Question 0 of mmmu names no picture"):
        asked("mmmu", "cambrian", [{"id": "0", "question": "?", "question_type": "open"}], tmp_path / "q.jsonl")
    (choosing,) = asked("seed-bench", "official", questions("seed-bench", 1), tmp_path / "q.jsonl", blind="noimage")
    assert choosing == {"question_id": "0", "text": "what?", "options": [f"option {letter}" for letter in "abcd"]}


def test_draws_are_nested_and_keep_groups_whole():
    found = questions("mmbench", 90)
    small, large = draw(found, 20, 3), draw(found, 50, 3)
    assert 20 <= len(small) < 24 and 50 <= len(large) < 54
    assert [q for q in large if q in small] == small and [q for q in found if q in large] == large
    for drawn in (small, large):
        kept = {q["group"] for q in drawn}
        assert len(drawn) == sum(q["group"] in kept for q in found)
    assert draw(found, 20, 4) != small and draw(found, 999, 0) == found


def test_questions_without_a_picture_of_scienceqa(tmp_path):
    found = questions("scienceqa", 2)
    made = asked("scienceqa", "llava15", found, tmp_path / "q.jsonl", images=pictures(tmp_path, ["1/image.png"]))
    assert [q.get("image") for q in made] == [None, "1/image.png"]
    assert made[1]["text"].startswith("Context: N/A\nQuestion: what?\nOptions: (A) red (B) blue (C) green\nAnswer with")


def test_pictures_inside_mmbenchs_table(tmp_path, capsys):
    found = eval_helpers.questions("mmbench", 5)  # circles of two and of three
    image = base64.b64encode(pictures(tmp_path, ["p.jpg"]).joinpath("p.jpg").read_bytes()).decode()
    table = tsv(tmp_path / "mmbench_dev.tsv", [{**q, "image": image} for q in found])
    options = ("--task", "mmbench", "--protocol", "llava15", "--references", table, "--images", tmp_path / "images")
    assert run(capsys, "questions", *options, "--out", tmp_path / "q.jsonl")[0] == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0.jpg", "1.jpg"]
    made = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [q["image"] for q in made] == [f"{int(q['index']) % 1_000_000}.jpg" for q in found]
    assert Image.open(tmp_path / "images" / "1.jpg").size == (8, 6)


def test_questions_answers_and_score_by_verbs(tmp_path, capsys):
    """Prismatic's way round: candidates are asked for, their probabilities scored."""
    references = official_files("vsr", tmp_path / "vsr", 6)
    images = pictures(tmp_path / "images", [f"{i}.jpg" for i in range(6)])
    out = tmp_path / "q.jsonl"
    options = ("--task", "vsr", "--protocol", "prismatic", "--references", references)
    code, shown, _ = run(capsys, "questions", *options, "--images", images, "--blind", "gray", "--out", out)
    assert code == 0 and "6 questions. To answer them:\n  jaxvlm generate --run RUN --input" in shown
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert {tuple(q["candidates"]) for q in made} == {("True", "False")}
    answers = [{"question_id": q["question_id"], "text": "True", "probabilities": [0.7, 0.3]} for q in made]
    answers = lines(tmp_path / "a.jsonl", answers)
    code, shown, _ = run(capsys, "score", *options, "--answers", answers)
    true = 100 * sum(q["label"] for q in questions("vsr", 6)) / 6
    assert code == 0 and f"vsr, prismatic: accuracy {true:.2f}" in shown
