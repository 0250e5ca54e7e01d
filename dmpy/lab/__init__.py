"""The failure lab: scenarios that break arrays under a load that accounts for every byte.

- `scenario`: TOML files, checked
- `legs`: disks that fail, rot, crawl or lose their power when told to
- `model`: what every sector may hold
- `workload`: clients that write, read and compare, over NBD
- `observe`: what the status lines of a stack say
- `engine`: runs a scenario
- `record`: what is kept of a run, and the verdict
- `page`, `text`: the timeline drawn, for a browser and for a terminal

README.md has the grammar of scenarios.
"""

from dmpy.lab.engine import Lab, run
from dmpy.lab.record import Event, Record, Sample
from dmpy.lab.scenario import Scenario, ScenarioError, find, parse, shipped

__all__ = [
    "Event",
    "Lab",
    "Record",
    "Sample",
    "Scenario",
    "ScenarioError",
    "find",
    "parse",
    "run",
    "shipped",
]
