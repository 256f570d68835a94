"""Drive examples/fastapi_service.py over HTTP: `python .ci/drive_service.py [REQUESTS]`.

Fifty clients; once undisturbed, once with a SIGKILL of the server in the middle, once with a
SIGTERM. Whatever was answered with 202 must end as a success, and no recorded success run twice.
"""

import collections
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "fastapi_service.py"
CLIENTS = 50


class Server:
    def __init__(self, db: Path) -> None:
        self.db = db
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        environ = {**os.environ, "LITEFLOW_DB": str(self.db), "PORT": str(self.port)}
        self.process = subprocess.Popen([sys.executable, str(EXAMPLE)], env=environ)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("the server did not start")

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert code in (0, -number), code

    def ask(self, method: str, path: str, document: object = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = None if document is None else json.dumps(document)
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found


def drive(requests: int, number: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "service.db")
        accepted: list[str] = []
        refused = collections.Counter()
        half = threading.Event()

        def one(n: int) -> None:
            if n >= requests // 2:
                half.set()
            try:
                status, found = server.ask("POST", "/reports", {"customer": "x" * (n % 10)})
            except (OSError, http.client.HTTPException) as error:
                refused[type(error).__name__] += 1
                return
            if status == 202:
                accepted.append(found["run_id"])
            else:
                refused[str(status)] += 1

        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            sent = [clients.submit(one, n) for n in range(requests)]
            if number is not None:
                half.wait()
                server.end(number)
                server.start()
            for each in sent:
                each.result()
        answered = time.monotonic() - began
        runs = check(server, accepted, number)
        took = time.monotonic() - began
        server.end(signal.SIGTERM)
        what = "undisturbed" if number is None else signal.Signals(number).name
        print(f"{what}: {len(accepted)} of {requests} accepted in {answered:.1f} s; {runs} runs")
        print(f"    ended after {took:.1f} s, none lost; not answered: {dict(refused) or 'none'}")
        assert number is not None or not refused, refused


def check(server: Server, accepted: list[str], number: int | None) -> int:
    """Wait until all runs have ended; none may be lost, no success may have run twice."""
    deadline = time.monotonic() + 300
    with sqlite3.connect(f"file:{server.db}?mode=ro", uri=True) as db:
        while time.monotonic() < deadline:
            states = dict(db.execute("SELECT run_id, state FROM dag_run").fetchall())
            if set(states.values()) <= {"success", "failed"}:
                break
            time.sleep(0.1)
        bad = {run_id: states.get(run_id) for run_id in accepted if states.get(run_id) != "success"}
        assert not bad, bad
        twice = db.execute(
            "SELECT count(*) FROM (SELECT 1 FROM task_attempt WHERE state = 'success' "
            "GROUP BY task_instance_id HAVING count(*) > 1)"
        ).fetchone()[0]
        again = db.execute("SELECT count(*) FROM task_attempt WHERE try_number > 1").fetchone()[0]
    assert not twice, twice
    assert again <= (2 if number == signal.SIGKILL else 0), again  # one a worker
    return len(states)


if __name__ == "__main__":
    for each in (None, signal.SIGKILL, signal.SIGTERM):
        drive(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, each)
