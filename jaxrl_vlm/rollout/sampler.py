"""Drawing responses: a few compiled programs, and the host's loop around them.

`admit` reads prompts and keeps their keys and values, `decode` takes every response a chunk of
tokens further in one compiled loop, `move` brings the survivors together. After each chunk the
host looks: what has ended leaves, what waits may begin (`schedule.Schedule`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxrl_vlm import memory, models, parallel
from jaxrl_vlm.errors import UserError
from jaxrl_vlm.models.decoder import Cells, Int8, Prefix
from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.rollout.sampling import Sampling, pick
from jaxrl_vlm.rollout.schedule import Layout, Schedule, ladder
from jaxrl_vlm.types import Array, Params, Prompt, Rollout

if TYPE_CHECKING:
  from jaxrl_vlm.data.processor import Processor

PREFIX_DTYPES = ("auto", "int8")


@struct.dataclass
class Flight:
  """Responses that are being decoded; R parts of C cells and S slots (`models.decoder.Cells`).

  Attributes:
    prefix_k, prefix_v: [L, R, S, K, Lp, D] or `Int8`; of the prompts.
    length: i32[R, S]; how many of the Lp positions responses see.
    k, v: [L, R, C, K, T', D]; of what each cell has decoded in the chunks before.
    used: i32[R, C]; how many tokens these are.
    token: i32[R, C]; the last one.
    position: i32[R, C]; its M-RoPE id.
    limit: i32[R, C]; the most tokens it may have.
    done: bool[R, C]; ended, or empty.
    sample: i32[R, C]; number of the sample in the whole batch: its randomness.
  """

  prefix_k: Any
  prefix_v: Any
  length: Array
  k: Array
  v: Array
  used: Array
  token: Array
  position: Array
  limit: Array
  done: Array
  sample: Array


def _chunk(cells: Cells) -> dict[str, Array]:
  """What a step of decoding changes."""
  return {name: getattr(cells, name) for name in ("chunk_k", "chunk_v", "step")}


class Sampler:
  """(params, prompt, key) -> Rollout, for one model, mesh and way of sampling.

  `mesh`, `params_at` and `batch_at` are where parameters and prompts lie while it draws, `copied`
  how many bytes on each device the parameters are besides those that it is given.

  What is drawn for a sample depends on the key, on its number in the batch and on its own tokens:
  neither on the chunk nor on what else is decoded beside it.

  Args:
    model, mesh: where params lie on the mesh as `param_shardings` says, and prompts as
      `parallel.batch_sharding`.
    sampling: how to draw.
    chunk: tokens that each response is taken further between two looks of the host.
    groups: prompts (with all their samples) that are decoded at once, on all devices together; 0
      for all of a batch, or as many as there is room for.
    room: bytes on each device for all this but the weights; 0 if that is not known.
    prefix_dtype: of the prompts' keys and values: "auto", as activations, or "int8".
    samples_field: what the config calls the number of samples, for messages.
    tensor: devices that share the weights, in a layout of their own, into which `reshard` takes
      parameters and prompts; 0 for that of `mesh` and `param_shardings`.
    layers: of the model that decoding takes as one loop; 0: all, but on CPU 1: there a loop
      over layers copies the weights, keys and values of each out of the stack, for every token.
  """

  def __init__(
    self,
    model: VLM,
    mesh: Mesh,
    sampling: Sampling,
    param_shardings: Any,
    *,
    chunk: int = 32,
    groups: int = 0,
    prefix_dtype: str = "auto",
    room: float = 0,
    samples_field: str = "num_samples",
    tensor: int = 0,
    layers: int = 0,
  ):
    if prefix_dtype not in PREFIX_DTYPES:
      raise ValueError(
        f"config.rollout.prefix_dtype={prefix_dtype!r}: expected one of {', '.join(PREFIX_DTYPES)}"
      )
    for name, value, least in (("chunk", chunk, 1), ("groups", groups, 0)):
      if value < least:
        raise ValueError(f"config.rollout.{name}={value}: expected at least {least}")
    batch, self.reshard, self.copied = parallel.batch_sharding(mesh), None, 0
    self._given = parallel.rows(mesh)
    if tensor:
      given, mesh = (param_shardings, batch), parallel.with_tensor(mesh, tensor)
      model = model.on(mesh, parallel.ROLLOUT_RULES)
      shapes = models.abstract_params(model.config, model.config.dtype)
      param_shardings = parallel.param_shardings(mesh, shapes, parallel.ROLLOUT_RULES)
      batch = parallel.batch_sharding(mesh)
      self.copied = memory.held(shapes, param_shardings)
      room = room and max(room - self.copied, 1.0)

      def resharded(params, prompt):
        cast = jax.tree.map(lambda a, like: a.astype(like.dtype), params, shapes)
        # Else XLA sends them first and casts them then.
        return jax.lax.optimization_barrier(cast), _without_patches(prompt)

      self.reshard = jax.jit(resharded, in_shardings=given, out_shardings=(param_shardings, batch))
    self.model, self.mesh, self.sampling = model.on(mesh), mesh, sampling
    self.params_at, self.batch_at = param_shardings, batch
    self.chunk = min(chunk, sampling.max_tokens)
    self.groups, self.parts, self.prefix_dtype = groups, parallel.rows(mesh), prefix_dtype
    self.room, self.samples_field = room, samples_field
    cpu = mesh.devices.flat[0].platform == "cpu"
    self.layers = layers or (1 if cpu else model.config.num_layers)
    self._compiled: set[tuple[int, ...]] = set()  # shapes of prompts whose programs all are
    heads = "tensor" if model.config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    rows, kv = (
      NamedSharding(mesh, spec)
      for spec in (Spec(parallel.ROWS), Spec(None, parallel.ROWS, None, heads))
    )
    flight = Flight(kv, kv, rows, kv, kv, *[rows] * 6)
    whole = parallel.replicated(mesh)
    self._start = jax.jit(self._empty, static_argnums=(0, 1), out_shardings=flight)
    self._admit = jax.jit(
      self._admit_,
      in_shardings=(param_shardings, batch, flight, rows, rows, rows, rows),
      out_shardings=flight,
      donate_argnums=2,
    )
    # What the host looks at: the responses of all processes.
    seen = whole if mesh.is_multi_process else rows
    self._decode = jax.jit(
      self._decode_,
      in_shardings=(param_shardings, flight, rows, rows, whole),
      out_shardings=(flight, seen),
      donate_argnums=1,
    )
    self._places = rows
    self._move = jax.jit(self._move_, in_shardings=(flight, rows, rows), out_shardings=flight)

  # -- Programs -----------------------------------------------------------------------------------

  def _empty(self, layout: Layout, length: int) -> Flight:
    """Nothing in flight; `length`: Lp of the prompts."""
    config, r, c, s = self.model.config, self.parts, layout.cells, layout.slots
    # The last chunk of a response is never read again.
    before = (-(-self.sampling.max_tokens // self.chunk) - 1) * self.chunk

    def kv(places, positions):
      return jnp.zeros(
        (config.num_layers, r, places, config.num_kv_heads, positions, config.head_dim),
        config.dtype,
      )

    def prefix():
      return self._kept(kv(s, length))

    def number(places):
      return jnp.zeros((r, places), jnp.int32)

    return Flight(
      prefix(),
      prefix(),
      number(s),
      kv(c, before),
      kv(c, before),
      number(c),
      number(c),
      number(c),
      number(c),
      jnp.ones((r, c), bool),
      number(c),
    )

  def _kept(self, prefix: Array) -> Any:
    """Keys or values of prompts as the flight holds them."""
    return Int8.of(prefix) if self.prefix_dtype == "int8" else prefix

  def _admit_(
    self,
    params: Params,
    prompt: Prompt,
    flight: Flight,
    rows: Array,
    slots: Array,
    cells: Array,
    limits: Array,
  ) -> Flight:
    """Reads prompts and puts them into free places; see `schedule.Admission`. limits: [R, n, G]."""
    parts, g = self.parts, self.sampling.num_samples
    new = rows.shape[1]
    per_part = prompt.tokens.shape[0] // parts
    first = jnp.arange(parts, dtype=jnp.int32)[:, None] * per_part
    take = jax.vmap(lambda a, index: a[index])
    if per_part != new or parts * per_part != rows.size:
      chosen = jax.tree.map(
        lambda a: take(a.reshape(parts, per_part, *a.shape[1:]), rows).reshape(
          parts * new, *a.shape[1:]
        ),
        prompt,
      )
    else:
      chosen = prompt
    prefix: Any = self.model.apply({"params": params}, chosen, method="prefill")[1]

    def put(into, index, value):  # [R, N, ...], [R, n], [R, n, ...]; what is out of range is lost
      return jax.vmap(lambda a, i, b: a.at[i].set(b.astype(a.dtype), mode="drop"))(
        into, index, value
      )

    def put_kv(into, value):  # [L, R, S, K, Lp, D], [L, R·n, K, Lp, D]
      def one(into, value):
        value = value.reshape(value.shape[0], parts, new, *value.shape[2:])
        return jax.vmap(put, in_axes=(0, None, 0))(into, slots, value)

      return jax.tree.map(one, into, self._kept(value))

    def of_samples(value):  # [R·n] -> [R, n·G]
      return jnp.repeat(value.reshape(parts, new), g, axis=1)

    last = jnp.take_along_axis(chosen.tokens, chosen.length[:, None] - 1, axis=1)[:, 0]
    at = cells.reshape(parts, -1)
    sample = ((first + rows)[..., None] * g + jnp.arange(g)).reshape(parts, -1)
    return dataclasses.replace(
      flight,
      prefix_k=put_kv(flight.prefix_k, prefix.k),
      prefix_v=put_kv(flight.prefix_v, prefix.v),
      length=put(flight.length, slots, prefix.length.reshape(parts, new)),
      used=put(flight.used, at, jnp.zeros_like(at)),
      token=put(flight.token, at, of_samples(last)),
      position=put(flight.position, at, of_samples(chosen.next_position - 1)),
      limit=put(flight.limit, at, limits.reshape(parts, -1)),
      done=put(flight.done, at, jnp.zeros(at.shape, bool)),
      sample=put(flight.sample, at, sample),
    )

  def _decode_(self, params: Params, flight: Flight, place: Array, cell: Array, key: Array):
    """Takes every response a chunk further: the flight, and tokens, mask, logp [R, C, n], done."""
    model, sampling = self.model, self.sampling
    config, chunk = model.config, self.chunk
    stops = jnp.array(config.stop_tokens, jnp.int32)
    # Greedy choice has no temperature; its log-probabilities are reported at 1.
    temperature = sampling.temperature or 1.0

    def flat(a):  # [L, R, S, ...] -> [L, R·S, ...]
      return a.reshape(a.shape[0], -1, *a.shape[3:])

    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    keys = fold(jnp.broadcast_to(key, flight.sample.shape), flight.sample)
    live = jnp.where(flight.done, 0, flight.used)
    shape = (config.num_layers, *flight.used.shape, config.num_kv_heads, chunk, config.head_dim)
    empty = jnp.zeros(shape, config.dtype)
    prefix_k, prefix_v = jax.tree.map(flat, (flight.prefix_k, flight.prefix_v))
    stacks = self._stacks(
      params,
      Prefix(prefix_k, prefix_v, flight.length.reshape(-1)),
      Cells(
        flight.k, flight.v, empty, empty, live, live.max(), jnp.zeros((), jnp.int32), place, cell
      ),
    )

    def forward(token, position, chunks):
      """hidden [R, C, D] and keys and values of this chunk, one token further."""
      x, after = token, []
      for i, (apply, prefix, cells) in enumerate(stacks):
        here = dataclasses.replace(cells, **chunks[i])
        x, here = apply(x, position, prefix, here, begin=not i, finish=i == len(stacks) - 1)
        after.append(_chunk(here))
      return x, after

    def step(state):
      token, done, t, chunks, tokens, mask, logps = state
      hidden, chunks = forward(token, flight.position + t, chunks)
      logits: Any = self.model.apply(
        {"params": params}, hidden, temperature, method="response_logits"
      )
      age = flight.used + t
      token, logp = pick(fold(keys, age), logits, sampling)
      token = jnp.where(done, config.pad_token, token)

      def write(into, value):
        return jax.lax.dynamic_update_slice(into, value[..., None].astype(into.dtype), (0, 0, t))

      tokens, mask = write(tokens, token), write(mask, ~done)
      logps = write(logps, jnp.where(done, 0.0, logp))
      done = done | jnp.isin(token, stops) | (age + 1 >= flight.limit)
      return token, done, t + 1, chunks, tokens, mask, logps

    def unfinished(state):
      return (state[2] < chunk) & ~jnp.all(state[1])

    out = (*flight.used.shape, chunk)
    token, done, _, chunks, tokens, mask, logp = jax.lax.while_loop(
      unfinished,
      step,
      (
        flight.token,
        flight.done,
        jnp.zeros((), jnp.int32),
        [_chunk(s[2]) for s in stacks],
        jnp.full(out, config.pad_token, jnp.int32),
        jnp.zeros(out, bool),
        jnp.zeros(out),
      ),
    )
    chunk_k, chunk_v = (
      jnp.concatenate([stack[name] for stack in chunks]) for name in ("chunk_k", "chunk_v")
    )

    def keep(into, new):  # behind what each cell has
      def one(into, new, used):  # [L, K, T', D], [L, K, n, D]
        return jax.lax.dynamic_update_slice(into, new, (0, 0, used, 0))

      each = jax.vmap(jax.vmap(one, in_axes=(1, 1, 0), out_axes=1), in_axes=(1, 1, 0), out_axes=1)
      return each(into, new, flight.used) if into.shape[4] else into

    flight = dataclasses.replace(
      flight,
      k=keep(flight.k, chunk_k),
      v=keep(flight.v, chunk_v),
      used=flight.used + chunk,
      token=token,
      position=flight.position + chunk,
      done=done,
    )
    return flight, (tokens, mask, logp, done)

  def _stacks(
    self, params: Params, prefix: Prefix, cells: Cells
  ) -> list[tuple[Callable, Prefix, Cells]]:
    """`self.layers` layers at a time: their `VLM.decode`, and their share of prefix and cells."""
    config, decoder, stacks = self.model.config, params["decoder"], []
    for first in range(0, config.num_layers, self.layers):
      end = min(first + self.layers, config.num_layers)

      def some(tree, first=first, end=end):
        return jax.tree.map(lambda a: a[first:end], tree)

      model = VLM(
        config.replace(num_layers=end - first, sliding_layers=config.sliding_layers[first:end])
      )
      theirs = {**params, "decoder": {**decoder, "layers": some(decoder["layers"])}}
      stacks.append(
        (
          functools.partial(cast(Any, model.apply), {"params": theirs}, method="decode"),
          dataclasses.replace(prefix, k=some(prefix.k), v=some(prefix.v)),
          dataclasses.replace(
            cells, **{name: some(getattr(cells, name)) for name in ("k", "v", "chunk_k", "chunk_v")}
          ),
        )
      )
    return stacks

  def _move_(self, flight: Flight, cells: Array, slots: Array) -> Flight:
    """The flight in another layout; see `Schedule.move`."""
    take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))
    take_kv = jax.vmap(take, in_axes=(0, None))
    prefix_k, prefix_v = jax.tree.map(
      lambda a: take_kv(a, slots), (flight.prefix_k, flight.prefix_v)
    )
    moved = Flight(
      prefix_k,
      prefix_v,
      take(flight.length, slots),
      take_kv(flight.k, cells),
      take_kv(flight.v, cells),
      *(
        take(a, cells)
        for a in (
          flight.used,
          flight.token,
          flight.position,
          flight.limit,
          flight.done,
          flight.sample,
        )
      ),
    )
    return dataclasses.replace(moved, done=moved.done | (cells == flight.done.shape[1]))

  # -- The host's loop ----------------------------------------------------------------------------

  def __call__(
    self,
    params: Params,
    prompt: Prompt,
    key: Array,
    limits: np.ndarray | None = None,
    finished: Callable[[list[int], np.ndarray, np.ndarray], None] | None = None,
    each_chunk: Callable[[], None] | None = None,
  ) -> Rollout:
    """Draws G responses of each prompt.

    Args:
      params: as `param_shardings` says.
      prompt: P prompts on the mesh.
      key: of jax.random.
      limits: i32[P, G]; the most tokens of each response, if that is less than `max_tokens`.
      finished: called as soon as all samples of some prompts have ended, with the numbers of these
        prompts and their tokens and mask [n, G, T].
      each_chunk: called while the device works on a chunk; what it raises ends the rollout.

    Returns:
      Rollout of host arrays [P, G, T].
    """
    layout, most = self._plan(prompt)
    if self.reshard is not None:
      params, prompt = self.reshard(params, prompt)
    sampling, parts, chunk = self.sampling, self.parts, self.chunk
    p, g = prompt.tokens.shape[0], sampling.num_samples
    schedule = Schedule(p // parts, g, parts, ladder(layout))

    most_tokens = np.full((p, g), sampling.max_tokens, np.int32)
    if limits is not None:
      most_tokens = np.minimum(most_tokens, limits)
    by_part = most_tokens.reshape(parts, p // parts, g)
    total = -(-sampling.max_tokens // chunk) * chunk
    tokens = np.full((p * g, total), self.model.config.pad_token, np.int32)
    mask = np.zeros((p * g, total), bool)
    logp = np.zeros((p * g, total), np.float32)
    done_chunks = np.zeros(p * g, np.int32)
    left = np.full(p, g)
    first = np.arange(parts)[:, None] * (p // parts) * g

    def groups_of(a):
      return a.reshape(p, g, -1)

    def tell(rows):
      if finished is not None and rows:
        finished(rows, *(groups_of(a)[rows, :, : sampling.max_tokens] for a in (tokens, mask)))

    ended_rows: list[int] = []

    def put(*numbers):
      return parallel.put(numbers, self._places) if self.mesh.is_multi_process else numbers

    flight, key = self._start(layout, prompt.tokens.shape[1]), parallel.everywhere(self.mesh, key)
    while schedule.waiting or schedule.alive.any():
      while (new := schedule.admit(most)) is not None:
        flight = self._admit(
          params,
          prompt,
          flight,
          *put(new.rows, new.slots, new.cells, by_part[np.arange(parts)[:, None], new.rows]),
        )
      while schedule.smaller():
        flight = self._move(flight, *put(*schedule.move()))
      flight, out = self._decode(params, flight, *put(*schedule.places()), key)
      tell(ended_rows)  # while the device works
      if each_chunk is not None:
        each_chunk()
      *out, done = jax.device_get(out)

      alive = schedule.alive
      samples = (first + schedule.sample)[alive]
      columns = done_chunks[samples, None] * chunk + np.arange(chunk)
      for into, new in zip((tokens, mask, logp), out, strict=True):
        into[samples[:, None], columns] = new[alive]
      done_chunks[samples] += 1
      ended = (first + schedule.sample)[alive & done]
      schedule.retire(done)
      np.subtract.at(left, ended // g, 1)
      ended_rows = [int(row) for row in np.unique(ended // g) if not left[row]]
    tell(ended_rows)

    if prompt.tokens.shape not in self._compiled:
      # What later rollouts may want is compiled in the first: everybody has ended, nothing is done.
      while schedule.smaller():
        flight = self._move(flight, *put(*schedule.move()))
        flight, _ = self._decode(params, flight, *put(*schedule.places()), key)
        if each_chunk is not None:
          each_chunk()
      self._compiled.add(prompt.tokens.shape)
    return Rollout(*(groups_of(a)[..., : sampling.max_tokens] for a in (tokens, mask, logp)))

  def _plan(self, prompt: Prompt) -> tuple[Layout, int]:
    """The layout to begin with, and how many prompts are admitted at once, for each part."""
    (prompts, length), patches = prompt.tokens.shape, prompt.patches.shape[1]
    groups = (
      self.groups_at_once(prompts, length, patches, prompt.features is not None) // self.parts
    )
    here = prompts // self.parts
    slots, admitted = self._held_and_read(groups, here)
    g = self.sampling.num_samples
    return Layout(groups * g, slots), admitted

  def _held_and_read(self, groups: int, here: int) -> tuple[int, int]:
    """Prompts whose keys and values are held, and those that are read at once."""
    if groups == here:
      return here, here
    # While prompts wait, groups thin out: more of them share the cells.
    return min(here, 2 * groups), max(1, groups // 4)

  def need(self, groups: int, prompts: int, length: int, samples: int = 0) -> float:
    """Bytes on each device to decode so many groups of a batch at once, all devices together.

    `samples`: G, 0 for that of `sampling`.
    """
    slots, admitted = self._held_and_read(groups // self.parts, prompts // self.parts)
    return memory.rollout(
      memory.Model(self.model.config, self.mesh.shape["tensor"]),
      length,
      samples or self.sampling.num_samples,
      groups // self.parts,
      slots,
      admitted,
      self.sampling.max_tokens,
      self.chunk,
      self.prefix_dtype == "int8",
    )

  def groups_at_once(self, prompts: int, length: int, patches: int = 0, seen: bool = True) -> int:
    """Groups of a batch that are decoded at once, all devices together.

    Args:
      prompts: P.
      length: Lp.
      patches: of a prompt.
      seen: the prompts come with their visual tokens.

    Raises:
      UserError: there is no room for so many as the config says, or for a single one; names the
        most groups, or else samples, that there is room for.
    """
    parts, set_to = self.parts, 0
    if self.groups:
      set_to = min(prompts, -(-self.groups // parts) * parts)
    if not self.room:
      return set_to or prompts
    # Beside what decoding needs there are the prompts, and again in the layout of rollouts.
    model = memory.Model(self.model.config, self.mesh.shape["tensor"])
    room = self.room - memory.prompts(model, patches, prompts // self._given)
    if self.reshard is not None:
      copied = memory.features if seen else memory.prompts
      room -= copied(model, patches, prompts // parts)
    fits = [
      n
      for n in range(parts, (set_to or prompts) + 1, parts)
      if self.need(n, prompts, length) <= room
    ]
    if fits and set_to > fits[-1]:
      raise UserError(
        f"config.rollout.groups={self.groups}: so many groups for prompts of {length} tokens "
        f"need {self.need(set_to, prompts, length) / memory.GIB:.1f} GiB on a device beside "
        f"weights and prompts, {room / memory.GIB:.1f} are free; at most {fits[-1]} fit"
      )
    if fits:
      return fits[-1]
    most = [
      g for g in range(1, self.sampling.num_samples) if self.need(parts, prompts, length, g) <= room
    ]
    advice = (
      f"the most that fits is {self.samples_field}={most[-1]}"
      if most
      else "not even one sample fits: use more devices, smaller config.prompt_buckets or "
      "max_tokens, or config.rollout.prefix_dtype='int8'"
    )
    raise UserError(
      f"{self.samples_field}={self.sampling.num_samples}: one group for a prompt of {length} "
      f"tokens needs {self.need(parts, prompts, length) / memory.GIB:.1f} GiB on a device beside "
      f"weights and prompts, {max(room, 0) / memory.GIB:.1f} are free; {advice}"
    )

  def lower(self, params: Params, prompt: Prompt) -> dict[str, Any]:
    """The programs of a rollout before they are compiled, by name; takes shapes."""
    layout, most = self._plan(prompt)
    reshard = {}
    if self.reshard is not None:
      reshard["reshard"] = self.reshard.lower(params, prompt)
      params, prompt = jax.eval_shape(self.reshard, params, prompt)
    r, g = self.parts, self.sampling.num_samples

    def numbers(*shape):
      return jax.ShapeDtypeStruct((r, *shape), jnp.int32)

    flight = jax.eval_shape(lambda: self._empty(layout, prompt.tokens.shape[1]))
    key = jax.eval_shape(lambda: jax.random.key(0))
    cells, slots = numbers(-(-layout.cells // 2)), numbers(layout.slots)
    places = numbers(layout.slots * g)
    return reshard | {
      "admit": self._admit.lower(
        params, prompt, flight, numbers(most), numbers(most), numbers(most, g), numbers(most, g)
      ),
      "decode": self._decode.lower(params, flight, numbers(layout.cells), places, key),
      "move": self._move.lower(flight, cells, slots),
    }


def _without_patches(prompt: Prompt) -> Prompt:
  """Nobody looks at the patches of prompts that have their visual tokens."""
  if prompt.features is None:
    return prompt
  names = ("patches", "patch_positions", "patch_grids", "patch_segments", "patch_windows")
  return dataclasses.replace(prompt, **{name: getattr(prompt, name)[:, :0] for name in names})


@functools.lru_cache(maxsize=16)
def _cached(model, mesh, sampling, treedef, leaves, options) -> Sampler:
  return Sampler(model, mesh, sampling, jax.tree.unflatten(treedef, leaves), **dict(options))


def make_sampler(
  model: VLM, mesh: Mesh, sampling: Sampling, param_shardings: Any, **options
) -> Sampler:
  """The Sampler of these arguments: for equal ones the same, with its compiled programs."""
  leaves, treedef = jax.tree.flatten(param_shardings)
  return cast(Any, _cached)(
    model, mesh, sampling, treedef, tuple(leaves), tuple(sorted(options.items()))
  )


def with_text(rollout: Rollout, processor: "Processor") -> Rollout:
  """Decodes the tokens on the host: rollout.text becomes nested lists [P][G]."""
  text = texts_of(np.asarray(rollout.tokens), np.asarray(rollout.mask), processor)
  return dataclasses.replace(rollout, text=text)


def texts_of(tokens: np.ndarray, mask: np.ndarray, processor: "Processor") -> list[list[str]]:
  """The text of each response [P, G, T], without special tokens."""
  return [
    [processor.decode(row[keep]) for row, keep in zip(rows, keeps, strict=True)]
    for rows, keeps in zip(tokens, mask, strict=True)
  ]


def generate(
  model: VLM,
  params: Params,
  prompt: Prompt,
  sampling: Sampling,
  key: Array | None = None,
  processor: "Processor | None" = None,
) -> Rollout:
  """Samples G responses of each prompt.

  Args:
    model, params, processor: as `load_pretrained` returns them; without a processor
      `rollout.text` is None. Params that lie on a mesh decide where the work is done.
    prompt: P prompts; with a mesh a multiple of `parallel.rows` of it.
    sampling: how to draw.
    key: of jax.random; may be None at temperature 0.

  Returns:
    Rollout with tokens, mask, logp [P, G, T] on the host and text [P][G].
  """
  if key is None:
    if sampling.temperature > 0:
      raise ValueError("generate: a key is needed unless sampling.temperature=0")
    key = jax.random.key(0)
  placed = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
  meshes = [s.mesh for s in placed if isinstance(s, NamedSharding)]
  if meshes:
    mesh = cast(Mesh, meshes[0])
  else:
    device = next(
      (min(s.device_set, key=lambda d: d.id) for s in placed if s is not None), jax.devices()[0]
    )
    mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, [device])
  shardings = parallel.param_shardings(mesh, params, model.config.rules)
  rollout = make_sampler(model, mesh, sampling, shardings)(
    params, parallel.put_batch(mesh, prompt), key
  )
  return rollout if processor is None else with_text(rollout, processor)
