"""A recipe: one stage as one TOML file, read into typed sections.

`read` takes the file and the `section.key=value` words of the command line; `dump` writes the resolved recipe back.
It knows what may be said, not what it means: each room reads its own section.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator, model_validator


class Section(BaseModel):
    """A table of the recipe. Unknown keys are errors; nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Model(Section):
    """The model folder the stage starts from. What is not given here stays as the folder says."""

    start: str = Field(description="a model folder, or the folder of a finished run")
    template: str | None = Field(None, description="name of a chat template, see chat.md")
    image: Literal["square", "pad", "anyres"] | None = Field(
        None, description="cut out the middle, widen to a square, or (llava_next) cut into tiles"
    )
    options: dict[str, Any] = Field({}, description="what its family takes beside, see models.md")


class Source(Section):
    """One data file and where its pictures lie. `epochs` is how often its samples come in one epoch of the mixture."""

    path: str = Field(description="the data file or folder; a path or a URI (s3://, gs://, hf://, ...)")
    format: str = Field("llava_json", description="how the file is laid out, see data.md")
    images: str | list[str] = Field("", description="folder or folders of its pictures; empty: the file's own")
    name: str = Field("", description="how faults call it; empty: the file's name")
    epochs: float = Field(1.0, gt=0, description="2.0: each sample twice an epoch; 0.5: another half each epoch")
    weight: float = Field(0.0, ge=0, description="share of the mixture instead of epochs; then every source has one")
    cap: int = Field(0, ge=0, description="at most so many of its samples an epoch, others each epoch; 0: all")
    transforms: list[dict[str, Any]] = Field([], description="tables { do = NAME, ... }, in order; see mixing.md")
    options: dict[str, Any] = Field({}, description="what its format takes beside, see formats.md")
    expect: int = Field(0, ge=0, description="how many samples it should have; data check compares; 0: any number")


class Data(Section):
    """What is read. `length` is the room of a pack, and of a sample, in tokens (images expanded)."""

    sources: list[Source] = Field(min_length=1, description="tables [[data.sources]], one a file")
    length: int = Field(2048, ge=8, description="longer samples are shortened at a turn")
    pack: bool = Field(True, description="several samples in one row, each seeing itself only")
    block: int = Field(1, ge=1, description="neighbouring rows that stay near in the order; for remote shards, 1024")
    images_per_pack: int = Field(0, ge=0, description="no pack has more images; 0: no limit")
    pad: Literal["least", "length"] = Field("least", description="length: every pack is padded to data.length")
    group: Literal["none", "modality", "length"] = Field(
        "none", description="with pack = false: steps of like length, with or without images (LLaVA's order)"
    )
    workers: int = Field(4, ge=0, description="processes per GPU that read and decode; 0: none but this one")
    strict: bool = Field(False, description="the first faulty row stops the run")
    quarantine_cap: float = Field(0.001, ge=0, le=1, description="share of the samples; at least 10 are allowed")
    cache: str = Field("", description="folder of the index; empty: beside the run")


class Rate(Section):
    """Learning rate of one part: from `lr` down to `min_lr` along the schedule."""

    lr: float = Field(gt=0, description="the highest rate, after warm-up")
    min_lr: float = Field(0.0, ge=0, description="the rate of the last step")

    @model_validator(mode="after")
    def _ordered(self) -> Rate:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Learn(RootModel[dict[str, Rate]]):
    """What learns, and how fast: `connector = 1e-3`, `"vision.layers.-4:" = 2e-6`. What is not named is frozen."""

    model_config = ConfigDict(frozen=True)

    @field_validator("root", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: {"lr": v} if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _something(self) -> Learn:
        if not self.root:
            raise ValueError("nothing learns; name at least one part, for example connector = 1e-3")
        return self


class Lora(Section):
    """Low-rank adapters on the linear layers of `parts`; the parts' own weights stay frozen. r = 0: none."""

    r: int = Field(0, ge=0, description="rank of the adapters")
    alpha: float = Field(16.0, gt=0, description="their output is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input")
    parts: list[Literal["language", "vision"]] = Field(["language"], description="each needs a rate in [learn]")
    targets: str = Field("", description="regular expression over full module paths; empty: every linear of the parts")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    dora: bool = Field(False, description="learn magnitude and direction apart")
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none", description="how the frozen matrices of the language model are held; 4bit: NF4 (QLoRA)"
    )
    double_quant: bool = Field(False, description="with 4bit: the blocks' scales are quantised too")


class Optimizer(Section):
    """AdamW and its schedule. `warmup` below 1 is a share of the steps, from 1 on a number of steps."""

    name: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: both moments in 8 bits (bitsandbytes)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases and norms have none")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="from lr down to min_lr")
    warmup: float = Field(0.03, ge=0, description="linear, from 0")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")


Recomputed = Literal["none", "selective", "full"]


class Train(Section):
    """The loop. `batch` counts samples, or packs with unit = "packs"; it is the whole step's, over all GPUs."""

    batch: int = Field(128, ge=1, description="of one step; what one forward cannot hold is accumulated")
    unit: Literal["samples", "packs"] = Field("samples", description="what batch counts")
    micro_batch: int = Field(1, ge=1, description="packs in one forward (samples when data.pack is false)")
    epochs: float = Field(1.0, gt=0, description="passes over the mixture")
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    seed: int = Field(0, description="of the order of the data and of dropout")
    precision: Literal["bf16", "bf16_true", "bf16_stochastic", "fp16", "fp32"] = Field(
        "bf16",
        description="bf16: fp32 weights, bf16 products; bf16_true: bf16 weights, fp32 masters in the optimizer; "
        "bf16_stochastic: bf16 weights alone, updates rounded stochastically; "
        "without bf16 instructions a GPU computes in fp16, a CPU in fp32, and that is said",
    )
    tf32: bool = Field(True, description="for what is left in fp32, where the device has it")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    checkpointing: Recomputed = Field(
        "none", description="activations computed twice: none, all but the dear products' (selective), all of a layer"
    )
    checkpointing_vision: Recomputed | None = Field(None, description="of the vision layers; left out: as the others")
    compile: bool = Field(False, description="torch.compile each layer by itself; the first steps take longer")
    attention: Literal["auto", "varlen", "flex", "flash", "sdpa"] = Field(
        "auto", description="the kernel of packs; auto: the fastest that this device proves to run"
    )
    nonfinite_limit: int = Field(
        5, ge=1, description="steps with a non-finite loss or gradient in a row before it stops"
    )


class Parallel(Section):
    """How the weights lie on the GPUs."""

    shard: Literal["none", "zero2", "zero3"] = Field(
        "none", description="zero2: gradients and optimizer in shards; zero3: weights too; one rank needs none of it"
    )
    replicas: int = Field(1, ge=1, description="whole copies of the sharded model; on several nodes, one a node")
    offload: bool = Field(False, description="shards lie in the host's memory and are updated there")
    timeout: float = Field(1800.0, gt=0, description="seconds a collective may take")


class Checkpoint(Section):
    """When a run can be taken up again."""

    every: int = Field(500, ge=1, description="steps; also at the end and on SIGTERM or Ctrl-C")
    keep: int = Field(2, ge=1, description="the newest this many stay")
    background: bool = Field(True, description="written while the next steps run")


class Log(Section):
    """Who is told. `metrics.jsonl` is always written; trackers only when named."""

    every: int = Field(1, ge=1, description="steps between console lines")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="none is asked for by itself")
    project: str = Field("vistune", description="the trackers' project")
    peak_tflops: float = Field(0.0, ge=0, description="the device's, for MFU; 0: measured at the start")


class Evaluate(Section):
    """What is asked of the model while it trains, and at the end. The training is the same with it and without."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end alone")
    held_out: list[Source] = Field([], description="tables [[evaluate.held_out]]: the loss on their samples")
    benchmarks: list[str] = Field([], description="names, see evaluate.md")
    data: str = Field("", description="folder of the benchmarks' files")
    limit: int = Field(0, ge=0, description="questions of each benchmark, spread over it; 0: all")
    batch: int = Field(8, ge=1, description="questions that each GPU answers at once")
    samples: int = Field(8, ge=0, description="answers of each benchmark that the report shows")
    best: str = Field(
        "",
        description="what the best checkpoint is kept by: held_out_loss, BENCHMARK, BENCHMARK.SCORE; empty: the first",
    )


class Recipe(Section):
    """One stage, resolved."""

    name: str = Field("", description="empty: the file's name")
    run: str = Field("", description="run folder; empty: runs/FOLDER-FILE of the recipe")
    model: Model
    data: Data
    learn: Learn
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        named = {key.split(".")[0] for key in self.learn.root}
        for part in self.lora.parts if self.lora.r else ():
            if part not in named:
                raise ValueError(f"lora.parts names {part}, but learn gives it no rate; add {part} = 2e-4 to [learn]")
        if self.lora.quantize != "none" and not (self.lora.r and "language" in self.lora.parts):
            raise ValueError(
                f"lora.quantize = {self.lora.quantize}: quantised matrices cannot learn; "
                "add adapters for the language model with lora.r"
            )
        if self.lora.double_quant and self.lora.quantize != "4bit":
            raise ValueError('lora.double_quant: is of 4-bit scales; add lora.quantize = "4bit"')
        if self.parallel.offload and self.parallel.shard == "none":
            raise ValueError('parallel.offload: shards are what is offloaded; add parallel.shard = "zero3"')
        if self.data.group != "none" and self.data.pack:
            raise ValueError(f"data.group = {self.data.group!r} orders single samples; add data.pack = false")
        weights = [source.weight > 0 for source in self.data.sources]
        if any(weights) and not all(weights):
            raise ValueError("data.sources: some have a weight and some have none; give one to each, or to none")
        if self.evaluate.benchmarks and not self.evaluate.data:
            raise ValueError('evaluate.benchmarks: where do their files lie? Add data = "..." to [evaluate]')
        if self.evaluate.every and not (self.evaluate.held_out or self.evaluate.benchmarks):
            raise ValueError("evaluate.every: nothing is asked; add [[evaluate.held_out]] or evaluate.benchmarks")
        if self.optimizer.warmup > 1 and self.optimizer.warmup != int(self.optimizer.warmup):
            raise ValueError(f"optimizer.warmup = {self.optimizer.warmup}: a share below 1, or whole steps")
        return self


def read(path: str | Path, words: Iterable[str] = ()) -> Recipe:
    """The recipe in TOML file `path`, with `section.key=value` words laid over it.

    Raises ValueError that names the file, the key, the value and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file. Recipes that come with vistune lie in recipes/.")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not TOML: {error}") from None
    for word in words:
        _lay(tree, word)
    tree.setdefault("name", path.stem)
    tree.setdefault("run", f"runs/{path.parent.name}-{path.stem}" if path.parent.name else f"runs/{path.stem}")
    return build(tree, str(path))


def build(tree: dict[str, Any], origin: str) -> Recipe:
    """A recipe from a nested dict; `origin` names it in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ValueError("\n".join(f"recipe {origin}: {line}" for line in lines)) from None


def dump(recipe: Recipe) -> str:
    """The recipe as TOML text that `read` takes back to an equal recipe."""
    return _toml(recipe.model_dump(exclude_none=True))


def _lay(tree: dict[str, Any], word: str) -> None:
    """Lay one `section.key=value` word over the tree. In `learn` the key is all that follows the first dot."""
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise ValueError(f"{word!r}: expected section.key=value, for example train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    names = key.split(".", 1) if key.startswith("learn.") else key.split(".")
    node: Any = tree
    for name in names[:-1]:
        node = node[_step(node, name, word)] if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"{word!r}: {name} is a value, not a section")
    node[_step(node, names[-1], word)] = value


def _step(node: Any, name: str, word: str) -> Any:
    if not isinstance(node, list):
        return name.strip('"')
    if not name.isdigit() or int(name) >= len(node):
        raise ValueError(f"{word!r}: {name} is not one of the {len(node)} entries (they count from 0)")
    return int(name)


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "(whole recipe)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
        return f"unknown key {where} = {error['input']!r}. {hint}"
    if error["type"] == "missing":
        return f"{where} is missing; add it."
    given = "" if isinstance(error["input"], dict | Section) else f" = {error['input']!r}"
    return f"{where}{given}: {error['msg'].removeprefix('Value error, ')}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    """Keys that may stand in the section at `loc`."""
    kind: Any = Recipe
    for name in loc:
        if isinstance(name, int) or not (isinstance(kind, type) and issubclass(kind, Section)):
            continue
        kind = kind.model_fields[name].annotation
        while get_origin(kind) in (list, Annotated):
            kind = get_args(kind)[0]
        if get_origin(kind) is not None:
            kind = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, Section)), kind)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Section) else []


def _toml(tree: Mapping[str, Any], prefix: str = "") -> str:
    """Plain values first, then tables, then lists of tables."""
    plain, tables = [], []
    for key, value in tree.items():
        name = key if key.isascii() and key.replace("_", "").isalnum() else json.dumps(key)
        if isinstance(value, Mapping) and prefix:
            plain.append(f"{name} = {_inline(value)}")
        elif isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n{_toml(value, name + '.')}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables.extend(f"\n[[{prefix}{name}]]\n{_toml(item, prefix + name + '.')}" for item in value)
        else:
            plain.append(f"{name} = {_inline(value)}")
    return "\n".join(plain) + "\n" + "".join(tables)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON allows it raw, TOML does not
    return repr(value)
