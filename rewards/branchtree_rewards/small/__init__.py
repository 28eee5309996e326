"""Small models of the same classes, with random weights, for trying a recipe out."""
