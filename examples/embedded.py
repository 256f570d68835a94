"""A larger program with liteflow inside: threads, asyncio, an HTTP endpoint, and an orderly end.

    python3 examples/embedded.py                 serves on a free port, uses itself, and ends
    python3 examples/embedded.py --runs 1000     and checks that so many runs leave nothing behind

The program starts a DAG's run in a thread and answers with its id at once; anybody can ask for its
state later. One `WorkerPool` serves all runs. At shutdown the runs are stopped; at start-up those
that were cut off are resumed.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import threading
import urllib.request
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, AirflowException, DagRun, WorkerPool, task

DB = os.environ.get("LITEFLOW_DB", "embedded.db")

with DAG("report", params={"customer": "nobody"}) as dag:

    @task
    def collect(params) -> list[int]:
        print("collecting for", params["customer"])
        return [len(params["customer"]), 2, 3]

    @task
    def add_up(numbers: list[int]) -> int:
        return sum(numbers)

    add_up(collect())


def warm_up(name: str) -> None:
    """Runs in each worker before the DAG's module is imported: `django.setup()`, say."""
    os.environ["WARM"] = name


class Reports:
    """Starts runs in threads of its own, and knows how to end them."""

    def __init__(self, threads: int = 4) -> None:
        self.pool = WorkerPool(2, initializer=warm_up, initargs=("embedded",))
        self.threads = ThreadPoolExecutor(threads)
        self.stop = threading.Event()

    def start(self, customer: str) -> str:
        """Start a run; its id, at once."""
        run_id = f"report-{uuid.uuid4()}"
        self._submit(run_id=run_id, conf={"customer": customer})
        return run_id

    def _submit(self, **options) -> "Future[DagRun]":
        return self.threads.submit(
            dag.run, db_path=DB, executor=self.pool, stop=self.stop, **options
        )

    def resume_all(self) -> int:
        """At start-up: go on with what was cut off; how many runs that were."""
        try:
            runs = dag.runs(DB)
        except AirflowException:  # there is no database yet
            return 0
        cut_off = [run for run in runs if run.state != "success" and not run.owner_alive]
        for run in cut_off:
            self._submit(run_id=run.run_id, resume=True)
        return len(cut_off)

    def close(self) -> None:
        """At shutdown: stop what runs; it can be resumed."""
        self.stop.set()
        self.threads.shutdown()
        self.pool.shutdown()


def handler_for(reports: Reports) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            customer = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.answer(202, {"run_id": reports.start(customer)})

        def do_GET(self) -> None:
            try:
                run = dag.get_run(self.path.strip("/"), DB)
            except AirflowException as error:
                self.answer(404, {"error": str(error)})
                return
            self.answer(200, {"state": run.state, "total": run.xcom_pull("add_up")})

        def answer(self, code: int, document: dict) -> None:
            body = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    return Handler


def over_http(reports: Reports) -> int:
    """What a client sees: it starts a report, and asks until it is there; the total."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(reports))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        at = f"http://127.0.0.1:{server.server_port}/"
        with urllib.request.urlopen(at, data=b"somebody") as answer:
            run_id = json.load(answer)["run_id"]
        while True:
            try:
                with urllib.request.urlopen(at + run_id) as answer:
                    found = json.load(answer)
            except urllib.error.HTTPError as error:  # it has not begun yet
                error.close()
                continue
            if found["state"] == "success":
                return found["total"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def from_asyncio(reports: Reports, count: int) -> list[int]:
    """Several runs at a time, beside whatever else the event loop does."""
    runs = await asyncio.gather(
        *(
            asyncio.to_thread(
                dag.run, db_path=DB, executor=reports.pool, conf={"customer": "x" * i}
            )
            for i in range(count)
        )
    )
    return [run.xcom_pull("add_up") for run in runs]


def with_progress(reports: Reports) -> list[str]:
    """Progress by a callback; the `liteflow` logger tells the same."""
    lines: list[str] = []
    dag.run(db_path=DB, executor=reports.pool, progress=lines.append)
    return lines


def traces() -> tuple[object, ...]:
    """What a run must not leave in its host."""
    descriptors = Path("/proc/self/fd")
    return (
        threading.active_count(),
        len(list(descriptors.iterdir())) if descriptors.exists() else 0,
        [type(handler) for handler in logging.root.handlers],
        logging.root.level,
        os.getcwd(),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    options = parser.parse_args()
    reports = Reports()
    print("resumed:", reports.resume_all())
    print("over HTTP:", over_http(reports))
    print("from asyncio:", asyncio.run(from_asyncio(reports, 4)))
    print("progress:", len(with_progress(reports)), "lines")
    before = traces()
    for _ in range(options.runs):
        assert dag.run(db_path=DB, executor=reports.pool).state == "success"
    assert traces() == before, (before, traces())
    print(f"{options.runs} runs left nothing behind")
    reports.close()
    assert threading.active_count() == 1, threading.enumerate()


if __name__ == "__main__":
    main()
