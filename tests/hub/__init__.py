"""Uploads and downloads through a local stand-in for the Hub."""
