"""Checkpoints of a run: parameters, optimizer state and data position, saved atomically."""

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
  """A checkpoint that looked complete cannot be read, but an older one exists.

  Attributes:
    steps: steps of all checkpoints that were found unreadable so far. Pass them to the next
      `Checkpoints`.
  """

  agreed = True  # all processes of the run raise it

  def __init__(self, steps: frozenset[int]):
    super().__init__(f"unreadable checkpoints: {sorted(steps)}")
    self.steps = steps


class Checkpoints:
  """Saves checkpoints in the background and restores them.

  The latest `keep` checkpoints and the one with the best held-out accuracy are kept.

  A checkpoint whose writing was interrupted is never restored: Orbax writes under a temporary name,
  and the leftovers are removed here. A checkpoint that lost files later (power failure, partial
  copy) is skipped with a warning, and the newest readable checkpoint is restored instead.

  Args:
    path: directory of the checkpoints. It is created if it does not exist.
    keep: number of latest checkpoints to keep.
    unreadable: steps of checkpoints to skip.
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
    """Starts to save a checkpoint in the background.

    The device arrays may be changed or donated as soon as this method returns. If a checkpoint of
    this step exists, nothing is saved.

    Args:
      step: global step.
      state: pytree of arrays.
      meta: JSON-serializable position of the run.
      accuracy: held-out accuracy of these parameters, or None if it was not measured.

    Raises:
      UserError: the disk has no space for this checkpoint, or the previous one could not be
        written. Earlier checkpoints are unchanged.
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
    """Returns `meta` of the newest readable checkpoint, or None if there is no checkpoint.

    Raises:
      UserError: checkpoints exist, but none of them can be read.
    """
    while (step := self._latest()) is not None:
      meta, error = self._read(step, "meta", ocp.args.JsonRestore())
      if error is None:
        return dict(meta)
      self._skip(step, error)
    return None

  def restore(self, abstract_state: Any) -> Any:
    """Restores the state of the checkpoint that `latest_meta` found.

    Args:
      abstract_state: pytree of ShapeDtypeStructs with the shapes, dtypes and shardings of the
        result.

    Raises:
      Unreadable: the state cannot be read. Create new Checkpoints with `unreadable=error.steps` and
        start again with `latest_meta`.
      UserError: the state cannot be read, and there is no older checkpoint.
    """
    step = self._latest()
    assert step is not None, "restore() before a checkpoint was found by latest_meta()"
    state, error = self._read(step, "state", ocp.args.StandardRestore(abstract_state))
    if error is not None:
      self._skip(step, error)
      raise Unreadable(self._unreadable) from error
    self._rename_skipped()
    return state

  def _read(self, step: int, item: str, how: Any) -> tuple[Any, Exception | None]:
    """Reads this process's shards of an item of a checkpoint.

    Each process reads independently, so that one that fails does not leave the others waiting.

    Returns:
      The item, and None or the error with which one of the processes failed.
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
    except Exception as e:  # Orbax raises different types for different kinds of damage
      error = e
    failed = [text for text in parallel.gather(repr(error) if error else "") if text]
    return found, (error or OSError(failed[0])) if failed else None

  def _latest(self) -> int | None:
    """Returns the newest step that is not skipped, as process 0 sees the directory, or None."""
    steps = set(self._manager.all_steps()) - self._unreadable
    return parallel.gather(max(steps, default=None))[0]

  def _skip(self, step: int, error: Exception) -> None:
    """Skips `step` from now on. Raises UserError if no other checkpoint is left."""
    self._unreadable |= {step}
    if self._latest() is None:
      raise UserError(
        f"{self.path}: no checkpoint can be read (step {step}: {one_line(str(error))[:200]}); "
        "move this directory away to start from the beginning"
      ) from error

  def _rename_skipped(self) -> None:
    """Renames the skipped checkpoints after an older one was restored."""
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
      parallel.gather(None)  # wait until process 0 has renamed them
      self._manager.reload()

  def wait(self) -> None:
    """Waits until all checkpoints are on disk. Raises UserError if they cannot be written."""
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits like `wait`, then closes the manager. Nothing can be saved afterwards."""
    with self._saving():
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as e:
      # Errors of tensorstore are ValueErrors that begin with a code, such as OUT_OF_RANGE. Other
      # ValueErrors are bugs.
      if isinstance(e, ValueError) and not re.match(r"[A-Z_]+: ", str(e)):
        raise
      raise UserError(
        f"{self.path}: saving a checkpoint failed: {one_line(str(e))[:300]}; "
        "earlier checkpoints are unchanged"
      ) from e
