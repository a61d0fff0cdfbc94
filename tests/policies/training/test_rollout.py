"""Unmasking as a decision process: what is counted, recorded and allowed."""

import pytest
import torch

from policies.network.config import PolicyConfig
from policies.network.policy_network import score
from policies.training.actors import ExpertMixture, Explorer, PolicyActor, RuleActor
from policies.training.log_likelihoods import bernoulli_log_prob, dpls_log_prob
from policies.training.rollout import Actor, Decision, Rollout, rollout
from samplers import Step
from samplers.rules.threshold import Threshold
from samplers.rules.topk import TopK
from tests.policies.tiny import SMALL, network
from tests.policies.toys import LENGTH, ReadySet

TASK = ReadySet()
CONFIG = PolicyConfig.model_validate(SMALL | {"region": False})


def run(chooser: Actor, count: int = 6, luck: float = 0.5, block_length: int | None = None, **rest: object) -> Rollout:
    problems = TASK.problems(count, 0, "train")
    return rollout(
        TASK.subject(luck),
        TASK,
        problems,
        chooser,
        gen_length=LENGTH,
        block_length=block_length,
        seeds=range(count),
        **rest,  # type: ignore[arg-type]
    )


class Never:
    """Draws nothing, ever."""

    statistics = Threshold.statistics
    top = 0
    whole_region = False

    def choose(self, step: Step, live: torch.Tensor) -> Decision:
        none = torch.zeros_like(step.candidate)
        return Decision(none, none)


def test_rules_count_forwards_as_they_do_when_serving() -> None:
    found = run(RuleActor(TopK(), TopK.Params(k=3)))
    assert found.forwards.tolist() == [6] * 6 and found.tokens.tolist() == [LENGTH] * 6
    careful = run(RuleActor(Threshold(), Threshold.Params(threshold=0.75)), luck=0.0)
    assert careful.correct.tolist() == [1.0] * 6 and careful.forwards.tolist() == [4] * 6


def test_batches_change_nothing() -> None:
    chooser = PolicyActor(network(**CONFIG.model_dump()))
    one, many = run(chooser, batch=1, record=CONFIG), run(chooser, batch=64, record=CONFIG)
    assert one.texts == many.texts and one.forwards.equal(many.forwards)
    assert one.records is not None and many.records is not None
    assert one.records.action.sum() == many.records.action.sum()


@pytest.mark.parametrize(("block_length", "forwards"), [(None, LENGTH), (4, LENGTH)])
def test_empty_draws_burn_forwards_only_where_they_may(block_length: int | None, forwards: int) -> None:
    """With the loop's own rule the surest is committed; with empty steps allowed a block's forwards run out."""
    found = run(Never(), block_length=block_length)
    assert found.forwards.tolist() == [forwards] * 6 and found.tokens.tolist() == [LENGTH] * 6
    stuck = run(Never(), block_length=block_length, allow_empty=True)
    assert stuck.forwards.tolist() == [block_length or LENGTH] * 6
    assert stuck.tokens.tolist() == [0] * 6 and stuck.correct.tolist() == [0.0] * 6


@pytest.mark.parametrize("action", ["bernoulli", "dpls"])
def test_records_give_the_draws_back(action: str) -> None:
    """What is recorded is enough to compute each draw's likelihood again, and to replay the run."""
    config = PolicyConfig.model_validate(SMALL | {"region": False, "action": action})
    net = network(**config.model_dump())
    found = run(PolicyActor(net), record=config)
    records = found.records
    assert records is not None
    assert torch.bincount(records.row).equal(found.forwards)
    logits = score(net, records.seen, None)
    if action == "dpls":
        assert records.order is not None
        log_probs = dpls_log_prob(records.order, logits, records.candidates)
        drawn = torch.zeros(len(records.row), LENGTH + 1, dtype=torch.bool)
        drawn.scatter_(1, records.order.where(records.order >= 0, LENGTH), True)
        assert drawn[:, :LENGTH].equal(records.action)
    else:
        log_probs = bernoulli_log_prob(records.action, logits, records.candidates)
    assert (log_probs <= 0).all() and log_probs.isfinite().all()
    assert not (records.action & ~records.candidates).any()
    assert records.committed.any(dim=1).all(), "at inference each step commits something"
    assert (records.committed | ~records.action).all(), "and all that was drawn"
    for row in range(6):
        mine = records.row == row
        assert records.committed[mine].sum(dim=0).tolist() == [1] * LENGTH
        assert records.seen.time[mine].tolist() == pytest.approx([i / LENGTH for i in range(int(mine.sum()))])
        assert records.candidates[mine].equal(records.seen.masked[mine])
    again = run(PolicyActor(net), record=config)
    assert again.texts == found.texts and again.records is not None
    assert again.records.committed.equal(records.committed)


def test_experts_work_in_blocks_of_their_own() -> None:
    expert = torch.tensor([-1, 0, 1, -1, 0, 1])
    rules = [
        RuleActor(TopK(), TopK.Params(k=1), block_length=4),
        RuleActor(Threshold(), Threshold.Params(threshold=0.75)),
    ]
    chooser = ExpertMixture(PolicyActor(network(**CONFIG.model_dump())), rules, expert)
    found = run(chooser, luck=0.0, record=CONFIG)
    records = found.records
    assert records is not None
    assert found.forwards[[1, 4]].tolist() == [LENGTH] * 2
    assert found.forwards[[2, 5]].tolist() == [4] * 2
    for row in (1, 4):
        committed = records.committed[records.row == row].nonzero()[:, 1].tolist()
        assert [position // 4 for position in committed] == [i // 4 for i in range(LENGTH)]
        assert records.candidates[records.row == row][0].all(), "the likelihood runs over all masked positions"


def test_explorers_are_careful_but_for_their_bold_steps() -> None:
    explorer = Explorer(200, seed=0, always=0.0, thresholds=(0.75,))
    found = run(explorer, count=200, luck=0.0, record=CONFIG)
    records = found.records
    assert records is not None
    bold = (records.committed & (records.confidence < 0.75)).any(dim=1)
    bold &= (records.committed.sum(dim=1) > 1) | (records.confidence.amax(dim=1) >= 0.75)
    steps = torch.bincount(records.row[bold], minlength=200)
    assert 0.2 < float(found.correct.mean()) < 0.95, "some runs go wrong, some go right"
    assert float((steps <= 1).float().mean()) > 0.95
