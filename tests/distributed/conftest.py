"""The texts that most runs here learn from."""

import pytest
from crew import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))
