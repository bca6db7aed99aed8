"""Who is measured, and all that a number said of it depends on: what evaluations are named and kept by."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import unisd_jax.kernels
from unisd_jax.config import Config, to_dict
from unisd_jax.data.chat import load_chat
from unisd_jax.data.pipeline import Example
from unisd_jax.errors import ConfigError
from unisd_jax.eval.scores import Network
from unisd_jax.experiment import Experiment, new_state, student_params
from unisd_jax.inputs import load_model
from unisd_jax.models import local_checkpoint
from unisd_jax.rollout import JaxSampler, RolloutEngine, Sampling
from unisd_jax.teacher.cache import text_hash
from unisd_jax.teacher.weights_hash import adapter_hash, weights_hash

FORMAT = 1
Identity = dict[str, Any]

_PACKAGE = Path(__file__).parent
# The code that numbers come from, below the package: a mended mistake must not be served from what was kept before.
_GENERATING = (
    "rollout/**/*.py",
    "models/*.py",
    "eval/generation.py",
    "eval/batches.py",
    "data/batching.py",
    "random.py",
)
_SCORING = ("models/*.py", "eval/scores.py", "eval/batches.py", "data/batching.py")
_GRADING = ("data/tasks/*.py", "data/chat.py", "sandbox*.py", "eval/*.py", "measure.py", "measured.py", "evaluate.py")
_MEASURED = ("retries", "retry_temperature", "option_likelihood", "score_stop")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, the engine that generates with it, and `identity`: what its weights are, wherever they lie."""

    network: Network
    engine: RolloutEngine
    identity: Identity


def adapted_and_base(experiment: Experiment) -> tuple[Subject, Subject | None]:
    """The checkpoint to be measured and the one it was trained from, where that is known.

    Raises:
      ConfigError: `measure.base` has another vocabulary, tokenizer or chat template.
      UserError: a checkpoint cannot be read.
    """
    config, adapter = experiment.config, experiment.config.model.lora.start
    own, base = base_subject(experiment), None
    if adapter is not None:
        base = own
        network = Network(experiment.model, student_params(experiment, new_state(experiment)))
        identity = base.identity | {"adapter": adapter_hash(adapter, config.teacher.cache_dir)}
        own = Subject(network, experiment.sampler, identity)
    if config.measure.base is not None:
        base = _other(experiment, config.measure.base)
    return own, base


def base_subject(experiment: Experiment) -> Subject:
    """The checkpoint `model.path` as it is, without an adapter."""
    identity = _weights(experiment.config, experiment.checkpoint)
    return Subject(Network(experiment.model, experiment.base), experiment.sampler, identity)


def sampling_of(experiment: Experiment) -> Sampling:
    """How the replies of an evaluation are sampled."""
    options, chat = experiment.config.measure, experiment.chat
    return Sampling(
        experiment.config.evaluation.max_completion_length, chat.stop_ids, chat.pad_id, options.temperature,
        options.top_p, options.top_k, options.min_p, chat.vocab_size,
    )  # fmt: skip


def generation_identity(experiment: Experiment, subject: Subject) -> Identity:
    """All that the replies of a checkpoint depend on, the code that generates them included."""
    config, options = experiment.config, experiment.config.measure
    return {
        "format": FORMAT,
        **subject.identity,
        **_computing(experiment, subject),
        "engine": _engine(config, subject),
        "chat": experiment.chat.identity(),
        "prompts": text_hash([int(token) for token in example.student] for example in experiment.test),
        "sampling": dataclasses.asdict(sampling_of(experiment)),
        "samples": options.samples,
        "seed": config.seed if options.temperature > 0 else None,
        "code": _code_hash(_GENERATING),
    }


def distance_identity(experiment: Experiment, subject: Subject, base: Subject, replies_of: Subject) -> Identity:
    """All that the distances of two checkpoints on the replies of one of them depend on."""
    return {
        "replies": generation_identity(experiment, replies_of),
        "adapted": subject.identity,
        "base": base.identity,
        "score_stop": experiment.config.measure.score_stop,
        "head": dataclasses.asdict(experiment.config.head),
        "code": _code_hash(_SCORING) + _kernel_hash(),
    }


def result_identity(experiment: Experiment, subject: Subject, base: Subject | None) -> Identity:
    """All that the numbers of an evaluation depend on, the code that grades included."""
    config = experiment.config
    task = Path(config.data.task)
    own = [task] if task.suffix == ".py" else []
    return {
        "generation": generation_identity(experiment, subject),
        "scores": None if base is None else distance_identity(experiment, subject, base, base),
        "seed": config.seed,
        "items": text_hash([example.item.id, item_hash(example)] for example in experiment.test),
        "form": to_dict(config)["data"]["form"],
        "measure": {name: getattr(config.measure, name) for name in _MEASURED},
        "head": dataclasses.asdict(config.head),
        "graders": text_hash(path.read_text(encoding="utf-8") for path in own) + _code_hash(_GRADING),
        "scoring": _code_hash(_SCORING) + _kernel_hash(),
    }


def item_hash(example: Example) -> str:
    """16 digits that tell items apart by all that is asked, shown and graded, hidden tests included.

    Raises:
      ConfigError: the details hold what has no text that is the same in every process.
    """
    item = example.item
    parts = [list(map(dict, item.earlier)), item.prompt, item.completion, item.answer, dict(item.details)]
    try:
        text = json.dumps(parts, sort_keys=True, default=_plain)
    except TypeError as error:
        raise ConfigError(
            f"{item.id}: its details cannot be told from others ({error}): keep JSON values there"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What JSON does not know, in a form that is the same in every process."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__}")


def _engine(config: Config, subject: Subject) -> str:
    """Who generates; a server may compute in another type than the trainer."""
    name = type(subject.engine).__name__
    options = config.rollout.vllm
    return " ".join([name, options.dtype, *options.arguments]) if name == "VllmEngine" else name


def _computing(experiment: Experiment, subject: Subject) -> Identity:
    """What decides how numbers are rounded, so that one evaluation is not made by two kinds of machine."""
    config = experiment.config
    device = experiment.mesh.devices.flat[0]
    return {
        "dtype": config.model.dtype,
        "attention": subject.network.model.attention,
        "mesh": list(experiment.mesh.devices.shape),
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "batch_size": config.evaluation.batch_size,
        "length_multiple": config.data.length_multiple,
    }


def _other(experiment: Experiment, path: str) -> Subject:
    """The checkpoint of `measure.base`."""
    config = experiment.config
    checkpoint = local_checkpoint(path)
    model, params = load_model(config, checkpoint, experiment.mesh)
    chat = load_chat(checkpoint, stop=config.rollout.stop, head_rows=model.config.vocab_size)
    if chat.identity() != experiment.chat.identity() or model.config.vocab_size != experiment.model.config.vocab_size:
        raise ConfigError(
            f"measure.base: {path} has another vocabulary, tokenizer or chat template than {config.model.path}; "
            "expected the checkpoint that it was trained from"
        )
    # A vLLM server holds any weights of the architecture that it was started with.
    engine = experiment.sampler if model.config == experiment.model.config else JaxSampler(model)
    return Subject(Network(model, params), engine, _weights(config, checkpoint))


def _weights(config: Config, checkpoint: Path) -> Identity:
    return {"weights": weights_hash(checkpoint, config.teacher.cache_dir)}


@functools.cache
def _code_hash(patterns: tuple[str, ...]) -> str:
    return _hash_of(path for pattern in patterns for path in _PACKAGE.glob(pattern))


@functools.cache
def _kernel_hash() -> str:
    """Of the kernels, which may lie elsewhere."""
    return _hash_of(path for folder in unisd_jax.kernels.__path__ for path in Path(folder).rglob("*.py"))


def _hash_of(paths: Iterable[Path]) -> str:
    return text_hash(path.read_text(encoding="utf-8") for path in sorted(paths))[:16]
