"""The fingerprint of a worker before it trains: versions, code, settings, optimizers, tensors."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from resist_lightning.checks.fingerprint import Fingerprint
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.layout import Layout
from resist_lightning.state.optimizer_state import OptimizerStates

_LIBRARIES = ("torch", "lightning", "torchvision", "timm", "numpy")


def fingerprint_of(layout: Layout, states: OptimizerStates, surroundings: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of all that workers must have in common, with the host's own entries, ``surroundings``."""
    named = named_tensors(layout.module)
    order = [*named, *layout.parts()]
    return {
        "versions": _versions(),
        "settings": {
            "workers": str(layout.workers),
            **layout.config.in_words(),
            **surroundings,
            "total_steps": str(layout.total_steps),
            "order of tensors and blocks": _short(repr(order).encode()),
        },
        "optimizers": states.describe(),
        "blocks": dict.fromkeys(layout.parts(), ""),
        "tensors": {name: _describe(tensor) for name, tensor in named.items()},
        "source files": _sources(layout.module),
    }


def _versions() -> dict[str, str]:
    """Versions of the loaded libraries. Build tags (``+cpu``) are left out: they tell where, not what is computed."""
    versions = {"Python": platform.python_version()}
    for name in _LIBRARIES:
        if name in sys.modules:
            version = str(getattr(sys.modules[name], "__version__", "unknown"))
            versions[name] = version.partition("+")[0]
    return versions


def _describe(tensor: Tensor) -> str:
    """A tensor in words."""
    words = [str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch.")]
    if isinstance(tensor, nn.Parameter):
        words.append("requires_grad" if tensor.requires_grad else "frozen")
    # The order of its memory counts: flat buffers are averaged in that order.
    if not tensor.is_contiguous():
        words.append(f"strides {tensor.stride()}")
    return " ".join(words)


def _sources(module: nn.Module) -> dict[str, str]:
    """Hashes of the source files of this package and of the module's classes, except torch's and Lightning's.

    Classes without a file (made in a notebook) are left out.
    """
    modules: set[str] = set()
    for child in module.modules():
        modules.update(base.__module__ for base in type(child).__mro__)
    found = {"resist_lightning": _hash_of_package()}
    for name in sorted(modules):
        # Versions speak for torch and Lightning, which have too many files to be read.
        if name.partition(".")[0] in ("torch", "lightning", "builtins", "resist_lightning"):
            continue
        code = _hash_of_file(getattr(sys.modules.get(name), "__file__", None))
        if code:
            # The script has one name in the process that was started by hand, and another one in its children.
            found["the script" if name in ("__main__", "__mp_main__") else name] = code
    return found


@cache
def _hash_of_package() -> str:
    # Of the whole package, not of this folder: a difference in any module makes workers train differently.
    folder = Path(__file__).parents[1]
    content = b""
    for file in sorted(folder.rglob("*.py")):
        content += file.relative_to(folder).as_posix().encode() + file.read_bytes()
    return _short(content)


@cache
def _hash_of_file(path: str | None) -> str:
    """Hash of a source file; empty where there is none to read."""
    if not path or not path.endswith(".py"):
        return ""
    try:
        return _short(Path(path).read_bytes())
    except OSError:
        return ""


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
