"""What LLaVA's clients ask a worker: parameters of one answer, read as the reference reads them.

Knows nothing of models and pictures' bytes. No error repeats what a request holds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vistune.decoding import Settings
from vistune.samples import IMAGE_MARK
from vistune.serve.interface.bodies import check_count
from vistune.serve.refused import Refused

MOST_NEW = 1024
"""Tokens of an answer that the reference's worker gives at most (llava/serve/model_worker.py)."""
GREEDY = 1e-3
"""Temperatures up to this are greedy, as there."""
MOST_STOPS = 16


class Asked(BaseModel):
    """Numbers may come as strings, and what is not named here is passed over: so it is in the reference, and old
    clients send what their own workers wanted."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    prompt: str
    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    max_new_tokens: Annotated[float, Field(ge=-(2**31), le=2**31, allow_inf_nan=False)] = 256
    stop: Annotated[list[str], Field(max_length=MOST_STOPS)] = []
    images: list[str] = []

    @field_validator("model", "images", mode="before")
    @classmethod
    def _nothing(cls, said: object, info: object) -> object:
        field = getattr(info, "field_name", "")
        return ("" if field == "model" else []) if said is None else said

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, said: object) -> object:
        """One string in the reference; an empty one, or none, stops nothing."""
        found = said if isinstance(said, list) else [said]
        return [one for one in found if one not in (None, "")]

    def settings(self, most: int, seed: int) -> Settings:
        """`most`: what this server gives. A `top_p` of 0 leaves the likeliest token alone, which is greedy."""
        greedy = self.temperature <= GREEDY or self.top_p == 0
        return Settings(
            max_new_tokens=min(int(self.max_new_tokens), MOST_NEW, most),
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p or 1.0,
            seed=seed,
        )

    def check_marks(self) -> None:
        """Refused: 400 where marks and pictures do not match; before a picture is looked at."""
        marks = self.prompt.count(IMAGE_MARK)
        if marks != len(self.images):
            raise Refused(
                400,
                f"{len(self.images)} pictures for {marks} {IMAGE_MARK} in the prompt; give one for each",
                param="images",
                code="pictures_and_marks",
            )


def read(body: bytes) -> Asked:
    """Takes a while for pictures: call it in a thread. Refused: 400."""
    check_count(body)
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, wrong["loc"]))
        raise Refused(400, f"{param or 'the request'}: {wrong['msg']}", param=param, code="invalid_value") from None
