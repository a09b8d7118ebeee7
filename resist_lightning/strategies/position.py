"""Where a worker is in its data and in its random numbers, so that a resumed run sees what the unbroken one would have.

Lightning saves no random state, and only worker 0's position in the data::

    iterator made   batch 0   batch 1   batch 2   ...      what is noted
    ^               ^         ^         ^
    random state    random state before each fetch         position = batches trained in the epoch

To resume, the iterator is made again from its random state, the batches that were trained are fetched once more and
thrown away (a loader with ``state_dict`` is set instead), and the random state of the next fetch is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from resist_lightning.randomness import Randomness, random_state, set_random_state


class Position:
    """A worker's place in the data and the random numbers of a ``fit``.

    Args:
        trainer: the trainer of this worker.
        keep_loaders: asked before each fetch whether :meth:`state` may be called before that batch is trained.

    Attributes:
        outside_validation: the random state to which the end of the running validation goes back.
    """

    def __init__(self, trainer: pl.Trainer, keep_loaders: Callable[[], bool] = lambda: False) -> None:
        self.outside_validation: Randomness | None = None
        self._keep_loaders = keep_loaders
        self._fit_loop = trainer.fit_loop
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._iterator_made: Randomness = {}
        self._before_fetch: dict[int, Randomness] = {}
        self._begun_again: set[int] = set()  # fetches in which one of several loaders began anew, by random numbers
        self._parts: list[object] = []
        self._pending: dict[str, Any] = {}
        self._fetched_again: dict[int, Randomness] = {}
        self._loaders: list[dict[str, Any]] = []
        self._stale_iterator: object = None

    @property
    def pending(self) -> bool:
        """Whether the next epoch goes on from a state of :meth:`state`."""
        return bool(self._pending)

    def state(self) -> dict[str, Any]:
        """Where this worker is, for :meth:`restore`: after the batches that it has trained."""
        now = self.outside_validation or random_state()
        progress: Any = self._epoch_loop.batch_progress.current
        if progress.processed == progress.ready and self._epoch_loop._num_ready_batches_reached():
            return {"random": now, "ended_epoch": self._epochs_processed()}
        first = progress.processed
        self._note_parts()
        return {
            "random": now,
            "iterator_made": self._iterator_made,
            "before_fetch": self._kept(first),
            "loaders": self._loaders if first + 1 == progress.ready else self._loader_states(),
        }

    @contextmanager
    def before_the_fetch(self) -> Iterator[None]:
        """Inside, Lightning's progress is as if the batch that has been fetched last were still to be fetched."""
        progress = self._epoch_loop.batch_progress
        progress.current.ready -= 1
        progress.total.ready -= 1
        try:
            yield
        finally:
            progress.current.ready += 1
            progress.total.ready += 1

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; call it when the loaders are made, before the first epoch begins."""
        self._stale_iterator = self._iterator()
        self._pending = state
        set_random_state(state["random"])

    def note_iterator(self) -> None:
        """Called just before the first epoch's iterator is made."""
        self._iterator_made = random_state()

    def note_fetch(self) -> None:
        """Called just before each batch is fetched."""
        fetcher = self._fit_loop._data_fetcher
        assert fetcher is not None
        if fetcher.fetched in self._fetched_again:
            set_random_state(self._fetched_again[fetcher.fetched])
        progress: Any = self._epoch_loop.batch_progress.current
        trained = progress.processed
        if self._keep_loaders():
            self._loaders = self._loader_states()
        self._note_parts()
        self._before_fetch = {**self._kept(trained), fetcher.fetched: random_state()}

    def begin_epoch(self, begin: Callable[[Any], None], fetcher: Any) -> None:
        """Called in place of Lightning's beginning of an epoch's batches, ``begin``, which may make an iterator."""
        self._before_fetch, self._begun_again = {}, set()
        if "iterator_made" in self._pending:  # the last batch may have been fetched, but it was not trained
            self._epoch_loop.batch_progress.is_last_batch = False
        if self._pending.get("ended_epoch", self._epochs_processed()) < self._epochs_processed():
            self._begin_with_batch_0()
        iterator, before = self._iterator(), random_state()
        begin(fetcher)
        if self._iterator() is not iterator:
            self._iterator_made = before
        elif iterator is self._stale_iterator and not self._epoch_loop._num_ready_batches_reached():
            self._make_iterator_again(fetcher)
        self._stale_iterator, self._pending = object(), {}

    def _begin_with_batch_0(self) -> None:
        """What Lightning does where a checkpoint was written after an epoch's last batch, if it knows their number."""
        loop = self._epoch_loop
        if loop.batch_progress.is_last_batch:
            loop.batch_progress.reset_on_run()
            loop.scheduler_progress.reset_on_run()
            loop.automatic_optimization.optim_progress.reset_on_run()
            loop.val_loop.batch_progress.total.reset()

    def _epochs_processed(self) -> int:
        progress: Any = self._fit_loop.epoch_progress.current
        return int(progress.processed)

    def _iterator(self) -> object:
        """The iterator of the loaders; Lightning's fetcher only has the loaders."""
        loader = self._fit_loop._combined_loader
        return loader._iterator if loader is not None else None

    def _note_parts(self) -> None:
        """Whether the last fetch made an iterator, as a shorter one of several loaders is begun again."""
        parts = list(getattr(self._iterator(), "iterators", []))
        if self._before_fetch and any(now is not before for now, before in zip(parts, self._parts, strict=False)):
            self._begun_again.add(max(self._before_fetch))
        self._parts = parts

    def _kept(self, first: int) -> dict[int, Randomness]:
        """The random states that are needed to fetch again what was fetched before ``first``, and to go on there."""
        kept = {0, *self._begun_again}
        return {i: state for i, state in self._before_fetch.items() if i in kept or i >= first}

    def _loader_states(self) -> list[dict[str, Any]]:
        """Of loaders that can say where they are; none where Lightning fetches ahead of them."""
        fetcher, loader = self._fit_loop._data_fetcher, self._fit_loop._combined_loader
        return (
            loader._state_dicts() if fetcher is not None and fetcher.length is not None and loader is not None else []
        )

    def _make_iterator_again(self, fetcher: Any) -> None:
        pending, trained = self._pending, self._epoch_loop.batch_progress.current.ready
        if "iterator_made" not in pending:
            self._iterator_made = random_state()
            iter(fetcher)
            return
        loader = fetcher.combined_loader
        if self._epochs_processed() and any(getattr(each, "persistent_workers", False) for each in loader.flattened):
            rank_zero_warn(
                "the training loader has persistent_workers=True, whose processes carried random numbers on from epoch "
                "to epoch and are gone: random augmentation goes on with other ones, all else exactly. Leave "
                "persistent_workers out for runs that must resume exactly in mid-epoch."
            )
        loader.reset()  # persistent processes would keep the random state that they were started with
        for each in loader.flattened:
            _set_sampler_epoch(each, self._epochs_processed())
        self._iterator_made = pending["iterator_made"]
        set_random_state(self._iterator_made)
        if pending["loaders"]:
            loader._load_state_dicts(pending["loaders"])
            iter(fetcher)
            fetcher.fetched += trained
        else:
            self._fetched_again = pending["before_fetch"]
            self._fetch_again(fetcher, trained)
            self._fetched_again = {}
        set_random_state(pending["before_fetch"].get(fetcher.fetched, pending["random"]))

    def _fetch_again(self, fetcher: Any, batches: int) -> None:
        if batches:
            rank_zero_info(
                f"Fetching the {batches} batches of this epoch that have been trained, to go on behind them."
            )
        iter(fetcher)
        for batch in range(batches):
            try:
                next(fetcher)
            except StopIteration:
                raise RuntimeError(
                    f"the training loader gave {batch} batches, and the checkpoint was written after {batches} of this "
                    "epoch. Resume with the loader that the checkpoint was written with, or from the end of an epoch."
                ) from None
