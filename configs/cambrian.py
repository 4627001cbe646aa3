"""Cambrian-1 (Tong et al. 2024, "A Fully Open, Vision-Centric Exploration of Multimodal LLMs"): the recipe of its scripts.

  python -m jaxvlm.main --config configs/cambrian.py:size=8b,weights=/path/weights,data=/path/data --workdir runs/cambrian

Four frozen towers, whose features an aggregator (SVA) joins to 24 x 24 tokens, and aggregators inside the decoder. Images are
letterboxed; the bars' tokens are left out and their cells hidden from the aggregators. Arguments: `size` (8b, 13b, 34b) and
`tiny`, the same recipe on a randomly initialised toy and its pictures, trained and evaluated in a minute or two on a CPU:

  python -m jaxvlm.main --config configs/cambrian.py:tiny --workdir runs/cambrian-tiny

`weights` holds the four TOWERS and the language model under their names on the hub, `data` holds `alignment_2.5m.jsonl` and
`Cambrian7M_withsystemprompt.jsonl` with the images as these name them.

Settings are those of scripts/cambrian/{pretrain,finetune}_cambrian_*.sh: AdamW without weight decay, cosine, one epoch each; the
connector alone at 1e-3 (samplers and queries 1e-4) after 6 % warm-up, then also the language model at 4e-5 (34B: 2e-5) after
3 %. The paper's Table 23 says 2e-5 for all. Batches of 512 (34B: 1024 in the second stage) are the paper's; clipping at 1.0
is the trainer's default, which clips each shard by itself where this clips the whole gradient. Text-only records cost no pass
through the towers here.

Expect the paper's numbers (8B: MME 1547, GQA 64.6, CV-Bench 72.3 and 72.0). This project has not run the full recipe yet: its
parts are tested against torch on small models.
"""

from dataclasses import replace
from pathlib import Path

from jaxvlm.config import to_dict
from jaxvlm.config_files import complete, parse_arg
from jaxvlm.weights.families import cambrian

TOWERS = {  # Cambrian's names, and the folders under `weights`
    "siglip/CLIP-ViT-SO400M-14-384": "ViT-SO400M-14-SigLIP-384",
    "openai/clip-vit-large-patch14-336": "clip-vit-large-patch14-336",
    "facebook/dinov2-giant-res378": "dinov2-giant",
    "clip-convnext-XXL-multi-stage": "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
}
LLMS = {
    "8b": dict(
        name="Meta-Llama-3-8B-Instruct",
        learning_rate=4e-5,
        batch_size=512,
        sampler_layers=(10, 3),  # how many, and from each to the next
        config=dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)
        | dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0),
    ),
    "13b": dict(
        name="vicuna-13b-v1.5",
        learning_rate=4e-5,
        batch_size=512,
        sampler_layers=(10, 4),
        config=dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824)
        | dict(num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096, rope_theta=10000.0),
    ),
    "34b": dict(
        name="Nous-Hermes-2-Yi-34B",
        learning_rate=2e-5,
        batch_size=1024,
        sampler_layers=(9, 7),
        config=dict(hidden_size=7168, num_hidden_layers=60, num_attention_heads=56, intermediate_size=20480)
        | dict(num_key_value_heads=8, vocab_size=64000, max_position_embeddings=4096, rope_theta=5000000.0),
    ),
}
SAMPLERS = r"connector/(query$|group_|llm_layers/)"


def get_config(arg=None):
    arg = parse_arg(arg, size=tuple(LLMS), tiny=False, weights="weights", data="data")
    llm = LLMS[arg.size]
    given = checkpoint(llm)
    model = cambrian.configure(given, Path())
    llm_path = f"{arg.weights}/{llm['name']}"
    align = dict(
        name="align",
        trainable=("connector/.*",),
        data=dict(sources=[source(arg.data, "alignment_2.5m")]),
        optimizer=dict(learning_rate=1e-3, learning_rate_scales=[(SAMPLERS, 0.1)], clip_norm=1.0, warmup_ratio=0.06),
        batch_size=512,
        epochs=1.0,
    )
    instruct = dict(
        name="instruct",
        trainable=("connector/.*", "llm/.*"),
        data=dict(sources=[source(arg.data, "Cambrian7M_withsystemprompt")]),
        optimizer=dict(learning_rate=llm["learning_rate"], clip_norm=1.0, warmup_ratio=0.03),
        batch_size=llm["batch_size"],
        epochs=1.0,
    )
    config = dict(
        name=f"cambrian-{arg.size}",
        description=__doc__.splitlines()[0],
        model=to_dict(model),
        init=dict(vision=",".join(f"{arg.weights}/{folder}" for folder in TOWERS.values()), llm=llm_path),
        prompt=dict(tokenizer=llm_path, **cambrian.prompt(given, Path())),
        stages=[align, instruct],
    )
    return complete(toy(config, model) if arg.tiny else config)


def checkpoint(llm):
    """What the config.json of a released checkpoint says of the model."""
    count, stride = llm["sampler_layers"]
    return dict(
        model_type="cambrian_llama",
        rms_norm_eps=1e-5,
        **llm["config"],
        mm_projector_type="sva",
        mm_vision_tower_aux_list=list(TOWERS),
        mm_vision_tower_aux_token_len_list=[576, 576, 576, 9216],
        image_token_len=576,
        num_query_group=1,
        query_num_list=[576],
        vision_hidden_size=1024,
        connector_depth=3,
        connector_only=False,
        num_of_vision_sampler_layers=count,
        stride_of_vision_sampler_layers=stride,
        tokenizer_model_max_length=2048,
    )


def source(data, name):
    return dict(name=name, path=f"{data}/{name}.jsonl", images=data)


def toy(config, model):
    """The recipe on a toy: two of the towers, the aggregators and the decoder shrunk, and a schedule that suits them."""
    vit = dict(image_size=28, patch_size=7, width=32, depth=2, num_heads=4, mlp_dim=64, resized_grid=0)
    convnext = dict(image_size=64, stage_depths=(1, 1, 1, 1), stage_widths=(8, 16, 24, 32), resized_grid=16)
    siglip, _, _, last = model.vision.towers
    towers = replace(siglip, **vit), replace(last, **convnext)
    sva = replace(model.connector.sva, width=32, num_heads=4, depth=1, grid=4, llm_layers=(0,))
    llm = dict(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
    model = replace(
        model,
        vision=replace(model.vision, towers=towers),
        connector=replace(model.connector, sva=sva),
        llm=replace(model.llm, **llm),
        dtype="float32",
        remat="none",
    )
    for one, learning_rate, steps in zip(config["stages"], (1e-2, 2e-3), (10, 150), strict=True):
        one["data"]["sources"] = [dict(name="toy", path=f"asset:toy/{one['name']}.json", images="asset:toy/images")]
        one["optimizer"] |= dict(learning_rate=learning_rate)
        one |= dict(batch_size=8, steps=steps, cache_features=True)
        one.pop("epochs")
    # The toy's tokenizer has none of the special tokens of Llama 3 or ChatML.
    prompt = config["prompt"] | dict(tokenizer="asset:toy", template="vicuna_v1", length=128)
    evaluation = dict(task="vqa", path="asset:toy/test.jsonl", images="asset:toy/images", max_new_tokens=6)
    evaluation |= dict(limits=[("left", 24), ("right", 12)], batch_size=12)
    config |= dict(
        name=f"{config['name']}-tiny", expected="a minute or two", model=to_dict(model), prompt=prompt, init=dict()
    )
    return config | dict(eval=evaluation)
