"""A larger program with liteflow inside: an HTTP endpoint, asyncio, and an orderly end.

    python3 examples/embedded.py                 serves on a free port, uses itself, and ends
    python3 examples/embedded.py --runs 1000     and checks that so many runs leave nothing behind

One `WorkerPool` runs all: `submit` records a run before it returns, and `recover` goes on, at
start-up, with those that an earlier process has left.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, RunNotFound, WorkerPool, task

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


def warm_up(name: str) -> None:
    """Runs in each worker before the DAG's module is imported: `django.setup()`, say."""
    os.environ["WARM"] = name


class Handler(BaseHTTPRequestHandler):
    """POST a customer, and GET what became of the report."""

    pool: WorkerPool

    def do_POST(self) -> None:
        customer = self.rfile.read(int(self.headers["Content-Length"])).decode()
        future = self.pool.submit(dag, conf={"customer": customer})
        self.answer(202, {"run_id": future.run_id})

    def do_GET(self) -> None:
        try:
            run = dag.get_run(urllib.request.unquote(self.path.strip("/")))
        except RunNotFound as error:
            return self.answer(404, {"error": str(error)})
        total = run.xcom_pull("add_up") if run.state == "success" else None
        return self.answer(200, {"state": run.state, "reason": run.reason, "total": total})

    def answer(self, code: int, document: dict) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """No word."""


def over_http(server: ThreadingHTTPServer) -> int:
    """What a client sees: it starts a report, and asks until it is there; the total."""
    at = f"http://127.0.0.1:{server.server_port}/"
    with urllib.request.urlopen(at, data=b"somebody") as answer:
        run_id = urllib.request.quote(json.load(answer)["run_id"])
    while True:
        with urllib.request.urlopen(at + run_id) as answer:
            found = json.load(answer)
        if found["state"] == "success":
            return found["total"]


async def from_asyncio(pool: WorkerPool, count: int) -> list[int]:
    """Several runs at a time, beside whatever else the event loop does; a waiter that is cancelled
    does not cancel the run."""
    futures = [pool.submit(dag, conf={"customer": "x" * i}) for i in range(count)]
    runs = await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(f)) for f in futures))
    return [run.raise_if_failed().xcom_pull("add_up") for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    options = parser.parse_args()
    with WorkerPool(2, initializer=warm_up, initargs=("embedded",)) as Handler.pool:
        print("recovered:", len(Handler.pool.recover(dag)))
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever).start()
            print("over HTTP:", over_http(server))
            server.shutdown()
        print("from asyncio:", asyncio.run(from_asyncio(Handler.pool, 4)))
        for _ in range(options.runs):
            assert Handler.pool.submit(dag).result().state == "success"
    assert threading.active_count() == 1, threading.enumerate()
    print(f"{options.runs} runs left nothing behind")


if __name__ == "__main__":
    main()
