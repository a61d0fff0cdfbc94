"""Growth of a forward's time with the canvas, the batch and the vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from samplers import Canvas, get_sampler
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.loading import describe
from server.backends.torch.backend import TorchBackend
from server.bench.results import Measure, Result, spread, timed
from server.bench.subjects import RANDOM, random_network
from server.models.checkpoint.packing import pack_linear_layers
from server.runtime.threads import run_in_own_thread

NAME = "random-30m"
SHAPE = RANDOM | {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 1536}
LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32)
VOCABULARIES = (1_000, 4_000, 16_000, 32_000, 64_000, 128_000)
BLOCK, LENGTH = 32, 128


def measure_growth(
    rounds: int,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    vocabularies: Sequence[int] = VOCABULARIES,
) -> Iterator[Result]:
    """Time of a forward with the statistics of one block per row, as one quantity grows and the others are constant."""
    backend = _model(vocabularies[0])
    yield _growth("growth_canvas_length", lengths, lambda size: _forward(backend, _query([size])), rounds)
    yield _growth("growth_batch", batches, lambda size: _forward(backend, _query([LENGTH] * size)), rounds)
    yield _growth("growth_vocabulary", vocabularies, lambda size: _forward(_model(size), _query([LENGTH] * 4)), rounds)


def _growth(name: str, sizes: Sequence[int], make: Callable[[int], Measure], rounds: int) -> Result:
    """Seconds for every size in turn, round by round; the ratio of the largest to the smallest."""
    forwards = [run_in_own_thread(partial(make, size)) for size in sizes]
    for forward in forwards:
        run_in_own_thread(forward)
    found = [[run_in_own_thread(forward) for forward in forwards] for _ in range(rounds)]
    points = {str(size): sorted(each)[rounds // 2] for size, each in zip(sizes, zip(*found, strict=True), strict=True)}
    ratios = [times[-1] / times[0] for times in found]
    return spread(name, f"seconds at {sizes[-1]} over seconds at {sizes[0]}", ratios, model=NAME, seconds=points)


def _forward(backend: TorchBackend, query: Query) -> Measure:
    return timed(lambda: backend.predict(query))


def _query(lengths: list[int]) -> Query:
    topk = get_sampler("topk")
    canvases = [Canvas.blank([5] * (length - BLOCK), BLOCK, 0) for length in lengths]
    return next_query([Row(canvas, topk, topk.Params()) for canvas in canvases])


def _model(vocabulary: int) -> TorchBackend:
    config = SHAPE | {"vocab_size": vocabulary, "embedding_size": vocabulary, "mask_token_id": 0, "eos_token_id": 1}
    network = random_network(config)
    info = describe("LLaDAModelLM", network)
    pack_linear_layers(network)
    return TorchBackend(network, info)
