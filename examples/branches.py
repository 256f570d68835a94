"""Skips, trigger rules, and a clean-up that always runs.

    python3 examples/branches.py

Each report is made only if there is something to report: it skips itself otherwise. `publish`
runs if at least one was made and none failed. `clean_up` runs whatever happened, and since it is
a leaf beside `publish`, a failure would still show in the run's state.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, AirflowSkipException, TriggerRule, task

with DAG("branches", description="Skip what is not needed, and always clean up") as dag:

    @task
    def read_orders() -> dict[str, list[int]]:
        return {"books": [12, 30], "records": [], "tickets": [5]}

    @task
    def report(orders: list[int], what: str) -> str:
        if not orders:
            raise AirflowSkipException(f"no {what} today")
        return f"{what}: {len(orders)} orders, {sum(orders)}"

    @task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
    def publish(reports: list[str | None]) -> list[str]:
        return [line for line in reports if line is not None]

    @task(trigger_rule="all_done")
    def clean_up() -> None:
        print("nothing left behind")

    orders = read_orders()
    reports = [
        report.override(task_id=f"report_{what}")(orders[what], what)
        for what in ("books", "records", "tickets")
    ]
    publish(reports)
    reports >> clean_up()

if __name__ == "__main__":
    dag.cli()
