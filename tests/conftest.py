import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_configure(config):
    config.addinivalue_line("markers", "hard: minutes long; runs only with -m hard")
    config.addinivalue_line("markers", "gpu: needs a GPU, which no other test sees; runs only with -m gpu")
    if "gpu" not in config.getoption("-m"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the others compare bytes, on the CPU


def pytest_collection_modifyitems(config, items):
    for name in ("hard", "gpu"):
        if name not in config.getoption("-m"):
            config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker(name)])
            items[:] = [i for i in items if not i.get_closest_marker(name)]


@pytest.fixture
def one_thread():
    """As the processes of `helpers.both`, for results that are compared byte for byte."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared():
    """Folder with the small real data sets; tests that need it are skipped without it."""
    path = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("real data not at hand")
    return path
