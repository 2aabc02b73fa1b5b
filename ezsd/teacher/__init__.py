"""Teachers: open_clip models and plug-ins."""
