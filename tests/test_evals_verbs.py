"""`jaxvlm eval`'s verbs that need no model: tasks, questions, score, export."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import eval_helpers
import pytest
from eval_files import lines, official_files, questions, tsv
from PIL import Image

from jaxvlm.evals import score, tasks
from jaxvlm.evals.asking import draw, write_questions
from jaxvlm.evals.question_file import EvalError
from jaxvlm.main import main


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
