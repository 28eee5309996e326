"""Small pipelines with random weights, of the families of diffusers that ``adapter: diffusers`` was tried on."""
