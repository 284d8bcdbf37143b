"""LLaVA-OneVision-1.5 as its trainer saves it: Megatron core, `mp_rank_XX/model_optim_rng.pt`, any TP and PP.

Weights only: optimizer, schedule and random states stay behind. How tensors are interleaved and divided is
`mcore_layout`, how the files are opened and written `mcore_files`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistune import console
from vistune.models.checkpoints import Checkpoint
from vistune.models.checkpoints.mcore_files import FILE, LATEST, RANK, Opened, Rank, rank_name, save
from vistune.models.checkpoints.mcore_layout import (
    VOCABULARY_STEP,
    Rule,
    Sizes,
    Stage,
    padding,
    rules,
    share,
    stages,
    whole,
)
from vistune.models.checkpoints.onevision15 import HOLDS, is_tied, published
from vistune.models.fit import EXTRA, MISSING, check, refuse
from vistune.models.folders import describe
from vistune.models.weights import Entry, held

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Mcore:
    """See `vistune.models.checkpoints.Format`. The fields are for writing; None: as the checkpoint came, or else 1.

    `pipeline_layers` are the layers of each piece, in the order of the layers; None: all the same. `extra_state`:
    whether to write the empty states that Transformer Engine looks for; None: as it came, or else yes.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    virtual_pipeline: int | None = None
    pipeline_layers: tuple[int, ...] | None = None
    extra_state: bool | None = None

    name = "mcore"
    holds = "LLaVA-OneVision-1.5 as Megatron core saves it (mp_rank_XX/model_optim_rng.pt); --base: its stage-0 folder"

    def recognises(self, folder: Path) -> str:
        if not folder.is_dir():
            return ""
        if (folder / LATEST).is_file():
            return f"{LATEST}: {(folder / LATEST).read_text(encoding='utf-8').strip()[:40]}"
        ranks = [path.name for path in folder.iterdir() if RANK.fullmatch(path.name) and (path / FILE).is_file()]
        return f"{len(ranks)} folders like {min(ranks)}, each with {FILE}" if ranks else ""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        if base is None:
            raise ValueError(
                f"{folder}: a Megatron checkpoint holds weights alone; --base must name the folder that training began "
                "with (stage-0): config.json, tokenizer and processor are taken from there"
            )
        described, why = describe(base, **said), self.recognises(folder)
        if described.family.name != HOLDS:
            raise ValueError(f"{base}: is a {described.family.name}; mcore holds {HOLDS} alone")
        opened, where = Opened(folder), f"{folder} (mcore: {why}; config.json of {base})"
        tensors, kept = _tensors(opened, described.config, where)
        if is_tied(described.config) and _HEAD in tensors and _same(tensors[_HEAD], tensors[_EMBEDDING]):
            del tensors[_HEAD]  # the format stores a tied head once more
        described.origin = {**described.origin, self.name: opened.origin()}
        found = Checkpoint(format=self.name, why=why, said=described, tensors=tensors, kept=kept)
        check(found, where)
        return found

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        said = checkpoint.said
        if said.family.name != HOLDS:
            raise ValueError(f"mcore holds {HOLDS} alone; {said.folder} is a {said.family.name}")
        tensors = published(checkpoint.tensors)
        check(checkpoint, f"{said.folder} (to be written as mcore)")
        tensors.setdefault(_HEAD, tensors[_EMBEDDING])  # the format has no tied heads
        came, sizes = said.origin.get(self.name, {}), Sizes.of(said.config)
        ranks = self.tensor_parallel or came.get("tensor_parallel", 1)
        _check_divides(said.config, ranks)
        pieces, pipeline = self._pieces(sizes, came)

        def plan(rank: int, piece: Stage) -> dict[str, Entry]:
            kept = checkpoint.kept
            return {
                rule.theirs: share(rule, tensors, rank, ranks, sizes, kept.get(_kept_name(rule)))
                for rule in rules(sizes, piece)
            }

        plans: dict[Rank, list[dict[str, Entry]]] = {
            (one, other): [plan(one, piece) for piece in pieces[other::pipeline]]
            for one in range(ranks)
            for other in range(pipeline)
        }
        extra = came.get("extra_state", True) if self.extra_state is None else self.extra_state
        arguments = _arguments(said.config, ranks, pipeline, [len(piece.layers) for piece in pieces])
        args = arguments if came.get("args") == "dict" else argparse.Namespace(**arguments)
        with console.progress() as bar:
            total = sum(entry.nbytes for plan in plans.values() for piece in plan for entry in piece.values())
            task = bar.add_task("writing", total=total)
            for rank, pieces_held in plans.items():
                place = folder / "release" / rank_name(rank, pipeline)
                place.mkdir(parents=True)
                save(place / FILE, pieces_held, args, extra, lambda done: bar.update(task, advance=done))
        (folder / LATEST).write_text("release\n", encoding="utf-8")

    def _pieces(self, sizes: Sizes, came: Mapping[str, Any]) -> tuple[list[Stage], int]:
        """The pieces of the pipeline in the order of the layers, and over how many ranks they go round."""
        pipeline = self.pipeline_parallel or came.get("pipeline_parallel", 1)
        same = pipeline == came.get("pipeline_parallel", 1)
        virtual = self.virtual_pipeline or (came.get("virtual_pipeline", 1) if same else 1)
        many, before = pipeline * virtual, came.get("layers", [])
        counts = list(self.pipeline_layers or (before if len(before) == many else ()))
        if not counts and sizes.layers % many:
            raise ValueError(
                f"pipeline_parallel: {sizes.layers} layers do not divide into {many} equal pieces; "
                "say pipeline_layers, the number of layers of each"
            )
        counts = counts or [sizes.layers // many] * many
        if len(counts) != many or sum(counts) != sizes.layers:
            raise ValueError(f"pipeline_layers: {counts} are not {many} pieces of {sizes.layers} layers together")
        return stages(counts), pipeline


def _tensors(opened: Opened, config: Any, where: str) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """By the published names; and rows of padding that are worth keeping. ValueError for names that do not fit."""
    sizes, tied = Sizes.of(config), is_tied(config)
    found: dict[str, Entry] = {}
    kept: dict[str, Entry] = {}
    unknown: list[str] = []
    missing: list[str] = []
    for stage, ranks in zip(stages(opened.layers()), opened.ordered(), strict=True):
        left = {name for rank in ranks for name in rank if not name.endswith("_extra_state")}
        for rule in rules(sizes, stage):
            left.discard(rule.theirs)
            if not all(rule.theirs in rank for rank in ranks):
                missing += [] if tied and rule.ours == (_HEAD,) else [rule.theirs]
                continue
            shares = [held(rank[rule.theirs]) for rank in ranks]
            found |= _whole(rule, shares, sizes, where)
            if (rows := padding(rule, shares, sizes)) is not None:
                kept[_kept_name(rule)] = rows
        unknown += sorted(left)
    refuse(where, {MISSING: missing, EXTRA: unknown})
    return found, kept


def _whole(rule: Rule, shares: list[Entry], sizes: Sizes, where: str) -> dict[str, Entry]:
    try:
        return whole(rule, shares, sizes)
    except RuntimeError as error:  # the shapes do not divide as config.json says
        shapes = ", ".join(str(list(each.shape)) for each in shares)
        raise ValueError(
            f"{where}: {rule.theirs} is {shapes}, which does not fit this config.json ({error})"
        ) from error


def _kept_name(rule: Rule) -> str:
    return f"{rule.theirs}.padding"


def _same(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.read(), other.read())


def _check_divides(config: Any, ranks: int) -> None:
    text, vision = config.text_config, config.vision_config
    divided = {
        "key-value heads": text.num_key_value_heads,
        "rows of the language model's MLP": text.intermediate_size,
        "vision heads": vision.num_heads,
        "rows of the vision MLP": vision.intermediate_size,
    }
    for what, number in divided.items():
        if number % ranks:
            raise ValueError(f"tensor_parallel: {number} {what} do not divide over {ranks} ranks")


def _arguments(config: Any, ranks: int, pipeline: int, layers: list[int]) -> dict[str, Any]:
    """What Megatron reads beside the weights, by the names of its own flags."""
    text = config.text_config
    return {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "make_vocab_size_divisible_by": VOCABULARY_STEP,
        "add_embedding_padding": True,
        "untie_embeddings_and_output_weights": True,
        "use_rotary_position_embeddings": True,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": len(layers) // pipeline if len(layers) > pipeline else None,
        "custom_pipeline_layers": ",".join(map(str, layers)) if len(set(layers)) > 1 else None,
        "data_parallel_size": 1,
        "num_experts": None,
        "no_save_optim": True,
        "use_distributed_optimizer": False,
        "transformer_impl": "transformer_engine",
    }


FORMAT = Mcore()
