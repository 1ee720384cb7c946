"""One call on two hosts: two network namespaces joined by a virtual cable (veth), with `torchrun` in each.

    python benchmarks/two_hosts.py

Needs the permission to create network namespaces (`ip netns`), and exits with a message without it.

1. Two processes, one on each host, measure the exact effects of the embedded model's edges. Only the network connects
   them, and each writes to its own folder. Bytes are counted by the first host's interface.
2. The effects must equal those of one process.
3. The call is repeated, and the second host's process is killed: the first reports this and keeps its measurements, and
   one process continues from them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import circuitfind as cf

HOSTS = ("circuitfind-1", "circuitfind-2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
VERB = ("attribute", "tiny", "--method", "exact", "--n", "16")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces, each with its end of a cable."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable-1", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable-2", "netns", HOSTS[1])
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True), start=1):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", f"cable-{number}")
            ip("-n", host, "link", "set", f"cable-{number}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def start(number: int, folder: Path, port: int) -> subprocess.Popen[str]:
    """`torchrun` on a host."""
    words = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", str(port)]
    words += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{port}", "--rdzv-conf", f"is_host={int(not number)}"]
    words += ["--local-addr", ADDRESSES[number]]
    words[0] = str(Path(sys.executable).with_name("torchrun"))
    words += ["-m", "--", "circuitfind", *VERB, "--out", str(folder / f"host{number + 1}")]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": f"cable-{number + 1}", "OMP_NUM_THREADS": "1"}
    inside = ["ip", "netns", "exec", HOSTS[number], *words]
    out = (folder / f"said{number + 1}").open("w")
    return subprocess.Popen(inside, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)


def sent() -> int:
    """Bytes through the first host's end of the cable, both ways."""
    names = [f"/sys/class/net/cable-1/statistics/{way}_bytes" for way in ("rx", "tx")]
    found = subprocess.run(["ip", "netns", "exec", HOSTS[0], "cat", *names], check=True, capture_output=True, text=True)
    return sum(map(int, found.stdout.split()))


def rank_of(host: int) -> int:
    """The process number of a host's rank."""
    found = subprocess.run(["ip", "netns", "pids", HOSTS[host]], check=True, capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise SystemExit("no rank runs there")


def alone(folder: Path) -> dict[str, float]:
    """One process, no network."""
    subprocess.run(
        [sys.executable, "-m", "circuitfind", *VERB, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL
    )
    return cf.Scores.open(folder / "scores.safetensors").to_dict()


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with two_hosts():
            before, wall = sent(), time.monotonic()
            codes = [one.wait() for one in [start(number, folder, 29401) for number in range(2)]]
            print(f"two hosts: exit codes {codes}, {time.monotonic() - wall:.0f} s, {sent() - before:,} bytes")
            two = cf.Scores.open(folder / "host1" / "scores.safetensors").to_dict()
            one = alone(folder / "one")
            off = np.abs(np.array([two[name] - one[name] for name in one])).max()
            print(f"largest difference from one process: {off:.1g}")
            (folder / "host1" / "scores.safetensors").unlink()
            both = [start(number, folder, 29402) for number in range(2)]
            while "method" not in (folder / "said1").read_text():
                time.sleep(0.2)
            time.sleep(1)
            os.kill(rank_of(1), signal.SIGKILL)
            codes = [one.wait() for one in both]
            lines = (folder / "said1").read_text().splitlines()
            said = next(line for line in lines if line.startswith(("error", "stopped")))
            print(f"a rank killed: exit codes {codes}; the first host says: {said}")
            print("one process goes on:", "the same" if alone(folder / "host1") == one else "NOT the same")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise SystemExit(f"no network namespaces here: {error}") from None


if __name__ == "__main__":
    main()
