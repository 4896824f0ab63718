"""How fast SimAM is: one layer, and whole models."""
