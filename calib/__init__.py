"""Numbers from data: thresholds and operating points."""
