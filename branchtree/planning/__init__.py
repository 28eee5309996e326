"""What a run needs of a device, before it begins."""
