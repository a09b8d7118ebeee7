"""Builds strategy, data and module of a configuration before anything starts; a refused value is one line.

A section is checked against the arguments of its own ``_target_``, which may be anyone's: a network or a data module of
the user's own needs no entry here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning as L
import torch
from hydra._internal.utils import _locate  # what hydra.utils.get_object calls, without its line in the log
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from experiments.app import schema
from experiments.app.classifier import LitClassifier
from experiments.data.module import Loading
from experiments.harness.settings import WORDS, ConfigError, Limit, check_keys, check_value, unknown_key
from resist_lightning.comm.members import check_count
from resist_lightning.engine.registry import make_layout
from resist_lightning.models import PreActResNet
from resist_lightning.strategies.base import SubnetStrategy

CONF = Path(__file__).resolve().parents[2] / "conf"
# The classes whose arguments a ``**loading`` or ``**options`` of ours takes.
VARIADIC: dict[str, Any] = {"loading": Loading, "options": PreActResNet}
GIVEN = ("num_classes", "in_channels", "in_features")  # values of the data that a network gets if it has such arguments


def check_train(cfg: DictConfig, *, sweep: bool = False) -> None:
    """Build everything that ``train.py`` (or one job of a sweep) will use, and refuse impossible values."""
    cfg = _with_folder(cfg)
    check_keys(cfg, schema.Train, "")
    check_keys(cfg.trainer, schema.Trainer, "trainer")
    check_keys(cfg.optimizer, schema.Optimizer, "optimizer")
    for section in ("strategy", "model", "data"):
        check_section(cfg[section], section)
    for name in ("callbacks", "logger"):
        _check_entries(cfg[name], name)
    _check_workers(cfg)
    if sweep and cfg.strategy.get("start_method") == "popen" and cfg.trainer.devices > 1:
        raise ConfigError(
            "strategy.start_method=popen: re-runs the command line in every worker, and in a sweep each "
            "worker would run the whole sweep; set strategy.start_method=spawn"
        )
    if cfg.trainer.max_epochs is None and cfg.trainer.max_steps == -1:
        raise ConfigError("trainer.max_epochs=null with trainer.max_steps=-1: would never end; set one of the two")
    if cfg.ckpt_path not in (None, "best", "last") and not Path(str(cfg.ckpt_path)).is_file():
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path}: is not a file; best and last are checkpoints of this training, null tests the "
            "model as the training leaves it"
        )
    strategy = build_strategy(cfg.strategy)
    data = build_data(cfg.data, check=False)
    with torch.device("meta"):
        module = build_module(cfg, data)
    if isinstance(strategy, SubnetStrategy):
        _check_layout(module, strategy, cfg)


def check_evaluate(cfg: DictConfig, *, sweep: bool = False) -> None:
    """Check everything that ``evaluate.py`` is told directly; the rest comes from the run."""
    where = "name a checkpoint file, ckpt_path=RUN_DIR/checkpoints/last.ckpt"
    cfg = _check_beside_run(cfg, schema.Evaluate, "ckpt_path", where)
    if is_plain(cfg.strategy) and cfg.devices > 1:
        raise ConfigError(f"devices={cfg.devices}: strategy=single uses one process; set devices=1 or strategy=resist")


def check_follow(cfg: DictConfig, *, sweep: bool = False) -> None:
    """Check everything that ``follow.py`` is told directly; the rest comes from the run."""
    where = "name the folder of a training's checkpoints, folder=RUN_DIR/checkpoints"
    cfg = _check_beside_run(cfg, schema.Follow, "folder", where)
    _check_entries(cfg.logger, "logger")


def _check_beside_run(cfg: DictConfig, root: type[Any], place: str, where: str) -> DictConfig:
    """Check the keys of a command that uses the files of a run at ``place``."""
    if OmegaConf.is_missing(cfg, place):
        raise ConfigError(f"{place} is missing: {where}")
    cfg = _with_folder(cfg)
    check_keys(cfg, root, "")
    check_section(cfg.strategy, "strategy")
    return cfg


def _with_folder(cfg: DictConfig) -> DictConfig:
    """Set the run folder, which other values may name: before the first job Hydra has none yet."""
    try:
        _ = cfg.output_dir
    except OmegaConfBaseException:
        cfg = cfg.copy()
        cfg.output_dir = "."
    return cfg


def is_plain(strategy: DictConfig) -> bool:
    """Whether this is Lightning's own training in one process."""
    return strategy_name(strategy) == "single"


def strategy_name(strategy: DictConfig) -> str:
    """The strategy's name on the command line: ``resist``."""
    files = {section["_target_"]: name for name, section in files_of("strategy").items()}
    return files.get(strategy._target_, strategy._target_)


def build_strategy(section: DictConfig) -> Any:
    """The strategy for ``Trainer(strategy=...)``."""
    return make(section, "strategy")


def build_data(section: DictConfig, *, check: bool = True) -> Any:
    """The data module; nothing is decoded or downloaded yet, but a folder that cannot be used is refused."""
    data = make(section, "data")
    if check and hasattr(data, "check"):
        try:
            data.check()
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
    return data


def build_module(cfg: DictConfig, data: L.LightningDataModule) -> LitClassifier:
    """The network that fits the data, in a plain LightningModule."""
    wanted = wants(cfg.model)
    for name in ["num_classes", *wanted]:  # the accuracy needs the classes, whatever the network asks for
        if name == "in_channels" and not hasattr(data, name) and hasattr(data, "in_features"):
            raise ConfigError(
                f"model._target_={cfg.model._target_}: is for images, and {type(data).__name__} gives rows of "
                f"{data.in_features} features; take a fully connected model (model=mlp), or images (data=cifar10)"
            )
        try:
            missing = not hasattr(data, name)
        except ValueError as error:  # of a folder whose classes must be counted
            raise ConfigError(f"data: {error}") from error
        if missing:
            raise ConfigError(f"data._target_={cfg.data._target_}: has no {name}; give the data module this attribute")
    net = build_network(cfg.model, {name: getattr(data, name) for name in wanted})
    return LitClassifier(net, data.num_classes, **cfg.optimizer)  # type: ignore[attr-defined]


def wants(section: DictConfig) -> list[str]:
    """The arguments of `GIVEN` that a network has."""
    return [name for name in GIVEN if name in _arguments(section._target_)[0]]


def build_network(section: DictConfig, known: Mapping[str, Any]) -> Any:
    """The network of a section; for arguments that it `wants`, the section's own values come first."""
    return make(section, "model", **{name: known[name] for name in wants(section) if name not in section})


def make(node: DictConfig, key: str, **arguments: Any) -> Any:
    """Instantiate a section; an error of its constructor becomes a ConfigError that names the key."""
    try:
        return instantiate(_own(node, key), _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        said = str(cause if isinstance(cause, ValueError | TypeError) else error)
        named = any(said.startswith(f"{name}=") for name in node)
        raise ConfigError(f"{key}.{said}" if named else f"{key}: {said}") from error


@contextmanager
def refused_by_lightning(said: str) -> Iterator[None]:
    """Turn Lightning's refusal of a trainer's options, such as a GPU that is not there, into a ConfigError."""
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(f"{said}: {error}") from error


def count_workers(strategy: Any, trainer: DictConfig) -> int:
    """Number of workers of a run; in this package's strategies one may be several processes.

    Args:
        strategy: from `build_strategy`, or as the trainer has made it.
        trainer: the section of that name.
    """
    processes = int(trainer.devices * trainer.num_nodes)
    if not isinstance(strategy, SubnetStrategy):
        return processes
    members = strategy.options.members(trainer.devices)
    check_count(members, processes)
    return processes // members


def _check_layout(module: nn.Module, strategy: SubnetStrategy, cfg: DictConfig) -> None:
    """Check that the method can divide this network among the workers."""
    try:
        make_layout(module, strategy.config, count_workers(strategy, cfg.trainer))
    except ValueError as error:
        name = strategy_name(cfg.strategy)
        model = cfg.model._target_.rpartition(".")[2]
        way_out = ""
        if name in ("resist", "ist") and _is_fully_connected(cfg) != (name == "ist"):
            way_out = (
                "; strategy=resist divides residual networks, strategy=ist fully connected ones (model=mlp), and "
                "strategy=auxnet both"
            )
        raise ConfigError(
            f"strategy={name} with {model} and trainer.devices={cfg.trainer.devices}: {error}{way_out}"
        ) from error


def _is_fully_connected(cfg: DictConfig) -> bool:
    """Whether the network asks for the entries of an example, and not for the channels of an image."""
    return "in_features" in _arguments(cfg.model._target_)[0]


def _check_workers(cfg: DictConfig) -> None:
    devices = cfg.trainer.devices
    if devices * cfg.trainer.num_nodes > 1 and is_plain(cfg.strategy):
        raise ConfigError(
            f"trainer.devices={devices} with strategy=single: one process is one worker; "
            "set trainer.devices=1, or strategy=resist, local_sgd or ddp"
        )
    shared = cfg.strategy.get("parallel_devices")
    if shared is not None and len(shared) != devices:
        raise ConfigError(
            f"strategy.parallel_devices={list(shared)}: must name one device for each of the "
            f"trainer.devices={devices} processes"
        )
    found = torch.cuda.device_count() if shared is None and cfg.trainer.accelerator in ("auto", "gpu", "cuda") else 0
    if found and devices > found:
        raise ConfigError(
            f"trainer.devices={devices}: this host has {found} GPU(s); set trainer.devices={found} or "
            "trainer.accelerator=cpu, or let workers share a GPU by strategy.parallel_devices=[cuda:0,cuda:0]"
        )


def _check_entries(section: Any, name: str) -> None:
    """Check callbacks or loggers; null entries are left out."""
    if section is not None and not isinstance(section, DictConfig):
        raise ConfigError(f"{name}={section}: must be a group of named entries; choose by {name}=NAME")
    for key, node in (section or {}).items():
        if node is not None and not (isinstance(node, DictConfig) and node.get("_target_")):
            raise ConfigError(f"{name}.{key}={node}: must have a _target_, or be null to leave it out")
        if node is not None:
            check_section(node, f"{name}.{key}")


def check_section(node: Any, prefix: str) -> None:
    """Check that a section's keys are arguments of its target, and that its values have their types."""
    if not isinstance(node, DictConfig) or not node.get("_target_"):
        raise ConfigError(f"{prefix}={node}: must have a _target_; choose by {prefix}=NAME")
    arguments, anything = _arguments(node._target_, prefix)
    called = f"strategy={strategy_name(node)}" if prefix == "strategy" else prefix
    node = _own(node, prefix)
    for key in map(str, node):
        if key.startswith("_"):
            continue
        if key not in arguments and not anything:
            settings = [name for name in arguments if name not in GIVEN]
            raise ConfigError(unknown_key(f"{prefix}.{key}", node, settings, called))
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{prefix}.{key} is missing: name it, {prefix}.{key}=PATH")
        nested = None if OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(nested, DictConfig) and nested.get("_target_") == "datetime.timedelta":
            check_keys(nested, schema.Duration, f"{prefix}.{key}")
            continue
        if isinstance(nested, DictConfig) and nested.get("_target_"):
            check_section(nested, f"{prefix}.{key}")
            continue
        _check_type(f"{prefix}.{key}", node, key, arguments.get(key, Any))


def _check_type(full_key: str, node: DictConfig, key: str, hint: Any) -> None:
    """Check plain types and choices; the target itself checks other limits."""
    if get_origin(hint) is Literal:
        check_value(full_key, node, key, str, Limit({}, get_args(hint)))
        return
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # Objects made from a _target_, such as a rule for local_steps, are sections of their own.
    members = tuple(member for member in members if not is_dataclass(member))
    plain = members and all(getattr(member, "__name__", "") in WORDS for member in members)
    check_value(full_key, node, key, reduce(or_, members) if plain else Any, Limit({}))


def _arguments(target: str, prefix: str = "model") -> tuple[dict[str, Any], bool]:
    """The arguments of a target with their types, and whether it also takes others."""
    if target == "builtins.str":  # of strategy=single
        return {"object": str}, False
    try:
        made = _locate(target)
        parameters = dict(inspect.signature(made).parameters)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}._target_={target}: cannot be imported ({error})") from error
    hints = _hints(made)
    ours = target.startswith(("experiments.", "resist_lightning."))
    known: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            known[name] = hints.get(name, Any)
        elif ours and name in VARIADIC:
            of_those = _hints(VARIADIC[name])
            known |= {key: hint for key, hint in of_those.items() if key not in ("return", "sections")}
        else:
            return known, True
    return known, False


def _hints(made: Any) -> dict[str, Any]:
    try:
        return get_type_hints(
            made if inspect.isfunction(made) or hasattr(made, "__dataclass_fields__") else made.__init__
        )
    except (NameError, TypeError):
        return {}  # types that exist for a type checker only


def _own(node: DictConfig, prefix: str) -> DictConfig:
    """A section without the defaults of its group that a target of the user's own does not take."""
    files = files_of(prefix) if prefix in ("model", "data") else {}
    if not files or node._target_ in [section["_target_"] for section in files.values()]:
        return node
    arguments, anything = _arguments(node._target_, prefix)
    raw: dict[str, Any] = OmegaConf.to_container(node, resolve=False)  # type: ignore[assignment]
    kept = {}
    for key, value in raw.items():
        # A value that some file of the group has comes from there; any other was given, and is refused if unknown.
        default = any(key in section and section[key] == value for section in files.values())
        if anything or key in arguments or not default:
            kept[key] = value
    made = OmegaConf.create(kept)
    if node._get_parent() is None:
        OmegaConf.resolve(made)
    else:
        made._set_parent(node._get_parent())  # for interpolations
    return made


@cache
def files_of(group: str) -> Mapping[str, dict[str, Any]]:
    """The sections of ``conf/GROUP``, by name."""
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in (CONF / group).glob("*.yaml")}  # type: ignore[misc]
