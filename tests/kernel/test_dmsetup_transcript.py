"""The recorded transcript of the real dmsetup is what it says today."""

from __future__ import annotations

import pytest

from tests import needs
from tests.data.dmsetup.record import HERE, record
from tests.kernel import guest

pytestmark = [pytest.mark.kernel, pytest.mark.nightly]


def test_the_transcript_is_what_dmsetup_and_the_kernel_say(tmp_path):
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("dmsetup", package="dmsetup")
    assert record(tmp_path) == (HERE / "transcript.txt").read_text()
