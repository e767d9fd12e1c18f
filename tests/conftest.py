"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real captioned pictures kept beside the project; tests that want them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real pictures beside the project (shared/data)")
    return SHARED_DATA
