from __future__ import annotations

from typing import Any

import pytest

from resist_lightning.strategies.saving.restarts import Saving


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_save_error": "ignore"}, "on_save_error='ignore' is not known; choose one of 'raise', 'warn'"),
        ({"on_worker_loss": "wait"}, "on_worker_loss='wait' is not known; choose one of 'stop', 'shrink'"),
        ({"snapshot_every_n_rounds": 0}, "snapshot_every_n_rounds=0 must be a whole number of at least 1"),
        ({"snapshots": "memory://folder"}, "snapshots='memory://folder' must be a folder with a local path"),
        ({"on_worker_loss": "shrink"}, "name a folder that all workers can read, snapshots=FOLDER"),
    ],
)
def test_bad_settings_name_the_value_and_the_way_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Saving(**options)


def test_shrinking_is_refused_where_the_workers_could_not_meet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    saving = Saving(snapshots="folder", on_worker_loss="shrink")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        saving.check_launch()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    saving.check_launch()


def test_without_torchrun_a_warning_says_that_nobody_starts_the_workers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.warns(UserWarning, match="needs `torchrun --nnodes=MIN:MAX`"):
        Saving(snapshots="folder", on_worker_loss="shrink").check_launch()
