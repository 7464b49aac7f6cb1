"""csp_jax: make vision-language models say how sure they are, and be right about it."""

__version__ = "0.1.0"
