"""Prismatic VLMs (Karamcheti et al. 2024, "Investigating the Design Space of Visually-Conditioned Language Models").

  python -m jaxvlm.main --config configs/prismatic.py:model=prism-dinosiglip+7b,weights=/weights,data=/data --workdir runs/prism

`model` is one of the paper's 49 registered models (below); every other argument changes it, or the single-stage base
`one-stage+7b` without it: `vision`, `llm`, `resize` (resize-naive, resize-crop, letterbox), `mix` (which instruction data),
`two_stage` (captions first), `train_vision`, `epochs`, `steps` (in their place). `tiny` is the same recipe on a randomly
initialised toy and its pictures, trained and evaluated in about a minute on a CPU; it fits every language model but phi-2:

  python -m jaxvlm.main --config configs/prismatic.py:model=prism-dinosiglip+7b,tiny --workdir runs/prism-tiny

`weights` holds the folders that TOWERS and LLMS name, in Hugging Face's or timm's form, `data` the files as Prismatic's own
preprocessing lays them out (`download/llava-v1.5-instruct/`, `download/llava-laion-cc-sbu-558k/`).

Settings are those of its conf/models.py: AdamW, batch 128 and 2e-5 (captions: 256 and 1e-3), cosine after 3 % warm-up, gradients
clipped at 1.0, text cut at 2048 tokens before the patches are put in. Its nominal weight decay of 0.1 never reached a parameter
(FSDP had flattened them when the groups were made), so it is 0 here. The vocabulary is not padded to a multiple of 64.

Expect the paper's numbers (one-stage+7b: VQAv2 77.1, RefCOCO 64.1; prism-dinosiglip+7b: 81.0 and 77.8). This project has not run
the full recipe yet: its parts are tested against torch on small models.
"""

from jaxvlm.config_files import complete, parse_arg

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LARGE = dict(width=1024, depth=24, num_heads=16, mlp_dim=4096)
TIMM = dict(activation="gelu_erf", norm_eps=1e-6, patch_bias=True, pre_norm=False)  # SigLIP ran with this GELU too
CLIP = dict(patch_size=14, **LARGE)
SIGLIP = dict(patch_size=14, width=1152, depth=27, num_heads=16, mlp_dim=4304, class_token=False, **TIMM, **HALF)
DINO = dict(patch_size=14, num_registers=4, layer_scale=True, **LARGE, **TIMM, **IMAGENET)
DINO_FOLDER = "vit_large_patch14_reg4_dinov2.lvd142m"  # timm's, whose way of resizing positions Prismatic has
IN1K = dict(patch_size=16, **LARGE, **TIMM, **HALF)
# Pixels on a side, and the towers in the order of their channels: the folder under `weights`, and what it holds.
TOWERS = {
    "clip-vit-l-336px": (336, ("clip-vit-large-patch14-336", CLIP)),
    "clip-vit-l": (224, ("clip-vit-large-patch14", CLIP)),
    "siglip-vit-so400m": (224, ("siglip-so400m-patch14-224", SIGLIP)),
    "siglip-vit-so400m-384px": (384, ("siglip-so400m-patch14-384", SIGLIP)),
    "dinov2-vit-l": (224, (DINO_FOLDER, DINO)),
    "in1k-vit-l": (224, ("vit_large_patch16_224.augreg_in21k_ft_in1k", IN1K)),
    # This CLIP ran with a GELU that is not its own.
    "dinoclip-vit-l-336px": (
        336,
        (DINO_FOLDER, DINO),
        ("clip-vit-large-patch14-336", CLIP | dict(activation="gelu_erf")),
    ),
    "dinosiglip-vit-so-224px": (224, (DINO_FOLDER, DINO), ("siglip-so400m-patch14-224", SIGLIP)),
    "dinosiglip-vit-so-384px": (384, (DINO_FOLDER, DINO), ("siglip-so400m-patch14-384", SIGLIP)),
}
LLAMA_7B = dict(width=4096, depth=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008)
LLAMA_13B = dict(width=5120, depth=40, num_heads=40, num_kv_heads=40, head_dim=128, mlp_dim=13824)
MISTRAL = LLAMA_7B | dict(num_kv_heads=8, mlp_dim=14336, sliding_window=4096, max_positions=32768)
PHI_2 = dict(vocab_size=51200, width=2560, depth=32, num_heads=32, num_kv_heads=32, head_dim=80, mlp_dim=10240)
PHI_2 |= dict(norm="layer", parallel=True, activation="gelu_tanh", gated=False, rope_fraction=0.4, max_positions=2048)
PHI_2 |= dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)
LLMS = {  # the folder under `weights`, what it holds, and the template that it is trained with
    "vicuna-v15-7b": ("vicuna-7b-v1.5", LLAMA_7B, "vicuna_v1"),
    "vicuna-v15-13b": ("vicuna-13b-v1.5", LLAMA_13B, "vicuna_v1"),
    "llama2-7b-pure": ("Llama-2-7b-hf", LLAMA_7B, "prism"),
    "llama2-13b-pure": ("Llama-2-13b-hf", LLAMA_13B, "prism"),
    "llama2-7b-chat": ("Llama-2-7b-chat-hf", LLAMA_7B, "prism_llama_2"),
    "llama2-13b-chat": ("Llama-2-13b-chat-hf", LLAMA_13B, "prism_llama_2"),
    "mistral-v0.1-7b-pure": ("Mistral-7B-v0.1", MISTRAL, "prism"),
    "mistral-v0.1-7b-instruct": ("Mistral-7B-Instruct-v0.1", MISTRAL, "prism_mistral"),
    "phi-2-3b": ("phi-2", PHI_2, "prism_phi"),
}
TRANSFORMS = {"letterbox": "letterbox", "resize-naive": "naive", "resize-crop": "crop"}
MIXES = {
    "llava-v15": "llava_v1_5_mix665k",
    "llava-multimodal": "llava_v1_5_stripped625k",
    "llava-lvis4v": "llava_v1_5_lvis4v_mix888k",
    "llava-lrv": "llava_v1_5_lrv_mix1008k",
    "llava-lvis4v-lrv": "llava_v1_5_lvis4v_lrv_mix1231k",
}

SIGLIP_384, DINOCLIP = "vision=siglip-vit-so400m-384px", "vision=dinoclip-vit-l-336px"
DINOSIGLIP, DINOSIGLIP_224 = "vision=dinosiglip-vit-so-384px", "vision=dinosiglip-vit-so-224px"
PRISM_7B, PRISM_13B = ("llm=llama2-7b-pure,resize=resize-naive", "llm=llama2-13b-pure,resize=resize-naive")
FULL = "mix=llava-lvis4v-lrv,epochs=2"
MODELS = {  # what each changes of the single-stage base, as arguments
    "one-stage+7b": "",
    "one-stage+13b": "llm=vicuna-v15-13b",
    "reproduction-llava-v15+7b": "two_stage",
    "reproduction-llava-v15+13b": "two_stage,llm=vicuna-v15-13b",
    "full-ft-multi-stage+7b": "two_stage,train_vision",
    "full-ft-one-stage+7b": "train_vision",
    "in1k-224px+7b": "vision=in1k-vit-l",
    "dinov2-224px+7b": "vision=dinov2-vit-l",
    "clip-224px+7b": "vision=clip-vit-l",
    "siglip-224px+7b": "vision=siglip-vit-so400m",
    "clip-336px-resize-crop+7b": "resize=resize-crop",
    "clip-336px-resize-naive+7b": "resize=resize-naive",
    "siglip-384px-letterbox+7b": SIGLIP_384,
    "siglip-384px-resize-crop+7b": f"{SIGLIP_384},resize=resize-crop",
    "siglip-384px-resize-naive+7b": f"{SIGLIP_384},resize=resize-naive",
    "dinoclip-336px-letterbox+7b": DINOCLIP,
    "dinoclip-336px-resize-naive+7b": f"{DINOCLIP},resize=resize-naive",
    "dinosiglip-384px-letterbox+7b": DINOSIGLIP,
    "dinosiglip-384px-resize-naive+7b": f"{DINOSIGLIP},resize=resize-naive",
    "llama2+7b": "llm=llama2-7b-pure",
    "llama2+13b": "llm=llama2-13b-pure",
    "llama2-chat+7b": "llm=llama2-7b-chat",
    "llama2-chat+13b": "llm=llama2-13b-chat",
    "mistral-v0.1+7b": "llm=mistral-v0.1-7b-pure",
    "mistral-instruct-v0.1+7b": "llm=mistral-v0.1-7b-instruct",
    "phi-2+3b": "llm=phi-2-3b",
    "vicuna-no-cotraining+7b": "mix=llava-multimodal",
    "llama2-no-cotraining+7b": "llm=llama2-7b-pure,mix=llava-multimodal",
    "train-1.25-epochs+7b": "steps=6500",
    "train-1.5-epochs+7b": "steps=7800",
    "train-2-epochs+7b": "epochs=2",
    "train-3-epochs+7b": "epochs=3",
    "llava-lvis4v+7b": "mix=llava-lvis4v",
    "llava-lrv+7b": "mix=llava-lrv",
    "llava-lvis4v-lrv+7b": "mix=llava-lvis4v-lrv",
    "prism-clip-controlled+7b": PRISM_7B,
    "prism-clip-controlled+13b": PRISM_13B,
    "prism-clip+7b": f"{PRISM_7B},{FULL}",
    "prism-clip+13b": f"{PRISM_13B},{FULL}",
    "prism-siglip-controlled+7b": f"{SIGLIP_384},{PRISM_7B}",
    "prism-siglip-controlled+13b": f"{SIGLIP_384},{PRISM_13B}",
    "prism-siglip+7b": f"{SIGLIP_384},{PRISM_7B},{FULL}",
    "prism-siglip+13b": f"{SIGLIP_384},{PRISM_13B},{FULL}",  # its entry names a CLIP, by mistake
    "prism-dinosiglip-controlled+7b": f"{DINOSIGLIP},{PRISM_7B}",
    "prism-dinosiglip-controlled+13b": f"{DINOSIGLIP},{PRISM_13B}",
    "prism-dinosiglip+7b": f"{DINOSIGLIP},{PRISM_7B},{FULL}",
    "prism-dinosiglip+13b": f"{DINOSIGLIP},{PRISM_13B},{FULL}",
    "prism-dinosiglip-224px-controlled+7b": f"{DINOSIGLIP_224},{PRISM_7B}",
    "prism-dinosiglip-224px+7b": f"{DINOSIGLIP_224},{PRISM_7B},{FULL}",
}
ARGUMENTS = dict(
    model=tuple(MODELS),
    vision=tuple(TOWERS),
    llm=tuple(LLMS),
    resize=tuple(TRANSFORMS),
    mix=tuple(MIXES),
    two_stage=False,
    train_vision=False,
    epochs=1.0,
    steps=0,
    tiny=False,
    weights="weights",
    data="data",
)


def get_config(arg=None):
    base = MODELS[parse_arg(arg, **ARGUMENTS).model]
    arg = parse_arg(f"{base},{arg or ''}", **ARGUMENTS)  # what is given comes last, and counts
    size, *towers = TOWERS[arg.vision]
    llm_folder, llm, template = LLMS[arg.llm]
    llm_path = f"{arg.weights}/{llm_folder}"
    vision = [tower | dict(image_size=size) for _, tower in towers]
    instruct = stage(
        "instruct",
        ("connector/.*", "llm/.*", *["vision/.*"] * arg.train_vision),
        f"{arg.data}/download/llava-v1.5-instruct",
        MIXES[arg.mix],
        learning_rate=2e-5,
        batch_size=128,
    )
    instruct |= dict(steps=arg.steps) if arg.steps else dict(epochs=arg.epochs)
    captions = f"{arg.data}/download/llava-laion-cc-sbu-558k"
    align = stage("align", ("connector/.*",), captions, "chat", learning_rate=1e-3, batch_size=256)
    align["data"]["template"] = "plain_eos"
    align["epochs"] = 1.0
    config = dict(
        name=f"prismatic-{arg.model}",
        description=__doc__.splitlines()[0],
        seed=7,
        model=dict(
            vision=dict(kind="fused", towers=vision) if len(vision) > 1 else vision[0],
            connector=dict(kind="fused_mlp" if len(vision) > 1 else "mlp2x_gelu"),
            llm=llm,
        ),
        init=dict(vision=",".join(f"{arg.weights}/{folder}" for folder, _ in towers), llm=llm_path),
        prompt=dict(
            tokenizer=llm_path,
            template=template,
            transform=TRANSFORMS[arg.resize],
            layout="prismatic",
            length=2048 + (size // vision[0]["patch_size"]) ** 2,
            truncation="before_splice",
        ),
        stages=[align, instruct] if arg.two_stage else [instruct],
    )
    return complete(toy(config, vision) if arg.tiny else config)


def stage(name, trainable, folder, file, learning_rate, batch_size):
    return dict(
        name=name,
        trainable=trainable,
        data=dict(sources=[dict(name=file, path=f"{folder}/{file}.json", images=folder)]),
        optimizer=dict(learning_rate=learning_rate, clip_norm=1.0, warmup_ratio=0.03, warmup_rounding="floor"),
        batch_size=batch_size,
    )


def toy(config, vision):
    """The recipe on a toy: every tower and the language model shrunk, learning rates and steps that suit them."""
    size = dict(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)
    towers = [tower | size for tower in vision]
    llm = dict(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
    config["model"] |= dict(
        vision=dict(kind="fused", towers=towers) if len(towers) > 1 else towers[0],
        llm=config["model"]["llm"] | llm,
        dtype="float32",
        remat="none",
    )
    for one in config["stages"]:
        one["data"]["sources"] = [dict(name="toy", path=f"asset:toy/{one['name']}.json", images="asset:toy/images")]
        one["optimizer"] |= dict(learning_rate=1e-2 if one["name"] == "align" else 3e-3)
        one |= dict(batch_size=8, steps=20 if one["name"] == "align" else 150)
        one.pop("epochs", None)
    config["prompt"] |= dict(tokenizer="asset:toy", length=128 + 4)
    config["eval"] = dict(task="vqa", path="asset:toy/test.jsonl", images="asset:toy/images", max_new_tokens=6)
    config["eval"] |= dict(limits=[("left", 24), ("right", 12)], batch_size=12)
    return config | dict(name=f"{config['name']}-tiny", expected="about a minute", init=dict())
