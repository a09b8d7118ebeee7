from __future__ import annotations

import pytest

from resist_lightning.comm import torchrun

VARIABLES = {
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "GROUP_WORLD_SIZE": "1",
}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def test_where_the_store_stays_every_attempt_of_one_agent_has_its_name() -> None:
    assert torchrun.attempt() == "2"


def test_where_each_attempt_has_a_store_all_have_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # each agent counts restarts for itself
    assert torchrun.attempt() == "0"


def test_a_restart_of_several_agents_that_cannot_meet_names_the_variable_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        torchrun.attempt()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert torchrun.attempt() == "0"


def test_an_agent_is_the_same_for_the_same_fit_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun.agent(1) == torchrun.agent(1) != torchrun.agent(2)
    assert 0 < torchrun.agent(1) < 2**53  # it is sent as a float64
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert torchrun.agent(1) == 0


def test_a_host_with_another_number_of_processes_than_devices_is_refused() -> None:
    two_and_two = {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    torchrun.check_processes(two_and_two, 2, 2)
    said = r"started 3 process\(es\) on this host.*devices=2, num_nodes=2\).*Trainer\(devices=4, num_nodes=1\)"
    with pytest.raises(ValueError, match=said):  # 3 + 1, which Lightning would take for 2 + 2
        torchrun.check_processes({**two_and_two, "LOCAL_WORLD_SIZE": "3"}, 2, 2)


def test_hosts_may_have_different_numbers_where_all_are_said_to_be_on_one_node() -> None:
    torchrun.check_processes({"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}, 3, 1)
    with pytest.raises(ValueError, match="started 1 process"):
        torchrun.check_processes({"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, 3, 1)
