"""Worker extension for vLLM: gives the model access to the requests of a batch."""

from typing import Any

from server.backends.vllm.denoiser import Scheduled


class InstructedWorker:
    """Mixin for vLLM's worker class (`worker_extension_cls`), called once through `collective_rpc`."""

    model_runner: Any

    def show_batches_to_model(self) -> None:
        """Let the model read the instructions of the batch's requests in each forward pass."""
        runner = self.model_runner

        def scheduled() -> list[Scheduled]:
            batch = runner.input_batch
            # A canvas is never split: encoder-only attention allows neither chunked prefill nor a prefix cache.
            lengths = batch.num_prompt_tokens[: batch.num_reqs].tolist()
            asked = [params.extra_kwargs for params in batch.get_pooling_params()]
            return list(zip(lengths, asked, strict=True))

        runner.get_model().scheduled = scheduled
