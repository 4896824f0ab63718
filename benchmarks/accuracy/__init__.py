"""What SimAM brings: training, detection, recalibration."""
