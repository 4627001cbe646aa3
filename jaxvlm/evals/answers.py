"""Answers: reading files of them, and finding the question that each is to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxvlm.evals.question_file import EvalError, plain_question
from jaxvlm.evals.readers import ID_NAMES, cells, collector_paused, read_json, read_lines
from jaxvlm.evals.scorers import Record
from jaxvlm.evals.sheets import read_xlsx

WORDS = ("text", "prediction", "predict", "answer")  # what the field of the model's words may be called, first come
PICTURES = (".jpg", ".jpeg", ".png")


@collector_paused()
def read_answers(path: str | Path, questions: str | Path = "") -> list[dict]:
    """The answers in a file: LLaVA's JSONL, ours, or a submission in an official form.

    Reads JSONL and JSON lists of records, JSON objects of words by id (MM-Vet) or with `outputs` (LLaVA's ScienceQA),
    tables (.tsv, .csv, .xlsx), folders of JSONL (POPE) and MME's of {task}.txt. `questions` is LLaVA's question file, where
    the answers' ids mean nothing without it (POPE): its images, categories and words are added to the answers. Raises
    `EvalError` naming the file.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted(path.glob("*.jsonl"))
        found = [record for part in parts for record in read_lines(part)] if parts else _mme_results(path)
    elif path.suffix == ".xlsx":
        found = read_xlsx(path)
    elif path.suffix == ".json" and isinstance(whole := read_json(path), dict):
        found = [{"id": name, "text": words} for name, words in whole.get("outputs", whole).items()]
    else:
        found = cells(path)
    if not found or not all(isinstance(record, dict) for record in found):
        raise EvalError(f"{path} holds no answers: records with an id and the words are needed.")
    if not questions:
        return found
    asked = {str(q["question_id"]): q for q in read_lines(Path(questions))}
    strange = next((a for a in found if str(a.get("question_id")) not in asked), None)
    if strange:
        raise EvalError(f"{path} answers the question {strange.get('question_id')!r}, which {questions} has not.")
    names = {"image": "image", "category": "category", "question": "text"}
    of = [asked[str(answer["question_id"])] for answer in found]
    return [
        a | {ours: q[theirs] for ours, theirs in names.items() if theirs in q} for a, q in zip(found, of, strict=True)
    ]


def _mme_results(path: Path) -> list[dict]:
    found = []
    for file in sorted(path.glob("*.txt")):
        for line in filter(str.strip, file.read_text(encoding="utf-8").split("\n")):
            cells = line.split("\t")
            if len(cells) != 4:
                raise EvalError(f"{file}: a line has {len(cells)} cells, not image, question, truth, answer: {line!r}.")
            found.append({"category": file.stem, "image": cells[0], "question": cells[1], "text": cells[3]})
    return found


def match(predictions: Iterable[Record], references: Sequence[Record], subset: bool = False) -> dict[str, dict]:
    """Predictions by their question's id, each with its words as `text`.

    Raises `EvalError` for answers that are doubled or to no question, and unless `subset` for questions without one.
    """
    ids = {reference["id"]: reference["id"] for reference in references}
    aliases: dict[str, str] | None = None
    found: dict[str, dict] = {}
    for prediction in predictions:
        name = _name(prediction)
        question = ids.get(name) if "question" not in prediction else None
        if question is None:
            aliases = _aliases(references) | ids if aliases is None else aliases
            question = _look_up(prediction, name, aliases, references)
        if question in found:
            raise EvalError(f"There are two answers to the question {question}; keep one of them.")
        words = next((prediction[key] for key in WORDS if key in prediction), None)
        found[question] = dict(prediction) if words is None else {**prediction, "text": words}
    lacking = [reference["id"] for reference in references if reference["id"] not in found]
    if not found or (lacking and not subset):
        raise EvalError(
            f"{len(lacking)} of {len(references)} questions have no answer, {', '.join(lacking[:3])} among them. A score "
            "over some of the questions is not the benchmark's: ask for it by subset=True (--subset)."
        )
    return found


def _name(prediction: Record) -> str:
    return next((str(prediction[key]) for key in (*ID_NAMES, "image") if key in prediction), "")


SEVERAL = ""  # in place of an id: a name that several questions have


def _aliases(references: Sequence[Record]) -> dict[str, str]:
    """Other names by which LLaVA's and the official files call questions -> ids."""
    found: dict[str, str] = {}
    for reference in references:
        for name in {*_other_names(reference)} - {reference["id"]}:
            found[name] = SEVERAL if name in found else reference["id"]
    return found


def _other_names(reference: Record) -> Iterator[str]:
    yield reference["id"].removeprefix("v1_")  # MM-Vet
    yield _stem(reference["id"])  # VizWiz
    if "question_id" in reference:  # POPE, one split alone
        yield str(reference["question_id"])
    if "question" in reference:
        words = plain_question(str(reference["question"])).lower()
        for key in {"image_id", "image"} & reference.keys():  # TextVQA; POPE and MME
            yield f"{reference.get('category')}/{_stem(str(reference[key]))}/{words}"
            yield f"{_stem(str(reference[key]))}/{words}"


def _look_up(prediction: Record, name: str, aliases: dict[str, str], references: Sequence[Record]) -> str:
    """The question's id by what the answer tells of it, the surest first."""
    tried = []
    if "question" in prediction and "image" in prediction:  # MME's own files; POPE with LLaVA's questions
        words = plain_question(prediction["question"]).lower()
        tried.append(f"{prediction.get('category')}/{_stem(str(prediction['image']))}/{words}")
    tried += [
        f"{prediction[key]}/{name}" for key in ("category", "dataset_name") if key in prediction
    ]  # POPE, OCRBench
    tried += [name, _stem(name)]
    if isinstance(prediction.get("prompt"), str):  # LLaVA's MME and TextVQA: a question_id is an image's
        tried.append(f"{_stem(name)}/{plain_question(prediction['prompt']).lower()}")
    question = next((aliases[key] for key in tried if key in aliases), None)
    if question == SEVERAL:
        raise EvalError(
            f"The answer's id {name!r} could be several questions'. Where LLaVA numbers them itself (POPE), give its question "
            "file too (--questions)."
        )
    if question is None:
        like = ", ".join(repr(reference["id"]) for reference in references[:3])
        raise EvalError(f"No question has the answer's id {name!r}; questions are called {like}, ...")
    return question


def _stem(name: str) -> str:
    """A picture's name without its ending; other names keep their periods."""
    return name.rpartition(".")[0] if name.endswith(PICTURES) else name
