"""Cambrian-1 (Tong et al. 2024, "A Fully Open, Vision-Centric Exploration of Multimodal LLMs"): the recipe of its scripts.

  python -m jaxvlm.main --config configs/cambrian.py:size=8b,weights=/path/weights,data=/path/data --workdir runs/cambrian

Four frozen towers, whose features an aggregator (SVA) joins to 24 x 24 tokens, and aggregators inside the decoder. Images are
letterboxed; the bars' tokens are left out and their cells hidden from the aggregators. Arguments: `size` (8b, 13b, 34b) and
`tiny`, the same recipe on a randomly initialised toy and its pictures, trained and evaluated in a minute or two on a CPU:

  python -m jaxvlm.main --config configs/cambrian.py:tiny --workdir runs/cambrian-tiny

`weights` holds the folders that TOWERS and LLMS name, `data` holds `alignment_2.5m.jsonl` and
`Cambrian7M_withsystemprompt.jsonl` with the images as these name them.

Settings are those of scripts/cambrian/{pretrain,finetune}_cambrian_*.sh: AdamW without weight decay, cosine, one epoch each; the
connector alone at 1e-3 (samplers and queries 1e-4) after 6 % warm-up, then also the language model at 4e-5 (34B: 2e-5) after
3 %. The paper's Table 23 says 2e-5 for all. Batches of 512 (34B: 1024 in the second stage) are the paper's; clipping at 1.0
is the trainer's default, which clips each shard by itself where this clips the whole gradient. Text-only records cost no pass
through the towers here.

Expect the paper's numbers (8B: MME 1547, GQA 64.6, CV-Bench 72.3 and 72.0). This project has not run the full recipe yet: its
parts are tested against torch on small models.
"""

from jaxvlm.config_files import complete, parse_arg

FINAL = dict(feature_layers=(-1,), feature_norm=True)  # the normed last layer, where CLIP gives the one before
TIMM = dict(activation="gelu_erf", norm_eps=1e-6, patch_bias=True, pre_norm=False)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
SIGLIP = dict(image_size=384, patch_size=14, width=1152, depth=27, num_heads=16, mlp_dim=4304, class_token=False)
SIGLIP |= dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fill=CLIP_MEAN, resized_grid=24, **TIMM, **FINAL)
CLIP = dict(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096)
DINO = dict(image_size=378, patch_size=14, width=1536, depth=40, num_heads=24, mlp_dim=4096, mlp="swiglu")
DINO |= dict(layer_scale=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resized_grid=24, **TIMM, **FINAL)
CONVNEXT = dict(kind="convnext", image_size=1024, patch_size=32, activation="gelu_erf", layer_scale=True)
CONVNEXT |= dict(stage_depths=(3, 4, 30, 3), stage_widths=(384, 768, 1536, 3072), feature_layers=(0, 1, 2, 3))
CONVNEXT |= dict(class_token=False, patch_bias=True, pre_norm=False, resized_grid=96)
TOWERS = {  # the folder under `weights`, and what it holds
    "ViT-SO400M-14-SigLIP-384": SIGLIP,
    "clip-vit-large-patch14-336": CLIP,
    "dinov2-giant": DINO,
    "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": CONVNEXT,
}
LLMS = {
    "8b": dict(
        folder="Meta-Llama-3-8B-Instruct",
        template="cambrian_llama_3",
        learning_rate=4e-5,
        batch_size=512,
        samplers=range(0, 30, 3),  # the layers with an aggregator behind them
        model=dict(width=4096, depth=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336)
        | dict(vocab_size=128256, max_positions=8192, rope_theta=500000.0),
    ),
    "13b": dict(
        folder="vicuna-13b-v1.5",
        template="vicuna_v1",
        learning_rate=4e-5,
        batch_size=512,
        samplers=range(0, 40, 4),
        model=dict(width=5120, depth=40, num_heads=40, num_kv_heads=40, head_dim=128, mlp_dim=13824),
    ),
    "34b": dict(
        folder="Nous-Hermes-2-Yi-34B",
        template="cambrian_chatml",
        learning_rate=2e-5,
        batch_size=1024,
        samplers=range(0, 63, 7),
        model=dict(width=7168, depth=60, num_heads=56, num_kv_heads=8, head_dim=128, mlp_dim=20480)
        | dict(vocab_size=64000, rope_theta=5000000.0),
    ),
}
SAMPLERS = r"connector/(query$|group_|llm_layers/)"


def get_config(arg=None):
    arg = parse_arg(arg, size=tuple(LLMS), tiny=False, weights="weights", data="data")
    llm = LLMS[arg.size]
    llm_path = f"{arg.weights}/{llm['folder']}"
    sva = dict(width=1024, num_heads=16, depth=3, grid=24, llm_layers=tuple(llm["samplers"]))
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
        model=dict(
            vision=dict(kind="fused", towers=list(TOWERS.values())),
            connector=dict(kind="sva", row_end=True, sva=sva),
            llm=llm["model"],
        ),
        init=dict(vision=",".join(f"{arg.weights}/{folder}" for folder in TOWERS), llm=llm_path),
        prompt=dict(tokenizer=llm_path, template=llm["template"], transform="letterbox_unpad", length=2048),
        stages=[align, instruct],
    )
    return complete(toy(config) if arg.tiny else config)


def source(data, name):
    return dict(name=name, path=f"{data}/{name}.jsonl", images=data)


def toy(config):
    """The recipe on a toy: two of the towers, the aggregators and the decoder shrunk, and a schedule that suits them."""
    vit = dict(image_size=28, patch_size=7, width=32, depth=2, num_heads=4, mlp_dim=64, resized_grid=0)
    convnext = dict(image_size=64, stage_depths=(1, 1, 1, 1), stage_widths=(8, 16, 24, 32), resized_grid=16)
    sva = dict(width=32, num_heads=4, depth=1, grid=4, llm_layers=(0,))
    llm = dict(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
    config["model"] |= dict(
        vision=dict(kind="fused", towers=[SIGLIP | vit, CONVNEXT | convnext]),
        connector=dict(kind="sva", row_end=True, sva=sva),
        llm=config["model"]["llm"] | llm,
        dtype="float32",
        remat="none",
    )
    for one, learning_rate, steps in zip(config["stages"], (1e-2, 2e-3), (10, 150), strict=True):
        one["data"]["sources"] = [dict(name="toy", path=f"asset:toy/{one['name']}.json", images="asset:toy/images")]
        one["optimizer"] |= dict(learning_rate=learning_rate)
        one |= dict(batch_size=8, steps=steps, cache_features=True)
        one.pop("epochs")
    # The toy's tokenizer has none of the special tokens of Llama 3 or ChatML.
    config["prompt"] |= dict(tokenizer="asset:toy", template="vicuna_v1", length=128)
    config["eval"] = dict(task="vqa", path="asset:toy/test.jsonl", images="asset:toy/images", max_new_tokens=6)
    config["eval"] |= dict(limits=[("left", 24), ("right", 12)], batch_size=12)
    return config | dict(name=f"{config['name']}-tiny", expected="a minute or two", init=dict())
