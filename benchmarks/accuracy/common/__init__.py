"""What the training scripts share: recipes, data, networks, and runs that can go on."""
