"""Every kind of request, as clients see it: what arrives at the device, and what comes back."""

from __future__ import annotations

import errno
import json
import random
from contextlib import suppress

import pytest

from tests.nbd.conftest import MIB, ODD_DEVICES
from tests.nbd.hangup import connect as connect_by_hand

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd


@pytest.fixture
def calls(odd):
    """What the device `memory` has been asked to do since the last time."""
    handle = odd.connect("calls")
    return lambda: json.loads(handle.pread(65536, 0).decode())


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "seen"),
    [
        (errno.EPERM, "EPERM"),
        (errno.EROFS, "EPERM"),
        (errno.EACCES, "EPERM"),
        (errno.EIO, "EIO"),
        (errno.ENOMEM, "ENOMEM"),
        (errno.EINVAL, "EINVAL"),
        (errno.ENOSPC, "ENOSPC"),
        (errno.EDQUOT, "ENOSPC"),
        (errno.EFBIG, "ENOSPC"),
        (errno.ESHUTDOWN, "ESHUTDOWN"),
        # What NBD has no number for is a fault of the device, not of the client.
        (errno.EILSEQ, "EIO"),
        (errno.ENODATA, "EIO"),
        (errno.ETIMEDOUT, "EIO"),
        (errno.EREMOTEIO, "EIO"),
        (errno.EBADMSG, "EIO"),
        (errno.ENXIO, "EIO"),
        (errno.EOPNOTSUPP, "EIO"),
    ],
)
def test_errno_reaches_the_client(odd, number, seen):
    handle = odd.connect(f"errno-{number}")
    requests = {
        "read": lambda: handle.pread(512, 0),
        "write": lambda: handle.pwrite(bytes(512), 0),
        "zero": lambda: handle.zero(512, 0),
        "flush": handle.flush,
        "cache": lambda: handle.cache(512, 0),
        "block status": lambda: handle.block_status(512, 0, lambda *_: 0),
    }
    if number != errno.EOPNOTSUPP:
        requests["trim"] = lambda: handle.trim(512, 0)
    for name, send in requests.items():
        with pytest.raises(nbd.Error) as caught:
            send()
        assert caught.value.errno == seen, name
    handle.shutdown()


def test_requests_beyond_the_end_are_refused(odd):
    handle = odd.connect("memory")
    size = handle.get_size()
    for send, seen in [
        (lambda: handle.pread(512, size - 100), "EINVAL"),
        (lambda: handle.pwrite(bytes(512), size - 100), "ENOSPC"),
        (lambda: handle.zero(512, size), "ENOSPC"),
    ]:
        with pytest.raises(nbd.Error) as caught:
            send()
        assert caught.value.errno == seen


# --- writes that must be durable, hints, zeroes ------------------------------------------------


def test_fua_write_reaches_the_device_as_such(odd, calls):
    handle = odd.connect("memory")
    handle.pwrite(bytes(4096), 8192, nbd.CMD_FLAG_FUA)
    handle.pwrite(bytes(4096), 0)
    assert calls() == [["write", 8192, 4096, True], ["write", 0, 4096, False]]


def test_fua_zero_and_fua_trim_are_followed_by_a_flush(odd, calls):
    handle = odd.connect("memory")
    handle.zero(4096, 0, nbd.CMD_FLAG_FUA)
    handle.trim(4096, 0, nbd.CMD_FLAG_FUA)
    assert calls() == [
        ["zero", 0, 4096, True, False], ["flush"], ["discard", 0, 4096], ["flush"]
    ]  # fmt: skip


def test_flush_reaches_the_device(odd, calls):
    odd.connect("memory").flush()
    assert calls() == [["flush"]]


def test_zero_flags_reach_the_device(odd, calls):
    handle = odd.connect("memory")
    handle.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
    handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert calls() == [["zero", 0, 4096, False, False], ["zero", 0, 4096, True, True]]


def test_zero_of_almost_4_gib_is_one_call(serve, tmp_path):
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(5 << 30)
        file.seek(4 << 30)
        file.write(b"\1" * MIB)
    handle = serve(ODD_DEVICES, path).connect("file")
    handle.zero((1 << 32) - 65536, 131072)
    assert handle.pread(MIB, 4 << 30) == bytes(65536) + b"\1" * (MIB - 65536)


def test_fast_zero_is_refused_where_zeroes_have_to_be_written(odd):
    handle = odd.connect("hint")
    handle.pwrite(b"\1" * 4096, 0)
    with pytest.raises(nbd.Error) as caught:
        handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert caught.value.errno == "ENOTSUP"
    assert handle.pread(4096, 0) == b"\1" * 4096
    handle.zero(4096, 0)
    assert handle.pread(4096, 0) == bytes(4096)


def test_trim_succeeds_where_the_device_cannot(odd):
    handle = odd.connect("hint")
    handle.pwrite(b"\1" * 4096, 0)
    handle.trim(4096, 0)
    assert handle.pread(4096, 0) == b"\1" * 4096


def test_cache_reads_what_it_is_told(odd):
    handle = odd.connect("memory")
    assert handle.can_cache()
    handle.cache(MIB, 0)


# --- block status ------------------------------------------------------------------------------


def _status(handle, length, offset, flags=0):
    found = []
    handle.block_status(length, offset, lambda _, o, e, err: found.extend(e) or 0, flags)
    return list(zip(found[::2], found[1::2], strict=True))


def test_extents_tell_holes_from_data(odd):
    handle = odd.connect("memory")
    handle.pwrite(b"\1" * 65536, MIB)
    assert _status(handle, 4 * MIB, 0) == [(MIB, 3), (65536, 0), (3 * MIB - 65536, 3)]


def test_extents_are_clipped_to_the_request(odd):
    handle = odd.connect("memory")
    handle.pwrite(b"\1" * 65536, MIB)
    assert _status(handle, MIB, 4096) == [(MIB - 4096, 3), (4096, 0)]


def test_one_extent_is_enough_when_one_is_asked_for(odd):
    handle = odd.connect("memory")
    handle.pwrite(b"\1" * 65536, MIB)
    assert _status(handle, 4 * MIB, 0, nbd.CMD_FLAG_REQ_ONE) == [(MIB, 3)]


def test_extents_of_a_very_fragmented_device_come_in_bounded_answers(odd):
    handle = odd.connect("memory")
    for place in range(0, 200 * MIB, 8192):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(b"\1" * 4096), place)
        while handle.aio_in_flight() > 32:
            handle.poll(-1)
    while handle.aio_in_flight():
        handle.poll(-1)
    first = _status(handle, 200 * MIB, 0)
    assert first == [(4096, 0), (4096, 3)] * 4096


# --- sizes of requests -------------------------------------------------------------------------


def test_block_sizes_are_what_nbd_allows(odd):
    handle = odd.connect("blocks")
    sizes = [
        handle.get_block_size(kind)
        for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
    ]
    assert sizes == [4096, 4096, 65536]


def test_requests_above_the_maximum_of_the_device_are_split(odd):
    handle = odd.connect("blocks")
    data = random.Random(3).randbytes(MIB)
    handle.pwrite(data, 65536)
    assert handle.pread(MIB, 65536) == data


@pytest.mark.parametrize(("offset", "length"), [
    (1, 1), (0, 100), (4095, 2), (4000, 9000), (4096, 4097), (100, 3996), (12288, 8192),
    (5, 300_000), (16 * MIB - 7, 7), (16 * MIB - 5000, 5000),
])  # fmt: skip
def test_unaligned_requests_change_what_they_should_and_nothing_else(odd, offset, length):
    handle = odd.connect("blocks")
    rng = random.Random(offset)
    begin, end = max(offset - 8192, 0), min(offset + length + 8192, 16 * MIB)
    model = bytearray(rng.randbytes(end - begin))
    handle.pwrite(model, begin)
    data = rng.randbytes(length)
    handle.pwrite(data, offset)
    model[offset - begin : offset - begin + length] = data
    assert handle.pread(length, offset) == data
    assert handle.pread(end - begin, begin) == model
    handle.zero(length, offset)
    model[offset - begin : offset - begin + length] = bytes(length)
    assert handle.pread(end - begin, begin) == model
    handle.trim(length, offset)
    outside = handle.pread(offset - begin, begin) if offset > begin else b""
    assert outside == model[: offset - begin]
    assert _status(handle, length, offset)


def test_fast_zero_of_part_of_a_block_is_refused_and_changes_nothing(odd):
    handle = odd.connect("blocks")
    handle.pwrite(b"\1" * 4096, 0)
    with pytest.raises(nbd.Error) as caught:
        handle.zero(100, 50, nbd.CMD_FLAG_FAST_ZERO)
    assert caught.value.errno == "ENOTSUP"
    assert handle.pread(4096, 0) == b"\1" * 4096


# Send writes on several connections at the same moment and wait for all. One thread: libnbd's calls
# hold Python's lock, so threads would send them one after another.
def _write_together(writes):
    for handle, data, offset in writes:
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
    for handle, _, _ in writes:
        while handle.aio_in_flight():
            handle.poll(-1)


def test_writers_of_parts_of_one_block_do_not_lose_each_others_bytes(odd):
    handles = [odd.connect("blocks") for _ in range(8)]
    for turn in range(60):
        parts = [bytes([turn + part * 20 % 256]) * 512 for part in range(8)]
        _write_together(
            [(handle, parts[part], part * 512) for part, handle in enumerate(handles)]
        )
        assert handles[0].pread(4096, 0) == b"".join(parts)


def test_writers_of_whole_blocks_and_of_parts_of_them_do_not_mix(odd):
    """Afterwards the block is the whole write, with or without the part on it."""
    whole, part = odd.connect("blocks"), odd.connect("blocks")
    for turn in range(150):
        writes = [(whole, bytes([turn]) * 4096, 0), (part, b"\xff" * 100, 1000)]
        _write_together(writes[:: (-1) ** turn])
        found = whole.pread(4096, 0)
        assert found[:1000] + found[1100:] == bytes([turn]) * 3996
        assert found[1000:1100] in (b"\xff" * 100, bytes([turn]) * 100)


def test_zeroes_and_trims_do_not_mix_with_writers_of_parts(odd):
    """The rest of a block that a part is written to stays what the zero made of it."""
    zero, part = odd.connect("blocks"), odd.connect("blocks")
    for _ in range(60):
        zero.pwrite(b"\1" * 4096, 0)
        part.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"\xff" * 100)), 1000)
        zero.zero(4096, 0)
        while part.aio_in_flight():
            part.poll(-1)
        found = zero.pread(4096, 0)
        assert found[:1000] + found[1100:] == bytes(3996)


def test_requests_fit_a_device_whose_blocks_have_grown(odd):
    """Connected clients were told that any byte may be written."""
    handles = [odd.connect("turning") for _ in range(2)]
    handles[0].pwrite(b"\1" * 100, 50)
    handles[0].flush()
    for number, handle in enumerate(handles):
        handle.pwrite(b"\2" * 10, 100 + 20 * number)
        handle.zero(5, 100 + 20 * number)
    expected = b"\1" * 50 + (bytes(5) + b"\2" * 5 + b"\1" * 10) + bytes(5) + b"\2" * 5
    assert handles[1].pread(80, 50) == expected
    assert handles[1].pread(MIB, 0)[:50] == bytes(50)


def test_requests_beyond_the_end_of_a_shrunken_device_are_refused(serve, images):
    """A client that is connected keeps the old size."""
    handle = serve(ODD_DEVICES).connect("shrunk")
    size = handle.get_size()
    handle.flush()  # it shrinks to half
    assert handle.get_size() == size
    handle.zero(4096, 0)
    for send, seen in [
        (lambda: handle.zero(4096, size - 4096), "ENOSPC"),
        (lambda: handle.trim(4096, size // 2 - 100), "ENOSPC"),
        (lambda: _status(handle, 4096, size - 4096), "EINVAL"),
    ]:
        with pytest.raises(nbd.Error) as caught:
            send()
        assert caught.value.errno == seen


# --- what an export says of itself -------------------------------------------------------------


def test_flags_say_what_there_is(odd):
    handle = odd.connect("memory")
    assert handle.can_multi_conn() and handle.can_fua() and handle.can_flush()
    assert handle.can_trim() and handle.can_zero() and handle.can_fast_zero()
    assert handle.can_cache() and handle.can_df()
    assert not handle.is_read_only() and not handle.is_rotational()
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def test_default_export_is_used_where_none_is_named(serve):
    server = serve(ODD_DEVICES, "default=hint")
    assert server.connect().get_size() == 256 * MIB


def test_an_export_that_is_not_there_is_refused(odd):
    for name in ("nothing", "", "../memory", "é" * 100):
        with pytest.raises(nbd.Error) as caught:
            odd.connect(name)
        assert caught.value.errno == "ENOENT"
    assert odd.alive()


def test_an_export_name_of_any_bytes_is_refused_and_disturbs_nobody(odd):
    for name in (b"\xff\xfe", b"a\nb", b"x" * 4096, b"%s%n%d"):
        with suppress(EOFError, OSError):
            connect_by_hand(odd.socket, name).close()
    assert odd.connect("memory").get_size() == 256 * MIB
    assert "Traceback" not in odd.log


def test_10000_of_10001_exports_are_listed_and_all_can_be_opened(odd):
    """nbdkit answers a longer list with an error."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(odd.uri())
    found = []
    handle.opt_list(lambda name, description: found.append((name, description)) or 0)
    handle.opt_abort()
    assert found == [(f"many-{number}", f"number {number}") for number in range(10_000)]
    assert odd.connect("many-10000").get_size() == 4096


def test_read_only_server_refuses_writes(serve):
    handle = serve(ODD_DEVICES, options=("-t", "1", "-r")).connect("memory")
    assert handle.is_read_only()
    for send in (
        lambda: handle.pwrite(bytes(512), 0), lambda: handle.zero(512, 0),
        lambda: handle.trim(512, 0),
    ):  # fmt: skip
        with pytest.raises(nbd.Error) as caught:
            send()
        assert caught.value.errno in ("EPERM", "EINVAL")
    assert handle.pread(512, 0) == bytes(512)
