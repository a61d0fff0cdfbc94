"""The query of the next forward: the open windows of a part, and the statistics that its rules request."""

from functools import partial

import torch
from torch import Tensor

from samplers.forward.query import Query
from samplers.forward.statistics import LogitBonus, Statistic, StatisticsRequest
from samplers.forward.token_choice import TokenChoices
from samplers.loop import hooks
from samplers.loop.contexts import answers
from samplers.loop.numbers import N
from samplers.loop.opened import Opened, open_windows, settle_asked
from samplers.loop.part import Part
from samplers.loop.views import with_views
from samplers.randomness import TOKENS, uniform


def ask(part: Part) -> tuple[Query, Opened]:
    """The query of the next step of a part's rows, none of them finished.

    A row whose sampler fails here still takes part in the forward; `Opened.failed` holds its error.
    """
    opened = open_windows(part)
    _place_windows(part, opened)
    settle_asked(part, opened)
    opened.spans = part.spans()
    wanted = _request(part, opened)
    if not part.one_view:
        return with_views(part, opened, wanted), opened
    if part.zero_based:
        place = part.canvas_places.view(-1).index_select(0, opened.flat)
    else:
        place = opened.asked_positions() + part.prompt.index_select(0, opened.row)
    return Query(part.canvases, [spans[0] for spans in opened.spans], opened.row, place, wanted), opened


def _place_windows(part: Part, opened: Opened) -> None:
    """Let rules place their windows of candidates."""
    for members in part.members:
        if "window" not in members.traits.hooks[0]:
            continue
        for index, found in answers(part, opened, members, 0, partial(hooks.window, members.sampler)):
            n, position, block = opened.numbers[index], opened.position[index], opened.block[index]
            settled = n[:, N.SETTLED, None]
            start, stop = found.start.minimum(settled), found.stop.maximum(settled + 1)
            inside = opened.masked[index] & (position >= start) & (position < stop)
            confined = n[:, N.CONFINED, None] > 0
            candidate = opened.candidate.clone()
            candidate[index] = torch.where(confined, inside & block, inside)
            opened.candidate = candidate


def _request(part: Part, opened: Opened) -> StatisticsRequest:
    names, row = part.statistics, opened.row
    choices = _choices(part, opened)
    numbers = None
    opened.judged = part.judged
    if choices is not part.choices and part.judging and choices is not None:
        opened.judged = part.judged_with(choices)
    if choices is not None:
        choices = choices[row]
        n = opened.numbers
        numbers = uniform(n[row, N.SEED], n[row, N.STEPS], opened.asked_positions(), TOKENS)
    return StatisticsRequest(
        statistics=frozenset(Statistic(name) for name in names if name != "top"),
        only={name: wish.index_select(0, row) for name, wish in names.items() if wish is not None},
        choices=choices,
        uniform=numbers,
        top=max(each.traits.top for each in part.members),
        named=_named(part, opened),
        bonus=_bonus(part, opened),
    )


def _choices(part: Part, opened: Opened) -> TokenChoices | None:
    """Token choice of each row in this step, [rows]; None if all rows are greedy and unfiltered."""
    choices = part.choices
    for members in part.members:
        if "choice" not in members.traits.hooks[0]:
            continue
        for index, found in answers(part, opened, members, 0, partial(hooks.choice, members.sampler)):
            if choices is None:
                zero = torch.zeros(len(part.rows), dtype=torch.float64, device=part.batch.device)
                choices = TokenChoices(zero, zero + 1, zero.long())
            elif choices is part.choices:
                choices = choices[torch.arange(len(part.rows), device=part.batch.device)]
            choices.temperature[index], choices.top_p[index] = found.temperature, found.top_p
            choices.top_k[index] = found.top_k
    return choices


def _named(part: Part, opened: Opened) -> Tensor | None:
    """Tokens that rules and modifiers name at each requested position, int64 [n, m], -1: unused."""
    found: list[tuple[Tensor, int, Tensor]] = []
    for members in part.members:
        first = 0
        for layer, owner in members.asking("name_tokens"):
            hook = partial(hooks.names, owner, vocabulary=members.rows[0].vocabulary)
            named = list(answers(part, opened, members, layer, hook))
            width = max((each.shape[2] for _, each in named), default=0)
            found += [(at, first, each) for at, each in named]
            if width:
                opened.named[members.number, layer] = first, first + width
            first += width
    if not found:
        return None
    most = max(first + each.shape[2] for _, first, each in found)
    grid = torch.full((*opened.asked.shape, most), -1, device=part.batch.device)
    for at, first, each in found:
        grid[at, :, first : first + each.shape[2]] = each
    return grid.view(-1, most).index_select(0, opened.flat)


def _bonus(part: Part, opened: Opened) -> LogitBonus | None:
    """Additions to logits by rules and modifiers, by requested position."""
    parts: list[LogitBonus] = []
    number: Tensor | None = None
    for members in part.members:
        for layer, owner in members.asking("bonus"):
            hook = partial(hooks.bonus, owner, vocabulary=members.rows[0].vocabulary)
            for at, each in answers(part, opened, members, layer, hook):
                if number is None:
                    number = (opened.asked.view(-1).cumsum(0) - 1).view(opened.asked.shape)
                there = (each.token >= 0) & opened.asked[at][:, :, None]
                index = number[at][:, :, None].expand(there.shape)[there]
                parts.append(LogitBonus(index, each.token[there], each.value[there]))
    return LogitBonus.join(parts) if parts else None
