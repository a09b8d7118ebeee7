"""Silences advertisements and deprecations of Lightning that users cannot mend, also in spawned workers."""

from __future__ import annotations

import logging
import warnings


def hush() -> None:
    """Drop an advertisement, and a deprecation inside Lightning that users cannot mend."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
