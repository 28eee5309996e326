"""Model adapters shipped with branchtree: one module per model family, and the base class of diffusers pipelines."""

from branchtree_adapters.pipeline.adapter import PipelineAdapter, PipelineConfig

__all__ = ["PipelineAdapter", "PipelineConfig"]
