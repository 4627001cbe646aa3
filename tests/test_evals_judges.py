"""Judges: a server that speaks OpenAI's chat completions (one of ours, on this machine), and judgements on file."""

from __future__ import annotations

import http.server
import json
import threading

import eval_helpers
import pytest

from jaxvlm.evals import judges, score, tasks
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed
from jaxvlm.main import main

RULES = json.dumps(
    {
        f"llava_bench_{name}": {"role": "Assistant", "prompt": f"Rate ({name})."}
        for name in ("conv", "detail", "complex")
    }
)


@pytest.fixture
def server(monkeypatch):
    """A judge whose answers are `server.says`, in turn, the last one for ever; `server.asked` holds what it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.asked.append((self.path, self.headers.get("Authorization"), body))
            said = judge.says[min(len(judge.asked), len(judge.says)) - 1]
            code = 500 if said is None else 200
            reply = {"model": "judge-2024", "choices": [{"message": {"role": "assistant", "content": said}}]}
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(reply if code == 200 else {"error": "overloaded"}).encode())

        def log_message(self, *arguments):
            pass

    judge = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.says, judge.asked, judge.url = ["0.5"], [], f"http://127.0.0.1:{judge.server_address[1]}/v1"
    threading.Thread(target=judge.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield judge
    judge.shutdown()
    judge.server_close()


def questions(task, count=4):
    return completed(eval_helpers.questions(task, count), tasks.find_task(task).complete)


def ask_about(task, server, out, prompt, words="an answer", count=4):
    found = questions(task, count)
    texts = {q["id"]: words for q in found}
    return found, judges.judge(task, texts, found, judges.server(server.url, "judge"), prompt, out)


def test_mmvet_is_asked_as_its_own_code_asks(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.says = ["0.7 is my grade"]
    found, judgements = ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:", count=2)
    path, key, body = server.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    asked = {"role": "user", "content": "Grade it:\nwhat? | a <AND> b | an answer | "}
    assert body == {"model": "judge", "messages": [asked], "temperature": 0.0, "max_tokens": 3}
    made = judges.judged_answers({q["id"]: {"text": "an answer"} for q in found}, judgements)
    result = score("mm-vet", "llava15", made, found)
    assert result["value"] == pytest.approx(70) and result["invalid"] == 0
    assert result["judge"] == {"model": "judge-2024", "prompt": judges.digest_of("Grade it:")}


def test_mmvet_is_asked_again_with_more_warmth(server, tmp_path):
    server.says = ["good", "2", "0.5", "0.9"]
    _, judgements = ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:", count=1)
    assert judgements["v1_0"]["scores"] == [0.5] and judgements["v1_0"]["content"] == ["good", "2", "0.5"]
    assert [body["temperature"] for _, _, body in server.asked] == [0, 0, 0.5]
    assert server.asked[1][2]["messages"][0]["content"].endswith(
        " | an answer | \nPredict the correctness of the answer (digit): "
    )


def test_a_judge_that_never_gives_a_number_counts_zero(server, tmp_path):
    server.says = ["good"]
    found, judgements = ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:", count=1)
    assert len(server.asked) == 5 and judgements["v1_0"]["scores"] == [None]
    result = score("mm-vet", "official", judges.judged_answers({"v1_0": {"text": "an answer"}}, judgements), found)
    assert (result["value"], result["invalid"]) == (0, 1) and "no number" in result["per_sample"][0]["note"]


def test_llava_bench_compares_with_the_reference_answer(server, tmp_path):
    server.says = ["8 6\nThe second is shorter.", "9 9", "unclear", "10 10"]
    found, judgements = ask_about("llava-bench-wild", server, tmp_path / "j.jsonl", RULES)
    body = server.asked[1][2]
    assert (body["temperature"], body["max_tokens"]) == (0.2, 1024)
    assert body["messages"][0] == {"role": "system", "content": judges.BENCH_SYSTEM}
    assert body["messages"][1]["content"] == (
        "[Context]\na street\n\n[Question]\nwhat?\n\n[Assistant 1]\nA street.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nan answer\n\n[End of Assistant 2]\n\n[System]\nRate (detail).\n\n"
    )
    made = judges.judged_answers({q["id"]: {"text": "an answer"} for q in found}, judgements)
    result = score("llava-bench-wild", "llava15", made, found)
    assert result["invalid"] == 1  # its -1 and -1 are averaged in: (8 + 9 - 1 + 10) / 4 and (6 + 9 - 1 + 10) / 4
    assert result["aggregate"]["reference"] == 65.0 and result["value"] == 92.3
    with pytest.raises(EvalError, match="have no 'llava_bench_conv'; give LLaVA's rule.json"):
        ask_about("llava-bench-wild", server, tmp_path / "k.jsonl", "{}")


def test_judging_goes_on_where_it_stopped(server, tmp_path):
    server.says = ["0.5", "0.25", None]
    with pytest.raises(EvalError, match="gave no answer: HTTP Error 500.*so far is kept"):
        ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:")
    server.says, server.asked = ["1.0"], []
    found, judgements = ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:")
    assert [judgements[q["id"]]["scores"] for q in found] == [[0.5], [0.25], [1], [1]] and len(server.asked) == 2
    with pytest.raises(EvalError, match="another prompt or another answer to v1_0"):
        ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it better:")
    with pytest.raises(EvalError, match="another prompt or another answer to v1_0"):
        ask_about("mm-vet", server, tmp_path / "j.jsonl", "Grade it:", words="other")
    answers = {q["id"]: {"text": "other"} for q in found}
    with pytest.raises(EvalError, match="judgement of v1_0 is of another answer"):
        judges.judged_answers(answers, judgements)
    with pytest.raises(EvalError, match="no judgement of the answer to x"):
        judges.judged_answers({"x": {}}, judgements)


def test_a_judge_that_is_not_there():
    with pytest.raises(EvalError, match="127.0.0.1:9/v1/chat/completions gave no answer"):
        judges.server("http://127.0.0.1:9/v1/", "judge")([], 0.0, 3)


def test_judgements_of_the_official_tools(tmp_path):
    grades = {f"v1_{i}": {"model": ["gpt-4-0613"] * 2, "content": ["1", "x"], "score": [1.0, 0.5]} for i in range(4)}
    (tmp_path / "grades.json").write_text(json.dumps(grades))
    found = questions("mm-vet")
    made = judges.judged_answers(
        {q["id"]: {"text": ""} for q in found}, judges.read_judgements(tmp_path / "grades.json")
    )
    result = score("mm-vet", "official", made, found)
    assert result["value"] == 75 and result["judge"] == {"model": "gpt-4-0613", "prompt": "unknown"}
    reviews = [{"question_id": i, "tuple": [8, 4], "content": "8 4", "category": "conv"} for i in range(4)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    found = questions("llava-bench-coco")
    made = judges.judged_answers(
        {q["id"]: {"text": ""} for q in found}, judges.read_judgements(tmp_path / "reviews.jsonl")
    )
    assert score("llava-bench-coco", "llava15", made, found)["value"] == 50
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(EvalError, match="other.json is neither a file of judgements"):
        judges.read_judgements(tmp_path / "other.json")


def test_the_verb_asks_and_reads(server, tmp_path, capsys):
    server.says = ["0.25"]
    found = eval_helpers.questions("mm-vet", 3)
    (tmp_path / "mm-vet.json").write_text(json.dumps({q["id"]: q for q in found}))
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"question_id": i, "text": "x"}) + "\n" for i in range(3))
    )
    (tmp_path / "prompt.txt").write_text("Grade it:")
    base = f"eval score --task mm-vet --protocol llava15 --answers {tmp_path}/answers.jsonl --references {tmp_path}/mm-vet.json"
    kept = ["--judgements", str(tmp_path / "judged.jsonl")]
    asking = [*kept, "--judge", server.url, "--judge-model", "judge", "--judge-prompt", str(tmp_path / "prompt.txt")]

    def run(*more):
        with pytest.raises(SystemExit) as stop:
            main([*base.split(), *more])
        return stop.value.code, capsys.readouterr().out

    for more in (asking, kept):
        code, shown = run(*more)
        assert code == 0 and "total 25.00" in shown and f"judge-2024, prompt {judges.digest_of('Grade it:')}" in shown
    assert len(server.asked) == 3
    assert main([*base.split()]) == 1 and "give --judgements FILE, or with it --judge URL" in capsys.readouterr().err
    assert main([*base.split(), *asking[:4]]) == 1
