import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps one state per process; the next test has its own."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def data(tmp_path):
    """A folder of the items of a tiny training."""
    from training_run import write_items

    write_items(tmp_path / "data")
    return tmp_path / "data"


def pytest_collection_modifyitems(items):
    """The longest tests, which run whole examples, go first: two processes then end together."""
    items.sort(key=lambda item: item.path.name != "test_shipped.py")
