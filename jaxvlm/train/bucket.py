"""A work directory in a bucket, gs://...: config, checkpoints and model are written there, all else here and copied there.

An object store cannot append to a file or map one into memory, so what a run writes line by line (metrics, answers) it
writes into a folder here. A thread copies what has changed to the bucket, and a run that starts, on this machine or another,
fetches it first. A machine that is lost takes the lines of `EVERY_SECONDS` with it, and no part of the training's state.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from jaxvlm.config import ConfigError
from jaxvlm.data.assets import cache_dir
from jaxvlm.parallel.processes import barrier
from jaxvlm.weights.saved import CheckpointError, is_address

EVERY_SECONDS = 10.0
ONLY_THERE = ("config.json", "environment.json", "stages", "model")  # written there, by `job` and by orbax
ONLY_HERE = ("features", "heartbeats")  # what is made again where it is missing, and what every machine has its own of
NEEDS = {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"}


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[tuple[Path, Path | epath.Path]]:
    """(folder for the run's files, place for its config, checkpoints and model): one and the same, but for a bucket.

    All processes must enter. Raises `ConfigError` for an address that is not in a Google Cloud bucket and for packages
    that are missing, and `CheckpointError` when the bucket cannot be read and written.
    """
    if not is_address(workdir):
        yield Path(workdir), Path(workdir)
        return
    bucket = require_writable(str(workdir))
    folder = cache_dir() / "workdirs" / hashlib.sha256(str(bucket).encode()).hexdigest()[:16]
    if jax.process_index() == 0:
        with explained(bucket):
            fetch(bucket, folder)
    barrier(f"{bucket}: fetched", 600)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        yield folder, bucket
        return
    copies = Copies(folder, bucket)
    try:
        yield folder, bucket
    finally:
        with explained(bucket):
            copies.close()


def require(address: str) -> None:
    """Raises `ConfigError` unless `address` is in a Google Cloud bucket and the packages that reach it are installed."""
    if not address.startswith("gs://"):
        raise ConfigError(
            f"{address}: of addresses only gs://BUCKET/FOLDER works. Mount other storage (s3fs, NFS) on every "
            "machine and give the folder."
        )
    missing = [package for module, package in NEEDS.items() if not _installed(module)]
    if missing:
        raise ConfigError(f"{address} needs {' and '.join(missing)}. In the clone of jaxvlm: pip install -e '.[gcs]'")


def require_writable(address: str) -> epath.Path:
    """The place at `address`, where this process has written and deleted an object.

    Raises what `require` raises, and `CheckpointError` when the bucket refuses.
    """
    require(address)
    bucket = epath.Path(address)
    with explained(bucket):
        probe = bucket / f".probe-{jax.process_index()}"
        probe.write_text("may this job write here?")
        probe.unlink()
    return bucket


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


@contextlib.contextmanager
def explained(bucket: epath.Path) -> Iterator[None]:
    """Turns what Google's clients raise, of many kinds, into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:300]
        raise CheckpointError(
            f"{bucket} cannot be read and written: {type(error).__name__}: {said.rstrip('.')}. The bucket must exist, and "
            "this machine's account be allowed to change objects in it (role Storage Object Admin). At your desk: gcloud "
            "auth application-default login"
        ) from error


def fetch(bucket: epath.Path, folder: Path) -> None:
    """Brings the run's files here, but those that are newer here. A folder of a run that the bucket has not is emptied."""
    if not (bucket / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        return
    waiting = [path for path in bucket.iterdir() if path.name not in ONLY_THERE]
    while waiting:
        path = waiting.pop()
        here = folder / path.relative_to(bucket)
        if path.is_dir():
            waiting += path.iterdir()
        elif not here.exists() or here.stat().st_mtime < path.stat().mtime:
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_bytes(path.read_bytes())


class Copies:
    """The thread that copies what changes in `folder` to `bucket`. A failure is said once, and tried again."""

    def __init__(self, folder: Path, bucket: epath.Path):
        self.folder, self.bucket, self.sent = folder, bucket, {}
        self.closed, self.failed = threading.Event(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def send(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_dir() or name.parts[0] in ONLY_HERE:
                continue
            with contextlib.suppress(FileNotFoundError):  # a temporary file, renamed meanwhile
                stat = path.stat()
                stamp = stat.st_size, stat.st_mtime_ns
                if self.sent.get(name) != stamp:
                    (self.bucket / name).write_bytes(path.read_bytes())
                    self.sent[name] = stamp

    def close(self) -> None:
        """Copies what is left. Raises what the bucket's client raises."""
        self.closed.set()
        self.thread.join()
        self.send()

    def _run(self) -> None:
        while not self.closed.wait(EVERY_SECONDS):
            try:
                self.send()
                self.failed = False
            except Exception as error:  # of many kinds
                if not self.failed:
                    print(f"WARNING: {self.bucket} could not be written ({error}); tried again.", file=sys.stderr)
                self.failed = True
