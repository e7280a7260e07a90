"""A runtime as a model of lm-evaluation-harness (extra `tasks`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from bluelm.errors import InputError
from bluelm.system.progress import Progress, Silent
from bluelm.text.tokenizer import Tokenizer
from eval.accuracy.metrics import nll_of_logits
from targets.host.generation import generate, until
from targets.runtime import Runtime

COUNTS = "counts"  # key beside the answers
ANSWER_TOKENS = 256  # where a task does not say how long an answer may get


class HarnessModel(TemplateLM):
    """Scores and writes continuations with a runtime. Prompts begin with the token that begins a text.

    Attributes:
        prompts: how many the tasks asked. cut: how many of them were longer than the context, and lost their front.
        full: how many answers ended because the context was full.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        ends: Collection[int],
        name: str = "model",
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.prompts = self.cut = self.full = 0
        self._runtime = runtime
        self._text = tokenizer
        self._ends = frozenset(ends)
        self._name = name
        self._progress = progress or Silent()
        self._context: list[int] | None = None
        self._behind: NDArray[np.float32] | None = None  # logits [1, vocab] behind self._context

    @property
    def note(self) -> str:
        """What the context's length did to prompts and answers, for the report."""
        cut = f"{self.cut} of {self.prompts} prompts lost their front: the context holds {self.max_length} tokens"
        full = f"{self.full} answers ended where the context was full"
        return "; ".join([cut] * (self.cut > 0) + [full] * (self.full > 0))

    @property
    def eot_token_id(self) -> int:
        return min(self._ends)

    @property
    def prefix_token_id(self) -> int:
        return self._text.front[-1] if self._text.front else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation together."""
        return self._runtime.context

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep answers in a file; what an earlier, broken-off run kept there counts as well."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            self.prompts, self.cut, self.full = cache_hook.dbdict.counts(COUNTS)

    def _keep(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        self.cache_hook.add_partial(kind, arguments, answer)
        if self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict[COUNTS] = (self.prompts, self.cut, self.full)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a task's text, which is data: marks in it are spelled out."""
        return self._text.encode(string, bos=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The harness's own, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation behind its context, and whether it is what greedy decoding would write."""
        found = []
        with self._progress.task(f"tasks: score with {self._name}", total=len(requests)) as task:
            for (context_text, text), context, continuation in requests:
                if not continuation:  # the tokenizer joined it to the context's last token
                    continuation = self._text.encode(text)
                found.append(self._score(context, continuation))
                self._keep("loglikelihood", (context_text, text), found[-1])
                task.advance()
        return found

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        self.prompts += 1
        if len(continuation) >= self.max_length:
            raise InputError(
                f"a choice of {len(continuation)} tokens does not fit the context of {self.max_length}",
                fix="export with a larger --context",
            )
        kept = self._fitting(context, self.max_length - len(continuation) + 1)
        if len(continuation) == 1:  # choices such as A, B, C, D share their question
            if kept != self._context:
                self._context, self._behind = kept, self._runtime.logits(kept)[-1:]
            assert self._behind is not None
            rows = self._behind  # [1, vocab]
        else:
            rows = self._runtime.logits([*kept, *continuation[:-1]])[-len(continuation) :]  # [n, vocab]
        nats = -nll_of_logits(rows, np.array(continuation)).sum()
        return float(nats), bool((rows.argmax(axis=-1) == continuation).all())

    def _fitting(self, context: Sequence[int], room: int) -> list[int]:
        """The end of the context, behind what begins a text."""
        context = list(context)
        if len(context) <= room:
            return context
        self.cut += 1
        front = list(self._text.front)
        begin = front if context[: len(front)] == front and room > len(front) else []
        return [*begin, *context[len(context) - room + len(begin) :]]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, each token behind as many before it as the context holds."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            pairs = [(("", ""), *make_disjoint_window(pair)) for pair in windows]
            totals.append(sum(self._score(context, continuation)[0] for _, context, continuation in pairs))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each ended by a stop string, an end token or its length."""
        found = []
        with self._progress.task(f"tasks: answer with {self._name}", total=len(requests)) as task:
            for request in requests:
                arguments: tuple[Any, ...] = request.args
                found.append(self._answer(*arguments[:2]))
                self._keep("generate_until", arguments, found[-1])
                task.advance()
        return found

    def _answer(self, prompt: str, settings: dict[str, Any]) -> str:
        """One answer.

        Raises:
            InputError: the task draws its answers at random, which no two models do alike.
        """
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise InputError("the task draws answers at random; only greedy ones are comparable")
        self.prompts += 1
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        longest = int(settings.get("max_gen_toks", ANSWER_TOKENS))
        room = self.max_length - min(longest, self.max_length // 2)  # half of the context at least is the prompt's
        tokens = self._fitting(self.tok_encode(prompt), room)
        text, stream, count = "", self._text.stream(continues=True), 0
        new = generate(self._runtime, tokens, longest, lambda logits: int(logits.argmax()))
        for token in until(new, self._ends):
            text += stream.push(token)
            count += 1
            at = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
            if at is not None:
                return text[:at]
        self.full += count < longest and len(tokens) + count >= self.max_length
        return text + stream.flush()
