"""Calibration metrics on the device, the conventions by name, bootstrap intervals, recalibration."""
