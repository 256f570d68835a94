r"""A workflow that runs on liteflow and, with its import lines changed, on Airflow 3.

    python3 examples/airflow_etl.py

It has a group, a mapped task and its reduce, a branch, a classic operator, and a setup with a
teardown that runs whatever the work between did. To run it on Airflow, too, and compare:

    export AIRFLOW_HOME=/tmp/airflow AIRFLOW__CORE__LOAD_EXAMPLES=False PYTHONPATH=/tmp/airflow/dags
    python3 -m venv /tmp/airflow-venv && /tmp/airflow-venv/bin/pip install 'apache-airflow==3.3.*' \
        apache-airflow-providers-standard && /tmp/airflow-venv/bin/airflow db migrate
    mkdir -p $AIRFLOW_HOME/dags
    sed -E 's/^from liteflow import (.*)  # (airflow[.a-z]*)$/from \2 import \1/' \
        examples/airflow_etl.py > $AIRFLOW_HOME/dags/airflow_etl.py
    /tmp/airflow-venv/bin/python - <<'END'     # Airflow's states; `show airflow_etl` has liteflow's
    from airflow_etl import dag
    for ti in dag.test().get_task_instances(): print(ti.task_id, ti.map_index, ti.state)
    END
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteflow import DAG, TaskGroup, setup, task, teardown  # airflow.sdk
from liteflow import BashOperator  # airflow.providers.standard.operators.bash
from liteflow import EmptyOperator  # airflow.providers.standard.operators.empty

SHOPS = {"north": [3, 5, 8], "south": [13, 21], "west": []}

with DAG(
    "airflow_etl",
    schedule=None,
    params={"threshold": 20},
    default_args={"retries": 1, "retry_delay": 1},
    tags=["example"],
) as dag:

    @setup
    def make_folder() -> str:
        return tempfile.mkdtemp(prefix="airflow-etl-")

    @teardown
    def drop_folder(folder: str) -> int:
        files = sorted(Path(folder).iterdir())
        for file in files:
            file.unlink()
        os.rmdir(folder)
        return len(files)

    folder = make_folder()

    with TaskGroup("extract") as extract:

        @task
        def list_shops() -> list:
            return sorted(SHOPS)

        @task
        def read(shop: str, folder: str) -> str:
            path = Path(folder) / f"{shop}.json"
            path.write_text(json.dumps(SHOPS[shop]))
            return str(path)

        files = read.partial(folder=folder).expand(shop=list_shops())

    @task
    def total(path: str) -> int:
        return sum(json.loads(Path(path).read_text()))

    @task
    def sum_up(totals) -> int:
        return sum(totals)

    @task.branch
    def large_or_small(amount: int, params: dict) -> str:
        return "announce" if amount > params["threshold"] else "stay_quiet"

    totals = total.expand(path=files)
    amount = sum_up(totals)
    announce = BashOperator(task_id="announce", bash_command="echo a good day")
    stay_quiet = EmptyOperator(task_id="stay_quiet")
    done = EmptyOperator(task_id="done", trigger_rule="none_failed_min_one_success")

    dropped = drop_folder(folder)
    totals >> dropped
    large_or_small(amount) >> [announce, stay_quiet] >> done

if __name__ == "__main__":
    dag.cli()
