"""What the tests of training share: the toy corpus, its features extracted once a file."""

import pytest
from training_toys import make_data


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Where the features of this file's tests lie."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def data(tiny, data_folder):
    """A datamodule over the toy corpus."""
    return make_data(tiny, data_folder)
