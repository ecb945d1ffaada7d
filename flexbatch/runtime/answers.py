"""What becomes of rows: tokens are appended, endings found, results made. It computes nothing and knows no tiers."""

from __future__ import annotations

from flexbatch.kernels.sampling import NO_TOKEN
from flexbatch.requests import FinishReason, Result, RowError, TokenizedRequest, TokenLogprobs
from flexbatch.runtime.micro_batch import Readout
from flexbatch.runtime.run_progress import RunProgress
from flexbatch.scheduler.scheduler import Scheduler
from flexbatch.scheduler.sequence import Sequence
from flexbatch.scheduler.sweep import Slice
from flexbatch.text.codec import TextCodec
from flexbatch.text.stops import TextStream


class Answers:
    """The rows of one run; ``codec`` may be None for rows of token ids."""

    def __init__(self, eos_token_ids: tuple[int, ...], codec: TextCodec | None, progress: RunProgress) -> None:
        self._eos = eos_token_ids
        self._codec = codec
        self._progress = progress
        self._streams: dict[int, TextStream] = {}  # of rows with stop strings

    def advance(self, scheduler: Scheduler, piece: Slice, readout: Readout) -> bool:
        """Give a sequence what was read off for it; True if that finishes it."""
        sequence = piece.sequence
        if readout.prompt_values:
            scheduler.scored(piece, readout.prompt_values, readout.prompt_top, readout.prompt_branches)
        if readout.token is None:
            # A prompt cut over several micro-batches is scored when its last slice is.
            if not sequence.wants_tokens and sequence.pending == 0 and piece.stop == sequence.computed:
                sequence.finish_reason = "length"
            return sequence.finish_reason is not None
        if readout.token == NO_TOKEN:
            sequence.finish_reason = "error"
            return True
        sequence.tokens.append(readout.token)
        sequence.logprobs.values.append(readout.logprob)
        sequence.logprobs.top.append(readout.top)
        sequence.finish_reason = self._ending(sequence, readout.token)
        return sequence.finish_reason is not None

    def _ending(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.source.request.params
        if (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids:
            return "stop"
        if params.stop and self._codec is not None:
            stream = self._streams.setdefault(sequence.source.index, TextStream(self._codec, params.stop))
            if stream.append(token):
                return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def result(self, sequence: Sequence) -> Result:
        """The result of a sequence that is finished."""
        generated = sequence.generated
        stream = self._streams.pop(sequence.source.index, None)
        if sequence.finish_reason == "error":
            message = "the model's logits are not finite (NaN or infinity): try --dtype float32"
            return self.failed(sequence.source, RowError("not_finite", message))
        if stream is not None:
            text = stream.text
        else:
            text = self._codec.decode(generated) if self._codec is not None else ""
        self._progress.rows_done += 1
        assert sequence.finish_reason is not None
        return Result(
            id=sequence.source.request.id,
            text=text,
            token_ids=tuple(generated),
            finish_reason=sequence.finish_reason,
            prompt_tokens=sequence.prompt_len,
            completion_tokens=len(generated),
            logprobs=self._logprobs(sequence),
            lora=sequence.source.request.lora,
        )

    def _logprobs(self, sequence: Sequence) -> TokenLogprobs | None:
        if sequence.source.request.params.logprobs is None:
            return None
        own = sequence.logprobs
        if not sequence.scores_prompt:
            return TokenLogprobs(tuple(sequence.generated), tuple(own.values), tuple(own.top))
        prompt = sequence.prompt_logprobs
        skipped = max(1, sequence.source.score_from)
        values = (*(None,) * skipped, *prompt.values, *own.values)
        return TokenLogprobs(tuple(sequence.tokens), values, (*({},) * skipped, *prompt.top, *own.top))

    def failed(self, request: TokenizedRequest, error: RowError) -> Result:
        """The result of a row that could not be computed."""
        self._progress.rows_done += 1
        self._progress.rows_failed += 1
        return Result(
            id=request.request.id,
            text="",
            token_ids=(),
            finish_reason="error",
            prompt_tokens=len(request.token_ids),
            completion_tokens=0,
            lora=request.request.lora,
            error=error,
        )
