"""The benchmarks: what each reads, and under which protocols it is asked and scored.

A score is (questions, prompt, rewriting, reading of the answer, aggregate). Papers differ in all of them, so a task has
named protocols: `llava15`, `prismatic` and `cambrian` as those papers evaluate, `official` as the benchmark's own code
does, `jaxvlm` where ours is the only reading of generated text. Sources: reference scripts named in evaluation §1.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxvlm.evals import aggregates, prompts, readers
from jaxvlm.evals.aggregates import Aggregate, overall
from jaxvlm.evals.prompts import Prompt
from jaxvlm.evals.question_file import FORMATS, EvalError
from jaxvlm.evals.readers import Complete, collector_paused, named
from jaxvlm.evals.scorers import Record, Scored, boxes, captions, choice, judged, text, vqa, yesno
from jaxvlm.evals.scorers.normalise import evalai


@dataclass(frozen=True)
class Protocol:
    """How one paper asks and scores a task.

    `headline` is the aggregate's number that the paper prints; `takes` is what the scorer looks at in a prediction: `text`,
    what the model wrote; `probabilities`, one for each of `candidates` as the first token; `losses`, one for each option's
    text; `judgement`, another model's ratings.
    """

    prompt: Prompt
    scorer: Callable[[Record, Record], Scored]
    headline: str = "accuracy"
    aggregate: Aggregate | None = None  # None: the task's own
    rewrite: Callable[[str], str] | None = None  # of the model's text, before it is scored or submitted
    takes: str = "text"
    candidates: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark: its reader, its protocols, and the sizes by which its splits are known."""

    title: str
    files: str
    read: Callable[..., list[dict]]
    protocols: Mapping[str, Protocol]
    aggregate: Aggregate = field(default_factory=overall)
    complete: Complete = named()
    splits: Mapping[str, int] = field(default_factory=dict)  # name: how many questions
    split_in_files: bool = False  # the files hold several splits: the reader takes the split's name


TABLE = "the Hub's table, as .jsonl, .json, .tsv or .csv"
ask = prompts.asked
short = prompts.short
letter = prompts.choices()
letter_options = prompts.choices(head=" Options:")  # Cambrian's
box = prompts.box


def _mmbench(title: str, suffix: str) -> Task:
    official = Protocol(prompts.choices(suffix), choice.mmbench, "circular", note="rules only: no model is asked")
    return Task(
        title,
        "mmbench_*.tsv",
        readers.table,
        {
            "official": official,
            "llava15": official,
            "cambrian": Protocol(prompts.choices(suffix, " Options:"), choice.cambrian, "circular"),
        },
        aggregates.circular,
        readers.mmbench_fields,
    )


def _refcoco(title: str, sentences: int) -> Task:
    return Task(
        title,
        "a folder with refs(*).p and instances.json",
        readers.refcoco,
        {
            "official": Protocol(box, boxes.refcoco),
            "prismatic": Protocol(box, boxes.refcoco_prismatic, note="truth rounded to two decimals"),
            "llava15": Protocol(box, boxes.refcoco_padded, note="not in the paper; boxes in the square-padded frame"),
        },
        overall(value="accuracy"),
        splits={"val": sentences},
        split_in_files=True,
    )


def _anls(title: str, files: str, suffix: str, splits: Mapping[str, int]) -> Task:
    return Task(
        title,
        files,
        readers.data_list,
        {
            "official": Protocol(ask, text.anls, "anls"),
            "cambrian": Protocol(
                prompts.with_suffix(suffix), text.anls, "anls", note="the paper submits to the server"
            ),
        },
        overall(value="anls"),
        splits=splits,
    )


def _llava_bench(title: str, files: str, count: int) -> Task:
    protocol = Protocol(prompts.bench, judged.llava_bench, "relative", takes="judgement")
    return Task(
        title,
        files,
        readers.llava_bench,
        {"official": protocol, "llava15": protocol},
        aggregates.llava_bench,
        splits={"all": count},
    )


def _textvqa(title: str, protocols: dict[str, Protocol]) -> Task:
    files = "TextVQA_0.5.1_val.json (and *OCR*.json beside it)"
    return Task(
        title, files, readers.textvqa, protocols, complete=readers.textvqa_fields, splits={"val": 5_000, "test": 5_734}
    )


TASKS: dict[str, Task] = {
    "vqav2": Task(
        "VQAv2",
        "a folder with *questions.json and *annotations.json",
        readers.vqav2,
        {
            "official": Protocol(ask, vqa.vqav2),
            "llava15": Protocol(short, vqa.vqav2, rewrite=evalai, note="the paper: test-dev, on the server"),
            "prismatic": Protocol(short, vqa.vqav2_prismatic),
        },
        overall("answer_type"),
        readers.vqav2_fields,
        {"val": 214_354},
    ),
    "gqa": Task(
        "GQA",
        "testdev_balanced_questions.json",
        readers.gqa,
        {
            "official": Protocol(ask, vqa.gqa),
            "llava15": Protocol(short, vqa.gqa, rewrite=vqa.gqa_rewrite_llava),
            "prismatic": Protocol(short, vqa.gqa, rewrite=vqa.gqa_rewrite_prismatic),
            "cambrian": Protocol(short, vqa.gqa_cambrian),
        },
        aggregates.gqa,
        readers.gqa_fields,
        {"testdev_balanced": 12_578},
    ),
    "vizwiz": Task(
        "VizWiz",
        "val.json",
        readers.read_lines,
        {
            "official": Protocol(ask, vqa.vizwiz_accuracy),
            "llava15": Protocol(
                prompts.vizwiz, vqa.vizwiz_accuracy, rewrite=evalai, note="the paper: test, on the server"
            ),
            "prismatic": Protocol(prompts.vizwiz, vqa.vizwiz_accuracy),
            "cambrian": Protocol(prompts.vizwiz, vqa.textvqa, aggregate=overall(), note="by TextVQA's scorer"),
        },
        aggregates.vizwiz,
        named(id="{image}"),
        {"val": 4_319},
    ),
    "textvqa": _textvqa(
        "TextVQA without OCR",
        {
            "official": Protocol(ask, vqa.textvqa),
            "llava15": Protocol(short, vqa.textvqa, note="the paper gives the OCR: textvqa-ocr"),
            "prismatic": Protocol(short, vqa.textvqa, note="TextVQA-Pure"),
        },
    ),
    "textvqa-ocr": _textvqa(
        "TextVQA with Rosetta's OCR in the prompt",
        {
            "llava15": Protocol(prompts.textvqa_ocr("Reference OCR token:"), vqa.textvqa),
            "prismatic": Protocol(prompts.textvqa_ocr("Reference OCR token:"), vqa.textvqa, note="TextVQA-OCR"),
            "cambrian": Protocol(prompts.textvqa_ocr("Reference OCR tokens:"), vqa.textvqa),
        },
    ),
    "pope": Task(
        "POPE",
        "a folder with coco_pope_*.json",
        readers.pope,
        {
            "official": Protocol(ask, yesno.pope, "f1"),
            "llava15": Protocol(
                short, yesno.pope, "f1", note="mean of the three F1s; the paper's random split has 2,910"
            ),
            "prismatic": Protocol(
                short,
                yesno.pope_prismatic,
                "accuracy",
                aggregates.pope_prismatic,
                takes="probabilities",
                candidates=("Yes", "No"),
            ),
            "cambrian": Protocol(short, yesno.pope_cambrian, "accuracy", overall("category")),
        },
        aggregates.pope,
        readers.pope_fields,
        {"adversarial+popular+random": 9_000, "adversarial+popular+random of 2,910": 8_910},
    ),
    "mme": Task(
        "MME",
        "a folder of {task}.txt, or a folder per task",
        readers.mme,
        {
            "official": Protocol(ask, yesno.mme, "perception"),
            "llava15": Protocol(prompts.mme, yesno.mme, "perception"),
            "cambrian": Protocol(short, yesno.mme_cambrian, "perception"),
        },
        aggregates.mme,
        readers.mme_fields,
        {"all": 2_374},
    ),
    "scienceqa": Task(
        "ScienceQA",
        "a folder with problems.json and pid_splits.json",
        readers.scienceqa,
        {
            "llava15": Protocol(prompts.scienceqa, choice.scienceqa, "image_accuracy"),
            "cambrian": Protocol(prompts.scienceqa_cambrian, choice.scienceqa_cambrian, "image_accuracy"),
        },
        aggregates.scienceqa,
        splits={"test": 4_241},
        split_in_files=True,
    ),
    "mmbench": _mmbench("MMBench, English", prompts.LETTER),
    "mmbench-cn": _mmbench("MMBench, Chinese", prompts.CHINESE_LETTER),
    "seed-bench": Task(
        "SEED-Bench",
        "SEED-Bench.json",
        readers.seed,
        {
            "official": Protocol(ask, choice.likelihood, takes="losses"),
            "llava15": Protocol(letter, choice.exact_letter),
            "cambrian": Protocol(letter_options, choice.cambrian, "accuracy/image"),
        },
        aggregates.seed,
        readers.seed_fields,
        {"image+video": 19_242, "image": 14_232},
    ),
    "mm-vet": Task(
        "MM-Vet",
        "mm-vet.json",
        readers.mmvet,
        {
            "official": Protocol(ask, judged.mmvet, "total", takes="judgement"),
            "llava15": Protocol(ask, judged.mmvet, "total", takes="judgement"),
            "cambrian": Protocol(short, judged.mmvet, "total", takes="judgement"),
        },
        aggregates.mmvet,
        named(image="{imagename}"),
        {"all": 218},
    ),
    "llava-bench-wild": _llava_bench(
        "LLaVA-Bench (In-the-Wild)", "a folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl", 60
    ),
    "llava-bench-coco": _llava_bench(
        "LLaVA-Bench (COCO)", "a folder with qa90_questions.jsonl, caps_boxes*.jsonl and qa90_gpt4_answer.jsonl", 90
    ),
    "refcoco": _refcoco("RefCOCO", 10_834),
    "refcoco+": _refcoco("RefCOCO+", 10_758),
    "refcocog": _refcoco("RefCOCOg", 4_896),
    "ocid-ref": Task(
        "OCID-Ref",
        "val.json",
        readers.ocid_ref,
        {"prismatic": Protocol(box, boxes.ocid_ref, note="IoU 0.25; boxes read as xyxy")},
        overall("clutter"),
        readers.ocid_ref_fields,
        {"val": 18_342},
    ),
    "vsr": Task(
        "VSR",
        "test.jsonl",
        readers.read_lines,
        {
            "prismatic": Protocol(
                prompts.true_false, yesno.vsr_prismatic, takes="probabilities", candidates=("True", "False")
            ),
            "jaxvlm": Protocol(prompts.true_false, yesno.vsr_text),
        },
        aggregates.vsr,
        splits={"zeroshot test": 1_222},
    ),
    "tallyqa": Task(
        "TallyQA",
        "test.json",
        readers.read_lines,
        {
            "prismatic": Protocol(
                letter, choice.counting_prismatic, takes="probabilities", candidates=tuple(choice.LETTERS[:16])
            ),
            "jaxvlm": Protocol(short, text.tallyqa_text),
        },
        overall("issimple"),
        readers.tallyqa_fields,
        {"test": 38_589},
    ),
    "ai2d": Task(
        "AI2D",
        f"the folder questions/, or {TABLE}",
        readers.ai2d,
        {
            "prismatic": Protocol(
                letter, choice.diagrams_prismatic, takes="probabilities", candidates=tuple(choice.LETTERS[:4])
            ),
            "cambrian": Protocol(letter, choice.diagrams_cambrian),
        },
        complete=readers.ai2d_fields,
        splits={"val+test": 15_501, "test (Hub)": 3_088},
    ),
    "mmvp": Task(
        "MMVP",
        "Questions.csv",
        readers.table,
        {"cambrian": Protocol(letter_options, choice.mmvp, "pair_accuracy", note="the authors' own grader is GPT-4")},
        aggregates.pairs,
        readers.mmvp_fields,
        {"all": 300},
    ),
    "cv-bench": Task(
        "CV-Bench",
        TABLE,
        readers.table,
        {"cambrian": Protocol(prompts.cvbench, choice.cvbench)},
        aggregates.cvbench,
        splits={"all": 2_638},
    ),
    "realworldqa": Task(
        "RealWorldQA", TABLE, readers.table, {"cambrian": Protocol(ask, choice.realworldqa)}, splits={"test": 765}
    ),
    "chartqa": Task(
        "ChartQA",
        f"a folder with test_human.json and test_augmented.json, or {TABLE}",
        readers.chartqa,
        {
            "official": Protocol(ask, text.chartqa),
            "cambrian": Protocol(prompts.with_suffix(prompts.NUMBER_OR_PHRASE), text.chartqa_cambrian),
        },
        overall("type"),
        readers.chartqa_fields,
        {"test": 2_500},
    ),
    "docvqa": _anls("DocVQA", "val_v1.0*.json", prompts.SHORT_DIRECT, {"val": 5_349}),
    "infovqa": _anls("InfographicVQA", "infographicsVQA_val_v1.0*.json", prompts.SHORT, {"val": 2_801}),
    "st-vqa": Task(
        "ST-VQA",
        "a .json with a list `data` of question_id, question, answers",
        readers.data_list,
        {"official": Protocol(ask, text.stvqa_anls, "anls"), "cambrian": Protocol(short, text.stvqa_anls, "anls")},
        overall(value="anls"),
    ),
    "mmmu": Task(
        "MMMU",
        TABLE,
        readers.table,
        {
            "official": Protocol(
                prompts.mmmu, text.mmmu, note="the prompt is Cambrian's; unreadable choices are guessed"
            ),
            "cambrian": Protocol(prompts.mmmu, text.mmmu_cambrian, aggregate=overall("subject")),
        },
        aggregates.mmmu,
        readers.mmmu_fields,
        {"validation": 900},
    ),
    "mathvista": Task(
        "MathVista",
        "testmini.json",
        readers.mathvista,
        {
            "official": Protocol(
                prompts.mathvista_query, text.mathvista, note="answers may carry a judge's `extraction`"
            ),
            "cambrian": Protocol(prompts.mathvista, text.mathvista_cambrian),
        },
        overall("task", "category"),
        readers.mathvista_fields,
        {"testmini": 1_000},
    ),
    "mmstar": Task(
        "MMStar",
        TABLE,
        readers.table,
        {
            "official": Protocol(prompts.with_suffix(prompts.LETTER), choice.mmstar),
            "cambrian": Protocol(prompts.with_suffix(prompts.ONLY_LETTER), choice.mmstar_cambrian),
        },
        overall("category"),
        readers.mmstar_fields,
        {"val": 1_500},
    ),
    "ocrbench": Task(
        "OCRBench",
        "OCRBench.json",
        readers.read_lines,
        {
            "official": Protocol(ask, text.ocrbench, "points"),
            "cambrian": Protocol(prompts.with_suffix(prompts.SHORT_DIRECT), text.ocrbench),
        },
        aggregates.ocrbench,
        named(id="{dataset_name}/{id}", image="{image_path}"),
        {"all": 1_000},
    ),
    "chair": Task(
        "CHAIR, objects hallucinated in captions",
        "a folder with images.json ({image: objects}) and synonyms.txt",
        readers.chair,
        {"official": Protocol(prompts.describe, captions.chair, "chair_i", note="the prompt is ours")},
        aggregates.chair,
    ),
    "questions": Task(
        "a question file of your own",
        "a JSONL of question_id, text, answer, and as you like image, category",
        readers.read_lines,
        {kind: Protocol(prompts.own(suffix), text.exact, note="exact match") for kind, suffix in FORMATS.items()},
        overall("category"),
        named(id="{question_id}", text="{text}", answer="{answer}", category="all questions"),
    ),
}


def find(task: str, protocol: str) -> tuple[Task, Protocol]:
    """A task and one of its protocols. Raises `EvalError` with the nearest valid name and all of them."""
    found = find_task(task)
    return found, _named("protocol", protocol, found.protocols, f" for {task}")


def find_task(name: str) -> Task:
    """The task of that name; errors as `find`."""
    return _named("task", name, TASKS)


def _named(what: str, name: str, known: Mapping, of: str = "") -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise EvalError(f"There is no {what} '{name}'{of}.{hint} Valid: {', '.join(known)}.")


@collector_paused()
def read_references(task: str, path: str | Path, split: str = "") -> list[dict]:
    """The reference records of a task from its official files; `split` where the files hold several.

    Raises `EvalError` for an unknown task, a missing or broken file, or records in another form.
    """
    found = find_task(task)
    path = Path(path)
    try:
        records = found.read(path, split) if found.split_in_files and split else found.read(path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvalError(f"{path} is not what {task} reads, {found.files}: {error!r}.") from None
    if not records:
        raise EvalError(f"{path} holds no questions{f' of the split {split!r}' if split else ''}.")
    return readers.completed(records, found.complete)


def split_of(task: Task, count: int) -> str:
    """The split that has this many questions, or that none has."""
    return next((name for name, size in task.splits.items() if size == count), f"unnamed, {count} questions")
