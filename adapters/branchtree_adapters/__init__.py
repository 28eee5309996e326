"""Model adapters shipped with branchtree, one module per model family."""
