"""Runs of many processes: how they join, agree, and stop together.

`jax.distributed` connects them, and programs run on the devices of all. What hosts decide they
exchange through its coordination service: small messages that pass beside the devices' work, so
that nobody waits for a program, and no program for them.

All processes make the same calls of `gather` and `exchange` in the same order, from one thread.
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

HEARTBEAT_SECONDS = 20  # a process that is silent for so long is taken for lost
_GRACE_SECONDS = 5  # for a process to end with an error of its own before another's ends it
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONG_MS = 7 * 24 * 3600 * 1000  # who waits in vain is ended by `_Together.watch`
_PREFIX = "jaxrl_vlm"

T = TypeVar("T")


# -- Joining and leaving --------------------------------------------------------------------------


def join_processes() -> None:
  """Joins the other processes of this run, if there are any. Call before any other use of jax.

  Which there are is said by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or by a cluster that JAX knows (TPU pods, SLURM, ...).

  Raises:
    UserError: only some of the variables are set, or not to what they should be.
  """
  global _together
  if _together is not None:
    return
  if jax.distributed.is_initialized():  # by somebody else
    _together = _Together() if jax.process_count() > 1 else None
    return
  given = _from_environment()
  if given.get("num_processes") == 1 or not (given or _in_cluster()):
    return
  # The loss of a process is for us to tell, see `_Together`; preemption too, see `Run.running`.
  jax.config.update("jax_enable_recoverability", True)
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60
    )
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"the processes of this run did not find each other: {one_line(str(error))}"
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
      f"{', '.join(name for name in values if name not in missing)} is; a run of "
      "many processes needs all three in each of them"
    )
  address, *numbers = values.values()
  if not re.fullmatch(r".+:\d+", address):
    raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: expected host:port of process 0")
  count, index = (int(text) if text.isdecimal() else -1 for text in numbers)
  if not 0 <= index < count:
    raise UserError(
      f"JAX_PROCESS_ID={numbers[1]!r} and JAX_NUM_PROCESSES={numbers[0]!r}: expected "
      "0 <= id < number"
    )
  return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _in_cluster() -> bool:
  """Whether JAX finds itself among several processes."""
  from jax._src import clusters

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for kind in clusters.ClusterEnv._cluster_types:
      if kind.opt_in_only_method or not kind.is_env_present():
        continue
      try:
        return kind.get_process_count() > 1
      except Exception as error:  # whatever asking a cluster may raise
        raise UserError(
          f"{kind.__name__}: how many processes this run has could not be found out "
          f"({one_line(str(error))[:200]}); set {', '.join(_ENVIRONMENT)} in each of them, or "
          "JAX_NUM_PROCESSES=1, JAX_PROCESS_ID=0 and JAX_COORDINATOR_ADDRESS=localhost:1 if this "
          "is the only one"
        ) from error
  return False


def leave_processes(error: BaseException | None = None) -> None:
  """To be called last: nobody takes this process for lost; an `error` is told to the others."""
  if _together is not None:
    _together.leave(error)


def stop_all(error: BaseException) -> None:
  """Tells the others why this process will not go on, unless they have the same reason."""
  if _together is not None:
    _together.tell(error)


class _Together:
  """What this process knows of the others, and a thread that looks after them.

  JAX would end all processes when it misses one, by an abort that does not say which. As
  `jax_enable_recoverability` is set it leaves that to us; but when its coordinator is lost, which
  is process 0, it aborts all the same.
  """

  def __init__(self):
    from jax._src import distributed  # what Orbax uses too: JAX has no public name for it

    state = distributed.global_state
    assert state.client is not None
    # As the coordinator counts; `jax.process_index` is that of the devices.
    self.client, self.index, self.count = state.client, state.process_id, jax.process_count()
    self.address = str(state.coordinator_address)
    self.numbers = itertools.count()
    self.leaving, self.told = threading.Event(), False
    self.error: BaseException | None = None  # that only this process has
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
    if number:  # whoever is here has read those before
      client.key_value_delete(f"{_PREFIX}/gather/{number - 1}/{self.index}")
    return [serialization.msgpack_restore(found[str(i)])[0] for i in range(self.count)]

  # What a process has to say at its end: its exit status, and why; 0 if all is in good order.

  def _post(self, code: int = 0, reason: str = "") -> None:
    self.client.key_value_set(f"{_PREFIX}/end/{self.index}", f"{code} {reason}", True)

  def _posted(self) -> dict[int, tuple[int, str]]:
    found = {}
    for key, text in self.client.key_value_dir_get(f"{_PREFIX}/end"):
      code, _, reason = text.partition(" ")
      found[int(key.rpartition("/")[2])] = int(code), reason
    return found

  def watch(self) -> None:
    """Ends this process when another is lost, or says that it will not go on."""
    while not self.leaving.wait(1.0):
      try:
        self._follow(self._posted())
        self.live = self.client.get_live_nodes(list(range(self.count)))  # waits for all that live
        posted = self._posted()
      except Exception as error:  # of its client, which has several kinds
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
    """Ends this process if another has ended for an error, or because it misses a third."""
    ended = {i: end for i, end in posted.items() if end[0] and i != self.index}
    for code, reason in ended.values():
      if code == os.EX_TEMPFAIL and self.error is None:
        self._end(reason, code)
    # Who has an error of its own ends by itself.
    if ended and not self.leaving.wait(_GRACE_SECONDS) and self.error is None:
      first = min(ended)
      self._end(f"{self.name(first)} stopped: {ended[first][1]}", 1)

  def _end(self, reason: str, code: int) -> NoReturn:
    """Code 75, EX_TEMPFAIL, is of a process that misses another, not of one that failed."""
    self._alone()
    if self.error is not None:  # the others are gone because of it
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
        time.sleep(0.1)  # the coordinator goes last: without it nobody knows who is lost

    # The call would wait for a coordinator that is gone.
    speaking = threading.Thread(target=last_word, daemon=True)
    speaking.start()
    speaking.join(1.0 if self.index else 2 * _GRACE_SECONDS)
    _exit(code)

  def _alone(self) -> None:
    """Comes back in one thread alone: several may find out at once that this process must end."""
    if not self.ending.acquire(blocking=False):
      threading.Event().wait()

  def _fail(self) -> NoReturn:
    """Ends this process by its own error."""
    error = self.error
    assert error is not None
    self._alone()
    if isinstance(error, UserError):
      print(one_line(str(error)), file=sys.stderr)
    else:
      traceback.print_exception(error)
    _exit(2 if isinstance(error, UserError) else 1)

  def _name_a_lost_coordinator(self) -> None:
    host, _, port = self.address.rpartition(":")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number):  # in JAX's thread, after it has written its own account of it
      try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      except OSError:
        self._end(f"{self.name(0)}, the coordinator, is gone", os.EX_TEMPFAIL)
      libc.signal(number, None)  # some other abort: the default, as soon as this returns

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
    self._on_abort = on_abort  # kept alive
    libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))

  def tell(self, error: BaseException) -> None:
    if self.told or getattr(error, "agreed", False):
      return
    self.told = True
    text = one_line(str(error))
    if not isinstance(error, UserError):
      if re.match(r"[A-Z_]+: ", text):
        # Of a program: most probably another process is lost, and `watch` will say which.
        time.sleep(HEARTBEAT_SECONDS + 10)
      text = f"{type(error).__name__}: {text}"

    def insist():  # what is still to be tidied may wait for the others in vain
      time.sleep(8 * _GRACE_SECONDS)
      self._fail()

    self.error = error
    with contextlib.suppress(Exception):
      self._post(2 if isinstance(error, UserError) else 1, text[:2000])
    threading.Thread(target=insist, daemon=True).start()

  def leave(self, error: BaseException | None) -> None:
    if error is None or getattr(error, "agreed", False):
      self._post()
    else:
      self.tell(error)
    end = time.monotonic() + (2 * _GRACE_SECONDS if self.told else 24 * 3600)
    with contextlib.suppress(Exception):
      while len(self._posted()) < self.count and time.monotonic() < end:
        time.sleep(0.1)
    self.leaving.set()
    if self.error is not None:  # JAX may abort any moment: its coordinator ends for the same error
      self._fail()

    def others_left():
      with contextlib.suppress(Exception):
        while len(self.client.get_live_nodes(list(range(self.count)))) > 1:
          time.sleep(0.1)

    if not self.index:  # the coordinator goes last
      last = threading.Thread(target=others_left, daemon=True)
      last.start()
      last.join(60)
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()


def _exit(code: int) -> NoReturn:
  """At once: the end of the interpreter would wait for threads that wait for lost processes."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


_together: _Together | None = None


# -- Agreeing -------------------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this process is the one that prints and writes what a run has once."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """The value of every process, in their order.

  Args:
    value: dicts with string keys, lists, strings, numbers, None and NumPy arrays.
  """
  return [value] if _together is None else _together.gather(value)


def exchange(
  make: Callable[[], T], share: Callable[[T], Any] = lambda own: own
) -> tuple[T, list[Any]]:
  """What `make` gave here, and what `share` makes of it in every process, in their order.

  Raises:
    UserError: `make` raised it here or in another process; all processes raise one, which has an
      attribute `agreed`.
  """
  error, own = None, None
  try:
    own = make()
    given = {"value": share(own)}
  except UserError as e:
    error, given = e, {"error": str(e)}
  everyone = gather(given)
  for index, one in enumerate(everyone):
    if "error" in one:
      here = error or UserError(f"process {index}: {one['error']}")
      here.agreed = True  # pyright: ignore[reportAttributeAccessIssue]
      raise here
  return own, [one["value"] for one in everyone]  # pyright: ignore[reportReturnType]


def in_turn(make: Callable[[], T]) -> T:
  """`make` here, but first in process 0 alone: what it leaves on disk is there for the others."""

  def unless(other: bool) -> Any:
    return None if other else make()

  first, _ = exchange(lambda: unless(not is_first()), lambda _: None)
  others, _ = exchange(lambda: unless(is_first()), lambda _: None)
  return first if is_first() else others


@contextlib.contextmanager
def stopping_all() -> Iterator[None]:
  """Around a run: an error that only this process has is told to the others before it tidies up."""
  try:
    yield
  except BaseException as error:
    stop_all(error)
    raise
