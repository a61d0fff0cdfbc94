"""What the next forward is asked: the open windows of a part, and what its rules want to know of them."""

from typing import Any

import torch
from torch import Tensor

from samplers.contract import StepContext, TokenBonus
from samplers.forward.query import Mixture, Query
from samplers.forward.statistics import LogitBonus, Statistic, StatisticsRequest
from samplers.forward.token_choice import TokenChoices
from samplers.loop import guard
from samplers.loop.numbers import N
from samplers.loop.part import Opened, Part
from samplers.randomness import TOKENS, uniform


def ask(part: Part) -> tuple[Query, Opened]:
    """The query of the next step of a part's rows, none of them finished.

    A row whose sampler fails when it is asked is in the forward all the same; `Opened.failed` says why it goes no
    further.
    """
    opened = part.open()
    row, column = opened.asked.nonzero(as_tuple=True)
    position = opened.position[row, column]
    opened.spans = [row_.spans() for row_ in part.rows]
    wanted = _request(part, opened, row, position)
    if all(len(spans) == 1 for spans in opened.spans):
        canvases, spans = [each.canvas for each in part.rows], [spans[0] for spans in opened.spans]
        return Query(canvases, spans, row, position + opened.numbers[row, N.PROMPT], wanted), opened
    return _with_views(part, opened, row, position, wanted), opened


def _request(part: Part, opened: Opened, row: Tensor, position: Tensor) -> StatisticsRequest:
    names = part.statistics
    choices = _choices(part, opened)
    numbers = None
    if part.judging:
        drawn = torch.zeros(len(part.rows), device=row.device) if choices is None else choices.temperature
        opened.judged = part.judges & (drawn > 0)
    if choices is not None:
        choices = choices[row]
        n = opened.numbers
        numbers = uniform(n[row, N.SEED], n[row, N.FORWARDS], position, TOKENS)
    return StatisticsRequest(
        statistics=frozenset(Statistic(name) for name in names if name != "top"),
        only={name: wish[row] for name, wish in names.items() if wish is not None},
        choices=choices,
        uniform=numbers,
        top=max(each.traits.top for each in part.members),
        named=_named(part, opened),
        bonus=_bonus(part, opened),
    )


def _choices(part: Part, opened: Opened) -> TokenChoices | None:
    """How each row's tokens are chosen in this step, [rows]; None where all take the likeliest, of everything."""
    choices = part.choices
    for members in part.members:
        if "choice" not in members.traits.hooks[0]:
            continue

        def hook(context: StepContext[Any], owner: Any = members.owners[0]) -> TokenChoices | None:
            return guard.choice(owner, context)

        for index, found in part.ask(opened, members, 0, hook):
            if found is None:
                continue
            if choices is None:
                rows = len(part.rows)
                zero = torch.zeros(rows, dtype=torch.float64, device=part.batch.device)
                choices = TokenChoices(zero, zero + 1, zero.long())
            elif choices is part.choices:
                choices = choices[torch.arange(len(part.rows), device=part.batch.device)]
            choices.temperature[index], choices.top_p[index] = found.temperature, found.top_p
            choices.top_k[index] = found.top_k
    return choices


def _named(part: Part, opened: Opened) -> Tensor | None:
    """The tokens that rules and modifiers name at each asked position, int64 [n, m], -1 for none."""
    found: list[tuple[Tensor, int, Tensor]] = []
    for i, members in enumerate(part.members):
        first = 0
        for layer, hooks in enumerate(members.traits.hooks):
            if "name_tokens" not in hooks:
                continue

            def hook(context: StepContext[Any], owner: Any = members.owners[layer], m: Any = members) -> Tensor | None:
                return guard.names(owner, context, m.rows[0].vocabulary)

            answers = [(at, each) for at, each in part.ask(opened, members, layer, hook) if each is not None]
            width = max((each.shape[2] for _, each in answers), default=0)
            found += [(at, first, each) for at, each in answers]
            if width:
                opened.named[i, layer] = first, first + width
            first += width
    if not found:
        return None
    most = max(first + each.shape[2] for _, first, each in found)
    grid = torch.full((*opened.asked.shape, most), -1, device=part.batch.device)
    for at, first, each in found:
        grid[at, :, first : first + each.shape[2]] = each
    return grid[opened.asked]


def _bonus(part: Part, opened: Opened) -> LogitBonus | None:
    """What rules and modifiers add to logits, by asked position."""
    parts: list[LogitBonus] = []
    number: Tensor | None = None
    for members in part.members:
        for layer, hooks in enumerate(members.traits.hooks):
            if "bonus" not in hooks:
                continue

            def hook(
                context: StepContext[Any], owner: Any = members.owners[layer], m: Any = members
            ) -> TokenBonus | None:
                return guard.bonus(owner, context, m.rows[0].vocabulary)

            for at, each in part.ask(opened, members, layer, hook):
                if each is None:
                    continue
                if number is None:
                    number = (opened.asked.view(-1).cumsum(0) - 1).view(opened.asked.shape)
                there = (each.token >= 0) & opened.asked[at][:, :, None]
                index = number[at][:, :, None].expand(there.shape)[there]
                parts.append(LogitBonus(index, each.token[there], each.value[there]))
    return LogitBonus.join(parts) if parts else None


def _with_views(part: Part, opened: Opened, row: Tensor, position: Tensor, wanted: StatisticsRequest) -> Query:
    """The query of rows of which some are seen as several canvases."""
    device = part.batch.device
    counts = opened.asked.sum(dim=1).tolist()
    canvases, spans, rows, places, answers, weights, views = [], [], [], [], [], [], []
    first = 0
    for each, count, own in zip(part.rows, counts, opened.spans, strict=True):
        layout = each.canvas.layout
        for view in each.views:  # what was committed since the last step
            seen = view.canvas
            seen.tokens[seen.layout.prompt_length :][: layout.gen_length] = each.canvas.generated
        at = position[first : first + count]
        answer = torch.arange(first, first + count, device=device)
        for canvas, weight in [(each.canvas, each.weight), *((view.canvas, view.weight) for view in each.views)]:
            rows.append(torch.full((count,), len(canvases), device=device))
            places.append(at + canvas.layout.prompt_length)
            answers.append(answer)
            weights.append(torch.full((count,), weight, dtype=torch.float32, device=device))
            canvases.append(canvas)
        spans += own
        views.append(1 + len(each.views))
        first += count
    mixture = Mixture(torch.cat(answers), torch.cat(weights), first, views)
    return Query(canvases, spans, torch.cat(rows), torch.cat(places), wanted, mixture)


def together(queries: list[Query]) -> Query:
    """One query of several parts, one after the other."""
    if len(queries) == 1:
        return queries[0]
    counts = [len(each.position) if each.mixture is None else each.mixture.count for each in queries]
    rows, canvases, spans = [], [], []
    for each in queries:
        rows.append(each.row + len(canvases))
        canvases += each.canvases
        spans += each.spans
    mixture = None
    if any(each.mixture is not None for each in queries):
        mixture = _mixed(queries, counts)
    return Query(
        canvases,
        spans,
        torch.cat(rows),
        torch.cat([each.position for each in queries]),
        StatisticsRequest.join([each.wanted for each in queries], counts, queries[0].row.device),
        mixture,
    )


def _mixed(queries: list[Query], counts: list[int]) -> Mixture:
    answers, weights, views = [], [], []
    first = 0
    for each, count in zip(queries, counts, strict=True):
        if each.mixture is None:
            answers.append(torch.arange(first, first + count, device=each.row.device))
            weights.append(torch.ones(count, device=each.row.device))
            views += [1] * len(each.canvases)
        else:
            answers.append(each.mixture.answer + first)
            weights.append(each.mixture.weight)
            views += each.mixture.views
        first += count
    return Mixture(torch.cat(answers), torch.cat(weights), first, views)
