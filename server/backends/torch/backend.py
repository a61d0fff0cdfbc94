"""Backend for our own model code on CPU or CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.forward.prediction import Prediction
from samplers.forward.query import Mixture, Query
from samplers.forward.span import KVSlot
from samplers.forward.statistics import StatisticsRequest
from samplers.forward.summary import summarise
from server.backends.contract import ModelInfo
from server.models.checkpoint.compiling import padded_size
from server.models.network import Network
from server.models.ragged_batch import KeyValues, RaggedBatch, Segment

LOGIT_ELEMENTS = 1 << 24
"""Maximum number of logits held at a time: candidates are processed in chunks."""


class TorchBackend:
    """Packs all spans into one forward; computes last outputs, head and statistics for candidates only.

    Args:
        batch_invariant: compute each canvas on its own, since the rounding of matrix products depends on their size.
        static_shapes: pad forwards to a few fixed sizes, for compiled layers.
    """

    def __init__(
        self, network: Network, info: ModelInfo, batch_invariant: bool = False, static_shapes: bool = False
    ) -> None:
        self.batch_invariant = batch_invariant
        self.static_shapes = static_shapes
        self.network = network.eval()
        self.info = info
        self.device = torch.device(info.device)

    @torch.inference_mode()
    def predict(self, query: Query) -> Prediction:
        if self.batch_invariant:
            parts = [self._together(query.part(i, i + 1)) for i in range(query.generations)]
            found = Prediction.join(parts)
        else:
            found = self._together(query)
        return found if query.row.device == found.token.device else found.cpu()

    def _together(self, query: Query) -> Prediction:
        batch, back = self.pack(query)
        if self.static_shapes and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the last forward's outputs may be overwritten
        hidden = self.network.packed(batch)
        back = back.to(self.device, non_blocking=True)
        wanted = query.wanted.to(self.device)
        size = max(1, LOGIT_ELEMENTS // self.info.vocab_size)
        if query.mixture is not None:
            return self._mixed(query.mixture, hidden[back], wanted, size)
        parts: list[Prediction] = []
        kept: list[Tensor] = []
        for start in range(0, max(1, len(back)), size):  # a query may request no positions
            logits, asked = self.network.head(hidden[back[start : start + size]]), wanted.part(start, start + size)
            parts.append(self.say(logits, asked))
            if (said := self.network.self_conditioning(logits, asked)) is not None:
                kept.append(said)
        if kept:
            self._keep(query, torch.cat(kept))
        return Prediction.join(parts)

    def _mixed(self, mixture: Mixture, hidden: Tensor, wanted: StatisticsRequest, size: int) -> Prediction:
        """Statistics of weighted sums of logits."""
        return Prediction.join(
            [
                self.say(part.mix(self.network.head(hidden[part.asked])), wanted.part(part.first, part.last))
                for part in mixture.parts(size)
            ]
        )

    def say(self, logits: Tensor, wanted: StatisticsRequest) -> Prediction:
        """Statistics of logits [n, vocabulary]."""
        return summarise(logits, self.info.mask_id, wanted)

    def _keep(self, query: Query, said: Tensor) -> None:
        """Store a forward's output for each canvas for the next one, once the whole forward has succeeded."""
        counts = torch.bincount(query.row, minlength=len(query.canvases)).tolist()
        for feed, part in zip(query.spans, torch.split(said, counts), strict=True):
            if feed.memory is not None and feed.draft is not None:
                assert isinstance(feed.memory.content, KeyValues)
                feed.memory.content.self_conditioning = feed.draft, part

    def pack(self, query: Query) -> tuple[RaggedBatch, Tensor]:
        """The batch of a query, and the index in its output of each requested position, [n]."""
        counts = torch.bincount(query.row, minlength=len(query.canvases)).tolist()
        rows = [
            Segment(
                feed.start,
                feed.stop,
                count,
                feed.visible or canvas.layout.length,
                self._memory(feed.memory, canvas.layout.length),
                feed.causal_block,
                feed.draft or 0,
            )
            for canvas, feed, count in zip(query.canvases, query.spans, counts, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: (rows[i].shape, rows[i].wanted))
        first, asked = [0] * len(rows), [0] * len(rows)
        tokens = positions = 0
        for i in order:
            first[i], asked[i] = tokens - rows[i].start, positions
            tokens += rows[i].fed
            positions += rows[i].wanted
        device = query.row.device
        ends = torch.tensor(counts, device=device).cumsum(0)
        place = torch.arange(len(query.row), device=device) - (ends - torch.tensor(counts, device=device))[query.row]
        back = place + torch.tensor(asked, device=device)[query.row]
        wanted = torch.empty_like(back)
        output = query.position
        if self.network.pattern.shifted:
            output = (output - 1).maximum(torch.tensor([row.start for row in rows], device=device)[query.row])
        wanted[back] = output + torch.tensor(first, device=device)[query.row]
        ids = torch.cat([query.canvases[i].tokens[rows[i].start : rows[i].stop] for i in order])
        if self.static_shapes:
            ids, wanted = (F.pad(each, (0, padded_size(len(each)) - len(each))) for each in (ids, wanted))
        batch = RaggedBatch(
            [rows[i] for i in order],
            ids.to(self.device, non_blocking=True),
            wanted.to(self.device, non_blocking=True),
        )
        return batch, back

    def _memory(self, memory: KVSlot | None, length: int) -> KeyValues | None:
        """Room for the keys and values of a canvas, allocated on first use."""
        if memory is None:
            return None
        if memory.content is None:
            memory.content = self.network.new_kv_cache(length, getattr(torch, self.info.dtype), self.device)
        assert isinstance(memory.content, KeyValues)
        return memory.content

    def close(self) -> None:
        del self.network
