"""Queries of rows with several views, and of several parts together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.forward.query import Mixture, Query
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import StatisticsRequest
from samplers.loop.opened import Opened
from samplers.loop.part import Part


def with_views(part: Part, opened: Opened, wanted: StatisticsRequest) -> Query:
    """Query of a part in which some rows have several views."""
    device, position = part.batch.device, opened.asked_positions()
    counts = opened.asked.sum(dim=1).tolist()
    canvases: list[Canvas] = []
    spans: list[ForwardSpan] = []
    rows, places, answers, weights = [], [], [], []
    first = 0
    for each, count, own in zip(part.rows, counts, opened.spans, strict=True):
        layout = each.canvas.layout
        for view in each.views:  # copy commits since the last step
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
        first += count
    mixture = Mixture(torch.cat(answers), torch.cat(weights), first, [each.view_count for each in part.rows])
    return Query(canvases, spans, torch.cat(rows), torch.cat(places), wanted, mixture)


def together(queries: Sequence[Query]) -> Query:
    """Query of several parts, concatenated."""
    if len(queries) == 1:
        return queries[0]
    counts = [len(each.position) if each.mixture is None else each.mixture.count for each in queries]
    canvases: list[Canvas] = []
    spans: list[ForwardSpan] = []
    rows: list[Tensor] = []
    for each in queries:
        rows.append(each.row + len(canvases))
        canvases += each.canvases
        spans += each.spans
    position = torch.cat([each.position for each in queries])
    wanted = StatisticsRequest.join([each.wanted for each in queries], counts, queries[0].row.device)
    return Query(canvases, spans, torch.cat(rows), position, wanted, _mixed(queries, counts))


def _mixed(queries: Sequence[Query], counts: Sequence[int]) -> Mixture | None:
    """Mixture of several queries; None if none of them has one."""
    if all(each.mixture is None for each in queries):
        return None
    answers, weights = [], []
    views: list[int] = []
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
