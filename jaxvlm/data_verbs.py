"""`jaxvlm data VERB`: looks at data sets, checks them, counts them and converts them, before a run depends on them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvlm.config import ConfigError, DataConfig, ModelConfig, PromptConfig, RunConfig, SourceConfig, StageConfig

USAGE = """jaxvlm data: look at a data set, check it, count it and convert it.

  jaxvlm data verify  PATH --images FOLDER     read every record and decode every image; say what is wrong and how to repair it
  jaxvlm data inspect PATH --images FOLDER     show what the model sees of some records, and what of it is supervised
  jaxvlm data stats   PATH --images FOLDER     lengths, images, supervised tokens and packing, per source
  jaxvlm data convert PATH OUT --images FOLDER write ArrayRecord shards: quick random access, images inside

PATH is whatever a source of a config may be: LLaVA's JSON or JSONL and the other kinds in docs/data.md. In its place,
`--config CONFIG [--stage NAME]` takes the sources of a run, and its template, images and length with them; settings of the
config are changed as for the main job (`--config.prompt.length=4096`). `jaxvlm data VERB --help` says the rest.
"""


class Chosen(NamedTuple):
    """What a command is about: the sources of one stage and how it sees them. Given a PATH, `config` is None."""

    name: str
    sources: tuple[SourceConfig, ...]
    prompt: PromptConfig
    model: ModelConfig
    data: DataConfig
    seed: int


# ------------------------------------------------------------------------------------------------------------ the verbs


def verify(argv: Sequence[str]) -> int:
    """Read every record and decode every image; say what is wrong and how to repair it."""
    parser = _parser("verify", verify.__doc__, "Returns 0 if all is well, 1 if something needs you.")
    parser.add_argument("--quick", action="store_true", help="read the images' headers, do not decode them")
    parser.add_argument("--workers", type=int, help="threads that decode (default: one per core)")
    parser.add_argument(
        "--quarantine",
        metavar="FILE",
        help="write the records that cannot be used, as JSONL; images to fetch again go to FILE.images.txt",
    )
    options, stages = _parsed(parser, argv)
    from jaxvlm.data.tools.verify import verify as verify_source
    from jaxvlm.data.tools.verify import verify_stage

    found = []
    for source in _each_source(stages):
        print("\n" * bool(found), end="")
        found.append(verify_source(source, quick=options.quick, workers=options.workers))
    for stage in stages if options.config else ():
        known = {(entry["file"], entry["record"]) for one in found for entry in one.bad}
        found.append(verify_stage(stage.name, stage.data, stage.prompt, stage.model, stage.seed, known))
    return _conclude(found, options.quarantine)


def _conclude(found: list, quarantine: str | None) -> int:
    """Writes what there is to write and says what to do next."""
    bad = [record for one in found for record in one.bad]
    fetch = [name for one in found for name in one.fetch]
    problems = sum(len(one.problems) for one in found)
    print()
    if quarantine:
        _write_lines(Path(quarantine), (json.dumps(record, ensure_ascii=False) for record in bad))
        print(f"{quarantine}: {len(bad):,} records that cannot be used")
        if fetch:
            _write_lines(Path(quarantine + ".images.txt"), fetch)
            print(f"{quarantine}.images.txt: {len(fetch):,} images to fetch again")
    if not problems:
        print("All is well.")
        return 0
    print(f"{problems} problem{'s' * (problems > 1)} to mend: see -> above, then run this again.")
    if bad and not quarantine:
        print(f"--quarantine FILE lists the {len(bad):,} records that cannot be used, and the images to fetch again.")
    return 1


def inspect(argv: Sequence[str]) -> int:
    """Show what the model sees of some records, and what of it is supervised."""
    parser = _parser("inspect", inspect.__doc__, "Without a tokenizer the text is shown and nothing is counted.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", type=int, metavar="I", help="record number I, counted from 0 as in error messages")
    which.add_argument("--random", type=int, metavar="N", help="N records drawn at random (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--source", metavar="NAME", help="only this source of the config")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images instead")
    _tokenizing(parser)
    options, stages = _parsed(parser, argv)
    from jaxvlm.data.sources import open_source
    from jaxvlm.data.tools.samples import legend, show_sample

    stage = stages[-1]
    configs = [source for source in stage.sources if options.source in (None, source.name)]
    if not configs:
        names = ", ".join(repr(source.name) for source in stage.sources)
        raise ConfigError(f"There is no source '{options.source}' in {stage.name}; it has {names}.")
    sources = [(config, open_source(config, log=print)) for config in configs]
    viewer = _viewer(stage)
    places = _places(sources, options)
    samples = [(viewer.sample(*sources[k], number), sources[k][1].image) for k, number in places]
    if options.html:
        from jaxvlm.data.tools.sheet import contact_sheet

        page = contact_sheet(f"{stage.name}: {len(samples)} records", _facts(stage), samples)
        _write_lines(Path(options.html), [page])
        print(f"{options.html}: {len(samples)} records. Open it in a browser.")
        return 0
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{_facts(stage)}\n{legend(colour)}\n")
    for sample, _ in samples:
        show_sample(sample, print, colour)
    return 0


def stats(argv: Sequence[str]) -> int:
    """Count records, tokens, supervised tokens and images per source, and how full packed rows would be."""
    parser = _parser("stats", stats.__doc__, "Without a tokenizer lengths are in words.")
    parser.add_argument("--random", type=int, metavar="N", help="measure N records drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--out", metavar="DIR", help="also write stats.json and stats.html there")
    _tokenizing(parser)
    options, stages = _parsed(parser, argv)
    from jaxvlm.data.sources import open_source
    from jaxvlm.data.tools.stats import measure, summary, summary_table
    from jaxvlm.data.tools.stats_page import stats_page

    for k, stage in enumerate(stages):
        sources = [(config, open_source(config, log=print)) for config in stage.sources]
        measured = measure(sources, _viewer(stage), options.random, options.seed)
        made = summary(measured, stage.prompt.length, stage.data.tiles_per_row)
        print("\n" * bool(k) + f"{stage.name}: {_facts(stage)}\n\n" + "\n".join(summary_table(made)))
        if made["unusable"]:
            print(f"\n{made['unusable']:,} records are left out: `jaxvlm data verify` says why.")
        if options.out:
            name = "stats" if len(stages) == 1 else f"stats-{stage.name.rsplit(' ', 1)[-1]}"
            folder = Path(options.out)
            _write_lines(folder / f"{name}.json", [json.dumps(made, indent=1)])
            _write_lines(folder / f"{name}.html", [stats_page(stage.name, _facts(stage), made)])
            print(f"\nWritten to {folder / name}.json and .html")
    return 0


def convert(argv: Sequence[str]) -> int:
    """Write a data set as ArrayRecord shards, images inside; goes on where it was stopped."""
    parser = _parser(
        "convert", convert.__doc__, "All records are written, whatever part of them a config uses.", out=True
    )
    parser.add_argument("--shards", type=int, metavar="N", help="default: one for each 8,192 records, about 1 GB")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--quarantine", default="", metavar="FILE", help="leave out the records that this list names")
    parser.add_argument("--skip-bad", action="store_true", help="leave out, and list, what cannot be converted")
    options, stages = _parsed(parser, argv)
    from jaxvlm.data.tools.convert import convert as convert_source

    sources = _each_source(stages)
    if len(sources) > 1 and len({source.name for source in sources}) < len(sources):
        raise ConfigError("Each source gets the folder OUT/NAME, so they need different names; or choose a --stage.")
    for source in sources:
        out = Path(options.out, source.name) if len(sources) > 1 else Path(options.out)
        more = {name: getattr(options, name) for name in ("shards", "workers", "quarantine", "skip_bad")}
        made = convert_source(source, out, **more)
        size = sum(shard["bytes"] for shard in made["shards"]) / 1e6
        files = f"{len(made['shards']):,} shard{'s' * (len(made['shards']) > 1)} of {size:,.1f} MB in all"
        print(f"{out}: {made['records']:,} records with {made['images']:,} images in {files}.")
        if (out / "left_out.jsonl").is_file():
            print(f"{out}/left_out.jsonl lists what was left out, and why.")
        print(f"Check it with: jaxvlm data verify {out}")
    return 0


def _places(sources: list, options: argparse.Namespace) -> list[tuple[int, int]]:
    """(source, record number) of what is to be shown."""
    sizes = [len(source) for _, source in sources]
    if options.sample is not None:
        if len(sources) > 1:
            raise ConfigError(
                f"Say of which source: --source, one of {', '.join(config.name for config, _ in sources)}."
            )
        if not -sizes[0] <= options.sample < sizes[0]:
            raise ConfigError(f"There is no record {options.sample}: {sources[0][0].path} has {sizes[0]:,}, from 0 on.")
        return [(0, options.sample % sizes[0])]
    drawn = random.Random(options.seed).sample(range(sum(sizes)), min(options.random or 3, sum(sizes)))
    places = []
    for number in sorted(drawn):
        k = 0
        while number >= sizes[k]:
            number, k = number - sizes[k], k + 1
        places.append((k, number))
    return places


def _viewer(stage: Chosen):
    from jaxvlm.data.conversation import check_template, get_template
    from jaxvlm.data.table import splicing_for
    from jaxvlm.data.tiles import tiling
    from jaxvlm.data.tokenizer import Tokenizer
    from jaxvlm.data.tools.samples import Viewer

    if not stage.prompt.tokenizer:
        get_template(stage.prompt.template)
        return Viewer(stage.prompt.template, stage.prompt.layout)
    tokenizer = Tokenizer(stage.prompt.tokenizer)
    check_template(tokenizer, stage.prompt.template)
    splicing = splicing_for(stage.prompt, tokenizer, tiling(stage.model, stage.prompt), stage.data.tiles_per_row)
    return Viewer(stage.prompt.template, stage.prompt.layout, tokenizer, splicing)


def _facts(stage: Chosen) -> str:
    """How the records are seen, in a line."""
    prompt = stage.prompt
    if not prompt.tokenizer:
        return f"Template {prompt.template}; no tokenizer (--tokenizer, or --config)."
    return f"Template {prompt.template}, images {prompt.transform}, layout {prompt.layout}, length {prompt.length:,}."


# -------------------------------------------------------------------------------------------------------- what is chosen


def _parser(verb: str, about: str | None, more: str = "", out: bool = False) -> argparse.ArgumentParser:
    where = " OUT" * out
    usage = f"jaxvlm data {verb} (PATH{where} --images FOLDER | --config CONFIG [--stage NAME]{where}) [options]"
    parser = argparse.ArgumentParser(
        prog=f"jaxvlm data {verb}", usage=usage, description=f"{about} {more}", allow_abbrev=False
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"a data set{' and the folder to write' * out}")
    parser.set_defaults(takes_out=out)
    parser.add_argument(
        "--images", default="", metavar="FOLDER", help="what its image names are relative to (default: .)"
    )
    parser.add_argument("--config", metavar="CONFIG", help="take the sources of this config, and its settings")
    parser.add_argument("--stage", metavar="NAME", help="one stage of the config (default: all; inspect: the last)")
    return parser


def _tokenizing(parser: argparse.ArgumentParser) -> None:
    """Options that say how to make tokens of a PATH."""
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="with a tokenizer.json, to count tokens")
    parser.add_argument("--template", default="vicuna_v1", metavar="NAME", help="default: vicuna_v1")


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[Chosen]]:
    """The options, and the stages that are meant; of a PATH a single one."""
    options, overrides = parser.parse_known_intermixed_args(argv)
    strange = [arg for arg in overrides if not arg.startswith("--config.") or not options.config]
    if strange:
        raise ConfigError(f"Unknown argument '{strange[0]}'. `{parser.prog} --help` lists what there is.")
    wanted = [*([] if options.config else ["PATH"]), *(["OUT"] if options.takes_out else [])]
    if len(options.paths) != len(wanted):
        missing = " and ".join(wanted) or "no PATH beside --config"
        raise ConfigError(
            f"Give {missing}{' (or --config CONFIG)' * (not options.config)}. `{parser.prog} --help` says more."
        )
    options.out = options.paths.pop() if options.takes_out else getattr(options, "out", None)
    if options.config:
        return options, _stages(options, overrides)
    if options.stage:
        raise ConfigError("--stage goes with --config.")
    (path,) = options.paths
    source = SourceConfig(name=Path(path).name.split(".")[0], path=path, images=options.images or ".")
    prompt = PromptConfig(
        tokenizer=getattr(options, "tokenizer", ""), template=getattr(options, "template", "vicuna_v1")
    )
    return options, [Chosen(source.name, (source,), prompt, ModelConfig(), DataConfig(sources=(source,)), 0)]


def _stages(options: argparse.Namespace, overrides: list[str]) -> list[Chosen]:
    from jaxvlm.data.assets import resolve_assets
    from jaxvlm.main import load_config

    for name, unset in (("images", ""), ("tokenizer", ""), ("template", "vicuna_v1")):
        if getattr(options, name, unset) != unset:
            raise ConfigError(f"--{name} goes with a PATH; with --config write --config.KEY=VALUE.")
    config = load_config(options.config, overrides)
    stages = [stage for stage in config.stages if options.stage in (None, stage.name)]
    if not stages:
        names = ", ".join(repr(stage.name) for stage in config.stages) or "none"
        raise ConfigError(f"There is no stage '{options.stage}' in {options.config}; its stages are {names}.")
    prompt = resolve_assets(config.prompt)  # the weights are not asked for
    return [_chosen(stage, prompt, config) for stage in map(resolve_assets, stages)]


def _chosen(stage: StageConfig, prompt: PromptConfig, config: RunConfig) -> Chosen:
    changes = {key: getattr(stage.data, key) for key in ("template", "transform", "length")}
    prompt = dataclasses.replace(prompt, **{key: value for key, value in changes.items() if value is not None})
    return Chosen(
        f"{config.name}, stage {stage.name}", stage.data.sources, prompt, config.model, stage.data, config.seed
    )


def _each_source(stages: list[Chosen]) -> list[SourceConfig]:
    """The sources of all stages, each file once."""
    return list({(s.path, s.images): s for stage in stages for s in stage.sources}.values())


def _write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "verify": verify,
    "inspect": inspect,
    "stats": stats,
    "convert": convert,
}


def main(argv: Sequence[str]) -> int:
    """Runs a verb of `jaxvlm data` and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] not in VERBS:
        raise ConfigError(f"There is no `jaxvlm data {argv[0]}`. There are: {', '.join(VERBS)}.")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # records hold characters that a terminal may not know
    return VERBS[argv[0]](argv[1:])
