"""The model that lmms-eval finds: what it asks the engine, and, where lmms-eval is installed, whole evaluations offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from typing import NamedTuple

import pytest
import tiny
from PIL import Image

from jaxvlm.config import UserError
from jaxvlm.evals import lmms
from jaxvlm.infer.choices import loss_batches

NEW = 6
installed = pytest.mark.skipif(
    not importlib.util.find_spec("lmms_eval"),
    reason="lmms-eval is not installed; `make test-lmms` installs and runs it",
)


class Request(NamedTuple):
    """An `Instance` of lmms-eval, as far as a model reads it."""

    args: tuple
    task_name: str = "t"
    doc_id: int = 0


class Result(NamedTuple):
    """lmms-eval's `GenerationResult`."""

    text: object


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, engine, pictures)"""
    folder = tmp_path_factory.mktemp("lmms")
    return folder, *tiny.saved_engine(folder)


@pytest.fixture(scope="module")
def models(world):
    """The simple and the chat model, with two documents, on a base that stands for lmms-eval's."""
    folder, _, pictures = world
    documents = [{"picture": Image.open(path), "question": f"What is {path.stem}?"} for path in pictures[:2]]
    found = []
    for simple in (True, False):
        kind = type("Local", (lmms.Answering,), {"is_simple": simple, "task_dict": {"t": {"test": documents}}})
        found.append(kind(pretrained=folder / "toy", batch_size="2", dtype="float32"))
    return found


def picture(document) -> list:
    return [document["picture"]]


def simple(context, number=0, visual=picture, **kwargs) -> Request:
    return Request((context, kwargs, visual, number, "t", "test"), doc_id=number)


def asked(content, *images) -> dict:
    return {"messages": [{"role": "user", "content": content}], "images": list(images)}


def test_simple_requests(models, world):
    """Of several kinds in one call, in the caller's order."""
    _, engine, pictures = world
    requests = [
        simple("Hm?", 0, lambda document: None, max_new_tokens=NEW),
        simple("What is it?", 0, until=["zzz"], max_new_tokens=3),
        simple("What is it?", 1, max_new_tokens=NEW),
        simple("Is <image> it?", 1, max_new_tokens=NEW, temperature=0.0, do_sample=True, num_beams=1, top_p=None),
        simple("The same?", 0, lambda document: 2 * picture(document), max_new_tokens=NEW),
    ]
    paths = list(map(str, pictures))
    expected = [
        engine.generate([asked("Hm?")], max_new_tokens=NEW)[0],
        engine.generate([asked("<image>\nWhat is it?", paths[0])], max_new_tokens=3)[0],
        engine.generate([asked("<image>\nWhat is it?", paths[1])], max_new_tokens=NEW)[0],
        engine.generate([asked("Is <image> it?", paths[1])], max_new_tokens=NEW)[0],
        engine.generate([asked("<image>\n<image>\nThe same?", paths[0], paths[0])], max_new_tokens=NEW)[0],
    ]
    assert len(set(expected)) > 3 and models[0].generate_until(requests) == expected
    assert models[0].generate_until([]) == []
    stop = expected[2][2:4]
    cut = engine.generate([asked("<image>\nWhat is it?", paths[1])], max_new_tokens=NEW, stop=stop)
    assert (
        models[0].generate_until([simple("What is it?", 1, max_new_tokens=NEW, until=["", stop])])
        == cut
        != expected[2:3]
    )


def test_chat_requests(models, world):
    _, engine, pictures = world

    def messages(document):
        parts = [{"type": "text", "text": "First "}, {"type": "image", "url": document["picture"]}]
        parts += [{"type": "image", "url": str(pictures[3])}, {"type": "text", "text": "Which?"}]
        return [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": parts},
        ]

    request = Request(("not read", messages, {"max_new_tokens": NEW}, 1, "t", "test"))
    want = asked("First \n<image>\n<image>\nWhich?", str(pictures[1]), str(pictures[3]))
    want["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert models[1].generate_until([request]) == engine.generate([want], max_new_tokens=NEW)


def test_drawn_answers(models, world):
    """By the seed and the question's name: in any batch the same, a question that is asked again apart."""
    hot = dict(max_new_tokens=NEW, temperature=2.0, top_p=0.9, do_sample=True)
    requests = [simple("What is it?", number, **hot) for number in (0, 1, 0)]
    answers = models[0].generate_until(requests)
    assert len(set(answers)) == 3 and models[0].generate_until(requests[1:2]) == answers[1:2]
    [expected] = world[1].generate(
        [asked("<image>\nWhat is it?", str(world[2][0])) | {"id": "t/0#1"}],
        max_new_tokens=NEW,
        temperature=2.0,
        top_p=0.9,
    )
    assert answers[2] == expected
    assert models[0].generate_until([simple("What is it?", 0, **hot, seed=4)]) != answers[:1]
    greedy = simple("What is it?", 0, max_new_tokens=NEW)
    assert models[0].generate_until([simple("What is it?", 0, **hot | {"do_sample": False})]) == models[
        0
    ].generate_until([greedy])


def test_options_by_their_losses(models, world, monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", types.SimpleNamespace(GenerationResult=Result))
    _, engine, pictures = world
    words, target = ("red", "a dark blue circle", "green"), lambda document: document["question"]
    requests = [Request(("What is it?", f" {w}", picture, n, "t", "test"), doc_id=n) for n in (0, 1) for w in words]
    requests += [Request(("Say.", target, picture, 1, "t", "test")), Request(("", "red"))]
    found = [result.text for result in models[0].loglikelihood(requests)]
    options = [asked("<image>\nWhat is it?", str(pictures[n])) | {"options": words} for n in (0, 1)]
    options += [
        asked("<image>\nSay.", str(pictures[1])) | {"options": ("What is 1?",)},
        asked("") | {"options": ("red",)},
    ]
    expected = [loss for batch in loss_batches(engine, options) for _, losses in batch for loss in losses]
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-5)
    assert {greedy for _, greedy in found} == {False}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_beams": 5}, "t/1 asks for num_beams=5, which jaxvlm does not have. To go without, add num_beams=1 to"),
        ({"repetition_penalty": 1.2}, "add repetition_penalty=1 to --gen_kwargs"),
        ({"no_such": 1}, "t/1 asks for no_such=1, which jaxvlm does not have. To go without, take it out of the task"),
    ],
)
def test_what_the_engine_does_not_have_is_refused(models, kwargs, words):
    with pytest.raises(UserError, match=words):
        models[0].generate_until([simple("What?", 1, **kwargs)])


def test_errors_name_the_question(models, world):
    with pytest.raises(UserError, match="t/1 shows image as dict; jaxvlm reads text and pictures"):
        models[0].generate_until([simple("What?", 1, lambda document: [{"array": [0]}])])
    video = Request((0, lambda _: [{"role": "user", "content": [{"type": "video", "url": "x"}]}], {}, 0, "t", "test"))
    with pytest.raises(UserError, match="t/0 shows video as str"):
        models[1].generate_until([video])
    with pytest.raises(UserError, match="Request t/1 has 2 <image> in its messages but 1 image"):
        models[0].generate_until([simple("<image> <image>", 1)])
    with pytest.raises(NotImplementedError, match="t has several rounds"):
        models[0].generate_until_multi_round([simple("What?")])
    assert models[0].sampling({"max_new_tokens": 49152}, "t/0")["max_new_tokens"] == 4096


def test_how_it_is_started(world, monkeypatch):
    kind = type("Local", (lmms.Answering,), {"is_simple": True})
    assert kind(world[0] / "toy", batch_size="auto").batch_size == 16
    assert kind(world[0] / "toy", batch_size="auto", max_batch_size=3).batch_size == 3
    with pytest.raises(UserError, match="leave it out, and set JAX_PLATFORMS"):
        kind(world[0] / "toy", device="cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without accelerate"):
        kind(world[0] / "toy")
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = lmms.Other


# ------------------------------------------------------------------------------------------------------- lmms-eval itself

FUNCTIONS = """
from PIL import Image


def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]


def text(doc):
    return doc["question"]


def messages(doc):
    first, second = pictures(doc)
    parts = [("text", "One:"), ("image", first), ("text", "Two:"), ("image", second), ("text", doc["question"])]
    return [{"role": "user", "content": [{"type": k, "text" if k == "text" else "url": v} for k, v in parts]}]


def scored(doc, results):
    return {"words": len(results[0].split()), "same": float(results[0] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.text
doc_to_target: answer
"""
WRITTEN = """
output_type: generate_until
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false, num_beams: 1}
process_results: !function functions.scored
metric_list:
  - {metric: words, aggregation: mean, higher_is_better: true}
  - {metric: same, aggregation: mean, higher_is_better: true}
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: ["red", "a dark blue circle", "green"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


class Case(NamedTuple):
    """A task's documents, and what comes out of it."""

    documents: list[dict]
    expected: list


@pytest.fixture(scope="module")
def tasks(world):
    """Three tasks in folder/tasks; of each the references are right in part, as the engine itself answers."""
    folder, engine, pictures = world
    (folder / "tasks").mkdir()
    (folder / "tasks" / "functions.py").write_text(FUNCTIONS)
    paths = list(map(str, pictures))
    questions = [f"What colour is the {side} half?" for side in ("left", "right", "upper", "lower", "whole")]

    one = [asked(f"<image>\n{question}", path) for question, path in zip(questions, paths, strict=False)]
    both = [asked(f"One:\n<image>\nTwo:\n<image>\n{q}", paths[i], paths[i + 1]) for i, q in enumerate(questions)]
    written = engine.generate(one, max_new_tokens=NEW, stop="\n\n")
    compared = engine.generate(both, max_new_tokens=NEW, stop="\n\n")
    options = ("red", "a dark blue circle", "green")
    losses = {i: loss for batch in loss_batches(engine, [r | {"options": options} for r in one]) for i, loss in batch}
    chosen = [min(range(3), key=losses[i].__getitem__) for i in range(5)]
    right = [True, False, True, True, False]
    found = {}
    for name, count, answers, wrong, more in (
        ("toy_written", 1, written, "nothing of the kind", WRITTEN),
        (
            "toy_compared",
            2,
            compared,
            "nothing of the kind",
            WRITTEN + "doc_to_messages: !function functions.messages\n",
        ),
        ("toy_chosen", 1, chosen, 7, CHOSEN),
    ):
        documents = []
        for place, answer in enumerate(answers):
            other = (answer + 1) % 3 if wrong == 7 else wrong
            said = {"question": questions[place], "answer": answer if right[place] else other}
            documents.append(said | {"pictures": paths[place : place + count]})
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + more)
        found[name] = Case(documents, answers)
    assert len(set(written)) > 2 and len(set(compared)) > 2 and len(set(chosen)) > 1
    return found


def checked(results: dict, samples: dict, case: Case, name: str) -> None:
    """Every answer is the engine's, and the numbers are those of the answers."""
    made = sorted(samples[name], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"] for sample in made]  # on file a list of one has become its item
    assert [answer if isinstance(answer, str) else answer[0] for answer in said] == case.expected
    assert results[name]["same,none"] == pytest.approx(0.6)
    words = sum(len(text.split()) for text in case.expected) / 5
    assert results[name]["words,none"] == pytest.approx(words) and words > 0


@installed
def test_the_command_line(world, tasks, tmp_path):
    """`python -m lmms_eval --model jaxvlm`, found by its entry point, on chat tasks in a folder."""
    folder = world[0]
    command = [sys.executable, "-m", "lmms_eval", "--model", "jaxvlm", "--batch_size", "3", "--log_samples"]
    command += ["--model_args", f"pretrained={folder / 'toy'},dtype=float32", "--tasks", "toy_written,toy_compared"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(tmp_path), "--verbosity", "DEBUG"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [file] = tmp_path.rglob("*_results.json")
    written = json.loads(file.read_text())
    assert written["config"]["model_backend"] == "jaxvlm.evals.lmms.JaxVLMChat (chat)"
    samples = {}
    for name in ("toy_written", "toy_compared"):
        [file] = tmp_path.rglob(f"*_samples_{name}.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
        checked(written["results"], samples, tasks[name], name)


@installed
def test_the_simple_model_and_multiple_choice(world, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    made = simple_evaluate(
        model="jaxvlm",
        model_args=f"pretrained={world[0] / 'toy'},batch_size=3,dtype=float32",
        tasks=["toy_written", "toy_chosen"],
        task_manager=TaskManager(include_path=str(world[0] / "tasks"), model_name="jaxvlm", include_defaults=False),
        force_simple=True,
    )
    assert made["config"]["model_backend"] == "jaxvlm.evals.lmms.JaxVLM (simple)"
    checked(made["results"], made["samples"], tasks["toy_written"], "toy_written")
    assert made["results"]["toy_chosen"]["acc,none"] == pytest.approx(0.6)
    chosen = [
        min(range(3), key=lambda option: sample["filtered_resps"][option][0])
        for sample in sorted(made["samples"]["toy_chosen"], key=lambda sample: sample["doc_id"])
    ]
    assert chosen == tasks["toy_chosen"].expected


@installed
def test_the_plugin_imports_no_torch():
    """lmms-eval does; what it finds by the entry point adds nothing heavy until a model is made."""
    code = (
        "import sys, jaxvlm.evals.lmms as plugin; plugin.Answering; print(sorted({'torch', 'jax'} & set(sys.modules)))\n"
        "from lmms_eval import models; print(models.get_model_manifest('jaxvlm').chat_class_path, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "jaxvlm.evals.lmms.JaxVLMChat False"], done.stderr
