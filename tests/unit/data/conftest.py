"""A place that a STAC API on loopback has images of."""

import pytest
from stac_fixtures import sentinel2
from stac_server import StacServer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def clear(files):
    return sentinel2(files, "S2_0621", "2021-06-21")


@pytest.fixture
def serve(files):
    running = []

    def start(items, **options):
        server = StacServer(files, items, **options)
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__()
