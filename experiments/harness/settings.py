"""Types and limits of options, and the one-line message for a value outside them."""

from __future__ import annotations

import copy
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

BOUNDS: dict[str, tuple[str, Callable[[Any, float], bool]]] = {
    "least": ("at least", operator.ge), "above": ("above", operator.gt),
    "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip
WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "NoneType": "null"}


class ConfigError(ValueError):
    """A configuration that cannot run. One line: key, value, limit, way out."""


class Failure(RuntimeError):
    """An experiment that could not be completed, with the reason as far as it is known."""


@dataclass(frozen=True)
class Limit:
    """The limits of a value, or of each entry of a list, besides its type; ``hint`` is the way out."""

    bounds: Mapping[str, float]
    choices: tuple[Any, ...] = ()
    hint: str = ""
    empty: bool = False  # whether a list may have no entries
    repeats: bool = False  # whether a list may have an entry twice

    def allows(self, value: Any) -> bool:
        if self.choices and value not in self.choices:
            return False
        return all(BOUNDS[name][1](value, bound) for name, bound in self.bounds.items())

    def in_words(self, hint: Any) -> str:
        """``must be a whole number, at least 1 (50 is the default)``."""
        kind = f"one of {', '.join(map(str, self.choices))}" if self.choices else type_in_words(hint)
        limits = [f"{BOUNDS[name][0]} {bound:g}" for name, bound in self.bounds.items()]
        return f"must be {', '.join([kind, *limits])}" + (f" ({self.hint})" if self.hint else "")


def option(
    full: Any = MISSING,
    hint: str = "",
    *,
    choices: Iterable[Any] = (),
    empty: bool = False,
    repeats: bool = False,
    **more: Any,
) -> Any:
    """A field of a dataclass of options.

    Args:
        full: its value by default.
        hint: the way out, in messages.
        choices: all values that it may have; of a list, each entry.
        empty: whether a list may have no entries.
        repeats: whether a list may have an entry twice.
        more: bounds (``least``, ``above``, ``most``, ``below``), and values by size, such as ``smoke=2``.
    """
    bounds = {name: more.pop(name) for name in BOUNDS if name in more}
    metadata = {"limit": Limit(bounds, tuple(choices), hint, empty, repeats), "sizes": more, "full": full}
    return field(default_factory=lambda: copy.copy(full), metadata=metadata)


def check_keys(section: Mapping[str, Any], expected: type, prefix: str) -> None:
    """Check the keys, types and limits of one section against a dataclass whose fields are :func:`option`."""
    known = {item.name: item for item in fields(expected)}
    hints = get_type_hints(expected)
    for key in map(str, section):
        full_key = f"{prefix}.{key}" if prefix else key
        if key not in known:
            raise ConfigError(unknown_key(full_key, section, known, prefix or "the configuration"))
        check_value(full_key, section, key, hints[key], known[key].metadata.get("limit", Limit({})))
    missing = [key for key in known if key not in section]
    if missing:
        raise ConfigError(f"{prefix or 'the configuration'} lacks {', '.join(missing)}")


def check_value(full_key: str, section: Mapping[str, Any], key: str, hint: Any, limit: Limit) -> None:
    """Check one value of a section against a type and a limit."""
    try:
        value = section[key]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{full_key}: cannot be resolved ({error})") from error
    if isinstance(value, DictConfig):
        return  # a section: its own schema checks it
    shown = f"{full_key}={_shown(value)}"
    if get_origin(hint) is list:
        _check_list(shown, value, get_args(hint)[0], limit)
        return
    typed = _typed(value, hint, f"{shown}: {limit.in_words(hint)}")
    if typed is not None and not limit.allows(typed):
        raise ConfigError(f"{shown}: {limit.in_words(hint)}")


def _check_list(shown: str, value: Any, hint: Any, limit: Limit) -> None:
    if not isinstance(value, ListConfig) or not (value or limit.empty):
        raise ConfigError(f"{shown}: must be a list of one or more entries, each {limit.in_words(hint)}; write [A,B]")
    if len(set(value)) < len(value) and not limit.repeats:
        raise ConfigError(f"{shown}: an entry appears twice; list each once")
    for entry in value:
        problem = f"{shown}: {entry!r} {limit.in_words(hint)}"
        # Hydra takes true for the number 1.
        if isinstance(entry, bool) or not limit.allows(_typed(entry, hint, problem)):
            raise ConfigError(problem)


def _typed(value: Any, hint: Any, problem: str) -> Any:
    """The value, converted or refused as Hydra does: a dataclass with one field of this type knows how."""
    one_value = make_dataclass("OneValue", [("value", hint, field(default=MISSING))])
    try:
        return OmegaConf.merge(OmegaConf.structured(one_value), {"value": value})["value"]
    except OmegaConfBaseException as error:
        raise ConfigError(problem) from error


def type_in_words(hint: Any) -> str:
    """``a whole number or null``."""
    members = get_args(hint) or (hint,)
    return " or ".join(WORDS.get(getattr(member, "__name__", str(member)), str(member)) for member in members)


def unknown_key(full_key: str, section: Mapping[str, Any], known: Iterable[str], called: str) -> str:
    """The message with the known keys, and the closest one."""
    prefix, _, key = full_key.rpartition(".")
    visible = [name for name in known if not name.startswith("_") and name != "object"]
    close = difflib.get_close_matches(key, visible, n=1)
    suggestion = f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""
    return f"{full_key}={_shown(section[key])}: unknown key; {called} has {', '.join(visible) or 'no settings'}{suggestion}"


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
