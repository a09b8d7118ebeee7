"""Links of chosen bandwidth: the network that is made, the measurements on it, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import cli
from experiments.harness.links import namespaces as rig
from experiments.harness.record import read_record
from experiments.harness.settings import ConfigError
from experiments.links import link_model, overlap, summary, tables
from experiments.links import rig as options
from experiments.links.run import Options
from tests.helpers.interpreters import warm
from tests.helpers.namespaces import MISSING, needs_namespaces
from tests.helpers.processes import run_workers
from tests.helpers.programs import ROOT, as_a_main_process, run_module

RUN = "experiments/links/run.py"


@pytest.fixture(autouse=True)
def leaves_no_namespace() -> Iterator[None]:
    """Fail the test that leaves a namespace."""
    before = set() if MISSING else rig.namespaces_in_use()
    yield
    left = set() if MISSING else rig.namespaces_in_use() - before
    for name in left:
        subprocess.run(["ip", "netns", "del", name], check=True)
    assert not left


@needs_namespaces
def test_links_have_the_rate_that_was_asked_for() -> None:
    with rig.namespaces(3) as network:
        network.shape(0.1)
        shaped = network.shapers()
        network.shape(1)
        faster = network.shapers()
        network.shape(None)
        lifted = network.shapers()

    assert [(item["kind"], item["options"]["rate"]) for item in shaped] == [("tbf", 12_500_000)] * 6
    assert [item["options"]["rate"] for item in faster] == [125_000_000] * 6
    assert [item["device"] for item in shaped] == ["resist0"] * 3 + ["port0", "port1", "port2"]
    assert "tbf" not in {item["kind"] for item in lifted}


@needs_namespaces
def test_the_hosts_own_network_is_not_touched() -> None:
    def links() -> str:
        return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout

    before = links()
    with rig.namespaces(2) as network:
        assert len({item for item in rig.namespaces_in_use() if item.startswith(network.name)}) == 3
        assert links() == before


@needs_namespaces
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_inside_leaves_no_namespace(error: type[BaseException]) -> None:
    with pytest.raises(error), rig.namespaces(2) as network:
        raise error
    assert not [item for item in rig.namespaces_in_use() if item.startswith(network.name)]


@needs_namespaces
def test_a_name_in_use_is_refused_and_what_uses_it_stays() -> None:
    with rig.namespaces(2, "rl-test-taken"):
        with pytest.raises(ConfigError, match="rl-test-taken-0 is in use"):
            options.check_name("rl-test-taken")
        with pytest.raises(ConfigError, match=r"letters, digits"):
            options.check_name("no spaces")
        assert "rl-test-taken-1" in rig.namespaces_in_use()


def test_buckets_hold_some_packets_and_little_time() -> None:
    assert rig.burst_bytes(100_000_000) == 128 * 1024
    assert rig.burst_bytes(10_000_000_000) == 1_250_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A smoke run."""
    folder = tmp_path_factory.mktemp("links")
    output = run_module("experiments.links.run", "size=smoke", "bandwidths_gbit=[0.1]", f"out={folder}")
    assert {path.name for path in folder.iterdir()} == {"links.jsonl", "links.png"}
    return {"output": output, **read_record(folder / "links.jsonl")}


@needs_namespaces
def test_what_was_counted_is_the_closed_form_and_what_the_kernel_saw(measured: dict[str, Any]) -> None:
    runs = [item for item in measured["runs"] if item["method"] in ("resist", "local_sgd")]
    assert len(runs) == 2
    for item in runs:
        for worker in item["workers"]:
            form = worker["closed_form"]
            assert len(form) == len(worker["syncs"]) == 2
            counted = worker["counted"]
            training = sum(counted.get(kind, 0) for kind in ("shared", "merge", "hand_over", "state"))
            assert training == sum(sync["sent"] for sync in form) > 1e6
            assert training + counted["control"] <= worker["kernel"]["sent"] <= 1.03 * training + 20_000
            assert sum(sync["received"] for sync in form) <= worker["kernel"]["received"]
    assert runs[1]["workers"][0]["counted"]["hand_over"] > 0


@needs_namespaces
def test_workers_of_two_processes_send_each_byte_over_the_slow_link_once(tmp_path: Path) -> None:
    """Of workers of one process that share a node, only bytes to the other node cross the link."""
    run_module("experiments.links.run", "size=nodes_smoke", "methods=[resist,resist_node]", f"out={tmp_path}")
    measured = read_record(tmp_path / "nodes.jsonl")
    single, node = (row["bytes_per_sync"] for row in measured["rows"])
    for sent in (single, node):
        assert sent["counted"] == sent["closed_form"]
        assert sent["crossing"] < sent["kernel"] < 1.05 * sent["crossing"]
    assert node["counted"] == node["crossing"] < single["crossing"] < single["counted"]
    assert [len(run["shapers"]) for run in measured["runs"]] == [4, 4]  # both ends of two links, and four processes
    held = [row["inside_bytes"]["step"] for row in measured["rows"]]
    assert held[0] == 0 < held[1]


@needs_namespaces
def test_rounds_that_overlap_their_sync_send_what_others_send(tmp_path: Path) -> None:
    run_module("experiments.links.overlap", "size=smoke", f"out={tmp_path}")
    measured = read_record(tmp_path / "overlap.jsonl")
    for workers in (2, 3):
        rows = {row["way"]: row for row in measured["rows"] if row["case"]["workers"] == workers}
        assert list(rows) == ["none", "waits", "overlap", "auto", *(["fragments"] if workers == 2 else [])]
        assert rows["none"]["sent_bytes"] == 0 < rows["waits"]["sent_bytes"] == rows["overlap"]["sent_bytes"]
        assert all(row["bytes_equal_closed_form"] and len(row["seconds"]) == 1 for row in rows.values())
        assert rows["auto"]["overlap"] == rows["auto"]["chosen"]["local_steps"] <= 2
        if workers == 2:
            assert rows["fragments"]["sent_bytes"] < rows["waits"]["sent_bytes"]
            assert (rows["fragments"]["steps"], rows["fragments"]["local_steps"]) == (3, 3)
    assert [row["workers"] for row in measured["beyond"]] == [4]
    assert 0 < measured["beyond"][0]["computed"] <= 1


def test_a_sync_costs_what_does_not_fit_into_the_steps_beside_it() -> None:
    """By hand: 12.5 MB over 0.1 Gbit/s take 1 s, and a round of 10 steps of 0.2 s has 0, 3 or 5 of them beside it."""
    sync = link_model.sync_seconds(12.5e6, 0.1)
    assert sync == pytest.approx(1.0)
    assert [link_model.step_seconds(0.2, sync, 10, steps) for steps in (0, 3, 5, 9)] == pytest.approx(
        [0.3, 0.24, 0.2, 0.2]
    )

    case = {"workers": 2, "width_multiplier": 1.0, "gbit": 0.1, "local_steps": 50, "steps_per_round": 10, "overlap": 3}
    rows = [
        {"case": case, "way": way, "seconds": seconds, "overlap": steps, "chosen": None, "sent_bytes": 12.5e6,
         "steps": done, "local_steps": length,
         "link_bytes": 12.5e6, "bytes_equal_closed_form": True}
        for way, seconds, steps, done, length in (
            ("none", [2.0, 4.0], 0, 10, 50), ("waits", [3.0, 5.0], 0, 10, 50), ("auto", [2.5, 4.2], 4, 10, 50),
            ("fragments", [4.4, 8.0], 3, 20, 5),
        )
    ]  # fmt: skip
    more = [{"workers": 4, "width_multiplier": 1.0, "computed": 0.5, "link_bytes": 25e6}]
    content = {"settings": {"depth": 101, "batch": 8}, "rows": rows, "beyond": more}
    waits, auto, fragments, *predicted = tables.overlap(content).rows
    # A round of 50 steps would take 10 s and 20 s, and the sync adds one second.
    assert waits[4:] == ["waits", "0.323", "1.075", "1.100 1.050", "1.067", "-", "12.50 MB"]
    assert auto[4:] == ["auto: 4", "0.309", "1.030", "1.050 1.010", "1.000", "1.05", "12.50 MB"]
    # Four syncs in 20 steps, which would take 4 s and 8 s.
    assert fragments[4:7] == ["fragments, each 5 steps, overlap=3", "0.315", "1.050"]
    assert [row[4:] for row in predicted] == [
        ["waits", "-", "-", "-", "1.267", "-", "25.00 MB"],
        ["auto: 16", "-", "-", "-", "1.000", "-", "25.00 MB"],
    ]


@needs_namespaces
def test_all_bytes_went_through_the_shapers(measured: dict[str, Any]) -> None:
    for item in measured["runs"]:
        assert [shaper["options"]["rate"] for shaper in item["shapers"]] == [12_500_000] * 4
        for worker, shaper in zip(item["workers"], item["shapers"], strict=False):
            # A last acknowledgement, a packet of 66 bytes, may still wait in the shaper.
            assert worker["kernel"]["sent"] - 200 <= shaper["bytes"] <= 1.1 * worker["kernel"]["sent"] + 20_000
            assert shaper["drops"] == 0


@needs_namespaces
def test_every_method_has_its_row(measured: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in measured["rows"]}
    assert list(rows) == ["ddp", "local_sgd", "resist", "none", "parameter_server"]
    assert rows["none"]["share_of_limit"] == 1
    assert rows["ddp"]["speed_up_over_ddp"] == 1
    model = measured["runs"][0]["workers"][0]["model_bytes"]
    assert rows["ddp"]["bytes_per_sync"]["closed_form"] == model
    assert rows["resist"]["held_bytes"] < rows["local_sgd"]["held_bytes"] == 3 * model
    resist = rows["resist"]
    assert resist["seconds_per_step"] == resist["compute_seconds"] + resist["sync_seconds"] / 50
    assert sum(resist["parts"].values()) == pytest.approx(resist["sync_seconds"])
    assert "ResIST" in measured["output"]
    assert not re.search("/work|/tmp", json.dumps(measured["settings"]))


def test_the_rows_of_a_run_known_by_hand() -> None:
    """Two workers; one comes 1 s late, and its sync takes 4.4 s where the link would allow 4 s."""

    def worker(step: float, waiting: float, sent: int) -> dict[str, Any]:
        sync = {"seconds": 4.4 + waiting, "waiting": waiting, "averaging": 2.0, "hand_over": 2.0, "packing": 0.4}
        return {
            "step_seconds": [step, step, 9.0],
            "window_seconds": 30.0,
            "syncs": [sync],
            "counted": {"shared": sent, "control": 64},
            "closed_form": [{"sent": sent, "received": 50_000_000}],
            "crossing": [{"sent": sent, "received": 50_000_000}],
            "inside": {"gradients": 30, "shared": 4},
            "kernel": {"sent": 1.01 * sent, "received": 0},
            "peak_rss_bytes": 7,
            "held_bytes": 5,
        }

    runs = [{"method": "resist", "bandwidth_gbit": 0.1, "workers": [worker(1.0, 1.0, 50_000_000), worker(2.0, 0.0, 4)]}]
    (row,) = summary.summarise({"local_steps": 10, "steps_per_round": 3, "per_node": 1}, runs)
    (really,) = summary.summarise({"local_steps": 3, "steps_per_round": 3, "per_node": 1}, runs)

    assert row["compute_seconds"] == 2.0
    assert row["sync_seconds"] == pytest.approx(4.4)
    assert row["seconds_per_step"] == pytest.approx(2.44)
    assert really["seconds_per_step"] == row["window_seconds_per_step"] == 10.0
    assert row["ideal_sync_seconds"] == pytest.approx(4.0)
    assert row["sync_over_ideal"] == pytest.approx(1.1)
    assert row["step_over_ideal"] == pytest.approx(2.44 / 2.4)
    assert row["bytes_per_sync"]["counted"] == row["bytes_per_sync"]["closed_form"] == 25_000_002
    assert row["inside_bytes"] == pytest.approx({"step": 10, "sync": 4})

    (of_node,) = summary.summarise({"local_steps": 10, "steps_per_round": 3, "per_node": 2}, runs)
    sent = of_node["bytes_per_sync"]
    assert sent["counted"] == sent["closed_form"] == 50_000_004  # of both workers
    assert sent["crossing"] == 25_000_002  # each reports that of its node
    assert of_node["inside_bytes"] == pytest.approx({"step": 20, "sync": 8})

    of_node["bytes_per_sync"]["kernel"] = None  # as without root
    settings = {"workers": 2, "per_node": 2}
    (cells,) = tables.nodes({"settings": settings, "rows": [{**of_node, "method": "resist_node"}]}).rows
    assert cells[:2] == ["0.1 Gbit/s", "ResIST, 1 workers of 2"]
    assert cells[7:11] == ["-", "25.00 MB", "-", "50.00 MB"]


@needs_namespaces
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """The fixtures check for leftover namespaces and processes."""
    before = rig.namespaces_in_use()
    (tmp_path / "out").mkdir()
    (code,) = run_workers(interrupted, 1, str(tmp_path), timeout=100)

    assert code == 130
    assert (tmp_path / "output").read_text().splitlines()[-1].startswith("interrupted: nothing is left behind")
    assert rig.namespaces_in_use() == before
    assert not list((tmp_path / "out").iterdir())


def interrupted(_: int, folder: str) -> int:
    """Start the program as a fork, and interrupt it when its workers have started; returns its exit code."""
    as_a_main_process()
    warm()
    before = rig.namespaces_in_use()
    arguments = ["size=smoke", "methods=[resist]", "rounds=1000", f"out={folder}/out"]
    with Path(folder, "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, RUN, *arguments], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + 60
    # Its children are its own template of interpreters, and the servers in two namespaces.
    while len(rig.namespaces_in_use() - before) < 3 or len(children(process.pid)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.wait(30)


@needs_namespaces
def test_a_sigterm_leaves_nothing() -> None:
    def be_ended() -> None:
        with rig.namespaces(2) as network:
            assert network.bridge in rig.namespaces_in_use()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        be_ended()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("workers: 2, gbit: 1, local_steps: 5", "must have exactly workers, width_multiplier, gbit, local_steps"),
        (
            "workers: 2, gbit: 1, local_steps: 5, steps_per_round: 5, overlap: 5",
            "overlap < steps_per_round <= local_steps",
        ),
        ("workers: 1, gbit: 1, local_steps: 5, steps_per_round: 5, overlap: 3", "workers=1 of"),
        ("workers: 2, gbit: fast, local_steps: 5, steps_per_round: 5, overlap: 3", "gbit=fast of"),
        ("workers: 2, gbit: 999, local_steps: 5, steps_per_round: 5, overlap: 3", "gbit=999 of .* at most 100"),
    ],
)
def test_a_bad_case_of_the_overlap_is_one_line(case: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.read([f"cases=[{{{case}}}]"], overlap.Options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=[resits]"], "'resits' is not known; choose from ddp, local_sgd"),
        (["bandwidths_gbit=[0]"], "0 must be a number of Gbit/s from 0.001 to 100, or unshaped"),
        (["bandwidths_gbit=[fast]"], "'fast' must be a number"),
        (["methods=[ist]"], "'ist' divides the neurons of fully connected networks (size=ist); take resist"),
        (["size=ist_smoke", "methods=[resist]"], "divides residual blocks, and a fully connected network has none"),
        (["size=ist_smoke", "network.width=1"], "has 1 neurons for 2 workers"),
        (["size=ist_smoke", "network.width=0"], "width=0 must be at least 1"),
        (["network=3"], "network=3: must have depth and width_multiplier, or depth and width"),
        (["network.depth=18"], "depth=18 is unknown; choose one of 14, 26"),
        (["min_blocks=9"], "min_blocks=9 is impossible with 5 partitionable block(s)"),
        (["steps_per_round=51"], "steps_per_round=51 is above local_steps=50"),
        (["per_node=2"], "per_node=2 must divide workers=2 into two nodes or more"),
        (["methods=[resist_node]"], "'resist_node' needs nodes of several processes"),
        (["size=nodes_smoke", "methods=[resist_int8]"], "'resist_int8' needs per_node=1; with per_node=2 use ddp"),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cli.read(["size=smoke", *arguments][-2:], Options)
    assert message in str(raised.value)


def test_without_root_or_tools_only_the_unshaped_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert rig.why_no_namespaces() == "no ip and no tc here (install iproute2)"
    with options.network(2, [0.1, "unshaped"]) as (network, bandwidths):
        assert bandwidths == [None]
        assert network.command(1) == []
        assert network.address == "127.0.0.1"
        assert not network.counts
