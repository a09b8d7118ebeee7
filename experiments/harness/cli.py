"""The command line of every experiment: `STUDY ... key=value size=full|smoke out=FOLDER`, checked before any work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.harness.settings import ConfigError, Failure, check_keys, option

BAD_CONFIG, INTERRUPTED = 2, 130  # exit codes


@dataclass(kw_only=True)
class Command:
    """The options of an experiment; `size` changes several at once. `__post_init__` checks them against each other."""

    size: str = option("full", "smoke runs in seconds")
    out: str = option(hint="folder of the result files")

    def take(self, *names: str) -> dict[str, Any]:
        """Some options, for a record."""
        return {name: getattr(self, name) for name in names}


Options = TypeVar("Options", bound=Command)


def read(arguments: Sequence[str], schema: type[Options], studies: Sequence[str] = ()) -> tuple[list[str], Options]:
    """Names of studies (all of them if none is given), and the options."""
    words = [argument for argument in arguments if "=" not in argument]
    for word in words:
        if word not in studies:
            known = f"no such study; choose from {', '.join(studies)}, or" if studies else "is not an option;"
            raise ConfigError(f"{word}: {known} write key=value, for example size=smoke")
    items = [item for item in fields(schema) if item.name != "size"]
    sizes = {"full": None}
    for item in items:
        sizes |= dict.fromkeys(item.metadata["sizes"])
    try:
        given = OmegaConf.from_dotlist([argument for argument in arguments if "=" in argument])
        size = str(given.get("size", "full"))
        usual = {item.name: item.metadata["sizes"].get(size, item.metadata["full"]) for item in items}
        cfg: Any = OmegaConf.merge({"size": size, **usual}, given)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(f"{' '.join(arguments)}: cannot be read ({error}); write key=value") from error
    if size not in sizes:
        raise ConfigError(f"size={size}: must be one of {', '.join(sizes)}")
    for item in items:
        if OmegaConf.is_missing(cfg, item.name):
            raise ConfigError(f"{item.name} is missing: {item.metadata['limit'].hint}")
    check_keys(cfg, schema, "")
    # Types and limits hold now, so that `__post_init__` can compare the options with each other.
    options = schema(**OmegaConf.to_container(cfg))
    _check_out(options)
    return [name for name in studies if name in words or not words], options


def _check_out(options: Command) -> None:
    """Check that results can be written to `out`, and that a smoke run does not overwrite the full record."""
    out = Path(options.out)
    # The folder need not exist yet; the nearest one above it that does must be a folder.
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"out={out}: {existing} is a file, not a folder; choose another, out=FOLDER")
    if "smoke" in options.size and out.resolve().name == "results":
        raise ConfigError(f"out={out}: a smoke run must not be stored among the results; set out=FOLDER")


def run(
    program: Callable[[list[str], Options], object], schema: type[Options], usage: str | None,
    studies: Sequence[str] = (), arguments: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Read the command line and run the program; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(usage)
        return 0
    with readable_errors():
        names, options = read(given, schema, studies)
        # A ConfigError that only the work can find, such as a folder without images, is one line too.
        try:
            return int(program(names, options) or 0)  # type: ignore[call-overload]
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: nothing is left behind; the same command resumes from what was measured")
    return INTERRUPTED


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and exit code 2, without a traceback."""
    try:
        yield
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the process with exit code 2 and the message on one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_CONFIG)
