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

`python3 FILE` runs it; `python3 -m liteflow` shows what ran (see `--help`). Names, defaults, states
and meanings are Airflow's, so a workflow moves to Airflow by changing its import line.

How a run works, and who may do what:

     your script -- builds -->  Dag  (tasks and edges: plain objects, no I/O)
                                 | run()
                                 v
        +-----------------  run loop  ----------------+   _Plan: a pure state machine; no I/O,
        |      ready -> started -> finished           |   time is passed in
        +-----+--------------------------------^------+
          job | (bytes)                        | outcome (state, values as bytes, error, log)
              v                                |
        Runner: one queue that slots pull from, each a ProcessPoolExecutor(max_workers=1) or,
              |       where that is safe, a process forked from here; or any
              |       concurrent.futures.Executor; or this process
              v                                |
        worker process: find the task, load its arguments, run it, pickle the result

        _Store (SQLite): a run under way is written by its loop alone, one transaction a turn

A run: queued (submitted to a WorkerPool, or cleared) -> running -> success | failed; or queued ->
failed (cancelled, or it could not begin). A resume goes on with a run that failed or was cleared,
or whose process died.

States of a task instance (None: not decided yet), and what may follow:

    None -> queued | skipped | upstream_failed | removed | failed (lost too often)
    queued -> running | what it was before (withdrawn: no worker had begun it)
    running -> success | failed | skipped | up_for_retry | up_for_reschedule | None (interrupted)
    up_for_retry, up_for_reschedule -> queued | skipped | None (interrupted)
    any ended state -> None (cleared, or decided anew by a resume) | removed (gone from the code)
    (One that may have killed its scheduler is running before it is sent; a withdrawal undoes that.)

The sections stand under headings `# --- Name: part ---`, and each depends on those above it alone,
apart from one-line calls downwards: errors and states, signals, building, plan, store, values,
worker, runners, run, reading back, showing, command line. Where to begin with a change:

    a setting of tasks or DAGs   the class of its owner: `name: type = _setting(default, check)`
    who runs, and when           `_Node.decide` (trigger rules, setups), `_Plan` (limits, retries)
    what a resume runs again     `_Resumption`, and `_Start._resumption`, which feeds it
    a table or column            `_SCHEMA` and `_ADDED_COLUMNS`, then the looks that read it
    what scheduler and worker    `_Worker` and `_SlotRunner`: a message of a kind that one side
      say to each other            sends is taken in by the other's method `_on_<kind>`
    a command or its options     `_COMMANDS` and `_RUN_OPTIONS`, then `_cmd_<name>`
"""

from __future__ import annotations

import bisect
import builtins
import codecs
import collections
import contextlib
import contextvars
import datetime as _datetime
import enum
import errno
import functools
import gc
import heapq
import io
import itertools
import json
import marshal
import math
import operator
import os
import re
import reprlib
import stat
import sys
import threading
import time
import types
import warnings
import weakref

if __name__ == "__main__":
    # Run this code again as the module of its own name, so that a workflow that imports liteflow
    # gets this same module.
    # If this is no .py file (a link that serves as a command, say), its target is the module.
    _own_path = __file__ if __file__.endswith(".py") else os.path.realpath(__file__)
    _own_name = __spec__.name if __spec__ else os.path.splitext(os.path.basename(_own_path))[0]
    _own = sys.modules[_own_name] = types.ModuleType(_own_name)
    _own.__file__, _own.__spec__ = __file__, __spec__  # frames are recognized by this file
    if __spec__ and __spec__.parent:  # a package has its modules as attributes
        setattr(sys.modules[__spec__.parent], _own_name.rpartition(".")[2], _own)
    exec(sys._getframe().f_code, vars(_own))
    _code = _own.main()
    if "__mp_main__" not in sys.modules and hasattr(gc, "freeze"):  # no workflow was loaded
        gc.freeze()  # the exit takes a third of the time when it collects no garbage
    sys.exit(_code)

from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence


class _LazyModule:
    """A stand-in that imports its module at its first use: most processes need few of these."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        package = globals()[self._name.partition(".")[0]] = __import__(self._name)
        return getattr(package, attribute)


TYPE_CHECKING = False  # a type checker takes it for true
if not TYPE_CHECKING:
    import select

    for _name in """argparse asyncio base64 concurrent.futures copy ctypes difflib fcntl glob
        graphlib hashlib html importlib.util inspect logging mmap multiprocessing pathlib queue
        resource shlex shutil signal site socket sqlite3 tempfile traceback typing zlib""".split():
        globals()[_name.partition(".")[0]] = _LazyModule(_name)

    # Stand-ins for names of typing, which takes long to import: annotations are only text here.
    Any = NoReturn = Self = R = T = _RunFuture = object
    P = ...

    class Generic:
        __slots__ = ()
        __class_getitem__ = classmethod(types.GenericAlias)

    def overload(function):
        return function

    def dataclass_transform():
        return overload

    class _TupleType(type):  # typing.NamedTuple is slow, as it compiles each field's annotation
        def __new__(cls, name, bases, body):
            fields = body["__annotations__"]
            defaults = [body.pop(field) for field in fields if field in body]
            base = collections.namedtuple(name, fields, defaults=defaults)
            return type(name, (base,), {**body, "__slots__": ()})

    _NamedTuple = type.__new__(_TupleType, "_NamedTuple", (), {})

else:
    import argparse
    import asyncio
    import base64
    import concurrent.futures
    import copy
    import ctypes
    import difflib
    import glob
    import graphlib
    import hashlib
    import html
    import importlib.util
    import inspect
    import logging
    import mmap
    import multiprocessing.connection
    import multiprocessing.context
    import multiprocessing.util
    import pathlib
    import queue
    import resource
    import shlex
    import shutil
    import signal
    import site
    import socket
    import sqlite3
    import tempfile
    import traceback
    import typing
    import zlib
    from concurrent.futures import Future
    from typing import Any, Generic, NoReturn, Self, dataclass_transform, overload
    from typing import NamedTuple as _NamedTuple

    P = typing.ParamSpec("P")
    R = typing.TypeVar("R", covariant=True)
    T = typing.TypeVar("T")
    fcntl: Any = None  # this and `select` lack names on macOS, which a checker there would report
    select: Any = None

    class _RunFuture(Future["DagRun"]):
        dag_id: str
        run_id: str


__all__ = [
    "DAG", "AirflowDagCycleException", "AirflowException", "AirflowFailException",
    "AirflowRescheduleException", "AirflowSensorTimeout", "AirflowSkipException",
    "AirflowTaskTerminated", "AirflowTaskTimeout",
    "AlreadyRunning", "BaseBranchOperator", "BaseOperator", "BaseSensorOperator", "BashOperator",
    "BranchPythonOperator", "Context", "Dag", "DagNotFound", "DagRun", "DagRunAlreadyExists",
    "DagRunFailed", "DagRunState", "DatabaseError", "DuplicateTaskIdFound", "EdgeModifier",
    "EmptyOperator", "FailFastDagInvalidTriggerRule", "Label", "NodeNotFound", "Param",
    "ParamValidationError", "PokeReturnValue", "PythonOperator", "PythonSensor", "RunNotFound",
    "ShortCircuitOperator", "TaskAlreadyInTaskGroup", "TaskGroup", "TaskInstance",
    "TaskInstanceState", "TaskNotFound", "TriggerRule", "UnmappableXComLengthPushed",
    "UnmappableXComTypePushed", "UnreachableTask", "Variable", "WeightRule", "WorkerPool", "XCom",
    "XComArg", "XComForMappingNotPushed", "XComNotFound", "chain", "chain_linear",
    "cross_downstream", "dag", "get_current_context", "main", "setup", "task", "task_group",
    "teardown",
]  # fmt: skip
__version__ = "0.1.0"

_StrPath = str | os.PathLike[str]
# The clock of waits and limits: tests of programs replace time.monotonic itself, to freeze time.
_monotonic: Callable[[], float] = time.monotonic
if hasattr(time, "clock_gettime"):  # not on Windows; UPTIME_RAW (macOS) does not count sleep
    _clock = getattr(time, "CLOCK_UPTIME_RAW", None) or time.CLOCK_MONOTONIC
    _monotonic = functools.partial(time.clock_gettime, _clock)
Context = dict[str, Any]
"""The context of a running task: a plain dict with Airflow's keys (`ti`, `dag_run`, `ds`, ...)."""
_Condition = Callable[[Context], Any]
_InstanceKey = tuple[str, int]  # a task instance's task_id, and its map_index: -1 if not mapped


# --- Errors and states ----------------------------------------------------------------------------


class AirflowException(Exception):
    """The base of liteflow's own exceptions (the name is Airflow's)."""


class AirflowSkipException(AirflowException):
    """Raised in a task: the task is skipped at once and never retried."""


class AirflowFailException(AirflowException):
    """Raised in a task: the task fails at once, without its remaining retries."""


class AirflowRescheduleException(AirflowException):
    """Raised in a task: it gives its worker back until this time; then the attempt goes on."""

    def __init__(self, reschedule_date: _datetime.datetime) -> None:
        super().__init__(reschedule_date)
        _of_type(_datetime.datetime)("reschedule_date", reschedule_date)
        self.reschedule_date = _aware(reschedule_date)


class AirflowSensorTimeout(AirflowException):
    """A sensor waited longer than its timeout; fails without retry."""


class XComForMappingNotPushed(AirflowException, TypeError):
    """A task that others expand over returned None."""


class UnmappableXComTypePushed(AirflowException, TypeError):
    """A task that others expand over returned text, or no sequence or dict at all."""


class UnmappableXComLengthPushed(AirflowException, ValueError):
    """A task that others expand over returned more elements than a mapping may have."""


class TaskAlreadyInTaskGroup(AirflowException):
    """Never raised here (a task can't join a second group); an `except` for Airflow may name it."""


class AirflowDagCycleException(AirflowException):
    """The tasks wait for each other in a circle; the message shows it."""


class DuplicateTaskIdFound(AirflowException):
    """The DAG already has a task or group of this id."""


class TaskNotFound(AirflowException):
    """The DAG, or the run, has no task of this id, or the task no such instance."""


class NodeNotFound(TaskNotFound, KeyError):
    """`dag[id]` found neither a task nor a group of this id."""

    __str__ = Exception.__str__  # KeyError's shows the message as a repr


class XComNotFound(AirflowException):
    """No value of this key: of an upstream without multiple_outputs, or in a run that is read."""


class ParamValidationError(AirflowException, ValueError):
    """A parameter's value does not fit its schema, or is missing."""


class FailFastDagInvalidTriggerRule(AirflowException):
    """A DAG with fail_fast=True only allows the trigger rule all_success."""


class AirflowTaskTimeout(BaseException):
    """Raised inside a task that outlives its execution_timeout; a BaseException, as in Airflow."""


class AirflowTaskTerminated(BaseException):
    """Raised inside a task whose process is told to end (SIGTERM)."""


# They come from outside the task, at any moment: the code under way is not their cause.
_FROM_OUTSIDE = KeyboardInterrupt, AirflowTaskTimeout, AirflowTaskTerminated


class DatabaseError(AirflowException):
    """The database file can't be used: missing, not liteflow's, newer, locked, full, read-only."""

    _may_pass = True  # the disk may be full for a moment: a run in line is tried again


class DagNotFound(AirflowException, LookupError):
    """The database has no DAG of this id."""


class RunNotFound(AirflowException, LookupError):
    """The database has no such run, or more than one fits."""


class AlreadyRunning(AirflowException):
    """The run is under way already, or other runs of its DAG are (see max_active_runs)."""


class DagRunAlreadyExists(AirflowException, ValueError):
    """The DAG has a run of this id already, in whatever state."""


class DagRunFailed(AirflowException):
    """What `DagRun.raise_if_failed` raises: `run` is the run; the text names tasks and reasons."""

    def __init__(self, text: str, run: Any = None) -> None:  # None: while it is unpickled
        super().__init__(text)
        self.run: DagRun = run


class UnreachableTask(AirflowException):
    """A task's function or argument can't reach a worker process, or no worker can be started."""

    _may_pass = False  # true if a worker was killed at its start, say, or found no room


class _UsageError(AirflowException, ValueError):
    """An argument of a command is wrong, in itself or for this graph or database."""


class _Empty(DatabaseError):
    """The database has no tables yet."""


class _Busy(DatabaseError):
    """Somebody else holds the database's write lock; try again."""


class TaskInstanceState(enum.StrEnum):
    """States of a task instance; one that has no state yet has None in its place."""

    QUEUED, RUNNING, SUCCESS, FAILED, SKIPPED = "queued", "running", "success", "failed", "skipped"
    UPSTREAM_FAILED, UP_FOR_RETRY = "upstream_failed", "up_for_retry"
    UP_FOR_RESCHEDULE, REMOVED = "up_for_reschedule", "removed"


class DagRunState(enum.StrEnum):
    """States of a run."""

    QUEUED, RUNNING, SUCCESS, FAILED = "queued", "running", "success", "failed"


class TriggerRule(enum.StrEnum):
    """When a task runs, by the states of the tasks it waits for."""

    ALL_SUCCESS, ALL_FAILED, ALL_DONE = "all_success", "all_failed", "all_done"
    ALL_DONE_MIN_ONE_SUCCESS, ONE_SUCCESS = "all_done_min_one_success", "one_success"
    ONE_FAILED, ONE_DONE, NONE_FAILED = "one_failed", "one_done", "none_failed"
    NONE_FAILED_MIN_ONE_SUCCESS, NONE_SKIPPED = "none_failed_min_one_success", "none_skipped"
    ALL_SKIPPED, ALWAYS = "all_skipped", "always"
    ALL_DONE_SETUP_SUCCESS = "all_done_setup_success"


class WeightRule(enum.StrEnum):
    """Which tasks' priority weights are added to a task's own."""

    DOWNSTREAM, UPSTREAM, ABSOLUTE = "downstream", "upstream", "absolute"


_S = TaskInstanceState
if not TYPE_CHECKING:  # Python 3.11 takes ten times as long to look a member up in its enum
    _S = types.SimpleNamespace(**_S.__members__)
_ENDED = frozenset({_S.SUCCESS, _S.FAILED, _S.SKIPPED, _S.UPSTREAM_FAILED, _S.REMOVED})
_TASK_STATES = {state.value: state for state in TaskInstanceState}

# The callbacks that follow an attempt, by what its instance became.
_CALLBACK_OF: dict[TaskInstanceState | None, str] = {
    _S.SUCCESS: "on_success_callback",
    _S.FAILED: "on_failure_callback",
    _S.UP_FOR_RETRY: "on_retry_callback",
    _S.SKIPPED: "on_skipped_callback",
}

# What may follow a state while the run is under way; `None` is "no state".
_NEXT: dict[TaskInstanceState | None, set[TaskInstanceState | None]] = {
    None: {_S.QUEUED, _S.SKIPPED, _S.UPSTREAM_FAILED},
    _S.QUEUED: {_S.RUNNING, _S.UP_FOR_RETRY, _S.UP_FOR_RESCHEDULE, None},
    _S.RUNNING: {_S.SUCCESS, _S.FAILED, _S.SKIPPED, _S.UP_FOR_RETRY, _S.UP_FOR_RESCHEDULE, None},
    _S.UP_FOR_RETRY: {_S.QUEUED, _S.SKIPPED},
    _S.UP_FOR_RESCHEDULE: {_S.QUEUED, _S.SKIPPED},
    **{state: set() for state in _ENDED},
}


# --- Errors and states: what every section uses ---------------------------------------------------

_FROZEN = hasattr(sys, "frozen")  # by PyInstaller, say: `sys.executable` runs only this program


@functools.cache
def _log() -> logging.Logger:
    """The module's logger, made at its first use: a look at runs needs none."""
    logger = logging.getLogger("liteflow")
    logger.addHandler(logging.NullHandler())
    return logger


def _utcnow() -> _datetime.datetime:
    return _datetime.datetime.now(_datetime.UTC)


def _aware(moment: _datetime.datetime) -> _datetime.datetime:
    """The same moment in UTC; a naive one is taken for UTC, as Airflow takes it."""
    if moment.tzinfo is None:
        return moment.replace(tzinfo=_datetime.UTC)
    return moment.astimezone(_datetime.UTC)


def _parsed(text: str | None, kind: type[T]) -> T:
    """The value of a stored JSON text; an empty `kind()` if that is no JSON of this kind."""
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text or "")
    return value if isinstance(value, kind) else kind()


def _moment(text: str | None) -> _datetime.datetime | None:
    """A stored time; None for a missing one or, in a file that was tampered with, a wrong one."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return _aware(_datetime.datetime.fromisoformat(text or ""))
    return None


def _span(start: _datetime.datetime | None, end: _datetime.datetime | None) -> float | None:
    """Seconds from start to end, 0 if a clock was set back; None where either is not known."""
    return None if start is None or end is None else max(0.0, (end - start).total_seconds())


def _shown(value: object, limit: int = 200, show: Callable[[Any], str] = repr) -> str:
    """A value's repr for people (or what `show` makes of it), bounded, whatever its class does."""
    try:
        text = show(value)
        if show is repr:  # on one line: the first line of a table, a DataFrame say, tells nothing
            text = text.replace("\n", " ").strip()
    except _FROM_OUTSIDE:
        raise
    except BaseException as error:  # a user's __repr__ may raise anything; the value is fine
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _few(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _near(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` if a known name is close, else the first of the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    if close := close or [x for x in names if name and name in x][:3]:  # a part of it: `timeout`
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there is {_few(map(repr, names), 5) or 'none'}"


@dataclass_transform()
class _Record:
    """Named values, given in order or by name."""

    def __init__(self, *values: Any, **named: Any) -> None:
        vars(self).update(zip(type(self).__annotations__, values, strict=False), **named)


# --- Signals --------------------------------------------------------------------------------------

# The C module under `signal`: the import of `signal` is slow, as it makes enums of all constants.
_signal: Any = sys.modules.get("_signal", signal)


class _HeldSignals(contextlib.ExitStack):
    """Holds signal handlers back while something is incomplete. Python calls handlers in the main
    thread between any two steps, and an exception of theirs could leave a lock held, a transaction
    open, a worker without an owner. `call_due`, and the end of the block, call those that are due.

    `heard` is called for each signal as it comes: with the number of a SIGINT, SIGTERM or SIGHUP
    that has the default handler (`heard` acts in its place), with None for any other.
    """

    _pid = 0  # this process's id, while it holds handlers back

    def __init__(self, heard: Callable[[int | None, Any], None] | None = None) -> None:
        super().__init__()
        self._due: list[Callable[[], Any]] = []
        self._heard = heard
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.callback(self.call_due)
            self.callback(self._put_back)
            self._pid = os.getpid()
            try:
                for number in _signal.valid_signals():
                    handler = _signal.getsignal(number)
                    if callable(handler) or (self._heard and _ends_program(number, handler)):
                        self._before[number] = handler
                        with contextlib.suppress(ValueError):  # a subinterpreter may not set any
                            _signal.signal(number, self._note)
            except BaseException:  # raised by a handler that is not held back yet
                self.close()
                raise
        return self

    def _put_back(self) -> None:
        try:
            self._pid, self._heard = 0, None
            for number, handler in self._before.items():
                if _signal.getsignal(number) == self._note:  # the program may have set another one
                    _signal.signal(number, handler)
        except BaseException:  # raised by a handler that has been put back already
            self._put_back()
            raise

    def _note(self, number: int, frame: Any) -> None:
        handler = self._before[number]
        if os.getpid() != self._pid:
            # A process forked meanwhile (a ProcessPoolExecutor's worker that is to end, say) has
            # inherited `_note`, but holds nothing back.
            signal.signal(number, handler)
            os.kill(os.getpid(), number)
            return
        ends = self._heard is not None and _ends_program(number, handler)
        if not ends:
            self._due.append(functools.partial(handler, number, frame))
        if self._heard is not None:
            self._heard(number if ends else None, frame)

    def call_due(self) -> None:
        """Call the handlers of the signals that came."""
        while self._due:
            self._due.pop(0)()

    def try_due(self) -> bool:
        """Like `call_due`, but leave what one raises to the next. Returns whether any is due."""
        try:
            self.call_due()
        except BaseException as error:  # whatever it is

            def again(raised: BaseException = error) -> NoReturn:
                raise raised

            self._due.insert(0, again)
        return bool(self._due)


def _ends_program(number: int, handler: Any) -> bool:
    """Whether the signal, by its default handler, ends the program."""
    ends = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return number in ends and handler in (signal.SIG_DFL, signal.default_int_handler)


# --- Building: settings and their checks (no I/O) -------------------------------------------------

_SECOND = _datetime.timedelta(seconds=1)
_TEXT_LIMIT = 10_000_000  # characters of one text that a run records; see _LOOK_LIMIT
_CONTAINERS = (dict, list, tuple, set, frozenset)
_LATE = "__settings__"  # the argument that carries settings with placeholders; no parameter's name
_CO_VARARGS, _CO_VARKEYWORDS, _CO_COROUTINE = 4, 8, 128  # as `inspect` names them

# Keys of Airflow's context that are None in ours.
_NOT_HERE = """conn map_index_template partition_date partition_key task_state_store
    templates_dict""".split()
# Keys about the last successful run of an earlier date, with the attribute that each reads.
_DATES_BEFORE = "data_interval_end data_interval_start end_date start_date".split()
_OF_BEFORE = {f"prev_{name}_success": name for name in _DATES_BEFORE}
# Airflow's context keys, and names it reserves: parameters so named are filled from the context.
_CONTEXT_KEYS = frozenset(_NOT_HERE).union(
    _OF_BEFORE,
    """dag dag_run data_interval_end data_interval_start ds ds_nodash inlet_events inlets
    logical_date macros outlet_events outlets params run_id task task_instance
    task_instance_key_str task_reschedule_count ti triggering_asset_events ts ts_nodash
    ts_nodash_with_tz var
    asset_state_store exception expanded_ti_count reason test_mode try_number""".split(),
)


def _refuse_unknown(what: str, given: Iterable[str], known: Collection[str], *more: str) -> None:
    """Raise TypeError for an unknown argument. `more`: further names for "did you mean"."""
    if unknown := set(given).difference(known):
        name = min(unknown)
        raise TypeError(f"{what} got an unknown argument {name!r}{_near(name, [*more, *known])}")


def _checked_id(kind: str, value: Any, more: str = ".", limit: int = 250) -> str:
    """Check for a text that can be an id: of letters, digits, "_", "-" and the signs in `more`."""
    text: str = _of_type(str)(kind, value)
    if not re.fullmatch(rf"[\w{more}-]{{1,{limit}}}", text):
        signs = "letters, digits, " + " or ".join(map(repr, f"_-{more}"))
        raise ValueError(f"{kind} must be 1 to {limit} {signs}, found {_shown(value)}")
    return text


@functools.cache
def _of_type(*types: type, least: int | None = None) -> Callable[[str, Any], Any]:
    """A check that a value is of one of the types and, with `least`, finite and no less. A bool is
    no int; messages leave _Placeholder out, which template fields take. Text of a subclass of str
    (an enum's, say) becomes plain text, as marshal takes no other to workers."""

    def check(what: str, value: Any) -> Any:
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not fits and not (_Placeholder in types and callable(value)):  # `_ready` calls it
            names = " or ".join(kind.__name__ for kind in types if kind is not _Placeholder)
            raise TypeError(f"{what} must be {names}, found {_shown(value)}")
        if least is not None and not least <= value < math.inf:
            raise ValueError(f"{what} must be {least} or more and finite, found {_shown(value)}")
        return str.__str__(value) if isinstance(value, str) else value

    return check


def _duration(what: str, value: Any, zero: bool = True) -> _datetime.timedelta:
    """A timedelta or seconds, as a timedelta: more than 0, or, with `zero`, 0 or more."""
    _of_type(_datetime.timedelta, int, float)(what, value)
    duration = -_SECOND  # refused below, if the value is NaN or too large for a timedelta
    with contextlib.suppress(OverflowError, ValueError):
        duration = value if isinstance(value, _datetime.timedelta) else value * _SECOND
    if duration < 0 * _SECOND or (not zero and not duration):
        least = "0 or more" if zero else "more than 0"
        raise ValueError(f"{what} must be {least} and fit a timedelta, found {_shown(value)}")
    return duration


def _seconds(what: str, value: Any) -> float:
    """A timedelta or seconds, as seconds: Airflow keeps it so for the code of sensors."""
    return _duration(what, value).total_seconds()


def _backoff(what: str, value: Any) -> float:
    """Airflow's retry_exponential_backoff: a multiplier; True is 2, False is off."""
    return 2.0 if value is True else float(_of_type(int, float, bool, least=0)(what, value))


def _one_of(choices: Iterable[Any], why: str = "") -> Callable[[str, Any], Any]:
    """A check that returns the choice equal to the value. `why` ends its error message."""

    def check(what: str, value: Any) -> Any:
        for choice in () if isinstance(value, _Placeholder) else choices:
            if value == choice:
                return choice
        known = " or ".join(map(str, choices))
        raise ValueError(f"{what} must be {known}, found {_shown(value)}{why}")

    return check


def _capped(what: str, value: Any, least: int | None = None) -> int:
    """An int, capped to 32 bits as in Airflow."""
    return max(-(2**31), min(2**31 - 1, int(_of_type(int, least=least)(what, value))))


def _params(what: str, value: Any) -> _Params:
    params = _Params(_string_keyed(what, value))
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


def _function(what: str, value: Any) -> Any:
    """Check for a plain callable: what `@task` and its kin make would do nothing in a worker."""
    if not callable(value) or isinstance(value, (_Partial, _TaskDecorator, _OperatorType)):
        message = f"{what} must be a plain function, found {_shown(value)}"
        if isinstance(value, _Decorated):
            message += f": {value.function.__name__}.function is one"
        raise TypeError(message)
    return value


def _is_plain(function: Any) -> bool:
    """Whether the function's code object shows all that `inspect` would, as no decorator has noted
    what it wraps. (The import of `inspect` takes longer than the start of a worker.)"""
    return type(function) is types.FunctionType and not vars(function)


def _sync_function(what: str, value: Any) -> Any:
    """Check for a plain function, not an `async def`: nobody would await what that returns."""
    if _is_plain(value):
        is_async = value.__code__.co_flags & _CO_COROUTINE
    else:
        is_async = inspect.iscoroutinefunction(value)
    if is_async:
        raise TypeError(f"{what} can't be an `async def`, found {_shown(value)}")
    return _function(what, value)


def _callbacks(what: str, value: Any) -> Any:
    """A callable or a list of them."""
    if not isinstance(value, (list, tuple)):
        return _sync_function(what, value)
    return [_sync_function(what, one) for one in value]


def _remedy(found: object) -> str:
    """Advice for an error message: how to turn what was found into the task or value expected."""
    if isinstance(found, _Decorated):
        return f": call it, {found.function.__name__}()"
    if isinstance(found, _Partial):
        return ": call its expand()"
    if isinstance(found, BaseOperator):
        return f": pass its result, .output of task {found.task_id!r}"
    if isinstance(found, TaskGroup):
        return ": let its function return the result of a task"
    if isinstance(found, type) and issubclass(found, (_Dependency, Dag)):
        return f": make one, {found.__name__}(...)"
    plain = callable(found) and not isinstance(found, (_TaskDecorator, Dag))
    return ": decorate it with @task and call it" if plain else ""


class _Setting(_Record):
    """An argument of tasks or DAGs: its default, and the check, which returns what is kept."""

    default: Any
    check: Callable[[str, Any], Any]


def _optional(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A setting for which None stands for the default."""
    return _Setting(default, lambda what, found: default if found is None else check(what, found))


_setting: Any = _Setting  # Any, or type checkers would take each class attribute for a _Setting
_boolean = _of_type(bool)
_timeout = functools.partial(_duration, zero=False)
_path = _of_type(str, os.PathLike)
_callback = _optional(None, _callbacks)
_date = _optional(None, lambda what, x: _aware(_of_type(_datetime.datetime)(what, x)))
_as_given: Any = _Setting(None, lambda what, value: value)
_must_be_false = _setting(False, _one_of([False], ": not supported, runs are independent"))


# --- Building: order and groups -------------------------------------------------------------------


class _Dependency:
    """The base of what `>>` and its kin take: it stands for one task or several."""

    __slots__ = ()

    _ends: Callable[[], list[BaseOperator]]  # the tasks that what comes after this waits for

    def _starts(self) -> list[BaseOperator]:
        """The tasks that have to wait when something comes before this."""
        return self._ends()

    def set_downstream(self, other: Any, edge_modifier: Any = None) -> None:
        """Run `other` (a task, a result, a group, or a list of them) after this.

        `edge_modifier`: a Label for the edge. Raises TypeError for anything else, RuntimeError for
        tasks of two DAGs, ValueError if neither has a DAG.
        """
        _optional(None, _of_type(EdgeModifier)).check("edge_modifier", edge_modifier)
        for after in _operands(other):
            ends, starts = self._ends(), after._starts()
            if isinstance(self, EdgeModifier):
                self._after += starts
            if isinstance(after, (EdgeModifier, TaskGroup)):
                after._before += ends
            labels = [x.label for x in (edge_modifier, self, after) if isinstance(x, EdgeModifier)]
            _join(ends, starts, labels[-1] if labels else None)

    def set_upstream(self, other: Any, edge_modifier: Any = None) -> None:
        """Run `other` (a task, a result, a group, or a list of them) before this."""
        for before in _operands(other):
            before.set_downstream(self, edge_modifier)

    def __rshift__(self, other: T) -> T:
        self.set_downstream(other)
        return other

    def __lshift__(self, other: T) -> T:
        self.set_upstream(other)
        return other

    def __rrshift__(self, other: Any) -> Self:
        self.set_upstream(other)
        return self

    def __rlshift__(self, other: Any) -> Self:
        self.set_downstream(other)
        return self


def _operands(value: Any) -> Sequence[_Dependency]:
    """One operand of `>>`, or a list or tuple of them, as a sequence."""
    many = value if isinstance(value, (list, tuple)) else (value,)
    for one in many:
        if not isinstance(one, _Dependency):
            can = "the order can be set between tasks, their results, and lists of these"
            raise TypeError(f"{can}, found {_shown(one)}{_remedy(one)}")
    return many


def _join(before: list[BaseOperator], after: list[BaseOperator], label: str | None = None) -> None:
    """Make an edge from each of `before` to each of `after`; a task in no DAG joins the other's."""
    for first, then in itertools.product(before, after):
        a, b, dag = first.task_id, then.task_id, first.dag or then.dag
        if dag is None:
            raise ValueError(f"tasks {a!r} and {b!r} are in no DAG: make them in `with DAG(...)`")
        for task in (first, then):
            if task.dag is None:
                dag._add(task)
        if first.dag is not then.dag:
            two = f"two DAGs, {first.dag_id!r} and {then.dag_id!r},"
            raise RuntimeError(f"tasks {a!r} and {b!r} of {two} can't wait for each other")
        first._downstream[b] = None
        then._upstream[a] = label or then._upstream.get(a)


class EdgeModifier(_Dependency):
    """`a >> Label("text") >> b` is `a >> b`, with a text on the edge where the DAG is drawn."""

    def __init__(self, label: str) -> None:
        self.label = _of_type(str)("label", label)
        self._before: list[BaseOperator] = []
        self._after: list[BaseOperator] = []

    def _starts(self) -> list[BaseOperator]:
        return self._after

    def _ends(self) -> list[BaseOperator]:
        return self._before


Label = EdgeModifier


class TaskGroup(_Dependency):
    """Tasks under one name: `with TaskGroup("load"): ...` makes ids `load.a`, `load.b`.

    Groups nest. `group >> x` sets the group's last tasks before x, `x >> group` x before its
    first ones. `prefix_group_id=False` leaves the ids alone; `default_args` are those of the
    group's tasks. Raises RuntimeError outside a DAG, DuplicateTaskIdFound for a taken id,
    TypeError or ValueError for a wrong argument.
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
        doc_md: str | None = None,
    ) -> None:
        _checked_id("group_id", group_id, more="", limit=200)
        _boolean(f"group {group_id!r}: prefix_group_id", prefix_group_id)
        _boolean(f"group {group_id!r}: add_suffix_on_collision", add_suffix_on_collision)
        dag, parent, _ = _surroundings({"dag": dag, "task_group": parent_group})
        if dag is None:
            raise RuntimeError(f"TaskGroup {group_id!r} can only be made inside a DAG")
        self.dag, self.parent_group, self.prefix_group_id = dag, parent, prefix_group_id
        self.label, self.tooltip, self.doc_md = group_id, tooltip, doc_md
        self.default_args = _string_keyed(f"group {group_id!r}: default_args", default_args)
        self.group_id = parent.child_id(group_id) if parent is not None else group_id
        if add_suffix_on_collision:
            self.group_id = dag._free_id(self.group_id, dag)
        dag._claim(self.group_id)
        dag.task_group_dict[self.group_id] = self
        self.children: list[BaseOperator] = []
        self._before: list[BaseOperator] = []  # if there is no work, what follows waits for these
        # The groups around this one, outermost first, and itself; what one of them is mapped over.
        self._path: list[TaskGroup] = [*(parent._path if parent is not None else ()), self]
        self._mapping: _ExpandInput | None = parent._mapping if parent is not None else None
        self._tokens: list[contextvars.Token[TaskGroup | None]] = []

    def child_id(self, label: str) -> str:
        """The id of a member with this label."""
        return f"{self.group_id}.{label}" if self.prefix_group_id else label

    def __enter__(self) -> TaskGroup:
        if _current_dag.get() not in (None, self.dag):
            raise ValueError(f"{self!r} is of DAG {self.dag.dag_id!r}, not {_current_dag.get()!r}")
        self._tokens.append(_current_group.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _current_group.reset(self._tokens.pop())

    def _starts(self) -> list[BaseOperator]:
        inside = {t.task_id for t in self.children}
        return [t for t in self.children if not inside & t._upstream.keys()]

    def _ends(self) -> list[BaseOperator]:
        """The last work: nothing follows it in the group or, unless it is a setup, nothing but
        teardowns, one of which is last itself."""
        inside = {t.task_id: t for t in self.children}

        def is_last(task: BaseOperator) -> bool:
            after = [inside[x] for x in task._downstream if x in inside]
            teardowns = [x for x in after if x.is_teardown]
            ends_work = task.is_teardown or (len(teardowns) == len(after) and not task.is_setup)
            return not after or (ends_work and any(map(is_last, teardowns)))

        return [t for t in self.children if not t.is_teardown and is_last(t)] or self._before

    def __repr__(self) -> str:
        return f"<TaskGroup: {self.group_id}>"


_current_group = contextvars.ContextVar[TaskGroup | None]("liteflow_group", default=None)
_PLACE = ("dag", "task_group", "default_args")  # arguments that say where a task is: no settings


def _surroundings(given: dict[str, Any]) -> tuple[Dag | None, TaskGroup | None, dict[str, Any]]:
    """The DAG and group of a task with these arguments (the current ones, unless given), and its
    default_args: its own, which win over its groups', which win over the DAG's."""
    dag, group, current = given.get("dag"), given.get("task_group"), _current_group.get()
    dag = _current_dag.get() if dag is None else _of_type(Dag)("dag", dag)
    if group is None and current is not None and dag in (None, current.dag):
        group = current
    if group is not None:
        group_dag = _of_type(TaskGroup)("task_group", group).dag
        dag = group_dag if dag is None else dag
        if group_dag is not dag:
            raise ValueError(f"{group!r} is of DAG {group_dag.dag_id!r}, not of {dag.dag_id!r}")
    defaults = dict(dag.default_args) if dag is not None else {}
    for each in group._path if group is not None else ():
        defaults |= each.default_args
    return dag, group, defaults | _string_keyed("default_args", given.get("default_args"))


# --- Building: tasks ------------------------------------------------------------------------------


class _OperatorType(type):
    """The class of operators' classes. A call of one takes keywords only, fills in default_args,
    and sets the operator after the tasks whose results its template fields hold.

    A `_Setting` in a class's body is replaced by its default, and kept in `_known_settings`: its
    check is also for what subclasses, and bases that are no operators, put in its place. An
    operator keeps only what is no default, as 30 attributes take five times the memory of 29.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **kw: Any) -> None:
        super().__init__(name, bases, body, **kw)
        if isinstance(body.get("template_fields"), str):  # as in Airflow, ("x") means ("x",)
            cls.template_fields = (body["template_fields"],)
        inherited = [getattr(base, "_known_settings", {}) for base in bases]
        known = cls._known_settings = dict[str, _Setting](collections.ChainMap(*inherited))
        plain = [vars(base) for base in cls.__mro__ if not isinstance(base, _OperatorType)]
        mixed_in = {key: getattr(cls, key) for key in known.keys() & set().union(*plain)}
        for key, value in (mixed_in | body).items():
            if isinstance(value, _Setting):
                known[key] = value
                setattr(cls, key, value.default)
            elif key in known and not hasattr(value, "__get__"):  # no method or property
                setattr(cls, key, known[key].check(f"class {name}: {key}", value))

    # For help() and notebooks. `__call__` has no return type, so type checkers read `__init__`.
    __signature__ = property(lambda cls: _signature(functools.partial(cls.__init__, None)))

    def __call__(cls: Any, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        if issubclass(cls, _FunctionOperator):  # only the decorators call this class
            return super().__call__(*args, **kwargs)
        if args:
            raise TypeError(f"{cls.__name__} takes keyword arguments only, found {_shown(args[0])}")
        _, _, defaults = _surroundings(kwargs)
        named = {name: defaults[name] for name in _keywords_of(cls).keys() & defaults.keys()}
        made = super().__call__(**{**named, **kwargs})
        if "_downstream" not in vars(made):
            raise TypeError(f"{cls.__name__}.__init__ must call super().__init__(**kwargs)")
        made._take_fields({name: getattr(made, name, None) for name in cls.template_fields})
        return made


def _once_each(look: Callable[[Any], T]) -> Callable[[Any], T]:
    """`look`, cached for functions and classes while they live: other callables may lack a hash."""
    cache = weakref.WeakKeyDictionary[Any, Any]()

    def cached(x: Any) -> Any:
        if not isinstance(x, (types.FunctionType, type)):
            return look(x)
        if (value := cache.get(x, cache)) is cache:  # it is not in there
            value = cache[x] = look(x)
        return value

    return cached


class _OneTask(_Dependency):
    """A task, or the placeholder of its result."""

    __slots__ = ()

    def as_setup(self) -> Self:
        """Make the task a setup: what follows needs it. Raises ValueError for a teardown."""
        [task] = self._ends()
        if task.is_teardown:
            raise ValueError(f"task {task.task_id!r} is a teardown: it can't be a setup, too")
        task.is_setup = True
        return self

    def as_teardown(self, setups: Any = None, on_failure_fail_dagrun: bool | None = None) -> Self:
        """Make the task a teardown: it runs after the work between it and its setups, whatever
        became of that, if one of them succeeded. `setups` are made setups and set before it; with
        `on_failure_fail_dagrun` its failure fails the run. Raises ValueError for a setup."""
        [task] = self._ends()
        if task.is_setup:
            raise ValueError(f"task {task.task_id!r} is a setup: it can't be a teardown, too")
        if on_failure_fail_dagrun is not None:
            what = f"task {task.task_id!r}: on_failure_fail_dagrun"
            task.on_failure_fail_dagrun = _boolean(what, on_failure_fail_dagrun)
        for setup in _operands(() if setups is None else setups):
            if not isinstance(setup, _OneTask):
                raise TypeError(f"setups of task {task.task_id!r} must be tasks, found {setup!r}")
            setup.as_setup()
            _join(setup._ends(), [task])
        task.is_teardown = True
        task.trigger_rule = TriggerRule.ALL_DONE_SETUP_SUCCESS
        return self

    def __enter__(self) -> Self:
        [task] = self._ends()
        if not (task.is_setup or task.is_teardown):
            raise AirflowException(f"`with` takes a setup or teardown; {task.task_id!r} is neither")
        task._made_inside, task._takes_more = [], True
        task._dag_or_error()._scopes.append(task)
        return self

    def __exit__(self, *exc: object) -> None:
        """Set the block's work between its setups and teardowns, and this scope inside those
        around it. As in Airflow, work with no upstream at all is first, with no downstream last."""
        scopes = self._ends()[0]._dag_or_error()._scopes
        scope = scopes.pop()
        setups, teardowns = _around(scope)
        work = [t for t in scope._made_inside if not (t.is_setup or t.is_teardown)]
        first = [t for t in work if not t._upstream] or work[:1]
        last = [t for t in work if not t._downstream] or work[-1:]
        _join(setups, first)
        _join(last, teardowns)
        if scopes:
            scopes[-1]._takes_more = False  # as in Airflow, where an inner block ends the outer one
            # The setups of the nearest scope around it that has any; teardowns likewise.
            around = [_around(outer) for outer in reversed(scopes)]
            before = next((x for x, _ in around if x), [])
            after = next((x for _, x in around if x), [])
            _join([x for x in before if x not in setups], setups or first)  # some may be in both
            _join(teardowns or last, [x for x in after if x not in teardowns])

    def add_task(self, task: Any) -> None:
        """Put a task made elsewhere into this scope. Raises AirflowException outside its `with`."""
        [mine] = self._ends()
        if mine not in mine._dag_or_error()._scopes or not mine._takes_more:
            use = "is for use in its `with` block, before any inner one"
            raise AirflowException(f"add_task() of {mine.task_id!r} {use}")
        for each in _operands(task):
            mine._made_inside += each._ends()


def _around(task: BaseOperator) -> tuple[list[BaseOperator], list[BaseOperator]]:
    """The setups before the `with` block of a setup or teardown, and the teardowns after it."""
    setups = [task] if task.is_setup else [t for t in task.upstream_list if t.is_setup]
    below = [task] if task.is_teardown else task.downstream_list
    return setups, [t for t in below if t.is_teardown]


def _no_hook(task: BaseOperator, context: Context, result: Any = None) -> None:
    """Do nothing: the hooks' default, so that `super().pre_execute(context)` can be called."""


class BaseOperator(_OneTask, metaclass=_OperatorType):
    """A task of a DAG. `@task` makes one from a function; a subclass defines `execute(context)`.

    All arguments are by keyword. `task_id` (str) is required; the settings are Airflow's, with
    its meanings: `retries` (int), `retry_delay` (timedelta or seconds; 0 unless given, where
    Airflow has five minutes), `max_retry_delay`, `retry_exponential_backoff` (multiplier),
    `execution_timeout` (timedelta or seconds), `trigger_rule`, `do_xcom_push`,
    `multiple_outputs`, `params`, `default_args`, `doc_md`, `owner` and others that change nothing
    here. `dag` is the current DAG unless given.

    Raises TypeError for an unknown or wrong argument, ValueError for an impossible value,
    DuplicateTaskIdFound if the DAG has a task or group of this id, FailFastDagInvalidTriggerRule.
    """

    task_id: str = ""  # a subclass may assign settings before it calls this class's `__init__`
    dag: Dag | None = None
    retries: int = _optional(0, functools.partial(_capped, least=0))
    retry_delay: _datetime.timedelta = _optional(0 * _SECOND, _duration)
    retry_exponential_backoff: float = _optional(0.0, _backoff)
    max_retry_delay: _datetime.timedelta | None = _optional(None, _duration)
    retry_policy: None = _setting(None, _one_of([None], ": not supported"))
    execution_timeout: _datetime.timedelta | None = _optional(None, _timeout)
    trigger_rule: TriggerRule = _setting(TriggerRule.ALL_SUCCESS, _one_of(TriggerRule))
    do_xcom_push: bool = _setting(True, _boolean)
    multiple_outputs: bool | None = _optional(None, _boolean)
    params: dict[str, Any] = _setting(None, _params)  # None: each task gets a dict of its own
    priority_weight: int = _setting(1, _capped)
    weight_rule: WeightRule = _setting(WeightRule.DOWNSTREAM, _one_of(WeightRule))
    pool: str = _optional("default_pool", _of_type(str))
    pool_slots: int = _setting(1, functools.partial(_capped, least=1))
    max_active_tis_per_dag: int | None = _optional(None, _of_type(int, least=1))
    max_active_tis_per_dagrun: int | None = _optional(None, _of_type(int, least=1))
    depends_on_past = wait_for_downstream = _must_be_false
    start_date = end_date = _date
    owner: str = _setting("airflow", _of_type(str))
    doc_md: str | None = _optional(None, _of_type(str))
    task_display_name: str | None = _optional(None, _of_type(str))
    map_index_template: str | None = _optional(None, _of_type(str))
    on_execute_callback = on_success_callback = on_failure_callback = _callback
    on_retry_callback = on_skipped_callback = _callback
    pre_execute = post_execute = _optional(_no_hook, _sync_function)
    doc = doc_json = doc_yaml = doc_rst = queue = executor = executor_config = _as_given
    run_as_user = resources = ignore_first_depends_on_past = _as_given
    wait_for_past_depends_before_skipping = logger_name = inlets = outlets = _as_given
    email = email_on_failure = email_on_retry = sla = show_return_value_in_logs = _as_given
    _known_settings: dict[str, _Setting]  # all of these, and those of a subclass

    template_ext: Sequence[str] = ()
    template_fields: Sequence[str] = ()  # attributes that take templates, results; see _decorated
    _in_partial: dict[str, Any] | None = None  # of a mapped operator: what `partial` was given
    _flow: str | None = None  # "branch" or "short_circuit" if its result decides what follows
    _mapping: _ExpandInput | None = None  # what it is expanded over, by itself or with its group
    _map_functions: tuple[Any, ...] = ()  # the functions of `map` in its arguments: see `_look_up`
    is_setup = is_teardown = on_failure_fail_dagrun = False
    _conditions: tuple[tuple[_Condition, bool, str | None], ...] = ()  # of run_if (True), skip_if
    task_group: TaskGroup | None = None
    _made_inside: list[BaseOperator]  # a setup's or teardown's: tasks right in its `with` block
    _takes_more: bool  # add_task() is allowed in the block: no inner block has ended yet

    def __init__(self, *, task_id: str, **settings: Any) -> None:
        known = self._known_settings
        dag, group, defaults = _surroundings(settings)
        kind = "@task" if isinstance(self, _FunctionOperator) else type(self).__name__
        _refuse_unknown(f"{kind} {_shown(task_id)}", settings.keys() - _PLACE, known, "task_id")
        given = {name: x for name, x in {**defaults, **settings}.items() if name in known}
        given.setdefault("params", self.params)
        if "params" in defaults:
            what = f"task {_shown(task_id)}: params"
            own = _params(what, settings.get("params"))
            given["params"] = {**_params(what, defaults["params"]), **own}
        checked_id = _checked_id("task_id", task_id)
        full = checked_id if group is None else group.child_id(checked_id)
        # As in Airflow, an id gets a suffix if a task has it; if a group has it, it is refused.
        if dag is not None and isinstance(self, _FunctionOperator):
            full = dag._free_id(full, dag.task_dict)
        self.task_id = full if full is checked_id else _checked_id("task_id", full)
        for name, value in given.items():
            kept = known[name].check(f"task {full!r}: {name}", value)
            if kept is not getattr(type(self), name) or name in self.__dict__:
                self.__dict__[name] = kept
        self._upstream: dict[str, str | None] = {}
        self._downstream: dict[str, None] = {}
        if dag is not None:
            dag._add(self)  # before its groups get it, as this refuses an id that is taken
        if group is not None:
            self.task_group = group
            self._mapping = group._mapping
            for each in group._path:
                each.children.append(self)

    def _map_over(self, mapping: _ExpandInput) -> None:
        """Expand the task, by itself or with its group."""
        if self._mapping not in (None, mapping):
            raise NotImplementedError(f"task {self.task_id!r} can't expand inside a mapped group")
        if mapping.source_ids and self.trigger_rule is TriggerRule.ALWAYS:
            rule = "trigger_rule 'always' does not wait for what is expanded"
            raise ValueError(f"task {self.task_id!r}: {rule}")
        self._mapping = mapping

    @classmethod
    def partial(cls, *, task_id: str, **fixed: Any) -> _Partial[Self]:
        """Fix arguments of an operator that `expand` or `expand_kwargs` maps over others.

        Raises TypeError for an argument that the operator does not have.
        """
        what, known = f"task {task_id!r}", {*_PLACE, *cls._known_settings, *_keywords_of(cls)}

        def check(names: Iterable[str], method: str) -> None:
            _refuse_unknown(f"{what}: {method}()", names, known)
            if method != "partial":
                _refuse_mapped_settings(f"{what}: {method}()", names)

        return _Partial(what, check, functools.partial(_mapped, cls, task_id), {}).partial(**fixed)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting; make an edge for a result in a template field; `task.dag = dag` adds the
        task. Raises ValueError for a `dag` or `task_id` of a task that is in a DAG already."""
        is_made = "_downstream" in self.__dict__
        if is_made and name in ("dag", "task_id") and value != getattr(self, name):
            if self.dag is not None:
                raise ValueError(f"task {self.task_id!r} is in DAG {self.dag.dag_id!r} already")
            if name == "dag":
                _of_type(Dag)("dag", value)._add(self)
        if name in self._known_settings:
            value = self._known_settings[name].check(f"task {self.task_id!r}: {name}", value)
        object.__setattr__(self, name, value)
        if is_made and name in self.template_fields:
            self._take_fields({name: value})

    def _take_fields(self, fields: Mapping[Any, Any]) -> None:
        """Set this task after those whose results its fields hold. Raises ValueError for a template
        if Jinja is not installed, and for the name of a template's file, as either would be passed
        on as it is. Inside a running task any text may be a result, so none is refused."""
        self._wait_for_results(fields)
        if isinstance(self, _FunctionOperator) or _running.get(None) is not None:
            return
        for name in (None, *self.template_fields):  # None: what expand_kwargs() was given
            for text in _texts_in(fields.get(name)):
                if text.endswith(tuple(self.template_ext)):
                    why = "names a template's file (template_ext): pass its text"
                elif _is_template(text) and importlib.util.find_spec("jinja2") is None:
                    why = "is a template: install jinja2, or use @task, where a string is a string"
                else:
                    continue
                where = name or "in expand_kwargs()"
                raise ValueError(f"task {self.task_id!r}: {where} {_shown(text, 60)} {why}")

    def _wait_for_results(self, value: Any) -> None:
        """Set this task after those whose results the value holds; for an argument of its mapped
        group, after those that the group is mapped over. Raises TypeError if it holds a task."""
        before: list[BaseOperator] = []
        for leaf in _leaves(value):
            if isinstance(leaf, _Mappable):
                before += leaf._ends()
                if leaf._how != "xcom":  # most are plain results, without functions
                    self._map_functions += tuple(part._by for part in leaf._parts("map"))
            elif isinstance(leaf, _Argument) and leaf._look == "group_value" and self._mapping:
                before += [result.operator for result in self._mapping.results]
            elif isinstance(leaf, (_Dependency, _Partial, _TaskDecorator, _OperatorType, Dag)):
                what = f"task {self.task_id!r}: an argument"
                raise TypeError(f"{what} is no value: {_shown(leaf)}{_remedy(leaf)}")
        _join(before, [self])

    def execute(self, context: Context) -> Any:
        """Do the task's work; what it returns is its XCom. Runs in a worker, on a copy."""
        raise NotImplementedError(f"{type(self).__name__} defines no execute(self, context)")

    def render_template(self, content: Any, context: Context, jinja_env: Any = None) -> Any:
        """The content with the templates in its texts rendered by the DAG's Jinja."""
        return _rendered(content, {**context, "dag": self._dag_or_error()})

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
    def output(self) -> XComArg[Any]:
        """The placeholder of this task's result, to hand to other tasks."""
        return XComArg(self)

    @property
    def dag_id(self) -> str:
        """The id of the task's DAG."""
        return self._dag_or_error().dag_id

    @property
    def log(self) -> logging.Logger:
        """A logger named after the task's class; in a worker its lines are in the task's log."""
        return _log().getChild(f"task.{type(self).__name__}")

    def _dag_or_error(self) -> Dag:
        if self.dag is None:
            raise RuntimeError(f"task {self.task_id!r} is in no DAG: make it in `with DAG(...)`")
        return self.dag

    def _ends(self) -> list[BaseOperator]:
        return [self]

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that travel to the worker, with placeholders for results."""
        return (), _with_placeholders(self._fixed())

    def _fixed(self) -> dict[str, Any]:
        """The arguments that all instances and attempts share: the template fields; for a mapped
        operator, which has no fields yet, what `partial` was given."""
        if self._in_partial is not None:
            return self._in_partial
        return {name: getattr(self, name, None) for name in self.template_fields}

    def _ready(self, args: Any, kwargs: dict[str, Any], execution: _Execution) -> tuple[Any, Any]:
        """In the worker, return the operator that does the work, with its fields filled in, and the
        call that does it. The operator is a copy: only this attempt's hooks, callbacks and
        `map_index_template` see what `execute` sets on it."""
        is_mapped = self._in_partial is not None
        fixed = {n: x for n, x in self._fixed().items() if n not in kwargs}
        if not is_mapped:  # a field that is a property may have no setter
            own = type(self)
            fixed = {n: x for n, x in fixed.items() if type(getattr(own, n, 0)) is not property}
        known: dict[int, Any] = {}
        kwargs = {n: _anew(x, known) for n, x in fixed.items() if type(x) in _CONTAINERS} | kwargs
        made = self._make_instance(kwargs, execution) if is_mapped else _copy_with(self, **kwargs)
        execution.context["task"] = execution.context["ti"].task = made
        context, data = execution.context, {id(x) for x in execution.results}
        native = context["dag"].render_template_as_native_obj  # Jinja makes 10 of "10"
        for name in self.template_fields:
            if not hasattr(made, name):
                kind = type(made).__name__
                raise AttributeError(f"{kind} has no {name!r}, which is in its template_fields")
            value = getattr(made, name)
            if callable(value) and id(value) not in data:  # as in Airflow, it returns the value
                has_jinja = importlib.util.find_spec("jinja2")  # the callable may do without
                value = value(context=context, jinja_env=has_jinja and _jinja(context["dag"]))
            elif any(native or _is_template(text) for text in _texts_in(value)):
                value = _rendered(value, context, data)
            else:
                continue
            object.__setattr__(made, name, value)
        return made, lambda: _awaited(made.execute(execution.context))

    def _make_instance(self: Any, kwargs: dict[str, Any], execution: _Execution) -> Any:
        """Make the operator of one instance of this mapped one, from the instance's arguments."""
        _refuse_mapped_settings("expand_kwargs()", kwargs.keys() - self._in_partial.keys())
        place = {"dag": None, "task_group": None, "default_args": self._defaults}
        # In a new context, so that it joins no DAG that is being built.
        alone = contextvars.Context()
        alone.run(_running.set, execution)
        made = alone.run(type(self), task_id=self.task_id, **(self._in_partial | kwargs | place))
        made._upstream, made._downstream = self._upstream, self._downstream
        vars(made).update(dag=self.dag, task_group=self.task_group)  # they have its task already
        return made

    def _result_of(self, call: Callable[[], Any], execution: _Execution) -> Any:
        """The task's result: what the call returns. (Bash runs that; a sensor repeats the call.)"""
        return call()

    def __repr__(self) -> str:
        return f"<Task({type(self).__name__}): {self.task_id}>"


def _copy_with(original: T, /, **values: Any) -> T:
    """A copy with these attributes, whose values are not checked."""
    made = copy.copy(original)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _anew(value: Any, known: dict[int, Any]) -> Any:
    """Copy a value's lists, tuples, sets and dicts, so that no attempt changes those of another;
    all else stays as it is. `known`: the copies so far, by id, as one object becomes one copy."""
    if (kind := type(value)) not in _CONTAINERS:
        return value
    if id(value) not in known:
        made = [_anew(item, known) for item in (value.values() if kind is dict else value)]
        known[id(value)] = dict(zip(value, made, strict=True)) if kind is dict else kind(made)
    return known[id(value)]


def _signature(function: Any) -> inspect.Signature:
    """A function's signature. Python 3.14 evaluates annotations at a look at them, but some name
    what only type checkers import: these stay forward references."""
    kept: Any = {"annotation_format": 3} if sys.version_info >= (3, 14) else {}  # FORWARDREF
    return inspect.signature(function, **kept)


class _Parameters:
    """What a function takes: the `names` of its parameters but for those with a star (`rest` and
    `others`, or ""). The first `places` can go by position, the first `nameless` must."""

    def __init__(self, function: Any) -> None:
        if _is_plain(function):
            code, values = function.__code__, function.__defaults__ or ()
            self.nameless, self.places = code.co_posonlyargcount, code.co_argcount
            count = self.places + code.co_kwonlyargcount
            self.names: Sequence[str] = code.co_varnames[:count]
            stars = iter(code.co_varnames[count:])
            self.rest = f"*{next(stars)}" if code.co_flags & _CO_VARARGS else ""
            self.others = f"**{next(stars)}" if code.co_flags & _CO_VARKEYWORDS else ""
            of_last = zip(reversed(self.names[: self.places]), reversed(values), strict=False)
            self.defaults = dict(of_last) | (function.__kwdefaults__ or {})
        else:
            found = _signature(function).parameters.values()
            kinds = [[p.name for p in found if p.kind == kind] for kind in range(5)]
            self.nameless, self.places = len(kinds[0]), len(kinds[0] + kinds[1])
            self.names = kinds[0] + kinds[1] + kinds[3]
            self.rest = "".join(f"*{name}" for name in kinds[2])
            self.others = "".join(f"**{name}" for name in kinds[4])
            self.defaults = {p.name: p.default for p in found if p.default is not p.empty}

    def by_position(self, args: Sequence[Any]) -> Sequence[str]:
        """The names of the parameters that these positional arguments fill."""
        return self.names[: min(len(args), self.places)]

    def fitting(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values whose names the function takes."""
        return {name: x for name, x in values.items() if self.others or name in self.names}

    def filled(self, args: Sequence[Any], kwargs: dict[str, Any], context: Context) -> Any:
        """`kwargs`, and what the parameters that `args` leaves free name in the context."""
        taken = self.by_position(args)
        return {k: x for k, x in self.fitting(context).items() if k not in taken} | kwargs

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What each parameter gets, defaults too. Raises TypeError if the arguments do not fit."""
        if len(args) > self.places and not self.rest:
            raise TypeError("got too many positional arguments")
        by_position: dict[str, Any] = dict(zip(self.by_position(args), args, strict=False))
        bound = self.defaults | by_position
        for name in kwargs:
            if name in self.names[self.nameless :]:
                bound[name] = kwargs[name]
                if name in by_position:
                    raise TypeError(f"got multiple values for argument {name!r}")
            elif not self.others:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        if missing := [name for name in self.names if name not in bound]:
            raise TypeError(f"missing a required argument: {missing[0]!r}")
        return bound


@_once_each
def _keywords_of(kind: type[BaseOperator]) -> dict[str, Any]:
    """The arguments that the `__init__`s of an operator's class and its bases take by name, with
    the default (or None) that the nearest class gives."""
    kinds = [x for x in kind.__mro__ if issubclass(x, BaseOperator) and "__init__" in vars(x)]
    found = [_Parameters(x.__init__) for x in kinds[::-1]]
    return {name: each.defaults.get(name) for each in found for name in each.names}


def _refuse_mapped_settings(what: str, names: Iterable[str]) -> None:
    """Raise ValueError for a setting's name: settings are needed before there are instances."""
    for name in sorted({"task_id", *_PLACE, *BaseOperator._known_settings}.intersection(names)):
        raise ValueError(f"{what}: {name!r} is a setting of the task as a whole: use partial()")


def _leaves(value: Any, keys: bool = True) -> list[Any]:
    """What a value's lists, tuples, sets and dicts (`keys`: with their keys) hold, at any depth."""
    if isinstance(value, dict):
        value = itertools.chain.from_iterable(value.items()) if keys else value.values()
    elif not isinstance(value, _CONTAINERS):
        return [value]
    leaves: list[Any] = []
    for item in value:
        leaves += _leaves(item, keys) if isinstance(item, _CONTAINERS) else (item,)
    return leaves


def _results_in(value: Any) -> Iterator[XComArg[Any]]:
    """The results anywhere in a value."""
    mappables = (leaf for leaf in _leaves(value) if isinstance(leaf, _Mappable))
    return (result for mappable in mappables for result in mappable._parts("xcom"))


def _with_placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that hold a placeholder."""
    return {k: v for k, v in values.items() if any(isinstance(x, _Placeholder) for x in _leaves(v))}


def _texts_in(value: Any) -> Iterator[str]:
    """The texts in a value, and in the `template_fields` of objects that it holds."""
    for leaf in _leaves(value, keys=False):
        if isinstance(leaf, str):
            yield leaf
        elif hasattr(type(leaf), "template_fields"):
            for name in leaf.template_fields:  # not the type's, which may be a property
                yield from _texts_in(getattr(leaf, name, None))


def _is_template(text: str) -> bool:
    """Whether Jinja would change the text."""
    return "{{" in text or "{%" in text or "#}" in text.partition("{#")[2]


class _FunctionOperator(BaseOperator):
    """The task that `@task` makes: its `execute` calls the decorated function."""

    def __init__(self, made_of: Any, args: Any, kwargs: Any, expand: Any, **settings: Any) -> None:
        BaseOperator.__init__(self, **settings)
        if self.dag is None and _running.get(None) is not None:
            how = f"call {made_of.function.__name__}.function(...), the plain function, there"
            raise TypeError(f"task {self.task_id!r} was called inside a running task: {how}")
        self.python_callable = made_of.function
        self._args, self._kwargs = args, kwargs
        if self.multiple_outputs is None and _returns_dict(self.python_callable):
            self.multiple_outputs = True
        if made_of.__doc__ and not any(name.startswith("doc") for name in settings):
            self.doc_md = made_of.__doc__
        for name in self.template_fields:
            if callable(getattr(self, name)):
                raise TypeError(f"task {self.task_id!r}: {name} can't be a function in @task.bash")
        given = [args, kwargs, [getattr(self, name) for name in self.template_fields]]
        if expand is not None:
            self._map_over(expand)
            given.append(expand.sources)
        if any(given):
            self._wait_for_results(given)
            if (text := next(filter(_is_template, _texts_in(given)), None)) is not None:
                self._unrendered = text  # `_slips_in` warns of it, as Airflow would render it

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        late = super()._arguments()[1] if self.template_fields else None
        return self._args, {**self._kwargs, _LATE: late} if late else self._kwargs

    # The function's arguments, as in Airflow; while the task runs, results are values in them.
    op_args = property(lambda self: self._given()[0])
    op_kwargs = property(lambda self: self._given()[1])  # templates of map_index_template read it

    def _given(self) -> tuple[Any, Any]:
        execution = _running.get(_here[-1] if _here else None)  # see _running_execution
        if execution is not None and execution.task.task_id == self.task_id and execution.given:
            return execution.given
        return self._args, self._kwargs

    def _ready(self, args: Any, kwargs: dict[str, Any], execution: _Execution) -> tuple[Any, Any]:
        mine = _copy_with(self, **kwargs.pop(_LATE)) if _LATE in kwargs else self
        context = execution.context if _takes_context(self.python_callable) else {}
        call = functools.partial(_called, self.python_callable, args, kwargs, context)
        return mine, functools.partial(mine._result_of, call, execution)

    def execute(self, context: Context) -> Any:
        """Call the function on its arguments (which must hold no placeholders)."""
        return _called(self.python_callable, self._args, self._kwargs, context)


def _called(function: Any, args: Any, kwargs: Any, context: Context) -> Any:
    """Call the function on these arguments and on what its other parameters name in the context."""
    if context:
        kwargs = _Parameters(function).filled(args, kwargs, context)
    return _awaited(function(*args, **kwargs))


def _awaited(result: Any) -> Any:
    """Return what a function returned; the coroutine of an `async def` is run to its end first."""
    if not hasattr(type(result), "__await__"):  # the type: some objects have every attribute
        return result

    async def awaited() -> Any:
        return await result

    outer = asyncio._get_running_loop()
    if outer is None:
        return asyncio.run(awaited())
    # dag.test() in a notebook blocks the notebook's loop, so another may run in this thread.
    work = asyncio.current_task()
    if work is not None:  # a loop's callback may have called this, outside of any task
        asyncio._leave_task(outer, work)
    asyncio._set_running_loop(None)
    try:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(awaited())
    finally:
        asyncio._set_running_loop(outer)
        if work is not None:
            asyncio._enter_task(outer, work)


@_once_each
def _takes_context(function: Callable[..., Any]) -> bool:
    return bool(_task_parameters(function).fitting(dict.fromkeys(_CONTEXT_KEYS)))


def _return_annotation(function: Any) -> Any:
    if _is_plain(function):
        with contextlib.suppress(Exception):  # they can't be evaluated: see `_signature`
            return function.__annotations__.get("return")
    return _signature(function).return_annotation


@_once_each
def _returns_dict(function: Callable[..., Any]) -> bool:
    """Whether the return annotation is a dict, a Mapping or a TypedDict (Airflow's rule)."""
    try:
        annotation = _return_annotation(function)
        if isinstance(annotation, str):
            # The return annotation alone: another may name what only a type checker imports.
            only = type("only", (), {"__annotations__": {"return": annotation}})
            annotation = typing.get_type_hints(only, function.__globals__).get("return")
    except Exception:  # evaluating a user's annotations may raise anything; then they say nothing
        return False
    for _ in range(2):  # Annotated[dict[str, int], ...] -> dict[str, int] -> dict
        annotation = getattr(annotation, "__origin__", annotation)
    return isinstance(annotation, type) and issubclass(annotation, Mapping)


# --- Building: results and mapping ----------------------------------------------------------------


class _Known:
    """What is known of stored results without loading them: which exist, and their lengths."""

    def __init__(self, lengths: Mapping[_InstanceKey, int | None]) -> None:
        self._lists: dict[str, range] = {}
        self._mapped = collections.defaultdict[str, list[int]](list)
        for (task_id, index), length in lengths.items():
            self.note(task_id, index, length)

    def note(self, task_id: str, map_index: int, length: int | None) -> None:
        """Note that an instance stored a result. A setup that a resume takes along stores anew."""
        if map_index >= 0:
            indexes = self._mapped[task_id]
            place = bisect.bisect_left(indexes, map_index)
            if place == len(indexes) or indexes[place] != map_index:
                indexes.insert(place, map_index)
        elif length is not None:
            self._lists[task_id] = range(length)

    def stored(self, task: BaseOperator) -> Sequence[int]:
        """The indexes of the elements of a task's result; for a mapped task, the map indexes that
        have a result. Raises LookupError if a task stored no list."""
        return (self._lists if task._mapping is None else self._mapped)[task.task_id]


class _Placeholder:
    """Stands for a value while the DAG is built: the value is known only at run time."""

    __slots__ = ()
    _look_up: Callable[..., tuple[Any, ...]]  # the name of a method of _Execution, its arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """In a task's arguments it is pickled as a call that looks its value up in the worker."""
        if (task_and_results := _pickling.get()) is None:  # outside of a task's arguments
            raise TypeError(f"{self!r} is a placeholder: it is no value to store")
        return _of_job, self._look_up(*task_and_results)

    def __str__(self) -> str:
        """Raise TypeError: an f-string would hold the placeholder's text, not the value's."""
        how = "pass it to a task as it is; in an operator's template, {{ ti.xcom_pull('TASK_ID') }}"
        raise TypeError(f"{self!r} is no text, but a placeholder: {how}")

    def __bool__(self) -> NoReturn:
        """Raise TypeError: an `if` would take it for true, whatever the value will be."""
        what = f"{self!r} is neither true nor false while the DAG is built"
        raise TypeError(f"{what}: use @task.branch, or ask whether it `is None`")

    def __eq__(self, other: object) -> bool:
        """Raise TypeError beside plain data: it would be False, whatever the value will be."""
        return bool(self) if isinstance(other, (str, int, float, *_CONTAINERS)) else NotImplemented

    __hash__ = object.__hash__

    def __iter__(self) -> NoReturn:
        raise TypeError(f"{self!r} can't be iterated: it is a placeholder, to be handed to a task")


class _Mappable(_Placeholder, _Dependency):
    """A placeholder that can be expanded over: a result, or a `map`, `zip`, `concat` of results."""

    __slots__ = ("_by", "_how", "_sources")

    def __init__(self, how: str, *sources: _Mappable, by: Any = None) -> None:
        """`by`: the function of a "map", or the fillvalue of a "zip" (`...`: none, it cuts off)."""
        for source in sources:
            if not isinstance(source, _Mappable):
                raise TypeError(f"zip() and concat() take results of tasks, found {_shown(source)}")
        self._how, self._sources, self._by = how, sources, by

    def _look_up(self, task: BaseOperator, results: list[Any], plain: bool = True) -> Any:
        """The look-up of the list of its elements. `plain`: it is no source of another."""
        by, functions = self._by, task._map_functions
        if self._how == "map" and by in functions:  # else it is in an object, which is not searched
            by = functions.index(by)
        sources = (source._look_up(task, results, plain=False) for source in self._sources)
        return "elements", self._how, by, *sources

    def map(self, function: Callable[[Any], Any]) -> _Mappable:
        """Apply a plain function to each element, at the time when a task takes the element."""
        return _Mappable("map", self, by=_sync_function("what map() takes", function))

    def zip(self, *others: _Mappable, fillvalue: Any = ...) -> _Mappable:
        """Make tuples of the elements of each, as many as the shortest has, or, with a fillvalue,
        the longest. Raises TypeError for a fillvalue that holds results."""
        if _with_placeholders({"fillvalue": fillvalue}):
            raise TypeError(f"the fillvalue of zip() must be a plain value, found {fillvalue!r}")
        return _Mappable("zip", self, *others, by=fillvalue)

    def concat(self, *others: _Mappable) -> _Mappable:
        """Append the elements of the others, one after the other."""
        # a.concat(b).concat(c) is made flat: a nest of hundreds is too slow and too deep.
        return _Mappable("concat", *(self._sources if self._how == "concat" else [self]), *others)

    def _parts(self, how: str) -> list[Any]:
        """The parts of it, itself too, that were made by `how` ("xcom": the results of tasks)."""
        parts = [part for source in self._sources for part in source._parts(how)]
        return [*parts, self] if self._how == how else parts

    def _count(self, known: _Known) -> int:
        """How many elements there are, once the results are stored."""
        counts = [source._count(known) for source in self._sources]
        if self._how == "zip":
            return min(counts) if self._by is ... else max(counts)
        return sum(counts)

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        """Plain data that `_Execution.element` evaluates to the element, in a worker."""
        if self._how == "zip":
            sources = [(source, i < source._count(known)) for source in self._sources]
            return "tuple", [
                source._element(i, known, functions) if has_one else ("value", _dump(self._by))
                for source, has_one in sources
            ]
        for source in self._sources:  # one has it: the caller keeps i below `_count`
            if i < (count := source._count(known)):
                break
            i -= count
        element = source._element(i, known, functions)
        return ("map", functions.index(self._by), element) if self._how == "map" else element

    def _ends(self) -> list[BaseOperator]:
        return [result.operator for result in self._parts("xcom")]

    def __repr__(self) -> str:
        return f"{self._how}() of {_few(map(repr, self._parts('xcom')))}"


class XComArg(_Mappable, _OneTask, Generic[R]):
    """The placeholder of a task's result, of type `R`, while the DAG is built.

    Handed to another task, alone or inside lists, tuples, sets and dicts, it makes that task wait
    and is replaced by the value when that task runs. `x["key"]` is another key of the same task.
    """

    __slots__ = ("key", "operator")
    _how, _sources = "xcom", ()

    def __init__(self, operator: BaseOperator, key: str = "return_value") -> None:
        _of_type(BaseOperator)("operator", operator)
        self.operator, self.key = operator, _of_type(str)("key", key)

    def __getitem__(self, key: str) -> XComArg[Any]:
        if not isinstance(key, str):
            raise ValueError(f"{self!r} is a placeholder: it takes a str key, found {_shown(key)}")
        if self.key != "return_value":  # x["a"]["b"] would mean x["b"]
            raise ValueError(f"{self!r} is a placeholder: take its item {key!r} in a task")
        return XComArg(self.operator, key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, XComArg):
            return super().__eq__(other)
        return self.operator is other.operator and self.key == other.key

    def __hash__(self) -> int:
        return hash((id(self.operator), self.key))

    def __repr__(self) -> str:
        return f"XComArg({self.operator.task_id!r}, {self.key!r})"

    def _look_up(self, task: BaseOperator, results: list[Any], plain: bool = True) -> Any:
        results.append(self)  # for _dump_taking
        mapping = self.operator._mapping
        # Inside one mapped group, an instance takes the result of its own index.
        if mapping is not None and mapping is not task._mapping:
            return "sequence", self.operator.task_id, self.key, plain and mapping.of_group
        absent_is_none = self.key == "return_value" or bool(self.operator.multiple_outputs)
        return "value", self.operator.task_id, self.key, absent_is_none

    def _count(self, known: _Known) -> int:
        return len(known.stored(self.operator))

    def _element(self, i: int, known: _Known, functions: list[Any]) -> tuple[Any, ...]:
        kind = "item" if self.operator._mapping is None else "xcom"
        return kind, self.operator.task_id, known.stored(self.operator)[i]


# While a task's arguments are pickled: the task, and the results that were met in them so far.
_pickling: contextvars.ContextVar[Any] = contextvars.ContextVar("liteflow_pickling", default=None)


class _Argument(_Placeholder):
    """The placeholder of an argument of a `@dag` function, or of a mapped group. `look` names the
    method of _Execution that gives its value: "param" or "group_value"."""

    def __init__(self, look: str, name: str, *default: Any) -> None:
        self._look, self._name = look, name  # not `name`: `file.name`, say, must be an error
        self._default = [x.default if isinstance(x, Param) else x for x in default]

    def _look_up(self, *_: object) -> tuple[Any, ...]:
        return self._look, self._name, *self._default

    def __getitem__(self, key: object) -> NoReturn:
        raise TypeError(f"{self!r} is a placeholder: take its item {key!r} in a task")

    def __repr__(self) -> str:
        return f"argument {self._name!r}"


class _ExpandInput:
    """What a task or a group is mapped over: the cross product of named arguments, or dicts."""

    def __init__(self, what: str, mapped: Mapping[Any, Any]) -> None:
        if not mapped:
            raise TypeError(f"{what}: expand() takes at least one argument to map over")
        self.of_group = False  # of a mapped group: all its tasks share this object
        self.results = [*_results_in(mapped)]
        for result in self.results:
            if result.key != "return_value":
                raise ValueError(f"{what}: can't expand over {result!r}: only over return values")
        # By name, what each argument is mapped over; under None, what gives dicts of arguments.
        self.sources = {
            n and str.__str__(n): _checked_source(what, n, x) for n, x in mapped.items()
        }
        mappables = [source for source in self.sources.values() if isinstance(source, _Mappable)]
        # The tasks whose results must be known before there are instances.
        self.source_ids = dict.fromkeys(t.task_id for source in mappables for t in source._ends())
        # The functions of `map`, in the same order in each worker: a job names one by its index.
        self.functions = [m._by for source in mappables for m in source._parts("map")]

    def count(self, known: _Known) -> int:
        """How many instances there are. Raises LookupError if a source stored no list."""
        sources = self.sources.values()
        return math.prod(x._count(known) if isinstance(x, _Mappable) else len(x) for x in sources)

    def elements(self, i: int, known: _Known) -> list[tuple[str | None, Any]]:
        """(argument, element) pairs for the instance of index `i`: an element as `_element` gives
        it, or ("constant", its index in the list). The last argument varies fastest."""
        pairs: list[tuple[str | None, Any]] = []
        for name, source in reversed(self.sources.items()):
            constant = not isinstance(source, _Mappable)
            i, j = divmod(i, len(source) if constant else source._count(known))
            element = ("constant", j) if constant else source._element(j, known, self.functions)
            pairs.append((name, element))
        return pairs[::-1]


def _checked_source(what: str, name: str | None, source: Any) -> Any:
    """What an argument (None: `expand_kwargs`) is mapped over: a result, or a list of constants."""
    if isinstance(source, _Mappable):
        return source
    if name is None:
        is_list = isinstance(source, (list, tuple))
        if not is_list or not all(isinstance(item, (Mapping, _Mappable)) for item in source):
            must = "expand_kwargs() takes a list of dicts or a result"
            raise TypeError(f"{what}: {must}, found {_shown(source)}{_remedy(source)}")
    elif isinstance(source, dict):
        return list(source.items())
    elif not isinstance(source, Sequence) or isinstance(source, (str, bytes, bytearray)):
        must = f"a list, tuple, dict or a task's result is needed{_remedy(source)}"
        raise ValueError(f"{what}: can't expand {name!r} over {_shown(source)}: {must}")
    return list(source)


# --- Building: operators --------------------------------------------------------------------------


@functools.cache
def _decorated(kind: type[BaseOperator]) -> Any:
    """The class of the tasks that `@task.bash` and its kin make: tasks of a function, with the
    settings of the operator `kind`, whose `_result_of` makes the call of the function."""
    fields = [name for name in kind._known_settings if name in kind.template_fields]
    body = {"_kind": kind, "template_fields": fields, "__doc__": kind.__doc__}
    return _OperatorType(kind.__name__, (_FunctionOperator, kind), body)


def _exit_codes(what: str, value: Any) -> tuple[int, ...]:
    """Exit codes that mean skipped: an int, several, or None."""
    codes = value if isinstance(value, (list, tuple, set, range)) else (value,)
    return () if value is None else tuple(_of_type(int)(what, code) for code in codes)


class BashOperator(BaseOperator):
    """Runs a command with bash; its result is the last line of the output.

    `env` replaces the environment, unless `append_env`; `cwd` is a temporary folder unless given.
    Exit code 0 is success, `skip_on_exit_code` (99; an int, several, or None) skipped, any other
    failed. Output is in the task's log as it comes, standard error included.
    """

    template_fields: Sequence[str] = ("bash_command", "env", "cwd")
    env = _optional(None, _of_type(dict, _Placeholder))
    cwd = _optional(None, _of_type(str, os.PathLike, _Placeholder))
    output_processor = _optional(None, _sync_function)
    append_env: bool = _setting(False, _boolean)
    skip_on_exit_code: Sequence[int] = _setting((99,), _exit_codes)
    output_encoding: str = _setting("utf-8", _of_type(str))

    def __init__(self, *, bash_command: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        what = f"task {self.task_id!r}: bash_command"
        self.bash_command = _of_type(str, _Placeholder)(what, bash_command)

    def execute(self, context: Context) -> Any:
        """Run the command. Raises AirflowSkipException, AirflowException by its exit code."""
        return self._result_of(lambda: self.bash_command, _running_execution())

    def _result_of(self: Any, call: Callable[[], Any], execution: _Execution) -> Any:
        from subprocess import PIPE, STDOUT, Popen

        command, of_function = call(), isinstance(self, _FunctionOperator)
        # As in Airflow, a blank command is refused only if a function returned it.
        if not isinstance(command, str) or (of_function and not command.strip()):
            raise TypeError(f"task {self.task_id!r}: bash needs a command, found {_shown(command)}")
        names = _CONTEXT_KEYS.intersection(re.findall(r"\{\{[-\s]*(\w+)", command))
        if names and of_function:
            self.log.warning("{{ %s }} is passed as it is: no Jinja in @task.bash", min(names))
        outer = os.environ if self.append_env or self.env is None else {}
        own = self.env or {}
        for name, value in own.items():  # the message of subprocess would not name the variable
            _of_type(str, bytes, os.PathLike)(f"task {self.task_id!r}: env {name!r}", value)
        env = {**outer, **own, **_airflow_environ(execution.context)}
        cwd = self.cwd
        with contextlib.ExitStack() as stack:
            if cwd is None:
                cwd = stack.enter_context(tempfile.TemporaryDirectory(prefix="liteflow-bash-"))
            process = Popen(["bash", "-c", command], stdout=PIPE, stderr=STDOUT, cwd=cwd, env=env)
            stack.enter_context(process)
            stack.callback(_let_end, process, self.output_encoding)  # before Popen's exit waits
            last_line = [""]  # in pieces, as joining a long line anew for each takes too long
            for text in _command_output(process, self.output_encoding):
                if "\n" in last_line[-1][-1:] + text[:-1]:  # the line ended, and more has come
                    last_line.clear()
                last_line.append(text[text.rfind("\n", 0, -1) + 1 :])
            code, last = process.wait(), "".join(last_line).rstrip()
        if code in self.skip_on_exit_code:
            raise AirflowSkipException(f"the command ended with exit code {code}: skipped")
        if code != 0:
            how = f"ended with exit code {code}" if code > 0 else f"was {_end_of(code)}"
            lines = [x for x in command.split("\n") if not re.match(r"\s*(#|set\b[^;&|]*$|$)", x)]
            first = _shown("".join(lines[:1]), 100, str)
            more = " [...]" if len(lines) > 1 else ""
            raise AirflowException(f"the command {how}: {first}{more}")
        return last if self.output_processor is None else self.output_processor(last)


def _command_output(process: Any, encoding: str) -> Iterator[str]:
    """Yield a command's output in pieces as they come, each printed to the task's log."""
    output = iter(process.stdout.read1, b"")
    for text in codecs.iterdecode(output, encoding, "backslashreplace"):
        print(text, end="", flush=True)  # at once, even without a line's end: a progress bar
        yield text


def _let_end(process: Any, encoding: str) -> None:
    """End a command whose task is over. If the task was told to end (SIGTERM), so was the command:
    then it has some seconds, as its traps may clean up."""
    if _worker is not None and _worker.terminated:
        limit = threading.Timer(_GRACE - 1, process.kill)  # 1 s before the worker is killed
        limit.daemon = True
        limit.start()
        collections.deque(_command_output(process, encoding), 0)
        process.wait()
        limit.cancel()
    process.kill()


def _airflow_environ(context: Context) -> dict[str, str]:
    ti, date, owner = context["ti"], context.get("ts", ""), context["task"].owner
    values = {"DAG_ID": ti.dag_id, "TASK_ID": ti.task_id, "DAG_RUN_ID": ti.run_id}
    values |= {"TRY_NUMBER": str(ti.try_number), "LOGICAL_DATE": date, "DAG_OWNER": owner}
    return {f"AIRFLOW_CTX_{name}": value for name, value in values.items()}


class PokeReturnValue:
    """What a sensor may return: whether it is done, and the value to store."""

    def __init__(self, is_done: bool | str, xcom_value: Any = None) -> None:
        self.is_done, self.xcom_value = is_done, xcom_value

    def __bool__(self) -> bool:
        return bool(self.is_done)


class BaseSensorOperator(BaseOperator):
    """A task that waits: a subclass defines `poke(context)`, called until its result is true.

    `poke_interval` (seconds, 60), `timeout` (7 days; then it fails without retry, or is skipped
    with `soft_fail`), `mode` ("poke" keeps the worker, "reschedule" gives it back between pokes),
    `exponential_backoff`, `max_wait`; an exception in a poke fails the task, unless `silent_fail`
    (poke again) or `never_fail` (skip).
    """

    poke_interval: float = _setting(60.0, _seconds)
    timeout: float = _optional(7 * 86400.0, _seconds)
    mode: str = _setting("poke", _one_of(["poke", "reschedule"]))
    max_wait = _optional(None, _duration)
    soft_fail = exponential_backoff = silent_fail = never_fail = _setting(False, _boolean)

    def poke(self, context: Context) -> Any:
        """Whether the waiting is over; a `PokeReturnValue` carries a result, too."""
        raise NotImplementedError(f"{type(self).__name__} defines no poke(self, context)")

    def execute(self, context: Context) -> Any:
        """Poke until the result is true. Raises AirflowSensorTimeout."""
        return self._result_of(lambda: _awaited(self.poke(context)), _running_execution())

    def _result_of(self: Any, call: Callable[[], Any], execution: _Execution) -> Any:
        """Call until the result is true. The timeout counts from the first poke, in any worker."""
        for number in itertools.count(execution.job.pokes):
            try:
                found = call()
            except AirflowSkipException:
                raise
            except (Exception, AirflowTaskTimeout) as error:  # a user's poke may raise anything
                kinds = (AirflowFailException, AirflowSensorTimeout, AirflowTaskTimeout)
                final = isinstance(error, kinds)
                if final or not self.silent_fail:
                    if self.never_fail or (final and self.soft_fail):
                        raise AirflowSkipException(f"the poke raised {_brief(error)}") from error
                    raise
                self.log.exception("the poke failed")
                found = False
            if found:
                return found.xcom_value if isinstance(found, PokeReturnValue) else None
            elapsed = _monotonic() - execution.clock + execution.job.waited
            if elapsed > self.timeout:
                kind = AirflowSkipException if self.soft_fail else AirflowSensorTimeout
                raise kind(f"the sensor waited for more than {self.timeout:g} s")
            wait = self.poke_interval
            if self.exponential_backoff:
                wait = min(wait * 2.0 ** min(number, 60), self.timeout - elapsed)  # 60: no overflow
            if self.max_wait is not None:
                wait = min(wait, self.max_wait.total_seconds())
            if self.mode == "reschedule":
                raise AirflowRescheduleException(_utcnow() + wait * _SECOND)
            time.sleep(wait)


class EmptyOperator(BaseOperator):
    """Does nothing: a place to join, start or end at. Takes no worker and stores no value."""

    def execute(self, context: Context) -> None:
        """Do nothing."""


class PythonOperator(BaseOperator):
    """Calls `python_callable(*op_args, **op_kwargs)`, with the context keys that it names, too.

    Raises AirflowException if `python_callable` is no plain callable.
    """

    template_fields: Sequence[str] = ("templates_dict", "op_args", "op_kwargs")

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
        of = f"task {self.task_id!r}:"
        try:
            self.python_callable = _function(f"{of} python_callable", python_callable)
        except TypeError as error:
            raise AirflowException(str(error)) from None
        a_list, a_dict = _of_type(list, tuple, _Placeholder), _of_type(dict, _Placeholder)
        self.op_args = _optional((), a_list).check(f"{of} op_args", op_args)
        self.op_kwargs = _optional({}, a_dict).check(f"{of} op_kwargs", op_kwargs)
        self.templates_dict = _optional(None, a_dict).check(f"{of} templates_dict", templates_dict)

    def execute(self, context: Context) -> Any:
        """Call the callable, as in Airflow with those of `op_kwargs` that it has parameters for."""
        given = {**context, "templates_dict": self.templates_dict}
        takes = _Parameters(self.python_callable)
        args = [] if self.op_args is None else list(self.op_args)
        kwargs = takes.filled(args, takes.fitting(self.op_kwargs or {}), given)
        before = {"op_args": self.op_args, "op_kwargs": self.op_kwargs}
        vars(self).update(op_args=args, op_kwargs=kwargs)  # `__setattr__` would look for results
        try:
            return _awaited(self.execute_callable())
        finally:  # the next poke has another context, and this one refers to the operator
            vars(self).update(before)

    def execute_callable(self) -> Any:
        """Make the call, with the context in `op_kwargs`; a subclass may define another one."""
        return _awaited(self.python_callable(*self.op_args, **self.op_kwargs))


class BranchPythonOperator(PythonOperator):
    """The callable returns the ids of the tasks (or groups) to go on with; the other direct
    downstream tasks are skipped."""

    _flow = "branch"


class ShortCircuitOperator(PythonOperator):
    """A false result of the callable skips all that comes after, or, where
    `ignore_downstream_trigger_rules` is false, the tasks right after it."""

    _flow = "short_circuit"
    ignore_downstream_trigger_rules: bool = _setting(True, _boolean)


class BaseBranchOperator(BaseOperator):
    """A subclass defines `choose_branch(context)`, which returns the ids to go on with."""

    _flow = "branch"

    def choose_branch(self, context: Context) -> Any:
        """A task id, a group id, a list of them, or None."""
        raise NotImplementedError(f"{type(self).__name__} defines no choose_branch(self, context)")

    def execute(self, context: Context) -> Any:
        """Return what `choose_branch` chooses."""
        return self.choose_branch(context)


class PythonSensor(BaseSensorOperator, PythonOperator):
    """A sensor whose poke is a call of `python_callable(*op_args, **op_kwargs)`."""

    poke = PythonOperator.execute


def _jinja(dag: Dag) -> Any:
    jinja2: Any = __import__("jinja2")  # if the user has installed it
    make = jinja2.Environment
    if dag.render_template_as_native_obj:
        make = importlib.import_module("jinja2.nativetypes").NativeEnvironment
    environment = make(undefined=jinja2.StrictUndefined, extensions=["jinja2.ext.do"])
    environment.globals.update(dag.user_defined_macros)
    environment.filters.update(_FILTERS | dag.user_defined_filters)
    return environment


def _rendered(value: Any, context: Context, as_they_are: Collection[int] = ()) -> Any:
    """Render the value's templates. Results (`as_they_are`: their ids) are data, and stay."""
    if id(value) in as_they_are:
        return value
    if isinstance(value, str):
        known = {**context, "conn": _Connections()}
        try:
            return _jinja(context["dag"]).from_string(value).render(known)
        except Exception as error:  # its traceback shows only a line in Jinja
            with contextlib.suppress(Exception):  # a frozen exception takes no note
                error.add_note(f"in the template {_shown(value)}")
            raise
    if isinstance(value, dict):
        return {key: _rendered(item, context, as_they_are) for key, item in value.items()}
    if isinstance(value, _CONTAINERS):
        items = [_rendered(item, context, as_they_are) for item in value]
        kind: Any = type(value)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    if names := hasattr(type(value), "template_fields") and value.template_fields:
        fields = {name: _rendered(getattr(value, name), context, as_they_are) for name in names}
        return _copy_with(value, **fields)
    return value


def _mapped(kind: Any, task_id: str, expand: _ExpandInput, fixed: dict[str, Any]) -> Any:
    """Make a mapped operator. Its own `__init__` is called only for each instance, in a worker."""
    made: Any = object.__new__(kind)
    made._in_partial, made._defaults = fixed, _surroundings(fixed)[2]
    own, known = {}, kind._known_settings
    for name, default in _keywords_of(kind).items():
        if default is not None and name in known and name not in made._defaults:
            # If the setting's check refuses the default, the class means something else by it.
            with contextlib.suppress(TypeError, ValueError, AirflowException):
                own[name] = known[name].check(name, default)
    own |= {name: fixed[name] for name in fixed.keys() & {*_PLACE, *known}}
    BaseOperator.__init__(made, task_id=task_id, **own)
    made._map_over(expand)
    made._take_fields({n: x for n, x in {**fixed, **expand.sources}.items() if n not in _PLACE})
    return made


# --- Building: decorators -------------------------------------------------------------------------


class _Partial(Generic[R]):
    """What `expand` maps: a function or an operator's class, with arguments that are fixed."""

    _what: Any  # what messages call it
    _check: Callable[[Iterable[str], str], None]  # refuses wrong names of a method's arguments
    _make: Callable[..., R]  # takes an _ExpandInput (or None) and the fixed arguments
    _mark: object  # identifies it and its copies by `override`, in `Dag._unused`
    _mapped_wins = False  # whether expand() may map what partial() has fixed, as Airflow's @task

    def __init__(self, what: str, check: Any, make: Any, fixed: dict[str, Any]) -> None:
        self._what, self._check, self._make, self._fixed = what, check, make, fixed
        self._mark = object()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self._what}: partial() must be followed by expand()")

    def partial(self, **fixed: Any) -> _Partial[R]:
        """Fix arguments; to be followed by `expand` or `expand_kwargs`.

        Raises TypeError for an unknown argument, or one that is fixed already.
        """
        if twice := self._fixed.keys() & fixed.keys():
            raise TypeError(f"{self._what}: {min(twice)!r} is in partial() twice")
        self._check(fixed, "partial")
        more: _Partial[R] = _Partial(self._what, self._check, self._make, self._fixed | fixed)
        more._mapped_wins = self._mapped_wins
        self._note_use(_current_dag.get(), more)
        return more

    def expand(self, *unnamed: NoReturn, **mapped: Any) -> R:
        """Map over the elements of the arguments: each element, or each combination, gets an
        instance of the task, or of each task of the group; the last argument varies fastest.
        Returns what a call does: for `@task`, the `XComArg` of all results.

        Each argument is a list, tuple, range, dict (its items) or a result. Raises ValueError for
        anything else, TypeError for an unknown argument, or for one that `partial` has fixed
        (except for `@task`, where the mapped one counts).
        """
        if unnamed:
            raise TypeError(f"{self._what}: name what expand() maps over, as in expand(x=[...])")
        self._check(mapped, "expand")
        twice = self._fixed.keys() & mapped.keys()
        if twice and not self._mapped_wins:
            raise TypeError(f"{self._what}: {min(twice)!r} is in partial() and in expand()")
        self._note_use(_current_dag.get())
        fixed = {name: x for name, x in self._fixed.items() if name not in twice}
        return self._make(_ExpandInput(self._what, mapped), fixed)

    def expand_kwargs(self, dicts: Any) -> R:
        """Like `expand`, but map over a list of dicts of arguments, or a result that is such a
        list. Raises TypeError for anything else."""
        for each in dicts if isinstance(dicts, (list, tuple)) else ():
            keys = each if isinstance(each, Mapping) else ()
            self._check([x if isinstance(x, str) else str(x) for x in keys], "expand_kwargs")
        self._note_use(_current_dag.get())
        return self._make(_ExpandInput(self._what, {None: dicts}), self._fixed.copy())

    def _note_use(self, dag: Dag | None, *made: _Partial[Any]) -> None:
        """Note this as used in the DAG, and what is `made` of it as not yet: see `_slips_in`."""
        if dag is not None:
            dag._unused.pop(self._mark, None)
            dag._unused |= {each._mark: each for each in made}


class _Decorated(_Partial[T], Generic[P, R, T]):
    """A decorated function: each call makes a task, or a group of tasks."""

    _makes = ""  # "task" or "group"
    __name__: str

    def __init__(self, function: Callable[P, R], parameters: Any, settings: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function  # the plain function, which can be called directly
        self._parameters = parameters
        self._settings = {f"{self._makes}_id": function.__name__, **settings}
        self._fixed = {}
        self._mark = object()
        self._note_use(_current_dag.get(), self)

    def override(self, **settings: Any) -> Self:
        """A copy with other settings (`task_id`, `retries`, ...); this one stays as it is."""
        return _copy_with(self, _settings={**self._settings, **settings})

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Add a task that calls the function with these arguments, or a group of what it makes.

        Returns the task's `XComArg`; for a group, what the function returns, or the group if that
        is None. Raises TypeError if the arguments do not fit the function.
        """
        return self._make(None, kwargs, args)

    def _check(self, names: Iterable[str], method: str) -> None:
        if not self._parameters.others:
            _refuse_unknown(f"{self._what}: {method}()", names, self._parameters.names)

    _what = property(lambda self: f"{self._makes} {self._settings[f'{self._makes}_id']!r}")

    def __repr__(self) -> str:
        return f"<@{self._makes.replace('group', 'task_group')} {self.function.__qualname__}>"


class _TaskFunction(_Decorated[P, R, XComArg[Any]]):
    """A function decorated with `@task`: calling it adds a task to the current DAG."""

    _makes = "task"
    _mapped_wins = True
    _role: Callable[[BaseOperator], object] | None = None  # makes the task a setup or teardown
    _conditions: tuple[tuple[_Condition, bool, str | None], ...] = ()
    _maker: Any = _FunctionOperator

    # For type checkers: the result has its type, but arguments are Any, as placeholders fit, too.
    if TYPE_CHECKING:

        @overload
        def __call__(
            self: _TaskFunction[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any
        ) -> XComArg[T]: ...
        @overload
        def __call__(self, *args: Any, **kwargs: Any) -> XComArg[R]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _uncalled(self, other: object) -> None:
        _operands(self)  # this raises, as the function has to be called first

    __rshift__ = __lshift__ = __rrshift__ = __rlshift__ = _uncalled

    def _check(self, names: Iterable[str], method: str) -> None:
        filled = _CONTEXT_KEYS.intersection(names)
        if filled and method == "expand":
            raise ValueError(f"{self._what}: can't expand over the context key {min(filled)!r}")
        super()._check(names, method)

    def _make(self, expand: _ExpandInput | None, kwargs: dict[str, Any], args: Any = ()) -> Any:
        _, _, defaults = _surroundings(self._settings)  # as in Airflow, they fill parameters, too
        mapped = {} if expand is None else expand.sources
        parameters = self._parameters
        unfilled = defaults.keys() - {*mapped, *parameters.by_position(args)} if defaults else ()
        kwargs = {n: defaults[n] for n in parameters.names if n in unfilled} | kwargs
        if expand is None:  # a mapped task checks that for each instance, as in Airflow
            try:
                parameters.bind(args, kwargs)
            except TypeError as error:
                what = f"{self._what}: {self.function.__name__}() {error}"
                taken = _CONTEXT_KEYS.intersection(parameters.by_position(args))
                more = f": {min(taken)!r}, a context key, took one: name arguments" if taken else ""
                raise TypeError(what + more) from None
        made = self._maker(self, args, kwargs, expand, **self._settings)
        self._note_use(made.dag)
        if self._conditions:
            made._conditions = self._conditions
        if self._role is not None:
            self._role(made)
            if made.is_teardown and "trigger_rule" in self._settings:
                own = f"teardown {made.task_id!r} has its own rule"
                raise ValueError(f"{own}: leave trigger_rule out")
        return made.output


def _parameters_of(decorator: str, function: Any) -> _Parameters:
    """What the function takes. Raises TypeError if it is not plain, has no name or signature."""
    check = _function if decorator == "@task" else _sync_function  # only a task may be async
    check(f"what {decorator} decorates (its settings are by name)", function)
    missing = "name"
    if hasattr(function, "__name__"):
        try:
            return _Parameters(function)
        except ValueError:  # some functions that are written in C have no signature
            missing = "signature"
    raise TypeError(f"{decorator}: {_shown(function)} has no {missing}: wrap it in a function")


@_once_each
def _task_parameters(function: Callable[..., Any]) -> _Parameters:
    """What a `@task` function takes; context parameters need not be given."""
    found, name = _parameters_of("@task", function), function.__name__
    if "self" in found.names:
        raise TypeError(f"@task function {name!r} has a parameter named 'self': not supported")
    for key in _CONTEXT_KEYS.intersection(found.names):
        if found.defaults.setdefault(key) is not None:
            filled = f"parameter {key!r} is filled from the context"
            raise ValueError(f"task {name!r}: {filled}: rename it, or leave its default out")
    return found


class _GroupFunction(_Decorated[P, R, Any]):
    """A function decorated with `@task_group`: calling it makes a group of its tasks."""

    _makes = "group"

    def _make(self, expand: _ExpandInput | None, kwargs: dict[str, Any], args: Any = ()) -> Any:
        defaults = {"add_suffix_on_collision": True, "tooltip": self.__doc__ or ""}
        with TaskGroup(**{**defaults, **self._settings}) as group:
            self._note_use(group.dag)
            if expand is not None:
                if group._mapping is not None:
                    raise NotImplementedError(f"{self._what}: mapped groups can't nest")
                group._mapping, expand.of_group = expand, True
                kwargs = {**kwargs, **self._placeholders(expand, kwargs)}
            result = self.function(*args, **kwargs)
        if expand is not None:
            constants = [x for x in expand.sources.values() if isinstance(x, list)]
            # Constants may hold results: each task gets, and waits for, all of these results.
            held = [leaf for leaf in _leaves(constants) if isinstance(leaf, _Mappable)]
            for member in group.children:
                member._map_over(expand)
                member._wait_for_results(held)
            for member in group._starts():  # the other members wait for these
                member._wait_for_results(expand.sources)
        return group if result is None else result

    def _placeholders(self, expand: _ExpandInput, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the group's function gets for the arguments that are mapped over."""
        if None not in expand.sources:
            return {name: _Argument("group_value", name) for name in expand.sources}
        if star := self._parameters.rest or self._parameters.others:
            raise TypeError(f"{self._what}: expand_kwargs() can't fill {star}: name parameters")
        default = {name: [value] for name, value in self._parameters.defaults.items()}
        left = [name for name in self._parameters.names if name not in given]
        return {name: _Argument("group_value", name, *default.get(name, ())) for name in left}


def _decorator_of(kind: type[BaseOperator]) -> Any:
    return property(lambda task: _TaskDecorator(task._dag, _decorated(kind)), doc=kind.__doc__)


class _TaskDecorator:
    """`@task`, bare or with settings; `dag.task` is the same with `dag` set.

    `@task(retries=3)` takes the settings of `BaseOperator`. `task(function)` decorates an
    existing function. The decorated function can be used in several DAGs.
    """

    def __init__(self, dag: Dag | None = None, maker: Any = _FunctionOperator) -> None:
        self._dag, self._maker = dag, maker

    @overload
    def __call__(self, function: Callable[P, R], /) -> _TaskFunction[P, R]: ...
    @overload
    def __call__(self, /, **settings: Any) -> Callable[[Callable[P, R]], _TaskFunction[P, R]]: ...
    def __call__(self, function: Any = None, /, **settings: Any) -> Any:
        if function is None:
            return functools.partial(self, **settings)
        settings = {"dag": self._dag, **settings}
        made: Any = _TaskFunction(function, _task_parameters(function), settings)
        made._maker = self._maker
        return made

    python: _TaskDecorator = _decorator_of(PythonOperator)
    branch: _TaskDecorator = _decorator_of(BranchPythonOperator)
    short_circuit: _TaskDecorator = _decorator_of(ShortCircuitOperator)
    bash: _TaskDecorator = _decorator_of(BashOperator)
    sensor: _TaskDecorator = _decorator_of(BaseSensorOperator)

    def run_if(self, condition: _Condition, skip_message: str | None = None) -> Callable[[T], T]:
        """Above `@task`: skip the task unless `condition(context)` is true."""
        return _conditional(condition, wanted=True, text=skip_message)

    def skip_if(self, condition: _Condition, skip_message: str | None = None) -> Callable[[T], T]:
        """Above `@task`: skip the task if `condition(context)` is true."""
        return _conditional(condition, wanted=False, text=skip_message)

    if not TYPE_CHECKING:  # a type checker that sees this takes every name for right

        def __getattr__(self, name: str) -> NoReturn:
            known = "branch, short_circuit, bash, sensor, python, run_if and skip_if"
            raise AttributeError(f"there is no @task.{name} here: liteflow has {known}")


def _conditional(condition: _Condition, wanted: bool, text: str | None) -> Callable[[T], T]:
    _sync_function("the condition of @task.run_if or @task.skip_if", condition)

    def decorate(function: T) -> T:
        if not isinstance(function, _TaskFunction):
            raise TypeError("@task.run_if and @task.skip_if stand above @task")
        return _copy_with(function, _conditions=((condition, wanted, text), *function._conditions))

    return decorate


task = _TaskDecorator()


def setup(function: Any = None, **settings: Any) -> _Decorated[..., Any, Any]:
    """`@setup`: a task that must succeed for what comes after it; see `BaseOperator.as_setup`."""
    return _with_role(BaseOperator.as_setup, function, settings)


def teardown(
    function: Any = None, *, on_failure_fail_dagrun: bool = False, **settings: Any
) -> _Decorated[..., Any, Any]:
    """`@teardown`: a task that cleans up after its setups, whatever the work between did.

    Its failure does not fail the run unless `on_failure_fail_dagrun`.
    """
    role = operator.methodcaller("as_teardown", on_failure_fail_dagrun=on_failure_fail_dagrun)
    return _with_role(role, function, settings)


def _with_role(role: Any, function: Any, settings: dict[str, Any]) -> _Decorated[..., Any, Any]:
    if function is None:
        return functools.partial(_with_role, role, settings=settings)  # type: ignore
    made = function if isinstance(function, _TaskFunction) else task(function)
    if made._role is not None:
        raise ValueError(f"{made!r} is a @setup or @teardown already")
    return _copy_with(made.override(**settings), _role=role)


def task_group(function: Any = None, /, **settings: Any) -> _Decorated[..., Any, Any]:
    """`@task_group`, bare or with `group_id` and the settings of `TaskGroup`.

    Calling the decorated function makes a group of the tasks made inside it; a second call gets
    an id with a suffix.
    """
    if function is None or isinstance(function, str):
        named = {} if function is None else {"group_id": function}
        return functools.partial(task_group, **named, **settings)  # type: ignore
    return _GroupFunction(function, _parameters_of("@task_group", function), settings)


# --- Building: DAGs -------------------------------------------------------------------------------


def _schedule(what: str, value: Any) -> Any:
    """Check one of Airflow's schedules, which is kept and has no effect."""
    if isinstance(value, (int, float, bytes)) or type(value) is object:
        raise ValueError(f"{what} must be None, cron or a timedelta, found {_shown(value)}")
    return value


_current_dag = contextvars.ContextVar["Dag | None"]("liteflow_dag", default=None)
# Every Dag by (module, dag_id, n): the n-th of that id built in that module. A worker that
# imports the module finds its own Dag under the same key, or none. Each import counts from 0, as
# Dask's upload_file imports a file twice; the ids of specs, which are kept, tell them apart.
_built: weakref.WeakValueDictionary[tuple[str, str, int], Dag] = weakref.WeakValueDictionary()
_built_counts: dict[tuple[str, str, int], tuple[Iterator[int], Any]] = {}
_kept_dags: list[Dag] = []  # those of a loaded script, kept alive for workers; commands look here
_main = sys.modules.get("__main__")  # at the import of this module
_main_file = getattr(_main, "__file__", None)


class Dag:
    """A DAG: tasks and the order between them.

    Use it as a context manager (tasks made inside the block belong to it) or hand it to tasks as
    `dag=`. Arguments are Airflow's: `description`, `default_args`, `params`, `max_active_tasks`
    (16 a run), `max_active_runs` (any number), `fail_fast`, `doc_md`, `tags`, ...; `schedule`,
    `start_date`, `catchup` and the like are kept and change nothing: liteflow schedules nothing.
    `db_path` is the database of its runs. `DAG` and `Dag` are one class.

    Raises TypeError for an unknown or wrong argument, ValueError for a wrong id or value.
    """

    description: str | None = _optional(None, _of_type(str))
    default_args: dict[str, Any] = _setting({}, _string_keyed)
    params: dict[str, Any] = _setting({}, _params)
    max_active_tasks: int = _optional(16, _of_type(int, least=1))
    max_active_runs: int | None = _optional(None, _of_type(int, least=1))
    dagrun_timeout: _datetime.timedelta | None = _optional(None, _timeout)
    fail_fast: bool = _setting(False, _boolean)
    doc_md: str | None = _optional(None, _of_type(str))
    tags: set[str] = _setting(
        (), lambda what, x: {*_of_type(list, tuple, set, frozenset)(what, () if x is None else x)}
    )
    dag_display_name: str = _optional(None, _of_type(str))
    on_success_callback = on_failure_callback = _callback
    schedule = _setting(None, _schedule)
    start_date = end_date = _date
    catchup = render_template_as_native_obj = _setting(False, _boolean)
    max_consecutive_failed_dag_runs = _optional(0, _of_type(int, least=0))
    user_defined_macros = user_defined_filters = _setting(  # not copied: a script may add to it
        None, lambda what, x: {} if x is None else _of_type(dict)(what, x)
    )
    is_paused_upon_creation = template_searchpath = template_undefined = access_control = _as_given
    jinja_environment_kwargs = disable_bundle_versioning = rerun_with_latest_version = _as_given
    owner_links = auto_register = deadline = allowed_run_types = sla_miss_callback = _as_given

    def __init__(self, dag_id: str, *, db_path: _StrPath | None = None, **settings: Any) -> None:
        self.dag_id = _checked_id("dag_id", dag_id)
        self.db_path = _optional(None, _path).check(f"DAG {dag_id!r}: db_path", db_path)
        of_tasks = BaseOperator._known_settings.keys() - _DAG_SETTINGS.keys()
        for name in sorted(of_tasks & settings.keys()):
            raise TypeError(f"DAG {dag_id!r}: {name!r} is a setting of tasks: use default_args")
        _refuse_unknown(f"DAG {dag_id!r}", settings, _DAG_SETTINGS, *of_tasks)
        for name, setting in _DAG_SETTINGS.items():
            setattr(self, name, settings.get(name, setting.default))
        self.start_date = start = settings.get("start_date") or self.default_args.get("start_date")
        # As in Airflow, the DAG has the zone of `start_date`, which itself is kept in UTC.
        self.timezone: _datetime.tzinfo = getattr(start, "tzinfo", None) or _datetime.UTC
        self.dag_display_name = self.dag_display_name or dag_id
        defaults = _params(f"DAG {dag_id!r}: params", self.default_args.pop("params", None))
        self.params = {**self.params, **defaults}
        self.task_dict: dict[str, BaseOperator] = {}
        self.task_group_dict: dict[str, TaskGroup] = {}
        self._unused: dict[object, _Partial[Any]] = {}  # by mark, what is not called or expanded
        self._suffixes: collections.Counter[str] = collections.Counter()
        self._scopes: list[BaseOperator] = []  # setups and teardowns whose `with` blocks are open
        self._tokens: list[contextvars.Token[Dag | None]] = []
        self._register()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DAG_SETTINGS:
            value = _DAG_SETTINGS[name].check(f"DAG {self.dag_id!r}: {name}", value)
        object.__setattr__(self, name, value)

    def _register(self) -> None:
        """Note which module's import builds this Dag: that of the nearest module on the stack."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "<module>":
            frame = frame.f_back  # type: ignore[assignment]
        names, self._line = (frame.f_globals, frame.f_lineno) if frame is not None else ({}, 0)
        self._module = _module_name(names.get("__name__", ""))
        self.fileloc = _file_of(names)
        self._identity = self.fileloc and _file_identity(self.fileloc)
        is_loaded = names.get("__name__") == "__mp_main__"  # `liteflow run` loads a script so, too
        # `names` is not the main module's under a profiler, which may be `__main__` itself, or in a
        # doctest, which has a copy; and a script of marimo builds no Dag when it is imported.
        caller = getattr(frame and frame.f_back, "f_globals", {}).get("__name__") or ""
        is_main = names is vars(sys.modules["__main__"]) and not caller.startswith("marimo.")
        self._is_of_main = is_loaded or is_main
        self._born = _monotonic()
        place, spec = (self._module, self.dag_id), names.get("__spec__")
        count, _ = _built_counts.setdefault((*place, id(spec)), (itertools.count(), spec))
        self._key = (*place, next(count))
        _built[self._key] = self
        if is_loaded:
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
        """The tasks that wait for no other."""
        return [t for t in self.task_dict.values() if not t._upstream]

    @property
    def leaves(self) -> list[BaseOperator]:
        """The tasks that no other waits for."""
        return [t for t in self.task_dict.values() if not t._downstream]

    @property
    def owner(self) -> str:
        """The owners of the tasks, for alerts."""
        return ", ".join(sorted({t.owner for t in self.tasks}))

    def has_task(self, task_id: str) -> bool:
        """Whether the DAG has a task of this id."""
        return _of_type(str)("task_id", task_id) in self.task_dict

    def get_task(self, task_id: str) -> BaseOperator:
        """The task of this id. Raises TaskNotFound."""
        if not self.has_task(task_id):
            near = _near(task_id, self.task_dict)
            raise TaskNotFound(f"DAG {self.dag_id!r} has no task {task_id!r}{near}")
        return self.task_dict[task_id]

    def __getitem__(self, node_id: str) -> BaseOperator | TaskGroup:
        """The task or group of this id. Raises NodeNotFound, a KeyError."""
        _of_type(str)("node_id", node_id)
        found = self.task_dict.get(node_id, self.task_group_dict.get(node_id))
        if found is None:
            near = _near(node_id, [*self.task_dict, *self.task_group_dict])
            raise NodeNotFound(f"DAG {self.dag_id!r} has no task or group {node_id!r}{near}")
        return found

    def __contains__(self, node_id: object) -> bool:
        is_id = isinstance(node_id, str)
        return is_id and (node_id in self.task_dict or node_id in self.task_group_dict)

    def _add(self, task: BaseOperator) -> None:
        if self.fail_fast and task.trigger_rule is not TriggerRule.ALL_SUCCESS:
            why = f"fail_fast=True allows all_success, not {task.trigger_rule}"
            raise FailFastDagInvalidTriggerRule(f"task {task.task_id!r}: {why}")
        self._claim(task.task_id)
        vars(task)["dag"] = self
        self.task_dict[task.task_id] = task
        self._born = _monotonic()
        if self._scopes:
            self._scopes[-1]._made_inside.append(task)

    def _claim(self, node_id: str) -> None:
        """Raise DuplicateTaskIdFound if the id is taken; else note its suffix, for `_free_id`."""
        if node_id in self:
            raise DuplicateTaskIdFound(f"id {node_id!r} is taken already in DAG {self.dag_id!r}")
        core, _, number = node_id.rpartition("__")
        if number.isdecimal():
            self._suffixes[core] = max(self._suffixes[core], int(number))

    def _free_id(self, node_id: str, taken: Any) -> str:
        """The id; if it is `taken`, with a suffix: the highest in use plus 1 (Airflow)."""
        if node_id not in taken:
            return node_id
        core = re.sub(r"__\d+$", "", node_id)
        return f"{core}__{self._suffixes[core] + 1}"

    def validate(self) -> list[BaseOperator]:
        """Check the graph. Returns the tasks, each after those that it waits for.

        Raises AirflowDagCycleException for a circle, ValueError for a task right below a setup
        with another trigger rule than all_success.
        """
        order = self.topological_sort()
        for setup, below in [(s, t) for s in order if s.is_setup for t in s.downstream_list]:
            if below.trigger_rule != "all_success" and not below.is_teardown:
                what = f"task {below.task_id!r} stands right below the setup {setup.task_id!r}"
                must = f"its trigger_rule must be 'all_success', found '{below.trigger_rule}'"
                raise _UsageError(f"{what}: {must}")
        return order

    def check_cycle(self) -> None:
        """Raise AirflowDagCycleException, which shows the circle, if tasks wait for each other."""
        self.topological_sort()

    def topological_sort(self) -> list[BaseOperator]:
        """The tasks, each after those it waits for. Raises AirflowDagCycleException."""
        if not any(task._upstream for task in self.task_dict.values()):
            return self.tasks  # without the import of graphlib
        sorter = graphlib.TopologicalSorter({t: x._upstream for t, x in self.task_dict.items()})
        try:
            return [self.task_dict[t] for t in sorter.static_order()]
        except graphlib.CycleError as error:
            circle = error.args[1]
            path = " -> ".join(circle if len(circle) <= 12 else [*circle[:6], "...", *circle[-5:]])
            raise AirflowDagCycleException(f"DAG {self.dag_id!r} has a cycle: {path}") from None

    def run(
        self,
        *,
        db_path: _StrPath | None = None,
        run_id: str | None = None,
        logical_date: _datetime.datetime | None = None,
        conf: Mapping[str, Any] | None = None,
        resume: bool = False,
        max_workers: int | None = None,
        executor: concurrent.futures.Executor | WorkerPool | None = None,
        mp_context: multiprocessing.context.BaseContext | str | None = None,
        pools: Mapping[str, int] | None = None,
        wait: bool = False,
        progress: bool | Callable[[str], object] = False,
        stop: threading.Event | None = None,
    ) -> DagRun:
        """Run every task once the tasks it waits for allow it; return the finished run.

        A failed task does not raise: look at the run's `state`. `db_path` is the argument, else
        the DAG's, else `$LITEFLOW_DB`, else `liteflow.db` in the working directory. `run_id` is
        made from the time unless given; `logical_date` is now unless given; `conf` is a JSON object
        for the run. `resume=True` goes on with the run `run_id`, or with the newest one unless that
        succeeded. `max_workers` processes (unless given, the usable CPUs) are started by the
        method `mp_context`; or `executor` is a `WorkerPool` or any `concurrent.futures.Executor`.
        `pools` gives the sizes of the pools that tasks name, `{"gpu": 1}`. `wait=True` waits while
        another run of the DAG keeps this one from starting. `progress=True` prints what happens to
        standard error; a callable gets each line, until it raises. Setting the event `stop` ends
        the run as failed.

        Raises, before anything runs or is written: AirflowDagCycleException, UnreachableTask,
        ParamValidationError, DatabaseError, RunNotFound, AlreadyRunning, DagRunAlreadyExists,
        TypeError, ValueError; AirflowException if `stop` is set already, RuntimeError if the
        `executor` is shut down.
        On SIGINT, SIGTERM or SIGHUP it records all, then raises KeyboardInterrupt or SystemExit.
        The program's own signal handlers are called between two turns; if one raises, the run ends.
        """
        options = dict(locals())  # all arguments, by their names
        return _Run(options.pop("self"), **options).execute()

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
        db_path: _StrPath | None = None,
    ) -> DagRun:
        """Run in this process, one task after another, so that a debugger's breakpoints work.

        Writes the database as `run` does, but captures no output. A task that outlives its timeout
        gets AirflowTaskTimeout raised in it, in the main thread, and is not killed. The signature
        is Airflow's; ValueError for an argument without a meaning here (`use_executor`).
        """
        if any((run_after, use_executor, conn_file_path, variable_file_path, mark_success_pattern)):
            raise ValueError("dag.test() here takes only logical_date, run_conf and db_path")
        run = _Run(self, db_path=db_path, logical_date=logical_date, conf=run_conf, in_process=True)
        return run.execute()

    def param(self, name: str, default: Any = ...) -> Any:
        """The placeholder of the run's param of this name, to be handed to tasks. A `default`
        becomes the param's default. Raises ParamValidationError if it does not fit."""
        if default is not ...:
            self.params[name] = default
        return _Argument("param", name, *(() if default is ... else (default,)))

    def cli(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Make the script a command: run this DAG by `argv`, then exit with the run's code.

        Without arguments it runs; `--help` lists the options.
        """
        sys.exit(_dag_cli(self, argv))

    def to_mermaid(self, direction: str = "TD") -> str:
        """The DAG as a Mermaid flowchart, drawn from the code: what would run."""
        return _draw(_dag_boxes(self), direction)

    def runs(
        self, db_path: _StrPath | None = None, *, state: str | None = None, limit: int | None = None
    ) -> list[DagRun]:
        """The recorded runs of this DAG, newest first: those in `state`, at most `limit` of them.

        Raises DatabaseError; TypeError or ValueError for a wrong state or limit.
        """
        _optional(None, _of_type(int, least=0)).check("limit", limit)
        state = _optional(None, _one_of(DagRunState)).check("state", state)
        return _read_runs(_database_path(db_path, self), self.dag_id, state=state, limit=limit)

    def get_run(self, run_id: str, db_path: _StrPath | None = None) -> DagRun:
        """The recorded run of this id. Raises RunNotFound, DatabaseError."""
        return _read_run(_database_path(db_path, self), self.dag_id, run_id)

    @staticmethod
    def load(dag_id: str, db_path: _StrPath | None = None) -> Dag:
        """A DAG by its record: metadata and history (`runs`, `get_run`) without its tasks.

        The database never holds task code or the graph, so `run()` and everything about tasks
        raise a RuntimeError that names the script. Raises DagNotFound (a LookupError) for an
        unknown id, DatabaseError.
        """
        return _load_dag(dag_id, _database_path(db_path, None))

    def _repr_html_(self) -> str:
        return _notebook(_html("h1", self.dag_id), _svg_graph(_dag_boxes(self)))

    def _repr_mimebundle_(self, **asked: Any) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"<DAG: {self.dag_id}>"


DAG = Dag
_DAG_SETTINGS = {name: x for name, x in vars(Dag).items() if isinstance(x, _Setting)}


class _RecordedDag(Dag):
    """What `Dag.load` returns: a DAG's metadata and history; what needs its code is refused."""

    def _register(self) -> None:
        """Do nothing: no worker looks for it."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("task", "task_dict", "_tokens", "cli"):  # all ways to its tasks
            what = f"DAG {self.dag_id!r} was loaded from {self.db_path}, which holds its history"
            script = f"run the script which defines it ({self.fileloc or 'no file'})"
            raise RuntimeError(f"{what} and not its tasks; {script}")
        return super().__getattribute__(name)

    def _repr_html_(self) -> str:
        """What a notebook shows where there is no graph."""
        return _notebook(_html("h1", self.dag_id), _html("p", self.description or ""))


def _slips_in(dag: Dag) -> Iterator[str]:
    """Yield warnings of what has no effect in a DAG. Airflow lets this pass, so it is no error."""
    for each in dag._unused.values():
        is_bare = isinstance(each, _Decorated)
        why = "without a call in the DAG it" if is_bare else "partial() without expand()"
        yield f"{each._what}: {why} makes no task"
    for task in dag.tasks:
        own = {} if isinstance(task, _FunctionOperator) else vars(task)
        for name, value in own.items():
            if isinstance(value, _Placeholder) and name not in task.template_fields:
                placed = f"is {value!r}, and not in template_fields: it stays a placeholder"
                yield f"task {task.task_id!r}: {name!r} {placed}"
        if task._flow and task._mapping and not task._mapping.of_group and task._downstream:
            yield f"task {task.task_id!r}: mapped alone it skips nothing, in a mapped group it does"
        if (text := vars(task).get("_unrendered")) is not None:
            passed = f"task {task.task_id!r}: {_shown(text, 60)} is passed as it is"
            yield f"{passed}: no Jinja is rendered in arguments of @task"
        if vars(task).get("_made_inside") == [] and task._takes_more:
            yield f"no task is made in `with` {task.task_id!r}: its scope is empty"
        loose = task.is_teardown and not any(up.is_setup for up in task.upstream_list)
        above = _all_from(task.upstream_list, lambda up: up.upstream_list) if loose else ()
        for setup in [x for x in above if x.is_setup]:
            if not any(below.is_teardown for below in setup.downstream_list):
                what = f"teardown {task.task_id!r} is of no setup, so none runs again with it"
                yield f"{what}; as_teardown(setups=...) makes it that of {setup.task_id!r}"
    given = {*dag.default_args}.union(*(g.default_args for g in dag.task_group_dict.values()))
    kinds = {type(task) for task in dag.tasks} if given else ()
    known = {name for kind in kinds for name in (*_keywords_of(kind), *kind._known_settings)}
    for name in sorted(given - known) if known else ():
        yield f"default_args: no task takes {name!r}{_near(name, known)}"


def _file_of(names: Mapping[str, Any]) -> str | None:
    """The file of the module with these global names, or None if no import can find one."""
    path = str(names.get("__file__") or "")  # under a debugger it may be of a subclass of str
    is_prompt = os.path.basename(os.path.dirname(path)) == "_pyrepl"  # since Python 3.13
    return None if is_prompt else path or None


def _script() -> tuple[str, str]:
    """How a worker finds `__main__`: its file, and the name that `python -m` found it by; "" for
    what it does not have. What the module has lost of these is put back, for multiprocessing."""
    main = vars(sys.modules["__main__"])
    # Python drops `__file__` once a script has ended, though its threads and submitted runs go on.
    # It is left alone if a prompt has followed the script (-i), or a notebook ran it.
    if sys.modules["__main__"] is _main and _main_file and not sys.flags.inspect:
        main.setdefault("__file__", _main_file)
    spec = main.setdefault("__spec__", None)  # up to Python 3.12, pdb removes it
    return _file_of(main) or "", spec.name if spec else ""


def _module_name(name: str) -> str:
    """A module's name in the script's own process: in a worker, `__main__` is `__mp_main__`."""
    return "__main__" if name == "__mp_main__" else name


@overload
def dag(function: Callable[P, Any], /) -> Callable[P, Dag]:
    """`@dag`: make a DAG of the function's tasks; calling the function returns the DAG."""


@overload
def dag(dag_id: str = ..., /, **settings: Any) -> Callable[[Callable[P, Any]], Callable[P, Dag]]:
    """`@dag(...)`: the same with an id other than the function's name, or settings of a DAG."""


def dag(function: Any = None, /, **settings: Any) -> Callable[..., Any]:
    """`@dag`: make a DAG of the function's tasks; calling the function returns the DAG.

    Use it bare, as `@dag("id")` or `@dag(dag_id=..., **settings)` with the arguments of `DAG`.
    The id is the function's name unless given, its docstring the `doc_md`. The function's
    arguments become params: inside the function each is a placeholder that can be handed to tasks;
    at run time its value is `conf[name]`, else that of the call.
    """
    if function is None or isinstance(function, str):
        named = {} if function is None else {"dag_id": function}
        return functools.partial(dag, **named, **settings)
    parameters = _parameters_of("@dag", function)
    if star := parameters.rest or parameters.others:
        why = f"has {star}: each argument is a param, with a name of its own"
        raise TypeError(f"@dag function {function.__name__!r} {why}")

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Dag:
        """Make the DAG."""
        try:
            bound = parameters.bind(args, kwargs)
        except TypeError as error:
            raise TypeError(f"@dag {function.__name__}() {error}") from None
        made = Dag(**{"dag_id": function.__name__, "doc_md": function.__doc__, **settings})
        made.params.update({name: bound[name] for name in parameters.names})
        given = {name: _Argument("param", name, bound[name]) for name in parameters.names}
        by_position = [given.pop(name) for name in parameters.names[: parameters.places]]
        with made:
            function(*by_position, **given)
        return made

    return build


def chain(*tasks: Any) -> None:
    """Set each before the next; neighbouring lists pair by pair. ValueError if lengths differ."""
    for before, after in itertools.pairwise(tasks):
        if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
            if len(before) != len(after):
                found = f"{len(before)} and {len(after)}"
                raise ValueError(f"chain() takes neighbouring lists of one length, found {found}")
            for pair in zip(before, after, strict=True):
                chain(*pair)
        else:
            cross_downstream(_operands(before), after)


def chain_linear(*elements: Any) -> None:
    """Set all tasks of each argument before all of the next. ValueError for fewer than two."""
    if sum(bool(_operands(each)) for each in elements) < 2:
        raise ValueError("chain_linear() takes two or more tasks or lists of tasks: none were set")
    for before, after in itertools.pairwise(elements):
        cross_downstream(_operands(before), after)


def cross_downstream(from_tasks: Any, to_tasks: Any) -> None:
    """Set every task of the first list before every one of the second."""
    for one in _operands(_of_type(list, tuple)("from_tasks", from_tasks)):
        one.set_downstream(to_tasks)


# --- Building: variables and params ---------------------------------------------------------------


class Variable:
    """Airflow's Variables, read from the environment: `Variable.get("x")` is AIRFLOW_VAR_X."""

    @staticmethod
    def get(
        key: str, default: Any = ..., deserialize_json: bool = False, *, default_var: Any = ...
    ) -> Any:
        """The value of `AIRFLOW_VAR_<KEY>`, as text or parsed from JSON. `default_var` is the
        name of `default` in `airflow.models`.

        Raises KeyError if it is not set and no default is given, ValueError if it is no JSON.
        """
        default = default_var if default is ... else default
        name = f"AIRFLOW_VAR_{_of_type(str)('key', key).upper()}"
        _boolean("deserialize_json", deserialize_json)
        if name in os.environ:
            try:
                return json.loads(os.environ[name]) if deserialize_json else os.environ[name]
            except ValueError as error:
                raise ValueError(f"Variable {key!r}: {name} is no JSON: {error}") from None
        if default is ...:
            raise KeyError(f"Variable {key!r}: set {name} in the environment")
        return default


class Param:
    """A parameter of a DAG or task: a default, a description and a JSON schema for its value.

    Checked keywords: type, enum, const, minimum, maximum, exclusiveMinimum, exclusiveMaximum,
    multipleOf, minLength, maxLength, pattern, format (date, date-time, time, duration, email,
    idn-email, multiline), items, minItems, maxItems, required, properties; title, description,
    examples and others of Airflow's that only describe are kept. Any other keyword is a ValueError:
    none is silently unchecked. Values are checked when a run is made.
    """

    def __init__(self, default: Any = ..., description: str | None = None, **schema: Any):
        self.default = self.value = default
        self.description = description
        self.schema = {**_string_keyed("Param: schema", schema.pop("schema", None)), **schema}
        _check_schema(self.schema)
        if default is not ...:
            _json_text("Param default", default, ParamValidationError)

    def resolve(self, value: Any = ...) -> Any:
        """The value, or the default, if it fits the schema. Raises ParamValidationError."""
        value = self.default if value is ... else value
        if value is ...:
            raise ParamValidationError("no value was given and there is no default")
        _validate(value, self.schema)
        return value


class _Params(dict[str, Any]):
    """JSON values or Param objects, by name. As in Airflow, a look-up gives a Param's default."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.resolve() if isinstance(value, Param) else value

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a param. A declared Param of this name checks the value, and keeps its schema."""
        declared = super().get(name)
        if not isinstance(value, Param) and isinstance(declared, Param):
            _resolved("", {name: declared}, {name: value})
            value = Param(value, declared.description, schema=declared.schema)
        elif not isinstance(value, Param):
            _json_text(f"param {name!r}", value, ParamValidationError)
        super().__setitem__(name, value)

    def update(self, *given: Any, **named: Any) -> None:
        """Set each, as `params[name] = value` does."""
        for name, value in dict(*given, **named).items():
            self[name] = value

    def __ior__(self, given: Any) -> Self:  # type: ignore[override,misc]
        self.update(given)
        return self

    # These go by `__getitem__` and `__setitem__`; those of dict would not.
    get: Any = Mapping.get
    setdefault: Any = collections.abc.MutableMapping.setdefault

    def pop(self, name: str, default: Any = ...) -> Any:  # MutableMapping's needs a subclass
        value = self[name] if default is ... else self.get(name, default)
        super().pop(name, None)
        return value


def _json_text(what: str, value: Any, error_class: type[Exception]) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise error_class(f"{what} must be JSON: {error}; found {_shown(value)}") from None
    if len(text) > _TEXT_LIMIT:
        most = f"has {len(text):,} characters as JSON, and at most {_TEXT_LIMIT:,} are kept"
        raise error_class(f"{what} {most}: hand over a path")
    return text


def _entry_of(table: Mapping[str, T], name: str) -> T:
    if name not in table:
        raise ValueError(f"{name!r} is nothing that a Param checks; known: {', '.join(table)}")
    return table[name]


_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list, tuple),
    "object": (dict,),
}


def _is_of_type(value: Any, names: str | Iterable[str]) -> bool:
    """Whether the value is of one of the named types; a bool is no number, 3.0 is an integer."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    each = [_entry_of(_TYPES, name) for name in ([names] if isinstance(names, str) else names)]
    return any(isinstance(value, t) and (bool in t or not isinstance(value, bool)) for t in each)


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed)


# Each raises ValueError, or returns something false, for a text that does not fit. The slices ask
# for the signs that JSON Schema wants, as `fromisoformat` does without them ("20260101").
_FORMATS: dict[str, Callable[[str], Any]] = {
    "date": lambda text: text[7:8] == "-" and _datetime.date.fromisoformat(text),
    "date-time": lambda text: text[13:14] == ":" and _datetime.datetime.fromisoformat(text),
    "time": lambda text: text[2:3] == ":" and _datetime.time.fromisoformat(text),
    "duration": lambda text: re.fullmatch(  # ISO 8601
        r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?", text
    ),
    **dict.fromkeys(("email", "idn-email"), lambda text: "@" in text),  # as Airflow checks it
    "multiline": lambda text: True,  # says only how Airflow's form shows the field
}


def _has_format(text: str, name: str) -> bool:
    parse = _entry_of(_FORMATS, name)
    with contextlib.suppress(ValueError):
        return bool(parse(text))
    return False


def _number(what: str, value: Any) -> None:
    if math.isnan(_of_type(int, float)(what, value)):
        raise ValueError(f"{what} must be a number")


_size = _of_type(int, least=0)
# By JSON Schema's keyword: the type of values it is about (None: any); whether a value fits a rule;
# and a check of the rule, if it is not enough that `_check_schema` tries the rule on a sample.
_KEYWORDS: dict[str, tuple[Any, ...]] = {
    "type": (None, _is_of_type, _of_type(str, list, tuple)),
    "enum": (None, _is_one_of, _of_type(list, tuple)),
    "const": (None, lambda value, rule: _is_one_of(value, [rule])),
    "minimum": ("number", operator.ge, _number),
    "maximum": ("number", operator.le, _number),
    "exclusiveMinimum": ("number", operator.gt, _number),
    "exclusiveMaximum": ("number", operator.lt, _number),
    # Only the quotient shows that 1.0 is a multiple of 0.1, but a large int's quotient is rounded.
    "multipleOf": ("number", lambda x, n: x % n == 0 or (isinstance(n, float) and x / n % 1 == 0)),
    "minLength": ("string", lambda value, rule: len(value) >= rule, _size),
    "maxLength": ("string", lambda value, rule: len(value) <= rule, _size),
    "pattern": ("string", lambda value, rule: re.search(rule, value)),
    "format": ("string", _has_format),
    "items": ("array", lambda value, rule: all(_validate(item, rule) for item in value)),
    "minItems": ("array", lambda value, rule: len(value) >= rule, _size),
    "maxItems": ("array", lambda value, rule: len(value) <= rule, _size),
    "required": ("object", lambda value, rule: value.keys() >= set(rule), _of_type(list, tuple)),
    "properties": ("object", lambda x, rule: all(_validate(x[n], rule[n]) for n in rule if n in x)),
    **dict.fromkeys(
        """title examples description_md values_display section source custom_html_form
        $schema""".split(),
        (None, lambda value, rule: True),
    ),
}


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown keyword, or for a wrong rule of a known one."""
    for keyword, rule in schema.items():
        kind, fits, *checks = _entry_of(_KEYWORDS, keyword)
        try:
            for check in checks:
                check(keyword, rule)
            fits(_TYPES[kind or "number"][0](), rule)  # a sample: 0, "", [] or {}
            if keyword == "items":
                _check_schema(rule)
            for inner in rule.values() if keyword == "properties" else ():
                _check_schema(inner)
        except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
            raise ValueError(f"Param: {keyword} can't be {_shown(rule)}: {error}") from None


def _validate(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return True. Raises ParamValidationError if the value, or a part of it, does not fit."""
    for keyword, rule in schema.items():
        kind, fits, *_ = _KEYWORDS[keyword]
        if (kind is None or _is_of_type(value, kind)) and not fits(value, rule):
            raise ParamValidationError(f"{_shown(value)} does not fit {keyword} {_shown(rule)}")
    return True


def _plain_copy(value: Any) -> Any:
    """A deep copy of a JSON value, as a task may change what it gets. A tuple becomes a list, an
    enum's member that is text becomes plain text."""
    return json.loads(json.dumps(value))


def _resolved(what: str, params: Mapping[str, Any], conf: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of a DAG's or a task's params: those in `conf`, or else the defaults.
    Raises ParamValidationError, whose text begins with `what`."""
    values = {}
    for name, param in params.items():
        try:
            param = param if isinstance(param, Param) else Param(param)
            values[name] = param.resolve(conf.get(name, ...))
        except ParamValidationError as error:
            raise ParamValidationError(f"{what}param {name!r}: {error}") from None
    return values


# --- Plan: which task may run, and what follows from each outcome (no I/O, no clock) --------------

# The plan's words. Node: a task with its instances. Decided: an instance that its trigger rule has
# let run, or that has ended. Gate of a node: a branch or short circuit that may skip it (leave it
# out). Scope of a setup: all between it and its teardowns, or all below it if it has none. In step:
# nodes of one mapped group, where an instance concerns only those of its own index. Passing: an
# instance (of EmptyOperator) that needs no worker. Doomed: one that was sent, and that the run is
# to end. Crowded: a node whose max_active_tis_per_dag all runs together use up. In a resume, what
# runs again pulls all downstream: it does so, too. What goes along, or may not run, pulls nothing.


class _Past(_NamedTuple):
    """A recorded task instance of a run that is resumed, with its latest attempt. `_Resumption`
    changes these to what the plan starts from: those to be decided anew have the state None."""

    row_id: int
    task_id: str
    map_index: int
    state: str | None
    try_number: int
    max_tries: int
    lost: int = 0  # attempts in a row that went down with their scheduler
    cleared: int = 0  # _CLEARED: with all that is downstream; or _CLEARED_ALONE
    element: str | None = None  # what it was mapped over, as a digest
    preview: str | None = None  # what it was mapped over, as a short text for people
    takes: str | None = None  # the tasks whose results it took, as JSON
    flow: str | None = None  # what a branch chose, or whether a short circuit went on, as JSON
    role: str | None = None
    above: str | None = None  # the tasks that it waited for, as JSON
    attempt_state: str | None = None
    began: str | None = None
    ended: str | None = None
    died: bool = False  # its scheduler died while the attempt was queued or running


_CLEARED, _CLEARED_ALONE = 1, 2
_NEVER_RUN = _Past(0, "", -1, None, try_number=0, max_tries=0)  # for a new instance of any task

# A node counts what it waits for in five numbers: at these places, the instances that ended so (one
# that a stopped run leaves counts as upstream_failed); at _PENDING, the tasks with any pending.
_END_AT: dict[str | None, int] = {_S.SUCCESS: 0, _S.FAILED: 1, _S.UPSTREAM_FAILED: 2, _S.SKIPPED: 3}
_PENDING = 4
_NO_COUNTS = [0] * 5  # shared by all nodes that wait for nothing
_Nodes = list["_Node"] | tuple[()]  # most nodes have none, and share the empty tuple
_callbacks_and_timeout = operator.attrgetter(*_CALLBACK_OF.values(), "execution_timeout")


class _Instance:
    """One task instance in the plan. `try_number` counts attempts that were sent, from 1."""

    __slots__ = """alone before counts_as decided flow lost map_index max_tries node row_id
        state task_id try_number""".split()
    label = property(lambda self: _label_of(self.task_id, self.map_index))  # for people

    def __init__(self, node: _Node, map_index: int, recorded: _Past) -> None:
        self.node, self.map_index = node, map_index
        self.task_id = node.task.task_id
        self.state = None if recorded.state is None else TaskInstanceState(recorded.state)
        self.try_number = recorded.try_number
        self.max_tries = recorded.max_tries if recorded.row_id else node.task.retries
        self.lost = recorded.lost
        self.flow = recorded.flow
        self.alone = recorded.died  # it may have killed its scheduler: it is sent alone
        self.row_id = recorded.row_id
        self.decided = False  # its rule has let it run, or it has ended
        self.counts_as = _PENDING  # a place of _END_AT, once it has ended or is left undone
        self.before: TaskInstanceState | None = None  # its state when it was last sent

    def beside(self, node: _Node) -> Sequence[_Instance]:
        """The node's instances that concern this one: that of its index if in step, else all."""
        expanded = self.map_index >= 0 and node.instances[0].map_index >= 0
        in_step = expanded and self.node.is_in_step_with(node)
        return (node.instances[self.map_index],) if in_step else node.instances

    def is_before_end(self, nodes: Sequence[_Node]) -> bool:
        """Whether an instance of the nodes that concerns this one has not ended."""
        still_open = (node for node in reversed(nodes) if node.open)
        return any(x.counts_as == _PENDING for node in still_open for x in self.beside(node))

    def move(self, state: TaskInstanceState | None) -> None:
        """Change the state. The table of transitions must allow it."""
        assert state in _NEXT[self.state], f"{self.label}: {self.state} -> {state}"
        self.state = state


def _json_ids(task_ids: Collection[str]) -> str:
    """The ids as a JSON list, made fast: in an id, JSON escapes only non-ASCII characters."""
    text = '["' + '", "'.join(task_ids) + '"]' if task_ids else "[]"
    return text if text.isascii() else json.dumps([*task_ids])


def _label_of(task_id: str, map_index: int) -> str:
    return task_id if map_index < 0 else f"{task_id}[{map_index}]"


def _limit_of(task: BaseOperator) -> int:
    """How many of a task's instances its own limits let run at once in this run."""
    if task._mapping is None:
        return sys.maxsize  # there is only one instance
    limits = (task.max_active_tis_per_dagrun, task.max_active_tis_per_dag)
    return min(filter(None, limits), default=sys.maxsize)


class _Node:
    """A task in the plan: its neighbours, its instances, and how those that it waits for ended."""

    __slots__ = """awaited closers counts downstream expanded feeds gates group guarded holds
        instances limit mapping mates needs open order sent setups sheltered sources task upstream
        weight""".split()

    def __init__(self, task: BaseOperator, order: int) -> None:
        self.task, self.order = task, order
        self.weight = task.priority_weight
        self.upstream: tuple[_Node, ...] = ()
        self.downstream: tuple[_Node, ...] = ()
        # A teardown's own setups; for other nodes, the setups of the scopes around them, but for
        # those directly upstream, which the trigger rule heeds.
        self.setups: _Nodes = ()
        self.sheltered: _Nodes = ()  # if this is a setup: all nodes in its scope, and its teardowns
        self.gates: _Nodes = ()  # branches and short circuits that may skip this node
        self.guarded: _Nodes = ()  # the nodes that this branch or short circuit may skip
        self.awaited: _Nodes = ()  # a teardown's: the nodes of its scopes not directly upstream
        self.closers: _Nodes = ()  # the teardowns that have this node among their `awaited`
        self.feeds: tuple[_Node, ...] = ()  # the nodes that are mapped over its result
        self.sources: tuple[_Node, ...] = ()  # the nodes whose results it is mapped over
        self.mates: Sequence[_Node] = ()  # all nodes of its mapping, itself too, in order
        self.mapping = task._mapping
        self.group = self.mapping if self.mapping is not None and self.mapping.of_group else None
        # Whether the worker waits for a `call` after an attempt: callbacks come after the
        # commit, and a signal that is meant to end the attempt must not hit the worker's next job.
        given = _callbacks_and_timeout(task)
        self.holds = task._dag_or_error().fail_fast or given.count(None) < len(given)
        self.expanded = True  # it has its final instances, at least one
        self.counts = self.needs = _NO_COUNTS  # of `upstream`, of `setups`; in step: see `tally`
        self.instances: list[_Instance] = []
        self.open = 0  # instances that have not ended
        self.sent = 0  # instances that are at a worker, or on their way to one
        self.limit = _limit_of(task)

    def is_in_step_with(self, other: _Node) -> bool:
        """Whether both are in one mapped group, so that an instance waits for its own index."""
        return self.group is not None and self.group is other.group

    def decide(self, instance: _Instance) -> TaskInstanceState | None:
        """RUNNING if the instance may run, its final state if it may not, or None: it must wait."""
        if not self.upstream:
            return _S.RUNNING
        rule = self.task.trigger_rule
        decision = _by_rule(rule, *self.tally(instance, self.counts, self.upstream))
        if self.setups and rule is not TriggerRule.ALWAYS and decision is not _S.UPSTREAM_FAILED:
            is_teardown = self.task.is_teardown
            enough = TriggerRule.ONE_SUCCESS if is_teardown else TriggerRule.ALL_SUCCESS
            allowed = _by_rule(enough, *self.tally(instance, self.needs, self.setups))
            # While the rule waits, only a setup's failure decides: a failure upstream would win
            # over a setup's skip. A teardown waits for all upstream even then.
            early = allowed is _S.UPSTREAM_FAILED and not is_teardown
            if early or (decision is not None and allowed is not _S.RUNNING):
                decision = allowed
        # What a branch leaves out is skipped whatever else failed: upstream_failed waits for it.
        if decision is _S.UPSTREAM_FAILED and instance.is_before_end(self.gates):
            return None
        # Work in a teardown's scope may run on when what is between has failed.
        if self.awaited and decision is not None and instance.is_before_end(self.awaited):
            return None
        return decision

    def tally(self, instance: _Instance, counts: list[int], nodes: Iterable[_Node]) -> list[int]:
        """The counts plus, of each of the nodes in step, the instance of the same index."""
        if self.group is None:
            return counts
        counts = counts.copy()
        for node in nodes:
            if self.is_in_step_with(node):
                counts[instance.beside(node)[0].counts_as] += 1
        return counts


def _by_rule(
    rule: TriggerRule, success: int, failed: int, upstream_failed: int, skipped: int, pending: int
) -> TaskInstanceState | None:
    """Airflow's table of trigger rules; takes the five counts of a node.

    RUNNING if the instance may run, its final state if it may not, or None: it must wait. Unlike in
    Airflow, a failure wins over a skip that came first, so that no race of workers decides.
    """
    bad, done = failed or upstream_failed, not pending
    run = _S.RUNNING if done else None
    match rule:
        case TriggerRule.ALL_SUCCESS:
            return _S.UPSTREAM_FAILED if bad else _S.SKIPPED if done and skipped else run
        case TriggerRule.NONE_FAILED:
            return _S.UPSTREAM_FAILED if bad else run
        case TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS:
            return _S.UPSTREAM_FAILED if bad else _S.SKIPPED if done and not success else run
        case TriggerRule.ALL_DONE | TriggerRule.ALL_DONE_SETUP_SUCCESS:
            return run
        case TriggerRule.ALL_DONE_MIN_ONE_SUCCESS:
            return _S.SKIPPED if skipped else _S.UPSTREAM_FAILED if done and not success else run
        case TriggerRule.ONE_SUCCESS:
            without = _S.UPSTREAM_FAILED if bad else _S.SKIPPED
            return _S.RUNNING if success else without if done else None
        case TriggerRule.ONE_FAILED:
            return _S.RUNNING if bad else _S.SKIPPED if done else None
        case TriggerRule.ONE_DONE:
            return _S.RUNNING if success or failed else _S.SKIPPED if done else None
        case TriggerRule.ALL_FAILED:
            return _S.SKIPPED if success or skipped else run
        case TriggerRule.ALL_SKIPPED:
            return _S.SKIPPED if success or bad else run
        case TriggerRule.NONE_SKIPPED:
            return _S.SKIPPED if skipped else run
        case TriggerRule.ALWAYS:
            return _S.RUNNING


# --- Plan: the graph ------------------------------------------------------------------------------


def _make_nodes(dag: Dag, order: Sequence[BaseOperator]) -> dict[str, _Node]:
    """The tasks, by id, as nodes with their neighbours, weights, setups and gates."""
    nodes = {t: _Node(task, i) for i, (t, task) in enumerate(dag.task_dict.items())}
    for node in nodes.values():
        if above := node.task._upstream:
            node.upstream = tuple(map(nodes.__getitem__, above))
            node.counts = [0, 0, 0, 0, sum([not node.is_in_step_with(up) for up in node.upstream])]
        node.downstream = tuple(map(nodes.__getitem__, node.task._downstream))
    ordered = [nodes[task.task_id] for task in order]
    _weigh(ordered)
    _find_gates(ordered)
    _find_setups(ordered)
    together: dict[_ExpandInput, list[_Node]] = {}
    for node in ordered:
        if node.mapping is not None:
            node.mates = together.setdefault(node.mapping, [])
            node.mates.append(node)
            node.sources = tuple(nodes[task_id] for task_id in node.mapping.source_ids)
            for source in node.sources:
                source.feeds = (*source.feeds, node)
    return nodes


def _reach(order: Sequence[_Node], side: str, marks: Iterable[int]) -> Iterator[tuple[_Node, int]]:
    """Yield each node with the marks of all nodes to that side ("upstream", say) as a bit set.

    The order begins on that side. A node passes its set on and drops it. The marks are taken one by
    one: 50,000 at once would take 156 MB.
    """
    sets: dict[_Node, int] = {}
    other_side = "downstream" if side == "upstream" else "upstream"
    for node, mark in zip(order, marks, strict=True):
        bits = sets.pop(node, 0)
        yield node, bits
        bits |= mark
        for after in getattr(node, other_side):  # they share one int until another set joins it
            sets[after] = sets[after] | bits if after in sets else bits


def _weigh(order: Sequence[_Node]) -> None:
    """Set priorities: a task's own weight plus, by its rule, those of all below or above it. The
    sum is made for each bit of the weights, so many different weights cost no more than a few."""
    for rule, ordered in ((WeightRule.DOWNSTREAM, order[::-1]), (WeightRule.UPSTREAM, order)):
        side = rule.value
        needed = any(n.task.weight_rule is rule for n in order if getattr(n, side))
        weights = {n.task.priority_weight for n in order} if needed else ()
        places = range(max([abs(w).bit_length() for w in weights], default=0))
        for sign, place in itertools.product((1, -1), places):
            having = {w for w in weights if sign * w > 0 and abs(w) & (1 << place)}
            bit = itertools.count()
            marks = (1 << next(bit) if n.task.priority_weight in having else 0 for n in ordered)
            for node, bits in _reach(ordered, side, marks) if having else ():
                if node.task.weight_rule is rule:
                    node.weight += (sign << place) * bits.bit_count()


def _find_gates(order: Sequence[_Node]) -> None:
    """Give each node its gates: the branches and short circuits that may leave it out."""
    for node in order:
        if (flow := node.task._flow) is None:
            continue
        far = flow != "branch" and getattr(node.task, "ignore_downstream_trigger_rules", True)
        # As in Airflow, a mapped gate skips none outside its group, a short circuit no teardown.
        node.guarded = []
        for below in _all_from(node.downstream) if far else node.downstream:
            outside = node.mapping is not None and not below.is_in_step_with(node)
            if not outside and (flow == "branch" or not below.task.is_teardown):
                node.guarded.append(below)
                below.gates = below.gates or []
                below.gates.append(node)


def _find_setups(order: Sequence[_Node]) -> None:
    """Fill in `setups`, `sheltered`, `closers` and `awaited`."""
    # Each bit is one scope: a setup and one of its teardowns, or None if it has no teardown.
    scopes = list[tuple[_Node, _Node | None]]()
    begun, ended = collections.Counter[_Node](), collections.Counter[_Node | None]()
    for setup in [node for node in order if node.task.is_setup]:
        ends: list[_Node | None] = [node for node in setup.downstream if node.task.is_teardown]
        for end in ends or [None]:
            begun[setup] |= 1 << len(scopes)
            ended[end] |= 1 << len(scopes)
            scopes.append((setup, end))
            if end is not None:
                _shelter(setup, end)
    if not scopes:
        return
    ended_below = dict(_reach(order[::-1], "downstream", [ended[node] for node in order[::-1]]))
    for node, above in _reach(order, "upstream", [begun[node] for node in order]):
        inside = above & (ended[None] | ended_below[node])
        while inside:
            setup, end = scopes[(inside & -inside).bit_length() - 1]  # the lowest bit's
            inside &= inside - 1  # clears the lowest bit
            # If another scope has added this node to a list already, it is the last there.
            if not node.task.is_teardown and setup.sheltered[-1:] != [node]:
                _shelter(setup, node)
            if end is not None and end not in node.downstream and end.awaited[-1:] != [node]:
                node.closers, end.awaited = node.closers or [], end.awaited or []
                node.closers.append(end)
                end.awaited.append(node)


def _shelter(setup: _Node, node: _Node) -> None:
    """Add the node to the setup's scope. Work right below the setup heeds it by trigger rule."""
    setup.sheltered = setup.sheltered or []
    setup.sheltered.append(node)
    if setup in node.upstream and not node.task.is_teardown:
        return
    node.setups = node.setups or []
    node.setups.append(setup)
    if not node.is_in_step_with(setup):
        node.needs = [0, 0, 0, 0, node.needs[_PENDING] + 1]


def _all_from(
    first: Iterable[T], step: Callable[[Any], Iterable[T]] = operator.attrgetter("downstream")
) -> dict[T, None]:
    """All items that are reached from the first ones (which count, too) by `step`."""
    reached: dict[T, None] = {}
    following = list(first)
    while following:
        if (item := following.pop()) not in reached:
            reached[item] = None
            following += step(item)
    return reached


# --- Plan: the machine ----------------------------------------------------------------------------


class _Plan:
    """The state of a run: fed with what happened, it says what may start and what changed.

    `take` returns the instances that may start, one by one. The run calls `start` for one that it
    sends to a worker, `finish` when its attempt ended, and after the events of a turn `settle`,
    which applies the trigger rules. For the run to record, `changed` collects the instances whose
    state the plan decided, `expanded` the tasks that got instances. Those in `passing` end at once,
    without a worker or a limit, as in Airflow. Times are seconds of the caller's clock.
    """

    def __init__(
        self,
        dag: Dag,
        logical_date: _datetime.datetime | None = None,
        recorded: Mapping[_InstanceKey, _Past] | None = None,
        lengths: Mapping[_InstanceKey, int | None] | None = None,
        pools: Mapping[str, int] | None = None,
        order: Sequence[BaseOperator] | None = None,
    ) -> None:
        """`order`: the tasks, each after those that it waits for, if the caller has that."""
        self.dag, self.logical_date = dag, logical_date
        self.changed: list[_Instance] = []
        self.expanded: list[_Node] = []
        self.passing: list[_Instance] = []
        self.doomed: list[_Instance] = []  # the run ends their attempts and clears this
        self.crowded = set[_Node]()  # the run adds to this, and clears it now and then to look anew
        self.sent = 0  # instances that are at a worker, or on their way to one
        self.unfinished = 0  # instances that have not ended, but for what a stopped run leaves
        self.timed_out = self.gave_up = self._stopped = False
        self._once_more = set[_Instance]()  # teardowns that a stopped run has sent again
        self._free = collections.defaultdict[str, int](lambda: sys.maxsize, pools or {})
        # What may start, in heaps: one for each pool, and one for each task that a limit holds up.
        self._queues: dict[tuple[str, _Node | None], list[tuple[int, int, int, _Instance]]] = {}
        self._delayed: list[tuple[float, int, int, _Instance]] = []  # a heap, by time of the start
        self._dirty: dict[_Instance, None] = {}  # `settle` looks at their trigger rules
        self._recorded = recorded or {}
        self.by_id = _make_nodes(dag, order or dag.topological_sort())
        self.nodes = list(self.by_id.values())
        self.known = _Known(lengths or {})
        self._begin()

    def _begin(self) -> None:
        """Make the instances that are known now: of a mapped task as many as constants give or as
        are recorded, else one. Count the ends that a resumed run keeps, and touch all else."""
        rows = self._recorded
        # A row of index -1 stands for all instances of a task that is to be expanded anew.
        sizes = collections.Counter(name for name, i in rows if i >= 0 and (name, -1) not in rows)
        for node in self.nodes:
            count = sizes[node.task.task_id] if node.sources else 0
            if node.mapping is not None and not node.sources:
                count = node.mapping.count(self.known)
            self._give_instances(node, count)
        kept = [i for i in self.instances() if i.state is not None]
        for instance in kept:
            self._ended(instance)
        for instance in [i for i in kept if i.flow]:  # skip again what a kept branch left out
            self.skip(instance, self.left_out(instance, _parsed(instance.flow, dict), strict=False))
        self._dirty.clear()  # touched in the order of the ends; touch in the tasks' order
        for node in self.nodes:
            self._touch(node)

    def _give_instances(self, node: _Node, count: int) -> None:
        """Give the node so many mapped instances. For 0, give it one of index -1: the only one of
        an unmapped task, or a stand-in until a mapped one is expanded."""
        task_id, get = node.task.task_id, self._recorded.get
        indexes = range(count) if count else (-1,)
        node.instances = [_Instance(node, i, get((task_id, i), _NEVER_RUN)) for i in indexes]
        node.expanded = node.mapping is None or count > 0
        node.open = len(node.instances)
        self.unfinished += node.open

    def _touch(self, node: _Node, by: _Instance | None = None) -> None:
        """Mark the node's undecided instances for `settle`: in a mapped group each, or only the one
        of `by`'s index; else the first, as the decision about it holds for all."""
        for instance in node.instances if by is None else by.beside(node):
            if not instance.decided:
                self._dirty[instance] = None
                if node.group is None:
                    return

    def instances(self) -> Iterator[_Instance]:
        """Every task instance, in the order of the DAG's tasks."""
        return itertools.chain.from_iterable(map(operator.attrgetter("instances"), self.nodes))

    # What may start.

    def ready_count(self, now: float) -> int:
        """How many instances may start now, at most: more workers would be of no use."""
        while self._delayed and self._delayed[0][0] <= now:
            self.enqueue(heapq.heappop(self._delayed)[-1])
        ready = collections.Counter[str]()
        for (pool, node), queue in self._queues.items():
            ready[pool] += len(queue) if node is None else min(len(queue), self._places(node))
        fit = sum([min(n, self._free[pool]) for pool, n in ready.items()])
        return min(fit, self.dag.max_active_tasks - self.sent)

    def _places(self, node: _Node) -> int:
        """How many instances of a task may start, as far as its limits go."""
        return 0 if node in self.crowded else node.limit - node.sent

    def enqueue(self, instance: _Instance) -> None:
        """Let `take` return the instance once there is room; one without work is `passing`."""
        node = instance.node
        if isinstance(node.task, EmptyOperator):
            return self.passing.append(instance)
        apart = node.limit < sys.maxsize or node in self.crowded
        key = (node.task.pool, node if apart else None)
        entry = (-node.weight, node.order, instance.map_index, instance)
        heapq.heappush(self._queues.setdefault(key, []), entry)

    def take(self) -> _Instance | None:
        """Return the next instance that may start, or None. The caller must start, delay or enqueue
        it. If a pool has too few free slots for its first one, nothing of the pool overtakes it."""
        queues = self._queues
        while True:
            full = []
            for key in sorted(queues, key=lambda k: queues[k][0]) if len(queues) > 1 else queues:
                instance, (pool, node) = queues[key][0][-1], key
                if instance.counts_as != _PENDING:  # a branch has skipped it meanwhile: drop it
                    break
                if pool in full or (node is not None and self._places(node) <= 0):
                    continue
                if self._free[pool] >= instance.node.task.pool_slots:
                    break
                full.append(pool)
            else:
                return None
            heapq.heappop(queues[key])
            if not queues[key]:
                del queues[key]
            if instance.counts_as == _PENDING:
                return instance

    def delay(self, instance: _Instance, until: float) -> None:
        """Enqueue the instance at the time `until`: for a retry, or a sensor's next poke."""
        heapq.heappush(self._delayed, (until, instance.node.order, instance.map_index, instance))

    def next_time(self) -> float | None:
        """When the first of the delayed instances may start, or None."""
        return self._delayed[0][0] if self._delayed else None

    # What happens.

    def start(self, instance: _Instance) -> None:
        """The instance is sent to a worker, for a new attempt or to go on after a reschedule."""
        instance.before = instance.state
        if instance.state is not _S.UP_FOR_RESCHEDULE:
            instance.try_number += 1
        instance.move(_S.QUEUED)
        self._occupy(instance, 1)

    def _occupy(self, instance: _Instance, places: int) -> None:
        """Take (1) or give back (-1) a place: in the run, in its task's limit and in its pool."""
        node = instance.node
        self.sent += places
        node.sent += places
        self._free[node.task.pool] -= places * node.task.pool_slots
        if places < 0:  # another instance of the node may have the place, whatever other runs do
            self.crowded.discard(node)

    def finish(
        self, instance: _Instance, status: str, now: float, note: Mapping[str, Any] = {}
    ) -> None:
        """The instance's attempt ended. `status`: success; skipped; failed, which is retried while
        tries are left; fatal, which is not; reschedule, if it gives its worker back for a while.
        `note`: "stored" (whether it stored a result), its "length", and "wait", in seconds."""
        if instance.state is _S.QUEUED:
            instance.move(_S.RUNNING)
        self._occupy(instance, -1)
        again, wait = None, note.get("wait", 0.0)
        is_given_up = self.gave_up and not self._goes_on(instance)
        if self.timed_out and status != "success":
            status = "skipped"
        elif status == "failed" and not is_given_up and instance.try_number <= instance.max_tries:
            again, wait = _S.UP_FOR_RETRY, _retry_wait(instance, self.logical_date)
        elif status == "reschedule" and not is_given_up:
            again = _S.UP_FOR_RESCHEDULE
        if again is not None:
            instance.move(again)
            if self._goes_on(instance):
                self.delay(instance, now + wait)
            else:
                self._ended(instance)
            return
        if status == "success" and note.get("stored"):
            self.known.note(instance.task_id, instance.map_index, note.get("length"))
        ended = _TASK_STATES.get(status, _S.FAILED)  # fatal, say
        instance.move(ended)
        self._ended(instance)
        if ended is _S.FAILED and self.dag.fail_fast and not self._stopped:
            self.give_up()

    def withdraw(self, instance: _Instance) -> None:
        """Undo `start`: no worker has taken the instance. It may be sent again."""
        self._occupy(instance, -1)
        if instance.before is not _S.UP_FOR_RESCHEDULE:
            instance.try_number -= 1
        instance.move(instance.before)
        if self._goes_on(instance):
            self.enqueue(instance)
        else:
            self._decide(instance, _S.SKIPPED)

    def interrupt(self, instance: _Instance, again: bool = False) -> None:
        """The attempt was ended through no fault of its own, so it uses up no try. It is left to a
        resume; but with `again`, a stopped run sends a teardown once more (not twice, as the
        teardown may be what ends its worker)."""
        self._occupy(instance, -1)
        instance.max_tries += 1
        instance.move(None)
        if again and self._goes_on(instance) and instance not in self._once_more:
            self._once_more.add(instance)
            self.enqueue(instance)
        else:
            self._ended(instance)

    def _goes_on(self, instance: _Instance) -> bool:
        """Whether the run still runs the instance: if it gave up or stops, at most teardowns."""
        node = instance.node
        if self.gave_up and (self.timed_out or not node.task.is_teardown):
            return False
        return not self._stopped or bool(node.task.is_teardown and node.setups)

    def _decide(self, instance: _Instance, state: TaskInstanceState) -> None:
        """End the instance without running it. A stopped run leaves its state to a resume."""
        if not self._stopped:
            instance.move(state)
            self.changed.append(instance)
        if instance.counts_as == _PENDING:
            self._ended(instance)

    def _ended(self, instance: _Instance) -> None:
        """Count the instance as ended, and touch the nodes whose decision may depend on it."""
        node, instance.decided = instance.node, True
        instance.counts_as = _END_AT.get(instance.state, _END_AT[_S.UPSTREAM_FAILED])
        self.unfinished -= 1
        node.open -= 1
        for other in (*node.feeds, *node.guarded, *node.closers):
            if not node.open or other.is_in_step_with(node):
                self._touch(other, instance)
        for below in node.downstream:
            self._count_end(below, below.counts, instance)
        for below in node.sheltered:
            if node in below.setups:
                self._count_end(below, below.needs, instance)

    def _count_end(self, below: _Node, counts: list[int], instance: _Instance) -> None:
        """Add the end to the counts of a node below, if not in step, and touch it if it matters."""
        node, place = instance.node, instance.counts_as
        if node.group is not None and below.is_in_step_with(node):
            return self._touch(below, instance)
        counts[place] += 1
        if not node.open:
            counts[_PENDING] -= 1
        if counts[place] == 1 or not counts[_PENDING]:  # no rule tells two from one
            self._touch(below)

    # Conclusions.

    def settle(self) -> None:
        """Decide about what was touched, until nothing more follows from it. As in Airflow, this
        goes in rounds: all decisions of a round are made on what the round before left."""
        while self._dirty:
            this_round, self._dirty = self._dirty, {}
            for instance, decision in [(i, self._decision(i)) for i in this_round]:
                if decision is not None:
                    self._carry_out(instance, decision)

    def _decision(self, instance: _Instance) -> TaskInstanceState | None:
        """Like `_Node.decide`, but an unexpanded node waits for its sources; RUNNING expands it."""
        node = instance.node
        if instance.decided:
            return None
        if node.expanded:
            return node.decide(instance)
        # A source that failed or was skipped gives no elements.
        ends = [x.instances[0].counts_as for x in node.sources if x.instances[0].map_index < 0]
        if _END_AT[_S.FAILED] in ends or _END_AT[_S.UPSTREAM_FAILED] in ends:
            waits = instance.is_before_end(node.gates) or instance.is_before_end(node.awaited)
            return None if waits else _S.UPSTREAM_FAILED
        is_open = any(source.open for source in node.sources)
        # A group with elements is expanded whatever its tasks' rules: these are for the instances.
        skipped = _END_AT[_S.SKIPPED] in ends
        gives = is_open or (not skipped and self.count(node) != 0)
        decision = _S.RUNNING if node.group is not None and gives else node.decide(instance)
        if decision is None or decision is _S.UPSTREAM_FAILED:
            return decision
        return None if is_open else _S.SKIPPED if skipped else decision

    def _carry_out(self, instance: _Instance, decision: TaskInstanceState) -> None:
        """Apply the decision to the instance; outside of mapped groups, to all of its task's."""
        node = instance.node
        if decision is _S.RUNNING and not node.expanded:
            return self._expand(node)
        for each in node.instances if node.group is None else (instance,):
            if each.decided:
                continue
            if decision is _S.RUNNING:
                each.decided = True
                self.enqueue(each)
            else:
                self._decide(each, decision)

    def count(self, node: _Node) -> int | None:
        """How many instances a mapped task will have; None if a result of older code is no list."""
        assert node.mapping is not None
        with contextlib.suppress(LookupError):
            return node.mapping.count(self.known)
        return None

    def _expand(self, node: _Node) -> None:
        """Give a mapped task, or all tasks of a mapped group, the instances they will have."""
        # In a resume, expanded mates set the number, though a source taken along may give another.
        there = [mate.instances for mate in node.mates if mate.expanded]
        count = len(there[0]) if there else self.count(node)
        if not count:
            ended = _S.UPSTREAM_FAILED if count is None else _S.SKIPPED
            return self._decide(node.instances[0], ended)
        for mate in node.mates:
            if mate.expanded or not mate.open:
                continue
            [stand_in] = mate.instances
            stand_in.decided = True
            self.unfinished -= 1
            self._give_instances(mate, count)
            first = mate.instances[0]
            first.row_id = first.row_id or stand_in.row_id  # so rows stay in the tasks' order
            self.expanded.append(mate)
            self._touch(mate)

    # Branches.

    def left_out(
        self, instance: _Instance, note: Mapping[str, Any], strict: bool = True
    ) -> Sequence[_Node]:
        """What a branch or short circuit leaves out, by its note ("chosen" names, "go_on"): all
        that it guards, but for what is chosen and what is below that. Raises AirflowException for a
        chosen name that the DAG does not have, unless `strict` is False."""
        guarded, dag = instance.node.guarded, self.dag
        if "chosen" not in note:
            return guarded if note.get("go_on") is False else ()
        chosen: list[_Node] = []
        for name in note["chosen"] or ():
            if name in dag:
                chosen += [self.by_id[task.task_id] for task in dag[name]._starts()]
            elif strict:  # a recorded choice may have gone from the code since
                near = _near(name, [*dag.task_dict, *dag.task_group_dict])
                what = f"{_shown(name)}, which is no task or group of DAG {dag.dag_id!r}{near}"
                raise AirflowException(f"the branch chose {what}")
        keep = _all_from(chosen)
        return [node for node in guarded if node not in keep]

    def skip(self, instance: _Instance, nodes: Iterable[_Node]) -> None:
        """Skip what a branch left out, whatever the trigger rules, unless it was sent or has ended.
        Of nodes in step with the branch, skip only the instance of its own index."""
        for node in nodes:
            for each in instance.beside(node):
                if each.state in (None, _S.UP_FOR_RETRY, _S.UP_FOR_RESCHEDULE):
                    self._decide(each, _S.SKIPPED)

    # The end of the run.

    def give_up(self, timed_out: bool = False) -> None:
        """Skip what has not run, and doom what runs: the run has `timed_out`, or a task failed
        under fail_fast, which leaves teardowns alone."""
        self.gave_up = True
        self.timed_out |= timed_out
        self._end_rest()

    def stop(self) -> None:
        """Doom what runs, and start nothing more but the teardowns of setups that succeeded."""
        self._stopped = True
        self._queues.clear()
        self._delayed.clear()
        self.passing.clear()
        self._end_rest()

    def _end_rest(self) -> None:
        for instance in [i for i in self.instances() if i.counts_as == _PENDING]:
            is_sent = instance.state in (_S.QUEUED, _S.RUNNING)
            if self._goes_on(instance):
                if self._stopped and instance.decided and not is_sent:
                    self.enqueue(instance)  # again, because `stop` has cleared the queues
            elif is_sent:
                self.doomed.append(instance)
            else:
                self._decide(instance, _S.SKIPPED)

    def run_state(self) -> DagRunState:
        """The run's final state: failed if a leaf failed or could not run, else success. A teardown
        counts only with on_failure_fail_dagrun; otherwise the tasks above it are leaves."""
        counted = {n for n in self.nodes if not n.task.is_teardown or n.task.on_failure_fail_dagrun}
        leaves = [node for node in counted if counted.isdisjoint(node.downstream)]
        leaves = leaves or [node for node in self.nodes if not node.downstream]
        ends = {instance.state for node in leaves for instance in node.instances}
        failed = self.timed_out or not ends.isdisjoint({_S.FAILED, _S.UPSTREAM_FAILED})
        return DagRunState.FAILED if failed else DagRunState.SUCCESS


def _retry_wait(instance: _Instance, logical_date: _datetime.datetime | None) -> float:
    """Seconds from the end of a failed attempt to the next (Airflow's formula)."""
    task = instance.node.task
    delay, factor = task.retry_delay.total_seconds(), task.retry_exponential_backoff
    if factor in (0, 1):
        return delay
    base = day = 24 * 60 * 60
    with contextlib.suppress(OverflowError):  # the power is too large: base stays a day
        base = max(1, math.ceil(delay * factor ** (instance.try_number - 1)))
    name = f"{task.dag_id}#{task.task_id}#{logical_date}#{instance.try_number}"
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    longest = task.max_retry_delay.total_seconds() if task.max_retry_delay is not None else day
    return min(base + int(digest, 16) % base, day, longest)


def _taken_by(task: BaseOperator) -> frozenset[str]:
    """The ids of the tasks whose results a task takes, in its arguments or to be mapped over."""
    # A task that joins a mapped group late has no upstream, but takes the group's sources.
    if not task._upstream and task._mapping is None:
        return frozenset()
    args, kwargs = task._arguments()
    sources = {} if task._mapping is None else task._mapping.sources
    return frozenset(r.operator.task_id for r in _results_in([args, kwargs, sources]))


def _takes_text(task: BaseOperator) -> str | None:
    """The same ids as JSON for the record; `up[]` where it takes all results of a mapped task."""
    names = []
    for up in sorted(_taken_by(task)):
        mapping = task._dag_or_error().task_dict[up]._mapping
        names.append(up if mapping in (None, task._mapping) else f"{up}[]")
    return _json_ids(names) if names else None


# --- Plan: what a resume runs again ---------------------------------------------------------------


class _Resumption:
    """What a resume keeps, runs again, adds and removes: Airflow's rule for clearing.

    An instance is decided anew if it failed, was interrupted or cleared, is new, or did not run
    because of others; and so is all that is downstream of one that runs again. All else stays. One
    that is new or did not run may end without running: it pulls only if it is pulled, or known to
    run. One that comes, goes or gets another index pulls the tasks that take its task's results.
    Mapped instances are the same if what they are mapped over is (`keys`), whatever their index.
    """

    def __init__(
        self,
        dag: Dag,
        order: Sequence[BaseOperator],
        rows: Iterable[_Past],
        keys: Callable[[_ExpandInput], list[str]],
        running: Collection[_InstanceKey] = (),
    ) -> None:
        """`running`: which instances of `may_not_run` are known to run after all."""
        self.instances: dict[_InstanceKey, _Past] = {}  # of today's code; new ones have no id
        self.again: set[_InstanceKey] = set()  # they run again, or are decided anew; two subsets:
        self.may_not_run: set[_InstanceKey] = set()  # new, or did not run: perhaps not now either
        self.along: set[_InstanceKey] = set()  # taken along, or cleared alone: they pull nothing
        self.unexpanded: set[str] = set()  # mapped over results, with no known instances
        self.removed: list[tuple[_Past, int]] = []  # rows of no instance now, with a free index
        self._dag, self._keys, self._running = dag, keys, running
        self._moved: set[str] = set()  # tasks with an instance that came, went or changed its index
        # The instances that pull what is downstream; for each also its task, as index None.
        self._pulling: set[tuple[str, int | None]] = set()
        self._indexes: dict[str, list[int]] = {}
        self._past: dict[str, dict[int, _Past]] = {}
        for row in rows:
            self._past.setdefault(row.task_id, {})[row.map_index] = row
        for task_id in [name for name in self._past if name not in dag.task_dict]:
            self._remove(self._past[task_id])
        for task in order:  # upstream first: each task looks at what was decided above it
            is_empty = self._match(task, self._past.get(task.task_id, {}))
            self._decide(task, is_empty)
        if any(task.is_setup for task in order):
            self._take_scopes_along(order)

    def _remove(self, rows: Mapping[int, _Past], taken: Collection[int] = ()) -> None:
        """Note rows that no instance has today. If their index is taken, they get a later one."""
        free = itertools.count(max([*rows, *taken], default=0) + 1)
        for index, row in sorted(rows.items()):
            self.removed.append((row, next(free) if index in taken else index))
            if row.state != "removed":
                self._moved.add(row.task_id)

    def _match(self, task: BaseOperator, rows: dict[int, _Past]) -> bool:
        """Give today's instances their rows. Returns whether the task is mapped over nothing."""
        mapping = task._mapping
        keys = None if mapping is None else self._keys_of_today(mapping, rows)
        today = {-1: _NEVER_RUN._replace(task_id=task.task_id)}
        if keys:
            at = {row.element: i for i, row in rows.items() if i >= 0 and row.state != "removed"}
            for i, key in enumerate(keys):
                today[i] = rows.pop(at[key]) if key in at else today[-1]._replace(map_index=i)
            del today[-1]
        # A mapped task does not go on with a row that ran as -1: it was not mapped at that time.
        elif -1 in rows and (mapping is None or not rows[-1].try_number):
            today[-1] = rows.pop(-1)
        if mapping is not None and mapping.source_ids and not keys:
            self.unexpanded.add(task.task_id)
        self._indexes[task.task_id] = list(today)
        self._remove(rows, today)
        for index, row in today.items():
            self.instances[task.task_id, index] = row
            if row.map_index != index or not row.row_id:
                self._moved.add(task.task_id)
        return keys == []

    def _keys_of_today(self, mapping: _ExpandInput, rows: Mapping[int, _Past]) -> list[str] | None:
        """The keys of the instances, or None if the plan is to expand the task (anew)."""
        sources = mapping.source_ids
        if any((up, None) in self._pulling or up in self._moved for up in sources):
            return None
        try:
            keys = self._keys(mapping)
        except LookupError:  # an old result that is no list
            return None
        # What is mapped over results has no instances before the plan lets it run.
        was_expanded = not sources or any(i >= 0 and x.state != "removed" for i, x in rows.items())
        return keys if was_expanded or not keys else None

    def _decide(self, task: BaseOperator, is_empty: bool) -> None:
        """Decide which of the task's instances run again, and which of those pull."""
        takes, takes_text = _taken_by(task), _takes_text(task)
        for index in self._indexes[task.task_id]:
            key = task.task_id, index
            row, pulled = self.instances[key], self._is_pulled(task, index, takes)
            chosen = (_parsed(row.flow, dict).get("chosen") or ()) if row.flow else ()
            # It takes other results than before, or chose what today's code does not have.
            changed = row.takes != takes_text or any(name not in self._dag for name in chosen)
            # A skip stays if it was the task's own, or if it is still mapped over nothing.
            skip_stays = row.state == "skipped" and (is_empty or row.attempt_state == "skipped")
            stays = (row.state == "success" or skip_stays) and not changed  # if cleared: no state
            if stays and not pulled:
                continue
            self.again.add(key)
            alone = row.cleared == _CLEARED_ALONE
            did_not_run = not row.row_id or row.state in ("skipped", "upstream_failed")
            did_not_run |= alone and not row.try_number  # it had not run when it was cleared
            only_cleared_alone = alone and not (changed or pulled)
            if did_not_run and not pulled and key not in self._running:
                self.may_not_run.add(key)
            elif only_cleared_alone or (task.is_teardown and stays):  # `stays`: it was only pulled
                self.along.add(key)
            else:
                self._pulling |= {key, (task.task_id, None)}

    def _is_pulled(self, task: BaseOperator, index: int, takes: Collection[str]) -> bool:
        for up in task._upstream:
            mapping = self._dag.task_dict[up]._mapping
            in_step = mapping is not None and mapping is task._mapping
            up_index = index if in_step and (up, index) in self.instances else None
            moved = up in self._moved and up in self._past  # a new task pulls only if it runs
            if (up, up_index) in self._pulling or (up in takes and moved and not in_step):
                return True
        return False

    def _take_scopes_along(self, order: Sequence[BaseOperator]) -> None:
        """Where a setup, or work in its scope, runs again, take the setup's teardowns along, and
        the setup itself, if one of them has begun since it ended."""
        nodes = _make_nodes(self._dag, order)
        gone = [row for row, _ in self.removed if row.role == "teardown"]
        for setup in [nodes[task.task_id] for task in reversed(order) if task.is_setup]:
            # Inner setups come first, because they and their teardowns are work of outer ones.
            teardowns = [node for node in setup.sheltered if node.task.is_teardown]
            work = [node for node in setup.sheltered if not node.task.is_teardown]
            above = {up for node in teardowns for up in node.upstream if up.task.is_teardown}
            work += [x for node in work if node.task.is_setup for x in above & {*node.downstream}]
            setup_id = setup.task.task_id
            # A removed teardown instance in step tore down the setup of a removed element.
            in_step = {node.task.task_id for node in teardowns if setup.is_in_step_with(node)}
            torn_by = [row for row in gone if row.map_index < 0 or row.task_id not in in_step]
            torn_by = [row for row in torn_by if setup_id in _parsed(row.above, list)]
            for index in self._indexes[setup_id]:
                key = setup_id, index
                inside = {key, *self._beside(setup, index, work)}
                if not (inside & self.again) - self.may_not_run:
                    continue  # nothing in its scope is known to run again
                taken = {*self._beside(setup, index, teardowns)}
                torn = [*torn_by, *(self.instances[end] for end in taken)]
                # A teardown whose scheduler died may have begun unrecorded: "~" is after all times.
                begun = max((past.began or ("~" if past.died else "") for past in torn), default="")
                if begun >= (self.instances[key].ended or "~"):
                    taken.add(key)
                self.along |= taken - self.again
                self.again |= taken

    def _beside(self, setup: _Node, index: int, nodes: Iterable[_Node]) -> Iterator[_InstanceKey]:
        """Yield the instances of these nodes in the scope of one instance of the setup."""
        for node in nodes:
            task_id = node.task.task_id
            own = setup.is_in_step_with(node) and (task_id, index) in self.instances
            yield from [(task_id, i) for i in ([index] if own else self._indexes[task_id])]

    def recorded(self) -> dict[_InstanceKey, _Past]:
        """What the plan starts from, by instance."""
        recorded = {}
        for key, row in self.instances.items():
            retries = self._dag.task_dict[row.task_id].retries
            interrupted = row.state is None and not row.cleared
            if interrupted and row.lost >= retries + 3:  # it may be what kills its schedulers
                row = row._replace(state="failed")
            elif key in self.again and not (interrupted and row.try_number):
                # All tries are new, as when Airflow clears it; what was interrupted has those left.
                row = row._replace(state=None, max_tries=row.try_number + retries, flow=None)
            recorded[key] = row
        for row, index in self.removed:  # a later expansion may have an instance of this index
            if row.task_id in self.unexpanded:
                max_tries = row.try_number + self._dag.task_dict[row.task_id].retries
                row = row._replace(state=None, max_tries=max_tries, lost=0, flow=None, died=False)
                recorded[row.task_id, index] = row
        return recorded


# --- Store: the only SQL; the schema and the file -------------------------------------------------

_APPLICATION_ID = 0x6C69_7465  # "lite"
_USER_VERSION = 2  # a major number: columns and tables may be added without raising it
_BUSY_SECONDS = 0.25  # how long SQLite itself waits for a lock: short, so a run hears its workers
_LOCKED_LIMIT = 120.0  # seconds for which a run waits for a lock before it gives up
_WAL_PAGES = 8192  # at so many, a commit copies the WAL into the file; see _Store.checkpoint
_PAGE_SIZE = 4096  # bytes; larger pages slow small commits down, smaller ones large values
_CACHE = 64 * 1024 * 1024  # bytes of large values that SQLite keeps in memory until their commit
_LARGE = 1_000_000  # bytes; a larger value is written and read page by page
_ROW_LIMIT = 1_000_000_000  # bytes; SQLite's own limit
_LOOK_LIMIT = 4 * _TEXT_LIMIT  # bytes of the largest value that a look reads: any text fits

# Without a rowid, SQLite writes one page less for an attempt. The tables of large values keep the
# rowid, because without it SQLite would read values on its way to a key.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS dag (
    dag_id TEXT PRIMARY KEY,
    description TEXT,
    fileloc TEXT,                -- the script or module that defines it
    doc_md TEXT,
    tags TEXT,                   -- JSON list
    schedule TEXT                -- as given; liteflow schedules nothing
) STRICT;
CREATE TABLE IF NOT EXISTS dag_run (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- a deleted run's id is not used again
    dag_id TEXT NOT NULL REFERENCES dag (dag_id),
    run_id TEXT NOT NULL,
    state TEXT NOT NULL,         -- queued, running, success, failed
    reason TEXT,                 -- why it failed, if no task is to blame
    logical_date TEXT,           -- times are ISO 8601 in UTC
    start_date TEXT,
    end_date TEXT,
    resumed_date TEXT,           -- when the latest resume began; null: none yet
    seconds REAL NOT NULL DEFAULT 0, -- that the run took before that resume
    conf TEXT NOT NULL,          -- JSON object
    owner TEXT,                  -- token of the run() that works on it, and of its folder
    owner_process TEXT,          -- for people: pid and host
    command TEXT,                -- for people: how its script was started, if known; options
    stop_requested TEXT,         -- when somebody asked to stop it
    values_deleted TEXT,         -- when `prune --values` deleted its XComs
    UNIQUE (dag_id, run_id)
) STRICT;
CREATE INDEX IF NOT EXISTS dag_run_of_dag ON dag_run (dag_id);
CREATE INDEX IF NOT EXISTS dag_run_by_date ON dag_run (dag_id, logical_date);
CREATE INDEX IF NOT EXISTS dag_run_running ON dag_run (state) WHERE state = 'running';
CREATE TABLE IF NOT EXISTS task_instance (
    id INTEGER PRIMARY KEY,
    dag_run_id INTEGER NOT NULL REFERENCES dag_run (id) ON DELETE CASCADE,
    task_id TEXT NOT NULL,
    map_index INTEGER NOT NULL,  -- -1: not mapped, or not expanded yet
    state TEXT,                  -- Airflow's names; null: not decided yet
    try_number INTEGER NOT NULL, -- of the latest attempt; 0: none
    max_tries INTEGER NOT NULL,
    lost INTEGER NOT NULL,       -- attempts in a row that were running when the scheduler died
    cleared INTEGER NOT NULL,    -- 1: it and its downstream are to run again; 2: it alone
    flow TEXT,                   -- JSON: what a branch chose, whether a short circuit went on
    element TEXT,                -- of a mapped instance: digest of what it was expanded over
    element_preview TEXT,
    upstream_task_ids TEXT,      -- JSON list: what it waited for
    takes TEXT,                  -- JSON list: tasks whose results it took; "a[]": all of a's
    task_group_id TEXT,          -- the innermost group it is in
    role TEXT,                   -- 'setup', 'teardown', or none
    UNIQUE (dag_run_id, task_id, map_index)
) STRICT;
CREATE TABLE IF NOT EXISTS task_attempt (
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    try_number INTEGER NOT NULL,
    state TEXT NOT NULL,         -- a task instance's state, or 'interrupted'
    start_date TEXT,
    end_date TEXT,
    pid INTEGER,
    error TEXT,                  -- traceback; its last line is the reason
    PRIMARY KEY (task_instance_id, try_number)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS task_log (
    id INTEGER PRIMARY KEY,
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    try_number INTEGER NOT NULL,
    part INTEGER NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (task_instance_id, try_number, part)
) STRICT;
CREATE TABLE IF NOT EXISTS xcom (
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    type TEXT NOT NULL,
    preview TEXT NOT NULL,       -- a short repr, for people
    length INTEGER,              -- of a sequence or dict
    value BLOB NOT NULL,         -- pickle
    PRIMARY KEY (task_instance_id, key)
) STRICT;
CREATE TABLE IF NOT EXISTS xcom_item ( -- the elements of a result that others expand over
    task_instance_id INTEGER NOT NULL REFERENCES task_instance (id) ON DELETE CASCADE,
    item INTEGER NOT NULL,
    preview TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (task_instance_id, item)
) STRICT;
"""
_COLUMNS: dict[str, dict[str, str]] = {  # types by table and column name
    table.split()[0]: dict(re.findall(r"\n    ([a-z]\w*) (\w+)", table))
    for table in _SCHEMA.split("CREATE TABLE IF NOT EXISTS ")[1:]
}
_NULLABLE = {*re.findall(r"\n    ([a-z]\w*) [A-Z]+,", _SCHEMA)}  # in at least one table


@functools.cache
def _inserting(table: str, verb: str = "INSERT OR REPLACE") -> str:
    """The statement that writes a whole row. A nullable column takes "" for NULL: None would take
    as long as ten numbers, because sqlite3 first looks for an adapter of None."""
    columns = _COLUMNS[table]
    values = ["nullif(?, '')" if name in _NULLABLE else "?" for name in columns]
    return f"{verb} INTO {table} ({', '.join(columns)}) VALUES ({', '.join(values)})"


@functools.cache
def _upserting(table: str, known: int) -> str:
    """The same; but an existing row keeps its first `known` columns, and its preview over NULL."""
    key, *others = _COLUMNS[table]
    kept = {"element_preview": "coalesce(excluded.element_preview, element_preview)"}
    new = [f"{name} = {kept.get(name, f'excluded.{name}')}" for name in others[known - 1 :]]
    return f"{_inserting(table, 'INSERT')} ON CONFLICT ({key}) DO UPDATE SET {', '.join(new)}"


# Columns that older files of version 2 lack, as (table, column, declaration). A new column is
# declared here and in _SCHEMA, nullable or with a default; a run adds it to a file that it opens.
_ADDED_COLUMNS: list[tuple[str, str, str]] = [("dag_run", "command", "TEXT")]

_UPDATE_INSTANCE = """UPDATE task_instance SET state = nullif(?, ''), try_number = ?, max_tries = ?,
    lost = ?, flow = nullif(?, '') WHERE id = ?"""  # see _changes_of
_Row = types.SimpleNamespace  # a row by the names of its columns
_Check = Callable[[], None]  # called before an action, or during a wait; may raise to end it
# An XCom on its way to the database: key, type, preview, length, pickle.
_XComRow = tuple[str, str, str, int | None, "bytes | _Pieces"]
_ItemRow = tuple[str, "bytes | _Pieces"]  # an element of a result: preview, pickle
_Output = list[tuple["_Attempt", int, str]]  # what attempts printed: attempt, part number, text


class _Attempt:
    """One attempt of a task instance, as the run, its runner and the store know it."""

    state = "queued"
    started: str | None = None
    ended: str | None = None
    pid: int | None = None
    error: str | None = None
    log_parts = 0  # number of its stored parts: a rescheduled sensor's next poke adds to them
    log_seen = 0, 0  # bytes of its log so far: `head` and `dropped` of `_SlotLog.begin`
    pokes = 0  # how many pokes of a rescheduled sensor have ended
    first_taken = began = 0.0  # when a worker first took it, by monotonic() and by time()
    taken = math.inf  # when a worker took it, or its present poke, by monotonic(); inf: not yet
    losses = 0  # workers in a row that died before they could report that they took it

    def __init__(self, instance: _Instance) -> None:
        self.instance, self.try_number = instance, instance.try_number

    def take(self) -> None:
        """Note that a worker takes it now."""
        self.taken = _monotonic()
        if not self.pokes:
            self.first_taken, self.began = self.taken, time.time()


class _Callback(_Record):
    """Callbacks that are due once the end that they follow is recorded: see `_call_due`."""

    attempt: _Attempt
    name: str | None  # None: none are due, and the worker that holds the attempt may let it go
    reason: str | None
    facts: Mapping[str, Any] = {}  # see `_call_due`


class _Batch:
    """What a turn of the run loop has to record in one transaction, and to do after the commit."""

    def __init__(self) -> None:
        self.instances: dict[_Instance, None] = {}  # an ordered set, like the next
        self.attempts: dict[_Attempt, None] = {}
        self.expanded: list[_Node] = []
        self.xcoms: list[tuple[Any, ...]] = []
        self.items: list[tuple[Any, ...]] = []
        self.renewed: list[int] = []  # row ids of instances whose earlier attempt's values must go
        self.named: list[tuple[str, int]] = []  # (name that map_index_template made, row id)
        self.logs: _Output = []
        # After the commit: callbacks, jobs to send, and whether to copy the WAL into the file.
        self.callbacks: list[_Callback] = []
        self.jobs: list[_Attempt] = []
        self.is_large = False

    def __bool__(self) -> bool:
        return any(vars(self).values())


def _state_of(instance: _Instance) -> str:
    return instance.state._value_ if instance.state else ""  # `value` takes ten times as long


def _changes_of(i: _Instance) -> tuple[Any, ...]:
    """The fields of an instance's row that a turn may change, in the order of _UPDATE_INSTANCE."""
    return _state_of(i), i.try_number, i.max_tries, i.lost, i.flow or "", i.row_id


def _attempt_row(a: _Attempt) -> tuple[Any, ...]:
    """An attempt in the order of the table's columns, with "" for NULL. Its worker reports at the
    end when it began; until then, start_date is when the scheduler heard that it was taken."""
    row_id, ended, pid, error = a.instance.row_id, a.ended or "", a.pid or "", a.error or ""
    started = a.started or (_iso_of(a.began) if a.began else "")
    return row_id, a.try_number, a.state, started, ended, pid, error


def _iso(moment: _datetime.datetime) -> str:
    return _aware(moment).isoformat(timespec="microseconds")


def _iso_of(seconds: float) -> str:
    """A time in seconds, as time.time() gives it, in the format of `_iso`."""
    whole, micro = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_iso_second(whole)}.{micro:06d}+00:00"


@functools.lru_cache(16)
def _iso_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _now() -> str:
    return _iso_of(time.time())


def _database_path(db_path: _StrPath | None, dag: Dag | None) -> str:
    """The database: the argument, else the Dag's, else $LITEFLOW_DB, else ./liteflow.db."""
    paths = (db_path, getattr(dag, "db_path", None), os.environ.get("LITEFLOW_DB") or None)
    given = next((path for path in paths if path is not None), "liteflow.db")
    text: str = os.fspath(_path("db_path", given))
    if text in ("", ":memory:") or "\0" in text:
        raise DatabaseError(f"the database must be a file, found {text!r}: name a file")
    try:
        # Links are followed once, here: SQLite keeps `-wal` beside the target, not the link.
        return os.path.realpath(text)
    except FileNotFoundError:
        raise DatabaseError(f"can't find {text}: the working directory was removed") from None


def _raise_explained(error: BaseException, path: str) -> NoReturn:
    """Raise a DatabaseError that says what an error of SQLite means; any other error as it is."""
    if not isinstance(error, sqlite3.Error):
        raise error
    primary = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    name = getattr(error, "sqlite_errorname", "")  # PyPy has few of these names
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        raise _Busy(f"{path} is locked by another process") from None
    if primary == sqlite3.SQLITE_NOTADB:
        raise DatabaseError(f"{path} is not a liteflow database: {error}") from None
    _check_path(path)
    # The -wal and the -shm keep the mode that the database had when they were made.
    for beside in (f"{path}-wal", f"{path}-shm"):
        if os.path.exists(beside) and not os.access(beside, os.R_OK):
            raise DatabaseError(f"unable to open {path}: this user may not read {beside}") from None
    # Guesses, because SQLite reports a full disk after some writes only, and a full quota never.
    hint = ""
    if primary == sqlite3.SQLITE_IOERR and re.search("LOCK|SHMMAP", name):
        hint = " (is it on a network's file system? SQLite needs a local one)"
    elif primary == sqlite3.SQLITE_IOERR and "READ" not in name:
        hint = " (is the disk full?)"
    elif primary == sqlite3.SQLITE_CANTOPEN and os.access(os.path.dirname(path), os.W_OK):
        hint = " (is its path too long, are too many files open, or is the disk full?)"
    elif primary == sqlite3.SQLITE_CORRUPT:
        hint = " (put a backup in its place, or what `sqlite3 FILE .recover | sqlite3 NEW` saves"
        hint += ", and leave no -wal of the old one beside it)"  # SQLite would mix the two
    raise DatabaseError(f"{path}: {error}{hint}") from None


def _check_path(path: str) -> None:
    """Raise DatabaseError if there can be no database at this path."""
    if not path:  # see _dag_run_of
        raise DatabaseError("tasks on a foreign executor have no database to look into")
    why, mode, owner = None, 0o600, getattr(os, "geteuid", int)()  # as a new file would have them
    folder = os.path.dirname(path)
    try:
        found = os.stat(path)
        mode, owner = found.st_mode, found.st_uid
    except (FileNotFoundError, NotADirectoryError):
        why = None if os.path.isdir(folder) else f"there is no directory {folder}"
    except OSError as error:  # a folder that this user may not enter, say
        why = error.strerror
    else:
        if stat.S_ISDIR(mode):
            why = "it is a directory, not a file"
        elif not stat.S_ISREG(mode):
            why = "it is no regular file"
        elif found.st_size == 1:  # SQLite takes it for empty, and writes over it
            why = "it is one byte long, which no database is"
        elif not os.access(path, os.R_OK):
            why = "this user may not read it"
    # SQLite would use these files, even if they were made by a user who may not write the database.
    is_private = not mode & (stat.S_IWGRP | stat.S_IWOTH)
    for end in ("-wal", "-shm", "-journal") if why is None and is_private else ():
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(f"{path}{end}").st_uid not in (owner, 0):
                what = "chown it if you trust it (it may hold new runs), or remove it"
                why = f"{path}{end} is another user's, not the database owner's: {what}"
    if why is not None:
        raise DatabaseError(f"unable to open {path}: {why}")


def _check_ours(db: sqlite3.Connection, path: str) -> bool:
    """Whether the file is a liteflow database; False if it is empty. Raises DatabaseError."""
    pragmas = ("PRAGMA application_id", "PRAGMA user_version")
    application, version = (db.execute(pragma).fetchone()[0] for pragma in pragmas)
    # Reading a virtual table (it has no page) or a generated column (it is hidden) may never end.
    hidden = "EXISTS (SELECT 1 FROM pragma_table_xinfo(m.name) WHERE hidden)"
    plain = f"type = 'table' AND rootpage AND NOT {hidden}"
    try:
        is_plain = dict(db.execute(f"SELECT name, {plain} FROM sqlite_master AS m"))
    except UnicodeDecodeError:  # SQLite's message quotes a damaged name
        damaged = sqlite3.DatabaseError("malformed database schema")
        damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damaged from None
    if application != _APPLICATION_ID:
        if application or version or is_plain:
            raise DatabaseError(f"{path} is another application's SQLite file: choose another path")
        return False
    if version != _USER_VERSION:
        newer = f"a newer liteflow ({version} > {_USER_VERSION}): use that one"
        older = f"an unreleased liteflow ({version} < {_USER_VERSION}): choose another path"
        raise DatabaseError(f"{path} was made by {newer if version > _USER_VERSION else older}")
    for table in _COLUMNS:  # in a harmful file, a view may have a table's name
        if not is_plain.get(table):
            raise DatabaseError(f"{path} has no table {table!r}: liteflow did not make it")
    return True


def _check_before_run(path: str) -> None:
    """Raise DatabaseError if a run can't use the file, which is left as it is."""
    if sqlite3.sqlite_version_info < (3, 34):
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.34 or newer is needed")
    if (found := _file_identity(path)) is not None and found[1] > 0:
        with contextlib.suppress(_Empty):  # somebody is creating it, or died while doing so
            _read(path, lambda connection: None)
    _check_writable(path)


def _check_writable(path: str) -> None:
    """Raise DatabaseError if this user may not write the file: SQLite would leave a -wal and a -shm
    beside it that belong to this user, and that the file's owner could not use."""
    _check_path(path)
    if os.access(path, os.F_OK) and not os.access(path, os.W_OK):
        raise DatabaseError(f"{path} can't be written: it is read-only for this user")
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK):
        raise DatabaseError(f"{folder} can't be written: SQLite makes files beside the database")


def _missing_columns(db: sqlite3.Connection) -> dict[tuple[str, str], str]:
    """The declarations of the columns that this file lacks, by (table, column)."""
    return {
        (table, column): declaration
        for table, column, declaration in _ADDED_COLUMNS
        if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    }


def _copy_database(connection: sqlite3.Connection, target: pathlib.Path) -> None:
    """Copy the whole database, as it is at one moment, into the new file `target`."""
    target.unlink(missing_ok=True)  # of an earlier look, which a writer overtook
    target.touch(0o600, exist_ok=False)
    connection.execute("COMMIT")  # `backup` has its own transaction, thus one snapshot
    with contextlib.closing(sqlite3.connect(target)) as copy:
        copy.execute("PRAGMA journal_mode=OFF").fetchone()  # a failed copy would leave a journal
        try:
            connection.backup(copy)
            found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if re.match("SQLITE_(FULL|CANTOPEN|IOERR_(?!.*READ))", error.sqlite_errorname):
                raise OSError(0, str(error)) from None  # the copy's trouble, not the database's
            raise
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")


# Held while SQLite works and while forking, as a child could inherit SQLite's locks, and hang.
_in_sqlite = threading.RLock()
if hasattr(os, "register_at_fork"):
    _hold, _release = _in_sqlite.acquire, _in_sqlite.release
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)


def _read(
    path: str, look: Callable[..., T], *arguments: Any, most: int = _LOOK_LIMIT, **named: Any
) -> T:
    """Return what the function `look` finds in the database, which is neither written nor created
    nor left locked. `most`: bytes of the largest value that it may read.

    Opened mode=ro, a cleanly closed WAL database would get a -wal and a -shm that stay. So without
    a -wal, or with an empty one (a full disk leaves that, and has no room for a -shm), the database
    is opened immutable, and read again if a writer came meanwhile.
    """

    def state() -> tuple[bool, tuple[int, int, int] | None]:
        wal = _file_identity(f"{path}-wal")
        return wal is not None and wal[1] > 0, _file_identity(path)

    arguments, named = tuple(map(_askable, arguments)), {n: _askable(x) for n, x in named.items()}
    for _ in range(100):
        wal, identity = before = state()
        _check_path(path)  # before it is opened: a pipe would wait for its other end
        if identity is None:
            raise DatabaseError(f"there is no database {path}: set --db, db_path or $LITEFLOW_DB")
        try:
            found = _read_once(path, wal, most, lambda db: look(db, *arguments, **named))
            if wal or state() == before:
                return found
        except (sqlite3.Error, DatabaseError) as error:
            if state() == before:
                _raise_explained(error, path)
    raise DatabaseError(f"{path} changes faster than it can be read")


def _askable(value: Any) -> Any:
    """The value, or one that matches no row if SQLite can't take it (surrogates, over 64 bits)."""
    if isinstance(value, str):
        return _storable(value)
    return min(value, 2**62) if isinstance(value, int) else value


def _storable(text: object) -> str:
    """The text with surrogates escaped: SQLite takes none, and a file's name may hold some."""
    return str(text).encode(errors="backslashreplace").decode()


def _read_once(path: str, wal: bool, most: int, look: Callable[[sqlite3.Connection], T]) -> T:
    mode = f"mode=ro{'' if wal else '&immutable=1'}"
    # Signals are held back: a handler may wait for a thread that waits for `_in_sqlite`.
    with _HeldSignals(), _in_sqlite, contextlib.closing(_connected(path, mode, 5.0)) as db:
        for pragma in ("trusted_schema=OFF", "query_only=ON", "temp_store=MEMORY"):
            db.execute(f"PRAGMA {pragma}")
        db.text_factory = lambda data: data.decode(errors="replace")
        db.execute("BEGIN")  # one snapshot for all that is looked at
        if not _check_ours(db, path):
            raise _Empty(f"{path} is empty: no run was recorded in it yet")
        if sqlite3.sqlite_version_info >= (3, 39):  # older ones limit whole rows by it
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)
        return look(db)


def _connected(path: str, options: str, timeout: float) -> sqlite3.Connection:
    """A connection to an existing file. (`Path.as_uri` would import urllib.)"""
    escaped = re.sub("[%?#]", lambda sign: f"%{ord(sign[0]):x}", path.replace(os.sep, "/"))
    uri = f"file:///{escaped.removeprefix('/')}?{options}"
    with _in_sqlite:
        return sqlite3.connect(
            uri, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True
        )


def _file_identity(path: str) -> tuple[int, int, int] | None:
    """The inode, size and mtime, which change once a file is written; None if there is no file."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


# --- Store: a run's writes ------------------------------------------------------------------------

_DIED = "its scheduler died"
_SHUT_DOWN = "its pool was shut down"
_SUBMITTED = "submitted"  # why a run is queued: it waits in line


class _Store:
    """A connection that writes; a run's store is the only one that writes what the run does.

    Every write is one BEGIN IMMEDIATE transaction. A turn is written only while this store's owner
    still owns the run: once another process has taken the run over, it raises AlreadyRunning.
    """

    def __init__(self, path: str, check: Callable[[], Any] = bool) -> None:
        """Open the database; make it if it is missing or empty. While it is locked, `check` is
        called again and again, and may raise to end the wait. Raises DatabaseError."""
        self.path = path
        self.run_row = 0  # the id of the run that this store records
        self.owner = ""  # the token of the run's owner, while this process is that
        self._connection = self._connect()
        try:
            _until_unlocked(path, self._prepare, check)
            self._opened = os.stat(path)
        except BaseException:  # whatever it is: closed, and raised again
            self._connection.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        _check_writable(self.path)
        # The file is made here for its mode (logs and values hold secrets); -wal and -shm inherit
        # it. No other code opens it, as closing any descriptor of a file drops the process's locks.
        try:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            return _connected(self.path, "mode=rw", _BUSY_SECONDS)
        except OSError as error:
            raise DatabaseError(f"{self.path} can't be created: {error.strerror}") from None
        except sqlite3.Error as error:
            _raise_explained(error, self.path)

    def _prepare(self) -> None:
        execute = self._connection.execute
        with self.transaction("BEGIN"):  # one snapshot: another process may create the tables now
            ours = _check_ours(self._connection, self.path)
        with self.transaction("", waits=ours):  # a power cut can't harm a new file
            if not ours:
                execute(f"PRAGMA page_size={_PAGE_SIZE}")
                execute("PRAGMA auto_vacuum=INCREMENTAL")
            # Only if needed, as the switch to WAL ignores the busy timeout: the caller tries again.
            if execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                execute("PRAGMA journal_mode=WAL").fetchone()  # else the statement stays open
            self._wait_for_disk()
            execute("PRAGMA foreign_keys=ON")
            execute("PRAGMA trusted_schema=OFF")
            execute("PRAGMA temp_store=MEMORY")  # else a full $TMPDIR looks like a full disk
            execute("PRAGMA secure_delete=FAST").fetchone()  # Debian's ON fills the WAL with zeros
            if ours and not _missing_columns(self._connection):
                return
        with self.transaction(waits=False):
            if not _check_ours(self._connection, self.path):
                older = sqlite3.sqlite_version_info < (3, 37)
                schema = re.sub("STRICT(, )?", "", _SCHEMA) if older else _SCHEMA
                for statement in schema.split(";\n"):  # executescript would commit
                    execute(statement)
                execute(f"PRAGMA application_id={_APPLICATION_ID}")
                execute(f"PRAGMA user_version={_USER_VERSION}")
            for (table, column), declaration in _missing_columns(self._connection).items():
                execute(f"ALTER TABLE {table} ADD COLUMN {column} {declaration}")

    def _wait_for_disk(self, wait: bool = True) -> None:
        """Let SQLite wait for the disk where consistency needs it: at a checkpoint, and before it
        overwrites the WAL. With wait=False no commit waits, or copies the WAL into the file."""
        self._connection.execute(f"PRAGMA synchronous={'NORMAL' if wait else 'OFF'}")
        pages = _WAL_PAGES if wait else 0
        # Statements that return a row are read to the end: one left open crashes PyPy at close().
        self._connection.execute(f"PRAGMA wal_autocheckpoint={pages}").fetchone()

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE", waits: bool = True) -> Iterator[None]:
        """Make the block one transaction, by default under the write lock; an empty `begin` makes
        none, and only explains errors. With waits=False, and if the WAL was empty, the commit does
        not wait for the disk. Raises _Busy or DatabaseError, with what went wrong in SQLite."""
        execute = self._connection.execute
        with _in_sqlite:
            try:
                if not waits:
                    self._wait_for_disk(False)
                if begin:  # an empty statement may raise the last one's error anew (Python 3.13)
                    execute(begin)
                # The WAL is looked at inside the transaction, when nobody else can write to it.
                wal = None if waits or not begin else _file_identity(f"{self.path}-wal")
                if wal is not None and wal[1] > 0:
                    execute("ROLLBACK")
                    self._wait_for_disk()
                    execute(begin)
                yield
                if begin:
                    execute("COMMIT")
            except BaseException as error:  # whatever it is: undone, explained, raised
                self._connection.rollback()  # a full disk or an I/O error may have done so already
                _raise_explained(error, self.path)
            finally:
                if not waits:
                    self._wait_for_disk()

    def sync(self) -> bool:
        """Wait until no power cut can undo a commit. Returns False if the caller should close the
        database instead, as the wait failed, or there is no WAL, or only that has the tables."""
        # Closing this file drops no locks: SQLite's are on the database and the -shm.
        with contextlib.suppress(DatabaseError, OSError), open(f"{self.path}-wal", "rb") as wal:
            if os.stat(self.path).st_size <= _PAGE_SIZE:
                return False
            getattr(os, "fdatasync", os.fsync)(wal.fileno())  # as in SQLite; macOS has none
            if os.fstat(wal.fileno()).st_size > _WAL_PAGES * _PAGE_SIZE:
                self._empty_wal()
            return True
        return False

    def _empty_wal(self) -> bool:
        """Copy the WAL into the file, and empty it. Returns False if somebody writes, or reads
        what is in it: nobody is waited for, because SQLite would hold the write lock meanwhile."""
        execute = self._connection.execute
        with self.transaction(""):
            execute("PRAGMA busy_timeout=0").fetchone()
            [(busy, *_)] = execute("PRAGMA wal_checkpoint(TRUNCATE)")
            execute(f"PRAGMA busy_timeout={_BUSY_SECONDS * 1000:.0f}").fetchone()
        return not busy

    def close(self, is_last: bool = True) -> None:
        """Close the connection. The last process that closes copies the WAL into the file, and
        leaves no -wal and no -shm. A liteflow reader prevents that for milliseconds, so it is tried
        for a second; a -wal that stays does no harm. Not `is_last`: a pool keeps another store."""
        deadline = _monotonic() + 1.0
        try:
            with contextlib.suppress(DatabaseError):
                while is_last and not self._empty_wal() and _monotonic() < deadline:
                    time.sleep(0.02)
        finally:  # also if a Ctrl-C ends the wait
            with _in_sqlite:
                self._connection.close()
        # Close once more: two that close at once, or a reader that is last, leave the files behind.
        for pause in (0.0, 0.0, 0.002, 0.004) if is_last else ():
            if pause:
                time.sleep(pause)
            with _in_sqlite, contextlib.suppress(sqlite3.Error):
                if _file_identity(f"{self.path}-wal") is None or not self.is_in_place():
                    break
                with contextlib.closing(_connected(self.path, "mode=rw", 0.0)) as again:
                    again.execute("PRAGMA user_version").fetchone()

    def checkpoint(self) -> None:
        """Copy what the WAL holds into the file now, rather than during some later commit."""
        with self.transaction(""):
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def look(self, look: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Return what one of the looks below finds through this connection."""
        try:
            with _in_sqlite:
                return look(self._connection, *arguments, **named)
        except sqlite3.Error as error:
            _raise_explained(error, self.path)

    # A run's beginning and end. All but `cancel_run` and `end_run` need the caller's transaction.

    def create_run(
        self, dag: Dag, run_id: str, logical_date: _datetime.datetime | None, conf: dict[str, Any]
    ) -> None:
        """Insert a run, as `queued`, and its DAG's metadata; from now on the store records it."""
        fileloc = os.path.abspath(dag.fileloc) if dag.fileloc else None
        tags, schedule = json.dumps(sorted(map(str, dag.tags))), dag.schedule
        metadata = (dag.dag_id, dag.description, fileloc, dag.doc_md, tags, schedule)
        texts = [None if x is None else _shown(x, _TEXT_LIMIT, _storable) for x in metadata]
        self._connection.execute(_upserting("dag", 1), texts)
        when, columns = logical_date and _iso(logical_date), "dag_id, run_id, logical_date, conf"
        query = f"INSERT INTO dag_run ({columns}, state) VALUES (?, ?, ?, ?, 'queued')"
        made = self._connection.execute(query, (dag.dag_id, run_id, when, json.dumps(conf)))
        self.run_row = made.lastrowid or 0

    def _set_run(self, run_row: int, /, **values: Any) -> None:
        query = f"UPDATE dag_run SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?"
        self._connection.execute(query, (*values.values(), run_row))

    def _own_run(self, command: str, **values: Any) -> None:
        """Make this store's owner the run's, and record its process and command, for people."""
        process = f"pid {os.getpid()} on {socket.gethostname()}"
        own = {"owner": self.owner, "owner_process": process, "stop_requested": None}
        self._set_run(self.run_row, **own, command=_storable(command) or None, **values)

    def queue_run(self, command: str) -> None:
        """Record that the run stands in line in this process."""
        self._own_run(command, state="queued", reason=_SUBMITTED)

    def cancel_run(self, dag_id: str, run_id: str, reason: str, check: Callable[..., bool]) -> None:
        """Close a run that has not begun, unless `check`, under the write lock, rejects its row."""
        with self.transaction():
            row = _find_run(self._connection, dag_id=dag_id, run_id=run_id)
            if row is not None and check(row):
                self.close_run(row.id, "failed", reason)

    def claim_run(self, command: str, has_begun: bool) -> None:
        """Record that the run begins, or goes on, in this process."""
        began = {"resumed_date" if has_begun else "start_date": _now()}
        self._own_run(command, state="running", reason=None, end_date=None, **began)

    def end_run(self, state: DagRunState, reason: str | None) -> _Row:
        """Record the run's end in its own transaction; return its row. Raises AlreadyRunning."""
        with self.transaction():
            self._check_fence()
            row = self.close_run(self.run_row, state.value, reason)
        self.owner = ""  # as in the file, so that what the DAG's callbacks print can be recorded
        return row

    def close_run(self, run_row: int, state: str = "failed", reason: str | None = _DIED) -> _Row:
        """Record a run's end; return its row. Instances that had not ended lose their state, and
        their attempts that had not ended are interrupted, which uses up no try.

        If the scheduler died, the run's end is the last time that was recorded, and every running
        instance counts as lost, because its task may be what killed the scheduler."""
        ended = None if reason == _DIED else _now()
        values = {"run": run_row, "state": state, "reason": reason, "ended": ended}
        for statement in (
            "UPDATE dag_run SET state = :state, reason = :reason, owner = NULL, end_date = "
            "coalesce(end_date, :ended, max(coalesce(resumed_date, start_date, ''), coalesce(("
            "SELECT max(coalesce(task_attempt.end_date, task_attempt.start_date)) FROM "
            "task_attempt JOIN task_instance ON task_instance.id = task_instance_id WHERE "
            "dag_run_id = :run), ''))) WHERE id = :run",
            # An attempt without a row gets one; its end_date tells after which resume it was sent.
            "INSERT INTO task_attempt (task_instance_id, try_number, state, end_date, error) "
            "SELECT task_instance.id, try_number, 'interrupted', end_date, :reason FROM dag_run "
            "JOIN task_instance ON dag_run_id = dag_run.id WHERE dag_run.id = :run AND "
            "task_instance.state IN ('queued', 'running', 'up_for_reschedule') "
            "ON CONFLICT (task_instance_id, try_number) DO UPDATE SET state = excluded.state, "
            "end_date = coalesce(end_date, :ended), error = coalesce(error, :reason)",
            "UPDATE task_instance SET max_tries = max_tries + (state != 'up_for_retry'), "
            "lost = lost + (state = 'running' AND :ended IS NULL), state = NULL WHERE "
            "dag_run_id = :run AND state IN ('queued', 'running', 'up_for_retry', "
            "'up_for_reschedule')",
        ):
            self._connection.execute(statement, values)
        [row] = _select_runs(self._connection, id=run_row)
        return row

    def resume_run(self, row: _Row, found: _Resumption) -> None:
        """Turn a run's rows into those that its resume starts from, as `found` says."""
        many = self._connection.executemany
        self._set_run(row.id, seconds=_run_seconds(row) or row.seconds)
        untried = [(past.row_id,) for past, i in found.removed if i < 0 and not past.try_number]
        many("DELETE FROM task_instance WHERE id = ?", untried)
        moves: list[Any] = [(index, "removed", past.row_id) for past, index in found.removed]
        kept = found.instances.items()
        moves += [(i, past.state, past.row_id) for (_, i), past in kept if past.map_index != i]
        # In two steps, by way of indexes that no row has: another row may still have the new index.
        many("UPDATE task_instance SET map_index = -2 - id WHERE id = ?", [m[2:] for m in moves])
        many("UPDATE task_instance SET map_index = ?, state = ? WHERE id = ?", moves)
        stale = [found.instances[key] for key in found.again] + [past for past, _ in found.removed]
        self._delete_values(past.row_id for past in stale)

    def _delete_values(self, row_ids: Iterable[int]) -> None:
        ids = [(row_id,) for row_id in row_ids if row_id]  # a new instance has no row yet
        for table in ("xcom", "xcom_item"):
            self._connection.executemany(f"DELETE FROM {table} WHERE task_instance_id = ?", ids)

    def write_instances(self, nodes: Iterable[_Node], element_of: Any = None) -> None:
        """Write whole rows of these tasks' instances: of new ones, which get their row id here, and
        of those that a resume keeps. `element_of` gives a mapped one's digest and preview."""
        [[last]] = self._connection.execute("SELECT coalesce(max(id), 0) FROM task_instance")
        ids = itertools.count(last + 1)

        def rows() -> Iterator[tuple[Any, ...]]:
            for node in nodes:
                task = node.task
                group_id = task.task_group.group_id if task.task_group else ""
                role = "setup" if task.is_setup else "teardown" if task.is_teardown else ""
                of_task = _json_ids(task._upstream), _takes_text(task) or "", group_id, role
                for i in node.instances:
                    mapped = node.mapping is not None and i.map_index >= 0
                    element, preview = element_of(i, node.mapping) if mapped else ("", "")
                    if i.row_id and i.try_number and i.state in (_S.SUCCESS, _S.SKIPPED):
                        preview = ""  # the row keeps the name that map_index_template made
                    i.row_id = i.row_id or next(ids)
                    yield (
                        i.row_id, self.run_row, i.task_id, i.map_index, _state_of(i), i.try_number,
                        i.max_tries, i.lost, 0, i.flow or "", element, preview or "", *of_task,
                    )  # fmt: skip

        # Not a list: with 100,000 rows it would be the largest object of the run.
        self._connection.executemany(_upserting("task_instance", 3), rows())

    def mark(self, run_row: int, names: Iterable[tuple[str, int | None]], how: int) -> None:
        """Mark task instances (index None: all of the task) as cleared; `how`: see the column."""
        self._connection.executemany(
            "UPDATE task_instance SET cleared = ?, state = NULL WHERE dag_run_id = ? AND "
            "task_id = ? AND map_index = coalesce(?, map_index) AND state IS NOT 'removed'",
            [(how, run_row, *name) for name in names],
        )

    # A run's turns.

    def record(self, batch: _Batch, check: _Check = lambda: None, element_of: Any = None) -> None:
        """Write a turn's events in one transaction. `check` is called under the write lock, and may
        change the batch. Raises _Busy, AlreadyRunning, DatabaseError."""
        many = self._connection.executemany
        with self.transaction():
            self._check_fence()
            check()
            for table, rows in (("xcom", batch.xcoms), ("xcom_item", batch.items)):
                if rows:
                    self._write_values(table, rows)
            # After the inserts, as values of an attempt that failed in this turn must go, too;
            # and an expanded task takes its elements' previews from the values inserted here.
            if batch.renewed:
                self._delete_values(batch.renewed)
            for node in batch.expanded:
                key = (self.run_row, node.task.task_id, node.instances[0].row_id)
                unexpanded = "dag_run_id = ? AND task_id = ? AND map_index = -1 AND id != ?"
                self._connection.execute(f"DELETE FROM task_instance WHERE {unexpanded}", key)
                self.write_instances([node], element_of)
            if batch.named:
                many("UPDATE task_instance SET element_preview = ? WHERE id = ?", batch.named)
            many(_UPDATE_INSTANCE, map(_changes_of, batch.instances))
            many(_inserting("task_attempt"), map(_attempt_row, batch.attempts))
            if batch.logs:
                rows = [(None, a.instance.row_id, a.try_number, *part) for a, *part in batch.logs]
                many(_inserting("task_log"), rows)

    def _write_values(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows whose last column is a value. A large value is written straight into SQLite's
        pages, because as a parameter it would be copied twice first."""
        small = [row for row in rows if len(row[-1]) <= _LARGE]
        self._connection.executemany(_inserting(table), small)
        for *row, value in [row for row in rows if len(row[-1]) > _LARGE]:
            # A page that leaves the cache before the commit, and then changes again, would make
            # SQLite read once more all that it has written to the WAL since.
            self._connection.execute(f"PRAGMA cache_spill={-_CACHE // 1024}")
            query = f"{_inserting(table).removesuffix('?)')}zeroblob(?))"
            made = self._connection.execute(query, (*row, len(value)))
            with self._connection.blobopen(table, "value", made.lastrowid or 0) as blob:
                for piece in _pieces_of(value):
                    blob.write(piece)

    def _check_fence(self) -> None:
        """Raise AlreadyRunning unless the run is still ours; the caller's lock then keeps it so."""
        query = "SELECT 1 FROM dag_run WHERE id = ? AND coalesce(owner, '') = ?"
        if not self._connection.execute(query, (self.run_row, self.owner)).fetchone():
            raise AlreadyRunning("another process has taken this run over, or it was deleted")

    def is_in_place(self) -> bool:
        """Whether the file was neither deleted nor replaced; else what is written is lost."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), self._opened)
        return False

    # What people do to runs.

    def change(
        self, run_row: int, check: Callable[[Any], object], act: Callable[..., None], *how: Any
    ) -> None:
        """In one transaction, call `check` with a run's row (it may raise), and then `act`, one of
        the methods below, with the row and `how`."""
        with self.transaction():
            row = _find_run(self._connection, id=run_row)
            check(row)
            act(row, *how)

    def request_stop(self, row: _Row) -> None:
        """Ask the run's owner to stop it: the run loop looks for that now and then."""
        if row.state == "running":
            self._set_run(row.id, stop_requested=_now())

    def clear(self, row: _Row, names: Iterable[tuple[str, int | None]], how: int) -> None:
        """Mark task instances to run again, and the run as `queued`; close it if its owner died."""
        if row.state == "running":
            self.close_run(row.id)
        self.mark(row.id, names, how)
        self._set_run(row.id, state="queued", reason=None, owner=None)

    def delete_run(self, row: _Row) -> None:
        """Delete a run with all that belongs to it."""
        self._connection.execute("DELETE FROM dag_run WHERE id = ?", (row.id,))

    def forget_dag(self, dag_id: str) -> None:
        """Delete what is known of a DAG that has no runs any more."""
        with self.transaction():
            unused = "dag_id NOT IN (SELECT dag_id FROM dag_run)"
            self._connection.execute(f"DELETE FROM dag WHERE dag_id = ? AND {unused}", (dag_id,))

    def drop_values(self, row: _Row) -> None:
        """Delete a run's XComs."""
        query = "SELECT id FROM task_instance WHERE dag_run_id = ?"
        self._delete_values(row_id for [row_id] in self._connection.execute(query, (row.id,)))
        self._set_run(row.id, values_deleted=_now())

    def give_back(self) -> None:
        """Give unused space back to the disk, in steps: one large vacuum would write all the pages
        to the WAL at once, and keep others waiting."""
        execute = self._connection.execute
        with self.transaction(""):
            before = math.inf
            # In a file that was made without auto_vacuum the number of free pages does not fall.
            while 0 < (free := execute("PRAGMA freelist_count").fetchone()[0]) < before:
                # Not by `execute`, which steps once in Python 3.11, and so frees one page.
                self._connection.executescript("PRAGMA incremental_vacuum(1000)")
                # PASSIVE, because a wait for a reader would keep others from the write lock.
                execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                before = free


def _until_unlocked(path: str, act: Callable[[], T], check: Callable[[], Any] = bool) -> T:
    """Return what `act` gives; repeat it while somebody else holds the write lock. `check` is
    called before each repetition, and may raise to end the wait. Raises DatabaseError."""
    deadline = _monotonic() + _LOCKED_LIMIT
    while True:
        try:
            return act()
        except _Busy:
            if _monotonic() > deadline:
                why = f"{path} was locked by another process for {_LOCKED_LIMIT:g} s"
                raise DatabaseError(why) from None
            check()
            time.sleep(0.02)


# --- Store: looks ---------------------------------------------------------------------------------

# A look is a function of a connection, which is that of `_read` or a store's. Columns are cast to
# their declared types, so that a harmful file gives texts where texts are expected.

_ITS_ATTEMPTS = "task_attempt ON task_instance_id = task_instance.id"
_ITS_LATEST = f"{_ITS_ATTEMPTS} AND task_attempt.try_number = task_instance.try_number"
_INSTANCES = f"task_instance LEFT JOIN {_ITS_LATEST}"
_ATTEMPTS = f"task_instance JOIN {_ITS_ATTEMPTS}"
_OF_INSTANCE = "JOIN task_instance ON task_instance.id = task_instance_id"
_XCOMS = f"xcom {_OF_INSTANCE}"
_ITEMS = f"xcom_item {_OF_INSTANCE}"
_INSTANCE_KEY = "task_instance.task_id task_instance.map_index"
_TAIL_PART = 1_000_000  # number of the part that holds a long log's end, and is rewritten


def _select(
    source: str, columns: str, rest: str, db: sqlite3.Connection, run_row: Any = None, **asked: Any
) -> list[_Row]:
    """Rows of `source`, a table or a join, with these `columns`, or with all columns of the table
    if none are named. Of two with the same name the second is called TABLE_COLUMN. `asked` says
    which rows: see `_ASKED_OF`. A column that an older file lacks is None.
    """
    names, terms = _terms(source, columns, ())
    rest, values = _asking(source, rest, dag_run_id=run_row, **asked)
    try:
        found = db.execute(f"SELECT {terms} FROM {source} {rest}", values)
    except sqlite3.OperationalError:  # a column is missing; else this is raised again
        _, terms = _terms(source, columns, tuple(_missing_columns(db)))
        found = db.execute(f"SELECT {terms} FROM {source} {rest}", values)
    return [_Row(**dict(zip(names, row, strict=True))) for row in found]


@functools.cache
def _terms(source: str, columns: str, absent: Collection[Any]) -> tuple[list[str], str]:
    """The names of the rows' fields, and the SQL that selects them."""
    terms: dict[str, str] = {}
    for name in columns.split() or _COLUMNS[source]:
        table, column = name.split(".") if "." in name else (source.split()[0], name)
        term = f"CAST({table}.{column} AS {_COLUMNS[table][column]})"
        key = f"{table}_{column}" if column in terms else column
        terms[key] = "NULL" if (table, column) in absent else term
    return [*terms], ", ".join(terms.values())


# Conditions by the name of the argument that asks for them. Any other name is a column of the first
# table, or else of task_instance, which must equal the argument.
_ASKED_OF = {
    # With the plus, SQLite searches the few `running` runs, not all runs of the DAG.
    "live_of": "state = 'running' AND +dag_id = ?",
    "ended_since": "coalesce(end_date, '9999') >= ?",  # an unfinished one counts
    "begun_before": "coalesce(start_date, end_date, '9999') < ?",
    "dated_before": "logical_date < ?",
    # All runs but so many of the newest of each DAG.
    "but_newest": "id IN (SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY dag_id "
    "ORDER BY id DESC) AS place FROM dag_run) WHERE place > ?)",
    # By run id or DAG/RUN. The inner query reads an index alone: a tenth of the table's size.
    "named": "id IN (SELECT id FROM dag_run WHERE ? IN (run_id, dag_id || '/' || run_id))",
    # The newest run of this DAG that has ended, and all runs since.
    "latest_of": "id >= coalesce((SELECT max(id) FROM dag_run WHERE dag_id = ? AND state NOT IN "
    "('queued', 'running')), 0)",
    "not_yet": "state != ?",
    "state_or_running": "state IN (?, 'running')",
    "but_state": "task_instance.state IS NOT ?",
    "but_key": "key != ?",
    "latest_try": "(task_log.try_number = task_instance.try_number) = ?",
    # New parts of logs, and the ends of long logs, which are rewritten while tasks run.
    "after": f"(task_log.id > ? OR part = {_TAIL_PART})",
    "after_live": f"task_log.id > ? AND part < {_TAIL_PART}",
    "begun_since": "coalesce(task_attempt.start_date, '9999') >= ?",
}


def _asking(source: str, rest: str, limit: Any = None, **asked: Any) -> tuple[str, list[Any]]:
    """The SQL that follows `FROM source`, and its parameters. An argument of None sets no term."""
    first = source.split()[0]
    terms, values = ["true"], []
    for name, value in asked.items():
        if value is not None:
            table = first if name in _COLUMNS[first] else "task_instance"
            terms.append(_ASKED_OF.get(name, f"{table}.{name} = ?"))
            values.append(value)
    return f"WHERE {' AND '.join(terms)} {rest} LIMIT {-1 if limit is None else limit}", values


# DAGs with their metadata; runs, newest first; runs with only the columns that identify them.
_select_dags = functools.partial(_select, "dag", "", "ORDER BY dag_id")
_NEWEST_FIRST = "ORDER BY id DESC"
_select_runs = functools.partial(_select, "dag_run", "", _NEWEST_FIRST)
_select_run_ids = functools.partial(_select, "dag_run", "dag_id run_id start_date", _NEWEST_FIRST)


def _find_run(db: sqlite3.Connection, by: str = "id", **asked: Any) -> _Row | None:
    """The run with the greatest value of the column `by`: the newest, or the one latest in date."""
    order = f"ORDER BY {by} DESC, id DESC"
    return next(iter(_select("dag_run", "", order, db, limit=1, **asked)), None)


def _run_seconds(row: _Row, now: _datetime.datetime | None = None) -> float | None:
    """The seconds that a run took (until `now` if it has not ended), without pauses before resumes.
    None if it has not begun, or has not ended and there is no `now`."""
    latest = _span(_moment(row.resumed_date or row.start_date), _moment(row.end_date) or now)
    earlier = row.seconds if row.seconds and math.isfinite(row.seconds) else 0.0
    return None if latest is None else earlier + latest


def _select_run_counts(db: sqlite3.Connection, run_row: int) -> dict[str, int]:
    """How many task instances of a run are in each state; `none` counts those without a state."""
    what = "coalesce(CAST(state AS TEXT), 'none'), count(*)"
    query = f"SELECT {what} FROM task_instance WHERE dag_run_id = ? GROUP BY state"
    return dict(db.execute(query, (run_row,)))


# A run at one moment: the number of instances by state (or "none"); a (label, seconds) of each
# running instance; the seconds that the run has taken so far, without pauses.
_Snapshot = tuple[Mapping[str, int], Iterable[tuple[str, float]], float]


def _select_snapshot(db: sqlite3.Connection, run_row: int) -> _Snapshot:
    """A run as it is now."""
    now, row = _utcnow(), _find_run(db, id=run_row)
    found = _select_instances(db, run_row, state="running")
    running = [(_label_of(x.task_id, x.map_index), _moment(x.start_date)) for x in found]
    ages = [(label, _span(start, now) or 0.0) for label, start in running]
    return _select_run_counts(db, run_row), ages, (row and _run_seconds(row, now)) or 0.0


def _select_histories(db: sqlite3.Connection, dag_id: Any = None) -> list[dict[str, Any]]:
    """DAGs with the number of their runs, the newest run, and the end of the last success."""
    dags = []
    # An end in the future (a clock was ahead) does not count: it would hide all later failures.
    latest = "max(CASE WHEN state = 'success' AND end_date <= ? THEN CAST(end_date AS TEXT) END)"
    query = f"SELECT count(*), {latest} FROM dag_run WHERE dag_id = ?"
    for row in _select_dags(db, dag_id=dag_id):
        [[runs, success]] = db.execute(query, (_now(), row.dag_id))
        newest = _find_run(db, dag_id=row.dag_id)
        dags.append({**vars(row), "runs": runs, "newest": newest, "last_success": success})
    return dags


_ATTEMPT_COLUMNS = " ".join(f"task_attempt.{name}" for name in [*_COLUMNS["task_attempt"]][1:])
_INSTANCE_COLUMNS = f"""task_id map_index state try_number max_tries element_preview
    upstream_task_ids task_group_id role cleared {_ATTEMPT_COLUMNS}"""
_BY_TASK = "ORDER BY min(id) OVER (PARTITION BY task_id), map_index"  # resumes move indexes
_IN_ORDER = f"{_BY_TASK}, task_attempt.try_number"
# A run's task instances with their latest attempts; with each attempt; the task id of each attempt.
_select_instances = functools.partial(_select, _INSTANCES, _INSTANCE_COLUMNS, _IN_ORDER)
_select_attempts = functools.partial(_select, _ATTEMPTS, _INSTANCE_COLUMNS, _IN_ORDER)
_select_begun = functools.partial(_select, _ATTEMPTS, "task_id", "")


def _select_failed(db: sqlite3.Connection, run_row: int, limit: int) -> tuple[list[_Row], int]:
    """The first `limit` failed task instances of a run, and the number of all."""
    rows = _select_instances(db, run_row, state="failed", limit=limit)
    return rows, len(rows) if len(rows) < limit else _select_run_counts(db, run_row)["failed"]


# The keys and states of a run's instances: whole rows take ten times as long.
_select_keys = functools.partial(
    _select, "task_instance", "task_id map_index state", "ORDER BY map_index"
)
# The stored output, in the order in which attempts began. `_select_parts` leaves out the texts,
# which may take gigabytes: see `_select_texts`.
_LOGS = f"task_log {_OF_INSTANCE} LEFT JOIN task_attempt USING (task_instance_id, try_number)"
_AS_BEGUN = "ORDER BY start_date, task_instance.id, task_log.try_number, part"
_select_log = functools.partial(_select, _LOGS, "text task_instance.map_index", _AS_BEGUN)
_PART_COLUMNS = f"id task_instance_id try_number part {_INSTANCE_KEY}"
_select_parts = functools.partial(_select, _LOGS, _PART_COLUMNS, _AS_BEGUN)
# The messages about callbacks that failed, which `_call_back` prints.
_CALLED_BACK = """AND text LIKE '%liteflow: on!_%!_callback of % failed: %' ESCAPE '!'
    ORDER BY task_log.id DESC"""
_select_callback_errors = functools.partial(_select, _LOGS, "text", _CALLED_BACK)
# A run's XComs without their values, in order.
_XCOM_COLUMNS = f"key type preview {_INSTANCE_KEY}"
_select_xcoms = functools.partial(_select, _XCOMS, _XCOM_COLUMNS, f"{_BY_TASK}, key")


def _select_texts(db: sqlite3.Connection, run_row: int, parts: Iterable[_Row]) -> list[str]:
    """The texts of these parts of logs. A part is not found by its id, because that changes when
    the end of a long log is rewritten."""
    key = "task_instance_id try_number part"
    query = f"SELECT CAST(text AS TEXT) FROM task_log WHERE {' = ? AND '.join(key.split())} = ?"
    values = map(operator.attrgetter(*key.split()), parts)
    return ["".join(text for [text] in db.execute(query, each)) for each in values]


def _select_past(db: sqlite3.Connection, run_row: int) -> list[_Past]:
    """A run's task instances as a resume sees them."""
    columns = """id task_id map_index state try_number max_tries lost cleared
        element element_preview takes flow role upstream_task_ids
        task_attempt.state task_attempt.start_date task_attempt.end_date task_attempt.error"""
    found = []
    in_order = operator.attrgetter(*_terms(_INSTANCES, columns, ())[0])  # unlike vars()
    for row in _select(_INSTANCES, columns, "ORDER BY task_id, map_index", db, run_row):
        *own, error = in_order(row)
        found.append(_Past._make([*own, row.state is None and error == _DIED]))
    return found


def _select_lengths(db: sqlite3.Connection, run_row: int) -> dict[_InstanceKey, int | None]:
    """The length of every result that is stored, by task and index."""
    rows = _select(_XCOMS, f"length {_INSTANCE_KEY}", "", db, run_row, key="return_value")
    return {(x.task_id, x.map_index): x.length for x in rows}


def _select_valued(
    source: str, columns: str, rest: str, db: sqlite3.Connection, largest: int, **asked: Any
) -> list[tuple[Any, ...]]:
    """Rows of these columns and the value, which is None if it has over `largest` bytes. A large
    value is read straight from SQLite's pages; a column would be assembled in memory first."""
    table, (_, terms) = source.split()[0], _terms(source, columns, ())
    rest, values = _asking(source, rest, **asked)
    value = f"{table}.rowid, length(value), CASE WHEN length(value) <= ? THEN value END"
    query = f"SELECT {terms}, {value} FROM {source} {rest}"
    found = []
    for *row, row_id, size, data in db.execute(query, (min(largest, _LARGE), *values)).fetchall():
        if data is None and size is not None and size <= largest:
            with db.blobopen(table, "value", row_id, readonly=True) as blob:
                data = blob.read()
        found.append((*row, data))
    return found


def _select_values(
    db: sqlite3.Connection, run_row: int, largest: int = _ROW_LIMIT, **asked: Any
) -> list[tuple[str, int, str, bytes | None]]:
    """(task_id, map_index, key, value) of XComs, by index; value None if over `largest` bytes."""
    order = "ORDER BY map_index" if "task_id" in asked else "ORDER BY task_instance.id, key"
    which, columns = {"dag_run_id": run_row, **asked}, f"{_INSTANCE_KEY} key"
    found = _select_valued(_XCOMS, columns, order, db, largest, **which)
    # The order of _BY_TASK, made here because SQLite would copy all values, of up to 1 GB, for it.
    first: dict[str, int] = {}
    return sorted(found, key=lambda row: (first.setdefault(row[0], len(first)), row[1]))


def _select_item(
    db: sqlite3.Connection, run_row: int, task_id: str, item: int, largest: int = _ROW_LIMIT
) -> bytes | None:
    """The pickle of one element of a result; None if its elements are not stored apart."""
    which = {"dag_run_id": run_row, "task_id": task_id, "map_index": -1, "item": item}
    found = _select_valued(_ITEMS, "item", "", db, largest, **which)
    return next((value for _, value in found), None)


def _select_item_previews(db: sqlite3.Connection, run_row: int, task_id: str) -> dict[int, str]:
    """Previews of what others expand over, by index: a result's elements, or instances' results."""
    items = _select(_ITEMS, "item preview", "", db, run_row, task_id=task_id)
    xcoms = [] if items else _select_xcoms(db, run_row, task_id=task_id, key="return_value")
    return {x.item: x.preview for x in items} or {x.map_index: x.preview for x in xcoms}


def _count_elsewhere(db: sqlite3.Connection, run_row: int, dag_id: str, task_id: str) -> list[Any]:
    """How many instances of a task run now in other runs of its DAG: (owner, number) pairs."""
    return db.execute(
        "SELECT CAST(owner AS TEXT), count(*) FROM task_instance JOIN dag_run ON dag_run.id = "
        "dag_run_id WHERE dag_run.state = 'running' AND dag_id = ? AND task_id = ? AND "
        "dag_run.id != ? AND task_instance.state IN ('queued', 'running') GROUP BY owner",
        (dag_id, task_id, run_row),
    ).fetchall()


def _last_part(db: sqlite3.Connection, instance_row: int, try_number: int) -> int:
    """The number of the last part of an attempt's log, the tail part aside; 0 if there is none."""
    which = {"task_instance_id": instance_row, "try_number": try_number, "after_live": 0}
    return max((row.part for row in _select("task_log", "part", "", db, **which)), default=0)


# --- Values: the only pickle ----------------------------------------------------------------------

import pickle  # noqa: E402 - here, since no other section may use it

_PREVIEW = 80  # characters of a value's preview
_VALUE_LIMIT = _ROW_LIMIT - 100_000  # bytes; the rest of its row must fit into _ROW_LIMIT, too

_NOT_PICKLED = (pickle.PicklingError, AttributeError, TypeError)  # what pickle itself raises

_dump = functools.partial(pickle.dumps, protocol=5)
# Attributes that are not sent to a worker if they are empty: it makes them anew for each task.
_OFTEN_EMPTY = {"params": _Params, "_upstream": dict, "_downstream": dict}


class _Pieces(_Record):
    """The pickle of a large value, in pieces: some are the value's own bytes, not copied."""

    pieces: Sequence[bytes]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


def _pieces_of(value: bytes | _Pieces) -> Sequence[bytes]:
    return value.pieces if isinstance(value, _Pieces) else [value]


def _dump_in_pieces(value: Any) -> bytes | _Pieces:
    """Like `_dump`, but a large pickle comes in pieces."""
    made: list[bytes] = []

    def write(piece: Any) -> None:  # bytes() copies a bytearray, say, but no bytes
        made.append(bytes(piece.raw() if isinstance(piece, pickle.PickleBuffer) else piece))

    pickle.Pickler(types.SimpleNamespace(write=write), 5).dump(value)
    return _Pieces(made) if sum(map(len, made)) > _LARGE else b"".join(made)


def _load(data: bytes, script: str | None = None, whose: str = "") -> Any:
    """Unpickle a value, which the task `whose` stored, if given. Classes of the `script` that
    stored it are looked for in this process's `__main__`, then in the module of that file. Raises
    AttributeError or ImportError, which names what is not here."""
    if len(data) < 1000 and pickle.STACK_GLOBAL not in data:  # it names no class or function
        return pickle.loads(data)
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.script = script
    try:
        return unpickler.load()
    except Exception as error:  # unpickling runs the value's own code; no frame may show that
        if whose:
            remedy = f"mend its class, or run the task again (--from {whose})"
            error.add_note(f"raised as a value of task {whose!r} was unpickled: {remedy}")
        raise


def _is_script(module: str) -> bool:
    """Whether others import the running script by this name; `__main__` has its classes already."""
    if module in sys.modules:
        return False
    path, name = _script()
    return module == name if name else f"/{path}".endswith(f"/{module.replace('.', '/')}.py")


class _Unpickler(pickle.Unpickler):
    script: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        if name == "_of_job" and module == __name__:  # a shortcut: most tasks' arguments have it
            return _of_job
        module = "__main__" if _is_script(module) else _module_name(module)
        try:
            return super().find_class(module, name)
        except (AttributeError, ImportError) as error:
            what = f"needs {module}.{name}, which is not here ({error})"
            remedy = "bring it back, or run the task that stored the value again (--from TASK)"
            if module == "__main__":
                for dag in [*_built.values()]:  # a program may have imported the script by its name
                    if dag.fileloc and dag.fileloc == self.script:
                        with contextlib.suppress(AttributeError, ImportError):
                            return super().find_class(dag._module, name)
                script = self.script or "the script that stored it"
                what = f"is of class {name!r} of {script}, which is not the running script"
                remedy = "read it in that script, or define the class in a module"
            kind = ImportError if isinstance(error, ImportError) else AttributeError
            raise kind(f"the value {what}: {remedy}") from error


class _Call(_Record):
    """A task's pickled arguments on their way to a worker, and the results that they take."""

    data: bytes
    takes: frozenset[tuple[str, str]]  # (task_id, key)
    constants: Sequence[Sequence[_Call]] = ()  # elements by argument, as far as they are constants


_NO_CALL = _Call(_dump(((), {})), frozenset())


def _dump_call(task: BaseOperator) -> _Call:
    """Pickle a task's arguments, with look-ups in place of results. Raises UnreachableTask for an
    argument that can't be sent to a worker."""
    args, kwargs = task._arguments()
    call = _NO_CALL
    if args or kwargs:
        call = _dump_taking(task, (args, kwargs), {**dict(enumerate(args, 1)), **kwargs})
    if task._mapping is None:
        return call
    constants = []
    for name, source in task._mapping.sources.items():
        values, what = source, name or "element"
        if isinstance(source, _Mappable):  # check a fillvalue now: a worker would be too late
            values = [x._by for x in source._parts("zip") if x._by is not ...]
            what = "fillvalue"
        constants.append([_dump_taking(task, x, {what: x}) for x in values])
    return _Call(call.data, call.takes, constants)


def _dump_taking(task: BaseOperator, value: Any, named: Mapping[Any, Any]) -> _Call:
    """Pickle `value`, which holds the arguments `named`, and note which results they take. Raises
    UnreachableTask for an argument that can't be pickled."""
    results: list[XComArg[Any]] = []
    token = _pickling.set((task, results))
    try:
        data = _dump(value)
    except Exception:  # it runs the arguments' own code
        why = _unpicklable("argument", named, "pass plain data, or make it in the task")
        raise UnreachableTask(f"task {task.task_id!r}: {why}") from None
    finally:
        _pickling.reset(token)
    for result in results:
        if result.operator.task_id not in task._upstream:
            what = f"task {task.task_id!r}: the result of {result.operator.task_id!r}"
            why = "only lists, tuples, sets and dicts are searched, when the task is made"
            raise UnreachableTask(f"{what} is inside an object, or was put in later: {why}")
    return _Call(data, frozenset((x.operator.task_id, x.key) for x in results))


def _unpicklable(kind: str, named: Mapping[Any, Any], remedy: str) -> str:
    """A message that names the argument or setting (`kind`) that can't be pickled, and a remedy."""
    for name, value in named.items():
        try:
            _dump(value)
        except Exception as error:  # pickling runs the value's own code, which may raise anything
            which = f"{kind} {name!r}, a {type(value).__name__}, can't be sent to a worker"
            return f"{which} ({_brief(error)}): {remedy}"
    return f"its {kind}s can't be pickled together: {remedy}"


def _dump_settings(task: BaseOperator) -> bytes:
    """Pickle the settings of a task, for a worker that finds only its function or class, by name.
    The task's id is left out, so that tasks which differ in nothing else share one pickle."""
    late = task._arguments()[1]  # settings that hold results are sent with the task's arguments
    if isinstance(task, _FunctionOperator):
        known = {*task._known_settings, "_upstream", "_downstream", "_conditions", "_map_functions"}
        late = late.get(_LATE, {})
    else:
        known = vars(task).keys() - {*_PLACE, "task_id", "_mapping", "_made_inside", "_takes_more"}
    empty = {name for name in _OFTEN_EMPTY if not getattr(task, name)}
    own = {n: x for n, x in vars(task).items() if n in known and n not in {*late, *empty}}
    if task._mapping is not None:
        own["_mapping"] = types.SimpleNamespace(functions=task._mapping.functions)
        if task._in_partial is not None:
            apart = {*late, *_PLACE}
            own["_in_partial"] = {n: x for n, x in task._in_partial.items() if n not in apart}
    return _dump_for_worker(f"task {task.task_id!r}", own, (getattr(task, "_kind", None), own))


def _dump_for_worker(what: str, own: Mapping[str, Any], settings: Any) -> bytes:
    """Pickle the settings of `what`, a task or DAG; `own` has them by name. Raises UnreachableTask
    for one that can't be pickled, or that a worker could not import."""
    remedy = "build the DAG at the top level of its module"
    named = {**own, **own.get("_in_partial", {}), "_in_partial": None}
    try:
        data = _dump(settings)
    except Exception:  # it runs the settings' own code; a callback may be a lambda
        raise UnreachableTask(f"{what}: {_unpicklable('setting', named, remedy)}") from None
    for name, value in named.items():
        functions = [x for x in _leaves(value) if isinstance(x, types.FunctionType)]
        for code in [x.__code__ for x in functions if x.__module__ == "__main__"]:
            # A forked worker would have it. It is refused all the same: no DAG may depend on forks.
            if _is_below_guard(code.co_filename, code.co_firstlineno):
                why = f"setting {name!r}, a function, stands below the main guard"
                raise UnreachableTask(f"{what}: {why}: {remedy}")
    return data


def _element_keys(mapping: _ExpandInput, known: _Known) -> list[str]:
    """A digest of what each instance is expanded over: of a constant's value, or of the index of a
    result's element. Equal digests are told apart by their occurrence."""

    @functools.cache
    def constant(name: str | None, index: int) -> bytes:
        try:
            return _canonical(mapping.sources[name][index])
        except Exception:  # pickling runs the value's own code; where it fails, the index decides
            return f"index {index}".encode()

    seen: collections.Counter[str] = collections.Counter()
    keys = []
    names = len(mapping.sources) > 1  # a single argument may be renamed, and keep its digests
    for i in range(mapping.count(known)):
        parts = sorted(
            f"{name} ".encode() * names
            + (constant(name, where[0]) if kind == "constant" else repr((kind, *where)).encode())
            for name, (kind, *where) in mapping.elements(i, known)
        )
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
        keys.append(f"{key}.{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return keys


def _canonical(value: Any) -> bytes:
    """Bytes that are the same for equal plain data in every process. Raises what pickling does."""
    kind = type(value)
    if kind in (str, bytes, bool, int, float, complex, type(None)):
        return f"{kind.__name__} {value!r}".encode()  # a repr has no surrogates
    if kind in _CONTAINERS:
        parts = map(_canonical, value.items() if kind is dict else value)
        ordered = parts if kind in (list, tuple) else sorted(parts)
        return b"%s(%s)" % (kind.__name__.encode(), b",".join(ordered))
    if isinstance(value, XComArg):
        return f"result {value.operator.task_id} {value.key}".encode()
    # A user's PathLike may be more than its path (an upload with its target, say).
    if isinstance(value, os.PathLike) and kind.__module__.partition(".")[0] == "pathlib":
        return b"path " + os.fsencode(value)
    if isinstance(value, enum.Enum):
        return f"enum {_lasting_name(kind)}.{value.name or value.value}".encode()  # unnamed flags
    if hasattr(kind, "__dataclass_fields__"):  # these include an InitVar, which is no attribute
        names = [name for name in kind.__dataclass_fields__ if hasattr(value, name)]
        return _lasting_name(kind).encode() + _canonical({n: getattr(value, n) for n in names})
    data = io.BytesIO()
    _CanonicalPickler(data, 2).dump(value)
    return data.getvalue()


def _lasting_name(value: Any) -> str:
    """The name of a class or function with its module; a script goes by its name as a module."""
    module = value.__module__ or ""
    if _module_name(module) == "__main__":
        path, name = _script()
        module = name or _name_in_package(path)
    return f"{module}.{value.__qualname__}"


@functools.cache
def _name_in_package(path: str) -> str:
    """The name by which a script's file is imported, with the packages that it lies in."""
    file = pathlib.Path(path)
    in_package = itertools.takewhile(lambda x: (x / "__init__.py").is_file(), file.parents)
    return ".".join(reversed([file.stem, *(folder.name for folder in in_package)]))


class _CanonicalPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> str | bytes | None:
        """What replaces a set, whose order differs by process, a class or a function; else None."""
        if isinstance(value, (type, types.FunctionType)):
            return _lasting_name(value)
        return _canonical(value) if type(value) in (set, frozenset) else None


def _of_job(name: str, *arguments: Any) -> Any:
    """What a placeholder stands for in this execution; called as the arguments are unpickled."""
    execution = _running_execution()
    found = getattr(execution, name)(*arguments)
    execution.results.append(found)
    return found


def _preview(value: Any) -> str:
    kind = type(value)
    if kind in (type(None), bool, int, float) or (kind is str and len(value) < _SHORT.maxstring):
        return _shown(value, _PREVIEW)  # reprlib takes far longer
    return _shown(value, _PREVIEW, lambda x: _storable(_SHORT.repr(x)))


class _ShortRepr(reprlib.Repr):
    def repr_bytes(self, x: bytes, level: int) -> str:  # else its whole repr would be made
        return repr(x) if len(x) < self.maxother else f"{x[:40]!r}..."

    repr_bytearray = repr_bytes


_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


# --- Worker: everything here runs where a task runs; finding the task -----------------------------

_INLINE = 16 * 1024  # bytes of a value, or of output, up to which it travels in a message
_ERROR_LIMIT = 64 * 1024  # characters of a traceback that are kept
_REASON_LIMIT = 300  # characters of an exception's message that its reason keeps
_SUGGESTED = r"(\. .*)?"  # what Python may add to a reason: ". Did you mean: 'x'?", say
_MAP_LIMIT = 1024  # elements of a result that others expand over (Airflow's max_map_length)
_UNGUARDED = 78  # exit code of a worker whose script calls run() as it is imported
_WORKER_MARK = "liteflow-worker-"  # the names of worker processes begin with it

_own_identity = _file_identity(__file__)  # when this module was imported
_environ = os.environ  # kept, because a task may replace os.environ
_is_forked = False  # whether this is a worker, forked with all that the scheduler had in memory
# Tasks to find: task id, name of the function or class, whether that name alone will do.
_References = Sequence[tuple[str, str, bool]]


class _WorkerRun:
    """A run as a worker knows it, by `info`, the plain data that `_Start._info` gives."""

    def __init__(self, info: dict[str, Any], dag: Any = None) -> None:
        self.info, self.dag = info, dag
        self._previous: Any = False  # False: not looked up yet
        self._tasks: dict[str, BaseOperator] = {}
        self._resolve = functools.cache(_resolve)  # many tasks may have the same function

    def import_dag(self) -> None:
        """Import the module that builds the DAG, if one does. Raises what importing raises."""
        module, dag_id, number = self.info["key"]
        # multiprocessing imports `__main__` itself, and what is forked has what the scheduler had.
        is_here = module == "__main__" or (_is_forked and module in sys.modules)
        if module and not is_here:  # "": no module's import built the DAG
            path, file = self.info["module_path"], self.info["fileloc"]
            if path is None and file and file.endswith(".py") and os.access(file, os.F_OK):
                path = file  # if that is gone, its functions may still be found by name
            _import(module, path)
        found = _built.get((module, dag_id, number))
        if found is None or _is_inherited(module, found.fileloc, found._line):
            found = Dag(dag_id)  # no import builds it: an empty one stands in, for this run alone
        self.dag = found

    @functools.cached_property
    def edited(self) -> str | None:
        """A message if this process has imported another version of the DAG's file than the
        scheduler, because the file was edited in between; else None."""
        path, identity = self.info["fileloc"], self.info["identity"]
        own = identity and (self.dag._identity or _file_identity(path))
        if (_is_forked and self.info["module_path"]) or own in (identity, None):
            return None
        return f"{path} was edited: this worker has another version than the program that runs it"

    def previous_success(self) -> DagRun | None:
        """The successful run of the DAG with the latest earlier date; None if there is none, or no
        database to look into. It is looked up once."""
        path, when = self.info["db_path"], self.info["logical_date"]
        if self._previous is False:
            which = {"dag_id": self.info["dag_id"], "state": "success", "dated_before": when}
            with contextlib.suppress(DatabaseError):  # few tasks use it: the others must not fail
                row = _read(path, _find_run, "logical_date", **which) if path and when else None
                self._previous = row and DagRun(row, path)
        return self._previous or None

    def restore(self) -> None:
        """Give the process the environment, time zone and directory that run() was called in."""
        os.environ = _environ  # noqa: B003 - the very object
        now, wanted = vars(os.environ)["_data"], self.info["environ"]
        if now != wanted:  # equal variables are left alone: one may have a name that can't be set
            for name in now.keys() - wanted:
                del os.environb[name]
            os.environb.update(wanted.items() - now.items())
            time.tzset()  # a task that has set another TZ may have called it
        with contextlib.suppress(OSError):  # somebody may have removed the directory
            os.chdir(self.info["cwd"])

    def find(self, task_id: str, function: str, settings: _Settings) -> BaseOperator:
        """The task of this id in the DAG. If the import has built none and there are `settings`, it
        is made of them and of the `function`, or class, of this name. Raises UnreachableTask."""
        if task_id in self._tasks:
            return self._tasks[task_id]
        task: Any = self._in_dag(task_id, function)
        if task is None:
            named = self._resolve(function)
            if named is None or settings is None:
                raise UnreachableTask(f"task {task_id!r} is not here: no {function} is found")
            (kind, own), of_dag = map(_load, settings)
            is_class = isinstance(named, _OperatorType)
            made_of: Any = named if is_class else _decorated(kind) if kind else _FunctionOperator
            task = object.__new__(made_of)
            own |= {} if is_class else {"python_callable": named}
            empty = {name: make() for name, make in _OFTEN_EMPTY.items()}
            vars(task).update(empty | own, task_id=task_id, dag=self.dag)
            vars(self.dag).update(of_dag)
        return self._tasks.setdefault(task_id, task)

    def _in_dag(self, task_id: str, function: str) -> BaseOperator | None:
        task: BaseOperator | None = self.dag.task_dict.get(task_id)
        # A DAG that the import built another way may mean another function by this task id.
        return None if task is None or _full_name(_function_of(task)) != function else task

    def find_all(self, references: _References) -> tuple[Any, ...]:
        """Ids of the tasks that can't be found here, and of those found by function name alone."""
        unbuilt = [task for task in references if self._in_dag(*task[:2]) is None]
        named = {task_id for task_id, name, by_name in unbuilt if by_name and self._resolve(name)}
        return [task_id for task_id, *_ in unbuilt if task_id not in named], named


def _function_of(task: BaseOperator) -> Any:
    return task.python_callable if isinstance(task, _FunctionOperator) else type(task)


def _full_name(function: Any) -> str:
    """`module:qualname` of a function or class: the same in every process."""
    module = _module_name(getattr(function, "__module__", None) or "")
    return f"{module}:{getattr(function, '__qualname__', '?')}"


def _import(module: str, path: str | None) -> None:
    """Import the module as the scheduler has it: by its name, or else from its file."""
    spec = None
    with contextlib.suppress(ImportError, ValueError):  # ValueError: it is loaded without a spec
        spec = importlib.util.find_spec(module)
    elsewhere = path is not None and not os.access(path, os.F_OK)  # a path of another machine
    origin, wanted = (p and os.path.realpath(p) for p in (spec and spec.origin, path))
    if spec is not None and (elsewhere or origin == wanted):
        importlib.import_module(module)
    elif elsewhere:
        raise ImportError(f"there is no module {module!r}, nor {path}, where the tasks run")
    elif path is not None:
        spec = importlib.util.spec_from_file_location(module, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} can't be imported as a module")
        sys.modules[module] = made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)


def _name_as_main(owner: Any) -> None:
    """Rename the module of the functions and classes of `owner`, the script or a class of it, from
    `__mp_main__` to `__main__`. Then joblib, Spark and their like pickle them whole for processes
    of their own, which could not import `__mp_main__`."""
    for value in [*vars(owner).values()]:
        value = value.__func__ if type(value) in (classmethod, staticmethod) else value
        kind = type(value)  # unlike isinstance(), that does not look into a proxy
        if issubclass(kind, (type, types.FunctionType)) or kind.__name__ == "TypeVar":
            with contextlib.suppress(Exception):  # a metaclass is the user's code
                if value.__module__ == "__mp_main__":
                    value.__module__ = "__main__"
                    _name_as_main(value)


def _resolve(function: str) -> Callable[..., Any] | None:
    """The function or class of this `module:qualname`, without what `@task` made of it; or None."""
    module, _, name = function.partition(":")
    try:
        found: Any = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):  # ValueError: a method without a module
        return None
    if isinstance(found, _TaskFunction):
        found = found.function
    own = vars(found).values() if isinstance(found, type) else ()  # a class has no code itself
    code = next((x.__code__ for x in (found, *own) if isinstance(x, types.FunctionType)), None)
    where = getattr(code, "co_filename", None), getattr(code, "co_firstlineno", 0)
    return found if callable(found) and not _is_inherited(module, *where) else None


def _is_inherited(module: str, path: str | None, line: int) -> bool:
    """Whether this worker has something, defined at this line, only because it was forked: a worker
    that imports the module would not have it (it stands below the main guard, say)."""
    absent = module not in sys.modules
    return _is_forked and (absent or (module == "__main__" and _is_below_guard(path or "", line)))


def _is_below_guard(path: str, line: int) -> bool:
    """Whether a line of a script runs only if the script is `__main__`: the last statement above it
    that begins at the margin is like `if __name__ == "__main__":`."""
    path = path if os.path.isfile(path) else os.devnull  # reading a pipe again may block
    found = _guarded_lines(path, _file_identity(path))
    return found[min(line, len(found) - 1)]


@functools.lru_cache(1)
def _guarded_lines(path: str, identity: object) -> list[bool]:
    """For line 0 and each line of a file: whether a main guard is above. Cached by `identity`."""
    found = [False]
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        # For Python a form feed ends no line, and is no indentation.
        for text in file.read().replace("\f", "").split("\n"):
            is_margin = text[:1].strip() and text[0] not in "#)]}\"'"
            found.append(text.startswith("if ") and "__name__" in text if is_margin else found[-1])
    return found


# --- Worker: one attempt --------------------------------------------------------------------------


# The pickled settings of a task that is found by its function's name alone, and those of its DAG.
_Settings = tuple[bytes, bytes] | None
_running: contextvars.ContextVar[_Execution] = contextvars.ContextVar("liteflow_running")
_here: list[_Execution] = []  # what runs in the main thread, the innermost last
# The instruction that suspends a generator, up to Python 3.12. Importing `opcode` may fail, because
# the task has used up all file descriptors, or has become a user who may not read the file.
_YIELD_VALUE = 86 if sys.version_info < (3, 12) else 150


class _Job(_NamedTuple):
    """An attempt on its way to whoever runs it; as a plain tuple in messages."""

    task_id: str
    function: str  # see _full_name
    map_index: int
    try_number: int
    max_tries: int
    call: bytes  # pickled arguments
    settings: _Settings
    # (map_index, pickle) of XComs by (task_id, key); None in place of a large pickle.
    inputs: Mapping[tuple[str, str], Sequence[tuple[int, bytes | None]]]
    timeout: float | None  # seconds
    holds: bool = False  # the worker waits afterwards, because callbacks may be due
    feeds: bool = False  # others expand over its result
    elements: Sequence[tuple[str | None, tuple[Any, ...]]] = ()  # what it is expanded over
    in_group: bool = False  # not the task, but its group, is expanded over them
    pokes: int = 0  # how many pokes of a sensor came before
    waited: float = 0.0  # seconds since the first poke


class _Outcome(_NamedTuple):
    """How an attempt ended, on its way back; as a plain tuple in messages."""

    status: str  # see _Plan.finish
    error: str | None
    xcoms: Sequence[_XComRow] = ()
    items: Sequence[_ItemRow] = ()  # elements of a result that others expand over
    note: Mapping[str, Any] = {}  # what the plan must know of the result
    start: float | None = None  # by time.time()
    took: float = 0.0  # seconds
    until: float = 0.0  # when it ended, by monotonic()
    terminated: bool = False  # it was told to end
    spoilt: str | None = None  # why its worker must not get another job
    held: bool = False  # its worker waits, for callbacks or to be let go
    log_end: int = 0  # where its output ends in its worker's log
    output: bytes | None = None  # None: it is too long, and is read from the log
    unasked: bool = False  # somebody other than the runner told it to end


class _Execution:
    """The attempt that runs here now."""

    is_over = False  # its outcome was reported, and only callbacks are left

    def __init__(self, run: _WorkerRun, job: _Job) -> None:
        self.run, self.job = run, job
        self.task_id, self.map_index = job.task_id, job.map_index
        self.task = run.find(job.task_id, job.function, job.settings)
        self.pid = os.getpid()
        self.variables = contextvars.copy_context()  # what the task sets must not reach the next
        self.pushed: dict[str, _XComRow] = {}
        self.exception: BaseException | None = None
        self.started, self.clock = time.time(), _monotonic()
        self._context: Context | None = None  # once it is asked for
        self._values: dict[tuple[str, str], Any] = {}
        self.results: list[Any] = []  # values of placeholders: never rendered as templates
        self.group_values: dict[str, Any] = {}  # elements of the mapped group's arguments
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # see `arguments`

    def forget_failure(self) -> None:
        """Release the exception and its frames, which hold each other. Else all that a failed task
        had in memory would stay until Python collects cycles, and its retries' memory beside it."""
        if self.exception is None:
            return
        for frame, _ in traceback.walk_tb(self.exception.__traceback__):
            # Up to Python 3.12, clearing the frame of a suspended generator or coroutine ends it,
            # though it may serve others (it only passed the exception on). One at a yield is left.
            if sys.version_info >= (3, 13) or frame.f_code.co_code[frame.f_lasti] != _YIELD_VALUE:
                with contextlib.suppress(RuntimeError):  # it runs, or is suspended
                    frame.clear()
        self.exception = self._context = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The task's arguments, every result in them replaced by its value."""
        mapped: dict[str, Any] = {}
        for name, element in self.job.elements:
            value = self.element(element)
            given = value if name is None else {name: value}
            if not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
                raise TypeError(f"expand_kwargs() takes dicts with str keys, found {_shown(value)}")
            mapped |= given
            if element[0] != "constant":
                self.results += given.values()
        if self.job.in_group:
            self.group_values, mapped = mapped, {}
        args, kwargs = ((), {}) if self.job.call == _NO_CALL.data else self.loaded(self.job.call)
        if twice := mapped.keys() & {*kwargs, *(self.task._in_partial or ())}:
            raise TypeError(f"task {self.task_id!r}: {min(twice)!r} is also in partial()")
        self.given = args, kwargs | mapped
        return self.given

    def element(self, source: tuple[Any, ...]) -> Any:
        """An element that the task is expanded over; `source` is the plain data of `_element`."""
        match source:
            case "constant" | "value", data, *whose:
                return self.loaded(data, *whose)
            case "tuple", parts:
                return tuple(map(self.element, parts))
            case "gone", n:
                raise LookupError(f"it is mapped over element {n}, which is gone: resume the run")
            case "map", n, inner:
                mapping: Any = self.task._mapping
                return mapping.functions[n](self.element(inner))
            case "xcom", task_id, i:
                [(_, data)] = self.xcoms(task_id, "return_value", i)
                return self.loaded(data, task_id)
        _, task_id, i = source  # "item", of a result that is a list, tuple or dict
        # Without a database, the scheduler has looked for the item before it sent the job.
        has_database = self.run.info["db_path"] is not None
        if has_database and (data := self._look(_select_item, task_id, item=i)) is not None:
            return self.loaded(data, task_id)
        # No task expanded over the result when it was stored: so only the whole is there.
        whole = self.loaded(dict(self.xcoms(task_id, "return_value"))[-1], task_id)
        return (list(whole.items()) if isinstance(whole, dict) else whole)[i]

    def elements(self, how: str, by: Any, *sources: Any) -> list[Any]:
        """The list that `map`, `zip` or `concat` (`how`) makes; `by`: a function or fillvalue."""
        results = [getattr(self, look)(*arguments) for look, *arguments in sources]
        results = [() if x is None else x for x in results]  # no `or`: an array is not true
        results = [list(x.items()) if isinstance(x, dict) else x for x in results]
        if how != "zip":
            function = self.task._map_functions[by] if isinstance(by, int) else by
            chained = itertools.chain.from_iterable(results)
            return list(chained if function is None else map(function, chained))
        longest = itertools.zip_longest(*results, fillvalue=by)
        return list(zip(*results, strict=False) if by is ... else longest)

    def group_value(self, name: str, *default: Any) -> Any:
        """The element of an argument of the mapped group."""
        if name not in self.group_values and not default:
            why = "outside of its group, or not in what expand_kwargs() got"
            raise TypeError(f"the group's argument {name!r} is {why}")
        return self.group_values.get(name, *default)

    def param(self, name: str, *default: Any) -> Any:
        """The value of an argument of a @dag function, or of `dag.param`."""
        params = self.run.info["params"]  # conf has been merged in
        if name not in params and not default:
            raise AirflowException(f"param {name!r} has no value: set a default, or pass conf")
        return _plain_copy(params[name]) if name in params else default[0]

    def loaded(self, data: bytes, whose: str = "") -> Any:
        return _load(data, self.run.info["fileloc"], whose)

    def value(self, task_id: str, key: str, absent_is_none: bool) -> Any:
        """The value of an upstream's XCom, the same object each time within one attempt."""
        if (task_id, key) not in self._values:
            found = self.job.inputs.get((task_id, key))
            if not found and absent_is_none:
                return None
            if not found:
                raise XComNotFound(
                    f"task {task_id!r} stored no XCom {key!r}; is it a key of a dict that it "
                    "returns? then annotate it `-> dict[str, ...]`, or set multiple_outputs=True"
                )
            map_index, data = found[0]
            if data is None:  # too large to travel with the job
                [(_, data)] = self.xcoms(task_id, key, map_index)
            self._values[task_id, key] = self.loaded(data, task_id)
        return self._values[task_id, key]

    def sequence(self, task_id: str, key: str, plain: bool) -> Any:
        """The values that a mapped task's instances stored, in order. `plain` gives them as Airflow
        gives those of a task in a mapped group: None, the only value, or a list."""
        load = functools.partial(_load, script=self.run.info["fileloc"], whose=task_id)
        found = _Results([data for _, data in self.xcoms(task_id, key)], load)
        if plain:
            return list(found) if len(found) > 1 else next(iter(found), None)
        return found

    def xcoms(self, task_id: str, key: str, index: int | None = None) -> Sequence[tuple[int, Any]]:
        """(map_index, pickle) of a task's XComs of one key, at one index or all, own pushes too."""
        if task_id == self.task_id and key in self.pushed:
            return [(self.map_index, bytes(self.pushed[key][-1]))]
        if task_id == self.task_id and self.map_index < 0:
            return []
        if self.run.info["db_path"] is None and task_id in self.task._upstream:
            inputs = self.job.inputs.get((task_id, key), ())  # they came with the job
            if inputs is not None:
                return [x for x in inputs if index in (None, x[0])]
        found = self._look(_select_values, task_id, key=key, map_index=index)
        return [(i, data or b"") for _, i, _, data in found]

    def _look(self, select: Callable[..., T], task_id: str, **which: Any) -> T:
        """What a look finds of a task of this run. Raises AirflowException without a database."""
        path, row = self.run.info["db_path"], self.run.info["run_row"]
        if path is None:
            why = "a foreign executor's workers get only those of direct upstream tasks, and only "
            why += "their own element of what they are expanded over"
            raise AirflowException(f"the values of {task_id!r} can't be read here: {why}")
        return _read(path, select, row, most=_ROW_LIMIT, task_id=task_id, **which)

    @property
    def context(self) -> Context:
        """The task's context: a dict with Airflow's keys."""
        # No cached_property: up to Python 3.11 it has a lock, which a forked worker may find held.
        if self._context is not None:
            return self._context
        info, task = self.run.info, self.task
        run, ti, previous = _dag_run_of(info), _running_instance(self), self.run.previous_success()
        own = _resolved(f"task {task.task_id!r}: ", task.params, info["conf"])
        when = run.logical_date or _utcnow()  # a run has one, unless its row was tampered with
        self._context = {
            **dict.fromkeys(_NOT_HERE),
            **{key: getattr(previous, name, None) for key, name in _OF_BEFORE.items()},
            **{name: {} for name in ("inlet_events", "outlet_events", "triggering_asset_events")},
            **{name: [] for name in ("inlets", "outlets")},
            **{name: text(when) for name, text in _FILTERS.items()},
            **dict.fromkeys(("data_interval_end", "data_interval_start", "logical_date"), when),
            "dag": task.dag,
            "dag_run": run,
            "macros": _Macros(),
            "params": _plain_copy({**info["params"], **own, **info["conf"]}),
            "run_id": info["run_id"],
            "task": task,
            "task_instance": ti,
            "task_instance_key_str": f"{task.dag_id}__{task.task_id}__{when:%Y%m%d}",
            "task_reschedule_count": self.job.pokes,
            "ti": ti,
            "var": {"value": _Variables(), "json": _Variables(_json=True)},
        }
        return self._context


class _Results(_Record, Sequence[Any]):
    """The results of a mapped task, as a reduce gets them: by map_index, each loaded when taken.

    It has `len`, iteration, indexes, slices and `==` with a list; stored, it becomes a list.
    """

    _data: Sequence[bytes]
    _load: Callable[[bytes], Any]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._load(data) for data in self._data[i]]
        return self._load(self._data[i])

    def __iter__(self) -> Iterator[Any]:
        return (self._load(data) for data in self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple, _Results)):
            return NotImplemented
        return list(self) == list(other)

    def __repr__(self) -> str:
        return f"<the results of {len(self)} instances>"

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _running_execution() -> _Execution:
    # A thread that a task starts has none of its context variables: `_here` stands in for them.
    execution = _running.get(_here[-1] if _here else None)
    if execution is None:
        raise RuntimeError("there is no running task: this is for use inside one")
    return execution


def get_current_context() -> Context:
    """The context of the task that runs here. Raises RuntimeError outside a task."""
    return _running_execution().context


class _Variables(_Record):
    """`var.value.NAME`, `var.value.get(NAME, default)`, and the same with `var.json`."""

    _json: bool = False

    def get(self, key: str, default: Any = ...) -> Any:
        return Variable.get(key, default, self._json)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):  # code that copies or prints a context asks for these
            raise AttributeError(key)
        return self.get(key)


class _Connections(_Variables):
    """`conn` in a template: any connection is refused, by its name."""

    def get(self, key: str, default: Any = ...) -> Any:
        remedy = "read what it would hold from the environment, say as var.value.NAME"
        raise AirflowException(f"there is no connection {key!r}: liteflow has none; {remedy}")


class _Macros:
    """`macros` in a context: Airflow's helpers for dates, and modules (two if installed)."""

    datetime, timedelta = _datetime.datetime, _datetime.timedelta

    def __getattr__(self, name: str) -> Any:
        if name not in ("dateutil", "json", "random", "time", "uuid", "yaml"):
            raise AttributeError(name)
        module = __import__(name)
        if name == "dateutil":  # up to 2.8 it does not import its own modules
            for part in ("parser", "relativedelta"):
                importlib.import_module(f"dateutil.{part}")
        return module.random if name == "random" else module  # as in Airflow

    @staticmethod
    def ds_add(ds: str, days: int) -> str:
        """The day that is so many days later."""
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


def _run_job(execution: _Execution, guard: contextlib.AbstractContextManager[None]) -> _Outcome:
    """Run one attempt. Returns how it ended, as plain data; raises nothing, whatever the task does.
    The context manager `guard` surrounds the task's own code, and may cut it off."""
    note: dict[str, Any] = {}
    error: str | None = None
    try:
        try:
            result = execution.variables.run(_as_running, execution, _run_hooked, execution, guard)
            status, note = "success", _store_result(execution, result)
        except AirflowRescheduleException as pause:  # a user's subclass may have no date
            wait = (pause.reschedule_date - _utcnow()).total_seconds()
            status, note = "reschedule", {"wait": wait}
    except AirflowSkipException as skip:
        error = _shown(skip, _ERROR_LIMIT, _brief)
        status, execution.exception = "skipped", skip
    except BaseException as failure:  # sys.exit, KeyboardInterrupt, a user's own: all fail
        frames = traceback.walk_tb(failure.__traceback__)
        in_pdb = any(frame.f_globals.get("__name__") == "bdb" for frame, _ in frames)
        quits = type(failure).__name__ in ("BdbQuit", "SystemExit")  # pdb without input does
        if quits and in_pdb and sys.breakpointhook is _no_breakpoint:
            failure = RuntimeError(f"pdb in {_NO_TERMINAL}").with_traceback(failure.__traceback__)
        fatal = isinstance(failure, (AirflowFailException, AirflowSensorTimeout))
        status, execution.exception = "fatal" if fatal else "failed", failure
    if error is None and execution.exception is not None:
        # Not in an `except` block: Python 3.11 would take n * n steps for a chain of n exceptions.
        error = _traceback(execution.exception)
    _end_if_child(execution, execution.exception)
    if execution.map_index >= 0 and execution.task.map_index_template is not None:
        note |= _as_running(execution, _name_of, execution)
    xcoms, items = [*execution.pushed.values()], note.pop("items", ())
    began, until = execution.clock, _monotonic()
    return _Outcome(status, error, xcoms, items, note, execution.started, until - began, until)


def _name_of(execution: _Execution) -> dict[str, str]:
    """The `name` that `map_index_template` gives a mapped instance; none without Jinja."""
    try:  # as in Airflow, a template may use the arguments of a function by their names
        known = {**getattr(execution.context["task"], "op_kwargs", {}), **execution.context}
        name = str(_rendered(execution.task.map_index_template, known))
        return {"name": _storable(_shown(name, _PREVIEW, str))}
    except Exception as error:  # a template is the user's code
        if not (isinstance(error, ImportError) and error.name == "jinja2"):
            _print_as_task(f"map_index_template failed: {_brief(error)}")
        return {}


def _as_running(execution: _Execution, function: Callable[..., T], *arguments: Any) -> T:
    """Call the function so that `_running_execution` finds this execution meanwhile."""
    token = _running.set(execution)
    here = _here if threading.current_thread() is threading.main_thread() else []
    here.append(execution)
    try:
        return function(*arguments)
    finally:
        here.pop()
        _running.reset(token)


def _run_hooked(execution: _Execution, guard: contextlib.AbstractContextManager[None]) -> Any:
    """Do the task's work, unless `run_if` or `skip_if` forbids it, between `pre_execute` and
    `post_execute`, which an operator's class may define. Returns its result."""
    with guard:
        args, kwargs = execution.arguments()  # first: conditions may read them, as in Airflow
        for condition, wanted, message in execution.task._conditions:
            found = condition(execution.context)
            if isinstance(found, tuple):
                found, message = found[0], found[1] or message
            if bool(found) is not wanted:
                raise AirflowSkipException(message or "skipped by its condition")
        task, work = execution.task._ready(args, kwargs, execution)
        _call_hook(execution, task.pre_execute)
        if not execution.job.pokes:
            _call_back(execution, task, "on_execute_callback")
        result = work()
        _call_hook(execution, task.post_execute, result)
        return result


def _call_hook(execution: _Execution, hook: Any, *result: Any) -> None:
    if getattr(hook, "__func__", None) is not _no_hook:  # to make a context is slow
        _awaited(hook(execution.context, *result))


def _call_back(execution: _Execution, owner: Any, name: str) -> None:
    """Call the callbacks `name` of `owner`, a task or DAG, each even if the one before failed."""
    callbacks = getattr(owner, name)
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback is None:
            continue
        try:
            _as_running(execution, _called, callback, (execution.context,), {}, {})
        except _FROM_OUTSIDE:
            raise
        except BaseException as error:  # a user's callback may raise anything
            _end_if_child(execution, error)
            is_dag, text = isinstance(owner, Dag), _traceback(error)
            whose = f"DAG {owner.dag_id!r}" if is_dag else f"task {execution.task_id!r}"
            said = _with_place(f"{name} of {whose} failed: {_last_line(text)}", text)
            if is_dag and execution.context.get("reason") == _DIED:  # called for another run
                said += f", called for run {execution.run.info['run_id']!r}: {_DIED}"
            _print_as_task("\n    | ".join([said, *text.split("\n")]))
        _end_if_child(execution, None)


def _print_as_task(text: str) -> None:
    """Print to where tasks print, or to the original stderr if that fails; raise nothing."""
    for stream in (sys.stderr, sys.__stderr__):
        with contextlib.suppress(Exception):  # the task has closed it, or the disk is full
            print(f"liteflow: {text}", file=stream)
            break


def _end_if_child(execution: _Execution, error: BaseException | None) -> None:
    """End this process if the task's code has forked it and then let it return to liteflow: it is
    no worker. It ends as it would elsewhere, with its traceback, or with its exit code."""
    if os.getpid() == execution.pid:
        return
    code = error.code if isinstance(error, SystemExit) else error
    try:
        if isinstance(code, BaseException):
            traceback.print_exception(code)
        elif code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


def _call_due(run: _WorkerRun, last: Any, job: Any, name: Any, reason: Any, facts: Any) -> None:
    """Call the callbacks `name` (several joined by `+`, or None) of the `last` attempt, which ended
    here, or of a `job`, which ended elsewhere or stands for its DAG. `facts`: how it ended; for a
    DAG, `info` of its run. `reason`: what an exception would say, or why the DAG's run ended."""
    if job is not None:
        last = _Execution(_WorkerRun({**run.info, **facts}, run.dag), _Job(*job))
    if last is None:
        return
    state, started, ended = facts.get("last", (None, None, None))
    for callback in name.split("+") if name else ():
        context, last.is_over = last.context, True
        owner, ti = context["task"], context["ti"]
        if started is not None:  # else it did not run, or stands for another run
            ti.start_date, ti.end_date = _moment(started), _moment(ended)
        if callback.startswith("dag_"):
            owner, ti.state, context["reason"] = last.task.dag, _TASK_STATES.get(state), reason
            success = callback == "dag_on_success_callback"
            context["dag_run"].state = DagRunState.SUCCESS if success else DagRunState.FAILED
        elif last.exception is None and reason is not None:
            last.exception = AirflowException(reason)
        ti.state = {name: became for became, name in _CALLBACK_OF.items()}.get(callback, ti.state)
        context["exception"] = None if callback == "on_skipped_callback" else last.exception
        last.variables.run(_call_back, last, owner, callback.removeprefix("dag_"))
    last.forget_failure()


def _store_result(execution: _Execution, result: Any) -> dict[str, Any]:
    """Turn the result into XComs. Returns what the plan must know of it, as plain data. Raises
    TypeError or AirflowException if it can't be stored."""
    note: dict[str, Any] = {}
    if execution.task._flow == "short_circuit":
        note["go_on"] = bool(result)
    elif execution.task._flow == "branch":
        several = isinstance(result, Iterable) and not isinstance(result, str)
        chosen = [*result] if several else [result]
        if result is not None and not all(isinstance(x, str) for x in chosen):
            must = "a branch must return a task id, a list of them, or None"
            raise AirflowException(f"{must}, found {_shown(result)}")
        note["chosen"] = None if result is None else [str.__str__(x) for x in chosen]
    if execution.job.feeds:
        note["items"] = _items_of(execution, result)
    if result is None or not execution.task.do_xcom_push:
        return note
    if execution.task.multiple_outputs:
        whence = "set, or by its annotation; False keeps a dict whole"
        what = f"task {execution.task_id!r} has multiple_outputs ({whence}): what it returns"
        for key, value in _string_keyed(what, result).items():
            _push(execution, key, value, f"returned for {key!r} a")
    _push(execution, "return_value", result, "returned")
    _, _, _, length, _ = execution.pushed["return_value"]
    return {**note, "stored": True, "length": length}


def _items_of(execution: _Execution, result: Any) -> list[_ItemRow]:
    """(preview, pickle) of the elements of a result that others expand over."""
    kind: type[AirflowException] = XComForMappingNotPushed
    if not execution.task.do_xcom_push:
        found = "has do_xcom_push=False"
    elif result is None:
        found = "returned None"
    elif not _is_mappable(result):
        what = f"a {type(result).__name__}, no list, tuple or dict: {_shown(result)}"
        kind, found = UnmappableXComTypePushed, f"returned {what}"
    elif len(result) > _MAP_LIMIT:
        most = f"at most {_MAP_LIMIT} are allowed, each of which may be a list of many"
        kind, found = UnmappableXComLengthPushed, f"returned {len(result)} elements: {most}"
    else:
        elements = result.items() if isinstance(result, dict) else result
        return [(_preview(x), _pickled(x, "returned, in a list, a")) for x in elements]
    raise kind(f"others expand over the result of task {execution.task_id!r}, which {found}")


def _is_mappable(value: Any) -> bool:
    """Whether others can be expanded over it (Airflow's rule)."""
    whole = (str, bytes, bytearray, int, float)  # numbers only because asking the ABC is slower
    return not isinstance(value, whole) and isinstance(value, (Sequence, dict))


def _push(execution: _Execution, key: str, value: Any, said: str) -> None:
    try:
        key = str(key.encode().decode())  # a plain str, and no surrogates in it
    except UnicodeError:
        raise TypeError(f"the XCom key {_shown(key)} is no text: it can't be stored") from None
    if len(key) > _TEXT_LIMIT:
        raise TypeError(f"the XCom key {_shown(key)} has {len(key):,} characters: is it the value?")
    value = list(value) if isinstance(value, _Results) else value  # as readers will get it
    data = _pickled(value, said)
    if len(data) > _VALUE_LIMIT:
        much = f"{len(data):,} bytes pickled, and the database holds {_VALUE_LIMIT:,}"
        raise AirflowFailException(f"{key!r} has {much}: write it to a file and return the path")
    length = len(value) if _is_mappable(value) else None
    execution.pushed[key] = key, _storable(type(value).__qualname__), _preview(value), length, data


def _pickled(value: Any, said: str) -> bytes | _Pieces:
    try:
        return _dump_in_pieces(value)
    except _FROM_OUTSIDE:
        raise
    except BaseException as error:  # pickling runs the value's own code: it may even sys.exit
        remedy = "; return its items as a list" if hasattr(value, "__next__") else ""
        what = f"{said} {type(value).__name__}, which cannot be pickled"
        trouble = TypeError(f"{what}: {_brief(error)}{remedy}")
        trouble.__notes__ = getattr(error, "__notes__", [])  # Python 3.14 notes where in the value
        raise trouble from None


# --- Worker: errors as text -----------------------------------------------------------------------


def _brief(error: BaseException) -> str:
    """The type and message of an error in one line, as tables show only the last line of a failure.
    Of a traceback that the message quotes (another process's), the last line and the place."""
    text = _shown(error, sys.maxsize, _storable)
    what, quoted, _ = text.partition("\nTraceback (most recent call last):\n")
    text = f"{what} {_with_place(_last_line(text), text)}" if quoted else text
    text = re.sub(r"\n+", " ", text)
    return ": ".join(filter(None, (type(error).__name__, text)))


def _traceback(error: BaseException) -> str:
    """The traceback as text, without liteflow's own frames; its last line is the reason."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    shown = functools.partial(traceback.format_exception, type(error), error, frames)
    try:
        try:
            text = "".join(shown())
        except Warning:  # by -W error: Python 3.15 warns of a module without a loader (__mp_main__)
            with warnings.catch_warnings(action="ignore"):
                text = "".join(shown())
    except BaseException as trouble:  # the exception's own code, or no file can be opened any more
        files = [(x.f_code.co_filename, n, x.f_code.co_name) for x, n in traceback.walk_tb(frames)]
        text = "Traceback (most recent call last):\n"
        text += "".join(f'  File "{file}", line {n}, in {name}\n' for file, n, name in files)
        text += f"{type(error).__name__} (it can't be shown whole: {type(trouble).__name__})\n"
    last, kind = text.rstrip("\n").rpartition("\n")[2], type(error)
    where = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    said = _shown(error, _REASON_LIMIT, lambda x: _storable(x).lstrip("\n").partition("\n")[0])
    reason = f"{where}{kind.__qualname__}: {said}".removesuffix(": ")
    if isinstance(error, SystemExit):
        text += f"called sys.exit({_shown(error.code)})\n"
    elif isinstance(error, SyntaxError) and reason.startswith(last):  # it also has the line
        text = text.removesuffix(f"{last}\n") + f"{reason}\n"
    elif not re.fullmatch(re.escape(reason) + _SUGGESTED, last):  # more lines, notes, a group
        text += f"{reason}\n"
    # A class of the script is shown as Python shows it: by its name alone.
    return _halves(_storable(text.rstrip("\n")).replace("__mp_main__.", ""), _ERROR_LIMIT)


def _halves(text: str, limit: int) -> str:
    """The text, without its middle if it is too long: a traceback's message stands at its end."""
    half = limit // 2
    cut = f"\n[... {len(text) - 2 * half:,} characters cut ...]\n"
    return text if len(text) <= limit else f"{text[:half]}{cut}{text[-half:]}"


def _last_line(error: str | None) -> str:
    """The reason of a failure, short enough for a table."""
    return _shown((error or "").strip().rpartition("\n")[2], 200, str)


def _with_place(said: str, text: str) -> str:
    place = _place_of(text)
    return f"{said} ({place})" if place else said


def _split_traceback(error: str) -> tuple[str, str]:
    """A traceback up to the exception's own line, and what comes after that line: more of the
    message, notes, a group's members. The last line, `_traceback`'s reason, is in neither."""
    *lines, last = error.split("\n")
    own = re.escape(last) + _SUGGESTED
    at = len(lines)
    for i, line in enumerate(lines):
        if line.startswith(("The above exception was the", "During handling of the above")):
            at = len(lines)  # an earlier exception of the chain may say the same
        elif re.fullmatch(own, line.lstrip(" |")):
            at = i
    return "\n".join(lines[:at]), "\n".join(lines[at + 1 :])


def _place_of(error: str | None) -> str:
    """Where in the user's code a traceback ends: file, line, function, and the line itself."""
    before, _ = _split_traceback(error or "")
    places = {False: "", True: ""}  # the last in the user's code, and in foreign code
    frame = r'^[ |]*File "(.*)", line (\d+), in (.*)\n?(?![ |]*File ")[ |]*(.*)'
    for path, number, name, source in re.findall(frame, before, re.MULTILINE):
        if os.path.basename(path) == os.path.basename(__file__) or path.startswith("<frozen "):
            continue
        # Foreign is the code of libraries (of any Python), code without a file, and what was
        # compiled from Cython (pandas, pyarrow).
        is_foreign = bool(re.search(r"^<|/lib\d*/python[\d.]*t?/|\.p(yx|xi|xd)$", path))
        places[is_foreign] = f"{path}:{number}, in {name}: {source.rstrip()}".removesuffix(": ")
    return places[False] or places[True]


# --- Worker: messages -----------------------------------------------------------------------------

_MESSAGE_LIMIT = 64 * 1024  # bytes; a larger message is handed over as a file
_IN_MEMORY = 64 * 1024 * 1024  # bytes up to which this file is in memory, not on disk
_SOCKET_BUFFER = 256 * 1024  # bytes, on both ends, so that no message blocks its sender
_RECEIVED = _MESSAGE_LIMIT + 4096  # bytes; a smaller buffer would silently cut a message
_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 1 << 28)  # missing in conda's and uv's Pythons
_LINGER = 150e-6 if hasattr(os, "sched_yield") else 0.0  # seconds; see _linger
_CROWDED = 0.1  # seconds without lingering, once lingering has taken too long
_crowded_until = 0.0  # by monotonic()


@functools.cache
def _pulls() -> bool:
    """Whether workers pull jobs from a queue. The system must give each message whole to a single
    receiver, and wake only one of several that sleep; a sandbox or an emulated Linux may not."""
    with contextlib.suppress(AttributeError, OSError):
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with ours, theirs, select.epoll() as epoll:
            epoll.register(ours, select.EPOLLIN | _EXCLUSIVE)
            return True
    return False


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, which keep messages whole where the system can, or else are a stream."""
    ends = socket.socketpair(type=socket.SOCK_SEQPACKET if _pulls() else socket.SOCK_STREAM)
    for end in ends:
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, size, _SOCKET_BUFFER)
    return ends


def _nameless_file(size: int, folder: str | None = None) -> Any:
    """An open file that is gone once it is closed. It is in memory if its size allows that, because
    on disk it would wait for the database's checkpoint, and might find no room."""
    if size <= _IN_MEMORY:
        with contextlib.suppress(KeyError, OSError):  # not every system or Python has it
            return open(vars(os)["memfd_create"]("liteflow"), "w+b")
    return tempfile.TemporaryFile(dir=folder)


class _Wire:
    """One end of a socket pair: plain data in whole messages, each with at most one open file.

    A message is data and a list of bytes (values, which may be huge). On a stream its length comes
    first, and a large message goes as the name of a file, because macOS loses an open file that the
    sender closes before the receiver has it. The scheduler's ends never block. Streams never block
    as they receive, because gevent's sockets, which are streams here, ignore MSG_DONTWAIT.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.folder: str | None = None  # for messages that go as files
        self._whole = end.type != socket.SOCK_STREAM
        end.setblocking(self._whole)
        self._space = socket.CMSG_SPACE(4)  # for one descriptor
        self._flags = socket.MSG_DONTWAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        self._buffer = b""
        self._files: collections.deque[int] = collections.deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(
        self, data: tuple[Any, ...], values: Sequence[Any] = (), file: int | None = None
    ) -> None:
        """Send a message. Raises BlockingIOError if there is no room, or another OSError."""
        size = sum(map(len, values))
        packed = b"" if size > _MESSAGE_LIMIT else marshal.dumps((data, list(values)))
        if max(size, len(packed)) <= _MESSAGE_LIMIT:
            return self._send(packed, file)
        name: str | None = None  # of a file that the receiver opens; None: an open file is sent
        try:
            if self._whole:
                aside = _nameless_file(max(size, len(packed)), self.folder)
            else:
                number, name = tempfile.mkstemp(dir=self.folder)
                aside = open(number, "w+b")  # noqa: SIM115 - closed below
            with aside:
                marshal.dump((data, [len(value) for value in values]), aside)
                for value in values:
                    aside.writelines(_pieces_of(value))
                aside.flush()
                self._send(marshal.dumps(name), aside.fileno() if name is None else None)
        except OSError:
            if name is not None:
                os.unlink(name)
            raise

    def _send(self, packed: bytes, file: int | None) -> None:
        if not self._whole:
            packed = len(packed).to_bytes(4, "big") + packed
            self.socket.setblocking(True)  # or it may stop in the middle of the message
        if file is not None:
            socket.send_fds(self.socket, [packed], [file])
        else:
            self.socket.sendall(packed)
        if not self._whole:
            self.socket.setblocking(False)

    def receive(self) -> tuple[tuple[Any, ...], list[bytes]] | None:
        """The next message, or None if there is none now. Raises EOFError once the other end is
        closed; OSError; TypeError, ValueError or EOFError if a task wrote what is no message."""
        packed = self._next()
        if packed is None:
            return None
        message: tuple[tuple[Any, ...], list[bytes]] | str | None = marshal.loads(packed)
        if isinstance(message, tuple):
            return message
        # fspath() refuses a number, which open() would take for a descriptor, and close.
        with open(self.take_file() if message is None else os.fspath(message), "rb") as aside:
            if message is not None:
                os.unlink(message)
            aside.seek(0)  # the sender, which shares the offset, has left it at the end
            data, sizes = marshal.load(aside)
            return data, [aside.read(size) for size in sizes]

    def _next(self) -> bytes | None:
        while True:
            if self._buffer:  # only a stream fills it
                end = 4 + int.from_bytes(self._buffer[:4], "big")
                if end > _RECEIVED:
                    raise EOFError("no message of ours is so long")
                if end <= len(self._buffer):
                    packed, self._buffer = self._buffer[4:end], self._buffer[end:]
                    return packed
            try:
                data, extra, _, _ = self.socket.recvmsg(_RECEIVED, self._space, self._flags)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # the other end closed with unread data; its last messages still come
            for _, _, descriptors in extra:
                self._files.append(int.from_bytes(descriptors[:4], sys.byteorder))
            if not data:
                raise EOFError
            if self._whole:
                return data
            self._buffer += data

    def take_file(self) -> int:
        """The descriptor of the open file that came with a message; it is the caller's now."""
        if not self._files:  # the kernel drops it if the limit of open files is reached
            raise OSError("a message's file could not be opened: too many open files")
        found = self._files.popleft()
        os.set_inheritable(found, False)
        return found

    def close(self) -> None:
        while self._files:
            os.close(self._files.popleft())
        self.socket.close()


def _is_readable(descriptor: int, timeout: float) -> bool:
    poll = select.poll()  # `select.select` takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _linger(look: Callable[[], T]) -> T:
    """Return what `look` finds; call it again and again for a moment, yielding the CPU in between.
    Sleeping instead costs some 20 µs on either side for the waking, more than a quick job. But on a
    busy machine others may get the CPU for milliseconds at each yield (Linux 6.18)."""
    global _crowded_until
    now = _monotonic()
    until = now + _LINGER if now >= _crowded_until else now
    while not (found := look()) and _monotonic() < until:
        os.sched_yield()
    if (now := _monotonic()) > until + _LINGER:
        _crowded_until = now + _CROWDED
    return found


def _values_of(outcome: _Outcome) -> list[bytes | _Pieces]:
    return [value for *_, value in outcome.xcoms] + [value for _, value in outcome.items]


def _with_values(outcome: _Outcome, values: Iterable[bytes]) -> _Outcome:
    """The outcome with these `values` (of XComs, then of items), which travelled apart from it."""
    rest = iter(values)
    xcoms = [(*row[:-1], next(rest)) for row in outcome.xcoms]
    return outcome._replace(xcoms=xcoms, items=[(text, next(rest)) for text, _ in outcome.items])


# --- Worker: what tasks change and leave in a process ---------------------------------------------

_NO_TERMINAL = "a worker process, which has no terminal: run it by --task TASK, or dag.test()"


@functools.cache
def _let_c_print_lines() -> None:
    """Let C's stdout write line by line: as no terminal, it would wait until its buffer is full."""
    with contextlib.suppress(Exception):  # no ctypes, or another C library
        libc = ctypes.CDLL(None)
        out = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        libc.setvbuf(out, None, 1, 0)  # _IOLBF


def _own_loop() -> Any:
    """The object whose `_loop` is asyncio's current event loop of this thread; None if unknown."""
    policy = getattr(sys.modules.get("asyncio.events"), "_event_loop_policy", None)
    local = getattr(policy, "_local", None)
    return local if hasattr(local, "_loop") else None  # a library's policy may keep it elsewhere


def _figures() -> set[int]:
    """The numbers of pyplot's open figures, over which the next task would draw what it plots."""
    return {*getattr(sys.modules.get("matplotlib.pyplot"), "get_fignums", tuple)()}


def _remove_shared() -> None:
    """Remove what multiprocessing made in this worker, which will be killed: semaphores, which its
    resource tracker would report as leaked, and the folder of a forkserver's socket."""
    for finalizer in list(getattr(multiprocessing.util, "_finalizer_registry", {}).values()):
        callback = getattr(finalizer, "_callback", None)
        if getattr(callback, "__qualname__", "") in ("SemLock._cleanup", "_remove_temp_dir"):
            with contextlib.suppress(Exception):
                finalizer()


def _no_breakpoint(*args: object, **kwargs: object) -> None:
    if os.environ.get("PYTHONBREAKPOINT") != "0":  # 0 turns them off
        raise RuntimeError(f"breakpoint() in {_NO_TERMINAL}")


def _input(prompt: object = "", /) -> str:
    """Replaces the builtin: a notebook's version would ask the browser, and wait for ever."""
    print(prompt, end="", flush=True)
    if line := sys.stdin.readline():  # a task may have put something there
        return line.removesuffix("\n")
    raise EOFError(f"input() in {_NO_TERMINAL}")


def _has_more_threads(busy: int) -> bool:
    """Whether more than `busy` threads are busy, apart from those of progress bars: rich's is about
    to end, and tqdm's, which watches all bars, is told to end."""
    for thread in threading.enumerate():
        if type(thread).__module__ == "tqdm._monitor":
            thread.was_killed.set()  # type: ignore[attr-defined]
        if type(thread).__module__ in ("tqdm._monitor", "rich.live"):
            thread.join(timeout=0.1)
    pools = getattr(sys.modules.get("concurrent.futures.thread"), "_threads_queues", ())
    for _ in range(20 if pools else 1):
        time.sleep(0.001)  # lets a pool's thread begin, or end, what it was handed
        if _count_threads() <= busy:
            return False
    return True


def _count_threads() -> int:
    """The number of threads, without up to 256 idle ones of ThreadPoolExecutors: a library's pool
    (Dask's, say) stays for its next use, and does no harm to the next task. If each task leaves a
    pool of its own, the limit makes them count in the end."""
    frames = sys._current_frames().values()
    at = [(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames]
    idle = at.count(("concurrent.futures.thread", "_worker"))
    return threading.active_count() - min(idle, 256)


def _child_pids() -> set[int]:
    """The pids of living children; {0} if there are some and the system does not list them."""
    found: set[int] = set()
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, _bytes_of(path).split()))
    with contextlib.suppress(ChildProcessError):
        while not found:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                found.add(0)
    return found


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _ps(asked: str) -> str:
    """What `ps` prints, for systems without /proc (macOS)."""
    with os.popen(f"ps {asked} 2>/dev/null") as output:
        return output.read()


def _strays(worker: int, log: int) -> list[int]:
    """The pids of processes that left a worker's group, but are in its session or print to its log
    (a descriptor). On macOS only the session tells."""
    pids: list[str] = []
    with contextlib.suppress(OSError):  # no descriptor is left to look with
        pids = os.listdir("/proc") if os.path.exists("/proc/self") else _ps("-A -o pid=").split()
    strays = []
    for pid in map(int, filter(str.isdecimal, pids)):
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == worker:
                continue  # the caller signals the group: a second TERM would cut off the clean-up
            outputs = filter(os.path.exists, (f"/proc/{pid}/fd/1", f"/proc/{pid}/fd/2"))
            if os.getsid(pid) == worker or any(os.path.samefile(log, file) for file in outputs):
                strays.append(pid)
    return strays


def _signal_each(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            os.kill(pid, number)


def _resources(limited: Sequence[int]) -> tuple[list[Any], Any]:
    """The process's limits, user, priority and CPUs; what its ended children used, in sum."""
    limits: list[Any] = [*map(resource.getrlimit, limited), os.geteuid()]
    limits += os.getpriority(os.PRIO_PROCESS, 0), getattr(os, "sched_getaffinity", bool)(0)
    return limits, resource.getrusage(resource.RUSAGE_CHILDREN)


# --- Worker: the process --------------------------------------------------------------------------

_LOG_LIMIT = 1024 * 1024  # bytes at which a worker's log file is emptied, between two jobs
_BLINK = 2e-5  # seconds; what took less has used no library that keeps state, nor left a file open
_TAKING, _HEED = 0, 1  # indexes of the bytes that a worker shares with the scheduler: see _Worker
_BROKEN = 70  # exit code of a worker that can't go on (EX_SOFTWARE of sysexits.h)
_worker: _Worker | None = None  # set if this process is one
_remote_lock = threading.RLock()  # for threads of a foreign executor: one imports a DAG at a time
_WATCHED_SIGNALS = "INT TERM ALRM CHLD HUP PIPE QUIT USR1 USR2 PROF VTALRM".split()
_WATCHED_LIMITS = "AS DATA NOFILE FSIZE CPU NPROC".split()  # a change of one spoils a worker


class _Worker:
    """A worker process: takes jobs from its run's queue, one at a time, and reports how they ended.

    After a job the worker takes the next one, and one message reports both: the first one's
    outcome, and which job it took. If no job waits, it reports the outcome at once, and only then
    undoes what the task changed in the process; if that can't be undone, it kills itself, and all
    that the task left. After a job that `holds`, it takes no other before the scheduler lets it go
    on, by a `call` with the callbacks that are due, if any. Where systems lack such a queue (see
    `_pulls`), jobs come over the control pair.

    Two bytes are shared with the scheduler. TAKING is 1 from before the worker receives a job until
    it has reported that, and while it tidies up after an outcome that it reported at once. While it
    is 0, the worker can be sent messages, and its death loses no job that it took unreported. HEED
    is set by the scheduler before it writes to the control pair: the worker then looks there before
    it takes another job.
    """

    def __init__(self, control: _Wire) -> None:
        self.control = control
        self.jobs: _Wire | None = None
        self._epoll: Any = None
        self.shared: Any = bytearray(2)  # its own, until `_on_share`
        self.pid = os.getpid()
        self.run: Any = None  # the _WorkerRun that it serves
        self.importing = False  # it imports a DAG's modules, which must not start runs
        self.spent = False  # it takes no more jobs: it was told to end, or a task spoilt it
        self.spoilt: str | None = None  # why it is to be replaced after its present job
        self.idle = False  # it has no job, and sleeps until something comes
        self.unheard: list[Any] = []  # handlers of `logging` whose queue nobody empties here
        self.number = 0  # of the job that it took last, in its run
        self.tasks = 0  # how many it has run, in all runs
        self.eager = False  # that job is one of a chain of quick ones: the next may come at once
        self.leaving = self.terminated = False  # it is to leave its run; its task was told to end
        self.in_task = self.forking = False  # the task's own code runs; a fork is under way
        self.log = ""  # its path
        self.log_file = -1  # its descriptor
        self.log_start = 0  # where the job's output begins in it
        self.log_before = b""  # the last bytes before that: they differ if a job has truncated it
        self.in_a_blink = False  # the last job took less than _BLINK
        self.free = sys.maxsize  # the lowest free descriptor, when that was last looked for
        self.most_free = sys.maxsize  # the worker is replaced if `free` exceeds this
        self.last: _Execution | None = None  # what runs, or is held until a `call`
        self.since = 0.0  # when it took that job, by monotonic(); the scheduler counts from later
        self.environ: dict[bytes, bytes] = {}  # variables that the pool's initializer has added

    def prepare(self) -> None:
        """Become a worker, with a session and streams of its own, that ends with the scheduler."""
        with contextlib.suppress(PermissionError):  # the script's import made it a group's leader
            os.setsid()
        # A forked worker has the scheduler's fd, where asyncio would hear of the worker's signals.
        signal.set_wakeup_fd(-1)
        # A Ctrl-C is for the scheduler. A handler, unlike SIG_IGN, is not inherited through exec.
        signal.signal(signal.SIGINT, lambda signum, frame: None)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a forked worker has the scheduler's handler
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how children end
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started it may block signals
        after = self._after_fork
        os.register_at_fork(before=self._before_fork, after_in_parent=after, after_in_child=after)
        parent: Any = multiprocessing.parent_process()
        try:
            _die_with(parent.sentinel, -os.getpgrp())
        except (AttributeError, OSError):  # no Linux, or a sandbox forbids it
            threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
        self._null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(self._null, descriptor)
        # Line-buffered, so that a killed task's last lines are in its log.
        kept: Any = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
        self._stdio: Any = [open(n, how, 1, **kept) for n, how in enumerate("rww")]  # noqa: SIM115
        sys.stdin, sys.stdout, sys.stderr = self._stdio
        sys.breakpointhook = _no_breakpoint
        builtins.input = _input

    def _note_state(self) -> None:
        """Note what the process is like before any task, once the DAG's module is imported."""
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._recursion = sys.getrecursionlimit()
        self._threads = threading.active_count(), _count_threads()
        self._limited = [getattr(resource, f"RLIMIT_{name}") for name in _WATCHED_LIMITS]
        self._limits, self._children_used = _resources(self._limited)
        self._helpers = _child_pids()  # started by the pool's initializer, or the module
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        signal.signal(signal.SIGTERM, self._on_term)  # the module may have set its own
        numbers = [getattr(signal, f"SIG{name}") for name in _WATCHED_SIGNALS]
        self._handlers = {number: _signal.getsignal(number) for number in numbers}
        root = _log().root
        self._logging = (root, list(root.handlers), root.level, root.manager.disable)
        known = list(root.manager.loggerDict.items())  # a copy: threads may add to it
        self._mute = {name for name, each in known if getattr(each, "disabled", False)}
        self._path = list(sys.path)
        self._loop = getattr(_own_loop(), "_loop", None)
        self._figures = _figures()
        self._method = multiprocessing.get_start_method(allow_none=True)

    # Jobs, one after another.

    def serve(self) -> None:
        """Run job after job, and wait where there is none, until the control pair is closed."""
        done: _Outcome | None = None
        with contextlib.suppress(EOFError):
            while True:
                self.shared[_TAKING] = self.last is None  # else a `call` comes first
                job = self._take()
                if job is not None or done is not None:
                    self._report(done, job)
                self.shared[_TAKING] = 0
                job = job or self._heed()
                done = None if job is None else self._run(job)

    def _take(self) -> _Job | None:
        """Take a job from the queue, if one is there and nothing else comes first; else None."""
        if self.last or self.spent or self.jobs is None or self.shared[_HEED]:
            return None
        try:
            message = self.jobs.receive()
        except EOFError:  # the run is over, as a message on the control pair says by now
            return None
        return None if message is None else self._begin(*message[0])

    def _begin(self, number: int, eager: bool, *job: Any) -> _Job:
        """Note what came with a job; its time runs from here."""
        self.number, self.eager, self.since = number, eager, _monotonic()
        return _Job(*job)

    def _report(self, done: _Outcome | None, job: _Job | None) -> None:
        number = 0 if job is None else self.number  # 0: none
        if done is None:
            return self.control.send(("took", number))
        values = _values_of(done)
        if sum(map(len, values)) <= _INLINE:
            values = []  # small values stay in the outcome, large ones go behind it
        sent = _with_values(done, itertools.repeat(b"")) if values else done
        try:
            self.control.send(("done", tuple(sent), number), values)
        except OSError as error:  # a full disk, or a limit that the task has set
            why = f"the task's outcome could not be handed over: {error}"
            self.last, self.spoilt = None, why
            self.spent |= job is None  # if it has taken another job, it still runs that
            lost = done._replace(status="failed", error=why, xcoms=(), items=(), note={})
            lost = lost._replace(spoilt=why if job is None else None, held=False)
            self.control.send(("done", tuple(lost), number))

    def _heed(self) -> _Job | None:
        """Do what the scheduler says, or wait if it says nothing. Returns a job if it sends one."""
        self.shared[_HEED] = 0  # before looking: a later message sets it again
        message = self.control.receive()
        if message is None:
            self._wait()
        while message is not None:
            kind, *fields = message[0]
            if kind == "job":
                job = self._begin(*fields)
                self.control.send(("took", self.number))
                return job
            if kind == "leave":
                self.leaving = True  # below, once no `call` for its last job is to come
            else:
                self.importing = kind == "join"
                getattr(self, f"_on_{kind}")(*fields)
                self.importing = False
            if self.leaving and self.last is None:
                self._leave()
            message = self.control.receive()
        return None

    def _wait(self) -> None:
        """Sleep until there is a message, or a job that it may take."""
        self.idle = self.last is None
        if self.spent and self.idle:
            if self.number:
                os.killpg(self.pid, signal.SIGKILL)  # with what its task left
            os._exit(128 + signal.SIGTERM)  # told to end as it started: people see this exit code
        if self.idle and self.jobs is not None:
            # In a chain of quick jobs the next one comes at once: to poll is faster than to sleep.
            if not (self.eager and _linger(lambda: self._epoll.poll(0))):
                self._epoll.poll()
        else:
            _is_readable(self.control.fileno(), timeout=3600)
        self.idle = False

    def _run(self, job: _Job) -> _Outcome | None:
        """Run a job. Returns its outcome, or None if that was reported already."""
        self.run.restore()
        if self.run.edited is not None:
            _print_as_task(self.run.edited)
        self.last = _Execution(self.run, job)
        self.tasks += 1
        outcome = _run_job(self.last, self)
        if not job.holds:
            self.last.forget_failure()
            self.in_a_blink = outcome.took < _BLINK
            if not self.in_a_blink:
                self._close_dropped()
        self._flush()
        terminated = self.terminated  # then the worker is replaced
        log_end, output = self._own_output()
        held = job.holds or output is None or log_end > _LOG_LIMIT
        outcome = outcome._replace(terminated=terminated, held=held, log_end=log_end, output=output)
        # If no job waits, other tasks may wait for this one: it is reported before the tidying up.
        at_once = not (held or terminated) and self.jobs is not None and not self._epoll.poll(0)
        if at_once:
            self.shared[_TAKING] = 1  # until `serve` clears it: the worker may end itself below
            self._report(outcome, None)
        spoilt = None
        if not held:  # else `_on_call` does this
            self.last, spoilt = None, self._restore()
        self.spent |= spoilt is not None
        if self.spent:
            _remove_shared()
        if not at_once:
            return outcome if spoilt is None else outcome._replace(spoilt=spoilt)
        if spoilt is not None:  # the outcome that was reported did not say so
            _signal_each(_strays(self.pid, self.log_file), signal.SIGKILL)
            os.killpg(self.pid, signal.SIGKILL)
        return None

    def _own_output(self) -> tuple[int, bytes | None]:
        """Where the job's output ends in the log, and the output itself if it is short (else None):
        the next job may truncate the file before the scheduler reads it."""
        output: bytes | None = None
        try:
            end = os.lseek(self.log_file, 0, os.SEEK_END)
            start = self.log_start if self.log_start <= end else 0  # the task truncated it
            if start > 0 and self._log_before(start) != self.log_before:
                start = 0  # the task truncated it, and has printed as much since
            if end - start <= _INLINE:
                output = os.pread(self.log_file, end - start, start) if end > start else b""
            if end != start or start != self.log_start:  # something was printed, or truncated
                self.log_start, self.log_before = end, self._log_before(end)
        except OSError:  # the task has closed it
            self.log_start, output = 0, b""
        return self.log_start, output

    def _log_before(self, start: int) -> bytes:
        return os.pread(self.log_file, min(start, 16), max(0, start - 16))

    # What the scheduler says.

    def _on_share(self) -> None:
        with open(self.control.take_file(), "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 2)

    def _on_join(self, info: dict[str, Any], references: _References) -> None:
        """Serve a run: import its DAG, and find its tasks."""
        # Variables that the pool's initializer has added yield to run()'s own.
        info["environ"] = self.environ | info["environ"]
        sys.path[:] = dict.fromkeys([*info["sys_path"], *sys.path])
        self.run = _WorkerRun(info)
        self.run.restore()
        try:
            self.run.import_dag()
            _name_as_main(sys.modules["__main__"])
            found = self.run.find_all(references)
        except BaseException as error:  # importing runs the user's module: it may even sys.exit
            why = f"importing the DAG in a worker failed:\n{_traceback(error)}"
            return self.control.send(("joined", why, None, None))
        self._flush()
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form)  # does nothing if handlers are there
        self._note_state()
        self.control.send(("joined", None, self.run.edited, found))
        _let_c_print_lines()  # slow, but the scheduler records the run meanwhile

    def _on_work(self, path: str, run_row: int, queue: bool) -> None:
        """The run is recorded: open its log, and its `queue` of jobs if it has one."""
        self.run.info["run_row"] = run_row
        self.log, self.log_start, self.control.folder = path, 0, os.path.dirname(path)
        try:
            with contextlib.suppress(FileNotFoundError):  # the run is over, and its logs gone
                self._renew_output()
            if queue:
                self._epoll = select.epoll()
                self._epoll.register(self.control, select.EPOLLIN)
                self.jobs = _Wire(socket.socket(fileno=self.control.take_file()))
                # _EXCLUSIVE: a job wakes only one of the workers that sleep.
                self._epoll.register(self.jobs, select.EPOLLIN | _EXCLUSIVE)
            self.free = self._lowest_free()
            if self.most_free == sys.maxsize:  # its first run
                getattr(gc, "freeze", bool)()  # `_close_dropped` need not search what was imported
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            self.most_free = min(self.most_free, (self.free + most) // 2)
        except OSError as error:  # the DAG's module has taken all descriptors
            return self.control.send(("joined", f"a worker can't begin: {error}", None, None))

    def _on_call(self, is_last: bool, job: Any, name: Any, reason: Any, facts: Any) -> None:
        """The last outcome is recorded: call the callbacks that are due, if any, and tidy up. Or
        call those of another `job`, or of the DAG: see `_call_due`. `is_last`: this worker will be
        replaced, as it was told to end (which its task may have caught)."""
        last, self.last, self.in_a_blink = self.last, None, False
        self._mend_streams()
        with contextlib.suppress(OSError):  # the task has closed the log
            self._renew_output(anew=False)
            if self.log_start > _LOG_LIMIT:  # it has been read: the log begins anew
                os.ftruncate(self.log_file, 0)
        if job is not None:
            self.run.restore()
        _call_due(self.run, last, job, name, reason, facts)
        self._restore_signals()
        self._close_dropped()
        self._flush()
        self._own_output()
        spoilt = self._restore()
        self.spent = is_last or spoilt is not None  # a SIGTERM meanwhile hit no task
        if self.spent:
            _remove_shared()
        self.control.send(("called", spoilt, self.log_start))

    def _leave(self) -> None:
        """Leave the run: it is over, or another run wants the slot."""
        if self.jobs is not None:
            self._epoll.close()
            self.jobs.close()
        self.jobs = self.run = self.last = self.control.folder = None
        self.leaving = False
        self.control.send(("left",))

    # How the worker, or its task, is told to end.

    def __enter__(self) -> None:
        """Enter a task's own code, in which SIGTERM raises; one that has come raises at once."""
        self.in_task = True
        if self.spent:
            self._raise_end()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.in_task = False
        # Only if a handler has changed, as the outcome waits for this. `_restore` ends timers.
        found = map(_signal.getsignal, self._handlers)
        if not all(map(operator.is_, found, self._handlers.values())):
            self._restore_signals()
        if self.terminated and kind is None:  # its task caught the error, and fails all the same
            self._raise_end()

    def _before_fork(self) -> None:
        # Python drops a signal that reaches a child during its fork; a blocked one waits.
        self.forking = True
        self._unforked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def _after_fork(self) -> None:
        """Let SIGTERM through again; in a child of the task it has its default meaning."""
        if os.getpid() != self.pid and _signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._unforked)
        self.forking = False

    def _on_term(self, signum: int, frame: object) -> None:
        if self.idle:
            os._exit(128 + signal.SIGTERM)  # now, so that this ends no later task
        self.spent = True
        if self.in_task and self.forking:  # an exception in a fork hook is lost: try again later
            again = threading.Timer(0.01, os.kill, (self.pid, signum))
            again.daemon = True
            again.start()
        elif self.in_task:
            self._raise_end()

    def _raise_end(self) -> NoReturn:
        self.in_task = False  # a second TERM (systemd's, say) must not cut off the task's clean-up
        self.terminated = True
        timeout = None if self.last is None else self.last.job.timeout
        if timeout is not None and _monotonic() >= self.since + timeout:
            raise AirflowTaskTimeout(f"timeout after {timeout:g} s")
        raise AirflowTaskTerminated("the task was told to end (SIGTERM)")

    # What a task may have changed.

    def _flush(self) -> None:
        self._drain_logging()
        for stream in {id(x): x for x in (sys.stdout, sys.stderr, *self._stdio)}.values():
            try:
                stream.flush()
            except Exception:  # a task may have put anything there
                pass

    def _close_dropped(self) -> None:
        """Close what a task has opened and dropped. In a cycle of objects, as sqlite3 makes them, a
        connection would stay open, and its lock or transaction would fail the next attempt."""
        free = self._lowest_free()
        for generation in (1, 2):  # 2 takes 10 ms and more where pandas is imported
            if free > self.free:
                gc.collect(generation)
                free = self._lowest_free()
        self.free = free
        if free > self.most_free:  # later tasks would find no free descriptor
            self.spoilt = "the tasks left many files open"

    def _lowest_free(self) -> int:
        try:
            descriptor = os.dup(self._null)
        except OSError:  # a task has taken all descriptors, or closed this one
            return sys.maxsize
        os.close(descriptor)
        return descriptor

    def _drain_logging(self) -> None:
        """Write what handlers of `logging` hold in a buffer, or in a queue for a listener's thread:
        else it would come into the next task's log, or nowhere."""
        late: Any = sys.modules.get("logging.handlers")
        known = [] if late is None else [each() for each in getattr(logging, "_handlerList", ())]
        for handler in known:
            with contextlib.suppress(Exception):  # a queue of another kind, a target that is closed
                if isinstance(handler, late.MemoryHandler) and handler.flushOnClose:
                    handler.flush()
                elif isinstance(handler, late.QueueHandler) and handler not in self.unheard:
                    done = handler.queue.all_tasks_done
                    with done:
                        if handler.queue.unfinished_tasks and not done.wait(timeout=1):
                            self.unheard.append(handler)

    def _mend_streams(self) -> None:
        sys.stdin, sys.stdout, sys.stderr = self._stdio
        for number, stream in enumerate(self._stdio):
            try:
                kept = stream.fileno(), stream.encoding, stream.errors, stream.line_buffering
            except ValueError:  # it was detached, or closed with a wrapper that a task dropped
                kept = None
            if kept != (number, "utf-8", "backslashreplace", True):  # as `prepare` opened it
                os.dup2(self.log_file if number else self._null, number)  # it may be closed, too
                buffer = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
                # Mended in place, since handlers of `logging` have this very object.
                io.TextIOWrapper.__init__(stream, buffer, "utf-8", "backslashreplace", None, True)

    def _restore_signals(self) -> None:
        """Undo a task's signal handlers and timers, which must not interrupt what follows."""
        try:
            for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)  # first: without its handler it kills the process
            for number, handler in self._handlers.items():
                if _signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
                    self._children_used = None  # unknown: with SIGCHLD ignored, none are counted
        except BaseException:  # one of the task's handlers has raised
            self._restore_signals()
            raise

    def _mend_libraries(self) -> None:
        """Put back what libraries keep for the process as a whole."""
        own = _own_loop()
        if own is not None and (own._loop is None or own._loop.is_closed()):
            # asyncio.run() leaves no loop. The next task gets the DAG's module's, or a new one.
            is_gone = self._loop is None or self._loop.is_closed()
            own._loop, own._set_called = None if is_gone else self._loop, False
        for number in _figures() - self._figures:
            with contextlib.suppress(Exception):  # an error of its window, or of a callback
                sys.modules["matplotlib.pyplot"].close(number)
        multiprocessing.set_start_method(self._method, force=True)  # else no later task can set it

    def _restore(self) -> str | None:
        """Undo what a task changed in the process. Returns why it has to be replaced, or None."""
        self._mend_streams()
        self._restore_signals()
        if not self.in_a_blink:
            self._mend_libraries()
        sys.path[:] = self._path
        sys.setrecursionlimit(self._recursion)
        os.umask(self._umask)
        _signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        root, handlers, level, disabled = self._logging
        root.handlers[:] = handlers
        if (root.level, root.manager.disable) != (level, disabled):
            root.manager.disable = disabled
            root.setLevel(level)  # this also clears what loggers have cached about both
        if _log().disabled:  # by dictConfig or fileConfig, which disable all loggers that exist
            for name in root.manager.loggerDict.keys() - self._mute:
                logging.getLogger(name).disabled = False
        # What is found from here on can't be mended: the process has to be replaced.
        reactor: Any = sys.modules.get("twisted.internet.reactor")  # scrapy's, for one
        if getattr(reactor, "_startedBefore", False) and not reactor.running:
            return "the task ran Twisted's reactor, which runs once in a process"
        own, busy = self._threads
        if threading.active_count() > own and _has_more_threads(busy):
            return "the task left a thread"
        with contextlib.suppress(ChildProcessError):  # there is none, as after most tasks
            # Zombies are reaped: the task that could have waited for them has ended.
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
            if not _child_pids() <= self._helpers:
                return "the task left a child process"
        limits, used = _resources(self._limited)
        if limits != self._limits:
            return "the task changed its user, a resource limit, its priority or its CPUs"
        # A child that ended may have left a process that has the log open. Locking the log anew
        # shows that. It is done if children have ended, or if unlisted helpers (0) may hide one.
        had_children, self._children_used = used != self._children_used, used
        try:
            self._renew_output(anew=had_children or 0 in self._helpers)
        except OSError:
            return "the task closed its output, or left a process that holds it"
        if self.tasks >= self.run.info["most_tasks"]:
            return "it has run as many tasks as its pool allows"
        return self.spoilt

    def _renew_output(self, anew: bool = True) -> None:
        """Let descriptor 0 be /dev/null, 1 and 2 the log, whatever they are now. `anew`: open the
        log again, and lock it. Raises OSError if that can't be done, or if another process (a child
        that the task left, even an orphan) still holds the log that was open, and so its lock."""
        os.dup2(self._null, 0)
        if anew:
            file, self.log_file = self.log_file, -1  # once closed, its number may be another file's
            if file >= 0:
                os.close(file)
            file = os.open(self.log, os.O_RDWR | os.O_APPEND)
            if file <= 2:
                raise OSError("a standard descriptor is closed")
            self.log_file = file
        for standard in (1, 2):
            os.dup2(self.log_file, standard)
        if anew:  # the earlier lock lasts as long as any copy of the earlier descriptor
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _die_with(pipe: int, whom: int) -> None:
    """Let the kernel kill `whom` (negative: a group) once a pipe has no writer: the scheduler died.

    With O_ASYNC end-of-file raises a signal, and F_SETSIG makes that SIGKILL. So it needs no thread
    of ours, which would wait behind C code that keeps the GIL, and for ever in a stopped process.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, whom)
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if _is_readable(pipe, timeout=0):  # the writer was gone before the kernel began to watch
        os._exit(1)


def _watch_parent(parent: Any) -> None:
    parent.join()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _serve(end: Any, initializer: Any, initargs: tuple[Any, ...], method: Any = None) -> None:
    """Be a worker at this `end` of a control pair until that is closed: an executor's initializer.
    `method`: the program's default start method, which tasks that use multiprocessing get, too."""
    global _worker
    if not _is_forked:  # else the program's is in force
        multiprocessing.set_start_method(method, force=True)
    _worker = _Worker(_Wire(socket.socket(fileno=os.dup(end.fileno()))))
    doing = "a worker can't begin"
    try:
        _close_pipes(getattr(multiprocessing.current_process(), "_args", ()))
        end.close()  # after `_close_pipes`: gevent's closed socket raises for any attribute
        _worker.prepare()
        if initializer is not None:
            doing, before = "the pool's initializer failed in a worker", {*os.environb}
            initializer(*initargs)
            _worker.environ = {k: x for k, x in os.environb.items() if k not in before}
        doing = "a worker can't begin"
        _worker.serve()
        _worker.control.close()  # so that whoever waits at the other end sees that it ended
    except BaseException as error:  # whatever it is: the executor would keep it, and the pair open
        with contextlib.suppress(OSError):
            if _worker.log_file < 0:  # there is no log yet that could show it
                _worker.control.send(("failed", f"{doing}:\n{_traceback(error)}"))
            else:
                os.write(2, f"liteflow: {_traceback(error)}\n".encode())
        os._exit(_BROKEN)


def _close_pipes(owners: Iterable[Any]) -> None:
    """Close an executor's pipes in its worker, or another forked process: if a task wrote there by
    mistake, the executor would wait for the rest of a message. It sees a worker's end anyway."""
    for owner in owners:
        if hasattr(owner, "_reader"):
            with contextlib.suppress(OSError):  # the script has closed what it inherited
                owner._reader.close()
                owner._writer.close()
            # So the executor's own loop, which follows `_serve` in the worker, ends without a word.
            owner.get = owner.put = owner.wakeup = lambda *_, **__: None


@functools.lru_cache(50)
def _remote_run(info: bytes) -> _WorkerRun:
    run = _WorkerRun(marshal.loads(info))
    run.import_dag()
    return run


def _run_remotely(info: bytes, message: bytes) -> bytes:
    """Answer a message as a slot's worker would; called wherever a foreign executor runs it."""
    with _remote_lock:  # no thread may see a DAG that another has half built
        run = _remote_run(info)
    kind, *fields = marshal.loads(message)
    if kind == "find":
        return marshal.dumps(run.find_all(*fields))
    if kind == "call":
        _call_due(run, None, *fields)
        return marshal.dumps(None)
    execution = _Execution(run, _Job(*fields))
    outcome = _run_job(execution, contextlib.nullcontext())
    execution.forget_failure()
    told: tuple[Any, ...] = _with_values(outcome, map(bytes, _values_of(outcome)))
    return marshal.dumps(tuple(told))


# --- Runners: a server that is forked from the scheduler ------------------------------------------


class _ForkedServer:
    """Forks workers for a pool, from this process as it was when it had one thread.

    So nothing is imported or compiled again, memory is shared, and workers have the code that the
    scheduler has. It ends with its pool, and with the scheduler, however that dies.
    """

    pid: int | None = None
    _alive = -1

    def __init__(self, fallback: str | None) -> None:
        self.fallback = fallback  # the start method for workers once the server is gone
        self.born = _monotonic()
        self._dags = weakref.WeakSet(_built.values())  # not those that a later DAG has replaced
        tasks = [task for dag in _built.values() for task in dag.tasks]
        functions = [x.python_callable for x in tasks if isinstance(x, _FunctionOperator)]
        self._functions = {id(function): function for function in functions}
        self._lock: Any = threading.RLock()  # `_ask` has to know whether this thread holds it
        self.is_gone = False
        requests, self._requests = (_Wire(end) for end in _socket_pair())
        alive, self._alive = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a program may put anything there
                stream.flush()  # or a worker may write the buffer again
        # What a signal handler raises within a fork hook is lost, and the child must not run any
        # handler. So signals wait in the kernel meanwhile.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.pid = os.fork()
            if not self.pid:
                self.let_go()
                _fork_workers(requests, alive)
        finally:
            requests.close()
            os.close(alive)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def serves(self, runner: _SlotRunner) -> bool:
        """Whether workers can find the runner's tasks: the DAG had them when the server was forked,
        or other tasks had the same functions, which workers can then find by name."""
        called = [getattr(task, "python_callable", None) for task in runner.dag.tasks]
        known = runner.dag in self._dags and runner.dag._born <= self.born
        known = known or all(id(x) in self._functions for x in called)
        return known and not self.is_gone and self.born >= runner.since

    def fork(self, control: int) -> int:
        """Fork a worker with this end of a control pair; its pid. Raises OSError, EOFError."""
        return int(self._ask((), control))

    def exit_code(self, pid: int) -> int | None:
        """A worker's exit code, negative for a signal, or None while it runs. Ask no more once it
        is known: until then no other process can have this pid. Raises OSError, EOFError."""
        return self._ask((pid,))  # type: ignore[no-any-return]

    def _ask(self, ended: tuple[int, ...], file: int | None = None) -> Any:
        if self._lock._is_owned():  # a destructor has cut into this method, and ends the pool
            raise OSError("the forked server is being asked already")
        with self._lock:
            try:
                if self.is_gone or not _answers(self.pid):
                    raise OSError("the forked server does not answer")
                self._requests.send(ended, file=file)
                while (message := self._requests.receive()) is None:
                    if not _is_readable(self._requests.fileno(), timeout=5.0):
                        raise OSError("the forked server says nothing")
                return message[0][0]
            except BaseException:  # whatever it is: the next question would get this one's answer
                self.is_gone = True
                raise

    def let_go(self) -> None:
        """Close what tells the server, and its workers, that this process lives."""
        if self._alive >= 0:
            self._requests.close()
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        self.let_go()
        pid, self.pid = self.pid, None  # soon another process may have this id
        if pid:  # in a worker it is 0
            with contextlib.suppress(OSError):  # the program may have waited for it
                os.waitpid(pid, 0)

    __del__ = close


def _may_fork() -> bool:
    """Whether a server may be forked from here: with one thread (native ones count, as they may
    hold locks), a main guard (forked workers would not show that it is missing), and nothing open
    that must not be shared: a pipe or socket whose end somebody waits for, a file (unless opened to
    append), a locked file, a database. Raises ImportError, OSError without Linux, /proc, pidfd."""
    os.close(_pidfd_of(os.getpid()))
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    for _ in range(10):
        is_alone = len(os.listdir("/proc/self/task")) == 1
        if is_alone or threading.active_count() > 1:
            break
        time.sleep(0.0005)  # a thread that has ended is listed for a moment more
    return is_alone and not any(map(_is_unsafe_to_share, files)) and _is_guarded()


def _pidfd_of(pid: int) -> int:
    """A descriptor that is readable once the process has ended. Raises OSError if there is none."""
    if hasattr(os, "pidfd_open"):
        return int(os.pidfd_open(pid))
    # A Python built for any glibc (conda's, uv's) lacks this call; the kernel has it as 434.
    linux = sys.platform == "linux"
    found: int = ctypes.CDLL(None, use_errno=True).syscall(434, pid, 0) if linux else -1
    if found < 0:
        raise OSError(ctypes.get_errno(), "no pidfd_open")
    return found


def _is_unsafe_to_share(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        is_inherited = os.get_inheritable(descriptor)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:  # os.listdir's own, which is closed by now
        return False
    # Whoever waits for the end of a pipe that this process inherited waits for this process, too.
    if is_inherited or stat.S_ISCHR(mode):
        return False
    to_append = os.O_WRONLY | os.O_APPEND  # else all processes would share one offset in the file
    may_share = flags & to_append == to_append or ".so" in name  # libffi keeps its own file open
    harmless = stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and may_share)
    # A worker would hold the file's lock for as long as it lives.
    return not harmless or b"\nlock:" in _bytes_of(f"/proc/self/fdinfo/{descriptor}")


def _is_guarded() -> bool:
    """Whether importing the script and its modules, as a worker does, would not start this run."""
    is_package = _script()[1].endswith("__main__")  # or a folder, or a zip: no worker imports that
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            path = frame.f_code.co_filename
            safe = is_package or not os.path.isfile(path) or _is_below_guard(path, frame.f_lineno)
            if frame.f_globals.get("__name__") != "__main__" or not safe:  # a module's import
                return False
        frame = frame.f_back
    return True


def _fork_workers(requests: _Wire, alive: int) -> NoReturn:
    """What a forked server does until the scheduler is gone."""
    scheduler = os.getppid()
    try:
        for name in ("mmap", "multiprocessing.util", "resource"):  # here, not in each worker
            __import__(name)
        # Leave the terminal, and give signals the meaning that they would have after an exec.
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in range(1, signal.NSIG):
            if callable(_signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how workers end
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _die_with(alive, os.getpid())
        getattr(gc, "freeze", bool)()  # a collection would copy the memory that is shared
        while True:
            _is_readable(requests.fileno(), timeout=3600)
            if (message := requests.receive()) is None:
                continue
            if ended := message[0]:  # `exit_code` asks for this pid's
                pid, status = os.waitpid(ended[0], os.WNOHANG)
                requests.send((os.waitstatus_to_exitcode(status) if pid else None,))
                continue
            control = requests.take_file()
            pid = os.fork()
            if not pid:
                requests.close()
                _be_forked(control, alive, scheduler)
            os.close(control)
            requests.send((pid,))
    finally:
        os._exit(0)


def _be_forked(control: int, alive: int, scheduler: int) -> NoReturn:
    """What a forked server's child does until it ends: it is a worker."""
    global _is_forked
    _is_forked, code = True, _BROKEN
    try:
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])
        arguments = (socket.socket(fileno=control), None, ())
        name = f"{_WORKER_MARK}{os.getpid()}"
        process: Any = multiprocessing.Process(target=_serve, args=arguments, name=name)
        process._parent_pid = scheduler
        process._config.pop("daemon", None)
        # Process's own asks for the default start method, for which 3.14 makes a temporary file.
        process._after_fork = multiprocessing.process.BaseProcess._after_fork  # type: ignore
        # Opened anew: the kernel notes in the open file, which forks share, whom `_die_with` kills.
        sentinel = os.open(f"/proc/self/fd/{alive}", os.O_RDONLY)
        os.close(alive)
        if len(_log().handlers) == 1:  # only our NullHandler: what a task logs would be lost
            _log().propagate = True
        sys.settrace(None)  # a debugger has no terminal here
        sys.setprofile(None)
        monitoring: Any = getattr(sys, "monitoring", None)
        if hasattr(monitoring, "clear_tool_id"):  # Python 3.14, whose pdb uses that
            monitoring.free_tool_id(monitoring.DEBUGGER_ID)
        code = contextvars.Context().run(process._bootstrap, sentinel)
    finally:
        os._exit(code)


def _process_state(pid: int | None) -> str:
    """The kernel's letter for a process's state ("R", "S", "T", "Z"); "" if it is gone."""
    if not os.path.exists("/proc/self"):
        return _ps(f"-o stat= -p {pid or 0}")[:1]
    with contextlib.suppress(OSError):
        # As bytes: the process's name in it may be cut within a character, or hold anything.
        if os.readlink("/proc/self") == str(os.getpid()):  # else /proc is another namespace's
            return _bytes_of(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0].decode()
    return ""


def _answers(pid: int | None) -> bool:
    """Whether a process is not stopped, as by SIGSTOP or a debugger; true of one that is gone."""
    return _process_state(pid) not in ("T", "t")


# --- Runners: slots of worker processes -----------------------------------------------------------

# Private parts of CPython that this file uses ("owner: names: for what"); a test looks for each.
#   __import__("_signal"): getsignal, pthread_sigmask, signal, valid_signals: no enums, so faster
#   asyncio: _enter_task, _get_running_loop, _leave_task, _set_running_loop: `_awaited`
#   asyncio.events: _event_loop_policy: `_own_loop`, which finds the loop as its `_local._loop`
#   concurrent.futures.ProcessPoolExecutor(1): _executor_manager_thread, _processes: `_submit`
#   concurrent.futures.process: _threads_wakeups: `_leave_asleep`
#   concurrent.futures.thread: _threads_queues, _worker: to count a pool's idle threads
#   logging: _handlerList: to write what handlers hold back
#   multiprocessing.Process(): _after_fork, _bootstrap, _parent_pid: `_be_forked`
#   multiprocessing.Process(): _args, _config, _popen: `_serve`, `_allowed_to_start`, `_submit`
#   multiprocessing.SimpleQueue(): _reader, _writer: `_close_pipes`
#   multiprocessing.forkserver._forkserver: _forkserver_pid, _preload_modules: `_forkserver_answers`
#   multiprocessing.process: _children: `_forget`
#   multiprocessing.spawn._main.__code__: _inheriting: set while a child imports the script
#   multiprocessing.synchronize.SemLock: _cleanup: `_remove_shared`
#   multiprocessing.util: _finalizer_registry, _remove_temp_dir: `_remove_shared`
#   multiprocessing.util.Finalize(set(), bool): _args, _callback: what it would close or remove
#   os.environ: _data: the environment as bytes
#   threading: _SHUTTING_DOWN, _register_atexit: `_SlotRunner._lend`, `_set_up_slots`
#   threading.RLock(): _is_owned: to notice a destructor or signal handler that cuts in
#   threading.Thread(): _daemonic: `_allowed_to_start`

_START_LIMIT = 120.0  # seconds for a worker to start and import the DAG's module
_CALLBACK_LIMIT = 60.0  # seconds that callbacks may take
_GRACE = 5.0  # seconds from TERM to KILL
_LOG_HEAD = _LOG_TAIL = 512 * 1024  # bytes of an attempt's output that are stored, from each end
_LOG_FILE_LIMIT = 64 * 1024 * 1024  # bytes of one attempt's output at which the file is emptied
_LOG_TAIL_SECONDS = 5.0  # between two times that the end of a long log, while it grows, is stored

_live_slots: weakref.WeakSet[_Slot] = weakref.WeakSet()
_starting = threading.RLock()  # held while a worker's start changes this process for a moment


class _Runner:
    """Where tasks run, as a run sees it: start a job, wait for outcomes, end a job.

    Most runners can't do all of it: a method that is not overridden does nothing.
    """

    remote = False  # jobs run where there is no database, and carry all their inputs
    wanted = False  # set by the run: it has more to start once workers have taken what was sent

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}  # what people should be told at the end, each once

    def begin(self, info: dict[str, Any], tasks: _References, jobs: int, check: _Check) -> set[str]:
        """Let a worker find every task; return the ids of those found by function name alone.

        Writes nothing. Begins to start workers for so many jobs; while it waits it calls `check`,
        which may raise. Raises UnreachableTask for tasks that can't be found.
        """
        return set()

    def open_logs(self, folder: str, run_row: int) -> None:
        """The run is recorded, and its private folder is there: jobs may be started."""

    def room(self, jobs: int) -> int:
        """How many of these jobs may be started now; begins to start workers for the others."""
        return jobs

    def is_free(self) -> bool:
        """Whether a worker is idle, and no job is on its way to any."""
        return True

    def start(self, attempt: _Attempt, job: _Job) -> None:
        """Send the job, by the next `wait` at the latest."""

    def withdraw(self) -> list[_Attempt]:
        """Take back the attempts that were sent and not taken by a worker: they never start."""
        return []

    def wait(self, timeout: float) -> list[tuple[_Attempt, _Outcome]]:
        """Wait until something happens or `wake` is called, at most `timeout` seconds. Returns the
        attempts that ended, with their outcomes; an attempt that a worker took has `taken` set."""
        return []

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        """End a job: ask it to, and kill it after the grace (at once if `now`)."""

    def output(self, least: int | None = None) -> _Output:
        """New output of attempts that have ended; unless `least` is None, also of running ones
        whose log file has at least `least` bytes."""
        return []

    def call_back(self, due: _Callback, job: tuple[Any, ...] | None = None) -> bool:
        """Let the worker that holds the attempt, whose outcome is committed, call the callbacks
        that are due, if any, and go on; with a `job`, any idle worker. False if there is none."""
        return True

    def calling(self) -> list[_Attempt]:
        """The attempts whose callbacks are running, or are about to."""
        return []

    def wake(self) -> None:
        """Let `wait` return; may be called from a signal handler or another thread."""

    def dismiss(self) -> None:
        """There are no more jobs: workers that are the run's alone may end."""

    def close(self) -> None:
        """Free all that the run used."""


class _SlotLog:
    """The file that a slot's worker writes its output to, read in slices of one attempt each."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.begin(0)

    def begin(self, start: int, head: int = 0, dropped: int = 0) -> None:
        """Begin the next attempt's slice of the file at byte `start`. Of what a rescheduled sensor
        printed before, `head` bytes are stored as the beginning, and `dropped` bytes came after."""
        self.start = self._at = start  # the slice up to `_at` is stored, or passed over
        self._dropped = dropped  # bytes of the output that came between its head and `_at`
        self._kept = b""  # the last of those bytes
        self._head = head  # bytes that are stored as the beginning of the attempt's output
        self._tail_size = -1  # the file's size when the slice's end was last stored
        self._next_tail = 0.0  # when that may be done again, if the attempt still runs

    def size(self) -> int:
        return os.fstat(self.file).st_size

    def finish(self, attempt: _Attempt, end: int, output: bytes | None = None) -> _Output:
        """`take` the last output of an attempt that has ended; the next slice begins at `end`."""
        parts = self.take(attempt, end, output)
        if end > self.start or self._dropped:  # by now the file may have been emptied
            in_tail = end - self._at if self._tail_size == end else 0  # not in `_dropped` yet
            attempt.log_seen = self._head, self._dropped + in_tail
        self.begin(end)
        return parts

    def take(
        self, attempt: _Attempt, size: int, output: bytes | None = None, runs: bool = False
    ) -> _Output:
        """The attempt's new output up to `size`, where its slice ends by now; while it `runs`, only
        whole lines. `output` is the whole slice, if the worker sent it."""
        data = b""
        if size < self._at:  # the task truncated the file
            self._at = size if size >= self.start else 0
            self.start = min(self.start, self._at)
        if output is not None and self._head < _LOG_HEAD:
            data = output[self._at - self.start :]
        elif (room := min(size - self._at, _LOG_HEAD - self._head)) > 0:
            data = os.pread(self.file, room, self._at)
            if runs and room < _LOG_HEAD - self._head:
                data = data[: data.rfind(b"\n") + 1]
        self._at += len(data)
        self._head += len(data)
        parts = []
        if data:
            attempt.log_parts += 1
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text = decoder.decode(data, final=self._head < _LOG_HEAD)
            parts.append((attempt, attempt.log_parts, text))
            self._kept = decoder.getstate()[0]  # bytes of a character that the head's end cuts
            self._dropped = len(self._kept)
        if self._head >= _LOG_HEAD and size > self._at and size != self._tail_size:
            now, is_full = _monotonic(), size - self.start > _LOG_FILE_LIMIT
            if not runs or is_full or now >= self._next_tail:
                self._tail_size, self._next_tail = size, now + _LOG_TAIL_SECONDS
                parts.append((attempt, _TAIL_PART, self._tail(size)))
        return parts

    def _tail(self, size: int) -> str:
        """The end of the slice, as text for people; empties a file that is too large."""
        at = max(self._at, size - _LOG_TAIL)
        data = (self._kept + os.pread(self.file, size - at, at))[-_LOG_TAIL:]
        cut = size - self._at + self._dropped - len(data)
        if size - self.start > _LOG_FILE_LIMIT:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file, 0)
            self._dropped += size - self._at
            self.start = self._at = 0
            self._tail_size = -1
            self._kept = data
        text = data.decode(errors="replace")
        return f"\n[... {cut:,} bytes cut ...]\n{text}" if cut else text

    def close(self) -> None:
        """Close the file and remove it: what was to be read of it has been."""
        os.close(self.file)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class _Slot:
    """One worker process, lent to one run at a time. It serves in the initializer of an executor of
    its own, unless a forked server has forked it.

    The values of `state`, what tells apart states that share one, and which method leads where:

        free: in the pool -> asked (`_join`)
        asked: its worker starts, or imports a run's DAG -> serving (`_on_joined`) | free (`close`)
        serving: idle (`is_idle`) -> busy (`_on_took`) | calling (`_let_call`) | free (`close`)
                 busy (`attempt`) -> idle | spoilt | held (`_on_done`)
                 busy, its job is being ended (`reason`: `ask_to_end`) -> spoilt | held (same)
                 spoilt (`spoilt` says why) -> dead (`_lose`), once it has no attempt
                 leaving (`spoilt` is "": `_hand_over`) -> free (`_on_left`), once it has none
        held: it keeps the attempt that it reported -> calling (`_let_call`)
        calling: it runs callbacks, or tidies up -> serving (`_on_called`)
        any -> dead: its worker ended, can't be heard (`gone`), failed to start, or isn't needed
    """

    def __init__(self, pool: WorkerPool, context: Any) -> None:
        self.state = "free"
        self.attempt: _Attempt | None = None  # what it runs, or holds
        self.log: Any = None  # a _SlotLog, once it serves
        self.deadline = math.inf  # by monotonic(): see `_SlotRunner._overdue`
        self.timeout = math.inf  # seconds, of its job
        self.served = self.has_taken = False  # it has joined some run; it has taken some job
        self.joining: Any = None  # the info of a run that it was asked to join, until it answers
        self.callbacks: str | None = None  # the callbacks that run, in words
        self.reason: str | None = None  # why its job is being ended
        self.told = math.inf  # when its job was told to end: a success from before that counts
        self.spoilt: str | None = None  # why it gets no other job; "": another run wants it
        self.exitcode: int | None = None
        self.born = self.lent = _monotonic()  # the latter anew as it begins to serve a run
        self.gone = False  # no message can come any more
        self.server: _ForkedServer | None = None  # the one that forked its worker, if one did
        self.process: Any = None  # or else its worker, as a multiprocessing.Process
        self._executor: Any = None  # the executor that started it
        self._executor_thread: Any = None
        self.pid: int  # its worker's
        self.sentinel: int  # a descriptor, readable once its worker has ended
        self.pidfd: int | None = None  # the same, if the slot has to close it
        self._teller: Any = None  # where there are no pidfds, the thread of `_end_of_child`
        self.shared: Any = bytearray(2)  # with its worker: see `_Worker`
        self._start(pool, context)

    def _start(self, pool: WorkerPool, context: Any) -> None:
        """Start the worker. If the server that is to fork it was stopped or can't be reached (its
        socket's folder is gone, its address is too long, it is a parent's), use other means."""
        try:
            return self._start_by(pool, context)
        except (OSError, EOFError):
            forked = isinstance(context, _ForkedServer)
            by_server = context.is_gone if forked else context.get_start_method() == "forkserver"
            if not by_server:
                raise
        # Over another pair: a worker may have the first one, though its server did not answer.
        self._start(pool, _start_context(context.fallback if forked else "spawn"))

    def _start_by(self, pool: WorkerPool, context: Any) -> None:
        forked = isinstance(context, _ForkedServer)
        ours, theirs = _socket_pair()
        self.wire = _Wire(ours)
        self.wire.socket.setblocking(False)
        _live_slots.add(self)
        try:
            if _pulls():
                with _nameless_file(2) as file:
                    os.write(file.fileno(), bytes(2))  # or a full disk would be a SIGBUS later
                    self.shared = mmap.mmap(file.fileno(), 2)
                    self.wire.send(("share",), file=file.fileno())
            _set_up_slots(by_executor=not forked)
            watcher: Any = self
            if forked:
                self.pid = context.fork(theirs.fileno())
                self.pidfd = self.sentinel = _pidfd_of(self.pid)
                self.server = context
            else:
                watcher = self._submit(context, theirs, pool._initializer)
        except BaseException as error:  # whatever it is: cleaned up after, and raised again
            self.wire.close()
            if isinstance(error, RuntimeError):  # no thread for the executor, or at Python's end
                raise OSError(*error.args) from None
            if isinstance(error, _NOT_PICKLED) and pool._initializer != (None, ()):
                why = "the pool's initializer, or an argument of it, can't be sent to a worker"
                raise UnreachableTask(f"{why}: {error}") from None
            raise
        finally:
            theirs.close()  # so that the worker's death is the end of the pair
        if self.pidfd is not None:  # an executor may watch it for longer than the slot lives
            self._let_pidfd_go = weakref.finalize(watcher, os.close, self.pidfd)

    def _submit(self, context: Any, control: socket.socket, initializer: tuple[Any, ...]) -> Any:
        method = context.get_start_method()
        # A worker that is not forked has what it imports, and nothing that a notebook's cell made.
        self.born = self.born if method == "fork" else 0.0
        if method == "forkserver" and not _forkserver_answers():
            raise OSError("the forkserver does not answer")
        _script()  # it puts back what `__main__` has lost: multiprocessing looks there
        naming = copy.copy(context)
        name = f"{_WORKER_MARK}{os.urandom(4).hex()}"
        naming.Process = functools.partial(context.Process, name=name)
        # As a Connection: multiprocessing may know only the socket class that gevent has replaced.
        end = multiprocessing.connection.Connection(control.detach())
        arguments = (end, *initializer, multiprocessing.get_start_method(allow_none=True))
        executor: Any = concurrent.futures.ProcessPoolExecutor(1, naming, _serve, arguments)
        self._executor = executor
        try:
            with _allowed_to_start(context):
                executor.submit(os.getpid)  # any call starts the worker, which only ever serves
        except BaseException:
            for process in executor._processes.values():  # they would wait for messages for ever
                process.kill()
            executor.shutdown(wait=False)
            raise
        finally:
            end.close()
        # shutdown(wait=False) forgets the thread, and there is no other way to wait for its end.
        self._executor_thread = getattr(executor, "_executor_manager_thread", None)
        _leave_asleep(self._executor_thread)
        [(self.pid, self.process)] = executor._processes.items()
        try:
            self.pidfd = _pidfd_of(self.pid)
        except (ImportError, OSError):  # elsewhere than on Linux
            if getattr(self.process._popen, "method", "") != "forkserver":
                self.pidfd, self._teller = _end_of_child(self.process)
        self.sentinel = self.process.sentinel if self.pidfd is None else self.pidfd
        # The executor must watch it, too: the process's own is readable once a forkserver ends.
        executor._processes[self.pid] = watched = _Watched(self.pid, self.sentinel)
        return watched

    def send(self, *data: Any, file: int | None = None) -> None:
        """Send a message. Kills a worker that can't get it, as it would wait for it for ever."""
        self.shared[_HEED] = 1
        try:
            self.wire.send(data, file=file)
        except ConnectionError:
            pass  # the worker is dead, which is noticed elsewhere
        except OSError:  # the worker does not listen, or there is no room for a large message
            self.signal_group(signal.SIGKILL)
        self.shared[_HEED] = 1  # again: the worker may have cleared it before the message was there

    def receive(self) -> Iterator[tuple[str, list[Any]]]:
        """The messages that have come, as (kind, fields). Sets `gone` once no more can come.

        Never waits for the rest: a stopped worker may leave half a message, and a child that the
        task left keeps the pair open.
        """
        try:
            while not self.gone and (message := self.wire.receive()) is not None:
                (kind, *fields), values = message
                yield kind, [*fields, values] if values else fields
        except (EOFError, TypeError, ValueError):  # the end; or a task wrote what is no message
            self.gone = True
        except (OSError, MemoryError) as error:  # this process has no room for the message
            self.gone = True
            self.signal_group(signal.SIGKILL, session=False)
            why = f"the task's outcome could not be received: {_brief(error)}"
            self.reason = self.reason or why

    @property
    def is_idle(self) -> bool:
        """Whether its worker can take a job at once."""
        return self.state == "serving" and self.attempt is None and self.spoilt is None

    @property
    def is_tidying(self) -> bool:
        """Whether its worker tidies up after a held job without callbacks, which takes a moment."""
        return self.state == "calling" and self.callbacks is None and self.spoilt is None

    def signal_group(self, number: int, session: bool = True) -> float:
        """Signal the worker and its children (it leads their group, once it has started). With
        `session`, also processes of its session that left the group (`timeout` and shells do so)
        or hold its output: that takes a look at all processes. Returns when, by monotonic()."""
        ended = self.has_ended()
        if ended and self.pidfd is not None and _process_state(self.pid) not in ("", "Z", "X"):
            return math.inf  # another process has its id by now
        strays = _strays(self.pid, -1 if self.log is None else self.log.file) if session else []
        now = _monotonic()  # before: the worker may hear and end before this process goes on
        # The task first: if its command ended before it hears, it might go on, or succeed.
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            if not ended:
                _signal_each([self.pid], number)
        _signal_each(strays, number)
        return now

    def ask_to_end(self, reason: str) -> None:
        """Send TERM to the group now; after the grace, `_overdue` sends KILL."""
        if self.reason is None:
            self.reason = reason
            self.deadline = _monotonic() + _GRACE
            self.shared[_HEED] = 1  # the worker takes no other job meanwhile
            self.told = self.signal_group(signal.SIGTERM)

    @property
    def timed_out(self) -> bool:
        """Whether its job is being ended for the job's own timeout, not with its run."""
        return (self.reason or "").startswith("timeout")

    def has_ended(self, timeout: float = 0) -> bool:
        """Whether the worker process is gone (its children may not be)."""
        return _is_readable(self.sentinel, timeout)

    def bury(self, grace: float = 0.0) -> None:
        """Kill what is left of the group, and free all that the slot holds; an idle worker, unless
        it is still starting, has `grace` seconds to end in order."""
        self.dismiss()
        # A worker that ends in order has checked that its last task left nothing behind.
        in_order = grace and self.served and self.has_ended(grace)
        self.signal_group(signal.SIGKILL, session=not in_order)
        for thread in filter(None, (self._executor_thread, self._teller)):
            thread.join()
            _close_pipes(vars(thread).values())
        self.exitcode = self._exit_code()
        _forget(self.process)
        mapping, self.shared = self.shared, bytearray(self.shared)  # as the worker left them
        for each in (mapping, getattr(self.process, "_popen", None)):
            getattr(each, "close", bool)()  # at once, also where references are not counted
        _live_slots.discard(self)
        if self.pidfd is not None:
            self._let_pidfd_go()
            self.pidfd = None
        self._executor = self._executor_thread = None

    def _exit_code(self) -> int | None:
        """The worker's exit code, or None if it can't be learned within 0.5 s: from a server that
        is gone or stopped, or that hears of no child's end."""
        code, until = None, _monotonic() + 0.5
        ask = self.server.exit_code if self.server else lambda pid: self.process.exitcode
        with contextlib.suppress(OSError, EOFError):
            while (code := ask(self.pid)) is None and _monotonic() < until:
                time.sleep(0.001)
        return code

    def dismiss(self) -> None:
        """Let an idle worker end, by closing the pair; `bury` waits for that."""
        self.state = "dead"
        self.wire.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False)


class _Watched(_Record):
    """What a slot's executor knows of its worker: when it ends. All else is the slot's to do."""

    pid: int
    sentinel: int
    exitcode = None
    is_alive = join = kill = terminate = bool  # calls without effect


def _end_of_child(process: Any) -> tuple[int, threading.Thread]:
    """A descriptor that is readable once a child process has ended, and the thread that writes to
    it. The process's own sentinel is not readable while its children live, which inherit it."""
    reader, writer = os.pipe()

    def tell() -> None:
        process.join()
        with contextlib.suppress(OSError):  # a pool that was dropped has closed the other end
            os.write(writer, b"!")  # processes forked meanwhile may keep this end open
        os.close(writer)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    return reader, thread


def _leave_asleep(thread: Any) -> None:
    """Keep the interpreter's end from waking an executor's thread: up to 3.12 it writes to a pipe
    that the thread may be closing. The thread ends with its worker, whether it is woken or not."""
    known = getattr(sys.modules["concurrent.futures.process"], "_threads_wakeups", {})
    known[thread] = types.SimpleNamespace(wakeup=bool)


def _forget(process: Any) -> None:
    """Keep multiprocessing from waiting for the process as the interpreter ends."""
    getattr(sys.modules.get("multiprocessing.process"), "_children", set()).discard(process)


def _fill_standard_descriptors() -> None:
    """Open 0, 1 and 2 if they are closed, as a daemon's may be: else a worker's pair gets them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@functools.cache
def _set_up_slots(by_executor: bool) -> None:
    """Once in a process: close pools as the interpreter ends, and let workers find this module."""
    if by_executor:
        import concurrent.futures.process  # noqa: F401 - it registers first, so that it runs last

        # A process of multiprocessing waits for its children before `_register_atexit`'s hooks run.
        multiprocessing.util.Finalize(None, _close_pools, exitpriority=100)
        # Workers get this sys.path, from which Celery, say, has removed this module's folder.
        path = os.path.abspath(__file__)
        path = path if path.endswith(".py") else os.path.realpath(path)  # a link may be a command
        folder, found, _ = path.rpartition(f"/{__name__.replace('.', '/')}.py")
        if found and (folder or "/") not in sys.path:  # a loader may give a file any name
            sys.path.append(folder or "/")
    # concurrent.futures joins its threads before `atexit` runs; this comes before that.
    with contextlib.suppress(RuntimeError):  # in an atexit handler, say, it is too late
        getattr(threading, "_register_atexit", bool)(_close_pools)


def _let_go_of_slots() -> None:
    """In a forked process, close what tells its parent's workers that their scheduler lives."""
    global _starting
    _starting = threading.RLock()  # another thread may have held the old one at the fork
    for slot in list(_live_slots):
        slot.state, slot.shared = "dead", bytearray(2)
        slot.wire.close()
        if slot._executor is not None:
            _close_pipes(vars(slot._executor).values())
        # Else multiprocessing polls the worker here, and takes the exit code that the parent needs.
        _forget(slot.process)
        finalizer = getattr(getattr(slot.process, "_popen", None), "finalizer", None)
        for descriptor in getattr(finalizer, "_args", None) or ():
            with contextlib.suppress(OSError):
                os.close(descriptor)
    _live_slots.clear()
    _set_up_slots.cache_clear()  # in a forked process multiprocessing has forgotten its part
    for pool in list(_pools):
        for runner in pool._runners:
            runner._ours.close()
            runner._theirs.close()
        if pool._server is not None:
            pool._server.let_go()
        _left_behind.append((pool._runs, pool._kept_store))
        pool._empty()


@contextlib.contextmanager
def _allowed_to_start(context: Any) -> Iterator[None]:
    """Let a daemonic process (a multiprocessing.Pool's worker, say) start workers all the same,
    and give no DeprecationWarning where fork was the only way, or asked for.

    multiprocessing forbids it, as they would outlive a killed parent; ours do not. This thread is
    no daemon meanwhile, or an executor's thread would be one, and cut off as it frees semaphores.
    """
    quiet = warnings.catch_warnings(action="ignore", category=DeprecationWarning)
    config = getattr(multiprocessing.current_process(), "_config", {})
    thread: Any = threading.current_thread()
    with _starting:
        kept, is_daemon = {**config}, thread.daemon
        thread._daemonic = False
        config.pop("daemon", None)
        if "authkey" in kept:  # another library's process may have one that can't be sent
            config["authkey"] = bytes(kept["authkey"])
        try:
            with quiet if context.get_start_method() == "fork" else contextlib.nullcontext():
                yield
        finally:
            thread._daemonic = is_daemon
            config.update(kept)


def _start_context(asked: Any) -> Any:
    """The multiprocessing context: the one asked for, else forkserver if it can be, else spawn.
    Raises ValueError for an unknown start method, TypeError for anything else."""
    if hasattr(asked, "get_context") and not isinstance(asked, type):
        return asked.get_context()  # a context gives itself, the module multiprocessing its default
    known = multiprocessing.get_all_start_methods()
    if asked is None:
        asked = "forkserver" if "forkserver" in known else "spawn"
    what = "mp_context, where it is no context,"
    _one_of(known)(what, _of_type(str)(what, asked))
    if asked == "forkserver" and _forkserver_answers():
        from multiprocessing import forkserver

        # The server hears of its children's ends by SIGCHLD, and inherits this thread's mask.
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        try:
            with contextlib.suppress(OSError):  # then `_Slot._start` spawns workers
                forkserver.ensure_running()  # without waiting until it is up
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context(asked)


def _forkserver_answers() -> bool:
    """Whether a forkserver can be asked for a worker, without waiting for one that is stopped. A
    new one imports nothing: each worker is to import the script itself (since Python 3.13.8 the
    server would, once for all of them, and up to 3.14.2 without the script's arguments)."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if getattr(server, "_preload_modules", None) == ["__main__"]:  # the default
        server.set_forkserver_preload([])
    return _answers(server._forkserver_pid)


def _cpus() -> int:
    """How many CPUs this process may use; from Python 3.13 on, as many as -X cpu_count says."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return getattr(os, "process_cpu_count", lambda: found)() or 1


# --- Runners: the pool ----------------------------------------------------------------------------

_TURN = 0.05  # seconds that a run may keep a slot while others have fewer than it
_SLOT_FILES = 14  # descriptors that a slot takes: the pair, the pidfd, the executor's
_FREE_FILES = 40  # descriptors that are left to the program and to a run itself
_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_left_behind: list[Any] = []  # in a forked process: what must not be closed there


class WorkerPool:
    """Worker processes that stay warm between runs, and may serve several runs at once.

    Use it as a context manager: `with WorkerPool(4) as pool: dag.run(executor=pool)`. Each worker
    runs one task at a time; runs that share the pool take turns. `max_workers` (at most 1000) is
    the number of CPUs this process may use unless given; `mp_context` a start method or a
    multiprocessing context (unless given: a server forked from this process where that is safe, see
    the README, else forkserver where it exists, else spawn); `initializer(*initargs)` runs in each
    worker before any DAG's module is imported. Workers start when they are needed. Runs that are
    handed to `submit` begin in order, at most `max_runs` at a time. A worker that has run
    `max_tasks_per_child` tasks is replaced (as in ProcessPoolExecutor; None: it is kept): that
    helps where a library leaks memory, or can be used only once in a process.

    Raises TypeError or ValueError for a wrong argument.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: multiprocessing.context.BaseContext | str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_runs: int = 16,
        max_tasks_per_child: int | None = None,
    ) -> None:
        at_least_one = _of_type(int, least=1)
        self.max_runs = at_least_one("max_runs", max_runs)
        most_tasks = _optional(math.inf, at_least_one)
        self._most_tasks = most_tasks.check("max_tasks_per_child", max_tasks_per_child)
        checked = _optional(_cpus(), at_least_one).check("max_workers", max_workers)
        self.max_workers: int = min(checked, 1000)
        _optional(None, _function).check("initializer", initializer)
        self._initializer = (initializer, tuple(_of_type(list, tuple)("initargs", initargs)))
        self._asked_context = mp_context
        if mp_context is not None:  # a wrong one is refused now, and a forkserver begins to start
            _start_context(mp_context)
        self._closed = False
        self._empty()

    def _empty(self) -> None:
        """Make the pool as it begins, without workers: also in a process that was just forked."""
        self._lock: Any = threading.RLock()  # `shutdown` asks whether this thread holds it
        self._ending = threading.RLock()
        self._idle: list[_Slot] = []
        self._count = 0  # of its slots: idle, lent, or about to start
        self._server: _ForkedServer | None = None
        self._most = self.max_workers  # as far as the limit of open files allows
        self._runners: set[_SlotRunner] = set()  # of all runs that use it
        self._slot_line: dict[_SlotRunner, None] = {}  # those that want a slot
        self._runs: _RunLine | None = None  # once it is needed
        self._kept_store: _Store | None = None  # of the latest run, open for the next one
        _pools.add(self)  # last, as another thread may fork at any moment

    def submit(self, dag: Dag, **options: Any) -> _RunFuture:
        """Put a run in line, recorded as `queued`; it begins in a thread of the pool.

        `options` are those of `Dag.run`, without `executor`, `max_workers`, `mp_context` and
        `wait`: a run whose DAG has `max_active_runs` active ones waits, and holds up no other DAG.
        Its tasks have the environment and directory of this call, however late it begins. Returns
        a `concurrent.futures.Future` of its DagRun that has `dag_id` and `run_id`; `cancel` closes
        a run that has not begun as failed, reason `cancelled`.

        Raises what `Dag.run` raises for a wrong graph, argument or conf; RuntimeError once the pool
        is shut down. What then keeps the run from beginning (a task that no worker finds; a full
        disk, if it is full for seconds) closes it as failed.
        """
        with _HeldSignals() as held:
            return self._run_line().submit(dag, options, held.call_due)

    def recover(self, dag: Dag, **options: Any) -> list[_RunFuture]:
        """Put in line the DAG's runs that lost their process, and return their futures: runs that
        `submit` had queued, or that a process's death or `shutdown(stop=True)` cut off; never one
        that somebody stopped, cancelled or cleared. Several processes that do so share the runs,
        and none runs twice: the future of one that another process has begun is cancelled.

        `options`: `db_path`, `pools`, `progress` and `stop`, as of `Dag.run`. Raises as `submit`.
        """
        with _HeldSignals():
            return self._run_line().recover(dag, options)

    def _run_line(self) -> _RunLine:
        with self._lock:
            self._runs = self._runs or _RunLine(self)
            return self._runs

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        # Others end it from outside: a Ctrl-C, asyncio's cancellation, a task's timeout or SIGTERM.
        ordinary = (Exception, SystemExit, GeneratorExit)
        self.shutdown(stop=kind is not None and not issubclass(kind, ordinary))

    def shutdown(self, wait: bool = True, cancel_futures: bool = False, stop: bool = False) -> None:
        """End all workers, once the submitted runs have ended. Other runs that use the pool fail.

        `cancel_futures`: runs that have not begun stay `queued` in the file, for `recover`, and
        their futures are cancelled; `stop`: besides, those that have begun are ended in order, and
        left for `recover`, too. It returns at once without `wait`, and where it would wait for its
        own caller: in a submitted run's thread (which calls its future's callbacks, too), in a
        signal handler during a run that uses the pool, or in a destructor that cut into it.
        """
        with _HeldSignals() as held:
            if self._runs is None:
                with self._lock:  # else a line that is just being made takes runs
                    self._closed = self._closed or self._runs is None
            runs = self._runs
            if runs is not None:
                runs.close(give_up=cancel_futures or stop, stop=stop)
            if self._lock._is_owned() or (runs is not None and (not wait or runs.is_within())):
                threading.Thread(target=self.shutdown).start()
                return
            if runs is not None:
                runs.drain(held.call_due)
            self._end_slots()

    def _end_slots(self) -> None:
        with self._ending:  # a second shutdown waits for the thread of a first one
            with self._lock:
                self._closed = True
                idle, self._idle = self._idle, []
                self._count -= len(idle)
                for runner in self._runners:
                    runner.wake()
            for slot in idle:  # their workers end side by side
                slot.dismiss()
            for slot in idle:
                slot.bury(grace=2.0)
            self._end_server()
            self._close_store()  # no run takes it any more

    def _store_of(self, path: str, take: bool = False) -> _Store | None:
        """The store that an earlier run left open, if it still belongs to the file at this path.
        `take`: nobody else gets it from now on."""
        with self._lock:
            store = self._kept_store
            if self._closed or store is None or store.path != path:
                return None
            if store.is_in_place():
                self._kept_store = None if take else store
                return store
            self._kept_store = None  # another file is at this path by now
        store.close()
        return None

    def _leave_store(self, store: _Store) -> None:
        """Keep a store open for the next run: whoever closes a file last has to copy its WAL."""
        to_close: _Store | None = store
        if store.sync():
            with self._lock:
                if not self._closed:
                    to_close, self._kept_store = self._kept_store, store
        if to_close is not None:  # the last one, unless the kept one is of the same file
            to_close.close(is_last=to_close is store or to_close.path != store.path)

    def _close_store(self) -> None:
        kept, self._kept_store = self._kept_store, None
        if kept is not None:
            kept.close()

    def _end_server(self) -> None:
        """End the forked server, unless it has workers left."""
        with self._lock:
            if not self._count and self._server is not None:
                self._server.close()
                self._server = None

    def _prepare_start(self, runner: _SlotRunner) -> Any:
        """Make ready what starts its workers: a _ForkedServer, or a multiprocessing context."""
        if self._closed:
            raise RuntimeError("the WorkerPool is shut down")
        interactive = runner.since > 0
        if self._asked_context is None and self._initializer[0] is None:
            # If there is no room for a process, the ways below say so. Subinterpreters can't fork.
            with self._lock, contextlib.suppress(ImportError, OSError, RuntimeError):
                if self._server is not None and self._server.serves(runner):
                    return self._server
                self._weed(runner, None)  # all idle ones that the server has forked
                self._end_server()
                if not self._count:
                    self._close_store()  # `_may_fork` allows no open database
                    if _may_fork():
                        self._server = _ForkedServer("fork" if interactive else None)
                        if self._server.serves(runner):
                            return self._server
        if interactive and self._asked_context is None:  # workers can't import a DAG from a cell
            for library in {"lightgbm", "polars", "torch", "xgboost"} & sys.modules.keys():
                _warn_of_fork(library)
            return _start_context("fork")
        return _start_context(self._asked_context)  # a forkserver begins to start now

    def _weed(self, runner: _SlotRunner, context: Any) -> None:
        """End idle workers that have died, or that don't know the DAG: they are another server's
        than `context`, or older than the notebook's cell that defines the DAG."""
        for slot in list(self._idle):
            if slot.server not in (None, context) or slot.born < runner.since or slot.has_ended():
                self._idle.remove(slot)
                self._count -= 1
                slot.bury()

    def _check_open(self, runner: _SlotRunner) -> None:
        if self._closed:  # only `_close_pools` closes a run's own pool so early
            what = "program ended" if runner._own_pool else "WorkerPool was shut down"
            raise RuntimeError(f"the {what} during the run")

    def _lend(self, runner: _SlotRunner, context: Any) -> _Slot | None:
        """A slot, or None: then the runner is in line, and runs that can spare one were woken."""
        with self._lock:
            self._check_open(runner)
            self._weed(runner, context)
            has_room = self._idle or self._count < self._most
            is_next = next(iter(self._slot_line), runner) is runner
            if not (is_next and has_room):
                if runner not in self._slot_line:
                    self._slot_line[runner] = None
                    for holder in self._runners:
                        if holder is not runner and holder.spare():
                            holder.wake()
                return None
            self._slot_line.pop(runner, None)
            found = self._idle.pop() if self._idle else None
            self._count += found is None
            self._wake_next()
        try:
            return found or _Slot(self, context)
        except BaseException:  # whatever it is: cleaned up after, and raised again
            with self._lock:
                self._count -= 1
            raise

    def _limit(self, runner: _SlotRunner) -> None:
        """Decide, for each run anew, how many workers there may be: they take descriptors."""
        free, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = self.max_workers
        if free != resource.RLIM_INFINITY:
            with contextlib.suppress(OSError):
                free -= len(os.listdir("/dev/fd"))
            self._most = max(1, min(self._most, self._count + (free - _FREE_FILES) // _SLOT_FILES))
        if self._most < self.max_workers:
            some = f"{self._most} of {self.max_workers} workers"
            runner.notes[f"{some} fit into the limit of open files (ulimit -n)"] = None

    def _leave_slot_line(self, runner: _SlotRunner) -> None:
        if runner in self._slot_line:
            with self._lock:
                self._slot_line.pop(runner, None)
                self._wake_next()

    def _wake_next(self) -> None:
        """Wake the first in line, and nobody else, if there is something for it."""
        if self._slot_line and (self._idle or self._count < self._most):
            next(iter(self._slot_line)).wake()

    def _give_back(self, slot: _Slot, runner: _SlotRunner) -> None:
        """Take back a slot that is free for any run, or dead."""
        with self._lock:
            keep = slot.state == "free" and not self._closed
            if runner in self._slot_line:  # whoever gives one back goes to the end of the line
                self._slot_line[runner] = self._slot_line.pop(runner)
            if keep:  # a slot that is still starting is lent last
                self._idle.insert(len(self._idle) if slot.joining is None else 0, slot)
            else:
                self._count -= 1
            self._wake_next()
        if not keep and slot.state != "dead":
            slot.bury(grace=2.0)
        if self._closed:
            self._end_server()


@functools.cache  # once for each: `warnings` forgets what was shown if any filter changes
def _warn_of_fork(library: str) -> None:
    """Warn of it: if it was used here, forked tasks wait for threads of it that they don't have."""
    what = f"once {library} was used here, a task that uses it hangs in its worker"
    remedy = "import the DAG from a module, or run(executor=ThreadPoolExecutor())"
    warnings.warn(f"{what}: {remedy}", RuntimeWarning, stacklevel=1)


def _close_pools() -> None:
    """At the interpreter's end: wait for runs in threads that are no daemons (for the runs alone:
    an executor's threads end later), then shut all pools down."""
    # A signal ends the wait, not the rest: the interpreter would wait for a worker that is left.
    signalled = contextlib.suppress(KeyboardInterrupt, SystemExit)
    with signalled:  # one signal ends the wait for all threads, each of which may have a pool
        for runner in [runner for pool in list(_pools) for runner in list(pool._runners)]:
            waits = not runner.thread.daemon and runner.thread is not threading.main_thread()
            while waits and runner in runner._pool._runners:
                time.sleep(0.01)
    for pool in list(_pools):
        while not pool._closed:
            with signalled:
                pool.shutdown()


# --- Runners: jobs in slots -----------------------------------------------------------------------

_QUICK = 0.002  # seconds; a job that takes less is quick, and the next one may be as well
_AHEAD = 8  # quick jobs for each worker that may wait in the queue
_STALL = 0.05  # seconds after which a job that idle workers left in the queue is sent again
_ANSWER = 0.5  # seconds within which a warm worker that is not stopped says which tasks it finds


class _SlotRunner(_Runner):
    """Lets a WorkerPool's slots pull jobs from one queue, and ends jobs that outlive their timeout.

    The kernel gives each job to one worker, which reports that it took the job before it runs it.
    So at any moment the runner knows which worker runs what, until one dies, whose last messages
    may be lost. Then the runner empties the queue. Once it has seen each living worker's TAKING
    byte at 0, the jobs that no worker has reported were lost with the dead one, and are sent again.
    """

    def __init__(self, pool: WorkerPool, own_pool: bool, dag: Dag, since: float) -> None:
        super().__init__()
        self.thread = threading.current_thread()
        self.dag, self._pool, self._own_pool = dag, pool, own_pool
        self.since = since  # workers that are older don't know the DAG
        if not own_pool:  # now, as it may be too late once the pool starts an executor
            _set_up_slots(by_executor=True)
        self._context = pool._prepare_start(self)
        self._slots: list[_Slot] = []
        # The tasks missing, and those found by name; None until a worker reports them.
        self._found: tuple[list[str], set[str]] | None = None
        self._failed_starts = 0
        self._has_enough = False  # it starts no more workers, as long as it has one
        self._events: list[tuple[_Attempt, _Outcome]] = []
        self._last_output: _Output = []
        self._info: dict[str, Any] = {}
        self._ours, self._theirs = (_Wire(end) for end in _socket_pair())  # the queue's two ends
        self._ours.socket.setblocking(False)
        self._numbers = itertools.count(1)
        self._unsent: collections.deque[tuple[_Attempt, _Job]] = collections.deque()
        self._out: dict[int, tuple[_Attempt, _Job]] = {}  # sent, and not reported as taken
        self._heard = 0.0  # when a worker last said something
        self._deaf = False  # workers that look idle left a job lying, and none has spoken since
        self._watch = self._looked = 0.0  # a clock that stops with this process; its last setting
        self._stuck: dict[_Slot, float] = {}  # since when, by `_watch`, each may be stopped
        self._streak = -1  # quick jobs in a row; below 0 for some time after a slow one
        self._suspects: set[int] = set()  # jobs that a dead worker may have taken
        self._unclear: list[_Slot] = []  # living workers that may have taken one of those
        self._death = ""  # how the dead worker ended, in words
        self._ending: dict[_Attempt, tuple[str, bool]] = {}  # to end once taken: (why, at once)
        self._poll = select.poll()
        self._watched: dict[int, _Slot] = {}  # by the descriptors of its pair and its sentinel
        self._poll.register(self._ours, select.POLLIN)  # for `wake`
        self._cpus = _cpus()
        with pool._lock:
            pool._runners.add(self)
            pool._limit(self)

    # Its beginning.

    def begin(self, info: dict[str, Any], tasks: _References, jobs: int, check: _Check) -> set[str]:
        info["most_tasks"] = self._pool._most_tasks
        self._info, self._tasks = info, tasks
        for slot in self._slots:  # there are some if this begins anew, with another run id
            self._join(slot)
        # Side by side, as each has to import the DAG's module.
        while len(self._slots) < jobs and self._lend():
            pass
        self._pool._leave_slot_line(self)  # it takes none before its run is recorded
        until = _monotonic() + _ANSWER
        while self._found is None:
            is_late = not self._slots or _monotonic() >= until  # warm workers are gone, or stopped
            if is_late and all(slot.served for slot in self._slots) and len(self._slots) <= jobs:
                self._lend()
            check()
            self.wait(_ANSWER)
        has_main = not self.since or any(slot.born for slot in self._slots)  # forked: see `_submit`
        return _found_by_name(info, *self._found, has_main)

    def _join(self, slot: _Slot) -> None:
        """Let its worker import the DAG; the first one that has says which tasks it finds."""
        slot.state = "asked"
        if slot.joining is not None:
            return  # it still owes an earlier run its answer, after which it is asked for this one
        slot.deadline, slot.joining = _monotonic() + _START_LIMIT, self._info
        slot.wire.folder = None  # it was that of an earlier run
        slot.send("join", self._info, self._tasks if self._found is None else ())

    def open_logs(self, folder: str, run_row: int) -> None:
        self._info["run_row"], self._ours.folder = run_row, folder
        for slot in list(self._slots):
            self._let_work(slot)

    def _let_work(self, slot: _Slot) -> None:
        """Once the run is recorded, give the slot's worker its log and the queue."""
        folder = self._ours.folder
        if not slot.is_idle or slot.log is not None or folder is None:
            return
        try:
            slot.log = _SlotLog(f"{folder}/log-{slot.pid}")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # one worker too many
                return self._fail_start(slot, f"a worker's log can't be opened: {error}")
            raise DatabaseError(f"{folder} can't be used: {error}") from None
        queue = self._theirs.fileno() if _pulls() else None
        slot.send("work", slot.log.path, self._info["run_row"], _pulls(), file=queue)
        slot.lent = _monotonic()

    # Slots that come and go.

    def spare(self) -> list[_Slot]:
        """Slots that the run could let go: those that it doesn't need, and those beyond its fair
        share. Threads of other runs ask this, too, under the pool's lock."""
        mine = [slot for slot in self._slots if slot.spoilt is None]
        able = sorted((s for s in mine if s.state == "serving"), key=lambda s: not s.is_idle)
        surplus = math.ceil(len(mine) - self._pool._most / len(self._pool._runners))
        if not (self._out or self._unsent or self in self._pool._slot_line):
            surplus = max(surplus, sum(slot.is_idle for slot in able))
        return able[: max(0, surplus)] if self._found is not None else []

    def _lend(self) -> bool:
        if len(self._slots) >= self._pool._most or (self._has_enough and self._slots):
            return False
        try:
            slot = self._pool._lend(self, self._context)
        except OSError as error:
            if self._slots:
                return False  # the run goes on with the slots that it has
            hint = ""
            try:
                os.getcwd()
            except FileNotFoundError:
                hint = ": the working directory was deleted"
            if isinstance(error, BlockingIOError):
                hint = ": its limit of processes is reached (ulimit -u, or the container's)"
            # The error of a full /tmp names a file.
            is_full = error.errno == errno.ENOSPC and error.filename is None
            if sys.platform == "linux" and (is_full or not os.access("/dev/shm", os.W_OK)):
                hint = ": multiprocessing needs a /dev/shm that can be written to"
            if getattr(threading, "_SHUTTING_DOWN", False):
                hint = ": the main program has ended: let it wait for its threads"
            none = UnreachableTask(f"no worker process could be started: {error}{hint}")
            none._may_pass = True
            raise none from None
        if slot is None:
            return False
        self._slots.append(slot)
        for descriptor in (slot.wire.fileno(), slot.sentinel):
            self._watched[descriptor] = slot
            self._poll.register(descriptor, select.POLLIN)
        self._join(slot)
        return True

    def _let_go(self, slot: _Slot, free: bool = False) -> None:
        """Give a slot back to the pool, `free` for any run, or dead."""
        self._slots.remove(slot)
        for descriptor in (slot.wire.fileno(), slot.sentinel):
            if self._watched.pop(descriptor, None) is not None:
                self._poll.unregister(descriptor)
        if free:
            slot.state, slot.spoilt = "free", None
        else:
            slot.bury()
        if slot.log is not None:  # its output is another run's from here, or nobody's
            slot.log.close()
            slot.log = None
        self._pool._give_back(slot, self)

    def _hand_over(self, now: float) -> None:
        """Let as many slots go as other runs wait for, and as can be spared."""
        line = self._pool._slot_line
        wanted = len(line) - (self in line) - len(self._pool._idle)
        wanted -= sum(slot.spoilt is not None for slot in self._slots)
        spare = [slot for slot in self.spare() if slot.lent + _TURN <= now]
        for slot in spare[: max(0, wanted)]:
            slot.spoilt = ""  # it leaves after its job
            slot.send("leave")

    # Jobs.

    def room(self, jobs: int) -> int:
        working = [slot for slot in self._slots if slot.state == "serving" and slot.spoilt is None]
        waiting = len(self._out) + len(self._unsent)
        # Deaf workers count again once no job lies in the queue: else none would ever be sent.
        idle = 0 if self._deaf and waiting else sum([slot.is_idle for slot in working])
        coming = sum([slot.state == "asked" or slot.is_tidying for slot in self._slots])
        lacking = jobs + waiting - idle - coming
        while lacking > 0 and self._lend():
            lacking -= 1
        if lacking <= 0:
            self._pool._leave_slot_line(self)
        ahead = _AHEAD * len(working) if _pulls() and self._streak > 0 else 0
        return max(0, min(jobs, idle + ahead - waiting))

    def _busy(self) -> int:
        return sum([slot.attempt is not None for slot in self._slots])

    def is_free(self) -> bool:
        return not (self._out or self._unsent) and any(slot.is_idle for slot in self._slots)

    def start(self, attempt: _Attempt, job: _Job) -> None:
        self._unsent.append((attempt, job))
        if len(self._unsent) == 1:  # at once: what the scheduler does next may take a while
            self._flush()

    def _flush(self) -> None:
        """Put jobs into the queue, as long as there is room."""
        while self._unsent:
            attempt, job = self._unsent[0]
            number = next(self._numbers)
            # After an eager job its worker polls: in a chain of quick jobs the next comes at once.
            eager = self._streak > 0 and not self._out and len(self._unsent) == 1
            try:
                self._send((number, eager and not self._busy(), *job))
                self._out[number], self._heard = (attempt, job), _monotonic()
            except (BlockingIOError, ConnectionError):
                return  # the queue is full; or a worker is dead, which is noticed elsewhere
            except OSError as error:
                why = f"the job could not be sent: {error}"
                self._events.append((attempt, _Outcome("failed", why)))
            self._unsent.popleft()

    def _send(self, message: tuple[Any, ...]) -> None:
        if _pulls():
            return self._ours.send(message)
        for slot in self._slots:
            if slot.is_idle and not slot.shared[_TAKING]:
                slot.wire.folder = self._ours.folder
                slot.wire.send(("job", *message))
                slot.shared[_TAKING] = 1  # as a worker that pulls does itself
                return
        raise BlockingIOError  # as a full queue does

    def _recall(self) -> list[tuple[_Attempt, _Job]]:
        """Take back the jobs that lie in the queue: what is received here can never start."""
        return [self._out.pop(data[0]) for data, _ in iter(self._theirs.receive, None)]

    def withdraw(self) -> list[_Attempt]:
        taken = [*self._recall(), *self._unsent]
        self._unsent.clear()
        return [attempt for attempt, _ in taken]

    def _send_again(self, jobs: Sequence[tuple[_Attempt, _Job]]) -> None:
        for attempt, job in reversed(jobs):
            if attempt in self._ending:  # it has not begun, and now never will
                reason, _ = self._ending.pop(attempt)
                self._events.append((attempt, _Outcome("failed", reason, terminated=True)))
            else:
                self._unsent.appendleft((attempt, job))

    # What happens.

    def wait(self, timeout: float) -> list[tuple[_Attempt, _Outcome]]:
        waiting = self._pool._slot_line  # runs that wait for a slot
        if waiting:
            self._hand_over(_monotonic())
        self._flush()
        until = _monotonic() + timeout
        while not (self._events or self._listen(until)):  # workers only reported jobs as taken
            if self.wanted or self._unsent or waiting:
                break  # as the queue has room again
        now = _monotonic()
        for slot in list(self._slots):
            if slot.deadline <= now:
                slot.shared[_HEED] = 1  # else it may take another job, and that is ended
                self._hear(slot)
            if slot.deadline <= now and slot in self._slots:
                self._overdue(slot)
        if self._suspects:
            self._settle_suspects()
        if self._out:
            self._look_for_stalled(now)
        else:
            self._stuck.clear()  # no job is out that they could hold up
        self._pool._check_open(self)
        self._flush()
        ended, self._events = self._events, []
        return ended

    def _listen(self, until: float) -> bool:
        """Sleep until a worker sends a message, or something is due; handle the messages. Returns
        False if they reported only that workers took jobs."""
        now = _monotonic()
        times = [until, *[slot.deadline for slot in self._slots]]
        if self._suspects:
            times.append(now + 0.001)
        elif _pulls() and self._out and any(slot.is_idle for slot in self._slots):
            times.append(self._heard + _STALL)
        if self._pool._slot_line:
            times += [slot.lent + _TURN for slot in self.spare() if slot.lent + _TURN > now]
        found = []
        # After quick jobs, poll where a CPU is free: the next outcome comes at once.
        if self._streak > 0 and (busy := self._busy()) < self._cpus and (busy or self._out):
            found = _linger(lambda: self._poll.poll(0))
        found = found or self._poll.poll(max(0.0, min(times) - now) * 1000)
        is_more = not found
        for descriptor, _ in found:
            slot = self._watched.get(descriptor)
            if descriptor == self._ours.fileno():
                self._ours.socket.recv(1000)  # from `wake`
                is_more = True
            elif slot is not None:
                is_more |= self._hear(slot)
                if descriptor == slot.sentinel and slot in self._slots:
                    self._lose(slot)
                    is_more = True
        return is_more

    def _hear(self, slot: _Slot) -> bool:
        """Handle a worker's messages. Returns False if they reported only that it took a job."""
        is_more = False
        for kind, fields in slot.receive():
            is_more |= kind != "took"
            self._heard, self._deaf = _monotonic(), False
            self._stuck.pop(slot, None)
            try:
                getattr(self, f"_on_{kind}")(slot, *fields)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                if not (why := _of_replaced()):
                    raise
                raise UnreachableTask(f"a worker can't be understood: {error}{why}") from None
            if slot not in self._slots:
                return True
        if slot.gone and not slot.has_ended(timeout=1.0):  # only its end of the pair is closed
            why = "the task has closed its descriptors, or called os.exec"
            slot.reason = slot.reason or f"ended, as its worker can't be heard any more: {why}"
        if slot.gone or (slot.spoilt and slot.attempt is None):
            self._lose(slot)
            return True
        return is_more

    # What workers say.

    def _on_joined(self, slot: _Slot, error: str | None, edited: str | None, found: Any) -> None:
        joined, slot.joining = slot.joining, None
        if joined is not None and joined is not self._info:
            return self._join(slot)  # it has answered an earlier run, and is asked for this one
        if error is not None:
            return self._fail_start(slot, error)
        if edited is not None:
            is_here = self._info["identity"] == _file_identity(self._info["fileloc"])
            if is_here and slot.served:  # a new worker imports the file's present version
                return self._let_go(slot)
            self.notes[edited] = None
        self._found = self._found or found
        slot.served, slot.state, slot.deadline = True, "serving", math.inf
        self._let_work(slot)

    def _on_left(self, slot: _Slot) -> None:
        if slot.spoilt == "":  # else it left an earlier run, which gave it back in `close`
            self._let_go(slot, free=True)

    def _on_called(self, slot: _Slot, spoilt: str | None, log_end: int) -> None:
        self._last_output += slot.log.finish(slot.attempt, log_end)
        slot.state, slot.attempt, slot.deadline = "serving", None, math.inf
        slot.callbacks, slot.spoilt = None, spoilt or slot.spoilt

    def _on_took(self, slot: _Slot, number: int) -> None:
        attempt, job = self._out.pop(number)
        if not _pulls():
            slot.shared[_TAKING] = 0
        slot.attempt, slot.has_taken, attempt.pid, attempt.losses = attempt, True, slot.pid, 0
        self._failed_starts = 0
        attempt.take()
        if attempt.pokes:
            slot.log.begin(slot.log.start, *attempt.log_seen)
        slot.timeout = math.inf if job.timeout is None else job.timeout
        slot.deadline = _monotonic() + slot.timeout
        if attempt in self._ending:
            self.end(attempt, *self._ending.pop(attempt))

    def _on_done(self, slot: _Slot, fields: Any, taken: int, values: Sequence[bytes] = ()) -> None:
        """The worker ended its job, and took the one of the number `taken` by now (0: none)."""
        outcome, attempt = _Outcome(*fields), slot.attempt
        if values:
            outcome = _with_values(outcome, values)
        assert attempt is not None  # it reported that it took it
        self._streak = self._streak + 1 if outcome.took < _QUICK else -_AHEAD
        if slot.reason is not None:
            # A task that was told to end may catch that and return: it has failed all the same.
            # What counts is a success from before and, at the task's own timeout, a skip.
            slot.spoilt = slot.reason
            late, skips = slot.timed_out, outcome.status == "skipped"
            if not (late and skips) and (outcome.status != "success" or outcome.until > slot.told):
                text = f"{outcome.error}\n{slot.reason}" if outcome.error else slot.reason
                kept = () if outcome.status == "success" else outcome.xcoms
                outcome = outcome._replace(
                    status="failed", error=text, xcoms=kept, items=(), note={}, terminated=not late
                )
        elif outcome.spoilt is not None or outcome.terminated:
            slot.spoilt = outcome.spoilt or "it was told to end"
            outcome = outcome._replace(unasked=outcome.terminated)
        self._last_output += slot.log.finish(attempt, outcome.log_end, outcome.output)
        self._events.append((attempt, outcome))
        slot.attempt, slot.reason, slot.deadline = None, None, math.inf
        if outcome.held:
            slot.state, slot.attempt = "held", attempt
        if taken:
            self._on_took(slot, taken)

    # Callbacks.

    def call_back(self, due: _Callback, job: tuple[Any, ...] | None = None) -> bool:
        if job is not None and not self.is_free():
            self.room(1)
            return False
        for slot in self._slots:
            holds_it = slot.state == "held" and slot.attempt is due.attempt
            can_take = slot.is_idle and not slot.shared[_TAKING]
            if (job is None and holds_it) or (job is not None and can_take):
                self._let_call(slot, due, job)
                return True
        return False

    def _let_call(self, slot: _Slot, due: _Callback, job: tuple[Any, ...] | None) -> None:
        slot.state, slot.attempt, slot.callbacks = "calling", due.attempt, None
        if due.name is not None:
            is_of_dag, task_id = due.name.startswith("dag_"), due.attempt.instance.task_id
            whose = f"DAG {self.dag.dag_id!r}" if is_of_dag else f"task {task_id!r}"
            slot.callbacks = f"{due.name.removeprefix('dag_')} of {whose}"
        slot.deadline = _monotonic() + _CALLBACK_LIMIT
        slot.send("call", bool(slot.spoilt), job, due.name, due.reason, due.facts)

    def calling(self) -> list[_Attempt]:
        return [s.attempt for s in self._slots if s.attempt and s.state in ("held", "calling")]

    # Ends.

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        for slot in self._slots:
            if slot.attempt is attempt and slot.state not in ("held", "calling"):
                slot.ask_to_end(reason)
                if now:
                    slot.signal_group(signal.SIGKILL)
                return
        if any(attempt is each for each, _ in self._out.values()):
            self._ending[attempt] = (reason, now)

    def _overdue(self, slot: _Slot) -> None:
        """The slot's job, the end of that job, its callbacks or its start took too long."""
        slot.deadline = math.inf
        if slot.attempt is not None and slot.reason is None and slot.state != "calling":
            return slot.ask_to_end(f"timeout after {slot.timeout:g} s")
        slot.signal_group(signal.SIGKILL)
        if slot.callbacks is not None:
            slot.reason = f"it took more than {_CALLBACK_LIMIT:g} s and was ended"
        elif not slot.served and slot.joining is self._info:  # others are replaced: see `_lose`
            self._fail_start(slot, f"a worker did not start within {_START_LIMIT:g} s")

    def _lose(self, slot: _Slot) -> None:
        """A slot's worker is dead, or must not go on: end it, and decide about its job."""
        # First, so that nobody writes to its log. `bury` kills what left the group: that is slow.
        slot.signal_group(signal.SIGKILL, session=False)
        if slot.has_ended(timeout=1.0):
            for kind, fields in slot.receive():
                if kind in ("took", "done"):  # its job may have ended before it did
                    getattr(self, f"_on_{kind}")(slot, *fields)
        attempt, is_done = slot.attempt, slot.state in ("held", "calling")
        if attempt is not None:
            self._last_output += slot.log.take(attempt, slot.log.size())
        self._let_go(slot)
        death = _end_of(slot.exitcode)
        never_served = not slot.served and slot.joining is self._info  # it was started for this run
        # It died idle and never took a job, though some wait: its successors might do so for ever.
        took_none = slot.served and self._out and not (slot.has_taken or slot.shared[_TAKING])
        no_use = slot.spoilt is None and (never_served or took_none)  # else it is just replaced
        if attempt is not None and not is_done:
            unasked = slot.reason is None and slot.exitcode == -signal.SIGTERM
            why = slot.reason or death
            was_told = unasked or (slot.reason is not None and not slot.timed_out)
            lost = _Outcome("failed", why, terminated=was_told, unasked=unasked)
            self._events.append((attempt, lost))
        elif attempt is not None and slot.callbacks is not None:  # worded as in `_call_back`
            attempt.log_parts += 1
            said = f"liteflow: {slot.callbacks} failed: {slot.reason or death}\n"
            self._last_output.append((attempt, attempt.log_parts, said))
        elif no_use or slot.exitcode == _UNGUARDED:
            told = ", the program's standard error tells why" if slot.exitcode == 1 else ""
            what = "a worker ended as it started, or imported the script"
            self._fail_start(slot, f"{what}: {death}{told}")
        if self._out:  # the worker may have taken a job, and died before it reported that
            self._send_again(self._recall())
            self._suspects, self._death = set(self._out), death
            self._unclear = list(self._slots)

    def _settle_suspects(self) -> None:
        """Once each living worker has reported what it took, the other suspects went down with the
        dead one: send them again, but fail a job that three workers in a row died of, as they do
        where its arguments need more memory than there is."""
        self._unclear = [s for s in self._unclear if s in self._slots and s.shared[_TAKING]]
        if self._unclear:
            return
        for slot in list(self._slots):
            self._hear(slot)
        if self._unclear:
            return  # `_hear` met another death, and `_lose` began anew
        lost = [self._out.pop(number) for number in sorted(self._suspects & self._out.keys())]
        self._suspects = set()
        for attempt, _ in lost:
            attempt.losses += 1
            if attempt.losses == 3:
                why = f"three workers died as they took it: {self._death}"
                self._ending.setdefault(attempt, (why, False))
        self._send_again(lost)

    def _look_for_stalled(self, now: float) -> None:
        """Send a job again that lies in the queue though workers are idle: the one worker that it
        woke has died, left or been stopped. Kill a worker that stays stopped, idle or between
        receiving a job and reporting it, for the longest timeout of the jobs that are out."""
        # Before `_recall`, which takes jobs out of `_out` for a moment.
        limits = [job.timeout for _, job in self._out.values() if job.timeout is not None]
        limits += [_GRACE for attempt, _ in self._out.values() if attempt in self._ending]
        if any(at_once for _, at_once in self._ending.values()):
            limits = [0.5]  # seconds, in which a worker that is not stopped reports
        # A time for which this process was stopped does not count: workers may have been, too.
        self._watch += min(now - self._looked, _GLANCE)
        self._looked = now
        idle = any(slot.is_idle for slot in self._slots)
        if _pulls() and idle and now > self._heard + _STALL and not self._suspects:
            lying = self._recall()
            self._heard, self._deaf = now, bool(lying)
            self._send_again(lying)
        for slot in self._slots if limits else ():
            if not (slot.shared[_TAKING] or (self._deaf and slot.is_idle)):
                self._stuck.pop(slot, None)
            elif self._watch > self._stuck.setdefault(slot, self._watch) + max(limits):
                slot.signal_group(signal.SIGKILL)

    def _fail_start(self, slot: _Slot, why: str) -> None:
        """A worker could not start. The third in a row, or any before the run is recorded, ends the
        run by UnreachableTask; but where other workers have started, the run goes on with those."""
        if slot.exitcode == _UNGUARDED:
            raise UnreachableTask(
                "the script, or a module, starts a run while a worker imports it: put the call of "
                'run() or cli() below `if __name__ == "__main__":`, or into a function'
            )
        # A worker that reported no error may have been ended by a signal to the whole program. That
        # may pass. Its exit code is then 1, say (Ctrl-C as it imported), or 255 (no forkserver).
        may_pass = slot.exitcode not in (None, _BROKEN)
        if slot in self._slots:
            slot.spoilt = why
            self._lose(slot)
        self._failed_starts += 1
        if self._ours.folder is None or self._failed_starts >= 3:
            if any(each.state != "asked" for each in self._slots):
                self._has_enough = True
                self.notes[f"the run went on with fewer workers: {_last_line(why)}"] = None
                return
            more = _of_replaced()  # `_end_of` may have put it into `why`
            error = UnreachableTask(why if more in why else f"{why}{more}")
            error._may_pass = may_pass
            raise error

    _on_failed = _fail_start  # a worker's last message, where it ends before it can join a run

    # Output, and its own end.

    def output(self, least: int | None = None) -> _Output:
        for slot in () if least is None else self._slots:
            if slot.attempt is None or (size := slot.log.size()) < least:
                continue
            # A worker that has sent no message yet was still at that job with its log so long.
            if not _is_readable(slot.wire.fileno(), 0):
                self._last_output += slot.log.take(slot.attempt, size, runs=True)
        fresh, self._last_output = self._last_output, []
        return fresh

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full, which wakes the runner, too
            self._theirs.socket.send(b"!", socket.MSG_DONTWAIT)

    def dismiss(self) -> None:
        for slot in self._slots if self._own_pool else ():
            if slot.is_idle and slot.server is not None:  # an executor would call itself broken
                slot.wire.close()

    def close(self) -> None:
        for slot in list(self._slots):
            if leaves := slot.spoilt == "":  # it was told to leave, and has not answered yet
                slot.spoilt = None
            # A worker that is still starting stays: else runs shorter than a start never get one.
            starts = slot.state == "asked" and not (self._own_pool or slot.spoilt)
            free = slot.is_idle and not self._out
            if free and not (leaves or self._own_pool):  # its own pool ends them, below
                slot.send("leave")
            self._let_go(slot, free=free or starts)
        if self._own_pool:
            self._pool.shutdown()
        self._pool._leave_slot_line(self)
        with self._pool._lock:
            self._pool._runners.discard(self)
        self._ours.close()
        self._theirs.close()


def _end_of(exitcode: int | None) -> str:
    """How a process ended, for people."""
    if exitcode is None:
        return "the worker was lost"
    if exitcode >= 0:
        told = ": the end of its log tells why, unless the task has closed its descriptors"
        why = (_of_replaced() or told) if exitcode == _BROKEN else ""
        return f"worker exited with code {exitcode} before reporting{why}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"killed by signal {-exitcode}"


def _of_replaced() -> str:
    """What to add to a worker's failure if new workers import another version of this module."""
    is_same = _file_identity(__file__) == _own_identity
    return "" if is_same else f": {__file__} was replaced: restart the program"


def _found_by_name(
    info: dict[str, Any], missing: Sequence[str], named: set[str], has_main: bool
) -> set[str]:
    """The ids of tasks found by function name alone. Raises UnreachableTask if any is missing;
    `has_main`: the workers have this program's `__main__`."""
    if not missing:
        return named
    few, (module, dag_id, earlier) = _few(map(repr, missing), 5), info["key"]
    module = repr(module) if module else "of its function"
    often = f" {earlier + 1} times" if earlier else ""  # a `@dag` may be called again below a guard
    s, it = ("s", "them") if len(missing) > 1 else ("", "it")
    lost = f"task{s} {few} can't be found in a worker process"
    if info["key"][0] == "__main__" and not has_main:  # a notebook's, or a zip's
        raise UnreachableTask(
            f"{lost}, where `__main__` is another program: import the DAG from a module that it has"
        )
    raise UnreachableTask(
        f"{lost}: importing the module {module} does not "
        f"build DAG {dag_id!r} with {it}{often}, and without the DAG only a function or class of a "
        "module is found. Build the DAG at the top level of its module, alike at each import, not "
        'below `if __name__ == "__main__":`, or define the functions and classes there'
    )


# --- Runners: foreign executors, and this process -------------------------------------------------


class _ExecutorRunner(_Runner):
    """Runs each job as one `submit` to a concurrent.futures.Executor that somebody else made.

    It can neither end a task nor capture its output, and so applies no execution_timeout.
    """

    remote = True

    def __init__(self, executor: Any) -> None:
        super().__init__()
        self._executor: concurrent.futures.Executor = executor
        # Attempts that ended, with their futures, or with outcomes where there is no future.
        self._events: queue.SimpleQueue[tuple[_Attempt | None, Any]] = queue.SimpleQueue()
        self._futures: dict[_Attempt, Future[bytes]] = {}
        # By future: whose callbacks it runs, and until when they may, once no attempts are left.
        self._callbacks: dict[Future[bytes], tuple[_Attempt, float]] = {}

    def begin(self, info: dict[str, Any], tasks: _References, jobs: int, check: _Check) -> set[str]:
        # Workers keep their own environment, and know a run by its token. `log_db`: for `log_url`.
        here = {"environ": None, "sys_path": None, "db_path": None, "log_db": info["db_path"]}
        self._info = marshal.dumps({**info, **here, "token": os.urandom(8)})  # goes with each job
        asked = self._submit(None, "find", tasks)
        while not asked.done():
            check()
            self.wait(0.5)
        missing, named = marshal.loads(asked.result())
        return _found_by_name(info, missing, named, has_main=False)  # it may be elsewhere

    def _submit(self, attempt: _Attempt | None, *message: Any) -> Future[bytes]:
        future = self._executor.submit(_run_remotely, self._info, marshal.dumps(message))
        future.add_done_callback(lambda ended: self._events.put((attempt, ended)))
        return future

    def start(self, attempt: _Attempt, job: _Job) -> None:
        attempt.take()
        try:
            self._futures[attempt] = self._submit(attempt, "run", *job)
        except Exception as error:  # whatever the executor raises: broken, shut down
            why = f"the executor took no task: {_brief(error)}"
            self._events.put((attempt, _Outcome("failed", why)))

    def is_free(self) -> bool:
        return not self._futures

    def wait(self, timeout: float) -> list[tuple[_Attempt, _Outcome]]:
        events: list[tuple[_Attempt, _Outcome]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                attempt, what = self._events.get(timeout=timeout)
                timeout = 0  # for the others that are there
                if attempt is None:
                    continue  # it was woken, or a callback has ended
                if isinstance(what, _Outcome):
                    events.append((attempt, what))
                elif self._futures.pop(attempt, None) is not None:
                    fields, why = _answer_of(what)
                    lost = _Outcome("failed", f"the executor lost the task: {why}")
                    events.append((attempt, lost if fields is None else _Outcome(*fields)))
        return events

    def end(self, attempt: _Attempt, reason: str, now: bool = False) -> None:
        future = self._futures.get(attempt)
        if future is not None and not future.done():  # else its end is among the events
            del self._futures[attempt]
            future.cancel()
            self._events.put((attempt, _Outcome("failed", reason, terminated=True)))

    def call_back(self, due: _Callback, job: tuple[Any, ...] | None = None) -> bool:
        if job is None:
            return False
        try:
            asked = self._submit(None, "call", job, due.name, due.reason, due.facts)
            self._callbacks[asked] = due.attempt, _monotonic() + _CALLBACK_LIMIT
        except Exception as error:  # whatever the executor raises: no callback, then
            self.notes[f"the executor took no callback: {_brief(error)}"] = None
        return True

    def calling(self) -> list[_Attempt]:
        for future, (attempt, limit) in list(self._callbacks.items()):
            if future.done():
                del self._callbacks[future]
                _, why = _answer_of(future)
                if why is not None:
                    self.notes[f"the executor lost a callback: {why}"] = None
            elif self._futures:  # it may wait behind attempts in the executor, and not have begun
                self._callbacks[future] = attempt, _monotonic() + _CALLBACK_LIMIT
            elif limit < _monotonic():  # it can't be ended, but nobody waits for it any longer
                future.cancel()
                del self._callbacks[future]
                self.notes[f"a callback did not end within {_CALLBACK_LIMIT:g} s"] = None
        return [attempt for attempt, _ in self._callbacks.values()]

    def wake(self) -> None:
        self._events.put((None, None))

    def close(self) -> None:
        _remote_run.cache_clear()  # threads of this process may have filled it


def _answer_of(future: Future[bytes]) -> tuple[Any, str | None]:
    """What a worker answered, and None; or None, and why the executor lost the answer."""
    try:
        return marshal.loads(future.result()), None
    except BaseException as lost:  # of the executor, or of unpickling on its way
        return None, _brief(lost)


class _TimeLimit:
    """Around a task's own code: raises AirflowTaskTimeout in it after `timeout` seconds.

    Not by SIGALRM: a process has one alarm, which may be the program's (a test's own limit, say).
    The timer is made before that code begins and ended by `close` after it, where the exception can
    cut nothing in two, such as the taking of a lock that the timer's thread waits for.
    """

    _timer: threading.Timer | None = None

    def __init__(self, timeout: float | None) -> None:
        self.timeout, self.in_task, self.is_due = timeout, False, False
        if timeout is not None and hasattr(signal, "pthread_kill"):
            with contextlib.suppress(ValueError):  # this needs the main interpreter's main thread
                self._before = signal.getsignal(signal.SIGVTALRM)
                signal.signal(signal.SIGVTALRM, self._on_time)
                seconds = min(timeout, threading.TIMEOUT_MAX)
                self._timer = threading.Timer(seconds, self._ring, [threading.get_ident()])
                self._timer.daemon = True

    def __enter__(self) -> None:
        self.in_task = True
        if self._timer is not None:
            self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self.in_task = False

    def _ring(self, thread: int) -> None:
        self.is_due = True
        signal.pthread_kill(thread, signal.SIGVTALRM)

    def _on_time(self, signum: int, frame: Any) -> None:
        if self.is_due:
            self.is_due = False
            if self.in_task:
                raise AirflowTaskTimeout(f"timeout after {self.timeout:g} s")
        elif callable(self._before):  # a profiler's tick, or the limit of a task around this one
            self._before(signum, frame)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            if self._timer.is_alive():
                self._timer.join()  # first: without the handler its signal kills the process
            signal.signal(signal.SIGVTALRM, self._before)


class _InProcessRunner(_ExecutorRunner):
    """Runs each job in this process, within `start`: for `dag.test()` and a debugger."""

    remote = False

    def __init__(self, dag: Dag) -> None:
        super().__init__(None)
        self._run = _WorkerRun({}, dag)
        self._held: dict[_Attempt, _Execution] = {}  # the last attempt, for its callbacks

    def begin(self, info: dict[str, Any], tasks: _References, jobs: int, check: _Check) -> set[str]:
        self._run.info = info
        return set()

    def open_logs(self, folder: str, run_row: int) -> None:
        self._run.info["run_row"] = run_row

    def room(self, jobs: int) -> int:
        return min(jobs, 1) if self._events.empty() else 0

    def start(self, attempt: _Attempt, job: _Job) -> None:
        attempt.pid = os.getpid()
        attempt.take()
        execution = _Execution(self._run, job)
        with contextlib.closing(_TimeLimit(job.timeout)) as guard:
            outcome = _run_job(execution, guard)
        if outcome.error is not None:
            print(f"{_label_of(job.task_id, job.map_index)}: {outcome.error}", file=sys.stderr)
        self._held = {attempt: execution}
        interrupted = isinstance(execution.exception, KeyboardInterrupt)
        if not job.holds:
            execution.forget_failure()
        self._events.put((attempt, outcome._replace(terminated=interrupted, held=job.holds)))

    def call_back(self, due: _Callback, job: tuple[Any, ...] | None = None) -> bool:
        execution = self._held.get(due.attempt)
        _call_due(self._run, execution, job, due.name, due.reason, due.facts)
        return job is not None or execution is not None


# --- Run: owners ----------------------------------------------------------------------------------

_owner_files: dict[str, int] = {}  # by owner: the descriptor of its locked file, in this process


@contextlib.contextmanager
def _owned_folder(path: str) -> Iterator[tuple[str, str]]:
    """Make an owner, and its folder beside the database, for workers' logs (/tmp is often memory).
    Yields both; removes the folder at the end. Raises DatabaseError.

    The folder holds a file `owner`, which this process keeps locked. Runs name their owner in their
    rows: it is alive while its file is locked, else dead. So a death is known at once, also in
    another container that shares the folder, and whatever the clock says.
    """
    _sweep(path)
    # Users who may read the database may open the file, to see whether it is locked, but not list
    # the folder. Others must not open it: a lock of theirs would make a dead owner look alive.
    mode = 0o711
    with contextlib.suppress(OSError, AttributeError):  # Windows has no geteuid
        database = os.stat(path)
        mode = 0o700 if database.st_uid == os.geteuid() and not database.st_mode & 0o044 else mode
    while True:
        owner = os.urandom(8).hex()
        folder = f"{path}-run-{owner}"
        file = -1
        try:
            os.mkdir(folder, mode)  # tests of tasks often patch pathlib's methods, seldom os
            file = os.open(f"{folder}/owner", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # Whatever the umask is: to users who can't open the file a dead owner looks alive.
            with contextlib.suppress(OSError):  # the file system may not support modes
                os.chmod(f"{folder}/owner", 0o644)
                os.chmod(folder, mode)
            os.write(file, json.dumps({"liteflow": __version__}).encode())
            if _lock(file, shared=False) and os.access(f"{folder}/owner", os.F_OK):
                break
        except OSError as error:
            if file >= 0:
                os.close(file)
            _remove_folder(folder)
            if isinstance(error, FileNotFoundError) and os.path.exists(path):
                continue  # another process swept the folder before the file was in it
            raise DatabaseError(f"{folder} can't be made: {error.strerror}") from None
        os.close(file)  # another process swept the folder before the file was locked
    _owner_files[owner] = file
    try:
        yield owner, folder
    finally:
        _remove_folder(folder)
        os.close(_owner_files.pop(owner))


def _let_go_in_child() -> None:
    """In a forked process, close the locked files and drop the slots: they are its parent's."""
    while _owner_files:
        os.close(_owner_files.popitem()[1])
    _let_go_of_slots()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _lock(file: int, shared: bool) -> bool:
    """Lock an open file, without waiting. Returns False if somebody else's lock is in the way."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, ImportError) as error:
        return isinstance(error, ImportError)  # Windows has no fcntl; no worker runs there
    return True


def _open_mark(folder: str) -> io.BufferedReader:
    """Open the file `owner` in a folder, but follow no link, nor wait at a pipe. Raises OSError."""
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return open(f"{folder}/owner", "rb", opener=lambda file, flags: os.open(file, flags | more))


def _owner_lives(path: str, owner: str | None) -> bool:
    """Whether an owner of runs in the database at `path` is alive."""
    if owner in _owner_files:
        return True
    if not re.fullmatch(r"[0-9a-f]{16}", owner or ""):
        return False
    try:
        with _open_mark(f"{path}-run-{owner}") as mark:
            return not _lock(mark.fileno(), shared=True)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it may not be opened, say: better to refuse a run than to run it twice
        return True


def _sweep(path: str) -> None:
    """Remove the folders of this database's dead owners. Follow no link; leave users' folders."""
    folder, name = os.path.split(path)
    names: list[str] = []
    with contextlib.suppress(OSError):  # the folder may be writable, but not readable
        # By name first: a folder like /tmp may hold thousands of other files.
        names = [each for each in os.listdir(folder) if each.startswith(f"{name}-run-")]
    for each in names:
        owned = os.path.join(folder, each)
        if re.fullmatch(r"[0-9a-f]{16}", each.removeprefix(f"{name}-run-")):  # liteflow made it
            with contextlib.suppress(OSError):
                os.rmdir(owned)  # it succeeds if its owner was killed before it made the file
        with contextlib.suppress(OSError), _open_mark(owned) as mark:
            regular = stat.S_ISREG(os.fstat(mark.fileno()).st_mode)
            # After a power cut the file may be there, but empty or full of zeros.
            marked = regular and mark.read(1000).strip(b"\0")[:11] in (b"", b'{"liteflow"')
            # A shared lock, unlike an owner's, does not keep `_owner_lives` from getting one.
            if marked and _lock(mark.fileno(), shared=True):
                _remove_folder(owned)


def _remove_folder(folder: str) -> None:
    """Remove an owner's folder, if the file `owner` is in it. Its files are reached by the folder's
    descriptor: other users may have put a link in its place since it was checked."""
    flags = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
    with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as opened:
        at = os.open(folder, flags) if flags else None  # Windows can't open folders
        if at is not None:
            opened.callback(os.close, at)
        names = os.listdir(folder if at is None else at)
        names.remove("owner")  # to be deleted last: without it nobody would remove the rest
        for name in (*names, "owner"):
            os.unlink(f"{folder}/{name}" if at is None else name, dir_fd=at)
    with contextlib.suppress(OSError):  # also if no descriptor was left to list it: it may be empty
        os.rmdir(folder)


def _refusal(row: _Row, more: str = "") -> AlreadyRunning:
    """The error for a run that is in the way: it says who runs it and since when, then `more`."""
    whose, since = row.owner_process, row.resumed_date or row.start_date
    whose = f"{whose}, since {since}" if row.state == "running" and since else whose
    return AlreadyRunning(f"run {row.run_id!r} of DAG {row.dag_id!r} is {row.state}: {whose}{more}")


# --- Run: from the request to its first task ------------------------------------------------------


class _LookAgain(Exception):
    """The recorded runs have changed since `_Start._look_ahead` read them: it has to read again."""


# The options of a run: those of `Dag.run`; `in_process`: run the tasks here, as Dag.test does;
# `again`: tasks of the resumed run (TASK or TASK[INDEX]) that are to run again; `in_line`: its
# _InLine, if a pool runs it in line; `command`: how its script was started; `logs`: show output.
_REQUEST = [*_Parameters(Dag.run).names[1:], *"in_process again in_line command logs".split()]


class _Start:
    """A run until its first task may start: it checks the request, finds the tasks, writes rows."""

    def __init__(self, dag: Dag, **options: Any) -> None:
        """Refuse wrong arguments and a wrong graph before anything is started or written."""
        _refuse_reentry()
        _fill_standard_descriptors()
        self.asked = asked = types.SimpleNamespace(**dict.fromkeys(_REQUEST) | options)
        _check_request(asked)
        self._order = dag.validate()
        self.dag = dag
        self.path = _database_path(asked.db_path, dag)
        named = _string_keyed("conf", asked.conf)
        self.conf: dict[str, Any] = json.loads(_json_text("conf", named, TypeError))
        self.pools = _checked_pools(dag, asked)
        self._command = _command_of(dag, asked, self.pools)
        self._again = [_task_named(name, dag.task_dict) for name in asked.again or ()]
        self.progress = _Progress(asked.progress, asked.logs)
        self.runner = _Runner()
        self.recorded: _Row | None = None  # the run to resume
        self._aside = _datetime.timedelta()  # added to now for a new run's id, if that was taken
        self.reason: str | None = None  # why the run was stopped, or closed by an error
        self._signals = _HeldSignals()  # holds signals back once the run executes
        self._caught: list[int] = []  # numbers of the signals that came to end the run
        self._stop_is_set = getattr(asked.stop, "is_set", bool)  # bool() is False: no `stop`
        self._calls: dict[str, tuple[_Call, str, _Settings]] = {}  # by task id: see `_job`
        # By mapping: digests, previews of results, a function for those of constants.
        self._keys: dict[_ExpandInput, tuple[list[str], Any, Any]] = {}
        self._store: Any = None
        self._batch = _Batch()

    def _hear_signal(self, number: int | None, frame: Any) -> None:
        """A signal came, in the main thread. `number` is None unless it is to end the run."""
        # SIGHUP counts only as the first signal: shell and kernel both send it at a terminal's end.
        if number and not (self._caught and signal.Signals(number).name == "SIGHUP"):
            self._caught.append(number)
        self.runner.wake()
        # The signal may have cut into `_print`, which waits until somebody reads a full pipe. If
        # the run is to end at once, an error ends that wait; those who call `_print` suppress it.
        is_telling = getattr(frame, "f_code", None) is _print.__code__
        if is_telling and (self._signals.try_due() or len(self._caught) > 1):
            self.progress.mute()
            raise BlockingIOError

    def _check(self) -> None:
        """Raise AirflowException if the run is to stop before it has begun; also _Taken."""
        self._signals.call_due()
        if self._caught or self._stop_is_set():
            raise AirflowException("stopped before the run began")
        if self.asked.in_line is not None:
            self.asked.in_line.check()

    def _look_ahead(self) -> None:
        """Decide which run this is: a recorded one, or a new one and its id. Raises RunNotFound."""
        dag_id, run_id = self.dag.dag_id, self.asked.run_id
        if self.asked.resume:
            row = _read(self.path, _find_run, dag_id=dag_id, run_id=run_id)
            if row is None and run_id is None:
                raise RunNotFound(f"DAG {dag_id!r} has no run in {self.path}: nothing to resume")
            row = row or _read_run(self.path, dag_id, run_id)._row  # it raises RunNotFound
            if self._again:
                _refuse_without_values(row)
            self.recorded, self.run_id = row, row.run_id
            self.logical_date, self.conf = _moment(row.logical_date), _parsed(row.conf, dict)
        else:
            now = _utcnow() + self._aside
            self.run_id = run_id or f"manual__{now.isoformat(timespec='microseconds')}"
            self.logical_date = _aware(self.asked.logical_date or now)

    def _find_tasks(self) -> None:
        """Let the first worker find every task, before anything is written. What takes time stands
        here because the server that forks workers is starting meanwhile. Raises UnreachableTask."""
        dag = self.dag
        info = self._info()
        calls = {task_id: _dump_call(task) for task_id, task in dag.task_dict.items()}
        pool = self.asked.executor
        # A store that the pool has kept open was checked when it was opened.
        if not (isinstance(pool, WorkerPool) and pool._store_of(self.path)):
            _check_before_run(self.path)
        if self.recorded is None:  # a resume's plan is made of the recorded rows: see `_resumption`
            self.plan = _Plan(dag, self.logical_date, pools=self.pools, order=self._order)
        if not dag.task_dict:
            return
        tasks = _references_to(dag)
        by_name = self.runner.begin(info, tasks, self._first_jobs(), self._check)
        names = "on_success_callback on_failure_callback start_date timezone "
        names += "description doc_md tags params"
        if not all(isinstance(dag.task_dict[t], _FunctionOperator) for t in by_name):  # for Jinja
            names += " user_defined_macros user_defined_filters render_template_as_native_obj"
        own = {name: getattr(dag, name) for name in names.split()}
        of_dag = _dump_for_worker(f"DAG {dag.dag_id!r}", own, own) if by_name else b""
        shared: dict[Any, Any] = {}  # of equal settings, and of equal calls, only the first is kept
        for task_id, function, _ in tasks:
            named = task_id in by_name
            settings = (_dump_settings(dag.task_dict[task_id]), of_dag) if named else None
            call = (calls[task_id], function, shared.setdefault(settings, settings))
            self._calls[task_id] = shared.setdefault(call, call) if call[0] is _NO_CALL else call

    def _first_jobs(self) -> int:
        """How many jobs a new run can send at first: as many workers may start side by side."""
        passed, jobs = set[str](), collections.Counter[str]()
        for task in self._order:
            if not passed.issuperset(task._upstream):
                continue
            mapping = task._mapping
            if isinstance(task, EmptyOperator):  # it takes no worker: tasks below it may start, too
                passed.add(task.task_id)
            elif mapping is None or mapping.source_ids:
                jobs[task.pool] += 1
            else:
                jobs[task.pool] += min(mapping.count(_Known({})), _limit_of(task))
        fit = sum(min(count, self.pools.get(pool, count)) for pool, count in jobs.items())
        return min(fit, self.dag.max_active_tasks)

    def _info(self) -> dict[str, Any]:
        """What every job of the run has in common, as plain data. Raises ParamValidationError."""
        dag = self.dag
        params = {**_resolved(f"DAG {dag.dag_id!r}: ", dag.params, self.conf), **self.conf}
        for task in [task for task in dag.tasks if task.params]:
            what = f"task {task.task_id!r}: "
            for name, value in _resolved(what, task.params, self.conf).items():
                _json_text(f"{what}param {name!r}", value, ParamValidationError)
        return {
            **(_place() if self.asked.in_line is None else self.asked.in_line.place),
            "dag_id": dag.dag_id,
            "key": dag._key,
            "module_path": _file_of(getattr(sys.modules.get(dag._module), "__dict__", {})),
            "fileloc": dag.fileloc,
            "run_id": self.run_id,
            "logical_date": self.logical_date and _iso(self.logical_date),
            "start_date": _now(),
            "conf": self.conf,
            "params": json.loads(_json_text("params", params, ParamValidationError)),
            "db_path": self.path,
            "run_row": 0,
            "identity": dag._identity,
            "sys_path": [entry for entry in sys.path if isinstance(entry, str)],
        }

    def _open_in_turn(self) -> None:
        """Open the run. If other runs must end first, `wait` for them, or raise AlreadyRunning."""
        for turn in itertools.count():
            try:
                return _until_unlocked(self.path, self._open, self._check)
            except AlreadyRunning as busy:
                if not self.asked.wait:
                    raise
                if not turn:
                    self.progress.tell(f"waiting: {busy}")
            self.runner.wait(_GLANCE)
            self._check()

    def _open(self) -> None:
        """Create or take over the run, in one transaction with all that a resume decides. Raises
        AlreadyRunning, _LookAgain if the run was deleted or pruned meanwhile, or has succeeded."""
        store, self._news = self._store, []
        with store.transaction(waits=False):
            dag_id, own = self.dag.dag_id, self.dag.fileloc and os.path.abspath(self.dag.fileloc)
            for old in store.look(_select_dags, dag_id=dag_id):
                # Perhaps two DAGs have one id. A frozen program is unpacked elsewhere each time.
                if own and old.fileloc not in (None, own) and not _FROZEN:
                    self._news.append(f"note: until now DAG {dag_id!r} was built by {old.fileloc}")
            row = self._found_or_made(store)
            self._make_way()
            if row is not None:
                self._take_over(row)
            self._news += [f"run {x.run_id}: {_DIED}; recorded as failed" for x in self._dead]
            store.write_instances(self.plan.nodes, self._element_of)
            store.claim_run(self._command, row is not None and row.start_date is not None)
            if self.asked.in_line is not None:
                self.asked.in_line.begin()

    def look_at_params(self) -> None:
        """Raise ParamValidationError for params that are missing or don't fit their schema."""
        self._look_ahead()
        self._info()

    def enqueue(self, store: _Store) -> None:
        """Record the run as queued, after `look_at_params`."""
        while True:
            with contextlib.suppress(_LookAgain), store.transaction():
                row = self._found_or_made(store)
                if row is None or row.state != "success":
                    store.queue_run(self._command)
                return
            self.look_at_params()

    def _found_or_made(self, store: _Store) -> _Row | None:
        """Under the write lock: the row of the run to resume, closed if its owner died; or None,
        after a new run was created. Raises _LookAgain, AlreadyRunning, DagRunAlreadyExists."""
        known, dag_id = self.recorded, self.dag.dag_id
        row = store.look(_find_run, dag_id=dag_id, run_id=self.run_id)
        if known is None and row is not None and self.asked.run_id is not None:
            what = f"DAG {dag_id!r} has a run {self.run_id!r} already"
            raise DagRunAlreadyExists(f"{what}: resume it, or give another run_id")
        if (row and row.id) != (known and known.id):
            # The run was deleted; or its id of this microsecond is taken, as by a frozen clock.
            self._aside = int.from_bytes(os.urandom(2)) * _datetime.timedelta.resolution
            raise _LookAgain
        if row is None or known is None:  # a new run: both are None
            store.create_run(self.dag, self.run_id, self.logical_date, self.conf)
            return None
        store.run_row = row.id
        has_succeeded = row.state == "success" and known.state != "success"
        if has_succeeded or row.values_deleted != known.values_deleted:
            raise _LookAgain
        if self.asked.in_line is not None:
            self.asked.in_line.check(row)
        elif _owner_lives(self.path, row.owner):  # the owner executes the run, or has it in line
            raise _refusal(row)
        return store.close_run(row.id) if row.state == "running" else row

    def _make_way(self) -> None:
        """Close the DAG's runs whose owner died. Raises AlreadyRunning if max_active_runs live."""
        rows = self._store.look(_select_runs, live_of=self.dag.dag_id)[::-1]
        alive = [row for row in rows if _owner_lives(self.path, row.owner)]
        self._dead = [self._store.close_run(row.id) for row in rows if row not in alive]
        most = self.dag.max_active_runs
        if most is not None and len(alive) >= most:
            how = "" if self.asked.wait else ": wait=True, or --wait, waits for its end"
            raise _refusal(alive[0], f"; max_active_runs is {most}{how}")

    def _take_over(self, row: _Row) -> None:
        """Resume a recorded run: keep what succeeded, decide all else anew by today's code."""
        self._store.mark(row.id, self._again, _CLEARED)
        resumption = self._resumption(row)
        self._store.resume_run(row, resumption)
        for instance in self.plan.instances():
            if instance.state is _S.FAILED:
                # Each time that it ran, its scheduler died: the task may be what kills it.
                past = resumption.instances[instance.task_id, instance.map_index]
                why = f"lost with its scheduler {past.lost} times in a row"
                attempt = _Attempt(instance)
                attempt.state, attempt.started, attempt.error = "failed", past.began, why
                self._batch.attempts[attempt] = None
                self._owe(attempt, ["on_failure_callback"])
                self._news.append(f"task {instance.label!r} was {why}: failed")
        if row.start_date is not None:
            self._news += _news_of(resumption)

    def _owe(self, attempt: _Attempt, names: Iterable[str]) -> bool:
        """Add the task's callbacks of these names to the batch. Returns whether it has any."""
        task = attempt.instance.node.task
        wanted = [name for name in names if getattr(task, name, None) is not None]
        if wanted:
            why = _last_line(attempt.error) or None
            how = {"last": [attempt.state, attempt.started, attempt.ended]}
            self._batch.callbacks.append(_Callback(attempt, "+".join(wanted), why, how))
        return bool(wanted)

    def _resumption(self, row: _Row) -> _Resumption:
        """Decide what the resume keeps and what runs again, and make the plan of that.

        What is new or did not run makes tasks below it run again only if it runs itself. So plans
        are tried one after another: what one starts of `may_not_run` counts as `running` in the
        next, until one starts no more of it."""
        rows = self._store.look(_select_past, row.id)
        known = {(past.task_id, past.map_index) for past in rows if past.state != "removed"}
        _refuse_index(self.run_id, self._again, known)
        lengths = self._store.look(_select_lengths, row.id)
        keys = functools.partial(_element_keys, known=_Known(lengths))
        running: set[_InstanceKey] = set()
        while True:
            found = _Resumption(self.dag, self._order, rows, keys, running)
            self._plan_on(found, lengths, on_trial=True)
            starting = self._starting(found) & found.may_not_run
            if not starting or row.start_date is None:  # a run that never began runs whole anyway
                if found.along:
                    self._plan_on(found, lengths)
                return found
            running |= starting

    def _plan_on(self, found: _Resumption, lengths: Any, on_trial: bool = False) -> None:
        """Make the plan: on trial, as if `along` had succeeded again without choosing anything."""
        recorded, again = found.recorded(), found.again - found.along
        # The lengths of results that stay; of `along`, too, as what is mapped over them stays.
        at = {k: (x.task_id, x.map_index) for k, x in found.instances.items() if k not in again}
        kept = {key: lengths[old] for key, old in at.items() if old in lengths}
        for key in found.along if on_trial else ():
            recorded[key] = found.instances[key]._replace(state=_S.SUCCESS, flow=None)
        self.plan = _Plan(self.dag, self.logical_date, recorded, kept, self.pools, self._order)
        self.plan.settle()

    def _starting(self, found: _Resumption) -> set[_InstanceKey]:
        """What the plan on trial starts, or may start once `along` has run."""
        ready = [i for i in self.plan.instances() if i.decided and i.state is None]
        # A task that has its instances only now was left out under the index -1.
        starting = {(i.task_id, index) for i in ready for index in (i.map_index, -1)}
        # A task of `along` that gave no elements may give some now, to what is mapped over it.
        fed = {node for name, _ in found.along for node in self.plan.by_id[name].feeds}
        return starting | {(node.task.task_id, -1) for node in fed if not self.plan.count(node)}

    def _element_of(self, instance: _Instance, mapping: _ExpandInput) -> tuple[str, str | None]:
        """What a mapped instance is mapped over: a digest, and a preview for people, if any."""
        index, known = instance.map_index, self.plan.known
        # Made with the mapping's first instances; any that come later have the same indexes.
        if mapping not in self._keys:
            look, row = self._store.look, self._store.run_row
            previews = {up: look(_select_item_previews, row, up) for up in mapping.source_ids}
            # Cached: a constant stands in many combinations, and a table's repr takes milliseconds.
            of_constant = functools.lru_cache(1000)(lambda n, i: _preview(mapping.sources[n][i]))
            self._keys[mapping] = _element_keys(mapping, known), previews, of_constant
        keys, previews, of_constant = self._keys[mapping]
        if index >= mapping.count(known):  # a setup that ran again gives fewer by now
            return keys[index], None
        constants, results = {}, []
        for name, (kind, *where) in mapping.elements(index, known):
            if kind == "constant":
                constants[name] = of_constant(name, where[0])
            elif kind in ("item", "xcom"):
                results.append(previews[where[0]].get(where[1], ""))
        shown = [f"{n}={text}" if len(constants) > 1 else text for n, text in constants.items()]
        shown += filter(None, results)
        return keys[index], _shown(", ".join(shown), _PREVIEW, str) or None


def _references_to(dag: Dag) -> _References:
    """The DAG's tasks, as a worker is to find them. The name of a function (or operator class) is
    enough if it leads to that very object: functions that a loop makes share one name."""
    found, resolve = [], functools.cache(_resolve)  # many tasks may be of one function
    for task_id, task in dag.task_dict.items():
        function = _function_of(task)
        name = sys.intern(_full_name(function))  # marshal writes one object once
        found.append((task_id, name, resolve(name) is function))
    return found


def _place() -> dict[str, Any]:
    """The present environment and working directory, in which the tasks are to run."""
    cwd = os.sep
    with contextlib.suppress(FileNotFoundError):  # the directory was removed
        cwd = os.getcwd()
    return {"environ": dict(vars(os.environ)["_data"]), "cwd": cwd}


def _refuse_reentry() -> None:
    """Refuse run() in a child that imports a script without a main guard; a worker ends at once."""
    child: Any = None
    with contextlib.suppress(KeyError, AttributeError, NameError):  # it is not (fully) imported
        child = sys.modules["multiprocessing.process"].current_process()
    is_importing = getattr(child, "_inheriting", False)  # its parent's `__main__`
    is_ours = is_importing and child.name.startswith(_WORKER_MARK)
    if is_ours or (_worker is not None and _worker.importing):
        os._exit(_UNGUARDED)  # by this code the scheduler knows the reason, and reports it once
    if is_importing:
        why = 'a child imports the script: call run() below `if __name__ == "__main__":`'
        raise RuntimeError(why)


def _has_method(thing: object, method: str) -> bool:
    return callable(getattr(thing, method, None)) and not isinstance(thing, type)


def _check_request(asked: types.SimpleNamespace) -> None:
    """Raise TypeError or ValueError for a wrong argument."""
    progress, date = asked.progress, asked.logical_date
    for name in ("resume", "wait"):
        _optional(False, _boolean).check(name, getattr(asked, name))
    if asked.stop is not None and not _has_method(asked.stop, "is_set"):
        raise TypeError(f"stop must be a threading.Event, found {_shown(asked.stop)}")
    if not isinstance(progress, bool):
        _optional(None, _function).check("progress, unless it is a bool,", progress)
    run_id = asked.run_id = _optional(None, _of_type(str)).check("run_id", asked.run_id)
    if run_id is not None and not (0 < len(run_id) <= 250 and run_id.isprintable()):
        raise ValueError(f"run_id must be 1 to 250 printable characters, found {_shown(run_id)}")
    _date.check("logical_date", date)
    if asked.resume and (asked.conf is not None or date is not None):
        raise ValueError("a resume has the recorded run's conf and logical_date: leave them out")


def _checked_pools(dag: Dag, asked: types.SimpleNamespace) -> dict[str, int]:
    """The pools' sizes by name. Raises ValueError if a task's pool has no size or is too small."""
    sizes = _string_keyed("pools", asked.pools)
    for name, size in sizes.items():
        _of_type(int, least=1)(f"pools[{name!r}]", size)
    for task in () if asked.in_process else dag.task_dict.values():
        size = sizes.get(task.pool, math.inf if task.pool == "default_pool" else 0)
        if task.pool_slots > size:
            what = f"task {task.task_id!r} has pool_slots={task.pool_slots} in pool {task.pool!r}"
            remedy = f"run with pools={{{task.pool!r}: N}}, or --pool {_typed(task.pool + '=N')}"
            raise ValueError(f"{what}, whose size is {size or 'not given'}: {remedy}")
    return sizes


def _command_of(dag: Dag, asked: types.SimpleNamespace, pools: Mapping[str, int]) -> str:
    """The command to record: how the script was started, if known, with the options to go on."""
    used = sorted(pools.keys() & {task.pool for task in dag.tasks})
    # `name +`: in an f-string, a name that is a member of a str Enum would read as `Class.MEMBER`.
    words = [word for name in used for word in ("--pool", name + f"={pools[name]}")]
    words += ["--max-workers", str(asked.max_workers)] if asked.max_workers else []
    return f"{asked.command or ''} {_typed(*words)}".strip()


def _runner_for(dag: Dag, asked: types.SimpleNamespace) -> Callable[[], _Runner]:
    """A function that makes the run's runner. Raises TypeError, ValueError, RuntimeError."""
    executor = asked.executor
    if asked.in_process:
        return lambda: _InProcessRunner(dag)
    if executor is not None and (asked.max_workers is not None or asked.mp_context is not None):
        raise ValueError("run() takes executor= or max_workers= and mp_context=, not both")
    if executor is not None and not isinstance(executor, WorkerPool):
        if not _has_method(executor, "submit"):
            raise TypeError(f"executor must be a WorkerPool or Executor, found {_shown(executor)}")
        return lambda: _ExecutorRunner(executor)
    if not hasattr(os, "fork"):
        raise RuntimeError("workers need POSIX: on Windows use WSL, dag.test() or executor=")
    since, pool = _known_since(dag), executor or WorkerPool(asked.max_workers, asked.mp_context)
    return lambda: _SlotRunner(pool, own_pool=executor is None, dag=dag, since=since)


def _known_since(dag: Dag) -> float:
    """Workers that are older than this, by monotonic(), don't know the DAG; 0.0: all import it."""
    file, name = _script()
    # No other process can import the DAG's module: that of a notebook, prompt or pipe.
    is_typed = not (name or os.path.isfile(file)) and (dag._module == "__main__" or bool(file))
    # Or a main program made it: a profiler, say, or the module `code` (`__console__`).
    is_of_file = dag._is_of_main and (dag.fileloc or "") == file
    is_made = dag._module in ("__main__", "__console__") and not is_of_file
    if is_typed or is_made:
        return _monotonic()
    # Or it is a package's `__main__`, but that stays as it was when it built the DAG. If it has no
    # task's function, it may be a test runner's, which calls what builds the DAG elsewhere.
    own = (_full_name(_function_of(task)).startswith("__main__:") for task in dag.tasks)
    return dag._born if name.endswith("__main__") and any(own) else 0.0


def _task_named(name: str, known: Collection[str]) -> tuple[str, int | None]:
    """Split `task` or `task[3]` into task_id and map_index, or None. Raises TaskNotFound."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    task_id, index = (match[1], int(match[2])) if match else (name, None)
    if task_id not in known:
        raise TaskNotFound(f"there is no task {name!r}{_near(task_id, known)}")
    return task_id, index


def _refuse_index(run_id: str, names: Iterable[Any], known: Collection[_InstanceKey]) -> None:
    """Raise TaskNotFound for a task_id and index (None: any) that are not `known` of the run."""
    for task_id, index in names:
        if index is not None and (task_id, index) not in known:
            has = _few([str(i) for t, i in sorted(known) if t == task_id and i >= 0]) or "none"
            what = f"task {task_id!r} of run {run_id!r} has no index {index}"
            raise TaskNotFound(f"{what}; it has {has}")


def _news_of(found: _Resumption) -> list[str]:
    """Lines on what a resume keeps, adds and removes; `(n of m)` where it is not all instances."""
    totals = collections.Counter(task_id for task_id, _ in found.instances)
    kept, skipped, new, anew, gone = [collections.Counter[str]() for _ in range(5)]
    for row, index in [(row, i) for row, i in found.removed if row.state != "removed"]:
        if row.task_id in found.unexpanded:
            anew[row.task_id] += 1
        elif row.try_number or row.task_id not in totals:  # not what never ran of today's tasks
            gone[f"{_label_of(row.task_id, index)} {_element_text(row.preview)}".strip()] += 1
    for key, row in found.instances.items():
        if key not in found.again:
            (skipped if row.state == "skipped" else kept)[row.task_id] += 1
        elif not row.row_id and key not in found.may_not_run and row.task_id not in anew:
            new[row.task_id] += 1

    def by_task(counts: Mapping[str, int]) -> list[str]:
        return [t if n == totals[t] else f"{t} ({n} of {totals[t]})" for t, n in counts.items()]

    news = {
        "kept, as they succeeded": by_task(kept),
        "kept, as they skipped themselves": by_task(skipped),
        "new in the code, will run": by_task(new),
        "mapped anew, over results to come": list(anew),
        "gone from the code, now removed": list(gone),
    }
    return [f"{what}: {_few(names, 10)}" for what, names in news.items() if names]


# --- Run: its turns -------------------------------------------------------------------------------

_GLANCE = 0.2  # seconds between two looks at requests to stop, timeouts and logs: `_look_around`
_LEAST_LOG = [0, *[_LOG_FILE_LIMIT] * 4]  # bytes: one look in five reads all logs, four only large
_SOON = 0.1  # seconds until a job's start is recorded: that of a shorter job, together with its end
_TOGETHER = 1.0  # seconds within which a signal to a task and the run's stop are of one cause
_FRESH = 256  # small results that a run keeps in memory


def _has_room(size: int) -> bool:
    """Whether memory has room for the pages that SQLite fills with a value of this size. Without it
    only the attempt fails, whereas a MemoryError within a transaction would end the run."""
    with contextlib.suppress(OSError, OverflowError):
        # A map takes no memory until its pages are touched; some allocators touch them at once.
        mmap.mmap(-1, 2 * min(size, _CACHE), access=mmap.ACCESS_COPY).close()
        return True
    return False


class _Run(_Start):
    """A run, from its request to its end.

    Each turn records in one transaction what has changed and what may start, then sends the jobs,
    then waits. So no task starts before the success of the tasks above it is committed.
    """

    def __init__(self, dag: Dag, **options: Any) -> None:
        super().__init__(dag, **options)
        self._make_runner = _runner_for(dag, self.asked)
        self._attempts: dict[_Instance, _Attempt] = {}  # sent and not ended, or between two pokes
        self._callbacks: collections.deque[_Callback] = collections.deque()  # for any worker
        self._last: dict[TaskInstanceState | None, _Attempt] = {}  # the last to end in each state
        self._fresh: dict[tuple[str, str, int], Any] = {}  # the rows of the newest small results
        # Attempts that a signal from outside has ended, and until when the run's stop explains it.
        self._unasked: collections.deque[tuple[float, _Attempt, _Outcome]] = collections.deque()
        self._forced = False  # the run was told to stop twice: all ends at once
        self.has_begun = False  # it is recorded as running; never, if there is nothing to resume
        self._next_glance, self._least_log = 0.0, itertools.cycle(_LEAST_LOG)

    def execute(self) -> DagRun:
        """Execute the run to its end. Raises what `Dag.run` does."""
        trouble: BaseException | None = None
        try:
            stack = contextlib.ExitStack()
            if not self.asked.in_process:  # there, a signal is to cut off the task itself
                # Held until the runner is closed: cut off in that, a pool would lose a worker.
                stack = self._signals = _HeldSignals(self._hear_signal)
            with stack:
                self.runner = self._make_runner()
                stack.callback(self.runner.close)
                while True:
                    with contextlib.suppress(_LookAgain):
                        run = self._execute_once()
                        break
        except BaseException as error:
            if not self._caught:
                raise
            # The signal's doing: it may cut off a worker's start or, if repeated, the run's end.
            is_end = isinstance(error, (AirflowException, KeyboardInterrupt))
            if isinstance(error, DatabaseError) or not is_end:
                trouble = error
                _log().error("%s", _brief(error), exc_info=error)
        if self._caught:
            number = self._caught[0]
            end = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            raise end from trouble
        return run

    def _execute_once(self) -> DagRun:
        """Find the tasks, open the run, drive it to its end, close it, call the DAG's callbacks.
        Raises _LookAgain if the recorded runs have changed since `_look_ahead`."""
        self._look_ahead()
        if self.recorded is not None and self.recorded.state == "success" and not self._again:
            if self.asked.in_line is not None and self.asked.in_line.owner is None:
                raise _Taken  # another process has recovered the run meanwhile
            dag_id, run_id = self.dag.dag_id, self.run_id
            how = "nothing to resume (--from TASK, or clear, runs a task of it again)"
            self.progress.tell(f"run {run_id} of DAG {dag_id!r} is a success: {how}")
            return _read_run(self.path, dag_id, run_id)
        self._find_tasks()
        with self._opened() as store, _owned_folder(self.path) as (store.owner, folder):
            self._open_in_turn()
            self.has_begun = True
            try:
                # After the transaction: a `progress` function may wait for a thread that reads.
                for line in self._news:
                    self.progress.tell(line)
                snapshot = functools.partial(store.look, _select_snapshot, store.run_row)
                self.progress.began(self.dag, self.run_id, self.path, snapshot)
                for slip in _slips_in(self.dag):
                    self.progress.tell(f"note: {slip}")
                self.runner.open_logs(folder, store.run_row)
                self._drive()
                state = DagRunState.FAILED if self.reason else self.plan.run_state()
                self.reason = self.reason or ("dagrun_timeout" if self.plan.timed_out else None)
                end = functools.partial(store.end_run, state, self.reason)
                row = _until_unlocked(self.path, end, self._check_patience)
            except BaseException as error:  # a full disk, a bug, or what a signal's handler raises
                self.reason = _brief(error)
                with contextlib.suppress(Exception):  # the first error is the one to raise
                    row = store.end_run(DagRunState.FAILED, self.reason)
                    self._cut_off(folder)
                    self._call_dag(row)
                raise
            self._call_dag(row)
            self.runner.dismiss()  # workers end while the database is closed
        run = DagRun(row, self.path)
        for note in self.runner.notes:
            self.progress.tell(note)
        self.progress.ended(run)
        return run

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_Store]:
        """The run's store: new, or kept open by the pool, which gets it back."""
        pool = self.asked.executor if isinstance(self.asked.executor, WorkerPool) else None
        kept = None if pool is None else pool._store_of(self.path, take=True)
        self._store = store = kept or _Store(self.path, self._check)
        try:
            yield store
        except BaseException:  # whatever it is: closed, and raised again
            store.close()
            raise
        store.close() if pool is None else pool._leave_store(store)

    def prepare_again(self, name: str) -> _Execution:
        """A task of the recorded run, ready to run here with the inputs that it had; of a mapped
        one, if `name` has no index, the first that failed. Raises TaskNotFound, _UsageError."""
        task_id, index = _task_named(name, self.dag.task_dict)
        self._look_ahead()
        assert self.recorded is not None
        row, task = self.recorded, self.dag.task_dict[task_id]
        look: Any = functools.partial(_read, self.path, most=_ROW_LIMIT)
        recorded = {
            (i.task_id, i.map_index): i._replace(state=i.state if i.state in _ENDED else None)
            for i in look(_select_past, row.id)
            if i.state != "removed"
        }
        if task._upstream:  # it may call xcom_pull for results that are not among its arguments
            _refuse_without_values(row)
        states = collections.defaultdict[str, set[str | None]](set)
        for key, past in recorded.items():
            states[key[0]].add(past.state)
        ran = not states[task_id].isdisjoint((_S.SUCCESS, _S.FAILED))
        for up in _taken_by(task):  # if the task ran, it ran with these, however they ended
            if states[up].isdisjoint(_ENDED if ran else (_S.SUCCESS, _S.SKIPPED)):
                there = ", ".join(sorted(state or "not run" for state in states[up])) or "not there"
                what = f"task {up!r}, whose result {task_id!r} takes,"
                raise _UsageError(f"{what} is {there} in run {row.run_id!r}")
        self._store = types.SimpleNamespace(run_row=row.id, look=look)
        self.plan = _Plan(self.dag, self.logical_date, recorded, look(_select_lengths, row.id))
        self._calls[task_id] = _dump_call(task), _full_name(_function_of(task)), None
        known = {(task_id, i.map_index): i for i in self.plan.by_id[task_id].instances}
        _refuse_index(row.run_id, [(task_id, index)], known)
        found = [i for (_, n), i in known.items() if index in (None, n)]
        if task._mapping is not None and found[0].map_index < 0:
            raise TaskNotFound(f"task {task_id!r} of run {row.run_id!r} has no instances")
        instance = next((i for i in found if i.state is _S.FAILED), found[0])
        instance.try_number = max(1, instance.try_number)
        here = _WorkerRun({**self._info(), "run_row": row.id}, self.dag)
        return _Execution(here, self._job(_Attempt(instance)))

    # Its turns.

    def _drive(self) -> None:
        """The run loop: let the plan decide, choose what to start, record that, hear workers."""
        limit = self.dag.dagrun_timeout
        self._timeout_at = _monotonic() + (math.inf if limit is None else limit.total_seconds())
        while True:
            self._settle()
            self.runner.wanted = False
            if not self._forced:
                self._choose(self.plan.ready_count(_monotonic()))
            self._record()
            self._signals.call_due()
            if self._callbacks and not self._forced:  # the outcomes that they follow are recorded
                self._choose(0)
            if self._is_over():
                return
            due = min(self._next_glance, self.plan.next_time() or math.inf) - _monotonic()
            self._hear(max(0.0, due))

    def _hear(self, timeout: float = 0.05) -> None:
        """Wait for workers; handle requests from outside; conclude the attempts that have ended."""
        events = self.runner.wait(timeout)
        if self.asked.in_process and any(outcome.terminated for _, outcome in events):
            self._caught.append(signal.SIGINT)  # a Ctrl-C has ended the task in this process
        self._look_around()
        for attempt, outcome in events:
            if outcome.unasked and self.reason is None:
                self._unasked.append((_monotonic() + _TOGETHER, attempt, outcome))
            else:
                self._conclude(attempt, outcome)
        # An attempt that a signal from outside has ended counts as interrupted if the run is
        # stopped as well (systemd signals the whole group), as failed if _TOGETHER passes first.
        while self._unasked and (self.reason or self._unasked[0][0] < _monotonic()):
            self._conclude(*self._unasked.popleft()[1:])
        if self.plan.doomed:
            self._end_doomed()

    def _hear_while_locked(self) -> None:
        """While the batch can't be recorded, hear workers, and add to it what has ended, its output
        and what the plan concludes: once the batch is recorded, the run may be over."""
        self._hear()
        self._settle()
        self._batch.logs += self.runner.output()
        self._check_patience()

    def _check_patience(self) -> None:
        """Raise DatabaseError if all is to end at once, so that nobody waits for the lock."""
        self._signals.call_due()
        if self._forced or len(self._caught) > 1:
            raise DatabaseError(f"{self.path} is locked by another process: not all is recorded")

    def _is_over(self) -> bool:
        if self._forced:
            return not self.plan.sent
        if self._callbacks or self.runner.calling():
            return False
        plan, now = self.plan, _monotonic()
        goes_on = plan.sent or plan.next_time() or plan.crowded or plan.ready_count(now)
        assert goes_on or not plan.unfinished, "the plan is stuck [a bug in liteflow]"
        return not plan.unfinished

    def _settle(self) -> None:
        """Let the plan's rules decide what they can, and put that into the batch."""
        plan = self.plan
        plan.settle()
        while plan.passing:
            for instance in plan.passing:
                self._pass_through(instance)
            plan.passing.clear()
            plan.settle()
        for instance in plan.changed:
            self._batch.instances[instance] = None
            # A sensor was given up between two pokes: its attempt failed, it did not skip itself.
            if (attempt := self._attempts.pop(instance, None)) is not None:
                attempt.state, attempt.error = "failed", self._given_up()
                self._batch.attempts[attempt] = None
            self.progress.changed(instance)
        plan.changed.clear()
        self._batch.expanded += plan.expanded
        plan.expanded.clear()

    def _given_up(self) -> str:
        """Why the plan gave up attempts that were sent, for people."""
        if self.plan.timed_out:
            return "ended by dagrun_timeout"
        return f"ended by {'fail_fast' if self.plan.gave_up else 'a branch or short circuit'}"

    def _end_doomed(self) -> None:
        """End the attempts that the plan has given up; withdraw what no worker has taken yet."""
        waiting, self._batch.jobs = self._batch.jobs, []
        for attempt in [*self.runner.withdraw(), *waiting]:
            self._withdraw(attempt)
        why = self.reason or self._given_up()
        for instance in self.plan.doomed:
            if instance in self._attempts:
                self.runner.end(self._attempts[instance], why, self._forced)
        self.plan.doomed.clear()

    def _withdraw(self, attempt: _Attempt) -> None:
        """Undo the start of an attempt that no worker has taken or will take."""
        instance = attempt.instance
        if not attempt.pokes:
            del self._attempts[instance]
        self._batch.instances[instance] = None
        self.plan.withdraw(instance)

    def _choose(self, ready: int) -> None:
        """Send due callbacks, then start up to `ready` instances, as far as the runner has room."""
        while self._callbacks:
            due = self._callbacks[0]
            if not self.runner.call_back(due, tuple(self._job(due.attempt))):
                self.runner.wanted = True
                return
            self._callbacks.popleft()
        room = self.runner.room(ready)
        while ready > 0 and (instance := self.plan.take()) is not None:
            if self._is_crowded(instance, 1):
                self.plan.crowded.add(instance.node)
                self.plan.enqueue(instance)
            elif self._is_called_back(instance):
                self.plan.delay(instance, _monotonic() + 0.02)
            elif room <= 0 or (instance.alone and (self._batch.jobs or not self.runner.is_free())):
                self.runner.wanted = True
                return self.plan.enqueue(instance)
            else:
                self._start(instance)
                ready, room = ready - 1, 0 if instance.alone else room - 1

    def _is_called_back(self, instance: _Instance) -> bool:
        """Whether the instance's next attempt waits for the end of its `on_retry_callback`."""
        if instance.state is not _S.UP_FOR_RETRY or instance.node.task.on_retry_callback is None:
            return False
        due = [each.attempt for each in (*self._batch.callbacks, *self._callbacks)]
        return any(each.instance is instance for each in due + self.runner.calling())

    def _is_crowded(self, instance: _Instance, more: int) -> bool:
        """Whether `more` instances of its task would exceed max_active_tis_per_dag in all runs."""
        task, limit = instance.node.task, instance.node.task.max_active_tis_per_dag
        if limit is None:
            return False
        others = self._store.look(_count_elsewhere, self._store.run_row, task.dag_id, task.task_id)
        alive = sum(count for owner, count in others if _owner_lives(self.path, owner))
        return bool(alive + instance.node.sent + more > limit)

    def _leave_places(self) -> None:
        """Under the write lock: withdraw jobs whose places other runs have taken meanwhile."""
        for attempt in [*self._batch.jobs]:
            if self._is_crowded(attempt.instance, 0):
                self._batch.jobs.remove(attempt)
                self._withdraw(attempt)

    def _start(self, instance: _Instance) -> None:
        self.plan.start(instance)
        attempt = self._attempts[instance] = self._attempts.get(instance) or _Attempt(instance)
        self._batch.instances[instance] = None
        if instance.try_number > 1 and not attempt.pokes:
            self._batch.renewed.append(instance.row_id)
        if instance.alone:  # recorded as running before it is sent, as it may kill this process
            instance.move(_S.RUNNING)
        self._batch.jobs.append(attempt)

    def _begin(self, attempt: _Attempt) -> None:
        """Note that the attempt runs, as a worker has taken it."""
        if attempt.state == "running":
            return
        if attempt.instance.state is _S.QUEUED:  # one that starts alone is `running` already
            attempt.instance.move(_S.RUNNING)
        attempt.state = "running"
        if not attempt.began:  # it failed before any worker took it
            attempt.take()
        self._batch.instances[attempt.instance] = self._batch.attempts[attempt] = None
        self.progress.changed(attempt.instance)

    def _pass_through(self, instance: _Instance) -> None:
        """Let an EmptyOperator's instance succeed without a worker; any may call its callbacks."""
        self.plan.start(instance)
        attempt = self._attempts[instance] = _Attempt(instance)
        attempt.state = "running"  # so `_begin` has nothing to show
        self._conclude(attempt, _Outcome("success", None, start=time.time()), "on_execute_callback")

    def _record(self) -> None:
        """Commit the batch, then send the jobs. While the database is locked, only hear workers."""
        batch = self._batch
        batch.logs += self.runner.output()
        if not batch:
            return
        record = functools.partial(self._store.record, batch, self._leave_places, self._element_of)
        _until_unlocked(self.path, record, self._hear_while_locked)
        self._batch = _Batch()
        self.progress.committed(batch.logs)
        for due in batch.callbacks:  # for the worker that holds the attempt, else for any
            if not self.runner.call_back(due):
                self._callbacks.append(due)
        for attempt in batch.jobs:
            self.runner.start(attempt, self._job(attempt))
        if batch.is_large:
            with contextlib.suppress(_Busy):  # a later commit will do it
                self._store.checkpoint()  # now, as the tasks that waited for the value run

    def _job(self, attempt: _Attempt) -> _Job:
        instance, node = attempt.instance, attempt.instance.node
        call, function, settings = self._calls[instance.task_id]
        timeout = node.task.execution_timeout
        is_mapped = instance.map_index >= 0
        elements, takes = self._elements(instance, call) if is_mapped else ([], call.takes)
        return _Job(
            task_id=instance.task_id,
            function=function,
            map_index=instance.map_index,
            try_number=attempt.try_number,
            max_tries=instance.max_tries,
            call=call.data,
            settings=settings,
            inputs=self._inputs(instance, takes) if takes or self.runner.remote else {},
            timeout=None if timeout is None else timeout.total_seconds(),
            holds=node.holds,
            feeds=node.mapping is None and bool(node.feeds),
            elements=elements,
            in_group=node.group is not None,
            pokes=attempt.pokes,
            waited=_monotonic() - attempt.first_taken if attempt.pokes else 0.0,
        )

    def _elements(self, instance: _Instance, call: _Call) -> tuple[list[Any], frozenset[Any]]:
        """A mapped instance's elements, by name, and the results that its arguments take."""
        mapping, takes = instance.node.mapping, call.takes
        assert mapping is not None
        i, count = instance.map_index, mapping.count(self.plan.known)
        # A setup that a resume ran again may give fewer elements than before. Then the index stands
        # for none or, if several arguments vary, for another combination.
        if i >= count or (len(mapping.sources) > 1 and count != len(instance.node.instances)):
            return [(None, ("gone", i))], takes
        elements = mapping.elements(i, self.plan.known)
        for k, (name, element) in enumerate(elements):
            if element[0] == "constant":
                constant = call.constants[k][element[1]]
                takes |= constant.takes
                elements[k] = name, ("constant", constant.data)
            else:
                elements[k] = name, self._inlined(element)
        return elements, takes

    def _inlined(self, element: tuple[Any, ...]) -> tuple[Any, ...]:
        """An element that is a stored result: its value, if that is small, else where it is."""
        most = _VALUE_LIMIT if self.runner.remote else _INLINE
        row, data = self._store.run_row, None
        match element:
            case "map", function, inner:
                return ("map", function, self._inlined(inner))
            case "tuple", parts:
                return ("tuple", [self._inlined(part) for part in parts])
            case "item", task_id, i:
                data = self._store.look(_select_item, row, task_id, item=i, largest=most)
            case "xcom", task_id, i:
                which = {"task_id": task_id, "key": "return_value", "map_index": i}
                found = self._store.look(_select_values, row, most, **which)
                data = next((value for *_, value in found), None)
        return element if data is None else ("value", data, element[1])

    def _inputs(self, instance: _Instance, takes: frozenset[Any]) -> dict[Any, Any]:
        """The values that travel with a job: the small ones that its arguments take. Workers
        without a database get all of its direct upstreams, and None for what it is mapped over."""
        found: dict[tuple[str, str], Any] = {}
        look, row, node = self._store.look, self._store.run_row, instance.node
        for up in node.upstream if self.runner.remote else ():
            index, up_id = instance.map_index if up.is_in_step_with(node) else None, up.task.task_id
            which, whole = {"task_id": up_id, "map_index": index}, (up_id, "return_value")
            # A job has its own element of what it is mapped over: n jobs with all would hold n * n.
            has_own = up in node.sources and whole not in takes
            if has_own and (up.mapping or look(_select_item, row, up_id, item=0) is not None):
                found[whole], which["but_key"] = None, "return_value"
            for up_id, i, key, value in look(_select_values, row, **which):
                found.setdefault((up_id, key), []).append((i, value))
        for up_id, key in () if self.runner.remote else takes:
            up = self.plan.by_id[up_id]
            own = up.is_in_step_with(node)
            if own or up.mapping is None:  # the worker itself reads a whole mapped task's values
                index = instance.map_index if own else -1
                rows = self._fresh.get((up_id, key, index))
                which = {"task_id": up_id, "key": key, "map_index": index}
                rows = rows or look(_select_values, row, _INLINE, **which)
                found[up_id, key] = [(i, value) for _, i, _, value in rows]
        return found

    # What workers say.

    def _conclude(self, attempt: _Attempt, outcome: _Outcome, *due: str) -> None:
        """Let the plan decide what the instance of an attempt that has ended becomes. `due`: names
        of callbacks to call before the one for its new state."""
        instance = attempt.instance
        self._begin(attempt)
        start, took = outcome.start, outcome.took
        if start is None or attempt.pokes:  # the worker died, or knows only of the last poke
            start, took = attempt.began, _monotonic() - attempt.first_taken
        attempt.started, attempt.ended = _iso_of(start), _iso_of(start + took)
        if outcome.terminated and self.reason is not None:
            # `unasked`: a signal from outside, which was for all, or for the worker's job before.
            self.plan.interrupt(instance, again=outcome.unasked)
            attempt.state, attempt.error = "interrupted", self.reason
        else:
            self._finish(attempt, outcome)
        if instance.state is not _S.UP_FOR_RESCHEDULE:
            del self._attempts[instance]
        self._batch.instances[instance] = self._batch.attempts[attempt] = None
        names = (*due, _CALLBACK_OF.get(instance.state, "")) if due or instance.node.holds else ()
        owes = bool(names) and self._owe(attempt, names)
        if outcome.held and not owes:  # the worker waits, and has no callback to call: let it go on
            self.runner.call_back(_Callback(attempt, None, None))
        self.progress.changed(instance, attempt.error, took)

    def _finish(self, attempt: _Attempt, outcome: _Outcome) -> None:
        """Let the plan finish the instance; put the attempt's state and values into the batch."""
        instance = attempt.instance
        size = sum([len(row[-1]) for row in outcome.xcoms])
        if size > _LARGE and not _has_room(size):
            why = f"MemoryError: this process has no room to store {size:,} bytes: return a path"
            outcome = outcome._replace(status="failed", error=why, xcoms=(), items=(), note={})
        outcome, left_out = self._branch(instance, outcome)
        self.plan.finish(instance, outcome.status, _monotonic(), outcome.note)
        self.plan.skip(instance, left_out)
        instance.lost, instance.alone = 0, False
        state = instance.state
        if outcome.status == "reschedule" and state is not _S.UP_FOR_RESCHEDULE:
            outcome = outcome._replace(error=self._given_up())
        # Only what skipped itself is `skipped`: not what was ended with its run, or is tried again.
        failed = state is _S.UP_FOR_RETRY or (state is _S.SKIPPED and outcome.status != "skipped")
        attempt.state, attempt.error = "failed" if failed else _state_of(instance), outcome.error
        self._batch.xcoms += [(instance.row_id, *xcom) for xcom in outcome.xcoms]
        if "name" in outcome.note:
            self._batch.named.append((outcome.note["name"], instance.row_id))
        self._batch.is_large |= size > _LARGE
        if state is _S.UP_FOR_RESCHEDULE:
            attempt.pokes, attempt.taken = attempt.pokes + 1, math.inf
            return
        if state is _S.SUCCESS:
            self._batch.items += [(instance.row_id, n, *x) for n, x in enumerate(outcome.items)]
            # Small values stay in memory: tasks that take them often start in this very turn.
            task_id, index = instance.task_id, instance.map_index
            for key, *_, value in outcome.xcoms if instance.node.downstream else ():
                if len(value) <= _INLINE:
                    self._fresh[task_id, key, index] = [(task_id, index, key, value)]
            while len(self._fresh) > _FRESH:
                del self._fresh[next(iter(self._fresh))]
        self._last[state] = attempt

    def _branch(self, instance: _Instance, outcome: _Outcome) -> tuple[_Outcome, Sequence[_Node]]:
        """The outcome to store, and what a branch or short circuit leaves out. If it leaves out any
        task, its return value is stored only for a resume of tasks that are mapped over it."""
        note = outcome.note
        if instance.node.task._flow is None or outcome.status != "success":
            return outcome, ()
        kept: Any = [(key, *rest) for key, *rest in outcome.xcoms if key != "return_value"]
        try:
            left_out = self.plan.left_out(instance, note)
        except AirflowException as error:
            return outcome._replace(status="failed", error=str(error), xcoms=kept), ()
        instance.flow = json.dumps({k: note[k] for k in ("chosen", "go_on") if k in note})
        stores = not left_out or instance.node.feeds
        return outcome if stores else outcome._replace(xcoms=kept), left_out

    # What comes from outside.

    def _look_around(self) -> None:
        """Stop the run if it was asked to, and do what is due by time. Outcomes are concluded after
        this, so that what was ended together with the run is no failure."""
        if self._caught:
            name = signal.Signals(self._caught[0]).name
            self._stop(f"stopped by {name}", now=len(self._caught) > 1)
        now = _monotonic()
        if now < self._next_glance:
            return
        self._next_glance = now + _GLANCE
        self.progress.status()
        self._batch.logs += self.runner.output(next(self._least_log))
        self.plan.crowded.clear()
        for attempt in self._attempts.values():
            if attempt.taken + _SOON <= now:
                self._begin(attempt)
        line = self.asked.in_line and self.asked.in_line.line
        if self._stop_is_set():
            self._stop("stopped")
        elif line is not None and (line.stopping or (line.giving_up and self._unasked)):
            # With `_unasked`: systemd, say, has told all processes of the program to end.
            self._stop(_SHUT_DOWN, now=line.forced)
        if now >= self._timeout_at and not self.plan.timed_out and self.reason is None:
            self.plan.give_up(timed_out=True)
        row = self._store.look(_find_run, id=self._store.run_row)
        if row is not None and row.stop_requested is not None:
            self._stop("stopped on request")
        if not self._store.is_in_place():
            raise DatabaseError(f"{self.path} was deleted or replaced during the run")

    def _stop(self, reason: str, now: bool = False) -> None:
        """End what runs, and start nothing more but teardowns; `now`: kill it, start nothing."""
        if self.reason is None:
            self.reason = reason
            more = "; once more ends all at once" if self._caught else ""
            self.progress.tell(f"{reason}: ending what runs ({self.plan.sent}){more}")
            self.plan.stop()
        if now and not self._forced:
            self._forced = True
            self.plan.doomed = list(self._attempts)

    def _cut_off(self, folder: str) -> None:
        """Kill all jobs after an error has closed the run: their ends can't be recorded now."""
        self._batch = _Batch()
        with contextlib.suppress(FileExistsError):  # somebody may have removed the folder
            os.mkdir(folder, 0o700)
            open(f"{folder}/owner", "wb").close()  # the mark that `_remove_folder` looks for
        self.runner.open_logs(folder, self._store.run_row)  # in case the error came before that
        self.runner.withdraw()
        for attempt in self._attempts.values():
            self.runner.end(attempt, "its run ended", now=True)
        for attempt in self.runner.calling():  # their workers wait for a `call`
            self.runner.call_back(_Callback(attempt, None, None))

    # Callbacks.

    def _call_dag(self, ended: _Row) -> None:
        """After the run's end is recorded, let workers call the DAG's callbacks for it, and for the
        runs that `_make_way` closed. A further signal ends them; a forced run calls none."""
        if not self.plan.nodes or self._forced:
            return
        state = TaskInstanceState(ended.state)
        last = self._last.get(state) or next(iter(self._last.values()), None)
        if last is None:
            last = _Attempt(self.plan.nodes[0].instances[0])
            last.log_parts = self._store.look(_last_part, last.instance.row_id, last.try_number)
        why = "success" if state is _S.SUCCESS else self.reason or "task_failure"
        why = "timed_out" if self.plan.timed_out else why  # Airflow's word
        due: list[tuple[Any, ...]] = [(row, "on_failure_callback", _DIED, {}) for row in self._dead]
        how = {"last": [last.state, last.started, last.ended]}
        for row, name, reason, more in [*due, (ended, _CALLBACK_OF[state], why, how)]:
            if getattr(self.dag, name) is not None:
                facts = {**vars(row), "run_row": row.id, "conf": _parsed(row.conf, dict), **more}
                if self.runner.remote and name == "on_failure_callback":
                    run = DagRun(row, self.path)  # a remote worker can't look up why it failed
                    facts["reason"] = run._why(*run._failures(2)) or None
                self._callbacks.append(_Callback(last, f"dag_{name}", reason, facts))
        signals = len(self._caught)
        try:
            self._choose(0)
            while (self._callbacks or self.runner.calling()) and len(self._caught) == signals:
                self.runner.wait(0.5)
                self._signals.call_due()
                self._choose(0)
            self._batch.logs += self.runner.output()
            if self._batch:
                with contextlib.suppress(_Busy, AlreadyRunning):  # only what was printed is lost
                    self._store.record(self._batch)
                    self.progress.committed(self._batch.logs)
        except AirflowException as error:  # no worker, a full disk: the run has ended all the same
            self.runner.notes[f"a callback of the DAG: {_brief(error)}"] = None


# --- Run: runs in line ----------------------------------------------------------------------------

_TRIED_AGAIN = 1.0  # seconds until a run that could not begin is tried again: see `_InLine.run`
_FILES_OPEN = 8  # files without runs that a line keeps open for what is submitted next


class _Taken(Exception):
    """The run must not begin here any more: it was cancelled, or another process has taken it."""


class _InLine:
    """A run that waits in a _RunLine: how it is to be run, and its future."""

    def __init__(self, line: _RunLine, run: _Start, run_id: str, owner: str | None) -> None:
        self.line, self.dag, self.path = line, run.dag, run.path
        self.owner = owner  # None: it is to be recovered, and has no owner yet
        self.key = run.path, run.dag.dag_id  # it may have to wait for other runs of this key
        self.place = _place()  # now: the program may change these before the run begins
        self.options = {n: getattr(run.asked, n) for n in ("pools", "progress", "stop")}
        self.due = 0.0  # when it may begin, by monotonic()
        self.future: _RunFuture = concurrent.futures.Future()  # type: ignore[assignment]
        self._give_up = self.future.cancel  # which `self.cancel` replaces, below
        self._fate = threading.Lock()  # never released: the first to take it begins or cancels
        self._is_cancelled = False  # set before the future is cancelled: the file comes first
        self._to_close = False  # it was cancelled, but is not closed in the file yet
        self._failures = 0  # how often it could not begin for a reason that may pass
        vars(self.future).update(dag_id=self.dag.dag_id, run_id=run_id, cancel=self.cancel)

    def cancel(self, close: bool = True) -> bool:
        """As `Future.cancel`. `close`: close the run as failed; else it stays for `recover`."""
        with _HeldSignals() as held:
            if self._fate.acquire(blocking=False):
                # The first call decides on `close`: asyncio, once it hears of it, calls again.
                self._is_cancelled, self._to_close = True, close
                # Both are called as `held` ends, last first, even if one raises: wait() needs both.
                held.callback(self.future.set_running_or_notify_cancel)
                held.callback(self._give_up)
            if close and self._to_close:
                # Before the future is cancelled: whoever hears of that may shut the pool down.
                try:
                    self.end("cancelled", held.call_due)
                except RuntimeError:  # the line has ended: its thread may have closed the run
                    if self._to_close:
                        raise
                self._to_close = False
        return self._is_cancelled

    def end(self, reason: str, check: Callable[[], Any] = bool) -> None:
        """Close the run, which has not begun, as failed."""
        of = (self.dag.dag_id, self.future.run_id, reason, self._is_ours)
        self.line.write(self, lambda store: store.cancel_run(*of), check)

    def check(self, row: _Row | None = None) -> None:
        """Raise _Taken if it must not begin any more or, by its row, not in this process."""
        given_up = self.line.giving_up and not self.future.running()
        if self._is_cancelled or given_up or not (row is None or self._is_ours(row)):
            raise _Taken

    def _is_ours(self, row: _Row) -> bool:
        if self.owner is None:
            return _is_left(row, self.path)
        return bool(row.state == "queued" and row.owner == self.owner)

    def begin(self) -> None:
        """Note that the run begins, so that it can't be cancelled. Raises _Taken if it was."""
        if not self.future.running():
            if not self._fate.acquire(blocking=False):
                raise _Taken
            self.future.set_running_or_notify_cancel()

    def run(self, pool: WorkerPool) -> None:
        """Execute the run, and set its future. Or put it back in line: if other runs have to end
        first or, up to twice, if it could not begin for want of a worker, descriptors or space."""
        try:
            self.check()
            asked = {"run_id": self.future.run_id, "db_path": self.path, "resume": True}
            ended = _Run(self.dag, executor=pool, in_line=self, **asked, **self.options).execute()
            self.begin()  # not done yet if the run was a success already
        except _Taken:
            self.cancel(close=self._to_close)  # an earlier `cancel` may have failed to close it
        except BaseException as error:  # whatever it is: the future gets it
            begun = self.future.running()
            may_pass = getattr(error, "_may_pass", isinstance(error, OSError))
            self._failures += may_pass
            again = self._failures <= 2 if may_pass else isinstance(error, AlreadyRunning)
            if again and not begun:
                self.due = _monotonic() + _TRIED_AGAIN
                self.line.enter(self, first=True)
                return
            if not begun and self.owner is not None:
                with contextlib.suppress(AirflowException):
                    self.end(_brief(error))
            elif not begun:  # its code has changed, say; logged, as nobody may ask the future
                of = self.future.run_id, self.dag.dag_id, _brief(error)
                _log().error("run %s of DAG %r stays for another recover(): %s", *of)
            with contextlib.suppress(_Taken):
                self.begin()
                self.future.set_exception(error)
        else:
            self.future.set_result(ended)


def _is_left(row: _Row, path: str) -> bool:
    """Whether `recover` goes on with the run: its process died, or shut its pool down, and no other
    has taken it. Not if the run was asked to stop, even if its process died in the teardowns."""
    why = {"queued": (_SUBMITTED,), "failed": (_DIED, _SHUT_DOWN)}
    cut_off = row.state == "running" or row.reason in why.get(row.state, ())
    return cut_off and row.stop_requested is None and not _owner_lives(path, row.owner)


class _RunLine:
    """The runs submitted to a WorkerPool: they begin in order, each in a free thread of the line.

    A run that has to wait for others of its DAG holds up only runs of that DAG. Threads end once no
    run is left that they could begin; at most one sleeps, until a run may be tried again.
    """

    def __init__(self, pool: WorkerPool) -> None:
        _set_up_slots(by_executor=True)
        self._pool = pool
        self._changed: Any = threading.Condition(threading.RLock())
        # By _InLine.key: the runs that wait, in order of arrival; how many have begun here.
        self._waiting: dict[tuple[str, str], collections.deque[_InLine]] = {}
        self._active: collections.Counter[tuple[str, str]] = collections.Counter()
        self.threads: set[threading.Thread] = set()  # in which futures' callbacks are called, too
        self._sleeps = False
        self._closed = False  # it takes no more runs
        self.giving_up = self.stopping = self.forced = False  # see `close`; `forced`: at once
        self._writing: Any = threading.RLock()  # it knows whether this thread has it: see `write`
        # By path: the store, and what closes it and lets its owner go; then, runs that may use it.
        self._files: dict[str, tuple[_Store, contextlib.ExitStack]] = {}
        self._entries: weakref.WeakSet[_InLine] = weakref.WeakSet()

    def submit(self, dag: Dag, options: dict[str, Any], check: _Check) -> _RunFuture:
        run = self._checked("submit()", dag, options, "run_id logical_date conf resume")
        run.look_at_params()  # what is wrong is refused before there is a file
        entry = _InLine(self, run, run.run_id, "")  # `write` gives its file's owner
        entry.owner = self.write(entry, run.enqueue, check)
        entry.future.run_id = run.run_id  # `enqueue` has changed it if it was taken
        return self.enter(entry)

    def recover(self, dag: Dag, options: dict[str, Any]) -> list[_RunFuture]:
        run = self._checked("recover()", dag, options)
        path = run.path
        _check_path(path)
        left: list[str] = []
        with contextlib.suppress(_Empty):
            runs = _read_runs(path, dag.dag_id, not_yet="success") if os.path.exists(path) else []
            left = [each.run_id for each in runs[::-1] if _is_left(each._row, path)]
        return [self.enter(_InLine(self, run, run_id, None)) for run_id in left]

    def _checked(self, of: str, dag: Dag, options: Mapping[str, Any], more: str = "") -> _Start:
        _refuse_unknown(of, options, f"db_path pools progress stop {more}".split())
        _of_type(Dag)("dag", dag)
        if self._closed or self._pool._closed:
            raise RuntimeError("the WorkerPool is shut down")
        return _Start(dag, **options)

    def write(self, entry: _InLine, act: Callable[[_Store], None], check: _Check) -> str:
        """Let `act` write to the entry's file, over a store that stays open (closing one waits for
        the disk). Returns the owner of the runs of that file that wait here."""
        if self._writing._is_owned():  # a destructor has cut in, perhaps into a transaction
            raise RuntimeError("a destructor called submit() or cancel() inside one: use a thread")

        def refuse_late() -> None:
            check()
            if self._has_ended():
                raise RuntimeError("the WorkerPool is shut down")

        with self._writing:
            refuse_late()
            self._entries.add(entry)
            if (path := entry.path) not in self._files or not self._files[path][0].is_in_place():
                self._close_some(path)
                with contextlib.ExitStack() as made:
                    store = made.enter_context(contextlib.closing(_Store(path, refuse_late)))
                    store.owner, _ = made.enter_context(_owned_folder(path))
                    self._files[path] = store, made.pop_all()
            store, _ = self._files[path]
            _until_unlocked(path, lambda: act(store), refuse_late)
            return store.owner

    def _close_some(self, replaced: str) -> None:
        """Close the store of `replaced`, now another file, and all but a few that have no runs."""
        used = {entry.path for entry in self._entries if not entry.future.done()}
        spare = [path for path in self._files if path not in {replaced, *used}]
        for path in {replaced, *spare[: 1 - _FILES_OPEN]} & self._files.keys():
            self._files.pop(path)[1].close()

    def enter(self, entry: _InLine, first: bool = False) -> _RunFuture:
        """Put a run in line, at the end or `first`. Returns its future."""
        try:
            with self._changed:
                enters = not (self.giving_up if first else self._has_ended())
                if enters:
                    waiting = self._waiting.setdefault(entry.key, collections.deque())
                    waiting.insert(0 if first else len(waiting), entry)
                    self._call_thread()
        except RuntimeError:
            entry.cancel(close=entry.owner is not None)  # a run to be recovered stays so
            raise
        if not enters:  # the pool was shut down meanwhile: the run stays for `recover`
            entry.cancel(close=False)
        return entry.future

    def _call_thread(self) -> None:
        """Let a thread look for a run that may begin: the one that sleeps, or a new one."""
        if self._sleeps:
            self._changed.notify_all()
        elif len(self.threads) < self._pool.max_runs:
            thread = threading.Thread(target=self._serve, daemon=True)
            try:
                thread.start()
                self.threads.add(thread)
            except RuntimeError:  # the system allows no more threads; one that is there will do
                if not self.threads:
                    raise

    def _serve(self) -> None:
        while (entry := self._next()) is not None:
            threading.current_thread().name = f"liteflow-run-{entry.dag.dag_id}"
            try:
                entry.run(self._pool)
            except BaseException as error:  # sys.exit() in a callback of the future, say
                _log().error("%s", _brief(error), exc_info=error)
            with self._changed:
                self._active -= collections.Counter([entry.key])  # which drops keys at 0

    def _next(self) -> _InLine | None:
        """The next run that may begin; None if this thread is not needed."""
        with self._changed:
            while True:
                now, dues = _monotonic(), []
                for key, waiting in self._waiting.items():
                    most = waiting[0].dag.max_active_runs
                    if waiting[0].due > now:
                        dues.append(waiting[0].due)
                    elif most is None or self._active[key] < most:
                        self._active[key] += 1
                        entry = waiting.popleft()
                        del self._waiting[key]
                        if waiting:  # the DAGs take turns
                            self._waiting[key] = waiting
                        if self._waiting:  # another thread has to watch the rest
                            self._call_thread()
                        return entry
                if self._sleeps or not dues:
                    self.threads.discard(threading.current_thread())
                    self._changed.notify_all()
                    return None
                self._sleeps = True
                self._changed.wait(min(dues) - now)
                self._sleeps = False

    def close(self, give_up: bool, stop: bool) -> None:
        """Take no more runs. `give_up`: cancel those that have not begun; `stop`: end the rest."""
        with self._changed:
            self._closed = True
            self.stopping, self.giving_up = self.stopping or stop, self.giving_up or give_up
            left = [entry for waiting in self._waiting.values() for entry in waiting]
        for entry in left if give_up else ():
            entry.cancel(close=False)

    def _has_ended(self) -> bool:
        """Whether the line takes no more runs, and no thread is left that would begin one."""
        return self._closed and not self.threads

    def is_within(self) -> bool:
        """Whether this thread executes one of the pool's runs (a signal handler may be called in
        its turns), or is in `write` or `enter` (into which a destructor may cut)."""
        is_held = self._writing._is_owned() or self._changed._is_owned()
        running = [*self.threads, *(runner.thread for runner in list(self._pool._runners))]
        return is_held or threading.current_thread() in running

    def drain(self, check: Callable[[], Any] = bool) -> None:
        """Wait for the runs to end, then close the files. What `check` raises ends the wait."""
        try:
            with self._changed:
                while self.threads:
                    self._changed.wait(_GLANCE)
                    check()
        except (KeyboardInterrupt, SystemExit):
            # The first time, let no more runs begin, and stop the others; the second, at once.
            self.forced = self.stopping
            self.close(give_up=True, stop=True)
            raise
        with self._writing, contextlib.ExitStack() as files:
            while self._files:
                files.push(self._files.popitem()[1][1])


# --- Reading back ---------------------------------------------------------------------------------


class XCom(_NamedTuple):
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
        self.dag_id, self.run_id = dag_id, run_id
        self.task_id, self.map_index = task_id, map_index
        self.state: TaskInstanceState | None = None
        self.try_number = self.max_tries = 0
        self.start_date: _datetime.datetime | None = None
        self.end_date: _datetime.datetime | None = None
        self.pid: int | None = None
        self.error: str | None = None
        self.upstream_task_ids: set[str] = set()
        self.hostname = ""
        self.task_group_id: str | None = None
        self.role: str | None = None  # "setup" or "teardown"
        self.element: str | None = None  # what a mapped instance is mapped over, for people
        self.interrupted = False  # its latest attempt was
        self._attempt_state: str | None = None  # that of its latest attempt
        self._db_path: Any = None
        self.task: Any = None

    @property
    def duration(self) -> float | None:
        """Seconds from start to end of the latest attempt; None until it has ended."""
        return _span(self.start_date, self.end_date)

    @property
    def log_url(self) -> str:
        """The command that shows its log; in Airflow, the address of a page."""
        names = [f"{self.dag_id}/{self.run_id}", self._label]
        db = {"--db": self._db_path} if self._db_path else {}
        return _command(f"{_own_command()} logs", names, db)

    def xcom_push(self, key: str, value: Any) -> None:
        """Store a value under a key, from inside the running task; a later push replaces it. In a
        callback at the task's end it stores nothing, and says so on standard error. Raises
        RuntimeError outside a task, TypeError for a value that can't be pickled."""
        _of_type(str)("key", key)
        if (execution := self._execution()).is_over:
            # Printed, not raised: an error would keep a callback from telling of a failure.
            lost = f"what its callback pushes for {key!r} is not stored"
            _print_as_task(f"task {execution.task_id!r} has ended: {lost}")
        _push(execution, key, value, f"pushed for {key!r} a")

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
        What is absent is None; with `map_indexes`, the `default`. Raises ValueError for other runs,
        RuntimeError outside a task.
        """
        elsewhere = dag_id not in (None, self.dag_id) or run_id not in (None, self.run_id)
        if include_prior_dates or elsewhere:
            only = "xcom_pull() here reads values of this run only"
            raise ValueError(f"{only}; the second argument is dag_id: name the key, key=...")
        execution = self._execution()
        _of_type(str)("key", key)
        if map_indexes is not ... and map_indexes is not None:
            _of_type(int, list, tuple, range)("map_indexes", map_indexes)
        index = map_indexes if isinstance(map_indexes, int) else None  # then only that is read
        is_one = task_ids is None or isinstance(task_ids, str)
        wanted = [task_ids or self.task_id] if is_one else task_ids
        values: list[Any] = []
        for task_id in _of_type(str, list, tuple, set)("task_ids", wanted):
            found = execution.xcoms(_of_type(str)("task_ids", task_id), key, index)
            by_index = {i: execution.loaded(data, task_id) for i, data in found}
            if map_indexes is ...:
                values += by_index.values() or [None]
            elif isinstance(map_indexes, Sequence):
                values += [by_index.get(i, default) for i in map_indexes]
            else:
                values.append(by_index.get(-1 if map_indexes is None else map_indexes, default))
        is_bare = is_one and len(values) == 1 and not isinstance(map_indexes, Sequence)
        return values[0] if is_bare else values

    def get_task_states(
        self,
        dag_id: str,
        map_index: int | None = None,
        task_ids: Sequence[str] | None = None,
        *,
        run_ids: Sequence[str],
    ) -> dict[str, dict[str, TaskInstanceState | None]]:
        """The states of this run's tasks, from inside a running task, by run id and then task id (a
        mapped instance: with its index, `load_3`). Raises ValueError for other runs."""
        if dag_id != self.dag_id or [*run_ids] != [self.run_id]:
            raise ValueError("get_task_states() here tells of this run only: run_ids=[ti.run_id]")
        states = {
            ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}": ti.state
            # The task's own state comes last: its row may not say `running` yet.
            for ti in [*self._execution().context["dag_run"].get_task_instances(), self]
            if map_index in (None, ti.map_index) and (not task_ids or ti.task_id in task_ids)
        }
        return {self.run_id: states}

    def _execution(self) -> _Execution:
        """The attempt whose `ti` this is. Raises RuntimeError if this was read from a database."""
        if self.task is None:
            raise RuntimeError(f"{self!r} is a record, not a task's `ti`: use DagRun.xcom_pull()")
        return _running_execution()

    _label = property(lambda self: _label_of(self.task_id, self.map_index))
    # The state in words: what was interrupted has no state, but did start.
    _word = property(lambda self: self.state or ("interrupted" if self.interrupted else "none"))

    def __repr__(self) -> str:
        return f"<TaskInstance: {self.dag_id}.{self._label} {self.run_id} [{self.state}]>"


def _running_instance(execution: _Execution) -> TaskInstance:
    """The `ti` of a running task."""
    info = execution.run.info
    ti = TaskInstance(info["dag_id"], info["run_id"], execution.task_id, execution.map_index)
    ti.state, ti.start_date = _S.RUNNING, _moment(_iso_of(execution.started))
    ti.try_number, ti.max_tries = execution.job.try_number, execution.job.max_tries
    ti.pid, ti.hostname = os.getpid(), socket.gethostname()
    ti._db_path = info.get("log_db", info["db_path"])
    ti.task, ti.upstream_task_ids = execution.task, set(execution.task._upstream)
    return ti


def _instance_of(row: _Row, run: DagRun, attempt: bool = False) -> TaskInstance:
    """The task instance of a row, as it is now, or with `attempt` as the row's attempt left it."""
    ti = TaskInstance(run.dag_id, run.run_id, row.task_id, max(-1, row.map_index))
    ti._db_path = run._path
    ti.state = _TASK_STATES.get(row.task_attempt_state if attempt else row.state)
    ti.try_number = max(0, row.task_attempt_try_number if attempt else row.try_number)
    ti.max_tries, was = row.max_tries, row.task_attempt_state
    if not attempt:
        # Its latest attempt is history if it was cleared, or if a resume since then did not run it.
        left_out = ti.state is _S.SKIPPED and was != "skipped"  # it did not skip itself
        did_not_run = left_out or ti.state in (None, _S.UPSTREAM_FAILED)
        is_older = (row.start_date or row.end_date or "") < (run._row.resumed_date or "")
        was = None if row.cleared or (did_not_run and is_older) else was
    ti._attempt_state = was
    ti.interrupted = was == "interrupted" or (was == "failed" and ti.state is None)
    if attempt or ((ti.state or ti.interrupted) and was is not None):
        ti.pid, ti.error = row.pid, row.error
        ti.start_date = _moment(row.start_date)
        ti.end_date = None if ti.state is _S.RUNNING else _moment(row.end_date)  # an earlier poke's
    ti.upstream_task_ids = {str(name) for name in _parsed(row.upstream_task_ids, list)}
    ti.task_group_id, ti.role, ti.element = row.task_group_id, row.role, row.element_preview
    return ti


class DagRun:
    """One run of a DAG, as it stood in the database when it was read; `refresh` reads it again.

    `state` is a DagRunState; `reason` says why it failed where no task is to blame. Times are
    timezone-aware UTC datetimes; `conf` is the dict the run was started with. Methods that read the
    database raise RunNotFound once the run was deleted there, and DatabaseError.
    """

    run_type = "manual"

    def __init__(self, row: _Row, path: str) -> None:
        self._path, self._row = path, row
        self.dag_id: str = row.dag_id
        self.run_id: str = row.run_id
        # For people: one line, even if a harmful file has ids with line breaks.
        self._name = f"{row.dag_id}/{row.run_id}".replace("\n", "\\n")
        self.state = DagRunState(row.state) if row.state in [*DagRunState] else DagRunState.FAILED
        self.reason: str | None = row.reason
        self.logical_date = _moment(row.logical_date)
        self.start_date = _moment(row.start_date)
        self.end_date = _moment(row.end_date)
        self.conf: dict[str, Any] = _parsed(row.conf, dict)
        # As Airflow has it for a run that is started by hand: no wait, an interval of no length.
        self.run_after = self.start_date
        self.data_interval_start = self.data_interval_end = self.logical_date

    @property
    def db_path(self) -> pathlib.Path:
        """The database that the run is recorded in."""
        return pathlib.Path(self._path)

    @property
    def duration(self) -> float | None:
        """Seconds that the run took, without pauses before a resume; None until it has ended."""
        return _run_seconds(self._row)

    @property
    def owner_alive(self) -> bool:
        """Whether the process that works on the run, or has it in line, is alive; False once the
        run has ended. If the process is dead, this reads the run again, as `refresh` does."""
        if self._row.state not in ("running", "queued"):
            return False
        alive = _owner_lives(self._path, self._row.owner)
        if not alive:  # the process records nothing more, but may have recorded the run's end
            with contextlib.suppress(AirflowException):  # the run may have been deleted
                self.refresh()
        return alive

    # Whether the state is `running`, but the owner is dead (`owner_alive` may read the run again).
    _owner_died = property(lambda self: not self.owner_alive and self.state is DagRunState.RUNNING)

    def refresh(self) -> DagRun:
        """Read the run again, in place."""
        vars(self).update(vars(_read_run(self._path, self.dag_id, self.run_id)))
        return self

    def get_task_instances(self, state: str | Iterable[str] | None = None) -> list[TaskInstance]:
        """The run's task instances, in the order of the DAG's tasks; of one `state`, or several."""
        if state is None:
            return self._instances()
        several = [state] if isinstance(state, str) else _of_type(Iterable)("state", state)
        wanted = {_one_of(TaskInstanceState)("state", each) for each in several}
        return [ti for ti in self._instances() if ti.state in wanted]

    def get_task_instance(self, task_id: str, map_index: int = -1) -> TaskInstance | None:
        """The task instance of this id and index, or None."""
        _of_type(str)("task_id", task_id)
        _of_type(int, least=-1)("map_index", map_index)
        return next(iter(self._instances(task_id=task_id, map_index=map_index)), None)

    def _instances_of(self, task_id: str, map_index: int = -1) -> list[_Row]:
        """The indexes and states of a task's instances; none if the run has no tasks yet. Raises
        TaskNotFound for a task that the run does not have, or not with this index."""
        found = self._look(_select_keys, task_id=_of_type(str)("task_id", task_id))
        if not found and (known := {ti.task_id for ti in self._look(_select_keys)}):
            what = f"run {self.run_id!r} has no task {task_id!r}"
            raise TaskNotFound(f"{what}{_near(task_id, known)}")
        if found and map_index >= 0:
            indexes = [(task_id, ti.map_index) for ti in found]
            _refuse_index(self.run_id, [(task_id, map_index)], indexes)
        return found

    def _instances(self, attempts: bool = False, **which: Any) -> list[TaskInstance]:
        """The run's task instances, or those that `which` selects; or their `attempts`."""
        rows = self._look(_select_attempts if attempts else _select_instances, **which)
        return [_instance_of(row, self, attempt=attempts) for row in rows]

    def _look(self, look: Callable[..., T], **which: Any) -> T:
        """Read something of this run by one of the store's looks. Raises RunNotFound if the run was
        deleted, or the file was replaced and has another run in this row."""

        def look_at_both(db: sqlite3.Connection, run_row: int, **which: Any) -> tuple[Any, T]:
            return _find_run(db, id=run_row), look(db, run_row, **which)

        row, found = _read(self._path, look_at_both, self._row.id, **which)
        self._refuse_gone(row)
        return found

    def xcom_pull(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """A stored value; of a mapped task without an index the list of those stored, by index.

        None if the task returned None, or has not succeeded. It unpickles the value: use it on
        files that you trust. Raises TaskNotFound, XComNotFound for an absent key or deleted values.
        """
        which = {"task_id": _of_type(str)("task_id", task_id), "key": _of_type(str)("key", key)}
        indexed = _of_type(int, least=-1)("map_index", map_index) >= 0
        values = self._values(**which, map_index=map_index if indexed else None)
        if values:
            bare = indexed or values[0].map_index < 0
            return values[0].value if bare else [row.value for row in values]
        found = self._look(_select_keys, task_id=task_id, map_index=map_index) if indexed else []
        found = found or self._instances_of(task_id, map_index)
        now = _read_run(self._path, self.dag_id, self.run_id)._row  # it may have been pruned since
        if now.values_deleted is not None:  # a None would look like the task's value
            raise XComNotFound(f"the values of run {self.run_id!r} were deleted (prune --values)")
        if key != "return_value":
            known = {row.key for row in self._look(_select_xcoms, task_id=task_id)}
            missing = f"task {task_id!r} of run {self.run_id!r} stored no XCom {key!r}"
            raise XComNotFound(f"{missing}{_near(key, known)}")
        present = [ti for ti in found if ti.state != "removed"] or found
        return [] if not indexed and present and present[0].map_index >= 0 else None

    def xcoms(self) -> list[XCom]:
        """Every stored value of the run: rows with `task_id`, `map_index`, `key`, `value`."""
        return self._values()

    def _values(self, **which: Any) -> list[XCom]:
        rows = self._look(_select_values, most=_ROW_LIMIT, **which)
        script = _load_dag(self.dag_id, self._path).fileloc
        return [XCom(t, i, key, _load(data or b"", script, t)) for t, i, key, data in rows]

    def log(self, task_id: str, map_index: int = -1, try_number: int | None = None) -> str:
        """What a task printed in its latest attempt, or in attempt `try_number`; of a mapped task
        what all instances printed, unless `map_index` names one. Raises TaskNotFound."""
        if (found := self.get_task_instance(task_id, map_index)) is None:
            self._instances_of(task_id, map_index)  # raises if there is no such task
        index = None if found is None and map_index == -1 else map_index
        _optional(None, _of_type(int, least=0)).check("try_number", try_number)
        which = {"task_id": task_id, "map_index": index, "try_number": try_number}
        rows = self._look(_select_log, latest_try=True if try_number is None else None, **which)
        return "".join(row.text for row in sorted(rows, key=lambda row: row.map_index))

    def clear(self, task_ids: str | Iterable[str], downstream: bool = True) -> list[str]:
        """Mark tasks (or instances, as `task[3]`) of a run that nobody works on to run again, and
        return their names. The run becomes `queued`; a resume runs them, with all downstream of
        them (unless `downstream` is False) and the setups and teardowns of their scopes.

        Raises TaskNotFound, AlreadyRunning; AirflowException if the values of the run were deleted.
        """

        def check(row: _Row | None) -> None:
            _refuse_without_values(self._refuse_live(row))

        check(self.refresh()._row)
        several = _of_type(Iterable)("task_ids", task_ids)
        wanted = [task_ids] if isinstance(task_ids, str) else list(several)
        names = self._tasks_in(wanted, but_state="removed")
        how = _CLEARED if _boolean("downstream", downstream) else _CLEARED_ALONE
        if names:  # an empty list leaves the run's state alone
            self._write(lambda store: store.change(self._row.id, check, store.clear, names, how))
            self.refresh()
        return wanted

    def _tasks_in(self, names: Sequence[str], **which: Any) -> list[tuple[str, int | None]]:
        """Split names of the run's tasks (`task` or `task[3]`) into task_id and map_index. Raises
        TaskNotFound for a name that no instance has among those that `which` selects."""
        ids = {_of_type(str)("a task id", name).partition("[")[0] for name in names}
        found = self._look(_select_keys, task_id=ids.pop(), **which) if len(ids) == 1 else []
        found = found or self._look(_select_keys, **which)
        known = {(ti.task_id, ti.map_index) for ti in found}
        task_ids = {task_id for task_id, _ in known}
        named = [_task_named(name, task_ids) for name in names]
        _refuse_index(self.run_id, named, known)
        return named

    def _write(self, act: Callable[[_Store], None]) -> None:
        with contextlib.closing(_Store(self._path)) as store:
            _until_unlocked(self._path, lambda: act(store))

    def _refuse_gone(self, row: _Row | None) -> _Row:
        if row is None or (row.dag_id, row.run_id) != (self.dag_id, self.run_id):
            raise RunNotFound(f"DAG {self.dag_id!r} has no run {self.run_id!r} in {self._path}")
        return row

    def _refuse_live(self, row: _Row | None) -> _Row:
        """Raise AlreadyRunning if somebody works on the run, RunNotFound if it is gone."""
        row = self._refuse_gone(row)
        if row.state == "running" and _owner_lives(self._path, row.owner):
            raise _refusal(row, "; stop it first")
        return row

    def delete(self) -> None:
        """Delete the run with its task instances, values and logs, and give the disk space back.
        Raises RunNotFound, AlreadyRunning."""
        self.refresh()  # raises if there is no file: `_write` would make one
        self._write(lambda store: store.change(self._row.id, self._refuse_live, store.delete_run))
        self._write(_Store.give_back)

    def raise_if_failed(self) -> DagRun:
        """Return the run itself, unless it failed. Raises DagRunFailed, which names the run's
        reason and, unless the run was deleted, the failed tasks with theirs."""
        died = self._owner_died
        if died or self.state is DagRunState.FAILED:
            why = self._why(*self._failures(_MOST_TOLD))
            why = why or (_DIED if died else "no reason is recorded")
            raise DagRunFailed(f"run {self.run_id!r} of DAG {self.dag_id!r} failed: {why}", self)
        return self

    def _failures(self, most: int, found: Any = None) -> tuple[list[TaskInstance], int]:
        """The first failed task instances, `most` at most, and how many there are; none if the run
        was deleted meanwhile. `found`: what `_select_failed` gave, if that is known."""
        with contextlib.suppress(RunNotFound):
            found = found or self._look(_select_failed, limit=most)
        rows, count = found or ([], 0)
        return [_instance_of(row, self) for row in rows], count

    def _why(self, failed: Sequence[TaskInstance], count: int) -> str:
        """Why the run failed: its own reason, then those of `failed`, the first of `count`."""
        told = [f"{ti._label}: {_last_line(ti.error)}" for ti in failed]
        more = [f"and {count - len(failed)} more"] if count > len(failed) else []
        return "; ".join(filter(None, [self.reason, *told, *more]))

    def __repr__(self) -> str:
        why = ""
        if self.state is DagRunState.FAILED:
            why = f": {self.reason}" if self.reason else ""
            with contextlib.suppress(AirflowException):  # it may have been deleted
                why = f": {self._why(*self._failures(2)) or 'no reason is recorded'}"
        return f"<DagRun {self.dag_id} {self.run_id} [{self.state}{why}]>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the facts, what failed, the graph and the tasks."""
        head = _html("h1", self.dag_id, " ", _run_chip(self))
        try:
            instances = _seen_instances(self)
            facts, graph = _run_facts(self, instances, _FEW_TOLD), _svg_graph(_run_boxes(instances))
        except AirflowException as error:  # the file is gone, say
            return _notebook(head, _html("p", str(error)))
        return _notebook(head, *facts, graph, _task_table(instances))

    _repr_mimebundle_: Any = Dag._repr_mimebundle_


def _refuse_without_values(row: _Row) -> None:
    if row.values_deleted is not None:
        gone = f"the values of run {row.run_id!r} were deleted (prune --values)"
        raise AirflowException(f"{gone}, and its tasks would get none: start a new run")


def _dag_run_of(info: Mapping[str, Any]) -> DagRun:
    """The `dag_run` of a running task's context."""
    known = {**info, "id": info["run_row"], "state": "running", "conf": json.dumps(info["conf"])}
    row = _Row(**{name: known.get(name) for name in _COLUMNS["dag_run"]})
    return DagRun(row, info["db_path"] or "")


def _read_runs(path: str, dag_id: str | None, **asked: Any) -> list[DagRun]:
    """Runs, newest first; `asked` selects among them: see `_ASKED_OF`."""
    return [DagRun(row, path) for row in _read(path, _select_runs, dag_id=dag_id, **asked)]


def _read_run(path: str, dag_id: str, run_id: str) -> DagRun:
    row = _read(path, _find_run, dag_id=dag_id, run_id=_of_type(str)("run_id", run_id))
    if row is None:
        known = [run.run_id for run in _read(path, _select_run_ids, dag_id=dag_id)]
        raise RunNotFound(f"DAG {dag_id!r} has no run {run_id!r} in {path}{_near(run_id, known)}")
    return DagRun(row, path)


def _load_dag(dag_id: str, path: str) -> Dag:
    rows = _read(path, _select_dags, dag_id=str(dag_id))
    found = next((row for row in rows if row.dag_id == dag_id), None)
    if found is None:
        known = [row.dag_id for row in _read(path, _select_dags)]
        raise DagNotFound(f"there is no DAG {dag_id!r} in {path}{_near(str(dag_id), known)}")
    same = {name: getattr(found, name) for name in ("description", "doc_md", "schedule")}
    made = _RecordedDag(dag_id, db_path=path, tags=[*map(str, _parsed(found.tags, list))], **same)
    made.fileloc = found.fileloc
    return made


# --- Showing: the one view of a run ---------------------------------------------------------------


class _Line(_Record):
    """What people see of a task instance, of an attempt, or of all instances of a mapped task."""

    label: str
    state: str  # in words; for several instances, how many are in each state
    style: str  # the state whose `_Style` the line gets; for several instances, the worst one
    tries: int = 0
    start: _datetime.datetime | None = None
    end: _datetime.datetime | None = None  # the present time while it runs
    error: str = ""
    element: str = ""  # the preview of a mapped instance's element

    seconds = property(lambda self: _span(self.start, self.end))

    def cells(self, state: object = "") -> tuple[object, ...]:
        """The line's row in a table; `state`, if given, replaces the text of its state."""
        took = _seconds_text(self.seconds)
        name = f"{self.label} {self.element}".rstrip()
        return name, state or self.state, self.tries or "", _when(self.start), took, self.error


_NO_STATE = "no state"  # of an instance that is still to run, or was when its run ended
_HEADS = ("TASK", "STATE", "TRY", "START", "DURATION", "ERROR")
_TABLE_FOLD = 10  # a task with so many mapped instances, or more, is one line of a table
_MOST_SHOWN = 20  # failed instances of it with lines of their own; failures, log lines of a page


class _Style(_Record):
    """How a state looks. Signs and lightness differ for people who can't tell red from green."""

    terminal: str  # the number of an ANSI colour
    tag: str  # Mermaid's tag for a bar in a gantt
    sign: str  # stands before the state on an HTML page
    fill: str  # the background colour on an HTML page
    text: str  # the text colour on an HTML page
    box: str  # colours of fill, edge and text in a diagram: all are set, as its page may be dark


_STYLES = {  # in the order of counts in texts: after success, the worst state first
    "success": _Style("32", "done, ", " ", "#bfe5c8", "#0c3b1b", "#d4edda #28a745 #155724"),
    "failed": _Style("31", "crit, ", "✕", "#b3202e", "#ffffff", "#f8d7da #dc3545 #721c24"),
    "upstream_failed": _Style("33", "", "▲", "#f0a04b", "#3a2000", "#ffe5d0 #fd7e14 #7a3e06"),
    "interrupted": _Style("", "crit, ", "‖", "#5b4a8a", "#ffffff", "#ffffff #6c757d #383d41"),
    "running": _Style("36", "active, ", "▶", "#2c6fbb", "#ffffff", "#cce5ff #007bff #004085"),
    "queued": _Style("", "", "…", "#d8dee7", "#28313c", "#ffffff #6c757d #383d41"),
    "up_for_retry": _Style("33", "", "↻", "#f7dd72", "#3d3200", "#fff3cd #ffc107 #856404"),
    "up_for_reschedule": _Style("33", "", "↻", "#f7dd72", "#3d3200", "#fff3cd #ffc107 #856404"),
    "none": _Style("", "", " ", "transparent", "currentColor", "#ffffff #6c757d #383d41"),
    "skipped": _Style("35", "", "–", "#e9d3ea", "#4d1a52", "#fde2f3 #d63384 #6b1a41"),
    "removed": _Style("", "", "·", "#8d949e", "#ffffff", "#e2e3e5 #6c757d #383d41"),
}


def _line_of(members: list[TaskInstance]) -> _Line:
    """The line of a task instance or attempt, or the one line of several of a task."""
    first, now = members[0], _utcnow()
    latest = {ti.map_index: ti._word for ti in members}  # of an instance's attempts the last counts
    words = collections.Counter(latest.values())
    starts = [ti.start_date for ti in members if ti.start_date]
    ends = [ti.end_date or now for ti in members if ti.end_date or ti.state is _S.RUNNING]
    # The worst state. `removed` comes last, as a removed instance says nothing about the others.
    style = next(word for word in [*[*_STYLES][1:-1], "success", "removed"] if word in words)
    tries = max(ti.try_number for ti in members)
    span = min(starts, default=None), max(ends, default=None)
    if len(members) > 1:
        return _Line(f"{first.task_id} x {len(latest)}", _counts_text(words), style, tries, *span)
    error, element = _last_line(first.error), _element_text(first.element, 40)
    state = _NO_STATE if style == "none" else style
    return _Line(first._label, state, style, tries, *span, error, element)


def _element_text(element: str | None, most: int = 80) -> str:
    """A mapped instance's element as text, in brackets unless quoted: a bare 3 reads as a count."""
    lines = (element or "").split("\n")
    text = _shortened(_clean(" ".join(filter(None, map(str.strip, lines)))), most)
    return text if text[:1] in ("", "'", '"') else f"({text})"


def _shortened(text: str, most: int) -> str:
    """Cut a text in its middle to `most` columns, because names and paths differ at their ends."""
    half = (most - 3) // 2
    if _width(text) <= most:
        return text
    seen = 4 * most  # characters to look at: there may be millions, some of which take no column
    return f"{_fit(text[:seen], most - 3 - half)}...{_fit(text[::-1][:seen], half)[::-1]}"


def _counts_text(counts: Mapping[str, int], none: str = _NO_STATE, color: bool = False) -> str:
    """Counts by state as text, such as `58 success, 2 failed`; `none`: what no state is called."""
    order = sorted(counts, key=[*_STYLES, *counts].index)
    texts = ((f"{counts[x]} {none if x == 'none' else _clean(x)}", x) for x in order)
    return ", ".join(_paint(text, state, color) for text, state in texts)


def _counts_of(instances: list[TaskInstance]) -> str:
    return _counts_text(collections.Counter(ti._word for ti in instances))


def _by_task(instances: Iterable[TaskInstance]) -> list[list[TaskInstance]]:
    return [list(members) for _, members in itertools.groupby(instances, lambda ti: ti.task_id)]


def _lines_of(instances: list[TaskInstance], whole: bool = False) -> list[_Line]:
    """A table's lines: one for each task instance. Unless `whole`, a task with many mapped
    instances has one line for all, and some of its failed instances have their own below it."""
    lines = []
    for members in _by_task(instances):
        if whole or len(members) < _TABLE_FOLD:
            lines += [_line_of([ti]) for ti in members]
            continue
        lines.append(_line_of(members))
        failed = [ti for ti in members if ti.state is _S.FAILED]
        lines += [_line_of([ti]) for ti in failed[:_MOST_SHOWN]]
        if more := len(failed[_MOST_SHOWN:]):
            lines.append(_Line(f"... {more} more of {members[0].task_id}", "failed", "failed"))
    return lines


def _seen_instances(run: DagRun, attempts: bool = False, **which: Any) -> list[TaskInstance]:
    """Task instances, or attempts; what a dead owner left unfinished reads `interrupted`."""
    died = run._owner_died
    instances = run._instances(attempts, **which)
    for ti in instances if died else ():
        if ti.state is not None and ti.state not in _ENDED:
            ti.state, ti.interrupted = None, True
    return instances


def _run_state(run: DagRun) -> str:
    """A run's state for people: `running (owner dead)` if the owner died while the run ran."""
    return "running (owner dead)" if run._owner_died else run.state.value


# --- Showing: Mermaid -----------------------------------------------------------------------------

_MAX_EDGES, _MAX_TEXT = 500, 50_000  # the most edges and characters that Mermaid draws by default
_MOST_ABREAST = 8  # boxes beside each other that can still be read on a page
_GANTT_FOLD, _TIMELINE_FOLD = 5, 20  # a task with so many mapped instances or more has one bar
_DIRECTIONS = ("TD", "TB", "LR", "RL", "BT")


def _mermaid_text(text: str) -> str:
    """Text for a quoted Mermaid label: all but plain characters as `#codepoint;`."""
    # Older renderers read labels as Markdown. So what would begin a list (`1.`, `-`) or a link
    # (`www.`), or emphasize `_words_`, is odd, too.
    odd = r"[^A-Za-z0-9 _.-]|^[ .-]|^\d(?=\d*\.)|\bw(?=ww\.)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    text = _shortened(_clean(text), 80)
    return re.sub(odd, lambda match: f"#{ord(match[0])};", text) or "#32;"


class _Box(_Record):  # a node of a diagram
    task_id: str
    lines: list[str]  # its text
    style: str  # the state whose `_Style` it gets; empty for a DAG, which has no states
    upstream: Mapping[str, str | None]  # by the id of each task it waits for: that edge's text
    group: str | None = None  # the id of its task group, which is drawn as a frame
    prefix = property(lambda self: f"{self.group}." if self.group else "")


def _draw(boxes: Sequence[_Box], direction: str | None = None) -> str:
    """A Mermaid flowchart. Its node ids are made up, as many a task id would not parse."""
    _optional(None, _one_of(_DIRECTIONS)).check("direction", direction)
    ids = {box.task_id: f"n{i}" for i, box in enumerate(boxes)}
    # Renderers would shrink a very wide graph beyond reading: it goes from left to right instead.
    layers = collections.Counter(_depths(boxes).values())
    is_wide = max(layers.values(), default=0) > max(_MOST_ABREAST, len(layers))
    lines = [f"flowchart {direction or ('LR' if is_wide else 'TD')}"]
    numbers, opened = itertools.count(), [""]  # `opened`: the prefixes of the frames still open
    for box in sorted(boxes, key=lambda box: box.prefix.split(".")):  # a group before its subgroups
        while not box.prefix.startswith(opened[-1]):
            opened.pop()
            lines.append(f"{'    ' * len(opened)}end")
        if box.prefix != opened[-1]:
            label = _mermaid_text(box.prefix.removeprefix(opened[-1])[:-1])
            lines.append(f'{"    " * len(opened)}subgraph g{next(numbers)}["{label}"]')
            opened.append(box.prefix)
        first, *others = box.lines
        label = "<br/>".join(map(_mermaid_text, [first.removeprefix(box.prefix), *others]))
        style = f":::{box.style}" if box.style else ""
        lines.append(f'{"    " * len(opened)}{ids[box.task_id]}["{label}"]{style}')
    lines += [f"{'    ' * depth}end" for depth in range(len(opened) - 1, 0, -1)]
    for box in boxes:
        for up, text in box.upstream.items():
            if up in ids:
                label = "" if text is None else f'|"{_mermaid_text(text)}"|'
                lines.append(f"    {ids[up]} -->{label} {ids[box.task_id]}")
    for name in sorted({box.style for box in boxes if box.style}, key=[*_STYLES].index):
        fill, edge, ink = _STYLES[name].box.split()
        lines.append(f"    classDef {name} fill:{fill},stroke:{edge},color:{ink}")
    return "\n".join(lines) + "\n"


def _depths(boxes: Sequence[_Box]) -> dict[str, int]:
    """The layer of each box by its task id: the number of edges on the longest way to it."""
    depths = dict.fromkeys([box.task_id for box in boxes], 0)
    graph = {box.task_id: depths.keys() & {*box.upstream} for box in boxes}
    with contextlib.suppress(graphlib.CycleError):  # only in a file that was tampered with
        for task_id in graphlib.TopologicalSorter(graph).static_order():
            depths[task_id] = max((1 + depths[up] for up in graph[task_id]), default=0)
    return depths


def _dag_boxes(dag: Dag) -> list[_Box]:
    tasks = [(x.task_id, x._upstream, getattr(x.task_group, "group_id", None)) for x in dag.tasks]
    return [_Box(task_id, [task_id], "", above, group_id) for task_id, above, group_id in tasks]


def _run_boxes(instances: list[TaskInstance]) -> list[_Box]:
    boxes = []
    for members in _by_task(instances):
        first, line = members[0], _line_of(members)
        facts = [line.state]
        if len(members) == 1:
            facts += [_seconds_text(line.seconds), f"try {line.tries}" if line.tries > 1 else ""]
        lines = [line.label, " - ".join(filter(None, facts))]
        upstream = dict.fromkeys(sorted(set().union(*(ti.upstream_task_ids for ti in members))))
        boxes.append(_Box(first.task_id, lines, line.style, upstream, first.task_group_id))
    return boxes


def _draw_gantt(run: DagRun, attempts: Iterable[TaskInstance]) -> str:
    """A Mermaid gantt of attempts and waits for a retry. Raises _UsageError if nothing began."""
    bars = []
    for line, began in _bars(attempts, _GANTT_FOLD):
        start = round(1000 * began)  # milliseconds, as `dateFormat x` wants them; so are the others
        end = max(start + 1, round(1000 * (began + (line.seconds or 0))))
        state = "" if line.style == "success" else line.state
        text = f"{line.label} {state}".strip() or " "
        # The first letter is written as a code, so that no name reads as a keyword (`section`).
        name = f"#{ord(text[0])};{_mermaid_text(text[1:] or ' ')}"
        bars.append((start, end, f"{name} :{_STYLES[line.style].tag}"))
    if not bars:
        raise _UsageError(f"no task of run {run.run_id!r} has started: there is nothing to draw")
    length = max(end for _, end, _ in bars) - bars[0][0]
    axis = "%S.%L" if length < 10_000 else "%H:%M:%S" if length < 6 * 3600_000 else "%m-%d %H:%M"
    title = _mermaid_text(f"{run.dag_id} {run.run_id}")
    text = f"gantt\n    title {title}\n    dateFormat x\n    axisFormat {axis}\n"
    return text + "".join(f"    {bar}{start}, {end}\n" for start, end, bar in bars)


def _bars(attempts: Iterable[TaskInstance], fold: int) -> list[tuple[_Line, float]]:
    """A line for each attempt and each wait for a retry, with the Unix time at which it
    began, sorted by that. A task with `fold` mapped instances or more has one line."""
    lines = []
    for members in _by_task(ti for ti in attempts if ti.start_date):
        if len({ti.map_index for ti in members}) >= fold:
            lines.append(_line_of(members))
            continue
        for before, ti in zip([None, *members], members, strict=False):
            line = _line_of([ti])
            if before and (before.map_index, before.state) == (ti.map_index, _S.FAILED):
                wait = _Line(f"{line.label} waits", "", "none", 0, before.end_date, line.start)
                lines += [wait] if (wait.seconds or 0) > 0.05 else []  # a shorter one can't be seen
            lines.append(line)
    for line in lines:
        line.label += f" try {line.tries}" if line.tries > 1 else ""
    return sorted([(x, x.start.timestamp()) for x in lines if x.start], key=operator.itemgetter(1))


def _live_url(diagram: str) -> str:
    """A link that holds the diagram, deflated, behind its `#`: no browser sends that part."""
    state = {"code": diagram, "mermaid": '{"theme": "default"}', "autoSync": True}
    packed = zlib.compress(json.dumps(state).encode(), 9)
    return f"https://mermaid.live/view#pako:{base64.urlsafe_b64encode(packed).decode().rstrip('=')}"


# --- Showing: text --------------------------------------------------------------------------------

_LINE_SHOWN = 300  # the most characters of a line, where the last lines of an output are shown
# Not `isprintable`, yet harmless: white space, some other spaces, joiners in words and emoji.
_HARMLESS = "\n\t\xa0\u2007\u2009\u200a\u200c\u200d\u202f\u3000"


def _clean(text: object) -> str:
    """Text for a terminal: control characters, which could steer it, as visible escapes."""
    text = str(text)
    if text.isprintable():
        return text
    odd = [c for c in {*text} if not (c.isprintable() or c in _HARMLESS)]
    escapes = {ord(c): c.encode("unicode_escape").decode() for c in odd}
    return text.translate(escapes) if odd else text  # `translate` is slow for a long text


def _fenced(text: str, kind: str) -> str:
    """A Markdown code block of this kind around any text, even one that has backticks."""
    ticks = max([2, *(len(run) for run in re.findall("`+", text))]) + 1
    return f"{'`' * ticks}{kind}\n{text.rstrip()}\n{'`' * ticks}\n"


def _markdown(text: object) -> str:
    """Any text as one line of Markdown, also for a table's cell, in which nothing is markup."""
    text = " ".join(_clean(text).split())
    return re.sub(r"[^\w\s.,:()=+/'-]|_", lambda match: f"&#{ord(match[0])};", text)


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text, safe for a terminal, its states in colour, its rows cut to fit it."""
    color, columns = _may_color(sys.stdout), sys.maxsize
    if _may_redraw(sys.stdout):
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size(sys.stdout.fileno()).columns or columns
    cells = [list(heads), *([re.sub(r"[\n\t]", " ", _clean(cell)) for cell in row] for row in rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(heads))]
    fits = sum(widths, 2 * len(widths)) <= columns
    if not fits:  # the names are cut first: the state, the try and the start take some 24 columns
        for row in cells:
            row[0] = _shortened(row[0], max(columns - 24, 12))
        widths[0] = max(_width(row[0]) for row in cells)
    lines = []
    for row in cells:
        pairs = zip(row, widths, strict=True)
        padded = (_paint(c + " " * (w - _width(c)), c, color) for c, w in pairs)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines if fits else [_fit(line, columns) for line in lines])


def _width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    # Marks and joiners take none; nor do the later letters of a Hangul syllable in single letters.
    taking = (c for c in text if category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (east_asian_width(c) in "WF") for c in taking if not "\u1160" <= c <= "\u11ff")


def _may_redraw(stream: Any) -> bool:
    """Whether the stream is a terminal on which lines can be drawn again."""
    with contextlib.suppress(AttributeError, ValueError):  # None, or closed
        return bool(stream.isatty()) and os.environ.get("TERM", "dumb") != "dumb"
    return False


def _may_color(stream: Any) -> bool:
    """Whether to write colours to the stream. NO_COLOR wins over FORCE_COLOR, as in CPython."""
    wanted = os.environ.get("FORCE_COLOR") or _may_redraw(stream)
    return bool(wanted) and not os.environ.get("NO_COLOR")


def _paint(text: str, state: str | None, color: bool) -> str:
    code = _STYLES[state].terminal if color and state in _STYLES else ""
    return f"\x1b[{code}m{text}\x1b[0m" if code and text else text


def _fit(text: str, width: int) -> str:
    """Cut a line to a width in columns. All its colour codes are kept, and take no column."""
    kept = ""
    for part in re.findall("\x1b.*?m|.", text):
        width -= 0 if part[0] == "\x1b" else _width(part)
        kept += part if width >= 0 or part[0] == "\x1b" else ""
    return kept


def _seconds_text(seconds: float | None) -> str:
    """A duration that a person can read: 40 ms, 0.3 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return ""
    short = ((0.001, "<1 ms"), (0.095, f"{1000 * seconds:.0f} ms"), (9.95, f"{seconds:.1f} s"))
    for limit, text in short:  # a time just above 9.95 seconds would read `10.0 s`
        if seconds < limit:
            return text
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _local_time(moment: _datetime.datetime | None) -> str:
    """A local time with its day; empty for None."""
    if moment is None:
        return ""
    with contextlib.suppress(OverflowError, ValueError):  # in a file that was tampered with
        moment = moment.astimezone()
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def _when(moment: _datetime.datetime | None) -> str:
    """A local time for people: `17:09:04` if it is today, else with its day and without seconds."""
    text = _local_time(moment)
    return text[11:] if text.startswith(f"{_datetime.datetime.now():%Y-%m-%d} ") else text[:-3]


def _ago(moment: _datetime.datetime | None) -> str:
    """How long ago a moment was, such as `40 s ago`, in s, min, h or d; `none` for None."""
    if (seconds := _span(moment, _utcnow())) is None:
        return "none"  # rather than `never`: `prune` may have deleted some
    units = ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h"), (math.inf, 86400, "d"))
    unit, name = next((unit, name) for limit, unit, name in units if seconds < limit)
    return f"{int(seconds // unit)} {name} ago"


def _printed(text: str) -> str:
    """Output as a terminal shows it in the end: of a line what follows its last carriage return."""
    # Where tqdm redraws a lower bar it goes up and down again, and so stays on the line. The text's
    # last character is left as it is, because the output may go on behind it.
    text = text[:-1].replace("\x1b[A\n", "\r") + text[-1:]
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _clean("\n".join(lines))


def _tail(text: str, count: int = 10) -> list[str]:
    """The last `count` lines of an output, safe for a terminal, each of bounded length."""
    text = text.rstrip("\r\n")
    end = text[-100 * _LINE_SHOWN :]
    whole = end.partition("\n")[2] if len(end) < len(text) else end
    lines = _printed(whole or end).splitlines()[-count:]
    return [x if len(x) <= _LINE_SHOWN else f"{x[:_LINE_SHOWN]} [...]" for x in lines]


def _say(line: str, end: str = "\n") -> None:
    """Write a line to standard error. If that fails, it is ignored: nothing depends on the line."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if sys.stderr is not None:  # for None `print` would write to standard output
            _print(f"{line}{end}", sys.stderr)


def _print(text: str, stream: Any = None) -> None:
    print(text, end="", file=stream, flush=True)


def _typed(*words: str) -> str:
    """Words of a command as one types them in a shell, quoted where that is needed."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """Quote a word of a command. A word with characters that a terminal can't show becomes `$'...'`
    with all bytes but plain ones as octal numbers, which bash, zsh and ksh read."""
    if _clean(word) == word and not {"\n", "\t"} & {*word}:
        return shlex.quote(word)
    data = word.encode(errors="surrogateescape")
    escaped = (chr(n) if 32 <= n < 127 and n not in b"'\\" else f"\\{n:03o}" for n in data)
    return f"$'{''.join(escaped)}'"


def _command(start: str, names: Sequence[str], options: Mapping[str, str]) -> str:
    """A command to paste. It is one line, so that no id in a harmful file can look like a
    second command; and no name or value that begins with a dash reads as an option."""
    words: list[str] = []
    for option, value in options.items():
        words += [f"{option}={value}"] if value[:1] == "-" else [option, value][: 1 + bool(value)]
    dashed = any(name[:1] == "-" for name in names)
    words = [*words, "--", *names] if dashed else [*names, *words]
    return _clean(f"{start} {_typed(*words)}").replace("\n", "\\n")


def _python() -> str:
    """How to type this interpreter: as `python3` if that finds it at a terminal, else as a path."""
    own = "" if _FROZEN else sys.executable or ""  # None where a program embeds Python
    found = shutil.which("python3") or ""
    # Both must be equal: environments may link to one interpreter, and a folder may hold several.
    is_own = all(of(found) == of(own) for of in (os.path.dirname, os.path.realpath))
    return "python3" if not own or (is_own and _may_redraw(sys.stderr)) else _typed(own)


def _own_command() -> str:
    """The command that starts this module's command line from any folder."""
    here, folders = os.path.abspath(__file__), [*site.getsitepackages(), site.getusersitepackages()]
    installed = any(here.startswith(f"{folder}{os.sep}") for folder in folders)
    if os.path.exists(here) and not installed:
        return f"{_python()} {_typed(here)}"
    above = os.path.abspath(f"{here}/..{'/..' * __name__.count('.')}")  # of a module in a zip
    path = "" if installed or _FROZEN else f"PYTHONPATH={_typed(above)} "
    return f"{path}{_python()} -m {__name__}"


# --- Showing: failures ----------------------------------------------------------------------------

_REPORT_ROWS = 8  # rows of 80 columns for the report of a run that has only one failure
_MOST_TOLD = 10  # the most failures that are told one by one
_FEW_TOLD = 3  # the same where there is little room; also the most reasons told of one task
# What `_call_back` prints. It can match in one way only, or a line full of it would take forever.
_CALLBACK_FAILED = r"liteflow: (on_[\w+]+_callback of (?:DAG|task) '[\w.-]+' failed: .*)"


class _Failure:
    """What reports and pages tell of a failed instance and of the others that failed alike."""

    def __init__(self, run: DagRun, seen: list[TaskInstance], alike: list[TaskInstance]) -> None:
        ti, *others = alike
        self.ti, self.others = ti, others
        tries = f", try {ti.try_number} of {ti.max_tries + 1}" if ti.max_tries > 0 else ""
        self.head = f"{_with_element(ti)} failed{tries}: {_last_line(ti.error)}"
        self.facts = _facts_of(ti.error or "")
        self.follows = []  # which others failed, and what did not run because of this failure
        if others:
            is_mixed = len({_last_line(each.error) for each in alike}) > 1
            how_many = f"{len(others)} more failed{', for other reasons, too' if is_mixed else ''}"
            self.follows.append(f"{how_many}: {_few(map(_with_element, others))}")
        if blocked := _blocked_by(ti.task_id, seen):
            self.follows.append(f"not run because of it: {_few(blocked)}")
        self.more = _command(f"{_own_command()} show", [run._name, ti._label], {"--db": run._path})


def _failures_of(run: DagRun, instances: list[TaskInstance], most: int) -> list[_Failure]:
    """The first `most` failures of a run. Instances of a task that failed for one reason are
    one failure. A task has up to `_FEW_TOLD`, the last of which takes in all further reasons."""
    alike: dict[str, dict[str, list[TaskInstance]]] = {}
    failed = [ti for ti in instances if ti.state is _S.FAILED]
    for ti in sorted(failed, key=lambda ti: str(ti.end_date)):  # the earliest may be the cause
        reasons, reason = alike.setdefault(ti.task_id, {}), _last_line(ti.error)
        if reason not in reasons and len(reasons) == _FEW_TOLD:
            reason = [*reasons][-1]
        reasons.setdefault(reason, []).append(ti)
    groups = [group for reasons in alike.values() for group in reasons.values()]
    return [_Failure(run, instances, group) for group in groups[:most]]


def _facts_of(error: str) -> list[str]:
    """What a traceback says beside the reason: the exception's further lines and notes, the
    first members if it is a group, its cause, and the place where it was raised."""
    before, behind = _split_traceback(error)
    # A line such as `+---------------- 1 ----------------` stands above each member of a group.
    notes, *members = re.split(r"^[ |]*\+[-+]+ \d+ -+\n", behind, flags=re.MULTILINE)
    lines = [line for line in notes.split("\n") if line.strip(" |+-")]
    facts = lines if len(lines) <= 2 else [*lines[:2], "..."]
    for n, member in enumerate(members[:2], 1):
        text = re.sub(r"^ *(\| ?|\+-+$)", "", member, flags=re.MULTILINE).strip()
        facts.append(f"{n} of {len(members)}: {_own_line(text)}")
    cause = before.rpartition("\nThe above exception was the direct cause of")[0].strip()
    cause = cause.removesuffix('"""').rstrip()  # multiprocessing quotes a child's traceback by them
    facts += [f"caused by {_own_line(cause)}"] if cause else []
    if error.endswith("killed by SIGKILL"):  # the worker; a command's error ends with the command
        facts.append("by somebody, or by the system, as it does when memory runs out")
    return [*facts, *filter(None, [_place_of(error)])]


def _own_line(text: str) -> str:
    """The type and message of a traceback's last exception, and where it was raised."""
    begins = r"^(?:.*Traceback \(most recent call last\):|The above .*:|During handling .*:)\n+"
    end = re.split(begins, text, flags=re.MULTILINE)[-1]
    own = re.search(r"^[\w.]+:\s*\n.*|^\S.*", end, re.MULTILINE)
    return _with_place(_last_line(own and re.sub(r"\n\s*", "", own[0])), text)


def _said_once(error: str) -> str:
    """A traceback without its last line, if that only repeats the reason."""
    return error.rpartition("\n")[0] if _split_traceback(error)[1] else error


def _own_output(run: DagRun, ti: TaskInstance) -> str:
    """A task's output without the messages about callbacks that failed."""
    return re.sub(rf"{_CALLBACK_FAILED}(?:\n    \| .*)*\n?", "", run.log(ti.task_id, ti.map_index))


def _with_element(ti: TaskInstance) -> str:
    return f"{ti._label} {_element_text(ti.element)}".rstrip()


def _blocked_by(task_id: str, instances: list[TaskInstance]) -> list[str]:
    """The labels of the instances that did not run because this task failed."""
    blocked = [ti for ti in instances if ti.state is _S.UPSTREAM_FAILED and ti.task_id != task_id]
    below = collections.defaultdict[str, set[str]](set)
    for ti in blocked:
        for up in ti.upstream_task_ids:
            below[up].add(ti.task_id)
    reached = _all_from([task_id], below.__getitem__)
    return [ti._label for ti in blocked if ti.task_id in reached]


def _report_of(run: DagRun, instances: list[TaskInstance]) -> list[str]:
    """Lines for people: what failed in a run, and the commands that show more or go on."""
    failures, lines = _failures_of(run, instances, _MOST_TOLD), []
    for failure in failures:
        told = [failure.head, *(f"    {fact}" for fact in failure.facts)]
        follows = [f"    {line}" for line in failure.follows]
        # The rows that are left are for its output; 3 are for two commands and the run's name.
        room = _REPORT_ROWS - 3 - sum(1 + len(line) // 80 for line in told + follows)
        tail = _tail(_own_output(run, failure.ti), max(1, room) if len(failures) == 1 else 2)
        while len(tail) > 1 and sum(1 + len(line) // 74 for line in tail) > room:  # indented by 6
            del tail[0]
        lines += [*told, *(f"    | {line}" for line in tail), *follows, f"    more: {failure.more}"]
    lines += _other_trouble(run, instances, failures)
    lines += [f"{purpose}: {command}" for purpose, command in _way_on(run, instances).items()]
    return [_clean(line) for line in lines]


def _way_on(run: DagRun, instances: list[TaskInstance]) -> dict[str, str]:
    """The command that goes on with a run, by what it is for; empty if none is needed."""
    if run.owner_alive or run.state is DagRunState.SUCCESS:
        return {}
    failed = any(ti.state is _S.FAILED for ti in instances)
    purpose = "to go on once it is mended" if failed else "to go on"
    in_python = f"dag.run(run_id={run.run_id!r}, resume=True), in Python"
    return {purpose: _script_command(run, {"--resume": ""}) or _clean(in_python)}


def _other_trouble(run: DagRun, instances: list[TaskInstance], told: list[_Failure]) -> list[str]:
    """Lines on failures that are not `told` yet, on instances that were interrupted or given up
    between two attempts, and on callbacks that failed."""
    seen = {id(ti) for failure in told for ti in (failure.ti, *failure.others)}
    rest = [ti._label for ti in instances if ti.state is _S.FAILED and id(ti) not in seen]
    cut = []
    for ti in instances:
        if ti._word == "interrupted" or (ti.state is _S.SKIPPED and ti._attempt_state == "failed"):
            why = f" ({_last_line(ti.error)})" if ti._attempt_state == "failed" else ""
            cut.append(f"{_with_element(ti)}{why}")
    lines = [f"failed, too: {_few(rest)}"] if rest else []
    lines += [f"cut off: {_few(cut)}"] if cut else []
    return lines + _failed_callbacks(run)


def _failed_callbacks(run: DagRun) -> list[str]:
    since = run._row.resumed_date  # leaves out callbacks that failed before the last resume
    if since and not run._look(_select_begun, begun_since=since, limit=1):
        since = None  # the resume ran nothing: its callbacks print to the log of an older attempt
    logs = run._look(_select_callback_errors, begun_since=since, limit=_MOST_TOLD)  # newest first
    text = "\n".join(row.text for row in logs)
    failed = [*dict.fromkeys(re.findall(_CALLBACK_FAILED, text))]
    more = ["other callbacks failed, too: see the logs"] if len(failed) > _FEW_TOLD else []
    return failed[:_FEW_TOLD] + more


def _is_of_package(file: str) -> bool:
    """Whether a file has relative imports, or imports this module from a package. `liteflow run`
    can't load such a file: it has no package there, and would get a second copy of this module."""
    with contextlib.suppress(OSError), open(file, "rb") as source:
        text = source.read(_TEXT_LIMIT)  # not all: a harmful database may name any file
        form = rb"^from\s+\.|^(from|import)\s+\S+\.liteflow\b"
        return re.search(form, text, re.MULTILINE) is not None
    return False


def _script_command(run: DagRun, options: Mapping[str, str]) -> str:
    """The command that starts a run's script with options for this run; empty if there is none."""
    start, names = run._row.command or "", list[str]()
    if start[:2] in ("", "--"):  # the run was started in Python; of a command it has only options
        file = _load_dag(run.dag_id, run._path).fileloc or ""
        if not os.path.isfile(file) or _is_of_package(file):
            return ""
        start, names = f"{_own_command()} run {start}".rstrip(), [file, run.dag_id]
    return _command(start, names, {**options, "--run-id": run.run_id, "--db": run._path})


# --- Showing: pages -------------------------------------------------------------------------------

_CSS = """
.liteflow { --ink: #1c2430; --soft: #5a6675; --paper: #ffffff; --band: #f3f5f8; --line: #cfd6df;
  color: var(--ink); background: var(--paper); font: 14px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .liteflow { --ink: #e4e9f0; --soft: #a3b0c0;
  --paper: #14181d; --band: #1d232b; --line: #3a444f; } }
body.liteflow { margin: 0 auto; padding: 1rem; max-width: 1200px; }
.liteflow h1 { font-size: 1.5rem; margin: .3rem 0; overflow-wrap: anywhere; }
.liteflow h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere; }
.liteflow p { margin: .3rem 0; overflow-wrap: anywhere; }
.liteflow .fact { display: inline-block; margin-right: 1.5rem; }
.liteflow .soft { color: var(--soft); }
.liteflow .wide { overflow-x: auto; }
.liteflow table { border-collapse: collapse; }
.liteflow th, .liteflow td { text-align: left; vertical-align: top; padding: .15rem .6rem;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.liteflow td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.liteflow .chip { background: var(--fill); color: var(--text); border: 1px solid var(--line);
  border-radius: .3rem; padding: 0 .4rem; white-space: nowrap; }
.liteflow pre { background: var(--band); padding: .5rem .7rem; margin: .3rem 0; overflow-x: auto;
  font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.liteflow section { border-left: 4px solid var(--fill, var(--line)); padding-left: .8rem;
  margin: .8rem 0; }
.liteflow > details > summary { font-size: 1.15rem; font-weight: bold; margin: 1.6rem 0 .5rem; }
.liteflow svg { display: block; font: 12px system-ui, sans-serif; }
.liteflow svg text { fill: var(--text, var(--ink)); }
.liteflow svg .box { fill: var(--fill); stroke: var(--soft); }
.liteflow svg path { fill: none; stroke: var(--soft); }
.liteflow .grid td, .liteflow .grid th { padding: 0; min-width: 1.1rem; border: 1px solid
  var(--paper); text-align: center; vertical-align: bottom; font-size: 11px; }
.liteflow .grid td { background: var(--fill); color: var(--text); height: 1.1rem; }
.liteflow .strip .chip { display: inline-block; min-width: 1rem; min-height: 1.3rem; padding: 0;
  vertical-align: top; }
.liteflow .grid .none { box-shadow: inset 0 0 0 1px var(--line); }
.liteflow .grid tr > :first-child { position: sticky; left: 0; background: var(--paper);
  text-align: left; padding-right: .6rem; white-space: nowrap; font-size: 13px; }
.liteflow .grid a { display: block; text-decoration: none; }
.liteflow .bar { display: block; background: var(--fill); border: 1px solid var(--soft);
  border-bottom: 0; margin: 0 1px; box-sizing: border-box; }
"""
_CSS += "".join(
    f".liteflow .{state} {{ --fill: {style.fill}; --text: {style.text}; }}\n"
    for state, style in _STYLES.items()
)


class _Html(str):
    """Text that is HTML already. All other text is escaped when it is put into an element."""


def _html(tag: str, *inside: object, **attributes: object) -> _Html:
    """An element. In the names of its attributes `_` stands for `-`, and a last `_` for nothing."""
    named = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    words = [tag, *(f'{name}="{html.escape(_clean(value))}"' for name, value in named)]
    text = "".join(x if isinstance(x, _Html) else html.escape(_clean(x)) for x in inside)
    return _Html(f"<{' '.join(words)}>{text}</{tag}>")


def _html_page(title: str, *body: _Html) -> str:
    """A whole page. It needs nothing else: no script, no other file, no network."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    made = _html("p", f"made {_local_time(_utcnow())} by liteflow {__version__}", class_="soft")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}{_html("title", title)}'
        f"<style>{_CSS}</style></head>\n{_html('body', *body, made, class_='liteflow')}</html>\n"
    )


def _chip(style: str, text: str, **more: object) -> _Html:
    return _html("span", f"{_STYLES[style].sign} {text}".strip(), class_=f"chip {style}", **more)


def _folded_away(title: str, *inside: _Html, is_open: bool = False) -> _Html:
    return _html("details", _html("summary", title), *inside, **{"open": ""} if is_open else {})


def _html_table(heads: Iterable[object], rows: Iterable[Sequence[object]]) -> _Html:
    head = _html("tr", *(_html("th", x) for x in heads))
    body = [_html("tr", *(_html("td", x) for x in row)) for row in rows]
    return _html("div", _html("table", head, *body), class_="wide")


def _and_more(count: int) -> list[_Html]:
    return [_html("p", f"and {count} more")] if count > 0 else []


_Knot = str | tuple[str, int]  # a box's task_id; or a bend, where edges from it pass layer n
_Link = tuple[_Knot, _Knot]
_BOX_SIZE = 190, 42  # width and height, in pixels
_BOX_GAPS = 50, 14  # pixels between two layers, and between two boxes of a layer
_TIMELINE = 230, 760, 20  # pixels: the width of the names and of the bars, the height of a row
_MOST_DRAWN = 200  # if there are more, boxes are folded, and further bars are left out
_PAGE_ROWS, _PAGE_CELLS = 500, 10_000  # the most rows of a table, and cells of a grid
_MOST_RUNS = 50  # the most columns of a DAG's grid, and runs that `runs` lists without --limit


def _svg_graph(boxes: Sequence[_Box]) -> _Html:
    """Draw boxes in layers from left to right, and edges between them; see `_folded_boxes`."""
    boxes = _folded_boxes(boxes)
    layers, links = _layered(boxes)
    (wide, high), (apart, _) = _BOX_SIZE, _BOX_GAPS
    ys = _untangled(layers, links)
    top = min(ys.values(), default=0)
    xs = {knot: n * (wide + apart) for n, layer in enumerate(layers) for knot in layer}
    at = {knot: (x, round(ys[knot] - top + high / 2 + 1)) for knot, x in xs.items()}
    parts, upstream = [], {box.task_id: box.upstream for box in boxes}
    for a, b in links:
        (x1, y1), (x2, y2) = at[a], at[b]
        x1, along = x1 + wide, f"H{x2 + wide}" if isinstance(b, tuple) else ""
        bent = x1 + apart // 2
        parts.append(_html("path", d=f"M{x1} {y1}C{bent} {y1} {bent} {y2} {x2} {y2}{along}"))
        if isinstance(b, str) and (label := upstream[b].get(a if isinstance(a, str) else a[0])):
            parts.append(_html("text", label, x=x2 - 4, y=y2 - 5, text_anchor="end"))
    for box in boxes:
        x, y = at[box.task_id]
        frame = _html("rect", class_="box", x=x, y=y - high // 2, width=wide, height=high, rx=5)
        texts = [_shortened(_clean(line), 24) for line in box.lines]
        texts[1:] = [f"{_STYLES[box.style].sign} {text}".strip() for text in texts[1:]]
        top_line = y + 4 - 8 * (len(texts) - 1)
        lines = [_html("text", t, x=x + 8, y=top_line + 17 * n) for n, t in enumerate(texts)]
        title = _html("title", ", ".join([box.task_id, *box.lines[1:]]))
        parts.append(_html("g", title, frame, *lines, class_=box.style or "none"))
    height = round(max(ys.values(), default=0) - top) + high + 2
    width = len(layers) * (wide + apart) - apart + 2
    return _html("div", _html("svg", *parts, width=width, height=height), class_="wide")


def _folded_boxes(boxes: Sequence[_Box]) -> Sequence[_Box]:
    """The boxes; if they are too many, one for all of a state and about the same depth."""
    if len(boxes) <= _MOST_DRAWN:
        return boxes
    depths = _depths(boxes)
    step = 1 + max(depths.values()) // 20  # so many layers become one, which leaves some 20
    kinds = {box.task_id: (depths[box.task_id] // step, box.style) for box in boxes}
    links = {(kinds[up], kinds[box.task_id]) for box in boxes for up in box.upstream if up in kinds}
    folded = []
    for kind, count in collections.Counter(kinds.values()).items():
        above = dict.fromkeys(str(a) for a, b in links if b == kind and a[0] < b[0])
        lines = [f"{count} tasks", *filter(None, [kind[1]])]
        folded.append(_Box(str(kind), lines, kind[1], above))
    return folded


def _layered(boxes: Sequence[_Box]) -> tuple[list[list[_Knot]], dict[_Link, None]]:
    """The layers of boxes and bends, and the edges, cut into links from layer to layer."""
    depths, links = _depths(boxes), dict[_Link, None]()
    for box in boxes:
        for up in sorted(depths.keys() & {*box.upstream}):
            between = [(up, depth) for depth in range(depths[up] + 1, depths[box.task_id])]
            # Edges from one box share their bends: a link that they have in common is there once.
            links |= dict.fromkeys(itertools.pairwise([up, *between, box.task_id]))
    layers: list[list[_Knot]] = [[] for _ in range(max(depths.values(), default=0) + 1)]
    for knot in dict.fromkeys([*depths, *itertools.chain(*links)]):
        layers[depths[knot] if isinstance(knot, str) else knot[1]].append(knot)
    return layers, links


def _untangled(layers: Sequence[list[_Knot]], links: Iterable[_Link]) -> dict[_Knot, float]:
    """Order each layer so that few edges cross, and return each knot's y. Two sweeps down and two
    up move a knot near the mean of those that it is linked to in the layer before."""
    above, below = (collections.defaultdict[_Knot, list[_Knot]](list) for _ in range(2))
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    places = {knot: float(n) for layer in layers for n, knot in enumerate(layer)}
    for near, sweep in 2 * ((above, layers), (below, layers[::-1])):
        for layer in sweep:
            others = {knot: [places[x] for x in near.get(knot, [knot])] for knot in layer}
            wanted = {knot: sum(ys) / len(ys) for knot, ys in others.items()}
            layer.sort(key=wanted.__getitem__)
            low = -math.inf
            for knot in layer:
                # A box takes its height and a gap, a bend takes half of that.
                half = (_BOX_SIZE[1] + _BOX_GAPS[1]) / (4 if isinstance(knot, tuple) else 2)
                places[knot] = max(wanted[knot], low + half)
                low = places[knot] + half
            shift = sum(places[knot] - wanted[knot] for knot in layer) / max(len(layer), 1)
            places |= {knot: places[knot] - shift for knot in layer}
    return places


def _svg_timeline(attempts: Iterable[TaskInstance]) -> _Html:
    """Draw a row for each attempt and each wait for a retry: its name, its bar, its duration."""
    bars = _bars(attempts, _TIMELINE_FOLD)
    if not bars:
        return _html("p", "nothing has started", class_="soft")
    _, first = bars[0]
    length = max(0.001, *(began - first + (line.seconds or 0) for line, began in bars))
    names, span, row = _TIMELINE
    scale, bottom, parts = span / length, row * (len(bars[:_MOST_DRAWN]) + 1), []
    for n in range(5):  # lines behind the bars, at each quarter
        x = names + span * n // 4
        parts.append(_html("path", d=f"M{x} {row}V{bottom}", stroke_dasharray="2 4"))
        parts.append(_html("text", _seconds_text(length * n / 4) if n else "0", x=x + 2, y=13))
    for n, (line, began) in enumerate(bars[:_MOST_DRAWN], 1):
        took, high = _seconds_text(line.seconds), 4 if line.style == "none" else row - 6
        left = round(names + scale * (began - first), 1)
        width = round(max(2.0, scale * (line.seconds or 0)), 1)
        place = {"x": left, "y": n * row + (row - high) // 2, "width": width, "height": high}
        facts = filter(None, (line.label, line.state, _when(line.start), took))
        title, bar = _html("title", ", ".join(facts)), _html("rect", class_="box", **place)
        parts.append(_html("g", title, bar, class_=line.style))
        parts.append(_html("text", _shortened(_clean(line.label), 34), x=0, y=n * row + 14))
        parts.append(_html("text", took, x=left + width + 4, y=n * row + 14))
    svg = _html("svg", *parts, width=names + span + 80, height=bottom + 4)
    return _html("div", svg, *_and_more(len(bars) - _MOST_DRAWN), class_="wide")


def _run_page(run: DagRun) -> str:
    """A page of a run: facts, failures, its graph, its timeline, its tasks, its values."""
    instances, values = _seen_instances(run), run._look(_select_xcoms)
    rows = [(_label_of(x.task_id, x.map_index), x.key, x.type, x.preview) for x in values]
    shown = _html_table(("TASK", "KEY", "TYPE", "VALUE"), rows[:_PAGE_ROWS])
    return _html_page(
        f"{run._name}: {_run_state(run)}",
        _html("h1", run.dag_id, " ", _run_chip(run)),
        *_run_facts(run, instances, _MOST_SHOWN),
        _html("h2", "Graph"),
        _svg_graph(_run_boxes(instances)),
        _html("h2", "Timeline"),
        _svg_timeline(_seen_instances(run, attempts=True)),
        _task_table(instances),
        _folded_away("Values", shown, *_and_more(len(rows) - _PAGE_ROWS)),
    )


def _run_style(run: DagRun) -> str:
    return "interrupted" if run._owner_died else run.state.value


def _run_chip(run: DagRun) -> _Html:
    return _chip(_run_style(run), _run_state(run))


def _run_facts(run: DagRun, instances: list[TaskInstance], most: int) -> list[_Html]:
    """The facts of a run, and at most `most` of its failures."""
    facts = {
        "run": run.run_id,
        "began": _local_time(run.start_date),
        "took": _seconds_text(run.duration),
        "tasks": _counts_of(instances),
        "logical date": run.logical_date or "",
        "conf": _shown(json.dumps(run.conf, ensure_ascii=False), 4000, str) if run.conf else "",
        "database": run._path,
        "values": "deleted (prune --values)" if run._row.values_deleted else "",
        "reason": run.reason or "",
    }
    named = [(_html("span", f"{name} ", class_="soft"), x) for name, x in facts.items() if x]
    parts = [_html("p", name, text, class_="fact") for name, text in named]
    return [*parts, *_failure_sections(run, instances, most)]


def _failure_sections(run: DagRun, instances: list[TaskInstance], most: int) -> list[_Html]:
    """At most `most` failures as in a report, their tracebacks folded away, and how to go on."""
    parts, failures = [], _failures_of(run, instances, most)
    for failure in failures:
        told = [_html("p", line) for line in (_html("b", failure.head), *failure.facts)]
        others = [part for ti in failure.others[: most - 1] for part in _output_of(run, ti)]
        told += _output_of(run, failure.ti)[1:]  # without the name, which stands in the head
        trace = _halves(_said_once(failure.ti.error or ""), 4000)
        told.append(_folded_away("traceback", _html("pre", trace)))
        told += [_html("p", line) for line in failure.follows]
        told += [_folded_away("their output", *others)] if others else []
        parts.append(_html("section", *told, _html("pre", failure.more), class_="failed"))
    trouble = _other_trouble(run, instances, failures)
    parts += [_html("section", _html("p", line), class_="failed") for line in trouble]
    for purpose, command in _way_on(run, instances).items():
        parts.append(_html("section", _html("p", purpose), _html("pre", command)))
    return parts


def _output_of(run: DagRun, ti: TaskInstance) -> list[_Html]:
    tail = _tail(_own_output(run, ti), _MOST_SHOWN)
    return [_html("p", _with_element(ti)), _html("pre", "\n".join(tail))] if tail else []


def _task_table(instances: list[TaskInstance]) -> _Html:
    lines = _lines_of(instances)
    # If there are too many lines for a page, those of successes are left out first.
    kept = {id(x) for x in sorted(lines, key=lambda x: x.style == "success")[:_PAGE_ROWS]}
    rows = [x.cells(_chip(x.style, x.state)) for x in lines if id(x) in kept]
    table, more = _html_table(_HEADS, rows), _and_more(len(lines) - len(rows))
    return _folded_away("Tasks", table, *more, is_open=len(rows) <= 100)


def _dag_page(dag: Dag) -> str:
    """A DAG's page: facts and failures of the newest run; a grid with a row for each task and a
    column for each of the last runs, on top of it a bar of its duration; then the other runs."""
    runs = dag.runs(limit=_MOST_RUNS)
    longest = max([run.duration or 0 for run in runs], default=0) or 1
    heads, sections = [_html("th", "")], []
    cells = collections.defaultdict[str, list[_Html]](lambda: [_html("td")] * len(runs))
    for n, run in enumerate(runs):
        title = f"{run.run_id}: {_run_state(run)}, {_seconds_text(run.duration)}"
        high = 4 + round(60 * ((run.duration or 0) / longest))
        bar = _html("span", class_=f"bar {_run_style(run)}", style=f"height:{high}px")
        heads.append(_html("th", _html("a", bar, href=f"#run{n}", title=title)))
        instances = _seen_instances(run)  # of one run at a time, to save memory
        for members in _by_task(instances):
            cells[members[0].task_id][n] = _grid_cell(_line_of(members))
        head = _html("h2", _local_time(run.start_date), " ", _run_chip(run), id=f"run{n}")
        sections.append([head, *_run_facts(run, instances, _FEW_TOLD)])
    most = _PAGE_CELLS // max(len(runs), 1)
    rows = [_html("tr", _html("td", name), *row) for name, row in [*cells.items()][:most]]
    return _html_page(
        dag.dag_id,
        _html("h1", dag.dag_id),
        _html("p", f"{dag.description or ''} (runs shown: {len(runs)})".strip()),
        *itertools.chain(*sections[:1]),  # the newest run, to be seen at once
        _html("div", _html("table", _html("tr", *heads), *rows, class_="grid"), class_="wide"),
        *_and_more(len(cells) - most),
        *itertools.chain(*sections[1:]),
    )


def _grid_cell(line: _Line) -> _Html:
    tries = f", try {line.tries}" if line.tries > 1 else ""
    words = f"{line.state} {_seconds_text(line.seconds)}{tries}"
    return _html("td", _STYLES[line.style].sign.strip(), class_=line.style, title=words)


def _file_page(path: str) -> str:
    """All DAGs of a file with their last runs, and what failed in the newest of each."""
    rows, sections = [], []
    for dag in _read(path, _select_histories):
        runs = _read_runs(path, dag["dag_id"], limit=20)
        last = [_chip(_run_style(run), "", title=_local_time(run.start_date)) for run in runs]
        row = [dag["dag_id"], _html("span", *last, class_="strip"), "", "", ""]
        if newest := next(iter(runs), None):
            took = _seconds_text(newest.duration)
            row[2:] = [_run_chip(newest), _local_time(newest.start_date), took]
            if parts := _failure_sections(newest, _seen_instances(newest), _FEW_TOLD):
                sections += [_html("h2", dag["dag_id"]), *parts]
        rows.append([*row, _ago(_moment(dag["last_success"])), dag["description"] or ""])
    heads = "DAG,LAST RUNS,STATE,BEGAN,DURATION,LAST SUCCESS,DESCRIPTION".split(",")
    return _html_page(path, _html("h1", path), _html_table(heads, rows), *sections)


def _markdown_of(run: DagRun, direction: str | None) -> str:
    """A Markdown page of a run: its facts, two diagrams, its tasks, its errors and their logs."""
    instances = _seen_instances(run)
    when, took = _local_time(run.start_date), _seconds_text(run.duration)
    facts = [f"Run {run.run_id}", when, took, run.reason or ""]
    parts = [
        f"# {_markdown(run.dag_id)}: {_markdown(_run_state(run))}\n",
        f"{_markdown(', '.join(filter(None, facts)))}: {_markdown(_counts_of(instances))}.\n",
        _fenced(_draw(_run_boxes(instances), direction), "mermaid"),
    ]
    with contextlib.suppress(_UsageError):  # nothing has started
        parts.append(_fenced(_draw_gantt(run, _seen_instances(run, attempts=True)), "mermaid"))
    rows = [_HEADS, ["-"] * len(_HEADS), *(line.cells() for line in _lines_of(instances))]
    parts.append("".join(f"| {' | '.join(map(_markdown, row))} |\n" for row in rows))
    failures = _failures_of(run, instances, _MOST_SHOWN)
    for failure in failures:
        parts.append(f"## {_markdown(failure.head)}\n")
        parts += [f"{_markdown(line)}\n" for line in (*failure.facts, *failure.follows)]
        parts.append(_fenced(_clean(_said_once(failure.ti.error or "")), "text"))
        if tail := _tail(_own_output(run, failure.ti), 50):
            parts += ["The end of its log:\n", _fenced("\n".join(tail), "text")]
    parts += [f"{_markdown(line)}\n" for line in _other_trouble(run, instances, failures)]
    return "\n".join(parts)


def _notebook(*parts: _Html) -> str:
    return _html("div", _Html(f"<style>{_CSS}</style>"), *parts, class_="liteflow")


# --- Showing: a run while it runs -----------------------------------------------------------------

_REDRAW = 0.1  # seconds between two drawings of the status, at least
_NO_TASKS = "there are no tasks: a @task function makes one when it is called in `with DAG(...)`"


def _status_lines(snapshot: _Snapshot, width: int, rows: int, color: bool) -> list[str]:
    """The status: a bar, the counts, and what has run longest, in at most `rows` rows."""
    counts, running, seconds = snapshot
    total = sum(counts.values())
    ended = sum(counts.get(state, 0) for state in _ENDED)
    size = max(10, min(40, width - 40))  # columns of the bar; some 40 are for the text behind it
    done = size * ended // total if total else size
    bar = f"[{'=' * done}{'>' if done < size else ''}{' ' * (size - done - 1)}]"
    lines = [f"{bar} {ended}/{total} tasks, {_seconds_text(seconds)}"]
    lines.append(_counts_text(counts, "to come", color))
    longest = sorted(running, key=operator.itemgetter(1), reverse=True)
    room = max(1, min(rows - 3, 8))  # 3 rows are for the bar, the counts and the cursor
    shown = longest if len(longest) <= room else longest[: room - 1]
    cut = [(_shortened(_clean(x), width - 16), n) for x, n in shown]  # 16 columns are for the time
    lines += [f"  {_paint(x, 'running', color)}  {_seconds_text(n)}" for x, n in cut]
    lines += [f"  ... and {len(longest) - len(shown)} more"] if len(shown) < len(longest) else []
    return lines


class _LogLines:
    """Writes the output of several tasks to standard output, with `prefix` before each line, and
    `head` where the output of another task begins; in both, `{}` stands for the task's name."""

    def __init__(self, prefix: str, raw: bool = False) -> None:
        self.head, self._prefix, self._raw = "", prefix, raw
        self._last_label, self._ended = "", True  # the last task's; whether its line was ended

    def add(self, label: str, text: str) -> None:
        label, text = _clean(label), text if self._raw else _printed(text)
        if label != self._last_label:
            self.end()
            _print(self.head.format(label))
        self._last_label = label
        if text:
            prefix = self._prefix.format(label)
            _print((prefix if self._ended else "") + prefix.join(text.splitlines(keepends=True)))
            self._ended = text.endswith("\n")

    def end(self) -> None:
        _print("" if self._ended else "\n")
        self._ended = True


class _Progress:
    """Tells the `liteflow` logger and `progress` what happens in a run (True: standard error, on a
    terminal with a status below). With `logs`, what tasks print goes to standard output."""

    snapshot: Callable[[], _Snapshot]  # reads how the run is now

    def __init__(self, progress: bool | Callable[[str], object], logs: bool = False) -> None:
        self._say = _say if progress is True else progress or str  # str: a call without effect
        self._color = progress is True and _may_color(sys.stderr)
        self._logs = _LogLines("{} | ") if logs else None
        # Logs in a pipe may end up on the same terminal, where the status would be drawn over them.
        apart = not logs or _may_redraw(sys.stdout)
        self.redraws = progress is True and apart and _may_redraw(sys.stderr)
        self._drawn, self._lines = 0, list[str]()  # lines on the terminal; the status as last read
        self._next = self._rests = 0.0  # when the status may be drawn again, and read again
        self._listens = bool(progress) or _log().isEnabledFor(20)  # INFO
        self._changes: list[tuple[_Instance, TaskInstanceState | None, str]] = []
        self._ends: dict[_Instance, str] = {}  # the ends of long logs, as they were last recorded
        self._whose = ""  # names the run in the logger's lines, as a service has many runs at once
        self._slowest: list[tuple[float, str]] = []

    def mute(self) -> None:
        """Tell only the logger from now on, because nobody reads the rest."""
        self._say, self._logs, self.redraws, self._drawn = str, None, False, 0

    def tell(self, line: str, state: str | None = None) -> None:
        line = _clean(line)
        self.clear()
        self.output()
        _log().info("%s%s", self._whose, line)  # after `clear`, as it may be the same terminal
        try:
            self._say(_paint(line, state, self._color))
        except Exception as error:  # the program's function may raise anything: the run goes on
            self.mute()
            _log().warning("%sprogress= was dropped: it raised %s", self._whose, _brief(error))

    def output(self, label: str = "", text: str = "") -> None:
        """Show what a task printed; without arguments, end the line that it left open."""
        if self._logs is not None:
            if text:
                self.clear()
            with contextlib.suppress(OSError, ValueError):  # nobody reads standard output any more
                self._logs.add(label, text)

    def status(self) -> None:
        """Draw the status anew, in place of the one on the terminal, if it is time."""
        began = _monotonic()
        if not self.redraws or began < self._next:
            return
        columns, rows = 80, 24
        with contextlib.suppress(OSError, ValueError, AttributeError):
            columns, rows = os.get_terminal_size(sys.stderr.fileno())
        width, rows = columns or 80, rows or 24  # 0: the terminal does not tell
        self.output()
        if began >= self._rests:  # else the same status is drawn below what has been told since
            lines = _status_lines(self.snapshot(), width, rows, self._color)
            self._lines = [_fit(line, width - 1) for line in lines]
            now = _monotonic()
            self._rests = now + 10 * (now - began)  # reading takes a tenth of the time at most
        self.clear(self._lines)
        self._next = max(self._rests, _monotonic() + _REDRAW)

    def clear(self, lines: Sequence[str] = ()) -> None:
        """Erase the status, so that something else can be written there; then draw `lines`."""
        text = "".join(f"{line}\n" for line in lines)
        if self._drawn:
            # Line by line, since some terminals put what is cleared as a whole into their history.
            up = f"\x1b[{self._drawn}A"
            text = f"{up}\r" + "\x1b[2K\n" * self._drawn + up + text
        self._drawn, self._next = len(lines), 0.0
        if text:
            _say(text, end="")

    def began(self, dag: Dag, run_id: str, path: str, snapshot: Callable[[], _Snapshot]) -> None:
        self.snapshot, count = snapshot, len(dag.task_dict)
        tasks = f"{count} task{'s' * (count != 1)}"
        self.tell(f"run {run_id} of DAG {dag.dag_id!r}: {tasks}, in {path}")
        self._whose = f"{dag.dag_id}/{run_id}: "
        if not count:
            self.tell(_NO_TASKS)

    def changed(self, instance: _Instance, error: str | None = None, took: float = 0.0) -> None:
        """Note an instance's new state for `committed` to tell; `took`: seconds of its attempt."""
        if not self._listens:
            return
        state = instance.state
        words = [f"{_datetime.datetime.now():%H:%M:%S}", instance.label, state or "interrupted"]
        words += [f"try {instance.try_number}"] if instance.try_number > 1 else []
        if took:
            # Each instance once, with its longest time: a sensor has an end at each poke.
            longest = {label: n for n, label in sorted([*self._slowest, (took, instance.label)])}
            self._slowest = [(n, label) for label, n in longest.items()][-3:]
            words.append(_seconds_text(took))
        if state is not _S.SUCCESS and error:
            words.append(f"({_last_line(error)})")
        self._changes.append((instance, state, "  ".join(words)))

    def committed(self, logs: _Output) -> None:
        """Tell what happened in a turn, once it is recorded, and show what the tasks printed."""
        for attempt, part, text in logs if self._logs is not None else ():
            if part == _TAIL_PART:
                self._ends[attempt.instance] = text
            else:
                self.output(attempt.instance.label, text)
        changes, self._changes = self._changes, []
        for instance, state, line in changes:
            if state is not _S.RUNNING and instance in self._ends:
                self.output(instance.label, self._ends.pop(instance))
            # Where a status shows what runs, only bad news is a line; elsewhere each change is.
            if state in (_S.FAILED, _S.UP_FOR_RETRY, None) or not self.redraws:
                self.tell(line, state)
        self.status()

    def ended(self, run: DagRun) -> None:
        if not self._listens:
            return
        why = f" ({run.reason})" if run.reason else ""
        counts: dict[str, int] = {}
        with contextlib.suppress(RunNotFound):  # the DAG's callback may have deleted the run
            counts = run._look(_select_run_counts)
            if "none" in counts:  # some of these may be interrupted, which only their attempts say
                counts = collections.Counter(ti._word for ti in run._instances())
        text = _counts_text(counts) or "no tasks"
        if run.state is DagRunState.SUCCESS and "failed" in counts:
            text += "; no leaf of the graph failed"
        self.tell(f"run {run.state}{why} after {_seconds_text(run.duration)}: {text}", run.state)
        ranked = sorted(self._slowest, reverse=True)
        if slowest := [f"{label} {_seconds_text(n)}" for n, label in ranked if n >= 1]:
            self.tell(f"slowest: {', '.join(slowest)}")


# --- Command line: running ------------------------------------------------------------------------

_SCAFFOLD = '''\
"""A small ETL: run it with `python3 FILE`, see `python3 FILE --help`."""

from liteflow import DAG, task

with DAG("my_etl", description="Orders to a report") as dag:

    # A task is a function. If it fails, it is tried again: here twice, a second later.
    @task(retries=2, retry_delay=1)
    def extract() -> list[dict]:
        return [{"item": "tea", "price": 3}, {"item": "cake", "price": 4}]

    # `total` takes what `extract` returns. So it waits for `extract`.
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


def _exit_code(act: Callable[[], int | Callable[[], int]]) -> int:
    """Run a command and return its exit code; an expected error becomes a line on standard error.
    If `act` returns a function, that is called last, and may raise: a debugger is to see that."""
    code: int | Callable[[], int] = 0
    try:
        code = act()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # of a signal; a script's own handler may give a text, not a code
        why = 0 if end.code is None else end.code
        code = why if isinstance(why, int) else functools.partial(sys.exit, why)
    except BrokenPipeError:  # whoever reads the output has seen enough
        pass
    except (AirflowException, OSError) as error:
        _say(f"liteflow: error: {_clean(error)}")
        codes = ((DatabaseError, 3), (AlreadyRunning, 75), (AirflowException, 2), (OSError, 1))
        code = next(number for kind, number in codes if isinstance(error, kind))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError):  # None, or closed
            pass
        except OSError as error:
            # The interpreter must not flush again at its end: a failure would change our exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _say(f"liteflow: error: the output can't be written: {error.strerror}")
                code = code or 1
    return code() if callable(code) else code


def _dag_cli(dag: Dag, argv: Sequence[str] | None) -> int:
    """Run a script's command line. Its help calls it `name`; `command` starts the script again."""
    (script, *given), (file, module) = sys.argv, _script()
    if module and file == script:  # by `python3 -m`; these differ for a folder, zip, profiler
        words = ["-m", module.removesuffix(".__main__")]
        name = f"python3 {_typed(*words)}"
    else:
        start = sys.executable if _FROZEN else script
        words = [os.path.abspath(start)] if os.path.exists(start) else []
        by_python = script.endswith((".py", ".pyz")) or os.path.isdir(script)  # no shell finds it
        name = f"python3 {_typed(script)}" if by_python else os.path.basename(script) or "workflow"
    # The script's own words before `argv`, such as a subcommand's name, belong to its command.
    own = given[: len(given) - len(argv or ())]
    if words and argv is not None and given == [*own, *argv]:
        words += own
        name = " ".join([name, *map(_quoted, own)])
    command = _typed(*words) if _FROZEN or not words else f"{_python()} {_typed(*words)}"
    text = f"run the DAG {dag.dag_id!r}. {_clean(dag.description or '')}".rstrip(". ")
    more = f"{_params_text(dag)}\n\n{_EXIT_CODES}"
    options = _parser(name, text, f"{_RUN_OPTIONS}{_RUN_EXAMPLES}", more).parse_args(argv)
    return _exit_code(lambda: _run_or_debug(dag, options, command))


def _params_text(dag: Dag) -> str:
    """The DAG's params for its --help: names, defaults, descriptions."""
    rows = []
    for name, value in dag.params.items():
        param = value if isinstance(value, Param) else Param(value)
        default = "" if param.default is ... else _shown(param.default, 40, json.dumps)
        rows.append(f"  {name}={default}  {param.description or ''}".rstrip())
    text = _clean("\n".join(["\n\nparams, for -p:", *rows]))
    return text.replace("%", "%%") if rows else ""  # for argparse, which formats the text by %


def _run_or_debug(dag: Dag, options: argparse.Namespace, command: str) -> int | Callable[[], int]:
    """Run the DAG; or with --task, return a function that runs one task of a recorded run in this
    process, with its recorded inputs. `command` starts the same program again, in this folder."""
    if options.task is None:
        path = os.environ.get("PYTHONPATH")  # a crontab may set it, where the user's shell does not
        own = f"PYTHONPATH={_typed(path)} {command}" if path else command
        with contextlib.suppress(FileNotFoundError):  # the folder was removed
            command = command and f"cd {_typed(os.getcwd())} && {own}"
        return _run_by_options(dag, options, command)
    _refuse_beside("--task runs one task, here", options, "run_id", "task", "pool", "max_workers")
    try:
        run = _Run(dag, db_path=options.db, run_id=options.run_id, resume=True, in_process=True)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    return functools.partial(_debug, run.prepare_again(options.task))


def _debug(execution: _Execution) -> int:
    """Run one task in this process, and print its result, skip or wait; other errors pass on."""
    label = _label_of(execution.task_id, execution.map_index)
    if execution.task.execution_timeout is not None:
        _say(f"note: the execution_timeout of {label!r} does not apply here")
    try:
        result = _as_running(execution, _run_hooked, execution, contextlib.nullcontext())
        _store_result(execution, result)  # raises for a result that a worker would refuse, too
        print(f"{label} returned {result!r}")
    except AirflowSkipException as skip:
        print(f"{label} skipped: {skip}".removesuffix(": "))
    except AirflowRescheduleException as later:
        wait = _seconds_text(_span(_utcnow(), later.reschedule_date))
        print(f"{label} waits: it would go on after {wait}")
    return 0


def _refuse_beside(why: str, options: argparse.Namespace, *known: str) -> None:
    """Refuse all options but those `known`, since they would be ignored."""
    for name, value in vars(options).items():
        if value not in (None, False, []) and name not in (*known, "db", "file", "dag", "command"):
            raise _UsageError(f"{why}: it can't be combined with --{name.replace('_', '-')}")


def _run_by_options(dag: Dag, options: argparse.Namespace, command: str) -> int:
    if options.graph:
        _refuse_beside("--graph runs nothing", options, "graph")
        return _show_graph(dag)
    if options.quiet and options.logs:
        raise _UsageError("--quiet says nothing unless the run fails: leave --logs out")
    if options.param:
        given = {name: _given(dag, name, text) for name, text in options.param}
        options.conf = {**(options.conf or {}), **given}
    _refuse_strange_keys(dag, options)
    if any(map(_shows_here, _log().root.handlers)):  # else each line would be there twice
        _log().propagate = False
    if options.quiet and not dag.task_dict:  # told even so, or cron would never report the slip
        _say(f"DAG {dag.dag_id!r}: {_NO_TASKS}")
    same = "run_id logical_date conf max_workers wait logs".split()
    try:
        asked = _Run(
            dag,
            db_path=options.db,
            resume=options.resume or bool(getattr(options, "from")),
            again=getattr(options, "from"),
            pools=dict(options.pool) or None,
            progress=not options.quiet,
            command=command,
            **{name: getattr(options, name) for name in same},
        )
    except (ValueError, TypeError) as error:
        raise _UsageError(str(error)) from None
    return _execute_and_tell(asked, options)


def _show_graph(dag: Dag) -> int:
    """Check the DAG, and draw it."""
    dag.validate()
    for slip in _slips_in(dag):
        _say(_clean(f"note: {slip}"))
    _print(graph := _draw(_dag_boxes(dag)))
    _tell_if_large(graph)
    return 0


def _execute_and_tell(asked: _Run, options: argparse.Namespace) -> int:
    """Execute the run, tell how it ended, be it by a signal or error, and return the exit code."""
    try:
        run = asked.execute()
    except (KeyboardInterrupt, SystemExit, AirflowException, OSError) as end:
        asked.progress.clear()
        if (why := end.__cause__) is not None:
            text = why if isinstance(why, AirflowException) else _traceback(why)
            _say(f"liteflow: error: {_clean(text)}")
        if asked.has_begun:  # else nothing of it was run here
            with contextlib.suppress(AirflowException):  # the run can't even be read
                _tell_end(_read_run(asked.path, asked.dag.dag_id, asked.run_id), options)
        raise
    if asked.has_begun or not options.quiet:  # else it was a success before: nothing is new
        _tell_end(run, options)
    return int(run.state is not DagRunState.SUCCESS)


def _shows_here(handler: Any) -> bool:
    """Whether a logging handler writes to standard output or error. One without a stream (Rich's,
    Loguru's) counts as such; of `logging.handlers` only a queue whose listener has such a one."""
    queued = getattr(getattr(handler, "listener", None), "handlers", None)
    if queued is not None:  # dictConfig gives a QueueHandler its listener
        return any(map(_shows_here, queued))
    far = "logging.handlers" in [kind.__module__ for kind in type(handler).__mro__]
    return not far and getattr(handler, "stream", sys.stderr) in (sys.stderr, sys.stdout)


def _given(dag: Dag, name: str, text: str) -> Any:
    """The value of a --param: its text read as JSON, unless it is no JSON or a text is declared."""
    declared = [dict(x) for x in (dag.params, *(task.params for task in dag.tasks)) if name in x]
    params = [x[name] if isinstance(x[name], Param) else Param(x[name]) for x in declared]
    kinds = [x.schema.get("type", isinstance(x.default, str) and "string") for x in params]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        for param in params:  # as a text, `no` or `False` would count as true
            if not param.schema and isinstance(param.default, (bool, int, float, list, dict)):
                like = f"JSON, as its default {json.dumps(param.default)} is, found {_shown(text)}"
                raise _UsageError(f"--param {name}: the value must be {like}") from None
        return text
    wants_text = [kind and _is_of_type("", kind) and not _is_of_type(value, kind) for kind in kinds]
    return text if wants_text and all(wants_text) else value


def _tell_end(run: DagRun, options: argparse.Namespace) -> None:
    failed = run.state is not DagRunState.SUCCESS
    if failed and options.quiet:
        _say(_clean(f"run {run.run_id} of DAG {run.dag_id!r} failed: {run.reason or 'see below'}"))
    if failed or not options.quiet:  # tasks may have failed in a run that is a success
        lines = _report_of(run, _seen_instances(run))
    else:  # a callback that failed may have had to report a run whose scheduler was killed
        lines = [_clean(f"{run._name}: {line}") for line in _failed_callbacks(run)]
    for line in lines:
        _say(line)


def _refuse_strange_keys(dag: Dag, options: argparse.Namespace) -> None:
    """Refuse unknown names in --conf, --param and --pool, because what runs would not be what was
    meant. A DAG without params takes any conf, as in Airflow; so does `Dag.run`."""
    params = {*dag.params, *(name for task in dag.tasks for name in task.params)}
    pools = {"default_pool", *(task.pool for task in dag.tasks)}
    conf = options.conf if params else None
    for kind, given, known in ("param", conf, params), ("pool", dict(options.pool), pools):
        for name in sorted(set(given or ()) - known):
            raise _UsageError(f"DAG {dag.dag_id!r} has no {kind} {name!r}{_near(name, known)}")


def _cmd_run(options: argparse.Namespace) -> int | Callable[[], int]:
    """Run a DAG of a file, loaded as a worker loads a script: nothing below its main guard runs."""
    path = os.path.abspath(options.file)
    if not os.path.isfile(path):
        what = "a directory: name a file in it" if os.path.isdir(path) else "no file"
        raise _UsageError(f"{path} is {what}")
    main_module = types.ModuleType("__mp_main__")
    main_module.__file__ = path
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module
    above = (x for x in pathlib.Path(path).parents if not (x / "__init__.py").is_file())
    # The file's own folder, and the one that holds its package, if it is in one.
    sys.path[:0] = dict.fromkeys([os.path.dirname(path), str(next(above, ""))])
    sys.argv = [path]
    try:
        exec(compile(_bytes_of(path), path, "exec", dont_inherit=True), vars(main_module))
    except (Exception, SystemExit) as error:
        # The user's file may raise anything; the traceback is shown whole.
        raise _UsageError(f"{path} can't be loaded:\n{_said_once(_traceback(error))}") from None
    _name_as_main(main_module)
    dags = {dag.dag_id: dag for dag in _kept_dags}
    # For a file that builds no DAG, the DAGs that it has imported count, as in Airflow.
    imported = [x for x in vars(main_module).values() if isinstance(x, Dag)]
    dags = dags or {x.dag_id: x for x in imported if not isinstance(x, _RecordedDag)}
    if not dags:
        how = "build one at its top level (call the `@dag` function), not below its main guard"
        if elsewhere := sorted({dag.fileloc for dag in _built.values() if dag.fileloc}):
            how = f"name the file that does: {', '.join(elsewhere)}"
        classes = {type(x).__name__: type(x).__module__ for x in vars(main_module).values()}
        if (other := classes.get(Dag.__name__)) is not None:
            how = f"it has one of another copy of liteflow, whose command is python3 -m {other}"
        raise _UsageError(f"{path} defines no DAG when it is imported: {how}")
    if options.dag is not None and options.dag not in dags:
        raise _UsageError(f"{path} defines no DAG {options.dag!r}{_near(options.dag, dags)}")
    if options.dag is None and len(dags) > 1:
        raise _UsageError(f"{path} defines {len(dags)} DAGs ({_few(dags, 20)}): name one")
    # In a package this module goes by its full name, as the file may import it by that name.
    own = f"{_python()} -m {__name__}" if "." in __name__ else _own_command()
    chosen, which = dags[options.dag or next(iter(dags))], filter(None, [options.dag])
    return _run_or_debug(chosen, options, f"{own} {_typed('run', path, *which)}")


def _cmd_scaffold(options: argparse.Namespace) -> None:
    _print(_SCAFFOLD.replace("from liteflow", f"from {__name__}"))


# --- Command line: looking ------------------------------------------------------------------------

_POLL = 0.5  # seconds between two looks at a live run
_SHORTEST_PART = 4  # the fewest characters that may stand for a run's id: less fits by chance
_PARTS_READ = 100  # the most parts of logs to read at a time, half a megabyte each at most
# What `--json` prints of an instance, and of an attempt.
_INSTANCE_NAMES = """task_id map_index element state try_number max_tries start_date end_date
    duration error upstream_task_ids"""
_ATTEMPT_NAMES = "map_index try_number state start_date end_date duration pid error"


def _print_json(what: object) -> None:
    print(json.dumps(what, indent=2, default=lambda x: sorted(x) if type(x) is set else _iso(x)))


def _document(of: Any, names: str, **more: Any) -> dict[str, Any]:
    """What `--json` prints of a run, an instance or a row: attributes by `names`, and `more`."""
    return {**{name: getattr(of, name) for name in names.split()}, **more}


def _run_document(run: DagRun) -> dict[str, Any]:
    names = "dag_id run_id state owner_alive reason logical_date start_date end_date duration conf"
    return _document(run, names, state=_run_state(run))


def _chosen_run(path: str, name: str | None) -> DagRun:
    """The run that a command names: by a DAG's id (its newest), `DAG/RUN`, or a part of the
    run's id or local start time; None: the newest of all. Raises RunNotFound unless one fits."""
    exact = _read_runs(path, name, limit=1) or _read_runs(path, None, named=name or "")
    exact = [run for run in exact if run._name == name] or exact  # a run id may have a slash, too
    if len(exact) == 1:
        return exact[0]
    known, name = _read(path, _select_run_ids), name or ""
    fits = [(run.dag_id, run.run_id) for run in exact]  # several, or none: then a part may fit
    for row in () if exact else known:
        part = name.removeprefix(f"{row.dag_id}/")
        # There may be many runs: their time is worked out only if it can contain the part.
        when = "" if part.strip("0123456789-: ") else _local_time(_moment(row.start_date))
        if part and part in f"{row.run_id} {when}":
            fits.append((row.dag_id, row.run_id))
    if len(fits) == 1 and len(name.removeprefix(f"{fits[0][0]}/")) >= _SHORTEST_PART:
        return _read_run(path, *fits[0])
    if fits:
        runs = "a run" if len(fits) == 1 else f"{len(fits)} runs"
        how = f"name one as DAG/RUN, or by {_SHORTEST_PART} letters or more that no other has"
        raise RunNotFound(f"{name!r} fits {runs} in {path}: {_few(map('/'.join, fits), 5)}; {how}")
    what = f"neither a run nor a DAG with runs named {name!r}" if known or name else "no run"
    near = _near(name, {row.dag_id for row in known}) if known or name else ""
    raise RunNotFound(f"there is {what} in {path}{near}")


def _cmd_visualize(options: argparse.Namespace) -> None:
    run, output = _chosen_run(options.db, options.run), options.output
    if output is not None and options.url:
        raise _UsageError("--url prints a link: leave --output out")
    if options.gantt and options.direction:
        raise _UsageError("a gantt has no --direction")
    if output is not None and output.endswith(".md"):
        if options.gantt:
            raise _UsageError("a page has both diagrams: leave --gantt out")
        text = _markdown_of(run, options.direction)
    elif options.gantt:
        text = _draw_gantt(run, _seen_instances(run, attempts=True))
    elif instances := _seen_instances(run):
        text = _draw(_run_boxes(instances), options.direction)
    else:  # it has not begun, say
        raise _UsageError(f"run {run.run_id!r} has no tasks: there is nothing to draw")
    _write_output(f"{_live_url(text)}\n" if options.url else text, options)
    for diagram in re.findall("(?ms)^```mermaid\n(.*?)^```$", text) or [text]:
        _tell_if_large(diagram)


def _tell_if_large(diagram: str) -> None:
    edges = diagram.count(" -->")
    if edges > _MAX_EDGES or len(diagram) > _MAX_TEXT:
        size = f"the diagram has {edges} edges and {len(diagram):,} characters"
        most = f"more than {_MAX_EDGES} and {_MAX_TEXT:,} unless configured otherwise"
        _say(f"liteflow: {size}; Mermaid's renderers refuse {most}")


def _write_output(text: str, options: argparse.Namespace) -> None:
    """Write a text to the file that --output names; without it, or for `-`, to standard output."""
    output = options.output
    if output in (None, "-"):
        return _print(text)
    if os.path.realpath(output) == os.path.realpath(options.db):
        raise _UsageError(f"{output} is the database: name another file")
    with _writing(pathlib.Path(output)) as coming:
        coming.write_text(text, encoding="utf-8")
    if not options.quiet:  # cron would mail it
        _say(f"wrote {output}")


@contextlib.contextmanager
def _writing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a path for a new file, which replaces the target once it is whole, so that readers find
    the old one or the new one. A pipe or a device is itself given; a link is followed."""
    real = pathlib.Path(os.path.realpath(target))  # for links in a circle, the target itself
    coming = pathlib.Path(f"{real}.{os.urandom(4).hex()}")
    try:
        if target.exists() and not target.is_file():
            yield target
        else:
            with contextlib.suppress(FileNotFoundError):  # never more open than the old file
                coming.touch(os.stat(target).st_mode & 0o777, exist_ok=False)
                shutil.copymode(target, coming)
            yield coming
            coming.replace(real)
    except OSError as error:
        raise _UsageError(f"{target} can't be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # it is not there, unless the writing was cut off
            coming.unlink()


def _cmd_page(options: argparse.Namespace) -> None:
    if options.run is None:
        text = _file_page(options.db)
    elif options.run in {found.dag_id for found in _read(options.db, _select_dags)}:
        text = _dag_page(_load_dag(options.run, options.db))
    else:
        text = _run_page(_chosen_run(options.db, options.run))
    _write_output(text, options)


def _cmd_list(options: argparse.Namespace) -> int:
    if options.max_age is not None and not options.check:
        raise _UsageError("--max-age is for --check: give that, too")
    dags, rows = [], []
    for each in _read(options.db, _select_histories, options.dag):
        newest = each.pop("newest")
        run = newest and DagRun(newest, options.db)
        dag = {**each, "tags": _parsed(each["tags"], list), "last_run": run and _run_document(run)}
        if options.check:
            dag["trouble"] = _trouble_of(options.db, dag, options.max_age)
            if dag["trouble"] is None:
                continue
        dags.append(dag)
        state, start = (_run_state(run), _when(run.start_date)) if run else ("", "")
        success, text = _ago(_moment(dag["last_success"])), dag.get("trouble", dag["description"])
        rows.append((dag["dag_id"], dag["runs"], state, start, success, text or ""))
    if options.json:
        _print_json(dags)
    elif dags or not options.check:
        heads = ["DAG", "RUNS", "LAST STATE", "LAST RUN", "LAST SUCCESS"]
        print(_table([*heads, "TROUBLE" if options.check else "DESCRIPTION"], rows))
    return int(options.check and bool(dags))


def _trouble_of(path: str, dag: Mapping[str, Any], since: str | None) -> str | None:
    """Why a DAG is in trouble, or None: its newest run is no success, or there has been no
    success since the moment `since`. A live run is passed over, as its end is not known yet."""
    runs = _read_runs(path, dag["dag_id"], latest_of=dag["dag_id"])
    ended = next((run for run in runs if not run.owner_alive), None)
    if ended is not None and ended.state is not DagRunState.SUCCESS:
        return f"run {ended.run_id} is no success: {_run_state(ended)}"
    success = dag["last_success"] or ""
    if since is None or success >= since:
        return None
    return "the last success is too old" if success else "no run is known to have succeeded"


def _cmd_runs(options: argparse.Namespace) -> None:
    documents, rows, state = [], [], options.state
    most = _MOST_RUNS if options.limit is None else options.limit
    # `running` means `failed` if the owner is dead, which SQL can't tell: all such runs are read.
    is_unsure = state in ("failed", "running")
    asked = {"state_or_running": state} if is_unsure else {"state": state, "limit": most + 1}
    runs = _read_runs(options.db, options.dag, ended_since=options.since, **asked)
    runs = [x for x in runs if state in (None, "failed" if x._owner_died else x.state)]
    ids = collections.Counter[str]()  # how many run ids have these six digits: see _short_name
    if _may_redraw(sys.stdout):
        for row in _read(options.db, _select_run_ids, dag_id=options.dag):
            ids.update(re.findall(r"(?=(\d{6}))", row.run_id))
    wanted = [x for x in runs[:most] if options.json or x.state is not DagRunState.SUCCESS]
    look = functools.partial(_select_failed, limit=_FEW_TOLD)  # for all runs by one connection
    failures = _read(options.db, lambda db: {x: look(db, x._row.id) for x in wanted})
    for run in runs[:most]:
        failed, count = run._failures(_FEW_TOLD, failures[run]) if run in failures else ([], 0)
        errors = [_document(x, "task_id map_index", reason=_last_line(x.error)) for x in failed]
        documents.append({**_run_document(run), "failed": count, "errors": errors})
        name, took = _short_name(run, ids), _seconds_text(run.duration)
        rows.append((name, _run_state(run), _when(run.start_date), took, run._why(failed, count)))
    if options.json:
        _print_json(documents)
    else:
        print(_table(("RUN", "STATE", "START", "DURATION", "ERROR"), rows))
    if options.limit is None and len(runs) > most:
        _say(f"these are the {most} newest: --limit N shows more")


def _short_name(run: DagRun, ids: Mapping[str, int]) -> str:
    """A run's name; of a generated id the microseconds alone, if no other id contains them."""
    made = re.fullmatch(r"manual__.*\.(\d{6})\+00:00", run.run_id)
    return f"{run.dag_id}/{made[1]}" if made and ids.get(made[1]) == 1 else run._name


def _cmd_show(options: argparse.Namespace) -> int:
    run = _chosen_run(options.db, options.run)
    if options.task is not None and options.state is not None:
        raise _UsageError("--state is for the tasks of a run: leave TASK out")
    if options.task is not None:  # raises for an unknown task, before a --follow would wait
        run._instances_of(options.task.partition("[")[0])
    if options.follow:
        _follow(run)
    (_show_run if options.task is None else _show_task)(run, options)
    return int(options.follow and run.state is not DagRunState.SUCCESS)


def _follow(run: DagRun) -> None:
    """Show a live run until it ends: on a terminal its status, else a line for each change."""
    live, last = _Progress(True), ""
    live.snapshot = functools.partial(run._look, _select_snapshot)
    try:
        while run.refresh().owner_alive:
            live.status()
            line = "" if live.redraws else _counts_text(run._look(_select_run_counts), "to come")
            if line != last:
                live.tell(f"{_datetime.datetime.now():%H:%M:%S}  {line}")
                last = line
            time.sleep(_POLL)
    finally:
        live.clear()


def _show_run(run: DagRun, options: argparse.Namespace) -> None:
    instances = _seen_instances(run)
    if options.state is not None:
        instances = [ti for ti in instances if options.state in (ti._word, ti.state or "none")]
    if options.json:
        documents = [_document(ti, _INSTANCE_NAMES) for ti in instances]
        return _print_json({**_run_document(run), "task_instances": documents})
    head = [f"{run._name}: {_run_state(run)}", _when(run.start_date), _seconds_text(run.duration)]
    print(_clean(", ".join(filter(None, head))))
    day, began = run.logical_date, run.start_date
    if day and began and abs((began - day).total_seconds()) > 60:  # else it is just the start
        print(f"logical date: {day}")
    if run.conf:
        print(_clean(f"conf: {json.dumps(run.conf, ensure_ascii=False)}"))
    if run.reason:
        print(_clean(run.reason))
    lines = _lines_of(instances, whole=options.state is not None)
    none = "no task instances" + (f" in state {options.state}" if options.state else "")
    print(_table(_HEADS, [line.cells() for line in lines]) if lines else none)
    if options.state is None and (report := _report_of(run, instances)):
        print("", *report, sep="\n")


def _show_task(run: DagRun, options: argparse.Namespace) -> None:
    """Show a task's attempts and values; of what failed, also the error and the end of the log."""
    [(task_id, index)] = run._tasks_in([options.task])
    which: dict[str, Any] = {"task_id": task_id, "map_index": index}
    instances = _seen_instances(run, **which)
    attempts = _seen_instances(run, attempts=True, **which)
    xcoms = run._look(_select_xcoms, **which)
    if options.json:
        document = {
            "task_instances": [_document(ti, _INSTANCE_NAMES) for ti in instances],
            **_document(run, "dag_id run_id"),
            "attempts": [_document(ti, _ATTEMPT_NAMES, state=ti._word) for ti in attempts],
            "xcoms": [_document(x, "map_index key type preview") for x in xcoms],
        }
        return _print_json(document)
    print(_clean(f"{run._name} {options.task}: {_counts_of(instances)}"))
    if len(instances) >= _TABLE_FOLD:
        instances = ([ti for ti in instances if ti.state is _S.FAILED] or instances)[:_MOST_SHOWN]
        shown = {ti.map_index for ti in instances}
        attempts = [ti for ti in attempts if ti.map_index in shown]
        xcoms = [x for x in xcoms if x.map_index in shown]
        print(f"{len(shown)} of them are shown here; {_clean(task_id)}[INDEX] shows one")
    rows = []
    for ti in attempts:
        _, state, tries, *when, error = _line_of([ti]).cells()
        tried = f"{_label_of('', ti.map_index)} {tries}".strip()
        rows.append((tried, state, *when, ti.pid or "", error))
    if rows:
        print(_table(("TRY", "STATE", "START", "DURATION", "PID", "ERROR"), rows))
    else:
        ups = sorted({up for ti in instances for up in ti.upstream_task_ids})
        seen = {up: _seen_instances(run, task_id=up) for up in ups}
        ups.sort(key=lambda up: {ti.state for ti in seen[up]} == {_S.SUCCESS})  # successes last
        told = [f"{up} ({_counts_of(seen[up])})" for up in ups]
        print(_clean(f"no attempt; what it waits for: {_few(told, 10) or 'nothing'}"))
    if xcoms:
        rows = [(f"{_label_of('', x.map_index)} {x.key}".strip(), x.type, x.preview) for x in xcoms]
        print("\n" + _table(("XCOM", "TYPE", "VALUE"), rows))
    elif run._row.values_deleted:
        print("\nits values were deleted (prune --values)")
    _show_errors(run, instances)
    if failed := next((ti for ti in instances if ti.state is _S.FAILED), None):
        again = _script_command(run, {"--task": failed._label})
        ways = {"alone, for a debugger": again, **_way_on(run, instances)}
        print("", *(f"{aim}: {command}" for aim, command in ways.items() if command), sep="\n")


def _show_errors(run: DagRun, instances: list[TaskInstance]) -> None:
    failed = [ti for ti in instances if ti.error]
    first = {_last_line(ti.error): ti for ti in failed[::-1]}  # the first instance of each reason
    for ti in [ti for ti in failed if first[_last_line(ti.error)] is ti][:_MOST_TOLD]:
        print(f"\n{_clean(_with_element(ti))}:\n{_clean(_said_once(ti.error or ''))}")
    for ti in instances if len(instances) == 1 else failed[:3]:
        text = run.log(ti.task_id, ti.map_index)
        if tail := _tail(text):
            count = text.rstrip("\r\n").count("\n") + 1
            more = f", the last {len(tail)} of {count} lines" if count > len(tail) else ""
            print(f"\nlog of {_clean(ti._label)}{more}:")
            print("\n".join(f"    | {line}" for line in tail))


def _cmd_logs(options: argparse.Namespace) -> int:
    """Print the output that is recorded; with --follow also what is added, until the run ends."""
    run, follow = _chosen_run(options.db, options.run), options.follow
    number, which = getattr(options, "try"), dict[str, Any]()
    if options.task is not None:
        while follow and run.state is DagRunState.QUEUED and run.owner_alive:
            time.sleep(_POLL)  # a run in line has no tasks yet
            run.refresh()
        [(which["task_id"], which["map_index"])] = run._tasks_in([options.task])
    attempts = [] if number is None else _seen_instances(run, attempts=True, **which)
    if number is not None and number not in [ti.try_number for ti in attempts]:
        what = f"no attempt {number} of {options.task or 'any task'}"
        raise _UsageError(f"there was {what} in run {run.run_id!r}")
    lines = _LogLines("{} | " if follow and not which else "", options.raw)
    after, is_live = 0, True  # the id of the last part that was read
    while is_live:
        # State before log: then the last look at the log finds all that the run has printed.
        is_live = follow and run.refresh().owner_alive
        since = {"after_live" if is_live else "after": after}
        parts = run._look(_select_parts, try_number=number, **since, **which)
        if len({(x.task_id, x.map_index, x.try_number) for x in parts}) > 1 and not follow:
            lines.head = "--- {}\n"
        for n in range(0, len(parts), _PARTS_READ):
            some = parts[n : n + _PARTS_READ]
            for part, text in zip(some, run._look(_select_texts, parts=some), strict=True):
                after = max(after, part.id)
                label = _label_of(part.task_id, part.map_index)
                lines.add(f"{label}, try {part.try_number}" if lines.head else label, text)
        time.sleep(_POLL if is_live else 0)
    lines.end()
    return int(follow and run.state is not DagRunState.SUCCESS)


# --- Command line: keeping ------------------------------------------------------------------------


def _cmd_stop(options: argparse.Namespace) -> None:
    live = [x for x in _read_runs(options.db, options.run, state="running") if x.owner_alive]
    if len(live) > 1:
        names = ", ".join(run._name for run in live)
        raise _UsageError(f"{len(live)} runs of DAG {options.run!r} are running: {names}; name one")
    run = live[0] if live else _chosen_run(options.db, options.run)
    if run.reason == _SUBMITTED:
        of = (run.dag_id, run.run_id, "stopped", lambda row: row.state == "queued")
        run._write(lambda store: store.cancel_run(*of))
        if run.refresh().state is DagRunState.FAILED:
            return _say(f"run {run.run_id!r} was queued, and will not begin")
    if run.owner_alive:
        run._write(lambda store: store.change(run._row.id, run._refuse_gone, store.request_stop))
        _say(f"asked run {run.run_id!r} to stop: {run._row.owner_process}")
        while run.refresh().owner_alive:
            time.sleep(0.2)
        if run.state is not DagRunState.RUNNING:
            return _say(f"it has stopped: {run.state}")
    died = run.state is DagRunState.RUNNING
    why = "its scheduler died; resume it" if died else f"its state is {run.state}"
    raise _UsageError(f"run {run.run_id!r} is not running: {why}")


def _cmd_clear(options: argparse.Namespace) -> None:
    run = _chosen_run(options.db, options.run)
    cleared = ", ".join(run.clear(options.task, downstream=not options.only))
    also = "" if options.only else ", with all downstream of it"
    _say(_clean(f"cleared in run {run.run_id!r}: {cleared}; a resume runs that again{also}"))
    if command := _script_command(run, {"--resume": ""}):
        _say(command)


def _cmd_delete(options: argparse.Namespace) -> None:
    """Delete a run, or with --all a DAG. A part of a run's name is not enough here."""
    if options.all:
        return _forget_dag(options)
    run = _chosen_run(options.db, options.run)
    if options.run not in (run.run_id, run._name):
        what = f"{options.run!r} is no whole run id, nor DAG/RUN"
        how = f"to delete {run._name}, give that name (a DAG with its runs: --all)"
        raise _UsageError(f"{what}: {how}")
    run._refuse_live(run._row)
    if not options.dry_run:
        run.delete()
    would = "would delete" if options.dry_run else "deleted"
    _say(f"{would} run {run.run_id!r} of DAG {run.dag_id!r}")


def _forget_dag(options: argparse.Namespace) -> None:
    """Delete a DAG with all its runs, after a question if there is a terminal and no --yes."""
    dag = _load_dag(options.run, options.db)
    runs = dag.runs()
    what = f"DAG {dag.dag_id!r} with {len(runs)} run{'s' * (len(runs) != 1)}"
    if live := [run._name for run in runs if run.owner_alive]:
        raise AlreadyRunning(f"DAG {dag.dag_id!r} is running: stop {', '.join(live)} first")
    if options.dry_run:
        return _say(f"would delete {what}")
    if not options.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise _UsageError(f"delete --all needs --yes to delete {what}")
        _say(f"delete {what}? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):  # Ctrl-D gives no line
            return _say("nothing was deleted")
    _prune(options.db, runs, values=False)
    with contextlib.closing(_Store(options.db)) as store:
        _until_unlocked(options.db, lambda: store.forget_dag(dag.dag_id))
    return _say(f"deleted {what}")


def _cmd_prune(options: argparse.Namespace) -> None:
    """Delete old runs, or with --values the values of successful ones."""
    if options.keep is None and options.older_than is None and not options.values:
        raise _UsageError("prune takes --keep N, --older-than AGE, --values, or several of them")
    asked = {"state": "success" if options.values else None, "begun_before": options.older_than}
    runs = _read_runs(options.db, options.dag, but_newest=options.keep, **asked)[::-1]
    # A queued run whose process is gone may still be recovered or resumed.
    runs = [run for run in runs if not run.owner_alive and run.state is not DagRunState.QUEUED]
    runs = [run for run in runs if not (options.values and run._row.values_deleted)]
    what = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    what = f"the values of {what}" if options.values else what
    if options.dry_run:
        for run in runs:
            print(_clean(f"{run._name}  {_run_state(run)}  {_when(run.start_date)}"))
        return _say(f"would delete {what}")
    size = os.path.getsize(options.db)
    _prune(options.db, runs, options.values)  # for no runs, too: a prune cut off leaves space
    saved = max(0, size - os.path.getsize(options.db))
    if not options.quiet:
        _say(f"deleted {what}: {saved:,} bytes given back")


def _prune(path: str, runs: Iterable[DagRun], values: bool) -> None:
    """Delete runs or their values, and give the space back. A transaction takes in several, because
    each writes pages anew that runs share; but it is short, so that others don't wait for long."""
    left = [*runs][::-1]
    with contextlib.closing(_Store(path)) as store:

        def delete_some() -> None:
            act: Any = store.drop_values if values else store.delete_run
            with store.transaction():
                until = _monotonic() + 0.02
                while left and _monotonic() < until:
                    run = left.pop()
                    with contextlib.suppress(AlreadyRunning, RunNotFound):  # resumed, or deleted
                        row = run._refuse_live(store.look(_find_run, id=run._row.id))
                        if row.state == run.state:  # else the run was cleared since, say
                            act(row)

        while left:
            _until_unlocked(path, delete_some)
            time.sleep(0.005)  # lets others in, who wait for the file and look only now and then
        _until_unlocked(path, store.give_back)


def _cmd_backup(options: argparse.Namespace) -> None:
    """Copy the database as it is at one moment, even while runs write to it."""
    target = pathlib.Path(options.file).absolute()
    if target.exists():
        raise _UsageError(f"{target} is there already: a backup goes to a new file")
    with _writing(target) as coming:
        _read(options.db, _copy_database, coming)
    if not options.quiet:
        _say(f"copied {options.db} to {target}: {target.stat().st_size:,} bytes")


# --- Command line: its words ----------------------------------------------------------------------

_EXIT_CODES = """exit codes: 0 success, 1 the run failed, 2 bad usage, 3 the database can't be used,
75 already running, 129/130/143 ended by SIGHUP/SIGINT/SIGTERM"""

_EXAMPLES = """
  python3 -m liteflow scaffold > my_workflow.py      a workflow to start from
  python3 my_workflow.py                             run it
  python3 -m liteflow runs --since 24h --state failed   what went wrong since yesterday
  python3 -m liteflow show my_etl                    the tasks of the newest run
  python3 -m liteflow logs my_etl report             what a task printed
  python3 -m liteflow visualize my_etl --output page.md   draw it, with its errors

RUN is a DAG's id (its newest run), DAG/RUN, or a unique part of a run's id or local time."""

# Arguments, one a line, with their help behind two spaces: `FILE`, `[DAG]`, `TASK...`, `-f,--flag`,
# `--option VALUE`, `--option VALUE...` for one that may be repeated, `--option one|two`; and behind
# `$` examples of what follows the command's name.
_RUN_OPTIONS = """
--run-id ID  the new run's id, or the one to resume
--logical-date ISO  the date that the run is for
--resume  go on with the newest run, or with --run-id
--conf JSON  a JSON object for the run
-p,--param KEY=VALUE...  one key of it; VALUE is JSON, or text if it is no JSON or KEY takes text
--max-workers N  how many worker processes (default: CPUs)
--pool NAME=N...  the size of a pool
--from TASK...  run TASK of the newest run (or of --run-id) again, and all downstream of it
--wait  wait as long as other runs of the DAG rule this one out
-q,--quiet  say nothing unless the run fails
--logs  show what the tasks print, behind their names
--task TASK  run TASK (or TASK[INDEX]) of the newest run (or of --run-id) alone, in this process, \
with its recorded inputs; nothing is recorded, and breakpoint() works
--graph  print the DAG as Mermaid; run nothing"""

_RUN_EXAMPLES = """
$                        run it
$ --conf '{"limit": 3}'  with parameters
$ --resume               go on with a run that failed or was cut off
$ --from load            run `load` again, and all downstream of it
$ --task load            run `load` alone, here, recording nothing
$ --graph                draw it, without running"""

# The commands, a block each: its name and what it does, then its arguments and examples.
_COMMANDS = f"""\
run: run a DAG of a file
FILE
[DAG]  the DAG to run, if the file defines several{_RUN_OPTIONS}
$ flow.py                   the one DAG of the file
$ flow.py etl --resume      one of several; go on with its newest run
$ flow.py --quiet           for cron: prints nothing unless it fails

scaffold: print a small workflow to start from
$ > my_workflow.py

visualize: draw a run as a Mermaid flowchart
RUN  a DAG's id (its newest run), DAG/RUN, or a unique part of a run's id
--gantt  draw when each attempt ran, instead
--direction {"|".join(_DIRECTIONS)}  which way the flowchart runs (default: TD, or LR if wide)
--output PICTURE  write a file: .mmd, or .md for a page
-q,--quiet  say nothing unless it fails
--url  print a mermaid.live link instead
$ etl > run.mmd             the newest run of `etl`, as a flowchart
$ etl --gantt               when each attempt ran
$ etl --output run.md       a page: both diagrams, tasks, errors, logs
$ etl --url                 a link that holds the diagram

page: write runs as one HTML file, for a browser or a web server
[RUN]  a DAG's id (its runs as a grid), DAG/RUN, or a part of a run's id (default: all DAGs)
--output FILE.html  the file to write
-q,--quiet  say nothing unless it fails
$ --output all.html         all DAGs with their last runs
$ etl --output etl.html     the grid of a DAG's runs
$ etl/run7 --output run.html   one run: failures, graph, timeline, tasks, values

list: list the DAGs that ran
[DAG]
--json  print one JSON document
--check  list only DAGs in trouble, and exit with 1 if there are any
--max-age AGE  with --check: how old a DAG's last success may be: 26h, 2d
$                           with the age of each DAG's last success
$ --check --max-age 26h     exits 1, and says why, if one is in trouble
$ weekly --check --max-age 8d   one DAG, if each has an age of its own

runs: list the runs, newest first
[DAG]
--since AGE  only runs that ran in the last 24h, 7d, ... or since a date, even if begun before
--state queued|running|success|failed  only runs in that state
-n,--limit N  at most N (default: 50)
--json  print one JSON document
$ etl                       the runs of a DAG
$ --since 24h --state failed   what failed since yesterday, and why

show: show the tasks of a run, or one task's attempts and values
[RUN]  (default: the newest run)
[TASK]
--state {"|".join(sorted(_TASK_STATES))}|interrupted|none  only tasks in that state
-f,--follow  go on showing a live run until it ends
--json  print one JSON document
$ etl                       the tasks of the newest run of `etl`
$ etl load                  a task's attempts, values, error, end of its log
$ etl --state failed        only what failed, every mapped instance
$ etl --follow              a live run, until it ends; exits 1 if it failed

logs: print what a run's tasks printed
[RUN]  (default: the newest run)
[TASK]
--try N  only attempt N
-f,--follow  go on with what tasks print until the run ends
--raw  leave escape sequences as they are
$ etl                       all that the newest run printed
$ etl 'load[3]' --try 1     one attempt
$ etl --follow              of a live run, until it ends

clear: mark tasks of a finished run, for a resume to run them again
RUN
TASK...
--only  only these tasks, not those downstream of them
$ etl load                  then: python3 flow.py --resume

stop: end a run that another process works on
RUN
$ etl

prune: delete old runs, and give the space back
[DAG]
--keep N  keep the N newest of each DAG
--older-than AGE  only runs that began longer ago: 30d, 12w, or before a date
--values  delete only the values of successful runs; keep the rest
--dry-run  only say what would be deleted
-q,--quiet  say nothing unless it fails
$ --older-than 30d --dry-run   what would be deleted
$ etl --keep 10             all but the ten newest runs of `etl`
$ --values                  keep history and logs, delete values of successes

delete: delete a run with its values and logs, or a DAG with all its runs
RUN  a whole run id, or DAG/RUN
--all  all runs of the DAG that RUN names, and what is known of it
--yes  for --all: don't ask before (needed where there is no terminal)
--dry-run  only say what would be deleted
$ etl/manual__2026-01-31T06:00:00.000000+00:00
$ old_etl --all             a DAG that is no longer used

backup: copy the database, also while a run writes
FILE  the new file
-q,--quiet  say nothing unless it fails
$ copy.db                   also while a run writes
"""


def _long_ago(count: str, unit: str, date: str | None) -> str:
    """The moment that many units ago, or a local date (its midnight) or time, as text."""
    if date:
        return _iso(_datetime.datetime.fromisoformat(date).astimezone())
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    return _iso(_utcnow() - _datetime.timedelta(**{units[unit]: float(count)}))


# Of each kind of value: the pattern that its text must match, the function that reads the text (or
# the pattern's groups), and what a refusal says is expected.
_KINDS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "JSON": (r"\s*\{.*", json.loads, "a JSON object"),
    "AGE": (r"(\d+(?:\.\d+)?)([smhdw])|(\d{4}-.*)", _long_ago, "a date, or an age as 24h or 7d"),
    "FILE": ("(?!-$).+", str, "the name of a file"),
    "PICTURE": (r"-|.*\.(?:mmd|md)", str, "a file that ends in .mmd (the diagram) or .md (a page)"),
    "FILE.html": (r".+(?<!\.py)(?<!\.db)", str, "a file for a page, no .py and no .db"),
    "ISO": (".*", lambda x: _aware(_datetime.datetime.fromisoformat(x)), "an ISO date or time"),
    # At most 18 digits: SQLite's numbers have 64 bits.
    "N": (r"\d{1,18}", int, "a whole number, not negative"),
    "NAME=N": (r"(.+)=(\d{1,18})", lambda name, size: (name, int(size)), "NAME=N"),
    "KEY=VALUE": (r"([^=]+)=(.*)", lambda name, text: (name, text), "KEY=VALUE"),
}


def _argument_value(kind: str, text: str) -> Any:
    """An argument's value of that kind. What is wrong is raised for argparse to print."""
    form, read, what = _KINDS.get(kind, (".*", str, "a text"))
    why = ""
    try:
        if match := re.fullmatch(form, text, re.DOTALL):
            return read(*match.groups() or [text])
    except (ValueError, OverflowError, RecursionError) as error:
        why = f": {error}"
    raise argparse.ArgumentTypeError(_clean(f"must be {what}, found {_shown(text)}{why}"))


def _add_argument(parser: argparse.ArgumentParser, line: str) -> None:
    words, _, text = line.partition("  ")
    name, _, value = words.partition(" ")
    settings: dict[str, Any] = {"help": text}
    if not name.startswith("-"):
        settings["nargs"] = "?" if name[0] == "[" else "+" if name[-1] == "." else None
        name, value = name.strip("[].").lower(), name
    elif not value:
        settings["action"] = "store_true"
    elif value.endswith("..."):
        settings |= {"action": "append", "default": []}
    if "|" in value:
        settings["choices"] = value.split("|")
    elif value:
        metavar = value.strip("[].")
        settings |= {"metavar": metavar, "type": functools.partial(_argument_value, metavar)}
    parser.add_argument(*name.split(","), **settings)


def _parser(name: str, text: str, block: str, more: str = "") -> Any:
    """A parser of a block of argument lines, and of --db; `more` ends its help text."""
    if getattr(sys.stdout, "closed", False):  # the script closed it: argparse would fail on 3.14
        sys.stdout = None
    with contextlib.suppress(OSError):  # reconfigure() flushes: the disk may be full, say
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may be ASCII
    arguments, *examples = f"\n{block.rstrip()}".split("\n$")
    epilog = "".join(["examples:", *(f"\n  %(prog)s{line}" for line in examples), more])
    text, raw = f"{text[0].upper()}{text[1:]}.", argparse.RawDescriptionHelpFormatter
    form: Any = functools.partial(raw, width=78)  # without a width argparse would import shutil
    parser: Any = argparse.ArgumentParser(
        name, description=text, epilog=epilog, formatter_class=form, allow_abbrev=False
    )
    leave = parser.exit  # after --help, say: the pipe may be closed, which _exit_code sees to
    parser.exit = lambda *given: sys.exit(_exit_code(lambda: leave(*given)))
    for line in filter(None, arguments.splitlines()):
        _add_argument(parser, line)
    which = "the database (default: the DAG's if its script runs, else $LITEFLOW_DB or liteflow.db)"
    parser.add_argument("--db", metavar="PATH", help=which)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `python3 -m liteflow` (see `--help`), with the process's arguments unless
    `argv` is given. Returns the exit code; wrong usage raises SystemExit with code 2."""
    _fill_standard_descriptors()
    # An installation has a command of its own; a copied file has none.
    name = "liteflow" if os.path.basename(sys.argv[0]) == "liteflow" else f"python3 -m {__name__}"
    parser = _parser(name, "run DAGs of tasks, and see what ran", "", f"{_EXAMPLES}\n{_EXIT_CODES}")
    on = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    parser.add_argument("--version", action="version", version=f"liteflow {__version__} ({on})")
    # A parser takes half a millisecond: only the command that is named gets one.
    blocks = dict(block.split(": ", 1) for block in _COMMANDS.split("\n\n"))
    listed = "\n".join(f"{name:<11}{block.splitlines()[0]}" for name, block in blocks.items())
    group = parser.add_argument_group("commands, each with its own --help", listed)
    how: Any = {"metavar": "COMMAND", "help": "one of these, then its own arguments"}
    group.add_argument("command", nargs=argparse.PARSER, choices=blocks, **how).required = False
    options = parser.parse_args(argv)
    if options.command is None:
        return _exit_code(lambda: parser.print_help() or 0)
    options.command, *rest = options.command
    text, block = blocks[options.command].split("\n", 1)
    _parser(f"{name} {options.command}", text, block).parse_args(rest, options)  # --db is kept

    def act() -> Any:
        """Find the database (`run`: its DAG may have one; `scaffold`: needs none), then act."""
        if options.command not in ("run", "scaffold"):
            options.db = _database_path(options.db, None)
            if getattr(options, "dag", None) is not None:
                _load_dag(options.dag, options.db)  # raises if the database has no such DAG
        return globals()[f"_cmd_{options.command}"](options) or 0

    return _exit_code(act)
