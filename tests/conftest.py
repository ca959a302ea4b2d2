import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The longest tests, which run whole examples, go first: two processes then end together."""
    items.sort(key=lambda item: item.path.name != "test_shipped.py")
