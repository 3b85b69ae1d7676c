import pytest

from tests.tokenizer.bases import learn_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """One small English tokenizer of each family; not to be written to."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: learn_base(root / kind, kind) for kind in ("byte_level", "sentencepiece")}


@pytest.fixture(params=["byte_level", "sentencepiece"])
def base(request, bases):
    return bases[request.param]
