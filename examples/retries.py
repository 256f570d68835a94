"""Retries: a flaky download that succeeds at the third try, and one that is not worth retrying.

    python3 examples/retries.py          exits 1: one task fails on purpose
    python3 -m liteflow show retries     the tries and the reasons

`flaky` fails twice and then succeeds, with a wait each time; `hopeless` raises
AirflowFailException, which fails at once whatever its retries; `slow` outlives its timeout in
its first try only.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, AirflowFailException, task

with DAG("retries", description="What fails is tried again") as dag:

    @task(retries=3, retry_delay=0.2)
    def flaky(ti) -> str:
        print(f"try {ti.try_number}")
        if ti.try_number < 3:
            raise ConnectionError("the server hung up")
        return f"downloaded at try {ti.try_number}"

    @task(retries=3)
    def hopeless() -> None:
        raise AirflowFailException("wrong password: no use in trying again")

    @task(retries=1, execution_timeout=0.5)
    def slow(ti) -> int:
        try:
            time.sleep(60 if ti.try_number == 1 else 0)
        finally:
            print("cleaned up")  # runs at a timeout, too
        return ti.try_number

    @task(trigger_rule="all_done")
    def summary(download: str | None, tries: int | None) -> str:
        return f"{download}; slow took {tries} tries"

    summary(flaky(), slow())
    hopeless()

if __name__ == "__main__":
    dag.cli()
