"""error: every request fails."""

import errno

import pytest

from dmpy.table import Table
from dmpy.target import find_target
from dmpy.targets.error import Error
from dmpy.testing.conformance import TargetTests


class TestError(TargetTests):
    """No leg, no I/O."""

    error = errno.EIO
    status_text = ""

    def build(self, devices):
        return Error(100 * 512)

    def oracle(self, sector):
        return None

    def test_its_table_has_no_arguments(self):
        assert self.target.table() == ""

    def test_a_discard_fails_too(self):
        with pytest.raises(OSError) as caught:
            self.target.discard(0, 512)
        assert caught.value.errno == errno.EIO

    def test_a_flush_has_nothing_to_flush(self):
        self.target.flush()

    def test_the_error_tells_the_byte(self):
        with pytest.raises(OSError, match="4096"):
            self.read(4096, 512)


def test_its_word_finds_it():
    assert find_target("error") is Error


def test_version_is_the_kernels():
    assert Error.version == (1, 5, 0)


@pytest.mark.parametrize("words", ["", "disk 0", "1 2 3", "x", "gone 99999999999999999999"])
def test_any_arguments_are_taken_and_forgotten_as_in_the_kernel(words):
    table = Table.parse(f"0 64 error {words}", dict().__getitem__)
    assert table.text() == "0 64 error"
    assert table.devices == []
