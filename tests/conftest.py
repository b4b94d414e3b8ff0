import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_convnext_det.modules.detection import Batch
from tests.training import create_batches

# limits by the clock, 0.2 s an example and a rate of drawing them, fail on a machine that others use
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# imported before pytest 8.3 gives the root a handler, Lightning keeps its log to itself, out of caplog
logging.getLogger("lightning.pytorch").propagate = True

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test: at the end, the other worker would wait for it."""
    items.sort(key=lambda item: item.name != "test_notebooks__run_with_few_steps")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # what a test before has given to seed_everything
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real images are not here")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def photos(shared_data: Path) -> list[Tensor]:
    """Three real photos of different sizes, uint8 [3, H, W]."""
    files = sorted((shared_data / "coco_mini" / "val2017").glob("*.jpg"))[:3]
    return [torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files]


@pytest.fixture
def loader() -> DataLoader[Batch]:
    return DataLoader(create_batches(3), batch_size=None)
