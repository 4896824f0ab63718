"""Speed of SimAM: one layer and whole models, on a CPU and on a GPU."""
