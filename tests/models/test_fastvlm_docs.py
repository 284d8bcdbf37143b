"""docs/from_fastvlm.md speaks of every flag, script and variable that FastVLM's repository has beyond LLaVA's."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "from_fastvlm.md"

FLAGS = """vision_tower unfreeze_mm_vision_tower mm_vision_tower_lr mm_projector_lr tune_mm_mlp_adapter
tune_mm_mlp_and_vision_tower mm_vision_select_layer mm_vision_select_feature mm_projector_type version s2 hd
mm_use_im_start_end mm_use_im_patch_token data_path image_folder image_aspect_ratio image_grid_pinpoints
image_crop_resolution image_split_resolution lora_enable bits model-path image-file prompt temperature model-base
conv-mode top_p num_beams model dest hf-path mlx-path only-llm q-bits src dst base-model-path target-model-path
delta-path hub-repo-id"""
FILES = """predict.py get_models.sh get_pretrained_mlx_model.sh export_vision_encoder.py fastvlm_mlx-vlm.patch
train_qwen.py train_mem.py train.py train_xformers.py llava_trainer.py builder.py mci.py apply_delta.py make_delta.py
consolidate.py cli.py controller.py model_worker.py sglang_worker.py register_worker.py gradio_web_server.py
test_message.py"""
VARIABLES = "OPENAI_API_KEY TIMM_FUSED_ATTN"


def test_every_flag_script_and_variable_is_spoken_of():
    text = PAGE.read_text(encoding="utf-8")
    assert not [flag for flag in FLAGS.split() if f"--{flag}" not in text]
    assert not [name for name in (FILES + " " + VARIABLES).split() if name not in text]
