"""Linux MD arrays: look at their disks, make them, put them together, keep their superblocks.

`disk` says what one disk holds in words that are the same for all versions of superblocks,
`examine` prints that, `create` makes new arrays, `assemble` decides which disks make an array, and
`store` keeps the state of an array that is in use. Nothing here moves an array's data.
"""

__all__: list[str] = []
