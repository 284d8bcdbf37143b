"""The stages that are compared: which data they take, what learns in them. Imports nothing, so every peer can read it.

1: the connector, on captions. 2: connector and language model, on conversations. "lora": the same data, adapters beside
every linear layer of the language model and the connector in full.
"""

from __future__ import annotations

from dataclasses import dataclass

Stage = int | str


@dataclass(frozen=True)
class Lora:
    """Adapters as every contender gets them. `targets` finds their layers by full path, whatever stands before it."""

    r: int = 16
    alpha: float = 32.0
    targets: str = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    connector: str = "multi_modal_projector"


LORA = Lora()


def named(word: str) -> Stage:
    """ "1", "2" or "lora". ValueError for anything else."""
    if word not in ("1", "2", "lora"):
        raise ValueError(f"stage {word!r}: there are 1, 2 and lora")
    return word if word == "lora" else int(word)


def data_of(stage: Stage) -> int:
    """The number of the data and of the chat template."""
    return 2 if stage == "lora" else int(stage)


def learns(stage: Stage) -> str:
    """What of the language model learns: "nothing", "all" or "adapters"."""
    return {1: "nothing", 2: "all", "lora": "adapters"}[stage]
