"""Fixtures for the tests of training: the toy corpus, with features extracted once per file."""

import pytest
from training_toys import make_data


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """The folder for the features of this file's tests."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def data(tiny, data_folder):
    """A datamodule over the toy corpus."""
    return make_data(tiny, data_folder)
