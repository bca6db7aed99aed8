"""Every option of a run as frozen dataclasses; `configs/base.yaml` explains each one and its unit."""

from dataclasses import dataclass, field
from typing import Literal

from unisd_jax.config_modes import MODES
from unisd_jax.config_validation import LORA_TARGETS


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters: which projections, how wide."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    targets: tuple[str, ...] = LORA_TARGETS
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The checkpoint, its precision and which of its weights are trained."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    trainable: Literal["lora", "full"] = "lora"
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """How the task's prompts are written and which form of reply they ask for."""

    answer: Literal["free", "letter", "json"] = "free"
    reasoning: bool = True
    lecture: bool = True
    hint: bool = True
    option_seed: int = 42
    as_released: bool = False


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The task, where its rows are and how long a prompt may be."""

    task: str = "short_answers"
    source: Literal["auto", "hub", "tfds"] = "auto"
    path: str | None = None
    revision: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    train_path: str | None = None
    test_path: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    shuffle: bool = True
    max_prompt_length: int = 512
    overlong: Literal["drop", "error"] = "drop"
    length_multiple: int = 32
    length_buckets: int = 4
    form: FormOptions = field(default_factory=FormOptions)


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """The auxiliary views: the teacher beside other items' solved examples, or beside an induced instruction."""

    num_auxiliary_contexts: int = 0
    method: Literal["random", "retrieval", "induction"] = "random"
    demonstrations: int = 1
    pool: int = 10_000
    encoder: Literal["bm25", "minilm"] = "bm25"
    encoder_path: str = "all-MiniLM-L6-v2"
    induction_demonstrations: int = 3
    induction_instructions: int = 100
    induction_temperature: float = 0.7
    induction_max_length: int = 256
    as_released: bool = False


@dataclass(frozen=True, kw_only=True)
class NegativeOptions:
    """Where the wrong demonstration of the contrast comes from."""

    source: Literal["corruption", "model", "data"] = "corruption"
    per_item: int = 4
    attempts: int = 3
    temperature: float = 0.7
    max_length: int = 256
    min_coverage: float = 0.9


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What the teacher is shown, and how its weights follow the student."""

    condition: Literal["gold", "other", "self", "none"] = "gold"
    placement: Literal["turns", "inline"] = "inline"
    other_method: Literal["random", "retrieval"] = "random"
    self_samples: int = 4
    self_min_agreement: float = 0.5
    ema: bool = False
    ema_sync_steps: int = 10
    ema_decay: float = 0.9
    ema_adapters: bool = True
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    cache_dir: str = "runs/cache"
    contexts: ContextOptions = field(default_factory=ContextOptions)
    negatives: NegativeOptions = field(default_factory=NegativeOptions)


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """The ceiling of the token divergence: fixed, or a quantile of the batch."""

    token_clip: float | None = None
    token_clip_quantile: float | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Scoring the auxiliary views only where they are likely to matter."""

    share: float = 1.0
    unit: Literal["example", "token"] = "example"
    signal: Literal["entropy", "spread"] = "entropy"
    audit_steps: int = 50


@dataclass(frozen=True, kw_only=True)
class AgreementOptions:
    """Weights from the agreement of the auxiliary views."""

    level: Literal["none", "token", "sequence"] = "none"
    gamma_agreement: float = 1.0
    agreement_stat: Literal["var", "range"] = "var"
    agreement_quantile: float = 0.95
    agreement_cap: float = 10.0
    views_per_pass: int = 1
    budget: BudgetOptions = field(default_factory=BudgetOptions)


@dataclass(frozen=True, kw_only=True)
class ContrastOptions:
    """The hinge against a wrong demonstration."""

    contrastive_weight: float = 0.0
    contrastive_margin: float = 0.5


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """The distance of student and teacher in the final hidden states."""

    final_layer_distill_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """Truncated importance weights: student over sampler."""

    level: Literal["none", "token", "sequence"] = "none"
    cap: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The loss, its mechanisms and its denominator."""

    loss: Literal["divergence", "nll", "none"] = "divergence"
    alpha: float = 0.0
    entry_ceiling: float | None = None
    normalize: Literal["batch", "sequence", "upstream"] = "batch"
    num_loss_tokens_to_skip: int = 0
    top_entropy_quantile: float = 1.0
    clip: ClipOptions = field(default_factory=ClipOptions)
    agreement: AgreementOptions = field(default_factory=AgreementOptions)
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    matching: MatchingOptions = field(default_factory=MatchingOptions)
    importance: ImportanceOptions = field(default_factory=ImportanceOptions)


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Where the vLLM servers are, or how one is started, and how weights reach them."""

    addresses: tuple[str, ...] = ()
    python: str = ".venv-rollout/bin/python"
    host: str = "127.0.0.1"
    port: int | None = None
    devices: str | None = None
    dtype: Literal["model", "float32", "bfloat16"] = "model"
    max_sequences: int = 64
    max_length: int | None = None
    cache_gib: float = 4.0
    arguments: tuple[str, ...] = ()
    sync: Literal["weights", "adapter"] = "weights"
    sync_dir: str | None = None
    start_timeout: float = 600.0
    request_timeout: float = 600.0
    attempts: int = 4
    max_probe_gap: float | None = None
    take_over: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Where the completions come from, and how they are sampled."""

    engine: Literal["jax", "vllm"] = "jax"
    source: Literal["student", "base", "gold"] = "student"
    on_policy_share: float = 1.0
    max_completion_length: int = 1024
    min_completion_length: int = 0
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: Literal["all", "tokenizer"] = "all"
    mask_truncated_completions: bool = False
    max_sampler_gap: float = 0.1
    staleness: int = 0
    vllm: VllmOptions = field(default_factory=VllmOptions)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and the learning rate's course."""

    learning_rate: float = 2e-5
    warmup_ratio: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    zero_first_rate: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long, and how many examples at a time."""

    steps: int = 100
    batch_size: int = 16
    micro_batches: int = 1
    remat: Literal["none", "layer", "products"] = "none"
    compilation_cache: str | None = "runs/cache/compiled"


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How many devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """How the processes of a run on several hosts find each other."""

    coordinator: str = "auto"
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 120


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How scores are formed from hidden states without holding all logits."""

    implementation: Literal["auto", "chunked", "pallas_gpu", "pallas_triton", "pallas_tpu"] = "auto"
    chunk_size: int | None = None
    vocab_block: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation on the test items before, during and after training."""

    enabled: bool = True
    batch_size: int = 16
    max_completion_length: int = 1024
    drift_tokens: int = 64
    every: int = 0
    every_items: int = 64


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What `python -m unisd_jax.evaluate` measures beside the grades of one greedy reply."""

    base: str | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    retries: int = 0
    retry_temperature: float = 0.7
    option_likelihood: bool = False
    score_stop: bool = False


@dataclass(frozen=True, kw_only=True)
class ResourceOptions:
    """The constants of the estimate of energy and carbon."""

    device_watts: float | None = None
    utilization: float = 0.7
    pue: float = 1.2
    carbon_g_per_kwh: float = 475.0


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How often a checkpoint is written and how many are kept."""

    every: int = 50
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What is recorded beside the metrics."""

    samples: int = 8
    inert_after: int = 20
    wandb: bool = False
    wandb_project: str = "unisd_jax"
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    name: str = "run"
    output_dir: str = "runs"
    seed: int = 0
    mode: Literal[*MODES] = "plain"
    preset: Literal["none", "command", "launcher"] = "none"
    parity: Literal["none", "upstream"] = "none"
    model: ModelOptions
    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    resources: ResourceOptions = field(default_factory=ResourceOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
