"""Every test of this folder sees the parts of somebody outside of the package beside the package's own."""

from __future__ import annotations

import pytest

from tests.extend import registered


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield
