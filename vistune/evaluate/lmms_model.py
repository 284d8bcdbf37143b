"""The models that lmms-eval runs: its requests answered by `vistune.generate`, in batches, on each process's device.

Imported by lmms-eval alone, which is therefore there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lmms_eval.api.model import lmms

from vistune import console, decoding, generate, ranks, speech
from vistune.evaluate import likelihood
from vistune.evaluate.lmms import Asked, Manner, asked, conversation, cut, manner

T = TypeVar("T")
WINDOW = 8
"""So many batches of prompts are made at once; prompts of near lengths within them run together."""
ROUNDS = 64
"""A task of several rounds that has not ended by then never will."""
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": ""}


class _Model(lmms):
    """What both kinds share. Arguments as of `vistune evaluate`; `model` and `dtype` are what other adapters say."""

    def __init__(
        self,
        pretrained: str = "",
        *,
        model: str = "",
        device: str | None = None,
        precision: str = "",
        dtype: str = "",
        quantize: str = "",
        template: str = "",
        base: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Opens the model on this process's device. ValueError for one that cannot be opened, and for no number as
        the batch size (`max_batch_size` is for adapters that look for one)."""
        super().__init__()
        if not (pretrained or model):
            raise ValueError("--model_args: which model? Say pretrained=FOLDER")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"--batch_size {batch_size}: say a number from 1")
        self.batch_size = int(batch_size)
        self.loaded: Any = generate.open_model(
            pretrained or model,
            device or "auto",
            quantize,
            base or None,
            template=template,
            precision=precision or NAMES.get(dtype, dtype),
        )
        self.device: torch.device = self.loaded.model.device
        self._rank, self._world_size = ranks.rank(), ranks.world()
        self._told: set[tuple[str, ...]] = set()

    @abstractmethod
    def said(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of generation in a request of one round or several."""

    @abstractmethod
    def question(self, args: tuple[Any, ...]) -> Asked:
        """What a request, or its first round, asks."""

    @abstractmethod
    def round(self, args: tuple[Any, ...], **told: Any) -> tuple[Asked | None, list[str], Any]:
        """What a later round asks (None: it was the last), the answers so far as the task wants them, its notes."""

    def clean(self) -> None:
        """Gives the memory back: a judge may follow on the same device."""
        self.loaded = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers in the requests' order."""
        return self._answers([one.args for one in requests], [None] * len(requests))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Every round's answer of each request, in the requests' order; a round of all of them runs together."""
        answers: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going: dict[int, Asked | None] = dict.fromkeys(range(len(requests)))
        for number in range(1, ROUNDS + 1):
            texts = self._answers([requests[i].args for i in going], list(going.values()))
            found, going = list(zip(going, texts, strict=True)), {}
            for i, text in found:
                told = {"round_idx": number, "previous_output": [*answers[i], text], "previous_round_info": notes[i]}
                following, answers[i], notes[i] = self.round(requests[i].args, **told)
                if following is not None:
                    going[i] = following
            if not going:
                return answers
        raise ValueError(f"lmms-eval: {len(going)} requests have not ended after {ROUNDS} rounds")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The sum of the log-probabilities of each answer's tokens, and whether greedy decoding would say just them."""
        found: list[tuple[float, bool]] = []
        with console.progress() as bar:
            task = bar.add_task("likelihoods", total=len(requests))
            for places in _windows(range(len(requests)), self.batch_size * WINDOW):
                some = [self._continued(requests[i].args) for i in places]
                found += [
                    (one.logprob, one.greedy) for one in likelihood.likelihoods(self.loaded, some, self.batch_size)
                ]
                bar.advance(task, len(places))
        return found

    def doc(self, args: tuple[Any, ...]) -> Any:
        """The row of the task's data that a request is about; the last three of its arguments say which."""
        number, task, split = args[-3:]
        return self.task_dict[task][split][number]

    def _answers(self, made: Sequence[tuple[Any, ...]], given: Sequence[Asked | None]) -> list[str]:
        """Answers to requests, asked as `given` or, where that is None, as the request itself says."""
        manners = [self._manner(args) for args in made]
        found = [""] * len(made)
        with console.progress() as bar:
            task = bar.add_task("answers", total=len(made))
            for how, places in _alike(manners, self.batch_size * WINDOW):
                prompts = [(i, self._prompt(made[i], given[i])) for i in places]
                prompts.sort(key=lambda one: -len(one[1].ids))
                for some in _windows(prompts, self.batch_size):
                    new = decoding.decode(self.loaded, [one for _, one in some], how.settings)
                    for (i, _), said in zip(some, new, strict=True):
                        found[i] = cut(speech.spoken(self.loaded, said.ids), how.stops)
                    bar.advance(task, len(some))
        return found

    def _prompt(self, args: tuple[Any, ...], given: Asked | None) -> decoding.Prompt:
        try:
            question = given or self.question(args)
            return decoding.prompt(self.loaded, question.messages, question.pictures)
        except ValueError as error:
            raise ValueError(f"task {args[-2]}, {args[-1]}, document {args[-3]}: {error}") from error

    def _manner(self, args: tuple[Any, ...]) -> Manner:
        how = manner(self.said(args))
        if how.ignored and how.ignored not in self._told:
            self._told.add(how.ignored)
            console.warn(f"lmms-eval's arguments of generation that change nothing here: {', '.join(how.ignored)}")
        return how

    def _continued(self, args: tuple[Any, ...]) -> tuple[Sequence[Any], Sequence[Any], str]:
        """A request for a likelihood: context, answer (or what makes it of the row), and the pictures of its row."""
        context, answer, *more = args
        pictures = more[0](self.doc(args)) if more else ()
        question = asked(context, pictures)
        return question.messages, question.pictures, answer(self.doc(args)) if callable(answer) else answer


class Simple(_Model):
    """Requests with a context and what shows the row's pictures (`--force_simple`)."""

    is_simple = True

    def said(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return args[1]

    def question(self, args: tuple[Any, ...]) -> Asked:
        return asked(args[0], args[2](self.doc(args)))

    def round(self, args: tuple[Any, ...], **told: Any) -> tuple[Asked | None, list[str], Any]:
        visuals, text, over, answers, notes = args[3](self.doc(args), **told)
        return None if over else asked(text, visuals), list(answers), notes


class Chat(_Model):
    """Requests with messages."""

    is_simple = False

    def said(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return args[2]

    def question(self, args: tuple[Any, ...]) -> Asked:
        return conversation(args[1](self.doc(args)))

    def round(self, args: tuple[Any, ...], **told: Any) -> tuple[Asked | None, list[str], Any]:
        messages, over, answers, notes = args[1](self.doc(args), **told)
        return None if over else conversation(messages), list(answers), notes


def _alike(manners: Sequence[Manner], most: int) -> Iterator[tuple[Manner, list[int]]]:
    """Places of those that are to be answered in one manner, at most so many at once."""
    by_manner: dict[Manner, list[int]] = {}
    for i, one in enumerate(manners):
        by_manner.setdefault(one, []).append(i)
    for one, places in by_manner.items():
        for some in _windows(places, most):
            yield one, some


def _windows(many: Sequence[T], most: int) -> Iterator[list[T]]:
    for start in range(0, len(many), most):
        yield list(many[start : start + most])
