"""A layered DAG of 171 tasks: 20 generators, 100 processors, 50 combiners and one summary.

    python3 examples/complex_workflow.py
    python3 -m liteflow visualize layered_dag_171 --db liteflow.db

Every value comes from a seed, so each run gives the same total, which `expected_total` computes
without liteflow.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, task

GENERATORS, PROCESSORS, COMBINERS = 20, 100, 50


def numbers(i: int) -> list[int]:
    return [random.Random(i).randrange(1000) for _ in range(10)]


def scaled(values: list[int], i: int) -> int:
    return sum(values) * (i + 1)


def expected_total() -> int:
    """The summary's result, computed plainly."""
    processed = [scaled(numbers(i % GENERATORS), i) for i in range(PROCESSORS)]
    return sum(processed[2 * i] + processed[2 * i + 1] for i in range(COMBINERS))


with DAG("layered_dag_171", description="20 generators, 100 processors, 50 combiners") as dag:

    @task
    def generate(i: int) -> list[int]:
        return numbers(i)

    @task
    def transform(values: list[int], i: int) -> int:
        return scaled(values, i)

    @task
    def combine(a: int, b: int) -> int:
        return a + b

    @task
    def summarize(totals: list[int]) -> int:
        print(f"{len(totals)} combiners, {sum(totals)} in total")
        return sum(totals)

    generated = [generate.override(task_id=f"generate_{i:02}")(i) for i in range(GENERATORS)]
    processed = [
        transform.override(task_id=f"process_{i:02}")(generated[i % GENERATORS], i)
        for i in range(PROCESSORS)
    ]
    combined = [
        combine.override(task_id=f"combine_{i:02}")(processed[2 * i], processed[2 * i + 1])
        for i in range(COMBINERS)
    ]
    summarize(combined)

if __name__ == "__main__":
    dag.cli()
