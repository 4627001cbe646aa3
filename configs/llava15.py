"""LLaVA-1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"): the recipe of its training scripts.

  python -m jaxvlm.main --config configs/llava15.py:llm=vicuna-7b,weights=/path/weights,data=/path/data --workdir runs/llava15

`weights` holds `clip-vit-large-patch14-336/` and `vicuna-7b-v1.5/` (or `vicuna-13b-v1.5/`) as Hugging Face folders with
safetensors and a tokenizer.json. `data` is laid out as LLaVA's README says: `LLaVA-Pretrain/blip_laion_cc_sbu_558k.json` with
`LLaVA-Pretrain/images/`, and `llava_v1_5_mix665k.json` with `coco/ gqa/ ocr_vqa/ textvqa/ vg/`.

Arguments: `llm=vicuna-13b`, `lora` (r 128), `pretrain_only` (stage 1 alone), `tiny` (the same recipe on a model of toy size,
randomly initialised; for tests). For stage 2: `row=0` to `row=9`, a row of the paper's Table 2 (8 is the recipe, 9 is 13B);
`subset=0.5`, a seeded half of the records; `text_only=false`, no ShareGPT; `extra=a.json+b.json`, further LLaVA files in `data`
(LVIS-Instruct-4V and LRV, as Prismatic's scripts convert them).

Settings are those of scripts/v1_5/{pretrain,finetune,finetune_lora}.sh: AdamW without weight decay or gradient clipping, cosine
with 3 % warm-up, one epoch of 558K captions at batch 256 (learning rate 1e-3, centre crop), one of the 665K mixture at batch 128
(2e-5, padded to square).

Expect the published numbers of LLaVA-1.5 (VQAv2 78.5, GQA 62.0, POPE 85.9 for 7B). This project has not run the full
recipe yet: its parity with the reference is tested on small models.
"""

from jaxvlm.config_files import complete, parse_arg

LLMS = {
    "vicuna-7b": dict(width=4096, depth=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008),
    "vicuna-13b": dict(width=5120, depth=40, num_heads=40, num_kv_heads=40, head_dim=128, mlp_dim=13824),
}
CLIP_L = dict(patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096)
# What the rows of Table 2 add to the data. Format prompts come with row 2, the MLP with 3, 336 pixels with 6, 13B with 9.
ADDED = {
    0: ("llava",),
    1: ("vqav2",),
    4: ("okvqa", "aokvqa", "ocrvqa", "textcaps"),
    5: ("refcoco", "vg"),
    7: ("gqa",),
    8: ("sharegpt",),
}
TINY_LLM = dict(width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
TINY_CLIP = dict(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)


def get_config(arg=None):
    arg = parse_arg(
        arg,
        llm=tuple(LLMS),
        lora=False,
        pretrain_only=False,
        tiny=False,
        weights="weights",
        data="data",
        row=(8, 0, 1, 2, 3, 4, 5, 6, 7, 9),
        subset=1.0,
        text_only=True,
        extra="",
    )
    if arg.row == 9:
        arg.llm = "vicuna-13b"
    kept = [name for row, names in ADDED.items() for name in names if row <= arg.row] if arg.row < 8 else []
    mixture = dict(
        name="llava_v1_5_mix665k",
        path=f"{arg.data}/llava_v1_5_mix665k.json",
        images=arg.data,
        mix="llava_v1_5_mix665k",
        keep=kept,
        format_prompts=arg.row >= 2,
    )
    extra = [
        dict(name=name.split(".")[0], path=f"{arg.data}/{name}", images=arg.data)
        for name in arg.extra.split("+")
        if name
    ]
    lora = dict(rank=128, alpha=256.0, dropout=0.05) if arg.lora else {}
    llm = TINY_LLM if arg.tiny else LLMS[arg.llm]
    llm_path = f"{arg.weights}/{arg.llm}-v1.5"
    tower = f"clip-vit-large-patch14{'-336' if arg.row >= 6 else ''}"

    align = dict(
        name="align",
        trainable=("connector/.*",),
        data=dict(
            sources=[
                dict(
                    name="blip_laion_cc_sbu_558k",
                    path=f"{arg.data}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                    images=f"{arg.data}/LLaVA-Pretrain/images",
                )
            ],
            template="plain",
            transform="crop",
        ),
        optimizer=dict(learning_rate=1e-3),
        batch_size=4 if arg.tiny else 256,
        epochs=1.0,
    )
    instruct = dict(
        name="instruct",
        trainable=("connector/.*", "llm/.*lora_.*" if arg.lora else "llm/.*"),
        data=dict(
            sources=[dict(fraction=arg.subset, text_only=arg.text_only, **source) for source in (mixture, *extra)],
        ),
        optimizer=dict(learning_rate=2e-4, learning_rate_scales=[("connector/.*", 0.1)])
        if arg.lora
        else dict(learning_rate=2e-5),
        batch_size=4 if arg.tiny else 128,
        epochs=1.0,
    )
    return complete(
        dict(
            name=f"llava15-{'tiny' if arg.tiny else arg.llm}{'-lora' if arg.lora else ''}",
            description=__doc__.splitlines()[0],
            model=dict(
                vision=TINY_CLIP if arg.tiny else dict(image_size=336 if arg.row >= 6 else 224, **CLIP_L),
                connector=dict(kind="mlp2x_gelu" if arg.row >= 3 else "linear"),
                llm=dict(vocab_size=32000, lora=lora, **llm),
                dtype="float32" if arg.tiny else "bfloat16",
            ),
            init=dict() if arg.tiny else dict(vision=f"{arg.weights}/{tower}", llm=llm_path),
            prompt=dict(
                tokenizer=llm_path,
                template="vicuna_v1",
                transform="letterbox",
                length=256 if arg.tiny else 2048,
            ),
            stages=[align] if arg.pretrain_only else [align, instruct],
        )
    )
