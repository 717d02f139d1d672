"""The law of the output, tested exactly; wrong rules must fail the very same check.

``violations`` runs one rule over 200,000 sequences and names what it breaks:

* ``law``: the joint law of the first three tokens is not the base's own (chi-square over
  all 64 outcomes, against exact probabilities),
* ``acceptance``: the first proposed token is not accepted as often as theory says:
  ``rejection`` 1 - TV; ``coupled`` the sum over v of 1 / sum over w of
  max(p[w]/p[v], q[w]/q[v]), which lies between (1 - TV)/(1 + TV) and 1 - TV,
* ``invariance``: for rules that promise it, a token differs from plain decoding's.

Seeds are fixed: the outcome is the same in every run.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

from outrider.shared.sampling.choose import draw_truncated, sample
from outrider.shared.sampling.noise import Stream, gumbel, uniform
from outrider.verify_service.rules import comparing, rejection

DRAWS = 200_000
VOCAB = 4
DEPTHS = 5
K = 2
FIRST_POSITION = 6
NEVER = -math.inf


def offset(depth: Tensor | int) -> Tensor | int:
    """Where the logits of prefixes of this length start in a table."""
    return (VOCAB**depth - 1) // (VOCAB - 1)


def table(seed: int, scale: float, *, never: tuple[int, ...] = ()) -> Tensor:
    """Logits [prefixes, vocab] of a language model that knows every prefix by heart."""
    rows = int(offset(DEPTHS))
    logits = scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, list(never)] = NEVER
    return logits


BASE = table(1, 1.0)
NARROW = table(1, 1.0, never=(2, 3))
DRAFTS = {
    "equal": BASE,
    "close": BASE + table(2, 0.5),
    "uniform": torch.zeros_like(BASE),
    "wrong and sure": 6.0 * torch.eye(VOCAB)[BASE.argmin(-1)],
    "unrelated": table(3, 2.0),
    "narrow": table(4, 1.0, never=(0, 1)),
}
BASES = {"full": BASE, "two tokens": NARROW}
CASES = [("full", name) for name in DRAFTS] + [("two tokens", "narrow"), ("two tokens", "uniform")]


class Rejection:
    """The rule as the services run it; mutants override single steps."""

    invariant = False
    draft_top = VOCAB

    def propose(self, logits: Tensor, seeds: Tensor, positions: Tensor):
        sizes = torch.full_like(seeds, self.draft_top)
        return draw_truncated(logits, seeds, positions, sizes, self.draft_top)

    def judge(self, logits, proposals, ids, q, seeds, positions):
        items, rows = logits.shape[:2]
        first = rows * torch.arange(items)
        lengths = torch.full((items,), proposals.shape[1])
        return rejection.judge_rejection(
            logits.flatten(0, 1), first, proposals, ids, q, lengths, seeds, positions
        )

    def acceptance_bounds(self, p: Tensor, q: Tensor) -> tuple[float, float]:
        kept = q.topk(self.draft_top)
        q = torch.zeros_like(q).scatter(0, kept.indices, kept.values / kept.values.sum())
        rate = 1 - float((p - q).abs().sum() / 2)
        return rate, rate


class Coupled:
    """Shared noise: a proposed token stands iff it is the base's own choice."""

    invariant = True

    def propose(self, logits: Tensor, seeds: Tensor, positions: Tensor):
        return sample(logits, seeds, positions), None, None

    def targets(self, logits, proposals, seeds, positions) -> Tensor:
        rows = logits.shape[1]
        seeds = seeds.repeat_interleave(rows)
        positions = (positions[:, None] + torch.arange(rows)).flatten()
        return sample(logits.flatten(0, 1), seeds, positions).view(-1, rows)

    def judge(self, logits, proposals, ids, q, seeds, positions):
        targets = self.targets(logits, proposals, seeds, positions)
        # Few different outcomes, each one number: ask about each once.
        both = torch.cat((targets, proposals), dim=1)
        size, rows = both.shape[1], logits.shape[1]
        digits = VOCAB ** torch.arange(size)
        cases, which = (both * digits).sum(1).unique(return_inverse=True)
        outcomes = (cases[:, None] // digits % VOCAB).tolist()
        counts = [comparing.accepted_prefix(c[:rows], c[rows:]) for c in outcomes]
        accepted = torch.tensor(counts)[which]
        return accepted, targets.gather(1, accepted[:, None]).squeeze(1)

    def acceptance_bounds(self, p: Tensor, q: Tensor) -> tuple[float, float]:
        # E_v / p_v and E_v / q_v are both smallest at v, summed over v.
        p, q = p.double(), q.double()
        worst = [torch.maximum(p / p[v], q / q[v]).sum() for v in range(VOCAB) if p[v] * q[v] > 0]
        exact = float(sum(1 / w for w in worst))
        tv = float((p - q).abs().sum() / 2)
        assert (1 - tv) / (1 + tv) - 1e-6 <= exact <= 1 - tv + 1e-6
        return exact, exact


@functools.cache
def plain_tokens(base: str) -> Tensor:
    """The tokens of plain decoding with the noise of ``coupled``."""
    return generate(Coupled(), BASES[base], BASES[base], k=0)[0]


def generate(rule, base: Tensor, draft: Tensor, k: int = K) -> tuple[Tensor, float]:
    """Three tokens of each of DRAWS sequences [DRAWS, 3], and the rate of first acceptances."""
    seeds = torch.arange(DRAWS) * 2654435761 + 17
    length = torch.zeros(DRAWS, dtype=torch.int64)
    tokens = torch.zeros(DRAWS, DEPTHS + 1, dtype=torch.int64)
    rate = math.nan
    while True:
        active = (length < 3).nonzero().squeeze(1)
        if not len(active):
            return tokens[:, :3], rate
        at, seed, start = tokens[active], seeds[active], length[active]
        here = torch.arange(len(active))
        codes = [
            sum(at[:, d] * (d < start) * VOCAB ** (start - 1 - d).clamp(min=0) for d in range(3))
        ]
        ids, q, proposals = [], [], []
        for i in range(k):
            token, token_ids, token_q = rule.propose(
                draft[offset(start + i) + codes[-1]], seed, FIRST_POSITION + start + i
            )
            proposals.append(token)
            ids.append(token_ids)
            q.append(token_q)
            codes.append(codes[-1] * VOCAB + token)
        logits = torch.stack([base[offset(start + i) + code] for i, code in enumerate(codes)], 1)
        offered = torch.stack(proposals, 1) if k else torch.zeros(len(active), 0, dtype=torch.int64)
        sparse = (
            (torch.stack(ids, 1), torch.stack(q, 1)) if k and ids[0] is not None else (None, None)
        )
        accepted, following = rule.judge(logits, offered, *sparse, seed, FIRST_POSITION + start)
        if math.isnan(rate):
            rate = float((accepted > 0).float().mean())
        for i in range(k):
            at[here, start + i] = offered[:, i]
        at[here, start + accepted] = following
        tokens[active], length[active] = at, start + accepted + 1


def joint_law(base: Tensor) -> Tensor:
    """Probability of each triple of tokens, [vocab ** 3], float64."""
    p = base.double().softmax(-1)
    law = torch.ones(1, dtype=torch.float64)
    for depth in range(3):
        start = int(offset(depth))
        law = (law[:, None] * p[start : start + VOCAB**depth]).flatten()
    return law


def p_value(tokens: Tensor, law: Tensor) -> float:
    """Of the chi-square test of the triples against ``law``; 0 if the impossible happened."""
    codes = (tokens[:, 0] * VOCAB + tokens[:, 1]) * VOCAB + tokens[:, 2]
    counts = torch.bincount(codes, minlength=VOCAB**3).double()
    possible = law > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = law[possible] * DRAWS
    assert float(expected.min()) > 5, "too few draws for a chi-square test"
    return float(stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue)


def violations(rule, base: str, draft: str) -> set[str]:
    """What ``rule`` breaks with this base and this draft."""
    p, q = BASES[base], DRAFTS[draft]
    tokens, rate = generate(rule, p, q)
    found = set()
    if p_value(tokens, joint_law(p)) < 1e-4:
        found.add("law")
    low, high = rule.acceptance_bounds(p[0].softmax(-1), q[0].softmax(-1))
    slack = 4.5 * math.sqrt(0.25 / DRAWS)
    if not low - slack <= rate <= high + slack:
        found.add("acceptance")
    if rule.invariant and not torch.equal(tokens, plain_tokens(base)):
        found.add("invariance")
    return found


class CutRejection(Rejection):
    draft_top = 2


class PointMass(Rejection):
    """A draft that is certain of its proposal, as one from the text alone is, and has now two
    tokens to propose, now one, now none."""

    def propose(self, logits, seeds, positions):
        token = logits.argmax(-1)
        return token, token[:, None], torch.ones(len(token), 1)

    def judge(self, logits, proposals, ids, q, seeds, positions):
        items, rows = logits.shape[:2]
        first = rows * torch.arange(items)
        lengths = self.lengths(seeds, positions, proposals.shape[1])
        return rejection.judge_rejection(
            logits.flatten(0, 1), first, proposals, ids, q, lengths, seeds, positions
        )

    def lengths(self, seeds, positions, k):
        return (seeds + positions) % (k + 1)

    def acceptance_bounds(self, p, q):
        # Of all items, a third of which have no proposal.
        rate = 2 / 3 * float(p[q.argmax()])
        return rate, rate


class PointMassThatIsReplacedByTheBase(PointMass):
    """Draws from ``p`` after a rejection, the rejected token included."""

    def judge(self, logits, proposals, ids, q, seeds, positions):
        accepted, following = super().judge(logits, proposals, ids, q, seeds, positions)
        here, last = torch.arange(len(logits)), positions + accepted
        drawn = sample(logits[here, accepted], seeds, last, stream=Stream.RESIDUAL)
        whole = accepted == self.lengths(seeds, positions, proposals.shape[1])
        return accepted, torch.where(whole, following, drawn)


@pytest.mark.parametrize(
    ("rule", "base", "draft"),
    [(rule, *case) for rule in (Coupled, Rejection) for case in CASES]
    + [(CutRejection, "full", draft) for draft in ("equal", "close", "uniform")]
    + [(PointMass, *case) for case in CASES if "uniform" not in case],
)
def test_output_has_the_law_of_the_base(rule, base, draft):
    assert violations(rule(), base, draft) == set()


@dataclass
class _Steps:
    """The parts of ``judge_rejection`` for mutants to put together wrongly."""

    p: Tensor  # [items, K + 1, vocab]
    q: Tensor  # [items, K, vocab]
    p_at: Tensor
    q_at: Tensor
    tests: Tensor


class Assembled(Rejection):
    """The rule put together from its parts; unchanged, it must pass."""

    def stands(self, s: _Steps) -> Tensor:
        return s.tests * s.q_at < s.p_at

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return rejection.residual(p, q)

    def draw(self, weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        return sample(weights.log(), seeds, positions, stream=Stream.RESIDUAL)

    def judge(self, logits, proposals, ids, q, seeds, positions):
        p = logits.softmax(-1)
        dense = torch.zeros(*proposals.shape, VOCAB).scatter_add_(2, ids, q)
        at = proposals[..., None]
        steps = torch.arange(proposals.shape[1])
        tests = uniform(seeds[:, None], positions[:, None] + steps, stream=Stream.ACCEPT)
        s = _Steps(p, dense, p[:, :-1].gather(2, at)[..., 0], dense.gather(2, at)[..., 0], tests)
        accepted = self.stands(s).long().cumprod(1).sum(1)
        here, last = torch.arange(len(p)), positions + accepted
        stop = accepted.clamp(max=proposals.shape[1] - 1)
        replaced = self.draw(self.residual(p[here, accepted], dense[here, stop]), seeds, last)
        bonus = sample(p[here, accepted].log(), seeds, last)
        return accepted, torch.where(accepted < proposals.shape[1], replaced, bonus)


class ResidualNotRenormalised(Assembled):
    """Inverse transform over weights that do not sum to 1: the rest goes to the last token."""

    def draw(self, weights, seeds, positions):
        u = uniform(seeds, positions, stream=Stream.RESIDUAL)
        return (weights.cumsum(-1) < u[:, None]).sum(-1).clamp(max=VOCAB - 1)


class NoiseSharedWithTheProposal(Assembled):
    def draw(self, weights, seeds, positions):
        return sample(weights.log(), seeds, positions, stream=Stream.DRAFT)


class NoiseSharedWithTheAcceptTest(Assembled):
    def draw(self, weights, seeds, positions):
        u = uniform(seeds, positions, stream=Stream.ACCEPT)
        share = weights / weights.sum(-1, keepdim=True)
        return (share.cumsum(-1) < u[:, None]).sum(-1).clamp(max=VOCAB - 1)


class RatioUpsideDown(Assembled):
    def stands(self, s):
        return s.tests * s.p_at < s.q_at


class RatioWithoutTheDraft(Assembled):
    def stands(self, s):
        return s.tests < s.p_at


class AcceptsTooMuch(Assembled):
    def stands(self, s):
        return s.tests * s.q_at < 1.05 * s.p_at


class ResidualIsTheBase(Assembled):
    def residual(self, p, q):
        return p


class ResidualIgnoresTheSign(Assembled):
    def residual(self, p, q):
        return (p - q).abs() + 1e-30


class ResidualExcludesOnlyTheProposal(Assembled):
    def residual(self, p, q):
        return p * (q < q.amax(-1, keepdim=True))


class CoupledWithFreshNoiseAfterRejection(Coupled):
    def judge(self, logits, proposals, ids, q, seeds, positions):
        accepted, following = super().judge(logits, proposals, ids, q, seeds, positions)
        here, last = torch.arange(len(logits)), positions + accepted
        fresh = sample(logits[here, accepted], seeds, last, stream=Stream.RESIDUAL)
        return accepted, torch.where(accepted < proposals.shape[1], fresh, following)


class CoupledWithNoiseFromTheProposal(Coupled):
    """The noise depends on what was proposed before: the law holds, invariance does not."""

    def targets(self, logits, proposals, seeds, positions):
        moved = seeds + 7919 * (1 + proposals.sum(1)) if proposals.shape[1] else seeds
        return super().targets(logits, proposals, moved, positions)


class CoupledWithoutThePosition(Coupled):
    def propose(self, logits, seeds, positions):
        return super().propose(logits, seeds, torch.zeros_like(positions))

    def targets(self, logits, proposals, seeds, positions):
        items, rows = logits.shape[:2]
        noise = gumbel(seeds, torch.zeros_like(positions), VOCAB)
        return (logits + noise[:, None]).argmax(-1).view(items, rows)


class CoupledThatTrustsTheDraft(Coupled):
    """Accepts what is nearly the base's choice."""

    def judge(self, logits, proposals, ids, q, seeds, positions):
        targets = self.targets(logits, proposals, seeds, positions)
        better = logits.gather(2, targets[..., None])[..., 0][:, :-1]
        offered = logits[:, :-1].gather(2, proposals[..., None])[..., 0]
        stands = (targets[:, :-1] == proposals) | (offered > better)
        accepted = stands.long().cumprod(1).sum(1)
        return accepted, targets.gather(1, accepted[:, None]).squeeze(1)


def test_the_rule_assembled_from_its_parts_passes():
    for draft in ("close", "wrong and sure"):
        assert violations(Assembled(), "full", draft) == set()


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (ResidualNotRenormalised, "law"),
        (NoiseSharedWithTheProposal, "law"),
        (NoiseSharedWithTheAcceptTest, "law"),
        (RatioUpsideDown, "law"),
        (RatioWithoutTheDraft, "law"),
        (AcceptsTooMuch, "law"),
        (ResidualIsTheBase, "law"),
        (ResidualIgnoresTheSign, "law"),
        (ResidualExcludesOnlyTheProposal, "law"),
        (PointMassThatIsReplacedByTheBase, "law"),
        (CoupledWithFreshNoiseAfterRejection, "law"),
        (CoupledWithNoiseFromTheProposal, "invariance"),
        (CoupledWithoutThePosition, "law"),
        (CoupledThatTrustsTheDraft, "law"),
    ],
)
def test_a_wrong_rule_is_caught(mutant, broken):
    assert broken in violations(mutant(), "full", "close")
