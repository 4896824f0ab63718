"""Object detection with SimAM in the backbone: recipes, COCO data, training, evaluation."""
