"""Describes what all workers must share before they train: versions, code, settings, optimizers, tensors."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from resist_lightning.checks.fingerprint import Fingerprint
from resist_lightning.methods.layout import Layout
from resist_lightning.state.optimizer_state import OptimizerStates

_LIBRARIES = ("torch", "lightning", "torchvision", "timm", "numpy")


def fingerprint_of(layout: Layout, states: OptimizerStates, surroundings: Mapping[str, str]) -> Fingerprint:
    """All that workers must have in common.

    Args:
        layout: the model's parts and the settings.
        states: the optimizers.
        surroundings: what the host adds, by name.
    """
    named: list[tuple[str, Tensor]] = [*layout.module.named_parameters(), *layout.module.named_buffers()]
    order = [name for name, _ in named] + layout.parts()
    return {
        "versions": _versions(),
        "settings": {
            "workers": str(layout.workers),
            **layout.config.in_words(),
            **surroundings,
            "order of tensors and blocks": _short(repr(order).encode()),
        },
        "optimizers": states.describe(),
        "blocks": dict.fromkeys(layout.parts(), ""),
        "tensors": {name: _tensor(tensor) for name, tensor in named},
        "source files": _sources(layout.module),
    }


def _versions() -> dict[str, str]:
    """Of what is loaded. Tags of a build (``+cpu``) are left out: they say where, not what is computed."""
    loaded = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "unknown")) for name, module in loaded.items()}
    return {"Python": platform.python_version(), **{name: text.partition("+")[0] for name, text in versions.items()}}


def _tensor(tensor: Tensor) -> str:
    """A tensor in words. The order of its memory counts: flat buffers are averaged as they lie."""
    words = [str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch.")]
    if isinstance(tensor, nn.Parameter):
        words.append("requires_grad" if tensor.requires_grad else "frozen")
    if not tensor.is_contiguous():
        words.append(f"strides {tensor.stride()}")
    return " ".join(words)


def _sources(module: nn.Module) -> dict[str, str]:
    """Hashes of the files that this package and the module's classes come from, but for torch's and Lightning's.

    Classes without a file (made in a notebook) are left out.
    """
    found = {"resist_lightning": _hash_of_package()}
    for kind in sorted({base for child in module.modules() for base in type(child).__mro__}, key=_home):
        home = sys.modules.get(kind.__module__)
        name = "the script" if kind.__module__ in ("__main__", "__mp_main__") else kind.__module__
        if home is not None and name.partition(".")[0] not in ("torch", "lightning", "builtins", "resist_lightning"):
            code = _hash_of_file(getattr(home, "__file__", None))
            if code:
                found[name] = code
    return found


def _home(kind: type) -> str:
    return kind.__module__


@cache
def _hash_of_package() -> str:
    # Of the package, not of this room: a difference in any module makes workers train differently.
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob("*.py"))
    return _short(b"".join(file.relative_to(folder).as_posix().encode() + file.read_bytes() for file in files))


@cache
def _hash_of_file(path: str | None) -> str:
    """Empty where there is no source to read."""
    try:
        return _short(Path(path).read_bytes()) if path and path.endswith(".py") else ""
    except OSError:
        return ""


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
