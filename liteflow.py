"""Liteflow: DAGs of tasks in plain Python, run on a process pool, recorded in one SQLite file.

Copy this file into a project; it needs nothing but Python 3.11 or newer.

    from liteflow import DAG, task            # on Airflow: from airflow.sdk import DAG, task

    with DAG("etl", description="Orders to report") as dag:

        @task(retries=3, retry_delay=5)
        def extract() -> list[int]:
            return [1, 2, 3]

        @task
        def load(rows: list[int]) -> None:
            print(sum(rows))

        load(extract())

    if __name__ == "__main__":
        dag.cli()

`python3 FILE` runs it; `python3 -m liteflow --help` shows what ran. Names, defaults, states and
meanings are Airflow's, so a workflow moves to Airflow by changing its import line.

How a run works, and who may do what:

     your script -- builds -->  Dag  (tasks and edges: plain objects, no I/O)
                                 | run()
                                 v
        +-----------------  run loop  ----------------+   _Plan: a pure state machine; no I/O,
        |      ready -> started -> finished           |   time is passed in
        +-----+--------------------------------^------+
          job | (bytes)                        | outcome (state, values as bytes, error, log)
              v                                |
        Runner: slots, each a ProcessPoolExecutor(max_workers=1) serving one pipe;
              |                    or any concurrent.futures.Executor; or this process
              v                                |
        worker process: find the function, load its arguments, run it, pickle the result

        _Store (SQLite): written by the run loop alone, one transaction a turn

States of a task instance (None: not decided yet), and what may follow:

    None -> running | skipped | upstream_failed | removed | success (an EmptyOperator)
    running -> success | failed | skipped | up_for_retry | up_for_reschedule
               | None (interrupted; or sent ahead to a worker that had no time to start it)
    up_for_retry, up_for_reschedule -> running | failed | skipped | None (interrupted)
    any ended state -> None (cleared, or decided anew by a resume)

The sections, each of which depends only on those above it (what a Dag runs, reads or draws is a
one-line call downwards), each under a heading `# --- Name: part ---`: errors and states, building,
plan, store, values, worker, runners, run loop, reading back, showing, command line.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import datetime as _datetime
import enum
import functools
import heapq
import io
import itertools
import json
import logging
import marshal
import math
import os
import re
import signal
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
)

if TYPE_CHECKING:
    import argparse
    import inspect
    import multiprocessing.context
    import multiprocessing.process
    import sqlite3
    from concurrent.futures import Executor, Future
    from multiprocessing.connection import Connection

__all__ = [
    "DAG",
    "AirflowDagCycleException",
    "AirflowException",
    "AirflowFailException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "AirflowTaskTerminated",
    "AirflowTaskTimeout",
    "AlreadyRunning",
    "BaseBranchOperator",
    "BaseOperator",
    "BaseSensorOperator",
    "BashOperator",
    "BranchPythonOperator",
    "Context",
    "Dag",
    "DagNotFound",
    "DagRun",
    "DagRunState",
    "DatabaseError",
    "DuplicateTaskIdFound",
    "EdgeModifier",
    "EmptyOperator",
    "FailFastDagInvalidTriggerRule",
    "Label",
    "NodeNotFound",
    "Param",
    "ParamValidationError",
    "PokeReturnValue",
    "PythonOperator",
    "PythonSensor",
    "RunNotFound",
    "ShortCircuitOperator",
    "TaskAlreadyInTaskGroup",
    "TaskGroup",
    "TaskInstance",
    "TaskInstanceState",
    "TaskNotFound",
    "TriggerRule",
    "UnmappableXComLengthPushed",
    "UnmappableXComTypePushed",
    "UnreachableTask",
    "Variable",
    "WeightRule",
    "WorkerPool",
    "XCom",
    "XComArg",
    "XComForMappingNotPushed",
    "XComNotFound",
    "chain",
    "chain_linear",
    "cross_downstream",
    "dag",
    "get_current_context",
    "main",
    "setup",
    "task",
    "task_group",
    "teardown",
]
__version__ = "0.1.0"

_log = logging.getLogger("liteflow")
_log.addHandler(logging.NullHandler())

_WINDOWS = sys.platform == "win32"

P = ParamSpec("P")
R = TypeVar("R")

Context = dict[str, Any]
"""The context of a running task: a plain dict with Airflow's keys (`ti`, `dag_run`, `ds`, ...)."""


# --- Errors and states ---------------------------------------------------------------------------


class AirflowException(Exception):
    """The base of every error that liteflow raises on purpose (the name is Airflow's)."""


class AirflowSkipException(AirflowException):
    """Raised in a task: the task is skipped at once and never retried."""


class AirflowFailException(AirflowException):
    """Raised in a task: the task fails at once, without its remaining retries."""


class AirflowSensorTimeout(AirflowException):
    """A sensor waited longer than its timeout; fails without retry."""


class XComForMappingNotPushed(AirflowException, TypeError):
    """A task that others expand over returned None."""


class UnmappableXComTypePushed(AirflowException, TypeError):
    """A task that others expand over returned something that is no list, tuple or dict."""


class UnmappableXComLengthPushed(AirflowException, ValueError):
    """A task that others expand over returned more elements than a mapping may have."""


class TaskAlreadyInTaskGroup(AirflowException):
    """A task can't stand in two groups."""


class AirflowDagCycleException(AirflowException):
    """The tasks wait for each other in a circle; the message shows it."""


class DuplicateTaskIdFound(AirflowException):
    """The DAG already has a task of this id."""


class TaskNotFound(AirflowException):
    """The DAG has no task of this id."""


class NodeNotFound(TaskNotFound, KeyError):
    """`dag[id]` found neither a task nor a group of this id."""

    __str__ = Exception.__str__


class XComNotFound(AirflowException):
    """A task takes `x["key"]`, and the upstream task never stored that key."""


class ParamValidationError(AirflowException, ValueError):
    """A parameter's value does not fit its schema, or is missing."""


class FailFastDagInvalidTriggerRule(AirflowException):
    """A DAG with fail_fast=True only allows the trigger rule all_success."""


class AirflowTaskTimeout(BaseException):
    """Raised inside a task that outlives its execution_timeout; a BaseException, as in Airflow."""


class AirflowTaskTerminated(BaseException):
    """Raised inside a task whose process is told to end (SIGTERM)."""


class DatabaseError(AirflowException):
    """The database file can't be used: missing, not liteflow's, newer, locked, full, read-only."""


class DagNotFound(AirflowException, LookupError):
    """The database has no DAG of this id."""


class RunNotFound(AirflowException, LookupError):
    """The database has no such run, or more than one fits."""


class AlreadyRunning(AirflowException):
    """The run, or another run of the DAG that rules it out, is alive."""


class UnreachableTask(AirflowException):
    """A task's function or argument can't reach a worker process; nothing was run or written."""


class _Reschedule(BaseException):
    """A sensor in mode `reschedule` gives its worker back for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class _UsageError(AirflowException):
    """A wrong argument on the command line."""


class _Fenced(AlreadyRunning):
    """Another process took this run over; nothing more may be written for it."""


class _NothingToResume(AirflowException):
    """The run has succeeded meanwhile."""


class _Empty(DatabaseError):
    """The database has no tables yet."""


class _Busy(Exception):
    """Somebody else holds the database's write lock; try again."""


class _Name(str, enum.Enum):
    """An enum whose members are, and are shown as, their Airflow names."""

    def __str__(self) -> str:
        return str(self.value)


class TaskInstanceState(_Name):
    """States of a task instance; one without a state yet has None (Airflow's names)."""

    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    SKIPPED = "skipped"
    UPSTREAM_FAILED = "upstream_failed"
    UP_FOR_RETRY = "up_for_retry"
    UP_FOR_RESCHEDULE = "up_for_reschedule"
    REMOVED = "removed"


class DagRunState(_Name):
    """States of a run (Airflow's names)."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"


class TriggerRule(_Name):
    """When a task runs, by the states of the tasks it waits for (Airflow's names and meanings)."""

    ALL_SUCCESS = "all_success"
    ALL_FAILED = "all_failed"
    ALL_DONE = "all_done"
    ALL_DONE_MIN_ONE_SUCCESS = "all_done_min_one_success"
    ONE_SUCCESS = "one_success"
    ONE_FAILED = "one_failed"
    ONE_DONE = "one_done"
    NONE_FAILED = "none_failed"
    NONE_FAILED_MIN_ONE_SUCCESS = "none_failed_min_one_success"
    NONE_SKIPPED = "none_skipped"
    ALL_SKIPPED = "all_skipped"
    ALWAYS = "always"
    ALL_DONE_SETUP_SUCCESS = "all_done_setup_success"


class WeightRule(_Name):
    """Whose priority weights add to a task's own (Airflow's names)."""

    DOWNSTREAM = "downstream"
    UPSTREAM = "upstream"
    ABSOLUTE = "absolute"


_S = TaskInstanceState
_ENDED = frozenset({_S.SUCCESS, _S.FAILED, _S.SKIPPED, _S.UPSTREAM_FAILED, _S.REMOVED})

# The callbacks that follow an attempt, by what its instance became.
_CALLBACK_OF = {
    _S.SUCCESS: "on_success_callback",
    _S.FAILED: "on_failure_callback",
    _S.UP_FOR_RETRY: "on_retry_callback",
    _S.SKIPPED: "on_skipped_callback",
}

# What may follow a state inside a run; `None` is "no state". The store's CHECK has the same names.
_NEXT: dict[TaskInstanceState | None, frozenset[TaskInstanceState | None]] = {
    None: frozenset({_S.RUNNING, _S.SUCCESS, _S.SKIPPED, _S.UPSTREAM_FAILED, _S.REMOVED}),
    _S.RUNNING: frozenset(
        {_S.SUCCESS, _S.FAILED, _S.SKIPPED, _S.UP_FOR_RETRY, _S.UP_FOR_RESCHEDULE, None}
    ),
    _S.UP_FOR_RESCHEDULE: frozenset({_S.RUNNING, _S.FAILED, _S.SKIPPED, None}),
    _S.UP_FOR_RETRY: frozenset({_S.RUNNING, _S.FAILED, _S.SKIPPED, None}),
    _S.SUCCESS: frozenset({None}),
    _S.FAILED: frozenset({None}),
    _S.SKIPPED: frozenset({None}),
    _S.UPSTREAM_FAILED: frozenset({None}),
    _S.REMOVED: frozenset({None}),
}


def _utcnow() -> _datetime.datetime:
    return _datetime.datetime.now(_datetime.UTC)


def _aware(moment: _datetime.datetime) -> _datetime.datetime:
    """The same moment in UTC; a naive one is taken for UTC, as Airflow takes it."""
    if moment.tzinfo is None:
        return moment.replace(tzinfo=_datetime.UTC)
    return moment.astimezone(_datetime.UTC)


def _shown(value: object, limit: int = 200) -> str:
    """A value's repr for an error message, bounded, whatever its class does."""
    try:
        text = repr(value)
    except BaseException as error:  # a user's __repr__ may raise anything; this is only a message
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _near(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where something close is known, else what is known at all."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    few = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"; there is {few}" if names else "; there is none"


# --- Building: settings and their checks (no I/O) -------------------------------------------------

_ID = re.compile(r"[\w.-]+")
_SUFFIX = re.compile(r"__(\d+)$")

# Airflow's context keys, and the names it reserves besides. A parameter of one of these names is
# filled from the context.
_CONTEXT_KEYS = frozenset(
    """conn dag dag_run data_interval_end data_interval_start ds ds_nodash inlet_events inlets
    logical_date macros map_index_template outlet_events outlets params partition_date
    partition_key prev_data_interval_end_success prev_data_interval_start_success
    prev_end_date_success prev_start_date_success run_id task task_instance
    task_instance_key_str task_reschedule_count task_state_store templates_dict ti
    triggering_asset_events ts ts_nodash ts_nodash_with_tz var
    asset_state_store exception expanded_ti_count reason test_mode try_number""".split()
)


def _checked_id(kind: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{kind} must be a str, found {_shown(value)}")
    if not _ID.fullmatch(value) or len(value) > 250:
        raise ValueError(
            f"{kind} must be 1 to 250 letters, digits, '_', '-' or '.', found {_shown(value)}"
        )
    return str.__str__(value)  # an enum's member, say, as the plain text that it is


def _a(*types: type) -> Callable[[str, Any], Any]:
    """A check that the value is of one of the types (a bool is no int here)."""
    names = " or ".join("None" if t is type(None) else t.__name__ for t in types)

    def check(what: str, value: Any) -> Any:
        if isinstance(value, bool) and bool not in types or not isinstance(value, types):
            raise TypeError(f"{what} must be {names}, found {_shown(value)}")
        return value

    return check


def _whole(least: int, none: int | None = None) -> Callable[[str, Any], Any]:
    """A check for an int of at least `least`; None stands for `none`."""

    def check(what: str, value: Any) -> Any:
        if value is None:
            return none
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an int, found {_shown(value)}")
        if value < least:
            raise ValueError(f"{what} must be {least} or more, found {value}")
        return value

    return check


def _duration(
    zero: bool, none: _datetime.timedelta | None = None, required: bool = False
) -> Callable[[str, Any], Any]:
    """A check for a timedelta or seconds, finite and not negative (nor zero, unless `zero`);
    None stands for `none`, unless a duration is `required`."""

    def check(what: str, value: Any) -> _datetime.timedelta | None:
        if value is None and not required:
            return none
        if isinstance(value, _datetime.timedelta):
            seconds = value.total_seconds()
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            seconds = float(value)
        else:
            raise TypeError(f"{what} must be a timedelta or seconds, found {_shown(value)}")
        if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
            least = "0 or more" if zero else "more than 0"
            raise ValueError(f"{what} must be {least} and finite, found {_shown(value)}")
        try:
            return _datetime.timedelta(seconds=seconds)
        except OverflowError:
            raise ValueError(f"{what} is longer than a timedelta can be: {value!r}") from None

    return check


def _backoff(what: str, value: Any) -> float:
    """Airflow's retry_exponential_backoff: a multiplier; True is 2, False and None are off."""
    if value is None or isinstance(value, bool):
        return 2.0 if value else 0.0
    if not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number or a bool, found {_shown(value)}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} must be 0 or more and finite, found {value!r}")
    return float(value)


def _one_of(kind: type[enum.Enum]) -> Callable[[str, Any], Any]:
    def check(what: str, value: Any) -> Any:
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in kind)
            raise ValueError(f"{what} must be one of {known}; found {_shown(value)}") from None

    return check


def _only(default: object, why: str) -> Callable[[str, Any], Any]:
    """A check that refuses all but the default: a setting that would change what runs."""

    def check(what: str, value: Any) -> Any:
        if value != default:
            raise ValueError(f"{what}={_shown(value)} is not supported: {why}")
        return value

    return check


def _anything(what: str, value: Any) -> Any:
    return value


def _weight(what: str, value: Any) -> int:
    """A priority_weight: an int, capped to 32 bits as in Airflow."""
    return max(-(2**31), min(2**31 - 1, int(_a(int)(what, value))))


def _slots(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be an int of 1 or more, found {_shown(value)}")
    return value


def _params(what: str, value: Any) -> dict[str, Any]:
    """Params by name: values that are JSON, or Param objects."""
    params = _string_keyed(what, value)
    for name, declared in params.items():
        if not isinstance(declared, Param):
            _json_text(f"{what}: {name!r}", declared, ParamValidationError)
    return params


def _string_keyed(what: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{what} must be a dict with str keys, found {_shown(value)}")
    return dict(value)


class _Setting(NamedTuple):
    """A task's or DAG's argument: its default, and the check that turns it into what is kept."""

    default: Any
    check: Callable[[str, Any], Any]


_LATER = "liteflow does not have it"
_flag = _a(bool)


def _callbacks(what: str, value: Any) -> Any:
    """A callable or a list of them."""
    each = value if isinstance(value, (list, tuple)) else [value]
    for one in each:
        if value is not None and not callable(one):
            raise TypeError(f"{what} must be a callable or a list of them, found {_shown(one)}")
    return list(value) if isinstance(value, tuple) else value


_callback = _Setting(None, _callbacks)
_ignored = _Setting(None, _anything)

# Airflow's task settings. Those kept at their default live on the class: an object with 30
# attributes of its own costs five times one with 29.
_TASK_SETTINGS: dict[str, _Setting] = {
    "retries": _Setting(0, _whole(0, none=0)),
    "retry_delay": _Setting(_datetime.timedelta(0), _duration(True, none=_datetime.timedelta(0))),
    "retry_exponential_backoff": _Setting(0.0, _backoff),
    "max_retry_delay": _Setting(None, _duration(zero=True)),
    "retry_policy": _Setting(None, _only(None, _LATER)),
    "execution_timeout": _Setting(None, _duration(zero=False)),
    "trigger_rule": _Setting(TriggerRule.ALL_SUCCESS, _one_of(TriggerRule)),
    "do_xcom_push": _Setting(True, _flag),
    "multiple_outputs": _Setting(None, _a(bool, type(None))),
    "params": _Setting({}, _params),
    "priority_weight": _Setting(1, _weight),
    "weight_rule": _Setting(WeightRule.DOWNSTREAM, _one_of(WeightRule)),
    "pool": _Setting("default_pool", _a(str)),
    "pool_slots": _Setting(1, _slots),
    "max_active_tis_per_dag": _Setting(None, _whole(1)),
    "max_active_tis_per_dagrun": _Setting(None, _whole(1)),
    "depends_on_past": _Setting(False, _only(False, "a run here does not look at earlier ones")),
    "wait_for_downstream": _Setting(
        False, _only(False, "a run here does not look at earlier ones")
    ),
    "on_execute_callback": _callback,
    "on_success_callback": _callback,
    "on_failure_callback": _callback,
    "on_retry_callback": _callback,
    "on_skipped_callback": _callback,
    "pre_execute": _callback,
    "post_execute": _callback,
    "owner": _Setting("airflow", _a(str)),
    "doc_md": _Setting(None, _a(str, type(None))),
    "task_display_name": _Setting(None, _a(str, type(None))),
    **dict.fromkeys(
        """doc doc_json doc_yaml doc_rst start_date end_date queue executor executor_config
        run_as_user resources ignore_first_depends_on_past wait_for_past_depends_before_skipping
        map_index_template logger_name inlets outlets email email_on_failure email_on_retry
        """.split(),
        _ignored,
    ),
}


# --- Building: order and groups -------------------------------------------------------------------


class _Dependency:
    """What `>>` and its kin do, for everything that stands for one task or several."""

    __slots__ = ()

    def _starts(self) -> list[BaseOperator]:
        """The tasks that have to wait when something comes before this."""
        raise NotImplementedError

    def _ends(self) -> list[BaseOperator]:
        """The tasks to be waited for when something comes after this."""
        raise NotImplementedError

    def _link(self, others: Iterable[BaseOperator], before: bool) -> None:
        """Set the tasks before or after this."""
        if before:
            _join(others, self._starts())
        else:
            _join(self._ends(), others)

    def set_downstream(self, other: Any, edge_modifier: Any = None) -> None:
        """Run `other` (a task, a result, a group, or a list of them) after this.

        Raises RuntimeError for tasks of two DAGs, ValueError if neither has a DAG.
        """
        for after in _operands(other):
            if isinstance(self, EdgeModifier):
                self._link(after._starts(), before=False)
            else:
                after._link(self._ends(), before=True)

    def set_upstream(self, other: Any, edge_modifier: Any = None) -> None:
        """Run `other` (a task, a result, a group, or a list of them) before this."""
        for before in _operands(other):
            before.set_downstream(self)

    def __rshift__(self, other: Any) -> Any:
        self.set_downstream(other)
        return other

    def __lshift__(self, other: Any) -> Any:
        self.set_upstream(other)
        return other

    def __rrshift__(self, other: Any) -> Any:
        self.set_upstream(other)
        return self

    def __rlshift__(self, other: Any) -> Any:
        self.set_downstream(other)
        return self


def _operands(value: Any) -> Sequence[_Dependency]:
    """One operand of `>>`, or a list or tuple of them, as a sequence."""
    many = value if isinstance(value, (list, tuple)) else (value,)
    for one in many:
        if not isinstance(one, _Dependency):
            remedy = ": call it" if isinstance(one, _TaskFunction) else ""
            remedy = (
                ": decorate it with @task and call it" if not remedy and callable(one) else remedy
            )
            raise TypeError(
                f"the order can be set between tasks, their results, and lists of these, "
                f"found {_shown(one)}{remedy}"
            )
    return many


def _join(before: Iterable[BaseOperator], after: Iterable[BaseOperator]) -> None:
    after = list(after)
    for first in before:
        for then in after:
            _add_edge(first, then)


def _add_edge(before: BaseOperator, after: BaseOperator) -> None:
    if before.dag is not after.dag:
        if before.dag is None:
            assert after.dag is not None
            after.dag._add(before)
        elif after.dag is None:
            before.dag._add(after)
        else:
            raise RuntimeError(
                f"task {before.task_id!r} is in DAG {before.dag.dag_id!r} and task "
                f"{after.task_id!r} in DAG {after.dag.dag_id!r}: tasks of two DAGs can't wait "
                "for each other"
            )
    elif before.dag is None:
        raise ValueError(
            f"tasks {before.task_id!r} and {after.task_id!r} are in no DAG: make them inside "
            "`with DAG(...)`"
        )
    before._downstream[after.task_id] = None
    after._upstream[before.task_id] = None


class EdgeModifier(_Dependency):
    """What `Label("text")` makes: `a >> Label("text") >> b` is `a >> b`."""

    def __init__(self, label: str | None = None) -> None:
        self.label = label
        self._before: list[BaseOperator] = []
        self._after: list[BaseOperator] = []

    def _starts(self) -> list[BaseOperator]:
        return self._after

    def _ends(self) -> list[BaseOperator]:
        return self._before

    def _link(self, others: Iterable[BaseOperator], before: bool) -> None:
        others = list(others)
        if before:
            self._before += others
            _join(others, self._after)
        else:
            self._after += others
            _join(self._before, others)


def Label(label: str) -> EdgeModifier:
    """A text on an edge, for people: it changes nothing in the order."""
    return EdgeModifier(label)


class TaskGroup(_Dependency):
    """Tasks under one name: `with TaskGroup("load"): ...` makes ids `load.a`, `load.b`.

    Groups nest. `group >> x` sets the group's last tasks before x, `x >> group` x before its
    first ones. `prefix_group_id=False` leaves the ids alone; `default_args` are those of the
    group's tasks. Raises RuntimeError outside a DAG, DuplicateTaskIdFound for a taken id.
    """

    def __init__(
        self,
        group_id: str,
        prefix_group_id: bool = True,
        parent_group: TaskGroup | None = None,
        dag: Dag | None = None,
        default_args: Mapping[str, Any] | None = None,
        tooltip: str = "",
        ui_color: str = "",
        ui_fgcolor: str = "",
        add_suffix_on_collision: bool = False,
        group_display_name: str = "",
    ) -> None:
        if not isinstance(group_id, str):
            raise TypeError(f"group_id must be a str, found {_shown(group_id)}")
        if not re.fullmatch(r"[\w-]{1,200}", group_id):
            raise ValueError(
                f"group_id must be 1 to 200 letters, digits, '_' or '-', found {_shown(group_id)}"
            )
        dag = dag if dag is not None else _current_dag.get()
        if dag is None:
            raise RuntimeError(f"TaskGroup {group_id!r} can only be made inside a DAG")
        parent = parent_group if parent_group is not None else _group_in(dag)
        self.dag = dag
        self.prefix_group_id = prefix_group_id
        self.parent_group = parent
        self.tooltip = tooltip
        self.default_args = _string_keyed(f"group {group_id!r}: default_args", default_args)
        self.label = group_id
        self.group_id = parent.child_id(group_id) if parent is not None else group_id
        if dag._has_node(self.group_id):
            if not add_suffix_on_collision:
                raise DuplicateTaskIdFound(
                    f"DAG {dag.dag_id!r} already has a task or group {self.group_id!r}"
                )
            self.group_id = dag._free_task_id(self.group_id)
        dag._add_group(self)
        self.children: list[BaseOperator] = []
        self._expand: _ExpandInput | None = None
        self._tokens: list[contextvars.Token[TaskGroup | None]] = []

    def child_id(self, label: str) -> str:
        """The id of a member with this label."""
        return f"{self.group_id}.{label}" if self.prefix_group_id else label

    def __enter__(self) -> TaskGroup:
        self._tokens.append(_current_group.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _current_group.reset(self._tokens.pop())

    @property
    def _path(self) -> list[TaskGroup]:
        """The groups around this one, outermost first, and itself."""
        return [*(self.parent_group._path if self.parent_group is not None else []), self]

    def _starts(self) -> list[BaseOperator]:
        inside = {t.task_id for t in self.children}
        return [t for t in self.children if not inside & t._upstream.keys()]

    def _ends(self) -> list[BaseOperator]:
        inside = {t.task_id for t in self.children}
        ends = [t for t in self.children if not inside & t._downstream.keys()]
        found: dict[BaseOperator, None] = {}
        while ends:
            last = ends.pop(0)
            if last._is_teardown:  # the work before it is what has to be waited for
                ends += [t for t in self.children if t.task_id in last._upstream]
            else:
                found[last] = None
        return list(found)

    def __repr__(self) -> str:
        return f"<TaskGroup: {self.group_id}>"


_current_group: contextvars.ContextVar[TaskGroup | None] = contextvars.ContextVar(
    "liteflow_current_group", default=None
)


def _group_in(dag: Dag | None) -> TaskGroup | None:
    """The current group, if it is one of this DAG."""
    group = _current_group.get()
    return group if group is not None and group.dag is dag else None


# --- Building: tasks ------------------------------------------------------------------------------


class BaseOperator(_Dependency):
    """A task of a DAG. `@task` makes one from a function; a subclass defines `execute(context)`.

    All arguments are by keyword. `task_id` (str) is required; the settings are Airflow's, with
    its meanings: `retries` (int), `retry_delay` and `max_retry_delay` (timedelta or seconds;
    0 unless given, where Airflow has five minutes), `retry_exponential_backoff` (multiplier),
    `execution_timeout` (timedelta or seconds), `trigger_rule`, `do_xcom_push`,
    `multiple_outputs`, `params`, `default_args`, `doc_md`, `owner` and others that change nothing
    here. `dag` is the current DAG unless given.

    Raises TypeError for an unknown or wrong argument, ValueError for an impossible value,
    DuplicateTaskIdFound if the DAG has a task of this id.
    """

    task_id: str
    dag: Dag | None
    retries: int
    retry_delay: _datetime.timedelta
    retry_exponential_backoff: float
    max_retry_delay: _datetime.timedelta | None
    execution_timeout: _datetime.timedelta | None
    trigger_rule: TriggerRule
    do_xcom_push: bool
    multiple_outputs: bool | None
    params: dict[str, Any]
    owner: str
    doc_md: str | None
    pool: str
    pool_slots: int
    priority_weight: int
    weight_rule: WeightRule
    max_active_tis_per_dag: int | None
    max_active_tis_per_dagrun: int | None

    template_fields: Sequence[str] = ()
    _own_settings: ClassVar[dict[str, _Setting]] = {}
    _flow: str | None = None  # "branch" and "short_circuit" decide what follows
    _needs_worker = True
    _expand: _ExpandInput | None = None
    _is_setup = False
    _is_teardown = False
    _conditions: tuple[tuple[Callable[..., Any], bool, str | None], ...] = ()
    task_group: TaskGroup | None = None
    on_failure_fail_dagrun = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let default_args reach a subclass's arguments, and its template fields take results."""
        super().__init_subclass__(**kwargs)
        for name, setting in cls.__dict__.get("_own_settings", {}).items():
            setattr(cls, name, setting.default)
        if "__init__" in cls.__dict__ and not cls.__name__.startswith("_"):
            cls.__init__ = _with_defaults(cls.__init__)  # type: ignore[method-assign]
        if cls.template_fields:
            cls.__setattr__ = _set_and_join  # type: ignore[assignment, method-assign]

    def __init__(
        self,
        *,
        task_id: str,
        dag: Dag | None = None,
        task_group: TaskGroup | None = None,
        default_args: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        known = {**_TASK_SETTINGS, **self._own_settings}
        unknown = settings.keys() - known.keys()
        if unknown:
            kind = "@task" if type(self).__name__.startswith("_") else type(self).__name__
            raise TypeError(
                f"{kind} {_shown(task_id)} got an unknown argument "
                f"{min(unknown)!r}{_near(min(unknown), known)}"
            )
        dag = dag if dag is not None else _current_dag.get()
        if dag is not None and not isinstance(dag, Dag):
            raise TypeError(f"task {_shown(task_id)}: dag must be a DAG, found {_shown(dag)}")
        group = task_group if task_group is not None else _group_in(dag)
        if not isinstance(task_id, str):
            raise TypeError(f"task_id must be a str, found {_shown(task_id)}")
        task_id = str.__str__(task_id)
        task_id = group.child_id(task_id) if group is not None else task_id
        self.task_id = _checked_id("task_id", task_id)
        for name, value in _defaults_for(dag, group, default_args).items():
            if name == "params":
                settings[name] = {**value, **settings.get(name, {})}
            elif name in known and name not in settings:
                settings[name] = value
        for name, value in settings.items():
            default, check = known[name]
            kept = check(f"task {task_id!r}: {name}", value)
            if kept != default:
                self.__dict__[name] = kept
        self._upstream: dict[str, None] = {}
        self._downstream: dict[str, None] = {}
        self.dag = None
        if group is not None:
            self.task_group = group
            for each in group._path:
                each.children.append(self)
        if dag is not None:
            dag._add(self)

    @classmethod
    def partial(cls, *, task_id: str, **fixed: Any) -> _OperatorPartial:
        """Fix arguments of an operator that `expand` or `expand_kwargs` maps over others.

        Raises TypeError for an argument that the operator does not have.
        """
        _check_arguments_of(cls, task_id, fixed)
        return _OperatorPartial(cls, task_id, fixed)

    def as_setup(self) -> BaseOperator:
        """Make this task a setup: what comes after it needs it to succeed."""
        self._is_setup = True
        return self

    def as_teardown(
        self, setups: Any = None, on_failure_fail_dagrun: bool | None = None
    ) -> BaseOperator:
        """Make this task a teardown: it runs once its setups have succeeded, whatever the work
        between did; `setups` are set before it."""
        if "trigger_rule" in self.__dict__ and not self._is_teardown:
            raise ValueError(
                f"task {self.task_id!r} is a teardown, which has a trigger rule of its own: leave "
                "trigger_rule out"
            )
        self._is_teardown = True
        self.trigger_rule = TriggerRule.ALL_DONE_SETUP_SUCCESS
        if on_failure_fail_dagrun is not None:
            self.on_failure_fail_dagrun = on_failure_fail_dagrun
        for setup in _operands(setups) if setups is not None else ():
            for before in setup._ends():
                before.as_setup()
                _add_edge(before, self)
        return self

    @property
    def is_setup(self) -> bool:
        """Whether this task is a setup."""
        return self._is_setup

    @property
    def is_teardown(self) -> bool:
        """Whether this task is a teardown."""
        return self._is_teardown

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting is checked when it is assigned later, too."""
        setting = _TASK_SETTINGS.get(name) or self._own_settings.get(name)
        if setting is not None:
            value = setting.check(f"task {self.task_id!r}: {name}", value)
        object.__setattr__(self, name, value)

    def __enter__(self) -> BaseOperator:
        return _enter_scope(self)

    def __exit__(self, *exc: object) -> None:
        _leave_scope(self)

    @property
    def _mapped_group(self) -> TaskGroup | None:
        """The mapped group that this task stands in, if it does."""
        path = self.task_group._path if self.task_group is not None else []
        return next((group for group in path if group._expand is not None), None)

    @property
    def _mapping(self) -> _ExpandInput | None:
        """What the task is expanded over, by itself or with its group."""
        group = self._mapped_group
        return self._expand if group is None else group._expand

    def execute(self, context: Context) -> Any:
        """Do the task's work; what it returns is its XCom. Runs in a worker, on a copy."""
        raise NotImplementedError(f"{type(self).__name__} defines no execute(self, context)")

    @property
    def upstream_task_ids(self) -> set[str]:
        """The ids of the tasks that this one waits for."""
        return set(self._upstream)

    @property
    def downstream_task_ids(self) -> set[str]:
        """The ids of the tasks that wait for this one."""
        return set(self._downstream)

    @property
    def upstream_list(self) -> list[BaseOperator]:
        """The tasks that this one waits for, in the order the edges were made."""
        return [self._dag_or_error().task_dict[t] for t in self._upstream]

    @property
    def downstream_list(self) -> list[BaseOperator]:
        """The tasks that wait for this one, in the order the edges were made."""
        return [self._dag_or_error().task_dict[t] for t in self._downstream]

    @property
    def output(self) -> XComArg:
        """The placeholder of this task's result, to hand to other tasks."""
        return XComArg(self)

    @property
    def dag_id(self) -> str:
        """The id of the task's DAG."""
        return self._dag_or_error().dag_id

    @property
    def log(self) -> logging.Logger:
        """A logger named after the task's class; in a worker its lines are in the task's log."""
        return logging.getLogger(f"liteflow.task.{type(self).__name__}")

    def _dag_or_error(self) -> Dag:
        if self.dag is None:
            raise RuntimeError(f"task {self.task_id!r} is in no DAG")
        return self.dag

    def _join_fields(self) -> None:
        """Make the edges of results that `__init__` put into template fields."""
        _refuse_templates(self)
        for name in self.template_fields:
            for result in _results_in(getattr(self, name, None)):
                for before in result._ends():
                    _add_edge(before, self)

    def _starts(self) -> list[BaseOperator]:
        return [self]

    def _ends(self) -> list[BaseOperator]:
        return [self]

    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that travel to the worker, results still as placeholders."""
        fields = {name: getattr(self, name, None) for name in self.template_fields}
        return (), {name: value for name, value in fields.items() if _holds_placeholder(value)}

    def _function(self) -> Callable[..., Any] | None:
        """The function that a worker has to find, if the task is made of one."""
        return None

    def _made(self, kwargs: dict[str, Any]) -> BaseOperator:
        """Runs in the worker process: the operator that does the work; it may take arguments."""
        return self

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], job: _HasContext) -> Any:
        """Runs in the worker process: the task's work on arguments whose values are filled in.

        On a copy: what `execute` sets on `self` is seen by nobody later.
        """
        import copy

        mine = copy.copy(self)
        for name, value in kwargs.items():
            object.__setattr__(mine, name, value)
        _render_templates(mine, kwargs, job.context)
        return mine.execute(job.context)

    def __repr__(self) -> str:
        return f"<Task({type(self).__name__}): {self.task_id}>"


for _name, _setting in _TASK_SETTINGS.items():
    setattr(BaseOperator, _name, _setting.default)
del _name, _setting


def _defaults_for(
    dag: Dag | None, group: TaskGroup | None, own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """default_args that reach a task: the DAG's, under its groups', under its own."""
    if own is not None and not isinstance(own, Mapping):
        raise TypeError(f"default_args must be a dict, found {_shown(own)}")
    layers = [dag.default_args if dag is not None else {}]
    layers += [each.default_args for each in (group._path if group is not None else [])]
    layers.append(dict(own or {}))
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    return merged


def _with_defaults(init: Callable[..., None]) -> Callable[..., None]:
    """An operator's `__init__` that takes keywords only, with default_args filled in."""

    @functools.wraps(init)
    def filled(self: BaseOperator, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        if args:
            raise TypeError(f"{name} takes keyword arguments only, found {_shown(args[0])}")
        if "task_id" not in kwargs:
            raise TypeError(f"{name}: missing keyword argument 'task_id'")
        dag = kwargs.get("dag") or _current_dag.get()
        group = kwargs.get("task_group") or _group_in(dag)
        defaults = _defaults_for(dag, group, kwargs.get("default_args"))
        for argument in _keywords_of(init) if defaults else ():
            if argument in defaults:
                kwargs.setdefault(argument, defaults[argument])
        init(self, **kwargs)
        if type(self).__init__ is filled:
            self._join_fields()

    return filled


@functools.cache
def _keywords_of(init: Callable[..., None]) -> list[str]:
    import inspect

    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(init).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind in kinds]


def _set_and_join(self: BaseOperator, name: str, value: Any) -> None:
    """`__setattr__` of operators with template fields: a result in one makes an edge."""
    BaseOperator.__setattr__(self, name, value)
    if name in self.template_fields and "_downstream" in self.__dict__:
        for result in _results_in(value):
            for before in result._ends():
                _add_edge(before, self)


def _holds_placeholder(value: Any) -> bool:
    """Whether anything in a value's lists, tuples, sets and dicts is known only at run time."""
    if isinstance(value, (_Mappable, _DagParam, _GroupArg)):
        return True
    if isinstance(value, dict):
        return any(_holds_placeholder(x) for pair in value.items() for x in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_holds_placeholder, value))
    return False


def _check_arguments_of(kind: type[BaseOperator], task_id: str, given: Iterable[str]) -> None:
    """Raises TypeError for a name that no `__init__` of the operator's class takes."""
    import inspect

    known = {"dag", "task_group", "default_args", *_TASK_SETTINGS, *kind._own_settings}
    for each in kind.__mro__:
        if "__init__" in each.__dict__ and issubclass(each, BaseOperator):
            known |= inspect.signature(each.__init__).parameters.keys()
    for name in given:
        if name not in known:
            raise TypeError(
                f"{kind.__name__} {task_id!r} got an unknown argument {name!r}{_near(name, known)}"
            )


def _enter_scope(task: BaseOperator) -> BaseOperator:
    """`with setup_or_teardown:` the tasks made in the block stand between setup and teardown."""
    dag = task._dag_or_error()
    dag._scopes.append((task, set(dag.task_dict)))
    return task


def _leave_scope(task: BaseOperator) -> None:
    dag = task._dag_or_error()
    _, known = dag._scopes.pop()
    made = [t for t in dag.tasks if t.task_id not in known and t is not task]
    inside = {t.task_id for t in made}
    setups = [task] if task._is_setup else [t for t in task.upstream_list if t._is_setup]
    teardowns = [task] if task._is_teardown else [t for t in task.downstream_list if t._is_teardown]
    for each in made:
        if not inside & each._upstream.keys():
            _join(setups, [each])
        after = inside & each._downstream.keys()
        if not each._is_teardown and all(dag.task_dict[t]._is_teardown for t in after):
            _join([each], teardowns)


_LATE = "__settings__"  # no parameter can have this name


class _FunctionOperator(BaseOperator):
    """The task that `@task` makes: its `execute` calls the decorated function."""

    _late: ClassVar[Sequence[str]] = ()  # settings that may be results

    def __init__(
        self,
        function: Callable[..., Any],
        signature: inspect.Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        returns_dict: bool = False,
        expand: _ExpandInput | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._python_callable = function
        self._signature = signature
        self._args = args
        self._kwargs = kwargs
        if self.multiple_outputs is None and returns_dict:
            self.multiple_outputs = True
        if function.__doc__ and not settings.keys() & {
            "doc",
            "doc_md",
            "doc_json",
            "doc_yaml",
            "doc_rst",
        }:
            self.doc_md = function.__doc__
        for result in _results_in((args, kwargs, [getattr(self, n) for n in self._late])):
            _add_edge(result.operator, self)
        if expand is not None:
            self._expand = expand
            expand.join(self)
        _warn_of_templates(self, (args, kwargs))

    @property
    def python_callable(self) -> Callable[..., Any]:
        """The decorated function itself."""
        return self._python_callable

    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        late = {n: getattr(self, n) for n in self._late if _holds_placeholder(getattr(self, n))}
        return self._args, {**self._kwargs, _LATE: late} if late else self._kwargs

    def _function(self) -> Callable[..., Any]:
        return self._python_callable

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], job: _HasContext) -> Any:
        if self._wants_context:
            kwargs = _with_context(self._signature, args, kwargs, job.context)
        return _finished(self._python_callable(*args, **kwargs))

    @functools.cached_property
    def _wants_context(self) -> bool:
        parameters = self._signature.parameters.values()
        return any(p.kind is p.VAR_KEYWORD or p.name in _CONTEXT_KEYS for p in parameters)

    def execute(self, context: Context) -> Any:
        """Call the function on its arguments (which must hold no placeholders)."""
        kwargs = _with_context(self._signature, self._args, dict(self._kwargs), context)
        return _finished(self._python_callable(*self._args, **kwargs))


class _HasContext(Protocol):
    """What runs a task: its context is made when it is asked for."""

    @property
    def context(self) -> Context: ...


def _finished(result: Any) -> Any:
    """The result; that of an `async def` once it has run to its end."""
    if hasattr(result, "__await__"):
        import asyncio

        return asyncio.run(_awaited(result))
    return result


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _warn_of_templates(task: BaseOperator, value: Any) -> None:
    """Airflow renders Jinja in arguments; here a string is what it is, as is said once a task."""
    text = next((t for t in _strings_in(value) if "{{" in t or "{%" in t), None)
    if text is not None:
        import warnings

        warnings.warn(
            f"task {task.task_id!r}: {_shown(text, 60)} is passed as it is: liteflow renders no "
            "Jinja in arguments of @task",
            stacklevel=5,
        )


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _strings_in(item)


def _with_context(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Context,
) -> dict[str, Any]:
    """The keyword arguments, with what the function's other parameters name in the context."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # A name taken by position would be given twice.
        positional = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
        taken = positional[: len(args)]
        return {**{k: v for k, v in context.items() if k not in taken}, **kwargs}
    given = signature.bind_partial(*args, **kwargs).arguments
    wanted = (p.name for p in parameters if p.name in _CONTEXT_KEYS and p.name not in given)
    return {**kwargs, **{name: context[name] for name in wanted if name in context}}


def _returns_dict(function: Callable[..., Any]) -> bool:
    """Whether the return annotation is a dict, a Mapping or a TypedDict (Airflow's rule)."""
    annotation = getattr(function, "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        import typing

        # Of the return annotation alone: another may name what only a type checker imports.
        only = type("only", (), {"__annotations__": {"return": annotation}})
        try:
            annotation = typing.get_type_hints(only, function.__globals__).get("return")
        except Exception:  # evaluating a user's annotation may raise anything; then it says nothing
            return False
    kind = getattr(annotation, "__origin__", annotation)
    return isinstance(kind, type) and issubclass(kind, Mapping)


# --- Building: results and mapping ----------------------------------------------------------------


class _Mappable(_Dependency):
    """A result, or what `map`, `zip` and `concat` make of results, to be expanded over."""

    __slots__ = ()

    def map(self, function: Callable[[Any], Any]) -> _MapResult:
        """For `expand`: each element, with the plain function applied when it is taken."""
        if not callable(function) or isinstance(function, _TaskFunction):
            raise TypeError(f"map() takes a plain function, found {_shown(function)}")
        return _MapResult(self, function)

    def zip(self, *others: _Mappable, fillvalue: Any = ...) -> _ZipResult:
        """For `expand`: tuples of elements side by side, as many as the shortest has, or, with a
        fillvalue, the longest."""
        return _ZipResult([self, *others], fillvalue)

    def concat(self, *others: _Mappable) -> _ConcatResult:
        """For `expand`: the elements of one after those of another."""
        return _ConcatResult([self, *others])

    def _results(self) -> list[XComArg]:
        """The results that this is made of."""
        raise NotImplementedError

    def _count(self, known: _Known) -> int:
        """How many elements there are, once the results are stored."""
        raise NotImplementedError

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        """What a worker evaluates to get the element: plain data (see `_Job.element`)."""
        raise NotImplementedError

    def _starts(self) -> list[BaseOperator]:
        return self._ends()

    def _ends(self) -> list[BaseOperator]:
        return [result.operator for result in self._results()]


class _Known(Protocol):
    """What the plan knows of stored results without opening them."""

    def length(self, task_id: str) -> int: ...
    def stored(self, task_id: str) -> Sequence[int] | None:
        """The map indexes under which a mapped task stored something; None: it is not mapped."""


class _MapResult(_Mappable):
    __slots__ = ("_function", "_source")

    def __init__(self, source: _Mappable, function: Callable[[Any], Any]) -> None:
        self._source, self._function = source, function

    def _results(self) -> list[XComArg]:
        return self._source._results()

    def _count(self, known: _Known) -> int:
        return self._source._count(known)

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        inner = self._source._element(i, known, functions)
        return ("map", functions.index(self._function), inner)


class _ZipResult(_Mappable):
    __slots__ = ("_fill", "_sources")

    def __init__(self, sources: list[_Mappable], fillvalue: Any) -> None:
        self._sources, self._fill = sources, fillvalue

    def _results(self) -> list[XComArg]:
        return [result for source in self._sources for result in source._results()]

    def _count(self, known: _Known) -> int:
        counts = [source._count(known) for source in self._sources]
        return min(counts) if self._fill is ... else max(counts)

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        parts = [
            source._element(i, known, functions) if i < source._count(known)
            else ("value", _dump(self._fill))
            for source in self._sources
        ]  # fmt: skip
        return ("tuple", parts)


class _ConcatResult(_Mappable):
    __slots__ = ("_sources",)

    def __init__(self, sources: list[_Mappable]) -> None:
        self._sources = sources

    def _results(self) -> list[XComArg]:
        return [result for source in self._sources for result in source._results()]

    def _count(self, known: _Known) -> int:
        return sum(source._count(known) for source in self._sources)

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        for source in self._sources:
            count = source._count(known)
            if i < count:
                return source._element(i, known, functions)
            i -= count
        raise IndexError(i)


class XComArg(_Mappable):
    """The placeholder of a task's result while the DAG is built.

    Handed to another task, alone or inside lists, tuples, sets and dicts, it makes that task wait
    and is replaced by the value when that task runs. `x["key"]` is another key of the same task.
    """

    __slots__ = ("key", "operator")

    def __init__(self, operator: BaseOperator, key: str = "return_value") -> None:
        if not isinstance(operator, BaseOperator):
            raise TypeError(f"XComArg takes a task, found {_shown(operator)}")
        self.operator = operator
        self.key = key

    def __getitem__(self, key: str) -> XComArg:
        if not isinstance(key, str):
            raise ValueError(
                f"the result of task {self.operator.task_id!r} is a placeholder: only a str key "
                f"of its outputs can be taken, found {_shown(key)}"
            )
        return XComArg(self.operator, key)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            f"the result of task {self.operator.task_id!r} is a placeholder until the DAG runs: "
            "it can't be iterated or unpacked; hand it to a task"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, XComArg):
            return NotImplemented
        return self.operator is other.operator and self.key == other.key

    def __hash__(self) -> int:
        return hash((id(self.operator), self.key))

    def __repr__(self) -> str:
        return f"XComArg({self.operator.task_id!r}, {self.key!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as part of a task's arguments, a result is the look-up of its value."""
        seen = _seen_now(self)
        seen.results.append(self)
        if self.operator._mapping is not None and not seen.shares_group_with(self.operator):
            return _sequence_of, (self.operator.task_id, self.key)
        absent_is_none = self.key == "return_value" or bool(self.operator.multiple_outputs)
        return _value_of, (self.operator.task_id, self.key, absent_is_none)

    def as_setup(self) -> XComArg:
        """Make the task a setup."""
        self.operator.as_setup()
        return self

    def as_teardown(
        self, setups: Any = None, on_failure_fail_dagrun: bool | None = None
    ) -> XComArg:
        """Make the task a teardown; see `BaseOperator.as_teardown`."""
        self.operator.as_teardown(setups, on_failure_fail_dagrun)
        return self

    def __enter__(self) -> XComArg:
        self.operator.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.operator.__exit__(*exc)

    def _results(self) -> list[XComArg]:
        return [self]

    def _count(self, known: _Known) -> int:
        stored = known.stored(self.operator.task_id)
        return known.length(self.operator.task_id) if stored is None else len(stored)

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        task_id = self.operator.task_id
        stored = known.stored(task_id)
        return ("item", task_id, i) if stored is None else ("xcom", task_id, stored[i])


class _Seen:
    """The results met while a task's arguments are pickled."""

    def __init__(self, task: BaseOperator) -> None:
        self.task = task
        self.results: list[XComArg] = []

    def shares_group_with(self, other: BaseOperator) -> bool:
        """Whether both stand in one mapped group, where an instance sees that of its own index."""
        group = self.task._mapped_group
        return group is not None and other._mapped_group is group


# The results met while a task's arguments are pickled; there is no other use in pickling one.
_pickled_results: contextvars.ContextVar[_Seen] = contextvars.ContextVar("liteflow_pickled_results")


def _seen_now(placeholder: object) -> _Seen:
    try:
        return _pickled_results.get()
    except LookupError:
        raise TypeError(f"{placeholder!r} is a placeholder: it is no value to store") from None


class _DagParam(Generic[R]):
    """An argument of a `@dag` function while the DAG is built: `conf[name]`, else the default."""

    __slots__ = ("default", "name")

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    def __reduce__(self) -> tuple[Any, ...]:
        _seen_now(self)
        return _param_of, (self.name, self.default)

    def __repr__(self) -> str:
        return f"DagParam({self.name!r})"


class _GroupArg:
    """An argument of a mapped group while the DAG is built: each instance has its element."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        _seen_now(self)
        return _group_value, (self.name,)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"argument {self.name!r} of the group is a placeholder until the DAG runs")

    def __repr__(self) -> str:
        return f"GroupArg({self.name!r})"


class _ExpandInput:
    """What a task or a group is mapped over: the cross product of named arguments, or dicts."""

    def __init__(self, what: str, named: Mapping[str, Any] | None, dicts: Any = None) -> None:
        self.functions: list[Callable[..., Any]] = []
        self.named = named is not None
        sources = named.items() if named is not None else [(None, dicts)]
        self.sources = [(name, self._checked(what, name, source)) for name, source in sources]
        self.note_functions()
        if named is not None and not named:
            raise TypeError(f"{what}: expand() takes at least one argument to map over")

    def _checked(self, what: str, name: str | None, source: Any) -> Any:
        if isinstance(source, XComArg) and source.key != "return_value":
            raise ValueError(
                f"{what}: can't expand over {source!r}: only over a task's return value"
            )
        for result in _results_in(source):
            if result.key != "return_value":
                raise ValueError(f"{what}: can't expand over {result!r}: only over return values")
        if isinstance(source, _Mappable):
            return source
        if name is None:
            return self._checked_dicts(what, source)
        if isinstance(source, dict):
            return list(source.items())
        if isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray)):
            return list(source)
        raise ValueError(
            f"{what}: can't expand {name!r} over {_shown(source)}: a list, tuple, dict or a "
            "task's result is needed"
        )

    def _checked_dicts(self, what: str, source: Any) -> list[Any]:
        if not isinstance(source, (list, tuple)):
            raise TypeError(
                f"{what}: expand_kwargs() takes a list of dicts or a result, found {_shown(source)}"
            )
        for item in source:
            if not isinstance(item, (Mapping, _Mappable)):
                raise TypeError(
                    f"{what}: expand_kwargs() takes dicts or results, found {_shown(item)}"
                )
        return list(source)

    @property
    def results(self) -> list[XComArg]:
        """The results whose elements have to be known before there are instances."""
        return [r for _, x in self.sources if isinstance(x, _Mappable) for r in x._results()]

    def join(self, task: BaseOperator) -> None:
        """Set the task after all that it is expanded over."""
        for _, source in self.sources:
            for result in _results_in(source):
                _add_edge(result.operator, task)

    def note_functions(self) -> None:
        """Number the functions of `map`: in a worker they have the same numbers."""

        def walk(source: Any) -> None:
            for inner in getattr(source, "_sources", []) or [getattr(source, "_source", None)]:
                if inner is not None:
                    walk(inner)
            function = getattr(source, "_function", None)
            if function is not None and function not in self.functions:
                self.functions.append(function)

        for _, source in self.sources:
            walk(source)

    def count(self, known: _Known) -> int:
        """How many instances there are."""
        counts = (x._count(known) if isinstance(x, _Mappable) else len(x) for _, x in self.sources)
        return math.prod(counts)

    def elements(self, i: int, known: _Known) -> list[tuple[str | None, Any]]:
        """(argument, element) of an instance: an element is what `_element` says, or, of a
        constant, ("constant", its index). The last argument varies fastest."""
        found: list[tuple[str | None, Any]] = []
        for name, source in reversed(self.sources):
            mappable = isinstance(source, _Mappable)
            count = source._count(known) if mappable else len(source)
            i, j = divmod(i, count) if self.named else (0, i)
            if mappable:
                found.append((name, source._element(j, known, self.functions)))
            else:
                found.append((name, ("constant", j)))
        return found[::-1]


def _results_in(value: Any) -> Iterator[XComArg]:
    """The results anywhere in a value's lists, tuples, sets and dicts."""
    if isinstance(value, _Mappable):
        yield from value._results()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _results_in(key)
            yield from _results_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _results_in(item)


# --- Building: decorators -------------------------------------------------------------------------


class _TaskFunction(Generic[P, R]):
    """A function decorated with `@task`: calling it adds a task to the current DAG."""

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        function: Callable[P, R],
        settings: dict[str, Any],
        maker: Callable[..., BaseOperator],
        _signature: inspect.Signature | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"@task decorates a function, found {_shown(function)}")
        functools.update_wrapper(self, function)
        self._settings = settings
        self._maker = maker
        self._signature = _signature or _signature_of(function)
        self._role: str | None = None  # "setup" or "teardown"
        self._fails_run = False
        self._conditions: tuple[tuple[Callable[..., Any], bool, str | None], ...] = ()

    @property
    def function(self) -> Callable[P, R]:
        """The plain function, to call directly."""
        return self.__wrapped__

    def override(self, **settings: Any) -> _TaskFunction[P, R]:
        """A copy with other settings (`task_id`, `retries`, ...); this one stays as it is."""
        merged = {**self._settings, **settings}
        changed = _TaskFunction(self.__wrapped__, merged, self._maker, self._signature)
        changed._role, changed._fails_run = self._role, self._fails_run
        changed._conditions = self._conditions
        return changed

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Add a task that calls the function with these arguments; returns its `XComArg`.

        (Declared as Any, so that a type checker accepts it where the function's result fits.)
        Raises TypeError if the arguments do not fit the function.
        """
        named = self._named(kwargs)
        self._check_call(args, named)
        return self._make(args, named, None)

    def expand(self, **mapped: Any) -> Any:
        """Map the task over the elements of the arguments: one instance each, or for each
        combination, the last argument varying fastest. Returns the `XComArg` of all results.

        Each is a list, tuple, dict (its items) or a result. Raises ValueError for anything else,
        TypeError for an argument that the function does not have.
        """
        return self.partial().expand(**mapped)

    def expand_kwargs(self, dicts: Any) -> Any:
        """Map the task over a list of dicts of arguments, or over a result that is one."""
        return self.partial().expand_kwargs(dicts)

    def partial(self, **fixed: Any) -> _FunctionPartial:
        """Fix arguments; to be followed by `expand` or `expand_kwargs`."""
        self._check_names(fixed, "partial")
        return _FunctionPartial(self, fixed)

    def _check_names(self, names: Iterable[str], verb: str) -> None:
        task_id, parameters = self._id, self._signature.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in names:
            if name in _CONTEXT_KEYS and verb == "expand":
                raise ValueError(f"task {task_id!r}: can't expand over the context key {name!r}")
            if name not in parameters and not takes_any:
                raise TypeError(
                    f"task {task_id!r}: {verb}() got an unexpected argument {name!r}"
                    f"{_near(name, parameters)}"
                )

    @property
    def _id(self) -> str:
        return str(self._settings.get("task_id", self.__wrapped__.__name__))

    def _named(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by keyword, with those that default_args name."""
        named = dict(kwargs)
        dag = self._settings.get("dag") or _current_dag.get()
        own = self._settings.get("default_args")
        for name, value in _defaults_for(dag, _group_in(dag), own).items():
            p = self._signature.parameters.get(name)
            if p is not None and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                named.setdefault(name, value)
        return named

    def _make(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], expand: _ExpandInput | None
    ) -> Any:
        settings = dict(self._settings)
        dag = settings["dag"] = settings.get("dag") or _current_dag.get()
        task_id = settings.pop("task_id", self.__wrapped__.__name__)
        group = settings.get("task_group") or _group_in(dag)
        if dag is not None and isinstance(task_id, str):
            full = dag._free_task_id(group.child_id(task_id) if group is not None else task_id)
            task_id = full.removeprefix(group.child_id("")) if group is not None else full
        if expand is not None:
            _check_expand(task_id, expand, settings, group)
        if self._role == "teardown" and "trigger_rule" in settings:
            raise ValueError(f"task {task_id!r} is a teardown: it has a trigger rule of its own")
        maker: Any = self._maker
        made: BaseOperator = maker(
            self.__wrapped__, self._signature, args, kwargs, self._returns_dict, expand,
            task_id=task_id, **settings,
        )  # fmt: skip
        if self._conditions:
            made._conditions = self._conditions
        if self._role == "setup":
            made.as_setup()
        elif self._role == "teardown":
            made.as_teardown(on_failure_fail_dagrun=self._fails_run)
        return made.output

    @functools.cached_property
    def _returns_dict(self) -> bool:
        return _returns_dict(self.__wrapped__)

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, _TaskFunction):
                raise TypeError(
                    f"task {self._id!r}: an argument is the task function {value._id!r} itself: "
                    f"call it, {value._id}(), to hand over its result"
                )
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            name = self.__wrapped__.__name__
            raise TypeError(f"task {self._id!r}: {name}() {error}") from None

    def __repr__(self) -> str:
        return f"<@task {self.__wrapped__.__qualname__}>"


def _check_expand(
    task_id: str, expand: _ExpandInput, settings: Mapping[str, Any], group: TaskGroup | None
) -> None:
    rule = settings.get("trigger_rule")
    if rule == TriggerRule.ALWAYS and expand.results:
        raise ValueError(
            f"task {task_id!r}: trigger_rule 'always' does not wait for what it expands over"
        )
    if group is not None and any(each._expand is not None for each in group._path):
        raise NotImplementedError(
            f"task {task_id!r}: expand() inside a mapped group is not supported"
        )


class _FunctionPartial:
    """What `partial` of a task function gives: `expand` has to follow."""

    def __init__(self, function: _TaskFunction[Any, Any], fixed: dict[str, Any]) -> None:
        self._of = function
        self._fixed = fixed

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(f"task {self._of._id!r}: partial() must be followed by expand()")

    def partial(self, **fixed: Any) -> _FunctionPartial:
        """Fix more arguments. Raises TypeError for one that is fixed already."""
        twice = self._fixed.keys() & fixed.keys()
        if twice:
            raise TypeError(f"task {self._of._id!r}: {min(twice)!r} is in partial() twice")
        self._of._check_names(fixed, "partial")
        return _FunctionPartial(self._of, {**self._fixed, **fixed})

    def expand(self, **mapped: Any) -> Any:
        """See `expand` of the task function; an argument that is in both is the expanded one."""
        self._of._check_names(mapped, "expand")
        expand = _ExpandInput(f"task {self._of._id!r}", mapped)
        fixed = {k: v for k, v in self._of._named(self._fixed).items() if k not in mapped}
        return self._of._make((), fixed, expand)

    def expand_kwargs(self, dicts: Any) -> Any:
        """See `expand_kwargs` of the task function."""
        expand = _ExpandInput(f"task {self._of._id!r}", None, dicts)
        return self._of._make((), self._of._named(self._fixed), expand)


_signatures: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The function's signature; many tasks may be made of one function."""
    try:
        found: inspect.Signature | None = _signatures.get(function)
    except TypeError:  # a callable that has no hash, or can't be referred to weakly
        return _build_signature(function)
    if found is None:
        found = _signatures[function] = _build_signature(function)
    return found


def _build_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The function's signature, in which context parameters need not be given."""
    import inspect

    name = getattr(function, "__name__", repr(function))
    signature = inspect.signature(function)
    parameters = []
    for p in signature.parameters.values():
        if p.name == "self":
            raise TypeError(f"@task function {name!r} has a parameter named 'self': not supported")
        if p.name in _CONTEXT_KEYS and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            if p.default not in (None, p.empty):
                raise ValueError(
                    f"@task function {name!r}: parameter {p.name!r} is filled from the context, "
                    f"so its default must be None or absent, found {_shown(p.default)}"
                )
            p = p.replace(default=None)
        parameters.append(p)
    # Unvalidated: a context parameter, now with a default, may stand before one without.
    return inspect.Signature(parameters, __validate_parameters__=False)


class _TaskDecorator:
    """`@task`, bare or with settings; `dag.task` is the same with `dag` set.

    `@task(retries=3)` takes the settings of `BaseOperator`. `task(function)` decorates an
    existing function. The decorated function can be used in several DAGs.
    """

    def __init__(self, dag: Dag | None = None, maker: Any = _FunctionOperator) -> None:
        self._dag = dag
        self._maker = maker

    @overload
    def __call__(self, function: Callable[P, R], /) -> _TaskFunction[P, R]: ...
    @overload
    def __call__(self, /, **settings: Any) -> Callable[[Callable[P, R]], _TaskFunction[P, R]]: ...
    def __call__(self, /, *functions: Any, **settings: Any) -> Any:
        if self._dag is not None:
            settings.setdefault("dag", self._dag)
        if not functions:
            return lambda function: _TaskFunction(function, settings, self._maker)
        if len(functions) > 1 or not callable(functions[0]) or isinstance(functions[0], type):
            raise TypeError(
                f"@task takes one function, or settings by keyword; found {_shown(functions[0])}"
            )
        return _TaskFunction(functions[0], settings, self._maker)

    @property
    def branch(self) -> _TaskDecorator:
        """`@task.branch`: the function returns the ids of the tasks (or groups) to go on with; the
        other direct downstream tasks are skipped."""
        return _TaskDecorator(self._dag, _BranchFunction)

    @property
    def short_circuit(self) -> _TaskDecorator:
        """`@task.short_circuit`: a false result skips all that comes after."""
        return _TaskDecorator(self._dag, _ShortCircuitFunction)

    @property
    def bash(self) -> _TaskDecorator:
        """`@task.bash`: the function returns a command for bash; see `BashOperator`."""
        return _TaskDecorator(self._dag, _BashFunction)

    @property
    def sensor(self) -> _TaskDecorator:
        """`@task.sensor`: called again until its result is true; see `BaseSensorOperator`."""
        return _TaskDecorator(self._dag, _SensorFunction)

    def run_if(self, condition: Callable[[Context], Any], skip_message: str | None = None) -> Any:
        """Above `@task`: skip the task unless `condition(context)` is true."""
        return _conditional(condition, True, skip_message)

    def skip_if(self, condition: Callable[[Context], Any], skip_message: str | None = None) -> Any:
        """Above `@task`: skip the task if `condition(context)` is true."""
        return _conditional(condition, False, skip_message)

    @property
    def python(self) -> _TaskDecorator:
        """`@task.python` is `@task`."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"there is no @task.{name} here: liteflow has branch, short_circuit, bash, sensor, "
            "python, run_if and skip_if"
        )

    def __repr__(self) -> str:
        return "<decorator task>"


def _conditional(condition: Callable[[Context], Any], wanted: bool, message: str | None) -> Any:
    def add(function: _TaskFunction[P, R]) -> _TaskFunction[P, R]:
        if not isinstance(function, _TaskFunction):
            raise TypeError("@task.run_if and @task.skip_if stand above @task")
        changed = function.override()
        changed._conditions = ((condition, wanted, message), *function._conditions)
        return changed

    return add


task = _TaskDecorator()


def setup(function: Any = None, **settings: Any) -> Any:
    """`@setup`: a task that what comes after it needs to succeed; see `BaseOperator.as_setup`."""
    return _with_role("setup", function, settings, False)


def teardown(function: Any = None, *, on_failure_fail_dagrun: bool = False, **settings: Any) -> Any:
    """`@teardown`: a task that cleans up after its setups, whatever the work between did.

    Its failure does not fail the run unless `on_failure_fail_dagrun`.
    """
    return _with_role("teardown", function, settings, on_failure_fail_dagrun)


def _with_role(role: str, function: Any, settings: dict[str, Any], fails_run: bool) -> Any:
    if function is None:
        return lambda decorated: _with_role(role, decorated, settings, fails_run)
    made = function if isinstance(function, _TaskFunction) else task(function)
    made = made.override(**settings)
    made._role, made._fails_run = role, fails_run
    return made


class _GroupFunction(Generic[P]):
    """A function decorated with `@task_group`: calling it makes a group of its tasks."""

    def __init__(self, function: Callable[P, Any], settings: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._settings = {"group_id": function.__name__, **settings}

    def override(self, **settings: Any) -> _GroupFunction[P]:
        """A copy with another `group_id`, `default_args`, ..."""
        return _GroupFunction(self._function, {**self._settings, **settings})

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Make the group; returns what the function returns, or else the group."""
        return self._make(None, args, kwargs)

    def partial(self, **fixed: Any) -> _GroupPartial:
        """Fix arguments; `expand` has to follow."""
        return _GroupPartial(self, fixed)

    def expand(self, **mapped: Any) -> Any:
        """Map the group: each task in it has one instance for each element."""
        return _GroupPartial(self, {}).expand(**mapped)

    def expand_kwargs(self, dicts: Any) -> Any:
        """Map the group over dicts of arguments."""
        return _GroupPartial(self, {}).expand_kwargs(dicts)

    def _make(self, expand: _ExpandInput | None, args: Any, kwargs: Any) -> Any:
        settings = {"add_suffix_on_collision": True, **self._settings}
        if settings.get("tooltip") is None and self._function.__doc__:
            settings["tooltip"] = self._function.__doc__
        with TaskGroup(**settings) as group:
            if expand is not None:
                if any(each._expand is not None for each in group._path):
                    raise NotImplementedError("a mapped group inside a mapped group")
                group._expand = expand
            result = self._function(*args, **kwargs)
        if expand is not None:
            for first in group._starts():
                expand.join(first)
        return group if result is None else result


class _GroupPartial:
    def __init__(self, of: _GroupFunction[Any], fixed: dict[str, Any]) -> None:
        self._of, self._fixed = of, fixed

    def expand(self, **mapped: Any) -> Any:
        expand = _ExpandInput(f"group {self._of._settings['group_id']!r}", mapped)
        return self._of._make(expand, (), {**self._fixed, **{n: _GroupArg(n) for n in mapped}})

    def expand_kwargs(self, dicts: Any) -> Any:
        import inspect

        expand = _ExpandInput(f"group {self._of._settings['group_id']!r}", None, dicts)
        names = set(inspect.signature(self._of._function).parameters) - self._fixed.keys()
        return self._of._make(expand, (), {**self._fixed, **{n: _GroupArg(n) for n in names}})


def task_group(*functions: Any, **settings: Any) -> Any:
    """`@task_group`, bare or with `group_id` and the settings of `TaskGroup`.

    Calling the decorated function makes a group of the tasks made inside it; a second call gets
    an id with a suffix.
    """
    if functions and callable(functions[0]):
        return _GroupFunction(functions[0], settings)
    if functions:
        settings["group_id"] = functions[0]
    return lambda function: _GroupFunction(function, settings)


# --- Building: operators --------------------------------------------------------------------------


class _BranchFunction(_FunctionOperator):
    _flow = "branch"


_SHORT_CIRCUIT_SETTINGS = {"ignore_downstream_trigger_rules": _Setting(True, _flag)}


class _ShortCircuitFunction(_FunctionOperator):
    _flow = "short_circuit"
    _own_settings: ClassVar[dict[str, _Setting]] = _SHORT_CIRCUIT_SETTINGS


def _codes(what: str, value: Any) -> Any:
    """Exit codes that mean skipped: an int, several, or None."""
    codes = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    for code in codes:
        _a(int)(what, code)
    return codes


_BASH_SETTINGS: dict[str, _Setting] = {
    "env": _Setting(None, _anything),
    "append_env": _Setting(False, _flag),
    "cwd": _Setting(None, _anything),
    "skip_on_exit_code": _Setting((99,), _codes),
    "output_encoding": _Setting("utf-8", _a(str)),
    "output_processor": _Setting(None, _anything),
}


class _BashFunction(_FunctionOperator):
    _own_settings: ClassVar[dict[str, _Setting]] = _BASH_SETTINGS
    _late: ClassVar[Sequence[str]] = ("env", "cwd")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], job: _HasContext) -> Any:
        late = kwargs.pop(_LATE, None)
        if late:
            import copy

            mine = copy.copy(self)
            mine.__dict__.update(late)
            return mine._run(args, kwargs, job)
        command = super()._run(args, kwargs, job)
        if not isinstance(command, str) or not command.strip():
            raise TypeError(
                f"the function of @task.bash must return a command, found {_shown(command)}"
            )
        return _run_bash(self, command, job.context)


class BashOperator(BaseOperator):
    """Runs a command with bash; its result is the last line of the output.

    `env` replaces the environment, unless `append_env`; `cwd` is a temporary folder unless given.
    Exit code 0 is success, `skip_on_exit_code` (99; an int, several, or None) skipped, any other
    failed. Output is in the task's log as it comes, standard error included.
    """

    template_fields = ("bash_command", "env", "cwd")
    _own_settings: ClassVar[dict[str, _Setting]] = _BASH_SETTINGS

    def __init__(self, *, bash_command: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bash_command = bash_command

    def execute(self, context: Context) -> Any:
        """Run the command. Raises AirflowSkipException, AirflowException by its exit code."""
        if not isinstance(self.bash_command, str):
            raise TypeError(f"bash_command must be a str, found {_shown(self.bash_command)}")
        return _run_bash(self, self.bash_command, context)


def _run_bash(task: Any, command: str, context: Context) -> Any:
    import subprocess
    import tempfile

    environ = (
        {**os.environ, **(task.env or {})} if task.append_env or task.env is None else task.env
    )
    with contextlib.ExitStack() as stack:
        folder = task.cwd
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="liteflow-bash-"))
        elif not os.path.isdir(folder):
            raise AirflowException(f"cwd {folder!r} is no directory")
        process = stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**environ, **_airflow_environ(context)},
            )
        )
        stack.callback(process.kill)  # before the wait for it, where the task is told to end
        assert process.stdout is not None
        last = ""
        for raw in process.stdout:
            line = raw.decode(task.output_encoding, errors="backslashreplace")
            print(line.rstrip("\r\n"), flush=True)
            last = line.rstrip()
        code = process.wait()
    if code in task.skip_on_exit_code:
        raise AirflowSkipException(f"the command ended with exit code {code}: skipped")
    if code != 0:
        raise AirflowException(f"the command ended with exit code {code}")
    return last if task.output_processor is None else task.output_processor(last)


def _airflow_environ(context: Context) -> dict[str, str]:
    ti, run = context["ti"], context["dag_run"]
    return {
        "AIRFLOW_CTX_DAG_ID": ti.dag_id,
        "AIRFLOW_CTX_TASK_ID": ti.task_id,
        "AIRFLOW_CTX_DAG_RUN_ID": ti.run_id,
        "AIRFLOW_CTX_TRY_NUMBER": str(ti.try_number),
        "AIRFLOW_CTX_LOGICAL_DATE": context.get("ts", ""),
        "AIRFLOW_CTX_DAG_OWNER": context["task"].owner,
        "AIRFLOW_CTX_DAG_RUN_LOGICAL_DATE": run.logical_date.isoformat()
        if run.logical_date
        else "",
    }


class PokeReturnValue:
    """What a sensor may return: whether it is done, and the value to store."""

    def __init__(self, is_done: bool | str, xcom_value: Any = None) -> None:
        self.is_done = bool(is_done)
        self.xcom_value = xcom_value

    def __bool__(self) -> bool:
        return self.is_done


def _mode(what: str, value: Any) -> str:
    if value not in ("poke", "reschedule"):
        raise ValueError(f"{what} must be 'poke' or 'reschedule', found {_shown(value)}")
    return str(value)


_SENSOR_SETTINGS: dict[str, _Setting] = {
    "poke_interval": _Setting(_datetime.timedelta(seconds=60), _duration(True, required=True)),
    "timeout": _Setting(_datetime.timedelta(days=7), _duration(True, required=True)),
    "mode": _Setting("poke", _mode),
    "soft_fail": _Setting(False, _flag),
    "exponential_backoff": _Setting(False, _flag),
    "max_wait": _Setting(None, _duration(zero=True)),
    "silent_fail": _Setting(False, _flag),
    "never_fail": _Setting(False, _flag),
}


class _SensorFunction(_FunctionOperator):
    _own_settings: ClassVar[dict[str, _Setting]] = _SENSOR_SETTINGS

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], job: _HasContext) -> Any:
        return _poke_until_true(self, lambda: super(_SensorFunction, self)._run(args, kwargs, job))


class BaseSensorOperator(BaseOperator):
    """A task that waits: a subclass defines `poke(context)`, called until its result is true.

    `poke_interval` (seconds, 60), `timeout` (7 days; then it fails without retry, or is skipped
    with `soft_fail`), `mode` ("poke" keeps the worker, "reschedule" gives it back between pokes),
    `exponential_backoff`, `max_wait`; an exception in a poke fails the task, unless `silent_fail`
    (poke again) or `never_fail` (skip).
    """

    _own_settings: ClassVar[dict[str, _Setting]] = _SENSOR_SETTINGS

    def poke(self, context: Context) -> Any:
        """Whether the waiting is over; a `PokeReturnValue` carries a result, too."""
        raise NotImplementedError(f"{type(self).__name__} defines no poke(self, context)")

    def execute(self, context: Context) -> Any:
        """Poke until it is true."""
        return _poke_until_true(self, lambda: self.poke(context))


def _poke_until_true(task: Any, poke: Callable[[], Any]) -> Any:
    """A sensor's loop; its time counts from its first poke, in whatever worker that was."""
    job = _running_job()
    timeout, number = task.timeout.total_seconds(), job.reschedules
    while True:
        number += 1
        try:
            found = poke()
        except AirflowSkipException:
            raise
        except (AirflowFailException, AirflowSensorTimeout) as error:
            if task.soft_fail or task.never_fail:
                raise AirflowSkipException(f"the poke raised {_one_line(error)}") from error
            raise
        except Exception as error:  # a user's poke may raise anything
            if task.never_fail:
                raise AirflowSkipException(f"the poke raised {_one_line(error)}") from error
            if not task.silent_fail:
                raise
            task.log.exception("the poke failed")
            found = False
        if found:
            return found.xcom_value if isinstance(found, PokeReturnValue) else None
        if time.time() - job.first_start > timeout:
            if task.soft_fail:
                raise AirflowSkipException(f"the sensor waited for more than {timeout:g} s")
            raise AirflowSensorTimeout(f"the sensor waited for more than {timeout:g} s")
        wait = _poke_wait(task, number)
        if task.mode == "reschedule":
            raise _Reschedule(wait)
        time.sleep(wait)


def _poke_wait(task: Any, number: int) -> float:
    wait: float = task.poke_interval.total_seconds()
    if task.exponential_backoff:
        wait = min(wait * 2.0 ** min(number - 1, 60), task.timeout.total_seconds())
    if task.max_wait is not None:
        wait = min(wait, task.max_wait.total_seconds())
    return wait


class EmptyOperator(BaseOperator):
    """Does nothing: a place to join, start or end at. Takes no worker and stores no value."""

    _needs_worker = False

    def execute(self, context: Context) -> None:
        """Nothing."""


class PythonOperator(BaseOperator):
    """Calls `python_callable(*op_args, **op_kwargs)`, with what it names of the context.

    Raises AirflowException if there is no callable.
    """

    template_fields = ("templates_dict", "op_args", "op_kwargs")

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Any = (),
        op_kwargs: Any = None,
        templates_dict: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not callable(python_callable):
            raise AirflowException(
                f"task {self.task_id!r}: python_callable must be callable, found "
                f"{_shown(python_callable)}"
            )
        self.python_callable = python_callable
        self.op_args = op_args
        self.op_kwargs = op_kwargs if op_kwargs is not None else {}
        self.templates_dict = templates_dict

    def execute(self, context: Context) -> Any:
        """Call the callable."""
        return _call_python(self, context)


def _call_python(task: Any, context: Context) -> Any:
    import inspect

    given = {**context, "templates_dict": getattr(task, "templates_dict", None)}
    signature = inspect.signature(task.python_callable)
    args = tuple(task.op_args or ())
    kwargs = _with_context(signature, args, dict(task.op_kwargs or {}), given)
    return _finished(task.python_callable(*args, **kwargs))


class BranchPythonOperator(PythonOperator):
    """As `@task.branch`: the callable returns the ids of the tasks to go on with."""

    _flow = "branch"


class ShortCircuitOperator(PythonOperator):
    """As `@task.short_circuit`: a false result skips all that comes after."""

    _flow = "short_circuit"
    _own_settings: ClassVar[dict[str, _Setting]] = _SHORT_CIRCUIT_SETTINGS


class BaseBranchOperator(BaseOperator):
    """A subclass defines `choose_branch(context)`, which returns the ids to go on with."""

    _flow = "branch"

    def choose_branch(self, context: Context) -> Any:
        """A task id, a group id, a list of them, or None."""
        raise NotImplementedError(f"{type(self).__name__} defines no choose_branch(self, context)")

    def execute(self, context: Context) -> Any:
        """Choose."""
        return self.choose_branch(context)


class PythonSensor(BaseSensorOperator):
    """A sensor whose poke is a call of `python_callable(*op_args, **op_kwargs)`."""

    template_fields = ("op_args", "op_kwargs")

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Any = (),
        op_kwargs: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.python_callable = python_callable
        self.op_args = op_args
        self.op_kwargs = op_kwargs if op_kwargs is not None else {}

    def poke(self, context: Context) -> Any:
        """Call the callable."""
        return _call_python(self, context)


def _refuse_templates(task: BaseOperator) -> None:
    """Without jinja2, a template would quietly mean its own text: refuse it when it is made."""
    import importlib.util

    for name in task.template_fields:
        for text in _strings_in(getattr(task, name, None)):
            if ("{{" in text or "{%" in text) and importlib.util.find_spec("jinja2") is None:
                raise ValueError(
                    f"task {task.task_id!r}: {name} holds a Jinja template, {_shown(text, 60)}: "
                    "install jinja2 to have it rendered, or use @task.bash or @task, where a "
                    "string is passed as it is"
                )


def _render_templates(task: BaseOperator, values: Mapping[str, Any], context: Context) -> None:
    """Render what a file written for Airflow has in its template fields; values of results are
    not rendered."""
    for name in task.template_fields:
        value = getattr(task, name, None)
        if name not in values and any("{{" in t or "{%" in t for t in _strings_in(value)):
            object.__setattr__(task, name, _rendered(value, context))


def _rendered(value: Any, context: Context) -> Any:
    if isinstance(value, str):
        import importlib

        jinja2: Any = importlib.import_module("jinja2")  # the user's, if it is there
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        environment.filters.update(_FILTERS)
        return environment.from_string(value).render(context)
    if isinstance(value, dict):
        return {key: _rendered(item, context) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rendered(item, context) for item in value)
    return value


class _MappedOperator(BaseOperator):
    """A mapped classic operator: each instance makes an operator of its arguments and runs it."""

    def __init__(
        self, kind: type[BaseOperator], task_id: str, fixed: dict[str, Any], expand: _ExpandInput
    ) -> None:
        known = {**_TASK_SETTINGS, "dag": None, "task_group": None, "default_args": None}
        settings = {name: value for name, value in fixed.items() if name in known}
        self._own_settings = kind._own_settings  # type: ignore[misc]
        own = {name: value for name, value in fixed.items() if name in kind._own_settings}
        super().__init__(task_id=task_id, **settings, **own)
        for name, setting in kind._own_settings.items():
            self.__dict__.setdefault(name, setting.default)
        self._kind = kind
        self._flow = kind._flow
        self._fixed = fixed
        defaults = _defaults_for(self.dag, self.task_group, fixed.get("default_args"))
        makers = [k for k in kind.__mro__ if "__init__" in k.__dict__ and k is not BaseOperator]
        takes = {n for k in makers if issubclass(k, BaseOperator) for n in _keywords_of(k.__init__)}
        self._defaults = {name: value for name, value in defaults.items() if name in takes}
        self._expand = expand
        expand.join(self)
        for result in _results_in(fixed):
            _add_edge(result.operator, self)

    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {name: v for name, v in self._fixed.items() if _holds_placeholder(v)}

    def _made(self, kwargs: dict[str, Any]) -> BaseOperator:
        settings = {**self._defaults, **self._fixed, **kwargs, "dag": None, "task_group": None}
        kwargs.clear()
        token = _current_dag.set(None)
        try:
            made = self._kind(task_id=self.task_id, **settings)
        finally:
            _current_dag.reset(token)
        made.dag = self.dag
        made._upstream, made._downstream = self._upstream, self._downstream
        return made


class _OperatorPartial:
    """What `partial` of an operator's class gives: `expand` has to follow."""

    def __init__(self, kind: type[BaseOperator], task_id: str, fixed: dict[str, Any]) -> None:
        self._kind, self._task_id, self._fixed = kind, task_id, fixed

    def expand(self, **mapped: Any) -> BaseOperator:
        """Map the operator over the elements of the arguments; `.output` has all results."""
        _check_arguments_of(self._kind, self._task_id, mapped)
        fixed = {name: value for name, value in self._fixed.items() if name not in mapped}
        return self._make(_ExpandInput(f"task {self._task_id!r}", mapped), fixed)

    def expand_kwargs(self, dicts: Any) -> BaseOperator:
        """Map the operator over dicts of arguments."""
        return self._make(_ExpandInput(f"task {self._task_id!r}", None, dicts), self._fixed)

    def _make(self, expand: _ExpandInput, fixed: dict[str, Any]) -> BaseOperator:
        dag = fixed.get("dag") or _current_dag.get()
        group = fixed.get("task_group") or _group_in(dag)
        _check_expand(self._task_id, expand, fixed, group)
        return _MappedOperator(self._kind, self._task_id, fixed, expand)


# --- Building: DAGs -------------------------------------------------------------------------------


def _schedule(what: str, value: Any) -> Any:
    """Airflow's schedules: kept, and nothing more."""
    if isinstance(value, (int, float, bytes)) or type(value) is object:
        raise ValueError(
            f"{what} must be None, a cron string or a timedelta, found {_shown(value)}"
        )
    return value


def _date(what: str, value: Any) -> _datetime.datetime | None:
    if value is not None and not isinstance(value, _datetime.datetime):
        raise TypeError(f"{what} must be a datetime, found {_shown(value)}")
    return value.replace(tzinfo=_datetime.UTC) if value and value.tzinfo is None else value


_DAG_SETTINGS: dict[str, _Setting] = {
    "description": _Setting(None, _a(str, type(None))),
    "default_args": _Setting({}, _string_keyed),
    "params": _Setting({}, _params),
    "max_active_tasks": _Setting(16, _whole(1, none=16)),
    "max_active_runs": _Setting(16, _whole(1, none=16)),
    "dagrun_timeout": _Setting(None, _duration(zero=False)),
    "fail_fast": _Setting(False, _flag),
    "doc_md": _Setting(None, _a(str, type(None))),
    "tags": _Setting(frozenset(), lambda what, value: set(value or ())),
    "dag_display_name": _Setting(None, _a(str, type(None))),
    "on_success_callback": _callback,
    "on_failure_callback": _callback,
    "schedule": _Setting(None, _schedule),
    "start_date": _Setting(None, _date),
    "end_date": _Setting(None, _date),
    "catchup": _Setting(False, _flag),
    "max_consecutive_failed_dag_runs": _Setting(0, _whole(0, none=0)),
    "render_template_as_native_obj": _Setting(False, _flag),
    **dict.fromkeys(
        """is_paused_upon_creation template_searchpath
        template_undefined user_defined_macros user_defined_filters jinja_environment_kwargs
        owner_links access_control auto_register deadline allowed_run_types
        disable_bundle_versioning rerun_with_latest_version sla_miss_callback""".split(),
        _ignored,
    ),
}

_current_dag: contextvars.ContextVar[Dag | None] = contextvars.ContextVar(
    "liteflow_current_dag", default=None
)
# Every Dag by (module, dag_id, n): the n-th of that id built in that module. A worker that
# imports the module finds its own Dag under the same key, or none.
_built: weakref.WeakValueDictionary[tuple[str, str, int], Dag] = weakref.WeakValueDictionary()
_built_counts: collections.Counter[tuple[str, str]] = collections.Counter()
_kept_dags: list[Dag] = []


class Dag:
    """A DAG: tasks and the order between them.

    Use it as a context manager (tasks made inside the block belong to it) or hand it to tasks as
    `dag=`. Arguments are Airflow's: `description`, `default_args`, `params`, `max_active_tasks`
    (16 a run), `max_active_runs`, `fail_fast`, `doc_md`, `tags`, ...; `schedule`, `start_date`,
    `catchup` and the like are kept and change nothing: liteflow schedules nothing. `db_path` is
    the database of its runs. `DAG` and `Dag` are one class.

    Raises TypeError for an unknown argument, ValueError for a wrong id.
    """

    description: str | None
    default_args: dict[str, Any]
    params: dict[str, Any]
    max_active_tasks: int
    max_active_runs: int
    fail_fast: bool
    doc_md: str | None
    tags: set[str]

    def __init__(
        self, dag_id: str, *, db_path: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        self.dag_id = _checked_id("dag_id", dag_id)
        self.db_path = db_path
        unknown = settings.keys() - _DAG_SETTINGS.keys()
        if unknown:
            raise TypeError(
                f"DAG {dag_id!r} got an unknown argument "
                f"{min(unknown)!r}{_near(min(unknown), _DAG_SETTINGS)}"
            )
        for name, (default, check) in _DAG_SETTINGS.items():
            value = settings.get(name, default)
            setattr(self, name, check(f"DAG {dag_id!r}: {name}", value))
        self.dag_display_name: str = settings.get("dag_display_name") or dag_id
        self.params = {**self.params, **self.default_args.pop("params", {})}
        self.task_dict: dict[str, BaseOperator] = {}
        self.task_group_dict: dict[str, TaskGroup] = {}
        self._suffixes: dict[str, int] = {}
        self._scopes: list[tuple[BaseOperator, set[str]]] = []
        self._tokens: list[contextvars.Token[Dag | None]] = []
        self._register()

    def _register(self) -> None:
        """Note which module's import builds this Dag: the nearest one on the stack."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "<module>":
            frame = frame.f_back  # type: ignore[assignment]
        names = frame.f_globals if frame is not None else {}
        self._module = _module_name(names.get("__name__", ""))
        self.fileloc: str | None = names.get("__file__")
        place = (self._module, self.dag_id)
        self._key = (*place, _built_counts[place])
        _built_counts[place] += 1
        _built[self._key] = self
        if _importing_in_child():
            _kept_dags.append(self)

    def __enter__(self) -> Dag:
        self._tokens.append(_current_dag.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _current_dag.reset(self._tokens.pop())

    @property
    def task(self) -> _TaskDecorator:
        """`@dag.task`: `@task` for this DAG, inside or outside its `with` block."""
        return _TaskDecorator(self)

    @property
    def tasks(self) -> list[BaseOperator]:
        """All tasks, in the order they were made."""
        return list(self.task_dict.values())

    @property
    def task_ids(self) -> list[str]:
        """The ids of all tasks, in the order they were made."""
        return list(self.task_dict)

    @property
    def roots(self) -> list[BaseOperator]:
        """The tasks that wait for none."""
        return [t for t in self.task_dict.values() if not t._upstream]

    @property
    def leaves(self) -> list[BaseOperator]:
        """The tasks that none waits for; they decide the run's state."""
        return [t for t in self.task_dict.values() if not t._downstream]

    def has_task(self, task_id: str) -> bool:
        """Whether the DAG has a task of this id."""
        return task_id in self.task_dict

    def get_task(self, task_id: str) -> BaseOperator:
        """The task of this id. Raises TaskNotFound."""
        try:
            return self.task_dict[task_id]
        except KeyError:
            raise TaskNotFound(self._no_task(task_id)) from None

    def __getitem__(self, node_id: str) -> BaseOperator | TaskGroup:
        """The task or group of this id. Raises NodeNotFound, a KeyError."""
        found = self.task_dict.get(node_id) or self.task_group_dict.get(node_id)
        if found is None:
            raise NodeNotFound(self._no_task(node_id))
        return found

    def __contains__(self, node_id: str) -> bool:
        return self._has_node(node_id)

    def _has_node(self, node_id: str) -> bool:
        return node_id in self.task_dict or node_id in self.task_group_dict

    def _add_group(self, group: TaskGroup) -> None:
        self.task_group_dict[group.group_id] = group
        self._note_suffix(group.group_id)

    def _no_task(self, task_id: str) -> str:
        return f"DAG {self.dag_id!r} has no task {task_id!r}{_near(str(task_id), self.task_dict)}"

    def _add(self, task: BaseOperator) -> None:
        if self._has_node(task.task_id):
            raise DuplicateTaskIdFound(
                f"DAG {self.dag_id!r} already has a task {task.task_id!r}: give this one another "
                "task_id"
            )
        if self.fail_fast and task.trigger_rule is not TriggerRule.ALL_SUCCESS:
            raise FailFastDagInvalidTriggerRule(
                f"task {task.task_id!r} has trigger_rule {task.trigger_rule.value!r}, and DAG "
                f"{self.dag_id!r} has fail_fast=True, which only allows 'all_success'"
            )
        task.dag = self
        self.task_dict[task.task_id] = task
        self._note_suffix(task.task_id)

    def _note_suffix(self, node_id: str) -> None:
        suffix = _SUFFIX.search(node_id)
        if suffix:
            core = node_id[: suffix.start()]
            self._suffixes[core] = max(self._suffixes.get(core, 0), int(suffix[1]))

    def _free_task_id(self, task_id: str) -> str:
        """The id itself, or with one more than the highest suffix in use (Airflow's rule)."""
        if not self._has_node(task_id):
            return task_id
        core = _SUFFIX.sub("", task_id)
        return f"{core}__{self._suffixes.get(core, 0) + 1}"

    def validate(self) -> None:
        """Raises AirflowDagCycleException for a circle, ValueError for a task right below a setup
        with another trigger rule than all_success."""
        self.check_cycle()
        for task in self.task_dict.values():
            if task._is_setup:
                for below in task.downstream_list:
                    allowed = (TriggerRule.ALL_SUCCESS, TriggerRule.ALL_DONE_SETUP_SUCCESS)
                    if below.trigger_rule not in allowed:
                        raise ValueError(
                            f"task {below.task_id!r} stands right below the setup "
                            f"{task.task_id!r}, so its trigger_rule must be 'all_success', found "
                            f"{below.trigger_rule.value!r}"
                        )

    def check_cycle(self) -> None:
        """Raises AirflowDagCycleException, which shows the circle, if tasks wait for each other."""
        self.topological_sort()

    def topological_sort(self) -> list[BaseOperator]:
        """The tasks in an order in which each comes after those it waits for."""
        import graphlib

        sorter = graphlib.TopologicalSorter({t: x._upstream for t, x in self.task_dict.items()})
        try:
            return [self.task_dict[t] for t in sorter.static_order()]
        except graphlib.CycleError as error:
            circle = error.args[1]
            shown = circle if len(circle) <= 12 else [*circle[:6], "...", *circle[-5:]]
            raise AirflowDagCycleException(
                f"DAG {self.dag_id!r} has a cycle: {' -> '.join(shown)}"
            ) from None

    def run(
        self,
        *,
        db_path: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        logical_date: _datetime.datetime | None = None,
        conf: Mapping[str, Any] | None = None,
        resume: bool = False,
        max_workers: int | None = None,
        executor: Executor | WorkerPool | None = None,
        mp_context: multiprocessing.context.BaseContext | str | None = None,
        pools: Mapping[str, int] | None = None,
        wait: bool = False,
        progress: bool | Callable[[str], object] = False,
        stop: threading.Event | None = None,
    ) -> DagRun:
        """Run every task once the tasks it waits for allow it; return the finished run.

        A failed task does not raise: look at the run's `state`. `db_path` is the argument, else
        the DAG's, else `$LITEFLOW_DB`, else `liteflow.db` in the working directory. `run_id` is
        made from the time unless given; `logical_date` is now unless given; `conf` is a JSON
        object for the run. `resume=True` goes on with the run `run_id`, or with the newest one
        if that is no success. `max_workers` processes are started by the method `mp_context`, or
        `executor` is a `WorkerPool` or any `concurrent.futures.Executor`. `pools` gives the sizes
        of the pools that tasks name, `{"gpu": 1}`. `wait=True` waits while
        another run of the DAG rules this one out. `progress=True` prints what happens to standard
        error, a callable gets each line. Setting the event `stop` ends the run as failed.

        Raises, before anything runs or is written: AirflowDagCycleException, UnreachableTask,
        ParamValidationError, DatabaseError, RunNotFound, AlreadyRunning, TypeError, ValueError.
        On SIGINT, SIGTERM or SIGHUP it records all, then raises KeyboardInterrupt or SystemExit.
        """
        options = dict(locals())
        del options["self"]
        return _run_dag(self, **options)

    def test(
        self,
        run_after: _datetime.datetime | None = None,
        logical_date: _datetime.datetime | None = None,
        run_conf: Mapping[str, Any] | None = None,
        conn_file_path: str | None = None,
        variable_file_path: str | None = None,
        use_executor: bool = False,
        mark_success_pattern: str | None = None,
        *,
        db_path: str | os.PathLike[str] | None = None,
    ) -> DagRun:
        """Run in this process, one task after another, so that a debugger's breakpoints work.

        Writes the database as `run` does, captures no output and ends no task that outlives its
        timeout otherwise than by raising AirflowTaskTimeout in it. The signature is Airflow's;
        what has no meaning here (`conn_file_path`, ...) is refused unless left out.
        """
        unused = (conn_file_path, variable_file_path, mark_success_pattern)
        if use_executor or any(value is not None for value in unused):
            raise ValueError(
                "dag.test() here takes logical_date, run_conf and db_path; conn_file_path, "
                "variable_file_path, use_executor and mark_success_pattern have no meaning"
            )
        return _run_dag(
            self, db_path=db_path, logical_date=logical_date, conf=run_conf, in_process=True
        )

    def cli(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Make the script a command: run this DAG by `argv`, then exit with the run's code.

        Without arguments it runs; `--help` lists the options.
        """
        sys.exit(_dag_cli(self, argv))

    def to_mermaid(self, direction: str = "TD") -> str:
        """The DAG as a Mermaid flowchart, drawn from the code: what would run."""
        return _draw_dag(self, direction)

    def runs(
        self,
        db_path: str | os.PathLike[str] | None = None,
        *,
        state: str | None = None,
        limit: int | None = None,
    ) -> list[DagRun]:
        """The recorded runs of this DAG, newest first. Raises DatabaseError."""
        return _read_runs(_database_path(db_path, self), self.dag_id, state=state, limit=limit)

    def get_run(self, run_id: str, db_path: str | os.PathLike[str] | None = None) -> DagRun:
        """The recorded run of this id. Raises RunNotFound, DatabaseError."""
        return _read_run(_database_path(db_path, self), self.dag_id, run_id)

    @staticmethod
    def load(dag_id: str, db_path: str | os.PathLike[str] | None = None) -> Dag:
        """A DAG by its record: metadata and history (`runs`, `get_run`) without its tasks.

        The database never holds task code or the graph, so `run()` and everything about tasks
        raise a RuntimeError that names the script. Raises DagNotFound (a LookupError) for an
        unknown id, DatabaseError.
        """
        return _load_dag(dag_id, _database_path(db_path, None))

    def __repr__(self) -> str:
        return f"<DAG: {self.dag_id}>"


DAG = Dag


class _RecordedDag(Dag):
    """What `Dag.load` returns: a DAG's metadata and history, without its code."""

    def _register(self) -> None:
        self._module = ""
        self.fileloc = None

    def _refuse(self) -> NoReturn:
        script = (
            f"run the script which defines it: {self.fileloc}"
            if self.fileloc
            else ("run the script which defines it")
        )
        raise RuntimeError(
            f"DAG {self.dag_id!r} was loaded from {os.fspath(self.db_path or '')}, which holds its "
            f"history and not its tasks; {script}"
        )


def _refused(self: _RecordedDag, *args: object, **kwargs: object) -> NoReturn:
    """A loaded DAG has metadata and history only."""
    self._refuse()


for (
    _name
) in """run test cli to_mermaid has_task get_task check_cycle validate topological_sort __enter__
    __getitem__ __contains__""".split():
    setattr(_RecordedDag, _name, _refused)
for _name in ("task", "tasks", "task_ids", "roots", "leaves"):
    setattr(_RecordedDag, _name, property(_refused))
del _name


def _module_name(name: str) -> str:
    """A module's name as the script's own process has it: workers call `__main__` differently."""
    return "__main__" if name == "__mp_main__" else name


_WORKER_MARK = "liteflow-worker-"


def _importing_in_child() -> bool:
    """Whether this is a child process importing the modules of its parent (or a worker of ours).

    There nobody else may hold the Dag that a worker will be asked for, so it has to be kept.
    """
    # Another thread may be just importing it.
    ask = getattr(sys.modules.get("multiprocessing.process"), "current_process", None)
    if ask is None:
        return False
    current = ask()
    return bool(getattr(current, "_inheriting", False)) or current.name.startswith(_WORKER_MARK)


@overload
def dag(function: Callable[P, Any], /) -> Callable[P, Dag]: ...
@overload
def dag(
    dag_id: str = ..., /, **settings: Any
) -> Callable[[Callable[P, Any]], Callable[P, Dag]]: ...
def dag(*functions: Any, **settings: Any) -> Any:
    """`@dag`: make a DAG of the function's tasks; calling the function returns the DAG.

    Use it bare, as `@dag("id")` or `@dag(dag_id=..., **settings)` with the arguments of `DAG`.
    The id is the function's name unless given, its docstring the `doc_md`. The function's
    arguments become params: inside it each is a placeholder that can be handed to tasks, at run
    time `conf[name]`, else the value of the call.
    """
    if len(functions) > 1:
        raise TypeError(f"@dag takes one id or function, found {len(functions)} arguments")
    if functions and callable(functions[0]):
        return _dag_function(functions[0], settings)
    if functions:
        settings["dag_id"] = functions[0]
    return lambda function: _dag_function(function, settings)


def _dag_function(function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Dag]:
    import inspect

    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Dag:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        made = Dag(**{"dag_id": function.__name__, "doc_md": function.__doc__, **settings})
        for name, value in bound.arguments.items():
            made.params[name] = value if isinstance(value, Param) else Param(value)
            value = value.default if isinstance(value, Param) else value
            bound.arguments[name] = _DagParam(name, value)
        with made:
            function(*bound.args, **bound.kwargs)
        return made

    return build


def chain(*tasks: Any) -> None:
    """Set each argument before the next; neighbouring lists go pairwise and must be as long."""
    for before, after in itertools.pairwise(tasks):
        if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
            if len(before) != len(after):
                raise ValueError(
                    f"chain() takes neighbouring lists of one length, found {len(before)} and "
                    f"{len(after)}"
                )
            for one, other in zip(_operands(before), _operands(after), strict=True):
                one.set_downstream(other)
        else:
            for one in _operands(before):
                one.set_downstream(after)


def chain_linear(*elements: Any) -> None:
    """Set every task of each argument before every task of the next."""
    if (
        len([element for element in elements if not isinstance(element, (list, tuple)) or element])
        < 2
    ):
        raise ValueError("chain_linear() takes two or more tasks or lists of tasks: none were set")
    for before, after in itertools.pairwise(elements):
        for one in _operands(before):
            one.set_downstream(after)


def cross_downstream(from_tasks: Any, to_tasks: Any) -> None:
    """Set every task of the first list before every one of the second."""
    if not isinstance(from_tasks, (list, tuple)):
        raise TypeError(f"cross_downstream() takes a list first, found {_shown(from_tasks)}")
    for one in _operands(from_tasks):
        one.set_downstream(to_tasks)


# --- Building: variables and params ---------------------------------------------------------------


class Variable:
    """Airflow's Variables, read from the environment: `Variable.get("x")` is AIRFLOW_VAR_X."""

    @staticmethod
    def get(key: str, default: Any = ..., deserialize_json: bool = False) -> Any:
        """The value of `AIRFLOW_VAR_<KEY>`, as text or parsed from JSON.

        Raises KeyError if it is not set and no default is given.
        """
        text = os.environ.get(f"AIRFLOW_VAR_{key.upper()}")
        if text is None:
            if default is ...:
                raise KeyError(
                    f"Variable {key!r}: set AIRFLOW_VAR_{key.upper()} in the environment"
                )
            return default
        return json.loads(text) if deserialize_json else text


_MISSING: Any = type("_Missing", (), {"__repr__": lambda self: "<none>"})()
_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list, tuple),
    "object": (dict,),
}


class Param:
    """A parameter of a DAG or task: a default, a description and a JSON schema for its value.

    Checked keywords: type, enum, const, minimum, maximum, exclusiveMinimum, exclusiveMaximum,
    minLength, maxLength, pattern, format (date, date-time, time, duration), items, minItems,
    maxItems, required, properties; title, description, examples and others that only describe are
    kept. Any other keyword is a ValueError: none is silently unchecked. Values are checked when a
    run is made.
    """

    _DESCRIBE = frozenset(
        """title examples description_md values_display section source custom_html_form
        $schema""".split()
    )

    def __init__(self, default: Any = _MISSING, description: str | None = None, **schema: Any):
        self.default = default
        self.description = description
        self.schema = schema
        _check_schema(schema)
        if default is not _MISSING:
            _json_text("Param default", default, ParamValidationError)

    @property
    def value(self) -> Any:
        """The default."""
        return self.default

    def resolve(self, value: Any = _MISSING) -> Any:
        """The value, or the default, if it fits the schema. Raises ParamValidationError."""
        value = self.default if value is _MISSING else value
        if value is _MISSING:
            raise ParamValidationError("no value was given and there is no default")
        _validate(value, self.schema, "value")
        return value

    def __repr__(self) -> str:
        return f"Param({self.default!r})"


def _json_text(what: str, value: Any, error_class: type[Exception]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise error_class(f"{what} must be JSON: {error}; found {_shown(value)}") from None


def _check_schema(schema: Mapping[str, Any]) -> None:
    for keyword, rule in schema.items():
        if keyword in Param._DESCRIBE:
            continue
        if keyword not in _CHECKS and keyword not in ("type", "items", "properties", "required"):
            known = ", ".join(sorted([*_CHECKS, "items", "properties", "required", "type"]))
            raise ValueError(
                f"Param: the schema keyword {keyword!r} is not checked by liteflow; known: {known}"
            )
        if keyword == "type":
            for name in [rule] if isinstance(rule, str) else rule:
                if name not in _TYPES:
                    raise ValueError(f"Param: unknown type {name!r}{_near(str(name), _TYPES)}")
        elif keyword == "format" and rule not in _FORMATS:
            raise ValueError(f"Param: format {rule!r} is not checked; known: {', '.join(_FORMATS)}")
        elif keyword == "pattern":
            try:
                re.compile(rule)
            except (re.error, TypeError) as error:
                raise ValueError(f"Param: pattern {rule!r} is none: {error}") from None
        elif keyword in _NUMBERS and not _is_number(rule):
            raise ValueError(f"Param: {keyword} must be a number, found {_shown(rule)}")
        elif keyword == "items":
            if not isinstance(rule, Mapping):
                raise ValueError(f"Param: items must be a schema, found {_shown(rule)}")
            _check_schema(rule)
        elif keyword == "properties":
            for each in rule.values():
                _check_schema(each)


_NUMBERS = frozenset(
    """minimum maximum exclusiveMinimum exclusiveMaximum minLength maxLength minItems
    maxItems""".split()
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_DURATION = re.compile(
    r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?"
)  # ISO 8601


def _is_iso(kind: Any) -> Callable[[str], bool]:
    def fits(text: str) -> bool:
        try:
            kind.fromisoformat(text)
        except ValueError:
            return False
        return kind is not _datetime.datetime or len(text) > 10

    return fits


_FORMATS: dict[str, Callable[[str], bool]] = {
    "date": _is_iso(_datetime.date),
    "date-time": _is_iso(_datetime.datetime),
    "time": _is_iso(_datetime.time),
    "duration": lambda text: _DURATION.fullmatch(text) is not None,
    "multiline": lambda text: True,  # only says how Airflow's form shows it
}


# JSON Schema: a keyword says something only of values of its own kind.
_CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "enum": lambda v, rule: any(
        v == x and isinstance(v, bool) == isinstance(x, bool) for x in rule
    ),
    "const": lambda v, rule: v == rule and isinstance(v, bool) == isinstance(rule, bool),
    "minimum": lambda v, rule: not _is_number(v) or v >= rule,
    "maximum": lambda v, rule: not _is_number(v) or v <= rule,
    "exclusiveMinimum": lambda v, rule: not _is_number(v) or v > rule,
    "exclusiveMaximum": lambda v, rule: not _is_number(v) or v < rule,
    "minLength": lambda v, rule: not isinstance(v, str) or len(v) >= rule,
    "maxLength": lambda v, rule: not isinstance(v, str) or len(v) <= rule,
    "pattern": lambda v, rule: not isinstance(v, str) or re.search(rule, v) is not None,
    "format": lambda v, rule: not isinstance(v, str) or _FORMATS[rule](v),
    "minItems": lambda v, rule: not isinstance(v, (list, tuple)) or len(v) >= rule,
    "maxItems": lambda v, rule: not isinstance(v, (list, tuple)) or len(v) <= rule,
}


def _validate(value: Any, schema: Mapping[str, Any], where: str) -> None:
    kinds = schema.get("type")
    if kinds is not None and not _is_of_type(value, [kinds] if isinstance(kinds, str) else kinds):
        raise ParamValidationError(f"{where} must be of type {kinds}, found {_shown(value)}")
    for keyword, rule in schema.items():
        if keyword in _CHECKS and not _CHECKS[keyword](value, rule):
            raise ParamValidationError(
                f"{where} must fit {keyword} {_shown(rule)}, found {_shown(value)}"
            )
    if isinstance(value, (list, tuple)) and "items" in schema:
        for i, item in enumerate(value):
            _validate(item, schema["items"], f"{where}[{i}]")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise ParamValidationError(f"{where} must have {name!r}, found {_shown(value)}")
        for name, rule in schema.get("properties", {}).items():
            if name in value:
                _validate(value[name], rule, f"{where}[{name!r}]")


def _is_of_type(value: Any, names: Iterable[str]) -> bool:
    for name in names:
        whole_float = name == "integer" and isinstance(value, float) and value.is_integer()
        is_bool = isinstance(value, bool)
        if whole_float or (isinstance(value, _TYPES[name]) and is_bool <= (name == "boolean")):
            return True
    return False


def _plain_copy(value: Any) -> Any:
    """A deep copy of plain data: a task may change what it gets."""
    return marshal.loads(marshal.dumps(value))


def _resolve_params(dag: Dag, conf: Mapping[str, Any]) -> dict[str, Any]:
    """The run's params: the DAG's, under the run's conf; each checked. Tasks' come on top later.

    Raises ParamValidationError, before a run is made.
    """
    values = {}
    for name, declared in dag.params.items():
        param = declared if isinstance(declared, Param) else Param(declared)
        try:
            values[name] = param.resolve(conf.get(name, _MISSING))
        except ParamValidationError as error:
            raise ParamValidationError(f"DAG {dag.dag_id!r}: param {name!r}: {error}") from None
    return {**values, **conf}


def _task_params(task: BaseOperator, run_params: Mapping[str, Any], conf: Mapping[str, Any]) -> Any:
    """What `params` is inside a task: the DAG's, the task's own over them, conf over all."""
    own = {}
    for name, declared in task.params.items():
        param = declared if isinstance(declared, Param) else Param(declared)
        try:
            own[name] = param.resolve(conf.get(name, _MISSING))
        except ParamValidationError as error:
            raise ParamValidationError(f"task {task.task_id!r}: param {name!r}: {error}") from None
    return _plain_copy({**run_params, **own, **conf})


# --- Plan: which task may run, and what follows from each outcome (no I/O, no clock) --------------


class _Recorded(NamedTuple):
    """What a resumed run knows of a task instance."""

    state: TaskInstanceState | None
    try_number: int
    max_tries: int


class _Counts:
    """How the task instances that one waits for have ended; `pending` tasks have not yet."""

    __slots__ = ("failed", "pending", "skipped", "success", "upstream_failed")

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.success = self.failed = self.upstream_failed = self.skipped = 0

    def add(self, state: TaskInstanceState) -> None:
        """One more has ended so."""
        if state is _S.SUCCESS:
            self.success += 1
        elif state is _S.FAILED:
            self.failed += 1
        elif state is _S.SKIPPED:
            self.skipped += 1
        else:
            self.upstream_failed += 1


class _Instance:
    """One task instance in the plan. `try_number` counts started attempts, from 1."""

    __slots__ = (
        "counts",
        "map_index",
        "max_tries",
        "node",
        "queued",
        "row_id",
        "state",
        "try_number",
    )

    def __init__(self, node: _Node, map_index: int, recorded: _Recorded) -> None:
        self.node = node
        self.map_index = map_index
        self.state = recorded.state
        self.try_number = recorded.try_number
        self.max_tries = recorded.max_tries
        self.queued = False  # its rule has let it run
        self.row_id = 0
        self.counts: _Counts | None = None  # of its own index, within a mapped group

    @property
    def task_id(self) -> str:
        return self.node.task.task_id

    @property
    def label(self) -> str:
        """`task_id`, or `task_id[3]` for a mapped instance."""
        return self.task_id if self.map_index < 0 else f"{self.task_id}[{self.map_index}]"

    def move(self, state: TaskInstanceState | None) -> None:
        """Change the state, if the table of transitions allows it."""
        assert state in _NEXT[self.state], f"{self.label}: {self.state} -> {state}"
        self.state = state


class _Expansion:
    """A mapping, of one task or of a group's tasks together: what it waits for."""

    def __init__(self, mapping: _ExpandInput) -> None:
        self.mapping = mapping
        self.nodes: list[_Node] = []
        self.sources: list[_Node] = []  # the tasks whose results it expands over
        self.waiting = 0  # sources that have not ended

    def verdict(self) -> TaskInstanceState | None:
        """How the mapping ends without instances: by a source that failed or was skipped."""
        ends = [x.instances[0].state for x in self.sources if x.instances[0].map_index < 0]
        if _S.FAILED in ends or _S.UPSTREAM_FAILED in ends:
            return _S.UPSTREAM_FAILED
        return _S.SKIPPED if _S.SKIPPED in ends else None


_NO_INDEXES: list[int] = []
_NO_COUNTS = _Counts(0)  # of all the nodes that wait for nothing


class _Node:
    """A task in the plan: its place in the graph, its instances, and how those before it ended."""

    __slots__ = (
        "counts",
        "depth",
        "downstream",
        "expansion",
        "feeds",
        "group",
        "holds",
        "instances",
        "length",
        "limit",
        "open",
        "order",
        "parked",
        "running",
        "setups",
        "stored",
        "task",
        "upstream",
        "weight",
    )

    def __init__(self, task: BaseOperator, order: int) -> None:
        self.task = task
        self.order = order
        self.weight = 0
        self.upstream: tuple[_Node, ...] = ()
        self.downstream: tuple[_Node, ...] = ()
        self.setups: tuple[_Node, ...] = ()  # further up, which it needs to succeed as well
        self.depth = 0  # the longest way from a root
        self.group = task._mapped_group
        self.holds = any(task.__dict__.get(name) is not None for name in _CALLBACK_OF.values())
        self.expansion: _Expansion | None = None
        # Most nodes have none of these: an empty tuple is shared by all.
        self.feeds: tuple[_Expansion, ...] = ()  # the mappings that expand over its result
        self.counts = _NO_COUNTS
        self.instances: list[_Instance] = []
        self.open = 0  # instances that have not ended
        self.running = 0
        self.parked: tuple[_Instance, ...] = ()  # ready, and held back by the limit
        limits = (task.max_active_tis_per_dagrun, task.max_active_tis_per_dag)
        self.limit: float = min((x for x in limits if x is not None), default=math.inf)
        self.length: int | None = None  # of its result, if it is not mapped
        # Indexes under which the instances of a mapped one stored a result.
        self.stored: list[int] = [] if task._mapping is not None else _NO_INDEXES

    @property
    def expanded(self) -> bool:
        """Whether it has the instances that it will have."""
        return self.expansion is None or self.instances[0].map_index >= 0

    def decide(self, instance: _Instance | None) -> TaskInstanceState | None:
        """RUNNING if it may run, the state it ends in without running, or None: wait."""
        for setup in self.setups:
            states = self._states_of(setup, instance)
            if _S.FAILED in states or _S.UPSTREAM_FAILED in states:
                return _S.UPSTREAM_FAILED
            if _S.SKIPPED in states:
                return _S.SKIPPED
            if any(state not in _ENDED for state in states):
                return None
        if not self.upstream:
            return _S.RUNNING
        parts = [self.counts]
        if instance is not None and instance.counts is not None:
            parts.append(instance.counts)
        if self.task._is_teardown:
            return self._decide_teardown(instance, done=not any(c.pending for c in parts))
        return _RULES[self.task.trigger_rule](
            sum(c.success for c in parts),
            sum(c.failed for c in parts),
            sum(c.upstream_failed for c in parts),
            sum(c.skipped for c in parts),
            not any(c.pending for c in parts),
        )

    def _states_of(self, up: _Node, instance: _Instance | None) -> list[TaskInstanceState | None]:
        """The states of an upstream's instances; in one mapped group, of the same index."""
        if instance is not None and up.group is not None and up.group is self.group:
            return [up.instances[instance.map_index].state]
        return [each.state for each in up.instances]

    def _decide_teardown(self, instance: _Instance | None, done: bool) -> TaskInstanceState | None:
        """all_done_setup_success: once all is done, by how its setups ended."""
        if not done:
            return None
        setups = [up for up in self.upstream if up.task._is_setup]
        states = [state for up in setups for state in self._states_of(up, instance)]
        if states and all(state is _S.SKIPPED for state in states):
            return _S.SKIPPED
        if states and _S.SUCCESS not in states:
            return _S.UPSTREAM_FAILED
        return _S.RUNNING


def _all_success(s: int, f: int, u: int, k: int, done: bool) -> TaskInstanceState | None:
    if f or u:
        return _S.UPSTREAM_FAILED
    return _S.SKIPPED if k else _S.RUNNING if done else None


def _all_done_min_one_success(
    s: int, f: int, u: int, k: int, done: bool
) -> TaskInstanceState | None:
    if k:
        return _S.SKIPPED
    return None if not done else _S.RUNNING if s else _S.UPSTREAM_FAILED


def _one_success(s: int, f: int, u: int, k: int, done: bool) -> TaskInstanceState | None:
    if s:
        return _S.RUNNING
    return None if not done else _S.UPSTREAM_FAILED if f or u else _S.SKIPPED


def _none_failed(s: int, f: int, u: int, k: int, done: bool) -> TaskInstanceState | None:
    return _S.UPSTREAM_FAILED if f or u else _S.RUNNING if done else None


def _none_failed_min_one_success(
    s: int, f: int, u: int, k: int, done: bool
) -> TaskInstanceState | None:
    if f or u:
        return _S.UPSTREAM_FAILED
    return None if not done else _S.RUNNING if s else _S.SKIPPED


def _if_none(
    spoils: Callable[[int, int, int, int], int],
) -> Callable[[int, int, int, int, bool], TaskInstanceState | None]:
    """Skipped as soon as one of the states that spoil it is there, else run when all are done."""
    return lambda s, f, u, k, done: (
        _S.SKIPPED if spoils(s, f, u, k) else _S.RUNNING if done else None
    )


def _if_one(
    calls: Callable[[int, int, int, int], int],
) -> Callable[[int, int, int, int, bool], TaskInstanceState | None]:
    """Run as soon as one of the states that call for it is there; skipped if none will be."""
    return lambda s, f, u, k, done: (
        _S.RUNNING if calls(s, f, u, k) else _S.SKIPPED if done else None
    )


# Airflow's table: s, f, u, k upstream instances are success, failed, upstream_failed, skipped.
_RULES: dict[TriggerRule, Callable[[int, int, int, int, bool], TaskInstanceState | None]] = {
    TriggerRule.ALL_SUCCESS: _all_success,
    TriggerRule.ALL_FAILED: _if_none(lambda s, f, u, k: s or k),
    TriggerRule.ALL_DONE: lambda s, f, u, k, done: _S.RUNNING if done else None,
    TriggerRule.ALL_DONE_MIN_ONE_SUCCESS: _all_done_min_one_success,
    TriggerRule.ONE_SUCCESS: _one_success,
    TriggerRule.ONE_FAILED: _if_one(lambda s, f, u, k: f or u),
    TriggerRule.ONE_DONE: _if_one(lambda s, f, u, k: s or f),
    TriggerRule.NONE_FAILED: _none_failed,
    TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS: _none_failed_min_one_success,
    TriggerRule.NONE_SKIPPED: _if_none(lambda s, f, u, k: k),
    TriggerRule.ALL_SKIPPED: _if_none(lambda s, f, u, k: s or f or u),
    TriggerRule.ALWAYS: lambda s, f, u, k, done: _S.RUNNING,
    # A task that is no teardown (those look at their setups) and has been given the rule.
    TriggerRule.ALL_DONE_SETUP_SUCCESS: lambda s, f, u, k, done: _S.RUNNING if done else None,
}


class _Status(enum.Enum):
    """How an attempt ended, as its worker or runner reports it."""

    SUCCESS = "success"
    SKIPPED = "skipped"
    FAILED = "failed"  # retried while tries are left
    FATAL = "fatal"  # failed, and not retried
    RESCHEDULE = "reschedule"  # a sensor gives its worker back for a while


_STATUSES = {status.value: status for status in _Status}  # looked up faster than made


# --- Plan: the machine ----------------------------------------------------------------------------

_HESITATION = 1.0  # seconds; see _Plan._hesitates


class _BadBranch(AirflowException):
    """A branch chose something that the DAG does not have."""


class _Plan:
    """The state of a run: fed with what happened, it says what may start and what changed.

    `take` gives the instances that may start, one by one; `start` says that one did, `finish` how
    it ended. `settle`, after the events of a turn, draws the conclusions; `changed` collects the
    instances whose state a rule decided, `expanded` the tasks that got their instances, for the
    run loop to record. Times are seconds of whatever clock the caller passes in.
    """

    def __init__(
        self,
        dag: Dag,
        logical_date: _datetime.datetime | None = None,
        recorded: Mapping[tuple[str, int], _Recorded] | None = None,
        lengths: Mapping[tuple[str, int], int | None] | None = None,
        pools: Mapping[str, int] | None = None,
    ) -> None:
        self.dag = dag
        self.logical_date = logical_date
        self.changed: list[_Instance] = []
        self.expanded: list[_Node] = []
        self.doomed: list[_Instance] = []  # running, and to be ended by the run loop
        self.running = 0
        self.unfinished = 0
        self.timed_out = False
        self._gave_up = False
        self.notes: list[str] = []
        self._free = dict(pools or {})
        self._queues: dict[str, list[tuple[int, int, int, _Instance]]] = {}
        self._waiting: list[tuple[float, int, int, _Instance]] = []  # for a retry, a next poke
        self._dirty: dict[tuple[_Node, _Instance | None], None] = {}
        self._hesitant: dict[_Node, tuple[float, set[_Node]]] = {}
        self._by_id: dict[str, _Node] = {}
        self._recorded = recorded or {}
        self._make_nodes(self._recorded, lengths or {})
        self._begin()

    # Building.

    def _make_nodes(
        self,
        recorded: Mapping[tuple[str, int], _Recorded],
        lengths: Mapping[tuple[str, int], int | None],
    ) -> None:
        self.nodes = [_Node(task, i) for i, task in enumerate(self.dag.task_dict.values())]
        nodes = self._by_id = {node.task.task_id: node for node in self.nodes}
        for node in self.nodes:
            node.upstream = tuple(nodes[t] for t in node.task._upstream)
            node.downstream = tuple(nodes[t] for t in node.task._downstream)
            outside = [up for up in node.upstream if not self._in_step(up, node)]
            if outside:
                node.counts = _Counts(len(outside))
        for task in self.dag.topological_sort():
            node = nodes[task.task_id]
            node.depth = max((up.depth + 1 for up in node.upstream), default=0)
        if any(node.task._is_setup for node in self.nodes):
            self._find_setups()
        self._weigh()
        self._make_expansions()
        by_task: dict[str, list[int]] = {}
        for task_id, index in recorded:
            by_task.setdefault(task_id, []).append(index)
        for (task_id, index), length in lengths.items():
            if task_id in nodes:
                self._note_result(nodes[task_id], index, length)
        for node in self.nodes:
            self._make_instances(node, recorded, by_task.get(node.task.task_id, []))

    @staticmethod
    def _in_step(up: _Node, down: _Node) -> bool:
        """Whether both stand in one mapped group, so that index waits for index."""
        return up.group is not None and up.group is down.group

    def _find_setups(self) -> None:
        """Setups above a task that are not right above it, and whose teardown is not, either."""
        below: dict[_Node, set[_Node]] = {}
        for node in sorted(self.nodes, key=lambda n: -n.depth):
            below[node] = set().union(*({d} | below[d] for d in node.downstream), ())
        for setup in (node for node in self.nodes if node.task._is_setup):
            teardowns = {d for d in setup.downstream if d.task._is_teardown}
            for node in below[setup]:
                scoped = not teardowns or teardowns & below[node]
                if scoped and not node.task._is_teardown and setup not in node.upstream:
                    node.setups = (*node.setups, setup)

    def _weigh(self) -> None:
        """Priorities: a task's own weight, with those of all descendants or ancestors."""
        if all(n.task.priority_weight == 1 and n.task.weight_rule is WeightRule.DOWNSTREAM
               for n in self.nodes):  # fmt: skip
            return  # then the order in which the tasks were made does as well
        related: dict[_Node, dict[WeightRule, set[_Node]]] = {n: {} for n in self.nodes}
        by_depth = sorted(self.nodes, key=lambda n: n.depth)
        for rule, order, near in (
            (WeightRule.UPSTREAM, by_depth, "upstream"),
            (WeightRule.DOWNSTREAM, by_depth[::-1], "downstream"),
        ):
            for node in order:
                reach: set[_Node] = set()
                for other in getattr(node, near):
                    reach |= {other} | related[other][rule]
                related[node][rule] = reach
        for node in self.nodes:
            others = related[node].get(node.task.weight_rule, ())
            node.weight = node.task.priority_weight + sum(o.task.priority_weight for o in others)

    def _make_expansions(self) -> None:
        made: dict[int, _Expansion] = {}
        for node in self.nodes:
            mapping = node.task._mapping
            if mapping is None:
                continue
            expansion = made.get(id(mapping))
            if expansion is None:
                expansion = made[id(mapping)] = _Expansion(mapping)
                sources = dict.fromkeys(r.operator.task_id for r in mapping.results)
                expansion.sources = [self._by_id[t] for t in sources]
                expansion.waiting = len(expansion.sources)
                for source in expansion.sources:
                    source.feeds = (*source.feeds, expansion)
            expansion.nodes.append(node)
            node.expansion = expansion

    def _make_instances(
        self,
        node: _Node,
        recorded: Mapping[tuple[str, int], _Recorded],
        indexes: list[int],
    ) -> None:
        """The instances that a node has at first: recorded ones, those of constants, or one."""
        task_id = node.task.task_id
        new = _Recorded(None, 0, node.task.retries)
        count = -1
        if node.expansion is not None and not node.expansion.sources:
            count = node.expansion.mapping.count(self)
        mapped = sorted(i for i in indexes if i >= 0)
        if node.expansion is not None and self._expands_anew(node.expansion, recorded):
            mapped = []
        if node.expansion is not None and mapped:
            touched = any(recorded[task_id, i] != new for i in mapped)
            if touched or count < 0:
                if 0 <= count != len(mapped):
                    self.notes.append(
                        f"task {task_id!r} is expanded already: it keeps its {len(mapped)} "
                        f"instances, though the code now has {count}"
                    )
                count = len(mapped)
        elif count == 0 or node.expansion is None:
            count = -1
        self._give_instances(
            node,
            range(count) if count > 0 else [-1],
            lambda i: recorded.get((task_id, i)) or recorded.get((task_id, max(i, 0)), new),
        )

    def _expands_anew(
        self, expansion: _Expansion, recorded: Mapping[tuple[str, int], _Recorded]
    ) -> bool:
        """Whether a resume forgets the instances of a mapping: what it expands over runs again,
        and none of them has succeeded."""
        ours = {node.task.task_id for node in expansion.nodes}
        kept = {task_id for (task_id, _), r in recorded.items() if r.state is _S.SUCCESS}
        again = {task_id for (task_id, _), r in recorded.items() if r.state is not _S.SUCCESS}
        return bool(again & {x.task.task_id for x in expansion.sources}) and not kept & ours

    def _give_instances(
        self, node: _Node, indexes: Iterable[int], recorded: Callable[[int], _Recorded]
    ) -> None:
        node.instances = [_Instance(node, i, recorded(i)) for i in indexes]
        node.open = len(node.instances)
        in_step = sum(self._in_step(up, node) for up in node.upstream)
        if node.group is not None:
            for instance in node.instances:
                instance.counts = _Counts(in_step)

    def _begin(self) -> None:
        """Count what a resumed run keeps; then every instance that is left has to be decided."""
        self.unfinished = sum(len(node.instances) for node in self.nodes)
        for node in self.nodes:
            for instance in node.instances:
                if instance.state is not None:
                    self._ended(instance, instance.state)
        self._dirty.clear()
        for node in self.nodes:
            if node.open:
                self._touch(node)

    def _touch(self, node: _Node) -> None:
        """The node has to be looked at: as a whole, or, in a mapped group, each instance."""
        if node.group is not None and node.expanded:
            for instance in node.instances:
                if instance.state is None:
                    self._dirty[node, instance] = None
        else:
            self._dirty[node, None] = None

    # What is known of results (the `_Known` that mappings ask).

    def length(self, task_id: str) -> int:
        """The number of elements of a task's result."""
        found = self._by_id[task_id].length
        if found is None:
            raise LookupError(task_id)
        return found

    def stored(self, task_id: str) -> Sequence[int] | None:
        """The indexes under which a mapped task stored results; None if it is not mapped."""
        node = self._by_id[task_id]
        return None if node.expansion is None else node.stored

    def _note_result(self, node: _Node, map_index: int, length: int | None) -> None:
        if node.expansion is None:
            node.length = length
        else:
            node.stored.append(map_index)

    def instances(self) -> Iterator[_Instance]:
        """Every task instance, in the order of the DAG's tasks."""
        return (instance for node in self.nodes for instance in node.instances)

    # What may start.

    def ready_count(self, now: float) -> int:
        """How many instances may start now, at most."""
        while self._waiting and self._waiting[0][0] <= now:
            instance = heapq.heappop(self._waiting)[-1]
            if instance.state in (_S.UP_FOR_RETRY, _S.UP_FOR_RESCHEDULE):
                self._enqueue(instance)
        queued = sum(map(len, self._queues.values()))
        return min(queued, self.dag.max_active_tasks - self.running)

    def _enqueue(self, instance: _Instance) -> None:
        node = instance.node
        entry = (-node.weight, node.order, instance.map_index, instance)
        heapq.heappush(self._queues.setdefault(node.task.pool, []), entry)

    def take(self) -> _Instance | None:
        """The next of the instances that may start: the caller must `start` it or `put_back`."""
        while True:
            heads = [
                (queue[0][:3], pool)
                for pool, queue in self._queues.items()
                if queue and self._has_room(queue[0][-1])
            ]
            if not heads:
                return None
            instance = heapq.heappop(self._queues[min(heads)[1]])[-1]
            if instance.state in _ENDED or instance.state is _S.RUNNING:
                continue  # a branch has skipped it meanwhile
            if instance.node.running >= instance.node.limit:
                self.park(instance)
                continue
            return instance

    def park(self, instance: _Instance) -> None:
        """As many of its task run as may: it waits until one ends, or `unpark`."""
        instance.node.parked = (*instance.node.parked, instance)

    def unpark(self) -> None:
        """Look at the parked ones again: in other runs of the DAG one may have ended."""
        for node in self.nodes:
            parked, node.parked = node.parked, ()
            for instance in parked:
                self._enqueue(instance)

    def _has_room(self, instance: _Instance) -> bool:
        task = instance.node.task
        return instance.state in _ENDED or self._free.get(task.pool, math.inf) >= task.pool_slots

    def put_back(self, instance: _Instance) -> None:
        """An instance that was taken and could not be started."""
        self._enqueue(instance)

    def next_time(self) -> float | None:
        """When time alone changes something next: a wait for a retry ends, or a hesitation."""
        times = [until for until, _ in self._hesitant.values()]
        times += [entry[0] for entry in self._waiting[:1]]
        return min(times, default=None)

    # What happens.

    def start(self, instance: _Instance) -> None:
        """The instance's next attempt starts, or a sensor's goes on."""
        if instance.state is not _S.UP_FOR_RESCHEDULE:
            instance.try_number += 1
        instance.move(_S.RUNNING)
        self.running += 1
        instance.node.running += 1
        pool = instance.node.task.pool
        if pool in self._free:
            self._free[pool] -= instance.node.task.pool_slots

    def _leave(self, instance: _Instance) -> None:
        node = instance.node
        self.running -= 1
        node.running -= 1
        if node.task.pool in self._free:
            self._free[node.task.pool] += node.task.pool_slots
        if node.parked:
            first, *others = node.parked
            node.parked = tuple(others)
            self._enqueue(first)

    def finish(
        self,
        instance: _Instance,
        status: _Status,
        now: float,
        stored: bool = False,
        length: int | None = None,
        wait: float = 0.0,
    ) -> None:
        """The instance's attempt ended; whether it stored a result, of which length."""
        self._leave(instance)
        if self.timed_out and status is not _Status.SUCCESS:
            status = _Status.SKIPPED
        elif status is _Status.FAILED and instance.try_number <= instance.max_tries:
            instance.move(_S.UP_FOR_RETRY)
            self._wait_for(instance, now + _retry_wait(instance, self.logical_date))
            return
        elif status is _Status.RESCHEDULE:
            instance.move(_S.UP_FOR_RESCHEDULE)
            self._wait_for(instance, now + wait)
            return
        if stored:
            self._note_result(instance.node, instance.map_index, length)
        ended = {_Status.SUCCESS: _S.SUCCESS, _Status.SKIPPED: _S.SKIPPED}.get(status, _S.FAILED)
        self._end(instance, ended)
        if ended is _S.FAILED and self.dag.fail_fast:
            self._give_up(_S.SKIPPED)

    def _wait_for(self, instance: _Instance, at: float) -> None:
        entry = (at, instance.node.order, instance.map_index, instance)
        heapq.heappush(self._waiting, entry)

    def pass_through(self, instance: _Instance) -> None:
        """An EmptyOperator's instance, which needs no worker, succeeds."""
        instance.try_number += 1
        self._end(instance, _S.SUCCESS)

    def withdraw(self, instance: _Instance) -> None:
        """The instance's first attempt did not start after all: it may again."""
        self._leave(instance)
        instance.try_number = 0
        instance.move(None)
        if self.timed_out or (self._gave_up and not instance.node.task._is_teardown):
            self.changed.append(instance)
            self._end(instance, _S.SKIPPED)
            return
        instance.max_tries = max(instance.max_tries, instance.node.task.retries)
        self._enqueue(instance)

    def interrupt(self, instance: _Instance) -> None:
        """The instance's attempt was cut off through no fault of its own."""
        self._leave(instance)
        instance.move(None)

    def _end(self, instance: _Instance, state: TaskInstanceState) -> None:
        instance.move(state)
        self._ended(instance, state)

    def _ended(self, instance: _Instance, state: TaskInstanceState) -> None:
        """Count it, and touch what hangs on it."""
        node = instance.node
        self.unfinished -= 1
        node.open -= 1
        if not node.open:
            node.stored.sort()
            for expansion in node.feeds:
                expansion.waiting -= 1
                for mapped in expansion.nodes:
                    self._touch(mapped)
        for below in node.downstream:
            if self._in_step(node, below):
                self._tell_own(below, instance, state)
                continue
            below.counts.add(state)
            if not node.open:
                below.counts.pending -= 1
            self._touch(below)
        if node.task._is_setup:
            for other in self.nodes:
                if node in other.setups:
                    self._touch(other)

    def _tell_own(self, below: _Node, instance: _Instance, state: TaskInstanceState) -> None:
        if instance.map_index < 0 or not below.expanded:
            # The group was not expanded when this one ended (by its source, or by a branch that
            # skipped it): nor can those be that wait for it, index by index.
            for each in [] if below.expanded else below.instances:
                if each.state is None:
                    self.changed.append(each)
                    self._end(each, state)
            return
        other = below.instances[instance.map_index]
        assert other.counts is not None
        other.counts.add(state)
        other.counts.pending -= 1
        self._dirty[below, other] = None

    # Conclusions.

    def settle(self, now: float) -> None:
        """Decide about every task below something that ended, until nothing more follows.

        In rounds, as Airflow does it: what one round decides is seen by the next.
        """
        for node, (until, _) in self._hesitant.items():
            if until <= now:
                self._dirty[node, None] = None
        while self._dirty:
            round_of, self._dirty = self._dirty, {}
            decided = [(*unit, self._decision(*unit, now)) for unit in round_of]
            for node, instance, decision in decided:
                if decision is not None:
                    self._carry_out(node, instance, decision)

    def _decision(
        self, node: _Node, instance: _Instance | None, now: float
    ) -> TaskInstanceState | None:
        if not node.open or (instance is not None and (instance.queued or instance.state)):
            return None
        if instance is None and node.expanded and node.instances[0].queued:
            return None
        expansion = node.expansion
        if expansion is not None and not node.expanded:
            verdict = expansion.verdict()
            if verdict is not None:
                return verdict
            if node.group is not None:  # it expands as soon as it can, whatever its rules
                return None if expansion.waiting else _S.RUNNING
        decision = node.decide(instance)
        if decision is _S.RUNNING and not node.expanded and expansion and expansion.waiting:
            return None
        eager_skip = decision is _S.SKIPPED and node.counts.pending > 0
        if eager_skip and node.task.trigger_rule is TriggerRule.ALL_SUCCESS and instance is None:
            return None if self._hesitates(node, now) else decision
        self._hesitant.pop(node, None)
        return decision

    def _carry_out(
        self, node: _Node, instance: _Instance | None, decision: TaskInstanceState
    ) -> None:
        if decision is _S.RUNNING and (not node.expanded or (node.group and instance is None)):
            if not node.expanded:  # another task of its group may have expanded them all
                self._expand(node)
            return
        for each in [instance] if instance is not None else list(node.instances):
            if each.state is not None or each.queued:
                continue
            if decision is _S.RUNNING:
                each.queued = True
                self._enqueue(each)
            else:
                self.changed.append(each)
                self._end(each, decision)

    def _expand(self, node: _Node) -> None:
        """Give a mapped task, or all tasks of a mapped group, the instances they will have."""
        assert node.expansion is not None
        try:
            count = node.expansion.mapping.count(self)
        except LookupError:  # an old result that is no list, in a resume of mended code
            self._carry_out(node, None, _S.UPSTREAM_FAILED)
            return
        together = node.expansion.nodes if node.group is not None else [node]
        for each in together:
            if each.expanded or not each.open:
                continue
            if count == 0:
                self._carry_out(each, None, _S.SKIPPED)
                continue
            first = each.instances[0]
            # In a resumed run, instances of these indexes may have had attempts before.
            task_id = each.task.task_id
            recorded = {i: r for (t, i), r in self._recorded.items() if t == task_id}
            recorded[0] = _Recorded(None, first.try_number, first.max_tries)
            new = _Recorded(None, 0, each.task.retries)
            self._give_instances(each, range(count), functools.partial(_get_or, recorded, new))
            each.instances[0].row_id = first.row_id
            self.unfinished += count - 1
            self.expanded.append(each)
            self._touch(each)

    def _hesitates(self, node: _Node, now: float) -> bool:
        """Whether an upstream may be about to fail beside the one that was skipped.

        Airflow looks at the states once a second or so, and there failure wins over a skip that
        it sees with it. So a skip waits, a second at most, for the upstreams that stand no deeper
        in the DAG and are about to end; which of two workers is faster does not matter then.
        """
        if node not in self._hesitant:
            skipped = [up.depth for up in node.upstream if up.instances[0].state is _S.SKIPPED] or [
                node.depth
            ]
            awaited = {
                up
                for up in node.upstream
                if up.open and up.instances[0].queued and up.depth <= max(skipped)
            }
            self._hesitant[node] = (now + _HESITATION, awaited)
        until, awaited = self._hesitant[node]
        awaited -= {up for up in awaited if not up.open}
        if awaited and now < until:
            return True
        del self._hesitant[node]
        return False

    # Branches, and the end of the run.

    def not_chosen(self, instance: _Instance, chosen: Any) -> list[_Node]:
        """What a branch's choice leaves to be skipped. Raises _BadBranch.

        Of the direct downstream tasks, those that are neither chosen nor below one that is.
        """
        keep: set[_Node] = set()
        for name in [] if chosen is None else [chosen] if isinstance(chosen, str) else chosen:
            keep.update(self._branch_targets(name))
        for node in list(keep):
            keep |= self._below(node)
        return [node for node in instance.node.downstream if node not in keep]

    def _branch_targets(self, name: object) -> list[_Node]:
        if isinstance(name, str) and name in self._by_id:
            return [self._by_id[name]]
        if isinstance(name, str) and name in self.dag.task_group_dict:
            return [self._by_id[t.task_id] for t in self.dag.task_group_dict[name]._starts()]
        known = [*self._by_id, *self.dag.task_group_dict]
        raise _BadBranch(
            f"the branch chose {_shown(name)}, which is no task or group of DAG "
            f"{self.dag.dag_id!r}{_near(str(name), known)}"
        )

    def short_circuited(self, instance: _Instance) -> list[_Node]:
        """What a false short_circuit leaves to be skipped: all below it, but teardowns."""
        node = instance.node
        if not getattr(node.task, "ignore_downstream_trigger_rules", True):
            found = set(node.downstream)
        else:
            found = self._below(node)
        return [n for n in self.nodes if n in found and not n.task._is_teardown]

    def _below(self, node: _Node) -> set[_Node]:
        """All that comes after a task, near and far."""
        found: set[_Node] = set()
        following = list(node.downstream)
        while following:
            node = following.pop()
            if node not in found:
                found.add(node)
                following += node.downstream
        return found

    def skip(self, instance: _Instance, nodes: Iterable[_Node]) -> None:
        """Skip what a branch did not choose, whatever its rule; within a mapped group, of the
        branch's own index."""
        for node in nodes:
            own = self._in_step(instance.node, node) and instance.map_index >= 0
            for each in [node.instances[instance.map_index]] if own else list(node.instances):
                if each.state is None:
                    self.changed.append(each)
                    self._end(each, _S.SKIPPED)

    def time_out(self) -> None:
        """The run has taken too long: what is left is skipped."""
        self.timed_out = True
        self._give_up(_S.SKIPPED)

    def _give_up(self, state: TaskInstanceState) -> None:
        """What has not run is skipped, but teardowns under fail_fast; what runs is to be ended."""
        self._gave_up = True
        for instance in list(self.instances()):
            if instance.state is _S.RUNNING:
                instance.max_tries = 0  # no retry when it has been ended
                self.doomed.append(instance)
            elif instance.state not in _ENDED and (
                self.timed_out or not instance.node.task._is_teardown
            ):
                self.changed.append(instance)
                self._end(instance, state)

    def run_state(self) -> DagRunState:
        """The run's final state: failed if a leaf failed or could not run, else success.

        Teardowns are no leaves, unless they are to fail the run: the work above them is.
        """
        if self.timed_out:
            return DagRunState.FAILED
        leaves = [node for node in self.nodes if _is_leaf(node)]
        leaves = leaves or [node for node in self.nodes if not node.downstream]
        bad = (_S.FAILED, _S.UPSTREAM_FAILED)
        failed = any(i.state in bad for node in leaves for i in node.instances)
        return DagRunState.FAILED if failed else DagRunState.SUCCESS


def _get_or(known: Mapping[int, _Recorded], default: _Recorded, i: int) -> _Recorded:
    return known.get(i, default)


def _is_leaf(node: _Node) -> bool:
    """Whether it decides the run's state."""
    if any(_counts_for_run(below.task) for below in node.downstream):
        return False
    return _counts_for_run(node.task)


def _counts_for_run(task: BaseOperator) -> bool:
    return not task._is_teardown or task.on_failure_fail_dagrun


def _retry_wait(instance: _Instance, logical_date: _datetime.datetime | None) -> float:
    """Seconds from the end of a failed attempt to the next (Airflow's formula)."""
    task = instance.node.task
    delay = task.retry_delay.total_seconds()
    factor = task.retry_exponential_backoff
    if factor in (0, 1):
        return delay
    day = 24 * 60 * 60.0
    try:
        base = max(1, math.ceil(delay * factor ** (instance.try_number - 1)))
    except OverflowError:
        base = int(day)
    import hashlib

    name = f"{task.dag_id}#{task.task_id}#{logical_date}#{instance.try_number}"
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    longest = task.max_retry_delay.total_seconds() if task.max_retry_delay is not None else day
    return min(base + int(digest, 16) % base, day, longest)


# --- Store: the only SQL; the schema and the file -------------------------------------------------

_APPLICATION_ID = 0x6C69_7465  # "lite"
_USER_VERSION = 1  # a major number: columns and tables may be added without raising it
_OLDEST_SQLITE = (3, 34, 0)
_BUSY_SECONDS = (
    0.25  # SQLite's own wait for a lock; longer waits are the run loop's, which lives on
)
_LOCKED_LIMIT = 120.0  # seconds of a lock after which a run gives up
_WAL_PAGES = 4096  # after which a commit copies the WAL into the file; see _Store.checkpoint
_LARGE = 1_000_000  # bytes of a value
_PAGE_SIZE = 8192  # 4096 is slow with large values, 16384 with small commits; it can't be changed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS dag (
    dag_id TEXT PRIMARY KEY,
    description TEXT,
    fileloc TEXT,                -- the script or module that defines it
    doc_md TEXT,
    tags TEXT,                   -- JSON list
    schedule TEXT                -- as given; liteflow schedules nothing
) {strict};
CREATE TABLE IF NOT EXISTS dag_run (
    id INTEGER PRIMARY KEY,
    dag_id TEXT NOT NULL REFERENCES dag (dag_id),
    run_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'success', 'failed')),
    reason TEXT,                 -- why it failed, where no task is to blame
    logical_date TEXT,           -- times are ISO 8601 in UTC
    start_date TEXT,
    end_date TEXT,
    conf TEXT NOT NULL,          -- JSON object
    owner TEXT,                  -- random token of the run() that works on it
    owner_process TEXT,          -- JSON: host, boot, pid namespace, pid, its start
    heartbeat TEXT,
    stop_requested TEXT,
    values_deleted TEXT,         -- when `prune --values` deleted its XComs
    UNIQUE (dag_id, run_id)
) {strict};
CREATE INDEX IF NOT EXISTS dag_run_of_dag ON dag_run (dag_id);
CREATE INDEX IF NOT EXISTS dag_run_running ON dag_run (state) WHERE state = 'running';
CREATE TABLE IF NOT EXISTS task_instance (
    id INTEGER PRIMARY KEY,
    dag_run_id INTEGER NOT NULL REFERENCES dag_run (id) ON DELETE CASCADE,
    task_id TEXT NOT NULL,
    map_index INTEGER NOT NULL,  -- -1: not mapped
    state TEXT CHECK (state IN ('running', 'success', 'failed', 'skipped', 'upstream_failed',
                                'up_for_retry', 'up_for_reschedule', 'removed')),
    try_number INTEGER NOT NULL, -- of the latest attempt, whose times these are; 0: none
    max_tries INTEGER NOT NULL,
    start_date TEXT,
    end_date TEXT,
    pid INTEGER,
    error TEXT,                  -- traceback; its last line is the reason
    lost INTEGER NOT NULL DEFAULT 0, -- attempts in a row that ended with their scheduler
    upstream_task_ids TEXT,      -- JSON list: what it waited for
    task_group_id TEXT,          -- the group it stands in
    role TEXT,                   -- 'setup', 'teardown', or none
    UNIQUE (dag_run_id, task_id, map_index)
) {strict};
CREATE TABLE IF NOT EXISTS task_instance_history ( -- attempts before the latest
    id INTEGER PRIMARY KEY,
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    try_number INTEGER NOT NULL,
    state TEXT NOT NULL,         -- as in task_instance, or 'interrupted'
    start_date TEXT,
    end_date TEXT,
    pid INTEGER,
    error TEXT,
    UNIQUE (task_instance_id, try_number)
) {strict};
CREATE TABLE IF NOT EXISTS task_log (
    id INTEGER PRIMARY KEY,
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    try_number INTEGER NOT NULL,
    part INTEGER NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (task_instance_id, try_number, part)
) {strict};
CREATE TABLE IF NOT EXISTS xcom (
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    type TEXT NOT NULL,
    preview TEXT NOT NULL,       -- a short repr, for people
    length INTEGER,              -- of a list, tuple or dict
    value BLOB NOT NULL,         -- pickle
    PRIMARY KEY (task_instance_id, key)
) {without_rowid};
CREATE TABLE IF NOT EXISTS xcom_item ( -- the elements of a result that others expand over
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    item INTEGER NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (task_instance_id, item)
) {strict};
CREATE VIEW IF NOT EXISTS task_attempt AS -- every attempt of every task instance
    SELECT id AS task_instance_id, try_number, state, start_date, end_date, pid, error
    FROM task_instance WHERE start_date IS NOT NULL
    UNION ALL
    SELECT task_instance_id, try_number, state, start_date, end_date, pid, error
    FROM task_instance_history;
"""


class _XComRow(NamedTuple):
    """A value on its way to the database: pickled, with what can be shown and planned without."""

    key: str
    type: str
    preview: str
    length: int | None
    value: bytes


class _Attempt:
    """One attempt of a task instance: what the run loop, its runner and the store call it by."""

    __slots__ = ("first_start", "instance", "log_parts", "pid", "pokes", "started", "try_number")

    def __init__(self, instance: _Instance, started: str, pid: int | None) -> None:
        self.instance = instance
        self.try_number = instance.try_number
        self.started = started
        self.pid = pid
        self.log_parts = 0  # a rescheduled sensor's log goes on where it was
        self.first_start = time.time()  # of a sensor, whose time counts from its first poke
        self.pokes = 0


class _Finished(NamedTuple):
    """The record of an attempt that ended; `state` is what its instance became."""

    attempt: _Attempt
    state: TaskInstanceState
    ended: str
    error: str | None
    xcoms: Sequence[_XComRow]
    items: Sequence[bytes] = ()
    began: str | None = None  # where it had been recorded as started before it could start


class _Batch:
    """What one turn of the run loop has to record, in one transaction."""

    def __init__(self) -> None:
        self.finished: list[_Finished] = []
        self.marked: list[_Instance] = []
        self.started: list[_Attempt] = []
        self.interrupted: list[tuple[_Attempt, str, str]] = []  # attempt, when, why
        self.withdrawn: list[_Attempt] = []  # first attempts that did not start after all
        self.logs: list[tuple[_Attempt, int, str]] = []
        self.expanded: list[_Node] = []
        self.passed: list[tuple[_Instance, str]] = []  # needed no worker: when

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def is_large(self) -> bool:
        """Whether a large value is in it."""
        return any(len(xcom.value) > _LARGE for f in self.finished for xcom in f.xcoms)


class _RunRow(NamedTuple):
    """A row of dag_run."""

    id: int
    dag_id: str
    run_id: str
    state: str
    reason: str | None
    logical_date: str | None
    start_date: str | None
    end_date: str | None
    conf: str
    owner_process: str | None
    heartbeat: str | None
    owner: str | None
    values_deleted: str | None


# Cast, so that a file made to harm gives texts where texts are expected.
_RUN_COLUMNS = "dag_run.id, " + ", ".join(
    f"CAST(dag_run.{name} AS TEXT)" for name in _RunRow._fields[1:]
)


def _iso(moment: _datetime.datetime) -> str:
    return _aware(moment).isoformat(timespec="microseconds")


def _iso_of(seconds: float) -> str:
    """A time of time.time()."""
    return _iso(_datetime.datetime.fromtimestamp(seconds, _datetime.UTC))


def _database_path(db_path: str | os.PathLike[str] | None, dag: Dag | None) -> Path:
    """The database: the argument, else the Dag's, else $LITEFLOW_DB, else ./liteflow.db."""
    environ = os.environ.get("LITEFLOW_DB") or None
    for given in (db_path, dag.db_path if dag is not None else None, environ):
        if given is not None:
            break
    else:
        given = "liteflow.db"
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"db_path must be a path, found {_shown(given)}")
    text = os.fspath(given)
    if text in ("", ":memory:") or "\0" in text:
        raise DatabaseError(f"the database must be a file, found {text!r}: name one")
    # Links are followed once, here: SQLite keeps `-wal` beside the target, not beside the link.
    return Path(os.path.realpath(text))


def _explained(error: sqlite3.Error, path: Path) -> AirflowException | _Busy:
    """What a SQLite error means here, in a sentence; _Busy for a lock that may go away."""
    import sqlite3

    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _Busy()
    if primary == sqlite3.SQLITE_NOTADB:
        return DatabaseError(f"{path} is not a liteflow database: {error}")
    if primary == sqlite3.SQLITE_CANTOPEN and not path.parent.is_dir():
        return DatabaseError(f"unable to open {path}: directory {path.parent} does not exist")
    if primary == sqlite3.SQLITE_CANTOPEN and path.is_dir():
        return DatabaseError(f"unable to open {path}: it is a directory")
    return DatabaseError(f"{path}: {error}")


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise DatabaseError(f"unable to open {path}: it is a directory, a file is needed")
    if not path.parent.is_dir():
        raise DatabaseError(f"unable to open {path}: directory {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise DatabaseError(f"unable to open {path}: it is no regular file")


def _check_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is a liteflow database; False if it is empty. Raises DatabaseError."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == _APPLICATION_ID:
        if version > _USER_VERSION:
            raise DatabaseError(
                f"{path} was made by a newer liteflow ({version} > {_USER_VERSION}): use that one"
            )
        return True
    if application or version or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise DatabaseError(
            f"{path} is another application's SQLite file: liteflow leaves it alone; choose "
            "another path"
        )
    return False


def _check_before_run(path: Path) -> None:
    """Refuse a file that a run can't use before anything is started, without touching it."""
    import sqlite3

    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise DatabaseError(
            f"SQLite {sqlite3.sqlite_version} is too old: liteflow needs 3.34 or newer"
        )
    _check_place(path)
    if path.exists() and path.stat().st_size:
        with contextlib.suppress(_Empty):  # somebody is just creating it, or died when he did
            _read(path, lambda connection: None)
        if not os.access(path, os.W_OK):
            raise DatabaseError(f"{path} can't be written: it is read-only for this user")
    if not os.access(path.parent, os.W_OK):
        raise DatabaseError(f"{path.parent} can't be written: SQLite needs to, beside the database")


T = TypeVar("T")


def _file_identity(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    """In a file made to harm, a table's name may stand for a view that never ends."""
    kinds = dict(connection.execute("SELECT name, type FROM sqlite_master"))
    for table in (
        "dag",
        "dag_run",
        "task_instance",
        "task_instance_history",
        "task_log",
        "xcom",
        "xcom_item",
    ):
        if kinds.get(table) != "table":
            raise DatabaseError(f"{path} has no table {table!r}: liteflow did not make it")


def _copy_database(connection: sqlite3.Connection, target: Path) -> None:
    """Copy all of it, as the connection's snapshot has it, into a new file."""
    import sqlite3

    target.unlink(missing_ok=True)  # of a try that was overtaken by a writer
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    connection.execute("COMMIT")  # a copy makes its own transaction, and keeps to one snapshot
    with contextlib.closing(sqlite3.connect(target)) as copy:
        connection.backup(copy)


_ROW_LIMIT = 1_000_000_000  # SQLite's own
_LOOK_LIMIT = 20_000_000  # bytes of one value that a look takes; what we write to show is smaller


def _read(path: Path, look: Callable[[sqlite3.Connection], T], most: int = _LOOK_LIMIT) -> T:
    """What `look` finds in the database, which is neither written nor created nor left locked.

    A cleanly closed WAL file opened mode=ro would get a -wal and a -shm that stay; so without a
    -wal it is opened immutable, and read again if a writer came meanwhile.
    """
    import sqlite3

    wal = Path(f"{path}-wal")
    for _ in range(100):
        try:
            before = _file_identity(path)
        except OSError:
            _check_place(path)
            raise DatabaseError(f"there is no database {path}") from None
        quiet = not wal.exists()
        uri = f"{path.as_uri()}?mode=ro{'&immutable=1' if quiet else ''}"
        try:
            with contextlib.closing(
                sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA trusted_schema=OFF")
                connection.execute("PRAGMA query_only=ON")
                connection.text_factory = lambda data: data.decode(errors="replace")
                connection.execute("BEGIN")  # one snapshot for all that is looked at
                if not _check_ours(connection, path):
                    raise _Empty(f"{path} is empty: no run was recorded in it yet")
                _check_tables(connection, path)
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)
                found = look(connection)
        except (sqlite3.Error, DatabaseError) as error:
            if quiet and (wal.exists() or _changed(path, before)):
                continue
            if isinstance(error, DatabaseError):
                raise
            _check_place(path)
            explained = _explained(error, path)
            raise (
                DatabaseError(f"{path} is locked") if isinstance(explained, _Busy) else explained
            ) from None
        if not quiet or not (wal.exists() or _changed(path, before)):
            return found
    raise DatabaseError(f"{path} changes faster than it can be read")


def _changed(path: Path, before: tuple[int, int, int]) -> bool:
    try:
        return _file_identity(path) != before
    except OSError:
        return True


# --- Store: a run's writes ------------------------------------------------------------------------


class _Store:
    """A run's connection to the database: the only writer of what the run does.

    Every write is one BEGIN IMMEDIATE transaction. Once `owner` is set, every update of the run
    carries it and the attempt's number in its WHERE: what a lost attempt or an owner that was
    taken over reports late changes nothing, and raises _Fenced.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Open the database, and make it if it is missing or empty. Raises DatabaseError.

        `check` is called while it is locked, and may raise.
        """
        self.path = path
        self.run_row = 0
        self.owner = ""
        self._connection = self._connect()
        try:
            _until_unlocked(path, self._prepare, check)
            found = os.stat(path)
            self._place = (found.st_dev, found.st_ino)
        except BaseException:  # whatever it is: cleaned up after, and raised again
            self._connection.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        _check_place(self.path)
        # Created here for its mode (logs and values hold secrets), which -wal and -shm inherit.
        # Never opened otherwise: closing any descriptor of a database drops the process's locks.
        with contextlib.suppress(FileExistsError):
            try:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except FileExistsError:
                raise
            except OSError as error:
                raise DatabaseError(f"{self.path} can't be created: {error.strerror}") from None
        try:
            return sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw",
                uri=True,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise DatabaseError(str(_explained(error, self.path))) from None

    def _prepare(self) -> None:
        execute = self._connection.execute
        with self._explaining():
            execute("BEGIN")  # one snapshot: another process may be creating the tables
            try:
                ours = _check_ours(self._connection, self.path)
            finally:
                execute("ROLLBACK")
            if not ours:
                execute(f"PRAGMA page_size={_PAGE_SIZE}")
                execute("PRAGMA auto_vacuum=INCREMENTAL")
            # The switch to WAL ignores SQLite's busy timeout, so it is asked for only when due,
            # and tried again by the caller.
            if execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                execute("PRAGMA journal_mode=WAL")
            execute("PRAGMA synchronous=NORMAL")
            execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
            execute("PRAGMA foreign_keys=ON")
            execute("PRAGMA trusted_schema=OFF")
        with self.transaction():
            if not _check_ours(self._connection, self.path):
                self._create()

    def _create(self) -> None:
        """Make the tables, inside the caller's transaction (so not by executescript)."""
        import sqlite3

        strict = "STRICT" if sqlite3.sqlite_version_info >= (3, 37) else ""
        # One page less to write for each value than a table with its index.
        without_rowid = f"{strict}, WITHOUT ROWID".removeprefix(", ")
        schema = _SCHEMA.format(strict=strict, without_rowid=without_rowid)
        for statement in schema.split(";\n"):
            if statement.strip():
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version={_USER_VERSION}")

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except sqlite3.Error as error:
            raise _explained(error, self.path) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, under the write lock. Raises _Busy, DatabaseError."""
        with self._explaining():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:  # whatever it is: cleaned up after, and raised again
                # A full disk or an I/O error has rolled back already; a second ROLLBACK would
                # fail and hide the reason.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Checkpoint and close; the last one out leaves no -wal and no -shm.

        A reader of ours holds its snapshot for milliseconds, so the last checkpoint is tried for
        a second; a `-wal` that stays costs nothing but its name.
        """
        import sqlite3

        with contextlib.suppress(sqlite3.Error):
            deadline = time.monotonic() + 1.0
            while self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        self._connection.close()

    def checkpoint(self) -> None:
        """Copy what the WAL holds into the file now, rather than within some later commit."""
        with self._explaining():
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    # A run's beginning and end.

    def find_run(self, dag_id: str, run_id: str) -> _RunRow | None:
        """The run of this id."""
        return _find_run(self._connection, dag_id, run_id)

    def live_runs(self, dag_id: str) -> list[_RunRow]:
        """The DAG's runs that read `running`."""
        rows = self._connection.execute(
            f"SELECT {_RUN_COLUMNS} FROM dag_run WHERE state = 'running' AND dag_id = ? "
            "ORDER BY id",
            (dag_id,),
        )
        return [_RunRow(*row) for row in rows]

    def create_run(
        self, dag: Dag, run_id: str, logical_date: _datetime.datetime | None, conf: str
    ) -> None:
        """Insert the run, inside the caller's transaction."""
        execute = self._connection.execute
        schedule = getattr(dag, "schedule", None)
        execute(
            "INSERT INTO dag (dag_id, description, fileloc, doc_md, tags, schedule) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (dag_id) DO UPDATE SET "
            "description = excluded.description, fileloc = excluded.fileloc, "
            "doc_md = excluded.doc_md, tags = excluded.tags, schedule = excluded.schedule",
            (
                dag.dag_id,
                dag.description and _storable(dag.description),
                _storable(os.path.abspath(dag.fileloc)) if dag.fileloc else None,
                dag.doc_md and _storable(dag.doc_md),
                json.dumps(sorted(map(str, dag.tags))),
                None if schedule is None else _storable(schedule),
            ),
        )
        self.run_row = (
            execute(
                "INSERT INTO dag_run (dag_id, run_id, state, logical_date, start_date, conf) "
                "VALUES (?, ?, 'queued', ?, ?, ?)",
                (dag.dag_id, run_id, logical_date and _iso(logical_date), _iso(_utcnow()), conf),
            ).lastrowid
            or 0
        )

    def claim_run(self, run_row: int, owner: str, owner_process: str) -> None:
        """Make this the run's owner, inside the caller's transaction."""
        self.run_row, self.owner = run_row, owner
        self._connection.execute(
            "UPDATE dag_run SET state = 'running', owner = ?, owner_process = ?, heartbeat = ?, "
            "reason = NULL, end_date = NULL, stop_requested = NULL WHERE id = ?",
            (owner, owner_process, _iso(_utcnow()), run_row),
        )

    def recorded_instances(self) -> dict[tuple[str, int], tuple[int, str | None, int, int, int]]:
        """The run's task instances: (id, state, try_number, max_tries, lost) by task and index."""
        rows = self._connection.execute(
            "SELECT task_id, map_index, id, state, try_number, max_tries, lost "
            "FROM task_instance WHERE dag_run_id = ?",
            (self.run_row,),
        )
        return {(row[0], row[1]): row[2:] for row in rows}

    def reset_instances(self, ids: Collection[int], max_tries: Mapping[int, int]) -> None:
        """Put ended or lost instances back to no state; their attempts go to the history."""
        many = self._connection.executemany
        keys = [(i,) for i in ids]
        many(_TO_HISTORY, [(_iso(_utcnow()), "interrupted: its scheduler died", i) for i in ids])
        many("DELETE FROM xcom WHERE task_instance_id = ?", keys)
        many("DELETE FROM xcom_item WHERE task_instance_id = ?", keys)
        many(
            "UPDATE task_instance SET lost = CASE state WHEN 'running' THEN lost + 1 "
            "WHEN 'failed' THEN 0 ELSE lost END, state = NULL, start_date = NULL, "
            "end_date = NULL, pid = NULL, error = NULL, max_tries = ? WHERE id = ?",
            [(max_tries[i], i) for i in ids],
        )

    def fail_poisoned(self, row_id: int, why: str) -> None:
        """Fail an instance whose every attempt takes its scheduler with it."""
        self._connection.execute(
            "UPDATE task_instance SET state = 'failed', error = ? WHERE id = ?", (why, row_id)
        )

    def move_instance(self, row_id: int, map_index: int) -> None:
        """Give the row of an instance another index."""
        self._connection.execute(
            "UPDATE task_instance SET map_index = ? WHERE id = ?", (map_index, row_id)
        )

    def remove_instances(self, ids: Iterable[int]) -> None:
        """Mark instances whose task is gone from the code."""
        self._connection.executemany(
            "UPDATE task_instance SET state = 'removed' WHERE id = ?", [(i,) for i in ids]
        )

    def add_instances(self, instances: Iterable[_Instance]) -> None:
        """Insert task instances and give each its row id, inside the caller's transaction."""
        row_id = self._connection.execute("SELECT max(id) FROM task_instance").fetchone()[0] or 0
        rows = map(self._new_row, instances, itertools.count(row_id + 1))
        self._connection.executemany(
            "INSERT INTO task_instance (id, dag_run_id, task_id, map_index, try_number, max_tries, "
            "upstream_task_ids, task_group_id, role) VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
            rows,
        )

    def _new_row(self, instance: _Instance, row_id: int) -> tuple[Any, ...]:
        instance.row_id = row_id
        task = instance.node.task
        return (
            row_id,
            self.run_row,
            instance.task_id,
            instance.map_index,
            instance.max_tries,
            json.dumps(list(task._upstream)) if task._upstream else "[]",
            task.task_group.group_id if task.task_group is not None else None,
            "setup" if task._is_setup else "teardown" if task._is_teardown else None,
        )

    def refresh_edges(self, instances: Iterable[_Instance]) -> None:
        """Record what today's code lets the instances wait for."""
        self._connection.executemany(
            "UPDATE task_instance SET upstream_task_ids = ? WHERE id = ?",
            [(json.dumps(list(i.node.task._upstream)), i.row_id) for i in instances],
        )

    def end_run(self, state: DagRunState, reason: str | None) -> None:
        """Record the run's end, inside the caller's transaction."""
        done = self._connection.execute(
            "UPDATE dag_run SET state = ?, reason = ?, end_date = ?, owner = NULL "
            "WHERE id = ? AND owner = ?",
            (state.value, reason, _iso(_utcnow()), self.run_row, self.owner),
        )
        self._expect(1, done.rowcount)

    def close_run(self, run_row: int, reason: str, lost: bool) -> None:
        """Mark a run that was cut off as failed, and its attempts as interrupted.

        `lost`: its scheduler died, which may be the fault of a task that ran.
        """
        execute = self._connection.execute
        ids = [
            row[0]
            for row in execute(
                "SELECT id FROM task_instance WHERE dag_run_id = ? AND state IN "
                "('running', 'up_for_retry', 'up_for_reschedule')",
                (run_row,),
            )
        ]
        self._connection.executemany(
            _TO_HISTORY, [(_iso(_utcnow()), f"interrupted: {reason}", i) for i in ids]
        )
        self._connection.executemany(
            "UPDATE task_instance SET max_tries = max_tries + (state IS 'running'), "
            "lost = lost + (? AND state IS 'running'), state = NULL, "
            "start_date = NULL, end_date = NULL, pid = NULL, error = NULL WHERE id = ?",
            [(lost, i) for i in ids],
        )
        execute(
            "UPDATE dag_run SET state = 'failed', reason = ?, end_date = ?, owner = NULL "
            "WHERE id = ?",
            (reason, _iso(_utcnow()), run_row),
        )

    # A run's turns.

    def record(self, batch: _Batch) -> None:
        """Write one turn's events in one transaction. Raises _Busy, _Fenced, DatabaseError."""
        with self.transaction():
            self._record_finished(batch.finished)
            if batch.logs:
                self._record_logs(batch.logs)
            self._record_interrupted(batch.interrupted)
            self._record_withdrawn(batch.withdrawn)
            for node in batch.expanded:
                self._record_expanded(node)
            self._record_passed(batch.passed)
            self._record_marked(batch.marked)
            # Last: a retry without a delay starts in the transaction that ends the try before.
            self._record_started(batch.started)

    def _record_finished(self, finished: Sequence[_Finished]) -> None:
        if not finished:
            return
        many = self._connection.executemany
        done = many(
            "UPDATE task_instance SET state = ?, start_date = coalesce(?, start_date), "
            f"end_date = ?, error = ?, lost = 0 {_IF_OURS}",
            [
                (
                    f.state.value,
                    f.began,
                    f.ended,
                    f.error,
                    f.attempt.instance.row_id,
                    f.attempt.try_number,
                    self.owner,
                )
                for f in finished
            ],
        )
        self._expect(len(finished), done.rowcount)
        xcoms = [(f.attempt.instance.row_id, *xcom) for f in finished for xcom in f.xcoms]
        items = [
            (f.attempt.instance.row_id, i, value)
            for f in finished
            for i, value in enumerate(f.items)
        ]
        if items:
            many("INSERT OR REPLACE INTO xcom_item VALUES (?, ?, ?)", items)
        if xcoms:
            many(
                "INSERT OR REPLACE INTO xcom (task_instance_id, key, type, preview, length, value) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                xcoms,
            )

    def _record_expanded(self, node: _Node) -> None:
        """The row of the unexpanded instance becomes that of index 0; the others are new."""
        done = self._connection.execute(
            "UPDATE task_instance SET map_index = 0 WHERE id = ? AND map_index = -1 AND "
            "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?",
            (node.instances[0].row_id, self.owner),
        )
        self._expect(1, done.rowcount)
        # A resumed run may have had more of them before; their attempts stay in the history.
        rows = self._connection.execute(
            "SELECT map_index, id FROM task_instance WHERE dag_run_id = ? AND "
            "task_id = ? AND map_index > 0",
            (self.run_row, node.task.task_id),
        )
        earlier = dict(rows.fetchall())
        for instance in node.instances[1:]:
            instance.row_id = earlier.get(instance.map_index, 0)
        self._connection.executemany(
            "UPDATE task_instance SET state = NULL, max_tries = ? WHERE id = ?",
            [(i.max_tries, i.row_id) for i in node.instances[1:] if i.row_id],
        )
        self.add_instances(i for i in node.instances[1:] if not i.row_id)

    def _record_passed(self, passed: Sequence[tuple[_Instance, str]]) -> None:
        if not passed:
            return
        done = self._connection.executemany(
            "UPDATE task_instance SET state = 'success', try_number = ?1, start_date = ?2, "
            "end_date = ?2 WHERE id = ?3 AND state IS NULL AND "
            "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?4",
            [(i.try_number, when, i.row_id, self.owner) for i, when in passed],
        )
        self._expect(len(passed), done.rowcount)

    def _record_interrupted(self, interrupted: Sequence[tuple[_Attempt, str, str]]) -> None:
        for attempt, ended, why in interrupted:
            row_id = attempt.instance.row_id
            self._connection.execute(_TO_HISTORY, (ended, why, row_id))
            done = self._connection.execute(
                "UPDATE task_instance SET state = NULL, start_date = NULL, end_date = NULL, "
                f"pid = NULL, error = NULL, max_tries = max_tries + 1 {_IF_OURS}",
                (row_id, attempt.try_number, self.owner),
            )
            self._expect(1, done.rowcount)

    def _record_withdrawn(self, withdrawn: Sequence[_Attempt]) -> None:
        if not withdrawn:
            return
        done = self._connection.executemany(
            f"UPDATE task_instance SET state = NULL, try_number = 0, start_date = NULL, pid = NULL "
            f"{_IF_OURS}",
            [(a.instance.row_id, a.try_number, self.owner) for a in withdrawn],
        )
        self._expect(len(withdrawn), done.rowcount)

    def _record_marked(self, marked: Sequence[_Instance]) -> None:
        if not marked:
            return
        done = self._connection.executemany(
            "UPDATE task_instance SET state = ? WHERE id = ? AND try_number = ? AND "
            "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?",
            [(i.state and i.state.value, i.row_id, i.try_number, self.owner) for i in marked],
        )
        self._expect(len(marked), done.rowcount)

    def _record_started(self, started: Sequence[_Attempt]) -> None:
        if not started:
            return
        going_on = [a for a in started if a.pokes]
        if going_on:
            done = self._connection.executemany(
                f"UPDATE task_instance SET state = 'running', pid = ? {_IF_RESCHEDULED}",
                [(a.pid, a.instance.row_id, a.try_number, self.owner) for a in going_on],
            )
            self._expect(len(going_on), done.rowcount)
            started = [a for a in started if not a.pokes]
        again = [a.instance.row_id for a in started if a.try_number > 1]
        if again:
            self._connection.executemany(_TO_HISTORY, [(None, None, i) for i in again])
            for table in ("xcom", "xcom_item"):
                self._connection.executemany(
                    f"DELETE FROM {table} WHERE task_instance_id = ?", [(i,) for i in again]
                )
        done = self._connection.executemany(
            "UPDATE task_instance SET state = 'running', try_number = ?1, start_date = ?2, "
            "end_date = NULL, pid = ?3, error = NULL WHERE id = ?4 AND try_number = ?1 - 1 AND "
            "(state IS NULL OR state = 'up_for_retry') AND "
            "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?5",
            [(a.try_number, a.started, a.pid, a.instance.row_id, self.owner) for a in started],
        )
        self._expect(len(started), done.rowcount)

    def _record_logs(self, logs: Sequence[tuple[_Attempt, int, str]]) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO task_log (task_instance_id, try_number, part, text) "
            "SELECT id, ?1, ?2, ?3 FROM task_instance WHERE id = ?4 AND try_number >= ?1 AND "
            # A DAG's callbacks print after the run's end, when it has no owner any more.
            "coalesce((SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id), ?5) = ?5",
            [(a.try_number, part, text, a.instance.row_id, self.owner) for a, part, text in logs],
        )

    def beat(self) -> None:
        """Say that the owner lives. Raises _Fenced, _Busy."""
        with self.transaction():
            done = self._connection.execute(
                "UPDATE dag_run SET heartbeat = ? WHERE id = ? AND owner = ?",
                (_iso(_utcnow()), self.run_row, self.owner),
            )
            self._expect(1, done.rowcount)

    def request_stop(self, run_row: int) -> None:
        """Ask the run's owner, which looks each second, to stop it."""
        with self.transaction():
            self._connection.execute(
                "UPDATE dag_run SET stop_requested = ? WHERE id = ? AND state = 'running'",
                (_iso(_utcnow()), run_row),
            )

    def check_in_place(self) -> None:
        """Raises DatabaseError if the file was deleted or replaced: what is written is lost."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._place:
            raise DatabaseError(f"{self.path} was deleted or replaced during the run")

    def stop_requested(self) -> bool:
        """Whether another process asked this run to stop."""
        with self._explaining():
            row = self._connection.execute(
                "SELECT stop_requested FROM dag_run WHERE id = ?", (self.run_row,)
            ).fetchone()
        return row is not None and row[0] is not None

    def _expect(self, rows: int, found: int) -> None:
        if found != rows:
            raise _Fenced(
                "another process has taken this run over, or its rows were deleted: nothing more "
                "of it is written here"
            )

    def input(
        self, task_id: str, key: str, map_index: int, most: int
    ) -> list[tuple[int, bytes | None]]:
        """(map_index, value) of an XCom, if there is one; value None if over `most` bytes."""
        with self._explaining():
            return self._connection.execute(
                f"{_PULL} AND key = ? AND map_index = ?",
                (most, self.run_row, task_id, key, map_index),
            ).fetchall()

    def inputs(self, task_id: str) -> list[tuple[str, int, bytes]]:
        """(key, map_index, value) of all XComs of a task."""
        with self._explaining():
            return self._connection.execute(
                "SELECT key, map_index, value FROM xcom JOIN task_instance ON "
                "task_instance.id = task_instance_id WHERE dag_run_id = ? AND task_id = ? "
                "ORDER BY map_index",
                (self.run_row, task_id),
            ).fetchall()

    def item(self, task_id: str, item: int, most: int) -> bytes | None:
        """An element of a result that others expand over, if it is stored and no larger."""
        with self._explaining():
            row = self._connection.execute(
                "SELECT value FROM xcom_item JOIN task_instance ON task_instance.id = "
                "task_instance_id WHERE dag_run_id = ? AND task_id = ? AND map_index = -1 AND "
                "item = ? AND length(value) <= ?",
                (self.run_row, task_id, item, most),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def recorded_lengths(self) -> dict[tuple[str, int], int | None]:
        """The length of every result that is stored, by task and index."""
        return _select_lengths(self._connection, self.run_row)

    def running_elsewhere(self, dag_id: str, task_id: str) -> int:
        """How many instances of a task run now, in other runs of its DAG."""
        with self._explaining():
            row = self._connection.execute(
                "SELECT count(*) FROM task_instance JOIN dag_run ON dag_run.id = dag_run_id WHERE "
                "dag_run.state = 'running' AND dag_id = ? AND task_id = ? AND dag_run.id != ? AND "
                "task_instance.state = 'running'",
                (dag_id, task_id, self.run_row),
            ).fetchone()
        return int(row[0])

    def release_waiting(self) -> None:
        """What waited for a retry has no state again: its run ends. Inside a transaction."""
        waiting = self._connection.execute(
            "SELECT id FROM task_instance WHERE dag_run_id = ? AND state IN "
            "('up_for_retry', 'up_for_reschedule')",
            (self.run_row,),
        ).fetchall()
        self._connection.executemany(_TO_HISTORY, [(None, None, *row) for row in waiting])
        self._connection.executemany(
            "UPDATE task_instance SET state = NULL, start_date = NULL, end_date = NULL, "
            "pid = NULL, error = NULL WHERE id = ?",
            waiting,
        )

    def clear(
        self, run_row: int, task_ids: Iterable[str], check: Callable[[_RunRow | None], None]
    ) -> None:
        """Put tasks of a run back to no state, and the run to `queued`.

        `check` sees the run under the write lock, and may raise. A max_tries of -1 stands for
        all the tries that the code gives, which a resume counts from there.
        """
        with self.transaction():
            row = self._run_of(run_row)
            check(row)
            if row is not None and row.state == "running":
                self.close_run(run_row, "its scheduler died", lost=True)
            for task_id in task_ids:
                rows = self._connection.execute(
                    "SELECT id, -1 FROM task_instance WHERE dag_run_id = ? AND task_id = ?",
                    (run_row, task_id),
                ).fetchall()
                self.reset_instances([row[0] for row in rows], dict(rows))
            self._connection.execute(
                "UPDATE dag_run SET state = 'queued', reason = NULL, end_date = NULL, "
                "owner = NULL WHERE id = ?",
                (run_row,),
            )

    def _run_of(self, run_row: int) -> _RunRow | None:
        row = self._connection.execute(
            f"SELECT {_RUN_COLUMNS} FROM dag_run WHERE id = ?", (run_row,)
        ).fetchone()
        return _RunRow(*row) if row else None

    def delete_run(self, run_row: int, check: Callable[[_RunRow | None], None]) -> None:
        """Delete a run with all that belongs to it.

        `check` sees the run under the write lock, and may raise.
        """
        with self.transaction():
            check(self._run_of(run_row))
            self._connection.execute("DELETE FROM dag_run WHERE id = ?", (run_row,))

    def drop_values(self, run_row: int, check: Callable[[_RunRow | None], None]) -> None:
        """Delete a run's XComs; `check` as above."""
        with self.transaction():
            check(self._run_of(run_row))
            for table in ("xcom", "xcom_item"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE task_instance_id IN "
                    "(SELECT id FROM task_instance WHERE dag_run_id = ?)",
                    (run_row,),
                )
            self._connection.execute(
                "UPDATE dag_run SET values_deleted = ? WHERE id = ?", (_iso(_utcnow()), run_row)
            )

    def give_back(self) -> None:
        """Give the disk space back that nothing uses any more, in steps: one large vacuum would
        write all the pages to the WAL at once, and keep others waiting."""
        with self._explaining():
            before, free = math.inf, self._free_pages()
            while 0 < free < before:  # it does not fall where the file was made without auto_vacuum
                # By `execute` Python 3.11 steps once, which frees one page.
                self._connection.executescript("PRAGMA incremental_vacuum(1000)")
                # PASSIVE: waiting for a reader would keep others from the lock.
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                before, free = free, self._free_pages()

    def _free_pages(self) -> int:
        return int(self._connection.execute("PRAGMA freelist_count").fetchone()[0])


_IF_RESCHEDULED = (
    "WHERE id = ? AND try_number = ? AND state = 'up_for_reschedule' AND "
    "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?"
)
_IF_OURS = (
    "WHERE id = ? AND try_number = ? AND state = 'running' AND "
    "(SELECT owner FROM dag_run WHERE dag_run.id = dag_run_id) = ?"
)
# The latest attempt becomes an earlier one; with its own end where it has one.
_TO_HISTORY = (
    "INSERT INTO task_instance_history (task_instance_id, try_number, state, start_date, end_date, "
    "pid, error) SELECT id, try_number, "
    "CASE state WHEN 'up_for_retry' THEN 'failed' WHEN 'running' THEN 'interrupted' "
    "WHEN 'up_for_reschedule' THEN 'interrupted' "
    "ELSE state END, "
    "start_date, coalesce(end_date, ?), pid, "
    "CASE state WHEN 'running' THEN coalesce(error, ?) ELSE error END "
    "FROM task_instance WHERE id = ? AND start_date IS NOT NULL"
)
_PULL = (
    "SELECT map_index, CASE WHEN length(value) <= ? THEN value END "
    "FROM xcom JOIN task_instance ON task_instance.id = task_instance_id "
    "WHERE dag_run_id = ? AND task_id = ?"
)


def _until_unlocked(
    path: Path, act: Callable[[], T], check: Callable[[], None] = lambda: None
) -> T:
    """Do it, again and again while somebody else holds the write lock. Raises DatabaseError.

    `check` is called between, and may raise to end the wait.
    """
    deadline = time.monotonic() + _LOCKED_LIMIT
    while True:
        try:
            return act()
        except _Busy:
            if time.monotonic() > deadline:
                raise _locked_out(path) from None
            check()
            time.sleep(0.02)


def _locked_out(path: Path) -> DatabaseError:
    return DatabaseError(f"{path} was locked by another process for {_LOCKED_LIMIT:g} s")


# --- Store: looks ---------------------------------------------------------------------------------


# Each is handed to `_read`.


def _find_run(
    connection: sqlite3.Connection, dag_id: str, run_id: str | None = None
) -> _RunRow | None:
    chosen = "AND run_id = ?" if run_id is not None else ""
    row = connection.execute(
        f"SELECT {_RUN_COLUMNS} FROM dag_run WHERE dag_id = ? {chosen} ORDER BY id DESC LIMIT 1",
        (dag_id,) if run_id is None else (dag_id, run_id),
    ).fetchone()
    return _RunRow(*row) if row else None


def _select_runs(
    connection: sqlite3.Connection,
    dag_id: str | None = None,
    state: str | None = None,
    limit: int | None = None,
    since: str | None = None,
) -> list[_RunRow]:
    """Runs, newest first; those that began at `since` or later."""
    rows = connection.execute(
        f"SELECT {_RUN_COLUMNS} FROM dag_run WHERE dag_id = coalesce(?1, dag_id) AND "
        "state = coalesce(?2, state) AND coalesce(start_date, '') >= coalesce(?4, '') "
        "ORDER BY id DESC LIMIT ?3",
        (dag_id, state, -1 if limit is None else limit, since),
    )
    return [_RunRow(*row) for row in rows]


def _select_run_ids(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute(
        "SELECT CAST(dag_id AS TEXT), CAST(run_id AS TEXT) FROM dag_run ORDER BY id DESC"
    ).fetchall()


def _select_run_counts(connection: sqlite3.Connection, run_row: int) -> dict[str | None, int]:
    """How many task instances of a run are in each state."""
    return dict(
        connection.execute(
            "SELECT state, count(*) FROM task_instance WHERE dag_run_id = ? GROUP BY state",
            (run_row,),
        )
    )


def _select_dags(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Every DAG's metadata, with the number of its runs and its newest one."""
    rows = connection.execute(
        "SELECT CAST(dag.dag_id AS TEXT), CAST(description AS TEXT), CAST(fileloc AS TEXT), "
        "CAST(doc_md AS TEXT), CAST(tags AS TEXT), CAST(schedule AS TEXT), count(dag_run.id), "
        "max(dag_run.id) FROM dag LEFT JOIN dag_run USING (dag_id) GROUP BY dag.dag_id "
        "ORDER BY dag.dag_id"
    ).fetchall()
    names = ("dag_id", "description", "fileloc", "doc_md", "tags", "schedule", "runs")
    dags = []
    for *values, newest in rows:
        run = connection.execute(
            f"SELECT {_RUN_COLUMNS} FROM dag_run WHERE id = ?", (newest,)
        ).fetchone()
        dags.append({**dict(zip(names, values, strict=True)), "newest": run and _RunRow(*run)})
    return dags


_INSTANCE_COLUMNS = ", ".join(
    f"CAST({name} AS {kind})"
    for kind, names in (
        (
            "TEXT",
            (
                "task_id",
                "state",
                "start_date",
                "end_date",
                "error",
                "upstream_task_ids",
                "task_group_id",
                "role",
            ),
        ),
        ("INTEGER", ("map_index", "try_number", "max_tries", "pid")),
    )
    for name in names
)


def _select_instances(
    connection: sqlite3.Connection, run_row: int, task_id: str | None = None
) -> list[tuple[Any, ...]]:
    """A run's task instances, in the order in which the DAG has them."""
    return connection.execute(
        f"SELECT {_INSTANCE_COLUMNS}, min(id) OVER (PARTITION BY task_id) AS first FROM "
        "task_instance WHERE dag_run_id = ?1 AND task_id = coalesce(?2, task_id) "
        "ORDER BY first, map_index",
        (run_row, task_id),
    ).fetchall()


def _select_attempts(
    connection: sqlite3.Connection, run_row: int, task_id: str | None = None
) -> list[tuple[Any, ...]]:
    """(task_id, map_index, try_number, state, start_date, end_date, pid, error) of every attempt
    of a run, or of one of its tasks."""
    columns = (
        "CAST(task_id AS TEXT), CAST(map_index AS INTEGER), CAST({0}.try_number AS INTEGER), "
        "CAST({0}.state AS TEXT), CAST({0}.start_date AS TEXT), CAST({0}.end_date AS TEXT), "
        "CAST({0}.pid AS INTEGER), CAST({0}.error AS TEXT)"
    )
    latest, earlier = columns.format("task_instance"), columns.format("task_instance_history")
    ours = "WHERE dag_run_id = ?1 AND task_id = coalesce(?2, task_id)"
    return connection.execute(
        f"SELECT {latest} FROM task_instance {ours} AND start_date IS NOT NULL "
        f"UNION ALL SELECT {earlier} FROM task_instance_history JOIN task_instance ON "
        f"task_instance.id = task_instance_id {ours} ORDER BY 1, 2, 3",
        (run_row, task_id),
    ).fetchall()


def _select_failures(
    connection: sqlite3.Connection, run_row: int, most: int
) -> tuple[int, list[tuple[str, int, str]]]:
    """How many task instances of a run failed, and the first (task_id, map_index, error)."""
    rows = connection.execute(
        "SELECT CAST(task_id AS TEXT), CAST(map_index AS INTEGER), CAST(error AS TEXT) "
        "FROM task_instance WHERE dag_run_id = ? AND state = 'failed' ORDER BY id LIMIT ?",
        (run_row, most),
    ).fetchall()
    if len(rows) < most:
        return len(rows), rows
    [count] = connection.execute(
        "SELECT count(*) FROM task_instance WHERE dag_run_id = ? AND state = 'failed'", (run_row,)
    ).fetchone()
    return count, rows


def _select_successes(connection: sqlite3.Connection) -> dict[str, str]:
    """When each DAG's last successful run ended."""
    return dict(
        connection.execute(
            "SELECT CAST(dag_id AS TEXT), max(CAST(end_date AS TEXT)) FROM dag_run "
            "WHERE state = 'success' GROUP BY dag_id"
        )
    )


def _select_running(
    connection: sqlite3.Connection, run_row: int
) -> list[tuple[str, int, str | None]]:
    """(task_id, map_index, start_date) of the task instances that run, the longest first."""
    return connection.execute(
        "SELECT CAST(task_id AS TEXT), CAST(map_index AS INTEGER), CAST(start_date AS TEXT) "
        "FROM task_instance WHERE dag_run_id = ? AND state = 'running' ORDER BY start_date",
        (run_row,),
    ).fetchall()


def _select_new_log(
    connection: sqlite3.Connection,
    run_row: int,
    task_id: str | None,
    map_index: int | None,
    after: int,
) -> list[tuple[int, str, int, int, int, str]]:
    """(id, task_id, map_index, try_number, part, text) of output stored after that of an id."""
    return connection.execute(
        "SELECT CAST(task_log.id AS INTEGER), CAST(task_id AS TEXT), CAST(map_index AS INTEGER), "
        "CAST(task_log.try_number AS INTEGER), CAST(part AS INTEGER), CAST(text AS TEXT) "
        "FROM task_log JOIN task_instance ON task_instance.id = task_instance_id "
        "WHERE task_log.id > ?5 AND dag_run_id = ?1 AND task_id = coalesce(?2, task_id) AND "
        "map_index = coalesce(?3, map_index) ORDER BY task_log.id LIMIT ?4",
        (run_row, task_id, map_index, 10_000, after),
    ).fetchall()


def _select_old_runs(
    connection: sqlite3.Connection, dag_id: str | None, keep: int | None, before: str | None
) -> list[_RunRow]:
    """The runs behind the `keep` newest ones of their DAG that began before a time."""
    rows = connection.execute(
        f"SELECT {_RUN_COLUMNS} FROM (SELECT *, row_number() OVER (PARTITION BY dag_id ORDER BY "
        "id DESC) AS age FROM dag_run) AS dag_run WHERE dag_id = coalesce(?1, dag_id) AND "
        "age > coalesce(?2, 0) AND coalesce(start_date, '') < coalesce(?3, '~') ORDER BY id",
        (dag_id, keep, before),
    ).fetchall()
    return [_RunRow(*row) for row in rows]


def _select_log(
    connection: sqlite3.Connection,
    run_row: int,
    task_id: str | None,
    map_index: int | None,
    try_number: int | None,
) -> list[tuple[str, int, int, str]]:
    """(task_id, map_index, try_number, text) of the stored output, in order."""
    return connection.execute(
        "SELECT CAST(task_id AS TEXT), CAST(map_index AS INTEGER), "
        "CAST(task_log.try_number AS INTEGER), CAST(text AS TEXT) FROM task_log "
        "JOIN task_instance ON task_instance.id = task_instance_id "
        "WHERE dag_run_id = ?1 AND task_id = coalesce(?2, task_id) AND "
        "map_index = coalesce(?3, map_index) AND task_log.try_number = "
        "coalesce(?4, task_log.try_number) ORDER BY task_instance.id, task_log.try_number, part",
        (run_row, task_id, map_index, try_number),
    ).fetchall()


def _select_lengths(
    connection: sqlite3.Connection, run_row: int
) -> dict[tuple[str, int], int | None]:
    """The length of every result that is stored, by task and index."""
    rows = connection.execute(
        "SELECT CAST(task_id AS TEXT), CAST(map_index AS INTEGER), CAST(length AS INTEGER) "
        "FROM xcom JOIN task_instance ON task_instance.id = task_instance_id "
        "WHERE dag_run_id = ? AND key = 'return_value'",
        (run_row,),
    )
    return {(task_id, map_index): length for task_id, map_index, length in rows}


def _select_xcoms(
    connection: sqlite3.Connection, run_row: int, task_id: str | None = None, values: bool = True
) -> list[tuple[str, int, str, str, str, bytes | None]]:
    """(task_id, map_index, key, type, preview, value) of a run's XComs, in order."""
    return connection.execute(
        "SELECT CAST(task_id AS TEXT), CAST(map_index AS INTEGER), CAST(key AS TEXT), "
        f"CAST(type AS TEXT), CAST(preview AS TEXT), {'value' if values else 'NULL'} "
        "FROM xcom JOIN task_instance ON task_instance.id = task_instance_id "
        "WHERE dag_run_id = ?1 AND task_id = coalesce(?2, task_id) "
        "ORDER BY task_instance.id, key",
        (run_row, task_id),
    ).fetchall()


def _select_item(
    connection: sqlite3.Connection, run_row: int, task_id: str, item: int
) -> bytes | None:
    """An element of a result that others expand over, if it is stored on its own."""
    row = connection.execute(
        "SELECT value FROM xcom_item JOIN task_instance ON task_instance.id = task_instance_id "
        "WHERE dag_run_id = ? AND task_id = ? AND map_index = -1 AND item = ?",
        (run_row, task_id, item),
    ).fetchone()
    return None if row is None else bytes(row[0])


def _select_values(
    connection: sqlite3.Connection, run_row: int, task_id: str, key: str
) -> list[tuple[int, bytes]]:
    """(map_index, value) of a task's XComs of one key, by index."""
    return connection.execute(
        "SELECT map_index, value FROM xcom JOIN task_instance ON "
        "task_instance.id = task_instance_id WHERE dag_run_id = ? AND task_id = ? AND key = ? "
        "ORDER BY map_index",
        (run_row, task_id, key),
    ).fetchall()


# --- Values: the only pickle ----------------------------------------------------------------------

_PICKLE_PROTOCOL = 5
_PREVIEW = 80  # characters of a value's preview
_VALUE_LIMIT = 1_000_000_000 - 100_000  # bytes; SQLite's limit of a row is 1,000,000,000


def _dump(value: Any) -> bytes:
    import pickle

    return pickle.dumps(value, _PICKLE_PROTOCOL)


def _load(data: bytes, script: str | None = None) -> Any:
    """The value of a pickle; classes of the script come from whatever `__main__` is here.

    Raises AttributeError or ModuleNotFoundError that names the class and the script it is in.
    """
    unpickler = _unpickler()(io.BytesIO(data))
    unpickler.script = script
    return unpickler.load()


@functools.cache
def _unpickler() -> Any:
    import pickle

    class Unpickler(pickle.Unpickler):
        script: str | None = None

        def find_class(self, module: str, name: str) -> Any:
            module = _module_name(module)
            try:
                return super().find_class(module, name)
            except (AttributeError, ModuleNotFoundError) as error:
                if module != "__main__":
                    raise
                where = self.script or "the script that stored the value"
                raise AttributeError(
                    f"the value is of class {name!r} of {where}, which is not the running "
                    "script: read it there, or define the class in a module of its own"
                ) from error

    return Unpickler


class _Call(NamedTuple):
    """A task's arguments on their way to a worker: pickled, and the results they take.

    Of a mapped task also the elements of each constant that it is expanded over.
    """

    data: bytes
    takes: frozenset[tuple[str, str]]  # (task_id, key)
    constants: Sequence[Sequence[_Call]] = ()


_NO_CALL = _Call(_dump(((), {})), frozenset())


def _dump_call(task: BaseOperator) -> _Call:
    """A task's arguments, results in them as look-ups. Raises UnreachableTask, naming the one."""
    args, kwargs = task._call()
    call = _NO_CALL if not args and not kwargs else _dump_taking(task, (args, kwargs), args, kwargs)
    mapping = task._mapping
    if mapping is None:
        return call
    constants = [
        () if isinstance(source, _Mappable)
        else [_dump_taking(task, value, (), {name or "element": value}) for value in source]
        for name, source in mapping.sources
    ]  # fmt: skip
    return call._replace(constants=constants)


def _dump_taking(
    task: BaseOperator, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Call:
    seen = _Seen(task)
    token = _pickled_results.set(seen)
    try:
        data = _dump(value)
    except Exception:  # pickling runs the arguments' own code, which may raise anything
        raise _blamed(task, args, kwargs) from None
    finally:
        _pickled_results.reset(token)
    for result in seen.results:
        if result.operator.task_id not in task._upstream:
            raise UnreachableTask(
                f"task {task.task_id!r}: the result of {result.operator.task_id!r} is inside an "
                "object, where it is not found: only lists, tuples, sets and dicts are searched"
            )
    return _Call(data, frozenset((x.operator.task_id, x.key) for x in seen.results))


def _blamed(task: BaseOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnreachableTask:
    """Which of a task's arguments can't be pickled, and why."""
    for name, value in [*enumerate(args, 1), *kwargs.items()]:
        try:
            _dump(value)
        except Exception as error:  # as above
            return UnreachableTask(
                f"task {task.task_id!r}: argument {name!r} is a {type(value).__name__}, which "
                f"can't be sent to a worker ({type(error).__name__}: {error}): hand over plain "
                "data, or make the object inside the task"
            )
    return UnreachableTask(f"task {task.task_id!r}: its arguments can't be pickled together")


def _dump_settings(task: BaseOperator) -> bytes:
    """What a worker has to know of a task that it finds by its function's name alone."""
    known = {**_TASK_SETTINGS, **task._own_settings}
    own = {name: value for name, value in task.__dict__.items() if name in known}
    try:
        return _dump((type(task), own, list(task._upstream), list(task._downstream)))
    except Exception as error:  # pickling runs the settings' own code; a callback may be a lambda
        raise UnreachableTask(
            f"task {task.task_id!r}: one of its settings can't be sent to a worker "
            f"({_one_line(error)}): build the DAG at the top level of its module"
        ) from None


def _value_of(task_id: str, key: str, absent_is_none: bool) -> Any:
    """Called by unpickling a task's arguments: the value that stands for a result."""
    return _running_job().value(task_id, key, absent_is_none)


def _sequence_of(task_id: str, key: str) -> Any:
    """Called by unpickling a task's arguments: the results of a mapped task's instances."""
    return _running_job().sequence(task_id, key)


def _group_value(name: str) -> Any:
    """Called by unpickling a task's arguments: the element of a mapped group's argument."""
    return _running_job().group_value(name)


def _param_of(name: str, default: Any) -> Any:
    """Called by unpickling a task's arguments: the value of an argument of a @dag function."""
    return _plain_copy(_running_job().run.info["conf"]).get(name, default)


def _xcom_row(key: str, value: Any) -> _XComRow:
    """A value pickled, with its type, a short preview and its length. Raises what pickling does."""
    data = _dump(value)
    if len(data) > _VALUE_LIMIT:
        raise AirflowFailException(
            f"the value of {key!r} has {len(data):,} bytes pickled, more than the database holds "
            f"({_VALUE_LIMIT:,}): write it to a file and return the path"
        )
    kind = type(value)
    length = len(value) if isinstance(value, (list, tuple, dict)) else None
    return _XComRow(key, _storable(kind.__qualname__), _preview(value), length, data)


def _storable(text: object) -> str:
    """Text that SQLite takes: a file name may hold bytes that are none."""
    return str(text).encode(errors="backslashreplace").decode()


def _preview(value: Any) -> str:
    if value is None or type(value) in (bool, int, float) or type(value) is str and len(value) < 60:
        text = repr(value)
    else:
        try:
            text = _short_repr().repr(value)
        except BaseException as error:  # a user's __repr__ may raise anything; the value is fine
            text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    text = _storable(text)
    return text if len(text) <= _PREVIEW else text[: _PREVIEW - 3] + "..."


@functools.cache
def _short_repr() -> Any:
    import reprlib

    class Short(reprlib.Repr):
        def repr_bytes(self, x: bytes, level: int) -> str:  # else its whole repr would be made
            return repr(x) if len(x) < self.maxother else f"{x[:40]!r}..."

        repr_bytearray = repr_bytes

    short = Short()
    short.maxstring = short.maxother = short.maxlong = 60
    return short


# --- Worker: everything here runs where a task runs; finding the task -----------------------------

_MESSAGE_LIMIT = 64 * 1024  # bytes; a pipe takes that much at once, more goes through a file
_INLINE = 16 * 1024  # bytes of a value that travel with a job, of output with its outcome
_ERROR_LIMIT = 64 * 1024  # characters of a traceback that are kept
_UNGUARDED = 78  # exit code of a worker whose script calls run() as it is imported


_environ = os.environ  # a task may put something else in its place


class _WorkerRun:
    """A run as a worker knows it: where its DAG is found, and what every task's context has."""

    def __init__(self, info: dict[str, Any], dag: Dag | None = None) -> None:
        self.info = info
        self._found: Dag | None = dag
        self._imported = dag is not None
        self._tasks: dict[str, BaseOperator] = {}
        self._shell: Dag | None = None
        self.sys_path: list[str] = []

    @functools.cached_property
    def edited(self) -> str | None:
        """The file of the DAG that is not as it was at the run's start, if there is one."""
        for path, size, mtime in self.info["files"]:
            with contextlib.suppress(OSError):
                found = os.stat(path)
                if (found.st_size, found.st_mtime_ns) != (size, mtime):
                    return (
                        f"{path} was edited since the run began: this worker runs the new version"
                    )
        return None

    def restore(self) -> None:
        """Give the process the environment and working directory that run() was called in."""
        environ = self.info["environ"]
        os.environ = _environ  # noqa: B003 - the very object
        if vars(os.environ)["_data"] != environ:
            os.environ.clear()
            for name, value in environ.items():
                os.environ[os.fsdecode(name)] = os.fsdecode(value)
        try:
            there = os.getcwd() == self.info["cwd"]
        except OSError:  # a task has deleted it
            there = False
        if not there:
            with contextlib.suppress(OSError):  # it may be gone for run() as well
                os.chdir(self.info["cwd"])

    def import_dag(self) -> None:
        """Import the module that builds the DAG, if one does. Raises what importing raises."""
        if self._imported:
            return
        module, dag_id, n = self.info["key"]
        if module:
            _import(module, self.info["module_path"])
        self._found = _built.get((module, dag_id, n))
        self._imported = True

    def find(
        self, task_id: str, function: str, by_name: bool, settings: bytes | None = None
    ) -> BaseOperator:
        """The task, from the DAG or by the name of its function. Raises UnreachableTask."""
        found = self._tasks.get(task_id)
        if found is None:
            found = self._tasks[task_id] = self._look_up(task_id, function, by_name, settings)
        return found

    def _look_up(
        self, task_id: str, function: str, by_name: bool, settings: bytes | None
    ) -> BaseOperator:
        task = self._found.task_dict.get(task_id) if self._found is not None else None
        # A DAG that the import built another way may mean another function by this task id.
        if task is not None and _function_name(task) == function:
            return task
        named = _resolve(function) if by_name else None
        if named is None:
            raise UnreachableTask(task_id)
        return self._stand_in(task_id, named, settings)

    def _stand_in(
        self, task_id: str, function: Callable[..., Any], settings: bytes | None
    ) -> BaseOperator:
        """A task like the scheduler's, around a function found by its name."""
        kind, own, upstream, downstream = (
            _load(settings) if settings else (_FunctionOperator, {}, [], [])
        )
        if self._shell is None:
            self._shell = Dag(self.info["dag_id"])
        signature = _build_signature(function)
        token = _current_dag.set(None)
        try:
            task: BaseOperator = kind(function, signature, (), {}, task_id=task_id, **own)
        finally:
            _current_dag.reset(token)
        task.dag = self._shell
        task._upstream, task._downstream = dict.fromkeys(upstream), dict.fromkeys(downstream)
        return task


def _function_name(task: BaseOperator) -> str:
    """`module:qualname` of the function behind a task, or of its class: the same everywhere."""
    named: Any = task._function() or type(task)
    module = _module_name(getattr(named, "__module__", None) or "")
    return f"{module}:{getattr(named, '__qualname__', '?')}"


def _import(module: str, path: str | None) -> None:
    """Import the module as the scheduler has it: by its name, or else from its file."""
    if module == "__main__":
        return  # multiprocessing has imported it, as __mp_main__
    import importlib.util

    loaded = sys.modules.get(module)
    if loaded is not None and _same_file(getattr(loaded, "__file__", None), path):
        return
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec is in the way
        spec = None
    if spec is not None and _same_file(spec.origin, path):
        importlib.import_module(module)
        return
    if path is None:
        return
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} can't be imported as a module")
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    spec.loader.exec_module(made)


def _same_file(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one == other
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _resolve(function: str) -> Callable[..., Any] | None:
    """The function of this `module:qualname`; what `@task` made of it is looked through."""
    module, _, name = function.partition(":")
    if module not in sys.modules:
        import importlib

        try:
            importlib.import_module(module)
        except ImportError:
            return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, _TaskFunction):
        found = found.__wrapped__
    return found if callable(found) else None


# --- Worker: one attempt --------------------------------------------------------------------------


class _Job:
    """The attempt that runs here now."""

    def __init__(self, run: _WorkerRun, message: tuple[Any, ...]) -> None:
        (
            _,
            _,
            self.task_id,
            function,
            self.map_index,
            self.try_number,
            self.max_tries,
            self.started,
            self._call,
            settings,
            self._inputs,
            self.timeout,
            self._extra,
        ) = message
        self.run = run
        self.task = run.find(self.task_id, function, settings is not None, settings)
        self.pushed: dict[str, _XComRow] = {}
        self.exception: BaseException | None = None
        self.feeds = bool(self._extra.get("feeds"))
        self.reschedules: int = self._extra.get("pokes", 0)
        self.first_start: float = self._extra.get("first_start", time.time())
        self._values: dict[tuple[str, str], Any] = {}
        self._group_values: dict[str, Any] = {}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The task's arguments, every result in them replaced by its value."""
        elements = self._extra.get("elements", ())
        if self._extra.get("group"):
            for name, element in elements:
                self._group_values.update(self._named(name, element))
            elements = ()
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if self._call != _NO_CALL.data:
            args, kwargs = self._loaded(self._call)
        for name, element in elements:
            found = self._named(name, element)
            twice = found.keys() & kwargs.keys()
            if twice and name is None:
                raise TypeError(f"task {self.task_id!r}: {min(twice)!r} is also in partial()")
            kwargs |= found
        return args, kwargs

    def _named(self, name: str | None, element: tuple[Any, ...]) -> dict[str, Any]:
        value = self.element(element)
        if name is not None:
            return {name: value}
        if not isinstance(value, Mapping):
            raise TypeError(f"expand_kwargs() takes dicts, found {_shown(value)}")
        return dict(value)

    def element(self, plan: tuple[Any, ...]) -> Any:
        """An element that the task is expanded over, by the plain data that says where it is."""
        kind = plan[0]
        if kind == "value":
            return self._loaded(plan[1])
        if kind == "tuple":
            return tuple(self.element(part) for part in plan[1])
        if kind == "map":
            mapping = self.task._mapping
            assert mapping is not None
            inner = self.element(plan[2])
            return mapping.functions[plan[1]](inner)
        if kind == "xcom":
            return self._loaded(dict(self._read(plan[1], "return_value"))[plan[2]])
        _, task_id, i = plan
        row = self.run.info["run_row"]
        data = self._look(lambda db: _select_item(db, row, task_id, i), task_id)
        if data is not None:
            return self._loaded(data)
        # Stored by code of which nobody expanded over it: taken apart here.
        whole = self._loaded(dict(self._read(task_id, "return_value"))[-1])
        return (list(whole.items()) if isinstance(whole, dict) else whole)[i]

    def group_value(self, name: str) -> Any:
        """The element of an argument of the mapped group."""
        return self._group_values[name]

    def _loaded(self, data: bytes) -> Any:
        return _load(data, self.run.info["fileloc"])

    def value(self, task_id: str, key: str, absent_is_none: bool) -> Any:
        """The value of an upstream's XCom, the same object each time within one attempt."""
        if (task_id, key) not in self._values:
            found = self._inputs.get((task_id, key))
            if not found and not absent_is_none:
                raise XComNotFound(
                    f"task {task_id!r} stored no XCom {key!r}; is it a key of a dict that it "
                    "returns? then annotate it `-> dict[str, ...]`, or set multiple_outputs=True"
                )
            self._values[task_id, key] = self._first(task_id, key, found) if found else None
        return self._values[task_id, key]

    def _first(self, task_id: str, key: str, found: list[tuple[int, bytes | None]]) -> Any:
        map_index, data = found[0]
        if data is None:  # too large to travel with the job
            data = dict(self._read(task_id, key))[map_index]
        return self._loaded(data)

    def sequence(self, task_id: str, key: str) -> _Results:
        """The values of a mapped task's instances, without those that stored none."""
        found = self._inputs.get((task_id, key))
        rows = found if found is not None else self._read(task_id, key)
        return _Results([data for _, data in rows], self.run.info["fileloc"])

    def _read(self, task_id: str, key: str) -> list[tuple[int, bytes]]:
        """Values read from the database, where this worker is on its machine."""
        row = self.run.info["run_row"]
        return self._look(lambda db: _select_values(db, row, task_id, key), task_id)

    def _look(self, look: Callable[[sqlite3.Connection], T], task_id: str) -> T:
        path = self.run.info["db_path"]
        if path is None:
            raise AirflowException(
                f"the values of {task_id!r}, which is not directly upstream, can't be had: this "
                "worker is on a foreign executor, which brings only those of direct upstream tasks"
            )
        return _read(Path(path), look, _ROW_LIMIT)

    def pull(self, task_id: str, key: str) -> list[tuple[int, Any]]:
        """(map_index, value) of a task's XComs of one key, its own pushes included."""
        found: Sequence[tuple[int, bytes]]
        if task_id == self.task_id and self.map_index < 0:
            row = self.pushed.get(key)
            found = [] if row is None else [(self.map_index, row.value)]
        elif self.run.info["db_path"] is None and task_id in self.task._upstream:
            found = self._inputs.get((task_id, key), [])
        else:
            found = self._read(task_id, key)
        if task_id == self.task_id and self.map_index >= 0 and key in self.pushed:
            found = [(self.map_index, self.pushed[key].value)]
        return [(i, self._loaded(data)) for i, data in found]

    @functools.cached_property
    def context(self) -> Context:
        """The task's context: a dict with Airflow's keys."""
        return _make_context(self)


class _Results(Sequence[Any]):
    """What a reduce gets: the results of a mapped task, in order of map_index, loaded when taken.

    It has `len`, iteration, indexes, slices and `==` with a list; stored, it becomes a list.
    """

    def __init__(self, data: Sequence[bytes], script: str | None) -> None:
        self._data = data
        self._script = script

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [_load(data, self._script) for data in self._data[i]]
        return _load(self._data[i], self._script)

    def __iter__(self) -> Iterator[Any]:
        return (_load(data, self._script) for data in self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple, _Results)):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<the results of {len(self)} instances>"

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


_job: contextvars.ContextVar[_Job] = contextvars.ContextVar("liteflow_job")


def _running_job() -> _Job:
    try:
        return _job.get()
    except LookupError:
        raise RuntimeError("there is no running task: this is for use inside one") from None


def get_current_context() -> Context:
    """The context of the task that runs here. Raises RuntimeError outside a task."""
    return _running_job().context


class _Variables:
    """`var.value.NAME`, `var.value.get(NAME, default)`, and the same with `var.json`."""

    def __init__(self, json: bool) -> None:
        self._json = json

    def get(self, key: str, default: Any = ...) -> Any:
        return Variable.get(key, default, self._json)

    def __getattr__(self, key: str) -> Any:
        return self.get(key)


class _Macros:
    """What `macros` is in a context: Airflow's helpers for dates, and some modules."""

    datetime = _datetime.datetime
    timedelta = _datetime.timedelta
    time = time
    json = json

    def __getattr__(self, name: str) -> Any:
        if name in ("uuid", "random"):
            import importlib

            return importlib.import_module(name)
        raise AttributeError(name)

    @staticmethod
    def ds_add(ds: str, days: int) -> str:
        """The day so many days later."""
        day = _datetime.datetime.strptime(ds, "%Y-%m-%d")
        return (day + _datetime.timedelta(days=days)).strftime("%Y-%m-%d")

    @staticmethod
    def ds_format(ds: str, input_format: str, output_format: str) -> str:
        """A date in another format."""
        return _datetime.datetime.strptime(str(ds), input_format).strftime(output_format)


# Airflow's Jinja filters for a logical date.
_FILTERS: dict[str, Callable[[_datetime.datetime], str]] = {
    "ds": lambda when: when.strftime("%Y-%m-%d"),
    "ds_nodash": lambda when: when.strftime("%Y%m%d"),
    "ts": lambda when: when.isoformat(),
    "ts_nodash": lambda when: when.strftime("%Y%m%dT%H%M%S"),
    "ts_nodash_with_tz": lambda when: when.isoformat().replace("-", "").replace(":", ""),
}


def _make_context(job: _Job) -> Context:
    info, task = job.run.info, job.task
    run = _dag_run_of(info)
    ti = _running_instance(job)
    ti.task = task
    context: Context = {
        "conn": None,
        "dag": task.dag,
        "dag_run": run,
        "inlet_events": {},
        "inlets": [],
        "macros": _Macros(),
        "map_index_template": None,
        "outlet_events": {},
        "outlets": [],
        "partition_date": None,
        "partition_key": None,
        "task_state_store": None,
        "params": _task_params(task, info["params"], info["conf"]),
        "prev_data_interval_end_success": None,
        "prev_data_interval_start_success": None,
        "prev_end_date_success": None,
        "prev_start_date_success": None,
        "run_id": info["run_id"],
        "task": task,
        "task_instance": ti,
        "task_instance_key_str": f"{task.dag_id}__{task.task_id}__"
        + (run.logical_date.strftime("%Y%m%d") if run.logical_date else info["run_id"]),
        "task_reschedule_count": job.reschedules,
        "templates_dict": None,
        "ti": ti,
        "triggering_asset_events": {},
        "var": {"value": _Variables(json=False), "json": _Variables(json=True)},
    }
    when = run.logical_date
    if when is not None:
        context |= {
            "data_interval_end": when,
            "data_interval_start": when,
            "logical_date": when,
            **{name: text(when) for name, text in _FILTERS.items()},
        }
    return context


def _run_job(
    job: _Job,
    guard: Callable[[], contextlib.AbstractContextManager[None]],
    begin_time: Callable[[], None] = lambda: None,
) -> Any:
    """Run one attempt; (status, error, xcoms) as plain data, whatever the task does.

    `guard` is entered around the task's own code: within it the process may be told to end.
    `begin_time` is called when its arguments are there and its function starts.
    """
    token = _job.set(job)
    note: dict[str, Any] = {}
    error: str | None = None
    try:
        try:
            with guard():
                _check_conditions(job)
                args, kwargs = job.arguments()
                worker = job.task._made(kwargs)
                run = functools.partial(worker._run, args, kwargs, job)
                result = _run_hooked(job, worker, run, begin_time)
            note = _store_result(job, result)
            status = _Status.SUCCESS
        except AirflowSkipException as skip:
            status, error, job.exception = _Status.SKIPPED, _one_line(skip), skip
        except _Reschedule as pause:
            status, note = _Status.RESCHEDULE, {"wait": pause.seconds}
        except (AirflowFailException, AirflowSensorTimeout) as failure:
            status, error, job.exception = _Status.FATAL, _traceback(failure), failure
        except BaseException as failure:  # sys.exit, KeyboardInterrupt, a user's own: all fail
            status, error, job.exception = _Status.FAILED, _traceback(failure), failure
    finally:
        _job.reset(token)
    return status.value, error, [tuple(row) for row in job.pushed.values()], note


def _run_hooked(
    job: _Job, task: Any, run: Callable[[], Any], begin_time: Callable[[], None]
) -> Any:
    """Between `pre_execute` and `post_execute`, which an operator's class may define."""
    if task.pre_execute is not None:
        task.pre_execute(job.context)
    if not job.reschedules:
        _call_back(job, job.task, "on_execute_callback")
    begin_time()
    result = run()
    if task.post_execute is not None:
        task.post_execute(job.context, result)
    return result


def _check_conditions(job: _Job) -> None:
    """`run_if` and `skip_if`. Raises AirflowSkipException."""
    for condition, wanted, message in job.task._conditions:
        found = condition(job.context)
        if isinstance(found, tuple):
            found, message = found[0], found[1] or message
        if bool(found) is not wanted:
            raise AirflowSkipException(message or "skipped by its condition")


def _call_back(job: _Job, owner: Any, name: str) -> None:
    """Call a task's or DAG's callbacks of a kind, each whatever the one before did."""
    callbacks = getattr(owner, name, None)
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback is None:
            continue
        token = _job.set(job)
        try:
            callback(job.context)
        except (Exception, SystemExit) as error:  # a user's callback may raise anything
            print(f"liteflow: {name} failed:\n{_traceback(error)}", file=sys.stderr)
        finally:
            _job.reset(token)


def _call_back_at_end(job: _Job, name: str, reason: str | None) -> None:
    """Run the callbacks that follow an outcome: `reason` where the exception is not at hand, or
    why the DAG's run ended."""
    context = job.context
    if name.startswith("dag_"):
        success = name == "dag_on_success_callback"
        context["reason"] = reason
        context["dag_run"].state = DagRunState.SUCCESS if success else DagRunState.FAILED
        _call_back(job, job.task.dag, name.removeprefix("dag_"))
        return
    if job.exception is None and reason is not None:
        job.exception = AirflowException(reason)
    for each in name.split("+"):
        for state, callback in _CALLBACK_OF.items():
            if callback == each:
                context["ti"].state, context["ti"].end_date = state, _utcnow()
        if job.exception is not None and each != "on_skipped_callback":
            context["exception"] = job.exception
        _call_back(job, job.task, each)


def _store_result(job: _Job, result: Any) -> dict[str, Any]:
    """Turn the result into XComs; what the plan must know of it, as plain data.

    Raises a TypeError that says what can't be stored.
    """
    note = _flow_note(job, result)
    if job.feeds:
        note["items"] = _items_of(job, result)
    if result is None or not job.task.do_xcom_push:
        return note
    if job.task.multiple_outputs:
        if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
            raise TypeError(
                f"task {job.task_id!r} has multiple_outputs, so it must return a dict with str "
                f"keys, found {_shown(result)}"
            )
        for key, value in result.items():
            _push(job, key, value, f"returned for {key!r} a")
    _push(job, "return_value", result, "returned")
    return {**note, "stored": True, "length": job.pushed["return_value"].length}


def _flow_note(job: _Job, result: Any) -> dict[str, Any]:
    """What a branch chose, or whether a short_circuit goes on."""
    if job.task._flow == "short_circuit":
        return {"go_on": bool(result)}
    if job.task._flow != "branch":
        return {}
    chosen = [result] if isinstance(result, str) else result
    if chosen is not None and not (
        isinstance(chosen, (list, tuple, set)) and all(isinstance(x, str) for x in chosen)
    ):
        raise AirflowException(
            f"a branch must return a task id, a list of them, or None, found {_shown(result)}"
        )
    return {"chosen": None if chosen is None else [str(x) for x in chosen]}


_MAP_LIMIT = 1024  # elements of a result that others expand over (Airflow's max_map_length)


def _items_of(job: _Job, result: Any) -> list[bytes]:
    """The elements of a result that others expand over, each pickled on its own."""
    if result is None:
        raise XComForMappingNotPushed(
            f"task {job.task_id!r} returned None, and others expand over its result"
        )
    if isinstance(result, (str, bytes, bytearray)) or not isinstance(result, (Sequence, Mapping)):
        raise UnmappableXComTypePushed(
            f"task {job.task_id!r} returned {_shown(result)}, and others expand over its result: a "
            "list, tuple or dict is needed"
        )
    if len(result) > _MAP_LIMIT:
        raise UnmappableXComLengthPushed(
            f"task {job.task_id!r} returned {len(result)} elements, and others expand over its "
            f"result: at most {_MAP_LIMIT} are allowed"
        )
    return [_dump(x) for x in (result.items() if isinstance(result, Mapping) else result)]


def _push(job: _Job, key: str, value: Any, said: str) -> None:
    try:
        key = str(key.encode().decode())
    except UnicodeError:
        raise TypeError(f"the XCom key {_shown(key)} is no text: it can't be stored") from None
    try:
        job.pushed[key] = _xcom_row(key, value)
    except AirflowFailException:
        raise
    except BaseException as error:  # pickling runs the value's own code: it may even sys.exit
        remedy = "; return its items as a list" if hasattr(value, "__next__") else ""
        raise TypeError(
            f"{said} {type(value).__name__}, which cannot be pickled: "
            f"{type(error).__name__}: {error}{remedy}"
        ) from None


def _one_line(error: BaseException) -> str:
    text = _text_of(error)
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _text_of(error: BaseException) -> str:
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except BaseException as trouble:  # a user's __str__ may raise anything, sys.exit included
        return f"<its text raised {type(trouble).__name__}>"


def _last_of(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def _traceback(error: BaseException) -> str:
    """The traceback as text, without liteflow's own frames; its last line is the reason."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as trouble:  # formatting runs the exception's own code
        text = f"{type(error).__name__} (its traceback can't be shown: {type(trouble).__name__})"
    if isinstance(error, SystemExit):
        text += f"task called sys.exit({_shown(error.code)})\n"
    elif "\n" in _text_of(error).rstrip("\n") or _last_of(text) != _last_of(text).strip(" |+-"):
        # A message of several lines, or a group's frame: the last line is to be the reason.
        text += f"{type(error).__qualname__}: {_text_of(error).partition(chr(10))[0]}\n"
    text = text.rstrip("\n").encode(errors="backslashreplace").decode()
    if len(text) > _ERROR_LIMIT:
        half = _ERROR_LIMIT // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"
    return text


# --- Worker: the process --------------------------------------------------------------------------


_LINGER = 150e-6  # seconds; see _linger
_QUICK = 0.002  # seconds; a job that takes no longer may be followed by one in no time


class _Inbox:
    """Messages from a pipe: four bytes of length, as multiprocessing frames them, then marshal."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._poll: Any = None  # select.poll, where it exists; connection.poll() makes a new one

    def is_there(self) -> bool:
        """Whether `fill` would find something at once."""
        if self._poll is None:
            import select

            if not hasattr(select, "poll"):
                return self._connection.poll(0)
            self._poll = select.poll()
            self._poll.register(self._connection.fileno(), select.POLLIN)
        return bool(self._poll.poll(0))

    def fill(self) -> int:
        """Read what there is, waiting for something; how many bytes, 0 at the pipe's end."""
        try:
            if _WINDOWS:
                data = _framed(self._connection.recv_bytes())
            else:
                data = os.read(self._connection.fileno(), _MESSAGE_LIMIT)
        except (EOFError, ConnectionError):  # the other side is gone
            data = b""
        self._buffer += data
        return len(data)

    def take(self) -> tuple[Any, ...] | None:
        """The next message that is there as a whole."""
        if len(self._buffer) < 4:
            return None
        end = 4 + int.from_bytes(self._buffer[:4], "big")
        if len(self._buffer) < end:
            return None
        message: tuple[Any, ...] = marshal.loads(self._buffer[4:end])
        del self._buffer[:end]
        return _take_message(message[1]) if message[0] == "file" else message


def _framed(data: bytes) -> bytes:
    """A message as `_Inbox` reads it."""
    return len(data).to_bytes(4, "big") + data


def _linger(is_there: Callable[[], object]) -> None:
    """Look for a moment, leaving the CPU to whoever wants it, before going to sleep.

    To be woken takes some 20 µs, which is longer than a quick job's message is on its way.
    """
    pause = getattr(os, "sched_yield", None)
    if pause is None:
        return
    until = time.perf_counter() + _LINGER
    while not is_there() and time.perf_counter() < until:
        pause()


class _Worker:
    """A worker process: serves the jobs that come over its pipe, one at a time.

    Some come ahead, while another runs. Each of those may start if there is a token for it in
    the pipe `tokens`: the scheduler, which can read it too, may have taken it away.
    """

    def __init__(self, connection: Connection, tokens: Connection | None = None) -> None:
        self.connection = connection
        self.tokens = tokens
        self.inbox = _Inbox(connection)
        self.barred = False  # no job that came ahead may start before the next that did not
        self.quick = False  # the last job was
        self.importing = False  # modules of the DAG, which must not start runs meanwhile
        self.pid = os.getpid()
        self.runs: dict[str, _WorkerRun] = {}
        self.folder: str | None = None
        self.log: str | None = None
        self.log_file = -1
        self.log_start = 0  # of the job's output in the log
        self.deadline: float | None = None
        self.timeout: float | None = None
        self.in_task = False
        self.terminated = False
        self.files = 0
        self.last: _Job | None = None
        self._threads = 0
        self._stdio: tuple[Any, ...] = (None, None)

    def prepare(self) -> None:
        """Become a worker: a session and streams of its own, and an end with the scheduler."""
        if hasattr(os, "setsid"):
            with contextlib.suppress(PermissionError):  # already a leader
                os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the scheduler's to handle
        signal.signal(signal.SIGTERM, self._on_term)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a forked worker has the scheduler's
        _die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it lives as long as the process
        self._open_streams()
        sys.breakpointhook = _no_breakpoint
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._recursion = sys.getrecursionlimit()
        self._note_state()

    def _note_state(self) -> None:
        """What the process is like between tasks, once the DAG's module is imported."""
        self._threads = threading.active_count()
        self._limits = _resource_limits()
        if hasattr(signal, "pthread_sigmask"):
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        self._handlers = {number: _getsignal(number) for number in _WATCHED_SIGNALS}
        self._logging = (list(logging.root.handlers), logging.root.level)
        self._children = _used_by_children()

    def serve(self) -> None:
        """Answer messages until the scheduler closes the pipe."""
        self._send(("ready", os.getpid()))
        while True:
            message = self.inbox.take()
            if message is None:
                if self.quick:
                    _linger(self.inbox.is_there)
                    self.quick = False
                if not self.inbox.fill():
                    return
            elif (answer := self._answer(message)) is not None:
                self._send(answer)

    def _send(self, message: tuple[Any, ...]) -> None:
        size = sum(len(row[-1]) for row in message[3]) if message[0] == "done" else 0
        data = b"" if size > _MESSAGE_LIMIT else marshal.dumps(message)
        if max(size, len(data)) > _MESSAGE_LIMIT and self.folder is not None:
            self.files += 1
            path = os.path.join(self.folder, f"value-{os.getpid()}-{self.files}")
            try:
                _put_message(path, message)
                data = marshal.dumps(("file", path))
            except OSError as error:  # a full disk, or a limit that the task has set
                why = f"the task's outcome could not be handed over: {error}"
                self.last, self.barred = None, True
                data = marshal.dumps(
                    ("done", "failed", why, [], {}, False, why, False, *message[-4:])
                )
        self.connection.send_bytes(data)

    def _answer(self, message: tuple[Any, ...]) -> tuple[Any, ...] | None:
        kind = message[0]
        if kind in ("begin", "find"):
            self.importing = True
            try:
                if kind == "begin":
                    return self._begin(*message[1:])
                return _find_all(self.runs[message[1]], message[2])
            finally:
                self.importing = False
        if kind == "log":
            _, token, path, run_row = message
            self.runs[token].info["run_row"] = run_row
            self.folder, self.log = os.path.dirname(path), path
            self._renew_output()
            return None
        if kind == "end":
            self.runs.pop(message[1], None)
            return None
        if kind == "callback":
            return self._call_back(message[1], message[2])
        if kind == "call":
            return self._call(*message[1:])
        if kind == "ahead":
            return self._run(message) if self._may_start() else None
        self.barred = False
        self.log_start = os.lseek(self.log_file, 0, os.SEEK_END)
        return self._run(message)

    def _may_start(self) -> bool:
        """Whether the job that came ahead still has its token."""
        if self.barred or self.tokens is None:
            return False
        try:
            return bool(os.read(self.tokens.fileno(), 1))
        except BlockingIOError:
            self.barred = True
            return False

    def _call_back(self, name: str | None, reason: str | None) -> tuple[Any, ...]:
        """The outcome of the last job is committed: its callbacks, if there are any."""
        assert self.last is not None
        job, self.last = self.last, None
        if name is not None:
            _call_back_at_end(job, name, reason)
        self._flush()
        self.terminated = False
        return ("called", self._restore(job.run))

    def _call(
        self, token: str, message: tuple[Any, ...], name: str, reason: str | None, of: Any
    ) -> tuple[Any, ...]:
        """Callbacks of an attempt that ran elsewhere, or of the DAG."""
        run = self.runs[token]
        run.restore()
        _call_elsewhere(run, message, name, reason, of)
        self._flush()
        self.terminated = False
        return ("called", self._restore(run))

    def _begin(self, token: str, info: dict[str, Any]) -> tuple[Any, ...]:
        run = self.runs[token] = _WorkerRun(info)
        # After run()'s own entries, what the pool's initializer may have added.
        sys.path[:] = dict.fromkeys([*info["sys_path"], *sys.path])
        run.restore()
        try:
            run.import_dag()
        except BaseException as error:  # importing runs the user's module: it may even sys.exit
            return ("begun", _traceback(error), None)
        self._flush()
        _log_to_stderr()
        self._note_state()
        run.sys_path = list(sys.path)
        return ("begun", None, run.edited)

    def _run(self, message: tuple[Any, ...]) -> tuple[Any, ...]:
        start, clock = time.time(), time.perf_counter()
        run = self.runs[message[1]]
        run.restore()
        os.umask(self._umask)
        _log_to_stderr()
        if run.edited is not None:
            print(f"liteflow: {run.edited}", file=sys.stderr)
        job = _Job(run, message)
        self.timeout, self.deadline = job.timeout, None
        outcome = _run_job(job, self._guard, self._begin_time)
        if os.getpid() != self.pid:
            os._exit(0)  # a child of the task came back into our code: it is not heard
        self._flush()
        terminated, self.terminated = self.terminated, False
        took = time.perf_counter() - clock
        end, output = self._own_output()
        self.barred = terminated or output is None
        self.quick = took < _QUICK
        if message[-1].get("holds") and outcome[0] != "reschedule":
            self.last = job  # for its callbacks, once the outcome is committed
            return ("done", *outcome, terminated, None, True, start, took, end, None)
        spoilt = self._restore(run)
        self.barred = self.barred or spoilt is not None
        self.log_start = end
        return ("done", *outcome, terminated, spoilt, False, start, took, end, output)

    def _own_output(self) -> tuple[int, bytes | None]:
        """Where the job's output ends in the log, and the output, unless it is long."""
        try:
            end = os.lseek(self.log_file, 0, os.SEEK_END)
            start = self.log_start if self.log_start <= end else 0  # the task cut the file
            if end == start:
                return end, b""
            if end - start > _INLINE or not hasattr(os, "pread"):
                return end, None
            return end, os.pread(self.log_file, end - start, start)
        except OSError:  # the task has closed it
            return 0, None

    def _begin_time(self) -> None:
        """The task's own code starts: its time runs, here first, then for the scheduler."""
        if self.timeout is not None:
            self.deadline = time.monotonic() + self.timeout
            self._send(("started",))

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Within this, SIGTERM raises in the task; at once if it came on the way here."""
        self.in_task = True
        try:
            if self.terminated:
                self._raise_end()
            yield
        finally:
            self.in_task = False

    def _on_term(self, signum: int, frame: object) -> None:
        if os.getpid() != self.pid:  # a child of the task inherits the handler, not the meaning
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.terminated = True
        if self.in_task:
            self._raise_end()

    def _raise_end(self) -> NoReturn:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise AirflowTaskTimeout(f"timeout after {self.timeout:g} s")
        raise AirflowTaskTerminated("the task was told to end (SIGTERM)")

    def _flush(self) -> None:
        streams = self._stdio
        if sys.stdout is not streams[0] or sys.stderr is not streams[1]:
            streams = (sys.stdout, sys.stderr, *streams)
        for stream in streams:
            with contextlib.suppress(Exception):  # a task may have put anything there
                stream.flush()

    def _open_streams(self) -> None:
        # Line-buffered, so that a killed task's last words are in its log.
        streams = [
            open(n, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
            for n in (1, 2)
        ]
        sys.stdout, sys.stderr = streams
        self._stdio = (sys.stdout, sys.stderr)

    def _restore(self, run: _WorkerRun) -> str | None:
        """Undo what a task changed in the process; what can't be undone, and needs a new one."""
        sys.stdout, sys.stderr = self._stdio
        if any(stream.closed for stream in self._stdio):  # a wrapper that is dropped closes ours
            self._open_streams()
        if sys.path != run.sys_path:
            sys.path[:] = run.sys_path
        if sys.getrecursionlimit() != self._recursion:
            sys.setrecursionlimit(self._recursion)
        for number, handler in self._handlers.items():
            if _getsignal(number) is not handler:
                signal.signal(number, handler)
                self._children = None
        if hasattr(signal, "setitimer") and hasattr(signal, "pthread_sigmask"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        logging.root.handlers[:], logging.root.level = self._logging[0], self._logging[1]
        return self._damage()

    def _damage(self) -> str | None:
        """What a task has done to its process that only a new one mends."""
        if threading.active_count() > self._threads:
            return "the task left a thread"
        if _resource_limits() != self._limits:
            return "the task changed a resource limit"
        if _has_living_child():
            return "the task left a child process"
        # A child that is gone has been waited for by now, and shows in what those have used; the
        # kernel does not count them where SIGCHLD was ignored.
        used = _used_by_children()
        if self._children is not None and used == self._children:
            return None if self._keep_output() else "the task closed its output"
        self._children = used
        alone = self._renew_output()
        return None if alone else "the task left a process that holds its output, or closed it"

    def _keep_output(self) -> bool:
        """Let descriptors 1 and 2 be the log again, whatever the task has made of them."""
        if self.log is None:
            return True
        try:
            for standard in (1, 2):
                os.get_inheritable(standard)  # raises if it is closed
                os.dup2(self.log_file, standard)
        except OSError:
            return False
        return True

    def _renew_output(self) -> bool:
        """Write to the log through a new description of the file; False if another process still
        holds the old one, which its lock tells (a child that the task left, even if orphaned)."""
        if self.log is None:
            return True
        try:
            if self.log_file >= 0:
                os.close(self.log_file)
            self.log_file = _redirect_output(self.log)
            return _locked(self.log_file)
        except OSError:
            return False


def _no_breakpoint(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(
        "breakpoint() in a worker process, which has no terminal: run the DAG with dag.test(), in "
        "one process, to debug it"
    )


def _has_living_child() -> bool:
    if not hasattr(os, "waitpid") or _WINDOWS:
        return False
    try:
        while True:
            # Zombies are reaped: the task that could have waited for them has ended.
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return True
    except ChildProcessError:
        return False


def _find_all(run: _WorkerRun, references: Sequence[tuple[str, str, bool]]) -> tuple[Any, ...]:
    """Which of the tasks can't be found here, and which only by their function's name."""
    missing, named = [], []
    for task_id, function, by_name in references:
        try:
            if run.find(task_id, function, by_name).dag is not run._found:
                named.append(task_id)
                run._tasks.pop(task_id)  # found again, with its settings, by its first job
        except UnreachableTask:
            missing.append(task_id)
    return ("found", missing, named)


def _put_message(path: str, message: tuple[Any, ...]) -> None:
    """Write a message that is too large for the pipe; an outcome's values, which may be huge, as
    they are behind it."""
    values = []
    if message[0] == "done":
        values = [row[-1] for row in message[3]]
        rows = [(*row[:-1], len(row[-1])) for row in message[3]]
        message = (*message[:3], rows, *message[4:])
    with open(path, "wb") as file:
        marshal.dump(message, file)
        for value in values:
            file.write(value)


def _take_message(path: str) -> tuple[Any, ...]:
    """Read such a message, and delete its file."""
    with open(path, "rb") as file:
        message: tuple[Any, ...] = marshal.load(file)
        if message[0] == "done":
            rows = [(*row[:-1], file.read(row[-1])) for row in message[3]]
            message = (*message[:3], rows, *message[4:])
    os.unlink(path)
    return message


def _redirect_output(path: str) -> int:
    """Let descriptors 1 and 2 write to the slot's log, children's and C code's output included.

    Returns a third that is the same. Raises OSError.
    """
    log = os.open(path, os.O_RDWR | os.O_APPEND)
    if log <= 2:
        raise OSError("a standard descriptor is closed")
    os.dup2(log, 1)
    os.dup2(log, 2)
    return log


def _locked(descriptor: int) -> bool:
    """Lock the open file; False if another description of it is locked still: each is, by its
    worker, and the lock goes when the last copy of its descriptor is closed."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return True
    except BlockingIOError:
        return False
    return True


_WATCHED_SIGNALS = [
    getattr(signal, name)
    for name in "SIGINT SIGTERM SIGALRM SIGCHLD SIGHUP SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 SIGPROF "
    "SIGVTALRM".split()
    if hasattr(signal, name)
]
# Without the enums of the `signal` module around it, which cost more than the question itself.
_getsignal = getattr(sys.modules.get("_signal"), "getsignal", signal.getsignal)


def _used_by_children() -> Any:
    """What the children that were waited for have used: no two counts of it are the same."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_CHILDREN)


def _resource_limits() -> list[tuple[int, int]]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    return [
        resource.getrlimit(limit)
        for limit in (
            resource.RLIMIT_AS,
            resource.RLIMIT_DATA,
            resource.RLIMIT_NOFILE,
            resource.RLIMIT_FSIZE,
            resource.RLIMIT_CPU,
        )
    ]


def _log_to_stderr() -> None:
    """Where nothing else is set up, show INFO and above with times, as people expect."""
    if not logging.root.handlers:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )


def _die_with_parent() -> None:
    """Let the kernel kill this process's group as soon as the scheduler is gone.

    `parent_process().sentinel` reads end-of-file when the scheduler dies, however it dies. With
    O_ASYNC that raises a signal; with F_SETSIG it is SIGKILL, which needs no thread of ours to
    run (one waits for seconds behind C code that keeps the GIL, for ever in a stopped process).
    Elsewhere than on Linux a thread has to do.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return
    try:
        import fcntl

        set_signal = fcntl.F_SETSIG  # type: ignore[attr-defined, unused-ignore]
    except (ImportError, AttributeError):
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
        return
    sentinel = parent.sentinel
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, set_signal, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it died before the kernel was told to watch
        os._exit(1)


def _watch_parent(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _call_elsewhere(
    run: _WorkerRun, message: tuple[Any, ...], name: str, reason: str | None, of: Any
) -> None:
    """Callbacks whose task's own worker is gone; `of`: another run's facts, if it is not this."""
    if of is not None:
        other = _WorkerRun({**run.info, **of}, run._found)
        other._shell = run._shell
        run = other
    _call_back_at_end(_Job(run, ("call", "", *message)), name, reason)


_worker: _Worker | None = None


def _start_worker(
    connection: Connection,
    tokens: Connection | None,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    """Runs in the worker process first of all (the executor's initializer)."""
    global _worker
    _worker = _Worker(connection, tokens)
    _worker.prepare()
    try:
        if initializer is not None:
            initializer(*initargs)
    except BaseException as error:  # the user's function may raise anything: told, and raised again
        _worker._send(("failed", _traceback(error)))
        raise


def _serve() -> None:
    """Runs in the worker process: the one call that a slot's executor makes."""
    assert _worker is not None
    try:
        _worker.serve()
    except BaseException as error:  # anything: the executor would keep it, and the pipe open
        with contextlib.suppress(OSError):
            os.write(2, f"liteflow: {_traceback(error)}\n".encode())
        os._exit(70)


_remote_runs: dict[str, _WorkerRun] = {}


def _run_remotely(token: str, info: bytes, message: bytes) -> bytes:
    """Runs wherever a foreign executor runs it: a job as a slot's worker would answer it."""
    run = _remote_runs.get(token)
    if run is None:
        run = _remote_runs[token] = _WorkerRun(marshal.loads(info))
        while len(_remote_runs) > 50:
            del _remote_runs[next(iter(_remote_runs))]
    run.import_dag()
    job = marshal.loads(message)
    if job[0] == "find":
        return marshal.dumps(_find_all(run, job[2]))
    if job[0] == "call":
        _call_elsewhere(run, *job[2:])
        return marshal.dumps(("called", None))
    outcome = _run_job(_Job(run, job), contextlib.nullcontext)
    return marshal.dumps(("done", *outcome, False))


# --- Runners: slots of worker processes -----------------------------------------------------------

_START_LIMIT = 120.0  # seconds for a worker to start and import the DAG's module
_CALLBACK_LIMIT = 60.0  # seconds that callbacks may take
_GRACE = 5.0  # seconds from TERM to KILL
_LOG_HEAD = _LOG_TAIL = 512 * 1024  # bytes of an attempt's output that are stored, from each end
_AHEAD = 8  # quick jobs that are sent to a worker while another runs there
_PATIENCE = 0.01  # seconds that they wait there; then another worker may have them
_LOG_FILE_LIMIT = 64 * 1024 * 1024  # bytes at which a slot's log file is cut
_TAIL_PART = 1_000_000  # the number of the part that holds a long log's end, written anew


class _Outcome(NamedTuple):
    """How an attempt ended, as its runner reports it.

    `terminated`: it was told to end; `unasked`: by somebody else than its runner. `began` (if it
    had been sent ahead) and `ended`: when, by the worker, in seconds of time.time().
    """

    status: _Status
    error: str | None
    xcoms: Sequence[_XComRow]
    terminated: bool = False
    unasked: bool = False
    note: Mapping[str, Any] = {}  # what the plan must know of the result
    began: float | None = None
    ended: float | None = None


# Of an attempt that was sent ahead and has not started: by identity.
_WITHDRAWN = _Outcome(_Status.SKIPPED, "withdrawn", ())


class _Place(Protocol):
    """Where one job can be started."""

    @property
    def pid(self) -> int | None: ...


class _Runner(Protocol):
    """What the run loop knows of where tasks run: start a job, wait for outcomes, end a job."""

    remote: bool  # jobs carry all their inputs: there is no database where they run

    def launch(self) -> None:
        """Begin to start what workers are started by, without waiting for it."""

    def begin(
        self,
        info: dict[str, Any],
        references: list[tuple[str, str, bool]],
        jobs: int,
        check: Callable[[], None],
    ) -> set[str]:
        """Find every task; the ids of those found by their function's name. Writes nothing.

        Begins to start workers for so many jobs.

        Calls `check`, which may raise, while it waits. Raises UnreachableTask for what can't be
        found.
        """

    def open_logs(self, folder: Path, run_row: int) -> None:
        """The run's private folder, for output and large values, is there."""

    def want(self, jobs: int) -> None:
        """So many jobs could be started now."""

    def claim(self, ahead: bool = False) -> _Place | None:
        """A place to start a job at, if there is one now; with `ahead` perhaps one where another
        runs, which is quick: `wait` tells if it is withdrawn, since it could not start soon."""

    def start(self, place: Any, attempt: _Attempt, message: tuple[Any, ...]) -> None:
        """Send the job, by the next `wait` at the latest."""

    def flush(self) -> None:
        """Let the jobs go that were started."""

    def wait(self, timeout: float | None) -> list[tuple[_Attempt, _Outcome]]:
        """Wait until something happens or `wake` is called; the attempts that ended."""

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        """End a running job: ask it to, and kill it after the grace (at once if `now`)."""

    def output(self) -> list[tuple[_Attempt, int, str]]:
        """New output of attempts: (attempt, part, text)."""

    def final_output(self) -> list[tuple[_Attempt, int, str]]:
        """What attempts that ended printed last."""

    def call_back(self, attempt: _Attempt, name: str | None, reason: str | None) -> bool:
        """The outcome is committed: let the worker that still holds the attempt run the callbacks
        of this name, if any. False if there is none that does."""

    def start_call(self, place: Any, attempt: _Attempt, call: tuple[Any, ...]) -> None:
        """Run callbacks where no attempt of theirs is held: (message, name, reason, of)."""

    def is_calling(self) -> bool:
        """Whether callbacks are running."""

    def is_talkative(self) -> bool:
        """Whether an attempt prints so much that its log should be cut now."""

    def wake(self) -> None:
        """Let `wait` return; may be called from a signal handler or another thread."""

    def close(self) -> None:
        """Free all that the run used."""


class _Context:
    """A start method's context whose `Process` remembers the process that it made."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.process: Any = None

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["name"] = f"{_WORKER_MARK}{os.urandom(4).hex()}"
        self.process = self._context.Process(*args, **kwargs)
        return self.process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _SlotLog:
    """The file that a slot's worker writes its output to, read in slices of one attempt each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o600)
        self._start = 0  # of the attempt's slice in the file
        self._read = 0  # bytes of the slice that are stored, or passed over
        self._dropped = 0  # bytes of the slice that were cut out of the file
        self._head = 0
        self._parts = 0

    @property
    def parts(self) -> int:
        """How many parts of the attempt's output were taken."""
        return self._parts

    @property
    def is_long(self) -> bool:
        """Whether the file is to be cut before the next attempt."""
        return self._start > _LOG_HEAD

    def pass_over(self, end: int) -> None:
        """The attempt's slice ended there, and the next begins."""
        self._start = end
        self._read = self._dropped = self._head = self._parts = 0

    def is_untouched(self) -> bool:
        """Whether nothing of the attempt's output was taken."""
        return not (self._read or self._dropped or self._parts)

    def begin(self, parts: int = 0) -> None:
        """A new attempt starts: its slice begins where the file ends."""
        self._start = os.fstat(self._file).st_size
        if self._start > _LOG_HEAD:
            self._cut()
            self._start = 0
        self._read = self._dropped = self._head = 0
        self._parts = parts

    def is_large(self) -> bool:
        """Whether the file should be cut."""
        return os.fstat(self._file).st_size > _LOG_FILE_LIMIT

    def take(self, final: bool, end: int | None = None) -> list[tuple[int, str]]:
        """(part, text) of new output; whole lines, unless it is the end of the attempt, which is
        at `end`, where the next one's begins, or at that of the file."""
        size = os.fstat(self._file).st_size if end is None else end
        if size < self._start + self._read:  # the task truncated the file
            if size < self._start:
                self._start = 0
            self._read = min(self._read, size - self._start)
        if size == self._start + self._read and not self._dropped:
            return []
        parts = []
        while self._head < _LOG_HEAD and (text := self._next_of_head(size, final)):
            self._parts += 1
            parts.append((self._parts, text))
        if self._head >= _LOG_HEAD and size > self._start + self._read:
            parts.append((_TAIL_PART, self._tail(size)))
        return parts

    def _next_of_head(self, size: int, final: bool) -> str:
        at = self._start + self._read
        room = min(size - at, _LOG_HEAD - self._head)
        data = self._bytes(at, room)
        if not final and len(data) == room and room < _LOG_HEAD - self._head:
            data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        self._head += len(data)
        return data.decode(errors="replace")

    def _tail(self, size: int) -> str:
        at = max(self._start + self._read, size - _LOG_TAIL)
        cut = at - self._start - self._read + self._dropped
        text = self._bytes(at, size - at).decode(errors="replace")
        if size - self._start > _LOG_FILE_LIMIT:
            self._cut()
            self._dropped += size - self._start - self._read
            self._start = self._read = 0
        return f"\n[... {cut:,} bytes cut ...]\n{text}" if cut else text

    def _bytes(self, at: int, count: int) -> bytes:
        os.lseek(self._file, at, os.SEEK_SET)
        return os.read(self._file, count)

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)


class _Slot:
    """One worker process, which serves one pipe and runs one job at a time.

    It is `starting` until its worker reports, `idle` or `busy` afterwards, `claimed` for a job
    that is being recorded, `asked` while it answers something else than a job, `held` after one
    whose callbacks wait for its commit, `calling` while they run, `dead` at the end.

    While its jobs are quick, some more are sent ahead, so that it need not wait for us between
    two. Each comes with a token, a byte in a second pipe, which the worker takes when it starts
    the job. Both can read that pipe, and a byte goes to one of them only: the tokens that we take
    back are those of the last jobs in the queue, which now never start. So at any moment, the
    worker's death included, it is certain which jobs have started. The worker drops what has no
    token; so that it can't take another job's, none is sent ahead again until it has: until the
    outcome of a job that was sent in order after the withdrawal.
    """

    def __init__(
        self,
        context: Any,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
    ) -> None:
        self.state = "starting"
        self.begun: set[str] = set()  # tokens of the runs whose DAG it has imported
        self.queue: collections.deque[tuple[_Attempt, int]] = collections.deque()  # with its bytes
        self.served = False  # it has begun for some run
        self.promised = 0  # places claimed behind the queue
        self.barred = False  # nothing may be sent ahead, since some were withdrawn ...
        self.clears = False  # ... until the job that runs, which was sent since then, has ended
        self.quick = False  # the last job was
        self.outbox: list[bytes] = []  # jobs on their way
        self._tokens_due = b""
        self.news = 0.0  # when the last job began or ended
        self.follows = False  # the job that runs was sent ahead of the end of another
        self.held: _Attempt | None = None  # ended, and its callbacks have not run
        self.log: _SlotLog | None = None
        self.logs_for = ""  # token of the run that it writes its output for
        self.deadline: float | None = time.monotonic() + _START_LIMIT
        self.reason: str | None = None  # why its job is being ended
        self.spoilt: str | None = None  # why it must not get another job
        self.answer: tuple[Any, ...] | None = None
        self.exitcode: int | None = None
        self.unstarted: list[_Attempt] = []  # at its death
        self.born = time.monotonic()
        self._start(context, initializer, initargs)

    def _start(
        self,
        context: Any,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
    ) -> None:
        from concurrent.futures import ProcessPoolExecutor

        theirs = self._open_pipes(context)
        self.process: Any = None
        self.pidfd: int | None = None
        _live_slots.add(self)
        remembering = _Context(context)
        made: Any = remembering  # a context to all who use it, but not to a type checker
        self._executor = ProcessPoolExecutor(
            1,
            made,
            initializer=_start_worker,
            initargs=(*theirs, initializer, initargs),
        )
        try:
            with _may_have_children(), _no_fork_warning(context):
                served: Future[None] = self._executor.submit(_serve)
        except BaseException:  # whatever it is: cleaned up after, and raised again
            self._close_pipes()
            self._executor.shutdown(wait=False)
            raise
        finally:
            for end in theirs:
                if end is not None:
                    end.close()  # so that the worker's death is the end of the pipe
        served.add_done_callback(lambda future: future.exception())
        # A first shutdown(wait=False) forgets it, and then there is no other way to wait for it.
        self._executor_thread = getattr(self._executor, "_executor_manager_thread", None)
        self.process = remembering.process
        self.pid: int = self.process.pid
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.pidfd = os.pidfd_open(self.pid)

    def _open_pipes(self, context: Any) -> tuple[Connection, Connection | None]:
        """The worker's ends: for messages, and for tokens."""
        ours, theirs = context.Pipe()
        self.connection: Connection = ours
        self._inbox = _Inbox(ours)
        self._tokens: Connection | None = None  # where both read, and where we write
        self._give_token: Connection | None = None
        if _WINDOWS:
            return theirs, None
        self._tokens, self._give_token = tokens, _ = context.Pipe(duplex=False)
        os.set_blocking(tokens.fileno(), False)
        # An object of its own: a forked worker closes those of ours.
        return theirs, type(tokens)(os.dup(tokens.fileno()), writable=False)

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message of at most _MESSAGE_LIMIT bytes; a dead worker is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(marshal.dumps(message))

    @property
    def attempt(self) -> _Attempt | None:
        """The attempt that runs, the first of the queue."""
        return self.queue[0][0] if self.queue else None

    def takes_more(self) -> bool:
        """Whether one more job may be sent ahead."""
        if self.state != "busy" or not self.quick or self.barred or self._tokens is None:
            return False
        if self.reason is not None or self.spoilt is not None:
            return False
        if time.monotonic() > self.news + _PATIENCE:
            return False
        if len(self.queue) + self.promised > _AHEAD or self.log is None or self.log.is_long:
            return False
        # Its end must not come when the next runs: neither callbacks, nor a timeout's signal.
        last = self.queue[-1][0].instance.node
        return not last.holds and last.task.execution_timeout is None

    def send_job(self, folder: Path, attempt: _Attempt, message: tuple[Any, ...]) -> bool:
        """Send a job, through a file if it is too large for the pipe. False if it can't go ahead
        of the end of the one that runs."""
        ahead = bool(self.queue)
        data = marshal.dumps(("ahead" if ahead else "run", *message))
        if ahead and sum(size for _, size in self.queue) + len(data) > _MESSAGE_LIMIT:
            return False
        if len(data) > _MESSAGE_LIMIT:
            path = str(folder / f"job-{self.pid}")
            _put_message(path, ("run", *message))
            data = marshal.dumps(("file", path))
        self.outbox.append(data)
        self._tokens_due += b"!" * ahead
        self.queue.append((attempt, len(data)))
        return True

    def flush(self) -> None:
        """Let the jobs go: each one's token first, without which the worker would drop it."""
        jobs, self.outbox = self.outbox, []
        tokens, self._tokens_due = self._tokens_due, b""
        with contextlib.suppress(OSError):
            if tokens and self._give_token is not None:
                os.write(self._give_token.fileno(), tokens)
            if _WINDOWS or len(jobs) == 1:
                for data in jobs:
                    self.connection.send_bytes(data)
                return
            left = memoryview(b"".join(map(_framed, jobs)))
            while left:
                left = left[os.write(self.connection.fileno(), left) :]

    def withdraw(self) -> list[_Attempt]:
        """Take back the tokens of the jobs that have not started; those jobs' attempts."""
        self.flush()
        self.barred, self.clears = True, False
        taken = b""
        if self._tokens is not None:
            with contextlib.suppress(BlockingIOError):
                taken = os.read(self._tokens.fileno(), 2 * _AHEAD)
        return [self.queue.pop()[0] for _ in taken][::-1]

    def receive(self, ready: bool = False) -> list[tuple[Any, ...]]:
        """The messages that are there; state `dead` once there can't be more. `ready`: the pipe
        is known to be readable.

        Never waits: a stopped worker may leave half a message, and a child that the task left
        keeps the pipe open.
        """
        messages: list[tuple[Any, ...]] = []
        try:
            while ready or self._inbox.is_there():
                ready = False
                found = self._inbox.fill()
                if not found:
                    self.state = "dead"
                    break
                if found < _MESSAGE_LIMIT and not _WINDOWS:
                    break
            while (message := self._inbox.take()) is not None:
                messages.append(message)
        except (OSError, ValueError, EOFError, TypeError):  # broken, or no message of ours
            self.state = "dead"
        return messages

    def signal_group(self, number: int, session: bool = True) -> None:
        """Signal the worker and its children (it leads their group, once it has started); also
        those of its `session` that have left the group, which takes a look at all processes."""
        if hasattr(os, "killpg"):
            log = None if self.log is None else os.path.realpath(self.log.path)
            for pid in _others_in_session(self.pid, log) if session else ():
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
                return
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self.process.kill() if number != signal.SIGTERM else self.process.terminate()

    def ask_to_end(self, reason: str) -> None:
        """TERM to the group now, KILL after the grace."""
        if self.reason is None:
            self.reason = reason
            self.deadline = time.monotonic() + _GRACE
            self.signal_group(signal.SIGTERM)

    def has_ended(self, timeout: float = 0) -> bool:
        """Whether the worker process is gone (its children may not be)."""
        from multiprocessing.connection import wait

        return bool(wait([self.process.sentinel if self.pidfd is None else self.pidfd], timeout))

    def bury(self, session: bool = True) -> None:
        """Kill what is left of the group, and free all that the slot holds."""
        self.state = "dead"
        self.signal_group(_SIGKILL, session)
        self.connection.close()
        self._executor.shutdown(wait=False)
        if self._executor_thread is not None:
            self._executor_thread.join()
        # Only now is the exit code to be relied on: the executor's thread reads it as well.
        self.exitcode = self.process.exitcode
        self.unstarted = self.withdraw()
        self._free()

    def dismiss(self) -> None:
        """Tell an idle worker that there is no more to do; `close` waits for its end."""
        self.state = "dead"
        self.connection.close()
        self._executor.shutdown(wait=False)

    def close(self) -> None:
        """End an idle worker in order, and whatever it left by force."""
        self.dismiss()
        # An idle one has been looked at after its last task: that has left nothing behind.
        self.bury(session=not self.has_ended(timeout=2.0))

    def _close_pipes(self) -> None:
        for end in (self.connection, self._tokens, self._give_token):
            if end is not None:
                end.close()

    def _free(self) -> None:
        self._close_pipes()
        _live_slots.discard(self)
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self.log is not None:
            self.log.close()
            self.log = None

    def close_in_child(self) -> None:
        """In a process that the host forked: let go of what tells the worker that we live."""
        self.state = "dead"
        self._close_pipes()
        if self.process is None:
            return
        # Or multiprocessing polls it there, and takes the exit code that the parent waits for.
        from multiprocessing import process

        getattr(process, "_children", set()).discard(self.process)
        finalizer = getattr(getattr(self.process, "_popen", None), "finalizer", None)
        for descriptor in getattr(finalizer, "_args", None) or ():
            with contextlib.suppress(OSError):
                if descriptor != self.process.sentinel:
                    os.close(descriptor)


def _others_in_session(leader: int, log: str | None) -> list[int]:
    """Processes of the worker's session that have left its group (`timeout` and shells do that),
    and those that hold its output."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(name)
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                inside = int(fields[3]) == leader and int(fields[2]) != leader
                if inside or (log is not None and _writes_to(pid, log)):
                    found.append(pid)
    return found


def _writes_to(pid: int, log: str) -> bool:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == log:
                return True
    return False


_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_live_slots: weakref.WeakSet[_Slot] = weakref.WeakSet()


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed (a daemon's may be), a pipe to a worker would get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@functools.cache
def _set_up_slots() -> None:
    """Once, when the first slot is made: see to forks of the host and to the interpreter's end."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go_of_slots)
    # concurrent.futures joins its threads before `atexit` runs; this comes before that.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        import concurrent.futures.process  # noqa: F401 - it registers first, so that it runs last

        register(_close_pools)


def _let_go_of_slots() -> None:
    for slot in list(_live_slots):
        slot.close_in_child()
    _live_slots.clear()
    for pool in list(_open_pools):
        pool._empty()
    _open_pools.clear()


@contextlib.contextmanager
def _may_have_children() -> Iterator[None]:
    """Let a daemonic process (a multiprocessing.Pool's worker, say) start workers all the same.

    multiprocessing forbids it since they would outlive a killed parent; ours do not.
    """
    import multiprocessing

    config = getattr(multiprocessing.current_process(), "_config", {})
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


@contextlib.contextmanager
def _no_fork_warning(context: Any) -> Iterator[None]:
    """No DeprecationWarning where fork was the only way, or asked for."""
    if context.get_start_method() != "fork":
        yield
        return
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _start_context(asked: Any) -> Any:
    """The multiprocessing context: the one asked for, else forkserver where it exists, else spawn.

    Raises ValueError for an unknown start method.
    """
    import multiprocessing

    if asked is not None and not isinstance(asked, str):
        return asked
    known = multiprocessing.get_all_start_methods()
    if asked is not None:
        if asked not in known:
            raise ValueError(f"mp_context must be one of {known} or a context, found {asked!r}")
        return multiprocessing.get_context(asked)
    if "forkserver" in known and _start_forkserver():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _start_forkserver() -> bool:
    """Begin to start the fork server (it is up in 40 ms); False if this process can't have one."""
    from multiprocessing import forkserver

    try:
        forkserver.ensure_running()
    except ChildProcessError:  # this process was forked from one that has a fork server
        return False
    return True


def _cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


# --- Runners: the pool ----------------------------------------------------------------------------


class WorkerPool:
    """Worker processes that stay warm between runs, and may serve several runs at once.

    Use it as a context manager: `with WorkerPool(4) as pool: dag.run(executor=pool)`. Each worker
    runs one task at a time; runs that share the pool take turns. `max_workers` is the number of
    CPUs this process may use unless given; `mp_context` a start method or a multiprocessing
    context (forkserver where it exists, else spawn); `initializer(*initargs)` runs in each worker
    before any DAG's module is imported. Workers start when they are needed.

    Raises TypeError or ValueError for a wrong argument.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: multiprocessing.context.BaseContext | str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        checked = _whole(1)("max_workers", max_workers)
        self.max_workers: int = min(checked or _cpus(), 61 if _WINDOWS else 1000)
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, found {_shown(initializer)}")
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._asked = mp_context
        if isinstance(mp_context, str):
            _start_context(mp_context)
        self._closed = False
        self._empty()

    def _empty(self) -> None:
        """No workers: so it begins, and so it is in a process that was forked from its own."""
        self._lock = threading.Lock()
        self._idle: list[_Slot] = []
        self._count = 0
        self._runners: list[_SlotRunner] = []
        self._waiting: collections.deque[_SlotRunner] = collections.deque()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """End all workers. Runs that still use the pool fail."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            runners = list(self._runners)
        _open_pools.discard(self)
        for runner in runners:
            runner.wake()
        _close_all(idle)

    def _lend(self, runner: _SlotRunner, context: Any) -> _Slot | None:
        """A slot for the runner, or None: it stands in line, and the others are told."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the WorkerPool is shut down")
            first = not self._waiting or self._waiting[0] is runner
            for slot in [slot for slot in self._idle if slot.has_ended()]:
                self._idle.remove(slot)  # killed while nobody looked: another takes its place
                self._count -= 1
                slot.bury()
            if first and self._idle:
                self._leave_line(runner)
                return self._idle.pop()
            if not first or self._count >= self.max_workers:
                if runner not in self._waiting:
                    self._waiting.append(runner)
                holders = [other for other in self._runners if other is not runner]
            else:
                self._leave_line(runner)
                self._count += 1
                holders = None
        if holders is not None:
            for holder in holders:
                holder.wake()
            return None
        try:
            return self._make(context)
        except BaseException:  # whatever it is: cleaned up after, and raised again
            with self._lock:
                self._count -= 1
            raise

    def _make(self, context: Any) -> _Slot:
        _set_up_slots()
        _open_pools.add(self)
        return _Slot(context, self._initializer, self._initargs)

    def _leave_line(self, runner: _SlotRunner) -> None:
        with contextlib.suppress(ValueError):
            self._waiting.remove(runner)

    def _is_wanted(self, runner: _SlotRunner) -> bool:
        """Whether another run waits for a slot that this one holds."""
        return any(other is not runner for other in self._waiting)

    def _give_back(self, slot: _Slot) -> None:
        """A slot that is free for any run, or dead."""
        keep = slot.state == "idle"
        with self._lock:
            keep = keep and not self._closed
            if keep:
                self._idle.append(slot)
            else:
                self._count -= 1
            first = self._waiting[0] if self._waiting else None
        if not keep and slot.state != "dead":
            slot.close()
        if first is not None:
            first.wake()

    def _join(self, runner: _SlotRunner) -> None:
        with self._lock:
            self._runners.append(runner)

    def _leave(self, runner: _SlotRunner) -> None:
        with self._lock:
            self._leave_line(runner)
            with contextlib.suppress(ValueError):
                self._runners.remove(runner)
            first = self._waiting[0] if self._waiting else None
        if first is not None:
            first.wake()


_open_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _close_pools() -> None:
    """At the interpreter's end, which waits for threads that are no daemons, and their runs."""
    for pool in list(_open_pools):
        for runner in list(pool._runners):
            if not runner.thread.daemon and runner.thread is not threading.main_thread():
                runner.thread.join()
        pool.shutdown()


def _close_all(slots: Iterable[_Slot]) -> None:
    """Close idle slots; their workers end side by side."""
    slots = list(slots)
    for slot in slots:
        slot.dismiss()
    for slot in slots:
        slot.close()


# --- Runners: jobs in slots -----------------------------------------------------------------------


class _Behind(NamedTuple):
    """A place behind the job that runs in a slot."""

    slot: _Slot

    @property
    def pid(self) -> int:
        """The worker's."""
        return self.slot.pid


class _SlotRunner:
    """Runs jobs in the slots of a WorkerPool, and ends those that outlive their timeout."""

    remote = False

    def __init__(self, pool: WorkerPool, own_pool: bool, interactive: bool) -> None:
        import multiprocessing
        import selectors

        self.token = os.urandom(8).hex()
        self.thread = threading.current_thread()
        self._pool = pool
        self._own_pool = own_pool
        self._interactive = interactive
        self._born = time.monotonic()
        self._held: list[_Slot] = []
        self._ended: list[tuple[_Attempt, _Outcome]] = []
        self._last_output: list[tuple[_Attempt, int, str]] = []
        self._failed_starts = 0
        self._found_all = False  # `begin` is over: idle slots may go to other runs
        self.notes: list[str] = []  # what people should be told at the end
        self._info: dict[str, Any] = {}
        self._folder: Path | None = None
        self._run_row = 0
        self._selector = None if _WINDOWS else selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = multiprocessing.Pipe(duplex=False)
        self._awake = False
        self._cpus = _cpus()
        if self._selector is not None:
            self._selector.register(self._wake_reader.fileno(), 1, None)
        pool._join(self)

    def launch(self) -> None:
        """Begin to start the fork server, or whatever else starts workers."""
        _fill_standard_descriptors()
        self._context = self._choose_context()

    def _choose_context(self) -> Any:
        import multiprocessing

        if not self._interactive or self._pool._asked is not None:
            return _start_context(self._pool._asked)
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UnreachableTask(
                "tasks defined in a notebook, at a prompt or on standard input can't be imported "
                "by a worker process on this system: put the DAG in a file, or use dag.test()"
            )
        return multiprocessing.get_context("fork")

    def begin(
        self,
        info: dict[str, Any],
        references: list[tuple[str, str, bool]],
        jobs: int,
        check: Callable[[], None],
    ) -> set[str]:
        self._check = check
        while any(slot.state == "asked" for slot in self._held):  # about a run of another id
            self.wait(0.5)
        for slot in self._held:
            slot.begun.discard(self.token)
        self._info = info
        named: set[str] = set()
        missing: list[str] = []
        self._have_one()
        # Side by side, as each has to import the DAG's module.
        while len(self._held) < jobs and self._lend():
            pass
        for chunk in _chunks(references):
            _, chunk_missing, chunk_named = self._ask(("find", self.token, chunk))
            missing += chunk_missing
            named.update(chunk_named)
        if missing:
            raise UnreachableTask(_unreachable(missing, self._info["key"][0]))
        self._found_all = True
        return named

    def _have_one(self) -> None:
        while not self._held and not self._lend():
            self._check()
            self.wait(0.5)

    def _ask(self, question: tuple[Any, ...]) -> tuple[Any, ...]:
        """A worker's answer. One that was warm, and was killed while nobody looked, is replaced."""
        while True:
            self._have_one()
            slot = self._held[0]
            if not self._await(slot):
                continue
            if self.token not in slot.begun:
                self._begin_slot(slot)
                if not self._await(slot):
                    continue
            slot.state = "asked"
            slot.send(question)
            if self._await(slot):
                assert slot.answer is not None
                return slot.answer

    def _await(self, slot: _Slot) -> bool:
        """Wait until the worker is idle; False if a warm one is gone. What keeps a new one from
        it is raised."""
        while slot.state != "idle":
            if slot.state == "dead" or slot not in self._held:
                if slot.served:
                    return False
                raise UnreachableTask("no worker process could be started")
            self._check()
            self.wait(0.5)
        return slot in self._held

    def _begin_slot(self, slot: _Slot) -> None:
        slot.state = "asked"
        slot.deadline = time.monotonic() + _START_LIMIT
        slot.send(("begin", self.token, self._info))

    def open_logs(self, folder: Path, run_row: int) -> None:
        self._folder, self._run_row = folder, run_row

    def _lend(self) -> bool:
        if len(self._held) == self._pool.max_workers:
            return False
        try:
            slot = self._pool._lend(self, self._context)
        except OSError as error:
            if not self._held:
                raise UnreachableTask(f"no worker process could be started: {error}") from None
            return False  # those that there are go on
        if slot is not None and self._interactive and slot.born < self._born:
            slot.close()  # forked before the cell that defines the DAG was run
            self._pool._give_back(slot)
            slot = self._pool._lend(self, self._context)
        if slot is None:
            return False
        self._held.append(slot)
        if self._selector is not None:
            self._selector.register(slot.connection.fileno(), 1, (slot, True))
            ends = slot.process.sentinel if slot.pidfd is None else slot.pidfd
            self._selector.register(ends, 1, (slot, False))
        return True

    def _let_go(self, slot: _Slot) -> None:
        self._held.remove(slot)
        slot.promised = 0
        if self._selector is not None:
            self._selector.unregister(slot.connection.fileno())
            self._selector.unregister(slot.process.sentinel if slot.pidfd is None else slot.pidfd)

    def want(self, jobs: int) -> None:
        """Have as many slots as there are jobs, as far as the pool has them."""
        coming = sum(slot.state in ("idle", "starting", "asked") for slot in self._held)
        while coming < jobs and self._lend():
            coming += 1
        for slot in self._held:
            if slot.state == "idle" and self.token not in slot.begun:
                self._begin_slot(slot)

    def claim(self, ahead: bool = False) -> _Slot | _Behind | None:
        for slot in self._held:
            if slot.state == "idle" and self.token in slot.begun and slot.spoilt is None:
                slot.state = "claimed"
                return slot
        if not ahead or self._pool._is_wanted(self):
            return None
        able = [slot for slot in self._held if slot.takes_more()]
        if not able:
            return None
        slot = min(able, key=lambda slot: len(slot.queue) + slot.promised)
        slot.promised += 1
        return _Behind(slot)

    def start(self, place: _Slot | _Behind, attempt: _Attempt, message: tuple[Any, ...]) -> None:
        assert self._folder is not None
        if isinstance(place, _Behind):
            place = place.slot
            place.promised = max(0, place.promised - 1)
            if place not in self._held or not place.takes_more():  # since the claim
                self._ended.append((attempt, _WITHDRAWN))
                return
        elif place.state == "dead":  # it died between the claim and now; `wait` tells
            self._ended.append((attempt, self._lost(place)))
            return
        else:
            self._prepare_log(place, attempt)
            place.state, place.reason, place.clears = "busy", None, True
            place.deadline = None  # its time begins when the worker says that its function starts
            place.news = time.monotonic()
        try:
            sent = place.send_job(self._folder, attempt, (self.token, *message))
        except OSError as error:
            place.spoilt = f"the job could not be sent: {error}"
            place.queue.append((attempt, 0))
            self._end_job(place, _Outcome(_Status.FAILED, place.spoilt, []))
            self._lose(place)
            return
        if not sent:
            place.barred = True
            self._ended.append((attempt, _WITHDRAWN))

    def _prepare_log(self, slot: _Slot, attempt: _Attempt) -> None:
        """Let the slot's output from here be the attempt's."""
        assert self._folder is not None
        if slot.logs_for != self.token:
            try:
                self._open_log(slot, self._folder)
            except OSError as error:
                raise DatabaseError(f"{self._folder} can't be used: {error}") from None
        assert slot.log is not None
        slot.log.begin(attempt.log_parts)

    def _open_log(self, slot: _Slot, folder: Path) -> None:
        if slot.log is not None:
            slot.log.close()
        slot.log = _SlotLog(folder / f"log-{slot.pid}")
        slot.logs_for = self.token
        slot.send(("log", self.token, str(slot.log.path), self._run_row))

    def flush(self) -> None:
        for slot in self._held:
            if slot.outbox:
                slot.flush()

    def wait(self, timeout: float | None) -> list[tuple[_Attempt, _Outcome]]:
        self.flush()
        if not self._ended:
            for slot, at_pipe, at_end in self._select(self._until_deadline(timeout)):
                self._look_at(slot, at_pipe, at_end)
        now = time.monotonic()
        for slot in list(self._held):
            if slot.deadline is not None and slot.deadline <= now:
                self._overdue(slot)
            elif len(slot.queue) > 1 and slot.news + _PATIENCE < now:
                self._withdraw(slot)
        if self._pool._closed:
            raise RuntimeError("the WorkerPool was shut down during the run")
        # Not while `begin` is asking the first slot for its references.
        if self._found_all and self._pool._is_wanted(self):
            self._hand_over()
        ended, self._ended = self._ended, []
        return ended

    def _until_deadline(self, timeout: float | None) -> float | None:
        deadlines = []
        for slot in self._held:
            if slot.deadline is not None:
                deadlines.append(slot.deadline)
            if len(slot.queue) > 1:
                deadlines.append(slot.news + _PATIENCE)
            if slot.pidfd is None:
                timeout = min(1.0, timeout if timeout is not None else 1.0)
        if not deadlines:
            return timeout
        left = max(0.0, min(deadlines) - time.monotonic())
        return left if timeout is None else min(left, timeout)

    def _select(self, timeout: float | None) -> Iterable[tuple[_Slot, bool, bool]]:
        """The held slots at which something happened: at the pipe, at the worker's end."""
        found: dict[_Slot, list[bool]] = {}
        if self._may_linger():
            _linger(lambda: self._ready(0))
        for key in self._ready(timeout):
            if key is None:
                # In this order: a wake-up that comes between is either drained, and we look
                # around anyway, or sends a byte of its own.
                self._wake_reader.recv_bytes()
                self._awake = False
            else:
                slot, at_pipe = key
                found.setdefault(slot, [False, False])[not at_pipe] = True
        return [(slot, at_pipe, at_end) for slot, (at_pipe, at_end) in found.items()]

    def _may_linger(self) -> bool:
        """Whether an outcome will be here at once, and a CPU has nothing else to do meanwhile."""
        busy = [slot for slot in self._held if slot.state == "busy"]
        return 0 < len(busy) < self._cpus and any(slot.quick for slot in busy)

    def _ready(self, timeout: float | None) -> list[Any]:
        if self._selector is not None:
            return [key.data for key, _ in self._selector.select(timeout)]
        from multiprocessing.connection import wait

        owners: dict[Any, Any] = {self._wake_reader: None}
        for slot in self._held:
            owners[slot.connection] = (slot, True)
            owners[slot.process.sentinel] = (slot, False)
        return [owners[ready] for ready in wait(list(owners), timeout)]

    def _look_at(self, slot: _Slot, at_pipe: bool, at_end: bool) -> None:
        for message in slot.receive(ready=at_pipe):
            self._take(slot, message)
        if slot in self._held and at_end and slot.state != "dead":
            # The last words may have come between the two looks.
            for message in slot.receive():
                self._take(slot, message)
            slot.state = "dead"
        if slot in self._held and (slot.state == "dead" or self._is_spoilt(slot)):
            self._lose(slot)

    @staticmethod
    def _is_spoilt(slot: _Slot) -> bool:
        return slot.spoilt is not None and slot.state not in ("held", "calling")

    def _take(self, slot: _Slot, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "done":
            self._take_outcome(slot, *message[1:])
            return
        if kind == "started":
            if slot.attempt is not None and slot.reason is None:
                slot.deadline = time.monotonic() + _timeout_of(slot.attempt)
            return
        slot.deadline = None
        if kind == "failed":
            self._fail_start(slot, f"the pool's initializer failed in a worker:\n{message[1]}")
            return
        if kind == "called":
            if slot.held is not None and slot.log is not None:
                self._last_output += [(slot.held, *part) for part in slot.log.take(final=True)]
                slot.held.log_parts = slot.log.parts
            slot.held, slot.state = None, "idle"
            slot.spoilt = slot.spoilt or message[1]
            return
        if kind == "ready":
            self._begin_slot(slot)
        elif kind == "begun" and message[1] is not None:
            self._fail_start(slot, f"importing the DAG in a worker failed:\n{message[1]}")
        elif kind == "begun" and message[2] is not None and message[2] not in self.notes:
            self.notes.append(message[2])
            self._is_ready(slot, message)
        else:
            self._is_ready(slot, message)

    def _is_ready(self, slot: _Slot, message: tuple[Any, ...]) -> None:
        self._failed_starts = 0
        slot.served = True
        slot.begun.add(self.token)
        slot.answer, slot.state = message, "idle"

    def _take_outcome(
        self,
        slot: _Slot,
        status: str,
        error: str | None,
        xcoms: Sequence[tuple[Any, ...]],
        note: dict[str, Any],
        terminated: bool,
        spoilt: str | None,
        held: bool,
        start: float,
        took: float,
        end: int,
        output: bytes | None,
    ) -> None:
        if slot.attempt is None:
            return
        slot.quick, slot.news = took < _QUICK, time.monotonic()
        rows = [_XComRow(*row) for row in xcoms]
        began = start if slot.follows else None
        outcome = _Outcome(
            _STATUSES[status], error, rows, terminated, note=note, began=began, ended=start + took
        )
        if slot.reason is not None:
            # Told to end, it may catch that and return: it has failed all the same. Only what
            # had ended before it was told counts.
            if terminated or len(slot.queue) == 1:  # else the next runs, and is being ended
                slot.spoilt = slot.reason
            if terminated or outcome.status is not _Status.SUCCESS:
                text = f"{error}\n{slot.reason}" if error else slot.reason
                kept = [] if outcome.status is _Status.SUCCESS else rows
                outcome = _Outcome(_Status.FAILED, text, kept, True)
        elif spoilt is not None or terminated:
            slot.spoilt = spoilt or "it was told to end"
            outcome = outcome._replace(unasked=terminated and status != "success")
        attempt = slot.attempt
        self._end_job(slot, outcome, end, output)
        if slot.queue and (slot.spoilt is not None or output is None):
            self._withdraw(slot)  # the worker starts none of them
        if held:
            slot.held, slot.state = attempt, "held"

    def call_back(self, attempt: _Attempt, name: str | None, reason: str | None) -> bool:
        for slot in self._held:
            if slot.held is attempt and slot.state == "held":
                self._calling(slot, ("callback", name, reason))
                return True
        return False

    def start_call(self, place: _Slot, attempt: _Attempt, call: tuple[Any, ...]) -> None:
        self._prepare_log(place, attempt)
        place.held = attempt
        self._calling(place, ("call", self.token, *call))

    def _calling(self, slot: _Slot, message: tuple[Any, ...]) -> None:
        slot.state = "calling"
        slot.deadline = time.monotonic() + _CALLBACK_LIMIT
        slot.send(message)

    def is_calling(self) -> bool:
        return any(slot.state in ("held", "calling") for slot in self._held)

    def _end_job(
        self, slot: _Slot, outcome: _Outcome, end: int = 0, output: bytes | None = None
    ) -> None:
        """`output`: all of the job's, which ends there in the log; None: it is to be read."""
        attempt = slot.queue.popleft()[0]
        if slot.clears:
            slot.barred = slot.clears = False
        if slot.log is not None:
            if output is None or attempt.log_parts or not slot.log.is_untouched():
                until = end if slot.queue else None
                parts = slot.log.take(final=True, end=until)
                self._last_output += [(attempt, *part) for part in parts]
                attempt.log_parts = slot.log.parts
            elif output:
                attempt.log_parts = 1
                self._last_output.append((attempt, 1, output.decode(errors="replace")))
            if slot.queue:
                slot.log.pass_over(end)
        self._ended.append((attempt, outcome))
        slot.follows = bool(slot.queue)
        if slot.queue and slot.reason is not None:
            return  # the next is being ended, too
        slot.deadline = slot.reason = None
        if slot.state != "dead" and not slot.queue:
            slot.state = "idle"

    def _withdraw(self, slot: _Slot) -> None:
        self._ended += [(attempt, _WITHDRAWN) for attempt in slot.withdraw()]
        if not slot.queue and slot.state == "busy":
            slot.state = "idle"

    def _overdue(self, slot: _Slot) -> None:
        if slot.state in ("starting", "asked"):
            slot.signal_group(_SIGKILL)
            slot.deadline = None
            self._fail_start(slot, f"a worker did not start within {_START_LIMIT:g} s")
        elif slot.state == "calling":
            slot.deadline = None
            self.notes.append(f"a callback took more than {_CALLBACK_LIMIT:g} s and was ended")
            slot.signal_group(_SIGKILL)
        elif slot.reason is None:
            assert slot.attempt is not None
            slot.ask_to_end(f"timeout after {_timeout_of(slot.attempt):g} s")
        else:
            slot.deadline = None
            slot.signal_group(_SIGKILL)

    def _lose(self, slot: _Slot) -> None:
        """A slot's worker is dead, or must not go on."""
        starting = slot.state != "idle" and slot.attempt is None and slot.spoilt is None
        never_began = starting and not slot.served
        self._let_go(slot)
        self._withdraw(slot)
        attempt = slot.attempt
        if attempt is not None and slot.log is not None:
            slot.signal_group(_SIGKILL)  # so that nothing more is written to the log
            self._last_output += [(attempt, *part) for part in slot.log.take(final=True)]
        slot.bury()
        self._ended += [(each, _WITHDRAWN) for each in slot.unstarted]
        self._pool._give_back(slot)
        if slot.queue:
            self._ended += [(each, self._lost(slot)) for each, _ in slot.queue]
            slot.queue.clear()
        elif never_began or slot.exitcode == _UNGUARDED:
            self._fail_start(slot, f"a worker ended as it started: {_end_of(slot.exitcode)}")

    def _lost(self, slot: _Slot) -> _Outcome:
        if slot.reason is not None:
            return _Outcome(_Status.FAILED, slot.reason, [], True)
        told = slot.exitcode == -signal.SIGTERM
        return _Outcome(_Status.FAILED, _end_of(slot.exitcode), [], told, told)

    def _fail_start(self, slot: _Slot, why: str) -> None:
        """A worker could not start. One may fail; a first one, or several in a row, end the run."""
        if slot.exitcode == _UNGUARDED:
            raise UnreachableTask(
                "the script, or a module, starts a run while a worker imports it: put the call of "
                'run() or cli() below `if __name__ == "__main__":`, or into a function'
            )
        if slot in self._held:
            slot.spoilt = why
            slot.state = "dead"
            self._lose(slot)
        self._failed_starts += 1
        if self._folder is None or self._failed_starts >= 3 or not self._held:
            raise UnreachableTask(why)

    def _hand_over(self) -> None:
        """Another run waits: give back what is idle here."""
        for slot in list(self._held):
            if slot.state == "idle":
                self._let_go(slot)
                self._pool._give_back(slot)

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        for slot in self._held:
            if any(each is attempt for each, _ in slot.queue):
                self._withdraw(slot)
                if slot.queue:
                    slot.ask_to_end(reason)
                    if now:
                        slot.signal_group(_SIGKILL)

    def output(self) -> list[tuple[_Attempt, int, str]]:
        fresh, self._last_output = self._last_output, []
        for slot in self._held:
            attempt = slot.attempt or slot.held
            # Of quick jobs one may have ended, and the next begun, without our knowing it yet.
            if attempt is not None and slot.log is not None and len(slot.queue) < 2:
                fresh += [(attempt, *part) for part in slot.log.take(final=False)]
        return fresh

    def final_output(self) -> list[tuple[_Attempt, int, str]]:
        fresh, self._last_output = self._last_output, []
        return fresh

    def is_talkative(self) -> bool:
        return any(
            (slot.attempt or slot.held) and slot.log is not None and slot.log.is_large()
            for slot in self._held
        )

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                self._wake_writer.send_bytes(b"!")

    def close(self) -> None:
        held = list(self._held)
        for slot in held:
            self._let_go(slot)
        idle = [slot for slot in held if slot.state == "idle"]
        for slot in held:
            if slot.state != "idle":
                slot.bury()
                self._pool._give_back(slot)
        if self._own_pool:
            for slot in idle:
                self._pool._idle.append(slot)
            self._pool.shutdown()
        else:
            for slot in idle:
                slot.send(("end", self.token))
                slot.begun.discard(self.token)
                self._pool._give_back(slot)
        self._pool._leave(self)
        if self._selector is not None:
            self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()


def _timeout_of(attempt: _Attempt) -> float:
    """Seconds that an attempt may take."""
    limit = attempt.instance.node.task.execution_timeout
    return math.inf if limit is None else limit.total_seconds()


def _end_of(exitcode: int | None) -> str:
    """How a process ended, for people."""
    if exitcode is None:
        return "the worker was lost"
    if exitcode >= 0:
        return f"worker exited with code {exitcode} before reporting"
    try:
        return f"killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"killed by signal {-exitcode}"


def _chunks(items: list[Any], size: int = 300) -> Iterator[list[Any]]:
    for i in range(0, max(1, len(items)), size):
        yield items[i : i + size]


def _unreachable(missing: Sequence[str], module: str) -> str:
    few = ", ".join(repr(task_id) for task_id in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return (
        f"task{'s' if len(missing) > 1 else ''} {few}{more} can't be found in a worker process: "
        f"importing the module {module or 'of its function'!r} does not build the DAG, and its "
        "function is no plain function of a module. Build the DAG at the top level of its module, "
        'not below `if __name__ == "__main__":`, or define the functions there'
    )


# --- Runners: foreign executors, and this process -------------------------------------------------


class _ExecutorRunner:
    """Runs each job as one `submit` to a concurrent.futures.Executor that somebody else made.

    It can't end a task nor capture its output, and so applies no execution_timeout.
    """

    remote = True

    def __init__(self, executor: Executor) -> None:
        import queue

        self._executor = executor
        self._token = os.urandom(8).hex()
        self._done: queue.SimpleQueue[tuple[_Attempt, Future[bytes]] | None] = queue.SimpleQueue()
        self._info = b""
        self._futures: dict[_Attempt, Future[bytes]] = {}
        self._calls: dict[Future[bytes], float] = {}  # callbacks, and when to wait no longer
        self.notes: list[str] = []
        self._given_up: list[tuple[_Attempt, _Outcome]] = []

    @property
    def pid(self) -> int | None:
        return None

    def launch(self) -> None:
        pass

    def begin(
        self,
        info: dict[str, Any],
        references: list[tuple[str, str, bool]],
        jobs: int,
        check: Callable[[], None],
    ) -> set[str]:
        self._token = os.urandom(8).hex()  # what workers know by another is another run's
        self._info = marshal.dumps({**info, "db_path": None})
        message = marshal.dumps(("find", self._token, references))
        asked = self._executor.submit(_run_remotely, self._token, self._info, message)
        asked.add_done_callback(lambda future: self.wake())
        while not asked.done():
            check()
            self.wait(0.5)
        _, missing, named = marshal.loads(asked.result())
        if missing:
            if info["key"][0] == "__main__":
                raise UnreachableTask(
                    f"task {missing[0]!r} can't be found by the executor's workers, where "
                    "`__main__` is another program: import the DAG from a module that they have"
                )
            raise UnreachableTask(_unreachable(missing, info["key"][0]))
        return set(named)

    def open_logs(self, folder: Path, run_row: int) -> None:
        pass

    def want(self, jobs: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def claim(self, ahead: bool = False) -> _ExecutorRunner:
        return self

    def start(self, place: Any, attempt: _Attempt, message: tuple[Any, ...]) -> None:
        job = marshal.dumps(("run", self._token, *message))
        try:
            future = self._executor.submit(_run_remotely, self._token, self._info, job)
        except Exception as error:  # whatever the engine raises: broken, shut down
            why = f"the executor took no task: {_one_line(error)}"
            self._given_up.append((attempt, _Outcome(_Status.FAILED, why, [])))
            return
        self._futures[attempt] = future
        future.add_done_callback(lambda ended: self._done.put((attempt, ended)))

    def wait(self, timeout: float | None) -> list[tuple[_Attempt, _Outcome]]:
        import queue

        ended, self._given_up = self._given_up, []
        try:
            item = self._done.get(timeout=0 if ended else timeout)
            while True:
                if item is not None and self._futures.pop(item[0], None) is not None:
                    ended.append((item[0], _outcome_of(item[1])))
                item = self._done.get_nowait()
        except queue.Empty:
            return ended

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        future = self._futures.pop(attempt, None)
        if future is not None:
            future.cancel()
            self._given_up.append((attempt, _Outcome(_Status.FAILED, reason, [], True)))
            self.wake()

    def output(self) -> list[tuple[_Attempt, int, str]]:
        return []

    final_output = output

    def is_talkative(self) -> bool:
        return False

    def call_back(self, attempt: _Attempt, name: str | None, reason: str | None) -> bool:
        return name is None

    def start_call(self, place: Any, attempt: _Attempt, call: tuple[Any, ...]) -> None:
        job = marshal.dumps(("call", self._token, *call))
        with contextlib.suppress(Exception):  # whatever the engine raises: no callback, then
            future = self._executor.submit(_run_remotely, self._token, self._info, job)
            self._calls[future] = time.monotonic() + _CALLBACK_LIMIT
            future.add_done_callback(self._called)

    def _called(self, future: Future[bytes]) -> None:
        self._calls.pop(future, None)
        self.wake()

    def is_calling(self) -> bool:
        for future, limit in list(self._calls.items()):
            if limit < time.monotonic():  # it can't be ended, only waited for no longer
                future.cancel()
                self._calls.pop(future, None)
                self.notes.append(f"a callback took more than {_CALLBACK_LIMIT:g} s")
        return bool(self._calls)

    def wake(self) -> None:
        self._done.put(None)

    def close(self) -> None:
        _remote_runs.pop(self._token, None)


def _outcome_of(future: Future[bytes]) -> _Outcome:
    try:
        _, status, error, xcoms, note, terminated = marshal.loads(future.result())
    except BaseException as lost:  # whatever the engine, or unpickling on its way, raises
        return _Outcome(_Status.FAILED, f"the executor lost the task: {_one_line(lost)}", [])
    rows = [_XComRow(*row) for row in xcoms]
    return _Outcome(_Status(status), error, rows, terminated, note=note)


class _InProcessRunner:
    """Runs each job at once in this process: for `dag.test()` and a debugger."""

    remote = False

    def __init__(self, dag: Dag) -> None:
        self._dag = dag
        self._run: _WorkerRun | None = None
        self._ended: list[tuple[_Attempt, _Outcome]] = []
        self._woken = threading.Event()
        self.interrupted = False
        self._last: tuple[Any, Any] = (None, None)

    @property
    def pid(self) -> int | None:
        return os.getpid()

    def launch(self) -> None:
        pass

    def begin(
        self,
        info: dict[str, Any],
        references: list[tuple[str, str, bool]],
        jobs: int,
        check: Callable[[], None],
    ) -> set[str]:
        self._run = _WorkerRun(info, self._dag)
        return set()

    def open_logs(self, folder: Path, run_row: int) -> None:
        if self._run is not None:  # a DAG without tasks never began
            self._run.info["run_row"] = run_row

    def want(self, jobs: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def claim(self, ahead: bool = False) -> _InProcessRunner | None:
        return None if self._ended else self

    def start(self, place: Any, attempt: _Attempt, message: tuple[Any, ...]) -> None:
        assert self._run is not None
        job = _Job(self._run, ("run", "", *message))
        status, error, xcoms, note = _run_job(job, lambda: self._guard(job.timeout))
        rows = [_XComRow(*row) for row in xcoms]
        outcome = _Outcome(_Status(status), error, rows, self.interrupted, note=note)
        if error is not None:
            print(f"{job.task_id}: {error}", file=sys.stderr)
        self._last = (attempt, job)
        self._ended.append((attempt, outcome))

    @contextlib.contextmanager
    def _guard(self, timeout: float | None) -> Iterator[None]:
        """Raises AirflowTaskTimeout in the task, and notes a Ctrl-C that it did not outlive."""

        def on_alarm(signum: int, frame: object) -> None:
            raise AirflowTaskTimeout(f"timeout after {timeout:g} s")

        watched = (
            timeout is not None
            and hasattr(signal, "setitimer")
            and threading.current_thread() is threading.main_thread()
        )
        if watched:
            before = signal.signal(signal.SIGALRM, on_alarm)
            signal.setitimer(signal.ITIMER_REAL, timeout or 0)
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            raise
        finally:
            if watched:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    def wait(self, timeout: float | None) -> list[tuple[_Attempt, _Outcome]]:
        if not self._ended:
            self._woken.wait(timeout)
            self._woken.clear()
        ended, self._ended = self._ended, []
        return ended

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        pass

    def output(self) -> list[tuple[_Attempt, int, str]]:
        return []

    final_output = output

    def is_talkative(self) -> bool:
        return False

    def call_back(self, attempt: _Attempt, name: str | None, reason: str | None) -> bool:
        held, job = self._last
        if name is not None and held is attempt:
            _call_back_at_end(job, name, reason)
        return name is None or held is attempt

    def start_call(self, place: Any, attempt: _Attempt, call: tuple[Any, ...]) -> None:
        assert self._run is not None
        _call_elsewhere(self._run, *call)

    def is_calling(self) -> bool:
        return False

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        pass


# --- Run loop: owners and signals -----------------------------------------------------------------

_TICK = 1.0  # seconds between looks at new output and at a request to stop
_GLANCE = 0.2  # seconds between looks at the stop event, and for a log that grows without end
_BEAT = 10.0  # seconds between heartbeats
_TOGETHER = 1.0  # seconds within which a task's end and the run's stop belong together
_STALE = 60.0  # seconds after which the heartbeat of an owner elsewhere means that it is dead
_FRESH = 256  # small values that the run loop remembers
# Owner tokens of this process's runs: of all copies of this module in it, or one would take the
# runs of another, whose owner has the same pid, for dead.
_active_runs: set[str] = vars(sys).setdefault("_liteflow_runs", set())


def _process_start(pid: object) -> str | None:
    """When a process started, so that a reused pid is not taken for it; None if it is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


@functools.cache
def _machine() -> dict[str, Any]:
    """What says that another process's id means something here: host, boot and pid namespace."""
    import platform

    found: dict[str, Any] = {"host": platform.node(), "boot": None, "namespace": None}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
    return found


def _this_process() -> str:
    pid = os.getpid()
    return json.dumps({**_machine(), "pid": pid, "start": _process_start(pid)})


def _owner_lives(process: str | None, owner: str | None, heartbeat: str | None) -> bool:
    """Whether a run's owner is alive: by the process table if it is this machine's, else by its
    heartbeat."""
    found = _plain(process, dict)
    if _is_of_this_machine(found):
        if found.get("pid") == os.getpid():
            return owner in _active_runs
        return _process_start(found.get("pid")) == found.get("start")
    beat = _moment(heartbeat)
    return beat is not None and (_utcnow() - beat).total_seconds() < _STALE


def _whose(row: _RunRow) -> str:
    """A live run's owner, for a refusal."""
    found = _plain(row.owner_process, dict)
    said = f"pid {found.get('pid')} on {found.get('host')}, since {row.start_date}"
    beat = _moment(row.heartbeat)
    if beat is None or _is_of_this_machine(found):
        return said
    stale = beat + _datetime.timedelta(seconds=_STALE)
    return f"{said}; it counts as dead if it gives no sign of life until {_local(stale)}"


def _is_of_this_machine(process: Mapping[str, Any]) -> bool:
    """Whether a process's id and start mean something here."""
    here = {name: process.get(name) for name in _machine()} == _machine()
    return here and process.get("start") is not None


class _Signals:
    """SIGINT, SIGTERM and SIGHUP while a run lasts: noted, and `wake` is called.

    Only in the main thread, only where the handler is still the default; put back at the end.
    """

    def __init__(self, wake: Callable[[], None], install: bool) -> None:
        self._wake = wake
        self._install = install
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()
        self.caught: list[int] = []

    def __enter__(self) -> _Signals:
        if self._install and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is None:
                    continue
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            # A process that was forked meanwhile (a ProcessPoolExecutor's worker, say, which is to
            # end) inherits the handler, not the meaning.
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
            return
        self.caught.append(number)
        self._wake()

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Stops(NamedTuple):
    """The ways in which a run may be told to stop from inside its process."""

    event: threading.Event | None
    signals: _Signals

    def told(self) -> bool:
        """Whether it was."""
        return bool(self.signals.caught) or (self.event is not None and self.event.is_set())

    def check(self) -> None:
        """Raises AirflowException if it was, before the run has begun."""
        if self.told():
            raise AirflowException("stopped before the run began")


# --- Run loop: the loop ---------------------------------------------------------------------------


def _elements_of(
    plan: _Plan,
    node: _Node,
    map_index: int,
    call: _Call,
    inlined: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> tuple[dict[str, Any], frozenset[tuple[str, str]]]:
    """The elements of a mapped instance, as plain data that says where they are; and the results
    that its arguments take."""
    takes = call.takes
    if node.expansion is None or map_index < 0:
        return {}, takes
    elements: list[tuple[str | None, tuple[Any, ...]]] = []
    for k, (name, element) in enumerate(node.expansion.mapping.elements(map_index, plan)):
        if element[0] == "constant":
            constant = call.constants[k][element[1]]
            takes |= constant.takes
            elements.append((name, ("value", constant.data)))
        else:
            elements.append((name, inlined(element)))
    return {"elements": elements, "group": node.group is not None}, takes


class _RunLoop:
    """Drives a plan: starts what may run, records what happened, until everything has ended."""

    def __init__(
        self,
        plan: _Plan,
        store: _Store,
        runner: _Runner,
        calls: dict[str, tuple[_Call, str, bytes | None]],
        report: _Report,
        stops: _Stops,
        folder: Path,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._store = store
        self._runner = runner
        self._calls = calls
        self._report = report
        self._stops = stops
        self._batch = _Batch()
        self._to_send: list[tuple[Any, _Attempt]] = []
        self._ending: dict[_Attempt, str] = {}  # of these: those to be ended, and why
        self._attempts: dict[_Instance, _Attempt] = {}
        self._paused: dict[_Instance, _Attempt] = {}  # sensors between two pokes
        self._held: list[tuple[_Attempt, str | None, str | None]] = []  # callbacks after the commit
        self._calls_due: list[tuple[_Attempt, tuple[Any, ...]]] = []  # those that any may run
        self._last: dict[TaskInstanceState, _Attempt] = {}  # the last that ended so
        self._wrote_large = False
        self._fresh: dict[tuple[str, str, int], bytes] = {}  # small results, the newest ones
        self._parked = False  # by what runs in other runs of the DAG
        self._timeout_at = math.inf
        limit: _datetime.timedelta | None = getattr(plan.dag, "dagrun_timeout", None)
        if limit is not None:
            self._timeout_at = time.monotonic() + limit.total_seconds()
        self._stopping: str | None = None
        self._unasked: list[tuple[float, _Attempt, _Outcome]] = []
        self._forced = False
        self._locked_since: float | None = None
        self._next_tick = time.monotonic() + _TICK
        self._next_glance = time.monotonic() + _GLANCE
        self._next_beat = time.monotonic() + _BEAT

    def drive(self) -> str | None:
        """Run until all has ended; the reason if it was stopped before.

        First, what changed and what may start is recorded, in one transaction; then the jobs are
        sent, so that no start goes unrecorded and no task starts before the success of those it
        waits for is committed. Then it waits for outcomes. Raises _Fenced, DatabaseError.
        """
        while True:
            self._collect()
            if self._record():
                self._send()
            if self._is_over():
                return self._stopping
            ended = self._runner.wait(self._timeout())
            self._heed_signals()
            for attempt, outcome in ended:
                if outcome.unasked and self._stopping is None:
                    self._unasked.append((time.monotonic() + _TOGETHER, attempt, outcome))
                else:
                    self._take(attempt, outcome)
            self._look_around()
            self._take_unasked()

    def _is_over(self) -> bool:
        if self._batch or self._to_send:
            return False
        if self._stopping is not None:
            return not self._attempts
        if self._calls_due or self._held or self._runner.is_calling():
            return False
        idle = not self._attempts and not self._parked and self._plan.next_time() is None
        if self._plan.unfinished and idle:
            assert self._plan.ready_count(time.monotonic()), "the plan is stuck [a bug in liteflow]"
        return not self._plan.unfinished

    def _collect(self) -> None:
        """Put into the batch what rules decided, and what can start now."""
        self._plan.settle(time.monotonic())
        self._batch.marked += self._plan.changed
        for instance in self._plan.changed:
            self._report.changed(instance)
        self._plan.changed.clear()
        self._batch.expanded += self._plan.expanded
        self._plan.expanded.clear()
        why = "ended by dagrun_timeout" if self._plan.timed_out else "ended by fail_fast"
        while self._plan.doomed:
            attempt = self._attempts.get(self._plan.doomed.pop())
            if attempt is not None:
                self._end(attempt, why)
        if self._stopping is None and not self._to_send:
            self._choose(self._plan.ready_count(time.monotonic()))

    def _choose(self, ready: int) -> None:
        jobs = ready + len(self._calls_due)
        if not jobs:
            return
        self._runner.want(jobs)
        while self._calls_due and (place := self._runner.claim()) is not None:
            self._runner.start_call(place, *self._calls_due.pop(0))
        now = _iso(_utcnow())
        while ready and (instance := self._plan.take()) is not None:
            ready -= 1
            if not self._start(instance, now):
                self._plan.put_back(instance)
                return

    def _start(self, instance: _Instance, now: str) -> bool:
        """Start the instance, if there is a place for it."""
        task = instance.node.task
        if not task._needs_worker:
            self._pass_through(instance, now)
            return True
        if self._awaits_callback(instance):
            self._plan.park(instance)
            self._parked = True
            return True
        limit = task.max_active_tis_per_dag
        if limit is not None:
            elsewhere = self._store.running_elsewhere(task.dag_id, task.task_id)
            if elsewhere + instance.node.running >= limit:
                self._plan.park(instance)
                self._parked = True
                return True
        # What is withdrawn is put back as it was, which a first attempt's row allows.
        place = self._runner.claim(ahead=not instance.try_number)
        if place is None:
            return False
        self._plan.start(instance)
        attempt = self._paused.pop(instance, None)
        if attempt is None:
            attempt = _Attempt(instance, now, place.pid)
        self._attempts[instance] = attempt
        self._batch.started.append(attempt)
        self._to_send.append((place, attempt))
        return True

    def _awaits_callback(self, instance: _Instance) -> bool:
        """Whether the instance's `on_retry_callback` comes first, as in Airflow."""
        if instance.state is not _S.UP_FOR_RETRY or not instance.node.holds:
            return False
        wanted = getattr(instance.node.task, "on_retry_callback", None) is not None
        return wanted and bool(self._held or self._calls_due or self._runner.is_calling())

    def _pass_through(self, instance: _Instance, now: str) -> None:
        """An EmptyOperator's instance succeeds here; its callbacks go to any worker."""
        self._plan.pass_through(instance)
        self._plan.settle(time.monotonic())
        self._batch.passed.append((instance, now))
        self._report.changed(instance)
        attempt = _Attempt(instance, now, None)
        self._last[_S.SUCCESS] = attempt
        names = ("on_execute_callback", "on_success_callback")
        wanted = [name for name in names if getattr(instance.node.task, name) is not None]
        if wanted:
            self._due(attempt, "+".join(wanted), None)

    def _record(self) -> bool:
        """Commit the batch; False if the database is locked, and everything has to wait."""
        self._batch.logs += self._runner.final_output()
        if not self._batch:
            self._report.committed(())
            return True
        try:
            self._store.record(self._batch)
        except _Busy:
            now = time.monotonic()
            self._locked_since = self._locked_since or now
            if now - self._locked_since > _LOCKED_LIMIT:
                raise _locked_out(self._store.path) from None
            return False
        self._locked_since = None
        self._report.committed(self._batch.logs)
        self._wrote_large = self._batch.is_large()
        self._batch = _Batch()
        for attempt, name, reason in self._held:
            if not self._runner.call_back(attempt, name, reason) and name is not None:
                self._due(attempt, name, reason)
        self._held.clear()
        return True

    def _send(self) -> None:
        for place, attempt in self._to_send:
            self._report.changed(attempt.instance)
            self._runner.start(place, attempt, self._message(attempt))
        sent, self._to_send = self._to_send, []
        for _, attempt in sent if self._ending else ():
            if attempt in self._ending:
                self._runner.end(attempt, self._ending[attempt], self._forced)
        self._ending.clear()
        if self._wrote_large:
            self._wrote_large = False
            self._runner.flush()
            with contextlib.suppress(_Busy):  # the next one does it
                self._store.checkpoint()  # while the tasks run that waited for the value

    def _message(self, attempt: _Attempt) -> tuple[Any, ...]:
        instance = attempt.instance
        task = instance.node.task
        call, function, settings = self._calls[task.task_id]
        timeout = task.execution_timeout
        extra, takes = self._extra(attempt, call)
        return (
            task.task_id,
            function,
            instance.map_index,
            attempt.try_number,
            instance.max_tries,
            attempt.started,
            call.data,
            settings,
            self._inputs(instance, takes),
            None if timeout is None else timeout.total_seconds(),
            extra,
        )

    def _extra(
        self, attempt: _Attempt, call: _Call
    ) -> tuple[dict[str, Any], frozenset[tuple[str, str]]]:
        """What only some jobs have to know; and the results that its arguments take."""
        node = attempt.instance.node
        index = attempt.instance.map_index
        extra, takes = _elements_of(self._plan, node, index, call, self._inlined)
        if node.expansion is None and node.feeds:
            extra["feeds"] = True
        if node.holds:
            extra["holds"] = True
        if attempt.pokes:
            extra |= {"pokes": attempt.pokes, "first_start": attempt.first_start}
        return extra, takes

    def _inlined(self, element: tuple[Any, ...]) -> tuple[Any, ...]:
        """An element's plain data, with small values of results in it."""
        most = _VALUE_LIMIT if self._runner.remote else _INLINE
        if element[0] == "map":
            return ("map", element[1], self._inlined(element[2]))
        if element[0] == "tuple":
            return ("tuple", [self._inlined(part) for part in element[1]])
        data = None
        if element[0] == "item":
            data = self._store.item(element[1], element[2], most)
        elif element[0] == "xcom":
            found = self._store.input(element[1], "return_value", element[2], most)
            data = found[0][1] if found else None
        return element if data is None else ("value", data)

    def _inputs(
        self, instance: _Instance, takes: frozenset[tuple[str, str]]
    ) -> dict[tuple[str, str], list[tuple[int, bytes | None]]]:
        """The values that travel with a job: of its arguments; where it runs elsewhere, of all
        its direct upstreams."""
        found: dict[tuple[str, str], list[tuple[int, bytes | None]]] = {}
        if self._runner.remote:
            for up in instance.node.upstream:
                own = self._plan._in_step(up, instance.node)
                for key, map_index, value in self._store.inputs(up.task.task_id):
                    if not own or map_index == instance.map_index:
                        rows = found.setdefault((up.task.task_id, key), [])
                        rows.append((map_index, value))
            return found
        for task_id, key in takes:
            up = self._plan._by_id[task_id]
            own = self._plan._in_step(up, instance.node)
            if up.expansion is None or own:
                index = instance.map_index if own else -1
                fresh = self._fresh.get((task_id, key, index))
                found[task_id, key] = (
                    [(index, fresh)]
                    if fresh is not None
                    else self._store.input(task_id, key, index, _INLINE)
                )
        return found

    def _timeout(self) -> float | None:
        now = time.monotonic()
        if self._locked_since is not None:
            return 0.05
        times = [self._next_glance, *(until for until, _, _ in self._unasked)]
        due = self._plan.next_time()
        if due is not None and self._stopping is None:
            times.append(due)
        return max(0.0, min(times) - now)

    def _take(self, attempt: _Attempt, outcome: _Outcome) -> None:
        """An attempt ended: let the plan decide what its instance becomes."""
        instance = attempt.instance
        del self._attempts[instance]
        if outcome is _WITHDRAWN:
            self._plan.withdraw(instance)
            self._report.withdrawn(instance)
            self._batch.withdrawn.append(attempt)
            return
        ended = _iso(_utcnow()) if outcome.ended is None else _iso_of(outcome.ended)
        if outcome.terminated and self._stopping is not None:
            self._plan.interrupt(instance)
            self._batch.interrupted.append((attempt, ended, f"interrupted: {self._stopping}"))
            self._held.append((attempt, None, None))
        else:
            self._finish(attempt, outcome, ended)
        self._report.changed(instance, outcome.error)

    def _finish(self, attempt: _Attempt, outcome: _Outcome, ended: str) -> None:
        instance, note = attempt.instance, outcome.note
        outcome = self._follow_flow(instance, outcome)
        self._plan.finish(
            instance,
            outcome.status,
            time.monotonic(),
            stored=bool(note.get("stored")) and outcome.status is _Status.SUCCESS,
            length=note.get("length"),
            wait=note.get("wait", 0.0),
        )
        state = instance.state
        assert state is not None
        items = note.get("items", ()) if outcome.status is _Status.SUCCESS else ()
        self._batch.finished.append(
            _Finished(
                attempt,
                state,
                ended,
                outcome.error,
                outcome.xcoms,
                items,
                None if outcome.began is None else _iso_of(outcome.began),
            )
        )
        if state is _S.UP_FOR_RESCHEDULE:
            attempt.pokes += 1
            self._paused[instance] = attempt
            return
        if state is _S.SUCCESS and instance.node.downstream:
            self._remember(instance, outcome.xcoms)
        self._last[state] = attempt
        name = _CALLBACK_OF.get(state)
        if instance.node.holds:
            callback = name if name and getattr(instance.node.task, name) is not None else None
            reason = _last_line(outcome.error) or None
            self._held.append((attempt, callback, reason))

    def _remember(self, instance: _Instance, xcoms: Sequence[_XComRow]) -> None:
        """Keep small values for a moment: those that take them often start in this very turn."""
        for xcom in xcoms:
            if len(xcom.value) <= _INLINE:
                self._fresh[instance.task_id, xcom.key, instance.map_index] = xcom.value
        while len(self._fresh) > _FRESH:
            del self._fresh[next(iter(self._fresh))]

    def _follow_flow(self, instance: _Instance, outcome: _Outcome) -> _Outcome:
        """Skip what a branch or short_circuit leaves out; it then stores no return value."""
        if outcome.status is not _Status.SUCCESS:
            return outcome
        note = outcome.note
        try:
            if "chosen" in note:
                left_out = self._plan.not_chosen(instance, note["chosen"])
            elif "go_on" in note and not note["go_on"]:
                left_out = self._plan.short_circuited(instance)
            else:
                return outcome
        except _BadBranch as error:
            kept = [row for row in outcome.xcoms if row.key != "return_value"]
            return _Outcome(_Status.FAILED, str(error), kept)
        if instance.map_index >= 0:
            # As in Airflow, a mapped branch skips nothing outside of its mapped group.
            left_out = [n for n in left_out if self._plan._in_step(instance.node, n)]
        if not left_out:
            return outcome
        self._plan.skip(instance, left_out)
        kept = [row for row in outcome.xcoms if row.key != "return_value"]
        return outcome._replace(xcoms=kept)

    def call_dag(self, end: _End, dead: Sequence[_RunRow]) -> None:
        """The run's end is recorded: the DAG's callbacks, in any worker; and those of runs whose
        scheduler died. A second signal ends them."""
        dag = self._plan.dag
        for row in dead:
            self._call_dag_of(row, dag)
        success = end.state is DagRunState.SUCCESS
        name = f"on_{'success' if success else 'failure'}_callback"
        if getattr(dag, name, None) is not None and self._plan.nodes:
            last = self._last.get(_S.SUCCESS if success else _S.FAILED)
            last = last or next(iter(self._last.values()), None)
            last = last or _Attempt(self._plan.nodes[0].instances[0], "", None)
            reason = "success" if success else end.reason or "task_failure"
            if self._plan.timed_out:
                reason = "timed_out"  # Airflow's word
            self._due(last, f"dag_{name}", reason)
        told = len(self._stops.signals.caught)
        while self._calls_due or self._runner.is_calling():
            self._choose(0)
            self._runner.wait(0.5)
            if len(self._stops.signals.caught) > max(told, 1):
                break
        self._batch.logs += self._runner.final_output()
        with contextlib.suppress(_Busy):  # what callbacks printed is no result
            self._store.record(self._batch)
            self._report.committed(self._batch.logs)

    def _due(self, attempt: _Attempt, name: str, reason: str | None, of: Any = None) -> None:
        """Callbacks that any worker may run."""
        self._calls_due.append((attempt, (self._message(attempt), name, reason, of)))

    def _call_dag_of(self, row: _RunRow, dag: Dag) -> None:
        if getattr(dag, "on_failure_callback", None) is None or not self._plan.nodes:
            return
        of = {
            "run_id": row.run_id,
            "run_row": row.id,
            "logical_date": row.logical_date,
            "start_date": row.start_date,
            "conf": _plain(row.conf, dict),
        }
        instance = self._plan.nodes[0].instances[0]
        attempt = _Attempt(instance, row.start_date or "", None)
        self._due(attempt, "dag_on_failure_callback", "its scheduler died", of)

    def _take_unasked(self) -> None:
        """Attempts that somebody told to end: if the run is being stopped too, they count as
        interrupted (systemd tells the whole group at once), else, a second later, as failed."""
        now = time.monotonic()
        for item in list(self._unasked):
            until, attempt, outcome = item
            if self._stopping is not None or until <= now:
                self._unasked.remove(item)
                self._take(attempt, outcome)

    def _heed_signals(self) -> None:
        """Before the outcomes are looked at: an end that belongs to the run's is no failure."""
        caught = self._stops.signals.caught
        if caught:
            names = [signal.Signals(number).name for number in caught]
            self._stop(f"stopped by {names[0]}", now=len(names) > 1)
        if getattr(self._runner, "interrupted", False):
            caught.append(signal.SIGINT)
            self._stop("stopped by SIGINT", now=True)

    def _look_around(self) -> None:
        """What is due by time, and what was asked for from outside."""
        now = time.monotonic()
        if now < self._next_glance:
            return
        self._next_glance = now + _GLANCE
        self._report.tick()
        if self._parked:
            self._parked = False
            self._plan.unpark()
        if self._stops.event is not None and self._stops.event.is_set():
            self._stop("stopped")
        if now < self._next_tick and not self._runner.is_talkative():
            return
        self._batch.logs += self._runner.output()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK
        if now >= self._timeout_at and not self._plan.timed_out:
            self._plan.time_out()
        if self._store.stop_requested():
            self._stop("stopped on request")
        self._store.check_in_place()
        if now >= self._next_beat:
            with contextlib.suppress(_Busy):
                self._store.beat()
                self._next_beat = now + _BEAT
            with contextlib.suppress(OSError):
                os.utime(self._folder / "owner")  # for those who look from another machine

    def _stop(self, reason: str, now: bool = False) -> None:
        """Start nothing more, and end what runs: asked to first, at once the second time."""
        if self._stopping is None:
            self._stopping = reason
            self._report.tell(f"{reason}: ending {len(self._attempts)} running tasks")
        elif not now or self._forced:
            return
        self._forced = now
        for attempt in list(self._attempts.values()):
            self._end(attempt, self._stopping, now)

    def _end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        """End a job; one that waits for the database to be unlocked, once it is sent."""
        if any(waiting is attempt for _, waiting in self._to_send):
            self._ending[attempt] = reason
        self._runner.end(attempt, reason, now)


# --- Run loop: a run's beginning and end ----------------------------------------------------------


class _Request(NamedTuple):
    """What run() was asked for, checked."""

    dag: Dag
    path: Path
    run_id: str | None
    logical_date: _datetime.datetime | None
    conf: dict[str, Any] | None
    resume: bool
    pools: dict[str, int]


class _IdTaken(Exception):
    """A run has the id that was made for this one."""


class _Opened(NamedTuple):
    """The run as it stands in the database before its first task starts."""

    run_id: str
    logical_date: _datetime.datetime | None
    conf: dict[str, Any]
    recorded: _RunRow | None


def _run_dag(
    dag: Dag,
    *,
    db_path: str | os.PathLike[str] | None = None,
    run_id: str | None = None,
    logical_date: _datetime.datetime | None = None,
    conf: Mapping[str, Any] | None = None,
    resume: bool = False,
    max_workers: int | None = None,
    executor: Any = None,
    mp_context: Any = None,
    pools: Mapping[str, int] | None = None,
    wait: bool = False,
    progress: bool | Callable[[str], object] | _Screen = False,
    stop: threading.Event | None = None,
    in_process: bool = False,
) -> DagRun:
    """What `Dag.run` and `Dag.test` do."""
    _refuse_reentry()
    _fill_standard_descriptors()
    if stop is not None and not hasattr(stop, "is_set"):
        raise TypeError(f"stop must be a threading.Event, found {_shown(stop)}")
    if not (progress in (None, True, False) or callable(progress) or isinstance(progress, _Screen)):
        raise TypeError(f"progress must be a bool or a function, found {_shown(progress)}")
    sized = _checked_pools(dag, pools, in_process)
    request = _checked_request(dag, db_path, run_id, logical_date, conf, resume)._replace(
        pools=sized
    )
    report = _Report(progress)
    runner = _make_runner(dag, max_workers, executor, mp_context, in_process)
    try:
        with _Signals(runner.wake, install=not in_process) as signals:
            try:
                found = _execute(request, runner, report, _Stops(stop, signals), wait)
            except BaseException:  # a worker's start cut off by the same Ctrl-C, say
                if not signals.caught:
                    raise
                # Whatever went wrong, it was being ended: a worker's start cut off by the same
                # Ctrl-C, say.
    finally:
        runner.close()
    if signals.caught:
        _raise_for(signals.caught[0])
    return found


def _refuse_reentry() -> None:
    """A script without a main guard calls run() as its worker imports it: end that quietly."""
    if _worker is not None and _worker.importing:
        os._exit(_UNGUARDED)  # the scheduler explains it, once
    if not _importing_in_child() or _worker is not None:
        return
    process = sys.modules["multiprocessing.process"]
    if process.current_process().name.startswith(_WORKER_MARK):
        os._exit(_UNGUARDED)
    raise RuntimeError(
        "run() was called while a child process imports the script: put the call below "
        '`if __name__ == "__main__":`'
    )


def _checked_request(
    dag: Dag, db_path: Any, run_id: Any, logical_date: Any, conf: Any, resume: Any
) -> _Request:
    """Refuse wrong arguments and a wrong graph before anything is started or written."""
    if run_id is not None and (not isinstance(run_id, str) or not run_id or len(run_id) > 250):
        raise ValueError(f"run_id must be a str of 1 to 250 characters, found {_shown(run_id)}")
    if run_id is not None and not run_id.isprintable():
        raise ValueError(f"run_id must be printable, found {_shown(run_id)}")
    if logical_date is not None and not isinstance(logical_date, _datetime.datetime):
        raise TypeError(f"logical_date must be a datetime, found {_shown(logical_date)}")
    if conf is not None:
        conf = json.loads(_json_text("conf", _string_keyed("conf", conf), TypeError))
    if resume and (conf is not None or logical_date is not None):
        raise ValueError(
            "run(resume=True) takes conf and logical_date from the recorded run: leave them out"
        )
    dag.validate()
    when = None if logical_date is None else _aware(logical_date)
    return _Request(dag, _database_path(db_path, dag), run_id, when, conf, bool(resume), {})


def _checked_pools(dag: Dag, pools: Any, in_process: bool) -> dict[str, int]:
    """Sizes of pools by name; each pool that a task names must have one, and room for it."""
    sizes = _string_keyed("pools", pools)
    for name, size in sizes.items():
        if _whole(1)(f"pools[{name!r}]", size) is None:
            raise TypeError(f"pools[{name!r}] must be an int, found None")
    if in_process:
        return {}
    for task in dag.task_dict.values():
        size = sizes.get(task.pool)
        if size is None and task.pool != "default_pool":
            raise ValueError(
                f"task {task.task_id!r} is in pool {task.pool!r}, whose size is not given: run "
                f"with pools={{{task.pool!r}: N}}, or --pool {task.pool}=N"
            )
        if size is not None and task.pool_slots > size:
            raise ValueError(
                f"task {task.task_id!r} takes {task.pool_slots} slots of pool {task.pool!r}, which "
                f"has {size}"
            )
    return sizes


def _make_runner(
    dag: Dag, max_workers: Any, executor: Any, mp_context: Any, in_process: bool
) -> Any:
    if in_process:
        return _InProcessRunner(dag)
    if executor is None:
        interactive = _is_interactive(dag)
        return _SlotRunner(WorkerPool(max_workers, mp_context), True, interactive)
    if max_workers is not None or mp_context is not None:
        raise ValueError("run() takes executor= or max_workers= and mp_context=, not both")
    if isinstance(executor, WorkerPool):
        return _SlotRunner(executor, False, _is_interactive(dag))
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            "executor must be a WorkerPool or a concurrent.futures.Executor, found "
            f"{_shown(executor)}"
        )
    return _ExecutorRunner(executor)


def _is_interactive(dag: Dag) -> bool:
    """Whether the DAG stands in a `__main__` that no other process can import."""
    main = sys.modules.get("__main__")
    if dag._module != "__main__" or getattr(main, "__spec__", None) is not None:
        return False
    file = getattr(main, "__file__", None)
    return file is None or not os.path.exists(file)


def _raise_for(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _execute(
    request: _Request,
    runner: Any,
    report: _Report,
    stops: _Stops,
    wait: bool,
) -> DagRun:
    if request.dag.task_dict:
        runner.launch()
    opened = _look_ahead(request)
    if opened.recorded is not None and opened.recorded.state == "success":
        return _nothing_to_resume(request, opened, report)
    while True:
        try:
            return _execute_as(opened, request, runner, report, stops, wait)
        except _IdTaken:  # another run began in the same microsecond
            opened = _look_ahead(request)


def _execute_as(
    opened: _Opened,
    request: _Request,
    runner: Any,
    report: _Report,
    stops: _Stops,
    wait: bool,
) -> DagRun:
    dag, path = request.dag, request.path
    fresh, calls = _find_tasks(request, opened, runner, stops)
    store = _Store(path, stops.check)
    token = os.urandom(8).hex()
    _active_runs.add(token)
    try:
        plan, dead = _open_in_turn(
            lambda: _until_unlocked(
                path, lambda: _open_run(store, request, opened, fresh, token, report), stops.check
            ),
            runner,
            report,
            stops if wait else None,
        )
        with _run_folder(path, token) as folder:
            with _recording_the_end(store, plan, report) as end:
                report.began(dag, opened.run_id, path, plan)
                runner.open_logs(folder, store.run_row)
                loop = _RunLoop(plan, store, runner, calls, report, stops, folder)
                end.reason = loop.drive()
            loop.call_dag(end, dead)
    except _NothingToResume:
        return _nothing_to_resume(request, opened, report)
    finally:
        _active_runs.discard(token)
        store.close()
    found = _read_run(path, dag.dag_id, opened.run_id)
    for note in getattr(runner, "notes", ()):
        report.tell(note)
    report.ended(found)
    return found


def _find_tasks(
    request: _Request, opened: _Opened, runner: Any, stops: _Stops
) -> tuple[_Plan | None, dict[str, tuple[_Call, str, bytes | None]]]:
    """Let the first worker find every task; a new run's plan, and what the jobs of each task have
    in common. Raises UnreachableTask, and has written nothing.

    What takes time here is done while the fork server starts.
    """
    dag = request.dag
    info = _run_info(request, opened)
    calls = {task_id: _dump_call(task) for task_id, task in dag.task_dict.items()}
    _check_before_run(request.path)
    functions = _functions(dag)
    # A resume's plan depends on what is recorded.
    fresh = None if request.resume else _Plan(dag, opened.logical_date, pools=request.pools)
    if not dag.task_dict:
        return fresh, {}
    roots = sum(not task._upstream for task in dag.task_dict.values())
    named = runner.begin(info, functions, min(roots, dag.max_active_tasks), stops.check)
    return fresh, _complete_calls(dag, calls, functions, named)


def _complete_calls(
    dag: Dag,
    calls: Mapping[str, _Call],
    functions: Iterable[tuple[str, str, bool]],
    named: Collection[str],
) -> dict[str, tuple[_Call, str, bytes | None]]:
    """What the jobs of each task have in common; equal ones are kept once."""
    known: dict[Any, Any] = {}
    complete = {}
    for task_id, function, _ in functions:
        call = calls[task_id]
        settings = _dump_settings(dag.task_dict[task_id]) if task_id in named else None
        job = (call, function, known.setdefault(settings, settings))
        complete[task_id] = known.setdefault(job, job) if call is _NO_CALL else job
    return complete


def _nothing_to_resume(request: _Request, opened: _Opened, report: _Report) -> DagRun:
    dag_id = request.dag.dag_id
    report.tell(f"run {opened.run_id} of DAG {dag_id!r} is a success: nothing to resume")
    return _read_run(request.path, dag_id, opened.run_id)


class _End:
    """Why a run was stopped, if it was."""

    reason: str | None = None
    state = DagRunState.FAILED


@contextlib.contextmanager
def _recording_the_end(store: _Store, plan: _Plan, report: _Report) -> Iterator[_End]:
    """Record the run's end, whatever ends it."""
    end = _End()
    try:
        yield end
    except _Fenced:
        raise  # the run is another's now
    except BaseException as error:  # a full disk, a bug, a progress= that raises: said, and raised
        why = f"{type(error).__name__}: {_text_of(error)}"
        with contextlib.suppress(_Busy, AirflowException), store.transaction():
            store.close_run(store.run_row, why, lost=False)
        raise
    end.state = plan.run_state() if end.reason is None else DagRunState.FAILED
    if plan.timed_out:
        end.reason = end.reason or "dagrun_timeout"
    _until_unlocked(store.path, lambda: _end_run(store, end.state, end.reason))


def _end_run(store: _Store, state: DagRunState, reason: str | None) -> None:
    with store.transaction():
        store.release_waiting()
        store.end_run(state, reason)


def _open_in_turn(
    open_run: Callable[[], tuple[_Plan, list[_RunRow]]],
    runner: Any,
    report: _Report,
    stops: _Stops | None,
) -> tuple[_Plan, list[_RunRow]]:
    """Open the run; with `stops`, wait while another rules it out. Raises AlreadyRunning."""
    said = False
    while True:
        try:
            return open_run()
        except AlreadyRunning as busy:
            if stops is None or stops.told():
                raise
            if not said:
                report.tell(f"waiting: {busy}")
                said = True
        runner.wait(1.0)


def _functions(dag: Dag) -> list[tuple[str, str, bool]]:
    """(task_id, function, whether a worker may go by the function's name alone) of every task.

    By name only if that name means this very function here: one that was redefined in a loop has
    one name and many meanings.
    """
    resolved: dict[str, Any] = {}
    references = []
    for task_id, task in dag.task_dict.items():
        function = sys.intern(_function_name(task))
        if function not in resolved:
            resolved[function] = _resolve(function)
        ours = task._function()
        references.append((task_id, function, ours is not None and resolved[function] is ours))
    return references


def _look_ahead(request: _Request) -> _Opened:
    """Which run it will be: a new one's id and date, or what is recorded of the one to resume."""
    dag, path = request.dag, request.path
    if not request.resume:
        now = _utcnow()
        run_id = request.run_id or f"manual__{now.isoformat(timespec='microseconds')}"
        return _Opened(run_id, request.logical_date or now, request.conf or {}, None)
    row = _read(path, lambda db: _find_run(db, dag.dag_id, request.run_id))
    if row is None:
        wanted = f"run {request.run_id!r}" if request.run_id else "run yet: nothing to resume"
        raise RunNotFound(f"DAG {dag.dag_id!r} has no {wanted} in {path}")
    when = row.logical_date and _datetime.datetime.fromisoformat(row.logical_date)
    return _Opened(row.run_id, when or None, _plain(row.conf, dict), row)


def _run_info(request: _Request, opened: _Opened) -> dict[str, Any]:
    """What every job of the run has in common, as plain data. Raises ParamValidationError."""
    dag = request.dag
    params = _resolve_params(dag, opened.conf)
    for task in dag.task_dict.values():
        _task_params(task, params, opened.conf)
    main = sys.modules.get(dag._module)
    return {
        "dag_id": dag.dag_id,
        "key": dag._key,
        "module_path": getattr(main, "__file__", None),
        "fileloc": dag.fileloc,
        "run_id": opened.run_id,
        "logical_date": opened.logical_date and _iso(opened.logical_date),
        "start_date": _iso(_utcnow()),
        "conf": opened.conf,
        "params": json.loads(_json_text("params", params, ParamValidationError)),
        "db_path": os.fspath(request.path),
        "run_row": 0,
        "files": _file_states({getattr(main, "__file__", None), dag.fileloc}),
        "environ": dict(vars(os.environ)["_data"]),
        "cwd": _working_directory(),
        "sys_path": [entry for entry in sys.path if isinstance(entry, str)],
    }


def _file_states(paths: Iterable[str | None]) -> list[tuple[str, int, int]]:
    """(path, size, mtime) of the files: a worker that starts later compares."""
    states = []
    for path in paths:
        with contextlib.suppress(OSError, TypeError):  # None, or a file that is none
            found = os.stat(path)  # type: ignore[arg-type]
            states.append((os.path.abspath(str(path)), found.st_size, found.st_mtime_ns))
    return states


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.sep


def _open_run(
    store: _Store,
    request: _Request,
    opened: _Opened,
    fresh: _Plan | None,
    token: str,
    report: _Report,
) -> tuple[_Plan, list[_RunRow]]:
    """Create or take over the run in one transaction; the plan of what is left to do (`fresh`, if
    it is a new run), and the DAG's runs that were found dead."""
    dag = request.dag
    with store.transaction():
        if opened.recorded is not None:
            row = store.find_run(dag.dag_id, opened.run_id)
            if row is None or row.id != opened.recorded.id:
                raise RunNotFound(f"run {opened.run_id!r} of DAG {dag.dag_id!r} was deleted")
            if row.state == "success":
                raise _NothingToResume
        dead = _make_way(store, dag, opened, report)
        if opened.recorded is None:
            if store.find_run(dag.dag_id, opened.run_id) is not None:
                if request.run_id is None:
                    raise _IdTaken
                raise ValueError(
                    f"run_id {opened.run_id!r}: DAG {dag.dag_id!r} has a run of this id already; "
                    "resume it, or give another"
                )
            store.create_run(dag, opened.run_id, opened.logical_date, json.dumps(opened.conf))
            assert fresh is not None
            plan = fresh
            store.add_instances(plan.instances())
        else:
            store.run_row = opened.recorded.id
            plan = _resumed_plan(store, request, opened, report)
        store.claim_run(store.run_row, token, _this_process())
    return plan, dead


def _make_way(store: _Store, dag: Dag, opened: _Opened, report: _Report) -> list[_RunRow]:
    """Close the DAG's runs whose owner died; refuse if too many are alive, or this one is."""
    alive, dead = [], []
    for row in store.live_runs(dag.dag_id):
        if _owner_lives(row.owner_process, row.owner, row.heartbeat):
            alive.append(row)
        elif opened.recorded is None or row.id != opened.recorded.id:
            store.close_run(row.id, "its scheduler died", lost=True)
            dead.append(row)
            report.tell(f"run {row.run_id}: its scheduler died; recorded as failed")
    for row in alive:
        if opened.recorded is not None and row.id == opened.recorded.id:
            raise AlreadyRunning(
                f"run {row.run_id!r} of DAG {dag.dag_id!r} is running: {_whose(row)}"
            )
    if len(alive) >= dag.max_active_runs:
        row = alive[0]
        raise AlreadyRunning(
            f"DAG {dag.dag_id!r} has max_active_runs={dag.max_active_runs}, and run {row.run_id!r} "
            f"is running: {_whose(row)}"
        )
    return dead


def _resumed_plan(store: _Store, request: _Request, opened: _Opened, report: _Report) -> _Plan:
    """Keep what succeeded, put all else back to be decided anew, by today's code."""
    dag = request.dag
    rows = store.recorded_instances()
    resets: dict[int, int] = {}
    known: dict[tuple[str, int], _Recorded] = {}
    gone = []
    poisoned = []
    for (task_id, map_index), (row_id, state, tries, max_tries, lost) in rows.items():
        task = dag.task_dict.get(task_id)
        if task is None:
            if state != "removed":
                gone.append((row_id, task_id))
            continue
        if state == "success":
            known[task_id, map_index] = _Recorded(_S.SUCCESS, tries, max_tries)
            continue
        fresh = _fresh_max_tries(task, state, tries, max_tries)
        resets[row_id] = fresh
        known[task_id, map_index] = _Recorded(None, tries, fresh)
        losses = lost + (state == "running")
        if state in ("running", None) and losses >= task.retries + 3:
            poisoned.append((row_id, task_id, map_index, losses))
            known[task_id, map_index] = _Recorded(_S.FAILED, tries, fresh)
    store.reset_instances(resets, resets)
    store.remove_instances(row_id for row_id, _ in gone)
    for row_id, task_id, _, lost in poisoned:
        store.fail_poisoned(row_id, f"lost with its scheduler {lost} times in a row")
        report.tell(f"task {task_id!r} was lost with its scheduler {lost} times in a row: failed")
    lengths = store.recorded_lengths()
    plan = _Plan(dag, opened.logical_date, known, lengths, request.pools)
    for note in plan.notes:
        report.tell(note)
    _fit_rows(store, plan, rows)
    new = [i for i in plan.instances() if (i.task_id, i.map_index) not in rows]
    for instance in plan.instances():
        if (instance.task_id, instance.map_index) in rows:
            instance.row_id = rows[instance.task_id, instance.map_index][0]
    store.add_instances(new)
    store.refresh_edges(i for i in plan.instances() if i.row_id)
    _report_resume(report, known, [i.task_id for i in new], [task_id for _, task_id in gone])
    return plan


def _fit_rows(
    store: _Store, plan: _Plan, rows: dict[tuple[str, int], tuple[int, str | None, int, int, int]]
) -> None:
    """Where a mapping has another number of instances now than recorded: the surplus is removed,
    and a task that was recorded unexpanded gives its row to index 0."""
    here = {(i.task_id, i.map_index) for i in plan.instances()}
    ids = {node.task.task_id for node in plan.nodes}
    for key in [key for key in rows if key not in here and key[0] in ids]:
        row = rows.pop(key)
        if key[1] < 0 and (key[0], 0) in here and (key[0], 0) not in rows:
            rows[key[0], 0] = row
            store.move_instance(row[0], 0)
        elif key[1] == 0 and (key[0], -1) in here and (key[0], -1) not in rows:
            rows[key[0], -1] = row
            store.move_instance(row[0], -1)
        else:
            store.remove_instances([row[0]])


def _fresh_max_tries(task: BaseOperator, state: str | None, tries: int, max_tries: int) -> int:
    """The tries that an instance has in a resume, as the number of its last possible retry."""
    if state == "failed" or max_tries < 0:
        return tries + task.retries  # fresh tries, as when Airflow clears it
    if state == "running":
        return max_tries + 1  # its scheduler died: that used up none
    # Never run: all its tries; else what an orderly end left of them.
    return max(max_tries, task.retries) if tries == 0 else max_tries


def _report_resume(
    report: _Report,
    known: Mapping[tuple[str, int], _Recorded],
    new: Sequence[str],
    gone: Sequence[str],
) -> None:
    kept = [task_id for (task_id, _), r in known.items() if r.state is _S.SUCCESS]
    for what, names in (
        ("kept, as they succeeded", kept),
        ("new in the code, will run", new),
        ("gone from the code, now removed", gone),
    ):
        if names:
            names = list(dict.fromkeys(names))
            few = ", ".join(names[:10]) + (
                f", ... ({len(names)} in all)" if len(names) > 10 else ""
            )
            report.tell(f"{what}: {few}")


@contextlib.contextmanager
def _run_folder(path: Path, token: str) -> Iterator[Path]:
    """A private folder beside the database (not in /tmp, which is often memory), for the slots'
    logs and for large values on their way; what dead owners left of theirs is swept."""
    folder = path.with_name(f"{path.name}-run-{token}")
    coming = path.with_name(f"{path.name}-new-{token}")  # by this name no sweep finds it half made
    try:
        _sweep(path)
        coming.mkdir(mode=0o700)
        (coming / "owner").write_text(_this_process())
        coming.rename(folder)
    except OSError as error:
        raise DatabaseError(f"{folder} can't be made: {error.strerror}") from None
    try:
        yield folder
    finally:
        _remove_folder(folder)


def _sweep(path: Path) -> None:
    """Remove the folders of runs whose owner is dead, and those half made.

    Only what bears our mark, the owner's file, whatever its name; and never through a link.
    """
    pattern = re.compile(re.escape(path.name) + r"-(run|new)-(\w+)")
    with os.scandir(path.parent) as entries:
        left = [
            (Path(entry.path), match)
            for entry in entries
            if (match := pattern.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)
        ]
    for folder, match in left:
        found = _owner_mark(folder)
        if found is not None and not _owner_lives(found[0], match[2], found[1]):
            _remove_folder(folder)


def _owner_mark(folder: Path) -> tuple[str, str] | None:
    """What the owner's file in a folder says, and when it was touched; None: it is none of ours."""
    try:
        # Neither a link that leads elsewhere, nor a FIFO that would be waited for.
        file = os.open(folder / "owner", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(file, errors="replace") as opened:
        facts = os.fstat(file)
        text = opened.read(10_000) if stat.S_ISREG(facts.st_mode) else ""
    if _plain(text, dict).keys() < {*_machine(), "pid", "start"}:
        return None
    return text, _datetime.datetime.fromtimestamp(facts.st_mtime, _datetime.UTC).isoformat()


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        # The owner's file last: it says whose the rest is.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "owner"):
            with contextlib.suppress(OSError):
                file.unlink()
        folder.rmdir()


# --- Reading back ---------------------------------------------------------------------------------


class XCom(NamedTuple):
    """A stored value of a task instance (`map_index` -1: not mapped)."""

    task_id: str
    map_index: int
    key: str
    value: Any


class TaskInstance:
    """One task in one run: what `get_task_instances` gives, and `ti` inside a running task.

    Times are timezone-aware UTC datetimes. `try_number` counts attempts from 1; `max_tries` is
    the number of the last attempt that may be retried. `error` is the traceback of a failure,
    whose last line is the reason. `state` is None while nothing is decided.
    """

    def __init__(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> None:
        self.dag_id = dag_id
        self.run_id = run_id
        self.task_id = task_id
        self.map_index = map_index
        self.state: TaskInstanceState | None = None
        self.try_number = 0
        self.max_tries = 0
        self.start_date: _datetime.datetime | None = None
        self.end_date: _datetime.datetime | None = None
        self.pid: int | None = None
        self.error: str | None = None
        self.upstream_task_ids: set[str] = set()
        self.hostname = ""
        self.task_group_id: str | None = None
        self.role: str | None = None  # "setup" or "teardown"
        self.task: Any = None

    @property
    def duration(self) -> float | None:
        """Seconds from start to end of the latest attempt."""
        if self.start_date is None or self.end_date is None:
            return None
        return (self.end_date - self.start_date).total_seconds()

    def xcom_push(self, key: str, value: Any) -> None:
        """Store a value under a key, from inside the running task; again replaces it.

        Raises RuntimeError outside a task, TypeError for a value that can't be pickled.
        """
        if not isinstance(key, str):
            raise TypeError(f"xcom_push takes a str key, found {_shown(key)}")
        _push(_running_job(), key, value, f"pushed for {key!r} a")

    def xcom_pull(
        self,
        task_ids: str | Sequence[str] | None = None,
        dag_id: str | None = None,
        key: str = "return_value",
        include_prior_dates: bool = False,
        *,
        map_indexes: Any = ...,
        default: Any = None,
        run_id: str | None = None,
    ) -> Any:
        """Values that tasks of this run stored, from inside the running task (Airflow's rules).

        `task_ids`: None for the task itself, a str for one value, a list for a list of values in
        that order; of a mapped task all values, or those of `map_indexes` (an int or several).
        What is absent is None; `default` counts only with `map_indexes`.
        """
        if dag_id not in (None, self.dag_id) or run_id not in (None, self.run_id):
            raise ValueError("xcom_pull() here reads values of this run only")
        job = _running_job()
        if task_ids is None or isinstance(task_ids, str):
            return _pulled(job.pull(task_ids or self.task_id, key), map_indexes, default)
        values: list[Any] = []
        for task_id in task_ids:
            rows = job.pull(task_id, key)
            each = _pulled(rows, map_indexes, default)
            if isinstance(map_indexes, Sequence):
                values += each
            elif map_indexes is ... and any(i >= 0 for i, _ in rows):
                values += [value for _, value in rows]
            else:
                values.append(each)
        return values

    def __repr__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"<TaskInstance: {self.dag_id}.{self.task_id}{index} {self.run_id} [{self.state}]>"


def _pulled(found: list[tuple[int, Any]], map_indexes: Any, default: Any) -> Any:
    """One task's values as xcom_pull gives them: the bare one, or those of the indexes."""
    if map_indexes is ...:
        return None if not found else found[0][1] if len(found) == 1 else [v for _, v in found]
    values = dict(found)
    if map_indexes is None or isinstance(map_indexes, int):
        return values.get(-1 if map_indexes is None else map_indexes, default)
    return [values.get(i, default) for i in map_indexes]


def _running_instance(job: _Job) -> TaskInstance:
    """The `ti` of a running task."""
    info = job.run.info
    ti = TaskInstance(info["dag_id"], info["run_id"], job.task_id, job.map_index)
    ti.state = _S.RUNNING
    ti.try_number = job.try_number
    ti.max_tries = job.max_tries
    ti.start_date = _moment(job.started)
    ti.pid = os.getpid()
    ti.upstream_task_ids = set(job.task._upstream)
    ti.hostname = _machine()["host"]
    return ti


_TASK_STATES = frozenset(state.value for state in TaskInstanceState)


def _plain(text: str | None, kind: type[T]) -> T:
    """Stored JSON; an empty value of its kind for what is none of ours."""
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, kind) else kind()


def _moment(text: str | None) -> _datetime.datetime | None:
    """A stored time; None for what is not there or, in a file that was tampered with, no time."""
    try:
        return None if text is None else _aware(_datetime.datetime.fromisoformat(text))
    except (ValueError, TypeError):
        return None


def _instance_of(row: Sequence[Any], dag_id: str, run_id: str) -> TaskInstance:
    (
        task_id,
        state,
        start,
        end,
        error,
        upstream,
        group,
        role,
        map_index,
        tries,
        max_tries,
        pid,
        _,
    ) = row
    ti = TaskInstance(dag_id, run_id, task_id, map_index)
    ti.state = TaskInstanceState(state) if state in _TASK_STATES else None
    ti.try_number, ti.max_tries, ti.pid, ti.error = tries, max_tries, pid, error
    ti.start_date, ti.end_date = _moment(start), _moment(end)
    ti.upstream_task_ids = {str(name) for name in _plain(upstream, list)}
    ti.task_group_id, ti.role = group, role
    return ti


class DagRun:
    """One run of a DAG, as it stood in the database when it was read; `refresh` reads it again.

    `state` is a DagRunState; `reason` says why it failed where no task is to blame. Times are
    timezone-aware UTC datetimes; `conf` is the dict the run was started with.
    """

    run_type = "manual"

    def __init__(self, row: _RunRow, path: Path) -> None:
        self.db_path = path
        self._set(row)

    def _set(self, row: _RunRow) -> None:
        self._row = row
        self.dag_id = row.dag_id
        self.run_id = row.run_id
        known = row.state in [state.value for state in DagRunState]
        self.state = DagRunState(row.state) if known else DagRunState.FAILED
        self.reason = row.reason
        self.logical_date = _moment(row.logical_date)
        self.start_date = _moment(row.start_date)
        self.end_date = _moment(row.end_date)
        self.conf: dict[str, Any] = _plain(row.conf, dict)

    @property
    def run_after(self) -> _datetime.datetime | None:
        """When the run was to start: liteflow starts a run at once."""
        return self.start_date

    @property
    def data_interval_start(self) -> _datetime.datetime | None:
        """The logical date: a run by hand covers no interval."""
        return self.logical_date

    data_interval_end = data_interval_start

    @property
    def duration(self) -> float | None:
        """Seconds from the run's start to its end."""
        if self.start_date is None or self.end_date is None:
            return None
        return (self.end_date - self.start_date).total_seconds()

    @property
    def owner_alive(self) -> bool:
        """Whether the process that works on the run is alive; False once the run has ended."""
        row = self._row
        return row.state == "running" and _owner_lives(row.owner_process, row.owner, row.heartbeat)

    def refresh(self) -> DagRun:
        """Read the run again, in place. Raises RunNotFound if it was deleted."""
        self._set(_read_run(self.db_path, self.dag_id, self.run_id)._row)
        return self

    def get_task_instances(self, state: str | Iterable[str] | None = None) -> list[TaskInstance]:
        """The run's task instances, in the order of the DAG's tasks; `state`: only of these."""
        rows = _read(self.db_path, lambda db: _select_instances(db, self._row.id))
        found = [_instance_of(row, self.dag_id, self.run_id) for row in rows]
        if state is None:
            return found
        wanted = {state} if isinstance(state, str) else set(state)
        return [ti for ti in found if ti.state in wanted]

    def get_task_instance(self, task_id: str, map_index: int = -1) -> TaskInstance | None:
        """The task instance of this id and index, or None."""
        rows = _read(self.db_path, lambda db: _select_instances(db, self._row.id, task_id))
        found = (_instance_of(row, self.dag_id, self.run_id) for row in rows)
        return next((ti for ti in found if ti.map_index == map_index), None)

    def xcom_pull(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """A stored value, or None. Unpickles it: only for databases whose writers you trust."""
        rows = _read(
            self.db_path, lambda db: _select_values(db, self._row.id, task_id, key), _ROW_LIMIT
        )
        data = dict(rows).get(map_index)
        return None if data is None else _load(data, self._script())

    def xcoms(self) -> list[XCom]:
        """Every stored value of the run: rows with `task_id`, `map_index`, `key`, `value`."""
        rows = _read(self.db_path, lambda db: _select_xcoms(db, self._row.id), _ROW_LIMIT)
        return [
            XCom(task_id, map_index, key, _load(data or b"", self._script()))
            for task_id, map_index, key, _, _, data in rows
        ]

    def _script(self) -> str | None:
        dags = _read(self.db_path, _select_dags)
        return next((d["fileloc"] for d in dags if d["dag_id"] == self.dag_id), None)

    def log(self, task_id: str, map_index: int = -1, try_number: int | None = None) -> str:
        """What a task printed: of its latest attempt, or of that of the given number."""
        rows = _read(
            self.db_path, lambda db: _select_log(db, self._row.id, task_id, map_index, try_number)
        )
        last = max((row[2] for row in rows), default=0)
        return "".join(row[3] for row in rows if row[2] == last)

    def clear(self, task_ids: str | Iterable[str], downstream: bool = True) -> list[str]:
        """Put tasks of a finished run back to be run, with all that hangs on them; the run is
        `queued`, and a resume runs just these again. Work inside the scope of a setup clears
        that setup and its teardowns, too. Returns the ids of the tasks.

        Raises TaskNotFound, AlreadyRunning; AirflowException if its values were deleted, which the
        tasks would need.
        """
        self._refuse_without_values()
        wanted = [task_ids] if isinstance(task_ids, str) else list(task_ids)
        instances = self.get_task_instances()
        known = {ti.task_id: ti for ti in instances}
        for task_id in wanted:
            if task_id not in known:
                raise TaskNotFound(
                    f"run {self.run_id!r} has no task {task_id!r}{_near(task_id, known)}"
                )
        chosen = _with_downstream(known, wanted) if downstream else set(wanted)
        chosen |= _scopes_of(known, chosen)
        self._write(lambda store: store.clear(self._row.id, chosen, self._refuse_live))
        self.refresh()
        return [task_id for task_id in known if task_id in chosen]

    def _refuse_without_values(self) -> None:
        if self._row.values_deleted is not None:
            raise AirflowException(
                f"the values of run {self.run_id!r} were deleted (prune --values), and its tasks "
                "would get none: start a new run"
            )

    def _write(self, act: Callable[[_Store], None]) -> None:
        store = _Store(self.db_path)
        try:
            _until_unlocked(self.db_path, lambda: act(store))
        finally:
            store.close()

    def _refuse_live(self, row: _RunRow | None) -> None:
        """Raises AlreadyRunning if somebody works on the run, RunNotFound if it is gone."""
        if row is None or row.run_id != self.run_id:
            raise RunNotFound(f"DAG {self.dag_id!r} has no run {self.run_id!r}")
        if row.state == "running" and _owner_lives(row.owner_process, row.owner, row.heartbeat):
            raise AlreadyRunning(f"run {self.run_id!r} is running: {_whose(row)}; stop it first")

    def delete(self) -> None:
        """Delete the run with its task instances, values and logs, and give the disk space back.

        Raises AlreadyRunning.
        """
        self._write(lambda store: store.delete_run(self._row.id, self._refuse_live))
        self._write(lambda store: store.give_back())

    def __repr__(self) -> str:
        return f"<DagRun {self.dag_id} {self.run_id} [{self.state}]>"


def _with_downstream(known: Mapping[str, TaskInstance], task_ids: Iterable[str]) -> set[str]:
    """The tasks and all that waited for them, near and far."""
    below: dict[str, list[str]] = {}
    for task_id, ti in known.items():
        for up in ti.upstream_task_ids:
            below.setdefault(up, []).append(task_id)
    found, following = set(task_ids), list(task_ids)
    while following:
        for task_id in below.get(following.pop(), ()):
            if task_id not in found:
                found.add(task_id)
                following.append(task_id)
    return found


def _scopes_of(known: Mapping[str, TaskInstance], task_ids: Iterable[str]) -> set[str]:
    """The setups whose scope the tasks stand in, and the teardowns of those."""
    found: set[str] = set()
    for setup, ti in known.items():
        if ti.role != "setup":
            continue
        teardowns = {
            task_id for task_id, other in known.items()
            if other.role == "teardown" and setup in other.upstream_task_ids
        }  # fmt: skip
        inside = _with_downstream(known, [setup]) - {setup}
        if inside & set(task_ids):
            found |= {setup, *teardowns}
    return found


def _dag_run_of(info: Mapping[str, Any]) -> DagRun:
    """The `dag_run` of a running task's context."""
    row = _RunRow(
        info["run_row"],
        info["dag_id"],
        info["run_id"],
        "running",
        None,
        info["logical_date"],
        info["start_date"],
        None,
        json.dumps(info["conf"]),
        None,
        None,
        None,
        None,
    )
    return DagRun(row, Path(info["db_path"] or "."))


def _read_runs(
    path: Path, dag_id: str | None, *, state: str | None = None, limit: int | None = None
) -> list[DagRun]:
    return [
        DagRun(row, path) for row in _read(path, lambda db: _select_runs(db, dag_id, state, limit))
    ]


def _read_run(path: Path, dag_id: str, run_id: str) -> DagRun:
    row = _read(path, lambda db: _find_run(db, dag_id, run_id))
    if row is None:
        known = [run for of, run in _read(path, _select_run_ids) if of == dag_id]
        raise RunNotFound(f"DAG {dag_id!r} has no run {run_id!r} in {path}{_near(run_id, known)}")
    return DagRun(row, path)


def _load_dag(dag_id: str, path: Path) -> Dag:
    dags = {d["dag_id"]: d for d in _read(path, _select_dags)}
    if dag_id not in dags:
        raise DagNotFound(f"there is no DAG {dag_id!r} in {path}{_near(str(dag_id), dags)}")
    found = dags[dag_id]
    made = _RecordedDag(
        dag_id,
        db_path=path,
        description=found["description"],
        doc_md=found["doc_md"],
        tags=_plain(found["tags"], list),
        schedule=found["schedule"],
    )
    made.fileloc = found["fileloc"]
    return made


_SHORTEST_PART = 4  # characters of a run's id that will do for the whole; fewer name it by chance


def _chosen_run(path: Path, name: str) -> DagRun:
    """The run that a command names: a DAG's id (its newest), `DAG/RUN`, or a part of a run id.

    Raises RunNotFound if none fits, or several do.
    """
    rows = _read(path, _select_run_ids)
    dags = {dag_id for dag_id, _ in rows} | {d["dag_id"] for d in _read(path, _select_dags)}
    if name in dags:
        newest = next((run_id for dag_id, run_id in rows if dag_id == name), None)
        if newest is None:
            raise RunNotFound(f"DAG {name!r} has no runs in {path}: there is nothing to show")
        return _read_run(path, name, newest)
    dag_id, slash, part = name.partition("/")
    if not slash or dag_id not in dags:
        dag_id, part = "", name
    among = [row for row in rows if not dag_id or row[0] == dag_id]
    exact = [row for row in among if row[1] == part]
    fits = exact or [row for row in among if part and part in row[1]]
    if len(fits) == 1 and (exact or len(part) >= _SHORTEST_PART):
        return _read_run(path, *fits[0])
    if fits:
        few = ", ".join(f"{d}/{r}" for d, r in fits[:5])
        raise RunNotFound(f"{name!r} fits {len(fits)} runs in {path}: {few}; name one as DAG/RUN")
    known = [*dags, *(run_id for _, run_id in rows)]
    raise RunNotFound(f"there is no DAG or run {name!r} in {path}{_near(name, known)}")


# --- Showing: Mermaid -----------------------------------------------------------------------------

_MAX_EDGES = 500  # what Mermaid's renderers draw unless configured otherwise
_MAX_TEXT = 50_000

# Fill and text colour both, so that they can be read on dark pages, too.
_STYLES = {
    "success": "fill:#d4edda,stroke:#28a745,color:#155724",
    "failed": "fill:#f8d7da,stroke:#dc3545,color:#721c24",
    "skipped": "fill:#fde2f3,stroke:#d63384,color:#6b1a41",
    "upstream_failed": "fill:#ffe5d0,stroke:#fd7e14,color:#7a3e06",
    "running": "fill:#cce5ff,stroke:#007bff,color:#004085",
    "up_for_retry": "fill:#fff3cd,stroke:#ffc107,color:#856404",
    "up_for_reschedule": "fill:#fff3cd,stroke:#ffc107,color:#856404",
    "removed": "fill:#e2e3e5,stroke:#6c757d,color:#383d41",
    "none": "fill:#ffffff,stroke:#6c757d,color:#383d41",
}


def _clean(text: object) -> str:
    """Text for a terminal: control characters, which could steer it, as visible escapes."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def _mermaid_text(text: str) -> str:
    """Text for a quoted Mermaid label: all but plain characters as `#codepoint;`."""
    text = text if len(text) <= 80 else text[:77] + "..."
    return re.sub(r"[^A-Za-z0-9 _.-]", lambda match: f"#{ord(match[0])};", text) or "#32;"


def _seconds_text(seconds: float | None) -> str:
    """A duration that a person can read: 40 ms, 0.3 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return ""
    if seconds < 0.001:
        return "<1 ms"
    if seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Box(NamedTuple):
    """A node of a diagram: its text, its state's style, what it waits for, the group it is in."""

    task_id: str
    lines: list[str]
    style: str
    upstream: Sequence[str]
    group: str | None = None


def _draw(boxes: Sequence[_Box], direction: str | None) -> str:
    """A Mermaid flowchart. Node ids are synthetic: many words would not parse as one."""
    ids = {box.task_id: f"n{i}" for i, box in enumerate(boxes)}
    lines = [f"flowchart {direction or _direction_of(boxes)}"]
    lines += _draw_group(None, _group_tree(boxes), ids, 1)
    for box in boxes:
        lines += [f"    {ids[up]} --> {ids[box.task_id]}" for up in box.upstream if up in ids]
    used = {box.style for box in boxes}
    lines += [f"    classDef {name} {style}" for name, style in _STYLES.items() if name in used]
    return "\n".join(lines) + "\n"


_MOST_ABREAST = 8  # boxes beside each other that can still be read on a page


def _direction_of(boxes: Sequence[_Box]) -> str:
    """TD, or LR for what would be so wide that renderers shrink it beyond reading."""
    layers = _layers({box.task_id: box.upstream for box in boxes})
    return "LR" if max(layers, default=0) > max(_MOST_ABREAST, len(layers)) else "TD"


def _layers(upstream: Mapping[str, Sequence[str]]) -> list[int]:
    """How many stand in each layer of a graph; nothing for one with a circle, which only a file
    that was tampered with has."""
    import graphlib

    known = {task_id: [up for up in ups if up in upstream] for task_id, ups in upstream.items()}
    sorter = graphlib.TopologicalSorter(known)
    layers = []
    with contextlib.suppress(graphlib.CycleError):
        sorter.prepare()
        while sorter.is_active():
            ready = sorter.get_ready()
            layers.append(len(ready))
            sorter.done(*ready)
    return layers


def _group_tree(boxes: Sequence[_Box]) -> dict[str | None, list[_Box | str]]:
    """The boxes and groups inside each group; None is the whole.

    A group's parent is the longest other group whose id its own begins with.
    """
    inside: dict[str | None, list[_Box | str]] = {None: []}
    names = sorted({box.group for box in boxes if box.group is not None})
    for name in names:
        around = [other for other in names if name.startswith(f"{other}.")]
        inside[name] = []
        inside[max(around, key=len, default=None)].append(name)
    for box in boxes:
        inside[box.group].append(box)
    return inside


def _draw_group(
    name: str | None,
    inside: Mapping[str | None, list[_Box | str]],
    ids: Mapping[str, str],
    depth: int,
) -> list[str]:
    indent = "    " * depth
    lines = []
    for member in inside[name]:
        if isinstance(member, str):
            number = list(inside).index(member)
            label = _mermaid_text(member.removeprefix(f"{name}."))
            lines.append(f'{indent}subgraph g{number}["{label}"]')
            lines += _draw_group(member, inside, ids, depth + 1)
            lines.append(f"{indent}end")
        else:
            label = "<br/>".join(map(_mermaid_text, member.lines))
            style = f":::{member.style}" if member.style else ""
            lines.append(f'{indent}{ids[member.task_id]}["{label}"]{style}')
    return lines


_DIRECTIONS = ("TD", "TB", "LR", "RL", "BT")


def _draw_dag(dag: Dag, direction: str | None) -> str:
    if direction not in (*_DIRECTIONS, None):
        raise ValueError(f"direction must be TD, TB, LR, RL or BT, found {_shown(direction)}")
    boxes = [
        _Box(t, [t], "", list(x._upstream), x.task_group.group_id if x.task_group else None)
        for t, x in dag.task_dict.items()
    ]
    return _draw(boxes, direction)


def _draw_run(instances: Sequence[TaskInstance], direction: str | None = None) -> str:
    """A run's task instances; those of a mapped task in one box."""
    tasks: dict[str, list[TaskInstance]] = {}
    for ti in instances:
        tasks.setdefault(ti.task_id, []).append(ti)
    boxes = []
    for task_id, members in tasks.items():
        if len(members) == 1:
            boxes.append(_box_of_one(members[0]))
        else:
            boxes.append(_box_of_many(task_id, members))
    return _draw(boxes, direction)


def _box_of_one(ti: TaskInstance) -> _Box:
    state = ti.state.value if ti.state is not None else "none"
    said = [state.replace("_", " ") if state != "none" else "no state"]
    if ti.duration is not None:
        said.append(_seconds_text(ti.duration))
    if ti.try_number > 1:
        said.append(f"try {ti.try_number}")
    lines = [_short_id(ti), " - ".join(said)]
    return _Box(ti.task_id, lines, state, sorted(ti.upstream_task_ids), ti.task_group_id)


def _short_id(ti: TaskInstance) -> str:
    """A task's id without the prefix that its group's frame shows."""
    return ti.task_id.removeprefix(f"{ti.task_group_id}.")


def _box_of_many(task_id: str, members: Sequence[TaskInstance]) -> _Box:
    counts = collections.Counter(
        ti.state.value if ti.state is not None else "none" for ti in members
    )
    worst = next(
        s
        for s in (
            "failed",
            "upstream_failed",
            "running",
            "up_for_retry",
            "up_for_reschedule",
            "none",
            "skipped",
            "removed",
            "success",
        )
        if s in counts
    )
    said = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in counts.most_common())
    upstream = sorted(set().union(*(ti.upstream_task_ids for ti in members)))
    lines = [f"{_short_id(members[0])} x {len(members)}", said]
    return _Box(task_id, lines, worst, upstream, members[0].task_group_id)


class _Span(NamedTuple):
    """A bar of a gantt: from and to in milliseconds of Unix time."""

    label: str
    tag: str  # Mermaid's: done, crit, active, or none
    start: int
    end: int


_GANTT_TAGS = {"success": "done", "failed": "crit", "interrupted": "crit", "running": "active"}
_GANTT_FOLD = 5  # mapped instances from which on a task has one bar for all


def _draw_gantt(title: str, attempts: Sequence[Sequence[Any]]) -> str:
    """A Mermaid gantt of when each attempt ran, and of the waits for a retry.

    `attempts`: (task_id, map_index, try_number, state, start_date, end_date).
    """
    spans = _spans(attempts)
    length = max((x.end for x in spans), default=0) - min((x.start for x in spans), default=0)
    axis = "%S.%L" if length < 10_000 else "%H:%M:%S" if length < 6 * 3600_000 else "%m-%d %H:%M"
    lines = ["gantt", f"    title {_mermaid_text(title)}", "    dateFormat x"]
    lines.append(f"    axisFormat {axis}")
    for span in spans:
        tag = f"{span.tag}, " if span.tag else ""
        # A word like `section` at its beginning would be read as one of Mermaid's.
        lines.append(f"    {_gantt_text(span.label)} :{tag}{span.start}, {span.end}")
    return "\n".join(lines) + "\n"


def _gantt_text(text: str) -> str:
    """A bar's name: its first letter as a code, so that it is no word of Mermaid's."""
    return f"#{ord(text[0])};{_mermaid_text(text[1:])}" if text[1:] else f"#{ord(text)};"


def _spans(attempts: Sequence[Sequence[Any]]) -> list[_Span]:
    tasks: dict[str, list[Sequence[Any]]] = {}
    for attempt in attempts:
        tasks.setdefault(attempt[0], []).append(attempt)
    spans = []
    for task_id, rows in tasks.items():
        if len({row[1] for row in rows}) >= _GANTT_FOLD:
            spans.append(_span_of_many(task_id, rows))
        else:
            spans += _spans_of_few(rows)
    return sorted((x for x in spans if x is not None), key=lambda x: (x.start, x.end))


def _spans_of_few(rows: Sequence[Sequence[Any]]) -> list[_Span]:
    spans = []
    before: Sequence[Any] | None = None
    for row in sorted(rows, key=lambda row: (row[1], row[2])):
        task_id, map_index, tries, state, start, end = row
        label = task_id if map_index < 0 else f"{task_id}[{map_index}]"
        if before is not None and before[1] == map_index and before[5] and start:
            waited = _milliseconds(start) - _milliseconds(before[5])
            if waited > 50 and before[3] == "failed":
                spans.append(
                    _Span(f"{label} waits", "", _milliseconds(before[5]), _milliseconds(start))
                )
        before = row
        if start is None:
            continue
        name = label if tries == 1 else f"{label} try {tries}"
        if state != "success":
            name += f" {state.replace('_', ' ')}" if state else " no state"
        first = _milliseconds(start)
        last = _milliseconds(end) if end is not None else _milliseconds(_utcnow())
        spans.append(_Span(name, _GANTT_TAGS.get(state, ""), first, max(last, first + 1)))
    return spans


def _span_of_many(task_id: str, rows: Sequence[Sequence[Any]]) -> _Span | None:
    started = [row for row in rows if row[4] is not None]
    if not started:
        return None
    first = min(_milliseconds(row[4]) for row in started)
    last = max(_milliseconds(row[5] or _utcnow()) for row in started)
    states = collections.Counter(row[3] or "no state" for row in started)
    said = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in states.most_common())
    tag = "crit" if "failed" in states else "active" if "running" in states else "done"
    label = f"{task_id} x {len({row[1] for row in rows})} {said}"
    return _Span(label, tag, first, max(last, first + 1))


def _milliseconds(moment: _datetime.datetime) -> int:
    return round(moment.timestamp() * 1000)


def _live_url(diagram: str) -> str:
    """A link that shows the diagram: it holds it, deflated, behind the `#`, which a browser does
    not send (the form is mermaid.live's own)."""
    import base64
    import zlib

    state = {"code": diagram, "mermaid": '{"theme": "default"}', "autoSync": True}
    packed = zlib.compress(json.dumps(state).encode(), 9)
    return f"https://mermaid.live/view#pako:{base64.urlsafe_b64encode(packed).decode().rstrip('=')}"


def _fenced(text: str, kind: str = "") -> str:
    """A Markdown code block around any text."""
    ticks = max([2, *(len(run) for run in re.findall("`+", text))]) + 1
    return f"{'`' * ticks}{kind}\n{text.rstrip()}\n{'`' * ticks}\n"


def _markdown(text: object) -> str:
    """Any text as plain text of a Markdown table's cell."""
    text = " ".join(_clean(text).split())
    return re.sub(r"[^\w\s.,:()=+/'-]", lambda match: f"&#{ord(match[0])};", text).replace(
        "_", "&#95;"
    )


def _too_large(diagram: str) -> str | None:
    """Why renderers at their defaults will refuse the diagram, if they will."""
    edges = diagram.count(" --> ")
    if edges > _MAX_EDGES or len(diagram) > _MAX_TEXT:
        return (
            f"the diagram has {edges} edges and {len(diagram):,} characters; Mermaid's renderers "
            f"refuse more than {_MAX_EDGES} and {_MAX_TEXT:,} unless configured otherwise"
        )
    return None


# --- Showing: tables ------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], color: bool = False) -> str:
    """Columns that line up, made safe for a terminal; with colours for states."""
    cells = [list(heads), *([_clean(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for row in cells:
        padded = [c + " " * (w - _width(c)) for c, w in zip(row, widths, strict=True)]
        padded[-1] = padded[-1].rstrip()
        if color:
            padded = [_paint(p, c) for p, c in zip(padded, row, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _local(moment: _datetime.datetime | None) -> str:
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _seen_instances(run: DagRun) -> list[TaskInstance]:
    """A run's task instances as they are shown: where nobody works on it, none is running."""
    instances = run.get_task_instances()
    if run.state is DagRunState.RUNNING and not run.owner_alive:
        for ti in instances:
            if ti.state is _S.RUNNING:
                ti.state = ti.start_date = None
    return instances


def _run_state(run: DagRun) -> str:
    """A run's state for people: one that nobody works on is not running."""
    return _state_text(run.state.value, run.owner_alive)


def _state_text(state: str, owner_alive: bool) -> str:
    return "running (owner dead)" if state == "running" and not owner_alive else str(state)


def _last_line(error: str | None) -> str:
    """The reason of a failure, short enough for a table."""
    lines = (error or "").strip().splitlines()
    reason = lines[-1] if lines else ""
    return reason if len(reason) <= 200 else f"{reason[:197]}..."


_LINE_SHOWN = 300  # characters of a line of output, where the last few are shown


def _tail(text: str, count: int = 10) -> list[str]:
    """The last lines of a task's output, made safe for a terminal, none of them endless."""
    lines = text[-100 * _LINE_SHOWN :].rstrip("\n").splitlines()[-count:]
    return [_clean(x if len(x) <= _LINE_SHOWN else f"{x[:_LINE_SHOWN]} [...]") for x in lines]


def _say(line: str) -> None:
    """A line on standard error; where nobody listens any more, nothing depends on it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# --- Showing: a run while it runs -----------------------------------------------------------------

_REDRAW = 0.1  # seconds between two drawings of the status
_TAIL_KEPT = 4000  # characters of a running task's output, to be shown if it fails
_Segments = list[tuple[str, str | None]]  # a line's parts, each with the state that colours it

_COLORS = {
    "success": "32",
    "failed": "31",
    "upstream_failed": "33",
    "up_for_retry": "33",
    "up_for_reschedule": "33",
    "skipped": "35",
    "running": "36",
}


def _may_redraw(stream: Any) -> bool:
    """Whether the stream is a terminal on which lines can be drawn again."""
    try:
        is_terminal = bool(stream.isatty())
    except (AttributeError, ValueError):  # None, or closed
        return False
    return is_terminal and os.environ.get("TERM", "dumb") != "dumb"


def _may_color(stream: Any) -> bool:
    """Whether colours are wanted there (the order is CPython's own)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or _may_redraw(stream)


def _paint(text: str, state: str | None) -> str:
    code = _COLORS.get(state or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and text else text


def _fit(segments: _Segments, width: int, color: bool) -> str:
    """A line cut to a width in columns, and coloured."""
    found = ""
    for text, state in segments:
        cut = ""
        for c in text:
            width -= _width(c)
            if width < 0:
                break
            cut += c
        found += _paint(cut, state) if color else cut
        if width < 0:
            break
    return found


class _Snapshot(NamedTuple):
    """A run at a moment: what its status shows."""

    counts: Mapping[str, int]  # of task instances by state; "" for none
    running: Sequence[tuple[str, float]]  # label, seconds since the start; the longest first
    seconds: float  # since the run's start


def _status_lines(now: _Snapshot, width: int, rows: int) -> list[_Segments]:
    """A bar, the counts, and what runs for how long, in at most so many rows."""
    total = sum(now.counts.values())
    ended = sum(now.counts.get(state.value, 0) for state in _ENDED)
    size = max(10, min(40, width - 40))
    done = size * ended // total if total else size
    bar = f"[{'=' * done}{'>' if done < size else ''}{' ' * (size - done - 1)}]"
    lines: list[_Segments] = [
        [(f"{bar} {ended}/{total} tasks, {_seconds_text(now.seconds)}", None)],
        _counted(now.counts),
    ]
    room = max(1, min(rows - 3, 8))
    shown = now.running if len(now.running) <= room else now.running[: room - 1]
    for label, seconds in shown:
        lines.append([("  ", None), (label, "running"), (f"  {_seconds_text(seconds)}", None)])
    if len(shown) < len(now.running):
        lines.append([(f"  ... and {len(now.running) - len(shown)} more", None)])
    return lines


def _counted(counts: Mapping[str, int]) -> _Segments:
    """`3 running, 2 failed, 40 to come`."""
    order = [*_COLORS, *(state for state in counts if state not in _COLORS)]
    segments: _Segments = []
    for state in order:
        if counts.get(state):
            text = f"{counts[state]} {state.replace('_', ' ') or 'to come'}"
            segments += [(", " if segments else "", None), (text, state)]
    return segments


class _Bottom:
    """The last lines of a terminal, which are drawn again and again."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._color = _may_color(stream)
        self._drawn = 0

    def size(self) -> tuple[int, int]:
        """Columns and rows, now."""
        import shutil

        try:
            found = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError, AttributeError):
            found = shutil.get_terminal_size()
        return max(found.columns, 20), max(found.lines, 5)

    def draw(self, now: _Snapshot) -> None:
        """Show the run as it is now, in place of what was drawn before."""
        width, rows = self.size()
        lines = [_fit(x, width - 1, self._color) for x in _status_lines(now, width, rows)]
        self._put("".join(f"{line}\n" for line in lines))
        self._drawn = len(lines)

    def clear(self) -> None:
        """Take the drawing away, so that lines can be written where it was."""
        if self._drawn:
            self._put("")
            self._drawn = 0

    def _put(self, text: str) -> None:
        if self._drawn:
            # Line by line: terminals that save what is cleared as a whole would fill with it.
            up = f"\x1b[{self._drawn}A"
            text = f"{up}\r" + "\x1b[2K\n" * self._drawn + up + text
        with contextlib.suppress(OSError, ValueError):  # nobody looks any more
            self._stream.write(text)
            self._stream.flush()


class _Screen:
    """Where people read of a run: lines on standard error, or given to `say`; on a terminal with
    a status below them. With `logs`, what tasks print goes to standard output."""

    def __init__(self, say: Callable[[str], object] | None = None, logs: bool = False) -> None:
        self._say = say
        self._color = say is None and _may_color(sys.stderr)
        self.logs = _LogLines() if logs else None
        # Logs that go through a pipe to the same terminal would be drawn over.
        apart = not logs or _may_redraw(sys.stdout)
        redraws = say is None and apart and _may_redraw(sys.stderr)
        self.bottom = _Bottom(sys.stderr) if redraws else None
        self._next = 0.0

    def line(self, text: str, state: str | None = None) -> None:
        """One line."""
        text = _clean(text)
        if self._say is not None:
            self._say(text)
            return
        self.clear()
        _say(_paint(text, state) if self._color else text)

    def output(self, label: str, text: str) -> None:
        """What a task printed."""
        if self.logs is not None:
            self.clear()
            self.logs.add(label, text)

    def status(self, snapshot: Callable[[], _Snapshot]) -> None:
        """Draw the status, if there is one and it is time."""
        now = time.monotonic()
        if self.bottom is not None and now >= self._next:
            self._next = now + _REDRAW
            self.bottom.draw(snapshot())

    def clear(self) -> None:
        """Take the status away."""
        if self.bottom is not None:
            self.bottom.clear()
            self._next = 0.0


class _LogLines:
    """Output of several tasks, on standard output, each line behind its task's name."""

    def __init__(self, prefixed: bool = True, raw: bool = False) -> None:
        self._prefixed = prefixed
        self._raw = raw
        self._open: str | None = None  # whose line has no end yet

    def add(self, label: str, text: str) -> None:
        """Show some more of a task's output."""
        text = text if self._raw else _clean(text)
        if not self._prefixed:
            self._write(text)
            return
        if self._open not in (None, label):
            self.end()
        shown = []
        for line in text.splitlines(keepends=True):
            shown.append(line if self._open == label else f"{_clean(label)} | {line}")
            self._open = None if line.endswith("\n") else label
        self._write("".join(shown))

    def end(self) -> None:
        """End a line that has no end."""
        if self._open is not None:
            self._open = None
            self._write("\n")

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            _write(text)
            if sys.stdout is not None:
                sys.stdout.flush()


class _Change(NamedTuple):
    """A change of an instance's state that is to be told once it is committed."""

    instance: _Instance
    state: TaskInstanceState | None
    try_number: int
    when: str
    seconds: float | None
    error: str | None


class _Report:
    """Tells what happens in a run: to the `liteflow` logger always, to `progress` if asked."""

    def __init__(self, progress: bool | Callable[[str], object] | _Screen) -> None:
        self._screen: _Screen | None = None
        if isinstance(progress, _Screen):
            self._screen = progress
        elif callable(progress):
            self._screen = _Screen(progress)
        elif progress:
            self._screen = _Screen()
        self._listens = self._screen is not None or _log.isEnabledFor(logging.INFO)
        self._began = time.monotonic()
        self._run = ""
        self._started: dict[_Instance, float] = {}
        self._states: dict[_Instance, TaskInstanceState | None] = {}
        self._counts: collections.Counter[TaskInstanceState | None] = collections.Counter()
        self._changes: list[_Change] = []
        self._tails: dict[_Instance, str] = {}
        self._ends: dict[_Attempt, str] = {}  # of long logs, which are written anew
        self._slowest: list[tuple[float, str]] = []
        self._plan: _Plan | None = None

    def tell(self, line: str, state: str | None = None) -> None:
        """One line for people."""
        _log.info("%s", line)
        if self._screen is not None:
            self._screen.line(line, state)

    def began(self, dag: Dag, run_id: str, path: Path, plan: _Plan) -> None:
        """The run starts."""
        self._plan, self._run = plan, f"{dag.dag_id}/{run_id}"
        self._where = f"--db {_quoted(_short_path(path))}"
        self.tell(f"run {run_id} of DAG {dag.dag_id!r}: {len(plan.nodes)} tasks, in {path}")
        if not plan.nodes:
            self.tell("the DAG has no tasks: a @task function makes one when it is called")
        if self._listens:
            for instance in plan.instances():
                if instance.state is not None:
                    self._note(instance)

    def _note(self, instance: _Instance) -> None:
        """Count an instance's state."""
        before = self._states.get(instance)
        if before is not None:
            self._counts[before] -= 1
        self._states[instance] = instance.state
        if instance.state is not None:
            self._counts[instance.state] += 1

    def changed(self, instance: _Instance, error: str | None = None) -> None:
        """An instance's state changed; told with the turn's `committed`."""
        if not self._listens:
            return
        self._note(instance)
        now, seconds = time.monotonic(), None
        if instance.state is _S.RUNNING:
            self._started[instance] = now
        elif (started := self._started.pop(instance, None)) is not None:
            seconds = now - started
            self._slowest = sorted([*self._slowest, (seconds, instance.label)])[-3:]
        when = _datetime.datetime.now().strftime("%H:%M:%S")
        self._changes.append(
            _Change(instance, instance.state, instance.try_number, when, seconds, error)
        )

    def withdrawn(self, instance: _Instance) -> None:
        """An instance that was said to run did not start after all."""
        if self._listens:
            self._note(instance)
            self._started.pop(instance, None)

    def committed(self, logs: Sequence[tuple[_Attempt, int, str]]) -> None:
        """What happened in a turn is recorded: tell it, with what tasks printed."""
        if not self._listens:
            return
        for attempt, part, text in logs:
            self._take_output(attempt, part, text)
        changes, self._changes = self._changes, []
        for change in changes:
            self._tell_change(change)
        if changes:
            self.tick()

    def _take_output(self, attempt: _Attempt, part: int, text: str) -> None:
        if self._screen is None:
            return
        instance = attempt.instance
        self._tails[instance] = (self._tails.get(instance, "") + text)[-_TAIL_KEPT:]
        if part == _TAIL_PART:
            self._ends[attempt] = text
        else:
            self._screen.output(instance.label, text)

    def _tell_change(self, change: _Change) -> None:
        instance, state = change.instance, change.state
        said = [change.when, instance.label, state.value if state is not None else "interrupted"]
        if change.try_number > 1:
            said.append(f"try {change.try_number}")
        if change.seconds is not None:
            said.append(_seconds_text(change.seconds))
        if state is not _S.SUCCESS and change.error:
            said.append(f"({_last_line(change.error)})")
        ended = state is not _S.RUNNING
        for attempt in [a for a in self._ends if ended and a.instance is instance]:
            text = self._ends.pop(attempt)
            if self._screen is not None:
                self._screen.output(instance.label, text)
        # On a terminal the status tells what runs; elsewhere every change is a line.
        if self._screen is None or self._screen.bottom is None or self._is_bad(state):
            self.tell("  ".join(said), state and state.value)
        if ended:
            tail = self._tails.pop(instance, "")
            if self._screen is not None and self._screen.bottom is not None and self._is_bad(state):
                self._tell_failure(instance, tail)

    @staticmethod
    def _is_bad(state: TaskInstanceState | None) -> bool:
        return state in (_S.FAILED, _S.UP_FOR_RETRY, None)

    def _tell_failure(self, instance: _Instance, tail: str) -> None:
        """On a terminal, at once: the last lines of the output, and how to see the rest."""
        if self._screen is None:
            return
        if self._screen.logs is None:
            for line in _tail(tail):
                self._screen.line(f"    | {line}")
        if instance.state is _S.FAILED:
            self._screen.line(
                f"    its output: {_own_command()} logs {_quoted(self._run)} "
                f"{_quoted(instance.label)} {self._where}"
            )

    def tick(self) -> None:
        """Time has passed: the status is drawn anew, if there is one."""
        if self._screen is not None and self._screen.bottom is not None:
            self._screen.status(self._snapshot)

    def _snapshot(self) -> _Snapshot:
        now = time.monotonic()
        assert self._plan is not None
        counts = {state.value: n for state, n in self._counts.items() if state is not None}
        begun = sum(n for state, n in self._counts.items() if state not in _ENDED)
        counts[""] = max(0, self._plan.unfinished - begun)
        running = sorted(
            ((i.label, now - started) for i, started in self._started.items()), key=lambda x: -x[1]
        )
        return _Snapshot(counts, running, now - self._began)

    def ended(self, run: DagRun) -> None:
        """The run ended: a summary."""
        if not self._listens:
            return
        if self._screen is not None:
            self._screen.clear()
            if self._screen.logs is not None:
                self._screen.logs.end()
        counts = _read(run.db_path, lambda db: _select_run_counts(db, run._row.id))
        each = ", ".join(
            f"{n} {state or 'not run'}" for state, n in sorted(counts.items(), key=str)
        )
        why = f" ({run.reason})" if run.reason else ""
        text = f"run {run.state}{why} after {_seconds_text(run.duration)}: {each or 'no tasks'}"
        self.tell(text, run.state.value)
        slowest = [f"{label} {_seconds_text(n)}" for n, label in self._slowest[::-1] if n >= 1]
        if slowest:
            self.tell(f"slowest: {', '.join(slowest)}")


# --- Command line ---------------------------------------------------------------------------------

_SCAFFOLD = '''\
"""A small ETL: run it with `python3 FILE`, see `python3 FILE --help`."""

from liteflow import DAG, task

with DAG("my_etl", description="Orders to a report") as dag:

    # A task is a function. A failed one is tried again, here twice, a second later.
    @task(retries=2, retry_delay=1)
    def extract() -> list[dict]:
        return [{"item": "tea", "price": 3}, {"item": "cake", "price": 4}]

    # What a task returns is handed on: taking it makes `total` wait for `extract`.
    @task
    def total(orders: list[dict]) -> int:
        return sum(order["price"] for order in orders)

    @task
    def report(orders: list[dict], amount: int) -> None:
        print(f"{len(orders)} orders, {amount} in total")

    @task
    def clean_up() -> None:
        print("nothing left behind")

    orders = extract()
    reported = report(orders, total(orders))

    # Where no data flows, `>>` sets the order.
    reported >> clean_up()

if __name__ == "__main__":
    dag.cli()
'''


def _write(text: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write(text)


def _fail(message: object) -> None:
    _say(f"liteflow: error: {_clean(message)}")


def _exit_code(act: Callable[[], int]) -> int:
    """Run a command; what went wrong is one sentence on standard error and an exit code.

    0 success, 1 the run failed, 2 bad usage, 3 the database can't be used, 75 already running,
    129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a stream that takes only ASCII
    try:
        code = act()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has seen enough; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _fail(f"the output can't be written: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    except DatabaseError as error:
        _fail(error)
        return 3
    except AlreadyRunning as error:
        _fail(error)
        return 75
    except AirflowException as error:
        _fail(error)
        return 2


def _parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    import argparse

    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", metavar="PATH", help="the database (default: liteflow.db)")
    parser.add_argument("--run-id", metavar="ID", help="the new run's id, or the one to resume")
    parser.add_argument("--logical-date", metavar="ISO", help="the date that the run is for")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the newest run, or --run-id"
    )
    parser.add_argument("--conf", metavar="JSON", help="a JSON object for the run")
    parser.add_argument("--max-workers", type=int, metavar="N", help="processes (default: CPUs)")
    parser.add_argument(
        "--pool", metavar="NAME=N", action="append", default=[], help="the size of a pool"
    )
    parser.add_argument(
        "--from", dest="from_task", metavar="TASK", action="append", default=[],
        help="run TASK of the newest run again, and what hangs on it",
    )  # fmt: skip
    parser.add_argument("--wait", action="store_true", help="wait while another run rules it out")
    parser.add_argument("--quiet", action="store_true", help="say nothing unless the run fails")
    parser.add_argument("--logs", action="store_true", help="show what the tasks print, prefixed")
    parser.add_argument(
        "--task", metavar="TASK",
        help="run TASK (or TASK[INDEX]) of the newest run, or of --run-id, here and now, with its "
        "recorded inputs; nothing is recorded, and breakpoint() works",
    )  # fmt: skip
    parser.add_argument(
        "--graph", action="store_true", help="print the DAG as Mermaid; run nothing"
    )


_RUN_EPILOG = """examples:
  %(prog)s                              run it
  %(prog)s --conf '{"limit": 3}'        with parameters
  %(prog)s --resume                     go on with a run that failed or was cut off
  %(prog)s --from load                  run `load` again, and what hangs on it
  %(prog)s --task load                  run `load` alone, in a debugger, recording nothing
  %(prog)s --graph                      draw it, without running

exit codes: 0 success, 1 the run failed, 2 bad usage, 3 the database can't be used,
75 already running, 129/130/143 ended by SIGHUP/SIGINT/SIGTERM"""


def _dag_cli(dag: Dag, argv: Sequence[str] | None) -> int:
    prog = os.path.basename(sys.argv[0]) or "workflow"
    parser = _parser(prog, f"Run the DAG {dag.dag_id!r}. {dag.description or ''}", _RUN_EPILOG)
    _add_run_options(parser)
    options = parser.parse_args(argv)
    return _run_or_debug(dag, options, _script_command())


def _run_or_debug(dag: Dag, options: argparse.Namespace, command: str) -> int:
    """Run the DAG, or with --task one task; `command` is how the same is started again."""
    _fill_standard_descriptors()
    if options.task is None:
        return _exit_code(lambda: _run_by_options(dag, options, command))
    prepared: list[_Job] = []

    def prepare() -> int:
        prepared.append(_job_again(dag, options))
        return 0

    code = _exit_code(prepare)
    if not prepared:
        return code
    [job] = prepared
    label = job.task_id if job.map_index < 0 else f"{job.task_id}[{job.map_index}]"
    if job.task.execution_timeout is not None:
        _say(f"note: the execution_timeout of {label!r} does not apply here")
    try:
        # Not within _exit_code: what the task raises is to be seen whole, by a debugger, too.
        print(f"{label} returned {_run_again(job)!r}")
    except AirflowSkipException as skip:
        print(f"{label} skipped: {skip}")
    return 0


def _job_again(dag: Dag, options: argparse.Namespace) -> _Job:
    """A task of a recorded run, ready to run here with its recorded inputs."""
    others = "resume from_task conf graph logs max_workers pool wait logical_date quiet".split()
    for name in others:
        if getattr(options, name) not in (None, False, []):
            option = "--" + name.removesuffix("_task").replace("_", "-")
            raise _UsageError(f"--task runs one task, here: it can't be combined with {option}")
    path = _database_path(options.db, dag)
    dag.validate()
    run = _newest_or_named(path, dag.dag_id, options.run_id)
    task_id, index = _task_in(run, options.task)
    task = dag.task_dict.get(task_id)
    if task is None:
        raise _UsageError(f"DAG {dag.dag_id!r} has no task {task_id!r} any more")
    found = {ti.map_index: ti for ti in run.get_task_instances() if ti.task_id == task_id}
    if index is None:
        failed = [i for i, ti in found.items() if ti.state is _S.FAILED]
        index = min(failed or found)
    return _recorded_job(dag, run, found[index], task)


def _newest_or_named(path: Path, dag_id: str, run_id: str | None) -> DagRun:
    """The run that `--run-id` names, else the newest. Raises RunNotFound."""
    if run_id is not None:
        return _read_run(path, dag_id, run_id)
    runs = _read_runs(path, dag_id, limit=1)
    if not runs:
        raise RunNotFound(f"DAG {dag_id!r} has no run in {path} to go on from")
    return runs[0]


def _recorded_job(dag: Dag, run: DagRun, ti: TaskInstance, task: BaseOperator) -> _Job:
    row = run._row
    recorded = {
        (each.task_id, each.map_index): _Recorded(each.state, each.try_number, each.max_tries)
        for each in run.get_task_instances()
    }
    stored = _read(run.db_path, lambda db: _select_xcoms(db, row.id, values=False))
    lengths = _read(run.db_path, lambda db: _select_lengths(db, row.id))
    plan = _Plan(dag, run.logical_date, recorded, lengths)
    request = _Request(dag, run.db_path, run.run_id, run.logical_date, run.conf, False, {})
    info = _run_info(request, _Opened(run.run_id, run.logical_date, run.conf, None))
    info["run_row"] = row.id
    call = _dump_call(task)
    node = plan._by_id[task.task_id]
    _check_inputs(run, recorded, node, call)
    extra, takes = _elements_of(plan, node, ti.map_index, call, lambda element: element)
    inputs: dict[tuple[str, str], list[tuple[int, bytes | None]]] = {}
    for up, key in takes:
        own = plan._in_step(plan._by_id[up], node)
        index = ti.map_index if own else -1
        if dag.task_dict[up]._mapping is None or own:
            there = any(x[:3] == (up, index, key) for x in stored)
            inputs[up, key] = [(index, None)] if there else []
    message = (
        task.task_id, _function_name(task), ti.map_index, max(1, ti.try_number), ti.max_tries,
        _iso(_utcnow()), call.data, None, inputs, None, extra,
    )  # fmt: skip
    return _Job(_WorkerRun(info, dag), ("run", "", *message))


def _check_inputs(
    run: DagRun, recorded: Mapping[tuple[str, int], _Recorded], node: _Node, call: _Call
) -> None:
    """Raises _UsageError if the results that a task takes are not there."""
    sources = [up.task.task_id for up in node.expansion.sources] if node.expansion else []
    for up in [*sources, *(task_id for task_id, _ in call.takes)]:
        run._refuse_without_values()
        states = {each.state for (task_id, _), each in recorded.items() if task_id == up}
        if states.isdisjoint({_S.SUCCESS}) and states.isdisjoint({_S.SKIPPED}):
            said = ", ".join(sorted(state.value if state else "not run" for state in states))
            raise _UsageError(
                f"task {up!r}, whose result {node.task.task_id!r} takes, is {said or 'not there'} "
                f"in run {run.run_id!r}"
            )


def _run_again(job: _Job) -> Any:
    """Run a job in this process; what it raises comes through, and nothing is recorded.

    What it returns is looked at as a worker does, which may refuse it.
    """
    token = _job.set(job)
    try:
        args, kwargs = job.arguments()
        task: Any = job.task._made(kwargs)
        if task.pre_execute is not None:
            task.pre_execute(job.context)
        result = task._run(args, kwargs, job)
        if task.post_execute is not None:
            task.post_execute(job.context, result)
        _store_result(job, result)
        return result
    finally:
        _job.reset(token)


def _script_command() -> str:
    """How the running script is started."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return f"python3 -m {spec.name.removesuffix('.__main__')}"
    return f"python3 {_quoted(_short_path(sys.argv[0]))}"


def _short_path(path: str | os.PathLike[str]) -> str:
    """A path as one types it: relative, if that is shorter; whole, where it is read elsewhere."""
    whole = os.path.abspath(path)
    if not _may_redraw(sys.stderr):
        return whole
    try:
        return min(os.path.relpath(whole), whole, key=len)
    except (ValueError, OSError):  # another drive; a working directory that is gone
        return whole


def _run_by_options(dag: Dag, options: argparse.Namespace, command: str) -> int:
    if options.graph:
        dag.validate()
        _write(_draw_dag(dag, None))
        return 0
    if options.from_task:
        _clear_from(dag, options)
    screen = None if options.quiet else _Screen(logs=options.logs)
    try:
        run = _run_dag(
            dag,
            db_path=options.db,
            run_id=options.run_id,
            logical_date=_date_option(options.logical_date),
            conf=_conf_option(options.conf),
            resume=options.resume or bool(options.from_task),
            pools=_pool_options(options.pool) or None,
            max_workers=options.max_workers,
            wait=options.wait,
            progress=screen or False,
        )
    except (ValueError, TypeError) as error:
        raise _UsageError(str(error)) from None
    except (KeyboardInterrupt, SystemExit):
        if screen is not None:
            screen.clear()
        _say(f"to go on: {command} --resume{_db_option(options)}")
        raise
    if run.state is DagRunState.SUCCESS:
        if not options.quiet:
            _name_failures(run, command, options, tails=False)
        return 0
    if options.quiet:
        _say(_clean(f"run {run.run_id} of DAG {run.dag_id!r} failed: {run.reason or 'see below'}"))
    _name_failures(run, command, options, tails=screen is None or screen.bottom is None)
    _say(f"to go on once it is mended: {command} --resume{_db_option(options)}")
    return 1


def _db_option(options: argparse.Namespace) -> str:
    """The option that names the database again, unless it is what the DAG itself says."""
    found = options.db or os.environ.get("LITEFLOW_DB")
    return f" --db {_quoted(_short_path(found))}" if found else ""


def _name_failures(run: DagRun, command: str, options: argparse.Namespace, tails: bool) -> None:
    """What failed, why, the last lines of its output, and the commands that show more."""
    failed = run.get_task_instances(state="failed")
    where = f"--db {_quoted(_short_path(run.db_path))}"
    for ti in failed[:10]:
        _say(f"{_label(ti)} failed: {_clean(_last_line(ti.error))}")
        text = run.log(ti.task_id, ti.map_index) if tails else ""
        for line in _tail(text):
            _say(f"    | {line}")
        name = _quoted(f"{run.dag_id}/{run.run_id}")
        _say(f"  its output: {_own_command()} logs {name} {_quoted(_label(ti))} {where}")
        again = f"--task {_quoted(_label(ti))} --run-id {_quoted(run.run_id)}"
        _say(f"  in a debugger: {command} {again}{_db_option(options)}")
    if len(failed) > 10:
        _say(f"... and {len(failed) - 10} more")


def _own_command() -> str:
    """How this module is started as a command from here."""
    here = Path(__file__).absolute()
    if __name__ != "liteflow" or "site-packages" in here.parts or here.parent == Path.cwd():
        return f"python3 -m {__name__}"
    return f"python3 {_quoted(_short_path(here))}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _clear_from(dag: Dag, options: argparse.Namespace) -> None:
    """`--from TASK`: clear it in the newest run, or in --run-id."""
    run = _newest_or_named(_database_path(options.db, dag), dag.dag_id, options.run_id)
    cleared = run.clear(options.from_task)
    if not options.quiet:
        _say(f"again in run {run.run_id}: {', '.join(cleared)}")


def _pool_options(texts: Iterable[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        if not name or not size.isdecimal():
            raise _UsageError(f"--pool must be NAME=N, found {text!r}")
        sizes[name] = int(size)
    return sizes


def _date_option(text: str | None) -> _datetime.datetime | None:
    if text is None:
        return None
    try:
        return _datetime.datetime.fromisoformat(text)
    except ValueError:
        raise _UsageError(f"--logical-date must be an ISO date or time, found {text!r}") from None


def _conf_option(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        conf = json.loads(text)
    except ValueError as error:
        raise _UsageError(f"--conf must be JSON: {error}; found {_shown(text)}") from None
    if not isinstance(conf, dict):
        raise _UsageError(f"--conf must be a JSON object, found {_shown(text)}")
    return conf


def _cmd_run(options: argparse.Namespace) -> int:
    """Run a DAG of a file, loaded as a worker loads a script: its main guard is not met."""
    import types

    path = Path(options.file).absolute()
    if not path.is_file():
        raise _UsageError(f"{path} is a directory" if path.is_dir() else f"there is no file {path}")
    main_module = types.ModuleType("__mp_main__")
    main_module.__file__ = str(path)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    try:
        code = compile(path.read_bytes(), str(path), "exec")
        exec(code, vars(main_module))
    except AirflowException:
        raise
    except Exception as error:  # the user's file may raise anything; it is shown whole
        raise _UsageError(f"{path} can't be loaded:\n{_traceback(error)}") from None
    found = {dag.dag_id: dag for dag in list(_built.values()) if dag._module == "__main__"}
    chosen = _chosen_dag(found, options.dag, path)
    which = f" {_quoted(chosen.dag_id)}" if options.dag is not None else ""
    command = f"{_own_command()} run {_quoted(_short_path(path))}{which}"
    return _run_or_debug(chosen, options, command)


def _chosen_dag(found: Mapping[str, Dag], dag_id: str | None, path: Path) -> Dag:
    if dag_id is not None:
        if dag_id not in found:
            raise _UsageError(f"{path} defines no DAG {dag_id!r}{_near(dag_id, found)}")
        return found[dag_id]
    if not found:
        raise _UsageError(
            f"{path} defines no DAG when it is imported: build it at the top level of the file, "
            'not below `if __name__ == "__main__":`'
        )
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise _UsageError(f"{path} defines {len(found)} DAGs ({names}): name one")
    return next(iter(found.values()))


def _cmd_scaffold(options: argparse.Namespace) -> int:
    _write(_SCAFFOLD)
    return 0


# --- Command line: looking ------------------------------------------------------------------------

_FOLD = 10  # mapped instances from which on a task is one line
_SHOWN = 20  # of its failed ones that are shown all the same
_POLL = 0.5  # seconds between two looks at a live run


def _cmd_visualize(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    if options.output is not None:
        return _draw_to_file(run, options)
    diagram = _gantt_of(run) if options.gantt else _flowchart_of(run, options.direction)
    _write(f"{_live_url(diagram)}\n" if options.url else diagram)
    warning = _too_large(diagram)
    if warning is not None:
        _say(f"liteflow: {warning}")
    return 0


def _flowchart_of(run: DagRun, direction: str | None) -> str:
    return _draw_run(_seen_instances(run), direction)


def _gantt_of(run: DagRun) -> str:
    rows = _read(run.db_path, lambda db: _select_attempts(db, run._row.id))
    attempts = [(*row[:4], _moment(row[4]), _moment(row[5])) for row in rows]
    if not run.owner_alive:  # what reads `running` ended with its scheduler, at some time after
        beat = _moment(run._row.heartbeat)
        attempts = [
            (*a[:3], "interrupted", a[4], beat and a[4] and max(beat, a[4]))
            if a[3] == "running"
            else a
            for a in attempts
        ]
    if not any(attempt[4] for attempt in attempts):
        raise _UsageError(f"no task of run {run.run_id!r} has started: there is nothing to draw")
    return _draw_gantt(f"{run.dag_id} {run.run_id}", attempts)


def _draw_to_file(run: DagRun, options: argparse.Namespace) -> int:
    path = Path(options.output)
    if options.url:
        raise _UsageError("--url prints a link: leave --output out")
    if path.suffix == ".md":
        text = _page_of(run, options.direction)
    elif path.suffix == ".mmd":
        text = _gantt_of(run) if options.gantt else _flowchart_of(run, options.direction)
    else:
        raise _UsageError(f"--output must end in .mmd (the diagram) or .md (a page), found {path}")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _UsageError(f"{path} can't be written: {error.strerror}") from None
    _say(f"wrote {path}")
    return 0


def _page_of(run: DagRun, direction: str | None) -> str:
    """A Markdown page of a run: what ran, its two diagrams, its tasks, the errors and logs."""
    instances = _seen_instances(run)
    parts = [
        f"# {_markdown(run.dag_id)}: {_markdown(_run_state(run))}\n",
        f"Run {_markdown(run.run_id)}, {_local(run.start_date)}"
        + (f", {_seconds_text(run.duration)}" if run.duration is not None else "")
        + f": {_markdown(_counts_text(instances))}."
        + (f" {_markdown(run.reason)}." if run.reason else "")
        + "\n",
        _fenced(_draw_run(instances, direction), "mermaid"),
    ]
    if any(ti.start_date for ti in instances):
        parts.append(_fenced(_gantt_of(run), "mermaid"))
    parts.append("| task | state | try | start | duration | error |\n| - | - | - | - | - | - |")
    for row in _instance_rows(instances, everything=False):
        parts[-1] += f"\n| {' | '.join(map(_markdown, row))} |"
    parts[-1] += "\n"
    failed = [ti for ti in instances if ti.state in (_S.FAILED, _S.UP_FOR_RETRY)]
    for ti in failed[:_SHOWN]:
        parts.append(f"## {_markdown(_label(ti))}\n")
        if ti.error:
            parts.append(_fenced(_clean(ti.error), "text"))
        tail = _tail(run.log(ti.task_id, ti.map_index), 50)
        if tail:
            parts += ["The end of its log:\n", _fenced("\n".join(tail), "text")]
    if len(failed) > _SHOWN:
        parts.append(f"... and {len(failed) - _SHOWN} more that failed.\n")
    return "\n".join(parts)


def _counts_text(instances: Iterable[TaskInstance]) -> str:
    counts = collections.Counter(_state_of(ti) or "not run" for ti in instances)
    return ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in counts.most_common())


def _cmd_list(options: argparse.Namespace) -> int:
    path = _database_path(options.db, None)
    if options.max_age is not None and not options.check:
        raise _UsageError("--max-age is for --check")
    most = None if options.max_age is None else _age_option("--max-age", options.max_age)
    successes = _read(path, _select_successes)
    dags = []
    for found in _read(path, _select_dags):
        newest = found.pop("newest")
        found["tags"] = _plain(found["tags"], list)
        found["last_run"] = None if newest is None else _run_document(DagRun(newest, path))
        found["last_success"] = successes.get(found["dag_id"])
        dags.append(found)
    if options.check:
        dags = _in_trouble(path, dags, most)
    if options.json:
        print(json.dumps(dags, indent=2))
    elif dags or not options.check:
        print(_dag_table(dags, options.check))
    return 1 if options.check and dags else 0


def _dag_table(dags: Sequence[dict[str, Any]], trouble: bool) -> str:
    heads = ["DAG", "RUNS", "LAST STATE", "LAST RUN", "LAST SUCCESS", "DESCRIPTION"]
    rows: list[Sequence[object]] = []
    for found in dags:
        last: dict[str, Any] = found["last_run"] or {}
        rows.append(
            (
                found["dag_id"],
                found["runs"],
                _state_text(last.get("state", ""), last.get("owner_alive", False)),
                _when(_moment(last.get("start_date"))),
                _ago(_moment(found["last_success"])) or "never",
                found["trouble"] if trouble else found["description"] or "",
            )
        )
    if trouble:
        heads[-1] = "TROUBLE"
    return _table(heads, rows, color=_may_color(sys.stdout))


def _in_trouble(
    path: Path, dags: Iterable[dict[str, Any]], most: _datetime.timedelta | None
) -> list[dict[str, Any]]:
    """The DAGs whose newest run is no success, or whose last success is too old.

    Of a run that is under way nothing is known yet: the one before it counts.
    """
    found = []
    for each in dags:
        trouble = _trouble_of(path, each, most)
        if trouble is not None:
            found.append({**each, "trouble": trouble})
    return found


def _trouble_of(
    path: Path, dag: Mapping[str, Any], most: _datetime.timedelta | None
) -> str | None:
    runs = (run for run in _read_runs(path, dag["dag_id"]) if not run.owner_alive)
    ended = next(runs, None)
    if ended is None:
        return "no run has ended yet"
    if ended.state is not DagRunState.SUCCESS:
        return f"run {ended.run_id} is no success: {_run_state(ended)}"
    success = _moment(dag["last_success"])
    if most is not None and (success is None or _utcnow() - success > most):
        return "the last success is too old"
    return None


def _run_document(run: DagRun) -> dict[str, Any]:
    """A run as `--json` prints it."""
    return {
        "dag_id": run.dag_id,
        "run_id": run.run_id,
        "state": run.state,
        "owner_alive": run.owner_alive,
        "reason": run.reason,
        "logical_date": run._row.logical_date,
        "start_date": run._row.start_date,
        "end_date": run._row.end_date,
        "conf": run.conf,
    }


def _cmd_runs(options: argparse.Namespace) -> int:
    path = _database_path(options.db, None)
    if options.dag is not None:
        _load_dag(options.dag, path)
    runs = _runs_asked_for(path, options)
    errors = _read(path, lambda db: [_select_failures(db, run._row.id, 3) for run in runs])
    if options.json:
        documents = [
            {
                **_run_document(run),
                "failed": count,
                "errors": [
                    {"task_id": t, "map_index": i, "error": _last_line(e)} for t, i, e in rows
                ],
            }
            for run, (count, rows) in zip(runs, errors, strict=True)
        ]
        print(json.dumps(documents, indent=2))
        return 0
    rows = [
        (
            f"{run.dag_id}/{run.run_id}",
            _run_state(run),
            _when(run.start_date),
            _seconds_text(run.duration),
            _why_failed(run, *failures),
        )
        for run, failures in zip(runs, errors, strict=True)
    ]
    print(_table(("RUN", "STATE", "START", "DURATION", "ERROR"), rows, _may_color(sys.stdout)))
    return 0


def _runs_asked_for(path: Path, options: argparse.Namespace) -> list[DagRun]:
    if options.limit < 1:
        raise _UsageError(f"--limit must be 1 or more, found {options.limit}")
    since = None
    if options.since is not None:
        since = _iso(_utcnow() - _age_option("--since", options.since))
    state = options.state
    # A run that reads `running`, and nobody works on, has failed.
    asked = None if state in ("failed", "running") else state
    limit = options.limit if asked == state else None  # else chosen from below
    rows = _read(path, lambda db: _select_runs(db, options.dag, asked, limit, since))
    runs = [DagRun(row, path) for row in rows]
    if state == "running":
        runs = [run for run in runs if run.owner_alive]
    elif state == "failed":
        runs = [
            run
            for run in runs
            if run.state is DagRunState.FAILED
            or (run.state is DagRunState.RUNNING and not run.owner_alive)
        ]
    return runs[: options.limit]


def _why_failed(run: DagRun, count: int, rows: Sequence[tuple[str, int, str]]) -> str:
    """A run's own reason, and the first errors of its tasks."""
    said = [run.reason] if run.reason else []
    for task_id, index, error in rows:
        label = task_id if index < 0 else f"{task_id}[{index}]"
        said.append(f"{label}: {_last_line(error)}")
    if run.state is DagRunState.SUCCESS:
        return ""
    if count > len(rows):
        said.append(f"and {count - len(rows)} more")
    return "; ".join(said)


def _cmd_show(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    if options.task is not None and options.state is not None:
        raise _UsageError("--state is for the tasks of a run: leave TASK out")
    if options.follow:
        run = _follow_run(run)
    code = int(options.follow and run.state is not DagRunState.SUCCESS)
    if options.task is not None:
        _show_task(run, options.task, options.json)
        return code
    instances = _seen_instances(run)
    if options.state is not None:
        wanted = None if options.state == "none" else options.state
        instances = [ti for ti in instances if ti.state == wanted]
    if options.json:
        document = {**_run_document(run), "task_instances": [_document(ti) for ti in instances]}
        print(json.dumps(document, indent=2))
    else:
        _show_run(run, instances, everything=options.state is not None)
    return code


def _show_run(run: DagRun, instances: Sequence[TaskInstance], everything: bool) -> None:
    said = [f"{run.dag_id}/{run.run_id}: {_run_state(run)}", _when(run.start_date)]
    said.append(_seconds_text(run.duration))
    print(_clean(", ".join(x for x in said if x)))
    if run.reason:
        print(_clean(run.reason))
    rows = _instance_rows(instances, everything)
    heads = ("TASK", "STATE", "TRY", "START", "DURATION", "ERROR")
    print(_table(heads, rows, _may_color(sys.stdout)))


def _instance_rows(
    instances: Sequence[TaskInstance], everything: bool
) -> list[tuple[object, ...]]:
    """A line for each task instance; those of a mapped task in one, but for what failed."""
    tasks: dict[str, list[TaskInstance]] = {}
    for ti in instances:
        tasks.setdefault(ti.task_id, []).append(ti)
    rows = []
    for members in tasks.values():
        if everything or len(members) < _FOLD:
            rows += [_instance_row(ti) for ti in members]
            continue
        rows.append(_folded_row(members))
        failed = [ti for ti in members if ti.state is _S.FAILED]
        rows += [_instance_row(ti) for ti in failed[:_SHOWN]]
        if len(failed) > _SHOWN:
            more = len(failed) - _SHOWN
            rows.append((f"... {more} more of {members[0].task_id}", "failed", "", "", "", ""))
    return rows


def _instance_row(ti: TaskInstance) -> tuple[object, ...]:
    return (
        _label(ti),
        _state_of(ti),
        ti.try_number or "",
        _when(ti.start_date),
        _seconds_text(ti.duration if ti.state is not _S.RUNNING else _since(ti.start_date)),
        _last_line(ti.error),
    )


def _folded_row(members: Sequence[TaskInstance]) -> tuple[object, ...]:
    starts = [ti.start_date for ti in members if ti.start_date is not None]
    ends = [ti.end_date for ti in members if ti.end_date is not None]
    took = (max(ends) - min(starts)).total_seconds() if starts and ends else None
    return (
        f"{members[0].task_id} x {len(members)}",
        _counts_text(members),
        max(ti.try_number for ti in members) or "",
        _when(min(starts, default=None)),
        _seconds_text(took),
        "",
    )


def _since(start: _datetime.datetime | None) -> float | None:
    return None if start is None else max(0.0, (_utcnow() - start).total_seconds())


def _follow_run(run: DagRun) -> DagRun:
    """Show a live run until it ends: its status on a terminal, else a line for what changes."""
    bottom = _Bottom(sys.stderr) if _may_redraw(sys.stderr) else None
    row, said = run._row.id, ""
    try:
        while run.state is DagRunState.RUNNING and run.owner_alive:
            counts, running = _read(
                run.db_path, lambda db: (_select_run_counts(db, row), _select_running(db, row))
            )
            now = _Snapshot(
                {state or "": n for state, n in counts.items()},
                [
                    (t if i < 0 else f"{t}[{i}]", _since(_moment(start)) or 0.0)
                    for t, i, start in running
                ],
                _since(run.start_date) or 0.0,
            )
            line = "".join(text for text, _ in _counted(now.counts))
            if bottom is not None:
                bottom.draw(now)
            elif line != said:
                _say(f"{_datetime.datetime.now():%H:%M:%S}  {line}")
                said = line
            time.sleep(_POLL)
            run.refresh()
    finally:
        if bottom is not None:
            bottom.clear()
    return run


def _state_of(ti: TaskInstance) -> str:
    """A state for people: one that was cut off has none, but it did start."""
    if ti.state is None:
        return "interrupted" if ti.try_number and ti.start_date is None else ""
    return ti.state.value


def _label(ti: TaskInstance) -> str:
    return ti.task_id if ti.map_index < 0 else f"{ti.task_id}[{ti.map_index}]"


def _document(ti: TaskInstance) -> dict[str, Any]:
    return {
        "task_id": ti.task_id,
        "map_index": ti.map_index,
        "state": ti.state,
        "try_number": ti.try_number,
        "max_tries": ti.max_tries,
        "start_date": ti.start_date and _iso(ti.start_date),
        "end_date": ti.end_date and _iso(ti.end_date),
        "error": ti.error,
        "upstream_task_ids": sorted(ti.upstream_task_ids),
    }


def _task_in(run: DagRun, name: str) -> tuple[str, int | None]:
    """`task` or `task[3]` of a run, as (task_id, map_index). Raises _UsageError."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    task_id, index = (match[1], int(match[2])) if match else (name, None)
    known = {(ti.task_id, ti.map_index) for ti in run.get_task_instances()}
    ids = {known_id for known_id, _ in known}
    if task_id not in ids:
        raise _UsageError(f"run {run.run_id!r} has no task {name!r}{_near(task_id, ids)}")
    if index is not None and (task_id, index) not in known:
        raise _UsageError(f"task {task_id!r} of run {run.run_id!r} has no index {index}")
    return task_id, index


def _show_task(run: DagRun, name: str, as_json: bool) -> None:
    task_id, index = _task_in(run, name)
    row = run._row.id

    def of_index(map_index: int) -> bool:
        return index is None or map_index == index

    found = _read(run.db_path, lambda db: _select_attempts(db, row, task_id))
    attempts = [a[1:] for a in found if of_index(a[1])]
    values = _read(run.db_path, lambda db: _select_xcoms(db, row, task_id, values=False))
    values = [x for x in values if of_index(x[1])]
    instances = [
        ti for ti in _seen_instances(run) if ti.task_id == task_id and of_index(ti.map_index)
    ]
    if as_json:
        names = ("map_index", "try_number", "state", "start_date", "end_date", "pid", "error")
        document = {
            "task_instances": [_document(ti) for ti in instances],
            "attempts": [dict(zip(names, a, strict=True)) for a in attempts],
            "xcoms": [
                {"map_index": x[1], "key": x[2], "type": x[3], "preview": x[4]} for x in values
            ],
        }
        print(json.dumps(document, indent=2))
        return
    print(_clean(f"{run.dag_id}/{run.run_id} {name}: {_counts_text(instances)}"))
    if len(instances) >= _FOLD:
        shown = {ti.map_index for ti in instances if ti.state is _S.FAILED}
        shown = set(sorted(shown)[:_SHOWN]) or {ti.map_index for ti in instances[:_SHOWN]}
        attempts = [a for a in attempts if a[0] in shown]
        values = [x for x in values if x[1] in shown]
        instances = [ti for ti in instances if ti.map_index in shown]
        print(f"of these, {len(shown)} are shown here; {_clean(task_id)}[INDEX] shows one")
    _show_attempts(run, instances, attempts, values)


def _show_attempts(
    run: DagRun,
    instances: Sequence[TaskInstance],
    attempts: Iterable[Sequence[Any]],
    values: Sequence[Sequence[Any]],
) -> None:
    """A task's attempts, its values, and the error and the end of the log of what failed."""
    rows = [
        (
            a[1] if a[0] < 0 else f"[{a[0]}] {a[1]}",
            a[2] or "",
            _when(_moment(a[3])),
            _attempt_duration(a),
            a[5] or "",
            _last_line(a[6]),
        )
        for a in attempts
    ]
    heads = ("TRY", "STATE", "START", "DURATION", "PID", "ERROR")
    print(_table(heads, rows, _may_color(sys.stdout)))
    if values:
        print()
        keys = (x[2] if x[1] < 0 else f"[{x[1]}] {x[2]}" for x in values)
        cells = [(key, x[3], x[4]) for key, x in zip(keys, values, strict=True)]
        print(_table(("XCOM", "TYPE", "VALUE"), cells))
    for ti in instances:
        if ti.error:
            print(f"\n{_clean(_label(ti))}:\n{_clean(ti.error)}")
    for ti in instances if len(instances) == 1 else [t for t in instances if t.error][:3]:
        text = run.log(ti.task_id, ti.map_index)
        if text:
            count = text.rstrip("\n").count("\n") + 1
            more = f", the last 10 of {count} lines" if count > 10 else ""
            print(f"\nlog of {_clean(_label(ti))}{more}:")
            print("\n".join(f"    | {line}" for line in _tail(text)))


def _attempt_duration(attempt: Sequence[Any]) -> str:
    start, end = _moment(attempt[3]), _moment(attempt[4])
    return _seconds_text((end - start).total_seconds()) if start and end else ""


def _cmd_logs(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    task_id, index = _task_in(run, options.task) if options.task is not None else (None, None)
    row = run._row.id
    if options.follow:
        return _follow_logs(run, task_id, index, options.raw)
    tries = options.try_number
    if tries is not None and not 1 <= tries <= max(
        (ti.try_number for ti in run.get_task_instances() if task_id in (None, ti.task_id)),
        default=0,
    ):
        raise _UsageError(f"there was no attempt {tries} in run {run.run_id!r}")
    parts = _read(run.db_path, lambda db: _select_log(db, row, task_id, index, tries))
    many, ending = len({part[:3] for part in parts}) > 1, ""
    shown = None
    for part_task, map_index, tries, text in parts:
        if shown != (part_task, map_index, tries):
            shown = (part_task, map_index, tries)
            if many:
                name = part_task if map_index < 0 else f"{part_task}[{map_index}]"
                _write(f"{ending}--- {_clean(name)}, try {tries}\n")
        text = text if options.raw else _clean(text)
        ending = "" if text.endswith("\n") else "\n"
        _write(text)
    _write(ending if parts else "")
    return 0


def _follow_logs(run: DagRun, task_id: str | None, index: int | None, raw: bool) -> int:
    """Show what is stored of the output, and what comes, until the run ends."""
    row, after = run._row.id, 0
    lines = _LogLines(prefixed=task_id is None, raw=raw)
    ends: dict[tuple[str, int, int], str] = {}  # of long logs, which are written anew
    while True:
        # In this order: what comes before the end is seen after it was looked for.
        live = run.refresh().owner_alive
        while True:
            parts = _read(
                run.db_path,
                lambda db: _select_new_log(db, row, task_id, index, after),  # noqa: B023
            )
            after = parts[-1][0] if parts else after
            for _, part_task, map_index, tries, part, text in parts:
                label = part_task if map_index < 0 else f"{part_task}[{map_index}]"
                if part == _TAIL_PART:
                    ends[label, map_index, tries] = text
                else:
                    lines.add(label, text)
            if not parts:
                break
        if not live:
            for (label, _, _), text in ends.items():
                lines.add(label, text)
            lines.end()
            return 0
        time.sleep(_POLL)


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _age_option(name: str, text: str) -> _datetime.timedelta:
    """`90m`, `24h`, `30d`. Raises _UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise _UsageError(f"{name} must be a number and one of s, m, h, d, w, found {text!r}")
    try:
        return _datetime.timedelta(seconds=float(match[1]) * _UNITS[match[2]])
    except OverflowError:
        raise _UsageError(f"{name} is too long: {text!r}") from None


def _when(moment: _datetime.datetime | None) -> str:
    """A time for people: the day only if it is not today."""
    if moment is None:
        return ""
    here = moment.astimezone()
    if here.date() == _datetime.datetime.now().date():
        return f"{here:%H:%M:%S}"
    return f"{here:%Y-%m-%d %H:%M}"


def _ago(moment: _datetime.datetime | None) -> str:
    """How long ago: 40 s, 5 min, 3 h, 2 d."""
    if moment is None:
        return ""
    seconds = max(0.0, (_utcnow() - moment).total_seconds())
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // unit)} {name} ago"
    return f"{int(seconds // 86400)} d ago"


# --- Command line: keeping ------------------------------------------------------------------------


def _cmd_stop(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    if run.state is not DagRunState.RUNNING:
        raise _UsageError(f"run {run.run_id!r} is not running: it is {run.state.value}")
    if not run.owner_alive:
        raise _UsageError(
            f"run {run.run_id!r} is not running: its scheduler died; resume it, or start another"
        )
    store = _Store(run.db_path)
    try:
        _until_unlocked(run.db_path, lambda: store.request_stop(run._row.id))
    finally:
        store.close()
    _say(f"asked run {run.run_id!r} to stop")
    while run.refresh().owner_alive:
        time.sleep(0.2)
    if run.state is DagRunState.RUNNING:
        raise _UsageError(f"the scheduler of run {run.run_id!r} died meanwhile: resume the run")
    _say(f"it has stopped: {run.state}")
    return 0


def _cmd_clear(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    cleared = run.clear(options.task, downstream=not options.only)
    print(f"cleared in run {run.run_id!r}: {', '.join(cleared)}; resume it to run them again",
          file=sys.stderr)  # fmt: skip
    return 0


def _cmd_delete(options: argparse.Namespace) -> int:
    run = _chosen_run(_database_path(options.db, None), options.run)
    if options.dry_run:
        run._refuse_live(run._row)
        _say(f"would delete run {run.run_id!r} of DAG {run.dag_id!r}")
        return 0
    run.delete()
    _say(f"deleted run {run.run_id!r} of DAG {run.dag_id!r}")
    return 0


def _cmd_prune(options: argparse.Namespace) -> int:
    """Delete old runs, or with --values the values of successful ones."""
    if options.keep is None and options.older_than is None and not options.values:
        raise _UsageError("prune takes --keep N, --older-than AGE, --values, or several of them")
    if options.keep is not None and options.keep < 0:
        raise _UsageError(f"--keep must be 0 or more, found {options.keep}")
    path = _database_path(options.db, None)
    if options.dag is not None:
        _load_dag(options.dag, path)
    before = None
    if options.older_than is not None:
        before = _iso(_utcnow() - _age_option("--older-than", options.older_than))
    rows = _read(path, lambda db: _select_old_runs(db, options.dag, options.keep, before))
    runs = [run for run in (DagRun(row, path) for row in rows) if not run.owner_alive]
    if options.values:
        runs = [run for run in runs if run.state is DagRunState.SUCCESS]
    what = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    what = f"the values of {what}" if options.values else what
    if options.dry_run:
        for run in runs:
            print(_clean(f"{run.dag_id}/{run.run_id}  {_run_state(run)}  {_when(run.start_date)}"))
        _say(f"would delete {what}")
        return 0
    size = path.stat().st_size
    if runs:
        _prune(path, runs, options.values)
    saved = max(0, size - path.stat().st_size)
    _say(f"deleted {what}: {saved:,} bytes given back")
    return 0


def _prune(path: Path, runs: Iterable[DagRun], values: bool) -> None:
    """Delete the runs one by one, so that others are never kept waiting for long."""
    store = _Store(path)
    try:
        for run in runs:
            act = store.drop_values if values else store.delete_run
            with contextlib.suppress(AlreadyRunning, RunNotFound):  # since we looked
                _until_unlocked(path, lambda: act(run._row.id, run._refuse_live))  # noqa: B023
        _until_unlocked(path, store.give_back)
    finally:
        store.close()


def _cmd_backup(options: argparse.Namespace) -> int:
    """Copy the database, also a live one, as it is at one moment."""
    path, target = _database_path(options.db, None), Path(options.file).absolute()
    if target.exists():
        raise _UsageError(f"{target} is there already: a backup goes to a new file")
    if not target.parent.is_dir():
        raise _UsageError(f"directory {target.parent} does not exist")
    coming = target.with_name(f"{target.name}.{os.urandom(4).hex()}")
    try:
        _read(path, lambda db: _copy_database(db, coming))
        coming.rename(target)
    except OSError as error:
        raise _UsageError(f"{target} can't be written: {error.strerror}") from None
    finally:
        coming.unlink(missing_ok=True)
    _say(f"copied {path} to {target}: {target.stat().st_size:,} bytes")
    return 0


_EPILOG = """examples:
  python3 -m liteflow scaffold > my_workflow.py      a workflow to start from
  python3 my_workflow.py                             run it
  python3 -m liteflow runs --since 24h --state failed   what went wrong since yesterday
  python3 -m liteflow show my_etl                    the tasks of the newest run
  python3 -m liteflow logs my_etl report             what a task printed
  python3 -m liteflow visualize my_etl --output page.md   draw it, with its errors

RUN is a DAG's id (its newest run), DAG/RUN, or a unique part of a run's id.
exit codes: 0 success, 1 the run failed, 2 bad usage, 3 the database can't be used,
75 already running, 129/130/143 ended by SIGHUP/SIGINT/SIGTERM"""

_EXAMPLES = {
    "run": """
  %(prog)s flow.py                   the one DAG of the file
  %(prog)s flow.py etl --resume      one of several; go on with its newest run
  %(prog)s flow.py --quiet           for cron: no word unless it fails""",
    "scaffold": """
  %(prog)s > my_workflow.py""",
    "visualize": """
  %(prog)s etl > run.mmd             the newest run of `etl`, as a flowchart
  %(prog)s etl --gantt               when each attempt ran
  %(prog)s etl --output run.md       a page: both diagrams, tasks, errors, logs
  %(prog)s etl --url                 a link that holds the diagram""",
    "list": """
  %(prog)s                           with the age of each DAG's last success
  %(prog)s --check --max-age 26h     exits 1, and says why, if one is in trouble""",
    "runs": """
  %(prog)s etl                       the runs of a DAG
  %(prog)s --since 24h --state failed   what failed since yesterday, and why""",
    "show": """
  %(prog)s etl                       the tasks of the newest run of `etl`
  %(prog)s etl load                  a task's attempts, values, error, end of its log
  %(prog)s etl --state failed        only what failed, every mapped instance
  %(prog)s etl --follow              a live run, until it ends; exits 1 if it failed""",
    "logs": """
  %(prog)s etl                       all that the newest run printed
  %(prog)s etl load[3] --try 1       one attempt
  %(prog)s etl --follow              of a live run, until it ends""",
    "clear": """
  %(prog)s etl load                  then: python3 flow.py --resume""",
    "stop": """
  %(prog)s etl""",
    "prune": """
  %(prog)s --older-than 30d --dry-run   what would go
  %(prog)s etl --keep 10             all but the ten newest runs of `etl`
  %(prog)s --values                  keep history and logs, drop values of successes""",
    "delete": """
  %(prog)s etl/manual__2026-01-31""",
    "backup": """
  %(prog)s copy.db                   also while a run writes""",
}


def _main_parser() -> argparse.ArgumentParser:
    parser = _parser("liteflow", "Run DAGs of tasks, and see what ran.", _EPILOG)
    parser.add_argument("--version", action="version", version=_version_text())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, act: Callable[[Any], int], text: str, db: bool = True) -> Any:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"examples:{_EXAMPLES[name]}",
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        command.set_defaults(act=act)
        if db:
            command.add_argument("--db", metavar="PATH", help="the database (default: liteflow.db)")
        return command

    run = add("run", _cmd_run, "run a DAG of a file", db=False)
    run.add_argument("file", metavar="FILE")
    run.add_argument("dag", metavar="DAG", nargs="?", help="which, if the file defines several")
    _add_run_options(run)
    add("scaffold", _cmd_scaffold, "print a small workflow to start from", db=False)
    _add_looking(add)
    clear = add("clear", _cmd_clear, "put tasks of a finished run back, for a resume to run again")
    clear.add_argument("run", metavar="RUN")
    clear.add_argument("task", metavar="TASK", nargs="+")
    clear.add_argument("--only", action="store_true", help="not what hangs on them")
    stop = add("stop", _cmd_stop, "end a run that another process works on")
    stop.add_argument("run", metavar="RUN")
    _add_keeping(add)
    return parser


def _add_looking(add: Callable[..., Any]) -> None:
    visualize = add("visualize", _cmd_visualize, "draw a run as a Mermaid flowchart")
    visualize.add_argument("run", metavar="DAG_OR_RUN")
    visualize.add_argument("--gantt", action="store_true", help="when each attempt ran, instead")
    visualize.add_argument(
        "--direction", choices=_DIRECTIONS, help="of the flowchart (default: TD, LR if wide)"
    )
    visualize.add_argument("--output", metavar="FILE", help="write FILE: .mmd, or .md for a page")
    visualize.add_argument("--url", action="store_true", help="print a mermaid.live link instead")
    listing = add("list", _cmd_list, "the DAGs that ran")
    listing.add_argument("--json", action="store_true", help="print one JSON document")
    listing.add_argument("--check", action="store_true", help="only those in trouble; 1 if any")
    listing.add_argument("--max-age", metavar="AGE", help="how old a last success may be: 26h, 2d")
    runs = add("runs", _cmd_runs, "the runs, newest first")
    runs.add_argument("dag", metavar="DAG", nargs="?")
    runs.add_argument("--since", metavar="AGE", help="those that began in the last 24h, 7d, ...")
    runs.add_argument("--state", choices=("queued", "running", "success", "failed"))
    runs.add_argument("--limit", type=int, metavar="N", default=50, help="at most N (default: 50)")
    runs.add_argument("--json", action="store_true", help="print one JSON document")
    show = add("show", _cmd_show, "the tasks of a run, or one task's attempts and values")
    show.add_argument("run", metavar="RUN")
    show.add_argument("task", metavar="TASK", nargs="?")
    show.add_argument("--state", choices=(*sorted(_TASK_STATES), "none"), help="only those")
    show.add_argument("--follow", action="store_true", help="until a live run ends")
    show.add_argument("--json", action="store_true", help="print one JSON document")
    logs = add("logs", _cmd_logs, "what a run's tasks printed")
    logs.add_argument("run", metavar="RUN")
    logs.add_argument("task", metavar="TASK", nargs="?")
    logs.add_argument("--try", dest="try_number", type=int, metavar="N", help="only attempt N")
    logs.add_argument("--follow", action="store_true", help="also what comes, until the run ends")
    logs.add_argument("--raw", action="store_true", help="leave escape sequences as they are")


def _add_keeping(add: Callable[..., Any]) -> None:
    prune = add("prune", _cmd_prune, "delete old runs, and give the space back")
    prune.add_argument("dag", metavar="DAG", nargs="?")
    prune.add_argument("--keep", type=int, metavar="N", help="keep the N newest of each DAG")
    prune.add_argument("--older-than", metavar="AGE", help="only those that began before: 30d, 12w")
    prune.add_argument(
        "--values", action="store_true", help="only the values of successful runs; keep the rest"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would go")
    delete = add("delete", _cmd_delete, "delete a run with its values and logs")
    delete.add_argument("run", metavar="RUN")
    delete.add_argument("--dry-run", action="store_true", help="say what would go")
    backup = add("backup", _cmd_backup, "copy the database, also while a run writes")
    backup.add_argument("file", metavar="FILE", help="the new file")


def _version_text() -> str:
    import platform
    import sqlite3

    return (
        f"liteflow {__version__} (Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `python3 -m liteflow`; returns the exit code.

    See `--help`. argparse itself ends the process with code 2 on wrong usage.
    """
    _fill_standard_descriptors()
    options = _main_parser().parse_args(argv)
    return _exit_code(lambda: options.act(options))


if __name__ == "__main__":
    # Run under the module's own name: a workflow that imports liteflow gets this same module.
    import importlib

    if __spec__ is None:  # started by its path
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    _own_name = __spec__.name if __spec__ is not None else Path(__file__).stem
    sys.exit(importlib.import_module(_own_name).main())
