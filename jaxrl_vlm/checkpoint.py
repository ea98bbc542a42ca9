"""Checkpoints of a run: parameters, optimizer, random state, data position, together or not at all."""

import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_vlm.errors import UserError


class Checkpoints:
  """Saves in the background; keeps the last k and the best by held-out accuracy.

  A checkpoint that was interrupted while being written is never restored: Orbax writes under a
  temporary name, and leftovers of it are removed here.
  """

  def __init__(self, path: str | pathlib.Path, keep: int):
    self.path = pathlib.Path(path).absolute()
    keepers = [
        policies.LatestN(n=keep),
        policies.BestN(
            get_metric_fn=lambda m: m["accuracy"], n=1, keep_checkpoints_without_metrics=False),
    ]
    self._manager = ocp.CheckpointManager(
        self.path, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keepers),
            cleanup_tmp_directories=True))

  def save(self, step: int, state: Any, meta: dict[str, Any], accuracy: float | None = None) -> None:
    """Starts saving; device arrays may change as soon as this returns.

    Args:
      step: global step.
      state: pytree of arrays.
      meta: JSON-like; where the run stands.
      accuracy: held-out accuracy of these parameters, if it was measured.

    Raises:
      UserError: the disk cannot hold it; what was saved before is untouched.
    """
    if self._manager.latest_step() == step:
      return
    need = sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(self.path).free
    if free < 1.2 * need:
      raise UserError(
          f"{self.path}: disk full: a checkpoint needs {need / 2**20:.0f} MiB, "
          f"{free / 2**20:.0f} MiB are free; make room and start the same command again "
          f"(last complete checkpoint: step {self._manager.latest_step()})")
    try:
      self._manager.save(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
          metrics=None if accuracy is None else {"accuracy": float(accuracy)})
    except OSError as e:
      raise UserError(f"{self.path}: saving step {step} failed: {e}") from e

  def latest_meta(self) -> dict[str, Any] | None:
    """`meta` of the newest complete checkpoint; None without one."""
    step = self._manager.latest_step()
    if step is None:
      return None
    return dict(self._manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])

  def restore(self, abstract_state: Any) -> Any:
    """The newest state, laid out as the ShapeDtypeStructs and shardings of `abstract_state`."""
    return self._manager.restore(
        self._manager.latest_step(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))["state"]

  def wait(self) -> None:
    """Blocks until what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def pack(state: bytes | dict[str, Any]) -> Any:
  """A data iterator's state as JSON."""
  return json.loads(state) if isinstance(state, bytes) else state
