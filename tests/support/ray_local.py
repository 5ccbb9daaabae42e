"""One Ray cluster for a whole test run."""

import pytest
import ray

from infra.ray_cluster import session


@pytest.fixture(scope="session")
def ray_local():
    """Import it into a conftest.py; two of them share the cluster."""
    if ray.is_initialized():
        yield
        return
    with session("local"):
        yield
