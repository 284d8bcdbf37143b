"""What readers older than our `transformers` need said in their words: its 4.x, and LLaVA's own code on 4.37.

Both ways of saying stand side by side; ours is what counts here. Knows the files of a folder, nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistune.text_encoder import prefixes

SENTENCEPIECE = "tokenizer.model"
_SLOW = (SENTENCEPIECE, "vocab.json", "merges.txt")
"""What tokenizers in Python alone are made of, which 4.x had beside those of tokenizer.json."""
_OF_THE_MACHINE = ("backend", "is_local", "local_files_only")
_AROUND = ("add_bos_token", "add_eos_token")


def say_in_config(config: dict[str, Any]) -> None:
    """Types and angles of a config.json and of its sections, in the words of 4.x as well."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in section:
            section["torch_dtype"] = section["dtype"]  # until 4.56
        section |= angles(section)


def angles(section: Mapping[str, Any], kind: str = "rope_type") -> dict[str, Any]:
    """`rope_parameters` as 4.x reads them: `rope_theta`, `rope_scaling` where there is any. `kind`: what names it.

    Empty for what has none, or one of them for each kind of layer, which 4.x says otherwise for every model.
    """
    said = section.get("rope_parameters") or {}
    if "rope_theta" not in said:
        return {}
    apart = {key: said[key] for key in ("rope_theta", "partial_rotary_factor") if key in said}
    rope = {key: value for key, value in said.items() if key not in (*apart, "rope_type", "type")}
    if said.get("rope_type", "default") == "default":
        return apart
    if "original_max_position_embeddings" in section:  # Phi-3, which takes these three keys and no other
        kind, rope = "type", {key: rope[key] for key in ("short_factor", "long_factor") if key in rope}
    return {**apart, "rope_scaling": {kind: said["rope_type"], **rope}}


def say_in_processor(folder: Path) -> None:
    """How pictures become pixels is said in preprocessor_config.json alone: 4.49 fails over a copy in the processor's
    own file."""
    file = folder / "processor_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    if (folder / "preprocessor_config.json").exists() and said.pop("image_processor", None):
        _write(file, said)


def say_in_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer's folder, just saved: tokenizer_config.json in both ways of saying, and the files that it was made of
    and `transformers` no longer writes."""
    made_of = Path(str(tokenizer.name_or_path))
    for name in _SLOW:
        if (made_of / name).is_file():
            (folder / name).write_bytes((made_of / name).read_bytes())
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    for key in _OF_THE_MACHINE:
        said.pop(key, None)
    if said.get("add_prefix_space", True) is None:  # "as it is", which 4.x in Python alone takes for "no"
        del said["add_prefix_space"]
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    said["tokenizer_class"] = _class(tokenizer, folder)
    said |= _at_the_ends(tokenizer, made_of, said)
    added = sorted(tokenizer.added_tokens_decoder.items())
    # Without it a tokenizer in Python alone does not know <image>.
    said["added_tokens_decoder"] = {str(id): _token(token) for id, token in added}
    _write(file, dict(sorted(said.items())))


def say_in_merges(folder: Path) -> None:
    """tokenizer.json with merges as text, as every release of `tokenizers` reads them; below 0.20 none reads pairs.
    Where a piece has a space in it they stay as they are."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    said = json.loads(file.read_text(encoding="utf-8"))
    merges = said["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        said["model"]["merges"] = [" ".join(pair) for pair in merges]
        _write(file, said)


def _class(tokenizer: Any, folder: Path) -> str:
    """The class by a name that every release has. "Fast" is for 4.x, where the bare name can mean one in Python alone,
    which has to be made of its own files; ours drops it."""
    kind, sentencepiece = type(tokenizer), (folder / SENTENCEPIECE).exists()
    if kind.__name__ == "TokenizersBackend":  # what ours opens by tokenizer.json alone, whatever the folder says
        return "LlamaTokenizer" if sentencepiece and _is_llamas(tokenizer) else "PreTrainedTokenizerFast"
    bare = sentencepiece or (folder / "vocab.json").exists() or not kind.__module__.startswith("transformers.")
    return kind.__name__ if bare else kind.__name__.removesuffix("Fast") + "Fast"


def _is_llamas(tokenizer: Any) -> bool:
    """Whether a tokenizer works as a Llama's: pieces of SentencePiece, bytes for what is none, a space before."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return bool(model.get("byte_fallback")) and prefixes(tokenizer) != "none"


def _at_the_ends(tokenizer: Any, made_of: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """What stands before and after a text and behind a special token: as said in the folder that the tokenizer was made
    of, which ours leaves out; a Llama's as ours does it, since 4.x goes by these keys and supposes its own without."""
    file = made_of / "tokenizer_config.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {key: before[key] for key in _AROUND if key in before}
    if not str(said["tokenizer_class"]).startswith("LlamaTokenizer"):
        return found
    ids = tokenizer("a").input_ids
    ends = (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id)
    legacy = getattr(tokenizer, "legacy", said.get("legacy", prefixes(tokenizer) == "each"))
    return {**found, **dict(zip(_AROUND, ends, strict=True)), "legacy": bool(legacy)}


def _token(token: Any) -> dict[str, Any]:
    return {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}


def _write(file: Path, said: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
