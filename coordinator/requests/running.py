"""One client's request while it runs: its samples, and what its call is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from outrider.coordinator.requests.acceptance_rate import Acceptance, Everyone
from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.requests.service_state import ServiceState
from outrider.coordinator.requests.statistics import Statistics
from outrider.coordinator.requests.text.detokenize import Decoder
from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.text.stopping import Finish, TokenStops
from outrider.coordinator.requests.validation import GenerationRequest
from outrider.protos import generation_pb2 as pb


class Job:
    """The samples of one request. The round loop ends them, the client's call drains them."""

    def __init__(
        self,
        request: GenerationRequest,
        decoder: Decoder | None,
        ids: Iterator[int],
        arrived_ns: int,
        everyone: Everyone,
        *,
        draft: PrefixCache,
        verify: PrefixCache,
    ) -> None:
        """``ids`` gives sequence ids; ``everyone``: what new sequences lean on; ``draft`` and
        ``verify`` know what the services have of other sequences."""
        self.request = request
        self.changed = asyncio.Event()
        """Set when there may be something to drain."""
        self.error: Exception | None = None
        self._announced: set[int] = set()
        self._reported: set[int] = set()
        self._over: set[int] = set()
        self.samples: list[Sequence] = []
        for index in range(request.num_samples):
            self.samples.append(
                Sequence(
                    sequence_id=next(ids),
                    request=request,
                    sample_index=index,
                    decoding=request.sample_decoding(index),
                    output=self._output(decoder),
                    acceptance=Acceptance(everyone),
                    statistics=Statistics(arrived_ns),
                    draft=ServiceState(cache=draft),
                    verify=ServiceState(cache=verify),
                    parent=self.samples[0] if index else None,
                )
            )

    @property
    def done(self) -> bool:
        """Whether the last message of every sample has been drained."""
        return len(self._reported) == len(self.samples)

    def end(self, finish: Finish) -> None:
        """Ends all samples that are not over."""
        for sample in self.samples:
            sample.output.end(finish)

    def close(self, sample: Sequence) -> None:
        """The round loop is done with a sample: its statistics are final."""
        self._over.add(sample.sample_index)
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """The request can't go on; the first error stands."""
        if self.error is None:
            self.error = error
        self.changed.set()

    def drain(self) -> Iterator[pb.GenerateResponse]:
        """The messages that are due, each sample's Finished last."""
        for sample in self.samples:
            index = sample.sample_index
            if index in self._reported:
                continue
            over = index in self._over
            if index not in self._announced:
                if not (sample.statistics.admitted_ns or over):
                    continue
                self._announced.add(index)
                yield pb.GenerateResponse(sample_index=index, started=self._started(sample))
            delta = sample.output.fetch()
            if delta is not None:
                yield pb.GenerateResponse(sample_index=index, delta=delta)
            if over and sample.output.finish is not None:
                self._reported.add(index)
                yield pb.GenerateResponse(sample_index=index, finished=self._finished(sample))

    def _output(self, decoder: Decoder | None) -> Output:
        request = self.request
        output = Output(
            decoder,
            request.prompt_ids,
            stop_strings=request.stop_strings,
            stops=TokenStops(request.eos_token_ids, request.stop_token_ids, request.max_new_tokens),
            echo=request.prompt_text if request.echo else None,
            wake=self.changed.set,
        )
        if request.resume_ids:
            output.resume(request.resume_ids)
        return output

    def _started(self, sample: Sequence) -> pb.Started:
        return pb.Started(
            request_id=self.request.request_id,
            prompt_tokens=len(self.request.prompt_ids),
            seed=sample.decoding.seed,
        )

    def _finished(self, sample: Sequence) -> pb.Finished:
        finish = sample.output.finish
        assert finish is not None
        return pb.Finished(
            reason=int(finish.reason),  # type: ignore[arg-type]
            stop_string=finish.stop_string,
            stop_token_id=finish.stop_token_id,
            usage=pb.Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=sample.output.emitted,
                cached_prompt_tokens=sample.statistics.cached_prompt_tokens,
            ),
            speculation=sample.statistics.message(),
            seed=sample.decoding.seed,
        )
