"""LLaVA's stage-0 folder: a vision tower and a language model become one model folder, which training starts from.

Knows the stock Llava class and ours, which holds what that one cannot; what it did is proved by
`vistune.models.proving.verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vistune import chat, console, images
from vistune.models import weights
from vistune.models.assembling import connectors, parts
from vistune.models.assembling.parts import read_language, read_vision
from vistune.models.families import Family, family
from vistune.models.folders import savable
from vistune.models.hub import resolve
from vistune.models.load import Loaded, save
from vistune.models.shipped.modeling_llava_variant import Connector, depth, leading_tokens
from vistune.models.towers import clip
from vistune.samples import IMAGE_MARK

STOCK_TYPE = "mlp2x_gelu"
VOCABULARY_STEP = 64


def assemble_llava(
    vision: str | Path,
    language: str | Path,
    out: Path | str,
    *,
    connector: str | Path | None = None,
    connector_type: str = STOCK_TYPE,
    template: str = "v1",
    image: str = "pad",
    select_layer: int = -2,
    select: str = "patch",
    start_end: bool = False,
    s2_scales: str | Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tie: bool | None = None,
) -> Loaded:
    """Write the stage-0 folder `out` and return what is in it. Arguments as of `vistune.models.assemble.assemble`.

    A fresh connector is as torch initialises linear layers (the original does the same). What the stock class cannot
    hold is saved with ours, and said. Raises ValueError.
    """
    given = None if connector is None else connectors.read(connector)
    kind = _connector_type(connector_type, given, str(connector))
    vision_model, pixels = read_vision(resolve(vision, "vision"), dtype or "auto")
    language_model, tokenizer = read_language(resolve(language, "language"), dtype or "auto")
    _check_template(template, tokenizer, start_end)
    _set_tie(language_model, tie)
    known, image_token = len(tokenizer), _add_image_token(tokenizer)
    ends = _add_tokens(tokenizer, [chat.IMAGE_START, chat.IMAGE_END]) if start_end else []
    grow_vocabulary(language_model, len(tokenizer), fresh=ends, known=known)

    scales = _scales(s2_scales, vision_model.config, select)
    chosen = family(_family(vision_model, language_model, kind, scales, select))
    ours: dict[str, Any] = {"connector_type": kind, "s2_scales": scales, "head_bias": _has_bias(language_model)}
    config = _config(chosen, vision_model, language_model, ours, select_layer, select)
    config.image_token_index = image_token
    layout = clip.layout(_pixels(pixels, scales), config, image)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    joined = make_connector(config, language_model.lm_head.weight.dtype, given, str(connector), seed)
    model = _join(config, chosen, vision_model, joined, language_model)
    loaded = Loaded(
        folder=Path(out),
        family=chosen,
        config=config,
        generation=model.generation_config,
        tokenizer=tokenizer,
        template_name=template,
        layout=layout,
        image_token_id=image_token,
        start_end=start_end,
        model=model,
        source={},
    )
    save(loaded, out, card=_card(vision, language, connector))
    loaded.source = weights.stored(Path(out))
    return loaded


def _config(chosen: Family, vision: Any, language: Any, ours: dict[str, Any], select_layer: int, select: str) -> Any:
    """The model's config; `ours` are the fields that our own class has beside the stock one's."""
    made: Any = chosen.config_class
    return made(
        vision_config=vision.config,
        text_config=parts.inside(language).config,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=_strategy(vision, select, chosen.name),
        tie_word_embeddings=language.config.tie_word_embeddings,
        **(ours if chosen.name == "llava_variant" else {}),
    )


def _connector_type(asked: str, given: dict[str, Any] | None, where: str) -> str:
    """The type of the connector to make: of the one that is given, or the one that is asked for."""
    depth(asked)  # a word that is no type is refused before anything is read
    if given is None:
        return asked
    found = connectors.kind(given, where)
    if asked not in (STOCK_TYPE, found):
        raise ValueError(f"connector_type: {asked!r}, but {where} holds a {found}; leave connector_type out")
    return found


def _check_template(name: str, tokenizer: Any, start_end: bool) -> None:
    template = chat.template(name)
    chat.check_fits(chat.in_ends(template) if start_end else template, tokenizer)


def _add_image_token(tokenizer: Any) -> int:
    """Give the tokenizer the image's token, and a padding token where it has none (no new one: it is never seen)."""
    _add_tokens(tokenizer, [IMAGE_MARK])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def _add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    added = [transformers.AddedToken(token, special=True, normalized=False) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(new)


def _set_tie(model: Any, tie: bool | None) -> None:
    """Tie or untie the head; tying is refused where it would lose a head of its own."""
    tied = bool(model.config.tie_word_embeddings)
    if tie is None or tie == tied:
        return
    weight = model.get_input_embeddings().weight
    if tie and not torch.equal(model.lm_head.weight, weight):
        raise ValueError("tie: the language model's head differs from its embedding; tying would lose it")
    model.lm_head.weight = weight if tie else nn.Parameter(weight.detach().clone())
    model.config.tie_word_embeddings = tie


def grow_vocabulary(model: Any, tokens: int, *, fresh: Sequence[int] = (), known: int | None = None) -> None:
    """Room for `tokens` ids, padded to a multiple of 64. New rows of embedding and head are the old ones' mean.

    So are those of the ids `fresh`, also where the model had a row for them; the old ones are then the first `known`.
    """
    embedding, head = model.get_input_embeddings(), model.lm_head
    old = embedding.weight
    rows = -(-max(tokens, len(old)) // VOCABULARY_STEP) * VOCABULARY_STEP
    tied = head.weight is old
    embedding.weight = _grown(old, rows, fresh, known)
    embedding.num_embeddings = rows
    head.weight = embedding.weight if tied else _grown(head.weight, rows, fresh, known)
    if head.bias is not None:
        head.bias = _grown(head.bias, rows, fresh, known)
    head.out_features = rows
    model.config.vocab_size = parts.inside(model).config.vocab_size = rows


def _grown(weight: nn.Parameter, rows: int, fresh: Sequence[int], known: int | None) -> nn.Parameter:
    if rows == len(weight) and not fresh:
        return weight
    old = weight.detach()[: known if fresh else None]
    mean = old.double().mean(0, keepdim=True).to(weight.dtype)
    grown = torch.cat([weight.detach(), mean.expand(rows - len(weight), *mean.shape[1:])])
    grown[list(fresh)] = mean
    return nn.Parameter(grown)


def _scales(asked: str | Sequence[int] | None, vision: Any, select: str) -> list[int] | None:
    """The scales of S2, smallest first. ValueError for ones that the tower's tiles do not fit."""
    if not asked:
        return None
    try:
        words = asked.split(",") if isinstance(asked, str) else asked
        scales = sorted({int(word) for word in words})
    except ValueError:
        raise ValueError(f's2_scales: {asked!r}; give sides in pixels, such as "336,672,1008"') from None
    if scales[0] != vision.image_size or any(scale % scales[0] for scale in scales):
        raise ValueError(
            f"s2_scales: {scales}; the smallest must be the tower's own {vision.image_size} pixels, "
            "and the others whole multiples of it"
        )
    if select != "patch":
        raise ValueError(f"s2_scales: the features are laid on a grid, so select must be patch, not {select!r}")
    return scales


def _pixels(pixels: Any, scales: list[int] | None) -> dict[str, Any]:
    """The tower's image processor, told to make pictures of the largest scale."""
    read = images.settings(pixels)
    if scales:
        edge = {"height": scales[-1], "width": scales[-1]}
        cropped = bool(read.get("do_center_crop"))
        read = read | {"size": {"shortest_edge": scales[-1]} if cropped else edge}
        read |= {"crop_size": edge} if cropped else {}
    return read


def _family(vision: Any, language: Any, kind: str, scales: list[int] | None, select: str) -> str:
    """The family that holds these parts; when the stock class cannot, that is said."""
    reasons = [f"a connector of type {kind}"] if kind != STOCK_TYPE else []
    reasons += [f"several scales ({', '.join(map(str, scales))})"] if scales else []
    reasons += ["an MPT"] if language.config.model_type == "mpt" else []
    reasons += ["a head with a bias"] if _has_bias(language) else []
    if select == "patch" and leading_tokens(vision.config) > 1:
        reasons.append("a tower whose register tokens are left out")
    if not reasons:
        return "llava"
    console.say(
        f"stock LlavaForConditionalGeneration cannot hold {' or '.join(reasons)}; "
        "saved with our class, opened with trust_remote_code=True"
    )
    return "llava_variant"


def _has_bias(language: Any) -> bool:
    return language.lm_head.bias is not None


def _strategy(vision_model: Any, select: str, chosen: str) -> Literal["default", "full"]:
    """The class's word for which tokens of the tower are used."""
    leading = leading_tokens(vision_model.config)
    if select == "patch":
        return "default" if leading or chosen == "llava_variant" else "full"
    if select == "cls_patch" and leading:
        return "full"
    known = "patch or cls_patch" if leading else "patch: this tower has no class token"
    raise ValueError(f"select: {select!r}; choose {known}")


def make_connector(config: Any, dtype: torch.dtype, given: dict[str, Any] | None, where: str, seed: int) -> nn.Module:
    """The layers between the parts, of the class that `config` is of: fresh from `seed`, or those that were read."""
    made = Connector if config.model_type == "llava_variant" else LlavaMultiModalProjector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector: nn.Module = made(config)
    if given is not None:
        connectors.fill(connector, given, where)
    return connector.to(dtype).eval()


def _join(config: Any, chosen: Family, vision_model: Any, connector: nn.Module, language_model: Any) -> Any:
    """The family's class around the very modules that were read: nothing is copied."""
    with torch.device("meta"):
        model: Any = chosen.model_class(config)
    model.model.vision_tower = vision_model
    model.model.multi_modal_projector = connector
    model.model.language_model = parts.inside(language_model)
    model.lm_head = language_model.lm_head
    model.generation_config = savable(language_model.generation_config)
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval()


def _card(vision: str | Path, language: str | Path, connector: str | Path | None) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        "# An assembled vision-language model, before training\n\n"
        f"- vision: `{Path(vision).name}`\n- language: `{Path(language).name}`\n"
        f"- connector: {f'`{Path(connector).name}`' if connector else 'fresh'}\n"
    )
