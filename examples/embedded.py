"""A larger program with liteflow inside: an HTTP endpoint, asyncio, and an orderly end.

    python3 examples/embedded.py                 serves on a free port, uses itself, and ends
    python3 examples/embedded.py --runs 1000     and checks that so many runs leave nothing behind

One `WorkerPool` runs everything. `submit` records a run before it returns. At start-up, `recover`
goes on with the runs that an earlier process has left.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, WorkerPool, task

with DAG("report", params={"customer": "nobody"}) as dag:

    @task
    def collect(params) -> list[int]:
        print("collecting for", params["customer"])
        return [len(params["customer"]), 2, 3]

    @task
    def add_up(numbers: list[int]) -> int:
        return sum(numbers)

    add_up(collect())

dag.db_path = os.environ.get("LITEFLOW_DB", "embedded.db")


class Handler(BaseHTTPRequestHandler):
    """POST a customer, and GET what became of the report."""

    pool: WorkerPool

    def do_POST(self) -> None:
        customer = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(202, run_id=self.pool.submit(dag, conf={"customer": customer}).run_id)

    def do_GET(self) -> None:
        run = dag.get_run(unquote(self.path.strip("/")))
        total = run.xcom_pull("add_up") if run.state == "success" else None
        self.answer(200, state=run.state, reason=run.reason, total=total)

    def answer(self, code: int, **document) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *args) -> None: ...


def over_http(server: ThreadingHTTPServer) -> int:
    """What a client sees: it starts a report, and asks until it is there; the total."""
    at = f"http://127.0.0.1:{server.server_port}/"
    with urlopen(at, data=b"somebody") as answer:
        run_id = quote(json.load(answer)["run_id"])
    while True:
        with urlopen(at + run_id) as answer:
            found = json.load(answer)
        if found["state"] not in ("queued", "running"):
            assert found["state"] == "success", found
            return found["total"]
        time.sleep(0.01)


async def from_asyncio(pool: WorkerPool, count: int) -> list[int]:
    """Several runs at a time; a waiter that is cancelled does not cancel its run."""
    futures = [pool.submit(dag, conf={"customer": "x" * i}) for i in range(count)]
    runs = await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(f)) for f in futures))
    return [run.raise_if_failed().xcom_pull("add_up") for run in runs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    count = parser.parse_args().runs
    with WorkerPool(2) as Handler.pool:  # initializer=django.setup, say
        print("recovered:", len(Handler.pool.recover(dag)))
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                print("over HTTP:", over_http(server))
            finally:
                server.shutdown()
        print("from asyncio:", asyncio.run(from_asyncio(Handler.pool, 4)))
        assert {Handler.pool.submit(dag).result().state for _ in range(count)} <= {"success"}
    assert threading.active_count() == 1, threading.enumerate()
    print(f"{count} runs left nothing behind")
