"""Every test runs for every line of the table that it asks for, with both storages."""

import pytest

from tests.conformance.cases import CASES
from tests.conformance.shared import STORAGES


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="session")
def case(request):
    return request.param


@pytest.fixture(params=STORAGES.values(), ids=STORAGES, scope="session")
def storage(request):
    return request.param
