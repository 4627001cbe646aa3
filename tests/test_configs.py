"""Every shipped config, resolved: a change of recipe shows up in review as a change of a golden file.

After a deliberate change: `JAXVLM_WRITE_GOLDEN=1 python -m pytest tests/test_configs.py`, and review the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxvlm.config import ConfigError, RunConfig, build, complete, differences, parse_arg, to_dict
from jaxvlm.main import load_config

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
