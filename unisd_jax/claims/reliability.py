"""Claim 15 by scoring alone: do weights rank what was spoilt?"""

from collections.abc import Sequence

import numpy as np

from unisd_jax.claims.findings import Claim, Finding, resampled
from unisd_jax.claims.variants import NOISES
from unisd_jax.claims.weights import CLEAN, Scored, auc, draw, rank_correlation, weigh

RATE = 1 / 3
NOISE_NAMES = {"content": "wrong answers in the right form", "form": "right answers in another form"}


def reliability_claims(scored: Sequence[Scored], student: str) -> list[Claim]:
    """`scored` of several seeds; `student` says who sampled the completions."""
    found = [
        Claim(
            "15",
            f"Agreement weights are lower where contexts were spoilt ({NOISE_NAMES[noise]}; {student})",
            _against_spoilt_views(scored, noise),
            f"Each of 3 views is spoilt with chance {RATE:.2f}. AUC: how often a clean completion or token weighs "
            "more than one with a spoilt view; 0.5 says nothing.",
        )
        for noise in NOISES
    ]
    return [*found, _against_wrong_supervision(scored, student)]


def _against_spoilt_views(scored: Sequence[Scored], noise: str) -> list[Finding]:
    drawn = [draw(one, noise, rate=RATE, seed=seed) for seed, one in enumerate(scored)]
    spoilt = np.concatenate([one.spoilt_views for one in drawn])
    items = np.arange(len(spoilt))
    sequence, means = (np.concatenate([getattr(one, name) for one in drawn]) for name in ("sequence", "token_means"))
    tokens, owners = np.concatenate([one.tokens for one in drawn]), _owners(scored)
    return [
        _auc("sequence weights, AUC for any spoilt view", sequence, spoilt > 0, items),
        _auc("token weights, AUC for any spoilt view, token by token", tokens, spoilt[owners] > 0, owners),
        _correlation("sequence weights, rank correlation with the number of spoilt views", sequence, spoilt, items),
        _correlation("mean token weights, rank correlation with the number of spoilt views", means, spoilt, items),
    ]


def _against_wrong_supervision(scored: Sequence[Scored], student: str) -> Claim:
    """The views are clean here: do they notice a demonstration or a completion that is wrong?"""
    token, sequence = [], []
    for one in scored:
        of_tokens, of_completions = weigh(one.views[CLEAN], one.mask)
        token.append(of_tokens[one.mask])
        sequence.append(of_completions)
    token, sequence = np.concatenate(token), np.concatenate(sequence)
    damage = np.concatenate([np.abs(one.right - one.wrong)[one.mask] for one in scored])
    owners = _owners(scored)
    wrong = ~np.concatenate([one.exact for one in scored])
    items = np.arange(len(wrong))
    worst = damage >= np.quantile(damage, 0.9)
    return Claim(
        "15",
        f"Agreement weights are lower where the supervision itself would mislead ({student})",
        [
            _correlation(
                "token weights, rank correlation with how far a wrong demonstration moves the teacher on the token",
                token, damage, owners,
            ),
            _auc("token weights, AUC for the tenth of the tokens that it moves most", token, worst, owners),
            _auc("sequence weights, AUC for completions that are wrong", sequence, wrong, items)._replace(predicted=""),
        ],
        "The views are clean. Weights fall, and demonstrations move the teacher, where a token is uncertain anyway, "
        f"which is not held fixed here. {int(wrong.sum())} of {len(wrong)} completions are wrong; with few of one kind "
        "the last line says nothing, and wrong ones also differ in length and form.",
    )  # fmt: skip


def _owners(scored: Sequence[Scored]) -> np.ndarray:
    """For every token of all completions, which completion it is of."""
    lengths = np.concatenate([one.mask.sum(axis=1) for one in scored])
    return np.repeat(np.arange(len(lengths)), lengths)


def _auc(what: str, weights, positive, groups) -> Finding:
    interval = resampled(lambda places: auc(weights[places], positive[places]), groups)
    return Finding(what, interval, "AUC", "+", 0.5)


def _correlation(what: str, weights, others, groups) -> Finding:
    interval = resampled(lambda places: rank_correlation(weights[places], others[places]), groups)
    return Finding(what, interval, "rho", "-")
