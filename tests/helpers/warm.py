"""The last module that the fork server imports: from here on, its forks share all that it has.

A garbage collection in a worker would go through everything that is imported, and copy its pages: 0.1 of 0.9 s.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
