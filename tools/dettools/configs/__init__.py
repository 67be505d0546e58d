"""MMDetection configs for people: where values are set, what differs, written down without secrets."""
