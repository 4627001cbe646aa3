"""Readers of the benchmarks' official files, in two steps: a path -> official records, a record -> what ours adds to it.

A reader joins and flattens files and changes no field. `completed` then adds `id` (a string), `group` where questions
stand or fall together (an image, a pair, a circle), and `image`, `choices` and the like where the official fields have
them in another form; it leaves alone what is there already. Images are never opened here.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import gc
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxvlm.evals.question_file import EvalError, plain_question
from jaxvlm.evals.scorers.captions import read_synonyms

csv.field_size_limit(1 << 27)  # MMBench's TSV holds its images in base64

# Official record -> the same with more fields. Raises KeyError for a field that should be there.
Complete = Callable[[dict], dict]

ID_NAMES = ("id", "question_id", "questionId", "pid", "index", "idx")


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector would walk millions of small records again and again: half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def completed(records: Iterable[dict], complete: Complete) -> list[dict]:
    """Records with `id` and `group`: made by `complete`, else one of the usual names, else the record's place.

    Raises `EvalError` naming the record that lacks a field, or the id that occurs twice.
    """
    found, seen = [], set()
    for place, record in enumerate(records):
        try:
            done = "group" in record and isinstance(record.get("id"), str)  # completed before
            made = record if done else complete(record)
        except (KeyError, IndexError, ValueError, TypeError, SyntaxError) as error:
            raise EvalError(f"Reference {place} is not in the official form ({error!r}): {str(record)[:200]}") from None
        if not done:
            made["id"] = str(next((made[name] for name in ID_NAMES if name in made), place))
            made.setdefault("group", str(made.get("image") or made["id"]))
        if made["id"] in seen:
            raise EvalError(f"Two references have the id {made['id']}; ids must be unique.")
        seen.add(made["id"])
        found.append(made)
    return found


def named(**templates: str) -> Complete:
    """Adds fields made of others, as in id="{question_id}"; with nothing to add, copies. An `id` there is replaced."""

    def complete(record: dict) -> dict:
        made = {name: template.format_map(record) for name, template in templates.items()}
        return made | record | ({"id": made["id"]} if "id" in made else {})

    return complete


# ----------------------------------------------------------------------------------------------------------- file forms


def read_json(path: Path) -> Any:
    """A JSON file; raises `EvalError` naming it if it is missing or broken."""
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise EvalError(f"{path} is not JSON: {error}.") from None


def read_lines(path: Path) -> list[dict]:
    """A JSONL file, or a JSON list; raises `EvalError` naming the file and line."""
    text = _text(path)
    if text.lstrip().startswith("["):
        return read_json(path)
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at U+2028 inside a string
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise EvalError(f"{path}:{number} is not a line of JSON: {error}.") from None
    return records


def _text(path: Path) -> str:
    if not path.is_file():
        raise EvalError(f"{path} is not a file; `jaxvlm eval tasks NAME` says which files a task reads.")
    return path.read_text(encoding="utf-8-sig")  # a mark of byte order may be there


def cells(path: Path) -> list[dict]:
    """Any table of records: .json (a list), .jsonl, .tsv, .csv."""
    if path.suffix not in (".tsv", ".csv"):
        return read_lines(path)
    text = io.StringIO(_text(path), newline="")
    return list(csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ","))


def table(path: Path) -> list[dict]:
    """As `cells`, without the empty ones."""
    return [{key: value for key, value in row.items() if value not in ("", None)} for row in cells(path)]


def one(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches; `EvalError` if there is none, or more than one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise EvalError(f"{folder} holds {len(found)} files {pattern}; exactly one is needed.")
    return found[0]


# ------------------------------------------------------------------------------------------------------------- open VQA


def vqav2(path: Path) -> list[dict]:
    """A folder with *questions.json and *annotations.json."""
    questions = read_json(one(path, "*uestions.json"))["questions"]
    answers = {item["question_id"]: item for item in read_json(one(path, "*nnotations.json"))["annotations"]}
    lacking = [item["question_id"] for item in questions if item["question_id"] not in answers]
    if lacking:
        raise EvalError(f"{path}: {len(lacking)} questions have no annotation, the first is {lacking[0]}.")
    return [answers[question["question_id"]] | question for question in questions]


vqav2_fields = named(id="{question_id}", group="{image_id}", image="{image_id}")


def gqa(path: Path) -> list[dict]:
    """testdev_balanced_questions.json."""
    return [{"questionId": name, **question} for name, question in read_json(path).items()]


gqa_fields = named(id="{questionId}", group="{imageId}", image="{imageId}.jpg")


def textvqa(path: Path) -> list[dict]:
    """TextVQA_0.5.1_val.json; `ocr_tokens` come with the Hub's copy, or from a Rosetta file beside it (*OCR*.json)."""
    tokens = {}
    for extra in sorted(path.parent.glob("*[oO][cC][rR]*.json")):
        tokens |= {item["image_id"]: item.get("ocr_tokens", []) for item in read_json(extra)["data"]}
    questions = read_json(path)["data"]
    return [{"ocr_tokens": tokens[q["image_id"]], **q} if q["image_id"] in tokens else q for q in questions]


textvqa_fields = named(id="{question_id}", group="{image_id}", image="{image_id}.jpg")


def data_list(path: Path) -> list[dict]:
    """DocVQA's, InfoVQA's and ST-VQA's {"data": [...]}."""
    return read_json(path)["data"]


def chartqa(path: Path) -> list[dict]:
    """A folder with test_human.json and test_augmented.json, or one such table."""
    files = sorted(path.glob("test_*.json")) if path.is_dir() else [path]
    return [
        {"id": f"{file.stem}/{place}", "type": file.stem.removeprefix("test_"), **q}
        for file in files
        for place, q in enumerate(read_lines(file))
    ]


def chartqa_fields(q: dict) -> dict:
    """The official names, imgname, query and label, are the Hub's image, question and answer."""
    names = (("imgname", "image"), ("query", "question"), ("label", "answer"))
    return {ours: q[theirs] for theirs, ours in names if theirs in q} | q


# --------------------------------------------------------------------------------------------------------------- yes/no


def pope(path: Path) -> list[dict]:
    """A folder with coco_pope_{adversarial,popular,random}.json; each numbers its questions from 1."""
    files = sorted(path.glob("coco_pope_*.json"))
    if not files:
        raise EvalError(f"{path} holds no coco_pope_*.json.")
    return [{"category": f.stem.removeprefix("coco_pope_"), **q} for f in files for q in read_lines(f)]


def pope_fields(q: dict) -> dict:
    category = q.get("category", "all")
    added = {"id": f"{category}/{q['question_id']}", "category": category, "group": q.get("image", category)}
    return added | ({"question": q["text"]} if "text" in q else {}) | q


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
    return [dict(zip(("category", "image", "question", "answer"), row, strict=True)) for row in found]


def _lines(path: Path) -> list[str]:
    return [line for line in _text(path).split("\n") if line.strip()]


def mme_fields(q: dict) -> dict:
    """A question's id is its task, image and words: the official files number nothing."""
    group = f"{q['category']}/{Path(q['image']).stem}"
    return (
        {"id": f"{group}/{plain_question(q['question']).lower()}", "group": group} | q | {"answer": q["answer"].strip()}
    )


# --------------------------------------------------------------------------------------------------------------- choices


def scienceqa(path: Path, split: str = "test") -> list[dict]:
    """A folder with problems.json and pid_splits.json."""
    problems, splits = read_json(path / "problems.json"), read_json(path / "pid_splits.json")
    return [{"pid": name, **problems[name]} for name in splits.get(split, ())]


SHORTEST_PICTURE = 64  # characters of base64; a shorter cell is the index of the row that holds the picture


def mmbench_fields(q: dict) -> dict:
    """A rotation's index is its question's plus pass x 1,000,000; options end at the first that is nan."""
    index, options = int(q["index"]), []
    for letter in "ABCD":
        if _absent(q.get(letter)):
            break
        options.append(q[letter])
    kept = {key: value for key, value in q.items() if not (key == "image" or (key == "hint" and _absent(value)))}
    group = str(index % 1_000_000)
    added = {"id": str(index), "group": group, "image": group, "rotation": index // 1_000_000}
    return added | {"choices": options} | kept


def save_pictures(path: Path, folder: Path) -> int:
    """Writes the pictures that a .tsv holds in base64 to {index}.jpg in `folder`, those of rotations left out; how many."""
    count = 0
    for row in cells(path):
        index, data = int(row["index"]), row.get("image") or ""
        file = folder / f"{index}.jpg"
        if index < 1_000_000 and len(data) > SHORTEST_PICTURE and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(data))
            count += 1
    return count


def _absent(cell: Any) -> bool:
    return cell is None or str(cell).lower() in ("nan", "none")


def seed(path: Path) -> list[dict]:
    """SEED-Bench.json."""
    return read_json(path)["questions"]


def seed_fields(q: dict) -> dict:
    choices = [q[f"choice_{letter}"] for letter in "abcd"]
    return named(id="{question_id}", group="{data_id}", image="{data_id}")({"choices": choices, **q})


def tallyqa_fields(q: dict) -> dict:
    """Prismatic's sixteen choices."""
    return named(id="{question_id}", group="{image}")({"choices": [str(number) for number in range(16)], **q})


def ai2d(path: Path) -> list[dict]:
    """A folder questions/ of {image}.json, or the Hub's table of question, options, answer (an index)."""
    if path.is_file():
        return table(path)
    found = []
    for file in sorted(path.glob("*.json")):
        page = read_json(file)
        found += [{"image": page["imageName"], "question": text, **q} for text, q in page["questions"].items()]
    return found


def ai2d_fields(q: dict) -> dict:
    choices = q.get("answerTexts", q.get("options"))
    return {"choices": choices} | q | {"answer": int(q.get("correctAnswer", q.get("answer")))}


def mmvp_fields(q: dict) -> dict:
    """Two questions in a row are a pair. (The file's own header has an l for the I of Index.)"""
    index = int(q.get("Index") or q["lndex"])
    choices = [part.split(")", 1)[1].strip() for part in q["Options"].split("(")[1:]]
    names = {"id": str(index), "group": str((index - 1) // 2), "image": f"{index}.jpg"}
    return names | {"question": q["Question"], "choices": choices, "answer": q["Correct Answer"]} | q


def mmstar_fields(q: dict) -> dict:
    """The options are part of the question."""
    return {"choices": list("ABCD"), **q}


def mmmu_fields(q: dict) -> dict:
    """`options` is a Python list as text; a question's id names its subject."""
    options = q.get("options", [])
    options = ast.literal_eval(options) if isinstance(options, str) else options
    return {"subject": re.sub(r"^(validation|dev|test)_|_\d+$", "", q["id"]), "choices": options} | q


def mathvista(path: Path) -> list[dict]:
    """testmini.json: records by pid, or a list of them."""
    found = read_json(path)
    return [{"pid": pid, **q} for pid, q in found.items()] if isinstance(found, dict) else found


def mathvista_fields(q: dict) -> dict:
    """What stands in `metadata` beside the rest."""
    return {"query": q.get("question")} | q.get("metadata", {}) | q


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


def ocid_ref(path: Path) -> list[dict]:
    """val.json of expressions by id."""
    return [{"id": name, **q} for name, q in read_json(path).items()]


CLUTTER = ((9, "Minimum"), (16, "Medium"), (20, "Maximum"))  # the last take_id of each


def ocid_ref_fields(q: dict) -> dict:
    """`bbox` is text, read as xyxy; a box that is not raises ValueError."""
    box = json.loads(q["bbox"]) if isinstance(q["bbox"], str) else q["bbox"]
    if not (box[0] < box[2] <= 640 and box[1] < box[3] <= 480):
        raise ValueError(f"{box} is not x1, y1, x2, y2 in a 640 x 480 image")
    clutter = next((level for last, level in CLUTTER if q["take_id"] <= last), None)
    return {"image": q["scene_path"], "clutter": clutter} | q | {"bbox": box}


# ------------------------------------------------------------------------------------------------------ captions, judged


def chair(path: Path) -> list[dict]:
    """A folder with images.json, {image id: [objects]}, and CHAIR's synonyms.txt."""
    synonyms = read_synonyms(_lines(path / "synonyms.txt"))
    objects = read_json(path / "images.json")
    return [
        {"id": name, "image": name, "objects": sorted({synonyms.get(o, o) for o in names}), "synonyms": synonyms}
        for name, names in objects.items()
    ]


def mmvet(path: Path) -> list[dict]:
    """mm-vet.json."""
    return [{"id": name, **q} for name, q in read_json(path).items()]


def llava_bench(path: Path) -> list[dict]:
    """A folder with *questions.jsonl, *gpt4*.jsonl and context.jsonl (Wild) or caps_boxes*.jsonl (COCO).

    `rule` names the judge's rule: each has its own three in rule.json.
    """
    wild = (path / "context.jsonl").is_file()
    pictures = read_lines(path / "context.jsonl" if wild else one(path, "caps_boxes*.jsonl"))
    contexts = {item["image"]: item["caption"] if wild else _coco_context(item) for item in pictures}
    answers = {item["question_id"]: item["text"] for item in read_lines(one(path, "*gpt4*.jsonl"))}
    return [
        {
            "context": contexts[q["image"]],
            "reference_answer": answers[q["question_id"]],
            "rule": "llava_bench_" * wild + q["category"],
            **q,
        }
        for q in read_lines(one(path, "*questions.jsonl"))
    ]


def _coco_context(item: dict) -> str:
    """Captions, then the objects with their boxes."""
    boxes = [f"{instance['category']}: {instance['bbox']}" for instance in item["instances"]]
    return "\n".join(item["captions"]) + "\n\n" + "\n".join(boxes)
