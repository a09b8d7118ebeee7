"""A user's program for Ray, for tests: ``python -m tests.engines.on_ray FOLDER``. Writes its results to FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import ray
import ray.train
import ray.tune
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchConfig, TorchTrainer

from resist_lightning.strategies import ray as ours
from tests.engines.ray_training import METHODS, data, fit
from tests.helpers.plain import Classifier


def each_method(config: dict[str, Any]) -> None:
    """Train with all strategies, one after the other, in two workers of Ray; and write their refusals."""
    rank = ray.train.get_context().get_world_rank()
    for name in METHODS:
        strategy = getattr(ours, f"Ray{name}Strategy")
        state = fit(name, strategy, Path(config["folder"], f"{name}-{rank}"), plugins=[RayLightningEnvironment()])
        torch.save(state, Path(config["folder"], f"{name}-{rank}.pt"))
    if rank == 0:
        Path(config["folder"], "refusals.json").write_text(json.dumps(refusals()))


def refusals() -> dict[str, str]:
    """Error messages for a user, by mistake."""
    told = {}
    for options in ({"start_method": "spawn"}, {"snapshots": "/shared"}, {"process_group_backend": "nccl"}):
        try:
            ours.RayResISTStrategy(**options)
        except ValueError as error:
            told[next(iter(options))] = str(error)
    try:
        fit("ResIST", ours.RayResISTStrategy, Path(tempfile.gettempdir()))
    except RuntimeError as error:
        told["environment"] = str(error)
    try:
        fit("ResIST", lambda **options: ours.RayResISTStrategy(devices_per_worker=3, **options), Path("/"),
            plugins=[RayLightningEnvironment()])  # fmt: skip
    except ValueError as error:
        told["members"] = str(error)
    return told


class Die(L.Callback):
    """Kills its worker once, in the middle of a round, when Ray knows of a checkpoint."""

    def __init__(self, known: Path, mark: Path) -> None:
        self._known = known
        self._mark = mark

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank != 1 or trainer.current_epoch != 1 or batch_idx != 1 or self._mark.exists():
            return
        deadline = time.monotonic() + 60
        while not self._known.exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # Ray polls the workers for reports
        self._mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def dies_once(config: dict[str, Any]) -> None:
    """Train ResIST in two workers, of which one is killed; Ray restarts them."""
    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    checkpoint = ray.train.get_checkpoint()
    resumed = ""
    if checkpoint is not None:
        resumed = str(Path(checkpoint.to_directory(), RayTrainReportCallback.CHECKPOINT_NAME))
        (folder / f"resumed-{rank}").touch()
    die = Die(folder / "ray" / "dies" / "checkpoint_manager_snapshot.json", folder / "died")
    state = fit("ResIST", ours.RayResISTStrategy, folder, resumed or None,
                plugins=[RayLightningEnvironment()], callbacks=[RayTrainReportCallback(), die])  # fmt: skip
    torch.save(state, folder / f"dies-{rank}.pt")


def reports_loss(config: dict[str, Any]) -> None:
    """A training of a sweep."""
    trainer = L.Trainer(
        strategy=ours.RayResISTStrategy(local_steps=config["local_steps"], min_blocks=1),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback()],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    prepare_trainer(trainer).fit(Classifier(), data(), data())


def sweep(folder: Path) -> list[dict[str, float]]:
    """A sweep over local steps by Ray Tune: each trial is a program that starts two workers."""

    def trial(config: dict[str, Any]) -> None:
        name = f"local_steps={config['local_steps']}"
        result = torch_trainer(reports_loss, config, RunConfig(name=name, storage_path=str(folder / "ray"))).fit()
        ray.tune.report({"loss": result.metrics["val/loss"]})

    tuner = ray.tune.Tuner(
        trial,
        param_space={"local_steps": ray.tune.grid_search([2, 12])},
        tune_config=ray.tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=1),
        run_config=ray.tune.RunConfig(name="sweep", storage_path=str(folder / "ray")),
    )
    return [{"local_steps": each.config["local_steps"], "loss": each.metrics["loss"]} for each in tuner.fit()]


def torch_trainer(loop: Any, config: dict[str, Any], run_config: RunConfig) -> TorchTrainer:
    return TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=run_config,
    )


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp") as own:  # paths of sockets in it must be short
        ray.init(
            num_cpus=3,  # two workers, and a trial of the sweep that waits for them
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            _temp_dir=own,
            runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
        )
        try:
            config, storage = {"folder": str(folder)}, str(folder / "ray")
            torch_trainer(each_method, config, RunConfig(name="methods", storage_path=storage)).fit()
            failures = FailureConfig(max_failures=1)
            torch_trainer(
                dies_once, config, RunConfig(name="dies", storage_path=storage, failure_config=failures)
            ).fit()
            (folder / "sweep.json").write_text(json.dumps(sweep(folder)))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
