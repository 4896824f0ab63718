"""Image classification: recipes, data, networks, training."""
