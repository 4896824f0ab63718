"""Image classification: command line, recipes, data, networks and training."""
