"""Supervisor of several worker processes behind one port."""
