"""An OpenAI-compatible server for vision-language models: pictures batched, safe to expose, with a chat page."""
