"""What config files are written with: their argument, and the `ConfigDict` that command-line overrides need."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from jaxvlm.config import ConfigError, RunConfig, build


def complete(values: dict, cls: type = RunConfig) -> Any:
    """A config file's values with every default filled in, as the `ConfigDict` that command-line overrides need.

    Raises `ConfigError` as `build` does, so a misspelt key in a config file is caught before any override is read.
    """
    return _config_dict(build(cls, values))


def _config_dict(config: Any) -> Any:
    from ml_collections import ConfigDict, config_dict

    hints = typing.get_type_hints(type(config))
    result = ConfigDict()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = [_config_dict(part) for part in value]  # a list, so that `stages[1]` can be overridden in place
        elif value is None:
            kind = next(option for option in typing.get_args(hints[item.name]) if option is not type(None))
            value = config_dict.placeholder(kind)
        result[item.name] = value
    return result


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """Reads a config file's argument: `'llm=13b,lora'` with `llm=('7b', '13b'), lora=False` gives `.llm`, `.lora`.

    A tuple lists the choices, the default first. Raises `ConfigError` for a name that has no default, a value that is no
    choice, or one that its default's type cannot read.
    """
    choices = {key: value for key, value in defaults.items() if isinstance(value, tuple)}
    defaults |= {key: value[0] for key, value in choices.items()}
    result = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, given, text = part.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"The config takes no argument '{key}'.{hint} It takes: {', '.join(defaults)}.")
        kind = type(defaults[key])
        if kind is bool:
            result[key] = text.lower() not in ("0", "false", "no") if given else True
        elif not given:
            raise ConfigError(f"The config's argument '{key}' needs a value, as in '{key}={defaults[key]}'.")
        else:
            try:
                result[key] = kind(text)
            except ValueError:
                raise ConfigError(f"The config's argument '{key}' must be {kind.__name__}, not '{text}'.") from None
        if key in choices and result[key] not in choices[key]:
            raise ConfigError(
                f"The config's argument '{key}' must be one of {', '.join(map(str, choices[key]))}, not '{text}'."
            )
    return types.SimpleNamespace(**result)
