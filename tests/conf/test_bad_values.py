"""A wrong command line gives one line on stderr and exit code 2, before there is a folder or a process."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.app.build import CONF, check_evaluate, check_follow, check_train
from experiments.app.launch import check_command_line
from experiments.harness.settings import ConfigError
from tests.conf.conftest import configuration
from tests.helpers.programs import refusal

BAD_COMMAND_LINES = {
    "strategy.local_stepps=10": r"local_stepps=10: unknown key.*did you mean strategy\.local_steps\?",
    "+strategy.local_stepps=10": r"local_stepps=10: unknown key.*did you mean strategy\.local_steps\?",
    "strategy.local_steps=ten": r"strategy\.local_steps=ten: must be a whole number",
    "strategy=auxnet strategy.local_steps=5": r"local_steps=5: unknown key; strategy=auxnet has .*method, beta",
    "strategy=rsist": r"Could not find 'strategy/rsist'.*resist",
    "strateg=resist": r"strateg=resist: unknown key.*did you mean strategy\?",
    "strategy.local_steps": r"strategy\.local_steps: cannot be read as an override",
    "strategy.local_steps=10,50": r"Ambiguous value for argument 'strategy\.local_steps=10,50'.*--multirun",
    "-m strategy.local_steps=10,0": r"strategy\.local_steps=0 must be a whole number of at least 1",
    "--multirun trainer.devices=1,2 strategy=single": r"trainer\.devices=2 with strategy=single",
    "-m strategy.local_steps=interval(2,50)": r"local_steps=interval\(2,50\): a grid .*local_steps=2,50, or range\(",
    "-m optimizer.lr=tag(x,interval(0.01,0.1))": r"interval\(0\.01,0\.1\)\): a grid .*optimizer\.lr=0\.01,0\.1",
    "-m seed=range(1,5,0)": r"seed=range\(1,5,0\): has no values to try \(range\(\) arg 3 must not be zero\)",
    "-m optimizer.lr=glob(*)": r"optimizer\.lr=glob\(\*\): has no values to try",
    "-m +hydra.sweeper.params.seed=1": r"\+hydra\.sweeper\.params\.seed=1: cannot be put into",
    "seed=1 logger=null": r"seed=1 logger=null: cannot be put into the configuration \(.*must be a string",
    "-m seed=1,2 strategy.start_method=popen": r"strategy\.start_method=popen:.*strategy\.start_method=spawn",
}
BAD_VALUES = {
    "strategy.local_steps=0": r"strategy\.local_steps=0 must be a whole number of at least 1 \(1 averages",
    "strategy.local_steps=1.5": r"strategy\.local_steps=1\.5: must be a whole number",
    "strategy.local_steps=null": r"strategy\.local_steps=null: must be a whole number",
    "strategy.local_steps={_target_:resist_lightning.QSR,base:0,coefficient:1}": r"QSR: base=0 must be a whole",
    "strategy.local_steps={_target_:resist_lightning.QSR,bse:4}": r"local_steps\.bse=4: unknown key.*did you mean",
    "strategy.local_steps={_target_:resist_lightning.PostLocal,first:one}": r"steps\.first=one: must be a whole",
    "strategy.min_blocks=-1": r"strategy\.min_blocks=-1 must be a whole number of at least 0 \(0 allows",
    "strategy.min_blocks=3 model.depth=14": r"min_blocks=3 is impossible with 2 partitionable block.*Lower min_blocks",
    "strategy.blocks=layer9.*": r"layer9\.\*.*net\.section3\.1-14",
    "strategy.momentum=restart": r"strategy\.momentum='restart' is not known; choose one of 'reset'",
    "strategy.test_scale=1.5": r"strategy\.test_scale=1\.5 must lie in \(0, 1\]; None takes",
    "strategy.timeout.seconds=0": r"strategy\.timeout\.seconds=0: must be a number, above 0",
    "strategy.parallel_devices=[cpu]": r"strategy\.parallel_devices=\['cpu'\].*trainer\.devices=2",
    "strategy.seed=${nope}": r"strategy\.seed: cannot be resolved",
    "strategy=ist strategy.layers=*": r"strategy=ist with preact_resnet.*cannot be dealt out.*in residual networks",
    "model=mlp": r"strategy=resist with mlp .*No residual block.*strategy=ist fully connected ones",
    "strategy.devices_per_worker=2 trainer.devices=3": r"devices_per_worker=2 does not divide the 3 processes",
    "strategy=auxnet strategy.method=al": r"strategy\.method=al: must be one of delayed, penalty, al-net",
    "strategy=auxnet strategy.beta=0": r"strategy\.beta=0 must be a finite number above 0",
    "strategy=auxnet strategy.lambda_step=2": r"strategy\.lambda_step=2 must lie in \(0, 1\]; None takes",
    "experiment=ist_digits strategy.wire=int8": r"wire=int8: unknown key; strategy=ist has",
    "experiment=ist_digits strategy.local_steps=0": r"strategy\.local_steps=0 must be a whole number of at least 1",
    "experiment=ist_digits strategy.momentum=restart": r"strategy\.momentum='restart' is not known",
    "experiment=ist_digits model.depth=1": r"model\.depth=1 must be at least 2: linear layers; 2 and 3",
    "experiment=ist_digits model.width=1": r"trainer\.devices=2: layer .* has 1 neurons for 2 workers",
    "experiment=ist_digits model.norm=group": r"model\.norm=group must be one of batch, layer, none",
    "experiment=ist_digits model.dropout=1": r"model\.dropout=1 must be at least 0 and below 1",
    "experiment=ist_digits model.bias=true": r"model\.bias=true: unknown key; model has depth",
    "strategy=single": r"trainer\.devices=2 with strategy=single.*trainer\.devices=1",
    "strategy=single strategy.local_steps=50 trainer.devices=1": r"strategy=single has no settings",
    "strategy=local_sgd strategy.min_blocks=2": r"min_blocks=2: unknown key; strategy=local_sgd has",
    "ckpt_path=besst": r"ckpt_path=besst: is not a file; best and last are checkpoints of this training, null tests",
    "ckpt_path=5": r"ckpt_path=5: is not a file; best and last",
    "trainer.devices=0": r"trainer\.devices=0: must be a whole number, at least 1",
    "trainer.devices=two": r"trainer\.devices=two: must be a whole number",
    "trainer.max_epochs=null": r"trainer\.max_epochs=null with trainer\.max_steps=-1: would never end",
    "trainer.accelerator=tpu": r"trainer\.accelerator=tpu: must be one of auto, cpu",
    "trainer.strategy=ddp": r"trainer\.strategy=ddp: unknown key",
    "model.depth=50": r"model\.depth=50 is unknown; choose one of 14, 26, 38, 101, 152, 200",
    "model.width_multiplier=0": r"model\.width_multiplier=0 must be above 0; 1\.0 is",
    "model=torchvision model.name=resnet51": r"model\.name=resnet51 must be one of .*resnet50",
    "data.batch_size=0": r"data\.batch_size=0 must be at least 1",
    "data.holdout=1": r"data\.holdout=1 must lie between 0 and 1; 0\.1 is",
    "data=image_folder": r"data\.folder is missing.*data\.folder=PATH",
    "data=speech_commands data.folder=null": r"data\.folder=null: must be a text",
    "data=speech_commands data.download=maybe": r"data\.download=maybe: must be true or false",
    "data=speech_commands data.n_mels=64": r"data\.n_mels=64: unknown key; data has .*cache_dir",
    "data=speech_shaped data.train_size=1": r"data\.train_size=1 must be at least 2",
    "data=speech_shaped data.seed=-1": r"data\.seed=-1 must be at least 0",
    "optimizer.lr=0": r"optimizer\.lr=0: must be a number, above 0",
    "optimizer.nesterov=true": r"optimizer\.nesterov=true: unknown key; optimizer has lr",
    "seed=-1": r"seed=-1: must be a whole number, at least 0",
    "+extra=1": r"extra=1: unknown key; the configuration has seed",
    "callbacks.model_checkpoint.monitorr=x": r"unknown key.*callbacks\.model_checkpoint\.monitor\?",
    "callbacks.model_checkpoint._target_=no.where": r"_target_=no\.where: cannot be imported",
    "logger.csv=on": r"logger\.csv=.*must have a _target_",
}
GOOD_COMMAND_LINES = [
    "",
    "-m trainer.devices=1,2 strategy.local_steps=range(10,20,10) model=glob(p*) trainer.accelerator=cpu",
    "callbacks.progress_bar=null logger=none strategy.blocks=[section3.1,section3.2] trainer.accelerator=cpu "
    "strategy.local_steps={_target_:resist_lightning.QSR,base:4,coefficient:0.1}",
]
GOOD_VALUES = [
    "model.depth=101 trainer.devices=4 strategy.local_steps=50",
    "strategy=single trainer.devices=1",
    "strategy.start_method=popen seed=0 strategy.min_blocks=0",
    "experiment=ist_digits strategy.momentum=travel",
    "experiment=ist_speech_shaped strategy=local_sgd",
    "experiment=ist_digits strategy=auxnet",
    "trainer.devices=4 strategy.devices_per_worker=2 strategy.blocks_per_worker=[5,9]",
    "strategy=ist strategy.layers=*.conv1",
    "strategy=local_sgd strategy.local_steps={_target_:resist_lightning.PostLocal,first:1,then:9,switch_step:70}",
]


def message_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        check_command_line("train", check_train, line.split())
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("line", BAD_COMMAND_LINES)
def test_a_bad_command_line_is_one_line_that_names_it(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(line, capsys)
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert re.search(BAD_COMMAND_LINES[line], message), message


@pytest.mark.parametrize("line", BAD_VALUES)
def test_a_bad_value_is_named(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_train(configuration(*line.split()))
    assert re.search(BAD_VALUES[line], " ".join(str(refused.value).split())), refused.value


@pytest.mark.parametrize("line", GOOD_COMMAND_LINES)
def test_a_good_command_line_passes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_command_line("train", check_train, line.split())


@pytest.mark.parametrize("line", GOOD_VALUES)
def test_good_values_pass(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_train(configuration(*line.split()))


def test_more_workers_than_gpus_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"trainer\.devices=2: this host has 1 GPU\(s\).*trainer\.accelerator=cpu"):
        check_train(configuration("trainer.devices=2"))
    check_train(configuration("strategy.parallel_devices=[cuda:0,cuda:0]"))


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("evaluate", "", "ckpt_path is missing"),
        ("evaluate", "ckpt_path=x split=train", "split=train: must be one of test, val"),
        ("evaluate", "ckpt_path=x devices=2", "devices=2: strategy=single uses one process"),
        ("evaluate", "ckpt_path=x checkpoint=y", "checkpoint=y: unknown key"),
        ("follow", "", "folder is missing"),
        ("follow", "folder=x mode=up", "mode=up: must be one of min, max"),
        ("follow", "folder=x silence=0", "silence=0: must be a number, above 0"),
    ],
)
def test_a_bad_evaluation_is_one_line(name: str, line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command_line(name, {"evaluate": check_evaluate, "follow": check_follow}[name], line.split())
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "strategy.snapshots=${hydra:runtime.output_dir}/snapshots",
        "-m seed=${hydra:job.num} strategy.local_steps=1,2",
    ],
)
def test_values_may_name_hydras_own(line: str) -> None:
    """They were refused before the first job, as if they could not be resolved in it."""
    jobs: list[tuple[Any, ...]] = []

    def check(cfg: DictConfig, *, sweep: bool = False) -> None:
        check_train(cfg, sweep=sweep)
        jobs.append((cfg.strategy.snapshots, cfg.seed))

    check_command_line("train", check, line.split())
    assert jobs == ([(None, 0), (None, 1)] if "-m" in line else [("./snapshots", 0)])
    assert not HydraConfig.initialized()


def test_runs_that_start_within_a_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps shared one, and each replaced files of the other's; processes of one run share theirs."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for name in ("train", "evaluate", "follow"):
            one, other = (compose(name, return_hydra_config=True).hydra for _ in range(2))
            assert one.run.dir != other.run.dir
            assert one.sweep.dir != other.sweep.dir
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
        started_by_torchrun = compose("train", return_hydra_config=True).hydra.run.dir
    assert re.fullmatch(r"runs/[\d-]{10}/\d\d-\d\d-\d\d", started_by_torchrun)


def test_the_real_program_ends_with_code_2_and_leaves_no_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(root / "experiments" / "train.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [program, "strategy.local_steps=0"])
    message = refusal(lambda: runpy.run_path(program, run_name="__main__"), tmp_path, capsys)
    assert message.startswith("error: strategy.local_steps=0 must be")
