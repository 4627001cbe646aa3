"""Readers of the benchmarks' official files: a path -> reference records in the official fields.

Each record also has `id` (a string, unique) and `image` (a path under the benchmark's folder, an index, or None), `group`
where questions stand or fall together, and `choices` where there are any. Images are never opened here.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvlm.evals.scorers.captions import read_synonyms
from jaxvlm.evals.question_file import EvalError

csv.field_size_limit(1 << 27)  # MMBench's TSV holds its images in base64


def read_json(path: Path) -> Any:
    """A JSON file; raises `EvalError` naming it if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvalError(f"{path} does not exist; docs/evaluation.md lists the files that each task reads.") from None
    except ValueError as error:
        raise EvalError(f"{path} is not JSON: {error}.") from None


def read_lines(path: Path) -> list[dict]:
    """A JSONL file, or a JSON list; raises `EvalError` naming the file and line."""
    if not path.is_file():
        raise EvalError(f"{path} does not exist; docs/evaluation.md lists the files that each task reads.")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return read_json(path)
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise EvalError(f"{path}:{number} is not a line of JSON: {error}.") from None
    return records


def rows(path: Path) -> list[dict]:
    """Any table of records: .json (a list), .jsonl, .tsv, .csv; empty cells are absent."""
    if path.suffix in (".tsv", ".csv"):
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            return [{key: value for key, value in row.items() if value not in ("", None)} for row in table]
    return read_lines(path)


def one(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches; `EvalError` if there is none, or more than one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise EvalError(f"{folder} holds {len(found)} files {pattern}; exactly one is needed.")
    return found[0]


def numbered(records: list[dict]) -> Iterator[dict]:
    """Records with their place as `id`, where a data set numbers its questions so (the Hub's copies)."""
    return ({"id": str(index), **record} for index, record in enumerate(records))


# ------------------------------------------------------------------------------------------------------------- open VQA


def vqav2(path: Path) -> list[dict]:
    """A folder with *questions.json and *annotations.json."""
    questions = read_json(one(path, "*uestions.json"))["questions"]
    answers = {item["question_id"]: item for item in read_json(one(path, "*nnotations.json"))["annotations"]}
    lacking = [item["question_id"] for item in questions if item["question_id"] not in answers]
    if lacking:
        raise EvalError(f"{path}: {len(lacking)} questions have no annotation, the first is {lacking[0]}.")
    return [
        {
            **answers[q["question_id"]],
            **q,
            "id": str(q["question_id"]),
            "group": str(q["image_id"]),
            "image": q["image_id"],
        }
        for q in questions
    ]


def gqa(path: Path) -> list[dict]:
    """testdev_balanced_questions.json."""
    questions = read_json(path)
    return [
        {**q, "id": str(name), "group": q["imageId"], "image": f"{q['imageId']}.jpg"} for name, q in questions.items()
    ]


def textvqa(path: Path) -> list[dict]:
    """TextVQA_0.5.1_val.json; `ocr_tokens` come with the Hub's copy, or from a Rosetta file beside it (*_ocr*.json)."""
    found = read_json(path)["data"]
    tokens = {}
    for extra in sorted(path.parent.glob("*ocr*.json")):
        tokens |= {item["image_id"]: item.get("ocr_tokens", []) for item in read_json(extra)["data"]}
    return [
        {
            "ocr_tokens": tokens.get(q["image_id"], []),
            **q,
            "id": str(q["question_id"]),
            "group": q["image_id"],
            "image": f"{q['image_id']}.jpg",
        }
        for q in found
    ]


def vizwiz(path: Path) -> list[dict]:
    """val.json."""
    return [{**q, "id": q["image"], "group": q["image"]} for q in read_json(path)]


# --------------------------------------------------------------------------------------------------------------- yes/no


def pope(path: Path) -> list[dict]:
    """A folder with coco_pope_{adversarial,popular,random}.json; each numbers its questions from 1."""
    files = sorted(path.glob("coco_pope_*.json"))
    if not files:
        raise EvalError(f"{path} holds no coco_pope_*.json.")
    found = []
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        for q in read_lines(file):
            name = f"{category}/{q['question_id']}"
            found.append({**q, "id": name, "category": category, "group": q["image"], "question": q["text"]})
    return found


def mme(path: Path) -> list[dict]:
    """A folder with a {task}.txt of tab-separated image, question, answer lines for each task (the eval tool's), or with a
    folder per task that holds {image}.txt of question, answer lines."""
    found = []
    for file in sorted(path.glob("*.txt")):
        found += [(file.stem, *line.split("\t")[:3]) for line in _lines(file)]
    if not found:
        for file in sorted(path.glob("*/**/*.txt")):
            category = file.relative_to(path).parts[0]
            found += [(category, file.stem, *line.split("\t")[:2]) for line in _lines(file)]
    if not found:
        raise EvalError(f"{path} holds neither {{task}}.txt files nor folders of them.")
    seen: dict[str, int] = {}
    records = []
    for category, image, question, answer in found:
        group = f"{category}/{image}"
        seen[group] = seen.get(group, 0) + 1
        record = {"category": category, "image": image, "question": question, "answer": answer.strip()}
        records.append({"id": f"{group}#{seen[group]}", "group": group, **record})
    odd = [group for group, count in seen.items() if count != 2]
    if odd:
        raise EvalError(f"{path}: an image has two questions in MME, but {odd[0]} has {seen[odd[0]]}.")
    return records


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def vsr(path: Path) -> list[dict]:
    """test.jsonl."""
    return [{"group": q["image"], **q} for q in numbered(read_lines(path))]


# --------------------------------------------------------------------------------------------------------------- choices


def scienceqa(path: Path, split: str = "test") -> list[dict]:
    """A folder with problems.json and pid_splits.json."""
    problems, splits = read_json(path / "problems.json"), read_json(path / "pid_splits.json")
    return [{**problems[name], "id": name} for name in splits[split]]


def mmbench(path: Path) -> list[dict]:
    """The TSV; a rotation's index is its question's plus pass x 1,000,000, and options end at the first that is nan."""
    found = []
    for q in rows(path):
        index = int(q["index"])
        options = []
        for letter in "ABCD":
            if str(q.get(letter, "nan")).lower() in ("nan", "none"):
                break
            options.append(q[letter])
        hint = {} if str(q.get("hint", "nan")).lower() in ("nan", "none") else {"hint": q["hint"]}
        kept = {key: value for key, value in q.items() if key not in ("image", "hint")}
        group = str(index % 1_000_000)
        extra = {
            "id": str(index),
            "group": group,
            "rotation": index // 1_000_000,
            "choices": options,
            "image": str(index),
        }
        found.append(kept | hint | extra)
    return found


def seed(path: Path) -> list[dict]:
    """SEED-Bench.json."""
    return [
        {
            **q,
            "id": str(q["question_id"]),
            "group": str(q["data_id"]),
            "image": q["data_id"],
            "choices": [q[f"choice_{letter}"] for letter in "abcd"],
        }
        for q in read_json(path)["questions"]
    ]


def tallyqa(path: Path) -> list[dict]:
    """test.json."""
    return [
        {**q, "id": str(q["question_id"]), "group": q["image"], "choices": list(range(16))} for q in read_json(path)
    ]


def ai2d(path: Path) -> list[dict]:
    """A folder questions/ of {image}.json, or the Hub's table of question, options, answer (an index)."""
    if path.is_file():
        return [{**q, "choices": q["options"], "answer": int(q["answer"])} for q in numbered(rows(path))]
    found = []
    for file in sorted(path.glob("*.json")):
        page = read_json(file)
        for text, q in page["questions"].items():
            extra = {"id": q["questionId"], "image": page["imageName"], "group": page["imageName"], "question": text}
            found.append({**q, **extra, "choices": q["answerTexts"], "answer": q["correctAnswer"]})
    return found


def mmvp(path: Path) -> list[dict]:
    """Questions.csv; two rows in a row are a pair."""
    found = []
    for number, q in enumerate(rows(path)):
        index = int(q.get("Index") or q["lndex"])  # the file's own header has an l for the I
        choices = [part.split(")", 1)[1].strip() for part in q["Options"].split("(")[1:]]
        names = {"id": str(index), "group": str(number // 2), "image": f"{index}.jpg"}
        found.append({**names, "question": q["Question"], "choices": choices, "answer": q["Correct Answer"]})
    return found


def cvbench(path: Path) -> list[dict]:
    """The Hub's table of idx, type, task, question, choices, answer "(A)", prompt, source."""
    return [{**q, "id": str(q["idx"])} for q in rows(path)]


def table(path: Path) -> list[dict]:
    """Any table of records in the official fields; `id` is its own, else question_id, questionId, index or the place."""
    records = rows(path)
    for name in ("id", "question_id", "questionId", "pid", "index"):
        if records and all(name in record for record in records):
            return [{**record, "id": str(record[name])} for record in records]
    return list(numbered(records))


def mmstar(path: Path) -> list[dict]:
    """The Hub's table; the options are part of the question."""
    return [{"choices": list("ABCD"), **q} for q in table(path)]


def mmmu(path: Path) -> list[dict]:
    """The Hub's table; `options` is a Python list as text, and a question's id names its subject."""
    found = []
    for q in table(path):
        options = q.get("options", [])
        options = re.findall(r"'(.*?)'", options) if isinstance(options, str) else options
        subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", q["id"])
        found.append({"subject": subject, **q, "choices": options})
    return found


def mathvista(path: Path) -> list[dict]:
    """testmini.json: records by pid, their `metadata` beside them."""
    found = read_json(path)
    items = found.items() if isinstance(found, dict) else ((q["pid"], q) for q in found)
    return [{"query": q.get("question"), **q, **q.get("metadata", {}), "id": str(pid)} for pid, q in items]


# ----------------------------------------------------------------------------------------------------- documents, charts


def documents(path: Path) -> list[dict]:
    """DocVQA's and InfoVQA's {"data": [{"questionId", "question", "answers", "image"}]}."""
    found = read_json(path)["data"]
    return [{**q, "id": str(q["questionId"]), "group": str(q.get("image", q["questionId"]))} for q in found]


def chartqa(path: Path) -> list[dict]:
    """A folder with test_human.json and test_augmented.json of {"imgname", "query", "label"}, or one such table."""
    files = sorted(path.glob("test_*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        kind = file.stem.removeprefix("test_")
        for index, q in enumerate(read_lines(file)):
            extra = {"id": f"{kind}/{index}", "question": q["query"], "answer": q["label"], "type": kind}
            found.append({**q, **extra, "image": q["imgname"], "group": q["imgname"]})
    return found


# ----------------------------------------------------------------------------------------------------------------- boxes


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise EvalError(f"The pickle asks for {module}.{name}; a file of referring expressions needs no such thing.")


def refcoco(path: Path, split: str = "val") -> list[dict]:
    """A folder of the REFER API: refs(*).p and instances.json; a record for every sentence."""
    file = one(path, "refs(*).p")
    refs = _PlainUnpickler(io.BytesIO(file.read_bytes())).load()
    instances = read_json(path / "instances.json")
    boxes = {item["id"]: item["bbox"] for item in instances["annotations"]}
    images = {item["id"]: item for item in instances["images"]}
    found = []
    for ref in refs:
        if ref["split"] != split:
            continue
        image = images[ref["image_id"]]
        x, y, width, height = boxes[ref["ann_id"]]
        for sentence in ref["sentences"]:
            found.append(
                {
                    "id": f"{ref['ref_id']}-{sentence['sent_id']}",
                    "group": str(ref["image_id"]),
                    "image": image["file_name"],
                    "sentence": sentence["sent"],
                    "bbox": [x, y, x + width, y + height],
                    "width": image["width"],
                    "height": image["height"],
                }
            )
    return found


CLUTTER = ((9, "Minimum"), (16, "Medium"), (20, "Maximum"))  # the last take_id of each


def ocid_ref(path: Path) -> list[dict]:
    """val.json of expressions by id; `bbox` is text, read as xyxy. Raises `EvalError` for a box that is not."""
    found = []
    for name, q in read_json(path).items():
        box = json.loads(q["bbox"]) if isinstance(q["bbox"], str) else q["bbox"]
        if not (box[0] < box[2] <= 640 and box[1] < box[3] <= 480):
            raise EvalError(f"{path}: the box {box} of {name} is not x1, y1, x2, y2 in a 640 x 480 image.")
        clutter = next((level for last, level in CLUTTER if q["take_id"] <= last), None)
        extra = {"bbox": box, "image": q["scene_path"], "group": q["scene_path"], "clutter": clutter}
        found.append({**q, **extra, "id": str(name)})
    return found


# ------------------------------------------------------------------------------------------------------ captions, judged


def chair(path: Path) -> list[dict]:
    """A folder with images.json, {image id: [objects]}, and CHAIR's synonyms.txt."""
    synonyms = read_synonyms((path / "synonyms.txt").read_text(encoding="utf-8").splitlines())
    objects = read_json(path / "images.json")
    return [
        {"id": name, "image": name, "objects": sorted({synonyms.get(o, o) for o in names}), "synonyms": synonyms}
        for name, names in objects.items()
    ]


def mmvet(path: Path) -> list[dict]:
    """mm-vet.json."""
    return [{**q, "id": name, "image": q["imagename"]} for name, q in read_json(path).items()]


def llava_bench(path: Path) -> list[dict]:
    """A folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl."""
    contexts = {item["image"]: item["caption"] for item in read_lines(path / "context.jsonl")}
    answers = {item["question_id"]: item["text"] for item in read_lines(path / "answers_gpt4.jsonl")}
    return [
        {
            **q,
            "id": str(q["question_id"]),
            "group": q["image"],
            "context": contexts[q["image"]],
            "reference_answer": answers[q["question_id"]],
        }
        for q in read_lines(path / "questions.jsonl")
    ]
