"""Benchmarks: dmpy beside other NBD servers, and the engine beside a bare `os.preadv`.

`python -m benchmarks` serves the same bytes by several servers, drives them in turns with fio and
prints one table. `python -m pytest benchmarks` times the engine alone. Nothing here fails because
something was slow: see README.md in this folder.
"""
