"""A flexbatch model as lm-evaluation-harness sees one: all requests of a kind are one batch.

Tokenization, truncation and stop rules are those of the harness's own Hugging Face backend, so that scores are
comparable. Knows nothing of tasks; needs the package lm_eval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flexbatch.api import LLM
from flexbatch.errors import InputError, UsageError
from flexbatch.evaluation.generation import DEFAULT_NEW_TOKENS, GenerationSettings
from flexbatch.sampling import SamplingParams

TokenizedPair = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]
Item = TypeVar("Item")
_LIKELIEST = 1000  # tokens after a context whose log-probabilities are looked at


class FlexbatchLM(TemplateLM):  # type: ignore[misc]  # it has no types
    """``llm`` behind the harness's interface.

    ``lora`` names the adapter that answers; ``template`` replaces the model's chat template; ``seed`` is for requests
    that sample; ``max_length`` shortens the window. What finishes goes to the harness's cache at once, so that an
    interrupted evaluation resumes; ``computed`` counts it. Raises UsageError for a model without a tokenizer.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        name: str = "flexbatch",
        lora: str | None = None,
        template: str | None = None,
        seed: int = 0,
        max_length: int | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = llm.tokenizer
        self._llm = llm
        self._name = name
        self._lora = lora
        self._template = template
        self._seed = seed
        self._quiet = quiet
        self.computed = 0
        self.max_length = min(max_length or llm.window, llm.window)
        self.max_gen_toks = DEFAULT_NEW_TOKENS
        self._special = {
            added.content: token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special
        }

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What tells this model's chat prompts from others in the harness's cache of requests."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode with the tokenizer's default special tokens, but never a second beginning of sequence."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template in use, for the harness's records."""
        if self._template is not None and chat_template:
            return self._template
        found: str | None = super().chat_template(chat_template)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without a generation prompt its last message is left open. InputError: it is refused."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses a chat of the task: {reason}: leave --chat out") from error
        return str(text)

    # --- the three kinds of requests -----------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[TokenizedPair], **_: Any) -> list[Answer]:
        for _key, _context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, the model's window {self.max_length}: shorten it"
                )
        pairs = [
            (context[-(self.max_length + 1 - len(continuation)) :], continuation)
            for _, context, continuation in requests
        ]
        answers: dict[int, Answer] = {}
        for place, answer in self._shown(self._answered(pairs), len(pairs), "log-likelihoods"):
            answers[place] = answer
            key = requests[place][0]
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return [answers[place] for place in range(len(requests))]

    def _answered(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Answer]]:
        """Yield (place, answer) of every pair. Choices of one token after one context are read off one row."""
        asked: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for place, (context, continuation) in enumerate(pairs):
            if len(continuation) == 1:
                asked.setdefault(tuple(context), {}).setdefault(continuation[0], []).append(place)
        shared = [(context, tokens) for context, tokens in asked.items() if len(tokens) > 1]
        left = set(range(len(pairs)))
        likeliest = SamplingParams(max_tokens=1, logprobs=_LIKELIEST, ignore_eos=True)
        for number, result in self._llm.generate_each([context for context, _ in shared], likeliest, lora=self._lora):
            top = result.logprobs.top_logprobs[0] if result.logprobs is not None else {}
            best = next(iter(top), None)
            for token, places in shared[number][1].items():
                for place in places if token in top else ():
                    left.remove(place)
                    yield place, (top[token], token == best)
        # What is not among the likeliest tokens has to be asked for by name, as longer continuations are.
        rest = sorted(left)
        for number, score in self._llm.score_each([pairs[place] for place in rest], lora=self._lora):
            yield rest[number], (score.logprob, score.is_greedy)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Return the log-likelihood of each whole text; long ones in windows, each token predicted once."""
        windows: list[TokenizedPair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        left = Counter(owners)
        pairs = [(context, continuation) for _, context, continuation in windows]
        for place, score in self._shown(self._llm.score_each(pairs, lora=self._lora), len(pairs), "windows"):
            number = owners[place]
            totals[number] += score.logprob
            left[number] -= 1
            if left[number] == 0:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, totals[number])
        return totals

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Generate after each context until one of its stop texts; contexts too long lose their beginning."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for request in requests:
            context, given = request.args
            settings = GenerationSettings.read(given)
            room = self.max_length - settings.max_tokens
            if room <= 0:
                raise UsageError(
                    f"max_gen_toks {settings.max_tokens}: the model's window of {self.max_length} leaves nothing for "
                    "the prompt: lower it with --gen-kwargs max_gen_toks=N"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(settings.params([self.eot_token_id], self._special, self._seed))
        texts: dict[int, str] = {}
        results = self._llm.generate_each(prompts, params, lora=self._lora)
        for place, result in self._shown(results, len(prompts), "generations"):
            if result.error is not None:
                raise InputError(f"request {place}: {result.error.message}")
            texts[place] = result.text
            self.cache_hook.add_partial("generate_until", requests[place].args, result.text)
        return [texts[place] for place in range(len(requests))]

    def _shown(self, results: Iterable[Item], count: int, what: str) -> Iterator[Item]:
        for item in tqdm(results, total=count, desc=what, disable=self._quiet or None):
            self.computed += 1
            yield item
