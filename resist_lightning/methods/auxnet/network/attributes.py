"""The numbers, strings and switches that a traced forward has read: a graph keeps their values of the trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from resist_lightning.errors import StageSelectionError

_PLAIN = bool | int | float | complex | str | None


class TracedAttributes:
    """The attributes that tracing a network has made constants of its graph, and their values then.

    What residual blocks and modules of torch.nn read in their own forward is not among them: these run as they are.

    Args:
        network: the traced network, as it was traced.
        name: its name in the user's module; empty for the module itself.
        read: the modules, and names of their attributes, that the forward has read.
    """

    def __init__(self, network: nn.Module, name: str, read: Iterable[tuple[nn.Module, str]]) -> None:
        names = {module: path for path, module in network.named_modules(prefix=name)}
        # By its name in the user's module, each of them.
        self._read: dict[str, tuple[nn.Module, str]] = {}
        for module, attribute in read:
            path = f"{names.get(module, type(module).__name__)}.{attribute}"
            self._read[path.lstrip(".")] = module, attribute
        self._traced = self._values()

    def check(self) -> None:
        """Raise a StageSelectionError if a value has changed: stages would go on with the one of the trace."""
        values = self._values()
        if values == self._traced:
            return
        for path in sorted({*values, *self._traced}):
            before, now = (repr(found[path]) if path in found else "no number" for found in (self._traced, values))
            if before != now:
                raise StageSelectionError(
                    f"the forward of the network reads {path}, which was {before} when the network was cut into stages "
                    f"and is {now} now, but the stages would compute with {before} to the end. Set it before the "
                    "training, or have it read by a residual block or a module of torch.nn (nn.Dropout), which are not "
                    "traced and see each change."
                )

    def _values(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for path, (module, attribute) in self._read.items():
            found.update(_plain(path, getattr(module, attribute, None)))
        return found


def _plain(path: str, value: object) -> dict[str, object]:
    """The numbers, strings and switches in an attribute, by name: itself, or those directly in it."""
    if isinstance(value, _PLAIN):
        return {path: value}
    if isinstance(value, Tensor | nn.Module):
        return {}
    if isinstance(value, list | tuple):
        inside: Mapping[object, object] = dict(enumerate(value))
    else:
        # A dictionary, or an object with settings.
        inside = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return {f"{path}.{key}": item for key, item in inside.items() if isinstance(item, _PLAIN)}
