"""The kernel's nbd driver attaches a device of ours; it is formatted, mounted, written, checked.

Server and client run in the guest, on image files of the host. When the guest is off the same table
is loaded here and every file must be there, byte for byte, and nothing else wrong with the file
system.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import dmpy
from tests import needs
from tests.kernel import guest

pytestmark = [pytest.mark.kernel, pytest.mark.nbd]

MIB_SECTORS = 2048
IMAGES = ("a.img", "b.img", "c.img", "d.img")
IMAGE_SECTORS = 12 * MIB_SECTORS
# Chunks dealt out over two devices that are two images each, one behind the other.
TABLES = {
    "left": f"0 {IMAGE_SECTORS} linear a.img 0\n{IMAGE_SECTORS} {IMAGE_SECTORS} linear b.img 0",
    "right": f"0 {IMAGE_SECTORS} linear c.img 0\n{IMAGE_SECTORS} {IMAGE_SECTORS} linear d.img 0",
    "r0": f"0 {4 * IMAGE_SECTORS} striped 2 24 /dev/mapper/left 0 /dev/mapper/right 0",
}

_SCRIPT = """
set -ex
trap 'test $? = 0 || cat /run/dmpy/server.log' EXIT
export DMPY_RUNTIME_DIR=/run/dmpy DMPY_STATE_DIR=/run/state
export PYTHONPATH=/run/repo:$(echo /run/repo/.venv/lib/python3*/site-packages)
dmpy() { /usr/bin/python3 -m dmpy.cli.main "$@"; }

for name in left right r0; do dmpy create $name <$name.table; done
nbd-client -unix /run/dmpy/nbd.sock /dev/nbd0 -N r0 -C 2
blockdev --getsize64 /dev/nbd0 >size
mkfs.ext4 -q -F /dev/nbd0
mkdir -p /mnt/m
mount /dev/nbd0 /mnt/m
mkdir /mnt/m/tree
cp -a /run/repo/dmpy/*.py /run/repo/tests/kernel /mnt/m/tree
dd if=/dev/urandom of=/mnt/m/random bs=64k count=160 status=none
dd if=/dev/urandom of=/mnt/m/synced bs=1k count=20 oflag=sync status=none
truncate -s 5M /mnt/m/sparse
dd if=/dev/urandom of=/mnt/m/sparse bs=4k seek=700 count=3 conv=notrunc status=none
(cd /mnt/m && find . -type f -print0 | sort -z | xargs -0 sha256sum) >sums
fstrim -v /mnt/m
umount /mnt/m
e2fsck -fn /dev/nbd0
nbd-client -d /dev/nbd0

node=$(dmpy attach r0)
echo "$node" >node
mount -o ro $node /mnt/m
(cd /mnt/m && sha256sum --quiet -c /run/w/sums)
umount /mnt/m
dmpy detach r0
dmpy shutdown
test ! -e /run/dmpy/nbd.sock
"""


@dataclass
class Round:
    """What the guest left, and the device as it is read here.

    Attributes:
        result: of the guest's script.
        image: all bytes of the device, read through dmpy.
        sums: file name to SHA-256, as the guest saw the mounted files.
    """

    result: guest.Result
    image: Path
    sums: dict[str, str]


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory) -> Round:
    """Let the guest do its work, and read the device on the host."""
    needs.tool(guest.KERNEL, package="user-mode-linux")
    needs.tool("nbd-client", package="nbd-client")
    needs.tool("debugfs", package="e2fsprogs")
    needs.nbdkit_plugin("python")
    folder = tmp_path_factory.mktemp("nbd")
    for name in IMAGES:
        with (folder / name).open("wb") as file:
            file.truncate(IMAGE_SECTORS * 512)
    for name, table in TABLES.items():
        (folder / f"{name}.table").write_text(table)
    result = guest.run(_SCRIPT, folder, modules=["nbd"], seconds=90)
    assert result.status == 0, f"{result.output}\n{result.dmesg}"
    image = folder / "r0.img"
    with dmpy.Mapper() as mapper:
        for name, table in TABLES.items():
            device = mapper.create(name, table, cwd=str(folder))
        content = bytearray(device.size)
        device.preadv([memoryview(content)], 0)
        image.write_bytes(content)
    sums = dict(reversed(line.split("  ", 1)) for line in result.read("sums").splitlines())
    return Round(result, image, sums)


def test_the_kernel_sees_the_size_of_the_device(round_trip):
    assert int(round_trip.result.read("size")) == round_trip.image.stat().st_size


def test_the_file_system_is_in_order_when_read_through_dmpy(round_trip):
    fsck = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin")
    check = subprocess.run(
        [fsck, "-fn", round_trip.image], capture_output=True, text=True, timeout=60, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_file_reads_through_dmpy_as_it_was_written(round_trip, tmp_path):
    debugfs = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin")
    subprocess.run(
        [debugfs, "-R", f"rdump / {tmp_path}", round_trip.image],
        capture_output=True,
        timeout=60,
        check=True,
    )
    found = {
        f"./{path.relative_to(tmp_path)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert len(found) > 10
    assert found == round_trip.sums


def test_attach_takes_the_kernels_driver_where_there_is_one(round_trip):
    assert round_trip.result.read("node").strip().startswith("/dev/nbd")


def test_the_kernel_has_nothing_to_complain_of(round_trip):
    complaints = ("I/O error", "Receive control failed", "Connection timed out", "EXT4-fs error")
    lines = round_trip.result.dmesg.splitlines()
    assert [line for line in lines if any(word in line for word in complaints)] == []
