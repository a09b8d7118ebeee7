"""The launcher by spawn, fork or forkserver: starts workers, collects their results, leaves none behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from typing_extensions import override

from resist_lightning.errors import WorkerLost, process_name
from resist_lightning.faults.reasons import name_of_exit
from resist_lightning.strategies.launching.checks import check_processes
from resist_lightning.strategies.launching.stopping import Forwarder, ending, start_fork_server

ENDING_SECONDS = 15.0
"""Time for workers to end by themselves after an error or a second Ctrl-C, before they are killed."""

LOOK_SECONDS = 1.0
"""Time between two checks of the main process for workers that were told to stop and are late."""

_OMP_PAUSE_SOFT = 1  # in omp.h: settings stay

_CHECKPOINT_FACTS = ("best_model_path", "best_model_score", "last_model_path", "kth_best_model_path", "best_k_models")


class ProcessLauncher(_MultiProcessingLauncher):
    """Lightning's launcher by spawn, fork or forkserver, with some differences.

    * Lightning sends worker 0's results through a pipe that it reads when the workers have ended, and a worker cannot
      end before its output is read: more than the 64 KB of a pipe hang. Here they come in a file.
    * Signals to the main process are the workers': they stop together, within the timeout of collectives. An error in
      the main process ends the workers too.
    """

    _folder = ""
    _usual_interrupt: Any = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Called by the trainer, in the main process.

        Raises:
            WorkerLost: if a worker died without raising.
            ProcessRaisedException: if a worker raised; with its traceback.
        """
        if trainer is not None:
            checked: Any = self._strategy
            checked.check_before_launch(trainer)
            self._refuse_to_fit_again(trainer)
        if self._start_method == "spawn":
            _check_missing_main_guard()
        else:
            _check_bad_cuda_fork()
        others = multiprocessing.active_children()  # the user's own, which are not ours to end
        with self._port(), tempfile.TemporaryDirectory(prefix="resist_lightning_") as self._folder:
            results = Results(Path(self._folder, "results"))
            try:
                self._run(trainer, function, args, kwargs, results)
            except BaseException as error:
                started = [process for process in multiprocessing.active_children() if process not in others]
                self._end(started, error)
                raise
            output = results.get()
            if trainer is None:
                return output
            self._already_fit |= trainer.state.fn == TrainerFn.FITTING
            self._recover_results_in_main_process(output, trainer)
            return output.trainer_results

    def restore_interrupt(self) -> None:
        """Restore the handler of SIGINT, which Lightning ignores for good after a Ctrl-C."""
        if self._usual_interrupt is not None:
            signal.signal(signal.SIGINT, self._usual_interrupt)
            self._usual_interrupt = None

    def _refuse_to_fit_again(self, trainer: pl.Trainer) -> None:
        if self._already_fit and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError(
                f"this Trainer has fitted already, in workers that have ended (start_method={self._start_method!r}), "
                "so it cannot continue their training. Make a new Trainer; fit(ckpt_path=...) resumes."
            )

    @contextmanager
    def _port(self) -> Iterator[None]:
        """Pass the port to the workers by the environment; the next Trainer of this process chooses another one."""
        strategy: Any = self._strategy
        check_processes(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        given = os.environ.get("MASTER_PORT")
        os.environ["MASTER_PORT"] = str(strategy.cluster_environment.main_port)
        try:
            yield
        finally:
            os.environ.pop("MASTER_PORT", None)
            if given is not None:
                os.environ["MASTER_PORT"] = given

    def _run(
        self, trainer: pl.Trainer | None, function: Callable[..., Any], args: Any, kwargs: Any, results: Results
    ) -> None:
        """Start the workers, and wait until all have ended."""
        given = [trainer, function, args, kwargs, results]
        if self._start_method == "spawn":
            given.append(_GlobalStateSnapshot.capture())
        if self._start_method == "forkserver":
            start_fork_server()
        if self._start_method == "fork":
            end_idle_threads()
        strategy: Any = self._strategy
        with _start_method_of_python(self._start_method):
            workers: Any = start_processes(
                self._wrapping_function,
                args=given,
                nprocs=strategy.num_processes,
                start_method=self._start_method,
                join=False,
            )
        self.procs = workers.processes
        members = strategy.options.members(strategy.num_processes)
        first_rank = strategy.node_rank * strategy.num_processes
        try:
            forwarder = Forwarder(self.kill, strategy._timeout.total_seconds(), members, first_rank)
            with forwarder.waiting(trainer):
                wait_for(workers, forwarder)
        except ProcessExitedException as error:  # one that raised has another exception, with its traceback
            name = process_name(first_rank + error.error_index, members)
            raise WorkerLost(
                f"{name} (host {socket.gethostname()}, pid {error.error_pid}) {name_of_exit(error.exit_code)}. The "
                "other workers' errors above say what it was last doing, and how to resume."
            ) from error

    def _end(self, workers: Sequence[BaseProcess], error: BaseException) -> None:
        """Let no worker outlive an error here. A second Ctrl-C kills at once those that still run."""
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            self._usual_interrupt = signal.getsignal(signal.SIGINT)
        try:
            for worker in workers:
                with suppress(ProcessLookupError):
                    assert worker.pid is not None
                    # In a terminal they have had the SIGINT already, and take a second one for the same.
                    os.kill(worker.pid, signal.SIGINT if interrupted else signal.SIGTERM)
            deadline = time.monotonic() + ENDING_SECONDS
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()
                worker.join()

    @override
    def _wrapping_function(self, process_idx: int, trainer: pl.Trainer | None, *args: Any, **kwargs: Any) -> None:
        """Called in each worker. The main process reports only the first that ends: others write their error here."""
        strategy: Any = self._strategy
        try:
            with ending(trainer), strategy.guard.around(strategy.ends_together):
                super()._wrapping_function(process_idx, trainer, *args, **kwargs)
        except WorkerLost as error:
            sys.stderr.write(f"WorkerLost: {error}\n")
            sys.stderr.flush()
            raise

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        """Called in each worker at the end. The file of weights goes to the folder that the main process removes."""
        strategy: Any = trainer.strategy
        if strategy.engine is not None and strategy.engine.incomplete:
            return None  # `super` would ask for a state dict first, which worker 0 alone has (`full_model_on`)
        usual, tempfile.tempdir = tempfile.tempdir, self._folder
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            tempfile.tempdir = usual

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Called in worker 0 at the end: the state beside the weights that the main process needs to save or resume."""
        strategy: Any = trainer.strategy
        facts = []
        for callback in trainer.checkpoint_callbacks:
            known = [name for name in _CHECKPOINT_FACTS if hasattr(callback, name)]
            facts.append({name: getattr(callback, name) for name in known})
        return {
            **super().get_extra_results(trainer),
            "resume_state": strategy.resumer.state_of(trainer.lightning_module),
            "last_written": strategy.saver.last_written,
            "checkpoints": facts,
        }

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        """Called in the main process with worker 0's extra results."""
        super().update_main_process_results(trainer, extra)
        strategy: Any = trainer.strategy
        # The strategy of the workers was another object: this one saves and resumes in the main process.
        if trainer.state.fn == TrainerFn.FITTING:  # other loops leave this process's module as it is
            strategy.resumer.set_state(extra["resume_state"], trainer.lightning_module)
        strategy.saver.last_written = extra["last_written"]
        for callback, facts in zip(trainer.checkpoint_callbacks, extra["checkpoints"], strict=True):
            vars(callback).update(facts)


def wait_for(workers: Any, forwarder: Forwarder) -> None:
    """Wait until all workers have ended, or one has failed.

    Args:
        workers: from ``start_processes``.
        forwarder: inside its ``waiting``.

    Raises:
        ProcessExitedException: if a worker has ended with an exit code other than 0.
        ProcessRaisedException: if a worker raised; with its traceback.
    """
    processes: list[BaseProcess] = workers.processes
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        # Read once: a worker that ends between two looks would be a failure in the second one.
        codes = {process.exitcode for process in processes if process.exitcode}
        # Not by `join`, for which the first worker that a signal has stopped is a failure: others may still save.
        if forwarder.stopping(codes):
            forwarder.check(processes)
        elif codes:
            break
        connection.wait(running, LOOK_SECONDS)
    # The others have time to say what happened to them before they are terminated.
    workers.join(grace_period=ENDING_SECONDS)


def end_idle_threads() -> None:
    """End the idle threads of OpenMP before a fork, which does not have them and would wait for them for ever.

    They are there once this process has computed, as in a notebook; when they are needed again, new ones start.
    """
    pause: Any = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:  # an OpenMP of 2018 or newer
        pause(_OMP_PAUSE_SOFT)


@contextmanager
def _start_method_of_python(start_method: str) -> Iterator[None]:
    """Tell the workers a start method that they know: they begin by making this process's default theirs.

    That of a process of joblib is its own, ``"loky"``, which is unknown where joblib is not imported.
    """
    usual: str | None = multiprocessing.get_start_method(allow_none=True)
    known = usual in (None, "fork", "forkserver", "spawn")
    if not known:
        multiprocessing.set_start_method(start_method, force=True)
    try:
        yield
    finally:
        if not known:
            multiprocessing.set_start_method(usual, force=True)


class Results:
    """A queue for the results of worker 0, in a file: they may be of any size. Replaces Lightning's queue."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, results: Any) -> None:
        """Called by worker 0, before it ends."""
        with self._path.open("wb") as file:
            pickle.dump(results, file)

    def get(self) -> Any:
        """Called by the main process when all workers have ended.

        Raises:
            WorkerLost: if there are none, as a worker has left the training by itself.
        """
        try:
            with self._path.open("rb") as file:
                return pickle.load(file)
        except FileNotFoundError:
            raise WorkerLost(
                "worker 0 ended with exit code 0 and without results: something in its program ended the process, such "
                "as sys.exit() or os._exit(). Raise an exception to end a training, or set trainer.should_stop."
            ) from None
