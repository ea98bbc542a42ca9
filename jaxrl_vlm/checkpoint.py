"""Checkpoints of a run: parameters, optimizer and data position, together or not at all."""

import contextlib
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_vlm import parallel
from jaxrl_vlm.errors import UserError, one_line


class Unreadable(Exception):
  """A checkpoint looked complete but cannot be read; an older one is there.

  Attributes:
    steps: all that were found unreadable so far, for the next `Checkpoints`.
  """

  agreed = True  # by all processes of the run

  def __init__(self, steps: frozenset[int]):
    super().__init__(f"unreadable checkpoints: {sorted(steps)}")
    self.steps = steps


class Checkpoints:
  """Saves in the background; keeps the last k and the best by held-out accuracy.

  A checkpoint that was interrupted while being written is never restored: Orbax writes under a
  temporary name, and leftovers of it are removed here. One that lost files after that (a machine
  that lost power, a partial copy) is passed over with a warning for the newest that can be read.

  Args:
    path: made if it does not exist.
    keep: k.
    unreadable: steps to pass over.
  """

  def __init__(self, path: str | pathlib.Path, keep: int, unreadable: Iterable[int] = ()):
    self.path = pathlib.Path(path).absolute()
    self._unreadable = frozenset(unreadable)
    keepers = [
      policies.LatestN(n=keep),
      policies.BestN(
        get_metric_fn=lambda m: m["accuracy"], n=1, keep_checkpoints_without_metrics=False
      ),
    ]
    self._manager = ocp.CheckpointManager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keepers), cleanup_tmp_directories=True
      ),
    )

  def save(
    self, step: int, state: Any, meta: dict[str, Any], accuracy: float | None = None
  ) -> None:
    """Starts saving; device arrays may change as soon as this returns.

    Args:
      step: global step.
      state: pytree of arrays.
      meta: JSON-like; where the run stands.
      accuracy: held-out accuracy of these parameters, if it was measured.

    Raises:
      UserError: the disk cannot hold it, or could not hold the one before; what was saved earlier
        is untouched.
    """
    if self._manager.latest_step() == step:
      return
    need = sum(x.nbytes for x in jax.tree.leaves(state))
    free = parallel.gather(shutil.disk_usage(self.path).free)[0]
    if free < 1.2 * need:
      raise UserError(
        f"{self.path}: disk full: a checkpoint needs {need / 2**20:.0f} MiB, "
        f"{free / 2**20:.0f} MiB are free; make room and start the same command again "
        f"(last complete checkpoint: step {self._manager.latest_step()})"
      )
    with self._saving():
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
        metrics=None if accuracy is None else {"accuracy": float(accuracy)},
      )

  def latest_meta(self) -> dict[str, Any] | None:
    """`meta` of the newest checkpoint that can be read; None without any checkpoint.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    while (step := self._latest()) is not None:
      meta, error = self._read(step, "meta", ocp.args.JsonRestore())
      if error is None:
        return dict(meta)
      self._pass_over(step, error)
    return None

  def restore(self, abstract_state: Any) -> Any:
    """The state of `latest_meta`, laid out as the ShapeDtypeStructs of `abstract_state`.

    Raises:
      Unreadable: start again from `latest_meta` with new Checkpoints that pass over its steps.
      UserError: it cannot be read, and there is no older one.
    """
    step = self._latest()
    assert step is not None, "restore() before a checkpoint was found by latest_meta()"
    state, error = self._read(step, "state", ocp.args.StandardRestore(abstract_state))
    if error is not None:
      self._pass_over(step, error)
      raise Unreadable(self._unreadable) from error
    self._set_aside()
    return state

  def _read(self, step: int, item: str, how: Any) -> tuple[Any, Exception | None]:
    """An item of a step as far as it is this process's, or why one of the processes cannot read it.

    Each reads for itself: one that fails must not leave the others waiting for it.
    """
    found, error = None, None
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read_{me}"
    )
    try:
      handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
      )
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        found = reader.restore(self.path / str(step), args=ocp.args.Composite(**{item: how}))[item]
    except Exception as e:  # whatever was cut short or is missing, Orbax fails in another way
      error = e
    failed = [text for text in parallel.gather(repr(error) if error else "") if text]
    return found, (error or OSError(failed[0])) if failed else None

  def _latest(self) -> int | None:
    """As the first process sees the directory."""
    steps = set(self._manager.all_steps()) - self._unreadable
    return parallel.gather(max(steps, default=None))[0]

  def _pass_over(self, step: int, error: Exception) -> None:
    """From now on without `step`, if there is another."""
    self._unreadable |= {step}
    if self._latest() is None:
      raise UserError(
        f"{self.path}: no checkpoint can be read (step {step}: {one_line(str(error))[:200]}); "
        "move this directory away to start from the beginning"
      ) from error

  def _set_aside(self) -> None:
    """Renames what was passed over, now that an older checkpoint has proved to be readable."""
    latest = self._latest()
    for step in sorted(self._unreadable):
      target = self.path / f"unreadable-{step}"
      if not parallel.is_first():
        continue
      if (self.path / str(step)).exists():
        shutil.rmtree(target, ignore_errors=True)
        (self.path / str(step)).rename(target)
      print(
        f"warning: the checkpoint of step {step} cannot be read and is now {target}; "
        f"continuing from step {latest}",
        file=sys.stderr,
      )
    if self._unreadable:
      parallel.gather(None)  # the first has moved them
      self._manager.reload()

  def wait(self) -> None:
    """Blocks until what was saved is on disk; raises UserError if it cannot be."""
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """`wait`, and no saving after it."""
    with self._saving():
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as e:
      # tensorstore's errors are ValueErrors that begin with a code, such as OUT_OF_RANGE.
      if isinstance(e, ValueError) and not re.match(r"[A-Z_]+: ", str(e)):
        raise
      raise UserError(
        f"{self.path}: saving a checkpoint failed: {one_line(str(e))[:300]}; "
        "earlier checkpoints are as they were"
      ) from e
