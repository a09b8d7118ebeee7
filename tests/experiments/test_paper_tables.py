"""The paper's accounting: numbers printed in the paper, derived by hand, or stated by torchvision, against ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.harness.record import read_record
from experiments.networks import PAPER_BLOCKS
from experiments.paper_tables.networks import Network, count_parameters, measure, networks, on_meta, paper_network
from experiments.paper_tables.volumes import sent, table_1
from resist_lightning import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.models import preact_resnet
from tests.helpers.programs import run_module

SHARED, BLOCK = 15_422_116, 1_180_672

# Table 1 of the paper; 0.454 is 0.45455 truncated, all others are rounded.
PRINTED = {2: (0.662, 0.454), 4: (1.325, 0.720), 8: (2.649, 1.289)}
COUNTS = {2: [11, 11], 4: [6] * 4, 8: [4] * 8}


def by_name(name: str) -> Network:
    (network,) = [network for network in networks("full") if network.name == name]
    return network


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The result file of the command itself, its output, and its folder."""
    out = tmp_path_factory.mktemp("paper_tables") / "new"
    output = run_module("experiments.paper_tables.run", "size=smoke", f"out={out}")
    return read_record(out / "paper_tables.jsonl"), output, out


@pytest.mark.parametrize("workers", PRINTED)
def test_table_1_of_the_paper(workers: int) -> None:
    row = table_1(workers)
    local_sgd, resist = row["local_sgd_bytes"] / 1e9, row["resist_bytes"] / 1e9

    assert row["held"] == COUNTS[workers]
    assert round(local_sgd, 3) == PRINTED[workers][0]
    assert (int(resist * 1000) / 1000 if workers == 2 else round(resist, 3)) == PRINTED[workers][1]
    assert row["resist_bytes"] == 8 * (workers * SHARED + sum(COUNTS[workers]) * BLOCK)


def test_313_rounds_of_table_1_are_the_end_of_the_curve_in_figure_4() -> None:
    assert round(313 * table_1(4)["resist_bytes"] / 1e9, 1) == 225.4


@pytest.mark.parametrize(("workers", "held"), [(4, [6, 6, 5, 5]), (8, [5] * 8)])
def test_other_counts_do_not_give_the_printed_volumes(workers: int, held: list[int]) -> None:
    volume = 8 * (workers * SHARED + sum(held) * BLOCK) / 1e9
    assert abs(volume - PRINTED[workers][1]) > 0.01


def test_two_workers_send_the_shared_layers_and_the_blocks_that_move() -> None:
    layout = BlockLayout(on_meta(lambda: paper_network(101)), Config(), 2)
    rounds = 20
    moved = 0
    for round in range(rounds):
        before, after = layout.schedule.partition(round).held, layout.schedule.partition(round + 1).held
        moved += sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))

    found = sent(layout, rounds)

    assert moved
    assert found["sent_bytes"] == pytest.approx(2 * 4 * SHARED + 4 * BLOCK * moved / rounds, rel=1e-12)
    assert found["most_by_a_worker_bytes"] == pytest.approx(found["sent_bytes"] / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "all_parameters"),
    [('"101", 100 classes', 41_396_900), ('"101", 10 classes', 41_350_730),
     ('"152", 100 classes', SHARED + 35 * BLOCK), ('"200", 100 classes', SHARED + 49 * BLOCK)],
)  # fmt: skip
def test_parameters_of_the_papers_networks(name: str, all_parameters: int) -> None:
    module = on_meta(by_name(name).make)
    parameters = count_parameters(module, select_blocks(module, PAPER_BLOCKS))
    shared = SHARED if "100 classes" in name else SHARED - 90 * 513
    assert parameters == {"all": all_parameters, "shared": shared, "by_block": [BLOCK]}


@pytest.mark.parametrize(("name", "blocks"), [("resnet34", 5), ("resnext50_32x4d", 5), ("wide_resnet50_2", 5)])
def test_torchvision_states_the_same_parameters_and_macs(name: str, blocks: int) -> None:
    found = measure(by_name(name))
    assert found["blocks"] == blocks
    assert found["parameters"]["all"] == found["stated"]["parameters"]
    assert found["macs"]["all"] / 1e9 == pytest.approx(found["stated"]["gmacs"], abs=0.0006)


def macs_by_hand(blocks: int) -> int:
    """Multiply-adds of the paper's "101" (100 classes, 32 x 32): convolutions times positions, and the head."""
    stem = 3 * 64 * 9 * 32**2
    sections = 3 * 2 * 64 * 64 * 9 * 32**2
    for places, width, kept in ((16**2, 128, 3), (8**2, 256, blocks), (4**2, 512, 2)):
        first = (width // 2) * width * 9 + width * width * 9 + (width // 2) * width
        sections += places * (first + kept * 2 * width * width * 9)
    return stem + sections + 512 * 100


def test_macs_of_the_papers_network_and_its_subnetworks(smoke: tuple[dict[str, Any], str, Path]) -> None:
    found = smoke[0]["networks"][0]
    assert found["network"] == '"101", 100 classes'
    known = {22: 2.443, 11: 1.612, 6: 1.235, 5: 1.159, 4: 1.084}
    counted = {22: found["macs"]["all"]} | {
        subnet["held"][0]: subnet["macs"] for subnet in found["subnets"] if len(set(subnet["held"])) == 1
    }
    assert counted == {blocks: macs_by_hand(blocks) for blocks in known}
    assert {blocks: round(macs / 1e9, 3) for blocks, macs in counted.items()} == known


def test_the_ratio_follows_the_formula_and_the_mean_worker(smoke: tuple[dict[str, Any], str, Path]) -> None:
    for network in smoke[0]["networks"]:
        assert len(network["subnets"]) >= 6
        for subnet in network["subnets"]:
            assert subnet["ratio"] == pytest.approx(subnet["ratio_by_formula"], abs=1e-9)
    first = smoke[0]["networks"][0]["subnets"]
    uneven = [subnet for subnet in first if subnet["held"] == [3] * 6 + [2] * 2]
    assert [subnet["macs"] for subnet in uneven] == [(6 * macs_by_hand(3) + 2 * macs_by_hand(2)) / 8]
    assert [subnet["memory_bytes"] for subnet in uneven] == [12 * (SHARED + 2.75 * BLOCK)]


def narrow_sizes(width: float) -> tuple[int, int]:
    """Numbers of parameters of the narrow network: shared, and of a partitioned block."""
    net = preact_resnet(101, num_classes=100, width_multiplier=width)
    block = sum(parameter.numel() for parameter in net.section3[1].parameters())
    return sum(parameter.numel() for parameter in net.parameters()) - 22 * block, block


def test_real_workers_hold_the_bound_and_send_the_closed_form(smoke: tuple[dict[str, Any], str, Path]) -> None:
    expected = {4: {5, 6}}
    assert [group["workers"] for group in smoke[0]["measured"]] == list(expected)
    for group in smoke[0]["measured"]:
        shared, block = narrow_sizes(group["width_multiplier"])
        assert len(group["by_worker"]) == group["workers"]
        steps = [step for worker in group["by_worker"] for step in worker["steps"]]
        assert {step["blocks"] for step in steps} == expected[group["workers"]]
        assert len(steps) == group["workers"] * group["rounds"] * group["local_steps"]
        for step in steps:
            assert step["held_bytes"] == step["bound_bytes"] == 12 * (shared + step["blocks"] * block)
        for worker in group["by_worker"]:
            assert worker["sent_bytes"] == worker["sent_bytes_by_formula"] > 0
