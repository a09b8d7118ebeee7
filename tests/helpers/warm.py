"""The last module that the fork server imports: from here on, its forks share its memory.

A garbage collection in a worker would visit all imported objects, and so copy their pages: 0.1 of 0.9 s.
"""

from __future__ import annotations

import faulthandler
import functools
import gc

import lightning.fabric.utilities.registry as registry

from resist_lightning.checks.environment import _hash_of_package

# A worker that a signal such as SIGSEGV ends prints its stack. Its forks, without output of their own, inherit this.
faulthandler.enable()

_hash_of_package()  # cached: reading 190 files takes 0.06 s of the 1 s of a worker

# Every Trainer looks through all installed packages for callbacks: 0.01 s.
registry.entry_points = functools.cache(registry.entry_points)

gc.collect()
gc.freeze()
