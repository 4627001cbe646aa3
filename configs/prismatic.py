"""Prismatic VLMs (Karamcheti et al. 2024, "Investigating the Design Space of Visually-Conditioned Language Models").

  python -m jaxvlm.main --config configs/prismatic.py:model=prism-dinosiglip+7b,weights=/path/weights,data=/path/data \
      --workdir runs/prism

`model` is one of the paper's 49 registered models (below); every other argument changes it, or the single-stage base
`one-stage+7b` without it: `vision`, `llm`, `resize` (resize-naive, resize-crop, letterbox), `mix` (which instruction data),
`two_stage` (captions first), `train_vision`, `epochs`, `steps` (in their place). `tiny` is the same recipe on a randomly
initialised toy and its pictures, trained and evaluated in about a minute on a CPU; it fits every language model but phi-2:

  python -m jaxvlm.main --config configs/prismatic.py:model=prism-dinosiglip+7b,tiny --workdir runs/prism-tiny

`weights` holds the towers and language models as FOLDERS and Hugging Face name them, `data` the files as Prismatic's own
preprocessing lays them out (`download/llava-v1.5-instruct/`, `download/llava-laion-cc-sbu-558k/`).

Settings are those of its conf/models.py: AdamW, batch 128 and 2e-5 (captions: 256 and 1e-3), cosine after 3 % warm-up, gradients
clipped at 1.0, text cut at 2048 tokens before the patches are put in. Its nominal weight decay of 0.1 never reached a parameter
(FSDP had flattened them when the groups were made), so it is 0 here. The vocabulary is not padded to a multiple of 64.

Expect the paper's numbers (one-stage+7b: VQAv2 77.1, RefCOCO 64.1; prism-dinosiglip+7b: 81.0 and 77.8). This project has not run
the full recipe yet: its parts are tested against torch on small models.
"""

from dataclasses import replace
from pathlib import Path

from jaxvlm.config import to_dict
from jaxvlm.config_files import complete, parse_arg
from jaxvlm.weights.families import prismatic

DINO = "vit_large_patch14_reg4_dinov2.lvd142m"  # timm's, whose way of resizing positions Prismatic has
FOLDERS = {
    "clip-vit-l-336px": ("clip-vit-large-patch14-336",),
    "clip-vit-l": ("clip-vit-large-patch14",),
    "siglip-vit-so400m": ("siglip-so400m-patch14-224",),
    "siglip-vit-so400m-384px": ("siglip-so400m-patch14-384",),
    "dinov2-vit-l": (DINO,),
    "in1k-vit-l": ("vit_large_patch16_224.augreg_in21k_ft_in1k",),
    "dinoclip-vit-l-336px": (DINO, "clip-vit-large-patch14-336"),
    "dinosiglip-vit-so-224px": (DINO, "siglip-so400m-patch14-224"),
    "dinosiglip-vit-so-384px": (DINO, "siglip-so400m-patch14-384"),
}
LLMS = ("vicuna-v15-7b", *(name for name in prismatic.LLMS if name != "vicuna-v15-7b"))
RESIZE = ("letterbox", "resize-naive", "resize-crop")
MIXES = {
    "llava-v15": "llava_v1_5_mix665k",
    "llava-multimodal": "llava_v1_5_stripped625k",
    "llava-lvis4v": "llava_v1_5_lvis4v_mix888k",
    "llava-lrv": "llava_v1_5_lrv_mix1008k",
    "llava-lvis4v-lrv": "llava_v1_5_lvis4v_lrv_mix1231k",
}

SIGLIP, DINOCLIP = "vision=siglip-vit-so400m-384px", "vision=dinoclip-vit-l-336px"
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
    "siglip-384px-letterbox+7b": SIGLIP,
    "siglip-384px-resize-crop+7b": f"{SIGLIP},resize=resize-crop",
    "siglip-384px-resize-naive+7b": f"{SIGLIP},resize=resize-naive",
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
    "prism-siglip-controlled+7b": f"{SIGLIP},{PRISM_7B}",
    "prism-siglip-controlled+13b": f"{SIGLIP},{PRISM_13B}",
    "prism-siglip+7b": f"{SIGLIP},{PRISM_7B},{FULL}",
    "prism-siglip+13b": f"{SIGLIP},{PRISM_13B},{FULL}",  # its entry names a CLIP, by mistake
    "prism-dinosiglip-controlled+7b": f"{DINOSIGLIP},{PRISM_7B}",
    "prism-dinosiglip-controlled+13b": f"{DINOSIGLIP},{PRISM_13B}",
    "prism-dinosiglip+7b": f"{DINOSIGLIP},{PRISM_7B},{FULL}",
    "prism-dinosiglip+13b": f"{DINOSIGLIP},{PRISM_13B},{FULL}",
    "prism-dinosiglip-224px-controlled+7b": f"{DINOSIGLIP_224},{PRISM_7B}",
    "prism-dinosiglip-224px+7b": f"{DINOSIGLIP_224},{PRISM_7B},{FULL}",
}
ARGUMENTS = dict(
    model=tuple(MODELS),
    vision=tuple(FOLDERS),
    llm=LLMS,
    resize=RESIZE,
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
    model, prompt = architecture(arg)
    instruct = stage(
        "instruct",
        ("connector/.*", "llm/.*", *["vision/.*"] * arg.train_vision),
        "llava-v1.5-instruct",
        MIXES[arg.mix],
        learning_rate=2e-5,
        batch_size=128,
        arg=arg,
    )
    instruct |= dict(steps=arg.steps) if arg.steps else dict(epochs=arg.epochs)
    align = stage(
        "align", ("connector/.*",), "llava-laion-cc-sbu-558k", "chat", learning_rate=1e-3, batch_size=256, arg=arg
    )
    align["data"]["template"] = "plain_eos"
    align["epochs"] = 1.0
    llm = f"{arg.weights}/{prismatic.LLMS[arg.llm][0].partition('/')[2]}"
    config = dict(
        name=f"prismatic-{arg.model}",
        description=__doc__.splitlines()[0],
        seed=7,
        model=to_dict(model),
        init=dict(vision=",".join(f"{arg.weights}/{folder}" for folder in FOLDERS[arg.vision]), llm=llm),
        prompt=dict(tokenizer=llm, **prompt),
        stages=[align, instruct] if arg.two_stage else [instruct],
    )
    return complete(toy(config, model) if arg.tiny else config)


def architecture(arg):
    """The model, and what goes with it in `prompt`, as a checkpoint of Prismatic with these names would be read."""
    connector = "fused-gelu-mlp" if len(FOLDERS[arg.vision]) > 1 else "gelu-mlp"
    names = dict(vision_backbone_id=arg.vision, llm_backbone_id=arg.llm, arch_specifier=connector)
    # The first stage's language model is the original one.
    given = dict(model=dict(**names, image_resize_strategy=arg.resize, llm_max_length=2048), stage="align")
    return prismatic.configure(given, Path()), prismatic.prompt(given, Path())


def stage(name, trainable, folder, file, learning_rate, batch_size, arg):
    path = f"{arg.data}/download/{folder}"
    return dict(
        name=name,
        trainable=trainable,
        data=dict(sources=[dict(name=file, path=f"{path}/{file}.json", images=path)]),
        optimizer=dict(learning_rate=learning_rate, clip_norm=1.0, warmup_ratio=0.03, warmup_rounding="floor"),
        batch_size=batch_size,
    )


def toy(config, model):
    """The recipe on a toy: every tower and the language model shrunk, learning rates and steps that suit them."""
    size = dict(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)
    towers = tuple(replace(tower, **size) for tower in model.vision.parts)
    vision = replace(model.vision, towers=towers) if model.vision.kind == "fused" else towers[0]
    llm = dict(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
    model = replace(model, vision=vision, llm=replace(model.llm, **llm), dtype="float32", remat="none")
    for one in config["stages"]:
        one["data"]["sources"] = [dict(name="toy", path=f"asset:toy/{one['name']}.json", images="asset:toy/images")]
        one["optimizer"] |= dict(learning_rate=1e-2 if one["name"] == "align" else 3e-3)
        one |= dict(batch_size=8, steps=20 if one["name"] == "align" else 150)
        one.pop("epochs", None)
    prompt = config["prompt"] | dict(tokenizer="asset:toy", length=128 + model.tile_tokens)
    evaluation = dict(task="vqa", path="asset:toy/test.jsonl", images="asset:toy/images", max_new_tokens=6)
    evaluation |= dict(limits=[("left", 24), ("right", 12)], batch_size=12)
    config |= dict(
        name=f"{config['name']}-tiny", expected="about a minute", model=to_dict(model), prompt=prompt, init=dict()
    )
    return config | dict(eval=evaluation)
