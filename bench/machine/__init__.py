"""What a result was measured on: its parts, condition, clocks, and the programs that tell."""
