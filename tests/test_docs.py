"""The docs, held to the code: links lead somewhere, recipes in them read, commands exist, made pages are current."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

from vistune import recipe
from vistune.cli import app
from vistune.samples import FaultCode
from vistune.templates import TEMPLATES
from vistune.train.keeping.checkpoint import MAY_DIFFER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())

MODEL_FLAGS = """model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
mm_vision_select_feature"""
DATA_FLAGS = "data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio"
TRAINING_FLAGS = """cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length
double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
group_by_modality_length deepspeed bf16 output_dir num_train_epochs per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps evaluation_strategy save_strategy save_steps save_total_limit
learning_rate weight_decay warmup_ratio lr_scheduler_type logging_steps tf32 gradient_checkpointing
dataloader_num_workers report_to"""
"""LLaVA's arguments (llava/train/train.py), and those of Hugging Face that its scripts give."""

SCRIPTS = """pretrain.sh finetune.sh finetune_lora.sh finetune_task.sh finetune_task_lora.sh pretrain_xformers.sh
finetune_full_schedule.sh finetune_qlora.sh finetune_sqa.sh sqa_eval_batch.sh sqa_eval_gather.sh upload_pypi.sh
qbench.sh qbench_zh.sh merge_lora_weights.py extract_mm_projector.py convert_gqa_for_eval.py
convert_mmbench_for_submission.py convert_mmvet_for_eval.py convert_seed_for_submission.py convert_sqa_to_llava.py
convert_sqa_to_llava_base_prompt.py convert_vizwiz_for_submission.py convert_vqav2_for_submission.py zero2.json
zero3.json zero3_offload.json train.py train_mem.py train_xformers.py llava_trainer.py builder.py apply_delta.py
make_delta.py consolidate.py cli.py controller.py gradio_web_server.py model_worker.py register_worker.py
sglang_worker.py test_message.py run_llava.py model_vqa.py model_vqa_loader.py model_vqa_mmbench.py
model_vqa_science.py model_qa.py qa_baseline_gpt35.py eval_gpt_review.py eval_gpt_review_bench.py
eval_gpt_review_visual.py eval_pope.py eval_science_qa.py eval_science_qa_gpt4.py eval_science_qa_gpt4_requery.py
eval_textvqa.py m4c_evaluator.py summarize_gpt_review.py generate_webpage_data_from_table.py predict.py"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@each_page
def test_recipes_in_the_docs_read(page: Path) -> None:
    whole = {"model": {"start": "m"}, "learn": {"connector": 1e-3}, "data": {"sources": [{"path": "rows.json"}]}}
    for block in blocks(page, "toml"):
        recipe.build(whole | tomllib.loads(block), page.name)  # an example may show some of a recipe's tables alone


def test_there_is_a_recipe_to_read() -> None:
    assert blocks(ROOT / "README.md", "toml")
    assert blocks(DOCS / "recipes.md", "toml")


@each_page
def test_recipes_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(recipes/[\w/]+\.toml)", text))
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert not missing


COMMANDS: dict[str, Any] = {}


def collect(command: Any, words: str = "") -> None:
    for name, child in getattr(command, "commands", {}).items():
        COMMANDS[f"{words} {name}".strip()] = child
        collect(child, f"{words} {name}".strip())


collect(typer.main.get_command(app))


@each_page
def test_commands_in_the_docs_exist(page: Path) -> None:
    text = re.sub(r"\\\n", " ", page.read_text(encoding="utf-8"))
    typed = re.findall(
        r"(?:^|[`\s])(?:-m )?vistune ((?:[a-z][a-z-]*)(?: (?:show|check|convert|prepare|generate|verify))?)([^`\n]*)",
        code(text),
    )
    for words, rest in typed:
        name = words if words in COMMANDS else words.split()[0]
        assert name in COMMANDS, f"`vistune {words}`: no such command"
        known = {one for parameter in COMMANDS[name].params for one in (*parameter.opts, *parameter.secondary_opts)}
        given = set(re.findall(r"(?<!\S)(--[a-z][\w-]*)", rest))
        assert given <= known, f"`vistune {words}`: has no {given - known}"


def code(text: str) -> str:
    """Only what stands in code: fenced text blocks, and spans in backticks."""
    fenced = re.findall(r"(?ms)^```(?:text|bash)\n(.*?)^```", text)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    return "\n".join([*fenced, *spans])


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("chat", "data", "serve")])
def test_what_prints_a_table_speaks_json(name: str) -> None:
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


def test_made_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    stale = [path.name for path, text in reference.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `make docs` and commit what it writes"


def test_every_key_of_a_recipe_says_what_it_means() -> None:
    sections = [recipe.Recipe, *recipe.Section.__subclasses__()]
    silent = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and not is_section(field.annotation)
    ]
    assert not silent


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, recipe.Section | recipe.Learn)


@pytest.mark.parametrize("flag", f"{MODEL_FLAGS} {DATA_FLAGS} {TRAINING_FLAGS}".split())
def test_every_flag_of_llava_has_its_place(flag: str) -> None:
    assert f"`--{flag}`" in (DOCS / "from_llava.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_every_script_of_llava_has_its_place(script: str) -> None:
    assert re.search(rf"[`/]{re.escape(script)}`", (DOCS / "from_llava.md").read_text(encoding="utf-8"))


def test_recipe_keys_in_from_llava_exist() -> None:
    text = (DOCS / "from_llava.md").read_text(encoding="utf-8")
    sections = {name: field.annotation for name, field in recipe.Recipe.model_fields.items()}
    for section, key in re.findall(r"`(model|data|lora|optimizer|train|parallel|checkpoint|log)\.([a-z_0-9]+)", text):
        assert key in sections[section].model_fields, f"{section}.{key}"  # type: ignore[union-attr]


def test_every_fault_template_and_free_key_is_told() -> None:
    data, chat, checkpoints = (
        (DOCS / name).read_text(encoding="utf-8") for name in ("data.md", "chat.md", "checkpoints.md")
    )
    assert not [fault for fault in get_args(FaultCode) if f"`{fault}`" not in data]
    assert not [name for name in TEMPLATES if f"`{name}`" not in chat]
    told = checkpoints.replace("`[", "`").replace("]`", "`")
    assert not [key for key in MAY_DIFFER if f"`{key}`" not in told]


def test_both_readmes_show_the_same_commands_and_recipe() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert blocks(english, "toml") == blocks(chinese, "toml")
    assert blocks(english, "text")[1:] == blocks(chinese, "text")[1:]
    links = [
        set(re.findall(r"\]\((docs/[^)]+\.md)\)", page.read_text(encoding="utf-8"))) for page in (english, chinese)
    ]
    assert links[0] == links[1]
