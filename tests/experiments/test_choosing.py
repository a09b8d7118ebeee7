"""Advice on methods before training: closed forms against counted bytes, advice in extreme cases, costs from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import advise as command
from experiments.choosing import accuracy, footprint, tables
from experiments.choosing.footprint import Footprint, Setting, divide, footprints, operations
from experiments.choosing.prediction import Advice, Row, advise, bytes_per_second, predict, scaled
from experiments.harness.record import read_record, write_record
from experiments.links import tables as links
from experiments.networks import mlp
from resist_lightning import Config
from resist_lightning.comm.collective import Collective
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.sync import BlockSync
from resist_lightning.models import preact_resnet
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.threads import run_threads


@pytest.mark.parametrize(
    ("link", "expected"),
    [("100mbit", 12.5e6), ("1gbit", 125e6), ("10Gbit", 1.25e9), ("2.5 gbit", 312.5e6), ("125e6", 125e6), (125, 125.0)],
)
def test_a_link_is_bits_with_a_unit_and_bytes_without(link: object, expected: float) -> None:
    assert bytes_per_second(link) == expected


@pytest.mark.parametrize("link", ["fast", "0", "0gbit", "-1gbit", "1gb", "1.2.3mbit", "1e999", True, None, ""])
def test_another_link_is_refused_with_the_way_to_write_it(link: object) -> None:
    with pytest.raises(ValueError, match=r"^link=.*such as 100mbit or 1gbit"):
        bytes_per_second(link)


def test_bytes_and_memory_are_those_that_workers_over_real_links_counted() -> None:
    content = read_record(links.RESULTS / "links.jsonl")
    settings = content["settings"]
    measured = {row["method"]: row for row in content["rows"] if row["bandwidth_gbit"] == 1}

    found, counted = tables.closed_forms(settings)

    by_method = {one.method: one for one in found}
    assert by_method.keys() == {"ddp", "local_sgd", "diloco", "resist", "resist_outer", "ist"}
    for method in ("local_sgd", "resist"):
        one = by_method[method]
        assert one.sync_bytes == pytest.approx(measured[method]["bytes_per_sync"]["counted"], rel=0.05)
        assert one.memory_bytes == measured[method]["held_bytes"]
        assert one.local_steps == settings["local_steps"]
    assert by_method["local_sgd"].sync_bytes == measured["local_sgd"]["bytes_per_sync"]["counted"]
    assert by_method["ddp"].sync_bytes == measured["ddp"]["bytes_per_sync"]["closed_form"]
    assert by_method["ddp"].local_steps == 1
    # The paper's network with half of its 22 blocks, which have 68 % of the multiply-adds.
    assert counted["blocks"] / counted["whole"] == pytest.approx(0.66, abs=0.001)
    # The predicted time of a step with rounds is within a tenth of the measured one.
    for _, row, own in tables.pairs():
        assert row.method == "ddp" or row.seconds == pytest.approx(own["seconds_per_step"], rel=0.1)


@pytest.mark.parametrize("workers", [2, 4])
def test_ist_holds_slices_and_sends_what_its_formula_says(workers: int) -> None:
    """By default half of the neurons: two of four workers hold a neuron, and values are averaged."""
    inputs, width, classes = 64, 128, 10
    example = torch.empty(2, inputs, device="meta")
    setting = Setting(workers, 20, slots=2)
    with torch.device("meta"):
        parts, refused = divide(
            lambda: mlp(in_features=inputs, num_classes=classes, depth=3, width=width, norm="none"), example, setting
        )
    (ist,) = [one for one in footprints(parts, setting) if one.method == "ist"]

    own, holders = width // 2, workers // 2
    assert list(refused) == ["blocks"]
    assert ist.parameters == inputs * own + own + own * own + own + own * classes + classes
    assert ist.memory_bytes == 4 * (4 * ist.parameters) + 4 * width * width // workers
    inner = (workers - 1) / workers * own**2 * (2 - 1 / workers if holders == 1 else 2)
    # Of two holders one sends its copy to the other, the owner, who sends the mean to the next two, unless it is one of
    # them: of the pairs of four workers five in six share one, and that one is the owner.
    copies = 1 / 2 if holders == 1 else 1 + 2 - 5 / 6
    outer = copies * width / workers * (inputs + classes + 2)
    shared = 2 * (workers - 1) / workers * classes
    assert ist.sync_bytes == pytest.approx(4 * (inner + outer + shared), rel=0.03)


def kept(collective: Collective, config: Config) -> tuple[int, list[int]]:
    """Bytes that a real worker's sync keeps beside the trained part in a round, and the closed form for all workers."""
    torch.manual_seed(0)
    model = preact_resnet(26, width_multiplier=1 / 16)
    layout = BlockLayout(model, config, collective.workers)
    states = OptimizerStates([torch.optim.SGD(model.parameters(), lr=0.1)])
    sync = BlockSync(layout, states, collective, torch.device("cpu"))
    sync.begin_round(0)
    mean = sync._compressed_mean
    copies = dict(mean._before) if mean else {}
    matrices = [tensor for tensor in layout.shared.values() if mean and mean.known(tensor) and tensor.dim() > 1]
    taken = mean._feedback.flat(matrices).nbytes if mean and mean._feedback else 0
    velocities = []
    if sync._outer is not None:
        copies |= sync._outer._start
        began = [parameter for parameter in model.parameters() if id(parameter) in sync._outer._start]
        velocities = sync._outer.velocities(began)
    return taken + sum(tensor.nbytes for tensor in [*copies.values(), *velocities]), footprint.copied_bytes(layout)


@pytest.mark.parametrize(
    ("wire", "outer"),
    [
        ("fp32", "none"),
        ("int8", "none"),
        ("fp32", "nesterov"),
        ("int8", "nesterov"),
        ("int2", "none"),
        ("int2", "nesterov"),
    ],
)
def test_copies_are_those_that_real_workers_keep(wire: Any, outer: Any) -> None:
    told, _ = run_threads(kept, 3, Config(wire=wire, outer=outer, min_blocks=2))
    assert [found for found, _ in told] == told[0][1]
    assert (told[0][0] > 0) == (wire != "fp32" or outer != "none")


def rows_over(bandwidth: float, compute: dict[str, float], latency: float = 0.0) -> list[Row]:
    """A network of 100 bytes; ResIST holds half of it."""
    found = [
        Footprint("ddp", "whole", 100, 1200, 100, 100, 1, 2),
        Footprint("local_sgd", "whole", 100, 1200, 100, 100, 10, 2),
        Footprint("resist", "blocks", 50, 600, 40, 60, 10, 4),
    ]
    return predict(found, compute, bandwidth, latency)


EQUAL, HALF = {"whole": 1.0, "blocks": 1.0}, {"whole": 1.0, "blocks": 0.5}
COSTS = {"local_sgd": 1.0, "resist": 3.0}


def test_seconds_are_compute_and_bytes_over_bandwidth_of_the_worker_that_sends_most() -> None:
    ddp, local_sgd, resist = rows_over(10, HALF, latency=0.5)
    assert (ddp.seconds, ddp.communicating, ddp.speed) == (1 + 10 + 1, 11 / 12, 1)
    assert local_sgd.seconds == pytest.approx(1 + 1 + 0.1)
    assert resist.seconds == pytest.approx(0.5 + 0.6 + 0.2)
    assert (resist.sent_bytes, resist.share, resist.speed) == (4, 0.5, pytest.approx(12 / 1.3))


@pytest.mark.parametrize(
    ("bandwidth", "compute", "costs", "point", "expected"),
    [
        # Over a fast link only less computing helps; half of it is worth three points, at one price.
        (1e12, EQUAL, COSTS, 1.2, Advice("ddp", smaller="resist")),
        (1e12, HALF, COSTS, 1.2, Advice("resist", "ddp")),
        (1e12, HALF, COSTS, 1.3, Advice("ddp", faster="resist", smaller="resist")),
        # Over a slow one a step takes 10 or 6: worth two points, but not three, forty, or an unknown number.
        (1e-3, HALF, COSTS, 1.2, Advice("resist", "local_sgd")),
        (1e-3, HALF, {**COSTS, "resist": 4.0}, 1.2, Advice("local_sgd", "ddp", "resist", "resist")),
        (1e-3, HALF, {**COSTS, "resist": 41.0}, 1.2, Advice("local_sgd", "ddp", "resist", "resist")),
        (1e-3, HALF, {"local_sgd": 1.0}, 1.2, Advice("local_sgd", "ddp", "resist", "resist")),
        (1e-3, HALF, {}, 1.2, Advice("ddp", faster="resist", smaller="resist")),
        # Where speed alone counts, cost does not.
        (1e-3, HALF, {**COSTS, "resist": 41.0}, 1.0, Advice("resist", "local_sgd")),
    ],
)
def test_advice_at_the_ends(
    bandwidth: float, compute: dict[str, float], costs: dict[str, float], point: float, expected: Advice
) -> None:
    rows = rows_over(bandwidth, compute)
    found = advise(rows, costs, point)
    assert found == expected

    said = tables.advice_in_words(found, {row.method: row for row in rows}, costs, point)
    assert said.startswith(f"Take {accuracy.TITLES[expected.method]}: ")
    for other in (expected.faster, expected.more_accurate, expected.smaller):
        assert other is None or accuracy.TITLES[other] in said


def test_seconds_that_are_given_are_scaled_by_what_is_computed() -> None:
    assert scaled(3.0, {"whole": 300, "blocks": 200}) == {"whole": 3.0, "blocks": 2.0}


def record(folder: Path, *cases: tuple[str, int, int, float], samples: int = 8) -> Path:
    """A result file of the accuracy study: method, workers, seed, accuracy."""
    rows = [
        {"case": {"method": method, "workers": workers, "seed": seed}, "last": last, "samples": samples}
        for method, workers, seed, last in cases
    ]
    settings = {"data": "folder", "shrink": 1, "deep": 9, "width": 0.5}
    write_record(folder / "main.jsonl", {"settings": settings, "rows": rows}, gpu=None)
    return folder


def test_costs_are_means_over_the_seeds_that_ddp_has_too(tmp_path: Path) -> None:
    folder = record(
        tmp_path, ("ddp", 2, 0, 90.0), ("ddp", 2, 1, 92.0), ("resist", 2, 0, 89.0), ("resist", 2, 1, 89.0),
        ("resist", 2, 2, 10.0), ("resist", 8, 0, 80.0), ("single", 1, 0, 50.0),
    )  # fmt: skip
    (study,) = accuracy.residual_studies([folder])
    # One method's cost with eight workers would look large beside the other's with two.
    record(tmp_path / "more", ("ddp", 2, 0, 90.0), ("resist", 2, 0, 89.0), ("local_sgd", 8, 0, 80.0))
    (more,) = accuracy.residual_studies([tmp_path / "more"])

    assert more.costs(2).keys() == {"resist"}
    assert more.costs(4).keys() == {"local_sgd"}
    assert study.costs(2) == {"resist": accuracy.Cost(2.0, folder.name, 2, 2)}
    # Three workers were not measured: the next larger number counts, against the DDP that was.
    assert study.costs(3) == study.costs(64) == {"resist": accuracy.Cost(10.0, folder.name, 8, 1)}
    assert tables.cost_in_words("resist", accuracy.costs_of([study], 3), 3) == f"-10.0 ({folder.name}, S = 8)"
    assert tables.cost_in_words("ist", {}, 3) == "not measured"


def test_the_study_at_full_height_counts_where_it_compares_as_many_workers_and_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual_studies = accuracy.residual_studies
    full = record(tmp_path / "full", ("single", 1, 0, 90.0), ("ddp", 2, 0, 90.0), ("resist", 2, 0, 89.0))
    short = record(tmp_path / "short", ("ddp", 2, 0, 45.0), ("resist", 8, 0, 40.0))
    more = record(tmp_path / "more", ("ddp", 2, 0, 45.0), ("resist", 2, 0, 40.0), ("local_sgd", 2, 0, 41.0))
    eight = record(tmp_path / "eight", ("ddp", 8, 0, 45.0), ("resist", 8, 0, 40.0), ("local_sgd", 8, 0, 41.0))
    first, second, third, fourth = accuracy.residual_studies([full, short, more, eight])
    monkeypatch.setattr(accuracy, "residual_studies", lambda: [first, second])

    assert accuracy.studies_for(neurons_only=False, workers=2) == [first]
    assert accuracy.studies_for(neurons_only=False, workers=8) == [second]
    # Three were not measured: the next larger number counts. Nor were 64, or more.
    assert accuracy.studies_for(neurons_only=False, workers=3) == [second]
    assert accuracy.studies_for(neurons_only=False, workers=64) == [first]

    monkeypatch.setattr(accuracy, "residual_studies", lambda: [first, third])
    assert accuracy.studies_for(neurons_only=False, workers=2) == [third]

    # The same number of workers goes before more methods with a larger one.
    monkeypatch.setattr(accuracy, "residual_studies", lambda: [first, fourth])
    assert accuracy.studies_for(neurons_only=False, workers=2) == [first]
    assert accuracy.studies_for(neurons_only=False, workers=4) == [fourth]

    # Long trainings go before both, where they measured enough workers.
    long = record(tmp_path / "long", ("ddp", 4, 0, 90.0), ("resist", 4, 0, 80.0), samples=800)
    (fifth,) = residual_studies([long])
    monkeypatch.setattr(accuracy, "residual_studies", lambda: [first, fourth, fifth])
    assert accuracy.studies_for(neurons_only=False, workers=2) == [fifth]
    assert accuracy.studies_for(neurons_only=False, workers=8) == [fourth]


def test_the_example_of_the_page_has_the_closed_forms_of_its_settings() -> None:
    content = read_record(tables.RESULTS / "advise.jsonl")
    settings = content["settings"]
    found, _ = tables.closed_forms({**settings, "network": {"depth": settings["model"]["depth"]}})
    rows = {row.method: row for row in tables.rows_of(content)}
    assert rows.keys() == {one.method for one in found}
    for one in found:
        row = rows[one.method]
        assert (row.parameters, row.memory_bytes) == (one.parameters, one.memory_bytes)
        assert row.sent_bytes == pytest.approx(one.sync_bytes / one.local_steps)


MINE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(x))

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(6)))
        self.head = nn.Linear(width, num_classes)
        self.stem.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
"""


def test_a_network_from_outside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_package.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "size=smoke",
        "model._target_=my_package.Net",
        "model.width=8",
        "link=1mbit",
        "workers=2",
        f"out={tmp_path}",
    ]

    assert command.main([*words, "optimizer_slots=2", "classes=3"]) == 0

    content = read_record(tmp_path / "advise.jsonl")
    rows = {row["method"]: row for row in content["rows"]}
    assert rows.keys() == {"ddp", "local_sgd", "diloco", "resist", "resist_outer"}
    block, rest = 8 * 8 * 9 + 8, (3 * 8 * 9 + 8) + (8 * 3 + 3)
    assert rows["ddp"]["parameters"] == rest + 6 * block
    # The first block is shared, and a worker has up to three of the five others.
    assert rows["resist"]["parameters"] == rest + 4 * block
    assert rows["resist"]["memory_bytes"] == 4 * 4 * (rest + 4 * block)
    assert all(row["compute_seconds"] > 0 for row in rows.values())
    shown = capsys.readouterr().out
    assert "No IST" in shown
    assert "8 parameters are frozen, and counted as if they trained" in shown
    assert "Take " in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=resnet"], "error: model=resnet: must be one of mlp, preact, torchvision, or a network of your own"),
        (["model.deph=14"], "did you mean model.depth?"),
        (["model._target_=nowhere.Net"], "error: model._target_=nowhere.Net: cannot be imported"),
        (["model._target_=fractions.Fraction"], "not a torch.nn.Module"),
        (["link=quick"], "error: link=quick: must be a number above 0"),
        (["workers=1"], "error: workers=1: must be a whole number, at least 2"),
        (["input=3x"], "error: input=3x: must be numbers joined by x"),
        (
            ["input=4x8x8", "model=torchvision", "model.in_channels=3"],
            "give the shape of one example, such as input=3x224x224",
        ),
        (["model=mlp", "wire=int7"], "error: wire=int7: must be one of fp32"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["size=smoke", f"out={tmp_path}", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_half_precision_is_refused_where_memory_would_be_wrong() -> None:
    with pytest.raises(ValueError, match="its parameters are bfloat16, and memory is computed for float32"):
        footprint.check_parameters(nn.Linear(2, 2).bfloat16())


def test_min_blocks_that_divides_nothing_is_said() -> None:
    def make() -> nn.Module:
        return preact_resnet(26, width_multiplier=1 / 16)

    image = torch.randn(1, 3, 8, 8)
    everything = len(BlockLayout(make(), Config(), 2).blocks)
    parts, refused = divide(make, image, Setting(2, 10, min_blocks=everything))
    assert refused["blocks"] == f"min_blocks={everything} gives every worker all {everything} blocks"
    assert "blocks" not in parts

    parts, _ = divide(make, image, Setting(2, 10, min_blocks=1))
    whole = operations(parts["blocks"].module, image)
    parts["blocks"].hold()
    assert operations(parts["blocks"].module, image) < whole
