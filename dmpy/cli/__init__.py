"""The command line: `dmpy` (main.py) and the drop-in `dmsetup` (dmsetup.py)."""
