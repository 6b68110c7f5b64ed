"""Losses of preference pairs, from the log-probabilities of whole answers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation of n pairs.

    With the margin m = (chosen - reference_chosen) - (rejected - reference_rejected): `sigmoid` is
    -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m) (Rafailov et al., arXiv 2305.18290; s is `label_smoothing`,
    the share of pairs that are labelled wrongly), `ipo` is (m - 1 / (2 beta))^2 (Azar et al., arXiv 2310.12036, with
    log-probabilities averaged over an answer's tokens).

    Args:
        chosen, rejected: [n] log-probabilities of the answers under the policy.
        reference_chosen, reference_rejected: [n] the same under the reference model; None = reference-free.
        beta: inverse strength of the pull towards the reference.

    Returns:
        The loss of each pair [n], and its reward margin beta * m [n], detached.

    Raises:
        ValueError: an unknown `kind`.
    """
    margin = chosen - rejected
    if reference_chosen is not None and reference_rejected is not None:
        margin = margin - (reference_chosen - reference_rejected)
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)
    elif kind == "ipo":
        loss = (margin - 1 / (2 * beta)).square()
    else:
        raise ValueError(f'kind="{kind}" is no preference loss: "sigmoid" and "ipo" are')
    return loss, (beta * margin).detach()


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, margin: float = 1.0) -> tuple[Tensor, Tensor]:
    """Preference loss without a reference: -log sigmoid(beta (chosen - rejected) - margin).

    Meng et al., arXiv 2405.14734, equation 6; `margin` is its gamma.

    Args:
        chosen, rejected: [n] log-probabilities of the answers, averaged over their tokens.

    Returns:
        The loss of each pair [n], and its reward margin beta * (chosen - rejected) [n], detached.
    """
    difference = beta * (chosen - rejected)
    return -logsigmoid(difference - margin), difference.detach()


def orpo_loss(chosen: Tensor, rejected: Tensor, *, weight: float = 0.1) -> tuple[Tensor, Tensor]:
    """Odds-ratio preference loss, added to the likelihood of the chosen answer: no reference, no stage of its own.

    -chosen - weight * log sigmoid(log(odds(chosen) / odds(rejected))) with odds(p) = p / (1 - p): Hong et al.,
    arXiv 2403.07691, equations 6 and 7.

    Args:
        chosen, rejected: [n] log-probabilities of the answers, averaged over their tokens (so below 0).

    Returns:
        The loss of each pair [n], and its log odds ratio [n], detached.
    """
    ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - weight * logsigmoid(ratio), ratio.detach()


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)), exact near p = 0 and p = 1."""
    return log_probability - (-log_probability.expm1()).log()
