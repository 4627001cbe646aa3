"""The toy world of `jaxvlm.data.assets.toy`, with a model and a run small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

from jaxvlm.config import (
    ConnectorConfig,
    DataConfig,
    EvalConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)


def model_config(**changes) -> ModelConfig:
    """CLIP-shaped tower of 4 tokens and a Llama-shaped decoder, float32."""
    lora = LoRAConfig(rank=changes.pop("lora", 0), alpha=8.0)
    vision = VisionConfig(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)
    llm = LLMConfig(vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128, lora=lora)
    values = dict(vision=vision, connector=ConnectorConfig(), llm=llm, dtype="float32", remat="none")
    return ModelConfig(**(values | changes))


def run_config(data: Path, tokenizer: Path, **changes) -> RunConfig:
    """Two stages of a few steps and an evaluation."""

    def stage(name, trainable, file, template, steps, lr):
        source = SourceConfig(name=name, path=str(data / file), images=str(data / "images"))
        return StageConfig(
            name=name,
            trainable=trainable,
            data=DataConfig(sources=(source,), template=template, packing=True, tiles_per_row=3, length=128),
            optimizer=OptimizerConfig(learning_rate=lr),
            batch_size=8,  # the tests' simulated devices
            steps=steps,
        )

    values = dict(
        name="tiny",
        model=model_config(),
        prompt=PromptConfig(tokenizer=str(tokenizer), template="vicuna_v1", transform="naive", length=128),
        stages=(
            stage("align", ("connector/.*",), "align.json", "plain", 4, 1e-2),
            stage("instruct", ("connector/.*", "llm/.*"), "instruct.json", None, 6, 3e-3),
        ),
        eval=EvalConfig(
            task="vqa",
            path=str(data / "test.jsonl"),
            images=str(data / "images"),
            limits=(("left", 8), ("right", 4)),
            batch_size=4,
            max_new_tokens=4,
            samples=6,
        ),
    )
    return RunConfig(**(values | changes))


def saved_engine(folder: Path):
    """(an engine of random weights, saved as folder/toy; the paths of some pictures)."""
    import hf_copy

    from jaxvlm.data.assets import toy
    from jaxvlm.infer.engine import Engine
    from jaxvlm.weights.saved import save_model

    tokenizer, data = toy.write_tokenizer(folder / "tokenizer"), toy.write_dataset(folder / "data", count=6)
    config = model_config()
    prompt = PromptConfig(tokenizer=str(tokenizer), template="vicuna_v1", transform="naive")
    engine = Engine(config, prompt, hf_copy.random_params(config))
    save_model(folder / "toy" / "model", engine.params, engine.config, prompt, {})
    return engine, sorted((data / "images").iterdir())
