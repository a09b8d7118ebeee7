"""Turns NumPy's scalars into Python numbers: a file with NumPy's cannot be loaded with ``weights_only=True``."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np

_DICTS = (dict, OrderedDict, Counter)  # with `MultiStepLR`'s milestones as keys of the last
_LISTS = (list, tuple)


def python_numbers(value: Any) -> Any:
    """``value`` with a Python number for each scalar of NumPy, in dicts, their keys, lists and tuples too."""
    if isinstance(value, np.generic):
        return value.item()
    kind = type(value)
    if kind in _DICTS:
        return kind({python_numbers(key): python_numbers(each) for key, each in value.items()})
    if kind in _LISTS:
        return kind(map(python_numbers, value))
    return value
