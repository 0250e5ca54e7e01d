"""`dmpy lab`: run a scenario that breaks an array under load, and say whether it held."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from dmpy.cli.session import fail, json_option

__all__ = ["lab_command"]

# Whatever the terminal, a timeline wider than this is hard to follow; its labels come on top.
_WIDEST, _LABELS = 100, 20


@click.command("lab", short_help="Break an array under load and see whether it holds.")
@click.argument("scenario", required=False)
@click.option("--list", "as_list", is_flag=True, help="Name the scenarios that come with dmpy.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), metavar="N",
              help="Of every choice, to repeat a run; else one is drawn and printed.")
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False),
              help="Write the timeline as a page, in one file.")
@click.option("--only", metavar="TEXT", help="Run the variants whose title has TEXT in it.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdicts only.")
@json_option
def lab_command(scenario: str | None, as_list: bool, seed: int | None, html: str | None,
                only: str | None, quiet: bool, as_json: bool) -> int:
    """Run SCENARIO, the name of one that comes with dmpy or a TOML file.

    It builds an array over disks of its own, drives clients over NBD that account for every byte,
    injects failures, and prints a timeline and a verdict. The exit status is 0 when all went as the
    scenario expects, 1 when not:

    \b
      dmpy lab --list
      dmpy lab raid5-loses-a-leg --seed 7 --html timeline.html
    """
    from dmpy import lab

    if as_list:
        if scenario is not None:
            raise click.UsageError("--list and SCENARIO exclude each other")
        return _list(as_json)
    if scenario is None:
        raise click.UsageError("argument SCENARIO is missing (--list names those there are)")
    chosen = lab.find(scenario)
    _check(chosen)
    if html is not None:
        # Before minutes of work, not after.
        _check_writable(html)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    records = _run(chosen, seed, only, None if as_json else quiet)
    if html is not None:
        from dmpy.lab.page import page

        with open(html, "w", encoding="utf-8") as file:
            file.write(page(chosen, records))
    if as_json:
        click.echo(json.dumps({"scenario": chosen.name, "title": chosen.title, "seed": seed,
                               "ok": all(record.ok for record in records),
                               "runs": [record.as_dict() for record in records]}))
    return 0 if all(record.ok for record in records) else 1


def _list(as_json: bool) -> int:
    from dmpy import lab

    scenarios = [lab.find(name) for name in lab.shipped()]
    if as_json:
        click.echo(json.dumps([
            {"name": one.name, "title": one.title, "description": one.description,
             "variants": len(one.variants), "legs": dict(one.legs)} for one in scenarios]))
        return 0
    width = max((len(one.name) for one in scenarios), default=0)
    for one in scenarios:
        click.echo(f"{one.name:{width}}  {one.title}")
    return 0


# A target that is not there is one sentence, not a run that cannot begin.
def _check(scenario: Any) -> None:
    from dmpy.lab.scenario import missing_targets

    missing = missing_targets(scenario)
    if missing:
        fail(f"scenario {scenario.name} needs the target {missing[0]}, which is not there")


def _check_writable(path: str) -> None:
    with open(path, "a", encoding="utf-8"):
        return


# Run the variants and print each; `quiet` is None where nothing is to be printed.
def _run(scenario: Any, seed: int, only: str | None, quiet: bool | None) -> list:
    from dmpy.lab import Lab

    variants = [v for v in scenario.variants if only is None or only in v.title]
    if not variants:
        fail(f"scenario {scenario.name} has no variant with {only} in its title")
    records = []
    for variant in variants:
        record = Lab(scenario, variant, seed=seed).run()
        records.append(record)
        if quiet is not None:
            _show(record, quiet)
    if quiet is not None:
        held = sum(record.ok for record in records)
        click.echo(f"{held} of {len(records)} as expected, --seed {seed}")
    return records


def _show(record: Any, quiet: bool) -> None:
    from rich.console import Console

    from dmpy.lab.text import timeline
    from dmpy.lab.timeline import verdict_line

    if quiet:
        title = f"{record.scenario}, {record.variant}" if record.variant else record.scenario
        click.echo(f"{title}: {verdict_line(record)}")
        return
    # What goes into a file is as wide as the longest line.
    wide = None if sys.stdout.isatty() else 1000
    console = Console(file=sys.stdout, highlight=False, width=wide)
    width = min(console.width, _WIDEST)
    console.print(timeline(record, width=max(20, width - _LABELS)))
    console.print()
