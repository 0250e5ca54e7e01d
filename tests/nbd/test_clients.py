"""Other people's clients, on a striped device over files: each does what it does best."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys

import pytest

from tests import needs
from tests.nbd.conftest import MIB, ODD_DEVICES
from tests.nbd.hangup import connect as connect_by_hand

pytest.importorskip("nbd", reason="the Python module nbd is missing (package python3-libnbd)")
import nbd


@pytest.fixture
def striped(serve, images):
    """A device striped over two files."""
    return serve("striped.py", "chunk=64K", *images(16 * MIB, 16 * MIB))


# Put random bytes in places of a new file, and leave holes between them.
def _reference(path, size=32 * MIB, seed=5):
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(40):
            file.seek(rng.randrange(size - 200_000) & ~4095)
            file.write(rng.randbytes(rng.randrange(1, 50) * 4096))
    return path


# --- libnbd's tools ----------------------------------------------------------------------------


def test_nbdinfo_describes_the_export(striped, run):
    info = json.loads(run("nbdinfo", "--json", striped.uri()))
    (export,) = info["exports"]
    assert export["export-name"] == "striped"
    assert export["export-size"] == 32 * MIB
    assert re.fullmatch(r"0 65536 striped 2 128 /\S+/a.img 0 /\S+/b.img 0", export["description"])
    assert export["can_multi_conn"] and export["can_fua"] and export["can_fast_zero"]
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_every_export_by_name(serve, run):
    table = "table=0 2048 zero"
    output = run("nbdinfo", "--list", "--json", serve("table.py", table, "name=a b").uri())
    (export,) = json.loads(output)["exports"]
    assert export["export-name"] == "a b"
    assert export["description"] == "0 2048 zero"


def test_nbdinfo_maps_data_and_holes(striped, run):
    """One chunk of data: 64 KiB on the second file."""
    striped.connect().pwrite(b"\1" * 65536, 64 * 1024 * 3)
    output = run("nbdinfo", "--map", "--json", striped.uri())
    found = [(part["offset"], part["length"], part["type"]) for part in json.loads(output)]
    assert found == [
        (0, 196608, 3), (196608, 65536, 0), (262144, 32 * MIB - 262144, 3)
    ]  # fmt: skip


def test_nbdcopy_both_ways_gives_the_same_bytes(striped, run, tmp_path):
    source, back = _reference(tmp_path / "source"), tmp_path / "back"
    run("nbdcopy", "--connections=4", source, striped.uri())
    run("nbdcopy", "--connections=4", "--request-size=65536", striped.uri(), back)
    assert back.read_bytes() == source.read_bytes()
    assert back.stat().st_blocks <= source.stat().st_blocks + 512, "holes were filled"


def test_nbdcopy_from_one_export_to_another(serve, images, run, tmp_path):
    source = _reference(tmp_path / "source", 8 * MIB)
    one = serve("linear.py", source, options=("-t", "1", "-r"))
    other = serve("linear.py", *images(3 * MIB, 5 * MIB))
    run("nbdcopy", one.uri(), other.uri())
    run("nbdcopy", "--synchronous", other.uri(), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


# --- QEMU's tools ------------------------------------------------------------------------------


def test_qemu_img_map_agrees_with_nbdinfo(striped, run):
    striped.connect().pwrite(b"\1" * 65536, 64 * 1024 * 3)
    options = f"driver=nbd,server.type=unix,server.path={striped.socket}"
    output = run("qemu-img", "map", "--output=json", "--image-opts", options)
    found = [(part["start"], part["length"], part["data"]) for part in json.loads(output)]
    assert found == [
        (0, 196608, False), (196608, 65536, True), (262144, 32 * MIB - 262144, False)
    ]  # fmt: skip


def test_qemu_img_convert_and_compare(striped, run, tmp_path):
    source = _reference(tmp_path / "source")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, striped.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, striped.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", striped.uri(), tmp_path / "q.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "q.qcow2", striped.uri())


def test_qemu_io_patterns(striped, run):
    commands = [
        "write -P 0x5a 4096 200k", "read -P 0x5a 4096 200k", "write -P 0x11 5001 777",
        "read -P 0x11 5001 777", "read -P 0x5a 5778 300", "write -z 65536 65536",
        "read -P 0 65536 65536", "write -z -u 131072 4096", "read -P 0 131072 4096",
        "discard 0 4096", "write -f -P 0x77 1M 1M", "read -P 0x77 1M 1M", "flush",
    ]  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *words, striped.uri())
    assert "verification failed" not in output


# --- fio ---------------------------------------------------------------------------------------


def test_fio_verifies_with_4_connections(striped, fio):
    fio(striped.uri(), "--rw=randrw", "--numjobs=4", "--size=8M", "--offset_increment=8M")


def test_fio_verifies_trims_and_flushes(striped, fio):
    fio(striped.uri(), "--rw=randwrite", "--size=16M", "--fsync=16")


# --- many connections --------------------------------------------------------------------------


def test_200_connections_leave_no_memory_and_no_threads(striped):
    """As in the pitfalls, through a mapped device: its openers are counted out again."""

    def connections(count):
        for _ in range(count):
            connect_by_hand(striped.socket, b"striped").close()

    connections(50)
    before, threads_before = striped.memory()
    connections(200)
    after, threads_after = striped.memory()
    assert after - before < 200
    assert threads_after <= threads_before + 1  # the last one may be about to end


def test_100_clients_at_once(striped):
    handles = [striped.connect() for _ in range(100)]
    for number, handle in enumerate(handles):
        handle.pwrite(bytes([number]) * 4096, number * 4096)
    handles[0].flush()
    for number, handle in enumerate(reversed(handles)):
        assert handle.pread(4096, number * 4096) == bytes([number]) * 4096
    del handles, handle
    assert striped.stop() == 0


# --- TLS ---------------------------------------------------------------------------------------


def test_tls_with_a_shared_key(serve, run, folder):
    needs.tool("psktool", package="gnutls-bin")
    keys = os.path.join(folder, "keys.psk")
    run("psktool", "-u", "alice", "-p", keys)
    os.chmod(keys, 0o600)
    server = serve(ODD_DEVICES, options=("-t", "1", "--tls=require", f"--tls-psk={keys}"))
    uri = f"nbds+unix://alice@/memory?socket={server.socket}&tls-psk-file={keys}"
    info = json.loads(run("nbdinfo", "--json", uri))
    assert info["TLS"] and info["exports"][0]["export-size"] == 256 * MIB
    run("nbdinfo", server.uri("memory"), status=1)
    idle = nbd.NBD()
    idle.set_uri_allow_local_file(True)
    idle.connect_uri(uri)
    assert idle.pread(512, 0) == bytes(512)
    assert server.stop() == 0


def test_tls_with_certificates_over_loopback(run, folder):
    """TCP on loopback; a client without a certificate is refused."""
    certificates = _certificates(run, folder)
    command = [
        needs.tool("nbdkit"), "-f", "-t", "1", "-i", "127.0.0.1", "-p", "0",
        "--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer", "python",
        ODD_DEVICES,
    ]  # fmt: skip
    with _free_port_server(command) as port:
        with_certificate = f"nbds://localhost:{port}/memory?tls-certificates={certificates}"
        assert run("nbdinfo", "--size", with_certificate).strip() == str(256 * MIB)
        alone = os.path.join(folder, "alone")
        os.mkdir(alone)
        os.link(os.path.join(certificates, "ca-cert.pem"), os.path.join(alone, "ca-cert.pem"))
        without = f"nbds://localhost:{port}/memory?tls-certificates={alone}"
        run("nbdinfo", "--size", without, status=1)


# nbdkit does not tell the port that it chose for 0, so listen for it and pass the socket on.
class _free_port_server:
    def __init__(self, command):
        self._command = [
            word for place, word in enumerate(command)
            if word not in ("-i", "-p") and command[place - 1] not in ("-i", "-p")
        ]  # fmt: skip

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        fd = self._listener.fileno()
        # systemd's protocol: descriptor 3, and the process' own id in LISTEN_PID.
        become = (
            "import os, sys\n"
            "os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        words = [sys.executable, "-c", become, str(fd), *map(str, self._command)]
        self._process = subprocess.Popen(words, pass_fds=[fd])
        return self._listener.getsockname()[1]

    def __exit__(self, *_):
        self._process.terminate()
        assert self._process.wait(20) == 0
        self._listener.close()


# A certificate authority, and certificates of a server and a client, as nbdkit wants them.
def _certificates(run, folder):
    place = os.path.join(folder, "pki")
    os.mkdir(place)
    days = ("-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    ca = (f"{place}/ca-key.pem", f"{place}/ca-cert.pem")
    run("openssl", "req", "-x509", *days, "-subj", "/CN=ca", "-keyout", ca[0], "-out", ca[1])
    for kind in ("server", "client"):
        key, cert = f"{place}/{kind}-key.pem", f"{place}/{kind}-cert.pem"
        run(
            "openssl", "req", "-x509", *days, "-subj", "/CN=localhost", "-CA", ca[1], "-CAkey",
            ca[0], "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext",
            "basicConstraints=critical,CA:FALSE", "-keyout", key, "-out", cert,
        )  # fmt: skip
    return place
