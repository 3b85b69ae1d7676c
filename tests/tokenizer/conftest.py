import pytest

from megatron_adapt.tokenizer.pieces import copy_tokenizer
from tests.tokenizer.bases import learn_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """One small English tokenizer of each family; not to be written to."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: learn_base(root / kind, kind) for kind in ("byte_level", "sentencepiece")}


@pytest.fixture(params=["byte_level", "sentencepiece"])
def base(request, bases):
    return bases[request.param]


@pytest.fixture
def copy(bases, tmp_path):
    """Copy a base, to be damaged."""

    def make(kind, *without):
        copy_tokenizer(bases[kind].folder, tmp_path / "base")
        for name in without:
            (tmp_path / "base" / name).unlink()
        return tmp_path / "base"

    return make
