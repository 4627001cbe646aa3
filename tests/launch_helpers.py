"""A clone with the launch scripts in a folder of its own, and stand-ins on PATH for what is not here: gcloud, srun, uv, a job."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"

# Runs the main job's stand-in, $JOB, for `python -m jaxvlm.main ARGS`, after noting ARGS one a line; anything else is real.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = -m ]; then shift 2; printf '%s\\n' "$@" >"$LOGS/arguments"; eval "$JOB"; else exec {sys.executable} "$@"; fi
"""

# Two workers a slice, each with a home; the state of the queued resource is a file. Every call is noted.
GCLOUD = """#!/usr/bin/env bash
echo "$(printf '%q ' "$@")" >>"$LOGS/gcloud"
state=$LOGS/state
command="" node="" all=""
for word in "$@"; do case $word in --command=*) command=${word#*=} ;; esac; done
case "$1 $2 $3 $4" in
  "storage ls "*) cat "$LOGS/saved" 2>/dev/null ;;
  *"queued-resources describe") if [ -s "$state" ]; then cat "$state"; else echo "ERROR: NOT_FOUND: none" >&2; exit 1; fi ;;
  *"queued-resources create") rm -rf "$LOGS"/homes/*; echo ACTIVE >"$state" ;;
  *"queued-resources delete") rm -f "$state" ;;
  *"tpu-vm scp") for w in 0 1; do mkdir -p "$LOGS/homes/${6%%:*}/$w"; cp "$5" "$LOGS/homes/${6%%:*}/$w/${6#*:}"; done ;;
  *"tpu-vm ssh")
    for w in 0 1; do
      mkdir -p "$LOGS/homes/$5/$w"
      (export HOME=$LOGS/homes/$5/$w WORKER=$w; cd "$HOME" && exec bash -c "$command") || exit
    done ;;
  *) echo "gcloud: what is $*?" >&2; exit 99 ;;
esac
"""

# As SLURM does: a signal to srun goes to all of the step's processes, and its exit code is the highest of all tasks (one
# runs here, $OTHERS is that of the others).
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
open(os.environ["LOGS"] + "/srun", "a").write(repr(words) + "\\n")
while words[0].startswith("--"): words.pop(0)
step = subprocess.Popen(words, start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(step.pid, signal.SIGTERM))
sys.exit(max(step.wait(), int(os.environ.get("OTHERS", "0"))))
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$LOGS/scontrol"
"""

UV = """#!/usr/bin/env bash
case $1 in venv) mkdir -p .venv/bin && cp "$LOGS/../bin/python3" .venv/bin/python ;; esac
echo "$(printf '%q ' "$@")" >>"$LOGS/uv"
"""


class Place:
    """`clone` with the launch scripts, committed; `logs` where the stand-ins note what they were asked."""

    def __init__(self, root: Path):
        self.clone, self.logs, self.bin = root / "clone", root / "logs", root / "bin"
        for folder in (self.logs, self.bin):
            folder.mkdir(parents=True)
        shutil.copytree(LAUNCH, self.clone / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        # The installation ends by importing the packages; here there are none to import.
        (self.clone / "jaxvlm.py").write_text("__version__ = '0'")
        (self.clone / "jax.py").write_text("__version__ = '0'")
        for name, text in {"python3": PYTHON, "gcloud": GCLOUD, "srun": SRUN, "uv": UV, "scontrol": SCONTROL}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
            subprocess.run(["git", *command.split()], cwd=self.clone, check=True)

    def environment(self, job: str = "", **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_FLAGS", "LIBTPU"))}
        path = f"{self.bin}:{os.environ['PATH']}"
        home = {"HOME": str(self.logs), "TMPDIR": str(self.logs), "PYTHONPATH": "."}
        return kept | home | {"PATH": path, "LOGS": str(self.logs), "JOB": job} | more

    def run(self, script: str, *arguments: str, job: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a launch script of the clone from within it."""
        command = ["bash", f"launch/{script}", *arguments]
        kept = dict(cwd=self.clone, env=self.environment(job, **more), capture_output=True, text=True, timeout=60)
        return subprocess.run(command, **kept)

    def start(self, script: str, *arguments: str, job: str = "", **more: str) -> subprocess.Popen[str]:
        """The same in a session of its own, not waited for."""
        command, pipe = ["bash", f"launch/{script}", *arguments], subprocess.PIPE
        kept = dict(cwd=self.clone, env=self.environment(job, **more), stdout=pipe, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, start_new_session=True, **kept)

    def noted(self, name: str) -> list[list[str]]:
        """The calls of a stand-in, as words."""
        path = self.logs / name
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    def arguments(self) -> list[str]:
        """What the main job was given."""
        return (self.logs / "arguments").read_text().splitlines()
