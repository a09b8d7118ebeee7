"""Settings of the experiments: what a value may be, and one line that says what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot run. One line: key, value, limit, way out."""


def check_keys(section: Mapping[str, Any], expected: type, prefix: str, called: str = "") -> None:
    """Check the keys, types and limits of one section against a dataclass.

    Args:
        section: the values.
        expected: a dataclass whose fields are :func:`limited`.
        prefix: name of the section in messages; empty for the root.
        called: what has these keys, in messages; the section's name by default.

    Raises:
        ConfigError: an unknown key, a missing key, a wrong type or a value outside its limits.
    """
    known = {item.name: item for item in fields(expected)}
    hints = get_type_hints(expected)
    for key in map(str, section):
        full_key = f"{prefix}.{key}" if prefix else key
        if key not in known:
            raise ConfigError(unknown_key(full_key, prefix, section, known, called))
        _check_value(full_key, section, key, known[key], hints[key])
    missing = [key for key in known if key not in section]
    if missing:
        raise ConfigError(f"{prefix or 'the configuration'} lacks {', '.join(missing)}")


def _check_value(full_key: str, section: Mapping[str, Any], key: str, item: Field[Any], hint: Any) -> None:
    if key.endswith("_dir") and isinstance(section, DictConfig) and OmegaConf.is_interpolation(section, key):
        return  # it may depend on Hydra's run folder, which does not exist yet
    try:
        value = section[key]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{full_key}: cannot be resolved ({error})") from error
    if isinstance(value, DictConfig):
        if hint is not Any:
            check_keys(value, hint, full_key)
        return
    limit: Limit = item.metadata.get("limit", Limit())
    problem = f"{full_key}={_shown(value)}: must be {_expectation(hint, limit)}{_way_out(limit.hint)}"
    try:
        typed = OmegaConf.merge(OmegaConf.structured(_one_value(hint)), {"value": value})["value"]
    except OmegaConfBaseException as error:
        raise ConfigError(problem) from error
    if typed is not None and not _within(typed, limit):
        raise ConfigError(problem)


def _one_value(hint: Any) -> type:
    """A dataclass with one field ``value`` of this type: OmegaConf converts and refuses as Hydra does."""
    return make_dataclass("OneValue", [("value", hint, field(default=MISSING))])


def _within(value: Any, limit: Limit) -> bool:
    if limit.choices and value not in limit.choices:
        return False
    bounds: list[tuple[float | None, Callable[[Any, float], bool]]] = [
        (limit.least, lambda a, b: a >= b),
        (limit.above, lambda a, b: a > b),
        (limit.most, lambda a, b: a <= b),
        (limit.below, lambda a, b: a < b),
    ]
    return all(bound is None or holds(value, bound) for bound, holds in bounds)


def _expectation(hint: Any, limit: Limit) -> str:
    words = [_type_in_words(hint)]
    if limit.choices:
        words = ["one of " + ", ".join(map(str, limit.choices))]
    names = (
        ("at least", limit.least),
        ("above", limit.above),
        ("at most", limit.most),
        ("below", limit.below),
    )
    words += [f"{name} {bound:g}" for name, bound in names if bound is not None]
    return ", ".join(words)


def _type_in_words(hint: Any) -> str:
    names = {
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "bool": "true or false",
        "NoneType": "null",
        "list": "a list",
    }
    members = getattr(hint, "__args__", (hint,)) if not hasattr(hint, "__origin__") else (hint.__origin__,)
    return " or ".join(names.get(getattr(member, "__name__", str(member)), str(member)) for member in members)


def unknown_key(full_key: str, prefix: str, section: Mapping[str, Any], known: Iterable[str], called: str = "") -> str:
    """The line that says which keys there are, and the closest one."""
    visible = [key for key in known if not key.startswith("_") and key != "object"]
    key = full_key.rpartition(".")[2]
    close = difflib.get_close_matches(key, visible, n=1)
    where = called or prefix or "the configuration"
    suggestion = f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""
    settings = ", ".join(visible) or "no settings"
    return f"{full_key}={_shown(section[key])}: unknown key; {where} has {settings}{suggestion}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _way_out(hint: str) -> str:
    return f" ({hint})" if hint else ""


@dataclass(frozen=True)
class Limit:
    """What a value must be besides its type: ``least`` is allowed, ``above`` not; ``hint`` is the way out."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    hint: str = ""


def limited(**limits: Any) -> Any:
    """A field without default, with a `Limit`."""
    return field(default=MISSING, metadata={"limit": Limit(**limits)})
