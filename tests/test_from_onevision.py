"""docs/from_onevision.md has a place for every script, flag and variable of LLaVA-OneVision-1.5."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vistune import recipe
from vistune.models.checkpoints.mcore import Mcore
from vistune.models.families import family

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "from_onevision.md").read_text(encoding="utf-8")

SCRIPTED = """model-name tokenizer-type hf-tokenizer-path data-path dataloader-type split num-workers chat-template
image-resolution training-phase trainable-modules seq-length max-position-embeddings init-method-std micro-batch-size
global-batch-size lr min-lr clip-grad weight-decay optimizer adam-beta1 adam-beta2 adam-eps norm-epsilon train-iters
lr-decay-iters lr-decay-style lr-warmup-fraction initial-loss-scale bf16 load save save-interval ckpt-format
dataloader-save ckpt-fully-parallel-load recompute-granularity recompute-method recompute-num-layers attention-backend
pipeline-model-parallel-size tensor-model-parallel-size use-distributed-optimizer distributed-backend log-interval
tensorboard-dir log-timers-to-tensorboard wandb-project wandb-exp-name"""
"""What the three stages' scripts say."""

OWN = """training-rice-vl-max-image-area training-rice-vl-max-answer-length no-rope-in-fp32 use-normhead mtp-loss-coef
separate-layernorm-and-collinear enable-fa-within-mla use-fast-tokenizer split-special-tokens padding-side
additional-special-tokens vocab-size-in-config-file padded-vocab-size sft-dataset-config sft-dataset sft-train-dataset
sft-valid-dataset sft-test-dataset sft-sort-batch sft-data-streaming streaming-buffer-size sft-data-mix-strategy
sft-num-preprocess-workers train-on-prompt is-tokenized-data packing-sft-data enable-discard-sample packing-batch-size
latent-in-channels latent-out-channels caption-channels latent-patch-size latent-space-scale latent-time-scale
num-latent-frames max-latent-height max-latent-width latent-frame-interval max-text-length stdit-bucket-config
num-bucket-build-workers no-detail-log detail-log-interval variable-seq-lengths enable-ema ema-decay save-ema load-ema
length-sort-pool-size length-sort-desc language-model-type packing-pretrain-data add-question-in-pretrain min-pixels
max-pixels frame-min-pixels frame-max-pixels video-max-pixels fps fps-min-frames fps-max-frames
context-parallel-ulysses-degree"""
"""What its trainer adds to Megatron's (aiak_training_llm/train/arguments.py)."""

CONVERTER = """load_platform save_platform load_ckpt_path save_ckpt_path common_config_path megatron_path no_load_optim
no_save_optim model_type_custom safetensors convert_to_fp8 quant_method amax_epsilon force_pow_2_scales pretrain_as_fp8
fp8_quant_transfer_type torch_dtype vocab_size vpp-scheduler num-virtual-stages-per-pipeline-rank
decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers use_distributed_optimizer tensor_model_parallel_size
pipeline_model_parallel_size data_parallel_size expert_parallel_size expert_tensor_parallel_size pad_vocab_size_to
custom_pipeline_layers num_layers_per_virtual_pipeline_stage transformer_impl num_experts checkpoint-format max_workers
no-te moe-grouped-gemm resume-convert cache-path layer-for-test num-experts-for-test sub-num-layers-for-save
save-sub-checkpoint-by-pp"""
"""tools/convert_checkpoint/arguments.py."""

OTHERS = """vit_path llm_path output_path adapter_path img_path sample_text output_dir json_file image_dir video_dir
maxcount maxsize media columns_messages model_id freeze_vision_tower freeze_llm freeze_merger vision_lr merger_lr
max_seq_length image_min_pixels image_max_pixels image_resized_width image_resized_height lora_enable vision_lora
use_dora lora_rank lora_alpha lora_dropout lora_weight_path lora_bias lora_namespan_exclude num_lora_modules bits
double_quant quant_type use_liger disable_flash_attn2 data_path image_folder lazy_preprocess"""
"""merge_model.py, convert_to_webdataset.py, ds/src/params.py."""

SCRIPTS = """merge_model.py convert_4b_hf_to_mcore.sh convert_4b_mcore_to_hf.sh convert_4b_mcore_to_release.sh model.py
adapter.py vision_patch.py merge_megatron.py merge_huggingface.py stage_1_alignment_llava_ov_4b.sh
stage_1.5_mid_training_llava_ov_4b.sh stage_2_instruct_llava_ov_4b.sh stage_1_alignment.sh stage_1.5_mid_training.sh
pretrain.sh finetune.sh train_dpo.py train_grpo.py merge_lora_weights.py inference.py app.py dist_run.py
huggingface_data_parse.py 1_s1_get_tokenlens_v3-sft.py 2_do_hashbacket.py hashbacket.py 3_s2_prepare_rawsamples-vqa.py
4_convert_packedsample_to_wds.py 5_make_mix_wds_config.py offline_packing_pipeline.sh convert_to_webdataset.py
preprocess_sft_data.py preprocess_pretrain_data.py config.yaml sft_dataset_config.json"""

VARIABLES = """AIAK_TRAINING_PATH AIAK_MAGATRON_PATH DATA_PATH TOKENIZER_PATH CHECKPOINT_PATH SAVE_CKPT_PATH
TENSORBOARD_PATH OFFLINE_PACKED_DATA OFFLINE_PACKING_VQA PYTORCH_CUDA_ALLOC_CONF WANDB_API_KEY WANDB_PROJECT WANDB_NAME
MASTER_ADDR MASTER_PORT NNODES NODE_RANK GPUS_PER_NODE list_ip IMG_ARGS CUDA_DEVICE_MAX_CONNECTIONS
MEGATRON_LOGGING_LEVEL ENABLE_SWANLAB SUBMIT_SCRIPTS NLTK_DATA"""


@pytest.mark.parametrize("flag", f"{SCRIPTED} {OWN} {CONVERTER} {OTHERS}".split())
def test_every_flag_has_its_place(flag: str) -> None:
    shortened = [f"--{flag[: i + 1]}*" for i, letter in enumerate(flag) if letter in "-_"]  # `--latent-*`
    assert any(re.search(rf"`{re.escape(each)}[ `]", PAGE) for each in (f"--{flag}", *shortened))


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_every_script_has_its_place(script: str) -> None:
    widened = re.sub(r"_(4b)_", r"_{4b,8b,14b}_", script)
    assert any(re.search(rf"[`/ ]{re.escape(each)}[` :]", PAGE) for each in (script, widened))


@pytest.mark.parametrize("variable", VARIABLES.split())
def test_every_variable_has_its_place(variable: str) -> None:
    assert f"`{variable}`" in PAGE


def test_keys_options_and_recipes_that_are_named_exist() -> None:
    sections: dict[str, Any] = {name: field.annotation for name, field in recipe.Recipe.model_fields.items()}
    for section, key in re.findall(
        r"`(model|data|lora|optimizer|train|parallel|checkpoint|log)\.(?!py`)([a-z_0-9]+)", PAGE
    ):
        assert key in sections[section].model_fields, f"{section}.{key}"
    for table in re.findall(r"model\.options = \{([^}]*)\}", PAGE):
        for key in re.findall(r"(\w+) =", table):
            assert key in family("onevision15").options, key
    for name in re.findall(r"`(\w+\.toml)`", PAGE):
        assert (ROOT / "recipes" / "llava_onevision_1_5" / name).is_file(), name
    for key in re.findall(r"Mcore\((\w+)=", PAGE):
        assert key in Mcore.__dataclass_fields__
