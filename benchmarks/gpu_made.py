"""What a case needs beside code, made on the spot: model folders without weights, tokenizers, pictures, rows; and
weights that are drawn when they are read, on the device, from their name.

Knows vistune's door to checkpoints, which is given such weights; nothing of steps.
"""

from __future__ import annotations

import json
import random
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import made_mix665k
import torch
import transformers
from gpu_cases import Case, Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from vistune.models import checkpoints
from vistune.models.families import family
from vistune.models.fit import expected
from vistune.models.folders import describe
from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config
from vistune.models.weights import Entry

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CLIP_COLOURS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_data(folder: Path, rows: int, tiny: bool) -> made_mix665k.Made:
    """Conversations in mix665k's shape with their pictures and a Llama-like tokenizer; captions in a file beside; the
    same text's byte-level tokenizer. Files that are there already stay."""
    sizes = {"pictures": 6, "pieces": 700, "words": 1500} if tiny else {"pictures": 256, "pieces": 8000}
    made = made_mix665k.make(folder, rows, **sizes)
    captions = folder / "captions.json"
    if not captions.is_file():
        text = made_mix665k.Text(1, sizes.get("words", 20_000))
        talks = json.loads(made.json.read_text())
        pictures = sorted({row["image"] for row in talks if "image" in row})
        _byte_level(folder, [turn["value"] for row in talks for turn in row["conversations"]], sizes["pieces"])
        draw = random.Random(1)
        captions.write_text(json.dumps([_caption(i, text, draw, pictures) for i in range(rows)]))
    return made


def data_of(made: made_mix665k.Made, case: Case) -> Path:
    return made.json if case.data == "talks" else made.folder / "captions.json"


def _caption(number: int, text: made_mix665k.Text, draw: random.Random, pictures: list[str]) -> dict[str, Any]:
    """A row of LLaVA's first stage: a picture and about 20 words."""
    asked = {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"}
    words = round(min(max(draw.lognormvariate(2.9, 0.45), 5), 90))
    answer = {"from": "gpt", "value": text.take(words) + "."}
    return {"id": f"c{number:06d}", "image": draw.choice(pictures), "conversations": [asked, answer]}


def _byte_level(folder: Path, lines: list[str], pieces: int) -> None:
    """A tokenizer as Qwen's are built, in `folder`/chatml."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([*CHATML, "<image>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768
    )
    fast.save_pretrained(folder / "chatml")


def make_folder(folder: Path, shape: Shape, made: made_mix665k.Made, template: str) -> Path:
    """A model folder of this shape with all but its weights, its chat template named in config.json."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    source = made.tokenizer if shape.family == "llava" else made.folder / "chatml"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    _config(shape, tokenizer).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"vistune": {"template": template}}, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(_pictures(shape)))
    return folder


def _config(shape: Shape, tokenizer: Any) -> Any:
    number = tokenizer.convert_tokens_to_ids
    if shape.family == "onevision15":
        ids = {"image_token_id": number("<|image_pad|>"), "vision_start_token_id": number("<|vision_start|>")}
        return Llavaonevision1_5Config(text_config=dict(shape.text), vision_config=dict(shape.vision), **ids)
    tied = shape.text.get("tie_word_embeddings", False)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    both = {"image_token_index": number("<image>"), "tie_word_embeddings": tied}
    if shape.family == "fastvlm":
        vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "label_names": [], **shape.vision}
        text = transformers.Qwen2Config(**shape.text, **ends)
        return transformers.FastVlmConfig(vision_config=vision, text_config=text, **both)
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**shape.vision),
        text_config=transformers.LlamaConfig(**shape.text, **ends),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(shape.side // shape.vision["patch_size"]) ** 2,
        **both,
    )


def _pictures(shape: Shape) -> dict[str, Any]:
    """preprocessor_config.json."""
    steps = dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True)
    common = steps | {"resample": 3, "rescale_factor": 1 / 255}
    if not shape.side:
        native = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 1, "min_pixels": 56 * 56}
        most = 1600 * 1600 if shape.vision["text_hidden_size"] > 32 else 112 * 112
        return common | CLIP_COLOURS | native | {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": most}
    colours = CLIP_COLOURS if shape.family == "llava" else {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    side = {"size": {"shortest_edge": shape.side}, "crop_size": {"height": shape.side, "width": shape.side}}
    return common | colours | side | {"do_center_crop": True, "image_processor_type": "CLIPImageProcessor"}


def weights(folder: Path, device: torch.device, dtype: torch.dtype, **said: Any) -> dict[str, Entry]:
    """The weights that the folder lacks, by their published names, each drawn on `device` whenever it is read."""
    named = expected(describe(folder, **said))
    return {name: Entry(dtype, shape, partial(drawn, name, shape, device, dtype)) for name, shape in named.items()}


def drawn(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A value that follows from the name alone, of a size that keeps activations of the order of one."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("num_batches_tracked", "running_mean") or (leaf == "bias" and len(shape) == 1):
        return torch.zeros(shape, device=device, dtype=dtype)
    if leaf == "gamma":
        return torch.full(shape, 0.1, device=device, dtype=dtype)
    if len(shape) == 1 or leaf == "running_var":
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(fan_in**-0.5)


def answer_reads(device: torch.device, dtype: torch.dtype) -> None:
    """From now on, in this process, a model folder without weights opens with drawn ones."""

    def read(folder: Path | str, *, base: Any = None, **said: Any) -> checkpoints.Checkpoint:
        assert base is None
        described = describe(Path(folder), **said)
        named = weights(Path(folder), device, dtype, **said)
        return checkpoints.Checkpoint(format="hf", why="made up", said=described, tensors=_stored(described, named))

    checkpoints.read = read


def _stored(described: Any, named: dict[str, Entry]) -> dict[str, Entry]:
    """Without the head, where it is the embedding."""
    tied = getattr(described.config.get_text_config(), "tie_word_embeddings", False)
    head = family(described.family.name).stored_name("lm_head.weight")
    return {name: entry for name, entry in named.items() if not (tied and name == head)}
