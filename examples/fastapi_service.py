"""A web service on FastAPI: a request starts a run, and no accepted request is lost.

    pip install fastapi uvicorn
    python3 examples/fastapi_service.py              serves on port 8000
    curl -X POST localhost:8000/reports -H 'content-type: application/json' -d '{"customer": "ada"}'
    curl localhost:8000/reports/RUN_ID
    curl -N localhost:8000/reports/RUN_ID/events     what happens, as it happens

POST answers once the run is in the database. SIGTERM ends the server in order. The next process,
after a crash too, goes on with the runs that are left, by `recover`. Several processes (gunicorn's
workers, say) may share the database: each run is begun by one of them.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from liteflow import DAG, DagRun, RunNotFound, WorkerPool, task

with DAG("report", params={"customer": "nobody"}) as dag:

    @task
    def collect(params) -> list[int]:
        print("collecting for", params["customer"])
        return [len(params["customer"]), 2, 3]

    @task(retries=2)
    def add_up(numbers: list[int]) -> int:
        return sum(numbers)

    add_up(collect())

dag.db_path = os.environ.get("LITEFLOW_DB", "service.db")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The pool lives as long as the server. At the end it waits for the runs that have begun; the
    others stay in the database. `stop=True` would cut off the former, for `recover`."""
    app.state.pool = pool = WorkerPool(2)
    await asyncio.to_thread(pool.recover, dag)
    yield
    await asyncio.to_thread(pool.shutdown, cancel_futures=True)


app = FastAPI(lifespan=lifespan)


class Report(BaseModel):
    customer: str


@app.post("/reports", status_code=202)
def start(report: Report) -> dict[str, str]:
    return {"run_id": app.state.pool.submit(dag, conf=report.model_dump()).run_id}


@app.get("/reports/{run_id}")
def look(run_id: str) -> dict[str, object]:
    return facts(found(run_id))


@app.get("/reports/{run_id}/events")
def events(run_id: str) -> StreamingResponse:
    found(run_id)  # before the answer has begun
    return StreamingResponse(progress(run_id), media_type="text/event-stream")


async def progress(run_id: str) -> AsyncIterator[str]:
    """A line for each task instance whose state is another one, and one for the run's end."""
    told: dict[object, object] = {}
    while True:
        run = await asyncio.to_thread(found, run_id)
        for ti in await asyncio.to_thread(run.get_task_instances):
            name = ti.task_id if ti.map_index < 0 else f"{ti.task_id}[{ti.map_index}]"
            if told.get(name) != ti.state:
                told[name] = ti.state
                yield f"event: task\ndata: {name} {ti.state}\n\n"
        if run.state in ("success", "failed"):
            yield f"event: end\ndata: {run.state}\n\n"
            return
        await asyncio.sleep(0.1)


def found(run_id: str) -> DagRun:
    try:
        if os.path.exists(str(dag.db_path)):  # not before there was a run
            return dag.get_run(run_id)
    except RunNotFound:
        pass  # its message is not for the client: it names other runs
    raise HTTPException(404, "there is no such run")


def facts(run: DagRun) -> dict[str, object]:
    """State, reasons and result, as the client sees them."""
    failed = {
        ti.task_id: (ti.error or "").splitlines()[-1] for ti in run.get_task_instances("failed")
    }
    total = run.xcom_pull("add_up") if run.state == "success" else None
    return {"state": run.state, "reason": run.reason, "failed": failed, "total": total}


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    # By its name, so that the workers find the DAG in a module.
    sys.path.insert(0, str(Path(__file__).parent))
    uvicorn.run("fastapi_service:app", port=port, log_level="warning")
