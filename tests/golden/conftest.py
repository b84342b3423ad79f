"""What the comparisons with stored values share."""

from functools import cache

import numpy as np
import pytest


@pytest.fixture(scope="module")
def golden(shared):
    """The arrays of a stored file, by its name."""

    @cache
    def read(name):
        with np.load(shared / "golden" / f"{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return read
