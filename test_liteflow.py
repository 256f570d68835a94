"""Tests of liteflow: `python3 -m unittest` from the repository's root.

First a TestCase for each section of liteflow.py, in its order; then one class for each promise of
the README, whose docstring is the README's line; then the examples and the README's own code.
`LITEFLOW_SOAK=1 python3 -m unittest` runs the slow soaks as well. Only the standard library.
"""

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import enum
import errno
import faulthandler
import functools
import gc
import hashlib
import html
import html.parser
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import json
import logging
import marshal
import multiprocessing
import os
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import typing
import unittest
import warnings
import weakref
import zipapp
import zlib
from pathlib import Path
from unittest import mock

import liteflow
from liteflow import (
    DAG,
    AirflowDagCycleException,
    AirflowSkipException,
    Dag,
    DagRunState,
    DatabaseError,
    Param,
    ParamValidationError,
    TaskGroup,
    TaskInstanceState,
    TriggerRule,
    UnreachableTask,
    WorkerPool,
    chain,
    chain_linear,
    cross_downstream,
    dag,
    task,
    task_group,
    teardown,
)

HERE = Path(__file__).resolve().parent
SOAK = bool(os.environ.get("LITEFLOW_SOAK"))
LINUX = unittest.skipUnless(sys.platform == "linux", "of Linux")
# What users have: output that can't be written is noticed late.
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
LIMIT = 60  # seconds after which something hangs

_numbers = itertools.count()
_pool: WorkerPool | None = None


def pool() -> WorkerPool:
    """Two warm workers that the tests share."""
    global _pool
    if _pool is None:
        _pool = WorkerPool(2)
    return _pool


@functools.cache
def setUpModule() -> None:
    # Compiled once: where PYTHONDONTWRITEBYTECODE is set, each process would compile it anew.
    py_compile.compile(str(HERE / "liteflow.py"))


def copy_liteflow(folder: Path) -> None:
    """A user's copy of the module, with its bytecode."""
    if not (folder / "liteflow.py").exists():
        shutil.copy2(HERE / "liteflow.py", folder)
        compiled = Path(importlib.util.cache_from_source(str(folder / "liteflow.py")))
        compiled.parent.mkdir(exist_ok=True)
        shutil.copy2(importlib.util.cache_from_source(str(HERE / "liteflow.py")), compiled)


def tearDownModule() -> None:
    if _pool is not None:
        _pool.shutdown()


def wait_until(condition, seconds=30.0):
    """Wait for a condition; its value, or the last one when the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return value


def state_of(pid: int) -> str:
    """A process's state: a letter; "" if it is gone."""
    if not os.path.exists("/proc/self"):  # macOS
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True).stdout[:1]
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    return state_of(pid) not in ("", "Z", "X")


def recorded_runs(dag_id, path):
    """A DAG's runs; none while the database is missing or just being made."""
    try:
        return Dag(dag_id).runs(path)
    except DatabaseError:
        return []


@contextlib.contextmanager
def no_more_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Case(unittest.TestCase):
    """A test with a folder of its own, which leaves nothing behind."""

    def setUp(self) -> None:
        limit = LIMIT * (30 if SOAK else 1)
        faulthandler.dump_traceback_later(limit, file=sys.__stderr__, exit=True)  # under -b, too
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.folder = Path(tempfile.mkdtemp(prefix="liteflow-test-")).resolve()  # macOS: a link
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.db = self.folder / "flow.db"
        before = dict(os.environ)
        os.environ["CASE_DIR"] = str(self.folder)
        self.addCleanup(os.environ.update, before)

    def assert_nothing_left(self) -> None:
        """No -wal, no -shm, no folder of a run beside the database."""
        if _pool is not None:
            _pool._close_file()
        left = [p.name for p in self.folder.iterdir() if p.name.startswith(f"{self.db.name}-")]
        self.assertEqual(left, [])

    def module(self, source: str):
        """A module with this source, as a user's file: workers import it like any other."""
        name = f"flow_{os.getpid()}_{next(_numbers)}"
        path = self.folder / f"{name}.py"
        head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom liteflow import *\n"
        if source.startswith(BAD_VALUES):
            head, source = head + BAD_VALUES, source.removeprefix(BAD_VALUES)
        future = "from __future__ import annotations\n" if "TypedDict" in source else ""
        path.write_text(f"{future}{head}import liteflow\n{textwrap.dedent(source)}")
        return self.loaded(path, name)

    def loaded(self, path, name):
        """The module of this file, under this name."""
        # Of a file that was just changed, it may look as if it were that of the file.
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        self.addCleanup(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        return module

    def run_flow(self, source: str, **options):
        """Run the DAG `dag` of a module with this source; the finished run."""
        made = self.module(source).dag
        if "max_workers" not in options and "mp_context" not in options:
            options.setdefault("executor", pool())
        return made.run(db_path=self.db, **options)

    def script(self, source: str, name: str = "my_flow.py") -> Path:
        """A script with this source in the test's folder, beside a copy of liteflow.py."""
        copy_liteflow(self.folder)
        path = self.folder / name
        path.write_text(textwrap.dedent(source))
        return path

    def start(self, *argv, **options) -> subprocess.Popen:
        """Start a Python process in the test's folder, in a session of its own."""
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of zombies
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

        self.addCleanup(end)
        return process

    def python(self, *argv, timeout=LIMIT, **options) -> subprocess.CompletedProcess:
        """Run a Python process in the test's folder to its end."""
        process = self.start(*argv, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def cli(self, *argv, **options) -> subprocess.CompletedProcess:
        """`python3 -m liteflow ...` in the test's folder."""
        copy_liteflow(self.folder)
        return self.python("-m", "liteflow", *argv, **options)

    def cli_here(self, *argv, main=liteflow.main) -> subprocess.CompletedProcess:
        """The same, in this process."""
        out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(word) for word in argv])
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os.chdir(before)
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    def states(self, run) -> dict:
        return {
            ti.task_id if ti.map_index < 0 else f"{ti.task_id}[{ti.map_index}]": ti.state
            and ti.state.value
            for ti in run.get_task_instances()
        }

    def values(self, run) -> dict:
        return {(x.task_id, x.key): x.value for x in run.xcoms()}

    def started_attempt(self):
        """A store, and an attempt that it holds as running."""
        with DAG("d") as d:
            task(sample)(1)
        store = liteflow._Store(str(self.db))
        self.addCleanup(store.close)
        plan = liteflow._Plan(d)
        plan.settle()
        instance = plan.take()
        with store.transaction():
            store.create_run(d, "r", None, {})
            store.owner = "me"
            store.claim_run(None)
            store.write_instances(plan.nodes)
        plan.start(instance)
        instance.move(TaskInstanceState.RUNNING)
        attempt = liteflow._Attempt(instance)
        attempt.state, attempt.started, attempt.pid = "running", "2024-01-01T00:00:00+00:00", 1
        store.record(self.batch_of(attempt))
        return store, attempt

    def batch_of(self, attempt):
        batch = liteflow._Batch()
        batch.instances[attempt.instance] = batch.attempts[attempt] = None
        return batch

    def abandon(self, owner="0123456789abcdef", running=True):
        """Leave the file's runs as a scheduler does that dies, by default while all tasks run."""
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute(
                "UPDATE dag_run SET state = 'running', owner = ?, owner_process = 'pid 7 on there'",
                (owner,),
            )
            if running:
                db.execute("UPDATE task_instance SET state = 'running'")
                db.execute(
                    "UPDATE task_attempt SET state = 'running', end_date = NULL WHERE try_number = "
                    "(SELECT try_number FROM task_instance WHERE id = task_instance_id)"
                )

    def query(self, sql: str, *values):
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            return connection.execute(sql, values).fetchall()


# Bad citizens, by name: values and exceptions that misbehave.

BAD_VALUES = """
class CrashAtPickle:
    def __reduce__(self): os.kill(os.getpid(), signal.SIGSEGV)
class ExitAtPickle:
    def __reduce__(self): sys.exit(1)
class ErrorAtPickle:
    def __reduce__(self): raise ValueError("no pickle of me")
def _explode(): raise ValueError("no unpickle of me")
class ErrorAtUnpickle:
    def __reduce__(self): return _explode, ()
def _exit(): os._exit(7)
class ExitAtUnpickle:
    def __reduce__(self): return _exit, ()
class HostileRepr:
    def __repr__(self): raise RuntimeError("no repr of me")
class TwoArgError(Exception):
    def __init__(self, a, b): super().__init__(f"{a} and {b}")
class HostileStr(Exception):
    def __str__(self): raise RuntimeError("no text of me")
class OwnBase(BaseException): pass
"""


# --- Errors and states ----------------------------------------------------------------------------


class StatesTest(Case):
    def test_every_state_stands_in_the_table_of_transitions(self):
        self.assertEqual(set(liteflow._NEXT), {None, *TaskInstanceState})

    def test_the_schema_names_the_states_of_a_run(self):
        [names] = re.findall(r"state TEXT NOT NULL, +-- (queued.*)", liteflow._SCHEMA)
        self.assertEqual(set(names.split(", ")), {state.value for state in DagRunState})

    def test_a_state_that_nobody_knows_breaks_no_look(self):
        # The database checks no states, so that later versions may add some.
        run = self.run_flow("with DAG('odd') as dag:\n    task(task_id='a')(sorted)([1])\n")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            for table in ("dag_run", "task_instance", "task_attempt"):
                db.execute(f"UPDATE {table} SET state = 'deferred'")
        self.assertEqual(run.refresh().state, "failed")
        self.assertEqual(self.states(run), {"a": None})
        for words in (("list",), ("runs",), ("show", "odd"), ("show", "odd", "a")):
            self.assertEqual(self.cli_here(*words, "--db", self.db).returncode, 0, words)

    def test_a_state_is_its_airflow_name(self):
        self.assertEqual(TaskInstanceState.UPSTREAM_FAILED, "upstream_failed")
        self.assertEqual(str(DagRunState.SUCCESS), "success")

    def test_airflows_exception_types(self):
        self.assertTrue(issubclass(liteflow.NodeNotFound, KeyError))
        self.assertTrue(issubclass(liteflow.ParamValidationError, ValueError))
        for name in ("AirflowTaskTimeout", "AirflowTaskTerminated"):
            self.assertFalse(issubclass(getattr(liteflow, name), Exception), name)


# --- Building -------------------------------------------------------------------------------------


def sample(x, y=2, *rest, key="k", ti=None, **more):
    return x


class WithoutHash:
    __hash__ = None

    def __call__(self):
        return 1


def one_argument(x=None):
    return x


class BuildingTest(Case):
    def build(self):
        return DAG(f"d{next(_numbers)}")

    def assert_raises(self, kind, words, act, *args, **kwargs):
        with self.assertRaises(kind) as caught:
            act(*args, **kwargs)
        for word in words if isinstance(words, (list, tuple)) else [words]:
            self.assertIn(word, str(caught.exception))

    def test_a_task_function_that_was_not_called_has_no_order(self):
        with DAG("d"):
            a, b = task(sample), task(task_id="b")(sample)
            for act in (
                lambda: a >> b,
                lambda: a << b,
                lambda: a(1) >> b,
                lambda: [a(1)] >> b,
                lambda: b << [a(1)],
            ):
                with self.assertRaises(TypeError) as caught:
                    act()
                self.assertIn(": call it", str(caught.exception))

    def test_a_call_adds_a_task_and_returns_its_placeholder(self):
        with self.build() as d:
            result = task(sample)(1)
        self.assertEqual(result.operator.task_id, "sample")
        self.assertEqual(d.task_ids, ["sample"])
        self.assertIs(d.get_task("sample"), d["sample"])
        self.assertTrue(d.has_task("sample"))

    def test_a_setting_that_is_none_or_assigned_later_is_checked_like_one_that_is_given(self):
        with self.build():
            late = task(retry_delay=None)(sample)(1).operator
            sensor = liteflow.PythonSensor(task_id="wait", python_callable=sample)
        self.assertEqual(late.retry_delay, datetime.timedelta(0))
        late.retry_delay = late.execution_timeout = 5
        self.assertEqual(late.execution_timeout, datetime.timedelta(seconds=5))
        late.retry_delay = None
        self.assertEqual(late.retry_delay, datetime.timedelta(0))
        self.assert_raises(TypeError, "task 'sample': retries", setattr, late, "retries", "3")
        for name in ("timeout", "poke_interval"):
            self.assert_raises(TypeError, f"'wait': {name}", setattr, sensor, name, None)
            with self.build():
                made = {name: None, "task_id": "wait", "python_callable": sample}
                self.assert_raises(TypeError, name, liteflow.PythonSensor, **made)

    def test_a_task_joins_the_dag_that_it_is_given_later(self):
        late, d = liteflow.EmptyOperator(task_id="late"), DAG("d")
        late.dag = d
        late.dag = d
        late >> liteflow.EmptyOperator(task_id="b", dag=d)
        self.assertEqual(([t.task_id for t in d.validate()]), ["late", "b"])
        self.assert_raises(
            ValueError, "'late' is in DAG 'd' already", setattr, late, "dag", DAG("e")
        )
        twin = liteflow.EmptyOperator(task_id="late")
        self.assert_raises(liteflow.DuplicateTaskIdFound, "taken", setattr, twin, "dag", d)
        self.assert_raises(TypeError, "dag must be Dag", setattr, twin, "dag", "d")

        class Own(liteflow.EmptyOperator):
            def __init__(self, *, dag, **kwargs):
                self.dag = dag
                super().__init__(dag=dag, **kwargs)

        own = Own(task_id="own", dag=d)
        self.assertEqual((d.task_dict["own"], "" in d.task_dict), (own, False))

    def test_suffixes_are_one_more_than_the_highest_in_use(self):
        with self.build() as d:
            n = task(sample)
            n(1)
            n(1)
            n.override(task_id="sample__7")(1)
            n(1)
            n.override(task_id="sample__7")(1)
            n.override(task_id="sample__3")(1)
            n(1)
        numbers = [1, 7, 8, 9, 3, 10]
        self.assertEqual(d.task_ids, ["sample", *(f"sample__{i}" for i in numbers)])

    def test_work_of_an_inner_scope_is_inside_the_outer_ones_whatever_that_scope_lacks(self):
        def make(task_id):
            return liteflow.EmptyOperator(task_id=task_id)

        with self.build() as d:
            outer = make("down").as_teardown(setups=make("up"))
            with outer, make("inner_up").as_setup(), make("innermost_up").as_setup():
                make("work")
        self.assertEqual([t.task_id for t in d.leaves], ["down"])
        with self.build() as d:
            outer = make("up").as_setup()
            with outer, make("inner_down").as_teardown(), make("innermost_down").as_teardown():
                make("work")
        self.assertEqual([t.task_id for t in d.roots], ["up"])

    def test_a_teardown_that_is_made_inside_a_scope_is_no_work_of_it(self):
        def make(task_id):
            return liteflow.EmptyOperator(task_id=task_id)

        with self.build() as d, make("up").as_setup(), make("down").as_teardown():
            make("work") >> make("other").as_teardown()
            make("alone").as_teardown()
        self.assertEqual([t.task_id for t in d.roots], ["up", "alone"])
        self.assertEqual(d.task_dict["down"].upstream_task_ids, {"work"})

    def test_nested_scopes_may_share_a_setup_or_a_teardown(self):
        def make(task_id):
            return liteflow.EmptyOperator(task_id=task_id)

        with self.build() as d:
            up = make("up")
            ends = [make(name).as_teardown(setups=up) for name in ("down", "inner_down")]
            with ends[0], ends[1]:
                make("work")
        self.assertEqual([t.task_id for t in d.validate()], ["up", "work", "inner_down", "down"])
        with self.build() as d:
            make("down").as_teardown(setups=[up := make("up"), inner := make("inner")])
            with up, inner:
                make("work")
        self.assertEqual([t.task_id for t in d.validate()], ["up", "inner", "work", "down"])

    def test_a_teardown_may_fail_the_run_if_it_is_told_to(self):
        with self.build():
            kinds = teardown(one_argument), teardown(on_failure_fail_dagrun=True)(one_argument)
            self.assertEqual(
                [kind().operator.on_failure_fail_dagrun for kind in kinds], [False, True]
            )

    def test_a_group_that_is_named_wins_over_the_one_around(self):
        with self.build():
            other = TaskGroup("other")
            with TaskGroup("around"):
                made = liteflow.EmptyOperator(task_id="t", task_group=other)
                strange = liteflow.EmptyOperator(task_id="t", dag=self.build())
        self.assertEqual(made.task_id, "other.t")
        self.assertEqual((strange.task_id, strange.task_group), ("t", None))

    def test_a_task_gets_no_suffix_beside_a_group_of_its_name(self):
        with self.build(), TaskGroup("g"):
            TaskGroup("sample")
            self.assert_raises(liteflow.DuplicateTaskIdFound, "'g.sample'", task(sample), 1)

    def test_an_operator_never_gets_a_suffix(self):
        with self.build():
            liteflow.BaseOperator(task_id="a")
            self.assert_raises(
                liteflow.DuplicateTaskIdFound, "'a'", liteflow.BaseOperator, task_id="a"
            )

    def test_ids(self):
        for good in ("a", "a.b-c_d", "é", "日本", "x" * 250):
            self.assertEqual(DAG(good).dag_id, good)
        for bad in ("", "a b", "a/b", "a\n", "x" * 251, "a;b"):
            self.assert_raises(ValueError, "dag_id", DAG, bad)
        for wrong in (None, 3, b"a"):
            self.assert_raises(TypeError, "dag_id", DAG, wrong)
        with self.build():
            self.assert_raises(ValueError, "task_id", task(task_id="a b")(sample), 1)
            self.assert_raises(ValueError, "<lambda>", task(lambda: 1))

    def test_override_leaves_the_original_alone(self):
        first = task(retries=1)(sample)
        second = first.override(retries=2, task_id="other")
        self.assertIs(second.function, sample)
        with self.build() as d:
            first(1)
            second(1)
        self.assertEqual([t.retries for t in d.tasks], [1, 2])

    def test_settings_are_checked_with_the_tasks_name_and_what_was_found(self):
        for name, value, kind, *words in (
            ("retries", -1, ValueError),
            ("retries", 1.5, TypeError),
            ("retries", "1", TypeError),
            ("retries", True, TypeError),
            ("retry_delay", -1, ValueError, "0 or more"),
            ("retry_delay", "1", TypeError),
            ("retry_delay", float("nan"), ValueError),
            ("execution_timeout", 0, ValueError, "more than 0"),
            ("execution_timeout", float("inf"), ValueError),
            ("execution_timeout", -1, ValueError),
            ("execution_timeout", True, TypeError),
            ("trigger_rule", "ALL_DONE", ValueError),
            ("trigger_rule", "dummy", ValueError),
            ("do_xcom_push", 1, TypeError),
            ("depends_on_past", True, ValueError),
            ("owner", 3, TypeError),
        ):
            with self.subTest(name=name, value=value), self.build():
                decorated = task(task_id="x", **{name: value})(sample)
                self.assert_raises(kind, ["'x'", name, *words], decorated, 1)

    def test_an_unknown_argument_is_named(self):
        with self.build():
            self.assert_raises(
                TypeError, ["'x'", "retrys", "retries"], task(task_id="x", retrys=1)(sample), 1
            )
        self.assert_raises(TypeError, "schedule_interval", DAG, "d", schedule_interval=None)

    def test_airflow_only_arguments_are_kept(self):
        d = DAG(
            "d",
            schedule="@daily",
            start_date=datetime.datetime(2024, 1, 1),
            catchup=False,
            tags=["a", "a"],
            max_active_runs=None,
            max_active_tasks=None,
        )
        self.assertEqual(
            (d.schedule, d.tags, d.max_active_runs, d.max_active_tasks), ("@daily", {"a"}, None, 16)
        )
        for name in ("max_active_tasks", "max_active_runs"):
            self.assert_raises(ValueError, name, DAG, "d", **{name: 0})

    def test_a_dag_has_its_own_tags_and_macros(self):
        one, other = DAG("one", tags=None), DAG("other")
        one.tags.add("t")
        one.user_defined_macros["m"] = 1
        found = [one.user_defined_filters, other.user_defined_macros, other.tags]
        self.assertEqual(found, [{}, {}, set()])
        macros: dict = {}  # which may be filled later
        self.assertIs(DAG("d", user_defined_macros=macros).user_defined_macros, macros)

    def test_a_setting_of_a_subclass_gives_way_to_what_is_passed(self):
        class Patient(liteflow.BaseOperator):
            def __init__(self, **settings):
                self.retries = 5
                super().__init__(**settings)

        with DAG("d"):
            made = [Patient(task_id=f"t{n}", **{"retries": n} if n else {}) for n in range(3)]
            none = Patient(task_id="none", retries=0)  # which is the default of all
        self.assertEqual([each.retries for each in (*made, none)], [5, 1, 2, 0])

    def test_none_and_seconds_as_airflow_takes_them(self):
        with self.build() as d:
            task(retries=None, retry_delay=1.5, retry_exponential_backoff=True)(sample)(1)
        made = d.get_task("sample")
        self.assertEqual(made.retries, 0)
        self.assertEqual(made.retry_delay, datetime.timedelta(seconds=1.5))
        self.assertEqual(made.retry_exponential_backoff, 2.0)

    def test_default_args_reach_settings_and_parameters(self):
        with DAG("d", default_args={"retries": 3, "y": 9, "nonsense": 1, "doc_md": "*"}) as d:
            task(sample)(1)
            task(task_id="own", retries=1, default_args={"y": 5})(sample)(1)
        self.assertEqual([t.retries for t in d.tasks], [3, 1])
        self.assertEqual([t._kwargs["y"] for t in d.tasks], [9, 5])
        self.assertEqual([t.doc_md for t in d.tasks], ["*", "*"])

    def test_default_args_leave_alone_what_is_given_by_position(self):
        def rest(a, *more, retries):
            pass

        def context(**params):
            pass

        with DAG("d", default_args={"y": 9, "retries": 2, "more": 3}) as d:
            task(sample)(1, 2)
            task(rest)(1, 2, 3)
            task(context)()
        self.assertEqual((d.tasks[0]._args, d.tasks[0]._kwargs), ((1, 2), {}))
        self.assertEqual(d.get_task("rest")._kwargs, {"retries": 2})
        self.assertEqual(d.get_task("context")._kwargs, {})

    def test_a_refused_task_is_in_no_group(self):
        with DAG("d"), TaskGroup("g") as g:
            a = liteflow.EmptyOperator(task_id="a")
            with self.assertRaises(liteflow.DuplicateTaskIdFound):
                liteflow.EmptyOperator(task_id="a")
            self.assertEqual(g.children, [a])
        self.assertEqual(g.children, [a])

    def test_a_group_opened_outside_its_dag_brings_the_dag_along(self):
        with DAG("d") as d:
            g = TaskGroup("g")
        with g:
            task(sample)(1)
            with TaskGroup("inner"):
                liteflow.EmptyOperator(task_id="b")
        with DAG("other") as other, contextlib.suppress(ValueError), g:
            self.fail("another DAG's group is open")
        self.assertEqual((d.task_ids, other.task_ids), (["g.sample", "g.inner.b"], []))

    def test_settings_without_a_use_here_may_be_anything(self):
        class NoTruth:
            def __ne__(self, other):
                return self

            def __bool__(self):
                raise ValueError("the truth value is ambiguous")

        config = NoTruth()
        with DAG("d"):
            made = liteflow.EmptyOperator(task_id="a", executor_config=config)
        self.assertIs(made.executor_config, config)

    def test_params_belong_to_one_task(self):
        with self.build() as d:
            task(task_id="a")(sample)(1)
            task(task_id="b")(sample)(1)
            liteflow.EmptyOperator(task_id="c", params=None)
            liteflow.PythonOperator.partial(task_id="m", python_callable=sample).expand(
                op_args=[[1]]
            )
        d.get_task("a").params["n"] = 1
        self.assertEqual([t.params for t in d.tasks], [{"n": 1}, {}, {}, {}])

    def test_the_call_is_checked_where_it_stands(self):
        def f(a, b=1):
            pass

        with self.build():
            self.assert_raises(TypeError, ["'f'", "'a'"], task(f))
            self.assert_raises(TypeError, "'c'", task(f), 1, c=2)
            self.assert_raises(TypeError, "too many", task(f), 1, 2, 3)
            task(sample)(1, 2, 3, 4, other=5)

    def test_context_parameters_need_not_be_given_wherever_they_stand(self):
        def f(ti, a, ds=None):
            pass

        def g(ti="x"):
            pass

        def h(self):
            pass

        with self.build() as d:
            task(f)(a=1)
            task(f).partial(ds="then").expand(a=[1])
            self.assert_raises(ValueError, "'ti'", task, g)
            self.assert_raises(TypeError, "self", task, h)
        self.assertEqual(d["f__1"]._kwargs, {"ds": "then"})

    def test_a_positional_argument_of_task_must_be_a_function(self):
        self.assert_raises(TypeError, "@task", task, "name")

    def test_results_in_arguments_make_edges(self):
        with self.build() as d:
            a, b, c = (task(task_id=i)(sample)(1) for i in "abc")
            task(task_id="end")(sample)([a, {"k": (b, {c})}], key=a)
        self.assertEqual(d.get_task("end").upstream_task_ids, {"a", "b", "c"})
        self.assertEqual(d.get_task("a").downstream_task_ids, {"end"})

    def test_a_placeholder_is_no_value(self):
        with self.build():
            result = task(sample)(1)
        self.assertEqual(result["k"].key, "k")
        self.assert_raises(ValueError, "str key", lambda: result[0])
        self.assert_raises(ValueError, "take its item 'n' in a task", lambda: result["k"]["n"])
        self.assert_raises(TypeError, "placeholder", list, result)
        self.assert_raises(TypeError, "unsupported operand", lambda: result + 1)

    def test_shift_operators(self):
        with self.build() as d:
            a, b, c, e = (task(task_id=i)(sample)(1) for i in "abce")
            self.assertIs(a >> b, b)
            a >> [b, c] >> e
            [a, b] >> c
            e << (a, b)
            self.assert_raises(TypeError, "unsupported operand", lambda: [a] >> [b])
            self.assert_raises(TypeError, "order", lambda: a >> {b})
            self.assert_raises(TypeError, "order", lambda: a >> 1)
        self.assertEqual(d.get_task("e").upstream_task_ids, {"a", "b", "c"})
        self.assertEqual(d.get_task("c").upstream_task_ids, {"a", "b"})
        self.assertEqual([t.task_id for t in d.roots], ["a"])
        self.assertEqual([t.task_id for t in d.leaves], ["e"])

    def test_a_dag_is_owned_by_those_who_own_its_tasks(self):
        with DAG("d", default_args={"owner": "Bo"}) as d:
            for owner in ({}, {}, {"owner": "Al"}):
                task(**owner)(sample)(1)
        self.assertEqual((d.owner, DAG("empty").owner), ("Al, Bo", ""))

    def test_what_comes_after_a_group_waits_for_its_last_work_or_for_what_came_before(self):
        groups = {  # as Airflow's edges were
            "": "x",
            "+a, +b": "g.a g.b",
            "+a > +b": "g.b",
            "+a > -b": "x",
            "+a > w > -b": "g.w",
            "w > -a > v": "g.v",
            "w > -a > -b": "g.w",
            "w > -a > -b, a > v": "g.v g.w",
            "+a > w > -b, +c": "g.w g.c",
            "w > -a, w > v > -b": "g.v",
        }
        for inside, wanted in groups.items():
            with self.subTest(inside), DAG("d") as d:
                made = {}
                with TaskGroup("g") as g:
                    for chained in filter(None, inside.split(", ")):
                        for role, name in re.findall(r"([+-]?)(\w)", chained):
                            if name not in made:
                                made[name] = liteflow.EmptyOperator(task_id=name)
                                made[name].is_setup, made[name].is_teardown = (
                                    role == "+",
                                    role == "-",
                                )
                        liteflow.chain(*(made[name] for name in re.findall(r"\w", chained)))
                x, y = (liteflow.EmptyOperator(task_id=i) for i in "xy")
                x >> g >> y
                self.assertEqual(y.upstream_task_ids, set(wanted.split()))
                self.assertEqual(d.get_task("x").upstream_task_ids, set())
                g >> liteflow.EmptyOperator(task_id="z")  # its tasks have one behind it by now
                self.assertEqual(d["z"].upstream_task_ids, y.upstream_task_ids)

    def test_chain_and_its_kin(self):
        def ids(n):
            return [task(task_id=f"t{i}")(sample)(1) for i in range(n)]

        with self.build() as d:
            t = ids(6)
            chain(t[0], [t[1], t[2]], [t[3], t[4]], t[5])
        self.assertEqual(d.get_task("t4").upstream_task_ids, {"t2"})
        self.assertEqual(d.get_task("t5").upstream_task_ids, {"t3", "t4"})
        with self.build() as d:
            t = ids(6)
            chain_linear(t[0], [t[1], t[2]], [t[3], t[4]], t[5])
        self.assertEqual(d.get_task("t4").upstream_task_ids, {"t1", "t2"})
        with self.build() as d:
            t = ids(4)
            cross_downstream(t[:2], t[2:])
            self.assert_raises(TypeError, "list", cross_downstream, t[0], t[1])
            self.assert_raises(ValueError, "length", chain, t[:1], t[1:3])
            self.assert_raises(ValueError, "none were set", chain_linear, [], t[0])
        self.assertEqual(d.get_task("t3").upstream_task_ids, {"t0", "t1"})

    def test_two_dags_and_none(self):
        with DAG("one"):
            a = task(task_id="a")(sample)(1)
        with DAG("two") as two:
            b = task(task_id="b")(sample)(1)
        orphan, other = task(task_id="o")(sample)(1), task(task_id="p")(sample)(1)
        self.assert_raises(RuntimeError, ["'a'", "'one'", "'b'", "'two'"], lambda: a >> b)
        self.assert_raises(ValueError, ["'o'", "'p'"], lambda: orphan >> other)
        self.assert_raises(RuntimeError, "'p' is in no DAG", lambda: other.operator.dag_id)
        b >> orphan
        self.assertEqual(two.task_ids, ["b", "o"])

    def test_a_cycle_is_shown(self):
        with self.build() as d:
            a, b = (task(task_id=i)(sample)(1) for i in "ab")
            a >> b >> a
        self.assert_raises(AirflowDagCycleException, "->", d.check_cycle)
        with self.build() as d:
            a = task(task_id="a")(sample)(1)
            a >> a
        self.assert_raises(AirflowDagCycleException, "a -> a", d.check_cycle)
        with self.build() as d:
            many = [task(task_id=f"t{i}")(sample)(1) for i in range(20)]
            chain(*many, many[0])
        self.assert_raises(AirflowDagCycleException, "t5 -> ... -> t16", d.check_cycle)

    def test_not_found(self):
        with self.build() as d:
            task(sample)(1)
            TaskGroup("outer")
        self.assertEqual(["sample" in d, "sampel" in d, 3 in d], [True, False, False])
        self.assert_raises(liteflow.TaskNotFound, ["'sampel'", "'sample'"], d.get_task, "sampel")
        said = ["no task or group 'outre'", "mean 'outer'"]
        self.assert_raises(liteflow.NodeNotFound, said, lambda: d["outre"])

    def test_arguments_are_bound_as_python_would(self):
        """Random functions and calls; each by its code, and as `inspect` tells."""
        seed = random.randrange(2**32)
        make = random.Random(seed)
        for _ in range(1000):
            names = [f"{name}{make.choice(['', '=0'])}" for name in "abc"[: make.randrange(4)]]
            names.sort(key=len)  # those with a default are the last
            if names and make.random() < 0.3:
                names.insert(make.randint(1, len(names)), "/")
            if make.random() < 0.5:
                names += [make.choice(["*, d", "*, d=0", "*rest", "*rest, d, e=0"])]
            names += make.choice([[], ["**others"]])
            function = eval(f"lambda {', '.join(names)}: locals()")
            args = [*range(make.randrange(5))]
            kwargs = {name: 1 for name in "abcdex" if make.random() < 0.3}
            wrapper = functools.wraps(function)(lambda *args, **kwargs: None)
            for found in map(liteflow._Parameters, (function, wrapper)):
                with self.subTest(function=names, args=args, kwargs=kwargs, seed=seed):
                    try:
                        bound = function(*args, **kwargs)
                    except TypeError:
                        self.assertRaises(TypeError, found.bind, args, kwargs)
                    else:
                        plain = {n: x for n, x in bound.items() if n in "abcde"}
                        self.assertEqual(found.bind(args, kwargs), plain)
                        self.assertEqual([*found.names], [*plain])

    def test_annotations_may_name_what_only_a_type_checker_imports(self):
        """Python 3.14 evaluates them where it is asked for a signature, unless told not to."""
        signature = inspect.signature

        def evaluating(function, *, annotation_format=1):
            if annotation_format == 1:
                raise NameError("name 'DataFrame' is not defined")
            return signature(function)

        newer = mock.patch.object(sys, "version_info", (3, 14))
        with newer, mock.patch.object(inspect, "signature", evaluating), DAG("d") as d:

            @task
            def f(x, ti=None) -> dict:
                return {"x": x, "context": ti.task_id}

            class Own(liteflow.BaseOperator):
                def __init__(self, *, frame, **kwargs):
                    super().__init__(**kwargs)

                def execute(self, context):
                    """Nothing."""

            f(1)
            Own.partial(task_id="own").expand(frame=[1])
            self.assertTrue(d.task_dict["f"].multiple_outputs)
            run = d.test(db_path=self.db)
        self.assertEqual(run.xcom_pull("f", "context"), "f")

    @unittest.skipUnless(sys.version_info >= (3, 14), "annotations are evaluated at once")
    def test_annotations_may_name_what_there_is_not(self):
        module = self.module("""
            from liteflow import DAG, task
            with DAG("d") as dag:
                @task
                def f(x: DataFrame) -> dict[str, DataFrame]: return {"x": x}
                f(1)
        """)
        self.assertTrue(module.dag.task_dict["f"].multiple_outputs)
        self.assertEqual(module.dag.test(db_path=self.db).xcom_pull("f", "x"), 1)

    def test_multiple_outputs_are_inferred_from_a_dict_annotation(self):
        module = self.module(
            """
            from typing import Any, Mapping, Optional, TypedDict
            class T(TypedDict):
                a: int
            def plain(): ...
            def dict1() -> dict: ...
            def dict2() -> dict[str, Any]: ...
            def mapping() -> Mapping[str, int]: ...
            def typed() -> T: ...
            def liste() -> list[dict]: ...
            def optional() -> Optional[dict]: ...
            def unknown() -> DataFrame[str]: ...
            with DAG("outputs") as dag:
                for f in (plain, dict1, dict2, mapping, typed, liste, optional, unknown):
                    task(f)()
            """
        )
        found = {t.task_id: bool(t.multiple_outputs) for t in module.dag.tasks}
        self.assertEqual(
            found,
            {
                "plain": False,
                "dict1": True,
                "dict2": True,
                "mapping": True,
                "typed": True,
                "liste": False,
                "optional": False,
                "unknown": False,
            },
        )

    def test_multiple_outputs_are_inferred_through_annotated(self):
        module = self.module("""
            from typing import Annotated
            with DAG("d") as dag:
                @task
                def f() -> Annotated[dict[str, int], "by name"]: return {"x": 1}
                @task
                def g() -> Annotated[list[dict], "by name"]: return [{}]
                f(), g()
        """)
        found = [bool(t.multiple_outputs) for t in module.dag.tasks]
        self.assertEqual(found, [True, False])

    def test_dag_decorator(self):
        @dag(dag_id="named", tags=["t"])
        def build(n, m=2):
            """What it does."""
            task(sample)(n, m)

        made = build(1)
        self.assertEqual((made.dag_id, made.doc_md, made.tags), ("named", "What it does.", {"t"}))
        self.assertEqual(made.params["m"], 2)
        with self.assertRaises(TypeError):
            build()

        three = Param(3, minimum=2)

        @dag("declared", dag_display_name="Declared")
        def declared(n=three):
            task(sample)(n)

        made = declared()
        self.assertEqual(made.dag_display_name, "Declared")
        self.assertEqual(made.test(db_path=self.db).xcom_pull("sample"), 3)
        self.assert_raises(
            ParamValidationError, "minimum", made.test, run_conf={"n": 1}, db_path=self.db
        )
        made.params = {}
        self.assertEqual(made.test(db_path=self.db).xcom_pull("sample"), 3)

    def test_a_value_for_a_declared_param_leaves_its_schema(self):
        params = {"n": Param(1, "how many", type="integer")}

        @dag("of_a_function", params=params)
        def build(n):
            task(sample)(n)

        with DAG("assigned", params=params) as assigned, DAG("named", params=params) as named:
            assigned.params["n"] = 2
            assigned.params["new"] = "n"
            named.param("n", 2)
            wrong = liteflow.ParamValidationError, "param 'n': 'x' does not fit type 'integer'"
            self.assert_raises(*wrong, named.param, "n", "x")
            self.assert_raises(*wrong, named.params.update, n="x")
            named.params.update({"n": 3})
            named.params |= {"n": 2}
            self.assertEqual(named.params.setdefault("n", 5), 2)
            self.assert_raises(ParamValidationError, "JSON", named.params.setdefault, "m", {1})
        self.assert_raises(*wrong, build, "x")
        for made in (build(2), assigned, named):
            declared = dict(made.params)["n"]
            self.assertEqual((declared.default, declared.description), (2, "how many"))
            self.assert_raises(*wrong, made.test, run_conf={"n": "x"}, db_path=self.db)
        self.assertEqual((params["n"].default, assigned.params["new"]), (1, "n"))
        assigned.params["new"], assigned.params["n"] = Param("m", enum=["m"]), Param("x")
        self.assert_raises(ParamValidationError, "'new'", assigned.params.update, new="n")
        self.assertEqual(assigned.params["n"], "x")

    def test_a_param_is_read_by_its_name_as_its_default(self):
        with DAG(
            "d", params={"a": Param("x", type="string"), "none": Param(type="string"), "n": 1}
        ) as d:
            made = task(params={"b": Param([1])})(sample)(1).operator
        self.assertEqual((d.params["a"], d.params.get("n"), d.params.get("no", 5)), ("x", 1, 5))
        self.assertEqual((made.params["b"], f"{d.params['a']}"), ([1], "x"))
        self.assert_raises(liteflow.ParamValidationError, "no default", d.params.get, "none")

        @dag("other")
        def build_other():
            pass

        @dag
        def unset(x=...):
            pass

        self.assert_raises(liteflow.ParamValidationError, "'x' must be JSON", unset)

        self.assertEqual(build_other().dag_id, "other")
        self.assertEqual(dag(build_other.__wrapped__)().dag_id, "build_other")

    def test_dag_task_adds_to_its_dag(self):
        d = self.build()

        @d.task
        def one():
            pass

        @d.task(retries=2)
        def two():
            pass

        one() >> two()
        self.assertEqual([t.retries for t in d.tasks], [0, 2])

    def test_fail_fast_allows_one_rule(self):
        with DAG("d", fail_fast=True):
            self.assert_raises(
                liteflow.FailFastDagInvalidTriggerRule,
                "all_done",
                task(trigger_rule="all_done")(sample),
                1,
            )

    def test_a_setups_block_inside_anothers(self):
        with self.build() as d:
            names = ("outer", "stop", "inner", "drop", "own", "late")
            outer, stop, inner, drop, own, late = (
                liteflow.BaseOperator(task_id=name) for name in names
            )
            with stop.as_teardown(setups=outer) as scope:
                scope.add_task(own)
                with drop.as_teardown(setups=inner):
                    liteflow.BaseOperator(task_id="work")
                for _ in range(2):
                    self.assert_raises(
                        liteflow.AirflowException, "before any inner one", scope.add_task, late
                    )
            with stop.as_teardown() as scope:
                pass
            self.assert_raises(liteflow.AirflowException, "in its `with`", scope.add_task, late)
            alone, within = (liteflow.BaseOperator(task_id=name) for name in ("alone", "within"))
            with alone.as_teardown(), within.as_teardown():  # neither of a setup
                for name in ("bare", "also"):
                    liteflow.BaseOperator(task_id=name)
                liteflow.BaseOperator(task_id="spare").as_setup()  # no work, and of no teardown
        self.assertEqual(
            {task_id: t.upstream_task_ids for task_id, t in d.task_dict.items()},
            {
                "outer": set(),
                "own": {"outer"},
                "inner": {"outer"},
                "work": {"inner"},
                "drop": {"inner", "work"},
                "stop": {"outer", "own", "drop"},
                "late": set(),
                "bare": set(),
                "also": set(),
                "spare": set(),
                "within": {"bare", "also"},
                "alone": {"within"},
            },
        )

    def test_work_that_is_joined_from_outside_stands_inside_its_setup_all_the_same(self):
        with self.build() as d:
            first, last, up, down = (
                liteflow.BaseOperator(task_id=name) for name in ("first", "last", "up", "down")
            )
            with down.as_teardown(setups=up):
                chain(first, [liteflow.BaseOperator(task_id=name) for name in "ab"], last)
        self.assertEqual(d["a"].upstream_task_ids, {"first", "up"})
        self.assertEqual(d["b"].upstream_task_ids, {"first"})
        self.assertEqual(d["down"].upstream_task_ids, {"b", "up"})

    def test_a_list_on_the_left_of_either_arrow(self):
        with self.build() as d:
            a, b, c = (liteflow.BaseOperator(task_id=name) for name in "abc")
            self.assertIs([a] >> b, b)
            self.assertIs([a, b] << c, c)
        self.assertEqual([t.upstream_task_ids for t in (a, b, c)], [{"c"}, {"a", "c"}, set()])
        self.assertEqual(d.task_ids, ["a", "b", "c"])

    def test_an_operator_executes_without_a_run(self):
        with self.build() as d:
            task.python(sample)(1)
            for kind in ("BaseOperator", "BaseSensorOperator", "BaseBranchOperator"):
                getattr(liteflow, kind)(task_id=kind)
        self.assertEqual(d["sample"].execute({}), 1)
        self.assert_raises(NotImplementedError, "no execute(", d["BaseOperator"].execute, {})
        self.assert_raises(NotImplementedError, "no poke(", d["BaseSensorOperator"].poke, {})
        choose = d["BaseBranchOperator"].execute
        self.assert_raises(NotImplementedError, "no choose_branch(", choose, {})

    def test_a_group_may_be_named_by_its_decorator_alone(self):
        @task_group("named")
        def group():
            """What it does."""
            task(sample)(1)

        with self.build() as d:
            group()
        self.assertEqual(d.task_ids, ["named.sample"])
        self.assertEqual(d.task_group_dict["named"].tooltip, "What it does.")

    def test_a_param_as_an_argument_with_its_own_default_or_none(self):
        with DAG("d", params={"n": 1}) as d:
            task(task_id="own")(sample)(d.param("n"))
            task(task_id="new")(sample)(d.param("m", 2))
        self.assertEqual(d.params, {"n": 1, "m": 2})
        run = d.test(db_path=self.db)
        self.assertEqual([run.xcom_pull(name) for name in ("own", "new")], [1, 2])

    def test_a_mapped_operator_waits_for_the_results_in_its_other_arguments(self):
        with self.build() as d:
            made = [task(sample)(1) for _ in range(2)]
        given = {"env": {"A": made[0]}, "dag": d}
        liteflow.BashOperator.partial(task_id="m", **given).expand(cwd=["a", made[1]])
        self.assertEqual(d["m"].upstream_task_ids, {"sample", "sample__1"})

    def test_a_field_may_be_set_before_the_base_class_is_asked_and_after(self):
        class Early(liteflow.BaseOperator):
            template_fields = ("given",)

            def __init__(self, given, **settings):
                self.given = given
                super().__init__(**settings)

        with self.build() as d, mock.patch.dict(sys.modules, {"jinja2": None}):
            made = [task(sample)(1) for _ in range(2)]
            Early(task_id="early", given=[made[0]]).given = made[1]
            task.bash(task_id="bash")(sample)(1).operator.env = {"A": made[0], "B": "{{ ds }}"}
        self.assertEqual(d["early"].upstream_task_ids, {"sample", "sample__1"})
        self.assertEqual(d["bash"].upstream_task_ids, {"sample"})

    def test_placeholders_of_the_same_result_are_equal(self):
        with self.build() as d:
            made = task(sample)(1)
        self.assertEqual(made, liteflow.XComArg(d["sample"]))
        self.assertEqual(len({made, liteflow.XComArg(d["sample"]), made["k"]}), 2)
        self.assertNotEqual(made, made["k"])
        self.assertNotEqual(made["j"], made["k"])
        self.assertNotEqual(made, object())
        for name, value in (
            ("trigger_rule", ".* or one_failed or .*"),
            ("depends_on_past", "False"),
        ):
            said = f"task 'b': {name} must be {value}; found XComArg"
            with self.assertRaisesRegex(ValueError, said):
                liteflow.EmptyOperator(task_id="b", **{name: made})

    def test_variables_come_from_the_environment(self):
        os.environ["AIRFLOW_VAR_THING"] = '{"a": 1}'
        self.addCleanup(os.environ.pop, "AIRFLOW_VAR_THING")
        self.assertEqual(liteflow.Variable.get("thing"), '{"a": 1}')
        self.assertEqual(liteflow.Variable.get("thing", deserialize_json=True), {"a": 1})
        self.assertEqual(liteflow.Variable.get("absent", default=3), 3)
        self.assertIsNone(liteflow.Variable.get("absent", default_var=None))
        self.assert_raises(KeyError, "AIRFLOW_VAR_ABSENT", liteflow.Variable.get, "absent")
        os.environ["AIRFLOW_VAR_THING"] = "{"
        get = functools.partial(liteflow.Variable.get, "thing", deserialize_json=True)
        self.assert_raises(ValueError, "AIRFLOW_VAR_THING is no JSON", get)

    def test_settings_at_their_default_take_no_room_on_a_task(self):
        with self.build() as d:
            for i in range(3):
                task(task_id=f"t{i}", retries=0)(sample)(1)
        self.assertLess(len(vars(d.get_task("t0"))), 29)
        self.assertNotIn("retries", vars(d.get_task("t0")))

    def test_a_function_or_class_of_a_dag_that_is_gone_is_kept_by_nothing(self):
        def made():
            payload = bytes(1000)

            class Own(liteflow.BaseOperator):
                def __init__(self, size, **more):
                    super().__init__(**more)

                def execute(self, context): ...

            @task
            def f(ti=None) -> dict:
                return {"size": len(payload)}

            with DAG("handler") as dag:
                f()
                Own(task_id="own", size=len(payload))
            dag.test(db_path=self.db)
            return weakref.ref(f.function), weakref.ref(Own)

        known = made()
        gc.collect()
        self.assertEqual([x() for x in known], [None, None])


class RefusalsTest(Case):
    """What is wrong is refused where it stands, in a sentence that names it and the remedy."""

    def refused(self, error, said, act, *args, **kwargs):
        with self.assertRaises(error) as caught:
            act(*args, **kwargs)
        self.assertIn(said, str(caught.exception))

    def setUp(self):
        super().setUp()
        self.dag = DAG("d")
        with self.dag:
            self.f = task(one_argument)
            self.group = task_group(group_id="grp")(one_argument)
            self.result = self.f.override(task_id="a")([1])
            self.operator = liteflow.EmptyOperator(task_id="e")
            self.task_group = TaskGroup("g")

    def neighbours(self):
        """What stands beside the right thing, by name."""
        return {
            "a task function": self.f,
            "a group function": self.group,
            "a partial": self.f.partial(x=1),
            "an operator's partial": liteflow.BashOperator.partial(task_id="p"),
            "@task": task,
            "an operator": self.operator,
            "a class": liteflow.EmptyOperator,
            "a result": self.result,
            "a group": self.task_group,
            "a DAG": self.dag,
            "an object": object(),
            "bytes": b"x",
            "nan": float("nan"),
        }

    # For which parameters they are right, apart from those that take any value.
    RIGHT: typing.ClassVar = {
        "an operator": "operator setups other tasks from_tasks to_tasks",
        "a result": "setups other tasks from_tasks to_tasks bash_command env cwd op_args op_kwargs "
        "templates_dict x others dicts",
        "a group": "other tasks to_tasks task_group parent_group",
        "a DAG": "dag",
    }
    ANY = "default default_var fillvalue tooltip ui_color ui_fgcolor group_display_name schedule doc_md const"

    def callables(self):
        """Public callables, each with arguments that are right."""
        with self.dag:
            operators = {
                liteflow.BashOperator: {"bash_command": "true"},
                liteflow.EmptyOperator: {},
                liteflow.PythonSensor: {"python_callable": one_argument},
            }
            for kind, right in operators.items():
                own = dict.fromkeys(liteflow._keywords_of(kind).keys() - {"task_id"})
                known = {n: s for n, s in kind._known_settings.items() if s != liteflow._as_given}
                yield lambda kind=kind, **k: kind(**{"task_id": "t", **k}), {**own, **known}, right
                if kind is liteflow.EmptyOperator:
                    yield lambda **k: task(**{"task_id": "t", **k})(one_argument)(1), known, {}
                    yield lambda **k: self.f.override(**{"task_id": "t", **k})(1), known, {}
            known = {n: s for n, s in liteflow._DAG_SETTINGS.items() if s != liteflow._as_given}
            yield lambda **k: DAG("new", **k), known, {}
            one = {"x": [1]}
            for act, right in (
                (TaskGroup, {"group_id": "t"}),
                (lambda function: task(function), {"function": one_argument}),
                (lambda function: task.bash(retries=1)(function), {"function": one_argument}),
                (lambda function: task_group(function), {"function": one_argument}),
                (lambda function: liteflow.dag(dag_id="x")(function), {"function": one_argument}),
                (lambda condition: task.run_if(condition)(self.f), {"condition": one_argument}),
                (lambda function: self.result.map(function), {"function": one_argument}),
                (lambda others: self.result.zip(others), {"others": self.result}),
                (lambda x: self.f.override(task_id="t")(x), {"x": 1}),
                (lambda x: self.f.override(task_id="t")([{"k": (x,)}]), {"x": 1}),
                (lambda x: self.f.override(task_id="t").expand(x=x), one),
                (lambda x: self.group.override(group_id="t").expand(x=x), one),
                (lambda dicts: self.f.override(task_id="t").expand_kwargs(dicts), {"dicts": []}),
                (liteflow.XComArg, {"operator": self.operator}),
                (self.result.set_downstream, {"other": self.operator}),
                (self.result.set_upstream, {"other": self.operator}),
                (lambda tasks: chain(tasks, self.operator), {"tasks": self.result}),
                (liteflow.cross_downstream, {"from_tasks": [self.result], "to_tasks": []}),
                (lambda **k: self.f.override(task_id="t")(1).as_teardown(**k), {"setups": ()}),
                (
                    Param,
                    {"minimum": 1, "enum": [1], "minLength": 1, "required": [], "type": "null"},
                ),
                (liteflow.Label, {"label": "x"}),
                (liteflow.Variable.get, {"key": "x", "default": 1}),
                (WorkerPool, {}),
                (self.dag.run, {}),
                (self.dag.test, {}),
                (self.dag.get_task, {"task_id": "a"}),
                (self.dag.get_run, {"run_id": self.run.run_id}),
                (self.run.xcom_pull, {"task_id": "a"}),
                (self.run.get_task_instance, {"task_id": "a"}),
                (self.run.get_task_instances, {}),
                (self.run.log, {"task_id": "a"}),
                (self.run.clear, {"task_ids": ["a"]}),
            ):
                names = liteflow._task_parameters(act).names if act is not Param else ()
                yield act, {**dict.fromkeys(names), **right}, right

    def test_every_parameter_refuses_what_stands_beside_the_right_thing(self):
        self.run = self.dag.test(db_path=self.db)
        self.dag.db_path = self.db
        tried = 0
        never = mock.patch.object(liteflow._Run, "execute", lambda run: run.runner.close())
        with never, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for act, names, right in self.callables():
                for name, (kind, value) in itertools.product(names, self.neighbours().items()):
                    tried += 1
                    with self.subTest(act=act, name=name, value=kind):
                        self.check_refusal(act, name, {**right, name: value}, kind)
        self.assertGreater(tried, 2000)

    def check_refusal(self, act, name, arguments, kind):
        taken = self.RIGHT.get(kind, "").split() + self.ANY.split()
        try:
            made = act(**arguments)
        except (TypeError, ValueError, liteflow.AirflowException) as error:
            text = str(error)
            last = [*traceback.walk_tb(error.__traceback__)][-1][0]
            self.assertEqual(last.f_code.co_filename, liteflow.__file__, text)
            self.assertGreater(len(text.split()), 4, text)
        else:
            if isinstance(made, WorkerPool):
                made.shutdown()
            values = name in ("x", "params", "default_args") and kind in (
                "an object",
                "bytes",
                "nan",
            )
            self.assertTrue(name in taken or values, f"{kind} as {name!r} was accepted")
        self.dag.task_dict.pop("t", None)
        self.dag.task_group_dict.pop("t", None)
        self.dag.task_dict.pop("t.a", None)

    # Found one by one.

    def test_a_result_is_no_text(self):
        for act in (lambda: f"got {self.result}", lambda: str(self.result.map(one_argument))):
            self.refused(TypeError, "is no text, but a placeholder", act)

    def test_what_is_made_of_results_names_them(self):
        made = self.result.map(one_argument).zip(self.result)
        of = f"zip() of {self.result!r}, {self.result!r} is neither true nor false"
        self.refused(TypeError, of, bool, made)

    def test_a_groups_argument_is_no_text_either(self):
        with self.dag:
            named = task_group(group_id="n")(lambda n: self.f(f"v{n}"))
            self.refused(TypeError, "argument 'n' is no text", named.expand, n=[1, 2])

    def test_an_async_callback_or_condition_would_never_be_awaited(self):
        async def later(context):
            return False

        said = "can't be an `async def`"
        self.refused(
            TypeError, said, liteflow.EmptyOperator, task_id="t", on_failure_callback=later
        )
        self.refused(TypeError, said, task.run_if, later)
        self.refused(TypeError, said, task_group, later)
        self.refused(TypeError, said, liteflow.dag, later)
        self.refused(TypeError, "stand above @task", task.run_if(one_argument), one_argument)
        task(task_id="awaited")(later)  # a task may be one

    def test_arguments_of_a_dag_have_names(self):
        for many in (lambda *days: None, lambda **more: None):
            self.refused(TypeError, "a param, with a name of its own", liteflow.dag, many)

    def test_an_argument_is_fixed_or_mapped_over(self):
        self.refused(TypeError, "in partial() and in expand()", self.f.partial(x=1).expand, x=[2])

    def test_a_result_is_neither_true_nor_false(self):
        said = "use @task.branch, or ask whether it `is None`"
        self.refused(TypeError, said, lambda: not self.result)
        with self.dag:
            asked = task_group(group_id="asked")(lambda n: self.f(1) if n else self.f(2))
            self.refused(TypeError, said, asked.expand, n=[1, 2])
            for value in ("large", 1, 0.5, True, [1], {}):  # `==` would be false, and `!=` true
                self.refused(TypeError, said, lambda value=value: self.result == value)
                self.refused(TypeError, said, lambda value=value: value != self.result.map(repr))
            compared = task_group(group_id="compared")(lambda n: self.f(n == 1))
            self.refused(TypeError, said, compared.expand, n=[1, 2])
        self.assertFalse(self.result == None)  # noqa: E711

    def test_what_stands_for_a_value_is_named_with_its_remedy(self):
        f = self.f.override(task_id="t")
        with self.dag:
            self.refused(TypeError, "task 't': an argument is no value", f, self.operator)
            self.refused(TypeError, "pass its result, .output of task 'e'", f, [self.operator])
            self.refused(TypeError, "call it, one_argument()", f, {"k": self.group})
            self.refused(TypeError, "call its expand()", f, self.f.partial(x=1))
            self.refused(TypeError, "let its function return the result", f, self.task_group)
            self.refused(TypeError, "make one, EmptyOperator(...)", f, liteflow.EmptyOperator)
            self.refused(ValueError, "call it, one_argument()", self.f.expand, x=self.f)
            self.refused(TypeError, "call it, one_argument()", self.f.expand_kwargs, self.f)

    def test_what_has_no_order_is_named_with_its_remedy(self):
        for other, remedy in (
            (self.group, "call it, one_argument()"),
            (liteflow.EmptyOperator, "make one, EmptyOperator(...)"),
            (self.f.partial(x=1), "call its expand()"),
            (one_argument, "decorate it with @task and call it"),
            (WithoutHash, "decorate it with @task and call it"),
        ):
            self.refused(TypeError, remedy, lambda other=other: self.result >> other)
        with self.assertRaisesRegex(TypeError, "found 3$"):
            self.result >> 3

    def test_a_callback_that_is_a_task_would_do_nothing(self):
        said = "must be a plain function, found <@task one_argument>: one_argument.function is one"
        for name in ("on_failure_callback", "pre_execute", "on_retry_callback"):
            self.refused(TypeError, said, liteflow.EmptyOperator, task_id="t", **{name: self.f})
        self.refused(TypeError, said, task.run_if, self.f)  # `@task.run_if` without a condition
        self.refused(TypeError, said, task, self.f)
        group = liteflow.task_group(one_argument)
        self.refused(TypeError, "found <@task_group one_argument>: one_argument.", task, group)
        self.refused(TypeError, "has no name", task, functools.partial(one_argument, 1))
        self.refused(TypeError, "has no name", task, WithoutHash())
        self.refused(TypeError, "(its settings are by name) must be", task, "an_id")
        self.refused(TypeError, "has no signature", task, max)
        with self.assertRaises(liteflow.AirflowException):
            liteflow.PythonOperator(task_id="t", python_callable=self.f)

    def test_settings_are_of_the_task_as_a_whole(self):
        bash = liteflow.BashOperator.partial(task_id="b", bash_command="true")
        for name in ("retries", "pool", "trigger_rule", "task_id", "dag", "on_success_callback"):
            said = f"{name!r} is a setting of the task as a whole: use partial()"
            self.refused(ValueError, said, bash.expand, **{name: [2]})
            self.refused(ValueError, said, bash.expand_kwargs, [{name: 2}])
        self.refused(TypeError, "unknown argument 'nope'", bash.expand_kwargs, [{"nope": 2}])
        self.refused(TypeError, "unknown argument 'y'", self.f.expand_kwargs, [{"y": 2}])
        with DAG("d"):
            self.refused(TypeError, "did you mean 'task_id'?", self.f.override(taskid="t"), 1)

    def test_an_argument_that_is_given_twice_fails_its_instance(self):
        with DAG("twice") as d:
            fixed = liteflow.BashOperator.partial(task_id="b", bash_command="echo 1")
            fixed.expand_kwargs([{"bash_command": "echo 2"}, {"cwd": "/"}])
        run = d.test(db_path=self.db)
        self.assertEqual(self.states(run), {"b[0]": "failed", "b[1]": "success"})
        self.assertIn("'bash_command' is also in partial()", run.get_task_instance("b", 0).error)

    def test_a_group_that_is_expanded_over_dicts_names_its_arguments(self):
        with DAG("groups") as d:
            any_of = task_group(group_id="any")(lambda **kw: None)
            self.refused(TypeError, "can't fill **kw", any_of.expand_kwargs, [{"x": 1}])

            @task_group
            def g(x, y=7):
                task(task_id="f")(lambda x, y: max(x, y))(x, y)

            g.expand_kwargs([{"x": 1}, {"x": 2, "y": 1}, {"y": 1}])
            g.override(group_id="own").partial(x=4).expand_kwargs([{"y": 5}])
            given = task_group(group_id="gives")(lambda x: (self.f(x), x)[1]).expand(x=[1])
            self.f.override(task_id="outside")(given)
        run = d.test(db_path=self.db)
        self.assertEqual((run.xcom_pull("g.f"), run.xcom_pull("own.f")), ([7, 2], [5]))
        for ti in (run.get_task_instance("g.f", 2), run.get_task_instance("outside")):
            self.assertIn("argument 'x' is outside of its group, or not in what", ti.error)

    def test_an_operator_takes_no_argument_by_position(self):
        said = "EmptyOperator takes keyword arguments only, found 'x'"
        with self.dag:
            self.refused(TypeError, said, liteflow.EmptyOperator, "x", task_id="a")

    def test_an_operator_that_leaves_the_base_class_out(self):
        class Own(liteflow.BaseOperator):
            def __init__(self, name, **kwargs):
                self.name = name

        with self.dag:
            said = "Own.__init__ must call super().__init__(**kwargs)"
            self.refused(TypeError, said, Own, name="x", task_id="own")

    def test_a_name_that_is_wrong_leads_to_the_right_one(self):
        said = "DAG 'x': 'retries' is a setting of tasks: use default_args"
        self.refused(TypeError, said, DAG, "x", retries=2)
        self.refused(TypeError, "did you mean 'dagrun_timeout'?", DAG, "x", timeout=2)
        with self.dag:
            f = self.f.override(task_id="t", timeout=5)
            self.refused(TypeError, "did you mean 'execution_timeout'?", f, 1)

    def test_an_initializer_that_reaches_no_worker(self):
        said = "the pool's initializer, or an argument of it, can't be sent to a worker: "
        for wrong in ({"initializer": lambda: None}, {"initargs": [threading.Lock()]}):
            with WorkerPool(1, "spawn", **{"initializer": one_argument, **wrong}) as pool:
                run = functools.partial(self.dag.run, db_path=self.db, executor=pool)
                self.refused(liteflow.UnreachableTask, said, run)
        with mock.patch.object(sys, "argv", [threading.Lock()]):  # it is not about that
            run = functools.partial(self.dag.run, db_path=self.db, mp_context="spawn")
            self.refused(TypeError, "cannot pickle '_thread.lock' object", run)
        self.assertFalse(self.db.exists())

    def test_arguments_beside_the_context(self):
        def tell(reason="none"):
            return reason

        said = "task 'tell': parameter 'reason' is filled from the context: rename it"
        self.refused(ValueError, said, task, tell)
        with self.dag:
            said = "missing a required argument: 'x': 'ti', of the context, took one: name them"
            self.refused(TypeError, said, task(lambda ti, x: x), 1)

    def test_a_pool_that_has_no_size(self):
        with DAG("d") as d:
            self.f.override(task_id="t", pool="db")(1)
            self.f.override(task_id="u", pool="db", pool_slots=3)(1)
        said = "task 't' takes 1 of pool 'db', whose size is not given: run with pools={'db': N}"
        self.refused(ValueError, said, d.run, db_path=self.db)
        said = "task 'u' takes 3 of pool 'db', whose size is 2: run with pools={'db': N}"
        self.refused(ValueError, said, d.run, db_path=self.db, pools={"db": 2})
        self.assertFalse(self.db.exists())

    def test_a_schedule_that_is_none(self):
        for schedule in (5, 0.5, b"@daily", object()):
            self.refused(ValueError, "cron or a timedelta", DAG, "other", schedule=schedule)

    def test_no_mapping_inside_a_mapping(self):
        @task_group
        def inner(x):
            self.f(x)

        @task_group
        def nested(x):
            inner.expand(x=[1])

        @task_group
        def mapped(x):
            self.f.expand(x=[1])

        with DAG("other"):
            self.refused(NotImplementedError, "can't nest", nested.expand, x=[1])
            self.refused(NotImplementedError, "inside a mapped group", mapped.expand, x=[1])

    def test_setup_and_teardown_exclude_each_other(self):
        with self.dag:
            s, t, plain = (self.f.override(task_id=n)(1) for n in "stp")
            self.refused(ValueError, "can't be a teardown, too", s.as_setup().as_teardown)
            self.refused(ValueError, "can't be a setup, too", t.as_teardown().as_setup)
            self.refused(ValueError, "a setup, too", plain.as_teardown, setups=t)
            self.refused(TypeError, "setups of task", plain.as_teardown, setups=self.task_group)
            self.refused(liteflow.AirflowException, "neither", plain.__enter__)
        both = "is a @setup or @teardown already"
        self.refused(ValueError, both, liteflow.setup, teardown(one_argument))
        self.refused(ValueError, both, teardown, liteflow.setup(one_argument))

    def test_a_rule_of_default_args_is_for_other_tasks_than_teardowns(self):
        with DAG("d", default_args={"trigger_rule": "all_done"}):
            made = teardown(one_argument)()
            other = task(task_id="other")(one_argument)()
        self.assertEqual(made.operator.trigger_rule, "all_done_setup_success")
        self.assertEqual(other.operator.trigger_rule, "all_done")
        with DAG("d"):
            own = task(trigger_rule="all_done")(one_argument)().as_teardown()
            self.assertEqual(own.operator.trigger_rule, "all_done_setup_success")  # Airflow's, too
            ruled = teardown(trigger_rule="all_done")(one_argument)
            self.refused(ValueError, "has its own rule", ruled)

    def test_a_group_of_another_dag(self):
        with DAG("other"):
            self.refused(ValueError, "is of DAG 'd'", self.task_group.__enter__)
            of = self.f.override(task_group=self.task_group)
            self.refused(ValueError, "is of DAG 'd', not of 'other'", of, 1)
        self.refused(TypeError, "task_group must be TaskGroup", self.f.override(task_group="g"), 1)

    def test_a_hook_of_a_subclass_may_call_that_of_its_base(self):
        seen = []

        class Own(liteflow.BaseOperator):
            def pre_execute(self, context):
                super().pre_execute(context)
                seen.append("pre")

            def post_execute(self, context, result):
                super().post_execute(context, result)
                seen.append(result)

            def execute(self, context):
                return 3

        with DAG("hooks") as d:
            Own(task_id="own")
            liteflow.EmptyOperator(task_id="e", pre_execute=None)
        d.test(db_path=self.db).raise_if_failed()
        self.assertEqual(seen, ["pre", 3])

    def test_settings_of_a_dag_are_checked_when_they_are_assigned_later(self):
        for name, value in {
            "max_active_tasks": "x",
            "dagrun_timeout": -1,
            "fail_fast": "no",
        }.items():
            with self.assertRaises((TypeError, ValueError)) as caught:
                setattr(self.dag, name, value)
            self.assertIn(f"DAG 'd': {name}", str(caught.exception))
        self.dag.dagrun_timeout = 5
        self.assertEqual(self.dag.dagrun_timeout.total_seconds(), 5)

    def test_params_that_only_count_as_json(self):
        class Color(str, enum.Enum):
            RED = "red"

        for held, wanted in (
            ({"p": Color.RED, "q": collections.OrderedDict(k=[Color.RED])}, {"q": {"k": ["red"]}}),
            ({"p": "red", "q": (1,), "r": {1: 2}}, {"q": [1], "r": {"1": 2}}),
        ):
            for of_dag, of_task in ((held, {}), ({}, held)):
                with DAG("d", params=of_dag) as d:
                    task(task_id="f", params=of_task)(lambda params: dict(params))()
                found = d.test(db_path=self.db).raise_if_failed().xcom_pull("f")
                self.assertEqual(found, {"p": "red", **wanted})

    def test_params_may_be_none_beside_those_of_default_args(self):
        with DAG("d", default_args={"params": {"a": 1}}):
            made = task(params=None)(one_argument)().operator
        self.assertEqual(made.dag.params | made.params, {"a": 1})
        with DAG("d"), TaskGroup("g", default_args={"params": {"a": 1}}):
            self.assertEqual(task(params=None)(one_argument)().operator.params, {"a": 1})

    def test_what_airflow_accepts(self):
        with DAG("d") as d:
            liteflow.EmptyOperator(task_id="e", pool=None, sla=5)
            TaskGroup("g", doc_md="text")
            task(task_id="f")(one_argument)(d.param("size", 3))
        self.assertEqual(Param(1, schema={"minimum": 0}).schema, {"minimum": 0})
        self.assertEqual(d.test(db_path=self.db).xcom_pull("f"), 3)
        self.assertEqual(d.test(db_path=self.db, run_conf={"size": 4}).xcom_pull("f"), 4)

    def test_a_class_is_no_event_and_no_executor(self):
        for wrong in (
            {"stop": threading.Event},
            {"executor": concurrent.futures.ThreadPoolExecutor},
        ):
            self.refused(TypeError, f"{min(wrong)} must be", self.dag.run, db_path=self.db, **wrong)

    def test_what_a_run_is_asked_for_is_checked_before_it_begins(self):
        for error, said, wrong in (
            (TypeError, "resume must be bool", {"resume": 1}),
            (TypeError, "wait must be bool", {"wait": "yes"}),
            (ValueError, "pools['p'] must be 1 or more", {"pools": {"p": 0}}),
            (TypeError, "conf must be JSON", {"conf": {"x": float("nan")}}),
            (ValueError, "leave them out", {"resume": True, "logical_date": liteflow._utcnow()}),
            (ValueError, "not both", {"executor": pool(), "mp_context": "spawn"}),
        ):
            self.refused(error, said, self.dag.run, db_path=self.db, **wrong)
        liteflow._Store(str(self.db)).close()
        again = {"resume": True, "db_path": self.db}
        self.refused(liteflow.RunNotFound, "nothing to resume", self.dag.run, **again)

    def test_dicts_have_names_for_keys(self):
        for name in ("default_args", "params"):
            self.refused(
                TypeError, f"{name} must be a dict with str keys", DAG, "d", **{name: {1: 2}}
            )

    def test_numbers_and_times_that_mean_without_end(self):
        with DAG("d", dagrun_timeout=datetime.timedelta.max) as d:
            most = {"pool_slots": 10**30, "max_active_tis_per_dag": 10**30}
            task(execution_timeout=datetime.timedelta.max, **most)(one_argument)(1)
        d.test(db_path=self.db).raise_if_failed()

    def test_any_number_of_retries_is_recorded(self):
        with DAG("d", default_args={"retries": 10**30}) as d:
            task(retries=sys.maxsize)(one_argument).override(task_id="f")(1)
            liteflow.EmptyOperator(task_id="e")
        run = d.test(db_path=self.db)
        self.assertEqual([ti.max_tries for ti in run.get_task_instances()], [2**31 - 1] * 2)

    def test_what_an_expansion_lacks_or_has_too_much_is_refused_before_it_runs(self):
        def two(x, y):
            pass

        def many(*x):
            pass

        with self.dag:
            for act, said in (
                (lambda: task(two).expand(x=[1]), "two() missing a required argument: 'y'"),
                (lambda: task(two)(1, 2, 3), "two() got too many positional arguments"),
                (lambda: task(two)(1, x=2), "two() got multiple values for argument 'x'"),
                (lambda: task(many).expand(x=[1]), "got an unknown argument 'x'; there is none"),
                (lambda: task(two).expand_kwargs([{"x": 1, 2: 3}]), "got an unknown argument '2'"),
            ):
                self.refused(TypeError, said, act)
            task(two).partial(y=1).expand(x=[1])
            task(two).expand_kwargs([{"x": 1, "y": 2}])

    def test_what_would_have_to_be_awaited_is_refused(self):
        async def later(x):
            pass

        for act in (
            lambda: self.result.map(later),
            lambda: self.f.override(on_success_callback=functools.partial(later))(1),
            lambda: task.run_if(functools.partial(later, 1))(self.f),
            lambda: liteflow.BashOperator(
                task_id="b", bash_command="true", output_processor=later, dag=self.dag
            ),
        ):
            self.refused(TypeError, "can't be an `async def`", act)

    def test_a_fillvalue_that_cannot_travel_is_refused_before_anything_runs(self):
        self.refused(
            TypeError, "a plain value", self.result.zip, self.result, fillvalue=[self.result]
        )
        with self.dag:
            zipped = self.result.zip(self.result, fillvalue=lambda: 0)
            self.f.expand(x=zipped.map(str).concat(self.result))
        self.refused(
            liteflow.UnreachableTask, "argument 'fillvalue'", self.dag.test, db_path=self.db
        )
        self.assertFalse(self.db.exists())

    def test_what_dag_test_can_not_do_is_refused(self):
        for name in ("run_after", "conn_file_path", "use_executor", "mark_success_pattern"):
            self.refused(ValueError, "takes only", self.dag.test, **{name: "x"})

    def test_a_slip_in_conf_or_pool_is_refused_on_the_command_line(self):
        with DAG("d", params={"limit": 1}) as d:
            task(params={"own": 1})(sample)(1)
        for argv, said in (
            (["--conf", '{"limti": 3}'], "DAG 'd' has no param 'limti'; did you mean 'limit'?"),
            (["--conf", '{"onw": 3}'], "DAG 'd' has no param 'onw'; did you mean 'own'?"),
            (["--pool", "gpuu=1"], "DAG 'd' has no pool 'gpuu'; there is"),
        ):
            err = io.StringIO()
            with contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as caught:
                d.cli([*argv, "--db", str(self.db)])
            self.assertEqual(caught.exception.code, 2)
            self.assertIn(said, err.getvalue())
        self.assertFalse(self.db.exists())

    def test_a_misspelt_task_or_key_of_a_run_is_named(self):
        with DAG("d") as d:
            task(task_id="load", multiple_outputs=True)(lambda: {"rows": 1})()
            task(task_id="each")(one_argument).expand(x=[5, 6])
        run = d.test(db_path=self.db)
        self.refused(liteflow.TaskNotFound, "did you mean 'load'?", run.xcom_pull, "laod")
        self.refused(liteflow.XComNotFound, "did you mean 'rows'?", run.xcom_pull, "load", "row")
        self.refused(liteflow.TaskNotFound, "did you mean 'load'?", run.log, "laod")
        self.refused(
            ValueError, "state must be queued or running or", run.get_task_instances, "succes"
        )
        self.assertEqual(run.xcom_pull("each"), [5, 6])
        self.assertEqual(run.xcom_pull("each", map_index=1), 6)

    def test_a_failed_run_says_what_failed(self):
        def bad(x):
            raise ValueError(f"bad {x}")

        with DAG("d") as d:
            task(task_id="each")(bad).expand(x=[5, 6])
        run = d.test(db_path=self.db)
        with self.assertRaises(liteflow.DagRunFailed) as caught:
            run.raise_if_failed()
        self.assertIn("each[1]: ValueError: bad 6", str(caught.exception))
        self.assertIs(caught.exception.run, run)
        self.assertIn("[failed: each[0]: ValueError: bad 5; ", repr(run))
        self.db.unlink()
        self.assertIn("[failed]", repr(run))


class ParamTest(Case):
    def check(self, value, **schema):
        try:
            return Param(**schema).resolve(value)
        except ParamValidationError:
            return "refused"

    def test_an_argument_costs_what_it_is_itself_however_large_others_are(self):
        @liteflow.dag
        def sized(a=1, b=2, rows=None):
            @task
            def use(a, b):
                return a + b

            use(a, b)

        with mock.patch.object(liteflow, "_plain_copy", wraps=liteflow._plain_copy) as copied:
            run = sized().test(db_path=self.db, run_conf={"rows": list(range(10))})
        self.assertEqual(run.xcom_pull("use"), 3)
        self.assertEqual([call.args[0] for call in copied.mock_calls], [1, 2])

    def test_each_keyword_accepts_and_refuses(self):
        for schema, good, bad in (
            ({"type": "integer"}, 3, "3"),
            ({"type": "integer"}, 3.0, True),
            ({"type": "number"}, 1.5, True),
            ({"type": "string"}, "x", 1),
            ({"type": "boolean"}, True, 1),
            ({"type": "null"}, None, 0),
            ({"type": ["null", "string"]}, None, 1),
            ({"type": "array"}, [1], {}),
            ({"type": "object"}, {}, []),
            ({"enum": [1, "a"]}, "a", "b"),
            ({"enum": [1]}, 1, True),
            ({"const": 5}, 5, 6),
            ({"minimum": 2}, 2, 1),
            ({"maximum": 2}, 2, 3),
            ({"exclusiveMinimum": 2}, 3, 2),
            ({"exclusiveMaximum": 2}, 1, 2),
            ({"multipleOf": 7}, 42, 43),
            ({"multipleOf": 0.1}, 1, 1.05),
            ({"multipleOf": 2}, 10**17, 10**17 + 1),
            ({"minLength": 2}, "ab", "a"),
            ({"maxLength": 2}, "ab", "abc"),
            ({"pattern": "^a"}, "ab", "ba"),
            ({"format": "date"}, "2024-02-29", "2023-02-29"),
            ({"format": "date"}, "2024-02-29", "20240229"),
            ({"format": "date-time"}, "2024-01-01T00:00:00+00:00", "yesterday"),
            ({"format": "time"}, "12:30:00", "noon"),
            ({"format": "duration"}, "P1DT2H", "P"),
            ({"format": "idn-email"}, "me@example.org", "me"),
            ({"items": {"type": "integer"}}, [1, 2], [1, "2"]),
            ({"minItems": 1}, [1], []),
            ({"maxItems": 1}, [1], [1, 2]),
            ({"required": ["a"]}, {"a": 1}, {}),
            ({"properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": "x"}),
        ):
            with self.subTest(schema=schema):
                self.assertEqual(self.check(good, **schema), good)
                self.assertEqual(self.check(bad, **schema), "refused")

    def test_a_keyword_says_nothing_of_values_of_another_kind(self):
        self.assertEqual(self.check("x", minimum=3), "x")
        self.assertEqual(self.check(1, pattern="a"), 1)

    def test_a_keyword_beside_a_schema_is_checked_with_it(self):
        rules = {"schema": {"type": "integer"}, "minimum": 3}
        self.assertEqual([self.check(x, **rules) for x in (3, 2, 3.5)], [3, "refused", "refused"])

    def test_a_keyword_that_is_not_checked_is_refused(self):
        for schema in (
            {"multipleOf": 0},
            {"uniqueItems": True},
            {"format": "uri"},
            {"type": "float"},
            {"items": {"uniqueItems": True}},
            {"properties": {"a": {"uniqueItems": True}}},
        ):
            with self.subTest(schema=schema), self.assertRaises(ValueError):
                Param(1, **schema)

    def test_the_docstring_names_each_keyword_and_format_that_is_checked(self):
        named = set(re.findall(r"[\w-]+", Param.__doc__))
        plain = liteflow._KEYWORDS["title"]
        checked = {name for name, entry in liteflow._KEYWORDS.items() if entry is not plain}
        self.assertLessEqual(checked | {*liteflow._FORMATS}, named)

    def test_a_default_must_be_json(self):
        with self.assertRaises(ParamValidationError):
            Param({1, 2})

    def test_a_wrong_or_missing_value_makes_no_run(self):
        d = DAG("p", params={"n": Param(type="integer"), "m": 3})
        with d:
            made = task(params={"own": Param([1], type="array")})(sample)(1).operator
        for conf, word, name in (
            ({}, "no value", "DAG 'p': param 'n'"),
            ({"n": "x"}, "integer", "DAG 'p': param 'n'"),
            ({"n": 1, "own": 2}, "array", "task 'sample': param 'own'"),
            ({"n": 1}, "must be JSON", "task 'sample': param 'own'"),
        ):
            with self.assertRaises(ParamValidationError) as caught:
                d.run(db_path=self.db, conf=conf)
            self.assertIn(word, str(caught.exception))
            self.assertIn(name, str(caught.exception))
            made.params["own"].append({2})  # which counts where no other is given
        self.assertFalse(self.db.exists())

    def test_a_plain_default_that_became_no_json_is_named(self):
        for kind in ("DAG", "task"):
            given = {"plain": [1]}
            with DAG("p", params=given if kind == "DAG" else None) as d:
                task(params=given if kind == "task" else None)(sample)(1)
            given["plain"].append({2})
            name = {"DAG": "DAG 'p'", "task": "task 'sample'"}[kind]
            why = f"^{name}: param 'plain': Param default must be JSON"
            with self.assertRaisesRegex(ParamValidationError, why):
                d.run(db_path=self.db)

    def test_each_param_of_a_task_may_be_as_large_as_a_text(self):
        with DAG("p") as d, mock.patch.object(liteflow, "_TEXT_LIMIT", 100):
            task(params={"a": "a" * 60, "b": "b" * 60})(sample)(1)
            self.assertEqual(d.test(db_path=self.db).state, "success")


# --- Plan -----------------------------------------------------------------------------------------


class Oracle:
    """The trigger rules by brute force: everything is counted anew each time it is asked."""

    def __init__(self, d: Dag):
        self.dag = d
        self.state: dict[str, str] = {}
        self.ready: set[str] = set()

    def decide(self, t) -> str | None:
        ups = [self.state.get(u) for u in t.upstream_task_ids]
        ended = [s for s in ups if s in ("success", "failed", "skipped", "upstream_failed")]
        s, f, k = ended.count("success"), ended.count("failed"), ended.count("skipped")
        u, n, done = ended.count("upstream_failed"), len(ups), len(ended) == len(ups)
        rule = t.trigger_rule.value
        if n == 0:
            return "run"
        if rule == "all_success":
            if f + u:
                return "upstream_failed"
            return None if not done else "skipped" if k else "run"
        if rule == "all_failed":
            return "skipped" if s + k else "run" if f + u == n else None
        if rule == "all_done":
            return "run" if done else None
        if rule == "all_done_min_one_success":
            return "skipped" if k else None if not done else "run" if s else "upstream_failed"
        if rule == "one_success":
            if s:
                return "run"
            return None if not done else "skipped" if k == n else "upstream_failed"
        if rule == "one_failed":
            return "run" if f + u else "skipped" if done else None
        if rule == "one_done":
            return "run" if s + f else "skipped" if done else None
        if rule == "none_failed":
            return "upstream_failed" if f + u else "run" if done else None
        if rule == "none_failed_min_one_success":
            if f + u:
                return "upstream_failed"
            return None if not done else "skipped" if k == n else "run"
        if rule == "none_skipped":
            return "skipped" if k else "run" if done else None
        if rule == "all_skipped":
            return "skipped" if s + f + u else "run" if k == n else None
        assert rule == "always"
        return "run"

    def settle(self):
        while True:
            decided = {
                t.task_id: what
                for t in self.dag.tasks
                if t.task_id not in self.state
                and t.task_id not in self.ready
                and (what := self.decide(t)) is not None
            }
            if not decided:
                return
            for task_id, what in decided.items():
                if what == "run":
                    self.ready.add(task_id)
                else:
                    self.state[task_id] = what


RULES = [rule.value for rule in TriggerRule if rule != "all_done_setup_success"]


def random_dag(rng: random.Random) -> Dag:
    d = DAG(f"random{next(_numbers)}")
    density = rng.choice([0.15, 0.4, 0.8])
    with d:
        tasks = []
        for i in range(rng.randrange(1, 9)):
            rule = rng.choice(RULES) if rng.random() < 0.8 else "all_success"
            made = liteflow.BaseOperator(
                task_id=f"t{i}", trigger_rule=rule, retries=rng.choice([0, 0, 1, 2])
            )
            for up in tasks:
                if rng.random() < density:
                    up >> made
            tasks.append(made)
    return d


ENDS = ["success", "skipped", "failed", "fatal"]


class PlanTest(Case):
    def test_random_graphs_against_brute_force(self):
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        rng = random.Random(seed)
        for number in range(20_000 if SOAK else 3_000):
            with self.subTest(seed=seed, number=number):
                self.compare(random_dag(rng), rng)

    def compare(self, d: Dag, rng: random.Random):
        """Drive the plan in a random order; after each event it must say what the oracle says."""
        plan, oracle = liteflow._Plan(d), Oracle(d)
        running, now = [], 0.0
        while True:
            plan.settle()
            oracle.settle()
            while plan.ready_count(now):
                instance = plan.take()
                plan.start(instance)
                running.append(instance)
            states = {
                i.task_id: i.state.value for i in plan.instances() if i.state in liteflow._ENDED
            }
            self.assertEqual(states, oracle.state)
            self.assertEqual({i.task_id for i in running}, oracle.ready)
            if not running:
                break
            instance = running.pop(rng.randrange(len(running)))
            status = rng.choice(ENDS)
            plan.finish(instance, status, now)
            retried = status == "failed" and instance.try_number <= instance.max_tries
            if not retried:
                oracle.ready.discard(instance.task_id)
                oracle.state[instance.task_id] = {"fatal": "failed"}.get(status, status)
        self.assertEqual(plan.unfinished, 0)
        leaves = [oracle.state[t.task_id] for t in d.leaves]
        failed = any(state in ("failed", "upstream_failed") for state in leaves)
        self.assertEqual(plan.run_state(), "failed" if failed else "success")

    def drive(self, plan, outcomes, now=0.0):
        """Run everything that is ready, with outcomes by task id; the order of starts."""
        order = []
        while True:
            plan.settle()
            if not plan.ready_count(now):
                return order
            instance = plan.take()
            plan.start(instance)
            order.append(instance.task_id)
            plan.finish(instance, outcomes.get(instance.task_id, "success"), now)

    def test_every_rule_decides_once_all_is_done(self):
        for rule in TriggerRule:
            for ends in itertools.product(range(3), repeat=4):
                with self.subTest(rule=rule, ends=ends):
                    if any(ends):
                        self.assertIsNotNone(liteflow._by_rule(rule, *ends, 0))

    def test_no_rule_takes_back_what_it_decided_early(self):
        # What is decided while upstreams are pending must hold however they end: or the faster
        # worker would decide.
        for rule in TriggerRule:
            for ends in itertools.product(range(3), repeat=4):
                early = liteflow._by_rule(rule, *ends, 1)
                if early is None:
                    continue
                for more in itertools.product(range(2), repeat=4):
                    with self.subTest(rule=rule, ends=ends, more=more):
                        both = [a + b for a, b in zip(ends, more, strict=True)]
                        self.assertEqual(liteflow._by_rule(rule, *both, 1), early)
                        self.assertEqual(liteflow._by_rule(rule, *both, 0), early)

    def test_retries_wait_their_delay_and_end(self):
        with DAG("d") as d:
            liteflow.BaseOperator(task_id="a", retries=2, retry_delay=5)
        plan = liteflow._Plan(d)
        starts = []
        now = 0.0
        while plan.unfinished:
            plan.settle()
            if plan.ready_count(now):
                instance = plan.take()
                plan.start(instance)
                starts.append(now)
                plan.finish(instance, "failed", now)
            else:
                now = plan.next_time()
        self.assertEqual(starts, [0.0, 5.0, 10.0])
        self.assertEqual(instance.state, "failed")
        self.assertEqual(plan.run_state(), "failed")

    def test_backoff_is_airflows_formula(self):
        with DAG("d") as d:
            made = liteflow.BaseOperator(
                task_id="a", retry_delay=10, retry_exponential_backoff=2, max_retry_delay=70
            )
        when = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
        instance = next(liteflow._Plan(d).instances())
        waits = []
        for instance.try_number in (1, 2, 3, 4):
            base = 10 * 2 ** (instance.try_number - 1)
            name = f"d#a#{when}#{instance.try_number}".encode()
            jitter = int(hashlib.sha1(name).hexdigest(), 16) % base
            waits.append((liteflow._retry_wait(instance, when), min(base + jitter, 70)))
        for found, expected in waits:
            self.assertEqual(found, expected)
        made.retry_exponential_backoff = 1.0
        self.assertEqual(liteflow._retry_wait(instance, when), 10)
        made.retry_exponential_backoff, made.max_retry_delay = 9.0, None
        instance.try_number = 400
        self.assertEqual(liteflow._retry_wait(instance, when), 24 * 60 * 60)
        instance.try_number, made.retry_delay = 1, datetime.timedelta(0)
        self.assertEqual(liteflow._retry_wait(instance, when), 1)

    def test_max_active_tasks_bounds_what_runs(self):
        with DAG("d", max_active_tasks=2) as d:
            for i in range(5):
                liteflow.BaseOperator(task_id=f"t{i}")
        plan = liteflow._Plan(d)
        plan.settle()
        self.assertEqual(plan.ready_count(0), 2)
        plan.start(plan.take())
        self.assertEqual(plan.ready_count(0), 1)

    def test_fail_fast_fails_what_runs_and_skips_the_rest(self):
        with DAG("d", fail_fast=True) as d:
            _, b, c = (liteflow.BaseOperator(task_id=i, retries=1) for i in "abc")
            b >> c
        plan = liteflow._Plan(d)
        plan.settle()
        first, second = plan.take(), plan.take()
        plan.start(first)
        plan.start(second)
        plan.finish(first, "fatal", 0)
        plan.settle()
        self.assertEqual(plan.doomed, [second])
        plan.finish(second, "failed", 0)
        states = {i.task_id: i.state.value for i in plan.instances()}
        self.assertEqual(states, {"a": "failed", "b": "failed", "c": "skipped"})

    def test_a_failure_beside_a_skip_wins_whichever_worker_is_faster(self):
        with DAG("d") as d:
            a, b, below = (liteflow.BaseOperator(task_id=i) for i in ("a", "b", "below"))
            [a, b] >> below
        for order in ("ab", "ba"):
            plan = liteflow._Plan(d)
            plan.settle()
            running = {}
            while plan.ready_count(0):
                instance = plan.take()
                plan.start(instance)
                running[instance.task_id] = instance
            for task_id in order:
                status = "skipped" if task_id == "a" else "fatal"
                plan.finish(running[task_id], status, 0.1)
                plan.settle()
            self.assertEqual(plan.nodes[2].instances[0].state, "upstream_failed")

    def test_a_skip_waits_until_no_failure_can_win_over_it(self):
        with DAG("d") as d:
            a, b, below = (liteflow.BaseOperator(task_id=i) for i in ("a", "b", "below"))
            [a, b] >> below
        plan = liteflow._Plan(d)
        plan.settle()
        first, second = plan.take(), plan.take()
        plan.start(first)
        plan.start(second)
        plan.finish(first, "skipped", 0)
        plan.settle()
        self.assertIsNone(plan.nodes[2].instances[0].state)
        plan.finish(second, "success", 0)
        plan.settle()
        self.assertEqual(plan.nodes[2].instances[0].state, "skipped")

    def all_sent(self, plan):
        """Settle, and send all that may start; the instances by label."""
        plan.settle()
        sent = {}
        while plan.ready_count(0):
            instance = plan.take()
            plan.start(instance)
            sent[instance.label] = instance
        return sent

    def states_of(self, plan):
        return {i.label: i.state and i.state.value for i in plan.instances()}

    def test_what_a_branch_leaves_out_is_skipped_whatever_failed_beside_it(self):
        for leaves_out in (True, False):
            with DAG("d") as d:
                fails = liteflow.BaseOperator(task_id="fails")
                branch = task.branch(task_id="branch")(some)()
                below = liteflow.BaseOperator(task_id="below")
                [branch, fails] >> below
            plan = liteflow._Plan(d)
            sent = self.all_sent(plan)
            plan.finish(sent["fails"], "fatal", 0)
            plan.settle()
            self.assertIsNone(self.states_of(plan)["below"])
            plan.finish(sent["branch"], "success", 0)
            note = {"chosen": [] if leaves_out else ["below"]}
            plan.skip(sent["branch"], plan.left_out(sent["branch"], note))
            plan.settle()
            expected = "skipped" if leaves_out else "upstream_failed"
            self.assertEqual(self.states_of(plan)["below"], expected)

    def test_a_branch_decides_before_a_failure_within_a_mapped_group_does(self):
        with DAG("d") as d:
            source = task(task_id="source")(some)()
            branch = task.branch(task_id="branch")(some)()

            @task_group(group_id="g")
            def grouped(x):
                second = task(task_id="two")(some)(task(task_id="one")(some)(x))
                branch >> second

            grouped.expand(x=source)
        plan = liteflow._Plan(d)
        sent = self.all_sent(plan)
        plan.finish(sent["source"], "fatal", 0)
        plan.settle()
        self.assertEqual(self.states_of(plan)["g.one"], "upstream_failed")
        self.assertIsNone(self.states_of(plan)["g.two"])
        plan.finish(sent["branch"], "success", 0)
        plan.skip(sent["branch"], plan.left_out(sent["branch"], {"chosen": None}))
        plan.settle()
        self.assertEqual(self.states_of(plan)["g.two"], "skipped")

    def test_a_failure_beside_a_skipped_source_wins_whichever_comes_first(self):
        for order in (("source", "fails"), ("fails", "source")):
            for over in ({"x": "source"}, {"x": "source", "y": "fails"}):
                with DAG("d") as d:
                    made = {i: task(task_id=i)(some)() for i in ("source", "fails")}
                    mapped = task(task_id="f")(some).expand(**{k: made[v] for k, v in over.items()})
                    made["fails"] >> mapped
                plan = liteflow._Plan(d)
                sent = self.all_sent(plan)
                for task_id in order:
                    status = "skipped" if task_id == "source" else "fatal"
                    plan.finish(sent[task_id], status, 0)
                    plan.settle()
                with self.subTest(order=order, over=over):
                    self.assertEqual(self.states_of(plan)["f"], "upstream_failed")

    def test_a_failure_wins_over_a_group_that_has_nothing_to_be_mapped_over(self):
        for order in (("source", "fails"), ("fails", "source")):
            for gives in (0, 1, None, "constant"):
                with DAG("d") as d:
                    source, fails = (task(task_id=i)(some)() for i in ("source", "fails"))

                    @task_group(group_id="g")
                    def grouped(x, fails=fails):
                        task(task_id="two")(some)(task(task_id="one")(some)(x, fails))
                        task(task_id="other")(some)(x)

                    grouped.expand(x=[] if gives == "constant" else source)
                plan = liteflow._Plan(d)
                sent = self.all_sent(plan)
                for name in order:
                    stored = "success" if gives in (0, 1) else "skipped"
                    status = "fatal" if name == "fails" else stored
                    plan.finish(sent[name], status, 0, {"stored": gives in (0, 1), "length": gives})
                    plan.settle()
                i, states = "[0]" if gives == 1 else "", self.states_of(plan)
                with self.subTest(order=order, gives=gives):  # as in Airflow
                    ends = [states[f"g.{name}{i}"] for name in ("one", "two", "other")]
                    other = None if gives == 1 else "skipped"
                    self.assertEqual(ends, ["upstream_failed", "upstream_failed", other])
                    self.assertEqual(plan.run_state(), "failed")

    def test_in_a_mapped_group_each_index_waits_for_its_own_gate(self):
        with DAG("d") as d:

            @task_group(group_id="g")
            def grouped(x):
                gate = task.short_circuit(task_id="gate")(some)(x)
                gate >> task(task_id="below")(some)()

            grouped.expand(x=[0, 1])
        plan = liteflow._Plan(d)
        sent = self.all_sent(plan)
        plan.finish(sent["g.gate[0]"], "fatal", 0)
        plan.settle()
        states = self.states_of(plan)
        self.assertEqual((states["g.below[0]"], states["g.below[1]"]), ("upstream_failed", None))

    def test_a_group_that_was_just_expanded_is_decided_index_by_index(self):
        with DAG("d") as d:
            source = task(task_id="source")(some)()
            skipped = task(task_id="skipped", trigger_rule="all_skipped")(some).expand(x=source)

            @task_group(group_id="g")
            def grouped(x):
                second = task(task_id="two")(some)(task(task_id="one")(some)(x))
                skipped >> second

            grouped.expand(x=source)
        plan = liteflow._Plan(d)
        sent = self.all_sent(plan)
        plan.finish(sent["source"], "success", 0, {"stored": True, "length": 1})
        sent = self.all_sent(plan)
        self.assertEqual(list(sent), ["g.one[0]"])
        states = self.states_of(plan)
        self.assertEqual((states["skipped"], states["g.two[0]"]), ("skipped", None))
        plan.finish(sent["g.one[0]"], "fatal", 0)
        plan.settle()
        self.assertEqual(self.states_of(plan)["g.two[0]"], "upstream_failed")

    def test_a_branch_above_a_group_wins_over_no_failure_of_its_source(self):
        for order in (("source", "branch"), ("branch", "source")):
            with DAG("d") as d:
                source = task(task_id="source")(some)()
                branch = task.branch(task_id="branch")(some)()

                @task_group(group_id="g")
                def grouped(x, branch=branch):
                    first = task(task_id="one")(some)(x)
                    branch >> first
                    task(task_id="two")(some)(first)

                grouped.expand(x=source)
            plan = liteflow._Plan(d)
            sent = self.all_sent(plan)
            for task_id in order:
                failed = task_id == "source"
                status = "fatal" if failed else "success"
                plan.finish(sent[task_id], status, 0)
                if not failed:
                    plan.skip(sent[task_id], plan.left_out(sent[task_id], {"chosen": []}))
                plan.settle()
            with self.subTest(order=order):
                states = self.states_of(plan)
                self.assertEqual((states["g.one"], states["g.two"]), ("skipped", "upstream_failed"))

    def test_what_is_withdrawn_is_as_it_was_and_may_start_again(self):
        with DAG("d") as d:
            liteflow.BaseOperator(task_id="a", retries=1, retry_delay=0)
        plan = liteflow._Plan(d, pools={"default_pool": 1})
        sent = self.all_sent(plan)["a"]
        for before in (None, TaskInstanceState.UP_FOR_RETRY):
            tries = sent.try_number
            self.assertEqual(sent.state, "queued")
            plan.withdraw(sent)
            self.assertEqual((sent.state, sent.try_number, plan.running), (before, tries - 1, 0))
            self.assertEqual(self.all_sent(plan), {"a": sent})
            self.assertEqual((sent.try_number, plan.running), (tries, 1))
            if before is None:
                sent.move(TaskInstanceState.RUNNING)
                plan.finish(sent, "failed", 0)
                self.assertEqual(sent.state, "up_for_retry")
                self.assertEqual(self.all_sent(plan), {"a": sent})
        plan.finish(sent, "reschedule", 0)  # a sensor's next poke belongs to the same try
        self.assertEqual(self.all_sent(plan), {"a": sent})
        plan.withdraw(sent)
        self.assertEqual((sent.state, sent.try_number), ("up_for_reschedule", tries))

    def test_what_is_held_at_a_limit_starts_once_it_is_released(self):
        with DAG("d") as d:
            liteflow.BaseOperator(task_id="a", max_active_tis_per_dag=1)
        plan = liteflow._Plan(d)
        plan.settle()
        plan.delay(plan.take(), 1)
        self.assertFalse(plan.ready_count(0))
        self.assertTrue(plan.ready_count(1))
        self.assertEqual(list(self.all_sent(plan)), ["a"])

    def scoped(self, **settings):
        """A plan of a setup that succeeded, work beside it that runs, and its teardown."""
        with DAG("d", **settings) as d:
            up, *work = (liteflow.BaseOperator(task_id=i) for i in ("up", "a", "b"))
            down = liteflow.BaseOperator(task_id="down").as_teardown(setups=up)
            for each in work:
                up >> each >> down
        plan = liteflow._Plan(d)
        plan.finish(self.all_sent(plan)["up"], "success", 0)
        return plan, self.all_sent(plan)

    def test_a_stop_runs_the_teardowns_of_setups_that_succeeded(self):
        plan, sent = self.scoped()
        plan.stop()
        self.assertEqual(plan.doomed, [sent["a"], sent["b"]])
        self.assertEqual(self.all_sent(plan), {})
        for each in plan.doomed:
            self.assertFalse(plan.is_wound_down())
            plan.interrupt(each)
        downs = self.all_sent(plan)
        self.assertEqual(list(downs), ["down"])
        self.assertFalse(plan.is_wound_down())
        plan.finish(downs["down"], "success", 0)
        self.assertTrue(plan.is_wound_down())
        states = {"up": "success", "a": None, "b": None, "down": "success"}
        self.assertEqual(self.states_of(plan), states)

    def test_a_stop_runs_inner_teardowns_first_and_tries_them_again(self):
        with DAG("d") as d:
            outer, inner, work = (liteflow.BaseOperator(task_id=i) for i in ("out", "in", "work"))
            drop = liteflow.BaseOperator(task_id="drop", retries=1).as_teardown(setups=inner)
            end = liteflow.BaseOperator(task_id="end").as_teardown(setups=outer)
            chain(outer, inner, work, drop, end)
        plan = liteflow._Plan(d)
        for setup in ("out", "in"):
            plan.finish(self.all_sent(plan)[setup], "success", 0)
        working = self.all_sent(plan)["work"]
        plan.stop()
        plan.interrupt(working)
        for status in ("withdrawn", "failed", "success"):
            sent = self.all_sent(plan)
            self.assertEqual(list(sent), ["drop"])
            if status == "withdrawn":
                plan.withdraw(sent["drop"])
            else:
                plan.finish(sent["drop"], status, 0)
        self.assertEqual(list(sent := self.all_sent(plan)), ["end"])
        plan.finish(sent["end"], "success", 0)
        self.assertTrue(plan.is_wound_down())

    def test_a_stop_leaves_a_teardown_alone_that_has_ended(self):
        plan, sent = self.scoped()
        for name in "ab":
            plan.finish(sent[name], "success", 0)
        plan.finish(self.all_sent(plan)["down"], "success", 0)
        plan.stop()
        self.assertTrue(plan.is_wound_down())

    def test_a_stop_leaves_a_teardown_that_runs_alone(self):
        plan, sent = self.scoped()
        for each in sent.values():
            plan.finish(each, "success", 0)
        down = self.all_sent(plan)["down"]
        plan.stop()
        self.assertEqual((plan.doomed, plan.is_wound_down()), ([], False))
        plan.finish(down, "success", 0)
        self.assertTrue(plan.is_wound_down())

    def test_a_stop_does_not_wait_for_a_teardown_that_was_told_to_end_itself(self):
        plan, sent = self.scoped()
        for each in sent.values():
            plan.finish(each, "success", 0)
        down = self.all_sent(plan)["down"]
        plan.stop()
        plan.interrupt(down)
        self.assertEqual((self.all_sent(plan), plan.is_wound_down()), ({}, True))
        self.assertIsNone(self.states_of(plan)["down"])

    def test_a_stop_runs_the_teardown_of_a_setup_that_succeeds_in_its_turn(self):
        with DAG("d") as d:
            up = liteflow.BaseOperator(task_id="up")
            up >> liteflow.BaseOperator(task_id="down").as_teardown(setups=up)
        plan = liteflow._Plan(d)
        up = self.all_sent(plan)["up"]
        plan.stop()
        plan.finish(up, "success", 0)
        self.assertFalse(plan.is_wound_down())
        plan.finish(self.all_sent(plan)["down"], "success", 0)
        self.assertTrue(plan.is_wound_down())

    def test_a_stop_gives_a_mapped_teardown_its_instances(self):
        for length in (2, 0):
            with self.subTest(length=length), DAG("d") as d:
                up, work = liteflow.setup(task_id="up")(quiet)(), task(task_id="work")(quiet)()
                down = teardown(task_id="down")(one_argument).expand(x=up)
                up >> work >> down.as_teardown(setups=up)
                plan = liteflow._Plan(d)
                note = {"stored": True, "length": length}
                plan.finish(self.all_sent(plan)["up"], "success", 0, note)
                work = self.all_sent(plan)["work"]
                plan.stop()
                plan.interrupt(work)
                self.assertEqual([*self.all_sent(plan)], [f"down[{i}]" for i in range(length)])

    def test_a_stop_gives_no_instances_to_what_will_not_run(self):
        with DAG("d") as d:
            work = task(task_id="work")(quiet)()
            work >> task(task_id="mapped")(one_argument).expand(x=task(task_id="list")(quiet)())
        plan = liteflow._Plan(d)
        sent = self.all_sent(plan)
        plan.finish(sent["list"], "success", 0, {"stored": True, "length": 2})
        plan.stop()
        plan.interrupt(sent["work"])
        self.assertEqual(self.all_sent(plan), {})
        self.assertEqual(self.states_of(plan), {"work": None, "mapped": None, "list": "success"})

    def test_what_succeeds_once_the_time_is_over_has_succeeded(self):
        plan, sent = self.scoped()
        plan.give_up(timed_out=True)
        plan.finish(sent["a"], "success", 0)
        plan.finish(sent["b"], "failed", 0)
        states = {"up": "success", "a": "success", "b": "skipped", "down": "skipped"}
        self.assertEqual((self.states_of(plan), plan.run_state()), (states, "failed"))

    def test_a_stop_before_any_setup_succeeded_leaves_nothing_to_do(self):
        with DAG("d") as d:
            up = liteflow.BaseOperator(task_id="up")
            up >> liteflow.BaseOperator(task_id="down").as_teardown(setups=up)
        plan = liteflow._Plan(d)
        up = self.all_sent(plan)["up"]
        plan.stop()
        self.assertEqual(plan.doomed, [up])
        plan.interrupt(up)
        self.assertEqual((self.all_sent(plan), plan.is_wound_down()), ({}, True))

    def test_fail_fast_leaves_teardowns_alone(self):
        plan, sent = self.scoped(fail_fast=True)
        plan.finish(sent["a"], "fatal", 0)
        self.assertEqual(plan.doomed, [sent["b"]])
        plan.finish(sent["b"], "failed", 0)
        self.assertEqual(list(self.all_sent(plan)), ["down"])

    def test_fail_fast_leaves_a_teardown_that_runs_alone(self):
        with DAG("d", fail_fast=True) as d:
            up, _ = (liteflow.BaseOperator(task_id=i) for i in ("up", "other"))
            up >> liteflow.BaseOperator(task_id="down").as_teardown(setups=up)
        plan = liteflow._Plan(d)
        sent = self.all_sent(plan)
        plan.finish(sent["up"], "success", 0)
        down = self.all_sent(plan)["down"]
        plan.finish(sent["other"], "fatal", 0)
        plan.settle()
        self.assertEqual((plan.doomed, down.state), ([], "queued"))
        plan.finish(down, "reschedule", 0, {"wait": 1.0})  # a sensor's poke
        self.assertEqual((down.state, plan.ready_count(2.0)), ("up_for_reschedule", 1))
        plan.start(plan.take())
        plan.finish(down, "success", 0)
        self.assertEqual(self.states_of(plan)["down"], "success")

    def test_a_run_of_teardowns_alone_fails_if_the_last_one_does(self):
        for status, state in (("fatal", "failed"), ("success", "success")):
            with DAG("d") as d:
                first, last = (liteflow.BaseOperator(task_id=i) for i in ("first", "last"))
                first.as_teardown() >> last.as_teardown()
            plan = liteflow._Plan(d)
            self.assertEqual(self.drive(plan, {"last": status}), ["first", "last"])
            self.assertEqual(plan.run_state(), state)

    def test_an_interrupted_instance_has_no_state_again(self):
        with DAG("d") as d:
            liteflow.BaseOperator(task_id="a")
        plan = liteflow._Plan(d)
        plan.settle()
        instance = plan.take()
        plan.start(instance)
        plan.interrupt(instance)
        self.assertIsNone(instance.state)
        self.assertEqual(plan.running, 0)

    def test_large_graphs_in_seconds(self):
        with DAG("deep", max_active_tasks=10**6) as deep:
            previous = liteflow.BaseOperator(task_id="t")
            for i in range(5_000):
                following = liteflow.BaseOperator(task_id=f"t{i}")
                previous >> following
                previous = following
        began = time.process_time()
        self.assertEqual(len(self.drive(liteflow._Plan(deep), {})), 5_001)
        with DAG("wide", max_active_tasks=10**6) as wide:
            first, last = (liteflow.BaseOperator(task_id=i) for i in ("first", "last"))
            for i in range(5_000):
                first >> liteflow.BaseOperator(task_id=f"t{i}") >> last
        self.assertEqual(self.drive(liteflow._Plan(wide), {})[-1], "last")
        self.assertLess(time.process_time() - began, 1.5)

    def test_an_illegal_transition_is_a_bug_that_shows(self):
        with DAG("d") as d:
            liteflow.BaseOperator(task_id="a")
        instance = next(liteflow._Plan(d).instances())
        with self.assertRaises(AssertionError):
            instance.move(TaskInstanceState.FAILED)


class WholeOracle(Oracle):
    """The same for mapped tasks and groups, branches, setups and teardowns, instance by instance."""

    def __init__(self, d: Dag):
        super().__init__(d)
        self.lengths: dict[str, int] = {}
        self.stored: dict[str, set] = collections.defaultdict(set)
        self.ids = {t.task_id: self.first_instances(t) for t in d.tasks}

    def first_instances(self, t):
        mapping = t._mapping
        if mapping is not None and not mapping.source_ids:
            return list(range(len(next(iter(mapping.sources.values()))))) or [-1]
        return [-1]

    def sources(self, t):
        return {*t._mapping.source_ids}

    def ended(self, task_id):
        return all((task_id, i) in self.state for i in self.ids[task_id])

    def above(self, t):
        found, following = set(), [t]
        while following:
            for up in following.pop().upstream_list:
                if up not in found:
                    found.add(up)
                    following.append(up)
        return found

    def setups(self, t):
        """Setups above a task, not right above it, that have no teardown or one below the task."""
        if t.is_teardown or t.trigger_rule == "always":
            return []
        found = []
        for s in self.above(t):
            if s.is_setup and s.task_id not in t.upstream_task_ids:
                downs = [d for d in s.downstream_list if d.is_teardown]
                if not downs or any(t in self.above(d) for d in downs):
                    found.append(s)
        return found

    def in_step(self, t, u):
        return t._mapping is not None and t._mapping is u._mapping

    def ends(self, t, i, u):
        """The states of those instances of `u` that instance `i` of `t` waits for."""
        indexes = [i] if self.in_step(t, u) else self.ids[u.task_id]
        return [self.state.get((u.task_id, j)) for j in indexes]

    def verdict(self, t, i):
        what = self.by_upstreams(t, i)
        setups = [state for s in self.setups(t) for state in self.ends(t, i, s)]
        if "failed" in setups or "upstream_failed" in setups:
            return "upstream_failed"
        if what in ("upstream_failed", "wait"):  # a failure wins over a skip
            return what
        if None in setups:
            return "wait"
        return "skipped" if "skipped" in setups else what

    def by_upstreams(self, t, i):
        if t.is_teardown and t.upstream_task_ids:
            if None in [state for u in t.upstream_list for state in self.ends(t, i, u)]:
                return "wait"
            own = [state for u in t.upstream_list if u.is_setup for state in self.ends(t, i, u)]
            if not own or "success" in own:
                return "run"
            return "skipped" if set(own) == {"skipped"} else "upstream_failed"
        return self.by_rule(t, [x for u in t.upstream_list for x in self.ends(t, i, u)]) or "wait"

    def is_gated(self, t, i):
        """Whether a branch or short circuit that has not ended may yet leave the instance out."""
        for g in self.above(t):
            near = g in t.upstream_list
            flow = g._flow
            if flow == "branch":
                guards = near
            elif flow == "short_circuit":
                guards = (near or g.ignore_downstream_trigger_rules) and not t.is_teardown
            else:
                continue
            # One that is mapped leaves out nothing but what stands in step with it.
            if g._mapping is not None and not self.in_step(t, g):
                continue
            if guards and None in self.ends(t, i, g):
                return True
        return False

    def left_out(self, g, note):
        """What a branch's choice, or a false short circuit, leaves out."""
        if not note or note.get("go_on"):
            return []
        if "chosen" in note:
            chosen = [self.dag.get_task(name) for name in note["chosen"]]
            keep = [t for t in self.dag.tasks if t in chosen or self.above(t) & {*chosen}]
            return [t for t in g.downstream_list if t not in keep]
        far = g.ignore_downstream_trigger_rules
        below = [t for t in self.dag.tasks if g in (self.above(t) if far else t.upstream_list)]
        return [t for t in below if not t.is_teardown]

    def skip(self, g, index, note, running):
        for t in self.left_out(g, note):
            if g._mapping is not None and not self.in_step(t, g):
                continue
            for i in self.ids[t.task_id] if index < 0 or self.ids[t.task_id] == [-1] else [index]:
                key = (t.task_id, i)
                if key not in self.state and key not in running:
                    self.state[key] = "skipped"
                    self.ready.discard(key)

    def by_rule(self, t, ups):
        # The instances of all upstreams as if each were a task of its own.
        stand_in = type(
            "T", (), {"upstream_task_ids": range(len(ups)), "trigger_rule": t.trigger_rule}
        )
        self_state, self.state = self.state, {k: s for k, s in enumerate(ups) if s}
        try:
            return self.decide(stand_in)
        finally:
            self.state = self_state

    def one(self, t, i):
        what = self.ungated(t, i)
        # What a gate leaves out is skipped, whatever failed beside it.
        return "wait" if what == "upstream_failed" and self.is_gated(t, i) else what

    def ungated(self, t, i):
        if t._mapping is None or i >= 0:
            return self.verdict(t, i)
        sources = self.sources(t)
        ends = [self.state.get((u, -1)) for u in sources if self.ids[u] == [-1]]
        if "failed" in ends or "upstream_failed" in ends:
            return "upstream_failed"
        ready = all(self.ended(u) for u in sources)
        if t._mapping.of_group and not ready:
            return "wait"
        # With elements it expands as soon as it can, whatever its rules.
        if t._mapping.of_group and "skipped" not in ends and self.count(t):
            if any((u.task_id, -1) in self.state for u in t.upstream_list if self.in_step(t, u)):
                return "skipped"
            return "wait" if self.can_not_expand(t) else "expand"
        what = self.verdict(t, i)
        if what == "upstream_failed":  # a failure wins over a skip, whatever came first
            return what
        if what == "wait" or not ready:
            return "wait"
        return "skipped" if "skipped" in ends else "expand" if what == "run" else what

    def settle(self):
        while True:
            decided = {
                (t.task_id, i): what
                for t in self.dag.tasks
                for i in self.ids[t.task_id]
                if (t.task_id, i) not in self.state
                and (t.task_id, i) not in self.ready
                and (what := self.one(t, i)) != "wait"
            }
            if not decided:
                return
            for (task_id, i), what in decided.items():
                if what == "expand":
                    self.expand(self.dag.get_task(task_id))
                elif what == "run":
                    self.ready.add((task_id, i))
                else:
                    self.state[task_id, i] = what

    def can_not_expand(self, t):
        """Whether something above it in its group has ended before the group was expanded."""
        return any(self.in_step(t, u) and (u.task_id, -1) in self.state for u in self.above(t))

    def count(self, t):
        count = 1 if t._mapping.source_ids else 0
        for result in t._mapping.sources.values() if count else ():
            over = result.operator
            mapped = over._mapping is not None
            count *= len(self.stored[over.task_id]) if mapped else self.lengths[over.task_id]
        return count

    def expand(self, t):
        if not self.count(t):
            self.state[t.task_id, -1] = "skipped"
            return
        for each in [x for x in self.dag.tasks if x._mapping is t._mapping]:
            unexpanded = self.ids[each.task_id] == [-1] and (each.task_id, -1) not in self.state
            if unexpanded and not self.can_not_expand(each):
                self.ids[each.task_id] = list(range(self.count(t)))


def some(x=None, y=None):
    return x


def random_whole_dag(rng: random.Random, rules=RULES, skips_far=True) -> Dag:
    d = DAG(f"whole{next(_numbers)}", max_active_tasks=1000)
    waiting_rules = [rule for rule in rules if rule != "always"]
    with d:
        made: list = []

        def rule(rules=rules):
            return rng.choice(rules) if rng.random() < 0.5 else "all_success"

        def link(result, share=0.3):
            for up in made:
                if up.operator is not result.operator and rng.random() < share:
                    up >> result
            return result

        def gate(name, *args):
            if rng.random() < 0.5:
                return task.branch(task_id=name)(some)(*args)
            far = skips_far and rng.random() < 0.5
            return task.short_circuit(task_id=name, ignore_downstream_trigger_rules=far)(some)(
                *args
            )

        def scope(prefix, rules=rules):
            s = liteflow.setup(task_id=f"{prefix}s")(some)()
            w = task(task_id=f"{prefix}w")(some)()
            v = task(task_id=f"{prefix}v", trigger_rule=rule(rules))(some)()
            s >> w >> v
            if rng.random() < 0.8:
                v >> teardown(task_id=f"{prefix}t")(some)().as_teardown(setups=s)
            return w, v

        def group(name):
            inner = rng.choice(["plain", "gate", "scope", "outside"])

            @task_group(group_id=name)
            def grouped(x):
                first = task(task_id="one")(some)(x)
                second = task(task_id="two", trigger_rule=rule(waiting_rules))(some)(first)
                if inner == "gate":
                    gated = gate("gate", first)
                    third = task(task_id="three", trigger_rule=rule(waiting_rules))(some)()
                    gated >> second >> third
                elif inner == "scope":
                    work, _ = scope("", waiting_rules)
                    work >> second
                elif inner == "outside":
                    link(second, 0.2)
                return second

            over = rng.choice(made) if rng.random() < 0.7 else [0] * rng.randrange(3)
            return grouped.expand(x=over)

        kinds = ["plain", "plain", "mapped", "constant", "gate", "group", "group", "scope"]
        for i in range(rng.randrange(2, 8)):
            kind = rng.choice(kinds)
            plain = task(some)
            if kind == "mapped" and made:
                one = plain.override(task_id=f"m{i}", trigger_rule=rule(waiting_rules))
                over = {"x": rng.choice(made)}
                if rng.random() < 0.3:
                    over["y"] = rng.choice(made)
                made.append(link(one.expand(**over), 0.15))
            elif kind == "constant":
                one = plain.override(task_id=f"c{i}", trigger_rule=rule())
                made.append(link(one.expand(x=[0] * rng.randrange(3))))
            elif kind == "gate":
                made.append(link(gate(f"b{i}")))
            elif kind == "group" and made:
                made.append(group(f"g{i}"))
            elif kind == "scope":
                made += scope(f"{i}")
            else:
                made.append(link(plain.override(task_id=f"p{i}", trigger_rule=rule())()))
    return d


class WholePlanTest(Case):
    def test_random_graphs_of_every_kind_against_brute_force(self):
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        rng = random.Random(seed)
        for number in range(10_000 if SOAK else 600):
            with self.subTest(seed=seed, number=number):
                self.compare(random_whole_dag(rng), rng)

    def test_no_result_depends_on_which_worker_is_faster(self):
        # Of rules that wait for all, or for a failure: the others are about who comes first, and a
        # short circuit that skips all below it skips what has not begun.
        rules = ["all_success", "all_done", "none_failed", "none_failed_min_one_success"]
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        rng = random.Random(seed)
        for number in range(5_000 if SOAK else 300):
            d = random_whole_dag(rng, rules, skips_far=False)
            with self.subTest(seed=seed, number=number):
                first, second = (self.ends_of(d, number, rng) for _ in range(2))
                self.assertEqual(first, second)

    def ends_of(self, d, number, order):
        """How all tasks end, if each instance always ends in the same way, in a random order."""
        plan, running = liteflow._Plan(d), []
        while True:
            plan.settle()
            while plan.ready_count(0) and (instance := plan.take()) is not None:
                plan.start(instance)
                running.append(instance)
            if not running:
                break
            instance = running.pop(order.randrange(len(running)))
            rng = random.Random(f"{number} {instance.label}")
            status, length = rng.choice(ENDS), rng.randrange(3)
            success = status == "success"
            plan.finish(instance, status, 0.0, {"stored": success, "length": length})
            if success:
                note = self.note_of(instance.node.task, rng)
                plan.skip(instance, plan.left_out(instance, note))
        self.assertEqual(plan.unfinished, 0)
        # By task: what is skipped before its group expands is one instance, afterwards several.
        return {n.task.task_id: {i.state.value for i in n.instances} for n in plan.nodes}

    def note_of(self, t, rng):
        """What a branch chooses, or whether a short circuit goes on."""
        if t._flow == "branch":
            return {"chosen": [u.task_id for u in t.downstream_list if rng.random() < 0.5]}
        return {} if t._flow is None else {"go_on": rng.random() < 0.5}

    def compare(self, d, rng):
        plan, oracle = liteflow._Plan(d), WholeOracle(d)
        running, now = [], 0.0
        while True:
            plan.settle()
            oracle.settle()
            while plan.ready_count(now) and (instance := plan.take()) is not None:
                plan.start(instance)
                running.append(instance)
            states = {
                (i.task_id, i.map_index): i.state.value
                for i in plan.instances()
                if i.state in liteflow._ENDED
            }
            self.assertEqual(states, oracle.state)
            self.assertEqual({(i.task_id, i.map_index) for i in running}, oracle.ready)
            if not running:
                break
            instance = running.pop(rng.randrange(len(running)))
            self.end(plan, oracle, instance, rng, {(i.task_id, i.map_index) for i in running})
        self.assertEqual(plan.unfinished, 0)

    def end(self, plan, oracle, instance, rng, running):
        key = (instance.task_id, instance.map_index)
        status, length = rng.choice(ENDS), rng.randrange(3)
        oracle.ready.discard(key)
        oracle.state[key] = {"fatal": "failed"}.get(status, status)
        plan.finish(instance, status, 0.0, {"stored": True, "length": length})
        if status != "success":
            return
        oracle.lengths[instance.task_id] = length
        oracle.stored[instance.task_id].add(instance.map_index)
        note = self.note_of(instance.node.task, rng)
        plan.skip(instance, plan.left_out(instance, note))
        oracle.skip(instance.node.task, instance.map_index, note, running)


class LimitedPlanTest(WholePlanTest):
    """The same with limits, pools, priorities, retries, fail_fast and dagrun_timeout: what starts,
    and in which order, by counting."""

    POOLS: typing.ClassVar = {"one": 1, "three": 3}
    test_random_graphs_of_every_kind_against_brute_force = None
    test_no_result_depends_on_which_worker_is_faster = None

    def test_random_graphs_with_limits_against_brute_force(self):
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        rng = random.Random(seed)
        for number in range(5_000 if SOAK else 300):
            with self.subTest(seed=seed, number=number):
                fail_fast = rng.random() < 0.2
                d = random_whole_dag(rng, ["all_success"] if fail_fast else RULES)
                d.fail_fast = fail_fast
                d.max_active_tasks = rng.choice([1, 2, 3, 1000])
                for t in d.tasks:
                    t.priority_weight = rng.choice([1, 1, 2, 5, -3])
                    t.weight_rule = rng.choice(["downstream", "upstream", "absolute"])
                    t.retries = rng.choice([0, 0, 1, 2])
                    t.pool = rng.choice(["default_pool", "one", "three"])
                    t.pool_slots = rng.randrange(1, self.POOLS.get(t.pool, 1) + 1)
                    if t._mapping is not None and rng.random() < 0.3:
                        t.max_active_tis_per_dagrun = rng.choice([1, 2])
                self.drive(d, rng)

    def drive(self, d, rng):
        plan, oracle = liteflow._Plan(d, pools=self.POOLS), WholeOracle(d)
        self.weights = {t.task_id: self.weight_of(t, oracle) for t in d.tasks}
        self.tries = collections.Counter()
        running, given_up, late = {}, False, rng.randrange(20) if rng.random() < 0.1 else -1
        for turn in itertools.count():
            plan.settle()
            oracle.settle()
            while plan.ready_count(0.0) and (instance := plan.take()) is not None:
                key = instance.task_id, instance.map_index
                fitting = self.fitting(d, oracle.ready - running.keys(), running)
                self.assertIn(key, fitting)
                # In a pool nothing overtakes what has a higher weight.
                best = max(self.weights[task_id] for task_id, _ in fitting)
                self.assertEqual(self.weights[key[0]], best)
                plan.start(instance)
                running[key] = instance
            self.assertEqual(self.fitting(d, oracle.ready - running.keys(), running), set())
            states = {
                (i.task_id, i.map_index): i.state.value
                for i in plan.instances()
                if i.state in liteflow._ENDED
            }
            self.assertEqual(states, oracle.state)
            if not running:
                break
            if turn == late:
                plan.give_up(timed_out=True)
                given_up = True
                self.give_up(oracle, True, running)
                continue
            key = rng.choice(sorted(running))
            instance = running.pop(key)
            failed = self.end_one(plan, oracle, instance, rng, given_up, {*running})
            if failed and d.fail_fast and not given_up:
                given_up = True
                self.give_up(oracle, False, running)
        self.assertEqual(plan.unfinished, 0)

    def end_one(self, plan, oracle, instance, rng, given_up, running):
        """End it in some way; whether it failed for good."""
        key = instance.task_id, instance.map_index
        t = instance.node.task
        self.tries[key] += 1
        left_alone = t.is_teardown and not plan.timed_out
        if given_up and not left_alone:
            status = "skipped" if plan.timed_out else "failed"  # it was told to end
        else:
            status = rng.choice(ENDS)
            if status == "failed" and self.tries[key] <= t.retries:
                plan.finish(instance, "failed", 0.0, {})
                return False
        length = rng.randrange(3)
        oracle.ready.discard(key)
        oracle.state[key] = {"fatal": "failed"}.get(status, status)
        plan.finish(instance, status, 0.0, {"stored": True, "length": length})
        if status == "success":
            oracle.lengths[key[0]] = length
            oracle.stored[key[0]].add(key[1])
            note = self.note_of(t, rng)
            plan.skip(instance, plan.left_out(instance, note))
            oracle.skip(t, key[1], note, running)
        return oracle.state[key] == "failed"

    def give_up(self, oracle, teardowns, running):
        """All that has not begun is skipped; teardowns only where the run took too long."""
        for t in oracle.dag.tasks:
            for i in oracle.ids[t.task_id]:
                key = t.task_id, i
                begun = key in oracle.state or key in running
                if not begun and (teardowns or not t.is_teardown):
                    oracle.ready.discard(key)
                    oracle.state[key] = "skipped"

    def fitting(self, d, ready, running):
        """What may start now: there is room for it in the run, in its pool and among its own."""
        if len(running) >= d.max_active_tasks:
            return set()
        found, full = set(), set()
        order = list(d.task_dict)
        for key in sorted(ready, key=lambda k: (-self.weights[k[0]], order.index(k[0]), k[1])):
            t = d.task_dict[key[0]]
            own = sum(task_id == key[0] for task_id, _ in running)
            if t._mapping is not None and own >= (t.max_active_tis_per_dagrun or 1000):
                continue
            used = sum(
                x.node.task.pool_slots for x in running.values() if x.node.task.pool == t.pool
            )
            if used + t.pool_slots > self.POOLS.get(t.pool, 1000):
                full.add(t.pool)
            if t.pool not in full:
                found.add(key)
        return found

    def weight_of(self, t, oracle):
        rule = t.weight_rule.value
        others = {
            "downstream": [x for x in oracle.dag.tasks if t in oracle.above(x)],
            "upstream": oracle.above(t),
            "absolute": [],
        }[rule]
        return t.priority_weight + sum(x.priority_weight for x in others)


# --- Store ----------------------------------------------------------------------------------------


class StoreCase(Case):
    def small(self, **options):
        return self.run_flow(
            """
            with DAG("small", description="d") as dag:
                @task
                def a(): print("from a"); return {"n": [1, 2, 3]}
                @task(retries=1)
                def b(x, ti):
                    print("try", ti.try_number)
                    if ti.try_number == 1: raise ValueError("first")
                b(a())
            """,
            **options,
        )

    def sha(self):
        return hashlib.sha256(self.db.read_bytes()).hexdigest()

    def assert_refused(self, *words):
        """A run and a look both refuse the file, in a sentence with these words, untouched."""
        before = self.sha() if self.db.is_file() else None
        for act in (lambda: self.small(), lambda: Dag("small").runs(self.db)):
            with self.assertRaises(DatabaseError) as caught:
                act()
            for word in words:
                self.assertIn(word, str(caught.exception))
        self.assertEqual(self.sha() if self.db.is_file() else None, before)
        self.assert_nothing_left()


class StoreTest(StoreCase):
    def test_a_new_file_is_private_and_set_up_as_designed(self):
        self.small()
        self.assertEqual(self.db.stat().st_mode & 0o777, 0o600)
        pragmas = {
            name: self.query(f"PRAGMA {name}")[0][0]
            for name in (
                "application_id",
                "user_version",
                "journal_mode",
                "auto_vacuum",
                "page_size",
            )
        }
        aside = lambda db: db.execute("PRAGMA temp_store").fetchall()  # noqa: E731
        self.assertEqual(liteflow._read(str(self.db), aside), [(2,)])  # no files in $TMPDIR
        with contextlib.closing(liteflow._Store(str(self.db))) as store:
            [(pragmas["temp_store"],)] = store.look(aside)
        self.assertEqual(
            pragmas,
            {
                "application_id": liteflow._APPLICATION_ID,
                "user_version": 2,
                "journal_mode": "wal",
                "auto_vacuum": 2,
                "page_size": liteflow._PAGE_SIZE,
                "temp_store": 2,
            },
        )

    def test_what_an_older_sqlite_does_not_know(self):
        with mock.patch.object(sqlite3, "sqlite_version_info", (3, 36)):
            self.small()
        [(schema,)] = self.query("SELECT group_concat(sql) FROM sqlite_master")
        self.assertNotIn("STRICT", schema)
        self.assertIn("WITHOUT ROWID", schema)
        refused = self.assertRaisesRegex(DatabaseError, "is too old: 3.34 or newer is needed")
        with mock.patch.object(sqlite3, "sqlite_version_info", (3, 33)), refused:
            DAG("d").run(db_path=self.db)

    def test_another_file_in_the_place_of_the_database_is_noticed(self):
        with contextlib.closing(liteflow._Store(str(self.db))) as store:
            store.check_in_place()
            shutil.copy(self.db, self.folder / "other")
            (self.folder / "other").rename(self.db)
            with self.assertRaisesRegex(DatabaseError, "was deleted or replaced"):
                store.check_in_place()

    def test_a_file_that_is_refused_is_closed_though_somebody_keeps_the_error(self):
        liteflow._Store(str(self.db)).close()
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA user_version = 99")
        try:
            liteflow._Store(str(self.db))
        except DatabaseError as error:
            self.addCleanup(bool, error)
        self.assertEqual([path.name for path in self.folder.glob("*.db*")], [self.db.name])

    def test_only_an_empty_wal_is_not_waited_for(self):
        def waits(store):
            execute = store._connection.execute
            names = ("synchronous", "wal_autocheckpoint")
            return [execute(f"PRAGMA {name}").fetchone()[0] for name in names]

        def write(store, dag_id):
            """Whether it waits while it writes."""
            with store.transaction(waits=False):
                store._connection.execute("INSERT INTO dag (dag_id) VALUES (?)", (dag_id,))
                return waits(store)[0] == 1

        always = [1, liteflow._WAL_PAGES]
        with contextlib.closing(liteflow._Store(str(self.db))) as store:
            self.assertEqual(waits(store), always)
            self.assertTrue(write(store, "a"))  # its tables were the first to come
        with (
            contextlib.closing(liteflow._Store(str(self.db))) as store,
            contextlib.closing(liteflow._Store(str(self.db))) as other,
        ):
            self.assertEqual(waits(store), always)
            with self.assertRaises(ZeroDivisionError), store.transaction(waits=False):
                self.assertEqual(waits(store), [0, 0])
                raise ZeroDivisionError
            self.assertEqual(waits(store), always)
            self.assertFalse(write(store, "b"))
            self.assertEqual(waits(store), always)
            self.assertTrue(write(other, "c"))  # the WAL was empty when it was opened
            with store.transaction():
                with self.assertRaises(liteflow._Busy):
                    write(other, "d")
                self.assertEqual(waits(other), always)

    def test_what_is_deleted_is_gone_once_the_disk_has_it(self):
        self.small(run_id="first")
        run = self.small(run_id="second")
        seen = []
        connect = liteflow._Store._connect

        def traced(store):
            connection = connect(store)
            connection.set_trace_callback(seen.append)
            return connection

        with mock.patch.object(liteflow._Store, "_connect", traced):
            run.delete()
        self.assertIn("PRAGMA freelist_count", seen)
        self.assertNotIn("PRAGMA synchronous=OFF", seen)

    def test_a_path_with_signs_of_uris(self):
        with DAG("plain") as dag:
            liteflow.EmptyOperator(task_id="a")
        folder = self.folder / "only"
        folder.mkdir()
        for path in (f"{folder}/50%3f?mode=memory#a%.db", f"/{folder}/x", f"{folder}/\udcff"):
            with self.subTest(path=path):
                self.assertEqual(dag.test(db_path=path).state, "success")
                self.assertEqual([run.state for run in dag.runs(path)], ["success"])
                self.assertEqual(os.listdir(folder), [os.path.basename(path)])
                os.unlink(path)

    def test_a_run_starts_without_going_through_the_earlier_ones(self):
        self.small()
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            connection.executemany(
                "INSERT INTO dag_run (dag_id, run_id, state, conf) VALUES ('small', ?, ?, '{}')",
                [(f"earlier {i}", "success") for i in range(5000)],
            )
            steps = []
            connection.set_progress_handler(lambda: steps.append(100), 100)
            self.assertEqual(liteflow._select_runs(connection, live_of="small"), [])
            self.assertIsNone(liteflow._find_run(connection, dag_id="small", run_id="new"))
            newest = liteflow._find_run(connection, dag_id="small")
            self.assertEqual(newest.run_id, "earlier 4999")
            self.assertLess(sum(steps), 5000)

    def test_lists_of_ids_are_written_as_json_writes_them(self):
        for ids in ([], ["a"], ["a.b-c_d", "e"], ["é", "日"]):
            self.assertEqual(liteflow._json_ids(dict.fromkeys(ids)), json.dumps(ids))

    def test_what_is_recorded_can_be_read_with_plain_sql(self):
        run = self.small(conf={"k": 1})
        self.assertEqual(
            self.query("SELECT dag_id, run_id, state, conf FROM dag_run"),
            [("small", run.run_id, "success", '{"k": 1}')],
        )
        self.assertEqual(
            self.query("SELECT task_id, state, try_number, upstream_task_ids FROM task_instance"),
            [("a", "success", 1, "[]"), ("b", "success", 2, '["a"]')],
        )
        self.assertEqual(
            self.query("SELECT key, type, preview, length FROM xcom"),
            [("return_value", "dict", "{'n': [1, 2, 3]}", 1)],
        )
        attempts = self.query(
            "SELECT task_id, task_attempt.try_number, task_attempt.state, task_attempt.error "
            "FROM task_attempt JOIN task_instance ON task_instance.id = task_instance_id "
            "ORDER BY task_id, 2"
        )
        self.assertEqual(
            [a[:3] for a in attempts],
            [("a", 1, "success"), ("b", 1, "failed"), ("b", 2, "success")],
        )
        self.assertTrue(attempts[1][3].endswith("ValueError: first"))
        self.assertEqual(
            self.query("SELECT text FROM task_log ORDER BY id"),
            [("from a\n",), ("try 1\n",), ("try 2\n",)],
        )

    def test_what_an_instance_is_mapped_over_is_kept_from_its_first_run_on(self):
        self.run_flow(
            """
            with DAG("mapped") as dag:
                @task
                def files(): return ["a.csv", "b.csv"]
                @task
                def load(file, unit): return file
                load.expand(file=files(), unit=[7])
            """
        )
        shown = self.query("SELECT element_preview FROM task_instance WHERE map_index >= 0")
        self.assertEqual(shown, [("7, 'a.csv'",), ("7, 'b.csv'",)])

    def test_times_are_iso_utc_with_microseconds(self):
        self.small()
        times = self.query("SELECT start_date, end_date FROM task_attempt")
        self.assertEqual(len(times), 3)
        for text in itertools.chain(*times):
            self.assertRegex(text, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00$")

    def test_every_write_begins_immediate(self):
        with DAG("d") as d:
            task(sample)(1)
        store = liteflow._Store(str(self.db))
        self.addCleanup(store.close)
        said = []
        store._connection.set_trace_callback(said.append)
        with store.transaction():
            store.create_run(d, "r", None, {})
            store.owner = "me"
            store.claim_run(None)
            plan = liteflow._Plan(d)
            store.write_instances(plan.nodes)
        store.change(store.run_row, bool, store.request_stop)
        begins = [s for s in said if s.startswith("BEGIN")]
        writes = [s for s in said if re.match("INSERT|UPDATE|DELETE|CREATE", s)]
        self.assertTrue(writes)
        self.assertEqual(begins, ["BEGIN IMMEDIATE"] * 2)

    def test_missing_directory_and_directory(self):
        self.db = self.folder / "absent" / "flow.db"
        with self.assertRaises(DatabaseError) as caught:
            self.small()
        self.assertIn("there is no directory", str(caught.exception))  # or it is a file
        self.assertFalse(self.db.parent.exists())
        self.db = self.folder / "sub"
        self.db.mkdir()
        self.assert_refused("is a directory")
        for bad in ("", ":memory:", "a\0b"):
            with self.subTest(path=bad), self.assertRaises(DatabaseError):
                Dag("small").runs(bad)
        with self.assertRaises(TypeError):
            Dag("small").runs(3)

    def test_an_empty_file_is_a_valid_empty_database(self):
        self.db.touch()
        self.assertEqual(self.small().state, "success")

    def test_odd_names(self):
        for name in ("a b.db", "a?b#c%41.db", "ü日本.db", "'quoted\".db"):
            self.db = self.folder / name
            with self.subTest(name=name):
                self.assertEqual(self.small().state, "success")
                self.assertEqual(len(Dag("small").runs(self.db)), 1)
                self.assert_nothing_left()

    def test_disk_full_is_said_and_the_run_can_be_resumed(self):
        module = self.module(
            """
            with DAG("big") as dag:
                @task
                def a(i): return os.urandom(300_000)
                for i in range(6): a(i)
            """
        )
        real = liteflow._Store._connect

        def small_disk(store):
            connection = real(store)
            connection.execute("PRAGMA max_page_count=150")
            return connection

        liteflow._Store._connect = small_disk
        try:
            with self.assertRaises(DatabaseError) as caught:
                module.dag.run(db_path=self.db, executor=pool())
        finally:
            liteflow._Store._connect = real
        self.assertIn("full", str(caught.exception))
        self.assertEqual(self.query("PRAGMA integrity_check"), [("ok",)])
        run = module.dag.run(db_path=self.db, resume=True, executor=pool())
        self.assertEqual(run.state, "success")

    def test_a_held_lock_is_waited_for(self):
        self.small()
        holder = sqlite3.connect(self.db, isolation_level=None, check_same_thread=False)
        self.addCleanup(holder.close)
        holder.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(1.5 * liteflow._BUSY_SECONDS, holder.execute, ["COMMIT"])
        timer.start()
        self.addCleanup(timer.join)
        self.assertEqual(self.small().state, "success")

    def test_a_fork_waits_for_what_another_thread_does_within_sqlite(self):
        """Else SQLite's own locks, and whoever takes one, would hang in the child for good."""
        self.small()
        inside, left = threading.Event(), []

        def look(db):
            inside.set()
            time.sleep(0.1)
            left.append(db)

        thread = threading.Thread(target=liteflow._read, args=(str(self.db), look))
        thread.start()
        inside.wait()
        with warnings.catch_warnings(action="ignore"):  # of threads
            child = os.fork()
        if child == 0:
            os._exit(0)
        self.assertEqual(len(left), 1)
        os.waitpid(child, 0)
        thread.join()

    def test_a_reader_who_may_not_write_outlives_the_last_writers_leave(self):
        """Between its look for a -wal and its open: SQLite would have it make another one."""
        self.small()
        wal = Path(f"{self.db}-wal")
        wal.write_bytes(b"a writer's")
        read = liteflow._read_once

        def late(*arguments):
            if wal.exists():
                wal.unlink()
                raise sqlite3.OperationalError("attempt to write a readonly database")
            return read(*arguments)

        with mock.patch.object(liteflow, "_read_once", late):
            self.assertEqual(len(liteflow._read_runs(str(self.db), None)), 1)

    def test_a_lock_that_stays_is_named_with_file_and_seconds(self):
        self.small()
        holder = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(holder.close)
        holder.execute("BEGIN IMMEDIATE")
        close = functools.partialmethod(liteflow._Store.close, False)  # without its second's wait
        with (
            mock.patch.object(liteflow, "_LOCKED_LIMIT", 0.3),
            mock.patch.object(liteflow._Store, "close", close),
            self.assertRaises(DatabaseError) as caught,
        ):
            self.small()
        self.assertIn(str(self.db), str(caught.exception))
        self.assertIn("0.3 s", str(caught.exception))

    def test_deleting_a_run_gives_the_space_back(self):
        run = self.run_flow(
            """
            with DAG("big") as dag:
                @task
                def a(): return os.urandom(2_000_000)
                a()
            """
        )
        self.small()
        size = self.db.stat().st_size
        run.delete()
        self.assertLess(self.db.stat().st_size, size - 1_900_000)
        for table in ("xcom", "task_instance", "task_log", "task_attempt"):
            left = self.query(f"SELECT count(*) FROM {table}")[0][0]
            self.assertEqual(bool(left), True, table)
        self.assertEqual([r[0] for r in self.query("SELECT dag_id FROM dag_run")], ["small"])
        with self.assertRaises(liteflow.RunNotFound):
            run.delete()

    def test_what_is_deleted_takes_no_room(self):
        """Debian's SQLite overwrites it, which a full disk would have no room for."""
        with DAG("big") as dag:
            task(task_id="a")(lambda: bytes(2_000_000))()
        dag.test(db_path=self.db)
        with contextlib.closing(liteflow._Store(str(self.db))) as store:
            store.change(1, lambda row: None, store.delete_run)
            self.assertLess(os.path.getsize(f"{self.db}-wal"), 200_000)

    def test_a_late_outcome_of_a_lost_attempt_is_refused(self):
        store, attempt = self.started_attempt()
        with contextlib.closing(sqlite3.connect(self.db)) as other, other:
            other.execute("UPDATE dag_run SET owner = 'another'")
        attempt.instance.move(TaskInstanceState.SUCCESS)
        late = self.batch_of(attempt)
        row = ("k", "int", "1", None, b"x")
        late.xcoms.append((attempt.instance.row_id, *row))
        with self.assertRaises(liteflow.AlreadyRunning):
            store.record(late)
        self.assertEqual(self.query("SELECT state FROM task_instance"), [("running",)])
        self.assertEqual(self.query("SELECT count(*) FROM xcom"), [(0,)])


class FileTest(StoreCase):
    """What stands beside a database, and what is a database."""

    def test_a_folder_that_may_not_be_entered_holds_no_database(self):
        whole, stat = str(self.folder / "private"), os.stat

        def refuse(path, *args, **kwargs):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(f"{whole}/"):
                raise PermissionError(13, "Permission denied", path)
            return stat(path, *args, **kwargs)

        module = self.module(
            """
            with DAG("private") as dag:
                @task
                def f(): pass
                f()
            """
        )
        with mock.patch.object(os, "stat", refuse):
            with WorkerPool(1) as pool:
                recover = functools.partial(pool.recover, module.dag)
                for act in (module.dag.run, module.dag.runs, module.dag.test, recover):
                    with self.assertRaisesRegex(DatabaseError, "Permission denied"):
                        act(db_path=f"{whole}/flow.db")
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(liteflow.main(["list", "--check", "--db", f"{whole}/flow.db"]), 3)
                self.assertEqual(liteflow.main(["run", f"{whole}/flow.py"]), 2)
        self.assertIn("Permission denied", said.getvalue())

    def test_a_linked_database_is_read_with_its_wal(self):
        run = self.run_flow("""
            with DAG("linked") as dag:
                @task
                def amount(): return 500
                amount()
        """)
        link = self.folder / "link.db"
        link.symlink_to(self.db)
        with contextlib.closing(sqlite3.connect(self.db)) as writer:  # its -wal stays
            writer.execute("UPDATE dag_run SET reason = 'newer'")
            writer.commit()
            self.assertTrue(Path(f"{self.db}-wal").exists())
            self.assertEqual(Dag("linked").runs(link)[0].reason, "newer")
        self.assertEqual(run.db_path, Dag("linked").runs(link)[0].db_path)

    def test_a_look_without_a_descriptor_asks_for_that(self):
        DAG("d").run(db_path=self.db)
        with no_more_descriptors(), self.assertRaisesRegex(DatabaseError, "too many files open"):
            DAG("d").runs(db_path=self.db)

    def test_a_pipe_is_no_database_and_is_not_waited_for(self):
        os.mkfifo(self.db)
        for act in (DAG("d").run, DAG("d").runs):
            with self.assertRaisesRegex(DatabaseError, "no regular file"):
                act(db_path=self.db)

    def test_a_relative_path_is_nowhere_once_the_working_directory_is_gone(self):
        gone = self.folder / "gone"
        gone.mkdir()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(gone)
        gone.rmdir()
        for act in (DAG("d").run, DAG("d").runs):
            with self.assertRaisesRegex(DatabaseError, "my.db. the working directory was removed"):
                act(db_path="my.db")

    def test_a_script_whose_name_is_no_text_is_run(self):
        script = self.script("from liteflow import *\nDAG('d').cli()\n", "my\udcffflow.py")
        done = self.python(script, "--db", self.db)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("my\\377flow.py'", self.query("SELECT command FROM dag_run")[0][0])

    @unittest.skipUnless(os.path.exists("/proc/self/comm"), "Linux")
    def test_a_process_whose_name_is_no_text_runs_dags(self):
        # The kernel cuts the name of a script that is started by itself, or of a service that
        # names itself, to 15 bytes: here within a character.
        named = "Path('/proc/self/comm').write_bytes(b'f\\xc3')"
        script = self.script(
            f"""
            from pathlib import Path
            from liteflow import *
            with DAG("named") as dag:
                @task
                def f(): {named}; return 1
                f()
            if __name__ == "__main__":
                {named}
                print([dag.run(mp_context=how).state.value for how in (None, "fork", "spawn")])
            """
        )
        done = self.python(script, env={**os.environ, "LITEFLOW_DB": str(self.db)})
        self.assertEqual(done.stdout, "['success', 'success', 'success']\n", done.stderr)

    def test_no_file_is_read_in_whatever_encoding_the_locale_has(self):
        source = """
            from liteflow import *
            with DAG("strict") as dag:
                @task
                def f(): return 1
                f()
            if __name__ == "__main__":
                print([dag.run(mp_context=how).state.value for how in (None, "fork", "spawn")])
                print(dag.test().state.value)
            """
        strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning")
        env = {**os.environ, "LITEFLOW_DB": str(self.db)}
        done = self.python(*strict, self.script(source), env=env)
        text = "['success', 'success', 'success']\nsuccess\n"
        self.assertEqual((done.stdout, done.stderr), (text, ""))

    def test_a_run_started_through_a_link_makes_the_target(self):
        link = self.folder / "link.db"
        link.symlink_to(self.db)
        with DAG("empty") as d:
            pass
        d.run(db_path=link)
        self.assertTrue(self.db.is_file())
        self.assertTrue(link.is_symlink())

    def test_a_sweep_removes_only_what_we_made_and_never_through_a_link(self):
        kept = self.folder / "precious"
        for name in ("precious", "flow.db-run-2024", "flow.db-run-odd", "flow.db-run-fifo"):
            (self.folder / name).mkdir()
            (self.folder / name / "file").write_text("keep me")
        (kept / "owner").write_text('{"liteflow": "x"}')
        (self.folder / "flow.db-run-link").symlink_to(kept)
        (self.folder / "flow.db-run-2024" / "owner").symlink_to(kept / "owner")
        (self.folder / "flow.db-run-odd" / "owner").write_bytes(b"\xff\xfe")
        os.mkfifo(self.folder / "flow.db-run-fifo" / "owner")
        with DAG("empty") as d:
            pass
        self.assertEqual(d.run(db_path=self.db).state, "success")
        self.assertTrue((kept / "file").exists())
        for name in ("flow.db-run-2024", "flow.db-run-odd", "flow.db-run-fifo"):
            self.assertTrue((self.folder / name / "file").exists(), name)

    def test_a_sweep_removes_nothing_that_takes_a_folders_place_meanwhile(self):
        """As another user may put it there, where the file stands in a folder for all."""
        for make in (Path.symlink_to, lambda path, kept: kept.rename(path)):
            kept, dead = self.folder / "precious", self.folder / "flow.db-run-2024"
            for folder in (kept, dead):
                folder.mkdir()
                (folder / "file").write_text("keep me")
            (dead / "owner").write_text('{"liteflow": "x"}')
            lock = liteflow._lock

            def late(file, shared, lock=lock, dead=dead, kept=kept, make=make):
                dead.rename(self.folder / "aside")
                make(dead, kept)
                return lock(file, shared)

            with mock.patch.object(liteflow, "_lock", late):
                liteflow._sweep(str(self.db))
            self.assertTrue((dead / "file").exists())
            dead.unlink() if dead.is_symlink() else shutil.rmtree(dead)
            shutil.rmtree(self.folder / "aside")
            shutil.rmtree(kept, ignore_errors=True)

    def test_a_dead_owner_is_dead_while_somebody_sweeps(self):
        dead = self.folder / f"flow.db-run-{'ab' * 8}"
        dead.mkdir()
        (dead / "owner").write_text('{"liteflow": "x"}')
        seen = []

        def remove(folder):
            seen.append(liteflow._owner_lives(str(self.db), "ab" * 8))

        with mock.patch.object(liteflow, "_remove_folder", remove):
            liteflow._sweep(str(self.db))
        self.assertEqual(seen, [False])

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_a_sweep_keeps_nothing_open(self):
        (self.folder / "flow.db-run-2024" / "owner").mkdir(parents=True)
        before = os.listdir("/proc/self/fd")
        liteflow._sweep(str(self.db))
        swept = mock.patch.object(liteflow, "_lock", mock.Mock(side_effect=[False, True]))
        with swept, liteflow._owned_folder(str(self.db)):  # the first one before it was locked
            pass
        self.assertEqual(len(os.listdir("/proc/self/fd")), len(before))

    @unittest.skipUnless(os.geteuid() == 0, "makes files of another user")
    def test_what_another_user_puts_beside_the_file_is_not_taken_for_sqlites(self):
        with DAG("empty") as d:
            pass
        for end in (
            "-wal",
            "-shm",
            "-journal",
        ):  # before there is one: SQLite takes a -shm as it is
            os.mkfifo(beside := f"{self.db}{end}")
            os.chown(beside, 65534, 65534)
            with self.assertRaisesRegex(DatabaseError, f"{end} is another .*: chown it"):
                d.run(db_path=self.db)
            os.unlink(beside)
        self.assertFalse(self.db.exists())
        d.run(db_path=self.db)
        precious = self.folder / "precious"
        precious.write_text("keep me")
        for end in ("-wal", "-shm", "-journal"):
            beside = self.folder / f"{self.db.name}{end}"
            for make in (Path.touch, lambda path: path.symlink_to(precious)):
                make(beside)
                os.chown(beside, 65534, 65534, follow_symlinks=False)
                for act in (d.run, d.runs):
                    with self.assertRaisesRegex(DatabaseError, f"{end} is another .*: chown it"):
                        act(db_path=self.db)
                beside.unlink()
        self.assertEqual(precious.read_text(), "keep me")
        beside.touch()
        os.chown(beside, 65534, 65534)
        self.db.chmod(0o660)  # he may write the file itself
        self.assertEqual(len(d.runs(self.db)), 1)

    def test_what_beside_the_file_may_not_be_read_is_named(self):
        with DAG("empty") as d:
            pass
        d.run(db_path=self.db)
        (beside := Path(f"{self.db}-wal")).mkdir()  # nor can SQLite
        refused = self.assertRaisesRegex(DatabaseError, f"may not read {re.escape(str(beside))}$")
        with mock.patch.object(os, "access", lambda path, mode: path != str(beside)), refused:
            d.runs(self.db)

    def test_who_may_only_read_the_file_leaves_nothing_beside_it(self):
        with DAG("empty") as d:
            pass
        run = d.run(db_path=self.db)
        prune = types.SimpleNamespace(
            db=str(self.db),
            dag=None,
            keep=0,
            older_than=None,
            values=False,
            dry_run=False,
            quiet=True,
        )
        with mock.patch.object(os, "access", lambda path, mode: mode != os.W_OK):
            for act in (run.delete, lambda: liteflow._cmd_prune(prune)):
                with self.assertRaisesRegex(DatabaseError, "it is read-only for this user"):
                    act()
        self.assertEqual(len(d.runs(self.db)), 1)

    def grown(self):
        """A file with many free pages once its run is deleted."""
        run = self.run_flow("""
            with DAG("grown") as dag:
                @task
                def value(): return os.urandom(4_000_000)
                value()
        """)
        return run

    def test_space_is_given_back_in_few_steps(self):
        run, statements = self.grown(), []
        store = liteflow._Store(str(self.db))
        self.addCleanup(store.close)
        store.change(run._row.id, lambda row: None, store.delete_run)
        store._connection.set_trace_callback(statements.append)
        store.give_back()
        steps = [s for s in statements if "incremental_vacuum" in s]
        self.assertLess(len(steps), 5)
        self.assertEqual(store._connection.execute("PRAGMA freelist_count").fetchone(), (0,))

    def test_space_is_given_back_once_another_process_has_let_go_of_the_lock(self):
        run = self.grown()
        store = liteflow._Store(str(self.db))
        self.addCleanup(store.close)
        store.change(run._row.id, lambda row: None, store.delete_run)
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with self.assertRaises(liteflow._Busy):
                    store.give_back()
        store.give_back()
        self.assertEqual(store._connection.execute("PRAGMA freelist_count").fetchone(), (0,))

    def test_giving_back_ends_where_the_file_has_no_auto_vacuum(self):
        with contextlib.closing(sqlite3.connect(self.db)) as made:
            made.execute("PRAGMA journal_mode=WAL")
        run = self.grown()
        self.assertEqual(self.query("PRAGMA auto_vacuum"), [(0,)])
        run.delete()
        self.assertEqual(self.query("SELECT count(*) FROM dag_run"), [(0,)])


# --- Values ---------------------------------------------------------------------------------------


class ValuesTest(Case):
    def test_exact_types_come_back(self):
        run = self.run_flow(
            """
            import collections, datetime, decimal
            Point = collections.namedtuple("Point", "x y")
            VALUES = [1, 1.0, True, 2**80, "x", b"\\0", (1, 2), {1, 2}, frozenset({1}), {1: {"a": None}},
                      Path("/x"), datetime.date(2024, 1, 1), decimal.Decimal("1.10"), range(3),
                      complex(1, 2), float("inf"), Point(1, 2), [0, "", [], {}, None]]
            with DAG("types") as dag:
                @task
                def give(): return VALUES
                @task
                def take(values): return [(type(v).__name__, v == w) for v, w in zip(values, VALUES)]
                take(give())
            """
        )
        module = sys.modules[run.xcom_pull("give")[16].__class__.__module__]
        values = run.xcom_pull("give")
        self.assertEqual(values, module.VALUES)
        self.assertEqual([type(v) for v in values], [type(v) for v in module.VALUES])
        self.assertTrue(all(same for _, same in run.xcom_pull("take")))

    def test_a_large_value_goes_through_and_leaves_no_file(self):
        run = self.run_flow(
            """
            with DAG("large") as dag:
                @task
                def give(): return b"x" * 5_000_000
                @task
                def take(a, b): return len(a), a == b
                @task
                def back(value, n): return value[:n]
                g = give()
                take(g, [g][0]); back(g, 3); back.override(task_id="arg")(b"y" * 300_000, 200_000)
            """
        )
        self.assertEqual(self.states(run)["take"], "success")
        self.assertEqual(run.xcom_pull("take"), (5_000_000, True))
        self.assertEqual(run.xcom_pull("back"), b"xxx")
        self.assertEqual(run.xcom_pull("arg"), b"y" * 200_000)
        self.assert_nothing_left()

    def test_a_value_over_the_databases_limit_fails_without_retry(self):
        before = liteflow._VALUE_LIMIT
        liteflow._VALUE_LIMIT = 1000
        try:
            module = self.module(
                """
                with DAG("over") as dag:
                    @task(retries=3)
                    def give(): return b"x" * 2000
                    give()
                """
            )
            run = module.dag.test(db_path=self.db)
        finally:
            liteflow._VALUE_LIMIT = before
        ti = run.get_task_instance("give")
        self.assertEqual((ti.state, ti.try_number), ("failed", 1))
        self.assertIn("return the path", ti.error)

    def test_bad_results_fail_their_task_alone(self):
        run = self.run_flow(
            BAD_VALUES
            + """
            import threading
            with DAG("bad") as dag:
                @task
                def a_lambda(): return lambda: 1
                @task
                def a_lock(): return threading.Lock()
                @task
                def a_generator(): return (x for x in [1])
                @task
                def a_file(): return open(os.devnull)
                @task
                def exits(): return ExitAtPickle()
                @task
                def errs(): return ErrorAtPickle()
                @task
                def crashes(): return CrashAtPickle()
                @task
                def gives_bad(): return ErrorAtUnpickle()
                @task
                def gives_exit(): return ExitAtUnpickle()
                @task
                def takes(x): return 1
                @task
                def odd(): return HostileRepr()
                @task
                def fine(): return "fine"
                @task
                def locks(): return [threading.Lock()]
                a_lambda(); a_lock(); a_generator(); a_file(); exits(); errs(); crashes(); odd(); fine()
                takes.override(task_id="each").expand(x=locks())
                takes(gives_bad()); takes.override(task_id="takes_exit")(gives_exit())
            """
        )
        reasons = {
            ti.task_id: (ti.error or "").splitlines()[-1:] for ti in run.get_task_instances()
        }
        ok = {t for t, s in self.states(run).items() if s == "success"}
        self.assertEqual(ok, {"gives_bad", "gives_exit", "odd", "fine"})
        for task_id, words in {
            "a_lambda": "returned function, which cannot be pickled",
            "a_lock": "returned lock, which cannot be pickled",
            "a_generator": "return its items as a list",
            "locks": "returned, in a list, a lock, which cannot be pickled",
            "a_file": "returned TextIOWrapper, which cannot be pickled",
            "exits": "SystemExit",
            "errs": "no pickle of me",
            "crashes": "killed by SIGSEGV",
            "takes": "no unpickle of me",
            "takes_exit": "worker exited with code 7 before reporting",
        }.items():
            with self.subTest(task_id):
                self.assertIn(words, reasons[task_id][0])

    def test_what_an_earlier_try_pushed_goes_with_it(self):
        for delay in (0, 0.1):
            run = self.run_flow(
                f"""
                with DAG("tries") as dag:
                    @task(retries=1, retry_delay={delay})
                    def f(ti):
                        if ti.try_number == 1:
                            ti.xcom_push("k", 1)
                            raise ValueError("first")
                    f()
                """
            )
            self.assertEqual((run.state, run.xcoms()), ("success", []))

    def test_a_consumer_gets_its_own_copy(self):
        run = self.run_flow(
            """
            with DAG("copies") as dag:
                @task
                def give(): return [1]
                @task
                def spoil(x, extra=[]): x.append(2); extra.append(1); return x
                @task
                def see(x, order): return x
                g = give()
                see(g, spoil(g))
            """
        )
        self.assertEqual(run.xcom_pull("see"), [1])

    def test_an_argument_that_cannot_travel_is_named(self):
        module = self.module(
            """
            import threading
            with DAG("args") as dag:
                @task
                def f(a, b=None): pass
                f(1, b=[threading.Lock()])
            """
        )
        with self.assertRaises(UnreachableTask) as caught:
            module.dag.run(db_path=self.db, executor=pool())
        for word in ("'f'", "'b'", "lock"):
            self.assertIn(word, str(caught.exception))
        self.assertFalse(self.db.exists())

    def test_classes_of_the_script_come_back_in_it_and_are_named_elsewhere(self):
        self.script(
            """
            import sys
            from dataclasses import dataclass
            from liteflow import DAG, task
            @dataclass
            class Point:
                x: int
            with DAG("classes") as dag:
                @task
                def give(): return Point(1)
                @task
                def take(p): assert isinstance(p, Point); return Point(p.x + 1)
                take(give())
            if __name__ == "__main__":
                if sys.argv[1:] == ["read"]:
                    print(type(dag.runs()[0].xcom_pull("take")) is Point)
                else:
                    run = dag.run()
                    print(run.xcom_pull("take"))
            """
        )
        self.assertEqual(self.python("my_flow.py").stdout, "Point(x=2)\n")
        self.assertEqual(self.python("my_flow.py", "read").stdout, "True\n")
        again = self.cli("run", "my_flow.py", "--resume", "--quiet")
        self.assertEqual((again.returncode, again.stdout), (0, ""))
        [run] = Dag("classes").runs(self.folder / "liteflow.db")
        with self.assertRaises(AttributeError) as caught:
            run.xcom_pull("take")
        self.assertIn("'Point'", str(caught.exception))
        self.assertIn("my_flow.py", str(caught.exception))
        with contextlib.closing(sqlite3.connect(self.folder / "liteflow.db")) as db, db:
            db.execute("UPDATE dag SET fileloc = NULL")  # as of one that was typed at a prompt
        with self.assertRaisesRegex(AttributeError, "'Point' of the script that stored it"):
            run.xcom_pull("take")

    def test_a_value_of_what_is_no_longer_there_says_so(self):
        module = types.ModuleType("shapes")
        exec("class Dot: pass", vars(module))
        with mock.patch.dict(sys.modules, shapes=module):
            stored = liteflow._dump(module.Dot())
            self.assertIsInstance(liteflow._load(stored), module.Dot)
            del module.Dot
            why = r"the value needs shapes\.Dot, which is not here \(.*--from its task\)"
            for there in (module, None):
                sys.modules["shapes"] = there
                with self.assertRaisesRegex(AttributeError, why):
                    liteflow._load(stored)


# --- Worker ---------------------------------------------------------------------------------------


class WorkerTest(Case):
    def test_a_task_cannot_disturb_the_next_one(self):
        run = self.run_flow(
            """
            import logging
            def state():
                return [os.getcwd(), os.environ.get("LEAK"), os.umask(0o022), sys.getrecursionlimit(),
                        signal.getsignal(signal.SIGINT) == signal.SIG_IGN, sys.stdout.fileno(),
                        os.path.exists(os.environ["CASE_DIR"])]
            with DAG("tidy", max_active_tasks=1) as dag:
                @task
                def before(): return state()
                @task
                def spoil():
                    os.chdir("/"); os.environ["LEAK"] = "1"; del os.environ["CASE_DIR"]
                    os.umask(0o777); sys.setrecursionlimit(5000)
                    signal.signal(signal.SIGINT, signal.SIG_DFL); signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    sys.stdout = open(os.devnull, "w"); sys.stderr = None
                @task
                def after(): print("heard"); return state()
                before() >> spoil() >> after()
            """
        )
        self.assertEqual(run.state, "success")
        self.assertEqual(run.xcom_pull("after"), run.xcom_pull("before"))
        self.assertEqual(run.log("after"), "heard\n")

    def test_what_the_module_sets_in_its_process_is_there_for_each_task(self):
        self.addCleanup(sys.setrecursionlimit, sys.getrecursionlimit())
        self.addCleanup(os.umask, os.umask(0o022))
        with WorkerPool(1, mp_context="spawn") as workers:
            other = self.module("with DAG('other') as dag:\n    task(print)('x')\n").dag
            other.run(db_path=self.db, executor=workers)
            module = self.module(
                """
                sys.setrecursionlimit(4321)
                os.umask(0o077)
                with DAG("sets") as dag:
                    @task
                    def found(i): return sys.getrecursionlimit(), os.umask(0o022)
                    first, second = found(1), found(2)
                    first.operator >> second.operator
                """
            )
            run = module.dag.run(db_path=self.db, executor=workers)
        self.assertEqual([x.value for x in run.xcoms()], [(4321, 0o077)] * 2)

    def test_a_log_level_that_a_task_sets_is_not_that_of_the_next_one(self):
        run = self.run_flow(
            """
            import logging
            with DAG("levels", max_active_tasks=1) as dag:
                @task
                def quiet(): logging.root.setLevel("ERROR"); logging.getLogger("mine").info("unsaid")
                @task
                def disable(): logging.disable()
                @task
                def loud(): logging.getLogger("mine").info("said")
                louder = loud.override(task_id="louder")
                quiet() >> loud() >> disable() >> louder()
            """,
            max_workers=1,
        )
        self.assertRegex(run.log("loud"), "INFO mine: said\n$")
        self.assertRegex(run.log("louder"), "INFO mine: said\n$")

    def test_a_callback_that_any_worker_runs_has_the_runs_umask(self):
        self.run_flow(
            """
            def writes(context): (Path(os.environ["CASE_DIR"]) / "made").write_text("")
            with DAG("masked", on_success_callback=writes) as dag:
                @task
                def masks(): os.umask(0o777)
                masks()
            """,
            max_workers=1,
        )
        mask = os.umask(0o022)
        os.umask(mask)
        self.assertEqual((self.folder / "made").stat().st_mode & 0o777, 0o666 & ~mask)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root may do so")
    def test_a_user_that_a_task_becomes_is_not_that_of_the_next_one(self):
        run = self.run_flow(
            """
            def who(): return os.geteuid(), os.getegid()
            with DAG("users", max_active_tasks=1) as dag:
                @task
                def drops(how):
                    for name, i in how: getattr(os, name)(i)
                    return who()
                one = drops.override(task_id="one")([("setgid", 12345), ("setuid", 12345)])
                two = drops.override(task_id="two")([("seteuid", 12345)])
                one >> task(task_id="after_one")(who)() >> two >> task(task_id="after_two")(who)()
            """,
            max_workers=1,
        )
        self.assertEqual(run.state, "success")
        self.assertEqual(run.xcom_pull("one"), (12345, 12345))
        self.assertEqual([run.xcom_pull(f"after_{x}") for x in ("one", "two")], [(0, 0)] * 2)

    def test_streams_that_a_task_takes_apart_are_whole_for_the_next_one(self):
        run = self.run_flow(
            """
            import io, logging
            with DAG("apart", max_active_tasks=1) as dag:
                @task
                def detaches():
                    sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="utf-8")
                    print("detached")
                @task
                def wraps(): io.TextIOWrapper(sys.stderr.buffer)
                @task
                def says(): print("printed"); logging.getLogger("mine").info("logged")
                for i in range(40): task(print, task_id=f"quick_{i}")(i)
                [detaches() for i in range(4)] >> wraps() >> says()
            """,
            max_workers=1,
        )
        self.assertEqual(set(self.states(run).values()), {"success"})
        self.assertEqual(
            {ti.pid for ti in run.get_task_instances()}, {run.get_task_instance("says").pid}
        )
        self.assertEqual(run.log("detaches"), "detached\n")
        self.assertRegex(run.log("says"), "^printed\n[^\n]* INFO mine: logged\n$")

    def test_a_task_that_is_called_inside_a_task_says_so(self):
        run = self.run_flow(
            """
            with DAG("inside") as dag:
                @task
                def one(): return 1
                @task
                def calls(): return one() + 1
                @task
                def plainly(): return one.function() + 1
                calls(); plainly()
            """
        )
        said = "task 'one' was called inside a running task: call one.function(...)"
        self.assertIn(said, run.get_task_instance("calls").error)
        self.assertEqual(run.xcom_pull("plainly"), 2)

    def test_what_a_task_leaves_behind_goes_before_the_next_one(self):
        run = self.run_flow(
            """
            import subprocess, threading
            with DAG("leaves", max_active_tasks=1) as dag:
                @task
                def child(): return subprocess.Popen(["sleep", "60"]).pid
                @task
                def thread(): threading.Thread(target=time.sleep, args=(60,)).start(); return os.getpid()
                @task
                def after(a, b): return [os.getpid(), threading.active_count()]
                after(child(), thread())
            """
        )
        self.assertEqual(run.state, "success", run.get_task_instances())
        self.assertTrue(wait_until(lambda: not alive(run.xcom_pull("child"))))
        self.assertNotEqual(run.xcom_pull("after")[0], run.xcom_pull("thread"))

    def test_a_task_that_disables_logging_does_so_for_itself(self):
        run = self.run_flow(
            """
            import logging
            with DAG("logs") as dag:
                @task
                def quiet(): logging.disable(); logging.error("not heard"); return os.getpid()
                @task
                def loud(pid): logging.error("heard"); return pid == os.getpid()
                loud(quiet())
            """,
            max_workers=1,
        )
        self.assertTrue(run.xcom_pull("loud"))
        self.assertEqual(run.log("quiet"), "")
        self.assertIn("heard", run.log("loud"))

    def test_a_task_that_sets_logging_up_disables_no_later_ones_loggers(self):
        run = self.run_flow(
            """
            import logging, logging.config
            log = logging.getLogger("mine")
            class Says(BaseOperator):
                def execute(self, context): log.info("mine"); self.log.info("own")
            with DAG("set_up") as dag:
                @task
                def sets_up(): logging.config.dictConfig({"version": 1})
                Says(task_id="before") >> sets_up() >> Says(task_id="says")
            """,
            max_workers=1,
        )
        self.assertEqual(re.findall("mine$|own$", run.log("says"), re.MULTILINE), ["mine", "own"])

    def test_what_the_last_task_leaves_behind_goes_though_nobody_asks_for_its_worker(self):
        module = self.module(
            """
            import subprocess
            with DAG("leaves") as dag:
                @task
                def child():
                    kinds = [{}, {"process_group": 0}, {"start_new_session": sys.platform == "linux"}]
                    children = [subprocess.Popen(["sleep", "60"], **kind).pid for kind in kinds]
                    time.sleep(0.05)  # until they are what they are to be
                    return [os.getpid(), *children]
                child()
            """
        )
        with WorkerPool(1) as pool:
            runs = [module.dag.run(db_path=self.db, executor=pool) for _ in range(3)]
            pids = [run.xcom_pull("child") for run in runs]
            children = [pid for _, *children in pids for pid in children]
            self.assertTrue(wait_until(lambda: not any(map(alive, children))))
            self.assertEqual(len({worker for worker, *_ in pids}), 3)

    def test_output_is_captured_whoever_writes_it(self):
        run = self.run_flow(
            """
            import logging, subprocess
            with DAG("output") as dag:
                @task
                def speak():
                    print("from print"); print("to stderr", file=sys.stderr)
                    os.write(1, b"from the descriptor\\n")
                    subprocess.run(["echo", "from a child"], check=True)
                    logging.getLogger("mine").info("from logging"); logging.debug("not shown")
                    os.write(1, b"no newline, \\xff no text")
                @task
                def silent(): pass
                speak() >> silent()
            """
        )
        log = run.log("speak")
        for words in (
            "from print\n",
            "to stderr\n",
            "from the descriptor\n",
            "from a child\n",
            "INFO mine: from logging\n",
            "no newline, \ufffd no text",
        ):
            self.assertIn(words, log)
        self.assertNotIn("not shown", log)
        self.assertEqual(run.log("silent"), "")

    def test_a_task_may_truncate_its_log(self):
        run = self.run_flow(
            """
            with DAG("truncates", max_active_tasks=1) as dag:
                @task
                def first(): print("a" * 100)
                @task
                def second(): print("b" * 10); os.truncate(1, 0); print("oops")
                @task
                def third(): print("c")
                first() >> second() >> third()
            """
        )
        self.assertEqual([run.log(t) for t in ("second", "third")], ["oops\n", "c\n"])

    def test_a_long_log_keeps_head_and_tail(self):
        run = self.run_flow(
            """
            with DAG("long") as dag:
                @task
                def talk():
                    print("first words")
                    for _ in range(300): print("x" * 9_999)
                    print("last words")
                talk()
            """
        )
        log = run.log("talk")
        self.assertLess(len(log), liteflow._LOG_HEAD + liteflow._LOG_TAIL + 200)
        self.assertTrue(log.startswith("first words\n"))
        self.assertTrue(log.endswith("last words\n"))
        self.assertRegex(log, r"\n\[\.\.\. [\d,]+ bytes cut \.\.\.\]\n")

    def test_the_tail_of_a_long_log_is_told_as_its_head_is(self):
        module = self.module("with DAG('d') as dag: task(task_id='a')(print)(*range(9999))\n")
        with mock.patch.multiple(liteflow, _LOG_HEAD=100, _LOG_TAIL=100):
            words = ("--logs", "--max-workers", 1, "--db", self.db)
            said = self.cli_here(*words, main=module.dag.cli).stdout
        self.assertRegex(
            said, r"\Aa \| 0 1 .*\n(a \| \n)?a \| \[.* cut .*\]\na \| .* 9997 9998\n\Z"
        )

    def test_a_character_between_a_logs_head_and_its_tail_is_whole(self):
        path = self.folder / "log"
        text = "x" + "ä" * (liteflow._LOG_HEAD // 2 + 1_000) + "\n"
        path.write_text(text, encoding="utf-8")
        log, attempt = liteflow._SlotLog(path), mock.Mock(log_parts=0)
        self.addCleanup(log.close)
        parts = log.take(attempt, log.size() - 1_000, runs=True) + log.take(attempt, log.size())
        found = {part: words for _, part, words in parts}
        self.assertEqual("".join(found.values()), text)

    def test_a_log_file_is_cut_before_it_fills_the_disk(self):
        path = self.folder / "log"
        log, attempt = liteflow._SlotLog(path), mock.Mock(log_parts=0)
        self.addCleanup(log.close)
        before = liteflow._LOG_FILE_LIMIT
        liteflow._LOG_FILE_LIMIT = 2_000_000
        self.addCleanup(setattr, liteflow, "_LOG_FILE_LIMIT", before)
        parts = {}
        with open(path, "ab", buffering=0) as file:
            for i in range(6):
                file.write(b"%d" % i + b"." * 1_000_000 + b"\n")
                parts.update(
                    {part: text for _, part, text in log.take(attempt, log.size(), runs=True)}
                )
                self.assertLess(path.stat().st_size, 3_100_000)
            file.write(b"the end\n")
        parts.update({part: text for _, part, text in log.take(attempt, log.size())})
        text = "".join(parts[key] for key in sorted(parts))
        self.assertTrue(text.startswith("0..."))
        self.assertTrue(text.endswith(".\nthe end\n"))  # and what came before the file was cut
        cut = int(re.search(r"([\d,]+) bytes cut", text)[1].replace(",", ""))
        self.assertEqual(cut, 6 * 1_000_002 + 8 - liteflow._LOG_HEAD - liteflow._LOG_TAIL)
        path.write_bytes(b"." * 2_100_000 + b"the end\n")
        with mock.patch.object(os, "ftruncate", side_effect=OSError(28, "No space left")):
            [(_, _, text)] = log.take(attempt, log.size())
        self.assertTrue(text.endswith(".the end\n"))

    def test_the_end_of_a_long_log_is_stored_again_where_there_is_more_and_not_too_often(self):
        path = self.folder / "log"
        path.write_bytes(b"." * 600_000)
        log, attempt = liteflow._SlotLog(path), mock.Mock(log_parts=0)
        self.addCleanup(log.close)

        def stored(more="", runs=True):
            with open(path, "a") as file:
                file.write(more)
            return [part for _, part, _ in log.take(attempt, log.size(), runs=runs)]

        end = liteflow._TAIL_PART
        self.assertEqual([stored(), stored(), stored("more")], [[1, end], [], []])
        with mock.patch.object(liteflow, "_monotonic", return_value=time.monotonic() + 6):
            self.assertEqual([stored(), stored("more")], [[end], []])
        self.assertEqual([stored(runs=False), stored(runs=False)], [[end], []])

    def test_what_follows_in_a_log_that_a_task_has_emptied_is_read_though_it_was_read_before(self):
        path = self.folder / "log"
        path.write_bytes(b"the attempt before\n")
        log, attempt = liteflow._SlotLog(path), mock.Mock(log_parts=0)
        self.addCleanup(log.close)
        log.begin(log.size())
        with open(path, "ab", buffering=0) as file:
            file.write(b"first words\n")
            parts = log.take(attempt, log.size(), runs=True)
            file.truncate(0)
            file.write(b"last words\n")
        parts += log.take(attempt, log.size())
        self.assertEqual([text for _, _, text in parts], ["first words\n", "last words\n"])

    def test_the_log_of_a_sensor_that_is_rescheduled_is_no_longer_than_others(self):
        run = self.run_flow(
            """
            with DAG("waits") as dag:
                @task.sensor(mode="reschedule", poke_interval=0.001)
                def wait(ti=None, n=[0]):
                    n[0] += 1
                    print(f"poke {n[0]}", "." * 100_000, "end")
                    return n[0] == 30
                wait()
            """,
            max_workers=1,
        )
        log = run.log("wait")
        self.assertLess(len(log), liteflow._LOG_HEAD + 100_500)
        self.assertRegex(log, r"(?s)^poke 1 .*\npoke 5 .*bytes cut \.\.\.\]\npoke 30 \.* end\n$")

    def test_what_is_cut_out_of_a_rescheduled_sensors_log_is_counted_once(self):
        # A file that is larger is emptied, as the poke runs or once it has ended.
        for limit, looks in (10_000, 0), (500, 0), (500, 1):
            attempt = liteflow._Attempt(mock.Mock())
            log = liteflow._SlotLog(str(self.folder / f"log-{limit}-{looks}"))
            self.addCleanup(log.close)
            limits = {"_LOG_HEAD": 100, "_LOG_TAIL": 50, "_LOG_FILE_LIMIT": limit}
            with mock.patch.multiple(liteflow, **limits), open(log.path, "ab", 0) as file:
                for size in 1000, 700, 400:
                    log.begin(log.start, *attempt.log_seen)
                    file.write(b"." * size)
                    parts = [log.take(attempt, log.size(), runs=True) for _ in range(looks)]
                    parts.append(log.finish(attempt, log.size()))
                    [*_, (_, _, text)] = itertools.chain(*parts)
            self.assertEqual(text, "\n[... 1,950 bytes cut ...]\n" + "." * 50, (limit, looks))
            self.assertEqual(attempt.log_parts, 1)

    def test_warnings_that_are_errors_hide_no_traceback(self):
        formatted = traceback.format_exception

        def warns(*error):  # as Python 3.15 does
            warnings.warn("a module without a loader", stacklevel=2)
            return formatted(*error)

        with (
            warnings.catch_warnings(action="error"),
            mock.patch.object(traceback, "format_exception", warns),
        ):
            self.assertEqual(liteflow._traceback(ValueError("what")), "ValueError: what")

    def test_tracebacks_are_the_users_own_and_name_the_reason_last(self):
        run = self.run_flow(
            BAD_VALUES
            + """
            with DAG("errors") as dag:
                @task
                def plain(): raise ValueError("what")
                @task
                def chained():
                    try: 1 / 0
                    except ZeroDivisionError as e: raise KeyError("k") from e
                @task
                def two_args(): raise TwoArgError(1, 2)
                @task
                def hostile(): raise HostileStr()
                @task
                def own_base(): raise OwnBase("mine")
                @task
                def exits(): sys.exit(0)
                @task
                def exits_text(): sys.exit("x")
                @task
                def interrupts(): raise KeyboardInterrupt
                @task
                def generator_exit(): raise GeneratorExit
                @task
                def recursion(): recursion.function()
                @task
                def huge(): raise ValueError("x" * 10_000_000)
                @task
                def surrogate(): raise ValueError("\\udcff")
                @task
                def blank_first(): raise ImportError("\\n\\ninstall it\\nby pip")
                class HostileNotes(Exception): __notes__ = property(lambda self: sys.exit())
                @task
                def notes(): raise HostileNotes("what")
                for f in list(globals().values()):
                    if isinstance(f, liteflow._TaskFunction): f()
            """
        )
        self.assertEqual({ti.state for ti in run.get_task_instances()}, {"failed"})
        errors = {ti.task_id: ti.error for ti in run.get_task_instances()}
        last = {task_id: error.splitlines()[-1] for task_id, error in errors.items()}
        self.assertEqual(last["plain"], "ValueError: what")
        self.assertNotIn("liteflow.py", errors["plain"])
        self.assertIn("in plain", errors["plain"])
        self.assertIn("ZeroDivisionError", errors["chained"])
        self.assertTrue(last["two_args"].endswith("TwoArgError: 1 and 2"))
        self.assertIn("HostileStr", last["hostile"])
        self.assertTrue(last["own_base"].endswith("OwnBase: mine"))
        self.assertEqual(last["exits"], "called sys.exit(0)")
        self.assertEqual(last["exits_text"], "called sys.exit('x')")
        self.assertEqual(last["interrupts"], "KeyboardInterrupt")
        self.assertIn("RecursionError", last["recursion"])
        self.assertEqual(last["blank_first"], "ImportError: install it")
        self.assertIn("HostileNotes (its traceback can't be shown: SystemExit)", errors["notes"])
        self.assertTrue(last["notes"].endswith("HostileNotes: what"))
        self.assertLess(len(errors["huge"]), 70_000)

    def test_the_reason_of_a_skip_is_one_line(self):
        run = self.run_flow(
            """
            with DAG("d") as dag:
                @task
                def f(): raise AirflowSkipException("nothing to do:\\nno files")
                f()
            """
        )
        said = run.get_task_instance("f").error
        self.assertEqual(said, "AirflowSkipException: nothing to do: no files")

    def test_breakpoint_says_what_to_do(self):
        flow = "def stops(): breakpoint()\nwith DAG('debug') as dag: task(stops)()"
        self.assertIn("dag.test()", self.run_flow(flow).get_task_instance("stops").error)
        with mock.patch.dict(os.environ, PYTHONBREAKPOINT="0"):
            self.assertEqual(self.run_flow(flow).state, "success")
        flow = flow.replace("breakpoint()", "__import__('pdb').set_trace(); return 1")
        said = liteflow._last_line(self.run_flow(flow).get_task_instance("stops").error)
        self.assertIn("RuntimeError: pdb in a worker process", said)

    def test_async_tasks(self):
        run = self.run_flow(
            """
            import asyncio
            with DAG("async") as dag:
                @task
                async def waits(): await asyncio.sleep(0); return "done"
                waits()
            """
        )
        self.assertEqual(run.xcom_pull("waits"), "done")

    def test_async_methods_of_operators(self):
        run = self.run_flow(
            """
            class Runs(BaseOperator):
                async def pre_execute(self, context): self.found = 1
                async def execute(self, context): return self.found
                async def on_success_callback(self, context): print('called')
            class Waits(BaseSensorOperator):
                async def poke(self, context): return False
            with DAG("d") as dag:
                Runs(task_id="runs")
                Waits(task_id="waits", poke_interval=0, timeout=0.01)
            """
        )
        self.assertEqual((run.xcom_pull("runs"), run.log("runs")), (1, "called\n"))
        self.assertEqual(self.states(run), {"runs": "success", "waits": "failed"})

    def test_a_result_that_has_any_attribute_is_not_awaited(self):
        run = self.run_flow(
            """
            class Anything(dict):
                def __getattr__(self, name): return self.get(name)
            with DAG("d") as dag:
                @task
                def f(): return Anything(a=1)
                f()
            """
        )
        self.assertEqual(run.raise_if_failed().xcom_pull("f"), {"a": 1})

    def test_async_tasks_where_a_loop_runs(self):
        import asyncio

        async def who(ti):
            await asyncio.sleep(0)
            return ti.task_id, liteflow.get_current_context()["ti"].task_id

        with DAG("notebook") as d:
            task(task_id="a")(who)()

        async def cell():
            return d.test(db_path=self.db)

        self.assertEqual(asyncio.run(cell()).xcom_pull("a"), ("a", "a"))

    def test_the_environment_is_that_of_run(self):
        os.environ["FLOW_SETTING"] = "now"
        self.addCleanup(os.environ.pop, "FLOW_SETTING", None)
        run = self.run_flow(
            """
            with DAG("environment") as dag:
                @task
                def see(): return [os.environ.get("FLOW_SETTING"), os.getcwd(), sys.stdin.read()]
                see()
            """
        )
        self.assertEqual(run.xcom_pull("see"), ["now", os.getcwd(), ""])

    @unittest.skipUnless(sys.platform == "linux", "elsewhere workers are not forked from here")
    def test_a_variable_that_can_t_be_set_again_is_left_alone(self):
        # Of an empty name, as from `=C:=C:\\` in a program's environment: setenv() refuses it.
        source = """
            from liteflow import *
            vars(os.environ)["_data"][b""] = b"C:=x"
            with DAG("odd") as dag:
                @task
                def change(): os.environ["LEAK"] = os.environ.pop("CASE_DIR")
                @task
                def see(x=None): return os.environ.get("LEAK"), os.environ[""], "CASE_DIR" in os.environ
                change() >> see()
            if __name__ == "__main__":
                run = dag.run(max_workers=1)
                print(run.xcom_pull("see"))
            """
        script = self.script("import os\n" + textwrap.dedent(source))
        done = self.python(script, env={**os.environ, "LITEFLOW_DB": str(self.db)})
        self.assertEqual(done.stdout, "(None, 'C:=x', True)\n", done.stderr)

    def test_memory_and_recursion_run_out_in_one_task_alone(self):
        run = self.run_flow(
            """
            import resource
            with DAG("limits") as dag:
                @task
                def hog():
                    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); return len(bytearray(2**31 - 1))
                @task
                def fine(i): return i
                hog(); fine(1); fine(2)
            """
        )
        self.assertEqual(
            self.states(run), {"hog": "failed", "fine": "success", "fine__1": "success"}
        )
        self.assertIn("MemoryError", run.get_task_instance("hog").error)

    def test_a_worker_whose_log_is_gone_closes_no_other_file_for_it(self):
        # A run may be over, and its logs gone, before its last worker has opened its own.
        self.script(
            """
            import os, pathlib
            import liteflow
            worker = liteflow._Worker(None)
            for name, there in (("first", True), ("gone", False), ("last", True)):
                worker.log = f"{name}.log"
                if there: pathlib.Path(worker.log).touch()
                try: worker._renew_output()
                except OSError: assert not there, name
                else: assert there, name
                if name == "gone":
                    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
            os.write(1, b"said")
            for other in others: assert os.path.sameopenfile(other, others[-1])
            worker._renew_output(anew=False)
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((self.folder / "last.log").read_text(), "said")

    def test_a_script_that_leads_a_group_as_it_is_imported(self):
        self.script(
            """
            import os, subprocess
            if os.getpgrp() != os.getpid(): os.setpgrp()
            from liteflow import DAG, task
            with DAG("leads") as dag:
                @task(execution_timeout=0.2)
                def waits(): subprocess.run(["sleep", "100"])
                @task
                def fine(): return os.getpgrp() == os.getpid()
                waits()
                fine()
            if __name__ == "__main__":
                run = dag.run(db_path="flow.db", max_workers=2, mp_context="forkserver")
                print(run.xcom_pull("fine"), run.get_task_instance("waits").error.splitlines()[-1])
            """
        )
        ended = self.python("my_flow.py")
        self.assertEqual((ended.stdout, ended.stderr), ("True timeout after 0.2 s\n", ""))


class ContextTest(Case):
    def test_everything_local_is_there(self):
        run = self.run_flow(
            """
            KEYS = sorted(liteflow._CONTEXT_KEYS)
            with DAG("context", params={"p": 1}) as dag:
                @task(params={"own": 2})
                def see(*, ds, ts, ts_nodash, ds_nodash, logical_date, run_id, params, ti, dag_run,
                        data_interval_start, var, **rest):
                    return {
                        "ds": ds, "ts": ts, "nodash": [ds_nodash, ts_nodash], "params": params,
                        "same": rest["task_instance"] is ti, "interval": data_interval_start == logical_date,
                        "state": str(dag_run.state), "conf": dag_run.conf, "var": var["value"].get("x", "none"),
                        "key": rest["task_instance_key_str"] == f"context__see__{ds_nodash}",
                        "current": get_current_context()["ti"] is ti, "host": bool(ti.hostname),
                        "absent": sorted(set(rest) - set(KEYS)), "max_tries": ti.max_tries,
                        "up": sorted(rest["task"].upstream_task_ids), "type": dag_run.run_type,
                    }
                see()
            """,
            logical_date=datetime.datetime(2024, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
            conf={"p": 5, "more": True},
        )
        self.assertEqual(run.state, "success", run.get_task_instances()[0].error)
        self.assertEqual(
            run.xcom_pull("see"),
            {
                "ds": "2024-02-03",
                "ts": "2024-02-03T04:05:06+00:00",
                "nodash": ["20240203", "20240203T040506"],
                "params": {"p": 5, "own": 2, "more": True},
                "same": True,
                "interval": True,
                "state": "running",
                "conf": {"p": 5, "more": True},
                "var": "none",
                "key": True,
                "current": True,
                "host": True,
                "absent": [],
                "max_tries": 0,
                "up": [],
                "type": "manual",
            },
        )

    def test_what_is_given_by_position_for_a_context_parameter_is_kept(self):
        with DAG("d") as d:
            task(task_id="f")(lambda ds: ds)("mine")
        self.assertEqual(d.test(db_path=self.db).xcom_pull("f"), "mine")

    def test_a_variable_is_read_as_an_attribute(self):
        with DAG("d") as d:
            task(task_id="f")(lambda var: [var["value"].n, var["json"].n])()
        with mock.patch.dict(os.environ, AIRFLOW_VAR_N="[5]"):
            self.assertEqual(d.test(db_path=self.db).xcom_pull("f"), ["[5]", [5]])

    def test_a_context_can_be_copied(self):
        with DAG("d") as d:
            task(task_id="f")(lambda var, **rest: sorted(copy.deepcopy({**rest, "var": var})))()
        self.assertIn("var", d.test(db_path=self.db).raise_if_failed().xcom_pull("f"))

    def test_a_thread_of_a_task_has_its_context(self):
        run = self.run_flow(
            """
            from concurrent.futures import ThreadPoolExecutor
            with DAG("threads") as dag:
                @task
                def f(ti):
                    def push(key): ti.xcom_push(key, liteflow.get_current_context()["ti"].task_id)
                    with ThreadPoolExecutor(2) as threads: list(threads.map(push, ["a", "b"]))
                f()
            """
        )
        self.assertEqual(run.raise_if_failed().xcom_pull("f", key="b"), "f")

    def test_one_that_was_read_pulls_nothing_from_the_task_that_runs(self):
        with DAG("first") as first:
            task(task_id="f")(lambda: "its own")()
        read = first.test(db_path=self.db).get_task_instance("f")
        with DAG("second") as second:
            task(task_id="f")(lambda: read.xcom_pull("f"))()
        error = second.test(db_path=self.db).get_task_instance("f").error
        self.assertIn("is a record, of no running task: see DagRun.xcom_pull()", error)

    def test_outside_a_task_there_is_no_context(self):
        for act in (
            liteflow.get_current_context,
            lambda: liteflow.TaskInstance("d", "r", "t").xcom_push("k", 1),
        ):
            with self.assertRaises(RuntimeError):
                act()

    def test_pulls(self):
        run = self.run_flow(
            """
            with DAG("pulls") as dag:
                @task
                def one(ti): ti.xcom_push("k", {"a": 1}); return "one"
                @task
                def two(ti): ti.xcom_push("k", 2)
                @task
                def pull(ti):
                    own = [ti.xcom_pull(key="mine")]; ti.xcom_push("mine", [1]); ti.xcom_push("mine", [2])
                    return [own, ti.xcom_pull(key="mine"), ti.xcom_pull("one"), ti.xcom_pull(["one", "two"], key="k"),
                            ti.xcom_pull("nobody"), ti.xcom_pull("one", default=5), ti.xcom_pull("two"),
                            ti.xcom_pull("one", map_indexes=3, default=5), ti.xcom_pull("one", key="k")]
                [one(), two()] >> pull()
                @task
                def bad(key, ti): ti.xcom_push(key, 4)
                bad(3), bad("k\\udce9")
            """
        )
        self.assertEqual(
            run.xcom_pull("pull"),
            [[None], [2], "one", [{"a": 1}, 2], None, "one", None, 5, {"a": 1}],
        )
        self.assertIn("key must be str", run.get_task_instance("bad").error)
        self.assertIn(r"'k\udce9' is no text", run.get_task_instance("bad__1").error)

    def test_an_instance_pulls_what_those_before_it_gave(self):
        with DAG("d") as d:
            task(task_id="f")(lambda x, ti: [x, ti.xcom_pull("f")]).expand(x=[1, 2])
        self.assertEqual(d.test(db_path=self.db).xcom_pull("f"), [[1, None], [2, [1, None]]])

    def test_keys_of_outputs(self):
        run = self.run_flow(
            """
            import collections.abc
            with DAG("keys") as dag:
                @task(multiple_outputs=True)
                def many(): return {"a": 1, "b": None}
                @task(do_xcom_push=False)
                def plain(ti): ti.xcom_push("own", 3); return {"a": 1}
                @task
                def wrong() -> dict: return [1]
                @task
                def mapping() -> collections.abc.Mapping: return collections.ChainMap({"a": 1})
                @task
                def show(x): return [x]
                m, p = many(), plain()
                show(m["a"]); show(m["absent"]); show(p["own"]); show(p["a"]); wrong()
                show.override(task_id="of_mapping")(mapping()["a"])
            """
        )
        self.assertEqual(
            [run.xcom_pull(t) for t in ("show", "show__1", "show__2")], [[1], [None], [3]]
        )
        self.assertEqual(run.xcom_pull("of_mapping"), [1])
        self.assertIn("XComNotFound", run.get_task_instance("show__3").error)
        self.assertIsNone(run.xcom_pull("plain"))
        said = "has multiple_outputs (set, or by its annotation; False keeps a dict whole)"
        self.assertIn(said, run.get_task_instance("wrong").error)

    def test_dag_params_are_placeholders(self):
        module = self.module(
            """
            from liteflow import dag as dag_decorator
            @dag_decorator
            def build(n, m=2):
                @task
                def show(a, b): return [a, b]
                show(n, [m])
            dag = build(1)
            """
        )
        run = module.dag.run(db_path=self.db, executor=pool())
        self.assertEqual(run.xcom_pull("show"), [1, [2]])
        run = module.dag.run(db_path=self.db, executor=pool(), conf={"m": 7})
        self.assertEqual(run.xcom_pull("show"), [1, [7]])

    def test_a_param_that_nobody_gives_is_named(self):
        source = "with DAG('d') as dag: task(task_id='f')(abs)(dag.param('size'))\n"
        self.assertEqual(self.run_flow(source, conf={"size": -1}).xcom_pull("f"), 1)
        error = self.run_flow(source).get_task_instance("f").error
        self.assertIn("param 'size' has no value: give it a default, or by conf", error)


class FindingTest(Case):
    def test_a_method_of_a_builtin_has_no_module(self):
        run = self.run_flow(
            """
            with DAG("joins") as dag:
                task(",".join, task_id="join")(["a", "b"])
            """
        )
        self.assertEqual(run.xcom_pull("join"), "a,b")

    def test_functions_in_a_loop_keep_their_own_meaning(self):
        run = self.run_flow(
            """
            with DAG("loop") as dag:
                for i in range(3):
                    @task(task_id=f"loop_{i}")
                    def f(j=i): return j
                    f()
            """
        )
        self.assertEqual([run.xcom_pull(f"loop_{i}") for i in range(3)], [0, 1, 2])

    def test_a_factory_of_a_library_finds_the_module_that_calls_it(self):
        (self.folder / "factory_lib.py").write_text(
            textwrap.dedent(
                """
            from liteflow import DAG, task
            def make(name, factor):
                with DAG(name) as d:
                    @task
                    def times(x): return x * factor
                    times(2)
                return d
            """
            )
        )
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        self.addCleanup(sys.modules.pop, "factory_lib", None)
        module = self.module(
            "import factory_lib\nfirst = factory_lib.make('m1', 10)\nsecond = factory_lib.make('m2', 20)\n"
        )
        runs = [d.run(db_path=self.db, executor=pool()) for d in (module.first, module.second)]
        self.assertEqual([run.xcom_pull("times") for run in runs], [20, 40])

    def test_one_id_built_twice_is_told_apart(self):
        module = self.module(
            """
            def make(factor):
                with DAG("twice") as d:
                    @task
                    def f(): return factor
                    f()
                return d
            one, two = make(1), make(2)
            """
        )
        runs = [d.run(db_path=self.db, executor=pool()) for d in (module.one, module.two)]
        self.assertEqual([run.xcom_pull("f") for run in runs], [1, 2])
        with self.assertRaises(UnreachableTask):
            module.make(3).run(db_path=self.db, executor=pool())

    def test_what_is_found_by_name_alone_keeps_what_it_was_given(self):
        self.script(
            """
            from liteflow import DAG, UnreachableTask, WorkerPool, task
            def never(context): return False
            def negative(x): return -x
            @task.run_if(never)
            @task
            def left_out(): return 1
            @task
            def numbers(): return [1, 2]
            @task
            def each(x): return x
            @task.bash
            def says(word): return f"echo $A {word}"
            def here(): return "here"
            def there(): return "there"
            with DAG("either") as either:  # a worker builds it with another function
                task(task_id="t")(here if __name__ == "__main__" else there)()
            if __name__ == "__main__":
                with DAG("named") as dag:
                    left_out()
                    each.expand(x=numbers().map(negative))
                    says.override(env={"A": each("it")})("works")
                with DAG("refused") as refused:
                    each.override(on_failure_callback=lambda context: None)(1)
                with WorkerPool(1, "spawn") as pool:
                    run = dag.run(db_path="flow.db", executor=pool)
                    print(run.get_task_instance("left_out").state, run.xcom_pull("each"))
                    print(run.xcom_pull("says"))
                    print(either.run(db_path="flow.db", executor=pool).xcom_pull("t"))
                    try: refused.run(db_path="flow.db", executor=pool)
                    except UnreachableTask as error: print(error)
            """
        )
        done = self.python("my_flow.py")
        *found, refused = done.stdout.splitlines()
        self.assertEqual((found, done.stderr), (["skipped [-1, -2]", "it works", "here"], ""))
        self.assertRegex(refused, "'each': one of its settings can't be sent .*: build the DAG")

    def test_a_dag_that_no_module_builds(self):
        def build(made):
            with DAG("d") as d:
                task(task_id="f")(lambda: 1)()
            made.append(d)

        made = []
        thread = threading.Thread(target=build, args=[made])
        thread.start()
        thread.join()
        self.assertEqual(made[0].test(db_path=self.db).xcom_pull("f"), 1)
        with self.assertRaisesRegex(UnreachableTask, "the module of its function does not build"):
            made[0].run(db_path=self.db, executor=pool())
        with self.assertRaisesRegex(RuntimeError, r"run the script .* \(no file\)"):
            Dag.load("d", self.db).cli()
        said = self.cli_here("clear", "d", "f", "--db", self.db).stderr
        self.assertRegex(said, r"\Acleared in run .*\n\Z")

    def test_the_callbacks_of_a_dag_below_a_main_guard_are_called(self):
        self.script(
            """
            from liteflow import DAG, task
            def told(context):
                with open("told", "a") as file: print(context["reason"], file=file)
            @task
            def fails(): raise ValueError
            if __name__ == "__main__":
                for method in (None, "spawn"):
                    with DAG("guarded", on_failure_callback=told) as dag:
                        fails()
                    dag.run(mp_context=method)
            """
        )
        self.python("my_flow.py")
        self.assertEqual((self.folder / "told").read_text(), "task_failure\n" * 2)

    def test_module_functions_are_found_by_name_below_a_main_guard(self):
        self.script(
            """
            from liteflow import DAG, task
            @task(retries=1)
            def double(x, task): return [x * 2, task.retries, sorted(task.upstream_task_ids)]
            def plain(x): return x
            if __name__ == "__main__":
                with DAG("guarded") as dag:
                    double(task(plain)(2))
                run = dag.run()
                print(run.xcom_pull("double"), run.xcom_pull("plain"))
            """
        )
        self.assertEqual(self.python("my_flow.py").stdout, "[4, 1, ['plain']] 2\n")

    def test_what_is_called_may_be_a_class_or_have_no_hash(self):
        self.script(
            """
            import dataclasses, functools
            from liteflow import DAG, task
            class Made:
                def __reduce__(self): return str, ("made",)
            @dataclasses.dataclass
            class Counted:
                function: object
                def __post_init__(self): functools.update_wrapper(self, self.function)
                def __call__(self, x): return self.function(x)
            @Counted
            def plain(x): return x
            if __name__ == "__main__":
                with DAG("guarded") as dag:
                    task(Made)() >> task(plain)(2)
                run = dag.run()
                print(run.xcom_pull("Made"), run.xcom_pull("plain"))
            """
        )
        self.assertEqual(self.python("my_flow.py").stdout, "made 2\n")

    def test_what_a_worker_cannot_find_is_refused_before_anything_is_written(self):
        self.script(
            """
            from liteflow import DAG, task
            if __name__ == "__main__":
                with DAG("hidden") as dag:
                    task(task_id="anonymous")(lambda: 1)()
                    def local(): pass
                    local.__qualname__ = "somewhere.else"
                    task(local)()
                dag.cli()
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(done.returncode, 2)
        for word in ("'anonymous'", "'local'", "top level"):
            self.assertIn(word, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(
            sorted(p.name for p in self.folder.iterdir() if p.name != "__pycache__"),
            ["liteflow.py", "my_flow.py"],
        )

    def test_a_script_without_a_main_guard_gets_one_sentence(self):
        self.script(
            """
            from liteflow import DAG, task
            with open("imported.txt", "a") as f: f.write("x"); assert f.tell() < 7
            with DAG("unguarded") as dag:
                @task
                def f(): pass
                f()
            dag.cli()
            """
        )
        for argv in (["my_flow.py"], ["-c", "import my_flow"]):
            done = self.python(*argv)
            self.assertEqual(done.returncode, 2)
            self.assertIn('if __name__ == "__main__"', done.stderr)
            self.assertEqual(done.stderr.count("liteflow: error"), 1)
            self.assertNotIn("Traceback", done.stderr)
            self.assertLessEqual(len((self.folder / "imported.txt").read_text()), 3)
            (self.folder / "imported.txt").unlink()

    def test_interactive_programs(self):
        source = (
            "from liteflow import DAG, task\n"
            "with DAG('prompt') as dag:\n"
            "    @task\n"
            "    def f(): return 41\n"
            "    @task\n"
            "    def g(x): return x + 1\n"
            "    g(f())\n\n"
            "print(dag.run().xcom_pull('g'))\n"
        )
        # As IPython's %run does with a script, before a notebook, which has threads, runs a DAG.
        self.script("import liteflow")
        ran = (
            "import runpy, threading\n"
            "runpy.run_path('my_flow.py', run_name='__main__')\n"
            "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        )
        # As a prompt from Python 3.13 on, whose file is one of the library.
        (self.folder / "_pyrepl").mkdir()
        (prompt := self.folder / "_pyrepl/__main__.py").touch()
        started = f"import threading\n__file__ = {str(prompt)!r}\n{ran.splitlines()[-1]}\n"
        for text in source, ran + source, started + source:
            process = self.start("-W", "error", "-c", text)
            out, err = process.communicate(timeout=LIMIT)
            self.assertEqual((out, process.returncode), ("42\n", 0), err)
        done = subprocess.run(
            [sys.executable, "-"],
            input=source,
            text=True,
            cwd=self.folder,
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        self.assertEqual(done.stdout, "42\n", done.stderr)

    def test_a_module_that_was_loaded_by_its_path_alone(self):
        self.script(
            """
            import runpy
            from importlib.util import module_from_spec, spec_from_file_location
            def load():
                spec = spec_from_file_location("by_path", "dags.py")
                spec.loader.exec_module(module := module_from_spec(spec))
                return module.dag
            if __name__ == "__main__":
                for dag in load(), runpy.run_path("dags.py")["dag"]:
                    print(dag.run().xcom_pull("f"))
                    print(dag.run(mp_context="spawn").xcom_pull("f"))
            """
        )
        source = "from liteflow import DAG, task\nwith DAG('d') as dag:\n    @task\n    def f(): return 1\n"
        (self.folder / "dags.py").write_text(f"{source}    f()\n")
        done = self.python("-W", "error", "my_flow.py")
        self.assertEqual((done.stdout, done.stderr), ("1\n1\n1\n1\n", ""))

    def test_python_m_package(self):
        package = self.folder / "pkg"
        package.mkdir()
        (package / "__init__.py").touch()
        self.script("")
        (package / "helper.py").write_text("def twice(x): return 2 * x\n")
        (package / "flow.py").write_text(
            textwrap.dedent(
                """
            from liteflow import DAG, task
            from .helper import twice
            with DAG("packaged") as dag:
                @task
                def f(): return twice(21)
                f()
            if __name__ == "__main__":
                print(dag.run().xcom_pull("f"))
            """
            )
        )
        done = self.python("-m", "pkg.flow")
        self.assertEqual(done.stdout, "42\n", done.stderr)

    def test_python_m_package_that_has_threads(self):
        package = self.folder / "pkg"
        package.mkdir()
        self.script("")
        (package / "__main__.py").write_text(
            textwrap.dedent(
                """
            import os, threading
            from liteflow import DAG, WorkerPool, task
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            with DAG("packaged") as dag:
                @task
                def f(): return os.getpid()
                f()
            if __name__ == "__main__":
                with WorkerPool(1) as pool:
                    runs = [dag.run(executor=pool) for _ in range(2)]
                    print(len({run.xcom_pull("f") for run in runs}))
            """
            )
        )
        done = self.python("-W", "error", "-m", "pkg")  # no other process can import that
        self.assertEqual((done.stdout, done.stderr), ("1\n", ""))

    def test_what_stands_at_the_margin_inside_a_guard_does_not_end_it(self):
        script = self.folder / "script.py"
        script.write_text('if __name__ == "__main__":\n# now\n    run(\n)\ndef f(): pass\n')
        below = [liteflow._is_below_guard(str(script), line) for line in range(1, 6)]
        self.assertEqual(below, [True, True, True, True, False])


class ElsewhereTest(Case):
    """A worker that has files of its own, and imports them in its own way, as Dask's do."""

    SOURCE = """
        with DAG("elsewhere") as dag:
            @task
            def numbers(): return [1]
            numbers()
        """

    def test_a_module_that_is_not_there_is_named(self):
        with self.assertRaisesRegex(ImportError, "no module 'nowhere'.* nor /on/another/flow.py"):
            liteflow._import("nowhere", "/on/another/flow.py")

    def test_a_module_that_was_imported_twice_has_its_dag_under_the_same_key(self):
        module = self.module(self.SOURCE)
        key = module.dag._key
        module.__spec__.loader.exec_module(module)  # the same import goes on
        self.assertEqual(module.dag._key, (*key[:2], key[2] + 1))
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        module.__spec__ = spec  # another one, as of importlib.reload
        spec.loader.exec_module(module)
        self.assertEqual(module.dag._key, key)
        self.assertIs(liteflow._built[key], module.dag)

    def test_a_file_that_is_not_on_this_machine_is_imported_by_name(self):
        module = self.module(self.SOURCE)
        folder, name = str(self.folder), module.__name__
        self.addCleanup(setattr, sys, "path", sys.path[:])
        sys.path.append(folder)
        del sys.modules[name]
        liteflow._import(name, "/on/another/machine/flow.py")
        self.assertEqual(sys.modules[name].__file__, module.__file__)
        (self.folder / "beside").mkdir()  # one that is there is meant, whatever has its name
        beside = shutil.copy(module.__file__, self.folder / "beside")
        liteflow._import(name, beside)
        self.assertEqual(sys.modules[name].__file__, beside)

    def test_a_task_that_another_worker_has_found_is_named_where_it_is_not_there(self):
        module, settings = self.module(""), (liteflow._NO_SETTINGS, liteflow._dump({}))
        run, said = liteflow._WorkerRun({}, Dag("d")), f"'f' .*: no {module.__name__}:gone"
        for given in (settings, None):
            with self.assertRaisesRegex(UnreachableTask, said):
                run.find("f", f"{module.__name__}:gone", given)


class SurroundingsTest(Case):
    """Wherever Python code runs, a DAG runs, or one sentence says why not."""

    FLOW = """
        from liteflow import DAG, task
        with DAG("anywhere") as dag:
            @task
            def f(): return 41
            @task(execution_timeout=60)
            def g(x): return x + 1
            g(f())
        if __name__ == "__main__":
            print(dag.run(max_workers=1).xcom_pull("g"))
    """

    def assert_42(self, *argv, **options):
        self.assert_ends_with_42(self.start(*argv, **options))

    def assert_ends_with_42(self, *processes):
        for process in processes:
            out, err = process.communicate(timeout=LIMIT)
            self.assertEqual((process.returncode, out, err), (0, "42\n", ""))

    def test_switches_of_the_interpreter(self):
        self.script(self.FLOW)
        self.assert_ends_with_42(
            self.start("-O", "my_flow.py"),
            self.start("-OO", "-W", "error", "-X", "dev", "my_flow.py"),
            self.start("my_flow.py", env={**os.environ, "PYTHONWARNINGS": "error"}),
        )

    def test_where_warnings_are_errors_a_failure_says_where_it_was_raised(self):
        self.script(
            """
            import traceback, warnings
            from liteflow import DAG, task
            def format_exception(*given, really=traceback.format_exception):
                warnings.warn("as Python 3.15 does, of __mp_main__", DeprecationWarning)
                return really(*given)
            traceback.format_exception = format_exception
            with DAG("d") as dag:
                @task
                def f(): raise ValueError
                f()
            if __name__ == "__main__":
                [ti] = dag.run(mp_context="spawn").get_task_instances()
                print(ti.error)
            """
        )
        done = self.python("-W", "error", "my_flow.py")
        self.assertIn('my_flow.py", line 10, in f', done.stdout)

    @unittest.skipIf(sys.version_info < (3, 14), "subinterpreters came with Python 3.14")
    def test_in_a_subinterpreter(self):
        self.script(self.FLOW)
        for how in "run(max_workers=1)", "test()":
            flow = f"import my_flow; print(my_flow.dag.{how}.xcom_pull('g'))"
            path = f"import sys; sys.path.insert(0, {str(self.folder)!r})"
            code = f"import concurrent.interpreters as i; i.create().exec({f'{path}; {flow}'!r})"
            self.assert_42("-c", code)

    def test_paths_with_spaces_and_other_letters(self):
        folder = self.folder / "with space é日"
        folder.mkdir()
        self.folder = folder
        self.script(self.FLOW, "my flow.py")
        odd = {**os.environ, "LITEFLOW_DB": "a b?c#d%20.db"}
        self.assert_ends_with_42(self.start("my flow.py"), self.start("my flow.py", env=odd))
        self.assertTrue((folder / "a b?c#d%20.db").exists())
        self.assertIn("anywhere", self.cli_here("list", "--db", "a b?c#d%20.db").stdout)

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "root may write anywhere")
    def test_a_read_only_working_directory(self):
        self.script(self.FLOW)
        self.folder.chmod(0o500)
        self.addCleanup(self.folder.chmod, 0o700)
        done = self.python("my_flow.py")
        self.assertIn("can't be", done.stderr)

    def test_in_a_thread_of_an_event_loop(self):
        self.script(
            self.FLOW.replace(
                'print(dag.run(max_workers=1).xcom_pull("g"))',
                """import asyncio
            async def main():
                runs = await asyncio.gather(*(asyncio.to_thread(dag.run) for _ in range(3)))
                return {run.xcom_pull("g") for run in runs}
            print(*asyncio.run(main()))""",
            )
        )
        self.assert_42("-X", "dev", "-W", "error", "my_flow.py")

    def test_under_a_test_runner(self):
        self.script(self.FLOW)
        (self.folder / "test_it.py").write_text(
            textwrap.dedent(
                """
                import unittest, my_flow
                from liteflow import DAG, task
                def make():
                    with DAG("inside") as dag:
                        @task
                        def f(): return 1
                        f()
                    return dag
                class T(unittest.TestCase):
                    def test_run(self):
                        self.assertEqual(my_flow.dag.run(max_workers=1).xcom_pull("g"), 42)
                    def test_in_process(self):
                        self.assertEqual(make().test().state, "success")
                """
            )
        )
        done = self.python("-m", "unittest", "-q", "test_it")
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_host_that_forks_before_and_after_importing(self):
        self.script(self.FLOW)
        (self.folder / "server.py").write_text(
            textwrap.dedent(
                """
                import os, sys
                def serve():
                    children = []
                    for _ in range(2):
                        pid = os.fork()
                        if not pid:
                            import my_flow
                            ok = my_flow.dag.run(max_workers=1).xcom_pull("g") == 42
                            os._exit(0 if ok else 1)
                        children.append(pid)
                    print([os.waitpid(pid, 0)[1] for pid in children])
                if __name__ == "__main__":
                    if sys.argv[1] == "after":
                        import my_flow
                        my_flow.dag.run(max_workers=1)
                    serve()
                """
            )
        )
        if hasattr(os, "fork"):
            words = ("-W", "ignore", "server.py")
            for process in [self.start(*words, when) for when in ("before", "after")]:
                out, err = process.communicate(timeout=LIMIT)
                self.assertEqual(out, "[0, 0]\n", err)


class VendoredTest(Case):
    """A copy inside a package, under the package's name; two of them in one process."""

    def package(self, name):
        vendor = self.folder / name / "_vendor"
        vendor.mkdir(parents=True)
        for folder in (vendor, vendor.parent):
            (folder / "__init__.py").touch()
        copy_liteflow(vendor)
        point = "class Point:\n    def __init__(self, x): self.x = x\n"
        (vendor.parent / "points.py").write_text(point)
        (vendor.parent / "flow.py").write_text(
            textwrap.dedent(
                f"""
                from {name}._vendor.liteflow import DAG, AirflowException, task
                import {name}._vendor.liteflow
                assert {name}._vendor.liteflow.DAG is DAG
                from {name}.points import Point
                with DAG("{name}") as dag:
                    @task
                    def make(): print("made by {name}"); return Point(20)
                    @task
                    def double(p, ti):
                        assert type(ti).__module__ == "{name}._vendor.liteflow", type(ti)
                        return 2 * p.x
                    double(make())
                if __name__ == "__main__":
                    dag.cli()
                """
            )
        )

    def test_everything_works_under_the_packages_name(self):
        self.package("yours")
        done = self.python("-m", "yours.flow")
        self.assertEqual(done.returncode, 0, done.stderr)
        code = "import yours.flow, sys; print(yours.flow.dag.runs()[0].xcom_pull('make').x); "
        command = ("-m", "yours._vendor.liteflow")
        looks = {
            (*command, "show", "yours"): "double",
            (*command, "logs", "yours"): "made by yours",
            (*command, "visualize", "yours"): "flowchart",
            (*command, "scaffold"): "from yours._vendor.liteflow import",
            ("-c", code + "print('liteflow' in sys.modules)"): "20\nFalse\n",
        }
        running = [self.start(*words) for words in looks]
        for expected, process in zip(looks.values(), running, strict=True):
            out, err = process.communicate(timeout=LIMIT)
            self.assertIn(expected, out, err)
        run = (*command, "run", "yours/flow.py", "--quiet")
        self.assertEqual(self.python(*run).returncode, 0)
        points = self.folder / "yours" / "points.py"
        points.write_text("def Point(x): raise ValueError(x)")
        failed = self.python(*run, "--db", "failed.db").stderr.splitlines()
        self.assertIn("-m yours._vendor.liteflow run", failed[-1])
        again = subprocess.run(
            ["sh", "-c", failed[-1].partition(": ")[2]], cwd="/", capture_output=True, text=True
        )
        self.assertIn("make failed, try 2 of 2: ValueError: 20", again.stderr)

    def test_what_a_zip_tells_can_be_pasted(self):
        self.package("yours")
        (self.folder / "yours/points.py").write_text("def Point(x): raise ValueError(x)")
        main = "from yours.flow import dag\nif __name__ == '__main__': dag.cli()\n"
        (self.folder / "__main__.py").write_text(main)
        zipapp.create_archive(self.folder, packed := io.BytesIO())
        (self.folder / "it's.pyz").write_bytes(packed.getvalue())
        failed = self.python("it's.pyz")
        more = re.findall("    more: (.*)", failed.stderr) or [failed.stderr]
        shown = subprocess.run(["sh", "-c", *more], cwd="/", capture_output=True, text=True)
        self.assertIn("ValueError: 20", shown.stdout, shown.stderr)

    def test_two_copies_do_not_disturb_each_other(self):
        self.package("one")
        self.package("two")
        (self.folder / "host.py").write_text(
            textwrap.dedent(
                """
                import threading, one.flow, two.flow
                found = []
                def run(module):
                    for _ in range(3): found.append(module.dag.run().xcom_pull("double"))
                if __name__ == "__main__":
                    threads = [threading.Thread(target=run, args=(m,)) for m in (one.flow, two.flow)]
                    for thread in threads: thread.start()
                    for thread in threads: thread.join()
                    print(found, len(one.flow.dag.runs()), len(two.flow.dag.runs()))
                """
            )
        )
        done = self.python("-X", "dev", "-W", "error", "host.py")
        self.assertEqual(done.stdout, f"{[40] * 6} 3 3\n", done.stderr)
        self.assertEqual(done.stderr, "")


# --- Airflow's authoring API ----------------------------------------------------------------------


class MappingTest(Case):
    def test_over_large_elements_that_go_through_the_database(self):
        run = self.run_flow(
            """
            with DAG("large") as dag:
                @task
                def many(): return [f"{i}" * 200_000 for i in range(3)]
                @task
                def each(x): return x
                @task
                def last(x): return x[-1]
                @task
                def same(x): return [x == ["0", "1", "2"], x == (), x == x[:], x == "012"]
                same(last.expand(x=each.expand(x=many())))
            """
        )
        self.assertEqual(run.xcom_pull("last"), ["0", "1", "2"])
        self.assertEqual(run.xcom_pull("same"), [True, False, True, False])

    def test_a_source_that_gives_nothing_to_map_over_says_why(self):
        run = self.run_flow(
            """
            with DAG("nothing") as dag:
                @task(do_xcom_push=False)
                def silent(): return [1]
                @task
                def numbers(): return [1, {2: 3}]
                @task
                def each(x=None): return x
                each.expand(x=silent())
                each.expand_kwargs(numbers())
            """
        )
        self.assertIn("has do_xcom_push=False", run.get_task_instance("silent").error)
        for index, found in enumerate(("1", "{2: 3}")):
            error = run.get_task_instance("each__1", index).error
            self.assertIn(f"takes dicts with str keys, found {found}", error)

    def test_over_a_result_that_is_any_sequence(self):
        run = self.run_flow(
            """
            from collections import UserDict, deque
            with DAG("sequences") as dag:
                @task
                def numbers(): return range(2)
                @task
                def queued(): return deque("ab")
                @task
                def same(x): return x
                @task
                def mapping(): return UserDict(a=1)
                same.expand(x=same.override(task_id="all")(same.expand(x=numbers())))
                same.expand(x=queued())
                same.expand(x=mapping())
            """
        )
        found = {t: run.xcom_pull(t) for t in ("same", "same__1", "same__2")}
        self.assertEqual(found, {"same": [0, 1], "same__1": [0, 1], "same__2": ["a", "b"]})
        reason = run.get_task_instance("mapping").error.splitlines()[-1]
        self.assertIn("which returned no list, tuple or dict: {'a': 1}", reason)

    def test_expand_in_all_its_forms(self):
        run = self.run_flow(
            """
            def ten(x): return x * 10
            def odd(x):
                if x % 2: return x
                raise AirflowSkipException("even")
            with DAG("forms") as dag:
                @task
                def numbers(): return [1, 2, 3]
                @task
                def pairs(): return {"a": 1, "b": 2}
                @task
                def add(x, y=0): return x + y
                @task
                def show(x): return x
                @task
                def collect(values): return [list(values), len(values), values[0], list(values[1:])]
                n = numbers()
                product = add.partial().expand(x=[10, 20], y=n)
                collect(product)
                show.override(task_id="dicts").expand(x=pairs())
                show.override(task_id="const_dict").expand(x={"k": [1]})
                show.override(task_id="mapped").expand(x=n.map(ten).map(str))
                show.override(task_id="skipped").expand(x=n.map(odd))
                show.override(task_id="zipped").expand(x=n.zip(pairs.override(task_id="other")(), fillvalue="-"))
                show.override(task_id="short").expand(x=n.zip(pairs.override(task_id="two")()))
                show.override(task_id="joined").expand(x=n.concat(numbers.override(task_id="more")()))
                add.override(task_id="kwargs").partial(y=5).expand_kwargs([{"x": 1}, {"x": 2, "y": 3}, {}])
                show.override(task_id="chained").expand(x=product)
                show.override(task_id="with_results").expand(x=[n, 7])
            """
        )
        value = lambda task_id: [x.value for x in run.xcoms() if x.task_id == task_id]  # noqa: E731
        self.assertEqual(value("add"), [11, 12, 13, 21, 22, 23])
        self.assertEqual(
            value("collect"), [[[11, 12, 13, 21, 22, 23], 6, 11, [12, 13, 21, 22, 23]]]
        )
        self.assertEqual(value("dicts"), [("a", 1), ("b", 2)])
        self.assertEqual(value("const_dict"), [("k", [1])])
        self.assertEqual(value("mapped"), ["10", "20", "30"])
        self.assertEqual(value("skipped"), [1, 3])
        self.assertEqual(value("zipped"), [(1, ("a", 1)), (2, ("b", 2)), (3, "-")])
        self.assertEqual(value("short"), [(1, ("a", 1)), (2, ("b", 2))])
        self.assertEqual(value("joined"), [1, 2, 3, 1, 2, 3])
        self.assertEqual(value("kwargs"), [6])
        self.assertEqual(value("chained"), [11, 12, 13, 21, 22, 23])
        self.assertEqual(value("with_results"), [[1, 2, 3], 7])
        states = self.states(run)
        self.assertEqual(
            [states[f"skipped[{i}]"] for i in range(3)], ["success", "skipped", "success"]
        )
        self.assertEqual(
            [states[f"kwargs[{i}]"] for i in range(3)], ["success", "failed", "failed"]
        )

    def test_mapped_tasks_stand_where_the_dag_has_them(self):
        with DAG("d") as d:
            pair = task(task_id="pair")(lambda: [1, 2])()
            task(task_id="each")(lambda x: x).expand(x=pair)
            task(task_id="last")(lambda: None)()
        found = [ti._label for ti in d.test(db_path=self.db).get_task_instances()]
        self.assertEqual(found, ["pair", "each[0]", "each[1]", "last"])

    def test_a_mapped_group_takes_any_keyword_if_its_function_does(self):
        def build(x, **more):
            task(task_id="f")(lambda *each: list(each))(x, more["y"], more["z"])

        with DAG("d") as d:
            task_group(group_id="g")(build).partial(z=3).expand(x=[1, 2], y=[5])
        run = d.test(db_path=self.db)
        self.assertEqual(run.xcom_pull("g.f"), [[1, 5, 3], [2, 5, 3]])

    def test_what_joins_a_mapped_group_late_takes_what_that_is_mapped_over(self):
        dag = self.module(
            """
            @task
            def one(): return [1]
            @task
            def adds(x=0): return x
            @task_group
            def group(x): return adds(x)
            with DAG("late") as dag:
                with group.expand(x=one()).operator.task_group:
                    adds.override(task_id="late")()
            """
        ).dag
        dag.run(db_path=self.db)
        takes = self.query("SELECT takes FROM task_instance WHERE task_id = 'group.late'")
        self.assertEqual(takes, [('["one"]',)])

    def test_who_takes_an_argument_of_a_mapped_group_waits_for_its_source_as_in_airflow(self):
        plain = task(sample)

        @task_group
        def g(x):
            plain.override(task_id="a")(1) >> [
                plain.override(task_id="takes")(x),
                plain.override(task_id="none")(2),
            ]
            with liteflow.setup(task_id="up")(sample)(1):
                plain.override(task_id="work")(x)
                plain.override(task_id="more")(2)

        with DAG("d") as d:
            g.expand(x=plain.override(task_id="source")(1))
        self.assertEqual(
            {t.task_id: t.upstream_task_ids for t in d.tasks},
            {
                "source": set(),
                "g.a": {"source"},
                "g.takes": {"g.a", "source"},
                "g.none": {"g.a"},
                "g.up": {"source"},
                "g.work": {"source"},
                "g.more": {"g.up"},
            },
        )

    def test_results_that_are_concatenated_one_by_one(self):
        with DAG("d") as d:
            give = task(task_id="give")(lambda: [1, 2])
            joined = functools.reduce(liteflow.XComArg.concat, [give() for _ in range(1500)])
            task(task_id="f")(lambda x: x).expand(x=joined)
        lengths = {(t, -1): 2 for t in d.task_ids}
        started = time.monotonic()
        mapping, known = d.get_task("f")._mapping, liteflow._Known(lengths)
        self.assertEqual(mapping.count(known), 3000)
        for i in range(0, 3000, 100):
            [(_, (_, task_id, j))] = mapping.elements(i, known)
            self.assertEqual((task_id, j), (d.task_ids[i // 2], 0))
        self.assertLess(time.monotonic() - started, 5)

    def test_what_cannot_be_expanded_over(self):
        run = self.run_flow(
            """
            with DAG("bad") as dag:
                for name, value in (("text", "abc"), ("none", None), ("number", 5), ("long", list(range(1025)))):
                    @task(task_id=name)
                    def give(value=value): return value
                    @task(task_id=f"over_{name}")
                    def take(x): return x
                    take.expand(x=give())
            """
        )
        states = self.states(run)
        for name in ("text", "none", "number", "long"):
            self.assertEqual((states[name], states[f"over_{name}"]), ("failed", "upstream_failed"))
        self.assertIn("at most 1024", run.get_task_instance("long").error)

    def test_mistakes_raise_where_they_stand(self):
        def f(x, y=1):
            pass

        with DAG("d"):
            t = task(f)
            for act, kind in (
                (lambda: t.expand(x="abc"), ValueError),
                (lambda: t.expand(x={1}), ValueError),
                (lambda: t.expand(x=3), ValueError),
                (lambda: t.expand(x=(i for i in [1])), ValueError),
                (lambda: t.expand(), TypeError),
                (lambda: t.expand(z=[1]), TypeError),
                (lambda: t.expand(ti=[1]), ValueError),
                (lambda: t.partial(z=1), TypeError),
                (lambda: t.partial(x=1)(), TypeError),
                (lambda: t.partial(x=1).partial(x=2), TypeError),
                (lambda: t.expand_kwargs([1]), TypeError),
                (lambda: t.expand(x=t(1)["k"]), ValueError),
                (lambda: t.override(trigger_rule="always").expand(x=t(1)), ValueError),
                (lambda: t(1).map(t), TypeError),
            ):
                with self.assertRaises(kind):
                    act()

    def test_instances_have_retries_and_logs_of_their_own(self):
        run = self.run_flow(
            """
            with DAG("own") as dag:
                @task(retries=1)
                def f(x, ti):
                    print("try", ti.try_number, "of", x, ti.map_index)
                    if x == 2 and ti.try_number == 1: raise ValueError("first")
                    if x == 3: os._exit(1)
                    return x
                @task(trigger_rule="all_done")
                def reduce(values): return list(values)
                reduce(f.expand(x=[1, 2, 3]))
            """
        )
        tries = {
            ti.map_index: ti.try_number for ti in run.get_task_instances() if ti.task_id == "f"
        }
        self.assertEqual(tries, {0: 1, 1: 2, 2: 2})
        self.assertEqual(run.xcom_pull("reduce"), [1, 2])
        self.assertEqual(run.log("f", 1), "try 2 of 2 1\n")
        self.assertEqual(run.log("f", 1, 1), "try 1 of 2 1\n")
        self.assertEqual(run.log("f"), "".join(run.log("f", i) for i in range(3)))  # as its values

    def test_a_mapped_group_runs_index_by_index(self):
        run = self.run_flow(
            """
            with DAG("group") as dag:
                @task
                def items(): return [1, 2, 3]
                @task
                def double(x): return 2 * x
                @task
                def check(x, original):
                    if x == 4: raise ValueError("four")
                    return [x, original]
                @task
                def after(x): return x
                @task(trigger_rule="all_done")
                def collect(values): return list(values)
                @task_group
                def each(x, base): return after(check(double(x), base))
                collect(each.partial(base=items.override(task_id="base")()).expand(x=items()))
            """
        )
        states = self.states(run)
        self.assertEqual(
            [states[f"each.after[{i}]"] for i in range(3)],
            ["success", "upstream_failed", "success"],
        )
        self.assertEqual(run.xcom_pull("collect"), [[2, [1, 2, 3]], [6, [1, 2, 3]]])

    def test_resume_of_a_mapped_run(self):
        source = """
            with DAG("mapped_resume") as dag:
                @task
                def f(x):
                    with open(os.environ["CASE_DIR"] + "/ran", "a") as file: file.write(f"{x} ")
                    if x == 2 and not os.path.exists(os.environ["CASE_DIR"] + "/mended"): raise ValueError
                    return x
                @task
                def total(values): return sum(values)
                total(f.expand(x=[1, 2, CONSTANTS]))
        """
        first = self.run_flow(source.replace("CONSTANTS", "3"))
        self.assertEqual(first.state, "failed")
        (self.folder / "mended").touch()
        lines = []
        second = self.run_flow(
            source.replace("CONSTANTS", "3, 4"), resume=True, progress=lines.append
        )
        self.assertEqual((second.state, second.xcom_pull("total")), ("success", 10))
        ran = sorted((self.folder / "ran").read_text().split())
        self.assertEqual(ran, ["1", "2", "2", "3", "4"])

    def test_what_map_and_its_kin_give_as_an_argument_is_a_list(self):
        run = self.run_flow(
            """
            def up(x): return x.upper()
            with DAG("d") as dag:
                @task
                def names(): return ["a", "b"]
                @task
                def sizes(): return {"k": 1}
                @task
                def show(*args): return list(args)
                @task
                def pair(a, b): return a, b
                n = names()
                show(n.map(up), n.zip(sizes()), n.concat(sizes()), n.zip(sizes(), fillvalue=0))
                # No pickler knows these functions, as it doesn't those of a @dag function.
                pair.partial(a=[n.map(lambda x: x + x)]).expand(b=[n.map(lambda x: x + "1")])
                from types import SimpleNamespace  # in which nobody looks for results
                n >> task(task_id="box")(lambda box: box.x)(SimpleNamespace(x=n.map(up)))
            """
        )
        k = ("k", 1)
        wanted = [["A", "B"], [("a", k)], ["a", "b", k], [("a", k), ("b", 0)]]
        self.assertEqual(run.raise_if_failed().xcom_pull("show"), wanted)
        self.assertEqual(run.xcom_pull("pair"), [([["aa", "bb"]], ["a1", "b1"])])
        self.assertEqual(run.xcom_pull("box"), ["A", "B"])

    def test_one_instance_of_a_mapped_group_is_one_element_of_map_and_its_kin(self):
        run = self.run_flow(
            """
            def up(x): return x.upper()
            with DAG("d") as dag:
                @task
                def same(x): return x
                @task
                def show(*args): return list(args)
                many = task_group(group_id="g")(lambda x: same(x)).expand(x=["ab"])
                show(many, many.map(up), many.zip(many), many.concat(many))
            """
        )
        wanted = ["ab", ["AB"], [("ab", "ab")], ["ab", "ab"]]  # by itself it is bare, as on Airflow
        self.assertEqual(run.raise_if_failed().xcom_pull("show"), wanted)

    def test_each_task_of_a_mapped_group_gets_results_among_constants(self):
        run = self.run_flow(
            """
            with DAG("d") as dag:
                @task
                def give(): return ["a"]
                @task
                def same(*args): return args
                @task_group
                def many(x): same(same(same(x), x))
                many.expand(x=[give().map(lambda x: x + x), 5])
            """
        )
        last = run.raise_if_failed().xcom_pull("many.same__2")
        self.assertEqual(last, [(((["aa"],), ["aa"]),), (((5,), 5),)])

    def test_nothing_asks_whether_a_result_is_true(self):
        run = self.run_flow(
            """
            class Array(list):
                def __bool__(self): raise ValueError("ambiguous")
            with DAG("d") as dag:
                @task
                def array(): return Array([1, 2])
                @task
                def none(): return None
                @task
                def show(*args): return list(args)
                show(array().map(str), none().map(str), array().zip(none()))
                PythonOperator(task_id="op", python_callable=lambda *x: sum(x), op_args=array())
            """
        )
        self.assertEqual(run.raise_if_failed().xcom_pull("show"), [["1", "2"], [], []])
        self.assertEqual(run.xcom_pull("op"), 3)

    def test_what_can_not_be_mapped_or_zipped_is_refused(self):
        with DAG("other"):
            n = task(sorted)([1])
            for act in (lambda: n.zip([1]), lambda: n.concat("abc"), lambda: n.zip(n, 3)):
                with self.assertRaises(TypeError) as caught:
                    act()
                self.assertIn("results of tasks", str(caught.exception))

    def test_a_resume_knows_mapped_instances_by_their_element(self):
        source = """
            with DAG("moved") as dag:
                @task
                def f(x):
                    with open(os.environ["CASE_DIR"] + "/ran", "a") as file: file.write(f"{x} ")
                    if x == "bad": raise ValueError
                    return x
                @task
                def total(values): return list(values)
                total(f.expand(x=NAMES))
        """
        first = self.run_flow(source.replace("NAMES", "['a', 'bad', 'b', 'c']"))
        self.assertEqual(first.state, "failed")
        second = self.run_flow(source.replace("NAMES", "['new', 'a', 'b', 'c']"), resume=True)
        self.assertEqual(second.state, "success")
        self.assertEqual(second.xcom_pull("total"), ["new", "a", "b", "c"])
        ran = sorted((self.folder / "ran").read_text().split())
        self.assertEqual(ran, ["a", "b", "bad", "c", "new"])
        self.assertEqual([v for k, v in self.states(second).items() if v == "removed"], ["removed"])

    def test_a_system_of_fips_mode_knows_what_is_mapped(self):
        refuses = mock.Mock(side_effect=ValueError("disabled for FIPS"))
        with mock.patch.multiple(hashlib, blake2b=refuses, blake2s=refuses, md5=refuses):
            run = self.run_flow(
                """
                with DAG("d") as dag:
                    @task
                    def f(x): return x
                    f.expand(x=[1, 2])
                """
            )
        self.assertEqual(run.xcom_pull("f"), [1, 2])

    def test_a_cleared_upstream_expands_anew(self):
        source = """
            with DAG("anew") as dag:
                @task
                def items(): return list(range(int((Path(os.environ["CASE_DIR"]) / "n").read_text())))
                @task
                def f(x): return x
                @task
                def total(values): return list(values)
                total(f.expand(x=items()))
        """
        for n, expected in ((3, [0, 1, 2]), (2, [0, 1]), (4, [0, 1, 2, 3]), (0, None), (1, [0])):
            (self.folder / "n").write_text(str(n))
            if n == 3:
                run = self.run_flow(source)
            else:
                run.clear("items")
                run = self.run_flow(source, resume=True)
            self.assertEqual((run.state, run.xcom_pull("total")), ("success", expected))
        tries = {
            ti.map_index: ti.try_number for ti in run.get_task_instances() if ti.task_id == "f"
        }
        self.assertEqual((tries[0], run.get_task_instance("items").try_number), (4, 5))

    def test_an_old_result_can_be_expanded_over_by_mended_code(self):
        source = """
            with DAG("old") as dag:
                @task
                def give(): return {"a": 1, "b": 2}
                @task
                def take(x): {BODY}
                {CALL}
        """
        self.run_flow(
            source.replace("{BODY}", "raise ValueError").replace("{CALL}", "take(give())")
        )
        run = self.run_flow(
            source.replace("{BODY}", "return x").replace("{CALL}", "take.expand(x=give())"),
            resume=True,
        )
        self.assertEqual([run.xcom_pull("take", map_index=i) for i in (0, 1)], [("a", 1), ("b", 2)])

    def test_many_instances(self):
        count = 10_000 if SOAK else 1_000
        run = self.run_flow(
            f"""
            with DAG("many", max_active_tasks=64) as dag:
                @task
                def f(x): return x
                @task
                def total(values): return [len(values), sum(values)]
                total(f.expand(x=list(range({count}))))
            """
        )
        self.assertEqual(run.xcom_pull("total"), [count, sum(range(count))])

    def test_default_args_reach_the_settings_of_a_mapped_operator(self):
        run = self.run_flow(
            """
            with DAG("defaults", default_args={"env": {"A": "1"}, "skip_on_exit_code": 7}) as dag:
                bash = BashOperator.partial(task_id="bash")
                bash.expand(bash_command=["echo $A", "exit 7"])
            """
        )
        self.assertEqual(self.states(run), {"bash[0]": "success", "bash[1]": "skipped"})
        self.assertEqual(run.xcom_pull("bash", map_index=0), "1")

    def test_a_template_field_that_an_operator_has_not(self):
        class Own(liteflow.BaseOperator):
            template_fields = ("qeury",)

            def __init__(self, query, **kwargs):
                super().__init__(**kwargs)
                self.query = query

            def execute(self, context):
                return self.query

        with DAG("own") as d:
            Own(task_id="own", query="{{ ds }}")
            Own.partial(task_id="mapped").expand(query=["{{ ds }}"])
        for ti in d.test(db_path=self.db).get_task_instances():
            said = "AttributeError: Own has no 'qeury', which is in its template_fields"
            self.assertIn(said, ti.error)

    def test_a_subclass_of_python_operator_defines_how_it_calls(self):
        class Own(liteflow.PythonOperator):
            def execute_callable(self):
                return [super().execute_callable(), *self.op_args, sorted(self.op_kwargs)]

        with DAG("own") as d:
            Own(
                task_id="own",
                python_callable=lambda a, ds, b: a + b,
                op_args=[1],
                op_kwargs={"b": 2},
            )
        self.assertEqual(d.test(db_path=self.db).xcom_pull("own"), [3, 1, ["b", "ds"]])

    def test_a_python_operator_keeps_nothing_of_a_call(self):
        class Own(liteflow.PythonOperator):
            async def execute_callable(self):
                return self.op_kwargs["ds"]

        for kind in (liteflow.PythonOperator, liteflow.PythonSensor, Own):
            made = kind(task_id="made", python_callable=lambda ds, b: ds, op_kwargs={"b": 2})
            call = made.poke if kind is liteflow.PythonSensor else made.execute
            self.assertEqual([call({"ds": "first"}), call({"ds": "next"})], ["first", "next"])
            # With the context, the operator and all that it was given would hold each other.
            self.assertEqual(made.op_kwargs, {"b": 2})

    def test_a_mapped_operator_has_the_settings_of_its_class(self):
        class Own(liteflow.PythonOperator):
            retries, trigger_rule = 2, "all_done"

        with DAG("own"):
            made = Own.partial(task_id="own", python_callable=sample).expand(op_args=[[1]])
        self.assertEqual((made.retries, made.trigger_rule), (2, "all_done"))

    def test_a_mapped_operator_has_the_defaults_of_its_class(self):
        class Base(liteflow.BaseOperator):
            def __init__(self, *, x, retries=2, pool="of a base", trigger_rule=None, **kwargs):
                super().__init__(retries=retries, pool=pool, **kwargs)

        class Own(Base):
            def __init__(self, *, pool="own", **kwargs):
                super().__init__(pool=pool, **kwargs)

        for given, retries in (({}, 2), ({"default_args": {"retries": 3}}, 3), ({"retries": 4}, 4)):
            with DAG("own", default_args={"owner": "me"}):
                made = (
                    Own(task_id="own", x=1, **given),
                    Own.partial(task_id="m", **given).expand(x=[1]),
                )
            for one in made:
                found = (one.retries, one.pool, one.trigger_rule, one.owner)
                self.assertEqual(found, (retries, "own", "all_success", "me"))

        class Else(liteflow.BashOperator):
            def __init__(self, *, of, env="prod", retries=-1, **kwargs):
                super().__init__(bash_command=of, env={"ENV": env}, retries=retries + 1, **kwargs)

        with DAG("else"):
            self.assertEqual(Else.partial(task_id="m").expand(of=["true"]).retries, 0)

    def test_the_settings_of_an_operators_class_are_checked_as_its_own_are(self):
        with self.assertRaisesRegex(ValueError, "class Wrong: retries must be 0 or more"):
            type("Wrong", (liteflow.PythonOperator,), {"retries": -1})

        class Own(liteflow.PythonOperator):
            retries, retry_delay, execution_timeout, owner = 1, 0, 60, property(lambda self: "me")

        with DAG("own") as d:
            Own.partial(task_id="own", python_callable=sample).expand(op_args=[[1]])
            made = Own(task_id="one", python_callable=sample, op_args=[1])
        self.assertEqual((d.test(db_path=self.db).state, made.owner), ("success", "me"))

    def test_an_argument_goes_before_the_setting_of_an_operators_class(self):
        class Own(liteflow.EmptyOperator):
            retries, do_xcom_push, owner, params = 3, False, "them", {"n": 1}
            trigger_rule = "all_done"

        with DAG("own", default_args={"owner": "airflow"}):
            own = Own(task_id="own", retries=0, do_xcom_push=True)
            other = Own(task_id="other", params={"m": 2})
        self.assertEqual((own.retries, own.do_xcom_push, own.owner), (0, True, "airflow"))
        self.assertEqual((own.params, other.params), ({"n": 1}, {"m": 2}))
        self.assertIsNot(own.params, Own.params)
        self.assertEqual(own.as_teardown().trigger_rule, "all_done_setup_success")

    def test_a_field_of_a_mapped_operator_is_looked_at_once_an_instance_is_made(self):
        class Own(liteflow.BaseOperator):
            template_fields = ("path",)
            names = ()
            path = property(lambda self: self.names[0], lambda self, path: None)

            def __init__(self, name, **settings):
                super().__init__(**settings)
                self.names = [name]

            def execute(self, context):
                return self.path

        with DAG("own") as d:
            Own.partial(task_id="own").expand(name=["a", "b"])
        self.assertEqual(d.test(db_path=self.db).xcom_pull("own"), ["a", "b"])

    def test_a_callback_that_is_a_method_of_a_mapped_operator_has_the_instance(self):
        ended = []

        class Own(liteflow.BaseOperator):
            def __init__(self, name, **settings):
                super().__init__(**settings)
                self.name = name

            def execute(self, context):
                return self.seen

            def on_execute_callback(self, context):
                self.seen = self.name

            def on_success_callback(self, context):
                ended.append(self.seen)

        with DAG("own") as d:
            Own(task_id="one", name="a")
            Own.partial(task_id="own").expand(name=["b", "c"])
        self.assertEqual(d.test(db_path=self.db).state, "success")
        self.assertEqual(ended, ["a", "b", "c"])

    def test_a_group_is_mapped_over_a_constant_that_holds_a_result(self):
        with DAG("d") as d:
            add = task(lambda x, y=0: x + y, task_id="add")

            @task_group
            def g(x):
                add.override(task_id="both")(x, add(x))

            g.expand(x=[add.override(task_id="one")(1), 2])
        self.assertEqual(d.test(db_path=self.db).xcom_pull("g.both"), [2, 4])


class FlowTest(Case):
    def test_a_branch_chooses_by_a_member_of_an_enum(self):
        run = self.run_flow(
            """
            import enum
            class Way(str, enum.Enum): LEFT = "left"
            class Own(str):
                def __str__(self): return self
            with DAG("ways") as dag:
                @task.branch
                def choose(): return Way.LEFT
                @task.branch
                def choose_own(): return [Own("left")]
                ways = [task(lambda: 1, task_id=name)() for name in ("left", "right")]
                for choice in (choose(), choose_own()):
                    choice >> ways
            """
        )
        self.assertEqual(run.state, "success")
        self.assertEqual(self.states(run)["right"], "skipped")

    def test_branches_by_group_list_and_none(self):
        run = self.run_flow(
            """
            with DAG("branches") as dag:
                @task
                def work(): return 1
                def make(name):
                    return work.override(task_id=name)()
                with TaskGroup("g") as g:
                    a = make("a"); b = make("b"); a >> b
                x, y, z = make("x"), make("y"), make("z")
                @task.branch
                def to_group(): return "g"
                @task.branch
                def to_many(): return ["x", "y"]
                @task.branch
                def to_none(): return None
                @task.branch
                def to_nowhere(): return "absent"
                @task.branch
                def wrong(): return 5
                to_group() >> [a, make("other")]
                to_many() >> [x, y, z]
                to_none() >> [make("p"), make("q")]
                to_nowhere() >> make("r"); wrong() >> make("s")
                class Choose(BaseBranchOperator):
                    def choose_branch(self, context): return "t"
                Choose(task_id="choose") >> [make("t"), make("u")]
            """
        )
        states = self.states(run)
        skipped = {t for t, s in states.items() if s == "skipped"}
        self.assertEqual(skipped, {"other", "z", "p", "q", "u"})
        self.assertEqual(states["g.b"], "success")
        self.assertEqual((states["to_nowhere"], states["r"]), ("failed", "upstream_failed"))
        self.assertIn("'absent'", run.get_task_instance("to_nowhere").error)
        self.assertEqual(states["wrong"], "failed")
        self.assertIsNone(run.xcom_pull("to_many"))

    def test_conditions_short_circuits_and_labels(self):
        run = self.run_flow(
            """
            with DAG("conditions") as dag:
                @task.run_if(lambda context: (context["ti"].task_id != "no", "not today"))
                @task(task_id="yes")
                def f(): return "ran"
                f(); f.override(task_id="no")()
                @task.skip_if(lambda context: True)
                @task
                def g(): return 1
                g()
                @task.short_circuit
                def gate(): return []
                @task(trigger_rule="all_done")
                def far(): return 1
                @teardown
                def down(): return "down"
                gate() >> Label("text") >> far() >> down()
                ShortCircuitOperator(task_id="open", python_callable=lambda: 1) >> EmptyOperator(task_id="through")
            """
        )
        self.assertEqual(
            self.states(run),
            {
                "yes": "success",
                "no": "skipped",
                "g": "skipped",
                "gate": "success",
                "far": "skipped",
                "down": "success",
                "open": "success",
                "through": "success",
            },
        )
        for name, said in (("no", "not today"), ("g", "skipped by its condition")):
            self.assertEqual(run.get_task_instance(name).error, f"AirflowSkipException: {said}")
        with DAG("d") as d:
            for name, found in (("own", (False, "it says")), ("given", (False, None))):
                task.run_if(lambda _, found=found: found, "as told")(task(task_id=name)(sample))(1)
            looks = task.run_if(lambda context: context["task"].op_args == (1,))
            looks(task(task_id="looks")(sample))(1)
        run = d.test(db_path=self.db)
        self.assertEqual(run.xcom_pull("looks"), 1)
        said = [run.get_task_instance(name).error for name in ("own", "given")]
        self.assertEqual([text.partition(": ")[2] for text in said], ["it says", "as told"])

    def test_groups(self):
        with DAG("groups", default_args={"retries": 1}) as d:
            plain = task(sample)
            with TaskGroup("outer", default_args={"retries": 2}):
                a = plain(1)
                with TaskGroup("inner", prefix_group_id=False, default_args={"owner": "me"}):
                    b = plain.override(task_id="free")(2)
                with self.assertRaises(liteflow.DuplicateTaskIdFound):
                    TaskGroup("inner")
                plain(3)

            @task_group
            def section(x):
                return plain(x)

            section(section(a))
            with TaskGroup("last") as last:
                pass
        self.assertEqual(
            d.task_ids,
            ["outer.sample", "free", "outer.sample__1", "section.sample", "section__1.sample"],
        )
        self.assertEqual((b.operator.retries, b.operator.owner), (2, "me"))
        self.assertEqual(d["section"].group_id, "section")
        self.assertIs(d["last"], last)
        check_mermaid(self, d.to_mermaid())
        with self.assertRaises(RuntimeError):
            TaskGroup("g")
        with DAG("d"):
            for bad in ("a.b", "", "x" * 201):
                with self.assertRaises(ValueError):
                    TaskGroup(bad)

    def test_setup_and_teardown(self):
        run = self.run_flow(
            """
            with DAG("scopes") as dag:
                @task
                def fails(): raise ValueError
                @task
                def work(): return 1
                @setup
                def up(): return "up"
                @teardown
                def down(x): return x
                @teardown(on_failure_fail_dagrun=True)
                def strict(): raise ValueError
                u = up()
                with down(u):
                    fails() >> work()
                work.override(task_id="alone")() >> strict()
                bad = fails.override(task_id="bad")().as_setup()
                far = work.override(task_id="far", trigger_rule="all_done")()
                bad >> work.override(task_id="near")() >> far >> down.override(task_id="down2")(1).as_teardown(setups=bad)
            """
        )
        self.assertEqual(
            self.states(run),
            {
                "up": "success",
                "down": "success",
                "fails": "failed",
                "work": "upstream_failed",
                "alone": "success",
                "strict": "failed",
                "bad": "failed",
                "near": "upstream_failed",
                "far": "upstream_failed",
                "down2": "upstream_failed",
            },
        )
        self.assertEqual(run.state, "failed")
        with DAG("d") as d:
            with self.assertRaises(ValueError):
                teardown(trigger_rule="all_done")(sample)(1)
            liteflow.setup(sample)(1) >> task(task_id="x", trigger_rule="all_done")(sample)(1)
        with self.assertRaises(ValueError):
            d.validate()

    def test_teardowns_and_setups_of_a_mapped_group_go_by_index(self):
        run = self.run_flow(
            """
            with DAG("by_index") as dag:
                @task
                def ok(x):
                    if x == "fails": raise ValueError
                    if x == "skips": raise AirflowSkipException
                    return x
                @task_group
                def g(x):
                    s = ok.override(task_id="s")(x).as_setup()
                    b = ok.override(task_id="b")("b")
                    c = ok.override(task_id="c", trigger_rule="all_done")("c")
                    t = ok.override(task_id="t")("t").as_teardown(setups=s)
                    s >> b >> c >> t
                g.expand(x=["fine", "fails", "skips"])
            """
        )
        found = {i: [self.states(run)[f"g.{t}[{i}]"] for t in "sbct"] for i in range(3)}
        self.assertEqual(
            found, {0: ["success"] * 4, 1: ["failed"] + ["upstream_failed"] * 3, 2: ["skipped"] * 4}
        )


class OperatorsTest(Case):
    def test_bash(self):
        run = self.run_flow(
            """
            with DAG("bash") as dag:
                @task.bash(env={"A": "1"})
                def env(): return 'echo "$A$HOME$AIRFLOW_CTX_TASK_ID"'
                @task.bash(append_env=True, env={"A": "1"}, cwd="/")
                def where(): return 'pwd; test -n "$PATH" && echo "$A $(pwd)"'
                @task.bash(execution_timeout=0.3)
                def hangs(): return "echo begun; sleep 60"
                @task.bash
                def empty(): return "  "
                @task.bash(skip_on_exit_code=[3, 4])
                def skips(): return "exit 4"
                @task.bash
                def silent(): return "true"
                env(); where(); hangs(); empty(); skips(); silent()
                BashOperator(task_id="op", bash_command=where.override(task_id="give")().map if False else "echo {{.Names}}" if False else "printf 'a\\nb'")
                BashOperator(task_id="nowhere", bash_command="true", cwd="/absent")
                BashOperator(task_id="number", bash_command="true", env={"PORT": 8080})
                BashOperator(task_id="processed", bash_command="echo 5", output_processor=int)
            """
        )
        states = self.states(run)
        self.assertEqual(
            {t for t, s in states.items() if s == "failed"}, {"hangs", "empty", "nowhere", "number"}
        )
        said = "task 'number': env 'PORT' must be str or bytes or PathLike, found 8080"
        self.assertIn(said, run.get_task_instance("number").error)
        self.assertIn("'/absent'", run.get_task_instance("nowhere").error)
        self.assertEqual(states["skips"], "skipped")
        self.assertEqual(
            [run.xcom_pull(t) for t in ("env", "where", "silent", "op", "processed")],
            ["1env", "1 /", "", "b", 5],
        )
        self.assertEqual(run.log("hangs"), "begun\n")
        with DAG("d") as d:
            task.bash(task_id="number")(sample)(5)
            liteflow.BashOperator(task_id="blank", bash_command="")
            liteflow.BashOperator(task_id="skips", bash_command="exit 99")
            never = {"task_id": "never", "skip_on_exit_code": None}
            liteflow.BashOperator(bash_command="exit 99", **never)
        run = d.test(db_path=self.db)
        states = {"number": "failed", "blank": "success", "skips": "skipped", "never": "failed"}
        self.assertEqual(self.states(run), states)
        self.assertIn("bash needs a command, found 5", run.get_task_instance("number").error)

    def test_the_last_line_of_a_command_may_be_long_and_come_in_pieces(self):
        half = "x" * 10_000_000
        outputs = {
            "a\nlong\n": "long",
            "a\n\n": "",
            "a\n\udcc3|\udca9\udcc3": "é\\xc3",
            "a|\n": "a",
            "a\n|b": "b",
            "a\n|b|c\nd|e\n": "de",
            f"a\n{half}|{half}": half + half,
        }
        for output, wanted in outputs.items():
            (self.folder / "parts").mkdir()
            for i, part in enumerate(output.split("|")):
                (self.folder / "parts" / str(i)).write_text(part, errors="surrogateescape")
            with DAG("long_line") as d:
                command = (
                    'for f in "$CASE_DIR"/parts/*; do $wait; cat "$f"; wait="sleep 0.03"; done'
                )
                liteflow.BashOperator(task_id="b", bash_command=command, append_env=True)
            started = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                run = d.test(db_path=self.db)
            self.assertLess(time.monotonic() - started, 20)
            self.assertTrue((run.xcom_pull("b") or "") == wanted, wanted[:10])
            shutil.rmtree(self.folder / "parts")

    def test_sensors(self):
        run = self.run_flow(
            """
            def count(name):
                path = Path(os.environ["CASE_DIR"]) / name
                n = int(path.read_text()) + 1 if path.exists() else 1
                path.write_text(str(n)); return n
            with DAG("sensors", max_active_tasks=8) as dag:
                @task.sensor(poke_interval=0.05, timeout=10, mode="reschedule")
                def third(ti): print("poke"); return PokeReturnValue(count("third") >= 3, ti.try_number)
                @task.sensor(poke_interval=0.05, timeout=0.2, mode="reschedule", retries=3)
                def never(): return False
                @task.sensor(poke_interval=9, exponential_backoff=True, timeout=0.05, soft_fail=True, execution_timeout=8)
                def softly(): return False
                @task.sensor(poke_interval=0.01, silent_fail=True)
                def silent():
                    if count("silent") < 3: raise ValueError("not yet")
                    return True
                @task.sensor(never_fail=True)
                def nice(): raise ValueError
                @task.sensor(timeout=10)
                def loud(): raise ValueError("no use")
                @task.sensor(silent_fail=True, timeout=10)
                def not_today(): raise AirflowSkipException("not today")
                @task.sensor(poke_interval=9, exponential_backoff=True, max_wait=0.001, execution_timeout=8)
                def slower(): return count("slower") >= 5
                third(); never(); softly(); silent(); nice(); loud(); not_today(); slower()
                class Mine(BaseSensorOperator):
                    def poke(self, context): self.n = getattr(self, "n", 0) + 1; return self.n >= 3
                Mine(task_id="mine", poke_interval=0.01)
                PythonSensor(task_id="python", python_callable=lambda ti: True)
            """
        )
        self.assertEqual(
            self.states(run),
            {
                "third": "success",
                "never": "failed",
                "softly": "skipped",
                "silent": "success",
                "nice": "skipped",
                "loud": "failed",
                "not_today": "skipped",
                "slower": "success",
                "mine": "success",
                "python": "success",
            },
        )
        self.assertEqual(run.xcom_pull("third"), 1)
        self.assertEqual(run.log("third"), "poke\n" * 3)
        self.assertEqual(run.get_task_instance("never").try_number, 1)

    def test_the_waits_of_a_sensor_double_up_to_its_timeout(self):
        waits = []
        with DAG("backs_off") as d:
            kind = task.sensor(task_id="s", exponential_backoff=True, poke_interval=1, timeout=100)
            kind(lambda: len(waits) == 1100)()  # 2.0 ** 1100 would overflow
        with mock.patch.object(time, "sleep", waits.append):
            run = d.test(db_path=self.db)
        self.assertEqual(self.states(run), {"s": "success"})
        self.assertEqual(waits[:8], [1, 2, 4, 8, 16, 32, 64, 100])

    def test_a_rescheduled_sensor_frees_its_worker(self):
        run = self.run_flow(
            """
            with DAG("free") as dag:
                @task.sensor(poke_interval=0.05, mode="reschedule")
                def waits(): return (Path(os.environ["CASE_DIR"]) / "go").exists()
                @task
                def go(): (Path(os.environ["CASE_DIR"]) / "go").touch()
                waits(); go()
            """,
            max_workers=1,
        )
        self.assertEqual(run.state, "success")

    def test_own_operators(self):
        run = self.run_flow(
            """
            class Add(BaseOperator):
                template_fields = ("a",)
                def __init__(self, *, a, b=1, **kwargs):
                    super().__init__(**kwargs)
                    self.a, self.b = a, b
                def execute(self, context):
                    self.log.info("adding"); self.b, b = 99, self.b
                    return self.a + b
            with DAG("own", default_args={"b": 10}) as dag:
                first = Add(task_id="first", a=1)
                second = Add(task_id="second", a=first.output, b=2)
                third = Add(task_id="third", a=0)
                third.a = second.output
                mapped = Add.partial(task_id="mapped", b=5).expand(a=[1, 2])
                kwargs = Add.partial(task_id="kwargs").expand_kwargs([{"a": 1}, {"a": 1, "b": 0}])
                PythonOperator(task_id="call", python_callable=lambda *v, k, ti: [*map(list, v[:1]), k, ti.task_id],
                               op_args=[mapped.output], op_kwargs={"k": third.output})
            """
        )
        self.assertEqual(
            [run.xcom_pull(t) for t in ("first", "second", "third", "call")],
            [11, 13, 23, [[6, 7], 23, "call"]],
        )
        self.assertEqual([run.xcom_pull("kwargs", map_index=i) for i in (0, 1)], [11, 1])
        self.assertIn("adding", run.log("first"))
        with DAG("d"):
            for act, kind in (
                (lambda: liteflow.BashOperator("x"), TypeError),
                (lambda: liteflow.BashOperator(bash_command="x"), TypeError),
                (lambda: liteflow.BashOperator(task_id="a", bash_command="x", typo=1), TypeError),
                (lambda: liteflow.EmptyOperator.partial(task_id="a", typo=1), TypeError),
                (
                    lambda: liteflow.PythonOperator(task_id="a", python_callable=3),
                    liteflow.AirflowException,
                ),
            ):
                with self.assertRaises(kind):
                    act()

    def test_what_is_known_only_at_run_time_reaches_every_field(self):
        module = self.module(
            """
            from liteflow import dag as dag_decorator
            class Own(liteflow.BaseOperator):
                template_fields = ("field",)
                def __init__(self, *, field, **kwargs):
                    super().__init__(**kwargs)
                    self.field = field
                def pre_execute(self, context): print("pre", self.task_id)
                def post_execute(self, context, result=None): print("post", result)
                def execute(self, context): return self.field
            @dag_decorator
            def build(p="given"):
                @task
                def give(): return {"V": "of a result"}
                Own(task_id="own", field={"p": p})
                BashOperator(task_id="command", bash_command=p)
                BashOperator(task_id="env", bash_command='echo "$V  "', env={"V": p}, append_env=True)
                PythonOperator(task_id="python", python_callable=lambda *a: list(a), op_args=[p])
                @task.bash(env=give(), append_env=True)
                def decorated(): return 'echo "$V"'
                decorated()
                Own.partial(task_id="mapped").expand(field=[1, 2])
                @task
                def placeholder(): return liteflow._Argument("param", "p", 1)
                placeholder()
                EmptyOperator(task_id=TriggerRule.ALL_DONE)
            dag = build("echo done")
            """
        )
        run = module.dag.run(db_path=self.db, executor=pool())
        values = {x.task_id: x.value for x in run.xcoms() if x.map_index < 0}
        del values["give"]
        self.assertEqual(
            values,
            {
                "own": {"p": "echo done"},
                "command": "done",
                "env": "echo done",
                "python": ["echo done"],
                "decorated": "of a result",
            },
        )
        self.assertEqual(self.states(run)["placeholder"], "failed")
        self.assertEqual(self.states(run)["all_done"], "success")
        self.assertEqual(run.log("mapped", 1), "pre mapped\npost 2\n")

    def test_pulls_of_mapped_tasks_are_flat(self):
        run = self.run_flow(
            """
            with DAG("flat") as dag:
                @task
                def m(x): return x
                @task
                def a(): return "a"
                @task
                def pull(ti):
                    return [ti.xcom_pull(["m", "a"]), ti.xcom_pull(["m"]), ti.xcom_pull("m"),
                            ti.xcom_pull(["m", "m"], map_indexes=[1, 0]), ti.xcom_pull("m", map_indexes=None),
                            ti.xcom_pull("m", map_indexes=1), ti.xcom_pull(["a", "none"])]
                [m.expand(x=[10, 20]), a()] >> pull()
            """
        )
        self.assertEqual(
            run.xcom_pull("pull"),
            [[10, 20, "a"], [10, 20], [10, 20], [20, 10, 20, 10], None, 20, ["a", None]],
        )

    def test_one_of_many_values_is_pulled_without_the_others(self):
        with DAG("d", db_path=self.db) as d:
            many = task(task_id="m")(one_argument).expand(x=list(range(9)))

            @task
            def pull(ti):
                with mock.patch.object(liteflow, "_load", wraps=liteflow._load) as load:
                    found = [ti.xcom_pull("m", map_indexes=3), *ti.xcom_pull(["m"], map_indexes=4)]
                    found.append(ti.xcom_pull("m", map_indexes=9, default="none"))
                return [*found, load.call_count]

            many >> pull()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            for run in (d.test(), d.run(executor=threads)):
                self.assertEqual(run.xcom_pull("pull"), [3, 4, "none", 2])

    def test_a_pull_that_can_find_nothing_is_refused(self):
        found = []

        def pull(ti):
            earlier = {"include_prior_dates": True}
            for wrong in ({"dag_id": "other"}, {"run_id": "other"}, earlier, {"key": 3}):
                with self.assertRaises((TypeError, ValueError)) as caught:
                    ti.xcom_pull("pull", **wrong)
                found.append(str(caught.exception))
            return ti.xcom_pull("none", dag_id=ti.dag_id, run_id=ti.run_id)

        with DAG("d") as d:
            task(task_id="pull")(pull)()
        d.test(db_path=self.db).raise_if_failed()
        only = "xcom_pull() here reads values of this run only"
        only += "; the second argument is dag_id: name the key, key=..."
        self.assertEqual(found, [only, only, only, "key must be str, found 3"])

    def test_a_mapped_branch_skips_nothing_outside_of_its_group(self):
        run = self.run_flow(
            """
            with DAG("mapped_branch") as dag:
                @task.branch
                def choose(x): return x
                @task
                def work(): return 1
                choose.expand(x=["p", "q"]) >> [work.override(task_id=i)() for i in "pq"]
            """
        )
        self.assertEqual(set(self.states(run).values()), {"success"})

    def test_a_sensors_own_failures(self):
        run = self.run_flow(
            """
            with DAG("sensor_failures") as dag:
                @task.sensor
                def f(): raise AirflowFailException("no use")
                f.override(task_id="soft", soft_fail=True)()
                f.override(task_id="never", never_fail=True)()
                f.override(task_id="hard")()
                @task.sensor(timeout=0, poke_interval=0, never_fail=True)
                def late(): return False
                late()
                @task.sensor(soft_fail=True)
                def broken(): raise ValueError
                broken()
            """
        )
        self.assertEqual(
            self.states(run),
            {
                "soft": "skipped",
                "never": "skipped",
                "hard": "failed",
                "late": "failed",
                "broken": "failed",
            },
        )

    def test_callbacks_see_what_became_of_the_task(self):
        run = self.run_flow(
            """
            def note(context):
                ti = context["ti"]
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f:
                    f.write(f"{ti.task_id} {ti.state} {ti.end_date is not None} {context['dag_run'].state}" + chr(10))
            with DAG("seen", on_success_callback=note) as dag:
                @task(on_success_callback=note, retries=1, on_retry_callback=note)
                def f(ti):
                    if ti.try_number == 1: raise ValueError
                f()
            """
        )
        self.assertEqual(run.state, "success")
        self.assertEqual(
            (self.folder / "notes").read_text().splitlines(),
            ["f up_for_retry True running", "f success True running", "f success True success"],
        )

    def test_a_mapped_operator_that_runs_is_in_its_group(self):
        class Where(liteflow.BaseOperator):
            def __init__(self, *, x, **kwargs):
                super().__init__(**kwargs)

            def execute(self, context):
                return self.task_group.group_id

        with DAG("d") as d, TaskGroup("g"):
            Where.partial(task_id="w").expand(x=[1])
        run = d.test(db_path=self.db).raise_if_failed()
        self.assertEqual(run.xcom_pull("g.w"), ["g"])

    def test_a_setting_may_be_assigned_before_that_of_the_base(self):
        class Own(liteflow.BaseOperator):
            def __init__(self, *, tries, **kwargs):
                self.retries = tries
                super().__init__(**kwargs)

        with DAG("d"):
            self.assertEqual(Own(task_id="own", tries=3).retries, 3)
            with self.assertRaisesRegex(TypeError, "retries must be int"):
                Own(task_id="other", tries="3")

    def test_what_a_hook_adds_to_the_context_reaches_a_parameter_of_its_name(self):
        with DAG("hooked") as d:
            liteflow.PythonOperator(
                task_id="a",
                python_callable=lambda extra=3: extra,
                pre_execute=lambda context: context.update(extra=5),
            )
        self.assertEqual(d.test(db_path=self.db).xcom_pull("a"), 5)

    def test_a_command_that_is_written_as_a_template_is_told_of(self):
        run = self.run_flow(
            """
            with DAG("templates") as dag:
                @task.bash
                def jinja(): return "echo '{{ ds }}'"
                @task.bash
                def go(): return "echo '{{.Names}} {{json .}}'"
                jinja(); go()
            """
        )
        self.assertIn("{{ ds }} is passed as it is: no Jinja in @task.bash", run.log("jinja"))
        self.assertEqual(run.log("go"), "{{.Names}} {{json .}}\n")

    def test_a_result_that_looks_like_a_template_is_data_without_jinja_too(self):
        class Own(liteflow.BashOperator):
            template_ext = (".sql",)

        find = importlib.util.find_spec
        without = lambda name: None if name == "jinja2" else find(name)  # noqa: E731
        self.enterContext(mock.patch("importlib.util.find_spec", without))
        with DAG("d") as d:
            commands = task(task_id="a")(lambda: ["echo '{{ ds }}'", "echo a.sql"])()
            Own.partial(task_id="b").expand(bash_command=commands)
        run = d.test(db_path=self.db).raise_if_failed()
        self.assertEqual(run.xcom_pull("b"), ["{{ ds }}", "a.sql"])

    def test_a_callable_gets_of_op_kwargs_what_it_takes(self):
        with DAG("d", default_args={"op_kwargs": {"a": 1, "b": 2}}) as d:
            for i, function in enumerate((lambda: [0], lambda a: [a], lambda **both: both["b"])):
                liteflow.PythonOperator(task_id=f"t{i}", python_callable=function)
            none = task(task_id="nothing")(lambda: None)()
            liteflow.PythonOperator(task_id="none", python_callable=list, op_args=none)
        run = d.test(db_path=self.db).raise_if_failed()
        self.assertEqual([run.xcom_pull(f"t{i}") for i in range(3)], [[0], [1], 2])
        self.assertEqual(run.xcom_pull("none"), [])

    def test_template_fields_may_be_one_name(self):
        class Own(liteflow.BaseOperator):
            template_fields = "field"

            def __init__(self, *, field, **kwargs):
                super().__init__(**kwargs)
                self.field = field

            def execute(self, context):
                return self.field

        with DAG("d") as d:
            Own(task_id="own", field=task(task_id="a")(lambda: 5)())
            Own(task_id="data", field=task(task_id="b")(lambda: len)())  # a result is not called
        run = d.test(db_path=self.db)
        self.assertEqual([run.xcom_pull("own"), run.xcom_pull("data")], [5, len])

    def with_jinja(self):
        """Jinja need not be there: what stands for it knows `{{ python }}`."""

        class Environment:
            def __init__(self, undefined, extensions):
                self.filters, self.globals = {}, {}

            def from_string(self, text):
                def value(match, names):
                    name, _, filtered = match[1].partition(" | ")
                    found = eval(name, self.globals, names)
                    return self.filters[filtered](found) if filtered else found

                return types.SimpleNamespace(render=lambda names: self.fill(text, value, names))

            def fill(self, text, value, names):
                return re.sub(r"{{ (.*?) }}", lambda match: str(value(match, names)), text)

        class NativeEnvironment(Environment):
            def fill(self, text, value, names):
                found = re.fullmatch(r"{{ (.*?) }}", text)
                return value(found, names) if found else json.loads(text)

        jinja2 = types.ModuleType("jinja2")
        jinja2.__spec__ = importlib.machinery.ModuleSpec("jinja2", None)
        jinja2.Environment, jinja2.StrictUndefined = Environment, object
        native = types.SimpleNamespace(NativeEnvironment=NativeEnvironment)
        self.enterContext(
            mock.patch.dict(sys.modules, {"jinja2": jinja2, "jinja2.nativetypes": native})
        )

    def test_hooks_callbacks_and_labels_see_the_operator_that_runs(self):
        """The `task` of their context: with its fields filled in, and what `execute` has set."""
        self.with_jinja()
        seen = []

        def saw(context):
            seen.append((context["ti"].task.field, vars(context["task"]).get("made")))

        class Own(liteflow.BaseOperator):
            template_fields = ("field",)

            def __init__(self, *, field, **kwargs):
                super().__init__(**kwargs)
                self.field = field

            def pre_execute(self, context):
                seen.append(self.field)

            def execute(self, context):
                self.made = [self.field, context["task"] is self]
                return self.made

            def post_execute(self, context, result):
                seen.append(self.made)

        with DAG("d") as d:
            result = task(task_id="a")(lambda: "A")()
            Own(task_id="b", field=result, on_execute_callback=saw, on_success_callback=saw)
            label = "{{ task.field }} {{ task.made[1] }}"
            Own.partial(task_id="m", map_index_template=label).expand(field=["{{ ds }}"])
        run = d.test(db_path=self.db, logical_date=datetime.datetime(2026, 1, 2))
        first, then = ["A", True], ["2026-01-02", True]
        self.assertEqual(seen, ["A", ("A", None), first, ("A", first), "2026-01-02", then])
        self.assertEqual(run.get_task_instance("m", 0).element, "2026-01-02 True")
        self.assertIsInstance(d.get_task("b").field, liteflow.XComArg)

    def test_a_decorated_task_knows_its_arguments_by_airflows_names(self):
        self.with_jinja()
        seen = []

        def saw(context):
            own, other = context["task"], result.operator  # which is as it was built

            def look():
                seen.append((own.op_args, own.op_kwargs, other.op_args))

            look()
            thread = threading.Thread(target=look)  # it has none of the task's context variables
            thread.start()
            thread.join()

        def both(a, x):
            pass

        with DAG("d") as d:
            label = "{{ task.op_kwargs['x'] }} {{ x }}"
            result = task(task_id="r")(lambda n: "R")(5)
            mapped = task(task_id="m", map_index_template=label, on_success_callback=saw)(both)
            mapped.partial(a=result).expand(x=["1", "2"])
            made = task(task_id="b", on_success_callback=saw)(both)(result, x=3)
        run = d.test(db_path=self.db)
        self.assertEqual([run.get_task_instance("m", i).element for i in (0, 1)], ["1 1", "2 2"])
        given = [((), {"a": "R", "x": "1"}), ((), {"a": "R", "x": "2"}), (("R",), {"x": 3})]
        self.assertCountEqual(seen, [(*each, (5,)) for each in given * 2])
        self.assertEqual((made.operator.op_args, made.operator.op_kwargs), ((result,), {"x": 3}))

    def test_a_dag_says_what_its_templates_know_and_give(self):
        self.with_jinja()

        class Textless:
            def __str__(self):
                raise ValueError("what is undefined, say")

        values = []
        for native in (False, True):
            with DAG(
                "d",
                params={"a": [1, 2]},
                render_template_as_native_obj=native,
                user_defined_macros={"twice": lambda x: x * 2, "textless": Textless()},
                user_defined_filters={"first": lambda x: x[0]},
            ) as d:
                templates = [
                    "{{ twice(params['a']) }}",
                    "{{ params['a'] | first }}",
                    "{{ macros.random() < 1 }}",
                    "{{ macros.ds_add('2024-02-28', 2) }}",
                    "{{ macros.ds_format('2024-02-28', '%Y-%m-%d', '%d %b') }}",
                ]
                liteflow.PythonOperator(
                    task_id="a",
                    python_callable=lambda *args, n: [*args, n],
                    op_args=templates,
                    op_kwargs={"n": "10"},
                )
                for i, label in (("b", "{{ params['a'][0] }}"), ("c", "{{ textless }}")):
                    task(task_id=i, map_index_template=label)(one_argument).expand(x=["x"])
            run = d.test(db_path=self.db)
            values.append(run.xcom_pull("a"))
            labels = [run.get_task_instance(i, 0).element for i in "bc"]
            self.assertEqual(labels, ["1", "'x'"])
        same = ["2024-03-01", "28 Feb"]
        self.assertEqual(values[0], ["[1, 2, 1, 2]", "1", "True", *same, "10"])
        self.assertEqual(values[1], [[1, 2, 1, 2], 1, True, *same, 10])

    def test_macros_know_the_users_dateutil(self):
        package = self.folder / "dateutil"
        package.mkdir()
        for name in ("__init__", "parser", "relativedelta"):
            (package / f"{name}.py").touch()
        path = [str(self.folder), *sys.path]
        with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", path):
            for name in [name for name in sys.modules if name.partition(".")[0] == "dateutil"]:
                del sys.modules[name]
            found = liteflow._Macros().dateutil
            self.assertIs(found, sys.modules["dateutil"])
            self.assertTrue(found.relativedelta and found.parser)

    def test_a_name_that_can_not_be_made_is_told_and_fails_nothing(self):
        self.with_jinja()
        with DAG("d") as d:
            task(map_index_template="{{ 1 // x }}")(one_argument).expand(x=[0, 1])
        with contextlib.redirect_stderr(err := io.StringIO()):
            run = d.test(db_path=self.db).raise_if_failed()
        found = [run.get_task_instance("one_argument", i).element for i in (0, 1)]
        self.assertEqual(found, ["0", "1"])
        self.assertIn("map_index_template failed: ZeroDivisionError: ", err.getvalue())

    def test_without_jinja_an_instance_is_named_by_what_it_is_mapped_over(self):
        with DAG("d") as d:
            task(map_index_template="{{ ti }}")(one_argument).expand(x=["a"])
        with mock.patch.dict(sys.modules, {"jinja2": None}):
            run = d.test(db_path=self.db).raise_if_failed()
        self.assertEqual(run.get_task_instance("one_argument", 0).element, "'a'")

    def test_template_fields_of_an_argument_are_rendered_in_a_copy(self):
        class Reader:
            template_fields = ("path",)

            def __init__(self, path):
                self.path = path

        reader = Reader("/{{ ds }}")
        make = functools.partial(liteflow.PythonOperator, task_id="a", op_args=[reader])
        refused = self.assertRaisesRegex(ValueError, "op_args '/{{ ds }}' is a template: install")
        with DAG("d"), mock.patch("importlib.util.find_spec", lambda name: None), refused:
            make(python_callable=print)
        self.with_jinja()

        class Late(Reader):
            template_fields = property(lambda self: ("path",))

        with DAG("d") as d:
            paths = lambda x: [x[0].path, x[1].path.path]  # noqa: E731
            given = [[reader, Late(reader)]]
            liteflow.PythonOperator(task_id="a", python_callable=paths, op_args=given)
            task(task_id="b")(lambda task, ds: task.render_template(["{{ ds }}"], {"ds": ds}))()
        run = d.test(db_path=self.db, logical_date=datetime.datetime(2026, 1, 2))
        self.assertEqual(run.xcom_pull("a"), ["/2026-01-02"] * 2)
        self.assertEqual(run.xcom_pull("b"), ["2026-01-02"])
        self.assertEqual(reader.path, "/{{ ds }}")

    def test_a_template_field_may_be_a_function_that_gives_it(self):
        self.with_jinja()

        def give(context, jinja_env):
            text = "{{ ds }} " + jinja_env.from_string("{{ twice(ds[:2]) }}").render(context)
            return {"text": text}

        with DAG("d", user_defined_macros={"twice": lambda x: 2 * x}) as d:
            given = lambda text: text  # noqa: E731
            liteflow.PythonOperator(task_id="a", python_callable=given, op_kwargs=give)
        with DAG("e"), self.assertRaisesRegex(TypeError, "env can't be a function in @task.bash"):
            task.bash(task_id="a", env=give)(lambda: "env")()
        run = d.test(db_path=self.db, logical_date=datetime.datetime(2026, 1, 2))
        self.assertEqual(run.xcom_pull("a"), "{{ ds }} 2020")
        with DAG("e") as e, mock.patch.dict(sys.modules, {"jinja2": None}):
            given = lambda context, jinja_env: [jinja_env]  # noqa: E731
            liteflow.PythonOperator(task_id="a", python_callable=repr, op_args=given)
            self.assertEqual(e.test(db_path=self.db).raise_if_failed().xcom_pull("a"), "None")

    def test_a_template_beside_a_result_is_rendered_and_a_result_never(self):
        self.with_jinja()

        def given(*args):
            return list(args)

        pair = collections.namedtuple("pair", "day none")
        with DAG("d") as d:
            a = task(task_id="a")(lambda: "{{ ds }}")()
            call = lambda pair: [pair.day, pair.none]  # noqa: E731
            given_pair = {"pair": pair("{{ ds }}", None)}
            liteflow.PythonOperator(task_id="pair", python_callable=call, op_kwargs=given_pair)
            many = task(task_id="many")(lambda: ["{{ ds }}", ["{{ ds }}"]])()
            call = liteflow.PythonOperator.partial(python_callable=given, task_id="constants")
            call.expand(op_args=[["{{ ds }}", a], ("{{ ds }}",)])
            call = liteflow.PythonOperator.partial(python_callable=given, task_id="results")
            call.expand(op_args=many.map(lambda x: [x]))
            call = liteflow.PythonOperator.partial(python_callable=given, task_id="dicts")
            call.expand_kwargs([{"op_args": ["{{ ds }}", a]}])
            liteflow.PythonOperator(
                task_id="mixed", python_callable=given, op_args=["{{ ds }}", a, [{"k": many}]]
            )
        date = datetime.datetime(2026, 1, 2)
        run = d.test(db_path=self.db, logical_date=date).raise_if_failed()
        day, kept = "2026-01-02", "{{ ds }}"
        self.assertEqual(run.xcom_pull("pair"), [day, None])
        self.assertEqual(run.xcom_pull("mixed"), [day, kept, [{"k": [kept, [kept]]}]])
        self.assertEqual(run.xcom_pull("constants"), [[day, kept], [day]])
        self.assertEqual(run.xcom_pull("results"), [[kept], [[kept]]])
        self.assertEqual(run.xcom_pull("dicts"), [[day, kept]])

    def test_jinja_is_rendered_or_refused_never_ignored(self):
        class Own(liteflow.BashOperator):
            template_ext = (".sql",)

        found = importlib.util.find_spec("jinja2") is not None
        with DAG("d") as d:
            file = "'query.sql' names a template's file"
            with self.assertRaisesRegex(ValueError, f"task 'f': bash_command {file}"):
                Own(task_id="f", bash_command="query.sql")
            with self.assertRaisesRegex(ValueError, f"task 'y': env {file}"):
                Own.partial(task_id="y").expand(env=[{"A": "query.sql"}])
            late = Own(task_id="z", bash_command="query.sql ")
            self.assertEqual(late.bash_command[-1], " ")
            with self.assertRaisesRegex(ValueError, f"task 'z': bash_command {file}"):
                late.bash_command = "query.sql"
            if not found:
                with self.assertRaisesRegex(ValueError, "is a template"):
                    liteflow.BashOperator(task_id="c", bash_command="echo {# of Jinja #}")
                self.assertTrue(liteflow.BashOperator(task_id="n", bash_command="echo ${#PATH}"))
                with self.assertRaises(ValueError) as caught:
                    liteflow.BashOperator(task_id="x", bash_command="echo {{ ds }}")
                self.assertIn("bash_command", str(caught.exception))
                self.assertIn("jinja2", str(caught.exception))
                late = liteflow.BashOperator.partial(task_id="k")
                with self.assertRaisesRegex(ValueError, "'k': in expand_kwargs.. '{{ ds }}' is a"):
                    late.expand_kwargs([{"bash_command": "{{ ds }}"}])
            with warnings.catch_warnings(action="error"):  # which --quiet could not silence
                task(sample)("{{ ds }}")
                task.bash(task_id="b", env={"A": "{{ ds }}"})(lambda: "x")()
        passed = [text for text in liteflow._slips_in(d) if "'{{ ds }}' is passed as it is" in text]
        self.assertEqual([text.split(":")[0] for text in passed], ["task 'sample'", "task 'b'"])


class AheadTest(Case):
    """Quick jobs that are sent to a worker while another runs there."""

    def test_jobs_behind_one_that_turns_slow_run_elsewhere(self):
        module = self.module(
            """
            here = os.environ["CASE_DIR"]
            def quick(i): (Path(here) / f"ran-{i}").touch()
            def slow():
                deadline = time.monotonic() + 30
                while len([n for n in os.listdir(here) if n.startswith("ran-")]) < 60:
                    assert time.monotonic() < deadline, "the others wait for this one"
                    time.sleep(0.002)
            with DAG("turns_slow") as dag:
                for i in range(20): task(task_id=f"q{i}")(quick)(i)
                task(slow)()
                for i in range(20, 60): task(task_id=f"q{i}")(quick)(i)
            """
        )
        run = module.dag.run(db_path=self.db, max_workers=2)
        self.assertEqual(run.state, "success")
        self.assertEqual({ti.try_number for ti in run.get_task_instances()}, {1})
        self.assertEqual(self.query("SELECT count(*) FROM task_attempt"), [(61,)])

    def test_a_death_blames_only_the_job_that_ran(self):
        module = self.module(
            """
            def quick(): pass
            def dies(): os._exit(3)
            with DAG("dies") as dag:
                for i in range(80): task(task_id=f"t{i}")(dies if i % 20 == 10 else quick)()
            """
        )
        run = module.dag.run(db_path=self.db, max_workers=2)
        for i, ti in enumerate(run.get_task_instances()):
            expected = ("failed", 1) if i % 20 == 10 else ("success", 1)
            self.assertEqual((ti.state, ti.try_number), expected, ti)
            if ti.state == "failed":
                self.assertIn("exited with code 3", ti.error)

    def test_each_keeps_its_own_output_and_times(self):
        module = self.module(
            """
            def talks(i): print(f"{i} " * (5000 if i % 9 == 4 else 3)); print("end", i)
            def silent(): pass
            def cuts(i): print("lost"); os.truncate(1, 0); print("kept" + "!" * (9 - i))
            with DAG("output") as dag:
                for i in range(120): task(task_id=f"t{i}")(talks)(i)
                for i in range(20): task(task_id=f"s{i}")(silent)()
                for i in range(5): task(task_id=f"c{i}")(cuts)(i)
                for i in range(120, 140): task(task_id=f"t{i}")(talks)(i)
            """
        )
        run = module.dag.run(db_path=self.db, max_workers=2)
        self.assertEqual(run.state, "success")
        by_pid = {}
        for ti in run.get_task_instances():
            by_pid.setdefault(ti.pid, []).append((ti.start_date, ti.end_date, ti.task_id))
            kind, i = ti.task_id[0], int(ti.task_id[1:])
            text = f"{i} " * (5000 if i % 9 == 4 else 3) + f"\nend {i}\n"
            expected = {"t": text, "s": "", "c": f"kept{'!' * (9 - i)}\n"}
            self.assertEqual(run.log(ti.task_id), expected[kind], ti)
        for attempts in by_pid.values():
            attempts.sort()
            for (start, end, one), (after, _, other) in itertools.pairwise(attempts):
                self.assertLessEqual(start, end, one)
                self.assertLessEqual(end, after, (one, other))

    def test_a_stop_leaves_no_trace_of_what_did_not_start(self):
        module = self.module(
            """
            def quick(): pass
            def stops(): (Path(os.environ["CASE_DIR"]) / "here").touch(); time.sleep(60)
            with DAG("stopped") as dag:
                for i in range(30): task(task_id=f"q{i}")(quick)()
                for i in range(2): task(task_id=f"s{i}")(stops)()
                for i in range(30, 60): task(task_id=f"q{i}", priority_weight=1)(quick)()
            """
        )
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(module.dag.run, db_path=self.db, executor=pool(), stop=stop)
            self.assertTrue(wait_until((self.folder / "here").exists))
            stop.set()
            run = running.result(timeout=30)
        self.assertEqual(run.reason, "stopped")
        for ti in run.get_task_instances():
            if ti.task_id.startswith("q") and ti.state is None:
                self.assertEqual((ti.try_number, ti.start_date), (0, None))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no SIGSTOP")
    def test_a_worker_that_stalls_does_not_take_another_jobs_token(self):
        module = self.module(
            """
            def same(i):
                with open(os.environ["CASE_DIR"] + "/ran", "a") as f: f.write(f"{i}\\n")
                return i
            with DAG("stalls") as dag:
                for i in range(1500): task(task_id=f"q{i}")(same)(i)
            """
        )
        done = threading.Event()

        def stall(pids):
            while not done.wait(0.01):
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                    done.wait(0.02)  # longer than jobs are left there
                    os.kill(pid, signal.SIGCONT)

        with liteflow.WorkerPool(2) as workers, concurrent.futures.ThreadPoolExecutor(1) as threads:
            DAG("warm").run(db_path=self.db, executor=workers)
            module.dag.run(db_path=self.folder / "warm.db", executor=workers)
            (self.folder / "ran").unlink()
            stalling = threads.submit(stall, [slot.pid for slot in workers._idle])
            run = module.dag.run(db_path=self.db, executor=workers)
            done.set()
            stalling.result()
        self.assertEqual(run.state, "success")
        wrong = [x for x in run.xcoms() if x.task_id != f"q{x.value}"]
        self.assertEqual(wrong, [])
        ran = sorted(map(int, (self.folder / "ran").read_text().split()))
        self.assertEqual(ran, list(range(1500)))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork")
    def test_quick_jobs_in_forked_workers(self):
        module = self.module(
            """
            with DAG("forked") as dag:
                for i in range(100): task(task_id=f"q{i}")(abs)(-i)
            """
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            run = module.dag.run(db_path=self.db, max_workers=2, mp_context="fork")
        self.assertEqual([x.value for x in run.xcoms()], list(range(100)))

    def test_after_a_give_up_nothing_that_was_withdrawn_runs(self):
        with DAG("gives_up", fail_fast=True) as d:
            for i in range(3):
                task(task_id=f"t{i}")(sample)(1)
            task(task_id="end", retries=2)(sample)(1).as_teardown()
        for ends in ("finish", "time_out"):
            plan = liteflow._Plan(d)
            plan.settle()
            taken = [plan.take() for _ in range(4)]
            for instance in taken:
                plan.start(instance)
            if ends == "finish":
                plan.finish(taken[0], "failed", 0)
            else:
                plan.give_up(timed_out=True)
            self.assertIn(taken[1], plan.doomed)
            for instance in taken[1:]:
                plan.withdraw(instance)
            states = [i.state for i in taken[1:]]
            if ends == "finish":  # a teardown runs all the same, with all its tries
                self.assertEqual(states, ["skipped", "skipped", None])
                self.assertEqual((plan.take(), taken[3].max_tries), (taken[3], 2))
            else:
                self.assertEqual(states, ["skipped"] * 3)

    def test_the_log_of_a_sensor_between_quick_jobs_is_its_own(self):
        module = self.module(
            """
            def talks(i): print("I am", i); time.sleep(0.0005)
            with DAG("sensors") as dag:
                for i in range(400): task(task_id=f"q{i}")(talks)(i)
                for i in range(4):
                    @task.sensor(task_id=f"s{i}", poke_interval=0.05, timeout=30, mode="reschedule")
                    def s(ti=None):
                        print("sensor", ti.task_id)
                        path = Path(os.environ["CASE_DIR"]) / ti.task_id
                        with open(path, "a") as f: f.write("x")
                        return path.stat().st_size >= 4
                    s()
                for i in range(400, 800): task(task_id=f"q{i}")(talks)(i)
            """
        )
        run = module.dag.run(db_path=self.db, max_workers=2)
        self.assertEqual(run.state, "success")
        for i in range(4):
            self.assertEqual(run.log(f"s{i}"), f"sensor s{i}\n" * 4)

    def test_a_stop_reaches_what_waited_for_the_database(self):
        module = self.module(
            """
            here = Path(os.environ["CASE_DIR"])
            def first():
                (here / "begun").touch()
                while not (here / "go").exists(): time.sleep(0.01)
            def long(): time.sleep(60)
            with DAG("locked") as dag:
                task(first)() >> task(long)()
            """
        )
        stop, noticed = threading.Event(), threading.Event()
        stopping = liteflow._Run._stop

        def note(run, reason, now=False):
            stopping(run, reason, now)
            noticed.set()

        self.addCleanup(setattr, liteflow._Run, "_stop", stopping)
        liteflow._Run._stop = note
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            started = threads.submit(module.dag.run, db_path=self.db, executor=pool(), stop=stop)
            self.assertTrue(wait_until((self.folder / "begun").exists))
            with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                claimed = liteflow._Run._start
                waiting = threading.Event()

                def start(run, instance):
                    waiting.set()
                    return claimed(run, instance)

                self.addCleanup(setattr, liteflow._Run, "_start", claimed)
                liteflow._Run._start = start
                (self.folder / "go").touch()
                self.assertTrue(waiting.wait(LIMIT))
                stop.set()
                self.assertTrue(noticed.wait(LIMIT))
                other.execute("ROLLBACK")
            run = started.result(timeout=30)
        self.assertEqual((run.state, run.reason), ("failed", "stopped"))
        self.assertEqual(run.get_task_instance("long").state, None)

    def test_what_ends_while_the_database_is_locked_has_its_consequences(self):
        record, take, ended = liteflow._Store.record, liteflow._Run._take, threading.Event()

        def locked(store, batch, *check):
            if not ended.is_set() and any(
                i.label == "a" and i.state == "success" for i in batch.instances
            ):
                (self.folder / "go").touch()
                raise liteflow._Busy
            record(store, batch, *check)

        def noted(run, attempt, outcome):
            take(run, attempt, outcome)
            if attempt.instance.task_id == "choose":
                ended.set()

        for chosen, states in (("b", ("success", "skipped")), (None, ("skipped", "skipped"))):
            module = self.module(
                f"""
                def choose():
                    while not (Path(os.environ["CASE_DIR"]) / "go").exists(): time.sleep(0.01)
                    return {chosen!r}
                with DAG("locked") as dag:
                    task(task_id="a")(sorted)([1])
                    b, c = task(task_id="b")(sorted)([1]), task(task_id="c")(sorted)([1])
                    task.branch(choose)() >> [b, c]
                """
            )
            (self.folder / "go").unlink(missing_ok=True)
            ended.clear()
            with (
                self.subTest(chosen=chosen),
                mock.patch.object(liteflow._Store, "record", locked),
                mock.patch.object(liteflow._Run, "_take", noted),
            ):
                run = module.dag.run(db_path=self.db, executor=pool())
                found = self.states(run)
                self.assertEqual((run.state, found["b"], found["c"]), ("success", *states))

    def test_a_large_value_is_shown_without_making_its_whole_repr(self):
        for value in (bytes(50_000_000), bytearray(50_000_000), [bytes(50_000_000)]):
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            shown = liteflow._preview(value)
            self.assertLess(tracemalloc.get_traced_memory()[1], 1_000_000)
            self.assertLessEqual(len(shown), 80)
            tracemalloc.stop()


# In a worker, as its pool's initializer: at one point of one task's way through it, which a file
# names, it gets a signal, once. Another file tells the test which process that was.
HURT = """
import os
import liteflow

def once(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True

def hurt(folder, number):
    def point():
        with open(f"{folder}/point") as file:
            return file.read()

    class Hurt(liteflow._Worker):
        done, now = None, ""

        def fire(self, here, task_id):
            if task_id == "victim" and point() == here and once(f"{folder}/fired"):
                with open(f"{folder}/hurt.part", "w") as file:
                    file.write(str(os.getpid()))
                os.rename(f"{folder}/hurt.part", f"{folder}/hurt")
                os.kill(os.getpid(), number)

        def _take(self):
            if self.jobs is not None and self.done is None and os.path.exists(f"{folder}/armed"):
                self.fire("before it receives", "victim")
            job = super()._take()
            if job is not None:
                self.fire("received, and not told", job.task_id)
            return job

        def _tell(self, done, job):
            if done is not None:
                self.fire("before it tells done", self.now)
            super()._tell(done, job)
            self.done = None
            if done is not None:
                self.fire("told done", self.now)
            if job is not None:
                self.fire("told took", job.task_id)

        def _run(self, job):
            self.now = job.task_id
            self.done = super()._run(job)
            return self.done

        def _own_output(self, took):
            self.fire("after its function", self.now)
            return super()._own_output(took)

    liteflow._worker.__class__ = Hurt
"""
POINTS = {  # at each point: does a kill there use up a try, and how often does the function begin
    "before it receives": (False, 1),
    "received, and not told": (False, 1),
    "told took": (True, 1),
    "after its function": (True, 2),
    "before it tells done": (True, 2),
    "told done": (False, 1),
}
# A victim beside an idle worker, a busy one, or in the midst of quick jobs.
FLOW = """
F = os.environ["CASE_DIR"]
def note(*words):
    file = os.open(F + "/lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (" ".join(map(str, words)) + "\\n").encode())
    os.close(file)
def until(name):
    while not os.path.exists(f"{F}/{name}"): time.sleep(0.002)
def make(beside):
    with DAG(beside) as dag:
        @task
        def first():
            if beside == "busy": until("lines")  # so that its worker is another one
            Path(F, "armed").touch()
        @task(retries=1, retry_delay=0)
        def victim(x, ti): note("victim", ti.try_number, os.getpid()); return ti.try_number
        @task(retries=1, retry_delay=0)
        def quick(x, ti): note(ti.task_id, ti.try_number, os.getpid())
        @task
        def busy(ti): note("busy", ti.try_number, os.getpid()); until("go")
        @task
        def last(x): return x
        if beside == "busy": busy()
        one = first()
        if beside == "quick": [quick(one) for _ in range(12)]
        last(victim(one))
        if beside == "quick": [quick(one) for _ in range(12)]
    return dag
dags = {beside: make(beside) for beside in ("idle", "busy", "quick")}
"""


class QueueCase(Case):
    def setUp(self) -> None:
        super().setUp()
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))

    def helper(self, source: str):
        """A module that workers can import."""
        name = f"helper_{os.getpid()}_{self.id().rpartition('.')[2]}"
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        self.addCleanup(sys.modules.pop, name, None)
        return __import__(name)

    def lines(self) -> list[list[str]]:
        path = self.folder / "lines"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def pid_in(self, name: str) -> int:
        path = self.folder / name
        self.assertTrue(wait_until(path.exists), name)
        return int(path.read_text())

    def later(self, act, *args) -> threading.Thread:
        thread = threading.Thread(target=act, args=args, daemon=True)
        thread.start()
        self.addCleanup(thread.join, 10)
        return thread

    def attempts(self, dag_id: str) -> dict[str, list[tuple[str, str | None]]]:
        found = collections.defaultdict(list)
        for task_id, state, error in self.query(
            "SELECT task_id, a.state, a.error FROM task_attempt a JOIN task_instance i ON "
            "i.id = a.task_instance_id JOIN dag_run r ON r.id = i.dag_run_id WHERE dag_id = ? "
            "ORDER BY i.id, a.try_number",
            dag_id,
        ):
            found[task_id].append((state, error))
        return dict(found)


class QueueTest(QueueCase):
    def check_hurt(self, pool, dag, point: str, number: int, beside: str) -> None:
        for name in ("fired", "hurt", "armed", "go", "lines"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "point").write_text(point)
        self.db = self.folder / f"{point} {beside}.db"
        over, done = threading.Event(), []

        def see_to_it() -> None:
            pid = self.pid_in("hurt")
            if number == signal.SIGSTOP:
                wait_until(lambda: state_of(pid) == "T")
                if point == "before it receives" and beside == "idle":
                    done.append(over.wait(20))  # another one does it
                os.kill(pid, signal.SIGCONT)
            if beside == "busy":
                wait_until(lambda: any(words[0] == "victim" for words in self.lines()))
            (self.folder / "go").touch()

        helper = self.later(see_to_it)
        run = dag.run(db_path=self.db, executor=pool)
        over.set()
        helper.join(20)
        self.assertNotIn(False, done, "nobody did the work of a worker that was stopped")
        used, begun = POINTS[point] if number == signal.SIGKILL else (False, 1)
        tries = [("failed", "killed by SIGKILL")] * used + [("success", None)]
        attempts = self.attempts(beside)
        self.assertEqual(attempts.pop("victim"), tries)
        others = [rows for rows in attempts.values() if rows != [("success", None)]]
        if point == "told done":  # in the same word it may have told that it took another one
            killed = [("failed", "killed by SIGKILL"), ("success", None)]
            others = others[1:] if others[:1] == [killed] else others
        self.assertEqual(others, [])
        self.assertEqual(run.state, "success")
        self.assertEqual(run.xcom_pull("last"), len(tries))
        counts = collections.Counter(words[0] for words in self.lines())
        self.assertEqual(counts.pop("victim"), begun)
        self.assertEqual(set(counts.values()) - {1}, set(), "something ran twice")
        self.assertEqual(len(counts), {"idle": 0, "busy": 1, "quick": 24}[beside])

    def check_all(self, number: int) -> None:
        module, hurt = self.module(FLOW), self.helper(HURT).hurt
        with WorkerPool(2, initializer=hurt, initargs=(str(self.folder), number)) as pool:
            for point, beside in itertools.product(POINTS, module.dags):
                with self.subTest(point=point, beside=beside):
                    self.check_hurt(pool, module.dags[beside], point, number, beside)

    def test_a_worker_does_not_end_with_its_queue(self):
        """It looked whether there was word, had none, and then found the queue of a run that was
        over: one of an executor waited there for ever, and the next run for it."""
        (control, ours), (jobs, theirs) = liteflow._socket_pair(), liteflow._socket_pair()
        for end in (control, ours, jobs):
            self.addCleanup(end.close)
        worker = liteflow._Worker(liteflow._Wire(control))
        worker.jobs = liteflow._Wire(jobs)
        theirs.close()
        self.assertIsNone(worker._take())

    def test_a_large_message_needs_no_room_on_disk(self):
        ours, theirs = (liteflow._Wire(end) for end in liteflow._socket_pair())
        self.addCleanup(theirs.close)
        self.addCleanup(ours.close)
        full = mock.patch.object(tempfile, "TemporaryFile", side_effect=OSError(28, "no space"))
        with full:
            ours.send(("x" * 100_000,))
        self.assertEqual(theirs.receive(), (("x" * 100_000,), []))

    def test_a_worker_that_a_message_can_not_be_sent_to_is_not_waited_for(self):
        with DAG("large") as dag:
            task(sample).partial(y=1).expand(x=[1])
            for i in range(3_000):
                liteflow.EmptyOperator(task_id=f"{i:040}")
        make = liteflow._nameless_file

        def make_small(size, folder=None):
            if size > 100:
                raise OSError(28, "no space")
            return make(size, folder)

        with (
            mock.patch.object(liteflow, "_nameless_file", make_small),
            mock.patch.object(tempfile, "mkstemp", side_effect=OSError(28, "no space")),
            self.assertRaisesRegex(UnreachableTask, "killed by SIGKILL"),
        ):
            dag.run(db_path=self.db, max_workers=1)

    def test_a_message_that_can_not_be_received_takes_no_other_job_along(self):
        dag = self.module(
            """
            with DAG("large") as dag:
                for i in range(24):
                    @task(task_id=f"quick_{i}")
                    def quick(): return 1
                    @task(task_id=f"large_{i}")
                    def large(): return b"x" * 100_000
                    quick()
                    if i % 3 == 0: large()  # told together with the quick one that it took
            """
        ).dag
        take, lost = liteflow._Wire.take_file, []

        def lose_some(wire):
            file = take(wire)
            lost.append(len(lost) % 8 == 1)
            if lost[-1]:
                os.close(file)
                raise OSError(24, "Too many open files")
            return file

        ended, deaths = liteflow._Slot.has_ended, []

        def look(slot, timeout=0):
            found = ended(slot, timeout)
            deaths.append(found or not timeout)
            return found

        refusing = mock.patch.object(liteflow._Wire, "take_file", lose_some)
        looking = mock.patch.object(liteflow._Slot, "has_ended", look)
        with refusing, looking, WorkerPool(1, "forkserver") as pool:
            run = dag.run(db_path=self.db, executor=pool)
        failed = run.get_task_instances("failed")
        self.assertEqual(len(failed), sum(lost))
        for ti in failed:
            self.assertRegex(ti.error, r"\Athe task's outcome could not be received: .*open files")
        self.assertEqual(len(run.get_task_instances("success")), 32 - sum(lost))
        self.assertTrue(all(deaths), "a worker that is not heard went on taking jobs")

    def test_why_a_task_was_ended_is_told_even_if_its_outcome_could_not_be_received(self):
        for reason in ("timeout after 1 s", None):
            slot = mock.Mock(gone=False, reason=reason)
            slot.wire.receive.side_effect = OSError(24, "Too many open files")
            self.assertEqual([*liteflow._Slot.receive(slot)], [])
            self.assertRegex(slot.reason, reason or "could not be received: .*open files")

    def test_a_timeout_is_one_however_long_its_worker_takes_to_begin(self):
        helper = self.helper(
            """
            import liteflow, time
            def slow():
                restore = liteflow._WorkerRun.restore
                def slowly(run): restore(run); time.sleep(0.1)
                liteflow._WorkerRun.restore = slowly
            """
        )
        dag = self.module(
            """
            with DAG("late") as dag:
                @task(execution_timeout=0.15)
                def late():
                    try: time.sleep(30)
                    except BaseException as error: print(type(error).__name__, flush=True); raise
                late()
            """
        ).dag
        with WorkerPool(1, initializer=helper.slow) as pool:
            run = dag.run(db_path=self.db, executor=pool)
        self.assertEqual(run.log("late"), "AirflowTaskTimeout\n")

    def test_what_was_killed_at_once_took_no_negative_time(self):
        source = "with DAG('k') as dag: task(os.kill)(0, signal.SIGKILL)\n"
        [ti] = self.run_flow(source, max_workers=1).get_task_instances()
        self.assertGreaterEqual(ti.end_date, ti.start_date)

    def test_a_clock_that_is_set_changes_no_duration(self):
        """Also where the worker can't tell how long it took."""
        source = """
            with DAG("set") as dag:
                @task
                def dies(): time.sleep(0.05); os._exit(1)
                @task.sensor(mode="reschedule", poke_interval=0.05)
                def waits(task_reschedule_count): return task_reschedule_count > 2
                dies(), waits()
            """
        for step in (-3600, 3600):
            clock = itertools.count(2_000_000_000, step)
            with self.subTest(step), mock.patch.object(time, "time", clock.__next__):
                run = self.run_flow(source, max_workers=2)
                for ti in run.get_task_instances():
                    self.assertTrue(0 < ti.duration < 600, (ti, ti.duration))

    @LINUX
    def test_a_worker_that_is_killed_anywhere_loses_nothing_and_is_blamed_exactly(self):
        self.check_all(signal.SIGKILL)

    @LINUX
    def test_a_worker_that_is_stopped_anywhere_and_goes_on_loses_nothing(self):
        self.check_all(signal.SIGSTOP)

    def check_stop_in_hand(self, then: int | None) -> None:
        dag, hurt = self.module(FLOW).dags["idle"], self.helper(HURT).hurt
        stop = threading.Event()

        def see_to_it() -> None:
            pid = self.pid_in("hurt")
            wait_until(lambda: state_of(pid) == "T")
            stop.set()
            wait_until(told.is_set)
            if then is not None or not over.wait(15):
                late.append(then is None)
                os.kill(pid, then or signal.SIGKILL)

        told, over, late = threading.Event(), threading.Event(), []
        end = liteflow._SlotRunner.end

        def noting_end(runner, *args):
            end(runner, *args)
            told.set()

        (self.folder / "point").write_text("received, and not told")
        initargs = (str(self.folder), signal.SIGSTOP)
        with (
            mock.patch.object(liteflow._SlotRunner, "end", noting_end),
            mock.patch.object(liteflow, "_GRACE", 0.2),
            WorkerPool(2, initializer=hurt, initargs=initargs) as pool,
        ):
            self.later(see_to_it)
            run = dag.run(db_path=self.db, executor=pool, stop=stop)
            over.set()
        self.assertNotIn(True, late, "it hangs")
        self.assertEqual((run.state, run.reason), ("failed", "stopped"))
        if then != signal.SIGCONT:
            self.assertEqual(self.lines(), [], "it started after the run was stopped")

    @LINUX
    def test_a_stop_ends_a_worker_that_is_stopped_with_a_job_in_its_hand(self):
        self.check_stop_in_hand(None)

    @LINUX
    def test_a_job_that_went_down_with_its_worker_does_not_start_after_a_stop(self):
        self.check_stop_in_hand(signal.SIGKILL)

    @LINUX
    def test_a_job_that_is_taken_as_the_run_is_stopped_is_ended(self):
        self.check_stop_in_hand(signal.SIGCONT)

    def test_a_death_that_is_heard_of_while_another_is_settled_is_in_doubt_itself(self):
        runner = liteflow._SlotRunner(WorkerPool(3), False, DAG("d"), False)
        self.addCleanup(runner.close)
        names = "served spoilt state attempt exitcode deadline is_idle"
        values = (True, None, "serving", None, -9, None, True)
        slots = []
        for _ in range(3):
            slot = mock.Mock(shared=bytearray(2), **dict(zip(names.split(), values, strict=True)))
            slot.bury = lambda slot=slot: setattr(slot, "state", "dead")
            slot.receive = lambda: iter(())
            slots.append(slot)
        dead, dies, takes = slots
        runner._slots = [dead, dies, takes]
        for number in (1, 2, 3):
            job = liteflow._Job(str(number), "", -1, 1, 1, b"", None, {}, None)
            runner._out[number] = (mock.Mock(losses=0), job)

        def hear(slot) -> None:
            if slot is dies and slot in runner._slots:
                dies.shared[0] = takes.shared[0] = 1
                runner._lose(dies)

        dead.shared[0] = 1
        with (
            mock.patch.object(runner, "_hear", hear),
            mock.patch.object(runner, "_let_go", lambda slot: runner._slots.remove(slot)),
        ):
            runner._lose(dead)
            runner._settle()
            self.assertEqual(list(runner._unsent), [], "what one has in its hand was sent again")
            takes.shared[0] = 0
            runner._settle()
        self.assertEqual([job.task_id for _, job in runner._unsent], ["1", "2", "3"])
        runner._slots.clear()

    def test_a_worker_that_looks_while_a_message_is_on_its_way_hears_it(self):
        # Preempted between its look at the byte, and at the queue's end: it took that for its own.
        helper = self.helper(
            """
            import os, time
            import liteflow

            def slow(folder):
                class Slow(liteflow._Worker):
                    def _heed(self):
                        if self.jobs is not None and os.path.exists(folder + "/lines"):
                            while not os.path.exists(folder + "/sending"): time.sleep(0.002)
                        return super()._heed()
                    def _wait(self):
                        if self.jobs is not None and os.path.exists(folder + "/sending"):
                            open(folder + "/looked", "w").close()
                            super()._wait()
                            while not os.path.exists(folder + "/closed"): time.sleep(0.002)
                        else:
                            super()._wait()
                liteflow._worker.__class__ = Slow
            """
        )
        module = self.module(
            """
            with DAG("one") as dag:
                @task
                def one(): Path(os.environ["CASE_DIR"], "lines").touch(); return os.getpid()
                one()
            """
        )
        send = liteflow._Wire.send

        def slow_send(wire, data, values=(), file=None):
            if data[0] == "leave":
                (self.folder / "sending").touch()
                wait_until((self.folder / "looked").exists, 1)
            send(wire, data, values, file)

        with (
            mock.patch.object(liteflow._Wire, "send", slow_send),
            mock.patch.object(liteflow, "_START_LIMIT", 10),
            WorkerPool(1, initializer=helper.slow, initargs=(str(self.folder),)) as pool,
        ):
            first = module.dag.run(db_path=self.db, executor=pool)
            (self.folder / "closed").touch()
            pid = pool._idle[0].pid
            wait_until(lambda: state_of(pid) == "S" and not self.is_spinning(pid))
            second = module.dag.run(db_path=self.db, executor=pool)
        self.assertEqual(first.xcom_pull("one"), second.xcom_pull("one"))

    @staticmethod
    def is_spinning(pid: int) -> bool:
        def used():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

        before = used()
        time.sleep(0.05)
        return used() != before

    def test_a_worker_that_dies_after_it_told_its_outcome_takes_nothing_back(self):
        # Held, in a callback, and where its callback takes too long.
        module = self.module(
            """
            F = os.environ["CASE_DIR"]
            def dies(context): os.kill(os.getpid(), signal.SIGKILL)
            def hangs(context): time.sleep(60)
            with DAG("held") as dag:
                @task(on_success_callback=dies)
                def one(): return 1
                @task(on_failure_callback=dies, retries=1, retry_delay=0, on_retry_callback=dies)
                def two(x): raise ValueError("mine")
                @task(on_success_callback=hangs, trigger_rule="all_done")
                def three(x): return 3
                @task
                def long(x): Path(F, "pid").write_text(str(os.getpid())); time.sleep(0.25); return 4
                @task
                def last(x): return x + 1
                last(long(three(two(one()))))
            """
        )
        held = liteflow._SlotRunner._let_call

        def late_word(runner, slot, *message):
            if slot.attempt.instance.task_id == "long":
                os.kill(slot.pid, signal.SIGKILL)
            held(runner, slot, *message)

        with (
            mock.patch.object(liteflow, "_CALLBACK_LIMIT", 0.2),
            mock.patch.object(liteflow._SlotRunner, "_let_call", late_word),
        ):
            run = module.dag.run(db_path=self.db, max_workers=1)
        attempts = {
            task_id: [state for state, _ in rows] for task_id, rows in self.attempts("held").items()
        }
        self.assertEqual(
            attempts,
            {
                "one": ["success"],
                "two": ["failed", "failed"],
                "three": ["success"],
                "long": ["success"],
                "last": ["success"],
            },
        )
        self.assertEqual(run.xcom_pull("last"), 5)

    def test_what_may_start_starts_as_soon_as_workers_have_taken_what_was_sent(self):
        dag = self.module(
            """
            @task
            def meets(n, stage):
                here = Path(__file__).parent
                (here / f"{stage}{n}").touch()
                end = time.monotonic() + 5
                while len([*here.glob(f"{stage}?")]) < 3:
                    assert time.monotonic() < end
                    time.sleep(0.01)
            with DAG("d") as dag:
                all_work = EmptyOperator(task_id="all_work")
                [meets(n, "before") for n in range(3)] >> all_work
                all_work >> [meets(n, "after") for n in range(3)]
            """
        ).dag
        with (  # what comes now and then starts it, too
            mock.patch.object(liteflow, "_SOON", 20.0),
            mock.patch.object(liteflow, "_GLANCE", 20.0),
        ):
            run = dag.run(db_path=self.db, max_workers=3)
        self.assertEqual(run.state, "success")

    def test_a_task_that_runs_began_when_its_worker_took_it(self):
        dag = self.module(
            """
            with DAG("d") as dag:
                @task
                def waits():
                    end = time.monotonic() + 20
                    while not Path(os.environ["CASE_DIR"], "seen").exists():
                        assert time.monotonic() < end
                        time.sleep(0.01)
                waits()
            """
        ).dag

        def begun():
            with contextlib.suppress(sqlite3.OperationalError):  # the file is just being made
                found = "SELECT start_date FROM task_attempt WHERE state = 'running'"
                return self.db.exists() and self.query(found)

        with (
            mock.patch.object(liteflow, "_SOON", 1.0),  # until that it runs is recorded
            concurrent.futures.ThreadPoolExecutor(1) as threads,
        ):
            ended = threads.submit(dag.run, db_path=self.db, max_workers=1)
            [[seen]] = wait_until(begun)
            (self.folder / "seen").touch()
            began = ended.result().get_task_instance("waits").start_date
        self.assertLess(abs(datetime.datetime.fromisoformat(seen) - began).total_seconds(), 0.7)

    def test_what_is_idle_goes_to_a_run_in_line_as_soon_as_all_jobs_are_taken(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        heard = []
        with mock.patch.object(
            runner, "_look", lambda until: heard.append(until) or len(heard) > 1
        ):
            runner._pool._slot_line[mock.Mock()] = None
            runner.wait(20)
        self.assertEqual(len(heard), 1)

    def test_a_run_that_could_spare_more_than_others_wait_for_sleeps_meanwhile(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        runner._pool._slot_line[mock.Mock()] = None
        runner._poll = mock.Mock(poll=mock.Mock(return_value=[]))
        with mock.patch.object(runner, "spare", lambda: [mock.Mock(lent=0.0)]):
            runner._look(liteflow._monotonic() + LIMIT)
        [[slept]] = [call.args for call in runner._poll.poll.call_args_list]
        self.assertGreater(slept, 0.0)

    def test_only_who_is_to_end_at_once_is_killed_without_a_grace(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        for now, killed in ((False, []), (True, [mock.call(signal.SIGKILL)])):
            slot = mock.Mock(attempt=(attempt := mock.Mock()), state="serving")
            with mock.patch.object(runner, "_slots", [slot]):
                runner.end(attempt, "why", now=now)
            slot.ask_to_end.assert_called_once_with("why")
            self.assertEqual(slot.signal_group.call_args_list, killed)

    def test_a_second_look_at_the_runs_waits_for_workers_that_still_import(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        slot = mock.Mock(state="asked")
        runner._slots, runner._found = [slot], ([], set())
        check = mock.Mock(side_effect=[None, AssertionError("it does not wait")])
        with mock.patch.object(runner, "wait", lambda _: setattr(slot, "state", "joined")):
            runner.begin({}, [], 1, check)
        self.assertEqual(slot.state, "asked")  # anew
        runner._slots = []

    def test_no_worker_is_spared_that_still_imports_or_waits_for_word(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        states = "asked", "held", "calling", "joined", "serving"
        runner._slots = [mock.Mock(state=state, spoilt=None, is_idle=False) for state in states]
        runner._found = [], set()
        runner._pool._runners.add(object())  # its fair share is less than one
        self.assertEqual([slot.state for slot in runner.spare()], ["joined", "serving"])
        runner._pool._runners = {runner}
        runner._slots = []

    def test_who_stands_in_line_wakes_those_that_can_spare_and_who_leaves_it_the_next(self):
        made = WorkerPool(1)
        runners = [liteflow._SlotRunner(made, False, DAG("d"), False) for _ in range(3)]
        for each in runners:
            self.addCleanup(each.close)
            self.enterContext(mock.patch.object(each, "wake"))
        holder, first, second = runners
        holder.spare, made._count = lambda: [1], 1
        self.assertEqual([made._lend(each, None) for each in (first, second)], [None, None])
        self.assertEqual(holder.wake.call_count, 2)
        made._count = 0
        made._leave_slot_line(first)
        second.wake.assert_called_once_with()

    @LINUX
    def test_a_job_that_an_idle_worker_leaves_in_the_queue_is_sent_again(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        runner._slots = [mock.Mock(is_idle=True, shared=bytearray(2))]
        job = liteflow._Job("t", "", -1, 1, 1, b"", None, {}, None)
        runner.start(attempt := mock.Mock(), job)
        runner._look_for_stalled(runner._heard + 1)
        self.assertEqual((runner._out, [*runner._unsent]), ({}, [(attempt, job)]))
        runner._slots = []

    def test_a_run_with_jobs_to_do_spares_what_is_more_than_its_share(self):
        pool = WorkerPool(6)
        runner, other = (liteflow._SlotRunner(pool, False, DAG("d"), False) for _ in "ab")
        self.addCleanup(runner.close)
        self.addCleanup(other.close)
        busy = mock.Mock(spoilt=None, state="serving", is_idle=False)
        runner._found, runner._out[1] = ([], set()), mock.Mock()
        spared = []
        for count in range(6):
            with mock.patch.object(runner, "_slots", [busy] * count):
                spared.append(len(runner.spare()))
        self.assertEqual(spared, [0, 0, 0, 0, 1, 2])
        idle = mock.Mock(spoilt=None, state="serving", is_idle=True)
        with mock.patch.object(runner, "_slots", [*[busy] * 3, idle]):
            self.assertEqual(runner.spare(), [idle])

    def test_a_run_with_nothing_to_start_spares_all_that_is_idle(self):
        runner = liteflow._SlotRunner(WorkerPool(3), False, DAG("d"), False)
        self.addCleanup(runner.close)
        idle = mock.Mock(spoilt=None, state="serving", is_idle=True)
        runner._found, runner._slots, pool = ([], set()), [idle] * 3, runner._pool
        self.assertEqual(len(runner.spare()), 3)
        for of, name in ((runner, "_unsent"), (runner, "_out"), (pool, "_slot_line")):
            with self.subTest(name), mock.patch.object(of, name, {runner: None}):
                self.assertEqual(runner.spare(), [])
        runner._slots = []

    def test_a_worker_that_is_about_to_take_a_job_twice_is_not_stuck_in_between(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        never = float("inf")
        slot = mock.Mock(
            shared=bytearray(2), state="serving", deaf=False, deadline=never, stuck=never
        )
        runner._slots = [slot]
        runner._heard = never
        for now in (100.0, 200.0):  # each time another one takes the job
            job = liteflow._Job("t", "", -1, 1, 1, b"", None, {}, 10.0)
            runner._out[1] = (mock.Mock(), job)
            slot.shared[liteflow._TAKING] = 1
            runner._look_for_stalled(now)
            slot.shared[liteflow._TAKING] = 0
            runner._out.clear()
            runner.wait(0)
        slot.signal_group.assert_not_called()
        runner._out[1] = (mock.Mock(), job)
        slot.shared[liteflow._TAKING] = 1
        for now in (300.0, 311.0):
            runner._look_for_stalled(now)
        slot.signal_group.assert_called_once_with(signal.SIGKILL)
        runner._slots = []

    def test_a_job_that_was_taken_behind_one_that_ended_in_time_is_not_ended_in_its_place(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        next_one = mock.Mock(pokes=0)
        job = liteflow._Job("t", "", -1, 1, 1, b"", None, {}, 10.0)
        runner._out[2] = next_one, job
        said = [("done", [tuple(liteflow._Outcome("success", None, took=0.1)), 2])]
        slot = mock.Mock(
            attempt=mock.Mock(), log=mock.Mock(**{"take.return_value": [], "finish.return_value": []}), spoilt=None, reason=None, gone=False,
            state="serving", deadline=0.0, timeout=1.0, shared=bytearray(2), receive=lambda: [said.pop()] if said else [],
        )  # fmt: skip
        runner._slots = [slot]
        runner._events = [(mock.Mock(), liteflow._Outcome("failed", "it could not be sent"))]
        runner.wait(0)
        slot.ask_to_end.assert_not_called()
        self.assertEqual(slot.attempt, next_one)
        runner._slots = []

    def test_the_last_words_of_a_worker_that_is_replaced_are_heard(self):
        # It did not know that it was to be: it ran one job more, and took another.
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        attempts = {number: mock.Mock(pokes=0) for number in (1, 2)}
        for number, attempt in attempts.items():
            job = liteflow._Job(str(number), "", -1, 1, 1, b"", None, {}, None)
            runner._out[number] = (attempt, job)
        done = tuple(liteflow._Outcome("success", None, took=0.001))
        said = [("took", [1]), ("done", [done, 2])]
        slot = mock.Mock(
            attempt=None, log=mock.Mock(**{"take.return_value": [], "finish.return_value": []}), spoilt="told to end", reason=None, state="serving",
            served=True, exitcode=-9, shared=bytearray(2), receive=lambda: iter(said),
        )  # fmt: skip
        runner._slots = [slot]
        slot.bury = lambda: setattr(slot, "state", "dead")
        with mock.patch.object(runner, "_let_go", runner._slots.remove):
            runner._lose(slot)
        outcomes = [(attempt, outcome.status) for attempt, outcome in runner._events]
        self.assertEqual(outcomes, [(attempts[1], "success"), (attempts[2], "failed")])

    def test_a_worker_that_is_told_to_end_between_two_jobs_takes_no_other(self):
        # The TERM was meant for the job that has just ended.
        ends = [liteflow._Wire(end) for pair in range(2) for end in liteflow._socket_pair()]
        for end in ends:
            self.addCleanup(end.close)
        worker = liteflow._Worker(ends[0])
        worker.jobs = ends[2]
        job = liteflow._Job("a", "f", -1, 1, 0, (), None, {}, None)
        ends[3].send((1, False, *job))
        worker._on_term(signal.SIGTERM, None)
        self.assertIsNone(worker._take())
        with self.assertRaises(liteflow.AirflowTaskTerminated), worker:
            self.fail("a job that was taken just before has run")
        worker.terminated = False
        self.assertEqual((worker._take(), worker.number), (job, 1))

    def test_a_job_that_kills_whoever_takes_it_is_not_sent_for_ever(self):
        # As one does whose arguments find no room: it has no attempt yet that could fail.
        dag = self.module(
            """
            import multiprocessing
            def take(worker, number, eager, task_id, *job):
                if task_id == "fatal": os.kill(os.getpid(), signal.SIGKILL)
                return begin(worker, number, eager, task_id, *job)
            if multiprocessing.parent_process():
                begin, liteflow._Worker._begin = liteflow._Worker._begin, take
            with DAG("d") as dag:
                @task
                def fatal(): pass
                @task
                def well(): pass
                fatal(), well()
            """
        ).dag
        run = dag.run(db_path=self.db, mp_context="forkserver")
        well, fatal = sorted(run.get_task_instances(), key=lambda ti: ti.state == "failed")
        self.assertEqual((well.state, fatal.state, fatal.task_id), ("success", "failed", "fatal"))
        why = "three workers died as they took it: killed by SIGKILL"
        self.assertEqual(fatal.error.splitlines()[-1], why)

    def test_workers_that_die_as_they_take_a_sensor_now_and_then_do_not_add_up(self):
        dag = self.module(
            """
            import multiprocessing
            def take(worker, number, eager, task_id, *job):
                with open("takes", "a") as file:
                    file.write(".")
                    takes = file.tell()
                if takes % 2: os.kill(os.getpid(), signal.SIGKILL)
                return begin(worker, number, eager, task_id, *job)
            if multiprocessing.parent_process():
                begin, liteflow._Worker._begin = liteflow._Worker._begin, take
            with DAG("d") as dag:
                @task.sensor(mode="reschedule", poke_interval=0.01)
                def arrives(): return os.path.getsize("takes") >= 6
                arrives()
            """
        ).dag
        with contextlib.chdir(self.folder):
            run = dag.run(db_path=self.db, mp_context="forkserver", max_workers=1)
        self.assertEqual(
            [(ti.state, ti.error) for ti in run.get_task_instances()], [("success", None)]
        )

    def test_many_deaths_in_one_run_leave_no_files_open(self):
        dag = self.module(
            """
            with DAG("dies") as dag:
                @task
                def dies(): os.kill(os.getpid(), signal.SIGKILL)
                for _ in range(4): dies()
            """
        ).dag

        def shared() -> int:
            links = (os.readlink(f"/proc/self/fd/{n}") for n in PoolTest.descriptors())
            return sum("memfd" in link for link in links)

        before = shared()  # of workers that other tests have left warm
        with WorkerPool(1) as pool:
            dag.run(db_path=self.db, executor=pool)
            self.assertLessEqual(shared(), before + 1)
        self.assertLessEqual(shared(), before)
        errors = {rows[0] for rows in self.attempts("dies").values()}
        self.assertEqual(errors, {("failed", "killed by SIGKILL")})


# What has to work whichever way jobs go.
EVERYTHING = """
F = os.environ["CASE_DIR"]
with DAG("everything", on_success_callback=lambda context: Path(F, "ended").touch()) as dag:
    @task
    def number(i, size=0): return (i, b"x" * size)
    @task
    def size(pairs): return sum(len(data) for _, data in pairs)
    @task
    def inc(x): return x + 1
    @task(retries=1, retry_delay=0)
    def dies(ti):
        if ti.try_number == 1: os.kill(os.getpid(), signal.SIGKILL)
        return ti.try_number
    def called(context): Path(F, "called").touch()
    @task(on_failure_callback=called)
    def fails(): raise ValueError("mine")
    @task(execution_timeout=0.2)
    def late(): time.sleep(60)
    @task.sensor(poke_interval=0.01, mode="reschedule")
    def sees(ti): return PokeReturnValue(os.path.exists(F + "/seen"), 5)
    @task
    def shows(): Path(F, "seen").touch(); print("shown")
    size([number(i) for i in range(30)])
    size([number(i, 6000 + 9000 * i) for i in range(7)])
    size([number(0, 20_000_000)])
    x = 0
    for _ in range(20): x = inc(x)
    inc.expand(x=list(range(20)))
    dies(); fails(); late(); sees(); shows()
"""


class OneAtATimeTest(QueueCase):
    """Where there is no queue: jobs go over the control pair."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(liteflow, "_pulls", lambda: False)
        patch.start()
        self.addCleanup(patch.stop)

    def check_everything(self, **options) -> None:
        module = self.module(EVERYTHING)
        run = module.dag.run(db_path=self.db, **options)
        states = self.states(run)
        bad = {task_id for task_id, state in states.items() if state != "success"}
        self.assertEqual(bad, {"fails", "late"})
        attempts = self.attempts("everything")
        self.assertEqual(attempts["dies"][0], ("failed", "killed by SIGKILL"))
        self.assertIn("timeout after 0.2 s", attempts["late"][0][1])
        self.assertEqual(run.xcom_pull("size__1"), sum(6000 + 9000 * i for i in range(7)))
        self.assertEqual(run.xcom_pull("size__2"), 20_000_000)
        self.assertEqual(run.xcom_pull("inc__19"), 20)
        self.assertEqual(run.xcom_pull("sees"), 5)
        self.assertEqual(run.log("shows"), "shown\n")
        self.assertTrue((self.folder / "called").exists())

    def test_everything_works(self):
        with WorkerPool(2) as pool:
            self.check_everything(executor=pool)
            self.assertEqual({type(slot.shared) for slot in pool._idle}, {bytearray})
        self.assert_nothing_left()

    def test_everything_works_in_forked_workers(self):
        self.check_everything(max_workers=2, mp_context="fork")
        self.assert_nothing_left()

    def test_small_buffers_hold_nothing_up(self):
        with mock.patch.object(liteflow, "_SOCKET_BUFFER", 4096):
            self.check_everything(max_workers=2)
            self.assert_nothing_left()

    def test_a_job_goes_to_a_worker_that_is_idle(self):
        runner = liteflow._SlotRunner(WorkerPool(1), False, DAG("d"), False)
        self.addCleanup(runner.close)
        busy, idle = [mock.Mock(is_idle=i, shared=bytearray(2)) for i in (False, True)]
        runner._slots = [busy, idle]
        runner._send((1,))
        self.assertEqual((busy.wire.send.call_count, idle.wire.send.call_count), (0, 1))
        runner._slots = []

    def test_a_worker_has_no_queue(self):
        helper = self.helper(
            """
            import liteflow

            def see(path):
                work = liteflow._Worker._on_work
                def _on_work(self, *fields):
                    work(self, *fields)
                    with open(path, "a") as file:
                        print(self.jobs, self.control._whole, file=file)
                liteflow._Worker._on_work = _on_work
            """
        )
        dag = self.module("with DAG('d') as dag:\n    task(print)('x')\n").dag
        path = str(self.folder / "seen")
        with WorkerPool(1, initializer=helper.see, initargs=(path,)) as pool:
            dag.run(db_path=self.db, executor=pool)
        self.assertEqual(Path(path).read_text(), "None False\n")

    def test_a_warm_worker_gets_a_large_conf(self):
        # It goes as a file; the folder of the run before is gone.
        dag = self.module("with DAG('d') as dag:\n    task(print)('x')\n").dag
        with WorkerPool(1) as pool:
            dag.run(db_path=self.db, executor=pool)
            first = [slot.pid for slot in pool._idle]
            dag.run(db_path=self.db, executor=pool, conf={"text": "x" * 100_000})
            self.assertEqual([slot.pid for slot in pool._idle], first)

    def test_a_job_is_not_blamed_for_a_worker_that_died_before_it_came(self):
        dag = self.module(
            """
            with DAG("chain") as dag:
                @task
                def one(): return 1
                @task
                def two(x): return x
                two(one())
            """
        ).dag
        send, killed = liteflow._SlotRunner._send, []

        def late_send(runner, message):
            if message[2] == "two" and not killed:
                for slot in runner._slots:
                    killed.append(slot.pid)
                    os.kill(slot.pid, signal.SIGKILL)
                    slot.has_ended(10)
            return send(runner, message)

        with mock.patch.object(liteflow._SlotRunner, "_send", late_send):
            run = dag.run(db_path=self.db, max_workers=1)
        self.assertEqual(self.attempts("chain")["two"], [("success", None)])
        self.assertEqual(run.state, "success")


class SandboxTest(QueueCase):
    """What a sandbox refuses, or a Python has no name for that is built for older systems."""

    def setUp(self) -> None:
        super().setUp()
        liteflow._pulls.cache_clear()
        self.addCleanup(liteflow._pulls.cache_clear)

    def check_everything(self, module, name: str, act) -> None:
        # Workers that are forked have it, too.
        with mock.patch.object(module, name, act):
            OneAtATimeTest.check_everything(self, max_workers=2, mp_context="fork")
            self.assert_nothing_left()

    @LINUX
    def test_no_files_in_memory(self):
        self.check_everything(os, "memfd_create", mock.Mock(side_effect=PermissionError))
        self.assertTrue(liteflow._pulls())

    @LINUX
    def test_no_way_to_wake_one_of_several_sleepers(self):
        self.check_everything(select, "epoll", mock.Mock(side_effect=OSError(22, "invalid")))
        self.assertFalse(liteflow._pulls())

    def test_no_sockets_of_whole_messages(self):
        pair = socket.socketpair

        def only_streams(*args, type=socket.SOCK_STREAM):
            if type != socket.SOCK_STREAM:
                raise OSError(94, "socket type not supported")
            return pair(*args)

        # Such a system (macOS) loses an open file that is closed before it was received.
        with mock.patch.object(socket, "send_fds", side_effect=AssertionError):
            self.check_everything(socket, "socketpair", only_streams)
        self.assertFalse(liteflow._pulls())

    @LINUX
    def test_sockets_that_heed_nothing_but_their_timeout(self):
        # gevent's do, which takes `epoll` away, too.
        recvmsg = socket.socket.recvmsg

        def receive(end, *args):
            self.assertEqual(end.gettimeout(), 0, "it would wait for what may never come")
            return recvmsg(end, *args)

        with mock.patch.object(select, "epoll", side_effect=AttributeError):
            self.check_everything(socket.socket, "recvmsg", receive)

    def test_sockets_of_a_class_that_came_later_than_multiprocessing(self):
        # gevent's, in Celery.
        with mock.patch.object(socket, "socket", type("Later", (socket.socket,), {})):
            run = self.run_flow("with DAG('d') as dag: task(print)()", mp_context="spawn")
        self.assertEqual(run.state, "success")

    def test_a_large_message_on_a_stream_leaves_no_file(self):
        ours, theirs = (liteflow._Wire(end) for end in socket.socketpair())
        self.addCleanup(theirs.close)
        ours.folder, large = str(self.folder), ("x" * 100_000,)
        with mock.patch.object(socket, "send_fds", side_effect=AssertionError):
            ours.send(large, [b"y" * 100_000])
        self.assertEqual(theirs.receive(), (large, [b"y" * 100_000]))
        ours.close()
        with self.assertRaises(OSError):
            ours.send(large)
        self.assertEqual(os.listdir(self.folder), [])

    @LINUX
    def test_a_python_that_is_built_for_any_glibc(self):
        path = self.script(
            """
            import os, select
            del os.memfd_create, os.pidfd_open, select.EPOLLEXCLUSIVE
            import liteflow
            from liteflow import DAG, task
            with DAG("built") as dag:
                @task
                def large(): return b"x" * 200_000
                @task
                def size(value, i): return len(value) + i
                size.partial(value=large()).expand(i=[1, 2, 3])
            if __name__ == "__main__":
                run = dag.run(max_workers=2)
                print(run.state, run.xcom_pull("size"), liteflow._pulls(), liteflow._may_fork())
            """
        )
        done = self.python(path, timeout=30)
        told = "success [200001, 200002, 200003] True True\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, told, ""))

    def test_where_no_priority_may_be_set(self):
        # `SystemCallFilter=~@resources` of systemd.
        path = self.script(
            """
            import os
            def refuse(*_): raise PermissionError(1, "not permitted")
            os.nice = os.setpriority = os.sched_setaffinity = refuse
            from liteflow import DAG, task
            with DAG("filtered") as dag:
                task(task_id="pid")(os.getpid)()
            if __name__ == "__main__":
                dag.run().raise_if_failed()
            """
        )
        done = self.python(path, timeout=30)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @LINUX
    def test_what_a_dead_worker_left_ends_where_proc_is_another_namespaces(self):
        path = self.script(
            """
            import os, signal, subprocess
            from liteflow import DAG, task
            with DAG("apart") as dag:
                @task
                def leaves():
                    print(subprocess.Popen(["sleep", "30"]).pid)
                    os.kill(os.getpid(), signal.SIGKILL)
                leaves()
            if __name__ == "__main__":
                left = int(dag.run().log("leaves"))
                print(os.waitid(os.P_PID, left, os.WEXITED | os.WNOWAIT).si_status)
            """
        )
        apart = ["unshare", "-rpf"]  # by itself it does not mount its own
        try:
            subprocess.run([*apart, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("no namespaces may be made here")
        command = [*apart, sys.executable, str(path)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60)
        self.assertEqual((done.stdout, done.stderr), ("9\n", ""))

    def test_what_keeps_workers_from_beginning_is_told(self):
        path = self.script(
            """
            import resource
            def refuse(*_): raise PermissionError(1, "not permitted")
            resource.getrusage = refuse
            from liteflow import DAG, task
            with DAG("filtered") as dag:
                task(task_id="pid")(resource.getpagesize)()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        done = self.python(path, timeout=30)
        self.assertEqual(done.returncode, 2)
        self.assertRegex(
            done.stderr, r"a worker can't begin:\n(.*\n)+PermissionError: .*not permitted"
        )

    @LINUX
    def test_what_pypy_lacks(self):
        """And nothing is closed there by the last reference to it that goes."""
        path = self.script(
            """
            import gc, os, runpy, sqlite3, sys
            vars(gc).pop("freeze", None), vars(os).pop("O_ACCMODE", None)
            from liteflow import DAG, WorkerPool, task
            held, kept, connect = open(__file__), [], sqlite3.connect
            class Connection(sqlite3.Connection):
                def execute(self, *args):
                    kept.append(super().execute(*args))
                    return kept[-1]
            sqlite3.connect = lambda *args, **how: connect(*args, **how, factory=Connection)
            with DAG("pypy") as dag:
                @task
                def one(): return 1
                one()
            if __name__ == "__main__":
                with WorkerPool(1) as pool:
                    print(dag.run(executor=pool).xcom_pull("one"))
                    [slot] = pool._idle
                    shared = slot.shared
                print(shared.closed, slot.server is not None)
                sys.argv[1:] = ["list"]
                runpy.run_module("liteflow", run_name="__main__")
            """
        )
        done = self.python(path, timeout=30)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, "^1\nTrue True\nDAG ")

    def test_no_signal_of_ones_own_choice_at_the_end_of_a_pipe(self):
        path = self.script(
            """
            import fcntl, os, sys, time
            given = fcntl.fcntl
            def refuse(file, what, *value):
                if what == fcntl.F_SETSIG:
                    raise PermissionError(1, "not permitted")
                return given(file, what, *value)
            fcntl.fcntl = refuse
            from liteflow import DAG, task
            with DAG("refused") as dag:
                @task
                def sleeps(): os.write(int(sys.argv[1]), b"%d\\n" % os.getpid()); time.sleep(60)
                sleeps(); sleeps()
            if __name__ == "__main__":
                dag.run(max_workers=2, mp_context="fork")
            """
        )
        reader, writer = os.pipe()
        with open(reader) as told:
            process = self.start("-W", "ignore", path, writer, pass_fds=[writer])
            os.close(writer)
            pids = [int(told.readline()) for _ in range(2)]
            process.kill()
            process.wait()
            self.assertEqual(told.read(), "")
        self.assertTrue(wait_until(lambda: not any(map(alive, pids)), 10))

    def test_nothing_tells_of_a_process_that_its_children_do_not_keep_quiet(self):
        module = self.module(
            """
            with DAG("left") as dag:
                @task
                def dies():
                    child = os.fork()
                    if not child:
                        os.setsid(); os.close(1); os.close(2)
                        Path(os.environ["CASE_DIR"], "ready").touch()
                        time.sleep(60); os._exit(0)
                    Path(os.environ["CASE_DIR"], "child").write_text(str(child))
                    while not Path(os.environ["CASE_DIR"], "ready").exists(): time.sleep(0.001)
                    os.kill(os.getpid(), signal.SIGKILL)
                dies()
            """
        )
        for method in ("spawn", "fork"):
            with self.subTest(method=method):
                with mock.patch.object(liteflow, "_pidfd_of", side_effect=OSError):
                    run = module.dag.run(db_path=self.db, max_workers=1, mp_context=method)
                self.assertEqual(run.get_task_instance("dies").error, "killed by SIGKILL")
                (self.folder / "ready").unlink()
                os.kill(self.pid_in("child"), signal.SIGKILL)  # it was not waited for

    def test_nor_does_what_was_forked_meanwhile_and_holds_the_other_end(self):
        ended, (reader, writer) = threading.Event(), os.pipe()
        self.addCleanup(os.close, os.dup(writer))
        self.addCleanup(os.close, reader)
        with mock.patch.object(os, "pipe", lambda: (reader, writer)):
            _, teller = liteflow._end_of_child(mock.Mock(join=ended.wait))
        self.assertFalse(liteflow._is_readable(reader, 0))
        ended.set()
        teller.join()
        self.assertTrue(liteflow._is_readable(reader, 0))
        self.assertRaises(OSError, os.fstat, writer)

    def test_the_end_of_a_worker_whose_pool_was_dropped_is_told_to_nobody(self):
        ended = threading.Event()
        reader, teller = liteflow._end_of_child(mock.Mock(join=ended.wait))
        os.close(reader)
        with mock.patch.object(threading, "excepthook") as failed:
            ended.set()
            teller.join()
        failed.assert_not_called()

    def test_no_files_that_tell_of_processes(self):
        dag = self.module(
            """
            import subprocess
            with DAG("family") as dag:
                @task(execution_timeout=0.3)
                def parent():
                    children = [subprocess.Popen(["sleep", "60"], process_group=group) for group in (None, 0)]
                    print(*(child.pid for child in children), flush=True)
                    time.sleep(60)
                parent()
            """
        ).dag

        def hide(look):
            return lambda path=".": look("/nothing" if str(path).startswith("/proc") else path)

        with (
            mock.patch.object(os.path, "exists", hide(os.path.exists)),
            mock.patch.object(os, "scandir", hide(os.scandir)),
        ):
            run = dag.run(db_path=self.db, max_workers=1)
            for pid in run.log("parent").split():
                self.assertTrue(wait_until(lambda pid=pid: not alive(int(pid))), pid)

    def test_no_file_that_tells_of_a_process(self):
        child = subprocess.Popen(["sleep", "60"])
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(child.pid) == "T")
        with mock.patch.object(os.path, "exists", lambda path: False):
            self.assertFalse(liteflow._answers(child.pid))
            self.assertTrue(liteflow._answers(os.getpid()))

    def test_no_list_of_children(self):
        helper = self.helper(
            """
            import glob, subprocess
            def helped():
                subprocess.Popen(["sleep", "60"])
                glob.glob = lambda path: []
            """
        )
        dag = self.module(
            """
            with DAG("helped") as dag:
                @task
                def pid(i):
                    if i == 2: os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
                    return os.getpid()
                pid.expand(i=[1, 2, 3])
            """
        ).dag
        with WorkerPool(1, initializer=helper.helped) as pool:
            run = dag.run(db_path=self.db, executor=pool)
        first, second, third = run.xcom_pull("pid")
        self.assertEqual(first, second)
        self.assertNotEqual(second, third)  # it has left a child

    @LINUX
    def test_no_folder_for_semaphores(self):
        dag = self.module("with DAG('one') as dag:\n    task(os.getpid)()\n").dag
        none = mock.Mock(side_effect=OSError(30, "Read-only file system"))
        with (
            mock.patch.object(concurrent.futures, "ProcessPoolExecutor", none),
            mock.patch.object(os, "access", lambda path, mode: path != "/dev/shm"),
            self.assertRaisesRegex(
                UnreachableTask, "Read-only .*: multiprocessing needs a /dev/shm"
            ),
        ):
            dag.run(db_path=self.db, max_workers=1, mp_context="spawn")

    def test_no_working_directory(self):
        dag = self.module("with DAG('one') as dag:\n    task(os.getpid)()\n").dag
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
        why = FileNotFoundError(errno.ENOENT, "No usable temporary directory")
        with (
            mock.patch.object(liteflow._Slot, "_start_by", side_effect=why),
            self.assertRaisesRegex(UnreachableTask, "temporary directory$"),
        ):
            dag.run(db_path=self.db, max_workers=1, mp_context="spawn")
        self.addCleanup(os.chdir, os.getcwd())
        with tempfile.TemporaryDirectory() as gone:
            os.chdir(gone)
        with self.assertRaisesRegex(UnreachableTask, "the working directory was deleted$"):
            dag.run(db_path=self.db, max_workers=1, mp_context="spawn")

    @LINUX
    def test_no_descriptors_left_to_workers_are_told(self):
        helper = self.helper(
            """
            import select
            def refuse():
                def epoll(): raise OSError(24, "Too many open files")
                select.epoll = epoll
            """
        )
        dag = self.module("with DAG('two') as dag:\n    [task(os.getpid)() for _ in 'ab']\n").dag
        with (
            WorkerPool(2, initializer=helper.refuse) as pool,
            self.assertRaisesRegex(UnreachableTask, "a worker can't begin: .*Too many open files"),
        ):
            dag.run(db_path=self.db, executor=pool)

    @LINUX
    def test_a_worker_that_cant_become_one_says_why(self):
        none_left = mock.Mock(side_effect=OSError(24, "Too many open files"))
        dag = self.module("with DAG('one') as dag:\n    task(os.getpid)()\n").dag
        with (
            mock.patch.object(liteflow._Worker, "prepare", none_left),
            self.assertRaisesRegex(
                UnreachableTask, "(?s)a worker can't begin.*Too many open files"
            ),
        ):
            dag.run(db_path=self.db, max_workers=1, mp_context="fork")

    def test_a_worker_that_cant_open_its_log_runs_nothing(self):
        helper = self.helper(
            """
            import os
            def refuse():
                given = os.open
                def opening(path, *rest, **more):
                    if "/log-" in str(path): raise OSError(23, "Too many open files in system")
                    return given(path, *rest, **more)
                os.open = opening
            """
        )
        dag = self.module(
            "with DAG('says') as dag:\n    task(print).override(task_id='a')(1)\n"
        ).dag
        with (
            WorkerPool(1, initializer=helper.refuse) as pool,
            self.assertRaisesRegex(UnreachableTask, "a worker can't begin: .*files in system"),
        ):
            dag.run(db_path=self.db, executor=pool)  # not a success whose output is lost

    def test_no_thread_for_a_second_worker(self):
        dag = self.module("with DAG('two') as dag:\n    [task(os.getpid)() for _ in 'ab']\n").dag
        start, started = threading.Thread.start, []
        before = set(multiprocessing.active_children())  # of warm pools

        def only_one(thread):
            if type(thread).__name__ == "_ExecutorManagerThread":
                if started:
                    raise RuntimeError("can't start new thread")
                started.append(thread)
            start(thread)

        with mock.patch.object(threading.Thread, "start", only_one):
            run = dag.run(db_path=self.db, max_workers=2, mp_context="spawn")
            self.assertEqual(run.state, "success")
            why = "no worker process could be started: can't start new thread"
            with self.assertRaisesRegex(UnreachableTask, why):
                dag.run(db_path=self.db, max_workers=1, mp_context="spawn")
        for process in {*multiprocessing.active_children()} - before:
            process.join(10)  # the interpreter's end waits for it, too
            self.assertIsNotNone(process.exitcode)


class GarbledTest(Case):
    def test_what_a_task_wrote_into_its_workers_pair_ends_the_worker_alone(self):
        pieces = (), ("done", 0, "success"), 7, True  # for which marshal takes "This ...", too
        for garbled in (*map(marshal.dumps, pieces), b"words", b"?"):
            ours, theirs = map(liteflow._Wire, liteflow._socket_pair())
            self.addCleanup(ours.close)
            theirs._send(garbled, None)
            theirs.close()
            slot = object.__new__(liteflow._Slot)
            slot.gone, slot.wire = False, ours
            with mock.patch("builtins.open") as opened:  # 7 or 1: a descriptor, to be closed then
                self.assertEqual([*slot.receive()], [])
            self.assertTrue(slot.gone)
            opened.assert_not_called()

    def test_on_a_stream_nobody_waits_for_a_message_of_gigabytes(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"garbage")
            self.assertRaises(EOFError, liteflow._Wire(ours).receive)


class QueueWithSmallBuffersTest(QueueCase):
    def test_messages_as_large_as_they_get_hold_nothing_up(self):
        # The smallest buffers that still hold the largest message.
        with mock.patch.object(liteflow, "_SOCKET_BUFFER", 40_000):
            OneAtATimeTest.check_everything(self, max_workers=2)
            self.assert_nothing_left()


class KeptFileTest(QueueCase):
    """A pool keeps the file of its latest run open for the next one, and closes it at its end."""

    def setUp(self) -> None:
        super().setUp()
        self.dag = self.module("with DAG('kept') as dag:\n    task(task_id='f')(os.getpid)()").dag
        wrapped = mock.patch.object(liteflow, "_connected", wraps=liteflow._connected)
        self.connected = wrapped.start()
        self.addCleanup(wrapped.stop)

    def go(self, pool, path=None) -> int:
        """How often a run opened a file to write."""
        self.connected.reset_mock()
        run = self.dag.run(db_path=path or self.db, executor=pool)
        self.assertEqual(run.state, "success")
        return sum(call.args[1] == "mode=rw" for call in self.connected.mock_calls)

    def test_the_next_run_finds_it_open(self):
        with WorkerPool(1) as pool:
            self.assertEqual([self.go(pool) for _ in range(4)], [1, 1, 0, 0])
            self.connected.assert_not_called()  # nor to look whether it is a database of ours
            others = [self.go(pool, self.folder / "other.db") for _ in range(2)]
            self.assertEqual(others, [1, 1])  # one file at a time
            self.assert_nothing_left()
            self.assertEqual(self.go(pool), 1)
        self.assertEqual(len(self.dag.runs(self.db)), 5)
        self.assertEqual(sorted(self.folder.glob("*.db-*")), [])

    def test_a_file_that_was_replaced_is_another(self):
        with WorkerPool(1) as pool:
            self.go(pool)
            self.go(pool)
            self.db.rename(self.folder / "old.db")
            self.assertEqual(self.go(pool), 1)
            for path in (self.db, self.folder / "old.db"):
                path.unlink()
            self.assertEqual(self.go(pool), 1)
        self.assertEqual(len(self.dag.runs(self.db)), 1)
        self.assertEqual(self.query("PRAGMA integrity_check"), [("ok",)])

    def test_runs_side_by_side_leave_one_open(self):
        before = len(list(PoolTest.descriptors()))
        with WorkerPool(1) as pool:
            futures = [pool.submit(self.dag, db_path=self.db) for _ in range(8)]
            self.assertEqual({future.result(LIMIT).state for future in futures}, {"success"})
            self.assertEqual(self.go(pool), 0)
        self.assertEqual(len(list(PoolTest.descriptors())), before)
        self.assert_nothing_left()

    def test_one_whose_wal_is_large_is_closed(self):
        with mock.patch.object(liteflow, "_WAL_PAGES", 2), WorkerPool(1) as pool:
            self.go(pool)
            self.go(pool)
            self.assert_nothing_left()

    @unittest.skipUnless(hasattr(os, "fork"), "it forks")
    def test_a_process_that_is_forked_leaves_it_alone(self):
        with WorkerPool(1, "fork") as pool:
            self.go(pool)
            self.go(pool)
            if not (pid := os.fork()):
                try:
                    gc.collect()
                    # It has no workers either: it would complain at its end of not being theirs.
                    code = pool._kept_store is not None or bool(multiprocessing.active_children())
                finally:
                    os._exit(code)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
            self.assertEqual(self.go(pool), 0)
        self.assertEqual(len(self.dag.runs(self.db)), 3)

    @LINUX
    def test_a_run_that_has_ended_outlives_a_power_cut(self):
        """The file is brought up to date at first, and from then on each run's WAL is."""
        synced = []

        def fsync(number):
            synced.append(os.readlink(f"/proc/self/fd/{number}"))

        with mock.patch.object(os, "fsync", fsync), WorkerPool(1) as pool:
            self.go(pool)
            file = sqlite3.connect(f"file:{self.db}?immutable=1", uri=True)
            with contextlib.closing(file) as alone:
                rows = alone.execute("SELECT state FROM dag_run").fetchall()
            self.go(pool)
            self.go(pool)
        self.assertEqual(rows, [("success",)])
        self.assertEqual(synced, [f"{self.db}-wal"] * 2)

    def test_two_threads_may_shut_the_pool_down_at_once(self):
        pool = WorkerPool(1)
        self.go(pool)
        self.go(pool)
        close, closed = pool._kept_store.close, []

        def close_slowly():
            closed.append(1)
            time.sleep(0.1)
            close()

        pool._kept_store.close = close_slowly
        with concurrent.futures.ThreadPoolExecutor(2) as both:
            ends = [both.submit(pool.shutdown) for _ in range(2)]
        self.assertEqual([end.result() for end in ends], [None, None])
        self.assertEqual(closed, [1])


class PoolTest(QueueCase):
    def run_all(self, pool, *starts):
        """Run DAGs side by side, each once its condition holds; when each ended."""
        ended, errors, threads = {}, [], []

        def go(dag, condition) -> None:
            try:
                wait_until(condition)
                run = dag.run(db_path=self.db, executor=pool)
                failed = [(ti.task_id, ti.error) for ti in run.get_task_instances() if ti.error]
                self.assertEqual((run.state, run.reason, failed), ("success", None, []))
                ended[dag.dag_id] = time.monotonic()
            except BaseException as error:
                errors.append(error)

        for each in starts:
            threads.append(threading.Thread(target=go, args=each, daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(errors, [])
        self.assertEqual(len(ended), len(starts), "it hangs")
        return ended

    def naps(self, *makes: str):
        """DAGs made at the top of a module, where workers find them, in this order."""
        lines = "".join(f"    dags.append({make})\n" for make in makes)
        return self.module(f"{self.NAPS.rstrip()}\n    dags = []\n{lines}").dags

    def has(self, name: str):
        return (self.folder / name).exists

    NAPS = """
    F = os.environ["CASE_DIR"]
    def make(name, *seconds, then=()):
        with DAG(name) as dag:
            @task
            def nap(seconds, ti):
                Path(F, f"{name}-began").touch()
                if isinstance(seconds, str):
                    while not os.path.exists(f"{F}/{seconds}"): time.sleep(0.002)
                else: time.sleep(seconds)
                Path(F, f"{name}-{ti.task_id}").touch()
            @task
            def done(): Path(F, f"{name}-done").touch()
            naps = [nap(s) for s in seconds]
            for s in then: naps >> (naps := nap(s))
            naps >> done()
        return dag
    """

    def test_it_has_as_many_workers_as_python_is_told_that_there_are_cpus(self):
        told = mock.patch.object(os, "process_cpu_count", lambda: 5, create=True)
        with told, WorkerPool() as pool:
            self.assertEqual(pool.max_workers, 5)

    def test_a_process_that_has_got_a_dead_workers_number_is_left_alone(self):
        (only,) = self.naps("make('only', 0)")
        with WorkerPool(1) as pool:
            self.run_all(pool, (only, bool_true))
            (slot,) = pool._idle
            os.kill(slot.pid, signal.SIGKILL)
            self.assertTrue(slot.has_ended(timeout=5.0))
            other = subprocess.Popen(["sleep", "60"], start_new_session=True)
            self.addCleanup(other.wait)
            self.addCleanup(other.kill)
            slot.pid = other.pid  # as if numbers had come round while nobody looked
        self.assertIsNone(other.poll())

    def test_an_idle_slot_goes_to_who_wants_it_though_another_once_wanted_more(self):
        a, b, c = self.naps(
            "make('a', 'free')", "make('b', 0.1, 0.1, then=['c-done'])", "make('c', 0.1)"
        )

        def see_to_it() -> None:
            wait_until(self.has("b-nap__1"))
            time.sleep(0.2)  # now b wants no more
            (self.folder / "free").touch()

        with WorkerPool(2) as pool:
            self.later(see_to_it)
            self.run_all(
                pool, (a, bool_true), (b, self.has("a-began")), (c, self.has("a-done"))
            )  # b ends only after c did

    def test_a_run_gets_a_slot_although_another_always_wants_one_more(self):
        b, a, c = self.naps("make('b', 'c-done')", "make('a', *[0.02] * 30)", "make('c', 0)")
        with WorkerPool(2) as pool:
            ended = self.run_all(
                pool, (b, bool_true), (a, self.has("b-began")), (c, self.has("a-nap__3"))
            )
        self.assertLess(ended["c"], ended["a"])

    def test_a_run_that_imports_its_module_keeps_no_idle_slot_from_others(self):
        slow = self.module(
            """
            import multiprocessing
            F = os.environ["CASE_DIR"]
            if multiprocessing.parent_process() is not None:
                Path(F, "importing").touch()
                while not os.path.exists(F + "/c-done"): time.sleep(0.002)
            with DAG("slow") as dag:
                @task
                def one(): return 1
                one(); one()
            """
        ).dag
        a, c = self.naps("make('a', 'queued')", "make('c', 0)")

        def see_to_it() -> None:
            wait_until(lambda: self.has("importing")() and pool._runners and len(pool._runners) > 2)
            (self.folder / "queued").touch()

        with WorkerPool(2) as pool:
            self.later(see_to_it)
            self.run_all(
                pool, (a, bool_true), (slow, self.has("a-began")), (c, self.has("importing"))
            )

    def test_a_busy_worker_is_asked_to_leave_once(self):
        a, b, c = self.naps("make('a', 'b-began')", "make('b', 0.05)", "make('c', 0.05)")
        sent, send = collections.Counter(), liteflow._Slot.send

        def counting_send(slot, *data, **options):
            if data[0] == "leave" and slot.attempt is not None:
                sent[slot.attempt] += 1
            send(slot, *data, **options)
            if data[0] == "leave" and len(sent) == 1 and not (self.folder / "b-began").exists():
                threading.Timer(0.15, (self.folder / "b-began").touch).start()

        with mock.patch.object(liteflow._Slot, "send", counting_send), WorkerPool(1) as pool:
            began = self.has("a-began")
            self.run_all(pool, (a, bool_true), (b, began), (c, began))
        self.assertEqual(set(sent.values()), {1})

    def test_runs_in_line_sleep(self):
        dags = self.naps(*[f"make('d{i}', {0 if i else 0.6})" for i in range(3)])
        used = {}

        def run(dag, condition) -> None:
            wait_until(condition)
            before = time.thread_time()
            dag.run(db_path=self.db, executor=pool)
            used[dag.dag_id] = time.thread_time() - before

        with WorkerPool(1) as pool:
            threads = [
                threading.Thread(target=run, args=(d, self.has("d0-began") if i else bool_true))
                for i, d in enumerate(dags)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        self.assertEqual(len(used), 3)
        for name, seconds in used.items():
            self.assertLess(seconds, 0.15, name)  # a storm uses half of 0.6 s

    def test_three_runs_share_a_pool_fairly(self):
        def check(workers) -> None:
            dags = made[3 * workers - 3 :][:3]
            with WorkerPool(workers) as pool:
                ended = self.run_all(pool, *[(d, bool_true) for d in dags])
            self.assertEqual(len(ended), 3)
            rows = self.query(
                "SELECT dag_id, a.start_date FROM task_attempt a JOIN task_instance i ON "
                "i.id = a.task_instance_id JOIN dag_run r ON r.id = i.dag_run_id "
                "WHERE dag_id LIKE ? AND task_id LIKE 'nap%' ORDER BY a.start_date",
                f"r{workers}%",
            )
            order = [dag_id for dag_id, _ in rows]
            # When the first is through, the others have done much of theirs.
            through = min(len(order) - order[::-1].index(name) for name in set(order))
            done = collections.Counter(order[:through])
            self.assertEqual(len(done), 3, done)
            self.assertGreater(min(done.values()), 2, done)

        made = self.naps(*[f"make('r{w}{i}', *[0.005] * 18)" for w in (1, 2) for i in range(3)])
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            list(threads.map(check, (1, 2)))

    def test_endless_quick_jobs_keep_nobody_out(self):
        module = self.module(
            """
            F = os.environ["CASE_DIR"]
            with DAG("quick", max_active_tasks=50) as quick:
                @task
                def nothing(i): Path(F, "began").touch() if i == 50 else None
                @task
                def ends(xs): Path(F, "ended").touch()
                ends(nothing.expand(i=list(range(2000))))
            with DAG("other") as other:
                @task
                def link(x): return [*x, os.path.exists(F + "/ended")]
                x = []
                for _ in range(3): x = link(x)
            """
        )
        for workers in (1, 2):
            with self.subTest(workers=workers), WorkerPool(workers) as pool:
                for name in ("began", "ended"):
                    (self.folder / name).unlink(missing_ok=True)
                self.run_all(pool, (module.quick, bool_true), (module.other, self.has("began")))
                run = module.other.runs(self.db)[0]
                self.assertEqual(run.xcom_pull("link__2"), [False] * 3)

    def test_a_worker_keeps_nothing_of_runs_that_are_over(self):
        module = self.module(
            """
            import gc
            def make(name):
                with DAG(name) as dag:
                    @task
                    def count(wait):
                        time.sleep(wait); gc.collect()
                        return sum(type(o) is liteflow._WorkerRun for o in gc.get_objects())
                    for i in range(3): count(0.02)
                return dag
            dags = [make(f"d{i}") for i in range(3)]
            """
        )
        with WorkerPool(2) as pool:
            for _ in range(2):
                self.run_all(pool, *[(d, bool_true) for d in module.dags])
        counts = {x.value for d in module.dags for run in d.runs(self.db) for x in run.xcoms()}
        self.assertEqual(counts, {1})

    def test_what_a_failed_task_had_in_memory_goes_with_it_not_with_the_next_collection(self):
        module = self.module(
            """
            import gc
            class Table(list): pass
            def tell(context): raise LookupError(context["exception"])
            class Load(BaseOperator):
                def execute(self, context):
                    table = Table()
                    raise ValueError(context["ti"].xcom_pull("none"))
            with DAG("fails", default_args={"retries": 1, "on_failure_callback": tell}) as dag:
                @task
                def begin(): gc.collect(), gc.disable()
                @task
                def load(ti=None, **context):
                    table = Table()
                    raise ValueError
                @task(on_failure_callback=None)
                def skip():
                    table = Table()
                    raise AirflowSkipException
                @task
                async def wait():
                    table = Table()
                    try:
                        raise ValueError
                    except ValueError as error:
                        kept = error
                        raise
                @task(trigger_rule="all_done")
                def count():
                    kept = sum(type(o) in (Table, liteflow._Execution) for o in gc.get_objects())
                    gc.enable()
                    return kept
                begin() >> [load(), skip(), wait(), Load(task_id="operator")] >> count()
            """
        )
        with WorkerPool(1) as pool, concurrent.futures.ThreadPoolExecutor(1) as threads:
            for options in {"executor": pool}, {"executor": threads}, None:
                with self.subTest(options=options), contextlib.redirect_stderr(io.StringIO()):
                    run = module.dag.run(db_path=self.db, **options) if options else None
                    run = run or module.dag.test(db_path=self.db)
                    self.assertLessEqual(run.xcom_pull("count"), 2)  # its own, and the last one

    def test_a_coroutine_or_generator_that_serves_other_tasks_outlives_the_failure_of_one(self):
        module = self.module(
            """
            import asyncio
            loop, queue, actors = asyncio.new_event_loop(), asyncio.Queue(), []
            async def actor():
                while True:
                    item, answer = await queue.get()
                    try:
                        answer.set_result(10 // item)
                    except Exception as error:
                        answer.set_exception(error)
            async def ask(item):
                if not actors: actors.append(asyncio.create_task(actor()))
                answer = loop.create_future()
                await queue.put((item, answer))
                return await asyncio.wait_for(answer, 1)
            def divided():
                answer = None
                while True:
                    item = yield answer
                    try:
                        answer = 10 // item
                    except Exception as error:
                        answer = error
            divides = divided()
            next(divides)
            def divide(item):
                answer = divides.send(item)
                if isinstance(answer, Exception): raise answer
                return answer
            with DAG("serves") as dag:
                @task
                def by(item): return loop.run_until_complete(ask(item)) + divide(item)
                @task
                def fails(): divide(0)
                by(0) >> fails() >> task(task_id="next", trigger_rule="all_done")(by.function)(5)
            """
        )
        with contextlib.redirect_stderr(io.StringIO()):
            run = module.dag.test(db_path=self.db)
        module.loop.close()
        self.assertEqual(run.xcom_pull("next"), 4)

    def test_a_warm_worker_survives_a_large_answer_before_its_next_run_is_recorded(self):
        # 100 kB of task ids go as a file; the folder of the run before is gone.
        module = self.module(
            """
            @task
            def nothing(): pass
            def make(name, ids):
                with DAG(name) as dag:
                    for task_id in ids: nothing.override(task_id=task_id)()
                return dag
            """
        )
        with WorkerPool(1) as pool:
            module.make("small", ["a"]).run(db_path=self.db, executor=pool)
            first = [slot.pid for slot in pool._idle]
            ids = [f"{i:03}_{'x' * 240}" for i in range(400)]
            module.make("large", ids).run(db_path=self.db, executor=pool)
            self.assertEqual([slot.pid for slot in pool._idle], first)

    def test_a_job_wakes_one_of_many_idle_workers(self):
        module = self.module(
            """
            F = os.environ["CASE_DIR"]
            with DAG("wide") as dag:
                @task
                def meet(i):
                    Path(F, f"pid-{os.getpid()}").touch()
                    while len(list(Path(F).glob("pid-*"))) < 6: time.sleep(0.002)
                @task
                def link(x): time.sleep(0.003); return x + 1
                met = [meet(i) for i in range(6)]
                x = 0
                for i in range(40):
                    x = link(x)
                    if not i: met >> x
                @task
                def switches(x):
                    found = 0
                    for p in Path(F).glob("pid-*"):
                        text = Path("/proc", p.name[4:], "status").read_text()
                        found += int(text.partition("\\nvoluntary_ctxt_switches:")[2].split()[0])
                    return found
                before = switches(1); met >> before >> x.operator.upstream_list[0]
                switches(x)
            """
        )
        with WorkerPool(6) as pool:
            run = module.dag.run(db_path=self.db, executor=pool)
        extra = run.xcom_pull("switches__1") - run.xcom_pull("switches")
        # Some four for each job in the one that runs it; if all were woken, five more each.
        self.assertLess(extra, 40 * 7)

    def test_a_pool_that_once_had_few_files_has_all_its_workers_later(self):
        script = self.script(
            """
            import os, resource, sys, threading
            from liteflow import *
            with DAG("few") as dag:
                @task
                def f(i): return os.getpid()
                f.expand(i=[1])
            listdir = os.listdir
            def hide(path="."):  # there is no /proc on macOS
                return listdir("/nothing" if str(path).startswith("/proc") else path)
            os.listdir = hide
            if __name__ == "__main__":
                resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
                files = [open(os.devnull) for _ in range(180)]
                with WorkerPool(8) as pool:
                    dag.run(executor=pool)
                    few = pool._most
                    while files: files.pop().close()
                    dag.run(executor=pool)
                    print(few < 8, pool._most)
            """
        )
        done = self.python(script)
        self.assertEqual(done.stdout, "True 8\n", done.stderr)

    def test_with_few_files_there_are_fewer_workers_and_it_says_so(self):
        script = self.script(
            """
            import os, resource, sys
            from liteflow import *
            with DAG("few", max_active_tasks=100) as dag:
                @task
                def f(i): return os.getpid()
                for i in range(80): f(i)
            if __name__ == "__main__":
                resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
                with WorkerPool(40) as pool:
                    run = dag.run(executor=pool, progress=True)
                print(run.state, len({x.value for x in run.xcoms()}) < 40)
            """
        )
        done = self.python(script)
        self.assertEqual(done.stdout, "success True\n", done.stderr)
        self.assertRegex(done.stderr, r"\d+ of 40 workers fit into the limit of open files")

    def test_a_task_that_leaves_no_descriptor_tells_how_it_failed(self):
        script = self.script(
            """
            import os, resource
            from liteflow import *
            files = []
            with DAG("leaks") as dag:
                @task
                def leak():
                    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
                    while True:
                        files.append(os.open(os.devnull, os.O_RDONLY))
                leak()
            if __name__ == "__main__":
                with WorkerPool(1) as pool:
                    print(dag.run(executor=pool).get_task_instances()[0].error)
            """
        )
        done = self.python(script)
        said = r"Traceback.*\n  File .*, line \d+, in leak\n(.|\n)*OSError: .*open files: '/dev/null'\n"
        self.assertRegex(done.stdout, f"^{said}$", done.stderr)

    def test_nothing_is_left_of_runs_and_their_pools(self):
        module = self.module(EVERYTHING)
        small = self.module("with DAG('small') as dag:\n    task(print)()\n").dag

        def files():
            return sorted(os.readlink(f"/proc/self/fd/{n}") for n in self.descriptors())

        for options in ({}, {"mp_context": "fork"}, {"mp_context": "spawn"}):
            with self.subTest(**options):
                with WorkerPool(2, **options) as pool:  # what a first one leaves: the fork server
                    small.run(db_path=self.db, executor=pool)
                before, threads = files(), set(threading.enumerate())
                with WorkerPool(2, **options) as pool:
                    module.dag.run(db_path=self.db, executor=pool)
                    pids = [slot.pid for slot in pool._idle]
                self.assertEqual(files(), before)
                self.assertEqual(set(threading.enumerate()), threads)
                self.assertEqual([pid for pid in pids if alive(pid)], [])
                self.assert_nothing_left()
                (self.folder / "seen").unlink()

    @staticmethod
    def descriptors():
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                os.fstat(int(name))
                yield name

    def test_a_pool_that_is_shut_down_ends_its_runs(self):
        module = self.module(
            """
            F = os.environ["CASE_DIR"]
            with DAG("long") as dag:
                @task
                def quick(i): return i
                @task
                def long(): Path(F, "pid.part").write_text(str(os.getpid())); os.rename(
                    F + "/pid.part", F + "/pid"); time.sleep(60)
                long(); [quick(i) for i in range(500)]
            """
        )
        with WorkerPool(2) as pool:
            self.later(lambda: (self.pid_in("pid"), pool.shutdown()))
            with self.assertRaisesRegex(RuntimeError, "shut down"):
                module.dag.run(db_path=self.db, executor=pool)
        pid = self.pid_in("pid")
        self.assertTrue(wait_until(lambda: not alive(pid)))
        self.assert_nothing_left()

    def test_threads_that_start_workers_at_once_leave_the_process_as_it_was(self):
        config, allowed = multiprocessing.current_process()._config, []

        def start(_):
            with liteflow._allowed_to_start(multiprocessing.get_context("fork")):
                for _ in range(20):
                    allowed.append("daemon" not in config)
                    time.sleep(0.005)

        before = [*warnings.filters]
        with mock.patch.dict(config, daemon=True):
            with concurrent.futures.ThreadPoolExecutor(2) as both:
                ends = [both.submit(start, time.sleep(0.05 * n)) for n in range(2)]
            self.assertEqual([end.result() for end in ends], [None, None])
            self.assertTrue(config["daemon"])
        self.assertEqual([*warnings.filters], before)
        self.assertTrue(all(allowed))


def bool_true() -> bool:
    return True


class OutputTest(QueueCase):
    def test_a_task_that_cuts_its_output_and_prints_more_than_there_was_keeps_it(self):
        run = self.run_flow(
            """
            with DAG("cut") as dag:
                @task
                def says(): print("as long as this")
                @task
                def cuts(x): os.ftruncate(1, 0); print("and this is longer than that")
                @task
                def after(x): print("the next one")
                after(cuts(says()))
            """,
            executor=self.enterContext(WorkerPool(1)),
        )
        logs = [run.log(name) for name in ("says", "cuts", "after")]
        wanted = ["as long as this\n", "and this is longer than that\n", "the next one\n"]
        self.assertEqual(logs, wanted)

    def test_who_follows_reads_the_ends_of_long_logs_once(self):
        self.run_flow(
            """
            with DAG("long") as dag:
                @task
                def prints(): print("." * 600_000 + "the end")
                prints()
            """
        )
        alive = mock.PropertyMock(side_effect=[True, True, False])
        whole, seen = liteflow._select_log, []

        def look(*of, **which):
            found = whole(*of, **which)
            seen.append([row.part for row in found])
            return found

        with (
            mock.patch.object(liteflow.DagRun, "owner_alive", alive),
            mock.patch.object(liteflow, "_select_log", look),
            mock.patch.object(liteflow, "_POLL", 0),
        ):
            done = self.cli_here("logs", "long", "--follow", "--db", self.db)
        self.assertTrue(done.stdout.endswith("the end\n"), done.stdout[-100:])
        self.assertEqual(seen, [[1], [], [liteflow._TAIL_PART]])

    def test_a_log_file_that_is_cut_while_its_task_runs_loses_only_the_middle(self):
        module = self.module(
            """
            with DAG("long", max_active_tasks=1) as dag:
                @task
                def prints():
                    for i in range(300_000): print("line", i)
                    deadline = time.monotonic() + 20
                    while not (Path(os.environ["CASE_DIR"]) / "go").exists():
                        if time.monotonic() > deadline: raise TimeoutError
                        time.sleep(0.01)
                    print("the end")
                @task
                def after(x): print("the next one")
                after(prints())
            """
        )
        cut, tail = [], liteflow._SlotLog._tail

        def tailed(log, size):
            found = tail(log, size)
            if log._at == 0:  # it has been cut
                cut.append((self.folder / "go").touch())
            return found

        with (
            mock.patch.object(liteflow, "_LOG_FILE_LIMIT", 100_000),
            mock.patch.object(liteflow._SlotLog, "_tail", tailed),
            WorkerPool(1) as workers,
        ):
            run = module.dag.run(db_path=self.db, executor=workers)
        self.assertTrue(cut)
        self.assertRegex(run.log("prints"), r"(?s)\Aline 0\n.*bytes cut.*\nthe end\n\Z")
        self.assertEqual(run.log("after"), "the next one\n")

    def test_a_task_that_cuts_the_file_and_prints_as_much_as_the_one_before(self):
        module = self.module(
            """
            with DAG("same") as dag:
                @task
                def cuts(i, before=None): os.ftruncate(1, 0); print("cuts", i)
                @task
                def silent(before): pass
                silent(cuts(2, cuts(1)))
            """
        )
        run = module.dag.run(db_path=self.db, max_workers=1)
        logs = [run.log(task_id) for task_id in ("cuts", "cuts__1", "silent")]
        self.assertEqual(logs, ["cuts 1\n", "cuts 2\n", ""])

    def test_quick_tasks_that_print_much_or_truncate_their_output_keep_their_logs_apart(self):
        module = self.module(
            """
            with DAG("loud", max_active_tasks=100) as dag:
                @task
                def quick(i): print("quick", i)
                @task
                def cuts(i): print("gone"); os.ftruncate(1, 0); print("cuts", i)
                @task
                def loud():
                    for i in range(50): os.write(1, b"x" * 999_999 + b"\\n")
                for i in range(40):
                    quick(i)
                    if i % 4 == 0: cuts(i)
                    if i == 20: loud()
            """
        )
        with WorkerPool(2) as pool:
            run = module.dag.run(db_path=self.db, executor=pool)
        self.assertEqual(run.state, "success")
        for ti in run.get_task_instances():
            log = run.log(ti.task_id)
            if ti.task_id.startswith("quick"):
                self.assertRegex(log, r"\Aquick \d+\n\Z", ti.task_id)
            elif ti.task_id.startswith("cuts"):
                self.assertRegex(log, r"\A(gone\n)?cuts \d+\n\Z", ti.task_id)
            else:
                self.assertRegex(log, r"(?s)\Ax{9}.*bytes cut.*x{9}\n\Z")


@unittest.skipUnless(SOAK, "LITEFLOW_SOAK=1")
class PullSoakTest(QueueCase):
    def test_random_deaths_and_stops_under_two_runs_that_share_a_pool(self):
        seed = int(os.environ.get("LITEFLOW_SEED") or random.randrange(10**9))
        print(f"seed {seed}", file=sys.stderr)
        module = self.module(
            """
            import random
            F = os.environ["CASE_DIR"]
            lines = os.open(F + "/lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            def make(name):
                with DAG(name, max_active_tasks=100) as dag:
                    @task(retries=50, retry_delay=0)
                    def work(i, ti):
                        what = f"{name} {ti.task_id} {ti.try_number} {os.getpid()}\\n"
                        os.write(lines, f"start {what}".encode())
                        seconds = (0, 0, 0, 0.002, 0.05, 0.3)[hash((name, i)) % 6]
                        if seconds: time.sleep(seconds)
                        os.write(lines, f"end {what}".encode())
                        return b"x" * (0, 10, 5000, 100_000)[i % 4]
                    @task(retries=50, retry_delay=0)
                    def after(x, ti):
                        what = f"{name} {ti.task_id} {ti.try_number} {os.getpid()}\\n"
                        os.write(lines, f"start {what}end {what}".encode())
                    for i in range(400):
                        x = work(i)
                        if i % 5 == 0: after(x)
                return dag
            dags = [make("one"), make("two")]
            """
        )
        over, rng, hits = threading.Event(), random.Random(seed), collections.Counter()

        def harass() -> None:
            for _ in range(int(os.environ.get("LITEFLOW_HITS", "200"))):
                slots = [s for s in liteflow._live_slots if s.served]
                number = rng.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT])
                for slot in rng.sample(slots, min(1, len(slots))):
                    with contextlib.suppress(OSError, TypeError):
                        signal.pidfd_send_signal(slot.pidfd, number)
                        hits[number] += 1
                if over.wait(rng.random() * 0.06):
                    break
            while not over.wait(0.05):
                for slot in list(liteflow._live_slots):
                    with contextlib.suppress(OSError, TypeError):
                        signal.pidfd_send_signal(slot.pidfd, signal.SIGCONT)

        states, errors = {}, []

        def go(dag) -> None:
            try:
                states[dag.dag_id] = dag.run(db_path=self.db, executor=pool).state
            except BaseException as error:
                errors.append("".join(traceback.format_exception(error)))

        with WorkerPool(4) as pool:
            runs = [threading.Thread(target=go, args=(d,), daemon=True) for d in module.dags]
            for thread in runs:
                thread.start()
            nemesis = self.later(harass)
            for thread in runs:
                thread.join(120)
            over.set()
            nemesis.join()
            print(dict(hits), states, errors, file=sys.stderr)
        self.assertEqual(errors, [], *errors)
        self.assertEqual(states, {"one": "success", "two": "success"})
        starts, ends, running = set(), set(), {}
        attempts = {
            (dag_id, task_id, number): (pid, state)
            for dag_id, task_id, number, pid, state in self.query(
                "SELECT dag_id, task_id, a.try_number, pid, a.state FROM task_attempt a JOIN "
                "task_instance i ON i.id = a.task_instance_id JOIN dag_run r "
                "ON r.id = i.dag_run_id"
            )
        }
        for what, dag_id, task_id, number, pid in self.lines():
            key = dag_id, task_id, int(number)
            self.assertIn(key, attempts)
            self.assertEqual(attempts[key][0], int(pid), key)
            if what == "start":
                self.assertNotIn(key, starts, "started twice in one try")
                starts.add(key)
                other = running.get((dag_id, task_id))
                self.assertTrue(other is None or int(other[1]) != int(pid))
                running[dag_id, task_id] = (key, pid)
            else:
                self.assertEqual(running.pop((dag_id, task_id))[0], key, "ended after the next")
                ends.add(key)
        for key, (_, state) in attempts.items():
            self.assertTrue(state != "success" or key in ends, key)
        best = {key[:2] for key, (_, state) in attempts.items() if state == "success"}
        self.assertEqual(len(best), 2 * 480)


class CallbacksTest(Case):
    SOURCE = """
        def note(kind):
            def callback(context):
                ti, error = context["ti"], context.get("exception")
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f:
                    f.write(f"{ti.task_id} {kind} {ti.try_number} {type(error).__name__} {str(error)[:20]}" + chr(10))
            return callback
        def broken(context): print("in the callback"); raise ValueError("callback")
        ALL = {f"on_{k}_callback": note(k) for k in ("execute", "success", "retry", "failure", "skipped")}
        def of_dag(context):
            with open(os.environ["CASE_DIR"] + "/notes", "a") as f:
                f.write(f"dag {context['reason']} {context['ti'].task_id} {context['run_id'] == context['dag_run'].run_id} {context['dag_run']}" + chr(10))
        with DAG("callbacks", default_args=ALL, on_failure_callback=of_dag, on_success_callback=[of_dag]) as dag:
            @task
            def fine(): return 1
            @task(retries=1, on_failure_callback=[broken, note("failure")])
            def fails(): raise KeyError("mine")
            @task
            def skips(): raise AirflowSkipException("no")
            @task
            def below(x): pass
            @task
            def killed(): os.kill(os.getpid(), signal.SIGKILL)
            @task(execution_timeout=0.3)
            def hangs():
                try: time.sleep(60)
                finally: pass
            fine(); below(fails()); skips(); killed(); hangs()
            EmptyOperator(task_id="empty")
    """

    def test_a_callback_that_another_worker_calls_knows_when_and_how_its_task_ended(self):
        run = self.run_flow(
            """
            def tell(context):
                ti = context["ti"]
                print(f"told {ti.state} {ti.start_date.isoformat()} {ti.duration}")
            with DAG("died", on_failure_callback=tell) as dag:
                @task(on_failure_callback=tell)
                def killed(): time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)
                killed()
            """
        )
        [ti] = run.get_task_instances()
        told = f"told failed {ti.start_date.isoformat()} {ti.duration}"
        lines = run.log("killed").splitlines()
        self.assertEqual([x for x in lines if x.startswith("told")], [told, told])

    def test_a_run_that_an_error_of_its_own_ends_calls_the_dags_callback(self):
        module = self.module(
            """
            def tell(context):
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f:
                    f.write(f"{context['reason']} {context['dag_run'].state}\\n")
            with DAG("cut", on_failure_callback=tell) as dag:
                @task
                def quick(): pass
                @task
                def lasts(): time.sleep(600)
                quick(), lasts()
            with DAG("here", on_failure_callback=tell) as here:
                quick()
            """
        )

        def full(store, batch, *check):
            if any(attempt.state == "success" for attempt in batch.attempts):
                raise error("no room")
            record(store, batch, *check)

        record = liteflow._Store.record
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for error, run in (
                (liteflow.DatabaseError, functools.partial(module.dag.run, max_workers=2)),
                (RuntimeError, functools.partial(module.dag.run, mp_context="forkserver")),
                (KeyboardInterrupt, module.here.test),
                (OSError, functools.partial(module.here.run, executor=threads)),
            ):
                with (
                    self.subTest(error),
                    mock.patch.object(liteflow._Store, "record", full),
                    self.assertRaises(error),
                ):
                    run(db_path=self.db)
                told, name = (self.folder / "notes").read_text(), error.__name__
                self.assertEqual(told.splitlines()[-1], f"{name}: no room failed")
                (self.folder / "notes").unlink()
        runs = [run for dag in (module.dag, module.here) for run in dag.runs(self.db)]
        states = {ti.state for run in runs for ti in run.get_task_instances()}
        self.assertEqual(states, {None})
        self.assert_nothing_left()

    def test_an_error_before_the_first_job_or_while_a_worker_waits_for_word_ends_the_run(self):
        """Of a worker that can't work yet, or waits for a word that will not come, nothing comes:
        neither may be waited for."""
        module = self.module(
            """
            def tell(context):
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f:
                    f.write(f"{context['reason']}\\n")
            with DAG("cut", on_failure_callback=tell) as dag:
                @task(execution_timeout=600)
                def held(): pass
                held()
            """
        )

        def run(progress):
            try:
                module.dag.run(db_path=self.db, max_workers=1, progress=progress)
            except LookupError as error:
                raised.append(str(error))

        def first(line):
            raise LookupError("first")

        def later(line):
            if "success" in line:
                raise LookupError("later")

        raised = []
        for progress in first, later:
            thread = threading.Thread(target=run, args=(progress,), daemon=True)
            thread.start()
            thread.join(LIMIT)
        self.assertEqual(raised, ["first", "later"])
        told = (self.folder / "notes").read_text()
        self.assertEqual(told, "LookupError: first\nLookupError: later\n")
        self.assert_nothing_left()

    def test_a_callback_of_the_dag_knows_when_the_run_ended(self):
        for state in ("success", "failed"):
            run = self.run_flow(
                f"""
                def tell(context):
                    run = context["dag_run"]
                    print("told", run.state, (run.end_date - run.start_date).total_seconds(), run.duration)
                with DAG("ends", on_success_callback=tell, on_failure_callback=tell) as dag:
                    @task
                    def works():
                        if {state!r} == "failed": raise ValueError("no")
                    works()
                """
            )
            told = f"told {state} {(run.end_date - run.start_date).total_seconds()} {run.duration}"
            self.assertIn(told, run.log("works"))

    def test_a_callback_tells_how_the_log_is_read(self):
        run = self.run_flow(
            """
            def tell(context): (Path(os.environ["CASE_DIR"]) / "told").write_text(context["ti"].log_url)
            with DAG("alert") as dag:
                @task(on_failure_callback=tell)
                def fails(): print("it said this"); 1 / 0
                fails()
            """
        )
        command = (self.folder / "told").read_text()
        self.assertEqual(command, run.get_task_instance("fails").log_url)
        done = subprocess.run(["bash", "-c", command], cwd="/", capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, "it said this\n"), done.stderr)

    def test_a_worker_that_ends_where_no_callback_is_due_is_not_laid_at_ones_door(self):
        lines = []
        run = self.run_flow(
            """
            import threading
            class Slow:
                flushed = 0
                def write(self, text): pass
                def flush(self):  # a second time once its output has been looked at
                    Slow.flushed += 1
                    if Slow.flushed > 1: time.sleep(20)
            def end():
                while Slow.flushed < 2: time.sleep(0.01)
                os._exit(3)
            with DAG("ends") as dag:
                @task
                def printed_for_a_while():
                    time.sleep(0.3)
                    sys.stdout = Slow()
                    threading.Thread(target=end).start()
                printed_for_a_while()
            """,
            max_workers=1,
            progress=lines.append,
        )
        self.assertEqual((run.state, [x for x in lines if "callback" in str(x)]), ("success", []))

    def test_a_callback_that_a_foreign_executor_takes_not_or_loses_is_told_once(self):
        class Broken(concurrent.futures.ThreadPoolExecutor):
            def submit(self, run, info, message):
                if marshal.loads(message)[0] != "call":
                    return super().submit(run, info, message)
                if self.is_broken:
                    raise RuntimeError("it is broken")
                return super().submit(lambda: 1 / 0)

        module = self.module(
            """
            with DAG("broken") as dag:
                for i in range(2): task(task_id=f"f{i}", on_success_callback=print)(print)()
            """
        )
        for is_broken, told in (
            (True, "the executor took no callback: RuntimeError: it is broken"),
            (False, "the executor lost a callback: ZeroDivisionError: division by zero"),
        ):
            lines = []
            with Broken(1) as executor:
                executor.is_broken = is_broken
                run = module.dag.run(db_path=self.db, executor=executor, progress=lines.append)
            self.assertEqual(run.state, "success")
            self.assertEqual([x for x in lines if "callback" in str(x)], [told])

    def test_what_it_prints_after_much_output_is_kept(self):
        # The worker's log is so long that it begins anew.
        run = self.run_flow(
            """
            with DAG("loud") as dag:
                @task(on_success_callback=lambda context: print("called back"))
                def loud(): print("x" * 2_000_000)
                loud() >> task(print)("next")
            """,
            max_workers=1,
        )
        self.assertIn("called back", run.log("loud"))
        self.assertEqual(run.log("print"), "next\n")

    def test_callbacks_are_heard_whatever_their_task_did_to_its_streams(self):
        run = self.run_flow(
            """
            def heard(context): print("heard"); raise ValueError("mine")
            def second(context): print("second")
            with DAG("streams") as dag:
                @task(on_success_callback=[heard, second])
                def f(how): exec(how)
                f.expand(how=[
                    "sys.stdout = sys.stderr = None",
                    "sys.stdout.close(); sys.stderr.close()",
                    "os.close(1); os.close(2)",
                ])
            """,
            max_workers=1,
        )
        for i in range(3):
            self.assertRegex(run.log("f", i), "(?s)^heard\n.*: mine.*\nsecond\n$")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs Linux")
    def test_one_whose_failure_can_not_be_printed_keeps_none_from_being_called(self):
        run = self.run_flow(
            """
            def closes(context): sys.stderr.close(); raise ValueError("mine")
            def fills(context):
                with open("/dev/full", "w") as full: os.dup2(full.fileno(), 2)
                raise ValueError("lost")
            def pushes(context):
                sys.stderr.close()
                context["ti"].xcom_push("late", 1)
                second(context)
            def second(context): Path(os.environ["CASE_DIR"], context["ti"].task_id).touch()
            with DAG("unprinted") as dag:
                task(task_id="closed", on_success_callback=[closes, second])(print)()
                task(task_id="full", on_success_callback=[fills, second])(print)()
                task(task_id="pushed", on_success_callback=pushes)(print)()
            """
        )
        for name in ("closed", "full", "pushed"):
            self.assertTrue((self.folder / name).exists(), name)
        self.assertIn("of task 'closed' failed: ValueError: mine", run.log("closed"))

    def test_one_that_raises_what_is_no_exception_ends_neither_its_task_nor_its_worker(self):
        run = self.run_flow(
            """
            import asyncio
            def cancelled(context): raise asyncio.CancelledError("gone")
            def second(context): print("second")
            ALL = {f"on_{kind}_callback": [cancelled, second] for kind in ("execute", "success")}
            with DAG("cancelled") as dag:
                @task(**ALL)
                def f(): return os.getpid()
                f() >> task(os.getpid, task_id="g")()
            """,
            max_workers=1,
        )
        self.assertEqual(run.xcom_pull("f"), run.xcom_pull("g"))
        self.assertEqual(run.log("f").count("CancelledError: gone ("), 2)
        self.assertEqual(run.log("f").count("second\n"), 2)

    def test_an_interrupt_in_one_ends_a_test_of_the_dag(self):
        def interrupts(context):
            raise KeyboardInterrupt

        def flow(name):
            with DAG("d") as d:
                made = task(task_id="a", on_success_callback=interrupts)(quiet)()
                task(task_id="last")(quiet)(task(task_id=name)(quiet)(made))
            return d

        with self.assertRaises(KeyboardInterrupt):
            flow("b").test(db_path=self.db)
        [run] = Dag("d").runs(self.db)
        states = {"a": "success", "b": None, "last": None}
        self.assertEqual((self.states(run), run.state), (states, "failed"))
        for name, said in (("b", "not run"), ("new", "not there")):
            done = self.cli_here("--task", "last", "--db", self.db, main=flow(name).cli)
            self.assertIn(f"{name!r}, whose result 'last' takes, is {said} in run", done.stderr)
        for command, name, said in (
            ("page", "run.html", "no state</span>"),
            ("visualize", "run.md", "ms, KeyboardInterrupt:"),
        ):
            self.cli_here(command, run.run_id, "--db", self.db, "--output", name)
            self.assertIn(said, (self.folder / name).read_text())

    def test_an_xcom_that_comes_too_late_is_not_lost_without_a_word(self):
        run = self.run_flow(
            """
            def push(context):
                context["ti"].xcom_push("by callback", 1)
                print("told")
            with DAG("late") as dag:
                @task(on_execute_callback=push)
                def before(): pass
                @task(on_success_callback=push)
                def after(): pass
                before(); after()
            """
        )
        self.assertEqual([x.task_id for x in run.xcoms()], ["before"])
        lost = "liteflow: task 'after' has ended: what its callback pushes for 'by callback' is "
        self.assertEqual(sorted(run.log("after").splitlines()), [f"{lost}not stored", "told"])

    def test_a_retry_waits_for_its_own_callback_alone(self):
        run = self.run_flow(
            """
            def called(context): time.sleep(0.01)
            calls = {"on_success_callback": called, "on_retry_callback": called}
            with DAG("calls", default_args=calls) as dag:
                @task(retries=1, priority_weight=1000)
                def flaky(ti):
                    if ti.try_number == 1: raise ValueError
                @task
                def one(x): pass
                flaky()
                one.expand(x=list(range(80)))
            """,
            max_workers=2,
        )
        # Not behind all others, as it was.
        others = [ti.start_date for ti in run.get_task_instances() if ti.task_id == "one"]
        again = run.get_task_instance("flaky").start_date
        self.assertGreater(sum(other > again for other in others), 20)

    def test_what_follows_a_callback_does_not_wait_for_the_next_look_around(self):
        module = self.module(
            """
            calls = {"on_success_callback": print, "on_retry_callback": print}
            with DAG("calls", default_args=calls) as dag:
                @task(retries=1)
                def flaky(ti):
                    if ti.try_number == 1: raise ValueError
                flaky()
            """
        )
        began = time.monotonic()
        with (
            mock.patch.object(liteflow, "_GLANCE", 20.0),
            concurrent.futures.ThreadPoolExecutor(1) as threads,
        ):
            for executor in (pool(), threads):
                run = module.dag.run(db_path=self.db, executor=executor)
                self.assertEqual((run.state, self.states(run)), ("success", {"flaky": "success"}))
        self.assertLess(time.monotonic() - began, 19)

    def test_what_goes_wrong_with_a_callback_of_the_dag_leaves_its_run_as_it_ended(self):
        source = """
            with DAG("told", on_success_callback=lambda context: print("told")) as dag:
                task(print)("done")
        """
        real, told = liteflow._Store.record, []

        def record(store, batch, *check):
            if not store.owner:  # the run has ended
                raise DatabaseError("the disk is full")
            real(store, batch, *check)

        with mock.patch.object(liteflow._Store, "record", record):
            run = self.run_flow(source, progress=told.append)
        self.assertEqual(run.state, "success")
        self.assertIn("the disk is full", told[-2])
        broken = mock.Mock(side_effect=liteflow.UnreachableTask("no worker"))
        with mock.patch.object(liteflow._SlotRunner, "call_back", broken):
            run = self.run_flow(source, progress=told.append)
        self.assertEqual(run.state, "success")
        self.assertIn("no worker", told[-2])
        self.assertIn("run success", told[-1])

    def test_order_and_cases(self):
        run = self.run_flow(self.SOURCE)
        notes = (self.folder / "notes").read_text().splitlines()
        by_task = {}
        for line in notes:
            by_task.setdefault(line.split()[0], []).append(line.split(maxsplit=1)[1])
        self.assertEqual(by_task["fine"], ["execute 1 NoneType None", "success 1 NoneType None"])
        self.assertEqual(
            by_task["fails"],
            [
                "execute 1 NoneType None",
                "retry 1 KeyError 'mine'",
                "execute 2 NoneType None",
                "failure 2 KeyError 'mine'",
            ],
        )
        self.assertEqual(by_task["skips"][-1], "skipped 1 NoneType None")
        self.assertEqual(by_task["killed"][-1], "failure 1 AirflowException killed by SIGKILL")
        self.assertTrue(
            by_task["hangs"][-1].startswith("failure 1 AirflowTaskTimeout timeout after 0.3")
        )
        self.assertEqual([line.split()[0] for line in by_task["empty"]], ["execute", "success"])
        self.assertNotIn("below", by_task)
        self.assertEqual(len(by_task["dag"]), 1)
        self.assertTrue(notes[-1].startswith("dag task_failure"))
        self.assertIn("True", notes[-1])
        self.assertIn("in the callback", run.log("fails"))
        self.assertIn("ValueError: callback", run.log("fails"))
        self.assert_nothing_left()

    def test_the_same_in_one_process_and_on_a_foreign_executor(self):
        module = self.module(
            self.SOURCE.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError")
            .replace("(execution_timeout=0.3)", "")
            .replace("time.sleep(60)", "raise ValueError")
        )
        for how in ("test", "threads"):
            (self.folder / "notes").write_text("")
            if how == "test":
                with (
                    contextlib.redirect_stderr(io.StringIO()),
                    contextlib.redirect_stdout(io.StringIO()),
                ):
                    module.dag.test(db_path=self.db)
            else:
                with concurrent.futures.ThreadPoolExecutor(2) as threads:
                    module.dag.run(db_path=self.db, executor=threads)
            kinds = collections.Counter(
                line.split()[1] for line in (self.folder / "notes").read_text().splitlines()
            )
            self.assertEqual(
                kinds,
                {
                    "execute": 7,
                    "success": 2,
                    "retry": 1,
                    "failure": 3,
                    "skipped": 1,
                    "task_failure": 1,
                },
            )

    def test_a_dead_run_is_told_to_the_dags_callback(self):
        module = self.module(self.SOURCE.replace("time.sleep(60)", "raise ValueError"))
        module.dag.run(db_path=self.db, run_id="dead", executor=pool())
        self.abandon()
        (self.folder / "notes").write_text("")
        module.dag.run(db_path=self.db, max_workers=1)
        told = [
            line
            for line in (self.folder / "notes").read_text().splitlines()
            if line.startswith("dag")
        ]
        self.assertTrue(told[0].startswith("dag its scheduler died"), told)
        self.assertIn("[failed: its scheduler died]", told[0])

    def test_what_the_last_task_leaves_behind_keeps_no_callback_from_being_called(self):
        """Its worker ends with that, and is free as far as the scheduler knows."""
        self.run_flow(
            """
            import subprocess
            def note(context):
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f: f.write("x")
            with DAG("leaves", on_success_callback=note) as dag:
                @task
                def leaves(): subprocess.Popen(["sleep", "60"])
                leaves()
            """,
            max_workers=1,
        )
        self.assertEqual((self.folder / "notes").read_text(), "x")

    def test_exits_and_stops_do_not_keep_callbacks_from_being_called(self):
        module = self.module(
            """
            def note(word):
                def callback(context):
                    with open(os.environ["CASE_DIR"] + "/notes", "a") as f: f.write(f"{word} {context.get('reason')}" + chr(10))
                return callback
            def leaves(context): print("leaving"); sys.exit(3)
            with DAG("exits", on_failure_callback=note("dag")) as dag:
                @task(on_execute_callback=leaves, on_success_callback=[leaves, note("after")])
                def f(): return 1
                @task
                def long(): (Path(os.environ["CASE_DIR"]) / "long").touch(); time.sleep(60)
                f() >> long()
                EmptyOperator(task_id="e", on_execute_callback=note("e1"), on_success_callback=note("e2"))
            """
        )
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(module.dag.run, db_path=self.db, executor=pool(), stop=stop)
            self.assertTrue(wait_until((self.folder / "long").exists))
            stop.set()
            run = running.result(timeout=30)
        self.assertEqual(self.states(run), {"f": "success", "long": None, "e": "success"})
        notes = (self.folder / "notes").read_text().splitlines()
        self.assertEqual(set(notes), {"after None", "e1 None", "e2 None", "dag stopped"})
        self.assertLess(notes.index("e1 None"), notes.index("e2 None"))
        self.assertEqual(run.log("f").splitlines().count("leaving"), 2)
        self.assertIn("called sys.exit(3)", run.log("f"))

    def test_what_a_callback_of_the_dag_prints_leaves_the_logs_of_tasks_as_they_were(self):
        made = self.module(
            """
            def tell(context): print("of", context["run_id"])
            with DAG("tells", on_failure_callback=tell) as dag:
                @task
                def a(): print("a")
                @task
                def b(x):
                    (Path(os.environ["CASE_DIR"]) / "b").touch()
                    while (Path(os.environ["CASE_DIR"]) / "wait").exists(): time.sleep(0.01)
                b(a())
            """
        ).dag
        made.run(db_path=self.db, run_id="dead", executor=pool())
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET state = 'running', owner = '0123456789abcdef'")
        run = made.run(db_path=self.db, executor=pool())
        self.assertEqual([run.log("a"), run.log("b")], ["a\n", "of dead\n"])
        run.clear("b")
        (self.folder / "b").unlink()
        (self.folder / "wait").touch()
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(
                made.run, db_path=self.db, executor=pool(), resume=True, stop=stop
            )
            self.assertTrue(wait_until((self.folder / "b").exists))
            stop.set()
            run = running.result(timeout=LIMIT)
        self.assertEqual(self.states(run), {"a": "success", "b": None})
        self.assertEqual(run.log("a"), f"a\nof {run.run_id}\n")

    def test_hooks(self):
        run = self.run_flow(
            """
            def before(context): print("before", context["ti"].task_id)
            def after(context, result): print("after", result)
            with DAG("hooks") as dag:
                @task(pre_execute=before, post_execute=after)
                def f(): print("in"); return 5
                f()
            """
        )
        self.assertEqual(run.log("f"), "before f\nin\nafter 5\n")


class LimitsTest(Case):
    SOURCE = """
        def most(name):
            folder = Path(os.environ["CASE_DIR"]) / name
            folder.mkdir(exist_ok=True)
            mine = folder / str(os.getpid()); mine.touch()
            time.sleep(0.05); n = len(list(folder.iterdir())); mine.unlink()
            return n
        with DAG("limits") as dag:
            for i in range(4):
                @task(task_id=f"gpu{i}", pool="gpu")
                def gpu(): return most("gpu")
                gpu()
            @task(max_active_tis_per_dagrun=1)
            def one(x): return most("one")
            one.expand(x=[1, 2, 3])
            @task(max_active_tis_per_dag=1)
            def dag_wide(x): return most("dag_wide")
            dag_wide.expand(x=[1, 2, 3])
    """

    def test_pools_and_limits_on_instances(self):
        module = self.module(self.SOURCE)
        run = module.dag.run(db_path=self.db, pools={"gpu": 1}, max_workers=3)
        self.assertEqual({x.value for x in run.xcoms()}, {1})
        self.assertEqual(run.state, "success")
        for pools, word in ((None, "--pool gpu=N"), ({"gpu": 0}, "gpu"), ({"gpu": "1"}, "int")):
            with self.assertRaises((ValueError, TypeError)) as caught:
                module.dag.run(db_path=self.db, pools=pools, max_workers=1)
            self.assertIn(word, str(caught.exception))

    def test_priorities(self):
        with DAG("d") as d:
            a = liteflow.EmptyOperator(task_id="a")
            b = liteflow.EmptyOperator(task_id="b", priority_weight=2)
            c = liteflow.EmptyOperator(task_id="c")
            e = liteflow.EmptyOperator(task_id="e", priority_weight=5)
            f = liteflow.EmptyOperator(task_id="f", priority_weight=9, weight_rule="absolute")
            c >> e
        plan = liteflow._Plan(d)
        self.assertEqual([n.weight for n in plan.nodes], [1, 2, 6, 5, 9])
        plan.settle()
        self.assertEqual([plan.take().task_id for _ in range(4)], ["f", "c", "b", "a"])
        self.assertEqual((a.task_id, b.priority_weight, f.weight_rule), ("a", 2, "absolute"))

    def test_dagrun_timeout(self):
        run = self.run_flow(
            """
            with DAG("late", dagrun_timeout=0.2) as dag:
                @task(retries=5)
                def slow(): time.sleep(60)
                @task(trigger_rule="all_done")
                def after(x): pass
                after(slow())
            """
        )
        self.assertEqual((run.state, run.reason), ("failed", "dagrun_timeout"))
        self.assertEqual(self.states(run), {"slow": "skipped", "after": "skipped"})


class ClearingTest(Case):
    SOURCE = """
        def ran(name):
            with open(os.environ["CASE_DIR"] + "/ran", "a") as f: f.write(name + " ")
        with DAG("cleared") as dag:
            @task
            def a(): ran("a"); return 1
            @task(retries=1)
            def b(x): ran("b"); return x
            @task
            def c(x): ran("c"); return x
            @task
            def other(): ran("other")
            @setup
            def up(): ran("up")
            @teardown
            def down(): ran("down")
            x = a(); c(b(x)); other()
            u, d = up(), down()
            u >> [w := c.override(task_id="inside")(1)] >> d; u >> d
    """

    def test_a_cleared_task_gets_fresh_tries(self):
        source = """
            with DAG("fresh") as dag:
                @task(retries=2)
                def f(): raise ValueError
                f()
        """
        run = self.run_flow(source)
        for tries in (3, 6, 9):
            ti = run.get_task_instance("f")
            self.assertEqual((ti.try_number, ti.max_tries), (tries, tries - 1))
            run.clear("f")
            ti = run.get_task_instance("f")  # what was, is no more
            self.assertEqual((ti.state, ti.error, ti.start_date, ti.pid), (None,) * 4)
            run = self.run_flow(source, resume=True)

    def test_a_run_of_which_nothing_is_cleared_stays_what_it_is(self):
        run = self.run_flow(self.SOURCE)
        failed = (ti.task_id for ti in run.get_task_instances("failed"))
        self.assertEqual((run.clear(failed), run.refresh().state), ([], "success"))

    def test_what_follows_from_a_cleared_task_is_decided_by_the_graph_of_the_resume(self):
        run = self.run_flow(self.SOURCE)
        run.clear("a")
        (self.folder / "ran").write_text("")
        self.run_flow(self.SOURCE.replace("c(b(x)); other()", "b(x); c(x)"), resume=True)
        self.assertEqual(sorted((self.folder / "ran").read_text().split()), ["a", "b", "c"])

    def test_one_instance_of_a_mapped_task_is_cleared(self):
        source = """
            with DAG("mapped") as dag:
                @task
                def f(x): return x
                @task
                def total(values): return sum(values)
                total(f.expand(x=[1, 2, 3]))
        """
        run = self.run_flow(source)
        self.assertEqual(run.clear("f[1]"), ["f[1]"])
        run = self.run_flow(source, resume=True)
        tries = [(ti.map_index, ti.try_number) for ti in run.get_task_instances()]
        self.assertEqual(tries, [(0, 1), (1, 2), (2, 1), (-1, 2)])
        self.assertEqual((run.state, run.xcom_pull("total")), ("success", 6))

    def test_one_cleared_alone_hides_nothing_from_what_runs_again_above_it(self):
        run = self.run_flow(self.SOURCE)
        run.clear("b", downstream=False)
        run.clear("a")
        (self.folder / "ran").write_text("")
        self.run_flow(self.SOURCE, resume=True)
        self.assertEqual((self.folder / "ran").read_text().split(), ["a", "b", "c"])

    def test_clearing_gives_no_warning(self):  # Python 3.12.0 to 3.12.3 did, of `?1`
        run = self.run_flow(self.SOURCE)
        with warnings.catch_warnings(action="error"):
            self.assertEqual(run.clear(["a", "other"]), ["a", "other"])

    def test_a_live_run_is_not_cleared_even_if_it_begins_just_now(self):
        run = self.run_flow(self.SOURCE)
        real = liteflow._Store.transaction

        @contextlib.contextmanager
        def late(store, *begin):
            if not begin:
                with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                    db.execute(
                        "UPDATE dag_run SET state = 'running', owner = 'x', owner_process = 'pid 7'"
                    )
            with real(store, *begin):
                yield

        self.enterContext(mock.patch.dict(liteflow._owner_files, x=-1))
        for act in (lambda: run.clear("b"), run.delete):
            liteflow._Store.transaction = late
            try:
                with self.assertRaises(liteflow.AlreadyRunning):
                    act()
            finally:
                liteflow._Store.transaction = real
        self.assertEqual(self.query("SELECT owner, state FROM dag_run"), [("x", "running")])

    def test_clear_and_resume_run_just_these_again(self):
        run = self.run_flow(self.SOURCE)
        (self.folder / "ran").write_text("")
        self.assertEqual(run.clear("b"), ["b"])
        self.assertEqual((run.state, self.states(run)["b"]), ("queued", None))
        self.assertFalse(run.get_task_instance("b").interrupted)
        again = self.run_flow(self.SOURCE, resume=True)
        self.assertEqual((again.run_id, again.state), (run.run_id, "success"))
        self.assertEqual((self.folder / "ran").read_text().split(), ["b", "c"])
        self.assertEqual([a.get_task_instance("b").try_number for a in [again]], [2])
        (self.folder / "ran").write_text("")
        self.assertEqual(again.clear(["inside"]), ["inside"])
        self.run_flow(self.SOURCE, resume=True)
        self.assertEqual((self.folder / "ran").read_text().split(), ["up", "c", "down"])
        (self.folder / "ran").write_text("")
        self.assertEqual(again.clear("a", downstream=False), ["a"])
        self.run_flow(self.SOURCE, resume=True)
        self.assertEqual((self.folder / "ran").read_text().split(), ["a"])
        with self.assertRaises(liteflow.TaskNotFound):
            again.clear("absent")

    def test_from_the_command_line(self):
        self.script(
            "import os\nfrom liteflow import *\n"
            + textwrap.dedent(self.SOURCE)
            + "\nif __name__ == '__main__':\n    dag.cli()\n"
        )
        self.assertEqual(self.python("my_flow.py", "--quiet").returncode, 0)
        (self.folder / "ran").write_text("")
        done = self.python("my_flow.py", "--from", "b")
        self.assertEqual(
            (done.returncode, (self.folder / "ran").read_text()), (0, "b c "), done.stderr
        )
        done = self.cli_here("clear", "cleared", "c", "--only")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.cli_here("clear", "cleared", "nothing").returncode, 2)
        how = [*shlex.split(done.stderr.splitlines()[-1]), "--quiet"]
        self.assertIn("--resume", how)
        self.assertEqual(
            subprocess.run(["bash", "-c", shlex.join(how).replace("'&&'", "&&")]).returncode, 0
        )
        self.assertEqual((self.folder / "ran").read_text(), "b c c ")


# --- Runners --------------------------------------------------------------------------------------


FIVE = """
    import subprocess
    with DAG("five") as dag:
        @task
        def killed(): print("last words"); os.kill(os.getpid(), signal.SIGKILL)
        @task
        def leaves(): os._exit(0)
        @task
        def leaves3(): os._exit(3)
        @task
        def hangs_in_a_child():
            print("hanging"); subprocess.run(["sleep", "60"])
        @task
        def raises(): raise ValueError("mine")
        @task
        def fine(i): return i
        hangs_in_a_child.override(execution_timeout=0.3)(); killed(); leaves(); leaves3(); raises()
        for i in range(3): fine(i)
"""


class StartMethodsContract:
    """What holds under every start method."""

    method = ""

    def test_deaths_are_blamed_on_their_task_alone(self):
        run = self.run_flow(FIVE, max_workers=2, mp_context=self.method)
        reasons = {
            ti.task_id: (ti.error or "").splitlines()[-1:] for ti in run.get_task_instances()
        }
        self.assertEqual(
            reasons,
            {
                "hangs_in_a_child": ["timeout after 0.3 s"],
                "killed": ["killed by SIGKILL"],
                "leaves": ["worker exited with code 0 before reporting"],
                "leaves3": ["worker exited with code 3 before reporting"],
                "raises": ["ValueError: mine"],
                "fine": [],
                "fine__1": [],
                "fine__2": [],
            },
        )
        self.assertEqual({ti.try_number for ti in run.get_task_instances()}, {1})
        self.assertEqual(run.log("killed"), "last words\n")
        self.assertEqual(run.log("hangs_in_a_child"), "hanging\n")
        self.assert_nothing_left()

    def test_the_initializer_runs_before_the_module_of_the_dag(self):
        module = self.module(
            """
            SEEN = signal.getsignal(signal.SIGUSR1)
            with DAG("initialized") as dag:
                @task
                def see(): return SEEN == signal.SIG_IGN
                see()
            """
        )
        marks = (signal.SIGUSR1, signal.SIG_IGN)
        with WorkerPool(1, self.method, signal.signal, marks) as warm:
            run = module.dag.run(db_path=self.db, executor=warm)
        # A forked worker has the module already.
        self.assertEqual(run.xcom_pull("see"), self.method != "fork")

    def test_what_a_task_writes_into_pipes_that_are_not_its_own_keeps_nobody_waiting(self):
        path = self.script(
            """
            import os, stat, sys
            from liteflow import *
            with DAG("d") as dag:
                @task
                def strays(n):
                    for fd in range(3, 64):
                        try:  # a forked one has the database, too
                            if not stat.S_ISREG(os.fstat(fd).st_mode): os.write(fd, b"garbage" * n)
                        except OSError: pass
                @task
                def fine(n): return n
                strays.expand(n=[1, 3000])
                fine.expand(n=[1, 2])
            if __name__ == "__main__":
                with WorkerPool(2, *sys.argv[1:]) as pool:
                    run = dag.run(db_path="flow.db", executor=pool)
                print(*[ti.state for ti in run.get_task_instances()])
            """
        )
        done = self.python(path, *filter(None, [self.method]), timeout=LIMIT / 2)
        self.assertEqual(done.stdout, "failed failed success success\n", done.stderr)

    def test_a_program_with_many_open_files_has_workers(self):
        # A worker, or a server, that is forked there has high descriptors: select() takes none.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        except ValueError:
            self.skipTest("so many may not be opened")
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for file in [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]:
            self.addCleanup(os.close, file)
        run = self.run_flow(
            """
            with DAG("asks") as dag:
                @task(on_success_callback=print)  # for which the worker waits
                def ask(): return liteflow._is_forked
                ask()
            """,
            max_workers=1,
            mp_context=self.method,
        )
        self.assertEqual(run.xcom_pull("ask"), self.method is None and sys.platform == "linux")


class ForkedTest(StartMethodsContract, Case):
    """The server that is forked from this process, whatever else has a thread here."""

    method = None

    def setUp(self):
        super().setUp()
        forking = mock.patch.object(liteflow, "_may_fork", lambda: True)
        forking.start()
        self.addCleanup(forking.stop)

    @LINUX
    def test_they_are_forked(self):
        run = self.run_flow(
            """
            with DAG("asks") as dag:
                @task
                def ask(): return liteflow._is_forked
                ask()
            """,
            max_workers=1,
        )
        self.assertTrue(run.xcom_pull("ask"))


class ForkTest(StartMethodsContract, Case):
    method = "fork"

    def test_a_context_that_another_thread_makes_keeps_no_worker_waiting(self):
        dag = self.module(
            """
            with DAG("d") as dag:
                @task(execution_timeout=3)
                def f(ti): return ti.task_id
                f()
            """
        ).dag
        entered, may_go_on = threading.Event(), threading.Event()

        def made(info, real=liteflow._dag_run_of):
            if not entered.is_set():
                entered.set()
                may_go_on.wait(LIMIT)
            return real(info)

        with mock.patch.object(liteflow, "_dag_run_of", made):
            here = threading.Thread(target=dag.test, kwargs={"db_path": self.db})
            here.start()
            self.assertTrue(entered.wait(LIMIT))
            run = dag.run(db_path=self.db, mp_context="fork")
            may_go_on.set()
            here.join()
        self.assertEqual(run.xcom_pull("f"), "f")


class ForkserverTest(StartMethodsContract, Case):
    method = "forkserver"


class SpawnTest(StartMethodsContract, Case):
    method = "spawn"


class ForkServerFaultsTest(Case):
    """What befalls the fork server, or the folder of its socket, ends no run."""

    SCRIPT = """
        import os, shutil, signal, sys, tempfile, threading, time
        from pathlib import Path
        from liteflow import *

        def wait_for(*names):
            while not all(os.path.exists(name) for name in names):
                time.sleep(0.01)

        with DAG("faults") as dag:
            @task
            def goes_on(x):
                Path(f"goes_on{x}").touch()
                wait_for("hurt")
                return x
            @task(retries=1)
            def dies(ti):
                if ti.try_number == 1:
                    Path("dies").touch()
                    wait_for("hurt")
                    os.kill(os.getpid(), signal.SIGKILL)
            goes_on(1)
            dies()

        def hurt():
            from multiprocessing import forkserver, util
            wait_for("goes_on1", "dies")
            how = sys.argv[1]
            if how.isdecimal():
                os.kill(forkserver._forkserver._forkserver_pid, int(how))
            elif how == "wipe":
                shutil.rmtree(util.get_temp_dir())
                os.mkdir(util.get_temp_dir())
            Path("hurt").touch()

        if __name__ == "__main__":
            if sys.argv[1] == "block":
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
            if sys.argv[1] == "path":
                sys.path.append(Path("somewhere"))
            threading.Thread(target=hurt, daemon=True).start()
            how = {"max_workers": 2, "mp_context": "forkserver"}
            if sys.argv[1] == "no":
                how = {"executor": WorkerPool(2, "forkserver", int)}
            run = dag.run(db_path="flow.db", **how)
            if sys.argv[1] == str(int(signal.SIGSTOP)):
                from multiprocessing import forkserver
                os.kill(forkserver._forkserver._forkserver_pid, signal.SIGCONT)
            tries = [ti.try_number for ti in run.raise_if_failed().get_task_instances()]
            assert tries == [1, 2], tries
        """

    def check(self, how, **environ):
        path = self.script(self.SCRIPT)
        shows = ("-W", "always::ResourceWarning")  # of what was not closed
        done = self.python(*shows, path, how, env={**os.environ, **environ})
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @LINUX
    def test_it_is_killed(self):
        self.check(str(int(signal.SIGKILL)))

    @LINUX
    def test_it_is_stopped(self):
        self.check(str(int(signal.SIGSTOP)))

    def test_its_folder_is_wiped(self):
        self.check("wipe")

    def test_its_socket_would_have_too_long_a_name(self):
        folder = self.folder / ("x" * 100)
        folder.mkdir()
        self.check("no", TMPDIR=str(folder))

    def test_the_signal_that_it_waits_for_is_blocked(self):
        self.check("block")

    def test_a_path_object_in_sys_path(self):
        self.check("path")

    def test_it_does_not_import_the_script_for_its_workers(self):
        path = self.script(
            """
            import os, sys
            from multiprocessing import spawn
            from liteflow import *
            PID, ARGUMENTS, PATH = os.getpid(), sys.argv[1:], sys.path[:]
            with DAG("anew") as dag:
                @task
                def f(): return PID == os.getpid(), ARGUMENTS
                f()
            def prepared(name, known=spawn.get_preparation_data):  # as in 3.13.8, for a fork server
                found = known(name)
                return {**found, "main_path": found["init_main_from_path"]}
            if __name__ == "__main__":
                spawn.get_preparation_data = prepared
                run = dag.run(db_path="flow.db", mp_context="forkserver")
                print(run.raise_if_failed().xcom_pull("f"), sys.path == PATH)
            """
        )
        done = self.python(path, "word")
        self.assertEqual((done.stdout, done.stderr), ("(True, ['word']) True\n", ""))


class RunnersTest(Case):
    def test_wrong_options(self):
        module = self.module("with DAG('d') as dag:\n    task(print)('x')\n")
        for options, kind, word in (
            ({"max_workers": 0}, ValueError, "max_workers"),
            ({"max_workers": -1}, ValueError, "max_workers"),
            ({"max_workers": "4"}, TypeError, "max_workers"),
            ({"max_workers": True}, TypeError, "max_workers"),
            ({"mp_context": "thread"}, ValueError, "mp_context"),
            ({"mp_context": ""}, ValueError, "mp_context"),
            ({"executor": 3}, TypeError, "executor"),
            ({"executor": pool(), "max_workers": 2}, ValueError, "not both"),
            ({"conf": [1]}, TypeError, "conf"),
            ({"conf": {"a": {1}}}, TypeError, "JSON"),
            ({"run_id": ""}, ValueError, "run_id"),
            ({"run_id": "a\nb"}, ValueError, "run_id"),
            ({"logical_date": "2024"}, TypeError, "logical_date"),
            ({"resume": True, "conf": {}}, ValueError, "recorded run"),
        ):
            with self.subTest(options=options), self.assertRaises(kind) as caught:
                module.dag.run(db_path=self.db, **options)
            self.assertIn(word, str(caught.exception))
        self.assertFalse(self.db.exists())

    def test_a_start_method_may_be_given_as_its_context(self):
        module = self.module("with DAG('d') as dag:\n    task(task_id='a')(os.getpid)()\n")
        context = liteflow.multiprocessing.get_context("fork")
        with mock.patch.object(context, "Process", wraps=context.Process) as made:
            run = module.dag.run(db_path=self.db, mp_context=context, max_workers=1)
        self.assertEqual((run.state, made.call_count), ("success", 1))

    def test_how_a_worker_ended(self):
        for code, words in (
            (-signal.SIGKILL, "killed by SIGKILL"),
            (-signal.NSIG, f"killed by signal {signal.NSIG}"),
            (None, "the worker was lost"),
            (3, "worker exited with code 3 before reporting"),
            (70, "worker exited with code 70 before reporting: the end of its log tells why"),
        ):
            self.assertEqual(liteflow._end_of(code).partition(",")[0], words)
        with mock.patch.object(liteflow, "__file__", __file__):  # a later version's, say
            self.assertIn("test_liteflow.py was replaced: restart", liteflow._end_of(70))

    def test_a_timeout_ends_a_task_that_ignores_it(self):
        self.enterContext(mock.patch.object(liteflow, "_GRACE", 0.4))
        run = self.run_flow(
            """
            with DAG("stubborn") as dag:
                @task(execution_timeout=0.2)
                def ignores(): signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(60)
                @task(execution_timeout=0.2)
                def catches():
                    try: time.sleep(60)
                    except BaseException as e: print(type(e).__name__)
                    return "as if nothing had happened"
                @task(execution_timeout=0.2)
                def stopped(): os.kill(os.getpid(), signal.SIGSTOP)
                @task(execution_timeout=0.2, retries=1)
                def second_time(ti):
                    if ti.try_number == 1: time.sleep(60)
                    return "done"
                ignores(); catches(); stopped(); second_time()
            """
        )
        self.assertEqual(
            self.states(run),
            {
                "ignores": "failed",
                "catches": "failed",
                "stopped": "failed",
                "second_time": "success",
            },
        )
        for task_id in ("ignores", "catches", "stopped"):
            error = run.get_task_instance(task_id).error
            self.assertEqual(error.splitlines()[-1], "timeout after 0.2 s")
        self.assertEqual(run.log("catches"), "AirflowTaskTimeout\n")
        self.assertIsNone(run.xcom_pull("catches"))
        self.assertFalse(alive(int(run.log("ignores"))))

    def test_a_death_is_noticed_although_a_child_keeps_the_pipe(self):
        started = time.monotonic()
        run = self.run_flow(
            """
            with DAG("forks") as dag:
                @task
                def forks():
                    if os.fork() == 0: time.sleep(30); os._exit(0)
                    os.kill(os.getpid(), signal.SIGKILL)
                forks()
            """
        )
        self.assertEqual(run.get_task_instance("forks").error, "killed by SIGKILL")
        self.assertLess(time.monotonic() - started, 20)

    def test_a_child_that_returns_into_our_code_is_not_heard(self):
        run = self.run_flow(
            """
            with DAG("doubled") as dag:
                @task
                def forks():
                    if os.fork() == 0: return "child"
                    time.sleep(0.3); return "parent"
                @task
                def ends(how):
                    child = os.fork()
                    if not child: print("in", how); exec(how)
                    else: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                forks()
                ends.expand(how=["0", "1 / 0", "sys.exit(3)", "sys.exit()", "sys.exit('words')",
                                 "sys.stderr.write('no end')"])
            """
        )
        self.assertEqual(run.xcom_pull("forks"), "parent")
        self.assertEqual(list(run.xcom_pull("ends")), [0, 1, 3, 0, 1, 0])
        self.assertIn("in 1 / 0\nTraceback (most", run.log("ends", 1))
        self.assertIn("ZeroDivisionError: division by zero\n", run.log("ends", 1))
        self.assertEqual(run.log("ends", 4), "in sys.exit('words')\nwords\n")
        self.assertEqual(run.log("ends", 5), "in sys.stderr.write('no end')\nno end")

    CHILDREN = """
        def forks(context):
            print("called", flush=True)
            child = os.fork()
            if not child and context["ti"].task_id == "exits": sys.exit(3)
            if child: print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        with DAG("children") as dag:
            @task(on_success_callback=forks)
            def exits(): return 1
            @task(on_success_callback=forks)
            def returns(x): return os.getpid()
            @task
            def last(pid):
                child = os.fork()
                if not child: sys.exit(5)
                return pid == os.getpid(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            last(returns(exits()))
    """

    def test_a_child_of_a_callback_does_not_serve_in_place_of_the_worker(self):
        run = self.run_flow(self.CHILDREN, max_workers=1)
        self.assertEqual(run.log("exits"), "called\ncode 3\n")
        self.assertEqual(run.log("returns"), "called\ncode 0\n")
        self.assertEqual(run.xcom_pull("last"), (True, 5))

    def test_a_child_in_a_run_in_this_process_does_not_go_on_with_the_run(self):
        self.script(
            textwrap.dedent("import os, sys\nfrom liteflow import DAG, task")
            + textwrap.dedent(self.CHILDREN)
            + "print(dag.test(db_path='t.db').xcom_pull('last'))"
        )
        done = self.python("my_flow.py")
        said = "called\ncode 3\ncalled\ncode 0\n(True, 5)\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, said, ""))

    def test_ctrl_c_while_a_value_is_pickled_ends_a_run_in_this_process(self):
        module = self.module(
            """
            class Large:
                def __reduce__(self): raise KeyboardInterrupt
            with DAG("large") as dag:
                @task
                def gives(): return Large()
                @task
                def never(): return 1
                gives(); never()
            """
        )
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(KeyboardInterrupt):
            module.dag.test(db_path=self.db)
        [run] = module.dag.runs(self.db)
        self.assertEqual(self.states(run), {"gives": None, "never": None})

    def test_ctrl_c_in_a_test_counts_once_though_the_file_is_locked(self):
        DAG("d").run(db_path=self.db)
        other, hear = sqlite3.connect(self.db), liteflow._Run._hear_while_locked
        self.addCleanup(other.close)

        def interrupts():
            other.execute("BEGIN IMMEDIATE")
            raise KeyboardInterrupt

        with DAG("d") as d:
            task(interrupts)()
        frees = mock.patch.object(
            liteflow._Run, "_hear_while_locked", lambda run: hear(run) or other.rollback()
        )
        quietly = contextlib.redirect_stderr(io.StringIO())
        with frees, quietly, self.assertRaises(KeyboardInterrupt) as caught:
            d.test(db_path=self.db)
        self.assertIsNone(caught.exception.__cause__)  # as there is where not all was recorded

    def test_an_exception_whose_truth_raises_fails_its_task_and_no_more(self):
        run = self.run_flow(
            """
            class Odd(Exception):
                def __bool__(self): raise ValueError("neither")
            with DAG("odd") as dag:
                @task
                def f():
                    try: raise Odd("first")
                    except Odd as first: raise KeyError("second") from first
                f()
            """
        )
        error = run.get_task_instance("f").error
        self.assertEqual(error.split("\n")[-1], "KeyError: 'second'")

    def test_the_log_has_all_letters_whatever_the_locale(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("letters") as dag:
                @task
                def f(): print("größe 日本")
                @task
                def detaches(): import sys; sys.stdout.detach()
                detaches() >> f() >> f.override(task_id="again")()
            if __name__ == "__main__":
                run = dag.run(db_path="t.db", max_workers=1)
                print(ascii(run.log("f") + run.log("again")))
            """
        )
        where = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        done = self.python("my_flow.py", env={**os.environ, **where})
        self.assertEqual(done.stdout, ascii("größe 日本\n" * 2) + "\n", done.stderr)

    def test_a_context_variable_that_a_task_sets_is_not_the_next_ones(self):
        run = self.run_flow(
            """
            import contextvars
            var = contextvars.ContextVar("var", default="nobody's")
            def sets(context): var.set("the first's")
            def says(context): print(var.get())
            with DAG("contexts") as dag:
                @task(on_execute_callback=sets, on_success_callback=[says, says])
                def first(): print(var.get()); var.set("its own")
                @task
                def second(): return os.getpid(), var.get()
                first() >> second() >> second.override(task_id="third")()
            """,
            max_workers=1,
        )
        pid, found = run.xcom_pull("second")
        self.assertEqual((run.xcom_pull("third"), found), ((pid, found), "nobody's"))
        self.assertEqual(run.log("first"), "the first's\nits own\nits own\n")

    def test_a_shared_pool_serves_several_runs_at_once(self):
        module = self.module(
            """
            def make(name):
                with DAG(name) as d:
                    @task
                    def f(x): print(name, x); return [name, x]
                    for i in range(10): f(i)
                return d
            dags = [make(f"shared{i}") for i in range(4)]
            """
        )
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            runs = list(threads.map(lambda d: d.run(db_path=self.db, executor=pool()), module.dags))
        for d, run in zip(module.dags, runs, strict=True):
            self.assertEqual(run.state, "success")
            self.assertEqual(
                sorted(x.value for x in run.xcoms()), [[d.dag_id, i] for i in range(10)]
            )
            self.assertEqual(run.log("f__9"), f"{d.dag_id} 9\n")
        self.assert_nothing_left()

    def test_runs_take_turns(self):
        module = self.module(
            """
            def make(name, tasks):
                with DAG(name) as d:
                    @task
                    def f():
                        folder = Path(os.environ["CASE_DIR"])
                        (folder / f"{name}-{time.monotonic_ns()}").touch()
                        time.sleep(0 if (folder / "through").exists() else 0.004)
                    for i in range(tasks): f()
                return d
            long, short = make("long", 300), make("short", 3)
            """
        )
        with WorkerPool(1) as one, concurrent.futures.ThreadPoolExecutor(2) as threads:
            long = threads.submit(lambda: module.long.run(db_path=self.db, executor=one))
            wait_until(lambda: list(self.folder.glob("long-*")))
            module.short.run(db_path=self.db, executor=one)
            self.assertLess(len(list(self.folder.glob("long-*"))), 300)
            (self.folder / "through").touch()
            self.assertEqual(long.result().state, "success")

    def test_a_run_that_waits_gives_its_slots_back(self):
        module = self.module(
            """
            with DAG("waits", max_active_runs=1) as dag:
                @task
                def f(x): time.sleep(0 if (Path(os.environ["CASE_DIR"]) / "go").exists() else 0.06)
                x = 1
                for _ in range(50): x = f(x)
            """
        )
        options = {"db_path": self.db, "wait": True, "progress": lambda line: told.append(line)}
        told = []
        with WorkerPool(1) as one, concurrent.futures.ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(module.dag.run, executor=one, **options) for _ in range(2)]
            self.assertTrue(wait_until(lambda: any("waiting" in str(line) for line in told)))
            (self.folder / "go").touch()
            self.assertEqual([run.result(timeout=30).state for run in runs], ["success"] * 2)

    def test_an_idle_worker_that_was_killed_is_replaced(self):
        module = self.module("with DAG('d') as dag:\n    task(task_id='a')(os.getpid)()\n")
        with WorkerPool(1) as one:
            pid = module.dag.run(db_path=self.db, executor=one).xcom_pull("a")
            os.kill(pid, signal.SIGKILL)
            self.assertTrue(wait_until(lambda: not alive(pid)))
            self.assertEqual(module.dag.run(db_path=self.db, executor=one).state, "success")

    def test_a_pool_that_is_shut_down_takes_no_run(self):
        module = self.module("with DAG('d') as dag:\n    task(print)('x')\n")
        with WorkerPool(1) as closed:
            pass
        with self.assertRaises(RuntimeError):
            module.dag.run(db_path=self.db, executor=closed)

    def test_an_open_pool_does_not_keep_the_interpreter(self):
        self.script(
            """
            from liteflow import DAG, WorkerPool, task
            with DAG("d") as dag:
                @task
                def f(): pass
                f()
            if __name__ == "__main__":
                pool = WorkerPool(2)
                print(dag.run(executor=pool).state)
            """
        )
        done = self.python("my_flow.py", timeout=30)
        self.assertEqual((done.stdout, done.returncode), ("success\n", 0), done.stderr)

    @unittest.skipIf(sys.version_info[:2] == (3, 12), "it starts no process at its end")
    def test_a_first_run_once_the_program_has_ended(self):
        self.script(
            """
            import atexit, sys, threading, time
            from liteflow import DAG, UnreachableTask, task
            with DAG("d") as dag:
                task(task_id="f")(print)()
            def late():
                try:
                    while True:
                        threading._register_atexit(lambda: None)
                        time.sleep(0.01)
                except RuntimeError:  # nothing can be registered any more
                    pass
                try:
                    print(dag.run().state)
                except UnreachableTask as error:
                    print(error)
            if __name__ == "__main__":
                at = {"atexit": atexit.register, "thread": lambda f: threading.Thread(target=f).start()}
                at[sys.argv[1]](late)
            """
        )
        for at, said in (("atexit", "success"), ("thread", "the main program has ended: let it")):
            done = self.python("my_flow.py", at, timeout=30)
            self.assertIn(said, done.stdout, done.stderr)

    def test_foreign_executors(self):
        source = """
            with DAG("foreign") as dag:
                @task
                def give(ti): ti.xcom_push("k", 5); return list(range(3))
                @task
                def take(x, ti): return [sum(x), ti.xcom_pull("give", key="k")]
                @task
                def far(ti, order): return ti.xcom_pull("give")
                @task(retries=1)
                def flaky(ti):
                    if ti.try_number == 1: sys.exit(3)
                    return "second"
                @task
                def none(x): raise liteflow.AirflowSkipException
                @task(trigger_rule="all_done")
                def count(results): return len(results)
                far(order=take(give())); flaky(); count(none.expand(x=[1, 2]))
            """
        # Not by fork: a child may wait for ever for a lock that another thread held.
        processes = functools.partial(
            concurrent.futures.ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn")
        )
        for kind in (concurrent.futures.ThreadPoolExecutor, processes):
            with self.subTest(kind=str(kind)):
                with kind(2) as executor:
                    run = self.run_flow(source, executor=executor)
                self.assertEqual(
                    self.states(run),
                    {"give": "success", "take": "success", "far": "failed", "flaky": "success"}
                    | {"none[0]": "skipped", "none[1]": "skipped", "count": "success"},
                )
                self.assertEqual(run.xcom_pull("count"), 0)
                self.assertEqual(run.xcom_pull("take"), [3, 5])
                self.assertIn("foreign executor", run.get_task_instance("far").error)

    def test_a_callback_behind_long_tasks_of_a_foreign_executor_is_waited_for(self):
        module = self.module(
            """
            called = []
            with DAG("behind") as dag:
                task(task_id="first", priority_weight=2, on_success_callback=called.append)(abs)(1)
                for i in range(2): task(task_id=f"t{i}")(lambda: time.sleep(0.2))()
            """
        )
        with (
            mock.patch.object(liteflow, "_CALLBACK_LIMIT", 0.1),
            concurrent.futures.ThreadPoolExecutor(1) as executor,
        ):
            module.dag.run(db_path=self.db, executor=executor)
            self.assertEqual(len(module.called), 1)

    def test_what_is_known_of_the_run_on_a_foreign_executor(self):
        module = self.module(
            """
            told = []
            with DAG("webhook", on_failure_callback=lambda c: told.append(str(c["dag_run"]))) as dag:
                @task
                def f(ti, dag_run):
                    told.append(ti.log_url)
                    dag_run.get_task_instances()
                f()
            """
        )
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            run = module.dag.run(db_path=self.db, executor=executor)
        said = "liteflow.DatabaseError: tasks on a foreign executor have no database to look into"
        self.assertEqual(module.told[1], f"<DagRun webhook {run.run_id} [failed: f: {said}]>")
        self.assertEqual(module.told[0], run.get_task_instance("f").log_url)
        os.rename(self.db, self.folder / "away.db")
        run.reason = "stopped"
        self.assertEqual(str(run), f"<DagRun webhook {run.run_id} [failed: stopped]>")

    def test_a_mapped_job_of_a_foreign_executor_carries_its_own_element_alone(self):
        sizes = []

        class Weighs(concurrent.futures.ThreadPoolExecutor):
            def submit(self, run, info, message):
                sizes.append(len(message))
                return super().submit(run, info, message)

        source = """
            with DAG("mapped") as dag:
                @task
                def give(ti): ti.xcom_push("k", 5); return [b"x" * 20_000] * 9
                @task
                def same(x): return x
                @task
                def count(x, ti): return [len(x), ti.xcom_pull("give", key="k")]
                @task
                def pull(x, ti): return ti.xcom_pull("give")
                given = give()
                count.expand(x=given); same.override(task_id="far").expand(x=same.expand(x=given))
                pull.expand(x=given)
                @task
                def both(): return [3, 4]
                @task
                def place(x, every): return every.index(x)
                each = both(); place.partial(every=each).expand(x=each)
                @task
                def own(x, ti): return [x, ti.xcom_pull("g.one", map_indexes=ti.map_index)]
                @task_group
                def g(x): own(same.override(task_id="one")(x))
                g.expand(x=[1, 2])
            """
        with Weighs(2) as executor:
            run = self.run_flow(source, executor=executor)
        self.assertEqual(run.xcom_pull("count"), [[20_000, 5]] * 9)
        self.assertEqual(run.xcom_pull("g.own"), [[1, 1], [2, 2]])
        self.assertEqual(run.xcom_pull("place"), [0, 1])
        self.assertIn("only their element", run.get_task_instance("pull", 0).error)
        self.assertLess(max(sizes), 30_000)

    def test_a_kept_result_is_mapped_over_on_a_foreign_executor(self):
        flow = """
            with DAG("mended") as dag:
                @task
                def give(): return [1, 2]
                @task
                def take(x): return x + 1
                {}
            """
        self.run_flow(flow.format("take(give())"))
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            run = self.run_flow(
                flow.format("take.expand(x=give())"), executor=executor, resume=True
            )
        self.assertEqual(run.raise_if_failed().xcom_pull("take"), [2, 3])

    def test_what_a_callback_on_a_foreign_executor_is_told_of(self):
        module = self.module(
            """
            told = []
            tell = lambda context: told.append((context["run_id"], context["dag_run"].reason))
            with DAG("d", on_success_callback=tell, on_failure_callback=tell) as dag:
                @task
                def fails(dag_run): raise ValueError("no")
                @task(trigger_rule="all_done")
                def cleans(): dag.get_run("dead", db_path=DB).delete()
                fails() >> cleans()
            """
        )
        module.DB = self.db
        with contextlib.closing(liteflow._Store(str(self.db))) as store, store.transaction():
            store.create_run(module.dag, "dead", None, {})
            store.queue_run(store.run_row)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET state = 'running', owner = 'nobody'")
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            module.dag.run(db_path=self.db, run_id="new", executor=executor)
        # No failure is the reason of a success, and what was dead is told of once it is gone, too.
        self.assertEqual(sorted(module.told), [("dead", "its scheduler died"), ("new", None)])

    def test_what_a_foreign_executor_says_in_several_lines_is_the_reason(self):
        class Broken(concurrent.futures.ThreadPoolExecutor):
            def submit(self, run, info, message):
                if marshal.loads(message)[0] == "run":
                    raise RuntimeError("a worker died\n\nits log tells more")
                return super().submit(run, info, message)

        module = self.module("with DAG('d') as dag: task(task_id='a')(abs)(1)")
        with Broken(1) as executor:
            run = module.dag.run(db_path=self.db, executor=executor)
        self.assertEqual(
            run.get_task_instance("a").error,
            "the executor took no task: RuntimeError: a worker died its log tells more",
        )

    def test_what_a_foreign_executor_still_does_is_not_waited_for(self):
        module = self.module(
            """
            import threading
            begun, go = threading.Event(), threading.Event()
            with DAG("given_up", fail_fast=True) as dag:
                @task
                def waits(): begun.set(); go.wait(30)
                @task
                def bad(): begun.wait(30); raise ValueError
                waits(); bad()
            with DAG("called", on_success_callback=lambda context: go.wait(30)) as called:
                @task(on_success_callback=lambda context: go.wait(30))
                def quick(): pass
                quick()
            """
        )
        with concurrent.futures.ThreadPoolExecutor(3) as executor:
            try:
                run = module.dag.run(db_path=self.db, executor=executor)
                self.assertIn("ended by fail_fast", run.get_task_instance("waits").error)
                lines = []
                with mock.patch.object(liteflow, "_CALLBACK_LIMIT", 0.05):
                    run = module.called.run(
                        db_path=self.db, executor=executor, progress=lines.append
                    )
                self.assertEqual(run.state, "success")
                self.assertIn("a callback did not end within 0.05 s", lines)
            finally:
                module.go.set()

    def test_two_runs_that_begin_in_the_same_microsecond(self):
        module = self.module(
            """
            with DAG("twins") as dag:
                @task
                def f(run_id=None): return run_id
                f()
            """
        )
        first = module.dag.run(db_path=self.db, executor=pool())
        look_ahead = liteflow._Run._look_ahead
        self.addCleanup(setattr, liteflow._Run, "_look_ahead", look_ahead)
        for executor in (pool(), concurrent.futures.ThreadPoolExecutor(1)):
            seen = []

            def same_id(run, seen=seen):
                look_ahead(run)
                seen.append(run)
                if len(seen) == 1:
                    run.run_id = first.run_id

            liteflow._Run._look_ahead = same_id
            run = module.dag.run(db_path=self.db, executor=executor)
            self.assertEqual((run.state, len(seen)), ("success", 2))
            self.assertNotEqual(run.run_id, first.run_id)
            self.assertEqual(run.xcom_pull("f"), run.run_id)

    def test_a_module_that_runs_a_dag_as_it_is_imported_is_told_so(self):
        self.script("")
        (self.folder / "eager.py").write_text(
            "from liteflow import DAG, task\n"
            "with DAG('eager') as dag: task(task_id='a')(abs)(1)\n"
            "dag.run(max_workers=1)\n"
        )
        (self.folder / "main.py").write_text('if __name__ == "__main__":\n    import eager\n')
        done = self.python("main.py", timeout=30)
        self.assertIn("starts a run while a worker imports it", done.stderr)

    def test_what_an_initializer_raises_is_told(self):
        module = self.module("with DAG('d') as dag:\n    task(task_id='a')(abs)(1)\n")
        with (
            liteflow.WorkerPool(1, initializer=int, initargs=("no number",)) as workers,
            self.assertRaises(liteflow.UnreachableTask) as caught,
        ):
            module.dag.run(db_path=self.db, executor=workers)
        self.assertIn("initializer failed", str(caught.exception))
        self.assertIn("no number", str(caught.exception))

    def test_a_module_whose_name_is_a_loader_s(self):
        name = ".".join("p" * 99)  # of more packages than its file has folders
        self.script(
            f"""
            import importlib.util, sys
            spec = importlib.util.spec_from_file_location({name!r}, 'liteflow.py')
            flow = sys.modules[{name!r}] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(flow)
            before = [*sys.path]
            with flow.DAG("d") as dag: flow.task(task_id="a")(abs)(1)
            if __name__ == "__main__":
                with flow.WorkerPool(1) as pool:
                    print(dag.run(executor=pool).state, sys.path == before)
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(done.stdout, "success True\n", done.stderr)

    def test_a_folder_that_is_no_longer_on_the_path(self):
        """As Celery takes its working directory off it, once it has imported the program there."""
        self.script(
            "from liteflow import *\nwith DAG('d') as dag:\n    task(task_id='a')(abs)(1)\n"
        )
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "celery.py").write_text(
            "import os, sys\n"
            "if __name__ == '__main__':\n"
            "    sys.path.insert(0, os.getcwd())\n"
            "    import my_flow\n"
            "    del sys.path[0]\n"
            "    print(my_flow.dag.run(mp_context=sys.argv[1]).state)\n"
        )
        for process in [self.start("bin/celery.py", m) for m in ("forkserver", "spawn")]:
            out, err = process.communicate(timeout=LIMIT)
            self.assertEqual(out, "success\n", err)

    def test_a_module_in_the_root_folder_that_is_no_longer_on_the_path(self):
        path = [*sys.path]
        for name, by in (
            ("multiprocessing.util.Finalize", mock.Mock()),
            ("threading._register_atexit", mock.Mock()),
            ("sys.path", path),
        ):
            self.enterContext(mock.patch(name, by))
        for file, found in (("/named/otherwise", []), ("/liteflow.py", ["/"])):
            with mock.patch("liteflow.__file__", file):
                liteflow._set_up_slots.__wrapped__(by_executor=True)
            self.assertEqual([each for each in path if each == "/"], found)

    def test_a_module_that_no_worker_can_import_kills_none(self):
        # What was killed as it started would be tried again.
        only = "import multiprocessing as mp\nassert mp.parent_process() is None, 'not here'\n"
        module = self.module(f"{only}with DAG('d') as dag:\n    task(task_id='a')(abs)(1)\n")
        with WorkerPool(1, mp_context="forkserver") as workers:
            error = workers.submit(module.dag, db_path=self.db).exception(LIMIT)
        self.assertIs(type(error), UnreachableTask)
        self.assertRegex(str(error), "(?s)importing the DAG in a worker .*AssertionError: not here")

    def test_a_warm_worker_killed_just_before_a_run_is_replaced(self):
        module = self.module("with DAG('d') as dag:\n    task(task_id='a')(abs)(1)\n")
        with liteflow.WorkerPool(1) as workers:
            for _ in range(4):
                self.assertEqual(module.dag.run(db_path=self.db, executor=workers).state, "success")
                os.kill(workers._idle[0].pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no SIGSTOP")
    def test_a_warm_worker_that_was_stopped_is_replaced(self):
        module = self.module("with DAG('d') as dag:\n    task(task_id='a')(abs)(1)\n")
        with liteflow.WorkerPool(1) as workers:
            module.dag.run(db_path=self.db, executor=workers)
            stopped, join = workers._idle[0], liteflow._SlotRunner._join

            def join_soon(runner, slot) -> None:
                limit = 0.1 if slot is stopped else liteflow._START_LIMIT
                with mock.patch.object(liteflow, "_START_LIMIT", limit):
                    join(runner, slot)

            os.kill(stopped.pid, signal.SIGSTOP)
            with mock.patch.object(liteflow._SlotRunner, "_join", join_soon):
                self.assertEqual(module.dag.run(db_path=self.db, executor=workers).state, "success")

    def test_multiprocessing_may_be_half_imported_by_another_thread(self):
        half = type(sys)("multiprocessing.process")
        whole = importlib.import_module("multiprocessing.process")
        self.addCleanup(sys.modules.__setitem__, "multiprocessing.process", whole)
        sys.modules["multiprocessing.process"] = half
        self.assertFalse(liteflow._importing_in_child())
        # Its function is there, and the variable that it reads is not.
        exec("def current_process(): return _current_process", vars(half))
        self.assertFalse(liteflow._importing_in_child())

    @unittest.skipUnless(hasattr(os, "fork"), "no fork")
    def test_a_forked_pool_that_breaks_does_not_hang_the_run(self):
        self.script(
            """
            import multiprocessing, os, time
            from concurrent.futures import ProcessPoolExecutor
            from liteflow import DAG, task
            with DAG("breaks") as dag:
                @task(retries=1)
                def dies(): time.sleep(0.2); os.kill(os.getpid(), 9)
                @task
                def other(): time.sleep(60)
                dies(); other()
            if __name__ == "__main__":
                # Its workers are forked in the run, whose handlers of signals they inherit.
                pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
                print(dag.run(executor=pool).state)
            """
        )
        done = self.python("-W", "ignore", "my_flow.py", timeout=30)
        self.assertEqual(done.stdout, "failed\n", done.stderr)

    def test_run_in_a_multiprocessing_child(self):
        self.script(
            """
            import multiprocessing, sys
            from liteflow import DAG, task
            with DAG("nested") as dag:
                @task
                def f(): return 42
                f()
            def child(path): sys.exit(dag.run(db_path=path, max_workers=1).xcom_pull("f"))
            if __name__ == "__main__":
                print(dag.run(db_path="parent.db").state)
                for method in multiprocessing.get_all_start_methods():
                    for daemon in (False, True):
                        context = multiprocessing.get_context(method)
                        p = context.Process(target=child, args=("c.db",), daemon=daemon)
                        p.start(); p.join(); print(method, p.exitcode)
            """
        )
        done = self.python("-W", "ignore::DeprecationWarning", "my_flow.py")
        lines = done.stdout.splitlines()
        self.assertEqual(lines[0], "success", done.stderr)
        self.assertEqual({line.split()[1] for line in lines[1:]}, {"42"}, done.stdout + done.stderr)
        self.assertGreaterEqual(len(lines), 3)

    def test_a_multiprocessing_child_ends_with_a_pool_that_nobody_shut_down(self):
        self.script(
            """
            import multiprocessing
            from liteflow import DAG, WorkerPool, task
            with DAG("d") as dag: task(print)()
            pool = WorkerPool(1, mp_context="spawn")
            def use(): print(dag.run(db_path="c.db", executor=pool).state, flush=True)
            if __name__ == "__main__":
                use()
                for method in ("fork", "spawn"):
                    p = multiprocessing.get_context(method).Process(target=use)
                    p.start(); p.join(); print(p.exitcode)
            """
        )
        done = self.python("-W", "ignore::DeprecationWarning", "my_flow.py")
        self.assertEqual(done.stdout, "success\n" + "success\n0\n" * 2, done.stderr)

    def test_a_run_in_a_process_of_another_library(self):
        class Key(bytes):  # as that of billiard, whose processes are Celery's
            def __reduce__(self):
                raise TypeError("only as one of my own is spawned")

        config = multiprocessing.current_process()._config
        with mock.patch.dict(config, authkey=Key(config["authkey"])):
            run = self.run_flow("with DAG('d') as dag: task(print)()", mp_context="spawn")
            self.assertIs(type(config["authkey"]), Key)
        self.assertEqual(run.state, "success")

    def test_a_task_may_run_a_dag(self):
        run = self.run_flow(
            """
            with DAG("inner") as inner:
                @task
                def f(): return 7
                f()
            with DAG("outer") as dag:
                @task
                def g(): return inner.run(db_path=os.environ["CASE_DIR"] + "/inner.db", max_workers=1).xcom_pull("f")
                g()
            """,
            max_workers=1,
        )
        self.assertEqual(run.xcom_pull("g"), 7, run.get_task_instances()[0].error)

    def test_without_posix(self):
        self.script(
            """
            import concurrent.futures, os, signal, sys
            for module in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[module] = None
            gone = {
                os: "fork setsid setpgid killpg getpgrp getpgid waitid pidfd_open mkfifo geteuid "
                    "sched_getaffinity O_ASYNC O_NOFOLLOW O_NONBLOCK register_at_fork",
                signal: "SIGKILL SIGHUP SIGALRM setitimer pthread_sigmask",
            }
            for module, names in gone.items():
                for name in names.split():
                    if hasattr(module, name): delattr(module, name)
            from liteflow import DAG, Dag, WorkerPool, task
            with DAG("windows") as dag:
                @task
                def f(): return 1
                @task
                def g(x): raise ValueError("mine")
                g(f())
            def said(run):
                for ti in run.get_task_instances():
                    print(run.dag_id, ti.state.value, (ti.error or "").splitlines()[-1:])
            if __name__ == "__main__":
                for options in ({}, {"max_workers": 1}, {"mp_context": "spawn"}):
                    try: dag.run(**options)
                    except RuntimeError as error:
                        print("WSL" in str(error), "executor=" in str(error))
                print(os.path.exists("liteflow.db"))
                said(dag.test())
                threads = concurrent.futures.ThreadPoolExecutor(1)
                said(dag.run(executor=threads))
                run = Dag.load("windows").runs()[0]
                print(run.state.value, run.owner_alive, run.xcom_pull("f"))
                run.clear("g")
                said(dag.run(executor=threads, resume=True))
            """
        )
        done = self.python("my_flow.py")
        ended = "windows success []\nwindows failed ['ValueError: mine']\n"
        self.assertEqual(
            done.stdout,
            "True True\n" * 3 + "False\n" + ended * 2 + "failed False 1\n" + ended,
            done.stderr,
        )
        self.assertEqual(self.cli("show", "windows").returncode, 0)

    def test_dag_test_runs_in_this_process(self):
        module = self.module(
            """
            with DAG("debug", params={"p": 1}) as dag:
                @task
                def f(params): return [os.getpid(), params["p"]]
                @task(execution_timeout=0.2)
                def slow(): time.sleep(30)
                @task(retries=1, retry_delay=0.01)
                def flaky(ti):
                    if ti.try_number == 1: raise ValueError
                f(); slow(); flaky()
            """
        )
        run = module.dag.test(run_conf={"p": 2}, db_path=self.db)
        self.assertEqual(run.xcom_pull("f"), [os.getpid(), 2])
        self.assertEqual(self.states(run), {"f": "success", "slow": "failed", "flaky": "success"})
        self.assertTrue(run.get_task_instance("slow").error.endswith("timeout after 0.2 s"))
        with self.assertRaises(ValueError):
            module.dag.test(use_executor=True)
        self.assert_nothing_left()

    def test_a_clock_that_a_test_freezes_keeps_no_retry_waiting(self):
        with DAG("d") as d:

            @task(retries=1, retry_delay=0.01)
            def flaky(ti):
                if ti.try_number == 1:
                    raise ValueError

            flaky()
        with mock.patch.object(time, "monotonic", side_effect=AssertionError("it stands still")):
            self.assertEqual(d.test(db_path=self.db).state, "success")
        before = "import threading, time; time.monotonic = None"  # it stands still already
        copy_liteflow(self.folder)
        done = self.python("-c", f"{before}; import liteflow; print(liteflow._monotonic())")
        self.assertLess(abs(float(done.stdout) - time.monotonic()), LIMIT, done.stderr)

    def test_what_a_test_replaces_for_its_tasks_is_not_asked_for_the_run(self):
        with DAG("d") as d:
            task(task_id="there")(lambda: os.path.exists("in.csv"))()
        for found in (True, False):
            path = self.folder / f"{found}.db"
            with (
                mock.patch.object(os.path, "exists", side_effect=[found]),
                mock.patch.object(os, "makedirs"),
            ):
                run = d.test(db_path=path)
            self.assertIs(run.raise_if_failed().xcom_pull("there"), found)

    @unittest.skipUnless(hasattr(signal, "setitimer"), "there are no timers")
    def test_the_programs_own_alarm_rings_in_and_after_dag_test(self):
        rang = []
        before = signal.signal(signal.SIGALRM, lambda *_: rang.append("alarm"))
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        with DAG("d") as d:

            @task(execution_timeout=LIMIT)
            def waits(params):
                return bool(params.get("quick") or wait_until(lambda: rang, 2))

            waits()
        signal.setitimer(signal.ITIMER_REAL, 2 * LIMIT, 3)
        d.test(db_path=self.db, run_conf={"quick": True}).raise_if_failed()
        left, every = signal.setitimer(signal.ITIMER_REAL, 0.05)
        self.assertEqual((LIMIT < left <= 2 * LIMIT, every), (True, 3))
        self.assertTrue(d.test(db_path=self.db).xcom_pull("waits"))
        rang.clear()
        with DAG("e") as e:
            task(task_id="f", execution_timeout=0.3)(lambda: time.sleep(LIMIT))()
        for every in (0, 0.1):
            signal.setitimer(signal.ITIMER_REAL, 0.1, every)
            error = e.test(db_path=self.db).get_task_instance("f").error
            self.assertIn("timeout after 0.3 s", error)
            self.assertEqual(rang[: None if every == 0 else 1], ["alarm"])
            rang.clear()

    @unittest.skipUnless(hasattr(signal, "setitimer"), "there are no timers")
    def test_a_profilers_tick_is_no_timeout_in_dag_test(self):
        ticks = []
        before = signal.signal(signal.SIGVTALRM, lambda *_: ticks.append("tick"))
        self.addCleanup(signal.signal, signal.SIGVTALRM, before)

        def sleep():
            signal.raise_signal(signal.SIGVTALRM)
            try:
                time.sleep(LIMIT)
            finally:  # after the timeout as well
                signal.raise_signal(signal.SIGVTALRM)

        with DAG("inner") as inner:
            task(task_id="f", execution_timeout=LIMIT)(sleep)()
        with DAG("outer") as outer:
            around = lambda: inner.test(db_path=self.db).get_task_instance("f").error  # noqa: E731
            task(task_id="g", execution_timeout=1)(around)()
        self.assertIn("timeout after 1 s", outer.test(db_path=self.db).xcom_pull("g"))
        self.assertEqual(ticks, ["tick", "tick"])


# --- Run ------------------------------------------------------------------------------------------


class RunTest(Case):
    def test_as_many_runs_at_once_as_max_active_runs_says(self):
        begun, done = [threading.Event() for _ in range(2)], threading.Event()
        with DAG("d", max_active_runs=2) as d:

            @task
            def waits(ti):
                begun[int(ti.run_id)].set()
                done.wait(LIMIT)

            waits()
        run = functools.partial(liteflow._Run, d, db_path=self.db, in_process=True)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(run(run_id=str(i)).execute) for i in range(2)]
            try:
                for each in begun:
                    self.assertTrue(each.wait(LIMIT / 4))
                with self.assertRaisesRegex(liteflow.AlreadyRunning, "is 2: wait=True, or --wait"):
                    run(run_id="2").execute()
                stop, told = threading.Event(), []
                with self.assertRaisesRegex(liteflow.AirflowException, "stopped"):
                    run(
                        wait=True, stop=stop, progress=lambda x: told.append(x) or stop.set()
                    ).execute()
                self.assertRegex(told[0], "^waiting: run .* max_active_runs is 2$")
            finally:
                done.set()
            self.assertEqual([each.result().state for each in runs], ["success"] * 2)
        self.assertEqual(len(d.runs(self.db)), 2)

    def test_what_means_nothing_in_a_dag_is_told(self):
        class Own(liteflow.EmptyOperator):
            template_fields = ("taken",)

            def __init__(self, taken, left, **kwargs):
                super().__init__(**kwargs)
                self.taken, self.left = taken, left

        defaults = {"retrys": 3, "retries": 1, "bash_command": "true"}
        with DAG("d", default_args=defaults) as d:
            map_over = task(task_id="f")(some)
            map_over.partial(y=1)
            map_over.partial(y=1).partial(x=2)
            map_over.partial(y=1).expand(x=[1])
            map_over.partial(y=1).expand_kwargs([{"x": 1}])
            result = liteflow.BashOperator(task_id="b").output
            Own(task_id="own", taken=result, left=result)
            with TaskGroup("g", default_args={"pool_slot": 2}):
                liteflow.EmptyOperator(task_id="e")
            with liteflow.EmptyOperator(task_id="s").as_setup():
                pass  # or names what was made before
            inner = liteflow.EmptyOperator(task_id="inner").as_setup()
            with liteflow.EmptyOperator(task_id="outer").as_setup(), inner:
                liteflow.EmptyOperator(task_id="w")
        with self.assertLogs("liteflow", "INFO") as told:
            d.test(db_path=self.db)
        notes = [text.partition("note: ")[2] for text in told.output if "note: " in text]
        last = f"INFO:liteflow:d/{d.runs(self.db)[0].run_id}: run success after "
        self.assertTrue(told.output[-1].startswith(last), told.output[-1])
        partial = "task 'f': partial() without expand() makes no task"
        near = "did you mean 'pool_slots'", "did you mean 'retries'"
        left = "task 'own': 'left' is a result, and not in template_fields: it stays a placeholder"
        empty = "no task is made in `with` 's': its scope is empty"
        self.assertEqual(notes[:4], [partial, partial, left, empty])
        self.assertEqual(len(notes), 6)
        for note, words in zip(notes[4:], near, strict=True):
            self.assertRegex(note, f"default_args: no task takes .*{words}")

    def test_a_function_that_is_never_called_is_told(self):
        with DAG("d") as d:
            task(task_id="called")(sample)(1)
            task(task_id="mapped")(some).partial(y=1).expand(x=[1])
            task.run_if(bool)(liteflow.setup(task(lambda: None))).override(task_id="copied")()
            task_group(group_id="g")(lambda: None)()
            later = d.task(task_id="later")(lambda x: x)
            outside = task(task_id="outside")(lambda: None)
            task_group(group_id="forgotten")(lambda x: None)
        later(1)  # makes a task of the DAG, unlike the next
        outside()
        with self.assertLogs("liteflow", "INFO") as told:
            d.test(db_path=self.db)
        notes = [text.partition("note: ")[2] for text in told.output if "note: " in text]
        said = "without a call in the DAG it makes no task"
        self.assertEqual(notes, [f"task 'outside': {said}", f"group 'forgotten': {said}"])

    def test_an_empty_dag_is_a_success(self):
        run = DAG("empty").run(db_path=self.db)
        self.assertEqual((run.state, run.get_task_instances()), ("success", []))

    def test_the_database_is_found_in_order(self):
        os.environ["LITEFLOW_DB"] = str(self.folder / "env.db")
        self.addCleanup(os.environ.pop, "LITEFLOW_DB", None)
        DAG("a").run()
        DAG("b", db_path=self.folder / "dag.db").run()
        DAG("c", db_path=self.folder / "dag.db").run(db_path=self.db)
        for name, dag_id in (("env.db", "a"), ("dag.db", "b"), ("flow.db", "c")):
            self.assertEqual(len(Dag(dag_id).runs(self.folder / name)), 1)

    def test_a_run_id_is_used_once(self):
        d = DAG("once")
        self.assertEqual(d.run(db_path=self.db, run_id="r").run_id, "r")
        with self.assertRaises(ValueError) as caught:
            d.run(db_path=self.db, run_id="r")
        self.assertIn("'r'", str(caught.exception))
        DAG("other").run(db_path=self.db, run_id="r")

    def test_progress_goes_where_it_is_asked_to(self):
        lines = []
        self.run_flow(
            "with DAG('said') as dag:\n    task(task_id='a')(sorted)([1])\n", progress=lines.append
        )
        self.assertIn(": 1 task, in ", lines[0])
        self.assertRegex(lines[1], r"^\d\d:\d\d:\d\d  a  running$")
        self.assertRegex(lines[2], r"^\d\d:\d\d:\d\d  a  success  \S*\d")
        self.assertRegex(lines[-1], r"^run success after .*: 1 success$")
        self.run_flow(
            """
            with DAG("branching") as dag:
                @task.branch
                def b(): return "nope"
                b()
            """,
            progress=lines.append,
        )
        self.assertRegex("\n".join(lines), r"b  failed .*the branch chose 'nope'")
        self.run_flow(
            "with DAG('inner') as dag:\n    task(task_id='a')(abs)('x') >> "
            "task(task_id='b', trigger_rule='all_done')(abs)(1)\n",
            progress=lines.append,
        )
        self.assertRegex(
            lines[-1], "run success .* 1 success, 1 failed; no leaf of the graph failed"
        )
        with self.assertLogs("liteflow", "INFO") as logs:
            self.run_flow("with DAG('logged') as dag:\n    task(task_id='a')(sorted)([1])\n")
        self.assertIn("success", logs.output[-1])
        with self.assertRaises(TypeError) as caught:
            DAG("empty").run(db_path=self.db, progress="yes")
        self.assertIn("'yes'", str(caught.exception))

    def test_a_chain_of_empty_operators_passes_at_once(self):
        run = self.run_flow("""
            with DAG("empties") as dag:
                chain(*(EmptyOperator(task_id=f"e{i}") for i in range(50)))
        """)
        self.assertEqual(set(self.states(run).values()), {"success"})
        self.assertLess(run.duration, 2)

    def test_a_stop_event_ends_the_run(self):
        stop = threading.Event()
        here = self.folder / "here"
        threading.Thread(target=lambda: wait_until(here.exists) and stop.set()).start()
        run = self.run_flow(
            """
            with DAG("endless") as dag:
                @task
                def f():
                    try: (Path(os.environ["CASE_DIR"]) / "here").touch(); time.sleep(60)
                    finally: print("cleaned up")
                @task
                def g(x): pass
                g(f())
            """,
            stop=stop,
        )
        self.assertEqual((run.state, run.reason), ("failed", "stopped"))
        self.assertEqual(self.states(run), {"f": None, "g": None})
        self.assertEqual(self.query("SELECT state FROM task_attempt"), [("interrupted",)])
        self.assertEqual(run.log("f"), "cleaned up\n")
        self.assert_nothing_left()

    def test_handlers_of_the_host_stay_as_they_were(self):
        def mine(*_):
            pass

        before = signal.signal(signal.SIGTERM, mine)
        self.addCleanup(signal.signal, signal.SIGTERM, before)
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        self.run_flow("with DAG('d') as dag:\n    task(task_id='a')(sorted)([1])\n")
        self.assertEqual(
            [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], handlers
        )

    def test_many_runs_leave_nothing_in_the_process(self):
        source = "with DAG('d') as dag:\n    task(task_id='a')(sorted)([1])\n"
        module = self.module(source)
        module.dag.run(db_path=self.db, max_workers=1)

        def belongings():
            return (
                threading.active_count(),
                len(os.listdir("/dev/fd")),
                len(logging.root.handlers),
            )

        before = belongings()
        for _ in range(200 if SOAK else 4):
            module.dag.run(db_path=self.db, max_workers=2)
        self.assertEqual(belongings(), before)


class ResumeTest(Case):
    FIRST = """
        with DAG("mended") as dag:
            @task
            def a(): (Path(os.environ["CASE_DIR"]) / "a").open("a").write("x"); return 1
            @task(retries=1)
            def b(x): raise ValueError("broken")
            @task
            def gone(x): return x
            @task
            def c(x): return x
            x = a(); gone(x); c(b(x))
    """
    SECOND = """
        with DAG("mended") as dag:
            @task
            def a(): (Path(os.environ["CASE_DIR"]) / "a").open("a").write("x"); return 1
            @task(retries=1)
            def b(x): return x + 1
            @task
            def new(x): return x
            @task
            def c(x, y): return [x, y]
            x = a(); c(b(x), new(x))
    """

    def test_a_mended_run_goes_on_where_it_failed(self):
        first = self.run_flow(self.FIRST, conf={"k": 1})
        self.assertEqual(
            self.states(first),
            {"a": "success", "b": "failed", "gone": "success", "c": "upstream_failed"},
        )
        lines = []
        second = self.run_flow(self.SECOND, resume=True, progress=lines.append)
        self.assertEqual(second.run_id, first.run_id)
        self.assertEqual(second.conf, {"k": 1})
        self.assertEqual(second.logical_date, first.logical_date)
        self.assertEqual(
            self.states(second),
            {"a": "success", "b": "success", "gone": "removed", "c": "success", "new": "success"},
        )
        self.assertEqual(second.xcom_pull("c"), [2, 1])
        self.assertEqual((self.folder / "a").read_text(), "x")
        ti = second.get_task_instance("b")
        self.assertEqual((ti.try_number, ti.max_tries), (3, 3))
        said = "\n".join(lines)
        for words in (
            "kept, as they succeeded: a",
            "new in the code, will run: new",
            "gone from the code, now removed: gone",
        ):
            self.assertIn(words, said)
        states = self.query(
            "SELECT try_number, state FROM task_attempt JOIN task_instance t ON "
            "t.id = task_instance_id WHERE task_id = 'b'".replace(
                "try_number, state", "task_attempt.try_number, task_attempt.state"
            )
        )
        self.assertEqual(sorted(states), [(1, "failed"), (2, "failed"), (3, "success")])

    def test_rows_are_known_by_their_columns_names(self):
        """In PyPy an object's attributes are in the order that others of its class had."""

        class Row(types.SimpleNamespace):
            def __init__(self, **named):
                super().__init__(**dict(sorted(named.items())))

        self.run_flow(self.FIRST)
        with mock.patch.object(liteflow, "_Row", Row):
            second = self.run_flow(self.SECOND, resume=True)
        self.assertEqual(second.xcom_pull("c"), [2, 1])

    def test_what_is_gone_is_named_in_order(self):
        source = """
            with DAG("shrunk") as dag:
                for n in range(%d): task(task_id=f"t{n}")(sorted)([1])
                task(task_id="fails")(sorted)(1)
        """
        lines = []
        self.run_flow(source % 9)
        self.run_flow(source % 0, resume=True, progress=lines.append)
        self.assertIn("gone from the code, now removed: t0, t1, t2, t3, t4", "\n".join(lines))

    def test_a_success_is_not_run_again(self):
        self.run_flow(self.SECOND)
        lines = []
        run = self.run_flow(self.SECOND, resume=True, progress=lines.append)
        self.assertEqual((run.state, (self.folder / "a").read_text()), ("success", "x"))
        self.assertIn("nothing to resume", lines[-1])

    def test_what_cannot_be_resumed(self):
        self.run_flow(self.FIRST)
        with self.assertRaises(liteflow.RunNotFound) as caught:
            self.run_flow(self.FIRST, resume=True, run_id="absent")
        self.assertIn("; there is 'manual__", str(caught.exception))
        self.assertIn("'absent'", str(caught.exception))
        with self.assertRaises(liteflow.RunNotFound):
            DAG("never").run(db_path=self.db, resume=True)
        self.db = self.folder / "absent.db"
        with self.assertRaises(DatabaseError):
            self.run_flow(self.FIRST, resume=True)
        self.assertFalse(self.db.exists())

    def test_poison_ends(self):
        module = self.module(
            """
            with DAG("poison") as dag:
                @task(retries=1)
                def f(): pass
                f()
            """
        )
        module.dag.run(db_path=self.db, executor=pool())
        lost = 0
        while True:
            # What a scheduler leaves that died with the task.
            self.abandon()
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE task_instance SET lost = ?", (lost,))
            run = module.dag.run(db_path=self.db, resume=True, executor=pool())
            if run.state == "failed":
                break
            lost += 1
        self.assertEqual(lost + 1, 1 + 3)
        self.assertIn("4 times in a row", run.get_task_instance("f").error)

    def test_suspects_run_one_by_one_on_an_executor_too(self):
        module = self.module(
            """
            with DAG("suspects") as dag:
                @task
                def f(i):
                    here.append(i)
                    time.sleep(0.01)
                    here.remove(i)
                    return [*here]
                f.expand(i=[*range(4)])
            here = []
            """
        )
        module.dag.run(db_path=self.db, executor=pool())
        self.abandon()
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            run = module.dag.run(db_path=self.db, resume=True, executor=threads)
        self.assertEqual(run.xcom_pull("f"), [[]] * 4)


def quiet(x=None):
    """A task that does nothing."""


class FlowCase(Case):
    """Runs in this process, of DAGs that the test builds: `self.ran` says what ran, in order."""

    def setUp(self):
        super().setUp()
        self.ran = []
        self.bad = set()  # names, or (name, element), of what fails

    def step(self, name, result=None, skips=False, **settings):
        """A task function that takes anything, and says that it ran."""

        def act(x=None, *taken, ti=None):
            self.ran.append(name if ti.map_index < 0 else f"{name}:{x}")
            if self.bad & {name, (name, x if ti.map_index >= 0 else None)}:
                raise ValueError(f"{name} is broken")
            if skips:
                raise AirflowSkipException
            return result(x, *taken) if callable(result) else result

        kind = {"setup": liteflow.setup, "teardown": liteflow.teardown, "branch": task.branch}
        return kind.get(settings.pop("kind", ""), task)(task_id=name, **settings)(act)

    def go(self, made, **options):
        """Run it here; what ran."""
        self.ran.clear()
        with contextlib.redirect_stderr(io.StringIO()):
            options = {"in_process": True, "db_path": self.db, **options}
            self.last = liteflow._Run(made, **options).execute()
        return sorted(self.ran)

    def resume(self, made, **options):
        return self.go(made, resume=True, **options)

    def die(self, made, at, committed=True, sure=True, **options):
        """A run whose scheduler dies at a commit of its turns: nothing more of it is written.

        Not `sure`: it may end before."""
        record, turns = liteflow._Store.record, itertools.count(1)

        def dying(store, *args):
            turn = next(turns)
            if turn < at or committed:
                record(store, *args)
            if turn >= at:
                store.owner = "nobody"
                raise liteflow.AlreadyRunning("its scheduler died")

        dead = (self.assertRaises if sure else contextlib.suppress)(liteflow.AlreadyRunning)
        with mock.patch.object(liteflow._Store, "record", dying), dead:
            self.go(made, **options)
        return sorted(self.ran)

    def state_of(self, *names):
        found = self.states(self.last.refresh())
        return [found.get(name) for name in names]

    def dump(self):
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            return list(db.iterdump())


class Boxed:
    def __init__(self, names):
        self.names = names


class OddZone(datetime.tzinfo):
    """Whose repr is another one for each."""

    def utcoffset(self, moment):
        return datetime.timedelta(hours=1)


@dataclasses.dataclass(eq=False)
class Made:
    name: str
    suffix: dataclasses.InitVar[str]


class AgainTest(FlowCase):
    """What a resume keeps, and what it runs again."""

    def test_who_is_told_of_a_resume_may_wait_for_a_thread_that_looks(self):
        with DAG("d") as made:
            self.step("a")() >> self.step("b")()
        self.bad = {"b"}
        self.go(made)
        waited = []

        def tell(line):  # a logging handler does so, for another thread's line on a run
            looking = threading.Thread(target=made.get_run, args=(self.last.run_id, self.db))
            looking.start()
            looking.join(2)
            waited.append(f"{line}: {looking.is_alive()}")

        self.resume(made, progress=tell)
        self.assertEqual(waited[0], "kept, as they succeeded: a: False")
        self.assertNotIn(": True", "".join(waited))

    def test_a_resume_that_can_t_be_told_of_has_failed(self):
        with DAG("d") as made:
            self.step("a")() >> self.step("b")()
        self.bad = {"b"}
        self.go(made)

        def tell(line):
            raise OSError("nobody listens")

        with self.assertRaisesRegex(OSError, "nobody listens"):
            self.resume(made, progress=tell)
        again = made.get_run(self.last.run_id, self.db)
        self.assertEqual((again.state, again.reason), ("failed", "OSError: nobody listens"))

    def test_what_fails_as_the_run_is_stopped_is_not_tried_again_before_a_resume(self):
        stop = threading.Event()

        def act(ti=None):
            self.ran.append(f"{ti.task_id}:{ti.try_number}")
            time.sleep(0 if stop.is_set() else liteflow._GLANCE)
            stop.set()
            raise ValueError

        with DAG("d") as d:
            task(task_id="once", retries=2)(act)()
            self.step("after")()
        self.assertEqual(self.go(d, stop=stop), ["once:1"])
        self.assertEqual(self.last.reason, "stopped")
        self.assertEqual(self.resume(d), ["after", "once:2", "once:3"])

    # Setups.

    def scope(self, end="umount"):
        with DAG("scope") as d:
            mount = self.step("mount", kind="setup")()
            work = self.step("work")()
            mount >> work
            if end is not None:
                work >> self.step(end, kind="teardown")().as_teardown(setups=mount)
        return d

    def test_work_never_runs_again_outside_of_its_setup(self):
        self.bad = {"work"}
        self.assertEqual(self.go(self.scope()), ["mount", "umount", "work"])
        self.bad = set()
        self.resume(self.scope())
        self.assertEqual(self.ran, ["mount", "work", "umount"])
        self.assertEqual(self.last.state, "success")

    def test_a_teardown_that_is_gone_from_the_code_has_torn_down_its_setup(self):
        for number, end in enumerate(["unmount", None]):
            self.bad = {"work"}
            self.go(self.scope(), run_id=str(number))
            self.bad = set()
            self.assertEqual(self.resume(self.scope(end)), ["mount", *filter(None, [end]), "work"])
            self.assertEqual(self.ran[:2], ["mount", "work"])

    def test_a_setup_that_was_cleared_alone_is_torn_down_again(self):
        self.go(self.scope())
        self.last.clear("mount", downstream=False)
        self.resume(self.scope())
        self.assertEqual(self.ran, ["mount", "umount"])

    def test_a_teardown_of_an_element_that_is_gone_has_torn_down_no_other(self):
        def flow(elements):
            with DAG("d") as d:

                @liteflow.task_group
                def each(x):
                    mount = self.step("mount", kind="setup")(x)
                    work = self.step("work", retries=1, retry_delay=0.3)(x)
                    mount >> work
                    work >> self.step("umount", kind="teardown")(x).as_teardown(setups=mount)

                each.expand(x=elements)
            return d

        seen = 0
        for at in range(4, 8):
            self.bad = {("work", "b")}
            ran = self.die(flow(["a", "b"]), at, sure=False, run_id=str(at))
            self.bad = set()
            if "umount:a" in ran and "umount:b" not in ran:
                seen += 1
                self.resume(flow(["b"]), run_id=str(at))
                self.assertEqual(self.ran, ["work:b", "umount:b"])
        self.assertTrue(seen)

    def test_a_teardown_of_all_elements_that_becomes_one_of_each_has_torn_down_all(self):
        def flow(of_each):
            with DAG("d") as d:

                @task_group(prefix_group_id=False)
                def each(x):
                    self.step("mount", kind="setup")(x) >> self.step("work")(x)
                    if of_each:
                        self.step("umount", kind="teardown")(x)

                each.expand(x=["a"])
                if not of_each:
                    self.step("umount", kind="teardown")()
                d["work"] >> d["umount"].as_teardown(setups=d["mount"])
            return d

        self.bad = {"work"}
        self.assertEqual(self.go(flow(False)), ["mount:a", "umount", "work:a"])
        self.bad = set()
        self.resume(flow(True))
        self.assertEqual(self.ran, ["mount:a", "work:a", "umount:a"])

    def test_what_runs_below_one_that_was_cleared_alone_is_work_like_any(self):
        def flow():
            d = self.scope()
            with d:
                first, report = self.step("first")(), self.step("report", trigger_rule="all_done")()
                first >> self.step("second")() >> d.task_dict["work"] >> report
            return d

        self.bad = {"first"}
        self.assertEqual(self.go(flow()), ["first", "mount", "report", "umount"])
        self.bad = set()
        self.last.clear("first", downstream=False)
        self.resume(flow())
        self.assertEqual({*self.ran[:2]}, {"first", "mount"})
        self.assertEqual(self.ran[2:4], ["second", "work"])
        self.assertEqual({*self.ran[4:]}, {"report", "umount"})

    def test_a_chain_of_tasks_that_were_cleared_alone_is_decided_in_one_look(self):
        with DAG("d") as d:
            liteflow.chain(*(self.step(f"s{i}")() for i in range(9)))
        ran = self.go(d)
        self.last.clear(ran, downstream=False)
        with mock.patch("liteflow._Resumption", wraps=liteflow._Resumption) as looks:
            self.resume(d)
        self.assertEqual((self.ran, looks.call_count), (ran, 1))

    def test_killed_in_the_middle_of_a_scope_the_setup_is_kept(self):
        self.die(self.scope(), at=2)
        self.assertEqual(self.ran, ["mount"])
        self.resume(self.scope())
        self.assertEqual(self.ran, ["work", "umount"])

    def test_a_teardown_that_was_sent_when_its_scheduler_died_may_have_begun(self):
        self.bad = {"work"}
        # Dead once the teardown was sent, before anybody recorded that it ran.
        self.die(self.scope(), at=4, committed=False)
        self.assertEqual(self.ran, ["mount", "work", "umount"])
        self.bad = set()
        self.resume(self.scope())
        self.assertEqual(self.ran, ["mount", "work", "umount"])

    def test_a_sensor_that_was_given_up_between_two_pokes_did_not_skip_itself(self):
        with DAG("d", fail_fast=True) as d:
            sensor = task.sensor(task_id="sensor", mode="reschedule", poke_interval=60)
            sensor(quiet)()
            self.step("bad")()
        self.bad = {"bad"}
        self.go(d)
        self.assertEqual(self.state_of("sensor", "bad"), ["skipped", "failed"])
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            [attempt] = db.execute(
                "SELECT a.state, error FROM task_attempt a JOIN task_instance ON id = "
                "task_instance_id WHERE task_id = 'sensor'"
            )
        self.assertEqual(attempt, ("failed", "ended by fail_fast"))

    def test_what_is_mapped_over_what_a_branch_chose_is_resumed(self):
        with DAG("d") as d:
            branch = self.step("branch", ["each", "x"], kind="branch")()
            branch >> [self.step("x")(), self.step("y")()]
            self.step("each").expand(x=branch)
        self.bad = {("each", "x")}
        self.go(d)
        self.bad = set()
        self.assertEqual(self.resume(d), ["each:x"])
        self.assertEqual(
            self.state_of("each[0]", "each[1]", "y"), ["success", "success", "skipped"]
        )

    def test_what_a_branch_chose_is_forgotten_once_it_runs_again(self):
        def flow(**skips):
            with DAG("d") as d:
                branch = self.step("branch", "x", kind="branch", **skips)()
                rule = {"trigger_rule": "none_failed"}
                branch >> [self.step("x", **rule)(), self.step("y", **rule)()]
            return d

        self.bad = {"x"}
        self.go(flow())
        self.bad = {"y"}
        self.resume(flow(skips=True), again=["branch"])
        self.assertEqual(self.state_of("branch", "x", "y"), ["skipped", "success", "failed"])
        self.bad = set()
        self.assertEqual(self.resume(flow(skips=True)), ["y"])

    def test_work_below_what_could_not_be_expanded_takes_its_setup_along(self):
        def flow(waits):
            with DAG("d") as d:
                many, bad = self.step("many", [1, 2])(), self.step("bad")()
                each = self.step("each").expand(x=many)
                _ = bad >> each if waits else None
                s, w = self.step("s", kind="setup")(), self.step("w")(each)
                s >> w >> self.step("end", kind="teardown")().as_teardown(setups=s)
            return d

        self.bad = {"bad"}
        self.go(flow(waits=True))
        self.assertEqual(self.state_of("each", "w", "end"), ["upstream_failed"] * 2 + ["success"])
        self.bad = set()
        self.resume(flow(waits=False))  # now it can be: nothing that runs again stands above it
        self.assertEqual(
            [name for name in self.ran if name in ("s", "w", "end")], ["s", "w", "end"]
        )

    def test_a_setup_is_kept_where_the_work_in_its_scope_is_left_out_again(self):
        with DAG("d") as d:
            s, none = self.step("s", kind="setup")(), self.step("none", skips=True)()
            w, end = self.step("w")(none), self.step("end", kind="teardown")()
            s >> w >> end.as_teardown(setups=s)
            self.step("z")()
        self.bad = {"z"}
        self.go(d)
        self.assertEqual(self.state_of("w", "s", "end"), ["skipped", "success", "success"])
        self.bad = set()
        self.assertEqual(self.resume(d), ["z"])

    def test_a_teardown_that_failed_takes_along_what_hangs_on_it(self):
        with DAG("d") as d:
            s, end = self.step("s", kind="setup")(), self.step("end", kind="teardown")()
            s >> self.step("w")() >> end.as_teardown(setups=s)
            end >> self.step("after", trigger_rule="all_done")()
            self.step("z")()
        self.bad = {"end", "z"}
        self.go(d)
        self.bad = set()
        self.assertEqual(self.resume(d), ["after", "end", "z"])

    def nested(self):
        with DAG("nested") as d:
            outer, inner = self.step("outer", kind="setup")(), self.step("inner", kind="setup")()
            w, v = self.step("w")(), self.step("v")()
            drop = self.step("drop", kind="teardown")()
            stop = self.step("stop", kind="teardown")()
            chain(outer, w, inner, v, drop, stop)
            drop.as_teardown(setups=inner)
            stop.as_teardown(setups=outer)
        return d

    def test_a_setup_that_is_taken_along_and_gives_fewer_fails_what_it_gave_before(self):
        def flow(given):
            with DAG("d") as d:
                mount = self.step("mount", given, kind="setup")()
                work = self.step("work").expand(x=mount)
                umount = self.step("umount", kind="teardown")()
                mount >> work >> umount.as_teardown(setups=mount)
            return d

        self.bad = {("work", "c")}
        self.go(flow(["a", "b", "c"]))
        self.bad = set()
        self.assertEqual(self.resume(flow(["a", "b"])), ["mount", "umount"])
        self.assertEqual(self.state_of("work[1]", "work[2]"), ["success", "failed"])
        self.assertIn("no element 2 any more", self.last.get_task_instance("work", 2).error)

    def test_what_is_mapped_over_a_mapped_setup_that_is_taken_along_keeps_its_element(self):
        with DAG("d") as d:
            mount = self.step("mount", str.upper, kind="setup").expand(x=["a", "b", "c"])
            work = self.step("work").expand(x=mount)
            umount = self.step("umount", kind="teardown")()
            mount >> work >> umount.as_teardown(setups=mount)
        self.bad = {("work", "B"), ("work", "C")}
        self.go(d)
        self.bad = set()
        self.resume(d)
        self.assertEqual([name for name in self.ran if "work" in name], ["work:B", "work:C"])

    def test_a_setup_that_gives_fewer_gives_nobody_the_combination_of_another(self):
        def flow(given):
            with DAG("d") as d:

                @task
                def work(x, y):
                    if "work" in self.bad and x == "a":
                        raise ValueError
                    return f"{x}{y}"

                mount = self.step("mount", given, kind="setup")()
                umount = self.step("umount", kind="teardown")()
                made = work.expand(x=["a", "b"], y=mount)
                mount >> made >> umount.as_teardown(setups=mount)
            return d

        self.bad = {"work"}
        self.go(flow([1, 2, 3]))
        self.bad = set()
        self.resume(flow([1, 2]))
        self.assertEqual(self.last.xcom_pull("work"), ["b1", "b2", "b3"])
        self.resume(flow([1, 2]))
        self.assertEqual(self.last.state, "success")
        self.assertEqual(self.last.xcom_pull("work"), ["a1", "a2", "b1", "b2"])

    def test_what_is_mapped_anew_over_an_old_result_that_is_no_list_does_not_run(self):
        def flow(over):
            with DAG("d") as d:
                given = {"many": self.step("many", [1, 2])(), "one": self.step("one", 5)()}
                each = self.step("each")
                each.expand(x=given[over]) if over else each(given["one"])
            return d

        for before in ("many", None):
            with self.subTest(before=before):
                self.db = self.folder / f"{before}.db"
                self.bad = {"each"}
                self.go(flow(before))
                self.bad = set()
                self.assertEqual(self.resume(flow("one")), [])
                self.assertEqual(self.last.state, "failed")
                self.assertEqual(self.last.get_task_instance("each").state, "upstream_failed")

    def test_a_setup_that_is_taken_along_takes_those_around_it_along(self):
        for order in (1, -1):
            with self.subTest(order=order):
                self.db = self.folder / f"{order}.db"
                made = self.nested()
                made.task_dict = dict(list(made.task_dict.items())[::order])
                self.bad = {"v"}
                self.go(made)
                self.bad = set()
                self.resume(made)
                self.assertEqual(self.ran, ["outer", "inner", "v", "drop", "stop"])

    def test_an_inner_setup_without_work_right_below_the_outer_one(self):
        with DAG("d") as d:
            outer, inner = self.step("outer", kind="setup")(), self.step("inner", kind="setup")()
            w, v = self.step("w")(), self.step("v")()
            drop = self.step("drop", kind="teardown")()
            stop = self.step("stop", kind="teardown")()
            chain(outer, w, inner, v, drop)
            inner >> stop
            drop.as_teardown(setups=inner)
            stop.as_teardown(setups=outer)
        self.bad = {"v"}
        self.go(d)
        self.bad = set()
        self.resume(d)
        self.assertLess(self.ran.index("outer"), self.ran.index("inner"))

    def test_a_failed_inner_teardown_runs_again_inside_the_outer_scope(self):
        made = self.nested()
        self.bad = {"drop"}
        self.go(made)
        self.last.clear("drop")
        self.bad = set()
        self.resume(made)
        self.assertLess(self.ran.index("outer"), self.ran.index("drop"))
        self.assertLess(self.ran.index("drop"), self.ran.index("stop"))

    def test_a_branch_whose_choice_is_gone_from_the_code_chooses_anew(self):
        def flow(name):
            with DAG("d") as d:
                pick = self.step("pick", [name], kind="branch")()
                pick >> [self.step(name)(), self.step("other")()]
            return d

        self.bad = {"smal"}
        self.go(flow("smal"))
        self.bad = set()
        self.assertEqual(self.resume(flow("small")), ["pick", "small"])
        self.assertEqual(self.state_of("small", "other"), ["success", "skipped"])

    def test_a_task_that_is_new_in_a_mapped_group_runs_for_each_index(self):
        def flow(new):
            with DAG("d") as d:
                listed = self.step("listed", [1, 2])()

                @task_group
                def g(x):
                    old = self.step("old", lambda x: x)(x)
                    if new:
                        self.step("new")(old)
                    if new == "and above":
                        self.step("above")(x) >> old

                g.expand(x=listed)
                self.step("bad")()
            return d

        self.bad = {"bad"}
        self.go(flow(""))
        self.assertEqual(self.resume(flow("below")), ["bad", "new:1", "new:2"])
        self.assertEqual(self.state_of("g.new[0]", "g.new[1]"), ["success"] * 2)
        ran = [f"{name}:{i}" for name in ("above", "new", "old") for i in (1, 2)]
        self.assertEqual(sorted(self.resume(flow("and above"))), sorted(["bad", *ran]))

    def test_a_constant_that_is_new_beside_a_result_runs_with_each_element_of_it(self):
        def act(x, y):
            self.ran.append(f"{x}{y}")
            if x in self.bad:
                raise ValueError(x)

        def flow(constants):
            with DAG("d") as d:
                listed = self.step("listed", [1, 2])()
                task(task_id="f")(act).expand(x=list(constants), y=listed)
            return d

        self.bad = {"b"}
        self.assertEqual(self.go(flow(["a", "b"])), ["a1", "a2", "b1", "b2", "listed"])
        self.bad = set()
        self.assertEqual(self.resume(flow("abc")), ["b1", "b2", "c1", "c2"])

    def test_what_is_mapped_apart_hangs_on_all_instances_whatever_their_index(self):
        with DAG("d") as d:
            s = self.step("s", kind="setup").expand(x=["p", "q"])
            w = self.step("w").expand(x=["p", "q"])
            t = self.step("t", kind="teardown")()
            s >> w >> t.as_teardown(setups=s)
            w >> self.step("after", trigger_rule="all_done").expand(x=["p", "q"])
            self.step("z")()
        self.bad = {("w", "q"), "z"}
        self.go(d)
        self.bad = set()
        self.assertEqual(self.resume(d), ["after:p", "after:q", "s:p", "s:q", "t", "w:q", "z"])

    def test_a_mapped_setup_that_moves_knows_its_teardown(self):
        def flow(elements):
            with DAG("d") as d:

                @task_group
                def g(x):
                    s, w = self.step("s", kind="setup")(x), self.step("w")(x)
                    t = self.step("t", kind="teardown")(x)
                    s >> w >> t.as_teardown(setups=s)

                g.expand(x=elements)
            return d

        self.bad = {("w", "a")}
        self.go(flow(["b", "a"]))
        self.bad = set()
        self.resume(flow(["a"]))
        self.assertEqual(self.ran, ["s:a", "w:a", "t:a"])

    def test_what_a_setup_that_is_taken_along_lets_run_pulls_what_hangs_on_it(self):
        def flow(first):
            with DAG("d") as d:
                s, t = self.step("s", kind="setup")(), self.step("t", kind="teardown")()
                w = self.step("w").expand(x=["c"] if first else ["e"])
                late, v = self.step("late")(), self.step("v")()
                last = self.step("last", trigger_rule="all_done")()
                s >> w >> t.as_teardown(setups=s)
                s >> late >> v >> last
                self.step("z")()
                if first:
                    w >> late
            return d

        self.bad = {("w", "c"), "z"}
        self.go(flow(True))
        self.assertEqual(self.state_of("late", "v", "last"), ["upstream_failed"] * 2 + ["success"])
        self.bad = set()
        self.assertEqual(self.resume(flow(False)), ["last", "late", "s", "t", "v", "w:e", "z"])

    # Lists.

    def loading(self, elements):
        with DAG("load") as d:
            self.step("load", result=lambda x: x).expand(x=elements)
            self.step("z")()
        return d

    def test_a_list_that_became_shorter_keeps_what_it_still_has(self):
        self.bad = {("load", "bad"), "z"}
        self.go(self.loading(["a", "bad", "b"]))
        self.bad = {"z"}
        self.assertEqual(self.resume(self.loading(["a", "b"])), ["z"])
        states = self.state_of("load[0]", "load[1]", "load[2]")
        self.assertEqual(states, ["success", "success", "removed"])
        self.assertEqual([self.last.xcom_pull("load", map_index=i) for i in (0, 1)], ["a", "b"])
        self.assertEqual(self.resume(self.loading(["b"])), ["z"])
        self.assertEqual(self.last.xcom_pull("load"), ["b"])
        self.assertEqual(self.last.xcom_pull("load", map_index=0), "b")
        self.assertEqual(self.resume(self.loading([])), ["z"])
        self.assertEqual(self.state_of("load"), ["skipped"])
        self.bad = set()
        self.assertEqual(self.resume(self.loading(["b", "c"])), ["load:b", "load:c", "z"])

    def test_an_element_that_comes_back_is_a_new_one(self):
        self.bad = {"z"}
        self.go(self.loading(["a", "b"]))
        self.resume(self.loading(["a"]))
        self.assertEqual(self.resume(self.loading(["a", "b"])), ["load:b", "z"])
        self.assertEqual(self.last.get_task_instance("load", 1).try_number, 1)
        self.assertEqual(self.state_of("load[1]", "load[2]"), ["success", "removed"])

    def test_elements_whose_pickle_or_repr_is_another_each_time_are_known_again(self):
        for first, second in (  # colliding numbers stand in a set as they came
            ([Boxed({0, 8}), Boxed({1})], [Boxed({1}), Boxed({8, 0})]),
            ([Made("a", "x"), Made("b", "x")], [Made("b", "x"), Made("a", "x")]),
            ([Path("a", "b"), Path("c")], [Path("c"), Path("a/b")]),
            ([datetime.time(n, 0, 0, 0, OddZone()) for n in order] for order in ((1, 2), (2, 1))),
            ([("a", frozenset({0, 8})), ("c", None)], [("c", None), ("a", frozenset({8, 0}))]),
            (
                [TriggerRule.ALWAYS, TriggerRule.ALL_DONE],
                [TriggerRule.ALL_DONE, TriggerRule.ALWAYS],
            ),
        ):
            self.bad, known = {"last"}, []
            for elements in (first, second):
                with DAG("d") as d:
                    self.step("last")(self.step("load").expand(x=elements))
                self.go(d, resume=elements is second)
                newest = "task_id = 'load' AND dag_run_id = (SELECT max(id) FROM dag_run)"
                sql = f"SELECT element FROM task_instance WHERE {newest} ORDER BY map_index"
                known.append(self.query(sql))
            self.assertEqual(self.ran, ["last"])
            self.assertEqual(known[0], known[1][::-1])  # by themselves, not by their index

    def test_elements_that_change_places_or_stand_twice_keep_their_success(self):
        self.bad = {"z"}
        self.go(self.loading(["a", "b", "a"]))
        self.assertEqual(self.resume(self.loading(["b", "a", "c", "a"])), ["load:c", "z"])
        self.assertEqual(self.resume(self.loading(["a", "a", "a", "b"])), ["load:a", "z"])
        values = [self.last.xcom_pull("load", map_index=i) for i in range(4)]
        self.assertEqual(values, ["a", "a", "a", "b"])
        listed = [x.map_index for x in self.last.xcoms() if x.task_id == "load"]
        self.assertEqual(listed, [0, 1, 2, 3])

    def test_what_takes_a_whole_list_runs_again_when_an_element_comes_goes_or_moves(self):
        def flow(elements):
            with DAG("d") as d:
                loaded = self.step("load", result=lambda x: x).expand(x=elements)
                self.step("total", result=lambda xs: "".join(xs))(loaded)
                loaded >> self.step("order")()
                self.step("z")()
            return d

        self.bad = {"z"}
        self.go(flow(["a", "b"]))
        for elements in (["b"], ["b", "c"], ["c", "b"]):
            ran = self.resume(flow(elements))
            self.assertIn("total", ran)
            self.assertEqual(self.last.xcom_pull("total"), "".join(elements))
        self.assertNotIn("order", ran)
        self.assertEqual(self.resume(flow(["c", "b"])), ["z"])

    def test_what_is_mapped_over_results_follows_a_list_that_changes(self):
        def flow(elements):
            with DAG("d") as d:
                loaded = self.step("load", result=lambda x: x).expand(x=elements)
                self.step("each", result=lambda x: x).expand(x=loaded)
            return d

        self.bad = {("each", "d")}
        self.go(flow(["c", "b", "d"]))
        self.bad = set()
        self.assertEqual(self.resume(flow(["d"])), ["each:d"])
        self.assertEqual(self.state_of("each[0]", "each[1]"), ["success", "removed"])

    def test_a_task_that_becomes_mapped_and_back_begins_anew(self):
        def flow(how):
            with DAG("d") as d:
                listed = self.step("listed", result=[5, 6])()
                t = self.step("t", result=lambda x: x)
                t.expand(x=how) if isinstance(how, list) else (
                    t.expand(x=listed) if how == "each" else t(listed if how == "all" else how)
                )
                self.step("z")()
            return d

        self.bad = {"z"}
        self.go(flow(1))
        steps = (
            ([1, 2, 3], ["t:1", "t:2", "t:3"]), (1, ["t"]), ([], []), ("all", ["t"]),
            ("each", ["t:5", "t:6"]), ("all", ["t"]), ([5], ["t:5"]), ("each", ["t:5", "t:6"]),
        )  # fmt: skip
        for how, ran in steps:
            with self.subTest(how=how):
                self.assertEqual(self.resume(flow(how)), [*ran, "z"])
                states = self.states(self.last)
                now = {k: s for k, s in states.items() if k.startswith("t") and s != "removed"}
                mapped = isinstance(how, list) or how == "each"
                wanted = {f"t[{i}]": "success" for i in range(len(ran))} if mapped else {}
                self.assertEqual(now, wanted or {"t": "success" if ran else "skipped"})

    def test_a_result_by_name_is_taken_as_one_by_place(self):
        def flow(name):
            with DAG("d") as d:
                made = {x: self.step(x, result=x)() for x in "ab"}
                last = self.step("last", result=str)(x=made[name])
                [*made.values()] >> last
                self.step("z")()
            return d

        self.bad = {"z"}
        self.go(flow("a"))
        self.assertEqual(self.resume(flow("b")), ["last", "z"])
        self.assertEqual(self.last.xcom_pull("last"), "b")

    def test_what_takes_a_skipped_task_follows_whether_that_is_mapped(self):
        def flow(mapped):
            with DAG("d") as d:
                none = self.step("none", skips=True)()
                t = self.step("t")
                t = t.expand(x=[]) if mapped else t()
                none >> t
                self.step("taker", result=lambda x: repr(x), trigger_rule="none_failed")(t)
                self.step("z")()
            return d

        self.bad = {"z"}
        self.go(flow(True))
        for mapped, ran in ((True, []), (False, ["taker"]), (False, []), (True, ["taker"])):
            with self.subTest(mapped=mapped):
                self.assertEqual(self.resume(flow(mapped)), [*ran, "z"])
                taken = "<the results of 0 instances>" if mapped else "None"
                self.assertEqual(self.last.xcom_pull("taker"), taken)

    # Whatever is refused writes nothing.

    def test_from_that_is_refused_writes_nothing(self):
        source = """
            from liteflow import DAG, task
            with DAG("d", max_active_runs=1) as dag:
                @task
                def work(): print("worked")
                @task
                def more(x): print("more")
                w = work(); m = more(w)
        """
        path = self.script(source, "flow.py")
        made = self.loaded(path, f"flow_{os.getpid()}_{next(_numbers)}").dag
        self.assertEqual(made.run(db_path=self.db, executor=pool()).state, "success")
        whole = self.dump()
        again = ("run", path, "--db", self.db, "--resume", "--from", "work")
        wrong = [("--conf", '{"a": 1}'), ("--max-workers", "0")]
        running = {words: self.start("-m", "liteflow", *again, *words) for words in wrong}
        for words, process in running.items():
            with self.subTest(words=words):
                process.communicate(timeout=LIMIT)
                self.assertEqual(process.returncode, 2)
        self.assertEqual(self.dump(), whole)
        path.write_text(textwrap.dedent(source) + "    m >> w\n")
        self.assertEqual(self.cli(*again).returncode, 2)
        self.assertEqual(self.dump(), whole)
        path.write_text(textwrap.dedent(source))
        alive, done = threading.Event(), threading.Event()
        with DAG("d", max_active_runs=1) as other:

            @task
            def waits():
                alive.set()
                done.wait(LIMIT)

            waits()
        first = json.loads(self.cli_here("runs", "d", "--db", self.db, "--json").stdout)
        run_id = first[0]["run_id"]
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            future = threads.submit(other.test, db_path=self.db)
            try:
                self.assertTrue(alive.wait(LIMIT))
                refused = self.cli(*again, "--run-id", run_id)
                self.assertEqual(refused.returncode, 75)
                rows = "SELECT t.task_id, t.state, cleared FROM task_instance t JOIN dag_run r ON "
                rows += "r.id = dag_run_id WHERE run_id = ? ORDER BY t.id"
                kept = [("work", "success", 0), ("more", "success", 0)]
                self.assertEqual(self.query(rows, run_id), kept)
            finally:
                done.set()
            future.result()

    # The rule.

    def test_a_report_over_what_failed_is_made_again(self):
        def flow():
            with DAG("d") as d:
                parts = self.step("part", result=lambda x: x).expand(x=[5, 10, 15])
                report = self.step("report", result=sum, trigger_rule="all_done")
                self.step("mail")(report(parts))
                self.step("beside")()
            return d

        self.bad = {("part", 10)}
        self.go(flow())
        self.assertEqual(self.last.xcom_pull("report"), 20)
        self.bad = set()
        self.assertEqual(self.resume(flow(), again=["part[1]"]), ["mail", "part:10", "report"])
        self.assertEqual(self.last.xcom_pull("report"), 30)

    def test_what_was_removed_is_not_cleared_nor_read(self):
        def flow(elements):
            with DAG("d") as d:
                load = self.step("load", lambda x: x)
                load.expand(x=elements) if elements else load(5)
                self.step("bad")()
            return d

        self.bad = {"bad"}
        self.go(flow([1, 2, 3]))
        self.resume(flow([1, 2]))
        self.assertEqual(self.last.xcom_pull("load"), [1, 2])
        with self.assertRaisesRegex(liteflow.TaskNotFound, "has no index 2"):
            self.last.clear("load[2]")
        with self.assertRaisesRegex(liteflow.TaskNotFound, "has no index 2"):
            self.resume(flow([1, 2]), again=["load[2]"])
        shown = self.cli_here("show", "d", "load[2]", "--db", self.db)
        self.assertIn("load[2]: 1 removed", shown.stdout)
        self.assertEqual(self.last.refresh().state, "failed")
        self.resume(flow([]))
        self.assertEqual(self.last.xcom_pull("load"), 5)
        with DAG("d") as d:
            self.step("bad")()
        self.resume(d)
        with self.assertRaisesRegex(liteflow.TaskNotFound, "no task 'load'; there is 'bad'"):
            self.last.clear("load")

    def test_one_of_many_is_read_and_cleared_without_a_look_at_all_each_time(self):
        with DAG("d") as d:
            self.step("none").expand(x=[1, 2, 3])
            self.step("some", lambda x: x).expand(x=[1, 2, 3])
        self.go(d)
        whole, looks = liteflow._select_instances, []

        def looking(db, *of, **which):
            looks.append(which)
            return whole(db, *of, **which)

        with mock.patch.object(liteflow, "_select_instances", looking):
            self.assertEqual([self.last.xcom_pull("some", map_index=i) for i in (0, 2)], [1, 3])
            self.assertEqual((self.last.xcom_pull("some"), looks), ([1, 2, 3], []))
            self.assertIsNone(self.last.xcom_pull("none", map_index=1))
            self.assertEqual(looks, [{"task_id": "none", "map_index": 1}])
            self.last.clear([f"some[{i}]" for i in range(3)])
            self.assertEqual(looks[1:], [{"task_id": "some", "but": "removed"}])
        self.assertEqual(self.last.xcom_pull("none"), [])
        with self.assertRaises(liteflow.TaskNotFound):
            self.last.xcom_pull("absent", map_index=1)

    def test_what_was_read_before_others_changed_it_changes_nothing_else(self):
        with DAG("mine") as mine, DAG("other") as other:
            self.step("f", dag=mine)()
            self.step("f", dag=other)()
        self.go(mine, run_id="monday")
        before, again = self.last, mine.get_run("monday", self.db)
        pruned = self.cli_here("prune", "--values", "--keep", "0", "--db", self.db)
        self.assertEqual(pruned.returncode, 0)
        with self.assertRaisesRegex(liteflow.AirflowException, "were deleted"):
            before.clear("f")
        again.delete()
        self.go(other, run_id="monday")  # its row has the id that the other one had
        for act in (before.delete, lambda: before.clear("f")):
            with self.assertRaises(liteflow.RunNotFound):
                act()
        self.assertEqual(self.last.refresh().state, "success")
        self.db.unlink()
        for act in (self.last.delete, lambda: self.last.clear("f")):
            self.assertRaisesRegex(DatabaseError, "there is no database", act)
        self.assertFalse(self.db.exists())

    def test_what_was_cleared_since_prune_looked_is_not_pruned(self):
        def then_cleared(*args, **options):
            found = read(*args, **options)
            for run in found:
                d.get_run(run.run_id, self.db).clear("b")
            return found

        with DAG("d") as d:
            self.step("b", lambda x: self.assertEqual(x, 7))(self.step("a", result=7)())
        read = liteflow._read_runs
        for words in (["--values"], ["--keep", "0"]):
            self.go(d)
            with mock.patch.object(liteflow, "_read_runs", then_cleared):
                pruned = self.cli_here("prune", *words, "--db", self.db)
            self.assertEqual(pruned.returncode, 0)
            self.assertEqual(self.resume(d), ["b"])
            self.assertEqual(self.last.state, "success")
            self.last.delete()

    def test_what_was_pruned_since_a_rerun_looked_is_not_run_again(self):
        def then_pruned(row):
            refuse(row)
            if not pruned:
                pruned.append(self.cli_here("prune", "--values", "--db", self.db))

        with DAG("d") as d:
            self.step("b")(self.step("a", result=7)())
        refuse = liteflow._refuse_without_values
        for act in (lambda: self.resume(d, again=["b"]), lambda: self.last.clear("b")):
            self.go(d)
            pruned = []
            with (
                mock.patch.object(liteflow, "_refuse_without_values", then_pruned),
                self.assertRaisesRegex(liteflow.AirflowException, "were deleted"),
            ):
                act()
            self.assertEqual(self.last.refresh().state, "success")

    def test_a_run_that_dies_gives_its_places_back_to_those_under_way(self):
        def dies(x):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                dead = "state = 'running' WHERE dag_id = 'd' AND run_id = 'other'"
                db.execute(f"UPDATE dag_run SET owner = '0123456789abcdef', {dead}")
                whose = "task_id = 'f' AND dag_run_id = (SELECT min(id) FROM dag_run)"
                db.execute(f"UPDATE task_instance SET state = 'running' WHERE {whose}")

        with DAG("d") as d:
            last = self.step("f", max_active_tis_per_dag=1)()
        self.go(d, run_id="other")
        with d:
            self.step("first", dies)() >> last
        self.assertEqual(self.go(d), ["f", "first"])

    def test_a_clock_that_steps_back_makes_no_negative_duration(self):
        self.go(self.loading([1]))
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET end_date = '2020-01-01T10:00:00.000000+00:00'")
        self.assertEqual(self.last.refresh().duration, 0.0)

    def test_the_pause_before_a_resume_is_no_part_of_its_duration(self):
        self.bad = {"z"}
        self.go(self.loading([1]))
        for column, second in (("start_date", "00.000000"), ("end_date", "12.000678")):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                moment = f"2020-01-01T10:00:{second}+00:00"
                db.execute(f"UPDATE dag_run SET {column} = ?", (moment,))
        self.last.clear("load")
        self.bad = set()
        self.resume(self.loading([1]))
        # To the microsecond: SQLite's julianday counts in milliseconds.
        self.assertAlmostEqual(self.query("SELECT seconds FROM dag_run")[0][0], 12.000678, 6)
        self.assertGreater(self.last.duration, 12.000678)
        self.assertLess(self.last.duration, 3600)

    def test_what_was_left_out_when_it_was_mapped_anew_is_not_new_to_a_next_resume(self):
        def flow(rule="all_success"):
            with DAG("d") as d:
                listed = self.step("listed", result=[5, 6])()
                each = self.step("each", trigger_rule=rule).expand(x=listed)
                each >> self.step("report", trigger_rule="all_done")()
                self.step("z")()
            return d

        self.bad = {"z"}
        self.go(flow())
        self.last.clear("listed")
        self.assertEqual(self.resume(flow("all_skipped")), ["listed", "report", "z"])
        told = []
        self.assertEqual(self.resume(flow("all_skipped"), progress=told.append), ["z"])
        self.assertEqual(told[0], "kept, as they succeeded: listed, report")
        self.assertEqual(self.state_of("each"), ["skipped"])
        self.assertEqual(self.resume(flow()), ["each:5", "each:6", "report", "z"])

    def test_what_is_mapped_anew_is_neither_new_nor_gone(self):
        def flow():
            with DAG("d") as d:
                load = self.step("load", result=lambda x: x)
                load.expand(x=self.step("names", result=list("abc"))())
            return d

        lines = []
        self.go(flow())
        self.resume(flow(), again=["names"], progress=lines.append)
        self.assertEqual(lines[0], "mapped anew, over results to come: load")
        self.assertTrue(lines[1].startswith("run "), lines)

    def test_what_is_kept_is_said_by_instance(self):
        self.bad = {("load", i) for i in range(49)}
        lines = []
        self.go(self.loading(list(range(200))))
        self.bad = set()
        self.resume(self.loading(list(range(200))), progress=lines.append)
        self.assertIn("kept, as they succeeded: load (151 of 200), z", "\n".join(lines))

    def test_what_skipped_itself_is_not_said_to_have_succeeded(self):
        with DAG("d") as made:
            choice = self.step("choose", result="x", kind="branch")()
            choice >> [self.step("x")(), self.step("y")()]
            self.step("s", skips=True)() >> self.step("below")()
            self.step("z")()
        self.bad, lines = {"z"}, []
        self.go(made)
        self.resume(made, progress=lines.append)
        told = ["kept, as they succeeded: choose, x", "kept, as they skipped themselves: s"]
        self.assertEqual(lines[:2], told)

    def test_a_success_whose_inputs_changed_runs_again_and_one_whose_order_changed_does_not(self):
        def flow(takes, after):
            with DAG("d") as d:
                results = {name: self.step(name, result=name)() for name in "abz"}
                self.step("t", result=lambda x: x)(results[takes])
                u = self.step("u")()
                results[after] >> u
            return d

        self.bad = {"z"}
        self.go(flow("a", "a"))
        self.assertEqual(self.resume(flow("b", "b")), ["t", "z"])
        self.assertEqual(self.last.xcom_pull("t"), "b")

    def test_what_a_kept_branch_left_out_stays_skipped(self):
        with DAG("d") as d:
            choose = self.step("choose", result="left", kind="branch")()
            left, right = self.step("left")(), self.step("right")()
            last = self.step("last", trigger_rule="none_failed_min_one_success")()
            choose >> [left, right] >> last
        self.bad = {"left"}
        self.go(d)
        self.assertEqual(self.state_of("right", "last"), ["skipped", "upstream_failed"])
        self.bad = set()
        self.assertEqual(self.resume(d), ["last", "left"])
        self.assertEqual(self.state_of("right"), ["skipped"])

    def test_what_skipped_itself_stays_skipped(self):
        with DAG("d") as d:
            self.step("below")(self.step("none", skips=True)())
            self.step("z")()
        self.bad = {"z"}
        self.go(d)
        self.bad = set()
        self.assertEqual(self.resume(d), ["z"])
        self.assertEqual(self.state_of("none", "below"), ["skipped", "skipped"])

    # Deaths.

    def poisoned(self, state, rounds, retries=1):
        with DAG("poison") as d:
            self.step("f", retries=retries)()
        self.die(d, at=1)
        for _ in range(rounds):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE dag_run SET state = 'running', owner = 'dead'")
                db.execute("UPDATE task_instance SET state = ?", (state,))
            if self.query("SELECT lost FROM task_instance") == [(rounds - 1,)]:
                break
            self.die(d, at=1, resume=True)
        ran = self.resume(d)
        return ran, self.last.get_task_instance("f")

    def test_what_was_lost_while_it_ran_too_often_fails(self):
        ran, ti = self.poisoned("running", 3)
        self.assertEqual((ran, ti.state), (["f"], "success"))
        self.db = self.folder / "more.db"
        with self.assertLogs("liteflow", "INFO") as told:
            ran, ti = self.poisoned("running", 4)
        self.assertEqual((ran, ti.state), ([], "failed"))
        self.assertIn("4 times in a row", ti.error)
        self.assertIn("task 'f' was lost with its scheduler 4 times in a row", str(told.output))

    def test_losses_are_in_a_row_only_where_no_attempt_ended_between_them(self):
        with DAG("d") as d:
            self.step("f")()
        self.bad = {"f"}
        for number in range(4):
            self.die(d, at=1, resume=number > 0)
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE dag_run SET state = 'running', owner = 'dead'")
                db.execute("UPDATE task_instance SET state = 'running'")
            self.assertEqual(self.resume(d), ["f"], self.last.get_task_instance("f").error)

    def test_what_was_only_queued_is_never_taken_for_poison(self):
        ran, ti = self.poisoned("queued", 7)
        self.assertEqual((ran, ti.state), (["f"], "success"))

    def test_what_died_with_its_scheduler_is_sent_alone_and_recorded_first(self):
        with DAG("d") as d:
            for name in "abc":
                self.step(name)()
        self.die(d, at=1)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE task_instance SET state = 'running' WHERE task_id IN ('a', 'b')")
            db.execute(
                "INSERT OR REPLACE INTO task_attempt (task_instance_id, try_number, state) "
                "SELECT id, 1, 'running' FROM task_instance WHERE task_id IN ('a', 'b')"
            )
            db.execute("UPDATE task_instance SET try_number = 1 WHERE task_id IN ('a', 'b')")
        seen, start = [], liteflow._InProcessRunner.start

        def looking(runner, attempt, job):
            rows = "SELECT task_id FROM task_instance WHERE state = 'running'"
            queued = "SELECT task_id FROM task_instance WHERE state = 'queued'"
            seen.append((job.task_id, self.query(rows), self.query(queued)))
            start(runner, attempt, job)

        with mock.patch.object(liteflow._InProcessRunner, "start", looking):
            self.resume(d)
        for task_id, running, queued in seen:
            if task_id in "ab":
                self.assertEqual((running, queued), ([(task_id,)], []))
        self.assertEqual(sorted(each[0] for each in seen), ["a", "b", "c"])


class RandomFlow:
    """A workflow as data, so that it can be edited, built again and again, and reasoned about."""

    RULES = "all_success all_done none_failed none_failed_min_one_success all_failed".split()
    WORDS = "abcdefgh"

    def __init__(self, rng):
        self.rng = rng
        self.numbers = itertools.count()
        self.tasks: dict[str, dict] = {}  # in an order in which they can run
        self.fail_fast = rng.random() < 0.15
        for _ in range(rng.randrange(2, 7)):
            self.add(len(self.tasks))

    # Making it.

    def add(self, at):
        """Add a task, or a group or scope of some, behind the first `at` tasks."""
        rng, n = self.rng, next(self.numbers)
        names = list(self.tasks)
        while 0 < at < len(names) and self.unit(names[at]) == self.unit(names[at - 1]):
            at += 1  # not into a group or scope
        kind = rng.choice(["plain", "plain", "const", "result", "branch", "group", "scope"])
        made = getattr(self, f"new_{kind}", self.new_one)(f"{kind}{n}", names[:at])
        items = list(self.tasks.items())
        self.tasks = dict(items[:at] + list(made.items()) + items[at:])

    def unit(self, name):
        return name.rstrip("swvt") if name.startswith("scope") else name.partition(".")[0]

    def new_one(self, name, above):
        rng = self.rng
        made = self.new_task(ups=self.some(above, 0.3), args=self.some(above, 0.25))
        if name.startswith("branch"):
            made |= {"branch": rng.random(), "rule": "all_success"}
        elif name.startswith("const"):
            made["over"] = self.constants()
        elif name.startswith("result") and above:
            made["over"] = over = rng.choice(above)
            made["args"] = [x for x in made["args"] if x != over]
        elif rng.random() < 0.1:
            made["skips"] = True
        return {name: made}

    def new_group(self, name, above):
        rng = self.rng
        over = rng.choice(above) if above and rng.random() < 0.5 else self.constants()
        first, made = f"{name}.one", {}
        for each in [first, f"{name}.two", f"{name}.three"][: rng.randrange(1, 4)]:
            args = [x for x in made if rng.random() < 0.6]
            ups = [first] if made and not args else []
            made[each] = self.new_task(group=name, over=over, args=args, ups=ups)
        return made

    def new_scope(self, name, above):
        s, w, v, t = (f"{name}{letter}" for letter in "swvt")
        work = self.new_task(ups=[s], args=self.some(above, 0.2))
        if self.rng.random() < 0.3:
            work["over"] = self.constants()
        return {
            s: self.new_task(role="setup", ups=self.some(above, 0.2)),
            w: work,
            v: self.new_task(ups=[w], args=self.some(above, 0.1)),
            t: self.new_task(role="teardown", setup=s, ups=[v]),
        }

    def new_task(self, **fields):
        rng = self.rng
        rule = rng.choice(self.RULES) if rng.random() < 0.3 else "all_success"
        made = {"ups": [], "args": [], "over": None, "rule": rule, "length": rng.randrange(4)}
        made |= {"role": None, "group": None, "branch": None, "skips": False, "retries": 0}
        return made | fields

    def some(self, names, share):
        fit = [x for x in names if self.tasks[x]["role"] != "teardown"]
        return [x for x in fit if self.rng.random() < share][:6]

    def constants(self):
        return [self.rng.choice(self.WORDS) for _ in range(self.rng.randrange(4))]

    # Editing it.

    def edited(self):
        made = copy.copy(self)
        made.tasks = copy.deepcopy(self.tasks)
        for _ in range(self.rng.randrange(4)):
            made.edit()
        return made

    def edit(self):
        rng, tasks = self.rng, self.tasks
        if rng.random() < 0.15:
            return self.add(rng.randrange(len(tasks) + 1))
        name = rng.choice(list(tasks))
        one, above = tasks[name], list(tasks)[: list(tasks).index(name)]
        edits = ["list", "list", "list"] if isinstance(one["over"], list) else []
        edits += ["length", "retries", "give up less"]
        if one["role"] is None and one["branch"] is None:
            edits.append("rule")
        free = one["role"] is None and one["group"] is None and not name.startswith("scope")
        if free:
            edits += ["remove", "rename", "move", "take"]
            if one["branch"] is None:
                edits += ["unmap"] if one["over"] is not None else ["map", "setup"]
        what = rng.choice(edits)
        if what == "list":
            self.edit_list(one)
        elif what == "remove" and len(tasks) > 1:
            self.replace(name, None)
        elif what == "rename":
            self.replace(name, f"{name}_new")
        elif what == "move":
            one["ups"] = self.some(above, 0.4)
        elif what == "take":
            one["args"] = [x for x in self.some(above, 0.3) if x != one["over"]]
        elif what == "give up less":
            self.fail_fast = False
        elif what == "setup":
            one["role"] = "setup"
        else:
            change = {
                "length": ("length", rng.randrange(4)),
                "retries": ("retries", rng.randrange(2)),
                "rule": ("rule", rng.choice(self.RULES)),
                "map": ("over", self.constants() or ["a"]),
                "unmap": ("over", None),
            }
            one.update([change[what]] if what in change else [])

    def edit_list(self, one):
        """An element goes, comes, is another, or all are mixed."""
        rng, over = self.rng, list(one["over"])
        how = rng.choice(["out", "in", "other", "mixed"])
        if how == "in":
            over.insert(rng.randrange(len(over) + 1), rng.choice(self.WORDS))
        elif how == "mixed":
            rng.shuffle(over)
        elif over:
            over[slice(at := rng.randrange(len(over)), at + 1)] = ["z"] if how == "other" else []
        for each in self.tasks.values():
            if each is one or (one["group"] and each["group"] == one["group"]):
                each["over"] = over

    def replace(self, name, new):
        """Rename a task; with None, remove it."""

        def without(one):
            fields = {
                field: [new if x == name else x for x in one[field] if new or x != name]
                for field in ("ups", "args")
            }
            return {**one, **fields, "over": (new or ["a"]) if one["over"] == name else one["over"]}

        rest = {n: without(one) for n, one in self.tasks.items() if new or n != name}
        self.tasks = {new if n == name else n: one for n, one in rest.items()}

    # What it is.

    def takes(self, name):
        one = self.tasks[name]
        return {*one["args"], *([one["over"]] if isinstance(one["over"], str) else [])}

    def build(self, act):
        """The DAG; `act` gives a task's function."""
        with DAG("edited", fail_fast=self.fail_fast) as d:
            made, groups = {}, set()
            for name, one in self.tasks.items():
                if one["group"] is None:
                    made[name] = self.call(name, made, act)
                elif one["group"] not in groups:
                    groups.add(one["group"])
                    self.call_group(one["group"], made, act)
            for name, one in self.tasks.items():
                for up in one["ups"]:
                    made[up] >> made[name]
                if one["role"] == "teardown":
                    made[name].as_teardown(setups=made[one["setup"]])
        return d

    def call(self, name, made, act, element=None):
        one = self.tasks[name]
        settings = {"task_id": name.rpartition(".")[2], "retries": one["retries"]}
        setups = [x for x in (*one["ups"], *self.takes(name)) if self.tasks[x]["role"] == "setup"]
        if one["role"] is None:  # right below a setup it must have all_success
            settings["trigger_rule"] = "all_success" if setups or self.fail_fast else one["rule"]
        maker = (task if one["branch"] is None else task.branch)(**settings)(act(name, one))
        if one["role"]:
            maker = getattr(liteflow, one["role"])(maker)
        args = {f"a{i}": made[x] for i, x in enumerate(one["args"])}
        if one["group"]:
            return maker(x=element, **args)
        if one["over"] is None:
            return maker(**args)
        over = made[one["over"]] if isinstance(one["over"], str) else one["over"]
        return (maker.partial(**args) if args else maker).expand(x=over)

    def call_group(self, group_id, made, act):
        inner = [name for name, one in self.tasks.items() if one["group"] == group_id]
        over = self.tasks[inner[0]]["over"]

        @task_group(group_id=group_id)
        def grouped(x):
            for name in inner:
                made[name] = self.call(name, made, act, x)

        grouped.expand(x=made[over] if isinstance(over, str) else over)


class PastRows:
    """A run's instances as the file has them, by task and index."""

    def __init__(self, query):
        self.state, self.tries, self.began, self.ended, self.chosen = {}, {}, {}, {}, {}
        for name, index, state, attempt, tries, began, ended, flow in query(
            "SELECT task_id, map_index, t.state, a.state, t.try_number, start_date, end_date, flow FROM "
            "task_instance t LEFT JOIN task_attempt a ON task_instance_id = id AND a.try_number = "
            "t.try_number WHERE t.state IS NOT 'removed'"
        ):
            key = name, index
            self.state[key] = "skipped itself" if state == attempt == "skipped" else state
            self.tries[key], self.began[key], self.ended[key] = tries, began, ended
            self.chosen[key] = json.loads(flow or "{}").get("chosen") or []


class ResumeModel:
    """The rule of resume as the README has it, held against what a resume did.

    Between what must run again and what may there is little: what hangs on something that was
    decided anew, and did not run, may.
    """

    KEPT = ("success", "skipped itself")

    def __init__(self, d, flow, was, before, after, ran):
        self.d, self.flow, self.was = d, flow, was
        self.before, self.after, self.ran = before, after, ran
        self.indexes, stood = collections.defaultdict(list), collections.defaultdict(set)
        for name, index in after.state:
            self.indexes[name].append(index)
        for name, index in before.state:
            stood[name].add(index)
        self.past = {key: self.counterpart(*key) for key in after.state}
        self.moved = set()  # tasks of which an instance came, went or has another index
        for name, indexes in self.indexes.items():
            found = {i: self.past[name, i] for i in indexes}
            if any(i != j for i, j in found.items()) or stood[name] - {*found.values()}:
                self.moved.add(name)
        self.reasons = {}
        for t in d.topological_sort():
            for i in self.indexes[t.task_id]:
                self.reasons[t.task_id, i] = self.reason(t, i)

    def counterpart(self, name, index):
        """Which instance of the past it is, by its index then; None: it is new."""
        over = self.flow.tasks[name]["over"]
        was = self.was.tasks[name]["over"] if name in self.was.tasks else ""
        there = [i for n, i in self.before.state if n == name]
        if index < 0:
            return -1 if -1 in there and (over is not None or was is None) else None
        if isinstance(over, list) and isinstance(was, list):
            same = [j for j, x in enumerate(was) if x == over[index] and j in there]
            return dict(enumerate(same)).get(over[:index].count(over[index]))
        return index if index in there and isinstance(over, str) and isinstance(was, str) else None

    def state_before(self, key):
        return self.before.state.get((key[0], self.past[key]))

    def upstream(self, t, i):
        """The instances that one waits for."""
        for up in t.upstream_list:
            in_step = t._mapping is not None and up._mapping is t._mapping
            for j in self.indexes[up.task_id]:
                if j in (i, -1) or not in_step:
                    yield up, (up.task_id, j)

    def takes_others(self, name):
        return name in self.was.tasks and self.flow.takes(name) != self.was.takes(name)

    def may_pull(self, up, key):
        """Whether what hangs on this instance may be decided anew."""
        state = self.state_before(key)
        if state in self.KEPT:  # what is only taken along pulls nothing
            return bool(self.reasons[key]) and not up.is_teardown
        left_out = state in ("skipped", "upstream_failed")
        return key in self.ran or not left_out or bool(self.reasons[key])

    def must_pull(self, up, key):
        taken_along = self.state_before(key) in self.KEPT and (
            up.is_teardown or not self.reasons[key]
        )
        # Nor what is mapped over one that is, and was left out: how many elements that gives now
        # is known when it has run, and by then what succeeded has been kept.
        over = self.flow.tasks[up.task_id]["over"]
        unknown = isinstance(over, str) and self.flow.tasks[over]["role"] and not self.reasons[key]
        return key in self.ran and not (taken_along or unknown)

    def reason(self, t, i):
        """Why a success may run again; "" if nothing speaks for it."""
        if self.takes_others(t.task_id):
            return "takes others' results"
        if set(self.before.chosen.get((t.task_id, self.past[t.task_id, i]), ())) - {
            *self.flow.tasks
        }:
            return "chose what is gone"
        for up, key in self.upstream(t, i):
            if self.may_pull(up, key):
                return f"hangs on {key}"
        for name in self.flow.takes(t.task_id) & self.moved:
            mapping = self.d.task_dict[name]._mapping
            if mapping is None or mapping is not t._mapping:
                return f"takes {name}, of which one came, went or moved"
        return ""

    # What is wrong.

    def errors(self):
        for t in self.d.tasks:
            for i in self.indexes[t.task_id]:
                yield from self.errors_of(t, i)
        if not self.flow.fail_fast:
            yield from self.wrong_states()

    def errors_of(self, t, i):
        key = t.task_id, i
        ran, kept = key in self.ran, self.state_before(key) in self.KEPT
        reason, state = self.reasons[key], self.after.state[key]
        if t.is_setup and kept and self.was_torn_down(t, key):
            work = [(w, k) for w in self.scope(t)[1] for k in self.keys(w)]
            if not ran and any(k in self.ran for _, k in work):
                yield f"{key} was torn down, and work in its scope ran without it"
            # Under fail_fast what was to run may not run after all.
            anew = any(self.reasons[k] or self.may_pull(w, k) for w, k in work)
            # Nor where it fails: what its rule left out before is left out for that now.
            before = {self.state_before(k) for _, k in work}
            if state == "failed" and before & {"skipped", "upstream_failed"}:
                anew = True
            if anew or self.flow.fail_fast:
                reason = "work in its scope is decided anew"
        # What its setup made anew is torn down, though fail_fast has left out the work between.
        setups = [k for up in t.upstream_list if up.is_setup for k in self.keys(up)]
        if t.is_teardown and any(k in self.ran for k in setups):
            reason = reason or "its setup ran again"
        if ran and kept and not reason:
            yield f"{key} ran again without a reason"
        if ran or (state != "success" and (state != "skipped itself" or reason)):
            return  # a skip may be its rule's now: see wrong_states
        if not kept:
            yield f"{key} is {state} and did not run"
        if self.takes_others(t.task_id) or reason == "chose what is gone":
            yield f"{key} is kept, though it {reason}"
        for up, other in self.upstream(t, i):
            if self.must_pull(up, other):
                yield f"{key} is kept, and hangs on {other}, which ran again"

    def keys(self, t):
        return [(t.task_id, i) for i in self.indexes[t.task_id]]

    def scope(self, setup):
        """A setup's teardowns, and the work between."""

        def below(t):
            return {t, *(x for down in t.downstream_list for x in below(down))}

        ends = {t for t in setup.downstream_list if t.is_teardown}
        work = [t for t in below(setup) - {setup} if not t.is_teardown]
        return ends, [t for t in work if ends & below(t)]

    def was_torn_down(self, setup, key):
        ended = self.before.ended[key[0], self.past[key]]
        for end in self.scope(setup)[0]:
            began = self.before.began.get((end.task_id, -1))
            # One that was sent when its scheduler died may have begun.
            sent = began is None and self.before.tries.get((end.task_id, -1))
            if sent or (began and began >= ended):
                return True
        return False

    def wrong_states(self):
        """What was decided anew, and not by its rule."""
        oracle = WholeOracle(self.d)
        oracle.ids = dict(self.indexes)
        oracle.state = {key: state and state.split()[0] for key, state in self.after.state.items()}
        for t in self.d.tasks:
            for key in self.keys(t):
                state, ran = self.after.state[key], key in self.ran
                kept = state == "success" or (state == "skipped itself" and not self.reasons[key])
                left_out = oracle.state[key] == "skipped" and any(u._flow for u in t.upstream_list)
                if (kept and not ran) or left_out or (key[1] < 0 and t._mapping is not None):
                    continue
                over = self.flow.tasks[t.task_id]["over"]
                if isinstance(over, str) and self.flow.tasks[over]["role"]:
                    continue  # that is taken along, and may now have fewer elements
                rule = oracle.verdict(t, key[1])
                if rule != ("run" if ran else oracle.state[key]):
                    yield f"{key} is {state}, by its rule {rule}"


class EditedTest(FlowCase):
    """Random workflows that fail or are killed somewhere, are edited at random, and resumed."""

    def setUp(self):
        super().setUp()
        if os.path.isdir("/dev/shm"):  # memory: nothing here is about disks
            folder = tempfile.mkdtemp(prefix="liteflow-test-", dir="/dev/shm")
            self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
            self.db = Path(folder) / "flow.db"

    def test_random_edits_between_a_run_and_its_resume(self):
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        for number in range(20_000 if SOAK else 150):
            with self.subTest(seed=seed + number):
                self.try_one(random.Random(seed + number))
            self.db.unlink()

    def try_one(self, rng):
        flow = RandomFlow(rng)
        self.bad = self.some_bad(flow, 0.3)
        self.run_or_die(flow)
        for _ in range(rng.randrange(1, 3)):
            if self.query("SELECT state FROM dag_run") == [("success",)]:
                return
            before, was, flow = PastRows(self.query), flow, flow.edited()
            self.bad = self.some_bad(flow, 0.1) if rng.random() < 0.3 else set()
            d = self.run_or_die(flow, resume=True)
            if self.query("SELECT owner FROM dag_run") != [(None,)]:
                continue  # it was killed
            after = PastRows(self.query)
            model = ResumeModel(d, flow, was, before, after, {*self.ran})
            found = [*model.errors(), *self.stale_values(flow, after)]
            self.assertEqual(found, [], f"\n{was.tasks}\n{flow.tasks}\n{before.state}\n{self.ran}")

    def some_bad(self, flow, share):
        found = set()
        for name, one in flow.tasks.items():
            if flow.rng.random() < share:
                over = one["over"] if isinstance(one["over"], list) else range(3)
                found.add((name, flow.rng.choice(over) if one["over"] else -1))
        return found

    def run_or_die(self, flow, **options):
        rng, d = flow.rng, flow.build(self.act)
        if rng.random() < 0.25:
            at, committed = rng.randrange(1, 12), rng.random() < 0.5
            self.die(d, at, committed, sure=False, **options)
        else:
            self.go(d, **options)
        return d

    def act(self, name, one):
        """A task's function: its result says what it was made of."""

        def function(x=None, a0=None, a1=None, a2=None, a3=None, a4=None, a5=None, *, ti=None):
            self.ran.append((name, ti.map_index))
            if self.bad & {(name, ti.map_index), (name, x if isinstance(x, str) else None)}:
                raise ValueError("bad")
            if one["skips"]:
                raise AirflowSkipException
            if one["branch"] is not None:
                below = sorted(ti.task._downstream)
                return [n for k, n in enumerate(below) if one["branch"] * (k + 1) % 1 < 0.6]
            return self.result_of(name, one, x, [a0, a1, a2, a3, a4, a5])

        return function

    def result_of(self, name, one, x, taken):
        taken = [each if each is None else list(each) for each in taken]
        made_of = zlib.crc32(f"{x} {taken}".encode())
        return [f"{name} {made_of} {k}" for k in range(one["length"])]

    def stale_values(self, flow, after):
        """Successes whose result is not made of what is there now."""
        found = Dag("edited").runs(self.db)[0].xcoms()
        values = {(x.task_id, x.map_index): x.value for x in found if x.key == "return_value"}

        def all_of(name):
            return [value for (n, _), value in sorted(values.items()) if n == name]

        def taken(name, by, i):
            one = flow.tasks[name]
            if one["over"] is None or (by["group"] and one["group"] == by["group"]):
                return values.get((name, -1 if one["over"] is None else i))
            several = all_of(name)
            alone = one["group"] and len(several) < 2  # as Airflow has it
            return (several or [None])[0] if alone else several

        for (name, i), value in values.items():
            one = flow.tasks.get(name)
            if not one or one["branch"] or not value or after.state.get((name, i)) != "success":
                continue
            # One that is taken along pulls nothing, and a branch may store nothing.
            takes = [flow.tasks[x] for x in flow.takes(name)]
            takes += [flow.tasks[x["over"]] for x in takes if isinstance(x["over"], str)]
            if any(one["role"] or one["branch"] for one in takes):
                continue
            x, over = None, one["over"]
            if over is not None:
                mapped = isinstance(over, str) and flow.tasks[over]["over"] is not None
                x = (
                    over if isinstance(over, list) else all_of(over) if mapped else values[over, -1]
                )[i]
            args = [taken(up, one, i) for up in one["args"]]
            if self.result_of(name, one | {"length": 1}, x, (args + [None] * 6)[:6]) != value[:1]:
                yield f"{name}[{i}] was made of something else than {x} {args}"


class SeenStateTest(Case):
    """One answer about what is cleared, and about a dead scheduler's task."""

    SCRIPT = """
        import time
        from pathlib import Path
        from liteflow import DAG, task
        with DAG("d") as dag:
            @task
            def first(): pass
            @task
            def long(x):
                Path("began").touch()
                time.sleep(60)
            @task
            def after(x): pass
            after(long(first()))
        if __name__ == "__main__":
            dag.cli()
    """

    def test_a_dead_schedulers_task_reads_the_same_everywhere(self):
        self.script(self.SCRIPT)
        process = self.start("my_flow.py", "--db", self.db, "--quiet", "--max-workers", "1")
        self.assertTrue(wait_until((self.folder / "began").exists))
        running = "SELECT 1 FROM task_instance WHERE task_id = 'long' AND state = 'running'"
        self.assertTrue(wait_until(lambda: self.query(running)))
        process.kill()
        process.wait(LIMIT)
        table = self.cli_here("show", "d", "long", "--db", self.db).stdout
        found = json.loads(self.cli_here("show", "d", "long", "--db", self.db, "--json").stdout)
        drawn = self.cli_here("visualize", "d", "--db", self.db).stdout
        runs = self.cli_here("runs", "d", "--state", "failed", "--db", self.db, "--json").stdout
        self.assertNotEqual([run["state"] for run in json.loads(runs)], ["running"])
        text = json.dumps(found)
        self.assertIn("interrupted", table)
        self.assertNotIn('"running"', text)
        self.assertNotRegex(table, r"(?m)\brunning\b(?! \(owner dead)")
        [attempt] = found["attempts"]
        self.assertIsNotNone(attempt["start_date"])
        self.assertEqual((attempt["end_date"], attempt["duration"]), (None, None))  # who knows
        line = next(line for line in drawn.splitlines() if "long" in line)
        self.assertIn("interrupted", line)
        self.assertIn("interrupted", text)

    def test_what_was_cleared_does_not_read_interrupted(self):
        module = self.module("with DAG('d') as dag:\n    @task\n    def f(): return 1\n    f()\n")
        module.dag.test(db_path=self.db).clear("f")
        for argv in (("show", "d"), ("show", "d", "f"), ("visualize", "d")):
            shown = self.cli_here(*argv, "--db", self.db).stdout
            self.assertNotIn("interrupted", shown, argv)


class StopTest(Case):
    """The end of a run by hand."""

    SCRIPT = """
        import os, sys, time
        from pathlib import Path
        from liteflow import *
        note = Path(os.environ["CASE_DIR"]) / "notes"
        def say(*words):
            with note.open("a") as f: f.write(" ".join(map(str, words)) + chr(10))
        def long(name):
            say(name)
            if not (note.parent / "quick").exists(): time.sleep(60)
        with DAG("d") as dag:
            @setup
            def mount(): say("mount")
            @task
            def work(): long("work")
            @task
            def later(): say("later")
            @teardown
            def umount():
                if (note.parent / "slow").exists(): long("umount")
                else: say("umount")
            @setup
            def unused(): raise ValueError
            @teardown
            def never(): say("never")
            m = mount(); w = work(); u = umount()
            m >> w >> [u, later()]; u.as_teardown(setups=m)
            n = unused(); n >> never().as_teardown(setups=n)
            n >> w if 0 else None
        if __name__ == "__main__":
            dag.cli()
    """

    def notes(self):
        path = self.folder / "notes"
        return path.read_text().split() if path.exists() else []

    def check(self, reason):
        [run] = liteflow.Dag("d").runs(self.db)
        self.assertEqual((run.state, run.reason), ("failed", reason))
        states = self.states(run)
        names = ("mount", "work", "umount", "later")
        self.assertEqual([states[n] for n in names], ["success", None, "success", None])
        self.assertEqual(self.notes(), ["mount", "work", "umount"])
        (self.folder / "quick").touch()
        done = self.python("my_flow.py", "--db", self.db, "--resume", "--quiet")
        self.assertIn("unused", done.stderr)
        self.assertEqual(self.notes()[3:5], ["mount", "work"])
        self.assertEqual(sorted(self.notes()[5:]), ["later", "umount"])

    def begin(self):
        self.script(self.SCRIPT)
        process = self.start("my_flow.py", "--db", self.db, "--quiet", "--max-workers", "2")
        self.assertTrue(wait_until(lambda: "work" in self.notes()))
        return process

    def test_a_signal_runs_the_teardowns_of_setups_that_succeeded(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number=number):
                for path in self.folder.glob("[!l_m]*"):
                    if path.is_file():
                        path.unlink()
                process = self.begin()
                process.send_signal(number)
                process.communicate(timeout=LIMIT)
                self.assertEqual(process.returncode, 128 + number)
                self.check(f"stopped by {number.name}")

    def test_the_stop_command_runs_them_too(self):
        process = self.begin()
        self.assertEqual(self.cli_here("stop", "d", "--db", self.db).returncode, 0)
        process.communicate(timeout=LIMIT)
        self.check("stopped on request")

    def test_a_stop_event_runs_them_too(self):
        self.script(self.SCRIPT)
        module = self.module((self.folder / "my_flow.py").read_text())
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            run = threads.submit(module.dag.run, db_path=self.db, executor=pool(), stop=stop)
            self.assertTrue(wait_until(lambda: "work" in self.notes()))
            stop.set()
            run.result()
        self.check("stopped")

    def test_a_second_signal_ends_callbacks_too(self):
        for of in ("task", "dag"):
            with self.subTest(of=of):
                self.script(
                    f"""
                    import time
                    from liteflow import DAG, task
                    def hangs(context): open("{of}", "w").close(); time.sleep(60)
                    call = dict(on_success_callback=hangs)
                    with DAG("hangs", **(call if "{of}" == "dag" else {{}})) as dag:
                        task(print, **(call if "{of}" == "task" else {{}}))()
                    if __name__ == "__main__":
                        dag.cli()
                    """
                )
                process = self.start("my_flow.py", "--db", self.db, "--quiet")
                self.assertTrue(wait_until((self.folder / of).exists))
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=LIMIT)
                self.assertIn(process.returncode, (130, 143))

    def test_a_second_signal_ends_it_though_another_process_has_locked_the_file(self):
        process = self.begin()
        ended = "SELECT 1 FROM task_instance WHERE task_id = 'unused' AND state = 'failed'"
        self.assertTrue(wait_until(lambda: self.query(ended)))
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            # The lock would be waited for for 120 s.
            self.assertIn(process.wait(LIMIT), (130, 143))
        _, err = process.communicate()
        self.assertIn("is locked by another process: not all is recorded\n", err)
        self.assertNotIn("Traceback", err)
        self.assertRegex(err, "\ncut off: work.*\nto go on")

    def test_a_second_signal_ends_at_once(self):
        (self.folder / "slow").touch()
        process = self.begin()
        process.send_signal(signal.SIGTERM)
        self.assertTrue(wait_until(lambda: "umount" in self.notes()))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
        self.assertLess(time.monotonic() - began, 30)  # umount would take 60
        self.assertEqual(process.returncode, 143)
        [run] = liteflow.Dag("d").runs(self.db)
        self.assertEqual(run.state, "failed")
        self.assertEqual(self.states(run)["umount"], None)

    def test_a_worker_that_was_told_to_end_takes_nothing_more(self):
        # Its idle neighbour sleeps when the teardown is sent, and the scheduler is slow.
        slow = """
            import liteflow, signal
            calling, lose = liteflow._SlotRunner._let_call, liteflow._SlotRunner._lose
            def stopping(runner, slot, *message):
                for other in runner._slots:
                    if other is not slot and slot.reason is None and slot.spoilt:
                        os.kill(other.pid, signal.SIGSTOP)
                calling(runner, slot, *message)
            def slowly(runner, slot):
                time.sleep(0.2)
                lose(runner, slot)
                for other in runner._slots:
                    os.kill(other.pid, signal.SIGCONT)
            liteflow._SlotRunner._let_call, liteflow._SlotRunner._lose = stopping, slowly
"""
        head = '        if __name__ == "__main__":\n'
        self.SCRIPT = self.SCRIPT.replace(head, head + slow.lstrip("\n"))
        self.script(self.SCRIPT)
        process = self.start("my_flow.py", "--db", self.db, "--quiet", "--max-workers", "2")
        self.assertTrue(wait_until(lambda: "work" in self.notes()))
        time.sleep(0.2)  # a job that takes longer than that is held until there is word
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        self.assertEqual(process.returncode, 143, "the run hangs")
        self.check("stopped by SIGTERM")

    def test_stop_by_a_dags_name_reaches_an_older_live_run(self):
        stop, begun = threading.Event(), threading.Event()
        with DAG("d") as old:

            @task
            def waits():
                begun.set()
                wait_until(stop.is_set, LIMIT)

            waits()
        with DAG("d") as new:
            liteflow.EmptyOperator(task_id="quick")
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            run = threads.submit(old.run, db_path=self.db, executor=threads_of(self))
            try:
                self.assertTrue(begun.wait(LIMIT))
                new.test(db_path=self.db)
                asked = threading.Thread(
                    target=self.cli_here, args=("stop", "d", "--db", self.db), daemon=True
                )
                asked.start()
                wanted = "SELECT 1 FROM dag_run WHERE stop_requested IS NOT NULL"
                found = wait_until(lambda: self.query(wanted), 10)
            finally:
                stop.set()
            run.result()
            asked.join(LIMIT)
        self.assertTrue(found, "the older run was not asked to stop")


def threads_of(case):
    made = concurrent.futures.ThreadPoolExecutor(1)
    case.addCleanup(made.shutdown)
    return made


class PlanGrowthTest(Case):
    """The plan: what stranded, and what grew faster than the DAG."""

    def drive(self, made, outcome=lambda i: "success", at_once=10**9, hook=None, **options):
        """Run a plan to its end; every instance's state."""
        plan = liteflow._Plan(made, **options)
        running = []
        while True:
            plan.settle()
            while (
                len(running) < at_once
                and plan.ready_count(0.0) > 0
                and (instance := plan.take()) is not None
            ):
                plan.start(instance)
                running.append(instance)
            if not running:
                break
            instance = running.pop(0)
            plan.finish(instance, outcome(instance), 0.0)
            if hook:
                hook(plan, instance)
        self.assertEqual(plan.unfinished, 0, "the plan is stuck")
        return {i.label: i.state and i.state.value for i in plan.instances()}

    def seconds_of(self, act):
        began = time.process_time()
        act()
        return time.process_time() - began

    def megabytes_of(self, act):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        made = act()  # which is not to be freed yet
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return peak, made

    def test_what_a_branch_skips_strands_nobody_behind_it_in_the_line(self):
        with DAG("d") as d:

            @task_group
            def g(i):
                chosen = task.branch(task_id="choose")(quiet)(i)
                limited = task(task_id="work", trigger_rule="always", max_active_tis_per_dagrun=1)(
                    quiet
                )()
                chosen >> limited

            g.expand(i=[0, 1, 2, 3])

        def left_out(plan, instance):
            if instance.task_id == "g.choose" and instance.map_index in (1, 2):
                plan.skip(instance, plan.left_out(instance, {"chosen": None}))

        states = self.drive(d, hook=left_out)
        self.assertEqual([states[f"g.work[{i}]"] for i in (0, 3)], ["success", "success"])

    def test_a_large_conf_is_not_copied_for_each_task(self):
        with DAG("d", db_path=self.db) as d:
            for k in range(1_000):
                liteflow.EmptyOperator(task_id=f"t{k}", params={"p": k})
        run = liteflow._Start(d, conf={"rows": [*map(str, range(50_000))]}, in_process=True)
        run._look_ahead()
        began = time.process_time()
        info = run._info()
        self.assertLess(time.process_time() - began, 1.0)
        self.assertEqual(len(info["params"]["rows"]), 50_000)

    def test_a_long_group_over_nothing_is_skipped(self):
        with DAG("d") as d:

            @task_group
            def g(x):
                last = task(task_id="first")(quiet)(x)
                for k in range(400):
                    last = last >> task(task_id=f"t{k}")(quiet)()

            g.expand(x=[])
        self.assertEqual({*self.drive(d).values()}, {"skipped"})

    def test_a_sensor_that_reschedules_ends_with_fail_fast(self):
        with DAG("d", fail_fast=True) as d:
            liteflow.PythonSensor(task_id="wait", python_callable=bool, mode="reschedule")
            liteflow.PythonOperator(task_id="bad", python_callable=bool)
        plan = liteflow._Plan(d)
        plan.settle()
        started = {}
        while (i := plan.take()) is not None:
            plan.start(i)
            started[i.task_id] = i
        plan.finish(started["bad"], "fatal", 0.0)
        self.assertEqual(plan.doomed, [started["wait"]])
        plan.finish(started["wait"], "reschedule", 0.0, {"wait": 1.0})
        self.assertEqual((started["wait"].state, plan.unfinished), ("failed", 0))

    def test_fail_fast_leaves_a_running_teardown_alone(self):
        with DAG("d", fail_fast=True) as d:
            up = liteflow.setup(task_id="up")(quiet)()
            down = liteflow.teardown(task_id="down")(quiet)()
            up >> down.as_teardown(setups=up)
            bad = task(task_id="bad")(quiet)()
            up >> bad
        plan = liteflow._Plan(d)
        plan.settle()
        up = plan.take()
        plan.start(up)
        plan.finish(up, "success", 0.0)
        plan.settle()
        started = {}
        while (i := plan.take()) is not None:
            plan.start(i)
            started[i.task_id] = i
        plan.finish(started["bad"], "fatal", 0.0)
        self.assertEqual(plan.doomed, [])
        plan.finish(started["down"], "success", 0.0)
        self.assertEqual(plan.unfinished, 0)

    def chain_of(self, n, first=None, **settings):
        with DAG("d") as d:
            made = [liteflow.EmptyOperator(task_id="t0", **settings)]
            made += [liteflow.EmptyOperator(task_id=f"t{i}") for i in range(1, n)]
            chain(*made)
            if first == "setup":
                made[0].as_setup()
        return d

    def layers(self, n, width):
        with DAG("d") as d:
            above = []
            for k in range(n):
                row = [
                    liteflow.EmptyOperator(task_id=f"t{k}.{i}", priority_weight=1 + (i == 0))
                    for i in range(width)
                ]
                if above:
                    liteflow.cross_downstream(above, row)
                above = row
        return d

    def assert_grows(self, small, large, megabytes):
        """`large` is 8 times the work: a quadratic plan would take 64 times as long."""
        seconds, more = self.seconds_of(small), self.seconds_of(large)
        self.assertLess(more, max(seconds, 0.005) * 32 + 0.1)
        self.assertLess(self.megabytes_of(large)[0], megabytes)

    def test_a_long_chain_with_a_priority_or_a_setup_is_planned_cheaply(self):
        for settings in ({"priority_weight": 2}, {"first": "setup"}):
            with self.subTest(**settings):
                ds = [self.chain_of(n, **settings) for n in (250, 2_000)]
                plans = [lambda d=d: liteflow._Plan(d) for d in ds]
                self.assert_grows(*plans, megabytes=10)

    def test_layers_that_wait_for_all_of_the_layer_above_are_planned_cheaply(self):
        d = self.layers(50, 50)
        self.assertLess(self.seconds_of(lambda: liteflow._Plan(d)), 3)  # 6 s and more, before
        peak, plan = self.megabytes_of(lambda: liteflow._Plan(d))
        self.assertLess(peak, 40)  # 430 before
        self.assertEqual(plan._by_id["t48.0"].weight, 2 + 2 + 49)
        self.assertEqual(plan._by_id["t0.1"].weight, 1 + 49 * 51)

    def grouped(self, n, above):
        with DAG("d") as d:
            if above == "setup":
                first = liteflow.setup(task_id="s")(quiet).expand(x=list(range(n)))
            else:
                first = task(task_id="s")(quiet).expand(x=list(range(n)))

            @task_group
            def g(x):
                work = task(task_id="w")(quiet)(x)
                task(task_id="v")(quiet)(work)

            made = g.expand(x=list(range(n)))
            first >> made
            if above == "setup":
                end = liteflow.teardown(task_id="end")(quiet)()
                made >> end.as_teardown(setups=first)
        return d

    def test_a_mapped_task_above_a_mapped_group_costs_what_its_instances_cost(self):
        for above in ("setup", "task"):
            with self.subTest(above=above):
                small, large = self.grouped(100, above), self.grouped(800, above)
                self.assert_grows(
                    lambda small=small: self.drive(small),
                    lambda large=large: self.drive(large),
                    megabytes=20,
                )

    def test_the_constants_of_a_mapped_group_are_searched_once_for_all_of_its_tasks(self):
        def group(tasks):
            @task_group
            def g(x):
                for n in range(tasks):
                    x = task(task_id=f"t{n}")(one_argument)(x)

            with DAG("d"):
                g.expand(x=[[n] * 10 for n in range(10_000)])

        seconds = self.seconds_of(lambda: group(2))
        self.assertLess(self.seconds_of(lambda: group(40)), seconds * 5 + 0.1)  # 20 times as long

    def test_a_limit_costs_little_beside_none(self):
        def flow(limit):
            with DAG("d", max_active_tasks=10**6) as d:
                t = task(task_id="t", max_active_tis_per_dagrun=limit)(quiet)
                t.expand(x=[0] * 20_000)
            return d

        free, limited = flow(None), flow(1)
        seconds = self.seconds_of(lambda: self.drive(free, at_once=1))
        more = self.seconds_of(lambda: self.drive(limited, at_once=1))
        self.assertLess(more, seconds * 4 + 1)

    def test_many_weights_scopes_or_circuits_in_a_chain_are_planned_cheaply(self):
        def weights():
            for n in range(4000):
                yield task(task_id=f"t{n}", priority_weight=n)(one_argument)()

        def scopes():
            for n in range(700):
                s, w, t = (task(task_id=f"{x}{n}")(one_argument)() for x in "swt")
                s.as_setup() >> w >> t.as_teardown(setups=s)
                yield from (s, w)

        def circuits():
            for n in range(1500):
                yield task.short_circuit(task_id=f"c{n}")(quiet)()

        for tasks in (weights, scopes, circuits):
            with self.subTest(tasks=tasks.__name__):
                with DAG("d") as d:
                    made = list(tasks())
                    chain(*made[:1], *made[1:])
                began = time.process_time()
                plan = liteflow._Plan(d)
                self.assertLess(time.process_time() - began, 2)
                plan.settle()
                self.assertEqual(plan.ready_count(0), 1)

    def test_thousands_of_scopes_are_planned_cheaply(self):
        def flow(n):
            with DAG("d") as d:
                for i in range(n):
                    s = liteflow.EmptyOperator(task_id=f"s{i}").as_setup()
                    w = liteflow.EmptyOperator(task_id=f"w{i}")
                    t = liteflow.EmptyOperator(task_id=f"t{i}")
                    s >> w >> t.as_teardown(setups=s)
            return d

        ds = [flow(n) for n in (150, 1_200)]
        self.assert_grows(*[lambda d=d: liteflow._Plan(d) for d in ds], megabytes=20)

    def test_a_resume_of_many_mapped_tasks_is_planned_cheaply(self):
        def flow(n):
            with DAG("d") as d:
                for i in range(n):
                    task(task_id=f"m{i}")(quiet).expand(x=list(range(20)))
            return d

        def past(n):
            keys = liteflow._element_keys(flow(1).tasks[0]._mapping, None)
            return [
                liteflow._Past(
                    i * 20 + k, f"m{i}", k, "success", 1, 0, 0, 0, keys[k], None, None,
                    "success", "2024", "2024", False,
                )
                for i in range(n)
                for k in range(20)
            ]  # fmt: skip

        def act(d, rows):
            keys = functools.partial(liteflow._element_keys, known=liteflow._Known({}))
            found = liteflow._Resumption(d, d.topological_sort(), rows, keys)
            liteflow._Plan(d, recorded=found.recorded())
            return found

        made = [(flow(n), past(n)) for n in (60, 480)]
        self.assertEqual(act(*made[0]).again, set())
        self.assert_grows(*[lambda m=m: act(*m) for m in made], megabytes=40)

    def test_a_join_over_thousands_ends_without_being_looked_at_each_time(self):
        with DAG("d", max_active_tasks=10**6) as d:
            t = task(task_id="t")(quiet).expand(x=[0] * 5_000)
            task(task_id="join", trigger_rule="all_done")(quiet)(t)
        decided = []
        decide = liteflow._Node.decide

        def counting(node, instance):
            decided.append(node)
            return decide(node, instance)

        with mock.patch.object(liteflow._Node, "decide", counting):
            self.drive(d)
        self.assertLess(len(decided), 20)

    def test_what_has_most_behind_it_goes_first(self):
        with DAG("d") as d:
            leaves = [task(task_id=f"leaf{i}")(quiet)() for i in range(10)]
            links = [task(task_id=f"link{i}")(quiet)() for i in range(10)]
            chain(*links)
        self.assertEqual(len(leaves), 10)
        plan = liteflow._Plan(d)
        plan.settle()
        self.assertEqual(plan.take().task_id, "link0")

    def test_always_runs_below_a_failed_setup_that_is_not_right_above(self):
        with DAG("d") as d:
            s = liteflow.setup(task_id="s")(quiet)()
            w = task(task_id="w")(quiet)()
            v = task(task_id="v", trigger_rule="always")(quiet)()
            u = task(task_id="u", trigger_rule="all_done")(quiet)()
            t = liteflow.teardown(task_id="t")(quiet)()
            s >> w >> [v, u] >> t.as_teardown(setups=s)
        states = self.drive(d, lambda i: "fatal" if i.task_id == "s" else "success")
        self.assertEqual((states["v"], states["u"]), ("success", "upstream_failed"))

    # No result depends on which worker was faster.

    def ends(self, made, order, outcomes, hook=None):
        plan = liteflow._Plan(made)
        plan.settle()
        started = {}
        while (i := plan.take()) is not None:
            plan.start(i)
            started[i.task_id] = i
        for name in order:
            plan.finish(started[name], outcomes[name], 0.0)
            if hook:
                hook(plan, started[name])
            plan.settle()
        return {i.label: i.state for i in plan.instances()}

    def test_a_failure_wins_over_a_skipped_list_whatever_came_first(self):
        with DAG("d") as d:
            a, listed = task(task_id="a")(quiet)(), task(task_id="listed")(quiet)()
            m = task(task_id="m")(quiet).expand(x=listed)
            a >> m
        outcomes = {"a": "fatal", "listed": "skipped"}
        for order in itertools.permutations(outcomes):
            self.assertEqual(self.ends(d, order, outcomes)["m"], "upstream_failed", order)

    def test_what_a_branch_leaves_out_of_a_mapped_group_is_skipped_whatever_came_first(self):
        with DAG("d") as d:
            listed = task(task_id="listed")(quiet)()
            choose = task.branch(task_id="choose")(quiet)()

            @task_group
            def g(x):
                one, two = task(task_id="one")(quiet)(x), task(task_id="two")(quiet)()
                one >> two
                choose >> two

            g.expand(x=listed)

        def hook(plan, instance):
            if instance.task_id == "choose":
                plan.skip(instance, plan.left_out(instance, {"chosen": None}))

        outcomes = {"listed": "fatal", "choose": "success"}
        for order in itertools.permutations(outcomes):
            self.assertEqual(self.ends(d, order, outcomes, hook)["g.two"], "skipped", order)


class SubmitTest(FlowCase):
    """Runs that are handed to a pool: what was accepted is in the file, and is run once."""

    SOURCE = """
        with DAG("line", params={"n": 1}) as dag:
            @task
            def f(params): return params["n"] * 2
            f()
        with DAG("held", params={"name": "a"}) as held:
            @task
            def g(params):
                folder = Path(os.environ["CASE_DIR"])
                with open(folder / "began", "a") as file: file.write(params["name"] + " ")
                while not (folder / "go").exists(): time.sleep(0.005)
            g()
        """

    def setUp(self):
        super().setUp()
        self.flows = self.module(self.SOURCE)

    def began(self):
        path = self.folder / "began"
        return path.read_text().split() if path.exists() else []

    def go_on(self):
        (self.folder / "go").touch()

    def state(self, future):
        run = Dag(future.dag_id).get_run(future.run_id, self.db)
        return run.state.value, run.reason

    def hold(self, pool, *names, **options):
        submit = functools.partial(pool.submit, self.flows.held, db_path=self.db, **options)
        futures = [submit(conf={"name": name}) for name in names]
        wait_until(self.began)
        return futures

    def test_a_future_gives_the_run(self):
        with WorkerPool(2, max_runs=3) as pool:
            submit = functools.partial(pool.submit, self.flows.dag, db_path=self.db)
            futures = [submit(conf={"n": n}) for n in range(8)]
            runs = [future.result(LIMIT) for future in futures]
        self.assertEqual([run.xcom_pull("f") for run in runs], [2 * n for n in range(8)])
        self.assertEqual([run.run_id for run in runs], [future.run_id for future in futures])
        self.assertEqual({future.dag_id for future in futures}, {"line"})
        self.assert_nothing_left()

    def test_a_pool_closes_the_files_in_which_it_has_no_runs_any_more(self):
        def owners():
            return len([*self.folder.glob("*.db-run-*")])

        with WorkerPool(1, max_runs=1) as pool:
            futures = self.hold(pool, "a")
            for n in range(20):
                path = self.folder / f"{n}.db"
                futures.append(pool.submit(self.flows.dag, db_path=path))
            self.assertEqual(owners(), 22)  # what waits has an owner that lives, what runs its own
            self.go_on()
            for future in futures:
                self.assertEqual(future.result(LIMIT).state, "success")
            for _ in range(20):  # a file that is replaced by another one
                pool.submit(self.flows.dag, db_path=self.db).result(LIMIT)
                for end in ("", "-wal", "-shm"):
                    Path(f"{self.db}{end}").unlink(missing_ok=True)
            self.assertLess(owners(), 10)
            self.assertEqual(pool._runs._active, {})
        self.assertEqual(owners(), 0)

    def test_a_worker_keeps_no_dag_of_runs_that_are_over(self):
        module = self.module(
            """
            @task
            def kept():
                Dag("of_a_task")
                return len(liteflow._kept_dags)
            def made():
                with DAG("made_in_a_function") as dag: kept()
                return dag
            """
        )
        path = mock.patch.object(sys, "path", [str(self.folder), *sys.path])
        with path, WorkerPool(1, "forkserver") as pool:
            runs = [module.made().run(db_path=self.db, executor=pool) for _ in range(4)]
        self.assertEqual(len({run.xcom_pull("kept") for run in runs}), 1)

    def test_two_submits_in_the_same_microsecond_are_two_runs(self):
        with WorkerPool(1) as pool:
            first = pool.submit(self.flows.dag, db_path=self.db)
            at = datetime.datetime.fromisoformat(first.run_id.removeprefix("manual__"))
            clock = [at]

            def now(real=liteflow._utcnow):
                return clock.pop() if clock else real()

            with mock.patch.object(liteflow, "_utcnow", now):
                second = pool.submit(self.flows.dag, db_path=self.db, logical_date=at)
            self.assertNotEqual(first.run_id, second.run_id)
            exists = liteflow.DagRunAlreadyExists  # what a service looks for that is asked twice
            with self.assertRaisesRegex(exists, "has a run .* already: resume it"):
                pool.submit(self.flows.dag, db_path=self.db, run_id=first.run_id)
            self.assertEqual([x.result(LIMIT).xcom_pull("f") for x in (first, second)], [2, 2])

    def test_runs_of_a_clock_that_stands_still(self):
        at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        looks = itertools.chain([at] * 9, iter(lambda: self.fail("it looks again for good"), at))
        with mock.patch.object(liteflow, "_utcnow", looks.__next__):
            runs = [DAG("d").run(db_path=self.db) for _ in range(3)]
        self.assertEqual(len({run.run_id for run in runs}), 3)

    def test_what_is_accepted_is_in_the_file_at_once_and_runs_in_order(self):
        with WorkerPool(1, max_runs=1) as pool:
            futures = self.hold(pool, *"abc")
            self.assertEqual(self.began(), ["a"])
            self.assertEqual(self.state(futures[0]), ("running", None))
            self.assertEqual([self.state(x) for x in futures[1:]], [("queued", "submitted")] * 2)
            queued = Dag("held").get_run(futures[1].run_id, self.db)
            self.assertTrue(queued.owner_alive)
            self.assertIsNone(queued.start_date)
            self.assertEqual(queued.conf, {"name": "b"})
            self.go_on()
            states = [future.result(LIMIT).state for future in futures]
        self.assertEqual((states, self.began()), (["success"] * 3, [*"abc"]))

    def test_a_run_has_the_environment_and_directory_of_its_submit(self):
        source = """
            with DAG("place") as place:
                @task
                def here(): return os.environ.get("LITEFLOW_DAY"), os.path.basename(os.getcwd())
                here()
            """
        place = self.module(source).place
        self.addCleanup(os.chdir, os.getcwd())
        with WorkerPool(1, max_runs=1) as pool, mock.patch.dict(os.environ):
            self.hold(pool, "a")  # the others begin once the program is elsewhere
            futures = []
            for day in ("monday", "tuesday"):
                (self.folder / day).mkdir()
                os.chdir(self.folder / day)
                os.environ["LITEFLOW_DAY"] = day
                futures.append(pool.submit(place, db_path=self.db))
            os.chdir(self.folder)
            del os.environ["LITEFLOW_DAY"]
            self.go_on()
            found = [future.result(LIMIT).xcom_pull("here") for future in futures]
        self.assertEqual(found, [("monday", "monday"), ("tuesday", "tuesday")])

    def test_what_is_wrong_is_refused_and_nothing_is_written(self):
        with WorkerPool(1) as pool:
            for error, options in (
                (TypeError, {"executor": pool}),
                (TypeError, {"wait": True}),
                (TypeError, {"nope": 1}),
                (TypeError, {"pools": 1}),
                (TypeError, {"conf": {"n": object()}}),
                (ValueError, {"run_id": ""}),
                (DatabaseError, {"resume": True, "run_id": "r"}),
            ):
                with self.subTest(options=options), self.assertRaises(error):
                    pool.submit(self.flows.dag, db_path=self.db, **options)
            self.assertEqual([*self.folder.glob(f"{self.db.name}*")], [])
            with DAG("typed", params={"n": Param(1, type="integer")}) as typed:
                self.step("f")()
            with self.assertRaises(liteflow.ParamValidationError):
                pool.submit(typed, db_path=self.folder / "none.db", conf={"n": "x"})
            self.assertEqual([*self.folder.glob("none.db*")], [])
            pool.submit(self.flows.dag, db_path=self.db, run_id="r").result(LIMIT)
            with self.assertRaises(ValueError):
                pool.submit(self.flows.dag, db_path=self.db, run_id="r")
            with self.assertRaises(liteflow.RunNotFound):
                pool.submit(self.flows.dag, db_path=self.db, run_id="s", resume=True)
            for act in (pool.submit, pool.recover):
                with self.assertRaises(TypeError):
                    act("line")
        unused = WorkerPool(1)
        unused.shutdown()
        for act in (pool.submit, pool.recover, unused.submit, unused.recover):
            with self.assertRaises(RuntimeError):
                act(self.flows.dag, db_path=self.db)
        self.assertEqual(len(recorded_runs("line", self.db)), 1)

    def test_a_run_that_waits_for_others_of_its_dag_holds_up_no_other_dag(self):
        self.flows.held.max_active_runs = 1
        with WorkerPool(2, max_runs=2) as pool:
            futures = self.hold(pool, *"abc")
            other = pool.submit(self.flows.dag, db_path=self.db)
            self.assertEqual(other.result(LIMIT).state, "success")
            self.assertEqual(self.began(), ["a"])
            self.go_on()
            self.assertEqual({future.result(LIMIT).state for future in futures}, {"success"})
        self.assertEqual(self.began(), [*"abc"])

    def ruled_out(self):
        """Let another process's run rule out those of the DAG, until what this gives is closed."""
        self.flows.dag.max_active_runs = 1
        self.flows.dag.run(db_path=self.db, executor=pool(), run_id="other")
        lock = contextlib.ExitStack()
        owner, _ = lock.enter_context(liteflow._owned_folder(str(self.db)))
        self.abandon(owner, running=False)
        return lock

    def test_a_run_that_another_process_rules_out_is_tried_again(self):
        lock = self.ruled_out()
        with mock.patch.object(liteflow, "_TRIED_AGAIN", 0.02), WorkerPool(1) as mine:
            future = mine.submit(self.flows.dag, db_path=self.db)
            wait_until(lambda: mine._runs._sleeps)
            self.assertEqual(self.state(future)[0], "queued")
            lock.close()
            self.assertEqual(future.result(LIMIT).state, "success")

    def test_who_watches_a_run_that_others_rule_out_is_replaced_when_it_begins_another(self):
        lock = self.ruled_out()
        with mock.patch.object(liteflow, "_TRIED_AGAIN", 0.2), WorkerPool(2) as mine:
            future = mine.submit(self.flows.dag, db_path=self.db)
            wait_until(lambda: mine._runs._sleeps)
            self.hold(mine, "a")
            lock.close()
            try:
                self.assertEqual(future.result(5).state, "success")
            finally:
                self.go_on()

    def test_a_run_that_no_thread_can_serve_is_not_accepted(self):
        with WorkerPool(1) as mine:
            submit = functools.partial(mine.submit, self.flows.dag, db_path=self.db)
            none_left = mock.Mock(side_effect=RuntimeError("can't start new thread"))
            with (
                mock.patch.object(threading.Thread, "start", none_left),
                self.assertRaisesRegex(RuntimeError, "new thread"),
            ):
                submit(run_id="refused")
            self.assertEqual(self.flows.dag.get_run("refused", self.db).reason, "cancelled")
            self.hold(mine, "a")
            with mock.patch.object(threading.Thread, "start", none_left):
                future = submit()
            self.go_on()
            self.assertEqual(future.result(LIMIT).state, "success")
        self.assert_nothing_left()

    def test_a_file_that_takes_no_run_costs_no_descriptor(self):
        full = mock.patch.object(os, "mkdir", side_effect=OSError(28, "No space"))
        other = self.folder / "other"
        other.write_text("no database, but long enough to be read as a header" * 99)
        with WorkerPool(1) as mine:
            counts = set()
            for _ in range(3):
                with full, self.assertRaisesRegex(DatabaseError, "No space"):
                    mine.submit(self.flows.dag, db_path=self.db)
                with self.assertRaisesRegex(DatabaseError, "not a liteflow database"):
                    mine.submit(self.flows.dag, db_path=other)
                counts.add(len(os.listdir("/dev/fd")))
        self.assertEqual(len(counts), 1)

    def test_a_run_that_is_taken_over_tells_its_future(self):
        with WorkerPool(1) as mine:
            [future] = self.hold(mine, "a")
            self.abandon(running=False)
            self.go_on()
            self.assertIsInstance(future.exception(LIMIT), liteflow.AlreadyRunning)

    def test_a_resume_in_line_knows_what_its_dead_scheduler_left(self):
        self.flows.dag.run(db_path=self.db, executor=pool(), run_id="r")
        self.abandon()
        with WorkerPool(1) as mine:
            mine.submit(self.flows.dag, db_path=self.db, resume=True, run_id="r").result(LIMIT)
        died = f"interrupted: {liteflow._DIED}"
        found = self.query("SELECT state, error FROM task_attempt ORDER BY try_number")
        self.assertEqual(found, [("interrupted", died), ("success", None)])

    def test_a_resume_that_is_cancelled_in_line_leaves_the_run_as_long_as_it_was(self):
        run = self.flows.dag.run(db_path=self.db, executor=pool(), run_id="r")
        run.clear("f")
        with WorkerPool(1, max_runs=1) as mine:
            self.hold(mine, "a")
            future = mine.submit(self.flows.dag, db_path=self.db, resume=True, run_id="r")
            self.assertTrue(future.cancel())
            self.go_on()
        cancelled = run.refresh()
        self.assertEqual((cancelled.state, cancelled.reason), ("failed", "cancelled"))
        self.assertEqual((cancelled.end_date, cancelled.duration), (run.end_date, run.duration))

    def test_cancel_closes_a_run_that_has_not_begun(self):
        with WorkerPool(1, max_runs=1) as pool:
            first, second = self.hold(pool, *"ab")
            self.assertEqual(
                (second.cancel(), second.cancel(), first.cancel()), (True, True, False)
            )
            self.assertEqual(self.state(second), ("failed", "cancelled"))
            self.assertEqual(concurrent.futures.wait([second], LIMIT).done, {second})
            self.go_on()
            self.assertEqual(first.result(LIMIT).state, "success")
            with self.assertRaises(concurrent.futures.CancelledError):
                second.result()
            self.assertTrue(second.cancel())
        self.assertTrue(second.cancel())
        self.assertEqual(self.began(), ["a"])

    def test_a_run_is_cancelled_again_where_that_could_not_be_recorded(self):
        with WorkerPool(1, max_runs=1) as mine:
            _, second = self.hold(mine, *"ab")
            full = mock.Mock(side_effect=DatabaseError("the disk is full"))
            with mock.patch.object(liteflow._Store, "cancel_run", full):
                self.assertRaises(DatabaseError, second.cancel)
            self.assertEqual((second.cancel(), second.cancel()), (True, True))
            self.assertEqual(self.state(second), ("failed", "cancelled"))
            self.go_on()

    def test_what_a_worker_can_not_find_closes_the_run_as_failed(self):
        with DAG("nowhere") as d:
            task(task_id="f")(lambda: 1)()
        with WorkerPool(1) as pool:
            future = pool.submit(d, db_path=self.db)
            with self.assertRaises(UnreachableTask):
                future.result(LIMIT)
            state, reason = self.state(future)
        self.assertEqual(state, "failed")
        self.assertIn("UnreachableTask: task 'f'", reason)

    def test_a_run_that_was_deleted_or_cleared_meanwhile_is_not_run(self):
        with WorkerPool(1, max_runs=1) as pool:
            first, gone, cleared = self.hold(pool, *"abc")
            Dag("held").get_run(gone.run_id, self.db).delete()
            with contextlib.closing(liteflow._Store(str(self.db))) as store:
                row = Dag("held").get_run(cleared.run_id, self.db)._row
                store.change(row.id, bool, store.clear, [], liteflow._CLEARED)
            self.go_on()
            self.assertEqual(first.result(LIMIT).state, "success")
            with self.assertRaises(liteflow.RunNotFound):
                gone.result(LIMIT)
            with self.assertRaises(concurrent.futures.CancelledError):
                cleared.result(LIMIT)
        self.assertEqual((self.began(), self.state(cleared)), (["a"], ("queued", None)))

    def test_of_a_run_that_waits_there_are_no_values_yet(self):
        with WorkerPool(1, max_runs=1) as mine:
            _, waits = self.hold(mine, *"ab")
            run = Dag("held").get_run(waits.run_id, self.db)
            self.assertEqual((run.state, run.xcom_pull("g"), run.log("g")), ("queued", None, ""))
            self.go_on()

    def test_a_run_whose_file_is_gone_as_it_would_begin_is_not_waited_for(self):
        (folder := self.folder / "gone").mkdir()
        with WorkerPool(1, max_runs=1) as mine:
            self.hold(mine, "a")
            waits = mine.submit(self.flows.dag, db_path=folder / "x.db")
            shutil.rmtree(folder)
            self.go_on()
            self.assertIsInstance(waits.exception(LIMIT), DatabaseError)

    def test_a_run_in_a_live_line_is_not_resumed_past_it(self):
        with WorkerPool(1, max_runs=1) as mine:
            first, second = self.hold(mine, *"ab")
            with self.assertRaisesRegex(liteflow.AlreadyRunning, "it is queued there"):
                self.flows.held.run(db_path=self.db, resume=True)
            with WorkerPool(1) as other:
                self.assertEqual(other.recover(self.flows.held, db_path=self.db), [])
            self.assertTrue(second.cancel())
            self.go_on()
            self.assertEqual(self.flows.held.run(db_path=self.db, resume=True).state, "success")
            self.assertEqual(first.result(LIMIT).state, "success")

    def test_a_resume_may_be_submitted(self):
        self.flows.held.run(
            db_path=self.db, executor=pool(), run_id="r", stop=mock.Mock(is_set=self.began)
        )
        self.assertEqual(Dag("held").get_run("r", self.db).reason, "stopped")
        self.go_on()
        with WorkerPool(1) as mine:
            again = functools.partial(mine.submit, self.flows.held, db_path=self.db, resume=True)
            self.assertEqual(again(run_id="r").result(LIMIT).state, "success")
            self.assertEqual(again().result(LIMIT).run_id, "r")  # there is nothing to do
        self.assertEqual(self.began(), ["a", "a"])

    def test_shutdown_waits_for_all_runs_or_gives_up_those_that_have_not_begun(self):
        for give_up in (False, True):
            with self.subTest(give_up=give_up):
                self.db = self.folder / f"{give_up}.db"
                for name in ("began", "go"):
                    (self.folder / name).unlink(missing_ok=True)
                mine = WorkerPool(1, max_runs=1)
                futures = self.hold(mine, *"ab")
                mine.shutdown(wait=False, cancel_futures=give_up)
                self.assertEqual(futures[1].cancelled(), give_up)
                self.go_on()
                mine.shutdown()
                self.assertEqual(futures[0].result(0).state, "success")
                wanted = ("queued", "submitted") if give_up else ("success", None)
                self.assertEqual(self.state(futures[1]), wanted)
        self.assertFalse(Dag("held").get_run(futures[1].run_id, self.db).owner_alive)
        for words in (("--keep", "0"), ("--older-than", "0s")):  # what waits is accepted work
            self.assertEqual(self.cli_here("prune", *words, "--db", self.db).returncode, 0)
        seen = self.cli_here("runs", "--since", "1h", "--state", "queued", "--db", self.db)
        self.assertIn(futures[1].run_id, seen.stdout)
        with WorkerPool(1) as mine:
            [found] = mine.recover(self.flows.held, db_path=self.db)
            self.assertEqual(
                (found.run_id, found.result(LIMIT).conf), (futures[1].run_id, {"name": "b"})
            )

    def test_shutdown_may_cut_off_what_runs_for_recover(self):
        mine = WorkerPool(1, max_runs=1)
        futures = self.hold(mine, *"ab")
        mine.shutdown(stop=True)
        self.assertEqual(self.state(futures[0]), ("failed", "its pool was shut down"))
        self.assertEqual(futures[0].result(0).state, "failed")
        self.assertTrue(futures[1].cancelled())
        self.go_on()
        with WorkerPool(1) as mine:
            found = mine.recover(self.flows.held, db_path=self.db)
            self.assertEqual([x.run_id for x in found], [x.run_id for x in futures])
            self.assertEqual({x.result(LIMIT).state for x in found}, {"success"})
            self.assertEqual(mine.recover(self.flows.held, db_path=self.db), [])
        self.assertEqual(sorted(self.began()), ["a", "a", "b"])

    def test_a_coroutine_that_is_cancelled_cuts_off_what_runs(self):
        async def serve():  # a Ctrl-C cancels it
            with WorkerPool(1):
                asyncio.current_task().cancel()
                await asyncio.sleep(LIMIT)

        with mock.patch.object(WorkerPool, "shutdown") as shutdown:
            self.assertRaises(asyncio.CancelledError, asyncio.run, serve())
        shutdown.assert_called_once_with(stop=True)

    def test_a_task_that_is_told_to_end_cuts_off_what_its_pool_runs(self):
        ends = liteflow.AirflowTaskTimeout, liteflow.AirflowTaskTerminated, KeyboardInterrupt
        for error in (*ends, ValueError, SystemExit):
            with self.subTest(error), mock.patch.object(WorkerPool, "shutdown") as shutdown:
                with self.assertRaises(error), WorkerPool(1):
                    raise error
                shutdown.assert_called_once_with(stop=error in ends)

    def test_a_task_that_is_told_to_end_with_its_program_is_for_recover(self):
        # As by systemd, which tells the whole group.
        mine = WorkerPool(1)
        [future] = self.hold(mine, "a")
        [slot] = [slot for runner in mine._runners for slot in runner._slots]
        os.kill(slot.pid, signal.SIGTERM)
        mine.shutdown(cancel_futures=True)
        self.assertEqual(self.state(future), ("failed", "its pool was shut down"))
        self.go_on()
        with WorkerPool(1) as mine:
            [found] = mine.recover(self.flows.held, db_path=self.db)
            self.assertEqual(found.result(LIMIT).state, "success")

    def test_a_worker_that_is_told_to_end_as_it_starts_ends_no_run(self):
        # As by systemd, which tells the whole group.
        join, left, meanwhile = liteflow._SlotRunner._join, [], []

        def killed(runner, slot):
            if left and (number := left.pop()):
                while meanwhile:
                    meanwhile.pop()()
                os.kill(slot.pid, number)
            join(runner, slot)

        dies_once = self.module(
            """
            with DAG("dies_once") as dag:
                @task(retries=1)
                def dies(ti): os.kill(os.getpid(), signal.SIGKILL) if ti.try_number == 1 else None
                dies()
            """
        ).dag
        self.enterContext(mock.patch.object(liteflow._SlotRunner, "_join", killed))
        self.enterContext(mock.patch.object(liteflow, "_TRIED_AGAIN", 0.05))
        term, kill = signal.SIGTERM, signal.SIGKILL  # by the kernel, for memory
        for flow, kills, state in (
            (self.flows.dag, [term, kill], "success"),
            (self.flows.dag, [term] * 3, "failed"),
            (dies_once, [term, 0], "success"),  # it has begun
        ):
            with self.subTest(dag=flow.dag_id, kills=kills), WorkerPool(1) as mine:
                left += kills
                future = mine.submit(flow, db_path=self.db)
                error = future.exception(LIMIT)
                self.assertEqual(type(error), liteflow._Killed if state == "failed" else type(None))
                self.assertEqual((self.state(future)[0], left), (state, []))
        bury = liteflow._Slot.bury

        def buried(slot, *grace, **named):
            bury(slot, *grace, **named)
            slot.exitcode = 255  # where the fork server was told to end, too, and can't tell

        unknown = mock.patch.object(liteflow._Slot, "bury", buried)
        with WorkerPool(1, mp_context="forkserver") as mine, unknown:
            left.append(term)
            future = mine.submit(self.flows.dag, db_path=self.db)
            self.assertEqual(future.result(LIMIT).state, "success")
        for stop in (False, True):
            with self.subTest(stop=stop), WorkerPool(1) as mine:
                left.append(term)
                meanwhile.append(lambda mine=mine, stop=stop: mine._runs.close(True, stop))
                future = mine.submit(self.flows.dag, db_path=self.db)
                mine.shutdown()
                self.assertTrue(future.cancelled())
                self.assertEqual(self.state(future), ("queued", "submitted"))

    def test_a_run_that_does_not_fit_today_s_code_is_told_and_stays(self):
        module = self.module(
            """
            with DAG("changed") as before: task(task_id="a")(print)()
            with DAG("changed", params={"n": Param(type="integer")}) as today: task(task_id="a")(print)()
            """
        )
        before, today = module.before, module.today
        with WorkerPool(1, max_runs=1) as mine:
            self.hold(mine, "a")
            left = mine.submit(before, conf={}, db_path=self.db)
            mine.shutdown(cancel_futures=True, wait=False)
            self.go_on()
        with WorkerPool(1) as mine, self.assertLogs("liteflow", "ERROR") as told:
            [found] = mine.recover(today, db_path=self.db)
            self.assertIsInstance(found.exception(LIMIT), liteflow.ParamValidationError)
        self.assertRegex(told.output[0], f"{re.escape(left.run_id)}.*'changed'.*param 'n'")
        self.assertEqual(self.state(left), ("queued", "submitted"))
        with WorkerPool(1) as mine:
            [found] = mine.recover(before, db_path=self.db)
            self.assertEqual(found.result(LIMIT).state, "success")

    def test_what_is_submitted_while_the_pool_shuts_down_is_refused_or_left_for_recover(self):
        write, futures = liteflow._RunLine.write, []
        for early in (True, False):
            mine = WorkerPool(1)

            def meanwhile(line, *what, mine=mine, early=early):
                if early:
                    mine.shutdown()
                found = write(line, *what)
                mine.shutdown()
                return found

            refused = self.assertRaisesRegex(RuntimeError, "shut down")
            with (
                mock.patch.object(liteflow._RunLine, "write", meanwhile),
                refused if early else contextlib.nullcontext(),
            ):
                futures.append(mine.submit(self.flows.dag, db_path=self.db))
            self.assert_nothing_left()
        [future] = futures
        self.assertTrue(future.cancelled())
        self.assertEqual(self.state(future), ("queued", "submitted"))

    def test_stop_reaches_a_run_that_has_not_begun(self):
        with WorkerPool(1, max_runs=1) as mine:
            first, second = self.hold(mine, *"ab")
            done = self.cli_here("stop", f"held/{second.run_id}", "--db", self.db)
            self.assertIn("was queued, and will not begin", done.stderr)
            self.assertEqual(self.state(second), ("failed", "stopped"))
            self.go_on()
            self.assertEqual(first.result(LIMIT).state, "success")
            with self.assertRaises(concurrent.futures.CancelledError):
                second.result(LIMIT)
        self.assertEqual(self.began(), ["a"])

    def test_a_pool_that_is_dropped_keeps_nobody(self):
        path = self.script(
            "import gc\nfrom liteflow import *\n"
            "with DAG('d') as d:\n    task(task_id='f')(print)()\n"
            "def work(): return WorkerPool(1).submit(d).result().state.value\n"
            "if __name__ == '__main__':\n    print(work())\n    gc.collect()\n    print('end')\n"
        )
        done = self.python(path)
        self.assertEqual((done.stdout, done.stderr), ("success\nend\n", ""))

    def test_ctrl_c_while_it_waits_begins_nothing_more(self):
        path = self.script(
            "import os, sys, time\nfrom pathlib import Path\nfrom liteflow import *\n"
            + textwrap.dedent(self.SOURCE)
            + "if __name__ == '__main__':\n"
            "    with WorkerPool(1, max_runs=1) as pool:\n"
            "        for n in range(20): pool.submit(held, conf={'name': str(n)})\n"
        )
        process = self.start(path, env={**os.environ, "CASE_DIR": str(self.folder)})
        self.assertTrue(wait_until(self.began))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        self.db = self.folder / "liteflow.db"
        self.assertEqual(self.began(), ["0"])
        states = collections.Counter(self.query("SELECT state, reason FROM dag_run"))
        wanted = {("failed", "its pool was shut down"): 1, ("queued", "submitted"): 19}
        self.assertEqual(states, wanted)

    def test_recover_revives_nothing_that_somebody_ended(self):
        with WorkerPool(1, max_runs=1) as mine:
            futures = self.hold(mine, *"abc", stop=mock.Mock(is_set=lambda: len(self.began()) == 1))
            futures[1].cancel()
            futures[0].result(LIMIT)
        states = {self.state(future) for future in futures}
        self.assertLessEqual({("failed", "cancelled"), ("failed", "stopped")}, states)
        run = self.flows.dag.run(db_path=self.db, executor=pool())
        run.clear("f")
        with WorkerPool(1) as mine:
            self.assertEqual(mine.recover(self.flows.held, db_path=self.db), [])
            self.assertEqual(mine.recover(self.flows.dag, db_path=self.db), [])
            self.assertEqual(mine.recover(self.flows.dag, db_path=self.folder / "none.db"), [])
            (self.folder / "empty.db").touch()
            self.assertEqual(mine.recover(self.flows.dag, db_path=self.folder / "empty.db"), [])

    def test_recover_revives_nothing_that_was_cancelled_when_it_was_recovered(self):
        mine = WorkerPool(1, max_runs=1)
        self.hold(mine, *"abc")
        mine.shutdown(wait=False, cancel_futures=True)
        self.go_on()
        mine.shutdown()
        with WorkerPool(1, max_runs=1) as mine:
            (self.folder / "go").unlink()
            second, third = mine.recover(self.flows.held, db_path=self.db)
            self.assertTrue(third.cancel())
            self.assertEqual(self.state(third), ("failed", "cancelled"))
            wait_until(lambda: self.began() == ["a", "b"])
            self.assertFalse(second.cancel())
            self.go_on()
            self.assertEqual(second.result(LIMIT).state, "success")
            self.assertEqual(mine.recover(self.flows.held, db_path=self.db), [])
        self.assertEqual(self.began(), ["a", "b"])

    def test_processes_that_recover_at_once_share_the_runs(self):
        source, count = textwrap.dedent(self.SOURCE), 1000 if SOAK else 20
        path = self.script(
            "import os, sys, time\nfrom pathlib import Path\nfrom liteflow import *\n"
            + source
            + textwrap.dedent(
                """
                if __name__ == "__main__":
                    pool = WorkerPool(1, max_runs=2)
                    if sys.argv[1] == "die":
                        count = int(sys.argv[2])
                        futures = [pool.submit(held, conf={"name": str(n)}) for n in range(count)]
                        while not Path("began").exists(): time.sleep(0.005)
                        os.kill(os.getpid(), 9)
                    futures = pool.recover(held)
                    print(len(futures), flush=True)
                    Path("go").touch()
                    pool.shutdown()
                    done = [f for f in futures if not f.cancelled()]
                    assert all(f.result().state == "success" for f in done)
                    print(len(done))
                """
            )
        )
        environ = {**os.environ, "CASE_DIR": str(self.folder)}
        self.assertEqual(self.python(path, "die", count, env=environ).returncode, -signal.SIGKILL)
        self.db = self.folder / "liteflow.db"
        cut_off = len(self.began())
        both = [self.start(path, "recover", env=environ) for _ in range(2)]
        counts = []
        for process in both:
            out, err = process.communicate(timeout=LIMIT)
            self.assertEqual((process.returncode, err), (0, ""))
            counts.append(int(out.split()[1]))
        self.assertEqual(sum(counts), count)
        self.assertEqual(self.query("SELECT DISTINCT state FROM dag_run"), [("success",)])
        # What was cut off began twice, all else once.
        began = collections.Counter(self.began())
        self.assertEqual((len(began), sum(began.values())), (count, count + cut_off))

    @unittest.skipIf(sys.version_info[:2] == (3, 12), "it starts no process at its end")
    def test_the_interpreters_end_drains_the_line(self):
        path = self.script(
            "from liteflow import *\n"
            "with DAG('d') as d:\n    task(task_id='f')(print)()\n"
            "if __name__ == '__main__':\n"
            "    pool = WorkerPool(1, max_runs=1)\n"
            "    for _ in range(5): pool.submit(d)\n"
        )
        done = self.python(path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.db = self.folder / "liteflow.db"
        self.assertEqual([run.state for run in Dag("d").runs(self.db)], ["success"] * 5)
        self.assert_nothing_left()

    @unittest.skipIf(sys.version_info[:2] == (3, 12), "it starts no process at its end")
    def test_a_worker_that_starts_once_its_script_has_ended_finds_the_tasks(self):
        self.script(
            """
            import os, sys, threading, time
            from pathlib import Path
            from liteflow import DAG, WorkerPool, task
            with DAG("d") as dag:
                @task(retries=1)
                def f(ti):
                    Path("began").touch()
                    while not Path("ended").exists(): time.sleep(0.01)
                    if ti.try_number == 1: os._exit(1)
                f()
            if __name__ == "__main__":
                pool = WorkerPool(1, max_runs=1)
                for _ in range(2): pool.submit(dag)
                def watch():
                    while hasattr(sys.modules["__main__"], "__file__"): time.sleep(0.001)
                    Path("ended").touch()
                threading.Thread(target=watch).start()
                while not Path("began").exists(): time.sleep(0.01)  # else it names the file anew
            """
        )
        done = self.python("my_flow.py", timeout=30)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        runs = Dag("d").runs(self.folder / "liteflow.db")
        self.assertEqual([run.state for run in runs], ["success"] * 2)

    @unittest.skipIf(sys.version_info[:2] == (3, 12), "it starts no process at its end")
    def test_signals_at_the_interpreters_end_cut_off_what_runs(self):
        """In order, so that the teardown runs; the second one at once."""
        self.script(
            """
            import os, signal, time
            from pathlib import Path
            import liteflow
            from liteflow import DAG, WorkerPool, setup, task, teardown
            def interrupt(number):
                while not Path(f"drain {number}").exists(): time.sleep(0.01)
                os.kill(int(os.environ["SCHEDULER"]), signal.SIGINT)
                time.sleep(600)
            with DAG("d") as dag:
                @setup
                def begin(): pass
                @task
                def work(): interrupt(1)
                @teardown
                def end(): interrupt(2)
                begin() >> work() >> end().as_teardown(setups=dag.task_dict["begin"])
            if __name__ == "__main__":
                os.environ["SCHEDULER"], drain = str(os.getpid()), liteflow._RunLine.drain
                def told(line):
                    Path(f"drain {1 + Path('drain 1').exists()}").touch()
                    drain(line)
                liteflow._RunLine.drain = told
                pool = WorkerPool(1)
                pool.submit(dag)
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.db = self.folder / "liteflow.db"
        [run] = Dag("d").runs(self.db)
        self.assertEqual((run.state, run.reason), ("failed", "its pool was shut down"))
        self.assertEqual(self.states(run), {"begin": "success", "work": None, "end": None})
        self.assertFalse(any(alive(ti.pid) for ti in run.get_task_instances()))
        self.assert_nothing_left()

    def test_a_signal_at_the_interpreters_end_ends_the_runs_of_all_threads(self):
        self.script(
            """
            import os, signal, threading, time
            from pathlib import Path
            from liteflow import DAG, task
            with DAG("d") as dag:
                @task
                def f(run_id): Path(f"began {run_id}").touch(); time.sleep(600)
                f()
            def run(n):
                try: dag.run(run_id=f"{n}", max_workers=1)
                except RuntimeError as error: print(f"{error}\\n", end="", flush=True)
            if __name__ == "__main__":
                for n in range(3): threading.Thread(target=run, args=(n,)).start()
                def end():
                    while not threading._SHUTTING_DOWN: time.sleep(0.01)
                    time.sleep(0.2)  # it waits for the threads
                    os.kill(os.getpid(), signal.SIGINT)
                threading.Thread(target=end, daemon=True).start()
                while len([*Path().glob("began*")]) < 3: time.sleep(0.01)
            """
        )
        done = self.python("my_flow.py", timeout=30)
        self.assertEqual(done.stdout, "the WorkerPool was shut down during the run\n" * 3)
        runs = Dag("d").runs(self.folder / "liteflow.db")
        self.assertEqual([run.state for run in runs], ["failed"] * 3)

    def test_the_interpreters_end_waits_for_no_run_in_a_daemon_thread(self):
        self.script(
            """
            import threading, time
            from pathlib import Path
            from liteflow import DAG, task
            with DAG("d") as dag:
                task(task_id="f")(lambda: (Path("began").touch(), time.sleep(600)))()
            threading.excepthook = str  # the pool is shut down during the run
            if __name__ == "__main__":
                threading.Thread(target=dag.run, daemon=True).start()
                while not Path("began").exists(): time.sleep(0.01)
            """
        )
        self.assertEqual(self.python("my_flow.py", timeout=30).returncode, 0)

    @unittest.skipUnless(SOAK, "LITEFLOW_SOAK=1: ten thousand runs on one pool")
    def test_thousands_of_runs_leave_nothing_in_the_process(self):
        def size():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

        def batch():
            began = time.process_time()  # a busy machine makes no more of it
            futures = [mine.submit(self.flows.dag, db_path=self.db) for _ in range(100)]
            try:
                self.assertEqual({future.result(LIMIT).state for future in futures}, {"success"})
            except TimeoutError:
                left = [(x.run_id, x.running(), self.state(x)) for x in futures if not x.done()]
                slots = [(s.pid, s.state, bytes(s.shared)) for s in liteflow._live_slots]
                print(left, slots, list(mine._slot_line), mine._idle, file=sys.stderr)
                faulthandler.dump_traceback(file=sys.__stderr__)  # who waits for whom
                raise
            return time.process_time() - began

        with WorkerPool(2) as mine:
            for _ in range(5):
                batch()
            before = size(), len(os.listdir("/dev/fd")), threading.active_count()
            took = [batch() for _ in range(100)]
            gc.collect()
            wait_until(lambda: threading.active_count() <= before[2])
            after = size(), len(os.listdir("/dev/fd")), threading.active_count()
            self.assertLess(after[0] - before[0], 20e6)
            # SQLite keeps those of closed connections for the next ones: as many as runs at once.
            self.assertLessEqual(after[1], before[1] + mine.max_runs)
            self.assertLessEqual(after[2], before[2])
        first, last = (statistics.median(each) for each in (took[:9], took[-9:]))
        print(f"10,000 runs: {(after[0] - before[0]) / 1e6:.1f} MB more", file=sys.stderr)
        print(f"the last hundreds took {last / first:.2f} of the first", file=sys.stderr)
        self.assertLess(last, first * 1.5)
        self.assertLess(self.db.stat().st_size / 10_100, 1000)

    def test_asyncio_may_wait_for_it(self):
        import asyncio

        async def main(mine):
            future = mine.submit(self.flows.dag, db_path=self.db, conf={"n": 4})
            return await asyncio.shield(asyncio.wrap_future(future))

        with WorkerPool(1) as mine:
            self.assertEqual(asyncio.run(main(mine)).xcom_pull("f"), 8)

    def test_what_a_shutdown_leaves_stays_though_asyncio_cancels_it_again(self):
        import asyncio

        async def main():
            mine = WorkerPool(1, max_runs=1)
            _, second = self.hold(mine, *"ab")
            waits = asyncio.wrap_future(second)
            mine.shutdown(wait=False, cancel_futures=True)
            await asyncio.wait([waits])
            await asyncio.sleep(0.01)
            self.go_on()
            await asyncio.to_thread(mine.shutdown)
            return second

        second = asyncio.run(main())
        self.assertTrue(second.cancelled())
        self.assertEqual(self.state(second), ("queued", "submitted"))
        self.assert_nothing_left()

    def test_a_file_that_a_shutdown_closes_is_taken_by_no_run(self):
        mine, taken = WorkerPool(1), []
        for _ in range(2):
            self.flows.dag.run(db_path=self.db, executor=mine)
        close = mine._kept_store.close
        mine._kept_store.close = lambda: (taken.append(mine._take_file(self.db)), close())
        mine.shutdown()
        self.assertEqual(taken, [None])

    def test_a_signal_handler_may_shut_the_pool_down_within_a_submit(self):
        mine, queue_run = WorkerPool(1), liteflow._Store.queue_run

        def signalled(store, row):
            mine.shutdown(cancel_futures=True)  # by a handler, in this thread
            queue_run(store, row)

        def submit():
            futures.append(mine.submit(self.flows.dag, db_path=self.db))

        futures = []
        thread = threading.Thread(target=submit, daemon=True)
        with mock.patch.object(liteflow._Store, "queue_run", signalled):
            thread.start()
            thread.join(LIMIT)
        self.assertFalse(thread.is_alive())
        [future] = futures
        wait_until(lambda: mine._closed and future.cancelled())
        self.assertEqual(self.state(future), ("queued", "submitted"))
        self.assert_nothing_left()

    def test_a_signal_handler_may_shut_the_pool_down_as_a_run_is_put_in_line(self):
        """Before there is a thread to wait for: the run would begin in a pool that is gone."""
        mine, call_thread = WorkerPool(1), liteflow._RunLine._call_thread
        signalled = lambda line: mine.shutdown() or call_thread(line)  # noqa: E731 - in this thread
        with mock.patch.object(liteflow._RunLine, "_call_thread", signalled):
            future = mine.submit(self.flows.dag, db_path=self.db)
        self.assertEqual(future.result(LIMIT).state, "success")
        wait_until(lambda: mine._closed)
        self.assert_nothing_left()

    def test_a_signal_handler_may_shut_the_pool_down_within_its_first_submit(self):
        line = liteflow._RunLine
        signalled = lambda pool: pool.shutdown() or line(pool)  # noqa: E731 - in this thread
        refused = self.assertRaisesRegex(RuntimeError, "shut down")
        with mock.patch.object(liteflow, "_RunLine", signalled), refused:
            WorkerPool(1).submit(self.flows.dag, db_path=self.db)
        self.assertFalse(self.db.exists())

    def test_a_signal_handler_may_shut_the_pool_down_while_another_thread_does(self):
        """And while this one looks at the workers: neither may wait for the other."""
        mine = WorkerPool(1)
        self.flows.dag.run(db_path=self.db, executor=mine)
        [slot] = mine._idle

        def signalled() -> bool:
            del slot.has_ended
            other.start()
            other.join(0.1)  # it waits for this thread
            mine.shutdown()
            return True

        other = threading.Thread(target=mine.shutdown, daemon=True)
        slot.has_ended = signalled

        def run() -> None:
            try:
                self.flows.dag.run(db_path=self.db, executor=mine)
            except Exception as error:
                raised.append(repr(error))

        raised = []
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(LIMIT)
        self.assertEqual(raised, ["RuntimeError('the WorkerPool is shut down')"])
        other.join(LIMIT)
        self.assert_nothing_left()

    def test_a_signal_handler_that_submits_or_cancels_leaves_a_submit_whole(self):
        """It comes between two statements of one transaction."""
        set_run = liteflow._Store._set_run

        def signalled(store, *arguments, **named):
            if len(refused) < 2:
                for act in (
                    functools.partial(mine.submit, self.flows.dag, db_path=self.db),
                    first.cancel,
                ):
                    try:
                        act()
                    except Exception as error:
                        refused.append(repr(error))
            return set_run(store, *arguments, **named)

        refused = []
        with WorkerPool(1, max_runs=1) as mine:
            [_, first] = self.hold(mine, *"ab")
            with mock.patch.object(liteflow._Store, "_set_run", signalled):
                second = mine.submit(self.flows.dag, db_path=self.db)
            self.assertTrue(first.cancelled() and first.cancel())
            self.go_on()
            self.assertEqual(second.result(LIMIT).state, "success")
        why = "a signal handler has cut into a submit() or cancel(): use a thread"
        self.assertEqual(refused, [f"RuntimeError({why!r})"] * 2)
        self.assertEqual(self.state(first), ("failed", "cancelled"))

    def test_a_cancel_that_could_not_be_recorded_is_when_the_runs_turn_comes(self):
        """Or another `recover` would begin what its future calls cancelled."""
        with WorkerPool(1, max_runs=1) as mine:
            [_, future] = self.hold(mine, *"ab")
            with mock.patch.object(liteflow._RunLine, "write", side_effect=RuntimeError("cut")):
                self.assertRaises(RuntimeError, future.cancel)
            self.assertTrue(future.cancelled())
            self.assertEqual(self.state(future), ("queued", "submitted"))
            self.go_on()
        self.assertEqual(self.state(future), ("failed", "cancelled"))

    def test_a_second_shutdown_waits_for_the_thread_of_a_first(self):
        mine = WorkerPool(1)
        mine.submit(self.flows.dag, db_path=self.db, conf={"n": 1}).result(LIMIT)
        wait_until(lambda: mine._idle)
        [slot] = mine._idle
        real = slot.bury
        slot.bury = lambda grace: time.sleep(0.2) or real(grace)
        mine.shutdown(wait=False)
        wait_until(lambda: mine._closed)
        mine.shutdown()
        self.assertIsNotNone(slot.exitcode)

    def test_a_line_costs_no_thread_and_no_cpu(self):
        with WorkerPool(1, max_runs=2) as mine:
            before = threading.active_count()
            futures = self.hold(mine, *"abcdefgh")
            most = (
                2 + 2 + (sys.platform != "linux")
            )  # and the executor's, and who waits for a worker
            self.assertLessEqual(threading.active_count() - before, most)
            mine.submit(self.flows.held, db_path=self.db)
            spent = time.process_time()
            self.assertFalse(concurrent.futures.wait(futures, 0.5).done)
            self.assertLess(time.process_time() - spent, 0.03)
            self.go_on()
            concurrent.futures.wait(futures, LIMIT)
        self.assertEqual(threading.active_count(), before)

    def test_a_run_that_is_being_cancelled_is_cancelled_for_others_too(self):
        end, answers = liteflow._InLine.end, []

        def meanwhile(entry, reason):
            if not answers:
                answers.append(None)
                other = threading.Thread(target=lambda: answers.append(entry.future.cancel()))
                other.start()
                other.join(LIMIT)
            end(entry, reason)

        with WorkerPool(1, max_runs=1) as pool:
            self.hold(pool, "a")
            waiting = pool.submit(self.flows.dag, db_path=self.db)
            with mock.patch.object(liteflow._InLine, "end", meanwhile):
                self.assertTrue(waiting.cancel())
            self.go_on()
        self.assertEqual(answers, [None, True])
        self.assertEqual(self.state(waiting), ("failed", "cancelled"))

    def test_a_cancelled_run_whose_callback_exits_is_not_waited_for(self):
        with WorkerPool(1, max_runs=1) as pool:
            self.hold(pool, "a")
            waiting = pool.submit(self.flows.dag, db_path=self.db)
            waiting.add_done_callback(lambda ended: sys.exit(1))
            with self.assertRaises(SystemExit):
                waiting.cancel()
            self.go_on()
            self.assertEqual(concurrent.futures.wait([waiting], 1).not_done, set())

    def test_what_is_given_up_does_not_begin_while_a_callback_shuts_the_pool_down(self):
        mine = WorkerPool(1, max_runs=1)
        futures = self.hold(mine, *"abc")
        futures[1].add_done_callback(lambda ended: (self.go_on(), mine.shutdown()))
        mine.shutdown(cancel_futures=True)
        self.assertEqual([future.cancelled() for future in futures], [False, True, True])
        self.assertEqual({self.state(future) for future in futures[1:]}, {("queued", "submitted")})

    def test_callbacks_that_shut_the_pool_down_leave_no_run_behind(self):
        pool = WorkerPool(1, max_runs=1)
        [first] = self.hold(pool, "a")
        second = pool.submit(self.flows.dag, db_path=self.db)
        first.add_done_callback(lambda ended: pool.shutdown())  # in the thread of both runs
        self.go_on()
        self.assertEqual(second.result(LIMIT).state, "success")
        pool = WorkerPool(2)
        together, futures = threading.Barrier(2), []

        def shut_down(ended):
            together.wait(LIMIT)
            pool.shutdown()

        (self.folder / "go").unlink()
        futures += self.hold(pool, "b", "c")
        for future in futures:
            future.add_done_callback(shut_down)
        self.go_on()
        wait_until(lambda: pool._closed)
        pool.shutdown()
        self.assert_nothing_left()

    def test_a_callback_that_exits_leaves_no_run_behind(self):
        with WorkerPool(1, max_runs=1) as pool:
            [first] = self.hold(pool, "a")
            second = pool.submit(self.flows.dag, db_path=self.db)
            first.add_done_callback(lambda ended: sys.exit(1))
            self.go_on()
            self.assertEqual(second.result(LIMIT).state, "success")

    def test_a_cancelled_run_whose_callback_shuts_the_pool_down_is_closed(self):
        pool = WorkerPool(1, max_runs=1)
        [running] = self.hold(pool, "a")
        waiting = pool.submit(self.flows.dag, db_path=self.db)
        waiting.add_done_callback(lambda ended: (self.go_on(), pool.shutdown()))
        self.assertTrue(waiting.cancel())
        self.assertEqual(self.state(waiting), ("failed", "cancelled"))
        self.assertEqual(running.result(LIMIT).state, "success")

    def test_who_sleeps_calls_others_where_several_runs_have_come(self):
        together, line = threading.Barrier(3), liteflow._RunLine(WorkerPool(1))

        def job(key, due=0.0):
            dag = types.SimpleNamespace(dag_id=key, max_active_runs=None)
            run = functools.partial(together.wait, LIMIT / 6)
            return types.SimpleNamespace(
                key=key, dag=dag, due=due, future=None, run=lambda _: run()
            )

        line.enter(job("later", time.monotonic() + LIMIT))
        wait_until(lambda: line._sleeps)
        with line._changed:  # before it is awake
            for _ in range(3):
                line.enter(job("now"))
        wait_until(lambda: line._active["now"] == 0 and not line._waiting.get("now"))
        with line._changed:
            line._waiting.clear()
            line._changed.notify_all()
        line.drain()
        self.assertFalse(together.broken)

    def test_what_is_not_put_back_is_cancelled_outside_the_line_s_lock(self):
        line = liteflow._RunLine(WorkerPool(1))
        line.close(True, False)
        waited = []

        def cancel(close):  # its callbacks may wait for a thread that submits
            submitting = threading.Thread(target=line.close, args=(False, False))
            submitting.start()
            submitting.join(2)
            waited.append(submitting.is_alive())

        line.enter(types.SimpleNamespace(cancel=cancel, future=None), first=True)
        self.assertEqual(waited, [False])


class ShortOfMemoryTest(FlowCase):
    def test_a_value_that_there_is_no_room_for_fails_its_attempt_alone(self):
        with DAG("d") as d:
            task(task_id="big")(lambda: bytes(11_000_000))()
            task(task_id="small")(lambda: 1)()
        with mock.patch.object(liteflow, "_has_room", lambda size: size < 11_000_000):
            self.go(d)
        self.assertEqual(self.state_of("big", "small"), ["failed", "success"])
        self.assertIn("no room to store 11,000", self.last.get_task_instance("big").error)
        self.assertFalse(liteflow._has_room(1 << 60))

    @unittest.skipUnless(sys.platform == "linux", "needs a limit of memory")
    def test_a_value_that_can_not_be_received_fails_its_attempt_alone(self):
        self.script(
            """
            import os, resource, time
            from pathlib import Path
            from liteflow import DAG, WorkerPool, task
            def wait_for(*names):
                while not all(map(os.path.exists, names)): time.sleep(0.005)
            def meet(name): Path(name).touch(); wait_for("a", "b")
            def small(): wait_for("go")
            def told(line): Path("go").touch() if "big  failed" in line else None
            with DAG("warm") as warm: task(task_id="a")(meet)("a"); task(task_id="b")(meet)("b")
            with DAG("short") as short:
                task(task_id="big")(lambda: bytes(150_000_000))()
                task(small)()
            if __name__ == "__main__":
                with WorkerPool(2) as pool:
                    warm.run(db_path="t.db", executor=pool)
                    size = 4096 * int(open("/proc/self/statm").read().split()[0])
                    endless = resource.RLIM_INFINITY
                    resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, endless))
                    run = short.run(db_path="t.db", executor=pool, progress=told)
                    for ti in run.get_task_instances(): print(ti.task_id, ti.state, ti.error)
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        # An allocator that has room in hand can receive it, which SQLite has no room for.
        why = (
            "the task's outcome could not be received: MemoryError|MemoryError: this process has no"
        )
        self.assertRegex(done.stdout, f"^big failed ({why}).*\nsmall success None\n$")

    def test_a_message_whose_file_finds_no_descriptor_is_an_error_that_says_so(self):
        sender, receiver = (liteflow._Wire(end) for end in liteflow._socket_pair())
        self.addCleanup(sender.close)
        self.addCleanup(receiver.close)
        sender.send(("done",), [bytes(100_000)])
        with no_more_descriptors(), self.assertRaisesRegex(OSError, "[Tt]oo many open files"):
            receiver.receive()

    def test_to_ask_for_room_takes_none(self):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.assertTrue(liteflow._has_room(500_000_000))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
        self.assertLess(grown, 200_000)  # KiB; on macOS bytes


class HarmedFileTest(FlowCase):
    """Files that were damaged, or made to harm."""

    def test_a_damaged_file_gives_no_backup(self):
        with DAG("d") as d:
            task(task_id="f")(one_argument).expand(x=[str(n) * 2000 for n in range(50)])
        d.test(db_path=self.db)
        data = bytearray(self.db.read_bytes())
        root = self.query("SELECT rootpage FROM sqlite_master WHERE name = 'xcom'")[0][0]
        at = (root - 1) * 4096
        data[at + 12 : at + 76] = bytes(range(64))
        self.db.write_bytes(data)
        done = self.cli_here("backup", "copy.db", "--db", self.db)
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertFalse((self.folder / "copy.db").exists())

    def test_times_at_the_edge_and_names_of_several_lines(self):
        DAG("d").run(db_path=self.db, run_id="r")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute(
                "UPDATE dag_run SET start_date = '0001-01-01T00:00:00+23:59', run_id = 'r' || "
                "char(10) || 'a', end_date = '9999-12-31T23:59:59-23:59'"
            )
        shown = self.cli_here("show", "d", "--db", self.db)
        self.assertEqual((shown.returncode, shown.stderr), (0, ""))
        self.assertIn("d/r\\na: success", shown.stdout.splitlines()[0])
        self.addCleanup(time.tzset)
        for zone, moment in (("EST5", "0001-01-01T00:00Z"), ("JST-9", "9999-12-31T23:59Z")):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE dag_run SET start_date = ?", (moment,))
            with mock.patch.dict(os.environ, TZ=zone):
                time.tzset()
                for words in (["show"], ["runs"], ["list"], ["page"], ["page", "d"]):
                    shown = self.cli_here(*words, "--db", self.db)
                    self.assertEqual((shown.returncode, shown.stderr), (0, ""))

    def test_names_of_nothing_but_space_and_an_endless_duration_are_shown_at_once(self):
        with DAG("d") as d:
            task(task_id="f")(one_argument).expand(x=[1])
        d.test(db_path=self.db)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET seconds = 1e308")
            db.execute(
                "UPDATE task_instance SET task_id = ' ', map_index = -1, "
                "element_preview = replace(hex(zeroblob(200000)), '0', ' ')"
            )
        for words in (["show", "d"], ["page", "d"], ["visualize", "d", "--gantt"]):
            shown = self.cli_here(*words, "--db", self.db)
            self.assertEqual((shown.returncode, shown.stderr), (0, ""))

    def test_what_is_tried_for_ever_can_be_interrupted_and_resumed(self):
        with DAG("d") as d:
            self.step("a", retries=sys.maxsize)()
            self.step("b", retries=2**70)()
        self.die(d, at=2)
        self.resume(d)
        self.assertEqual(self.last.state, "success")

    def test_a_clock_that_was_set_back_makes_no_run_shorter_than_nothing(self):
        DAG("d").run(db_path=self.db)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET end_date = '2020-01-01T00:00:00+00:00', seconds = 7")
        self.assertEqual(DAG("d").runs(self.db)[0].duration, 7)

    def test_values_are_deleted_once(self):
        DAG("d").run(db_path=self.db)
        prune = functools.partial(self.cli_here, "prune", "--values", "--db", self.db)
        self.assertIn("deleted the values of 1 run", prune().stderr)
        self.assertIn("deleted the values of 0 runs", prune().stderr)

    def test_a_long_chain_of_exceptions_is_formatted_at_once(self):
        def chained():
            error = None
            for n in range(20_000):
                try:
                    raise ValueError(n) from error
                except ValueError as caught:
                    error = caught
            raise error

        with DAG("d") as d:
            task(task_id="f")(chained)()
        began = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            run = d.test(db_path=self.db)
        self.assertLess(time.process_time() - began, 3)
        self.assertEqual(liteflow._last_line(run.get_task_instance("f").error), "ValueError: 19999")


class DeadElsewhereTest(FlowCase):
    """A run beside which another one's scheduler dies."""

    def test_its_instances_hold_up_nobody_at_a_limit_of_their_task(self):
        def die(_):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE dag_run SET state = 'running', owner = ? WHERE id = 1", (owner,))
                db.execute("UPDATE task_instance SET state = 'running' WHERE dag_run_id = 1")

        with DAG("d", dagrun_timeout=LIMIT / 2) as d:
            other = self.step("other", result=die)()
            other >> self.step("limited", max_active_tis_per_dag=1)()
        owner = "0123456789abcdef"
        self.go(DAG("d"))
        self.go(d, run_id="first")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE task_instance SET dag_run_id = 1")
        self.assertEqual(self.go(d), ["limited", "other"])
        d.dagrun_timeout = datetime.timedelta(seconds=0.7)
        with liteflow._owned_folder(str(self.db)) as alive:
            owner, _ = alive
            self.assertEqual(self.go(d), ["other"])

    def test_a_place_that_another_run_takes_in_the_same_moment_is_not_taken_twice(self):
        def count(*args):
            found = real(*args)
            if len(seen) in (0, 2):  # free when it is first looked at, then no more; and again
                with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                    whose = "WHERE dag_run_id = (SELECT id FROM dag_run WHERE run_id = 'other')"
                    state = "success" if seen else "running"
                    db.execute(f"UPDATE task_instance SET state = '{state}' {whose}")
                    db.execute("UPDATE dag_run SET state = 'running', owner = ? WHERE id = 1", [by])
            seen.append((sum(n for _, n in found), len(self.ran)))
            return found

        with DAG("d") as d:
            self.step("limited", max_active_tis_per_dag=1)()
        seen, real = [], liteflow._count_elsewhere
        self.go(d, run_id="other")
        with (
            liteflow._owned_folder(str(self.db)) as (by, _),
            mock.patch.object(liteflow, "_count_elsewhere", count),
        ):
            self.assertEqual(self.go(d), ["limited"])
        self.assertEqual(seen, [(0, 0), (1, 0), (1, 0), (0, 0), (0, 0)])
        self.assertEqual(self.last.get_task_instance("limited").try_number, 1)

    def test_a_sensors_poke_whose_place_was_taken_is_made_later(self):
        def pokes(task_reschedule_count):
            self.ran.append(task_reschedule_count)
            return task_reschedule_count == 2

        with DAG("d") as d:
            task.sensor(mode="reschedule", poke_interval=0.001, max_active_tis_per_dag=1)(pokes)()
        taken = iter([False, True, False, False])
        crowded = mock.Mock(side_effect=lambda instance, more: not more and next(taken))
        with mock.patch.object(liteflow._Run, "_is_crowded", crowded):
            self.assertEqual(self.go(d), [0, 1, 2])


class LockTest(FlowCase):
    """The store: later columns, earlier files, and whose a run is."""

    def small(self):
        with DAG("d") as d:
            self.step("a", result=1)()
        return d

    def test_who_may_not_read_the_file_does_not_come_to_its_owners_lock(self):
        self.go(self.small())
        self.addCleanup(os.umask, os.umask(0o077))  # as a hardened service's is
        for mode, of in ((0o600, 0o700), (0o640, 0o711)):
            self.db.chmod(mode)
            with liteflow._owned_folder(str(self.db)) as (_, folder):
                self.assertEqual(os.stat(folder).st_mode & 0o777, of)
                self.assertEqual(os.stat(f"{folder}/owner").st_mode & 0o777, 0o644)

    def test_a_file_of_an_earlier_version_is_read_and_gets_the_later_columns(self):
        self.go(self.small())
        added = [
            ("task_instance", "colour", "TEXT"),
            ("dag_run", "priority", "INTEGER NOT NULL DEFAULT 7"),
        ]
        with (
            mock.patch.object(liteflow, "_ADDED_COLUMNS", added),
            mock.patch.dict(liteflow._COLUMNS["dag_run"], priority="INTEGER"),
        ):
            liteflow._terms.cache_clear()
            self.addCleanup(liteflow._terms.cache_clear)
            before = self.db.read_bytes()
            [run] = self.small().runs(self.db)
            self.assertEqual((run.state, run._row.priority), ("success", None))
            self.assertEqual(self.db.read_bytes(), before)
            self.assertEqual(self.cli_here("show", "d", "--db", self.db).returncode, 0)
            self.go(self.small())
            self.assertEqual([r._row.priority for r in self.small().runs(self.db)], [7, 7])
            self.go(self.small())
        names = {row[1] for row in self.query("PRAGMA table_info(task_instance)")}
        self.assertIn("colour", names)
        self.go(self.small())  # the earlier version goes on with it
        self.assertEqual(self.last.state, "success")

    def test_a_file_of_version_1_is_refused_and_left_as_it_is(self):
        self.go(self.small())
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA user_version = 1")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        whole = self.db.read_bytes()
        for act in (lambda: self.go(self.small()), lambda: self.small().runs(self.db)):
            with self.assertRaises(liteflow.DatabaseError) as caught:
                act()
            self.assertIn("0.1.0", str(caught.exception))
        self.assertEqual(self.db.read_bytes(), whole)

    SCRIPT = """
        import os, subprocess, sys, time
        from pathlib import Path
        from liteflow import DAG, task
        with DAG("d") as dag:
            @task
            def a(): Path("began").touch(); time.sleep(quick and 0.2 or 60)
        quick = os.environ.get("QUICK")
        with dag: a()
        if __name__ == "__main__":
            if os.environ.get("FORK"):
                import threading
                def fork():
                    while not Path("began").exists(): time.sleep(0.01)
                    if os.fork() == 0:
                        Path("child").write_text(str(os.getpid())); time.sleep(60); os._exit(0)
                threading.Thread(target=fork, daemon=True).start()
            dag.cli()
    """

    def killed(self, **environ):
        self.script(self.SCRIPT)
        env = {**os.environ, **environ}
        process = self.start("my_flow.py", "--db", self.db, "--quiet", env=env)
        self.assertTrue(wait_until((self.folder / "began").exists))
        if environ:
            self.assertTrue(wait_until((self.folder / "child").exists))
        [run] = liteflow.Dag("d").runs(self.db)
        self.assertTrue(run.owner_alive)
        process.kill()
        process.wait(LIMIT)
        return run, process

    def test_a_killed_owner_is_dead_at_once(self):
        run, _ = self.killed()
        self.assertFalse(run.refresh().owner_alive)
        with self.assertRaisesRegex(liteflow.DagRunFailed, "its scheduler died"):
            run.raise_if_failed()

    def test_a_forked_child_of_the_owner_does_not_keep_its_lock(self):
        run, _ = self.killed(FORK="1")
        child = wait_until(lambda: (self.folder / "child").read_text())
        self.addCleanup(os.kill, int(child), signal.SIGKILL)
        os.kill(int(child), 0)
        self.assertFalse(run.refresh().owner_alive)

    def test_of_two_who_resume_a_dead_run_one_wins(self):
        self.killed()
        env = {**os.environ, "QUICK": "1"}
        argv = ("my_flow.py", "--db", self.db, "--quiet", "--resume")
        both = [self.start(*argv, env=env) for _ in range(2)]
        for process in both:
            process.communicate(timeout=LIMIT)
        codes = sorted(process.returncode for process in both)
        # 0 and 0: the second came when the first was done, and found nothing to resume.
        self.assertIn(codes, ([0, 75], [0, 0]))
        [ti] = liteflow.Dag("d").runs(self.db)[0].get_task_instances()
        self.assertEqual((ti.state, ti.try_number), ("success", 2))


class KilledAtCommitsCase(Case):
    """A DAG whose scheduler is killed before or after one of its COMMITs, and then resumed.

    A subclass gives the SCRIPT of the DAG, its FINAL states, and how to `look` at what is recorded.
    The script forks a scheduler for each run that it is asked for: that is sooner there.
    """

    RUN = """
        import socket
        class Crash(sqlite3.Connection):
            def execute(self, sql, *args):
                if sql != "COMMIT": return super().execute(sql, *args)
                global count
                count += 1
                if crash == count and when == "before": os.kill(os.getpid(), signal.SIGKILL)
                done = super().execute(sql, *args)
                if crash == count: os.kill(os.getpid(), signal.SIGKILL)
                return done
        if __name__ == "__main__":
            asked, children = socket.socket(fileno=int(sys.argv[1])), 0
            while True:
                words, [answer], *_ = socket.recv_fds(asked, 10_000, 1)
                if os.fork():
                    os.close(answer)
                    children += 1
                    while children > 2: children -= bool(os.wait())
                elif pid := os.fork():
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    os.write(answer, b"%d\\n" % code)
                    os._exit(0)
                else:
                    break
            os.close(answer)
            db, crash, when, resume = words.decode().splitlines()
            count, crash, connect = 0, int(crash), sqlite3.connect
            sqlite3.connect = lambda *args, **more: connect(*args, **{**more, "factory": Crash})
            os.chdir(os.path.dirname(db))
            dag.run(db_path=db, run_id="r", resume=resume == "True", max_workers=1)
            with open("commits", "w") as file: file.write(str(count))
    """

    def crash(self, name, crash, when, resume=False):
        """Run the script, killed at that commit; (exit code, number of commits)."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        words = "\n".join(map(str, (folder / "m.db", crash, when, resume)))
        reader, writer = os.pipe()
        with open(reader) as told:
            socket.send_fds(self.asking, [words.encode()], [writer])
            os.close(writer)
            code = int(told.readline())
        return code, 0 if code else int((folder / "commits").read_text())

    def points(self):
        """Where it can be killed, as (commit, before or after), after a run without that."""
        self.script(self.SCRIPT + self.RUN)
        self.asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.asking.close)
        with asked:
            fd = asked.fileno()
            self.start("my_flow.py", fd, pass_fds=[fd], stderr=subprocess.DEVNULL)
        code, commits = self.crash("whole", 0, "after")
        self.assertEqual((code, self.look("whole")[0]), (0, self.FINAL))
        points = [(n, when) for n in range(1, commits + 1) for when in ("before", "after")]
        return points if SOAK else points[random.randrange(4) :: 4]


class KilledScopeTest(KilledAtCommitsCase):
    """Killed before and after every COMMIT, with mapped tasks, retries, a branch and a scope."""

    SCRIPT = """
        import os, signal, sqlite3, sys
        from liteflow import DAG, setup, task, teardown
        def said(ti):
            fd = os.open("ran.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, f"{ti.task_id}[{ti.map_index}]\\n".encode()); os.close(fd)
        with DAG("matrix") as dag:
            @task
            def listed(ti): said(ti); return [1, 2]
            @task(retries=1)
            def each(x, ti):
                said(ti)
                if ti.try_number == 1 and x == 2: raise ValueError("first")
                return x
            @task
            def total(xs, ti): said(ti); return sum(xs)
            @task.branch
            def choose(x, ti): said(ti); return "yes"
            @task
            def yes(ti): said(ti)
            @task
            def no(ti): said(ti)
            @setup
            def mount(ti): said(ti)
            @task
            def work(x, ti): said(ti); return x
            @teardown
            def umount(ti): said(ti)
            t = total(each.expand(x=listed()))
            choose(t) >> [yes(), no()]
            m = mount(); w = work.partial().expand(x=[7, 8])
            m >> w >> umount().as_teardown(setups=m)
    """
    FINAL = {  # noqa: RUF012
        **dict.fromkeys(
            "listed[-1] each[0] each[1] total[-1] choose[-1] yes[-1] mount[-1] work[0] work[1] "
            "umount[-1]".split(),
            "success",
        ),
        "no[-1]": "skipped",
    }

    def look(self, name):
        """(states, starts in order) as they stand; the file must be whole."""
        with contextlib.closing(sqlite3.connect(self.folder / name / "m.db")) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            has = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'task_instance'").fetchone()
            sql = "SELECT task_id || '[' || map_index || ']', state FROM task_instance"
            states = dict(db.execute(sql)) if has else {}
        ran = self.folder / name / "ran.txt"
        return states, ran.read_text().splitlines() if ran.exists() else []

    def sweep(self, point):
        number, when = point
        name = f"{when}{number}"
        code, _ = self.crash(name, number, when)
        if code == 0:
            return code
        self.assertEqual(code, -signal.SIGKILL)
        before, starts = self.look(name)
        code, _ = self.crash(name, 0, "after", resume=bool(before))
        self.assertEqual(code, 0)
        after, ran = self.look(name)
        with self.subTest(point=point):
            self.assertEqual(after, self.FINAL)
            again = collections.Counter(ran[len(starts) :])
            scope = {"mount[-1]", "umount[-1]"}
            done = {key for key, state in before.items() if state == "success"}
            self.assertEqual(done & again.keys() - scope, set(), "a success ran again")
            up = False
            for label in ran:  # no work outside of its setup, and the scope is closed at the end
                up = label == "mount[-1]" or (up and label != "umount[-1]")
                if label.startswith("work"):
                    self.assertTrue(up, ran)
            self.assertFalse(up)
            if "umount[-1]" not in starts and "mount[-1]" in done:
                self.assertNotIn("mount[-1]", again, "the setup was still good")
        return -signal.SIGKILL

    def test_killed_before_and_after_every_commit(self):
        points = self.points()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            codes = list(threads.map(self.sweep, points))
        self.assertGreater(codes.count(-signal.SIGKILL), len(points) // 3)


# --- Reading back ---------------------------------------------------------------------------------


class ReadingTest(Case):
    def test_a_loaded_dag_has_its_history_and_no_tasks(self):
        run = self.run_flow(
            "with DAG('kept', description='What', tags=['x']) as dag:\n"
            "    task(task_id='a')(sorted)([1])\n"
        )
        loaded = Dag.load("kept", self.db)
        self.assertEqual((loaded.description, loaded.tags), ("What", {"x"}))
        self.assertEqual(loaded.runs()[0].run_id, run.run_id)
        self.assertEqual(loaded.get_run(run.run_id).state, "success")
        self.assertIn("kept</h1><p>What</p>", loaded._repr_mimebundle_()["text/html"])
        for act in (
            loaded.run,
            lambda: loaded.tasks,
            lambda: loaded.roots,
            loaded.test,
            lambda: loaded.cli(),
            loaded.check_cycle,
            lambda: loaded["a"],
            loaded.to_mermaid,
            lambda: loaded.task,
            loaded.__enter__,
            lambda: "a" in loaded,
        ):
            with self.assertRaises(RuntimeError) as caught:
                act()
            self.assertIn("run the script which defines it", str(caught.exception))
            self.assertIn(".py", str(caught.exception))
        with self.assertRaises(LookupError) as caught:
            Dag.load("kepd", self.db)
        for word in ("'kept'", str(self.db)):
            self.assertIn(word, str(caught.exception))

    def test_runs_and_instances(self):
        d = DAG("many")
        for i in range(3):
            d.run(db_path=self.db, run_id=f"r{i}")
        self.assertEqual([r.run_id for r in d.runs(self.db)], ["r2", "r1", "r0"])
        self.assertEqual([r.run_id for r in d.runs(self.db, limit=1)], ["r2"])
        self.assertEqual(d.runs(self.db, state="failed"), [])
        with self.assertRaises(liteflow.RunNotFound) as caught:
            d.get_run("r", self.db)
        self.assertIn("'r0'", str(caught.exception))
        run = self.run_flow("with DAG('t') as dag:\n    task(task_id='a')(sorted)(3)\n")
        [ti] = run.get_task_instances(state="failed")
        self.assertEqual(run.get_task_instances(state=["success"]), [])
        self.assertGreaterEqual(ti.duration, 0)
        self.assertEqual(ti.start_date.tzinfo, datetime.UTC)
        self.assertIsNone(run.get_task_instance("b"))
        self.assertFalse(run.owner_alive)
        self.assertEqual(run.refresh().state, "failed")

    def test_a_key_that_is_not_there_beside_a_large_value_is_named(self):
        with DAG("d") as d:
            task(task_id="big")(lambda: bytes(1000))()
        run = d.test(db_path=self.db)
        with (
            mock.patch.object(liteflow, "_LOOK_LIMIT", 500),
            mock.patch.dict(liteflow._read.__kwdefaults__, most=500),
            self.assertRaisesRegex(liteflow.XComNotFound, "there is 'return_value'"),
        ):
            run.xcom_pull("big", key="typo")

    def test_what_a_look_does_not_take_is_not_recorded(self):
        long = "x" * 30_000_000
        with DAG("d", description=long) as d:

            @task
            def skips():
                raise AirflowSkipException(long)

            @task
            def mixes_up(ti):
                ti.xcom_push(long, "key")

            skips(), mixes_up()
        with self.assertRaisesRegex(TypeError, "conf has 30,000,009 .*: hand over a path"):
            d.run(db_path=self.db, conf={"x": long})
        skipped, failed = d.test(db_path=self.db).get_task_instances()
        self.assertEqual((skipped.state, failed.state), ("skipped", "failed"))
        self.assertRegex(failed.error, "has 30,000,000 characters: is it the value")
        for argv in (
            ["list"],
            ["show", "d"],
            ["show", "d", "mixes_up"],
            ["delete", "d", "--all", "--yes"],
        ):
            self.assertEqual(self.cli_here(*argv, "--db", self.db).returncode, 0)

    def test_a_look_takes_what_is_recorded_in_any_script(self):
        most = liteflow._LOOK_LIMIT // 50
        self.enterContext(mock.patch.dict(liteflow._read.__kwdefaults__, most=most))
        most = liteflow._TEXT_LIMIT // 50
        self.enterContext(mock.patch.object(liteflow, "_TEXT_LIMIT", most))
        with DAG("d", description="\N{GRINNING FACE}" * liteflow._TEXT_LIMIT) as d:
            task(task_id="a")(sample)(1)
        d.test(db_path=self.db)
        self.assertEqual(self.cli_here("list", "--db", self.db).returncode, 0)

    def test_what_is_no_text_names_nothing(self):
        odd = "\udcff"  # a byte of a command that is no UTF-8, or a half of a pair in JSON
        run = self.run_flow("with DAG('odd') as dag:\n    task(task_id='a')(sorted)([1])\n")
        for error, act, *given in (
            (liteflow.RunNotFound, Dag("odd", db_path=self.db).get_run, odd),
            (liteflow.TaskNotFound, run.xcom_pull, odd),
            (liteflow.XComNotFound, run.xcom_pull, "a", odd),
            (liteflow.TaskNotFound, run.log, odd),
        ):
            with self.assertRaisesRegex(error, r"'\\udcff'"):
                act(*given)
        self.assertIsNone(run.get_task_instance(odd))
        for argv in (["show", "odd", odd], ["stop", odd]):
            said = self.cli_here(*argv, "--db", self.db)
            self.assertEqual((said.returncode, said.stdout), (2, ""))
            self.assertIn(r"'\udcff'", said.stderr)

    def test_a_run_that_ends_as_it_is_looked_at_is_no_dead_one(self):
        self.run_flow("with DAG('odd') as dag:\n    task(task_id='a')(sorted)([1])\n")

        def set_state(state):
            with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as db:
                db.execute("UPDATE dag_run SET state = ?", (state,))

        for look in (
            liteflow._run_state,
            lambda run: run.owner_alive or run.state.value,
            lambda run: run.raise_if_failed().state.value,
        ):
            set_state("running")
            [run] = Dag("odd").runs(self.db)
            set_state("success")  # and its owner's lock is free
            self.assertEqual(look(run), "success")
        set_state("running")
        self.assertEqual(liteflow._run_state(run.refresh()), "running (owner dead)")

    def test_a_number_beyond_64_bits_names_nothing(self):
        run = self.run_flow("with DAG('odd') as dag:\n    task(task_id='a')(sorted)([1])\n")
        self.assertIsNone(run.get_task_instance("a", 10**30))
        self.assertIsNone(run.xcom_pull("a", map_index=10**30))
        self.assertEqual(run.log("a", try_number=10**30), "")
        self.assertEqual(len(Dag("odd").runs(self.db, limit=10**30)), 1)

    def test_all_but_the_newest_of_thousands_of_runs_are_found_at_once(self):
        with contextlib.closing(liteflow._Store(str(self.db))) as store:
            db = store._connection
            db.execute("INSERT INTO dag (dag_id) VALUES ('a'), ('b')")
            add = "INSERT INTO dag_run (dag_id, run_id, state, conf) VALUES (?, ?, 'success', '')"
            with store.transaction():
                db.executemany(add, [("ab"[n % 2], n) for n in range(20_000)])
            began = time.process_time()
            found = liteflow._select_runs(db, keep=3)
            self.assertEqual([row.id for row in found[:2]], [19_994, 19_993])
            self.assertEqual(len(liteflow._select_runs(db, keep=9_999, dag_id="b")), 1)
            self.assertEqual(len(found), 19_994)
        self.assertLess(time.process_time() - began, 1.5)

    def test_a_value_is_read_without_looking_at_other_runs(self):
        with DAG("d") as d:
            task(task_id="f")(lambda: 1)()
        run = d.test(db_path=self.db)
        select = liteflow._select_runs
        with mock.patch.object(liteflow, "_select_runs", lambda db, limit, id: select(db, id=id)):
            self.assertEqual(run.xcom_pull("f"), 1)

    def test_a_callback_may_delete_its_run(self):
        def delete(context):
            context["dag_run"].delete()

        for function in (lambda: 1, lambda: 1 // 0):
            with DAG("d", on_success_callback=delete, on_failure_callback=delete) as d:
                task(task_id="f")(function)()
            quiet = contextlib.redirect_stderr(io.StringIO())
            with quiet, self.assertLogs("liteflow", logging.INFO) as said:
                run = d.test(db_path=self.db)
            self.assertIn("no tasks", said.output[-1])
            self.assertRaises(liteflow.RunNotFound, run.refresh)
        with self.assertRaisesRegex(liteflow.DagRunFailed, "no reason is recorded"):
            run.raise_if_failed()

    def test_numbers_larger_than_the_database_takes_ask_for_all_runs(self):
        DAG("d").run(db_path=self.db)
        self.assertEqual(len(DAG("d").runs(self.db, limit=2**70)), 1)

    def test_what_was_deleted_is_not_taken_for_what_came_after_it(self):
        def run(dag_id):
            with DAG(dag_id) as d:
                task(task_id="f")(lambda: dag_id)()
            asked = {"in_process": True, "db_path": self.db, "run_id": "daily"}
            return liteflow._Run(d, **asked).execute()

        first = run("a")
        first.delete()
        second = run("b")
        self.assertRaises(liteflow.RunNotFound, first.xcoms)
        self.assertEqual(self.values(second), {("f", "return_value"): "b"})
        self.db.unlink()
        run("c")  # in a file of the same name
        for look in (first.get_task_instances, functools.partial(first.log, "f")):
            self.assertRaises(liteflow.RunNotFound, look)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET id = ?", (first._row.id,))  # as in earlier files
            db.execute("UPDATE task_instance SET dag_run_id = ?", (first._row.id,))
        with self.assertRaises(liteflow.RunNotFound):
            first.delete()

    def test_a_log_is_that_of_the_latest_attempt(self):
        run = self.run_flow(
            """
            with DAG("t") as dag:
                @task(retries=1)
                def f(ti):
                    if ti.try_number == 1: print("first"); raise ValueError
                f()
            """
        )
        self.assertEqual((run.state, run.log("f")), ("success", ""))
        self.assertEqual(run.log("f", try_number=1), "first\n")

    def test_the_log_of_a_mapped_task_is_read_in_one_look(self):
        run = self.run_flow(
            """
            with DAG("t") as dag:
                @task(retries=1)
                def f(i, ti):
                    if ti.try_number == 1: print("first", i)
                    if ti.try_number == i: raise ValueError
                    if ti.try_number > 1: print("second", i)
                f.expand(i=[2, 1, 0])
            """
        )
        with mock.patch.object(run, "_look", wraps=run._look) as looks:
            self.assertEqual(run.log("f"), "first 2\nsecond 1\nfirst 0\n")
            self.assertEqual(run.log("f", try_number=1), "first 2\nfirst 1\nfirst 0\n")
        self.assertEqual(looks.call_count, 6)
        self.assertEqual((run.log("f", 1), run.log("f", 1, 1)), ("second 1\n", "first 1\n"))
        self.assertEqual((run.log("f", 7), run.log("f", try_number=7)), ("", ""))

    def test_a_limit_or_state_that_is_none_is_refused(self):
        DAG("d").run(db_path=self.db)
        for limit in ("x", "1; DROP TABLE xcom", 2.5, -1, True):
            with self.subTest(limit=limit), self.assertRaises((TypeError, ValueError)):
                DAG("d").runs(self.db, limit=limit)
        with self.assertRaises(ValueError):
            DAG("d").runs(self.db, state="bogus")
        self.assertEqual(DAG("d").runs(self.db, limit=0), [])
        with self.assertRaises(TypeError):
            DAG("e").run(db_path=self.db, progress=1)
        self.assertEqual(DAG("e").runs(self.db), [])

    def test_a_value_is_read_without_a_count_of_all_runs(self):
        run = self.run_flow("with DAG('t') as dag:\n    task(task_id='a')(sorted)([3])\n")
        with mock.patch.object(liteflow, "_select_histories", None):
            self.assertEqual(run.xcom_pull("a"), [3])

    def test_who_asks_for_one_run_or_dag_of_many_reads_no_others(self):
        d = DAG("d")
        d.run(db_path=self.db)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute(
                "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT 500) INSERT "
                "INTO dag_run (dag_id, run_id, state, conf, seconds) "  # SQLite 3.37 has no default here
                "SELECT 'd', 'r' || i, 'success', '{}', 0.0 FROM n"
            )
        rows = []

        def row(**columns):
            rows.append(columns)
            return types.SimpleNamespace(**columns)

        whole = mock.patch.object(liteflow, "_select_run_ids", None)
        with whole, mock.patch.object(liteflow, "_Row", row):
            for words, said in (
                ("show", "d/r499: success"), ("show d", "d/r499: success"),
                ("show d/r7", "d/r7: success"), ("show r7", "d/r7: success"),
                ("list --check", ""), ("runs --limit 2", "d/r498"), ("runs --state failed", ""),
                ("runs --state success --limit 2", "d/r498"),
            ):  # fmt: skip
                with self.subTest(words=words):
                    rows.clear()
                    done = self.cli_here(*words.split(), "--db", self.db)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    self.assertIn(said, done.stdout)
                    self.assertLess(len(rows), 10)
            rows.clear()
            self.assertEqual((pool().recover(d, db_path=self.db), rows), ([], []))
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("INSERT INTO dag (dag_id) SELECT run_id FROM dag_run")
            self.assertEqual(Dag.load("r7", self.db).dag_id, "r7")
            self.assertEqual(len(rows), 1)

    def test_looking_leaves_no_trace(self):
        run = self.run_flow("with DAG('t') as dag:\n    task(task_id='a')(sorted)([3])\n")
        before = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        for _ in range(3):
            run.refresh().get_task_instances()
            run.log("a")
        after = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        self.assertEqual(after, before)


# --- Showing --------------------------------------------------------------------------------------

MERMAID_LINES = re.compile(
    r"gantt|    title ([A-Za-z0-9 _.-]|#\d+;)+|    dateFormat x|    axisFormat [%HMSLmd:. -]+"
    r"|    #\d+;([A-Za-z0-9 _.-]|#\d+;)* :((done|crit|active), )?\d+, \d+"
    r'|flowchart (TD|TB|LR|RL|BT)| +n\d+\["([A-Za-z0-9 _.-]|#\d+;|<br/>)+"\](:::\w+)?'
    r'|    n\d+ -->(\|"([A-Za-z0-9 _.-]|#\d+;)+"\|)? n\d+'
    r'| +subgraph g\d+\["([A-Za-z0-9 _.-]|#\d+;)+"\]| +end'
    r"|    classDef \w+ [\w:#,]+"
)


def check_mermaid(case, text):
    """Every line is of a form that the real grammar is known to take.

    Where LITEFLOW_DIAGRAMS names a folder, the diagram is left there, to be given to the grammar.
    """
    if os.environ.get("LITEFLOW_DIAGRAMS"):
        name = f"{case.id().rpartition('.')[2]}-{next(_numbers)}.mmd"
        (Path(os.environ["LITEFLOW_DIAGRAMS"]) / name).write_text(text)
    for line in text.splitlines():
        case.assertRegex(line, f"^(?:{MERMAID_LINES.pattern})$")


class ShowingTest(Case):
    def instance(self, task_id, state=None, index=-1, upstream=()):
        ti = liteflow.TaskInstance("d", "r", task_id, index)
        ti.state = state and TaskInstanceState(state)
        ti.upstream_task_ids = set(upstream)
        return ti

    def test_the_list_of_dags_opens_the_file_once(self):
        for dag_id in "abc":
            with DAG(dag_id) as d:
                task(task_id="f")(lambda: 1)()
            d.test(db_path=self.db)
        read = mock.patch.object(liteflow, "_read", wraps=liteflow._read)
        with read as looks, contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(liteflow.main(["list", "--db", str(self.db)]), 0)
        self.assertEqual((looks.call_count, said.getvalue().count(" success ")), (1, 3))

    def test_very_many_reasons_are_told_in_no_time(self):
        failed = [liteflow.TaskInstance("d", "r", "f", i) for i in range(30_000)]
        for i, ti in enumerate(failed):
            ti.error = f"ValueError: {i // 2}"
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            liteflow._show_errors(mock.Mock(log=lambda *which: ""), failed)
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(re.findall(r"^f\[(\d+)\]:", said.getvalue(), re.M)[:3], ["0", "2", "4"])

    def test_the_status_goes_before_a_line_is_written_where_it_was(self):
        report, written = liteflow._Report(True), io.StringIO()
        report.redraws = True
        with contextlib.redirect_stderr(written):
            report.status(lambda: ({"success": 1}, [], 2.0))
            drawn = written.getvalue()
            with self.assertLogs("liteflow"):
                liteflow._log().addHandler(logging.StreamHandler(written))  # the same terminal
                report.tell("a line")
        lines = drawn.count("\n")
        up = f"\x1b[{lines}A"
        gone = written.getvalue().removeprefix(drawn)
        self.assertEqual(gone, f"{up}\r" + "\x1b[2K\n" * lines + f"{up}a line\na line\n")

    def test_the_status_counts_no_wait_before_the_run(self):
        report, plan = liteflow._Report(str), types.SimpleNamespace(nodes=[1], instances=list)
        report._began -= 3600
        report.began(Dag("d"), "r", self.db, plan)
        self.assertLess(report._snapshot()[2], 60)

    def test_what_did_not_start_after_all_is_not_drawn_as_running(self):
        one = mock.Mock(state=TaskInstanceState.RUNNING, label="a", try_number=1)
        plan = types.SimpleNamespace(nodes=[1], instances=lambda: [one])
        report = liteflow._Report(str)
        report.began(Dag("d"), "r", self.db, plan)
        report.changed(one)
        self.assertEqual([label for label, _ in report._snapshot()[1]], ["a"])
        one.state = None  # another run has taken its place in a pool
        self.assertEqual(report._snapshot()[:2], ({"none": 1}, []))

    def test_the_status_takes_a_tenth_of_the_time_and_is_drawn_ten_times_a_second_at_most(self):
        report, now, drawn = liteflow._Report(True), [0.0], []
        report.redraws = True

        def look():
            now[0] += 1.0 if now[0] < 30.0 else 0.0
            drawn.append(now[0])
            return {"success": 1}, [], 2.0

        with (
            mock.patch.object(liteflow, "_monotonic", lambda: now[0]),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            while now[0] < 33.4:
                report.status(look)
                now[0] += 0.0625
        self.assertEqual(drawn, [1.0, 12.0, 23.0, 33.0, 33.125, 33.25, 33.375])

    def test_what_a_logger_is_told_forges_no_lines_and_steers_no_terminal(self):
        with self.assertLogs("liteflow", "INFO") as told:
            liteflow._Report(False).tell("failed (\x1b[2J\rINFO:root:fine\u2028)")
        self.assertEqual(told.output, [r"INFO:liteflow:failed (\x1b[2J\rINFO:root:fine\u2028)"])

    def test_the_status_stands_again_at_once_below_what_a_task_printed(self):
        report, written = liteflow._Report(True, logs=True), io.StringIO()
        report.redraws, report._snapshot = True, lambda: ({"running": 1}, [("a", 1.0)], 2.0)
        attempt = types.SimpleNamespace(instance=types.SimpleNamespace(label="a"))
        with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
            report.status()
            drawn = written.getvalue()
            report.committed([(attempt, 1, "hello\n")])
        found = written.getvalue().removeprefix(drawn)
        self.assertIn("\x1b[2K", found)
        self.assertTrue(found.endswith(f"a | hello\n{drawn}"), found)

    def test_the_status_stands_below_a_line_that_a_task_left_open(self):
        report, written = liteflow._Report(True, logs=True), io.StringIO()
        report.redraws = True
        with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
            report.output("a", "no end")
            report.status(lambda: ({"running": 1}, [], 2.0))
        self.assertTrue(written.getvalue().startswith("a | no end\n["))

    def test_a_timeline_is_to_scale_and_waits_are_those_for_a_retry(self):
        def ran(task_id, state, index, first, last, number=1):
            ti = self.instance(task_id, state, index)
            ti.start_date, ti.end_date = (
                liteflow._moment(f"2026-01-01T00:00:0{s}+00:00") for s in (first, last)
            )
            ti.try_number = number
            return ti

        seen = [ran("a", "success", 0, 0, 1), ran("a", "failed", 1, 2, 3)]
        seen += [ran("a", "success", 1, 4, 6, 2)]
        labels = [line.label for line, _ in liteflow._bars(seen, 50)]
        self.assertEqual(labels, ["a[0]", "a[1]", "a[1] waits", "a[1] try 2"])
        drawn = re.findall(
            'class="box" x="([0-9.]+)".*? width="([0-9.]+)"', liteflow._svg_timeline(seen)
        )
        (x, second), *others = [(float(x), float(width)) for x, width in drawn]
        self.assertGreater(second, 10)
        for (left, width), (first, last) in zip(others, [(2, 3), (3, 4), (4, 6)], strict=True):
            self.assertAlmostEqual(left, x + first * second, delta=1)
            self.assertAlmostEqual(width, (last - first) * second, delta=1)
        long = liteflow._svg_timeline([ran("group." * 20 + "load", "success", 0, 0, 1, 2)])
        self.assertIn(".load[0] try 2</text>", long)

    def test_a_line_without_an_end_is_ended_before_another_tasks(self):
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            lines = liteflow._LogLines("{} | ")
            for label, text in (("a", "1\n2"), ("b", "3\n"), ("a", "4"), ("a", "5"), ("b", "6")):
                lines.add(label, text)
            lines.end()
        self.assertEqual(written.getvalue(), "a | 1\na | 2\nb | 3\na | 45\nb | 6\n")

    def test_groups_are_frames_inside_one_another(self):
        with DAG("d") as d:
            a = liteflow.EmptyOperator(task_id="a")
            with TaskGroup("g"):
                b = liteflow.EmptyOperator(task_id="b")
                with TaskGroup("h"):
                    c = liteflow.EmptyOperator(task_id="c")
            with TaskGroup("i"):
                e = liteflow.EmptyOperator(task_id="e")
            a >> liteflow.Label("x") >> b >> c >> e
        frames = """
            n0["a"]
            subgraph g0["g"]
                n1["b"]
                subgraph g1["h"]
                    n2["c"]
                end
            end
            subgraph g2["i"]
                n3["e"]
            end
            n0 -->|"x"| n1
            n1 --> n2
            n2 --> n3
        """
        frames = textwrap.indent(textwrap.dedent(frames).strip(), "    ")
        self.assertEqual(d.to_mermaid(), f"flowchart TD\n{frames}\n")

    def test_an_id_that_does_not_bear_its_group_is_shown_as_it_is(self):
        with DAG("d") as d:
            with TaskGroup("g", prefix_group_id=False):
                liteflow.EmptyOperator(task_id="a")
            with TaskGroup("h"):
                liteflow.EmptyOperator(task_id="b")
        page = d._repr_html_()
        self.assertEqual(re.findall(r"<title>(.*?)</title>", page), ["a", "h.b"])
        self.assertEqual(re.findall(r">([^<>]*)</text>", page), ["a", "h.b"])
        self.assertIn('subgraph g0["g"]\n        n0["a"]', d.to_mermaid())

    def test_hostile_ids_are_drawn_harmlessly(self):
        names = [
            "end",
            "click",
            "subgraph",
            "a-b.c",
            "style",
            "1abc",
            "é日",
            'a"b',
            "a]",
            "%%{init}%%",
            "</script>",
            "#b;",
            "x" * 250,
            "\n",
            "`md`",
            "graph",
        ]
        text = liteflow._draw(
            liteflow._run_boxes(
                [self.instance(n, "success", upstream=names[:i]) for i, n in enumerate(names)]
            )
        )
        check_mermaid(self, text)

    def test_state_is_in_words_and_mapped_instances_are_folded(self):
        members = [
            self.instance("m", "failed" if i == 7 else "success", i, ["a"]) for i in range(10_000)
        ]
        text = liteflow._draw(liteflow._run_boxes([self.instance("a"), *members]))
        check_mermaid(self, text)
        self.assertIn("m x 10000<br/>9999 success#44; 1 failed", text)
        self.assertIn("no state", text)
        self.assertLess(len(text), 2_000)

    def test_what_is_cut_of_a_long_label_is_its_middle(self):
        # Ids in groups differ at their ends, where a gantt has the state and the try, too.
        bar = f"{'group.' * 20}load try 2 failed"
        self.assertRegex(liteflow._mermaid_text(bar), r"^group\..{1,60}\.load try 2 failed$")
        self.assertEqual(liteflow._mermaid_text("\x1b[m" + "a" * 9), "#92;x1b#91;maaaaaaaaa")

    def test_a_label_is_no_markdown(self):
        # Mermaid 11.4 shows a list or a link as "Unsupported markdown", and `__init__` as a bold
        # `init`; what is coded it leaves alone.
        for text, shown in (
            ("__init__", "#95;#95;init#95;#95;"),
            ("_a_b.c-d", "#95;a_b.c-d"),
            ("1. first", "#49;. first"),
            ("- x - 1 ms", "#45; x - 1 ms"),
            ("www.a.org", "#119;ww.a.org"),
        ):
            self.assertEqual(liteflow._mermaid_text(text), shown)

    def test_a_dag_is_drawn_from_code(self):
        with DAG("d") as d:
            task(task_id="a")(sample)(1) >> task(task_id="b")(sample)(1)
        check_mermaid(self, d.to_mermaid("LR"))
        self.assertIn("n0 --> n1", d.to_mermaid())
        with DAG("labels") as d:
            a, b, c = (task(task_id=name)(sample)(1) for name in "abc")
            with liteflow.TaskGroup("g"):
                inner = task(task_id="d")(sample)(1)
            a >> liteflow.Label('the "first"') >> [b, inner]
            a.set_downstream(c, liteflow.Label("second"))
        check_mermaid(self, d.to_mermaid())
        self.assertIn('n0 -->|"the #34;first#34;"| n1', d.to_mermaid())
        self.assertIn('n0 -->|"second"| n2', d.to_mermaid())
        self.assertIn('n3["d"]', d.to_mermaid())  # its group's frame says the rest
        with self.assertRaises(ValueError):
            d.to_mermaid("XX")

    def test_durations(self):
        for seconds, text in (
            (0.0004, "<1 ms"),
            (0.04, "40 ms"),
            (0.3, "0.3 s"),
            (9.94, "9.9 s"),
            (9.96, "10 s"),
            (59.9, "1 min 0 s"),
            (200, "3 min 20 s"),
            (7500, "2 h 5 min"),
            (None, ""),
        ):
            self.assertEqual(liteflow._seconds_text(seconds), text)

    def test_tables_line_up_and_are_safe(self):
        text = liteflow._table(("A", "B"), [("日\t本", "x"), ("\x1b[31m", "y\nz")])
        self.assertEqual(text, "A         B\n日 本     x\n\\x1b[31m  y z")
        self.assertEqual(liteflow._width("e\u0301"), 1)
        self.assertEqual(liteflow._width("\u1112\u1161\u11ab"), 2)  # the parts of a syllable

    def test_random_runs_are_drawn_so_that_mermaid_takes_them(self):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        words = ["end", "click", "section", "title", "done", "a.b", "x-y", "é日", "default", "crit"]
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        for _ in range(60 if not SOAK else 500):
            instances, attempts = [], []
            for i in range(rng.randrange(1, 40)):
                task_id = f"{rng.choice(words)}{rng.choice(['', '_', '-', '.'])}{i}"
                group = rng.choice([None, None, "g", "g.inner", "end"])
                known = [ti.task_id for ti in instances]
                upstream = rng.sample(known, min(len(known), rng.randrange(3)))
                for index in range(-1, -1 + rng.choice([1, 1, 1, 3, 30])):
                    state = rng.choice([*liteflow._TASK_STATES, None])
                    ti = self.instance(task_id, state, index, upstream)
                    ti.task_group_id, ti.try_number = group, rng.randrange(4)
                    instances.append(ti)
                    for n in range(ti.try_number):
                        at = start + datetime.timedelta(
                            seconds=rng.random() * 10 ** rng.randrange(6)
                        )
                        end = rng.choice([None, at, at + datetime.timedelta(seconds=rng.random())])
                        attempt = self.instance(task_id, rng.choice(["failed", state]), index)
                        attempt.try_number = n + 1
                        attempt.start_date, attempt.end_date = at, end
                        attempts.append(attempt)
            with self.subTest(seed=seed):
                check_mermaid(self, liteflow._draw(liteflow._run_boxes(instances)))
                if attempts:
                    run = liteflow.TaskInstance(rng.choice(words), rng.choice(words), "t")
                    check_mermaid(self, liteflow._draw_gantt(run, attempts))

    def test_a_mapped_task_is_coloured_by_its_worst_instance_that_is_not_removed(self):
        for states, style in (
            ("success removed", "success"),
            ("removed removed", "removed"),
            ("success skipped removed", "skipped"),
            ("success failed", "failed"),
        ):
            members = [self.instance("t", state, i) for i, state in enumerate(states.split())]
            self.assertEqual(liteflow._line_of(members).style, style)

    def test_a_wide_run_is_drawn_from_left_to_right(self):
        wide = [self.instance(f"t{i}") for i in range(9)]
        self.assertTrue(liteflow._draw(liteflow._run_boxes(wide)).startswith("flowchart LR"))
        self.assertTrue(liteflow._draw(liteflow._run_boxes(wide[:8])).startswith("flowchart TD"))
        long = [self.instance(f"t{i}", upstream=[f"t{i - 1}"]) for i in range(5000)]
        self.assertTrue(liteflow._draw(liteflow._run_boxes(long)).startswith("flowchart TD"))
        circle = [self.instance("a", upstream=["b"]), self.instance("b", upstream=["a"])]
        check_mermaid(self, liteflow._draw(liteflow._run_boxes(circle)))

    def test_the_status_fits_its_terminal(self):
        running = [(f"日本_{i}" * 9, float(i)) for i in range(50)]
        now = ({"success": 5, "running": 50, "none": 45, "failed": 2}, running, 75)
        for size in itertools.product((2, 20, 40, 80, 200), (4, 24)):
            report, written = liteflow._Report(True), io.StringIO()
            report.redraws, report._color, written.fileno = True, False, lambda: 2
            told = mock.patch.object(os, "get_terminal_size", return_value=size)
            with told, contextlib.redirect_stderr(written):
                report.status(lambda: now)
            lines = written.getvalue().splitlines()
            self.assertLess(len(lines), size[1])
            self.assertLess(max(map(liteflow._width, lines)), size[0])
            bar = liteflow._status_lines(now, *size, False)[0]
            self.assertRegex(bar, r"^\[=*> {9,}\]")
            self.assertEqual("7/102 tasks, 1 min 15 s" in lines[0], size[0] >= 40)
        self.assertRegex(lines[0], r"^\[[=> ]{40}\] 7/102 tasks, 1 min 15 s$")
        self.assertEqual(lines[1], "5 success, 2 failed, 50 running, 45 to come")
        self.assertRegex(lines[2], r"^  日本_49日.*  49 s$")
        self.assertIn("and 43 more", lines[-1])
        few = liteflow._status_lines((now[0], running[:8], 75), *size, False)
        self.assertRegex(few[-1], "日本_0.* <1 ms$")  # no more
        long = [(f"{'group.' * 20}load", 3723)]
        told = liteflow._status_lines((now[0], long, 75), 79, 24, False)[-1]
        self.assertRegex(told, r"^  group\..*\.\.\..*\.load  1 h 2 min$")
        self.assertLess(len(told), 79)

    def test_a_diagram_is_a_link(self):
        url = liteflow._live_url("flowchart TD\n")
        packed = url.removeprefix("https://mermaid.live/view#pako:")
        state = zlib.decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        self.assertEqual(json.loads(state)["code"], "flowchart TD\n")

    def test_any_text_stays_inside_its_place_on_a_page(self):
        hostile = "``` <b> | *x* [a](b) #1; \n# head ~~~ \\ @you _it_ ````` \x1b[2J"
        fenced = liteflow._fenced(liteflow._clean(hostile)).splitlines()
        self.assertEqual((fenced[0], fenced[-1]), ("`" * 6, "`" * 6))
        self.assertRegex(liteflow._markdown(hostile), r"^([\w\s.,:()=+/'-]|&#\d+;)+$")
        self.assertNotIn("_", liteflow._markdown(hostile))


# --- Command line ---------------------------------------------------------------------------------


class ScriptCase(Case):
    """Tests of a script, FLOW, beside a copy of the module and with the database it makes."""

    FLOW = ""

    def setUp(self):
        super().setUp()
        self.script(self.FLOW)
        self.db = self.folder / "liteflow.db"

    def load(self, name="my_flow.py"):
        return self.loaded(self.folder / name, f"script_{os.getpid()}_{next(_numbers)}")

    def ran(self, **options):
        """A run of the script's DAG by this process, for those who look at what is recorded."""
        run = self.load().dag.run(db_path=self.db, executor=pool(), **options)
        pool()._close_file()  # as the end of a process does
        return run

    def script_here(self, *argv, name="my_flow.py"):
        """`python3 my_flow.py ...`, in this process, where that starts no workers."""
        with mock.patch.object(sys, "argv", [name]):
            return self.cli_here(*argv, main=self.load(name).dag.cli)


@LINUX
class ForkedServerTest(ScriptCase):
    """Where a process has one thread, and nothing open that must not be shared, a server that is
    forked from it starts the workers; it lives no longer than who needs it."""

    FLOW = """
        import gc, multiprocessing, os, signal, socket, sqlite3, subprocess, sys, threading, time
        import heavy
        from pathlib import Path
        from liteflow import DAG, WorkerPool, task
        import liteflow

        with DAG("forked") as dag:
            @task
            def see():
                parent = multiprocessing.parent_process()
                files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/dev/fd")
                         if os.path.exists(f"/proc/self/fd/{n}")]
                handler = signal.getsignal(signal.SIGUSR1)
                return {
                    "forked": liteflow._is_forked, "scheduler": parent.pid, "server": os.getppid(),
                    "alive": parent.is_alive(), "name": multiprocessing.current_process().name,
                    "files": files, "usr1": str(handler), "stdin": sys.stdin.read(),
                    "session": os.getsid(0) == os.getpid(), "state": heavy.STATE,
                }
            see()

        def run(**options):
            return dag.run(db_path="flow.db", **options).raise_if_failed().xcom_pull("see")
    """

    def setUp(self):
        super().setUp()
        (self.folder / "heavy.py").write_text(
            "print('imported', flush=True)\nSTATE = ['as imported']\n"
        )

    def main(self, body, *argv, code=0, **options):
        """What the script prints with this below its main guard."""
        flow = textwrap.dedent(self.FLOW)
        flow += 'if __name__ == "__main__":\n' + textwrap.indent(textwrap.dedent(body), "    ")
        path = self.script(flow)
        done = self.python(path, *argv, **options)
        self.assertEqual((done.returncode, done.stderr), (code, ""), done.stdout)
        return done.stdout

    def test_a_worker_that_hangs_as_it_begins_is_ended(self):
        self.script(
            """
            import os, time
            from pathlib import Path
            import liteflow
            from liteflow import DAG, task

            liteflow._START_LIMIT = 0.5
            forks = []

            def hang():
                forks.append(os.getpid())
                if len(forks) == 2:  # the server's, and then its worker's
                    Path("worker").write_text(str(os.getpid()))
                    time.sleep(60)

            with DAG("hangs") as dag:
                @task
                def never(): pass
                never()

            if __name__ == "__main__":
                os.register_at_fork(after_in_child=hang)
                try:
                    dag.run(db_path="flow.db", max_workers=1)
                except liteflow.UnreachableTask as error:
                    print(error)
            """
        )
        done = self.python("my_flow.py")
        self.assertIn("did not start within", done.stdout)
        self.assertFalse(alive(int((self.folder / "worker").read_text())))

    def test_ctrl_c_in_the_moment_of_the_fork_is_heard(self):
        self.script(
            """
            import os, signal
            from pathlib import Path
            from liteflow import DAG, task
            with DAG("moment") as dag:
                @task
                def f(): Path(os.environ["CASE_DIR"], "ran").touch()
                f()
            if __name__ == "__main__":
                main = os.getpid()
                os.register_at_fork(
                    after_in_parent=lambda: os.getpid() == main and os.kill(main, signal.SIGINT)
                )
                dag.cli()
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(done.returncode, 130, done.stderr)
        self.assertFalse((self.folder / "ran").exists())

    @unittest.skipIf(sys.version_info[:2] == (3, 12), "it starts no process at its end")
    def test_a_pool_serves_a_thread_that_outlives_the_program(self):
        text = self.main(
            """
            pool = WorkerPool(1)
            run(executor=pool)
            from concurrent.futures import ThreadPoolExecutor  # so that its threads end first
            def late():
                try:
                    while True:
                        threading._register_atexit(lambda: None)
                        time.sleep(0.01)
                except RuntimeError:  # the interpreter ends: nothing can be registered any more
                    print(dag.run(db_path="flow.db", executor=pool).state)
            ThreadPoolExecutor(1).submit(late)
            """
        )
        self.assertEqual(text.splitlines()[-1], "success")

    def test_a_run_in_a_thread_of_an_executor_ends_though_the_program_has(self):
        # That thread ends once it is told to, which is after pools are closed.
        text = self.main(
            """
            from concurrent.futures import ThreadPoolExecutor
            executor, pool = ThreadPoolExecutor(1), WorkerPool(1)
            run(executor=pool)  # once the program has ended, its file has no name for a new worker
            done = executor.submit(lambda: print(run(executor=pool)["forked"]))
            while not (pool._runners or done.done()): time.sleep(0.001)
            """
        )
        self.assertEqual(text.splitlines()[-1], "True")

    def test_a_pool_that_is_shut_down_forks_no_server(self):
        text = self.main(
            """
            pool = WorkerPool(1)
            pool.shutdown()
            try:
                run(executor=pool)
            except RuntimeError as error:
                print(error)
            print(liteflow._child_pids())
            """
        )
        self.assertEqual(text.splitlines()[-2:], ["the WorkerPool is shut down", "set()"])

    def test_dags_that_are_built_at_a_prompt_for_one_run_each_are_kept_by_no_server(self):
        done = self.python(
            "-c",
            textwrap.dedent(
                """
                import gc, liteflow
                from liteflow import *

                def made():
                    with DAG("once") as dag:
                        task(task_id="t")(lambda: 1)()
                    return dag

                with WorkerPool(1) as pool:
                    for _ in range(4):
                        assert made().run(db_path="flow.db", executor=pool).state == "success"
                        assert pool._server is not None
                    gc.collect()
                    print(len(liteflow._built))
                """
            ),
        )
        self.assertEqual((done.stdout, done.stderr), ("0\n", ""))

    def test_what_a_server_knows_is_asked_once_a_run_not_for_each_idle_worker(self):
        text = self.main(
            """
            from unittest import mock
            asked = mock.Mock(wraps=lambda self, runner: serves(self, runner))
            serves = liteflow._ForkedServer.serves
            liteflow._ForkedServer.serves = lambda *of: asked(*of)
            with WorkerPool(4) as pool:
                runner = liteflow._SlotRunner(pool, False, dag, False)
                for slot in [pool._lend(runner, runner._context) for _ in range(4)]:
                    pool._give_back(slot, runner)
                runner.close()
                asked.reset_mock()
                print(run(executor=pool)["forked"], asked.call_count)
            """
        )
        self.assertEqual(text.splitlines()[-1], "True 1")

    def test_pools_that_are_dropped_leave_no_process_and_no_file(self):
        self.main(
            """
            def belongings():
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
                return children, len(os.listdir("/dev/fd"))

            run()
            assert "concurrent.futures.process" not in sys.modules  # it has no executor
            before = belongings()
            for _ in range(3):
                pool = WorkerPool(2)
                assert run(executor=pool)["forked"]
                del pool  # nobody has shut it down
                gc.collect()
                assert belongings() == before, belongings()
            """
        )

    def test_its_workers_are_like_others_but_have_what_is_imported(self):
        text = self.main(
            """
            signal.signal(signal.SIGUSR1, lambda *args: None)
            heavy.STATE.append("changed")
            seen = run()
            assert seen["forked"] and seen["alive"] and seen["session"], seen
            assert seen["scheduler"] == os.getpid() != seen["server"], seen
            assert seen["name"].startswith("liteflow-worker-"), seen
            assert seen["usr1"] == str(signal.SIG_DFL) and seen["stdin"] == "", seen
            assert seen["state"] == ["as imported", "changed"], seen
            left = [name for name in seen["files"] if "flow.db" in name and "log-" not in name]
            assert not left, left
            print(threading.enumerate(), multiprocessing.active_children())
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                assert run()["forked"]  # there is no server any more: the next run has another
            else:
                print("a process is left")
            """
        )
        self.assertRegex(text, r"^imported\n\[<_MainThread[^,]*, started \d+\)>\] \[\]\n$")

    def test_where_it_is_not_safe_others_start_them(self):
        with_initializer = """
            with WorkerPool(1, None, heavy.STATE.append, (1,)) as pool:
                print(run(executor=pool)["forked"])
            """
        text = self.main(
            """
            held = open(__file__), open("log.txt", "a"), os.open(".", os.O_RDONLY)
            assert run()["forked"]
            assert not run(mp_context="forkserver")["forked"]
            """
            + with_initializer
        )
        self.assertIn("False", text)
        hurdles = (
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "held = socket.socket()",
            "held = os.pipe()",
            "held = open('out.txt', 'w')",
            "import fcntl; held = open('lock', 'a'); fcntl.flock(held, fcntl.LOCK_EX)",
            "import fcntl; held = os.open('.', os.O_RDONLY); fcntl.flock(held, fcntl.LOCK_EX)",
            "held = sqlite3.connect('other.db'); held.execute('CREATE TABLE IF NOT EXISTS t (x)')",
            "vars(os).pop('pidfd_open', 0); sys.modules['ctypes'] = None",  # as where C is out of reach
        )
        text = self.main(
            f"""
            children = []
            for what in {("pass", *hurdles)!r}:
                children.append(os.fork())
                if not children[-1]:
                    exec(what)
                    os._exit(10 + run()["forked"])
            print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
            """
        )
        self.assertEqual(text.splitlines()[-1].split(), ["11"] + ["10"] * len(hurdles), hurdles)

    def test_a_workers_process_id_is_no_other_ones_until_it_is_known_how_it_ended(self):
        done = self.main(
            """
            server = liteflow._ForkedServer(None)
            def fork():
                ours, theirs = liteflow._socket_pair()
                return server.ask(file=theirs.fileno()), ours, theirs.close()
            made = [fork() for _ in range(3)]
            (first, *_), (second, *_), (third, ours, _) = made
            os.kill(first, signal.SIGKILL)
            ours.close()
            for pid in (first, third):
                while liteflow._process_state(pid) != "Z": time.sleep(0.01)
            more = fork()
            print(server.ask(third), server.ask(second), server.ask(first))
            print([liteflow._process_state(pid) for pid in (first, third)])
            os.kill(second, signal.SIGKILL)
            while (code := server.ask(second)) is None: time.sleep(0.01)
            print(code)
            server.close()
            """
        )
        self.assertEqual(done, "imported\n0 None -9\n['', '']\n-9\n")

    def test_a_worker_that_its_server_forked_too_late_takes_no_part(self):
        self.main(
            """
            ask = liteflow._ForkedServer.ask
            def forks_too_late(server, *ended, **control):
                ask(server, *ended, **control)
                server.is_gone = True
                raise OSError("the forked server says nothing")
            liteflow._ForkedServer.ask = forks_too_late
            assert not run(max_workers=1)["forked"]  # a timeout would end the other one
            """
        )

    def test_an_answer_that_nobody_waited_for_is_none_to_the_next_question(self):
        text = self.main(
            """
            class Enough(Exception): pass
            def ring(*_): raise Enough
            main, forks = os.getpid(), []
            def hold_on():
                forks.append(os.getpid())
                if len(forks) == 2 and os.getpid() != main: time.sleep(0.5)  # the server
            os.register_at_fork(before=hold_on)
            signal.signal(signal.SIGALRM, ring)
            with WorkerPool(1) as pool:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                try: run(executor=pool)
                except Enough: print("enough")
                time.sleep(0.5)
                for _ in range(2): run(executor=pool)
            print("well")
            """
        )
        self.assertEqual([text.split()[1], text.split()[-1]], ["enough", "well"])

    def test_a_shutdown_by_a_signal_within_a_question_does_not_wait_for_its_answer(self):
        self.FLOW += """
        with DAG("dies") as dies:
            @task
            def die(): os.kill(os.getpid(), signal.SIGKILL)
            die()
        """
        text = self.main(
            """
            pool = WorkerPool(2)
            runner = liteflow._SlotRunner(pool, False, dag, False)
            for slot in [pool._lend(runner, runner._context) for _ in range(2)]:
                pool._give_back(slot, runner)
            runner.close()
            signal.signal(signal.SIGUSR1, lambda *_: (pool.shutdown(), print("shut down")))
            answers = liteflow._answers
            def cut_in(pid):
                liteflow._answers = answers
                os.kill(os.getpid(), signal.SIGUSR1)
                return answers(pid)
            liteflow._answers = cut_in
            try: dies.run(db_path="flow.db", executor=pool)
            except RuntimeError as error: print(error)
            """,
            timeout=20,
        )
        shut = "the WorkerPool was shut down during the run"
        self.assertEqual(text.splitlines()[-2:], ["shut down", shut])

    def test_workers_whose_server_is_gone_are_not_waited_for_one_by_one(self):
        self.FLOW += """
        with DAG("wide") as wide:
            @task
            def meet(i):
                Path(f"here-{i}").touch()
                while len([*Path().glob("here-*")]) < 8: time.sleep(0.005)
            for i in range(8): meet(i)
        """
        text = self.main(
            """
            pool = WorkerPool(8)
            wide.run(db_path="flow.db", executor=pool).raise_if_failed()
            os.kill(pool._server.pid, signal.SIGKILL)
            began, count = time.monotonic(), pool._count
            pool.shutdown()
            print(count, time.monotonic() - began)
            """
        )
        count, took = text.split()[-2:]
        self.assertEqual(count, "8")
        self.assertLess(float(took), 2.5)

    def test_a_socket_may_be_of_a_class_that_tells_nothing_once_it_is_closed(self):
        self.main(
            """
            class Patched(socket.socket):  # gevent's is such a one
                def __getattr__(self, name):
                    raise AttributeError(name) if self.fileno() >= 0 else OSError(9, "closed")
            socket.socket = Patched
            assert run()["forked"]
            """
        )

    def test_one_that_finds_no_descriptor_is_let_go_without_a_word(self):
        done = self.main(
            """
            liteflow._socket_pair = None
            try: liteflow._ForkedServer(None)
            except TypeError: print("none")
            """
        )
        self.assertEqual(done, "imported\nnone\n")

    def test_a_fork_that_fails_leaves_signals_and_files_as_they_were(self):
        self.main(
            """
            def fails(): raise BlockingIOError(11, "no more processes")
            before, os.fork = (os.fork, sorted(os.listdir("/dev/fd"))), fails
            try:
                liteflow._ForkedServer(None)
            except BlockingIOError:
                pass
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "a signal is blocked"
            os.fork, files = before
            assert sorted(os.listdir("/dev/fd")) == files, os.listdir("/dev/fd")
            assert run()["forked"]
            """
        )

    def test_what_only_the_main_script_has_is_refused_as_ever(self):
        text = self.main(
            """
            def make():
                with DAG("late") as late:
                    @task
                    def nested(): pass
                    nested()
                return late
            def beside(): pass
            for made in (make(), DAG("also")):
                with made:
                    task(beside)()
                try:
                    made.run(db_path="flow.db")
                except liteflow.UnreachableTask as error:
                    print(str(error).partition(" can't")[0])
            """
        )
        self.assertEqual(text.splitlines()[-2:], ["tasks 'nested', 'beside'", "task 'beside'"])

    def test_a_script_in_pages_is_guarded_like_any_other(self):
        # Neither a form feed nor a separator within a text ends a line, as Python counts them.
        pages = 'PARTS = "a\u2028b\x85c\u2028d"\n\f\n\ndef other(): pass\n\f\n\n\f'
        self.FLOW = textwrap.dedent(self.FLOW) + pages
        self.assertIn("True", self.main("print(run()['forked'])"))

    def test_a_dag_that_is_younger_than_the_server_gets_another(self):
        (self.folder / "source.txt").write_text(
            "from liteflow import DAG, task\nimport liteflow\nwith DAG('young') as dag:\n"
            "    @task\n    def number(): return [N, liteflow._is_forked]\n    number()\n"
        )
        text = self.main(
            """
            import importlib
            source = Path("source.txt").read_text()
            Path("module.py").write_text(source.replace("N", "1"))
            with WorkerPool(2) as pool:
                first = run(executor=pool)
                assert run(executor=pool)["server"] == first["server"]
                import module
                for n in (1, 2):
                    Path("module.py").write_text(source.replace("N", str(n)))
                    os.utime("module.py", (n, n))
                    importlib.reload(module)
                    found = module.dag.run(db_path="flow.db", executor=pool).raise_if_failed()
                    print(found.xcom_pull("number"))
                forked = run(executor=pool)
                assert forked["forked"]
                with DAG("again") as again:  # of functions that the server knows
                    task(task_id="see")(see.function)()
                seen = again.run(db_path="flow.db", executor=pool).xcom_pull("see")
                assert seen["server"] == forked["server"], (seen, forked)
                # Another thread's run finds the idle workers of a server that does not know its DAG.
                with DAG("younger") as younger:
                    task(task_id="x")(abs)(-1)
                thread = threading.Thread(
                    target=lambda: print(younger.run(db_path="flow.db", executor=pool).state)
                )
                thread.start()
                thread.join()
            """
        )
        lines = [line for line in text.splitlines() if line != "imported"]
        self.assertEqual(lines, ["[1, True]", "[2, True]", "success"])

    HURT = """
        go = Path("go")
        with DAG("hurt") as hurt:
            @task
            def goes_on():
                Path("going").touch()
                while not Path("again").exists(): time.sleep(0.01)
            @task(retries=1)
            def dies(ti):
                while not go.exists(): time.sleep(0.01)
                if ti.try_number == 1: os.kill(os.getpid(), signal.SIGKILL)
                Path("again").touch()  # in another worker, as the first one is busy
                return [liteflow._is_forked, ti.try_number]
            goes_on(), dies()
    """

    def test_it_ends_with_the_last_run_of_a_pool_that_is_shut_down(self):
        self.FLOW += self.HURT
        self.main(
            """
            pool = WorkerPool(2)
            def shut():
                while not Path("going").exists(): time.sleep(0.01)
                pool.shutdown()
                go.touch()
            begun = liteflow._Run._drive
            def drive(self):
                threading.Thread(target=shut).start()
                begun(self)
            liteflow._Run._drive = drive
            try:
                hurt.run(db_path="flow.db", executor=pool)
            except RuntimeError:
                pass  # it needed another worker
            assert pool._server is None, pool._count
            """
        )

    def test_a_server_that_is_killed_or_stopped_ends_no_run(self):
        self.FLOW += self.HURT
        for number in ("SIGKILL", "SIGSTOP"):
            text = self.main(
                f"""
                pool = WorkerPool(2)
                def hurt_it():
                    while not Path("going").exists(): time.sleep(0.01)
                    os.kill(pool._server.pid, signal.{number})
                    go.touch()
                begun = liteflow._Run._drive
                def drive(self):
                    threading.Thread(target=hurt_it).start()
                    begun(self)
                liteflow._Run._drive = drive
                with pool:
                    found = hurt.run(db_path="flow.db", executor=pool).raise_if_failed()
                    assert pool._server.is_gone
                print(found.xcom_pull("dies"))
                """
            )
            self.assertEqual(text.splitlines()[-1], "[False, 2]")
            for name in ("go", "going", "again"):
                (self.folder / name).unlink()

    def test_nothing_outlives_the_scheduler(self):
        self.FLOW += self.HURT
        for stopped in (False, True):
            body = """
                pool = WorkerPool(1)
                print(os.getpid(), flush=True)
                def tell():
                    while not Path("going").exists(): time.sleep(0.01)
                    print(pool._server.pid, *[slot.pid for r in pool._runners for slot in r._slots], flush=True)
                begun = liteflow._Run._drive
                def drive(self):
                    threading.Thread(target=tell).start()
                    begun(self)
                liteflow._Run._drive = drive
                hurt.run(db_path="flow.db", executor=pool)
                """
            flow = textwrap.dedent(self.FLOW)
            flow += 'if __name__ == "__main__":\n' + textwrap.indent(textwrap.dedent(body), "    ")
            run = self.start(self.script(flow))
            lines = [run.stdout.readline() for _ in range(3)]
            pids = [int(n) for n in lines[-1].split()]
            self.assertEqual(len(pids), 2, lines)
            for pid in pids if stopped else ():
                os.kill(pid, signal.SIGSTOP)
            run.kill()
            run.wait(LIMIT)
            self.assertTrue(wait_until(lambda pids=pids: not any(map(alive, pids)), 2))
            (self.folder / "going").unlink()

    SIGNALS = """
        with DAG("signals") as signals:
            @task(retries=1)
            def dies(ti):
                if ti.try_number == 1: os.kill(os.getpid(), signal.SIGKILL)
                code = subprocess.run(["sh", "-c", "exit 3"]).returncode
                return code, list(signal.pthread_sigmask(signal.SIG_BLOCK, []))
            dies()
    """

    def test_the_script_s_signals_are_not_its_workers(self):
        self.FLOW += self.SIGNALS
        text = self.main(
            """
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
            found = signals.run(db_path="flow.db")
            print(found.xcom_pull("dies"), found.get_task_instance("dies").try_number)
            attempts = found._instances(attempts=True)
            print(attempts[0].error)
            """
        )
        self.assertEqual(text.splitlines()[1:], ["(3, []) 2", "killed by SIGKILL"])

    def test_under_a_profiler_and_a_debugger(self):
        stop = next(n for n, line in enumerate(self.FLOW.splitlines(), 1) if "return {" in line)
        debugger = ["pdb", "-c", f"b my_flow.py:{stop}", "-c", "c", "-c", "q"]
        profiler = ["cProfile", "-o", "profile"]
        for method, words in ((None, profiler), (None, debugger), ("forkserver", debugger)):
            self.main(f"print(run(mp_context={method!r})['forked'])")
            done = self.python("-m", *words, "my_flow.py")
            self.assertRegex(done.stdout, r"(?m)^(True|False)$", done.stderr)

    @unittest.skipUnless(hasattr(sys, "monitoring"), "Python 3.12 or newer")
    def test_a_debugger_that_watches_the_program_harms_no_worker(self):
        text = self.main(
            """
            tool, events = sys.monitoring.DEBUGGER_ID, sys.monitoring.events
            sys.monitoring.use_tool_id(tool, "debugger")
            watch = lambda code, at: sys.monitoring.set_local_events(tool, code, events.LINE)
            sys.monitoring.register_callback(tool, events.PY_START, watch)
            sys.monitoring.set_events(tool, events.PY_START)
            print(run()["forked"])
            """
        )
        self.assertEqual(text.splitlines()[-1], "True")

    def test_a_process_that_the_program_forks_keeps_nothing_alive(self):
        self.main(
            """
            with WorkerPool(1) as pool:
                run(executor=pool)
                __import__("warnings").simplefilter("ignore")  # there are threads
                child = os.fork()
                if not child:
                    time.sleep(60)
                    os._exit(0)
                began = time.monotonic()
            assert time.monotonic() - began < 30
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            """
        )


class LeftAsFoundTest(ScriptCase):
    """A worker is left to the next task as it was found, and what people see is what was meant."""

    def run_here(self, source, **options):
        options.setdefault("executor", pool())
        return self.run_flow(source, **options).raise_if_failed()

    def test_what_c_code_prints_is_in_its_own_tasks_log(self):
        before = os.environ.pop("PYTHONUNBUFFERED", None)
        if before is not None:
            self.addCleanup(os.environ.__setitem__, "PYTHONUNBUFFERED", before)
        with WorkerPool(1, "spawn") as mine:
            run = self.run_here(
                """
                import ctypes
                with DAG("c") as dag:
                    @task
                    def says(x): ctypes.CDLL(None).puts(b"from C, %d" % x)
                    says.expand(x=[1, 2])
                """,
                executor=mine,
            )
        self.assertEqual([run.log("says", i) for i in (0, 1)], ["from C, 1\n", "from C, 2\n"])

    def test_what_a_task_starts_can_be_interrupted(self):
        run = self.run_here(
            """
            import subprocess
            with DAG("interrupted") as dag:
                @task
                def f():
                    started = subprocess.Popen(["sleep", "60"])
                    started.send_signal(signal.SIGINT)
                    return started.wait()
                f()
            """
        )
        self.assertEqual(run.xcom_pull("f"), -signal.SIGINT)

    def test_a_helper_of_the_initializer_is_no_child_of_a_task(self):
        with WorkerPool(1, None, os.posix_spawnp, ("sleep", ["sleep", "100"], {})) as mine:
            run = self.run_here(
                """
                import subprocess
                with DAG("helped") as dag:
                    @task
                    def f(x):
                        null = subprocess.DEVNULL if sys.platform == "linux" else None
                        if x == 2: subprocess.Popen(["sleep", "100"], stdout=null, stderr=null)
                        return os.getpid()
                    f.expand(x=[0, 1, 2, 3])
                """,
                executor=mine,
                conf={},
            )
        pids = run.xcom_pull("f")
        self.assertEqual((len({*pids[:3]}), len({*pids})), (1, 2))

    def test_timers_limits_and_niceness_do_not_reach_the_next_task(self):
        with WorkerPool(1) as mine:
            run = self.run_here(
                """
                import resource
                def state():
                    timers = [signal.getitimer(t)[0] for t in (signal.ITIMER_PROF, signal.ITIMER_VIRTUAL)]
                    return *timers, resource.getrlimit(resource.RLIMIT_NPROC), os.nice(0)
                with DAG("left") as dag:
                    @task
                    def changes(what):
                        if what == "timer": signal.setitimer(signal.ITIMER_PROF, 100)
                        if what == "nice": os.nice(3)
                        if what == "limit":
                            soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
                            resource.setrlimit(resource.RLIMIT_NPROC, (1000, hard))
                        return os.getpid()
                    @task
                    def sees(): return state()
                    first = sees()
                    chain(first, changes("timer"), sees(), changes("nice"), sees(), changes("limit"), sees())
                """,
                executor=mine,
            )
        seen = {ti.task_id: run.xcom_pull(ti.task_id) for ti in run.get_task_instances()}
        self.assertEqual(len({v for name, v in seen.items() if name.startswith("sees")}), 1)

    def test_a_term_to_an_idle_worker_ends_no_later_task(self):
        source = "with DAG('later') as dag:\n    task(task_id='pid')(os.getpid)()\n"
        module = self.module(source)
        with WorkerPool(1) as mine:
            pids = []
            for _ in range(2):
                run = module.dag.run(db_path=self.db, executor=mine).raise_if_failed()
                self.assertEqual(run.get_task_instance("pid").try_number, 1)
                pids.append(run.xcom_pull("pid"))
                os.kill(pids[-1], signal.SIGTERM)
                self.assertTrue(wait_until(lambda: not alive(pids[-1])))
        self.assertEqual(len({*pids}), 2)

    def test_a_worker_that_was_stopped_before_its_job_is_replaced_by_the_jobs_timeout(self):
        def stop(line):
            if "up_for_retry" in line:  # and a moment later its worker is idle
                pid = int((self.folder / "pid").read_text())
                threading.Timer(0.2, os.kill, (pid, signal.SIGSTOP)).start()

        run = self.run_here(
            """
            with DAG("stopped") as dag:
                @task(retries=1, retry_delay=0.5, execution_timeout=0.3)
                def f(ti):
                    Path(os.environ["CASE_DIR"], "pid").write_text(str(os.getpid()))
                    if ti.try_number == 1: raise ValueError
                f()
            """,
            executor=None,
            max_workers=1,
            progress=stop,
        )
        self.assertEqual(run.get_task_instance("f").try_number, 2)

    def test_semaphores_of_a_worker_that_is_replaced_are_let_go(self):
        self.script(
            """
            import multiprocessing, threading, time
            from liteflow import DAG, task
            with DAG("bar") as dag:
                @task
                def shows():
                    held.extend(multiprocessing.get_context("spawn").RLock() for _ in range(3))
                    held[1]._cleanup(held[1]._semlock.name)  # it is gone already
                    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
                shows()
            held = []
            if __name__ == "__main__":
                dag.run(db_path="flow.db", mp_context="spawn").raise_if_failed()
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_the_folder_of_a_worker_that_is_replaced_goes_with_it(self):
        self.script(
            """
            import multiprocessing
            from liteflow import DAG, task
            with DAG("pools") as dag:
                @task
                def f():  # the default from Python 3.14 on
                    with multiprocessing.get_context("forkserver").Pool(1) as pool:
                        return pool.map(abs, [-1])
                f()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        folder = self.folder / "t"
        folder.mkdir()
        done = self.python("my_flow.py", "--quiet", env={**os.environ, "TMPDIR": str(folder)})
        self.assertEqual((done.returncode, done.stderr, os.listdir(folder)), (0, "", []))

    @mock.patch.object(liteflow, "_CALLBACK_LIMIT", 2.0)
    def test_a_callback_that_ends_its_worker_or_hangs_is_told(self):
        lines = []
        self.run_here(
            """
            def ends(context): os.abort()
            def hangs(context): time.sleep(60)
            with DAG("ends", on_success_callback=hangs) as dag:
                task(task_id="f", on_success_callback=ends)(print)()
                task(task_id="g", on_success_callback=hangs)(print)()
            """,
            progress=lines.append,
        )
        self.assertIn("on_success_callback of task 'f' ended its worker: killed by SIGABRT", lines)
        for whose in ("task 'g'", "the DAG"):
            self.assertIn(f"on_success_callback of {whose} took more than 2 s and was ended", lines)
        self.assertEqual(sum("ended its worker" in line for line in lines), 1)

    def test_logging_that_is_set_up_says_nothing_twice(self):
        self.script(
            """
            import logging.handlers, sys
            from liteflow import DAG, task
            class Rich(logging.Handler):
                def emit(self, record): print(f"INFO:{record.name}", file=sys.stderr)
            class Syslog(logging.handlers.BufferingHandler):
                def emit(self, record): print(f"INFO:{record.name}")
            kinds = {"-p": [Rich()], "--wait": [Syslog(1)]}
            handlers = next((kinds[word] for word in sys.argv if word in kinds), None)
            logging.basicConfig(level=logging.INFO, handlers=handlers)
            with DAG("logged") as dag:
                task(task_id="f")(print)()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        rich = ("-p", "a=1")
        commands = ((), rich, ("-q",), ("-q", *rich), ("-q", "--wait"))
        running = [self.start("my_flow.py", *w, "--db", f"{i}.db") for i, w in enumerate(commands)]
        outs, errors = zip(*[each.communicate(timeout=LIMIT) for each in running], strict=True)
        self.assertNotIn("INFO:liteflow", errors[0] + errors[1])
        self.assertEqual(errors[2:], ("", "", ""))
        self.assertEqual(outs[4][:14], "INFO:liteflow\n")  # what writes elsewhere hears of it

    def test_what_an_operator_logs_is_in_its_log_where_logging_is_set_up(self):
        self.script(
            """
            import logging
            from liteflow import DAG, BaseOperator
            logging.basicConfig(level=logging.INFO)
            class Says(BaseOperator):
                def execute(self, context): self.log.info("hello")
            with DAG("logged") as dag:
                Says(task_id="f")
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.assertIn("INFO:liteflow.task.Says:hello", self.python("my_flow.py", "--logs").stdout)

    def test_what_a_script_handles_itself_is_in_a_log_once(self):
        self.script(
            """
            import logging, sys
            from liteflow import DAG, BaseOperator
            logging.getLogger("liteflow").addHandler(logging.StreamHandler(sys.stdout))
            logging.getLogger("liteflow").propagate = False
            class Says(BaseOperator):
                def execute(self, context): self.log.warning("hello")
            with DAG("logged") as dag:
                Says(task_id="f")
            if __name__ == "__main__":
                print([dag.run(mp_context=how).log("f") for how in (None, "spawn")])
            """
        )
        self.assertEqual(self.python("my_flow.py").stdout, "['hello\\n', 'hello\\n']\n")

    def test_an_error_while_it_ends_by_a_signal_is_told(self):
        self.script(
            """
            import logging, os, signal, sys, time
            import liteflow
            from liteflow import DAG, task
            with DAG("ending") as dag:
                @task
                def f(): os.kill(os.getppid(), 0); open("runs", "w").close(); time.sleep(60)
                f()
            def broken(*args): raise OSError("no more room")
            if __name__ == "__main__":
                liteflow._Store.end_run = broken
                logging.basicConfig()
                dag.cli(["--quiet"]) if sys.argv[1:] else dag.run()
            """
        )
        for argv in ((), ("cli",)):
            process = self.start("my_flow.py", *argv)
            self.assertTrue(wait_until((self.folder / "runs").exists))
            (self.folder / "runs").unlink()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=LIMIT)
            self.assertEqual(process.returncode, 143)
            self.assertIn("OSError: no more room", err)

    def test_ordinary_text_stays_itself(self):
        for text in ("1\u202f000\xa0€", "\U0001f469\u200d\U0001f4bb", "a\u3000b"):
            self.assertEqual(liteflow._clean(text), text)
        for text in ("\x1b[31m", "a\u202eb", "\u2028"):
            self.assertNotEqual(liteflow._clean(text), text)

    def test_the_reason_is_the_exception_not_its_note_nor_the_workers_name_of_a_module(self):
        self.script(
            """
            from liteflow import DAG, task
            class Mine(Exception): pass
            with DAG("noted") as dag:
                @task
                def f():
                    error = Mine("boo")
                    error.add_note("row 7")
                    raise error
                f()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        done = self.python("my_flow.py")
        self.assertIn("f failed: Mine: boo", done.stderr)
        self.assertNotIn("__mp_main__", done.stderr)
        [ti] = Dag("noted").runs(self.folder / "liteflow.db")[0].get_task_instances()
        self.assertIn("row 7", ti.error)


class CommandLineTest(ScriptCase):
    FLOW = """
        from liteflow import DAG, task
        with DAG("flow", params={"n": 1}) as dag:
            @task
            def good(params): print("good\\x1b[31m says", params["n"]); return params["n"]
            @task
            def bad(x):
                if x == 1: raise ValueError("bad luck")
            bad(good())
        if __name__ == "__main__":
            dag.cli()
    """

    def command(self, *argv):
        """A command: the script, what it does without a run, or `python3 -m liteflow` (in this
        process, where it may be)."""
        if argv[:1] == ("script",):
            return self.python("my_flow.py", *argv[1:])
        if argv[:1] == ("script_here",):
            return self.script_here(*argv[1:])
        if argv[:1] == ("run",):  # it takes the place of `__main__`
            return self.cli(*argv)
        return self.cli_here(*argv)

    def assert_exit(self, code, *argv, words=(), out=None):
        done = self.command(*argv)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        if out is not None:
            self.assertEqual(done.stdout, out)
        return done

    def test_slips_of_the_pen_are_told_in_words(self):
        self.assert_exit(2, "shwo", "run", words=["'shwo'", "visualize"])
        self.assert_exit(2, "--db", "x.db", "shwo", "runs", words=["'shwo'", "visualize"])
        self.assert_exit(2, "show", "--foo", words=["liteflow show [-h]", "arguments: --foo"])
        of_no_file = "import liteflow; d = liteflow.DAG('d')"
        source = f"import my_flow; kept = {{}}; exec({of_no_file!r}, kept)"
        (self.folder / "two.py").write_text(source)
        self.assert_exit(
            2, "run", "two.py", words=["no DAG", "name the file that does", "/my_flow.py"]
        )
        (self.folder / "uncalled.py").write_text("from liteflow import dag\n@dag\ndef f(): 1")
        self.assert_exit(2, "run", "uncalled.py", "f", words=["(a `@dag` is to be called)"])
        (self.folder / "ends.py").write_text("import sys\nsys.exit('early')")
        self.assertRegex(self.command("run", "ends.py").stderr, r"\ncalled sys.exit\('early'\)")
        for words in (["runs", "--limit"], ["prune", "--dry-run", "--keep"]):
            self.assert_exit(2, *words, "9" * 20, words=["must be a whole number"])
        late = "9999-12-31T23:59:59-12:00"
        self.assert_exit(2, "script_here", "--logical-date", late, words=["out of range"])
        self.ran()
        page = ("--gantt", "--output", "run.md")
        self.assert_exit(2, "visualize", "flow", *page, words=["leave --gantt out"])
        self.assert_exit(2, "runs", "--state", "faild", words=["invalid choice: 'faild'"])
        link = ("--url", "--output", "run.md")
        self.assert_exit(2, "visualize", "flow", *link, words=["leave --output out"])

    def test_a_link_serves_as_a_command(self):
        copy_liteflow(self.folder)
        for name in ("bin", "flows"):
            (self.folder / name).mkdir()
        (self.folder / "bin" / "liteflow").symlink_to("../liteflow.py")
        source = """
            from liteflow import DAG, task
            with DAG("linked") as dag:
                @task
                def f(): return 1
                f()
            """
        (self.folder / "flows" / "linked.py").write_text(textwrap.dedent(source))
        made = self.start("bin/liteflow", "scaffold")
        done = self.python("bin/liteflow", "run", "flows/linked.py", "--db", self.db)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("\nfrom liteflow import DAG, task\n", made.communicate(timeout=LIMIT)[0])

    @unittest.skipUnless(sys.platform == "linux", "elsewhere names are Unicode")
    def test_a_file_whose_name_is_no_unicode_runs(self):
        odd = self.folder / os.fsdecode(b"odd\xff")
        odd.mkdir()
        flow = shutil.copy(self.folder / "my_flow.py", odd)
        env = {**os.environ, "PYTHONPATH": str(self.folder)}
        ways = {"one.db": [flow], "two.db": ["-m", "liteflow", "run", flow]}
        runs = {db: self.start(*words, "--db", db, env=env) for db, words in ways.items()}
        for db, run in runs.items():
            _, err = run.communicate(timeout=LIMIT)
            self.assertEqual(run.returncode, 1, err)
            self.assertIn("odd\\udcff/my_flow.py", err)
            self.assertNotIn("Traceback", err)
            self.assert_exit(0, "show", "flow", "--db", db)
        self.assert_exit(0, "backup", odd / "copy.db", "--db", "one.db")
        self.assertEqual(len(Dag("flow").runs(odd / "copy.db")), 1)

    def test_a_file_is_compiled_without_this_module_s_own_future(self):
        self.script(
            """
            from liteflow import DAG, task
            def f(x: int): pass
            print(f.__annotations__)
            with DAG("flow") as dag:
                task(task_id="t")(f)(1)
            """
        )
        done = self.assert_exit(0, "run", "my_flow.py", "--quiet")
        self.assertEqual({*done.stdout.splitlines()}, {"{'x': <class 'int'>}"})

    def test_streams_that_are_closed_are_no_failure(self):
        closed = """import argparse, sys
            def init(self, *args, known=argparse.HelpFormatter.__init__, **kwargs):
                hasattr(sys.stdout, "fileno") and sys.stdout.fileno()  # as it does since 3.14
                known(self, *args, **kwargs)
            argparse.HelpFormatter.__init__ = init
            sys.stdout.close()
            dag.cli()"""
        self.script(self.FLOW.replace("dag.cli()", closed))
        self.assert_exit(0, "script", "--logs", "--conf", '{"n": 2}')
        with mock.patch.object(sys, "stdin", None):
            self.assert_exit(2, "delete", "flow", "--all", words=["--yes"])

    def test_quiet_says_that_there_are_no_tasks(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("never_called") as dag:
                @task
                def f(): return 1
            if __name__ == "__main__":
                dag.cli()
            """
        )
        done = self.python("my_flow.py", "--quiet")
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertIn("DAG 'never_called': there are no tasks", done.stderr)

    def test_what_a_file_leaves_is_finalized_as_in_any_program(self):
        self.script(
            """
            from liteflow import DAG, task
            class Journal:
                def __init__(self):
                    self.add, self.file = self.write, open("journal", "w")  # a circle
                def write(self, line): self.file.write(line)
            journal = Journal()
            with DAG("flow") as dag:
                @task
                def f(): return 1
                f()
            journal.add("built")
            """
        )
        self.assertEqual(self.cli("run", "my_flow.py", "--quiet").returncode, 0)
        self.assertEqual((self.folder / "journal").read_text(), "built")

    def test_the_life_of_a_workflow(self):
        self.assert_exit(1, "script", words=["bad luck", "--resume", "show flow/manual"], out="")
        self.assert_exit(0, "script", "--conf", '{"n": 2}', "--quiet", "--run-id", "two", out="")
        runs = json.loads(self.assert_exit(0, "runs", "--json").stdout)
        self.assertEqual([r["state"] for r in runs], ["success", "failed"])
        self.assertEqual(runs[0]["run_id"], "two")
        listed = json.loads(self.assert_exit(0, "list", "--json").stdout)
        self.assertEqual([(d["dag_id"], d["runs"]) for d in listed], [("flow", 2)])
        shown = json.loads(self.assert_exit(0, "show", "two", "--json").stdout)
        self.assertEqual([t["state"] for t in shown["task_instances"]], ["success"] * 2)
        self.assertIn("bad luck", self.assert_exit(0, "show", "flow/manual").stdout)
        self.assertIn("good", self.assert_exit(0, "show", "flow", "good").stdout)
        self.assert_exit(0, "logs", "flow", "good", out="good\\x1b[31m says 2\n")
        self.assert_exit(0, "logs", "flow", "--raw", out="good\x1b[31m says 2\n")
        picture = self.assert_exit(0, "visualize", "flow").stdout
        check_mermaid(self, picture)
        self.assert_exit(0, "delete", "two")
        self.assert_exit(2, "delete", "two", words=["'two'"])
        self.assertEqual(
            sorted(p.name for p in self.folder.iterdir() if p.is_file()),
            ["liteflow.db", "liteflow.py", "my_flow.py"],
        )

    def test_run_takes_a_file_written_for_airflow(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("one") as one: task(task_id="a")(sorted)([1])
            with DAG("two") as two: task(task_id="a")(sorted)([1])
            """,
            "two.py",
        )
        self.assert_exit(2, "run", "two.py", words=["2 DAGs", "one, two"])
        self.assert_exit(0, "run", "two.py", "two", "--quiet")
        self.assert_exit(2, "run", "two.py", "three", words=["'three'"])
        # As Airflow's examples end: nothing holds what the call gives.
        self.script(
            """
            import gc
            from liteflow import dag, task
            @dag
            def etl(): task(task_id="a")(sorted)([1])
            etl()
            gc.collect()
            """,
            "unnamed.py",
        )
        self.assert_exit(0, "run", "unnamed.py", "--quiet")
        done = self.cli_here("run", "absent.py")
        self.assertEqual((done.returncode, "/absent.py" in done.stderr), (2, True))
        self.script("import nonsense_module\n", "broken.py")
        done = self.cli("run", "broken.py")
        self.assertEqual(done.returncode, 2)
        self.assertIn("nonsense_module", done.stderr)

    def test_bad_usage_is_2_on_standard_error(self):
        for argv in (("frobnicate",), ("clear",), ("runs", "--nope")):
            with self.subTest(argv=argv):
                done = self.command(*argv)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn("usage:", done.stderr)
        self.assert_exit(2, "script_here", "--conf", "{", words=["--conf", "JSON"])
        self.assert_exit(2, "script_here", "--conf", "[1]", words=["object"])
        self.assert_exit(2, "script_here", "--conf", '{"n": [}', words=["--conf"])
        self.assert_exit(2, "script_here", "--logical-date", "soon", words=["--logical-date"])
        self.assert_exit(2, "script", "--max-workers", "0", words=["max_workers"])
        self.assertFalse(self.db.exists())

    def test_stop_wants_a_name_where_several_runs_are_running(self):
        for run_id in ("first", "second"):
            self.ran(run_id=run_id)
        self.abandon()
        with mock.patch.object(liteflow, "_owner_lives", lambda *args: True):
            names = "2 runs of DAG 'flow' are running: flow/second, flow/first; name one"
            self.assert_exit(2, "stop", "flow", words=[names])

    def test_a_run_of_which_nothing_has_started_has_no_picture_of_times(self):
        with DAG("flow") as d:
            task(task_id="none")(one_argument).expand(x=[])
        where = (f"flow/{d.test(db_path=self.db).run_id}", "--db", self.db)
        self.assert_exit(2, "visualize", "--gantt", *where, words=["there is nothing to draw"])
        self.assert_exit(0, "page", *where, "--output", self.folder / "run.html")
        self.assertIn("nothing has started", (self.folder / "run.html").read_text())

    def test_many_failures_are_shown_in_part_and_counted(self):
        with DAG("flow") as d:
            task(task_id="each")(lambda x: int(x)).expand(x=["no"] * (liteflow._MOST_SHOWN + 3))
        d.test(db_path=self.db)
        output = self.folder / "a.md"
        done = self.assert_exit(0, "visualize", "flow", "--db", self.db, "--output", output)
        self.assertEqual(done.stderr, f"wrote {output}\n")
        page = (self.folder / "a.md").read_text()
        self.assertIn("\n... and 3 more that failed.\n", page)
        self.assertEqual(page.count("\nValueError: invalid literal for int()"), 20)
        self.assertEqual(page.count("\n## each&#91;"), 20)
        self.assertIn("\n| ... 3 more of each | failed |", page)
        self.assertRegex(page, r"\n    #\d+;ach x 23 23 failed :crit, ")
        runs = self.assert_exit(0, "runs", "flow", "--db", self.db).stdout
        more = liteflow._MOST_SHOWN + 3 - liteflow._FEW_TOLD
        self.assertIn(f"; and {more} more", runs)

    def test_delete_takes_whole_names_and_forgets_a_dag_that_is_confirmed(self):
        for run_id in ("first", "second"):
            self.ran(run_id=run_id)
        for name in ("secon", "flow"):
            self.assert_exit(2, "delete", name, words=["name it so", "flow/second", "--all"])
        self.assert_exit(0, "delete", "flow/second")
        self.assert_exit(2, "delete", "flow", "--all", words=["--yes", "1 run"])
        self.assert_exit(2, "delete", "flo", "--all", "--yes", words=["'flow'"])
        with mock.patch.object(liteflow.DagRun, "owner_alive", True):
            live = ["DAG 'flow' is running: stop flow/first first"]
            self.assert_exit(75, "delete", "flow", "--all", "--yes", words=live)
        would = ["would delete DAG 'flow' with 1 run"]
        self.assert_exit(0, "delete", "flow", "--all", "--dry-run", words=would)
        for answer in ("", "\n", "n\n"):  # the first: Ctrl-D
            with mock.patch.object(sys, "stdin", io.StringIO(answer)):
                sys.stdin.isatty = lambda: True
                done = self.assert_exit(0, "delete", "flow", "--all", out="")
            self.assertIn("1 run? [y/N] nothing was deleted", done.stderr)
        self.assertEqual([run.run_id for run in Dag("flow").runs(self.db)], ["first"])
        self.assert_exit(0, "delete", "flow", "--all", "--yes", words=["with 1 run"])
        self.assertEqual(json.loads(self.assert_exit(0, "list", "--json").stdout), [])
        self.assert_exit(2, "show", words=["there is no run in"])
        self.assertIn("LAST SUCCESS", self.assert_exit(0, "list").stdout)
        DAG("empty").test(db_path=self.db)
        with mock.patch.object(sys, "stdin", io.StringIO("Y\n")):
            sys.stdin.isatty = lambda: True
            self.assert_exit(0, "delete", "empty", "--all", words=["with 1 run"])
        self.assertEqual(json.loads(self.assert_exit(0, "list", "--json").stdout), [])

    def test_what_is_short_or_missing_is_told_as_it_is(self):
        flow = "with DAG('%s') as dag: task(task_id='f')(print)(*range(12), sep='\\n')\n"
        for name, run_id in (("one", "daily"), ("two", "daily"), ("one", "daily_2")):
            self.run_flow(flow % name, run_id=run_id)
        words = ["'daily' fits 2 runs in", "one/daily", "two/daily", "name one as DAG/RUN"]
        self.assert_exit(2, "show", "daily", words=words)
        log = self.assert_exit(0, "show", "one", "f").stdout.partition("\nlog of f")[2]
        self.assertRegex(log, r"(?s)\A, the last 10 of 12 lines:\n    \| 2\n.* 11\n\Z")
        self.assert_exit(0, "delete", "two/daily")
        self.assert_exit(0, "page", "--output", "all.html")
        self.assertIn("two", (self.folder / "all.html").read_text())  # without a run
        self.assert_exit(2, "run", ".", words=["name a file in it"])
        self.assert_exit(2, "run", "nowhere.py", words=["nowhere.py is no file"])
        before = self.db.rename(self.folder / "flow").read_bytes()
        named = ("page", "one", "--db", "flow", "--output")
        self.assertIn("flow is the database: name another", self.cli_here(*named, "flow").stderr)
        self.assertEqual((self.folder / "flow").read_bytes(), before)

    def test_a_run_that_a_full_disk_ended_is_told_with_the_way_on(self):
        (self.folder / "full.py").write_text(
            "import liteflow, my_flow, sys\n"
            "record, left = liteflow._Store.record, [1]\n"
            "def full(store, *batch):\n"
            "    if not left: raise eval(sys.argv[2])('the disk is full')\n"
            "    left.clear()\n"
            "    record(store, *batch)\n"
            "if __name__ == '__main__':\n"
            "    liteflow._Store.record = full\n"
            "    my_flow.dag.cli()\n"
        )
        errors = {"liteflow.DatabaseError": 3, "OSError": 1, "liteflow.UnreachableTask": 2}
        runs = {error: self.start("full.py", "--run-id", error) for error in errors}
        for error, code in errors.items():
            with self.subTest(error=error):
                _, err = runs[error].communicate(timeout=LIMIT)
                self.assertEqual(runs[error].returncode, code, err)
                way = f"(?s)to go on: .*--resume --run-id {error}.*\n.*: the disk is full"
                self.assertRegex(err, way)

    def test_the_graph_is_drawn_without_a_run(self):
        drawn = self.assert_exit(0, "script_here", "--graph").stdout
        self.assertEqual(drawn, 'flowchart TD\n    n0["good"]\n    n1["bad"]\n    n0 --> n1\n')
        self.assertFalse(self.db.exists())
        self.script(
            "from liteflow import *\nwith DAG('d') as dag:\n    e = EmptyOperator\n"
            "    e(task_id='s').as_setup() >> e(task_id='w', trigger_rule='always')\n"
            "if __name__ == '__main__':\n    dag.cli()\n"
        )
        self.assert_exit(2, "script", "--graph", words=["liteflow: error: task 'w' stands"])

    def test_options_as_people_type_them(self):
        self.assert_exit(0, "script", "-q", "-p", "n=2", "--run-id", "two", out="")
        self.assert_exit(2, "script_here", "-p", "n", words=["KEY=VALUE"])
        for kind, text in ("NAME=N", "a\nb=2"), ("FILE.html", "a\nb.html"), ("TASK", "a\nb"):
            liteflow._argument_value(kind, text)  # a line's end is a character like any
        with DAG("typed", params={"v": "1.9", "n": 1, "s": Param("a", type="string")}) as typed:
            either = Param(1, type=["string", "integer"])
            task(task_id="t", params={"w": "x", "u": either})(quiet)()
        for name in "vsw":  # it is text that is wanted
            for text in ("1.10", "1e5", "null", "[1]", "a", '"'):
                self.assertEqual(liteflow._given(typed, name, text), text)
            self.assertEqual(liteflow._given(typed, name, '"a b"'), "a b")
        for name in ("n", "u", "unknown"):
            self.assertEqual(liteflow._given(typed, name, "10"), 10)
        either = Param(None, type=["null", "string"])
        with DAG("maybe", params={"m": either, "i": Param(1, type="integer")}) as maybe:
            pass
        found = [liteflow._given(maybe, "m", text) for text in ("null", "5", "a", '"5"')]
        self.assertEqual(found, [None, "5", "a", "5"])
        self.assertEqual(liteflow._given(maybe, "i", "1.5"), 1.5)  # to be refused as what it is
        for name in ("u", "unknown"):
            self.assertEqual(liteflow._given(typed, name, "ten"), "ten")
        for text in ("ten", "False"):  # a text is true, whatever it says
            with self.assertRaisesRegex(liteflow._UsageError, f"as its default 1 is, .*'{text}'"):
                liteflow._given(typed, "n", text)
        for argv in (
            ["--db", str(self.db), "runs", "-n", "1"],
            ["runs", "-n1", "--db", str(self.db)],
        ):
            self.assertIn("two", self.command(*argv).stdout)
        conf = Dag("flow").get_run("two", self.db).conf
        self.assertEqual(conf, {"n": 2})
        told = self.assert_exit(0, "show", "two").stdout
        self.assertIn('conf: {"n": 2}\n', told)
        self.assertNotIn("logical date", told)
        self.assert_exit(1, "script", "-q", "--logical-date", "2026-01-02", "--run-id", "day")
        day = "\nlogical date: 2026-01-02 00:00:00+00:00\n"
        self.assertIn(day, self.assert_exit(0, "show", "flow/day").stdout)
        widths = [20, 40, 40]
        with (
            mock.patch.object(liteflow, "_may_redraw", lambda stream: True),
            mock.patch.object(
                os, "get_terminal_size", lambda descriptor: os.terminal_size((widths.pop(), 24))
            ),
        ):
            table = liteflow._table(["A", "B"], [["a" * 30, "b" * 30]])
            cells = ["a" * 250, "failed", 1, "03:33:33", "9 s", "boom"]
            deep, narrow = (liteflow._table(liteflow._HEADS, [cells]) for _ in "12")
        self.assertEqual({len(line) for line in table.splitlines()[1:]}, {40})
        self.assertRegex(deep, r"\na+\.\.\.a+ .*failed.* 1 +03:33:33")
        self.assertRegex(narrow, r"\na+\.\.\.a+  .*failed")
        self.script(self.FLOW.replace('"n": 1', '"n": 1, "m": 1'))
        self.assert_exit(0, "script", "-q", "--conf", '{"n": 3, "m": 2}', "-p", "n=2", out="")
        self.assertEqual(Dag("flow").runs(self.db)[0].conf, {"n": 2, "m": 2})

    def test_a_bare_command_is_the_help_and_the_newest_run_need_not_be_named(self):
        done = self.command()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("examples:", done.stdout)
        self.assertRegex(done.stdout, r"\n +prune +\w")
        self.assert_exit(3, "show", words=[str(self.db)], out="")
        for run_id in ("one", "two"):
            self.ran(run_id=run_id)
        self.assertIn("flow/two: failed", self.assert_exit(0, "show").stdout)
        self.assert_exit(0, "logs")

    def test_a_database_that_cannot_be_used_is_3(self):
        for argv in (
            ("runs",),
            ("list",),
            ("show", "flow"),
            ("logs", "flow"),
            ("visualize", "flow"),
            ("delete", "flow"),
            ("script_here", "--resume"),
        ):
            with self.subTest(argv=argv):
                self.assert_exit(3, *argv, words=[str(self.db)], out="")
                self.assertFalse(self.db.exists())
        self.db.write_text("this is no database, but long enough to be read as a header" * 20)
        before = self.db.read_bytes()
        for argv in (("runs",), ("visualize", "flow"), ("script",)):
            with self.subTest(argv=argv):
                self.assert_exit(3, *argv, words=["not a liteflow database"], out="")
        self.assertEqual(self.db.read_bytes(), before)

    def test_unknown_and_ambiguous_names_are_2_with_near_ones(self):
        for i in range(2):
            self.ran(conf={"n": 2}, run_id=f"run{i}")
        self.assert_exit(2, "show", "flwo", words=["'flow'", str(self.db)])
        self.assert_exit(2, "show", "run", words=["fits 2 runs", "flow/run0"])
        self.assert_exit(2, "logs", "flow", "goood", words=["'good'"])
        self.assert_exit(2, "runs", "flwo", words=["'flow'"])
        self.assert_exit(2, "show", "", words=["no run, '' in", "there is 'flow'"])
        self.assert_exit(0, "show", "flow/run0")

    def test_wrong_graphs_are_2(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("circle") as dag:
                a = task(task_id="a")(sorted)([1]); b = task(task_id="b")(sorted)([1])
                a >> b >> a
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.assert_exit(2, "script", words=["a -> b -> a"])
        self.assertFalse(self.db.exists())

    def test_too_large_a_diagram_is_said(self):
        run = self.run_flow(
            """
            with DAG("many") as dag:
                @task
                def f(*above): pass
                above = []
                for i in range(40): above.append(f(*above))
            """
        )
        self.assertEqual(run.state, "success")
        self.assert_exit(0, "visualize", "many", words=["780 edges"])
        self.assert_exit(0, "visualize", "many", "--output", "many.md", words=["780 edges"])
        self.run_flow(
            """
            with DAG("mapped") as dag:
                @task
                def f(i): pass
                f.expand(i=list(range(1000)))
            """
        )
        self.assertEqual(self.assert_exit(0, "visualize", "mapped").stderr, "")

    def test_graph_runs_nothing(self):
        done = self.assert_exit(0, "script", "--graph")  # a process
        check_mermaid(self, done.stdout)
        self.script(
            """
            from liteflow import DAG, EmptyOperator
            with DAG("slip", default_args={"retrys": 3}) as dag:
                EmptyOperator(task_id="a")
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.assert_exit(
            0, "script", "--graph", words=["note: default_args: no task takes 'retrys'"]
        )
        self.assertFalse(self.db.exists())

    def test_version_and_help(self):
        self.assertIn(sqlite3.sqlite_version, self.assert_exit(0, "--version").stdout)
        self.assertIn("examples:", self.assert_exit(0, "--help").stdout)
        self.assertIn("examples:", self.assert_exit(0, "script_here", "--help").stdout)
        self.assertIn("examples:", self.python("liteflow.py", "--help").stdout)

    def test_help_tells_any_description(self):
        self.script(
            r"""
            from liteflow import DAG
            with DAG("told", description="日 \x1b[31m \ud800") as dag:
                pass
            dag.cli()
            """
        )
        for encoding, shown in ("utf-8", "日"), ("ascii", r"\u65e5"):
            with mock.patch.dict(os.environ, PYTHONIOENCODING=encoding):
                done = self.python("my_flow.py", "--help")
            self.assertIn(rf"'told'. {shown} \x1b[31m \ud800.", done.stdout)

    def test_a_reader_that_has_seen_enough(self):
        self.ran(conf={"n": 2})
        done = subprocess.run(
            f"{sys.executable} -m liteflow runs | true",
            shell=True,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertEqual(done.stderr, "")

    def test_the_exit_code_is_the_run_s_though_nobody_reads_or_the_disk_is_full(self):
        runs = [
            subprocess.Popen(
                ["bash", "-c", f"{sys.executable} my_flow.py --logs {end}; exit ${{PIPESTATUS[0]}}"],
                cwd=self.folder, env=BUFFERED, stderr=subprocess.PIPE, text=True,
            )
            for end in ("| true", "> /dev/full")[: 1 + os.path.exists("/dev/full")]
        ]  # fmt: skip
        for run in runs:
            _, err = run.communicate(timeout=LIMIT)
            self.assertEqual(run.returncode, 1, err)
            self.assertNotIn("Exception", err)

    @unittest.skipUnless(os.path.exists("/dev/full"), "Linux has it")
    def test_the_exit_code_is_the_signal_s_though_the_disk_is_full(self):
        self.script(
            """
            import time
            from liteflow import DAG, task
            with DAG("flow") as dag:
                @task
                def f():
                    print("line")
                    open("going", "w").close()
                    time.sleep(60)
                f()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        with open("/dev/full", "w") as full:
            run = self.start("my_flow.py", "--logs", env=BUFFERED, stdout=full)
        self.assertTrue(wait_until((self.folder / "going").exists))
        run.send_signal(signal.SIGTERM)
        self.assertNotIn("Exception", run.communicate(timeout=LIMIT)[1])
        self.assertEqual(run.returncode, 143)

    def test_a_script_s_own_handler_of_a_signal_says_how_it_ends(self):
        dag = self.load().dag
        for code, seen in {None: 0, 3: 3, "": "", "told to end": "told to end"}.items():
            with (
                mock.patch.object(liteflow, "_Run") as run,
                mock.patch.object(sys, "argv", ["my_flow.py"]),
                self.assertRaises(SystemExit) as ended,
            ):
                run.return_value.execute.side_effect = SystemExit(code)
                run.return_value.has_begun = False
                dag.cli()
            self.assertEqual(ended.exception.code, seen)

    def test_an_end_without_a_code_is_a_success_unless_the_disk_is_full(self):
        def end(options):
            print("line")
            sys.exit()

        with mock.patch.object(liteflow, "_cmd_scaffold", end):
            for path, code in (("/dev/null", 0), ("/dev/full", 1)):
                with (
                    open(path if os.path.exists(path) else "/dev/null", "w") as file,
                    contextlib.redirect_stdout(file),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    found = liteflow.main(["scaffold"])
                self.assertEqual(found, code * os.path.exists(path))

    def test_the_scaffold_runs_as_it_is(self):
        text = self.cli_here("scaffold").stdout
        self.assertLess(len(text.splitlines()), 40)
        (self.folder / "scaffolded.py").write_text(text)
        done = self.python("-W", "error", "scaffolded.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("4 success", done.stderr)
        self.assertEqual(self.cli_here("logs", "my_etl", "report").stdout, "2 orders, 7 in total\n")


class SeeingTest(ScriptCase):
    """What people see of a run: while it runs, in another terminal, and afterwards."""

    FLOW = """
        import os, sys, time
        from liteflow import DAG, task
        with DAG("night") as dag:
            @task
            def good(): print("good says so"); return [1, 2, 3]
            @task
            def double(x): return 2 * x
            @task(retries=1)
            def bad(x):
                print("about to\\x1b[2J fail")
                raise ValueError("no luck\\nat all")
            @task
            def waits(ti=None):
                print("waiting", flush=True)
                while not os.path.exists("go"): time.sleep(0.01)
            numbers = good()
            bad(double.expand(x=numbers))
            if os.path.exists("wait"): waits()
        if __name__ == "__main__":
            dag.cli()
    """

    def on_terminal(self, *argv, columns=80, rows=24, heard=len, **environ):
        """What a command writes to a terminal of this size."""
        pty = importlib.import_module("pty")
        fcntl, termios = map(importlib.import_module, ("fcntl", "termios"))
        ours, theirs = pty.openpty()
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        process = self.start(
            *argv, stdout=theirs, stderr=theirs, env={**known, "TERM": "xterm", **environ}
        )
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # EIO at its end
            while data := os.read(ours, 65536):
                heard(found := found + data)
        os.close(ours)
        process.wait(LIMIT)
        return found.decode()

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_on_a_terminal_failures_scroll_above_a_status(self):
        text = self.on_terminal("my_flow.py")
        self.assertIn("\x1b[2K", text)  # the status was drawn again
        self.assertRegex(text, r"\[=*>? *\] \d/5 tasks, \d")
        self.assertIn("\x1b[31m", text)
        self.assertIn("    | about to\\x1b[2J fail", text)
        self.assertNotIn("\x1b[2J", text)
        self.assertIn("(ValueError: no luck)", text)
        script = re.escape(shlex.quote(os.path.realpath(self.folder / "my_flow.py")))
        self.assertRegex(
            text,
            rf"to go on once it is mended: cd .+ && \S*py\S+ {script} --resume",
        )
        self.assertNotIn("double[0]  success", text)

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_terminals_that_want_less(self):
        with concurrent.futures.ThreadPoolExecutor() as threads:
            narrow = threads.submit(self.on_terminal, "my_flow.py", columns=30, NO_COLOR="1")
            dumb = self.on_terminal("my_flow.py", TERM="dumb")
        self.assertNotIn("\x1b", dumb)
        self.assertIn("double[0]  success", dumb)
        self.assertIn("\x1b[2K", narrow.result())
        self.assertNotIn("\x1b[31m", narrow.result())
        for line in narrow.result().splitlines():
            if line.startswith("["):
                self.assertLess(len(line), 30)

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_a_terminal_that_does_not_tell_its_size_is_a_usual_one(self):
        text = self.on_terminal("my_flow.py", columns=0, rows=0)
        self.assertRegex(text, r"\[[=> ]{40}\] \d/\d tasks, \d")

    def test_elsewhere_a_line_a_change_of_state(self):
        colored = self.start("my_flow.py", env={**os.environ, "FORCE_COLOR": "1"})
        done = self.python("my_flow.py")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertNotIn("\x1b", done.stderr)
        changes = re.findall(r"^\d\d:\d\d:\d\d  (\S+)  (\w+)", done.stderr, re.M)
        self.assertIn(("double[2]", "running"), changes)
        self.assertEqual(
            [state for name, state in changes if name == "bad"],
            ["running", "up_for_retry", "running", "failed"],
        )
        self.assertIn("    | about to\\x1b[2J fail", done.stderr)
        self.assertIn("\x1b[31m", colored.communicate(timeout=LIMIT)[1])

    def test_quiet_says_only_what_failed(self):
        done = self.python("my_flow.py", "--quiet")
        first, *others = done.stderr.splitlines()
        self.assertRegex(first, "^run manual__.* of DAG 'night' failed: see below$")
        self.assertEqual(others[0], "bad failed, try 2 of 2: ValueError: no luck")
        self.assertEqual(others[1], "    at all")
        self.assertRegex(others[2], r"^    /.*/my_flow.py:\d+, in bad: .*raise ValueError")
        self.assertIn("    | about to\\x1b[2J fail", others)
        script = os.path.realpath(self.folder / "my_flow.py")
        [run] = Dag("night").runs(self.folder / "liteflow.db")
        again = [script, "--resume", "--run-id", run.run_id, "--db", run._path]
        again = f"{liteflow._python()} {shlex.join(map(str, again))}"
        again = f"cd {shlex.quote(os.path.dirname(script))} && {again}"
        self.assertEqual(others[-1], f"to go on once it is mended: {again}")

    def test_logs_are_streamed_with_their_task_before_them(self):
        done = self.python("my_flow.py", "--logs")
        self.assertIn("good | good says so\n", done.stdout)
        self.assertEqual(done.stdout.count("bad | about to\\x1b[2J fail\n"), 2)

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_output_without_an_end_is_not_drawn_over(self):
        self.script(self.FLOW.replace('print("good says so")', 'print("half a line", end="")'))
        text = self.on_terminal("my_flow.py", "--logs")
        self.assertIn("good | half a line\r\n", text)
        done = self.python("my_flow.py", "--logs", stderr=subprocess.STDOUT)
        self.assertRegex(done.stdout, r"\ngood \| half a line\n\d\d:\d\d:\d\d  ")

    def test_following_a_live_run(self):
        """Also where another task waits for the only worker."""
        (self.folder / "wait").touch()
        run = self.start("my_flow.py", "--max-workers", "1")
        self.assertTrue(wait_until(self.db.exists))
        printed = "SELECT count(*) FROM task_log WHERE text = 'waiting' || char(10)"
        with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as look:

            def waits():
                with contextlib.suppress(sqlite3.Error):
                    return look.execute(printed).fetchone() == (1,)

            self.assertTrue(wait_until(waits))
        quickly = "import liteflow, sys; liteflow._POLL = 0.1; sys.exit(liteflow.main())"
        followers = [
            self.start("-c", quickly, *words, "--follow")
            for words in (["logs", "night"], ["logs", "night", "waits"], ["show", "night"])
        ]
        # Each has begun once it has said something.
        first = [followers[0].stdout.readline(), followers[1].stdout.readline()]
        first.append(next(line for line in followers[2].stderr if "1 running" in line))
        typo = self.cli("show", "night", "typo", "--follow")  # which does not wait for the end
        self.assertEqual((typo.returncode, run.poll()), (2, None), typo.stderr)
        self.assertIn(" | ", first[0])
        self.assertEqual(first[1], "waiting\n")
        time.sleep(0.3)  # in which nothing changes, so that nothing is told
        (self.folder / "go").touch()
        self.assertEqual(run.wait(LIMIT), 1)
        # Not communicate(), which does not see what readline() has read ahead.
        outs = [process.stdout.read() for process in followers]
        for process in followers:
            process.wait(LIMIT)
        self.assertIn("waits | waiting\n", first[0] + outs[0])
        self.assertEqual([process.returncode for process in followers], [1, 1, 1])
        self.assertIn("failed", outs[2])
        told = [line.split("  ", 1)[1] for line in [first[2], *followers[2].stderr]]
        self.assertTrue(all(a != b for a, b in itertools.pairwise(told)), told)
        self.assertFalse(list(self.folder.glob("*-wal")))

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_a_wide_name_leaves_room_for_the_state(self):
        wide = f"with DAG('d') as dag:\n    @task(task_id={'表' * 40!r})\n    def f(): return 1\n    f()\n"
        self.module(wide).dag.test(db_path=self.db)
        shown = self.on_terminal("-m", "liteflow", "show", "d", columns=60, NO_COLOR="1")
        line = shown.splitlines()[2]
        self.assertRegex(line, r"^表+\.\.\.表+ +success  1 ")
        self.assertLessEqual(liteflow._width(line), 60)

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_following_a_resumed_run_counts_no_pause(self):
        process = self.started_and_waiting()
        process.kill()
        process.wait()
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute(
                "UPDATE dag_run SET start_date = '2000-01-01T00:00:00+00:00', state = 'failed'"
            )
            db.execute("UPDATE dag_run SET end_date = '2000-01-01T00:00:01+00:00'")
            db.execute("UPDATE task_instance SET state = NULL WHERE task_id = 'waits'")
        process = self.start("my_flow.py", "--resume")
        self.wait_for_it_to_wait()

        def go_on(found):
            if b" tasks, " in found:  # it has begun to tell
                (self.folder / "go").touch()

        shown = self.on_terminal("-m", "liteflow", "show", "night", "--follow", heard=go_on)
        process.wait(LIMIT)
        self.assertRegex(shown, r"/\d tasks, \d\.\d s")
        self.assertNotRegex(shown, r"/\d tasks, .* h ")
        self.assertNotRegex(shown, r"[\nA]\d\d:\d\d:\d\d  ")  # no line a change, as elsewhere
        self.assertIn("\x1b[2K", shown.rpartition(" tasks, ")[2])  # the status goes at the end

    def test_what_runs_is_followed_with_its_time(self):
        store, attempt = self.started_attempt()
        looks, run = [], Dag("d").get_run("r", self.db)
        lives = mock.PropertyMock(side_effect=[True, False] * 2)
        with (
            mock.patch.object(liteflow.DagRun, "owner_alive", lives),
            mock.patch.object(liteflow._Report, "status", lambda _, look: looks.append(look())),
            mock.patch.object(liteflow, "_POLL", 0.0),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            liteflow._follow(run)
            attempt.started = "?"  # by somebody who has edited the file
            store.record(self.batch_of(attempt))
            liteflow._follow(run)
        [(_, [(label, seconds)], _), (_, unknown, _)] = looks
        self.assertEqual((label, seconds > 1e6), ("sample", True))  # since 2024
        self.assertEqual(unknown, [("sample", 0.0)])

    def started_and_waiting(self):
        """The script's process, which waits for a file "go"."""
        (self.folder / "wait").touch()
        process = self.start("my_flow.py")
        self.wait_for_it_to_wait()
        return process

    def wait_for_it_to_wait(self):
        ready = "SELECT count(*) FROM task_instance WHERE state = 'running' AND task_id = 'waits'"

        def waits():
            with contextlib.suppress(sqlite3.Error):
                return self.query(ready) == [(1,)]

        self.assertTrue(wait_until(waits))

    def cli(self, *argv, **options):
        """In this process, where no stream of its own is asked for."""
        own = options or argv[0] == "run" or "--follow" in argv
        return super().cli(*argv, **options) if own else self.cli_here(*argv)

    def seen(self, *argv, code=0):
        done = self.cli(*argv)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout

    def test_the_question_of_every_morning(self):
        self.ran(run_id="first")
        text = self.seen("runs", "--since", "24h", "--state", "failed")
        self.assertRegex(text, r"night/first +failed +\S+ +.*bad: ValueError: no luck")
        self.assertNotIn("night", self.seen("runs", "--state", "success"))
        self.assertIn("no success: failed", self.seen("list", "--check", code=1))
        with contextlib.closing(sqlite3.connect(self.db)) as other, other:
            other.execute("UPDATE dag_run SET start_date = '2020' || substr(start_date, 5)")
            other.execute("INSERT INTO dag (dag_id) VALUES ('other')")
        self.assertEqual(self.seen("list", "other", "--check"), "")
        self.assertIn("night", self.seen("list", "night", "--check", code=1))
        self.assertIn("did you mean 'night'", self.cli("list", "nigth", "--check").stderr)
        text = self.seen("runs", "--since", "24h", "--state", "failed")
        self.assertIn("first", text)  # it began long ago, or was resumed, and failed now
        self.ran(run_id="second")
        with mock.patch.object(liteflow, "_MOST_RUNS", 1):
            for words in (["--json"], ["--state", "failed"], ["--limit", "1"]):
                done = self.cli("runs", *words)
                self.assertNotIn("first", done.stdout)
                self.assertEqual("--limit" in done.stderr, words[0] != "--limit", words)
        self.abandon(running=False)
        text = self.seen("runs", "--state", "failed")
        self.assertIn("running (owner dead)", text)
        self.assertNotIn("night", self.seen("runs", "--state", "running"))
        self.assertIn("owner dead", self.seen("list", "--check", code=1))
        with contextlib.closing(sqlite3.connect(self.db)) as other, other:
            other.execute("DELETE FROM dag WHERE dag_id = 'other'")
            other.execute("UPDATE dag_run SET state = 'success'")
        self.assertEqual(self.seen("list", "--check", "--max-age", "26h"), "")
        with contextlib.closing(sqlite3.connect(self.db)) as other, other:
            old = "2020-01-01T00:00:00.000000+00:00"
            other.execute("UPDATE dag_run SET start_date = ?1, end_date = ?1", (old,))
        self.assertEqual(self.seen("list", "--check"), "")
        self.assertIn("too old", self.seen("list", "--check", "--max-age", "26h", code=1))
        self.assertNotIn("night", self.seen("runs", "--since", "24h"))
        for began, is_seen in (("2019-12-30", True), ("2020-01-03T06:00", False)):
            for words in (
                ("runs", "--since", began),
                ("prune", "--older-than", began, "--dry-run"),
            ):
                seen = "night" in self.cli_here(*words, "--db", self.db).stdout
                self.assertEqual(seen, is_seen == (words[0] == "runs"), words)
        self.assertRegex(self.seen("list"), r"\d+ d ago")
        with contextlib.closing(sqlite3.connect(self.db)) as other, other:  # its clock was ahead
            other.execute(
                "UPDATE dag_run SET end_date = '2999' || substr(end_date, 5) WHERE id = 1"
            )
        self.assertIn("too old", self.seen("list", "--check", "--max-age", "26h", code=1))
        for words in (["runs", "--since", "2020-1"], ["list", "--max-age", "1h"]):
            self.assertEqual(self.cli(*words).returncode, 2)

    def test_mapped_instances_are_folded_but_for_what_failed(self):
        run = self.run_flow(
            """
            with DAG("folded") as dag:
                @task
                def f(i):
                    if i in (3, 5): raise ValueError(f"not {i}")
                    return i
                f.expand(i=list(range(60)))
            """
        )
        text = self.seen("show", "folded")
        self.assertRegex(text, r"f x 60 +58 success, 2 failed")
        self.assertRegex(text, r"f\[3\] \(3\) +failed .*ValueError: not 3")
        self.assertLess(len(text.partition("\n\n")[0].splitlines()), 8)
        self.assertEqual(len(self.seen("show", "folded", "--state", "success").splitlines()), 60)
        shown = self.seen("show", "folded", "f")
        self.assertIn("shown here, of these: 2; ", shown)
        self.assertNotIn("[0]", shown)
        self.assertIn("not 5", self.seen("show", "folded", "f[5]"))
        self.assertEqual(
            len(json.loads(self.seen("show", "folded", "--json"))["task_instances"]), 60
        )
        self.assertEqual(run.state, "failed")

    def test_show_of_a_task(self):
        self.ran()
        text = self.seen("show", "night", "bad")
        self.assertEqual(text.count("ValueError: no luck"), 3)
        self.assertIn("log of bad:\n    | about to\\x1b[2J fail\n", text)
        self.assertIn("[1, 2, 3]", self.seen("show", "night", "good"))
        self.assertIn("did you mean 'bad'", self.cli("show", "night", "bda").stderr)

    def test_pictures_in_files(self):
        self.ran()
        gantt = self.seen("visualize", "night", "--gantt")
        check_mermaid(self, gantt)
        self.assertIn("ad try 2 failed :crit", gantt)
        self.assertTrue(
            self.seen("visualize", "night", "--direction", "RL").startswith("flowchart RL")
        )
        self.assertIn("mermaid.live", self.seen("visualize", "night", "--url"))
        self.seen("visualize", "night", "--output", "run.mmd", "--gantt")
        self.assertTrue((self.folder / "run.mmd").read_text().startswith("gantt"))
        self.seen("visualize", "night", "--output", "run.md")
        page = (self.folder / "run.md").read_text()
        for block in re.findall(r"```mermaid\n(.*?)```", page, re.S):
            check_mermaid(self, block)
        self.assertEqual(page.count("```mermaid"), 2)
        self.assertIn("about to\\x1b[2J fail", page)
        self.assertIn("| bad | failed | 2 |", page)
        for words in (["--output", "run.html"], ["--output", "none/run.md"]):
            self.assertEqual(self.cli("visualize", "night", *words).returncode, 2)

    def test_prune_gives_the_space_back(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("fat") as dag:
                @task
                def f(params): print("x" * 3000); return bytes(2_000_000)
                f()
            """
        )
        for i in range(5):
            self.ran(run_id=f"r{i}")
        size = self.db.stat().st_size
        self.assertGreater(size, 10_000_000)
        copy = self.folder / "copy.db"
        self.seen("backup", copy)
        self.assertEqual(self.cli("backup", copy).returncode, 2)
        before = self.db.read_bytes()
        self.assertIn("fat/r0", self.seen("prune", "--keep", "3", "--dry-run"))
        self.seen("delete", "fat/r0", "--dry-run")
        self.assertEqual(self.db.read_bytes(), before)
        self.assertIn("bytes given back", self.cli("prune", "--keep", "3").stderr)
        page = ["page", "--output", self.folder / "page.html"]
        for words in (["prune", "--keep", "3"], ["backup", self.folder / "b.db"], page):
            self.assertEqual(self.cli(*words, "--quiet").stderr, "")  # from cron
        self.assertEqual([run.run_id for run in Dag("fat").runs(self.db)], ["r4", "r3", "r2"])
        self.assertLess(self.db.stat().st_size, 0.7 * size)
        self.seen("prune", "--older-than", "1d")
        self.assertEqual(len(Dag("fat").runs(self.db)), 3)
        self.seen("prune", "--values")
        self.assertLess(self.db.stat().st_size, 300_000)
        [run, *_] = Dag("fat").runs(self.db)
        self.assertEqual((run.xcoms(), run.log("f")), ([], "x" * 3000 + "\n"))
        self.seen("prune", "fat", "--keep", "0")
        self.assertEqual(Dag("fat").runs(self.db), [])
        self.seen("list", "--check")  # there is nothing left to be in trouble
        self.assertIn(f"there is no run in {self.db}", self.cli("show").stderr)
        self.assertIn("no run", self.seen("list", "--check", "--max-age", "26h", code=1))
        self.assertEqual([run.run_id for run in Dag("fat").runs(copy)][-1], "r0")
        self.assertEqual(Dag("fat").runs(copy)[-1].xcom_pull("f"), bytes(2_000_000))
        self.assertEqual(copy.stat().st_mode & 0o777, 0o600)
        for words in (["prune"], ["prune", "--keep", "-1"], ["prune", "none", "--keep", "1"]):
            self.assertEqual(self.cli(*words).returncode, 2)

    @unittest.skipUnless(sys.platform == "linux", "of bash")
    def test_a_copy_that_finds_no_room_is_told_and_leaves_nothing(self):
        self.ran()
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 60; {sys.executable} -m liteflow backup copy.db"],
            cwd=self.folder, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("/copy.db can't be written: ", done.stderr)
        self.assertEqual([*self.folder.glob("copy.db*")], [])
        # A disk that gives up later, as it is asked for what it has taken.
        given_up = sqlite3.OperationalError("disk I/O error")
        given_up.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        database = mock.Mock(**{"backup.side_effect": given_up})
        with self.assertRaises(OSError):
            liteflow._copy_database(database, self.folder / "copy")

    @unittest.skipUnless(sys.platform == "linux", "of bash")
    def test_what_a_full_disk_holds_can_be_looked_at(self):
        def without_room(*words):
            line = f'ulimit -f 16; {sys.executable} -m liteflow "$@"'
            return subprocess.run(
                ["bash", "-c", line, "", *words],
                cwd=self.folder, capture_output=True, text=True, timeout=LIMIT,
            )  # fmt: skip

        self.ran()
        shown = self.seen("runs")
        done = without_room("prune", "--keep", "0")
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn("full", done.stderr)
        done = without_room("runs")
        self.assertEqual((done.returncode, done.stdout), (0, shown), done.stderr)

    def test_a_first_run_under_way_is_in_no_trouble(self):
        run = self.started_and_waiting()
        self.assertEqual(self.seen("list", "--check"), "")
        self.assertIn("no run", self.seen("list", "--check", "--max-age", "26h", code=1))
        (self.folder / "go").touch()
        self.assertEqual(run.wait(LIMIT), 1)

    def test_a_live_run_is_neither_pruned_nor_kept_from_a_backup(self):
        run = self.started_and_waiting()
        self.assertNotIn("night", self.seen("prune", "--keep", "0", "--dry-run"))
        self.seen("prune", "--keep", "0")
        copy = self.folder / "copy.db"
        self.seen("backup", copy)
        self.assertEqual(Dag("night").runs(copy)[0].state, "running")
        (self.folder / "go").touch()
        self.assertEqual(run.wait(LIMIT), 1)
        self.assertEqual(len(Dag("night").runs(self.db)), 1)
        with contextlib.closing(sqlite3.connect(copy)) as found:
            self.assertEqual(found.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def test_a_run_without_its_values_is_not_run_again(self):
        os.rename(self.folder / "my_flow.py", self.folder / "old.py")
        source = (self.folder / "old.py").read_text().replace("raise ValueError", "return; raise")
        source = source.replace("if os.path", "numbers >> good.override(task_id='pulls')()  # ")
        (self.folder / "my_flow.py").write_text(source)
        before = self.ran()
        self.assertEqual(before.state, "success")
        self.seen("prune", "--values")
        self.assertIn("its values were deleted", self.seen("show", "night", "good"))
        self.assertIn("deleted (prune --values)", self.seen("page", "night/manual"))
        for key in ("return_value", "other"):
            with self.assertRaisesRegex(liteflow.XComNotFound, "were deleted"):
                before.xcom_pull("double", key)
        for words in ("--from bad", "--task bad", "--task double[1]", "--task pulls"):
            done = self.script_here(*words.split())
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn("were deleted", done.stderr)
        self.assertEqual(self.cli("clear", "night", "good").returncode, 2)
        self.assertEqual(Dag("night").runs(self.db)[0].state, "success")
        self.assertEqual(self.script_here("--task", "good").returncode, 0)
        self.seen("prune", "--keep", "0")
        with self.assertRaises(liteflow.RunNotFound):
            before.xcom_pull("double")

    def test_an_instance_that_is_not_there_is_not_cleared(self):
        self.ran(run_id="first")
        before = self.db.read_bytes()
        for name in ("double[7]", "good[0]", "bda"):
            self.assertEqual(self.cli("clear", "night", name).returncode, 2, name)
            done = self.script_here("--from", name)
            self.assertEqual(done.returncode, 2, done.stderr)
            with self.assertRaises(liteflow.TaskNotFound):
                Dag("night").runs(self.db)[0].clear(name)
        with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as found:
            rows = found.execute("SELECT state, reason FROM dag_run").fetchall()
        self.assertEqual(rows, [("failed", None)])
        self.assertEqual(len(before), len(self.db.read_bytes()))

    def test_the_time_that_a_task_took_is_told_whole(self):
        self.script(
            """
            import time
            from liteflow import DAG, task
            with DAG("naps") as dag:
                @task(execution_timeout=0.2)
                def long(): time.sleep(9)
                @task
                def nap(): time.sleep(0.1)
                nap(); long()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        done = self.python("my_flow.py")
        told = dict(re.findall(r"(\w+)  (?:success|failed)  ([\d.]+) s", done.stderr))
        self.assertGreaterEqual(float(told["nap"]), 0.1)
        self.assertGreaterEqual(float(told["long"]), 0.2)

    def test_a_script_that_ends_while_it_is_loaded_is_bad_usage(self):
        self.script("import sys\nsys.exit(0)\n", "ends.py")
        done = self.python("-m", "liteflow", "run", "ends.py")
        self.assertEqual(done.returncode, 2)
        self.assertIn("ends.py can't be loaded", done.stderr)
        self.script("raise ValueError('one slip\\nin two lines')\n", "ends.py")
        told = self.python("-m", "liteflow", "run", "ends.py").stderr
        self.assertEqual(told.count("ValueError: one slip"), 1)
        self.script("x = (\n", "ends.py")
        told = self.python("-m", "liteflow", "run", "ends.py").stderr
        self.assertEqual(told.count("SyntaxError: "), 1)
        self.assertIn("'(' was never closed (ends.py, line 1)\n", told)

    def test_a_script_that_is_refused_while_it_is_loaded_says_in_which_line(self):
        path = self.script(
            """
            from liteflow import *
            with DAG("twice") as dag:
                BaseOperator(task_id="a")
                BaseOperator(task_id="a")
            """,
            "twice.py",
        )
        done = self.python("-m", "liteflow", "run", "twice.py")
        self.assertEqual(done.returncode, 2)
        self.assertIn(f'File "{os.path.realpath(path)}", line 5', done.stderr)
        self.assertIn("DuplicateTaskIdFound: ", done.stderr)

    def test_names_that_fit_by_chance_are_refused(self):
        self.ran(run_id="first-run")
        for name in ("", "night/", "r", "irs", "x"):
            for command in ("delete", "show", "stop"):
                done = self.cli(command, name)
                self.assertEqual(done.returncode, 2, (command, name))
        for words in (
            ["show", "night", "double[9]"],
            ["logs", "night", "double[9]"],
            ["logs", "night", "bad", "--try", "9"],
            ["runs", "--limit", "-1"],
            ["show", "night", "bad", "--state", "failed"],
        ):
            self.assertEqual(self.cli(*words).returncode, 2, words)
        told = self.cli("logs", "night", "bad", "--try", "9").stderr
        self.assertIn("no attempt 9 of bad in run 'first-run'", told)
        self.assertIn("first-run", self.seen("show", "irst-ru"))
        self.ran(run_id="night/first-run")  # whose own name is `night/night/first-run`
        self.assertIn("night/first-run: ", self.seen("show", "night/first-run"))

    def test_a_long_line_of_output_is_cut_where_the_last_are_shown(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("long") as dag:
                @task
                def f(): print("x" * 1_000_000); print("end"); raise ValueError
                f()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.assertLess(len(self.python("my_flow.py").stderr), 3_000)
        self.assertLess(len(self.seen("show", "long", "f")), 3_000)
        self.seen("visualize", "long", "--output", "run.md")
        self.assertLess((self.folder / "run.md").stat().st_size, 5_000)

    def test_a_dead_schedulers_tasks_are_not_shown_as_running(self):
        process = self.started_and_waiting()
        process.kill()
        process.wait()
        self.assertRegex(self.seen("show", "night"), r"waits +interrupted")
        self.assertIn("waits", self.seen("show", "night", "--state", "interrupted"))
        self.assertNotIn("good", self.seen("show", "night", "--state", "interrupted"))
        self.assertIn("waits", self.seen("show", "night", "--state", "none"))
        self.assertIn("aits interrupted :crit", self.seen("visualize", "night", "--gantt"))
        self.assertNotIn("running", self.seen("visualize", "night"))
        found = json.loads(self.seen("show", "night", "--json"))
        self.assertEqual((found["state"], found["owner_alive"]), ("running (owner dead)", False))
        done = self.cli("stop", "night")
        self.assertIn("is not running: its scheduler died; resume it", done.stderr)
        self.assertEqual(done.returncode, 2)
        self.seen("clear", "night", "good")  # with the run, all that ran has ended
        self.assertIsNone(self.states(Dag("night").runs(self.db)[0])["waits"])
        told = self.cli("clear", "night", "waits").stderr
        self.assertRegex(told, "cleared in run 'manual__.*': waits; a resume runs that again, with")
        run = Dag("night").runs(self.db)[0]
        states = self.states(run)
        self.assertEqual((run.state, states["good"], states["waits"]), ("queued", None, None))
        # What follows from it is decided by the resume; what was cleared is not shown as cut off.
        self.assertLessEqual(set(states.values()), {None, "success", "failed"})
        self.assertNotRegex(self.seen("show", "night"), r"(good|waits) +interrupted")
        [attempt] = json.loads(self.seen("show", "night", "waits", "--json"))["attempts"]
        self.assertEqual(attempt["state"], "interrupted")  # that stays how this attempt ended

    def test_descriptors_that_a_daemon_has_closed(self):
        # What a task starts finds them open, too: a command that can't print fails.
        heard = 'os.system("echo so && echo so >&2 && cat") and sys.exit(3)'
        self.script(self.FLOW.replace('print("good says so")', heard))
        started = {}
        for closed in ("<&- >&-", "<&- 2>&-", "<&- >&- 2>&-", "2>&-"):
            run_id, script = f"r{len(closed)}", f"{sys.executable} my_flow.py --run-id"
            ran, again = (f"{script} {run_id} {more} {closed}" for more in ("", "--task good >&2"))
            started[run_id] = subprocess.Popen(
                f"{ran}; [ $? = 1 ] && {again}",
                shell=True, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        for run_id, process in started.items():
            self.assertEqual(process.communicate(timeout=LIMIT)[0], b"")
            run = Dag("night").get_run(run_id, self.db)
            self.assertEqual((process.returncode, self.states(run)["good"]), (0, "success"))

    def test_output_that_can_not_be_written_is_one_sentence(self):
        self.ran()
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                done = self.cli("show", "night", stdout=full, env=BUFFERED)
            why = "liteflow: error: the output can't be written: No space left on device\n"
            self.assertEqual((done.returncode, done.stderr), (1, why))
            path = self.script("print('at import')\n" + textwrap.dedent(self.FLOW))
            with open("/dev/full", "w") as full:
                done = self.python(
                    path.name, "--quiet", "--db", "full.db", stdout=full, env=BUFFERED
                )
            self.assertEqual(done.stderr.count("the output can't be written"), 1, done.stderr)
            self.assertIn("bad", self.cli("runs", "--db", "full.db", "--json").stdout)
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        self.script(self.FLOW.replace("good says so", "gut: schön"))
        self.ran()
        self.assertIn("sch\\xf6n", self.cli("logs", "night", env=env).stdout)

    def test_one_task_again(self):
        self.ran(run_id="night")
        before = self.db.read_bytes()
        done = self.python("my_flow.py", "--task", "double[1]", "--run-id", "night")
        self.assertEqual((done.returncode, done.stdout), (0, "double[1] returned 4\n"))
        done = self.script_here("--task", "good")
        self.assertEqual(done.stdout, "good says so\ngood returned [1, 2, 3]\n")
        done = self.cli("run", "my_flow.py", "--task", "bad")
        self.assertEqual(done.returncode, 1)
        self.assertIn("Traceback", done.stderr)
        self.assertIn("ValueError: no luck\nat all", done.stderr)
        self.assertEqual(self.db.read_bytes(), before)
        for words in (
            ["--task", "bda"],
            ["--task", "good", "--run-id", "x"],
            ["--task", "good", "--run-id", ""],
            ["--task", "good", "--graph"],
            ["--task", "good", "--conf", "{}"],
        ):
            done = self.script_here(*words)
            self.assertEqual(done.returncode, 2)
            self.assertNotIn("Traceback", done.stderr)
        done = self.script_here("--task", "double[9]")
        self.assertIn("task 'double' of run 'night' has no index 9", done.stderr)
        self.script(self.FLOW.replace("raise ValueError(", "raise OSError("))
        done = self.cli("run", "my_flow.py", "--task", "bad")
        self.assertIn("OSError: no luck\nat all", done.stderr)
        self.assertIn("Traceback", done.stderr)

    def test_one_task_again_that_skips_or_has_no_input(self):
        self.script(
            """
            from liteflow import *
            with DAG("flow") as dag:
                @task(execution_timeout=9)
                def skips(): raise AirflowSkipException("not today")
                @task
                def quiet(): raise AirflowSkipException
                @task
                def each(x): pass
                @task
                def bad(): raise ValueError
                @task(trigger_rule="all_done")
                def takes(x): return x
                @task
                def gives(): return lambda: None
                skips(); quiet(); each.expand(x=[]); takes(bad()); gives()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.ran()
        done = self.script_here("--task", "skips")
        self.assertEqual((done.returncode, done.stdout), (0, "skips skipped: not today\n"))
        self.assertEqual(self.script_here("--task", "quiet").stdout, "quiet skipped\n")
        refused = self.script_here("--task", "each")
        self.assertEqual(refused.returncode, 2)
        self.assertRegex(refused.stderr, "task 'each' of run '.*' has no instances\n")
        self.assertIn("the execution_timeout of 'skips' does not apply here", done.stderr)
        done = self.script_here("--task", "takes")
        self.assertEqual(done.returncode, 2)
        self.assertIn("task 'bad', whose result 'takes' takes, is failed", done.stderr)
        done = self.python("my_flow.py", "--task", "gives")
        self.assertEqual((done.returncode, done.stdout), (1, ""))

    def test_a_report_of_one_failure_has_room_for_the_end_of_its_output(self):
        run = self.run_flow(
            """
            with DAG("d") as dag:
                @task
                def f():
                    print(*range(9), sep=chr(10))
                    raise ValueError("no luck")
                f()
            """
        )
        with mock.patch.object(liteflow, "_REPORT_ROWS", 20):
            report = liteflow._report_of(run, run._instances())
        self.assertEqual([x for x in report if "|" in x], [f"    | {i}" for i in range(9)])

    def test_errors_stand_in_the_order_of_their_instances(self):
        self.run_flow(
            """
            with DAG("d") as dag:
                @task
                def f(x): raise ValueError(x)
                f.expand(x=["p", "q", "p"])
            """
        )
        shown = self.cli_here("show", "d", "f", "--db", self.db).stdout
        self.assertEqual(re.findall(r"^ValueError: (\w)$", shown, re.MULTILINE), ["p", "q"])
        [told] = json.loads(self.cli_here("runs", "--db", self.db, "--json").stdout)
        reasons = [x["reason"].removeprefix("ValueError: ") for x in told["errors"]]
        self.assertEqual(reasons, ["p", "q", "p"])

    def test_one_task_again_takes_an_element_that_is_too_large_to_travel_with_a_job(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("flow") as dag:
                @task
                def files(): return ["x" * 100_000, "y"]
                @task
                def size(text): return len(text)
                size.expand(text=files())
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.ran()
        done = self.script_here("--task", "size[0]")
        self.assertEqual((done.stdout, done.returncode), ("size[0] returned 100000\n", 0))

    def test_one_task_again_beside_a_branch_whose_choice_has_gone_from_the_code(self):
        source = """
            from liteflow import DAG, task
            with DAG("flow") as dag:
                @task.branch
                def choose(): return "old"
                @task
                def other(): return 7
                choose() >> task(task_id="old")(other.function)()
                other()
            if __name__ == "__main__":
                dag.cli()
        """
        self.script(source)
        self.ran()
        self.script(source.replace('"old"', '"new"'))
        done = self.script_here("--task", "other")
        self.assertEqual((done.stdout, done.returncode), ("other returned 7\n", 0), done.stderr)

    def test_a_sensor_that_gives_its_worker_back_is_poked_once(self):
        self.script(
            """
            from liteflow import DAG, task
            with DAG("night") as dag:
                @task.sensor(mode="reschedule", poke_interval=0.2, timeout=0.1)
                def there(): return False
                there()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.ran()
        done = self.script_here("--task", "there")
        told = "there waits: it would poke again after 0.2 s\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, told, ""))

    def test_the_tries_of_a_task_are_told_apart(self):
        self.ran()
        heads = re.findall("^--- .*", self.seen("logs", "night", "bad"), re.MULTILINE)
        self.assertEqual(heads, ["--- bad, try 1", "--- bad, try 2"])
        self.assertNotIn("---", self.seen("logs", "night", "bad", "--try", "1"))

    def test_a_dag_of_another_file_is_noted(self):
        self.ran(run_id="r1")
        (self.folder / "copy.py").write_text((self.folder / "my_flow.py").read_text())
        note = (
            f"note: DAG 'night' was that of {os.path.realpath(self.folder / 'my_flow.py')} so far"
        )
        self.assertIn(note, self.python("copy.py", "--resume").stderr)
        self.assertNotIn("note: DAG", self.python("my_flow.py", "--resume").stderr)

    def test_a_progress_bar_is_what_it_last_showed_and_logs_stand_in_time_s_order(self):
        self.script(
            r"""
            from liteflow import DAG, task
            import sys, time
            with DAG("bars") as dag:
                @task
                def last(): print("last")
                @task
                def bar():
                    for n in range(4): print(f"\r{n}/3 \x1b[K", end="", file=sys.stderr, flush=True)
                    print("\n1/2\n\r1/9\x1b[A\n\r9/9\x1b[A\r2/2\nwindows\r\nhalf", end="")
                bar() >> last()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.ran()
        self.assertEqual(
            self.seen("logs", "bars"),
            "--- bar, try 1\n3/3 \\x1b[K\n1/2\n2/2\nwindows\nhalf\n--- last, try 1\nlast\n",
        )
        self.assertIn("\r1/3 \x1b[K\r2/3", self.cli("logs", "bars", "--raw").stdout)
        self.assertIn(
            "    | 3/3 \\x1b[K\n    | 1/2\n    | 2/2\n    | windows\n    | half\n",
            self.seen("show", "bars", "bar"),
        )

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_ids_are_short_on_a_terminal_and_runs_are_found_by_local_time(self):
        self.ran()
        self.ran(run_id="mine")
        whole = self.seen("runs", "night")
        [made] = re.findall(r"night/(manual__\S+)", whole)
        short = self.on_terminal("-m", "liteflow", "runs", NO_COLOR="1")
        self.assertNotIn(made, short)
        [name] = re.findall(r"night/(\d{6})  ", short)
        self.assertIn("night/mine  ", short)
        self.assertIn(made, self.seen("show", f"night/{name}"))
        start = Dag("night").get_run(made, self.db).start_date
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            at = start - datetime.timedelta(days=3)
            db.execute("UPDATE dag_run SET start_date = ? WHERE run_id = 'mine'", (at.isoformat(),))
        tokyo = {**os.environ, "TZ": "Asia/Tokyo"}
        local = at.astimezone(datetime.timezone(datetime.timedelta(hours=9)))
        done = self.cli("show", f"{local:%Y-%m-%d %H:%M}", env=tokyo)
        self.assertIn("night/mine", done.stdout, done.stderr)

    def test_options_that_would_be_ignored_are_refused(self):
        self.ran()
        for words in (
            ["--quiet", "--logs"],
            ["--graph", "--from", "bad"],
            ["--graph", "--resume"],
            ["visualize", "night", "--gantt", "--direction", "LR"],
        ):
            done = (self.script_here if words[0][0] == "-" else self.cli_here)(*words)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)
            self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_every_command_has_help_with_examples_on_one_screen(self):
        commands = re.findall(r"^(\w+): ", liteflow._COMMANDS, re.M)
        self.assertEqual(len(commands), 13)
        self.enterContext(mock.patch.dict(os.environ, COLUMNS="80"))
        for command in commands:
            done = self.cli(command, "--help")
            self.assertEqual(done.returncode, 0)
            self.assertIn(f"examples:\n  python3 -m liteflow {command}", done.stdout)
            self.assertLessEqual(len(done.stdout.splitlines()), 50, command)


class FailureTest(ScriptCase):
    """What failed is told alike wherever people look, in few rows, with commands to be pasted."""

    FLOW = """
        from pathlib import Path
        from liteflow import DAG, task
        def tell(context): raise RuntimeError("the mail server is away")
        with DAG("two") as dag:
            @task(retries=1, on_failure_callback=None)
            def load(path):
                print("opening", path)
                if not Path(path).exists():
                    error = ValueError("bad file")
                    error.add_note("row 7")
                    raise error
                return 1
            @task
            def total(numbers): return sum(numbers)
            total(load.expand(path=["my_flow.py", "b c.csv"]))
        if __name__ == "__main__":
            dag.cli()
    """

    def rows(self, lines):
        """How many rows of 80 columns: of a command, however long, one."""
        commands = ("    more: ", "to go on once it is mended: ")
        lines = [x.replace(str(self.folder), "/tmp/here") for x in lines]
        return sum(1 if x.startswith(commands) else 1 + (len(x) - 1) // 80 for x in lines)

    def pasted(self, line, shell="sh"):
        """Run the command behind a line's first colon, in another folder."""
        command = line.partition(": ")[2]
        return subprocess.run(
            [shell, "-c", command], cwd="/", capture_output=True, text=True, timeout=LIMIT
        )

    def test_the_report_is_the_same_everywhere_and_short(self):
        aloud = self.start("my_flow.py", "--db", "aloud.db")
        told = self.python("my_flow.py", "--quiet").stderr.splitlines()
        self.assertLessEqual(self.rows(told), 8, told)
        self.assertEqual(told[1], "load[1] 'b c.csv' failed, try 2 of 2: ValueError: bad file")
        self.assertEqual(told[2], "    row 7")
        self.assertRegex(told[3], r"^    .*my_flow.py:\d+, in load: +raise error$")
        self.assertEqual(told[4:6], ["    | opening b c.csv", "    not run for it: total"])
        self.assertIn(" show two/", told[6])
        shown = self.cli_here("show", "two").stdout.splitlines()
        at = shown.index(told[1])
        self.assertEqual(
            [x.partition(": ")[0] for x in shown[at:]], [x.partition(": ")[0] for x in told[1:]]
        )
        self.assertEqual(shown[at : at + 5], told[1:6])
        aloud = aloud.communicate(timeout=LIMIT)[1].splitlines()
        self.assertEqual(aloud[aloud.index(told[1]) :][:5], told[1:6])
        page = self.cli_here("page", "two").stdout
        for line in told[1:6]:
            self.assertIn(html.escape(line.strip().removeprefix("| ")), page)

    def test_its_commands_can_be_pasted_anywhere(self):

        def goes_on(text):
            *_, more, go_on = text.splitlines()
            self.assertIn("'load[1]'", more)  # zsh would take it for a pattern
            self.assertIn("bad file", self.pasted(more).stdout)
            done = self.pasted(go_on)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, r"load\[1\] 'b c.csv' failed, try (4 of 4|6 of 6)")
            return go_on

        def from_elsewhere():
            there = (sys.executable, "../liteflow.py", "run", "../my_flow.py", "-q")
            done = subprocess.run(there, cwd=other, capture_output=True, text=True)
            self.assertIn("load[1]", self.pasted(done.stderr.splitlines()[-1]).stderr)

        (other := self.folder / "other").mkdir()
        profiled = ("-m", "cProfile", "-o", "profile", "my_flow.py", "-q")
        with concurrent.futures.ThreadPoolExecutor() as threads:
            dashed = ("my_flow.py", "-q", "--run-id=-token_urlsafe")
            done = threads.map(lambda words: self.python(*words), [profiled, dashed])
            [*threads.map(goes_on, [each.stderr for each in done])]
            elsewhere = threads.submit(from_elsewhere)
            go_on = goes_on(self.cli_here("show", "two").stdout)
        elsewhere.result()
        (self.folder / "b c.csv").touch()  # in the run's folder, which is not that of the paste
        self.assertEqual(self.pasted(go_on).returncode, 0)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere names are Unicode")
    def test_they_can_be_pasted_where_a_folder_has_a_name_that_can_t_be_shown(self):
        odd = self.folder / os.fsdecode(b"caf\xe9's\n\x1b[31m \\1\xe2\x80\xae")
        odd.mkdir()
        copy_liteflow(odd)
        script = shutil.copy(self.folder / "my_flow.py", odd)
        done = self.python(script, "-q", "--db", odd / "its.db")
        *_, more, go_on = done.stderr.splitlines()
        self.assertTrue((more + go_on).isprintable())
        self.assertEqual(liteflow._quoted("a\tb"), r"$'a\011b'")  # it is copied as blanks
        self.assertIn("bad file", self.pasted(more, "bash").stdout)
        (self.folder / "b c.csv").touch()
        done = self.pasted(go_on, "bash")
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_the_interpreter_is_named_where_python3_is_another(self):
        own, beside = str(self.folder / "python3.98"), self.folder / "python3"
        for newest, found, terminal, said in (
            ("python3.98", beside, True, "python3"),
            ("python3.98", "/elsewhere/python3", True, own),
            ("python3.98", None, True, own),
            ("python3.98", beside, False, own),  # a mail is read where it may be another
            ("python3.99", beside, True, own),  # of several versions in one folder
        ):
            beside.unlink(missing_ok=True)
            beside.symlink_to(newest)
            with (
                mock.patch.object(sys, "executable", own),
                mock.patch("shutil.which", lambda name, found=found: found and str(found)),
                mock.patch.object(liteflow, "_may_redraw", lambda stream, yes=terminal: yes),
            ):
                self.assertEqual(liteflow._python(), said)
        with mock.patch.object(sys, "executable", None):  # inside of another program
            self.assertEqual(liteflow._python(), "python3")

    def test_what_failed_alike_is_folded(self):
        run = self.run_flow(
            """
            with DAG("alike") as dag:
                @task
                def f(i):
                    if i > 9: raise ValueError("too large" if i % 2 else f"{i} is even")
                @task
                def g(): raise KeyError("g")
                f.expand(i=list(range(40))); g()
            """
        )
        lines = liteflow._report_of(run, liteflow._seen_instances(run))
        heads = [line for line in lines if re.match(r"\w+(\[\d+\] \(\d+\))? failed", line)]
        self.assertEqual(len(heads), 4, lines)
        said = (
            r"    \d\d more failed(, for other reasons, too)?: f\[\d+\] \(\d+\), .* and \d+ more$"
        )
        # Which reason came third, and so took the others in, is a matter of luck.
        self.assertIn(sum(bool(re.match(said, line)) for line in lines), (1, 2), lines)
        self.assertIn(", for other reasons, too: ", " ".join(lines))
        self.assertLess(len(lines), 25)

    def test_a_callback_that_failed_is_told_apart(self):
        script = self.folder / "my_flow.py"
        script.write_text(script.read_text().replace("_callback=None", "_callback=tell"))
        text = self.python("my_flow.py", "-q").stderr
        said = "on_failure_callback of task 'load' failed: RuntimeError: the mail server is away ("
        self.assertIn(f"\n{said}", text)
        self.assertRegex(text, r"is away \(/.*/my_flow.py:\d+, in tell: def tell\(context\)")
        self.assertIn("    | opening b c.csv\n    not run for it: total\n    more", text)
        self.assertNotIn("Traceback", text)
        self.assertIn(said, self.cli_here("page", "two").stdout.replace("&#x27;", "'"))

    def test_what_a_task_printed_is_told_beside_callbacks_that_failed(self):
        """That of its begin comes before it, and that of its end may come behind an open line."""
        run = self.run_flow(
            """
            from liteflow import DAG, task
            def tell(context): raise RuntimeError("no mail")
            with DAG("flow") as dag:
                @task(on_execute_callback=tell, on_failure_callback=tell)
                def bad():
                    print("row 1\\nrow 2", end="")
                    raise ValueError
                bad()
            """
        )
        report = "\n".join(liteflow._report_of(run, run.get_task_instances()))
        self.assertIn("    | row 1\n    | row 2\n    more: ", report)
        self.assertRegex(report, "\non_failure_callback of .*\non_execute_callback of ")

    def test_callbacks_that_failed_in_many_ways_are_told_in_part(self):
        script = self.folder / "my_flow.py"
        tell = ", ".join(f"lambda context: {{}}[{i}]" for i in range(5))
        script.write_text(script.read_text().replace("_callback=None", f"_callback=[{tell}]"))
        text = self.python("my_flow.py", "-q").stderr
        self.assertIn("KeyError: 2 (", text)
        self.assertIn("other callbacks failed, too: the logs tell", text)

    def test_a_success_tells_of_a_callback_of_the_dag_that_failed(self):
        script = self.folder / "my_flow.py"
        text = script.read_text().replace('DAG("two")', 'DAG("two", on_success_callback=tell)')
        script.write_text(text.replace('"b c.csv"', ""))
        done = self.python("my_flow.py")
        self.assertEqual(done.returncode, 0, done.stderr)
        last = done.stderr.splitlines()[-1]
        self.assertIn("on_success_callback of DAG 'two' failed: RuntimeError", last)
        # Of a success --quiet says nothing else: nobody would hear of the run that it was about.
        [line] = self.python("my_flow.py", "--quiet").stderr.splitlines()
        self.assertRegex(line, "^two/.*: on_success_callback of DAG 'two' failed: RuntimeError")
        self.assertEqual(self.python("my_flow.py", "--quiet", "--resume").stderr, "")

    def test_a_mapped_instance_is_called_as_its_template_says(self):
        """Jinja need not be there: what stands for it knows one form."""
        fake = """
            import re
            class StrictUndefined: pass
            class Environment:
                def __init__(self, **options): self.filters, self.globals = {}, {}
                def from_string(self, text): self.text = text; return self
                def render(self, context):
                    return re.sub(r"{{ (\\w+) }}", lambda m: str(context[m[1]]), self.text)
        """
        self.script(fake, "jinja2.py")
        script = self.folder / "my_flow.py"
        flow = script.read_text().replace(
            "retries=1", "map_index_template='{{ name }} of {{ ds }}'"
        )
        named = 'from liteflow import get_current_context as c; c()["name"] = path.upper()'
        script.write_text(flow.replace('print("opening", path)', named))
        for words in (["--logical-date", "2026-01-02"], ["--resume"]):  # what is kept has it still
            done = self.python("my_flow.py", "-q", *words)
            self.assertIn("load[1] (B C.CSV of 2026-01-02) failed", done.stderr)
            [run] = Dag("two").runs(self.db)[:1]
            names = [ti.element for ti in run.get_task_instances() if ti.task_id == "load"]
            self.assertEqual(names, ["MY_FLOW.PY of 2026-01-02", "B C.CSV of 2026-01-02"])

    def told_of(self, body):
        """What the report says of a task with this body."""
        body = textwrap.indent(textwrap.dedent(body), " " * 20).lstrip()
        run = self.run_flow(
            f"""
            import json
            class Mine(Exception): pass
            Mine.__module__ = "a.library"
            with DAG("told") as dag:
                @task(execution_timeout=0.5)
                def bad():
                    {body}
                bad()
            """
        )
        lines = [
            line
            for line in liteflow._report_of(run, liteflow._seen_instances(run))
            if " show told/" not in line
        ]
        file = re.escape(f"{self.folder}/flow_") + r"\w+\.py:\d+"
        return run, [re.sub(file, "FILE", line) for line in lines[:-1]]

    def test_every_kind_of_failure_tells_its_reason_and_its_place(self):
        group = """
            errors = []
            for i in range(3):
                try: raise ValueError(f"bad {i}")
                except ValueError as error: errors.append(error)
            errors[1].add_note("noted")
            raise ExceptionGroup("some", errors)
            """
        cause = """
            try: json.loads("{")
            except ValueError as error: raise RuntimeError("no config") from error
            """
        lines = r"""
            try: raise OSError("no table\n[SQL: SELECT]\n(Background: ...)")
            except OSError as error: raise RuntimeError("no rows") from error
            """
        again = """
            try: raise ValueError("same")
            except ValueError as error: raise ValueError("same") from error
            """
        split = """
            try: assert not "enough", (
                "too few")
            except AssertionError as error: raise ValueError("wrong") from error
            """
        remote = """
            from concurrent.futures import process
            try: raise ValueError("far")
            except ValueError as error: sent = process._ExceptionWithTraceback(error, error.__traceback__)
            rebuild, parts = sent.__reduce__(); raise rebuild(*parts)
            """
        notes = 'e = Mine("m"); e.add_note("n1"); e.add_note("n2"); e.add_note("n3"); raise e'
        near = """
            value = 1
            try: return valeu
            except NameError as e: e.add_note("n1"); raise
            """
        no_value = """
            class C:
                def __reduce__(self): e = OSError("no"); e.add_note("n1"); raise e
            return C()
            """  # as pickle does since Python 3.14: `when serializing list item 3`
        hint = "" if sys.version_info < (3, 12) else ". Did you mean: 'value'?"
        undefined = "NameError: name 'valeu' is not defined"
        child = (
            r"""raise OSError('child:\n  File "/x.py", line 3, in z\n    foo\nNameError: foo')"""
        )
        for body, *told in (
            (notes, "a.library.Mine: m", "n1", "n2", "...", "FILE, in bad: e = Mine(*"),
            (no_value, "TypeError: returned C, which cannot be pickled: OSError: no", "n1"),
            (near, undefined, "n1", "FILE, in bad: try: return valeu"),
            ("value = 1; valeu", undefined + hint, "FILE, in bad: value = 1; valeu"),
            (child, "OSError: child:", '  File "/x.py"*', "    foo", "...", "FILE, in bad: *"),
            (
                cause,
                "RuntimeError: no config",
                "caused by json.decoder.*",
                "FILE, in bad: except *",
            ),
            (
                lines,
                "RuntimeError: no rows",
                "caused by OSError: no table (FILE, in bad: try: *",
                "FILE, in bad: except *",
            ),
            (
                again,
                "ValueError: same",
                "caused by ValueError: same (FILE, in bad: try: *",
                "FILE, in bad: except *",
            ),
            (
                split,
                "ValueError: wrong",
                'caused by AssertionError: too few (FILE, in bad: try: assert not "enough", ()',
                "FILE, in bad: except *",
            ),
            (
                remote,
                "ValueError: far",
                "caused by ValueError: far (FILE, in bad: try: *",
                "FILE, in bad: rebuild*",
            ),
            (
                group,
                "ExceptionGroup: some (3 sub-exceptions)",
                "1 of 3: ValueError: bad 0 (FILE, in bad: try: *",
                "2 of 3: ValueError: bad 1 (FILE, in bad: try: *",
                "FILE, in bad: raise ExceptionGroup(*",
            ),
            (r'raise OSError("10%\r20%")', r"OSError: 10%\r20%", "FILE, in bad: raise *"),
            ('raise OSError("z" * 2_000_000)', "OSError: zzz*...", "FILE, in bad: raise *"),
            ("raise ValueError", "ValueError", "FILE, in bad: raise ValueError"),
            ('exec("1/0")', "ZeroDivisionError: division by zero", "FILE, in bad: exec(*"),
            ('json.loads("{")', "json.decoder.JSONDecodeError: *", "FILE, in bad: json.loads(*"),
            ("time.sleep(100)", "timeout after 0.5 s", "FILE, in bad: time.sleep(100)"),
        ):
            with self.subTest(body=body):
                run, lines = self.told_of(body)
                self.assertEqual(len(lines), len(told), lines)
                for line, wanted in zip(lines, [f"bad failed: {told[0]}", *told[1:]], strict=True):
                    form = ".*".join(map(re.escape, wanted.split("*")))
                    self.assertRegex(line, f"^( {{4}})?{form}$")
                self.assertLess(max(map(len, lines)), 500)
                error = liteflow._said_once(run.get_task_instance("bad").error)
                last = liteflow._last_line(run.get_task_instance("bad").error)
                self.assertLessEqual(error.count(f"\n{last}\n"), 1)

    def test_the_libraries_of_another_python_are_none_of_the_user_s(self):
        """Who looks may have another interpreter than the run."""
        frames = [("/srv/etl/flow.py", "json.loads(text)")]
        frames += [
            (f"{folder}/decoder.py", "return parse(text)")
            for folder in (
                "/usr/lib/python3.99/json",
                "/opt/venv/lib/python3.99/site-packages/pandas",
                "/usr/lib/python3/dist-packages/yaml",
                "/usr/lib64/python3.99/json",
                "/usr/local/lib/python3.99t/json",  # of a free-threaded build
            )
        ]
        lines = [f'  File "{path}", line 7, in load\n    {line}\n' for path, line in frames]
        for path in ("pandas/_libs/parsers.pyx", "pyarrow/error.pxi", "src/gevent/_greenlet.pxd"):
            lines.append(f'  File "{path}", line 7, in pandas.load\n')  # Cython's: no such file
        error = f"Traceback (most recent call last):\n{''.join(lines)}ValueError: no"
        place = "/srv/etl/flow.py:7, in load: json.loads(text)"
        self.assertEqual(liteflow._place_of(error), place)

    def test_a_value_of_several_lines_stands_in_one(self):
        """A frame of pandas, or a matrix."""
        self.run_flow(
            """
            class Frame:
                def __repr__(self): return "   k\\n\\n\\n0  1"
            with DAG("frames") as dag:
                @task
                def some(): return [Frame()]
                @task
                def bad(frame): raise ValueError("empty")
                @task
                def one(): return Frame()
                bad.expand(frame=some())
                bad.expand(frame=one())
            """
        )
        said = self.cli_here("show", "frames", "--db", self.db).stdout
        self.assertIn("\nbad[0] (k 0  1) failed: ValueError: empty\n", said)
        why = "others expand over the result of task 'one', which returned no list, tuple or dict: "
        self.assertIn(f"\none failed: liteflow.UnmappableXComTypePushed: {why}", said)

    def test_a_line_of_ours_is_none_of_the_user_s(self):
        error = """Traceback (most recent call last):
  File "<frozen codecs>", line 319, in decode
  File "/srv/etl/liteflow.py", line 7, in _on_term
    self._raise_end()
liteflow.AirflowTaskTimeout: timeout after 1 s
timeout after 1 s"""  # of a command whose output was waited for
        self.assertEqual(liteflow._place_of(error), "")

    def test_a_command_that_failed_is_named(self):
        run = self.run_flow(
            """
            with DAG("commands") as dag:
                @task.bash
                def dump(): return "pg_dump_is_missing orders\\necho second"
                @task.bash
                def killed(): return "kill -9 $$"
                @task.bash
                def ends(): return "exit 3"
                @task.bash
                def script(): return "set -e\\ncd .\\nfalse"
                @task.bash
                def line(): return "set -e; ls ./missing"
                dump() >> killed(); ends(); script(); line()
            """
        )
        told = " ".join(liteflow._report_of(run, liteflow._seen_instances(run)))
        self.assertIn(
            "ends failed: liteflow.AirflowException: the command ended with exit code 3: exit 3",
            told,
        )
        self.assertEqual(self.states(run)["dump"], "success")  # as in bash: its last command counts
        self.assertIn("the command was killed by SIGKILL: kill -9 $$", told)
        self.assertIn("the command ended with exit code 1: cd . [...]", told)
        self.assertIn("the command ended with exit code 2: set -e; ls ./missing", told)

    def test_a_line_without_an_end_is_kept(self):
        run = self.run_flow(
            r"""
            with DAG("unfinished") as dag:
                @task.bash(execution_timeout=0.5)
                def asks(): return "echo one; printf 'Password: '; sleep 20"
                @task.bash
                def last(): return "printf 'a\\nb \\r\\n'; printf 'c  '"
                @task.bash
                def blank(): return "printf 'a\\n\\n'"
                asks(); last(); blank()
            """
        )
        self.assertEqual(run.log("asks"), "one\nPassword: ")
        self.assertEqual((run.xcom_pull("last"), run.xcom_pull("blank")), ("c", ""))
        self.assertEqual(run.log("last"), "a\nb \r\nc  ")

    def test_what_no_file_defines_goes_on_in_python_and_in_no_debugger(self):
        with DAG("typed_in") as dag:
            liteflow.BashOperator(task_id="f", bash_command="exit 1")
        dag.fileloc = None
        with contextlib.redirect_stderr(io.StringIO()):
            run_id = dag.test(db_path=self.db).run_id
        told = self.cli_here("show", "typed_in", "f").stdout
        self.assertIn(f"mended: dag.run(run_id={run_id!r}, resume=True), in Python\n", told)
        self.assertNotIn("debugger", told)

    def test_a_long_chain_below_a_failure_is_followed_at_once(self):
        chain = [liteflow.TaskInstance("chain", "r", f"t{i}") for i in range(10_000)]
        for above, ti in itertools.pairwise(chain):
            ti.state, ti.upstream_task_ids = TaskInstanceState.UPSTREAM_FAILED, {above.task_id}
        began = time.process_time()
        self.assertEqual(len(liteflow._left_out("t0", chain)), 9_999)
        self.assertLess(time.process_time() - began, 1)

    def test_all_that_failed_is_named_and_only_what_did_not_run(self):
        run = self.run_flow(
            """
            from liteflow import TaskGroup, task_group
            with DAG("many") as dag:
                @task
                def f(): raise OSError("no")
                for i in range(12): f()
                @task_group
                def each(x):
                    @task
                    def one(x):
                        if x == 1: raise OSError("one")
                    @task
                    def two(): pass
                    one(x) >> two()
                each.expand(x=[0, 1, 2])
            """
        )
        told = liteflow._report_of(run, liteflow._seen_instances(run))
        rest = [ti._label for ti in run.get_task_instances("failed")]
        heads = [
            line.split()[0] for line in told if re.match(r"\S+ (\(\d\) )?failed: OSError", line)
        ]
        [line] = [line for line in told if line.startswith("failed, too: ")]
        self.assertEqual({*heads, *line[13:].split(", ")}, set(rest))
        page = liteflow._failure_sections(run, run.get_task_instances(), 3)
        self.assertIn("failed, too: ", "".join(page))
        whole = liteflow._failures_of(run, run.get_task_instances(), 20)
        [follows] = [x.follows for x in whole if x.ti.task_id == "each.one"]
        self.assertEqual(follows, ["not run for it: each.two[1]"])

    def test_what_skips_itself_is_not_cut_off_whatever_it_raises(self):
        run = self.run_flow(
            """
            from liteflow import AirflowSkipException
            class NotToday(AirflowSkipException): pass
            with DAG("skips") as dag:
                @task
                def f(): raise NotToday("a holiday")
                f()
            """
        )
        self.assertEqual(self.states(run), {"f": "skipped"})
        self.assertEqual(liteflow._report_of(run, liteflow._seen_instances(run)), [])

    def test_what_a_resume_skips_is_not_cut_off_by_its_earlier_failure(self):
        self.script(
            """
            import os
            from liteflow import DAG, task
            with DAG("chosen") as dag:
                @task.branch
                def choose(): return "other" if os.path.exists("other") else "bad"
                @task
                def bad(): raise ValueError("no")
                @task
                def other(): pass
                choose() >> [bad(), other()]
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.assertEqual(self.ran().state, "failed")
        (self.folder / "other").touch()
        done = self.python("my_flow.py", "--from", "choose")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("cut off", done.stderr)

    def test_what_was_cut_off_is_named(self):
        self.script(
            """
            import time
            from liteflow import DAG, task
            with DAG("cut", dagrun_timeout=2) as dag:
                @task
                def fetch(url):
                    if url == "b":
                        open("going", "w").close()
                        time.sleep(60)
                @task(retries=3, retry_delay=60)
                def flaky(): raise OSError("flaky net")
                fetch.expand(url=["a", "b"]); flaky()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        late = self.start("my_flow.py", "-q", "--max-workers", "2")
        self.assertTrue(wait_until((self.folder / "going").exists))
        (self.folder / "going").unlink()
        source = (self.folder / "my_flow.py").read_text().replace("dagrun_timeout=2", "")
        self.script(source, "stopped.py")
        run = self.start("stopped.py", "-q", "--db", "stopped.db")
        self.assertTrue(wait_until((self.folder / "going").exists))
        run.send_signal(signal.SIGTERM)
        _, text = run.communicate(timeout=LIMIT)
        self.assertEqual(run.returncode, 143)
        first, cut, go_on = text.splitlines()
        self.assertRegex(first, "^run manual__.* of DAG 'cut' failed: stopped by SIGTERM$")
        self.assertRegex(cut, "^cut off: .*fetch\\[1\\] 'b'")
        self.assertRegex(go_on, "^to go on: ")
        text = late.communicate(timeout=LIMIT)[1]
        self.assertIn("failed: dagrun_timeout\n", text)
        self.assertIn(
            "\ncut off: fetch[1] 'b' (ended by dagrun_timeout), flaky (OSError: flaky net)\n", text
        )

    def test_it_goes_on_as_it_was_started(self):
        """With its pools, as a module of a package, by its own interpreter, wherever one looks."""
        package = self.folder / "app"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "names.py").write_text("NAME = 'b c.csv'\n")
        flow = (self.folder / "my_flow.py").read_text()
        flow = flow.replace("from pathlib", "from .names import NAME\nfrom pathlib")
        (package / "flow.py").write_text(flow.replace("@task(retries", "@task(pool='gpu', retries"))
        done = self.python("-m", "app.flow", "-q", "--pool", "gpu=1")
        shown = self.cli_here("show", "two").stdout
        [go_on] = {text.splitlines()[-1] for text in (done.stderr, shown)}
        there, python = shlex.quote(str(self.folder)), shlex.quote(sys.executable)
        self.assertIn(f"cd {there} && {python} -m app.flow --pool gpu=1", go_on)
        again = self.pasted(go_on)
        self.assertIn("kept, as they succeeded: load (1 of 2)", again.stderr)
        told = self.cli_here("show", "two", "load[1]").stdout.splitlines()
        [debug] = [line for line in told if line.startswith("alone, for a debugger: ")]
        self.assertIn("ValueError: bad file", self.pasted(debug).stderr)

    @LINUX  # elsewhere a folder's __main__ is not imported by workers
    def test_a_subcommand_goes_on_as_such(self):
        """Of a program by click, or of Django's manage.py."""
        bad = "@task\n    def bad(): raise ValueError\n    bad()\n"
        self.script(
            f"import sys\nfrom liteflow import *\nwith DAG('d') as dag:\n    {bad}"
            "if __name__ == '__main__':\n    dag.cli(sys.argv[3:])\n"
        )
        done = self.python("my_flow.py", "etl", "a b", "--db", "x.db")
        self.assertIn("/my_flow.py etl 'a b' --resume --run-id ", done.stderr)
        text = "import sys, my_flow; my_flow.dag.cli(sys.argv[2:])"  # it has no file of its own
        done = self.python("-c", text, "etl", "--db", "x.db")
        self.assertIn("/my_flow.py d --resume --run-id ", done.stderr)

    def test_a_folder_goes_on_by_its_path(self):
        app = self.folder / "app"
        app.mkdir()
        copy_liteflow(app)
        os.rename(self.folder / "my_flow.py", app / "__main__.py")
        go_on = self.python("app", "-q").stderr.splitlines()[-1]
        self.assertIn("load[0]  running  try 3", self.pasted(go_on).stderr)

    def test_what_begins_with_a_dash_is_no_option(self):
        bad = "@task(task_id='-t')\n    def bad(): raise ValueError\n    bad()\n"
        self.script(f"from liteflow import *\nwith DAG('-d') as dag:\n    {bad}")
        done = self.python("-m", "liteflow", "run", "my_flow.py", "--run-id=-r", "-q")
        *_, more, go_on = done.stderr.splitlines()
        shown = self.pasted(more).stdout
        self.assertIn("-d/-r -t: 1 failed", shown)
        alone = next(line for line in shown.splitlines() if line.startswith("alone"))
        self.assertIn("ValueError", self.pasted(alone).stderr)
        run = Dag("-d").get_run("-r", self.db)
        [ti] = run.get_task_instances()
        self.assertEqual(self.pasted(f": {ti.log_url}").returncode, 0)
        self.assertIn("run -r of DAG '-d'", self.pasted(go_on).stderr)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET command = NULL")  # as of a run from Python
        [go_on] = liteflow._way_on(run.refresh(), [ti]).values()
        self.assertIn("run -r of DAG '-d'", self.pasted(f": {go_on}").stderr)

    def test_a_module_goes_on_by_its_name_whatever_that_is(self):
        os.rename(self.folder / "my_flow.py", self.folder / "it's; so.py")
        go_on = self.python("-m", "it's; so", "-q").stderr.splitlines()[-1]
        self.assertIn("load[0]  running  try 3", self.pasted(go_on).stderr)

    def test_a_command_of_a_harmed_file_steers_no_terminal(self):
        self.ran()
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET command = 'python3 ' || char(27) || '[2J'")
        for words in (["show", "two"], ["show", "two", "load[1]"], ["page", "two"]):
            text = self.cli_here(*words).stdout
            self.assertIn("python3 \\x1b[2J --resume", text)
            self.assertNotIn("\x1b", text)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET command = NULL, run_id = 'r' || char(27) || '[2J'")
        self.assertNotIn("\x1b", self.cli_here("show", "two", "load[1]").stdout)

    def test_a_run_id_that_is_taken_is_a_sentence(self):
        self.ran(run_id="mine")
        done = self.python("my_flow.py", "--run-id", "mine")
        self.assertEqual(done.returncode, 2)
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn("has a run 'mine' already", done.stderr)


class PageTest(ScriptCase):
    """`page`: one file, valid, without script or network, whatever tasks are called and print."""

    FLOW = r"""
        from liteflow import DAG, task
        with DAG("hostile", description="<img src=x onerror=alert(1)>") as dag:
            @task(retries=1)
            def load(x):
                print("</pre><script>alert(1)</script>\x1b[2J\x00 ]]> <!--")
                raise ValueError("<svg onload=alert(1)> ' \" </details>")
            @task
            def good(): return "<b>value</b>"
            good() >> load.expand(x=["<i>", '" onclick=alert(1) x="'])
        if __name__ == "__main__":
            dag.cli()
    """
    TAGS = """html head meta title style body h1 h2 p b span div section details summary pre table tr
        th td a svg path rect g text""".split()

    def test_what_is_long_or_folded_can_be_told_apart(self):
        with DAG("many") as d:
            with liteflow.TaskGroup("north"):

                @task(retries=1)
                def load(path, ti):
                    print(f"try {ti.try_number}")
                    if not ti.map_index or ti.try_number == 1:
                        raise ValueError

                load.expand(
                    path=[f"/srv/warehouse/incoming/2026/november/{i}.csv" for i in range(6)]
                )
            task(task_id="step_with_a_name_that_is_long_1")(quiet)()
        with contextlib.redirect_stderr(io.StringIO()):
            run = d.test(db_path=self.db, run_conf={"to": "Zürich"})
        seen = liteflow._seen_instances(run)
        attempts = liteflow._seen_instances(run, attempts=True)
        self.assertIn("try 2 5 success#44; 1 failed", liteflow._draw_gantt(run, attempts))
        elements = {liteflow._line_of([ti]).element[-6:] for ti in seen[:6]}
        self.assertEqual(elements, {f"{i}.csv'" for i in range(6)})
        page = liteflow._run_page(run)
        self.assertIn("Zürich", page)
        self.assertIn(">north.load x 6<", page)
        self.assertIn(">step_with_a..._is_long_1<", page)

    def check(self, page):
        """The page is a tree of known elements, and names nothing outside of itself."""
        case, opened, ids, links = self, [], set(), set()

        class Reader(html.parser.HTMLParser):
            def handle_starttag(self, tag, attributes):
                case.assertIn(tag, case.TAGS)
                if tag != "meta":
                    opened.append(tag)
                for name, value in attributes:
                    case.assertFalse(name.startswith("on") or name == "src", (name, value))
                    if name == "href":
                        links.add(value)
                    if name == "id":
                        case.assertNotIn(value, ids)
                        ids.add(value)

            def handle_endtag(self, tag):
                case.assertEqual(opened.pop(), tag)

        Reader().feed(page)
        self.assertEqual(opened, [])
        self.assertLessEqual(links, {f"#{name}" for name in ids})
        self.assertNotRegex(page, r"https?:|url\(|@import|[\x00-\x08\x1b]")

    def test_hostile_texts_stay_texts(self):
        self.ran(run_id="r")
        for words in ([], ["hostile"], ["hostile/r"]):
            page = self.cli_here("page", *words).stdout
            self.check(page)
            self.assertIn("&lt;svg onload=alert(1)&gt;", page)
        self.assertIn("&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J\\x00", page)
        self.assertIn("&lt;b&gt;value&lt;/b&gt;", page)
        [run] = Dag("hostile").runs(self.db)
        with DAG("notebook") as dag:
            task(task_id="a")(sample)(1) >> liteflow.Label("<u>") >> task(task_id="b")(sample)(1)
        for shown in (run, dag):
            self.check(shown._repr_html_())
            bundle = shown._repr_mimebundle_(include=None, exclude=None)
            self.assertEqual(bundle, {"text/html": shown._repr_html_(), "text/plain": repr(shown)})
        self.assertIn("&lt;u&gt;", dag._repr_html_())
        run._path = os.fspath(self.folder / "gone.db")
        self.check(run._repr_html_())
        self.assertIn("there is no database", run._repr_html_())

    def test_pages_draw_all_that_ran(self):
        self.ran(run_id="r")
        chip = '<span class="chip failed"'
        row = f'<td>hostile</td><td><span class="strip">{chip} title="[-0-9: ]+">✕</span></span>'
        page = self.cli_here("page").stdout
        self.assertRegex(page, f"{row}</td><td>{chip}>✕ failed</span></td>")
        self.assertIn("(runs shown: 1)</p>", self.cli_here("page", "hostile").stdout)
        page = self.cli_here("page", "hostile/r").stdout
        graph, _, times = page.partition("<h2>Timeline</h2>")
        self.assertIn("<summary>traceback</summary><pre>Traceback", graph)
        for label, state in (("good", "success"), ("load", "failed")):
            self.assertRegex(
                graph, f'<g class="{state}"><title>{label}, .*<rect .*>{label}( x 2)?<'
            )
        self.assertEqual(graph.count('<path d="'), 1)
        for label in ("good", "load[0] try 2", "load[1]"):
            self.assertRegex(times, rf">{re.escape(label)}</text><text [^>]+>[^<]+ m?s</text>")
        self.assertRegex(
            times, '<g class="failed"><title>load.0. try 2, failed, .*?<rect class="box"'
        )

    def test_a_page_is_never_more_open_than_what_it_replaces(self):
        page = self.folder / "page.html"
        page.write_text("before")
        page.chmod(0o600)
        self.addCleanup(os.umask, os.umask(0o000))
        with liteflow._writing(page) as coming:
            coming.write_text("secret")
            self.assertEqual(coming.stat().st_mode & 0o777, 0o600)
        self.assertEqual((page.read_text(), page.stat().st_mode & 0o777), ("secret", 0o600))

    def test_a_page_is_written_as_a_whole_or_not_at_all(self):
        self.ran()
        page, link = self.folder / "page.html", self.folder / "link.html"
        page.write_text("before")
        link.symlink_to(page)
        done = self.cli_here("page", "--output", "link.html")
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        self.check(page.read_text())
        self.assertTrue(link.is_symlink())
        self.assertEqual(len([*self.folder.glob("*.html*")]), 2)
        loop = self.folder / "loop.html"
        loop.symlink_to(loop)
        for place in ("no/page.html", "page.html/page.html", "loop.html", "/", "."):
            done = self.cli_here("page", "--output", place)
            self.assertEqual(done.returncode, 2)
            self.assertIn("can't be written", done.stderr)
        self.assertEqual(self.cli_here("page", "nothing").returncode, 2)

    @unittest.skipIf(sys.platform == "win32", "POSIX modes and pipes")
    def test_what_is_there_keeps_its_mode_and_what_is_no_file_its_kind(self):
        self.ran()
        page, pipe = self.folder / "page.html", self.folder / "pipe"
        page.touch()
        page.chmod(0o640)
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        for place in (page, pipe):  # no device, which a fault would replace for the whole machine
            self.assertEqual(self.cli_here("page", "--output", place).returncode, 0)
        before = self.db.read_bytes()
        for name in (self.db.name, "my_flow.py", "copy.db"):
            self.assertEqual(self.cli_here("page", "--output", name).returncode, 2)
        self.assertEqual(self.db.read_bytes(), before)
        self.assertEqual(page.stat().st_mode & 0o777, 0o640)
        self.assertTrue(pipe.is_fifo())
        self.assertIn(b"<!DOCTYPE html>", os.read(reader, 100))

    def test_a_link_that_the_system_does_not_follow_is_not_followed(self):
        # As of another user's in /tmp, which Python 3.14 takes for none.
        def look(path, *rest, **named):
            if os.fspath(path) == str(link):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **named)

        precious, link, real = self.folder / "precious", self.folder / "link.html", os.stat
        precious.write_text("keep me")
        link.symlink_to(precious)
        with (
            mock.patch.object(os, "stat", look),
            mock.patch.object(Path, "exists", lambda path: False),
            self.assertRaisesRegex(
                liteflow.AirflowException, "can't be written: Permission denied"
            ),
            liteflow._writing(link) as coming,
        ):
            coming.write_text("a page")
        self.assertEqual(precious.read_text(), "keep me")

    def test_every_state_has_its_look_everywhere(self):
        words = {*liteflow._TASK_STATES, "interrupted", "none"}
        self.assertEqual({*liteflow._STYLES}, words)

    def test_states_are_told_by_sign_and_word_too(self):
        self.script(
            """
            from liteflow import DAG, AirflowSkipException, task
            with DAG("states") as dag:
                @task
                def bad(): raise ValueError("no")
                @task
                def below(x): pass
                @task
                def left_out(): raise AirflowSkipException("not today")
                below(bad()); left_out()
            if __name__ == "__main__":
                dag.cli()
            """
        )
        self.ran()
        page = self.cli_here("page", "states").stdout
        for style, sign, title in (
            ("failed", "✕", "failed <1 ms"),
            ("upstream_failed", "▲", "upstream failed"),
            ("skipped", "–", "skipped"),
        ):
            cell = rf'<td class="{style}" title="{html.escape(title[:6])}[^"]*">{sign}</td>'
            self.assertRegex(page, cell)
        shades = [
            int(fill[1:3], 16) * 3 + int(fill[3:5], 16) * 6 + int(fill[5:], 16)
            for state in ("success", "failed", "upstream_failed")
            for fill in [liteflow._STYLES[state].fill]
        ]
        self.assertGreater(min(abs(a - b) for a, b in itertools.combinations(shades, 2)), 250)
        self.abandon()
        page = self.cli_here("page", "states").stdout
        self.assertIn("running (owner dead)", page)
        self.assertIn("to go on</p><pre>", page)

    def copies(self, count, **terms):
        """So many more rows like those of each table, the n-th with these terms in its columns."""
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            for table, changed in terms.items():
                names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                chosen = ", ".join(changed.get(name, name) for name in names)
                db.execute(
                    "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < ?) "
                    f"INSERT INTO {table} ({', '.join(names)}) SELECT {chosen} FROM {table}, c",
                    (count,),
                )

    def test_pages_of_large_runs_and_long_histories_are_small(self):
        self.run_flow(
            """
            with DAG("large") as dag:
                @task
                def f(i):
                    if i == 7: print("line\\n" * 30); raise ValueError(f"bad {i}")
                f.expand(i=list(range(100)))
            """
        )
        of_instance = {"task_instance_id": "task_instance_id + n * 1000"}
        self.copies(
            24,
            task_instance={"id": "id + n * 1000", "map_index": "map_index + n * 100"},
            task_attempt={**of_instance, "error": "error || n"},
            task_log={**of_instance, "id": "NULL"},
        )
        [run] = Dag("large").runs(self.db)
        page = liteflow._run_page(run)
        self.check(page)
        self.assertLess(len(page.encode()), 100_000)
        self.assertIn("f x 2500", page)
        self.run_flow(
            """
            with DAG("wide") as dag:
                @task
                def f(*upstream): pass
                first = [f.override(task_id=f"first_{i}")() for i in range(57)]
                second = [f.override(task_id=f"second_{i}")(*first[i:i + 2]) for i in range(57)]
                for i in range(57): f.override(task_id=f"third_{i}")(*second[i:i + 2])
            """,
        )
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("PRAGMA foreign_keys=ON")
            db.execute("DELETE FROM dag_run WHERE dag_id = 'large'")
        self.copies(
            51,
            dag_run={"id": "id + n", "run_id": "run_id || n"},
            task_instance={"id": "id + n * 1000000", "dag_run_id": "dag_run_id + n"},
            task_attempt={"task_instance_id": "task_instance_id + n * 1000000"},
        )
        page = self.cli_here("page", "wide").stdout
        self.assertLess(len(page.encode()), 2_000_000)
        self.assertEqual(page.count('<th><a href="#run'), 50)
        self.assertEqual(page.count('<td class="success"'), 50 * 171)

    def test_what_a_page_leaves_out_is_counted(self):
        self.run_flow(
            """
            with DAG("pushes") as dag:
                @task
                def f(): return 1
                f()
            """
        )
        self.copies(600, xcom={"key": "key || n"})
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET conf = ?", ['{"order": "' + 1_000_000 * "x" + '"}'])
        [run] = Dag("pushes").runs(self.db)
        page = liteflow._run_page(run)
        self.assertIn("and 101 more", page)
        self.assertIn("xxx...</p>", page)
        self.assertLess(len(page), 100_000)
        self.assertEqual(page.count("<td>return_value"), 500)

    def test_a_wait_for_a_retry_is_no_success(self):
        began, bad = liteflow._utcnow(), []
        for n in (1, 2):
            ti = liteflow.TaskInstance("d", "r", "bad")
            ti.state, ti.try_number = TaskInstanceState.FAILED, n
            ti.start_date = began + datetime.timedelta(seconds=10 * n)
            ti.end_date = ti.start_date + datetime.timedelta(seconds=1)
            bad.append(ti)
        bars = liteflow._svg_timeline(bad)
        self.assertIn("bad waits, ", bars)
        self.assertNotIn("success", bars)
        drawn = liteflow._draw_gantt(bad[0], bad)
        self.assertIn("ad waits :", drawn)
        check_mermaid(self, drawn)

    def test_old_runs_are_found_without_a_look_at_each_pair(self):
        DAG("often").run(db_path=self.db)
        self.copies(20_000, dag_run={"id": "id + n", "run_id": "run_id || n"})
        began = time.process_time()
        runs = liteflow._read_runs(str(self.db), None, keep=19_000)
        self.assertEqual((len(runs), runs[0].run_id[-5:]), (1_001, "01000"))
        self.assertLess(time.process_time() - began, 2)

    def boxes(self, edges):
        upstream = {}
        for above, below in edges:
            upstream.setdefault(above, {})
            upstream.setdefault(below, {})[above] = None
        return [liteflow._Box(name, [name], "success", up, "") for name, up in upstream.items()]

    def crossings(self, boxes):
        layers, links = liteflow._layered(boxes)
        places = liteflow._untangled(layers, links)
        depth = {knot: n for n, layer in enumerate(layers) for knot in layer}
        for layer in layers:
            heights = [places[knot] for knot in layer]
            self.assertEqual(heights, sorted(heights))
            solid = [places[knot] for knot in layer if isinstance(knot, str)]
            for a, b in itertools.pairwise(solid):
                self.assertGreaterEqual(b - a, liteflow._BOX_SIZE[1])
        count = 0
        for (a, b), (c, d) in itertools.combinations(links, 2):
            self.assertEqual(depth[b], depth[a] + 1)
            if depth[a] == depth[c]:
                count += (places[a] - places[c]) * (places[b] - places[d]) < 0
        return count

    def test_edges_of_a_graph_do_not_cross_needlessly(self):
        chains = [(f"{x}{n}", f"{x}{n + 1}") for n in range(4) for x in "abcdef"]
        random.Random(4).shuffle(chains)
        self.assertEqual(self.crossings(self.boxes(chains)), 0)
        tree = [(f"n{i}", f"n{2 * i + k}") for i in range(1, 16) for k in (0, 1)]
        random.Random(4).shuffle(tree)
        self.assertEqual(self.crossings(self.boxes(tree)), 0)
        # An edge that passes layers goes round their boxes.
        passing = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("a", "c")]
        self.assertEqual(self.crossings(self.boxes(passing)), 0)

    def test_any_graph_is_drawn(self):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        for _ in range(30):
            with self.subTest(seed=seed):
                size = rng.choice([1, 2, 10, 50, 400])
                edges = [
                    (f"t{min(a, b)}", f"t{max(a, b)}")
                    for a, b in (rng.sample(range(size + 1), 2) for _ in range(2 * size))
                ]
                boxes = self.boxes(edges)
                drawn = liteflow._svg_graph(boxes)
                self.check(liteflow._html_page("graph", drawn))
                self.assertLessEqual(drawn.count("<rect"), liteflow._MOST_DRAWN)
                folded = sum(map(int, re.findall(r">(\d+) tasks<", drawn)))
                self.assertEqual(folded or drawn.count("<rect"), len(boxes))
                self.crossings(boxes[:60])
                self.check(liteflow._svg_graph(boxes[1:]))  # what hung on a task that is gone
        self.check(liteflow._svg_graph([]))
        with DAG("large") as dag:
            tasks = [task(task_id=f"t{i}")(sample)(1) for i in range(300)]
            liteflow.chain(*tasks[:250])
        self.check(dag._repr_html_())
        chain = liteflow._folded_boxes(self.boxes([(f"t{i}", f"t{i + 1}") for i in range(400)]))
        self.assertEqual([[*box.upstream] for box in chain[1:]], [[x.task_id] for x in chain[:-1]])
        circle = [
            liteflow._Box("a", ["a"], "none", {"b": None}, ""),
            liteflow._Box("b", ["b"], "none", {"a": None}, ""),
        ]
        self.check(liteflow._svg_graph(circle))


# --- The promises ---------------------------------------------------------------------------------


def readme_promises() -> list[str]:
    """The numbered lines of the README's section, as plain text."""
    section = (HERE / "README.md").read_text().split("## Promises")[1].split("Promises 3 to 6")[0]
    items = re.split(r"\n(?=\d+\. )", section.strip())
    return [" ".join(re.sub(r"^\d+\. |[*`]", "", item).split()) for item in items]


@unittest.skipIf(sys.flags.optimize >= 2, "there are no docstrings")
class TheListOfPromisesTest(unittest.TestCase):
    def test_each_promise_has_its_class_and_each_class_its_promise(self):
        classes = sorted(
            (int(re.match(r"Promise(\d+)", name)[1]), " ".join((kind.__doc__ or "").split()))
            for name, kind in globals().items()
            if name.startswith("Promise")
        )
        self.assertEqual([number for number, _ in classes], list(range(1, len(classes) + 1)))
        self.assertEqual([line for _, line in classes], readme_promises())


class Promise1Test(KilledAtCommitsCase):
    """A task recorded as succeeded never runs again in that run, unless a task that it waits for
    does, the code gives it results of other tasks, or somebody clears it. Its state, result, XComs
    and log are one transaction, and a task starts only after those it waits for are committed."""

    # A diamond, a retry, a failure, a skip, a large value and a fanned part. Every task says when
    # it starts and when it ends; at the CRASH-th COMMIT of the scheduler it is killed.
    SCRIPT = """
        import os, signal, sqlite3, sys
        from liteflow import DAG, AirflowSkipException, task
        def note(*words):
            fd = os.open("ran.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, (" ".join(map(str, words)) + chr(10)).encode()); os.close(fd)
        def said(ti):
            print("log of", ti.task_id, ti.try_number); note("start", ti.task_id, ti.try_number)
        with DAG("matrix") as dag:
            @task
            def top(ti): said(ti); return 1
            @task
            def left(x, ti): said(ti); return b"x" * 200_000
            @task(retries=1)
            def right(x, ti):
                said(ti)
                if ti.try_number == 1: raise ValueError("first")
                return 2
            @task
            def join(a, b, ti): said(ti); return [len(a), b]
            @task
            def fails(ti): said(ti); raise ValueError("always")
            @task
            def below(x, ti): said(ti)
            @task
            def skips(ti): said(ti); raise AirflowSkipException
            @task(trigger_rule="all_done")
            def last(xs, ti): said(ti); return xs
            @task
            def fan(i, ti): said(ti); return i
            t = top()
            join(left(t), right(t)); below(fails())
            last([skips(), *(fan(i) for i in range(3))])
    """
    FINAL = {  # noqa: RUF012
        "top": "success",
        "left": "success",
        "right": "success",
        "join": "success",
        "fails": "failed",
        "below": "upstream_failed",
        "skips": "skipped",
        "last": "success",
        "fan": "success",
        "fan__1": "success",
        "fan__2": "success",
    }

    def look(self, name):
        """(recorded states, starts) as they stand; the file must be whole."""
        path = self.folder / name / "m.db"
        with contextlib.closing(sqlite3.connect(path)) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            has = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'task_instance'").fetchone()
            states = dict(db.execute("SELECT task_id, state FROM task_instance")) if has else {}
            if has:
                lost = db.execute(
                    "SELECT task_id, state FROM task_instance t WHERE state IN ('success', 'failed', "
                    "'skipped') AND NOT EXISTS (SELECT 1 FROM task_log l WHERE "
                    "l.task_instance_id = t.id AND l.try_number = t.try_number)"
                ).fetchall()
                self.assertEqual(lost, [], "an attempt lost its log")
                dangling = db.execute(
                    "SELECT task_id FROM task_instance t WHERE state = 'success' AND task_id != "
                    "'skips' AND NOT EXISTS (SELECT 1 FROM xcom WHERE task_instance_id = t.id)"
                ).fetchall()
                self.assertEqual(dangling, [], "a success without its result")
        ran = self.folder / name / "ran.txt"
        lines = ran.read_text().splitlines() if ran.exists() else []
        return states, collections.Counter(line.split()[1] for line in lines)

    def go_on(self, name):
        """Resume, or begin if the run was never recorded; then all must be as without a crash."""
        before, starts = self.look(name)
        code, _ = self.crash(name, 0, "after", resume=bool(before))
        self.assertEqual(code, 0)
        after, again = self.look(name)
        self.assertEqual(after, self.FINAL)
        for task_id, state in before.items():
            if state == "success":
                self.assertEqual(again[task_id], starts[task_id], f"{task_id} ran again")
        return starts, again

    def sweep(self, point):
        crash, when = point
        name = f"{when}{crash}"
        code, _ = self.crash(name, crash, when)
        if code != 0:
            self.assertEqual(code, -signal.SIGKILL)
            self.go_on(name)
        return code

    def test_killed_before_and_after_every_commit(self):
        points = self.points()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            codes = list(threads.map(self.sweep, points))
        # A turn that comes later records more at once: not every run has as many commits.
        self.assertGreater(codes.count(-signal.SIGKILL), len(points) // 4)

    def test_killed_again_during_the_resume(self):
        commits = max(n for n, _ in self.points())
        firsts = range(2, commits + 1) if SOAK else [commits // 2]

        def twice(first, second):
            name = f"twice{first}-{second}"
            self.crash(name, first, "after")
            self.crash(name, second, "before" if second % 2 else "after", resume=True)
            self.go_on(name)

        pairs = [(a, b) for a in firsts for b in range(1, commits if SOAK else 6)]
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            list(threads.map(twice, *zip(*pairs, strict=True)))

    def test_a_task_starts_after_the_commit_of_those_it_waits_for(self):
        run = self.run_flow(
            """
            import sqlite3
            def recorded(task_id):
                with sqlite3.connect(f"file:{os.environ['CASE_DIR']}/flow.db?mode=ro", uri=True) as db:
                    return db.execute("SELECT state FROM task_instance WHERE task_id = ?", (task_id,)).fetchone()[0]
            with DAG("order") as dag:
                @task
                def a(): return recorded("a")
                @task
                def b(x): return [recorded("a"), recorded("b")]
                b(a())
            """
        )
        # Recorded as `queued` when it is sent, as `running` once a worker has said that it took it.
        self.assertIn(run.xcom_pull("a"), ("queued", "running"))
        before, own = run.xcom_pull("b")
        self.assertEqual(before, "success")
        self.assertIn(own, ("queued", "running"))

    def test_a_job_is_queued_when_it_is_sent_and_running_when_a_worker_took_it(self):
        module = self.module(
            """
            with DAG("taken") as dag:
                @task
                def f(i):
                    (Path(os.environ["CASE_DIR"]) / f"took-{i}").touch()
                    while not (Path(os.environ["CASE_DIR"]) / "go").exists(): time.sleep(0.01)
                for i in range(2): f(i)
            """
        )
        states = "SELECT state FROM task_instance UNION ALL SELECT state FROM task_attempt"
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            running = threads.submit(module.dag.run, db_path=self.db, max_workers=2)
            self.assertTrue(wait_until(lambda: len(list(self.folder.glob("took-*"))) == 2))
            self.assertTrue(wait_until(lambda: {s for (s,) in self.query(states)} == {"running"}))
            (self.folder / "go").touch()
            self.assertEqual(running.result(LIMIT).state, "success")

    def test_no_job_is_sent_before_its_start_is_committed(self):
        self.script(
            """
            import os, sqlite3, time
            from pathlib import Path
            from liteflow import DAG, task
            class Slow(sqlite3.Connection):
                def execute(self, sql, *args):
                    if sql == "COMMIT": time.sleep(0.04)
                    return super().execute(sql, *args)
            def state(task_id):
                with sqlite3.connect("file:liteflow.db?mode=ro", uri=True) as db:
                    return db.execute("SELECT state FROM task_instance WHERE task_id = ?", (task_id,)).fetchone()[0]
            with DAG("slow") as dag:
                @task
                def a(): return state("a")
                @task
                def b(x): return [state("a"), state("b")]
                b(a())
            if __name__ == "__main__":
                connect = sqlite3.connect
                sqlite3.connect = lambda *args, **more: connect(*args, **{**more, "factory": Slow})
                run = dag.run(max_workers=1)
                print(run.xcom_pull("a"), *run.xcom_pull("b"))
            """
        )
        taken = "(queued|running)"
        self.assertRegex(self.python("my_flow.py").stdout, f"^{taken} success {taken}\n$")

    def test_every_transaction_asks_whether_the_run_is_still_ours(self):
        store, attempt = self.started_attempt()
        instance = attempt.instance
        store.owner = "another"
        before = list(self.dump())
        row = ("k", "int", "1", None, b"x")
        events = (
            ("instances", {instance: None}),
            ("attempts", {attempt: None}),
            ("withdrawn", [attempt]),
            ("expanded", [instance.node]),
            ("xcoms", [(instance.row_id, *row)]),
            ("items", [(instance.row_id, 0, "1", b"x")]),
            ("renewed", [instance.row_id]),
            ("named", [("name", instance.row_id)]),
            ("logs", [(attempt, 0, "late")]),
            ("calls", [liteflow._Callback(attempt, None, None)]),
            ("jobs", [attempt]),
            ("is_large", True),
        )
        self.assertEqual({name for name, _ in events}, {*vars(liteflow._Batch())})
        for name, event in events:
            with self.subTest(name=name):
                late = liteflow._Batch()
                setattr(late, name, event)
                self.assertTrue(late)
                with self.assertRaises(liteflow.AlreadyRunning):
                    store.record(late)
        with self.assertRaises(liteflow.AlreadyRunning):
            store.end_run(DagRunState.SUCCESS, None)
        store.owner = ""  # as once its run has ended
        with self.assertRaises(liteflow.AlreadyRunning):
            store.record(late)
        self.assertEqual(list(self.dump()), before)

    def dump(self):
        with contextlib.closing(sqlite3.connect(self.db)) as connection:
            yield from connection.iterdump()


class Promise2Test(Case):
    """Kill anything at any moment: the database opens clean, and resume finishes the run. A run
    that is alive is refused, not doubled."""

    SCRIPT = """
        import os, sys, time
        from liteflow import DAG, task
        def note(*words):
            fd = os.open("ran.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, (" ".join(map(str, words)) + chr(10)).encode()); os.close(fd)
        with DAG("killed") as dag:
            @task(retries=50)
            def step(chain, i, ti, before):
                note("start", ti.task_id, ti.try_number, os.getpid())
                print("log", chain, i); time.sleep(0.01)
                note("end", ti.task_id, ti.try_number, os.getpid())
                return [chain, i]
            for c in range(3):
                v = None
                for i in range(6): v = step(c, i, before=v)
        if __name__ == "__main__":
            dag.cli()
    """

    def ran(self):
        path = self.folder / "ran.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def check(self, finished):
        """The append-only file against the database."""
        db = self.folder / "liteflow.db"
        with contextlib.closing(sqlite3.connect(db)) as connection:
            self.assertEqual(connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            rows = connection.execute("SELECT task_id, state, try_number FROM task_instance")
            success = {task_id: tries for task_id, state, tries in rows if state == "success"}
            self.assertEqual(
                connection.execute(
                    "SELECT count(*) FROM task_instance t WHERE state = 'success' AND "
                    "NOT EXISTS (SELECT 1 FROM xcom WHERE task_instance_id = t.id)"
                ).fetchone(),
                (0,),
            )
        ends = {(words[1], int(words[2])) for words in self.ran() if words[0] == "end"}
        starts = collections.Counter((w[1], int(w[2])) for w in self.ran() if w[0] == "start")
        for task_id, tries in success.items():
            self.assertIn((task_id, tries), ends, "a success that did not run to its end")
            later = [key for key in starts if key[0] == task_id and key[1] > tries]
            self.assertEqual(later, [], "a success ran again")
        self.assertEqual([key for key, n in starts.items() if n > 1], [], "an attempt ran twice")
        if finished:
            self.assertEqual(len(success), 18)

    def pids(self):
        return {int(words[3]) for words in self.ran()}

    def round(self, rng, what):
        for path in self.folder.iterdir():
            if path.name.startswith(("ran", "liteflow.db")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kills = 0
        for attempt in range(40):
            process = self.start(
                "my_flow.py",
                "--quiet",
                "--max-workers",
                "2",
                *(["--resume"] if attempt and self.has_run() else []),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + rng.uniform(0.03, 0.3)
            while attempt < 6 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if attempt < 6 and process.poll() is None:
                if what == "scheduler":
                    process.kill()
                    kills += 1
                else:
                    kills += self.kill_workers(rng, process)
            process.wait(timeout=LIMIT)
            gone = wait_until(lambda: not any(alive(pid) for pid in self.pids()), 2.0)
            self.assertTrue(gone, "an orphan lives after 2 seconds")
            if process.returncode == 0:
                break
            if (self.folder / "liteflow.db").exists() and self.has_run():
                self.check(finished=False)
        self.assertEqual(process.returncode, 0)
        self.check(finished=True)
        return kills

    def kill_workers(self, rng, process):
        kills = 0
        while kills < 4 and process.poll() is None:
            live = [pid for pid in self.pids() if alive(pid)]
            if live:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(live), signal.SIGKILL)
                    kills += 1
            time.sleep(rng.uniform(0.0, 0.1))
        return kills

    def has_run(self):
        return bool(recorded_runs("killed", self.folder / "liteflow.db"))

    def test_kills_at_random(self):
        self.script(self.SCRIPT)
        seed = int(os.environ.get("LITEFLOW_SEED", random.randrange(10**9)))
        rng = random.Random(seed)
        for what, wanted in (("scheduler", 300 if SOAK else 4), ("worker", 300 if SOAK else 2)):
            kills = rounds = 0
            while kills < wanted and rounds < 20 + wanted * 3:
                faulthandler.dump_traceback_later(LIMIT, file=sys.__stderr__, exit=True)  # of each
                with self.subTest(seed=seed, what=what, kills=kills):
                    kills += self.round(rng, what)
                rounds += 1
            if SOAK:
                print(f"{kills} kills of {what}s in {rounds} rounds, seed {seed}", file=sys.stderr)
            self.assertGreaterEqual(kills, wanted)

    def test_a_live_run_is_refused_and_named_by_host_pid_and_start(self):
        module = self.module(
            """
            with DAG("alive", max_active_runs=1) as dag:
                @task
                def waits():
                    (Path(os.environ["CASE_DIR"]) / "running").touch()
                    while not (Path(os.environ["CASE_DIR"]) / "go").exists(): time.sleep(0.01)
                waits()
            """
        )
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            first = threads.submit(module.dag.run, db_path=self.db, run_id="one", max_workers=1)
            self.assertTrue(wait_until((self.folder / "running").exists))
            for options in ({"resume": True}, {"resume": True, "run_id": "one"}, {}):
                with self.assertRaises(liteflow.AlreadyRunning) as caught:
                    module.dag.run(db_path=self.db, max_workers=1, **options)
                for word in (f"pid {os.getpid()}", os.uname().nodename, "since 2", "'one'"):
                    self.assertIn(word, str(caught.exception))
            with self.assertRaises(liteflow.AlreadyRunning):
                module.dag.get_run("one", self.db).delete()
            self.assertTrue(module.dag.get_run("one", self.db).owner_alive)
            lines = []
            second = threads.submit(
                module.dag.run,
                db_path=self.db,
                run_id="two",
                wait=True,
                max_workers=1,
                progress=lines.append,
            )
            self.assertTrue(wait_until(lambda: any("waiting" in line for line in lines)))
            (self.folder / "go").touch()
            self.assertEqual(first.result().state, "success")
            self.assertEqual(second.result().state, "success")

    def left_run(self, owner):
        """A run as an owner leaves it that has a task running."""
        module = self.module("with DAG('left') as dag:\n    task(task_id='a')(sorted)([1])\n")
        module.dag.run(db_path=self.db, run_id="r", executor=pool())
        self.abandon(owner)
        return module.dag

    HOLDER = """
        import fcntl, os, sys, time
        folder = sys.argv[1]
        os.mkdir(folder)
        file = os.open(folder + "/owner", os.O_CREAT | os.O_RDWR)
        os.write(file, b'{"liteflow": "x"}')
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(600)
    """

    def test_an_owner_lives_as_long_as_the_kernel_holds_its_lock(self):
        d = self.left_run("00112233445566ff")
        folder = self.folder / "flow.db-run-00112233445566ff"
        holder = self.start(self.script(self.HOLDER, "holder.py"), folder)
        self.assertEqual(holder.stdout.readline(), "locked\n")
        self.assertTrue(d.get_run("r", self.db).owner_alive)
        with self.assertRaises(liteflow.AlreadyRunning) as caught:
            d.run(db_path=self.db, resume=True, executor=pool())
        self.assertIn("pid 7 on there", str(caught.exception))
        for act in (d.get_run("r", self.db).delete, lambda: d.get_run("r", self.db).clear("a")):
            with self.assertRaises(liteflow.AlreadyRunning):
                act()
        self.assertTrue(folder.exists())
        holder.kill()
        holder.wait()
        self.assertFalse(d.get_run("r", self.db).owner_alive)
        self.assertEqual(d.run(db_path=self.db, resume=True, executor=pool()).state, "success")
        ti = d.get_run("r", self.db).get_task_instance("a")
        self.assertEqual((ti.try_number, ti.max_tries), (2, 1))
        self.assertFalse(folder.exists())

    def test_an_owner_without_a_lock_is_dead(self):
        folder = self.folder / "flow.db-run-0123456789abcdef"
        for owner in ("0123456789abcdef", "x", "", "../../etc/1", None):
            with self.subTest(owner=owner):
                self.db.unlink(missing_ok=True)
                self.assertFalse(self.left_run(owner).get_run("r", self.db).owner_alive)
        folder.mkdir()
        self.assertFalse(liteflow._owner_lives(str(self.db), "0123456789abcdef"))
        (folder / "owner").write_text('{"liteflow": "x"}')
        self.assertFalse(liteflow._owner_lives(str(self.db), "0123456789abcdef"))

    def test_an_owner_that_can_not_be_asked_is_taken_for_alive(self):
        d = self.left_run("0123456789abcdef")
        folder = self.folder / "flow.db-run-0123456789abcdef"
        folder.mkdir()
        (folder / "owner").write_text('{"liteflow": "x"}')
        folder.chmod(0)
        self.addCleanup(folder.chmod, 0o700)
        if os.access(folder / "owner", os.F_OK):  # root may look into everything
            real = os.open

            def refusing(path, *more, **options):
                if os.fspath(path).startswith(str(folder)):
                    raise PermissionError(13, "Permission denied", path)
                return real(path, *more, **options)

            os.open = refusing
            self.addCleanup(setattr, os, "open", real)
        self.assertTrue(d.get_run("r", self.db).owner_alive)
        with self.assertRaises(liteflow.AlreadyRunning):
            d.run(db_path=self.db, resume=True, executor=pool())
        self.assertIn(folder.name, os.listdir(self.folder))

    def test_of_this_process_only_those_live_that_run(self):
        with liteflow._owned_folder(str(self.db)) as (owner, _):
            self.assertTrue(liteflow._owner_lives(str(self.db), owner))
            # Other copies of the module in this process ask the kernel.
            with mock.patch.dict(liteflow._owner_files, clear=True):
                self.assertTrue(liteflow._owner_lives(str(self.db), owner))
        self.assertFalse(liteflow._owner_lives(str(self.db), owner))
        self.assert_nothing_left()

    def test_a_forked_child_does_not_keep_its_parents_run_alive(self):
        self.script(
            """
            import os, time
            from pathlib import Path
            from liteflow import DAG, task
            forked = []
            def forks(line):
                if forked: return
                forked.append(os.fork())
                if not forked[0]:  # it has let go of its parent's lock by now
                    Path("new").write_text(str(os.getpid())); Path("new").rename("child")
                    time.sleep(600)
            with DAG("forking") as dag:
                @task
                def waits():
                    Path("pid").write_text(str(os.getpid())); Path("pid").rename("running")
                    time.sleep(600)
                waits()
            if __name__ == "__main__":
                dag.run(progress=forks, max_workers=1, mp_context="spawn")
            """
        )
        process = self.start("my_flow.py")
        for name in ("child", "running"):
            self.assertTrue(wait_until((self.folder / name).exists), name)
        self.db = self.folder / "liteflow.db"
        [run] = Dag("forking").runs(self.db)
        self.assertTrue(run.owner_alive)
        process.kill()
        process.wait()
        self.assertFalse(run.owner_alive)
        worker, child = [int((self.folder / name).read_text()) for name in ("running", "child")]
        self.assertTrue(wait_until(lambda: not alive(worker)), "nor does it keep its workers alive")
        self.assertTrue(alive(child))

    def test_the_next_run_closes_dead_ones(self):
        d = self.left_run("0123456789abcdef")
        lines = []
        d.run(db_path=self.db, run_id="next", executor=pool(), progress=lines.append)
        run = d.get_run("r", self.db)
        self.assertEqual((run.state, run.reason), ("failed", "its scheduler died"))
        self.assertIn("run r: its scheduler died; recorded as failed", lines)
        self.assertEqual(self.states(run), {"a": None})
        self.assertTrue(run.get_task_instance("a").interrupted)

    def test_a_dead_run_is_told_of_when_it_is_closed_and_not_before(self):
        d = self.left_run("0123456789abcdef")
        d.max_active_runs = 1
        lines = []
        options = {"db_path": self.db, "executor": pool(), "progress": lines.append}
        with liteflow._owned_folder(str(self.db)) as (owner, _):
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                live = "('left', 'live', 'running', ?, '{}')"
                names = "dag_id, run_id, state, owner, conf"
                db.execute(f"INSERT INTO dag_run ({names}) VALUES {live}", (owner,))
            with self.assertRaises(liteflow.AlreadyRunning):
                d.run(run_id="next", **options)
        self.assertEqual((lines, d.get_run("r", self.db).state), ([], "running"))
        d.run(run_id="next", **options)
        self.assertEqual(lines.count("run r: its scheduler died; recorded as failed"), 1)

    def test_an_owner_that_was_fenced_out_ends_its_workers_and_says_so(self):
        module = self.module(
            """
            with DAG("fenced") as dag:
                @task
                def f(i):
                    (Path(os.environ["CASE_DIR"]) / str(os.getpid())).touch(); time.sleep(0.5 if i else 60)
                f(0); f(1)
            """
        )

        def pids():
            return [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            run = threads.submit(module.dag.run, db_path=self.db, max_workers=2)
            self.assertTrue(wait_until(lambda: len(pids()) == 2))
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute("UPDATE dag_run SET owner = 'another'")
            with self.assertRaises(liteflow.AlreadyRunning) as caught:
                run.result()
        self.assertIn("taken this run over", str(caught.exception))
        self.assertFalse(any(alive(pid) for pid in pids()))
        self.assertEqual(self.query("SELECT owner, state FROM dag_run"), [("another", "running")])

    def stopped(self, number, times=1):
        """The exit code of a run that gets a signal while a task runs, and what it says."""
        self.script(
            """
            import signal, sys, time
            from pathlib import Path
            from liteflow import DAG, task
            with DAG("signalled") as dag:
                @task
                def stubborn():
                    if "stubborn" in Path("mode").read_text(): signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    Path("running").touch(); time.sleep(60)
                @task
                def after(x): pass
                after(stubborn())
            if __name__ == "__main__":
                dag.cli()
            """
        )
        (self.folder / "mode").write_text("stubborn" if times > 1 else "plain")
        (self.folder / "running").unlink(missing_ok=True)
        process = self.start("my_flow.py")
        self.assertTrue(wait_until((self.folder / "running").exists))
        for i in range(times):
            time.sleep(0.3 if i else 0)
            process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
        self.db = self.folder / "liteflow.db"
        return process.returncode, err

    def test_signals_end_a_run_in_order(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(number=number):
                found, err = self.stopped(number)
                self.assertEqual(found, code, err)
                self.assertNotIn("Traceback", err)
                run = Dag("signalled").runs(self.db)[0]
                self.assertEqual((run.state, run.reason), ("failed", f"stopped by {number.name}"))
                self.assertEqual(self.states(run), {"stubborn": None, "after": None})
                self.assert_nothing_left()

    def test_a_second_signal_ends_it_at_once(self):
        started = time.monotonic()
        self.assertEqual(self.stopped(signal.SIGINT, times=2)[0], 130)
        self.assertLess(time.monotonic() - started, liteflow._GRACE)

    def test_a_second_signal_as_its_workers_end_is_no_error(self):
        self.script(
            """
            import os, signal, time
            from liteflow import DAG, WorkerPool, task
            with DAG("signalled") as dag:
                @task
                def f():
                    os.kill(int(os.environ["SCHEDULER"]), signal.SIGINT)
                    time.sleep(60)
                f()
            if __name__ == "__main__":
                os.environ["SCHEDULER"], shutdown = str(os.getpid()), WorkerPool.shutdown
                def interrupted(pool):
                    WorkerPool.shutdown = shutdown
                    os.kill(os.getpid(), signal.SIGINT)
                WorkerPool.shutdown = interrupted
                dag.cli()
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(done.returncode, 130)
        self.assertNotIn("Traceback", done.stderr)

    def test_stop_from_another_terminal(self):
        module = self.module(
            "with DAG('s') as dag:\n    @task\n    def f(): time.sleep(60)\n    f()\n"
        )
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            run = threads.submit(module.dag.run, db_path=self.db, executor=pool())
            self.assertTrue(wait_until(lambda: recorded_runs("s", self.db)))
            done = self.cli("stop", "s", "--db", self.db)
            self.assertEqual((done.returncode, run.result().reason), (0, "stopped on request"))
        shown = self.cli_here("show", "s", "--db", self.db).stdout
        self.assertIn("\nstopped on request\n", shown)
        done = self.cli("stop", "s", "--db", self.db)
        self.assertEqual(done.returncode, 2)
        self.assertIn("is not running: its state is failed", done.stderr)

    def test_a_worker_that_starts_after_an_edit_says_so(self):
        module = self.module(
            """
            with DAG("edited", max_active_tasks=1) as dag:
                @task
                def edits():
                    with open(__file__, "a") as f: f.write("# edited")
                    os._exit(1)
                @task(trigger_rule="all_done")
                def after(x): pass
                after(edits())
            """
        )
        lines = []
        run = module.dag.run(db_path=self.db, max_workers=1, progress=lines.append)
        self.assertIn("was edited: this worker has another version", run.log("after"))
        self.assertTrue(any("was edited" in line for line in lines))

    def test_a_warm_worker_that_has_an_older_version_says_so(self):
        module = self.module("with DAG('d') as dag:\n    @task\n    def f(): return 1\n    f()\n")
        path = Path(module.__file__)
        with WorkerPool(1, mp_context="forkserver") as warm:
            self.assertEqual(module.dag.run(db_path=self.db, executor=warm).log("f"), "")
            path.write_text(path.read_text().replace("return 1", "return 22"))
            spec = importlib.util.spec_from_file_location(module.__name__, path)  # as reload() does
            spec.loader.exec_module(again := importlib.util.module_from_spec(spec))
            run = again.dag.run(db_path=self.db, executor=warm)
        self.assertEqual(run.xcom_pull("f"), 1)
        self.assertIn("was edited: this worker has another version", run.log("f"))


class Promise3Test(Case):
    """Workers never write. Only the scheduling process writes what a run does, and nothing that a
    task returns, raises, prints or exits with can stop it."""

    def test_the_scheduler_unpickles_nothing(self):
        self.script(
            """
            import os, sys
            from pathlib import Path
            from liteflow import DAG, AirflowSkipException, task
            class Canary(Exception):
                def __reduce__(self): return Path.touch, (Path("unpickled"),)
            class Odd(AirflowSkipException):
                def __str__(self): sys.exit(3)
            class Text(str): pass
            with DAG("canary") as dag:
                @task
                def value(): return Canary()
                @task
                def error(): raise Canary("x")
                @task
                def exits():
                    class Code:
                        def __repr__(self): raise SystemExit
                    sys.exit(Code())
                @task
                def skips(): raise Odd
                @task
                def surrogates(): return {"caf\\udce9": 1}
                @task(multiple_outputs=True)
                def keys(): return {"caf\\udce9": 1}
                @task(multiple_outputs=True)
                def subclass(): return {Text("a"): 1}
                @task
                def pushes(ti): ti.xcom_push("k\\udce9", 1)
                @task
                def odd_name():
                    class C: pass
                    C.__qualname__ = "a\\udce9"; C.__module__ = "nowhere"
                    return C()
                @task
                def environment(): os.environ = {}; print("x")
                for f in (value, error, exits, skips, surrogates, keys, subclass, pushes, odd_name, environment): f()
            if __name__ == "__main__":
                seen = []
                sys.addaudithook(lambda event, args: seen.append(args) if event == "pickle.find_class" and args[0] != "concurrent.futures.process" else None)
                run = dag.run()
                print(*sorted(f"{t.task_id}={t.state}" for t in run.get_task_instances()))
                print(len(seen), Path("unpickled").exists())
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual(
            done.stdout.splitlines(),
            [
                "environment=success error=failed exits=failed keys=failed odd_name=failed "
                "pushes=failed skips=skipped subclass=success surrogates=success value=success",
                "0 False",
            ],
            done.stderr,
        )

    @LINUX
    def test_no_worker_has_the_database_open_for_writing(self):
        run = self.run_flow(
            """
            def opened():
                found = []
                for fd in os.listdir("/dev/fd"):
                    try: path = os.readlink(f"/proc/self/fd/{fd}")
                    except OSError: continue
                    if path.startswith(os.environ["CASE_DIR"]) and ".db" in path and "-run-" not in path:
                        found.append(path)
                return found
            with DAG("opened") as dag:
                @task
                def a(): return b"x" * 100_000
                @task
                def b(x, ti): ti.xcom_pull("a"); return opened()
                b(a())
            """
        )
        self.assertEqual(run.xcom_pull("b"), [])

    def test_a_worker_only_ever_reads_the_database(self):
        run = self.run_flow(
            """
            OPENED = []
            sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "sqlite3.connect" else None)
            with DAG("reads") as dag:
                @task
                def a(): return b"x" * 100_000
                @task
                def b(x, ti): return [len(ti.xcom_pull("a")), len(x), OPENED]
                b(a())
            """
        )
        *lengths, opened = run.xcom_pull("b")
        self.assertEqual(lengths, [100_000, 100_000])
        self.assertTrue(opened)
        self.assertEqual([uri for uri in opened if "mode=ro" not in uri], [])

    def test_output_of_every_kind_is_no_matter(self):
        run = self.run_flow(
            """
            with DAG("noise") as dag:
                @task
                def noise():
                    os.write(1, os.urandom(100_000)); os.write(2, b"\\0" * 10); os.closerange(0, 3)
                @task
                def closes():
                    for fd in range(3, 64):
                        try: os.close(fd)
                        except OSError: pass
                @task
                def full(): import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); return b"x" * 200_000
                @task
                def fine(i): print("heard", i); return i
                @task
                def strays(n):  # into what is not its own, as one does whose number is stale
                    for fd in range(3, 64):
                        try: os.write(fd, b"")
                        except OSError: pass
                noise(); closes(); full(); strays.expand(n=[1, 2])
                for i in range(4): fine(i)
            """
        )
        states = self.states(run)
        self.assertEqual(
            [states[t] for t in ("fine", "fine__1", "fine__2", "fine__3")], ["success"] * 4
        )
        self.assertEqual(
            (states["noise"], states["closes"], states["full"]), ("success", "failed", "failed")
        )
        said = "the task's outcome could not be handed over: "
        self.assertIn(said, run.get_task_instance("full").error)
        self.assertEqual(
            [run.log(f"fine__{i}") for i in (1, 2, 3)], [f"heard {i}\n" for i in (1, 2, 3)]
        )


class Promise4Test(Case):
    """One task, one blast radius. A crash, a segfault, an OOM kill or a timeout takes down one
    task; its neighbours neither fail nor run twice. A death is noticed within 2 seconds."""

    def test_a_death_beside_a_long_task_is_noticed_at_once(self):
        run = self.run_flow(
            """
            def note(word):
                with open(os.environ["CASE_DIR"] + "/notes", "a") as f: f.write(word + chr(10))
            with DAG("beside") as dag:
                @task
                def long():
                    note("long")
                    deadline = time.monotonic() + 30
                    while "after" not in Path(os.environ["CASE_DIR"], "notes").read_text() and time.monotonic() < deadline:
                        time.sleep(0.01)
                    return time.monotonic() < deadline
                @task
                def segfaults():
                    while not os.path.exists(os.environ["CASE_DIR"] + "/notes"): time.sleep(0.01)
                    import faulthandler; faulthandler._sigsegv()
                @task(trigger_rule="all_failed")
                def after(): note("after")
                long(); segfaults() >> after()
            """,
            max_workers=2,
        )
        self.assertEqual(
            self.states(run), {"long": "success", "segfaults": "failed", "after": "success"}
        )
        self.assertTrue(run.xcom_pull("long"))
        self.assertEqual(run.get_task_instance("segfaults").error, "killed by SIGSEGV")
        self.assertEqual((self.folder / "notes").read_text().split(), ["long", "after"])

    def test_a_death_is_noticed_within_two_seconds(self):
        run = self.run_flow(
            """
            def note(): (Path(os.environ["CASE_DIR"]) / "died").write_text(str(time.time()))
            with DAG("noticed") as dag:
                @task
                def plain(before): note(); os.kill(os.getpid(), signal.SIGKILL)
                @task
                def keeps_the_pipe(before):
                    if os.fork() == 0: time.sleep(30); os._exit(0)
                    note(); os.kill(os.getpid(), signal.SIGKILL)
                @task
                def exits(before): note(); os._exit(0)
                @task
                def told(before): signal.signal(signal.SIGTERM, signal.SIG_DFL); note(); os.kill(os.getpid(), signal.SIGTERM)
                @task(trigger_rule="all_done")
                def seen(before): return time.time() - float((Path(os.environ["CASE_DIR"]) / "died").read_text())
                last = None
                for f in (plain, keeps_the_pipe, exits, told):
                    last = seen.override(task_id=f"seen_{f.__name__}", trigger_rule="all_done")(f.override(trigger_rule="all_done")(last))
            """
        )
        for name in ("plain", "keeps_the_pipe", "exits", "told"):
            self.assertLess(run.xcom_pull(f"seen_{name}"), 2.0, name)

    def test_a_timeout_beside_a_long_task(self):
        run = self.run_flow(
            """
            with DAG("both") as dag:
                @task(execution_timeout=0.3)
                def hangs(): time.sleep(60)
                @task
                def long():
                    while not (Path(os.environ["CASE_DIR"]) / "ended").exists(): time.sleep(0.01)
                    return "done"
                hangs(); long()
            """,
            max_workers=2,
            progress=lambda line: "hangs  failed" in line and (self.folder / "ended").touch(),
        )
        self.assertEqual(self.states(run), {"hangs": "failed", "long": "success"})

    def test_a_child_that_is_told_to_end_as_soon_as_it_is_there_ends(self):
        run = self.run_flow(
            """
            import multiprocessing
            with DAG("children") as dag:
                @task
                def outlived():
                    context, count = multiprocessing.get_context("fork"), 0
                    for _ in range(40):
                        child = context.Process(target=time.sleep, args=(60,))
                        child.start()
                        child.terminate()
                        child.join(5)
                        if child.is_alive():
                            count += 1
                            child.kill()
                    return count
                outlived()
            """
        )
        self.assertEqual(run.xcom_pull("outlived"), 0)

    def test_leftovers_of_one_task_do_not_fail_the_next(self):
        bodies = {
            "removed_folder": "import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
            "wraps_stdout": "import io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer)",
            "closes_stdout": "sys.stdout.close()",
            "closes_1": "os.close(1)",
            "null": "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)",
            "alarm": "signal.alarm(1)",
            "handler": "signal.signal(signal.SIGALRM, lambda *a: 1 / 0); signal.setitimer(signal.ITIMER_REAL, 0.05)",
            "path": "sys.path.insert(0, 'leaked')",
            "mask": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])",
            "log_handlers": "import logging; logging.root.handlers.clear(); logging.root.setLevel(60)",
            "orphan": "import subprocess; subprocess.run('(sleep 0.1; echo LATE) &', shell=True)",
            "uncounted": "signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.system('(sleep 0.1; echo LATE) &')",
        }
        tasks = "".join(
            f"    @task\n    def {name}(before): {body}\n"
            f"    @task(task_id='after_{name}')\n    def f(before): return check('{name}')\n"
            f"    last = f({name}(last))\n"
            for name, body in bodies.items()
        )
        run = self.run_flow(
            "import logging\n"
            "def check(name):\n"
            "    time.sleep({'handler': 0.1, 'orphan': 0.2, 'uncounted': 0.2}.get(name, 0))\n"
            "    print('heard'); logging.info('logged')\n"
            "    return [os.getcwd(), 'leaked' in sys.path, len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),\n"
            "            [signal.getsignal(x) for x in (signal.SIGALRM, signal.SIGCHLD)]]\n"
            "with DAG('leftovers', max_active_tasks=1) as dag:\n    last = None\n" + tasks,
            max_workers=1,
        )
        self.assertEqual(set(self.states(run).values()), {"success"}, self.states(run))
        for name in bodies:
            with self.subTest(name):
                found = [os.getcwd(), False, 0, [signal.SIG_DFL] * 2]
                self.assertEqual(run.xcom_pull(f"after_{name}"), found)
                log = run.log(f"after_{name}")
                self.assertIn("heard\n", log)
                self.assertIn("INFO root: logged", log)
                self.assertNotIn("LATE", log)


class Promise5Test(Case):
    """A timeout ends the work: TERM to the worker's process group, KILL after 5 seconds, children
    included."""

    def test_the_task_and_all_its_children_are_gone(self):
        run = self.run_flow(
            """
            import subprocess
            with DAG("family") as dag:
                @task(execution_timeout=0.5)
                def parent():
                    children = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sh", "-c", "sleep 60 & wait"]),
                                subprocess.Popen(["sleep", "60"], process_group=0)]
                    fork = os.fork()
                    if fork == 0: time.sleep(60); os._exit(0)
                    print(os.getpid(), fork, *(c.pid for c in children), flush=True)
                    try: time.sleep(60)
                    finally: print("finally")
                parent()
            """
        )
        self.assertEqual(self.states(run), {"parent": "failed"})
        first, last = run.log("parent").splitlines()
        self.assertEqual(last, "finally")
        for pid in map(int, first.split()):
            self.assertTrue(wait_until(lambda pid=pid: not alive(pid), 2), pid)
        self.assertIn("AirflowTaskTimeout", run.get_task_instance("parent").error)

    def test_it_needs_no_open_file(self):
        import resource

        dag = self.module(
            """
            with DAG("full") as dag:
                @task(execution_timeout=0.1)
                def sleeps(): time.sleep(60)
                sleeps() >> task(trigger_rule="all_done")(os.getpid)()
            """
        ).dag
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        overdue = liteflow._SlotRunner._overdue

        def overdue_where_all_are_open(runner, slot):
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            overdue(runner, slot)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        with mock.patch.object(liteflow._SlotRunner, "_overdue", overdue_where_all_are_open):
            run = dag.run(db_path=self.db, executor=pool())
        self.assertEqual(self.states(run), {"sleeps": "failed", "getpid": "success"})

    def test_who_ignores_it_is_killed_after_the_grace_and_who_catches_it_has_failed(self):
        module = self.module(
            """
            import subprocess
            with DAG("ignores") as ignores:
                @task(execution_timeout=0.2)
                def ignores_it(): signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(60)
                ignores_it()
            with DAG("catches") as catches:
                @task(execution_timeout=0.1)
                def catches_it():
                    trap = 'trap "echo child-term; exit" TERM; touch "$CASE_DIR/listens"; sleep 60 & wait'
                    child = subprocess.Popen(["bash", "-c", trap])
                    try: time.sleep(60)
                    except BaseException: child.wait(); return 1
                catches_it()
            """
        )
        with mock.patch.object(liteflow, "_GRACE", 0.3):
            run = module.ignores.run(db_path=self.db, executor=pool())
        self.assertEqual(self.states(run), {"ignores_it": "failed"})
        self.assertTrue(0.3 <= run.get_task_instance("ignores_it").duration < 0.3 + 4)
        ask = liteflow._Slot.ask_to_end

        def once_it_listens(slot, reason):
            wait_until((self.folder / "listens").exists)
            ask(slot, reason)

        with mock.patch.object(liteflow._Slot, "ask_to_end", once_it_listens):
            caught = module.catches.run(db_path=self.db, executor=pool())
        self.assertEqual(self.states(caught), {"catches_it": "failed"})
        self.assertIn("child-term", caught.log("catches_it"))
        self.assertFalse(alive(int(run.log("ignores_it"))))

    def test_time_counts_from_when_a_worker_took_the_job_and_can_not_be_missed(self):
        run = self.run_flow(
            """
            class Slow:
                def __reduce__(self): return make, ()
            def make(): time.sleep(60); return 1
            with DAG("slow") as dag:
                @task(execution_timeout=0.2)
                def loads(x): return "in time"
                @task(execution_timeout=0.05)
                def late(): time.sleep(30)
                loads(Slow())
                for i in range(8): late()
            """
        )
        self.assertEqual({ti.state for ti in run.get_task_instances()}, {"failed"})
        for ti in run.get_task_instances():
            seconds = 0.2 if ti.task_id == "loads" else 0.05
            self.assertEqual(ti.error.splitlines()[-1], f"timeout after {seconds} s")
            self.assertIn("AirflowTaskTimeout", ti.error)


class Promise6Test(Case):
    """No orphans. When the scheduler dies, by SIGKILL too, its workers and their children are gone
    within 2 seconds."""

    SCRIPT = """
        import os, signal, subprocess, sys, time
        from pathlib import Path
        from liteflow import DAG, task
        HELPED = sys.platform == "linux"  # elsewhere a thread of the worker has to run
        def note(*pids):
            for pid in pids: Path(f"pid-{pid}").touch()
        with DAG("orphans") as dag:
            @task
            def sleeps(): note(os.getpid()); time.sleep(60)
            @task
            def stopped(): note(os.getpid()); os.kill(os.getpid(), signal.SIGSTOP if HELPED else 0); time.sleep(60)
            @task
            def forks():
                child = os.fork()
                note(os.getpid()); time.sleep(60)
            @task
            def runs(): note(os.getpid(), subprocess.Popen(["sleep", "60"]).pid); time.sleep(60)
            @task
            def keeps_the_gil(): note(os.getpid()); pow(3, 10**9 if HELPED else 1); time.sleep(60)
            @task
            def ignores():
                signal.signal(signal.SIGTERM, signal.SIG_IGN); note(os.getpid()); time.sleep(60)
            for f in (sleeps, stopped, forks, runs, keeps_the_gil, ignores): f()
            @task
            def queued(): Path("queued-ran").touch()
            for i in range(10): queued()
        if __name__ == "__main__":
            dag.run(max_workers=6, mp_context=sys.argv[1] if sys.argv[1:] else None)
    """

    def pids(self):
        return [int(p.name[4:]) for p in self.folder.iterdir() if p.name.startswith("pid-")]

    def test_nobody_outlives_a_killed_scheduler(self):
        self.script(self.SCRIPT)
        for method in ([], ["fork"], ["forkserver"], ["spawn"]):  # the first: forked from it
            with self.subTest(method=method):
                for path in self.folder.glob("pid-*"):
                    path.unlink()
                process = self.start("-W", "ignore", "my_flow.py", *method)
                self.assertTrue(wait_until(lambda: len(self.pids()) >= 8), self.pids())
                process.kill()
                process.wait()
                gone = wait_until(lambda: not any(map(alive, self.pids())), 2.0)
                self.assertTrue(gone, [pid for pid in self.pids() if alive(pid)])
                self.assertFalse((self.folder / "queued-ran").exists())

    def test_a_host_that_forks_does_not_keep_them_alive(self):
        self.script(
            """
            import os, sys, time
            from pathlib import Path
            from liteflow import DAG, WorkerPool, task
            with DAG("host") as dag:
                @task
                def f(): return os.getpid()
                f()
            if __name__ == "__main__":
                with WorkerPool(1) as pool:
                    pid = dag.run(executor=pool).xcom_pull("f")
                    if os.fork() == 0:
                        print(dag.run(executor=pool, db_path="child.db").state, flush=True)
                        time.sleep(60)
                    Path(f"pid-{pid}").touch()
                    time.sleep(60)
            """
        )
        process = self.start("-W", "ignore::DeprecationWarning", "my_flow.py")
        self.assertEqual(process.stdout.readline(), "success\n")
        self.assertTrue(wait_until(self.pids))
        process.kill()
        self.assertTrue(wait_until(lambda: not alive(self.pids()[0]), 2.0))


class Promise7Test(Case):
    """A wrong graph, an unknown task, a function or argument that cannot reach a worker is refused
    before anything runs, and nothing is written."""

    def test_each_is_refused_and_no_file_is_made(self):
        for source, kind, words in (
            ("a = task(task_id='a')(sorted)([1]); a >> a", AirflowDagCycleException, ["a -> a"]),
            ("task(task_id='x')(lambda: 1)()", None, []),
            ("def f(): pass\n    f.__qualname__ = 'elsewhere'\n    task(f)()", None, []),
            ("task(task_id='x')(sorted)(lambda: 1)", UnreachableTask, ["'x'", "function"]),
            (
                "import threading; task(task_id='x')(print)(end=threading.Lock())",
                UnreachableTask,
                ["'x'", "'end'", "lock"],
            ),
            (
                "import collections; r = task(task_id='r')(sorted)([1]); "
                "task(task_id='x')(print)(collections.deque([r]))",
                UnreachableTask,
                ["'x'", "'r'"],
            ),
        ):
            with self.subTest(source=source):
                module = self.module(f"with DAG('refused') as dag:\n    {source}\n")
                if kind is None:  # found by its task id, since the module builds the DAG
                    self.assertEqual(
                        module.dag.run(db_path=self.db, executor=pool()).state, "success"
                    )
                    self.assert_nothing_left()
                    self.db.unlink()
                    continue
                with self.assertRaises(kind) as caught:
                    module.dag.run(db_path=self.db, executor=pool())
                for word in words:
                    self.assertIn(word, str(caught.exception))
                self.assertEqual([p.name for p in self.folder.iterdir() if ".db" in p.name], [])

    def test_a_dag_that_no_import_builds(self):
        with DAG("local") as local:
            task(task_id="hidden")(lambda: 1)()
        with self.assertRaises(UnreachableTask) as caught:
            local.run(db_path=self.db, executor=pool())
        self.assertIn("'hidden'", str(caught.exception))
        self.assertFalse(self.db.exists())

    def test_a_module_that_is_gone_or_breaks(self):
        for change, word in (("", "can't be found"), ("raise ValueError('broken')", "broken")):
            module = self.module("with DAG('m') as dag:\n    @task\n    def f(): pass\n    f()\n")
            Path(module.__file__).write_text(change)
            with self.subTest(change=change), self.assertRaises(UnreachableTask) as caught:
                module.dag.run(db_path=self.db, max_workers=1)
            self.assertIn(word, str(caught.exception))
        self.assertFalse(self.db.exists())

    def test_no_process_can_be_started(self):
        module = self.module("with DAG('m') as dag:\n    task(task_id='a')(sorted)([1])\n")

        def refuse(*_):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        made = WorkerPool(1)
        refused = mock.patch.object(liteflow._Slot, "_start", refuse)
        with refused, self.assertRaises(UnreachableTask) as caught:
            module.dag.run(db_path=self.db, executor=made)
        self.assertEqual(made._count, 0)  # there is room for it in a later run
        self.assertIn("no worker process could be started", str(caught.exception))
        self.assertIn("its limit of processes is reached (ulimit -u", str(caught.exception))


class Promise8Test(Case):
    """Looking never executes and never writes: no command that reads unpickles or changes
    anything."""

    LOOKS = (
        ("list",),
        ("list", "--json"),
        ("runs",),
        ("runs", "--json"),
        ("show", "evil"),
        ("show", "evil", "--json"),
        ("show", "evil", "x"),
        ("show", "evil", "x", "--json"),
        ("logs", "evil"),
        ("logs", "evil", "x"),
        ("visualize", "evil"),
        ("page",),
        ("page", "evil"),
        ("page", "evil/r"),
    )

    def hostile(self, text):
        """A database whose every text and blob is an attack."""
        import pickle

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch '{self_folder}/executed'",)

        self_folder = self.folder
        payload = pickle.dumps(Evil())
        run = self.run_flow(
            "with DAG('evil') as dag:\n    @task\n    def x(): print(1); return 1\n    x()\n"
        )
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as db:
            db.execute("PRAGMA foreign_keys=OFF")
            db.execute("PRAGMA ignore_check_constraints=ON")
            value = payload.decode("latin-1") if text is None else text
            db.execute(
                "UPDATE dag SET description=?1, fileloc=?1, doc_md=?1, tags=?1, schedule=?1",
                (value,),
            )
            db.execute(
                "UPDATE dag_run SET reason=?1, logical_date=?1, start_date=?1, end_date=?1, conf=?1, "
                "owner=?1, owner_process=?1, command=?1, resumed_date=?1, state='running'",
                (value,),
            )
            db.execute(
                "UPDATE task_instance SET upstream_task_ids=?1, takes=?1, flow=?1, state=?1, "
                "element=?1, element_preview=?1, task_group_id=?1, role=?1",
                (value,),
            )
            db.execute(
                "UPDATE task_attempt SET state=?1, start_date=?1, end_date=?1, error=?1", (value,)
            )
            db.execute("UPDATE task_log SET text=?", (value,))
            db.execute("UPDATE xcom SET type=?1, preview=?1, value=?2", (value, payload))
            db.execute(
                "CREATE TRIGGER t AFTER UPDATE ON dag_run BEGIN DELETE FROM task_instance; END"
            )
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return run

    def look(self, argv):
        """(exit code, output, errors) of a command, run in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = liteflow.main([*argv, "--db", str(self.db)])
        return code, out.getvalue(), err.getvalue()

    def test_hostile_contents(self):
        opened = []
        watching = True
        sys.addaudithook(
            lambda event, args: (
                opened.append(str(args[0])) if watching and event == "sqlite3.connect" else None
            )
        )
        for text in (
            None,
            "\x1b]0;owned\x07\x1b[31m<script>alert(1)</script>|`x`\r\nnext",
            "9" * 100_000,
        ):
            self.db.unlink(missing_ok=True)
            self.hostile(text)
            opened.clear()
            before = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
            for argv in self.LOOKS:
                with self.subTest(argv=argv, text=text and text[:20]):
                    code, out, err = self.look(argv)
                    self.assertIn(code, (0, 2, 3), err)
                    for stream in (out, err):
                        self.assertNotRegex(stream, "[\x00-\x08\x0b-\x1f\x7f\x9b]")
            after = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
            self.assertEqual(after, before)
            self.assertEqual([uri for uri in opened if "mode=ro" not in uri], [])
        watching = False
        self.assertFalse((self.folder / "executed").exists())

    def test_what_a_killed_writer_left_stays_as_it_is(self):
        self.run_flow("with DAG('w') as dag:\n    task(task_id='a')(sorted)([1])\n")
        with contextlib.closing(sqlite3.connect(self.db)) as writer, writer:
            writer.execute("UPDATE dag SET description = 'in the wal'")
            writer.commit()
            left = self.folder / "left"
            left.mkdir()
            for name in ("flow.db", "flow.db-wal", "flow.db-shm"):
                shutil.copy(self.folder / name, left)
        self.db = left / "flow.db"
        before = [(left / name).read_bytes() for name in ("flow.db", "flow.db-wal")]
        for argv in (("list",), ("runs",), ("show", "w"), ("logs", "w"), ("page", "w")):
            code, _, err = self.look(argv)
            self.assertEqual(code, 0, err)
            after = [(left / name).read_bytes() for name in ("flow.db", "flow.db-wal")]
            self.assertEqual(after, before)
        self.assertEqual(Dag.load("w", self.db).description, "in the wal")

    def test_a_view_in_a_tables_place_is_refused(self):
        self.hostile("x")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("PRAGMA foreign_keys=OFF")
            db.execute("DROP TABLE dag_run")
            db.execute(
                "CREATE VIEW dag_run AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
                "SELECT i AS id, i AS dag_id FROM n"
            )
        for argv in self.LOOKS:
            with self.subTest(argv=argv):
                code, _, err = self.look(argv)
                self.assertEqual(code, 3, err)
                self.assertIn("no table 'dag_run'", err)

    def test_what_computes_or_is_virtual_in_a_tables_place_is_refused(self):
        self.hostile("x")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            [sql] = db.execute("SELECT sql FROM sqlite_master WHERE name = 'dag_run'").fetchone()
            db.execute("PRAGMA writable_schema=ON")
            db.execute(  # each reading of it takes an hour, in which Ctrl-C is not heard
                "UPDATE sqlite_master SET sql = ? WHERE name = 'dag_run'",
                (
                    sql.replace(
                        "reason TEXT",
                        "reason TEXT AS (instr(printf('%.*c', 9000000, 'a'), "
                        "printf('%.*c', 4000000, 'a') || 'b'))",
                    ),
                ),
            )
        code, _, err = self.look(["runs"])
        self.assertEqual(code, 3, err)
        self.assertIn("no table 'dag_run'", err)
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("PRAGMA writable_schema=ON")
            db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'dag_run'", (sql,))
            db.execute("DROP TABLE xcom_item")
            db.execute("CREATE VIRTUAL TABLE xcom_item USING dbstat(main)")
        self.assertIn("no table 'xcom_item'", self.look(["runs"])[2])

    def test_a_command_to_paste_is_one_line(self):
        self.run_flow(
            """
            with DAG('evil') as dag:
                @task
                def x(): raise ValueError
                x()
            """
        )
        told = "x\ntouch pwned #\n"
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE dag_run SET run_id = ?1, command = 'go ' || ?1", (told,))
            db.execute("UPDATE task_instance SET task_id = ?", (told,))
        [run] = Dag("evil").runs(self.db)
        commands = [*liteflow._way_on(run, run.get_task_instances()).values()]
        commands += [x.more for x in liteflow._failures_of(run, run.get_task_instances(), 9)]
        self.assertEqual(len(commands), 2)
        for command in commands:
            self.assertIn("touch pwned", command)
            self.assertNotIn("\n", command)

    def test_hostile_numbers_and_lists(self):
        for table, column, value in (
            ("dag", "tags", "[[], {}]"),
            ("dag_run", "seconds", float("inf")),
            ("dag_run", "seconds", -float("inf")),
            ("task_instance", "try_number", -1),
            ("task_instance", "map_index", -(2**63)),
        ):
            self.run_flow(
                """
                with DAG('evil') as dag:
                    @task
                    def x(): raise ValueError
                    x()
                """
            )
            with contextlib.closing(sqlite3.connect(self.db)) as db, db:
                db.execute(f"UPDATE {table} SET {column} = ?", (value,))
            for argv in self.LOOKS:
                with self.subTest(argv=argv, column=column, value=value):
                    code, _, err = self.look(argv)
                    self.assertIn(code, (0, 2), err)
            self.db.unlink()

    def test_a_reader_does_not_write_beside_a_writer(self):
        self.run_flow("with DAG('w') as dag:\n    task(task_id='a')(sorted)([1])\n")
        with contextlib.closing(sqlite3.connect(self.db)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE dag SET description = 'changing'")
            self.assertEqual(Dag.load("w", self.db).description, None)
            writer.commit()
            self.assertEqual(Dag.load("w", self.db).description, "changing")


class Promise9Test(StoreCase):
    """A file that is not ours, or is newer than us, is refused and left byte for byte as it
    was."""

    def test_text_and_garbage(self):
        for content in (b"hello\n" * 200, b"ab", b"a", b"SQLite format 3\0" + bytes(5000)):
            with self.subTest(content=content[:10]):
                self.db.write_bytes(content)
                self.assert_refused(str(self.db))

    def test_another_applications_file(self):
        for setup in ("CREATE TABLE t (x)", "PRAGMA application_id = 7", "PRAGMA user_version = 3"):
            with self.subTest(setup=setup):
                self.db.unlink(missing_ok=True)
                with contextlib.closing(sqlite3.connect(self.db)) as db:
                    db.execute("CREATE TABLE IF NOT EXISTS x (y)")
                    db.execute(setup)
                    db.commit()
                self.assert_refused("another application's")

    def test_a_newer_one(self):
        self.small()
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA user_version = 99")
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.assert_refused("newer liteflow (99 > 2)")

    def test_one_of_before_the_first_release(self):
        self.small()
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA user_version = 1")
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.assert_refused("0.1.0", "choose another path")

    def test_a_truncated_one(self):
        self.small()
        whole = self.db.read_bytes()
        for size in (1, 100, 4096, len(whole) // 2, len(whole) - 1):
            with self.subTest(size=size):
                self.db.write_bytes(whole[:size])
                with contextlib.suppress(DatabaseError):
                    Dag("small").runs(self.db)
                self.assertEqual(self.db.read_bytes(), whole[:size])


class Promise10Test(Case):
    """Many schedulers share one file; none fails with "database is locked"."""

    def test_a_task_may_end_while_the_file_is_locked(self):
        """The run ended with "the plan is stuck", or without the last task's log."""
        module = self.module(
            """
            import os, time
            from liteflow import DAG, task
            with DAG("d") as dag:
                @task
                def first(params, said="first"):
                    while not os.path.exists(params["folder"] + "/locked-" + said): time.sleep(0.01)
                    print(said)
                @task
                def second(params): first.function(params, "second")
                first() >> second()
            """
        )
        with_log, record = [], liteflow._Store.record

        def locked_until_it_ends(store, batch, *check):
            for a in batch.attempts:
                if a.state == "running":
                    (self.folder / f"locked-{a.instance.task_id}").touch()
                    raise liteflow._Busy
            record(store, batch, *check)
            logged = {a for a, _, _ in batch.logs}
            with_log.extend(a in logged for a in batch.attempts if a.ended)

        with mock.patch.object(liteflow._Store, "record", locked_until_it_ends):
            conf = {"folder": str(self.folder)}
            run = module.dag.run(db_path=self.db, executor=pool(), conf=conf)
        self.assertEqual(run.state, "success")
        self.assertEqual(with_log, [True, True])
        self.assertEqual((run.log("first"), run.log("second")), ("first\n", "second\n"))

    def test_twenty_processes_create_and_use_one_file(self):
        tasks = 50 if SOAK else 6
        self.script(
            """
            import os, sys
            from liteflow import DAG, task
            def made(name):
                with DAG(name) as dag:
                    @task
                    def f(i): return i
                    for i in range({tasks}): f(i)
                return dag
            dags = [made(f"dag{i}") for i in range(20)]
            if __name__ == "__main__":
                for dag in dags:
                    if not os.fork():
                        run = dag.run(db_path="shared.db", max_workers=1)
                        assert sorted(x.value for x in run.xcoms()) == list(range({tasks}))
                        sys.exit(0)
                sys.exit(sum(os.wait()[1] != 0 for _ in dags))
            """.replace("{tasks}", str(tasks))
        )
        self.db = self.folder / "shared.db"
        done = self.python("my_flow.py", timeout=LIMIT * 2)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(
            self.query("SELECT count(*), min(state) FROM task_instance"), [(20 * tasks, "success")]
        )
        self.assertEqual(self.query("PRAGMA integrity_check"), [("ok",)])
        self.assert_nothing_left()

    def test_a_file_that_somebody_died_creating_is_taken(self):
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.execute("PRAGMA journal_mode=WAL")
        self.assertEqual(DAG("d").run(db_path=self.db).state, "success")

    def test_a_reader_that_holds_its_snapshot_disturbs_nobody(self):
        DAG("d").run(db_path=self.db)
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM dag_run").fetchall()
            run = self.run_flow(
                "with DAG('e') as dag:\n    for i in range(30): task(sorted)([i])\n"
            )
            self.assertEqual(run.state, "success")
            self.assertEqual(len(reader.execute("SELECT * FROM dag_run").fetchall()), 1)

    def test_a_file_that_is_deleted_during_the_run_is_said(self):
        with self.assertRaises(DatabaseError) as caught:
            self.run_flow(
                """
                with DAG("deleted") as dag:
                    @task
                    def deletes(): os.unlink(os.environ["CASE_DIR"] + "/flow.db"); time.sleep(30)
                    deletes()
                """
            )
        self.assertIn("deleted or replaced", str(caught.exception))


class Promise11Test(Case):
    """Importing is free: no logging set up, no file, no signal handler, nothing started."""

    def test_importing_changes_nothing(self):
        self.script(
            """
            import logging, os, signal, sys, threading
            def state():
                return [threading.active_count(), os.listdir("/dev/fd"), list(logging.root.handlers),
                        [signal.getsignal(s) for s in signal.valid_signals()], sorted(os.listdir("."))]
            sys.dont_write_bytecode = True
            before = state()
            few = {"argparse", "asyncio", "inspect", "pathlib", "typing"} - set(sys.modules)
            heavy = {"sqlite3", "multiprocessing", "concurrent.futures", *few} - set(sys.modules)
            import liteflow
            assert state() == before, state()
            print(sorted(heavy & set(sys.modules)))

            @liteflow.dag
            def plain(last=2):
                @liteflow.task
                def rows(last: int, ti) -> dict:
                    return {"last": last}
                @liteflow.task_group
                def group(of):
                    liteflow.task(task_id="same")(lambda x: x)(of)
                group(rows(last)["last"])

            made = plain()
            if __name__ == "__main__":
                made.run(db_path="flow.db").raise_if_failed()
                print(sorted(few & set(sys.modules)))
            """
        )
        done = self.python("my_flow.py")
        self.assertEqual((done.returncode, done.stdout), (0, "[]\n[]\n"), done.stderr)

    def test_building_a_dag_touches_nothing(self):
        seen = []
        sys.addaudithook(
            lambda event, args: (
                seen.append((event, args))
                if watching and event in ("open", "sqlite3.connect", "subprocess.Popen", "os.fork")
                else None
            )
        )
        watching = True
        with DAG("pure", db_path=self.db):
            task(task_id="a")(sample)(1) >> task(task_id="b")(sample)(2)
        watching = False
        self.assertEqual(seen, [])


class Promise12Test(Case):
    """One file holds everything that a run leaves; once the last process that uses it has left in
    order, there is no -wal or -shm beside it."""

    def test_a_run_leaves_one_file(self):
        path = self.script(
            """
            from liteflow import DAG, task
            import os
            with DAG("one", db_path="flow.db") as dag:
                @task(retries=1)
                def f(i, ti):
                    print("x" * 100_000)
                    if ti.try_number == 1: os._exit(1)
                    return b"x" * 100_000
                for i in range(3): f(i)
            if __name__ == "__main__":
                dag.cli()
            """
        )
        elsewhere = Path(tempfile.mkdtemp(dir=self.folder))
        with mock.patch.dict(os.environ, TMPDIR=str(elsewhere)):
            done = self.python(path)
        self.assertEqual(done.returncode, 0, done.stderr)
        left = {p.name for p in self.folder.iterdir() if p.suffix != ".py"} - {"__pycache__"}
        self.assertEqual(left, {"flow.db", elsewhere.name})
        self.assertEqual(os.listdir(elsewhere), [])

    def test_two_that_close_at_once_leave_one_file(self):
        class Closing:
            """A connection that another process has the file open beside until it is closed."""

            def __getattr__(self, name):
                return getattr(real, name)

            def close(self):
                real.close()
                other.kill()
                other.communicate()

        store = liteflow._Store(str(self.db))
        real, store._connection = store._connection, Closing()
        source = "db = sqlite3.connect(sys.argv[1])\nprint(*db.execute('SELECT 1 FROM dag'))\n"
        path = self.script(f"import sqlite3, sys, time\n{source}sys.stdout.flush()\ntime.sleep(99)")
        other = self.start(path, self.db)
        other.stdout.readline()
        store.close()
        self.assert_nothing_left()

    def test_a_ctrl_c_as_the_file_is_closed_leaves_one_file(self):
        store = liteflow._Store(str(self.db))
        with (
            mock.patch.object(store, "transaction", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            store.close()
        self.assert_nothing_left()

    def test_a_full_disk_leaves_no_folder_without_its_mark(self):
        def full(file, data):
            raise OSError(28, "No space left on device")

        files = os.listdir("/dev/fd")
        with mock.patch.object(os, "write", full), self.assertRaises(liteflow.DatabaseError):
            liteflow._owned_folder(str(self.db)).__enter__()
        self.assertEqual([p for p in self.folder.iterdir() if "-run-" in p.name], [])
        self.assertEqual(os.listdir("/dev/fd"), files)

    def test_a_limit_of_open_files_leaves_no_folder_without_its_mark(self):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        with self.assertRaisesRegex(liteflow.DatabaseError, "Too many open files"):
            liteflow._owned_folder(str(self.db)).__enter__()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.assertEqual([p for p in self.folder.iterdir() if "-run-" in p.name], [])

    def test_what_a_killed_run_left_is_swept_by_the_next(self):
        import fcntl

        names = ("0123456789abcdef", "fedcba9876543210", "1111111111111111")
        dead, alive_one, foreign = (self.folder / f"flow.db-run-{name}" for name in names)
        for folder in (dead, alive_one, foreign):
            folder.mkdir()
            (folder / "owner").write_text('{"liteflow": "x"}' if folder != foreign else "{}")
            (folder / "log-1").write_text("x")
        with (alive_one / "owner").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            DAG("d").run(db_path=self.db)
        self.assertFalse(dead.exists())
        for folder in (alive_one, foreign):
            self.assertEqual(sorted(p.name for p in folder.iterdir()), ["log-1", "owner"])
        DAG("d").run(db_path=self.db)
        self.assertFalse(alive_one.exists())
        self.assertTrue(foreign.exists())

    def test_what_a_power_cut_left_is_swept_by_the_next(self):
        """The folder's names were on the disk, and nothing of what was written yet."""
        for name, left in (("0123456789abcdef", b""), ("fedcba9876543210", bytes(23))):
            folder = self.folder / f"flow.db-run-{name}"
            folder.mkdir()
            (folder / "owner").write_bytes(left)
            (folder / "log-1").write_bytes(b"")
            DAG("d").run(db_path=self.db)
            self.assertFalse(folder.exists())


# --- The examples, the README's code, the shape of the file ---------------------------------------


class ExamplesTest(Case):
    examples = HERE / "examples"

    def example(self, name, *argv, code=0):
        os.environ["LITEFLOW_DB"] = str(self.db)
        self.addCleanup(os.environ.pop, "LITEFLOW_DB", None)
        done = self.python(self.examples / f"{name}.py", *argv)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assert_nothing_left()
        return done

    def load(self, name):
        spec = importlib.util.spec_from_file_location(name, self.examples / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def pids(self):
        return {pid for (pid,) in self.query("SELECT pid FROM task_attempt")}

    def test_stdlib_census(self):
        """Of a package, as all of it takes seconds."""
        source = (self.examples / "stdlib_census.py").read_text()
        if not SOAK:
            part = repr(os.path.dirname(asyncio.__file__))
            source = source.replace('sysconfig.get_path("stdlib")', part)
        self.examples = self.folder / "examples"
        self.examples.mkdir()
        self.script(source, "examples/stdlib_census.py")
        self.example("stdlib_census", "--max-workers", "2")
        [run] = Dag("stdlib_census").runs(self.db)
        self.assertIn("checked against one plain pass", run.log("check"))  # or else it fails
        totals = run.xcom_pull("sum_up")["totals"]
        plainly = self.load("stdlib_census").count_plainly()
        self.assertEqual(totals, plainly["totals"])
        self.assertGreater(totals["modules"], 20)
        self.assertIn("| functions |", (self.folder / "census" / "report.md").read_text())
        with contextlib.closing(sqlite3.connect(self.folder / "census" / "census.db")) as table:
            rows = dict(table.execute("SELECT module, times FROM imported"))
        self.assertEqual(rows, plainly["imported"])
        self.assertGreater(len(self.pids()), 1)

    def test_complex_workflow(self):
        self.example("complex_workflow", "--quiet")
        [run] = Dag("layered_dag_171").runs(self.db)
        self.assertEqual(len(run.get_task_instances()), 171)
        self.assertEqual(run.xcom_pull("summarize"), self.load("complex_workflow").expected_total())
        drawn = self.cli_here("visualize", "layered_dag_171", "--db", self.db)
        check_mermaid(self, drawn.stdout)
        self.assertEqual((drawn.stderr, drawn.stdout.count(" --> ")), ("", 250))

    def test_embedded(self):
        done = self.example("embedded", "--runs", "1000" if SOAK else "20")
        self.assertIn("over HTTP: 13\nfrom asyncio: [5, 6, 7, 8]\n", done.stdout)
        self.assertIn("left nothing behind", done.stdout)

    def test_dask_cluster_is_a_dag_like_any(self):
        """The cluster itself is not here; its DAG is, and another executor."""
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            module = self.load("dask_cluster")
            numbers = module.dag.task_dict["numbers"]
            self.assertEqual(numbers.python_callable(), list(range(10)))
            with (
                self.assertRaises(ImportError)
                if not importlib.util.find_spec("dask")
                else (contextlib.nullcontext())
            ):
                module.main(db_path=str(self.db))
            executor.shutdown()

    def test_benchmark(self):
        only = [x for name in ("again", "layered", "look") for x in ("--only", name)]
        done = self.example("benchmark", "--rounds", "1", "--json", *only)
        rows = json.loads(done.stdout)["rows"]
        self.assertEqual([row["name"] for row in rows], ["again", "layered", "look"])
        self.assertTrue(all(row["liteflow"] > 0 for row in rows))

    def test_retries(self):
        self.example("retries", code=1)
        [run] = Dag("retries").runs(self.db)
        self.assertEqual(
            {t.task_id: t.try_number for t in run.get_task_instances()},
            {"flaky": 3, "hopeless": 1, "slow": 2, "summary": 1},
        )
        self.assertEqual(run.xcom_pull("summary"), "downloaded at try 3; slow took 2 tries")
        self.assertEqual(run.log("slow", try_number=1), "cleaned up\n")

    def test_airflow_etl(self):
        self.example("airflow_etl")
        [run] = Dag("airflow_etl").runs(self.db)
        self.assertEqual(run.xcom_pull("sum_up"), 50)
        self.assertEqual(self.states(run)["stay_quiet"], "skipped")
        self.assertEqual(run.xcom_pull("announce"), "a good day")
        check_mermaid(self, self.cli_here("visualize", "airflow_etl", "--db", self.db).stdout)

    def test_branches(self):
        self.example("branches")
        [run] = Dag("branches").runs(self.db)
        self.assertEqual(self.states(run)["report_records"], "skipped")
        self.assertEqual(run.xcom_pull("publish"), ["books: 2 orders, 42", "tickets: 1 orders, 5"])


class ReadmeTest(Case):
    def blocks(self, language):
        return re.findall(
            rf"^```{language}\n(.*?)^```",
            (HERE / "README.md").read_text(),
            re.DOTALL | re.MULTILINE,
        )

    def test_every_python_block_runs(self):
        self.assertGreaterEqual(len(self.blocks("python")), 3)
        copy_liteflow(self.folder)
        (self.folder / "my_workflow.py").write_text(self.cli_here("scaffold").stdout)
        running = {}
        for i, block in enumerate(self.blocks("python")):
            self.script(
                block
                if "__main__" in block
                else block + 'if __name__ == "__main__":\n    dag.cli(["--graph"])\n',
                f"block{i}.py",
            )
            running[block] = self.start(f"block{i}.py")
        for block, process in running.items():
            with self.subTest(block=block):
                _, err = process.communicate(timeout=LIMIT)
                self.assertEqual(process.returncode, 0, err)

    def test_the_first_command_works_in_an_empty_folder(self):
        copy_liteflow(self.folder)
        first = self.blocks("sh")[0].replace("python3", sys.executable)
        done = subprocess.run(
            first,
            shell=True,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        self.assertIn("4 success", done.stderr)
        left = {p.name for p in self.folder.iterdir()} - {"__pycache__"}
        self.assertEqual(left, {"liteflow.py", "my_workflow.py", "liteflow.db"})
        others = [b for b in self.blocks("sh")[1:] if "unittest" not in b]  # which runs this
        self.assertGreaterEqual(len(others), 3)

        def works(line):
            command = line.split("#")[0].replace("python3", sys.executable)
            subprocess.run(command, shell=True, cwd=self.folder, capture_output=True, check=True)

        for block in others:
            at_once = 2 if "my_workflow.py" not in block else 1  # looks don't disturb each other
            with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
                [*threads.map(works, block.splitlines())]

    def test_what_it_shows_is_what_is_seen(self):
        """The sample session is what the commands print, times and process ids apart."""

        def alike(text):
            for place in (self.folder, HERE):
                for path in (str(place), str(place).replace("'", "'\"'\"'")):  # as a shell has it
                    text = text.replace(path, "/srv/etl")
            text = text.replace("'", "")
            text = re.sub(r"\S*\d\d:\d\d:\d\d\S*", "<time>", text)
            text = re.sub(r"\S*/(\w+)\.(py|db)", r"\1.\2", text)
            text = re.sub(r"\S*/py(thon|py)[\d.]*t?", "python", text)
            text = re.sub(r"&?#60;1 ms|<1 ms|\d+ ms|\d\.\d s|\b\d{2,}\b", "<n>", text)
            return re.sub(r" +", " ", text)

        copy_liteflow(self.folder)
        self.python(HERE / "examples" / "retries.py", "--db", "liteflow.db")
        [session] = self.blocks("console")
        [diagram] = self.blocks("mermaid")
        check_mermaid(self, diagram)
        parts = [part.partition("\n") for part in session.split("$ python3 ")[1:]]
        parts.append(("-m liteflow visualize retries", "", diagram))
        running = [self.start(*command.split("#")[0].split()) for command, _, _ in parts]
        for (command, _, shown), process in zip(parts, running, strict=True):
            seen, _ = process.communicate(timeout=LIMIT)
            seen = seen.replace(os.path.realpath(self.folder), "/srv/etl")
            self.assertEqual(alike(seen), alike(shown), command)

    def test_the_sql_runs(self):
        self.run_flow("with DAG('d') as dag:\n    task(task_id='a')(sorted)([2, 1])\n")
        [block] = self.blocks("sql")
        self.assertEqual(
            [(r[1], r[2], r[4]) for r in self.query(block)], [("a", "success", "[1, 2]")]
        )

    def test_the_reference_names_what_there_is(self):
        text = (HERE / "README.md").read_text()
        reference = text[text.index("## Reference") : text.index("## Limits")]
        self.assertLessEqual(reference.count("\n"), 120)
        self.assertLess(text.count("\n"), 650)
        tables = re.findall(r"^\| \| default \| \|\n(.*?)\n\n", reference, re.DOTALL | re.MULTILINE)
        first = [" ".join(row.split("|")[1] for row in table.splitlines()[1:]) for table in tables]
        dag, own, run = (re.findall(r"`(\w+)`( \*)?", cells) for cells in first)

        for named, table in (
            (dag, liteflow._DAG_SETTINGS),
            (own, liteflow.BaseOperator._known_settings),
        ):
            known = {n for n, setting in table.items() if setting is not liteflow._as_given}
            self.assertEqual({name for name, _ in named}, known)
        known = {*inspect.signature(Dag.run).parameters} - {"self"}
        self.assertEqual({name for name, _ in run}, known)
        taken = "db_path run_id logical_date conf resume pools progress stop".split()
        self.assertEqual([name for name, star in run if star], taken)
        for name in re.findall(r"`(\w+)(?:\(.*?\))?`", reference[reference.index("`DagRun`:") :]):
            if name not in ("DagRun", "TaskInstance"):
                self.assertTrue(
                    hasattr(self.a_run(), name) or hasattr(self.a_run(True), name), name
                )

    def a_run(self, instance=False):
        if not self.db.exists():
            with DAG("d") as d:
                task(task_id="f")(one_argument)()
            d.test(db_path=self.db)
        run = Dag("d").runs(self.db)[0]
        return run.get_task_instances()[0] if instance else run

    def test_the_table_of_the_subset_is_true(self):
        rows = dict(
            re.findall(r"^\| ([a-z ]+) \| (.+) \|$", (HERE / "README.md").read_text(), re.M)
        )
        names = {key: re.findall(r"`(\w+)`", text) for key, text in rows.items()}
        for name in names["built"]:
            self.assertIn(name, liteflow.__all__)
        errors = {
            n
            for n in liteflow.__all__
            if isinstance(getattr(liteflow, n), type)
            and issubclass(getattr(liteflow, n), BaseException)
        }
        own = {"Dag", "DagRun", "WorkerPool", "XCom", "main"}
        self.assertEqual(set(liteflow.__all__) - errors - own - set(names["built"]), set())
        ignored = {
            n
            for table in (liteflow.BaseOperator._known_settings, liteflow._DAG_SETTINGS)
            for n, setting in table.items()
            if setting is liteflow._as_given
        }
        kept = {"schedule", "start_date", "end_date", "catchup"}
        self.assertEqual(set(names["accepted and ignored"]) - kept, ignored - kept)
        for name in names["not here"]:
            self.assertFalse(hasattr(liteflow, name), name)
        with DAG("d"):
            for name in names["refused"]:
                with self.assertRaises(ValueError):
                    task(**{name: True})(sample)(1)

    def test_every_command_is_named(self):
        text = (HERE / "README.md").read_text()
        names = re.findall(r"^(\w+): ", liteflow._COMMANDS, re.MULTILINE)
        self.assertGreater(len(names), 10)
        for name in names:
            self.assertIn(f"liteflow {name}", text)


class ShapeTest(unittest.TestCase):
    """The file is built as it says: its sections, the homes of SQL and pickle, its imports."""

    @classmethod
    def setUpClass(cls):
        cls.source = (HERE / "liteflow.py").read_text()
        cls.tree = ast.parse(cls.source)
        cls.nodes = [*ast.walk(cls.tree)]
        lines = enumerate(cls.source.splitlines(), 1)
        cls.heads = [(n, t) for n, t in lines if t.startswith("# --- ")]

    def section_of(self, line):
        heads = reversed(self.heads)
        return next((t.strip("# -").split(":")[0] for n, t in heads if n <= line), "")

    def test_the_sections_stand_in_order(self):
        names = [self.section_of(n) for n, _ in self.heads]
        order = [
            "Errors and states",
            "Building",
            "Plan",
            "Store",
            "Values",
            "Worker",
            "Runners",
            "Run",
            "Reading back",
            "Showing",
            "Command line",
        ]
        self.assertEqual(list(dict.fromkeys(names)), order)

    def test_sql_has_one_home(self):
        for node in self.nodes:
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.match(
                    r"\s*(SELECT|INSERT|UPDATE|DELETE FROM|CREATE|PRAGMA|BEGIN IMMEDIATE)\s",
                    node.value,
                )
            ):
                self.assertEqual(self.section_of(node.lineno), "Store", node.value[:60])

    def test_pickle_has_one_home(self):
        for node in self.nodes:
            if isinstance(node, ast.Import) and any(a.name == "pickle" for a in node.names):
                self.assertEqual(self.section_of(node.lineno), "Values")

    def test_only_the_standard_library_is_imported(self):
        def statements(of):
            """All of them: where expressions are left out, which import nothing."""
            for name in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = getattr(of, name, [])
                for node in inner if isinstance(inner, list) else []:
                    yield node
                    yield from statements(node)

        for tree in (self.tree, ast.parse((HERE / "test_liteflow.py").read_text())):
            for node in statements(tree):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for module in names:
                    self.assertIn(module.split(".")[0], {*sys.stdlib_module_names, "liteflow"})

    def test_what_a_type_checker_sees_is_there_once_it_is_used(self):
        seen = next(
            n
            for n in self.tree.body
            if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
        )
        names = [a.name for n in seen.orelse if isinstance(n, ast.Import) for a in n.names]
        self.assertIn("sqlite3", names)
        self.assertLessEqual({n.partition(".")[0] for n in names}, vars(liteflow).keys())

    def test_a_type_checker_sees_the_states_values(self):
        # Made by a call, they are numbers to pyright, and `state == "success"` never true.
        classes = {n.name: n for n in self.tree.body if isinstance(n, ast.ClassDef)}
        for name in ("TaskInstanceState", "DagRunState", "TriggerRule", "WeightRule"):
            self.assertIn(name, classes)
            for member in getattr(liteflow, name):
                self.assertEqual(member.value, member.name.lower())
                self.assertIn(repr(member.value), ast.unparse(classes[name]))

    def test_a_type_checker_reads_what_users_meet(self):
        def assigned(node):
            return isinstance(node, ast.Assign) and ast.unparse(node.targets[0])

        # mypy reads nothing but a list of constants: with a split text `import *` gave it no name.
        [names] = [n.value for n in self.tree.body if assigned(n) == "__all__"]
        self.assertEqual(ast.literal_eval(names), liteflow.__all__)
        # A decorator that gives Any is an untyped one to mypy.
        decorator = type(liteflow.task)
        for function in (
            liteflow.setup,
            liteflow.teardown,
            liteflow.task_group,
            liteflow.dag,
            decorator.run_if,
            decorator.skip_if,
        ):
            self.assertNotIn(function.__annotations__["return"], ("Any", None), function)
        *forms, _ = [n for n in self.tree.body if getattr(n, "name", "") == "dag"]
        for form in forms:
            self.assertIn("Callable[P, Dag]", ast.unparse(form.returns))
            self.assertIsNone(ast.get_docstring(form))  # an editor would show it as the function's
        self.assertEqual(len(forms), 2)
        told = "typing.TypeVar('R', covariant=True)"  # an XComArg[bool] is an XComArg[int]
        self.assertIn(told, ast.unparse(self.tree))
        for method in (liteflow.XComArg.__bool__, liteflow.XComArg.__iter__):  # `if` and `for`
            self.assertEqual(method.__annotations__["return"], "NoReturn")
        # As `Any` it would let `a >> [b, c] >> [d, e]` pass, which is two lists at the end.
        self.assertEqual(liteflow.XComArg.__rshift__.__annotations__["return"], "T")
        # So it knows what `expand` gives, after `partial`, too.
        self.assertEqual(liteflow.BaseOperator.partial.__annotations__["return"], "_Partial[Self]")
        self.assertEqual(decorator()(sample).expand.__annotations__["return"], "R")
        # With a `__getattr__` in sight `@task.brnch` is right to pyright.
        [seen] = [n for n in self.tree.body if getattr(n, "name", "") == decorator.__name__]
        self.assertNotIn("__getattr__", [getattr(n, "name", "") for n in seen.body])
        # To pyright a class whose metaclass says what a call gives has nothing but that.
        self.assertNotIn("return", type(liteflow.BaseOperator).__call__.__annotations__)
        for kind in (liteflow.BashOperator, liteflow.PythonOperator):  # a subclass has others
            self.assertIn("template_fields", kind.__annotations__)

    def test_annotations_can_be_evaluated(self):
        for kind in map(vars(liteflow).get, liteflow.__all__):
            for one in (kind, *vars(kind).values()) if isinstance(kind, type) else [kind]:
                if isinstance(one, (type, types.FunctionType)):
                    typing.get_type_hints(one)  # for Sphinx, say: a NameError named Executor

    def test_help_shows_an_operators_arguments(self):
        class Own(liteflow.BaseOperator):
            def __init__(self, *, name, **kwargs):
                super().__init__(**kwargs)

        for kind, first in (
            (Own, "name"),
            (liteflow.BashOperator, "bash_command"),
            (liteflow.BaseOperator, "task_id"),
        ):
            with self.subTest(kind=kind):
                self.assertEqual(next(iter(inspect.signature(kind).parameters)), first)

    def test_public_names_are_listed_and_documented(self):
        public = {
            n
            for n, v in vars(liteflow).items()
            if not n.startswith("_") and getattr(v, "__module__", None) == "liteflow"
            if type(v) is not liteflow._LazyModule
        }
        public -= {"P", "R", "T", "Generic", "dataclass_transform", "overload"}  # typing's
        self.assertEqual(public - {"Context"}, set(liteflow.__all__) - {"Context"})
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if "overload" in map(ast.unparse, node.decorator_list):
                    continue
                self.assertTrue(ast.get_docstring(node), node.name)
                for inner in getattr(node, "body", []):
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        self.assertTrue(ast.get_docstring(inner), f"{node.name}.{inner.name}")

    def test_lines_and_functions_are_short(self):
        for number, line in enumerate(self.source.splitlines(), 1):
            self.assertLessEqual(len(line), 100, number)
        lengths = sorted(
            n.end_lineno - n.lineno + 1 for n in self.nodes if isinstance(n, ast.FunctionDef)
        )
        self.assertLessEqual(lengths[len(lengths) // 2], 10)
        self.assertLessEqual(lengths[-1], 80)

    def test_every_broad_except_says_why(self):
        lines = self.source.splitlines()
        for number, line in enumerate(lines, 1):
            if re.match(r"\s*except (Exception|BaseException)\b.*:|\s*except:", line):
                following = lines[number] if number < len(lines) else ""
                before = lines[number - 2]
                said = "#" in line or following.strip().startswith("#") or "#" in before
                self.assertTrue(
                    said
                    or following.strip() == "raise"
                    or "raise" in "".join(lines[number : number + 8]),
                    f"{number}: {line}",
                )


# How they are run.


class Pulled(unittest.TestSuite):
    """Test cases that several processes pull from one queue, each its next when it is free."""

    _cleanup = False  # it would forget a test by its place in the order in which they are run

    def __init__(self, cases, queue):
        super().__init__(cases)
        self.queue = queue

    def __iter__(self):
        while number := os.read(self.queue, 1):
            yield self._tests[number[0]]


class InTwo(unittest.TestSuite):
    """All test cases, in two processes: most of them wait half of their time."""

    KINDS = ("failures", "errors", "skipped")

    def run(self, result, debug=False):
        cases = [case for case in self if case.countTestCases()]
        if debug or result.failfast or len(cases) < 2 or not hasattr(os, "fork"):
            return super().run(result, debug)
        setUpModule()  # not by both at once: one would find the other's file in its way
        queue, end = os.pipe()
        os.write(end, bytes(range(len(cases))))
        os.close(end)
        half = Pulled(cases, queue)
        with tempfile.TemporaryFile() as told:
            if not (pid := os.fork()):
                try:
                    half.run(result)
                    found = {
                        k: [(str(t), why) for t, why in getattr(result, k)] for k in self.KINDS
                    }
                    told.write(json.dumps({"ran": result.testsRun, **found}).encode())
                    told.flush()
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.exit()
            half.run(result)
            os.close(queue)
            _, status = os.waitpid(pid, 0)
            told.seek(0)
            why = f"did not end: wait status {status}"
            other = json.loads(told.read() or json.dumps({"ran": 0, "errors": [["half", why]]}))
        result.testsRun += other.pop("ran")
        for kind, found in other.items():
            ended = [(unittest.suite._ErrorHolder(test), why) for test, why in found]
            getattr(result, kind).extend(ended)
        return result


def load_tests(loader, tests, pattern):
    return InTwo(tests)


if __name__ == "__main__":
    unittest.main()
