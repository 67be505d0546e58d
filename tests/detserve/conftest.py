"""What the tests of detserve share and is dear to make."""

import shutil
from collections.abc import Iterator

import pytest
from builder_shelf import BuilderShelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Iterator[BuilderShelf]:
    """Random detectors and their exports; removed at the end, since they are gigabytes."""
    folder = tmp_path_factory.mktemp("shelf")
    yield BuilderShelf(folder)
    shutil.rmtree(folder)
