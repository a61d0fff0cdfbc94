"""Guards the guard: an answer that holds has no problem, and whatever is changed in it is noticed."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from tests.fuzz.asking import Answer, Choice
from tests.fuzz.families import Subject
from tests.fuzz.judging import differences, judge

Change = Callable[[Answer], object]

FIRST, SECOND, THIRD, FOURTH = 300, 301, 302, 303


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make("llada", tmp_path_factory.mktemp("models") / "llada")


def commit(forward: int, positions: list[int], tokens: list[int], **more: list[int]) -> dict[str, Any]:
    return {"forward": forward, "positions": positions, "tokens": tokens, "filled": [], **more}


def answer_of(subject: Subject, passes: list[dict[str, Any]], tokens: list[int], text: str, finish: str) -> Answer:
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": len(tokens),
        "total_tokens": 2 + len(tokens),
        "completion_tokens_details": {"forward_passes": len(passes), "tokens_per_forward": len(tokens) / len(passes)},
    }
    return Answer(200, [Choice(text, finish, passes)], usage)


@pytest.fixture
def right(subject: Subject) -> tuple[dict[str, Any], Answer]:
    """Four tokens in three passes, the second of which opens a position again that the third takes."""
    passes = [
        commit(1, [1, 3], [SECOND, FIRST]),
        commit(2, [0, 3], [FIRST, FOURTH], replaced=[3], remasked=[1]),
        commit(3, [1, 2], [SECOND, THIRD]),
    ]
    tokens = [FIRST, SECOND, THIRD, FOURTH]
    body = {"prompt": [5, 6], "max_tokens": 4, "sampler": "topk"}
    return body, answer_of(subject, passes, tokens, subject.decode(tokens), "length")


def first(answer: Answer) -> Choice:
    return answer.choices[0]


def usage(answer: Answer) -> dict[str, Any]:
    assert answer.usage is not None
    return answer.usage


CHANGES: dict[str, Change] = {
    "text": lambda answer: setattr(first(answer), "text", first(answer).text + "!"),
    "finish": lambda answer: setattr(first(answer), "finish", "stop"),
    "token": lambda answer: first(answer).passes[2].update(tokens=[SECOND, SECOND]),
    "twice": lambda answer: first(answer).passes[2].update(positions=[0, 2]),
    "not replaced": lambda answer: first(answer).passes[1].pop("replaced"),
    "not remasked": lambda answer: first(answer).passes[1].pop("remasked"),
    "remasked at the end": lambda answer: first(answer).passes[2].update(remasked=[3]),
    "a pass is missing": lambda answer: first(answer).passes.pop(),
    "passes are not counted up": lambda answer: first(answer).passes[2].update(forward=4),
    "filled": lambda answer: first(answer).passes[2].update(filled=[3]),
    "padding in the text": lambda answer: first(answer).passes[2].update(positions=[1], tokens=[SECOND], filled=[2]),
    "completion tokens": lambda answer: usage(answer).update(completion_tokens=5, total_tokens=7),
    "total": lambda answer: usage(answer).update(total_tokens=7),
    "prompt": lambda answer: usage(answer).update(prompt_tokens=3, total_tokens=7),
    "forwards": lambda answer: usage(answer)["completion_tokens_details"].update(forward_passes=4),
    "rate": lambda answer: usage(answer)["completion_tokens_details"].update(tokens_per_forward=1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_is_noticed(subject: Subject, right: tuple[dict[str, Any], Answer], change: str) -> None:
    body, answer = right
    assert list(judge(subject, body, answer)) == []
    wrong = deepcopy(answer)
    CHANGES[change](wrong)
    assert list(judge(subject, body, wrong))


def test_a_stop_ends_with_the_token_that_completes_it(subject: Subject) -> None:
    tokens = [FIRST, SECOND, THIRD]
    stop = subject.decode(tokens)[len(subject.decode(tokens[:1])) :][:3]
    body = {"prompt": [5, 6], "max_tokens": 3, "stop": stop, "sampler": "topk"}
    passes = [commit(n + 1, [n], [token]) for n, token in enumerate(tokens)]
    text = subject.decode(tokens[:1])
    count = next(n for n in range(4) if stop in subject.decode(tokens[:n]))
    assert list(judge(subject, body, answer_of(subject, passes[:count], tokens[:count], text, "stop"))) == []
    later = [problem.kind for problem in judge(subject, body, answer_of(subject, passes, tokens, text, "stop"))]
    assert "usage: completion_tokens" in later or count == 3
    longer = [*passes[:count], commit(count + 1, [count], [FOURTH])]
    found = [
        problem.kind
        for problem in judge(
            subject, body | {"max_tokens": 4}, answer_of(subject, longer, tokens[:count], text, "stop")
        )
    ]
    assert found == ["a forward after the stop"]


def test_an_end_of_text_counts_and_is_not_shown(subject: Subject) -> None:
    (end,) = subject.ends
    body = {"prompt": [5, 6], "max_tokens": 4, "sampler": "topk"}
    passes = [commit(1, [1], [end], filled=[2, 3]), commit(2, [0], [FIRST])]
    right = answer_of(subject, passes, [FIRST, end], subject.decode([FIRST]), "stop")
    assert list(judge(subject, body, right)) == []
    assert list(judge(subject, body | {"ignore_eos": True}, right)), "then it is a token like others"


def test_answers_that_differ(right: tuple[dict[str, Any], Answer]) -> None:
    _, answer = right
    assert list(differences(answer, deepcopy(answer))) == []
    for change in ("text", "finish", "token", "forwards"):
        other = deepcopy(answer)
        CHANGES[change](other)
        assert list(differences(answer, other))
    assert list(differences(answer, Answer(400, error={"message": "no"})))
