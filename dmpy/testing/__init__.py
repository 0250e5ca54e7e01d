"""What one needs to test targets, leaves and programs that use them; shipped with dmpy.

- `pattern`: data whose every word holds its own offset, and a device that serves it
- `faulty`: devices that fail, hang or crawl when told to
- `powercut`: disks whose power can be cut
- `conformance`: the suites that a test of a target or a leaf inherits (needs pytest)
- `stacks`: random stacks of tables and an oracle that says where each sector lives
"""

from dmpy.testing.faulty import Fault, FaultyDevice, every_fault
from dmpy.testing.pattern import (
    PatternDevice,
    PatternMismatch,
    check_pattern,
    expect_equal,
    fill_pattern,
    pattern,
)
from dmpy.testing.powercut import Crash, Power, PowerCutDevice

__all__ = [
    "Crash",
    "Fault",
    "FaultyDevice",
    "PatternDevice",
    "PatternMismatch",
    "Power",
    "PowerCutDevice",
    "check_pattern",
    "every_fault",
    "expect_equal",
    "fill_pattern",
    "pattern",
]
