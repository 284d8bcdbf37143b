"""Tiny random model folders for tests: a vision tower or a language model with real tokenizer and preprocessor files.

Seeded, fp32, written in well under a second; the folders look like those a hub would give.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = GOLDEN / "llava" / "tokenizers"

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def tiny_vision(
    path: Path | str,
    kind: str = "clip",
    *,
    hidden: int = 32,
    layers: int = 3,
    heads: int = 4,
    image_size: int = 56,
    patch_size: int = 14,
    seed: int = 0,
    full: bool = False,
    crop: int = 0,
) -> Path:
    """A vision folder (clip, siglip, dinov2, dinov2_with_registers): `config.json`, `model.safetensors`,
    `preprocessor_config.json`. `crop`: side of its pictures where that is not `image_size` (dinov2).

    `full=True` writes the two-tower model (as most hub folders are) instead of its vision half alone.
    """
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if kind == "clip":
        config, model, full_model = transformers.CLIPVisionConfig(**sizes), "CLIPVisionModel", "CLIPModel"
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        full_config: Any = transformers.CLIPConfig
    elif kind == "siglip":
        config, model, full_model = transformers.SiglipVisionConfig(**sizes), "SiglipVisionModel", "SiglipModel"
        text = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        full_config = transformers.SiglipConfig
    elif kind.startswith("dinov2"):
        sizes["mlp_ratio"] = 2
        del sizes["intermediate_size"]
        config, model = transformers.Dinov2Config(**sizes), "Dinov2Model"
        if kind == "dinov2_with_registers":
            config, model = transformers.Dinov2WithRegistersConfig(**sizes), "Dinov2WithRegistersModel"
    else:
        raise ValueError(f"tiny_vision: kind is {kind!r}; there are clip, siglip, dinov2, dinov2_with_registers")
    path = Path(path)
    torch.manual_seed(seed)
    if full:
        text |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
        both = full_config(vision_config=config.to_dict(), text_config=text, projection_dim=16)
        built = getattr(transformers, full_model)(both)
    else:
        built = getattr(transformers, model)(config)
    _spread(built)
    built.save_pretrained(path)
    _write_preprocessor(path, kind, crop or image_size)
    return path


_LANGUAGES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi": "PhiConfig",
    "phi3": "Phi3Config",
    "smollm3": "SmolLM3Config",
    "mpt": "MptConfig",
}


def tiny_language(
    path: Path | str,
    kind: str = "llama",
    *,
    vocab: str = "",
    tied: bool = False,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 1,
    **more: Any,
) -> Path:
    """A causal language model folder of `kind` (see `_LANGUAGES`) with a tokenizer from the golden data.

    `vocab` names it (llama_like, qwen2_like); by default the one that fits `kind`. `more` goes to the config.
    """
    if kind not in _LANGUAGES:
        raise ValueError(f"tiny_language: kind is {kind!r}; there are {', '.join(_LANGUAGES)}")
    vocab = vocab or ("qwen2_like" if kind.startswith("qwen") else "llama_like")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": 1000}
    if vocab == "qwen2_like":
        ids = {"bos_token_id": None, "eos_token_id": 1002, "pad_token_id": 1000, "vocab_size": 1024}
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
    }
    if kind == "qwen3":
        sizes["head_dim"] = hidden // heads
    if kind == "mpt":
        sizes = {"d_model": hidden, "n_heads": heads, "n_layers": layers, "max_seq_len": 256}
    path = Path(path)
    torch.manual_seed(seed)
    config = getattr(transformers, _LANGUAGES[kind])(**(ids | sizes | more))
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _spread(built)
    built.save_pretrained(path)
    for file in (TOKENIZERS / vocab).iterdir():
        shutil.copy(file, path / file.name)
    return path


def _spread(model: torch.nn.Module) -> None:
    """Make every parameter matter: default init (0.02, zero biases, unit norms) hides most mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))
            else:
                parameter.add_(noise * 0.1)


def _write_preprocessor(path: Path, kind: str, size: int) -> None:
    common: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    if kind.startswith("dinov2"):
        common |= {
            "image_processor_type": "BitImageProcessor",
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "size": {"shortest_edge": size + 8},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
    elif kind == "clip":
        common |= {
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "size": {"shortest_edge": size},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        }
    else:
        common |= {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    (path / "preprocessor_config.json").write_text(json.dumps(common, indent=2))
