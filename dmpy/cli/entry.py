"""The entry point of `dmpy`: dmsetup by its name, without waiting for what only `dmpy` needs."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; under the name dmsetup it is that command."""
    if os.path.basename(sys.argv[0]) in ("dmsetup", "dmpy-dmsetup"):
        from dmpy.cli import dmsetup

        dmsetup.main()
    else:
        from dmpy.cli import main as verbs

        verbs.main()
