"""The accuracy study: every case runs, nothing is measured twice, and the simulations agree with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.accuracy import run
from experiments.accuracy.cases import COUNTS, PARTITIONED, PARTITIONING, STUDIES, TITLES, Case, base
from experiments.accuracy.run import NAMES, Options
from experiments.accuracy.training import make_trainer, prepared
from experiments.harness import cli
from experiments.harness.record import read_record
from experiments.networks import FastPreActResNet, OpenResNet
from experiments.trainers import DataParallel, Stream, make_optimizer, train
from resist_lightning.methods.resist.network import select_blocks

SMOKE = ["size=smoke", "samples=64", "evaluations=1", "lengths=[2,4]"]
TRAINED = [name for name in NAMES if name != "check"]


def settings() -> Options:
    return cli.read([*SMOKE, "out=unused"], Options, NAMES)[1]


def main(arguments: list[str], _: str) -> int:
    return cli.run(run.run, Options, "", NAMES, arguments)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all result files after a smoke run in this process."""
    out = tmp_path_factory.mktemp("accuracy")
    assert main([*SMOKE, f"out={out}", *TRAINED], "") == 0
    return out


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_record(folder / f"{name}.jsonl")["rows"]
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_every_study_has_every_case_once(results: Path, name: str) -> None:
    wanted = [case.key for case in STUDIES[name](settings())]
    found = [row["case"] for row in rows(results, name)]

    assert wanted
    assert sorted(map(str, found)) == sorted(map(str, wanted))
    for row in rows(results, name):
        assert row["samples"] == 64
        assert all(0 <= row[column] <= 100 for column in ("last", "selected", "best_on_test"))
        assert len(row["policies"]) == (9 if row["case"]["method"] in PARTITIONING else 0)


def test_the_main_table_has_all_methods_and_the_pictures_are_drawn(results: Path) -> None:
    full = cli.read(["data=digits", "out=unused"], Options, NAMES)[1]
    wanted = {(case.method, case.workers) for case in STUDIES["main"](full)}

    assert wanted == {("single", 1), *((name, count) for name in TITLES if name != "single" for count in COUNTS)}
    found = {(row["case"]["method"], row["case"]["workers"]) for row in rows(results, "main")}
    assert found == {(name, count) for name, count in wanted if count != 4}
    for name in ("workers", "local_steps"):
        assert (results / f"accuracy_by_{name}.png").stat().st_size > 10_000


def test_a_second_call_computes_nothing(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    before = {path: path.read_text() for path in results.glob("*.jsonl")}
    monkeypatch.setattr(run, "measure", refuse)

    assert main([*SMOKE, f"out={results}", *TRAINED], "") == 0
    assert {path: path.read_text() for path in results.glob("*.jsonl")} == before
    with pytest.raises(AssertionError, match="measured again"):
        main([*SMOKE, f"out={results}", "momentum", "fresh=true"], "")


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Case] = []
    original = run.measure

    def third_is_interrupted(case: Case, **rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return original(case, **rest)

    monkeypatch.setattr(run, "measure", third_is_interrupted)
    assert main([*SMOKE, f"out={tmp_path}", "momentum"], "") == 130
    assert "resumes from what was measured" in capsys.readouterr().out
    assert [row["case"] for row in rows(tmp_path, "momentum")] == [case.key for case in measured]

    monkeypatch.setattr(run, "measure", lambda case, **rest: measured.append(case) or original(case, **rest))
    assert main([*SMOKE, f"out={tmp_path}", "momentum"], "") == 0
    assert [case.momentum for case in measured] == ["reset", "keep", "travel"]


def test_real_processes_train_the_same_weights(tmp_path: Path) -> None:
    assert main([*SMOKE, f"out={tmp_path}", "check"], "") == 0
    found = rows(tmp_path, "check")

    assert [row["case"]["method"] for row in found] == ["resist", "local_sgd", "ddp"]
    for row in found:
        assert row["local_steps"] == 8
        assert row["largest_difference"] < 1e-5 < 0.01 < row["largest_change_by_training"]
        assert row["test_simulated"] == row["test_real"]


def test_ddp_is_the_gradient_of_all_shards_and_the_statistics_of_worker_0() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(2)]
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    shard_nets = [torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)) for _ in batches]
    for shard_net, (x, y) in zip(shard_nets, batches, strict=True):
        shard_net.load_state_dict(net.state_dict())
        torch.nn.functional.cross_entropy(shard_net(x), y).backward()
    weight, decay = net[1].weight.detach().clone(), 5e-4
    gradient = (shard_nets[0][1].weight.grad + shard_nets[1][1].weight.grad) / 2

    DataParallel(net, make_optimizer(net, 0.1), 2).step(batches, 0.1)

    torch.testing.assert_close(net[1].weight, weight - 0.1 * (gradient + decay * weight))
    torch.testing.assert_close(net[0].running_mean, 0.1 * batches[0][0].mean(0))
    assert net[0].num_batches_tracked == 1


def test_local_sgd_of_one_worker_without_rounds_is_the_single_process() -> None:
    one = base("single", 1, 0, settings())
    local = replace(one, method="local_sgd", local_steps=1000)
    stream = prepared(settings()).stream(8, 0)
    models = [train(make_trainer(case, settings()), stream, 1, [0.03] * 16).full_model() for case in (one, local)]

    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_all_methods_see_the_same_images_in_the_same_order(workers: int) -> None:
    data = prepared(settings())
    stream = Stream(data.examples, data.augmented, 8, seed=0)
    alone = [stream.batch(step, 0, 1)[1] for step in range(32)]
    dealt = [stream.batch(step, worker, workers)[1] for step in range(32 // workers) for worker in range(workers)]

    assert torch.equal(torch.cat(alone), torch.cat(dealt))
    assert stream.pass_length == 128
    assert not torch.equal(torch.cat(alone[:16]), torch.cat(alone[16:]))  # the second pass has an order of its own


def test_crops_depend_on_seed_step_and_worker_and_leave_the_global_generator_alone() -> None:
    data = prepared(settings())
    stream = Stream(data.examples, data.augmented, 8, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = stream.batch(3, 1, 2)[0]

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(stream.batch(3, 1, 2)[0], first)


@pytest.mark.parametrize("pre_activation", [True, False])
def test_each_step_of_the_design_shares_more(pre_activation: bool) -> None:
    net = OpenResNet((2, 2, 4, 2), width_multiplier=1 / 16, in_channels=1, pre_activation=pre_activation)
    names = {choice: [block.name for block in select_blocks(net, blocks)] for choice, blocks in PARTITIONED.items()}

    assert len(names["naive"]) == 10
    assert names["strided_shared"] == [name for name in names["naive"] if not name.endswith(".0")]
    assert names["paper"] == ["section3.1", "section3.2", "section3.3"]
    assert names["none"] == []
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_blocks_of_the_fast_network_begin_as_their_skips() -> None:
    net = FastPreActResNet((1, 1, 3, 1), width_multiplier=1 / 16, zero_branches=True)
    x = torch.randn(2, 16, 4, 4)
    for block in list(net.section3)[1:]:  # the first shrinks its input
        assert torch.equal(block(x), x)
    assert net(torch.randn(2, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main", "folder=null"], "folder is missing"),
        (["main", "data=folder", "folder=nowhere"], "folder=nowhere: is not a folder"),
        (["main", "min_blocks=3"], "min_blocks=3: deep=3 has 2 blocks"),
        (["main", "samples=3"], "samples=3: must be at least batch x 8 = 64"),
        (["main", "limit=1"], "limit=1 with batch=8 leaves"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    data = [] if any(word.startswith(("data", "folder")) for word in arguments) else ["data=digits"]
    folder = ["data=folder"] if "folder=null" in arguments else []
    with pytest.raises(SystemExit) as ended:
        main(["size=smoke", f"out={out}", *data, *folder, *arguments], "")

    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_result_file_refuses_other_settings(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SMOKE, f"out={results}", "main", "lr=0.5"], "")
    assert "lr=0.5" in capsys.readouterr().err
