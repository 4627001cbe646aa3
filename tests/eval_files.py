"""Small files in the benchmarks' official forms, written from the questions of eval_helpers."""

from __future__ import annotations

import json
import pickle

import eval_helpers

from jaxvlm.evals import tasks
from jaxvlm.evals.readers import completed


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
    "questions": lambda f, found: lines(f / "q.jsonl", found),
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
