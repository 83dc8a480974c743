"""The text that most runs here learn from."""

import pytest
from training_kit import FOX


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(FOX, encoding="utf-8")
    return path
