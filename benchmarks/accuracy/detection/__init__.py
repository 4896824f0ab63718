"""Detection with SimAM in the backbone: recipes, data in COCO's format, detectors, evaluation."""
