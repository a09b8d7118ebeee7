"""The options that all strategies share, and the decorator that makes a strategy's constructor of its options.

An option is written once, as a field of a dataclass: name, type and default in the field, its text in the docstring of
the class, its check in ``__post_init__``. The options of a method come from the method's own config.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, get_args, get_type_hints

import torch
from typing_extensions import override

from resist_lightning.methods.config import CommonConfig, check_choice, check_integer
from resist_lightning.strategies.saving.checkpoint_files import local_path

DataPolicy: TypeAlias = Literal["shard", "copy"]
SaveErrors: TypeAlias = Literal["raise", "warn"]
WorkerLoss: TypeAlias = Literal["stop", "shrink"]
DevicesPerWorker: TypeAlias = int | Literal["node"]
StartMethod: TypeAlias = Literal["popen", "spawn", "fork", "forkserver"]

LEAST_SILENCE = timedelta(seconds=3)

_P = ParamSpec("_P")
_Config = TypeVar("_Config", bound=CommonConfig)
_Options = TypeVar("_Options")
_Strategy = TypeVar("_Strategy")


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Options of every strategy: start and supervision of workers, checkpoints and snapshots.

    Args:
        devices_per_worker: processes per worker: they hold the same part of the network, split its
            batches, and average their gradients in every step. ``"node"``: all processes of a host.
        across_hosts: whether the processes of one worker may be on several hosts, e.g. on hosts with a fast link.
        find_unused_parameters: where a worker has several processes, whether some parameters may get no gradient in a
            step; as in DDP.
        on_save_error: response to a checkpoint that cannot be written, e.g. to a full disk: ``"raise"`` ends the
            training on all workers, ``"warn"`` continues; the previous checkpoint stays as it is.
        snapshots: folder to which every worker writes its state between rounds, preferably readable by all workers;
            when torchrun restarts the workers, they resume from the newest snapshot by themselves. Removed at the end
            of the training. None: no snapshots.
        snapshot_every_n_rounds: rounds between two snapshots, at least 1.
        on_worker_loss: response to a restart by torchrun with another number of workers: ``"stop"``, or ``"shrink"``
            (resume with the workers that are left; needs ``snapshots``).
        parallel_devices: devices of this host's processes where ``Trainer(devices=...)`` cannot name them, e.g. one GPU
            several times: ``["cuda:0", "cuda:0"]``.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default NCCL on GPUs, gloo on the CPU and for several
            workers on one GPU.
        timeout: timeout of collectives; must exceed the largest difference in time per round between workers.
        silence: time without a heartbeat (one a second) after which a worker counts as lost: frozen, or on a host that
            cannot be reached. A worker that dies or fails is noticed within seconds.
        start_method: Lightning's way to start workers: ``"popen"`` (runs the script again), ``"spawn"``, ``"fork"``,
            ``"forkserver"``; under torchrun leave ``"popen"``.

    Raises:
        ValueError: if a value is outside its limits.
    """

    without: ClassVar[Mapping[str, str]] = {}
    """Options of other strategies, with the reason why this one has none of that name."""

    devices_per_worker: DevicesPerWorker = 1
    across_hosts: bool = False
    find_unused_parameters: bool = False
    on_save_error: SaveErrors = "raise"
    snapshots: str | os.PathLike[str] | None = None
    snapshot_every_n_rounds: int = 1
    on_worker_loss: WorkerLoss = "stop"
    parallel_devices: Sequence[str | torch.device] | None = None
    process_group_backend: str | None = None
    timeout: timedelta = timedelta(minutes=10)
    silence: timedelta = timedelta(seconds=30)
    start_method: StartMethod = "popen"

    def __post_init__(self) -> None:
        """Check every value that Lightning does not."""
        if self.devices_per_worker != "node":
            check_integer("devices_per_worker", self.devices_per_worker, 1, "'node': all processes of a host")
        check_choice("on_save_error", self.on_save_error, get_args(SaveErrors))
        check_choice("on_worker_loss", self.on_worker_loss, get_args(WorkerLoss))
        check_choice("start_method", self.start_method, get_args(StartMethod))
        check_integer("snapshot_every_n_rounds", self.snapshot_every_n_rounds, 1, "1 writes one before each round")
        if self.snapshots is not None and self.snapshot_folder is None:
            raise ValueError(
                f"snapshots={str(self.snapshots)!r} must be a folder with a local path, or a file:// URL: workers "
                "replace files in it atomically, which other file systems cannot do. Mount it, and give its path."
            )
        if self.on_worker_loss == "shrink" and self.snapshots is None:
            raise ValueError(
                "on_worker_loss='shrink' takes the blocks of a lost worker from a snapshot: name a folder that all "
                "workers can read, snapshots=FOLDER."
            )
        self._devices()
        for name in ("timeout", "silence"):
            value = getattr(self, name)
            if not isinstance(value, timedelta) or value <= timedelta():
                raise ValueError(f"{name}={value!r} must be a datetime.timedelta above 0, as timedelta(seconds=60) is.")
        if self.silence < LEAST_SILENCE:
            raise ValueError(
                f"silence={self.silence} must be at least {LEAST_SILENCE}: workers send a heartbeat every second, and "
                "a busy host delays them."
            )

    def for_lightning(self) -> dict[str, Any]:
        """Arguments of Lightning's own strategy."""
        names = ("process_group_backend", "timeout", "start_method")
        return {"parallel_devices": self._devices(), **{name: getattr(self, name) for name in names}}

    def members(self, processes_per_host: int) -> int:
        """Processes of each worker, where every host has ``processes_per_host``."""
        return processes_per_host if self.devices_per_worker == "node" else int(self.devices_per_worker)

    def _devices(self) -> list[torch.device] | None:
        """The devices as objects; a command line and a configuration file have only their names."""
        try:
            return None if self.parallel_devices is None else [torch.device(each) for each in self.parallel_devices]
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"parallel_devices={self.parallel_devices!r} must be a list of torch's devices, one for each process "
                f"of this host, such as ['cuda:0', 'cuda:0']: {str(error).partition('.')[0]}."
            ) from None

    @property
    def snapshot_folder(self) -> Path | None:
        """The folder of snapshots as a local path."""
        return local_path(str(self.snapshots)) if self.snapshots is not None else None


@dataclass(frozen=True, kw_only=True)
class LocalTrainingOptions(StrategyOptions):
    """Options of the strategies whose workers train on data of their own.

    Args:
        data: ``"shard"`` (a shard of the training set per worker) or ``"copy"`` (the full training set on every
            worker, in a worker-specific order, as in the papers). Lightning's sampler does both, by the seed of
            `seed_everything`; a loader without it gives every worker what it gives.
    """

    data: DataPolicy = "shard"

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_choice("data", self.data, get_args(DataPolicy))


def config_of(options: object, kind: type[_Config]) -> _Config:
    """The method's part of ``options``, which must have the fields of ``kind``. Checks its values."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def takes(
    options: Callable[_P, _Options],
) -> Callable[[Callable[[_Strategy, _Options], None]], Callable[Concatenate[_Strategy, _P], None]]:
    """Make a constructor of ``(self, options)`` one that takes the fields of the dataclass ``options`` as keywords.

    Type checkers and editors see the keywords, their types and defaults; so does ``help()``, with the texts.
    """
    made_by: Any = options

    def decorate(init: Callable[[_Strategy, _Options], None]) -> Callable[Concatenate[_Strategy, _P], None]:
        @functools.wraps(init)
        def construct(self: _Strategy, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
            for name in kwargs.keys() & made_by.without:
                raise TypeError(f"{type(self).__name__} has no option {name!r}: {made_by.without[name]}")
            init(self, options(*args, **kwargs))

        # Signature and texts are set by hand: functools.wraps would show those of the function that takes an object.
        made_by.__init__.__qualname__ = init.__qualname__  # a TypeError shall name the class that the user called
        construct.__doc__ = _describe(made_by)
        # Types as objects: whoever asks for them would look their names up in this module, not in the config's.
        hints = get_type_hints(made_by)
        signature = inspect.signature(made_by.__init__)
        parameters = [
            each.replace(annotation=hints.get(each.name, each.annotation)) for each in signature.parameters.values()
        ]
        vars(construct)["__signature__"] = signature.replace(parameters=parameters)
        construct.__annotations__ = {each.name: each.annotation for each in parameters if each.name in hints}
        del vars(construct)["__wrapped__"]  # inspect would follow it
        return construct

    return decorate


def _describe(options: type) -> str:
    """The docstring of a constructor that takes ``options``: the text of a class goes before that of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(options.__mro__):  # so that a derived class has the last word
        _, _, after = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
        section, _, _ = after.partition("\n\n")
        entries = re.findall(r"^    (\w+)(:.*(?:\n     .*)*)", section, re.MULTILINE)
        texts.update(entries)
    taken = [f"    {name}{texts[name]}" for name in inspect.signature(options).parameters]
    return "\n".join(["Args:", *taken, "", "Raises:", "    ValueError: if a value is outside its limits."])
