"""Vertex AI: its machines, the images that run on them, its jobs, and what is looked at before one is sent."""
