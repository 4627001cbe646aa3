"""BLIP-2 and InstructBLIP in use, against transformers' models and processors: prompts, answers, training, saving."""

import json
import re
import string
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import data_helpers
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from jaxvlm.config import CheckpointConfig, DataConfig, MeshConfig, SourceConfig, StageConfig
from jaxvlm.data import DataError
from jaxvlm.data.instruction import InstructionTokenizer, instruction_tokenizer
from jaxvlm.data.loader import Loader
from jaxvlm.infer import decoding
from jaxvlm.infer.detokenizer import Detokenizer
from jaxvlm.infer.engine import Engine, load
from jaxvlm.main import main
from jaxvlm.models.vlm import VLM
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.features import cached_features
from jaxvlm.train.loop import train_stage
from jaxvlm.train.step import loss_sums
from jaxvlm.weights import WeightsError, prompt_from
from jaxvlm.weights.saved import save_model

NEW, SIDE, QUERIES, VOCAB, LENGTH = 12, 28, 3, 720, 24
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
QFORMER |= {"cross_attention_frequency": 1}
LLM = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT = LLM | {"model_type": "opt", "ffn_dim": 24, "max_position_embeddings": 128, "word_embed_proj_dim": 16}
LLAMA = LLM | {"model_type": "llama", "intermediate_size": 24, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
WORDS = "what is this the cat on mat colour left right a question answer".split()
PIECES = [*string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase), *"?.,!:", *WORDS]
BERT = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *PIECES]))
QUESTIONS = ("What is this?", "Question: what colour is the cat on the mat? Answer:", "The left colour is", "a cat")
ANSWERS = ("It is a cat.", "teal and blue", "red", "on the mat")


def wrapped(folder, bos, **more):
    """A tokenizer folder of the data tests for transformers, with BOS in front."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    more |= {"bos_token": bos, "eos_token": "</s>", "padding_side": "left"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


@pytest.fixture(scope="module", params=["blip-2", "instructblip"])
def world(request, tmp_path_factory):
    """A random model of transformers with its processor, saved as on the hub; the model in jaxvlm; pictures."""
    root, reads = tmp_path_factory.mktemp("world"), request.param == "instructblip"
    images = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    if reads:
        # As on the hub, </s> is BOS and EOS at once.
        own = wrapped(data_helpers.llama_tokenizer(root / "own"), "</s>", pad_token="<unk>")
        bert = transformers.BertTokenizer(vocab=dict(zip(BERT, range(len(BERT)), strict=True)), truncation_side="left")
        processor = transformers.InstructBlipProcessor(images, own, bert, num_query_tokens=QUERIES)
    else:
        folder = data_helpers.byte_tokenizer(root / "own", ("<s>", "<pad>", "</s>"), "</s>", "</s>")
        processor = transformers.Blip2Processor(images, wrapped(folder, "</s>", pad_token="<pad>"), QUERIES)
    config = {
        "vision_config": VISION | {"image_size": SIDE, "patch_size": 14},
        "qformer_config": QFORMER | {"vocab_size": len(BERT), "max_position_embeddings": LENGTH},
        "num_query_tokens": QUERIES,
        "image_token_index": processor.tokenizer.convert_tokens_to_ids("<image>"),
    }
    if reads:
        config = transformers.InstructBlipConfig(text_config=LLAMA, **config)
        module = transformers.InstructBlipForConditionalGeneration(config)
    else:
        module = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(text_config=OPT, **config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        # Wide enough that instructions matter and answers do not repeat one token.
        spread = 0.3 if re.search("vision|embed_tokens|lm_head", name) else 0.6
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), spread, generator=generator)
    module.eval().save_pretrained(root / "model")
    processor.save_pretrained(root / "model")

    rng = np.random.default_rng(0)
    pictures = []
    for number, size in enumerate([(40, 30), (28, 28)]):
        noise = rng.integers(0, 256, (7, 7, 3)).astype(np.uint8)
        Image.fromarray(noise).resize(size).save(root / f"{number}.png")
        pictures.append(str(root / f"{number}.png"))
    return SimpleNamespace(
        root=root,
        folder=root / "model",
        module=module,
        processor=processor,
        reads=reads,
        vlm=load(root / "model"),
        pictures=[pictures[0], pictures[0], pictures[1], pictures[1]],  # each under two instructions
    )


def requests(world):
    return [
        {"messages": [{"role": "user", "content": f"<image>\n{text}"}], "images": [picture]}
        for text, picture in zip(QUESTIONS, world.pictures, strict=True)
    ]


def processed(world, texts, pictures, asked=None, side="left"):
    """The processor's inputs of a batch; the Q-Former's are padded where LAVIS pads them.

    The processor pads them where the language model's tokenizer pads, which for generation is on the left, and a text
    that does not start at the Q-Former's first position is another to it.
    """
    images = [Image.open(picture) for picture in pictures]
    inputs = world.processor(images=images, text=list(texts), padding=True, padding_side=side, return_tensors="pt")
    if world.reads:
        right = world.processor.qformer_tokenizer(
            list(asked or texts), padding=True, padding_side="right", return_tensors="pt"
        )
        inputs["qformer_input_ids"] = right.input_ids
        inputs["qformer_attention_mask"] = right.attention_mask
    return inputs


def test_logits_are_those_of_the_processors_inputs(world):
    prompt = world.vlm.prompt
    assert prompt.layout == "images_first" and prompt == prompt_from(world.folder)
    ours = world.vlm.logits(requests(world))
    for row, (text, picture) in enumerate(zip(QUESTIONS, world.pictures, strict=True)):
        inputs = world.processor(images=Image.open(picture), text=text, return_tensors="pt")
        with torch.no_grad():
            want = world.module(**inputs).logits[0].numpy()
        found = ours.values[row][ours.mask[row]]
        assert found.shape == want.shape
        assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()


def test_greedy_answers_are_transformers_own(world):
    vlm, asked = world.vlm, requests(world)
    inputs = processed(world, QUESTIONS, world.pictures)
    with torch.no_grad():
        out = world.module.generate(
            **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=list(vlm.end_ids), pad_token_id=1
        )
    width = inputs["input_ids"].shape[1]
    prompts = [vlm._prompt(request, i) for i, request in enumerate(asked)]
    written = vlm._answer(prompts, 4, NEW, 0.0, 1.0, 0)
    for row, tokens in enumerate(written):
        assert tokens == out[row, width : width + len(tokens)].tolist()
        assert len(tokens) == NEW or tokens[-1] in vlm.end_ids
    assert len({tuple(row) for row in written}) == 4
    texts = [vlm.tokenizer.decode([t for t in row if t not in vlm.end_ids]).strip() for row in written]
    assert vlm.generate(asked, max_new_tokens=NEW) == texts
    if not world.reads:
        return
    writer = Detokenizer(vlm.decode)
    pieces = [writer.add(token) for token in written[0] if token not in vlm.end_ids]
    assert list(vlm.stream(**asked[0], max_new_tokens=NEW)) == list(filter(None, [*pieces, writer.finish()]))


def test_a_picture_passes_the_tower_once_under_two_instructions(world, monkeypatch):
    passed = []
    original = decoding.encode_images
    monkeypatch.setattr(decoding, "encode_images", lambda *args: passed.append(args[2][0]) or original(*args))
    fresh, asked = Engine(world.vlm.config, world.vlm.prompt, world.vlm.params), requests(world)
    first, second, *_ = fresh._visual_rows([fresh._prompt(one, 0) for one in asked[:2]], 4)
    assert sum(len(pixels) for pixels in passed) == 1
    assert np.allclose(first, second) != world.reads
    assert fresh.generate(asked, max_new_tokens=NEW) == world.vlm.generate(asked, max_new_tokens=NEW)
    assert sum(pixels.any(axis=(1, 2, 3)).sum() for pixels in passed) == 2
    later = {"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "cat"}
    talk = [*asked[0]["messages"], *later[::-1]]  # what was asked first stays the picture's instruction
    again = fresh._visual_rows([fresh._prompt({"messages": talk, "images": asked[0]["images"]}, 0)], 4)
    np.testing.assert_allclose(again[0], first, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training


def loader(world, packing, **more):
    """One batch of four rows of the four questions; packed, one row holds them all."""
    records = [
        data_helpers.record(f"{question}\n<image>", f"{answer}  ", id=i, image=picture)
        for i, (question, answer, picture) in enumerate(zip(QUESTIONS, ANSWERS, world.pictures, strict=True))
    ]
    path = world.root / "records.json"
    if not path.is_file():
        path.write_text(json.dumps(records))
    data = DataConfig((SourceConfig("qa", str(path), ""),), packing=packing, tiles_per_row=4, length=128)
    return Loader(data, world.vlm.prompt, world.vlm.config, batch_size=4, seed=0, **more)


@partial(jax.jit, static_argnums=0)
def mean_loss(config, params, batch):
    """Of a token, as training computes it."""
    weights = batch["loss_weights"] / batch["loss_weights"].sum()
    return loss_sums(VLM(config), params, batch, weights, 1)[0]


def test_a_training_batch_has_transformers_loss(world):
    end = world.processor.tokenizer.eos_token if world.reads else "\n"
    whole = [f"{question} {answer}{end}" for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    inputs = processed(world, whole, world.pictures, QUESTIONS, side="right")
    labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    for row, question in enumerate(QUESTIONS):
        labels[row, : QUERIES + len(world.processor.tokenizer(question).input_ids)] = -100
    with torch.no_grad():
        want = world.module(**inputs, labels=labels).loss.item()

    config, params = world.vlm.config, world.vlm.params
    close = partial(pytest.approx, want, rel=1e-5)
    [batch] = loader(world, packing=False).batches()
    assert (batch["segment_ids"].max(-1) == 1).all() and mean_loss(config, params, batch) == close()
    [packed] = loader(world, packing=True).batches()
    assert packed["segment_ids"].max(-1).tolist() == [4, 0, 0, 0] and mean_loss(config, params, packed) == close()
    assert ("qformer_tokens" in packed) == world.reads
    if not world.reads:
        return
    assert packed["qformer_tokens"].shape == (4, 4, LENGTH) and packed["qformer_tokens"].dtype == np.int32
    assert packed["qformer_mask"].dtype == bool and packed["qformer_mask"][0].any(-1).all()
    turned = packed | {"qformer_tokens": packed["qformer_tokens"][:, ::-1]}  # each picture under another's question
    assert abs(mean_loss(config, params, turned) - want) > 1e-3 * want
    pictures = sorted(set(world.pictures))
    table = cached_features(config, params["vision"], pictures, world.vlm.prompt, world.root / "kept")
    [kept] = loader(world, packing=True, features=table).batches()
    assert "pixels" not in kept and mean_loss(config, params, kept) == close()


@pytest.mark.parametrize("world", ["instructblip"], indirect=True)
def test_a_trained_model_keeps_all_when_saved(world, tmp_path):
    vlm, run = world.vlm, tmp_path / "run"
    stage = StageConfig(name="instruct", trainable=("connector/.*",), batch_size=4)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.tree.map(np.array, vlm.params)  # its buffers go to the training
        batches = loader(world, packing=False, epochs=2)
        params, _ = train_stage(stage, vlm.config, params, batches, mesh, run, run / "stages" / "0", CheckpointConfig())
    save_model(run / "model", params, vlm.config, vlm.prompt, {"name": "tiny"})
    assert main(["import", str(run), str(tmp_path / "copy")]) == 0

    params = jax.tree.map(np.asarray, params)
    before, after = (Engine(vlm.config, vlm.prompt, p).logits(requests(world)).values for p in (vlm.params, params))
    assert not np.allclose(before, after)
    for folder in (run / "model", tmp_path / "copy"):
        trained = load(folder)
        copies = {name: str(folder / name) for name in ("tokenizer", "qformer_tokenizer")}
        assert trained.prompt == replace(vlm.prompt, **copies) and trained.config == vlm.config
        jax.tree.map(np.testing.assert_array_equal, trained.params, params)
        trained.params = params  # where programs are compiled for already
        np.testing.assert_array_equal(trained.logits(requests(world)).values, after)
    with pytest.raises(WeightsError, match="connector is 'qformer'.*layout = 'images_first'.*keep jaxvlm's own"):
        trained.export(tmp_path / "export")


# -------------------------------------------------------------------------------------------------------- instructions


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(BERT)}, truncation_side="left")
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_instructions_are_cut_as_their_tokenizer_says(bert, tmp_path, file):
    """Against BERT's own tokenizer, from the file that newer folders have and from the one that older ones have."""
    folder, theirs = bert
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for side in ("left", "right"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": side}))
        (tmp_path / file).write_text((folder / file).read_text() if file == "tokenizer.json" else "\n".join(BERT))
        theirs.truncation_side = side
        text = "What colour, is the CAT on the mat?  Zebra!"
        talk = [data_helpers.turns(f"{text} <image>", "a", "<image><image> the mat", "b")[i] for i in range(4)]
        for length in (5, 24):
            found = InstructionTokenizer(tmp_path, length).encode(talk)
            want = [theirs(one, truncation=True, max_length=length).input_ids for one in (text, *["the mat"] * 2)]
            assert [ids.tolist() for ids in found] == want


@pytest.mark.parametrize("world", ["instructblip"], indirect=True)
def test_what_is_missing_is_named(world, tmp_path, capsys):
    model, prompt = world.vlm.config, world.vlm.prompt
    with pytest.raises(DataError, match="text_vocab_size = .*prompt.qformer_tokenizer must name"):
        Engine(model, replace(prompt, qformer_tokenizer=""), world.vlm.params)
    with pytest.raises(DataError, match="is no folder with a tokenizer.json or a vocab.txt"):
        instruction_tokenizer(model, replace(prompt, qformer_tokenizer=str(tmp_path)))
    with pytest.raises(DataError, match="qformer_length = 128 must be .* no more than .*text_positions = 24"):
        instruction_tokenizer(model, replace(prompt, qformer_length=128))
    small = replace(model.connector, qformer=replace(model.connector.qformer, text_vocab_size=9))
    with pytest.raises(DataError, match="but the Q-Former knows 9 .*another model"):
        instruction_tokenizer(replace(model, connector=small), prompt)
    for file in world.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    assert main(["import", str(tmp_path), "--dry-run"]) == 1
    assert "qformer_tokenizer does not exist" in capsys.readouterr().err
