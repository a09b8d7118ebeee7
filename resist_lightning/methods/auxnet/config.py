"""The settings of an AuxNet run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, TypeAlias, get_args

from torch import nn
from typing_extensions import override

from resist_lightning.methods.config import CommonConfig, MomentumPolicy, check_choice, check_integer

AuxMethod: TypeAlias = Literal["delayed", "penalty", "al-net", "penalty-store", "al-store"]
_OF_GUESSES = (
    *("beta", "beta_growth", "lambda_step", "multiplier_every", "serial_every"),
    *("aux_network", "aux_width", "aux_learning_rate"),
)
AuxFactory: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...]], nn.Module]


@dataclass(frozen=True, kw_only=True)
class StageConfig(CommonConfig):
    """Settings of a run that cuts the network by depth into stages, which all train at the same time (AuxNet).

    Args:
        method: ``delayed`` (nothing is guessed: a stage takes the true output of the one before, and its true
            gradients some steps late; options of guesses are refused); or the paper's ``penalty`` (an auxiliary network
            guesses the input of a stage), ``al-net`` (augmented Lagrangian, multipliers by a second head of the
            auxiliary networks), ``penalty-store`` and ``al-store`` (no auxiliary networks: guesses and multipliers are
            kept for each sample, and random transforms of the data set are frozen; the first epoch is serial).
        beta: weight of the penalty, half the mean square of guess minus truth per element; above 0.
        beta_growth: factor on ``beta`` for each factor of ten by which the learning rate has fallen; at least 1.
        lambda_step: step of the guess in units of 1 / beta, in (0, 1]; None takes 1, and 0.1 where guesses of
            three stages or more are stored, as 1 diverges there.
        multiplier_every: steps between two updates of the multipliers, at least 1.
        warmup_steps: first steps, in which the stages wait for each other and train by plain back-propagation; where
            inputs are guessed, the auxiliary networks learn the true ones meanwhile.
        serial_every: after the warm-up, period of serial steps, which correct by the true gradient: accuracy at the
            price of speed. 4 makes every fourth step wait; 0 is never, 1 always: back-propagation.
        delay: steps by which a gradient is late for each stage that it passes, with ``delayed``; 1 is enough on
            a fast link, 2 hides a slow one, 0 is back-propagation.
        cuts: names of the modules behind which the network is cut, one fewer than workers, such as ``["layer2"]``; None
            balances the stages by measured time.
        network: name of the network in the module; None finds it by its residual blocks.
        aux_network: makes an auxiliary network from the shapes of the network's input and of a boundary, without the
            batch; None makes a small one: convolutions between images, a transformer block for sequences, a perceptron
            for vectors. With ``al-net`` it is asked for a first dimension of twice the length.
        aux_width: channels of the default auxiliary networks, at least 1; up to four times as many
            where the boundary has them.
        aux_learning_rate: highest learning rate of the auxiliary networks (SGD with momentum 0.9); it falls as that of
            the first optimizer does.

    The others are those of :class:`CommonConfig`; ``local_steps`` is the number of steps between two handshakes.
    Optimizer state is always kept, and a worker with NaN or infinity ends the run.

    Raises:
        ValueError: if a value is outside its limits.
    """

    trains_alone: ClassVar[bool] = False

    momentum: MomentumPolicy | None = "keep"  # a stage never moves, so its state has nowhere to travel
    method: AuxMethod = "delayed"
    beta: float = 1.0
    beta_growth: float = 1.0
    lambda_step: float | None = None
    multiplier_every: int = 10
    warmup_steps: int = 200
    serial_every: int = 0
    delay: int = 1
    cuts: Sequence[str] | None = None
    network: str | None = None
    aux_network: AuxFactory | None = None
    aux_width: int = 32
    aux_learning_rate: float = 0.1

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_integer("local_steps", self.local_steps, 1, "steps between two handshakes")
        check_choice("momentum", self.momentum, ["keep"])
        check_choice("non_finite", self.non_finite, ["raise"])
        check_choice("method", self.method, get_args(AuxMethod))
        check_integer("multiplier_every", self.multiplier_every, 1, "10 is the default; 1 may diverge")
        check_integer("warmup_steps", self.warmup_steps, 0, "0 means no warm-up")
        check_integer("serial_every", self.serial_every, 0, "0 means never, 1 means always")
        check_integer("aux_width", self.aux_width, 1, "32 is the default")
        check_integer("delay", self.delay, 0, "1 is the default, 0 back-propagation")
        _check_above("beta", self.beta, 0)
        _check_above("aux_learning_rate", self.aux_learning_rate, 0)
        if not self.beta_growth >= 1:
            raise ValueError(f"beta_growth={self.beta_growth!r} must be at least 1 (1 leaves beta as it is).")
        if self.lambda_step is not None and not 0 < self.lambda_step <= 1:
            raise ValueError(f"lambda_step={self.lambda_step!r} must lie in (0, 1]; None takes the default.")
        # A string is a sequence of strings, too.
        if isinstance(self.cuts, str):
            raise ValueError(f"cuts={self.cuts!r} must be a list of names, e.g. ['layer2'].")
        self._refuse_without_effect()

    @override
    def in_words(self) -> dict[str, str]:
        return {**super().in_words(), "aux_network": _name_of(self.aux_network)}

    @property
    def delayed(self) -> bool:
        """Whether gradients are late, and there are no guesses."""
        return self.method == "delayed"

    @property
    def stored(self) -> bool:
        """Whether guesses are stored by sample, and there are no auxiliary networks."""
        return self.method.endswith("-store")

    def serial(self, step: int) -> bool:
        """Whether the stages wait for each other in this step; ``step`` counts from 0."""
        after_warmup = step - self.warmup_steps
        if after_warmup < 0:
            return True
        return self.serial_every > 0 and after_warmup % self.serial_every == 0

    def _refuse_without_effect(self) -> None:
        """Raise a ValueError for settings of guesses where there are none, and of delays likewise."""
        names = _OF_GUESSES if self.delayed else ("delay",)
        defaults = {field.name: field.default for field in fields(self)}
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]
        if given and self.delayed:
            raise ValueError(
                f"method='delayed', the default, guesses nothing, so {', '.join(given)} would have no effect. Leave it "
                "out, or choose a method that guesses: method='penalty' is the paper's."
            )
        if given:
            raise ValueError(
                f"method={self.method!r} delays nothing, so {', '.join(given)} would have no effect. Leave it out, or "
                "choose method='delayed'."
            )

    @property
    def multipliers(self) -> bool:
        """Whether there are Lagrange multipliers."""
        return self.method.startswith("al-")


def _name_of(factory: object) -> str:
    """The name of a factory without its address, which differs between workers."""
    name = getattr(factory, "__qualname__", None)
    if isinstance(name, str):
        return name
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(factory))


def _check_above(name: str, value: object, limit: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not limit < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a finite number above {limit}.")
