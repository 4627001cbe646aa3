"""Every shipped config, resolved: a change of recipe shows up in review as a change of a golden file.

After a deliberate change: `JAXVLM_WRITE_GOLDEN=1 python -m pytest tests/test_configs.py`, and review the difference.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_copy import random_params

from jaxvlm.config import ConfigError, RunConfig, build, differences, to_dict
from jaxvlm.config_files import complete, parse_arg
from jaxvlm.job import resolve_assets, stage_loader
from jaxvlm.main import load_config
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.train.optimizer import make_optimizer
from jaxvlm.train.state import TrainState, split
from jaxvlm.train.step import make_step
from jaxvlm.weights.families import cambrian as read_cambrian
from jaxvlm.weights.families import prismatic as read_prismatic

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
SPECS = {
    "quickstart": "quickstart.py",
    "quickstart-tiny": "quickstart.py:tiny",
    "emoji": "emoji.py",
    "llava15-7b": "llava15.py",
    "llava15-13b-lora": "llava15.py:llm=vicuna-13b,lora",
    "llava15-pretrain": "llava15.py:pretrain_only",
    "llava15-tiny": "llava15.py:tiny",
    "llava15-row3-half": "llava15.py:row=3,subset=0.5,extra=lvis_instruct4v_220k.json",
    "prismatic-one-stage-7b": "prismatic.py",
    "prismatic-reproduction-13b": "prismatic.py:model=reproduction-llava-v15+13b",
    "prismatic-dinosiglip-7b": "prismatic.py:model=prism-dinosiglip+7b",
    "prismatic-phi-2": "prismatic.py:model=phi-2+3b",
    "prismatic-tiny": "prismatic.py:two_stage,vision=dinosiglip-vit-so-384px,tiny",
    "cambrian-8b": "cambrian.py",
    "cambrian-34b": "cambrian.py:size=34b",
    "cambrian-tiny": "cambrian.py:tiny",
}


@pytest.mark.parametrize("name", SPECS)
def test_config_is_the_golden_one(name):
    config = load_config(str(ROOT / "configs" / SPECS[name]))
    values, path = json.loads(json.dumps(to_dict(config))), GOLDEN / f"{name}.json"
    if os.environ.get("JAXVLM_WRITE_GOLDEN"):
        path.write_text(json.dumps(values, indent=1) + "\n")
    assert differences(json.loads(path.read_text()), values) == []
    assert build(RunConfig, values) == config


def test_llava15_is_the_published_recipe():
    """The figures of LLaVA's scripts/v1_5/{pretrain,finetune,finetune_lora}.sh (recipes §1.3 D2-D3)."""
    config = load_config(str(ROOT / "configs" / "llava15.py"))
    align, instruct = config.stages
    assert (align.batch_size, align.optimizer.learning_rate, align.epochs) == (256, 1e-3, 1.0)
    assert (instruct.batch_size, instruct.optimizer.learning_rate, instruct.epochs) == (128, 2e-5, 1.0)
    for stage in config.stages:
        optimizer = stage.optimizer
        assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_ratio) == (0.0, None, 0.03)
        assert (optimizer.betas, optimizer.eps, optimizer.schedule) == ((0.9, 0.999), 1e-8, "cosine")
    assert (align.trainable, align.data.template, align.data.transform) == (("connector/.*",), "plain", "crop")
    assert instruct.trainable == ("connector/.*", "llm/.*")
    assert (config.prompt.template, config.prompt.transform, config.prompt.length) == ("vicuna_v1", "letterbox", 2048)
    assert config.model.vision.num_tokens == 576
    lora = load_config(str(ROOT / "configs" / "llava15.py:lora"))
    assert (lora.model.llm.lora.rank, lora.model.llm.lora.alpha) == (128, 256.0)
    rates = lora.stages[1].optimizer
    assert (rates.learning_rate, rates.learning_rate * rates.learning_rate_scales[0][1]) == (2e-4, pytest.approx(2e-5))


def test_the_rows_of_table_2():
    """What LLaVA-1.5's ablation adds, row by row (recipes §4.1)."""

    def row(number):
        config = load_config(str(ROOT / "configs" / f"llava15.py:row={number}"))
        (source,) = config.stages[1].data.sources
        return config, set(source.keep), source.format_prompts

    assert row(0)[1:] == ({"llava"}, False) and row(1)[1:] == ({"llava", "vqav2"}, False)
    assert row(2)[2] and row(2)[0].model.connector.kind == "linear" and row(3)[0].model.connector.kind == "mlp2x_gelu"
    assert row(4)[1] - row(3)[1] == {"okvqa", "aokvqa", "ocrvqa", "textcaps"}
    assert row(5)[1] - row(4)[1] == {"refcoco", "vg"}
    assert (row(5)[0].model.vision.image_size, row(6)[0].model.vision.image_size) == (224, 336)
    assert row(7)[1] - row(6)[1] == {"gqa"} and row(8)[1] == set()  # all, ShareGPT among them
    assert row(9)[0].model.llm.width == 5120
    with pytest.raises(ConfigError, match="'row' must be one of 8, 0"):
        row(12)


def prismatic(arg=""):
    return load_config(str(ROOT / "configs" / "prismatic.py") + arg)


def test_prismatic_is_the_published_recipe():
    """The figures of its conf/models.py (recipes §1.3, §1.4, §7.2)."""
    (one,) = prismatic().stages
    align, instruct = prismatic(":model=reproduction-llava-v15+7b").stages
    assert one == instruct
    assert (align.batch_size, align.optimizer.learning_rate, align.epochs) == (256, 1e-3, 1.0)
    assert (one.batch_size, one.optimizer.learning_rate, one.epochs) == (128, 2e-5, 1.0)
    for stage in (align, one):
        optimizer = stage.optimizer
        assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_ratio) == (0.0, 1.0, 0.03)
        assert (optimizer.betas, optimizer.eps, optimizer.schedule) == ((0.9, 0.999), 1e-8, "cosine")
        assert optimizer.warmup_rounding == "floor"
    assert (align.trainable, align.data.template) == (("connector/.*",), "plain_eos")
    assert one.trainable == ("connector/.*", "llm/.*") and one.data.template is None
    prompt, seed = prismatic().prompt, prismatic().seed
    assert (prompt.template, prompt.transform, prompt.layout, seed) == ("vicuna_v1", "letterbox", "prismatic", 7)
    assert (prompt.length, prompt.truncation) == (2048 + 576, "before_splice")


def test_prismatics_registered_models():
    """All of the paper's, by what it calls them: the trained parts, the towers, the language models, the data."""
    table = runpy.run_path(str(ROOT / "configs" / "prismatic.py"))["MODELS"]
    assert len(table) == 49
    full = prismatic(":model=prism-dinosiglip+7b")
    assert [tower.num_registers for tower in full.model.vision.towers] == [4, 0] and full.model.vision.grid == 27
    assert (full.model.connector.kind, full.model.vision.feature_width) == ("fused_mlp", 2176)
    assert (full.prompt.template, full.prompt.transform, full.prompt.length) == ("prism", "naive", 2048 + 729)
    (stage,) = full.stages
    assert stage.epochs == 2.0 and stage.data.sources[0].path.endswith("llava_v1_5_lvis4v_lrv_mix1231k.json")
    paths = full.init.vision.split(",")
    assert [path.split("/")[-1][:6] for path in paths] == ["vit_la", "siglip"] and full.init.llm.endswith("-2-7b-hf")
    assert prismatic(":model=full-ft-one-stage+7b").stages[0].trainable[-1] == "vision/.*"
    longer = prismatic(":model=train-1.25-epochs+7b").stages[0]
    assert (longer.steps, longer.epochs) == (6500, None)
    given = prismatic(":model=prism-siglip+7b,resize=resize-crop,llm=mistral-v0.1-7b-instruct")  # what is given counts
    assert (given.prompt.transform, given.prompt.template) == ("crop", "prism_mistral")
    assert given.model.vision.activation == "gelu_erf" and given.model.connector.kind == "mlp2x_gelu"
    assert prismatic(":model=dinoclip-336px-letterbox+7b").model.vision.towers[1].activation == "gelu_erf"
    for name in table:
        config = prismatic(f":model={name}")
        assert config.model.llm.width == {"7": 4096, "1": 5120, "3": 2560}[name.split("+")[1][0]]
        assert config.model.tile_tokens == config.prompt.length - 2048


@pytest.mark.parametrize("resize", ["letterbox", "resize-naive", "resize-crop"])
def test_prismatics_parts_are_what_its_checkpoints_are_read_as(resize):
    """Every tower and language model, in pairs: the tables of the config and of the importer say the same."""
    tables = runpy.run_path(str(ROOT / "configs" / "prismatic.py"))
    for vision, llm in zip(tables["TOWERS"], tables["LLMS"], strict=True):
        config = prismatic(f":vision={vision},llm={llm},resize={resize}")
        connector = "fused-gelu-mlp" if vision.startswith(("dinoclip", "dinosiglip")) else "gelu-mlp"
        names = {"vision_backbone_id": vision, "llm_backbone_id": llm, "arch_specifier": connector}
        given = {"model": names | {"image_resize_strategy": resize}, "stage": "align"}
        assert config.model == read_prismatic.configure(given, Path())
        read = read_prismatic.prompt(given, Path())
        assert {key: getattr(config.prompt, key) for key in read} == read


def test_cambrians_models_are_what_its_checkpoints_are_read_as():
    towers = ["siglip/CLIP-ViT-SO400M-14-384", "openai/clip-vit-large-patch14-336", "facebook/dinov2-giant-res378"]
    given = {"model_type": "cambrian_llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    given |= {"mm_vision_tower_aux_list": [*towers, "clip-convnext-XXL-multi-stage"], "mm_projector_type": "sva"}
    given |= {"mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216], "image_token_len": 576}
    given |= {"num_query_group": 1, "query_num_list": [576], "vision_hidden_size": 1024, "connector_depth": 3}
    given |= {"connector_only": False, "start_of_vision_sampler_layers": 0, "tokenizer_model_max_length": 2048}

    def sizes(width, depth, heads, kv_heads, mlp, **more):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        return dict(zip(names, (width, depth, heads, kv_heads, mlp), strict=True)) | more

    for size, count, stride, llm in (
        ("8b", 10, 3, sizes(4096, 32, 32, 8, 14336, vocab_size=128256, rope_theta=5e5, max_position_embeddings=8192)),
        ("13b", 10, 4, sizes(5120, 40, 40, 40, 13824, vocab_size=32000, rope_theta=1e4)),
        ("34b", 9, 7, sizes(7168, 60, 56, 8, 20480, vocab_size=64000, rope_theta=5e6)),
    ):
        layers = {"num_of_vision_sampler_layers": count, "stride_of_vision_sampler_layers": stride}
        config = load_config(str(ROOT / "configs" / "cambrian.py") + f":size={size}")
        assert config.model == read_cambrian.configure(given | layers | llm, Path())
        read = read_cambrian.prompt(given | layers | llm, Path())
        assert {key: getattr(config.prompt, key) for key in read} == read


def test_cambrian_is_the_published_recipe():
    """The figures of its scripts, and the batches of the paper (recipes §1.3 D9)."""

    def cambrian(size):
        return load_config(str(ROOT / "configs" / "cambrian.py") + f":size={size}")

    layers = {"8b": range(0, 30, 3), "13b": range(0, 40, 4), "34b": range(0, 63, 7)}
    templates = {"8b": "cambrian_llama_3", "13b": "vicuna_v1", "34b": "cambrian_chatml"}
    for size, rate, batch in (("8b", 4e-5, 512), ("13b", 4e-5, 512), ("34b", 2e-5, 1024)):
        config = cambrian(size)
        align, instruct = config.stages
        assert (align.batch_size, align.optimizer.learning_rate, align.epochs) == (512, 1e-3, 1.0)
        assert (instruct.batch_size, instruct.optimizer.learning_rate, instruct.epochs) == (batch, rate, 1.0)
        assert (align.optimizer.warmup_ratio, instruct.optimizer.warmup_ratio) == (0.06, 0.03)
        assert (align.trainable, instruct.trainable) == (("connector/.*",), ("connector/.*", "llm/.*"))
        for optimizer in (align.optimizer, instruct.optimizer):
            assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.betas) == (0.0, 1.0, (0.9, 0.999))
        sva = config.model.connector.sva
        assert (sva.width, sva.num_heads, sva.depth, sva.groups, sva.grid) == (1024, 16, 3, 1, 24)
        assert sva.llm_layers == tuple(layers[size]) and config.model.connector.row_end
        assert (config.prompt.template, config.prompt.transform) == (templates[size], "letterbox_unpad")
        assert (config.prompt.length, config.prompt.truncation) == (2048, "after_splice")
    # The samplers and their queries learn ten times more slowly in the first stage; the rest does not.
    names = flatten_dict(abstract_params(cambrian("8b").model)["connector"], sep="/")
    (pattern, factor), slow = cambrian("8b").stages[0].optimizer.learning_rate_scales[0], set()
    slow = {name.split("/")[0] for name in names if re.match(pattern, f"connector/{name}")}
    assert factor == 0.1 and slow == {"query", "group_0", "llm_layers"}
    rest = {name.split("/")[0] for name in names} - slow
    assert rest == {"aux_0", "aux_1", "aux_2", "aux_3", "linear_1", "linear_2", "newline"}


@pytest.mark.parametrize("spec", ["prismatic.py:two_stage,vision=dinosiglip-vit-so-384px,tiny", "cambrian.py:tiny"])
def test_toys_train(spec):
    """Every stage's data and patterns fit its model; of the toy that compiles quickly, the last stage's loss falls."""
    config = resolve_assets(load_config(str(ROOT / "configs" / spec)))
    params = random_params(config.model)
    for number, stage in enumerate(config.stages):
        batches = itertools.islice(stage_loader(number, config).batches(), 12)
        trainable, frozen = split(params, stage.trainable)
        optimizer = make_optimizer(stage.optimizer, 12, trainable)
    state = TrainState(np.int32(0), trainable, frozen, optimizer.init(trainable))
    step = make_step(VLM(config.model), optimizer, 1)
    if config.model.connector.kind == "sva":
        assert jax.eval_shape(step, state, next(batches))[1]["loss"].shape == ()
        return
    step, losses = jax.jit(step), []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.75 * losses[0]


def test_overrides_reach_into_stages():
    config = load_config(
        str(ROOT / "configs" / "llava15.py:llm=vicuna-13b,lora"),
        ["--config.stages[1].optimizer.learning_rate=1e-5", "--config.stages[0].optimizer.clip_norm=1.0"],
    )
    assert config.stages[1].optimizer.learning_rate == 1e-5
    assert config.stages[0].optimizer.clip_norm == 1.0
    assert load_config(str(ROOT / "configs" / "llava15.py"), {"seed": 5}).seed == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(sead=1), "config.sead is not a setting. Did you mean 'seed'?"),
        (dict(model=dict(llm=dict(widht=3))), "config.model.llm.widht is not a setting. Did you mean 'width'?"),
        (dict(stages=[dict(nam="x")]), r"config.stages\[0\].nam is not a setting. Did you mean 'name'?"),
        (dict(seed="one"), "config.seed must be int, not 'one'"),
        (dict(stages="align"), "config.stages must be a list"),
        (dict(stages=[dict(optimizer=dict(betas=3))]), r"config.stages\[0\].optimizer.betas must be a list"),
        (dict(model=3), "config.model must be a mapping"),
    ],
)
def test_mistakes_name_the_key(values, words):
    with pytest.raises(ConfigError, match=words):
        complete(values)


def test_parse_arg():
    arg = parse_arg("llm=13b,lora", llm=("7b", "13b"), lora=False, rank=8)
    assert (arg.llm, arg.lora, arg.rank) == ("13b", True, 8)
    for text, words in {
        "lorra": "Did you mean 'lora'",
        "llm=70b": "one of 7b, 13b",
        "rank=x": "must be int",
        "rank": "needs a value",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse_arg(text, llm=("7b", "13b"), lora=False, rank=8)
