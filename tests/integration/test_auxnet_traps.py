"""``Trainer(strategy="auxnet")``: unusual settings and runs that once stopped, or let the workers diverge silently."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resist_lightning import ResISTStrategy, WorkersDisagree
from tests.helpers.auxnet import fit_stages, pictures
from tests.helpers.plain import Classifier
from tests.helpers.trainers import make_trainer, run_in_turn, run_trainers_to_the_end
from tests.integration.test_auxnet import HeadOutside

CUTS = {"cuts": ["4"]}
AT_AN_IMAGE = {"cuts": ["0"]}  # the boundary is an image of 6 channels


Found = dict[str, list[Any]]


def small_module() -> Classifier:
    return Classifier("chain")


def is_sound(module: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


# ------------------------------------------------------------------ gradient clipping


def clip(worker: int) -> None:
    fit_stages(worker, HeadOutside(), {"cuts": ["section2"]}, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


def test_clipping_by_the_norm_of_a_part_is_refused_where_a_layer_outside_would_part() -> None:
    """By value it trains alike: test_auxnet."""
    for outcome in run_trainers_to_the_end(clip, 2):
        assert isinstance(outcome.error, ValueError), outcome
        assert "gradient_clip_val=0.01" in str(outcome.error)
        assert "gradient_clip_algorithm='value'" in str(outcome.error)


# ------------------------------------------------------------------ a user's auxiliary networks


def small(image: tuple[int, ...], boundary: tuple[int, ...], width: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(image[0], width, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(boundary[1:]), nn.Conv2d(width, boundary[0], 1)),
    )


class Factory:
    """A factory without a name, unlike a function."""

    def __call__(self, image: tuple[int, ...], boundary: tuple[int, ...], width: int = 3) -> nn.Module:
        return small(image, boundary, width)


FACTORIES: dict[str, Any] = {
    "a partial": lambda factory: partial(factory, width=2),
    "a lambda": lambda factory: lambda image, boundary: factory(image, boundary, 4),
    "an object": lambda factory: factory,
}


def with_factories(worker: int, names: tuple[str, ...]) -> tuple[bool, int]:
    heap = [Factory() for _ in range(1 + 999 * worker)]  # the last one has another address on each worker
    module = small_module()
    options = {**AT_AN_IMAGE, "method": "penalty", "aux_network": FACTORIES[names[worker]](heap[-1])}
    steps = fit_stages(worker, module, options).global_step
    return is_sound(module), steps


def with_each_factory(worker: int, _: Path) -> dict[str, tuple[bool, int]]:
    return {name: with_factories(worker, (name, name)) for name in FACTORIES}


def test_what_makes_an_auxiliary_network_need_not_be_a_function(found: Found) -> None:
    assert found["factories"] == [dict.fromkeys(FACTORIES, (True, 5))] * 2


def test_workers_with_other_auxiliary_networks_disagree_at_the_start() -> None:
    for outcome in run_trainers_to_the_end(with_factories, 2, ("a partial", "an object")):
        assert isinstance(outcome.error, WorkersDisagree), outcome
        assert "aux_network" in str(outcome.error)


# ------------------------------------------------------------------ new samples in each epoch


def few_of_many(worker: int, _: Path) -> list[int]:
    steps = []
    for method in ("penalty-store", "al-store"):
        options = {**CUTS, "method": method, "warmup_steps": 0}
        trainer = fit_stages(
            *(worker, small_module(), options, pictures(samples=640)), max_epochs=3, limit_train_batches=1
        )
        steps.append(trainer.global_step)
    return steps


def test_stored_guesses_go_on_where_an_epoch_has_new_samples(found: Found) -> None:
    assert found["new samples"] == [[3, 3]] * 2


# ------------------------------------------------------------------ one training after another


def fit_twice(worker: int, _: Path) -> tuple[int, bool, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    module = small_module()
    trainer = fit_stages(worker, module, CUTS)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, pictures())
    logger.removeHandler(handler)
    return trainer.global_step, is_sound(module), said


def test_a_second_fit_resumes_and_names_what_it_resumes_from(found: Found) -> None:
    (steps, sound, said), (other_steps, _, _) = found["a second fit"]
    assert steps == other_steps == 10
    assert sound
    how = [text for text in said if "resumes" in text]
    assert how
    assert all("the training before" in text for text in how)
    assert not any("  " in text or ": has" in text or "of the full" in text for text in how)


def from_resist(worker: int, folder: Path) -> tuple[int, bool]:
    path = folder / "resist.ckpt"
    first = make_trainer(ResISTStrategy(local_steps=2, min_blocks=1, blocks_per_worker="auto"), max_epochs=1)
    first.fit(Classifier(), pictures())
    first.save_checkpoint(path)
    module = Classifier(seed=3)
    trainer = fit_stages(worker, module, {}, max_epochs=2, ckpt_path=path)
    return trainer.current_epoch, is_sound(module)


def test_a_run_goes_on_from_a_checkpoint_of_another_strategy(found: Found) -> None:
    assert found["another strategy"] == [(2, True)] * 2


# ------------------------------------------------------------------ trainings in the same two processes

IN_TURN = {
    "factories": with_each_factory,
    "new samples": few_of_many,
    "a second fit": fit_twice,
    "another strategy": from_resist,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of both workers, by training."""
    folder = tmp_path_factory.mktemp("traps")
    return run_in_turn({name: (train, (folder,)) for name, train in IN_TURN.items()}, 2)
