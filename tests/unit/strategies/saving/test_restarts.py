from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from resist_lightning import CheckpointError, Config
from resist_lightning.checkpoint.snapshots import SnapshotFolder
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.group import destroy_group, group_exists
from resist_lightning.engine.registry import make_layout
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.saving.restarts import Restarts, check_other_workers, check_shrinking
from tests.helpers.plain import stream
from tests.helpers.small import LateSmall, Small
from tests.helpers.threads import run_threads
from tests.helpers.trainers import make_strategy, make_trainer


def test_shrinking_is_refused_where_the_workers_could_not_meet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = StrategyOptions(snapshots="folder", on_worker_loss="shrink")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_shrinking(options)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_shrinking(options)


def test_without_torchrun_a_warning_says_that_nobody_starts_the_workers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.warns(UserWarning, match="needs `torchrun --nnodes=MIN:MAX`"):
        check_shrinking(StrategyOptions(snapshots="folder", on_worker_loss="shrink"))


SHRINKING = StrategyOptions(snapshots="folder", on_worker_loss="shrink")


@pytest.mark.parametrize(
    ("settings", "workers", "refused"),
    [
        ({"blocks_per_worker": [2, 2, 1]}, 3, r"blocks_per_worker=\[2, 2, 1\] fits one number only: choose 'equal'"),
        ({"fragments": 3, "min_blocks": 1}, 1, "fragments=3 .* at least 1 of the 4 .* Choose fragments=1 or fewer"),
        ({"fragments": 2, "growth": [0.2, 1]}, 1, "fragments=2 may not fit"),
    ],
)
def test_settings_that_fit_the_first_number_of_workers_only_are_refused_where_it_may_change(
    settings: dict[str, Any], workers: int, refused: str
) -> None:
    """After a loss or a join each restart raised this error or another one, until torchrun gave up."""
    layout = make_layout(Small().net, Config(**settings), workers)
    check_other_workers(StrategyOptions(snapshots="folder"), layout)
    with pytest.raises(ValueError, match=f"on_worker_loss='shrink' continues with other numbers .* {refused}"):
        check_other_workers(SHRINKING, layout)


@pytest.mark.parametrize(
    "settings",
    [
        {"fragments": 2},
        {"fragments": 3, "min_blocks": 3},
        {"blocks": [], "fragments": 9},
        {"blocks_per_worker": "auto"},
    ],
)
def test_settings_that_fit_every_number_of_workers_may_shrink(settings: dict[str, Any]) -> None:
    module, config = Small().net, Config(**settings)
    check_other_workers(SHRINKING, make_layout(module, config, 2))
    for workers in range(1, 8):
        make_layout(module, config, workers)


@pytest.fixture
def leaves_its_group() -> Iterator[None]:
    yield
    if group_exists():
        destroy_group()


@pytest.mark.filterwarnings("ignore:.*needs `torchrun")
@pytest.mark.usefixtures("leaves_its_group")
@pytest.mark.parametrize("module", [Small, LateSmall])
def test_a_fit_refuses_them_before_it_trains(module: type[L.LightningModule], tmp_path: Path) -> None:
    strategy = make_strategy(snapshots=tmp_path, on_worker_loss="shrink", blocks_per_worker=[4], min_blocks=None)
    with pytest.raises(ValueError, match="fits one number only"):
        make_trainer(strategy, max_epochs=1).fit(module(), stream(0, 3))
    assert group_exists() == (module is LateSmall)  # whose network is made in the workers


def written(folder: Path, rounds: list[list[int]]) -> None:
    """Snapshots of the rounds of each worker."""
    for worker, numbers in enumerate(rounds):
        restarts = Restarts(folder, StrategyOptions(), SimpleNamespace(worker=worker, workers=2, member=0))  # type: ignore[arg-type]
        for number in numbers:
            restarts.write({"from": [worker, number]}, number)


def test_the_newest_round_that_all_can_read_is_chosen(tmp_path: Path) -> None:
    written(tmp_path, [[1, 2, 3], [1, 2]])

    def choose(collective: Any) -> Any:
        return Restarts(tmp_path, StrategyOptions(), collective).choose()

    with pytest.warns(UserWarning, match="round 3 .* is incomplete; resuming from round 2"):
        assert run_threads(choose, 2)[0] == [{"from": [0, 2]}, {"from": [1, 2]}]


def test_without_a_common_round_the_error_names_those_of_each_worker(tmp_path: Path) -> None:
    written(tmp_path, [[1], []])

    def choose(collective: Any) -> None:
        with pytest.raises(CheckpointError, match=r"rounds: worker 0 \[1\]; worker 1 none"):
            Restarts(tmp_path, StrategyOptions(), collective).choose()

    run_threads(choose, 2)


def test_snapshots_of_another_run_are_left_alone(tmp_path: Path) -> None:
    written(tmp_path, [[1], [1]])

    def begin(collective: Any) -> None:
        with pytest.raises(ValueError, match="a run that did not finish"):
            Restarts(tmp_path, StrategyOptions(), collective).begin()

    run_threads(begin, 2)
    assert len(list(tmp_path.glob("round=*/*.pt"))) == 2


def begin_run(folder: Path) -> bool:
    """Begin a run, and write a snapshot; returns whether it is one that torchrun has restarted."""
    run = Restarts(folder, StrategyOptions(), SoloCollective())
    restarted = run.restarted()
    if restarted:
        run.choose()
    run.begin()
    run.write({}, 1)
    return restarted


def test_a_run_is_found_again_by_its_folder_and_not_by_the_runs_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that skipped a complete `fit` could not resume the next one: it was counted among all."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    first, second = tmp_path / "1", tmp_path / "2"

    def end_first_begin_second() -> tuple[bool, bool]:
        restarted = begin_run(first)
        SnapshotFolder(first).remove()
        return restarted, begin_run(second)

    for begin, expected in ((end_first_begin_second, (False, False)), (lambda: begin_run(second), True),
                            (end_first_begin_second, (False, True))):  # fmt: skip
        monkeypatch.setattr("resist_lightning.strategies.saving.restarts._runs", Counter())  # a new process
        assert begin() == expected

    assert not Restarts(second, StrategyOptions(), SoloCollective()).restarted()  # another run in the same folder


def test_of_two_runs_that_begin_in_one_folder_the_first_ends_with_an_error(tmp_path: Path) -> None:
    """As trials of a search may: each removed the other's files, and a resumed run could mix them, in silence."""
    first, second = (Restarts(tmp_path, StrategyOptions(), SoloCollective()) for _ in range(2))
    first.begin()
    second.begin()
    second.write({}, 1)
    with pytest.raises(ValueError, match="is written by another run"):
        first.write({}, 1)
    second.write({}, 2)


def test_shared_tensors_are_read_from_one_file_however_many_workers_have_written_them(tmp_path: Path) -> None:
    # Unused files are not read: after a change of the number of workers each worker reads the files of all.
    for worker in range(3):
        restarts = Restarts(tmp_path, StrategyOptions(), SimpleNamespace(worker=worker, workers=3, member=0))  # type: ignore[arg-type]
        tensors = {
            "shared": torch.full((1_000_000,), float(worker)),
            f"own{worker}": torch.full((1000,), float(worker)),
        }
        restarts.write({"own": {"tensors": tensors}}, 1)
    resident = Path("/proc/self/statm")

    def megabytes() -> float:
        return int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    restarts = Restarts(tmp_path, StrategyOptions(), SimpleNamespace(worker=0, workers=2, member=0))  # type: ignore[arg-type]
    restarts.chosen = restarts.folder.newest_first()[0]
    before = megabytes()
    tensors = {}
    for state in restarts.states():
        tensors.update(state["own"]["tensors"])
    assert megabytes() - before < 4
    assert [float(tensors[f"own{worker}"].mean()) for worker in range(3)] == [0, 1, 2]
    assert float(tensors["shared"].mean()) == 2
