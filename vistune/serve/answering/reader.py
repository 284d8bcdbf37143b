"""What a model computes for several requests at once: features of pictures, prompts in pieces, a step of all answers.

Knows nothing of requests, of time, and of which row is whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistune import images
from vistune.decoding import Shown
from vistune.models import attention
from vistune.models import language as lm
from vistune.models.folders import quiet
from vistune.models.kv import Kv
from vistune.models.load import Loaded


class Reader:
    """Shapes: n rows, c new positions of each, D the language model's width, V its vocabulary's size. It computes
    on the model's device and in its type; logits are fp32. What it returns are tensors of inference mode: outside of
    that they may be read, but not changed in place."""

    def __init__(self, loaded: Loaded):
        self.loaded, self.family, self.model = loaded, loaded.family, loaded.model
        self.device: torch.device = loaded.model.device
        config: Any = loaded.model.config
        self.alone = not getattr(config.vision_config, "legacy_images", False)
        """Whether a picture's features depend on it alone; else `see` is given all pictures of one request at once."""
        self.picture: int = loaded.image_token_id
        """The id that stands for a piece of a picture in a prompt."""
        self.context = context(config.text_config)
        """Tokens that a prompt and its answer may have together."""
        self.kv_token_bytes = kv_token_bytes(config.text_config, loaded.model.dtype)
        """Bytes of keys and values of one token."""
        with quiet():  # MPT's attention is another, of which `transformers` would warn
            attention.use(loaded.model)

    def kv(self) -> Kv:
        """An empty one: `reserve` rows and room in it before they are read."""
        return Kv(self.device)

    @torch.inference_mode()
    def see(self, pictures: Sequence[Shown]) -> list[Tensor]:
        """The features [tokens, D] of each picture, in one call of the tower. Where the layout gives pictures shapes of
        their own the call computes no padding, so any may go together; its memory grows with the sum of their sizes."""
        if not pictures:
            return []
        join = torch.stack if pictures[0].grid is None else torch.cat
        pixels = join([one.pixels for one in pictures]).to(self.device)
        grids = None if pictures[0].grid is None else torch.tensor([one.grid for one in pictures], dtype=torch.int64)
        tokens = [one.tokens for one in pictures]
        normal = images.normalize(pixels, self.loaded.layout, self.model.dtype)
        features = self.family.features(self.model, normal, grids, [sum(tokens)])
        # Each in memory of its own: what remembers one would else keep all of them.
        return [one.clone() for one in features.split(tokens)] if len(tokens) > 1 else [features]

    @torch.inference_mode()
    def embed(self, ids: Sequence[int], features: Sequence[Tensor] = ()) -> Tensor:
        """A prompt as the language model takes it, with features in the places of its pictures: [T, D]. ValueError when
        there are not as many of the one as of the other."""
        given = sum(map(len, features))
        where = [place for place, one in enumerate(ids) if one == self.loaded.image_token_id]
        if len(where) != given:
            raise ValueError(
                f"{len(where)} image placeholders in the prompt, but {len(features)} pictures of {given} tokens in all"
            )
        embeds = self._embedding(torch.tensor(ids, dtype=torch.int64, device=self.device))
        if not given:
            return embeds
        return lm.splice(embeds, torch.tensor(where, device=self.device), torch.cat(list(features)))

    @torch.inference_mode()
    def read(self, kv: Kv, rows: Sequence[int], embeds: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """New positions of several rows -> the logits [n, V], fp32, at the last new one of each.

        Row `rows[i]` gets the first `counts[i]` of `embeds[i]` (of [n, c, D]; the rest is padding that nothing sees),
        from `starts[i]` on, which is where it ends now; 0 makes it another request's. Fastest for rows 0 to n - 1.
        """
        count, width = embeds.shape[:2]
        with kv.writing(rows, starts, counts, width) as places:
            hidden = lm.go_on(self.family.language(self.model), embeds, kv, places)
        flat = hidden.flatten(0, 1)
        if width > 1:
            flat = flat[[i * width + counts[i] - 1 for i in range(count)]]
        return self.family.head(self.model)(flat).float()

    @torch.inference_mode()
    def step(self, kv: Kv, ids: Sequence[int], starts: Sequence[int]) -> Tensor:
        """`read` of one token each of rows 0 to n - 1: the logits of what comes next [n, V]."""
        embeds = self._embedding(torch.tensor(ids, dtype=torch.int64, device=self.device)).unsqueeze(1)
        return self.read(kv, range(len(ids)), embeds, starts, [1] * len(ids))

    def _embedding(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        return model.get_input_embeddings()(ids)


def context(text: Any) -> int:
    """Tokens that a language model was made for; `text` is its config. Where its angles change for all rows once one of
    them is long (LongRoPE, dynamic NTK), as many as it reads with those of short ones: neighbours are no reason for
    another answer."""
    if text.model_type == "mpt":
        return text.max_seq_len
    said = getattr(text, "rope_parameters", None) or {}
    each = [said] if "rope_type" in said else [one for one in said.values() if isinstance(one, dict)]
    moving = [one for one in each if one.get("rope_type") in ("longrope", "dynamic")]
    found = [one.get("original_max_position_embeddings") for one in moving]
    return min([text.max_position_embeddings, *(one for one in found if one)])


def kv_token_bytes(text: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, by the config of a language model."""
    heads = text.num_attention_heads
    asked = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * asked * width * dtype.itemsize
