"""The work: files, processes, devices, time."""
