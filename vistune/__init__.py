"""vistune: assemble, train, check, evaluate and serve LLaVA-family vision-language models."""

__version__ = "0.1.0"
