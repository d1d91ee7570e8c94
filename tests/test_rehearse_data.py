"""Every way of bringing data, as a user starts the program."""

import pytest

from tests import rehearse_data


@pytest.mark.release
def test_data_are_brought_as_a_user_brings_them():
    # The other ways take longer: python -m tests.rehearse_data has them all.
    only = ["downloads"]
    text, good = rehearse_data.rehearse(only=only, full=False)
    assert good, text
