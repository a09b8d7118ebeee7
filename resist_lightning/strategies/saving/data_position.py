"""The position of a worker in its data and random numbers, so that a resumed run sees the batches it would have seen.

Lightning saves no random state, and only worker 0's position in the data::

    iterator made   batch 0   batch 1   batch 2   ...      what is noted
    ^               ^         ^         ^
    random state    random state before each fetch         position = batches trained in the epoch

To resume, the iterator is made again from its random state, the batches that were trained are fetched once more and
discarded (a loader with ``state_dict`` is set instead), and the random state of the next fetch is put back. Where a
shorter one of several loaders was begun again, it is begun again from the same random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from resist_lightning.state.random_state import Randomness, random_state, set_random_state
from resist_lightning.strategies.data import iterated
from resist_lightning.strategies.finetuning import ModuleModes


class Position:
    """A worker's position in the data and the random numbers of a ``fit``.

    Args:
        trainer: the trainer of this worker.
        keep_loaders: asked before each fetch whether :meth:`state` may be called before that batch is trained.

    Attributes:
        modes: of the module's parameters and layers, which the program may switch.
        pending: the result of :meth:`state` from which the next epoch resumes, or empty.
    """

    def __init__(self, trainer: pl.Trainer, keep_loaders: Callable[[], bool] = lambda: False) -> None:
        self.modes = ModuleModes()
        self._before_validation: Randomness | None = None
        self._keep_loaders = keep_loaders
        self._fit_loop: Any = trainer.fit_loop
        self._epoch_loop: Any = trainer.fit_loop.epoch_loop
        self._iterator_made: Randomness = {}
        self._before_fetch: dict[int, Randomness] = {}
        self._begun_again: dict[int, dict[int, Randomness]] = {}  # by loader and fetch: before a shorter one began anew
        self._order: list[object] | None = []  # the iterator's sampler iterators when it was made
        self.pending: dict[str, Any] = {}
        self._fetched_again: dict[int, Randomness] = {}
        self._loaders: dict[int, list[dict[str, Any]]] = {}  # before the last fetch at which they were kept

    @property
    def trained(self) -> int:
        """Number of batches of the epoch that are trained."""
        return int(self._epoch_loop.batch_progress.current.processed)

    @property
    def next_is_fetched(self) -> bool:
        """Whether the next batch has been fetched, and is still to be trained."""
        return bool(self._epoch_loop.batch_progress.current.ready == self.trained + 1)

    def state(self) -> dict[str, Any]:
        """This worker's position after the batches that it has trained, for :meth:`restore`."""
        random = self._before_validation or self.random_state()
        state = {"random": random, "loaders_made_in": self._fit_loop._last_train_dl_reload_epoch}
        if self._epoch_loop._num_ready_batches_reached() and not self.next_is_fetched:
            progress = self._fit_loop.epoch_progress.current
            next_begins = progress.started < progress.ready  # its `on_train_epoch_start` runs
            return {**state, "ended_epoch": progress.processed - next_begins}
        trained = self.trained
        # Loaders that are one batch ahead; where their state was not kept, a resumed run fetches all batches again.
        loaders = self._loaders.get(trained, []) if self.next_is_fetched else self._loader_states()
        return {
            **state,
            "iterator_made": self._iterator_made,
            "before_fetch": self._kept(trained),
            "begun_again": {loader: _newest(states, before=trained) for loader, states in self._begun_again.items()},
            "loaders": loaders,
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
        """Resume from ``state``; call it when the loaders are made, before the first epoch begins."""
        self.pending = state
        if "loaders_made_in" in state:  # which files of older versions lack
            self._fit_loop._last_train_dl_reload_epoch = state["loaders_made_in"]
        self._set_random_state(state["random"])

    def random_state(self) -> Randomness:
        """State of the global generators, and of those that the user gave to loaders and samplers."""
        return {**random_state(), "loaders": iterated.states_of_generators(self._fit_loop._combined_loader)}

    @contextmanager
    def outside_validation(self) -> Iterator[None]:
        """Inside, a validation runs, and this worker's position stays as it was before."""
        self._before_validation = self.random_state()
        try:
            with self.modes.apart():
                yield
        finally:
            self._before_validation = None

    def note_iterator(self) -> None:
        """Called just before an iterator is made of new loaders: by the fit loop, or by a hook that asks for them."""
        loader: Any = self._fit_loop._combined_loader
        if any(iterated.is_running(each) for each in loader.flattened):
            loader.reset()  # its processes have served another iterator, so their random state is unknown
        self._iterator_made, self._order = self.random_state(), None

    def note_made(self) -> None:
        """Called when there are loaders, whether or not they and their iterator have just been made."""
        if self._order is None:  # new ones
            self._order = iterated.order(self._iterator())
            self._watch_loaders()

    def note_fetch(self) -> None:
        """Called just before each batch is fetched."""
        fetcher = self._fit_loop._data_fetcher
        assert fetcher is not None
        if fetcher.fetched in self._fetched_again:
            self._set_random_state(self._fetched_again[fetcher.fetched])
        if self._keep_loaders():
            self._loaders = {fetcher.fetched: self._loader_states()}
        # States that no checkpoint can need any more go, or an epoch would keep one per batch.
        self._before_fetch = {**self._kept(self.trained), fetcher.fetched: self.random_state()}

    def note_epoch(self) -> None:
        """Called just before an epoch begins, with its hooks.

        With a checkpoint written after an epoch's last batch, Lightning counts the epoch as ended, and skips the hooks
        of the next one as if it were in the middle of it.
        """
        if self._begins_next_epoch() and hasattr(self._fit_loop, "reset_restart_stage"):
            self._fit_loop.reset_restart_stage()

    def begin_epoch(self, begin: Callable[[Any], None], fetcher: Any) -> None:
        """Called in place of Lightning's beginning of an epoch's batches, ``begin``, which may make an iterator."""
        self._before_fetch, self._begun_again, self._loaders = {}, {}, {}
        in_mid_epoch = "iterator_made" in self.pending
        if in_mid_epoch:
            # The last batch may have been fetched when the checkpoint was written, but it was not trained.
            self._epoch_loop.batch_progress.is_last_batch = False
        if self._begins_next_epoch():
            self._begin_with_batch_0()
        iterator, before = self._iterator(), self.random_state()
        begin(fetcher)
        made = self._iterator() is not iterator
        if made:
            self._iterator_made = before
        # A resumed run may end an epoch here: all of its batches are trained, and none is fetched.
        if not self._epoch_loop._num_ready_batches_reached():
            # By a hook that iterated a loader with persistent processes.
            moved = iterated.order(self._iterator()) != self._order
            if in_mid_epoch:
                self._skip_trained(fetcher)
            elif not made and (self.pending or moved):
                # The iterator was made before the random state of a resumed run was put back, or has been used.
                fetcher.combined_loader.reset()
                self._iterator_made = self.random_state()
                iter(fetcher)
        self._watch_loaders()
        self.pending = {}

    def _begins_next_epoch(self) -> bool:
        """Whether the run was stopped after the last batch of an epoch, which Lightning takes for ended."""
        return bool(self.pending.get("ended_epoch", self._epochs_processed()) < self._epochs_processed())

    def _begin_with_batch_0(self) -> None:
        """Reset the progress of an ended epoch, as Lightning does where it knows the number of batches."""
        loop = self._epoch_loop
        if loop.batch_progress.is_last_batch:
            loop.batch_progress.reset_on_run()
            loop.scheduler_progress.reset_on_run()
            loop.automatic_optimization.optim_progress.reset_on_run()
            loop.val_loop.batch_progress.total.reset()

    def _epochs_processed(self) -> int:
        return int(self._fit_loop.epoch_progress.current.processed)

    def _iterator(self) -> object:
        """The iterator of the loaders; Lightning's fetcher only has the loaders."""
        loader = self._fit_loop._combined_loader
        return loader._iterator if loader is not None else None

    def _set_random_state(self, state: Randomness) -> None:
        set_random_state(state)
        # Files of older versions have none.
        iterated.set_generators(self._fit_loop._combined_loader, state.get("loaders", []))

    def _watch_loaders(self) -> None:
        """Wrap combined loaders, to note the random state when a shorter one is begun again."""
        iterator: Any = self._iterator()
        loaders = getattr(iterator, "iterables", [])
        already = any(isinstance(each, iterated.Watched) for each in loaders)
        if len(loaders) > 1 and not already:
            numbered = enumerate(loaders)
            iterator.iterables = [iterated.Watched(each, partial(self._begin_again, at)) for at, each in numbered]

    def _begin_again(self, loader: int) -> None:
        """Called just before a loader is begun again, within a fetch."""
        fetcher = self._fit_loop._data_fetcher
        assert fetcher is not None
        state = self.pending.get("begun_again", {}).get(loader, {}).get(fetcher.fetched)
        if state is not None:
            self._set_random_state(state)
        trained = self.trained
        states = self._begun_again.get(loader, {})
        # Where trained batches are fetched again, the newest beginning determines all that follows it.
        needed = _newest(states, before=trained)
        later = {fetch: old for fetch, old in states.items() if fetch >= trained}
        self._begun_again[loader] = {**needed, **later, fetcher.fetched: self.random_state()}

    def _kept(self, first: int) -> dict[int, Randomness]:
        """The random states needed to fetch again the batches before ``first``, and to continue there."""
        return {i: state for i, state in self._before_fetch.items() if i == 0 or i >= first}

    def _loader_states(self) -> list[dict[str, Any]]:
        """State of loaders that have a ``state_dict``; none where Lightning fetches ahead of them."""
        fetcher, loader = self._fit_loop._data_fetcher, self._fit_loop._combined_loader
        fetches_ahead = fetcher is None or fetcher.length is None  # to know which batch is the last
        return [] if fetches_ahead or loader is None else loader._state_dicts()

    def _skip_trained(self, fetcher: Any) -> None:
        """Make the iterator of the epoch again, positioned after the batches that were trained."""
        pending, trained = self.pending, self._epoch_loop.batch_progress.current.ready
        loader = fetcher.combined_loader
        persistent = any(getattr(each, "persistent_workers", False) for each in loader.flattened)
        if persistent and self._epochs_processed():
            rank_zero_warn(
                "the training loader has persistent_workers=True, whose processes kept their random state from epoch "
                "to epoch and are gone: random augmentation continues with other numbers, all else resumes exactly. "
                "Leave persistent_workers out for runs that must resume exactly in mid-epoch."
            )
        loader.reset()  # persistent processes would keep the random state that they were started with
        for each in loader.flattened:
            _set_sampler_epoch(each, self._epochs_processed())
        self._iterator_made = pending["iterator_made"]
        self._set_random_state(self._iterator_made)
        if pending["loaders"]:  # they can be set to a position
            loader._load_state_dicts(pending["loaders"])
            iter(fetcher)
            fetcher.fetched += trained
        else:
            self._fetched_again = pending["before_fetch"]
            self._fetch_again(fetcher, trained)
            self._fetched_again = {}
        # For a batch that had been fetched, the state before the fetch; else that of the checkpoint.
        self._set_random_state(pending["before_fetch"].get(fetcher.fetched, pending["random"]))

    def _fetch_again(self, fetcher: Any, batches: int) -> None:
        if batches:
            rank_zero_info(
                f"Fetching the {batches} batches of this epoch that were already trained on, to resume after them."
            )
        iter(fetcher)
        self._watch_loaders()
        draws = False
        for batch in range(batches):
            # `note_fetch` sets the state for a known batch, so that a change says nothing of draws in its fetch.
            known = fetcher.fetched in self._fetched_again
            before = self.random_state()["torch"]
            try:
                iterated.next_batch(fetcher)
            except StopIteration:
                raise RuntimeError(
                    f"the training loader gave {batch} batches, but the checkpoint was written after {batches} of this "
                    "epoch. Resume with the loader that the checkpoint was written with, or from the end of an epoch."
                ) from None
            drew = not before.equal(self.random_state()["torch"])
            draws |= drew and not known
        beside_training = any(iterated.draws_beside_training(loader) for loader in fetcher.combined_loader.flattened)
        if draws and beside_training:
            rank_zero_warn(
                "the iterable data set draws from torch's global generator in the training process, where dropout "
                "draws in between. If a draw for one batch affects later ones (a shuffle buffer), the resumed run gets "
                "other batches than an uninterrupted one; all else is exact. Give the data set a generator of its own, "
                "or the loader processes or a state_dict."
            )


def _newest(states: dict[int, Randomness], before: int) -> dict[int, Randomness]:
    """The state of the last fetch before ``before``, if there is one."""
    fetch = max((fetch for fetch in states if fetch < before), default=None)
    return {} if fetch is None else {fetch: states[fetch]}
