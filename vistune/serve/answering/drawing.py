"""How the next token of each running answer is drawn: the best one, or by its temperature and seed, as `generate` does.

Knows logits and settings; nothing of requests and of time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from vistune.decoding import Settings
from vistune.models.load import Loaded

COLDEST = 1e-6
"""A temperature below it is 0: logits that are divided by less are no numbers any more, and nothing else is drawn."""

_PLAIN = {
    # what a folder's generation settings may say that changes nothing here: `decode` overrides it, or nobody asks
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample"),
    *(
        "temperature",
        "top_p",
        "top_k",
        "num_beams",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
    ),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
    *("cache_config", "_from_model_config", "length_penalty", "early_stopping", "num_return_sequences"),
}


@dataclass(eq=False)
class Draw:
    """One answer's way of being drawn. `rules` are the folder's own, such as a penalty for repetition; they are shown
    `ids`, the prompt and what was drawn, which is kept for them alone."""

    settings: Settings
    generator: torch.Generator | None
    rules: LogitsProcessorList | None = None
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """`margin`: the gap between the two best logits, infinite for an answer with a temperature; NaN when the logits are
    no numbers, and then the token means nothing."""

    token: int
    margin: float


class Drawing:
    """A model's way of drawing: what its folder's generation settings say beside temperature, top_p and ends."""

    def __init__(self, loaded: Loaded):
        self.model: Any = loaded.model
        said = self.model.generation_config.to_diff_dict()
        self.ruled = any(value is not None for name, value in said.items() if name not in _PLAIN)

    def begin(self, settings: Settings, ids: Sequence[int], device: torch.device | str = "cpu") -> Draw:
        """For an answer to the prompt `ids`, whose logits come on `device`."""
        generator = None
        if settings.temperature > COLDEST:
            generator = torch.Generator(device).manual_seed(settings.seed)
        if not self.ruled:
            return Draw(settings, generator)
        return Draw(settings, generator, self._rules(len(ids), device), list(ids))

    def _rules(self, length: int, device: torch.device | str) -> LogitsProcessorList:
        """What `generate` lays over the logits before the temperature, made by its own hand."""
        config = copy.deepcopy(self.model.generation_config)
        config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        ends = config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
        made = self.model._get_logits_processor(config, input_ids_seq_length=length, device=str(device))
        return made or LogitsProcessorList()


@torch.no_grad()
def draw(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """A token for each row of fp32 logits [n, V]. What a row gets depends on its logits and its own draw alone."""
    scores = _ruled(logits, draws)
    best = scores.topk(2).values
    first, gaps = torch.stack([best[:, 0], best[:, 0] - best[:, 1]]).tolist()
    sound = [math.isfinite(one) for one in first]
    tokens = scores.argmax(-1)  # not the first of topk, which takes another of equal ones
    for (temperature, top_p), rows in _alike(draws, sound).items():
        tokens = _sampled(scores, tokens, rows, draws, temperature, top_p)
    margins = [
        math.nan if not fine else gap if one.generator is None else math.inf
        for one, fine, gap in zip(draws, sound, gaps, strict=True)
    ]
    drawn = [Drawn(token, margin) for token, margin in zip(tokens.tolist(), margins, strict=True)]
    for each, one in zip(draws, drawn, strict=True):
        if each.rules is not None:
            each.ids.append(one.token)
    return drawn


def _ruled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits with each folder's rules laid over its rows."""
    ruled = [row for row, one in enumerate(draws) if one.rules]
    scores = logits.clone() if ruled else logits
    for row in ruled:
        rules: Any = draws[row].rules
        scores[row : row + 1] = rules(torch.tensor([draws[row].ids], device=logits.device), scores[row : row + 1])
    return scores


def _alike(draws: Sequence[Draw], sound: Sequence[bool]) -> dict[tuple[float, float], list[int]]:
    """Rows that have a temperature and are numbers, by what their logits are warped with."""
    found: dict[tuple[float, float], list[int]] = {}
    for row, one in enumerate(draws):
        if one.generator is not None and sound[row]:
            found.setdefault((float(one.settings.temperature), float(one.settings.top_p)), []).append(row)
    return found


def _sampled(
    scores: Tensor, tokens: Tensor, rows: list[int], draws: Sequence[Draw], temperature: float, top_p: float
) -> Tensor:
    """`tokens` with those of `rows` drawn, each by its own generator, in the order in which `generate` warps."""
    nothing: Any = None
    warped = scores[rows]
    if temperature != 1.0:
        warped = TemperatureLogitsWarper(temperature)(nothing, warped)
    if top_p < 1.0:
        warped = TopPLogitsWarper(top_p)(nothing, warped)
    chances = warped.softmax(-1)
    drawn = [torch.multinomial(chances[i : i + 1], 1, generator=draws[row].generator) for i, row in enumerate(rows)]
    tokens[rows] = torch.cat(drawn).squeeze(1)
    return tokens
