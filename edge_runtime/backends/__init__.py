"""What runs a stage."""
