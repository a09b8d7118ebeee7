"""Evaluates a checkpoint: by default as the plain LightningModule, without this package's strategy.

python experiments/evaluate.py ckpt_path=RUN_DIR/checkpoints/last.ckpt
python experiments/evaluate.py ckpt_path=RUN_DIR/checkpoints/last.ckpt strategy=resist devices=2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pickle import UnpicklingError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also in spawned workers, which import this file

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.app.build import (
    build_data,
    build_module,
    build_strategy,
    check_evaluate,
    is_plain,
    refused_by_lightning,
    strategy_name,
)
from experiments.app.launch import check_command_line
from experiments.app.quiet import hush
from experiments.harness.cli import readable_errors
from experiments.harness.settings import ConfigError
from experiments.trainers import quiet_trainer
from resist_lightning.errors import first_line

hush()


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        check_evaluate(cfg)
        checkpoint = Path(cfg.ckpt_path)
        if not checkpoint.is_file():
            raise ConfigError(f"ckpt_path={checkpoint}: no such file; name one of RUN_DIR/checkpoints/*.ckpt")
        trained = run_config(checkpoint, cfg.run_dir)
        # The machine may be another one than that of the training.
        trained.trainer.accelerator = cfg.accelerator
        trained.trainer.devices, trained.trainer.num_nodes = cfg.devices, 1
        strategy = None if is_plain(cfg.strategy) else own_strategy(cfg.strategy, trained.strategy)
        L.seed_everything(cfg.seed, workers=True)
        data = build_data(trained.data)
        module = build_module(trained, data)
        metrics = evaluate(module, data, trained, checkpoint=checkpoint, strategy=strategy, split=cfg.split)
        name = strategy_name(cfg.strategy)
        line = {"checkpoint": str(checkpoint), "strategy": name, "split": cfg.split, **metrics}
        Path(cfg.output_dir, "evaluation.json").write_text(json.dumps(line, indent=1) + "\n")
        accuracy, loss = metrics["accuracy"], metrics["loss"]
        print(f"{cfg.split} accuracy {accuracy:.4f}, loss {loss:.4f} ({name}): {checkpoint}")


def run_config(place: Path, run_dir: str | None = None) -> DictConfig:
    """The configuration that a checkpoint, or a folder of checkpoints, was trained with."""
    folders = [Path(run_dir)] if run_dir else list(place.resolve().parents)
    for folder in folders:
        stored = folder / ".hydra" / "config.yaml"
        if stored.is_file():
            loaded = OmegaConf.load(stored)
            assert isinstance(loaded, DictConfig)
            return loaded
    raise ConfigError(
        f"no .hydra/config.yaml in {folders[0] if run_dir else f'a folder above {place}'}: "
        "name the folder of the training, run_dir=RUN_DIR"
    )


def evaluate(
    module: L.LightningModule,
    data: L.LightningDataModule,
    cfg: DictConfig,
    *,
    checkpoint: Path | None,
    strategy: DictConfig | None = None,
    split: str = "test",
) -> dict[str, float]:
    """``accuracy`` (0 to 1) and ``loss`` of the full model.

    Args:
        module: the plain module.
        data: the data module.
        cfg: the configuration of the training; accelerator, devices and limits are taken from it, but not validations
            that are switched off.
        checkpoint: a file whose weights are loaded; None takes the module as it is.
        strategy: the strategy to evaluate under; None for one plain process, which needs no more than Lightning.
        split: ``test`` or ``val``.
    """
    if strategy is None and checkpoint is not None:
        load_weights(module, checkpoint)
    same = ("accelerator", "precision", "limit_test_batches", "limit_val_batches", "fast_dev_run")
    options = {key: cfg.trainer[key] for key in same}
    if options["limit_val_batches"] == 0:
        options["limit_val_batches"] = None
    devices = 1 if strategy is None else cfg.trainer.devices
    if strategy is not None:
        options["num_nodes"] = cfg.trainer.num_nodes
    with refused_by_lightning(f"accelerator={cfg.trainer.accelerator} with devices={devices}"):
        trainer = quiet_trainer("auto" if strategy is None else build_strategy(strategy), devices, **options)
    run = trainer.test if split == "test" else trainer.validate
    path = str(checkpoint) if strategy is not None and checkpoint is not None else None
    (metrics,) = run(module, datamodule=data, ckpt_path=path, verbose=False)
    return {"accuracy": metrics[f"{split}/acc"], "loss": metrics[f"{split}/loss"]}


def load_weights(module: L.LightningModule, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into the plain module."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ConfigError(
            f"ckpt_path={checkpoint}: is no checkpoint of the network of this run ({type(error).__name__}: "
            f"{first_line(str(error))}); name one of RUN_DIR/checkpoints/*.ckpt"
        ) from error


def own_strategy(wanted: DictConfig, trained: DictConfig) -> DictConfig:
    """The strategy of the training, with the settings that this command line changes."""
    if wanted._target_ != trained._target_:
        asked, own = map(strategy_name, (wanted, trained))
        raise ConfigError(f"strategy={asked}: this run was trained with {own}; set strategy={own} or single")
    # Only settings named on this command line: the others in its section are defaults, not the training's.
    merged = trained.copy()
    for override in HydraConfig.get().overrides.task:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("strategy."):
            OmegaConf.update(merged, key.removeprefix("strategy."), OmegaConf.select(wanted, key.partition(".")[2]))
    return merged


if __name__ == "__main__":
    check_command_line("evaluate", check_evaluate)
    main()
