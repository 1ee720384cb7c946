"""Starts NDIF's own services on loopback, on CPUs, deploys models and waits; run by the Python that `setup.sh` makes.

Redis, an S3 store (moto), Ray with the controller, and the API, as `ndif start` starts them but bound to 127.0.0.1.
Arguments: the API's port, then folders of models, as "bfloat16:FOLDER" in that precision. Writes "ready" when all are
deployed, and ends when its input does (the test gives it a PID namespace, so what it started ends with it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
LOGS = Path("/srv/logs")
REDIS, STORE, HEAD, CLIENT = 26379, 29000, 26385, 20001
ENVIRONMENT = {
    "PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(HERE),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "NDIF_REDIS_URL": f"redis://127.0.0.1:{REDIS}",
    "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{STORE}",
    "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{CLIENT}",
    "NDIF_SANDBOX_POOL_SIZE": "1",
    "NDIF_MODEL_IMPORT_PATH": "cpu_actor.CPUModelActor",
    "NDIF_DEFAULT_DTYPE": "float32",
    "NDIF_DEFAULT_PADDING_BIAS": "0",
}
# Results over 8 kB go through the store, so that small models show that way, too (by default those over 8 MB do).
LIMIT = "pubsub 65536 8192 60"


def background(name: str, *command: str) -> None:
    log = (LOGS / f"{name}.log").open("w")
    subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def answers(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise SystemExit(f"{url} does not answer: {error}; see {LOGS}") from None
            time.sleep(1)


def main() -> None:
    port, folders = int(sys.argv[1]), sys.argv[2:]
    LOGS.mkdir(exist_ok=True)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    background(
        "redis", "redis-server", "--port", str(REDIS), "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp",
        "--client-output-buffer-limit", LIMIT,
    )  # fmt: skip
    background("store", str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(STORE))
    resources = json.dumps({"head": 10, "cuda_memory_bytes": 2**33, "cpu_memory_bytes": 2**32})  # CPUs as one device
    subprocess.run(
        [
            str(BIN / "ray"), "start", "--head", f"--port={HEAD}", "--node-ip-address=127.0.0.1", "--num-cpus=8",
            "--num-gpus=1", f"--resources={resources}", "--object-store-memory=200000000",
            f"--ray-client-server-port={CLIENT}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", "--dashboard-port=28265", "--disable-usage-stats",
        ],
        check=True, stdout=(LOGS / "ray.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    controller = [sys.executable, "-m", "ndif.services.ray.deployments.controller.controller"]
    ray = {**ENVIRONMENT, "RAY_ADDRESS": f"127.0.0.1:{HEAD}"}
    subprocess.run(
        controller, env=ray, check=True, stdout=(LOGS / "controller.log").open("w"), stderr=subprocess.STDOUT
    )
    bound = ["--bind", f"127.0.0.1:{port}"]
    api = ["--config", "python:ndif.services.api.gunicorn_conf", *bound, "ndif.services.api.app:app"]
    background("api", str(BIN / "gunicorn"), *api)
    answers(f"http://127.0.0.1:{port}/ping", 60)
    answers(f"http://127.0.0.1:{port}/connected", 120)

    from ndif.cli.lib.deploy import deploy  # connects to Redis when imported

    specs = []
    for given in folders:
        dtype, _, folder = given.rpartition(":")
        suffix = json.dumps({"repo_id": folder, "revision": None, "task": "text-generation"})
        key = f"nnsight.modeling.transformers.TransformersModel:{suffix}"
        specs.append(
            {"checkpoint": folder, "model_key": key, "size_bytes": 2**28, "pinned": True, "dtype": dtype or None}
        )
    done = deploy(specs, ray_address=ENVIRONMENT["NDIF_RAY_ADDRESS"])
    if any(entry["status"] != "READY" for entry in done["deployments"]):
        raise SystemExit(json.dumps(done))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()  # until the test ends


if __name__ == "__main__":
    main()
