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
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # agents count restarts each for itself
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
    assert 0 < torchrun.agent(1) < 2**53  # it travels as a float64
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert torchrun.agent(1) == 0
