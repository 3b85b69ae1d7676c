import pytest

from megatron_adapt.tokenizer.pieces import copy_tokenizer


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
