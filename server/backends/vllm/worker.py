"""What we add to vLLM's workers: the model gets to see whose canvases are in a batch."""

from typing import Any

from server.backends.vllm.denoiser import Scheduled


class InstructedWorker:
    """Mixed into vLLM's worker class (`worker_extension_cls`); called once through `collective_rpc`."""

    model_runner: Any

    def show_batches_to_model(self) -> None:
        """Let the model read, in each forward, what the batch's requests ask."""
        runner = self.model_runner

        def scheduled() -> list[Scheduled]:
            batch = runner.input_batch
            # A canvas is never computed in parts: encoder-only attention allows neither chunks nor a prefix cache.
            lengths = batch.num_prompt_tokens[: batch.num_reqs].tolist()
            asked = [params.extra_kwargs for params in batch.get_pooling_params()]
            return list(zip(lengths, asked, strict=True))

        runner.get_model().scheduled = scheduled
