import pytest

from tests.tokenizer.bases import learn_base
from tests.vocab.trios import make_trio


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """One small English tokenizer of each family; not to be written to."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: learn_base(root / kind, kind) for kind in ("byte_level", "sentencepiece")}


@pytest.fixture(params=["byte_level", "sentencepiece"])
def own(request, bases):
    return bases[request.param]


@pytest.fixture
def byte_trio(bases, tmp_path):
    return make_trio(tmp_path, bases["byte_level"])
