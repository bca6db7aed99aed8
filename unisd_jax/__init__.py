"""Self-distillation for language models in JAX: the student learns from itself, shown a worked solution."""

__version__ = "0.1.0"
