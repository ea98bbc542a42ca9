"""All config fields of a run, with their defaults. The other configs change some of them.

`get_config()` returns a config with all fields of a run, but without stages. A stage trains the
model on one dataset with one objective. `sft()` (supervised) and `rl()` (reinforcement learning)
return a stage with all its fields. Set `config.stages` to a tuple of stages.

Every field is also a command-line flag:
--config.seed=1 --config.stages[0].objective.name=vppo

docs/glossary.md explains the terms, and docs/performance.md explains which fields change speed and
memory.
"""

from ml_collections import ConfigDict, config_dict


def model() -> ConfigDict:
  c = ConfigDict()
  # Hugging Face model directory: config.json, *.safetensors, tokenizer and
  # preprocessor_config.json.
  c.path = ""
  # Architecture of a new model with random weights, used instead of `path`. jaxrl_vlm/scratch.py
  # lists the fields. The default {} loads `path`.
  c.scratch = ConfigDict()
  # Minimum and maximum image area in pixels (height x width). Images outside this range are
  # resized. 0 keeps the setting of the checkpoint. Lower `max_pixels` to get fewer image patches.
  # Gemma 3 resizes every image to one fixed size, so both must be 0.
  c.min_pixels = 0
  c.max_pixels = 0
  # Dtype of activations: "float32", "bfloat16", or "auto": bfloat16 on accelerators and float32 on
  # CPU. Frozen parameters are stored in this dtype too.
  c.dtype = "auto"
  # Attention kernel: "splash" (Pallas kernel for TPUs), "cudnn" (NVIDIA GPUs of compute capability
  # 8.0 or more, with bfloat16) or "xla" (no kernel). "auto" selects the kernel that the devices and
  # the model support, or "xla" if there is none. Decoding always uses "xla".
  c.attention = "auto"
  # Dtype of trained parameters and of their optimizer state: "float32" or "bfloat16".
  c.param_dtype = "float32"
  # Patterns that select the parameters to train. The default () trains everything or, with LoRA,
  # only the adapters. Gradients and optimizer state exist only for trained parameters.
  # Examples: ("decoder",), ("!vision",) for all but the vision tower, ("decoder", "head"),
  # ("vision/merger",), ("lora",). A pattern names levels of the parameter tree, whose top levels
  # are vision, embed, decoder and head. jaxrl_vlm/models/patterns.py defines the syntax.
  c.trainable = ()

  # LoRA adapters. The run saves the model with the adapters merged into its weights. If only
  # adapters were trained, it also saves them as a PEFT directory.
  c.lora = ConfigDict()
  # Rank of the adapters. 0 adds no adapters.
  c.lora.rank = 0
  # The output of an adapter is multiplied by alpha / rank.
  c.lora.alpha = 32.0
  # Patterns that select the linear layers that get an adapter. The default selects all of the
  # decoder. Other examples: ("decoder", "vision") also selects the vision tower and its merger,
  # ("vision/blocks*",) the layers of the vision tower, ("layers/q", "layers/v") some projections,
  # ("decoder", "!mlp") the decoder without its MLPs. Embeddings, experts and the router of a
  # mixture of experts never get an adapter.
  c.lora.targets = ("decoder",)
  # PEFT directory with adapters to start from. Its rank, alpha and targets must equal the fields
  # above. The default "" starts with new adapters.
  c.lora.path = ""

  # Which activations the backward pass recomputes instead of storing them (gradient checkpointing):
  # "none": nothing is recomputed; needs the most memory.
  # "dots": everything except the results of matrix products and attention.
  # "full": everything except the input of each layer, which adds about one forward pass; needs the
  #   least memory. Use it if "dots" does not fit.
  c.remat = "dots"
  return c


def data() -> ConfigDict:
  c = ConfigDict()
  # "digit_boards", the name of a TFDS dataset, or the path of a JSON-lines file. In a path, {split}
  # stands for train or test.
  c.name = ""
  # Options of the dataset, for example tasks, style and slips of digit_boards. OPTIONS in
  # jaxrl_vlm/data/sources.py lists the options of each kind of dataset.
  c.options = ConfigDict()
  # Directory of prepared TFDS datasets. With the default "", digit_boards uses $JAXRL_VLM_CACHE or
  # ~/.cache/jaxrl_vlm, and other datasets use the default directory of TFDS.
  c.dir = ""
  return c


def optimizer() -> ConfigDict:
  """AdamW with global-norm gradient clipping."""
  c = ConfigDict()
  # Peak learning rate.
  c.learning_rate = 1e-6
  # Schedule after the warmup: "constant", or "linear" or "cosine" decay to 0 at the end of the
  # stage.
  c.schedule = "constant"
  # Number of updates in which the learning rate increases linearly to its peak.
  c.warmup_steps = 0
  # AdamW coefficients of the running averages of the gradient and of its square.
  c.b1 = 0.9
  c.b2 = 0.999
  # Decoupled weight decay of all trained parameters, multiplied by the learning rate.
  c.weight_decay = 0.01
  # Maximum global norm of the gradient. Larger gradients are scaled down to it.
  c.clip_norm = 1.0
  # How the two AdamW moments are stored:
  # "float32": in the memory of the devices.
  # "bfloat16": half the memory, with stochastic rounding so that small changes accumulate.
  # "host": in float32 in host memory. Each update copies them to the devices when the gradient is
  #   complete, and back afterwards.
  c.moments = "float32"
  return c


def evaluation() -> ConfigDict:
  """Evaluation of a stage on held-out questions, before its first and after its last step."""
  c = ConfigDict()
  # Number of held-out questions. 0 disables evaluation.
  c.examples = 0
  # Number of steps between further evaluations. 0 evaluates only before the first and after the
  # last step.
  c.every = 0
  # Number of questions that are answered together. Must be a multiple of mesh.slice x mesh.fsdp.
  c.batch = 128
  # Number of answers to each question. The accuracy is their mean (avg@k).
  c.samples = 1
  # Sampling temperature of the answers. 0 is greedy decoding, which requires samples = 1.
  c.temperature = 0.0
  # Overrides of the stage's `data.options` for evaluation.
  c.options = ConfigDict()
  return c


def _common(kind: str) -> ConfigDict:
  c = ConfigDict()
  # "sft" or "rl".
  c.kind = kind
  # Number of steps, at least 1. A step of an RL stage is one rollout followed by `minibatches`
  # updates, a step of a supervised stage is one update.
  c.steps = 0
  # Number of prompts per step (P), over all devices. Must be a multiple of
  # minibatches x microbatches x mesh.slice x mesh.fsdp.
  c.prompts_per_step = 0
  # Maximum length of a response in tokens (T), including the end token.
  c.max_tokens = 256
  c.data = data()
  c.optimizer = optimizer()
  # Number of pieces of a minibatch whose gradients are accumulated (gradient accumulation). If an
  # update does not fit into memory, increase it. The result stays the same except for rounding.
  c.microbatches = 1
  # `name` of the objective, and values of its fields. docs/objectives.md lists both.
  c.objective = ConfigDict()
  c.eval = evaluation()
  # Verifiers (reward functions) and their weights, for example {"math": 0.9, "format": 0.1}. The
  # reward is the weighted sum of their values. Training and evaluation use it. The built-in
  # verifiers are math, exact, number, choice and format. To use a function of your own, write
  # "package.module:function" or "path/to/file.py:function". An example of the dataset can replace
  # the verifiers and weights by its own `rewards`.
  c.rewards = ConfigDict(allow_dotted_keys=True)
  # Verifier whose value is reported as accuracy. The default "" is the first one of `rewards`.
  c.accuracy = ""
  return c


def sft() -> ConfigDict:
  """Returns a supervised stage, which trains the model on the `target` of each example."""
  c = _common("sft")
  c.objective.name = "sft"
  c.optimizer.learning_rate = 1e-5
  return c


def rl() -> ConfigDict:
  """Returns a reinforcement-learning stage.

  Each step samples G responses for each of P prompts, grades them, and updates the model.
  """
  c = _common("rl")
  # Name of the objective: "grpo", "dapo", "gspo", "papo", "vppo" ... All other entries of this
  # dictionary are fields of the objective, for example objective.clip_high=0.28.
  # docs/objectives.md lists all names, fields and metrics.
  c.objective.name = "grpo"
  # Number of responses per prompt (G).
  c.num_samples = 8
  # Sampling temperature. Scores (log-probabilities and entropies) are computed at the same
  # temperature. With 0, decoding is greedy, and scores are computed at temperature 1.
  c.temperature = 1.0
  # Nucleus sampling: samples from the smallest set of most likely tokens whose probabilities sum to
  # at least this value. 1 keeps all tokens.
  c.top_p = 1.0
  # Samples from this many of the most likely tokens. 0 keeps all tokens.
  c.top_k = 0
  # Number of updates per rollout. Each update uses P / minibatches prompts.
  c.minibatches = 1
  # Number of response tokens that pass through the model together on each device, in scores and
  # updates. With a larger value, weights that are sharded over fsdp are gathered less often. With a
  # smaller value, less memory is needed.
  c.part_tokens = 4096
  # Number of response tokens that the stage generates, including those of groups that dynamic
  # sampling discards. The stage ends after the step that reaches this number, or after `steps`
  # steps. 0 sets no limit.
  c.token_budget = 0
  return c


def get_config() -> ConfigDict:
  c = ConfigDict()
  # Seed of sampling, of image masks, of the order of the data, and of new parameters (LoRA
  # adapters, or a model from `model.scratch`).
  c.seed = 0
  c.model = model()
  # Number of devices along each mesh axis. One of the numbers may be -1: this axis gets all
  # remaining devices.
  # `slice`: TPU slices that are connected by a slower network. It shards prompts only.
  # `fsdp`: shards prompts and parameters.
  # `tensor`: shards heads, hidden units and vocabulary.
  c.mesh = ConfigDict({"slice": 1, "fsdp": -1, "tensor": 1})
  # Mesh axes that shard each kind of parameter axis: `vocab` (the vocabulary), `hidden` (heads and
  # hidden units) and `width` (the hidden size of the model). A mesh axis that does not divide a
  # parameter axis evenly does not shard it.
  c.sharding = ConfigDict({"vocab": ("fsdp", "tensor"), "hidden": ("tensor",), "width": ("fsdp",)})
  # Memory of a device in GiB. Rollouts and updates are planned to fill at most 90% of it. 0 uses
  # the value that the device reports (on CPU, the memory of the machine divided by the number of
  # CPU devices). Set a smaller value if other programs use the device.
  c.device_memory = 0.0
  # Sizes to which prompts (in tokens) and their images (in patches) are padded. The programs are
  # compiled for each size. A prompt or an image that is larger than the largest size is an error.
  c.prompt_buckets = (256, 512, 1024, 2048, 4096)
  c.patch_buckets = (256, 1024, 4096, 16384)
  # System prompt of every conversation. "" adds none.
  c.system_prompt = ""

  c.rollout = ConfigDict()
  # Number of tokens that the device generates for each response before the host checks which
  # responses have ended. With a small value, the place of an ended response in the batch is reused
  # earlier. With a large value, the device waits for the host less often.
  c.rollout.chunk = 32
  # Number of prompts, each with all its samples, that are decoded at once, over all devices. When
  # the responses to a prompt have ended, a waiting prompt takes its place. 0 decodes all prompts of
  # a step at once, or as many as fit into device memory.
  c.rollout.groups = 0
  # Number of devices that share the weights during rollouts. 0 uses the sharding of training, in
  # which weights that are sharded over fsdp are gathered for every token. Another value must be a
  # multiple of mesh.tensor and divide the number of devices of a slice. The weights are then copied
  # before each rollout: in addition to its training weights, each device stores its shard of all
  # heads, hidden units and vocabulary in the dtype of activations. Prompts are sharded over the
  # other mesh axes.
  c.rollout.tensor = 0
  # Dtype of the keys and values of prompts during rollouts: "auto" (the dtype of activations) or
  # "int8" (about half the memory of bfloat16). Rounding to int8 changes the distribution that
  # responses are sampled from. The metric objective/sampler_logp_difference shows by how much, and
  # objective.correction corrects for it.
  c.rollout.prefix_dtype = "auto"

  # "synchronous": a step updates the policy that generated its responses.
  # "one_step_off": the responses of the next step are generated before the update of the current
  #   step, so that the device does not wait for rewards. These responses come from the policy
  #   before the update. objective.correction corrects for this, and its default is then "tis". The
  #   step after a checkpoint generates its own responses.
  c.pipeline = "synchronous"
  # The stages of the run, in order: a tuple of sft() and rl().
  c.stages = config_dict.placeholder(tuple)
  c.stages = ()

  c.checkpoint = ConfigDict()
  # Number of steps between checkpoints, counted over all stages. The last step of a stage is always
  # saved.
  c.checkpoint.every = 50
  # Number of latest checkpoints to keep. The checkpoint with the best held-out accuracy is kept in
  # addition.
  c.checkpoint.keep = 2
  # Number of worker processes that grade responses, for each process of the run.
  c.reward_workers = 2
  # Time limit for grading one response, in seconds, over all its verifiers. A response that exceeds
  # it gets reward 0.
  c.reward_timeout = 2.0
  # Number of consecutive updates with a NaN or infinite loss or gradient after which the run stops.
  # Such updates change no parameters.
  c.max_bad_steps = 5
  # Number of steps between two printed lines of metrics, if the output is not a terminal.
  # metrics.jsonl and TensorBoard always contain every step.
  c.log_every = 1
  # Number of steps between two steps whose responses are saved for the report. The responses of the
  # first and of the last step of an RL stage are always saved.
  c.rollouts_every = 10
  # Number of prompts, each with all its samples, that are saved in such a step.
  c.rollouts_kept = 4
  return c
