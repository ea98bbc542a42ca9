"""The sampler: generates responses with three compiled programs and a loop on the host.

`prefill` runs the model on prompts and stores their keys and values in prefix slots. `decode`
advances every sequence (row) of the decoding batch by a chunk of tokens in one compiled loop.
`compact` copies the remaining sequences into a smaller batch. After each chunk the host checks
which responses have ended, and starts waiting prompts in their place (`schedule.Schedule`, which
also defines shards, sequences, prefix slots and groups).
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
from jaxrl_vlm.models.decoder import DecodeCache, Int8, Prefix
from jaxrl_vlm.models.vlm import VLM
from jaxrl_vlm.rollout.sampling import Sampling, pick
from jaxrl_vlm.rollout.schedule import Layout, Schedule, ladder
from jaxrl_vlm.types import Array, Params, Prompt, Rollout

if TYPE_CHECKING:
  from jaxrl_vlm.data.processor import Processor

PREFIX_DTYPES = ("auto", "int8")


@struct.dataclass
class DecodeState:
  """Responses that are being decoded: R shards of C sequences and S prefix slots.

  `models.decoder.DecodeCache` describes the layout of keys and values.

  Attributes:
    prefix_k, prefix_v: [L, R, S, K, Lp, D] or `Int8`; keys and values of the prompts.
    length: i32[R, S]; number of the Lp positions that responses attend to.
    k, v: [L, R, C, K, T', D]; keys and values of what each sequence decoded in earlier chunks.
    used: i32[R, C]; number of tokens that each sequence decoded in earlier chunks.
    token: i32[R, C]; the last token.
    position: i32[R, C]; M-RoPE id of the last token.
    limit: i32[R, C]; maximum number of tokens of the response.
    done: bool[R, C]; true if the response has ended or the sequence is free.
    sample: i32[R, C]; index of the sample in the whole batch, which selects its random numbers.
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


def _chunk(cache: DecodeCache) -> dict[str, Array]:
  """The fields of the cache that a decoding step changes."""
  return {name: getattr(cache, name) for name in ("chunk_k", "chunk_v", "step")}


class Sampler:
  """Generates responses: (params, prompt, key) -> Rollout.

  A sampler is compiled for one model, mesh and set of sampling parameters. Given
  parameters and prompts, the tokens of a sample depend only on the key, on its index in the batch
  and on its own earlier tokens. They do not depend on the chunk size or on which other responses
  are decoded at the same time.

  Attributes:
    mesh: the mesh that programs run on.
    params_at, batch_at: shardings of parameters and prompts on that mesh.
    reshard: copies (params, prompt) to these shardings, or None if they already have them.
    copied: bytes on each device of the resharded parameters, which exist in addition to the
      parameters that are passed in.

  Args:
    model: the model.
    mesh: the mesh of the parameters and prompts that are passed in.
    sampling: sampling parameters.
    param_shardings: shardings of the parameters that are passed in. Prompts have
      `parallel.batch_sharding`.
    chunk: number of tokens that each response is decoded between two checks by the host.
    groups: number of prompts (each with all its samples) that are decoded at once, over all
      devices. 0: all prompts of a batch, or as many as fit in `room`.
    prefix_dtype: dtype of the keys and values of prompts: "auto", as activations, or "int8".
    room: bytes on each device for the rollout, in addition to the parameters that are passed in. 0
      if unknown.
    samples_field: name of the config field that sets the number of samples, for error messages.
    tensor: size of the mesh axis `tensor` during rollouts: `reshard` then copies parameters and
      prompts to shardings in which this many devices share the weights. 0 uses `mesh` and
      `param_shardings`.
    layers: number of layers that decoding runs in one loop. 0: all layers, or 1 on CPU, where a
      loop over layers copies the weights, keys and values of each layer out of the stacked arrays
      for every token.

  Raises:
    ValueError: `prefix_dtype`, `chunk`, `groups` or `tensor` is invalid.
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
    self._input_shards = parallel.rows(mesh)
    if tensor:
      input_shardings, mesh = (param_shardings, batch), parallel.with_tensor(mesh, tensor)
      model = model.on(mesh, parallel.ROLLOUT_RULES)
      shapes = models.abstract_params(model.config, model.config.dtype)
      param_shardings = parallel.param_shardings(mesh, shapes, parallel.ROLLOUT_RULES)
      batch = parallel.batch_sharding(mesh)
      self.copied = memory.held(shapes, param_shardings)
      room = room and max(room - self.copied, 1.0)

      def resharded(params, prompt):
        converted = jax.tree.map(lambda a, like: a.astype(like.dtype), params, shapes)
        # Without the barrier, XLA transfers the parameters before it converts them.
        return jax.lax.optimization_barrier(converted), _without_patches(prompt)

      self.reshard = jax.jit(
        resharded, in_shardings=input_shardings, out_shardings=(param_shardings, batch)
      )
    self.model, self.mesh, self.sampling = model.on(mesh), mesh, sampling
    self.params_at, self.batch_at = param_shardings, batch
    self.chunk = min(chunk, sampling.max_tokens)
    self.groups, self.shards, self.prefix_dtype = groups, parallel.rows(mesh), prefix_dtype
    self.room, self.samples_field = room, samples_field
    cpu = mesh.devices.flat[0].platform == "cpu"
    self.layers = layers or (1 if cpu else model.config.num_layers)
    self._compiled: set[tuple[int, ...]] = set()  # prompt shapes all of whose programs are compiled
    heads = "tensor" if model.config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    rows, kv = (
      NamedSharding(mesh, spec)
      for spec in (Spec(parallel.ROWS), Spec(None, parallel.ROWS, None, heads))
    )
    state = DecodeState(kv, kv, rows, kv, kv, *[rows] * 6)
    replicated = parallel.replicated(mesh)
    self._start = jax.jit(self._empty, static_argnums=(0, 1), out_shardings=state)
    self._prefill = jax.jit(
      self._prefill_,
      in_shardings=(param_shardings, batch, state, rows, rows, rows, rows),
      out_shardings=state,
      donate_argnums=2,
    )
    # The host of every process reads the responses of all processes.
    responses = replicated if mesh.is_multi_process else rows
    self._decode = jax.jit(
      self._decode_,
      in_shardings=(param_shardings, state, rows, rows, replicated),
      out_shardings=(state, responses),
      donate_argnums=1,
    )
    self._row_sharding = rows
    self._compact = jax.jit(self._compact_, in_shardings=(state, rows, rows), out_shardings=state)

  # -- Programs -----------------------------------------------------------------------------------

  def _empty(self, layout: Layout, length: int) -> DecodeState:
    """Returns an empty decode state for prompts of padded length `length` (Lp)."""
    config, r, c, s = self.model.config, self.shards, layout.sequences, layout.prefixes
    # The keys and values of a response's last chunk are never read again, so they are not stored.
    stored = (-(-self.sampling.max_tokens // self.chunk) - 1) * self.chunk

    def kv(count, positions):
      return jnp.zeros(
        (config.num_layers, r, count, config.num_kv_heads, positions, config.head_dim),
        config.dtype,
      )

    def prefix():
      return self._stored(kv(s, length))

    def number(count):
      return jnp.zeros((r, count), jnp.int32)

    return DecodeState(
      prefix(),
      prefix(),
      number(s),
      kv(c, stored),
      kv(c, stored),
      number(c),
      number(c),
      number(c),
      number(c),
      jnp.ones((r, c), bool),
      number(c),
    )

  def _stored(self, prefix: Array) -> Any:
    """Converts keys or values of prompts to the type in which the state stores them."""
    return Int8.of(prefix) if self.prefix_dtype == "int8" else prefix

  def _prefill_(
    self,
    params: Params,
    prompt: Prompt,
    state: DecodeState,
    prompts: Array,
    prefix_slots: Array,
    sequences: Array,
    limits: Array,
  ) -> DecodeState:
    """Runs the model on some prompts and starts their samples.

    `prompts` and `prefix_slots` i32[R, n] and `sequences` i32[R, n, G] are those of
    `schedule.Prefill`. `limits` i32[R, n, G] are the maximum numbers of tokens of the responses.
    """
    shards, g = self.shards, self.sampling.num_samples
    new = prompts.shape[1]
    per_shard = prompt.tokens.shape[0] // shards
    first = jnp.arange(shards, dtype=jnp.int32)[:, None] * per_shard
    take = jax.vmap(lambda a, index: a[index])
    if per_shard != new or shards * per_shard != prompts.size:
      chosen = jax.tree.map(
        lambda a: take(a.reshape(shards, per_shard, *a.shape[1:]), prompts).reshape(
          shards * new, *a.shape[1:]
        ),
        prompt,
      )
    else:
      chosen = prompt
    prefix: Any = self.model.apply({"params": params}, chosen, method="prefill")[1]

    def put(into, index, value):  # [R, N, ...], [R, n], [R, n, ...]; drops indices out of range
      return jax.vmap(lambda a, i, b: a.at[i].set(b.astype(a.dtype), mode="drop"))(
        into, index, value
      )

    def put_kv(into, value):  # [L, R, S, K, Lp, D], [L, R·n, K, Lp, D]
      def one(into, value):
        value = value.reshape(value.shape[0], shards, new, *value.shape[2:])
        return jax.vmap(put, in_axes=(0, None, 0))(into, prefix_slots, value)

      return jax.tree.map(one, into, self._stored(value))

    def of_samples(value):  # [R·n] -> [R, n·G]
      return jnp.repeat(value.reshape(shards, new), g, axis=1)

    last = jnp.take_along_axis(chosen.tokens, chosen.length[:, None] - 1, axis=1)[:, 0]
    index = sequences.reshape(shards, -1)
    sample = ((first + prompts)[..., None] * g + jnp.arange(g)).reshape(shards, -1)
    return dataclasses.replace(
      state,
      prefix_k=put_kv(state.prefix_k, prefix.k),
      prefix_v=put_kv(state.prefix_v, prefix.v),
      length=put(state.length, prefix_slots, prefix.length.reshape(shards, new)),
      used=put(state.used, index, jnp.zeros_like(index)),
      token=put(state.token, index, of_samples(last)),
      position=put(state.position, index, of_samples(chosen.next_position - 1)),
      limit=put(state.limit, index, limits.reshape(shards, -1)),
      done=put(state.done, index, jnp.zeros(index.shape, bool)),
      sample=put(state.sample, index, sample),
    )

  def _decode_(
    self,
    params: Params,
    state: DecodeState,
    query_of_sequence: Array,
    sequence_of_query: Array,
    key: Array,
  ):
    """Decodes every response by one chunk of n tokens.

    Returns the new state, and tokens, mask and logp [R, C, n] with done [R, C].
    """
    model, sampling = self.model, self.sampling
    config, chunk = model.config, self.chunk
    stops = jnp.array(config.stop_tokens, jnp.int32)
    # Greedy decoding has no temperature. Its log-probabilities are reported at temperature 1.
    temperature = sampling.temperature or 1.0

    def flat(a):  # [L, R, S, ...] -> [L, R·S, ...]
      return a.reshape(a.shape[0], -1, *a.shape[3:])

    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    keys = fold(jnp.broadcast_to(key, state.sample.shape), state.sample)
    live = jnp.where(state.done, 0, state.used)
    shape = (config.num_layers, *state.used.shape, config.num_kv_heads, chunk, config.head_dim)
    empty = jnp.zeros(shape, config.dtype)
    prefix_k, prefix_v = jax.tree.map(flat, (state.prefix_k, state.prefix_v))
    stacks = self._stacks(
      params,
      Prefix(prefix_k, prefix_v, state.length.reshape(-1)),
      DecodeCache(
        state.k,
        state.v,
        empty,
        empty,
        live,
        live.max(),
        jnp.zeros((), jnp.int32),
        query_of_sequence,
        sequence_of_query,
      ),
    )

    def forward(token, position, chunks):
      """Hidden states [R, C, D], and the chunks of all stacks with one more token."""
      x, new_chunks = token, []
      for i, (apply, prefix, cache) in enumerate(stacks):
        new = dataclasses.replace(cache, **chunks[i])
        x, new = apply(x, position, prefix, new, begin=not i, finish=i == len(stacks) - 1)
        new_chunks.append(_chunk(new))
      return x, new_chunks

    def step(carry):
      token, done, t, chunks, tokens, mask, logps = carry
      hidden, chunks = forward(token, state.position + t, chunks)
      logits: Any = self.model.apply(
        {"params": params}, hidden, temperature, method="response_logits"
      )
      age = state.used + t
      token, logp = pick(fold(keys, age), logits, sampling)
      token = jnp.where(done, config.pad_token, token)

      def write(into, value):
        return jax.lax.dynamic_update_slice(into, value[..., None].astype(into.dtype), (0, 0, t))

      tokens, mask = write(tokens, token), write(mask, ~done)
      logps = write(logps, jnp.where(done, 0.0, logp))
      done = done | jnp.isin(token, stops) | (age + 1 >= state.limit)
      return token, done, t + 1, chunks, tokens, mask, logps

    def unfinished(carry):
      return (carry[2] < chunk) & ~jnp.all(carry[1])  # t and done

    out = (*state.used.shape, chunk)
    token, done, _, chunks, tokens, mask, logp = jax.lax.while_loop(
      unfinished,
      step,
      (
        state.token,
        state.done,
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

    def append(into, new):  # after the used positions of each sequence
      def one(into, new, used):  # [L, K, T', D], [L, K, n, D]
        return jax.lax.dynamic_update_slice(into, new, (0, 0, used, 0))

      each = jax.vmap(jax.vmap(one, in_axes=(1, 1, 0), out_axes=1), in_axes=(1, 1, 0), out_axes=1)
      return each(into, new, state.used) if into.shape[4] else into

    state = dataclasses.replace(
      state,
      k=append(state.k, chunk_k),
      v=append(state.v, chunk_v),
      used=state.used + chunk,
      token=token,
      position=state.position + chunk,
      done=done,
    )
    return state, (tokens, mask, logp, done)

  def _stacks(
    self, params: Params, prefix: Prefix, cache: DecodeCache
  ) -> list[tuple[Callable, Prefix, DecodeCache]]:
    """Splits the model into stacks of `self.layers` layers.

    Returns, for each stack, its `VLM.decode` and its layers of the prefix and the cache.
    """
    config, decoder, stacks = self.model.config, params["decoder"], []
    for first in range(0, config.num_layers, self.layers):
      end = min(first + self.layers, config.num_layers)

      def some(tree, first=first, end=end):
        return jax.tree.map(lambda a: a[first:end], tree)

      model = VLM(
        config.replace(num_layers=end - first, sliding_layers=config.sliding_layers[first:end])
      )
      stack_params = {**params, "decoder": {**decoder, "layers": some(decoder["layers"])}}
      stacks.append(
        (
          functools.partial(cast(Any, model.apply), {"params": stack_params}, method="decode"),
          dataclasses.replace(prefix, k=some(prefix.k), v=some(prefix.v)),
          dataclasses.replace(
            cache, **{name: some(getattr(cache, name)) for name in ("k", "v", "chunk_k", "chunk_v")}
          ),
        )
      )
    return stacks

  def _compact_(self, state: DecodeState, sequences: Array, prefix_slots: Array) -> DecodeState:
    """Returns the state in the next layout. `Schedule.compact` describes the indices."""
    take = jax.vmap(lambda a, index: jnp.take(a, index, axis=0, mode="clip"))
    take_kv = jax.vmap(take, in_axes=(0, None))
    prefix_k, prefix_v = jax.tree.map(
      lambda a: take_kv(a, prefix_slots), (state.prefix_k, state.prefix_v)
    )
    compacted = DecodeState(
      prefix_k,
      prefix_v,
      take(state.length, prefix_slots),
      take_kv(state.k, sequences),
      take_kv(state.v, sequences),
      *(
        take(a, sequences)
        for a in (
          state.used,
          state.token,
          state.position,
          state.limit,
          state.done,
          state.sample,
        )
      ),
    )
    return dataclasses.replace(compacted, done=compacted.done | (sequences == state.done.shape[1]))

  # -- Host loop ----------------------------------------------------------------------------------

  def __call__(
    self,
    params: Params,
    prompt: Prompt,
    key: Array,
    limits: np.ndarray | None = None,
    finished: Callable[[list[int], np.ndarray, np.ndarray], None] | None = None,
    each_chunk: Callable[[], None] | None = None,
  ) -> Rollout:
    """Generates G responses for each prompt.

    Args:
      params: parameters, sharded as `param_shardings`.
      prompt: P prompts, sharded as `parallel.batch_sharding`.
      key: key of `jax.random`.
      limits: i32[P, G]; maximum number of tokens of each response, where it is less than
        `max_tokens`.
      finished: called after all samples of some prompts have ended, with the indices of these n
        prompts and their tokens and mask [n, G, T].
      each_chunk: called while the device decodes a chunk. An exception that it raises ends the
        rollout.

    Returns:
      Rollout of host arrays [P, G, T].

    Raises:
      UserError: the rollout does not fit in the memory of a device (`groups_at_once`).
    """
    layout, prefill_size = self._plan(prompt)
    if self.reshard is not None:
      params, prompt = self.reshard(params, prompt)
    sampling, shards, chunk = self.sampling, self.shards, self.chunk
    p, g = prompt.tokens.shape[0], sampling.num_samples
    schedule = Schedule(p // shards, g, shards, ladder(layout))

    max_tokens = np.full((p, g), sampling.max_tokens, np.int32)
    if limits is not None:
      max_tokens = np.minimum(max_tokens, limits)
    limits_by_shard = max_tokens.reshape(shards, p // shards, g)
    total = -(-sampling.max_tokens // chunk) * chunk
    tokens = np.full((p * g, total), self.model.config.pad_token, np.int32)
    mask = np.zeros((p * g, total), bool)
    logp = np.zeros((p * g, total), np.float32)
    done_chunks = np.zeros(p * g, np.int32)
    left = np.full(p, g)  # samples of each prompt that have not ended
    first = np.arange(shards)[:, None] * (p // shards) * g  # the first sample of each shard

    def by_group(a):
      return a.reshape(p, g, -1)

    def report(rows):
      if finished is not None and rows:
        finished(rows, *(by_group(a)[rows, :, : sampling.max_tokens] for a in (tokens, mask)))

    ended_rows: list[int] = []

    def put(*arrays):
      return parallel.put(arrays, self._row_sharding) if self.mesh.is_multi_process else arrays

    state, key = self._start(layout, prompt.tokens.shape[1]), parallel.everywhere(self.mesh, key)
    while schedule.waiting or schedule.alive.any():
      while (new := schedule.prefill(prefill_size)) is not None:
        state = self._prefill(
          params,
          prompt,
          state,
          *put(
            new.prompts,
            new.prefix_slots,
            new.sequences,
            limits_by_shard[np.arange(shards)[:, None], new.prompts],
          ),
        )
      while schedule.smaller():
        state = self._compact(state, *put(*schedule.compact()))
      state, out = self._decode(params, state, *put(*schedule.group_by_prompt()), key)
      report(ended_rows)  # those of the previous chunk, while the device works
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
    report(ended_rows)

    if prompt.tokens.shape not in self._compiled:
      # The first rollout also compiles the programs of the smaller layouts, which later rollouts
      # may need. All responses have ended, so these programs compute nothing.
      while schedule.smaller():
        state = self._compact(state, *put(*schedule.compact()))
        state, _ = self._decode(params, state, *put(*schedule.group_by_prompt()), key)
        if each_chunk is not None:
          each_chunk()
      self._compiled.add(prompt.tokens.shape)
    return Rollout(*(by_group(a)[..., : sampling.max_tokens] for a in (tokens, mask, logp)))

  def _plan(self, prompt: Prompt) -> tuple[Layout, int]:
    """Returns the first layout, and the number of prompts that a shard prefills at once."""
    (prompts, length), patches = prompt.tokens.shape, prompt.patches.shape[1]
    groups = (
      self.groups_at_once(prompts, length, patches, prompt.features is not None) // self.shards
    )
    prefixes, prefill_size = self._prefix_sizes(groups, prompts // self.shards)
    g = self.sampling.num_samples
    return Layout(groups * g, prefixes), prefill_size

  def _prefix_sizes(self, groups: int, prompts: int) -> tuple[int, int]:
    """The number of prefix slots of a shard, and of prompts that it prefills at once.

    Args:
      groups: groups that the shard decodes at once.
      prompts: prompts of the shard.
    """
    if groups == prompts:
      return prompts, prompts
    # While prompts wait, groups lose samples, so that more than `groups` of them share the
    # sequences.
    return min(prompts, 2 * groups), max(1, groups // 4)

  def need(self, groups: int, prompts: int, length: int, samples: int = 0) -> float:
    """Returns the bytes on each device that a rollout needs besides weights and prompts.

    Args:
      groups: groups that are decoded at once, over all devices.
      prompts: P, the prompts of the batch.
      length: Lp.
      samples: G, or 0 for that of `sampling`.
    """
    prefixes, prefill_size = self._prefix_sizes(groups // self.shards, prompts // self.shards)
    return memory.rollout(
      memory.Model(self.model.config, self.mesh.shape["tensor"]),
      length,
      samples or self.sampling.num_samples,
      groups // self.shards,
      prefixes,
      prefill_size,
      self.sampling.max_tokens,
      self.chunk,
      self.prefix_dtype == "int8",
    )

  def groups_at_once(self, prompts: int, length: int, patches: int = 0, seen: bool = True) -> int:
    """Returns how many groups of a batch are decoded at once, over all devices.

    Args:
      prompts: P.
      length: Lp.
      patches: number of patches of a prompt.
      seen: whether the prompts have their visual tokens (`Prompt.features`).

    Raises:
      UserError: the groups of the config, or a single group, do not fit in the memory of a device.
        The message names the largest number of groups, or else of samples, that fits.
    """
    shards, configured = self.shards, 0
    if self.groups:
      configured = min(prompts, -(-self.groups // shards) * shards)
    if not self.room:
      return configured or prompts
    # The prompts are in memory too, a second time if they are copied to the sharding of rollouts.
    model = memory.Model(self.model.config, self.mesh.shape["tensor"])
    room = self.room - memory.prompts(model, patches, prompts // self._input_shards)
    if self.reshard is not None:
      copied = memory.features if seen else memory.prompts
      room -= copied(model, patches, prompts // shards)
    fits = [
      n
      for n in range(shards, (configured or prompts) + 1, shards)
      if self.need(n, prompts, length) <= room
    ]
    if fits and configured > fits[-1]:
      raise UserError(
        f"config.rollout.groups={self.groups}: decoding this many groups at once with prompts of "
        f"{length} tokens needs {self.need(configured, prompts, length) / memory.GIB:.1f} GiB on "
        f"a device besides weights and prompts, but only {room / memory.GIB:.1f} GiB are free; at "
        f"most {fits[-1]} groups fit"
      )
    if fits:
      return fits[-1]
    most = [
      g
      for g in range(1, self.sampling.num_samples)
      if self.need(shards, prompts, length, g) <= room
    ]
    advice = (
      f"the largest number that fits is {self.samples_field}={most[-1]}"
      if most
      else "not even one sample fits: use more devices, smaller config.prompt_buckets or "
      "max_tokens, or config.rollout.prefix_dtype='int8'"
    )
    raise UserError(
      f"{self.samples_field}={self.sampling.num_samples}: decoding the samples of one prompt of "
      f"{length} tokens needs {self.need(shards, prompts, length) / memory.GIB:.1f} GiB on a "
      f"device besides weights and prompts, but only {max(room, 0) / memory.GIB:.1f} GiB are free; "
      f"{advice}"
    )

  def lower(self, params: Params, prompt: Prompt) -> dict[str, Any]:
    """Lowers the programs of a rollout without compiling them.

    Args:
      params, prompt: shapes (`jax.ShapeDtypeStruct`) or arrays.

    Returns:
      The lowered programs by name: `reshard` (with `tensor` only), `prefill`, `decode`, `compact`.
    """
    layout, prefill_size = self._plan(prompt)
    reshard = {}
    if self.reshard is not None:
      reshard["reshard"] = self.reshard.lower(params, prompt)
      params, prompt = jax.eval_shape(self.reshard, params, prompt)
    r, n, g = self.shards, prefill_size, self.sampling.num_samples

    def numbers(*shape):
      return jax.ShapeDtypeStruct((r, *shape), jnp.int32)

    state = jax.eval_shape(lambda: self._empty(layout, prompt.tokens.shape[1]))
    key = jax.eval_shape(lambda: jax.random.key(0))
    sequences, prefix_slots = numbers(-(-layout.sequences // 2)), numbers(layout.prefixes)
    queries = numbers(layout.prefixes * g)
    return reshard | {
      "prefill": self._prefill.lower(
        params, prompt, state, numbers(n), numbers(n), numbers(n, g), numbers(n, g)
      ),
      "decode": self._decode.lower(params, state, numbers(layout.sequences), queries, key),
      "compact": self._compact.lower(state, sequences, prefix_slots),
    }


def _without_patches(prompt: Prompt) -> Prompt:
  """Drops the patches of prompts that have visual tokens, which are then not read again."""
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
  """Returns a cached `Sampler`: equal arguments share one, with its compiled programs."""
  leaves, treedef = jax.tree.flatten(param_shardings)
  return cast(Any, _cached)(
    model, mesh, sampling, treedef, tuple(leaves), tuple(sorted(options.items()))
  )


def with_text(rollout: Rollout, processor: "Processor") -> Rollout:
  """Decodes the tokens on the host. Returns the rollout with `text`, nested lists [P][G]."""
  text = texts_of(np.asarray(rollout.tokens), np.asarray(rollout.mask), processor)
  return dataclasses.replace(rollout, text=text)


def texts_of(tokens: np.ndarray, mask: np.ndarray, processor: "Processor") -> list[list[str]]:
  """Decodes each response of tokens [P, G, T] to text [P][G], without special tokens."""
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
  """Generates G responses for each prompt.

  Args:
    model, params: as `load_pretrained` returns them. The responses are computed on the mesh or
      device that holds the parameters.
    prompt: P prompts. On a mesh, P is a multiple of `parallel.rows(mesh)`.
    sampling: sampling parameters.
    key: key of `jax.random`; may be None at temperature 0.
    processor: as `load_pretrained` returns it. Without it, `rollout.text` is None.

  Returns:
    Rollout with tokens, mask, logp [P, G, T] on the host and text [P][G].

  Raises:
    ValueError: `key` is None and the temperature is not 0.
  """
  if key is None:
    if sampling.temperature > 0:
      raise ValueError("generate: a key is needed unless sampling.temperature=0")
    key = jax.random.key(0)
  shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
  meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
  if meshes:
    mesh = cast(Mesh, meshes[0])
  else:
    device = next(
      (min(s.device_set, key=lambda d: d.id) for s in shardings if s is not None), jax.devices()[0]
    )
    mesh = parallel.make_mesh({"fsdp": 1, "tensor": 1}, [device])
  param_shardings = parallel.param_shardings(mesh, params, model.config.rules)
  rollout = make_sampler(model, mesh, sampling, param_shardings)(
    params, parallel.put_batch(mesh, prompt), key
  )
  return rollout if processor is None else with_text(rollout, processor)
