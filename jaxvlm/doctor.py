"""`jaxvlm doctor`: what this machine has, what the main job needs, and what to do about what is missing.

`gather` reads the machine, `examine` judges what was read, `doctor` prints it. Only the standard library is
imported at the top, so that it works in the very environments that need it.
"""

from __future__ import annotations

import glob
import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_BYTES = 6 * 10**9  # what the quickstart may use
DISK_BYTES = 3 * 10**9  # downloads, prepared data, checkpoints and the model, with room to spare
OLDEST_PYTHON = (3, 11)
EXTRAS = {  # what an extra of setup.py is for; the packages in it come from the installed metadata
    "data": "TFDS, Hugging Face and ArrayRecord data sets",
    "serve": "the OpenAI-compatible server",
    "lmms": "benchmarks of lmms-eval",
    "log": "TensorBoard and Weights & Biases",
    "emoji": "the emoji preset's images",
    "notebook": "making and running the notebooks",
    "test": "the tests",
}
ASSETS = ("smollm2-135m-instruct", "efficientnet-lite0", "easy-vqa")  # what configs/quickstart.py uses
PLUGINS = {"cuda13": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}
TPU_PCI_IDS = {
    "0x0027",
    "0x0056",
    "0x005e",
    "0x0062",
    "0x0063",
    "0x006f",
    "0x0076",
}  # v2 to TPU7x, as jax lists them

# Runs in a process of its own: a plugin that aborts, or a TPU that is busy, must not end the doctor.
PROBE = """
import json, jax
devices = [[d.device_kind, (d.memory_stats() or {}).get("bytes_limit")] for d in jax.local_devices()]
print("\\nPROBE" + json.dumps({"backend": jax.default_backend(), "devices": devices}))
"""


@dataclass(frozen=True)
class Facts:
    """What was read off the machine. Sizes in bytes; None = could not be read."""

    python: tuple[int, int, int]
    requirements: list[str] | None  # of the installed jaxvlm, as PEP 508 lines; None = not installed
    versions: dict[str, str]  # installed distributions by canonical name
    backend: str | None = None  # cpu | gpu | tpu; None = jax did not start
    devices: list[tuple[str, int | None]] = field(default_factory=list)  # kind, memory
    jax_error: str = ""
    jax_platforms: str = ""  # the environment variable JAX_PLATFORMS
    gpus: list[str] = field(default_factory=list)
    driver: str = ""  # of the NVIDIA GPUs
    capability: float = 0.0  # the lowest compute capability among them
    tpu_chips: int = 0
    cores: int = 1
    memory: int | None = None
    memory_available: int | None = None
    disks: dict[str, int] = field(default_factory=dict)  # free bytes by what the place is for
    cache: str = ""
    cache_size: int = 0
    assets: dict[str, int] = field(default_factory=dict)  # those that are prepared, with their size


@dataclass(frozen=True)
class Finding:
    """One line of the report. `mark` is ok, note, missing (optional) or problem (the main job cannot run)."""

    mark: str
    name: str
    value: str
    advice: str = ""


def doctor(out: Callable[[str], object] = print, workdir: str | Path = ".", facts: Facts | None = None) -> int:
    """Prints the report; returns 0 when the main job can run here, 1 when something is in the way."""
    if facts is None:
        out("Looking at this machine (a few seconds) ...")
        facts = gather(workdir)
    problems = []
    for title, findings in examine(facts):
        out(f"\n{title}")
        for finding in findings:
            out(f"  {finding.mark:<8}{finding.name:<22}{finding.value}")
            if finding.advice:
                out(f"{'':10}-> {finding.advice}")
            if finding.mark == "problem":
                problems.append(finding)
    out("")
    if not problems:
        out("The main job can run here: make quickstart")
        return 0
    names = ", ".join(finding.name for finding in problems)
    out(f"The main job cannot run yet. To fix: {names} (see -> above).")
    return 1


# ---------------------------------------------------------------------------------------------------- judging


def examine(facts: Facts) -> list[tuple[str, list[Finding]]]:
    """Judges the facts, section by section."""
    return [
        ("Machine", [*_machine(facts), *_accelerators(facts)]),
        ("Packages", list(_packages(facts))),
        ("Optional parts", list(_optional(facts))),
        ("Downloads", list(_cache(facts))),
    ]


def _machine(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python < OLDEST_PYTHON:
        yield Finding(
            "problem",
            "Python",
            version,
            "jaxvlm needs 3.11 or newer: make clean, make setup PYTHON=python3.12",
        )
    else:
        yield Finding("ok", "Python", version)
    yield Finding("ok", "CPU", f"{facts.cores} cores")
    if facts.memory is not None:
        value = f"{_size(facts.memory)}, {_size(facts.memory_available)} available"
        if facts.memory < MEMORY_BYTES:
            advice = f"The quickstart needs {_size(MEMORY_BYTES)}; use a larger machine."
            yield Finding("problem", "Memory", value, advice)
        elif (facts.memory_available or facts.memory) < MEMORY_BYTES:
            yield Finding(
                "note",
                "Memory",
                value,
                f"The quickstart needs {_size(MEMORY_BYTES)}; end other programs first.",
            )
        else:
            yield Finding("ok", "Memory", value)
    for place, free in facts.disks.items():
        mark = "ok" if free >= DISK_BYTES else "problem"
        where = "give another --workdir" if place == "work folder" else "set JAXVLM_CACHE to a folder on another disk"
        advice = f"The quickstart needs {_size(DISK_BYTES)}: free some space, or {where}." if mark == "problem" else ""
        yield Finding(mark, f"Disk, {place}", f"{_size(free)} free", advice)


def _accelerators(facts: Facts) -> Iterator[Finding]:
    if facts.backend is None:
        first = facts.jax_error or "no output"
        advice = "See Packages below." if "jax" not in facts.versions else "JAX_PLATFORMS=cpu leaves accelerators out."
        yield Finding("problem", "jax devices", f"jax does not start: {first}", advice)
    else:
        kinds = {device: facts.devices.count(device) for device in facts.devices}
        names = [f"{n} x {kind}" + (f" ({_size(memory)})" if memory else "") for (kind, memory), n in kinds.items()]
        yield Finding("ok", "jax devices", f"{facts.backend}: {', '.join(names)}")
    if facts.gpus:
        yield _nvidia(facts)
    if facts.tpu_chips:
        value = f"{facts.tpu_chips} chips"
        if facts.backend == "tpu":
            yield Finding("ok", "TPU", value)
        else:
            yield Finding("missing", "TPU", f"{value}, not used by jax", _how("tpu", facts))


def _nvidia(facts: Facts) -> Finding:
    value = f"{', '.join(facts.gpus)}; driver {facts.driver or 'unknown'}"
    if facts.backend == "gpu":
        if _release(facts.versions.get("jax", "0")) < (0, 11, 2):
            advice = "The GPU kernels need jax 0.11.2, so Python 3.12: make clean, make setup PYTHON=python3.12"
            return Finding("note", "NVIDIA GPU", value, advice)
        return Finding("ok", "NVIDIA GPU", value)
    major = _release(facts.driver)[0] if facts.driver else 580
    if major < 525:
        return Finding("missing", "NVIDIA GPU", value, "jax needs driver 525 or newer; until then it uses the CPU.")
    # CUDA 13 needs driver 580 and has left out GPUs before Turing (compute capability 7.5).
    extra = "cuda13" if major >= 580 and (facts.capability or 7.5) >= 7.5 else "cuda12"
    return Finding("missing", "NVIDIA GPU", f"{value}; not used by jax", _how(extra, facts))


def _how(extra: str, facts: Facts) -> str:
    """How to make jax use the accelerator that `extra` is for."""
    backend = "tpu" if extra == "tpu" else "cuda"
    if facts.jax_platforms and backend not in facts.jax_platforms:
        return f"JAX_PLATFORMS={facts.jax_platforms} hides it: unset JAX_PLATFORMS."
    plugins = [PLUGINS[name] for name in PLUGINS if name.startswith(backend) and PLUGINS[name] in facts.versions]
    if plugins:
        reason = f" ({facts.jax_error})" if facts.jax_error else ""
        return f"{plugins[0]} is installed but did not start{reason}. Reinstall it: {_pip(extra)}"
    return _pip(extra)


def _pip(extra: str) -> str:
    return f"pip install -e '.[{extra}]' in the clone, or: make setup EXTRAS={extra}"


def _packages(facts: Facts) -> Iterator[Finding]:
    if facts.requirements is None:
        yield Finding("problem", "jaxvlm", "not installed", "In the clone: make setup, or pip install -e .")
        return
    yield Finding("ok", "jaxvlm", facts.versions.get("jaxvlm", "?"))
    for requirement in _requirements(facts.requirements):
        if requirement.marker is not None:
            continue
        name, bounds = requirement.name, str(requirement.specifier)
        version = facts.versions.get(_canonical(name))
        if version is None:
            yield Finding("problem", name, "not installed", f"pip install '{name}{bounds}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("problem", name, f"{version}, but {bounds} is needed", f"pip install '{name}{bounds}'")
        else:
            yield Finding("ok", name, version)
    jax, jaxlib = facts.versions.get("jax"), facts.versions.get("jaxlib")
    if jax and jaxlib:
        same = _release(jaxlib)[:3] == _release(jax)[:3]
        advice = "" if same else f"pip install jaxlib=={jax}"
        yield Finding("ok" if same else "problem", "jaxlib", jaxlib + ("" if same else f", but jax is {jax}"), advice)


def _optional(facts: Facts) -> Iterator[Finding]:
    found = {extra: [] for extra in EXTRAS}
    for requirement in _requirements(facts.requirements or []):
        for extra in EXTRAS:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                found[extra].append(requirement.name)
    for extra, names in found.items():
        absent = [name for name in names if _canonical(name) not in facts.versions]
        if not names:
            continue
        if absent:
            value = f"{EXTRAS[extra]}; not installed: {', '.join(absent)}"
            yield Finding("missing", extra, value, f"If you want it: {_pip(extra)}")
        else:
            yield Finding("ok", extra, EXTRAS[extra])
    for extra, name in PLUGINS.items():
        if name in facts.versions:
            yield Finding("ok", extra, f"{name} {facts.versions[name]}")


def _cache(facts: Facts) -> Iterator[Finding]:
    value = f"{facts.cache}, {_size(facts.cache_size)} (JAXVLM_CACHE moves it; safe to delete)"
    yield Finding("ok", "Cache", value)
    for name in ASSETS:
        if name in facts.assets:
            yield Finding("ok", name, _size(facts.assets[name]))
        else:
            yield Finding("note", name, "not here yet; the quickstart fetches it with pip (113 MB for all three)")


def _requirements(lines: list[str]) -> list:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # `packaging` itself is missing: pip's own copy reads the same format
        from pip._vendor.packaging.requirements import Requirement
    return [Requirement(line) for line in lines]


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _release(version: str) -> tuple[int, ...]:
    """'0.11.2.dev3' to (0, 11, 2)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers) or (0,)


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------------- reading


def gather(workdir: str | Path = ".") -> Facts:
    """Reads the machine: about three seconds, most of it jax starting in a process of its own."""
    try:
        requirements = metadata.requires("jaxvlm") or []
    except metadata.PackageNotFoundError:
        requirements = None
    versions = {_canonical(dist.metadata["Name"] or ""): dist.version for dist in metadata.distributions()}
    backend, devices, error = _start_jax()
    gpus, driver, capability = _read_nvidia()
    memory, available = _read_memory()
    # The same rule as data.assets, which cannot be imported where dependencies are missing.
    cache = Path(os.environ.get("JAXVLM_CACHE") or Path.home() / ".cache" / "jaxvlm").expanduser()
    return Facts(
        python=sys.version_info[:3],
        requirements=requirements,
        versions=versions,
        backend=backend,
        devices=devices,
        jax_error=error,
        jax_platforms=os.environ.get("JAX_PLATFORMS", ""),
        gpus=gpus,
        driver=driver,
        capability=capability,
        tpu_chips=_count_tpu_chips(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory,
        memory_available=available,
        disks={"work folder": _free(Path(workdir)), "cache": _free(cache)},
        cache=str(cache),
        cache_size=_folder_size(cache),
        assets={path.parent.name: _folder_size(path.parent) for path in cache.glob("assets/*/asset.json")},
    )


def _start_jax() -> tuple[str | None, list[tuple[str, int | None]], str]:
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return None, [], "it did not finish starting in 3 minutes; another process may hold the accelerator"
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    failed = [line for line in errors if "rror" in line]
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            answer = json.loads(line.removeprefix("PROBE"))
            return (
                answer["backend"],
                [tuple(device) for device in answer["devices"]],
                (failed or [""])[-1][:300],
            )
    return None, [], (failed or errors or [f"exit code {done.returncode}"])[-1][:300]


def _read_nvidia() -> tuple[list[str], str, float]:
    """Names of the NVIDIA GPUs, driver version, lowest compute capability."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        nodes = glob.glob("/dev/nvidia[0-9]*")
        return [f"{len(nodes)} (nvidia-smi does not run)"] if nodes else [], "", 0.0
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    if not rows:
        return [], "", 0.0
    capabilities = [float(row[2]) for row in rows if row[2].replace(".", "", 1).isdigit()]
    return [row[0] for row in rows], rows[0][1], min(capabilities, default=0.0)


def _count_tpu_chips() -> int:
    chips = 0
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            google = Path(vendor).read_text().strip() == "0x1ae0"
            chips += google and Path(vendor).with_name("device").read_text().strip() in TPU_PCI_IDS
        except OSError:
            continue
    return chips


def _read_memory() -> tuple[int | None, int | None]:
    """Total and available memory; macOS tells only the total."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        pass
    if platform.system() == "Darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return None, None


def _free(folder: Path) -> int:
    """Free bytes on the disk that `folder` is, or will be, on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _folder_size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
