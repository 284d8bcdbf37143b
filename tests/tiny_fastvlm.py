"""Tiny FastVLM folders for tests: the golden one with a tokenizer beside it, and random ones with real tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import GOLDEN, tiny_language
from vistune.models.families.fastvlm import FastVlm

FASTVLM = GOLDEN / "fastvlm"
SIZES = {"layers": [1, 2, 3, 2, 1], "embed_dims": [8, 16, 32, 64, 128]}
"""Blocks and channels of the golden tower."""


def tokenizer(path: Path, specials: list[str], size: int = 320) -> None:
    """Bytes and filler, the last ids `specials`: a tokenizer of `size` ids, as a folder has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"filler{i}" for i in range(size - len(specials) - len(alphabet)))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_start|>", model_max_length=1024
    )
    fast.save_pretrained(path)


def preprocessor(path: Path, side: int = 256) -> None:
    """The image processor of published FastVLM folders, which does not say that pictures are padded."""
    said = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(said))


def golden_hf(path: Path) -> Path:
    """The golden model folder, made whole: <image> is 317."""
    shutil.copytree(FASTVLM / "hf", path)
    tokenizer(path, ["<image>", "<|im_start|>", "<|im_end|>"])
    preprocessor(path)
    return path


def golden_original(path: Path) -> Path:
    """The golden checkpoint in Apple's format with a tokenizer, which has no <image>."""
    shutil.copytree(FASTVLM / "original", path, ignore=shutil.ignore_patterns("vision_config.json"))
    tokenizer(path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return path


def tiny_fastvlm(path: Path, *, tied: bool = False, side: int = 256, seed: int = 0, image_id: int = 1003) -> Path:
    """A random FastVLM folder: FastViTHD and Qwen2, tiny, with the qwen2-like tokenizer and <image> added to it."""
    tiny_language(path, "qwen2", tied=tied)
    text = transformers.AutoConfig.from_pretrained(path)
    vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 256, "label_names": []}
    config = transformers.FastVlmConfig(
        vision_config=vision | {"model_args": SIZES | {"inference_mode": True}},
        text_config=text,
        image_token_index=image_id,
        tie_word_embeddings=tied,
    )
    (path / "model.safetensors").unlink()
    fast = transformers.AutoTokenizer.from_pretrained(path)
    fast.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    model = FastVlm(config)
    spread(model)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(path)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | {"architectures": ["FastVlmForConditionalGeneration"]}))
    preprocessor(path, side)
    return path


def spread(model: torch.nn.Module) -> None:
    """Make every parameter and buffer matter, at sizes that keep the features of the order of one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("gamma"):
                value.copy_(0.3 + 0.05 * noise)
            elif name.endswith("running_var"):
                value.copy_(1 + 0.1 * noise.abs())
            elif value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                value.add_(0.1 * noise)
