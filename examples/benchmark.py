"""How fast liteflow is, beside a bare process pool that makes the same calls and stores nothing.

    python3 examples/benchmark.py              a Markdown table, in under two minutes
    python3 examples/benchmark.py --only wide --only chain
    python3 examples/benchmark.py --json       for a program

Both sides take turns in one run. What counts is the ratio of their medians, as the times depend on
the machine. liteflow runs with its defaults and stores everything. Small runs on warm workers share
one file, as in a program; every other run gets a new file. Each result is checked, and the bytecode
of both sides is cached before.
"""

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import complex_workflow as layered

from liteflow import DAG, WorkerPool, task

WIDE, CHAIN, HOPS, PAYLOAD = 2000, 500, 5, 20_000_000
METHODS = ("forkserver", "fork") if sys.platform != "win32" else ("spawn",)


# The work, plain and as DAGs.


def noop() -> None:
    """Does nothing: its cost is the way to a worker and back."""


def add_one(x: int) -> int:
    return x + 1


def grow(data: bytes) -> bytes:
    return data[:-1] + b"!"


def large() -> bytes:
    return bytes(PAYLOAD)


with DAG("wide") as wide:
    for i in range(WIDE):
        task(task_id=f"noop_{i}")(noop)()

with DAG("chain") as chain:
    link = task(task_id="link_0")(add_one)(0)
    for i in range(1, CHAIN):
        link = task(task_id=f"link_{i}")(add_one)(link)

with DAG("payload") as payload:
    hop = task(large)()
    for i in range(1, HOPS):
        hop = task(task_id=f"hop_{i}")(grow)(hop)

with DAG("again") as again:
    task(task_id="a")(noop)() >> task(task_id="b")(noop)()

with DAG("hundred") as hundred:
    for i in range(100):
        task(task_id=f"noop_{i}")(noop)()


def plain_wide(pool: ProcessPoolExecutor) -> None:
    for future in [pool.submit(noop) for _ in range(WIDE)]:
        future.result()


def plain_chain(pool: ProcessPoolExecutor) -> None:
    value = 0
    for _ in range(CHAIN):
        value = pool.submit(add_one, value).result()
    assert value == CHAIN


def plain_payload(pool: ProcessPoolExecutor) -> None:
    data = pool.submit(large).result()
    for _ in range(1, HOPS):
        data = pool.submit(grow, data).result()
    assert len(data) == PAYLOAD and data[-1:] == b"!"


def plain_layered(pool: ProcessPoolExecutor) -> None:
    """The 171 calls of complex_workflow.py, each as soon as its arguments are there."""
    generators, processors = layered.GENERATORS, layered.PROCESSORS
    done: dict[tuple[str, int], object] = {}
    running = {pool.submit(layered.numbers, i): ("g", i) for i in range(generators)}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            kind, i = running.pop(future)
            done[kind, i] = future.result()
            if kind == "g":
                for k in range(i, processors, generators):
                    running[pool.submit(layered.scaled, done[kind, i], k)] = ("p", k)
            elif kind == "p" and ("p", i ^ 1) in done:
                pair = [done["p", i & ~1], done["p", i | 1]]
                running[pool.submit(sum, pair)] = ("c", i // 2)
    totals = [value for (kind, _), value in done.items() if kind == "c"]
    assert pool.submit(sum, totals).result() == layered.expected_total()


# Whole programs, as a user writes them.

POOL_HEAD = f"""\
import multiprocessing, sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "examples")!r}]
def a(): pass
def b(): pass
"""
FLOW_HEAD = f"""\
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "examples")!r}]
from liteflow import DAG, WorkerPool, task
"""
PROGRAMS = {
    "start_limit": POOL_HEAD
    + """
if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1] or None)) as pool:
        pool.submit(a).result()
        pool.submit(b).result()
""",
    "start_liteflow": FLOW_HEAD
    + """
with DAG("start") as dag:
    @task
    def a(): pass
    @task
    def b(): pass
    a() >> b()
if __name__ == "__main__":
    assert dag.run(db_path=sys.argv[1], max_workers=2).state == "success"
""",
    "heavy": "import time; time.sleep(0.5)",
    "cold_wide_limit": POOL_HEAD
    + f"""
if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1])) as pool:
        for future in [pool.submit(a) for _ in range({WIDE})]:
            future.result()
""",
    "cold_wide_liteflow": FLOW_HEAD
    + f"""
def a(): pass
with DAG("wide") as dag:
    for i in range({WIDE}):
        task(task_id=f"noop_{{i}}")(a)()
if __name__ == "__main__":
    assert dag.run(db_path=sys.argv[1], max_workers=2).state == "success"
""",
    "cold_layered_limit": POOL_HEAD
    + """
if __name__ == "__main__":
    import complex_workflow as layered
    generators, processors = layered.GENERATORS, layered.PROCESSORS
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1])) as pool:
        made = [pool.submit(layered.numbers, i) for i in range(generators)]
        made = [future.result() for future in made]
        done = [pool.submit(layered.scaled, made[i % generators], i) for i in range(processors)]
        done = [future.result() for future in done]
        pairs = [pool.submit(sum, done[i : i + 2]) for i in range(0, processors, 2)]
        total = pool.submit(sum, [future.result() for future in pairs]).result()
    assert total == layered.expected_total()
""",
    "cold_layered_liteflow": FLOW_HEAD
    + """
import complex_workflow as layered
if __name__ == "__main__":
    run = layered.dag.run(db_path=sys.argv[1], max_workers=2)
    assert run.xcom_pull("summarize") == layered.expected_total()
""",
    "scale": FLOW_HEAD
    + """
import json, os, resource, time
@task
def noop(): pass
@task
def one(): return 1
@task
def add(x, y): return x + y
@task
def double(x): return 2 * x
def wide(n):
    for i in range(n): noop.override(task_id=f"t{i}")()
def layers(n):
    width = 100 if n <= 1000 else 1000
    row = [one.override(task_id=f"t0_{i}")() for i in range(width)]
    for k in range(1, n // width):
        row = [add.override(task_id=f"t{k}_{i}")(row[i], row[i - 1]) for i in range(width)]
def mapped(n):
    for k in range(0, n, 1000):
        double.override(task_id=f"d{k}").expand(x=list(range(k, k + 1000)))
shape, n, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if __name__ == "__main__":
    with WorkerPool(2) as pool:
        with DAG("warm") as dag: wide(50)
        dag.run(db_path=path + "-warm", executor=pool)
        with DAG("scale") as dag:
            if n: {"wide": wide, "layers": layers, "mapped": mapped}[shape](n)
        start = time.perf_counter()
        run = dag.run(db_path=path, executor=pool)
        took = time.perf_counter() - start
    assert run.state == "success"
    # ru_maxrss may be the parent's, from before this program was loaded.
    status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if "VmHWM:" in status: peak = int(status.partition("VmHWM:")[2].split()[0])
    peak *= 1024
    print(json.dumps({"seconds": took, "peak": peak, "bytes": os.path.getsize(path)}))
""",
    "log_limit": """
import os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdout = open(1, "w", 1, closefd=False)
for i in range(100_000): print("line", i)
""",
}


class Bench:
    """What the workloads share: warm workers on both sides, and a folder for databases."""

    def __init__(self, rounds: int) -> None:
        import multiprocessing

        self.rounds = rounds
        self.folder = Path(tempfile.mkdtemp(prefix="liteflow-bench-", dir=Path.cwd()))
        self.files = 0
        self.plain = ProcessPoolExecutor(2, multiprocessing.get_context(METHODS[0]))
        self.pool = WorkerPool(2)
        list(self.plain.map(abs, range(100)))
        self.run(hundred)
        for name, text in PROGRAMS.items():
            (self.folder / f"{name}.py").write_text(text)
        for name in ("limit", "liteflow"):
            text = "import heavy\n" + PROGRAMS[f"start_{name}"]
            (self.folder / f"heavy_{name}.py").write_text(text)
        self.environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.environ["PYTHONPYCACHEPREFIX"] = str(self.folder / "bytecode")
        self.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

    def close(self) -> None:
        self.plain.shutdown()
        self.pool.shutdown()
        shutil.rmtree(self.folder)

    def path(self) -> str:
        """A database that is not there yet."""
        self.files += 1
        return str(self.folder / f"{self.files}.db")

    def run(self, dag: DAG, path: str | None = None) -> float:
        """Seconds that a run takes on the warm workers."""
        path = path or self.path()
        start = time.perf_counter()
        run = dag.run(db_path=path, executor=self.pool)
        took = time.perf_counter() - start
        assert run.state == "success", run
        return took

    def plainly(self, work: Callable[[ProcessPoolExecutor], None]) -> float:
        start = time.perf_counter()
        work(self.plain)
        return time.perf_counter() - start

    def program(self, *arguments: str) -> float:
        """Seconds that a whole process takes."""
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            env=self.environ,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start

    def script(self, name: str, *arguments: str) -> float:
        return self.program(str(self.folder / f"{name}.py"), *arguments)

    def medians(
        self, limit: Callable[[], float], ours: Callable[[], float], rounds: int | None = None
    ) -> tuple[float, float]:
        """Both sides in turns; the first of each is not counted."""
        times: list[tuple[float, float]] = []
        for _ in range((rounds or self.rounds) + 1):
            times.append((limit(), ours()))
        first, second = zip(*times[1:], strict=True)
        return statistics.median(first), statistics.median(second)

    def scaled(self, shape: str, n: int) -> dict[str, float]:
        """What a run of n tasks takes, in a process of its own."""
        done = subprocess.run(
            [sys.executable, str(self.folder / "scale.py"), shape, str(n), self.path()],
            check=True,
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
        )
        found: dict[str, float] = json.loads(done.stdout)
        return found


# The workloads: each gives rows of (name, what, limit, liteflow, goal), times in seconds.

Row = tuple[str, str, float, float, float | None]


def run_wide(bench: Bench) -> list[Row]:
    path = bench.path()
    limit, ours = bench.medians(lambda: bench.plainly(plain_wide), lambda: bench.run(wide, path))
    return [("wide", f"{WIDE} independent no-ops, warm; a task", limit / WIDE, ours / WIDE, 0.5)]


def run_chain(bench: Bench) -> list[Row]:
    path = bench.path()
    limit, ours = bench.medians(lambda: bench.plainly(plain_chain), lambda: bench.run(chain, path))
    return [("chain", f"{CHAIN} links of +1, warm; a link", limit / CHAIN, ours / CHAIN, 0.7)]


def run_layered(bench: Bench) -> list[Row]:
    path = bench.path()
    limit, ours = bench.medians(
        lambda: bench.plainly(plain_layered), lambda: bench.run(layered.dag, path)
    )
    return [("layered", "171 tasks with values, warm; a task", limit / 171, ours / 171, 0.7)]


def run_payload(bench: Bench) -> list[Row]:
    limit, ours = bench.medians(
        lambda: bench.plainly(plain_payload), lambda: bench.run(payload), max(3, bench.rounds // 2)
    )
    what = f"{PAYLOAD // 10**6} MB down a chain of {HOPS}; a hop"
    return [("payload", what, limit / HOPS, ours / HOPS, 1.2)]


def run_start(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for what, name, goals in (
        ("the whole process of `a >> b`", "start", (0.9, 1.5)),
        ("the same, importing something for 0.5 s", "heavy", (None, 1.15)),
    ):
        for method, goal in zip(METHODS, goals, strict=False):
            limit, ours = bench.medians(
                lambda name=name, method=method: bench.script(f"{name}_limit", method),  # type: ignore[misc]
                lambda name=name: bench.script(f"{name}_liteflow", bench.path()),  # type: ignore[misc]
            )
            rows.append((name, f"{what}; the pool by {method}", limit, ours, goal))
    return rows


def run_cold(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for shape in ("wide", "layered"):
        for method, goal in zip(METHODS, (None, 1.2), strict=False):
            limit, ours = bench.medians(
                lambda shape=shape, method=method: bench.script(f"cold_{shape}_limit", method),  # type: ignore[misc]
                lambda shape=shape: bench.script(f"cold_{shape}_liteflow", bench.path()),  # type: ignore[misc]
                max(3, bench.rounds // 2),
            )
            what = f"`{shape}` as a whole process; the pool by {method}"
            rows.append(("cold", what, limit, ours, goal))
    return rows


def run_import(bench: Bench) -> list[Row]:
    listing = "import sys; had = set(sys.modules); import liteflow; " + (
        "print(*(m for m in sys.modules if m not in had and m != 'liteflow'), sep=', ')"
    )
    found = subprocess.run(
        [sys.executable, "-c", listing],
        check=True,
        env=bench.environ,
        capture_output=True,
        text=True,
    )
    limit, ours = bench.medians(
        lambda: bench.program("-c", f"import {found.stdout}"),
        lambda: bench.program("-c", "import liteflow"),
        4 * bench.rounds,
    )
    what = "the process that imports it, against its standard modules alone"
    return [("import", what, limit, ours, 1.15)]


def run_look(bench: Bench) -> list[Row]:
    path = bench.path()
    bench.run(again, path)
    limit, ours = bench.medians(
        lambda: bench.program("-c", "import sqlite3, argparse"),
        lambda: bench.program("-m", "liteflow", "runs", "--limit", "50", "--db", path),
        2 * bench.rounds,
    )
    what = "`python3 -m liteflow runs`, against importing sqlite3 and argparse"
    return [("look", what, limit, ours, 1.4)]


def run_again(bench: Bench) -> list[Row]:
    path = bench.path()
    took = statistics.median(bench.run(again, path) for _ in range(20))
    return [("again", "a further run() of 2 tasks on warm workers", 0.0, took, None)]


def run_scale(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    empty = bench.scaled("wide", 0)
    for shape, few, many, name, what in (
        ("wide", 1000, 100_000, "scale", "wide, a task"),
        ("layers", 1000, 100_000, "scale", "layered, a task"),
        ("mapped", 1000, 10_000, "mapped", "an instance"),
    ):
        small = statistics.median(bench.scaled(shape, few)["seconds"] for _ in range(5)) / few
        large = bench.scaled(shape, many)
        label = f"{what}: {many:,} against {few:,}"
        rows.append((name, label, small, large["seconds"] / many, 1.2))
        if shape == "wide":
            over = (large["peak"] - empty["peak"]) / 1e6
            rows.append(("memory", "peak MB at 100,000 over an empty run's", 150, over, 1.0))
            rows.append(("file", "bytes a task at 100,000", 500, large["bytes"] / many, 1.0))
    return rows


def with_history(bench: Bench) -> str:
    """A database with 500,000 earlier task instances, in 5,000 runs."""
    path = bench.path()
    bench.run(hundred, path)
    with sqlite3.connect(path) as connection:
        copied = "dag_id, ? || run_id, state, start_date, end_date, conf"
        connection.executemany(
            f"INSERT INTO dag_run (dag_id, run_id, state, start_date, end_date, conf) "
            f"SELECT {copied} FROM dag_run WHERE id = 1",
            [(f"{i}",) for i in range(5000)],
        )
        names = "task_id, map_index, state, try_number, max_tries, lost, cleared, upstream_task_ids"
        of_one = ", ".join(f"task_instance.{name}" for name in names.split(", "))
        connection.execute(
            f"INSERT INTO task_instance (dag_run_id, {names}) SELECT dag_run.id, {of_one} "
            "FROM dag_run, task_instance WHERE dag_run.id > 1 AND dag_run_id = 1"
        )
        names = "try_number, state, start_date, end_date, pid, error"
        of_one = ", ".join(f"task_attempt.{name}" for name in names.split(", "))
        connection.execute(
            f"INSERT INTO task_attempt (task_instance_id, {names}) SELECT copy.id, {of_one} "
            "FROM task_attempt JOIN task_instance ON task_instance.id = task_instance_id "
            "JOIN dag_run JOIN task_instance copy ON copy.dag_run_id = dag_run.id "
            "AND copy.task_id = task_instance.task_id "
            "WHERE task_instance.dag_run_id = 1 AND dag_run.id > 1"
        )
    connection.close()
    return path


def run_history(bench: Bench) -> list[Row]:
    full, new = with_history(bench), bench.path()
    bench.run(hundred, new)
    what = "100 tasks in a file with 500,000 earlier instances"
    limit, ours = bench.medians(
        lambda: bench.run(hundred, new), lambda: bench.run(hundred, full), 2 * bench.rounds
    )
    rows: list[Row] = [("history", f"{what}, against a new file", limit, ours, 1.1)]
    for command in ("show hundred", "runs --limit 50", "visualize hundred"):
        limit, ours = bench.medians(
            lambda: bench.program("-m", "liteflow", *command.split(), "--db", new),  # noqa: B023
            lambda: bench.program("-m", "liteflow", *command.split(), "--db", full),  # noqa: B023
        )
        rows.append(("status", f"`{command}` in that file, against a new one", limit, ours, 1.5))
    return rows


def run_log(bench: Bench) -> list[Row]:
    with DAG("log") as talkative:
        task(chatter)()

    def plain() -> float:
        return bench.script("log_limit") - bench.program("-c", "pass")

    limit, ours = bench.medians(plain, lambda: bench.run(talkative), max(3, bench.rounds // 2))
    return [("log", "100,000 printed lines, against /dev/null", limit, ours, 2.0)]


def chatter() -> None:
    for i in range(100_000):
        print("line", i)


WORKLOADS = {
    "wide": run_wide,
    "chain": run_chain,
    "layered": run_layered,
    "payload": run_payload,
    "start": run_start,
    "cold": run_cold,
    "import": run_import,
    "look": run_look,
    "again": run_again,
    "scale": run_scale,
    "history": run_history,
    "log": run_log,
}


def shown(name: str, seconds: float) -> str:
    """A number with its unit."""
    if name == "memory":
        return f"{seconds:.0f} MB"
    if name == "file":
        return f"{seconds:.0f} B"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def line(row: Row) -> str:
    name, what, limit, ours, goal = row
    if name == "again":
        return f"| {name} | {what} | | {shown(name, ours)} | | |"
    said = "" if goal is None else f"≤ {goal:g}"
    cells = (name, what, shown(name, limit), shown(name, ours), f"{ours / limit:.2f}", said)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", choices=WORKLOADS)
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="default: 7")
    options = parser.parse_args()
    bench = Bench(options.rounds)
    rows: list[Row] = []
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {platform.system()} {platform.machine()}"
    )
    if not options.json:
        print(f"{machine}\n")
        print("| workload | what | limit | liteflow | ratio | goal |")
        print("| - | - | -: | -: | -: | -: |")
    try:
        for name in options.only or WORKLOADS:
            for row in WORKLOADS[name](bench):
                rows.append(row)
                if not options.json:
                    print(line(row), flush=True)
    finally:
        bench.close()
    if options.json:
        names = ("name", "what", "limit", "liteflow", "goal")
        document = [dict(zip(names, row, strict=True)) for row in rows]
        print(json.dumps({"machine": machine, "rows": document}, indent=2))


if __name__ == "__main__":
    main()
