"""A stand-in for an NDIF server, speaking nnsight's protocol, in a process without circuitfind.

`tests/ndif` runs NDIF's own server; what that showed is kept here, so that the default tests show it, too.

1. `/subscribe` is a websocket: the first message names the session, later ones are the job's states.
2. `POST /request` brings the envelope and the job; the answer is RECEIVED, what follows goes to the session's socket.
3. The job runs on a thread of its own beside the weights, which need no gradients; with `--sandbox` beside no
   modules at all, as NDIF 0.1.2 does for a key that is not trusted.

Prints its port on a line of its own. Arguments: the model's folder, and `--sandbox`.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import traceback
from importlib.abc import MetaPathFinder
from typing import Any

import nnsight
import torch
import tornado.httpserver
import tornado.web
import tornado.websocket
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.tracer import _saves, dec, inc
from tornado.netutil import bind_sockets
from transformers import AutoTokenizer


class Absent(MetaPathFinder):
    """circuitfind is not installed here, nor is what it uses for pictures: NDIF's packages do not need them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in ("circuitfind", "graphviz", "plotly"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


SOCKETS: dict[str, Any] = {}


class Subscribe(tornado.websocket.WebSocketHandler):
    def open(self, *_: str) -> None:
        name = f"session-{len(SOCKETS)}"
        SOCKETS[name] = self
        self.write_message(json.dumps({"session_id": name}))


class Request(tornado.web.RequestHandler):
    def initialize(self, model: Any) -> None:
        self.model = model

    async def post(self) -> None:
        asked = RequestModel.model_validate_json(self.get_body_argument("data"))
        if "TransformersModel" not in asked.model_key:
            raise tornado.web.HTTPError(400)
        socket, job = SOCKETS[asked.session_id], self.request.files["blob"][0]["body"]
        self.finish(ResponseModel(id="job", status=Status.RECEIVED).model_dump_json())
        await socket.write_message(ResponseModel(id="job", status=Status.RUNNING).model_dump_json())
        try:
            done = ResponseModel(
                id="job",
                status=Status.COMPLETED,
                data=await asyncio.to_thread(carried_out, self.model, job, asked.compress),
            )
            await socket.write_message(done.pickle(), binary=True)
        except Exception:
            failed = ResponseModel(id="job", status=Status.ERROR, description=traceback.format_exc())
            await socket.write_message(failed.model_dump_json())


def carried_out(model: Any, job: bytes, compress: bool) -> bytes:
    """Rebuilds the traced block, runs it, and packs what it saved."""
    known = model._remoteable_persistent_objects()
    if "--sandbox" in sys.argv:
        known = {name: None if name.startswith("Module:") else value for name, value in known.items()}
    tracer = RequestModel.deserialize(job, known, compress=compress)
    inc()
    try:
        tracer.execute(tracer.info.code)
        kept = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()
    assert not any(name.partition(".")[0] == "circuitfind" for name in sys.modules), "the job left something behind"
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue()) if compress else buffer.getvalue()


async def main() -> None:
    sys.meta_path.insert(0, Absent())
    torch.set_num_threads(1)
    folder = sys.argv[1]
    model = nnsight.TransformersModel(
        folder,
        task="text-generation",
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dispatch="--sandbox" not in sys.argv,
    )
    model._module.requires_grad_(False)
    handlers = [("/subscribe", Subscribe), ("/request", Request, {"model": model})]
    sockets = bind_sockets(0, "127.0.0.1")
    tornado.httpserver.HTTPServer(tornado.web.Application(handlers), max_body_size=2**28).add_sockets(sockets)
    sys.stdout.write(f"{sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
