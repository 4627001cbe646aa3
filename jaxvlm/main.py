"""The command line: `python -m jaxvlm.main --config C --workdir W` runs the main job; verbs do everything else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxvlm.config import ConfigError, RunConfig, UserError, build, to_dict

USAGE = """jaxvlm: train, evaluate and talk to vision-language models in JAX.

The main job, every stage and then the evaluation, resumed where it stopped if it is run again:
  python -m jaxvlm.main --config configs/quickstart.py --workdir runs/quickstart
    --config FILE.py[:ARG,ARG=VALUE]     the run; `--config.stages[1].optimizer.learning_rate=1e-4` changes one setting
    --workdir DIR                        where everything goes
    --profile_steps A:B                  trace these steps of every stage, to look at with xprof
    --print_config                       show every setting and stop
    --dry_run                            compile every stage for this machine, say whether it fits, and stop
    --coordinator HOST:PORT --num_processes N --process_id I   one process of several, where no cluster tells (docs/reliability.md)

Verbs (`jaxvlm VERB --help` for each):
  chat       talk about an image with a trained model
  generate   answer one request, or a JSONL file of them
  serve      answer over HTTP, as OpenAI's chat completions
  eval       evaluate a run; score any program's answers on a benchmark, as a paper does; list benchmarks
  import     read a checkpoint of another project and save it as a jaxvlm model
  export     write a model as a folder that transformers, vLLM, LLaVA's code or PEFT load
  data       verify, inspect, count and convert data sets
  plan       does it fit on v5e-256, h100-64, ..., and what will it cost? Without the hardware
  inspect    show what a checkpoint holds
  report     show a run's scores and make its report.html again
  doctor     what this machine has, and what to do about what is missing
"""


def load_config(spec: str, overrides: dict[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Reads `FILE.py[:args]` and applies overrides: `{'stages[0].steps': 5}` or `['--config.stages[0].steps=5']`.

    Raises `ConfigError` naming the file, key or value and the nearest valid one.
    """
    from absl import flags
    from ml_collections import config_flags

    if isinstance(overrides, dict):
        overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"There is no config file '{path}'. The ones shipped with jaxvlm lie in configs/.")
    values = runpy.run_path(path)["get_config"](arg)
    known, argv = flags.FlagValues(), ["jaxvlm", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=known, sys_argv=argv)
        known(argv)
    except (AttributeError, KeyError) as error:  # how config_flags reports a key that is not there
        hint = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
        bad = f"'{hint[2]}' is not a setting. Did you mean '{hint[1]}'?" if hint else f"no such setting: {error}."
        raise ConfigError(f"In {' '.join(overrides)}: {bad}") from error
    except (flags.Error, IndexError, ValueError, TypeError) as error:
        raise ConfigError(f"In {' '.join(overrides)}: {error}") from error
    return build(RunConfig, values.to_dict())


def run(config: str | RunConfig, workdir: str | Path, overrides: dict[str, Any] | Sequence[str] = ()) -> dict[str, Any]:
    """The main job, for programs and notebooks: `run('configs/quickstart.py', 'runs/quickstart')` -> report."""
    if isinstance(config, str):
        config = load_config(config, overrides)
    prepare_jax()
    from jaxvlm import job

    return job.run(config, workdir)


def prepare_jax() -> None:
    """Keeps compiled programs between runs, so that a restart does not compile again; quiets orbax's own log."""
    import logging

    import jax
    from absl import logging as absl_logging

    from jaxvlm.data.assets import cache_dir

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        # Small programs too: a start of the tiny quickstart has dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------------------ the verbs


def train(argv: Sequence[str]) -> None:
    """The main job."""
    parser = argparse.ArgumentParser(prog="jaxvlm", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--profile_steps", metavar="A:B")
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    options, overrides = parser.parse_known_args(argv)
    strange = [arg for arg in overrides if not arg.startswith("--config.")]
    if strange:
        raise ConfigError(f"Unknown argument '{strange[0]}'. `jaxvlm --help` lists what there is.")
    if options.profile_steps:
        first, _, last = options.profile_steps.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(
                f"--profile_steps takes FIRST:LAST, as in --profile_steps 10:14, not '{options.profile_steps}'."
            )
        overrides.append(f"--config.log.profile_steps=({first}, {last})")
    config = load_config(options.config, overrides)
    if options.print_config:
        print(json.dumps(to_dict(config), indent=2))
        return
    if options.dry_run:
        from jaxvlm.planner import dry_run, text

        print(text(dry_run(config)))
        return
    if not options.workdir:
        raise ConfigError("Give --workdir, the folder for checkpoints, metrics and the report.")
    from jaxvlm.parallel import processes

    processes.start(options.coordinator, options.num_processes, options.process_id)
    with processes.leaving_peers():
        run(config, options.workdir)


def chat(argv: Sequence[str]) -> None:
    """Talk about an image with a trained model."""
    parser = _model_parser("chat", chat.__doc__)
    parser.add_argument("--image", help="start with this image; /image PATH loads one later")
    _sampling(parser, max_new_tokens=256)
    options = parser.parse_args(argv)
    prepare_jax()
    from jaxvlm.infer.chat import chat as converse
    from jaxvlm.infer.engine import load

    converse(
        load(options.run, dtype=None),
        image=options.image,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def generate(argv: Sequence[str]) -> None:
    """Answer one request, or a JSONL file of them (resumed where it stopped)."""
    parser = _model_parser("generate", generate.__doc__)
    parser.add_argument("question", nargs="?", help="one question; its answer is printed")
    parser.add_argument("--image", help="the image it is about")
    parser.add_argument("--input", help='JSONL of {"question_id", "text", "image"?, "candidates"? | "options"?}')
    parser.add_argument("--output", help="where the answers go, as JSONL")
    parser.add_argument("--images", default="", help="folder that the image paths are relative to")
    parser.add_argument("--batch_size", type=int)
    _sampling(parser, max_new_tokens=128)
    options = parser.parse_args(argv)
    if bool(options.question) == bool(options.input) or bool(options.input) != bool(options.output):
        raise ConfigError("Give either a question (with --image if it is about one), or --input and --output.")
    prepare_jax()
    from jaxvlm.infer.answers import generate_file
    from jaxvlm.infer.engine import load

    engine = load(options.run, dtype=None)
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    if options.input:
        more = dict(images=options.images, batch_size=options.batch_size, model_id=Path(options.run).name)
        generate_file(engine, options.input, options.output, **more, **sampling)
        return
    images = [options.image] if options.image else []
    content = "<image>\n" * len(images) + options.question
    for piece in engine.stream([{"role": "user", "content": content}], images, **sampling):
        print(piece, end="", flush=True)
    print()


def serve(argv: Sequence[str]) -> None:
    """Answer over HTTP, as OpenAI's chat completions (docs/serving.md)."""
    parser = _model_parser("serve", serve.__doc__)
    parser.add_argument("--name", help="what the model is called in requests (default: the last part of --run)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask too; there is no password")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=16, help="requests computed at once, if that many wait")
    _sampling(parser, max_new_tokens=1024)
    parser.set_defaults(seed=None)
    options = parser.parse_args(argv)
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise ConfigError("--batch_size and --max_new_tokens must be at least 1.")
    if not (0 <= options.temperature <= 2 and 0 <= options.top_p <= 1):
        raise ConfigError("--temperature must be from 0 to 2, and --top_p from 0 to 1.")
    from jaxvlm.serve import server

    bound = server.open_port(options.host, options.port)
    prepare_jax()
    from jaxvlm.infer.engine import load
    from jaxvlm.serve.worker import Sampling

    name = options.name or Path(options.run).resolve().name
    defaults = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, stop=())
    app = server.create(load(options.run, dtype=None), name, defaults, options.batch_size)
    print(f"Serving {name} at http://{options.host}:{bound.getsockname()[1]}/v1. Ctrl-C stops.", flush=True)
    server.serve(app, bound)


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate a run again: on its own subset, on another, or on the whole test split."""
    if not argv or argv[0] in ("-h", "--help") or not argv[0].startswith("-"):
        from jaxvlm.eval_verbs import main as run_verb

        if argv[:1] == ["benchmark"]:  # the only one with a model
            prepare_jax()
        raise SystemExit(run_verb(argv))
    parser = argparse.ArgumentParser(prog="jaxvlm eval", description=evaluate.__doc__)
    parser.add_argument("--run", required=True, metavar="WORKDIR")
    parser.add_argument("--full", action="store_true", help="every question of the test split")
    parser.add_argument("--limit", action="append", default=[], metavar="CATEGORY=N", help="N questions of a category")
    parser.add_argument("--blind", choices=["none", "noimage", "gray", "shuffle"], help="what the blind run sees")
    parser.add_argument("--batch_size", type=int)
    options = parser.parse_args(argv)
    prepare_jax()
    from jaxvlm import job
    from jaxvlm.infer.engine import load

    workdir = Path(options.run)
    config = job.resolve_assets(job.run_config(workdir))
    changes: dict[str, Any] = {}
    if options.full:
        changes["limits"] = ()
    elif options.limit:
        changes["limits"] = tuple(_limit(text) for text in options.limit)
    if options.blind:
        changes["blind"] = options.blind.replace("none", "")
    if options.batch_size:
        changes["batch_size"] = options.batch_size
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))
    scores = job.evaluate(load(workdir, dtype=None), config, workdir / "eval")
    job.show_scores(scores, workdir / "eval" / ("full.json" if options.full else "scores.json"))


def import_checkpoint(argv: Sequence[str]) -> None:
    """Read a checkpoint of another project, in any format, and save it as a jaxvlm model."""
    usage = "jaxvlm import [options] PATH OUT, or for a new model of two parts: --vision FOLDER --llm FOLDER OUT"
    parser = argparse.ArgumentParser(prog="jaxvlm import", usage=usage, description=import_checkpoint.__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="what to read, and the folder to write")
    parser.add_argument("--dry-run", action="store_true", help="show what becomes of every tensor and write nothing")
    parser.add_argument("--vision", default="", metavar="FOLDER", help="the vision tower, where PATH only names it")
    parser.add_argument("--llm", default="", metavar="FOLDER", help="the language model, where PATH only names it")
    parser.add_argument("--connector", default="", metavar="FILE", help="a projector between --vision and --llm")
    parser.add_argument("--base", default="", metavar="FOLDER", help="the model that the adapters in PATH belong to")
    parser.add_argument("--merge", action="store_true", help="add adapters to the weights that they adapt")
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="where the tokenizer.json is, if not in PATH")
    parser.add_argument(
        "--template", default="", metavar="NAME", help="as in vicuna_v1; tokenizer: the tokenizer's own"
    )
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16", "float16"], help="default: as in PATH"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what no checkpoint has")
    options = vars(parser.parse_intermixed_args(argv))
    from jaxvlm.data.conversation import get_template
    from jaxvlm.weights.convert import convert

    if options["template"]:
        get_template(options["template"])
    paths, dry_run = options.pop("paths"), options["dry_run"]
    if options["vision"] and options["llm"] and not (paths[1:] or (dry_run and paths and Path(paths[0]).exists())):
        paths = ["", *paths]  # the parts alone
    if not len(paths) == 2 and not (dry_run and len(paths) == 1):
        raise ConfigError("Give what to read and the folder to write: jaxvlm import PATH OUT (or PATH --dry-run).")
    path, out = (*paths, "")[:2]
    report = convert(path, out, **options)
    if not dry_run:
        print(f"{report}\nSaved to {out}. Try: jaxvlm chat --run {out}")


def export(argv: Sequence[str]) -> None:
    """Write a model, of a run or of any checkpoint that `import` reads, as a folder that other projects load."""
    parser = argparse.ArgumentParser(prog="jaxvlm export", description=export.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's --workdir, or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    formats = ["llava-hf", "llava-next-hf", "llava-original", "peft"]
    parser.add_argument("--format", default="llava-hf", choices=formats, help="default: llava-hf")
    parser.add_argument(
        "--merge", action=argparse.BooleanOptionalAction, default=True, help="add adapters to the weights (default)"
    )
    parser.add_argument("--base", default="", help="peft: the name of the model that the adapters are for")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"], help="default: as it is")
    options = parser.parse_args(argv)
    from jaxvlm import weights
    from jaxvlm.weights.exporter import copy_adapters

    kept = Path(options.run) / "adapters"  # a run merges its adapters into the model that it saves
    if options.format == "peft" and kept.is_dir():
        copy_adapters(kept, Path(options.out), options.base)
        print(f"Written to {options.out}.")
        return
    model, prompt, params = weights.load_any(options.run, dtype=None)
    more = {"merge": options.merge, "base": options.base, "dtype": options.dtype}
    weights.export(params, model, prompt, options.out, options.format, **more)
    print(f"Written to {options.out}.")


def data(argv: Sequence[str]) -> None:
    """Verify, inspect, count and convert data sets."""
    from jaxvlm.data_verbs import main as run_verb

    raise SystemExit(run_verb(argv))


def plan(argv: Sequence[str]) -> None:
    """What a run will need and cost on devices that need not be there."""
    from jaxvlm.planner import main as run_verb

    raise SystemExit(run_verb(load_config, argv))


def inspect(argv: Sequence[str]) -> None:
    """Show what a checkpoint holds: step, stage, data, arrays, versions, and whether its files are whole."""
    parser = argparse.ArgumentParser(prog="jaxvlm inspect", description=inspect.__doc__)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a run's --workdir (its newest), a stage's folder, or one step's"
    )
    options = parser.parse_args(argv)
    prepare_jax()
    from jaxvlm.train.inspect_checkpoint import describe_checkpoint

    print(describe_checkpoint(options.checkpoint))


def report(argv: Sequence[str]) -> None:
    """Show a run's scores and write its report.html again; or set benchmarks of several runs side by side on one page."""
    parser = argparse.ArgumentParser(prog="jaxvlm report", description=report.__doc__)
    parser.add_argument("--run", metavar="WORKDIR")
    parser.add_argument("runs", nargs="*", metavar="[NAME=]FOLDER", help="what `jaxvlm eval benchmark --out` wrote")
    parser.add_argument("--out", metavar="DIR", help="the page of the FOLDERs, runs.html and runs.md, goes there")
    parser.add_argument("--samples", type=int, default=60, help="questions shown of each benchmark (60)")
    options = parser.parse_args(argv)
    if bool(options.run) == bool(options.runs) or bool(options.runs) != bool(options.out):
        raise ConfigError("Give a trained run (--run WORKDIR), or benchmarks and where to write: FOLDER ... --out DIR.")
    if options.runs:
        from jaxvlm.evals import side_by_side

        page = side_by_side.write(list(map(side_by_side.read_run, options.runs)), options.out, samples=options.samples)
        print(f"Written to {page}.")
        return
    from jaxvlm import job

    job.show_report(Path(options.run))


def doctor(argv: Sequence[str]) -> None:
    """What this machine has, and what to do about what is missing."""
    argparse.ArgumentParser(prog="jaxvlm doctor", description=doctor.__doc__).parse_args(argv)
    from jaxvlm.doctor import doctor as examine

    raise SystemExit(examine())


def _model_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"jaxvlm {verb}", description=description)
    parser.add_argument("--run", required=True, metavar="PATH", help="a run's --workdir, or a llava-hf folder")
    return parser


def _limit(text: str) -> tuple[str, int]:
    category, _, count = text.partition("=")
    if not count.isdigit():
        raise ConfigError(f"--limit takes CATEGORY=N, as in --limit what=400, not '{text}'.")
    return category, int(count)


def _sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "chat": chat,
    "generate": generate,
    "serve": serve,
    "eval": evaluate,
    "import": import_checkpoint,
    "export": export,
    "data": data,
    "plan": plan,
    "inspect": inspect,
    "report": report,
    "doctor": doctor,
}


def main(argv: Sequence[str]) -> int:
    """Runs a verb; expected failures become one sentence and an exit code: 0 done or preempted-and-saved, 1 error."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        import jaxvlm

        print(jaxvlm.__version__)
        return 0
    verb, rest = (VERBS[argv[0]], argv[1:]) if argv[0] in VERBS else (train, argv)
    try:
        if verb is train and not argv[0].startswith("-"):
            raise ConfigError(f"There is no verb '{argv[0]}'. The verbs are: {', '.join(VERBS)}; see `jaxvlm --help`.")
        verb(rest)
        return 0
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        code = 130
    except Exception as error:
        code = _explain(error, argv)
    if code and verb is train:
        _leave_peers(code)
    return code


def _leave_peers(code: int) -> None:
    """Ends a process of several at once: Python's own way out waits for the others, who wait for this one."""
    import jax

    from jaxvlm.parallel import processes

    if jax.distributed.is_initialized():
        processes.leave(code)


def _explain(error: Exception, argv: Sequence[str]) -> int:
    """One clear sentence for the failures a user can mend; everything else keeps its traceback."""
    from jaxvlm.train.loop import Interrupted

    if isinstance(error, Interrupted):
        command = f"python -m jaxvlm.main {shlex.join(argv)}"
        print(
            f"\n{error}\nTo go on, run the same command again:\n  {command}", flush=True
        )  # once: process 0 alone has a stdout
        return 0 if error.signum == signal.SIGTERM else 130  # a preemption that was saved is not a failure
    if not isinstance(error, UserError | OSError) or os.environ.get("JAXVLM_DEBUG"):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 1


def entry_point() -> None:
    """The installed `jaxvlm` command."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
