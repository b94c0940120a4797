"""A bucket of each store."""

import pytest


@pytest.fixture(params=["gs", "amazon"])
def bucket(request):
    """The URL of a bucket, of each store in turn."""
    return request.getfixturevalue(request.param)
