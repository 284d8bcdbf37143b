"""One update of what learns: AdamW, its moments, rounding, the loss scale of fp16."""
