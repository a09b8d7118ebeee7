from __future__ import annotations

import pytest

from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.saving.restarts import check_shrinking


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
