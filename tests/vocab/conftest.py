import pytest

from tests.vocab.trios import make_trio


@pytest.fixture(params=["byte_level", "sentencepiece"])
def own(request, bases):
    return bases[request.param]


@pytest.fixture
def byte_trio(bases, tmp_path):
    return make_trio(tmp_path, bases["byte_level"])
