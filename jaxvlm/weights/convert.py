"""`jaxvlm import`: any checkpoint to a model folder of our own, or nothing at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxvlm.weights.hf_config import read_json
from jaxvlm.weights.importer import Opened, open_model, open_parts, planned, read_model
from jaxvlm.weights.plan import ImportReport
from jaxvlm.weights.readers import WeightsError
from jaxvlm.weights.saved import load_model, new_folder, run_folder, save_model


def convert(
    path: str,
    out: str,
    *,
    vision: str = "",
    llm: str = "",
    connector: str = "",
    base: str = "",
    merge: bool = False,
    tokenizer: str = "",
    template: str = "",
    dtype: str = "",
    seed: int = 0,
    dry_run: bool = False,
) -> ImportReport:
    """Reads the model at `path`, or a new one of the parts if that is '', and saves it to `out`.

    `vision`, `llm`, `base` and `merge` are those of `importer.open_model`, `connector` a projector for the parts; the
    tokenizer and the conversation template replace what the checkpoint says; `dtype` '' keeps the files' precision.
    With `dry_run` no tensor is read and nothing is written. Raises `WeightsError` or `CheckpointError`.
    """
    report = ImportReport()
    try:
        if path and run_folder(Path(path).expanduser()):
            return _copy_run(path, out, dtype, dry_run)
        if path:
            opened = open_model(path, vision=vision, llm=llm, base=base, merge=merge, report=report)
        else:
            opened = open_parts(vision, llm, connector, report)
        changes = {"tokenizer": tokenizer, "template": template}
        prompt = dataclasses.replace(opened.prompt, **{key: value for key, value in changes.items() if value})
        opened = opened._replace(prompt=prompt)
        planned(opened.pieces, report)
    finally:  # the table says most where something is wrong
        if dry_run and report.path:
            print(report.table())
    check_tokenizer(opened)
    if not dry_run:
        with new_folder(Path(out)) as folder:
            params = read_model(opened, dtype=dtype or None, seed=seed)
            notes = {"name": Path(path or llm).name, "source": report.path}
            save_model(folder, params, opened.config, opened.prompt, notes)
    return report


def _copy_run(path: str, out: str, dtype: str, dry_run: bool) -> ImportReport:
    """A run's model in another precision or place."""
    report = ImportReport(str(path), notes=["a model saved by jaxvlm"])
    if not dry_run:
        with new_folder(Path(out)) as folder:
            params, model, prompt, manifest = load_model(Path(path), dtype=dtype or None)
            save_model(folder, params, model, prompt, {"name": manifest.get("name", Path(path).name)})
    return report


def check_tokenizer(opened: Opened) -> None:
    """Raises `WeightsError` if the model has no tokenizer.json, or one whose ids it does not know."""
    if (reader := opened.prompt.qformer_tokenizer) and not Path(reader).is_dir():
        raise WeightsError(
            f"{reader} does not exist, without which the Q-Former cannot read the instruction. Take the folder "
            "'qformer_tokenizer' from the model's page and put it beside the weights."
        )
    file = Path(opened.prompt.tokenizer).expanduser() / "tokenizer.json"
    if not file.is_file():
        older = file.with_name("tokenizer.model").is_file()
        make = (
            " It has an older tokenizer.model; where transformers is installed, make the file from it once: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
        raise WeightsError(
            f"{file.parent} has no tokenizer.json, without which the model cannot be prompted. Give the folder of one: "
            f"--tokenizer FOLDER.{make * older}"
        )
    values, size = read_json(file), opened.config.llm.vocab_size
    try:
        vocab = values["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in values.get("added_tokens", [])]
        last = max(ids) + 0
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file} is not a tokenizer that can be read ({error!r}). Get it again.") from error
    if last >= size:
        raise WeightsError(
            f"{file} goes up to token {last}, but the model's vocabulary has {size} tokens. It belongs to another "
            "model: give the right one with --tokenizer FOLDER."
        )
