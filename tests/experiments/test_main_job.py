"""The main job as a user starts it: train, test the full model, report; then evaluate the checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from experiments.app.build import build_data, build_module, count_workers
from experiments.evaluate import evaluate
from experiments.follow import follow
from experiments.harness.settings import ConfigError
from experiments.train import build_trainer, cpu_threads
from resist_lightning import LocalSGDStrategy
from resist_lightning.methods.ist.partition import draw_neurons
from tests.conf.conftest import configuration
from tests.helpers.programs import ROOT, TORCHRUN, run_module, run_program

SMALL = [
    "model.depth=14", "model.width_multiplier=0.125", "threads=1",
    "trainer.accelerator=cpu", "callbacks.progress_bar=null", "logger=csv",
]  # fmt: skip
TINY = [*SMALL, "data.limit=20", "data.limit_test=10", "trainer.max_epochs=1"]
EVALUATED = "checkpoints/evaluations/best.ckpt"
FORKED = "strategy.start_method=fork"


def train(*arguments: str) -> str:
    return run_module("experiments.train", *arguments, timeout=240)


def plain(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a small run in one process."""
    small = [word for word in TINY if not word.startswith("logger=")]
    return configuration("strategy=single", "trainer.devices=1", *small, f"output_dir={folder}", *overrides)


def read(folder: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(("devices_per_worker", "workers"), [(1, 8), (2, 4), ("node", 2)])
def test_workers_of_several_processes_are_counted_once(devices_per_worker: Any, workers: int) -> None:
    """Each process counted as a worker, in the check of the counts of blocks and in run.json."""
    place = OmegaConf.create({"devices": 4, "num_nodes": 2})
    strategy = LocalSGDStrategy(devices_per_worker=devices_per_worker)
    assert count_workers(strategy, place) == workers
    assert count_workers("auto", place) == 8  # not one of ours, such as Lightning's DDP


def check_evaluations(results: dict[str, Any], strategy: str, folder: Path) -> None:
    """Check that the checkpoint is a plain model, and the same model under the strategy."""
    for options in (["strategy=single"], [f"strategy={strategy}", "devices=2", FORKED]):
        where = folder / options[0].partition("=")[2]
        place = [f"ckpt_path={results['checkpoint']}", "accelerator=cpu", f"hydra.run.dir={where}"]
        run_module("experiments.evaluate", *place, *options)
        found = read(where, "evaluation.json")
        assert found["accuracy"] == pytest.approx(results["test"]["accuracy"], abs=1e-6), options
        assert found["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4), options


@pytest.mark.timeout(300)
def test_resist_with_two_workers_learns_the_digits_and_its_checkpoint_is_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = [*SMALL, "strategy.min_blocks=1", "strategy.local_steps=5", "optimizer.lr=0.1", "trainer.max_epochs=4"]
    program = str(ROOT / "experiments" / "train.py")  # its workers are interpreters of their own
    output = run_program([program, *small, f"hydra.run.dir={run}"], tmp_path, timeout=200)
    results = read(run)
    assert results["test"]["accuracy"] > 0.8, output
    assert (results["workers"], results["rounds"], results["local_steps"]) == (2, 17, 84)
    assert 0.5 < results["parameters"]["held_share"] < 1
    assert results["sent_bytes"]["ddp_ratio"] > results["sent_bytes"]["local_sgd_ratio"] > 1
    assert f"{results['test']['accuracy']:.2%}" in output
    assert "has built the whole module" not in output  # of half a megabyte
    for name in ("partition.png", "accuracy.png", "bytes.png", "report.txt", ".hydra/config.yaml", "csv/metrics.csv"):
        assert (run / name).stat().st_size > 0, name
    keys = torch.load(results["checkpoint"], weights_only=True)["state_dict"].keys()
    assert all(key.startswith("net.") for key in keys)
    check_evaluations(results, "resist", tmp_path)


@pytest.mark.timeout(300)
def test_ist_learns_the_digits_and_its_checkpoint_is_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["experiment=ist_digits", "model.width=64", "trainer.max_epochs=6", "callbacks.progress_bar=null", FORKED]
    output = train(*small, "logger=csv", f"hydra.run.dir={run}")
    results, summary = read(run), read(run, "resist_summary.json")
    assert results["test"]["accuracy"] > 0.8, output
    assert (results["workers"], results["rounds"], results["local_steps"]) == (2, 7, 126)
    full, held = (64 * w + w + w + w * w + w + w + 10 * w + 10 for w in (64, 32))
    assert results["parameters"] == {"full": full, "held_by_one_worker": held, "held_share": held / full}
    assert results["sent_bytes"]["ddp_ratio"] > 20 * results["sent_bytes"]["local_sgd_ratio"] > 20
    drawn = [draw_neurons((64, 64), 2, 0, number)[0].held for number in range(7)]
    holders = [[int(neuron in worker_1) for neuron in range(64)] for _, worker_1 in drawn]
    assert summary["neurons"] == {"layer": "net.1", "width": 64, "shown": list(range(64)), "holders": holders}
    for name in ("partition.png", "accuracy.png", "bytes.png"):
        assert (run / name).stat().st_size > 0, name
    check_evaluations(results, "ist", tmp_path)


@pytest.mark.timeout(300)
def test_auxnet_reports_its_stages_and_its_checkpoint_is_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["experiment=auxnet_digits", *SMALL, "strategy.warmup_steps=60", "strategy.check_every_n_steps=20", FORKED]
    output = train(*small, "trainer.max_epochs=3", f"hydra.run.dir={run}")
    results, summary = read(run), read(run, "resist_summary.json")
    assert results["test"]["accuracy"] > 0.3, output
    assert (results["strategy"], results["workers"], results["rounds"]) == ("auxnet", 2, None)
    assert results["local_steps"] == 3 * math.ceil(1293 / 32)  # every worker sees all images
    assert 0.4 < results["parameters"]["held_share"] < 1
    assert len(results["stages"]["names"]) == 2
    assert results["stages"]["mismatch"] == []  # nothing is guessed
    assert results["stages"]["speedup_measured"] > 0
    boundary = math.prod(summary["method"]["shapes"][0])
    assert results["sent_bytes"]["by_kind"]["boundary"] == 3 * 1293 * boundary * 4
    assert results["sent_bytes"]["by_kind"]["output"] == 3 * 1293 * 10 * 4 / 2  # of the last worker to the other
    for name in ("timeline.png", "accuracy.png", "bytes.png"):
        assert (run / name).stat().st_size > 0, name
    assert not (run / "partition.png").exists()
    check_evaluations(results, "auxnet", tmp_path)


@pytest.mark.timeout(300)
def test_the_same_command_runs_the_other_strategies_with_workers(tmp_path: Path) -> None:
    """Without validations: another process evaluates their checkpoints."""
    chosen = ["strategy=local_sgd,ddp", "trainer.devices=2", FORKED, f"hydra.sweep.dir={tmp_path}/sweep"]
    train("-m", *TINY, *chosen, "callbacks=followed", "callbacks.progress_bar=null", "trainer.limit_val_batches=0")
    folders = sorted((tmp_path / "sweep").glob("[01]"))
    found = [read(folder) for folder in folders]
    for folder, results in zip(folders, found, strict=True):
        options = [f"folder={folder}/checkpoints", "accelerator=cpu", f"hydra.run.dir={folder}/follow"]
        output = run_module("experiments.follow", *options)
        steps = results["local_steps"]
        assert re.search(rf"1 models; best val/acc [\d.]+ at step {steps}: .*/evaluations/best.ckpt", output)
        rows = (folder / "follow" / "csv" / "metrics.csv").read_text().splitlines()
        assert f"{steps}" in rows[-1].split(",")
    assert [results["strategy"] for results in found] == ["local_sgd", "ddp"]
    assert [results["sent_bytes"]["measured"] for results in found] == [True, False]
    for results in found:
        assert results["workers"] == 2
        assert results["local_steps"] == math.ceil(90 / 32)
        assert results["parameters"]["held_share"] == 1


def test_the_same_command_runs_one_plain_process_where_another_run_was(tmp_path: Path) -> None:
    """The other run's rounds and bytes were reported, and its last checkpoint tested."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "evaluations").mkdir()
    for name in ("resist_summary.json", "partition.png", "checkpoints/last.ckpt", EVALUATED):
        (tmp_path / "run" / name).write_text("of another run")
    train(*TINY, "trainer.devices=1", "strategy=single", "ckpt_path=last", f"hydra.run.dir={tmp_path}/run")
    results = read(tmp_path / "run")
    assert results["checkpoint"] == str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert not (tmp_path / "run" / "partition.png").exists()
    assert not (tmp_path / "run" / EVALUATED).exists()  # it would be the best one of this run's, too
    assert (results["strategy"], results["workers"], results["sent_bytes"]["training"]) == ("single", 1, 0)
    assert results["local_steps"] == math.ceil(180 / 32)
    assert (tmp_path / "run" / "accuracy.png").exists()


def test_the_holdout_is_evaluated_where_the_training_validates_nothing(tmp_path: Path) -> None:
    """`split=val` ended with "not enough values to unpack" for runs of `callbacks=followed`."""
    cfg = plain(tmp_path, "trainer.limit_val_batches=0")
    data = build_data(cfg.data)
    found = evaluate(build_module(cfg, data), data, cfg, checkpoint=None, split="val")
    assert 0 <= found["accuracy"] <= 1


def test_a_checkpoint_that_does_not_fit_and_a_device_that_is_not_there_are_told_in_a_line(tmp_path: Path) -> None:
    """Each ended `evaluate.py`, and the device `follow.py`, with a traceback."""
    cfg = plain(tmp_path)
    data = build_data(cfg.data)
    module = build_module(cfg, data)
    path = tmp_path / "checkpoints" / "some.ckpt"
    path.parent.mkdir()
    for content in ({"state_dict": {"net.other": torch.ones(1)}}, {"weights": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(ConfigError, match=r"some\.ckpt: is no checkpoint of the network of this run"):
            evaluate(module, data, cfg, checkpoint=path)
    for text in (b"", b"nonsense"):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"some\.ckpt: is no checkpoint of the network of this run"):
            evaluate(module, data, cfg, checkpoint=path)

    absent = plain(tmp_path, "trainer.accelerator=mps")
    with pytest.raises(ConfigError, match=r"accelerator=mps with devices=1: .*not available"):
        evaluate(module, data, absent, checkpoint=None)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    following = [f"folder={path.parent}", "accelerator=mps", f"output_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"accelerator=mps: .*not available"):
        follow(configuration(*following, config_name="follow"))


def test_without_loggers_it_trains(tmp_path: Path) -> None:
    """The monitor of the learning rate ended every run with `logger=none`, in the workers, with a traceback."""
    chosen = plain(tmp_path, "logger=none", "trainer.max_steps=1")
    trainer = build_trainer(chosen)
    data = build_data(chosen.data)
    trainer.fit(build_module(chosen, data), datamodule=data)
    assert trainer.global_step == 1
    assert not any(isinstance(one, LearningRateMonitor) for one in trainer.callbacks)
    with_loggers = build_trainer(plain(tmp_path, "logger=csv"))
    assert any(isinstance(one, LearningRateMonitor) for one in with_loggers.callbacks)


@pytest.mark.timeout(300)
def test_a_sweep_gives_every_job_its_own_folder_workers_and_results(tmp_path: Path) -> None:
    small = [*SMALL, "data.limit=15", "data.limit_test=5", "trainer.max_epochs=1", "strategy.min_blocks=0", FORKED]
    grid = ["strategy.local_steps=1,3", "trainer.devices=1,2"]
    train("-m", *grid, *small, f"hydra.sweep.dir={tmp_path}/sweep")
    found = {}
    for folder in sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir()):
        results, clock = read(folder), read(folder, "clock.json")
        key = (results["local_steps_per_round"], results["workers"])
        found[key] = (clock["processes"], results["rounds"])
        assert 0 <= results["test"]["accuracy"] <= 1
        assert (folder / "report.txt").exists()
    steps = {1: math.ceil(135 / 32), 2: math.ceil(68 / 32)}
    assert found == {
        (local_steps, workers): (workers, math.ceil(steps[workers] / local_steps))
        for local_steps in (1, 3)
        for workers in (1, 2)
    }


def test_under_torchrun_all_workers_test_where_a_checkpoint_lacks_the_statistics(tmp_path: Path) -> None:
    """Worker 0 tested alone under the strategy, and waited for the others until the timeout."""
    strategy = ["strategy=resist", "strategy.start_method=popen", "strategy.batch_norm=batch"]
    options = [*strategy, *TINY, "trainer.devices=2", f"hydra.run.dir={tmp_path}"]
    run_module(*TORCHRUN, "-m", "experiments.train", *options, timeout=120)
    assert 0 <= read(tmp_path)["test"]["accuracy"] <= 1


def test_threads_are_given_to_this_process_and_its_workers_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with cpu_threads(usual + 1):
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (usual + 1, str(usual + 1))
    with cpu_threads(None):
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (usual, "7")
