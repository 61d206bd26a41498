"""Continual learning of frozen foundation models with self-activated rank-1 experts (MoRA, arXiv 2506.21035)."""

__version__ = "0.1.0"
