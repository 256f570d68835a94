"""A census of Python's standard library: how many functions, how long, and who imports whom.

Real input that every machine has. The modules are parsed in parallel shards with `ast`, the
counts are summed up, and a Markdown report and a small SQLite table are written. Run it:

    python3 examples/stdlib_census.py --help

The report lies in `census/` in the working directory, or in $CENSUS_DIR. `count_plainly` computes
the same numbers in one process, and the last task compares both.
"""

import ast
import collections
import os
import sqlite3
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, task

SHARDS = 8


def output_folder() -> Path:
    return Path(os.environ.get("CENSUS_DIR", "census"))


def modules() -> list[str]:
    """The files of the standard library, without its tests and what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = (p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    return sorted(str(p) for p in found)


def count(paths: list[str]) -> dict:
    """What stands in these files: plain counts, which sum up over shards."""
    totals = collections.Counter()
    imported = collections.Counter()
    functions = []
    for path in paths:
        source = Path(path).read_bytes()
        try:
            tree = ast.parse(source)
        except SyntaxError:
            totals["unparsable"] += 1
            continue
        totals["modules"] += 1
        totals["lines"] += source.count(b"\n")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                totals["functions"] += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((length, f"{Path(path).stem}.{node.name}"))
            elif isinstance(node, ast.ClassDef):
                totals["classes"] += 1
            elif isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
                totals["imports"] += len(node.names)
            elif isinstance(node, ast.ImportFrom):
                if node.module and not node.level:
                    imported[node.module.split(".")[0]] += 1
                totals["imports"] += 1
    return {
        "totals": dict(totals),
        "imported": dict(imported),
        "longest": sorted(functions, key=lambda f: (-f[0], f[1]))[:10],
    }


def merge(parts: list[dict]) -> dict:
    """One census out of several."""
    totals, imported = collections.Counter(), collections.Counter()
    longest = []
    for part in parts:
        totals.update(part["totals"])
        imported.update(part["imported"])
        longest += [tuple(f) for f in part["longest"]]
    return {
        "totals": dict(totals),
        "imported": dict(imported),
        "longest": sorted(longest, key=lambda f: (-f[0], f[1]))[:10],
    }


def count_plainly() -> dict:
    """The same census in one process, without liteflow."""
    return merge([count(modules())])


with DAG("stdlib_census", description="Functions, classes and imports of the stdlib") as dag:

    @task
    def list_modules() -> list[str]:
        found = modules()
        print(f"{len(found)} modules in {sysconfig.get_path('stdlib')}")
        return found

    @task
    def count_shard(paths: list[str], shard: int):
        part = count(paths[shard::SHARDS])
        print(f"shard {shard}: {part['totals']['functions']} functions")
        return part

    @task
    def sum_up(parts: list):
        return merge(parts)

    @task
    def write_report(census: dict) -> str:
        folder = output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["# The standard library", "", "| what | how many |", "| --- | ---: |"]
        lines += [f"| {what} | {n:,} |" for what, n in sorted(census["totals"].items())]
        lines += ["", "## Most imported", "", "| module | imports |", "| --- | ---: |"]
        top = collections.Counter(census["imported"]).most_common(10)
        lines += [f"| {name} | {n:,} |" for name, n in top]
        lines += ["", "## Longest functions", "", "| function | lines |", "| --- | ---: |"]
        lines += [f"| {name} | {length:,} |" for length, name in census["longest"]]
        path = folder / "report.md"
        path.write_text("\n".join(lines) + "\n")
        return str(path.resolve())

    @task
    def write_table(census: dict) -> str:
        folder = output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "census.db"
        path.unlink(missing_ok=True)  # a task may run again: it starts from nothing
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE imported (module TEXT PRIMARY KEY, times INTEGER)")
            rows = census["imported"].items()
            connection.executemany("INSERT INTO imported VALUES (?, ?)", rows)
        connection.close()
        return str(path.resolve())

    @task
    def check(census: dict, report: str, table: str) -> None:
        assert census == count_plainly(), "the shards do not add up"
        print(f"checked against one plain pass; see {report} and {table}")

    paths = list_modules()
    census = sum_up([count_shard(paths, shard) for shard in range(SHARDS)])
    check(census, write_report(census), write_table(census))

if __name__ == "__main__":
    dag.cli()
