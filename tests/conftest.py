import pytest
import torch

from data import World, WorldConfig, world_tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def world():
    return World(WorldConfig(seed=3, cities=24, recipes=12, things=24, pairs=12, tests=24))


@pytest.fixture(scope="session")
def tokenizer(world):
    return world_tokenizer(world)
