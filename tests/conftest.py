"""Fixtures for every test: where the shared real data lies, and small deterministic things made on the spot."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, corpora and golden vectors that lies beside the project, if it does."""
    folder = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no shared data at {folder.name}/ beside the project (set TOKENKIT_SHARED)")
    return folder
