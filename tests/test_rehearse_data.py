"""Every way of bringing data, as a user starts the program."""

import pytest

from tests import rehearse_data


@pytest.mark.slow
def test_every_way_of_bringing_data():
    text, good = rehearse_data.rehearse(only=None, full=False)
    assert good, text
