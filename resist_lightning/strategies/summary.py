"""Messages to the user at the start and at the end of a training."""

from __future__ import annotations

from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from resist_lightning.engine.engine import Engine
from resist_lightning.methods.layout import Layout


def division_in_words(layout: Layout, members: int) -> str:
    """How the network is divided among workers of ``members`` processes each, in words."""
    split = f" A worker has {members} processes, which split its batches." if members > 1 else ""
    # On CPUs Lightning's default is one device, so a Trainer without `devices` trains alone.
    alone = _ALONE if layout.workers == 1 else ""
    return f"{layout.describe()}{split}{alone}"


def sent_in_words(engine: Engine) -> str:
    """A worker's mean traffic in training and for full models, in words; the engine must have finished."""
    by_kind = {kind: sum(sent) / len(sent) / 1e6 for kind, sent in engine.sent_bytes_by_worker.items()}
    training = sum(by_kind[kind] for kind in TRAINING_KINDS)
    full_models = by_kind["evaluation"] + by_kind["checkpoint"]
    less = full_models > training and getattr(engine.config, "evaluate_on", "") == "all"
    return (
        f"a worker has sent {training:.3g} MB in training, and {full_models:.3g} MB to assemble full models for "
        f"evaluations, checkpoints and the end, on average.{_LESS if less else ''}"
    )


_ALONE = "\n  There is only this worker, so nothing is divided; Trainer(devices=..., num_nodes=...) gives it others."
_LESS = " With evaluate_on='first' this would be at most half; validating less often also helps."
