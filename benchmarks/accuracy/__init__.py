"""How SimAM changes accuracy: classification, detection and recalibration."""
