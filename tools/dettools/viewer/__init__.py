"""A page on this machine to look at images, their objects and detections, and to ask a served model."""
