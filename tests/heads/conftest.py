from functools import cache

import pytest

from mechinterp import load
from tests.tasks.word_model import word_model
from tests.test_identities import saved


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """A family's model out of a folder, raw or with its weights folded and centred."""

    @cache
    def folder(family):
        return saved(family, tmp_path_factory.mktemp(family))

    @cache
    def of(family, processed):
        return load(folder(family), process=processed, device="cpu")

    return of


@pytest.fixture(scope="session")
def planted():
    return load("planted-induction", device="cpu")


@pytest.fixture(scope="session")
def with_bos():
    return word_model(bos=True)
