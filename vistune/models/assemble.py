"""A vision tower and a language model become one model folder: the stage-0 folder that training starts from.

Knows the stock Llava class and where parts come from; what it did is proved by `vistune.models.verify`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vistune import chat
from vistune.models import clip, weights
from vistune.models.checkpoints.llava_original import read_connector
from vistune.models.families import family
from vistune.models.folders import quiet, read_config, savable
from vistune.models.load import Loaded, read_model, save
from vistune.samples import IMAGE_MARK

# What a folder's model_type may be, and the class of its vision half.
VISION = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
PIXELS = {"clip": transformers.CLIPImageProcessorPil, "siglip": transformers.SiglipImageProcessorPil}
_OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "original/*", "onnx/*")

_OTHER_HALF = r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias)|position_ids$"
VOCABULARY_STEP = 64


def assemble(
    vision: str | Path,
    language: str | Path,
    out: Path | str,
    *,
    connector: str | Path | None = None,
    template: str = "v1",
    image: str = "pad",
    select_layer: int = -2,
    select: str = "patch",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tie: bool | None = None,
) -> Loaded:
    """Write the stage-0 folder `out` and return what is in it.

    `vision`, `language`: a folder or a hub id in the local cache. `connector`: a Llava folder, an original
    `mm_projector.bin` or the folder of one; None: fresh, as torch initialises linear layers (the original does the
    same), from `seed`. `select`: "patch" or "cls_patch" (with the class token). `dtype` None: each part keeps its own.
    `tie` None: the head is tied to the embedding as the language model says. Raises ValueError.
    """
    vision_model, pixels = read_vision(resolve(vision, "vision"), dtype or "auto")
    language_model, tokenizer = read_language(resolve(language, "language"), dtype or "auto")
    chosen = chat.template(template)
    chat.check_fits(chosen, tokenizer)
    _set_tie(language_model, tie)
    image_token = _add_image_token(tokenizer)
    grow_vocabulary(language_model, len(tokenizer))

    config = transformers.LlavaConfig(
        vision_config=vision_model.config,
        text_config=language_model.model.config,
        image_token_index=image_token,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=_strategy(vision_model, select),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    config.image_seq_length = clip.tokens(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    joined = make_connector(config, language_model.lm_head.weight.dtype, connector, seed)
    model = _join(config, vision_model, joined, language_model)
    llava = family("llava")
    layout = clip.layout(pixels, config, image)
    loaded = Loaded(
        folder=Path(out),
        family=llava,
        config=config,
        generation=model.generation_config,
        tokenizer=tokenizer,
        template_name=template,
        layout=layout,
        image_token_id=image_token,
        model=model,
        source={},
    )
    save(loaded, out, card=_card(vision, language, connector))
    loaded.source = weights.stored(Path(out))
    return loaded


def resolve(part: str | Path, what: str) -> Path:
    """The folder of a part: as given, or a hub id's snapshot, from the local cache or else downloaded."""
    if Path(part).is_dir():
        return Path(part)
    name = str(part)
    if cached := _cached(name):
        return cached
    try:
        files = [file.rfilename for file in HfApi().model_info(name).siblings or []]
        twice = ["*.bin"] if any(file.endswith(".safetensors") for file in files) else []
        return Path(snapshot_download(name, ignore_patterns=[*_OTHER_FORMATS, *twice]))
    except Exception as error:
        raise ValueError(
            f"{what}: {name!r} is neither a folder nor a hub repository in the local cache, and it could not be "
            f"downloaded ({str(error).splitlines()[0]}). Give a folder, or fetch it where there is a network: "
            f"hf download {name}"
        ) from error


def _cached(name: str) -> Path | None:
    """A hub repository's snapshot in the local cache."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, OSError):
        return None


def read_vision(folder: Path, dtype: torch.dtype | str, *, finite: bool = True) -> tuple[Any, Any]:
    """The vision tower and its image processor, from its own folder or from the two-tower model's."""
    kind = read_config(folder).get("model_type")
    if kind not in VISION:
        raise ValueError(f"vision: {folder} is a {kind!r}; a vision tower can be one of {', '.join(VISION)}")
    model = read_model(getattr(transformers, VISION[kind]), folder, dtype, extra=_OTHER_HALF, finite=finite)
    with quiet():
        try:
            # The Pillow class by name: the automatic one asks for torchvision in some releases.
            pixels = PIXELS[kind.partition("_")[0]].from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"vision: {folder} has no usable preprocessor_config.json ({error})") from error
    return model, pixels


def read_language(folder: Path, dtype: torch.dtype | str, *, finite: bool = True) -> tuple[Any, Any]:
    """The causal language model and its tokenizer. ValueError for one that the stock Llava class cannot hold."""
    read_config(folder)
    model: Any = read_model(AutoModelForCausalLM, folder, dtype, extra=r"rotary_emb\.inv_freq$", finite=finite)
    inner, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if inner is None or not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(inner, "embed_tokens"):
        raise ValueError(
            f"language: {folder} is a {type(model).__name__}; the stock Llava class takes models with `model`, "
            "`model.embed_tokens` and an `lm_head` without bias (Llama, Mistral, Qwen2, Qwen3 and the like)"
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def _add_image_token(tokenizer: Any) -> int:
    """Give the tokenizer the image's token, and a padding token where it has none (no new one: it is never seen)."""
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens([transformers.AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def _set_tie(model: Any, tie: bool | None) -> None:
    """Tie or untie the head; tying is refused where it would lose a head of its own."""
    tied = bool(model.config.tie_word_embeddings)
    if tie is None or tie == tied:
        return
    if tie and not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight):
        raise ValueError("tie: the language model's head differs from its embedding; tying would lose it")
    weight = model.model.embed_tokens.weight
    model.lm_head.weight = weight if tie else nn.Parameter(weight.detach().clone())
    model.config.tie_word_embeddings = tie


def grow_vocabulary(model: Any, tokens: int) -> None:
    """Room for `tokens` ids, padded to a multiple of 64. New rows of embedding and head are the old ones' mean."""
    old = model.model.embed_tokens.weight
    rows = -(-max(tokens, len(old)) // VOCABULARY_STEP) * VOCABULARY_STEP
    tied = model.lm_head.weight is old
    model.model.embed_tokens.weight = _grown(old, rows)
    model.model.embed_tokens.num_embeddings = rows
    model.lm_head.weight = model.model.embed_tokens.weight if tied else _grown(model.lm_head.weight, rows)
    model.lm_head.out_features = rows
    model.config.vocab_size = model.model.config.vocab_size = rows


def _grown(weight: nn.Parameter, rows: int) -> nn.Parameter:
    if rows == len(weight):
        return weight
    mean = weight.detach().double().mean(0, keepdim=True).to(weight.dtype)
    return nn.Parameter(torch.cat([weight.detach(), mean.expand(rows - len(weight), -1)]))


def _strategy(vision_model: Any, select: str) -> Literal["default", "full"]:
    """The stock class's word for which tokens of the tower are used."""
    has_class = vision_model.config.model_type.startswith("clip")
    if select == "patch":
        return "default" if has_class else "full"
    if select == "cls_patch" and has_class:
        return "full"
    known = "patch or cls_patch" if has_class else "patch: this tower has no class token"
    raise ValueError(f"select: {select!r}; choose {known}")


def make_connector(config: Any, dtype: torch.dtype, source: str | Path | None, seed: int) -> nn.Module:
    """The two linear layers between the parts: fresh from `seed`, or read from `source`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = LlavaMultiModalProjector(config)
    if source is not None:
        read = _read_connector(Path(source))
        for name, value in connector.state_dict().items():
            if name not in read or read[name].shape != value.shape:
                found = list(read[name].shape) if name in read else "not there"
                raise ValueError(f"connector: {source}: {name} is {found}; these parts need {list(value.shape)}")
        connector.load_state_dict(read)
    return connector.to(dtype).eval()


def _read_connector(source: Path) -> dict[str, Tensor]:
    if source.is_dir() and (source / "mm_projector.bin").exists():
        source = source / "mm_projector.bin"
    if source.is_file():
        return read_connector(source)
    if not source.is_dir():
        raise ValueError(f"connector: {source}: no such file or folder")
    mark = "multi_modal_projector."
    return {name.rpartition(mark)[2]: one.read() for name, one in weights.stored(source).items() if mark in name}


def _join(config: Any, vision_model: Any, connector: nn.Module, language_model: Any) -> Any:
    """The stock class around the very modules that were read: nothing is copied."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision_model
    model.model.multi_modal_projector = connector
    model.model.language_model = language_model.model
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
