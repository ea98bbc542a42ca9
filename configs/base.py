"""Every field of a run, with its default. Recipes in this folder change a few of them.

A stage is one entry of `config.stages`; `sft()` and `rl()` below give entries with all fields
set. On the command line: --config.seed=1 --config.stages[0].objective.name=vppo
"""

from ml_collections import ConfigDict, config_dict


def model() -> ConfigDict:
  c = ConfigDict()
  # Hugging Face directory: config.json, *.safetensors, tokenizer, preprocessor_config.json.
  c.path = ""
  # An untrained model made on the spot instead of `path` (see jaxrl_vlm/scratch.py); {} for none.
  c.scratch = ConfigDict()
  # Sizes between which images are scaled, in pixels; 0: as the directory says.
  c.min_pixels = 0
  c.max_pixels = 0
  # Of activations: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
  c.dtype = "auto"
  # Kernels of attention: "splash" (Pallas, on TPU), "cudnn" (on NVIDIA GPUs, in bfloat16), "xla"
  # (none), or "auto": the one that the devices of the mesh can have. Decoding is always "xla".
  c.attention = "auto"
  # Of parameters that train, and of optimizer state.
  c.param_dtype = "float32"
  # Patterns of the parameters that train: ("decoder",), ("!vision",), ("decoder", "head"),
  # ("vision/merger",), ("lora",); names of levels as in jaxrl_vlm/models/patterns.py, the top ones
  # being vision, embed, decoder and head. () is everything or, with LoRA, the adapters. Gradients
  # and optimizer state exist only for what trains; the rest lies in `dtype`.
  c.trainable = ()
  # Adapters (LoRA), saved both folded into the model and as a PEFT directory.
  c.lora = ConfigDict()
  c.lora.rank = 0  # 0 for none
  c.lora.alpha = 32.0  # an adapter's output is scaled by alpha / rank
  # Patterns of the linear layers that get one. All of the decoder: ("decoder",); also of the vision
  # tower and its merger: ("decoder", "vision"); the tower's layers: ("vision/blocks*",); only some:
  # ("layers/q", "layers/v"), ("decoder", "!mlp"). Experts of a mixture and their router never get
  # one, nor embeddings.
  c.lora.targets = ("decoder",)
  # A PEFT directory of this rank, alpha and targets to continue from; "" starts new adapters.
  c.lora.path = ""
  # What layers compute again in the backward pass instead of keeping it: "none"; "dots": all but
  # matrix products and attention, a third of the memory at little cost; "full": everything, least
  # memory, a third more compute.
  c.remat = "dots"
  return c


def data() -> ConfigDict:
  c = ConfigDict()
  # "digit_boards", another TFDS dataset, or the path of a JSON-lines file.
  c.name = ""
  # Further settings of the source (for digit_boards: tasks, style, size ...).
  c.options = ConfigDict()
  # Where prepared datasets are kept; "" is ~/.cache/jaxrl_vlm (or $JAXRL_VLM_CACHE).
  c.dir = ""
  return c


def optimizer() -> ConfigDict:
  c = ConfigDict()
  c.learning_rate = 1e-6  # the peak
  c.schedule = "constant"  # after the warm-up: "constant", "linear" or "cosine" (to zero)
  c.warmup_steps = 0  # updates from 0 to the peak
  c.b1 = 0.9  # AdamW
  c.b2 = 0.999
  c.weight_decay = 0.01  # decoupled, times the learning rate
  c.clip_norm = 1.0  # global gradient norm
  # Of AdamW: "float32"; "bfloat16", half the memory, rounded up or down at random so that small
  # changes add up; "host": float32 in the hosts' memory, which every update fetches, when
  # there is little else on the devices, and returns.
  c.moments = "float32"
  return c


def evaluation() -> ConfigDict:
  c = ConfigDict()
  c.examples = 0  # held-out questions of an evaluation; 0 evaluates nothing
  c.every = 0  # steps between evaluations; 0 is only before the first and after the last step
  c.batch = 128  # questions at a time
  c.samples = 1  # answers to each; accuracy is the mean over them (avg@k)
  c.temperature = 0.0  # of these answers; 0 is greedy
  c.options = ConfigDict()  # of the stage's data.options, those that are others here
  return c


def _common(kind: str) -> ConfigDict:
  c = ConfigDict()
  c.kind = kind  # "sft" or "rl"
  c.steps = 0  # at least 1; of RL: rollouts
  c.prompts_per_step = 0  # P; a multiple of mesh.slice x mesh.fsdp x microbatches x minibatches
  c.max_tokens = 256  # T, the most tokens of a response
  c.data = data()
  c.optimizer = optimizer()
  c.microbatches = 1  # gradient accumulation: parts in which a minibatch passes through the model
  c.objective = ConfigDict()  # name, and fields of that objective: jaxrl_vlm/objectives
  c.eval = evaluation()
  # Verifiers and their weights in the reward; a sample may bring its own. Evaluations use them.
  # Names: math, exact, number, choice, format, or a function: "package.module:function",
  # "path/to/file.py:function".
  c.rewards = ConfigDict(allow_dotted_keys=True)
  c.accuracy = ""  # the verifier whose value is called accuracy; "" is the first of `rewards`
  return c


def sft() -> ConfigDict:
  """A supervised stage: imitates each example's `target`."""
  c = _common("sft")
  c.objective.name = "sft"
  c.optimizer.learning_rate = 1e-5
  return c


def rl() -> ConfigDict:
  """A reinforcement-learning stage: P prompts x G samples a step, graded, then updated."""
  c = _common("rl")
  # "grpo", "dapo", "gspo", "papo", "vppo" ...; further fields of this dictionary override the
  # objective's own (objective.clip_high=0.28). All names, fields and metrics: docs/objectives.md.
  c.objective.name = "grpo"
  c.num_samples = 8  # G
  c.temperature = 1.0  # of sampling and of the scored log-probabilities; 0 is greedy
  c.top_p = 1.0  # the likeliest tokens that together have this probability; 1 keeps all
  c.top_k = 0  # 0 keeps all
  c.minibatches = 1  # updates per rollout; P must be a multiple
  # Response tokens that pass through the model together on each device, in scores and update: with
  # more, weights that are split over fsdp are gathered less often; with fewer it needs less memory.
  c.part_tokens = 4096
  # Response tokens to generate, those that dynamic sampling throws away included: the stage ends
  # with the step that reaches this number, if it has not done all steps before; 0 sets no limit.
  c.token_budget = 0
  return c


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of sampling, masks, the order of the data and a scratch model
  c.model = model()
  # Devices: prompts and parameters are split over fsdp, heads and vocabulary over tensor, prompts
  # alone over slice (TPU slices that a slower network connects); -1 is whatever is left.
  c.mesh = ConfigDict({"slice": 1, "fsdp": -1, "tensor": 1})
  # Over which axes of the mesh each axis of the parameters is split, as far as they divide it
  # evenly: the vocabulary, heads and hidden units, and the width of the residual stream.
  c.sharding = ConfigDict({"vocab": ("fsdp", "tensor"), "hidden": ("tensor",), "width": ("fsdp",)})
  # GiB of a device's memory by which rollouts and updates are planned; 0: as much as it says it has
  # (on CPU: the machine).
  c.device_memory = 0.0
  # Padded sizes, one compilation each: prompt tokens and image patches of a row.
  c.prompt_buckets = (256, 512, 1024, 2048, 4096)
  c.patch_buckets = (256, 1024, 4096, 16384)
  c.system_prompt = ""  # "" for none
  c.rollout = ConfigDict()
  c.rollout.chunk = 32  # tokens of each response between two looks at which of them have ended
  # Prompts (with all their samples) that are decoded at once, on all devices together; those that
  # have ended make room for others. 0: all of a step, or as many as the memory of a device holds.
  c.rollout.groups = 0
  # Devices that share the weights while responses are drawn. 0: the layout of training, in which
  # weights that are split over fsdp are gathered for every token. Otherwise each of so many has its
  # part of all heads, hidden units and vocabulary in the dtype of activations, besides what it has
  # for training, and prompts are split over the others: far faster, where there is room.
  c.rollout.tensor = 0
  # Of the prompts' keys and values while responses are drawn: "auto", as activations, or "int8":
  # half the memory of bfloat16, at a little error in the drawn distribution (metric
  # sampler_logp_difference), which objective.correction makes up for.
  c.rollout.prefix_dtype = "auto"
  # "synchronous", or "one_step_off": the responses of a step are drawn before the update of the
  # step ahead of it, so that nothing waits for graders. They are then of the policy one update
  # earlier, for which objective.correction makes up (it is "tis" there unless it is set). The step
  # after a checkpoint draws its own.
  c.pipeline = "synchronous"
  # What is done, in order: a tuple of sft() and rl().
  c.stages = config_dict.placeholder(tuple)
  c.stages = ()
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 50  # steps
  c.checkpoint.keep = 2  # the last k; the best by held-out accuracy is kept besides
  c.reward_workers = 2  # processes that grade
  c.reward_timeout = 2.0  # seconds for one answer; then its reward is 0
  c.max_bad_steps = 5  # updates with a NaN or infinite loss in a row before the run stops
  c.log_every = 1  # steps between lines of metrics
  c.rollouts_every = 10  # steps between samples kept for the report
  c.rollouts_kept = 4  # prompts kept each time
  return c
