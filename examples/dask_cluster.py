"""Past one machine: the same DAG on a Dask cluster.

    python3 -m venv /tmp/dask && /tmp/dask/bin/pip install distributed
    /tmp/dask/bin/python examples/dask_cluster.py                       makes a cluster
    /tmp/dask/bin/python examples/dask_cluster.py tcp://scheduler:8786  takes that one

Each task is one `submit` to Dask's executor; results, states and retries are recorded on this
machine, in one file. The README says what such an executor can't do (end a task at its timeout,
capture its output). One task kills its worker once: that attempt fails, and is retried elsewhere.
"""

import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

from liteflow import DAG, task

with DAG("dask_cluster", description="Squares, on many machines") as dag:

    @task
    def numbers() -> list[int]:
        return list(range(10))

    @task(retries=1)
    def square(x: int, ti) -> int:
        if x == 7 and ti.try_number == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as the machine's memory running out would
        return x * x

    @task
    def total(squares) -> int:
        return sum(squares)

    total(square.expand(x=numbers()))


def main(address: str | None = None, db_path: str | None = None) -> int:
    import dask
    from distributed import Client, LocalCluster

    # A task whose worker dies is given up at once: liteflow counts its tries.
    dask.config.set({"distributed.scheduler.allowed-failures": 0})
    cluster = None if address else LocalCluster(n_workers=2, threads_per_worker=1)
    with Client(address or cluster) as client:
        # Every worker, those that join later too, gets the module of the DAG, and liteflow itself.
        # Not loaded by the upload, which would do so twice and in any order, and here as well if
        # the scheduler is in this process. After an edit: client.restart(), then upload again.
        client.upload_file(str(HERE.parent.parent / "liteflow.py"), load=False)
        client.upload_file(str(HERE), load=False)
        with client.get_executor(pure=False) as executor:
            run = dag.run(db_path=db_path, executor=executor, progress=True)
    if cluster is not None:
        cluster.close()
    print(run.state, run.xcom_pull("total"))
    return 0 if run.xcom_pull("total") == sum(x * x for x in range(10)) else 1


if __name__ == "__main__":
    # By its own name, since a worker of the cluster finds no `__main__` of ours.
    import dask_cluster

    sys.exit(dask_cluster.main(*sys.argv[1:2], db_path=os.environ.get("LITEFLOW_DB")))
