"""Runs of several processes: how the processes join, exchange values, and stop together.

`jax.distributed` connects the processes, and programs run on the devices of all of them. Hosts
exchange values through the coordination service of `jax.distributed`, in small messages that are
independent of the devices: an exchange does not wait for a program, and no program waits for it.

All processes must make the same calls of `gather` and `exchange` in the same order, from one
thread.
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from flax import serialization

from jaxrl_vlm.errors import UserError, one_line

HEARTBEAT_SECONDS = 20  # a process that sends no heartbeat for this long counts as lost
_GRACE_SECONDS = 5  # a process may end by its own error for this long after another has failed
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Time limit of barriers. `_Together.watch` ends a process earlier if it waits for a lost one.
_LONG_MS = 7 * 24 * 3600 * 1000
_PREFIX = "jaxrl_vlm"

T = TypeVar("T")


# -- Joining and leaving --------------------------------------------------------------------------


def join_processes() -> None:
  """Joins the other processes of this run, if there are any. Call it before any other use of jax.

  The processes are described by the environment variables JAX_COORDINATOR_ADDRESS (host:port of
  process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by a cluster that JAX detects (TPU pods,
  SLURM, ...).

  Raises:
    UserError: only some of these variables are set, a value is invalid, the number of processes of
      a cluster cannot be determined, or the processes cannot connect.
  """
  global _together
  if _together is not None:
    return
  if jax.distributed.is_initialized():  # by the caller
    _together = _Together() if jax.process_count() > 1 else None
    return
  given = _from_environment()
  if given.get("num_processes") == 1 or not (given or _in_cluster()):
    return
  # `_Together` reports the loss of a process, and `Run.running` handles preemption. JAX must do
  # neither.
  jax.config.update("jax_enable_recoverability", True)
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60
    )
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"the processes of this run could not connect to each other: {one_line(str(error))}"
    ) from error
  if jax.process_count() > 1:
    _together = _Together()


def _from_environment() -> dict[str, Any]:
  values = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
  missing = [name for name, value in values.items() if not value]
  if len(missing) == len(values):
    return {}
  if missing:
    raise UserError(
      f"{', '.join(missing)}: not set, but "
      f"{', '.join(name for name in values if name not in missing)} is set; a run of several "
      "processes needs all three variables in each process"
    )
  address, *numbers = values.values()
  if not re.fullmatch(r".+:\d+", address):
    raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: expected host:port of process 0")
  count, index = (int(text) if text.isdecimal() else -1 for text in numbers)
  if not 0 <= index < count:
    raise UserError(
      f"JAX_PROCESS_ID={numbers[1]!r} and JAX_NUM_PROCESSES={numbers[0]!r}: expected integers with "
      "0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES"
    )
  return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _in_cluster() -> bool:
  """Whether JAX detects a cluster in which this run has several processes.

  Raises:
    UserError: the cluster does not say how many processes the run has.
  """
  from jax._src import clusters

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for kind in clusters.ClusterEnv._cluster_types:
      if kind.opt_in_only_method or not kind.is_env_present():
        continue
      try:
        return kind.get_process_count() > 1
      except Exception as error:  # clusters raise errors of different types
        raise UserError(
          f"{kind.__name__}: the number of processes of this run could not be determined "
          f"({one_line(str(error))[:200]}); set {', '.join(_ENVIRONMENT)} in each process, or "
          "JAX_NUM_PROCESSES=1, JAX_PROCESS_ID=0 and JAX_COORDINATOR_ADDRESS=localhost:1 if there "
          "is only one process"
        ) from error
  return False


def leave_processes(error: BaseException | None = None) -> None:
  """Leaves the run, so that the other processes do not count this one as lost. Call it last.

  Args:
    error: the error that ends this process. The other processes receive its message.
  """
  if _together is not None:
    _together.leave(error)


def stop_all(error: BaseException) -> None:
  """Tells the other processes which error stops this one, unless they have the same error."""
  if _together is not None:
    _together.tell(error)


class _Together:
  """The connection of this process to the others, and a thread that watches them.

  If a process is lost, JAX by default aborts all others without naming the lost one. With
  `jax_enable_recoverability`, JAX leaves the reaction to this class. If process 0 is lost, JAX
  still aborts, because process 0 is its coordinator.
  """

  def __init__(self):
    from jax._src import distributed  # JAX has no public name for it; Orbax uses this one too

    state = distributed.global_state
    assert state.client is not None
    # The index that the coordinator uses. `jax.process_index` is the index of the devices.
    self.client, self.index, self.count = state.client, state.process_id, jax.process_count()
    self.address = str(state.coordinator_address)
    self.numbers = itertools.count()
    self.leaving, self.told = threading.Event(), False
    self.error: BaseException | None = None  # an error that only this process has
    self.live: Collection[int] = range(self.count)
    self.ending = threading.RLock()
    self.hosts: list[str] = [str(name) for name in self.gather(socket.gethostname())]
    if self.index:
      self._name_a_lost_coordinator()
    threading.Thread(target=self.watch, daemon=True).start()

  def name(self, index: int) -> str:
    return f"process {index} of {self.count} (host {self.hosts[index]})"

  def gather(self, value: Any) -> list[Any]:
    client, number = self.client, next(self.numbers)
    key = f"{_PREFIX}/gather/{number}"
    client.key_value_set_bytes(f"{key}/{self.index}", serialization.msgpack_serialize([value]))
    client.wait_at_barrier(key, _LONG_MS)
    found = {name.rpartition("/")[2]: data for name, data in client.key_value_dir_get_bytes(key)}
    if number:  # after this barrier, all processes have read the values of the previous call
      client.key_value_delete(f"{_PREFIX}/gather/{number - 1}/{self.index}")
    return [serialization.msgpack_restore(found[str(i)])[0] for i in range(self.count)]

  def _post(self, code: int = 0, reason: str = "") -> None:
    """Tells the other processes that this one ends: its exit status (0: success) and the reason."""
    self.client.key_value_set(f"{_PREFIX}/end/{self.index}", f"{code} {reason}", True)

  def _posted(self) -> dict[int, tuple[int, str]]:
    """Returns the exit status and the reason of each process that has called `_post`."""
    posted = {}
    for key, text in self.client.key_value_dir_get(f"{_PREFIX}/end"):
      code, _, reason = text.partition(" ")
      posted[int(key.rpartition("/")[2])] = int(code), reason
    return posted

  def watch(self) -> None:
    """Ends this process when another one is lost or has posted an error."""
    while not self.leaving.wait(1.0):
      try:
        self._follow(self._posted())
        self.live = self.client.get_live_nodes(list(range(self.count)))  # waits for all live ones
        posted = self._posted()
      except Exception as error:  # the client raises errors of different types
        if not self.leaving.is_set():
          print(f"{type(error).__name__}: {one_line(str(error))[:300]}", file=sys.stderr)
          self._end(f"{self.name(0)}, the coordinator, is gone", os.EX_TEMPFAIL)
        return
      lost = [i for i in range(self.count) if i not in self.live and i not in posted]
      if lost and not self.leaving.is_set():
        self._end(
          f"{', '.join(map(self.name, lost))} {'is' if len(lost) == 1 else 'are'} gone",
          os.EX_TEMPFAIL,
        )
      self._follow(posted)

  def _follow(self, posted: dict[int, tuple[int, str]]) -> None:
    """Ends this process if another has ended because of an error, or because a third was lost."""
    ended = {i: end for i, end in posted.items() if end[0] and i != self.index}
    for code, reason in ended.values():
      if code == os.EX_TEMPFAIL and self.error is None:
        self._end(reason, code)
    # A process with an error of its own ends by itself.
    if ended and not self.leaving.wait(_GRACE_SECONDS) and self.error is None:
      first = min(ended)
      self._end(f"{self.name(first)} stopped: {ended[first][1]}", 1)

  def _end(self, reason: str, code: int) -> NoReturn:
    """Ends this process because of another one.

    Args:
      reason: what happened to the other process.
      code: exit status: 75 (EX_TEMPFAIL) if a process was lost, 1 if a process has failed.
    """
    self._alone()
    if self.error is not None:  # the other processes have ended because of this error
      self._fail()
    print(
      f"{reason}; {self.name(self.index)} stops too; the same command on all hosts continues "
      "from the last checkpoint",
      file=sys.stderr,
      flush=True,
    )

    def last_word():
      self._post(code, reason)
      while not self.index and not {*self.live} <= {*self._posted()}:
        time.sleep(0.1)  # the coordinator ends last: the others learn from it who is lost

    # In a thread, because the call waits for the coordinator, which may be lost.
    speaking = threading.Thread(target=last_word, daemon=True)
    speaking.start()
    speaking.join(1.0 if self.index else 2 * _GRACE_SECONDS)
    _exit(code)

  def _alone(self) -> None:
    """Returns in the first thread that calls it; other threads block forever.

    Several threads may detect at the same time that this process must end.
    """
    if not self.ending.acquire(blocking=False):
      threading.Event().wait()

  def _fail(self) -> NoReturn:
    """Ends this process because of its own error, which is printed."""
    error = self.error
    assert error is not None
    self._alone()
    if isinstance(error, UserError):
      print(one_line(str(error)), file=sys.stderr)
    else:
      traceback.print_exception(error)
    _exit(2 if isinstance(error, UserError) else 1)

  def _name_a_lost_coordinator(self) -> None:
    """Installs a handler of SIGABRT that reports a lost coordinator before JAX aborts."""
    host, _, port = self.address.rpartition(":")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number):  # runs in JAX's thread, after JAX has printed its own message
      try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      except OSError:
        self._end(f"{self.name(0)}, the coordinator, is gone", os.EX_TEMPFAIL)
      libc.signal(number, None)  # another abort: the default action, as soon as this returns

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    self._on_abort = on_abort  # prevents garbage collection
    libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))

  def tell(self, error: BaseException) -> None:
    """Posts an error of this process, and ends it after a while if it has not ended by itself."""
    if self.told or getattr(error, "agreed", False):
      return
    self.told = True
    text = one_line(str(error))
    if not isinstance(error, UserError):
      if re.match(r"[A-Z_]+: ", text):
        # An error of a program. Most probably another process is lost. Then `watch` names it.
        time.sleep(HEARTBEAT_SECONDS + 10)
      text = f"{type(error).__name__}: {text}"

    def insist():  # cleanup may wait for other processes forever
      time.sleep(8 * _GRACE_SECONDS)
      self._fail()

    self.error = error
    with contextlib.suppress(Exception):
      self._post(2 if isinstance(error, UserError) else 1, text[:2000])
    threading.Thread(target=insist, daemon=True).start()

  def leave(self, error: BaseException | None) -> None:
    """Posts the end of this process, and disconnects it once the others have posted theirs."""
    if error is None or getattr(error, "agreed", False):
      self._post()
    else:
      self.tell(error)
    end = time.monotonic() + (2 * _GRACE_SECONDS if self.told else 24 * 3600)
    with contextlib.suppress(Exception):
      while len(self._posted()) < self.count and time.monotonic() < end:
        time.sleep(0.1)
    self.leaving.set()
    if self.error is not None:  # JAX may abort at any moment, because its coordinator ends too
      self._fail()

    def others_left():
      with contextlib.suppress(Exception):
        while len(self.client.get_live_nodes(list(range(self.count)))) > 1:
          time.sleep(0.1)

    if not self.index:  # the coordinator ends last
      last = threading.Thread(target=others_left, daemon=True)
      last.start()
      last.join(60)
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()


def _exit(code: int) -> NoReturn:
  """Ends the process at once. A normal exit would wait for threads that wait for lost processes."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


_together: _Together | None = None


# -- Exchanging values ----------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this is process 0, which prints output and writes the files of the run."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """Returns the values of all processes, in the order of their indices.

  Args:
    value: the value of this process, made of dicts with string keys, lists, strings, numbers, None
      and NumPy arrays.
  """
  return [value] if _together is None else _together.gather(value)


def exchange(
  make: Callable[[], T], share: Callable[[T], Any] = lambda own: own
) -> tuple[T, list[Any]]:
  """Calls `make` in every process, and shares values that are computed from the results.

  Args:
    make: returns a result of this process.
    share: computes the value to share from the result of `make`, by default the result itself.
      Values are as in `gather`.

  Returns:
    The result of `make` in this process, and the shared values of all processes in the order of
    their indices.

  Raises:
    UserError: `make` raised a UserError in at least one process. All processes raise a UserError,
      which has the attribute `agreed`.
  """
  error, own = None, None
  try:
    own = make()
    message = {"value": share(own)}
  except UserError as e:
    error, message = e, {"error": str(e)}
  messages = gather(message)
  for index, received in enumerate(messages):
    if "error" in received:
      agreed = error or UserError(f"process {index}: {received['error']}")
      agreed.agreed = True  # pyright: ignore[reportAttributeAccessIssue]
      raise agreed
  return own, [received["value"] for received in messages]  # pyright: ignore[reportReturnType]


def in_turn(make: Callable[[], T]) -> T:
  """Calls `make` in process 0, then in all others, which can use what process 0 wrote to disk.

  Returns:
    The result of `make` in this process.

  Raises:
    UserError: as in `exchange`.
  """

  def unless(other: bool) -> Any:
    return None if other else make()

  first, _ = exchange(lambda: unless(not is_first()), lambda _: None)
  others, _ = exchange(lambda: unless(is_first()), lambda _: None)
  return first if is_first() else others


@contextlib.contextmanager
def stopping_all() -> Iterator[None]:
  """Context of a run: if an error is raised in it, the other processes are told before cleanup."""
  try:
    yield
  except BaseException as error:
    stop_all(error)
    raise
