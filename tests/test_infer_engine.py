"""The engine: batches, images, streaming and logits against each other and against transformers."""

from __future__ import annotations

import dataclasses
import json

import hf_copy
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.config import EvalConfig, MeshConfig, PromptConfig, UserError
from jaxvlm.data import conversation
from jaxvlm.data.assets import toy
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.evals import runner
from jaxvlm.infer import decoding
from jaxvlm.infer.answers import RequestError, generate_file
from jaxvlm.infer.choices import choose_batches, first_tokens, loss_batches
from jaxvlm.infer.engine import Engine, load
from jaxvlm.infer.shapes import bucket
from jaxvlm.main import main
from jaxvlm.models.vlm import logical_axes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import param_shardings
from jaxvlm.weights.saved import save_model

NEW = 12


def user(text: str, *images, **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], "images": list(images), **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return toy.write_tokenizer(folder / "tokenizer"), toy.write_dataset(folder / "data", count=6)


@pytest.fixture(scope="module")
def engine(world):
    config = tiny.model_config()
    prompt = PromptConfig(tokenizer=str(world[0]), template="mistral_instruct", transform="naive")
    return Engine(config, prompt, hf_copy.random_params(config))


@pytest.fixture(scope="module")
def requests(world):
    pictures = [str(path) for path in sorted((world[1] / "images").iterdir())]
    return [
        user("<image>\nWhat colour is the left half?", pictures[0]),
        user("Say a colour."),
        user("<image>\nWhat is it?", pictures[1]),
        user("<image> and <image>, which?", pictures[1], pictures[2]),
        user("<image>\nWhat colour is the right half? x", pictures[0]),
    ]


@pytest.fixture(scope="module")
def answers(engine, requests):
    return engine.generate(requests, max_new_tokens=NEW, batch_size=3)


def test_batches_of_any_size_give_the_same_answers_in_the_callers_order(engine, requests, answers):
    assert len(set(answers)) > 2
    assert [engine.generate([request], max_new_tokens=NEW)[0] for request in requests] == answers
    seen = []
    back = engine.generate(
        requests[::-1], max_new_tokens=NEW, batch_size=3, on_progress=lambda done, total: seen.append((done, total))
    )
    assert back == answers[::-1] and seen == [(3, 5), (5, 5)]


def test_streaming_gives_the_same_text(engine, requests, answers):
    for request, answer in zip(requests, answers, strict=True):
        assert "".join(engine.stream(**request, max_new_tokens=NEW)) == answer
        assert engine.prompt_length(request) == len(engine._prompt(request, 0).tokens)


def test_images_pass_the_tower_once_and_text_not_at_all(engine, requests, answers, monkeypatch):
    passed = []

    def encode(config, params, pixels, *more):
        passed.append(np.asarray(pixels[0]))
        return original(config, params, pixels, *more)

    original = decoding.encode_images
    monkeypatch.setattr(decoding, "encode_images", encode)
    fresh = Engine(engine.config, engine.prompt, engine.params)
    assert fresh.generate([requests[1]], max_new_tokens=NEW) == [answers[1]] and not passed
    assert fresh.generate(requests, max_new_tokens=NEW, batch_size=3) == answers
    pictures = np.concatenate(passed)
    assert len({picture.tobytes() for picture in pictures if picture.any()}) == 3
    assert sum(bool(picture.any()) for picture in pictures) == 3


def test_greedy_tokens_follow_the_logits(engine, requests):
    """The cache, the padding and the positions against a forward pass over the whole sequence."""
    request = requests[0]
    prompt = engine._prompt(request, 0)
    written = engine._answer([prompt], 1, NEW, 0.0, 1.0, 0)[0]
    longer = user(request["messages"][0]["content"] + "!!", *request["images"])
    logits, mask = engine.logits([request, longer])
    length = len(prompt.tokens)
    assert logits.shape == (2, mask[1].sum(), engine.config.llm.vocab_size) and logits.dtype == np.float32
    assert mask[0].sum() == length < mask.shape[1] and mask[0, :length].all()
    assert not np.allclose(logits[1, length - 1], logits[0, length - 1])
    assert written[0] == logits[0, length - 1].argmax()
    np.testing.assert_allclose(engine.logits([request]).values[0], logits[0, :length], rtol=1e-4, atol=1e-5)


def test_sliding_window_in_the_cache(engine, requests):
    config = dataclasses.replace(
        engine.config, llm=dataclasses.replace(engine.config.llm, sliding_window=6, max_positions=64)
    )
    windowed = Engine(config, engine.prompt, engine.params)
    prompt = windowed._prompt(requests[1], 0)
    written = windowed._answer([prompt], 1, NEW, 0.0, 1.0, 0)[0]
    sequence = np.zeros((1, 48), np.int32)
    length = len(prompt.tokens)
    whole = [*prompt.tokens, *written]
    sequence[0, : len(whole)] = whole
    logits = decoding.all_logits(config, engine.params, sequence, None, None, None, np.array([len(whole)]))
    assert written == np.asarray(logits)[0, length - 1 : len(whole) - 1].argmax(-1).tolist()


def test_stop_texts_and_end_tokens(engine, requests, answers):
    full = answers[0]
    stop = full[3:5]
    expected = full[: full.index(stop)].strip()
    assert engine.generate([requests[0]], max_new_tokens=NEW, stop=stop) == [expected]
    assert "".join(engine.stream(**requests[0], max_new_tokens=NEW, stop=[stop, "zzz"])) == expected
    prompt = engine._prompt(requests[0], 0)
    written = engine._answer([prompt], 1, NEW, 0.0, 1.0, 0)[0]
    ended = Engine(engine.config, engine.prompt, engine.params)
    ended.end_ids = (written[4],)
    cut = ended._answer([ended._prompt(requests[0], 0)], 1, NEW, 0.0, 1.0, 0)[0]
    assert cut == written[: written.index(written[4]) + 1]
    assert ended.generate([requests[0]], max_new_tokens=NEW) == [
        "".join(ended.stream(**requests[0], max_new_tokens=NEW))
    ]


def test_sampling_depends_on_seed_and_request_only(engine, requests, answers):
    hot = dict(max_new_tokens=NEW, temperature=2.0, top_p=0.9)
    first = engine.generate(requests, **hot, batch_size=3, seed=1)
    assert first == engine.generate(requests, **hot, batch_size=3, seed=1)
    assert first != engine.generate(requests, **hot, batch_size=3, seed=2)
    turned = [request | {"id": i} for i, request in enumerate(requests)][::-1]
    assert engine.generate(turned, **hot, batch_size=3, seed=1) == first[::-1]
    assert engine.generate(requests, **hot | {"top_p": 1e-6}, batch_size=3) == answers


def test_errors_name_the_request_and_the_fix(engine, requests, world):
    with pytest.raises(RequestError, match=r"Request 7 has 1 <image> .* but 0 image"):
        engine.generate([user("<image>\nhm", id=7)], max_new_tokens=4)
    with pytest.raises(RequestError, match="nowhere.png does not exist"):
        engine.generate([user("<image>\nhm", "nowhere.png")], max_new_tokens=4)
    small = dataclasses.replace(engine.config, llm=dataclasses.replace(engine.config.llm, max_positions=20))
    short = Engine(small, engine.prompt, engine.params)
    with pytest.raises(RequestError, match=r"is \d\d tokens long, 4 of them of images; the model has 20 positions"):
        short.generate([requests[0]], max_new_tokens=4)
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1"):
        engine.generate(requests[:1], max_new_tokens=0)
    assert engine.generate([], max_new_tokens=4) == []


def test_answers_end_at_the_models_last_position(engine, requests):
    length = len(engine._prompt(requests[1], 0).tokens)
    limits = dataclasses.replace(engine.config.llm, max_positions=length + 3)
    short = Engine(dataclasses.replace(engine.config, llm=limits), engine.prompt, engine.params)
    sampling = short._inputs([short._prompt(requests[1], 0)], 1, NEW, 0.0, 1.0, 0)[2]
    assert sampling.limits.tolist() == [3]


def test_fingerprint_sees_every_bit(engine):
    same = Engine(engine.config, engine.prompt, jax.tree.map(np.copy, engine.params))
    assert same.fingerprint == engine.fingerprint
    kernel = same.params["llm"]["head"]["kernel"]
    kernel[[0, 1]] = kernel[[1, 0]]
    assert Engine(engine.config, engine.prompt, same.params).fingerprint != engine.fingerprint


def test_evaluation_with_the_real_engine(engine, world, tmp_path):
    config = EvalConfig(
        "open", str(world[1] / "test.jsonl"), str(world[1] / "images"), batch_size=3, max_new_tokens=NEW, blind=""
    )
    results = runner.run(engine, config, workdir=tmp_path, log=lambda text: None)
    assert results["scores"]["all"]["n"] == 12
    lines = [json.loads(line) for line in (tmp_path / "answers-sighted.jsonl").read_text().splitlines()]
    assert {line["metadata"]["model"] for line in lines} == {engine.fingerprint} and len(lines) == 12


def test_an_exported_model_is_the_same_model(engine, requests, tmp_path):
    engine.export(tmp_path / "hf")
    loaded = load(tmp_path / "hf")
    ours, theirs = (each.logits(requests[:1]).values for each in (engine, loaded))
    np.testing.assert_allclose(theirs[..., : ours.shape[-1]], ours, rtol=1e-5, atol=1e-5)


def test_load_reads_a_saved_model_and_says_what_is_no_model(engine, requests, answers, tmp_path):
    save_model(tmp_path / "model", engine.params, engine.config, engine.prompt, {})
    loaded = load(tmp_path)
    assert loaded.fingerprint == engine.fingerprint and loaded.prompt.template == engine.prompt.template
    assert loaded.generate(requests, max_new_tokens=NEW, batch_size=3) == answers
    with pytest.raises(UserError, match="holds no jaxvlm model"):
        load(tmp_path / "nothing")
    manifest = tmp_path / "model" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"transform_version": 1', '"transform_version": 7'))
    with pytest.raises(
        UserError, match=f"version 7 of the transform '{engine.prompt.transform}' .*has version 1. Use jaxvlm"
    ):
        load(tmp_path)


@given(st.integers(1, 100_000))
@settings(deadline=None)
def test_buckets(length):
    assert length <= bucket(length) <= max(16, 1.25 * length + 16) and bucket(bucket(length)) == bucket(length)


def test_transformers_generates_the_same_tokens(world, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxvlm.weights import import_model

    image_token = Tokenizer(world[0]).vocab_size
    vocab = image_token + 1
    vision = dict(image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    text = dict(vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    hf_config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(intermediate_size=64, projection_dim=32, **vision),
        text_config=transformers.LlamaConfig(intermediate_size=128, max_position_embeddings=256, **text),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = transformers.LlavaForConditionalGeneration(hf_config).eval()
    hf_copy.randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    config, params = import_model(tmp_path)
    config = dataclasses.replace(config, dtype="float32")
    prompt = PromptConfig(tokenizer=str(world[0]), template="vicuna_v1", transform="naive")
    ours = Engine(config, prompt, params)
    pictures = [str(path) for path in sorted((world[1] / "images").iterdir())]
    requests = [user("<image>\nWhat colour is it?", pictures[0]), user("Hm?"), user("<image>\nA?", pictures[3])]
    prompts = [ours._prompt(request, i) for i, request in enumerate(requests)]
    written = ours._answer(prompts, 3, NEW, 0.0, 1.0, 0)
    assert len({tuple(row) for row in written}) == 3
    for one, row in zip(prompts, written, strict=True):
        ids = np.where(one.visual_index >= 0, image_token, one.tokens)
        inputs = {"input_ids": torch.from_numpy(ids[None].astype(np.int64))}
        if one.images:
            from jaxvlm.data.image import load_image, transform

            pixels = transform(load_image(one.images[0]), "naive", 28, config.vision.mean) / 255.0
            pixels = (pixels - np.array(config.vision.mean)) / np.array(config.vision.std)
            inputs["pixel_values"] = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=ours.tokenizer.eos_id, pad_token_id=0
            )
        assert out[0, len(ids) :].tolist() == row


def test_a_sharded_engine_gives_the_same_answers(engine, requests, answers):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(logical_axes(engine.config), engine.params, mesh)
    sharded = Engine(engine.config, engine.prompt, jax.device_put(engine.params, shardings), mesh=mesh)
    assert sharded.generate(requests, max_new_tokens=NEW, batch_size=3) == answers
    assert sharded.fingerprint == engine.fingerprint


def test_choosing_by_the_first_token(engine, requests, tmp_path):
    """The shares are those of the whole prompt's last logits; batches and files give the same."""
    candidates = ("red", "blue", "green")
    tokens = [engine.tokenizer.encode(f" {word}")[0] for word in candidates]  # as the template writes answers
    assert first_tokens(engine, candidates) == tokens
    found = dict(pair for batch in choose_batches(engine, requests, candidates, batch_size=3) for pair in batch)
    for index, request in enumerate(requests):
        logits = engine.logits([request]).values[0, -1][tokens].astype(np.float64)
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert np.allclose(found[index], expected, atol=1e-5) and sum(found[index]) == pytest.approx(1)
    with pytest.raises(RequestError, match="red, red two begin with the same token"):
        first_tokens(engine, ["red", "red"])
    asked = [{"question_id": i, "text": "Say a colour.", "candidates": candidates} for i in range(2)]
    asked.append({"question_id": 2, "text": "Say a colour."})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    options = dict(max_new_tokens=NEW, log=lambda text: None)
    assert generate_file(engine, tmp_path / "q.jsonl", tmp_path / "a.jsonl", **options) == 3
    made = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert made[0]["probabilities"] == pytest.approx(found[1], abs=1e-5) and "probabilities" not in made[2]
    assert made[0]["text"] == candidates[int(np.argmax(found[1]))]
    assert generate_file(engine, tmp_path / "q.jsonl", tmp_path / "a.jsonl", **options) == 0


def test_choosing_by_the_loss_of_each_answer(engine, requests, tmp_path):
    """A loss is the mean over the answer's tokens and its end, from the logits of a conversation that goes on after it."""
    options = ("red", "a dark blue circle")
    found = dict(
        p for b in loss_batches(engine, [{**r, "options": options} for r in requests], batch_size=3) for p in b
    )
    template = (engine.tokenizer, engine.prompt.template)
    for index, request in enumerate(requests):
        start = int(engine.logits([request]).mask.sum())  # the answer's place, visual tokens counted
        for words, loss in zip(options, found[index], strict=True):
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": words}]
            encoded = conversation.encode({"id": 1, "conversations": turns}, *template)
            answer = encoded.tokens[encoded.weights > 0]
            longer = [
                *request["messages"],
                {"role": "assistant", "content": words},
                {"role": "user", "content": "And?"},
            ]
            logits = engine.logits([{**request, "messages": longer}]).values[0, start - 1 : start - 1 + len(answer)]
            logits = logits.astype(np.float64)
            picked = logits[np.arange(len(answer)), answer]
            assert loss == pytest.approx((np.log(np.exp(logits).sum(-1)) - picked).mean(), abs=1e-4)
    asked = [{"question_id": i, "text": "Say a colour.", "options": options[:count]} for i, count in enumerate((1, 2))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    generate_file(engine, tmp_path / "q.jsonl", tmp_path / "a.jsonl", max_new_tokens=NEW, log=lambda text: None)
    made = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert made[1]["losses"] == pytest.approx(found[1], abs=1e-5) and made[0]["losses"] == made[1]["losses"][:1]
    assert made[1]["text"] == options[int(np.argmin(found[1]))]


def test_greedy_answers_are_told_by_their_counted_tokens(engine, requests):
    logits = engine.logits(requests[1:2]).values
    tokens, targets = engine._prompt(requests[1], 0).tokens[None], logits.argmax(-1)
    weights, lengths = np.zeros(tokens.shape, np.float32), np.array([tokens.shape[1]])
    weights[0, -3:] = 1
    for changed, expected in ((None, True), (-2, False), (2, True)):
        said = targets.copy()
        if changed is not None:
            said[0, changed] += 1
        rest = (None, None, None, lengths, said, weights)
        losses, greedy = decoding.answer_losses(engine.config, engine.params, tokens, *rest)
        picked = np.take_along_axis(logits[0, -3:], said[0, -3:, None], -1)[:, 0]
        loss = (np.log(np.exp(logits[0, -3:].astype(np.float64)).sum(-1)) - picked).mean()
        assert greedy.tolist() == [expected] and losses.tolist() == pytest.approx([loss], abs=1e-4)


def test_a_benchmark_from_questions_to_score(engine, world, tmp_path, capsys):
    """The three verbs over a saved model."""
    save_model(tmp_path / "model", engine.params, engine.config, engine.prompt, {})
    pictures = sorted((world[1] / "images").iterdir())
    labels = [{"question_id": i, "image": p.name, "text": "Is it?", "label": "no"} for i, p in enumerate(pictures[:3])]
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "coco_pope_random.json").write_text("".join(json.dumps(one) + "\n" for one in labels))
    images, asked, made = ["--images", str(world[1] / "images")], str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl")
    generate = ["generate", "--run", str(tmp_path / "model"), "--input", asked, *images, "--output", made]

    def verb(name, protocol, *more):
        about = ["--task", "pope", "--protocol", protocol, "--references", str(tmp_path / "pope")]
        try:
            return main(["eval", name, *about, *more])
        except SystemExit as stop:
            return stop.code

    assert verb("questions", "llava15", *images, "--out", asked) == 0 and main(generate) == 0
    assert verb("score", "llava15", "--answers", made, "--out", str(tmp_path / "score.json")) == 0
    result = json.loads((tmp_path / "score.json").read_text())
    assert (result["headline"], result["n"], result["model"]) == ("f1", 3, engine.fingerprint)
    assert result["prompts_as_asked"] == "3 of 3" and len(result["prompt"]) == 16
    more = [
        "--run",
        str(tmp_path / "model"),
        "--blind",
        "gray",
        "--out",
        str(tmp_path / "all"),
        "--max_new_tokens",
        "4",
    ]
    for _ in range(2):  # the second time every answer is there
        assert verb("benchmark", "llava15", *images, *more) == 0
    shown = capsys.readouterr().out
    assert "sighted: pope, llava15: f1" in shown and "Seeing is worth " in shown and "3 already answered" in shown
    blind = json.loads((tmp_path / "all" / "gray-result.json").read_text())
    assert blind["blind"] == "gray" and blind["prompts_as_asked"] == "3 of 3"
    assert blind["exact_check"]["asked"] == 3 and "in exact mode   0 of 3 texts differ" in shown
    assert blind["speed"]["answered"] == 3 and blind["speed"]["seconds"] > 0 and " questions/s, " in shown
    assert blind["settings"]["backend"] == "cpu" and blind["settings"]["jax"] == jax.__version__
    assert verb("benchmark", "llava15", *images, *more[:2], *more[4:], "--limit", "2") == 0
    assert "questions       2," in capsys.readouterr().out
    assert verb("benchmark", "official", *images, *more, "--limit", "2") == 1
    assert "sighted-answers.jsonl answers another prompt to random/" in capsys.readouterr().err
    # Prismatic's candidates: this small tokenizer spells both, so that it is refused.
    assert verb("questions", "prismatic", *images, "--out", asked) == 0 and main([*generate[:-1], made + "2"]) == 1
    assert "Yes, No two begin with the same token" in capsys.readouterr().err
