"""Checks the configuration of the main job before any process starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.app import schema
from experiments.harness.settings import ConfigError, check_keys, unknown_key
from resist_lightning.models import SECTIONS_OF_DEPTH


def check_train(cfg: DictConfig, *, sweep: bool = False) -> None:
    """Check everything that ``train.py`` will use.

    Args:
        cfg: the composed configuration.
        sweep: whether it is one job of a sweep.

    Raises:
        ConfigError: at the first value that is impossible.
    """
    check_keys(cfg, schema.Train, "")
    check_keys(cfg.trainer, schema.Trainer, "trainer")
    check_keys(cfg.optimizer, schema.Optimizer, "optimizer")
    for section, known in (("strategy", schema.STRATEGIES), ("model", schema.MODELS), ("data", schema.DATA)):
        _check_by_target(cfg, section, known)
    _check_targets(cfg.callbacks, "callbacks")
    _check_targets(cfg.logger, "logger")
    _check_workers(cfg)
    _check_blocks(cfg)
    _check_neurons(cfg)
    _check_stages(cfg)
    _check_start(cfg, sweep)
    _check_steps(cfg)


def check_evaluate(cfg: DictConfig, *, sweep: bool = False) -> None:
    """Check everything that ``evaluate.py`` is told directly; the rest comes from the run.

    Raises:
        ConfigError: at the first value that is impossible.
    """
    if OmegaConf.is_missing(cfg, "ckpt_path"):
        raise ConfigError("ckpt_path is missing: name a checkpoint file, ckpt_path=RUN_DIR/checkpoints/last.ckpt")
    check_keys(cfg, schema.Evaluate, "")
    _check_by_target(cfg, "strategy", schema.STRATEGIES)
    if is_plain(cfg.strategy) and cfg.devices > 1:
        raise ConfigError(f"devices={cfg.devices}: strategy=single uses one process; set devices=1 or strategy=resist")


def is_plain(strategy: DictConfig) -> bool:
    """Whether this is Lightning's own training in one process."""
    return schema.STRATEGIES[strategy._target_] is schema.Plain


def _check_by_target(cfg: DictConfig, section: str, known: Mapping[str, type]) -> None:
    node = cfg[section]
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target not in known:
        raise ConfigError(f"{section}._target_={target}: must be one of {', '.join(known)}; choose by {section}=NAME")
    if OmegaConf.is_missing(node, "folder"):
        raise ConfigError(f"{section}.folder is missing: name the folder of the images, {section}.folder=PATH")
    called = f"strategy={schema.STRATEGY_NAMES[target]}" if section == "strategy" else ""
    check_keys(node, known[target], section, called)


def _check_targets(section: Any, name: str) -> None:
    if section is None:
        return
    if not isinstance(section, DictConfig):
        raise ConfigError(f"{name}={section}: must be a group of named entries; choose by {name}=NAME")
    for key, node in section.items():
        if node is None:
            continue
        if not (isinstance(node, DictConfig) and node.get("_target_")):
            raise ConfigError(f"{name}.{key}={node}: must have a _target_, or be null to leave it out")
        _check_arguments(node, f"{name}.{key}")


def _check_arguments(node: DictConfig, prefix: str) -> None:
    """Callbacks and loggers may be anyone's: their keys must be arguments of what they name."""
    try:
        arguments = inspect.signature(get_object(node._target_)).parameters
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}._target_={node._target_}: cannot be imported ({error})") from error
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return
    for key in map(str, node):
        if not key.startswith("_") and key not in arguments:
            raise ConfigError(unknown_key(f"{prefix}.{key}", prefix, node, arguments))


def _check_workers(cfg: DictConfig) -> None:
    workers = cfg.trainer.devices * cfg.trainer.num_nodes
    if workers > 1 and is_plain(cfg.strategy):
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices} with strategy=single: one process is one worker; "
            "set trainer.devices=1, or strategy=resist, local_sgd or ddp"
        )
    shared = cfg.strategy.get("parallel_devices")
    if shared is not None and len(shared) != cfg.trainer.devices:
        raise ConfigError(
            f"strategy.parallel_devices={list(shared)}: must name one device for each of the "
            f"trainer.devices={cfg.trainer.devices} workers"
        )
    if shared is None and cfg.trainer.accelerator in ("auto", "gpu", "cuda"):
        found = torch.cuda.device_count()
        if found and cfg.trainer.devices > found:
            raise ConfigError(
                f"trainer.devices={cfg.trainer.devices}: this host has {found} GPU(s); set "
                f"trainer.devices={found} or trainer.accelerator=cpu, or let workers share a GPU by "
                "strategy.parallel_devices=[cuda:0,cuda:0]"
            )


def _check_blocks(cfg: DictConfig) -> None:
    least = cfg.strategy.get("min_blocks")
    if least is None or cfg.strategy.get("blocks") is not None or "depth" not in cfg.model:
        return
    blocks = SECTIONS_OF_DEPTH[cfg.model.depth][2] - 1
    if least > blocks:
        raise ConfigError(
            f"strategy.min_blocks={least}: model.depth={cfg.model.depth} has {blocks} blocks to partition; "
            f"set strategy.min_blocks={blocks} or less, or take a deeper model"
        )


def _check_neurons(cfg: DictConfig) -> None:
    strategy, model = (kinds[section._target_] for kinds, section in _kinds(cfg))
    if model is schema.MLP and strategy is schema.ResIST:
        raise ConfigError(
            "model=mlp with strategy=resist: a fully connected network has no residual blocks; take strategy=ist, which "
            "divides its hidden neurons, or model=preact"
        )
    if strategy is schema.IST and cfg.strategy.layers is None and cfg.model._target_ in schema.IMAGE_MODELS:
        raise ConfigError(
            "strategy=ist divides the hidden layers of fully connected networks: take model=mlp, or strategy=resist for "
            "this residual network, or name layers of it, e.g. strategy.layers=*.conv1"
        )
    workers = cfg.trainer.devices * cfg.trainer.num_nodes
    if model is schema.MLP and strategy is schema.IST and workers > cfg.model.width:
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices}: model.width={cfg.model.width} has no neuron of each hidden layer for "
            f"each of {workers} workers; set trainer.devices={cfg.model.width} or less, or take a wider model"
        )


def _check_stages(cfg: DictConfig) -> None:
    strategy, model = (kinds[section._target_] for kinds, section in _kinds(cfg))
    if strategy is schema.AuxNet and model is schema.MLP:
        raise ConfigError(
            "model=mlp with strategy=auxnet: the auxiliary networks make images; take model=preact, or strategy=ist, which "
            "divides hidden neurons"
        )


def _kinds(cfg: DictConfig) -> tuple[tuple[Mapping[str, type], DictConfig], ...]:
    return (schema.STRATEGIES, cfg.strategy), (schema.MODELS, cfg.model)


def _check_start(cfg: DictConfig, sweep: bool) -> None:
    if sweep and cfg.strategy.get("start_method") == "popen" and cfg.trainer.devices > 1:
        raise ConfigError(
            "strategy.start_method=popen: re-runs the command line in every worker, and in a sweep each "
            "worker would run the whole sweep; set strategy.start_method=spawn"
        )


def _check_steps(cfg: DictConfig) -> None:
    if cfg.trainer.max_epochs is None and cfg.trainer.max_steps == -1:
        raise ConfigError("trainer.max_epochs=null with trainer.max_steps=-1: would never end; set one of the two")
