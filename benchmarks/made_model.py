"""The made-up model: a Llama-like tokenizer, chat templates with marked answers, stock LLaVA folders of random weights.

Stock `tokenizers` and `transformers` only; knows nothing of the data's rows and of no contender.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from made_data import Size

IMAGE = "<image>"
PATCH = 14
SPECIALS = ["<unk>", "<s>", "</s>"]
HEAD_ROWS = {"8k": 8064, "32k": 32064}
"""Rows of the embedding and the head. The 32k head is the 8k tokenizer with more rows: both see the very same ids."""

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "model_max_length": 2048,
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Jinja of the two stages, with the assistant's spans marked. One space follows the image, so that a single pass of a
# Metaspace tokenizer gives the ids of the reference, which tokenizes the text after an image by itself; so does one
# after a written BOS, since only the very start of a string gets its space from the tokenizer.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image> ' }}{% endif %}{% endfor %}"
    "{% else %}{% generation %}{{ m['content'][0]['text'] + '\\n' }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHAT = (
    "{{ bos_token + ' ' }}" + SYSTEM + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ (' ' if loop.first else '') + 'USER: ' }}"
    "{% for c in m['content'] %}{{ '<image> \\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{% else %}{{ ' ASSISTANT: ' }}"
    "{% generation %}{{ m['content'][0]['text'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {1: PLAIN, 2: CHAT}
TEMPLATE_NAMES = {1: "plain", 2: "v1"}


def tokenizer(folder: Path, size: Size) -> Any:
    """Train on `folder`/corpus.txt, save in `folder`/tokenizer: Llama-like BPE (byte fallback, Metaspace), then
    `<pad>` and `<image>` behind its pieces."""
    where = folder / "tokenizer"
    where.mkdir()
    _assembled(*_trained(folder / "corpus.txt", size.pieces)).save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(where)
    stock.add_special_tokens({"pad_token": "<pad>"})
    stock.add_special_tokens({"additional_special_tokens": [IMAGE]})
    stock.save_pretrained(where)
    return stock


def _trained(corpus: Path, pieces: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over the corpus, with Llama's special tokens and the 256 bytes in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    heads = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.train([str(corpus)], trainers.BpeTrainer(vocab_size=pieces - len(heads), show_progress=False))
    found = json.loads(bpe.to_str())["model"]
    tail = sorted(found["vocab"], key=found["vocab"].get)
    vocab = {piece: n for n, piece in enumerate(heads + tail)}
    return vocab, [(left, right) for left, right in found["merges"]]


def _assembled(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """As `transformers` converts a Llama tokenizer with legacy off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIALS)
    return made


def model(folder: Path, source: Path, rows: int, size: Size) -> None:
    """A stock LLaVA folder of random weights with `rows` rows of embedding and head; tokenizer from `source`."""
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    torch.manual_seed(size.seed)
    config = _config(size, rows, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE))
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    side = {"height": size.image_size, "width": size.image_size}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": size.image_size}, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)


def _config(size: Size, rows: int, pad: int, image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = CLIPVisionConfig(
        **dict(zip(names, size.vision, strict=True)), image_size=size.image_size, patch_size=PATCH
    )
    language = LlamaConfig(
        **dict(zip(names, size.language, strict=True)),
        vocab_size=rows,
        max_position_embeddings=2048,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image,
        image_seq_length=(size.image_size // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)
