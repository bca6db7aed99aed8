"""Mechanisms that do nothing: told from the metrics of a run, said once with the likely cause."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class _Rule(NamedTuple):
    """`idle(metrics)` says whether the mechanism did nothing in a step in which it has the metric `metric`."""

    metric: str
    idle: Callable[[Mapping[str, float]], bool]
    cause: str


# A term whose gradient is a smaller share than this of all terms' does not move the student.
SMALL_SHARE = 1e-4

_RULES = {
    "divergence": _Rule(
        "divergence",
        lambda m: m["divergence"] < 1e-7,
        "student and teacher agree everywhere; is the teacher shown anything (teacher.condition)?",
    ),
    "ema": _Rule(
        "teacher_motion",
        lambda m: m["teacher_motion"] == 0.0,
        "the teacher did not move; see teacher.ema_adapters, teacher.ema_decay and teacher.ema_sync_steps",
    ),
    "agreement": _Rule(
        "agreement_above_99",
        lambda m: m["agreement_above_99"] == 1.0 or m.get("agreement_effective_share", 0.0) > 0.9999,
        "all weights are above 0.99, or all the same; raise objective.agreement.gamma_agreement, "
        "or the views hardly differ",
    ),
    "clip": _Rule(
        "clip_share",
        lambda m: m["clip_share"] == 0.0,
        "no token reached the ceiling; lower objective.clip.token_clip or use token_clip_quantile",
    ),
    "contrast": _Rule(
        "contrast_active_share",
        lambda m: m["contrast_active_share"] == 0.0 or m["gradient_share_contrast"] < SMALL_SHARE,
        "the hinge was never active or had no gradient to speak of; raise objective.contrast.contrastive_margin or "
        "contrastive_weight, or look at the negatives",
    ),
    "matching": _Rule(
        "loss_matching",
        lambda m: m["gradient_share_matching"] < SMALL_SHARE,
        "its gradient is too small beside the other terms'; raise objective.matching.final_layer_distill_weight",
    ),
    "importance": _Rule(
        "importance_weight",
        lambda m: abs(m["importance_weight"] - 1.0) < 1e-6,
        "student and sampler agree on every token; objective.importance.level can be none",
    ),
    "entry_ceiling": _Rule(
        "entry_capped_share",
        lambda m: m["entry_capped_share"] == 0.0,
        "no vocabulary entry reached the ceiling; lower objective.entry_ceiling",
    ),
    "teacher.condition=self": _Rule(
        "self_accepted",
        lambda m: m["self_accepted"] == 0.0,
        "no item had enough agreement among its own answers; lower teacher.self_min_agreement",
    ),
}


class InertMechanisms:
    """Counts, for each mechanism, the steps in a row in which it did nothing.

    Args:
      after: so many of them are worth a warning.
      ema_sync_steps: between two updates of the teacher, when it is idle on purpose.
    """

    def __init__(self, after: int, *, ema_sync_steps: int = 1):
        self._after = dict.fromkeys(_RULES, after) | {"ema": max(after, ema_sync_steps + 1)}
        self._idle = dict.fromkeys(_RULES, 0)

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that these metrics of one step complete: one per mechanism and run."""
        found = []
        for name, rule in _RULES.items():
            if not math.isfinite(metrics.get(rule.metric, math.nan)):
                continue
            said = self._idle[name] < 0
            self._idle[name] = self._idle[name] + 1 if said or rule.idle(metrics) else 0
            if self._idle[name] == self._after[name]:
                found.append(f"{name} did nothing for {self._after[name]} steps: {rule.cause}")
                self._idle[name] = -(2**62)
        return found
