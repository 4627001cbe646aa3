"""For each benchmark some questions in the official fields, and what a model that is always right answers to them."""

from __future__ import annotations

import random
from collections.abc import Callable

LETTERS = "ABCDEFGHIJKLMNOP"


def _people(answer: str) -> list[dict]:
    return [{"answer": answer, "answer_id": i, "answer_confidence": "yes"} for i in range(1, 11)]


def _choices(count: int) -> dict:
    return {letter: f"option {i}" for i, letter in enumerate("ABCD"[:count])}


def _vqav2(i: int, rng: random.Random) -> dict:
    answer = rng.choice(["yes", "no", "red", "2"])
    return {
        "question_id": i,
        "image_id": i // 3,
        "question": "what?",
        "answer_type": "other",
        "answers": _people(answer),
    }


def _gqa(i: int, rng: random.Random) -> dict:
    types = {"structural": rng.choice(["query", "verify"]), "semantic": "attr"}
    more = {"types": types, "groups": {"global": "color"}, "isBalanced": True}
    return {"questionId": str(i), "imageId": str(i), "question": "what?", "answer": rng.choice(["red", "blue"]), **more}


def _vizwiz(i: int, rng: random.Random) -> dict:
    answer = rng.choice(["unanswerable", "soup"])
    answerable = int(answer == "soup")
    return {
        "image": f"VizWiz_val_{i:08}.jpg",
        "question": "what?",
        "answers": _people(answer),
        "answerable": answerable,
    }


def _textvqa(i: int, rng: random.Random) -> dict:
    return {
        "question_id": i,
        "image_id": f"im{i}",
        "question": "what?",
        "answers": ["stop"] * 10,
        "ocr_tokens": ["STOP"],
    }


def _pope(i: int, rng: random.Random) -> dict:
    category = ("adversarial", "popular", "random")[i % 3]
    return {
        "question_id": i,
        "category": category,
        "image": f"{i}.jpg",
        "text": "Is it?",
        "label": ("yes", "no")[i // 3 % 2],
    }


MME_TASKS = (
    "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning "
    "numerical_calculation text_translation code_reasoning"
).split()


def _mme(i: int, rng: random.Random) -> dict:
    """Two questions an image, one yes and one no."""
    more = {"question": f"Is it {i % 2}? Please answer yes or no.", "answer": ("Yes", "No")[i % 2]}
    return {"category": MME_TASKS[i // 2 % len(MME_TASKS)], "image": f"{i // 2:04}.jpg", **more}


def _scienceqa(i: int, rng: random.Random) -> dict:
    choices = ["red", "blue", "green", "black"][: 2 + i % 3]
    more = {"hint": "", "image": "image.png" if i % 2 else None, "subject": "s", "grade": "g"}
    return {"pid": str(i), "question": "what?", "choices": choices, "answer": rng.randrange(len(choices)), **more}


def _mmbench(i: int, rng: random.Random) -> dict:
    """Circles of 2, 3 and 4 options, each in every rotation."""
    for question in range(i + 1):
        count = 2 + question % 3
        if i < count:
            answer = LETTERS[i % count]
            names = {"index": str(question + i * 1_000_000), "question": f"what {question}?", "answer": answer}
            return names | _choices(count) | {"category": "c", "l2-category": "l"}
        i -= count
    raise AssertionError


def _seed(i: int, rng: random.Random) -> dict:
    choices = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    names = {"question_id": str(i), "data_id": f"d{i}", "data_type": "image", "question_type_id": 1 + i % 9}
    return names | choices | {"question": "what?", "answer": rng.choice("ABCD")}


def _mmvet(i: int, rng: random.Random) -> dict:
    names = {"id": f"v1_{i}", "imagename": f"v1_{i}.png", "question": "what?", "answer": "a<AND>b"}
    return names | {"capability": [["ocr", "math"], ["rec"]][i % 2]}


def _bench(i: int, rng: random.Random) -> dict:
    names = {"question_id": i, "image": f"{i}.jpg", "text": "what?", "category": ("conv", "detail", "complex")[i % 3]}
    return names | {"context": "a street", "reference_answer": "A street.", "rule": f"llava_bench_{names['category']}"}


def _refcoco(i: int, rng: random.Random) -> dict:
    return {
        "id": f"{i}-{i}",
        "group": str(i),
        "sentence": "man",
        "bbox": [64, 48, 320, 384],
        "width": 640,
        "height": 480,
        "image": f"{i}.jpg",
    }


def _ocid(i: int, rng: random.Random) -> dict:
    return {
        "id": str(i),
        "sentence": "cup",
        "bbox": "[64, 48, 320, 384]",
        "take_id": i % 20 + 1,
        "scene_path": f"{i}.png",
    }


def _vsr(i: int, rng: random.Random) -> dict:
    return {"image": f"{i}.jpg", "caption": "The cat is on the mat.", "label": rng.randrange(2), "relation": "on"}


def _tallyqa(i: int, rng: random.Random) -> dict:
    return {
        "question_id": i,
        "image": f"{i}.jpg",
        "question": "how many?",
        "answer": rng.randrange(16),
        "issimple": bool(i % 2),
    }


def _ai2d(i: int, rng: random.Random) -> dict:
    return {"question": "what?", "options": ["w", "x", "y", "z"], "answer": str(rng.randrange(4)), "image": f"{i}.png"}


def _mmvp(i: int, rng: random.Random) -> dict:
    return {
        "Index": str(i + 1),
        "Question": "is it?",
        "Options": "(a) Open (b) Closed",
        "Correct Answer": f"({'ab'[i % 2]})",
    }


def _cvbench(i: int, rng: random.Random) -> dict:
    options = {"choices": ["left", "right"], "answer": f"({rng.choice('AB')})", "prompt": "Which? (A) left (B) right"}
    return {
        "idx": i,
        "question": "which?",
        "source": ("ADE20K", "COCO", "Omni3D")[i % 3],
        "task": "Relation",
        **options,
    }


def _realworldqa(i: int, rng: random.Random) -> dict:
    return {"image": f"{i}.webp", "question": "which?", "answer": rng.choice(["A", "B", "Yes", "3"])}


def _chartqa(i: int, rng: random.Random) -> dict:
    return {
        "imgname": f"{i}.png",
        "query": "how much?",
        "label": str(rng.randrange(1, 99)),
        "type": ("human", "augmented")[i % 2],
    }


def _document(i: int, rng: random.Random) -> dict:
    return {"questionId": i, "question": "what?", "image": f"{i}.png", "answers": ["Acme Corp", "acme"]}


def _stvqa(i: int, rng: random.Random) -> dict:
    return {"question_id": i, "question": "what?", "file_path": f"{i}.png", "answers": ["exit"]}


def _mmmu(i: int, rng: random.Random) -> dict:
    if i % 4 == 3:
        more = {"question_type": "open", "options": "[]", "answer": str(rng.randrange(10, 99))}
    else:
        more = {"question_type": "multiple-choice", "options": "['w', 'x', 'y', 'z']", "answer": rng.choice("ABCD")}
    return {"id": f"validation_{('Art', 'Math')[i % 2]}_{i}", "question": "what <image 1>?", **more}


def _mathvista(i: int, rng: random.Random) -> dict:
    if i % 2:
        kind = {"question_type": "multi_choice", "answer_type": "text", "choices": ["cat", "dog"], "precision": None}
        kind["answer"] = rng.choice(["cat", "dog"])
    else:
        kind = {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None}
        kind["answer"] = str(rng.randrange(10, 99))
    return {
        "pid": str(i),
        "question": "what?",
        "query": "Hint: ...\nQuestion: what?",
        "metadata": {"task": "t"},
        **kind,
    }


def _mmstar(i: int, rng: random.Random) -> dict:
    return {"index": i, "question": "what? Options: A: w, B: x", "answer": rng.choice("ABCD"), "category": "c"}


def _ocrbench(i: int, rng: random.Random) -> dict:
    names = {"dataset_name": ("IIIT5K", "FUNSD")[i % 2], "id": i // 2, "image_path": f"{i}.png"}
    return names | {
        "question": "what is written?",
        "answers": ["CENTRE"],
        "type": ("Regular Text Recognition", "KIE")[i % 2],
    }


def _questions(i: int, rng: random.Random) -> dict:
    names = {"question_id": i, "image": f"{i // 2}.jpg", "text": "<image>\nwhat?"}
    return names | {"answer": rng.choice(["red", "blue"])} | ({"category": "colour"} if i % 2 else {})


def _chair(i: int, rng: random.Random) -> dict:
    return {
        "id": str(i),
        "image": str(i),
        "objects": ["dog"],
        "synonyms": {"dog": "dog", "cat": "cat", "kitten": "cat"},
    }


MAKERS: dict[str, Callable[[int, random.Random], dict]] = {
    "vqav2": _vqav2,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
    "textvqa-ocr": _textvqa,
    "pope": _pope,
    "mme": _mme,
    "scienceqa": _scienceqa,
    "mmbench": _mmbench,
    "mmbench-cn": _mmbench,
    "seed-bench": _seed,
    "mm-vet": _mmvet,
    "llava-bench-wild": _bench,
    "llava-bench-coco": _bench,
    "refcoco": _refcoco,
    "refcoco+": _refcoco,
    "refcocog": _refcoco,
    "ocid-ref": _ocid,
    "vsr": _vsr,
    "tallyqa": _tallyqa,
    "ai2d": _ai2d,
    "mmvp": _mmvp,
    "cv-bench": _cvbench,
    "realworldqa": _realworldqa,
    "chartqa": _chartqa,
    "docvqa": _document,
    "infovqa": _document,
    "st-vqa": _stvqa,
    "mmmu": _mmmu,
    "mathvista": _mathvista,
    "mmstar": _mmstar,
    "ocrbench": _ocrbench,
    "questions": _questions,
    "chair": _chair,
}


def questions(task: str, count: int, seed: int = 0) -> list[dict]:
    """`count` records in the official fields; of MME and MMBench only whole pairs and circles make sense."""
    rng = random.Random(seed)
    return [MAKERS[task](i, rng) for i in range(count)]


def right_words(task: str, protocol: str, q: dict) -> str:
    """What a model writes that is right, in the words that the protocol understands; `q` as `readers.completed` gives it."""
    if task in ("refcoco", "refcoco+", "refcocog") and protocol == "llava15":
        return "[0.1, 0.2, 0.5, 0.725]"  # in the padded square: y = (48, 384) + 80 of 640
    if task in ("refcoco", "refcoco+", "refcocog", "ocid-ref"):
        return "[0.1, 0.1, 0.5, 0.8]"
    if task == "vsr":
        return str(bool(q["label"]))
    if task == "chair":
        return "A dog."
    if task == "pope":
        return q["label"].capitalize()
    if "answers" in q:
        return q["answers"][0] if isinstance(q["answers"][0], str) else q["answers"][0]["answer"]
    if task == "mathvista" and q["question_type"] == "multi_choice" and protocol == "cambrian":
        return LETTERS[q["choices"].index(q["answer"])]
    if task in ("scienceqa", "ai2d"):
        return LETTERS[q["answer"]]
    return str(q["answer"])


def right_answer(task: str, protocol: str, takes: str, q: dict) -> dict:
    """The prediction of a model that is right, as the protocol takes it."""
    if takes == "judgement":
        return {"id": q["id"], "judgement": {"scores": [1.0], "pair": [8.0, 8.0], "judge": "gpt-0", "prompt": "p1"}}
    if takes == "text":
        return {"id": q["id"], "text": right_words(task, protocol, q)}
    truth, count = {
        "pope": lambda: (["yes", "no"].index(q["label"]), 2),
        "vsr": lambda: (1 - int(q["label"]), 2),
        "tallyqa": lambda: (q["answer"], 16),
        "ai2d": lambda: (q["answer"], 4),
        "seed-bench": lambda: ("ABCD".index(q["answer"]), 4),
    }[task]()
    share = [0.9 if i == truth else 0.01 for i in range(count)]
    return (
        {"id": q["id"], "probabilities": share}
        if takes == "probabilities"
        else {"id": q["id"], "losses": [-s for s in share]}
    )
