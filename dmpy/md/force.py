"""What `assemble --force` writes: the superblocks of an array that is taken for good by request.

Source: mdadm 4.2 Assemble.c, force_array().
"""

from __future__ import annotations

from dmpy.md.assemble import Assembly

__all__ = ["force_assembly"]


def force_assembly(assembly: Assembly) -> None:
    """Make the superblocks of all disks that are used agree, so that they make an array by right.

    Args:
        assembly: what assemble(..., force=True) returned.

    Raises:
        OSError: one of them could not be written.
    """
    state = assembly.state()
    state.events += 1
    for index, disk in enumerate(assembly.slots):
        if disk is not None:
            disk.write(state, assembly.places[index].number)
    for disk in assembly.spares:
        disk.write(state, disk.number)
