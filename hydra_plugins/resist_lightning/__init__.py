"""Hydra looks through this namespace when an application starts: a place to register without an import by the user.

Only where the application has imported Lightning already; otherwise starting a Hydra application would cost seconds.
"""

import sys

if "lightning.pytorch" in sys.modules:
    import resist_lightning  # noqa: F401  registers the strategies
