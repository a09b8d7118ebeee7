"""LightningCLI: every option of every strategy from a command line, and again from the configuration that it saves."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from resist_lightning import QSR, AuxNetStrategy, ISTStrategy, LocalSGDStrategy, PostLocal, ResISTStrategy
from tests.helpers.programs import run_module
from tests.helpers.training import assert_equal_states

FACES: dict[str, Any] = {
    face.__name__: face for face in (ResISTStrategy, ISTStrategy, AuxNetStrategy, LocalSGDStrategy)
}

# Each option as a user would type it, with a value that is not its default, and its value in Python.
COMMON = {
    "check": ("full", "full"),
    "on_save_error": ("warn", "warn"),
    "snapshots": ("/shared/run 7", "/shared/run 7"),
    "snapshot_every_n_rounds": ("3", 3),
    "on_worker_loss": ("shrink", "shrink"),
    "parallel_devices": ("[cpu, 'cuda:1']", ["cpu", "cuda:1"]),
    "process_group_backend": ("gloo", "gloo"),
    "timeout": ("0:20:00", timedelta(minutes=20)),
    "silence": ("0:01:30", timedelta(seconds=90)),
    "start_method": ("spawn", "spawn"),
}
LOCAL = {
    **COMMON,
    "devices_per_worker": ("node", "node"),
    "across_hosts": ("true", True),
    "find_unused_parameters": ("true", True),
    "non_finite": ("drop", "drop"),
    "data": ("copy", "copy"),
}
RATE = '{"class_path": "resist_lightning.QSR", "init_args": {"base": 4, "coefficient": 0.02}}'
POST = '{"class_path": "resist_lightning.PostLocal", "init_args": {"first": 4, "then": 20, "switch_step": 100}}'
OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "ResISTStrategy": {
        **LOCAL,
        "local_steps": (POST, PostLocal(4, 20, 100)),
        "seed": ("1", 1),
        "momentum": ("travel", "travel"),
        "batch_norm": ("running", "running"),
        "recalibration_batches": ("4", 4),
        "min_blocks": ("2", 2),
        "blocks_per_worker": ("[2, 4]", [2, 4]),
        "blocks": ("['layer3.*', layer4.1]", ["layer3.*", "layer4.1"]),
        "warmup_rounds": ("2", 2),
        "finish_rounds": ("3", 3),
        "growth": ("[0.25, 0.5, 1]", [0.25, 0.5, 1.0]),
        "test_scale": ("0.5", 0.5),
        "wire": ("int8", "int8"),
        "outer": ("nesterov", "nesterov"),
        "outer_rate": ("1", 1.0),
        "outer_momentum": ("0.8", 0.8),
        "overlap": ("2", 2),
        "fragments": ("2", 2),
        "evaluate_on": ("first", "first"),
        "full_model_on": ("first", "first"),
    },
    "ISTStrategy": {
        **LOCAL,
        "local_steps": ("5", 5),
        "seed": ("1", 1),
        "momentum": ("keep", "keep"),
        "batch_norm": ("batch", "batch"),
        "recalibration_batches": ("4", 4),
        "layers": ("classifier.*", "classifier.*"),
        "min_share": ("0.5", 0.5),
        "evaluate_on": ("first", "first"),
        "full_model_on": ("first", "first"),
        "growth": ("[0.25, 0.5, 1]", [0.25, 0.5, 1.0]),
        "finish_rounds": ("3", 3),
    },
    "AuxNetStrategy": {
        **COMMON,
        "seed": ("1", 1),
        "batch_norm": ("running", "running"),
        "recalibration_batches": ("4", 4),
        "method": ("al-net", "al-net"),
        "beta": ("2", 2.0),
        "beta_growth": ("1.5", 1.5),
        "lambda_step": ("0.5", 0.5),
        "multiplier_every": ("20", 20),
        "warmup_steps": ("7", 7),
        "serial_every": ("4", 4),
        "delay": ("2", 2),
        "cuts": ("[layer2]", ["layer2"]),
        "network": ("net", "net"),
        "aux_width": ("16", 16),
        "aux_learning_rate": ("0.01", 0.01),
        "check_every_n_steps": ("9", 9),
        "input": ("image", "image"),
    },
    "LocalSGDStrategy": {
        **LOCAL,
        "local_steps": (RATE, QSR(base=4, coefficient=0.02)),
        "momentum": ("keep", "keep"),
        "wire": ("bf16", "bf16"),
        "outer": ("nesterov", "nesterov"),
        "outer_rate": ("0.5", 0.5),
        "outer_momentum": ("0.8", 0.8),
        "overlap": ("auto", "auto"),
        "fragments": ("3", 3),
        "evaluate_on": ("first", "first"),
        "full_model_on": ("first", "first"),
    },
}
# The strategy, and the options left out: growth replaces the counts of blocks and their scale, overlap
# excludes travelling state and dropping workers; in AuxNet a worker is one process, gloo its backend,
# and options of guesses and of delays belong to different methods.
ONE_PROCESS = {"devices_per_worker", "across_hosts", "find_unused_parameters", "process_group_backend"}
OF_GUESSES = {
    *("beta", "beta_growth", "lambda_step", "multiplier_every", "serial_every"),
    *("aux_network", "aux_width", "aux_learning_rate"),
}
RUNS: list[tuple[str, set[str]]] = [
    ("ResISTStrategy", {"growth", "overlap", "fragments"}),
    ("ResISTStrategy", {"min_blocks", "blocks_per_worker", "test_scale", "momentum", "non_finite"}),
    ("ISTStrategy", {"growth"}),
    ("ISTStrategy", {"min_share"}),
    ("AuxNetStrategy", {*ONE_PROCESS, "delay", "aux_network"}),
    ("AuxNetStrategy", {*ONE_PROCESS, *OF_GUESSES, "method"}),
    ("LocalSGDStrategy", {"overlap", "fragments"}),
    ("LocalSGDStrategy", {"non_finite"}),
]


class Auxiliary(nn.Module):
    """A user's auxiliary network."""

    def __init__(self, image: tuple[int, ...], boundary: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.arguments = (image, boundary, width)


def auxiliary(image: tuple[int, ...], boundary: tuple[int, ...]) -> nn.Module:
    """A factory of auxiliary networks, as a function."""
    return Auxiliary(image, boundary, 5)


def command_line(*arguments: str, **options: Any) -> LightningCLI:
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]
    return LightningCLI(BoringModel, args=[*arguments, *quiet], run=False, save_config_callback=None, **options)


def strategy_of(*arguments: str, **options: Any) -> Any:
    return command_line(*arguments, **options).trainer.strategy


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest's arguments, of which LightningCLI would warn."""
    monkeypatch.setattr("sys.argv", ["train.py"])


@pytest.mark.parametrize(
    ("face", "suffix"),
    [(ResISTStrategy, ""), (ISTStrategy, "_spawn"), (AuxNetStrategy, "_notebook"), (LocalSGDStrategy, "")],
)
def test_by_name(face: Any, suffix: str) -> None:
    """All names are in ``unit/strategies/test_registry`` and ``test_auxnet_refusals``."""
    strategy = strategy_of(f"--trainer.strategy={face.strategy_name}{suffix}")
    assert type(strategy) is face
    assert strategy.config == face().config


@pytest.mark.parametrize(("name", "without"), RUNS)
def test_every_option_by_class_path_and_from_the_saved_configuration(
    name: str, without: set[str], tmp_path: Path
) -> None:
    given = {option: value for option, value in OPTIONS[name].items() if option not in without}
    assert set(inspect.signature(FACES[name]).parameters) - set(given) == without
    init_args = [f"--trainer.strategy.init_args.{option}={typed}" for option, (typed, _) in given.items()]
    cli = command_line(f"--trainer.strategy.class_path=resist_lightning.{name}", *init_args)
    usual = FACES[name]().options
    for option, (_, value) in given.items():
        assert getattr(cli.trainer.strategy.options, option) == value
        assert getattr(usual, option) != value
    assert (
        cli.trainer.strategy.options == FACES[name](**{option: value for option, (_, value) in given.items()}).options
    )

    saved = tmp_path / "config.yaml"
    saved.write_text(cli.parser.dump(cli.config))
    again = strategy_of(f"--config={saved}")
    assert type(again) is FACES[name]
    assert again.options == cli.trainer.strategy.options


@pytest.mark.parametrize(("path", "width"), [("Auxiliary", 8), ("auxiliary", 5)])
def test_an_auxiliary_network_of_the_users(path: str, width: int) -> None:
    strategy = strategy_of(
        "--trainer.strategy=resist_lightning.AuxNetStrategy",
        "--trainer.strategy.method=penalty",
        f"--trainer.strategy.aux_network={__name__}.{path}",
    )
    made = strategy.config.aux_network((3, 8, 8), (16, 4, 4))
    assert made.arguments == ((3, 8, 8), (16, 4, 4), width)
    assert " at 0x" not in strategy.config.in_words()["aux_network"]  # it is compared between workers


@pytest.mark.parametrize("name", FACES)
def test_help_of_the_class_shows_every_option_with_its_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        LightningCLI(BoringModel, args=[f"--trainer.strategy.help=resist_lightning.{name}"], run=False)
    shown = " ".join(capsys.readouterr().out.split())
    described = FACES[name].__init__.__doc__
    for option in inspect.signature(FACES[name]).parameters:
        beginning = described.partition(f"    {option}: ")[2].split()[:5]
        assert beginning
        assert f"--trainer.strategy.{option} " in shown
        assert " ".join(beginning) in shown


@pytest.mark.parametrize(
    "defaults",
    [
        lazy_instance(ResISTStrategy, local_steps=5),
        {"class_path": "resist_lightning.ResISTStrategy", "init_args": {"local_steps": 5}},
    ],
)
def test_as_the_default_of_a_program(defaults: Any) -> None:
    strategy = strategy_of("--trainer.strategy.wire=int8", trainer_defaults={"strategy": defaults})
    assert (strategy.config.local_steps, strategy.config.wire) == (5, "int8")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lokal_steps=5", "Option 'lokal_steps' is not accepted"),
        ("wire=int7", "'int8', 'int6', 'int4'"),
        ("timeout=20", 'Expected a string with form "h:m:s"'),
        ("local_steps=0", "local_steps=0 must be a whole number of at least 1"),
        ("parallel_devices=[gpu7]", "parallel_devices=['gpu7'] must be a list of torch's devices"),
    ],
)
def test_a_bad_option_is_named(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        strategy_of("--trainer.strategy=resist_lightning.ResISTStrategy", f"--trainer.strategy.{option}")
    assert message in capsys.readouterr().err + str(error.value)


def test_devices_by_name_are_those_that_lightning_gets() -> None:
    """Command lines and YAML files have only strings; up to version 0.1, only a list of torch.device was accepted."""
    devices = [torch.device("cuda", 0)] * 2
    for given in (["cuda:0", "cuda:0"], ("cuda:0", torch.device("cuda:0")), devices):
        assert ResISTStrategy(parallel_devices=given).parallel_devices == devices


PROGRAM = "tests.helpers.command_line"
TRAINING = {
    "max_steps": 4,
    "num_sanity_val_steps": 0,
    "strategy": "resist_lightning.ResISTStrategy",
    "strategy.local_steps": 3,
    "strategy.min_blocks": 1,
    "strategy.start_method": "fork",  # a script would be started again in a new interpreter, in five seconds
    "callbacks": "resist_lightning.callbacks.RoundMonitor",
    "accelerator": "cpu",
    "devices": 2,
    "max_epochs": 1,
    "use_distributed_sampler": "false",
    "enable_progress_bar": "false",
}


def weights(folder: Path, *arguments: str) -> dict[str, Any]:
    folder.mkdir()
    run_module(PROGRAM, "fit", *arguments, f"--trainer.default_root_dir={folder}")
    found: dict[str, Any] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def test_the_saved_configuration_trains_the_same_weights(tmp_path: Path) -> None:
    typed = [f"--trainer.{name}={value}" for name, value in TRAINING.items()]
    first = weights(tmp_path / "first", *typed, "--model.kind=small", "--seed_everything=3")
    (saved,) = (tmp_path / "first").rglob("config.yaml")
    assert_equal_states(weights(tmp_path / "again", f"--config={saved}"), first)
