"""From what is asked for to the jobs that it takes: caches, training, evaluation, cross-evaluation, report."""

import dataclasses
import glob
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisd_jax.config import Config, config_hash, load_config, to_dict, to_yaml, validate
from unisd_jax.config_loading import flatten
from unisd_jax.config_modes import mechanisms
from unisd_jax.data.tasks import get_task
from unisd_jax.errors import ConfigError
from unisd_jax.experiments import recipes
from unisd_jax.experiments.jobs import Job

# A model trained on one task is also measured on its harder sibling.
CROSS = {"scienceqa": "gpqa", "mbpp": "humaneval"}
# Options that belong to the rows of one task.
OF_ONE_TASK = ("train_split", "test_split", "train_path", "test_path", "revision")
# Memory of a run before one was measured: of the programs, and as a multiple of the weights' files.
BASE_GIB, TIMES_WEIGHTS = 2.0, 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; an empty list of models, tasks or seeds stands for what the configuration says."""

    experiments: tuple[str, ...]
    output_dir: str
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    bases: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    views: tuple[int, ...] = recipes.VIEWS
    gammas: tuple[float, ...] = recipes.GAMMAS
    evaluate: bool = True


def plan(request: Request, repository: Path) -> list[Job]:
    """All jobs in an order in which they can run; equal ones of several experiments once.

    Raises:
      ConfigError: options that contradict each other, or a combination that cannot be run.
    """
    composed = list(_composed(request, repository))
    jobs: dict[str, Job] = {}
    for model, task, seed in itertools.product(request.models, request.tasks, request.seeds):
        for experiment, config in composed:
            config = _chosen(config, model, task, seed)
            _check_rows(config, len(request.tasks))
            for job in _jobs_of_run(config, request, repository):
                known = jobs.get(job.name, job).experiments
                jobs[job.name] = dataclasses.replace(job, experiments=tuple(dict.fromkeys((*known, experiment))))
    order = {"cache": 0, "train": 1, "evaluate": 2}
    found = sorted(jobs.values(), key=lambda job: order[job.kind])
    script = repository / "scripts" / "make_report.py"
    return [*found, _report(request, script, found)] if script.exists() else found


def completed(request: Request, repository: Path) -> Request:
    """The request with models, tasks and seeds from the configuration where it names none.

    Raises:
      ConfigError: there is no such configuration, or it names no model.
    """
    experiment = request.experiments[0]
    start = recipes.OF_MODES.get(experiment, ("unisd_star",))[0]
    start = "agreement_tok_retrieval" if experiment == "sensitivity" else start
    config = _compose(request, repository, recipes.Recipe(start, start))
    return dataclasses.replace(
        request,
        models=request.models or (config.model.path,),
        tasks=request.tasks or (config.data.task,),
        seeds=request.seeds or (config.seed,),
    )


def _composed(request: Request, repository: Path) -> Iterator[tuple[str, Config]]:
    """(experiment, configuration) of every run of the first model, task and seed."""
    for experiment in request.experiments:
        if experiment == "ablation":
            full = _compose(request, repository, recipes.Recipe("unisd_star", "unisd_star"))
            found = recipes.ablation(full)
        elif experiment == "sensitivity":
            found = recipes.sensitivity(request.views, request.gammas)
            _refuse_overrides(request, experiment, found[0].options)
        else:
            found = recipes.of_modes(experiment)
        for recipe in found:
            yield experiment, _compose(request, repository, recipe)


def _refuse_overrides(request: Request, experiment: str, options: Mapping[str, Any]) -> None:
    for option in options:
        if any(word.startswith(f"--{option}=") for word in request.overrides):
            raise ConfigError(f"{experiment} sets {option} itself: leave that out, or give --views and --gammas")


def _compose(request: Request, repository: Path, recipe: recipes.Recipe) -> Config:
    """The mode's file, then the common ones, then what was typed, then the recipe's own options."""
    files = [repository / "configs" / "modes" / f"{recipe.start}.yaml", *map(Path, request.bases)]
    own = {"mode": recipe.mode} | dict(recipe.options)
    own |= {"model.path": request.models[0]} if request.models else {}
    words = [f"--{name}={json.dumps(value)}" for name, value in own.items()]
    try:
        return load_config(files, [*request.overrides, *words])
    except ConfigError as error:
        common = f" with --config {' '.join(request.bases)}" if request.bases else ""
        raise ConfigError(f"{recipe.mode}{common}: {error}") from None


def _chosen(config: Config, model: str, task: str, seed: int) -> Config:
    found = dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, path=model),
        data=dataclasses.replace(config.data, task=task),
    )
    validate(found)
    return found


def _check_rows(config: Config, tasks: int) -> None:
    for name in OF_ONE_TASK:
        value = getattr(config.data, name)
        if tasks > 1 and value is not None:
            raise ConfigError(f"data.{name} is {value}, the rows of one task, but --tasks names {tasks}; use data.path")


def _jobs_of_run(config: Config, request: Request, repository: Path) -> Iterator[Job]:
    """The caches, the training and the evaluations of one run."""
    config = dataclasses.replace(config, name=run_name(config), output_dir=request.output_dir)
    caches = list(_caches(config, request, repository))
    yield from caches
    run_dir, key = Path(request.output_dir) / config.name, config_hash(config)
    train = Job(
        kind="train",
        name=config.name,
        key=key,
        needs=tuple(cache.name for cache in caches),
        outputs=(_pattern(run_dir, "result.json"),),
        **_common(config, request, config.name, "-m", "unisd_jax.train"),
    )
    yield train
    if not request.evaluate:
        return
    for task in (config.data.task, CROSS.get(config.data.task)):
        if task is not None:
            yield _evaluation(config, request, train, run_dir, task)


def _caches(config: Config, request: Request, repository: Path) -> Iterator[Job]:
    """What is made once for several runs. Contexts by retrieval or chance take seconds and are made by each."""
    values = flatten(to_dict(config))
    on, negatives = mechanisms(values), config.teacher.negatives
    by_model = ("model.path", "model.dtype", "rollout.stop")
    shared = ("data.", "seed", "teacher.cache_dir")
    if on["agreement"] and config.teacher.contexts.method == "induction":
        names = (*shared, *by_model, "teacher.contexts.num_auxiliary_contexts", "teacher.contexts.induction_")
        yield _cache("contexts", names, values, config, request, repository, device=True)
    if on["contrast"] and negatives.source != "data":
        writes = negatives.source == "model"
        names = (*shared, *(by_model if writes else ()), "teacher.negatives.")
        yield _cache("negatives", names, values, config, request, repository, device=writes)


def _cache(
    what: str,
    names: tuple[str, ...],
    values: Mapping[str, Any],
    config: Config,
    request: Request,
    repository: Path,
    *,
    device: bool,
) -> Job:
    """`names` are the options, or beginnings of their names, that the cache depends on."""
    key = _hash({name: value for name, value in values.items() if name.startswith(names)})
    parts = [what, _slug(config.data.task), *([_slug(config.model.path)] if "model.path" in names else [])]
    name = "-".join([*parts, f"s{config.seed}", key])
    script = str(repository / "scripts" / f"prepare_{what}.py")
    return Job(kind="cache", name=name, key=key, device=device, **_common(config, request, name, script))


def _evaluation(config: Config, request: Request, train: Job, run_dir: Path, task: str) -> Job:
    data = dataclasses.replace(config.data, task=task)
    if task != config.data.task:
        data = dataclasses.replace(data, **dict.fromkeys(OF_ONE_TASK))
    measured = dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(
            config.model, path=str(run_dir / "hf"), lora=dataclasses.replace(config.model.lora, start=None)
        ),
        measure=dataclasses.replace(config.measure, base=config.measure.base or config.model.path),
    )
    read = ("data.", "measure.", "head.", "mesh.", "evaluation.batch_size", "evaluation.max_completion_length")
    options = {name: value for name, value in flatten(to_dict(measured)).items() if name.startswith(read)}
    key = _hash([train.key, options])
    name = f"evaluate-{config.name}-{_slug(task) + '-' if task != config.data.task else ''}{key}"
    return Job(
        kind="evaluate",
        name=name,
        key=key,
        needs=(train.name,),
        outputs=(_pattern(run_dir, "evaluation", f"{get_task(task).name}-", suffix="*/summary.json"),),
        **_common(measured, request, name, "-m", "unisd_jax.evaluate") | {"about": dict(train.about) | {"task": task}},
    )


def _common(config: Config, request: Request, name: str, *program: str) -> dict[str, Any]:
    """What jobs with a configuration have in common."""
    folder = Path(request.output_dir) / "jobs" / name
    about = {"label": label(config), "mode": config.mode, "task": config.data.task, "model": config.model.path}
    return {
        "folder": str(folder),
        "command": (sys.executable, *program, "--config", str(folder / "options.yaml")),
        "config": to_yaml(config),
        "about": about | {"seed": config.seed, "steps": config.train.steps},
        "expected_gib": round(BASE_GIB + TIMES_WEIGHTS * _weights_gib(config.measure.base or config.model.path), 1),
    }


def _report(request: Request, script: Path, jobs: Sequence[Job]) -> Job:
    needs = tuple(job.name for job in jobs if job.kind != "cache")
    return Job(
        kind="report",
        name="report",
        key=_hash(needs),
        command=(sys.executable, str(script), request.output_dir),
        folder=str(Path(request.output_dir) / "jobs" / "report"),
        outputs=(_pattern(Path(request.output_dir), "report.html"),),
        needs=needs,
        experiments=request.experiments,
        device=False,
    )


def label(config: Config) -> str:
    """The mode and what is swept, for people: `agreement_tok_retrieval-k3-g0.1`."""
    values = flatten(to_dict(config))
    on = mechanisms(values)
    parts = [config.mode if config.mode != "custom" else "_".join(name for name, is_on in on.items() if is_on)]
    if on["agreement"]:
        views, gamma = values["teacher.contexts.num_auxiliary_contexts"], values["objective.agreement.gamma_agreement"]
        parts.append(f"k{views}-g{gamma:g}")
    return "-".join(parts)


def run_name(config: Config) -> str:
    """The folder of a run: readable, and another one for every configuration with other numbers."""
    parts = label(config), _slug(config.data.task), _slug(config.model.path), f"s{config.seed}", config_hash(config)
    return "-".join(parts)


def _slug(name: str) -> str:
    last = name.removesuffix(".py").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9._]+", "_", last.lower()).strip("._")[:40] or "x"


def _pattern(folder: Path, *parts: str, suffix: str = "") -> str:
    """A pattern for glob whose special characters are only those of `suffix`."""
    return glob.escape(str(folder.joinpath(*parts))) + suffix


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _weights_gib(model: str) -> float:
    """The size of the weights' files; 0 where they are not here yet."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 2**30
