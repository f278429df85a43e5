"""What an operating point will take on a device that isn't here, from times measured there."""
