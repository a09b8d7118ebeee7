"""Tests over shaped links need network namespaces; whether there are any is tried once."""

from __future__ import annotations

import pytest

from experiments.harness.links.namespaces import why_no_namespaces

MISSING = why_no_namespaces()
needs_namespaces = pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")
