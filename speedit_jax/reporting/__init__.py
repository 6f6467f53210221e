"""What a run reports: telemetry, boards, curves, where it ran, and its page."""
