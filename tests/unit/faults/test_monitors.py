from __future__ import annotations

import pytest

from resist_lightning.faults.messages import Process
from resist_lightning.faults.monitors import NEIGHBOURS, choose_monitors, choose_neighbours


def processes(*homes: str) -> list[Process]:
    return [Process(worker, home, home, 100 + worker) for worker, home in enumerate(homes)]


@pytest.mark.parametrize(
    ("homes", "monitors"),
    [("a", [0]), ("aa", [0, 1]), ("aaa", [0, 1]), ("aaabbc", [0, 3]), ("abababab", [0, 1])],
)
def test_the_second_monitor_is_on_another_host_where_there_is_one(homes: str, monitors: list[int]) -> None:
    assert choose_monitors(processes(*homes)) == monitors


def test_on_a_usual_host_everybody_sees_everybody() -> None:
    here = processes(*"ab" * (NEIGHBOURS + 1))
    for worker in range(len(here)):
        seen = [process.worker for process in choose_neighbours(here, worker)]
        assert sorted(seen) == [other for other in range(worker % 2, len(here), 2) if other != worker]


def test_on_a_large_host_each_process_is_seen_by_some_and_a_monitor_sees_all() -> None:
    here = processes(*"a" * 100)
    seen = {worker: [each.worker for each in choose_neighbours(here, worker)] for worker in range(100)}
    assert seen[0] == list(range(1, 100))
    assert seen[98] == [99, 0, 1, 2, 3, 4, 5, 6]
    for worker in range(100):
        assert sum(worker in others for others in seen.values()) >= NEIGHBOURS
