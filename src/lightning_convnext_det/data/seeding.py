"""Seeds of the data: that of the run, and one for each image and epoch."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededDataset(Dataset[Any]):
    """A map-style dataset indexed by ``(epoch, index)``, whose random numbers depend on seed, epoch and index alone."""

    seed: int

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def keys(self) -> list[tuple[int, str]] | None:
        """Id and file name of each image; None where they are not known before an image is read."""
        return None


def run_seed() -> int:
    """The number given to ``seed_everything``, else the seed of torch's generator."""
    given = os.environ.get("PL_GLOBAL_SEED")  # where lightning.fabric.utilities.seed keeps it; torch is seeded anew
    return torch.initial_seed() if given is None else int(given)


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed the CPU generators of torch, NumPy and Python from seed, epoch and index, and restore them afterwards."""
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    number = int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])
    torch.default_generator.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002  # the global one, which transforms of other libraries draw from
    random.seed(number)
    try:
        yield
    finally:
        torch.random.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
