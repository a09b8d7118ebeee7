"""All ways to start workers train the same, bit for bit, at any size. The slowest file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import Config, ResISTStrategy, WorkerLost
from resist_lightning.strategies.launching.processes import end_idle_threads
from tests.helpers import dying, ordinary
from tests.helpers.interrupted import fit_twice
from tests.helpers.launched import STEPS, Data, train
from tests.helpers.plain import Classifier, evaluate
from tests.helpers.processes import run_workers
from tests.helpers.programs import ROOT, TORCHRUN, as_a_main_process, run_interpreter, run_module
from tests.helpers.trainers import make_trainer, train_by_hand
from tests.helpers.training import assert_equal_states, clone_state

PATIENCE_SECONDS = 280  # for importing Lightning in several processes on a busy machine
SCRIPT = "tests.helpers.launched"

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS + 30)


def by_hand(worker: int) -> dict[str, Any]:
    module = Classifier()
    train_by_hand(worker, module, Config(local_steps=3, min_blocks=1), STEPS)
    return clone_state(module)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The weights of a plain loop with the engine, and their metrics."""
    state = run_workers(by_hand, 2)[0]
    module = Classifier()
    module.load_state_dict(state)
    return {"state": state, "metrics": {f"val/{key}": value for key, value in evaluate(module, 2).items()}}


def assert_as_expected(found: dict[str, Any], expected: dict[str, Any], start_method: str) -> None:
    assert_equal_states(found["state"], expected["state"], exactly=True)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert Path(found["best"]).name == f"{start_method}-step={STEPS}.ckpt"
    assert (found["group left"], found["training"]) == (False, False)


def script(*arguments: str) -> str:
    return run_interpreter(["-m", SCRIPT, *arguments], ROOT, timeout=PATIENCE_SECONDS)


def torchrun(*arguments: str) -> str:
    return run_module(*TORCHRUN, "-m", SCRIPT, *arguments, timeout=PATIENCE_SECONDS)


@dataclass(frozen=True)
class Launched:
    """The results of a script that a launcher has run."""

    folder: Path
    ordinary: str
    output: str


# Each launcher has one network of ordinary size, and each network one method; not all combinations.
# Local SGD is ResIST with nothing partitioned, which ``run_ordinary`` has.
SCRIPTS = {"script": (script, "ist:mlp"), "torchrun": (torchrun, "auxnet:vit")}


@pytest.fixture(scope="module", params=SCRIPTS)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    launch, ordinary = SCRIPTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return Launched(folder, ordinary, launch(str(folder), ordinary))


def test_launchers_train_what_the_plain_loop_trains(launched: Launched, expected: Any) -> None:
    assert sorted(path.name for path in launched.folder.glob("*.pt")) == ["worker0.pt", "worker1.pt"]
    for worker in range(2):
        found = torch.load(launched.folder / f"worker{worker}.pt", weights_only=False)
        assert_as_expected(found, expected, "popen")
        assert found["tested"] == found["metrics"]
    assert launched.output.count("4 residual blocks are partitioned over 2 worker(s), 2, 2 a worker") == 1


# Networks of 25 million parameters or more (contract 17): small ones hide effects of size. Up to version 0.1,
# worker 0's results went through a pipe that holds 64 KB, which the main process read when the workers had ended;
# ResNet-34 and larger never came back from ``spawn`` and ``fork``.


def mean_loss(module: ordinary.Module, data: Any) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module(x), y) for x, y in data]
    return float(sum(losses) / len(losses))


def assert_sound_at_ordinary_size(folder: Path, network: str) -> None:
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    assert found["parameters"] >= 25_000_000
    assert_equal_states(found["state"], found["resumed"])
    plain = ordinary.Module(network).eval()
    plain.load_state_dict(torch.load(folder / f"step={ordinary.STEPS}.ckpt", weights_only=True)["state_dict"])
    data = list(ordinary.images(2 * ordinary.BATCH))
    assert found["tested"] == pytest.approx(mean_loss(plain, data), rel=1e-4)
    assert found["validated"] == pytest.approx(found["tested"], rel=1e-4)
    if found["predicted"] is not None:
        with torch.no_grad():
            outputs = torch.cat([plain(x) for x, _ in data])
        # With two workers, worker 0 has every second sample.
        torch.testing.assert_close(found["predicted"], outputs[::2], rtol=1e-3, atol=1e-4)


def test_an_ordinary_network_goes_through_all_that_a_trainer_does(launched: Launched) -> None:
    method, network = launched.ordinary.split(":")
    assert_sound_at_ordinary_size(launched.folder / method, network)


def run_ordinary(start_method: str, folder: Path, *checkpoint: str) -> str:
    arguments = "resist", "resnet50", start_method, str(folder), *checkpoint
    return run_module("tests.helpers.ordinary", *arguments, timeout=PATIENCE_SECONDS, TMPDIR=str(folder))


def test_spawned_workers_train_an_ordinary_network_as_forked_ones_do(tmp_path: Path) -> None:
    forked, spawned = tmp_path / "fork", tmp_path / "spawn"
    for folder in (forked, spawned):
        folder.mkdir()
    assert "Every worker has built the whole module (102 MB of parameters)" in run_ordinary("fork", forked)
    assert_sound_at_ordinary_size(forked, "resnet50")
    output = run_ordinary("spawn", spawned, str(forked / "step=1.ckpt"))

    found, expected = (torch.load(folder / "found.pt", weights_only=True) for folder in (spawned, forked))
    assert_equal_states(found["state"], expected["resumed"], exactly=True)
    assert found["metrics"] == expected["metrics"] != {}
    assert output.count("residual blocks are partitioned over 2 worker(s)") == 1
    assert not list(tmp_path.glob("*/resist_lightning_*"))  # the workers' result files are removed


# Fork from a worker that has imported everything, so that it costs no more than the training.


def fork(_: int, folder: str) -> dict[str, Any]:
    as_a_main_process()
    return train("fork", folder, Classifier())


def test_forked_workers_train_what_the_plain_loop_trains(expected: Any, tmp_path: Path) -> None:
    assert_as_expected(run_workers(fork, 1, str(tmp_path))[0], expected, "fork")


def fork_and_save(_: int, folder: str) -> None:
    as_a_main_process()
    # The second worker ends with a part, and the main process gets worker 0's model.
    at_first: dict[str, Any] = {"evaluate_on": "first", "full_model_on": "first"}
    strategy = ResISTStrategy(local_steps=3, min_blocks=1, start_method="fork", **at_first)
    trainer = make_trainer(strategy, max_epochs=1, devices=2)
    trainer.fit(Classifier(), datamodule=Data())
    trainer.save_checkpoint(f"{folder}/end.ckpt")


def test_a_checkpoint_saved_by_the_main_process_of_forked_workers_can_be_resumed(expected: Any, tmp_path: Path) -> None:
    run_workers(fork_and_save, 1, str(tmp_path))

    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    trained = [name for name, _ in Classifier().named_parameters()]
    assert_equal_states(*({name: each[name] for name in trained} for each in (saved["state_dict"], expected["state"])))
    assert saved["resist_lightning"]["scale"] == 0.5
    assert (saved["resist_lightning"]["round"], saved["resist_lightning"]["step"]) == (2, 2)


def interrupt_and_fit_again(_: int, to_all: bool, folder: str) -> tuple[bool, int, bool]:
    as_a_main_process()
    main = os.getpid()

    def interrupt() -> None:
        while not Path(folder, "training").exists():
            time.sleep(0.05)
        (os.killpg if to_all else os.kill)(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    return fit_twice("fork", folder)


@pytest.mark.parametrize("to_all", [False, True])
def test_an_interrupt_leaves_no_worker_and_the_next_fit_works(to_all: bool, tmp_path: Path) -> None:
    """A notebook's kernel is interrupted alone, a terminal's Ctrl-C reaches the workers too.

    Up to version 0.1 forked workers stayed alive, and the next fit died of EADDRINUSE.
    """
    (found,) = run_workers(interrupt_and_fit_again, 1, to_all, str(tmp_path), timeout=PATIENCE_SECONDS)

    assert found == (True, 0, True)


def interrupt_a_worker_that_hangs(_: int, folder: str) -> float:
    """Interrupt a worker that hangs; being alone, it has no peer to give it up. Returns the seconds."""

    def harm() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        dying.hang()

    as_a_main_process()
    dying.HARMS["interrupt"] = harm
    dying.TIMEOUT = timedelta(seconds=3)
    started = time.monotonic()
    with pytest.raises(SystemExit):
        dying.train("interrupt", 0, folder, "fork", workers=1)
    return time.monotonic() - started


def test_a_worker_that_hangs_does_not_keep_an_interrupted_main_process(tmp_path: Path) -> None:
    assert run_workers(interrupt_a_worker_that_hangs, 1, str(tmp_path))[0] < PATIENCE_SECONDS / 2


class Leaving(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            sys.exit(0)


def fork_and_leave(_: int, folder: str) -> list[str]:
    as_a_main_process()
    tempfile.tempdir = folder
    strategy = ResISTStrategy(local_steps=3, min_blocks=1, start_method="fork")
    trainer = make_trainer(strategy, max_epochs=1, devices=1)  # with two workers, the second would hear of the first
    with pytest.raises(WorkerLost, match=r"worker 0 ended with exit code 0 and without results: .* sys\.exit"):
        trainer.fit(Leaving(), datamodule=Data())
    return os.listdir(folder)


def test_workers_that_leave_by_themselves_do_not_keep_the_main_process_waiting(tmp_path: Path) -> None:
    assert run_workers(fork_and_leave, 1, str(tmp_path))[0] == []


class Exiting(Classifier):
    def configure_callbacks(self) -> Any:
        os._exit(3)  # before the workers look for one another


def fork_on_the_second_host(_: int) -> None:
    as_a_main_process()
    os.environ.update(NODE_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    strategy = ResISTStrategy(min_blocks=1, start_method="fork")
    with pytest.raises(WorkerLost, match=r"^worker 1 \(host .*ended with exit code 3"):
        make_trainer(strategy, max_epochs=1, devices=1, num_nodes=2).fit(Exiting(), datamodule=Data())


def test_workers_of_another_host_have_their_own_numbers() -> None:
    """They were named as those of the first one."""
    run_workers(fork_on_the_second_host, 1)


def compute() -> None:
    torch.set_num_threads(2)
    torch.relu(torch.randn(4_000_000)).sum()


def compute_in_a_fork(_: int) -> int | None:
    compute()
    end_idle_threads()
    child = multiprocessing.get_context("fork").Process(target=compute)
    child.start()
    child.join(20)
    child.kill()
    child.join()
    return child.exitcode


def test_forked_workers_compute_when_the_main_process_has_computed() -> None:
    """As in a notebook; workers hung in the first forward, waiting for OpenMP threads that a fork does not have."""
    assert run_workers(compute_in_a_fork, 1) == [0]
