"""Real file systems on devices that are served: made, filled, checked, read after a restart.

nbdfuse shows an export as a file and a loop device makes a block device of that, so the kernel
needs no nbd module. Needs root.
"""

from __future__ import annotations

import filecmp
import os
import random
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest

from tests import needs
from tests.nbd.conftest import MIB

SIZE = 384 * MIB  # xfs wants 300 MiB

# mkfs, a check that changes nothing, the packages they are in
FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"], "e2fsprogs"),
    "xfs": (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"], "xfsprogs"),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], ["btrfs", "check", "--readonly"], "btrfs-progs"),
}


@pytest.fixture(autouse=True)
def machine():
    """What this machine must have."""
    needs.root()
    needs.path("/dev/fuse", why="nbdfuse needs it")
    needs.path("/dev/loop-control", why="the kernel has no loop devices")
    needs.tool("nbdfuse", package="nbdfuse")


@contextmanager
def _block_device(uri, folder):
    """A loop device over an export."""
    os.makedirs(folder)
    file = os.path.join(folder, "nbd")
    fuse = subprocess.Popen([needs.tool("nbdfuse"), file, uri])
    node = None
    try:
        end = time.monotonic() + 20
        while not (os.path.exists(file) and os.path.getsize(file)):
            assert fuse.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        attached = subprocess.run(
            [needs.tool("losetup"), "--find", "--show", file],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        node = attached.stdout.strip()
        yield node
    finally:
        if node is not None:
            subprocess.run([needs.tool("losetup"), "-d", node], check=True, timeout=60)
        _unmount_patiently(["umount", folder], folder)
        fuse.wait(30)


@contextmanager
def _mounted(node, folder, *options):
    os.makedirs(folder, exist_ok=True)
    subprocess.run(["mount", *options, node, folder], check=True, timeout=60)
    try:
        yield folder
    finally:
        _unmount_patiently(["umount", folder], folder)


# A mount may be busy for a moment after its last user has gone.
def _unmount_patiently(command, folder):
    end = time.monotonic() + 30
    while os.path.ismount(folder):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            assert time.monotonic() < end, done.stderr
            time.sleep(0.1)


# A tree with everything that copying can go wrong with.
def _make_tree(top, seed):
    rng = random.Random(seed)
    for number in range(120):
        folder = top / f"d{number % 12}" / f"e{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        length = rng.choice((0, 1, 511, 4096, 10_000, 65536, 300_001))
        (folder / f"f{number}").write_bytes(rng.randbytes(length))
    (top / "big").write_bytes(rng.randbytes(24 * MIB))
    with (top / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(11 * MIB)
        file.write(rng.randbytes(70_000))
    os.symlink("d1/e1", top / "link")
    os.link(top / "big", top / "same")
    return top


def _assert_equal(left, right):
    compared = filecmp.dircmp(left, right, ignore=["lost+found"])
    assert not compared.left_only and not compared.right_only, (left, compared.left_only)
    same, different, errors = filecmp.cmpfiles(
        left, right, compared.common_files, shallow=False
    )
    assert not different and not errors, (left, different, errors)
    assert len(same) == len(compared.common_files)
    for name in compared.common_dirs:
        _assert_equal(os.path.join(left, name), os.path.join(right, name))


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_file_system_survives_copying_checking_and_a_restart(
    serve, images, run, tmp_path, folder, kind
):
    make, check, package = FILE_SYSTEMS[kind]
    needs.tool(make[0], package=package)
    half = SIZE // 2
    a, b, c, d = images(half // 2, half // 2 + MIB, MIB + half // 2, half // 2)
    # Two linear lines and a striped one, on four files, none of them from its start to its end.
    sectors = half // 512
    table = (
        f"0 {sectors // 2} linear {a} 0\n"
        f"{sectors // 2} {sectors // 2} linear {b} 2048\n"
        f"{sectors} {sectors} striped 2 128 {c} 2048 {d} 0"
    )
    tree = _make_tree(tmp_path / "tree", kind)
    server = serve("table.py", f"table={table}")
    with _block_device(server.uri(), f"{folder}/fuse1") as node:
        run(*make, node)
        with _mounted(node, f"{folder}/mnt"):
            run("cp", "-a", f"{tree}/.", f"{folder}/mnt")
            with suppress(OSError):
                os.sync()
            _assert_equal(tree, f"{folder}/mnt")
        run(*check, node)
    assert server.stop() == 0
    server = serve("table.py", f"table={table}", options=("-t", "1", "-r"))
    with _block_device(server.uri(), f"{folder}/fuse2") as node:
        run(*check, node)
        with _mounted(node, f"{folder}/mnt", "-o", "ro"):
            _assert_equal(tree, f"{folder}/mnt")
    assert server.stop() == 0




def test_discarded_blocks_become_holes(serve, images, run, folder):
    """fstrim reaches the files through loop, FUSE, NBD and the target."""
    needs.tool("mkfs.ext4", package="e2fsprogs")
    a, b = images(64 * MIB, 64 * MIB)
    server = serve("striped.py", "chunk=64K", a, b)
    with _block_device(server.uri(), f"{folder}/fuse") as node:
        run("mkfs.ext4", "-q", "-F", node)
        with _mounted(node, f"{folder}/mnt"):
            with open(f"{folder}/mnt/big", "wb") as file:
                file.write(os.urandom(40 * MIB))
            os.sync()
            full = a.stat().st_blocks + b.stat().st_blocks
            os.unlink(f"{folder}/mnt/big")
            os.sync()
            run("fstrim", f"{folder}/mnt")
            empty = a.stat().st_blocks + b.stat().st_blocks
    assert (full - empty) * 512 > 35 * MIB
