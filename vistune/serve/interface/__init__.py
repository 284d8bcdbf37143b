"""Chat completions as OpenAI's clients write and read them: requests parsed and prepared, answers heard and worded."""
