"""Models driven through their own diffusers pipeline: one step of its ``__call__`` is one prediction."""
