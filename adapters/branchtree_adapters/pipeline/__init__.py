"""What adapters of diffusers pipelines share."""
