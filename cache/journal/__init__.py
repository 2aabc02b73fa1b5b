"""The build's journal: finished work until it is committed."""
