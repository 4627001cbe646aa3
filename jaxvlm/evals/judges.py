"""Asking a judge: any server with OpenAI's chat completions, or judgements that are on file already.

The prompts are the benchmarks' own and are read from their files (MM-Vet's few-shot text, LLaVA-Bench's rule.json), so
a result names the judge that answered and the hash of what it was asked. Scores by different judges cannot be compared
(evaluation §0.10).
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.scorers import Record, judged
from jaxvlm.infer.answers import append_records, read_records

# (messages, temperature, max_tokens) -> (the judge's words, the name of the model that wrote them)
Ask = Callable[[list[dict], float, int], tuple[str, str]]

RETRY = "\nPredict the correctness of the answer (digit): "
MMVET_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # the first question, then the retries that the official code reads
BENCH_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


def server(base_url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0) -> Ask:
    """A judge behind `base_url`/chat/completions; the key, if there is one, is in the environment variable named.

    Asking raises `EvalError` naming the address if the server does not answer.
    """
    url = f"{base_url.rstrip('/')}/chat/completions"

    def ask(messages: list[dict], temperature: float, max_tokens: int) -> tuple[str, str]:
        body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer = json.load(response)
            return answer["choices"][0]["message"]["content"] or "", answer.get("model", model)
        except (urllib.error.URLError, TimeoutError, ValueError, LookupError) as error:
            raise EvalError(f"The judge at {url} gave no answer: {error}. What it judged so far is kept.") from None

    return ask


def mmvet(prompt: str, text: str, reference: Record, ask: Ask) -> dict:
    """One MM-Vet judgement: asked again, with a hint and more warmth, until the answer starts with a number."""
    truth = reference["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    question = prompt + "\n" + " | ".join([reference["question"], truth, text, ""])
    contents, name = [], ""
    for attempt, temperature in enumerate(MMVET_TEMPERATURES):
        message = {"role": "user", "content": question + (RETRY if attempt else "")}
        content, name = ask([message], temperature, 3)
        contents.append(content)
        if (score := judged.rating(content)) is not None:
            return {"scores": [score], "content": contents, "judge": name}
    return {"scores": [None], "content": contents, "judge": name}


def llava_bench(prompt: str, text: str, reference: Record, ask: Ask) -> dict:
    """One LLaVA-Bench review; `prompt` is the text of rule.json, the reference has rule, context and reference_answer."""
    rules = json.loads(prompt)
    if reference["rule"] not in rules:
        raise EvalError(f"The judge's rules have no '{reference['rule']}'; give LLaVA's rule.json as the prompt.")
    role, rule = rules[reference["rule"]]["role"], rules[reference["rule"]]["prompt"]
    caption = reference["context"]
    caption = "\n".join(caption) if isinstance(caption, list) else caption
    content = (
        f"[Context]\n{caption}\n\n[Question]\n{reference['text']}\n\n"
        f"[{role} 1]\n{reference['reference_answer']}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{text}\n\n[End of {role} 2]\n\n[System]\n{rule}\n\n"
    )
    messages = [{"role": "system", "content": BENCH_SYSTEM}, {"role": "user", "content": content}]
    review, name = ask(messages, 0.2, 1024)
    return {"pair": judged.pair(review), "content": review, "judge": name}


ASK_ABOUT = {"mm-vet": mmvet, "llava-bench-wild": llava_bench, "llava-bench-coco": llava_bench}


def judge(
    task: str, texts: Mapping[str, str], references: Iterable[Record], ask: Ask, prompt: str, out: str | Path
) -> dict[str, dict]:
    """Judges every reference's text into the JSONL file `out` and returns the judgements by id; goes on where it stopped.

    Raises `EvalError` if `out` holds judgements with another prompt or of other texts.
    """
    out, version = Path(out), digest_of(prompt)
    done = {str(record["question_id"]): record for record in read_records(out)}
    for reference in references:
        name = str(reference["id"])
        digest = digest_of(texts[name])
        if name not in done:
            made = ASK_ABOUT[task](prompt, texts[name], reference, ask)
            done[name] = {"question_id": name, **made, "prompt": version, "text": digest}
            append_records(out, [done[name]])
        elif (done[name]["prompt"], done[name]["text"]) != (version, digest):
            raise EvalError(
                f"{out} judges another prompt or another answer to {name}. Name another file, or delete it."
            )
    return done


def digest_of(text: str) -> str:
    """A short hash by which a result names the judge's prompt and a judgement its answer."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def judged_answers(answers: Mapping[str, Mapping], judgements: Mapping[str, dict]) -> list[dict]:
    """Answers by question id, each with its judgement.

    Raises `EvalError` for an answer without a judgement, or with one of another answer.
    """
    found = []
    for name, answer in answers.items():
        if name not in judgements:
            raise EvalError(f"There is no judgement of the answer to {name}; {len(judgements)} others are there.")
        judgement = judgements[name]
        if "text" in judgement and "text" in answer and judgement["text"] != digest_of(answer["text"]):
            raise EvalError(f"The judgement of {name} is of another answer than the one given.")
        found.append({**answer, "id": name, "judgement": judgement})
    return found


def read_judgements(path: str | Path) -> dict[str, dict]:
    """Judgements by question id from our JSONL, MM-Vet's grade file, or LLaVA-Bench's review JSONL.

    Raises `EvalError` naming the file for another form.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and all(isinstance(item, dict) and "score" in item for item in whole.values()):
        return {str(name): {"scores": g["score"], "judge": _only(g.get("model"))} for name, g in whole.items()}
    try:
        return {str(r["question_id"]): _judgement(r) for r in map(json.loads, filter(str.strip, text.splitlines()))}
    except (ValueError, LookupError, TypeError):
        raise EvalError(
            f"{path} is neither a file of judgements, nor MM-Vet's grades, nor LLaVA-Bench's reviews."
        ) from None


def _judgement(record: dict[str, Any]) -> dict:
    if "scores" in record or "pair" in record:
        return record
    return {"pair": record["tuple"], "judge": record.get("model", "unknown"), "content": record.get("content")}


def _only(models: list[str] | None) -> str:
    return "+".join(sorted(set(models or ["unknown"])))
