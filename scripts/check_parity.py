"""Compares the training objective with numbers that another implementation computed, case by case.

    python scripts/check_parity.py DIR [--families llama qwen2] [--cases NAME ...] [--micro-batches N] [--devices N]

DIR holds, for each FAMILY, `FAMILY.json` (per case its `config`, `loss`, `grad_norm`), `FAMILY.npz` (the batch of token
ids and the gradients of some parameters) and the checkpoints that the JSON names under `student` and `teacher`. Every
case runs the whole objective from the token ids on, under the release's arithmetic. Exit status 1 when a target is
missed, 2 for bad input.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

LOSS_TARGET, GRADIENT_TARGET = 1e-5, 1e-4
TINY = 1e-12  # below it an error is taken as it is
MODES_WITH_MATCHING = ("match_joint", "match_repr", "unisd_star")


class CaseResult(NamedTuple):
    """Our numbers beside the reference's; errors are relative, that of the gradients in the L2 norm."""

    loss: float
    reference: float
    loss_error: float
    norm_error: float
    gradient_errors: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is within its target; NaN is not."""
        gradients = [self.norm_error, *self.gradient_errors.values()]
        return self.loss_error <= LOSS_TARGET and all(error <= GRADIENT_TARGET for error in gradients)


def objective_of(config: dict):
    """The settings that a case's flags mean, under the release's arithmetic."""
    from unisd_jax.losses import Agreement, Objective

    mode, agreement = config["mode"], None
    if config["gamma_agreement"] > 0:
        agreement = Agreement(
            "sequence" if mode.startswith("agreement_seq") else "token",
            config["gamma_agreement"],
            config["agreement_stat"],
            config["agreement_quantile"],
            config["agreement_cap"],
        )
    weight = config["final_layer_distill_weight"] if mode in MODES_WITH_MATCHING else 0.0
    return Objective(
        loss="none" if mode == "match_repr" else "divergence",
        alpha=config["alpha"],
        normalize="upstream",
        temperature=config["temperature"],
        skip_tokens=config["num_loss_tokens_to_skip"],
        top_entropy=config["top_entropy_quantile"],
        clip_ceiling=config["token_clip"],
        clip_quantile=config["token_clip_quantile"],
        agreement=agreement,
        contrast_weight=0.0 if mode == "match_repr" else config["contrastive_weight"],
        contrast_margin=config["contrastive_margin"],
        matching_weight=1.0 if mode == "match_repr" else weight,
        importance="sequence" if config["importance_sampling"] else None,
    )


def batch_views(arrays: dict, options, contexts: int):
    """The views of the stored batch that `options` ask for; auxiliary prompts are left-padded to a common length."""
    import jax.numpy as jnp

    from unisd_jax.types import Completions, Contexts, Prompts, Views

    def prompts(ids: str, mask: str):
        return jnp.asarray(arrays[f"batch/{ids}"], jnp.int32), jnp.asarray(arrays[f"batch/{mask}"], bool)

    auxiliary = negative = None
    if options.agreement is not None:
        pairs = [
            prompts(f"fewshot_teacher_prompt_ids_{k}", f"fewshot_teacher_prompt_mask_{k}") for k in range(contexts)
        ]
        longest = max(ids.shape[1] for ids, _ in pairs)
        padded = [[jnp.pad(array, ((0, 0), (longest - array.shape[1], 0))) for array in pair] for pair in pairs]
        auxiliary = Contexts(*(jnp.stack([pair[index] for pair in padded], axis=1) for index in range(2)))
    if options.contrast_weight > 0:
        negative = Prompts(*prompts("bad_teacher_prompt_ids", "bad_teacher_prompt_mask"))
    completions = Completions(*prompts("completion_ids", "completion_mask"))
    student, teacher = (Prompts(*prompts(f"{kind}_ids", f"{kind}_mask")) for kind in ("prompt", "teacher_prompt"))
    return Views(student, teacher, completions, None, auxiliary, negative)


def run_case(folder: Path, family: str, case: str, *, micro_batches: int = 1, mesh=None) -> CaseResult:
    """One case of `folder/family.json`.

    Raises:
      UserError: there is no such case, the batch lacks what it needs, or `micro_batches` does not divide the batch.
    """
    import jax
    import numpy as np

    from unisd_jax.errors import UserError
    from unisd_jax.models import hf_tensors
    from unisd_jax.models.layout import place
    from unisd_jax.step import StepSettings, loss_and_gradients, student_scores
    from unisd_jax.teacher.scoring import Network

    description, arrays, model, student, teacher = read_family(folder, family)
    if case not in description["cases"]:
        raise UserError(f"--cases: {folder}/{family}.json has no {case!r}; it has {', '.join(description['cases'])}")
    expected = description["cases"][case]
    try:
        options = objective_of(expected["config"])
        views = batch_views(arrays, options, expected["config"]["num_contexts"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: {family}/{case} lacks what it needs ({error!r})") from None
    settings = StepSettings(options, micro_batches)
    rows = len(views.student.ids)
    if micro_batches < 1 or rows % micro_batches:
        raise UserError(
            f"--micro-batches is {micro_batches}; expected a divisor of the {rows} rows of {folder}/{family}.npz"
        )
    network = Network(model, teacher, None)
    if options.importance is not None:
        # The ratios are given: log-probs of the sampler that lead to them.
        ratios = arrays["batch/importance_sampling_ratio"]
        scores = student_scores(student, network, student, views, None, settings)
        views = views._replace(sampler_logps=np.asarray(scores.student_logp) - np.log(ratios))
    if mesh is not None:
        from unisd_jax.parallel.sharding import batch_sharding, replicated

        divides = len(views.student.ids) % mesh.shape["fsdp"] == 0
        student, teacher = place(student, mesh), place(teacher, mesh)
        views = jax.device_put(views, batch_sharding(mesh) if divides else replicated(mesh))

    def gradients(student, teacher, views):
        network = Network(model, teacher, None)
        return loss_and_gradients(student, network, student, views, settings=settings)

    found, metrics = jax.jit(gradients)(student, teacher, views)
    tensors = hf_tensors(model, found)
    prefix = f"grad/{case}/"
    stored = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    errors = {
        name: float(np.linalg.norm(tensors[name] - value) / max(np.linalg.norm(value), TINY))
        for name, value in stored.items()
    }
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    return CaseResult(
        loss,
        expected["loss"],
        abs(loss - expected["loss"]) / max(abs(expected["loss"]), TINY),
        abs(norm - expected["grad_norm"]) / max(expected["grad_norm"], TINY),
        errors,
    )


@functools.cache
def read_family(folder: Path, family: str):
    """(description, arrays, model, student, teacher) of one family.

    Raises:
      UserError: a file is missing or is not what it should be.
    """
    import numpy as np

    from unisd_jax.errors import UserError
    from unisd_jax.models import load_hf

    try:
        description = json.loads((folder / f"{family}.json").read_text())
        with np.load(folder / f"{family}.npz") as file:
            arrays = {name: file[name] for name in file.files}
        names = description["student"], description["teacher"]
        description["cases"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: {family} is not in the format that this script describes ({error!r})") from None
    model, student = load_hf(folder / names[0])
    _, teacher = load_hf(folder / names[1])
    return description, arrays, model, student, teacher


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="*", help="default: every FAMILY.json in the folder")
    parser.add_argument("--cases", nargs="*", help="default: all")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices: 1, or a multiple of 2")
    options = parser.parse_args(argv)
    if options.devices > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}"
    from unisd_jax.errors import UserError, report_error
    from unisd_jax.parallel.mesh import build_mesh

    try:
        mesh = build_mesh(1, 2, options.devices // 2) if options.devices > 1 else None
        failed, count = 0, 0
        families = options.families or sorted(path.stem for path in options.folder.glob("*.json"))
        if not families:
            raise UserError(f"{options.folder} holds no FAMILY.json; the script's help describes the format")
        print(f"{'case':<34}{'ours':>14}{'reference':>14}{'loss':>10}{'norm':>10}{'gradients':>11}")
        for family in families:
            for case in options.cases or read_family(options.folder, family)[0]["cases"]:
                result = run_case(options.folder, family, case, micro_batches=options.micro_batches, mesh=mesh)
                worst = max(result.gradient_errors.values(), default=0.0)
                verdict = "" if result.passed else "  FAILED"
                print(
                    f"{f'{family}/{case}':<34}{result.loss:>14.8f}{result.reference:>14.8f}{result.loss_error:>10.1e}"
                    f"{result.norm_error:>10.1e}{worst:>11.1e}{verdict}",
                    flush=True,
                )
                failed, count = failed + (not result.passed), count + 1
    except UserError as error:
        return report_error(error)
    print(f"{count - failed} of {count} within {LOSS_TARGET:g} (loss) and {GRADIENT_TARGET:g} (gradients)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
