"""Model-parallel pretraining on megatron-core, with a small language model helping a large one (SALT, arXiv 2410.18779)."""

__version__ = "0.2.0"
